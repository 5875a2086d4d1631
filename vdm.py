"""
vdm.py: video diffusion models in one file, to be read from top to bottom.

Add noise to video clips, train a network to tell the clean clip behind the noise, and then start from
pure noise and let it guess, step by step, a clip that was never there. That is all of it:

    sigma = schedule(u)                               how much noise: sigma rises with u in (0, 1)
    x     = clean + sigma * noise                     the one corruption everything below is about
    guess = denoiser(x, sigma)                        the network's estimate of `clean`
    loss  = weight(sigma) * (guess - clean)^2         training: make that estimate good at every sigma
    x     = x + (sigma' - sigma) * (x - guess) / sigma        sampling: walk from large sigma to 0

Map    1 Config        every number of a run, and the presets
       2 Noise         schedules sigma(u), offset noise, and what the network is asked to predict
       3 Denoiser      network + scalings + frames that are given -> an estimate of the clean clip
       4 Losses        the weighted denoising error; PVDM's joint objective
       5 Samplers      DDPM, DDIM, Heun, DPM-Solver++(2M); DDIM inversion
       6 Generation    guidance; one window of frames; videos of any length
       7 Network       a factorised space-time UNet
       8 EMA           the running average of the weights, which is what one samples from
       9 World         MovingShapes, a toy world that can mark its own videos
      10 Video files   read and write them; a dataset from a folder of them
      11 Models        build, save, load

Axes   B clips, T frames, C channels, H height, W width; a clip is always (B, T, C, H, W), float in [-1, 1].
       Only files hold bytes, uint8 (T, H, W, C): to_uint8 and from_uint8 are the one bridge each way.
Names  u        place on the schedule, in (0, 1)     sigma    noise level (B,), or (B, T): one per frame
       denoise  a function (x, sigma) -> clean       sigmas   falling levels of a sampler, the last is 0
       context  given frames (B, T, C, H, W)         mask     (B, T), 1 where a frame is given
       scale    guidance: 1 is plain conditional, 0 unconditional, above 1 exaggerates the condition

Papers Ho et al. 2020 (DDPM, arXiv 2006.11239); Song et al. 2020 (DDIM, 2010.02502); Ho et al. 2022 (VDM,
       Video Diffusion Models, 2204.03458); Karras et al. 2022 (EDM, 2206.00364); Lu et al. 2022
       (DPM-Solver++, 2211.01095); Singer et al. 2022 (Make-A-Video, 2209.14792); Blattmann et al. 2023
       (Video LDM, 2304.08818, and SVD, 2311.15127); Yu et al. 2023 (PVDM, 2302.07685); Hang et al. 2023
       (min-SNR, 2303.09556); Chen et al. 2024 (diffusion forcing, 2407.01392); Gao et al. 2024 (Vista,
       2405.17398); Li and He 2025 (JiT, 2511.13720).
"""

import copy
import dataclasses
import math
import os
import re
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

# ======================================================================================================
# 1. Config
# ======================================================================================================
# One dataclass holds every number of a run; train.py makes a flag of each field and shows its comment as
# help. No class below reads it: they take plain arguments, and build(config) at the very end hands them over.

@dataclasses.dataclass
class Config:
    # the clip
    frames: int = 8                     # frames per clip
    size: tuple = (32, 32)              # height and width in pixels
    channels: int = 3                   # 3 for colour, 1 for grey
    stride: int = 1                     # take every stride-th frame of a file
    fps: float = 8.0                    # frames per second of the videos written
    # the network
    width: int = 64                     # channels of the first level
    mults: tuple = (1, 2)               # channels of each level, as multiples of width
    blocks: int = 1                     # residual blocks per level
    attention: tuple = (2,)             # downsampling factors at which there is attention
    joint: tuple = (2,)                 # factors at which temporal attention sees all places of all frames
    head_dim: int = 32                  # channels per attention head
    patch: int = 4                      # frames are cut into patch x patch tiles first
    dropout: float = 0.0                # dropout in the residual blocks
    # the diffusion
    kind: str = "x0"                    # what the network predicts: eps, v, x0 or edm
    sigma_data: float = 0.5             # standard deviation of the data (read by kind and weighting edm)
    schedule: str = "lognormal"         # training noise levels: linear, scaled_linear, cosine, sigmoid, lognormal
    mean: float = 0.5                   # lognormal: mean of log sigma
    std: float = 1.4                    # lognormal: standard deviation of log sigma
    base: int = 0                       # resolution shift: noise as seen at this resolution (0: no shift)
    weighting: str = "edm"              # weight of the error over sigma: eps, v, x0, edm or min_snr
    gamma: float = 25.0                 # min_snr: largest weight
    offset: float = 0.0                 # offset noise: strength of the part constant over a frame
    offset_per_frame: bool = False      # offset noise: one draw per frame instead of per clip
    # frames that are given
    context: tuple = (1.0,)             # probabilities that the first 0, 1, 2 ... frames are given
    previous: bool = False              # condition on the whole clip before (PVDM) instead of single frames
    joint_weight: float = 0.5           # PVDM's lambda: share of the conditional term of the loss
    # training
    steps: int = 1000                   # optimiser steps
    batch: int = 16                     # clips per step
    optimizer: str = "adamw"            # adamw, or muon (AdamW for all that is not a matrix)
    lr: float = 1e-3                    # peak learning rate of AdamW
    muon_lr: float = 0.02               # peak learning rate of Muon
    warmup: int = 50                    # steps of linear rise; then the rate falls to 0 in a straight line
    weight_decay: float = 0.01          # AdamW's
    clip_norm: float = 1.0              # largest norm of the gradient
    ema: float = 0.995                  # decay of the averaged weights
    # sampling
    sampler: str = "heun"               # ddpm, ddim, heun or dpmpp_2m
    sampling_steps: int = 20            # noise levels visited (heun evaluates the network twice at each but the last)
    sigma_min: float = 0.05             # smallest noise level visited
    sigma_max: float = 80.0             # noise level at which sampling starts
    rho: float = 7.0                    # bend of the grid between them: larger dwells at small levels
    overlap: int = 4                    # frames each window of a long video takes over from the one before

PRESETS = {                             # a preset is a set of defaults; any flag after it wins
    # the toy world on a laptop: what the defaults above are made for
    "tiny": Config(context=(0.6, 0.1, 0.05, 0.05, 0.2), optimizer="muon", lr=2e-3),
    # Moving MNIST (mnist_test_seq.npy), 20 frames of 64 x 64: the usual first data set, about 10 M parameters
    "mnist": Config(frames=20, size=(64, 64), channels=1, width=96, mults=(1, 2, 3), attention=(2, 4), joint=(4,),
                    context=(0.5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.5), steps=20_000, optimizer="muon", lr=2e-3, ema=0.999,
                    overlap=10),
}

# ======================================================================================================
# 2. Noise: how much, and of which kind
# ======================================================================================================
# Everything is said in one variable: x = clean + sigma * noise. The variance-preserving variable z of the
# DDPM papers is the same thing at another scale: z = x / sqrt(1 + sigma^2), so that alpha = 1 / sqrt(1 +
# sigma^2), SNR = alpha^2 / sigma_vp^2 = 1 / sigma^2 and logSNR = -2 log sigma. A noise schedule is then no
# more than a rising curve sigma(u), u in (0, 1): train with sigma(random u), sample along sigma(1 ... 0).

def expand(sigma, x):
    """Give sigma (), (B,) or (B, T) the trailing axes it needs to multiply a clip x (B, T, C, H, W)."""
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim)) if sigma.ndim else sigma


def from_betas(u, betas):
    """sigma(u) of a discrete DDPM schedule: abar_t = prod(1 - beta), sigma_t = sqrt((1 - abar) / abar),
    straight lines in log sigma between the steps (Ho et al. 2020, eq. 4)."""
    abar = np.cumprod(1 - betas)
    log_sigma = 0.5 * (np.log1p(-abar) - np.log(abar))
    at = np.interp(u.double().cpu().numpy(), np.linspace(0, 1, len(betas)), log_sigma)
    return torch.as_tensor(np.exp(at), dtype=torch.float32, device=u.device).reshape(u.shape)


def linear(u, start=1e-4, end=0.02, steps=1000):
    """beta rises in a straight line (Ho et al. 2020)."""
    return from_betas(u, np.linspace(start, end, steps))


