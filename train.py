"""
train.py: train a video diffusion model.

    python train.py --preset tiny                      a toy world: no data, no download, no GPU
    python train.py --preset tiny --data drive         another, whose clips obey commands
    python train.py --preset tiny --data my_videos/    your own videos, GIFs, pictures, arrays
    python train.py --preset digits --data mnist_test_seq.npy      grey clips of moving digits
    python train.py --preset tiny --resume             go on where a run was stopped
    python train.py --preset latent --latents CKPT     on latents of notebooks/autoencoder.py
    python train.py --preset ucf101 --dry-run          what a run would need
    python train.py --preset latent --help-all         all flags, with the defaults of a preset
    python train.py --preset vista --init svd.safetensors --data latents/     from published weights
    torchrun --nproc_per_node 8 train.py ...           many GPUs share every step's clips

A preset is a set of defaults, and every field of vdm.Config is a flag. A run writes to out/NAME:
log.csv, samples/, and last.pt, which is all that --resume and sample.py need.
"""

import argparse
import csv
import dataclasses
import inspect
import math
import os
import re
import shlex
import signal
import sys
import time
import zlib
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, default_collate
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

import vdm
from vdm import BAR, Parser, autocast, check, need, pick_device, pick_dtype, pixels, sampling

PUBLISHED = ("svd", "vista")                        # models of --give svd and vista: StableUNet
WORLDS = dict(shapes=vdm.MovingShapes, drive=vdm.Drive)
LOSSES = dict(plain=partial(vdm.diffusion_loss, change=0.0), change=vdm.diffusion_loss,
              vista=vdm.vista_loss)
SIGMA_EDGES = (0, 0.1, 0.3, 1, 3, 10, math.inf)      # log.csv has the error between these levels

# ---- a training step -----------------------------------------------------------------------------

def train_step(step, config, options, batches, model, ema, optimizers):
    """Make one step of training. Return its loss, and what else goes into the log."""
    drawn = draw(step, config, options.seed)
    seen = []
    for rows in options.parts:             # usually one, all of the batch; else gradients add up
        batch = {name: x.to(options.device) for name, x in next(batches).items()}
        chance = {name: x[rows].to(options.device) for name, x in drawn.items()}
        model.require_backward_grad_sync = rows is options.parts[-1]   # DDP's processes add up once
        with autocast(options.device, options.dtype):
            loss, error = loss_of(model, batch, chance, config)
        (loss / len(options.parts)).backward()
        seen.append((loss.detach(), error))
    norm, rate = descend(step, config, model, optimizers)
    ema.update(model)
    losses, errors = zip(*seen)
    loss = gather(torch.stack(losses)).mean().item()
    error = gather(torch.cat(errors)).cpu()                       # (B,) or (B, T), like sigma
    return dict(loss=loss, gradient_norm=norm, lr_share=rate, error=error, sigma=drawn["sigma"])

def draw(step, config, seed):
    """Draw all that chance decides in a step, a row per clip, from (seed, step) alone.

    So --resume needs no generator's state, and many processes learn what one alone would."""
    torch.manual_seed(1_000_003 * seed + step)
    clips = config.batch
    size = config.crop or config.size
    shape = (clips, config.frames + config.stills, config.channels, *size)
    u = vdm.stratified(clips)                                                                 # (B,)
    if config.independent:
        u = vdm.independent_levels(u, config.frames, config.independent)                    # (B, T)
    task = "all" if config.task in ("image", "upsample") else config.task
    drawn = dict(sigma=vdm.noise_schedule(config)(u),
                 noise=vdm.offset_noise(torch.randn(shape), config.offset,
                                        per_frame=config.give == "vista"),
                 mask=vdm.draw_mask(clips, config.frames, config.context, task),            # (B, T)
                 temporal=(torch.rand(clips) >= config.images).float(),
                 told=torch.rand(clips) >= config.drop)
    if config.give == "hint":
        drawn["level"] = config.hint_noise * torch.rand(clips)
        drawn["unit"] = torch.randn(clips, config.frames, *shape[2:])
    if config.crop:
        rooms = np.subtract(config.size, config.crop)
        corners = [torch.randint(room + 1, (clips,)) for room in rooms]
        drawn["corner"] = torch.stack(corners, dim=1)                                      # (B, 2)
    if config.give in PUBLISHED:                               # the picture is withheld on its own
        drawn["shown"] = (torch.rand(clips) >= config.drop).float()
    if config.actions:                                         # (B, 1, A): 0, or NaN if not told
        zeros = torch.zeros(clips, 1, sum(config.actions))
        drawn["withheld"] = vdm.drop_modes(zeros, config.actions, config.drop)
    return drawn

def conditions(batch, drawn, config):
    """Return what the denoiser is told: given frames, and label and action unless withheld."""
    clean = batch["video"]
    told = {}
    if config.images:
        told["temporal"] = drawn["temporal"]
    if config.labels:
        told["label"] = batch["label"].where(drawn["told"], -1)                               # (B,)
    if config.actions and "action" in batch:
        told["action"] = batch["action"][:, -config.frames:] + drawn["withheld"]         # (B, T, A)
    if config.give in PUBLISHED:
        return published_conditions(told, batch, drawn, config)
    if config.give == "previous":
        return told | dict(previous=clean[:, :config.frames])
    if config.give != "hint":
        return told | dict(context=clean, mask=drawn["mask"])
    if config.task == "image":
        return told | vdm.image_hint(clean[:, :1], drawn["mask"], drawn["level"],
                                     drawn["unit"][:, :1])
    if config.task == "upsample" and not config.factor:
        clean = vdm.blurred(clean, config.enlarge)
    clean = clean[:, :config.frames]                   # of latents, what is blurred comes first
    return told | vdm.hint(clean, drawn["mask"], drawn["level"], drawn["unit"])

def published_conditions(told, batch, drawn, config):
    """Return what SVD and Vista are told: picture, token, numbers; Vista also frames and action."""
    clean = batch["video"]
    told |= vdm.picture_conditions(clean[:, :1], config.fps)
    told["concat"] = told["concat"] * drawn["shown"][:, None, None, None, None]
    if "clip" in batch:
        told["clip"] = batch["clip"] * drawn["told"][:, None]                          # (B, 1024)
    if config.give == "vista":
        told |= dict(context=clean, mask=drawn["mask"])
    if "action" in told:
        told["action"] = told["action"][:, 0]                                               # (B, A)
    return told

