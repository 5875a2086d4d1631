"""
Make an image model a video model: how much of it has to be trained?

    python notebooks/adapters.py                            about 25 minutes on one core
    python notebooks/adapters.py --fast                     does the script run?

An image model is trained on loose frames of moving shapes, then made a video model in four ways.
Each has the layers of its paper, and the same steps of training. The table has the parameters that
are trained, and their share, here and in the network of the preset rds (Video LDM); CPU seconds and
memory of a step (beyond the weights); the marks of clips; and the squared error of held-out clips
at noise levels 4 and 16. Film strips lie in out/adapters/.
"""

import argparse
import dataclasses
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train
import vdm

LAWS = ("passed", "shape", "color", "size", "path", "speed", "moving")
WAYS = {                                         # adapters, what is trained, temporal layers it has
    "image model": ("", ("spatial",), ()),
    "SimDA": ("simda", ("adapters",), ()),
    "Tune-A-Video": ("sparse_causal", ("adapters", "temporal"), ("attention",)),
    "Video LDM": ("", ("temporal",), ("attention", "convolutions")),
    "all of it": ("", ("all",), ("attention", "convolutions"))}

class Nothing(nn.Module):
    """In the place of a temporal layer."""

    def forward(self, x, temporal=1.0):
        return x

def make(config, way, weights=None):
    """A denoiser with the layers of a way, of which only what it trains needs a gradient."""
    adapters, parts, kept = WAYS[way]
    model = vdm.build(config)
    if weights is not None:
        model.load_state_dict(weights)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, vdm.TemporalConv) and "convolutions" not in kept:
            model.set_submodule(name, Nothing())
        if isinstance(layer, vdm.TemporalAttention) and "attention" not in kept:
            model.set_submodule(name, Nothing())
    if adapters:
        vdm.adapt(model.net, adapters)
    if parts != ("all",):
        vdm.trainable(model, parts)
    return model

def counted(model):
    """The number of parameters that are trained, and their share of all."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, trained / sum(p.numel() for p in model.parameters())

def fit(model, config, seed):
    """Train; return the averaged model, CPU seconds of a step, and MiB beyond those before."""
    world = vdm.MovingShapes(config.frames, config.size, seed=2 + seed)
    ema = vdm.EMA(model, config.ema)
    optimizers = train.make_optimizers(config, model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    spent = 0
    for step in range(config.steps):
        items = range(config.batch * step, config.batch * (step + 1))
        batch = dict(video=torch.stack([world[i]["video"] for i in items]))
        start = time.process_time()
        loss, _ = train.loss_of(model, batch, train.draw(step, config, seed), config)
        loss.backward()
        train.descend(step, config, model, optimizers)
        ema.update(model)
        spent += time.process_time() - start
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024       # on Linux
    return ema.model, spent / config.steps, memory

@torch.no_grad()
def error(model, world, sigma, n):
    """The squared error of the estimates of n clips."""
    clean = torch.stack([world[i]["video"] for i in range(n)])
    noise = vdm.clip_noise(0, range(n))(*clean.shape[1:])
    return (model(clean + sigma * noise, sigma) - clean).square().mean().item()

def row(way, config, seed, n, out):
    """Train in one way, and return a row of the table. The image model is kept for the others."""
    if way == "image model":
        config = dataclasses.replace(config, images=1.0)
    torch.manual_seed(seed)
    with torch.device("meta"):
        _, large = counted(make(vdm.PRESETS["rds"], way))
    full = vdm.build(config)                          # loose frames leave its temporal layers alone
    if way != "image model":
        full.load_state_dict(torch.load(out / f"image-{seed}.pt"))
    config = dataclasses.replace(config, train=WAYS[way][1])
    model, seconds, memory = fit(make(config, way, full.state_dict()), config, seed)
    if way == "image model":
        torch.save(full.state_dict() | model.state_dict(), out / f"image-{seed}.pt")
    trained, share = counted(make(config, way))
    clips = train.sample(config, model, n, torch.device("cpu"), torch.float32, seed=1)
    vdm.write_video(out / f"{way}-{seed}.png", vdm.film_strip(clips[:8])[None], scale=2)
    world = vdm.MovingShapes(config.frames, config.size, seed=1)
    marks = world.check(clips)
    return [way, f"{trained:,}", f"{share:.1%}", f"{large:.1%}", f"{seconds:.2f}", f"{memory:.0f}",
            *[f"{marks[law].mean():.0%}" for law in LAWS],
            *[f"{error(model, world, sigma, n):.4f}" for sigma in (4, 16)]]

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=600, help="of each way; the image model has twice")
    p.add_argument("--n", type=int, default=128, help="clips that are marked")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    p.add_argument("--out", type=Path, default=ROOT / "out/adapters")
    p.add_argument("--fast", action="store_true", help="two steps, and two clips")
    o = p.parse_args(argv)
    if o.fast:
        o.steps = o.n = 2
    o.out.mkdir(parents=True, exist_ok=True)
    config = vdm.Config(size=(16, 16), attention=("factorised",) * 3, context=(1.0,), steps=o.steps)
    print("| trained | parameters | share | in rds | s per step | MiB | " + " | ".join(LAWS)
          + " | error at 4 | at 16 |\n|" + "---|" * (8 + len(LAWS)))
    for way in o.ways:
        steps = o.steps * 2 if way == "image model" else o.steps
        with multiprocessing.get_context("spawn").Pool(1) as pool:         # whose memory is its own
            cells = pool.apply(row, (way, dataclasses.replace(config, steps=steps), o.seed, o.n,
                                     o.out))
        print(f"| {' | '.join(cells)} |", flush=True)

if __name__ == "__main__":
    main()
