"""
sample.py: generate videos from a checkpoint, which holds all settings of its model.

    python sample.py                                    16 videos, by the newest run under out/
    python sample.py out/tiny --n 4 --length 32         longer than the clips it was trained on
    python sample.py --context clip.mp4 --length 16     go on from a clip like those trained on
    python sample.py --actions LLSSRRXX                 left, straight, right, stop (--data drive)
    python sample.py --context clip.mp4 --interpolate 2 2      new frames between those of a clip
    python sample.py out/key out/fill out/up --interpolate 4   a cascade: key frames, those between
                                                               them, more pixels

    python sample.py svd.safetensors --context latent.npy --clip clip.npy --fps 7
                                                        published weights of SVD or Vista

A model of --task image animates the picture in --context, one of --task upsample enlarges a clip.
If a model's latents come from elsewhere, --context and all videos are .npy files (T, c, h, w). For
SVD and Vista they are the latents of their autoencoder times 0.18215: divide, then decode.
"""

import argparse
import dataclasses
import itertools
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import vdm
from vdm import limit, need

SHAPES = dict(constant=lambda low, high, frames: high, ramp=torch.linspace, triangle=vdm.triangle)
PUBLISHED = ("svd", "vista")                        # models of --give svd and vista: StableUNet
MANY = 10 ** 9                         # --seed is at most this: seed + MANY has noise of its own

# ---- the ways to sample --------------------------------------------------------------------------
# job holds the flags, and what main adds to them. clips are the numbers of B videos, shape is that
# of a window, given are the frames to start from, or None. What comes are pieces (B, n, C, H, W).
# With planes a piece is a clip of job.unit frames; job.pieces is job.length in such units.

def roll_out(job, clips, shape, given):
    """Start from nothing or from given frames, and go on window by window (Video LDM, Vista), or
    frame by frame, each --lag noise levels behind the one before (diffusion forcing)."""
    if job.lag:
        return vdm.stream(job.denoise, job.length, shape, job.sigmas, job.lag, given, job.seed,
                          clips, lambda start: told(job, start), job.sampler)
    noise = vdm.clip_noise(job.seed + MANY, clips, job.device)

    def tell(context, mask, start):
        frames = vdm.given_frames(context, mask, start)
        if job.config.give == "vista":                       # the first given frame is its picture
            frames |= published(job, context[:, :1])
        if job.config.give == "hint":                          # faults do not grow then (GameNGen)
            frames = vdm.hint(context, mask, job.level, noise(*shape[1:]))
        return told(job, start) | frames

    return vdm.rollout(job.denoise, job.pieces, shape, job.sigmas, job.overlap, given, job.seed,
                       clips, tell, sampler=job.sampler)

def follow_clip(job, clips, shape, given):
    """Start from nothing or from a given clip, and let clip follow clip (PVDM)."""
    return vdm.rollout_previous(job.denoise, job.pieces, shape, job.sigmas, given, job.seed, clips,
                                job.later_sigmas, sampler=job.sampler, **told(job))

def animate(job, clips, shape, given):
    """Animate a given picture (SVD)."""
    noise = vdm.clip_noise(job.seed, clips, job.device)
    if job.config.give == "svd":
        hints = published(job, given)
    else:
        everywhere = torch.ones(shape[:2], device=job.device)
        hints = vdm.image_hint(given, everywhere, job.level, noise(*given.shape[1:]))
    window = vdm.generate(job.denoise, shape, job.sigmas, job.sampler, noise, **hints, **told(job))
    yield window[:, :job.length]

def enlarge(job, clips, shape, given):
    """Enlarge a given clip, in windows of nearly equal length (Video LDM's up-sampler)."""
    noise = vdm.clip_noise(job.seed, clips, job.device)
    start = 0
    for clip in given.tensor_split(math.ceil(given.shape[1] / shape[1]), dim=1):
        everywhere = torch.ones(clip.shape[:2], device=job.device)
        hints = vdm.hint(clip, everywhere, job.level, noise(*clip.shape[1:]))
        yield vdm.generate(job.denoise, clip.shape, job.sigmas, job.sampler, noise, **hints,
                           **told(job, start, clip.shape[1]))
        start += clip.shape[1]

