"""
vdm.py: video diffusion models in one file, to be read from top to bottom.

Add noise to video clips, train a network to tell the clean clip behind the noise, then start from
pure noise and let it guess, step by step, a clip that was never there. That is all of it:

    sigma = schedule(u)                              how much noise: rises with u in (0, 1)
    x     = clean + sigma * noise                    the one corruption everything below is about
    guess = denoiser(x, sigma)                       the network's estimate of `clean`
    loss  = weight(sigma) * (guess - clean)^2        training: a good estimate at every sigma
    x     = x + (sigma' - sigma) * (x - guess) / sigma         sampling: from large sigma to 0

Map    1 Config        every number of a run
       2 Noise         schedules sigma(u), offset noise, and what the network is asked to predict
       3 Denoiser      network + scalings + frames that are given -> an estimate of the clean clip
       4 Losses        the weighted denoising error; Vista's two more; PVDM's joint objective
       5 Samplers      DDPM, DDIM, Heun, DPM-Solver++(2M); DDIM inversion
       6 Generation    guidance; one window; videos of any length; frames between frames
       7 Network       a factorised space-time UNet
       8 Adapters      LoRA, SimDA's adapters and shifted attention; what of a model is trained
       9 EMA           the running average of the weights, which is what one samples from
      10 Autoencoder   frames as latents, far fewer numbers, and back
      11 World         MovingShapes and Drive, toy worlds that can mark their own videos
      12 Video files   read and write them; a dataset from a folder of them
      13 Models        the presets: tiny and the papers' models; build, save, load

Axes   B clips, T frames, C channels, H height, W width. A clip is float (B, T, C, H, W), -1 to 1.
       Files hold bytes, uint8 (T, H, W, C): from_uint8 and to_uint8 are the one bridge each way.
Names  u        place on the schedule, in (0, 1)  sigma    noise level (B,), or (B, T): per frame
       denoise  a function (x, sigma) -> clean    sigmas   falling levels of a sampler, last is 0
       context  given frames (B, T, C, H, W)      mask     (B, T): 1 given, 0 not, between a hint
       label    class of a clip (B,), -1: none    action   (B, T, A), led to a frame; NaN: untold
       motion   how far things move (B,), as the share of clips that move less, 0 to 1; -1: untold
       scale    of guidance: 1 is plain conditional, 0 unconditional, above 1 exaggerates

arXiv  DDPM 2006.11239, DDIM 2010.02502, LoRA 2106.09685, VDM 2204.03458, EDM 2206.00364,
       Make-A-Video 2209.14792, DPM-Solver++ 2211.01095, PVDM 2302.07685, min-SNR 2303.09556,
       Video LDM 2304.08818, SimDA 2308.09710, SVD 2311.15127, Vista 2405.17398, JiT 2511.13720,
       StreamingT2V 2403.14773, diffusion forcing 2407.01392, GameNGen 2408.14837, FVDM 2410.03160
"""

import copy
import dataclasses
import math
import os
import subprocess
from functools import partial
from glob import glob
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

# ==================================================================================================
# 1. Config
# ==================================================================================================
# Every number of a run; train.py makes a flag of each field, with its comment as help. No class
# below reads it: they take plain arguments, which build(config) hands over, in section 13, with the
# presets of the papers' models. The defaults are the preset `tiny`: skim them, and come back.

@dataclasses.dataclass
class Config:
    # the clip
    frames: int = 8                 # frames per clip
    size: tuple = (32, 32)          # height and width in pixels; with factor, of the latents
    channels: int = 3               # 3 for colour, 1 for grey; with factor, of the latents
    stride: int = 1                 # take every stride-th frame of a file
    rates: tuple = (1,)             # (1, 2): by chance every frame or every second (untold)
    fps: float = 8.0                # frames per second of the videos written
    # latents
    factor: int = 0                 # pixels to a latent along each side (0: no latents, but pixels)
    ae_width: int = 32              # channels of the autoencoder's finest level
    kl: float = 1e-4                # weight of the KL term in its loss
    latent_scale: float = 1.0       # latents encoded elsewhere are multiplied by this (SD: 0.18215)
    # the network
    width: int = 16                 # channels of the first level
    mults: tuple = (1, 3, 6)        # channels of each level, as multiples of width
    blocks: int = 1                 # residual blocks per level
    attention: tuple = (2, 4)       # downsampling factors, of tiles, at which there is attention
    joint: tuple = (4,)             # those where one attention sees all places of all frames
    head_dim: int = 16              # channels per attention head
    patch: int = 2                  # frames are cut into patch x patch tiles first
    detail: int = 0                 # channels of a full-resolution path around the tiles (0: none)
    convs: bool = True              # temporal convolutions in and after every residual block
    feed_forward: str = "time"      # none, time: after temporal attention, or both: as in SVD
    ddpm_layout: bool = False       # one more block in the middle and per level on the way up
    dropout: float = 0.0            # dropout in the residual blocks
    fp32_residuals: bool = False    # add up residuals in float32, not bf16: slower; for long runs
    # the diffusion
    kind: str = "x0"                # what the network predicts: eps, v, x0 or edm
    sigma_data: float = 0.5         # standard deviation of the data (for kind and weighting edm)
    schedule: str = "lognormal"     # noise: linear, scaled_linear, cosine, sigmoid, lognormal
    mean: float = 1.5               # lognormal: mean of log sigma
    std: float = 1.2                # lognormal: standard deviation of log sigma
    base: int = 0                   # resolution shift: noise as seen at this resolution (0: none)
    weighting: str = "balance"      # of the error: eps, v, x0, edm, min_snr or balance
    gamma: float = 5.0              # min_snr: the largest weight
    dynamics: float = 0.0           # more weight where the motion is wrong (Vista: 1)
    dynamics_toy: bool = False      # dynamics: with mean 1, which small frames need to feel it
    structure: float = 0.0          # weight of the error of edges and texture (Vista: 0.1)
    offset: float = 0.0             # offset noise: strength of the part constant over a frame
    offset_per_frame: bool = False  # offset noise: one draw per frame instead of per clip
    # frames that are given
    context: tuple = (0.48, 0.04, 0.04, 0.04, 0.40)  # odds that the first 0, 1, 2 ... are given
    task: str = "predict"           # which, if any: predict, ends, any, image or upsample
    given_noise: float = 3.5        # factor of sigma where frames are given: they make it easy
    give: str = "concat"            # how the network is shown them: concat, replace or per_frame
    context_noise: float = 0.0      # largest sigma of the noise on them, which makes them hints
    anchor: float = 1.0             # largest noise on given frames after 2, the anchors (0: off)
    independent: float = 0.0        # per_frame: odds that each frame of a clip has its own sigma
    overlap: int = 4                # frames a window of a long video takes over from the one before
    previous: bool = False          # be given the whole clip before (PVDM) instead of single frames
    joint_weight: float = 0.5       # PVDM's lambda: share of the conditional term of the loss
    images: float = 0.08            # share of clips trained as pictures, without temporal layers
    stills: int = 0                 # pictures from elsewhere trained beside every clip (VDM: 8)
    # labels, motion and actions
    motion: bool = True             # tell how far things move: the share of clips that move less
    labels: int = 0                 # classes of clips (shapes: 18; 0: no labels)
    actions: tuple = ()             # lengths of the modes of an action (default: as the data has)
    drop: float = 0.15              # odds that label, motion and the whole action are withheld
    mode_drop: tuple = (0.15,)      # odds that a mode of the action is: one for all, or one each
    # training
    steps: int = 2000               # optimiser steps
    batch: int = 16                 # clips per step
    optimizer: str = "muon"         # adamw, or muon (with AdamW for all that is not a matrix)
    lr: float = 2e-3                # peak learning rate of AdamW
    gate_lr: float = 1e-2           # that of the gates of the temporal layers
    muon_lr: float = 0.01           # peak learning rate of Muon
    warmup: int = 50                # steps in which rates rise; then they fall to 0 linearly
    weight_decay: float = 0.01      # AdamW's
    clip_norm: float = 1.0          # largest norm of the gradient
    ema: float = 0.995              # decay of the averaged weights
    # what is trained: section 8, Adapters
    train: tuple = ("all",)         # all, or some of spatial, temporal, actions, lora and adapters
    spatial_lr: float = 1.0         # learning rate of the spatial layers, as a share (Vista: 0.1)
    adapters: str = ""              # put lora or simda into the network ("": neither)
    rank: int = 4                   # channels of their bottlenecks
    # sampling
    sampler: str = "dpmpp_2m_sde"   # ddpm, ddim, heun, dpmpp_2m or dpmpp_2m_sde
    sampling_steps: int = 20        # noise levels visited; heun evaluates twice at all but the last
    temporal_guidance: float = 2.0  # more than 1 exaggerates how frames tell each other to change
    sigma_min: float = 0.35         # smallest noise level visited
    sigma_max: float = 60.0         # noise level at which sampling starts
    rho: float = 7.0                # bend of the grid between them: larger dwells at small levels
    jump: float = 2.5               # roll-outs skip noise levels from sigma_max to this (0: off)

    @property
    def anchors(self):              # how many given frames are the start of the whole video: 2 or 0
        usual = self.task == "predict" and self.give == "concat" and not self.previous
        enough = self.overlap > 3 and sum(self.context[4:]) > 0
        return 2 * (self.anchor > 0 and usual and enough and not self.context_noise)

# ==================================================================================================
# 2. Noise: how much, and of which kind
# ==================================================================================================
# Everything is said in one variable: x = clean + sigma * noise. The z of the DDPM papers is x at a
# scale that keeps its variance: z = x / sqrt(1 + sigma^2) = alpha clean + sigma_z noise, so that
# SNR = alpha^2 / sigma_z^2 = 1 / sigma^2 and logSNR = -2 log sigma. A schedule is then a rising
# curve sigma(u): train at sigma(random u), sample from large sigma down to 0.

def expand(sigma, x):
    """sigma (B,) or (B, T) with the trailing axes it needs to multiply a clip (B, T, C, H, W)."""
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))

def from_betas(u, betas):
    """sigma(u) of a DDPM schedule: abar_t = prod(1 - beta), sigma_t^2 = (1 - abar_t) / abar_t (DDPM
    eq. 4), with straight lines in log sigma between the steps."""
    abar = np.cumprod(1 - betas)
    log_sigma = 0.5 * (np.log1p(-abar) - np.log(abar))
    log_sigma = np.interp(u.double().cpu().numpy(), np.linspace(0, 1, len(betas)), log_sigma)
    return torch.as_tensor(np.exp(log_sigma), dtype=torch.float32, device=u.device)

def linear(u, start=1e-4, end=0.02, steps=1000):
    """beta rises in a straight line (DDPM)."""
    return from_betas(u, np.linspace(start, end, steps))

def scaled_linear(u, start=0.0015, end=0.0195, steps=1000):
    """sqrt(beta) rises in a straight line: PVDM's numbers; Stable Diffusion has 0.00085 and 0.012.
    Beware: the configuration files of latent diffusion call this one "linear"."""
    return from_betas(u, np.linspace(start ** 0.5, end ** 0.5, steps) ** 2)

def cosine(u, logsnr_max=20.0):
    """logSNR = -2 log tan(a u + b), from logsnr_max to -logsnr_max (VDM app. A)."""
    b = math.atan(math.exp(-logsnr_max / 2))
    return torch.tan((math.pi / 2 - 2 * b) * u.double() + b).float()

def sigmoid(u, start=-3.0, end=3.0, logsnr_max=20.0):
    """abar(u) falls from 1 to 0 along a piece of a logistic curve (Jabri et al. 2022)."""
    first, last = torch.tensor([start, end], dtype=torch.float64).sigmoid()
    here = torch.sigmoid(u.double() * (end - start) + start)
    sigma = ((here - first) / (last - here)).sqrt()                    # sqrt((1 - abar) / abar)
    return sigma.clamp(math.exp(-logsnr_max / 2), math.exp(logsnr_max / 2)).float()

def lognormal(u, mean=-1.2, std=1.2):
    """log sigma ~ Normal(mean, std) for uniform u (EDM; SVD and Vista at full size: 1.0, 1.6)."""
    return torch.exp(mean + std * torch.special.ndtri(u.double())).float()

SCHEDULES = dict(linear=linear, scaled_linear=scaled_linear, cosine=cosine, sigmoid=sigmoid,
                 lognormal=lognormal)

def resolution_shift(sigma, size, base=64):
    """A schedule made for base x base frames, at size (H, W): logSNR + 2 log(base / size), for
    neighbouring pixels of a larger frame repeat each other, so the same damage needs more noise."""
    return sigma * math.sqrt(size[0] * size[1]) / base

def karras_sigmas(n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """(n + 1,) falling levels for a sampler, even in sigma^(1 / rho); the last is 0 (EDM eq. 5)."""
    roots = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n)
    return torch.tensor([*roots ** rho, 0.0], dtype=torch.float32)

def stratified(n):
    """(n,) numbers, each uniform in (0, 1), that together cover it evenly: a batch that sees all
    noise levels has a less noisy gradient (Kingma et al. 2021, app. I)."""
    return ((torch.rand(1) + torch.arange(n) / n) % 1).clamp(1e-5, 1 - 1e-5)

def independent_levels(u, frames, chance):
    """u (n,), one level per clip -> (n, frames): with this chance every frame of a clip draws its
    own (FVDM: 0.2, with one coin for the whole batch; diffusion forcing: 1)."""
    own = torch.rand(len(u), frames).clamp(1e-5, 1 - 1e-5)
    return torch.where(torch.rand(len(u), 1) < chance, own, u[:, None])