def loss_of(model, batch, drawn, config):
    """Return the loss of a batch and, for the log, its squared errors, of the shape of sigma."""
    if config.crop:                                     # all frames of a clip at its own corner
        h, w = config.crop
        crops = [clip[..., y:y + h, x:x + w]
                 for clip, (y, x) in zip(batch["video"], drawn["corner"])]
        batch = batch | dict(video=torch.stack(crops))
    told = conditions(batch, drawn, config)
    clean = batch["video"][:, -config.frames:]                                     # (B, T, C, H, W)
    loss = LOSSES[config.loss]
    if config.give == "previous":
        loss = partial(vdm.joint_loss, share=config.context[1], loss=loss)
    if config.stills:                                                # frames of the clips after it
        stills = [clean.roll(-1 - k, 0)[:, k % config.frames] for k in range(config.stills)]
        loss = partial(vdm.joint_image_loss, images=torch.stack(stills, 1), loss=loss)
    # PyTorch 2.13 dies if a GroupNorm comes before all that has a gradient: so noise gets one.
    noise = drawn["noise"].requires_grad_(config.train != ("all",))
    weight = partial(vdm.loss_weight, weighting=config.weighting, sigma_data=config.sigma_data)
    return loss(model, clean, sigma=drawn["sigma"], noise=noise, weight=weight, **told)

def descend(step, config, model, optimizers):
    """Step down the clipped gradient. Return its norm and the share of the peak learning rate."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    if hasattr(norm, "full_tensor"):                               # of a model in shards
        norm = norm.full_tensor()
    need(norm.isfinite(), f"the gradient is {norm} at step {step + 1}: the last checkpoint is kept;"
         " a lower --lr or --muon-lr, or --dtype fp32, is the usual cure")
    rate = min((step + 1) / max(config.warmup, 1), 1 - step / config.steps)  # up, then down to 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        optimizer.step()
        optimizer.zero_grad()
    return norm.item(), rate

# ---- optimisers ----------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al. 2024).

    A weight matrix then moves equally far in all directions of its gradient, the rare ones too."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                m = p.grad.lerp(average, group["momentum"]).flatten(1)            # (rows, columns)
                rows, columns = m.shape
                m = self.orthogonal(m.mT).mT if rows > columns else self.orthogonal(m)
                p.add_(m.reshape(p.shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    @staticmethod
    def orthogonal(m):
        """Bring all singular values of m near 1, by five steps of Newton and Schulz on m m^T."""
        m = m / (m.norm() + 1e-7)
        g = m @ m.mT                                                                  # (rows, rows)
        turn = one = torch.eye(len(m), dtype=m.dtype, device=m.device)
        for _ in range(5):
            factor = 3.4445 * one - 4.7750 * g + 2.0315 * g @ g
            g = factor @ g @ factor
            turn = factor @ turn
        return turn @ m

def make_optimizers(config, model):
    """Make AdamW for all that is trained; with muon, Muon for hidden matrices, AdamW for the rest.

    A group keeps its peak learning rate. That of spatial layers may be a share of the others'."""
    make = dict(adamw=partial(torch.optim.AdamW, betas=(0.9, 0.99), fused=True,
                              weight_decay=config.weight_decay), muon=Muon)
    rates = dict(adamw=config.lr, muon=config.muon_lr)
    part = vdm.part_of(model)
    groups = dict(adamw={}, muon={})
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # what embeds the noise level and what faces pixels learn by AdamW, as usual with Muon
        hidden = re.search(r"net\.(down|middle|up)\.", name) and ".emb." not in name
        kind = config.optimizer if hidden and p.ndim > 1 else "adamw"
        peak = rates[kind]
        if part[p] == "spatial":
            peak *= config.spatial_lr
        if p.numel() == 1:                                   # a gate, which first has to leave 0
            peak *= 5
        groups[kind].setdefault(peak, []).append(p)
    return [make[kind]([dict(params=some, peak=peak) for peak, some in peaks.items()], rates[kind])
            for kind, peaks in groups.items() if peaks]

# ---- samples -------------------------------------------------------------------------------------

def sample(config, denoiser, n, device, dtype, seed=0, autoencoder=None, batch=16, stops=(),
           **told):
    """Generate n clips (n, T, C, H, W), a batch at a time, and decode them by an autoencoder.

    Clip i depends on (seed, i) alone and on what it is told: label (n,), action (n, T, A)."""
    sigmas, sampler = sampling(config)
    denoise = vdm.stoppable(vdm.skip_guided_by(config, denoiser), stops)
    clips = []
    for i in range(0, n, batch):
        shape = (min(batch, n - i), config.frames, config.channels, *config.size)
        noise = vdm.clip_noise(seed, range(i, i + shape[0]), device)
        here = {name: x[i:i + shape[0]].to(device) for name, x in told.items()}
        with autocast(device, dtype):
            clip = vdm.generate(denoise, shape, sigmas.to(device), sampler, noise, **here)
        if autoencoder is not None:
            clip = autoencoder.decode(clip)
        clips.append(clip.cpu())
    return torch.cat(clips)

def write_samples(options, name, clips, config):
    """Write clips as film strip and GIF or, where latents have no decoder here, as .npy."""
    path = options.out / "samples" / name
    if clips.shape[3:] != pixels(config)[0]:
        with vdm.replacing(path.with_suffix(".npy")) as part:
            np.save(part, clips.numpy())
        return [path.with_suffix(".npy")]
    strip = vdm.film_strip(clips[:8])[None]
    return [vdm.write_video(path.with_suffix(".png"), strip, scale=2),
            vdm.write_video(path.with_suffix(".gif"), vdm.grid(clips[:16]), config.fps)]

