"""
Mark the clips and the long videos of a model that was trained on a toy world:

    python notebooks/benchmark.py --run out/tiny                 192 clips, 192 videos of 32 frames
    python notebooks/benchmark.py --run out/tiny --skip-guidance 1       the same, drawn otherwise
    python notebooks/benchmark.py --run out/tiny --given 4       they start as real clips do
    python notebooks/benchmark.py --run out/any --interpolate 2 2        frames between frames
    python notebooks/benchmark.py --run out/per_frame --lag 3            frame by frame
    python notebooks/benchmark.py --run out/tiny-drive           does it obey commands?
    python notebooks/benchmark.py --costs out/tiny out/latent out/planes
                                                     pixels, latents of frames, latents on planes

The tables are markdown. A law is the share of videos that keep it in all frames. "off" is how far
colours, kinds and speeds are from the world's own, which are uniform (total variation distance: 0
same, 1 disjoint). Real clips stay below the number in brackets 19 times in 20. Chance moves a share
of 192 videos by about 2 points.
"""

import argparse
import copy
import dataclasses
import math
import multiprocessing
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
import vdm

LAWS = ("passed", "shape", "color", "size", "path", "speed", "moving")
FOUND = ("colors", "kinds", "speeds")

def batches(n, size=16):
    """Ranges of clip numbers that together are 0 ... n - 1."""
    return [range(start, min(start + size, n)) for start in range(0, n, size)]

