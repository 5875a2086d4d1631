"""
train.py: train a video diffusion model.

    python train.py --preset tiny                        a toy world: no data, no download, no GPU
    python train.py --preset tiny --data drive           another, whose clips obey commands: left, straight, right, stop
    python train.py --preset tiny --data my_videos/      your own files: videos, GIFs, picture folders, arrays
    python train.py --preset tiny --resume               go on where a run was stopped

A preset is a set of defaults; every field of vdm.Config is a flag that changes it. A run writes to out/NAME:
config.json, log.csv, last.pt (all that --resume and sample.py need) and samples/ (pictures and GIFs on the way).
"""

import argparse
import csv
import dataclasses
import inspect
import json
import math
import re
import sys
import time
import weakref
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import vdm

SIGMA_EDGES = 0.1, 0.3, 1, 3, 10                                       # log.csv: the error between these noise levels
WORLDS = dict(shapes=vdm.MovingShapes, drive=vdm.Drive)
MAY_CHANGE = {"steps", "sampler", "sampling_steps", "temporal_guidance", "sigma_min", "sigma_max", "rho", "overlap",
              "fps"}                                                   # on --resume


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
    p.add_argument("--seed", type=int, default=0, help="fixes weights, data and noise")
    p.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu) or a name that torch knows")
    p.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 where it is fast")
    p.add_argument("--save-every", type=int, help="steps between checkpoints (default: a tenth of the run)")
    p.add_argument("--sample-every", type=int, help="steps between sample pictures (default: a fifth of the run)")
    p.add_argument("--marks", type=int, default=64, help="clips generated and marked at the end")
    p.add_argument("--dry-run", action="store_true", help="print parameters, operations and memory of the run, and stop")
    p.add_argument("--gpu-memory", type=float, metavar="GIB", help="of --dry-run: the largest batch that fits a GPU of this size")
    p.add_argument("--speed", type=float, metavar="TFLOPS", help="of --dry-run: the time that all steps take at this speed per GPU")
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(vdm.Config), re.M))
    fields = p.add_argument_group("Config fields, with the defaults of --preset tiny")
    for f in dataclasses.fields(vdm.Config):
        flag, default = "--" + f.name.replace("_", "-"), getattr(vdm.PRESETS["tiny"], f.name)
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else \
            dict(nargs="+", type=type((*default, 0)[0])) if f.type is tuple else dict(type=f.type)
        fields.add_argument(flag, default=argparse.SUPPRESS, help=f"{comments[f.name]} ({default})", **kind)
    options = p.parse_args(argv)
    for flag in ("gpu_memory", "speed"):
        value, name = getattr(options, flag), "--" + flag.replace("_", "-")
        if value is not None and not (options.dry_run and value > 0):
            raise ValueError(f"{name} is {value:g}: expected a number above 0, together with --dry-run")
    given = {f.name: getattr(options, f.name) for f in dataclasses.fields(vdm.Config) if hasattr(options, f.name)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if len(given.get("size", (0, 0))) == 1:
        given["size"] *= 2                                             # one number: square frames
    options.given = given
    name = options.preset if options.data == "shapes" else f"{options.preset}-{Path(options.data).stem}"
    options.out = Path(options.out or f"out/{name}")
    return options, dataclasses.replace(vdm.PRESETS[options.preset], **given)


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name} is not to be had here ({str(e).splitlines()[0]}): try --device auto") from e