def draw_errors(options):
    """Draw the squared errors in log.csv over the steps, a line for each range of noise levels."""
    from PIL import Image, ImageDraw
    log = options.out / "log.csv"
    table = np.genfromtxt(log, delimiter=",", names=True, deletechars="", ndmin=1)
    parts = np.array_split(table, min(len(table), 60))                      # means are less noisy
    last = table["step"][-1]
    image = Image.new("RGB", (600, 330), "white")
    pen = ImageDraw.Draw(image)

    def place(step, error):
        return 50 + 430 * step / last, 20 - 70 * np.log10(np.clip(error, 1e-4, 1))

    for error in (1, 0.1, 0.01, 0.001, 0.0001):
        pen.line([place(0, error), place(last, error)], "lightgrey")
        pen.text((5, place(0, error)[1] - 6), f"{error:g}", "black")
    pen.text((420, 310), f"step {last:.0f}", "black")
    colors = ("navy", "royalblue", "seagreen", "orange", "orangered", "darkred")
    for k, (color, low, high) in enumerate(zip(colors, SIGMA_EDGES, SIGMA_EDGES[1:])):
        pen.text((490, 20 + 15 * k), f"sigma {low} to {high}", color)
        points = [(part["step"].mean(), part[f"error_sigma_{low}_{high}"]) for part in parts]
        pen.line([place(step, np.nanmean(errors)) for step, errors in points
                  if np.isfinite(errors).any()], color, width=2)
    path = options.out / "samples/errors.png"
    with vdm.replacing(path) as part:
        image.save(part)
    return [path]

def try_to_write(write, *arguments):
    """Return the files that write(*arguments) writes. That it fails is no reason to end a run."""
    try:
        return write(*arguments)
    except (OSError, ValueError) as e:                                      # ValueError is of NaN
        print(f"\nwarning: {e}; the run goes on")
        return []

def report(world, videos, action=None):
    """Return the marks of a toy world as text, with those of as many of its own clips."""
    n, frames = videos.shape[:2]
    real = torch.stack([world[i]["video"][-frames:] for i in range(n)])
    true = world.check(real)
    lines = [f"{n} clips of {frames} frames    made   real"]
    for name, marks in world.check(videos, action).items():
        if marks.dtype == bool:
            lines.append(f"{name:>25} {marks.mean():7.0%} {true[name].mean():6.0%}")
    return "\n".join(lines)

# ---- the run -------------------------------------------------------------------------------------

def main(argv=None):
    """Make ready what a run consists of, train, and finish."""
    options, config = parse(argv)
    state, config = resume(options, config)
    options.run = {name: getattr(options, name) for name in RUN | HABITS}
    check(options, config)
    if options.dry_run:
        return dry_run(config)
    options.device = pick_device(options.device)
    options.dtype = pick_dtype(options.dtype, options.device)
    on_cpu = options.device.type == "cpu"
    meant_for = ABOUT[options.preset].split("M  ")[1]
    if on_cpu and "GPU" in meant_for:
        print(f"note    preset {options.preset} is meant for a {meant_for}")
    if on_cpu and config.frames == 2:
        options.dtype = torch.float32              # PyTorch 2.13: Conv3d's gradient in bf16 is NaN
    join(options, config)
    if options.note:
        print(f"preset  {options.preset}, but {options.note}, by --frames or --data")
    autoencoder, config = find_autoencoder(options, config, state)
    if options.local:                      # the first process of a machine reads and decodes files
        dist.barrier()
    asked = config
    data, held_out, config = open_data(options, config, autoencoder)
    if options.files and config != asked:
        print(f"own data: {differing(asked, config)}")
    if options.files != state.get("files", options.files):
        print(f"warning: the files of {options.data} are others than this run began with")
    if dist.is_initialized() and not options.local:
        dist.barrier()
    learner = make_learner(options, config, state)
    told = told_to_samples(held_out, options.marks, config, autoencoder, options.device)
    store = partial(save, options, config, learner, autoencoder)
    picture = partial(sample, config, learner[1].model, device=options.device,
                      dtype=options.dtype, autoencoder=autoencoder,
                      batch=options.micro or 16, **told)
    with lock(options):
        if train(options, config, data, learner, store, picture, state):
            finish(options, config, held_out, picture)

def lock(options):
    """Keep other runs out of the folder until log.csv, which is returned, is closed.

    Windows and some network disks know no such lock: a second run is not noticed there."""
    taken = f"another run is writing to {options.out}: wait, stop it, or name another --out"
    options.out.mkdir(parents=True, exist_ok=True)
    log = open(options.out / "log.csv", "a")
    if options.rank:                                      # the first of torchrun's has the lock
        return log
    try:
        import fcntl
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.register_at_fork(after_in_child=log.close)     # workers outlive a killed process
    except BlockingIOError as e:
        raise ValueError(taken) from e
    except (ImportError, OSError):
        pass
    need(options.resume or not (options.out / "last.pt").exists(), taken)   # it may have ended
    return log

def told_to_samples(held_out, n, config, autoencoder, device):
    """Return the conditions of n held-out clips, which the samples of a run are told."""
    if not config.actions and config.give not in PUBLISHED and config.task != "upsample":
        return {}
    some = default_collate([held_out[i] for i in range(n)])
    told = {}
    if config.actions and held_out.actions:
        told["action"] = some["action"][:, -config.frames:]                              # (N, T, A)
    if config.task == "upsample":
        clip = vdm.blurred(some["video"], config.enlarge)
        if autoencoder is not None:
            clip = autoencoder.encode(clip.to(device)).cpu()
        level = torch.full((n,), config.hint_noise / 2)
        told |= vdm.hint(clip, torch.ones(clip.shape[:2]), level, torch.randn(clip.shape))
    if config.give in PUBLISHED:
        drawn = dict(shown=torch.ones(n), told=torch.ones(n), mask=None)
        told = published_conditions(told, some, drawn, config)
        told = {name: x for name, x in told.items() if name not in ("context", "mask")}
    return told

def make_learner(options, config, state):
    """Make the network, its average and its optimisers: fresh, by --init, or as in a checkpoint."""
    torch.manual_seed(options.seed)
    if options.init and not options.resume:
        net = start_from(options.init, config)
    else:
        net = vdm.build(config)
    if config.train != ("all",):
        vdm.trainable(net, config.train)
        need(options.init or options.resume or "spatial" in config.train,
             "--train without spatial needs --init: they would stay random")
    net.to(options.device)
    ema = vdm.EMA(net, config.ema)
    model = spread(net, ema, options)
    optimizers = make_optimizers(config, model)
    if options.resume:
        restore(state, model, ema, optimizers)
    if options.compile:
        net.net.compile()
    total = sum(p.numel() for p in net.parameters())
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    print(f"model   {total:,} parameters, of which {trained:,} are trained, by {config.optimizer}\n"
          f"device  {options.device}, {options.dtype} arithmetic, float32 weights\n"
          f"run     {config.steps} steps of {config.batch} clips, to {options.out}/")
    return model, ema, optimizers