def offset_noise(noise, strength, per_frame=False):
    """Add to unit noise (B, T, C, H, W) a part constant over H and W, drawn once per clip and
    channel or, with per_frame, per frame and channel (the Vista code, strength 0.02).

    White noise hardly moves the mean of a picture, so a network never learns to move it; this
    teaches it. For training alone. Small frames need more: there white noise already moves the mean
    by 1 / sqrt(H W)."""
    B, T, C = noise.shape[:3]
    part = torch.randn(B, T if per_frame else 1, C, 1, 1, device=noise.device)
    return noise + strength * part

def scalings(sigma, kind, sigma_data=0.5):
    """c_skip, c_out, c_in, c_noise, all of sigma's shape, such that the clean estimate is
    c_skip x + c_out net(c_in x, c_noise). kind says what the network's output is:

    eps  the noise: clean = x - sigma eps (DDPM)
    v    alpha noise - sigma_z clean: the noise at small sigma, minus the clip at large (VDM)
    edm  minus v, for data of standard deviation sigma_data (EDM table 1)
    x0   the clean clip itself. To give back noise a network has to carry every pixel of it, clips
         have structure and need less width: the choice where a token holds many pixels (JiT)"""
    data = sigma_data if kind == "edm" else 1.0
    root = (sigma ** 2 + data ** 2).sqrt()
    choices = dict(eps=(torch.ones_like(sigma), -sigma),
                   v=(1 / root ** 2, -sigma / root),
                   x0=(torch.zeros_like(sigma), torch.ones_like(sigma)),
                   edm=(data ** 2 / root ** 2, sigma * data / root))
    if kind not in choices:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(choices)}")
    c_noise = sigma.clamp(min=1e-4).log() / 4                          # a clean frame has sigma 0
    return *choices[kind], 1 / root, c_noise

# ==================================================================================================
# 3. The denoiser
# ==================================================================================================

class Denoiser(nn.Module):
    """forward(x, sigma, context, mask, previous, **cond) -> the clean estimate (B, T, C, H, W).

    x         noisy clip (B, T, C, H, W): clean + sigma * noise
    sigma     (B,), or (B, T) where every frame has its own (diffusion forcing)
    context   frames (B, T, C, H, W) and mask (B, T). 1: the frame is given, comes back untouched,
              and so has no loss. 0: it is not, context is not read there. Between, a hint: context
              has noise of level 1 / mask - 1 on it (augment), and the frame is still estimated
    previous  the whole clip before this one (B, T, C, H, W), as more channels (PVDM sec. 3.3)
    cond      for the network, as it is: label (B,), motion (B,), action (B, T, A)
    paces     if motion is told: the scores (17,) below which are the motion_score of 0, 1/16 ... 1
              of the training clips, for motion_rank; a buffer, -1 until training measures them

    give says how net(inputs, c_noise (B, T)) is shown the context; zeros stand for none:
    concat     with its mask, as C + 1 more channels (Video LDM; SVD, without a mask); besides, and
               this is ours, at c_noise of clean frames
    replace    in the place of x, scaled like x, marked by given=(B, T); no hints (Vista)
    per_frame  in the place of x, each frame at its own sigma (FVDM)"""

    def __init__(self, net, kind="edm", sigma_data=0.5, previous=False, give="concat", paces=None):
        super().__init__()
        if give not in ("concat", "replace", "per_frame"):
            raise ValueError(f"give is {give!r}, expected concat, replace or per_frame")
        self.net, self.kind, self.sigma_data, self.takes_previous = net, kind, sigma_data, previous
        self.give = give
        self.register_buffer("paces", paces)

    def forward(self, x, sigma, context=None, mask=None, previous=None, **cond):
        if previous is not None and not self.takes_previous:
            raise ValueError("previous was given, but this model was built with previous=False")
        if any(c is not None and c.shape != x.shape for c in (context, previous)) or \
                (context is None) != (mask is None):
            raise ValueError(f"expected context and mask or neither, and context and previous of "
                             f"the shape of x, {tuple(x.shape)}")
        if sigma.ndim == 1:
            sigma = sigma[:, None].expand(x.shape[:2])                                      # (B, T)
        mask = torch.zeros_like(sigma) if mask is None else mask.to(x)                      # (B, T)
        given = expand(mask, x)                                                    # (B, T, 1, 1, 1)
        context = torch.zeros_like(x) if context is None else torch.where(given > 0, context, 0)
        if self.give != "concat":
            x = torch.where(given > 0, context, x)
        if self.give == "per_frame":
            sigma = torch.where(mask > 0, 1 / mask - 1, sigma)
        c_skip, c_out, c_in, c_noise = scalings(sigma, self.kind, self.sigma_data)
        inputs = [expand(c_in, x) * x]
        if self.give == "concat":
            inputs += [context, given.expand_as(x[:, :, :1])]
            # every layer is told the noise level, so every layer knows which frames are given
            c_noise = scalings(torch.where(mask == 1, 0, sigma), self.kind)[3]
        if self.takes_previous:
            inputs.append(torch.zeros_like(x) if previous is None else previous)
        if self.give == "replace":
            cond["given"] = mask > 0
        output = self.net(torch.cat(inputs, 2), c_noise, **cond).to(x.dtype)       # (B, T, C, H, W)
        clean = expand(c_skip, x) * x + expand(c_out, x) * output
        return torch.where(given == 1, context, clean)

# ==================================================================================================
# 4. Losses
# ==================================================================================================

def loss_weight(sigma, weighting, sigma_data=0.5, gamma=5.0):
    """Weight of the squared error of the clean estimate, of sigma's shape. With SNR = 1 / sigma^2:

    x0 1, eps SNR, v SNR + 1, edm SNR + 1 / sigma_data^2: the plain squared error of that output
    min_snr   min(SNR, gamma): so that small, easy noise levels do not drown the rest (min-SNR)"""
    snr = sigma.clamp(min=1e-4) ** -2.0                     # a frame that is given may have sigma 0
    weights = dict(x0=torch.ones_like(snr), eps=snr, v=snr + 1, edm=snr + sigma_data ** -2,
                   min_snr=snr.clamp(max=gamma))
    if weighting not in weights:
        raise ValueError(f"weighting is {weighting!r}, expected one of {', '.join(weights)}, or a "
                         "Balance")
    return weights[weighting]

class Balance(nn.Module):
    """Weights by which all cases pull equally: every squared error is divided by a running mean of
    its kind. A kind is one of 16 octaves of sigma, frames given or none, one frequency in time (of
    discrete cosines, from what stands still to what flickers). At high noise nearly all of the
    error is about where things are, which cannot be known; it would drown the error about how they
    move. EDM2 learns such weights per noise level (Karras et al. 2023).

    sigma (B,), error (B, T, C, H, W), given (B,) -> its squares by frequency, and their weights
    (B, T). With a level per frame, sigma (B, T), squares and weights are those of frames. With hold
    the mean waits for fold(), called once per step when a batch comes in parts."""

    def __init__(self, frames, rate=0.1):
        super().__init__()
        n = torch.arange(frames)
        waves = torch.cos(math.pi * n[:, None] * (n + 0.5) / frames)
        self.register_buffer("waves", waves / waves.norm(dim=1, keepdim=True), False)      # (T, T)
        self.register_buffer("mean", torch.full((32, frames), 0.3))  # 16 octaves from 1 / 16, twice
        self.rate, self.hold, self.seen = rate, False, 0

    def forward(self, sigma, error, given):
        if sigma.ndim == 1:
            with torch.autocast(error.device.type, enabled=False):              # bf16 is too coarse
                error = (self.waves @ error.float().flatten(2)).view_as(error)
        squares = error ** 2                                                       # (B, T, C, H, W)
        with torch.no_grad():
            level = sigma.reshape(len(sigma), -1)                                # (B, 1) or (B, T)
            row = (level.log2().round() + 4).clamp(0, 15).long() + 16 * given[:, None]
            cell = row * error.shape[1] + torch.arange(error.shape[1], device=row.device)   # (B, T)
            weight = 1 / self.mean.flatten().clamp(min=1e-6)[cell]
            learns = (level > 0).expand_as(cell)                        # what is given has no error
            size = squares.float().mean((2, 3, 4))[learns]
            self.seen = self.seen + torch.stack([                                       # (2, 32, T)
                cell[learns].bincount(w, self.mean.numel()).view_as(self.mean)
                for w in (torch.ones_like(size), size)])
            if not self.hold:
                self.fold()
        return squares, weight

    def fold(self):
        count, total = self.seen
        self.mean.lerp_(total / count.clamp(min=1), 1 - (1 - self.rate) ** count)
        self.seen = 0

def dynamics_weight(estimate, clean, toy=False):
    """Vista's weight of the squared error (B, T, C, H, W), by its code: 1 in the first frame, then
    1 + the squared error of the change since the frame before, which is made a vector of length 1
    per clip and channel. It has no gradient.

    If n errors are Gaussian this adds 1 / sqrt(3 n) on average, 0.007 for 8 frames of 32 x 32, so
    that only the few worst places gain. toy, which is ours: mean 1 instead of length 1."""
    wrong = (estimate - clean).detach().float().diff(dim=1) ** 2               # (B, T - 1, C, H, W)
    size = wrong.mean((1, 3, 4), True) if toy else wrong.norm(2, (1, 3, 4), True)  # (B, 1, C, 1, 1)
    return 1 + F.pad(wrong / size.clamp(min=1e-12), (0,) * 6 + (1, 0))

def high_pass(x, cut=0.25):
    """Edges and texture of every frame of x (..., H, W), float32: without the frequencies (f, g)
    where f^2 + g^2 <= 2 cut, 1 being the highest on an axis (Vista: 39 % of them, the mean too)."""
    f, g = torch.fft.fftfreq(x.shape[-2], 0.5), torch.fft.rfftfreq(x.shape[-1], 0.5)
    keep = f[:, None] ** 2 + g ** 2 > 2 * cut + 1e-6        # (H, W // 2 + 1); rounding moves no tie
    return torch.fft.irfft2(torch.fft.rfft2(x.float()) * keep.to(x.device), x.shape[-2:])

def diffusion_loss(denoiser, clean, sigma, noise, weighting="edm", sigma_data=0.5, gamma=5.0,
                   dynamics=0.0, dynamics_toy=False, structure=0.0, **cond):
    """E[ weight(sigma) |denoiser(clean + sigma noise, sigma, cond) - clean|^2 ] (EDM eq. 2), a
    scalar, and by name its parts, of sigma's shape, whose sum the weight multiplies: `error`, the
    plain squared error, and what Vista adds at these strengths, `dynamics` and `structure`. clean
    and noise are (B, T, C, H, W), sigma (B,) or (B, T); weighting is a name or a Balance.
    Prediction: pass context=clean, a mask."""
    estimate = denoiser(clean + expand(sigma, clean) * noise, sigma, **cond)
    error = estimate - clean                                                       # (B, T, C, H, W)
    parts = dict(error=error ** 2)
    if dynamics:
        extra = dynamics * (dynamics_weight(estimate, clean, dynamics_toy) - 1)
        parts["dynamics"] = extra * parts["error"]
    if structure:                                       # linear: that of the difference is enough
        parts["structure"] = structure * high_pass(error) ** 2
    total = sum(parts.values())
    if isinstance(weighting, str):
        loss = expand(loss_weight(sigma, weighting, sigma_data, gamma), clean) * total
    else:
        given = cond["mask"].amax(1) > 0 if "mask" in cond else \
            torch.full((len(clean),), "previous" in cond, device=sigma.device)                # (B,)
        squares, weight = weighting(sigma, error, given)  # their sum over frames is that of error
        usual = (1 / weight).mean(1) if sigma.ndim == 1 else 1 / weight        # error at this level
        more = (total - parts["error"]) / expand(usual, clean)
        loss = expand(weight, clean) * squares + more
    return loss.mean(), {name: x.detach().flatten(sigma.ndim).mean(-1) for name, x in parts.items()}

def joint_loss(denoiser, clean, previous, sigma, noise, share=0.5, **options):
    """PVDM eq. 9: share * (loss given the clip before) + (1 - share) * (loss given nothing), so
    that one network both starts a video and continues it. Arguments as in diffusion_loss."""
    goes_on, parts = diffusion_loss(denoiser, clean, sigma, noise, previous=previous, **options)
    free, parts_free = diffusion_loss(denoiser, clean, sigma, noise, **options)
    parts_free |= {f"{name}_given": part for name, part in parts.items()}
    return share * goes_on + (1 - share) * free, parts_free

def joint_image_loss(denoiser, clean, images, sigma, noise, **options):
    """Joint training on clips (B, T, C, H, W) and pictures (B, N, C, H, W) from elsewhere (VDM sec.
    3), the mean over all T + N frames. VDM appends the pictures to the clip and masks temporal
    attention, so that each sees itself alone. That is a clip of one frame, which is what we make of
    it, at the noise level of its clip; it is told nothing. sigma is (B,), noise (B, T + N, C, H, W)
    and weighting a name; other arguments as in diffusion_loss."""
    T, N = clean.shape[1], images.shape[1]
    plain = {k: v for k, v in options.items() if k in ("weighting", "sigma_data", "gamma")}
    video, parts = diffusion_loss(denoiser, clean, sigma, noise[:, :T], **options)
    alone, noise = images.flatten(0, 1)[:, None], noise[:, T:].flatten(0, 1)[:, None]
    image, _ = diffusion_loss(denoiser, alone, sigma.repeat_interleave(N), noise, **plain)
    return (T * video + N * image) / (T + N), parts