def published(job, picture):
    """Return what SVD and Vista are told of a picture (B, 1, 4, H, W)."""
    clip = job.clip
    if clip is not None:
        clip = clip.expand(len(picture), -1)
    return vdm.picture_conditions(picture, job.config.fps, job.motion_bucket, job.hint_noise, clip)

def interpolate(job, clips, shape, given):
    """Put new frames between given ones, in as many passes as --interpolate has numbers."""
    for k, factor in enumerate(job.interpolate):               # each pass has noise of its own
        given = vdm.interpolate(job.denoise, given, factor, shape[1], job.sigmas,
                                job.seed + k * MANY, clips, sampler=job.sampler, **told(job))
    yield given

def choose(job):
    """Return the way to sample, and the numbers of frames that can be given, e.g. [1, 2, 3, 4]."""
    config = job.config
    T = config.frames * job.unit
    if len(job.checkpoints) > 1 and (not job.context or config.task not in ("any", "ends")):
        job.interpolate = []                                  # another of the checkpoints does it
    if job.interpolate:
        limit("interpolate", f"2 to {T - 1}, in windows of {T} frames", 2, T - 1, job)
        ends = config.task == "ends" and job.interpolate == [T - 1]
        need(ends or (config.task == "any" and config.give != "hint"), "--interpolate needs a model"
             f" of --task any (or, for --interpolate {T - 1}, ends), or else --reconstruction 2")
        return interpolate, range(2, MANY)
    if config.give in PUBLISHED:
        need(job.context, "SVD and Vista go on from a picture: name its latents (--context)")
        need(job.reconstruction is None, "--reconstruction is for models of other kinds")
    if config.give == "previous":
        return follow_clip, [T]
    if config.give == "svd":
        return animate, [1]
    by_task = dict(upsample=(enlarge, range(1, MANY)), image=(animate, [1]))
    if job.context and config.task in by_task:
        return by_task[config.task]
    trained = [n for n, odds in enumerate(config.context) if n > 0 and odds > 0]
    return roll_out, dict(any=range(1, T), predict=trained).get(config.task, [])

def plan(job):
    """Find the way to sample, read what is given and told, and find the length of the videos."""
    if job.config.give == "svd":                             # it may draw windows of any length
        job.config.frames = job.length or job.config.frames
    T = job.config.frames * job.unit
    job.way, known = choose(job)
    usual = job.config.overlap
    if usual not in known:
        usual = max(known[:T], default=1)
    job.overlap = job.overlap or usual
    job.given = read_context(job)
    n = job.given.shape[1] * job.unit
    some = f"trained to be given {', '.join(map(str, known[:9])) or 'no'} frames"
    need(n in known or not (job.context or job.interpolate), f"--context gives {n} frames, but the "
         f"model was {some}: give as many, or try --reconstruction 2")
    lengths = {follow_clip: n + T, interpolate: math.prod(job.interpolate) * (n - 1) + 1,
               enlarge: n}
    length = lengths.get(job.way, T)
    job.told = read_told(job)
    by_actions = job.actions is not None and job.config.give != "vista"
    if by_actions:
        need(job.way in (roll_out, animate), "--actions goes neither with --interpolate nor "
             "with SVD or a model of --give previous or --task upsample")
        length = job.told["action"].shape[1] - T
    if by_actions or job.way in (interpolate, enlarge):
        limit("length", f"{length}, by --actions, --interpolate or --context", length, length, job)
    job.length = job.length or length
    job.pieces = math.ceil(job.length / job.unit)
    if job.way not in (animate, enlarge):
        limit("length", f"more than the {n} frames given, which come first", n + 1, MANY, job)
    need(job.length <= T or (job.overlap in known and job.way is not animate), "--length is "
         f"{job.length}, so a window would go on from {job.overlap} frames (--overlap), but the "
         f"model was {some}: try --reconstruction 2")

def told(job, start=0, frames=None):
    """Return label and actions of the window that begins at frame `start`, the same for all."""
    end = start + (frames or job.config.frames)
    told = {name: x[:, start:end] for name, x in job.told.items()}
    if job.config.give == "vista" and job.actions:       # a row for all of a window; the last stays
        actions = job.told["action"]
        told["action"] = actions[:, min(start, actions.shape[1] - 1)]
    return told