def restore(state, model, ema, optimizers):
    """Load weights, averages and moments of a checkpoint, but no peak rates: --lr may be new."""
    peaks = [group["peak"] for optimizer in optimizers for group in optimizer.param_groups]
    whole.set_state_dict(model, optimizers, model_state_dict=state["model"],
                         optim_state_dict=state["optimizers"], options=WHOLE)
    whole.set_model_state_dict(ema.model, state["ema"], options=WHOLE)
    ema.updates = state["ema_updates"]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, peak in zip(groups, peaks, strict=True):
        group["peak"] = peak

def train(options, config, data, learner, store, picture, state):
    """Make all steps that are left. Return whether they are done: False if a signal came."""
    start = state["step"]
    seconds = state["seconds"]
    save_every, sample_every = intervals(options, config)
    trim(options.out / "log.csv", start)
    batches = read_batches(data, config, options, start)
    records = []
    saved = time.monotonic()
    look = max(60, 2 * seconds)            # at so many seconds of training there are samples, too
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps,
               disable=options.rank > 0, **BAR)
    with vdm.stop_signals("stopping: this step is finished and saved first") as stops:
        for step in bar:
            began = time.perf_counter()
            records.append(train_step(step, config, options, batches, *learner))
            seconds += time.perf_counter() - began
            done = step + 1
            last = done == config.steps
            stop, early, late = agree(options, stops, seconds > look and not options.sample_every,
                                      time.monotonic() - saved > 600)
            if (early or done % sample_every == 0) and not (last or stop):
                began = time.monotonic()
                stop = show(options, config, picture, done, stops)
                look = 2 * max(seconds, time.monotonic() - began)         # drawing may take longer
            saving = stop or late or last or done % save_every == 0
            if saving or done % 10 == 0:                         # a resumed log then loses no step
                bar.set_postfix(loss=f"{records[-1]['loss']:.4f}", refresh=False)
                log(options, done, seconds, records)
                records = []
            if saving:
                store(done, seconds)
                saved = time.monotonic()
            if stop and not last:
                bar.close()
                print(f"stopped after step {done}, all saved: --resume goes on")
                return False
    print(f"\ntrained {config.steps} steps in {seconds / 60:.1f} minutes")
    return True

