"""
vdm.py: video diffusion models in one file. Part I is the whole method, an hour or two of reading.

A video diffusion model in four lines:

    x     = clean + sigma * noise                     put noise on a clip; sigma says how much
    guess = denoiser(x, sigma)                        a network estimates the clean clip
    loss  = weight(sigma) * (guess - clean)^2         training: do that at every noise level
    x     = guess + next * (x - guess) / sigma        sampling: from pure noise down to sigma = 0

(x - guess) / sigma is the estimated noise. A step of sampling takes the guess, and puts this noise
back at the next, lower level. The best guess is the mean of all clips that could hide behind x. At
a high level it is a blur. As sigma falls, fewer clips are possible, and the guess gets sharper.

Part I    The method, to be read: 1 Noise, 2 Denoiser, 3 Loss, 4 Samplers, 5 Network, 6 EMA,
          7 Generation, 8 Demo. `python vdm.py` trains a small model in three minutes.
Part II   The papers (titles in README.md), to paste from: 9 DDPM, VDM, EDM, 10 Video LDM, 11 PVDM,
          12 SVD, Vista, 13 FVDM, 14 Adapters and editing. They change nothing in Part I.
Part III  Tools: 15 Worlds that mark their own videos, 16 Video files, 17 Models, 18 Programs

Shapes    B clips, T frames, C channels, H height, W width. A clip is float (B, T, C, H, W), and its
          values lie in [-1, 1]. Other axes are named where they appear.
Names     sigma     noise level (B,), or (B, T) if every frame has its own
          sigmas    the noise levels of a sampler, falling to 0: (steps + 1,), or (steps + 1, T)
          denoise   a function (x, sigma, **conditions) -> guess of the clean clip: e.g. a Denoiser
          context   the clip that holds the given frames, (B, T, C, H, W)
          mask      which frames of context are given, (B, T): 1 given, 0 to be generated
          temporal  weight of the temporal layers, a number or (B,). At 0 every frame is on its own
          scale     strength of guidance: 1 is none, above 1 exaggerates
"""

import copy
import math
from functools import partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

# ##################################################################################################
# PART I. THE METHOD. Read it from here to section 8.
# ##################################################################################################

# ==================================================================================================
# 1. Noise
# ==================================================================================================
# There is one corruption in this file: x = clean + sigma * noise. Papers that write
# z = alpha * clean + sqrt(1 - alpha^2) * noise mean the same x at another scale: z = alpha * x, and
# alpha = 1 / sqrt(1 + sigma^2). (DDPM calls alpha^2 alpha-bar.)

def expand(values, x):
    """Append axes to values, (B,) or (B, T), so that they multiply a clip x (B, T, C, H, W)."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))

def lognormal(u, mean=1.5, std=1.2):
    """Noise levels for training: log(sigma) is normal (EDM), for u uniform in (0, 1), of any shape.

    The mean, of log(sigma), decides what the network learns most about. At exp(1.5) = 4.5 a small
    frame looks like pure noise to the eye, but its object and place can just be guessed."""
    return torch.exp(mean + std * torch.special.ndtri(u.double())).float()    # ndtri: u -> normal

def karras_sigmas(n, sigma_min=0.2, sigma_max=60.0, rho=7.0):
    """Noise levels for sampling, (n + 1,): from sigma_max to sigma_min, evenly spaced in
    sigma^(1 / rho), then 0 (EDM eq. 5). Fine detail needs a smaller sigma_min (EDM: 0.002)."""
    roots = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n)
    return torch.tensor([*roots ** rho, 0.0], dtype=torch.float32)

def scalings(sigma, kind, sigma_data=0.5):
    """c_skip, c_out, c_in, c_noise, each of the shape of sigma (EDM eq. 7).

    The clean estimate is c_skip * x + c_out * net(c_in * x, c_noise). So input and output of the
    network are neither huge nor tiny at any sigma. c_noise tells it sigma, as t does in DDPM. kind
    says what the network predicts; root is sqrt(1 + sigma^2):
    eps  the noise (DDPM):                            clean = x - sigma * eps
    v    (noise - sigma * clean) / root (VDM):        clean = x / root^2 - sigma / root * v
    flow noise - clean (flow matching):               clean = (x - sigma * flow) / (1 + sigma)
    edm  -v, scaled for data of standard deviation sigma_data, a number for edm alone (EDM)
    x0   the clip itself. It has structure, unlike noise: so narrow networks learn it best"""
    c_noise = sigma.clamp(min=1e-4).log() / 4                            # sigma may be 0
    if kind == "edm":
        root = (sigma ** 2 + sigma_data ** 2).sqrt()
        return sigma_data ** 2 / root ** 2, sigma * sigma_data / root, 1 / root, c_noise
    root = (sigma ** 2 + 1).sqrt()
    if kind == "v":
        return 1 / root ** 2, -sigma / root, 1 / root, c_noise
    if kind == "eps":
        return torch.ones_like(sigma), -sigma, 1 / root, c_noise
    if kind == "x0":
        return torch.zeros_like(sigma), torch.ones_like(sigma), 1 / root, c_noise
    if kind == "flow":
        return 1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma), c_noise
    raise ValueError(f"kind is {kind!r}, expected eps, v, flow, x0 or edm")

# ==================================================================================================
# 2. Denoiser
# ==================================================================================================

def concat_frames(context, mask):
    """(mask * context, mask) as one tensor (B, T, C + 1, H, W), as the network is shown it.
    A missing frame is shown as 0, like a grey one. The mask tells them apart (Video LDM)."""
    given = expand(mask, context)                                                  # (B, T, 1, 1, 1)
    frames = torch.where(given == 1, context, 0)               # elsewhere context may hold anything
    return torch.cat([frames, given.expand_as(context[:, :, :1])], dim=2)

class Denoiser(nn.Module):
    """A network with its scalings: denoiser(x, sigma) estimates the clean clip, like x.

    x is clean + sigma * noise; sigma is (B,), (B, T), or a number. The network is called as
    net(c_in * x, c_noise, **conditions), with c_noise (B, T) = log(sigma) / 4.

    The frames of context that mask marks are given. In x they are noisy like all others, so their
    c_in is that of sigma. The network sees them clean in further channels: concat (B, T, C + 1, H,
    W). Their c_noise is that of sigma 0, as it is for a clean frame. The estimate repeats them."""
    def __init__(self, net, kind="x0", sigma_data=0.5):
        super().__init__()
        self.net = net
        self.kind = kind
        self.sigma_data = sigma_data

    def forward(self, x, sigma, context=None, mask=None, **conditions):
        if (context is None) != (mask is None):
            raise ValueError("context and mask belong together: pass both or neither")
        sigma = torch.as_tensor(sigma, device=x.device)
        if sigma.ndim < 2:
            sigma = sigma.reshape(-1, 1).expand(x.shape[:2])                                # (B, T)
        c_skip, c_out, c_in, c_noise = scalings(sigma, self.kind, self.sigma_data)          # (B, T)
        if mask is not None:
            mask = mask.to(x)
            conditions["concat"] = concat_frames(context, mask)
            *_, c_noise = scalings(sigma * (1 - mask), self.kind)                           # (B, T)
        output = self.net(expand(c_in, x) * x, c_noise, **conditions)              # (B, T, C, H, W)
        estimate = expand(c_skip, x) * x + expand(c_out, x) * output.to(x.dtype)
        if mask is None:
            return estimate
        return torch.where(expand(mask, x) == 1, context, estimate)

# ==================================================================================================
# 3. Loss
# ==================================================================================================

def inverse_sigma(sigma):
    """Weight 1 / sigma: the squared error grows roughly like sigma. So all levels count alike."""
    return 1 / sigma.clamp(min=1e-4)

def diffusion_loss(denoiser, clean, sigma, noise, weight=inverse_sigma, change=1.0, **conditions):
    """The weighted squared error of the clean estimate (EDM eq. 2), plus that of its change.

    clean and noise are clips (B, T, C, H, W), sigma is (B,) or (B, T), weight a function of sigma.
    conditions go to the denoiser. To train on given frames pass context=clean and a mask; their
    error is 0. Returns the loss and, for a log, the plain squared error, of the shape of sigma.

    At high noise nearly all of the error is about where things are. That cannot be known, and it
    drowns what can be known: that neighbouring frames agree. Hence the second term: `change` times
    the squared error of guess[:, i + 1] - guess[:, i], not divided by sigma."""
    x = clean + expand(sigma, clean) * noise
    error = denoiser(x, sigma, **conditions) - clean                               # (B, T, C, H, W)
    loss = (expand(weight(sigma), clean) * error ** 2).mean()
    count = max(error[:, 1:].numel(), 1)                 # 1 for a single frame, as mean() is NaN
    loss = loss + change * (error.diff(dim=1) ** 2).sum() / count
    return loss, (error ** 2).detach().flatten(sigma.ndim).mean(-1)                # like sigma

def first_frames(batch, frames, odds):
    """A mask (batch, frames) that gives the first n frames. n is drawn: 0 with odds[0], and so on.

    Trained on such masks, one network starts videos (n = 0) and continues them (Video LDM)."""
    n = torch.multinomial(torch.tensor(odds, dtype=torch.float32), batch, replacement=True)
    return (torch.arange(frames) < n[:, None]).float()

# ==================================================================================================
# 4. Samplers
# ==================================================================================================
# A sampler is a function (denoise, x, sigmas, randn) -> clip. x starts as sigmas[0] * noise; randn
# draws fresh noise. If the guess is right, (x - guess) / s is the noise in x. Put back at level t,
# it makes guess + t * (x - guess) / s, which is keep * x + (1 - keep) * guess with keep = t / s.

def descent(sigmas, x):
    """For each step from s to the next level t: s for every clip of x, (B,), and keep = t / s.

    With sigmas (steps + 1, T) every frame has levels of its own: then s is (B, T). Where a level
    does not change, keep is 1: the frame stays as it is. A first reader may think of (B,) alone."""
    sigmas = sigmas.to(x)[:, None].expand(len(sigmas), len(x), *sigmas.shape[1:])
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        yield s, expand(torch.where(s > 0, t / s, 1), x)                   # (B, 1 or T, 1, 1, 1)

@torch.no_grad()
def sample_ddim(denoise, x, sigmas, randn=None):
    """DDIM (eq. 12, eta 0), Euler's method: the guess, and its noise back at the next level."""
    for s, keep in descent(sigmas, x):
        guess = denoise(x, s)
        x = keep * x + (1 - keep) * guess
    return x

@torch.no_grad()
def sample_dpmpp_2m(denoise, x, sigmas, randn=torch.randn_like, eta=0.0):
    """DPM-Solver++(2M), algorithm 2: DDIM's step, with the guess for the middle of the step.

    The last two guesses tell the slope against -log(sigma): ahead = guess + slope * h / 2. So the
    error falls with the square of the step, at one evaluation a step. With eta = 1 (the SDE form)
    noise shrinks from s to t^2 / s, and fresh noise fills it up to t: that mends earlier faults."""
    last = h_last = x.new_zeros(1)
    for s, keep in descent(sigmas, x):
        guess = denoise(x, s)
        h = -keep.log()                                               # the step in -log(sigma)
        # part is 0, as in DDIM, at the first step (h_last is 0) and the last (h is infinite)
        part = (h / (2 * h_last)).nan_to_num(0, 0, 0)
        ahead = guess + part * (guess - last)
        share = keep ** (1 + eta)
        x = share * x + (1 - share) * ahead
        if eta > 0:
            x = x + expand(s, x) * keep * (1 - keep ** (2 * eta)).sqrt() * randn(x)
        last = guess
        h_last = h
    return x

# ==================================================================================================
# 5. Network: a factorised space-time UNet
# ==================================================================================================
# Space and time take turns. A spatial layer sees frames as pictures, "(b t) c h w". A temporal one
# sees every place as a short history, "(b h w) t c". Each temporal layer is x + gate * f(x), and
# its gate starts at 0. So a fresh video network is an image network applied to every frame, and
# a trained image network can be extended to video (Make-A-Video, Video LDM). Only the gate is 0,
# not the layer behind it: if both were 0, neither would ever get a gradient.

def normalize(channels):
    """GroupNorm over groups of 16 channels or more: 48 channels make 3 groups, 17 make 1."""
    return nn.GroupNorm(math.gcd(max(1, channels // 16), channels), channels)

def conv(dim_in, dim, kernel=3, stride=1, bias=True):
    """A convolution of pictures that keeps height and width. With stride 2 it halves them."""
    return nn.Conv2d(dim_in, dim, kernel, stride, kernel // 2, bias=bias)

def each_frame(layer, x):
    """Apply a layer of pictures to every frame of x (B, T, C, H, W)."""
    pictures = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)     # faster on a CPU
    return layer(pictures).unflatten(0, x.shape[:2])

def waves(position, dim):
    """cos and sin of position (...), at dim / 2 frequencies from 1 to about 1e-4: (..., dim)."""
    frequencies = 1e4 ** (-torch.arange(dim // 2, device=position.device) / (dim // 2))
    angles = position.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)

def places(sizes, device):
    """The coordinates of all places of a grid of these sizes: (L, axes)."""
    axes = torch.meshgrid([torch.arange(n, device=device) for n in sizes], indexing="ij")
    return torch.stack(axes, dim=-1).flatten(0, -2)

def rotate(x, position):
    """Rotary positions (Su et al. 2021) for x (N, heads, L, d), position (L, axes). May be skipped.

    Pairs of features (i, i + d / 2) are turned by angles that grow with the position. So position
    enters the product of two tokens only as their difference. With three axes, pairs 0, 3, 6 ...
    turn with t, 1, 4, 7 ... with h, 2, 5, 8 ... with w; later pairs turn more slowly."""
    half = x.shape[-1] // 2
    axes = position.shape[-1]
    j = torch.arange(half, device=x.device)                  # the axes take turns: j % axes
    angle = position[:, j % axes] * 100.0 ** (-(j // axes) * axes / half)              # (L, d / 2)
    cos = angle.cos().to(x)
    sin = angle.sin().to(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

class TemporalConv(nn.Module):
    """A convolution over three neighbouring frames at every place (Make-A-Video)."""
    def __init__(self, dim):
        super().__init__()
        self.norm = normalize(dim)
        self.conv = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0))    # faster than Conv3d on few clips
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, temporal=1.0):                                            # (B, T, C, H, W)
        h = rearrange(F.silu(each_frame(self.norm, x)), "b t c h w -> b c t (h w)")
        h = rearrange(self.conv(h), "b c t (h w) -> b t c h w", h=x.shape[3])  # a row is a frame
        return x + expand(torch.as_tensor(temporal).to(x), x) * self.gate.to(x) * h

class ResBlock(nn.Module):
    """Two 3 x 3 convolutions on every frame, and a temporal one between them. emb (B, T, E), the
    embedded noise level, sets the gain and the shift of each channel."""
    def __init__(self, dim_in, dim, dim_emb):
        super().__init__()
        self.conv1 = nn.Sequential(normalize(dim_in), nn.SiLU(), conv(dim_in, dim))
        self.time = TemporalConv(dim)
        self.emb = nn.Linear(dim_emb, 2 * dim)
        self.norm2 = normalize(dim)
        self.conv2 = conv(dim, dim)
        self.skip = conv(dim_in, dim, 1) if dim_in != dim else nn.Identity()

    def forward(self, x, emb, temporal=1.0):                            # (B, T, C, H, W), (B, T, E)
        h = self.time(each_frame(self.conv1, x), temporal)
        gain, shift = self.emb(emb)[..., None, None].chunk(2, dim=2)               # (B, T, C, 1, 1)
        h = each_frame(self.norm2, h) * (1 + gain) + shift
        return each_frame(self.skip, x) + each_frame(self.conv2, F.silu(h))

class Attention(nn.Module):
    """Self-attention and a feed-forward layer. A token is one place in one frame. `over` names the
    axes it looks along: all places of its frame ("hw"), its place in all frames ("t"), or
    everything ("thw"). L tokens look at each other; the other axes act as a batch of N."""
    def __init__(self, dim, head_dim=16, over="hw"):
        super().__init__()
        self.heads = dim // head_dim
        self.over = over
        self.norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):                                                          # (B, T, C, H, W)
        sizes = dict(b=x.shape[0], t=x.shape[1], h=x.shape[3], w=x.shape[4])
        folded = {"hw": "(b t) (h w) c", "t": "(b h w) t c", "thw": "b (t h w) c"}[self.over]
        position = places([sizes[axis] for axis in self.over], x.device)                 # (L, axes)
        tokens = rearrange(x, f"b t c h w -> {folded}")                                  # (N, L, C)
        h = self.norm(tokens)
        q, k, v = (rearrange(layer(h), "n l (heads d) -> n heads l d", heads=self.heads)
                   for layer in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(rotate(q, position), rotate(k, position), v)
        tokens = tokens + self.out(rearrange(seen, "n heads l d -> n l (heads d)"))
        tokens = tokens + self.feed_forward(tokens)
        return rearrange(tokens, f"{folded} -> b t c h w", **sizes)

class TemporalAttention(nn.Module):
    """Attention over time, or over space and time at once, as a temporal layer: x + gate * change.
    The gate is 0 at first. It learns well at 5 to 10 times the learning rate of the rest."""
    def __init__(self, dim, head_dim=16, over="t"):
        super().__init__()
        self.attention = Attention(dim, head_dim, over)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x, temporal=1.0):                                            # (B, T, C, H, W)
        change = self.attention(x) - x                                 # attention includes the skip
        return x + expand(torch.as_tensor(temporal).to(x), x) * self.gate.to(x) * change

class Block(nn.Module):
    """One step of the UNet: convolutions over space and time, then attention, which is "none",
    "factorised" (over space, then over time), or "joint" (over both at once; for small frames)."""
    def __init__(self, dim_in, dim, dim_emb, attention, head_dim):
        super().__init__()
        if attention not in ("none", "factorised", "joint"):
            raise ValueError(f"attention is {attention!r}, expected none, factorised or joint")
        self.res = ResBlock(dim_in, dim, dim_emb)
        self.time = TemporalConv(dim)                              # a second one, after res's own
        self.space_attention = nn.Identity()
        self.time_attention = None
        if attention == "factorised":
            self.space_attention = Attention(dim, head_dim, over="hw")
            self.time_attention = TemporalAttention(dim, head_dim, over="t")
        if attention == "joint":
            self.time_attention = TemporalAttention(dim, head_dim, over="thw")

    def forward(self, x, emb, temporal=1.0):                            # (B, T, C, H, W), (B, T, E)
        x = self.time(self.res(x, emb, temporal), temporal)
        x = self.space_attention(x)
        if self.time_attention is not None:
            x = self.time_attention(x, temporal)
        return x

class ConcatInput(nn.Sequential):
    """Where given frames enter. It belongs to the temporal layers, though it has no gate: an image
    model has no given frames. Without a bias a mask of zeros is the same as no concat."""

class VideoUNet(nn.Module):
    """net(x (B, T, channels, H, W), c_noise (B, T)) -> (B, T, channels, H, W).

    Level i has width * mults[i] channels, and is half as large as the one before. It has `blocks`
    blocks on each way, with attention[i] (see Block). Frames are cut into tiles of patch x patch
    pixels, which saves most of the work. H and W must be multiples of patch * 2^(levels - 1).

    concat (B, T, concat_channels, H, W) are further channels; given frames need channels + 1.
    conditions are modules, e.g. {"text": nn.Sequential(...)}: then net(..., text=value) adds its
    output (B, T or 1, dim_emb) to the embedded noise level. A fresh network returns 0."""
    def __init__(self, channels=3, concat_channels=4, width=16, mults=(1, 3, 6), blocks=1,
                 attention=("none", "factorised", "joint"), head_dim=16, patch=2, dim_emb=256,
                 conditions=None):
        super().__init__()
        self.conditions = nn.ModuleDict(conditions or {})
        self.embed = nn.Sequential(
            nn.Linear(64, dim_emb), nn.SiLU(), nn.Linear(dim_emb, dim_emb), nn.SiLU())
        tiles = nn.PixelUnshuffle(patch)
        self.input = nn.Sequential(tiles, conv(channels * patch ** 2, width))
        self.concat = None
        if concat_channels > 0:
            self.concat = ConcatInput(tiles, conv(concat_channels * patch ** 2, width, bias=False))
        self.down = nn.ModuleList()
        skip_dims = []                       # channels that every block leaves for the way up
        dim = width
        for level, mult in enumerate(mults):
            if level > 0:
                self.down.append(conv(dim, dim, stride=2))
            for _ in range(blocks):
                self.down.append(Block(dim, width * mult, dim_emb, attention[level], head_dim))
                dim = width * mult
                skip_dims.append(dim)
        self.middle = Block(dim, dim, dim_emb, attention[-1], head_dim)
        self.up = nn.ModuleList()
        for level in reversed(range(len(mults))):
            for _ in range(blocks):
                self.up.append(Block(dim + skip_dims.pop(), width * mults[level], dim_emb,
                                     attention[level], head_dim))
                dim = width * mults[level]
            if level > 0:
                finer = width * mults[level - 1]
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), conv(dim, finer)))
                dim = finer
        last = conv(dim, channels * patch ** 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.output = nn.Sequential(normalize(dim), nn.SiLU(), last, nn.PixelShuffle(patch))

    def forward(self, x, c_noise, concat=None, temporal=1.0, **conditions):
        emb = self.embed(waves(1000 * c_noise, 64))     # waves are made for numbers in the hundreds
        for name, value in conditions.items():
            if name not in self.conditions:
                raise ValueError(f"{name} was given, but this network was built without")
            made = self.conditions[name](value)
            if made.ndim != 3:
                raise ValueError(f"condition {name} made {tuple(made.shape)}, not (B, T or 1, E)")
            emb = emb + made                                                             # (B, T, E)
        x = each_frame(self.input, x)                          # (B, T, width, H / patch, W / patch)
        if concat is not None:
            if self.concat is None:
                raise ValueError("given frames need a network that was built with concat_channels")
            share = expand(torch.as_tensor(temporal).to(x), x)               # (B or 1, 1, 1, 1, 1)
            x = x + share * each_frame(self.concat, concat)
        skips = []
        for layer in self.down:
            if isinstance(layer, Block):
                x = layer(x, emb, temporal)
                skips.append(x)
            else:
                x = each_frame(layer, x)
        x = self.middle(x, emb, temporal)
        for layer in self.up:
            if isinstance(layer, Block):
                x = layer(torch.cat([x, skips.pop()], dim=2), emb, temporal)
            else:
                x = each_frame(layer, x)
        return each_frame(self.output, x)                                          # (B, T, C, H, W)

# ==================================================================================================
# 6. EMA
# ==================================================================================================

class EMA:
    """The moving average of a model's weights, float32. Call update(model) after every step.

    The last weights of a run are noisy; their average draws better videos: sample from .model.
    Early on it forgets faster. To resume, restore .model and .updates."""
    def __init__(self, model, decay=0.995):
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, p in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(p.float(), 1 - decay)
        for copied, b in zip(self.model.buffers(), model.buffers()):
            copied.copy_(b)

# ==================================================================================================
# 7. Generation
# ==================================================================================================

def guided(denoise, scale):
    """Context guidance: free + scale * (told - free) (Video LDM eq. 4; classifier-free guidance).

    told is the estimate under all conditions, free under none; training must have shown both.
    Scale 1 is the plain estimate; more exaggerates conditions. scale is a number, or (T,)."""
    scale = torch.as_tensor(scale, dtype=torch.float32).reshape(-1)                      # (1 or T,)
    def denoise_guided(x, sigma, **conditions):
        if len(scale) not in (1, x.shape[1]):
            raise ValueError(f"scale has {len(scale)} numbers: expected 1 or {x.shape[1]}")
        free = denoise(x, sigma)
        told = denoise(x, sigma, **conditions)
        factor = scale.to(x)[:, None, None, None]                                # (1 or T, 1, 1, 1)
        estimate = free + factor * (told - free)                                   # (B, T, C, H, W)
        if conditions.get("mask") is not None:                   # given frames stay as they are
            estimate = torch.where(expand(conditions["mask"], x) == 1, told, estimate)
        return estimate
    return denoise_guided

def skip_guided(denoise, scale):
    """Spatiotemporal skip guidance: alone + scale * (together - alone) (Hyung et al. 2024).

    alone skips temporal layers and given frames (temporal=0), as some clips did in training. The
    exaggerated difference makes frames agree. To use both: guided(skip_guided(...), scale)."""
    def denoise_guided(x, sigma, **conditions):
        together = denoise(x, sigma, **conditions)
        alone = denoise(x, sigma, temporal=0.0, **conditions)
        return alone + scale * (together - alone)                                  # (B, T, C, H, W)
    return denoise_guided

def clip_noise(seed, clips, device="cpu"):
    """A function noise(*shape) -> unit noise (len(clips), *shape), other numbers at every call.
    Each clip number has a generator of its own: clip 3 is the same in a batch of 8 as alone."""
    states = [np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0] for i in clips]
    generators = [torch.Generator().manual_seed(int(s >> 1)) for s in states]       # 63 random bits
    def noise(*shape):
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    return noise

