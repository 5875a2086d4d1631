"""
train.py: train a video diffusion model.

    python train.py --preset tiny                        a toy world: no data, no download, no GPU
    python train.py --preset tiny --data drive           another, whose clips obey commands: left, straight, right, stop
    python train.py --preset tiny --data my_videos/      your own files: videos, GIFs, picture folders, arrays
    python train.py --preset tiny --resume               go on where a run was stopped
    python train.py --preset tiny --init out/tiny/last.pt --adapters lora --train lora --out out/lora
                                                         start from a trained model, train a twentieth of it

A preset is a set of defaults; every field of vdm.Config is a flag that changes it. A run writes to out/NAME:
config.json, log.csv, last.pt (all that --resume and sample.py need) and samples/ (pictures and GIFs on the way).
"""

import argparse
import copy
import csv
import dataclasses
import inspect
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import default_collate
from tqdm import tqdm

import vdm

SIGMA_EDGES = 0.1, 0.3, 1, 3, 10                                       # log.csv: the error between these noise levels
WORLDS = dict(shapes=vdm.MovingShapes, drive=vdm.Drive)
MODEL = ("kind", "sigma_data", "head_dim", "give", "channels", "width", "mults", "blocks", "attention", "joint", "patch", "detail",
         "previous", "labels", "actions", "adapters", "rank")           # of two models that fit, these are equal
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
    p.add_argument("--init", help="a last.pt to start from: its averaged weights, of a run with the same network")
    p.add_argument("--seed", type=int, default=0, help="fixes weights, data and noise")
    p.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu) or a name that torch knows")
    p.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 where it is fast")
    p.add_argument("--save-every", type=int, help="steps between checkpoints (default: a tenth of the run)")
    p.add_argument("--sample-every", type=int, help="steps between sample pictures (default: a fifth of the run)")
    p.add_argument("--marks", type=int, default=64, help="clips generated and marked at the end")
    p.add_argument("--dry-run", action="store_true", help="print what the run would be, and stop")
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(vdm.Config), re.M))
    fields = p.add_argument_group("Config fields, with the defaults of --preset tiny")
    for f in dataclasses.fields(vdm.Config):
        flag, default = "--" + f.name.replace("_", "-"), getattr(vdm.PRESETS["tiny"], f.name)
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else \
            dict(nargs="+", type=type((*default, 0)[0])) if f.type is tuple else dict(type=f.type)
        fields.add_argument(flag, default=argparse.SUPPRESS, help=f"{comments[f.name]} ({default})", **kind)
    options = p.parse_args(argv)
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
    own. Frozen parameters are in none of them, those of spatial layers in groups with a slower rate."""
    rates, groups = dict(rest=config.lr, gates=config.gate_lr, inside=config.muon_lr), {}
    for name, p in net.named_parameters():
        matrix = p.ndim > 1 and not name.startswith(("input", "output", "embed", "detail"))
        muon = config.optimizer == "muon" and matrix
        part = "gates" if name.endswith("gate") else "inside" if muon else "rest"
        factor = config.spatial_lr if vdm.part_of(name) == "spatial" else 1.0
        if p.requires_grad:
            groups.setdefault((part, factor), dict(params=[], peak=rates[part] * factor))["params"].append(p)
    order = sorted(groups, key=lambda group: "rest gates inside".index(group[0]))
    adamw, muon = ([groups[key] for key in order if (key[0] == "inside") == inside] for inside in (False, True))
    optimizers = []
    if adamw:
        optimizers.append(torch.optim.AdamW(adamw, config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True))
    if muon:
        optimizers.append(Muon(muon, config.muon_lr, dtype=dtype))
    return optimizers


def start_from(path, denoiser, config):
    """--init: copy the averaged weights of a checkpoint into a fresh model. Adapters, labels and actions that only the model
    has stay as they are made, which is as nothing; all else must be the same."""
    state, saved = vdm.read_checkpoint(path)
    ours, theirs = ({name.replace(".layer.", "."): w for name, w in weights.items()}       # as they were before adapt
                    for weights in (denoiser.state_dict(), state["ema"]))
    fits = {name for name in ours.keys() & theirs.keys() if ours[name].shape == theirs[name].shape}
    new = {name for name in ours.keys() - theirs.keys() if vdm.part_of(name) in ("lora", "adapters", "actions")}
    other = {name: f"{name} {getattr(saved, name)} (here {getattr(config, name)})" for name in MODEL
             if getattr(saved, name) != getattr(config, name)}
    misfits = {name for name in (ours.keys() - new) | theirs.keys() if name not in fits and not name.startswith("balance.")}
    if misfits or other.keys() & {"kind", "sigma_data", "head_dim"}:
        raise ValueError(f"--init {path} is another model: it has {', '.join(other.values())}; {len(fits)} of its {len(theirs)} "
                         "tensors would fit: give the flags that it was trained with")
    for name in fits:
        ours[name].copy_(theirs[name])
    print(f"init    {path}, averaged weights after {state['step']} steps{f'; new, as nothing: {len(new)} tensors' * bool(new)}")


def describe(denoiser):
    """What is trained, as text: by part and by layer, how many tensors and numbers, and the share of all."""
    count, total = {}, sum(p.numel() for p in denoiser.parameters())
    for name, p in denoiser.named_parameters():
        if p.requires_grad:
            for key in (vdm.part_of(name), "  " + re.sub(r"\b\d+\b", "*", name.replace(".layer.", "."))):
                n, numbers = count.get(key, (0, 0))
                count[key] = n + 1, numbers + p.numel()
    whole = sum(numbers for key, (_, numbers) in count.items() if key[0] != " ")
    lines = [f"{whole:,} of {total:,} parameters ({whole / total:.1%})"]
    lines += [f"{key}: {n} tensors, {numbers:,}" for key, (n, numbers) in sorted(count.items(), key=lambda c: vdm.part_of(c[0]))
              if whole < total or key[0] != " "]
    return "\n        ".join(lines)


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
    # loss and gradient; PyTorch 2.13 dies on a CPU where a GroupNorm learns but what comes before it is frozen
    noise.requires_grad_(not all(p.requires_grad for p in denoiser.parameters()))
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
        if options.init:
            raise ValueError("--init starts a new run and --resume goes on with one: leave one of them out")
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
    if options.init:
        start_from(options.init, denoiser, config)
    vdm.trainable(denoiser, config.train)
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
    print(f"train   {describe(denoiser)}")
    print(f"device  {device}{f' ({torch.get_num_threads()} threads)' if device.type == 'cpu' else ''}, "
          f"torch {torch.__version__}, {str(dtype).removeprefix('torch.')} arithmetic, float32 weights")
    print("config ", " ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items()))
    # a rehearsal on a copy, nothing of which is kept, tells how long a step takes
    arguments = config, data, copy.deepcopy(denoiser), vdm.EMA(denoiser)
    rehearsal = make_optimizers(config, arguments[2].net, dtype)
    for _ in range(2):
        began = time.perf_counter()
        train_step(0, *arguments, rehearsal, device, dtype, options.seed)
        seconds = time.perf_counter() - began
    del arguments, rehearsal
    print(f"run     {config.steps - start} steps of {config.batch} clips to {out}/, {seconds:.2f} s each: about "
          f"{(config.steps - start) * seconds / 60:.1f} minutes, and the sampling after")
    if options.dry_run:
        return

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
    evaluations = (2 if config.sampler == "heun" else 1) * config.sampling_steps - (config.sampler == "heun")
    evaluations *= 1 + (config.temporal_guidance != 1)
    print(f"\ntrained {config.steps} steps in {elapsed / 60:.1f} minutes; sampled {len(clips)} clips in "
          f"{time.perf_counter() - began:.0f} s ({config.sampler}, {evaluations} evaluations each, averaged weights)")
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
