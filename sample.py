"""
sample.py: generate videos from a checkpoint; it takes no model settings, they are all in there.

    python sample.py                                            16 clips from the newest run under out/
    python sample.py out/tiny/last.pt --n 4 --length 32         four times as long as the clips trained on
    python sample.py --context clip.mp4 --length 16             go on from a clip, or from a picture
    python sample.py --actions LLSSRRXX                         left, straight, right, stop (train with --data drive); prints
                                                                Vista's reward: how sure the model is of what they lead to
    python sample.py --context clip.mp4 --interpolate 2 2       put 3 new frames between each two of a clip, in two passes
    python sample.py --context clip.mp4 --reconstruction 2      the same by a model that was never trained to go on

A model of latents has its autoencoder in its checkpoint: what is given is encoded, what is made decoded. If its latents come
from elsewhere, --context is an .npy file of them (T, c, h, w), and so is what comes out, (T, c, h, w) per video.
With a model trained with --task image, --context is the picture to animate, with --task upsample the clip to enlarge.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import vdm
from train import MOST, Parser, limit, pick_device, pick_dtype, pixels, rolling, sampling


def read_actions(text, config):
    """Letters of vdm.Drive, or the name of an .npy file of numbers -> actions (T, A)."""
    if text.endswith(".npy"):
        try:
            actions = np.load(text).astype(np.float32)
        except Exception as e:                                         # each kind of damage has its own
            raise ValueError(f"--actions {text} cannot be read ({e})") from e
    else:
        if not text or set(text) - set(vdm.Drive.KEYS):
            raise ValueError(f"--actions is {text!r}, expected letters of {vdm.Drive.KEYS}, or the name of an .npy file")
        actions = vdm.Drive.ACTIONS[[vdm.Drive.KEYS.index(letter) for letter in text]]
    if np.isinf(actions).any():
        raise ValueError(f"--actions {text} holds infinite numbers: expected finite ones, or NaN where nothing is told")
    if actions.ndim != 2 or actions.shape[1] != sum(config.actions):
        raise ValueError(f"--actions {text} is of shape {actions.shape}, but the model was trained on "
                         f"{sum(config.actions)} numbers per frame")
    return torch.from_numpy(actions)


def read_context(path, config, autoencoder, size=None, stride=1, least=1):
    """The frames that are given (T, C, H, W), T >= least, every stride-th up to the last, in pixels or as the latents that the
    model knows."""
    if config.factor and not autoencoder:
        try:
            clip = torch.from_numpy(np.load(path).astype(np.float32)) * config.latent_scale
            if clip.shape[1:] != (config.channels, *config.size):
                raise ValueError(f"they are {tuple(clip.shape)}, the model's (T, {config.channels}, *{config.size})")
            clip = clip[(len(clip) - 1) % stride :: stride]
        except Exception as e:                                         # each kind of damage has its own
            raise ValueError(f"--context {path} is no .npy file of latents that fit: {e}") from e
    else:
        whole, channels = pixels(config)
        clip = vdm.read_video(path, size or whole, channels)                                   # (T, C, H, W)
        clip = clip[(len(clip) - 1) % stride :: stride]
    if len(clip) < least:
        raise ValueError(f"--context-frames is {least}, but {path} has {len(clip)} frames: expected at most as many")
    if config.factor and not autoencoder:
        return clip
    print(f"context {path}: {len(clip)} frames, cut and scaled to {clip.shape[2]}x{clip.shape[3]}, {'colour' if channels == 3 else 'grey'}")
    return autoencoder.cpu().encode(clip[None])[0] if autoencoder else clip


class Frames:
    """Of videos (n, T, H, W, C) in a file, frame t of video i, or of all side by side: read when it is asked for."""

    def __init__(self, stored, i=None):
        self.stored, self.i = stored, i

    def __getitem__(self, t):
        if self.i is None:
            return vdm.grid(vdm.from_uint8(self.stored[:, [t]]))[0]                            # (C, H', W')
        return vdm.from_uint8(self.stored[self.i, t])                                          # (C, H, W)


def main(argv=None):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("checkpoint", nargs="?", help="a last.pt (default: the newest under out/)")
    p.add_argument("--n", type=int, default=16, help="number of videos (16)")
    p.add_argument("--length", type=int, help="frames of each, those of --context among them (default: as many as the model was trained "
                   "on; twice as many where --context is the whole clip before)")
    p.add_argument("--context", help="a clip or picture to start from: it gives the first frames of every video")
    p.add_argument("--context-frames", type=int, help="how many of its last frames (default: all that fit, and were trained)")
    p.add_argument("--interpolate", type=int, nargs="+", help="how many times as many frames to make of --context (train with --task "
                   "any), in one pass or, as 2 2, in several, from coarse to fine (train with --rates 1 2, too)")
    p.add_argument("--context-noise", type=float, help="sigma of noise on given frames, up to the one trained with (default: 0; "
                   "a tenth of it for a model with --anchor, half of it with --task image and upsample)")
    p.add_argument("--reconstruction", type=float, default=0.0, help="give frames by reconstruction guidance of this weight")
    p.add_argument("--actions", help="one per frame, those of --context too: L, S, R, X for left, straight, right, stop; "
                   "or an .npy file (T, A), NaN where nothing is told")
    p.add_argument("--label", type=int, help="class of all videos, for a model trained with --labels")
    p.add_argument("--overlap", type=int, help="frames a window of a long video takes over from the one before")
    p.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="1: as trained; more exaggerates all that is given (1)")
    p.add_argument("--guidance-shape", choices=["constant", "ramp", "triangle"], default="constant", help="over the frames of a "
                   "window: constant, or from 1 up to --guidance (ramp), and down again (triangle); --guidance 1.5 3: from 1.5")
    p.add_argument("--keep-frames", action="store_true", help="guidance exaggerates label and actions alone, since given frames "
                   "stay in both estimates (Vista)")
    p.add_argument("--temporal-guidance", type=float, help="more than 1 exaggerates how frames tell each other to change, and takes "
                   "twice as long; windows that jump go without (default: the checkpoint's)")
    p.add_argument("--rescale", type=float, default=0.0, help="0 to 1: how far to undo the contrast guidance adds (0)")
    p.add_argument("--sampler", choices=vdm.SAMPLERS, help="default: the one in the checkpoint")
    p.add_argument("--steps", type=int, help="noise levels visited; more is slower and better (default: the checkpoint's)")
    p.add_argument("--jump", type=float, help="windows that are given two or more frames go from the first noise level straight to "
                   "this one; 0: through all (default: the checkpoint's)")
    p.add_argument("--seed", type=int, default=0, help="another seed, other videos; video i depends on (seed, i) alone")
    p.add_argument("--batch", type=int, default=16, help="videos generated at a time; lower it if memory runs out (16)")
    p.add_argument("--fps", type=float, help="frames per second of the files (default: the checkpoint's)")
    p.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu) or a name that torch knows")
    p.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 where it is fast")
    p.add_argument("--out", default="samples.mp4", help="file for the grid of all videos, and folder for each (samples.mp4)")
    o = p.parse_args(argv)
    if o.checkpoint is None:
        found = sorted(Path("out").glob("**/last.pt"), key=lambda f: f.stat().st_mtime)
        if not found:
            raise ValueError("there is no out/*/last.pt here: train first (python train.py --preset tiny), or name a checkpoint")
        o.checkpoint = found[-1]
    if Path(o.out).suffix not in (".mp4", ".gif"):
        raise ValueError(f"--out is {o.out}, expected a name that ends in .mp4 or .gif")
    for name in ("context", "actions"):
        path, target = Path(getattr(o, name) or "."), Path(o.out).resolve().with_suffix("")
        if getattr(o, name) == "":
            raise ValueError(f"--{name} is empty: expected a value, or leave the flag out")
        same = target == path.resolve().with_suffix("") and path.suffix in (".mp4", ".gif", ".png")
        if path.is_file() and (same or target == path.resolve().parent):
            raise ValueError(f"--{name} {path} might be overwritten by what is written to {o.out}: name another --out")
    for path, taken in ((Path(o.out), Path.is_dir), (Path(o.out).with_suffix(""), Path.is_file)):
        if taken(path):
            raise ValueError(f"--out is {o.out}, for a file and a folder, {path.with_suffix('')}, but {path} is "
                             f"{'a folder' if path.is_dir() else 'a file'}: name another")
    limit("n length context_frames interpolate steps batch", "1 or more", 1, MOST, o)
    limit("reconstruction guidance temporal_guidance jump seed context_noise", "0 or more", 0, MOST, o)
    limit("rescale", "0 to 1", 0, 1, o)
    limit("fps", "0.1 to 1000", 0.1, 1000, o)
    (denoiser, config), (autoencoder, _) = vdm.load(o.checkpoint), vdm.load_autoencoder(o.checkpoint)
    device = pick_device(o.device)
    dtype = pick_dtype(o.dtype, device)
    denoiser.to(device)
    if o.label is not None and not 0 <= o.label < config.labels:
        raise ValueError(f"--label is {o.label}, but {o.checkpoint} knows {config.labels} labels, counted from 0")
    actions = None if o.actions is None else read_actions(o.actions, config)                   # (length, A)
    T = config.frames
    length = o.length or (T * (1 + (config.previous and bool(o.context))) if actions is None else len(actions))
    if actions is not None and len(actions) != length:
        raise ValueError(f"--actions has {len(actions)} frames, but --length is {length}: each frame needs one")
    steps, how = o.steps or config.sampling_steps, sampling(config)
    how |= {name: getattr(o, name) for name in how if getattr(o, name) is not None}
    overlap = min(config.overlap, T) if o.overlap is None else o.overlap
    if o.overlap is not None and (not 0 < overlap < T or length <= T or config.previous or o.interpolate):
        raise ValueError(f"--overlap is {overlap}: it is for videos longer than a window, so needs --length above {T}, a model "
                         f"trained without --previous, and no --interpolate, and is from 1 to {T - 1}")
    if o.context_frames and not o.context:
        raise ValueError("--context-frames says how many frames of --context are given: it needs --context")
    if o.temporal_guidance not in (None, 1) and not config.images:
        raise ValueError(f"--temporal-guidance is {o.temporal_guidance:g}, but {o.checkpoint} was trained with --images 0, without "
                         "ever being alone with a frame: expected 1")
    low, guidance, guides = o.guidance[0] if len(o.guidance) > 1 else 1.0, o.guidance[-1], o.guidance != [1.0]
    if len(o.guidance) > 1 + (o.guidance_shape != "constant"):
        raise ValueError(f"--guidance is {o.guidance}, expected one number or, with --guidance-shape ramp or triangle, two")
    if not guides and (o.rescale or o.keep_frames or o.guidance_shape != "constant"):
        raise ValueError("--rescale, --keep-frames and --guidance-shape need a --guidance other than 1")
    told, frames = o.label is not None or actions is not None, not o.reconstruction and bool(o.context or length > T)
    if guides and not (told or frames and not o.keep_frames):
        raise ValueError(f"--guidance is {guidance:g}, but it would exaggerate nothing: it needs --label, --actions or, without "
                         f"--reconstruction and --keep-frames, --context or --length above {T}")
    if o.keep_frames and not frames:
        raise ValueError(f"--keep-frames needs frames that are given: --context or --length above {T}, without --reconstruction")
    guidance = dict(constant=guidance, ramp=torch.linspace(low, guidance, T), triangle=vdm.triangle(low, guidance, T))

    if o.reconstruction and (config.previous or not o.context and length <= T):
        raise ValueError(f"--reconstruction is {o.reconstruction:g}: it needs a weight above 0, frames to go on from "
                         f"(--context, or --length above {T}), and a model trained without --previous")
    trained = [n for n, share in enumerate(config.context) if n and share]                     # e.g. [1, 2, 3, 4]
    anything = config.task == "any" or config.independent > 0 or o.reconstruction > 0
    fills = anything or config.task == "ends" and o.interpolate == [T - 1]
    if anything:
        trained = list(range(1, T))
    elif config.task != "predict":
        trained = []                                                   # neither the first frames alone nor more of them
    hints = config.task in ("image", "upsample") and o.context and not (o.reconstruction or o.interpolate)
    goes_on = (o.context or length > T) and not (o.interpolate or o.reconstruction)
    anchors = config.anchors * goes_on
    level = config.context_noise / 2 if hints else rolling(config)["context_noise"] * goes_on
    level = level if o.context_noise is None else o.context_noise
    if level and not goes_on:
        raise ValueError(f"--context-noise is for the frames that windows go on from: it needs --context or --length above {T}, "
                         "and neither --interpolate nor --reconstruction")
    largest = config.sigma_max if config.independent else config.anchor if anchors else config.context_noise
    if not 0 <= level <= largest or (hints or anchors) and not level:
        raise ValueError(f"--context-noise is {level:g}, expected {'more than ' * bool(hints or anchors)}0 to the {largest:g} that "
                         f"{o.checkpoint} was trained with")
    jumps = goes_on and not hints                                      # which tell too little to jump by
    jump = rolling(config)["jump"] * jumps if o.jump is None else o.jump
    if jump < 0 or jump and not jumps:
        raise ValueError(f"--jump is {jump:g}, expected 0 or more, and more only where windows go on from given frames: with "
                         f"--context or --length above {T}, and neither --interpolate nor --reconstruction")
    if anchors and overlap < 4:
        raise ValueError(f"--overlap is {overlap}, but {o.checkpoint} was trained with --anchor: expected 4 or more")
    context = None
    if o.interpolate is not None:
        if not o.context or o.length or o.actions or not fills:
            raise ValueError("--interpolate fills a clip: it needs --context CLIP, no --length or --actions, and a model trained with "
                             f"--task any or, to be {T - 1}, with --task ends ({o.checkpoint} has --task {config.task})")
        if not all(1 < factor < T for factor in o.interpolate):
            raise ValueError(f"--interpolate is {' '.join(map(str, o.interpolate))}, expected factors of 2 to {T - 1}, for windows of "
                             f"{T} frames")
        context = read_context(o.context, config, autoencoder, least=o.context_frames or 1)    # (K, C, H, W)
        context = context[-(o.context_frames or 0):]
        if len(context) < 2:
            raise ValueError(f"--interpolate fills in between frames, but --context gives {len(context)}: expected 2 or more")
        length = math.prod(o.interpolate) * (len(context) - 1) + 1
    elif hints:
        small = None if config.task == "image" else [n // 4 for n in config.size]
        context = read_context(o.context, config, autoencoder, small, config.stride)           # (n, C, h, w)
        context = context[-1:].expand(T, -1, -1, -1) if config.task == "image" else context[:T]
        if len(context) < T or o.context_frames or length > T:
            raise ValueError(f"{o.checkpoint} has --task {config.task}, which takes the last frame (image) or the first {T} "
                             f"frames (upsample) of --context: {o.context} must have them, --length may be {T} at most, and "
                             "--context-frames is not used")
        k = config.size[0] // context.shape[2]
        context = context.repeat_interleave(k, -1).repeat_interleave(k, -2)                    # (T, C, H, W)
    elif o.context:
        if not trained and not config.previous:
            way = f"--task ends: it fills in between two frames or more, by --interpolate {T - 1}" if config.task == "ends" else \
                "--context 1.0, so without given frames: it can use --context only with --reconstruction 1"
            raise ValueError(f"{o.checkpoint} was trained with {way}")
        context = read_context(o.context, config, autoencoder, None, config.stride, o.context_frames or 1)        # (n, C, H, W)
        most = T if config.previous else trained[-1]
        context = context[-min(o.context_frames or most, len(context)):]
        if not config.previous and len(context) not in trained:
            raise ValueError(f"--context gives {len(context)} frames, but the model was trained on {trained} given frames: "
                             "choose one with --context-frames")
        if length <= len(context):
            raise ValueError(f"--length is {length}, but --context gives {len(context)} frames, which come first: expected more")
    if jump and o.temporal_guidance not in (None, 1) and o.context and len(context) > 1 and (length <= T or overlap > 1):
        raise ValueError(f"--temporal-guidance is {o.temporal_guidance:g}, but here every window is given two or more frames, and "
                         "those jump, which goes without guidance: add --jump 0")
    if length > T and not o.interpolate and not config.previous and overlap not in trained:
        raise ValueError(f"--length {length} is more than the {T} frames of a window, so each window must be given the end of "
                         f"the one before: the model was trained on {trained or 'no'} given frames, not on overlap {overlap}")
    print(f"{o.checkpoint}: {o.n} videos of {length} frames, {how['sampler']} with {steps} steps, averaged weights, on {device} "
          f"in {str(dtype).removeprefix('torch.')}{f', noise of {level:g} on given frames' * bool(level)}")

    sigmas, began, out = vdm.karras_sigmas(steps, config.sigma_min, config.sigma_max, config.rho), time.time(), Path(o.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    # pixels go to a file as they come: a video may be longer than fits into memory
    (H, W), channels = pixels(config)
    spool, shape_of_all = tempfile.TemporaryFile(dir=out.parent), (o.n, length, H, W, channels)

    def keep(video, first, at):                                                                # (B, t, C, H, W)
        for i, frames in enumerate(vdm.to_uint8(video), first):
            spool.seek((i * length + at) * H * W * channels)
            spool.write(frames.tobytes())

    def pieces(clips):
        """The videos of these numbers, piece by piece (B, t, C, H, W)."""
        given = None if context is None else context.expand(len(clips), *context.shape).to(device)
        shape = len(clips), T, config.channels, *config.size
        options = dict(how, guidance=guidance[o.guidance_shape], rescale=o.rescale, reconstruction=o.reconstruction,
                       keep=("context", "mask", "previous") if o.keep_frames else ())
        if o.label is not None:
            options["label"] = torch.full((len(clips),), o.label, device=device)
        if actions is not None:
            options["action"] = actions.expand(len(clips), *actions.shape).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            if o.interpolate:
                for k, factor in enumerate(o.interpolate):             # each pass has noise of its own
                    given = vdm.interpolate(denoiser, given, factor, T, sigmas, o.seed + k, clips, **options)
                stream = [given]
            elif hints:
                noise = vdm.clip_noise(o.seed, clips, device)
                seen, mask = vdm.draw_context(given, torch.ones(given.shape[:2]), config.task, vdm.constant(level, given),
                                              noise(*shape[1:]))
                if actions is not None:                                # after the last, none
                    options["action"] = torch.nn.functional.pad(options["action"], (0, 0, 0, T - length), value=math.nan)
                stream = [vdm.generate(denoiser, shape, sigmas, noise=noise, context=seen, mask=mask, **options)[:, :length]]
            else:
                stream = vdm.rollout(denoiser, length, shape, sigmas, overlap, given, seed=o.seed, clips=clips, context_noise=level,
                                     anchors=anchors, jump=jump, **options)
            yield from autoencoder.to(device).stream(stream) if autoencoder else stream

    bar = tqdm(total=o.n * length, unit="frame", mininterval=0.5 if sys.stderr.isatty() else 20)
    try:
        for i in range(0, o.n, o.batch):
            clips, latents, done = range(i, min(i + o.batch, o.n)), [], 0
            for piece in pieces(clips):
                if config.factor and not autoencoder:
                    latents.append(piece)
                else:
                    keep(piece, i, done)
                done += piece.shape[1]
                bar.update(piece.shape[0] * piece.shape[1])
            if latents:
                out.with_suffix("").mkdir(exist_ok=True)
                for j, video in zip(clips, torch.cat(latents, 1).cpu()):
                    np.save(out.with_suffix("") / f"{j:03d}.npy", video.numpy() / config.latent_scale)
    except KeyboardInterrupt:                                          # whole videos are kept or, of the first, what there is
        bar.close()
        o.n, length = (i, length) if i or config.factor and not autoencoder else (len(clips), done)
        print(f"\nstopped by Ctrl-C: {o.n * bool(length)} videos of {length} frames are written")
        if not o.n * length:
            return
    bar.close()
    if config.factor and not autoencoder:
        return print(f"{time.time() - began:.0f} s; latents, for the decoder where they come from: {out.with_suffix('')}/*.npy")

    spool.truncate(math.prod(shape_of_all))
    stored, fps = np.memmap(spool, np.uint8, "r", shape=shape_of_all)[:o.n, :length], o.fps or config.fps
    if actions is not None and o.n > 1:                                # as vdm.reward, frame by frame
        variance = np.mean([(stored[:, t] / 127.5).var(0, ddof=1).mean() for t in range(length)])
        print(f"reward  {math.exp(-variance):.3f} of these actions: exp(-variance among the {o.n} videos), 1 if they are all the same")
    # a film strip of more frames is too wide to look at; pictures and GIFs need all of their pixels in memory
    strip = vdm.film_strip(vdm.from_uint8(stored[:8, :: -(-length // 32)]))
    files = [vdm.write_video(name, Frames(stored), fps) for name in {out, out.with_suffix(".gif")} if length <= 64 or name == out]
    image = vdm.write_video(out.with_suffix(".png"), strip[None], scale=2)
    each = [vdm.write_video(out.with_suffix("") / f"{i:03d}{out.suffix}", Frames(stored, i), fps) for i in range(o.n)]
    print(f"{time.time() - began:.0f} s; all videos: {' and '.join(map(str, sorted(files)))}; the first as a film strip: {image}; "
          f"each: {each[0]} ... {each[-1].name}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
