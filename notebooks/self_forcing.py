"""
Against drift: does a model go on better from its own frames if it was trained on such frames?

    python notebooks/self_forcing.py            three ways to train tiny.pt further, two seeds each
    python notebooks/self_forcing.py --fast     the same in seconds, to see that it runs

Each way makes as many steps on the same clips. Half of these are given four frames: true ones
(plain), true ones under noise (noise), or some that the model drew itself (own). To draw them it is
given the four true frames before; it starts from the true clip under noise of a random level, and
makes a few steps. So its frames are near the true ones, and the target is always the true clip.

Self-forcing proper (Huang et al. 2025) draws whole videos, whose true continuation nobody knows. So
it matches distributions by a critic, and its gradients run through the sampling. The target here is
lawful because four frames of this world tell all that follows.
"""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
import vdm

LAWS = "shape", "color", "size", "path", "speed", "moving"
FOUR = (torch.arange(8) < 4).float()                                    # a mask (8,): four are given

def frames_to_give(way, model, clips):
    """The last 8 of 12 true frames, the first 4 of which become what this way gives."""
    first, last = clips[:, :8], clips[:, 4:].clone()
    if way == "noise":
        last += 0.2 * torch.rand(len(clips), 1, 1, 1, 1) * torch.randn(last.shape)
    if way == "own":
        level = 0.5 * 40 ** torch.rand(1).item()                                    # from 0.5 to 20
        told = partial(model, context=first, mask=FOUR.expand(len(clips), 8))
        x = first + level * torch.randn(first.shape)
        last[:, :4] = vdm.sample_ddim(told, x, vdm.karras_sigmas(4, 0.2, level))[:, 4:]
    return last

def trained(way, seed, steps, batch):
    """The denoiser of tiny.pt after so many more steps."""
    denoiser, config = vdm.load(Path(__file__).with_name("tiny.pt"))
    denoiser.train().requires_grad_(True)
    ema = vdm.EMA(denoiser, 0.97)
    optimizers = train.make_optimizers(config, denoiser)
    world = vdm.MovingShapes(12, seed=100 + seed)
    for i in range(steps):
        torch.manual_seed(1000 * seed + i)
        clips = torch.stack([world[i * batch + k]["video"] for k in range(batch)])
        clean = clips[:, 4:]
        sigma = vdm.lognormal(vdm.stratified(batch))
        noise = torch.randn(clean.shape)
        told = dict(temporal=(torch.rand(batch) >= config.images).float(), context=clean.clone(),
                    mask=FOUR * (torch.arange(batch) % 2)[:, None])
        told["context"][1::2] = frames_to_give(way, ema.model, clips[1::2])
        given = vdm.expand(told["mask"], clean) == 1

        def denoise(x, sigma):                                  # the given frames are not the task
            return torch.where(given, clean, denoiser(x, sigma, **told))

        vdm.diffusion_loss(denoise, clean, sigma, noise)[0].backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), config.clip_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.3 * group["peak"] * min((i + 1) / 20, 1 - i / steps)
            optimizer.step()
            optimizer.zero_grad()
        ema.update(denoiser)
    return ema.model

def mark(name, model, n, length, levels):
    """Print a row: which share of n roll-outs passes up to a length, which law breaks first."""
    denoise = vdm.skip_guided(model, 1.3)
    pieces = vdm.rollout(denoise, length, (n, 8, 3, 32, 32), vdm.karras_sigmas(levels), 4, seed=7,
                         sampler=vdm.SAMPLERS["dpmpp_2m_sde"])
    video = torch.cat(list(pieces), 1)
    marks = [vdm.MovingShapes().check(video[:, :end]) for end in range(8, length + 1, 4)]
    passed = np.stack([m["passed"] for m in marks])                                     # (ends, n)
    first = passed.argmin(0)                    # the first end at which a video fails, if it does
    broken = [np.mean([not passed[end, i] and not marks[end][law][i] for i, end in enumerate(first)])
              for law in LAWS]
    cells = [*passed.mean(1)[::2], *(marks[-1][law].mean() for law in LAWS), *broken]
    print("|", name, "|", " | ".join(f"{share:.0%}" for share in cells), "|", flush=True)

def main(fast=False):
    steps, batch, n, length, levels = (2, 2, 2, 16, 2) if fast else (80, 12, 40, 32, 10)
    ends = [f"passed {end}" for end in range(8, length + 1, 8)]
    print("|", " | ".join(["", *ends, *LAWS, *(f"{law} first" for law in LAWS)]), "|")
    print("|---" * (1 + len(ends) + 2 * len(LAWS)) + "|")
    mark("before", vdm.load(Path(__file__).with_name("tiny.pt"))[0], n, length, levels)
    for seed in range(2):
        for way in ("plain", "noise", "own"):
            mark(f"{way} {seed}", trained(way, seed, steps, batch), n, length, levels)

if __name__ == "__main__":
    main("--fast" in sys.argv[1:])