def steered(job, denoise):
    """Return the function (x, sigma, **conditions) that samplers ask: the model, with guidance."""
    denoise = vdm.skip_guided_by(job.config, denoise)
    named = ("label", "action")
    if job.config.give in PUBLISHED:
        named = ("concat", "clip", "action")
        job.keep_frames = True
        if not job.guidance:                                               # their own scales
            job.guidance = [1.0, 2.5]
            job.guidance_shape = dict(svd="ramp", vista="triangle")[job.config.give]
            if job.config.give == "vista" and job.length <= job.config.frames:
                job.guidance_shape = "constant"
    low, high = (1.0, 1.0, *job.guidance)[-2:]
    scale = SHAPES[job.guidance_shape](low, high, job.config.frames)
    if job.guidance and job.keep_frames:
        denoise = vdm.guided_by(denoise, scale, named)
    elif job.guidance:
        denoise = vdm.guided(denoise, scale)
    if job.reconstruction is None:
        return denoise

    def reconstruct(x, sigma, context=None, mask=None, **conditions):
        steer = denoise
        if mask is not None:
            steer = vdm.reconstruction_guided(denoise, context, mask, job.reconstruction)
        return steer(x, sigma, **conditions)

    return reconstruct

# ---- flags and files -----------------------------------------------------------------------------

def parse(argv):
    p = vdm.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                   allow_abbrev=False)
    add = p.add_argument
    add("checkpoints", nargs="*", help="last.pt, or the folder of a run; more of them go on from "
        "its videos: those of --task any by --interpolate, those of --task upsample enlarge them")
    add("--n", type=int, help="number of videos (16; of SVD and Vista 1)")
    add("--length", type=int, help="frames of each, given ones among them (default: a window)")
    add("--context", help="a clip or picture whose last frames every video starts from")
    add("--context-frames", type=int, help="how many of them (default: --overlap)")
    add("--interpolate", type=int, nargs="+", default=[], metavar="F", help="make F times as many")
    add("--hint-noise", type=float, help="noise on given frames (default: half of that trained); "
        "SVD, Vista: what you put on the picture before it was encoded (0; SVD's recipe: 0.02)")
    add("--clip", help="SVD, Vista: CLIP's token of the picture, .npy (1, 1024), for all windows")
    add("--motion-bucket", type=float, default=127, help="SVD, Vista: amount of motion, 0 to 255")
    add("--reconstruction", type=float, metavar="W", help="give frames by reconstruction guidance")
    add("--actions", help="per frame: letters of L, S, R, X, or .npy (T, A), NaN for none; Vista: "
        "row t is what a window from frame t on is told")
    add("--label", type=int, help="class of all videos, for a model trained with --labels")
    add("--overlap", type=int, help="frames of a window that the next one is given")
    add("--lag", type=int, default=0, help="of --give per_frame --independent: frame after frame, "
        "each so many noise levels behind the one before (0: all of a window together)")
    add("--guidance", type=float, nargs="+", default=[], metavar="S", help="above 1 exaggerates")
    add("--guidance-shape", choices=SHAPES, default="constant", help="from 1, or a first S, to S")
    add("--keep-frames", action="store_true", help="--guidance by label and actions alone (Vista)")
    add("--skip-guidance", type=float, help="above 1 exaggerates what frames tell each other")
    add("--sampler", choices=vdm.SAMPLERS, help="default, as for the next two: the checkpoint's")
    add("--sampling-steps", "--steps", type=int, help="noise levels visited")
    add("--later-steps", type=int, help="--give previous: those of all clips that are given one")
    add("--fps", type=float, help="frames per second of the files; SVD and Vista are told it")
    add("--seed", type=int, default=0, help="video i depends on the seed and on i alone (0)")
    add("--batch", type=int, help="videos made at a time (as --n); fewer take less memory")
    add("--device", default="auto", help="auto (a GPU if there is one), or a name torch knows")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 where fast")
    add("--raw", action="store_true", help="the last weights instead of their average (see EMA)")
    add("--out", type=Path, default="samples.mp4", help="file of all videos, and folder of each; "
        "if there are older ones, a number is added: samples-2.mp4 and so on")
    job = p.parse_args(argv)
    limit("n length context_frames interpolate overlap batch later_steps", "1 up", 1, MANY, job)
    limit("reconstruction guidance hint_noise seed lag", "0 to 10^9", 0, MANY, job)
    limit("motion_bucket", "0 to 255", 0, 255, job)
    need(job.out.suffix in (".mp4", ".gif"),
         f"--out is {job.out}, expected a name that ends in .mp4 or .gif")
    return job