def draw_mask(batch, frames, probabilities, task="predict"):
    """mask (B, T), 1 where a frame is given. n is drawn from 0, 1, 2 ... with these probabilities;
    where it is 0 no frame is given: that estimate guidance needs. Elsewhere, with task

    predict  the first n: prediction (Video LDM), from 1 the animation of a picture
    ends     the first and the last (PixelDance)
    any      1 to T - 1 of the frames, by chance (flexible diffusion, Harvey et al. 2022)
    image    every frame, and so with upsample: draw_context says what is then shown of them"""
    n = torch.multinomial(torch.tensor(probabilities, dtype=torch.float32), batch, replacement=True)
    some = (n > 0)[:, None].expand(batch, frames)                                          # (B, T)
    if task == "predict":
        return (torch.arange(frames) < n[:, None]).float()
    if task == "ends":
        return (some & (torch.arange(frames) % (frames - 1) == 0)).float()
    if task == "any":
        order = torch.rand(batch, frames).argsort(1).argsort(1)              # 0 ... T - 1, mixed
        return (some & (order < torch.randint(1, frames, (batch, 1)))).float()
    if task in ("image", "upsample"):
        return some.float()
    raise ValueError(f"task is {task!r}, expected predict, ends, any, image or upsample")

def augment(context, mask, sigma, noise):
    """Noise augmentation: put noise of level sigma, (B,) or (B, T), on context and write that level
    into the mask, where the network reads it -> context, mask. Trained so, a model takes what it is
    given for a hint, and forgives faults of another model or its own (Imagen Video; GameNGen)."""
    return context + expand(sigma, context) * noise, mask / (1 + expand(sigma, mask))

def draw_context(clean, mask, task="predict", sigma=None, noise=None, anchors=0):
    """context (B, T, C, H, W) to train on clean (B, T, C, H, W), and the mask (B, T) of draw_mask:
    as augment gives both where sigma (B,) and noise are passed, but for the first `anchors` frames.
    Two tasks need them:

    image     the first frame is given; on every other it stands, noised once, as a hint (SVD)
    upsample  each frame, shrunk 4 times and enlarged again, is a hint (Video LDM, Imagen Video)"""
    mask, context = mask.to(clean), clean
    if task == "image":
        context, anchors = clean[:, :1].expand_as(clean), max(anchors, 1)
    elif task == "upsample":
        small = F.interpolate(clean.flatten(0, 1), scale_factor=1 / 4, mode="area")
        context = F.interpolate(small, scale_factor=4, mode="bilinear").view_as(clean)
    if sigma is None:
        return context, mask
    hint = torch.arange(mask.shape[1], device=mask.device) >= anchors                        # (T,)
    noise = noise[:, :1] if task == "image" else noise
    return augment(context, mask, sigma[:, None] * hint, noise)

def motion_score(clip, cells=16):
    """How far things move per frame, as a share of the frame: (B,), of clips (B, T, C, H, W), the
    median over time. Where light only moves, change = -velocity * slope; hence, of frames averaged
    to cells x cells, |velocity|^2 = 2 sum change^2 / sum |slope|^2, whatever the direction."""
    if clip.shape[1] == 1:
        return clip.new_zeros(len(clip))
    x = F.adaptive_avg_pool2d(clip.float().flatten(0, 1), cells).unflatten(0, clip.shape[:2])
    change = x.diff(dim=1).square().sum((2, 3, 4))                                      # (B, T - 1)
    slope = sum(x.diff(dim=axis).square().sum((2, 3, 4)) for axis in (3, 4))                # (B, T)
    slope = (slope[:, 1:] + slope[:, :-1]) / 2                                          # (B, T - 1)
    return (2 * change / slope.clamp(min=1e-6)).sqrt().median(1)[0] / cells

def motion_rank(score, paces):
    """The share of clips that move less than score (B,): (B,), 0 to 1. paces (n,) are the scores
    that 0, 1 / (n - 1) ... 1 of them stay below. A model that is told it can be asked for slow or
    fast video and, asked for all ranks evenly, is as fast as its data (SVD's motion bucket, there
    by optical flow)."""
    last = len(paces) - 1
    i = torch.searchsorted(paces, score).clamp(1, last)
    part = (score - paces[i - 1]) / (paces[i] - paces[i - 1]).clamp(min=1e-9)
    return (i - 1 + part.clamp(0, 1)) / last

def drop_modes(action, sizes, rate, mode_rates):
    """Withhold (set to NaN) parts of action (B, T, A), A = sum(sizes), for whole clips: all of it
    with odds `rate`, so that guidance has an estimate without, and each mode on its own with odds
    mode_rates, one or one each, so that any may be left out (0.15 in Vista's configuration, whose
    clips come with one mode each, as sec. 3.2 has it; ours with all that there are)."""
    u = torch.rand(len(action), 1 + len(sizes))                                    # (B, 1 + modes)
    keep = (u[:, :1] >= rate) & (u[:, 1:] >= torch.as_tensor(mode_rates))              # (B, modes)
    keep = keep.repeat_interleave(torch.tensor(sizes), 1)[:, None].to(action.device)    # (B, 1, A)
    return action.where(keep, math.nan)                                                # (B, T, A)

# ==================================================================================================
# 5. Samplers
# ==================================================================================================
# Each is a plain function (denoise, x, sigmas, randn) -> clip. Of denoise(x, sigma) -> clean
# nothing more is known; x is sigmas[0] * noise; sigmas falls to 0 as karras_sigmas makes it;
# randn(x) draws unit noise like x for those that add some; (x - clean) / sigma is the noise in x.

def constant(sigma, x):
    """The same noise level (a number) for every clip of x: (B,)."""
    return torch.full((len(x),), float(sigma), device=x.device)

def pairs(sigmas):
    """The pairs of numbers (from, to) of neighbours in sigmas."""
    return zip(sigmas[:-1].tolist(), sigmas[1:].tolist())

@torch.no_grad()
def sample_ddpm(denoise, x, sigmas, randn=torch.randn_like, gamma=0.0):
    """Ancestral sampling (DDPM alg. 2): to the mean of q(next | x, clean), plus fresh noise of that
    distribution's variance for gamma 0, of the forward step's for 1, between them as in VDM."""
    for s, t in pairs(sigmas):
        clean, keep = denoise(x, constant(s, x)), (t / s) ** 2
        x = clean + keep * (x - clean)
        if t > 0:
            low, high = (1 - keep) * t ** 2, (1 - keep) * s ** 2 * (1 + t ** 2) / (1 + s ** 2)
            # high is beta, the variance of a forward step in z, at the scale of x: (1 + t^2) beta
            x = x + math.sqrt(low ** (1 - gamma) * high ** gamma) * randn(x)
    return x

@torch.no_grad()
def sample_ddim(denoise, x, sigmas, randn=torch.randn_like, eta=0.0):
    """DDIM eq. 12. eta 0: deterministic, Euler's method in sigma; eta 1: the same as DDPM."""
    for s, t in pairs(sigmas):
        clean = denoise(x, constant(s, x))
        fresh = eta * t * math.sqrt(1 - (t / s) ** 2)                  # std of the noise drawn anew
        x = clean + math.sqrt(t ** 2 - fresh ** 2) * (x - clean) / s
        if fresh > 0:
            x = x + fresh * randn(x)
    return x

@torch.no_grad()
def sample_heun(denoise, x, sigmas, randn=None):
    """EDM alg. 1: an Euler step, and again with the mean of the slopes at both ends. Error
    O(step^2) for two evaluations a step, but one for the last, which ends on the estimate."""
    for s, t in pairs(sigmas):
        clean = denoise(x, constant(s, x))
        if t == 0:
            return clean
        slope = (x - clean) / s
        ahead = x + (t - s) * slope
        x = x + (t - s) * (slope + (ahead - denoise(ahead, constant(t, x))) / t) / 2
    return x

@torch.no_grad()
def sample_dpmpp_2m(denoise, x, sigmas, randn=torch.randn_like, eta=0.0):
    """DPM-Solver++(2M) (alg. 2): the exact path if the estimate were constant; it is extrapolated
    from the last two, in -log sigma. Error O(step^2) for one evaluation a step. eta 1: its SDE
    form, which is DDPM with that extrapolation."""
    last = h_last = None
    for s, t in pairs(sigmas):
        clean = denoise(x, constant(s, x))
        if t == 0:
            return clean
        h = math.log(s / t)
        ahead = clean if last is None else clean + h / (2 * h_last) * (clean - last)
        keep = (t / s) ** (1 + eta)                                    # t / s is exp(-h)
        x = keep * x + (1 - keep) * ahead
        if eta > 0:
            x = x + t * math.sqrt(1 - (t / s) ** (2 * eta)) * randn(x)
        last, h_last = clean, h
    return x

SAMPLERS = dict(ddpm=sample_ddpm, ddim=sample_ddim, heun=sample_heun, dpmpp_2m=sample_dpmpp_2m,
                dpmpp_2m_sde=partial(sample_dpmpp_2m, eta=1.0))

@torch.no_grad()
def invert_ddim(denoise, x, sigmas, iterations=1):
    """Walk sample_ddim backwards: from a clip to the x at sigmas[0] from which it would reach it.

    A step from s to t is undone by solving y = x + (s - t) (y - denoise(y, s)) / s for y. Starting
    at y = x, one iteration is the usual inversion (target level, source clip); more are closer."""
    for t, s in pairs(sigmas.flip(0)):
        y = x
        for _ in range(iterations):
            y = x + (s - t) * (y - denoise(y, constant(s, y))) / s
        x = y
    return x

# ==================================================================================================
# 6. Generation
# ==================================================================================================

def triangle(low, high, frames):
    """Guidance scales (T,) that rise towards the middle and fall again, so that the windows of long
    videos do not over-saturate more and more (Vista, by its code; eq. 9 falls to 1 a frame later).
    With an even T none quite is high. (SVD's just rise: torch.linspace(low, high, T).)"""
    return low + (high - low) * (1 - torch.linspace(-1, 1, frames).abs())

def guided(denoise, scale, rescale=0.0, keep=()):
    """Context guidance: free + scale * (given - free), where free is the estimate without condition
    (Video LDM eq. 4; classifier-free guidance). scale is a number, or one per frame (T,) as in SVD
    and Vista; 1 is the plain conditional estimate, 0 the unconditional one. Guidance raises
    contrast; rescale, from 0 to 1, takes that share of the way back to the standard deviation of
    the conditional estimate of the clip (Lin et al. 2023, sec. 3.4, there 0.7). The conditions that
    `keep` names stay in free: Vista keeps given frames, ("context", "mask")."""
    scale = torch.as_tensor(scale, dtype=torch.float32).reshape(-1, 1, 1, 1)     # (T or 1, 1, 1, 1)

    def guided_denoise(x, sigma, **cond):
        free = denoise(x, sigma, **{name: cond[name] for name in cond if name in keep})
        given = denoise(x, sigma, **cond)
        out = free + scale.to(x) * (given - free)                                  # (B, T, C, H, W)
        want, std = (e.std((1, 2, 3, 4), keepdim=True) for e in (given, out))      # (B, 1, 1, 1, 1)
        out = out * (1 + rescale * torch.where(std > 1e-6, want / std - 1, 0))
        mask = cond.get("mask")                                     # given frames stay as they are
        return out if mask is None else torch.where(expand(mask, x) == 1, given, out)

    return guided_denoise

def temporally_guided(denoise, scale):
    """Guidance by what frames tell each other: together + (scale - 1) * change, where change is the
    part that varies over time of (together - alone), and alone is the estimate by the same model
    without its temporal layers: denoise must take temporal=0, as VideoUNet does and --images
    teaches it. Exaggerating the mean over time as well, as plain guidance would, makes things
    larger, slower (our form; related: skip guidance, 2411.18664)."""

    def guided_denoise(x, sigma, **cond):
        together = denoise(x, sigma, **cond)
        change = together - denoise(x, sigma, temporal=0.0, **cond)                # (B, T, C, H, W)
        out = together + (scale - 1) * (change - change.mean(1, keepdim=True))
        mask = cond.get("mask")                                     # given frames stay as they are
        return out if mask is None else torch.where(expand(mask, x) == 1, together, out)

    return guided_denoise

def reconstruction_guided(denoise, context, mask, weight=1.0):
    """Frames given to a model that was never trained to be given any (VDM sec. 3.1): where mask is
    1 the estimate is context, so that samplers keep x there at context + sigma noise; elsewhere it
    moves to where the network, too, would estimate context there. Costs a backward pass; weight
    above 1 moves more; 0 is mere replacement, whose new frames do not fit the old."""
    # With x_a given: E[x_b | z, x_a] = E[x_b | z] + (sigma_z^2 / alpha) grad_{z_b} log q(x_a | z),
    # q(x_a | z) ~ Normal(guess_a, sigma^2); z = alpha x, sigma_z = alpha sigma: no factor is left
    given = expand(mask, context) == 1                                             # (B, T, 1, 1, 1)

    def guided_denoise(x, sigma):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            guess = denoise(x, sigma)                                              # (B, T, C, H, W)
            error = torch.where(given, context - guess, 0).square().sum()
        gradient, = torch.autograd.grad(error, x)
        return torch.where(given, context, guess.detach() - weight / 2 * gradient)

    return guided_denoise

def clip_noise(seed, clips, device="cpu"):
    """A function (*shape) -> unit noise (len(clips), *shape), with one CPU generator per clip
    number: clip 3 of 8 is the clip 3 drawn alone, on any device."""
    states = [np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0] for i in clips]
    generators = [torch.Generator().manual_seed(int(s >> 1)) for s in states]
    return lambda *shape: torch.stack(
        [torch.randn(shape, generator=g) for g in generators]).to(device)

