"""
Make an image model a video model: how much of it has to be trained?

    python notebooks/adapters.py               half an hour on one core; --steps 2 --n 2 is a try

An image model is trained on loose frames of moving shapes, for twice the steps. Then it is made a
video model in four ways, each with the layers of its paper. The table has the parameters trained,
and their share, here and in the network of the preset rds (Video LDM); CPU seconds of a step, and
MiB beyond the weights; the marks of clips; and the squared error of held-out clips at noise levels
4 and 16. Film strips lie in out/adapters/.
"""

import argparse
import dataclasses
import multiprocessing
import resource
import time
from pathlib import Path

import torch
from benchmark import LAWS, train, vdm

TIME = vdm.TemporalAttention, vdm.TemporalConv
WAYS = {                                       # adapters, parts that are trained, layers left out
    "image": ("", ("spatial",), TIME),
    "SimDA": ("simda", ("adapters",), TIME),
    "Tune-A-Video": ("sparse_causal", ("adapters", "temporal"), vdm.TemporalConv),
    "Video LDM": ("", ("temporal",), ()),
    "everything": ("", ("spatial", "temporal"), ())}

class Skip(torch.nn.Module):                                    # in the place of a temporal layer
    def forward(self, x, temporal=1.0):
        return x

def make(way, model):
    """Give a model the layers of a way; return how many parameters are trained, and their share."""
    adapters, parts, out = WAYS[way]
    for name, layer in list(model.named_modules()):
        if isinstance(layer, out):
            model.set_submodule(name, Skip())
    if adapters:
        vdm.adapt(model.net, adapters)
    vdm.trainable(model, parts)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, trained / sum(p.numel() for p in model.parameters())

def row(way, config, seed, n, out=Path("out/adapters")):
    """Train in one way; return a row of the table. All but the first start from the image model."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        _, large = make(way, vdm.build(vdm.PRESETS["rds"]))
    config = dataclasses.replace(config, train=WAYS[way][1])
    model = vdm.build(config)
    if way == "image":
        config = dataclasses.replace(config, images=1.0, steps=2 * config.steps)
    else:
        model.load_state_dict(torch.load(out / f"image-{seed}.pt")["model"], strict=False)
    trained, share = make(way, model)
    ema = vdm.EMA(model, config.ema)
    optimizers = train.make_optimizers(config, model)
    world = vdm.MovingShapes(config.frames, config.size, seed=2 + seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss            # the peak so far, in KiB
    start = time.process_time()
    for step in range(config.steps):
        batch = train.default_collate([world[config.batch * step + i] for i in range(config.batch)])
        loss, _ = train.loss_of(model, batch, train.draw(step, config, seed), config)
        loss.backward()
        train.descend(step, config, model, optimizers)
        ema.update(model)
    seconds = (time.process_time() - start) / config.steps
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if way == "image":
        vdm.save(out / f"image-{seed}.pt", model=ema.model.state_dict())
    clips = train.sample(config, ema.model, n, torch.device("cpu"), torch.float32, seed=1)
    vdm.write_video(out / f"{way}-{seed}.png", vdm.film_strip(clips[:8])[None], scale=2)
    world = vdm.MovingShapes(config.frames, config.size, seed=1)
    marks = [f"{world.check(clips)[law].mean():.0%}" for law in LAWS]
    clean = torch.stack([world[i]["video"] for i in range(n)])
    noise = vdm.clip_noise(0, range(n))(*clean.shape[1:])
    with torch.no_grad():
        errors = [(ema.model(clean + s * noise, s) - clean).square().mean() for s in (4, 16)]
    return [way, f"{trained:,}", f"{share:.1%}", f"{large:.1%}", f"{seconds:.2f}", f"{memory:.0f}",
            *marks, *[f"{error:.4f}" for error in errors]]

def main():
    p = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=500, help="steps of training of each way (500)")
    p.add_argument("--n", type=int, default=128, help="clips that are marked (128)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    o = p.parse_args()
    config = vdm.Config(size=(16, 16), attention=("factorised",) * 3, context=(1.0,), steps=o.steps)
    names = ("trained", "parameters", "share", "in rds", "s", "MiB", *LAWS, "at 4", "at 16")
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|")
    for way in o.ways:
        with multiprocessing.get_context("spawn").Pool(1) as pool:      # its peak memory is its own
            print(f"| {' | '.join(pool.apply(row, (way, config, o.seed, o.n)))} |", flush=True)

if __name__ == "__main__":
    main()
