"""
train.py: train a video diffusion model.

    python train.py --preset tiny                        a toy world: no data, no download, no GPU
    python train.py --preset tiny --data drive           another, whose clips obey commands: left, straight, right, stop
    python train.py --preset tiny --data my_videos/      your own files: videos, GIFs, picture folders, arrays
    python train.py --preset tiny --resume               go on where a run was stopped
    torchrun --nproc_per_node 8 train.py ...             many GPUs: the same run, each step's clips shared among them

    python train.py --preset latent --stage autoencoder                                       latent diffusion: frames to
    python train.py --preset latent --stage decoder --latents out/latent-autoencoder/last.pt  latents and back; the same
    python train.py --preset latent --latents out/latent-decoder/last.pt                      for clips; then diffusion

    python train.py --preset tiny --init out/tiny/last.pt --adapters lora --train lora --out out/lora
                                                         start from a trained model, train a twentieth of it

A preset is a set of defaults; every field of vdm.Config is a flag that changes it. A run writes to out/NAME:
config.json, log.csv, last.pt (all that --resume and sample.py need) and samples/ (pictures and GIFs on the way).
To read: flags, a training step, optimisers, samples, the run. What comes after main() is for runs that need more.
"""

import argparse
import copy
import csv
import ctypes
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import sys
import time
import weakref
import zlib
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import vdm

STAGES = dict(diffusion={}, autoencoder=dict(steps=1600, batch=16, anchor=0.0),                          # their defaults
              decoder=dict(steps=240, batch=4, anchor=0.0))
WORLDS = dict(shapes=vdm.MovingShapes, drive=vdm.Drive)
USUAL = dict(shapes={}, drive=dict(jump=0.0, temporal_guidance=1.0, sampling_steps=40, sigma_min=0.2, motion=False))
# of drive: guided, the car hardly ever stops, and its commands tell how far it moves
BAR = dict(mininterval=0.5 if sys.stderr.isatty() else 20, ncols=110)


# ---- flags -----------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help lists all flags)\n")


def parse(argv):
    """Flags -> (options, Config). The comment beside each field of Config is its --help line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--preset", default="tiny", choices=vdm.PRESETS, help="defaults for all that follows")
    p.add_argument("--data", default="shapes", help="shapes or drive (toy worlds), or a file or folder of your own")
    p.add_argument("--out", help="folder of the run (default out/PRESET, or out/PRESET-DATA)")
    p.add_argument("--resume", action="store_true", help="go on from last.pt in the folder of the run")
    p.add_argument("--stage", default="diffusion", choices=STAGES, help="what to train: diffusion (default), or its autoencoder")
    p.add_argument("--latents", help="last.pt of an autoencoder: to train on its latents or, with another --stage, to go on with")
    p.add_argument("--encode", type=int, default=2048, help="with --latents: how many clips are cut and encoded, once (2048)")
    p.add_argument("--init", help="a last.pt to start from: its averaged weights, of a run with the same network")
    p.add_argument("--seed", type=int, default=0, help="fixes weights, data and noise")
    p.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu) or a name that torch knows")
    p.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 where it is fast")
    p.add_argument("--save-every", type=int, help="steps between checkpoints (default: a tenth of the run)")
    p.add_argument("--sample-every", type=int, help="steps between sample pictures (default: a fifth of the run)")
    p.add_argument("--keep-every", type=int, help="keep a checkpoint step_000500.pt as well, every so many steps")
    p.add_argument("--marks", type=int, default=64, help="clips generated and marked at the end")
    p.add_argument("--dry-run", action="store_true", help="print parameters, operations and memory of the run, and stop")
    p.add_argument("--gpu-memory", type=float, metavar="GIB", help="of --dry-run: the largest batch that fits such a GPU")
    p.add_argument("--speed", type=float, metavar="TFLOPS", help="of --dry-run: the time of all steps at this speed per GPU")
    large = p.add_argument_group("large runs; none of these changes what is learnt, but for rounding")
    large.add_argument("--micro", type=int, help="clips that a process handles at a time (default: its share of --batch)")
    large.add_argument("--shard", action="store_true", help="torchrun: divide weights, AdamW and averages among processes")
    large.add_argument("--checkpoint-activations", action="store_true", help="less memory for a third more work")
    large.add_argument("--compile", action="store_true", help="compile the network, where there is a compiler")
    large.add_argument("--workers", type=int, default=0, help="processes that read clips ahead: for data_wait above a few %%")
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(vdm.Config), re.M))
    fields = p.add_argument_group("Config fields, with the defaults of --preset tiny")
    for f in dataclasses.fields(vdm.Config):
        flag, default = "--" + f.name.replace("_", "-"), getattr(vdm.PRESETS["tiny"], f.name)
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else \
            dict(nargs="+", type=type((*default, 0)[0])) if f.type is tuple else dict(type=f.type)
        fields.add_argument(flag, default=argparse.SUPPRESS, help=f"{comments[f.name]} ({default})", **kind)
    options = p.parse_args(argv)
    for flag in ("data", "out", "init", "latents"):
        if getattr(options, flag) == "":
            raise ValueError(f"--{flag} is empty: expected a path, or leave the flag out")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(options).items() if k in comments}
    if len(given.get("size", (0, 0))) == 1:
        given["size"] *= 2                                             # one number: square frames
    name = options.preset if options.data == "shapes" else f"{options.preset}-{Path(options.data).stem}"
    name += f"-{options.stage}" * (options.stage != "diffusion")
    options.given, options.out = given, Path(options.out or f"out/{name}")
    usual = USUAL.get(options.data, dict(jump=0.0))                    # elsewhere the past need not tell the future
    if given.get("frames") == 1 or given.get("task") in ("ends", "any", "upsample"):     # nothing moves, or given frames show how
        usual = usual | dict(motion=False)
    return options, dataclasses.replace(vdm.PRESETS[options.preset], **STAGES[options.stage] | usual | given)


def limit(names, expected, low, high, *sources):
    """Refuse what is outside low to high, as infinity and NaN always are, of the numbers called so in one of the sources."""
    for name in names.split():
        value = next(getattr(source, name) for source in sources if hasattr(source, name))
        if value is not None and not all(low <= x <= high for x in np.atleast_1d(value)):
            value = " ".join(f"{x:g}" for x in np.atleast_1d(value))
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected {expected}")


MOST, TINY = sys.float_info.max, sys.float_info.min
LIMITS = {("1 or more", 1, MOST): "steps batch frames stride rates size channels width mults blocks patch head_dim rank "
                                  "ae_width actions sampling_steps marks encode save_every sample_every keep_every micro",
          ("0 or more", 0, MOST): "factor detail base stills labels workers kl dynamics structure offset context_noise "
                                  "anchor overlap context lr gate_lr muon_lr warmup weight_decay spatial_lr jump "
                                  "temporal_guidance",
          ("more than 0", TINY, MOST): "sigma_min sigma_max rho std sigma_data gamma given_noise clip_norm latent_scale "
                                      "gpu_memory speed",
          ("0 to 10^12", 0, 10 ** 12): "seed",
          ("0 to 1", 0, 1): "dropout independent joint_weight images drop mode_drop ema",
          ("0.1 to 1000", 0.1, 1000): "fps",
          ("a number", -MOST, MOST): "mean"}


def check(options, config):
    """Refuse settings that nothing could run with, or that would do nothing. Names and sizes that do not fit: vdm.build."""
    for expected, names in LIMITS.items():
        limit(names, *expected, config, options)
    if config.sigma_min >= config.sigma_max:
        raise ValueError(f"--sigma-min is {config.sigma_min:g}, expected less than --sigma-max, {config.sigma_max:g}")
    own, told = options.data not in WORLDS, config.labels or config.actions or options.data != "shapes"
    needs = dict(gamma=(config.weighting == "min_snr", "--weighting min_snr"),
                 sigma_data=("edm" in (config.kind, config.weighting), "--kind edm or --weighting edm"),
                 mean=(config.schedule == "lognormal", "--schedule lognormal"),
                 std=(config.schedule == "lognormal", "--schedule lognormal"),
                 offset_per_frame=(config.offset, "--offset above 0"), dynamics_toy=(config.dynamics, "--dynamics above 0"),
                 independent=(config.give == "per_frame", "--give per_frame"), rank=(config.adapters, "--adapters"),
                 context=(not (config.previous and sum(config.context[1:])), "a run without --previous"),
                 joint_weight=(config.previous, "--previous"),
                 given_noise=(sum(config.context[1:]) and not config.previous, "--context with odds of given frames"),
                 drop=(told or config.motion, "--motion, --labels or actions"),
                 motion=(config.frames > 1 or not config.motion, "2 or more --frames"),
                 mode_drop=(told and options.data != "shapes", "actions"),
                 muon_lr=(config.optimizer == "muon", "--optimizer muon"), stride=(own, "--data of your own"),
                 kl=(config.factor, "--factor"), ae_width=(config.factor, "--factor"),
                 latent_scale=(own and not options.latents, "--data of latents made elsewhere"))
    for name, (met, need) in needs.items():
        if name in options.given and not met and not options.resume:
            raise ValueError(f"--{name.replace('_', '-')} does nothing here: it needs {need}")
    p, concat, noisy = config.context, config.give == "concat", config.context_noise
    whole = config.previous or not sum(p[1:])                          # no single frames are given
    for wrong, sentence in (
            (len(p) > config.frames or not sum(p), f"--context is {p}: expected odds of 0, 1, 2 ... given frames, of which a "
             f"window of {config.frames} has room for {config.frames - 1}, as --context 0.5 0.5 has of 0 and 1"),
            (not whole and not p[0], f"--context is {p}: expected more than 0 as its first number, the odds that no frame is "
             "given, for samples and the start of a long video have none"),
            (config.task != "predict" and (whole or config.frames < 3), f"--task is {config.task}: it needs 3 --frames or more, "
             f"odds in --context, {p}, that some are given, and no --previous"),
            (config.task in ("image", "upsample") and not (concat and noisy),
             f"--task is {config.task}: it needs --give concat, and --context-noise above 0"),
            (config.task == "upsample" and (config.factor or options.latents or any(n % 4 for n in config.size)),
             f"--size is {config.size}: --task upsample needs multiples of 4, of pixels: --factor 0"),
            (noisy and config.give == "replace", "--give replace needs --context-noise 0"),
            (whole and (noisy or not (concat or config.independent)) or config.previous and config.independent,
             "without single given frames (--previous, or --context 1) neither --give nor --context-noise does anything")):
        if wrong and options.stage == "diffusion":
            raise ValueError(sentence)
    if pixels(config)[1] not in ([3] if options.data in WORLDS and not options.dry_run else [1, 3]):
        raise ValueError(f"--channels is {config.channels}, but the toy world is in colour, 3, and files of pixels have 1 or 3: "
                         "latents need a --factor, and --latents")
    if (options.gpu_memory or options.speed) and not options.dry_run:
        raise ValueError("--gpu-memory and --speed do nothing here: they need --dry-run")
    if options.given.get("overlap", 0) >= config.frames:
        raise ValueError(f"--overlap is {config.overlap}, expected less than --frames, {config.frames}: windows must add frames")
    levels = [2 ** n for n in range(len(config.mults))]
    if not set(config.joint) <= set(config.attention) <= set(levels):
        raise ValueError(f"--attention is {config.attention} and --joint {config.joint}: expected some of the factors by which "
                         f"the levels of this network are smaller, {levels}, and as --joint some of --attention")
    if config.temporal_guidance != 1 and not config.images:
        raise ValueError(f"--temporal-guidance is {config.temporal_guidance:g}, but what it asks the model is taught by --images "
                         "above 0: without, it must be 1")
    if config.stills and (config.previous or config.give == "per_frame" or config.weighting == "balance"):
        raise ValueError(f"--stills is {config.stills}: it needs a --weighting other than balance, and neither --previous nor "
                         "--give per_frame")
    if config.optimizer not in ("adamw", "muon") or len(config.size) != 2:
        raise ValueError(f"--optimizer is {config.optimizer} and --size {config.size}: expected adamw or muon, and one or two "
                         "numbers")
    if options.given.get("anchor") and not config.anchors:
        raise ValueError(f"--anchor is {config.anchor:g}, but does nothing here: it is for --task predict and --give concat, "
                         "without --previous and --context-noise, where --context has odds of 4 or more frames and --overlap is "
                         "4 or more")


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        x = torch.zeros(1, device=name)
        x.item()                                                       # which device meta cannot
        return x.device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name} is not to be had here ({str(e).splitlines()[0]}): try --device auto") from e


def pick_dtype(name, device):
    """bf16 where the hardware multiplies it faster than fp32; weights stay in fp32 either way."""
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else \
        device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if name == "bf16" or (name == "auto" and fast) else torch.float32


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ---- a training step -------------------------------------------------------------------------------------------------

def draw(step, config, seed):
    """Whatever chance decides in a step, by name, a row per clip of the whole batch. It follows from (seed, step): resuming
    needs no generator's state, and each process that takes part of a batch draws it all."""
    torch.manual_seed(seed * 1_000_003 + step)
    B, T, shape = config.batch, config.frames, (config.batch, config.frames, config.channels, *config.size)
    u = vdm.stratified(B)                                                                            # (B,)
    if config.independent:
        u = vdm.independent_levels(u, T, config.independent)                                         # (B, T)
    drawn = dict(sigma=vdm.noise_schedule(config)(u))
    if config.labels:
        drawn["label"] = torch.rand(B) >= config.drop
    if config.motion:
        drawn["motion"] = torch.rand(B) >= config.drop
    if config.actions:
        drawn["action"] = vdm.drop_modes(torch.ones(B, 1, sum(config.actions)), config.actions, config.drop, config.mode_drop)
    if config.context_noise or config.anchors:
        drawn |= dict(level=(config.context_noise or config.anchor) * torch.rand(B), unit=torch.randn(shape))
    if config.rates != (1,):
        drawn["rate"] = torch.tensor(config.rates)[torch.randint(len(config.rates), (B,))]           # (B,)
    if config.anchors:
        drawn["time"] = torch.rand(B)                                  # of the first frames: 0, long ago, to 1, where they are
    if not config.previous:
        drawn["mask"] = vdm.draw_mask(B, T, config.context, config.task)                             # (B, T)
    if config.images:
        drawn["temporal"] = (torch.rand(B) >= config.images).float()                                 # (B,)
    drawn["noise"] = vdm.offset_noise(torch.randn(shape), config.offset, config.offset_per_frame)
    if config.stills:
        drawn["noise"] = torch.cat([drawn["noise"], torch.randn(B, config.stills, *shape[2:])], 1)
    return drawn