def generate(denoiser, shape, sigmas, sampler="heun", guidance=1.0, rescale=0.0,
             keep=(), temporal_guidance=1.0, reconstruction=0.0, noise=None, seed=0, **cond):
    """One window of video (B, T, C, H, W) = shape, sampled along sigmas. cond goes to the denoiser:
    context and mask (or, with reconstruction > 0, to reconstruction_guided as its weight),
    previous, label, action and motion, which by default is that of previous, untold where frames
    are given, or else drawn. noise is a clip_noise, by default that of clips 0 ... B - 1."""
    noise = noise or clip_noise(seed, range(shape[0]), next(denoiser.parameters()).device)
    if getattr(denoiser, "paces", None) is not None and "motion" not in cond:
        cond["motion"] = torch.special.ndtr(noise())                 # (B,), evenly from 0 to 1
        if "previous" in cond:
            cond["motion"] = motion_rank(motion_score(cond["previous"]), denoiser.paces)
        elif "mask" in cond and not reconstruction:
            cond["motion"].fill_(-1)
    given = (cond.pop("context"), cond.pop("mask")) if reconstruction and "mask" in cond else ()
    if temporal_guidance != 1:
        denoiser = temporally_guided(denoiser, temporal_guidance)
    if cond and (torch.as_tensor(guidance) != 1).any():
        denoiser = guided(denoiser, guidance, rescale, (*keep, "motion"))
    denoise = partial(denoiser, **cond)
    if given:
        denoise = reconstruction_guided(denoise, *given, reconstruction)
    x = sigmas[0].item() * noise(*shape[1:])
    return SAMPLERS[sampler](denoise, x, sigmas, lambda x: noise(*x.shape[1:]))

def reward(denoiser, shape, sigmas, ensemble=5, seed=0, **options):
    """exp(-variance), (B,), among `ensemble` clips from different noise: how sure the model is of
    what a condition leads to (Vista's reward of actions: 5 of 10 steps). Compare equal seeds."""
    clips = [generate(denoiser, shape, sigmas, seed=seed + i, **options) for i in range(ensemble)]
    return torch.exp(-torch.stack(clips).var(0).flatten(1).mean(1))

def rollout(denoiser, length, shape, sigmas, overlap=4, context=None, seed=0, clips=None,
            context_noise=0.0, anchors=0, jump=0.0, action=None, **options):
    """Yield a video of any length in pieces (B, n, C, H, W), window by window of shape (B, T, C, H,
    W), in constant memory: torch.cat(list(rollout(...)), 1). A window is given the last `overlap`
    frames so far (Video LDM, Vista) or, if the denoiser takes one, the whole one before (PVDM).

    context        (B, n, C, H, W): frames to start from     clips  clip numbers: they fix the noise
    context_noise  level of noise on what a window is given, which makes that hints: it need not go
                   on with their faults (GameNGen, diffusion forcing); once written, frames stay
    anchors        so many of the frames given are the first of all, without noise: they tell how
                   things look and how fast they go (StreamingT2V), the others where
    jump           where two or more frames are given, skip the noise levels between the first and
                   this, and temporal guidance: if they settle what comes, one estimate, the mean,
                   is nearer to it than a draw
    action         (B, length, A), with those of context's frames; after its end none is told
    motion         (B,), of all windows: by default that of context or, if that is less than two
                   frames, drawn by the noise"""
    B, T, *chw = shape
    device = next(denoiser.parameters()).device
    noise = clip_noise(seed, range(B) if clips is None else clips, device)
    tail = noise(0, *chw) if context is None else context.to(noise(0))             # (B, n, C, H, W)
    done, overlap = tail.shape[1], T if denoiser.takes_previous else overlap
    if not (done in (0, T) if denoiser.takes_previous else
            done < T and (anchors < overlap < T or length <= T)):
        raise ValueError(f"a window of {T} frames cannot go on: overlap is {overlap}, with "
                         f"{anchors} anchors, and context has {done} frames")
    if getattr(denoiser, "paces", None) is not None and "motion" not in options:
        even = torch.special.ndtr(noise())                                                # (B,)
        options["motion"] = motion_rank(motion_score(tail), denoiser.paces) if done > 1 else even
    if done:
        yield tail
    while done < length:
        given, cond = tail.shape[1], {}
        if given and denoiser.takes_previous:
            given, cond = 0, dict(previous=tail)
        elif given:
            seen = F.pad(tail, (0, 0, 0, 0, 0, 0, 0, T - given))                   # (B, T, C, H, W)
            mask = (torch.arange(T, device=device) < given).float().expand(B, T)
            if context_noise:
                level = context_noise * (torch.arange(T, device=device) >= anchors)[None]   # (1, T)
                seen, mask = augment(seen, mask, level, noise(*shape[1:]))
            cond = dict(context=seen, mask=mask)
        if action is not None:
            here = torch.arange(done - given, done - given + T)
            here[:anchors] = torch.arange(anchors)
            told = F.pad(action, (0, 0, 0, length + T), value=math.nan)
            cond["action"] = told[:, here].to(tail)                                    # (B, T, A)
        levels = sigmas
        if jump > 0 and tail.shape[1] > 1:
            levels = sigmas[(sigmas == sigmas[0]) | (sigmas <= jump)]
            cond["temporal_guidance"] = 1.0
        window = generate(denoiser, shape, levels, noise=noise, **(options | cond))
        window = torch.cat([tail[:, :given], window[:, given:]], 1)  # hints were estimated: undone
        new = window[:, given:][:, : length - done]
        done += new.shape[1]
        tail = torch.cat([window[:, :anchors], window[:, anchors - overlap:]], 1)
        yield new

def interpolate(denoiser, key_frames, factor, frames, sigmas, seed=0, clips=None, **options):
    """Put factor - 1 new frames between neighbours of key_frames (B, K, C, H, W), K > 1, which stay
    as they are: (B, factor (K - 1) + 1, C, H, W). Twice with 4 makes 16 times as many (Video LDM
    sec. 3.3). The denoiser must know such masks (task any of draw_mask). frames is the length of a
    window; other arguments as in rollout."""
    if not 1 < factor < frames:
        raise ValueError(f"factor is {factor}, expected 2 to {frames - 1}, in windows of {frames}")
    B, K, *chw = key_frames.shape
    noise = clip_noise(seed, range(B) if clips is None else clips, key_frames.device)
    pieces, gaps = [key_frames[:, :1]], (frames - 1) // factor          # gaps filled per window
    for start in range(0, K - 1, gaps):
        keys = key_frames[:, start : start + gaps + 1]                             # (B, k, C, H, W)
        at = torch.arange(keys.shape[1]) * factor
        context, mask = keys.new_zeros(B, frames, *chw), keys.new_zeros(B, frames)
        context[:, at], mask[:, at] = keys, 1
        window = generate(denoiser, (B, frames, *chw), sigmas, noise=noise, context=context,
                          mask=mask, **options)
        pieces.append(window[:, 1 : at[-1] + 1])
    return torch.cat(pieces, 1)

# ==================================================================================================
# 7. The network: a factorised space-time UNet
# ==================================================================================================
# Space and time take turns. A spatial layer sees the frames as a batch of pictures, "(b t) c h w";
# a temporal layer sees every place as a batch of little histories, "(b h w) t c". Each temporal
# layer is a gated residual, x + gate * f(x), whose gate starts at exactly 0: a fresh video network
# IS an image network applied frame by frame, and may be built on one already trained (Make-A-Video;
# Video LDM). Only the gate is zero, not the layer behind it: each would block the other's gradient.

def normalize(channels):
    """GroupNorm: 32 groups in wide layers, groups of 16 channels in narrow ones. A group of two
    channels would lose how bright the frame is, and at high noise little else is known."""
    wide = channels >= 256 and channels % 32 == 0
    return nn.GroupNorm(32 if wide else math.gcd(max(1, channels // 16), channels), channels)

def conv(dim_in, dim, kernel=3, stride=1):
    """A convolution that keeps height and width; with stride 2 it halves them."""
    return nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2)

def zero(layer):
    """Start a layer at zero, so that the residual branch it ends adds nothing at first."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer

def each_frame(layer, x):
    """Apply a layer of pictures to every frame of x (B, T, C, H, W)."""
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

def fourier(t, dim):
    """cos and sin of t (...), at dim / 2 frequencies from 1 to 1 / 10,000: (..., dim)."""
    freqs = torch.exp(-math.log(1e4) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t.float()[..., None] * freqs
    return torch.cat([angles.cos(), angles.sin()], -1)

def rotate(x, position):
    """Rotary positions (Su et al. 2021): turn pairs of features of x (N, heads, L, d) by angles in
    proportion to position (L, axes), so that products of tokens depend on their distance alone."""
    pairs, axes = x.shape[-1] // 2, position.shape[-1]                        # the axes take turns
    j = torch.arange(pairs, device=x.device)                # periods: 6 to at most 628 places
    angle = position[:, j % axes] * 100.0 ** (-(j // axes) * axes / pairs)              # (L, d / 2)
    cos, sin = angle.cos().to(x), angle.sin().to(x)  # x is (a, b), and x.roll(pairs) is (b, a)
    return x * torch.cat([cos, cos], -1) + x.roll(pairs, -1) * torch.cat([-sin, sin], -1)

def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v, all (N, heads, L, d). Many short sequences, those of temporal
    layers, are several times faster on a CPU as matrix products than fused."""
    if q.device.type == "cpu" and q.shape[-2] <= 256:
        return ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)

class TemporalConv(nn.Module):
    """A convolution over three neighbouring frames at every place (Make-A-Video's pseudo-3D)."""

    def __init__(self, dim):
        super().__init__()
        # transpose + Conv3d keeps the memory layout: several times faster than folding for Conv1d
        self.norm, self.conv = normalize(dim), nn.Conv3d(dim, dim, (3, 1, 1), padding=(1, 0, 0))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, strength=1.0):                                            # (B, T, C, H, W)
        h = F.silu(self.norm(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        h = self.conv(h.transpose(1, 2)).transpose(1, 2)             # as (B, C, T, H, W), and back
        return x + (strength * self.gate).to(x) * h                    # or x would become float32

class ResBlock(nn.Module):
    """Two 3x3 convolutions on every frame, scaled and shifted by the noise level, with a temporal
    one between them: what moves has to be followed through space and time in turn. Its gate has no
    gradient while conv2 is zero; conv2 has one at once, and is zero for the first step alone."""

    def __init__(self, dim_in, dim, dim_emb, dropout=0.0, convs=True):
        super().__init__()
        self.norm1, self.conv1 = normalize(dim_in), conv(dim_in, dim)
        self.time = TemporalConv(dim) if convs else None
        self.emb = nn.Linear(dim_emb, 2 * dim)
        self.norm2, self.conv2 = normalize(dim), zero(conv(dim, dim))
        self.dropout = nn.Dropout(dropout)
        self.skip = conv(dim_in, dim, 1) if dim_in != dim else nn.Identity()

    def forward(self, x, emb, strength=1.0):                            # (B, T, C, H, W), (B, T, E)
        (B, T), x = x.shape[:2], x.flatten(0, 1)                                    # (B T, C, H, W)
        scale, shift = self.emb(emb.flatten(0, 1))[..., None, None].chunk(2, 1)     # (B T, C, 1, 1)
        h = self.conv1(F.silu(self.norm1(x))).to(x)
        h = self.time(h.unflatten(0, (B, T)), strength).flatten(0, 1) if self.time else h
        h = self.conv2(self.dropout(F.silu(self.norm2(h) * (1 + scale) + shift)))
        return (self.skip(x) + h).to(x).unflatten(0, (B, T))                       # (B, T, C, H, W)

class GEGLU(nn.Module):
    """One half of the channels, gated by the GELU of the other (Shazeer 2020)."""

    def forward(self, x):
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)

def feed_forward(dim, gated=False):
    """What transformers have between attentions; those of latent diffusion are gated."""
    wide = [nn.Linear(dim, 8 * dim), GEGLU()] if gated else [nn.Linear(dim, 4 * dim), nn.GELU()]
    return nn.Sequential(nn.LayerNorm(dim), *wide, nn.Linear(4 * dim, dim))

def one_token(told, dim):
    """Cross-attention to one token, as SVD and Vista have it, is none: the softmax over one key is
    1, and the layers for value and output are all that is left. Starts at 0."""
    return nn.Sequential(zero(nn.Linear(told, dim, bias=False)), nn.Linear(dim, dim, bias=False))

class SpatialAttention(nn.Module):
    """Every place of a frame looks at all places of that frame and, with a width of `told`, at what
    is told of the frame; with both, a feed-forward layer follows (latent diffusion)."""

    def __init__(self, dim, head_dim=32, both=False, told=0):
        super().__init__()
        self.norm, self.heads = normalize(dim), dim // head_dim
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), zero(nn.Linear(dim, dim))
        self.feed_forward = feed_forward(dim, gated=True) if both else None
        self.told = one_token(told, dim) if told else None

    def forward(self, x, told=None):                                 # (B, T, C, H, W), (B, T, told)
        h = rearrange(self.norm(x.flatten(0, 1)), "bt c h w -> bt (h w) c")
        q, k, v = rearrange(self.qkv(h), "n l (z heads d) -> z n heads l d", z=3, heads=self.heads)
        h = self.out(rearrange(attend(q, k, v), "n heads l d -> n l (heads d)"))
        if self.told is not None and told is not None:
            h = h + self.told(told).flatten(0, 1)[:, None]
        x = x + rearrange(h, "(b t) (h w) c -> b t c h w", b=x.shape[0], h=x.shape[3])
        return x + self.feed_forward(x.movedim(2, -1)).movedim(-1, 2) if self.feed_forward else x