def intervals(options, config):
    """Return the numbers of steps from one checkpoint to the next, and of samples."""
    save_every = options.save_every or options.keep_every or max(1, config.steps // 10)
    return save_every, options.sample_every or max(1, config.steps // 5)

def agree(options, *wishes):
    """Return of each wish whether any process has it."""
    mine = torch.tensor([[bool(wish) for wish in wishes]], device=options.device)
    return gather(mine).any(0).tolist()

def show(options, config, picture, step, stops):
    """Write samples of a few clips, always from the same noise. Return whether a signal came."""
    try:
        clips = picture(min(6, options.marks), stops=() if dist.is_initialized() else stops)
    except KeyboardInterrupt:
        return True
    if options.rank == 0:
        try_to_write(write_samples, options, f"step_{step:06d}", clips, config)
    return False

def read_batches(data, config, options, start):
    """Yield all parts of batches from step `start` on, read ahead by workers if there are any."""
    order = (range(step * config.batch + rows.start, step * config.batch + rows.stop)
             for step in range(start, config.steps) for rows in options.parts)
    return iter(DataLoader(data, batch_sampler=order, num_workers=options.workers,
                           worker_init_fn=deaf))

def deaf(worker):
    """Let a worker leave signals to the process it reads for, which saves and then ends it."""
    for number in vdm.STOPS:
        signal.signal(number, signal.SIG_IGN)

def log(options, step, seconds, records):
    """Append a row to log.csv: means over the steps since the last, and errors by noise level."""
    row = dict(step=step, seconds=round(seconds, 2))
    for name in ("loss", "gradient_norm", "lr_share"):
        row[name] = sum(record[name] for record in records) / len(records)
    sigma = torch.cat([record["sigma"].flatten() for record in records])
    error = torch.cat([record["error"].flatten() for record in records])
    for low, high in zip(SIGMA_EDGES, SIGMA_EDGES[1:]):
        here = error[(low < sigma) & (sigma <= high)]
        row[f"error_sigma_{low}_{high}"] = here.mean().item() if len(here) else ""
    if options.rank == 0:
        with open(options.out / "log.csv", "a", newline="") as file:
            table = csv.DictWriter(file, row)
            if file.tell() == 0:
                table.writeheader()
            table.writerow(row)

WHOLE = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)

def save(options, config, learner, autoencoder, step, seconds):
    """Write last.pt and, every keep_every steps, a checkpoint that stays. All processes call it."""
    model, ema, optimizers = learner
    weights, moments = whole.get_state_dict(model, optimizers, options=WHOLE)
    average = whole.get_model_state_dict(ema.model, options=WHOLE)
    state = dict(config=dataclasses.asdict(config), files=options.files, step=step, seconds=seconds,
                 model=weights, optimizers=moments, ema=average, ema_updates=ema.updates,
                 **options.run)
    if autoencoder is not None:
        state["autoencoder"] = autoencoder.state_dict()
    if options.rank == 0:
        vdm.save(options.out / "last.pt", **state)
        if options.keep_every and step % options.keep_every == 0:
            vdm.save(options.out / f"step_{step:06d}.pt", **state)

def finish(options, config, held_out, picture):
    """End a run: clips by the averaged weights, their marks, files, and the next command."""
    clips = picture(options.marks, seed=1)                  # by all, as a sharded model needs all
    if options.rank:
        return
    files = try_to_write(write_samples, options, "final", clips, config)
    files += try_to_write(draw_errors, options)
    if options.data in WORLDS:
        print(report(held_out, clips, picture.keywords.get("action")))
    last = options.out / "last.pt"
    print("files  ", *files, last, options.out / "log.csv", sep="\n        ")
    more = ["--context LATENT.npy --clip TOKEN.npy"] if config.give in PUBLISHED else []
    print("next    python sample.py", shlex.quote(str(options.out)), *more)

# ---- data ----------------------------------------------------------------------------------------

def open_data(options, config, autoencoder):
    """Return what to train on, what to hold out, and config with what the data decides."""
    size, channels = pixels(config)
    clips = 2 if config.give == "previous" else 1                  # an item is two clips in a row
    frames = clips * vdm.clip_frames(config)
    options.files = None                                           # a checksum of those there are
    if options.data in WORLDS:
        need(autoencoder or not config.factor, "this run needs latents: name an autoencoder "
             "(--latents CKPT, made by notebooks/autoencoder.py) or, as --data, .npy files")
        need(channels == 3, f"--channels is {channels}, but toy worlds are in colour: name grey "
             "videos by --data, such as mnist_test_seq.npy, the download of Moving MNIST")
        need(config.stride == 1 or options.data == "shapes", "--stride is for files and shapes")
        world = WORLDS[options.data]
        if options.data == "shapes":
            world = partial(world, stride=config.stride)
        data = world(frames, size, seed=options.seed)
        held_out = world(frames, size, seed=options.seed + 1)
        print(f"data    {WORLDS[options.data].__name__}: made in code, {frames} frames of "
              f"{size[0]}x{size[1]}")
    else:
        data, config = open_files(options, config, frames, clips, autoencoder)
        held_out = data
    if autoencoder is not None:
        n = min(options.encode, config.steps * config.batch)
        frames = clips * config.frames
        if config.task == "upsample":
            frames *= 2
        data = Latents(encode(data, options, n, autoencoder, config), frames, config.size, 1,
                       config.channels, options.seed)
    need(config.give != "vista" or "conditions" not in config.train or data.actions, "--train "
         "conditions trains Vista's actions: put clip.actions.npy (T, 19) beside clip.npy")
    if config.give != "svd":                                             # it has no place for them
        config = dataclasses.replace(config, actions=config.actions or data.actions)
    none = config.give == "svd" or (config.give == "vista" and not data.actions)     # its phase 1
    need(config.labels in (0, data.labels) and (none or sum(config.actions) == sum(data.actions)),
         f"--labels is {config.labels} and --actions {config.actions}, but the data has "
         f"{data.labels} labels and actions {data.actions}")
    return data, held_out, config

def open_files(options, config, frames, clips, autoencoder):
    """Return a folder of pixels or latents, and config with the frame rate of pixels."""
    folder = vdm.VideoFolder
    size, channels = pixels(config)
    if config.factor and autoencoder is None:
        need(config.task != "upsample", "--task upsample needs pixels, or --latents")
        folder = Latents
        frames = clips * config.frames
        size = config.size
        channels = config.channels
        need(any(file.suffix == ".npy" for file in vdm.find_files(Path(options.data))),
             f"{options.data} has no latents (.npy), which this run needs: for videos name an "
             "autoencoder, too (--latents CKPT, made by notebooks/autoencoder.py)")
    need(options.out.resolve() != Path(options.data).resolve(), f"--out is {options.out}, the "
         "folder of --data, where samples would become data: name another")
    data = folder(options.data, frames, size, config.stride, channels, options.seed,
                  progress=not options.local, cache=True, data_fps=options.data_fps,
                  without=options.out)
    print(data.report)
    options.files = data.checksum
    if folder is vdm.VideoFolder:                                  # latents do not tell theirs
        config = dataclasses.replace(config, fps=options.given.get("fps", data.fps))
    return data, config

def differing(before, after):
    """Return the fields in which two configs differ, as words."""
    return ", ".join(f"{name} {value} instead of {getattr(before, name)}"
                     for name, value in vars(after).items() if value != getattr(before, name))

# ---- flags ---------------------------------------------------------------------------------------

ABOUT = {
    "preset": "what it is             frames x pixels  parameters  time",
    "tiny":   "shapes that bounce         8 x 32 x 32       1.7 M  40 minutes on a core",
    "digits": "moving digits              8 x 32 x 32       1.7 M  38 minutes on a core",
    "latent": "the toy world, latents    16 x 64 x 64       1.6 M  on a CPU, not timed",
    "planes": "the same, PVDM's planes   16 x 32 x 32       2.0 M  on a CPU, not timed",
    "mnist":  "Moving MNIST              20 x 64 x 64      10.8 M  GPU (47 hours on two cores)",
    "ucf101": "VDM                       16 x 64 x 64     1,412 M  GPU",
    "sky":    "PVDM-L                  16 x 256 x 256       528 M  GPU",
    "rds":    "Video LDM                8 x 128 x 256       736 M  GPU",
    "svd":    "SVD, published          14 x 576 x 1024     1,474 M  GPU",
    "vista":  "Vista, published        25 x 576 x 1024     1,537 M  GPU"}

# what --help shows; --help-all shows all
FIRST = ("preset data out resume steps batch frames size channels stride task width lr seed device "
         "init latents sample_every micro dry_run help_all").split()

# What --resume takes from last.pt: what makes a run, and how it goes about it, which may change.
RUN = dict(data="shapes", data_fps=None, encode=2048, seed=0)
HABITS = dict(dtype="auto", marks=64, workers=0, micro=None, checkpoint_activations=False,
              save_every=None, sample_every=None, keep_every=None)

def fewer_given(preset, frames):
    """Return odds of given frames, and overlap, where those of a preset do not fit into as few.

    They shrink in proportion: where of 8 frames 4 are given, so are 2 of 4 frames."""
    if frames < 1 or len(preset.context) <= frames > preset.overlap:
        return {}
    odds = [0.0] * frames
    for n, chance in enumerate(preset.context):
        odds[min(math.ceil(n * frames / preset.frames), frames - 1)] += chance
    overlap = min(math.ceil(preset.overlap * frames / preset.frames), frames - 1)
    return dict(context=tuple(odds), overlap=max(1, overlap))

def add_flags(p, preset, all_help):
    """Add all flags to a parser. The comment beside each field of Config is its help."""
    def add(flag, help, **kind):
        if flag[2:].replace("-", "_") not in FIRST and not all_help:
            help = argparse.SUPPRESS
        if "action" not in kind and "choices" not in kind:
            kind["metavar"] = "X"
        p.add_argument(flag, help=help, **kind)

    add("--preset", default="tiny", choices=vdm.PRESETS, help="defaults for all that follows")
    add("--help-all", action="help", help="list all flags, with the defaults of this preset")
    add("--data", help="toy world (shapes or drive), or a file or folder of videos (shapes)")
    add("--data-fps", type=float, help="choose frames of files to have this rate, whatever theirs")
    add("--out", type=Path, help="folder of the run (default out/PRESET, or out/PRESET-DATA)")
    add("--resume", action="store_true", help="go on from last.pt in the folder of the run")
    add("--latents", type=Path, help="last.pt of an autoencoder, to train on its latents")
    add("--encode", type=int, help="with --latents: clips that are encoded, once (2048)")
    add("--init", type=Path, help="a last.pt to start from, or .safetensors of SVD or Vista")
    add("--seed", type=int, help="fixes weights, data and noise (0)")
    add("--device", default="auto", help="auto, or a name that torch knows: cpu, cuda, mps")
    add("--dtype", choices=["auto", "fp32", "bf16"], help="auto: bf16 where fast")
    add("--save-every", type=int, help="steps between checkpoints (default: a tenth of the run); "
        "they are never more than ten minutes apart")
    add("--sample-every", type=int, help="steps between samples (default: a fifth of the run, "
        "and also after 1, 2, 4 ... minutes)")
    add("--keep-every", type=int, help="keep those of every so many steps: step_000500.pt ...")
    add("--marks", type=int, help="clips generated and marked at the end (64)")
    add("--workers", type=int, help="processes that read clips ahead (0)")
    add("--dry-run", action="store_true", help="print parameters, operations and memory, and stop")
    add("--micro", type=int, help="clips handled at a time (default: all that a process has)")
    add("--checkpoint-activations", action=argparse.BooleanOptionalAction,
        help="less memory for a third more work")
    add("--shard", action="store_true", help="torchrun: divide the model among processes (FSDP2)")
    add("--compile", action="store_true", help="compile the network; needs a C++ compiler")
    comments = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(vdm.Config), re.M))
    for f in dataclasses.fields(vdm.Config):
        kind = dict(type=f.type)
        if f.type is tuple:
            kind = dict(nargs="+", type=type((*f.default, 0)[0]))       # of an empty one, int
        default = " ".join(map(str, np.atleast_1d(getattr(preset, f.name))))
        add("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
            help=f"{comments[f.name]} ({default})", **kind)