def generate(denoise, shape, sigmas, sampler=sample_dpmpp_2m, noise=None, seed=0, **conditions):
    """One window of video, of this shape (B, T, C, H, W), on the device of sigmas. noise is a
    clip_noise, by default of clips 0 ... B - 1 of this seed."""
    if noise is None:
        noise = clip_noise(seed, range(shape[0]), sigmas.device)
    x = noise(*shape[1:])
    x = expand(sigmas[:1], x) * x
    return sampler(partial(denoise, **conditions), x, sigmas, lambda x: noise(*x.shape[1:]))

def given_frames(context, mask, start):
    """What rollout (below) tells a window by default: the given frames, if there are any."""
    return dict(context=context, mask=mask) if mask.any() else {}

def rollout(denoise, length, shape, sigmas, overlap=4, context=None, seed=0, clips=None,
            tell=given_frames, **options):
    """Yield a video of any length, in pieces (B, n, C, H, W), window by window (Video LDM, Vista).

        frames 0 1 2 3 4 5 6 7                 the first window; shape is (B, 8, C, H, W)
                       4 5 6 7 8 9 10 11       the second: the last `overlap` frames are given

    torch.cat(list(rollout(...)), 1) is the whole video. context (B, n, C, H, W) are its first n
    frames. denoise must have learnt to be given none, n and `overlap` frames. seed and clips are
    those of clip_noise, options go to generate. tell may replace given_frames: (context, mask,
    start) -> all conditions of the window that begins at frame start."""
    B, T, *chw = shape
    noise = clip_noise(seed, range(B) if clips is None else clips, sigmas.device)
    last = (torch.zeros(B, 0, *chw) if context is None else context).to(sigmas.device)
    done = last.shape[1]
    if done >= T:
        raise ValueError(f"context has {done} frames, a window of {T} has room for {T - 1}")
    if length > T and not 0 < overlap < T:
        raise ValueError(f"overlap is {overlap}, expected 1 to {T - 1} in windows of {T} frames")
    if done > 0:
        yield last
    while done < length:
        n = last.shape[1]
        padded = F.pad(last, (0, 0, 0, 0, 0, 0, 0, T - n))      # with zeros behind, (B, T, C, H, W)
        mask = (torch.arange(T, device=sigmas.device) < n).float().expand(B, T)
        conditions = tell(padded, mask, done - n)
        window = generate(denoise, shape, sigmas, noise=noise, **conditions, **options)
        new = window[:, n:n + length - done]                                # the frames not given
        done += new.shape[1]
        last = torch.cat([last, new], dim=1)[:, -overlap:]
        yield new

# ==================================================================================================
# 8. Demo
# ==================================================================================================

def moving_shapes(n, frames=8, size=16, radius=3):
    """n clips (n, frames, 1, size, size) of a white shape that bounces. It may be skipped."""
    room = size - 2 * radius                                     # the centre has this much to move
    angle = 2 * math.pi * torch.rand(n, 1)
    velocity = torch.stack([angle.sin(), angle.cos()], dim=2)                            # (n, 1, 2)
    path = room * torch.rand(n, 1, 2) + velocity * torch.arange(frames)[:, None]    # (n, frames, 2)
    path = radius + room - (path % (2 * room) - room).abs()         # a triangle wave: walls reflect
    y, x = (torch.arange(size) + 0.5 - path[..., None]).abs().unbind(2)          # (n, frames, size)
    y, x = y[..., :, None], x[..., None, :]
    square = torch.rand(n, 1, 1, 1) < 0.5
    distance = torch.where(square, torch.maximum(y, x), torch.hypot(y, x))
    return 2 * (radius + 0.5 - distance).clamp(0, 1)[:, :, None] - 1

def demo(path="demo.gif", steps=600, batch=16, seed=0):
    """Train a small model on moving shapes, and write 16 videos of it, twice as long, to a GIF."""
    torch.manual_seed(seed)
    denoiser = Denoiser(VideoUNet(channels=1, concat_channels=2, mults=(1, 2, 4)))
    ema = EMA(denoiser)
    gates = [p for name, p in denoiser.named_parameters() if name.endswith("gate")]
    others = [p for name, p in denoiser.named_parameters() if not name.endswith("gate")]
    optimizer = torch.optim.AdamW([dict(params=others), dict(params=gates)])
    rates = torch.optim.lr_scheduler.OneCycleLR(            # gates have far to go, from 0 to 1
        optimizer, [3e-3, 3e-2], steps, pct_start=0.1, cycle_momentum=False)
    for step in range(steps):
        clean = moving_shapes(batch)                                               # (B, T, C, H, W)
        sigma = lognormal(torch.rand(batch))
        mask = first_frames(batch, 8, odds=[0.5, 0, 0, 0, 0.5])   # of half the clips 4 are given
        temporal = (torch.rand(batch) > 0.1).float()           # 0 for a tenth: as an image model
        loss, _ = diffusion_loss(denoiser, clean, sigma, torch.randn_like(clean), context=clean,
                                 mask=mask, temporal=temporal)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        ema.update(denoiser)
        print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", end="\r", flush=True)
    denoise = skip_guided(ema.model, 1.5)
    shape = (16, 8, 1, 16, 16)                                                     # (B, T, C, H, W)
    video = torch.cat(list(rollout(denoise, 16, shape, karras_sigmas(20), overlap=4)), dim=1)
    frames = rearrange(video, "(a b) t 1 h w -> t (a h) (b w)", a=4)           # 4 x 4 side by side
    pixels = (127.5 * (frames.clamp(-1, 1) + 1)).to(torch.uint8).numpy()
    import imageio.v3 as iio
    iio.imwrite(path, pixels.repeat(6, axis=1).repeat(6, axis=2), duration=125, loop=0)
    print(f"\nwrote {path}")

# ##################################################################################################
# PART II. THE PAPERS. Skip it at first reading, and paste from it later.
# ##################################################################################################
# Every section adds to Part I by one of four ways: a function handed in (a schedule, a weight, a
# sampler), a wrapper of denoise, a subclass of Denoiser, or a module in the network's conditions.

# ==================================================================================================
# 9. DDPM, VDM, EDM
# ==================================================================================================

def from_betas(u, betas):
    """sigma(u) of a DDPM schedule, with straight lines in log(sigma) between its steps.

    abar_t = prod(1 - beta), and sigma_t^2 = (1 - abar_t) / abar_t (DDPM eq. 4)."""
    abar = np.cumprod(1 - betas)
    log_sigma = 0.5 * (np.log1p(-abar) - np.log(abar))
    log_sigma = np.interp(u.double().cpu().numpy(), np.linspace(0, 1, len(betas)), log_sigma)
    return torch.as_tensor(np.exp(log_sigma), dtype=torch.float32, device=u.device)

def linear(u, start=1e-4, end=0.02, steps=1000):
    """Noise levels for training: beta rises in a straight line (DDPM)."""
    return from_betas(u, np.linspace(start, end, steps))

def scaled_linear(u, start=0.0015, end=0.0195, steps=1000):
    """Noise levels for training: sqrt(beta) rises in a straight line.

    These are PVDM's numbers; Stable Diffusion has 0.00085 and 0.012. Configuration files of latent
    diffusion call this schedule "linear", which it is not."""
    return from_betas(u, np.linspace(start ** 0.5, end ** 0.5, steps) ** 2)

def cosine(u, logsnr_max=20.0):
    """Noise levels for training: the cosine schedule, sigma = tan(a u + b) (VDM, appendix A).

    u is uniform in (0, 1). log(1 / sigma^2) falls from logsnr_max at u = 0 to -logsnr_max at 1."""
    b = math.atan(math.exp(-logsnr_max / 2))
    return torch.tan((math.pi / 2 - 2 * b) * u.double() + b).float()

def sigmoid(u, start=-3.0, end=3.0, logsnr_max=20.0):
    """Noise levels for training: abar(u) falls from 1 to 0 along a piece of a logistic curve
    (Jabri et al. 2022; diffusion forcing)."""
    first, last = torch.tensor([start, end], dtype=torch.float64).sigmoid()
    here = torch.sigmoid(u.double() * (end - start) + start)
    sigma = ((here - first) / (last - here)).sqrt()                    # sqrt((1 - abar) / abar)
    return sigma.clamp(math.exp(-logsnr_max / 2), math.exp(logsnr_max / 2)).float()

def uniform(u):
    """Noise levels for training: t = sigma / (1 + sigma) is uniform (rectified flow).

    Stable Diffusion 3's t, whose logit is normal, is lognormal of the same mean and std."""
    return u / (1 - u)

SCHEDULES = dict(linear=linear, scaled_linear=scaled_linear, cosine=cosine, sigmoid=sigmoid,
                 uniform=uniform, lognormal=lognormal)

def offset_noise(noise, strength, per_frame=False):
    """Add one random number per clip and channel to unit noise (B, T, C, H, W).

    White noise hardly hides the mean of a large frame, so a network never learns to guess it. With
    the offset it learns to make very dark and very bright clips. It is for training only. With
    per_frame every frame gets a number of its own, as in Vista, whose strength is 0.02."""
    B, T, C = noise.shape[:3]
    shared = torch.randn(B, T if per_frame else 1, C, 1, 1, device=noise.device)
    return noise + strength * shared

def resolution_shift(sigma, size, base=64):
    """Noise levels made for frames of base x base pixels, for frames of size (H, W).

    log(SNR) moves by 2 log(base / size) (Hoogeboom et al. 2023). Neighbouring pixels of a large
    frame repeat each other, so the same damage needs more noise."""
    return sigma * math.sqrt(size[0] * size[1]) / base

def stratified(n):
    """n random numbers in (0, 1), one in each of n equal bins, in order and shifted together: (n,).

    Given to a schedule, they make every batch see all noise levels, so gradients vary less."""
    return ((torch.rand(1) + torch.arange(n) / n) % 1).clamp(1e-5, 1 - 1e-5)

def loss_weight(sigma, weighting, sigma_data=0.5, gamma=5.0):
    """Weight of the squared error of the clean estimate, of the shape of sigma.

    With eps, v, flow, x0 or edm it is the plain squared error of what a network of that kind
    predicts. With min_snr easy levels do not drown the rest (Hang 2023)."""
    snr = sigma.clamp(min=1e-4) ** -2.0                     # a frame that is given may have sigma 0
    weights = dict(
        eps=snr,
        v=snr + 1,
        flow=(1 + snr.sqrt()) ** 2,
        x0=torch.ones_like(snr),
        edm=snr + sigma_data ** -2,
        min_snr=snr.clamp(max=gamma),
        inverse=inverse_sigma(sigma))
    if weighting not in weights:
        raise ValueError(f"weighting is {weighting!r}, expected one of {', '.join(weights)}")
    return weights[weighting]

def constant(sigma, x):
    """One noise level, a number, for every clip of x: (B,)."""
    return x.new_full((len(x),), float(sigma))

@torch.no_grad()
def sample_ddpm(denoise, x, sigmas, randn=torch.randn_like, gamma=0.0):
    """Ancestral sampling (DDPM, algorithm 2): the mean of q(next | x, clean), plus fresh noise.

    The noise has the variance of that distribution for gamma = 0, that of the forward step for 1,
    and one between them for others (VDM: 0.1)."""
    for s, keep in descent(sigmas, x):
        guess = denoise(x, s)
        s = expand(s, x)
        t = keep * s
        share = keep ** 2
        low = (1 - share) * t ** 2
        high = (1 - share) * s ** 2 * (1 + t ** 2) / (1 + s ** 2)        # (1 + t^2) beta, as in z
        fresh = torch.where(t > 0, low ** (1 - gamma) * high ** gamma, 0).sqrt()
        x = share * x + (1 - share) * guess + fresh * randn(x)
    return x

@torch.no_grad()
def sample_heun(denoise, x, sigmas, randn=None):
    """Heun's method (EDM, algorithm 1): an Euler step, again with the mean slope of both ends.

    The error falls with the square of the step, for two evaluations a step."""
    for s, t in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        guess = denoise(x, constant(s, x))
        if t == 0:
            return guess
        slope = (x - guess) / s
        ahead = x + (t - s) * slope
        slope_ahead = (ahead - denoise(ahead, constant(t, x))) / t
        x = x + (t - s) * (slope + slope_ahead) / 2
    return x

SAMPLERS = dict(ddpm=sample_ddpm, ddim=sample_ddim, heun=sample_heun, dpmpp_2m=sample_dpmpp_2m,
                dpmpp_2m_sde=partial(sample_dpmpp_2m, eta=1.0))

def joint_image_loss(denoiser, clean, images, sigma, noise, loss=diffusion_loss, **options):
    """Joint training on clips (B, T, C, H, W) and pictures (B, N, C, H, W) (VDM sec. 3).

    It is the mean over all T + N frames. A picture is a clip of one frame, with the noise level of
    its clip, and no condition. (VDM appends pictures to the clip, hidden from temporal attention,
    which is the same.) noise is (B, T + N, C, H, W); weight and conditions are those of loss."""
    T = clean.shape[1]
    N = images.shape[1]
    video, error = loss(denoiser, clean, sigma, noise[:, :T], **options)
    weight = options.get("weight", inverse_sigma)
    single, _ = loss(denoiser, images.flatten(0, 1)[:, None], sigma.repeat_interleave(N),
                     noise[:, T:].flatten(0, 1)[:, None], weight=weight)
    return (T * video + N * single) / (T + N), error

def reconstruction_guided(denoise, context, mask, weight=1.0):
    """Give frames to a model that was never trained to be given any (VDM sec. 3.1).

    Where mask (B, T) is 1 the estimate is context, so samplers keep x there at context + sigma *
    noise. Elsewhere the estimate moves to where the network, too, would estimate context. weight
    above 1 moves it further; 0 is mere replacement, whose new frames do not fit the given ones. It
    costs a backward pass."""
    # VDM eq. 7 adds -(weight alpha / 2) grad_z |x_a - guess_a|^2; with z = alpha x alpha drops out
    given = expand(mask, context) == 1                                             # (B, T, 1, 1, 1)

    def denoise_guided(x, sigma, **conditions):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            guess = denoise(x, sigma, **conditions)                                # (B, T, C, H, W)
            error = torch.where(given, context - guess, 0).square().sum()
        if not error.requires_grad:
            raise ValueError("denoise has no gradient: call it outside no_grad and inference_mode")
        gradient, = torch.autograd.grad(error, x)
        return torch.where(given, context, guess.detach() - weight / 2 * gradient)

    return denoise_guided

# ==================================================================================================
# 10. Video LDM
# ==================================================================================================

def draw_mask(batch, frames, odds, task="predict"):
    """A mask (batch, frames), 1 where a frame is given. With odds[0] no frame is, for guidance.
    Otherwise, by task:

    predict  the first n frames, n drawn with odds[n] (first_frames)
    ends     the first and the last frame (PixelDance)
    any      1 to T - 1 of the frames, by chance (flexible diffusion, Harvey et al. 2022)
    all      all frames, which then must be hints"""
    first = first_frames(batch, frames, odds)
    some = first[:, :1]                                                                  # (B, 1)
    if task == "predict":
        return first
    if task == "all":
        return some.expand(batch, frames).clone()
    if task == "ends":
        return torch.where(torch.arange(frames) % (frames - 1) == 0, some, 0)
    if task == "any":
        order = torch.rand(batch, frames).argsort(1).argsort(1)                # 0 ... T - 1, mixed
        return torch.where(order < torch.randint(1, frames, (batch, 1)), some, 0)
    raise ValueError(f"task is {task!r}, expected predict, ends, any or all")