class TemporalAttention(nn.Module):
    """Every place looks at itself in all frames or, joint, at all places of all frames; a
    feed-forward layer follows (Video LDM) but for mode none (VDM); both adds one before, and embeds
    the frame's number (SVD). Rotary angles tell frames apart, so that clips may get longer."""

    def __init__(self, dim, head_dim=32, joint=False, mode="time", told=0):
        super().__init__()
        both = mode == "both"
        self.norm, self.heads, self.joint = normalize(dim), dim // head_dim, joint
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.feed_forward = feed_forward(dim, gated=both) if mode != "none" else None
        self.gate = nn.Parameter(torch.zeros(1))
        self.number = feed_forward(dim) if both else None
        self.before = feed_forward(dim, gated=True) if both else None
        self.told = one_token(told, dim) if told else None

    def forward(self, x, strength=1.0, told=None):                                 # (B, T, C, H, W)
        B, T, C, H, W = x.shape
        tokens, axes = ("b (t h w) c", (T, H, W)) if self.joint else ("(b h w) t c", (T,))
        h = rearrange(self.norm(x.flatten(0, 1)), f"(b t) c h w -> {tokens}", t=T)
        if self.before is not None:
            number = self.number(fourier(torch.arange(T, device=x.device), C))              # (T, C)
            h = h + repeat(number, f"t c -> {tokens}", b=B, h=H, w=W)
            h = h + self.before(h)
        q, k, v = rearrange(self.qkv(h), "n l (z heads d) -> z n heads l d", z=3, heads=self.heads)
        position = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in axes))
        position = position.reshape(-1, len(axes))                                       # (L, axes)
        seen = attend(rotate(q, position), rotate(k, position), v)
        seen = self.out(rearrange(seen, "n heads l d -> n l (heads d)"))                 # (N, L, C)
        if self.told is not None and told is not None:
            seen = seen + repeat(self.told(told), f"b t c -> {tokens}", h=H, w=W)
        h = h + seen if self.feed_forward else seen
        h = h + self.feed_forward(h) if self.feed_forward else h
        h = rearrange(h, f"{tokens} -> b t c h w", b=B, t=T, h=H, w=W)
        return x + (strength * self.gate).to(x) * h

class Block(nn.Module):
    """One step of the UNet: convolutions over space, then time; then, where there is attention, the
    same by attention, or by one over both if it is joint. With mode both, a layer leads into the
    attentions and one, which starts at 0, out of them (latent diffusion)."""

    def __init__(self, dim_in, dim, dim_emb, has_attention, joint, head_dim, dropout, convs=True,
                 mode="time", told=0, fp32=False):
        super().__init__()
        self.fp32 = fp32
        self.space = ResBlock(dim_in, dim, dim_emb, dropout, convs)
        self.time = TemporalConv(dim) if convs else None
        alone, both = has_attention and not joint, has_attention and mode == "both"
        self.space_attention = SpatialAttention(dim, head_dim, both, told) if alone else None
        self.time_attention = \
            TemporalAttention(dim, head_dim, joint, mode, told) if has_attention else None
        self.enter = nn.Sequential(normalize(dim), conv(dim, dim, 1)) if both else None
        self.leave = zero(conv(dim, dim, 1)) if both else None

    def forward(self, x, emb, strength=1.0, told=None):                 # (B, T, C, H, W), (B, T, E)
        # bf16 has three digits: in sums of many layers the little that moves a frame is rounded off
        x = self.space(x.float() if self.fp32 else x, emb, strength)
        x = self.time(x, strength) if self.time else x
        h = each_frame(self.enter, x) if self.enter else x
        h = self.space_attention(h, told) if self.space_attention else h
        h = self.time_attention(h, strength, told) if self.time_attention else h
        return x + each_frame(self.leave, h) if self.leave else h

class VideoUNet(nn.Module):
    """forward(x, c_noise, label, action, motion): x (B, T, in_channels, H, W) and c_noise (B,) or
    (B, T), the noise level as scalings gives it -> (B, T, out_channels, H, W). label (B,) is an int
    below `labels` or -1, none; action (B, T, `actions`), numbers per frame, NaN if untold; motion
    (B,) the rank of motion_rank, or -1. Each is added to the embedded noise level by a layer that
    starts at 0: a fresh network does not heed them.
    temporal, a number or (B,), tells how far temporal layers are heeded, 1 - alpha of Video LDM and
    SVD: at 0 it is an image model.

    width x mults are the channels of the levels; blocks the residual blocks of a level on each way
    (ddpm_layout: one more on the way up and in the middle, and skips from all layers); attention
    the downsampling factors with attention, joint those where it is joint over space and time.
    feed_forward is none, time, or both: SVD's transformers, each told the action again, as 128
    waves per number (Vista). Frames are cut into patch x patch tiles; around large ones a path of
    `detail` channels at full resolution keeps edges sharp. convs: whether there are temporal ones.
    With second_embedding, another MLP embeds c_noise wherever given (B, T) is True (Vista)."""

    def __init__(self, in_channels, out_channels, width=64, mults=(1, 2), blocks=1, attention=(2,),
                 joint=(2,), head_dim=32, patch=1, detail=0, dropout=0.0, labels=0, actions=0,
                 second_embedding=False, convs=True, feed_forward="time", ddpm_layout=False,
                 fp32_residuals=False, motion=False):
        super().__init__()
        waves = max(width, 48)                  # with fewer, given frames are told apart less well
        self.patch, self.ddpm_layout, dim_emb = patch, ddpm_layout, 4 * waves
        self.input = conv(in_channels * patch ** 2, width)
        self.embed = nn.Sequential(
            nn.Linear(waves, dim_emb), nn.SiLU(), nn.Linear(dim_emb, dim_emb), nn.SiLU())
        self.embed_given = copy.deepcopy(self.embed) if second_embedding else None
        self.embed_label = zero(nn.Embedding(labels + 1, dim_emb, 0)) if labels else None
        self.embed_action = zero(nn.Linear(2 * actions, dim_emb, False)) if actions else None
        self.embed_motion = zero(nn.Linear(2, dim_emb, False)) if motion else None

        def block(dim_in, dim, factor):
            return Block(dim_in, dim, dim_emb, factor in attention, factor in joint, head_dim,
                         dropout, convs, feed_forward, 128 * actions * (feed_forward == "both"),
                         fp32_residuals)

        self.down, self.up, dim = nn.ModuleList(), nn.ModuleList(), width
        skips, widths = [width] * ddpm_layout, [mult * width for mult in mults]
        for level, wide in enumerate(widths):
            if level > 0:
                self.down.append(conv(dim, dim, stride=2))
                skips += [dim] * ddpm_layout
            for _ in range(blocks):
                self.down.append(block(dim, wide, 2 ** level))
                dim = wide
                skips.append(dim)
        # DDPM's middle has attention, whether the level around it has or not
        self.middle = block(dim, dim, max(attention, default=0) if ddpm_layout else 2 ** level)
        self.middle_again = block(dim, dim, 0) if ddpm_layout else None
        for level, wide in reversed(list(enumerate(widths))):
            for _ in range(blocks + ddpm_layout):
                self.up.append(block(dim + skips.pop(), wide, 2 ** level))
                dim = wide
            if level > 0:
                finer = dim if ddpm_layout else widths[level - 1]
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv(dim, finer)))
                dim = finer
        self.detail = conv(in_channels, detail) if detail else None
        last, kernel = (detail, 1) if detail else (out_channels, 3)         # the path smooths, too
        self.output = nn.Sequential(normalize(dim), nn.SiLU(), conv(dim, last * patch ** 2, kernel))
        self.output_detail = nn.Sequential(conv(2 * detail, detail), nn.SiLU(), conv(
            detail, out_channels)) if detail else nn.Identity()
        zero((self.output_detail if detail else self.output)[-1])

    def forward(self, x, c_noise, label=None, action=None, motion=None, given=None, temporal=1.0):
        B, T = x.shape[:2]
        strength = expand(torch.as_tensor(temporal).to(x), x)                # (B or 1, 1, 1, 1, 1)
        c_noise = c_noise if c_noise.ndim == 2 else c_noise[:, None].expand(B, T)          # (B, T)
        # 1000: fourier is made for the numbers of DDPM's steps, log(sigma) / 4 spans about 2
        waves = fourier(1000 * c_noise, self.embed[0].in_features)                  # (B, T, waves)
        emb = self.embed(waves)                                                         # (B, T, E)
        if given is not None:
            emb = torch.where(given[..., None], self.embed_given(waves), emb)
        for name, told in dict(label=label, action=action, motion=motion).items():
            if told is not None and getattr(self, f"embed_{name}") is None:
                raise ValueError(f"{name} was given, but this model was built without")
        if label is not None:
            emb = emb + self.embed_label(label + 1)[:, None]             # row 0, for none, stays 0
        if action is not None:
            told, action = ~action.isnan(), action.nan_to_num()
            emb = emb + self.embed_action(torch.cat([action, told.to(action)], -1))
            action = (fourier(action, 128) * told[..., None]).flatten(2)             # (B, T, 128 A)
        if motion is not None:
            told = (motion >= 0).to(x)                                                       # (B,)
            rank = (motion - 0.5) * math.sqrt(12) * told  # even ranks: mean 0, deviation 1; (B,)
            emb = emb + self.embed_motion(torch.stack([rank, told], -1))[:, None]

        def step(layer, x):                    # a block, or to half or twice the height and width
            block = isinstance(layer, Block)
            return layer(x, emb, strength, action) if block else each_frame(layer, x)

        frames = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)      # (B T, C, H, W)
        tiles = F.pixel_unshuffle(frames, self.patch)                   # (B T, C p p, H / p, W / p)
        x = self.input(tiles).unflatten(0, (B, T))                     # (B, T, width, H / p, W / p)
        skips = [x] if self.ddpm_layout else []
        for layer in self.down:
            x = step(layer, x)
            if self.ddpm_layout or isinstance(layer, Block):
                skips.append(x)
        x = step(self.middle, x)
        x = step(self.middle_again, x) if self.ddpm_layout else x
        for layer in self.up:
            if isinstance(layer, Block):       # joined as pictures: channels stay last in memory
                x = torch.cat([y.flatten(0, 1) for y in (x, skips.pop())], 1).unflatten(0, (B, T))
            x = step(layer, x)
        x = F.pixel_shuffle(self.output(x.flatten(0, 1)), self.patch)               # (B T, C, H, W)
        if self.detail is not None:
            x = self.output_detail(torch.cat([self.detail(frames), x], 1))
        return x.unflatten(0, (B, T))

# ==================================================================================================
# 8. Adapters
# ==================================================================================================
# To train a few per cent of a trained network: each wraps a layer, and its last part is zero, so
# that at first nothing changes, bit for bit. adapt puts them in, trainable freezes the rest.

class LoRA(nn.Module):
    """layer(x) + B A x for a Linear or a convolution (LoRA; Vista: rank 16): A goes down to `rank`
    channels, normal with standard deviation 1 / rank as in Vista, B up again, zero."""

    def __init__(self, layer, rank=4):
        super().__init__()
        self.layer, (dim, dim_in), Layer = layer, layer.weight.shape[:2], type(layer)
        linear = isinstance(layer, nn.Linear)
        window = () if linear else (layer.kernel_size, layer.stride, layer.padding)
        self.lora_down = Layer(dim_in, rank, *window, bias=False)
        self.lora_up = zero(Layer(rank, dim, *(() if linear else (1,)), bias=False))
        nn.init.normal_(self.lora_down.weight, std=1 / rank)

    def forward(self, x):
        return self.layer(x) + self.lora_up(self.lora_down(x))

    @torch.no_grad()
    def merge(self):
        """The wrapped layer with B A added to its weight: the same answers at the old cost."""
        low_rank = self.lora_up.weight.flatten(1) @ self.lora_down.weight.flatten(1)
        self.layer.weight += low_rank.view_as(self.layer.weight)
        return self.layer

class SpatialAdapter(nn.Module):
    """h + up(GELU(down(h))) at each place of h = layer(x, ...), (B, T, C, H, W) (SimDA)."""

    def __init__(self, layer, dim, rank):
        super().__init__()
        self.layer, self.adapter_down = layer, nn.Linear(dim, rank)
        self.adapter_up = zero(nn.Linear(rank, dim))

    def forward(self, x, *more):
        h = self.layer(x, *more)
        return h + self.adapter_up(F.gelu(self.adapter_down(h.movedim(2, -1)))).movedim(-1, 2)

class FeedForwardAdapter(SpatialAdapter):
    """layer(x) + up(GELU(down(x))), beside a layer of tokens (..., C) (SimDA)."""

    def forward(self, x):
        return self.layer(x) + self.adapter_up(F.gelu(self.adapter_down(x)))

class TemporalAdapter(nn.Module):
    """h + up(conv(down(h))) of h = layer(x, emb), (B, T, C, H, W): conv looks at three frames, each
    channel alone (SimDA). An image model, strength 0, goes without."""

    def __init__(self, layer, dim, rank):
        super().__init__()
        self.layer, self.adapter_down = layer, nn.Conv3d(dim, rank, 1)
        self.adapter_conv = nn.Conv3d(rank, rank, (3, 1, 1), padding=(1, 0, 0), groups=rank)
        self.adapter_up = zero(nn.Conv3d(rank, dim, 1))

    def forward(self, x, emb, strength=1.0):
        h = self.layer(x, emb, strength)
        more = self.adapter_up(self.adapter_conv(self.adapter_down(h.transpose(1, 2))))
        return h + (strength * more.transpose(1, 2)).to(h)             # or h would become float32

def shift_tokens(x, shifts=((4, 3, 2, 1), (3, 2, 1, 0), (2, 1, 0, 0), (1, 2, 3, 4))):
    """Each place of x (B, T, H, W, ...) as it was shifts[y % 4][x % 4] frames ago or, had the clip
    not begun, as it is: four by four places then show five frames (SimDA's code)."""
    t, h, w = (torch.arange(n, device=x.device) for n in x.shape[1:4])
    t, h = t[:, None, None], h[:, None]
    source = t - torch.tensor(shifts, device=x.device)[h % 4, w % 4]                     # (T, H, W)
    return x[:, torch.where(source < 0, t, source), h, w]

