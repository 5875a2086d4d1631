"""
Compare with video-diffusion-pytorch in one run on one machine, at equal parameter counts:

    pip install --no-deps video-diffusion-pytorch einops-exts rotary-embedding-torch
    python .ci/benchmark.py                      a training step, and drawing a batch of clips
    python .ci/benchmark.py --run out/tiny       the marks of a run: 64 clips, and roll-outs of 4 times the length; with
                                                 --task any interpolation, too; of --data drive, how well it obeys
    python .ci/benchmark.py --long out/tiny      roll-outs of 4 and 16 times the length: marks, light, memory of sample.py
    python .ci/benchmark.py --best out/tiny      the error of its estimates against the least that any can have
    python .ci/benchmark.py --memory             peak memory of training against what --dry-run --device cpu predicts
    python .ci/benchmark.py --efficiency         pixels against latents, clips of 16x64x64: the largest training batch in
                                                 2 GiB, and the cost of 16 and of 128 frames (PVDM's table)
    python .ci/benchmark.py --index 100000       time and memory to decode and to index so many clips, each a file

Each training step runs in a process of its own, so that its peak memory can be told apart.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

import train
import vdm

BATCH, FRAMES, SIZE = 8, 8, 32


def peak(status=None):
    """Peak memory of a process in MiB, by its /proc/self/status. (ru_maxrss of a child is at least its parent's size.)"""
    return int(re.search(r"VmHWM:\s+(\d+)", status or Path("/proc/self/status").read_text())[1]) / 1024


def ours():
    """A UNet of 3.16 M parameters (theirs has as many) at the settings of the preset tiny; one whole step of train.py."""
    _, config = train.parse(["--batch", str(BATCH), "--width", "24", "--head-dim", "24"])
    dtype = train.pick_dtype("auto", torch.device("cpu"))
    denoiser, world = vdm.build(config), vdm.MovingShapes()
    state = denoiser, vdm.EMA(denoiser), train.make_optimizers(config, denoiser.net)
    parameters = sum(p.numel() for p in denoiser.parameters())
    step = lambda i: train.train_step(i, config, world, *state, torch.device("cpu"), dtype, 0)
    draw = lambda: train.sample(config, state[1].model, BATCH, torch.device("cpu"), dtype)
    evaluations = train.evaluations(config)
    return parameters, step, draw, evaluations, evaluations


def theirs():
    """Its Unet3D of dim 32, mults 1, 2, 4 with its own loss and Adam, as in its README."""
    torchvision = types.ModuleType("torchvision")                # it only wants transforms, for files
    torchvision.transforms = types.ModuleType("torchvision.transforms")
    torchvision.utils = types.ModuleType("torchvision.utils")
    torchvision.transforms.ToTensor = lambda: None
    sys.modules.update({m.__name__: m for m in (torchvision, torchvision.transforms, torchvision.utils)})
    from video_diffusion_pytorch import GaussianDiffusion, Unet3D
    net = Unet3D(dim=32, dim_mults=(1, 2, 4))
    diffusion = GaussianDiffusion(net, image_size=SIZE, num_frames=FRAMES, timesteps=1000)
    optimizer = torch.optim.Adam(net.parameters(), 1e-4)
    clips = torch.rand(BATCH, 3, FRAMES, SIZE, SIZE)

    def step(i):
        diffusion(clips).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def draw():                                                  # 10 of its 1000 evaluations, all alike
        x = torch.randn(BATCH, 3, FRAMES, SIZE, SIZE)
        for t in reversed(range(10)):
            x = diffusion.p_sample(x, torch.full((BATCH,), t))

    return sum(p.numel() for p in net.parameters()), step, draw, 10, 1000


def measure(name):
    torch.manual_seed(0)
    parameters, step, draw, evaluations, needed = dict(ours=ours, theirs=theirs)[name]()
    times = []
    for i in range(6):
        began = time.perf_counter()
        step(i)
        times.append(time.perf_counter() - began)
    memory = peak() / 2 ** 10
    began = time.perf_counter()
    draw()
    seconds = (time.perf_counter() - began) * needed / evaluations
    return dict(parameters=parameters, step=sorted(times[1:])[2], memory=memory, draw=seconds, evaluations=needed)


def compare():
    rows = {}
    for name in ("theirs", "ours"):
        run = subprocess.run([sys.executable, __file__, "--measure", name], capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"skipped: {name} does not run here ({run.stderr.strip().splitlines()[-1]})")
        rows[name] = json.loads(run.stdout.splitlines()[-1])
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {BATCH} clips of {FRAMES}x3x{SIZE}x{SIZE}")
    for key, unit in dict(parameters="", step="s per training step", memory="GiB peak of the process",
                          draw="s to draw the batch", evaluations="evaluations").items():
        a, b = rows["theirs"][key], rows["ours"][key]
        print(f"{key:>12}  video-diffusion-pytorch {a:12.6g}   vdm.py {b:12.6g}   {a / b:8.1f} times  {unit}")


NETWORKS = dict(tiny=[], wide=["--width", "64", "--head-dim", "32"],
                svd_narrow="--preset svd --width 64 --size 16 --frames 8 --batch 2".split(),
                ucf101_narrow="--preset ucf101 --width 64 --size 32 --batch 2".split())


def steps(name):
    """Bytes that real training steps add to the process, at their peak, and the bytes predicted. A step of a small network
    of the same kind goes first, so that the code of all operations is loaded, and counts for nothing."""
    _, config = train.parse(NETWORKS[name])
    cell = config.patch * 2 ** (len(config.mults) - 1)
    small = dataclasses.replace(config, width=16, head_dim=16, size=(cell, cell), batch=1)
    need = train.rehearse(config, config.batch, torch.float32, gpu=False)
    for c in (small, config):
        before = peak()
        clip = dict(video=torch.zeros(c.frames, c.channels, *c.size))
        denoiser = vdm.build(c)
        state = denoiser, vdm.EMA(denoiser), train.make_optimizers(c, denoiser.net)
        for i in range(2):                                       # the first looks at 256 clips, how far things move
            train.train_step(i, c, [clip] * max(256, 2 * c.batch), *state, torch.device("cpu"), torch.float32, 0)
    measured = 2 ** 20 * (peak() - before)
    kinds = {key: need[key] for key in ("weights", "gradients", "optimiser", "EMA", "activations")}
    return dict(measured=measured, predicted=sum(kinds.values()), **kinds)


def memory():
    """With a C allocator that gives back at once what is freed. The usual one keeps gaps: of tiny's peak a third."""
    for name, flags in NETWORKS.items():
        run = subprocess.run([sys.executable, __file__, "--measure", name], capture_output=True, text=True,
                             env=os.environ | dict(MALLOC_MMAP_THRESHOLD_="131072"))
        if run.returncode:
            sys.exit(run.stderr)
        row = json.loads(run.stdout.splitlines()[-1])
        print(f"{name:>15}  measured {row['measured'] / 2 ** 20:6.0f} MiB  predicted {row['predicted'] / 2 ** 20:6.0f}  "
              f"{row['predicted'] / row['measured'] - 1:+.0%}   " +
              ", ".join(f"{key} {row[key] / 2 ** 20:.0f}" for key in list(row)[2:]) + f"   ({' '.join(flags) or '--preset tiny'})")


SETTINGS = dict(pixels="--preset latent --factor 0 --channels 3 --size 64 --patch 4 --detail 8", latents="--preset latent")


def cost(kind, frames, batch):
    """Of a training step of `batch` clips or, with batch 0, of one video of `frames` frames, by a fresh network, which costs as
    much as a trained one: GiB beyond what the process had before, and seconds of one core."""
    _, config = train.parse(SETTINGS[kind].split())
    torch.set_num_threads(1)
    device, dtype = torch.device("cpu"), train.pick_dtype("auto", torch.device("cpu"))
    denoiser, autoencoder = vdm.build(config), vdm.build_autoencoder(config) if config.factor else None
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2 ** 30
    if batch:
        clip, config = torch.randn(config.frames, config.channels, *config.size), dataclasses.replace(config, batch=batch)
        state = denoiser, vdm.EMA(denoiser), train.make_optimizers(config, denoiser.net)
        for step in range(2):                                    # the second has the optimisers' state
            began = time.process_time()
            train.train_step(step, config, [dict(video=clip)] * max(256, 2 * batch), *state, device, dtype, 0)
    else:
        began, shape = time.process_time(), (1, config.frames, config.channels, *config.size)
        sigmas = vdm.karras_sigmas(config.sampling_steps, config.sigma_min, config.sigma_max, config.rho)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.no_grad():
            stream = vdm.rollout(denoiser, frames, shape, sigmas, **train.rolling(config))
            video = torch.cat(list(stream), 1)
        with torch.no_grad():
            video = autoencoder.decode(video) if autoencoder else video
        assert video.shape == (1, frames, 3, 64, 64)
    seconds = time.process_time() - began
    return dict(memory=peak() / 2 ** 10 - before, seconds=seconds)


def operations(kind):
    """Multiplications and additions of one clip of 16 frames: of all its network evaluations, and of the decoder."""
    from torch.utils.flop_counter import FlopCounterMode
    _, config = train.parse(SETTINGS[kind].split())
    x = torch.zeros(1, config.frames, config.channels, *config.size)
    evaluations = train.evaluations(config)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vdm.build(config)(x, torch.ones(1))
    network, decoder = counter.get_total_flops(), 0
    if config.factor:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            vdm.build_autoencoder(config).decode(x)
        decoder = counter.get_total_flops()
    return evaluations, network, decoder


def efficiency(memory):
    def measured(kind, frames=16, batch=0):
        run = subprocess.run([sys.executable, __file__, "--cost", kind, str(frames), str(batch)], capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        return json.loads(run.stdout.splitlines()[-1])

    print(f"torch {torch.__version__}, one core, {train.pick_dtype('auto', torch.device('cpu'))}; memory is what the process takes "
          f"beyond its libraries and weights\n{'':40}{'pixels':>12}{'latents':>12}")
    rows = {}
    for kind in SETTINGS:
        low, high = (measured(kind, batch=b)["memory"] for b in (2, 6))
        batch = max(1, int(2 + (memory - low) / (high - low) * 4))          # memory grows in a straight line, but for the
        step = measured(kind, batch=batch)                                  # allocator's moods: so look, and go down
        while step["memory"] > memory and batch > 1:
            batch = min(batch - 1, int(batch * 0.97))
            step = measured(kind, batch=batch)
        evaluations, network, decoder = operations(kind)
        short, long = measured(kind, 16), measured(kind, 128)
        network_only = vdm.build(train.parse(SETTINGS[kind].split())[1])
        rows[kind] = {"parameters of the network": sum(p.numel() for p in network_only.parameters()),
                      f"largest training batch in {memory:g} GiB": batch,
                      "seconds per clip and training step": step["seconds"] / batch,
                      "16 frames: seconds": short["seconds"], "16 frames: GiB": short["memory"],
                      "128 frames: seconds": long["seconds"], "128 frames: GiB": long["memory"],
                      "16 frames: 10^9 operations": (evaluations * network + decoder) / 1e9,
                      "  of which the decoder": decoder / 1e9}
    for name, pixels in rows["pixels"].items():
        print(f"{name:40}{pixels:12.7g}{rows['latents'][name]:12.7g}")


def index(n):
    """Files of n clips, decoded into a cache and then, as by the next run, read from it; and how fast items come."""
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2 ** 20

    with tempfile.TemporaryDirectory() as folder:
        for i in range(n):
            part = Path(folder) / f"{i // 1000:04d}"
            part.mkdir(exist_ok=True)
            np.save(part / f"{i:07d}.npy", np.full((8, 16, 16, 3), i % 256, np.uint8))
        for run in ("decoded", "from the cache"):
            before, began = resident(), time.perf_counter()
            data = vdm.VideoFolder(folder, 8, (16, 16), read=train.Cache(Path(folder)).decode)
            took, grown, began = time.perf_counter() - began, resident() - before, time.perf_counter()
            seen = {round(127.5 * (data[i]["video"].mean().item() + 1)) for i in range(10_000)}     # 256 shades of grey
            print(f"{len(data)} clips {run}: {took:.0f} s, {grown:.0f} MiB more ({2 ** 20 * grown / n:.0f} bytes a clip), "
                  f"{(time.perf_counter() - began) / 10:.2f} ms an item, {len(seen)} of {min(n, 256)} shades seen; "
                  f"peak of the process {peak():.0f} MiB", flush=True)
            del data


def marks(folder):
    """The claims of the README for one run, from fresh noise, with averaged weights."""
    denoiser, config = vdm.load(Path(folder) / "last.pt")
    autoencoder, _ = vdm.load_autoencoder(Path(folder) / "last.pt")
    device, world = torch.device("cpu"), vdm.MovingShapes(config.frames, train.pixels(config)[0], seed=55)
    dtype = train.pick_dtype("auto", device)
    if config.actions:
        return drive(denoiser, config, device, dtype)
    print(train.report(world, train.sample(config, denoiser, 64, device, dtype, 2, autoencoder)))
    if autoencoder:
        print("real clips, made latents and back")
        print(train.report(world, train.reconstruct(autoencoder, torch.stack([world[i]["video"] for i in range(64)]), device)))
    if not autoencoder and (config.task == "image" or config.task == "predict" and sum(config.context[1:2])):
        animation(denoiser, config, dtype)
    if config.task == "image":
        return                                                   # it goes on from pictures alone
    for seed in (3, 1):
        video = rolled(denoiser, config, 64, 4 * config.frames, autoencoder, seed)
        print(f"roll-outs, noise of seed {seed}", train.report(world, video), sep="\n", flush=True)
    if config.task == "any" and not autoencoder:
        sigmas = vdm.karras_sigmas(config.sampling_steps, config.sigma_min, config.sigma_max, config.rho)
        interpolation(denoiser, config, sigmas, dtype)


def animation(denoiser, config, dtype, n=64):
    """Pictures come to life, the first frames of n real clips: do they stay, bit for bit, and is what they show what moves?"""
    world = vdm.MovingShapes(config.frames, config.size, seed=56)
    real, made = torch.stack([world[i]["video"] for i in range(n)]), []
    mask = torch.ones(n, config.frames) if config.task == "image" else (torch.arange(config.frames) < 1).float().expand(n, -1)
    sigmas = vdm.karras_sigmas(config.sampling_steps, config.sigma_min, config.sigma_max, config.rho)
    for i in range(0, n, 16):
        clips, noise = real[i : i + 16], vdm.clip_noise(2, range(i, min(i + 16, n)))
        level = torch.full((len(clips),), config.context_noise / 2)
        context, given = vdm.draw_context(clips, mask[i : i + 16], config.task, level, noise(*clips.shape[1:]))
        told = dict(motion=torch.special.ndtr(noise())) if config.motion else {}
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            made.append(vdm.generate(denoiser, clips.shape, sigmas, noise=noise, context=context, mask=given,
                                     **train.sampling(config), **told).float())
    made = torch.cat(made)
    marks, true = world.check(made), world.check(real)
    same = (marks["kinds"] == true["kinds"]) & (marks["colors"] == true["colors"])
    print(f"{n} pictures come to life: first frame the same, bit for bit, in {(made[:, 0] == real[:, 0]).flatten(1).all(1).float().mean():.0%};"
          f" shape and colour are the picture's in {same.mean():.0%}, and keep all laws of motion too in {(same & marks['passed']).mean():.0%}"
          f" of clips (real {true['passed'].mean():.0%})", flush=True)


def rolled(denoiser, config, n, length, autoencoder=None, seed=3):
    """n videos (n, length, C, H, W) drawn window by window, 16 at a time."""
    sigmas, videos = vdm.karras_sigmas(config.sampling_steps, config.sigma_min, config.sigma_max, config.rho), []
    dtype = train.pick_dtype("auto", torch.device("cpu"))
    for i in range(0, n, 16):
        clips = range(i, min(i + 16, n))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            pieces = vdm.rollout(denoiser, length, (len(clips), config.frames, config.channels, *config.size), sigmas,
                                 seed=seed, clips=clips, **train.rolling(config))
            videos.append(torch.cat(list(pieces), 1))
        videos[-1] = autoencoder.decode(videos[-1]) if autoencoder else videos[-1]
    return torch.cat(videos)


def long(folder, n=32):
    """Do long videos stay what they are? Marks over their full length; how many frames are as bright, and as rich in contrast,
    as those of real clips (between the 0.5th and the 99.5th of 100); and the peak memory of sample.py, which draws 4 of them."""
    checkpoint = Path(folder) / "last.pt"
    denoiser, config = vdm.load(checkpoint)
    world = vdm.MovingShapes(config.frames, config.size, seed=55)
    real = torch.stack([world[i]["video"] for i in range(256)])                                     # (256, T, 3, H, W)
    for times in (4, 16):
        video = rolled(denoiser, config, n, times * config.frames)
        print(train.report(world, video))
        for name, of in dict(brightness=lambda x: x.mean((2, 3, 4)), contrast=lambda x: x.std((2, 3, 4))).items():
            low, high = of(real).quantile(torch.tensor([0.005, 0.995]))
            inside = ((of(video) >= low) & (of(video) <= high)).float()                             # (n, length)
            last = inside[:, -config.frames:].mean()
            print(f"frames with the {name} of real ones: {inside.mean():.1%}; of the last {config.frames}: {last:.1%}")
        call = ["--n", "4", "--length", str(times * config.frames), "--device", "cpu", "--out", str(Path(folder) / "long.mp4")]
        code = "import sys, sample; sample.main(sys.argv[1:]); print(open('/proc/self/status').read())"
        run = subprocess.run([sys.executable, "-c", code, str(checkpoint), *call], capture_output=True, text=True, check=True,
                             env=os.environ | dict(PYTHONPATH=str(Path(__file__).resolve().parent.parent)))
        print(f"peak memory of sample.py, 4 videos of {times * config.frames} frames: {peak(run.stdout):.0f} MiB")


def drive(denoiser, config, device, dtype):
    """Commands of fresh clips; none; and with the same noise those of the next clip: does the video change as told?"""
    world = vdm.Drive(config.frames, config.size, seed=55)
    action = torch.stack([world[i]["action"] for i in range(64)])                                   # (64, T, 6)
    made = [train.sample(config, denoiser, 64, device, dtype, seed=2, **told)
            for told in (dict(action=action), {}, dict(action=action.roll(1, 0)))]
    print("told the commands", train.report(world, made[0], action), sep="\n")
    print("told nothing", train.report(world, made[1]), sep="\n")
    print("told other commands, from the same noise", train.report(world, made[2], action.roll(1, 0)), sep="\n")
    print(f"of these, frames that obey the old commands: {world.check(made[2], action)['obeys'].mean():.0%} (of unrelated "
          f"real clips: {world.check(torch.stack([world[i]['video'] for i in range(64)]), action.roll(1, 0))['obeys'].mean():.0%})")


def centre(video):
    """Where the light of each frame is: (N, T, 2) in pixels. A lone shape on black is all of it."""
    light = ((video.amax(2) + 1) / 2 - 0.1).clamp(0, 0.8)                                           # (N, T, H, W)
    return torch.stack([(light.sum(axis) * torch.arange(light.shape[-1])).sum(-1) / light.sum((2, 3)).clamp(min=1e-3)
                        for axis in (3, 2)], -1)


def interpolation(denoiser, config, sigmas, dtype):
    """Of real clips every second or fourth frame is given; how far off is the shape in those between?"""
    world = vdm.MovingShapes(13, config.size, seed=55)
    real = torch.stack([world[i]["video"] for i in range(64)])
    for passes in ((2,), (4,), (2, 2)):
        made, factor = [], math.prod(passes)
        for i in range(0, 64, 16):
            clip = real[i:i + 16, ::factor]
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                for k, times in enumerate(passes):
                    clip = vdm.interpolate(denoiser, clip, times, config.frames, sigmas, k, range(i, i + 16), **train.sampling(config))
            made.append(clip)
        near = (centre(torch.cat(made).float()) - centre(real)).norm(dim=2) < 1                     # (64, 13)
        near = near[:, torch.arange(13) % factor > 0]
        print(f"interpolation {' times '.join(map(str, passes))}: within a pixel {near.float().mean():.0%} of inserted frames, "
              f"all of them in {near.all(1).float().mean():.0%} of clips")


def light(p, world, frames):
    """Clips (N, T, 3, H, W) of what p (N, 7) says, in pixels: kind, radius, y, x, speed, direction, colour."""
    kind, r, y, x, speed, way = p[:, :6, None].swapaxes(0, 1)                                       # (N, 1)
    steps, (H, W) = speed * np.arange(frames), world.size                                           # (N, T)
    y, x = world.bounce(y + steps * np.sin(way), r, H - r), world.bounce(x + steps * np.cos(way), r, W - r)
    cover = np.stack([world.draw(int(k), np.full(frames, a), b, c, world.size) for k, a, b, c in zip(p[:, 0], p[:, 1], y, x)])
    return 2 * cover[:, :, None] * world.palette[p[:, 6].astype(int)][:, None, :, None, None] - 1


def drawn(world, n):
    """What MovingShapes draws for clips 0 ... n - 1: p (n, 7), as light reads it."""
    p, side = [], min(world.size)
    for i in range(n):
        dice = np.random.default_rng([world.seed, i])
        color, kind, r = dice.permutation(6)[0], dice.integers(3), dice.uniform(*world.RADIUS) * side
        speed, way = dice.uniform(*world.SPEED) * side, dice.uniform(0, 2 * np.pi)
        p.append([kind, r, *dice.uniform(r, np.array(world.size) - r), speed, way, color])
    return np.array(p)


def posterior_mean(x, sigma, truth, world, rounds=2000):
    """The mean of all clips that may be behind x (N, T, 3, H, W), clips with noise of level sigma, each as probable as x makes
    it: the estimate of least squared error. Here the mean of a Markov chain (Metropolis) over all that the world draws, which
    starts at the truth; other modes, of which high noise leaves several, it may not find."""
    (n, T), side, rng = x.shape[:2], min(world.size), np.random.default_rng(0)

    def score(p, clips):                                         # log of the posterior density
        r, place, room = p[:, 1:2], p[:, 2:4], np.array(world.size) - p[:, 1:2]
        inside = ((place > r) & (place < room)).all(1)
        for share, column in ((world.RADIUS, 1), (world.SPEED, 4)):
            inside &= (share[0] * side < p[:, column]) & (p[:, column] < share[1] * side)
        prior = -np.log(np.maximum(room - r, 1e-9)).sum(1)       # the larger a shape, the less room its place has
        return np.where(inside, prior - ((clips - x) ** 2).sum((1, 2, 3, 4)) / 2 / sigma ** 2, -np.inf)

    p, clips, total = truth.copy(), light(truth, world, T), 0
    now, width = score(p, clips), np.array([0, 0.14, 0.3, 0.3, 0.07, 0.1, 0]) * sigma / T ** 0.5
    for i in range(rounds):                                      # small moves; now and then another kind, direction, colour
        q = p + rng.normal(size=p.shape) * width * rng.choice([0.1, 0.3, 1, 2], (n, 1)) * (rng.random(p.shape) < 0.5)
        for every, column, fresh in ((5, 0, rng.integers(3, size=n)), (11, 5, rng.uniform(0, 2 * np.pi, n)),
                                     (7, 6, rng.integers(6, size=n))):
            q[:, column] = q[:, column] if i % every else fresh
        moved = light(q, world, T)
        then = score(q, moved)
        yes = np.log(1 - rng.random(n)) < then - now
        p[yes], clips[yes], now[yes] = q[yes], moved[yes], then[yes]
        total += clips * (i >= rounds // 10)
    return total / (rounds - rounds // 10)


def best(folder, n=32):
    """The error of a run's estimates beside the least that any can have, from all frames and from each first one alone."""
    denoiser, config = vdm.load(Path(folder) / "last.pt")
    if config.factor or config.actions or config.channels != 3:
        sys.exit(f"{folder} is no run on the pixels of MovingShapes, the one world whose least error is known here")
    world = vdm.MovingShapes(config.frames, config.size, seed=77)
    truth, clips = drawn(world, n), np.stack([world[i]["video"].numpy() for i in range(n)])
    assert np.allclose(light(truth, world, config.frames), clips, atol=1e-5)
    print(f"{n} clips, squared error    model  least possible  of a frame alone")
    for sigma in (1.0, 2.0, 4.0, 8.0, 16.0):
        x = clips + sigma * np.random.default_rng(1).normal(size=clips.shape)
        with torch.no_grad():
            made = denoiser(torch.from_numpy(x).float(), torch.full((n,), sigma)).numpy()
        guesses = made, posterior_mean(x, sigma, truth, world), posterior_mean(x[:, :1], sigma, truth, world)
        error = [((guess - clips[:, :guess.shape[1]]) ** 2).mean() for guess in guesses]
        print(f"{'sigma':>18} {sigma:4g} {error[0]:9.4f} {error[1]:15.4f} {error[2]:17.4f}")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", help="the folder of a run whose clips are to be marked")
    p.add_argument("--long", help="the folder of a run whose long videos are to be marked")
    p.add_argument("--best", help="the folder of a run whose errors are to be compared with the least possible")
    p.add_argument("--memory", action="store_true", help="peak memory against prediction")
    p.add_argument("--efficiency", type=float, nargs="?", const=2.0, metavar="GIB", help="pixels against latents; a training step may "
                   "take this much (2)")
    p.add_argument("--index", type=int, metavar="N", help="decode and index N clips")
    p.add_argument("--measure", choices=["ours", "theirs", *NETWORKS], help="one of them, as JSON (used by the others)")
    p.add_argument("--cost", nargs=3, help="pixels or latents, frames, batch: one entry of --efficiency, as JSON")
    o = p.parse_args()
    if o.measure:
        print(json.dumps(steps(o.measure) if o.measure in NETWORKS else measure(o.measure)))
    elif o.cost:
        print(json.dumps(cost(o.cost[0], int(o.cost[1]), int(o.cost[2]))))
    elif o.efficiency:
        efficiency(o.efficiency)
    elif o.index:
        index(o.index)
    else:
        folders = [(f, folder) for f, folder in ((marks, o.run), (long, o.long), (best, o.best)) if folder]
        folders[0][0](folders[0][1]) if folders else memory() if o.memory else compare()
