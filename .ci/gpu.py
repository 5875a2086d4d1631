"""
What this project does on a GPU, measured in one command of at most 8 minutes:

    python .ci/gpu.py            prints a table in Markdown, row by row
    python .ci/gpu.py --toy      the same at toy size, on any device: it shows that the script works

It needs no data and no weights. A row that fails says why, and the next one follows.
"""

import argparse
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import vdm  # noqa: E402

START = time.time()
SMALL = dict(width=32, mults=(1, 2), blocks=1, attention=("factorised", "none"), head_dim=16,
             frames=4, size=(8, 8))

def row(name, *cells):
    print(f"| {name} | {' | '.join(cells)} |  <!-- {time.time() - START:.0f} s -->", flush=True)

def seconds_of(step, device, least=1.0):
    """Seconds of one call of step, after a first one, over at least this long and 3 calls."""
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()
    wait()
    start = time.time()
    n = 0
    while n < 3 or time.time() - start < least:
        step()
        wait()
        n += 1
    return (time.time() - start) / n

def peak_flops(device, size):
    """Operations per second of a matrix product in bfloat16: what a network can at most reach."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return 2 * size ** 3 / seconds_of(lambda: a @ a, device)

# ---- the same numbers as on a CPU ----------------------------------------------------------------

def told_of(config, clip):
    """What a model of this config is told in training: the first frame."""
    mask = torch.zeros(clip.shape[:2], device=clip.device)
    mask[:, 0] = 1
    if config.give in ("svd", "vista"):
        token = torch.linspace(-1, 1, 1024, device=clip.device).expand(len(clip), -1)
        told = vdm.picture_conditions(clip[:, :1], fps=7, clip=token)
        if config.give == "vista":
            told |= dict(context=clip, mask=mask)
        return told
    if config.give == "previous":
        return dict(previous=clip)
    if config.give == "hint":
        return vdm.hint(clip, mask, 0.1 * torch.ones(len(clip), device=clip.device), clip)
    return dict(context=clip, mask=mask)

def compare(config, device):
    """Largest difference between CPU and device of estimate, loss, gradient and a drawn clip."""
    found = []
    for where in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = vdm.build(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.05)
        model = model.to(where)
        clip = torch.randn(2, config.frames, config.channels, *config.size).to(where)
        noise = torch.randn(clip.shape).to(where)
        told = told_of(config, clip)
        loss, error = vdm.diffusion_loss(model, clip, torch.tensor([0.5, 5.0], device=where), noise,
                                         **told)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        drawn = vdm.generate(model, clip.shape, vdm.karras_sigmas(4).to(where), **told)
        found.append([loss.reshape(1), error, torch.cat(gradients), drawn])
    return max(((a.cpu() - b.cpu()).abs().max() / a.abs().max().cpu()).item()
               for a, b in zip(*found))

def same_numbers(device):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    for give in ("concat", "hint", "replace", "per_frame", "previous", "svd", "vista"):
        config = vdm.Config(give=give, channels=4, patch=1, **SMALL)
        row(f"--give {give}: CPU and GPU differ by", f"{compare(config, device):.0e}")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True

# ---- tiny, by its command ------------------------------------------------------------------------

def train_tiny(device, steps, more=()):
    """Run the README's command; return its seconds per step, and the share of clips that pass."""
    out = ROOT / "out" / f"gpu-{int(time.time())}"
    command = [sys.executable, ROOT / "train.py", "--preset", "tiny", "--device", device.type,
               "--steps", str(steps), "--out", out, *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    rows = (out / "log.csv").read_text().splitlines()
    column = rows[0].split(",").index("seconds")
    times = [float(line.split(",")[column]) for line in rows[1:]]
    passed = [line.split()[1] for line in done.stdout.splitlines() if "passed" in line]
    return (times[-1] - times[len(times) // 2]) / (steps - steps // 2), passed

# ---- one step of a full configuration ------------------------------------------------------------

class Training:
    """A step of training in bfloat16, with AdamW and averaged weights, as train.py makes it."""

    def __init__(self, config, device, checkpointing):
        self.config = config
        self.device = device
        with device:
            self.model = vdm.build(config)
        self.ema = vdm.EMA(self.model, config.ema)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        for block in self.model.modules():
            if checkpointing and isinstance(block, (vdm.Block, vdm.Stage)):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def loss(self, batch):
        config = self.config
        shape = (batch, config.frames, config.channels, *config.size)
        clip = torch.randn(shape, device=self.device)
        sigma = torch.rand(batch, device=self.device) + 0.5
        with torch.autocast(self.device.type, torch.bfloat16):
            return vdm.diffusion_loss(self.model, clip, sigma, torch.randn_like(clip),
                                      **told_of(config, clip))[0]

    def step(self, batch):
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model)

def measure_training(name, config, device, checkpointing, peak, most):
    """Print seconds, share of peak and memory of a step, with the largest batch that fits."""
    training = Training(config, device, checkpointing)
    with FlopCounterMode(display=False) as counted:
        training.loss(1)
    batch = 1
    best = None
    while batch <= most:
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            took = seconds_of(partial(training.step, batch), device, least=0.5)
        except torch.OutOfMemoryError:
            break
        best = batch, took
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2 ** 30
        else:
            memory = float("nan")
        batch *= 2
    kind = "checkpointed" if checkpointing else "plain"
    if best is None:
        row(f"{name}, {kind}", "one clip does not fit")
        return
    batch, took = best
    share = 3 * counted.get_total_flops() * batch / took / peak      # backward is worth two forward
    row(f"{name}, {kind}, {batch} clips", f"{took:.2f} s", f"{share:.0%} of peak",
        f"{memory:.1f} GiB")

def dry_run(name):
    command = [sys.executable, ROOT / "train.py", "--preset", name, "--dry-run"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    row(f"{name}, --dry-run", *[" ".join(line.split()[1:]) for line in lines if "memory" in line])

@torch.no_grad()
def sample_svd(config, device):
    """Draw one clip with random weights, as sample.py does with the published ones."""
    with device:
        model = vdm.build(config).eval()
    clip = torch.randn(1, config.frames, config.channels, *config.size, device=device)
    denoise = vdm.guided_by(model, torch.linspace(1, 2.5, config.frames), ("concat", "clip"))
    sigmas = vdm.karras_sigmas(config.sampling_steps, config.sigma_min, config.sigma_max)
    start = time.time()
    with torch.autocast(device.type, torch.bfloat16):
        drawn = vdm.generate(denoise, clip.shape, sigmas.to(device), vdm.sample_ddim,
                             **told_of(config, clip))
    drawn.cpu()
    row(f"svd: one clip of {config.frames} frames, {config.sampling_steps} steps",
        f"{time.time() - start:.1f} s")

def attempt(job, *arguments):
    try:
        job(*arguments)
    except Exception as e:                                # a failed row must not cost the others
        row(job.__name__, f"failed: {type(e).__name__}: {str(e).splitlines()[0][:150]}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--toy", action="store_true", help="toy sizes, on a CPU where there is no GPU")
    o = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not o.toy:
        sys.exit("error: there is no GPU: --toy shows on a CPU that the script works")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, toy size"
    print(f"| {name}, PyTorch {torch.__version__} | |\n|---|---|")
    peak = peak_flops(device, 256 if o.toy else 8192)
    row("matrix product, bfloat16", f"{peak / 1e12:.2f} TFLOP/s")
    attempt(same_numbers, device)

    def tiny(steps, *more):
        took, passed = train_tiny(device, steps, more)
        row(f"tiny, {steps} steps, {' '.join(more)}", f"{1 / took:.1f} steps/s",
            f"clips that pass: {', '.join(passed)}")

    if o.toy:
        attempt(tiny, 4, "--marks", "2", "--size", "16", "16", "--sampling-steps", "2")
    else:
        attempt(tiny, 2000, "--marks", "192")
        attempt(tiny, 300, "--compile")
    for preset in ("ucf101", "svd"):
        config = vdm.PRESETS[preset]
        if o.toy:
            config = vdm.Config(**vars(config) | SMALL)
        most = 1 if o.toy else 64
        for checkpointing in (False, True):
            attempt(measure_training, preset, config, device, checkpointing, peak, most)
        if not o.toy:
            attempt(dry_run, preset)
    attempt(sample_svd, config, device)

if __name__ == "__main__":
    main()