def take(options, values):
    """Set those options to these values that no flag has named."""
    for name, value in values.items():
        if getattr(options, name) is None:
            setattr(options, name, value)

def parse(argv):
    """Read flags into (options, Config). options.given are the fields of Config that were named."""
    words = sys.argv[1:] if argv is None else argv
    named = re.search("--preset[ =](\\w+)", " ".join(words))
    look = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30, width=100)
    p = Parser(description=__doc__, formatter_class=look, usage="train.py [--FLAG VALUE ...]",
               allow_abbrev=False, epilog="\n".join(map("{:7} {}".format, ABOUT, ABOUT.values())))
    add_flags(p, vdm.PRESETS.get(named and named[1], vdm.Config()), "--help-all" in words)
    options = p.parse_args(argv)
    options.given = {name: tuple(value) if isinstance(value, list) else value
                     for name, value in vars(options).items()
                     if name in vdm.Config.__dataclass_fields__}
    for name in ("size", "crop"):
        if len(options.given.get(name, "no")) == 1:                                  # square frames
            options.given[name] *= 2
    data = options.data or RUN["data"]
    name = options.preset
    if data != "shapes":
        name += "-" + Path(data).stem
    options.out = options.out or Path("out", name)
    if not options.resume:
        take(options, RUN | HABITS)
    preset = vdm.PRESETS[options.preset]
    usual = {}
    if "frames" in options.given:
        usual = fewer_given(preset, options.given["frames"])
    if data == "drive":
        usual["skip_guidance"] = 1.0                        # with more, clips obey less often
    usual = {name: value for name, value in usual.items() if name not in options.given}
    options.note = differing(preset, dataclasses.replace(preset, **usual))
    return options, dataclasses.replace(preset, **usual | options.given)

# ##################################################################################################
# In a small run what follows has next to nothing to do.
# ##################################################################################################

# ---- latents -------------------------------------------------------------------------------------

class Latents(vdm.VideoFolder):
    """A VideoFolder of latents: .npy files of float (T, c, h, w) or (N, T, c, h, w).

    clip.tokens.npy beside clip.npy may hold CLIP's token of each frame, ([N,] T, 1024), for SVD and
    Vista: an item then has that of its first frame. Zeros stand for a token that is missing."""

    def __init__(self, *arguments, **options):
        self.tokens = []                                              # of each clip, (T, 1024)
        super().__init__(*arguments, **options)
        told = sum(bool(x.any()) for x in self.tokens)
        self.report += f"\n      {told} of {len(self)} clips have tokens of CLIP"

    def read_actions(self, path, clips):
        """As in VideoFolder, which then keeps the clips; their tokens are kept here."""
        moves = super().read_actions(path, clips)
        path = path.with_name(path.name.replace(".actions.npy", ".tokens.npy"))
        shape = (len(clips), len(clips[0]), 1024)
        tokens = np.zeros(shape, np.float32)
        if path.is_file():
            try:
                tokens = np.load(path).astype(np.float32)
            except (OSError, ValueError, EOFError) as e:
                raise ValueError(f"{path}: {e}") from e
            tokens = tokens.reshape(-1, *tokens.shape[-2:])
            need(tokens.shape == shape and np.isfinite(tokens).all(),
                 f"{path}: {tokens.shape}, expected {shape}, a row of finite numbers per frame")
        self.tokens += list(tokens)
        return moves

    def __getitem__(self, i):
        number, cut = self.place(i)
        return super().__getitem__(i) | dict(clip=torch.from_numpy(self.tokens[number][cut.start]))

    def read(self, file):
        try:
            x = np.lib.format.open_memmap(file, mode="r")
        except (OSError, ValueError, EOFError) as e:
            raise ValueError(f"{file} is no .npy file of latents ({e})") from e
        shape = (self.channels, *self.size)
        need(x.dtype.kind == "f" and x.ndim in (4, 5) and x.shape[-3:] == shape,
             f"{file} holds {x.dtype} {x.shape}, expected float latents ([N,] T, "
             f"{', '.join(map(str, shape))}); videos need --latents CKPT")
        std = np.std(x[:64], dtype=np.float64)
        planes = shape[1] == 1 and np.abs(x[:64]).max() <= 1             # a row that tanh bounds
        need(planes or 0.4 < std < 2, f"{file} has standard deviation {std:.3g}, expected about 1: "
             f"multiply it by {1 / max(std, 1e-9):.4g}")
        return list(x.reshape(-1, *x.shape[-4:])), 8.0

    def to_float(self, latents):
        return torch.from_numpy(np.array(latents, np.float32))                        # (T, c, h, w)