def find_checkpoint(name):
    """Return the path of a checkpoint: by default of the newest, or the one that comes along."""
    ours = Path(__file__).with_name("notebooks") / "tiny.pt"
    newest = max(Path("out").glob("**/last.pt"), key=lambda p: p.stat().st_mtime, default=ours)
    path = Path(name or newest)
    if path.is_dir():
        path = path / "last.pt"
    return path

def open_model(job):
    """Load the model that a name means. job gets what belongs to it: config, autoencoder, n ..."""
    path = find_checkpoint(job.checkpoint)
    model, config = vdm.load(path, job.raw)
    knows = job.interpolate and config.task in ("any", "ends")
    need(job.stage == 0 or config.task == "upsample" or knows, f"{job.checkpoint} cannot go on "
         "from videos: it is neither of --task upsample nor, with --interpolate, of --task any")
    job.autoencoder, _ = vdm.load_autoencoder(path)
    job.latents = config.factor > 0 and job.autoencoder is None
    for name in ("sampler", "sampling_steps", "skip_guidance", "fps"):
        if getattr(job, name) is not None:
            setattr(config, name, getattr(job, name))
    job.config = config
    if config.give in PUBLISHED:
        open_published(job)
    vdm.check(None, config)
    limit("label", f"one of {config.labels} classes, from 0", 0, config.labels - 1, job)
    job.n = job.n or 16
    job.batch = job.batch or min(job.n, 16)
    check_noise(job)
    if job.reconstruction is not None or config.independent:       # then any frames may be given
        job.config = dataclasses.replace(config, task="any", give="concat")
    which = ", its last weights" if job.raw else ""
    print(f"model   {path}{which}")
    return model

def open_published(job):
    """What is usual for SVD and Vista: one video, of any size, of a picture without noise."""
    if job.context:
        shape = read_array(job.context).shape
        need(len(shape) == 4, f"{job.context} holds {tuple(shape)}, expected latents (T, 4, h, w)")
        job.config.size = tuple(shape[2:])
    job.n = job.n or 1
    job.config.hint_noise = 1.0                # of the picture, which was put on before encoding
    job.hint_noise = job.hint_noise or 0.0

def check_noise(job):
    """Find the noise level of hints. Refuse --lag where frames have no levels of their own."""
    config = job.config
    able = config.give == "per_frame" and config.independent and config.sampler != "heun"
    need(not job.lag or (able and not job.interpolate and job.reconstruction is None),
         "--lag needs a model of --give per_frame with --independent above 0, and goes neither with"
         " --interpolate nor with --reconstruction nor with --sampler heun")
    most = config.hint_noise
    if len(job.checkpoints) > 1 and not most:                             # it is for another one
        job.hint_noise = None
    limit("hint_noise", f"at most {most:g}, as in training", 0, most, job)
    if job.hint_noise is None:
        job.hint_noise = most / 2                             # half of the largest in training

def read_array(path, shape=None):
    """Read an .npy file of numbers (T, *shape), by default of any shape."""
    try:
        x = torch.from_numpy(np.load(path).astype(np.float32))
    except Exception as e:                                         # each kind of damage has its own
        raise ValueError(f"{path} cannot be read as an .npy file ({e})") from e
    need(shape in (None, x.shape[1:]),
         f"{path} holds {tuple(x.shape)}, but the model knows (T, *{shape})")
    return x

