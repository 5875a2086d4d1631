"""
sample.py: generate videos from a checkpoint; it takes no model settings, they are all in there.

    python sample.py                                            16 clips from the newest run under out/
    python sample.py --motion 0.9                               faster than nine of ten clips that it was trained on
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
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import vdm
from train import BAR, MOST, Parser, autocast, limit, pick_device, pick_dtype, pixels, rolling, sampling


def parse(argv):
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("checkpoint", nargs="?", help="a last.pt (default: the newest under out/)")
    p.add_argument("--n", type=int, default=16, help="number of videos (16)")
    p.add_argument("--length", type=int, help="frames of each, those of --context among them (default: as many as trained "
                   "on, twice as many with --context of a --previous model, or as --actions has)")
    p.add_argument("--context", help="a clip or picture to start from: it gives the first frames of every video")
    p.add_argument("--context-frames", type=int, help="how many of its last frames (default: all that fit, and were trained)")
    p.add_argument("--interpolate", type=int, nargs="+", help="how many times as many frames to make of --context; 2 2: twice 2")
    p.add_argument("--context-noise", type=float, help="sigma of noise on given frames (default: 0; with anchors, or with --task "
                   "image or upsample, a share of that in training)")
    p.add_argument("--reconstruction", type=float, default=0.0, help="give frames by reconstruction guidance of this weight")
    p.add_argument("--actions", help="of every frame: letters of L, S, R, X (stop); or an .npy file (T, A), NaN where untold")
    p.add_argument("--motion", type=float, help="0 to 1: how far things move, as the share of the clips trained on that move less "
                   "(default: as in --context or, if that is a picture or none, by chance, another for each video)")
    p.add_argument("--label", type=int, help="class of all videos, for a model trained with --labels")
    p.add_argument("--overlap", type=int, help="frames a window of a long video takes over from the one before")
    p.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="1: as trained; more exaggerates what is given")
    p.add_argument("--guidance-shape", choices=["constant", "ramp", "triangle"], default="constant", help="over a window: "
                   "ramp: from 1 up to --guidance (1.5 3: from 1.5); triangle: and down again")
    p.add_argument("--keep-frames", action="store_true", help="--guidance exaggerates label and actions alone (Vista)")
    p.add_argument("--temporal-guidance", type=float, help="more than 1 exaggerates change; not where windows jump")
    p.add_argument("--rescale", type=float, default=0.0, help="0 to 1: how far to undo the contrast --guidance adds (0)")
    p.add_argument("--sampler", choices=vdm.SAMPLERS, help="default: the one in the checkpoint")
    p.add_argument("--steps", type=int, help="noise levels visited; more is slower and better (default: the checkpoint's)")
    p.add_argument("--jump", type=float, help="skip noise levels above this where two or more frames are given; 0: none")
    p.add_argument("--seed", type=int, default=0, help="another seed, other videos; video i depends on (seed, i) alone")
    p.add_argument("--batch", type=int, default=16, help="videos generated at a time; lower it if memory runs out (16)")
    p.add_argument("--fps", type=float, help="frames per second of the files (default: the checkpoint's)")
    p.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu) or a name that torch knows")
    p.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 where it is fast")
    p.add_argument("--out", default="samples.mp4", help="file for the grid of all videos, and folder for each (samples.mp4)")
    o = p.parse_args(argv)
    limit("n length context_frames interpolate steps batch overlap", "1 or more", 1, MOST, o)
    limit("reconstruction guidance temporal_guidance jump seed context_noise", "0 or more", 0, MOST, o)
    limit("rescale motion", "0 to 1", 0, 1, o)
    limit("fps", "0.1 to 1000", 0.1, 1000, o)
    o.out = Path(o.out)
    o.folder = o.out.with_suffix("")
    if o.out.suffix not in (".mp4", ".gif"):
        raise ValueError(f"--out is {o.out}, expected a name that ends in .mp4 or .gif")
    written = [o.out.with_suffix(suffix).resolve() for suffix in (".mp4", ".gif", ".png")]
    for name, value in (("context", o.context), ("actions", o.actions)):
        if value == "":
            raise ValueError(f"--{name} is empty: expected a value, or leave the flag out")
        if value and ((path := Path(value).resolve()) in written or path.parent == o.folder.resolve()):
            raise ValueError(f"--{name} {path} might be overwritten by what is written to {o.out}: name another --out")
    for path, taken in ((o.out, Path.is_dir), (o.folder, Path.is_file)):
        if taken(path):
            raise ValueError(f"--out is {o.out}, for a file and a folder, {o.folder}, but {path} is "
                             f"{'a folder' if path.is_dir() else 'a file'}: name another")
    if o.checkpoint is None:
        found = sorted(Path("out").glob("**/last.pt"), key=lambda f: f.stat().st_mtime)
        if not found:
            raise ValueError("there is no out/*/last.pt here: train first (python train.py --preset tiny), or name a checkpoint")
        o.checkpoint = found[-1]
    return o


def read_actions(text, config):
    """Letters of vdm.Drive, or the name of an .npy file of numbers -> actions (T, A)."""
    if text.endswith(".npy"):
        try:
            actions = np.load(text).astype(np.float32)
        except Exception as e:                                         # each kind of damage has its own
            raise ValueError(f"--actions {text} cannot be read ({e})") from e
    elif set(text) - set(vdm.Drive.KEYS):
        raise ValueError(f"--actions is {text!r}, expected letters of {vdm.Drive.KEYS}, or the name of an .npy file")
    else:
        actions = vdm.Drive.ACTIONS[[vdm.Drive.KEYS.index(letter) for letter in text]]
    if np.isinf(actions).any():
        raise ValueError(f"--actions {text} holds infinite numbers: expected finite ones, or NaN where nothing is told")
    if actions.ndim != 2 or actions.shape[1] != sum(config.actions):
        raise ValueError(f"--actions {text} is of shape {actions.shape}, but the model was trained on "
                         f"{sum(config.actions)} numbers per frame")
    return torch.from_numpy(actions)


def read_context(path, config, autoencoder, size=None, stride=1):
    """The frames that are given (T, C, H, W), every stride-th up to the last, as pixels or as the model's latents."""
    (whole, channels), elsewhere = pixels(config), config.factor and not autoencoder
    if elsewhere:
        try:
            clip = torch.from_numpy(np.load(path).astype(np.float32)) * config.latent_scale
            if clip.shape[1:] != (config.channels, *config.size):
                raise ValueError(f"they are {tuple(clip.shape)}, the model's (T, {config.channels}, *{config.size})")
        except Exception as e:                                         # each kind of damage has its own
            raise ValueError(f"--context {path} is no .npy file of latents that fit: {e}") from e
    else:
        clip = vdm.read_video(path, size or whole, channels)                                   # (T, C, H, W)
    clip = clip[(len(clip) - 1) % stride :: stride]
    if not elsewhere:
        print(f"context {path}: {len(clip)} frames, cut and scaled to {clip.shape[2]}x{clip.shape[3]}x{channels}")
    return autoencoder.encode(clip[None])[0] if autoencoder else clip