def earlier(config):
    """How many frames before an item's may be its anchors: so many that where things were does not tell how they move now."""
    return 3 * config.frames * (config.anchors > 0)


def cut(batch, drawn, config):
    """Of the frames of each item those to train on: the last, at the rate drawn. How far things move there is measured. Anchors,
    the first frames of all, which rollout shows every window, are of any time before."""
    n, rows = config.frames * (1 + config.previous), torch.arange(len(batch["video"]), device=drawn["sigma"].device)[:, None]
    before = batch["video"].shape[1] - (n - 1) * max(config.rates) - 1
    at = before + torch.arange(n, device=rows.device) * drawn.get("rate", torch.ones_like(rows[:, 0]))[:, None]        # (B, n)
    pace = dict(pace=vdm.motion_score(batch["video"][rows, at])) if config.motion else {}            # (B,)
    if config.anchors:
        back = (drawn["time"] * (before + 1)).long() - before
        at[:, :config.anchors] += torch.where(drawn["mask"].sum(1) > config.anchors + 1, back, 0)[:, None]
    return batch | pace | {name: batch[name][rows, at] for name in ("video", "action") if name in batch}


def measure_paces(data, config, seed):
    """The motion scores that 0, 1/16 ... 1 of 256 items, cut as for training, stay below (17,)."""
    chance = draw(0, dataclasses.replace(config, batch=256, size=(1, 1), stills=0), seed)
    rows = [{name: x[i : i + 1] for name, x in chance.items()} for i in range(256)]
    scores = torch.cat([cut(default_collate([data[i]]), row, config)["pace"] for i, row in enumerate(rows)])
    return scores.nanquantile(torch.linspace(0, 1, 17))


def conditions(batch, config, drawn={}):
    """What the model is told of a batch besides frames: label (B,), motion (B,), action (B, T, A), but for what draw()
    withholds."""
    told = {}
    if config.labels:
        told["label"] = batch["label"].where(drawn["label"], -1) if drawn else batch["label"]
    if config.motion and drawn:                                        # else vdm.generate draws it
        told["motion"] = batch["motion"].where(drawn["motion"], -1)
    if config.actions:                                                 # with --previous, those of the second half
        told["action"] = batch["action"][:, -config.frames:] * drawn.get("action", 1)
    return told