def read_told(job):
    """Read what is told of each frame: label (1, frames), actions (1, frames, A), then NaN.

    CLIP's token (1, 1024) becomes job.clip."""
    told = {}
    if job.clip is not None:
        need(job.config.give in PUBLISHED, "--clip is for SVD and Vista")
        job.clip = read_array(job.clip, (1024,))[:1].to(job.device)
    if job.label is not None:
        told["label"] = torch.tensor(job.label, device=job.device).expand(1, MANY)
    if job.actions is not None:
        width = sum(job.config.actions)
        need(width, "this model was trained without actions: --actions is for one of --data drive")
        if job.actions.endswith(".npy"):
            actions = torch.atleast_2d(read_array(job.actions))
            need(actions.ndim == 2 and actions.shape[1] == width, f"{job.actions} holds "
                 f"{tuple(actions.shape)}, but the model knows actions (T, {width})")
        else:
            keys = vdm.Drive.KEYS
            need(set(job.actions) <= set(keys) and width == 6, f"--actions is {job.actions!r}, "
                 f"expected letters of {keys} for a model of --data drive, or an .npy file")
            actions = torch.tensor(vdm.Drive.ACTIONS[[keys.index(key) for key in job.actions]])
        if job.config.give != "vista":
            actions = F.pad(actions, (0, 0, 0, job.config.frames), value=math.nan)
        told["action"] = actions[None].to(job.device)
    return told