def shift_attention(q, k, v, code=False):
    """SimDA's latent-shift attention, all (B, T, H, W, heads, d): each frame looks at 2 H W tokens
    instead of T H W. The paper: its own, and its own shifted; code=True, as its code has it: those
    of the frame before (of the first: its own) shifted, and its own shifted."""
    def seen(x):
        moved = shift_tokens(x)
        first = moved[:, [0, *range(x.shape[1] - 1)]] if code else x
        return torch.cat([first, moved], 2).flatten(2, 3).transpose(2, 3)   # (B, T, heads, 2HW, d)

    h = F.scaled_dot_product_attention(q.flatten(2, 3).transpose(2, 3), seen(k), seen(v))
    return h.transpose(2, 3).reshape(q.shape)

def adapt(denoiser, kind="lora", rank=4, layers=("space", "time", "output", "detail")):
    """Put adapters into a denoiser; return their parameters. lora: around matrices and convolutions
    with one of `layers` in their names (Vista: qkv and .out). simda: temporal ones behind
    ResBlocks, spatial ones behind attention over space, others beside feed-forward layers."""
    if kind not in ("lora", "simda") or rank < 1:
        raise ValueError(f"adapters is {kind!r}, rank {rank}: expected lora or simda, 1 or more")
    before = set(denoiser.parameters())
    for name, layer in reversed(list(denoiser.net.named_modules())):             # inner ones first
        linear = isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d))
        attention = isinstance(layer, (SpatialAttention, TemporalAttention))
        known = not name.startswith("embed")                    # whose width the network asks for
        if kind == "lora" and linear and known and any(word in name for word in layers):
            new = LoRA(layer, rank)
        elif kind == "simda" and isinstance(layer, ResBlock):
            new = TemporalAdapter(layer, layer.conv2.out_channels, rank)
        elif kind == "simda" and attention and getattr(layer, "joint", True):
            new = SpatialAdapter(layer, layer.out.out_features, rank)
        elif kind == "simda" and name.endswith("feed_forward"):
            new = FeedForwardAdapter(layer, layer[-1].out_features, rank)
        else:
            continue
        denoiser.net.set_submodule(name, new.to(next(layer.parameters()).device))
    return [p for p in denoiser.parameters() if p not in before]

def part_of(name):
    """The part of a model to which a parameter of this name belongs."""
    words = dict(lora_="lora", adapter_="adapters", embed_label="actions", embed_action="actions",
                 embed_motion="actions", time="temporal")
    return next((part for word, part in words.items() if word in name), "spatial")

def trainable(model, parts=("all",)):
    """Freeze a model but for these parts (part_of, or all). On a CPU let its input need a gradient,
    or PyTorch 2.13 dies in the backward pass of a GroupNorm (channels_last) with nothing before."""
    has = {part_of(name) for name, _ in model.named_parameters()} | {"all"}
    if not parts or not has.issuperset(parts):
        raise ValueError(f"train is {' '.join(parts)}, but the parts of this model are "
                         f"{', '.join(sorted(has))}: lora and adapters come with --adapters")
    for name, p in model.named_parameters():
        p.requires_grad_("all" in parts or part_of(name) in parts)

# ==================================================================================================
# 9. EMA
# ==================================================================================================

class EMA:
    """The moving average of a model's weights, in float32: .update(model) after every step, sample
    from .model. Update n keeps min(decay, (1 + n) / (10 + n)) of it, a warm-up that makes it of use
    from the first steps on. Buffers are copied."""

    def __init__(self, model, decay=0.999):
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, p in zip(self.model.parameters(), model.parameters()):
            average.lerp_(p.float(), 1 - decay)
        for copied, b in zip(self.model.buffers(), model.buffers()):
            copied.copy_(b)

# ==================================================================================================
# 10. Autoencoder
# ==================================================================================================
# Latent diffusion: a small network learns to say a frame in far fewer numbers, and only those are
# diffused. First encoder and decoder learn from frames; then, from clips, the decoder's temporal
# layers alone, gated residuals again, so that what it fills in does not flicker (Video LDM).

class Autoencoder(nn.Module):
    """encode(clip (B, T, C, H, W)) -> latents (B, T, latent, H / factor, W / factor), and decode
    back; factor is a power of two, from 2. Noise levels mean nothing unless one knows how far
    latents spread: so mean and std of each channel are measured, kept with the weights, and used
    on both ways. (Stable Diffusion's is one number that each program must know, 0.18215: forget it
    on one of the two ways, and colours come out wrong.)"""

    def __init__(self, channels=3, latent=4, width=32, factor=4):
        super().__init__()
        dims = [width * min(2 ** i, 4) for i in range(factor.bit_length() - 1)]
        down = [nn.PixelUnshuffle(2), conv(4 * channels, dims[0])]
        for dim, wider in zip(dims, dims[1:]):
            down += [nn.SiLU(), conv(dim, wider, stride=2)]
        self.encoder = nn.Sequential(*down, nn.SiLU(), conv(dims[-1], dims[-1]), nn.SiLU(),
                                     conv(dims[-1], 2 * latent))
        self.input = conv(latent, dims[-1])
        self.decoder = nn.ModuleList([ResBlock(dims[-1], dims[-1], 1)])
        for dim, finer in zip(dims[::-1], dims[-2::-1]):
            self.decoder.append(nn.Sequential(nn.Upsample(scale_factor=2), conv(dim, finer)))
            self.decoder.append(ResBlock(finer, finer, 1))
        self.output = nn.Sequential(normalize(dims[0]), nn.SiLU(), conv(dims[0], 4 * channels),
                                    nn.PixelShuffle(2))
        self.reach = len(dims)               # a temporal convolution per level sees one frame more
        self.register_buffer("mean", torch.zeros(latent, 1, 1))
        self.register_buffer("std", torch.ones(latent, 1, 1))

    def posterior(self, clip):
        """Mean and log variance of latents: training decodes draws of them, encode the mean."""
        mean, log_var = each_frame(self.encoder, clip).chunk(2, 2)                 # (B, T, c, h, w)
        return mean, log_var.clamp(-30, 20)

    def render(self, latents, temporal=1.0):
        """Decode latents as the encoder gives them; with temporal 0 each frame on its own."""
        x = each_frame(self.input, latents)
        none = x.new_zeros(*x.shape[:2], 1)                    # where a denoiser's noise level goes
        for layer in self.decoder:
            block = isinstance(layer, ResBlock)
            x = layer(x, none, temporal) if block else each_frame(layer, x)
        return each_frame(self.output, x)                                          # (B, T, C, H, W)

    @torch.no_grad()
    def measure(self, clips):
        """Find each channel's mean and standard deviation over clips, each (B, T, C, H, W)."""
        mean = torch.cat([self.posterior(x)[0].movedim(2, 0).flatten(1) for x in clips], 1)
        self.mean.copy_(mean.mean(1)[:, None, None])
        self.std.copy_(mean.std(1).clamp(min=1e-6)[:, None, None])

    def encode(self, clip):
        return (self.posterior(clip)[0] - self.mean) / self.std

    def stream(self, pieces, temporal=1.0):
        """Decode latents that come in pieces (B, n, c, h, w), each frame once all that its temporal
        layers reach has come: the clip of decode, in memory that does not grow with its length."""
        pieces = iter(pieces)
        z, done, more = next(pieces), 0, True               # latents at hand, how many are decoded
        while more is not None:
            more = next(pieces, None)
            ready = z.shape[1] - self.reach * (more is not None)
            if ready > done:
                with torch.autocast(z.device.type, enabled=False):
                    clip = self.render(z * self.std + self.mean, temporal)
                yield clip[:, done:ready]
                z, done = z[:, max(0, ready - self.reach) :], min(ready, self.reach)
            z = z if more is None else torch.cat([z, more], 1)

    def decode(self, latents, chunk=16, temporal=1.0):
        return torch.cat(list(self.stream(latents.split(chunk, 1), temporal)), 1)

def ae_loss(autoencoder, clip, noise, kl=1e-4, temporal=0.0):
    """A scalar and its parts by name: `reconstruction`, absolute plus squared error, and `kl`, of
    the posterior from Normal(0, 1), mean per latent; noise is like the latents. No LPIPS, whose
    network would have to be downloaded, and no GAN: what latents do not tell comes out blurred."""
    mean, log_var = autoencoder.posterior(clip)
    error = autoencoder.render(mean + (log_var / 2).exp() * noise, temporal) - clip
    parts = dict(reconstruction=error.abs().mean() + error.square().mean(),
                 kl=(mean ** 2 + log_var.exp() - 1 - log_var).mean() / 2)
    return parts["reconstruction"] + kl * parts["kl"], {k: x.detach() for k, x in parts.items()}

# ==================================================================================================
# 11. Worlds that can be marked
# ==================================================================================================
# A dataset gives dict(video=clip (T, C, H, W)) for any index 0, 1, 2 ... without end, and what it
# gives depends on its seed and the index alone: a run can be resumed from a number. If it has them,
# there is a label of .labels classes, and an action (T, A) of modes of the lengths .actions.