class Model:
    """The model in a checkpoint, which draws videos. `changes` are fields of its config.

    With a lag above 0 each frame lags so many noise levels behind the one before (vdm.stream)."""

    def __init__(self, path, device="auto", dtype="auto", lag=0, **changes):
        denoiser, config = vdm.load(path)
        self.lag = lag
        self.config = dataclasses.replace(config, **changes)
        self.device = train.pick_device(device)
        self.dtype = train.pick_dtype(dtype, self.device)
        self.denoiser = denoiser.to(self.device)
        self.autoencoder, _ = vdm.load_autoencoder(path)
        if self.autoencoder is not None:
            self.autoencoder.to(self.device)
        self.size = train.pixels(config)[0]
        self.denoise = vdm.skip_guided_by(self.config, self.denoiser)
        sigmas, self.sampler = train.sampling(self.config)
        self.sigmas = sigmas.to(self.device)

    def given(self, context, mask, start):
        """What the denoiser is told of given frames, in the way that it was trained for."""
        if self.config.give != "hint" or not mask.any():
            return vdm.given_frames(context, mask, start)
        level = mask.new_zeros(len(mask))                            # hints may be exact, too
        noise = torch.zeros_like(context)
        if self.config.task == "image":
            return vdm.image_hint(context[:, :1], torch.ones_like(mask), level, noise[:, :1])
        return vdm.hint(context, mask, level, noise)

    def draw(self, n, length, seed, context=None):
        """n videos (n, length, C, H, W); each may start with its context (n, t, C, H, W)."""
        config = self.config
        videos = []
        for clips in batches(n):
            shape = (len(clips), config.frames, config.channels, *config.size)
            first = None
            if context is not None:
                first = context[clips.start:clips.stop].to(self.device)
                if self.autoencoder is not None:
                    first = self.autoencoder.encode(first)
            pieces = -(-length * config.frames // vdm.clip_frames(config))
            options = dict(seed=seed, clips=clips, sampler=self.sampler)
            if config.give == "previous":
                roll = partial(vdm.rollout_previous, previous=first, **options)
            elif self.lag:
                roll = partial(vdm.stream, lag=self.lag, context=first, **options)
            else:
                roll = partial(vdm.rollout, overlap=config.overlap, context=first,
                               tell=self.given, **options)
            with train.autocast(self.device, self.dtype):
                video = roll(self.denoise, pieces, shape, self.sigmas)
                if self.autoencoder is not None:
                    video = self.autoencoder.stream(video)
                video = torch.cat(list(video), dim=1)
            videos.append(video[:, :length].float().cpu())
        return torch.cat(videos)

    def interpolate(self, key_frames, passes, seed):
        """Put frames between key_frames (n, K, C, H, W), in passes such as (2, 2)."""
        videos = []
        for clips in batches(len(key_frames)):
            video = key_frames[clips.start:clips.stop].to(self.device)
            for i, factor in enumerate(passes):
                with train.autocast(self.device, self.dtype):
                    video = vdm.interpolate(self.denoise, video, factor, self.config.frames,
                                            self.sigmas, seed + i, clips, sampler=self.sampler)
            videos.append(video.float().cpu())
        return torch.cat(videos)

def from_uniform(counts):
    """The total variation distance of counts (..., bins) from the uniform distribution."""
    share = counts / counts.sum(-1, keepdims=True)
    return np.abs(share - 1 / counts.shape[-1]).sum(-1) / 2

def mark(world, videos):
    """The marks of videos by MovingShapes: shares, and of FOUND (distance, limit of real clips)."""
    found = world.check(videos)
    speeds = np.array([-np.inf, *np.linspace(*world.SPEED, 7)[1:-1], np.inf])
    edges = dict(colors=np.arange(len(world.palette) + 1), kinds=np.arange(4), speeds=speeds)
    marks = {law: found[law].mean() for law in LAWS}
    for name in FOUND:
        counts = np.histogram(found[name], edges[name])[0]
        even = [1 / len(counts)] * len(counts)
        chance = np.random.default_rng(0).multinomial(counts.sum(), even, 1000)
        marks[name] = (from_uniform(counts), np.quantile(from_uniform(chance), 0.95))
    if "copies" in found:
        marks["copies"] = np.sum(found["copies"])
    return marks

def header(marks):
    """The names of marks as cells of markdown."""
    return " | ".join(f"{name} off" if name in FOUND else name for name in marks)

def cells(marks):
    """Marks as cells of markdown."""
    words = {name: f"{value:.0%}" for name, value in marks.items() if name in LAWS}
    words |= {name: f"{marks[name][0]:.2f} ({marks[name][1]:.2f})" for name in FOUND}
    return " | ".join(words.get(name, str(value)) for name, value in marks.items())

def mark_model(model, n, lengths, seeds, given=0):
    """Yield (length, name, marks) of videos by every seed of noise, then of real clips.

    With given > 0 the videos start with so many frames of the real clips."""
    for length in lengths:
        world = vdm.MovingShapes(length, model.size, seed=987_654_321)
        real = torch.stack([world[i]["video"] for i in range(n)])               # (n, T, 3, H, W)
        context = real[:, :given] if given else None
        for seed in seeds:
            yield length, f"seed {seed}", mark(world, model.draw(n, length, seed, context))
        yield length, "real", mark(world, real)

def drive(model, n, seed):
    """Print how often a car obeys: told its commands, told nothing, and told those of others."""
    world = vdm.Drive(model.config.frames, model.size, seed=987_654_321)
    action = torch.stack([world[i]["action"] for i in range(n)])                         # (n, T, A)
    ways = {"their commands": dict(action=action), "nothing": {},
            "others' commands": dict(action=action.roll(1, 0))}
    for name, told in ways.items():
        clips = train.sample(model.config, model.denoiser, n, model.device, model.dtype, seed,
                             model.autoencoder, **told)
        found = world.check(clips, **told)
        shares = [f"{(found['commands'] == k).mean():.0%}" for k in range(4)]
        print(f"told {name}: {found['obeys'].mean():.0%} of frames obey, all of them in "
              f"{found['passed'].mean():.0%} of clips; left, straight, right, stop: "
              f"{', '.join(shares)}")

def centre(video):
    """Where the light of each frame of (N, T, 3, H, W) is: (N, T, 2) in pixels."""
    light = ((video.amax(2) + 1) / 2 - 0.1).clamp(0, 0.8)                             # (N, T, H, W)
    total = light.sum((2, 3)).clamp(min=1e-3)                                               # (N, T)
    y = (light.sum(3) * torch.arange(light.shape[2])).sum(-1) / total
    x = (light.sum(2) * torch.arange(light.shape[3])).sum(-1) / total
    return torch.stack([y, x], dim=-1)

def interpolation(model, n, passes, seed):
    """Print how many of the frames put between real ones have the shape within a pixel."""
    factor = int(np.prod(passes))
    world = vdm.MovingShapes(12 // factor * factor + 1, model.size, seed=987_654_321)
    real = torch.stack([world[i]["video"] for i in range(n)])                   # (n, T, 3, H, W)
    made = model.interpolate(real[:, ::factor], passes, seed)
    new = torch.arange(real.shape[1]) % factor > 0
    near = ((centre(made) - centre(real)).norm(dim=2) < 1)[:, new]
    print(f"interpolation {' x '.join(map(str, passes))}: within a pixel {near.float().mean():.0%} "
          f"of new frames, all of them in {near.all(1).float().mean():.0%} of clips")

def memory(name):
    """VmHWM, the most memory that this process has held since clear_refs, or VmRSS, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

def draw_once(path, length, changes):
    """Seconds of one core, and MiB beyond those of the model, for a video (Linux alone)."""
    torch.set_num_threads(1)
    model = Model(path, "cpu", "fp32", **changes)
    Path("/proc/self/clear_refs").write_text("5")
    held = memory("VmRSS")
    start = time.process_time()
    model.draw(1, length, 0)
    return time.process_time() - start, memory("VmHWM") - held

def reconstruction(model, n):
    """PSNR of n clips that an autoencoder has not seen, encoded and decoded, in dB."""
    world = vdm.MovingShapes(vdm.clip_frames(model.config), model.size, seed=987_654_321)
    clips = torch.stack([world[i]["video"] for i in range(n)])
    with torch.no_grad():
        latents = [model.autoencoder.encode(clip[None]) for clip in clips]
        made = torch.cat([model.autoencoder.decode(latent) for latent in latents])
    return 10 * math.log10(4 / (made - clips).square().mean().item())

def costs(paths, n, changes):
    """Print what a clip costs each model: PVDM's tables 4 and 5, at the scale of a toy."""
    print("| model | numbers in a clip | PSNR | parameters | GFLOP | clips in 2 GiB | s, MiB for a "
          f"clip | s, MiB for 8 | passed |\n{'|---' * 9}|")
    for path in paths:
        model = Model(path, "cpu", "fp32", **changes)
        config = model.config
        net = copy.deepcopy(model.denoiser).requires_grad_(True)
        weights = sum(p.nbytes for p in net.parameters())
        work, kept, _ = train.estimate(net, config)
        batch = (2 ** 31 - 5 * weights) / kept        # weights, average, gradient and two moments
        frames = vdm.clip_frames(config)
        drawn = []
        for length in (frames, 8 * frames):
            with multiprocessing.get_context("spawn").Pool(1) as pool:        # a fresh process
                drawn.append("%.1f, %.0f" % pool.apply(draw_once, (path, length, changes)))
        psnr = f"{reconstruction(model, n):.1f}" if model.autoencoder else ""
        world = vdm.MovingShapes(frames, model.size, seed=987_654_321)
        passed = world.check(model.draw(n, frames, 1))["passed"].mean()
        numbers = math.prod((config.frames, config.channels, *config.size))
        print(f"| {path.parent.name} | {numbers:,} | {psnr} | {weights / 4e6:.2f} M "
              f"| {work / 1e9:.2f} | {batch:.0f} | {' | '.join(drawn)} | {passed:.0%} |",
              flush=True)

FIELDS = dict(skip_guidance=float, sampler=str, sampling_steps=int, sigma_min=float, overlap=int)

def parse_changes(p, argv):
    """Add a flag for each of FIELDS to a parser -> its options, and the fields that are given."""
    for name, kind in FIELDS.items():
        flag = "--" + name.replace("_", "-")
        flags = ["--steps", flag] if name == "sampling_steps" else [flag]
        p.add_argument(*flags, dest=name, type=kind, help="instead of what the run's config has")
    o = p.parse_args(argv)
    return o, {name: vars(o)[name] for name in FIELDS if vars(o)[name] is not None}

def main(argv=None):
    p = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, help="the folder of a run, or a checkpoint")
    p.add_argument("--costs", type=Path, nargs="+", help="runs whose costs to compare")
    p.add_argument("--n", type=int, default=192, help="videos of each kind (192)")
    p.add_argument("--lengths", type=int, nargs="+",
                   help="their frames (those of a window, and four times as many)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the noise (0 1)")
    p.add_argument("--given", type=int, default=0, help="real frames that each video starts with")
    p.add_argument("--lag", type=int, default=0, help="frame by frame, as sample.py --lag")
    p.add_argument("--interpolate", type=int, nargs="+", help="factor of each pass, such as 2 2")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"])
    o, changes = parse_changes(p, argv)
    if (o.run is None) == (o.costs is None):
        raise ValueError("name either --run or --costs")
    if o.costs:
        return costs([folder / "last.pt" for folder in o.costs], o.n, changes)
    path = o.run if o.run.is_file() else o.run / "last.pt"
    model = Model(path, o.device, o.dtype, o.lag, **changes)
    config = model.config
    print(f"{path}, {o.n} videos in each row; {config.sampler}, {config.sampling_steps} noise "
          f"levels from {config.sigma_max:g} to {config.sigma_min:g}, skip guidance "
          f"{config.skip_guidance:g}, overlap {config.overlap}\n")
    if config.actions:
        return drive(model, o.n, o.seeds[0])
    if o.interpolate:
        return interpolation(model, o.n, o.interpolate, o.seeds[0])
    lengths = o.lengths or [vdm.clip_frames(config), 4 * vdm.clip_frames(config)]
    for i, row in enumerate(mark_model(model, o.n, lengths, o.seeds, o.given)):
        length, name, marks = row
        if i == 0:
            print(f"| frames | noise | {header(marks)} |\n{'|---' * (2 + len(marks))}|")
        print(f"| {length} | {name} | {cells(marks)} |", flush=True)

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