def zero(layer):
    """Set a layer's parameters to 0."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer

class NumberEmbedding(nn.Module):
    """A condition that is one number per clip (B,), -1 for none -> (B, 1, E), at first 0.

    Video LDM and SVD tell such numbers: the level of noise augmentation, the frame rate."""

    def __init__(self, dim_emb=256):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(64, dim_emb), nn.SiLU(), zero(nn.Linear(dim_emb, dim_emb)))

    def forward(self, number):
        told = (number >= 0).float()[:, None, None]                                     # (B, 1, 1)
        return told * self.mlp(waves(1000 * number, 64))[:, None]                       # (B, 1, E)

class LabelEmbedding(nn.Module):
    """A condition that is a class, 0 ... labels - 1, or -1 for none -> an embedding, at first 0.

    The class is given per clip, (B,) -> (B, 1, E), or per frame, (B, T) -> (B, T, E)."""

    def __init__(self, labels, dim_emb=256):
        super().__init__()
        self.table = zero(nn.Embedding(labels + 1, dim_emb, padding_idx=0))        # row 0 stays 0

    def forward(self, label):
        emb = self.table(label.long() + 1)
        return emb[:, None] if label.ndim == 1 else emb

def hint(context, mask, level, noise):
    """Conditions under which frames are no longer given exactly, but as hints: noise augmentation.

    Noise of this level (B,) is put on context (B, T, C, H, W), and the network is told the level
    through conditions={"augmentation": NumberEmbedding()}. Every frame is estimated, those that
    mask (B, T) marks too. A model trained so forgives faults in what it is given (Video LDM's
    up-sampler and interpolation; GameNGen)."""
    noisy = context + expand(level, context) * noise
    told = torch.where(mask.amax(1) > 0, level, -1.0)                                         # (B,)
    return dict(concat=concat_frames(noisy, mask.to(context)), augmentation=told)

def blurred(clip, factor=4):
    """A clip (B, T, C, H, W) as it looks from frames `factor` times smaller: what an up-sampler is
    given as a hint."""
    small = F.interpolate(clip.flatten(0, 1), scale_factor=1 / factor, mode="area")
    return F.interpolate(small, scale_factor=factor, mode="bilinear").view_as(clip)

def interpolate(denoise, key_frames, factor, frames, sigmas, seed=0, clips=None, **options):
    """Put factor - 1 new frames between neighbours of key_frames (B, K, C, H, W), K > 1.

    The key frames stay as they are; the result is (B, factor (K - 1) + 1, C, H, W). Video LDM (sec.
    3.3) does it twice with factor 4. denoise must know such masks (task "any" of draw_mask). frames
    is the length of a window; other arguments are those of rollout."""
    if not 1 < factor < frames:
        raise ValueError(f"factor is {factor}, expected 2 to {frames - 1}, in windows of {frames}")
    B, K, *chw = key_frames.shape
    noise = clip_noise(seed, range(B) if clips is None else clips, sigmas.device)
    gaps = (frames - 1) // factor                                         # gaps filled per window
    pieces = [key_frames[:, :1]]
    for start in range(0, K - 1, gaps):
        keys = key_frames[:, start:start + gaps + 1]                               # (B, k, C, H, W)
        at = torch.arange(keys.shape[1]) * factor
        context = keys.new_zeros(B, frames, *chw)
        context[:, at] = keys
        mask = keys.new_zeros(B, frames)
        mask[:, at] = 1
        window = generate(denoise, (B, frames, *chw), sigmas, noise=noise, context=context,
                          mask=mask, **options)
        pieces.append(window[:, 1:at[-1] + 1])
    return torch.cat(pieces, dim=1)

# Latent diffusion: a small network learns to say a frame in far fewer numbers, latents, and only
# those are diffused. Encoder and decoder first learn from frames. Then the decoder's temporal
# layers alone learn from clips, so that what the decoder fills in does not flicker.

class Autoencoder(nn.Module):
    """encode(clip (B, T, C, H, W)) -> latents (B, T, latent, H / factor, W / factor), and decode.

    factor is a power of two, from 2; it must divide H and W. Noise levels mean nothing unless one
    knows how far latents spread. So train by ae_loss, then call measure, once, before encode. It
    keeps the mean and standard deviation of every channel with the weights."""

    def __init__(self, channels=3, latent=4, width=32, factor=4):
        super().__init__()
        if factor < 2 or factor & (factor - 1):
            raise ValueError(f"factor is {factor}, expected a power of two, from 2")
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
        """Mean and log variance of the latents: training decodes draws of them, encode the mean."""
        factor = 2 ** self.reach
        if clip.shape[3] % factor or clip.shape[4] % factor:
            raise ValueError(f"frames are {clip.shape[3]} x {clip.shape[4]}: an autoencoder of "
                             f"factor {factor} needs multiples of {factor}")
        mean, log_var = each_frame(self.encoder, clip).chunk(2, dim=2)             # (B, T, c, h, w)
        return mean, log_var.clamp(-30, 20)

    def render(self, latents, temporal=1.0):
        """Decode latents as the encoder gives them. With temporal = 0 each frame is on its own."""
        x = each_frame(self.input, latents)
        none = x.new_zeros(*x.shape[:2], 1)                    # where a denoiser's noise level goes
        for layer in self.decoder:
            if isinstance(layer, ResBlock):
                x = layer(x, none, temporal)
            else:
                x = each_frame(layer, x)
        return each_frame(self.output, x)                                          # (B, T, C, H, W)

    @torch.no_grad()
    def measure(self, clips):
        """Find each channel's mean and standard deviation over clips, an iterable of batches (B, T,
        C, H, W), such as a list or a DataLoader."""
        mean = torch.cat([self.posterior(x)[0].movedim(2, 0).flatten(1) for x in clips], dim=1)
        self.mean.copy_(mean.mean(1)[:, None, None])
        self.std.copy_(mean.std(1).clamp(min=1e-6)[:, None, None])

    def encode(self, clip):
        return (self.posterior(clip)[0] - self.mean) / self.std

    def stream(self, pieces, temporal=1.0):
        """Decode latents that come in pieces (B, n, c, h, w): the same clip as decode gives.

        A frame is decoded as soon as all that its temporal layers see has come, so the memory
        needed does not grow with the length."""
        latents = None
        done = 0                                       # how many of the latents at hand are decoded
        for piece in pieces:
            latents = piece if latents is None else torch.cat([latents, piece], dim=1)
            ready = latents.shape[1] - self.reach
            if ready > done:
                yield self.decode_all(latents, temporal)[:, done:ready]
                start = max(0, ready - self.reach)
                latents = latents[:, start:]
                done = ready - start
        yield self.decode_all(latents, temporal)[:, done:]

    def decode_all(self, latents, temporal=1.0):
        with torch.autocast(latents.device.type, enabled=False):
            return self.render(latents.float() * self.std + self.mean, temporal)

    def decode(self, latents, chunk=16, temporal=1.0):
        return torch.cat(list(self.stream(latents.split(chunk, 1), temporal)), dim=1)

def ae_loss(autoencoder, clip, noise, kl=1e-4, temporal=0.0):
    """A scalar, and its parts by name: `reconstruction` and `kl`. noise is like the latents.

    reconstruction is the absolute plus the squared error, kl that of the posterior from
    Normal(0, 1), mean per latent. There is no LPIPS, whose network would have to be downloaded, and
    no GAN: what latents do not tell comes out blurred."""
    mean, log_var = autoencoder.posterior(clip)
    error = autoencoder.render(mean + (log_var / 2).exp() * noise, temporal) - clip
    reconstruction = error.abs().mean() + error.square().mean()
    divergence = (mean ** 2 + log_var.exp() - 1 - log_var).mean() / 2
    parts = dict(reconstruction=reconstruction.detach(), kl=divergence.detach())
    return reconstruction + kl * divergence, parts

# ==================================================================================================
# 11. PVDM
# ==================================================================================================
# PVDM says a clip on three planes, u(t, h, w) ~ (H, W) + (T, W) + (T, H), in far fewer numbers than
# frames take (sec. 3.1). The planes are one row of L = HW + TW + TH places: a clip of one frame of
# 1 x L, which all of Part I takes as it is. Its network is one of pictures, which the planes share,
# with attention among all their places (sec. 3.2).

def plane_sizes(frames, height, width):
    """Height and width of the planes (H, W), (T, W), (T, H) of a grid T x H x W."""
    return (height, width), (frames, width), (frames, height)

def join_planes(planes):
    """Planes (..., h, w), side by side in one row: (..., 1, L)."""
    return torch.cat([plane.flatten(-2) for plane in planes], dim=-1).unsqueeze(-2)

def split_planes(x, sizes):
    """What join_planes joined: x (..., 1, L) -> planes (..., h, w) of these sizes."""
    rows = x.squeeze(-2).split([h * w for h, w in sizes], dim=-1)
    return [row.unflatten(-1, size) for row, size in zip(rows, sizes)]

class Projection(nn.Module):
    """u (B, N, dim, X, Y) -> a plane (B, latent, X, Y) with values in (-1, 1). At every place of it
    a summary token looks along the axis N, which is then dropped."""

    def __init__(self, dim, latent, depth, head_dim):
        super().__init__()
        self.token = nn.Parameter(torch.randn(dim, 1, 1))
        self.layers = nn.Sequential(*[Attention(dim, head_dim, "t") for _ in range(depth)])
        self.out = conv(dim, latent, 1)

    def forward(self, u):
        token = self.token.expand(len(u), 1, -1, *u.shape[3:])                 # (B, 1, dim, X, Y)
        return self.out(self.layers(torch.cat([token, u], dim=1))[:, 0]).tanh()

class TriplaneAutoencoder(nn.Module):
    """encode(clip (B, n T, C, H, W)) -> planes (B, n, latent, 1, L), and decode: the latents of n
    clips in a row, each on three planes (PVDM sec. 3.1).

    grid is T, H / patch, W / patch. Encoder and decoder look over time, then over space, in turns
    (TimeSformer); theirs have one feed-forward layer for both. Train it on the error of
    decode(encode(clip)); PVDM adds LPIPS, and at last a GAN."""

    def __init__(self, channels=3, latent=4, grid=(16, 8, 8), patch=4, dim=64, depth=2,
                 plane_depth=1, head_dim=16):
        super().__init__()
        self.grid = grid
        self.sizes = plane_sizes(*grid)
        turns = [Attention(dim, head_dim, over) for _ in range(2 * depth) for over in ("t", "hw")]
        self.encoder = nn.Sequential(*turns[:2 * depth])
        self.decoder = nn.Sequential(*turns[2 * depth:])
        self.input = nn.Sequential(nn.PixelUnshuffle(patch), conv(channels * patch ** 2, dim, 1))
        self.project = nn.ModuleList(
            [Projection(dim, latent, plane_depth, head_dim) for _ in range(3)])
        self.read = nn.ModuleList([conv(latent, dim, 1) for _ in range(3)])
        self.output = nn.Sequential(
            normalize(dim), conv(dim, channels * patch ** 2, 1), nn.PixelShuffle(patch))

    def encode(self, clip):
        T, H, W = self.grid
        patch = self.input[0].downscale_factor
        if clip.shape[1] % T or clip.shape[3:] != (H * patch, W * patch):
            raise ValueError(f"a clip is {tuple(clip.shape)}, expected a multiple of {T} frames of "
                             f"{H * patch} x {W * patch}")
        u = self.encoder(each_frame(self.input, clip.unflatten(1, (-1, T)).flatten(0, 1)))
        alongs = (u, u.permute(0, 3, 2, 1, 4), u.permute(0, 4, 2, 1, 3))           # drop t, h, w
        planes = join_planes([project(x) for project, x in zip(self.project, alongs)])
        return planes.unflatten(0, (len(clip), -1))                                # (B, n, c, 1, L)

    def decode(self, latents):
        planes = split_planes(latents.flatten(0, 1), self.sizes)
        hw, tw, th = (read(plane) for read, plane in zip(self.read, planes))
        u = hw[:, None] + tw.transpose(1, 2).unsqueeze(3) + th.transpose(1, 2).unsqueeze(4)
        clip = each_frame(self.output, self.decoder(u))                      # (B n, T, C, H, W)
        return clip.unflatten(0, latents.shape[:2]).flatten(1, 2)

    def stream(self, pieces):
        """Decode latents (B, n, c, 1, L) that come piece by piece."""
        return map(self.decode, pieces)

def groups_of_planes(channels):
    """PVDM's GroupNorm: 32 groups, or in a narrow layer as many as divide it."""
    return nn.GroupNorm(math.gcd(32, channels), channels)

class PlaneResBlock(ResBlock):
    """A ResBlock without time. It may resize a plane: resize is applied on both of its ways."""

    def __init__(self, dim_in, dim, dim_emb, resize=nn.Identity()):
        super().__init__(dim_in, dim, dim_emb)
        del self.time                                                 # for the method of that name
        self.conv1 = nn.Sequential(
            groups_of_planes(dim_in), nn.SiLU(), resize, conv(dim_in, dim))
        self.norm2 = groups_of_planes(dim)
        self.skip = nn.Sequential(resize, self.skip)
        zero(self.conv2)

    @staticmethod
    def time(x, temporal):
        return x