class MovingShapes:
    """On black, one or two solid shapes move at constant speed in straight lines and bounce off the
    walls. Each keeps its kind, colour and size. The label of one alone is 6 kind + colour. RADIUS
    (half its box) and SPEED (per frame) are shares of the shorter side. Shapes are lamps, whose
    light adds up; two have different primary colours, so each has a colour channel to itself."""

    KINDS = "disc", "square", "triangle"
    COLORS = dict(red=(1, 0, 0), green=(0, 1, 0), blue=(0, 0, 1),
                  yellow=(1, 1, 0), magenta=(1, 0, 1), cyan=(0, 1, 1))
    RADIUS, SPEED = (0.18, 0.25), (0.03, 0.08)

    def __init__(self, frames=8, size=(32, 32), objects=1, seed=0):
        self.frames, self.size, self.objects, self.seed = frames, tuple(size), objects, seed
        self.palette = np.float32(list(self.COLORS.values()))[: 6 if objects == 1 else 3]
        self.labels, self.actions = 18 * (objects == 1), ()

    def __getitem__(self, i):
        rng, unit = np.random.default_rng([self.seed, i]), min(self.size)
        video = np.zeros((self.frames, 3, *self.size), np.float32)
        for shade in rng.permutation(len(self.palette))[: self.objects]:
            kind, r = rng.integers(3), rng.uniform(*self.RADIUS) * unit
            speed, angle = rng.uniform(*self.SPEED) * unit, rng.uniform(0, 2 * np.pi)
            walls, way = np.array(self.size) - r, np.array([np.sin(angle), np.cos(angle)])
            path = rng.uniform(r, walls) + speed * way * np.arange(self.frames)[:, None]    # (T, 2)
            y, x = self.bounce(path, r, walls).T
            cover = np.float32(self.draw(kind, r, y, x, self.size))                      # (T, H, W)
            video += cover[:, None] * self.palette[shade][:, None, None]
        label = dict(label=6 * int(kind) + int(shade)) if self.labels else {}
        return dict(video=torch.from_numpy(video) * 2 - 1, **label)                   # (T, 3, H, W)

    @staticmethod
    def bounce(x, low, high):
        """Fold a straight line into [low, high]: that is all an elastic wall does."""
        return high - np.abs((x - low) % (2 * (high - low)) - (high - low))

    @staticmethod
    def draw(kind, r, y, x, size):
        """The share of each pixel that shapes of one kind cover: arrays (...) -> (..., H, W)."""
        r, y, x = (np.asarray(a)[..., None, None] for a in (r, y, x))
        down, side = np.arange(size[0])[:, None] + 0.5 - y, np.abs(np.arange(size[1]) + 0.5 - x)
        outside = (np.hypot(side, down) - r if kind == 0 else                 # distance to the edge
                   np.maximum(side, np.abs(down)) - r if kind == 1 else
                   np.maximum(down - r, (2 * side - down - r) / 5 ** 0.5))
        return np.clip(0.5 - outside, 0, 1)

    def check(self, videos):
        """Mark clips (B, T, 3, H, W) in [-1, 1]: a dict that tells of each law below if all shapes
        keep it, (B,); `passed`, if all are kept; kinds, colors, speeds as seen, (B, objects)."""
        v = np.clip((torch.as_tensor(videos).float().cpu().numpy() + 1) / 2, 0, 1)
        (B, T, _, H, W), dark = v.shape, 0
        if self.objects == 2:                    # a clip per channel; the darkest one has no shape
            order = v.mean((1, 3, 4)).argsort(1)                                            # (B, 3)
            v = v[:, None] * np.eye(3, dtype=v.dtype)[order][:, :, None, :, None, None]
            dark, v = v[:, 0].max((1, 2, 3, 4)), v[:, 1:].reshape(-1, T, 3, H, W)  # N = 2 B of them
        light = np.clip((v.max(2) - 0.1) / 0.8, 0, 1)                # (N, T, H, W), 1 where covered
        rows, cols = light.max(3), light.max(2)                           # its shadows on two walls
        height, width = rows.sum(2), cols.sum(2)                                            # (N, T)
        y = rows @ (np.arange(H) + 0.5) / np.maximum(height, 1e-3)
        x = cols @ (np.arange(W) + 0.5) / np.maximum(width, 1e-3)
        radius = (height + width) / 4
        r = np.median(radius, 1, keepdims=True)                                             # (N, 1)
        ideal = np.stack([self.draw(kind, radius, y, x, (H, W)) for kind in range(3)])
        both, either = np.minimum(ideal, light), np.maximum(ideal, light)          # (3, N, T, H, W)
        match = both.sum((3, 4)) / np.maximum(either.sum((3, 4)), 1e-3)                  # (3, N, T)
        core = (light > 0.9)[:, :, None]                                           # (N, T, 1, H, W)
        color = (v * core).sum((3, 4)) / np.maximum(core.sum((3, 4)), 1)                 # (N, T, 3)
        far = np.abs(color - self.palette[:, None, None]).max((2, 3))                 # (colours, N)
        miss_y, speed_y = self.fit_path(y, r, H - r)
        miss_x, speed_x = self.fit_path(x, r, W - r)
        speed = np.hypot(speed_y, speed_x) / min(H, W)                                # (N, windows)
        usual = np.median(speed, 1, keepdims=True)
        laws = dict(
            shape=match.min(2).max(0) > 0.75,              # in all frames one kind, nothing besides
            color=far.min(0) < 0.25,                       # one colour of the palette
            size=np.abs(radius - r) < 0.12 * r,            # that of all frames
            path=np.maximum(miss_y, miss_x) < 1.5 * min(H, W) / 32,   # a bouncing straight line ...
            speed=np.abs(speed - usual) < 0.02,            # ... at one speed
            moving=speed > self.SPEED[0] / 2)              # a frozen clip breaks this law alone
        laws = {name: kept.reshape(B, -1).all(1) for name, kept in laws.items()}
        laws["shape"] &= dark <= 0.5
        found = dict(kinds=match.mean(2).argmax(0), colors=far.argmin(0), speeds=usual)
        found = {name: a.reshape(B, -1) for name, a in found.items()}
        return dict(passed=np.all(list(laws.values()), 0), **laws, **found)

    def fit_path(self, x, low, high, window=8):
        """In every `window` frames, how far a coordinate x (N, T) strays from the bouncing path, of
        97 speeds and 13 places, that fits best, and that path's speed: (2, N, windows)."""
        window, found = min(window, x.shape[1]), []
        limit = 1.25 * self.SPEED[1] * (low + high).min()
        speeds, places = np.linspace(-limit, limit, 97), np.linspace(-1.5, 1.5, 13)
        lines = places[:, None] + speeds[:, None, None] * (np.arange(window) - window // 2)
        runs = np.lib.stride_tricks.sliding_window_view(x, window, 1)[:, :, None]
        for run, a, b in zip(runs, low, np.maximum(high, low + 1)):          # (windows, 1, window)
            paths = self.bounce(run[..., window // 2, None] + lines.reshape(-1, window), a, b)
            miss = np.abs(paths - run).max(2)                                 # (windows, 97 x 13)
            found.append([miss.min(1), np.abs(speeds[miss.argmin(1) // len(places)])])
        return np.stack(found, 1)

class Drive:
    """An endless map seen from above by a car that obeys one command per frame: left, straight,
    right (45 degrees off, at one speed; nothing turns) or stop. It lasts for another frame with a
    chance of 0.7. action[t] is what moved the view from frame t - 1 to t, in two modes: the
    command, one-hot (4), and the motion (2), down and right as shares of the speed."""

    KEYS, SPEED = "LSRX", 1 / 16              # left, straight, right, stop; share of the short side
    MOVES = np.array([(-0.5 ** 0.5, -0.5 ** 0.5), (-1, 0), (-0.5 ** 0.5, 0.5 ** 0.5), (0, 0)])
    ACTIONS = np.hstack([np.eye(4), MOVES]).astype(np.float32)       # (4, 6): that of each command

    def __init__(self, frames=8, size=(32, 32), seed=0):
        self.frames, self.size, self.seed = frames, tuple(size), seed
        self.labels, self.actions, self.speed = 0, (4, 2), self.SPEED * min(size)

    def __getitem__(self, i):
        rng, n = np.random.default_rng([self.seed, i]), 12
        turn = np.where(rng.random(self.frames) < 0.7, 0, rng.integers(1, 4, self.frames))
        commands = (rng.integers(4) + turn.cumsum()) % 4                                      # (T,)
        place = self.speed * self.MOVES[commands].cumsum(0)                                 # (T, 2)
        # the map, in each channel: n plane waves, weight exp(i (ky y + kx x)), between -1 and 1
        length, angle = min(self.size) * rng.uniform(0.4, 1.2, n), rng.uniform(0, 2 * np.pi, n)
        k = 2 * np.pi / length * np.array([np.sin(angle), np.cos(angle)])                   # (2, n)
        weight = rng.normal(size=(2, 3, 1, n)) / n ** 0.5
        y, x = (np.exp(1j * k[a] * (np.arange(self.size[a])[:, None] + place[:, a, None, None]))
                for a in (0, 1))                                             # (T, H, n), (T, W, n)
        waves = ((weight[0] + 1j * weight[1]) * y[:, None]) @ x[:, None].mT           # (T, 3, H, W)
        return dict(video=torch.from_numpy(np.tanh(waves.real)).float(),
                    action=torch.from_numpy(self.ACTIONS[commands]))

    def check(self, videos, action=None):
        """Mark clips (B, T, 3, H, W) by the motion seen between neighbouring frames: a dict of
        commands (B, T - 1), what each frame t > 0 followed, -1 if its motion is none of the four
        (to 0.3 of the speed), or explains less than two thirds of the picture; obeys (B, T - 1), if
        action (B, T, 6) says so or, without one, any command; passed (B,), if all frames obey."""
        v = torch.as_tensor(videos).float().cpu().numpy()
        x = np.stack([v, *np.gradient(v, axis=(3, 4))], 2)       # (B, T, 3, 3, H, W), with slopes
        m = 2 + int(self.speed)                       # what comes in at the edges is not looked at
        new = x[:, 1:, ..., m:-m, m:-m].reshape(*x[:, 1:].shape[:3], -1)          # (B, T - 1, 3, n)
        costs = []
        for move in self.speed * self.MOVES:   # least squares around a whole shift (Lucas, Kanade)
            shift = move.round().astype(int)
            old = np.roll(x, -shift, (4, 5))[:, :-1, ..., m:-m, m:-m].reshape(new.shape)
            change, slope = (new - old)[:, :, :1], (new + old)[:, :, 1:] / 2
            along = slope @ change.mT                                           # (B, T - 1, 2, 1)
            rest = np.linalg.solve(slope @ slope.mT + 1e-4 * np.eye(2), along)   # beyond the shift
            error = (change ** 2).sum((2, 3)) - (rest * along).sum((2, 3))              # (B, T - 1)
            near = np.linalg.norm(shift + rest[..., 0] - move, axis=2) < 0.3 * self.speed
            explained = error / new.shape[3] < new[:, :, 0].var(2) / 3 - 1e-3  # no blank ones
            costs.append(np.where(near & explained, error, np.inf))
        commands = np.where(np.isfinite(costs).any(0), np.argmin(costs, 0), -1)         # (B, T - 1)
        told = commands if action is None else action[:, 1:, :4].argmax(2).cpu().numpy()
        obeys = (commands == told) & (commands >= 0)
        return dict(commands=commands, obeys=obeys, passed=obeys.all(1))

# ==================================================================================================
# 12. Video files
# ==================================================================================================

VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}

def to_uint8(clip):
    """float (..., C, H, W), clamped to [-1, 1] -> uint8 (..., H, W, C); NaN is a ValueError."""
    if not torch.isfinite(clip).all():
        raise ValueError("the clip holds NaN or infinite values")
    pixels = (clip.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).movedim(-3, -1).numpy()

def from_uint8(frames):
    """uint8 numpy (..., H, W, C) -> float32 (..., C, H, W) in [-1, 1]; to_uint8 undoes it."""
    return torch.tensor(frames).movedim(-1, -3) / 127.5 - 1

def decode(path, size=None, channels=3, keep=list):
    """The clips in a file (many in a .npy, .npz) or the one in a folder of pictures -> list of
    uint8 (T, h, w, channels), made by keep clip after clip, and frames per second. Frames are
    shrunk until they just cover size = (h, w), and cropped. ValueError, with the cause, for what is
    missing or damaged."""
    import imageio.v3 as iio
    from imageio_ffmpeg import get_ffmpeg_exe
    from PIL import Image, ImageOps, ImageSequence

    def pixels(image):           # modes La, RGBa: times alpha, so that what is transparent is black
        if image.mode in ("I", "F"):                                     # whose white nothing tells
            raise ValueError(f"pixels of mode {image.mode}, expected 8 or 16 bits")
        if image.mode.startswith("I;16"):                        # convert would cut 16 bits at 255
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        mode = ("L" if channels == 1 else "RGB") + "a" * image.has_transparency_data
        image = ImageOps.exif_transpose(image).convert(mode.upper()).convert(mode)
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR) if size else image
        return np.atleast_3d(image)[..., :channels]                              # (h, w, channels)

    suffix, fps = path.suffix.lower(), 8.0                       # pictures and arrays have no speed
    try:
        if suffix in VIDEOS:
            # what is left of a broken file reads as if it were whole: only ffmpeg's messages tell
            test = [get_ffmpeg_exe(), *"-v error -map 0:v:0 -f null - -i".split(), path.absolute()]
            if said := subprocess.run(test, input=b"", capture_output=True).stderr.decode():
                raise ValueError(f"ffmpeg cannot read all: {said.splitlines()[-1].split('] ')[-1]}")
            clips = [map(Image.fromarray, iio.imiter(path, plugin="FFMPEG"))]
            fps = iio.immeta(path, plugin="FFMPEG")["fps"]
        elif suffix in (".gif", ".webp"):
            if suffix == ".gif" and path.read_bytes().rstrip(b"\0\r\n")[-1:] != b";":
                raise ValueError("the GIF is truncated, its end mark is missing")
            images = ImageSequence.all_frames(Image.open(path))
            speeds = [1000 / (x.info.get("duration") or 1000 / fps) for x in images]  # 1 / seconds
            fps = max(speeds)           # GIF merges equal frames into one that lasts longer: undone
            clips = [[x for x, speed in zip(images, speeds) for _ in range(round(fps / speed))]]
        elif suffix in (".npy", ".npz"):
            arrays, clips = np.load(path, mmap_mode="r", allow_pickle=False), []   # no code inside
            for x in arrays.values() if suffix == ".npz" else [arrays]:
                if x.shape[2:] == (64, 64) and len(x) == 20 < x.shape[1]:
                    x = x.swapaxes(0, 1)                        # Moving MNIST alone is (T, N, H, W)
                x = x if x.shape[-1:] in [(1,), (3,), (4,)] else x[..., None]     # grey has no axis
                x = x if x.ndim == 5 else x[None]                                 # (N, T, H, W, C)
                # 1 or 3 frames without colour are rather the channels of a (N, C, H, W): not found
                if x.dtype == np.uint8 and x.ndim == 5 and x.shape[1::3] not in ((1, 1), (3, 1)):
                    clips += [(Image.fromarray(np.tile(frame, 3)[..., :3]) for frame in clip)
                              for clip in x]
            if not clips:
                raise ValueError(f"no uint8 ([N,] T, H, W [, C]), last was {x.dtype} {x.shape}")
        else:
            names = [p for p in path.glob("[!.]*") if p.suffix.lower() in PICTURES]
            names.sort(key=lambda p: (len(p.stem), p.stem))                  # frame2 before frame10
            clips = [map(Image.open, names or [path])]
        return keep(np.stack([pixels(image) for image in clip]) for clip in clips), fps
    except Exception as error:         # each decoder raises its own; the last line tells the cause
        raise ValueError(f"{path}: {(str(error) or repr(error)).splitlines()[-1]}") from error

def read_video(path, size=None, channels=3):
    """The first clip in a path -> float (T, channels, H, W) in [-1, 1]; arguments as in decode."""
    return from_uint8(decode(Path(path), size, channels)[0][0])

def write_video(path, clip, fps=8.0, scale=None):
    """Write clip, float (T, C, H, W) in [-1, 1], C 1 or 3, or a sequence of such frames, as .mp4,
    .gif (equal frames merge) or, of one, .png, each pixel scale x scale; return the path."""
    import imageio.v3 as iio
    path, suffix, shape = Path(path), Path(path).suffix.lower(), clip[0].shape
    if suffix not in (".mp4", ".gif", ".png") or len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{path}: needs .mp4, .gif or .png and (T, 1|3, H, W), got T x {shape}")
    k = scale or math.ceil(128 / min(*shape[1:], 128))                # so that one sees tiny clips
    k += not scale and any(k * side % 2 for side in shape[1:])             # H.264 needs even sides
    frames = (to_uint8(x.expand(3, -1, -1)).repeat(k, 0).repeat(k, 1) for x in clip)
    how = {".mp4": dict(plugin="FFMPEG", fps=fps, quality=8, macro_block_size=2), ".png": {},
           ".gif": dict(duration=max(20, 10 * round(100 / fps)), loop=0)}      # GIF counts in 10 ms
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")                 # then path is there whole, or not at all
    try:
        iio.imwrite(part, frames if suffix == ".mp4" else [*frames], is_batch=True, **how[suffix])
        return part.replace(path)
    except Exception as error:
        if suffix != ".mp4":
            raise
        print(f"{path}: ffmpeg failed ({error!r:.80}), writing a .gif instead")
        return write_video(path.with_suffix(".gif"), clip, fps, scale)
    finally:
        part.unlink(missing_ok=True)

def film_strip(clips, line=-0.6):
    """(B, T, C, H, W) -> picture (C, B * (H + 1) + 1, T * (W + 1) + 1): row b is clip b, column t
    is frame t, with dark lines between. Any axes may stand in the place of C."""
    B, T, *C, H, W = clips.shape
    x = F.pad(clips, (1, 0, 1, 0), value=line).movedim(0, -3).movedim(0, -2)  # (C, B, H+1, T, W+1)
    return F.pad(x.reshape(*C, B * (H + 1), T * (W + 1)), (0, 1, 0, 1), value=line)

def grid(clips):
    """(B, T, C, H, W) -> one clip (T, C, H', W') of all, side by side; empty cells are black."""
    columns = math.ceil(len(clips) ** 0.5)
    clips = F.pad(clips, (0, 0) * 4 + (0, -len(clips) % columns), value=-1)
    return film_strip(clips.unflatten(0, (-1, columns)))

class VideoFolder:
    """The clips in a file, or below a folder or its train/; a folder of pictures is one. dataset[i]
    is dict(video=float (frames, channels, H, W) in [-1, 1]) for any i >= 0 and depends on (seed, i)
    alone; every len(dataset) items hold each clip once, from a random start, with `before` frames
    more, those before it or, where there are none, the clip's first. Actions, numbers (T, A) in
    clip.actions.npy beside clip.mp4, are cut as frames are, NaN (untold) where there are none.
    .report says what was used, what not and why; .fps is an item's speed. read may be another
    decode, one that keeps clips on disk."""

    def __init__(self, path, frames, size, stride=1, channels=3, seed=0, progress=False, read=None,
                 before=0):
        from tqdm import tqdm
        self.stride, self.channels, self.seed, self.before = stride, channels, seed, before
        self.span = (frames - 1) * stride + 1          # the stored frames that an item extends over
        self.clips, self.moves, self.labels, self.actions, self.turn = [], [], 0, (), None
        speeds, skipped, root = [], [], Path(path)
        if not root.exists():
            raise ValueError(f"{path} does not exist")
        root = root / "train" if (root / "train").is_dir() else root
        below = map(root.joinpath, glob("**", root_dir=root, recursive=True))          # none hidden
        files = {p.parent if p.suffix.lower() in PICTURES and p != root else p
                 for p in (root, *below) if p.is_file() and not p.name.endswith(".actions.npy")}
        for file in tqdm(sorted(files), "decoding", disable=not progress):
            try:
                clips, fps = (read or decode)(file, size, channels)
                moves = self.read_actions(file.with_suffix(".actions.npy"), clips)
                self.moves += [m for m, clip in zip(moves, clips) if len(clip) >= self.span]
                self.clips += [clip for clip in clips if len(clip) >= self.span]
                speeds.append(fps)
                if (least := min(map(len, clips))) < self.span:
                    raise ValueError(f"{file}: {least} frames are too few, an item takes "
                                     f"{self.span}: lower --frames or --stride")
            except ValueError as error:
                skipped.append(f"skipped {error}")
        self.fps = float(np.median(speeds or [0])) / stride
        self.report = "\n      ".join([
            f"data: {len(files)} files in {root} -> {len(self)} clips used, {len(skipped)} skipped"
            f", {size[0]}x{size[1]} crop, {channels} channels, {self.fps:g} fps" +
            f", {sum(m is not None for m in self.moves)} with actions" * bool(self.actions),
            *skipped[:9], *[f"skipped {len(skipped) - 9} more"] * (len(skipped) > 9)])
        if not self.clips:
            raise ValueError(self.report)

    def read_actions(self, path, clips):
        """Of each clip its actions (T, A), or None if there is no such file."""
        if not path.is_file():
            return [None] * len(clips)
        try:
            x = np.load(path).astype(np.float32)
            x = x if x.ndim == 3 else x[None]                                            # (N, T, A)
            A = self.actions or x.shape[-1:]
            if [a.shape for a in x] != [(len(c), *A) for c in clips] or np.isinf(x).any():
                raise ValueError(f"{x.shape} is not {len(clips)} clips x {len(clips[0])} frames x "
                                 f"{A[0]} finite numbers, or NaN where none is told")
        except Exception as error:
            raise ValueError(f"{path}: {error}") from error
        self.actions = A
        return list(x)

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, i):
        turn, k = divmod(i, len(self))
        if turn != self.turn:                                  # drawn once per round of clips
            self.turn = turn
            self.order = np.random.default_rng([self.seed, 0, turn]).permutation(len(self))
        clip, moves = self.clips[self.order[k]], self.moves[self.order[k]]
        start = np.random.default_rng([self.seed, 1, i]).integers(len(clip) - self.span + 1)
        cut = start + np.arange(-self.before * self.stride, self.span, self.stride).clip(-start)
        moves = np.full((len(clip), *self.actions), np.nan, np.float32) if moves is None else moves
        action = dict(action=torch.from_numpy(moves[cut])) if self.actions else {}
        return dict(video=from_uint8(clip[cut]), **action)

# ==================================================================================================
# 13. Models: presets, build, save, load
# ==================================================================================================
# The papers' models, but: learning rates fall, and rds and svd embed given frames as clean.
# "Unverified": in neither papers nor code. With 4 channels, size counts latents of 8 x 8 pixels

paper = partial(Config, channels=4, factor=8, blocks=2, ddpm_layout=True, joint=(), head_dim=64,
                patch=1, detail=0, given_noise=1.0, images=0.0, optimizer="adamw", warmup=0,
                ema=0.9999, temporal_guidance=1.0, anchor=0.0, jump=0.0, motion=False)
early = partial(paper, frames=16, width=256, convs=False, feed_forward="none", kind="eps",
                weighting="eps", context=(1.0,), sampler="ddpm")
stable = partial(paper, size=(72, 128), width=320, mults=(1, 2, 4, 4), attention=(1, 2, 4),
                 feed_forward="both", kind="edm", sigma_data=1.0, weighting="edm", mean=1.0,
                 std=1.6, sampler="ddim", sigma_min=0.002, sigma_max=700.0)
PRESETS = {                             # a preset is a set of defaults; any flag after it wins
    "tiny": Config(),                   # the toy world on a laptop
    # the toy world, 16 frames of 64 x 64 pixels, by latents of 4 x 16 x 16 per frame. Encoders here
    # give them standard deviation 1: hence sigma_data (which --kind or --weighting edm would heed)
    "latent": Config(frames=16, size=(16, 16), channels=4, factor=4, sigma_data=1.0, width=48,
                     mults=(1, 2), attention=(2,), joint=(2,), detail=8, steps=1500, anchor=0.0,
                     jump=0.0, sigma_min=0.2, motion=False),
    # Moving MNIST (mnist_test_seq.npy), the usual first data set; about 10 M parameters
    "mnist": Config(frames=20, size=(64, 64), channels=1, width=64, mults=(1, 2, 4), head_dim=32,
                    attention=(2, 4), patch=4, detail=8, context=(0.5, *[0] * 9, 0.5), overlap=10,
                    steps=20_000, ema=0.999, anchor=0.0, jump=0.0, sigma_min=0.2),
    # VDM, 16 x 64 x 64 pixels: 1.17 B (reconstructed, unpublished). Theirs samples evenly in u,
    # with gamma 0.1 (sample_ddpm). Unverified: fps, clip_norm
    "ucf101": early(size=(64, 64), channels=3, factor=0, fps=25.0, mults=(1, 2, 4, 8),
                    attention=(2, 4, 8), dropout=0.1, schedule="cosine", stills=8, steps=60_000,
                    batch=128, lr=3e-4, gate_lr=3e-4, weight_decay=0.0, sampling_steps=256,
                    sigma_min=4.54e-5, sigma_max=22026.0),
    # PVDM-L, 16 x 256 x 256 pixels; S: --width 128 --head-dim 32. Theirs, 528 M and 132 M, has 3
    # planes for frames, samples evenly in u; ours: 459, 115 M. Unverified: fps, clip_norm, steps
    "sky": early(size=(32, 32), mults=(1, 2, 4, 4), attention=(1, 2, 4), schedule="scaled_linear",
                 previous=True, joint_weight=0.2, steps=850_000, batch=64, lr=1e-4, gate_lr=1e-4,
                 sampling_steps=200, sigma_min=0.0388, sigma_max=83.8),
    # Video LDM, key frames, 128 x 256 pixels, without labels; theirs trains temporal layers alone.
    # Unverified: frames, betas, context, clip_norm, ema, sampling, widths (its text model's)
    "rds": stable(frames=8, size=(16, 32), fps=2.0, kind="v", schedule="linear", weighting="v",
                  context=(1 / 3, 1 / 3, 1 / 3), overlap=2, drop=0.1, steps=73_000, batch=640,
                  lr=1e-4, gate_lr=1e-4, sampling_steps=200, sigma_min=0.01, sigma_max=157.4),
    # SVD, 14 x 576 x 1024 pixels (XT: --frames 25): 1.52 B, ours 1.42: no CLIP, no fps, keeps frame
    # 0; theirs has log-normal noise on it. Unverified: odds of context, clip_norm, scale of motion
    "svd": stable(frames=14, fps=7.0, context=(0.15, 0.85), task="image", context_noise=0.1,
                  motion=True, drop=0.0, overlap=1, steps=50_000, batch=768, lr=3e-5, gate_lr=3e-5,
                  sampling_steps=25),
    # Vista, 25 x 576 x 1024 pixels: phase 1, with phase 2's actions (command, trajectory, speed,
    # angle, goal; theirs one a clip): 1.65 B, ours 1.51: no CLIP, SVD's weights, frame 0 as input
    "vista": stable(frames=25, fps=10.0, dynamics=1.0, structure=0.1, offset=0.02, lr=1e-5,
                    offset_per_frame=True, context=(1 / 15, 2 / 15, 4 / 15, 8 / 15), give="replace",
                    overlap=3, motion=True, actions=(1, 8, 4, 4, 2), drop=0.0, steps=20_000,
                    batch=256, gate_lr=1e-5, spatial_lr=0.1, warmup=1000, clip_norm=0.3,
                    sampling_steps=50),
}

def noise_schedule(config):
    """The training noise schedule of a config: a function u -> sigma."""
    f = SCHEDULES[config.schedule]
    f = partial(f, mean=config.mean, std=config.std) if f is lognormal else f
    return (lambda u: resolution_shift(f(u), config.size, config.base)) if config.base else f

def build(config):
    """Config -> Denoiser with fresh weights. Settings that do nothing are refused by train.py."""
    known = dict(kind=("eps", "v", "x0", "edm"), schedule=SCHEDULES, sampler=SAMPLERS,
                 weighting=("x0", "eps", "v", "edm", "min_snr", "balance"),
                 give=("concat", "replace", "per_frame"), feed_forward=("none", "time", "both"))
    for name, choices in known.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} is {getattr(config, name)!r}, expected one of "
                             f"{', '.join(choices)}")
    draw_mask(1, 2, config.context, config.task)                  # an unknown task is a ValueError
    multiple = config.patch * 2 ** (len(config.mults) - 1)          # a level halves the tiled frame
    near = [max(multiple, round(n / multiple) * multiple) for n in config.size]
    if near != [*config.size]:
        raise ValueError(f"size is {config.size}, patch and mults need multiples of {multiple}: "
                         f"the nearest that works is --size {' '.join(map(str, near))}")
    wide = [m * config.width for i, m in enumerate(config.mults) if 2 ** i in config.attention]
    wide += [config.mults[-1] * config.width] * (config.ddpm_layout and bool(config.attention))
    if any(n % config.head_dim for n in wide) or wide and config.head_dim % 2:
        raise ValueError(f"head_dim is {config.head_dim}: it must be even and divide the channels "
                         f"of every level that has attention, {wide}")
    concat = config.give == "concat"
    in_channels = (1 + concat + config.previous) * config.channels + concat
    net = VideoUNet(in_channels, config.channels, config.width, config.mults, config.blocks,
                    config.attention, config.joint, config.head_dim, config.patch, config.detail,
                    config.dropout, config.labels, sum(config.actions), config.give == "replace",
                    config.convs, config.feed_forward, config.ddpm_layout, config.fp32_residuals,
                    config.motion)
    paces = torch.full((17,), -1.0) if config.motion else None
    denoiser = Denoiser(net, config.kind, config.sigma_data, config.previous, config.give, paces)
    if config.weighting == "balance":
        denoiser.balance = Balance(config.frames)              # kept, and resumed, with the weights
    if config.adapters:
        adapt(denoiser, config.adapters, config.rank)
    return denoiser

def build_autoencoder(config):
    """Config -> Autoencoder with fresh weights, of colour frames."""
    if config.factor < 2 or config.factor & (config.factor - 1):
        raise ValueError(f"factor is {config.factor}: an autoencoder needs a power of two, from 2")
    return Autoencoder(3, config.channels, config.ae_width, config.factor)

def save(path, **state):
    """Write a checkpoint of tensors and plain values by way of a temporary file: whatever happens,
    a full disk or a kill, path holds the old checkpoint or the new one, whole."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:                               # torch.save raises either
        raise OSError(f"could not write {path} ({e}); an older one there is untouched") from e
    finally:
        temporary.unlink(missing_ok=True)

def read_checkpoint(path):
    """What save wrote -> (dict, Config). Refused: code, which weights_only never runs, and a config
    with other fields than ours, as its network may have been another, too."""
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if missing := Config.__dataclass_fields__.keys() - state["config"].keys():
            raise ValueError(f"its config has no {', '.join(sorted(missing))}")
        return state, Config(**state["config"])
    except Exception as e:                                         # each kind of damage has its own
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:150]
        raise ValueError(f"{path} is no checkpoint of this program: it is truncated, of another "
                         f"version, or holds code, which is never run ({reason})") from e

def with_weights(model, weights, path):
    """model with these weights, in evaluation mode."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        reason = str(e).splitlines()[-1].strip()
        raise ValueError(f"the weights in {path} do not fit the config in it: {reason}") from e
    return model.eval().requires_grad_(False)

def load(path):
    """A checkpoint -> (Denoiser with averaged weights, in evaluation mode, on the CPU; Config)."""
    state, config = read_checkpoint(path)
    if "stage" in state:
        raise ValueError(f"{path} is an autoencoder: train on its latents with --latents {path}")
    return with_weights(build(config), state.get("ema", {}), path), config

def load_autoencoder(path):
    """The checkpoint of an autoencoder, or of a model trained on the latents of one -> (Autoencoder
    or, if there is none in it, None; Config)."""
    state, config = read_checkpoint(path)
    weights = state.get("ema" if "stage" in state else "autoencoder")
    return weights and with_weights(build_autoencoder(config), weights, path), config