def plan(o, config):
    """What the flags, and what the model was trained to do, come to."""
    T, actions = config.frames, None if o.actions is None else read_actions(o.actions, config)                  # (length, A)
    length = o.length or (T * (1 + (config.previous and bool(o.context))) if actions is None else len(actions))
    told, given = o.label is not None or actions is not None, bool(o.context) or length > T    # given: some frames are
    goes_on = given and not (o.interpolate or o.reconstruction)
    hints = goes_on and bool(o.context) and config.task in ("image", "upsample")
    anchors = config.anchors * goes_on
    # from how many given frames the model can go on: e.g. [1, 2, 3, 4]
    anything = config.task == "any" or config.independent > 0 or o.reconstruction > 0
    trained = [n for n, odds in enumerate(config.context) if n and odds] if config.task == "predict" else []
    trained = list(range(1, T)) if anything else trained
    fills = anything or config.task == "ends" and o.interpolate == [T - 1]

    guides, guided, on = o.guidance != [1.0], "a --guidance other than 1", f"--context or --length above {T}"
    needs = dict(
        guidance=(told or given and not (o.reconstruction or o.keep_frames),
                  f"--label, --actions or, without --reconstruction and --keep-frames, {on}"),
        temporal_guidance=(config.images or o.temporal_guidance == 1, "a model trained with --images above 0"),
        reconstruction=(given and not config.previous, f"{on}, and a model of no --previous"),
        motion=(config.motion and not o.interpolate, "a model trained with --motion, and no --interpolate"),
        rescale=(guides, guided), keep_frames=(guides and given and not o.reconstruction, f"{guided}, and given frames"),
        guidance_shape=(guides or o.guidance_shape == "constant", guided),
        context_frames=(o.context and not hints, "--context, and neither --task image nor upsample"),
        context_noise=(goes_on, f"{on}, and neither --interpolate nor --reconstruction"),
        overlap=(length > T and not config.previous and not o.interpolate, f"--length above {T}, and a model of no --previous"),
        jump=(goes_on and not hints, f"{on}, and neither --interpolate nor --reconstruction"),
        interpolate=(o.context and not o.length and not o.actions and fills, "--context, no --length or --actions, and a model "
                     f"trained with --task any or, to be {T - 1}, with --task ends, not {config.task}"))
    for name, (met, need) in needs.items():
        value = getattr(o, name)
        if (value and value != [1.0] or name in ("temporal_guidance", "motion") and value == 0) and not met:
            raise ValueError(f"--{name.replace('_', '-')} does nothing here: it needs {need}")
    if o.interpolate and not all(1 < factor < T for factor in o.interpolate):
        raise ValueError(f"--interpolate is {' '.join(map(str, o.interpolate))}, expected factors of 2 to {T - 1}, for windows "
                         f"of {T} frames")
    if len(o.guidance) > 1 + (o.guidance_shape != "constant"):
        raise ValueError(f"--guidance is {o.guidance}, expected one number or, with --guidance-shape ramp or triangle, two")
    if o.label is not None and not 0 <= o.label < config.labels:
        raise ValueError(f"--label is {o.label}, but {o.checkpoint} knows {config.labels} labels, counted from 0")
    if actions is not None and len(actions) != length:
        raise ValueError(f"--actions has {len(actions)} frames, but --length is {length}: each frame needs one")
    low, high = (1.0, *o.guidance)[-2:]
    overlap, able = o.overlap or min(config.overlap, T), [n for n in trained if n > 3 or not anchors]
    if length > T and not config.previous and not o.interpolate and (hints or overlap not in able):
        raise ValueError(f"--length {length} is more than the {T} frames of a window, so each window must be given the end of "
                         f"the one before: the model was trained on {able or 'no'} given frames, not on overlap {overlap}")
    usual, most = rolling(config), config.sigma_max if config.independent else config.anchor if anchors else config.context_noise
    level = (config.context_noise / 2 if hints else usual["context_noise"]) if o.context_noise is None else o.context_noise
    level *= goes_on
    if level > most or (hints or anchors) and not level:
        raise ValueError(f"--context-noise is {level:g}, expected {'more than ' * bool(hints or anchors)}0 to the {most:g} that "
                         f"{o.checkpoint} was trained with")
    jump = (usual["jump"] if o.jump is None else o.jump) * (goes_on and not hints)             # hints tell too little to jump by
    how = {name: usual[name] if getattr(o, name) is None else getattr(o, name) for name in sampling(config)}
    guidance = dict(constant=high, ramp=torch.linspace(low, high, T), triangle=vdm.triangle(low, high, T))[o.guidance_shape]
    how |= dict(guidance=guidance, rescale=o.rescale, reconstruction=o.reconstruction,
                keep=("context", "mask", "previous") if o.keep_frames else ())
    return SimpleNamespace(length=length, actions=actions, hints=hints, trained=trained, level=level, overlap=overlap, how=how,
                           anchors=anchors, jump=jump)