class PlaneAttention(nn.Module):
    """Self-attention among all places of x (B, 1, C, h, w), which may be all planes in a row. There
    are neither positions, which convolutions tell, nor a feed-forward layer."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm = groups_of_planes(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = zero(nn.Linear(dim, dim))

    def forward(self, x, emb=None):
        tokens = rearrange(each_frame(self.norm, x), "b 1 c h w -> b (h w) c")          # (B, L, C)
        qkv = self.qkv(tokens)
        q, k, v = rearrange(qkv, "b l (n heads d) -> n b heads l d", n=3, heads=self.heads)
        seen = F.scaled_dot_product_attention(q, k, v)
        change = self.out(rearrange(seen, "b heads l d -> b l (heads d)"))
        return x + rearrange(change, "b (h w) c -> b 1 c h w", h=x.shape[3])

class PlaneBlock(Block):
    """Layers for each plane of x (B, 1, C, 1, L), then attention among all planes (sec. 3.2).

    It is a Block, as by that VideoUNet.forward knows which layers are told the noise level."""

    def __init__(self, sizes, layers, across=nn.Identity()):
        nn.Module.__init__(self)
        self.sizes = sizes
        self.layers = nn.ModuleList(layers)
        self.across = across

    def forward(self, x, emb, temporal=1.0):
        planes = split_planes(x, self.sizes)                                 # each (B, 1, C, h, w)
        for layer in self.layers:
            planes = [layer(plane, emb) for plane in planes]
        return self.across(join_planes(planes))                              # (B, 1, C, 1, L)

class EachPlane(nn.Module):
    """A layer of pictures, applied to each plane of x (N, C, 1, L)."""

    def __init__(self, layer, sizes):
        super().__init__()
        self.layer = layer
        self.sizes = sizes

    def forward(self, x):
        return join_planes([self.layer(plane) for plane in split_planes(x, self.sizes)])

class PlaneUNet(VideoUNet):
    """PVDM's network of three planes: net(x (B, 1, channels, 1, L), c_noise (B, 1)) -> like x.

    It is a UNet of pictures, and called as a VideoUNet; there is no time for `temporal` to switch
    off. All planes pass through the same layers. attention[i] is "none", "joint" (among all places
    of the three planes) or "factorised" (first within each plane); the middle is always factorised.
    Every side of a plane must be a multiple of 2^(levels - 1). concat_channels = channels is for a
    PreviousClip. For a TriplaneAutoencoder: channels = latent, sizes = autoencoder.sizes, n = 1."""

    def __init__(self, channels=4, concat_channels=4, width=128, mults=(1, 2, 4, 4), blocks=2,
                 attention=(*["factorised"] * 3, "joint"), heads=8, sizes=plane_sizes(16, 32, 32)):
        nn.Module.__init__(self)
        if len(attention) != len(mults) or set(attention) - {"none", "joint", "factorised"}:
            raise ValueError(f"attention is {attention}, expected none, joint or factorised for "
                             f"each of the {len(mults)} levels")
        E = 4 * width                                           # of the embedded noise level
        self.conditions = {}
        self.embed = nn.Sequential(nn.Linear(64, E), nn.SiLU(), nn.Linear(E, E), nn.SiLU())
        self.input = EachPlane(conv(channels, width), sizes)
        self.concat = None
        if concat_channels > 0:
            self.concat = ConcatInput(EachPlane(conv(concat_channels, width, bias=False), sizes))

        def within(level, dim):
            return [PlaneAttention(dim, heads)] if attention[level] == "factorised" else []

        def across(level, dim):
            return nn.Identity() if attention[level] == "none" else PlaneAttention(dim, heads)

        at = [[(h >> i, w >> i) for h, w in sizes] for i in range(len(mults))]          # by level
        self.down = nn.ModuleList([PlaneBlock(sizes, [])])      # which leaves the input as a skip
        skip_dims = [width]
        dim = width
        for level, mult in enumerate(mults):
            for _ in range(blocks):
                res = PlaneResBlock(dim, width * mult, E)
                dim = width * mult
                self.down.append(
                    PlaneBlock(at[level], [res, *within(level, dim)], across(level, dim)))
                skip_dims.append(dim)
            if level < len(mults) - 1:
                res = PlaneResBlock(dim, dim, E, nn.AvgPool2d(2))
                self.down.append(PlaneBlock(at[level], [res], across(level, dim)))
                skip_dims.append(dim)
        layers = [PlaneResBlock(dim, dim, E) for _ in range(2)]
        layers.insert(1, PlaneAttention(dim, heads))
        self.middle = PlaneBlock(at[-1], layers, PlaneAttention(dim, heads))
        self.up = nn.ModuleList()
        for level in reversed(range(len(mults))):
            for i in range(blocks + 1):
                layers = [PlaneResBlock(dim + skip_dims.pop(), width * mults[level], E)]
                dim = width * mults[level]
                layers += within(level, dim)
                if level > 0 and i == blocks:
                    layers.append(PlaneResBlock(dim, dim, E, nn.Upsample(scale_factor=2)))
                self.up.append(PlaneBlock(at[level], layers, across(level, dim)))
        last = zero(conv(dim, channels))
        self.output = EachPlane(nn.Sequential(groups_of_planes(dim), nn.SiLU(), last), sizes)

# PVDM goes on clip by clip: the whole clip before is given, as further channels (sec. 3.3). Its
# network needs concat_channels = channels.

class PreviousClip(Denoiser):
    """A Denoiser that may be given `previous` (B, T, C, H, W), the clip before this one."""

    def forward(self, x, sigma, previous=None, **conditions):
        if previous is not None:
            conditions["concat"] = previous
        return super().forward(x, sigma, **conditions)

def joint_loss(denoiser, clean, previous, sigma, noise, share=0.5, loss=diffusion_loss, **options):
    """PVDM eq. 9: share * (loss given the clip before) + (1 - share) * (loss given nothing).

    So one network both starts a video and continues it. Other arguments are those of loss."""
    continued, _ = loss(denoiser, clean, sigma, noise, previous=previous, **options)
    free, error = loss(denoiser, clean, sigma, noise, **options)
    return share * continued + (1 - share) * free, error

def clamped(denoise):
    """A denoise whose estimate stays in [-1, 1], as all planes do (PVDM's sampling)."""
    return lambda x, sigma, **conditions: denoise(x, sigma, **conditions).clamp(-1, 1)

def rollout_previous(denoise, length, shape, sigmas, previous=None, seed=0, clips=None,
                     later_sigmas=None, **options):
    """Yield a video of any length, clip by clip, each given the one before (PVDM).

    previous is a whole clip to start from, and comes first. later_sigmas are noise levels for all
    clips that are given one; fewer will do. Other arguments as in rollout."""
    noise = clip_noise(seed, range(shape[0]) if clips is None else clips, sigmas.device)
    done = 0
    if previous is not None:
        previous = previous.to(sigmas.device)
        done = previous.shape[1]
        yield previous
    while done < length:
        if previous is not None and later_sigmas is not None:
            sigmas = later_sigmas
        window = generate(denoise, shape, sigmas, noise=noise, previous=previous, **options)
        yield window[:, :length - done]
        previous = window
        done += window.shape[1]

# ==================================================================================================
# 12. SVD, Vista
# ==================================================================================================

def image_hint(picture, mask, level, noise):
    """Conditions for image-to-video (SVD): the picture (B, 1, C, H, W) as a hint on every frame.

    The noise of the augmentation is the same on all frames, noise (B, 1, C, H, W). Arguments are
    otherwise those of hint."""
    everywhere = (-1, mask.shape[1], -1, -1, -1)
    return hint(picture.expand(everywhere), mask, level, noise.expand(everywhere))

def triangle(low, high, frames):
    """Guidance scales (T,) that rise towards the middle frame and fall again (Vista, by its code).

    Windows of long videos then do not saturate more and more. With an even number of frames none
    quite reaches high. SVD's scales only rise: torch.linspace(low, high, frames)."""
    return low + (high - low) * (1 - torch.linspace(-1, 1, frames).abs())

def guided_by(denoise, scale, names):
    """Guidance by some conditions alone: the others go to both estimates. Arguments as in guided.

    Vista guides by actions, and both of its estimates are given the frames."""
    def denoise_guided(x, sigma, **conditions):
        named = {name: conditions.pop(name) for name in names if name in conditions}
        return guided(partial(denoise, **conditions), scale)(x, sigma, **named)

    return denoise_guided

class Replace(Denoiser):
    """A Denoiser whose given frames stand in x themselves, without noise (Vista sec. 3.1).

    They are scaled as noisy frames of level sigma are. The network is told which they are through
    conditions={"given": LabelEmbedding(1)}; Vista has a second network that embeds their level."""

    def forward(self, x, sigma, context=None, mask=None, **conditions):
        if context is None or mask is None:
            return super().forward(x, sigma, context, mask, **conditions)
        given = expand(mask, x) == 1                                               # (B, T, 1, 1, 1)
        x = torch.where(given, context, x)
        estimate = super().forward(x, sigma, given=mask.long() - 1, **conditions)
        return torch.where(given, context, estimate)

def dynamics_weight(estimate, clean):
    """Vista's weight of the squared error, (B, T, C, H, W), by its code (sec. 3.1).

    It is 1 in the first frame, then 1 + the squared error of the change since the frame before,
    which is made a vector of length 1 per clip and channel. It has no gradient. For n errors that
    are Gaussian it adds 1 / sqrt(3 n) on average, so only the few worst places gain."""
    wrong = (estimate - clean).detach().float().diff(dim=1) ** 2               # (B, T - 1, C, H, W)
    length = wrong.norm(2, (1, 3, 4), keepdim=True)                                # (B, 1, C, 1, 1)
    return 1 + F.pad(wrong / length.clamp(min=1e-12), (0, 0, 0, 0, 0, 0, 1, 0))

def high_pass(x, cut=0.25):
    """Edges and texture of every frame of x (..., H, W), in float32 (Vista eq. 5).

    Frequencies (f, g) with f^2 + g^2 <= 2 cut are taken out, where 1 is the highest on an axis:
    39 % of them, the mean too."""
    f = torch.fft.fftfreq(x.shape[-2], 0.5)
    g = torch.fft.rfftfreq(x.shape[-1], 0.5)
    keep = f[:, None] ** 2 + g ** 2 > 2 * cut + 1e-6        # (H, W // 2 + 1); rounding moves no tie
    return torch.fft.irfft2(torch.fft.rfft2(x.float()) * keep.to(x.device), x.shape[-2:])

def vista_loss(denoiser, clean, sigma, noise, weight=inverse_sigma, dynamics=1.0, structure=0.1,
               **conditions):
    """Vista's three losses (eq. 3 to 6): the squared error, weighted by dynamics_weight, plus
    `structure` times that of edges and texture. Arguments and result as in diffusion_loss."""
    x = clean + expand(sigma, clean) * noise
    estimate = denoiser(x, sigma, **conditions)
    error = estimate - clean                                                       # (B, T, C, H, W)
    total = (1 + dynamics * (dynamics_weight(estimate, clean) - 1)) * error ** 2
    total = total + structure * high_pass(error) ** 2        # it is linear
    loss = (expand(weight(sigma), clean) * total).mean()
    return loss, (error ** 2).detach().flatten(sigma.ndim).mean(-1)

class ActionEmbedding(nn.Module):
    """A condition of `actions` numbers per frame, (B, T, actions), NaN if not told -> (B, T, E).

    action[:, t] is what led to frame t. The embedding starts at 0 (Vista's action projections)."""

    def __init__(self, actions, dim_emb=256):
        super().__init__()
        self.linear = zero(nn.Linear(2 * actions, dim_emb, bias=False))

    def forward(self, action):
        told = ~action.isnan()
        return self.linear(torch.cat([action.nan_to_num(), told.to(action)], dim=-1))

def drop_modes(action, sizes, rate):
    """Withhold parts of action (B, T, A), A = sum(sizes): set them to NaN, for whole clips.

    sizes are the numbers of each mode (command, speed ...). With odds `rate` all are withheld, so
    that guidance has an estimate without actions. With the same odds each mode is withheld on its
    own, so that any of them may be left out (Vista sec. 3.2: 0.15)."""
    u = torch.rand(len(action), 1 + len(sizes))                                    # (B, 1 + modes)
    keep = (u[:, :1] >= rate) & (u[:, 1:] >= rate)                                     # (B, modes)
    keep = keep.repeat_interleave(torch.tensor(sizes), 1)[:, None].to(action.device)    # (B, 1, A)
    return action.where(keep, math.nan)                                                # (B, T, A)

def reward(denoise, shape, sigmas, ensemble=5, seed=0, **options):
    """exp(-variance) among `ensemble` clips from different noise, (B,) (Vista sec. 3.3).

    It tells how sure the model is of what the conditions lead to. Compare equal seeds. Vista draws
    5 clips of 10 steps. Other arguments as in generate."""
    clips = [generate(denoise, shape, sigmas, seed=seed + i, **options) for i in range(ensemble)]
    return torch.exp(-torch.stack(clips).var(0).flatten(1).mean(1))

# The published network of SVD, which is also Vista's: with the published weights it draws the
# published videos. It differs from VideoUNet in the details. The noise level is added, and has no
# scale. Space and time have residual blocks and transformers of their own, and a learned share
# mixes their results. CLIP's description of a picture is one token, and attention to one token is
# the token: its weight is 1, whatever query and key are. So the published queries, keys and norms
# of that attention do nothing, and are left out here.

LATENT_SCALE = 0.18215      # the latents that are diffused are the autoencoder's, times this number

class GEGLU(nn.Module):
    """a * GELU(b), where x (..., 2 n) is a and b, side by side (Shazeer 2020)."""

    def forward(self, x):
        a, b = x.chunk(2, dim=-1)
        return a * F.gelu(b)

def gated_feed_forward(dim):
    """A norm, and a feed-forward layer of four times the channels whose GELU is gated."""
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, 8 * dim), GEGLU(), nn.Linear(4 * dim, dim))

class StableResidual(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x))) + emb))), for pictures x (N, C, H, W), emb (N, E)."""
    conv = staticmethod(conv)

    def __init__(self, dim_in, dim, dim_emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, dim_in)
        self.conv1 = self.conv(dim_in, dim)
        self.emb = nn.Linear(dim_emb, dim)
        self.norm2 = nn.GroupNorm(32, dim)
        self.conv2 = zero(self.conv(dim, dim))
        self.skip = conv(dim_in, dim, 1) if dim_in != dim else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + expand(self.emb(F.silu(emb)).movedim(-1, 1), h)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))

class StableTemporalResidual(StableResidual):
    """The same for clips x (B, C, T, H, W), emb (B, T, E): its convolutions see three frames, its
    norms all frames at once."""
    conv = staticmethod(partial(nn.Conv3d, kernel_size=(3, 1, 1), padding=(1, 0, 0)))

def mixed(pictures, video, mix):
    """Both in a learned share: that of the temporal result is 1 - sigmoid(mix)."""
    return pictures + (1 - mix.sigmoid()).to(pictures) * (video - pictures)

class StableResBlock(nn.Module):
    """A residual block over space, then one over time, mixed."""

    def __init__(self, dim_in, dim, dim_emb):
        super().__init__()
        self.space = StableResidual(dim_in, dim, dim_emb)
        self.time = StableTemporalResidual(dim, dim, dim_emb)
        self.mix = nn.Parameter(torch.zeros(1))

    def forward(self, x, emb, clip, action):                            # (B, T, C, H, W), (B, T, E)
        x = self.space(x.flatten(0, 1), emb.flatten(0, 1)).unflatten(0, x.shape[:2])
        video = self.time(x.transpose(1, 2), emb).transpose(1, 2)                  # (B, T, C, H, W)
        return mixed(x, video, self.mix)

class ActionProjection(nn.Linear):
    """Where Vista's actions enter: beside CLIP's token, 0 at first."""

class StableAttention(nn.Module):
    """Self-attention of tokens x (N, L, C), then what the token says, then a feed-forward layer."""

    def __init__(self, dim, head_dim, dim_clip, dim_action=0):
        super().__init__()
        if dim % head_dim:
            raise ValueError(f"head_dim is {head_dim}, which must divide {dim} channels")
        self.heads = dim // head_dim
        self.norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.clip = nn.Linear(dim_clip, dim, bias=False)
        self.action = None
        if dim_action > 0:
            self.action = zero(ActionProjection(dim_action, dim, bias=False))
        self.clip_out = nn.Linear(dim, dim)
        self.feed_forward = gated_feed_forward(dim)

    def forward(self, x, clip, action):          # (N, L, C), (B, dim_clip), (B, dim_action)
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "n l (heads d) -> n heads l d", heads=self.heads)
                   for layer in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(rearrange(seen, "n heads l d -> n l (heads d)"))
        told = self.clip(clip)                                                              # (B, C)
        if self.action is not None:
            told = told + self.action(action)
        told = self.clip_out(told).repeat_interleave(len(x) // len(told), 0)                # (N, C)
        x = x + told[:, None]
        return x + self.feed_forward(x)

class StableTemporalAttention(StableAttention):
    """The same over time, with one more feed-forward layer before it."""

    def __init__(self, dim, *arguments):
        super().__init__(dim, *arguments)
        self.before = gated_feed_forward(dim)

    def forward(self, x, clip, action):
        return super().forward(x + self.before(x), clip, action)

class StableTransformer(nn.Module):
    """Attention over space, then over time, which is told the number of each frame; mixed."""

    def __init__(self, dim, *arguments):
        super().__init__()
        self.enter_norm = nn.GroupNorm(32, dim, eps=1e-6)
        self.enter = nn.Linear(dim, dim)
        self.space_attention = StableAttention(dim, *arguments)
        self.place = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.time_attention = StableTemporalAttention(dim, *arguments)
        self.mix = nn.Parameter(torch.zeros(1))
        self.leave = zero(nn.Linear(dim, dim))

    def forward(self, x, emb, clip, action):
        B, T, C, H, W = x.shape
        h = self.enter(rearrange(each_frame(self.enter_norm, x), "b t c h w -> (b t) (h w) c"))
        h = self.space_attention(h, clip, action)
        video = rearrange(h, "(b t) l c -> (b l) t c", t=T)
        number = self.place(waves(torch.arange(T, device=x.device), C).to(x))               # (T, C)
        video = self.time_attention(video + number, clip, action)
        video = rearrange(video, "(b l) t c -> (b t) l c", b=B)
        h = self.leave(mixed(h, video, self.mix))
        return x + rearrange(h, "(b t) (h w) c -> b t c h w", b=B, h=H)

class Stage(nn.ModuleList):
    """Layers one after another. Those of pictures are applied to every frame."""

    def forward(self, x, emb, clip, action):
        for layer in self:
            if isinstance(layer, (StableResBlock, StableTransformer)):
                x = layer(x, emb, clip, action)
            else:
                x = each_frame(layer, x)
        return x

class StableUNet(nn.Module):
    """The network of SVD and of Vista: net(x (B, T, 4, H, W), c_noise (B,)) -> (B, T, 4, H, W).

    x is noisy latents, H and W multiples of 8, c_noise is log(sigma) / 4, (B,) or (B, T), and what
    comes is of the kind "v". What is told, of which only numbers must be:
    concat   (B, 1 or T, 4, H, W), the latents of a picture, which may also be channels 4 to 7 of x
    clip     (B, 1024), CLIP's token of that picture
    numbers  (B, 3): frame rate - 1, motion (0 to 255), level of noise put on the picture
    action   (B, 19), NaN where not told: Vista's command 1, trajectory 8 (four points, in metres),
             speed 4, steering angle 4 (/ 780), goal 2 (x / 1600, y / 900)
    given    (B, T), 0 where a frame of x is given, -1 elsewhere, as from Replace. With embed_given,
             as in Vista, such frames have a noise embedding of their own

    Published are 1,524.6 M parameters (SVD) and 1,648.1 M (Vista). The 1,474.2 M and 1,537.0 M that
    do something are here. ValueError, one sentence, if an input does not fit."""
    WAVES = 128                                             # numbers that tell one number of action

    def __init__(self, channels=4, concat_channels=4, width=320, mults=(1, 2, 4, 4), blocks=2,
                 attention=("factorised", "factorised", "factorised", "none"), head_dim=64,
                 dim_clip=1024, dim_number=256, actions=0, embed_given=False):
        super().__init__()
        self.sizes = dict(channels=channels, width=width, mults=mults, blocks=blocks,
                          attention=attention)
        self.channels = channels
        self.concat_channels = concat_channels
        self.multiple = 2 ** (len(mults) - 1)
        self.dim_clip = dim_clip
        self.actions = actions
        dim_emb = 4 * width

        def embedding(dim_in):
            return nn.Sequential(nn.Linear(dim_in, dim_emb), nn.SiLU(), nn.Linear(dim_emb, dim_emb))

        def layers(dim_in, dim, attention):
            residual = StableResBlock(dim_in, dim, dim_emb)
            if attention == "none":
                return [residual]
            return [residual, StableTransformer(dim, head_dim, dim_clip, self.WAVES * actions)]

        self.embed = embedding(width)
        self.embed_given = embedding(width) if embed_given else None
        self.embed_numbers = embedding(3 * dim_number)
        self.down = nn.ModuleList([Stage([conv(channels + concat_channels, width)])])
        dim = width
        skips = [dim]
        for level, mult in enumerate(mults):
            if level > 0:
                halve = nn.Sequential()
                halve.op = conv(dim, dim, stride=2)
                self.down.append(Stage([halve]))
                skips.append(dim)
            for _ in range(blocks):
                self.down.append(Stage(layers(dim, width * mult, attention[level])))
                dim = width * mult
                skips.append(dim)
        self.middle = Stage([*layers(dim, dim, "factorised"), *layers(dim, dim, "none")])
        self.up = nn.ModuleList()
        for level in reversed(range(len(mults))):
            for _ in range(blocks + 1):
                both = dim + skips.pop()
                dim = width * mults[level]
                self.up.append(Stage(layers(both, dim, attention[level])))
            if level > 0:
                double = nn.Sequential(nn.Upsample(scale_factor=2))
                double.conv = conv(dim, dim)
                self.up[-1].append(double)
        self.output = nn.Sequential(nn.GroupNorm(32, dim), nn.SiLU(), zero(conv(dim, channels)))

    def check(self, x, **inputs):
        """Refuse inputs, by name, of which one has another shape than it should have beside x."""
        B, T, _, H, W = x.shape
        if H % self.multiple or W % self.multiple:
            raise ValueError(f"latents are {H} x {W}, expected multiples of {self.multiple}")
        c = self.concat_channels
        shapes = dict(x=[(B, T, self.channels, H, W)], clip=[(B, self.dim_clip)], numbers=[(B, 3)],
                      action=[(B, self.actions)], concat=[(B, 1, c, H, W), (B, T, c, H, W)])
        for name, value in dict(x=x, **inputs).items():
            if value.shape not in shapes[name]:
                raise ValueError(f"{name} is {tuple(value.shape)}, expected "
                                 f"{' or '.join(map(str, shapes[name]))}")

    def forward(self, x, c_noise, concat=None, clip=None, numbers=None, action=None, given=None):
        if concat is None and x.shape[2] > self.channels:
            concat = x[:, :, self.channels:]
            x = x[:, :, :self.channels]
        B, T, _, H, W = x.shape
        c_noise = torch.as_tensor(c_noise, device=x.device)
        if c_noise.ndim < 2:
            c_noise = c_noise.reshape(-1, 1).expand(B, T)
        if numbers is None:
            raise ValueError("numbers (B, 3) are missing: frame rate - 1, motion, augmentation")
        if given is not None and self.embed_given is None:
            raise ValueError("this is SVD's network: only Vista's knows frames given in x")
        if concat is None:
            concat = x.new_zeros(B, 1, self.concat_channels, H, W)
        if clip is None:
            clip = x.new_zeros(B, self.dim_clip)
        if action is None:
            action = x.new_full((B, self.actions), math.nan)
        self.check(x, concat=concat, clip=clip, numbers=numbers, action=action)
        x = torch.cat([x, concat.to(x).expand(-1, T, -1, -1, -1)], dim=2)          # (B, T, 8, H, W)
        level = waves(c_noise, self.embed[0].in_features).to(x)                     # (B, T, width)
        emb = self.embed(level)                                                         # (B, T, E)
        if given is not None:
            emb = torch.where(given[..., None] == 0, self.embed_given(level), emb)
        numbers = waves(numbers, self.embed_numbers[0].in_features // 3).flatten(1)
        emb = emb + self.embed_numbers(numbers.to(x))[:, None]
        action = waves(action, self.WAVES).nan_to_num().flatten(1).to(x)          # (B, 128 actions)
        clip = clip.to(x)
        skips = []
        for stage in self.down:
            x = stage(x, emb, clip, action)
            skips.append(x)
        x = self.middle(x, emb, clip, action)
        for stage in self.up:
            x = stage(torch.cat([x, skips.pop()], dim=2), emb, clip, action)
        return each_frame(self.output, x)                                          # (B, T, 4, H, W)

def picture_conditions(picture, fps, motion=127.0, level=0.0, clip=None):
    """What SVD and Vista are told of a picture (B, 1, 4, H, W), of the latents that are diffused.

    level is that of the noise put on the picture before it was encoded (SVD: 0.02, Vista: 0), clip
    its CLIP token (B, 1024), or None."""
    numbers = torch.tensor([fps - 1, motion, level], device=picture.device)
    told = dict(concat=picture / LATENT_SCALE, numbers=numbers.expand(len(picture), 3))
    if clip is not None:
        told["clip"] = clip
    return told

# ==================================================================================================
# 13. FVDM, diffusion forcing
# ==================================================================================================

def independent_levels(u, frames, chance):
    """Places on a schedule, one per clip u (n,) -> one per frame (n, frames).

    With this chance every frame of a clip draws its own (FVDM: 0.2; diffusion forcing: 1)."""
    own = torch.rand(len(u), frames).clamp(1e-5, 1 - 1e-5)
    return torch.where(torch.rand(len(u), 1) < chance, own, u[:, None])

class PerFrame(Denoiser):
    """A Denoiser whose given frames stand in x at noise level 0, as clean frames (FVDM).

    It needs no further channels. Train it with noise levels per frame (independent_levels), and
    with context and mask, so that it meets level 0."""

    def forward(self, x, sigma, context=None, mask=None, **conditions):
        if context is None or mask is None:
            return super().forward(x, sigma, context, mask, **conditions)
        if sigma.ndim == 1:
            sigma = sigma[:, None].expand(mask.shape)
        given = expand(mask, x) == 1                                               # (B, T, 1, 1, 1)
        sigma = torch.where(mask == 1, 0, sigma)                                            # (B, T)
        estimate = super().forward(torch.where(given, context, x), sigma, **conditions)
        return torch.where(given, context, estimate)

def lagged(sigmas, frames, lag):
    """A matrix of noise levels for a sampler, (steps + lag * (frames - 1) + 1, frames).

    Each frame walks down sigmas (steps + 1,), `lag` steps behind the one before. With lag 0 all go
    together, with lag = steps one by one, and between in a pyramid (diffusion forcing). So
    generate(denoise, shape, lagged(sigmas, shape[1], lag)) draws a clip; sample_heun takes none."""
    steps = len(sigmas) - 1
    made = torch.arange(steps + lag * (frames - 1) + 1)[:, None] - lag * torch.arange(frames)
    return sigmas[made.clamp(0, steps)]

def stream(denoise, length, shape, sigmas, lag, context=None, seed=0, clips=None,
           tell=lambda start: {}, sampler=sample_dpmpp_2m):
    """Yield a video of any length, frame by frame (B, 1, C, H, W): a pyramid that moves along.

    A window, of shape (B, T, C, H, W), holds frames that are done, and then some on their way, each
    `lag` steps behind the one before. Once its last frame has set out it moves on by one. denoise
    sees frames that are done at level 0, as a PerFrame sees given ones. lag is steps / (T - 1) or
    more, so that one is always in sight. The sampler starts anew every `lag` steps: so
    sample_dpmpp_2m, which looks back, is sample_ddim at lag 1.

    Arguments are those of rollout, but tell(start) returns the conditions of a window that begins
    at frame start. ValueError for a lag, or a context, of which no window can be made."""
    B, T, *chw = shape
    steps = len(sigmas) - 1
    if not steps <= lag * (T - 1) <= steps * (T - 1):
        raise ValueError(f"lag is {lag}, expected {math.ceil(steps / max(T - 1, 1))} to {steps}: "
                         f"{steps} steps, in windows of {T} frames")
    noise = clip_noise(seed, range(B) if clips is None else clips, sigmas.device)
    given = (torch.zeros(B, 0, *chw) if context is None else context).to(sigmas.device)
    n = given.shape[1]
    if n >= T:
        raise ValueError(f"context has {n} frames, a window of {T} has room for {T - 1}")
    if n > 0:
        yield given
    x = torch.cat([given, sigmas[0] * noise(T - n, *chw)], dim=1)
    made = lag * (n - torch.arange(T))            # steps that each frame has made; below 0 it waits
    made[:n] = steps
    start = 0                                                           # the window's first frame
    for frame in range(n, length):
        while made[frame - start] < steps:
            rows = (made + torch.arange(lag + 1)[:, None]).clamp(0, steps)            # (lag + 1, T)
            told = partial(denoise, **tell(start))
            x = sampler(told, x, sigmas[rows], lambda x: noise(*x.shape[1:]))
            made = made + lag
            if made[-1] > 0:
                x = torch.cat([x[:, 1:], sigmas[0] * noise(1, *chw)], dim=1)
                made = torch.cat([made[1:], made.new_zeros(1)])
                start += 1
        yield x[:, [frame - start]]

# ==================================================================================================
# 14. Adapters and editing
# ==================================================================================================
# To train a few per cent of a trained network: adapt puts adapters in, trainable freezes the rest.
# The last part of an adapter is 0 at first. LoRA wraps single layers. SimDA and Tune-A-Video make
# an image model a video model: they also let its frames look at each other, unless temporal is 0.

class LowRank(nn.Sequential):
    """The trained part of LoRA."""

class LoRA(nn.Module):
    """layer(x) + B A x for a Linear or a convolution (LoRA; Vista has rank 16).

    A goes down to `rank` channels; it is normal with standard deviation 1 / rank, as in Vista. B
    goes up again; it is 0. The layer is not frozen here. ValueError if it is of another kind, or a
    convolution that is grouped or padded by other than zeros."""

    def __init__(self, layer, rank=4):
        super().__init__()
        kind = type(layer)
        if kind not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
            raise ValueError(f"LoRA cannot wrap a {kind.__name__}: expected Linear or Conv1d to 3d")
        dim, dim_in = layer.weight.shape[:2]
        if kind is nn.Linear:
            down = nn.Linear(dim_in, rank, bias=False)
            up = nn.Linear(rank, dim, bias=False)
        elif layer.groups > 1 or layer.padding_mode != "zeros":
            raise ValueError(f"LoRA cannot wrap {layer}: expected one group, padded by zeros")
        else:
            down = kind(dim_in, rank, layer.kernel_size, layer.stride, layer.padding,
                        layer.dilation, bias=False)
            up = kind(rank, dim, 1, bias=False)
        nn.init.normal_(down.weight, std=1 / rank)
        self.layer = layer
        self.branch = LowRank(down, zero(up)).to(layer.weight)

    def forward(self, x):
        return self.layer(x) + self.branch(x)

    @torch.no_grad()
    def merge(self):
        """The wrapped layer with B A added to its weight, in place: the same answers at the old
        cost. Put it where this module was, once."""
        down, up = self.branch
        low_rank = up.weight.flatten(1) @ down.weight.flatten(1)
        self.layer.weight += low_rank.view_as(self.layer.weight)
        return self.layer

class Adapter(nn.Sequential):
    """The trained part of SimDA, and of Tune-A-Video: there, the layer that makes the queries."""

def bottleneck(dim):
    """SimDA's adapter of attention or feed-forward layers: GELU on a quarter of the channels."""
    return Adapter(nn.Linear(dim, dim // 4), nn.GELU(), zero(nn.Linear(dim // 4, dim)))

def temporal_bottleneck(dim):
    """SimDA's T-Adapter: half of the channels look at three frames, each channel on its own."""
    half = dim // 2
    return Adapter(nn.Conv3d(dim, half, 1),
                   nn.Conv3d(half, half, (3, 1, 1), padding=(1, 0, 0), groups=half),
                   zero(nn.Conv3d(half, dim, 1)))

def latent_shift(t, h, w):
    """SimDA's latent-shift attention: frame t looks at itself, and at places of up to four frames
    ago, which alternate as in the authors' code. Where the clip had not begun, it is frame t."""
    shifts = torch.tensor([(4, 3, 2, 1), (3, 2, 1, 0), (2, 1, 0, 0), (1, 2, 3, 4)], device=t.device)
    past = t - shifts[h % 4, w % 4]
    return [t, torch.where(past < 0, t, past)]

def sparse_causal(t, h, w):
    """Tune-A-Video's sparse-causal attention: frame t looks at frames 0 and t - 1 (section 4)."""
    return [torch.zeros_like(t), (t - 1).clamp(min=0)]

class FrameAttention(nn.Module):
    """An image model's attention over space, of which each frame also looks at other frames.

    seen(t, h, w) names them: the token of each place (h, w) is seen as it is in these frames. L
    tokens look at 2 L, where looking at all T frames would take T L (SimDA section 3.3).

    It stands in the place of a Block's `time`, which is told temporal, and holds that layer and the
    attention behind it. Adapters: over_time before attention, behind it, and beside the
    feed-forward layer. At temporal=0 all of this is off, and the image model is as it was."""

    def __init__(self, time, attention, seen, over_time=torch.zeros_like, behind=torch.zeros_like,
                 beside=torch.zeros_like):
        super().__init__()
        self.time = time
        self.attention = attention
        self.seen = seen
        self.over_time = over_time
        self.behind = behind
        self.beside = beside

    def forward(self, x, temporal=1.0):                                            # (B, T, C, H, W)
        share = torch.as_tensor(temporal).to(x)
        x = self.time(x, temporal)
        x = x + expand(share, x) * self.over_time(x.transpose(1, 2)).transpose(1, 2)
        tokens = rearrange(x, "b t c h w -> b t (h w) c")
        share = expand(share, tokens)                                            # (B or 1, 1, 1, 1)
        h = self.attention.out(self.look(tokens, share, x.shape[3:]))
        tokens = tokens + h + share * self.behind(h)
        h = self.attention.feed_forward(tokens)
        tokens = tokens + h + share * self.beside(tokens)
        return rearrange(tokens, "b t (h w) c -> b t c h w", h=x.shape[3])

    def look(self, tokens, share, size):
        """What tokens (B, T, L, C) see: their own frame, or a share of the frames of seen."""
        layer = self.attention
        T, L = tokens.shape[1:3]
        h = layer.norm(tokens)
        q, k, v = (part(h).unflatten(-1, (layer.heads, -1)).transpose(2, 3)    # (B, T, heads, L, d)
                   for part in (layer.q, layer.k, layer.v))
        position = places(size, h.device)                                                   # (L, 2)
        q = rotate(q, position)
        k = rotate(k, position)                                    # a place is its own in any frame
        grid = places([T, *size], h.device).unflatten(0, (T, L))
        frames = torch.stack(self.seen(*grid.unbind(-1)), dim=1)                         # (T, n, L)

        def look_at(k, v):
            seen = F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)))
            return rearrange(seen, "(b t) heads l d -> b t l (heads d)", t=T)

        def others(x):                                                     # (B, T, heads, n L, d)
            x = x.transpose(2, 3)[:, frames, torch.arange(L, device=x.device)]
            return x.flatten(2, 3).transpose(2, 3)

        own = look_at(k, v)
        return own + share * (look_at(others(k), others(v)) - own)