def loss_of(denoiser, batch, drawn, config, weighting):
    """-> the loss, the noise levels, and the squared errors at them, unweighted."""
    clean, sigma, noise = batch["video"], drawn["sigma"], drawn["noise"]               # (B, T, C, H, W), (B,) or (B, T)
    # PyTorch 2.13 dies on a CPU where a GroupNorm learns but what comes before it is frozen: give noise a gradient, too
    noise.requires_grad_(not all(p.requires_grad for p in denoiser.parameters()))
    options = dict(conditions(batch, config, drawn), weighting=weighting, sigma_data=config.sigma_data, gamma=config.gamma,
                   dynamics=config.dynamics, dynamics_toy=config.dynamics_toy, structure=config.structure)
    if config.previous:                                                # items are of twice the length
        previous, clean = clean.chunk(2, 1)
        loss_fn, options = vdm.joint_loss, dict(options, previous=previous, share=config.joint_weight)
    else:
        context, mask = vdm.draw_context(clean, drawn["mask"], config.task, drawn.get("level"), drawn.get("unit"), config.anchors)
        sigma = sigma * vdm.expand(torch.where(mask.amax(1) > 0, config.given_noise, 1.0), sigma)
        if config.give == "per_frame":                                 # then this is the level of what is given
            sigma = torch.where(mask > 0, 1 / mask - 1, vdm.expand(sigma, mask))                     # (B, T)
        loss_fn, options = vdm.diffusion_loss, dict(options, context=context, mask=mask)
    if config.stills:
        loss_fn, options = vdm.joint_image_loss, dict(options, images=batch["stills"])
    if config.images:
        options["temporal"] = drawn["temporal"]
    loss, parts = loss_fn(denoiser, clean, sigma=sigma, noise=noise, **options)
    return loss, sigma, parts["error"]


def train_step(step, config, data, denoiser, ema, optimizers, device, dtype, seed, parts=None, batches=None, ddp=None):
    """One optimiser step -> what to log of it. A large run passes the `parts` of the batch that this process takes, one after
    another; `batches`, which yields them read ahead; and `ddp`, the denoiser as it shares gradients with other processes."""
    if config.motion and denoiser.paces[-1] < 0:                       # before the first step
        denoiser.paces.copy_(measure_paces(data, config, seed))
    chance, parts, seen, waited = draw(step, config, seed), parts or [range(config.batch)], [], 0.0
    balance = getattr(denoiser, "balance", None)
    if balance:
        balance.hold = True                                            # until the whole batch has been seen
    for part in parts:
        # batch
        began = time.perf_counter()
        batch = next(batches) if batches else default_collate([data[step * config.batch + i] for i in part])
        batch = {name: x.to(device) for name, x in batch.items()}
        waited += time.perf_counter() - began
        # noise, and all else that is drawn
        drawn = {name: x[part.start : part.stop].to(device) for name, x in chance.items()}
        if config.anchors or config.motion or "rate" in drawn:
            batch = cut(batch, drawn, config)
        if config.motion:
            batch["motion"] = vdm.motion_rank(batch["pace"], denoiser.paces)
        if part.start:                                                 # dropout alone depends on how a batch is shared
            torch.manual_seed(hash((seed, step, part.start)))
        # loss and backward
        with ddp.no_sync() if ddp and part is not parts[-1] else nullcontext():
            with autocast(device, dtype):
                loss, *levels = loss_of(ddp or denoiser, batch, drawn, config, balance or config.weighting)
            (loss / len(parts)).backward()
        seen.append((loss.detach()[None], *levels))
    loss, sigma, error = (gather(torch.cat(x)) for x in zip(*seen))
    # step
    norm, rate = descend(step, config, denoiser, optimizers)
    if balance:
        balance.seen = gather(balance.seen[None]).sum(0)
        balance.fold()
    # EMA
    ema.update(denoiser)
    noisy = sigma > 0                                                  # what is given has no error to log
    return dict(loss=loss.mean().item(), norm=norm.item(), rate=rate, waited=waited, sigma=sigma[noisy].cpu(),
                error=error[noisy].cpu())