def scaled_linear(u, start=0.0015, end=0.0195, steps=1000):
    """sqrt(beta) rises in a straight line. The defaults are PVDM's; Stable Diffusion has 0.00085, 0.012.
    Beware: the configuration files of latent diffusion call this one "linear"."""
    return from_betas(u, np.linspace(start ** 0.5, end ** 0.5, steps) ** 2)


def cosine(u, logsnr_max=20.0):
    """logSNR = -2 log tan(a u + b), cut to [-logsnr_max, logsnr_max] (Video Diffusion Models, app. A)."""
    b = math.atan(math.exp(-logsnr_max / 2))
    return torch.tan((math.pi / 2 - 2 * b) * u.double() + b).float()


def sigmoid(u, start=-3.0, end=3.0, tau=1.0, logsnr_max=20.0):
    """abar(u) is a piece of a logistic curve from 1 to 0 (Jabri et al. 2022; diffusion forcing)."""
    s = lambda t: torch.sigmoid(torch.as_tensor(t, dtype=torch.float64) / tau)
    at = s(u.double() * (end - start) + start)
    clean, noise = s(end) - at, at - s(start)                      # abar and 1 - abar, up to one factor
    return (noise / clean).sqrt().clamp(math.exp(-logsnr_max / 2), math.exp(logsnr_max / 2)).float()


def lognormal(u, mean=-1.2, std=1.2):
    """log sigma ~ Normal(mean, std) when u is uniform (Karras et al. 2022; SVD and Vista: 1.0, 1.6)."""
    return torch.exp(mean + std * torch.special.ndtri(u.double())).float()


SCHEDULES = dict(linear=linear, scaled_linear=scaled_linear, cosine=cosine, sigmoid=sigmoid, lognormal=lognormal)

def resolution_shift(sigma, size, base=64):
    """A schedule made for base x base frames, at frames of size (H, W): neighbouring pixels repeat each
    other, so the same damage needs more noise: logSNR + 2 log(base / resolution) (Hoogeboom et al. 2023)."""
    return sigma * math.sqrt(size[0] * size[1]) / base