def lora_layers(net, rank):
    """LoRA for the matrices of attention and the temporal convolutions of a network, by name."""
    for name, layer in net.named_modules():
        if isinstance(layer, (Attention, StableAttention)):
            for part in ("q", "k", "v", "out", "clip", "clip_out"):
                if hasattr(layer, part):
                    yield f"{name}.{part}", LoRA(getattr(layer, part), rank)
        elif isinstance(layer, TemporalConv):
            yield f"{name}.conv", LoRA(layer.conv, rank)

def video_layers(net, kind):
    """The layers of simda or sparse_causal for a network, by name: where it has attention over
    space."""
    for name, block in net.named_modules():
        if isinstance(block, Block) and isinstance(block.space_attention, Attention):
            layer = block.space_attention
            dim = layer.out.out_features
            if kind == "simda":
                new = FrameAttention(block.time, layer, latent_shift, temporal_bottleneck(dim),
                                     bottleneck(dim), bottleneck(dim))
            else:
                layer.q = Adapter(layer.q)
                new = FrameAttention(block.time, layer, sparse_causal)
            yield f"{name}.time", new
            yield f"{name}.space_attention", nn.Identity()

def adapt(net, kind="lora", rank=4):
    """Put adapters into a network; return the parameters to be trained.

    lora has this rank, and changes nothing at first. simda (adapters and latent-shift attention)
    and sparse_causal (Tune-A-Video: trains the queries of attention) make frames look at each
    other at once. They are for a VideoUNet with attention over space."""
    if kind not in ("lora", "simda", "sparse_causal") or rank < 1:
        raise ValueError(f"adapters are {kind!r} of rank {rank}, expected lora, simda or "
                         "sparse_causal, 1 or more")
    layers = dict(lora_layers(net, rank) if kind == "lora" else video_layers(net, kind))
    if not layers:
        raise ValueError(f"this network has no layers for {kind}: choose lora")
    device = next(net.parameters()).device
    for name, layer in layers.items():
        net.set_submodule(name, layer.to(device))
    part = part_of(net)
    return [p for p in part if part[p] in ("lora", "adapters")]

# Of StableUNet, shares (mix) and frame numbers (place) count as spatial, as in Vista's training.
PARTS = {"temporal": (TemporalConv, TemporalAttention, ConcatInput, StableTemporalResidual,
                      StableTemporalAttention),
         "conditions": (NumberEmbedding, LabelEmbedding, ActionEmbedding, ActionProjection),
         "lora": (LowRank,), "adapters": (Adapter,)}

def part_of(model):
    """The part of a model that every parameter belongs to: {parameter: part}.

    It is that of the innermost module of a kind in PARTS, or "spatial"."""
    parts = {p: "spatial" for p in model.parameters()}
    for module in model.modules():                           # outer modules come before inner ones
        for part, kinds in PARTS.items():
            if isinstance(module, kinds):
                parts.update({p: part for p in module.parameters()})
    return parts

def trainable(model, parts):
    """Freeze all of a model but some of its parts: spatial, temporal, conditions, lora, adapters.

    Video LDM trains the temporal part of an image model, LoRA and SimDA train adapters,
    Tune-A-Video both. On a CPU let the noisy clip need a gradient: PyTorch 2.13 dies in the
    backward pass of a GroupNorm that learns behind layers of which none does."""
    part = part_of(model)
    unknown = set(parts) - set(part.values())
    if unknown or not parts:
        raise ValueError(f"train is {' '.join(parts)!r}, but the parts of this model are "
                         f"{' '.join(sorted(set(part.values())))}: name some of them")
    for p in model.parameters():
        p.requires_grad_(part[p] in parts)

@torch.no_grad()
def invert_ddim(denoise, x, sigmas, iterations=1):
    """Walk sample_ddim backwards: from a clip to the x at sigmas[0] that it would come from.

    Sampled from there under another condition, the clip is edited (Tune-A-Video). A step from s to
    t is undone by solving y = x + (s - t) (y - denoise(y, s)) / s for y. One iteration is the usual
    inversion: the network is asked at x, scaled to level s. More iterations bring the round trip
    closer, but x may leave the noise that the model knows: x.std() should be about sigmas[0]. The
    step from noise level 0, where they would not end, has one."""
    for t, s in zip(sigmas.flip(0)[:-1].tolist(), sigmas.flip(0)[1:].tolist()):
        y = x * ((1 + s ** 2) / (1 + t ** 2)) ** 0.5
        for _ in range(iterations if t > 0 else 1):
            y = x + (s - t) * (y - denoise(y, constant(s, y))) / s
        x = y
    return x

# ##################################################################################################
# PART III. TOOLS. Worlds, files, presets.
# ##################################################################################################

import argparse
import dataclasses
import difflib
import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

# ==================================================================================================
# 15. Worlds that can be marked
# ==================================================================================================
# A dataset gives dict(video=clip (T, C, H, W)) for any index 0, 1, 2 ... without end, and what it
# gives depends on its seed and the index alone: a run can be resumed from a number. If it has them,
# there is a label of .labels classes, and an action (T, A) of modes of the lengths .actions.

