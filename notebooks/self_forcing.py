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

A row has the share of roll-outs that pass up to a length, and the share of those in which a law is
among the first to break.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
import vdm

LAWS = "shape", "color", "size", "path", "speed", "moving"
FOUR = (torch.arange(8) < 4).float()                                   # a mask (8,): four are given

def last_eight(way, model, clips):
    """The last 8 of 12 true frames, of which the first 4 become what this way gives."""
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
    config = dataclasses.replace(config, steps=steps, warmup=20, lr=0.3 * config.lr,
                                 muon_lr=0.3 * config.muon_lr)
    optimizers = train.make_optimizers(config, denoiser)
    ema = vdm.EMA(denoiser, 0.97)
    world = vdm.MovingShapes(12, seed=100 + seed)
    mask = FOUR * (torch.arange(batch) % 2)[:, None]                                       # (B, 8)
    for i in range(steps):
        torch.manual_seed(1000 * seed + i)
        clips = torch.stack([world[i * batch + k]["video"] for k in range(batch)])
        clean = clips[:, 4:]
        sigma = vdm.lognormal(vdm.stratified(batch))
        noise = torch.randn(clean.shape)
        told = dict(temporal=(torch.rand(batch) >= config.images).float(), mask=mask,
                    context=clean.clone())
        told["context"][1::2] = last_eight(way, ema.model, clips[1::2])

        def denoise(x, sigma):                                  # the given frames are not the task
            return torch.where(vdm.expand(mask, x) == 1, clean, denoiser(x, sigma, **told))

        vdm.diffusion_loss(denoise, clean, sigma, noise)[0].backward()
        train.descend(i, config, denoiser, optimizers)
        ema.update(denoiser)
    return ema.model

def mark(name, model, n, length, levels):
    """Print the row of n roll-outs."""
    pieces = vdm.rollout(vdm.skip_guided(model, 1.3), length, (n, 8, 3, 32, 32),
                         vdm.karras_sigmas(levels), 4, sampler=vdm.SAMPLERS["dpmpp_2m_sde"])
    video = torch.cat(list(pieces), 1)
    marks = [vdm.MovingShapes().check(video[:, :end]) for end in range(8, length + 1, 4)]
    passed = np.stack([m["passed"] for m in marks])                                     # (ends, n)
    first = passed.argmin(0)                           # the first end at which a video fails, or 0
    broken = [np.mean([not marks[end][law][i] for i, end in enumerate(first)]) for law in LAWS]
    print("|", name, "|", " | ".join(f"{x:.0%}" for x in [*passed.mean(1)[::2], *broken]), "|",
          flush=True)

def main(fast=False):
    seeds, steps, batch, n, length, levels = (1, 1, 2, 1, 12, 1) if fast else (2, 60, 8, 32, 32, 8)
    ends = [f"pass {end} frames" for end in range(8, length + 1, 8)]
    print("|", " | ".join(["", *ends, *LAWS]), "|\n" + "|---" * (1 + len(ends) + len(LAWS)) + "|")
    mark("before", vdm.load(Path(__file__).with_name("tiny.pt"))[0], n, length, levels)
    for seed in range(seeds):
        for way in ("plain", "noise", "own"):
            mark(f"{way} {seed}", trained(way, seed, steps, batch), n, length, levels)

if __name__ == "__main__":
    main("--fast" in sys.argv[1:])