def encode(data, options, n, autoencoder, config):
    """Encode items 0 ... n - 1 of a dataset, once: return a folder of .npy files, and actions.

    It is named after a checksum of the autoencoder and some items, by which the next run finds it.
    Frames are cut or blurred in pixels, then encoded, as latents cannot be resized. For an
    up-sampler the frames of a clip as it is given, blurred, come before the clip's own."""
    need(not (data.actions and config.planes), "--data has actions, but planes have no frames that "
         "could be told them: choose another --preset")

    def item(i):
        found = data[i]
        if config.task == "upsample":
            clip = found["video"][None]
            clip = torch.cat([vdm.blurred(clip, config.enlarge), clip], dim=1)[0]
            found = found | dict(video=clip)
        return found

    some = [item(i)["video"] for i in np.linspace(0, n - 1, min(n, 16)).astype(int)]
    tensors = [*autoencoder.state_dict().values(), *some]
    checksum = zlib.crc32(b"".join(x.cpu().numpy().tobytes() for x in tensors), n)
    folder = options.out.parent / f"latents-{checksum:08x}"
    if folder.exists():
        return folder
    items = []
    for i in tqdm(range(n), "encoding", **BAR):
        found = item(i)
        latent = autoencoder.encode(found["video"][None].to(options.device))[0]       # (T, c, h, w)
        items.append(found | dict(video=latent.half().cpu()))
    items = default_collate(items)
    part = folder.with_suffix(".part")                        # gets its name when it is whole
    part.mkdir(parents=True, exist_ok=True)
    np.save(part / "video.npy", items["video"])
    if data.actions:
        times = items["video"].shape[1] // items["action"].shape[1]
        np.save(part / "video.actions.npy", items["action"].repeat(1, times, 1))
    return part.rename(folder)

def find_autoencoder(options, config, state):
    """Return the autoencoder of a run, or None, and config with its channels and factor."""
    path = options.latents
    if "autoencoder" in state:
        path = options.out / "last.pt"
    if path is None:
        return None, config
    autoencoder, made = vdm.load_autoencoder(path)
    need(autoencoder is not None, f"--latents {path} is no autoencoder, and holds none")
    need(bool(made.planes) == bool(config.planes), f"--latents {path} makes latents of "
         f"{'planes' if made.planes else 'frames'}: choose another --preset, as planes is one")
    config = dataclasses.replace(config, channels=made.channels, factor=made.factor,
                                 planes=made.planes)
    return autoencoder.to(options.device), config

# ---- --resume and --init -------------------------------------------------------------------------

MAY_CHANGE = ("steps", "sampler", "sampling_steps", "skip_guidance", "sigma_min", "sigma_max",
              "rho", "overlap", "fps", "lr", "muon_lr")

def resume(options, config):
    """Return the checkpoint to go on from, nearly empty without --resume, and the configuration."""
    path = options.out / "last.pt"
    if not options.resume:
        need(not path.exists() or options.dry_run, f"{options.out} already holds a run: --resume "
             "continues it, another --out starts a new one")
        return dict(step=0, seconds=0.0), config
    state, saved = vdm.read_checkpoint(path)
    was = RUN | HABITS | vars(saved) | state           # an older checkpoint has no habits
    take(options, {name: was[name] for name in RUN | HABITS})
    now = options.given | {name: getattr(options, name) for name in reversed(RUN)}
    may = [*MAY_CHANGE, *HABITS]
    if WORLDS.keys().isdisjoint([options.data, was["data"]]):      # a folder may have been moved
        may.append("data")
        need(Path(options.data).exists(), f"{options.data}, the data of this run, is no longer "
             "there: name its new place (--data)")
    changed = [name for name in now if now[name] != was[name] and name not in may]
    need(not changed, f"--resume goes on with a run's own settings, but {', '.join(changed)} is "
         f"another in {path}: leave the flag out, or name another --out. These may change: "
         f"{', '.join(may)}")
    config = dataclasses.replace(saved, **options.given)
    options.given["fps"] = config.fps                              # not again that of the files
    options.note = ""
    need(state["step"] <= config.steps, f"{path} has done {state['step']} steps: raise --steps")
    if state["step"] == config.steps and not options.dry_run:
        print(f"note    all {config.steps} steps are done, samples follow: more --steps go on")
    return state, config

def trim(log, step):
    """Forget what was logged after the checkpoint, and a row that a kill cut short."""
    if log.exists():
        rows = [row for row in log.read_bytes().splitlines(True) if row.endswith(b"\n")]
        kept = rows[:1] + [row for row in rows[1:] if int(row.split(b",")[0]) <= step]
        os.truncate(log, sum(map(len, kept)))

ADDED = ("labels", "actions", "adapters")
MODEL = ("channels", "width", "mults", "blocks", "attention", "head_dim", "patch", "kind",
         "sigma_data", "give", "planes", *ADDED)

def start_from(path, config):
    """Build a model with the averaged weights of a checkpoint (--init).

    Adapters, and what embeds labels and actions, may be new. All else must be the same."""
    with torch.random.fork_rng([]):                   # which leaves the seed to what is new
        old, saved = vdm.load(path)
    weights = old.state_dict()
    if saved.give == "svd" and config.give == "vista":
        saved = dataclasses.replace(saved, give="vista")
        weights |= {name.replace("net.embed.", "net.embed_given."): w
                    for name, w in weights.items() if name.startswith("net.embed.")}
    wrong = [name for name in MODEL if getattr(saved, name) != getattr(config, name)
             and (getattr(saved, name) or name not in ADDED)]
    if saved.adapters and saved.rank != config.rank:
        wrong.append("rank")
    need(not wrong, f"--init {path} is another model, of another {', '.join(wrong)}: give the "
         "flags that it was trained with")
    net = vdm.build(dataclasses.replace(config, adapters=saved.adapters))
    net.load_state_dict(weights, strict=False)
    if config.adapters != saved.adapters:
        vdm.adapt(net.net, config.adapters, config.rank)
    return net