class MovingShapes:
    """A solid shape moves on black, straight ahead, at constant speed. Walls bounce it.

    It keeps its kind, colour and size. Its label is 6 * kind + colour. RADIUS (half the side of its
    box) and SPEED (the way per frame) are shares of the picture's shorter side. With a stride a
    clip is every stride-th frame of the same clip, and SPEED is so many times as high."""

    KINDS = "disc", "square", "triangle"
    COLORS = dict(red=(1, 0, 0), green=(0, 1, 0), blue=(0, 0, 1),
                  yellow=(1, 1, 0), magenta=(1, 0, 1), cyan=(0, 1, 1))
    labels = 18
    actions = ()
    RADIUS = 0.18, 0.25
    SPEED = 0.03, 0.08

    # How much `check` forgives. Light runs from 0, the clip's own dark, to 1, its own bright level.
    EDGE = 0.2, 0.8              # below is outside, above is inside: soft edges and noise are cut
    TONE = 0.33                  # levels of light or of a colour channel differ by more than this
    MATCH = 0.75                 # overlap with the ideal shape, as intersection / union
    RIVAL = 0.06                 # another kind may fit one frame better by this much: small shapes
    RESIZE = 0.12                # one frame's radius against the clip's, as a share
    SLACK = 0.2                  # the clip's radius beyond RADIUS, as a share: soft edges blur it
    STRAY = 1.5 / 32             # distance from the path, as a share of the shorter side
    HURRY = 0.017                # one window's speed against the clip's
    TWIN = 0.05                  # difference of two copies, as a share of the light of both

    def __init__(self, frames=8, size=(32, 32), seed=0, stride=1):
        self.frames = frames
        self.size = tuple(size)
        self.seed = seed
        self.SPEED = tuple(stride * speed for speed in self.SPEED)
        self.palette = np.float32(list(self.COLORS.values()))                         # (colours, 3)

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, i])
        unit = min(self.size)
        color = rng.permutation(len(self.palette))[0]
        kind = rng.integers(3)
        r = rng.uniform(*self.RADIUS) * unit
        speed = rng.uniform(*self.SPEED) * unit
        angle = rng.uniform(0, 2 * np.pi)
        walls = np.array(self.size) - r
        step = speed * np.array([np.sin(angle), np.cos(angle)])
        path = rng.uniform(r, walls) + step * np.arange(self.frames)[:, None]               # (T, 2)
        y, x = self.bounce(path, r, walls).T
        cover = np.float32(self.draw(kind, r, y, x, self.size))                          # (T, H, W)
        video = cover[:, None] * self.palette[color][:, None, None]                   # (T, 3, H, W)
        return dict(video=torch.from_numpy(video) * 2 - 1, label=6 * int(kind) + int(color))

    @staticmethod
    def bounce(x, low, high):
        """Fold a straight line into [low, high]: that is all an elastic wall does."""
        return high - np.abs((x - low) % (2 * (high - low)) - (high - low))

    @staticmethod
    def draw(kind, r, y, x, size):
        """Return the share of each pixel that shapes of one kind cover: (...) -> (..., H, W)."""
        r, y, x = (np.asarray(a)[..., None, None] for a in (r, y, x))
        down = np.arange(size[0])[:, None] + 0.5 - y
        side = np.abs(np.arange(size[1]) + 0.5 - x)
        if kind == 0:
            outside = np.hypot(side, down) - r                            # the distance to the edge
        elif kind == 1:
            outside = np.maximum(side, np.abs(down)) - r
        else:
            outside = np.maximum(down - r, (2 * side - down - r) / 5 ** 0.5)
        return np.clip(0.5 - outside, 0, 1)

    def check(self, videos, action=None):
        """Mark clips (B, T, 3, H, W) with values from -1 to 1. The result is a dict of arrays (B,).

        Each law has an entry: is it kept? `passed` is true if all are. kinds, colors and speeds are
        what is seen. copies is one number: how many clips nearly equal an earlier clip of the
        batch? Models that collapse make many."""
        light = self.light(videos)
        B, _, _, H, W = light.shape
        unit = min(H, W)
        dark = np.median(light, (1, 3, 4), keepdims=True)      # shapes cover a quarter, at the most
        shapes = np.maximum(light - dark, 0)                                         # around it 0
        color = self.core(shapes)                                                       # (B, T, 3)
        bright = np.maximum(np.median(color.max(2), 1), 1e-3)   # of the clip: it must not flicker
        color = color / bright[:, None, None]
        far = np.abs(color - self.palette[:, None, None]).max((2, 3))                 # (colours, B)
        match, radius, y, x = self.compare(shapes.max(2) / bright[:, None, None, None])  # (3, B, T)
        kind = match.mean(2).argmax(0)                                                        # (B,)
        own = kind, np.arange(B)
        r = radius[own]                                                                     # (B, T)
        usual_r = np.median(r, 1, keepdims=True)                                            # (B, 1)
        miss_y, speed_y = self.fit_path(y[own], usual_r, H)                           # (B, windows)
        miss_x, speed_x = self.fit_path(x, usual_r, W)
        speed = np.hypot(speed_y, speed_x) / unit
        usual_speed = np.median(speed, 1, keepdims=True)
        low, high = np.array(self.RADIUS) * unit * (1 - self.SLACK, 1 + self.SLACK)
        black = dark.max((1, 2, 3, 4)) < self.TONE
        laws = dict(
            shape=(match[own] > self.MATCH) & (match.max(0) - match[own] < self.RIVAL),
            color=(far.min(0) < self.TONE) & (bright > self.TONE) & black,
            size=(np.abs(r / usual_r - 1) < self.RESIZE) & (low < usual_r) & (usual_r < high),
            path=np.maximum(miss_y, miss_x) < self.STRAY * unit,
            speed=np.abs(speed - usual_speed) < self.HURRY,
            moving=speed > self.SPEED[0] / 2)                  # a frozen clip breaks this law alone
        laws = {law: kept.reshape(B, -1).all(1) for law, kept in laws.items()}
        return dict(passed=np.all(list(laws.values()), 0), **laws, kinds=kind, colors=far.argmin(0),
                    speeds=usual_speed[:, 0], copies=self.copies(light))

    @staticmethod
    def light(videos):
        """Return the light of each pixel, from 0 to 1, as a numpy array."""
        v = torch.as_tensor(videos).float().cpu().numpy()
        # most of a lawful clip is -1, and parts of noise are: a few stray values do not count
        if np.quantile(v, 0.01) > -0.1 and v.max() > 0.5:            # a young model's grey is not
            raise ValueError(f"the clips' values run from {v.min():.2f} to {v.max():.2f}, but check"
                             " expects -1 for black and 1 for full light: if they run from 0 to 1,"
                             " pass 2 * clips - 1")
        return np.clip((v + 1) / 2, 0, 1)

    def copies(self, v):
        """Count the clips that nearly equal an earlier one."""
        flat = v.reshape(len(v), -1)
        product = flat @ flat.T                                                             # (B, B)
        both = np.add.outer(product.diagonal(), product.diagonal())
        near = both - 2 * product <= self.TWIN * both            # the left side is |a - b| squared
        return np.tril(near, -1).any(1).sum()

    def core(self, v):
        """Return the mean of the brightest pixels of v (B, T, 3, H, W) in each frame, (B, T, 3).

        They are half as many as the smallest shape has, so that soft edges are not among them."""
        light = v.max(2)
        few = int((self.RADIUS[0] * min(light.shape[2:])) ** 2)
        least = np.partition(light.reshape(*light.shape[:2], -1), -few)[..., -few]          # (B, T)
        return v.mean((3, 4), where=(light >= least[..., None, None])[:, :, None])

    def compare(self, light):
        """Compare light (B, T, H, W) with each kind of shape, equal in area and centre.

        Blur changes neither. Return the overlap, the radius, and the middle of the box, y and x:
        (3, B, T), but x (B, T)."""
        H, W = light.shape[2:]
        outside, inside = self.EDGE
        cover = np.clip((light - outside) / (inside - outside), 0, 1)
        area = np.maximum(cover.sum((2, 3)), 1e-3)                                          # (B, T)
        center = cover.sum(3) @ (np.arange(H) + 0.5) / area
        x = cover.sum(2) @ (np.arange(W) + 0.5) / area
        radius = np.sqrt(area / np.array([np.pi, 4, 2])[:, None, None])       # the area is c r ** 2
        y = center - radius * np.array([0, 0, 1 / 3])[:, None, None]     # triangles have a low one
        match = []
        for kind in range(3):
            ideal = self.draw(kind, radius[kind], y[kind], x, (H, W))
            both = np.minimum(ideal, cover).sum((2, 3))
            match.append(both / np.maximum(area + ideal.sum((2, 3)) - both, 1e-3))
        return np.stack(match), radius, y, x

    def fit_path(self, x, r, side):
        """Fit a bouncing path to every 8 frames in a row of a coordinate x (B, T).

        It turns at r (B, 1) from the walls, 0 and side. Of 97 speeds and 13 places of the middle
        frame the best is taken. Return how far x strays from it, and its speed: (B, windows)."""
        n = min(8, x.shape[1])
        limit = 1.25 * self.SPEED[1] * side
        speed, place = np.meshgrid(np.linspace(-limit, limit, 97), np.linspace(-1.5, 1.5, 13),
                                   indexing="ij")
        lines = place.reshape(-1, 1) + speed.reshape(-1, 1) * (np.arange(n) - n // 2)  # (lines, n)
        low = r[:, :, None]
        high = np.maximum(side - low, low + 1)
        misses = []
        speeds = []
        for run in np.lib.stride_tricks.sliding_window_view(x, n, 1).swapaxes(0, 1):        # (B, n)
            paths = self.bounce(run[:, n // 2, None, None] + lines, low, high)      # (B, lines, n)
            miss = np.abs(paths - run[:, None]).max(2)                                  # (B, lines)
            misses.append(miss.min(1))
            speeds.append(np.abs(speed.flat[miss.argmin(1)]))
        return np.stack(misses, 1), np.stack(speeds, 1)

class Drive:
    """An endless map seen from above by a car that obeys one command per frame.

    The commands are left, straight, right (45 degrees off, at one speed; nothing turns) and stop.
    A command lasts for another frame with a chance of 0.7. action[t] is what moved the view from
    frame t - 1 to t, in two modes: the command, one-hot (4), and the motion (2), down and right as
    shares of the speed."""

    KEYS = "LSRX"                             # left, straight, right, stop
    SPEED = 1 / 16                            # per frame, as a share of the shorter side
    MOVES = np.array([(-0.5 ** 0.5, -0.5 ** 0.5), (-1, 0), (-0.5 ** 0.5, 0.5 ** 0.5), (0, 0)])
    ACTIONS = np.hstack([np.eye(4), MOVES]).astype(np.float32)         # (4, 6), of each command

    def __init__(self, frames=8, size=(32, 32), seed=0):
        self.frames = frames
        self.size = tuple(size)
        self.seed = seed
        self.labels = 0
        self.actions = (4, 2)
        self.speed = self.SPEED * min(size)

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, i])
        turn = np.where(rng.random(self.frames) < 0.7, 0, rng.integers(1, 4, self.frames))
        commands = (rng.integers(4) + turn.cumsum()) % 4                                      # (T,)
        place = self.speed * self.MOVES[commands].cumsum(0)                                 # (T, 2)
        # in each channel the map is a sum of n plane waves, weight exp(i (ky y + kx x))
        n = 12
        length = min(self.size) * rng.uniform(0.4, 1.2, n)
        angle = rng.uniform(0, 2 * np.pi, n)
        k = 2 * np.pi / length * np.array([np.sin(angle), np.cos(angle)])                   # (2, n)
        weight = rng.normal(size=(2, 3, 1, n)) / n ** 0.5
        rows = np.arange(self.size[0])[:, None] + place[:, 0, None, None]                # (T, H, 1)
        columns = np.arange(self.size[1])[:, None] + place[:, 1, None, None]             # (T, W, 1)
        y = np.exp(1j * k[0] * rows)                                                     # (T, H, n)
        x = np.exp(1j * k[1] * columns)                                                  # (T, W, n)
        waves = ((weight[0] + 1j * weight[1]) * y[:, None]) @ x[:, None].mT           # (T, 3, H, W)
        return dict(video=torch.from_numpy(np.tanh(waves.real)).float(),
                    action=torch.from_numpy(self.ACTIONS[commands]))

    def check(self, videos, action=None):
        """Mark clips (B, T, 3, H, W) by the motion seen between neighbouring frames: a dict of

        commands  (B, T - 1), what each frame t > 0 followed; -1 if its motion is none of the four,
                  to 0.3 of the speed, or explains less than two thirds of the picture
        obeys     (B, T - 1), if action (B, T, 6) says so or, without one, if any command fits
        passed    (B,), if all frames obey"""
        B, T = videos.shape[:2]
        cell = max(1, min(self.size) // 16)            # 16 cells a side are enough, and less noisy
        v = F.avg_pool2d(videos.float().cpu().flatten(0, 1), cell).unflatten(0, (B, T)).numpy()
        # change = slope @ motion, by least squares over all cells (Lucas and Kanade)
        change = np.diff(v, axis=1).reshape(B, T - 1, -1, 1)                      # (B, T - 1, n, 1)
        slope = np.stack(np.gradient((v[:, 1:] + v[:, :-1]) / 2, axis=(3, 4)), -1)
        slope = slope.reshape(B, T - 1, -1, 2)                                    # (B, T - 1, n, 2)
        motion = np.linalg.solve(slope.mT @ slope + 1e-4 * np.eye(2), slope.mT @ change)
        rest = (change - slope @ motion).var((2, 3))                                    # (B, T - 1)
        explained = rest < v[:, 1:].var((2, 3, 4)) / 3 - 1e-3                     # no blank frames
        speeds = motion.mT * cell / self.speed                                   # (B, T - 1, 1, 2)
        far = np.linalg.norm(speeds - self.MOVES, axis=3)                           # (B, T - 1, 4)
        fits = (far.min(2) < 0.3) & explained
        commands = np.where(fits, far.argmin(2), -1)                                    # (B, T - 1)
        told = commands
        if action is not None:
            told = action[:, 1:, :4].argmax(2).cpu().numpy()
        obeys = (commands == told) & fits
        return dict(commands=commands, obeys=obeys, passed=obeys.all(1))

# ==================================================================================================
# 16. Video files
# ==================================================================================================

# Files hold bytes, uint8 (T, H, W, C). Models want float (T, C, H, W) in [-1, 1]. Files are read as
# PIL images, and crop_to shrinks one at a time: a clip need not fit in memory at full size.

VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
FPS = 8.0                                          # of pictures and arrays, which store no speed
STORED_FRAMES = ["-fps_mode", "passthrough"]       # else ffmpeg repeats some, to even out the times

def to_uint8(clip):
    """float (..., C, H, W), C 1 or 3, clamped to [-1, 1] -> uint8 numpy (..., H, W, C)."""
    if not clip.is_floating_point() or clip.shape[-3:-2] not in ((1,), (3,)):
        raise ValueError(f"the clip holds {clip.dtype} {tuple(clip.shape)}, expected floats in "
                         "[-1, 1] (..., 1 or 3, H, W): from_uint8 makes them of (..., H, W, C)")
    if not torch.isfinite(clip).all():
        raise ValueError("the clip holds NaN or infinite values, expected numbers in [-1, 1]")
    pixels = (clip.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return pixels.round().to(torch.uint8).movedim(-3, -1).numpy()

def from_uint8(frames):
    """uint8 numpy (..., H, W, C) -> float32 (..., C, H, W) in [-1, 1]. to_uint8 undoes it."""
    return torch.tensor(frames).movedim(-1, -3) / 127.5 - 1

def crop_to(image, size=None, channels=3):
    """A PIL image, shrunk until it covers size = (h, w) and cropped -> uint8 (h, w, channels)."""
    from PIL import Image, ImageOps
    if image.mode[0] in "IF":
        raise ValueError(f"pixels of mode {image.mode}, expected 8 bits each: convert the picture")
    image = ImageOps.exif_transpose(image)                      # a phone may store it on its side
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA"))
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None:
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    return np.atleast_3d(image)

def clips_of_array(path):
    """The clips in an .npy or a one-array .npz, uint8 ([N,] T, H, W [, C]), each as PIL images.

    mnist_test_seq.npy, Moving MNIST, is known by its name: it is stored as (T, N, H, W)."""
    from PIL import Image
    x = np.load(path, mmap_mode="r", allow_pickle=False)               # a pickle could run any code
    if not isinstance(x, np.ndarray):
        if len(x) != 1:
            raise ValueError(f"an .npz of {len(x)} arrays, expected one")
        x = x[x.files[0]]
    found = f"{x.dtype} {x.shape}"
    if path.name == "mnist_test_seq.npy":
        x = x.swapaxes(0, 1)
    if x.shape[-1:] not in [(1,), (3,), (4,)]:
        x = x[..., None]
    if x.ndim == 4:
        x = x[None]                                                              # (N, T, H, W, C)
    # one frame or three without colour are rather the channels of an (N, C, H, W)
    if x.dtype != np.uint8 or x.ndim != 5 or x.shape[1::3] in ((1, 1), (3, 1)):
        raise ValueError(f"expected uint8 ([N,] T, H, W [, C]), found {found}: multiply values of 0"
                         " to 1 by 255 (of -1 to 1: add 1, multiply by 127.5), round and store"
                         " uint8, and put the channels last, np.moveaxis(x, -3, -1)")
    if x.shape[4] == 1:
        x = x[..., 0]
    return [map(Image.fromarray, clip) for clip in x]

def frames_of_gif(path):
    """The frames of a .gif or .webp as PIL images, and their times in seconds.

    Equal frames are stored as one that lasts longer. Here it is repeated."""
    from PIL import Image, ImageSequence
    if path.suffix.lower() == ".gif" and not path.read_bytes().rstrip(b"\0\r\n").endswith(b";"):
        raise ValueError("the GIF is truncated, its end mark is missing")
    images = ImageSequence.all_frames(Image.open(path))
    lasts = np.array([image.info.get("duration") or 1000 / FPS for image in images])            # ms
    times = np.round(lasts / lasts.min()).astype(int)
    return ([image for image, n in zip(images, times) for _ in range(n)],
            np.arange(times.sum()) * lasts.min() / 1000)

def times_of(path):
    """The times of all frames of a video, in seconds, not always evenly spaced.

    What is left of a damaged file reads as if it were whole. Only ffmpeg's messages tell."""
    from imageio_ffmpeg import get_ffmpeg_exe
    try:
        command = [get_ffmpeg_exe(), *"-v error -map 0:v:0".split(), *STORED_FRAMES,
                   *"-enc_time_base demux -f framecrc - -i".split(), path.absolute()]
        done = subprocess.run(command, input=b"", capture_output=True)
    except (RuntimeError, FileNotFoundError) as e:
        raise ImportError(f"ffmpeg is missing, which reads {path}") from e
    said = done.stderr.decode("latin1")
    if said:
        raise ValueError(f"ffmpeg cannot read all: {said.splitlines()[-1].split('] ')[-1]}")
    listed = done.stdout.decode("latin1")           # "#tb 0: 1/600", then "0, dts, pts, ..." a line
    tick = [int(n) for n in re.search(r"#tb 0: (\d+)/(\d+)", listed).groups()]
    times = [int(n) for n in re.findall(r"^0, *-?\d+, *(-?\d+)", listed, re.M)]
    return np.array(times) * tick[0] / tick[1]

def at_rate(frames, times, rate=None):
    """Frames of these times, and frames per second. A rate chooses, or repeats, those nearest to
    evenly spaced times, `rate` a second, from the first on."""
    if len(times) < 2 or times[-1] <= times[0]:
        return frames, rate or FPS
    if rate is None:
        return frames, round((len(times) - 1) / (times[-1] - times[0]), 2)
    wanted = np.arange(times[0], times[-1] + 1e-6, 1 / rate)
    nearest = np.interp(wanted, times, np.arange(len(times)))                # halfway is rounded up
    counts = np.bincount((nearest + 0.5 + 1e-6).astype(int), minlength=len(times))
    return (frame for frame, n in zip(frames, counts) for _ in range(n)), rate

def files_of(path):
    """The file that a path names or, of a folder, the pictures in it, frame2 before frame10."""
    if not path.is_dir():
        return [path]
    files = [p for p in path.glob("[!.]*") if p.suffix.lower() in PICTURES]
    return sorted(files, key=lambda p: (len(p.stem), p.stem))

def open_clips(path, rate=None):
    """The clips in a file, or the one in a folder of pictures, as PIL images; frames per second.

    With a rate, frames of videos and GIFs are chosen to have it; of all else it is believed."""
    import imageio.v3 as iio
    from PIL import Image
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        return clips_of_array(path), rate or FPS
    if suffix in VIDEOS:
        frames = iio.imiter(path, plugin="FFMPEG", output_params=STORED_FRAMES)
        frames, fps = at_rate(map(Image.fromarray, frames), times_of(path), rate)
    elif suffix in (".gif", ".webp"):
        frames, fps = at_rate(*frames_of_gif(path), rate)
    else:
        files = files_of(path)
        if not files:
            raise ValueError(f"a folder without pictures, expected {' '.join(sorted(PICTURES))}")
        frames = map(Image.open, files)
        fps = rate or FPS
    return [frames], fps

def decode(path, size=None, channels=3, rate=None):
    """A file or a folder of pictures -> clips uint8 (N, T, h, w, channels), frames per second.

    Only an array holds more than one clip. Frames are shrunk to cover size = (h, w), then cropped;
    None leaves them as they are; so it does for the rate, see open_clips. What is missing or
    damaged raises a ValueError with the cause."""
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}, expected 1 (grey) or 3 (colour)")
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist, expected a video, a picture or an array")
    try:
        clips, fps = open_clips(Path(path), rate)
        clips = [np.stack([crop_to(image, size, channels) for image in clip]) for clip in clips]
        return np.stack(clips), fps
    except (ImportError, NameError, TypeError, AttributeError, MemoryError):
        raise                                                       # the file is not to be blamed
    except Exception as error:                                     # each kind of damage has its own
        cause = str(error) or repr(error)
        raise ValueError(f"{path}: {cause.splitlines()[-1]}") from error

def read_video(path, size=None, channels=3):
    """The first clip in a file or folder -> float (T, channels, H, W). Arguments as in decode."""
    clips, _ = decode(path, size, channels)
    return from_uint8(clips[0])

@contextmanager
def replacing(path, mark="part"):
    """A path to write to, beside this one. It gets this one's name once it is whole, not before.

    OSError if that fails; then the old file is still there, and nothing else. What a kill leaves is
    overwritten next time. Programs that may write path at the same time need marks of their own."""
    part = path.with_name(f".{mark}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as e:                # RuntimeError is torch's, of an OSError
        codes = [getattr(error, "errno", 0) for error in (e, e.__context__)]
        full = errno.ENOSPC in codes or shutil.disk_usage(path.parent).free < 1e6
        reason = "the disk is full" if full else e
        raise OSError(f"could not write {path} ({reason}); what was there is untouched") from e
    finally:
        if part.exists():
            part.unlink()

def write_video(path, clip, fps=8.0, scale=None):
    """Write a clip (T, C, H, W), C 1 or 3, as .mp4 or .gif, or one frame as .png; return the path.

    clip is float in [-1, 1], a tensor or a sequence of frames (an .mp4 takes one at a time). Each
    pixel becomes scale x scale; None enlarges clips below 128 pixels. If ffmpeg fails, an .mp4
    becomes a .gif."""
    import imageio.v3 as iio
    path = Path(path)
    suffix = path.suffix.lower()
    shape = tuple(clip[0].shape)
    if suffix not in (".mp4", ".gif", ".png") or len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"{path}, frames {shape}: expected .mp4, .gif or .png, and channels first,"
                         " (1 or 3, H, W)")
    k = scale
    if scale is None:
        k = math.ceil(128 / min(*shape[1:], 128))
        if k * shape[1] % 2 or k * shape[2] % 2:                            # H.264 wants even sides
            k += 1
    frames = (to_uint8(torch.as_tensor(frame).expand(3, -1, -1)).repeat(k, 0).repeat(k, 1)
              for frame in clip)
    try:
        with replacing(path) as part:
            if suffix == ".mp4":
                iio.imwrite(part, frames, plugin="FFMPEG", is_batch=True, fps=fps, quality=8,
                            macro_block_size=2)
            else:
                duration = max(20, 10 * round(100 / fps))         # GIF counts in 10 ms, at least 20
                iio.imwrite(part, [*frames], plugin="pillow", duration=duration, loop=0)
            if part.stat().st_size == 0:                          # ffmpeg may fail without an error
                raise OSError("nothing was written")
    except OSError as error:
        if suffix != ".mp4":
            raise
        print(f"{str(error):.200}: writing a .gif instead")
        return write_video(path.with_suffix(".gif"), clip, fps, scale)
    return path

def film_strip(clips, line=-0.6):
    """(B, T, C, H, W) -> picture (C, B * (H + 1) + 1, T * (W + 1) + 1) with lines between frames.

    Row b is clip b, column t is frame t. Any number of axes may stand in the place of C."""
    B, T, *C, H, W = clips.shape
    x = F.pad(clips, (1, 0, 1, 0), value=line)                             # (B, T, C, H + 1, W + 1)
    x = x.movedim(0, -3).movedim(0, -2)                                    # (C, B, H + 1, T, W + 1)
    return F.pad(x.reshape(*C, B * (H + 1), T * (W + 1)), (0, 1, 0, 1), value=line)

def grid(clips):
    """(B, T, C, H, W) -> one clip (T, C, H', W') of all, side by side. Empty cells are black."""
    columns = math.ceil(len(clips) ** 0.5)
    empty = -len(clips) % columns
    clips = F.pad(clips, (0, 0) * 4 + (0, empty), value=-1)
    return film_strip(clips.unflatten(0, (-1, columns)))

@dataclasses.dataclass
class StoredClip:
    """Clip k of an .npy file (N, frames, H, W, C). A worker gets its place, not its pixels."""
    path: Path
    k: int
    frames: int

    def __len__(self):
        return self.frames

    def __getitem__(self, cut):
        return np.load(self.path, mmap_mode="r")[self.k][cut]

def find_files(root, without=None):
    """The files at or below a path, none hidden, whatever links lead there each once.

    A folder stands for the pictures in it. Runs, and the folder `without`, are left out."""
    if root.is_file():
        return [root]
    files = {}                                                   # the real path of each -> its path
    seen = {without and os.path.realpath(without)}
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or "last.pt" in names:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for path in (Path(folder, name) for name in sorted(names) if name[0] != "."):
            if path.suffix.lower() in PICTURES:
                path = path.parent
            elif path.name.endswith((".actions.npy", ".tokens.npy")) or not path.is_file():
                continue
            key = os.path.realpath(path)
            if key not in files or files[key].is_symlink():
                files[key] = path
    return sorted(files.values())

class VideoFolder:
    """Clips of `frames` frames from a file, or from the files below a folder or its train/.

    dataset[i], any i >= 0, is dict(video=float (frames, C, H, W)) and depends on (seed, i) alone.
    Every len(dataset) items hold each clip once, from a random start, at every stride-th frame.

    cache    keep decoded clips in .vdm_cache/ beside the data for the next run, if that folder can
             be written; else they are kept in memory. OSError if the disk is full
    data_fps choose frames of videos to have this rate; it is believed of files that store none
    without  a folder that is not looked into
    actions  (A,), or () if there are none. Numbers (T, A) in clip.actions.npy beside clip.mp4 are
             cut like its frames to action=(frames, A). NaN stands for what is not told
    fps      frames per second of an item
    checksum of names and sizes of the files
    report   what was used, what was skipped, and why"""

    labels = 0
    to_float = staticmethod(from_uint8)

    def __init__(self, path, frames, size, stride=1, channels=3, seed=0, progress=False,
                 cache=False, data_fps=None, without=None):
        from tqdm import tqdm
        root = Path(path)
        if not root.exists():
            raise ValueError(f"{path} does not exist, expected a video file or a folder of them")
        if (root / "train").is_dir():
            root = root / "train"
        self.frames = frames
        self.size = tuple(size)
        self.stride = stride
        self.channels = channels
        self.seed = seed
        self.data_fps = data_fps
        self.span = (frames - 1) * stride + 1          # the stored frames that an item extends over
        self.cache = None                              # then clips are kept in memory
        folder = root if root.is_dir() else root.parent
        if cache and os.access(folder, os.W_OK):
            self.cache = folder / ".vdm_cache"
        self.cached = {path.name[:32]: path for path in folder.glob(".vdm_cache/[!.]*.npy")}
        self.clips = []
        self.rates = []                                # of each clip, frames per second
        self.moves = []                                # the actions of each clip, or None
        self.actions = ()
        skipped = []
        files = find_files(root, without)
        if not files:
            kinds = " ".join(sorted(VIDEOS | PICTURES | {".gif", ".webp", ".npy", ".npz"}))
            raise ValueError(f"{root} is an empty folder, expected files of these types: {kinds}")
        state = [(p.relative_to(root).as_posix(), p.stat().st_size)
                 for file in files for p in files_of(file)]
        self.checksum = hashlib.sha256(repr(state).encode()).hexdigest()[:16]
        for file in tqdm(files, "decoding", disable=not progress):
            try:
                self.add(file)
            except ValueError as error:
                skipped.append("skipped " + str(error).replace("\n", "\\n"))
        self.cached.clear()
        self.fps = float(np.median(self.rates or [0])) / stride
        self.report = self.describe(root, len(files), skipped)
        if not self.clips:
            raise ValueError(self.report)

    def describe(self, root, files, skipped):
        """The report, of a number of files and of the reasons why some were skipped."""
        report = (f"data: {files} files in {root} -> {len(self)} clips used, {len(skipped)} "
                  f"skipped, {self.size[0]}x{self.size[1]} crop, {self.channels} channels, "
                  f"{self.fps:g} fps")
        if self.clips:
            lengths = [len(clip) for clip in self.clips]
            ends = sorted({min(lengths), max(lengths)})
            report += f", {' to '.join(map(str, ends))} frames each"
        if self.actions:
            report += f", {sum(x is not None for x in self.moves)} with actions"
        lines = [report, *skipped[:9]]
        if len(skipped) > 9:
            lines.append(f"skipped {len(skipped) - 9} more")
        low = min(self.rates, default=0)
        high = max(self.rates, default=0)
        if high > 1.05 * low:
            lines.append(f"warning: clips have different rates, {low:.3g} to {high:.3g} fps: "
                         f"--data-fps {low:.3g} chooses frames so that they have one")
        return "\n      ".join(lines).encode(errors="replace").decode()   # names may be any bytes

    def add(self, file):
        """Keep the clips of a file, and their actions."""
        clips, fps = self.read(file)
        if len(clips[0]) < self.span:
            of = " (its pictures)" if file.is_dir() else ""
            raise ValueError(f"{file}{of}: {len(clips[0])} frames are too few, a clip takes "
                             f"{self.span}: lower --frames or --stride, or raise --data-fps")
        self.moves += self.read_actions(file.with_suffix(".actions.npy"), clips)
        self.clips += clips
        self.rates += [fps] * len(clips)

    def read(self, file):
        """The clips in a file, (N, T, H, W, C), and frames per second, by way of the cache."""
        if self.cache is None:
            clips, fps = decode(file, self.size, self.channels, self.data_fps)
            return list(clips), fps
        state = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files_of(file)]
        key = repr((os.path.relpath(file, self.cache), state, self.size, self.channels,
                    self.data_fps)).encode()
        key = hashlib.sha256(key).hexdigest()[:32]
        try:
            path = self.cached[key]
            fps = float(path.stem.partition("-")[2])
            shape = np.load(path, mmap_mode="r").shape
        except (KeyError, OSError, ValueError, EOFError):                    # missing, or damaged
            clips, fps = decode(file, self.size, self.channels, self.data_fps)
            shape = clips.shape
            path = self.cache / f"{key}-{fps}.npy"
            with replacing(path, os.getpid()) as part:
                np.save(part, clips)
        return [StoredClip(path, k, shape[1]) for k in range(shape[0])], fps

    def read_actions(self, path, clips):
        """The actions (T, A) of each clip, or None for each if there is no such file."""
        if not path.is_file():
            return [None] * len(clips)
        try:
            stored = np.load(path).astype(np.float32)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: {error}") from error
        x = stored.reshape(-1, *stored.shape[-2:])                                      # (N, T, A)
        width = self.actions or x.shape[-1:]
        shape = (len(clips), len(clips[0]), *width)
        if x.shape != shape or np.isinf(x).any():
            raise ValueError(f"{path}: {stored.shape}, expected {shape}, a row per frame, of finite"
                             " numbers, or NaN where none is told")
        self.actions = width
        return list(x)

    def __len__(self):
        return len(self.clips)

    def place(self, i):
        """The number of the clip that item i is cut from, and the slice of its frames."""
        turn, k = divmod(i, len(self))
        number = np.random.default_rng([self.seed, 0, turn]).permutation(len(self))[k]
        starts = len(self.clips[number]) - self.span + 1
        start = int(np.random.default_rng([self.seed, 1, i]).integers(starts))
        return number, slice(start, start + self.span, self.stride)

    def __getitem__(self, i):
        number, cut = self.place(i)
        item = dict(video=self.to_float(self.clips[number][cut]))              # (frames, C, H, W)
        if self.actions:
            item["action"] = torch.full((self.frames, *self.actions), math.nan)
            if self.moves[number] is not None:
                item["action"] = torch.tensor(self.moves[number][cut])
        return item

# ==================================================================================================
# 17. Models: Config, presets, build, save, load
# ==================================================================================================
# No class above reads Config: they take plain arguments, which build hands over.

@dataclasses.dataclass
class Config:
    """Every number of a run. train.py makes a flag of each field, with its comment as help."""
    # the clips, and what a model is
    frames: int = 8                 # frames per clip
    size: tuple = (32, 32)          # height and width in pixels; with factor, of the latents
    channels: int = 3               # 3 for colour, 1 for grey; with factor, of the latents
    stride: int = 1                 # take every stride-th frame of a file, or of shapes
    fps: float = 8.0                # frames per second of the videos written
    factor: int = 0                 # pixels to a latent along each side (0: no latents)
    planes: tuple = ()              # frames, height, width of latents on planes; sets frames, size
    width: int = 16                 # channels of the first level
    mults: tuple = (1, 3, 6)        # channels of each level, as multiples of width
    blocks: int = 1                 # blocks per level and way
    attention: tuple = ("none", "factorised", "joint")  # of each level: none, factorised or joint
    head_dim: int = 16              # channels per attention head
    patch: int = 2                  # frames are cut into patch x patch tiles first
    kind: str = "x0"                # what the network predicts: eps, v, flow, x0 or edm
    sigma_data: float = 0.5         # standard deviation of the data, for kind and weighting edm
    give: str = "concat"            # concat, hint, replace, per_frame, previous, svd or vista
    labels: int = 0                 # classes of clips (shapes: 18; 0: no labels)
    actions: tuple = ()             # lengths of the modes of an action (default: as the data has)
    adapters: str = ""              # put in lora, simda or sparse_causal ("": none of them)
    rank: int = 4                   # rank of LoRA
    # what noise it sees, and what it is given
    schedule: str = "lognormal"     # linear, scaled_linear, cosine, sigmoid, uniform, lognormal
    mean: float = 1.5               # lognormal: mean of log(sigma)
    std: float = 1.2                # lognormal: standard deviation of log(sigma)
    offset: float = 0.0             # strength of noise that all pixels of a frame share (section 9)
    context: tuple = (0.5, 0.0, 0.0, 0.0, 0.5)  # odds that the first 0, 1, 2 ... frames are given
    task: str = "predict"           # given frames: predict (the first), ends, any, image, upsample
    hint_noise: float = 0.0         # give hint: largest noise level of the frames given
    enlarge: int = 4                # task upsample: how many times as large as what is given
    crop: tuple = ()                # train on random crops of this size (default: whole frames)
    independent: float = 0.0        # give per_frame: odds that every frame has its own noise level
    drop: float = 0.15              # odds that label and actions are withheld
    images: float = 0.08            # share of clips trained as loose frames, temporal=0
    stills: int = 0                 # pictures from other clips trained beside every clip (VDM: 8)
    # how it is trained
    loss: str = "change"            # plain, change (plus the change between frames), or vista
    weighting: str = "inverse"      # weight: inverse, min_snr, or that of a kind (loss_weight)
    steps: int = 2000               # steps of training
    batch: int = 16                 # clips per step
    optimizer: str = "muon"         # adamw, or muon (with AdamW for all that is not a matrix)
    lr: float = 2e-3                # peak learning rate of AdamW
    muon_lr: float = 0.01           # peak learning rate of Muon
    warmup: int = 50                # steps in which rates rise; then they fall to 0 linearly
    weight_decay: float = 0.01      # AdamW's
    clip_norm: float = 1.0          # largest norm of the gradient
    ema: float = 0.995              # decay of the averaged weights
    train: tuple = ("all",)         # all, or some of spatial, temporal, conditions, lora, adapters
    spatial_lr: float = 1.0         # learning rate of spatial layers, as a share (Vista: 0.1)
    # how it is sampled
    sampler: str = "dpmpp_2m_sde"   # ddpm, ddim, heun, dpmpp_2m or dpmpp_2m_sde
    sampling_steps: int = 20        # noise levels visited; heun evaluates twice at all but the last
    skip_guidance: float = 1.3      # more than 1 exaggerates what frames tell each other
    sigma_min: float = 0.2          # smallest noise level visited
    sigma_max: float = 60.0         # noise level at which sampling starts
    rho: float = 7.0                # bend of the grid between them: larger dwells at low noise
    overlap: int = 4                # frames that a window of a long video is given

    def __post_init__(self):
        if self.planes:                              # to the network a clip is one row of places
            if len(self.planes) != 3:
                raise ValueError(f"planes are {self.planes}, expected frames, height and width")
            self.frames = 1
            self.size = (1, sum(h * w for h, w in plane_sizes(*self.planes)))

# A preset is a set of defaults; any flag after it wins. The comments say what differs from the
# papers; "unverified" is what neither paper nor code tells.

paper = partial(Config, channels=4, factor=8, blocks=2, head_dim=64, patch=1, images=0.0,
                loss="plain", optimizer="adamw", warmup=0, ema=0.9999, skip_guidance=1.0)
stable = partial(paper, size=(72, 128), width=320, mults=(1, 2, 4, 4), kind="v", weighting="v",
                 attention=(*["factorised"] * 3, "none"), std=1.6, sampler="ddim",
                 sigma_min=0.002, sigma_max=700.0)
PRESETS = {
    "tiny": Config(),                   # the toy world on a laptop
    # the same network for grey clips of moving digits, mnist_test_seq.npy or any such file. Thin
    # strokes are fine detail: hence lower noise levels, and a smaller sigma_min
    "digits": Config(channels=1, batch=8, steps=3000, mean=0.8, std=1.4,
                     context=(0.25, 0.0, 0.0, 0.0, 0.75), sigma_min=0.05),
    # the toy world, 16 frames of 64 x 64 pixels, by latents of 4 x 16 x 16 per frame. Encoders here
    # give them standard deviation 1: hence sigma_data
    "latent": Config(frames=16, size=(16, 16), channels=4, factor=4, sigma_data=1.0, width=48,
                     mults=(1, 2), attention=("none", "joint"), steps=1500),
    # PVDM on a laptop: the toy world, 16 frames of 32 x 32 pixels, on planes of 4 x 320 in all
    "planes": Config(planes=(16, 8, 8), channels=4, factor=4, width=48, mults=(1, 2), head_dim=12,
                     attention=("joint", "factorised"), patch=1, give="previous",
                     context=(0.5, 0.5), images=0.0, loss="plain", skip_guidance=1.0, steps=1500),
    # Moving MNIST (mnist_test_seq.npy), the usual first data set, at full size
    "mnist": Config(frames=20, size=(64, 64), channels=1, width=64, mults=(1, 2, 4), head_dim=32,
                    patch=4, context=(0.5, *[0.0] * 9, 0.5), overlap=10, steps=20_000, ema=0.999),
    # VDM, 16 x 64 x 64 pixels. Theirs has three blocks on the way up and two in the middle, no
    # temporal convolutions, no feed-forward layers, relative positions in time, dropout 0.1, and
    # samples evenly in u with gamma 0.1. Unverified: fps, clip_norm
    "ucf101": paper(frames=16, size=(64, 64), channels=3, factor=0, fps=25.0, width=256,
                    mults=(1, 2, 4, 8), attention=("none", *["factorised"] * 3), kind="eps",
                    schedule="cosine", weighting="eps", context=(1.0,), stills=8, steps=60_000,
                    batch=128, lr=3e-4, weight_decay=0.0, sampler="ddpm", sampling_steps=256,
                    sigma_min=4.54e-5, sigma_max=22026.0),
    # PVDM-L, 16 x 256 x 256 pixels; S: --width 128 --head-dim 16 --sampling-steps 100. All layers
    # of its network are theirs but the first of the noise level, which sees 64 waves, not width.
    # Their autoencoder is larger, and learns by LPIPS and a GAN, too. Unverified: fps, clip_norm
    "sky": paper(planes=(16, 32, 32), width=256, mults=(1, 2, 4, 4), kind="eps", head_dim=32,
                 attention=(*["factorised"] * 3, "joint"), give="previous", context=(0.8, 0.2),
                 schedule="scaled_linear", weighting="eps", steps=850_000, batch=64, lr=1e-4,
                 sampler="ddpm", sampling_steps=200, sigma_min=0.0388, sigma_max=83.8),
    # Video LDM, key frames, 128 x 256 pixels. Theirs trains temporal layers alone, after an image
    # model, and mixes by alpha. Unverified: frames, betas, context, clip_norm, ema, sampling, width
    "rds": paper(frames=8, size=(16, 32), fps=2.0, width=320, mults=(1, 2, 4, 4), kind="v",
                 attention=(*["factorised"] * 3, "none"), schedule="linear", weighting="v",
                 context=(1 / 3, 1 / 3, 1 / 3), overlap=2, drop=0.1, steps=73_000, batch=640,
                 lr=1e-4, sampler="ddim", sampling_steps=200, sigma_min=0.01, sigma_max=157.4),
    # SVD, image to video, 14 x 576 x 1024 pixels, the last stage of its training; load_published
    # takes its weights. Theirs puts noise on the picture's pixels, exp(N(-3, 0.5)); ours has none,
    # as latents come without. Unverified: weight_decay, clip_norm
    "svd": stable(frames=14, fps=7.0, give="svd", context=(1.0,), mean=1.0, lr=3e-5, steps=50_000,
                  batch=768, sampling_steps=25),
    # Vista, phase 1, 25 x 576 x 1024 pixels. Phase 2: --train lora conditions --adapters lora
    # --rank 16 --spatial-lr 1 --lr 5e-5 --batch 8, --size 40 72 for 120,000 steps, then --size 72
    # 128 for 10,000
    "vista": stable(frames=25, fps=10.0, give="vista", actions=(1, 8, 4, 4, 2), mean=1.0,
                    context=(1 / 15, 2 / 15, 4 / 15, 8 / 15), offset=0.02, loss="vista", lr=1e-5,
                    spatial_lr=0.1, warmup=1000, clip_norm=0.3, steps=20_000, batch=256,
                    sampling_steps=50, overlap=3),
}

def noise_schedule(config):
    """The training noise schedule of a config: a function u -> sigma."""
    if config.schedule == "lognormal":
        return partial(lognormal, mean=config.mean, std=config.std)
    return SCHEDULES[config.schedule]

GIVES = dict(concat=Denoiser, hint=Denoiser, replace=Replace, per_frame=PerFrame,
             previous=PreviousClip, svd=Denoiser, vista=Replace)
KINDS = ("eps", "v", "flow", "x0", "edm")
CHOICES = dict(kind=KINDS, schedule=SCHEDULES, sampler=SAMPLERS, give=GIVES,
               weighting=("inverse", "min_snr", *KINDS),
               task=("predict", "ends", "any", "image", "upsample"),
               loss=("plain", "change", "vista"), optimizer=("adamw", "muon"),
               adapters=("", "lora", "simda", "sparse_causal"))

def check_config(config):
    """ValueError, one sentence, for names and sizes of which no model can be built."""
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
    levels = len(config.mults)
    if len(config.attention) != levels or set(config.attention) - {"none", "factorised", "joint"}:
        raise ValueError(f"attention is {' '.join(map(str, config.attention))}, expected none, "
                         f"factorised or joint for each of the {levels} levels of mults")
    flag = "planes" if config.planes else "size"
    sides = getattr(config, flag)
    multiple = config.patch * 2 ** (levels - 1)                 # every level halves the tiled frame
    near = [max(multiple, round(n / multiple) * multiple) for n in sides]
    if near != [*sides]:
        raise ValueError(f"{flag} is {sides}, patch and mults need multiples of {multiple}: "
                         f"the nearest that works is --{flag} {' '.join(map(str, near))}")
    wide = [config.width * mult for mult, attention in zip(config.mults, config.attention)
            if attention != "none"]
    if config.planes:                                      # the first level decides how many heads
        wide = [config.width]
    if any(n % config.head_dim for n in wide) or (wide and config.head_dim % 2):
        raise ValueError(f"head_dim is {config.head_dim}: it must be even and divide the channels "
                         f"of every level that has attention, {wide}")

def build(config):
    """Config -> Denoiser with fresh weights. Its network is a VideoUNet, for planes a PlaneUNet,
    for give svd and vista a StableUNet."""
    check_config(config)
    C = config.channels
    concat_channels = dict(concat=C + 1, hint=C + 1, previous=C, svd=C, vista=C).get(config.give, 0)
    sizes = (C, concat_channels, config.width, config.mults, config.blocks, config.attention)
    if config.give in ("svd", "vista"):
        net = StableUNet(*sizes, config.head_dim, actions=sum(config.actions),
                         embed_given=config.give == "vista")
    elif config.planes:
        net = PlaneUNet(*sizes, config.width // config.head_dim, plane_sizes(*config.planes))
    else:
        conditions = {}
        if config.labels:
            conditions["label"] = LabelEmbedding(config.labels)
        if config.actions:
            conditions["action"] = ActionEmbedding(sum(config.actions))
        if config.give == "hint":
            conditions["augmentation"] = NumberEmbedding()
        if config.give == "replace":
            conditions["given"] = LabelEmbedding(1)
        net = VideoUNet(*sizes, config.head_dim, config.patch, conditions=conditions)
    if config.adapters:
        adapt(net, config.adapters, config.rank)
    return GIVES[config.give](net, config.kind, config.sigma_data)

def build_autoencoder(config):
    """Config -> Autoencoder or, for planes, TriplaneAutoencoder, with fresh weights, of colour."""
    if config.planes:
        return TriplaneAutoencoder(3, config.channels, config.planes, config.factor)
    return Autoencoder(channels=3, latent=config.channels, factor=config.factor)

def save(path, **state):
    """Write a checkpoint of tensors and plain values. If that fails, an older one there stays."""
    with replacing(Path(path)) as part, open(part, "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())                            # on the disk before it gets the old name

def read_file(path):
    """What torch.save or safetensors wrote to a file.

    ValueError for one that is damaged, or that holds code, which weights_only never runs."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        if path.suffix == ".safetensors":
            import safetensors.torch
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as e:
        raise ValueError(f"to read {path}: pip install safetensors") from e
    except Exception as e:                                         # each kind of damage has its own
        raise ValueError(f"{path} is no checkpoint of this program: it is truncated, of another "
                         "kind, or holds code, which is never run") from e

def read_checkpoint(path):
    """What save wrote -> (dict, Config). ValueError as of read_file, or if it is of another version
    of Config, as its network may have been another, too."""
    state = read_file(path)
    if not isinstance(state, dict) or "config" not in state:
        raise ValueError(f"{path} is no checkpoint of this program")
    other = state["config"].keys() ^ Config.__dataclass_fields__.keys()
    if other:
        raise ValueError(f"{path} is of another version of this program: only one of them knows "
                         f"{', '.join(sorted(other))}")
    return state, Config(**state["config"])

def with_weights(model, weights, path):
    """model with these weights, in evaluation mode."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:
        reason = str(e).splitlines()[-1].strip()[:150]
        raise ValueError(f"the weights in {path} do not fit the config in it: {reason}") from e
    return model.eval().requires_grad_(False)

def load(path, raw=False):
    """A checkpoint -> (Denoiser with averaged weights, in evaluation mode, on the CPU; Config).

    raw takes the last weights instead, which last.pt of a run has, too.
    A .safetensors or .ckpt file holds published weights, for the preset svd or vista."""
    if Path(path).suffix in (".safetensors", ".ckpt"):
        denoiser = load_published(path)
        preset = PRESETS["svd" if denoiser.net.embed_given is None else "vista"]
        actions = preset.actions if denoiser.net.actions else ()
        return denoiser, dataclasses.replace(preset, actions=actions, **denoiser.net.sizes)
    state, config = read_checkpoint(path)
    if "stage" in state:
        raise ValueError(f"{path} is an autoencoder: train on its latents with --latents {path}")
    weights = state.get("model" if raw else "ema")
    if weights is None:
        raise ValueError(f"{path} does not hold these weights; last.pt of a run holds both kinds")
    return with_weights(build(config), weights, path), config

def load_autoencoder(path):
    """The checkpoint of an autoencoder, or of a model of its latents -> (Autoencoder, Config).

    The first is None if the model is one of pixels, or of published weights."""
    if Path(path).suffix in (".safetensors", ".ckpt"):
        return None, None
    state, config = read_checkpoint(path)
    weights = state.get("ema") if "stage" in state else state.get("autoencoder")
    if not weights:
        return None, config
    return with_weights(build_autoencoder(config), weights, path), config

# The weights of SVD and Vista. What StableUNet's layers are called in the files of Stability's code
# and of Vista, and in those of diffusers. In attention all have the same names.

ATTENTION_NAMES = (
    (".norm.", ".norm1."), (".q.", ".attn1.to_q."), (".k.", ".attn1.to_k."),
    (".v.", ".attn1.to_v."), (".out.", ".attn1.to_out.0."), (".clip.", ".attn2.to_v."),
    (".clip_out.", ".attn2.to_out.0."), (".action.", ".attn2.v_adapter_action_control."),
    (".feed_forward.0.", ".norm3."), (".feed_forward.1.", ".ff.net.0.proj."),
    (".feed_forward.3.", ".ff.net.2."), (".before.0.", ".norm_in."),
    (".before.1.", ".ff_in.net.0.proj."), (".before.3.", ".ff_in.net.2."),
    (".space_attention.", ".transformer_blocks.0."), (".enter_norm.", ".norm."),
    (".enter.", ".proj_in."), (".leave.", ".proj_out."), (".mix", ".time_mixer.mix_factor"))
STABILITY_NAMES = (
    (".norm1.", ".in_layers.0."), (".conv1.", ".in_layers.2."), (".emb.", ".emb_layers.1."),
    (".norm2.", ".out_layers.0."), (".conv2.", ".out_layers.3."), (".skip.", ".skip_connection."),
    (".space.", "."), (".time.", ".time_stack."), *ATTENTION_NAMES,
    (".time_attention.", ".time_stack.0."), (".place.", ".time_pos_embed."),
    (".embed.", ".time_embed."), (".embed_given.", ".cond_time_stack_embed."),
    (".embed_numbers.", ".label_emb.0."), (".down.", ".input_blocks."),
    (".middle.", ".middle_block."), (".up.", ".output_blocks."), (".output.", ".out."))
DIFFUSERS_NAMES = (
    (".emb.", ".time_emb_proj."), (".skip.", ".conv_shortcut."), (".space.", ".spatial_res_block."),
    (".time.", ".temporal_res_block."), *ATTENTION_NAMES,
    (".time_attention.", ".temporal_transformer_blocks.0."),
    (".place.0.", ".time_pos_embed.linear_1."), (".place.2.", ".time_pos_embed.linear_2."),
    (".embed.0.", ".time_embedding.linear_1."), (".embed.2.", ".time_embedding.linear_2."),
    (".embed_numbers.0.", ".add_embedding.linear_1."),
    (".embed_numbers.2.", ".add_embedding.linear_2."), (".down.0.0.", ".conv_in."),
    (".middle.0.", ".mid_block.resnets.0."), (".middle.1.", ".mid_block.attentions.0."),
    (".middle.2.", ".mid_block.resnets.1."), (".output.0.", ".conv_norm_out."),
    (".output.2.", ".conv_out."))

def renamed(name, names):
    """A name with all pairs of such a table replaced, in order."""
    name = f".{name}"
    for ours, theirs in names:
        name = name.replace(ours, theirs)
    return name[1:]

# Our name of a tensor -> its key in files of Stability's code and of Vista.
stability_name = partial(renamed, names=STABILITY_NAMES)

def diffusers_name(name, blocks):
    """Our name of a tensor -> its key in diffusers' UNetSpatioTemporalConditionModel, whose levels
    have so many blocks."""
    name = renamed(name, DIFFUSERS_NAMES)
    match = re.fullmatch(r"(down|up)\.(\d+)\.(\d)\.(.+)", name)
    if not match:
        return name
    way, stage, part, rest = match.groups()
    level, block = divmod(int(stage) - dict(down=1, up=0)[way], blocks + 1)
    if rest.startswith(("op.", "conv.")):                                      # half or double size
        return f"{way}_blocks.{level}.{way}samplers.0.conv.{rest.split('.')[-1]}"
    kind = ("resnets", "attentions")[int(part)]
    return f"{way}_blocks.{level}.{kind}.{block}.{rest}"

def tensors_of(source):
    """Return the tensors {key: tensor} of the published network, and the naming of their keys.

    source is as in load_published. The naming is a function: our name of a tensor -> its key."""
    if isinstance(source, nn.Module):
        source = source.state_dict()
    weights = source if isinstance(source, dict) else read_file(source)
    weights = weights.get("state_dict", weights)
    prefix = "model.diffusion_model."
    if any(key.startswith(prefix) for key in weights):       # beside it: autoencoder, CLIP
        weights = {key.removeprefix(prefix): w for key, w in weights.items()
                   if key.startswith(prefix)}
    if "conv_in.weight" in weights:
        blocks = sum(bool(re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.time_mixer.*", key))
                     for key in weights)
        return weights, partial(diffusers_name, blocks=blocks)
    return weights, stability_name

def arguments_of(weights, naming):
    """Read the arguments of a StableUNet, but for head_dim, off its published weights."""
    def find(name):
        return weights.get(naming(name))

    for name in ("down.0.0.weight", "output.2.weight", "embed_numbers.0.weight",
                 "middle.1.space_attention.clip.weight"):
        if find(name) is None:
            raise ValueError(f"these are no weights of SVD's or Vista's network: {naming(name)} is "
                             f"missing among {', '.join(sorted(weights)[:3])} ...")
    width, both = find("down.0.0.weight").shape[:2]
    channels = len(find("output.2.weight"))
    stages = [find(f"down.{i}.0.space.conv1.weight") for i in range(1, 100)]
    blocks = stages.index(None)                                # this stage halves; a level follows
    mults = []
    attention = []
    for i in range(0, len(stages), blocks + 1):
        if stages[i] is not None:
            mults.append(len(stages[i]) // width)
            is_plain = find(f"down.{i + 1}.1.enter.weight") is None
            attention.append("none" if is_plain else "factorised")
    action = find("middle.1.space_attention.action.weight")
    return dict(
        channels=channels, concat_channels=both - channels, width=width, mults=tuple(mults),
        blocks=blocks, attention=tuple(attention),
        dim_clip=find("middle.1.space_attention.clip.weight").shape[1],
        dim_number=find("embed_numbers.0.weight").shape[1] // 3,
        actions=0 if action is None else action.shape[1] // StableUNet.WAVES,
        embed_given=find("embed_given.0.weight") is not None)

IDLE = r".*(attn2\.(to_q|to_k|k_adapter_action_control)|blocks\.0\.norm2|time_stack\.0\.norm2)\..*"

def load_published(source, head_dim=64):
    """Published weights of SVD or Vista -> a Denoiser, in evaluation mode, on the CPU, in float32.

    source is a .safetensors, .pt or .ckpt file, a module, or a dict of tensors, with the keys of
    Stability's code, of Vista or of diffusers' UNetSpatioTemporalConditionModel. Sizes are read off
    the tensors; only the channels per attention head cannot be (diffusers: block_out_channels /
    num_attention_heads). ValueError names what is missing, what has another shape, and what this
    network has not."""
    weights, naming = tensors_of(source)
    with torch.device("meta"):                               # 6 GB of numbers need not be drawn
        net = StableUNet(head_dim=head_dim, **arguments_of(weights, naming))
    keys = {name: naming(name) for name in net.state_dict()}
    for name, empty in net.state_dict().items():
        found = weights.get(keys[name])
        if found is None or found.shape != empty.shape:
            shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise ValueError(f"{keys[name]} is {shape}, expected {tuple(empty.shape)}")
    left = [key for key in weights.keys() - set(keys.values()) if not re.fullmatch(IDLE, key)]
    if left:
        raise ValueError(f"this network has no {', '.join(sorted(left)[:3])} ({len(left)} tensors)"
                         ": is it another one, or has it adapters, which have to be merged first?")
    net.load_state_dict({name: weights[key].float() for name, key in keys.items()}, assign=True)
    kind = Denoiser if net.embed_given is None else Replace
    return kind(net, kind="v").eval().requires_grad_(False)

def save_published(path, denoiser, layout="stability"):
    """Write the weights of a StableUNet as .safetensors, with the keys of Stability's code (and of
    Vista's), or with layout="diffusers" those of diffusers. LoRA is merged in.

    What does nothing is written, too, as these programs expect it: zeros."""
    import safetensors.torch
    net = getattr(denoiser, "net", None)
    if not isinstance(net, StableUNet) or Path(path).suffix != ".safetensors":
        raise ValueError("save_published(path, denoiser) needs a path that ends in .safetensors, "
                         "and a Denoiser whose network is a StableUNet")
    if layout not in ("stability", "diffusers") or (layout == "diffusers" and net.embed_given):
        raise ValueError(f"layout is {layout!r}, expected stability or, but for Vista, diffusers")
    if any(isinstance(module, LoRA) for module in net.modules()):
        net = copy.deepcopy(net)
        for name, module in [*net.named_modules()]:
            if isinstance(module, LoRA):
                net.set_submodule(name, module.merge())
    naming = stability_name
    if layout == "diffusers":
        naming = partial(diffusers_name, blocks=net.sizes["blocks"])
    weights = {}
    for name, w in net.state_dict().items():
        key = naming(name)
        weights[key] = w.contiguous()
        parent, _, kind = key.removesuffix(".weight").rpartition(".attn2.")
        dim = len(w)
        if kind == "to_v":
            weights[f"{parent}.attn2.to_q.weight"] = w.new_zeros(dim, dim)
            weights[f"{parent}.attn2.to_k.weight"] = torch.zeros_like(w)
            weights[f"{parent}.norm2.weight"] = w.new_ones(dim)
            weights[f"{parent}.norm2.bias"] = w.new_zeros(dim)
        if kind == "v_adapter_action_control":
            weights[f"{parent}.attn2.k_adapter_action_control.weight"] = torch.zeros_like(w)
    if layout == "stability":
        weights = {f"model.diffusion_model.{key}": w for key, w in weights.items()}
    with replacing(Path(path)) as part:
        safetensors.torch.save_file(weights, part)

# ==================================================================================================
# 18. Programs: what train.py and sample.py share
# ==================================================================================================

BAR = dict(mininterval=0.5 if sys.stderr.isatty() else 20, ncols=100)              # of progress

class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, with the nearest flag."""
    def error(self, message):
        known = self._option_string_actions
        words = [word.strip(":") for word in message.split() if word.startswith("--")]
        near = [match for word in words if word not in known
                for match in difflib.get_close_matches(word, known, 1)]
        hint = f"did you mean {near[0]}?" if near else "see --help"
        sys.exit(f"error: {message} ({hint})")

def need(met, sentence):
    """Refuse, by this sentence, what does not meet a condition."""
    if not met:
        raise ValueError(sentence)

def limit(names, expected, low, high, *sources):
    """Refuse numbers of these names that are outside low to high, or NaN."""
    for name in names.split():
        for value in (getattr(source, name, None) for source in sources):
            need(value is None or all(low <= x <= high for x in np.atleast_1d(value)),
                 f"--{name.replace('_', '-')} is {value}, expected {expected}")

MOST = sys.float_info.max
LIMITS = {
    ("1 or more", 1, MOST):
        "steps batch frames stride size planes channels width mults blocks patch rank head_dim "
        "actions sampling_steps overlap marks encode micro save_every sample_every keep_every "
        "enlarge crop",
    ("0 or more", 0, MOST):
        "factor stills labels workers offset hint_noise context lr muon_lr warmup weight_decay "
        "spatial_lr skip_guidance",
    ("more than 0", 1e-300, MOST): "sigma_min sigma_max rho std sigma_data clip_norm",
    ("0 to 1", 0, 1): "independent images drop ema",
    ("0.1 to 1000", 0.1, 1000): "fps data_fps",
    ("-1000 to 1000", -1000, 1000): "mean",
    ("0 to 10^9", 0, 10 ** 9): "seed"}

def check(options, config):
    """Refuse, in one sentence, what could not run or would silently do something else."""
    for expected, names in LIMITS.items():
        limit(names, *expected, config, options)
    odds = config.context
    need(len(config.size) == 2, f"--size is {config.size}, expected one or two numbers")
    need(config.sigma_min < config.sigma_max, "--sigma-min must be less than --sigma-max")
    need(config.give != "previous" or (len(odds) == 2 and config.task == "predict"),
         "--give previous needs two numbers as --context, and --task predict")
    most = 2 if config.give == "previous" else config.frames
    need(odds[0] > 0 and len(odds) <= most, f"--context is {odds}, expected odds of 0, 1, 2 ... "
         "given frames, no more numbers than --frames, and the first not 0")
    need(config.task == "predict" or (config.frames >= 3 and sum(odds) > odds[0]),
         f"--task {config.task} needs 3 --frames or more, and --context with odds of given ones")
    need(config.give == "hint" or config.task not in ("image", "upsample"),
         f"--task {config.task} needs --give hint")
    need(config.task != "upsample" or not np.mod(config.size + config.crop, config.enlarge).any(),
         f"--task upsample needs --size and --crop in multiples of --enlarge, {config.enlarge}")
    multiple = config.patch * 2 ** (len(config.mults) - 1)
    fits = [n <= whole and n % multiple == 0 for n, whole in zip(config.crop, config.size)]
    need(len(config.crop) in (0, 2) and all(fits), f"--crop is {config.crop}, expected multiples of"
         f" {multiple}, up to --size")
    need(not config.stills or not (config.independent or config.give == "previous"),
         "--stills goes with neither --independent nor --give previous")
    check_planes(options, config)
    need(config.skip_guidance == 1 or config.images, "--skip-guidance asks for frames on their own,"
         " which --images above 0 teaches: without, it must be 1")
    check_config(config)

def check_planes(options, config):
    """Refuse what planes cannot do: they have no frames to be told anything of their own."""
    if not config.planes:
        return
    alone = ("labels", "actions", "adapters", "stills", "images", "independent")
    need(config.give in ("concat", "previous") and config.patch == 1
         and not any(getattr(config, name) for name in alone), "--planes goes with --give previous "
         f"or concat and with --patch 1, but neither with {', '.join(alone[:-1])} nor {alone[-1]}")
    need(not {"frames", "size"} & getattr(options, "given", {}).keys(),
         "--planes has three numbers for frames, height and width: leave out --frames and --size")

def pixels(config):
    """Return size and channels of a run's frames, of which the network may know only latents."""
    if config.factor:
        return tuple(n * config.factor for n in config.planes[1:] or config.size), 3
    return tuple(config.size), config.channels

def sampling(config):
    """Return the noise levels that a config's sampler visits, and the sampler."""
    sigmas = karras_sigmas(config.sampling_steps, config.sigma_min, config.sigma_max, config.rho)
    return sigmas, SAMPLERS[config.sampler]

def clip_frames(config):
    """Return the frames of video that a clip of the network stands for."""
    return config.planes[0] if config.planes else config.frames

def skip_guided_by(config, denoise):
    """Return denoise with a config's skip guidance, if it has any; with planes, clamped."""
    if config.planes:
        return clamped(denoise)
    if config.skip_guidance == 1:
        return denoise
    return skip_guided(denoise, config.skip_guidance)

def pick_device(name):
    """Return the device of this name; auto is a GPU where there is one."""
    if name == "auto":
        name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f"--device {name} is not to be had here: try --device auto") from e

def pick_dtype(name, device):
    """Return bf16 where hardware multiplies it faster than fp32. Weights are fp32 either way."""
    if name != "auto":
        return dict(fp32=torch.float32, bf16=torch.bfloat16)[name]
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast else torch.float32

def autocast(device, dtype):
    """Return a context in which networks compute in a dtype."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

STOPS = {getattr(signal, name, signal.SIGTERM) for name in ("SIGINT", "SIGTERM", "SIGHUP")}

@contextmanager
def stop_signals(said):
    """Yield a list to which Ctrl-C, SIGTERM and SIGHUP (a closed terminal) are added, and say so.

    They end nothing, however often they come: whoever asks for the list stops where nothing is
    lost. A signal that is ignored, as under nohup, stays ignored."""
    stops = []

    def note(number, frame):
        stops.append(number)
        with suppress(OSError):                                      # of a terminal that is gone
            os.write(2, f"\n{said} (Ctrl-\\ ends at once)\n".encode())    # print may be at work

    before = {number: signal.signal(number, note) for number in STOPS
              if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def stoppable(denoise, stops):
    """Return denoise, which raises KeyboardInterrupt as soon as stops holds a signal."""
    def ask(x, sigma, **conditions):
        if stops:
            raise KeyboardInterrupt
        return denoise(x, sigma, **conditions)
    return ask

def run_program(main, memory):
    """Run a program, and end it with one sentence if it fails by what its user can change.

    memory says what to do if there is too little."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as e:
        sentence = str(e)
        if isinstance(e, MemoryError) or re.search("out of memory|allocate memory", sentence):
            sentence = f"the memory is full: {memory}"
        elif isinstance(e, RuntimeError):
            raise
        elif isinstance(e, ImportError):
            sentence += ": pip install -r requirements.txt"
        elif getattr(e, "errno", 0) == errno.ENOSPC:
            sentence = "the disk is full"
        sys.exit(f"error: {sentence}")

if __name__ == "__main__":
    Parser(usage="python vdm.py", description=demo.__doc__).parse_args()
    demo()