def karras_sigmas(n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """(n + 1,) falling noise levels for a sampler, evenly spaced in sigma^(1/rho); the last is 0 (EDM eq. 5)."""
    ramp = np.linspace(0, 1, n) if n > 1 else np.zeros(1)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.tensor([*sigmas, 0.0], dtype=torch.float32)


def stratified(n):
    """(n,) numbers, each uniform in (0, 1), that together cover it evenly: a batch that sees every noise
    level has a less noisy gradient (Kingma et al. 2021, app. I.1)."""
    return ((torch.rand(1) + torch.arange(n) / n) % 1).clamp(1e-5, 1 - 1e-5)


def offset_noise(noise, strength, per_frame=False):
    """Add to unit noise (B, T, C, H, W) a part that is constant over H and W: one draw per clip and channel,
    or with per_frame one per frame and channel (what the Vista code does, with strength 0.02).

    White noise hardly touches the mean of a picture, so a network never learns to move it; this does. For
    training only. At small frames use more: the mean of white noise already has std 1 / sqrt(H W)."""
    B, T, C = noise.shape[:3]
    return noise + strength * torch.randn(B, T if per_frame else 1, C, 1, 1, device=noise.device)


def scalings(sigma, kind, sigma_data=0.5):
    """c_skip, c_out, c_in, c_noise, each of sigma's shape: clean = c_skip x + c_out net(c_in x, c_noise).

    kind says what the network's output is, in terms of the variance-preserving z = x / sqrt(1 + sigma^2):
      eps  the noise            clean = x - sigma eps                                  (Ho et al. 2020)
      v    alpha eps - sigma_vp clean: noise at small sigma, minus the clip at large   (Salimans and Ho 2022)
      x0   the clean clip       right where a token holds more numbers than the network is wide, for noise
                                has no structure that would let it through             (Li and He 2025)
      edm  as v, for data of standard deviation sigma_data                             (Karras et al. 2022)"""
    c_noise = sigma.clamp(min=1e-4).log() / 4                          # a clean frame, sigma 0, is merely very small
    root = (sigma ** 2 + (sigma_data ** 2 if kind == "edm" else 1)).sqrt()
    if kind == "eps":
        return torch.ones_like(sigma), -sigma, 1 / root, c_noise
    if kind == "v":
        return 1 / root ** 2, -sigma / root, 1 / root, c_noise
    if kind == "x0":
        return torch.zeros_like(sigma), torch.ones_like(sigma), 1 / root, c_noise
    if kind == "edm":
        return sigma_data ** 2 / root ** 2, sigma * sigma_data / root, 1 / root, c_noise
    raise ValueError(f"kind is {kind!r}, expected one of eps, v, x0, edm")


# ======================================================================================================
# 3. The denoiser
# ======================================================================================================

class Denoiser(nn.Module):
    """forward(x, sigma, context, mask, previous) -> the estimate of the clean clip, (B, T, C, H, W).

    x         noisy clip (B, T, C, H, W), x = clean + sigma * noise
    sigma     (B,), or (B, T) where every frame has its own (diffusion forcing, FVDM)
    context   clean frames (B, T, C, H, W) and mask (B, T), 1 where they are given: the network sees
              (mask * context, mask) as further channels of its input (Video LDM, sec. 3.2); given frames
              come back untouched and so have no loss. What context holds elsewhere does not matter.
    previous  the whole clip before this one (B, T, C, H, W), as further channels (PVDM, sec. 3.3)

    net(inputs, c_noise) takes inputs (B, T, 2 C + 1, H, W), or 3 C + 1 with previous=True, and c_noise
    (B, T). Video LDM and PVDM say "no condition" as zeros, and so do the defaults here."""

    def __init__(self, net, kind="edm", sigma_data=0.5, previous=False):
        super().__init__()
        self.net, self.kind, self.sigma_data, self.takes_previous = net, kind, sigma_data, previous

    def forward(self, x, sigma, context=None, mask=None, previous=None):
        if previous is not None and not self.takes_previous:
            raise ValueError("this model was not trained on a previous clip: leave previous out, or build it with "
                             "previous=True")
        sigma = sigma[:, None].expand(x.shape[:2]) if sigma.ndim == 1 else sigma               # (B, T)
        c_skip, c_out, c_in, c_noise = scalings(sigma, self.kind, self.sigma_data)
        mask = x.new_zeros(x.shape[:2]) if mask is None else mask.to(x.dtype)
        mask = expand(mask, x)                                                                 # (B, T, 1, 1, 1)
        context = torch.zeros_like(x) if context is None else torch.where(mask > 0, context, 0)
        inputs = [expand(c_in, x) * x, context, mask.expand_as(x[:, :, :1])]
        if self.takes_previous:
            inputs.append(torch.zeros_like(x) if previous is None else previous)
        out = self.net(torch.cat(inputs, 2), c_noise).to(x.dtype)                              # (B, T, C, H, W)
        clean = expand(c_skip, x) * x + expand(c_out, x) * out
        return torch.where(mask > 0, context, clean)


# ======================================================================================================
# 4. Losses
# ======================================================================================================

def loss_weight(sigma, weighting, sigma_data=0.5, gamma=5.0):
    """Weight of the squared error of the clean estimate, of sigma's shape. With SNR = 1 / sigma^2:
    x0 1, eps SNR, v SNR + 1, edm SNR + 1 / sigma_data^2: a unit weight on the error of that prediction.
    min_snr min(SNR, gamma): large weights, all of them at small sigma, are cut (Hang et al. 2023, eq. 7)."""
    snr = sigma ** -2.0
    weights = dict(x0=torch.ones_like(snr), eps=snr, v=snr + 1, edm=snr + sigma_data ** -2, min_snr=snr.clamp(max=gamma))
    if weighting not in weights:
        raise ValueError(f"weighting is {weighting!r}, expected one of {', '.join(weights)}")
    return weights[weighting]


def diffusion_loss(denoiser, clean, sigma, noise, weighting="edm", sigma_data=0.5, gamma=5.0, **cond):
    """E[ weight(sigma) |denoiser(clean + sigma noise, sigma, cond) - clean|^2 ] (EDM eq. 2), a scalar, and
    its parts by name: `error` (B,), the plain squared error of every clip. clean, noise (B, T, C, H, W);
    sigma (B,) or (B, T). For prediction pass context=clean and a mask: given frames add nothing."""
    estimate = denoiser(clean + expand(sigma, clean) * noise, sigma, **cond)
    error = (estimate - clean) ** 2                                                            # (B, T, C, H, W)
    loss = (expand(loss_weight(sigma, weighting, sigma_data, gamma), clean) * error).mean()
    return loss, dict(error=error.detach().flatten(1).mean(1))


def joint_loss(denoiser, clean, previous, sigma, noise, share=0.5, **options):
    """PVDM eq. 9: share * (loss given the clip before) + (1 - share) * (loss given nothing), so that one
    network both starts a video and continues it. Arguments as in diffusion_loss."""
    given, parts = diffusion_loss(denoiser, clean, sigma, noise, previous=previous, **options)
    free, parts_free = diffusion_loss(denoiser, clean, sigma, noise, **options)
    return share * given + (1 - share) * free, dict(error=parts_free["error"], error_given=parts["error"])


def draw_mask(batch, frames, probabilities):
    """mask (B, T) whose first n frames are given, n = 0, 1, 2 ... drawn with the given probabilities."""
    n = torch.multinomial(torch.tensor(probabilities, dtype=torch.float32), batch, replacement=True)
    return (torch.arange(frames) < n[:, None]).float()


# ======================================================================================================
# 5. Samplers
# ======================================================================================================
# Each is a plain function (denoise, x, sigmas, randn) -> clip. denoise(x, sigma) returns a clean estimate and
# nothing more is known of it; x is sigmas[0] * noise; sigmas falls to 0, as karras_sigmas makes it; randn(x)
# draws unit noise of x's shape and is called by the stochastic ones only. The direction of every step is
# (x - clean) / sigma, the network's estimate of the noise.

def at(sigma, x):
    """The same noise level (a number) for every clip of x."""
    return torch.full((len(x),), float(sigma), device=x.device)


@torch.no_grad()
def sample_ddpm(denoise, x, sigmas, randn=torch.randn_like, gamma=0.0):
    """Ancestral sampling (Ho et al. 2020, alg. 2): to the mean of q(x_next | x, clean), plus fresh noise. Its
    variance is the posterior's for gamma 0, the forward step's for gamma 1, between them as in VDM."""
    for s, t in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        clean = denoise(x, at(s, x))
        keep = (t / s) ** 2
        x = clean + keep * (x - clean)
        if t > 0:
            low, high = (1 - keep) * t ** 2, (1 - keep) * s ** 2 * (1 + t ** 2) / (1 + s ** 2)
            x = x + math.sqrt(low ** (1 - gamma) * high ** gamma) * randn(x)
    return x


@torch.no_grad()
def sample_ddim(denoise, x, sigmas, randn=torch.randn_like, eta=0.0):
    """Song et al. 2020, eq. 12. eta 0: deterministic, Euler's method in sigma; eta 1: the same as DDPM."""
    for s, t in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        clean = denoise(x, at(s, x))
        fresh = eta * t * math.sqrt(1 - (t / s) ** 2)                  # std of the noise drawn anew
        x = clean + math.sqrt(t ** 2 - fresh ** 2) * (x - clean) / s
        if fresh > 0:
            x = x + fresh * randn(x)
    return x


@torch.no_grad()
def sample_heun(denoise, x, sigmas, randn=None):
    """EDM alg. 1: an Euler step, then again with the mean of the slopes at both ends. Error O(step^2) for
    two evaluations a step, but one for the last, whose far end would be a division by 0."""
    for s, t in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        slope = (x - denoise(x, at(s, x))) / s
        ahead = x + (t - s) * slope
        if t > 0:
            slope = (slope + (ahead - denoise(ahead, at(t, x))) / t) / 2
        x = x + (t - s) * slope
    return x


@torch.no_grad()
def sample_dpmpp_2m(denoise, x, sigmas, randn=None):
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2): exact for a constant estimate, extrapolates it from the last
    two in -log sigma. Error O(step^2) for one evaluation a step."""
    last = h_last = None
    for s, t in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        clean = denoise(x, at(s, x))
        if t == 0:
            return clean
        h = math.log(s / t)
        ahead = clean if last is None else clean + h / (2 * h_last) * (clean - last)
        x = t / s * x + (1 - t / s) * ahead                            # t / s = exp(-h)
        last, h_last = clean, h
    return x


SAMPLERS = dict(ddpm=sample_ddpm, ddim=sample_ddim, heun=sample_heun, dpmpp_2m=sample_dpmpp_2m)


@torch.no_grad()
def invert_ddim(denoise, x, sigmas, iterations=1):
    """Walk sample_ddim backwards: the noise sigmas[0] * n from which it would reach the clip x.

    The step from s down to t is undone by solving y = x + (s - t) (y - denoise(y, s)) / s for y. One
    iteration, from y = x, is the usual inversion (the network sees the target level but the source clip);
    a few more make the round trip exact where the step is small enough to be a contraction."""
    for s, t in zip(sigmas.flip(0)[1:].tolist(), sigmas.flip(0)[:-1].tolist()):
        y = x
        for _ in range(iterations):
            y = x + (s - t) * (y - denoise(y, at(s, y))) / s
        x = y
    return x

# ======================================================================================================
# 6. Generation
# ======================================================================================================

def guided(denoise, scale):
    """Context guidance: free + scale * (given - free), where free is the estimate without any condition
    (Video LDM eq. 4; classifier-free guidance). scale is a number or one value per frame (T,), as in SVD
    and Vista; 1 is the plain conditional estimate, 0 the unconditional one."""
    scale = torch.as_tensor(scale, dtype=torch.float32)

    def guided_denoise(x, sigma, **cond):
        given, free = denoise(x, sigma, **cond), denoise(x, sigma)
        out = free + scale.to(x.device).reshape(-1, 1, 1, 1) * (given - free)                  # (B, T, C, H, W)
        if cond.get("mask") is None:
            return out
        return torch.where(expand(cond["mask"], x) > 0, given, out)    # frames that are given stay as they are

    return guided_denoise


def clip_noise(seed, clips, device="cpu"):
    """A function shape -> unit noise (len(clips), *shape), from one CPU generator per clip number: clip 3 of
    8 is the clip 3 drawn alone, on any device."""
    seeds = [int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0] >> 1) for i in clips]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return lambda *shape: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


def generate(denoiser, shape, sigmas, sampler="heun", guidance=1.0, noise=None, seed=0, **cond):
    """One window of video (B, T, C, H, W) = shape, along the noise levels sigmas. cond goes to the denoiser:
    context and mask, previous. noise: as clip_noise makes it; by default clips 0 ... B - 1 of the seed."""
    device = next(denoiser.parameters()).device
    noise = noise or clip_noise(seed, range(shape[0]), device)
    plain = not cond or (torch.as_tensor(guidance) == 1).all()         # then one evaluation does, not two
    denoise = partial(denoiser if plain else guided(denoiser, guidance), **cond)
    return SAMPLERS[sampler](denoise, sigmas[0].item() * noise(*shape[1:]), sigmas, lambda x: noise(*x.shape[1:]))


def rollout(denoiser, length, shape, sigmas, overlap=4, context=None, seed=0, clips=None, **options):
    """Yield a video of any length in pieces (B, n, C, H, W), window after window of shape (B, T, C, H, W), so
    that memory does not grow with the length. torch.cat(list(rollout(...)), 1) is the whole of it.

    Each window is given the last `overlap` frames of the video so far (Video LDM, Vista) or, if the denoiser
    takes one, the whole window before it (PVDM; overlap is then not used). context (B, n, C, H, W): frames to
    start from, which come first in the video. clips: their numbers, which fix their noise."""
    B, T = shape[:2]
    device = next(denoiser.parameters()).device
    noise = clip_noise(seed, range(B) if clips is None else clips, device)
    tail = torch.zeros(B, 0, *shape[2:], device=device) if context is None else context.to(device)
    if denoiser.takes_previous:
        if tail.shape[1] not in (0, T):
            raise ValueError(f"context has {tail.shape[1]} frames, but this model continues whole clips: give {T} frames")
    elif not 0 < overlap < T or tail.shape[1] >= T:
        raise ValueError(f"overlap is {overlap} and the context has {tail.shape[1]} frames; both must leave room in a "
                         f"window of {T}: overlap 1 to {T - 1}, context 0 to {T - 1}")
    if length < tail.shape[1]:
        raise ValueError(f"length is {length}, but the context alone has {tail.shape[1]} frames: ask for more")
    if tail.shape[1]:
        yield tail
    done = tail.shape[1]
    while done < length:
        cond, given = {}, tail.shape[1]
        if given and denoiser.takes_previous:
            cond, given = dict(previous=tail), 0
        elif given:
            context = torch.cat([tail, tail.new_zeros(B, T - given, *shape[2:])], 1)           # (B, T, C, H, W)
            cond = dict(context=context, mask=(torch.arange(T, device=device) < given).float().expand(B, T))
        window = generate(denoiser, shape, sigmas, noise=noise, **options, **cond)
        new = window[:, given:][:, : length - done]
        done += new.shape[1]
        tail = window if denoiser.takes_previous else window[:, -overlap:]
        yield new


# ======================================================================================================
# 7. The network: a factorised space-time UNet
# ======================================================================================================
# Space and time are handled in turn. A spatial layer sees frames as a batch of pictures, "(b t) c h w"; a
# temporal layer sees every place as a batch of little histories. Every temporal layer is a gated residual,
# x + gate * f(x), whose gate starts at exactly 0: a fresh video network IS an image network applied frame
# by frame, and may be built on one that is already trained (Make-A-Video; Video LDM's alpha = 1). Only the
# gate is zero, never the layer behind it too: each would multiply the other's gradient by zero.

def normalize(channels):
    """GroupNorm with 32 groups, or the largest number below that divides the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def zero(layer):
    """Start a layer at zero, so that the residual branch it ends adds nothing at first."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def fourier(t, dim, max_period=1e4):
    """cos and sin of t (...) at dim / 2 frequencies from 1 down to 1 / max_period -> (..., dim)."""
    freqs = torch.exp(-math.log(max_period) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[..., None] * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, all (N, heads, L, d). Many short sequences, as temporal layers have them,
    are several times faster on a CPU as two plain matrix products than in the fused kernel."""
    if q.device.type == "cpu" and q.shape[-2] <= 256:
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def rotate(x, position):
    """Rotary positions (Su et al. 2021): turn pairs of features of x (N, heads, L, d) by angles proportional
    to position (L, axes), so that a product of two tokens depends on the distance between them. The axes
    share the d / 2 pairs in turn; wavelengths run from 2 pi to about 600 frames or places."""
    pairs, axes = x.shape[-1] // 2, position.shape[-1]
    j = torch.arange(pairs, device=x.device)
    angle = position[:, j % axes] * 100.0 ** (-(j // axes) * axes / pairs)          # (L, d / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class SpatialResBlock(nn.Module):
    """Two 3x3 convolutions per frame, scaled and shifted by the noise level (VDM: 2-D conv -> 1x3x3)."""

    def __init__(self, dim_in, dim, dim_emb, dropout=0.0):
        super().__init__()
        self.norm1, self.conv1 = normalize(dim_in), nn.Conv2d(dim_in, dim, 3, padding=1)
        self.emb = nn.Linear(dim_emb, 2 * dim)
        self.norm2, self.conv2 = normalize(dim), zero(nn.Conv2d(dim, dim, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(dim_in, dim, 1) if dim_in != dim else nn.Identity()

    def forward(self, x, emb):                                         # (B, T, C, H, W), (B, T, E)
        B, T = x.shape[:2]
        x = x.flatten(0, 1)                                            # (B T, C, H, W)
        scale, shift = self.emb(emb.flatten(0, 1))[..., None, None].chunk(2, 1)     # (B T, C, 1, 1) each
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(F.silu(h)))
        return (self.skip(x) + h).unflatten(0, (B, T))                 # (B, T, C, H, W)


class TemporalConv(nn.Module):
    """A convolution over three neighbouring frames at every place (Make-A-Video's pseudo-3D), gated."""

    def __init__(self, dim):
        super().__init__()
        # transpose + Conv3d(3, 1, 1) keeps the memory layout: several times faster than folding for Conv1d
        self.norm, self.conv = normalize(dim), nn.Conv3d(dim, dim, (3, 1, 1), padding=(1, 0, 0))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x):                                              # (B, T, C, H, W)
        h = F.silu(self.norm(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        h = self.conv(h.transpose(1, 2)).transpose(1, 2)               # over (B, C, T, H, W) and back
        return x + self.gate * h


class SpatialAttention(nn.Module):
    """Every place of a frame looks at every other place of the same frame."""

    def __init__(self, dim, head_dim=32):
        super().__init__()
        self.norm, self.heads = normalize(dim), dim // head_dim
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), zero(nn.Linear(dim, dim))

    def forward(self, x):                                              # (B, T, C, H, W)
        B, T, C, H, W = x.shape
        h = self.norm(x.flatten(0, 1))
        h = rearrange(h, "n c h w -> n (h w) c")
        q, k, v = rearrange(self.qkv(h), "n l (three heads d) -> three n heads l d", three=3, heads=self.heads)
        h = self.out(rearrange(attention(q, k, v), "n heads l d -> n l (heads d)"))
        return x + rearrange(h, "(b t) (h w) c -> b t c h w", b=B, h=H)


class TemporalAttention(nn.Module):
    """Every place looks at itself in all frames; joint: at every place of every frame. Gated.

    Frames are told apart by rotary angles of their index, so that only distances in time count (as the
    relative positions of VDM) and a clip may be longer than those trained on. With its feed-forward part
    this is the transformer block of Video LDM and SVD."""

    def __init__(self, dim, head_dim=32, joint=False):
        super().__init__()
        self.norm, self.heads, self.joint = normalize(dim), dim // head_dim, joint
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.ff = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x):                                              # (B, T, C, H, W)
        B, T, C, H, W = x.shape
        h = self.norm(x.flatten(0, 1)).unflatten(0, (B, T))
        tokens = "b (t h w) c" if self.joint else "(b h w) t c"
        h = rearrange(h, f"b t c h w -> {tokens}")
        q, k, v = rearrange(self.qkv(h), "n l (three heads d) -> three n heads l d", three=3, heads=self.heads)
        axes = (T, H, W) if self.joint else (T,)
        position = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in axes)).reshape(-1, len(axes))
        q, k = rotate(q, position), rotate(k, position)
        h = self.out(rearrange(attention(q, k, v), "n heads l d -> n l (heads d)"))
        h = h + self.ff(h)
        return x + self.gate * rearrange(h, f"{tokens} -> b t c h w", b=B, t=T, h=H, w=W)


