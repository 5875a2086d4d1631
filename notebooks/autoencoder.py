"""
autoencoder.py: train an autoencoder of frames, whose latents train.py --latents then diffuses.

    python notebooks/autoencoder.py                                         frames to latents
    python notebooks/autoencoder.py --stage decoder --latents out/autoencoder/last.pt
    python train.py --preset latent --latents out/decoder/last.pt

    python notebooks/autoencoder.py --preset planes                  clips to three planes (PVDM)
    python train.py --preset planes --latents out/autoencoder/last.pt

First encoder and decoder learn from single frames. Then the decoder's temporal layers alone learn
from clips, so that what the decoder fills in does not flicker (Video LDM). An autoencoder of planes
has one stage: all of it learns from clips. There is no --resume.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))       # vdm.py and train.py
import train
import vdm

def parse(argv):
    """Read flags into (options, Config). Steps and batch have defaults by stage."""
    p = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--preset", default="latent", choices=vdm.PRESETS)
    add("--data", default="shapes", help="shapes, drive, or a file or folder of videos")
    add("--stage", default="autoencoder", choices=["autoencoder", "decoder"])
    add("--latents", type=Path, help="with --stage decoder: last.pt of the first stage")
    add("--out", type=Path, help="folder of the run (default out/STAGE)")
    add("--frames", type=int, help="frames per clip")
    add("--size", type=int, nargs="+", help="height and width of the latents")
    add("--planes", type=int, nargs=3, help="instead, for planes: frames, height and width")
    add("--stride", type=int, help="take every stride-th frame of a file")
    add("--channels", type=int, help="channels of the latents")
    add("--factor", type=int, help="pixels to a latent along each side: 2, 4, 8 ...")
    add("--steps", type=int, help="optimiser steps (1600; --stage decoder: 240)")
    add("--batch", type=int, help="clips per step (16; --stage decoder: 4)")
    add("--lr", type=float, help="peak learning rate of AdamW")
    add("--marks", type=int, default=64, help="clips to measure and compare at the end")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"])
    options = p.parse_args(argv)
    options.given = {name: value for name, value in vars(options).items()
                     if value is not None and hasattr(vdm.Config, name)}
    if options.planes:
        options.given["planes"] = tuple(options.planes)
    usual = dict(steps=1600)
    if options.stage == "decoder":
        usual = dict(steps=240, batch=4)
    if options.size:
        options.given["size"] = (*options.size, *options.size)[:2]
    options.out = options.out or Path("out") / options.stage
    return options, dataclasses.replace(vdm.PRESETS[options.preset], **usual | options.given)

def train_step(step, config, options, clip, model, ema, optimizers):
    """Make one step: of the spatial layers, on single frames, or of temporal ones, on clips."""
    torch.manual_seed(options.seed * 1_000_003 + step)
    clip = clip.to(options.device)
    if options.stage == "autoencoder" and not config.planes:
        clip = clip[:, torch.randint(clip.shape[1], (1,))]                         # (B, 1, C, H, W)
    noise = torch.randn(*clip.shape[:2], config.channels, *config.size).to(options.device)
    noise.requires_grad_(options.stage == "decoder")             # see the noise in train.loss_of
    with train.autocast(options.device, options.dtype):
        if config.planes:
            error = model.decode(model.encode(clip)) - clip
            loss = error.abs().mean() + error.square().mean()
        else:
            loss, _ = vdm.ae_loss(model, clip, noise, temporal=float(options.stage == "decoder"))
    loss.backward()
    train.descend(step, config, model, optimizers)
    ema.update(model)
    return loss.item()

@torch.no_grad()
def finish(options, config, autoencoder, held_out):
    """Say and show what is lost of clips that it has not seen, and the next command."""
    real = torch.stack([held_out[i]["video"] for i in range(options.marks)])       # (N, T, C, H, W)
    made = torch.cat([autoencoder.decode(autoencoder.encode(clip[None].to(options.device))).cpu()
                      for clip in real])
    psnr = 10 * math.log10(4 / max((made - real).square().mean().item(), 1e-12))
    flicker = (made - real).diff(dim=1).abs().mean().item()
    print(f"PSNR {psnr:.1f} dB, flicker {flicker:.4f} (of {len(real)} clips, averaged weights)")
    if psnr < 25:
        print("warning: below 25 dB a diffusion model learns the autoencoder's faults: train "
              "longer, or with more --channels or a smaller --factor")
    both = torch.cat([real, made], dim=3)[:8]                                      # real above made
    last = options.out / "last.pt"
    print("files  ", vdm.write_video(options.out / "recon.mp4", vdm.grid(both), config.fps),
          vdm.write_video(options.out / "recon.png", vdm.film_strip(both[:4])[None], scale=1), last,
          sep="\n        ")
    command = f"python notebooks/autoencoder.py --preset {options.preset} --stage decoder"
    if options.stage == "decoder" or config.planes:
        command = f"python train.py --preset {options.preset}"
    for name in ("data", "frames", "size", "stride"):            # the next must have them, too
        value = getattr(options, name)
        if value not in (None, "shapes"):
            command += f" --{name} " + str(value).strip("[]").replace(",", "")
    print(f"next    {command} --latents {last}")

def main(argv=None):
    options, config = parse(argv)
    for expected, names in vdm.LIMITS.items():
        vdm.limit(names, *expected, options, config)
    if (options.out / "last.pt").exists():
        raise ValueError(f"{options.out} already holds a run: name another --out")
    if config.planes and (options.stage == "decoder" or options.frames or options.size):
        raise ValueError("an autoencoder of planes has one stage, and --planes instead of --frames "
                         "and --size")
    if (options.stage == "decoder") != (options.latents is not None):
        raise ValueError("--stage decoder goes on from the first stage, and it alone: it needs "
                         "--latents out/autoencoder/last.pt")
    options.device = train.pick_device(options.device)
    options.dtype = train.pick_dtype(options.dtype, options.device)
    options.local = 0
    options.workers = 0
    options.parts = [slice(0, config.batch)]
    options.data_fps = None
    torch.manual_seed(options.seed)
    if options.latents:
        model, config = train.find_autoencoder(options, config, {})
    else:
        model = vdm.build_autoencoder(config).to(options.device)
    model.requires_grad_(options.stage == "autoencoder")
    for module in model.modules():
        if isinstance(module, vdm.TemporalConv):
            module.requires_grad_(options.stage == "decoder")
    size, channels = train.pixels(config)
    clips = dataclasses.replace(config, frames=vdm.clip_frames(config), size=size,
                                channels=channels, factor=0, planes=(), give="concat")
    data, held_out, _ = train.open_data(options, clips, None)
    ema = vdm.EMA(model, config.ema)
    optimizers = train.make_optimizers(config, model)
    print(f"model   {options.stage}, {sum(p.numel() for p in model.parameters()):,} parameters\n"
          f"device  {options.device}, {options.dtype} arithmetic, float32 weights")
    batches = train.read_batches(data, config, options, 0)
    bar = tqdm(batches, total=config.steps, **train.BAR)
    for step, batch in enumerate(bar):
        loss = train_step(step, config, options, batch["video"], model, ema, optimizers)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    if options.stage == "autoencoder" and not config.planes:
        ema.model.measure(held_out[i]["video"][None].to(options.device)
                          for i in range(options.marks))
    vdm.save(options.out / "last.pt", config=dataclasses.asdict(config), stage=options.stage,
             ema=ema.model.cpu().state_dict(), step=config.steps)
    finish(options, config, ema.model.to(options.device), held_out)

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped: nothing is saved")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