def read_context(job):
    """Return the frames to start from as the model knows frames, (1, n, C, H, W): the last ones of
    --context. After another checkpoint they are those of its N videos, (N, n, C, H, W)."""
    if job.context is None:
        return torch.empty(1, 0)
    whole = job.interpolate or job.config.task == "upsample"
    stride = 1 if whole else job.config.stride
    usual = MANY if whole else job.overlap
    size, channels = vdm.pixels(job.config)
    if job.latents:
        size, channels = job.config.size, job.config.channels
    shrink = job.config.enlarge if job.config.task == "upsample" else 1
    small = [n // shrink for n in size]
    if job.made is not None:
        clip = job.made
        need(clip.shape[2:] == (channels, *small), f"{job.checkpoint} goes on from frames of "
             f"{(channels, *small)}, but those made so far are {tuple(clip.shape[2:])}")
    elif job.latents:
        clip = read_array(job.context, (channels, *size))[None]
        need(clip.isfinite().all(), f"{job.context} has numbers that are not finite")
        need(job.config.give not in PUBLISHED or clip.std() < 2.5, f"{job.context} has standard "
             f"deviation {clip.std():.2g}, expected about 1: multiply latents by 0.18215")
    else:
        clip = vdm.read_video(job.context, small, channels)[None]
    if shrink > 1:
        large = F.interpolate(clip.flatten(0, 1), scale_factor=shrink, mode="bilinear")
        clip = large.unflatten(0, clip.shape[:2])
    total = clip.shape[1]
    clip = clip[:, (total - 1) % stride::stride].to(job.device)
    n = clip.shape[1]
    limit("context_frames", f"at most {n}, as --context has", 1, n, job)
    clip = clip[:, -(job.context_frames or usual):]
    apart = f", {stride} apart" if stride > 1 else ""
    print(f"context {total} frames, of which the last {clip.shape[1]}{apart} are used")
    if job.autoencoder:
        return job.autoencoder.encode(clip)
    return clip

def fresh(out):
    """Return out or, if there are videos of this name, out-2, out-3 ..., and make its folder."""
    path = out
    for number in itertools.count(2):
        if not any(path.with_suffix(suffix).exists() for suffix in (".mp4", ".gif", ".png")):
            with suppress(FileExistsError):
                path.with_suffix("").mkdir(parents=True)         # of two programs one succeeds
                return path
        path = out.with_stem(f"{out.stem}-{number}")

def record(job):
    """Make all videos (n, T, C, H, W), and write each once it is complete. After a signal these are
    the ones that are complete or, of the first, the frames that are."""
    every = job.given.expand(job.n, *job.given.shape[1:])                       # (N, n, C, H, W)
    made = []                                                    # the pieces of each batch
    bar = tqdm(total=job.n * job.pieces * job.unit, unit="frame", **vdm.BAR)
    try:
        for first in range(0, job.n, job.batch):
            clips = range(first, min(first + job.batch, job.n))
            shape = (len(clips), job.config.frames, job.config.channels, *job.config.size)
            given = every[first:first + job.batch] if job.context else None
            pieces = job.way(job, clips, shape, given)
            if job.autoencoder:
                pieces = job.autoencoder.stream(pieces)
            made.append([])
            for piece in pieces:
                made[-1].append(piece.cpu())
                bar.update(len(clips) * piece.shape[1])
            write_each(job, clips, made[-1])
    except KeyboardInterrupt:
        if len(made) > 1:                                     # what is complete is written already
            made.pop()
        elif made and made[0]:
            write_each(job, clips, made[0])
        elif job.stage > 0:
            return job.made
        else:
            raise ValueError("there was no frame yet: nothing is written") from None
    finally:
        with suppress(OSError):                                     # if there is nothing in it
            job.folder.rmdir()
    return torch.cat([torch.cat(pieces, 1) for pieces in made])[:, :job.length]

def write_each(job, clips, pieces):
    """Write the videos of these numbers into the folder."""
    videos = torch.cat(pieces, dim=1)
    for i, video in zip(clips, videos[:, :job.length]):
        if job.latents:
            np.save(job.folder / f"{i:03d}.npy", video)
        else:
            vdm.write_video(job.folder / f"{i:03d}{job.out.suffix}", video, job.config.fps)

def write_all(job, videos):
    """Write all videos as a grid, the first ones as a film strip."""
    grid = vdm.grid(videos)
    vdm.write_video(job.out, grid, job.config.fps)
    if len(grid) <= 64:                                                  # more make a huge file
        vdm.write_video(job.out.with_suffix(".gif"), grid, job.config.fps)
    strip = vdm.film_strip(videos[:8, ::-(-len(grid) // 32)])              # more is too wide to see
    vdm.write_video(job.out.with_suffix(".png"), strip[None], scale=2)

def make(job):
    """Return the videos of one checkpoint, (n, T, C, H, W)."""
    job.device = vdm.pick_device(job.device)
    dtype = vdm.pick_dtype(job.dtype, job.device)
    job.unit = 1                                # frames that one frame of the network stands for
    if job.autoencoder:
        job.autoencoder.to(job.device)
        job.unit = vdm.clip_frames(job.config) // job.config.frames
    plan(job)
    need(not job.later_steps or job.way is follow_clip, "--later-steps is for models of --give "
         "previous, which go on clip by clip")
    job.denoise = steered(job, job.model.to(job.device))
    job.level = torch.tensor([job.hint_noise], device=job.device)                           # (1,)
    sigmas, job.sampler = vdm.sampling(job.config)
    job.sigmas = sigmas.to(job.device)
    later = dataclasses.replace(job.config, sampling_steps=job.later_steps or len(sigmas) - 1)
    job.later_sigmas = vdm.sampling(later)[0].to(job.device)
    print(f"sample  {job.n} videos of {job.length} frames, {job.config.sampler}, {len(sigmas) - 1} "
          f"steps, on {job.device} in {str(dtype).removeprefix('torch.')}")
    if job.stage == 0:
        job.out = fresh(job.out)
    job.folder = job.out.with_suffix("")
    with vdm.stop_signals("stopping: videos that are complete are kept") as stops:
        job.denoise = vdm.stoppable(job.denoise, stops)
        with vdm.autocast(job.device, dtype):
            videos = record(job)
    job.stopped = len(stops) > 0
    if job.actions is not None and len(videos) > 1:
        spread = videos.clamp(-1, 1).var(0).mean().item()
        print(f"reward  {math.exp(-spread):.3f}: exp(-variance among the videos)")
    return videos

# Flags for the first checkpoint alone: each of the next ones goes on from the videos before.
FIRST = dict(length=None, context_frames=None, overlap=None, guidance=[], reconstruction=None,
             actions=None, label=None, clip=None, context="the videos so far")

def main(argv=None):
    flags = parse(argv)
    jobs = []
    for k, checkpoint in enumerate(flags.checkpoints or [None]):
        job = argparse.Namespace(**vars(flags), checkpoint=checkpoint, stage=k)
        if k > 0:
            vars(job).update(FIRST)
            job.seed += k * MANY ** 2
        job.model = open_model(job)
        flags.n = job.n
        jobs.append(job)
    videos = None
    for job in jobs:
        job.made = videos
        job.out = jobs[0].out                                     # for which there is a name by now
        videos = make(job)
        if job.stopped:
            break
    if not job.latents:
        write_all(job, videos)
    many = f"{len(videos)} of {job.n}" if len(videos) < job.n else job.n
    together = "" if job.latents else f"together in {job.out}, "
    print(f"files   {many} videos of {videos.shape[1]} frames, {together}each in {job.folder}/")

if __name__ == "__main__":
    vdm.run_program(main, "make fewer videos at a time (--batch 1)")