class Block(nn.Module):
    """One step of the UNet: space, then time; then, on the levels that have it, attention in the same order."""

    def __init__(self, dim_in, dim, dim_emb, attend, joint, head_dim, dropout):
        super().__init__()
        self.space, self.time = SpatialResBlock(dim_in, dim, dim_emb, dropout), TemporalConv(dim)
        self.space_attention = SpatialAttention(dim, head_dim) if attend else nn.Identity()
        self.time_attention = TemporalAttention(dim, head_dim, joint) if attend else nn.Identity()

    def forward(self, x, emb):                                         # (B, T, C, H, W), (B, T, E)
        return self.time_attention(self.space_attention(self.time(self.space(x, emb))))


class PerFrame(nn.Module):
    """Apply a picture layer to every frame of a clip."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):                                              # (B, T, C, H, W)
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class VideoUNet(nn.Module):
    """forward(x, c_noise): x (B, T, in_channels, H, W), c_noise (B,) or (B, T) -> (B, T, out_channels, H, W).

    width x mults are the channels of the levels; blocks the residual blocks of each on the way down (one
    more on the way up); attention and joint the downsampling factors at which there is attention, and at
    which the temporal one is joint over space and time. Frames are first cut into patch x patch tiles, as
    in a vision transformer: most of the work at toy size is saved, none of the picture is lost."""

    def __init__(self, in_channels, out_channels, width=64, mults=(1, 2), blocks=1, attention=(2,), joint=(2,),
                 head_dim=32, patch=1, dropout=0.0):
        super().__init__()
        self.patch, self.multiple, dim_emb = patch, patch * 2 ** (len(mults) - 1), 4 * width
        self.input = nn.Conv2d(in_channels * patch ** 2, width, 3, padding=1)
        self.embed = nn.Sequential(nn.Linear(width, dim_emb), nn.SiLU(), nn.Linear(dim_emb, dim_emb), nn.SiLU())

        def block(dim_in, dim, factor):
            return Block(dim_in, dim, dim_emb, factor in attention, factor in joint, head_dim, dropout)

        self.down, self.up, dim, skips = nn.ModuleList(), nn.ModuleList(), width, [width]
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                self.down.append(block(dim, mult * width, 2 ** level))
                dim = mult * width
                skips.append(dim)
            if level < len(mults) - 1:
                self.down.append(PerFrame(nn.Conv2d(dim, dim, 3, stride=2, padding=1)))
                skips.append(dim)
        self.middle = block(dim, dim, 2 ** (len(mults) - 1))
        for level, mult in reversed(list(enumerate(mults))):
            for _ in range(blocks + 1):
                self.up.append(block(dim + skips.pop(), mult * width, 2 ** level))
                dim = mult * width
            if level > 0:
                self.up.append(PerFrame(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(dim, dim, 3, padding=1))))
        self.norm, self.output = normalize(dim), zero(nn.Conv2d(dim, out_channels * patch ** 2, 3, padding=1))

    def forward(self, x, c_noise):
        B, T = x.shape[:2]
        if c_noise.ndim == 1:
            c_noise = c_noise[:, None].expand(B, T)                    # one noise level per frame
        emb = self.embed(fourier(1000 * c_noise, self.embed[0].in_features))                   # (B, T, E)
        x = rearrange(x, "b t c (h p) (w q) -> (b t) (c p q) h w", p=self.patch, q=self.patch)
        x = self.input(x.contiguous(memory_format=torch.channels_last)).unflatten(0, (B, T))   # (B, T, width, h, w)
        skips = [x]
        for layer in self.down:
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        x = self.middle(x, emb)
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], 2), emb) if isinstance(layer, Block) else layer(x)
        x = self.output(F.silu(self.norm(x.flatten(0, 1))))            # (B T, C p q, h, w)
        return rearrange(x, "(b t) (c p q) h w -> b t c (h p) (w q)", b=B, p=self.patch, q=self.patch)

# ======================================================================================================
# 8. EMA
# ======================================================================================================

class EMA:
    """The exponential moving average of a model's weights, in float32: .update(model) after every optimiser
    step, sample from .model. Update n keeps min(decay, (1 + n) / (10 + n)) of the average, so that it is of
    use from the first steps on (the usual warm-up). Buffers are copied, not averaged."""

    def __init__(self, model, decay=0.999):
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, p in zip(self.model.parameters(), model.parameters()):
            average.lerp_(p.float(), 1 - decay)
        for average, b in zip(self.model.buffers(), model.buffers()):
            average.copy_(b)


# ======================================================================================================
# 9. A world that can be marked
# ======================================================================================================
# A dataset gives dict(video=clip (T, C, H, W)) for ANY index i = 0, 1, 2 ...: what it gives depends on i and
# its seed alone. Training asks for i = 0, 1, 2 ... in turn, so that a run can be resumed from a number.

class MovingShapes:
    """A toy world whose physics is known: on black, one or two solid shapes move at constant speed in
    straight lines and bounce off the walls like balls. Each keeps its kind, colour and size for ever.

    A shape fills a box of half-width r, 15 to 22 % of the frame; its speed is 4 to 10 % of the frame per
    frame. Shapes shine like lamps: where two overlap their light adds up. Two are of different primary
    colours, so each has a colour channel to itself and can be followed even behind the other."""

    KINDS = "disc", "square", "triangle"
    COLORS = dict(red=(1, 0, 0), green=(0, 1, 0), blue=(0, 0, 1), yellow=(1, 1, 0), magenta=(1, 0, 1), cyan=(0, 1, 1))
    RADIUS, SPEED = (0.15, 0.22), (0.04, 0.10)                         # ranges, as shares of the shorter side

    def __init__(self, frames=8, size=(32, 32), objects=1, seed=0):
        self.frames, self.size, self.objects, self.seed = frames, tuple(size), objects, seed

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, i])
        palette = list(self.COLORS.values())[: 6 if self.objects == 1 else 3]
        video, unit = np.zeros((self.frames, 3, *self.size)), min(self.size)
        for color in rng.permutation(palette)[: self.objects]:
            kind, r = rng.integers(3), rng.uniform(*self.RADIUS) * unit
            speed, angle = rng.uniform(*self.SPEED) * unit, rng.uniform(0, 2 * np.pi)
            walls = np.array(self.size) - r
            start, velocity = rng.uniform(r, walls), speed * np.array([np.sin(angle), np.cos(angle)])
            path = self.bounce(start + velocity * np.arange(self.frames)[:, None], r, walls)   # (T, 2)
            video += self.draw(kind, r, path[:, 0], path[:, 1], self.size)[:, None] * color[:, None, None]
        return dict(video=torch.from_numpy(video).float() * 2 - 1)     # (T, 3, H, W) in [-1, 1]

    @staticmethod
    def bounce(x, low, high):
        """Fold a straight line into [low, high]: that is all an elastic wall does."""
        return high - np.abs((x - low) % (2 * (high - low)) - (high - low))

    @staticmethod
    def draw(kind, r, cy, cx, size):
        """How much of each pixel a shape covers, in [0, 1], for arrays of one shape (...) -> (..., H, W)."""
        kind, r, cy, cx = (np.asarray(a)[..., None, None] for a in (kind, r, cy, cx))
        y, x = np.arange(size[0])[:, None] + 0.5 - cy, np.abs(np.arange(size[1]) + 0.5 - cx)
        outside = np.select([kind == 0, kind == 1],                    # distance to the edge, < 0 inside
                            [np.hypot(x, y) - r, np.maximum(x, np.abs(y)) - r],
                            np.maximum(y - r, (2 * x - y - r) / 5 ** 0.5))
        return np.clip(0.5 - outside, 0, 1)

    def check(self, videos):
        """Mark clips (B, T, 3, H, W) in [-1, 1]: a dict of arrays (B,), each law apart and `passed`, all of
        them together. Every shape is measured in every frame, and then, over the whole clip, must

        shape   look like one shape of its kind and like nothing else (intersection over union > 0.75)
        color   stay within 0.25 (of 0 ... 1) of one colour of the palette
        size    stay within 12 % of its median
        path    keep, in every 8 frames in a row, within 1 pixel (at 32) of a straight path with elastic walls
        speed   and keep the speed of that path, within 2 % of the frame per frame
        moving  at no less than half the world's lowest speed: a frozen clip breaks this law and no other

        Also the measured `kinds`, `colors` (numbers) and `speeds` (share of the frame per frame) of its shapes,
        (B, objects)."""
        v = np.clip((torch.as_tensor(videos).float().cpu().numpy() + 1) / 2, 0, 1)
        B, T, _, H, W = v.shape
        unit, stray = min(H, W), np.zeros(B, bool)
        if self.objects == 2:                                          # one clip per shape: keep only its channel
            order = v.mean((1, 3, 4)).argsort(1)                       # (B, 3): darkest channel first
            stray = (v * (np.arange(3) == order[:, :1])[:, None, :, None, None]).max((1, 2, 3, 4)) > 0.5
            own = np.arange(3) == order[:, 1:, None]                   # (B, 2, 3)
            v = (v[:, None] * own[:, :, None, :, None, None]).reshape(-1, T, 3, H, W)          # (2 B, T, 3, H, W)
        light = np.clip((v.max(2) - 0.1) / 0.8, 0, 1)                  # (N, T, H, W): covered or not
        rows, cols = light.max(3), light.max(2)                        # its shadows on the two walls
        height, width = rows.sum(2), cols.sum(2)                       # (N, T)
        cy = rows @ (np.arange(H) + 0.5) / np.maximum(height, 1e-3)
        cx = cols @ (np.arange(W) + 0.5) / np.maximum(width, 1e-3)
        radius = (height + width) / 4
        ideal = np.stack([self.draw(kind, radius, cy, cx, (H, W)) for kind in range(3)])       # (3, N, T, H, W)
        overlap = np.minimum(ideal, light).sum((3, 4)) / np.maximum(np.maximum(ideal, light).sum((3, 4)), 1e-3)
        kind = overlap.mean(2).argmax(0)                               # (N,)
        overlap = np.take_along_axis(overlap, kind[None, :, None], 0)[0]                       # (N, T)
        core = (light > 0.9)[:, :, None]
        color = (v * core).sum((3, 4)) / np.maximum(core.sum((3, 4)), 1)                       # (N, T, 3)
        palette = np.array(list(self.COLORS.values()))
        nearest = np.square(color.mean(1)[:, None] - palette).sum(2).argmin(1)                 # (N,)
        r = np.median(radius, 1, keepdims=True)                        # (N, 1)
        miss_y, speed_y = self.fit_path(cy, r, H - r)
        miss_x, speed_x = self.fit_path(cx, r, W - r)                  # (N, windows)
        speed = np.hypot(speed_y, speed_x) / unit
        middle = np.median(speed, 1, keepdims=True)
        laws = dict(shape=(overlap > 0.75).all(1),
                    color=(np.abs(color - palette[nearest][:, None]) < 0.25).all((1, 2)),
                    size=(np.abs(radius - r) < 0.12 * r).all(1),
                    path=(np.maximum(miss_y, miss_x) < unit / 32).all(1),
                    speed=(np.abs(speed - middle) < 0.02).all(1),
                    moving=(speed > self.SPEED[0] / 2).all(1))
        laws = {name: ok.reshape(B, -1).all(1) for name, ok in laws.items()}
        laws["shape"] &= ~stray
        return dict(passed=np.all(list(laws.values()), 0), **laws, kinds=kind.reshape(B, -1),
                    colors=nearest.reshape(B, -1), speeds=middle.reshape(B, -1))

    @classmethod
    def fit_path(cls, x, low, high, window=8):
        """For x (N, T), one coordinate of a centre, and its walls low, high (N, 1): how far it strays at most
        from the best bouncing path, and that path's speed, for every run of `window` frames. (N, windows) each.
        The best path is found by trying them all: 97 speeds, times 9 places at the middle frame."""
        window = min(window, x.shape[1])
        runs = np.lib.stride_tricks.sliding_window_view(x, window, 1)  # (N, n, window)
        limit = 1.25 * cls.SPEED[1] * (low + high).min()
        speeds, starts = np.linspace(-limit, limit, 97), np.linspace(-1, 1, 9)
        line = starts[:, None] + speeds[:, None, None] * (np.arange(window) - window // 2)     # (97, 9, window)
        miss, speed = np.zeros(runs.shape[:2]), np.zeros(runs.shape[:2])
        for i, run in enumerate(runs):                                 # (n, window)
            path = cls.bounce(run[:, None, None, window // 2, None] + line, low[i], np.maximum(high[i], low[i] + 1))
            worst = np.abs(path - run[:, None, None]).max(-1).reshape(len(run), -1)            # (n, 97 * 9)
            miss[i], speed[i] = worst.min(1), np.abs(speeds[worst.argmin(1) // len(starts)])
        return miss, speed

    def report(self, videos, name="generated"):
        """One line of text per thing that check finds, with the same number of real clips beside it. The
        mismatch of a distribution is its total variation distance (0 same, 1 disjoint) to the world's own,
        which is uniform; what real clips of that number reach by chance stands beside that too."""
        real = MovingShapes(len(videos[0]), self.size, self.objects, seed=987_654_321)
        got = self.check(videos)
        true = self.check(torch.stack([real[i]["video"] for i in range(len(videos))]))
        laws = [k for k in got if got[k].dtype == bool]
        lines = [f"{'law':>10} {name:>10} {'real':>6}   ({len(videos)} clips of {len(videos[0])} frames)"]
        lines += [f"{law:>10} {got[law].mean():>10.0%} {true[law].mean():>6.0%}" for law in laws]
        edges = np.linspace(*self.SPEED, 7)
        edges[[0, -1]] = -np.inf, np.inf                               # measured speeds may lie a little outside
        counts = dict(colors=lambda c: np.bincount(c["colors"].ravel(), minlength=6)[: 6 if self.objects == 1 else 3],
                      kinds=lambda c: np.bincount(c["kinds"].ravel(), minlength=3),
                      speeds=lambda c: np.histogram(c["speeds"], edges)[0])
        chance = np.random.default_rng(0)
        for what, count in counts.items():
            a, b = count(got), count(true)
            tv = lambda n: np.abs(n / max(n.sum(), 1) - 1 / n.shape[-1]).sum() / 2
            limit = np.quantile([tv(m) for m in chance.multinomial(max(b.sum(), 1), np.ones(len(b)) / len(b), 500)], 0.95)
            lines.append(f"{what:>10} {tv(a):>10.2f} {tv(b):>6.2f}   mismatch; real clips stay below {limit:.2f} in 95 of 100 draws")
        return "\n".join(lines)


# ======================================================================================================
# 10. Video files
# ======================================================================================================
# A clip in memory is float (T, C, H, W) in [-1, 1]; in a file it is uint8 (T, H, W, C), 0 to 255.
# from_uint8 and to_uint8 are the only two places where one becomes the other.

VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".gif"}
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}  # .webp can move, too
ARRAYS = {".npy", ".npz"}
DEFAULT_FPS = 8.0  # of whatever stores no speed: pictures and arrays
LINE = -0.6        # the dark grey between the clips of a grid


def to_uint8(clip):
    """float (..., C, H, W) in [-1, 1] -> uint8 numpy (..., H, W, C). Values beyond the range
    saturate, since 8 bits have no room for them; NaN or infinity is a ValueError."""
    if not torch.isfinite(clip).all():
        raise ValueError("the clip holds NaN or infinite values")
    pixels = (clip.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).movedim(-3, -1).numpy()


def from_uint8(frames):
    """uint8 numpy (..., H, W, C) -> float32 (..., C, H, W) in [-1, 1]; to_uint8 undoes it."""
    if frames.dtype != np.uint8:
        raise ValueError(f"expected uint8 pixels from 0 to 255, got {frames.dtype}")
    return torch.tensor(frames).movedim(-1, -3) / 127.5 - 1


def resize_crop(frames, size):
    """uint8 (T, H, W, C) -> uint8 (T, h, w, C): resize until size = (h, w) is just covered, then
    crop the centre, so that nothing is stretched."""
    (H, W), (h, w) = frames.shape[1:3], size
    if (H, W) == (h, w):
        return frames
    scale = max(h / H, w / W)
    cover = max(h, round(H * scale)), max(w, round(W * scale))
    top, left = (cover[0] - h) // 2, (cover[1] - w) // 2
    out = np.empty((len(frames), h, w, frames.shape[3]), np.uint8)
    for t in range(0, len(frames), 16):  # a few frames at a time bounds the memory
        x = torch.tensor(frames[t : t + 16]).permute(0, 3, 1, 2)  # (16, C, H, W)
        # antialias averages all the pixels that become one; without it fine detail would flicker
        x = F.interpolate(x, cover, mode="bilinear", antialias=True)
        out[t : t + 16] = x[:, :, top : top + h, left : left + w].permute(0, 2, 3, 1).numpy()
    return out


def grey(frames):
    """uint8 (..., 3) -> uint8 (..., 1): the brightness (luma of ITU-R BT.601)."""
    luma = frames @ np.array([0.299, 0.587, 0.114], np.float32)
    return luma.round().astype(np.uint8)[..., None]


def read_arrays(path):
    """.npy or .npz -> (list of (key, clip uint8 (T, H, W, C)), list of how each array was read)."""
    # allow_pickle=False: a data file must not be able to run code
    stored = np.load(path, allow_pickle=False, mmap_mode="r")
    clips, notes = [], []
    for key, x in stored.items() if hasattr(stored, "items") else [("", stored)]:
        key, shape, last = f"[{key}]" if key else "", x.shape, (x.shape or [0])[-1]
        if x.dtype != np.uint8:
            x, how = [], f"not used, it holds {x.dtype} and pixels must be uint8, 0 to 255"
        elif x.ndim == 3 and last > 4:
            x, how = x[None, ..., None], "one grey clip (T, H, W)"
        elif x.ndim == 4 and last in (1, 3, 4):
            x, how = x[None], "one clip (T, H, W, C)"
        elif x.ndim == 5 and last in (1, 3, 4):
            how = f"{shape[0]} clips (N, T, H, W, C)"
        elif x.ndim == 4 and shape[0] == 20 < shape[1] and shape[2:] == (64, 64):  # Moving MNIST
            x, how = x.swapaxes(0, 1)[..., None], f"{shape[1]} grey clips (T, N, H, W)"
        elif x.ndim == 4 and last > 4 and shape[1] not in (1, 3):  # 1 or 3: channels, misplaced
            x, how = x[..., None], f"{shape[0]} grey clips (N, T, H, W)"
        else:
            x, how = [], "not used, it is none of (T,H,W), (T,H,W,C), (N,T,H,W), (N,T,H,W,C)"
        notes.append(f"{key} {shape}: {how}")
        clips += [(f"{key}[{n}]" if len(x) > 1 else key, clip[..., :3]) for n, clip in enumerate(x)]
    if not clips:
        raise ValueError(";".join(notes) or "it holds no array")
    return clips, notes


def stored_frames(path):
    """Yield the stored frames as (uint8 (H, W, 3), milliseconds each lasts)."""
    suffix, unknown = path.suffix.lower(), 1000 / DEFAULT_FPS
    if path.is_dir():  # zfill puts frame2 before frame10
        names = [p for p in path.iterdir() if p.name[0] != "." and p.suffix.lower() in PICTURES]
        for name in sorted(names, key=lambda p: re.sub(r"\d+", lambda n: n[0].zfill(20), p.name)):
            yield next(stored_frames(name))[0], unknown
    elif suffix in PICTURES or suffix == ".gif":
        from PIL import Image, ImageOps
        if suffix == ".gif" and path.read_bytes().rstrip(b"\0\r\n")[-1:] != b";":
            raise ValueError("the GIF is truncated, its end mark is missing")
        with Image.open(path) as file:
            # only these two can be films; a phone's .jpg may hold a second, unrelated picture
            for t in range(file.n_frames if suffix in (".gif", ".webp") else 1):
                file.seek(t)
                if file.mode[0] in "IF":  # which PIL would clip to white
                    raise ValueError("pictures of more than 8 bits are not supported")
                picture = ImageOps.exif_transpose(file).convert("RGBA")  # from any mode or palette
                black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
                frame = Image.alpha_composite(black, picture).convert("RGB")
                yield np.array(frame), file.info.get("duration") or unknown
    elif suffix in VIDEOS:
        import imageio_ffmpeg
        # absolute, because ffmpeg would take the start of "12:30.mp4" for a protocol
        stream = imageio_ffmpeg.read_frames(str(path.absolute()))
        meta, count = next(stream), 0
        (W, H), fps = meta["size"], meta["fps"]
        for count, data in enumerate(stream, 1):
            yield np.frombuffer(data, np.uint8).reshape(H, W, 3), 1000 / fps
        # ffmpeg ends quietly where a file breaks off, so compare with the length in its header
        if count < 0.9 * fps * meta["duration"] - 1:
            raise ValueError(f"truncated after {count} of {fps * meta['duration']:.0f} frames")
    else:
        raise ValueError("it is not a video, picture or array")


def decode(path, size=None):
    """Every clip in a file, or in a folder of pictures
    -> (list of (key, uint8 (T, H, W, C), frames per second, stored (H, W)), list of notes)."""
    try:
        if path.stat().st_size == 0 and path.is_file():
            raise ValueError("the file is empty (0 bytes)")
        if path.suffix.lower() in ARRAYS:
            clips, notes = read_arrays(path)
            return [(key, clip if size is None else resize_crop(clip, size), DEFAULT_FPS,
                     clip.shape[1:3]) for key, clip in clips], notes
        frames, lasts = [], []
        for frame, milliseconds in stored_frames(path):
            stored = frame.shape[:2]
            frames.append(frame if size is None else resize_crop(frame[None], size)[0])
            lasts.append(milliseconds)
        if not frames:
            raise ValueError("it holds no frames")
        # GIF writers merge equal neighbours into one frame that lasts longer. Undo that, or
        # whatever pauses would seem to jump.
        times = np.round(np.array(lasts) / min(lasts)).astype(int)
        frames = np.stack([frame for frame, n in zip(frames, times) for _ in range(n)])
        return [("", frames, 1000 / min(lasts), stored)], []
    except Exception as error:  # each decoder has its own kinds; the last line tells the cause
        cause = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(f"{path}: {cause}") from error


def read_frames(path, size=None):
    """A video, a picture (T = 1), a folder of pictures, or an array file that holds one clip
    -> (uint8 (T, H, W, 3), frames per second). With size = (h, w) each frame is resized and
    cropped as it is decoded, so that a long film fits in memory. Whatever is missing, empty or
    damaged is a ValueError that names the file and the cause."""
    clips, notes = decode(Path(path), size)
    if len(clips) > 1:
        raise ValueError(f"{path}: expected one clip, found{';'.join(notes)}")
    _, frames, fps, _ = clips[0]
    return frames.repeat(3, axis=-1) if frames.shape[-1] == 1 else frames, fps


def read_video(path, size=None, channels=3):
    """read_frames as a clip: float (T, channels, H, W) in [-1, 1]; channels is 1 (grey) or 3."""
    frames, _ = read_frames(path, size)
    return from_uint8(grey(frames) if channels == 1 else frames)


def write_whole(path, write):
    """Call write(temporary path), then rename: the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.stem}{path.suffix.lower()}")
    try:
        write(temporary)
        if temporary.stat().st_size == 0:  # ffmpeg can fail without saying so
            raise OSError("the encoder wrote an empty file")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_video(path, clip, fps=DEFAULT_FPS):
    """Write clip, float (T, C, H, W) in [-1, 1] with C 1 or 3, as .mp4, .gif or .npy; return the
    path. Small frames are enlarged in .mp4 and .gif by a whole factor. .npy is exact; .gif has 256
    colours and merges equal frames. Without a working ffmpeg, .mp4 becomes .gif."""
    path, suffix = Path(path), Path(path).suffix.lower()
    if suffix not in (".mp4", ".gif", ".npy"):
        raise ValueError(f"{path}: the suffix must be .mp4, .gif or .npy")
    if clip.dim() != 4 or clip.shape[1] not in (1, 3):
        raise ValueError(f"a clip is (T, C, H, W) with C 1 or 3, got {tuple(clip.shape)}")
    frames = to_uint8(clip)  # (T, H, W, C)
    if suffix == ".npy":
        return write_whole(path, lambda to: np.save(to, frames))
    import imageio.v3 as iio
    H, W = frames.shape[1:3]
    k = math.ceil(128 / min(H, W, 128))
    if suffix == ".mp4" and k % 2 and (H % 2 or W % 2):
        k += 1  # H.264 keeps colour at half size: odd sides would be stretched, or fail silently
    frames = frames.repeat(k, 1).repeat(k, 2).repeat(3 // clip.shape[1], 3)  # (T, kH, kW, 3)
    if suffix == ".gif":  # GIF counts in 10 ms, and viewers slow down what is faster than 20 ms
        ms = max(20, 10 * round(100 / fps))
        return write_whole(path, lambda to: iio.imwrite(to, frames, duration=ms, loop=0))
    h264 = dict(plugin="FFMPEG", fps=fps, codec="libx264", pixelformat="yuv420p", quality=8,
                macro_block_size=2)
    try:
        return write_whole(path, lambda to: iio.imwrite(to, frames, **h264))
    except Exception as error:
        print(f"{path}: ffmpeg failed ({error!r:.80}), writing a .gif instead")
        return write_video(path.with_suffix(".gif"), clip, fps)


def write_image(path, picture, scale=None):
    """Write picture, float (C, H, W) in [-1, 1] with C 1 or 3, as .png, enlarged by the whole
    number scale (default: what makes the short side at least 128 pixels); return the path."""
    import imageio.v3 as iio
    k = scale or math.ceil(128 / min(*picture.shape[1:], 128))
    pixels = to_uint8(picture).repeat(k, 0).repeat(k, 1).repeat(3 // len(picture), 2)
    return write_whole(Path(path), lambda to: iio.imwrite(to, pixels))


def film_strip(clips):
    """(B, T, C, H, W) -> picture (C, B * (H + 1) + 1, T * (W + 1) + 1): row b is clip b, column t
    is frame t, with dark lines between. Any axes may stand in the place of C."""
    rows, columns, *rest, H, W = clips.shape
    x = F.pad(clips, (1, 0, 1, 0), value=LINE).movedim(0, -3).movedim(0, -2)  # (C, B, H+1, T, W+1)
    x = x.reshape(*rest, rows * (H + 1), columns * (W + 1))
    return F.pad(x, (0, 1, 0, 1), value=LINE)


def grid(clips):
    """(B, T, C, H, W) -> one clip (T, C, H', W') of all, side by side; empty cells are black."""
    columns = math.ceil(len(clips) ** 0.5)
    rows = math.ceil(len(clips) / columns)
    black = clips.new_full((rows * columns - len(clips), *clips.shape[1:]), -1)
    return film_strip(torch.cat([clips, black]).unflatten(0, (rows, columns)))


class VideoFolder:
    """The clips in a file or anywhere below a folder, decoded once and kept as uint8 in memory.

    A folder of pictures is one clip; so is each clip in a .npy or .npz. dataset[i] is
    dict(video=float (frames, C, H, W) in [-1, 1]) for any i >= 0, without end: every len(dataset)
    items hold each clip once, at a random start. An item depends on (seed, i) alone, so a run
    resumes from its index. Held out are val/ or test/ beside a train/, or else, given 20 clips, the
    5 % that a hash of their names picks: whole clips, as windows of one clip resemble each other.

    .report says what was used and what was not; .fps is the speed of an item, .channels its C,
    .clips the list of uint8 (T, h, w, 1 or 3). Nothing usable is a ValueError that says why."""

    def __init__(self, path, frames, size, stride=1, channels="auto", seed=0, held_out=False,
                 progress=False):
        path, need = Path(path), (frames - 1) * stride + 1
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        root, split = path, "none, fewer than 20 clips: the same ones train and evaluate"
        others = [name for name in ("val", "test") if (path / name).is_dir()]
        if (path / "train").is_dir():
            root = path / (others[0] if held_out and others else "train")
            split = f"{root.name}/ is used here" if others else split

        def name_of(file):
            return file.name if file == root else file.relative_to(root).as_posix()

        sources, skipped = set(), []
        for file in [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file()):
            name, suffix = name_of(file), file.suffix.lower()
            if re.search(r"(^|/)(\.|__MACOSX/|Thumbs\.db$)|\.actions\.npy$", name):
                continue
            moves = suffix == ".webp" and b"ANMF" in file.read_bytes()
            if suffix in PICTURES and not moves and file != root:
                sources.add(file.parent)  # a folder of pictures is one clip
            elif suffix in VIDEOS | ARRAYS | PICTURES:
                sources.add(file)
            else:
                skipped.append(("not video", name))
        total, sources = len(sources) + len(skipped), sorted(sources)
        if progress:
            from tqdm import tqdm
            sources = tqdm(sources, "decoding")

        clips, notes, lengths = {}, [], []  # clips: name -> (uint8 (T, h, w, C), fps, (H, W), kind)
        for file in sources:
            try:
                found, how = decode(file, size)
            except ValueError as error:
                skipped.append(("unreadable", name_of(file) + str(error).removeprefix(str(file))))
                continue
            notes += [name_of(file) + note for note in how]
            for key, clip, fps, stored in found:
                if len(clip) < need:
                    skipped.append(("too short", f"{name_of(file)}{key} has {len(clip)}"))
                    lengths.append(len(clip))
                    continue
                if (clip == clip[..., :1]).all():
                    clip = clip[..., :1]  # grey, even if stored as RGB: keep a third
                elif channels == 1:
                    clip = grey(clip)
                kind = "picture folders" if file.is_dir() else file.suffix.lower()[1:]
                clips[name_of(file) + key] = np.array(clip), fps, stored, kind
        if not clips:
            reasons = [f"  {reason}: {example}" for reason, example in skipped[:5]]
            raise ValueError("\n".join([f"no clip of {need} frames in {path}", *reasons]))

        widest = max(clip.shape[-1] for clip, *_ in clips.values())
        if split.startswith("none") and len(clips) >= 20:
            # by a hash of the name: a clip stays on its side when others are added
            rank = {name: zlib.crc32(name.encode()) for name in clips}
            held = {name for name in clips if rank[name] % 20 == 0} or {min(clips, key=rank.get)}
            split = f"{len(held)} of {len(clips)} clips are held out by a hash of their names"
            split += ": these" if held_out else ""
            clips = {name: clip for name, clip in clips.items() if (name in held) == held_out}

        self.frames, self.stride, self.seed = frames, stride, seed
        self.clips, speeds, sizes, kinds = (list(column) for column in zip(*clips.values()))
        self.channels, speed = widest if channels == "auto" else channels, float(np.median(speeds))
        self.fps = speed / stride

        sizes = ", ".join(f"{H}x{W}" for (H, W), _ in Counter(sizes).most_common(3))
        kinds = ", ".join(f"{kind} {n}" for kind, n in Counter(kinds).most_common())
        lines = [f"data: {total} files in {path} -> {len(clips)} clips used ({kinds})"]
        for reason in ("too short", "unreadable", "not video"):
            examples = [example for why, example in skipped if why == reason]
            if examples:
                lines.append(f"skipped: {reason} {len(examples)} ({', '.join(examples[:3])})")
            if reason == "too short" and examples:
                half = sorted(lengths)[len(lengths) // 2]
                lines[-1] += f": they need {need} frames; --frames {(half - 1) // stride + 1}"
                if stride > 1 and half >= frames:
                    lines[-1] += f" or --stride {(half - 1) // (frames - 1)}"
                lines[-1] += " would admit half of them or more"
        lines.append(f"size {sizes} -> {size[0]}x{size[1]} crop, {self.channels} channels, "
                     f"{speed:g} fps / stride {stride} = {self.fps:g} fps")
        self.report = "\n      ".join(lines + [f"split: {split}", *notes])

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        epoch, position = divmod(i, len(self))
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self))
        clip = self.clips[order[position]]
        span = (self.frames - 1) * self.stride + 1
        start = np.random.default_rng([self.seed, 1, i]).integers(len(clip) - span + 1)
        video = from_uint8(clip[start : start + span : self.stride])  # (frames, 1 or 3, h, w)
        return dict(video=video.expand(-1, self.channels, -1, -1))


# ======================================================================================================
# 11. Models: build, save, load
# ======================================================================================================

def schedule(config):
    """The training noise schedule of a config: a function u -> sigma."""
    if config.schedule not in SCHEDULES:
        raise ValueError(f"schedule is {config.schedule!r}, expected one of {', '.join(SCHEDULES)}")
    f = SCHEDULES[config.schedule]
    f = partial(f, mean=config.mean, std=config.std) if f is lognormal else f
    return (lambda u: resolution_shift(f(u), config.size, config.base)) if config.base else f


def build(config):
    """Config -> Denoiser with fresh weights. ValueError, in one sentence, where its numbers do not fit."""
    H, W = config.size
    multiple = config.patch * 2 ** (len(config.mults) - 1)             # halved once per level, after the patches
    if H % multiple or W % multiple:
        near = [max(multiple, round(n / multiple) * multiple) for n in (H, W)]
        raise ValueError(f"size is {H} {W}, but patch {config.patch} and {len(config.mults)} levels need multiples of "
                         f"{multiple}: the nearest that works is --size {near[0]} {near[1]}")
    wrong = [m * config.width for m in config.mults if m * config.width % config.head_dim]
    if config.attention and wrong:
        raise ValueError(f"head_dim is {config.head_dim}, but a level has {wrong[0]} channels, which it does not divide")
    scalings(torch.ones(1), config.kind)                               # names the choices if kind or weighting is
    loss_weight(torch.ones(1), config.weighting)                       # none of them
    if config.sampler not in SAMPLERS:
        raise ValueError(f"sampler is {config.sampler!r}, expected one of {', '.join(SAMPLERS)}")
    if len(config.context) > config.frames or not any(config.context) or min(config.context) < 0:
        raise ValueError(f"context is {config.context}: expected the probabilities of 0, 1, 2 ... given frames, at most "
                         f"{config.frames - 1} of {config.frames}")
    net = VideoUNet((3 if config.previous else 2) * config.channels + 1, config.channels, config.width, config.mults,
                    config.blocks, config.attention, config.joint, config.head_dim, config.patch, config.dropout)
    return Denoiser(net, config.kind, config.sigma_data, config.previous)


def save(path, **state):
    """Write a checkpoint, tensors and plain values only, by way of a temporary file: whatever happens on the
    way, a full disk or a kill, path holds either the old checkpoint or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path} ({e}); the checkpoint that was there, if any, is untouched") from e


def read_checkpoint(path):
    """The dict that save wrote. Loaded with weights_only=True: a file with code in it is refused, not run."""
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        config = Config(**state["config"])
    except Exception as e:
        reason = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
        raise ValueError(f"{path} is not a whole checkpoint of this program: it is truncated, of another version, or "
                         f"holds code, which is never run ({reason})") from e
    return state, config


def load(path):
    """A checkpoint -> (Denoiser with its averaged weights, in evaluation mode, on the CPU; its Config)."""
    state, config = read_checkpoint(path)
    denoiser = build(config)
    try:
        denoiser.load_state_dict(state["ema"])
    except (KeyError, RuntimeError) as e:
        raise ValueError(f"the weights in {path} do not fit the config in it: {str(e).splitlines()[-1].strip()}") from e
    return denoiser.eval().requires_grad_(False), config