def descend(step, config, model, optimizers):
    """A step down the gradient, which is cut and then cleared; the learning rate rises, then falls to 0 in a straight line.
    -> the gradient's norm, and the rate as a share of its peak."""
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm))
    if not norm.isfinite():
        raise ValueError(f"the gradient is {norm.item()} at step {step + 1}: stopped, and the last checkpoint kept. A lower --lr "
                         "or --muon-lr, or --dtype fp32, is the usual cure")
    rate = min((step + 1) / max(config.warmup, 1), 1 - step / config.steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        optimizer.step()
        optimizer.zero_grad()
    return norm, rate


# ---- optimisers ------------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al. 2024): every weight matrix moves equally far in
    all directions of its gradient, the rare ones too. With an earlier form of the tiny network the error at sigma 1
    fell to 9.4e-3 in 240 core seconds, with AdamW to 15.7e-3."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                                                 # what has as many rows is handled together
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                m = p.grad.lerp(average, group["momentum"]).flatten(1)
                m = m / (m.norm() + 1e-7)
                m = m.mT if len(m) > m.shape[1] else m                                              # (rows, columns)
                alike.setdefault(len(m), []).append((p, m))
            for pairs in alike.values():
                # Newton-Schulz brings all singular values to about 1; done on m m^T, which is smaller than m
                g = torch.stack([m @ m.mT for _, m in pairs])                                       # (N, rows, rows)
                r = eye = torch.eye(len(g[0]), dtype=g.dtype, device=g.device).expand_as(g)
                for _ in range(5):
                    factor = 3.4445 * eye - 4.7750 * g + 2.0315 * g @ g
                    g, r = factor @ g @ factor, factor @ r
                for (p, m), turn in zip(pairs, r):
                    rows, columns = p.flatten(1).shape
                    m = (turn @ m).mT if rows > columns else turn @ m
                    p.add_(m.reshape(p.shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(config, net):
    """AdamW for everything or, with --optimizer muon, Muon for the matrices inside and AdamW for the rest, what embeds the noise
    level among it: no worse there, and a twentieth of a step saved. The gates of the temporal layers, which must first leave 0,
    have a rate of their own, spatial layers may have a slower one, and what is frozen is in no group."""
    rates, groups = dict(rest=config.lr, gates=config.gate_lr, inside=config.muon_lr), dict(rest={}, gates={}, inside={})
    for name, p in net.named_parameters():
        matrix = p.ndim > 1 and not re.match(r"input|output|embed|detail|.*\bemb\.", name)
        part = "gates" if name.endswith("gate") else "inside" if matrix and config.optimizer == "muon" else "rest"
        factor = config.spatial_lr if vdm.part_of(name) == "spatial" else 1.0
        if p.requires_grad:
            groups[part].setdefault(factor, dict(params=[], peak=rates[part] * factor))["params"].append(p)
    rest, gates, inside = ([*group.values()] for group in groups.values())
    adamw = partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)
    return [kind(some, lr) for kind, some, lr in ((adamw, rest + gates, config.lr), (Muon, inside, config.muon_lr)) if some]


# ---- samples ---------------------------------------------------------------------------------------------------------

def pixels(config):
    """Size and channels of a run's frames, of which it may know only latents."""
    return tuple(n * (config.factor or 1) for n in config.size), 3 if config.factor else config.channels


def sampling(config):
    """The sampler of a config and its guidance, as arguments of vdm.generate."""
    return dict(sampler=config.sampler, temporal_guidance=config.temporal_guidance)


def rolling(config):
    """How vdm.rollout is to go on: its arguments for a config."""
    return dict(sampling(config), overlap=config.overlap, anchors=config.anchors, jump=config.jump,
                context_noise=config.anchor / 10 if config.anchors else 0.0)


def evaluations(config):
    """How often the network is evaluated to generate a clip."""
    visited = 2 * config.sampling_steps - 1 if config.sampler == "heun" else config.sampling_steps
    return visited * (1 + (config.temporal_guidance != 1))


def sample(config, denoiser, n, device, dtype, seed=0, autoencoder=None, **told):
    """n clips (n, T, C, H, W) on the CPU, 16 at a time; clip i depends on (seed, i) and what it is told alone. With an
    autoencoder they are decoded."""
    sigmas, clips = vdm.karras_sigmas(config.sampling_steps, config.sigma_min, config.sigma_max, config.rho), []
    for i in range(0, n, 16):
        shape = (min(16, n - i), config.frames, config.channels, *config.size)
        noise = vdm.clip_noise(seed, range(i, i + shape[0]), device)
        cond = {name: given[i : i + shape[0]].to(device) for name, given in told.items()}
        with autocast(device, dtype):
            clip = vdm.generate(denoiser, shape, sigmas, noise=noise, **sampling(config), **cond)
        clips.append((autoencoder.decode(clip) if autoencoder else clip).cpu())
    return torch.cat(clips)


def write_samples(path, clips, config, autoencoder):
    """Clips as film strip, GIF and video or, where latents have no decoder here, as .npy -> the files."""
    if config.factor and not autoencoder:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.with_suffix(".npy"), clips.numpy() / config.latent_scale)
        return [path.with_suffix(".npy")]
    return [vdm.write_video(path.with_suffix(".png"), vdm.film_strip(clips[:8])[None], scale=2),
            vdm.write_video(path.with_suffix(".gif"), vdm.grid(clips[:16]), config.fps)]


# ---- the run ---------------------------------------------------------------------------------------------------------

def open_data(options, config, autoencoder=None, device=None, rank=0, local=0):
    """What to train on, what to hold out, and the configuration with what the data decides. It says what it found."""
    (size, channels), diffusion, before = pixels(config), options.stage == "diffusion", earlier(config)
    frames = before + (config.frames * (1 + config.previous) - 1) * max(config.rates) + 1
    if options.data in WORLDS:
        few = 1 if options.stage == "autoencoder" else frames          # which sees a frame at a time
        data, held_out = (WORLDS[options.data](n, size, seed=options.seed + k) for n, k in ((few, 0), (frames, 1)))
        print(f"data    {type(data).__name__}: made in code, {config.frames} frames of {size[0]}x{size[1]}"
              f"{', and those before' * (frames > config.frames)}")
    elif config.factor and diffusion and not autoencoder:
        data = held_out = Latents(options.data, config, frames, config.latent_scale, options.seed)
        print(data.report + data.check_scale())
    else:
        with one_first(local):                                         # one on each machine decodes, for all
            data = held_out = vdm.VideoFolder(options.data, frames - before, size, config.stride, channels, options.seed,
                                              progress=not local, read=Cache(Path(options.data)).decode, before=before)
        print(data.report)
        config = dataclasses.replace(config, fps=options.given.get("fps", data.fps))
    config = dataclasses.replace(config, actions=config.actions or data.actions)
    if len(config.mode_drop) not in (1, len(config.actions)):
        raise ValueError(f"--mode-drop is {config.mode_drop}: expected one for all modes of --actions, {config.actions}, or one "
                         "for each")
    if config.labels not in (0, data.labels) or sum(config.actions) != sum(data.actions):
        raise ValueError(f"--labels is {config.labels} and --actions {config.actions}, but the data has {data.labels} labels "
                         f"and actions {data.actions}")
    if autoencoder and diffusion:
        n = min(options.encode, config.steps * config.batch)
        with one_first(rank):
            folder = encode_once(data, n, autoencoder, options.out.parent, device)
        more = {f.stem: np.load(f) for f in folder.glob("*.npy") if f.stem != "video"}
        whole_items = dataclasses.replace(config, stride=1, anchor=0.0)          # they were cut before they were encoded
        data = Latents(folder / "video.npy", whole_items, frames, seed=options.seed, **more)
        print(f"latents {n} clips in {folder}")
    return WithStills(data, config.stills, options.seed) if config.stills else data, held_out, config


def describe(model):
    """How much of a model is trained and, unless that is all, which layers, and how many tensors of each."""
    learns = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    n, total = sum(learns.values()), sum(p.numel() for p in model.parameters())
    layers = Counter(re.sub(r"\b\d+\b", "*", name.replace(".layer.", ".")) for name in learns if n < total)
    lines = [f"{n:,} of {total:,} parameters are trained ({n / total:.1%})", *(f"{k}: {n} tensors" for k, n in layers.items())]
    return "\n        ".join(lines)


SIGMA_EDGES = 0.1, 0.3, 1, 3, 10                                       # log.csv: the error between these noise levels


def log_line(step, seconds, records):
    """A row of log.csv: means over the steps since the last row, and the error by noise level."""
    mean = lambda key: sum(r[key] for r in records) / len(records)
    row = dict(step=step, seconds=round(seconds, 2), loss=mean("loss"), gradient_norm=mean("norm"),
               lr_share=mean("rate"), data_wait=sum(r["waited"] for r in records) / sum(r["took"] for r in records))
    if "sigma" not in records[0]:                                      # an autoencoder has no noise levels
        return row | {key: mean(key) for key in ("reconstruction", "kl")}
    sigma, error = (torch.cat([r[key] for r in records]) for key in ("sigma", "error"))
    bins = torch.bucketize(sigma, torch.tensor(SIGMA_EDGES))
    for i, (low, high) in enumerate(zip((0, *SIGMA_EDGES), (*SIGMA_EDGES, math.inf))):
        row[f"error_sigma_{low}_{high}"] = error[bins == i].mean().item() if (bins == i).any() else ""
    return row


def write_row(path, row):
    """Append a row to log.csv, which starts with its columns' names."""
    with open(path, "a", newline="") as log:
        table = csv.DictWriter(log, row)
        if log.tell() == 0:
            table.writeheader()
        table.writerow(row)


@contextmanager
def stop_signals():
    """SIGTERM or Ctrl-C ask a run to end after the step at work, a second Ctrl-C at once -> the signals so far."""
    stops = []

    def ask(number, _):
        if number == signal.SIGINT and number in stops:
            raise KeyboardInterrupt
        stops.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)
              if signal.getsignal(number) != signal.SIG_IGN}           # as nohup sets it
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def report(world, videos, action=None):
    """The marks of a toy world as text, with those of as many real clips beside them. For shapes also how far colours, kinds and
    speeds are from the world's own, uniform, distributions (total variation distance: 0 same, 1 disjoint), and what real clips
    stay below at 95 %."""
    fresh = copy.copy(world)
    fresh.frames, fresh.seed = videos.shape[1], 987_654_321
    real = default_collate([fresh[i] for i in range(len(videos))])
    lines = [f"{len(videos)} clips of {videos.shape[1]} frames    made   real"]
    line = lambda name, made, true: lines.append(f"{name:>25} {made.mean():7.0%} {true.mean():6.0%}")
    if isinstance(world, vdm.Drive):
        made, true = world.check(videos, action), world.check(real["video"], real["action"])
        line("frames that obey", made["obeys"], true["obeys"])
        line("clips that obey", made["passed"], true["passed"])
        for k, name in enumerate(("left", "straight", "right", "stop")):
            line(name, made["commands"] == k, true["commands"] == k)
        return "\n".join(lines)
    made, true = world.check(videos), world.check(real["video"])
    for law in made:
        if made[law].dtype == bool:
            line(law, made[law], true[law])
    edges = np.array([-np.inf, *np.linspace(*world.SPEED, 7)[1:-1], np.inf])
    bins = dict(colors=np.arange(len(world.palette) + 1), kinds=np.arange(4), speeds=edges)
    distance = lambda n: np.abs(n / n.sum(-1, keepdims=True) - 1 / n.shape[-1]).sum(-1) / 2
    for name, edges in bins.items():
        m, t = (np.histogram(marks[name], edges)[0] for marks in (made, true))
        chance = np.random.default_rng(0).multinomial(t.sum(), [1 / len(t)] * len(t), 1000)
        lines.append(f"{'mismatch of ' + name:>25} {distance(m):7.2f} {distance(t):6.2f}   (real: below "
                     f"{np.quantile(distance(chance), 0.95):.2f})")
    return "\n".join(lines)


def finish(options, config, model, held_out, told, autoencoder, device, dtype, elapsed, rank):
    """The end of a run: clips by the averaged weights, their marks, the files, and the command to go on with."""
    began, checkpoint = time.perf_counter(), options.out / "last.pt"
    clips = sample(config, model, options.marks, device, dtype, seed=1, autoencoder=autoencoder, **told)
    if rank:                                                           # all took part: a sharded model needs them
        return
    files = write_samples(options.out / "samples/final", clips, config, autoencoder)
    if files[0].suffix == ".png":
        files.append(vdm.write_video(options.out / "samples/final.mp4", vdm.grid(clips[:16]), config.fps))
    print(f"\ntrained {config.steps} steps in {elapsed / 60:.1f} minutes; sampled {len(clips)} clips in "
          f"{time.perf_counter() - began:.0f} s ({config.sampler}, {evaluations(config)} evaluations each, averaged weights)")
    if options.data in WORLDS:
        print(report(held_out, clips, told["action"][:len(clips)] if options.data == "drive" else None))
    print("files  ", *files, checkpoint, options.out / "log.csv", sep="\n        ")
    goes_on = config.task == "any" or config.task == "predict" and sum(config.context[config.overlap : config.overlap + 1])
    longer = config.previous or config.independent or sum(config.context[1:]) and goes_on and 0 < config.overlap < config.frames
    flags = f" --length {4 * config.frames}" if longer else " --context FILE" if sum(config.context[1:]) else ""
    flags += f" --interpolate {config.frames - 1}" if config.task == "ends" else ""
    if options.data == "drive":
        flags = f" --actions {('LLSSRRXX' * config.frames)[:config.frames]}"
    print(f"next    python sample.py {checkpoint} --n 16{flags}")