def pick_dtype(name, device):
    """bf16 where the hardware multiplies it faster than fp32; weights stay in fp32 either way."""
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else \
        device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.bfloat16 if name == "bf16" or (name == "auto" and fast) else torch.float32


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al. 2024): every weight matrix moves equally far in
    all directions of its gradient, the rare ones too. With an earlier form of the tiny network the error at sigma 1
    fell to 9.4e-3 in 240 core seconds, with AdamW to 15.7e-3."""

    def __init__(self, params, lr, momentum=0.95, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                                                 # matrices of one shape are handled together
            for p in group["params"]:
                alike.setdefault(p.flatten(1).shape, []).append(p)
            for (rows, columns), params in alike.items():
                for p in params:
                    self.state[p].setdefault("average", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                m = torch.stack([p.grad.lerp(self.state[p]["average"], group["momentum"]).flatten(1) for p in params])
                m = (m / (m.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(self.dtype)              # (N, rows, columns)
                m = m.mT if rows > columns else m
                for _ in range(5):                                     # Newton-Schulz: singular values go to about 1
                    g = m @ m.mT
                    m = 3.4445 * m + (-4.7750 * g + 2.0315 * g @ g) @ m
                m = m.mT if rows > columns else m
                for p, update in zip(params, m):
                    p.add_(update.reshape(p.shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def make_optimizers(config, net, dtype):
    """AdamW for everything or, with --optimizer muon, Muon for the matrices inside and AdamW for
    the rest; the gates of the temporal layers, which must first leave 0, have a rate of their
    own."""
    parts = dict(gates=[], inside=[], rest=[])
    for name, p in net.named_parameters():
        matrix = p.ndim > 1 and not name.startswith(("input", "output", "embed", "detail"))
        muon = config.optimizer == "muon" and matrix
        parts["gates" if name.endswith("gate") else "inside" if muon else "rest"].append(p)
    groups = [dict(params=parts["rest"], peak=config.lr), dict(params=parts["gates"], peak=config.gate_lr)]
    optimizers = [torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)]
    if parts["inside"]:
        optimizers.append(Muon([dict(params=parts["inside"], peak=config.muon_lr)], config.muon_lr, dtype=dtype))
    return optimizers


def conditions(batch, config, drop=0.0):
    """What the model is told of a batch besides frames: label (B,), action (B, T, A), withheld with odds `drop`."""
    told = {}
    if config.labels:
        told["label"] = batch["label"].where(torch.rand(batch["label"].shape) >= drop, -1)
    if config.actions:                                                 # with --previous, those of the second half
        told["action"] = vdm.drop_modes(batch["action"][:, -config.frames:], config.actions, drop)
    return told


def train_step(step, config, data, denoiser, ema, optimizers, device, dtype, seed):
    """One optimiser step. All randomness follows from (seed, step): resuming needs no generator's state."""
    torch.manual_seed(seed * 1_000_003 + step)
    # batch: frames in [-1, 1]; with --previous, clips of twice the length whose first half is the condition
    began = time.perf_counter()
    indices = range(step * config.batch, (step + 1) * config.batch)
    batch = default_collate([data[i] for i in indices])
    clean = batch["video"].to(device)                                                          # (B, T, C, H, W)
    waited = time.perf_counter() - began
    # noise: its level, its shape, and what is given: frames, labels, actions
    u = vdm.stratified(config.batch)                                                                 # (B,)
    if config.independent:
        u = vdm.independent_levels(u, config.frames, config.independent)                             # (B, T)
    sigma = vdm.noise_schedule(config)(u).to(device)
    options = {name: given.to(device) for name, given in conditions(batch, config, config.drop).items()}
    options |= dict(weighting=getattr(denoiser, "balance", config.weighting), sigma_data=config.sigma_data, gamma=config.gamma,
                    dynamics=config.dynamics, dynamics_toy=config.dynamics_toy, structure=config.structure)
    if config.previous:
        previous, clean = clean.chunk(2, 1)
        loss_fn, options = vdm.joint_loss, dict(options, previous=previous, share=config.joint_weight)
    else:
        hint = {}
        if config.context_noise:
            level, unit = config.context_noise * torch.rand(config.batch), torch.randn(clean.shape)
            hint = dict(sigma=level.to(device), noise=unit.to(device))
        context, mask = vdm.draw_context(clean, config.context, config.task, **hint)
        more = torch.where(mask.amax(1) > 0, config.given_noise, 1.0)                                # (B,)
        sigma = sigma * vdm.expand(more, sigma)
        if config.give == "per_frame":                                 # then this is the level of what is given
            sigma = torch.where(mask > 0, 1 / mask - 1, vdm.expand(sigma, mask))                     # (B, T)
        loss_fn, options = vdm.diffusion_loss, dict(options, context=context, mask=mask)
    if config.images:
        options["temporal"] = (torch.rand(config.batch) >= config.images).float().to(device)         # (B,)
    noise = vdm.offset_noise(torch.randn(clean.shape), config.offset, config.offset_per_frame).to(device)
    # loss and gradient
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss, parts = loss_fn(denoiser, clean, sigma=sigma, noise=noise, **options)
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()} at step {step + 1}: stopped, and the last checkpoint kept. A lower "
                         "--lr or --muon-lr, or --dtype fp32, is the usual cure")
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(denoiser.parameters(), config.clip_norm)
    # step: the learning rate rises, then falls to 0 in a straight line
    rate = min((step + 1) / max(config.warmup, 1), 1 - step / config.steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        optimizer.step()
        optimizer.zero_grad()
    ema.update(denoiser)
    noisy = sigma > 0                                                  # what is given has no error to log
    return dict(loss=loss.item(), norm=norm.item(), rate=rate, waited=waited, sigma=sigma[noisy].cpu(),
                error=parts["error"][noisy].cpu())


def sample(config, denoiser, n, device, dtype, seed=0, **told):
    """n clips (n, T, C, H, W) on the CPU, 16 at a time; clip i depends on (seed, i) and what it is told alone."""
    sigmas, clips = vdm.karras_sigmas(config.sampling_steps, config.sigma_min, config.sigma_max, config.rho), []
    for i in range(0, n, 16):
        shape = (min(16, n - i), config.frames, config.channels, *config.size)
        noise = vdm.clip_noise(seed, range(i, i + shape[0]), device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            cond = {name: given[i : i + shape[0]].to(device) for name, given in told.items()}
            clips.append(vdm.generate(denoiser, shape, sigmas, config.sampler, temporal_guidance=config.temporal_guidance,
                                      noise=noise, **cond).cpu())
    return torch.cat(clips)


def evaluations(config):
    """How often the network is evaluated to generate a clip."""
    return (2 * config.sampling_steps - 1 if config.sampler == "heun" else config.sampling_steps) * (1 + (config.temporal_guidance != 1))


# ---- --dry-run: what a run would need --------------------------------------------------------------------------------

PARTS = {"what is told": "told|embed_(action|label)", "noise level": "^embed", "temporal attention": "time_attention",
         "temporal convolutions": r"\btime\.", "spatial attention": "space_attention|enter|leave", "spatial convolutions": ""}


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
        net = vdm.build(config).net
    size = lambda parameters: 4 * sum(p.numel() for p in parameters)
    moments = sum(size(g["params"]) * (1 if isinstance(o, Muon) else 2) for o in make_optimizers(config, net, dtype) for g in o.param_groups)
    blocks = [module for module in net.modules() if isinstance(module, vdm.Block)]
    for block in blocks if light else ():
        block.forward = partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)
    for module in net.modules() if gpu else ():                        # there autocast has norms in float32
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    flash = lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]       # and attention keeps no L x L
    flops, T = FlopCounterMode(display=False), config.frames
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter, mock.patch.object(vdm, "attend", flash if gpu else vdm.attend):
        net.to_empty(device="cpu")
        for p in net.parameters():
            p.grad = torch.empty_like(p)                               # there already, as when gradients are accumulated
        x = torch.empty(clips, T, net.input.in_channels // config.patch ** 2, *config.size)
        told = dict(label=torch.zeros(clips, dtype=torch.long)) if config.labels else {}
        told |= dict(action=torch.empty(clips, T, sum(config.actions))) if config.actions else {}
        told |= dict(given=torch.zeros(clips, T, dtype=torch.bool)) if config.give == "replace" else {}
        before, loss = meter.now, 0
        for first in [True, False][:1 + config.previous]:              # joint_loss holds both its terms until backward
            with flops if first and not light else nullcontext(), torch.autocast("cpu", dtype, dtype != torch.float32):
                loss = loss + net(x, torch.empty(clips, T), **told).float().square().mean()
        loss.backward()
    weights = size(net.parameters())
    return dict(weights=weights, gradients=weights, optimiser=moments, EMA=weights, activations=meter.most - before,
                block=max(size(block.parameters()) for block in blocks), operations=flops.get_total_flops(), net=net)


def dry_run(options, config):
    """Print what --dry-run promises: of a GPU or, with --device cpu, of this process."""
    gpu, counts = options.device != "cpu", {1: "1 or more", 8: "8 --shard", 64: "64 --shard", 512: "512 --shard"}
    dtype = torch.bfloat16 if gpu and options.dtype != "fp32" else pick_dtype(options.dtype, torch.device("cpu"))
    need, light = (rehearse(config, 1, dtype, gpu, light) for light in (False, True))
    parts = Counter()
    for name, p in need["net"].named_parameters():
        parts[next(part for part, pattern in PARTS.items() if re.search(pattern, name))] += p.numel() / 1e6
    print(f"model   {sum(parts.values()):,.2f} M parameters: {', '.join(f'{part} {n:,.2f} M' for part, n in parts.items())}")
    say = lambda x: f"{x / 1000 ** (i := int(math.log10(x) // 3)):.3g} {' kMGTPEZ'[i]}FLOP"
    once = need["operations"]
    step = 3 * once * config.batch * (1 + config.previous)             # a backward pass is worth two forward
    print(f"work    {say(once)} to estimate one clip once; {say(step)} a step of {config.batch} clips ({say(step * 4 / 3)} with "
          f"--checkpoint-activations); {say(once * evaluations(config))} to generate a clip in {evaluations(config)} evaluations")
    unit, G = ("GiB", 2 ** 30) if need["weights"] > 1e8 else ("MiB", 2 ** 20)
    print(f"memory  {unit} per {'GPU' if gpu else 'process'}, one clip at a time (--micro 1), {str(dtype).removeprefix('torch.')} arithmetic\n"
          f"{'GPUs':>20}  weights  gradients  optimiser    EMA  activations    sum  with --checkpoint-activations    sum")
    fits = []
    for n, name in counts.items():
        held = [need[key] / n for key in ("weights", "gradients", "optimiser", "EMA")]
        held[0] += 2 * need["block"] * (n > 1)                         # the block at work and the next one, gathered whole
        row = *held, need["activations"], sum(held) + need["activations"], light["activations"], sum(held) + light["activations"]
        print(f"{name:>20}" + "".join(f"{x / G:{w}.2f}" for x, w in zip(row, (9, 11, 11, 7, 13, 7, 31, 7))))
        # autocast's copies of the weights do not grow with clips; a twentieth is left to CUDA itself, and to gaps
        room, copies = 0.95 * (options.gpu_memory or 0) * 2 ** 30 - sum(held), 0.5 * (dtype != torch.float32)
        fits.append([max(0, int((room - c) // (a - c))) for a, c in ((need["activations"], copies * need["weights"]),
                                                                     (light["activations"], copies * need["block"]))])
    if options.gpu_memory:
        print(f"batch   clips at once (--micro) in {options.gpu_memory:g} GiB without and with --checkpoint-activations: "
              + ", ".join(f"{a}, {b} (GPUs: {name})" for name, (a, b) in zip(counts.values(), fits)))
    if options.speed:
        hours = step * config.steps / options.speed / 1e12 / 3600
        print(f"time    {config.steps} steps at {options.speed:g} TFLOPS per GPU: " + ", ".join(f"{hours / n:,.2f} hours on {n}" for n in counts))


def log_line(step, seconds, records):
    """A row of log.csv: means over the steps since the last row, and the error by noise level."""
    mean = lambda key: sum(r[key] for r in records) / len(records)
    sigma, error = (torch.cat([r[key] for r in records]) for key in ("sigma", "error"))
    row = dict(step=step, seconds=round(seconds, 2), loss=mean("loss"), gradient_norm=mean("norm"),
               lr_share=mean("rate"), data_wait=sum(r["waited"] for r in records) / sum(r["took"] for r in records))
    bins = torch.bucketize(sigma, torch.tensor(SIGMA_EDGES))
    for i, (low, high) in enumerate(zip((0, *SIGMA_EDGES), (*SIGMA_EDGES, math.inf))):
        row[f"error_sigma_{low}_{high}"] = error[bins == i].mean().item() if (bins == i).any() else ""
    return row


def main(argv=None):
    options, config = parse(argv)
    out, checkpoint, start, state = options.out, options.out / "last.pt", 0, None
    if options.resume:
        state, saved = vdm.read_checkpoint(checkpoint)
        changed = [k for k, v in options.given.items() if v != getattr(saved, k) and k not in MAY_CHANGE]
        if changed or options.seed != state["seed"] or options.data != state["data"]:
            raise ValueError(f"--resume continues a run with its own settings, but {', '.join(changed) or 'seed or data'} "
                             f"differs from {checkpoint}: leave the flag out, or start anew with another --out")
        config = dataclasses.replace(saved, **options.given)
        start = state["step"]
        if start >= config.steps:
            raise ValueError(f"{checkpoint} has done all its {config.steps} steps: raise --steps to go on")
    elif not options.dry_run and (checkpoint.exists() or (out / "log.csv").exists()):
        raise ValueError(f"{out} already holds a run: --resume continues it, another --out starts a new one")

    if options.dry_run:
        return dry_run(options, config)
    if config.channels not in (1, 3):
        raise ValueError(f"the preset {options.preset} is about latents with {config.channels} channels, but --data {options.data} holds "
                         "pixels: train on latents (--latents), or with --channels 3 on pixels")
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    frames = config.frames * (2 if config.previous else 1)
    if options.data in WORLDS:
        if config.channels != 3:
            raise ValueError(f"--channels is {config.channels}, but the toy world is in colour: 3")
        data, held_out = (WORLDS[options.data](frames, config.size, seed=options.seed + k) for k in (0, 1))
        print(f"data    {type(data).__name__}: made in code, {frames} frames of {config.size[0]}x{config.size[1]}")
    else:
        data = held_out = vdm.VideoFolder(options.data, frames, config.size, config.stride, config.channels, options.seed, progress=True)
        config = dataclasses.replace(config, fps=data.fps)
        print(data.report)
    config = dataclasses.replace(config, actions=config.actions or data.actions)
    if config.labels not in (0, data.labels) or sum(config.actions) != sum(data.actions):
        raise ValueError(f"--labels is {config.labels} and --actions {config.actions}, but the data has {data.labels} labels "
                         f"and actions {data.actions}")
    torch.manual_seed(options.seed)
    denoiser = vdm.build(config).to(device)
    ema = vdm.EMA(denoiser, config.ema)
    told = conditions(default_collate([held_out[i] for i in range(max(6, options.marks))]), config)
    optimizers = make_optimizers(config, denoiser.net, dtype)
    if state:
        denoiser.load_state_dict(state["model"])
        ema.model.load_state_dict(state["ema"])
        ema.updates = state["ema_updates"]
        for optimizer, s in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(s)
    print(f"model   {sum(p.numel() for p in denoiser.parameters()) / 1e6:.2f} M parameters, kind {config.kind}, {config.optimizer}")
    print(f"device  {device}{f' ({torch.get_num_threads()} threads)' if device.type == 'cpu' else ''}, "
          f"torch {torch.__version__}, {str(dtype).removeprefix('torch.')} arithmetic, float32 weights")
    print("config ", " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items()))
    # a rehearsal on a copy, nothing of which is kept, tells how long a step takes
    arguments = config, data, vdm.EMA(denoiser).model.train().requires_grad_(True), vdm.EMA(denoiser)
    rehearsal = make_optimizers(config, arguments[2].net, dtype)
    for _ in range(2):
        began = time.perf_counter()
        train_step(0, *arguments, rehearsal, device, dtype, options.seed)
        seconds = time.perf_counter() - began
    del arguments, rehearsal
    print(f"run     {config.steps - start} steps of {config.batch} clips to {out}/, {seconds:.2f} s each: about "
          f"{(config.steps - start) * seconds / 60:.1f} minutes, and the sampling after")

    save_every = options.save_every or max(1, config.steps // 10)
    sample_every = options.sample_every or max(1, config.steps // 5)
    columns = list(log_line(0, 0, [dict(loss=0, norm=0, rate=0, waited=0, took=1, sigma=torch.ones(1), error=torch.ones(1))]))
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    elapsed = state["seconds"] if state else 0.0
    if state:                                                          # forget what was logged after the checkpoint
        rows = [r for r in csv.DictReader(open(out / "log.csv")) if int(r["step"]) <= start]
    log = open(out / "log.csv", "w", newline="")
    table = csv.DictWriter(log, columns)
    table.writeheader()
    table.writerows(rows if state else [])
    records, tty = [], sys.stderr.isatty()
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, mininterval=0.5 if tty else 20, ncols=110)
    try:
        for step in bar:
            began = time.perf_counter()
            record = train_step(step, config, data, denoiser, ema, optimizers, device, dtype, options.seed)
            record["took"] = time.perf_counter() - began
            elapsed += record["took"]
            records.append(record)
            done = step + 1
            saving = done % save_every == 0 or done == config.steps
            if done % 10 == 0 or saving:                           # a resumed log then loses no step
                row = log_line(done, elapsed, records)
                table.writerow(row)
                log.flush()
                bar.set_postfix(loss=f"{row['loss']:.4f}", data_wait=f"{row['data_wait']:.0%}", refresh=False)
                records = []
            if saving:
                vdm.save(checkpoint, config=dataclasses.asdict(config), step=done, seconds=elapsed, seed=options.seed,
                         data=options.data, model=denoiser.state_dict(), ema=ema.model.state_dict(),
                         ema_updates=ema.updates, optimizers=[o.state_dict() for o in optimizers])
            if done % sample_every == 0 and done < config.steps:
                clips = sample(config, ema.model, 6, device, dtype, **told)      # always from the same noise
                vdm.write_image(out / f"samples/step_{done:06d}.png", vdm.film_strip(clips), 2)
                vdm.write_video(out / f"samples/step_{done:06d}.gif", vdm.grid(clips), config.fps)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped at step {step}; the newest checkpoint, if there is one, is {checkpoint}: --resume goes on from it")
    finally:
        log.close()

    began = time.perf_counter()
    clips = sample(config, ema.model, options.marks, device, dtype, seed=1, **told)
    n = min(8, len(clips))
    files = [vdm.write_image(out / "samples/final.png", vdm.film_strip(clips[:n]), 2),
             vdm.write_video(out / "samples/final.gif", vdm.grid(clips[:16]), config.fps),
             vdm.write_video(out / "samples/final.mp4", vdm.grid(clips[:16]), config.fps)]
    print(f"\ntrained {config.steps} steps in {elapsed / 60:.1f} minutes; sampled {len(clips)} clips in "
          f"{time.perf_counter() - began:.0f} s ({config.sampler}, {evaluations(config)} evaluations each, averaged weights)")
    if options.data == "shapes":
        print(held_out.report(clips))
    elif options.data == "drive":
        print(held_out.report(clips, told["action"][:len(clips)]))
    print("files  ", *files, checkpoint, out / "log.csv", sep="\n        ")
    longer = config.previous or config.independent or sum(config.context[1:]) and config.task in ("predict", "any")
    told = f" --length {4 * config.frames}" if longer else " --context FILE" if sum(config.context[1:]) else ""
    if options.data == "drive":
        told = f" --actions {('LLSSRRXX' * config.frames)[:config.frames]}"
    print(f"next    python sample.py {checkpoint} --n 16{told}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