def give(o, config, w, autoencoder):
    """--context (n, C, H, W) as the model takes it, all of it or its end. It decides the length of an interpolation."""
    T, size = config.frames, [n // 4 for n in config.size] if w.hints and config.task == "upsample" else None
    context = read_context(o.context, config, autoencoder, size, 1 if o.interpolate else config.stride)
    if w.hints:
        context = context[-1:].expand(T, -1, -1, -1) if config.task == "image" else context[:T]
        if len(context) < T:
            raise ValueError(f"{o.context} has {len(context)} frames, but {o.checkpoint} enlarges {T} at a time")
        k = config.size[0] // context.shape[2]
        return context.repeat_interleave(k, -1).repeat_interleave(k, -2)
    most = len(context) if o.interpolate else T if config.previous else max(w.trained, default=1)
    if (o.context_frames or 0) > len(context):
        raise ValueError(f"--context-frames is {o.context_frames}, but {o.context} has {len(context)} frames: expected at most "
                         "as many")
    context = context[-(o.context_frames or most):]
    if w.jump and o.temporal_guidance not in (None, 1) and len(context) > 1 and (w.length <= T or w.overlap > 1):
        raise ValueError(f"--temporal-guidance is {o.temporal_guidance:g}, but here every window is given two or more frames, "
                         "and those jump, which goes without guidance: add --jump 0")
    if o.interpolate:
        if len(context) < 2:
            raise ValueError(f"--interpolate fills in between frames, but --context gives {len(context)}: expected 2 or more")
        w.length = math.prod(o.interpolate) * (len(context) - 1) + 1
    elif config.previous and len(context) != T:
        raise ValueError(f"--context gives {len(context)} frames, but {o.checkpoint} goes on from a whole clip: expected {T}")
    elif not config.previous and len(context) not in w.trained:
        raise ValueError(f"--context gives {len(context)} frames, but {o.checkpoint} was trained on {w.trained or 'no'} given "
                         f"frames (--task {config.task}): choose with --context-frames, or try --interpolate or --reconstruction")
    elif w.length <= len(context):
        raise ValueError(f"--length is {w.length}, but --context gives {len(context)} frames, which come first")
    return context


def pieces(o, config, w, denoiser, autoencoder, clips):
    """The videos of these numbers, piece by piece (B, t, C, H, W)."""
    shape, options, device = (len(clips), config.frames, config.channels, *config.size), dict(w.how), w.device
    given = None if w.context is None else w.context.expand(len(clips), *w.context.shape).to(device)
    if o.label is not None:
        options["label"] = torch.full((len(clips),), o.label, device=device)
    if o.motion is not None:
        options["motion"] = torch.full((len(clips),), o.motion, device=device)
    if w.actions is not None:
        options["action"] = w.actions.expand(len(clips), *w.actions.shape).to(device)
    with autocast(device, w.dtype):
        if o.interpolate:
            for k, factor in enumerate(o.interpolate):                 # each pass has noise of its own
                given = vdm.interpolate(denoiser, given, factor, config.frames, w.sigmas, o.seed + k, clips, **options)
            stream = [given]
        elif w.hints:
            noise = vdm.clip_noise(o.seed, clips, device)
            if config.motion and config.task == "image":               # which, unlike a clip, does not show it
                options.setdefault("motion", torch.special.ndtr(noise()))
            seen, mask = vdm.draw_context(given, torch.ones(given.shape[:2]), config.task, vdm.constant(w.level, given),
                                          noise(*shape[1:]))
            if w.actions is not None:                                  # after the last, none
                options["action"] = torch.nn.functional.pad(options["action"], (0, 0, 0, shape[1] - w.length), value=math.nan)
            stream = [vdm.generate(denoiser, shape, w.sigmas, noise=noise, context=seen, mask=mask, **options)[:, :w.length]]
        else:
            stream = vdm.rollout(denoiser, w.length, shape, w.sigmas, w.overlap, given, seed=o.seed, clips=clips,
                                 context_noise=w.level, anchors=w.anchors, jump=w.jump, **options)
        yield from autoencoder.to(device).stream(stream) if autoencoder else stream


class Lazy:
    """A clip whose frame t, make(t), is made when it is asked for."""

    def __init__(self, make):
        self.make = make

    def __getitem__(self, t):
        return self.make(t)


def write(o, stored, fps):
    """uint8 videos (n, T, H, W, C) as files: all in one, and one each -> what to say of them."""
    length = stored.shape[1]
    # a film strip of more frames is too wide to look at; pictures and GIFs need all of their pixels in memory
    strip = vdm.film_strip(vdm.from_uint8(stored[:8, :: -(-length // 32)]))
    together = Lazy(lambda t: vdm.grid(vdm.from_uint8(stored[:, [t]]))[0])
    files = [vdm.write_video(name, together, fps) for name in {o.out, o.out.with_suffix(".gif")} if length <= 64 or name == o.out]
    image = vdm.write_video(o.out.with_suffix(".png"), strip[None], scale=2)
    each = [vdm.write_video(o.folder / f"{i:03d}{o.out.suffix}", Lazy(lambda t: vdm.from_uint8(video[t])), fps)
            for i, video in enumerate(stored)]
    return (f"all videos: {' and '.join(map(str, sorted(files)))}; the first as a film strip: {image}; "
            f"each: {each[0]} ... {each[-1].name}")


def main(argv=None):
    o = parse(argv)
    (denoiser, config), (autoencoder, _) = vdm.load(o.checkpoint), vdm.load_autoencoder(o.checkpoint)
    w, steps, latents = plan(o, config), o.steps or config.sampling_steps, config.factor and not autoencoder
    w.device = pick_device(o.device)
    w.dtype = pick_dtype(o.dtype, w.device)
    w.sigmas = vdm.karras_sigmas(steps, config.sigma_min, config.sigma_max, config.rho)
    w.context = give(o, config, w, autoencoder) if o.context else None
    if o.motion is not None:
        pace = np.interp(o.motion, np.linspace(0, 1, len(denoiser.paces)), denoiser.paces)
        print(f"motion  {o.motion:.0%} of the clips trained on move less: by {pace:.1%} of the frame per frame")
    print(f"{o.checkpoint}: {o.n} videos of {w.length} frames, {w.how['sampler']} with {steps} steps, averaged weights, on "
          f"{w.device} in {str(w.dtype).removeprefix('torch.')}{f', noise of {w.level:g} on given frames' * bool(w.level)}")

    # all goes to a file as it comes: a video may be longer than fits into memory
    (H, W), channels = pixels(config)
    frame, kind = ((config.channels, *config.size), np.float32) if latents else ((H, W, channels), np.uint8)
    as_stored = (lambda x: x.cpu().numpy() / config.latent_scale) if latents else vdm.to_uint8
    o.folder.mkdir(parents=True, exist_ok=True)
    spool, n, length, began = tempfile.TemporaryFile(dir=o.out.parent), o.n, w.length, time.time()
    denoiser, bar = denoiser.to(w.device), tqdm(total=n * length, unit="frame", **BAR)
    try:
        for i in range(0, o.n, o.batch):
            clips, done = range(i, min(i + o.batch, o.n)), 0
            for piece in pieces(o, config, w, denoiser, autoencoder, clips):
                for k, frames in zip(clips, as_stored(piece)):
                    spool.seek((k * w.length + done) * math.prod(frame) * kind().itemsize)
                    spool.write(frames.tobytes())
                done += piece.shape[1]
                bar.update(piece.shape[0] * piece.shape[1])
    except KeyboardInterrupt:                                          # whole videos are kept or, of the first, what there is
        n, length = (i, length) if i else (len(clips), done)
        print(f"\nstopped by Ctrl-C: {n * bool(length)} videos of {length} frames are written")
        if not length:
            return
    finally:
        bar.close()
    spool.truncate(o.n * w.length * math.prod(frame) * kind().itemsize)
    stored = np.memmap(spool, kind, "r", shape=(o.n, w.length, *frame))[:n, :length]
    if latents:
        for i, video in enumerate(stored):
            np.save(o.folder / f"{i:03d}.npy", video)
        return print(f"{time.time() - began:.0f} s; latents, for the decoder where they come from: {o.folder}/*.npy")
    if w.actions is not None and n > 1:                                # as vdm.reward, frame by frame
        variance = np.mean([(stored[:, t] / 127.5).var(0, ddof=1).mean() for t in range(length)])
        print(f"reward  {math.exp(-variance):.3f} of these actions: exp(-variance among the {n} videos), 1 if all are the same")
    print(f"{time.time() - began:.0f} s; {write(o, stored, o.fps or config.fps)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory is full: a smaller --batch draws fewer videos at a time")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