def make_learner(options, config, autoencoder, state, device, processes):
    """A model, its average and its optimisers: fresh, from --init, or as in the checkpoint that is to go on."""
    torch.manual_seed(options.seed)
    if options.stage == "diffusion":
        model = vdm.build(config).to(device)
        if options.init and not state:                                 # which has what it started from
            start_from(options.init, model, config)
        vdm.trainable(model, config.train)
        if not (options.init or state or {"all", "spatial"} & set(config.train)):
            raise ValueError(f"--train is {' '.join(config.train)}, but all else of the model would stay random: it needs --init")
    else:
        model = (autoencoder or vdm.build_autoencoder(config)).to(device)
        for name, p in model.named_parameters():
            p.requires_grad_((options.stage == "decoder") == (".time." in name))
    ema = vdm.EMA(model, config.ema)
    if state:
        model.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        ema.updates = state["ema_updates"]
    if options.checkpoint_activations:
        checkpoint_activations(model)
    if options.shard:
        shard((model, ema.model), device, processes)
    optimizers = make_optimizers(config, getattr(model, "net", model))
    for optimizer, kept in zip(optimizers, state["optimizers"] if state else ()):
        load_optimizer(optimizer, kept)
    return model, ema, optimizers


def announce(options, config, steps, one_step, data, learner, device, dtype, parts, processes):
    """Say what will be trained, on what, and how long that takes: a rehearsal on a copy tells."""
    print(f"model   {options.stage}, by {config.optimizer}; {describe(learner[0])}")
    print(f"device  {device}{f' ({torch.get_num_threads()} threads)' if device.type == 'cpu' else ''}, "
          f"torch {torch.__version__}, {str(dtype).removeprefix('torch.')} arithmetic, float32 weights")
    print("config ", " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items()))
    expected = f", in {processes} processes"
    if processes == 1:
        learner = copy.deepcopy(learner)
        for _ in range(2):
            began = time.perf_counter()
            one_step(0, config, data, *learner, device, dtype, options.seed, parts)
            seconds = time.perf_counter() - began
        expected = f", {seconds:.2f} s each: about {steps * seconds / 60:.1f} minutes, and the sampling after"
    print(f"run     {steps} steps of {config.batch} clips{f', {len(parts[0])} at a time' * bool(options.micro)} "
          f"to {options.out}/{expected}")


def main(argv=None):
    options, config = parse(argv)
    config, state = resume(options, config)
    check(options, config)
    rank, processes, local = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    check_size(options, config, processes)
    parts, diffusion = share(config.batch, options.micro, rank, processes), options.stage == "diffusion"
    if options.dry_run:
        return dry_run(options, config)
    device = join(pick_device(options.device), rank, processes, local)
    dtype = pick_dtype(options.dtype, device)
    if config.frames == 2 and device.type == "cpu":                    # there PyTorch 2.13 gets gradients in bf16 wrong
        if options.dtype == "bf16":
            raise ValueError("--dtype is bf16, but there PyTorch 2.13 gets the gradient of a temporal convolution over 2 frames "
                             "wrong on a CPU: expected fp32, or more --frames")
        dtype = torch.float32
    keep_memory()
    autoencoder, config = find_autoencoder(options, config, state)
    autoencoder = autoencoder and autoencoder.to(device)
    data, held_out, config = open_data(options, config, autoencoder, device, rank, local)
    told = conditions(default_collate([held_out[i] for i in range(max(6, options.marks))]), config)
    model, ema, optimizers = learner = make_learner(options, config, autoencoder, state, device, processes)
    ddp = spread(model) if processes > 1 and not options.shard else None
    one_step, start, elapsed = train_step if diffusion else autoencoder_step, 0, 0.0
    if state:
        start, elapsed = state["step"], state["seconds"]
    announce(options, config, config.steps - start, one_step, data, learner, device, dtype, parts, processes)
    out, checkpoint, log = options.out, options.out / "last.pt", options.out / "log.csv"

    def save(done, *paths):
        if options.stage == "autoencoder":
            ema.model.measure(held_out[i]["video"][None].to(device) for i in range(options.marks))
        more = {} if diffusion else dict(stage=options.stage)
        more |= dict(autoencoder=autoencoder.state_dict()) if diffusion and autoencoder else {}
        held = whole(dict(model=model.state_dict(), ema=ema.model.state_dict(), optimizers=[o.state_dict() for o in optimizers]),
                     rank == 0)
        for path in paths if rank == 0 else ():
            vdm.save(path, config=dataclasses.asdict(config), step=done, seconds=elapsed, seed=options.seed,
                     data=options.data, encode=options.encode, ema_updates=ema.updates, **held, **more)

    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
        trim(log, start)
    if not state:                                                      # whenever a run is killed, --resume goes on
        save(0, checkpoint)
    if options.compile and diffusion:
        compile_or_not(model.net)
    batches = read_ahead(data, config, parts, start, options.workers) if options.workers else None
    save_every, sample_every = options.save_every or max(1, config.steps // 10), options.sample_every or max(1, config.steps // 5)
    records, bar = [], tqdm(range(start, config.steps), initial=start, total=config.steps, disable=rank > 0, **BAR)
    with stop_signals() as stops:
        for step in bar:
            began, done = time.perf_counter(), step + 1
            record = one_step(step, config, data, *learner, device, dtype, options.seed, parts, batches, ddp)
            records.append(record | dict(took=time.perf_counter() - began))
            elapsed += records[-1]["took"]
            stop = gather(torch.tensor([len(stops)], device=device)).any()       # if any process was asked to, all do
            keep = options.keep_every and done % options.keep_every == 0
            saving = keep or stop or done % save_every == 0 or done == config.steps
            if saving or done % 10 == 0:                               # a resumed log then loses no step
                row = log_line(done, elapsed, records)
                if rank == 0:
                    write_row(log, row)
                bar.set_postfix(loss=f"{row['loss']:.4f}", data_wait=f"{row['data_wait']:.0%}", refresh=False)
                records = []
            if saving:
                save(done, *[out / f"step_{done:06d}.pt"] * bool(keep), checkpoint)
            if stop and done < config.steps:
                bar.close()
                name = "SIGTERM" if signal.SIGTERM in stops else "Ctrl-C"
                return print(f"stopped by {name} after step {done}, all saved: the same command with --resume goes on")
            if diffusion and done % sample_every == 0 and done < config.steps:
                clips = sample(config, ema.model, 6, device, dtype, 0, autoencoder, **told)      # always from the same noise
                if rank == 0:
                    write_samples(out / f"samples/step_{done:06d}", clips, config, autoencoder)
    if diffusion:
        finish(options, config, ema.model, held_out, told, autoencoder, device, dtype, elapsed, rank)
    else:
        finish_autoencoder(options, config, ema.model, held_out, device, elapsed)


# In a run of one process, which starts anew on pixels, what follows has next to nothing to do.

# ---- --resume and --init ---------------------------------------------------------------------------------------------

MAY_CHANGE = "steps sampler sampling_steps temporal_guidance sigma_min sigma_max rho jump overlap fps".split()     # on --resume
MODEL = ("kind sigma_data head_dim give channels factor width mults blocks attention joint patch detail convs feed_forward "
         "ddpm_layout previous labels motion actions adapters rank").split()                   # may not where --init is to fit


def resume(options, config):
    """The configuration to run and, with --resume, the checkpoint to go on from: no setting of it may change but some."""
    checkpoint = options.out / "last.pt"
    if not options.resume:
        if not options.dry_run and (checkpoint.exists() or (options.out / "log.csv").exists()):
            raise ValueError(f"{options.out} already holds a run: --resume continues it, another --out starts a new one")
        return config, None
    state, saved = vdm.read_checkpoint(checkpoint)
    same = dict(seed=options.seed, data=options.data, stage=options.stage, encode=options.encode)
    was = vars(saved) | {name: state.get(name, "diffusion") for name in same}                # a stage is named if it is another
    changed = [name for name, x in (options.given | same).items() if x != was[name] and name not in MAY_CHANGE]
    if changed:
        raise ValueError(f"--resume continues a run with its own settings, but {', '.join(changed)} differs from {checkpoint}: "
                         f"leave the flag out, or name another --out. These may change: {', '.join(sorted(MAY_CHANGE))}, "
                         "and all that is no Config field but seed, data, stage and encode")
    config = dataclasses.replace(saved, **options.given)
    finished = [*options.out.glob("samples/final.*"), *options.out.glob("recon.mp4")]
    if state["step"] > config.steps or state["step"] == config.steps and finished:
        raise ValueError(f"{checkpoint} has done all its {state['step']} steps: raise --steps to go on")
    return config, state


def trim(log, step):
    """Forget what was logged after the checkpoint, and a row that a kill cut short."""
    if log.exists():
        rows = [row for row in log.read_bytes().splitlines(True) if row.endswith(b"\n")]
        os.truncate(log, sum(len(row) for i, row in enumerate(rows) if i == 0 or int(row.split(b",")[0]) <= step))


def start_from(path, denoiser, config):
    """--init: copy the averaged weights of a checkpoint into a fresh model. Adapters, labels and actions that only the model
    has stay as they are made, which is as nothing; all else must be the same."""
    state, saved = vdm.read_checkpoint(path)
    ours, theirs = ({name.replace(".layer.", "."): w for name, w in weights.items()}       # as they were before adapt
                    for weights in (denoiser.state_dict(), state["ema"]))
    new = {name for name in ours.keys() - theirs.keys() if vdm.part_of(name) in ("lora", "adapters", "actions")}
    fits = {name for name in ours.keys() & theirs.keys() if ours[name].shape == theirs[name].shape}
    other = {name: f"{name} {getattr(saved, name)} (here {getattr(config, name)})" for name in MODEL
             if getattr(saved, name) != getattr(config, name)}
    misfits = {name for name in (ours.keys() - new | theirs.keys()) - fits if not name.startswith(("balance.", "paces"))}
    if misfits or other.keys() & {"kind", "sigma_data", "head_dim"}:
        raise ValueError(f"--init {path} is another model: it has {', '.join(other.values())}; {len(fits)} of its {len(theirs)} "
                         "tensors would fit: give the flags that it was trained with")
    for name in fits - {"paces"}:                                      # those of the new data are measured
        ours[name].copy_(theirs[name])
    print(f"init    {path}, averaged weights after {state['step']} steps{f'; new, as nothing: {len(new)} tensors' * bool(new)}")


# ---- latents, and pictures from elsewhere ----------------------------------------------------------------------------

class WithStills:
    """A dataset whose items have, besides, `stills` (n, C, H, W): frames of n other items, which chance picks by (seed, i)."""

    def __init__(self, data, n, seed):
        self.data, self.n, self.seed = data, n, seed

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, 2, i])
        videos = [self.data[j]["video"] for j in (i + rng.integers(1, 1000, self.n)).tolist()]
        return dict(self.data[i], stills=torch.stack([video[rng.integers(len(video))] for video in videos]))