# ---- many processes, short memory ----------------------------------------------------------------

def join(options, config):
    """Become one of torchrun's processes, if there are any, and take a share of every batch.

    options gets rank, local (the rank on this machine) and parts: rows of the batch, as slices."""
    options.rank = int(os.environ.get("RANK", 0))
    options.local = int(os.environ.get("LOCAL_RANK", 0))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    need(not options.shard or (processes > 1 and config.optimizer == "adamw"), "--shard needs "
         "torchrun --nproc_per_node N train.py ..., N above 1, and --optimizer adamw, as muon would"
         " have to put all matrices together")
    mine = config.batch // processes
    micro = options.micro or max(1, mine)
    need(config.batch % (processes * micro) == 0, f"--batch is {config.batch}, expected a multiple "
         f"of {processes * micro}: {processes} processes, --micro {micro} clips at a time")
    rows = range(options.rank * mine, (options.rank + 1) * mine, micro)
    options.parts = [slice(i, i + micro) for i in rows]
    if processes > 1:
        backend = "gloo"
        if options.device.type == "cuda":
            backend = "nccl"
            options.device = torch.device("cuda", options.local)
            torch.cuda.set_device(options.device)
        # The others wait while the first decodes the data, which may take hours.
        dist.init_process_group(backend, timeout=timedelta(hours=12))
        if options.rank:                                                     # only the first speaks
            sys.stdout = open(os.devnull, "w")

def gather(x):
    """Join x (n, ...) of all processes, one after another: (processes n, ...)."""
    if not dist.is_initialized():
        return x
    everyone = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(everyone, x.contiguous())
    return everyone

def blocks(model):
    return [module for module in model.modules() if isinstance(module, (vdm.Block, vdm.Stage))]

def spread(net, ema, options):
    """Prepare a network for short memory and for many processes.

    With --checkpoint-activations what is inside a block is not kept, but computed again on the way
    back. With DDP each process holds all of the model. With FSDP2 (--shard) each holds a part of
    all weights, gradients, moments and averages, and borrows the rest of a block when needed."""
    if options.checkpoint_activations:
        for block in blocks(net):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if options.shard:
        mesh = dist.init_device_mesh(options.device.type, (dist.get_world_size(),))
        for model in (net, ema.model):
            for layer in [*blocks(model), model]:
                fully_shard(layer, mesh=mesh)
    elif dist.is_initialized():
        return torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    return net

# ---- --dry-run: what a run would need ------------------------------------------------------------

def estimate(model, config):
    """Let a model estimate a clip. Return the operations, and the bytes that its backward pass
    needs, all and with --checkpoint-activations: inputs of blocks, and the largest block."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}                                                                     # by storage
    marks = []

    def keep(x):
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return x

    def mark(block, args, output=None):
        marks.append((sum(kept.values()), args[0].nbytes))

    for block in blocks(model):
        block.register_forward_pre_hook(mark)
        block.register_forward_hook(mark)
    clip = torch.zeros(1, config.frames, config.channels, *(config.crop or config.size))
    given = {}
    if config.give == "previous":
        given = dict(previous=clip)
    elif config.give != "svd":
        given = dict(context=clip, mask=torch.zeros(clip.shape[:2]))
    if config.give in PUBLISHED:
        given |= vdm.picture_conditions(clip[:, :1], config.fps)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu   # it is not counted yet
    mapping = {attention: lambda q, k, v, *rest, **options: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, hooks:
        held = model(clip, torch.ones(1), **given)             # it holds all that backward needs
    marks = np.array(marks)                                                       # (2 blocks, 2)
    inside = marks[1::2, 0] - marks[::2, 0]
    total = sum(kept.values())
    short = total - inside.sum() + inside.max() + marks[::2, 1].sum()
    return counter.get_total_flops(), total, short

def dry_run(config):
    """Print parameters by part, operations, and memory in float32, of which bf16 takes less."""
    with torch.device("meta"):
        model = vdm.build(config)
    fake = FakeTensorMode()                # its tensors are on the CPU, but have no numbers either
    for module in model.modules():
        for name, p in [*module.named_parameters(recurse=False)]:
            with fake:
                setattr(module, name, torch.nn.Parameter(torch.zeros(p.shape)))
    if config.train != ("all",):
        vdm.trainable(model, config.train)
    part = vdm.part_of(model)
    for name in dict.fromkeys(part.values()):
        n = sum(p.numel() for p in part if part[p] == name)
        print(f"parameters {n / 1e6:12,.2f} M {name}")
    print(f"parameters {sum(p.numel() for p in part) / 1e6:12,.2f} M in all")
    with fake:
        once, total, short = estimate(model, config)
    step = 3 * once * config.batch                                # backward is worth two forward
    print(f"operations {once / 1e9:12,.2f} G to estimate a clip once\n"
          f"operations {step / 1e9:12,.2f} G in a step of {config.batch} clips")
    moments = 0
    for optimizer in make_optimizers(config, model):
        of_each = 1 if isinstance(optimizer, Muon) else 2
        moments += sum(of_each * p.nbytes for g in optimizer.param_groups for p in g["params"])
    weights = sum(p.nbytes for p in part)
    trained = sum(p.nbytes for p in part if p.requires_grad)
    memory = {"weights": weights, "EMA": weights, "gradients": trained, "optimiser": moments,
              "activations of a clip": total, "with --checkpoint-activations": short}
    for name, size in memory.items():
        print(f"memory     {size / 2 ** 20:12,.2f} MiB {name}")
    most = 2 * weights + trained + moments + config.batch * total
    print(f"memory     {most / 2 ** 20:12,.2f} MiB in all, for a batch at once")

if __name__ == "__main__":
    vdm.run_program(main, "handle fewer clips at a time (--micro 1) or in a step (a smaller "
                    "--batch); --dry-run prints what a run needs")
    if dist.is_initialized():
        dist.destroy_process_group()
