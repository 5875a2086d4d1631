"""
Against drift: does a model go on better from its own frames if it was trained on such frames?

    python notebooks/self_forcing.py

tiny.pt is trained further on clips that are given four frames: true ones (plain), true ones under
noise (noise), or some that it drew from the true clip under noise (own). The target is the true
clip. Self-forcing proper (Huang et al. 2025) draws whole videos, and has a critic judge them.
"""
import dataclasses
import sys
from functools import partial
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
import vdm

def last_eight(way, model, clips):
    """The last 8 of 12 true frames, of which the first 4 become what this way would give."""
    last = clips[:, 4:].clone()                                                    # (B, 8, C, H, W)
    if way == "noise":
        last[:, :4] += 0.2 * torch.rand(len(clips), 1, 1, 1, 1) * torch.randn(last[:, :4].shape)
    if way == "own":
        level = 0.5 * 40 ** torch.rand(1).item()                                    # from 0.5 to 20
        mask = (torch.arange(8) < 4).float().expand(len(clips), 8)
        x = clips[:, :8] + level * torch.randn(clips[:, :8].shape)
        told = partial(model, context=clips[:, :8], mask=mask)
        last[:, :4] = vdm.sample_ddim(told, x, vdm.karras_sigmas(4, 0.2, level))[:, 4:]
    return last

def main(steps=60, seeds=2, n=32, length=32, levels=8):
    """Print a row for each way and seed: marks of n roll-outs, whole and up to 8, 16 ... frames."""
    for way, seed in [("before", 0), *product(("plain", "noise", "own"), range(seeds))]:
        model, config = vdm.load(Path(__file__).with_name("tiny.pt"))
        config = dataclasses.replace(config, steps=steps, batch=8, warmup=20, lr=6e-4, muon_lr=3e-3)
        optimizers = train.make_optimizers(config, model.train().requires_grad_(True))
        ema = vdm.EMA(model, 0.97)
        world = vdm.MovingShapes(12, seed=100 + seed)
        for i in range(steps if way != "before" else 0):
            drawn = train.draw(i, config, seed)
            clips = torch.stack([world[8 * i + k]["video"] for k in range(8)])
            given = vdm.expand(drawn["mask"], clips) == 1                   # (B, 8, 1, 1, 1)
            clean = torch.where(given, last_eight(way, ema.model, clips), clips[:, 4:])
            train.loss_of(model, dict(video=clean), drawn, config)[0].backward()
            train.descend(i, config, model, optimizers)
            ema.update(model)
        pieces = vdm.rollout(vdm.skip_guided(ema.model, 1.3), length, (n, 8, 3, 32, 32),
                             vdm.karras_sigmas(levels), 4, sampler=vdm.SAMPLERS["dpmpp_2m_sde"])
        video = torch.cat(list(pieces), 1)
        marks = [vdm.MovingShapes().check(video[:, :end]) for end in range(8, length + 1, 8)]
        shares = [f"{m['passed'].mean():.0%}" for m in marks]
        shares += [f"{law} {x.mean():.0%}" for law, x in marks[-1].items() if x.dtype == bool]
        print(f"{way} {seed}:", ", ".join(shares), flush=True)

if __name__ == "__main__":
    main()