class Latents(vdm.VideoFolder):
    """A vdm.VideoFolder of latents: .npy files of float (T, c, h, w) or (N, T, c, h, w), times `scale`, read as they are needed.
    more: by name, a row per clip, such as label."""

    def __init__(self, path, config, frames, scale=1.0, seed=0, **more):
        self.scale, self.more, self.shape, self.speed = scale, more, (config.channels, *config.size), config.fps * config.stride
        before = earlier(config)
        super().__init__(path, frames - before, config.size, config.stride, config.channels, seed, read=self.open, before=before)

    def open(self, file, *_):
        try:
            x = np.load(file, mmap_mode="r", allow_pickle=False)
            if x.dtype.kind != "f" or x.ndim not in (4, 5) or not len(x) or x.shape[-3:] != self.shape:
                raise ValueError(f"{x.dtype} {x.shape} is not float ([N,] T, {', '.join(map(str, self.shape))})")
            return list(x if x.ndim == 5 else x[None]), self.speed
        except Exception as error:                                     # each kind of damage has its own
            raise ValueError(f"{file} holds no latents for this run ({error}): --channels and --size must be theirs; for latents "
                             "of pixels, name an autoencoder: --latents") from error

    def check_scale(self):
        """Noise levels are made for data of standard deviation 1 or a little less."""
        std = np.std([self[i]["video"].numpy() for i in range(min(64, len(self)))])
        if not 0.4 < std < 2:
            raise ValueError(f"the latents have standard deviation {std:.3g}, where about 1 is expected: "
                             f"--latent-scale {self.scale / max(std, 1e-9):.4g} would make it so")
        return f"; standard deviation {std:.2f}"

    def __getitem__(self, i):
        j = np.random.default_rng([self.seed, 0, i // len(self)]).permutation(len(self))[i % len(self)]
        clip, moves = self.clips[j], self.moves[j]
        start = np.random.default_rng([self.seed, 1, i]).integers(len(clip) - self.span + 1)
        cut = start + np.arange(-self.before * self.stride, self.span, self.stride).clip(-start)
        item = {name: torch.as_tensor(x[j]) for name, x in self.more.items()}
        if self.actions:
            moves = np.full((len(clip), *self.actions), np.nan, np.float32) if moves is None else moves
            item["action"] = torch.from_numpy(moves[cut])
        return dict(video=torch.from_numpy(clip[cut].astype(np.float32)) * self.scale, **item)


def encode_once(data, n, autoencoder, parent, device):
    """Items 0 ... n - 1 of a dataset, encoded -> a folder of .npy files, video.npy and what else an item has, which gets its name
    when it is complete: a checksum of the autoencoder and of 16 items, by which a like run finds it. Frames are cut and resized
    in pixels, then encoded: no latent may be shrunk or mirrored."""
    sums = *autoencoder.state_dict().values(), *(data[i]["video"] for i in np.linspace(0, n - 1, min(n, 16)).astype(int))
    folder = parent / f"latents-{zlib.crc32(b''.join(x.cpu().numpy().tobytes() for x in sums), n):08x}"
    if not folder.exists():
        temporary, arrays = folder.with_suffix(".tmp"), {}
        temporary.mkdir(parents=True, exist_ok=True)
        for i in tqdm(range(n), "encoding", **BAR):
            item = data[i]
            item["video"] = autoencoder.encode(item["video"][None].to(device))[0].half().cpu()
            for name, x in item.items():
                x = np.asarray(x)
                if i == 0:
                    arrays[name] = np.lib.format.open_memmap(temporary / f"{name}.npy", "w+", x.dtype, (n, *x.shape))
                arrays[name][i] = x
        del arrays                                                     # which writes the rest to the disk
        temporary.rename(folder)
    return folder


def find_autoencoder(options, config, state):
    """The autoencoder of this run -> (it, or None for pixels, a new one and latents from elsewhere; config, that fits it)."""
    path, stage = options.out / "last.pt" if state and config.factor else options.latents, options.stage
    if not path and (stage == "decoder" or stage == "diffusion" and config.factor and options.data in WORLDS):
        raise ValueError(f"this run needs latents of {config.channels} channels: name an autoencoder (--latents CKPT, made by "
                         "--stage autoencoder) or, as --data, .npy files of latents")
    autoencoder, made = vdm.load_autoencoder(path) if path else (None, config)
    if path and not state and not autoencoder:
        raise ValueError(f"--latents {path} is no autoencoder, and holds none")
    for name in ("channels", "factor", "ae_width"):
        if options.given.get(name, getattr(made, name)) != getattr(made, name):
            raise ValueError(f"--{name.replace('_', '-')} is {options.given[name]}, but the autoencoder in {path} has "
                             f"{getattr(made, name)}: leave the flag out")
    return autoencoder, dataclasses.replace(config, channels=made.channels, factor=made.factor, ae_width=made.ae_width)


def autoencoder_step(step, config, data, autoencoder, ema, optimizers, device, dtype, seed, *_):
    """One optimiser step of what is not frozen: spatial layers, on single frames, or the decoder's temporal ones, on clips."""
    torch.manual_seed(seed * 1_000_003 + step)
    began = time.perf_counter()
    batch = default_collate([data[i] for i in range(step * config.batch, (step + 1) * config.batch)])
    clip = batch["video"].to(device)                                                           # (B, T, C, H, W)
    waited, on_clips = time.perf_counter() - began, not autoencoder.input.weight.requires_grad
    clip = clip if on_clips else clip[:, torch.randint(clip.shape[1], (1,))]
    # the temporal layers learn behind a frozen encoder: noise gets a gradient, too, as in loss_of
    noise = torch.randn(*clip.shape[:2], config.channels, *config.size).to(device).requires_grad_(on_clips)
    with autocast(device, dtype):
        loss, parts = vdm.ae_loss(autoencoder, clip, noise, config.kl, float(on_clips))
    loss.backward()
    norm, rate = descend(step, config, autoencoder, optimizers)
    ema.update(autoencoder)
    return dict(loss=loss.item(), norm=norm.item(), rate=rate, waited=waited, **{k: x.item() for k, x in parts.items()})


def psnr(clip, real):
    """10 log10(range^2 / squared error) in dB, of clips in [-1, 1]: 20 is poor, 30 good."""
    return 10 * math.log10(4 / max((clip - real).square().mean().item(), 1e-12))


@torch.no_grad()
def flicker(clip, real):
    """Mean absolute change, from frame to frame, of a reconstruction's error: a fault that stays is seen less than one that
    comes and goes."""
    return (clip - real).diff(dim=1).abs().mean().item()


@torch.no_grad()
def reconstruct(autoencoder, clips, device, **options):
    return torch.cat([autoencoder.decode(autoencoder.encode(clip[None].to(device)), **options).cpu() for clip in clips])


def finish_autoencoder(options, config, autoencoder, held_out, device, elapsed):
    """The end of both its stages: what is lost of clips that it has not seen, in numbers and as a video, and the next command."""
    real = torch.stack([held_out[i]["video"] for i in range(options.marks)])                   # (N, T, C, H, W)
    made, alone = (reconstruct(autoencoder, real, device, temporal=on) for on in (1.0, 0.0))
    print(f"\ntrained {config.steps} steps in {elapsed / 60:.1f} minutes\n"
          f"PSNR {psnr(made, real):.1f} dB, frame by frame {psnr(alone, real):.1f}; flicker {flicker(made, real):.4f}, frame "
          f"by frame {flicker(alone, real):.4f} ({options.marks} clips, averaged weights)")
    if psnr(made, real) < 25:
        print("warning: below 25 dB a diffusion model learns the autoencoder's faults: train longer, or with a larger "
              "--ae-width or --channels, or a smaller --factor")
    if options.data == "shapes":
        print("real clips, made latents and back, where no model of them can do better:", report(held_out, made), sep="\n")
    both, checkpoint = torch.cat([real, made], 3)[:8], options.out / "last.pt"                 # real above
    print("files  ", vdm.write_video(options.out / "recon.mp4", vdm.grid(both), config.fps),
          vdm.write_video(options.out / "recon.png", vdm.film_strip(both[:4])[None], scale=1), checkpoint, sep="\n        ")
    flags = "--stage decoder " * (options.stage == "autoencoder") + f"--latents {checkpoint}"
    flags += f" --data {options.data}" * (options.data != "shapes")
    for name in ("size", "frames", "stride"):                                    # the next stage must have the same
        if getattr(config, name) != getattr(vdm.PRESETS[options.preset], name):
            flags += f" --{name} {' '.join(map(str, np.atleast_1d(getattr(config, name))))}"
    print(f"next    python train.py --preset {options.preset} {flags}")


# ---- large runs ------------------------------------------------------------------------------------------------------

def check_size(options, config, processes):
    """Refuse what several processes cannot do, or what only one can."""
    alone = options.dry_run or options.init or options.micro or options.workers or options.checkpoint_activations
    if options.stage != "diffusion" and (processes > 1 or alone or {"train", "rates", "stills"} & options.given.keys()):
        raise ValueError(f"--stage {options.stage} is small: it takes neither torchrun nor --dry-run, --micro, --workers, "
                         "--checkpoint-activations, --train, --rates and --stills, and goes on from --latents, not --init")
    if options.shard and not options.dry_run and (processes == 1 or config.optimizer == "muon"):
        raise ValueError("--shard divides a model among processes, but there is one: torchrun --nproc_per_node N train.py ..."
                         if processes == 1 else "--shard needs --optimizer adamw: muon would have to put all matrices together")


def keep_memory():
    """Have glibc keep what a step frees, for the next one: asking the system for it anew costs a CPU a twelfth of the time."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2 ** 31 - 1)                                  # M_TRIM_THRESHOLD: give nothing back
        libc.mallopt(-2, 2 ** 26)                                      # M_TOP_PAD: ask for 64 MiB at a time
        libc.mallopt(-3, 2 ** 25)                                      # M_MMAP_THRESHOLD: so keep all but blocks above 32 MiB


def share(batch, micro, rank, processes):
    """The parts, ranges of 0 ... batch - 1, that a process takes of a batch: `micro` clips at a time (default: all its own)."""
    mine = batch // processes
    micro = micro or max(1, mine)
    if batch % (processes * micro):
        raise ValueError(f"--batch is {batch}: it must be a multiple of {processes * micro}, {processes} processes with "
                         f"--micro {micro} clips each at a time")
    return [range(i, i + micro) for i in range(rank * mine, (rank + 1) * mine, micro)]


def join(device, rank, processes, local):
    """Become one of the processes that torchrun started, of which only the first speaks -> the device of this one."""
    if processes > 1:
        if device.type == "cuda":
            device = pick_device(f"cuda:{local}")
            torch.cuda.set_device(device)
        # nobody gives up on the first process while it decodes the data
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
        sys.stdout = open(os.devnull, "w") if rank else sys.stdout
    return device


def joined():
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def one_first(number):
    """Process 0 does what follows; then the others do, and find it done."""
    if number and joined():
        torch.distributed.barrier()
    yield
    if not number and joined():
        torch.distributed.barrier()


def gather(x):
    """x (n, ...) -> those of all processes, one after another, (processes n, ...)."""
    if not joined():
        return x
    everyone = x.new_empty(torch.distributed.get_world_size() * len(x), *x.shape[1:])
    torch.distributed.all_gather_into_tensor(everyone, x.contiguous())
    return everyone


def spread(denoiser):
    """DDP: each process has the whole model, and adds up gradients with the others while the last part goes backward."""
    from torch.nn.parallel import DistributedDataParallel
    return DistributedDataParallel(denoiser, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard(models, device, processes):
    """FSDP2: each process holds a part of all weights, gradients, moments and averages, and borrows the rest of a block while it
    computes it. Gradients are added up after each part of a batch, for whole ones would take the memory that this is to save."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (processes,))
    for model in models:
        for layer in [*filter(lambda layer: isinstance(layer, vdm.Block), model.modules()), model]:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def whole(x, keep=True):
    """A state with its sharded tensors put together, on the CPU of the processes that keep it: it then loads on any number
    of processes. All have to call this."""
    if isinstance(x, dict):
        return {key: whole(value, keep) for key, value in x.items()}
    if isinstance(x, list):
        return [whole(value, keep) for value in x]
    if hasattr(x, "full_tensor"):
        x = x.full_tensor()
        return x.cpu() if keep else None
    return x


def load_optimizer(optimizer, state):
    """What whole() put together, divided again as the parameters are."""
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if hasattr(p, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor
            state["state"][i] = {key: distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
                                 if x.shape == p.shape else x for key, x in state["state"].get(i, {}).items()}
    optimizer.load_state_dict(state)


def checkpoint_activations(model, **options):
    """Forget what is inside a block, and compute it again on the way back."""
    for block in model.modules():
        if isinstance(block, vdm.Block):
            block.forward = partial(recompute, block.forward, use_reentrant=False, **options)


def compile_or_not(net):
    """Compile net at its first call; where that fails, say why in one line and go on without."""
    plain, fast = net.forward, torch.compile(net.forward)

    def first(*args, **kwargs):
        try:
            net.forward = fast
            return fast(*args, **kwargs)
        except Exception as e:
            print(f"compile not possible here, so not done: {str(e).strip().splitlines()[0]}")
            net.forward = plain
            return plain(*args, **kwargs)

    net.forward = first


def read_ahead(data, config, parts, start, workers):
    """The parts of all batches to come, read by other processes."""
    order = [range(step * config.batch + part.start, step * config.batch + part.stop)
             for step in range(start, config.steps) for part in parts]
    return iter(DataLoader(data, batch_sampler=order, num_workers=workers, worker_init_fn=deaf))


def deaf(worker):
    """A worker leaves signals to the process it reads for, which saves first and then ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclasses.dataclass(slots=True)
class Stored:
    """A decoded clip on disk, read where it is cut. What workers are sent of it is its place, not its pixels."""
    path: Path
    offset: int
    shape: tuple

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, cut):
        return np.memmap(self.path, np.uint8, "r", self.offset, self.shape)[cut]


class Cache:
    """decode() is vdm.decode, but each file is decoded once: .vdm_cache/ beside the data, which may be deleted, holds pixels
    in .bin files and in the .jsonl beside each a line per file of which all clips are there. A file that has changed, or
    another size or number of channels, is another key. Processes write files of their own and read those of all."""

    def __init__(self, data):
        self.folder = (data if data.is_dir() else data.parent) / ".vdm_cache"
        self.known, self.bin, self.index = {}, None, None
        for index in sorted(self.folder.glob("*.jsonl")):
            path = index.with_suffix(".bin")
            size = path.stat().st_size if path.exists() else 0
            for line in filter(lambda line: line.endswith("\n"), open(index)):
                key, *entry, end = json.loads(line)
                if end <= size:                                        # else somebody has cut it
                    self.known[key] = path, *entry

    def decode(self, path, size, channels):
        files = [p.stat() for p in (path.glob("[!.]*") if path.is_dir() else [path])]
        key = json.dumps([os.path.relpath(path, self.folder), len(files), sum(f.st_size for f in files),
                          sum(f.st_mtime_ns for f in files), *size, channels])
        if key in self.known:
            where, fps, places = self.known[key]
            return [Stored(where, offset, tuple(shape)) for offset, shape in places], fps
        clips, fps = vdm.decode(path, size, channels, lambda clips: [self.keep(clip) for clip in clips])
        if self.index:
            self.index.write(json.dumps([key, fps, [(clip.offset, clip.shape) for clip in clips], self.bin.tell()]) + "\n")
            self.index.flush()
        return clips, fps

    def keep(self, clip):
        """Write a clip as soon as it is decoded; from where that fails on they stay in memory."""
        try:
            if self.bin is None:
                self.folder.mkdir(exist_ok=True)
                name = self.folder / f"{time.time_ns()}-{os.getpid()}"
                self.bin, self.index = open(f"{name}.bin", "xb"), open(f"{name}.jsonl", "x")
                print(f"cache   {self.folder} holds what is decoded, for the next run; it may be deleted")
            if self.index:
                offset = self.bin.tell()
                clip.tofile(self.bin)
                return Stored(Path(self.bin.name), offset, clip.shape)
        except OSError as e:
            print(f"cache   {self.folder} cannot be written ({e}): decoded clips are held in memory")
            self.bin, self.index = self.bin or False, None
        return clip


# ---- --dry-run: what a run would need --------------------------------------------------------------------------------

class Meter(TorchDispatchMode):
    """The bytes of all tensors made while it is on: now, and at most so far."""

    def __init__(self):
        super().__init__()
        self.now, self.most, self.alive = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.alive:    # no mere view
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key, size):
        self.alive.remove(key)
        self.now -= size


def rehearse(config, clips, dtype, gpu=True, light=False):
    """A training step of the network on fake tensors, which have a shape but hold no numbers: 1.6 billion parameters take
    no memory. light: with --checkpoint-activations. -> bytes by kind, and the operations of a forward pass."""
    with torch.device("meta"):
        denoiser = vdm.build(config)
        vdm.trainable(denoiser, config.train)
    net = denoiser.net
    size = lambda parameters: 4 * sum(p.numel() for p in parameters)
    moments = sum((1 if isinstance(optimizer, Muon) else 2) * size(group["params"])
                  for optimizer in make_optimizers(config, net) for group in optimizer.param_groups)
    if light:
        checkpoint_activations(net, preserve_rng_state=False)
    for module in net.modules() if gpu else ():                        # there autocast has norms in float32
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    flash = lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]       # and attention keeps no L x L
    flops, T = FlopCounterMode(display=False), config.frames
    attend = mock.patch.object(vdm, "attend", flash if gpu else vdm.attend)
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter, attend:
        net.to_empty(device="cpu")
        learns = [p for p in net.parameters() if p.requires_grad]
        for p in learns:
            p.grad = torch.empty_like(p)                               # there already, as when gradients are accumulated
        x = torch.empty(clips, T, net.input.in_channels // config.patch ** 2, *config.size)
        x.requires_grad_(config.train != ("all",))                     # as in loss_of, if some are frozen
        told = dict(label=torch.zeros(clips, dtype=torch.long)) if config.labels else {}
        told |= dict(motion=torch.zeros(clips)) if config.motion else {}
        told |= dict(action=torch.empty(clips, T, sum(config.actions))) if config.actions else {}
        told |= dict(given=torch.zeros(clips, T, dtype=torch.bool)) if config.give == "replace" else {}
        before, loss = meter.now, 0
        for first in [True, False][:1 + config.previous]:              # joint_loss holds both its terms until backward
            with flops if first and not light else nullcontext(), torch.autocast("cpu", dtype, dtype != torch.float32):
                loss = loss + net(x, torch.empty(clips, T), **told).float().square().mean()
        if config.stills:                                              # and so does joint_image_loss
            n = clips * config.stills
            with torch.autocast("cpu", dtype, dtype != torch.float32):
                loss = loss + net(torch.empty(n, 1, *x.shape[2:]), torch.empty(n, 1)).float().square().mean()
        loss.backward()
    weights, blocks = size(net.parameters()), [module for module in net.modules() if isinstance(module, vdm.Block)]
    return dict(weights=weights, gradients=size(learns), optimiser=moments, EMA=weights, activations=meter.most - before,
                block=max(size(block.parameters()) for block in blocks), operations=flops.get_total_flops())


def dry_run(options, config):
    """Print what --dry-run promises: of a GPU or, with --device cpu, of this process."""
    gpu, counts = options.device != "cpu", [n for n in (1, 8, 64, 512) if config.batch % n == 0]       # each takes as many clips
    dtype = torch.bfloat16 if gpu and options.dtype != "fp32" else pick_dtype(options.dtype, torch.device("cpu"))
    need, light = (rehearse(config, 1, dtype, gpu, light) for light in (False, True))
    once, times = need["operations"], evaluations(config)
    print(f"model   {need['weights'] / 4e6:,.2f} M parameters, of which {need['gradients'] / 4e6:,.2f} M are trained")
    say = lambda x: f"{x / 1000 ** (i := int(math.log10(x) // 3)):.3g} {' kMGTPEZ'[i]}FLOP"
    step = 3 * once * config.batch * (1 + config.previous + config.stills / config.frames)       # backward is worth two forward
    print(f"work    {say(once)} to estimate one clip once; {say(step)} a step of {config.batch} clips ({say(step * 4 / 3)} with "
          f"--checkpoint-activations); {say(once * times)} to generate a clip in {times} evaluations")
    unit, G = ("GiB", 2 ** 30) if need["weights"] > 1e8 else ("MiB", 2 ** 20)
    print(f"memory  {unit} per {'GPU' if gpu else 'process'}, one clip at a time (--micro 1), {str(dtype)[6:]} arithmetic\n"
          f"{'GPUs':>20}  weights  gradients  optimiser    EMA  activations    sum  with --checkpoint-activations    sum")
    fits = []
    for n in counts:
        held = [need[key] / n for key in ("weights", "gradients", "optimiser", "EMA")]
        held[0] += 2 * need["block"] * (n > 1)                         # the block at work and the next one, gathered whole
        row = *held, need["activations"], sum(held) + need["activations"], light["activations"], sum(held) + light["activations"]
        name = f"{n} --shard" if n > 1 else "1 or more"
        print(f"{name:>20}" + "".join(f"{x / G:{w}.2f}" for x, w in zip(row, (9, 11, 11, 7, 13, 7, 31, 7))))
        # autocast's copies of the weights do not grow with clips; a twentieth is left to CUDA itself, and to gaps
        room, copies = 0.95 * (options.gpu_memory or 0) * 2 ** 30 - sum(held), 0.5 * (dtype != torch.float32)
        a, b = (max(0, int((room - copies * need[key]) // (what["activations"] - copies * need[key])))
                for what, key in ((need, "weights"), (light, "block")))
        fits.append(f"{a}, {b} (GPUs: {name})")
    if options.gpu_memory:
        print(f"batch   clips at once (--micro) in {options.gpu_memory:g} GiB without and with --checkpoint-activations: "
              + ", ".join(fits))
    if options.speed:
        hours = step * config.steps / options.speed / 1e12 / 3600
        print(f"time    {config.steps} steps at {options.speed:g} TFLOPS per GPU: "
              + ", ".join(f"{hours / n:,.2f} hours on {n}" for n in counts))


if __name__ == "__main__":
    try:
        main()
        if joined():
            torch.distributed.destroy_process_group()
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: the GPU's memory is full ({str(e).splitlines()[0]:.150}). --micro 1 holds one clip's activations at a "
                 "time, --checkpoint-activations a few blocks' of them, --shard a part of the model on each GPU: --dry-run "
                 "with the same flags tells what each saves")
    except KeyboardInterrupt:
        sys.exit("\nstopped; if it had begun to train, the same command with --resume goes on")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
