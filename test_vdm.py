"""
test_vdm.py: every part of vdm.py, train.py and sample.py against a truth that is not this
project's: a closed form, a brute-force loop, numpy, the schedulers of `diffusers` (skipped where
that is not installed), a number printed in a paper, or files whose pixels are known.

    pytest -q test_vdm.py
"""

from dataclasses import asdict
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import ast
import base64
import builtins
import copy
import csv
import dataclasses
import dis
import http.client
import inspect
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import weakref

from PIL import Image, ImageFilter
from torch.testing import assert_close as agree
from torch.utils.data import default_collate
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sample
import train
import vdm

sys.path.append(str(Path(__file__).parent / 'notebooks'))
import ablation
import adapters
import benchmark
import claims
import paste
import play
import self_forcing

torch.set_num_threads(1)
cases = pytest.mark.parametrize
close = partial(agree, rtol=1e-4, atol=1e-4)

# ==================================================================================================
# Part I and II: noise, denoiser, losses, samplers, generation
# ==================================================================================================

M = 0.7                                 # the data of the sampler tests: Normal(M, S^2)
S = 0.5
KINDS = "eps", "v", "flow", "x0", "edm"
GIVES = "concat", "replace", "per_frame"

@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def gaussian(x, sigma):
    """E[clean | x] where clean is Normal(M, S^2): both are Gaussian, so the mean is linear in x."""
    return M + (S ** 2 / (S ** 2 + sigma ** 2))[:, None] * (x - M)

def two_points(x, sigma, points=((0.8, -0.5), (-0.6, 0.4)), odds=(0.75, 0.25)):
    """E[clean | x] where clean is one of two points, with these odds. x is (N, 2)."""
    points = torch.tensor(points)
    log_p = torch.tensor(odds).log() - torch.cdist(x, points) ** 2 / (2 * sigma[:, None] ** 2)
    return log_p.softmax(1) @ points

def karras(n, low, high):
    """EDM eq. 5, in the default precision."""
    low = low ** (1 / 7)
    high = high ** (1 / 7)
    return torch.tensor([(high + i / (n - 1) * (low - high)) ** 7 for i in range(n)] + [0.0])

def randomize(model, gates=True):
    """Random weights, in the gates if asked to: where layers are 0 any test would pass."""
    for name, p in model.named_parameters():
        if gates or not name.endswith("gate"):
            nn.init.normal_(p, std=0.7 if p.ndim < 2 else p[0].numel() ** -0.5)
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):                            # its row 0 is for no label
            nn.init.zeros_(layer.weight[0].detach())
    return model.eval().requires_grad_(False)

def tiny(give="concat", gates=True, **conditions):
    """A denoiser of grey clips with random weights, which reacts to all that it is given."""
    channels = dict(concat=2, hint=2, previous=1).get(give, 0)
    if give == "replace":
        conditions["given"] = vdm.LabelEmbedding(1, 32)
    net = vdm.VideoUNet(1, channels, 8, (1, 2), 1, ("none", "factorised"), 8, 1, 32, conditions)
    return vdm.GIVES[give](randomize(net, gates), "edm")

class Told(nn.Module):
    """A network that says what it is told to, and remembers what it was shown."""

    def __init__(self, *shape):
        super().__init__()
        self.out = nn.Parameter(torch.randn(shape))

    def forward(self, x, c_noise, **conditions):
        self.seen = x
        self.c_noise = c_noise
        self.told = conditions
        return self.out

def five(values):
    """(B,) or (B, T) with the axes it needs to multiply (B, T, C, H, W)."""
    return values[(...,) + (None,) * (5 - values.ndim)]

# ---- samplers ------------------------------------------------------------------------------------

@cases("name, ratio", [("ddim", 2), ("heun", 4), ("dpmpp_2m", 4)])
def test_sampler_order(name, ratio, double):
    """dx / dsigma = (x - M) sigma / (S^2 + sigma^2) is solved by x - M ~ sqrt(S^2 + sigma^2)."""
    x = torch.tensor([[80.0], [-30.0]])
    end = M + (x - M) * S / math.sqrt(S ** 2 + 80 ** 2)
    coarse, fine = ((vdm.SAMPLERS[name](gaussian, x, karras(n, 1e-4, 80)) - end).abs().max()
                    for n in (201, 401))
    assert abs(coarse / fine / ratio - 1) < 0.1
    assert fine < 0.01

@cases("name", vdm.SAMPLERS)
def test_sampler_lands_on_a_finite_data_set(name, double):
    """From the exact posterior mean over two points, 3 : 1, these two come out, 3 : 1."""
    x = vdm.SAMPLERS[name](two_points, 80 * torch.randn(4000, 2), karras(100, 0.005, 80))
    distance, nearest = torch.cdist(x, torch.tensor([[0.8, -0.5], [-0.6, 0.4]])).min(1)
    assert (distance < 0.02).double().mean() > 0.998
    assert abs((nearest == 0).double().mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)

@cases("gamma", [0, 0.3, 1.0])
def test_ddpm_is_the_posterior_of_ho_et_al(gamma, double):
    """Ho et al. 2020, eqs. 6 and 7 in betas; VDM's variance low^(1 - gamma) high^gamma."""
    beta = torch.linspace(0.01, 0.3, 20)
    abar = torch.cat([torch.ones(1), (1 - beta).cumprod(0)])
    sigmas = ((1 - abar) / abar).sqrt().flip(0)
    noise = torch.randn(20, 4, 3)
    start = torch.randn(4, 3)
    z = start
    for t in range(20, 0, -1):
        x0 = gaussian(z / abar[t].sqrt(), sigmas[20 - t, None])
        high = beta[t - 1]
        left = (1 - abar[t - 1]) / (1 - abar[t])
        low = left * high
        z = abar[t - 1].sqrt() * high / (1 - abar[t]) * x0 + (1 - high).sqrt() * left * z
        if t > 1:
            z = z + (low ** (1 - gamma) * high ** gamma).sqrt() * noise[t - 1]
    draws = iter(noise.flip(0))
    x = start / abar[20].sqrt()
    agree(vdm.sample_ddpm(gaussian, x, sigmas, lambda x: next(draws), gamma=gamma), z)

@pytest.mark.filterwarnings("ignore")
@cases("name, ours, options", [
    ("EulerDiscrete", vdm.sample_ddim, {}),
    ("HeunDiscrete", vdm.sample_heun, {}),
    ("HeunDiscrete", vdm.sample_heun, dict(use_karras_sigmas=True)),
    ("DPMSolverMultistep", vdm.sample_dpmpp_2m, {}),
    ("DPMSolverMultistep", vdm.SAMPLERS["dpmpp_2m_sde"], dict(algorithm_type="sde-dpmsolver++"))])
def test_sampler_against_diffusers(name, ours, options, double):
    """The scheduler of that name in diffusers, on its own grid, around the same denoiser."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of this test")
    variance_preserving = name == "DPMSolverMultistep"                 # its z is x / sqrt(1 + s^2)
    if variance_preserving:
        options = options | dict(final_sigmas_type="zero")
    theirs = getattr(diffusers, name + "Scheduler")(30, beta_start=1e-3, beta_end=0.4, **options)
    theirs.set_timesteps(12)
    theirs.sigmas = theirs.sigmas.double()
    grid = theirs.sigmas
    scale = (1 + grid ** 2).rsqrt() if variance_preserving else torch.ones_like(grid)
    numbered = lambda i: torch.Generator().manual_seed(i)
    x = grid[0] * torch.randn(6, 1)
    z = scale[0] * x
    for i, t in enumerate(theirs.timesteps):
        theirs.scale_model_input(z, t)
        eps = (z / scale[i] - gaussian(z / scale[i], grid[i, None])) / grid[i]
        draw = dict(generator=numbered(i)) if variance_preserving else {}
        z = theirs.step(eps, t, z, **draw)[0]
    count = iter(range(100))
    randn = lambda x: torch.randn(x.shape, generator=numbered(next(count)))
    sigmas = torch.tensor([*dict.fromkeys(grid.tolist())])             # Heun's has each level twice
    agree(ours(gaussian, x, sigmas, randn), z.double(), rtol=1e-5, atol=1e-5)

@cases("eta", [0.25, 0.5, 1.0])
def test_noise_of_a_step_of_dpmpp(eta):
    """Of a clip that is all noise (clean 0) a step keeps (t / s)^(1 + eta), and adds as much as the
    next level t asks for."""
    s = 3.0
    t = 1.3
    sigmas = torch.tensor([s, t])
    step = lambda old, new: vdm.sample_dpmpp_2m(
        lambda x, sigma: 0 * x, torch.full((1,), old), sigmas, lambda x: 0 * x + new, eta=eta)
    assert step(1.0, 0.0).item() == pytest.approx((t / s) ** (1 + eta))
    assert step(0.0, 1.0).item() == pytest.approx(t * (1 - (t / s) ** (2 * eta)) ** 0.5)

@pytest.mark.filterwarnings("ignore")
def test_inversion_against_diffusers(double):
    """DDIMInverseScheduler, its whole walk from the clip to noise, around a denoiser that is not
    linear. Its network is asked for the noise at z = x / sqrt(1 + sigma^2)."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of this test")
    theirs = diffusers.DDIMInverseScheduler(clip_sample=False)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.set_timesteps(20)
    abar = theirs.alphas_cumprod[theirs.timesteps]
    levels = ((1 - abar) / abar).sqrt()
    clip = torch.randn(50, 2)
    z = clip
    for t, level in zip(theirs.timesteps, levels):
        x = z * (1 + level ** 2).sqrt()
        z = theirs.step((x - two_points(x, level[None])) / level, t, z).prev_sample
    sigmas = torch.cat([levels.flip(0), torch.zeros(1)])
    want = z * (1 + levels[-1] ** 2).sqrt()
    agree(vdm.invert_ddim(two_points, clip, sigmas), want, rtol=1e-9, atol=1e-9)

def test_inversion_is_nearly_exact_once_converged(double):
    """And first order in the steps before. The step from the clip itself has one iteration."""
    clip = torch.randn(6, 1)

    def error(n, iterations):
        sigmas = karras(n, 0.01, 80)
        noise = vdm.invert_ddim(gaussian, clip, sigmas, iterations)
        return (vdm.sample_ddim(gaussian, noise, sigmas) - clip).abs().max()

    assert 1.7 < error(100, 1) / error(200, 1) < 2.3
    assert error(200, 10) < 1e-6

# ---- noise ---------------------------------------------------------------------------------------

@cases("schedule, points", [
    (vdm.linear, {0: 0.0100, 1: 157.4}),
    (vdm.scaled_linear, {0: 0.0388, 1: 83.8}),
    (partial(vdm.scaled_linear, start=0.00085, end=0.012), {0: 0.0292, 1: 14.61}),
    (vdm.cosine, {0: math.exp(-10), 0.5: 1, 1: math.exp(10)}),
    (vdm.sigmoid, {0.5: 1}),
    (vdm.uniform, {0.1: 1 / 9, 0.5: 1, 0.9: 9}),
    (partial(vdm.lognormal, mean=1.0, std=1.6), {0.025: 0.118, 0.5: 2.72, 0.975: 62.6})])
def test_points_of_schedules(schedule, points):
    """DDPM's, PVDM's and Stable Diffusion's ends; for VDM logSNR is 20 at first and -20 at last;
    t = sigma / (1 + sigma) is u in rectified flow; the 95 % interval printed for SVD's."""
    u = torch.tensor([*points])
    assert schedule(u).tolist() == pytest.approx([*points.values()], rel=4e-3)

def test_sigmoid_as_betas():
    """As 1000 betas cut at 0.999 (diffusion forcing): first logSNR 8.11, last sigma 1825."""
    abar = 1 / (1 + vdm.sigmoid(torch.arange(1001) / 1000).double() ** 2)
    abar = (1 - (1 - abar[1:] / abar[:-1]).clamp(max=0.999)).cumprod(0)
    assert math.log(abar[0] / (1 - abar[0])) == pytest.approx(8.11, abs=0.01)
    assert math.sqrt(1 / abar[-1] - 1) == pytest.approx(1825, rel=1e-3)

@cases("name, start, end", [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012)])
def test_betas_against_diffusers(name, start, end):
    """alphas_cumprod of diffusers."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of this test")
    abar = diffusers.DDPMScheduler(1000, start, end, name).alphas_cumprod.double()
    got = vdm.SCHEDULES[name](torch.arange(1000, dtype=torch.float64) / 999, start, end).double()
    agree(got, ((1 - abar) / abar).sqrt(), rtol=1e-3, atol=0)

@cases("size, d", [((256, 256), 256), ((64, 256), 128), ((32, 32), 32)])
def test_resolution_shift(size, d):
    """logSNR + 2 log(64 / d) (Hoogeboom et al. 2023), d = sqrt(H W) if the frame is not square."""
    log_snr = -2 * vdm.resolution_shift(torch.ones(1), size, 64).log()
    assert log_snr.item() == pytest.approx(2 * math.log(64 / d), abs=1e-5)

def test_karras_sigmas():
    """SVD's 25 levels as printed; a single level; EDM eq. 5 in double precision."""
    got = vdm.karras_sigmas(25, 0.002, 700, 7).tolist()
    assert len(got) == 26
    assert got[:5] == pytest.approx([700, 545.7, 421.6, 322.5, 244.0], abs=0.06)
    assert got[-4:] == pytest.approx([0.0248, 0.00788, 0.002, 0], rel=2e-3)
    assert vdm.karras_sigmas(1, 0.002, 700).tolist() == pytest.approx([700, 0])
    agree(vdm.karras_sigmas(9), karras(9, 0.2, 60), rtol=1e-5, atol=0)

def test_stratified(monkeypatch):
    """Exactly one number in each of n equal bins, shifted from one draw to the next; never 0, at
    which the level of log-normal noise is 0."""
    draws = torch.stack([vdm.stratified(16).double() for _ in range(20)])
    assert ((draws * 16).long().sort(1)[0] == torch.arange(16)).all()
    assert draws[:, 0].std() > 0.2                                     # 0.29 if uniform
    monkeypatch.setattr(torch, "rand", torch.zeros)
    assert (vdm.stratified(4) > 0).all()

@cases("per_frame", [False, True])
def test_offset_noise_covariance(per_frame):
    """1 + l^2 of a pixel, l^2 within a frame, l^2 or 0 between frames, 0 between channels."""
    noise = torch.randn(40_000, 2, 2, 1, 2)
    got = vdm.offset_noise(noise, 0.8, per_frame)
    same = lambda i: torch.eye(2).view([2 if axis % 3 == i else 1 for axis in range(6)])
    shared = same(1) * (same(0) if per_frame else 1)                   # between two (t, c, w)
    want = same(0) * same(1) * same(2) + 0.8 ** 2 * shared
    agree(got.flatten(1).T.cov(), want.expand([2] * 6).reshape(8, 8), atol=0.05, rtol=0)

def predictions(clean, noise, sigma, sd):
    """What each kind predicts, by its definition: v = alpha noise - sigma_vp clean, and edm is -v
    of the data divided by its standard deviation sd, whose noise level then is sigma / sd."""
    v = lambda clean, sigma: (noise - sigma * clean) / (1 + sigma ** 2).sqrt()
    return dict(eps=noise, v=v(clean, sigma), flow=noise - clean, x0=clean,
                edm=-v(clean / sd, sigma / sd))

@cases("kind", KINDS)
def test_scalings_turn_the_exact_output_into_the_clip(kind, double):
    """The exact network output, from the definitions; an input of unit variance (EDM table 1), or,
    in flow matching, (1 - t) clean + t noise, t = sigma / (1 + sigma)."""
    levels = [0.01, 0.3, 1, 20, 157]
    sigma = torch.tensor(levels)[:, None]
    clean, noise = torch.randn(2, 5, 20_000)
    if kind == "edm":
        clean = 0.4 * clean
    skip, out, c_in, c_noise = vdm.scalings(sigma, kind, 0.4)
    x = clean + sigma * noise
    agree(skip * x + out * predictions(clean, noise, sigma, 0.4)[kind], clean)
    t = torch.tensor(levels) / (1 + torch.tensor(levels))
    size = torch.hypot(1 - t, t) if kind == "flow" else torch.ones(5)
    agree((c_in * x).std(1), size, rtol=0.03, atol=0)
    agree(c_noise[:, 0].numpy(), np.log(levels) / 4)

def test_flow_matching_is_euler_along_the_velocity(double):
    """sample_ddim of a flow network takes the steps of diffusers' FlowMatchEulerDiscreteScheduler.

    Theirs is z = (1 - t) clean + t noise, and dz / dt is what the network predicts."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of this test")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.98, 0.8, 0.55, 0.3, 0.1])
    t = scheduler.sigmas.double()                                                # the last is 0
    net = lambda z, c_noise: torch.tanh(3 * z) + z ** 2 - five(torch.exp(4 * c_noise))
    x = torch.randn(2, 3, 1, 4, 4) / (1 - t[0])
    z = x * (1 - t[0])
    for time, level in zip(scheduler.timesteps, t):
        sigma = level / (1 - level)
        z = scheduler.step(net(z, torch.full((2, 3), sigma.log() / 4)), time, z).prev_sample
    agree(vdm.sample_ddim(vdm.Denoiser(net, "flow"), x, t / (1 - t)), z, rtol=1e-5, atol=1e-5)

# ---- losses --------------------------------------------------------------------------------------

@cases("kind", KINDS)
def test_loss_weight_is_a_unit_weight_on_that_prediction(kind, double):
    """The squared error of the prediction itself, by its definition, for a wrong estimate."""
    sigma = torch.tensor([0.05, 0.3, 1, 20])[:, None]
    clean, noise, wrong = torch.randn(3, 4, 6)
    implied = (clean + sigma * noise - wrong) / sigma                 # the noise, if wrong is right
    right = predictions(clean, noise, sigma, 0.4)[kind]
    guess = predictions(wrong, implied, sigma, 0.4)[kind]
    agree(vdm.loss_weight(sigma, kind, 0.4) * (wrong - clean) ** 2, (guess - right) ** 2)
    if kind != "edm":                                                  # and cut (Hang et al. 2023)
        snr = 1 / sigma ** 2
        weight = snr.clamp(max=4) / dict(x0=1, eps=snr, v=snr + 1, flow=(1 + 1 / sigma) ** 2)[kind]
        got = vdm.loss_weight(sigma, "min_snr", gamma=4.0) * (wrong - clean) ** 2
        agree(got, weight * (guess - right) ** 2)

@cases("name, want", dict(eps=1e8, v=1e8, flow=1e8, edm=1e8, min_snr=5.0, x0=1.0,
                          inverse=1e4).items())
def test_weights_of_frames_without_noise_are_finite(name, want):
    """1 / 0 is cut at sigma 1e-4."""
    assert vdm.loss_weight(torch.zeros(1), name).item() == pytest.approx(want, rel=1e-3)

@cases("per_frame", [False, True])
@cases("frames, change", [(4, 0.0), (4, 0.7), (1, 0.7)])
def test_loss(frames, change, per_frame, double):
    """By numpy, and the gradient by a central difference, which is exact for squares. One frame has
    no change, and a loss that is finite."""
    net = Told(2, frames, 1, 2, 2)
    clean, noise, way = torch.randn(3, 2, frames, 1, 2, 2)
    sigma = torch.rand(2, frames if per_frame else 1) + 0.2
    weight = five(sigma).numpy() ** -3.0

    def by_hand(wrong):
        moved = np.diff(wrong, axis=1)
        return (weight * wrong ** 2).mean() + change * (moved ** 2).sum() / max(moved.size, 1)

    loss, error = vdm.diffusion_loss(vdm.Denoiser(net, "x0"), clean,
                                     sigma if per_frame else sigma[:, 0], noise,
                                     lambda sigma: sigma ** -3, change)
    loss.backward()
    wrong = (net.out - clean).detach().numpy()
    assert loss.item() == pytest.approx(by_hand(wrong), rel=1e-12)
    slope = (by_hand(wrong + way.numpy()) - by_hand(wrong - way.numpy())) / 2
    assert (net.out.grad * way).sum().item() == pytest.approx(slope, rel=1e-8)
    plain = (wrong ** 2).mean((2, 3, 4))
    np.testing.assert_allclose(error.numpy(), plain if per_frame else plain.mean(1), rtol=1e-12)

def test_pictures_beside_clips_are_what_vdm_appends(monkeypatch):
    """VDM's joint training, as its paper has it: all T + N frames in one sequence, temporal
    attention masked so that clips see clips and a picture itself alone (here by a softmax with
    -inf), the plain mean of the error over all. Temporal convolutions, of which VDM has none, are
    shut."""
    T = 3
    N = 2
    sigma = torch.tensor([0.5, 3.0])
    net = vdm.VideoUNet(1, 0, 16, (1, 2), 1, ("factorised", "factorised"), 8, 1, 32)
    denoiser = vdm.Denoiser(randomize(net), "v")
    for layer in net.modules():
        if isinstance(layer, vdm.TemporalConv):
            nn.init.zeros_(layer.gate)
        if isinstance(layer, vdm.TemporalAttention):
            nn.init.constant_(layer.gate, 30.0)
    frames, noise = torch.randn(2, 2, T + N, 1, 8, 8)
    weight = dict(weight=lambda sigma: 1 + 1 / sigma ** 2, change=0.0)
    loss, _ = vdm.joint_image_loss(denoiser, frames[:, :T], frames[:, T:], sigma, noise, **weight)
    open_to_all = vdm.diffusion_loss(denoiser, frames, sigma, noise, **weight)[0]
    apart = torch.block_diag(torch.ones(T, T), *[torch.ones(1, 1)] * N) == 0

    def masked(q, k, v):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if q.shape[-2] == T + N:
            scores = scores.masked_fill(apart, -math.inf)
        return scores.softmax(-1) @ v

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", masked)
    want = vdm.diffusion_loss(denoiser, frames, sigma, noise, **weight)[0]
    agree(loss, want, rtol=1e-5, atol=1e-6)
    assert abs(loss - open_to_all) > 1e-4

def test_dynamics_weight():
    """By numpy; a clip that is right everywhere weighs 1, as does a single frame."""
    estimate, clean = torch.randn(2, 2, 4, 3, 5, 2)
    wrong = np.diff((estimate - clean).numpy(), axis=1) ** 2
    length = np.sqrt((wrong ** 2).sum((1, 3, 4), keepdims=True))
    want = 1 + np.concatenate([0 * wrong[:, :1], wrong / length], 1)
    np.testing.assert_allclose(vdm.dynamics_weight(estimate, clean), want, rtol=1e-5)
    assert (vdm.dynamics_weight(clean.round() + 1, clean.round()) == 1).all()
    assert (vdm.dynamics_weight(estimate[:, :1], clean[:, :1]) == 1).all()

def kept(H, W):
    """Vista's mask in exact fractions, frequency 0 in the middle: 1 is kept, 0 removed."""
    mask = np.ones((H, W))
    for h, w in np.ndindex(H, W):
        f = Fraction(2 * (h - H // 2), H)
        g = Fraction(2 * (w - W // 2), W)
        mask[h, w] = f ** 2 + g ** 2 > Fraction(1, 2)
    return mask

@cases("H, W", [(8, 8), (20, 20), (52, 52), (7, 9), (9, 4)])
def test_high_pass(H, W):
    """numpy's FFT in double precision; bfloat16 is filtered in float32."""
    x = torch.randn(2, 3, 2, H, W)
    spectrum = np.fft.fftshift(np.fft.fft2(x.double().numpy()), (-2, -1)) * kept(H, W)
    want = np.fft.ifft2(np.fft.ifftshift(spectrum, (-2, -1)))
    agree(vdm.high_pass(x), torch.tensor(want.real, dtype=torch.float32), rtol=0, atol=1e-5)
    assert torch.equal(vdm.high_pass(x.bfloat16()), vdm.high_pass(x.bfloat16().float()))
    if H == 52:
        assert (kept(H, W) == 0).mean() == pytest.approx(0.39, abs=0.01)       # as printed

def test_vistas_losses():
    """Where the estimate is what the network says. Structure is a spectral weighting of the error,
    by Parseval; the weight of dynamics has no gradient."""
    net = Told(2, 3, 2, 8, 6)
    clean, noise = torch.randn(2, 2, 3, 2, 8, 6)
    loss = partial(vdm.vista_loss, vdm.Denoiser(net, "x0"), clean, noise=noise)
    error = (net.out - clean).detach()
    power = np.abs(np.fft.fftshift(np.fft.fft2(error.double().numpy()), (-2, -1))) ** 2 / 48
    structure = (power * (1 + 0.3 * kept(8, 6))).mean()
    worst = vdm.dynamics_weight(net.out, clean) - 1
    total, plain = loss(torch.ones(2), dynamics=0.0, structure=0.3)
    assert total.item() == pytest.approx(structure, rel=1e-5)
    agree(plain, (error ** 2).mean((1, 2, 3, 4)))
    total, _ = loss(torch.ones(2), dynamics=0.7, structure=0.0)
    total.backward()
    agree(total.detach(), ((1 + 0.7 * worst) * error ** 2).mean())
    agree(net.out.grad, 2 * (1 + 0.7 * worst) * error / error.numel())
    weight = partial(vdm.loss_weight, weighting="v")                   # 1 + 1 / sigma^2
    both, plain = loss(2 * torch.ones(2, 3), weight=weight, structure=0.3)
    want = structure + (worst * error ** 2).mean().item()
    assert both.item() == pytest.approx(1.25 * want, rel=1e-5)
    agree(plain, (error ** 2).mean((2, 3, 4)))

def binomial(n, p):
    """How far a count of n draws of odds p may be from n p: five standard deviations."""
    return 5 * math.sqrt(n * p * (1 - p))

def test_tasks_of_the_mask():
    """Predict: the first ones. Ends: exactly these two. Any: 1 to T - 1 frames, equally often, and
    each frame as often as another. In each, no frame as often as is said."""
    masks = {task: vdm.draw_mask(5000, 5, (0.25, 0.5, 0.25), task)
             for task in ("predict", "ends", "any", "all")}
    for mask in masks.values():
        assert abs((mask.sum(1) == 0).sum() - 1250) < binomial(5000, 0.25)
    kinds = {task: {tuple(m) for m in mask.int().tolist()} for task, mask in masks.items()}
    assert kinds["predict"] == {(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (1, 1, 0, 0, 0)}
    assert kinds["ends"] == {(0, 0, 0, 0, 0), (1, 0, 0, 0, 1)}
    assert kinds["all"] == {(0, 0, 0, 0, 0), (1, 1, 1, 1, 1)}
    assert abs((masks["predict"].sum(1) == 1).sum() - 2500) < binomial(5000, 0.5)
    counts = torch.bincount(masks["any"].sum(1).long(), minlength=6)
    assert counts[5] == 0
    assert (counts[1:5] - 937.5).abs().max() < binomial(5000, 0.1875)
    given = masks["any"][masks["any"].sum(1) > 0]
    assert (given.sum(0) - len(given) / 2).abs().max() < binomial(len(given), 0.5)

def test_blurred():
    """Means of tiles of 4 x 4, and between their centres straight lines by np.interp."""
    clip = torch.randn(2, 8, 1, 8, 12)
    want = clip.numpy().reshape(2, 8, 1, 2, 4, 3, 4).mean((4, 6))
    for axis, n in ((-2, 2), (-1, 3)):                                 # centres of pixels
        line = partial(np.interp, (np.arange(4 * n) + 0.5) / 4 - 0.5, np.arange(n))
        want = np.apply_along_axis(line, axis, want)
    agree(vdm.blurred(clip), torch.tensor(want).float())

@cases("chance", [0, 0.2, 1])
def test_independent_levels(chance):
    """No clip, all or the binomial's share has unequal levels, which then are uniform."""
    u = vdm.stratified(4000)
    got = vdm.independent_levels(u, 3, chance)
    own = (got != u[:, None]).all(1)
    assert torch.equal(got[~own], u[~own, None].expand(-1, 3))
    assert abs(own.sum() - 4000 * chance) <= binomial(4000, chance) + 1
    if chance == 1:
        agree(got.T.cov(), torch.eye(3) / 12, atol=0.008, rtol=0)
        assert abs(got.mean() - 0.5) < 0.015

# ---- denoiser and guidance -----------------------------------------------------------------------

@cases("give", GIVES)
def test_given_frames_are_untouched_and_have_no_gradient(give):
    """Bit for bit the context; there the error is 0, and so is its gradient. Context that is not
    given may be NaN."""
    net = Told(2, 4, 3, 2, 2)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]])
    given = five(mask).float()
    clean, noise = torch.randn(2, 2, 4, 3, 2, 2)
    sigma = torch.tensor([0.3, 9.0])
    denoiser = vdm.GIVES[give](net, "edm", 0.5)
    vdm.diffusion_loss(denoiser, clean, sigma, noise, context=clean, mask=mask)[0].backward()
    assert (net.out.grad[mask == 1] == 0).all()
    assert (net.out.grad[mask == 0] != 0).all()
    c_in = five((0.5 ** 2 + sigma ** 2).rsqrt())
    level = sigma[:, None] * (1 - mask)
    if give == "concat":                                               # beside x: mask z, mask
        want = c_in * noise
        told = dict(concat=torch.cat([given * clean, given.expand(2, 4, 1, 2, 2)], 2))
    elif give == "replace":                                            # at the level of the others
        want = c_in * torch.where(given > 0, clean, noise)
        told = dict(given=mask - 1)
        level = sigma[:, None].expand(2, 4)
    else:                                                              # at level 0: c_in is 1 / 0.5
        want = torch.where(given > 0, clean / 0.5, c_in * noise)
        told = {}
    for context in (clean, torch.where(given > 0, clean, math.nan)):
        got = denoiser(noise, sigma, context, mask)
        assert torch.equal(got[mask == 1], clean[mask == 1])
        assert (got != clean)[mask == 0].all()
        agree((net.seen, net.told), (want, told))
        agree(net.c_noise, level.clamp(min=1e-4).log() / 4)

@cases("give", GIVES)
def test_per_frame_sigma(give):
    """Equal levels in all frames are one level per clip; frame t goes by its own level."""
    x = torch.randn(2, 3, 1, 4, 4)
    sigma = torch.tensor([0.5, 4.0])
    denoiser = tiny(give)
    agree(denoiser(x, sigma[:, None].expand(2, 3)), denoiser(x, sigma))
    assert torch.equal(denoiser(x, sigma, x, torch.zeros(2, 3)), denoiser(x, sigma))
    net = Told(1, 3, 1, 4, 4)
    levels = torch.tensor([[0.0, 0.5, 4.0]])
    agree(vdm.Denoiser(net, "eps")(x[:1], levels), x[:1] - five(levels) * net.out)

CONDITIONS = dict(                      # a module, and values, the first of which tells nothing
    label=(partial(vdm.LabelEmbedding, 3), [-1, 0, 1, 2]),
    number=(vdm.NumberEmbedding, [-1.0, 0.0, 0.05, 0.5, 1.0]),
    action=(partial(vdm.ActionEmbedding, 2), [[action] * 4 for action in (
        [math.nan, math.nan], [0.0, math.nan], [math.nan, 0.0], [0.5, 0.0], [0.5, math.nan])]))

@cases("name", CONDITIONS)
def test_what_is_told_changes_the_answer(name):
    """At first nothing does. Then each class, number and mode of an action does otherwise, and -1
    and NaN do as nothing does."""
    make, values = CONDITIONS[name]
    x = torch.randn(1, 4, 1, 4, 4)
    module = make(dim_emb=32)
    assert all((module(torch.tensor([value])) == 0).all() for value in values)
    denoiser = tiny("concat", **{name: module})
    say = lambda **told: denoiser(x, torch.ones(1), **{k: torch.tensor([told[k]]) for k in told})
    answers = torch.cat([say(**{name: value}) for value in values])
    assert (torch.pdist(answers.flatten(1)) > 1e-2).all()
    assert torch.equal(answers[:1], say())
    with pytest.raises(ValueError, match="mood"):                      # the network lacks this one
        say(mood=values[0])

def test_guidance():
    """Video LDM eq. 4 by hand, for a network that says 5 with a condition and 2 without. (Its
    common transcription, f' = f(c) + s (f(c) - f'), would give f' = f(c) = 5 for every scale s.)"""
    denoise = lambda x, sigma, **cond: torch.full_like(x, 5.0 if cond else 2.0)
    x = torch.zeros(2, 3, 1, 2, 2)
    one = torch.ones(2)
    for scale, want in ((1, 5), (0, 2), (2.5, 9.5), (-1, -1)):         # 2 + scale * 3
        assert (vdm.guided(denoise, scale)(x, one, context=x) == want).all()
    per_frame = vdm.guided(denoise, torch.tensor([1, 2, 3]))
    mask = torch.tensor([[0, 0, 1]] * 2)
    assert per_frame(x, one, context=x)[1, :, 0, 0, 1].tolist() == [5, 8, 11]
    assert per_frame(x, one, mask=mask)[1, :, 0, 0, 1].tolist() == [5, 8, 5]     # given: it stays

@cases("scale, names, want", [
    ([2.0, 3.0], ("action",), [5 + 2 * 8, 5 + 3 * 8]), (2, ("frames",), [9 + 2 * 4] * 2),
    (2, ("frames", "action"), [2 + 2 * 11] * 2), (2, (), [13, 13])])
def test_guidance_by_some_conditions(scale, names, want):
    """By hand: nothing says 2, frames 5, an action 9, both 13. Vista guides by actions."""
    def says(x, sigma, frames=0, action=0):
        return torch.full_like(x, 2.0 + 3 * frames + 7 * action + frames * action)

    denoise = vdm.guided_by(says, scale, names)
    got = denoise(torch.zeros(1, 2, 1, 1, 1), torch.ones(1), frames=1, action=1)
    assert got.flatten().tolist() == want

def two_frames(r, sigma):
    """The matrix K of E[clean | x] = M + K (x - M), of frames a, b ~ Normal(M, 1), covariance r."""
    C = np.array([[1, r], [r, 1]])
    return C @ np.linalg.inv(C + sigma ** 2 * np.eye(2))

def exact(x, sigma, r=0.8):
    K = torch.tensor(two_frames(r, sigma[0].item()))
    return M + torch.einsum("st,bt...->bs...", K, x - M)

def test_skip_guidance(double):
    """Two frames of correlation 0.8, or 0 where each is alone. By hand at sigma 1: of what differs
    0.2 / 1.2 is kept together and 1 / 2 alone, of what both share 1.8 / 2.8; scale 1.5 goes half as
    far again."""
    denoise = lambda x, sigma, temporal=1.0: exact(x, sigma, 0.8 * temporal)
    same = torch.ones(1, 2, 1, 1, 1)
    other = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1)
    guess = vdm.skip_guided(denoise, 1.5)
    for part, together in ((same, 1.8 / 2.8), (other, 0.2 / 1.2)):
        agree(guess(M + part, torch.ones(1)) - M, part * (1 / 2 + 1.5 * (together - 1 / 2)))

@cases("sigma", [0.1, 1.0, 7.0])
def test_reconstruction_guidance(sigma, double):
    """By hand: |a - guess_a|^2 has the gradient -2 K_ab (a - guess_a). Here q(a | z) is exactly
    Normal(guess_a, sigma^2 K_aa): weight 1 / K_aa gives E[b | a, x_b], from the textbook."""
    x, context = torch.randn(2, 3, 2, 1, 2, 2)
    K = two_frames(0.8, sigma)
    mask = torch.tensor([[1, 0]] * 3)
    level = torch.full((3,), sigma)
    guess = exact(x, level)
    for weight in (0, 1.0, 2.5):
        with torch.no_grad():
            got = vdm.reconstruction_guided(exact, context, mask, weight)(x, level)
        agree(got[:, 1], guess[:, 1] + weight * K[0, 1] * (context - guess)[:, 0])
        assert torch.equal(got[:, 0], context[:, 0])
    hidden = torch.where(five(mask) == 1, context, math.nan)           # elsewhere it is not read
    got = vdm.reconstruction_guided(exact, hidden, mask, 1 / K[0, 0])(x, level)
    mean = M + 0.8 * (context[:, 0] - M)                               # b | a, then x_b is seen
    rest = 1 - 0.8 ** 2
    agree(got[:, 1], mean + rest / (rest + sigma ** 2) * (x[:, 1] - mean))

def test_triangle():
    """As printed for Vista (25 frames, 1 to 2.5 and back); of 16 frames the peak is 14/15 of the
    way; the formula of Vista's code, 2 |v - floor(v + 1/2)|."""
    hill = vdm.triangle(1.0, 2.5, 25)
    assert hill[[0, 1, 12, 23, 24]].tolist() == pytest.approx([1, 1.125, 2.5, 1.125, 1])
    assert vdm.triangle(0, 1, 16).max().item() == pytest.approx(0.933, abs=5e-4)
    for T in range(2, 30):
        v = np.arange(T) / (T - 1)
        want = 0.5 + 5 * np.abs(v - np.floor(v + 0.5))
        np.testing.assert_allclose(vdm.triangle(0.5, 3, T), want, atol=1e-5)

def test_sigma_data_of_a_config_is_heeded():
    """A fresh network says 0: the estimate is EDM's best linear one, s^2 / (sigma^2 + s^2) x."""
    x = torch.randn(2, 8, 3, 32, 32)
    sigma = torch.tensor([0.5, 3.0])
    denoiser = vdm.build(vdm.Config(kind="edm", sigma_data=0.8))
    agree(denoiser(x, sigma), x * five(0.64 / (sigma ** 2 + 0.64)))

# ---- generation ----------------------------------------------------------------------------------
# Denoisers here are plain functions, without parameters or attributes.

def count(n, *shape):
    """A video (2, n, ...) whose frame t shows the number t = 1, 2 ..."""
    return torch.arange(1.0, n + 1)[:, None, None, None].expand(2, n, *(shape or (1, 2, 2)))

def counter(seen):
    """A denoiser that counts: frame n + 1 comes after frame n. It notes what it is given."""
    def denoise(x, sigma, context=None, mask=None, previous=None):
        given = 0 if mask is None else int(mask[0].sum())
        last = previous if context is None else context[:, :given]
        seen.append([] if last is None else last[0, :, 0, 0, 0].tolist())
        return count(x.shape[1], *x.shape[2:]) + max(seen[-1], default=0) - given + 0 * x

    return denoise

def rolled(denoise, length, shape, *args, roll=vdm.rollout, **options):
    """A roll-out of at most 100 pieces, joined."""
    pieces = list(itertools.islice(roll(denoise, length, shape, *args, **options), 100))
    assert max(piece.shape[1] for piece in pieces) <= shape[1]
    return torch.cat(pieces, 1)

def line(x, sigma, context, mask):
    """A denoiser that draws straight lines between the frames it is given, by numpy."""
    drawn = torch.zeros_like(x)
    for b in range(len(x)):
        at = np.flatnonzero(mask[b].numpy())
        values = np.interp(np.arange(x.shape[1]), at, context[b, at, 0, 0, 0].numpy())
        drawn[b] = torch.tensor(values, dtype=x.dtype)[:, None, None, None]
    return torch.where(five(mask) > 0, context, drawn)

@cases("K, factor, frames", [(1, 4, 8), (4, 4, 9), (3, 2, 8), (9, 2, 8), (5, 7, 8), (6, 3, 4)])
def test_interpolation_fills_every_gap(K, factor, frames):
    """np.interp over all key frames at once; these come back bit for bit, whatever the windows, of
    which there are no more than it takes."""
    keys = torch.randn(2, K, 1, 1, 1).expand(2, K, 1, 2, 3)
    sigmas = torch.tensor([5.0, 1.0, 0.0])
    seen = []

    def noted(x, sigma, **told):
        seen.append(sigma[0].item())
        return line(x, sigma, **told)

    got = vdm.interpolate(noted, keys, factor, frames, sigmas)
    assert seen == [5, 1] * math.ceil((K - 1) / ((frames - 1) // factor))
    assert torch.equal(got[:, ::factor], keys)
    at = np.arange(factor * (K - 1) + 1) / factor
    for clip, key in zip(got, keys):
        want = np.interp(at, np.arange(K), key[:, 0, 0, 0].numpy())
        agree(clip[:, 0, 1, 2].numpy(), want.astype(np.float32))
    for wrong in (1, frames):
        with pytest.raises(ValueError, match=f"factor is {wrong}, expected 2 to {frames - 1}"):
            vdm.interpolate(line, keys, wrong, frames, sigmas)

def test_noise_of_seeds_and_clips():
    """Unit noise, another for every seed and clip, and at every call; again the same from anew."""
    pairs = (0, 0), (0, 1), (1, 0), (1, 1)
    noise = [vdm.clip_noise(seed, [clip])(10_000) for seed, clip in pairs]
    again = vdm.clip_noise(0, [0])
    assert torch.equal(again(10_000), noise[0])
    agree(torch.cat([*noise, again(10_000)]).cov(), torch.eye(5), rtol=0, atol=0.06)

def test_reward():
    """exp(-variance) where it is known: of pixels that are Normal(M, S^2), each on its own."""
    denoise = lambda x, sigma: M + S ** 2 / (S ** 2 + five(sigma) ** 2) * (x - M)
    got = vdm.reward(denoise, (2, 8, 3, 16, 16), vdm.karras_sigmas(60, 0.002, 80),
                     sampler=vdm.sample_heun)
    assert got.tolist() == pytest.approx([math.exp(-S ** 2)] * 2, rel=0.02)

@cases("name, give", [*((name, "concat") for name in vdm.SAMPLERS),
                      ("ddim", "replace"), ("ddim", "per_frame")])
def test_generate_keeps_the_context_bit_for_bit(name, give):
    """Frames that are given come out as they went in, guided or not."""
    context = torch.randn(2, 3, 1, 4, 4)
    mask = torch.tensor([[1, 0, 0], [0, 0, 1]])
    denoiser = tiny(give)
    given = dict(context=context, mask=mask)
    ways = [(denoiser, given), (vdm.guided(denoiser, [1.5, 2.0, 3.0]), given),
            (vdm.guided_by(denoiser, 2.0, ("label",)), given),
            (vdm.guided(vdm.skip_guided(denoiser, 1.6), 2.0), given),
            (vdm.reconstruction_guided(denoiser, context, mask, 2.0), {})]
    for denoise, told in ways:
        sigmas = vdm.karras_sigmas(2, 0.5, 20)
        x = vdm.generate(denoise, context.shape, sigmas, vdm.SAMPLERS[name], **told)
        assert torch.equal(x[mask == 1], context[mask == 1])
        assert x.isfinite().all()

@cases("overlap", [1, 3, 6])
def test_rollout_shows_hints_but_keeps_the_video(overlap):
    """Every window writes its number; the next is shown what was written, with noise of level 0.5
    on it, and what it makes of these frames is not heeded."""
    noise = torch.randn(2, 8, 1, 4, 4)
    new = 8 - overlap
    shown = []

    def wheel(x, sigma, concat, augmentation):
        shown.append(concat)
        return torch.full_like(x, len(shown))

    tell = lambda context, mask, start: vdm.hint(context, mask, torch.full((2,), 0.5), noise)
    video = rolled(wheel, 8 + 5 * new, (2, 8, 1, 4, 4), vdm.karras_sigmas(1), overlap, tell=tell)
    assert video[0, :, 0, 0, 0].tolist() == [1] * 8 + [k for k in range(2, 7) for _ in range(new)]
    assert (shown[0] == 0).all()
    for k, concat in enumerate(shown[1:]):
        frames, marks = concat.split(1, 2)
        given = video[:, k * new:][:, new:8] + 0.5 * noise[:, :overlap]
        agree(frames, torch.cat([given, torch.zeros(2, new, 1, 4, 4)], 1))
        assert marks[0, :, 0, 0, 0].tolist() == [1] * overlap + [0] * new

@cases("overlap, given", [(1, 0), (4, 0), (7, 0), (2, 1), (4, 7), (6, 3)])
def test_rollout_windows(overlap, given):
    """Where a denoiser counts frames the video must count on without a gap, at any length."""
    sigmas = vdm.karras_sigmas(1)
    start = count(given) if given else None
    for length in {1, 3, 8, 9, 12, 31} - set(range(given)):
        seen = []
        video = rolled(counter(seen), length, (2, 8, 1, 2, 2), sigmas, overlap, start)
        assert torch.equal(video, count(length))
        done = given
        for frames in seen:                                            # what each window was given
            known = given if done == given else overlap
            assert frames == list(range(done - known + 1, done + 1))
            done += 8 - len(frames)
    assert torch.equal(rolled(counter([]), 8, (2, 8, 1, 2, 2), sigmas, 8, start), count(8))

def test_rollout_needs_no_more_memory_for_longer_videos():
    """Of a billion frames only those asked for are made, and those given away are let go."""
    seen = []
    alive = []
    endless = vdm.rollout(counter(seen), 10 ** 9, (2, 8, 1, 2, 2), vdm.karras_sigmas(1), 3)
    for n in range(1, 40):
        alive.append(weakref.ref(next(endless)))
        assert len(seen) == n
        assert sum(piece() is not None for piece in alive) <= 2

def test_rollout_in_whole_clips():
    """PVDM: every window is given all of the window before it."""
    seen = []
    roll = partial(rolled, counter(seen), shape=(2, 4, 1, 2, 2), sigmas=vdm.karras_sigmas(1),
                   roll=vdm.rollout_previous)
    assert torch.equal(roll(14), count(14))
    assert seen == [[], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert torch.equal(roll(9, previous=count(4)), count(9))
    assert seen[4:] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    seen.clear()                                 # N evaluations of the first clip, M of each other
    roll(12, sigmas=vdm.karras_sigmas(5), later_sigmas=vdm.karras_sigmas(2))
    assert [len(given) for given in seen] == 5 * [0] + 2 * [4] + 2 * [4]
    assert not (seen[5] == seen[7])

def test_clamped_estimate():
    x = torch.tensor([-3.0, 0.5, 2.0]).view(1, 3, 1, 1, 1)
    estimate = vdm.clamped(lambda x, sigma, plus: x + plus)(x, 1.0, plus=0.25)
    assert estimate.flatten().tolist() == [-1, 0.75, 1]

# ---- a noise level per frame ---------------------------------------------------------------------

def test_lagged():
    """By hand. With lag u frame t has clip(S + u t - m, 0, S) steps to go after m (diffusion
    forcing's pyramid; S is 3 here)."""
    sigmas = torch.tensor([9.0, 3.0, 1.0, 0.0])
    assert vdm.lagged(sigmas, 2, 0).tolist() == [[9, 9], [3, 3], [1, 1], [0, 0]]
    assert vdm.lagged(sigmas, 3, 1).tolist() == [[9, 9, 9], [3, 9, 9], [1, 3, 9], [0, 1, 3],
                                                 [0, 0, 1], [0, 0, 0]]
    assert vdm.lagged(sigmas, 2, 3).tolist() == [[9, 9], [3, 9], [1, 9], [0, 9], [0, 3], [0, 1],
                                                 [0, 0]]

def kalman(C):
    """A denoiser of clips (B, T, 1, 1, 1) that are Normal(0, C), each frame with noise of its own:
    the mean of clean given x is C (C + diag(sigma^2))^-1 x."""
    def denoise(x, sigma):
        levels = sigma.reshape(len(x), -1).expand(x.shape[:2])
        gain = C @ torch.linalg.inv(C + torch.diag(levels[0] ** 2))
        return torch.einsum("ts,bschw->btchw", gain, x)

    return denoise

def units(n):
    """A source of noise: of n draws each is 1 in a sample (of n) of its own. So the covariance of
    what a linear sampler draws is that of these samples, added up, without any chance."""
    rows = iter(torch.eye(n))
    return lambda k, *_: torch.stack([next(rows) for _ in range(k)], 1).view(n, k, 1, 1, 1)

def covariance(clips):
    flat = clips.flatten(1)
    return flat.T @ flat

@cases("share", [0, 0.25, 1])
@cases("name, low, high", [("ddim", 1.9, 2.1), ("ddpm", 1.5, 2.1), ("dpmpp_2m", 3.5, 7),
                           ("dpmpp_2m_sde", 3.5, 6)])
def test_levels_per_frame_draw_the_right_covariance(name, low, high, share, double):
    """Together, in a pyramid and one by one: of a Gaussian process of four frames, the error falls
    with the step, or with its square."""
    mix = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.3, 0, 0], [0.5, 0.5, 0.4, 0], [-0.2, 0.8, 0.1, 1]])
    C = mix @ mix.T
    errors = []
    for n in (24, 48):
        levels = vdm.lagged(karras(n, 0.005, 40), 4, int(share * n))
        noise = units(4 * len(levels) if name.startswith("ddpm") or "sde" in name else 4)
        clips = vdm.SAMPLERS[name](kalman(C), levels[0, 0] * noise(4), levels, lambda x: noise(4))
        errors.append((covariance(clips) - C).abs().max().item())
    assert low < errors[0] / errors[1] < high
    assert errors[1] < 0.35

@cases("name", sorted(set(vdm.SAMPLERS) - {"heun"}))
def test_frames_that_wait_are_not_touched(name):
    """At the highest level, or at 0."""
    denoiser = tiny("per_frame")
    x = 60 * torch.randn(2, 3, 1, 4, 4)
    levels = torch.tensor([[0.0, 60, 60], [0, 20, 60], [0, 5, 60]])
    got = vdm.SAMPLERS[name](lambda x, sigma: denoiser(x, sigma + 1), x, levels)
    assert torch.equal(got[:, ::2], x[:, ::2])
    assert (got != x)[:, 1].all() and got.isfinite().all()

@cases("name", sorted(set(vdm.SAMPLERS) - {"heun"}))
def test_all_together_is_the_plain_sampler(name):
    """Bit for bit."""
    draw = partial(vdm.generate, tiny("per_frame"), (2, 3, 1, 4, 4), sampler=vdm.SAMPLERS[name])
    sigmas = vdm.karras_sigmas(5)
    assert torch.equal(draw(vdm.lagged(sigmas, 3, 0)), draw(sigmas))

@cases("lag", [16, 22, 48])
def test_stream_of_a_markov_chain(lag, monkeypatch, double):
    """Each frame is 0.8 times the one before, plus noise. If a window sees one frame that is done,
    it needs no other. So ten frames, from windows of four, have the covariance of the chain. (A low
    sigma_max would cost each frame a share of its mean, as it starts from noise alone.)"""
    C = 0.8 ** (torch.arange(10)[:, None] - torch.arange(10)).abs()
    errors = []
    for n in (1, 2):
        monkeypatch.setattr(vdm, "clip_noise", lambda *_: units(20))
        sigmas = karras(48 * n, 0.005, 1000)
        video = rolled(kalman(C[:4, :4]), 10, (20, 4, 1, 1, 1), sigmas, lag * n, roll=vdm.stream)
        errors.append((covariance(video) - C).abs().max().item())
    assert errors[1] < 0.01 and 3.5 < errors[0] / errors[1] < 6

@cases("name", ["ddim", "dpmpp_2m", "dpmpp_2m_sde"])
def test_one_by_one_is_a_rollout_of_single_frames(name, monkeypatch):
    """Bit for bit, from the same noise: lag = steps, and an overlap of all frames but one."""
    def last_alike(*_):
        """Noise whose last frame depends on the number of the call, not on how many it draws."""
        calls = iter(range(1000))
        def noise(n, *chw):
            g = torch.Generator().manual_seed(next(calls))
            return torch.randn(2, n, *chw, generator=g).flip(1) if n == 1 else torch.cat(
                [torch.randn(2, n - 1, *chw), torch.randn(2, 1, *chw, generator=g)], 1)
        return noise

    monkeypatch.setattr(vdm, "clip_noise", last_alike)
    start = torch.randn(2, 3, 1, 4, 4)
    options = dict(context=start, sampler=vdm.SAMPLERS[name])
    draw = partial(rolled, tiny("per_frame"), 7, (2, 4, 1, 4, 4), vdm.karras_sigmas(4))
    want = draw(3, **options)
    assert torch.equal(draw(4, roll=vdm.stream, **options), want)
    assert torch.equal(want[:, :3], start) and (want[:, 3:] != 0).all()

@cases("given", [0, 1, 3])
@cases("lag", [2, 3, 6])
def test_stream_is_a_pyramid_that_moves(lag, given):
    """Frame t has made clip(row - lag (t - given), 0, 6) steps; the window moves on just before a
    frame behind it sets out. It takes `lag` estimates a frame, and no memory for what is let go."""
    sigmas = vdm.karras_sigmas(6)
    seen = []
    alive = []

    def denoise(x, sigma, start):
        seen.append((start, sigma[0].tolist()))
        assert torch.equal(x[:, :max(given - start, 0)], context[:, start:])
        return x[:, :1].detach() * 0 + torch.full_like(x, 0.5)

    context = torch.randn(2, given, 1, 2, 2)
    endless = vdm.stream(denoise, 10 ** 9, (2, 4, 1, 2, 2), sigmas, lag, context,
                         tell=lambda start: dict(start=start))
    if given:
        assert torch.equal(next(endless), context)
    for frame in range(20):
        piece = next(endless)
        assert piece.shape == (2, 1, 1, 2, 2) and (piece == 0.5).all()
        alive.append(weakref.ref(piece))
        assert len(seen) == lag * (frame + math.ceil(6 / lag))
        assert sum(piece() is not None for piece in alive) <= 2
    for row, (start, levels) in enumerate(seen):
        assert start == max(0, given + row // lag - 3)
        made = np.clip(row - lag * (np.arange(start, start + 4) - given), 0, 6)
        made[:max(given - start, 0)] = 6
        assert levels == sigmas[made].tolist()

REFUSED_CALLS = {                       # a word of the sentence: the call
    "context and mask belong together": lambda x: tiny()(x, torch.ones(2), x),
    "2 numbers": lambda x: vdm.guided(tiny(), [1.0, 2.0])(x, torch.ones(2)),
    "overlap is 0": lambda x: [*vdm.rollout(tiny(), 9, x.shape, torch.ones(1), 0)],
    "overlap is 3": lambda x: [*vdm.rollout(tiny(), 9, x.shape, torch.ones(1), 3)],
    "context has 3 frames": lambda x: [*vdm.rollout(tiny(), 9, x.shape, torch.ones(1), 2, x)],
    "lag is 1, expected 2 to 4": lambda x: [*vdm.stream(tiny(), 9, x.shape, torch.ones(5), 1)],
    "lag is 5, expected 2 to 4": lambda x: [*vdm.stream(tiny(), 9, x.shape, torch.ones(5), 5)],
    "a window of 3 has room": lambda x: [*vdm.stream(tiny(), 9, x.shape, torch.ones(5), 2, x)],
    "task is 'image'": lambda x: vdm.draw_mask(1, 5, (1, 1), "image"),
    "kind is 'z'": lambda x: vdm.scalings(torch.ones(1), "z"),
    "weighting is 'z'": lambda x: vdm.loss_weight(torch.ones(1), "z"),
    "concat_channels": lambda x: tiny("per_frame").net(x, x[:, :, 0, 0, 0], concat=x),
    "rank 0, expected": lambda x: vdm.adapt(tiny().net, "lora", 0),
    "channels is 4": lambda x: vdm.decode("a.mp4", channels=4)}

@cases("words", REFUSED_CALLS)
def test_wrong_calls_are_refused(words):
    with pytest.raises(ValueError, match=words):
        REFUSED_CALLS[words](torch.ones(2, 3, 1, 4, 4))

# ==================================================================================================
# Network, adapters, EMA, autoencoder, Drive, the file
# ==================================================================================================

def small_net(channels=1, width=8, attention=("factorised", "joint"), **options):
    """A fresh network of 5 blocks, with layers of all kinds."""
    return vdm.VideoUNet(channels, 2, width, (1, 2), attention=attention, head_dim=8, **options)

def frame_by_frame(net, x, level, **options):
    """What a network makes of each frame as a clip of its own, joined."""
    return torch.cat([net(x[:, t:t + 1], level[:, t:t + 1], **options)
                      for t in range(x.shape[1])], dim=1)

def differ(a, b):
    """Whether two clips differ in each of their frames, rounding aside."""
    return ((a - b).abs().amax((0, 2, 3, 4)) > 1e-3).all()

# ---- network -------------------------------------------------------------------------------------

@cases("axes", [1, 2, 3])
def test_rotary_positions_are_relative(axes):
    """q . k stays if both move by the same, and changes if one moves along any axis."""
    q, k = torch.randn(2, 1, 1, 6, 16)
    at, to = torch.randint(0, 9, (2, 6, axes))
    product = lambda at, to: (vdm.rotate(q, at) * vdm.rotate(k, to)).sum(-1)
    for axis in range(axes):
        move = 7 * F.one_hot(torch.tensor(axis), axes)
        close(product(at + move, to + move), product(at, to))
        assert (product(at + move, to) - product(at, to)).abs().max() > 0.1

def test_temporal_conv():
    """Group norm, SiLU, three taps over t with zeros beyond the ends, the gate: written out."""
    layer = randomize(vdm.TemporalConv(48))
    x = torch.randn(2, 4, 48, 2, 3)
    h = F.group_norm(x.flatten(0, 1), 3, layer.norm.weight, layer.norm.bias).view_as(x)
    h = h / (1 + (-h).exp())                                           # groups are of 16 channels
    h = F.pad(h, (0, 0, 0, 0, 0, 0, 1, 1))
    seen = layer.conv.bias[:, None, None]
    for tap in range(3):
        weight = layer.conv.weight[:, :, tap, 0]
        seen = seen + torch.einsum("oi,btihw->btohw", weight, h[:, tap:tap + 4])
    close(layer(x), x + layer.gate * seen)
    close(layer(x, 0.3), x + 0.3 * layer.gate * seen)                  # Video LDM's alpha

@cases("over", ["hw", "t", "thw"])
def test_attention_token_by_token(over):
    """Every token looks at those that agree on the other axes; rotary angles as complex numbers."""
    layer = randomize(vdm.Attention(16, 8, over))
    x = torch.randn(1, 3, 16, 2, 4)
    axes = ["thw".index(axis) for axis in over]
    n = len(axes)
    tokens = x[0].movedim(1, -1)                                                   # (T, H, W, 16)
    q, k, v = (F.linear(layer.norm(tokens), part.weight).unflatten(-1, (2, 8))
               for part in (layer.q, layer.k, layer.v))                          # (T, H, W, 2, 8)

    def turned(y, at):
        angle = [at[axes[j % n]] * 100 ** (-(j // n) * n / 4) for j in range(4)]
        return torch.complex(y[at][:, :4], y[at][:, 4:]) * (1j * torch.tensor(angle)).exp()

    want = torch.empty_like(x)
    places = list(np.ndindex(3, 2, 4))
    for at in places:
        seen = [to for to in places if all(at[i] == to[i] for i in range(3) if i not in axes)]
        p = [(turned(q, at) * turned(k, to).conj()).real.sum(-1) / math.sqrt(8) for to in seen]
        p = torch.stack(p).softmax(0)                                                  # (seen, 2)
        h = sum(weight[:, None] * v[to] for weight, to in zip(p, seen)).flatten()
        h = tokens[at] + layer.out(h)
        want[0, at[0], :, at[1], at[2]] = h + layer.feed_forward(h)
    close(layer(x), want)
    time = randomize(vdm.TemporalAttention(16, 8, over))
    time.attention.load_state_dict(layer.state_dict())
    close(time(x, 0.3), x + 0.3 * time.gate * (want - x))

def test_waves():
    """The embedding of DDPM's steps, by diffusers."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = torch.tensor([0.0, 1.0, -350.5, 999.0])
    want = embeddings.get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    close(vdm.waves(t, 64), want, atol=1e-3)

@cases("patch, blocks", [(1, 1), (2, 2), (4, 1)])
def test_a_fresh_network_is_an_image_network(patch, blocks):
    """Gates at 0: each frame as if alone. Once they are open one frame changes all others."""
    net = randomize(small_net(2, patch=patch, blocks=blocks), gates=False)
    x = torch.randn(2, 5, 2, 4 * patch, 2 * patch)
    level = torch.randn(2, 5)
    alone = frame_by_frame(net, x, level)
    close(net(x, level), alone)
    assert alone.std() > 0.1
    before = randomize(net)(x, level)
    x[:, 3] += torch.randn(x[:, 3].shape)
    assert differ(net(x, level), before)

def test_temporal_0_is_the_image_network():
    """Whatever the gates: each frame as if alone, and no heed of concat. A number per clip."""
    net = randomize(small_net())
    x = torch.randn(3, 5, 1, 8, 4)
    told = dict(concat=torch.randn(3, 5, 2, 8, 4))
    level = torch.randn(3, 5)
    alone = net(x, level, **told, temporal=0.0)
    together = net(x, level, **told)
    close(alone, frame_by_frame(net, x, level, temporal=0.0))
    assert differ(together, net(x, level))
    assert differ(net(x, level), alone)
    mixed = net(x, level, **told, temporal=torch.tensor([0.0, 0.4, 1.0]))
    close(mixed, torch.stack([alone[0], net(x, level, **told, temporal=0.4)[1], together[2]]))
    assert differ(mixed[1:2], together[1:2])

@cases("attention, reach", [("none", 10), ("joint", 24)])
def test_what_a_frame_sees_of_time(attention, reach):
    """By gradient: a convolution one frame more, 2 in each of 5 blocks; attention all frames."""
    net = randomize(small_net(attention=("none", attention)))
    x = torch.randn(1, 25, 1, 4, 4, requires_grad=True)
    for t in (0, 12):
        gradient, = torch.autograd.grad(net(x, torch.zeros(1, 25))[:, t].sum(), x)
        sees = gradient.flatten(2).any(-1)[0].tolist()
        assert sees == [abs(s - t) <= reach for s in range(25)]

def train_some(net, steps, **options):
    """Steps of gradient descent on random clips: yields, after each, what had a gradient."""
    net.zero_grad()
    x = torch.randn(2, 4, 1, 8, 8)
    x.requires_grad_()           # or PyTorch 2.13 dies where a GroupNorm is the first that learns
    concat = torch.randn(2, 4, 2, 8, 8)
    level = torch.randn(2, 4)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x, level, concat=concat, **options) - x).square().mean().backward()
        optimizer.step()
        yield {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}

def test_what_learns_at_which_step():
    """First the last layer, which is 0; then gates, and what stands before no gate; then all."""
    net = small_net()
    names = {name for name, _ in net.named_parameters()}
    gated = {name for name in names if "time" in name and not name.endswith("gate")}
    assert [*train_some(net, 3)] == [{"output.2.weight", "output.2.bias"}, names - gated, names]

# ---- adapters ------------------------------------------------------------------------------------

@cases("layer, shape", [
    (nn.Linear(6, 5), (4, 6)), (nn.Conv1d(6, 5, 3, padding=1), (2, 6, 7)),
    (nn.Conv2d(6, 5, 3, 2, 1, 2, bias=False), (2, 6, 7, 8)), (nn.Linear(6, 5).double(), (4, 6)),
    (nn.Conv3d(6, 5, (3, 1, 1), padding="same"), (2, 6, 4, 3, 3))])
def test_lora(layer, shape):
    """Nothing at first; then, and merged, the layer whose weight is W + B A as a matrix."""
    x = torch.randn(shape).to(layer.weight)
    plain = copy.deepcopy(layer)
    lora = vdm.LoRA(layer, rank=2)
    assert torch.equal(lora(x), plain(x))
    assert abs(vdm.LoRA(nn.Linear(9000, 9), 16).branch[0].weight.std() * 16 - 1) < 0.01      # Vista
    down, up = lora.branch
    nn.init.normal_(up.weight)
    low_rank = up.weight.reshape(5, 2) @ down.weight.reshape(2, -1)
    plain.weight.data += low_rank.detach().reshape(plain.weight.shape)
    close(lora(x), plain(x))
    close(lora.merge()(x), plain(x))

@cases("layer", [
    nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, padding_mode="circular", padding=1),
    nn.ConvTranspose2d(4, 4, 3), nn.MultiheadAttention(4, 2).out_proj])
def test_lora_refuses_what_it_cannot_wrap(layer):
    with pytest.raises(ValueError, match="LoRA cannot wrap"):
        vdm.LoRA(layer)

def past(t, y, z):
    """The frame that SimDA's code puts at one place of frame t: s frames ago, if there is one."""
    s = [[4, 3, 2, 1], [3, 2, 1, 0], [2, 1, 0, 0], [1, 2, 3, 4]][y % 4][z % 4]
    return t - s if t >= s else t

SEEN = {                                    # frames of which frame t sees the token at place (y, z)
    "simda": lambda t, y, z: (t, past(t, y, z)),
    "sparse_causal": lambda t, y, z: (0, max(t - 1, 0))}

@cases("kind", SEEN)
def test_attention_to_other_frames(kind):
    """What the layer does in the network is a loop over frames, places and heads; the frame is
    neither square nor a multiple of 4. SimDA's adapters by einsum and a loop over three taps."""
    net = small_net(1, 16)
    vdm.adapt(net, kind)
    block = randomize(net).down[0]
    caught = []
    block.time.register_forward_hook(lambda layer, args, out: caught.append((*args, out)))
    net(torch.randn(1, 6, 1, 12, 20), torch.randn(1, 6))                 # in tiles: 6 x 10 places
    x, _, got = caught[0]
    layer = block.time.attention
    linear = lambda part, h: h @ part.weight.flatten(1).T + (0 if part.bias is None else part.bias)
    adapter = lambda part, h: linear(part[2], F.gelu(linear(part[0], h)))
    h = block.time.time(x)[0].permute(0, 2, 3, 1)                                     # (T, H, W, C)
    q = layer.q
    if kind == "simda":
        down, taps, up = block.time.over_time
        low = F.pad(linear(down, h), (0, 0, 0, 0, 0, 0, 1, 1))
        low = sum(taps.weight[:, 0, i, 0, 0] * low[i:i + 6] for i in range(3)) + taps.bias
        h = h + linear(up, low)
    else:
        q = q[0]
    q, k, v = (linear(part, layer.norm(h)).unflatten(-1, (2, 8)) for part in (q, layer.k, layer.v))
    at = torch.tensor([*np.ndindex(6, 10)])
    turned = lambda x: vdm.rotate(x.flatten(1, 2).transpose(1, 2), at)         # (T, heads, L, d)
    q = turned(q)
    k = turned(k)
    v = v.flatten(1, 2).transpose(1, 2)
    seen = torch.zeros(6, 2, 60, 8)
    for t, head in np.ndindex(6, 2):
        tokens = [(f, 10 * y + z) for y, z in at.tolist() for f in SEEN[kind](t, y, z)]
        frames, places = torch.tensor(tokens).T
        p = (q[t, head] @ k[frames, head, places].T / 8 ** 0.5).softmax(-1)
        seen[t, head] = p @ v[frames, head, places]
    change = linear(layer.out, seen.transpose(1, 2).reshape(h.shape))
    if kind == "simda":
        change = change + adapter(block.time.behind, change)
    h = h + change
    want = h + layer.feed_forward(h)
    if kind == "simda":
        want = want + adapter(block.time.beside, h)
    close(got[0], want.permute(0, 3, 1, 2))

@cases("kind", ["lora", *SEEN])
def test_adapt(kind):
    """LoRA changes nothing at first, and merges into a plain network; what looks at other frames
    changes nothing in a still clip. Every new parameter can learn."""
    net = randomize(small_net(1, 16), gates=kind == "lora")
    x = torch.randn(2, 4, 1, 8, 8)
    level = torch.randn(2, 4)
    still = x[:, :1].expand_as(x), level[:, :1].expand_as(level)
    plain = copy.deepcopy(net)
    new = vdm.adapt(net, kind, 2)
    close(net(*still), plain(*still))
    assert torch.equal(net(x, level), plain(x, level)) == (kind == "lora")
    assert torch.equal(net(x, level, temporal=0.0), plain(x, level, temporal=0.0))
    for p in new:
        nn.init.normal_(p.requires_grad_(), std=0.3)
    net(x, level).square().sum().backward()
    assert all(p.grad.any() for p in new)
    after = net(x, level).detach()
    assert differ(after, plain(x, level))
    alone = net(x, level, temporal=0.0)
    close(alone, frame_by_frame(net, x, level, temporal=0.0))
    if kind == "lora":
        for name, layer in list(net.named_modules()):
            if isinstance(layer, vdm.LoRA):
                net.set_submodule(name, layer.merge())
        close(net(x, level), after, rtol=1e-3, atol=1e-3)
        assert net.state_dict().keys() == plain.state_dict().keys()
    if kind == "simda":                      # the image model bit for bit, whatever adapters learnt
        assert torch.equal(alone, plain(x, level, temporal=0.0))
        mixed = net(x, level, temporal=torch.tensor([0.0, 1.0]))
        close(mixed, torch.cat([alone[:1], after[1:]]))

def count_weights(layer, words=""):
    """The number of weights of a module, or of those whose names have these words (a pattern)."""
    return sum(p.numel() for name, p in layer.named_parameters() if re.search(words, name))

def test_where_and_how_many_adapters():
    """Where there is attention over space. The published counts, of the 16 such places of Stable
    Diffusion 1.4; by hand, of the 12 of rds. There SimDA trains about 3 % of the image model."""
    net = vdm.build(vdm.PRESETS["tiny"]).net
    vdm.adapt(net, "simda")
    found = [name for name, layer in net.named_modules() if isinstance(layer, vdm.FrameAttention)]
    assert found == ["down.2.time", "up.2.time"]
    places = [320] * 5 + [640] * 5 + [1280] * 6
    with torch.device("meta"):
        assert sum(2 * count_weights(vdm.bottleneck(C)) for C in places) == 12_421_600
        assert sum(count_weights(vdm.temporal_bottleneck(C)) for C in places) == 12_434_080
        net = vdm.build(vdm.PRESETS["rds"]).net
        image = sum(p.numel() for p, part in vdm.part_of(net).items() if part == "spatial")
        new = sum(p.numel() for p in vdm.adapt(net, "simda"))
        causal = vdm.adapt(vdm.build(vdm.PRESETS["rds"]).net, "sparse_causal")
    assert new == 4 * sum(2 * C ** 2 + 6 * C for C in (320, 640, 1280))
    assert 0.03 < new / (image + new) < 0.035
    assert sum(p.numel() for p in causal) == 4 * 21 * 320 ** 2

@cases("adapters", ["", "lora", *SEEN])
def test_every_parameter_has_its_part(adapters):
    """By the names of the layers: part_of goes by their kinds."""
    model = vdm.build(vdm.Config(adapters=adapters, labels=3, actions=(2,)))
    words = {r"\.branch\.": "lora", r"\.(over_time|behind|beside|q\.0)\.": "adapters",
             r"\.conditions\.": "conditions", r"\.time\.attention\.": "spatial",
             r"\.time|\.concat\.": "temporal", "": "spatial"}
    want = {p: next(words[word] for word in words if re.search(word, name))
            for name, p in model.named_parameters()}
    assert vdm.part_of(model) == want

@cases("parts", [("lora",), ("temporal",), ("conditions", "lora"), ("spatial",)])
def test_trainable(parts):
    """A step leaves all other parts bit for bit, and without gradient."""
    net = small_net(1, 16, conditions=dict(action=vdm.ActionEmbedding(2)))
    vdm.adapt(net, "lora", 2)
    randomize(net)
    vdm.trainable(net, parts)
    before = {p: p.detach().clone() for p in net.parameters()}
    assert len([*train_some(net, 1, action=torch.randn(2, 4, 2))][0]) > 5
    for p, part in vdm.part_of(net).items():
        assert (p.grad is not None) == (not torch.equal(p, before[p])) == (part in parts)
    for wrong in (("adapters",), ()):
        with pytest.raises(ValueError, match="are conditions lora spatial temporal"):
            vdm.trainable(net, wrong)

# ---- the published networks ----------------------------------------------------------------------
# diffusers has SVD's network, its scheduler and its pipeline. Vista's network is SVD's whose one
# token is longer, [CLIP | waves of 19 numbers], and whose given frames have another embedding.

SVD_SMALL = dict(block_out_channels=(64, 128, 128, 128), num_attention_heads=(2, 4, 4, 4),
             cross_attention_dim=24, addition_time_embed_dim=10,
             projection_class_embeddings_input_dim=30)
SVD_TINY = dict(block_out_channels=(32, 64), num_attention_heads=(1, 2), layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            cross_attention_dim=16, addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24)

def diffusers_network(eps=1e-5, **size):
    """diffusers' network of SVD with random weights, in float64. eps is what Stability's code has
    outside attention."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNetSpatioTemporalConditionModel(**size).double().eval()
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, 0, 0.05)
        else:
            nn.init.normal_(p, 0.3, 0.3)
    for name, module in net.named_modules():
        if eps and isinstance(module, nn.GroupNorm) and "attentions" not in name:
            module.eps = eps
    return net.requires_grad_(False)

def published(net):
    """The same network here, in float64."""
    return vdm.load_published(net.state_dict(), head_dim=32).double()

@cases("size", [SVD_SMALL, SVD_TINY])
@cases("eps, limit", [(1e-5, 1e-5), (None, 1e-4)])
def test_the_published_network_is_diffusers(size, eps, limit):
    """With all 8 channels in x, and with a picture beside x."""
    theirs = diffusers_network(eps, **size)
    ours = published(theirs).net
    x = torch.randn(2, 3, 8, 8, 16).double()
    clip = torch.randn(2, size["cross_attention_dim"]).double()
    numbers = torch.tensor([[6, 127, 0.02], [9, 40, 0]]).double()
    picture = x[:, :1, 4:]
    beside = torch.cat([x[:, :, :4], picture.expand_as(x[:, :, 4:])], 2)
    for level in (-1.5, 1.6):
        expected = theirs(x, level, clip[:, None], numbers).sample
        assert expected.std() > 0.1
        found = ours(x[:, :, :4], torch.full((2,), level), x[:, :, 4:], clip, numbers)
        agree(found, expected, atol=limit, rtol=0)
        expected = theirs(beside, level, clip[:, None], numbers).sample
        found = ours(x[:, :, :4], torch.full((2, 3), level), picture, clip, numbers)
        agree(found, expected, atol=limit, rtol=0)

def svd_scheduler():
    """The scheduler of SVD's repository, by its scheduler_config.json."""
    diffusers = pytest.importorskip("diffusers")
    return diffusers.EulerDiscreteScheduler(
        beta_end=0.012, beta_schedule="scaled_linear", beta_start=0.00085, num_train_timesteps=1000,
        interpolation_type="linear", prediction_type="v_prediction", sigma_max=700.0,
        sigma_min=0.002, steps_offset=1, timestep_spacing="leading", timestep_type="continuous",
        trained_betas=None, use_karras_sigmas=True)

def test_the_published_levels_and_estimates_are_diffusers():
    scheduler = svd_scheduler()
    scheduler.set_timesteps(25)
    sigmas = vdm.karras_sigmas(25, 0.002, 700.0)
    agree(sigmas, scheduler.sigmas, rtol=2e-6, atol=0)
    config = vdm.PRESETS["svd"]
    assert (config.sampling_steps, config.sigma_min, config.sigma_max) == (25, 0.002, 700.0)
    theirs = diffusers_network(**SVD_TINY)
    denoiser = published(theirs)
    clip = torch.randn(1, 16).double()
    told = vdm.picture_conditions(torch.randn(1, 1, 4, 8, 8).double(), fps=7, clip=clip)
    for i in (0, 8, 16, 24):
        scheduler = svd_scheduler()                              # it begins at the level asked for
        scheduler.set_timesteps(25)
        t = scheduler.timesteps[i]
        x = scheduler.sigmas[i].double() * torch.randn(1, 3, 4, 8, 8).double()
        scaled = torch.cat([scheduler.scale_model_input(x, t), told["concat"].expand_as(x)], dim=2)
        v = theirs(scaled, t, clip[:, None], told["numbers"].double()).sample
        expected = scheduler.step(v, t, x).pred_original_sample
        found = denoiser(x, scheduler.sigmas[i].double().reshape(1), **told)
        limit = 1e-5 * max(1, expected.abs().max())
        agree(found, expected, atol=limit, rtol=0)

def test_a_clip_of_svd_is_the_pipelines():
    """25 steps with a guidance scale per frame, through the pipeline's own loop."""
    pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")
    token = torch.randn(1, 1, 16).double()
    picture = torch.randn(1, 4, 8, 8).double()

    class Pipeline(diffusers.StableVideoDiffusionPipeline):
        def _encode_image(self, *rest):
            return torch.cat([torch.zeros_like(token), token])

        def _encode_vae_image(self, *rest, **options):
            return torch.cat([torch.zeros_like(picture), picture])

    theirs = diffusers_network(**SVD_TINY)
    vae = diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(32, 32, 32, 32),
                                                 down_block_types=("DownEncoderBlock2D",) * 4)
    pipeline = Pipeline(vae, None, theirs, svd_scheduler(), None)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 4, 8, 8).double()
    expected = pipeline(torch.zeros(1, 3, 64, 64), 64, 64, num_frames=4, num_inference_steps=25,
                        min_guidance_scale=1.0, max_guidance_scale=3.0, fps=7, motion_bucket_id=127,
                        noise_aug_strength=0.02, latents=noise.clone(), output_type="latent").frames
    told = vdm.picture_conditions(vdm.LATENT_SCALE * picture[:, None], fps=7, level=0.02,
                                  clip=token[:, 0])
    denoise = vdm.guided_by(published(theirs), torch.linspace(1, 3, 4), ("concat", "clip"))
    sigmas = vdm.karras_sigmas(25, 0.002, 700.0)
    start = math.sqrt(700 ** 2 + 1) * noise                        # theirs starts at this, not 700
    found = vdm.sample_ddim(partial(denoise, **told), start, sigmas)
    assert expected.std() > 0.1
    agree(found, expected, atol=1e-4 * expected.abs().max(), rtol=0)

def stability_keys(net, blocks=2, levels=4):
    """{key of diffusers: key of Stability's code}, written from how Stability's code counts."""
    heads = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
             "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2"}
    n = 0
    for level in range(levels):
        for block in range(blocks):
            n += 1
            heads[f"down_blocks.{level}.resnets.{block}"] = f"input_blocks.{n}.0"
            heads[f"down_blocks.{level}.attentions.{block}"] = f"input_blocks.{n}.1"
        n += 1
        heads[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
    n = -1
    for level in range(levels):
        for block in range(blocks + 1):
            n += 1
            heads[f"up_blocks.{level}.resnets.{block}"] = f"output_blocks.{n}.0"
            heads[f"up_blocks.{level}.attentions.{block}"] = f"output_blocks.{n}.1"
        part = 1 if level == 0 else 2                       # the lowest level has no attention
        heads[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{n}.{part}.conv"
    inside = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
              "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    keys = {}
    for key in net.state_dict():
        head = max((h for h in heads if key.startswith(f"{h}.")), key=len)
        rest = key[len(head) + 1:]
        for theirs, ours in inside.items():
            rest = rest.replace(f"spatial_res_block.{theirs}.", f"{ours}.")
            rest = rest.replace(f"temporal_res_block.{theirs}.", f"time_stack.{ours}.")
        rest = rest.replace("temporal_transformer_blocks", "time_stack")
        rest = rest.replace("pos_embed.linear_1", "pos_embed.0")
        keys[key] = f"{heads[head]}.{rest.replace('pos_embed.linear_2', 'pos_embed.2')}"
    return keys

def with_vistas_tensors(weights):
    """Vista's: a second embedding, and two projections of 19 x 128 numbers in every attention."""
    more = {}
    for key, w in weights.items():
        if key.endswith("attn2.to_v.weight"):
            for name in ("k", "v"):
                adapter = key.replace("to_v", f"{name}_adapter_action_control")
                more[adapter] = torch.empty(len(w), 2432, device="meta")
        if ".time_embed." in key:
            more[key.replace("time_embed", "cond_time_stack_embed")] = w
    return weights | more

def test_every_published_tensor_has_its_place():
    """At full size, without numbers: the published shapes, by both ways to name them."""
    diffusers = pytest.importorskip("diffusers")
    size = lambda tensors: sum(w.numel() for w in tensors)
    with torch.device("meta"):
        theirs = diffusers.UNetSpatioTemporalConditionModel()
        svd, vista = (vdm.build(vdm.PRESETS[name]) for name in ("svd", "vista"))
    weights = theirs.state_dict()
    assert size(weights.values()) == 1_524_623_082
    assert (size(svd.parameters()), size(vista.parameters())) == (1_474_233_322, 1_536_986_602)
    keys = stability_keys(theirs)
    renamed = {f"model.diffusion_model.{keys[key]}": w for key, w in weights.items()}
    extra = {"first_stage_model.encoder.conv_in.weight": torch.zeros(1)}
    for named in (weights, renamed | extra):
        denoiser = vdm.load_published(named)
        assert size(denoiser.parameters()) == 1_474_233_322
        assert len(denoiser.state_dict()) == 1_428 - 128
    renamed = with_vistas_tensors(renamed)
    assert size(renamed.values()) == 1_648_079_082
    denoiser = vdm.load_published(renamed | extra)
    assert isinstance(denoiser, vdm.Replace) and denoiser.net.actions == 19
    assert size(denoiser.parameters()) == 1_536_986_602

def vista_weights():
    """diffusers' weights whose token is [16 of CLIP | 19 x 128], told apart as Vista's are."""
    theirs = diffusers_network(**SVD_TINY | dict(cross_attention_dim=16 + 19 * 128))
    keys = stability_keys(theirs, blocks=1, levels=2)
    weights = {}
    for key, w in theirs.state_dict().items():
        new = keys[key]
        weights[new] = w
        if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            weights[new] = w[:, :16]
        if key.endswith("attn2.to_v.weight"):
            weights[new.replace("to_v", "v_adapter_action_control")] = w[:, 16:]
        if new.startswith("time_embed."):
            weights["cond_time_stack_embed." + new.removeprefix("time_embed.")] = w * 2
    return theirs, weights

def test_vistas_network():
    """Frames given in x have the second embedding, here twice the first; they come back as they
    are, and stand in x without noise."""
    theirs, weights = vista_weights()
    denoiser = vdm.load_published(weights, head_dim=32).double()
    x = torch.randn(2, 4, 8, 8, 8).double()
    clip = torch.randn(2, 16).double()
    numbers = torch.tensor([[9.0, 127, 0], [9, 127, 0]])
    action = torch.randn(2, 19).double() * 5
    action[0, 9:] = math.nan
    angle = action[..., None] * torch.exp(-math.log(10_000) * torch.arange(64) / 64)
    told = torch.cat([angle.cos(), angle.sin()], -1).nan_to_num().flatten(1)
    token = torch.cat([clip, told], -1)[:, None]
    parts = x.split(4, 2)                                      # the noisy ones, the picture's
    level = torch.full((2,), 0.4)
    for given in (None, torch.zeros(2, 4)):
        if given is not None:
            for p in theirs.time_embedding.parameters():
                p.mul_(2)
        expected = theirs(x, 0.4, token, numbers.double()).sample
        found = denoiser.net(parts[0], level, parts[1], clip, numbers, action, given)
        agree(found, expected, atol=1e-5, rtol=0)
    context = torch.randn(2, 4, 4, 8, 8).double()
    mask = torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]])
    told = vdm.picture_conditions(context[:, :1], fps=10, clip=clip) | dict(action=action)
    x = torch.where(five(mask) == 1, 1e9, context * 3)
    estimate = denoiser(x, torch.full((2,), 2.0), context=context, mask=mask, **told)
    assert torch.equal(estimate[mask == 1], context[mask == 1])
    assert estimate.abs().max() < 1e3

@cases("layout", ["stability", "diffusers"])
def test_saved_weights_come_back_and_fit_diffusers(tmp_path, layout):
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = diffusers_network(**SVD_TINY).float()
    denoiser = vdm.load_published(theirs.state_dict(), head_dim=32)
    path = tmp_path / "saved.safetensors"
    vdm.save_published(path, denoiser, layout)
    again = vdm.load_published(path, head_dim=32)
    for (name, w), (_, v) in zip(denoiser.state_dict().items(), again.state_dict().items()):
        assert torch.equal(w, v), name
    saved = safetensors.load_file(path)
    if layout == "stability":
        keys = stability_keys(theirs, blocks=1, levels=2)
        assert saved.keys() == {f"model.diffusion_model.{key}" for key in keys.values()}
        saved = {key: saved[f"model.diffusion_model.{new}"] for key, new in keys.items()}
    x = torch.randn(1, 3, 8, 8, 8)
    clip = torch.randn(1, 1, 16)
    numbers = torch.tensor([[6, 127, 0.02]])
    expected = theirs(x, 0.5, clip, numbers).sample
    theirs.load_state_dict(saved)                                       # all of them, no others
    agree(theirs(x, 0.5, clip, numbers).sample, expected, atol=1e-5, rtol=0)

def test_saved_weights_have_lora_merged(tmp_path):
    pytest.importorskip("safetensors")
    denoiser = published(diffusers_network(**SVD_TINY)).float()
    matrices = 4 * 2 * 6                                # 4 places, 2 attentions each, 6 layers each
    assert len(vdm.adapt(denoiser.net, "lora", rank=3)) == 2 * matrices
    for name, p in denoiser.named_parameters():
        if "branch" in name:
            nn.init.normal_(p, std=0.1)
    vdm.save_published(tmp_path / "saved.safetensors", denoiser)
    again = vdm.load_published(tmp_path / "saved.safetensors", head_dim=32)
    x = torch.randn(1, 3, 8, 8, 8)
    told = dict(clip=torch.randn(1, 16), numbers=torch.tensor([[6, 127, 0.02]]))
    expected = denoiser.net(x[:, :, :4], torch.tensor([0.5]), x[:, :, 4:], **told)
    found = again.net(x, torch.tensor([0.5]), **told)                  # the picture's as channels
    agree(found, expected, atol=1e-4, rtol=0)
    assert any(isinstance(m, vdm.LoRA) for m in denoiser.net.modules())     # it keeps its own

def test_a_training_step_of_the_published_network():
    """Actions start as nothing, all layers learn, and phase 2 trains its own parameters alone."""
    config = vdm.Config(**SVD_SHAPE | dict(width=32, mults=(1, 2), attention=("factorised", "none"),
                                           blocks=1, head_dim=16, actions=(1, 8, 4, 4, 2)),
                        give="vista", loss="vista")
    denoiser = vdm.build(config)
    for name, p in denoiser.named_parameters():         # else what starts at 0 lets nothing through
        if p.numel() > 1 and not p.any() and ".action." not in name:
            nn.init.normal_(p, std=0.02)
    clean = torch.randn(2, 4, 4, 8, 8)
    told = vdm.picture_conditions(clean[:, :1], fps=10, clip=torch.randn(2, 1024))
    told |= dict(context=clean, mask=torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))
    step = partial(vdm.vista_loss, denoiser, clean, torch.tensor([1.0, 3.0]),
                   torch.randn_like(clean), **told)
    loss, _ = step(action=torch.randn(2, 19))
    assert torch.equal(loss, step()[0])
    loss.backward()
    assert [name for name, p in denoiser.named_parameters() if not p.grad.any()] == []
    assert {*vdm.part_of(denoiser).values()} == {"spatial", "temporal", "conditions"}
    vdm.adapt(denoiser.net, "lora", 2)
    vdm.trainable(denoiser, ("lora", "conditions"))
    learning = [name for name, p in denoiser.named_parameters() if p.requires_grad]
    actions = [name for name in learning if ".action." in name]
    assert len(actions) == 8
    assert all("branch" in name for name in {*learning} - {*actions})

PROJECTION = "mid_block.attentions.0.proj_in.weight"
ADAPTER = "mid_block.attentions.0.transformer_blocks.0.attn1.q_adapter_down.weight"

@pytest.fixture(scope="module")
def svd_weights():
    return {key: w.float() for key, w in diffusers_network(**SVD_TINY).state_dict().items()}

@cases("change, head_dim, words", [
    ({PROJECTION: None}, 32, f"{PROJECTION} is missing"),
    ({PROJECTION: torch.zeros(3, 3)}, 32, f"{PROJECTION} is of shape"),
    ({ADAPTER: torch.zeros(3, 3)}, 32, "has no mid_block.*adapter"),
    ({}, 48, "head_dim is 48, which must divide 32 channels")])
def test_weights_of_no_published_network(svd_weights, change, head_dim, words):
    weights = {key: w for key, w in (svd_weights | change).items() if w is not None}
    with pytest.raises(ValueError, match=words):
        vdm.load_published(weights, head_dim=head_dim)

@cases("change, words", [
    (dict(clip=torch.ones(2, 17)), r"clip is \(2, 17\), expected \(2, 16\)"),
    (dict(numbers=torch.ones(2, 2)), "numbers is"),
    (dict(numbers=None), "are missing"),
    (dict(action=torch.ones(2, 19)), "action is"),
    (dict(given=torch.zeros(2, 3)), "Vista"),
    (dict(concat=torch.ones(2, 1, 3, 8, 8)), r"concat is \(2, 1, 3, 8, 8\), expected"),
    (dict(concat=torch.ones(2, 2, 4, 8, 8)), "concat is"),
    (dict(x=torch.ones(2, 3, 8, 8, 8)), r"x is \(2, 3, 8, 8, 8\), expected \(2, 3, 4, 8, 8\)"),
    (dict(x=torch.ones(2, 3, 4, 9, 8), concat=None), "latents are 9 x 8, expected multiples of 2")])
def test_what_a_published_network_cannot_take(svd_weights, change, words):
    net = vdm.load_published(svd_weights, head_dim=32).net
    told = vdm.picture_conditions(torch.randn(2, 1, 4, 8, 8), fps=7, clip=torch.randn(2, 16))
    told |= dict(x=torch.randn(2, 3, 4, 8, 8), c_noise=torch.ones(2))
    net(**told)
    with pytest.raises(ValueError, match=words):
        net(**told | change)

def test_what_is_no_file_of_a_published_network(tmp_path, svd_weights):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{\"a\":")
    with pytest.raises(ValueError, match="truncated"):
        vdm.load_published(path)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        vdm.load_published(tmp_path / "none.safetensors")
    plain = vdm.build(vdm.Config())
    with pytest.raises(ValueError, match="no weights of SVD"):
        vdm.load_published(plain.state_dict())
    denoiser = vdm.load_published(svd_weights, head_dim=32)
    for path, model, layout in (("a.pt", denoiser, "stability"), ("a.safetensors", denoiser, "x"),
                                ("a.safetensors", plain, "stability")):
        with pytest.raises(ValueError, match="save_published|layout"):
            vdm.save_published(path, model, layout)

SVD_SHAPE = {name: getattr(vdm.PRESETS["svd"], name) for name in (
    "channels", "factor", "width", "mults", "blocks", "attention", "head_dim", "kind", "images")}

def small_published_files():
    """Write svd.safetensors, a small one, and what goes with it. Return the flags of its size."""
    config = vdm.Config(**SVD_SHAPE | dict(width=64, mults=(1, 2), attention=("factorised", "none"),
                                           blocks=1), give="svd")
    vdm.save_published("svd.safetensors", vdm.build(config))
    rng = np.random.default_rng(0)
    Path("latents").mkdir()
    for name, shape in {"latents/a": (9, 4, 8, 8), "latents/a.tokens": (9, 1024),
                        "latents/a.actions": (9, 19), "latent": (1, 4, 8, 8),
                        "clip": (1, 1024)}.items():
        np.save(f"{name}.npy", rng.standard_normal(shape))
    return ("--width 64 --mults 1 2 --blocks 1 --attention factorised none --size 8 "
            "--frames 5").split()

def test_published_weights_by_the_programs(tmp_path, monkeypatch):
    """SVD's weights start Vista's training, which gives weights that sample.py and others read."""
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    small = [*small_published_files(), "--data", "latents", "--batch", "2", "--steps", "2",
             "--sampling-steps", "2", "--marks", "1"]
    train.main(["--preset", "vista", "--init", "svd.safetensors", "--out", "one", *small])
    started = vdm.load_published("svd.safetensors").net
    one = vdm.read_checkpoint("one/last.pt")[0]["model"]
    twin = started.embed[0].weight                              # of which Vista has a second
    agree(one["net.embed_given.0.weight"], twin, atol=1e-3, rtol=0)
    train.main(["--preset", "vista", "--init", "one/last.pt", "--train", "lora", "conditions",
                "--adapters", "lora", "--out", "two", *small])
    vdm.save_published("vista.safetensors", vdm.load("two/last.pt")[0])
    np.save("actions.npy", np.linspace(-3, 3, 25 * 19).reshape(25, 19))
    given = np.load("latent.npy")[0].astype(np.float32)
    for name, flags, length in (("svd", "--clip clip.npy --motion-bucket 90 --length 3", 3),
                                ("vista", "--length 47", 47),
                                ("vista", "--actions actions.npy", 25)):
        out = f"{name}-{length}"
        sample.main(f"{name}.safetensors --context latent.npy --n 1 --steps 2 --out {out}.mp4 "
                    f"{flags}".split())
        made = np.load(f"{out}/000.npy")
        assert made.shape == (length, 4, 8, 8)
        assert np.array_equal(made[0], given) == (name == "vista")      # SVD draws its picture
    for flags, words in (("--n 1", "go on from a picture"),
                         ("--context clip.npy", "expected latents"),
                         ("--context latent.npy --clip latent.npy", "the model knows")):
        with pytest.raises(ValueError, match=words):
            sample.main(["svd.safetensors", *flags.split()])

# ---- EMA and checkpoints -------------------------------------------------------------------------

@cases("decay, dtype", [(0.9999, torch.bfloat16), (0.5, torch.float32)])
def test_ema(decay, dtype):
    """The recursion in numpy, of random weights; in float32 always; buffers are copied."""
    model = nn.BatchNorm1d(4).to(dtype)
    ema = vdm.EMA(model, decay)
    average = np.ones(4)
    for n in range(1, 60):
        nn.init.normal_(model.weight)
        model.running_mean.fill_(n)
        ema.update(model)
        keep = min(decay, (1 + n) / (10 + n))
        average = keep * average + (1 - keep) * model.weight.detach().double().numpy()
        np.testing.assert_allclose(ema.model.weight.numpy(), average, rtol=1e-4, atol=1e-5)
        assert (ema.model.running_mean == n).all()
    assert ema.model.weight.dtype == torch.float32
    assert not ema.model.training

SMALL = vdm.Config(frames=3, size=(8, 8), channels=1, width=8, mults=(1, 2), head_dim=8,
                   attention=("none", "joint"))

def checkpoint(path, config=None, **fields):
    """Save two models: one as the last weights, the other, which is returned, as their average."""
    its = dataclasses.replace(SMALL, **fields)
    last, average = (randomize(vdm.build(its)) for _ in range(2))
    vdm.save(path, config=asdict(its) | (config or {}), model=last.state_dict(),
             ema=average.state_dict(), step=7)
    return average

@cases("fields", [
    {}, dict(give="hint", labels=3), dict(give="replace", actions=(2, 1)), dict(give="per_frame"),
    dict(give="previous", adapters="simda", attention=("factorised", "joint")),
    dict(adapters="lora", rank=2)])
def test_save_and_load(tmp_path, fields):
    """The averaged weights, ready to sample from."""
    path = tmp_path / "new" / "a.pt"
    x = torch.randn(1, 3, 1, 8, 8)
    average = checkpoint(path, **fields)
    loaded, config = vdm.load(path)
    assert torch.equal(loaded(x, torch.ones(1)), average(x, torch.ones(1)))
    assert config == dataclasses.replace(SMALL, **fields)
    assert type(loaded) is type(average) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert vdm.read_checkpoint(path)[0]["step"] == 7 and os.listdir(path.parent) == ["a.pt"]

def refusal(path):
    """What load says of a file: one sentence that names it."""
    with pytest.raises(ValueError) as error:
        vdm.load(path)
    said = str(error.value)
    assert path.name in said
    assert "\n" not in said
    return said

def test_bad_checkpoints_are_refused(tmp_path):
    """Missing, truncated, of another network, or of another version."""
    path = tmp_path / "a.pt"
    assert "no checkpoint" in refusal(path)
    checkpoint(path)
    whole = path.read_bytes()
    state = torch.load(path, weights_only=True)
    for length in (0, 9, len(whole) // 2, len(whole) - 9):
        path.write_bytes(whole[:length])
        assert "truncated" in refusal(path)
    for change in (dict(width=16), dict(give="previous")):
        checkpoint(path, change)
        assert "do not fit the config" in refusal(path)
    checkpoint(path, dict(no_such_field=1))
    assert "another version" in refusal(path)
    del state["config"]["skip_guidance"]                               # no default is filled in
    vdm.save(path, **state)
    assert "skip_guidance" in refusal(path)

class Attack:
    def __reduce__(self):
        return os.mkdir, ("marker",)

@pytest.mark.filterwarnings("ignore")
@cases("write, read", [(torch.save, partial(torch.load, weights_only=False)),
                       (lambda state, path: path.write_bytes(pickle.dumps(state)),
                        lambda path: pickle.loads(path.read_bytes()))])
def test_code_in_a_checkpoint_never_runs(tmp_path, monkeypatch, write, read):
    """A pickle that makes a folder when it is read: refused, and there is no folder."""
    monkeypatch.chdir(tmp_path)
    path = Path("a.pt")
    write(dict(config=asdict(SMALL), ema={}, extra=Attack()), path)
    assert "code" in refusal(path)
    assert not Path("marker").exists()
    read(path)
    assert Path("marker").exists()                                     # so it was a real one

@cases("module, name, error", [
    (torch, "save", OSError(28, "No space left on device")), (torch, "save", RuntimeError("pos")),
    (os, "fsync", OSError(5, "Input/output error")), (os, "replace", OSError(1, "not permitted"))])
def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch, module, name, error):
    """The bytes of the old file, and nothing beside it."""
    path = tmp_path / "a.pt"
    checkpoint(path)
    before = path.read_bytes()

    def fail(*args):
        if name == "save":
            args[1].write(b"half of it")
        raise error

    monkeypatch.setattr(module, name, fail)
    with pytest.raises(OSError, match="could not write .*a.pt"):
        vdm.save(path, step=8)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.pt"]

def test_a_full_disk_is_called_that(tmp_path):
    """Although torch hides the cause behind a position in its archive."""
    (tmp_path / ".part.a.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="could not write .*a.pt .the disk is full."):
        vdm.save(tmp_path / "a.pt", x=torch.zeros(10 ** 5))
    assert os.listdir(tmp_path) == []

@cases("main, words", [
    (lambda: torch.empty(10 ** 15), "the memory is full: buy more"),
    (lambda: np.zeros(10 ** 17), "the memory is full: buy more"),
    (lambda: vdm.need(False, "no"), "no"),
    (lambda: Path("/dev/full").write_text("a row"), "the disk is full"),
    (lambda: __import__("no_such"), "No module named 'no_such': pip install -r requirements.txt")])
def test_what_users_can_mend_is_one_sentence(main, words):
    with pytest.raises(SystemExit) as stop:
        vdm.run_program(main, "buy more")
    assert stop.value.code == f"error: {words}"
    with pytest.raises(RuntimeError, match="singular"):                 # what they cannot is a bug
        vdm.run_program(lambda: torch.linalg.inv(torch.zeros(2, 2)), "buy more")

@cases("changes, words", [
    *[({name: "all"}, f"{name} is 'all', expected one of ") for name in vdm.CHOICES],
    (dict(attention=("none",)), "each of the 2 levels"), (dict(head_dim=7), "head_dim is 7"),
    (dict(attention=("none", "all")), "attention is none all"), (dict(head_dim=16, width=12), "24"),
    (dict(size=(30, 33)), "--size 32 32$"), (dict(size=(1, 101)), "--size 4 100$")])
def test_settings_of_which_no_model_can_be_built(changes, words):
    """Tiles of 2 and one halving: sizes are multiples of 4, of which the nearest is named."""
    with pytest.raises(ValueError, match=words):
        vdm.build(dataclasses.replace(SMALL, **changes))

# ---- autoencoder ---------------------------------------------------------------------------------

def autoencoder(gates=True, factor=4):
    return randomize(vdm.Autoencoder(channels=2, latent=3, width=16, factor=factor), gates)

@cases("factor", [2, 4, 16])
def test_latents_are_normalised_and_back(factor):
    """A place for factor x factor pixels; per channel mean 0, std 1, by numpy; decode undoes it."""
    model = autoencoder(factor=factor)
    clips = torch.randn(5, 4, 2, 32, 16) + 0.3
    model.measure(clips[i:i + 1] for i in range(5))
    latents = model.encode(clips)
    raw = model.posterior(clips)[0]
    assert latents.shape == (5, 4, 3, 32 // factor, 16 // factor)
    flat = latents.numpy().transpose(2, 0, 1, 3, 4).reshape(3, -1)
    np.testing.assert_allclose(flat.mean(1), 0, atol=1e-4)
    np.testing.assert_allclose(flat.std(1, ddof=1), 1, atol=1e-4)
    assert not torch.allclose(latents, raw, atol=0.1)
    close(model.decode(latents), model.render(raw))

@cases("gates, temporal, alone", [(False, 1.0, True), (True, 0.0, True), (True, 1.0, False)])
def test_temporal_0_decodes_frame_by_frame(gates, temporal, alone):
    """So does a fresh decoder, whose gates are 0, but not one whose gates are open."""
    latents = torch.randn(2, 5, 3, 4, 4)
    decode = partial(autoencoder(gates).decode, temporal=temporal)
    frames = torch.cat([decode(z) for z in latents.split(1, 1)], 1)
    assert torch.allclose(decode(latents), frames, atol=1e-4) == alone

@cases("factor", [2, 8])
def test_a_stream_decodes_as_the_whole_clip(factor):
    """Whatever the pieces; and frames are held back no longer than layers look ahead."""
    model = autoencoder(factor=factor)
    latents = torch.randn(1, 19, 3, 2, 2)
    whole = model.render(latents)
    for pieces in (1, 4, 9, 19):
        cut = 1 + torch.randperm(18)[:pieces - 1].sort()[0]
        got = list(model.stream(iter(latents.tensor_split(cut, 1))))
        close(torch.cat(got, dim=1), whole)
    assert [piece.shape[1] for piece in got] == [1] * (19 - model.reach) + [model.reach]
    latents.requires_grad_()
    model.render(latents)[:, 9].sum().backward()
    sees = latents.grad.flatten(2).any(-1)[0].tolist()
    assert sees == [abs(t - 9) <= model.reach for t in range(19)]

def test_autoencoder_loss():
    """KL by torch.distributions; the error of a draw of the posterior by PyTorch's losses."""
    model = autoencoder().requires_grad_()
    clip = torch.randn(2, 3, 2, 8, 8)
    mean, log_var = model.posterior(clip)
    noise = torch.randn_like(mean)
    posterior = torch.distributions.Normal(mean, (log_var / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    made = model.render(posterior.loc + posterior.scale * noise, 1.0)
    reconstruction = F.l1_loss(made, clip) + F.mse_loss(made, clip)
    total, parts = vdm.ae_loss(model, clip, noise, kl=0.3, temporal=1.0)
    close(parts, dict(reconstruction=reconstruction.detach(), kl=kl.detach()))
    close(total, reconstruction + 0.3 * kl)
    total.backward()
    assert model.encoder[1].weight.grad.any()
    model.encoder[-1].bias.data[3:] = 1000                     # an encoder that has run away
    assert vdm.ae_loss(model, clip, noise)[0].isfinite()

def test_checkpoints_of_autoencoders(tmp_path):
    """Of its own, or within that of a model of its latents; neither is taken for the other."""
    own = tmp_path / "own.pt"
    latent = tmp_path / "latent.pt"
    config = dataclasses.replace(vdm.PRESETS["latent"], width=16)
    weights = randomize(vdm.build_autoencoder(config)).state_dict()
    vdm.save(own, config=asdict(config), stage="autoencoder", ema=weights)
    vdm.save(latent, config=asdict(config), ema=vdm.build(config).state_dict(), autoencoder=weights)
    for path in (own, latent):
        loaded, its = vdm.load_autoencoder(path)
        close(loaded.state_dict(), weights)
        assert its == config
    assert "is an autoencoder" in refusal(own)
    assert vdm.load(latent)[1] == config
    checkpoint(tmp_path / "pixels.pt")
    assert vdm.load_autoencoder(tmp_path / "pixels.pt")[0] is None

# ---- planes --------------------------------------------------------------------------------------

GRID = (4, 2, 6)                                    # T, H, W, of patches of 2 x 2 pixels

def triplane(*off):
    """An autoencoder of planes with random weights, without these layers: "t", "hw", all others."""
    model = randomize(vdm.TriplaneAutoencoder(2, 3, GRID, 2, 16, 1, 1, 8))
    for turns in (model.encoder, model.decoder):
        for i, layer in enumerate(turns):
            if layer.over in off:
                turns[i] = nn.Identity()
    return model

def test_planes_in_a_row_and_back():
    """Place after place: (H, W), then (T, W), then (T, H), each row by row."""
    sizes = vdm.plane_sizes(*GRID)
    planes = [torch.randn(5, h, w) for h, w in ((2, 6), (4, 6), (4, 2))]
    row = vdm.join_planes(planes)
    assert row.shape == (5, 1, 44)
    k = 0
    for plane in planes:
        for y in range(plane.shape[1]):
            for x in range(plane.shape[2]):
                assert torch.equal(row[:, 0, k], plane[:, y, x])
                k += 1
    assert all(map(torch.equal, vdm.split_planes(row, sizes), planes))

def test_every_place_is_read_off_three_planes():
    """By a loop over all places: u(t, h, w) is the sum of what is read from (h, w), (t, w), (t, h).
    The other way, a plane has what is left when t, h or w is dropped, of each clip in a row."""
    model = triplane("t", "hw")
    model.output = nn.Identity()
    latents = torch.randn(2, 3, 3, 1, 44)
    u = model.decode(latents)                                                 # (2, 3 T, 16, H, W)
    T, H, W = GRID
    for n in range(3):
        planes = vdm.split_planes(latents[:, n], model.sizes)
        for t, h, w in np.ndindex(GRID):
            want = sum(F.linear(plane[:, :, y, x], read.weight[:, :, 0, 0], read.bias)
                       for plane, read, y, x in zip(planes, model.read, (h, t, t), (w, w, h)))
            close(u[:, n * T + t, :, h, w], want)
    for project in model.project:
        project.forward = lambda u: u.mean(1)                                    # drops the axis
    model.input[1] = nn.Conv2d(8, 16, 1).requires_grad_(False)
    clip = torch.randn(2, 3 * T, 2, 2 * H, 2 * W)
    u = model.input(clip.flatten(0, 1)).unflatten(0, (2, 3, T))
    hw, tw, th = vdm.split_planes(model.encode(clip), model.sizes)
    close(hw, u.mean(2))
    close(tw, u.mean(4).transpose(2, 3))
    close(th, u.mean(5).transpose(2, 3))

def test_a_projection_looks_along_one_axis():
    """A place of a plane depends on all of the axis that is dropped, and on no other place."""
    project = randomize(vdm.Projection(16, 3, 2, 8))
    u = torch.randn(1, 5, 16, 3, 4, requires_grad=True)
    plane = project(u)
    assert plane.shape == (1, 3, 3, 4) and plane.abs().max() < 1
    plane[0, :, 0, 2].sum().backward()
    seen = u.grad.abs().sum((0, 2)) > 0                                             # (5, 3, 4)
    assert seen[:, 0, 2].all() and seen.sum() == 5

def test_planes_of_a_clip_that_stands_still_are_constant_along_t():
    """Those of a clip that moves are not, and (H, W) alone tells what stands still."""
    model = triplane()
    frame = torch.randn(1, 1, 2, 4, 12)
    for clip, still in ((frame.expand(1, 4, -1, -1, -1), True),
                        (torch.randn(1, 4, 2, 4, 12), False)):
        hw, tw, th = vdm.split_planes(model.encode(clip)[:, 0], model.sizes)
        for plane in (tw, th):                                                  # (1, 3, T, W or H)
            assert torch.allclose(plane, plane[:, :, :1].expand_as(plane), atol=1e-5) == still
        assert hw.std((2, 3)).max() > 0.1

def test_which_plane_tells_what():
    """Without layers over time, rows of (T, W) and of (T, H) that change places make frames do so.
    In one alone they do not. Without layers over space, columns of (H, W) and (T, W) do so."""
    order = torch.tensor([2, 0, 3, 1])
    latents = torch.randn(1, 1, 3, 1, 44)
    hw, tw, th = vdm.split_planes(latents, vdm.plane_sizes(*GRID))
    decode = triplane("t").decode
    moved = decode(vdm.join_planes([hw, tw[..., order, :], th[..., order, :]]))
    close(moved, decode(latents)[:, order])
    half = decode(vdm.join_planes([hw, tw[..., order, :], th]))
    assert not torch.allclose(half, moved, atol=0.1)
    order = torch.tensor([1, 5, 0, 4, 2, 3])                                   # of W = 6 patches
    decode = triplane("hw").decode
    moved = decode(vdm.join_planes([hw[..., order], tw[..., order], th]))
    close(moved, decode(latents).unflatten(4, (6, 2))[..., order, :].flatten(4))

@cases("resize", [None, "up", "down"])
def test_residual_block_of_planes(resize):
    """Against diffusers', which is built as that of PVDM's code: gain and shift, resized within."""
    resnet = pytest.importorskip("diffusers.models.resnet")
    theirs = randomize(resnet.ResnetBlock2D(
        in_channels=32, out_channels=64, temb_channels=8, groups=32, eps=1e-5,
        time_embedding_norm="scale_shift", up=resize == "up", down=resize == "down"))
    layer = dict(up=nn.Upsample(scale_factor=2), down=nn.AvgPool2d(2)).get(resize, nn.Identity())
    ours = vdm.PlaneResBlock(32, 64, 8, layer).eval()
    names = {"conv1.0": "norm1", "conv1.3": "conv1", "emb": "time_emb_proj", "norm2": "norm2",
             "conv2": "conv2", "skip.1": "conv_shortcut"}
    weights = theirs.state_dict()
    ours.load_state_dict({f"{a}.{end}": weights[f"{b}.{end}"] for a, b in names.items()
                          for end in ("weight", "bias")})
    x = torch.randn(3, 1, 32, 4, 6)
    emb = torch.randn(3, 8)
    close(ours(x, F.silu(emb)[:, None])[:, 0], theirs(x[:, 0], emb))

def test_attention_of_planes():
    """Against PyTorch's, over all places of a plane."""
    ours = randomize(vdm.PlaneAttention(32, 4))
    theirs = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    theirs.load_state_dict(dict(
        in_proj_weight=ours.qkv.weight, in_proj_bias=ours.qkv.bias,
        **{"out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias}))
    x = torch.randn(2, 1, 32, 3, 5)
    h = ours.norm(x[:, 0]).flatten(2).mT                                               # (2, 15, 32)
    close(ours(x)[:, 0], x[:, 0] + theirs(h, h, h)[0].mT.unflatten(2, (3, 5)))

def plane_net(attention=("joint", "factorised")):
    return vdm.PlaneUNet(3, 3, 16, (1, 2), 1, attention, 2, vdm.plane_sizes(*GRID))

@cases("attention, cut, others", [
    (("joint", "factorised"), False, True), (("joint", "factorised"), True, False),
    (("factorised", "none"), True, False)])
def test_planes_talk_through_attention_among_them_alone(attention, cut, others):
    """With that cut, a change of one plane changes the estimate of this plane alone."""
    net = randomize(plane_net(attention))
    for block in net.modules():
        if cut and isinstance(block, vdm.PlaneBlock):
            block.across = nn.Identity()
    sizes = vdm.plane_sizes(*GRID)
    x = torch.randn(2, 1, 3, 1, 44)
    level = torch.zeros(2, 1)
    for k in range(3):
        planes = vdm.split_planes(x, sizes)
        planes[k] = planes[k] + 1
        change = net(vdm.join_planes(planes), level) - net(x, level)
        moved = [plane.abs().max() > 1e-3 for plane in vdm.split_planes(change, sizes)]
        assert moved == [others or i == k for i in range(3)]

def test_all_of_the_network_of_planes_learns():
    """A fresh one estimates 0; and from the joint loss every parameter gets a gradient, those of
    the clip before too."""
    net = plane_net()
    z = torch.rand(2, 1, 3, 1, 44)
    assert not net(z, torch.zeros(2, 1)).any()
    denoiser = vdm.PreviousClip(randomize(net).requires_grad_(), "v")
    loss, error = vdm.joint_loss(denoiser, z, z.flip(0), torch.ones(2), torch.randn_like(z))
    loss.backward()
    assert error.shape == (2,)
    assert [name for name, p in net.named_parameters() if not p.grad.any()] == []
    close(denoiser(z, 1.0, previous=0 * z), denoiser(z, 1.0))            # zeros are no clip (PVDM)

@cases("flags, total, within, across", [
    (dict(), 528_273_412, 31.8, 58.3), (dict(width=128, head_dim=16), 132_163_588, 8.0, 14.6)])
def test_pvdm_has_the_published_size(flags, total, within, across):
    """To the last parameter, but for the first layer of the noise level, which sees 64 waves."""
    config = dataclasses.replace(vdm.PRESETS["sky"], **flags)
    assert (config.frames, config.size) == (1, (1, 2048))
    with torch.device("meta"):
        net = vdm.build(config).net
    assert count_weights(net) + (config.width - 64) * 4 * config.width == total
    attention = [layer for layer in net.modules() if isinstance(layer, vdm.PlaneAttention)]
    assert {layer.heads for layer in attention} == {8}
    found = count_weights(net, r"\.across\.") / 1e6
    assert found == pytest.approx(across, abs=0.05)
    assert sum(map(count_weights, attention)) / 1e6 - found == pytest.approx(within, abs=0.05)

# ---- Drive ---------------------------------------------------------------------------------------

MOVES = dict(L=(-0.5 ** 0.5, -0.5 ** 0.5), S=(-1, 0), R=(-0.5 ** 0.5, 0.5 ** 0.5), X=(0, 0))

def drives(n, *args, **options):
    """Videos and actions of the first n clips."""
    world = vdm.Drive(*args, **options)
    items = default_collate([world[i] for i in range(n)])
    return items["video"], items["action"]

def test_drive_actions():
    """One-hot and motion by hand; each next command stays for 0.7 of times, or is any other."""
    for k, letter in enumerate(vdm.Drive.KEYS):
        want = [float(j == k) for j in range(4)] + list(MOVES[letter])
        np.testing.assert_allclose(vdm.Drive.ACTIONS[k], want, rtol=1e-6)
    action = vdm.Drive(20_000, (1, 1), seed=1)[0]["action"]
    command = action[:, :4].argmax(1).numpy()
    assert np.array_equal(action, vdm.Drive.ACTIONS[command])
    follows = np.histogram2d(command[:-1], command[1:], 4)[0]
    odds = follows / follows.sum(1, keepdims=True)
    assert np.abs(odds - (0.6 * np.eye(4) + 0.1)).max() < 0.02

@cases("size", [(32, 32), (32, 48)])
def test_drive_moves_as_its_actions_say(size):
    """A frame is the one before, seen from action * 2 pixels further on: by torch's bicubic."""
    video, action = drives(16, 8, size, seed=2)
    assert video.shape == (16, 8, 3, *size)
    assert video.abs().max() <= 1
    assert 0.5 < video.std() < 0.8
    still = action[:, 1:, 3].flatten() == 1

    def error(sign):
        shift = 2 * sign * action[:, 1:, 4:].reshape(-1, 2)                               # pixels
        theta = torch.eye(2, 3).repeat(len(shift), 1, 1)
        theta[:, :, 2] = shift.flip(1) * 2 / torch.tensor([size[1], size[0]])    # x, y in -1, 1
        old = video[:, :-1].flatten(0, 1)
        at = F.affine_grid(theta, old.shape, align_corners=False)
        seen = F.grid_sample(old, at, "bicubic", align_corners=False)
        return (seen - video[:, 1:].flatten(0, 1))[..., 4:-4, 4:-4].abs().mean((1, 2, 3))

    assert error(1).max() < 0.01
    assert error(-1)[still].max() < 1e-5
    assert error(-1)[~still].min() > 0.1

@cases("size", [(32, 32), (16, 16), (24, 64)])
def test_drive_check_knows_right_from_wrong(size):
    """Clips as they are, and with a little noise; then such as are wrong by construction."""
    world = vdm.Drive(8, size)
    clips, action = drives(24, 8, size, seed=5)
    commands = action[:, 1:, :4].argmax(2).numpy()
    for good in (clips, clips + 0.1 * torch.randn(clips.shape)):
        got = world.check(good, action)
        assert got["obeys"].mean() >= 0.99
        assert (got["commands"] == commands)[got["obeys"]].all()
        assert np.array_equal(got["passed"], got["obeys"].all(1))
    other = torch.cat([action[..., :4].roll(1, 2), action[..., 4:]], 2)
    assert world.check(clips, other)["obeys"].mean() <= 0.01
    scenes = torch.stack([clips.roll(t, 0)[:, t] for t in range(8)], 1)   # frames of 8 clips
    for bad in (torch.rand(clips.shape) * 2 - 1, -torch.ones(clips.shape), 0.02 * clips, scenes):
        assert world.check(bad)["obeys"].mean() <= 0.05
    slow = vdm.Drive(8, size, seed=5)
    slow.speed /= 2
    slow = torch.stack([slow[i]["video"] for i in range(24)])
    for bad in (slow, clips.flip(3)):                      # half as fast, or backwards
        assert world.check(bad)["obeys"][commands < 3].mean() <= 0.05
    assert (world.check(clips[:, :1].expand_as(clips))["commands"] == 3).all()
    mirrored = world.check(clips.flip(4))["commands"]
    assert (mirrored == np.array([2, 1, 0, 3])[commands]).mean() >= 0.99

# ---- the file ------------------------------------------------------------------------------------

SOURCE = Path(vdm.__file__).read_text()
TREE = ast.parse(SOURCE)
BANNERS = [match.start() for match in re.finditer(r"^# #+\n# PART I+\. ", SOURCE, re.M)]
PART_I = SOURCE[:BANNERS[1]]                                           # with the imports

def bound(node):
    """The names that a statement of a module binds."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node]
    return {getattr(target, "id", getattr(target, "name", None)) for target in targets} - {None}

NODES = {name: node for node in TREE.body for name in bound(node)}

def globals_of(code):
    """The names that compiled code looks up and does not set, with all the code inside it."""
    steps = list(dis.get_instructions(code))
    names = {i.argval for i in steps if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    names -= {i.argval for i in steps if i.opname == "STORE_NAME"}
    return names.union(*(globals_of(c) for c in code.co_consts if isinstance(c, types.CodeType)))

def test_docstrings_and_lines():
    public = [node for node in TREE.body if hasattr(node, "name")]
    assert len(public) > 80 and not [node.name for node in public if not ast.get_docstring(node)]
    assert not [i for i, line in enumerate(SOURCE.splitlines(), 1) if len(line) > 100]

def test_the_map_lists_the_sections_in_order():
    chart = ast.get_docstring(TREE).partition("\nPart I ")[2].partition("\nShapes")[0]
    chart = re.findall(r"\b(\d+) ([A-Z]\w*)", chart)
    banners = re.findall(r"^# =+\n# (\d+)\. (\w+).*\n# =+$", SOURCE, re.M)
    assert chart == banners and [int(n) for n, _ in chart] == list(range(1, len(chart) + 1)) != []

def test_no_name_is_missing():
    """Whatever any function looks up exists, on ways too that no test takes."""
    missing = globals_of(compile(TREE, "vdm", "exec")) - vars(vdm).keys() - vars(builtins).keys()
    assert not {name for name in missing if not name.startswith("__")}

def test_part_I_is_short_and_needs_nothing_below():
    assert SOURCE[BANNERS[0]:BANNERS[1]].count("\n") <= 600
    tree = ast.parse(PART_I)
    below = NODES.keys() - {name for node in tree.body for name in bound(node)}
    assert len(below) > 50 and not globals_of(compile(tree, "part I", "exec")) & below

def test_part_I_runs_alone(tmp_path):
    """Its demo, in a namespace that holds nothing else, writes a GIF that moves."""
    space = {"__name__": "part_I"}
    exec(compile(PART_I, "part I", "exec"), space)
    space["karras_sigmas"] = lambda n: vdm.karras_sigmas(3)            # fewer steps, for speed
    space["demo"](path=tmp_path / "demo.gif", steps=2, batch=2)
    frames = np.stack(iio.imread(tmp_path / "demo.gif")).astype(float)
    assert len(frames) > 4 and frames.shape[3] == 3 and frames.std(0).max() > 1

# ---- the paste guide -----------------------------------------------------------------------------

GUIDE = Path(vdm.__file__).with_name("README.md").read_text()
GUIDE = {piece: re.findall(r"`(\w+)`", needs)        # rows: | pieces | take with it | imports |
         for pieces, needs in re.findall(r"^\| (`[\w`, ]+) \|(.*\|.*)\|$", GUIDE, re.M)
         for piece in re.findall(r"\w+", pieces)}
SHAPE = 2, 4, 3, 8, 8
CLIP = torch.linspace(0, 99, 1536).sin().view(SHAPE)
SIGMA = torch.tensor([0.5, 2.0])
SIGMAS = torch.tensor([4.0, 2.0, 1.0, 0.0])
GIVEN = dict(context=CLIP, mask=torch.tensor([[1.0, 0, 0, 0]]).expand(2, 4))

def shrink(x, sigma, context=0.0, mask=None, temporal=1.0):
    """A denoiser that heeds what it is told."""
    return x / (1 + vdm.expand(sigma, x)) + 0.1 * temporal + 0.2 * context

CALLS = dict(                       # of each piece in README's table: called with small inputs
    lognormal=lambda v: v.lognormal(SIGMA / 4),
    first_frames=lambda v: v.first_frames(5, 3, [0.2, 0.3, 0.5]),
    independent_levels=lambda v: v.independent_levels(SIGMA / 4, 3, 0.5),
    PerFrame=lambda v: v.PerFrame(lambda x, c_noise: 0.3 * x)(CLIP, SIGMA, **GIVEN),
    ae_loss=lambda v: v.ae_loss(
        randomize(vdm.Autoencoder(width=8)), CLIP, torch.ones(2, 4, 4, 2, 2)),
    karras_sigmas=lambda v: v.karras_sigmas(5),
    offset_noise=lambda v: v.offset_noise(CLIP, 0.1),
    scalings=lambda v: [v.scalings(SIGMA, kind) for kind in KINDS],
    Denoiser=lambda v: v.Denoiser(lambda x, c_noise, concat: 0.3 * x)(CLIP, SIGMA, **GIVEN),
    diffusion_loss=lambda v: v.diffusion_loss(shrink, CLIP, SIGMA, 1 - CLIP),
    vista_loss=lambda v: v.vista_loss(shrink, CLIP, SIGMA, 1 - CLIP),
    high_pass=lambda v: v.high_pass(CLIP),
    sample_ddim=lambda v: v.sample_ddim(shrink, CLIP, SIGMAS),
    sample_heun=lambda v: v.sample_heun(shrink, CLIP, SIGMAS),
    sample_dpmpp_2m=lambda v: v.sample_dpmpp_2m(shrink, CLIP, SIGMAS, eta=1.0),
    sample_ddpm=lambda v: v.sample_ddpm(shrink, CLIP, SIGMAS, gamma=0.5),
    invert_ddim=lambda v: v.invert_ddim(shrink, CLIP, SIGMAS, iterations=2),
    guided=lambda v: v.guided(shrink, 2.0)(CLIP, SIGMA, **GIVEN),
    skip_guided=lambda v: v.skip_guided(shrink, 2.0)(CLIP, SIGMA),
    reconstruction_guided=lambda v: v.reconstruction_guided(shrink, **GIVEN)(CLIP, SIGMA),
    generate=lambda v: v.generate(shrink, SHAPE, SIGMAS, seed=1),
    rollout=lambda v: [*v.rollout(shrink, 6, SHAPE, SIGMAS, overlap=2, context=CLIP[:, :1])],
    TemporalConv=lambda v: randomize(v.TemporalConv(3))(CLIP),
    TemporalAttention=lambda v: randomize(v.TemporalAttention(8, 8))(CLIP.transpose(2, 3)),
    VideoUNet=lambda v: randomize(v.VideoUNet(width=8, head_dim=8))(CLIP, torch.zeros(2, 4)),
    EMA=lambda v: (ema := v.EMA(nn.Linear(2, 2))).update(nn.Linear(2, 2)) or ema.model.weight,
    LoRA=lambda v: v.LoRA(nn.Linear(8, 8))(CLIP),
    MovingShapes=lambda v: [v.MovingShapes()[0], v.MovingShapes().check(CLIP)],
    stream=lambda v: [*v.stream(shrink, 6, SHAPE, SIGMAS, 2)],
    PlaneUNet=lambda v: randomize(v.PlaneUNet(width=32, mults=(1, 2), attention=("none", "joint"),
                                              sizes=vdm.plane_sizes(4, 4, 4)))(
        torch.ones(2, 1, 4, 1, 48), torch.zeros(2, 1)),
    TriplaneAutoencoder=lambda v: randomize(v.TriplaneAutoencoder(grid=(4, 2, 2))).encode(CLIP),
    FrameAttention=lambda v: randomize(v.FrameAttention(
        vdm.TemporalConv(8), vdm.Attention(8, 8), vdm.sparse_causal))(CLIP.transpose(2, 3)))

@cases("piece", sorted(CALLS))
def test_pasted_alone_it_does_what_it_does_here(piece, monkeypatch, tmp_path):
    """notebooks/paste.py prints all that it needs, and no more."""
    text = paste.paste(piece)
    names = [node.name for node in ast.parse(text).body if hasattr(node, "name")]
    assert all(len(re.findall(rf"\b{name}\b", text)) > 1 for name in {*names} - {piece})
    space = {"__name__": "pasted"}
    exec(text, space)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    got = CALLS[piece](types.SimpleNamespace(**space))
    torch.manual_seed(1)
    agree(got, CALLS[piece](vdm))

def test_everything_can_be_pasted_alone():
    """No piece of vdm.py looks up a name that neither its text nor Python has."""
    for piece in paste.read()[1]:
        space = {"__name__": "pasted"}
        code = compile(paste.paste(piece), "", "exec")
        exec(code, space)
        own = [vars(made).keys() for made in space.values() if isinstance(made, type)]
        known = {"__module__", "__qualname__", *dir(builtins)}.union(space, *own)
        assert {*paste.used_names(code)} <= known, piece

@cases("piece", sorted(GUIDE))
def test_the_paste_guide_names_what_is_needed(piece):
    assert {piece, *GUIDE[piece]} == paste.needs(piece)

@cases("pieces, words", [([], "name functions"), (["EMA", "nothing"], "defines no nothing$"),
    (["rolout"], "defines no rolout, but rollout$")])
def test_what_cannot_be_pasted(pieces, words):
    with pytest.raises(ValueError, match=words):
        paste.paste(*pieces)

# ==================================================================================================
# MovingShapes
# ==================================================================================================

SIZES = 16, 32, 64
SOME = {16: 50, 32: 40, 64: 12}         # forged clips; of 12 not one may pass
COLORS = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])

# ---- clips ---------------------------------------------------------------------------------------

def real(count, size):
    """Clips as the world makes them."""
    world = vdm.MovingShapes(8, (size, size), seed=11)
    return torch.stack([world[i]["video"] for i in range(count)])

def story(rng, frames, late=1.0, grow=1.0, radius=(0.18, 0.25)):
    """A lawful life in a room of side 1, moved in small steps: y, x and r of each frame.

    From the middle on the shape is `late` times as fast. `grow` is how far it will swell."""
    r = rng.uniform(*radius)
    wall = r * grow
    place = rng.uniform(wall, 1 - wall, 2)
    angle = rng.uniform(0, 2 * np.pi)
    way = rng.uniform(0.03, 0.08) * np.array([np.sin(angle), np.cos(angle)])
    path = []
    for t in range(frames):
        path.append(place.copy())
        for _ in range(20):
            place += way / 20 * (late if t >= frames // 2 else 1)
            way = np.where(place < wall, np.abs(way), np.where(place > 1 - wall, -np.abs(way), way))
    y, x = np.transpose(path)
    return y, x, np.full(frames, r)

def paint(kind, y, x, r, size, color):
    """Paint one shape per frame, by the share of 4 x 4 points of each pixel that lie in it."""
    fine = (np.arange(4 * size) + 0.5) / (4 * size)
    frames = []
    for k, cy, cx, radius in zip(kind, y, x, r):
        v, u = np.meshgrid(fine - cy, fine - cx, indexing="ij")
        inside = [np.hypot(v, u) < radius,
                  np.maximum(abs(v), abs(u)) < radius,
                  (abs(v) < radius) & (abs(u) < (v + radius) / 2)][k]
        frames.append(inside.reshape(size, 4, size, 4).mean((1, 3)))
    return torch.tensor(np.array(frames)[:, None] * np.reshape(color, (3, 1, 1)) * 2 - 1).float()

def jump(x, r, half):
    """A coordinate that jumps at frame `half` to the wall that is farther, and goes on there."""
    far = np.where(x[half] < 0.5, 1 - r, r) - x[half]
    return np.where(np.arange(len(x)) >= half, np.clip(x + far, r, 1 - r), x)

STORIES = {"too small": dict(radius=(0.09, 0.13)), "too large": dict(radius=(0.32, 0.36)),
           "speed doubles": dict(late=2.0), "grows": dict(grow=1.4), "pulses": dict(grow=1.4)}
PAINTED = ["kinds alternate", "kind changes", "one frame of another kind", "grows", "pulses",
           "teleports", "too small", "too large", "speed doubles"]

def painted(how, count, size, frames=8):
    """Clips painted here: lawful ones, and ones with one law broken on purpose."""
    rng = np.random.default_rng(5)
    clips = []
    t = np.arange(frames)
    half = frames // 2
    swell = {"grows": np.linspace(1, 1.4, frames), "pulses": 1.2 + 0.2 * np.cos(np.pi * t / 2)}
    for _ in range(count):
        first = rng.integers(3)
        color = COLORS[rng.integers(6)]
        y, x, r = story(rng, frames, **STORIES.get(how, {}))
        other = (first + rng.integers(1, 3)) % 3
        kind = {"kinds alternate": t % 2, "kind changes": np.where(t < half, first, other),
                "one frame of another kind": np.where(t == half, other, first)}
        if how == "teleports":
            y, x = (jump(place, r, half) for place in (y, x))
        clips.append(paint(kind.get(how, np.full(frames, first)), y, x, r * swell.get(how, 1),
                           size, color))
    return torch.stack(clips)

def late(broken):
    """A forgery whose second half alone is broken."""
    return lambda lit: torch.cat([lit[:, :4], broken(lit)[:, 4:]], 1)

def two_shapes(lit):
    """On top of each clip the one of the batch whose shape overlaps least with its own."""
    shape = lit.amax(2).flatten(1)
    return torch.maximum(lit, lit[(shape @ shape.T).argmin(1)])

def with_a_dot(lit):
    """In the corner that the shape comes least close to."""
    H, W = lit.shape[3:]
    corner = lit.amax((1, 2)).unflatten(2, (2, W // 2)).unflatten(1, (2, H // 2)).sum((2, 4))
    new = lit.clone()
    for clip, place in zip(new, corner.flatten(1).argmin(1).tolist()):
        y = place // 2 * (H - H // 8)
        x = place % 2 * (W - W // 8)
        clip[:, :, y:y + H // 8, x:x + W // 8] = clip[:1].amax((2, 3))[..., None, None]
    return new

def lower_half(lit):
    """What lies below the middle of the shape, in each frame."""
    seen = (lit.amax((2, 4), keepdim=True) > 0.5).float()
    return lit * (seen.cumsum(3) > 0.5 * seen.sum(3, keepdim=True))

def each_frame_times(values):
    return lambda lit: lit * torch.tensor(values)[:, None, None, None]

noise = lambda *shape: torch.rand(shape, generator=torch.Generator().manual_seed(1))
white = lambda lit: lit.amax(2, keepdim=True).expand(lit.shape)
tint = lambda *color: torch.tensor(color)[:, None, None]
FORGED = {                              # clips wrong by construction, of light lit from 0 to 1
    "plain red frames": lambda lit: 0 * lit + tint(1.0, 0, 0),
    "red noise": lambda lit: tint(1.0, 0, 0) * noise(*lit[:, :, :1].shape),
    "black": torch.zeros_like,
    "white noise": lambda lit: noise(*lit.shape),
    "shuffled": lambda lit: lit[:, [3, 6, 0, 5, 1, 7, 4, 2]],
    "frozen": lambda lit: lit[:, :1].expand(lit.shape),
    "colour changes": late(lambda lit: lit.roll(1, 2)),
    "vanishes": late(torch.zeros_like),
    "blinks": each_frame_times([1, 1, 0, 1, 1, 1, 1, 1]),
    "another clip's end": late(lambda lit: lit.roll(1, 0)),
    "left half": lambda lit: lower_half(lit.mT.flip(3)).flip(3).mT,
    "lower half": lower_half,
    "flickers": each_frame_times([1, 0.5] * 4),
    "fades": each_frame_times([1 - 0.1 * t for t in range(8)]),
    "negative": lambda lit: 1 - lit,
    "very dark": lambda lit: 0.1 * lit,
    "a second shape": two_shapes,
    "a second shape late": late(two_shapes),
    "a dot": with_a_dot,
    "white": white,
    "orange": lambda lit: white(lit) * tint(1, 0.5, 0)}

def forge(how, clips):
    return FORGED[how]((clips + 1) / 2) * 2 - 1

def by_pictures(change):
    """A change of clips by way of PIL's pictures, of 8 bits."""
    def changed(clips):
        pictures = vdm.to_uint8(clips).reshape(-1, *clips.shape[3:], 3)
        new = np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pictures])
        return vdm.from_uint8(new).view(clips.shape)

    return changed

def jpeg(picture):
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=75 if picture.width == 16 else 50)
    return Image.open(file)

def blur(picture):
    return picture.filter(ImageFilter.GaussianBlur(0.6 if picture.width == 16 else 1.2))

HARMLESS = {                            # who looks at the clip still sees the same shape
    "brightness x0.8": lambda clips: 0.8 * (clips + 1) - 1,
    "lifted black": lambda clips: 0.9 * clips,
    "blur": by_pictures(blur),
    "jpeg": by_pictures(jpeg),
    "noise": lambda clips: clips + 0.03 * torch.randn(clips.shape)}

def check(clips):
    return vdm.MovingShapes(clips.shape[1], clips.shape[-2:]).check(clips)

@pytest.fixture(scope="module")
def clips():
    """Clips of one shape, of every size."""
    return {size: real(100, size) for size in SIZES}

# ---- the world -----------------------------------------------------------------------------------

@cases("i, label, total, at", [         # label, sum, and sum at pixel (12, 12) of frame 2
    (0, 3, -18789.171, 1.0), (1, 13, -22570.885, -3.0), (2, 17, -22243.177, -3.0)])
def test_clips_are_those_of_the_first_edition(i, label, total, at):
    item = vdm.MovingShapes(8, (32, 32), seed=0)[i]
    video = item["video"].double()
    assert item["label"] == label
    assert video.sum().item() == pytest.approx(total, abs=1e-2)
    assert video[2, :, 12, 12].sum().item() == pytest.approx(at, abs=1e-4)

# ---- what passes ---------------------------------------------------------------------------------

@cases("size", SIZES)
def test_real_clips_pass(clips, size):
    """And what is seen of them is what was drawn."""
    got = check(clips[size])
    assert got["passed"].mean() >= 0.99
    world = vdm.MovingShapes(8, (size, size), seed=11)
    labels = [world[i]["label"] for i in range(100)]
    assert (6 * got["kinds"] + got["colors"] == labels).all()

@cases("size", SIZES)
@cases("how", HARMLESS)
def test_harmless_changes_pass(clips, size, how):
    assert check(HARMLESS[how](clips[size][:25 if size == 64 else 60]))["passed"].mean() > 0.95

@cases("size, frames", [(16, 8), (32, 8), (64, 8), (32, 16)])
def test_clips_painted_by_other_means_pass(size, frames):
    """All of them lawful; their true speed and kind are seen."""
    assert check(painted("lawful", 40, size, frames))["passed"].mean() >= 0.975
    x = 0.3 + 0.02 * np.arange(frames)
    for kind in range(3):
        clip = paint([kind] * frames, [0.4] * frames, x, [0.2] * frames, size, (0, 1, 1))
        got = check(clip[None])
        assert got["passed"][0]
        assert (got["kinds"][0], got["colors"][0]) == (kind, 5)
        assert got["speeds"][0] == pytest.approx(0.02, abs=0.003)

@cases("frames, size", [(32, (32, 32)), (16, (24, 64)), (16, (64, 24))])
def test_long_clips_and_oblong_ones_pass(frames, size):
    world = vdm.MovingShapes(frames, size, seed=3)
    assert world.check(torch.stack([world[i]["video"] for i in range(12)]))["passed"].all()

@cases("size, stride", [(16, 4), (32, 2), (64, 4)])
def test_stride(size, stride):
    """Every stride-th frame of the clips without one. In another order they are no path."""
    world = vdm.MovingShapes(12, (size, size), seed=2, stride=stride)
    whole = vdm.MovingShapes(11 * stride + 1, (size, size), seed=2)
    some = torch.stack([world[i]["video"] for i in range(40)])
    assert all(torch.equal(some[i], whole[i]["video"][::stride]) for i in range(40))
    assert world.check(some)["passed"].mean() >= 0.95
    assert world.check(some[:, [2, 0, 4, 1, 3]])["passed"].mean() < 0.2
    assert world.check(some[:, :1].expand_as(some))["moving"].mean() == 0

# ---- what does not -------------------------------------------------------------------------------

@cases("size", SIZES)
@cases("how", FORGED)
def test_forgeries_fail(clips, size, how):
    assert check(forge(how, clips[size][:SOME[size]]))["passed"].mean() < 0.05

@cases("size", SIZES)
@cases("how", PAINTED)
def test_painted_forgeries_fail(size, how):
    frames = 16 if how == "speed doubles" else 8
    assert check(painted(how, SOME[size], size, frames))["passed"].mean() < 0.05

# Each law has clips that break it and keep the others as far as that can be.
@cases("law, how", [
    ("shape", "kinds alternate"), ("shape", "kind changes"), ("color", "colour changes"),
    ("color", "flickers"), ("size", "grows"), ("size", "too large"), ("path", "teleports"),
    ("path", "shuffled"), ("moving", "frozen")])
def test_the_law_that_is_broken_is_the_one_that_is_named(clips, law, how):
    bad = painted(how, 40, 32) if how in PAINTED else forge(how, clips[32][:40])
    assert check(bad)[law].mean() < 0.05

def test_nan_does_not_pass(clips):
    bad = clips[16][:3].clone()
    bad[0, 2, 0, 3, 3] = np.nan
    assert list(check(bad)["passed"]) == [False, True, True]

@cases("change", [lambda lit: lit, lambda lit: lit + 0.02 * torch.randn(lit.shape),
                  lambda lit: 255 * lit, lambda lit: lit.clamp(min=0.5) * 2 - 1])
def test_values_from_0_to_1_are_refused(clips, change):
    with pytest.raises(ValueError, match=r"expects -1 .* 2 \* clips - 1"):
        check(change((clips[16] + 1) / 2))

@cases("size", SIZES)
def test_copies_are_counted(clips, size):
    some = clips[size]
    assert check(some)["copies"] == 0
    assert check(some[:1] + 0.03 * torch.randn(16, *some.shape[1:]))["copies"] == 15
    assert check(some[:20].repeat(2, 1, 1, 1, 1))["copies"] == 20
    assert check(some[[0, 1, 2, 3, 2, 2]])["copies"] == 2
    assert check(forge("black", some[:8]))["copies"] == 7
    assert check(forge("white noise", some[:8]))["copies"] == 0

# ==================================================================================================
# Video files
# ==================================================================================================

MERGED = [0, 1, 2, 3, 3, 3, 4, 4, 5, 6, 7, 8, 9, 10, 10, 10]        # GIF stores 11 frames of these

def flat(T, H=32, W=32, C=3):
    """Frame t is 8 t everywhere."""
    return np.tile(np.arange(T, dtype=np.uint8)[:, None, None, None] * 8, (1, H, W, C))

def brightness(frames):
    """uint8 (T, H, W, C) -> the t of each frame of flat(), read off its centre."""
    return np.round(frames[:, frames.shape[1] // 2, frames.shape[2] // 2, 0] / 8).tolist()

def save(path, frames, **options):
    if path.suffix in (".gif", ".webp"):
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True, **options)
    else:
        iio.imwrite(path, frames, plugin="FFMPEG", macro_block_size=2, **options)

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of videos of all kinds, whole and damaged."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("a/b", "frames", "few", ".hidden", "empty"):
        (folder / name).mkdir(parents=True)
    save(folder / "UP.MP4", flat(20), fps=10)
    save(folder / "a/b/odd.mkv", flat(16, 46, 62), fps=20)
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3)).astype(np.uint8)
    save(folder / "mute.mp4", noise, fps=10)
    sound = [imageio_ffmpeg.get_ffmpeg_exe(), *"-v error -f lavfi -i sine=d=9 -i".split()]
    long = folder / "a/long.mp4"                 # 4 s of pictures, 9 s of sound; the header first
    subprocess.run([*sound, folder / "mute.mp4", "-movflags", "faststart", long])
    data = long.read_bytes()
    (folder / "a/cut.mp4").write_bytes(data[:len(data) // 3])
    rgb = [Image.fromarray(f) for f in flat(16, 31, 45)]
    save(folder / "grey.gif", [p.convert("L") for p in rgb], duration=100)
    save(folder / "nine.gif", rgb[:9], duration=100)
    save(folder / "merged.gif", [rgb[t] for t in MERGED], duration=40)
    save(folder / "moves.webp", rgb, duration=50)
    for t, picture in enumerate(rgb):
        picture.save(folder / f"frames/frame{t + 1}.{['png', 'tif', 'bmp'][t % 3]}")
    rgb[2].save(folder / "few/2.JPG")
    np.save(folder / "five.npy", np.stack([flat(16)] * 3))
    np.save(folder / "grey.npy", flat(17)[..., 0])
    for name in ("notes.txt", ".hidden/x.mp4", "bad.mp4"):
        (folder / name).write_text("x")
    return folder

# ---- reading -------------------------------------------------------------------------------------

@cases("name, shape, rate", [
    ("a/b/odd.mkv", (16, 46, 62), 20), ("merged.gif", (16, 31, 45), 25),
    ("moves.webp", (16, 31, 45), 20), ("few/2.JPG", (1, 31, 45), 8),
    ("a/long.mp4", (40, 64, 64), 10), ("frames", (16, 31, 45), 8), ("grey.npy", (17, 32, 32), 8)])
def test_decode(made, name, shape, rate):
    """Shapes and speeds; the brightness of frames in order, pictures in their natural one."""
    (frames,), fps = vdm.decode(made / name)
    assert (frames.shape, fps, frames.dtype) == ((*shape, 3), rate, np.uint8)
    order = {"merged.gif": MERGED, "few/2.JPG": [2]}.get(name, list(range(shape[0])))
    if name != "a/long.mp4":                                                # which is noise
        assert brightness(frames) == order

@cases("name, cause", {"none.mp4": "does not exist", "bad.mp4": "Invalid data",
                       "a/cut.mp4": "ffmpeg cannot read all: ", "notes.txt": "cannot identify",
                       "empty": "without pictures"}.items())
def test_damaged_videos_are_named_with_the_cause(made, name, cause):
    with pytest.raises(ValueError, match=f"{name}:? .*{cause}") as error:
        vdm.read_video(made / name)
    assert "\n" not in str(error.value)

@pytest.mark.filterwarnings("ignore::UserWarning")                   # PIL's, of damaged tags
@cases("suffix", [".gif", ".webp", ".png", ".jpg", ".bmp", ".tif", ".npy", ".npz"])
def test_whatever_is_damaged_is_a_valueerror_or_read(tmp_path, suffix):
    """Cut anywhere, overwritten anywhere, or another kind of file behind the suffix."""
    rng = np.random.default_rng(0)
    clip = flat(8) + rng.integers(0, 30, (8, 32, 32, 3)).astype(np.uint8)
    first, *others = [Image.fromarray(f) for f in clip]
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, clip)
    elif suffix == ".npz":
        np.savez_compressed(path, clip)
    else:
        first.save(path, save_all=suffix in (".gif", ".webp"), append_images=others)
    data = path.read_bytes()
    for damaged in [data[:n] for n in range(0, len(data), len(data) // 12)] + [rng.bytes(500)]:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(f"{path}: ") + r"\S"):
            vdm.decode(path)
    for k in [*range(20), *rng.integers(len(data), size=20)]:
        damaged = bytearray(data)
        damaged[k] ^= 255
        path.write_bytes(damaged)
        try:
            vdm.decode(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")

def test_what_a_phone_stores(tmp_path):
    """A picture that EXIF says to turn."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :8] = 200                                                              # on the left
    exif = Image.Exif()
    exif[0x0112] = 6                                             # to be turned clockwise: on top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    read = vdm.decode(tmp_path / "turned.png")[0][0][0]
    assert read.shape == (24, 16, 3)
    assert (read[:8] == 200).all()
    assert (read[8:] == 0).all()

def test_pictures_of_more_bits_and_half_transparent_ones(tmp_path):
    """Of more than 8 bits and of floats, nobody knows what is white: they are refused."""
    for dtype, mode in ((np.uint16, "I;16"), (np.int32, "I"), (np.float32, "F")):
        Image.fromarray(np.ones((16, 16), dtype)).save(tmp_path / "b.tiff")
        with pytest.raises(ValueError, match=f"b.tiff: pixels of mode {mode}, expected 8 bits"):
            vdm.read_video(tmp_path / "b.tiff")
    for mode, pixel in (("LA", (200, 51)), ("RGBA", (200, 200, 200, 51))):   # a fifth is opaque
        Image.new(mode, (8, 8), pixel).save(tmp_path / "c.png")
        for channels in (1, 3):
            assert (vdm.decode(tmp_path / "c.png", (4, 4), channels)[0][0] == 40).all()

@cases("shape", [(16, 32, 31, 4), (1, 32, 31, 3), (3, 32, 31, 4), (2, 3, 32, 31, 3)])
def test_arrays(tmp_path, shape):
    """One clip or many, with colour or more."""
    np.save(tmp_path / "few.npy", np.zeros(shape, np.uint8))
    assert vdm.read_video(tmp_path / "few.npy").shape == (shape[-4], 3, 32, 31)

RAMP = np.linspace(0, 1, 2 * 16 * 32 * 32, dtype=np.float32).reshape(2, 16, 32, 32)

@cases("array, words", [
    (np.array([print], object), ""),
    (np.zeros((16, 3, 32, 32), np.uint8), r"uint8 \(16, 3, 32, 32\): .*put the channels last, "),
    (RAMP, r"expected uint8 .* found float32 \(2, 16, 32, 32\): multiply values of 0 to 1 by 2"),
    (2 * RAMP - 1, "of -1 to 1: add 1, multiply by 127.5"),
    (RAMP[:, :3, None], r"channels last, np.moveaxis\(x, -3, -1\)"),
    (RAMP[0, 0], r"float32 \(32, 32\): multiply")])
def test_other_arrays_are_refused_with_what_converts_them(tmp_path, array, words):
    """Code, channels first, other numbers."""
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match="a.npy: .*" + words):
        vdm.read_video(tmp_path / "a.npy")

def test_moving_mnist_and_a_train_folder(tmp_path):
    """The first is stored as (T, N, H, W); of the second, test/ is not looked at."""
    mnist = np.arange(20)[:, None, None, None] + 10 * np.arange(21)[None, :, None, None]
    mnist = np.tile(mnist.astype(np.uint8), (1, 1, 64, 64))
    for name, clips in (("mnist_test_seq", mnist.swapaxes(0, 1)), ("twenty_clips", mnist)):
        np.save(tmp_path / f"{name}.npy", mnist)
        data = vdm.VideoFolder(tmp_path / f"{name}.npy", 20, (64, 64))
        assert [c[:, 0, 0, 0].tolist() for c in data.clips] == clips[:, :, 0, 0].tolist()
        assert f", {clips.shape[1]} frames each" in data.report
    np.save(tmp_path / "mnist_test_seq.npy", mnist.astype(float))
    with pytest.raises(ValueError, match=r"found float64 \(20, 21, 64, 64\): mult"):
        vdm.decode(tmp_path / "mnist_test_seq.npy")
    for name, n in (("train", 1), ("test", 2)):
        (tmp_path / "own" / name / "class").mkdir(parents=True)
        np.save(tmp_path / "own" / name / "class/x.npy", np.zeros((n, 16, 8, 8, 3), np.uint8))
    assert len(vdm.VideoFolder(tmp_path / "own", 16, (8, 8))) == 1
    with pytest.raises(ValueError, match="missing does not exist"):
        vdm.VideoFolder(tmp_path / "missing", 16, (8, 8))

# ---- rates ---------------------------------------------------------------------------------------

UNEVEN = "-vf settb=1/1000,setpts=10*N*N -fps_mode passthrough -enc_time_base 1:1000".split()

def test_frames_of_a_variable_rate(tmp_path):
    """Frame n is shown from 10 n^2 ms on, and read once. A rate chooses those nearest in time, of
    an even rate, too. Arrays store no rate: that which is told is believed."""
    for name in ("a.mp4", "b.mkv"):
        save(tmp_path / name, flat(16), fps=25, output_params=UNEVEN)
        (frames,), fps = vdm.decode(tmp_path / name)
        assert (brightness(frames), fps) == (list(range(16)), round(15 / 2.25, 2))
        for rate in (4, 10, 50):
            (frames,), fps = vdm.decode(tmp_path / name, rate=rate)
            wanted = np.arange(0, 2250.1, 1000 / rate)
            nearest = abs(wanted[:, None] - 10 * np.arange(16) ** 2).argmin(1)
            assert (brightness(frames), fps) == (nearest.tolist(), rate)
    save(tmp_path / "even.mp4", flat(20), fps=20)
    (frames,), fps = vdm.decode(tmp_path / "even.mp4", rate=10)
    assert brightness(frames) == list(range(0, 20, 2))
    save(tmp_path / "a.gif", [Image.fromarray(f) for f in flat(9)], duration=50)
    assert brightness(vdm.decode(tmp_path / "a.gif", rate=10)[0][0]) == [0, 2, 4, 6, 8]
    np.save(tmp_path / "a.npy", flat(9))
    clips, fps = vdm.decode(tmp_path / "a.npy", rate=10)
    assert clips.shape[1] == 9 and fps == 10

def test_mixed_rates_are_listed_and_made_one(tmp_path):
    """The rate printed is that of the clips used: three of 8 frames a second, two of 20."""
    np.save(tmp_path / "a.npy", np.stack([flat(12)] * 3))
    for name, n, rate in (("b", 12, 20), ("c", 12, 20), ("short", 3, 40)):
        save(tmp_path / f"{name}.mp4", flat(n), fps=rate)
    folder = partial(vdm.VideoFolder, tmp_path, 4, (8, 8), cache=True)
    data = folder()
    assert (data.fps, data.rates, [*map(len, data.clips)]) == (8, [8] * 3 + [20] * 2, [12] * 5)
    assert "different rates, 8 to 20 fps: --data-fps 8 chooses" in data.report
    data = folder(data_fps=10)
    assert data.rates == [10] * 5 and "warning" not in data.report
    assert brightness(data.clips[4][:]) == [0, 2, 4, 6, 8, 10]
    assert [*map(len, folder().clips)] == [12] * 5

# ---- a folder ------------------------------------------------------------------------------------

def test_folder_report_and_pixels(made):
    data = vdm.VideoFolder(made, frames=16, size=(24, 24))
    for words in (f"data: 15 files in {made} -> 12 clips used, 5 skipped, 24x24 crop, 3 channels, "
                  "10 fps, 16 to 40 frames each", "warning: clips have different rates, 8 to 25",
                  f"skipped {made / 'few'} (its pictures): 1 frames are too few, a clip takes 16",
                  "nine.gif: 9 frames", "notes.txt: cannot", "cut.mp4: ffmpeg", "bad.mp4: ffmpeg"):
        assert words in data.report, data.report
    grey = [clip for clip in data.clips if (clip == clip[..., :1]).all()]          # not the noise
    assert sorted(map(brightness, grey)) == sorted(
        [list(range(n)) for n in (16,) * 7 + (17, 20)] + [MERGED])
    with pytest.raises(ValueError, match="grey.npy: 17 frames are too few, a clip takes 22: "):
        vdm.VideoFolder(made / "grey.npy", 8, (24, 24), stride=3)

def test_a_hostile_folder(tmp_path):
    """Links in circles, runs, odd names, damage: what can be read is read, a real file once."""
    odd = ["a b", "q'u\"o", "new\nline", "ünï→", "-dash", "100%d", "[x]*?", "c:d", "#1", "\\",
           os.fsdecode(b"\xff")]
    (tmp_path / "d/deep").mkdir(parents=True)
    save(tmp_path / "x.mp4", flat(8), fps=10)
    for name in odd:
        shutil.copy(tmp_path / "x.mp4", tmp_path / f"d/{name}.mp4")
        (tmp_path / f"d/deep/{name}.mkv").write_text("broken")
    for link, to in (("deep/up", ".."), ("self", "self"), ("deep/here", "."), ("z", "deep"),
                     ("gone.mp4", "nowhere"), ("0.mp4", "a b.mp4"), ("zz.mp4", "a b.mp4")):
        (tmp_path / "d" / link).symlink_to(to)
    (tmp_path / "d/link.mp4").symlink_to(tmp_path / "x.mp4")
    os.mkfifo(tmp_path / "d/pipe.mp4")
    for run in ("out", "older"):
        (tmp_path / "d" / run / "samples").mkdir(parents=True)
        shutil.copy(tmp_path / "x.mp4", tmp_path / "d" / run / "samples/final.mp4")
    (tmp_path / "d/older/last.pt").touch()
    (tmp_path / "d/alias").symlink_to("out")
    files = vdm.find_files(tmp_path / "d", without=tmp_path / "d/alias")
    read = [f"{name}.mp4" for name in odd] + ["link.mp4"]
    assert sorted(p.name for p in files if p.suffix == ".mp4") == sorted(read)
    assert len(files) == 2 * len(odd) + 1
    data = vdm.VideoFolder(tmp_path / "d", 4, (8, 8), without=tmp_path / "d/out")
    assert len(data) == len(odd) + 1 and f"{len(odd)} skipped" in data.report
    assert data.report.encode() and len(data.report.splitlines()) == 11       # a head, 9, "2 more"

def test_5000_small_files(tmp_path, monkeypatch):
    """The cache's folder is listed once, not for every file."""
    for n in range(5000):
        (tmp_path / f"{n}.npy").touch()
    listed = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scan(path))
    monkeypatch.setattr(os, "listdir", None)
    monkeypatch.setattr(vdm, "decode", lambda *a: (np.zeros((1, 1, 8, 8, 3), np.uint8), 8.0))
    for _ in range(2):
        data = vdm.VideoFolder(tmp_path, 1, (8, 8), cache=True)
        assert len(data) == 5000 and data[4999]["video"].shape == (1, 3, 8, 8)
    assert len(listed) < 20

def test_items_depend_on_seed_and_index_only(tmp_path):
    for n in range(5):
        np.save(tmp_path / f"{n}.npy", flat(12 + n, C=1) + np.uint8(n))       # brightness 8 t + n
    data, again, other = (vdm.VideoFolder(tmp_path, 4, (32, 32), stride=3, seed=seed)
                          for seed in (1, 1, 2))
    values = np.stack([vdm.to_uint8(data[i]["video"])[:, 0, 0, 0] for i in range(20)])
    assert (vdm.to_uint8(again[17]["video"])[:, 0, 0, 0] == values[17]).all()
    assert (np.diff(values) == 3 * 8).all()                                   # stride 3, in order
    clips = (values[:, 0] % 8).reshape(4, 5)                                       # of 4 rounds
    assert (np.sort(clips) == np.arange(5)).all()
    assert len(np.unique(clips, axis=0)) > 1
    assert len(np.unique(values[:, 0])) > 5                           # not always the same window
    assert sum(torch.equal(data[i]["video"], other[i]["video"]) for i in range(20)) < 10
    assert data.fps == 8 / 3
    grey = vdm.VideoFolder(tmp_path, 4, (8, 8), channels=1)
    assert grey[0]["video"].shape == (4, 1, 8, 8)
    assert grey[0].keys() == {"video"}

def test_actions_beside_a_clip(tmp_path):
    """Frame t shows t and is told (t, k) of clip k, clip 0 nothing."""
    told = lambda n, k: np.stack([np.arange(n), np.full(n, k)], 1)
    (tmp_path / "pictures").mkdir()
    for t, picture in enumerate(flat(12)):
        Image.fromarray(picture).save(tmp_path / f"pictures/{t}.png")
    save(tmp_path / "film.v2.mp4", flat(14), fps=10)
    np.save(tmp_path / "two.npy", np.stack([flat(12)] * 2))
    np.save(tmp_path / "bare.npy", flat(12))
    for name, actions in (("pictures", told(12, 1)), ("film.v2", told(14, 2)),
                          ("two", np.stack([told(12, 3), told(12, 4)]))):
        np.save(tmp_path / f"{name}.actions.npy", actions)
    data = vdm.VideoFolder(tmp_path, 4, (32, 32), stride=2)
    assert ", 4 fps, 12 to 14 frames each, 4 with actions\n" in data.report
    assert data.actions == (2,)
    seen = set()
    for i in range(25):
        action = data[i]["action"]
        assert action.shape == (4, 2)
        seen.add(action.nan_to_num()[1, 1].item())
        if not action.isnan().all():
            assert action[:, 0].tolist() == brightness(vdm.to_uint8(data[i]["video"]))
    assert seen == {0, 1, 2, 3, 4}

@cases("actions", [np.zeros((11, 2)), np.zeros(12), np.full((12, 2), np.inf),
                   np.full((12, 2), "left"), np.array([print], object), np.zeros(()), None])
def test_wrong_actions_are_skipped_with_a_reason(tmp_path, actions):
    """Too few, of another shape, not finite, no numbers, code, an empty file."""
    np.save(tmp_path / "a.npy", flat(12))
    (tmp_path / "a.actions.npy").touch()
    if actions is not None:
        np.save(tmp_path / "a.actions.npy", actions)
    with pytest.raises(ValueError, match=r"0 clips used, 1 skipped(.|\n)*a.actions.npy: \S"):
        vdm.VideoFolder(tmp_path, 4, (8, 8))

# ---- clips kept on disk --------------------------------------------------------------------------

@pytest.fixture
def videos(tmp_path):
    """A folder with an array of two clips, clips of two lengths, pictures and a text."""
    (tmp_path / "v/frames").mkdir(parents=True)
    for t, picture in enumerate(flat(12)):
        Image.fromarray(picture).save(tmp_path / f"v/frames/{t}.png")
    np.save(tmp_path / "v/two.npy", np.stack([flat(9), flat(9) + np.uint8(1)]))
    np.save(tmp_path / "v/three.npy", flat(5) + np.uint8(2))
    (tmp_path / "v/notes.txt").write_text("x")
    return tmp_path / "v"

@pytest.fixture
def plain(videos):
    """That folder, read without a cache."""
    return vdm.VideoFolder(videos, 4, (16, 16))

def cached(monkeypatch, folder, size=(16, 16), channels=3):
    """-> the dataset, and the names of files that had to be decoded."""
    names = []
    decode = vdm.decode
    with monkeypatch.context() as patch:
        patch.setattr(vdm, "decode", lambda path, *args: names.append(path.name)
                      or decode(path, *args))
        data = vdm.VideoFolder(folder, 4, size, channels=channels, cache=True)
    return data, sorted(names)

def same_items(a, b):
    return all(torch.equal(a[i]["video"], b[i]["video"]) for i in range(18))

def test_files_are_decoded_once(videos, plain, monkeypatch):
    """Items are those without a cache. Only what changed, or is wanted otherwise, is decoded."""
    every = ["frames", "notes.txt", "three.npy", "two.npy"]
    for expected in (every, ["notes.txt"]):
        data, names = cached(monkeypatch, videos)
        assert names == expected
        assert data.report == plain.report
        pickled = pickle.dumps(data)                        # as it goes to a worker: without pixels
        assert len(pickled) < 3000
        assert same_items(data, plain) and same_items(pickle.loads(pickled), plain)
    for change in (dict(size=(8, 16)), dict(channels=1)):
        assert cached(monkeypatch, videos, **change)[1] == every
    assert cached(monkeypatch, videos)[1] == ["notes.txt"]
    np.save(videos / "two.npy", np.stack([flat(9) + np.uint8(4)] * 2))
    Image.fromarray(flat(1)[0]).save(videos / "frames/7.png", compress_level=1)
    data, names = cached(monkeypatch, videos)
    assert names == ["frames", "notes.txt", "two.npy"]
    assert sum((clip[0:1] == 4).all() for clip in data.clips) == 2

def test_what_a_kill_left_of_a_cache_is_not_used(videos, plain, monkeypatch):
    """A lost or shortened file in the cache is made anew."""
    cached(monkeypatch, videos)
    kept = sorted((videos / ".vdm_cache").iterdir())
    assert len(kept) == 3 and not [path for path in kept if path.name[0] == "."]   # temporary
    for path in kept:
        data = path.read_bytes()
        for left in (None, b"", data[:-1]):
            path.unlink()
            if left is not None:
                path.write_bytes(left)
            again, names = cached(monkeypatch, videos)
            assert len(names) == 2 and same_items(again, plain)
            assert path.read_bytes() == data
    assert sorted((videos / ".vdm_cache").iterdir()) == kept

def test_without_room_for_a_cache(videos, plain, monkeypatch):
    """Clips stay in memory where nothing can be written; a full disk is an error that says so."""
    cache = videos / ".vdm_cache"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        assert same_items(cached(monkeypatch, videos)[0], plain)
    assert not cache.exists()
    cache.write_text("in the way")
    with pytest.raises(OSError, match="could not write .*vdm_cache.* exists"):
        cached(monkeypatch, videos)
    cache.unlink()
    save_array = np.save

    def full(path, array):
        if len(list(cache.iterdir())) > 1:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save_array(path, array)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="could not write .*vdm_cache.*the disk is full"):
            cached(monkeypatch, videos)
    assert len(list(cache.iterdir())) == 2 and not list(videos.glob("*/.*"))
    assert same_items(cached(monkeypatch, videos)[0], plain)

# ---- writing -------------------------------------------------------------------------------------

@cases("wrong", [np.zeros((9, 16, 24, 3)), np.zeros((9, 3, 16, 24), np.uint8),
                 torch.zeros(9, 3, 16, 24, dtype=torch.uint8), torch.zeros(9, 16, 24, 3)])
def test_bytes_and_channels_last_are_refused(tmp_path, wrong):
    """By what turns pixels into bytes, too, where the height might pass for channels."""
    with pytest.raises(ValueError, match="channels first|uint8.*from_uint8 makes"):
        vdm.write_video(tmp_path / "a.gif", wrong)
    with pytest.raises(ValueError, match="expected floats .*1 or 3, H, W.*from_uint8 makes"):
        vdm.to_uint8(torch.as_tensor(wrong))
    right = vdm.write_video(tmp_path / "a.gif", np.full((2, 3, 16, 24), 0.5))
    assert (vdm.to_uint8(vdm.read_video(right)) == 191).all()

def test_range_and_crop(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    clip = vdm.from_uint8(pixels)
    assert (clip.min(), clip.max(), clip.shape) == (-1, 1, (1, 1, 16, 16))
    assert (vdm.to_uint8(clip) == pixels).all()
    assert vdm.to_uint8(clip * 9).max() == 255
    pytest.raises(ValueError, vdm.to_uint8, clip / 0).match("NaN")
    bars = np.zeros((20, 60, 3), np.uint8)
    bars[:, 20:40] = 200                                                       # the centre square
    Image.fromarray(bars).save(tmp_path / "bars.png")
    assert (vdm.decode(tmp_path / "bars.png", (20, 20))[0][0] == 200).all()

@cases("H, W", [(28, 28), (63, 65), (255, 128)])
@cases("suffix", [".mp4", ".gif"])
def test_writer(tmp_path, H, W, suffix):
    """Frames come back in order, enlarged; sides are even; no temporary file is left."""
    clip = vdm.from_uint8(flat(6, H, W, 1))
    path = vdm.write_video(tmp_path / "new" / f"clip{suffix}", clip, fps=8)
    frames = np.stack(list(iio.imiter(path, plugin="FFMPEG" if suffix == ".mp4" else "pillow")))
    k = frames.shape[1] // H
    assert frames.shape[:3] == (6, k * H, k * W)
    assert min(frames.shape[1:3]) >= 128
    assert brightness(frames) == list(range(6))
    assert os.listdir(tmp_path / "new") == [path.name]
    if suffix == ".mp4":
        meta = iio.immeta(path, plugin="FFMPEG")
        assert meta["pix_fmt"].startswith("yuv420p")
        assert (meta["codec"], meta["fps"]) == ("h264", 8)

@cases("fps, duration", [(8, 120), (50, 20), (100, 20)])     # viewers slow down what is below 20 ms
def test_duration_of_gifs(tmp_path, fps, duration):
    path = vdm.write_video(tmp_path / "a.gif", vdm.from_uint8(flat(6)), fps)
    assert Image.open(path).info["duration"] == duration
    assert Image.open(path).info["loop"] == 0

def test_of_an_mp4_one_frame_at_a_time_is_in_memory(tmp_path):
    pixels = flat(9)
    alive = weakref.WeakSet()

    class Frames:
        def __getitem__(self, t):
            frame = vdm.from_uint8(pixels[t])     # an IndexError after the last ends the sequence
            alive.add(frame)
            assert len(alive) <= 2                     # the one before may not be forgotten yet
            return frame

    written = iio.imread(vdm.write_video(tmp_path / "a.mp4", Frames()), plugin="FFMPEG")
    assert brightness(written) == list(range(9))

def test_a_failed_write_and_wrong_input(tmp_path, monkeypatch):
    """An ffmpeg that dies at once: a GIF is written, and the old file stays. NaN is no fault of
    ffmpeg's."""
    clip = vdm.from_uint8(flat(5, C=1))
    path = tmp_path / "a.mp4"
    for name, wrong in (("a.avi", clip), ("a.mp4", clip[0]), ("a.gif", clip.expand(-1, 4, -1, -1))):
        pytest.raises(ValueError, vdm.write_video, tmp_path / name, wrong).match(name)
    before = vdm.write_video(path, clip).read_bytes()
    false = tmp_path / "ffmpeg"
    false.write_text("#!/bin/sh\nfor last; do :; done\n"
                     'case "$last" in *.mp4) : > "$last";; esac\nexit 1\n')
    false.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(false))
    for n in (1, 5):                               # the pipe may hold all that one frame takes
        assert vdm.write_video(path, clip[:n]) == tmp_path / "a.gif"
        assert brightness(np.stack(list(iio.imiter(tmp_path / "a.gif")))) == list(range(n))
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.gif", "a.mp4", "ffmpeg"]
    with pytest.raises(ValueError, match="NaN"):
        vdm.write_video(path, clip / 0)

# ==================================================================================================
# train.py
# ==================================================================================================

ROOT = Path(vdm.__file__).parent

# ---- runs ----------------------------------------------------------------------------------------

CPU = "--device cpu --dtype fp32 "
TOY = ("--frames 4 --size 16 --width 8 --mults 1 --attention factorised --head-dim 8 --patch 4 "
       "--batch 4 --context 0.5 0 0.5 --overlap 2 --sampling-steps 2 --marks 2 --warmup 2 "
       "--sample-every 99 " + CPU)

def run(out, flags, common=TOY):
    """Train, and read the checkpoint."""
    train.main([*common.split(), *flags.split(), "--out", str(out)])
    return read(out / "last.pt")

def read(path):
    return torch.load(path, weights_only=True)

def rows(out):
    """log.csv without its column of time."""
    with open(out / "log.csv") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]

def same(a, b):
    """Bit for bit, but for time, and for what may not change a bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        free = ("seconds", "workers", "checkpoint_activations")
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in free)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

def small(**changes):
    """The options and the Config that belong to SMALL."""
    options, config = train.parse(TOY.split())
    options.device, options.dtype, options.rank = torch.device("cpu"), torch.float32, 0
    return options, dataclasses.replace(config, **changes)

def random_model(config):
    """A model none of whose weights is 0, gates included."""
    model = vdm.build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model

@pytest.fixture
def asked(monkeypatch):
    """The conditions of every call of a denoiser, in a list."""
    seen = []
    forward = vdm.Denoiser.forward
    monkeypatch.setattr(vdm.Denoiser, "forward",
                        lambda self, x, sigma, **c: seen.append(c) or forward(self, x, sigma, **c))
    return seen

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 12 steps, every one of which is kept."""
    out = tmp_path_factory.mktemp("run") / "small"
    run(out, "--steps 12 --keep-every 1 --sample-every 6")
    return out

def test_what_a_run_leaves(trained):
    table = rows(trained)
    assert [int(row["step"]) for row in table] == list(range(1, 13))
    assert all(float(row["loss"]) > 0 and float(row["gradient_norm"]) > 0 for row in table)
    shares = [float(row["lr_share"]) for row in table]           # 2 of 12 steps warm up
    assert shares == pytest.approx([0.5, *[k / 12 for k in range(11, 0, -1)]])
    with Image.open(trained / "samples/final.gif") as gif:
        assert gif.n_frames <= 4 and gif.info["loop"] == 0
    assert Image.open(trained / "samples/final.png").size == (2 * (4 * 17 + 1), 2 * (2 * 17 + 1))
    colors = {color for _, color in Image.open(trained / "samples/errors.png").getcolors(10 ** 6)}
    assert {(65, 105, 225), (255, 165, 0), (255, 69, 0)} < colors     # lines of some noise levels
    assert [read(trained / f"step_{k:06d}.pt")["step"] for k in (1, 5, 12)] == [1, 5, 12]

def test_averaged_weights_by_hand(trained):
    """The share that update n keeps is (1 + n) / (10 + n), which is below 0.995 here."""
    average = read_fresh(read(trained / "last.pt"))
    for n in range(1, 13):
        state = read(trained / f"step_{n:06d}.pt")
        keep = (1 + n) / (10 + n)
        average = {k: keep * average[k] + (1 - keep) * w for k, w in state["model"].items()}
        close(state["ema"], average)

def stopped(monkeypatch, step, *signals):
    """Let a run get signals when it draws for this step (from 0), once."""
    draw = train.draw
    def interrupted(n, config, seed):
        if n == step:
            monkeypatch.setattr(train, "draw", draw)
            for number in signals:
                signal.raise_signal(number)
        return draw(n, config, seed)
    monkeypatch.setattr(train, "draw", interrupted)

CRASH = """
import json, os, signal, sys
import torch, train
torch.set_num_threads(1)
save, saved = torch.save, []
def save_half(state, file):
    saved.append(state)
    if len(saved) < 2:
        return save(state, file)
    file.write(b"half of a checkpoint")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = save_half
for flags in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        train.main(flags)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""

@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs that got kill -9 while half of their second checkpoint, that of step 6, was written."""
    root = tmp_path_factory.mktemp("killed")
    flags = [[*TOY.split(), *text.split(), "--out", str(root / name)]
             for name, text in RESUMED.items()]
    python(["-c", CRASH, json.dumps(flags)])
    return root

def python(words, statuses=(0,)):
    """Run python in this project, and raise an error if it does not end so. Return what it said."""
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, *map(str, words)], env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
    assert done.returncode in statuses, done.stdout[-3000:]
    return done.stdout

RESUMED = dict(
    muon="--steps 9 --save-every 3 --labels 18 --give per_frame --independent 0.5 --offset 0.1",
    adamw="--steps 9 --save-every 3 --optimizer adamw --data drive --drop 0.4 --images 0.3")

@cases("optimizer", RESUMED)
def test_resume_is_bit_for_bit(tmp_path, monkeypatch, killed, optimizer):
    """Stopped after step 4 by SIGTERM, or killed as the checkpoint of step 6 was written, a run
    ends with weights, averages, moments and log of one that nobody touched. Workers read ahead."""
    flags = RESUMED[optimizer]
    whole = run(tmp_path / "whole", flags)
    log = rows(tmp_path / "whole")
    steps = lambda out: [int(row["step"]) for row in rows(out)]
    assert steps(tmp_path / "whole") == [3, 6, 9]
    out = tmp_path / "stopped"
    stopped(monkeypatch, 3, signal.SIGTERM)
    assert run(out, flags)["step"] == 4 and not (out / "samples/final.gif").exists()
    assert same(whole, run(out, flags + " --resume --workers 1"))
    first, *parts, last = rows(out)
    assert steps(out) == [3, 4, 6, 9] and [first, last] == log[::2]
    mean = np.average([float(row["loss"]) for row in parts], weights=[1, 2])
    assert mean == pytest.approx(float(log[1]["loss"]))      # row 4 is a part of whole's row 6
    out = killed / optimizer
    assert read(out / "last.pt")["step"] == 3 and steps(out) == [3, 6]
    with open(out / "log.csv", "a") as file:
        file.write("9,1.2")                                  # a row that a kill has cut short
    assert same(whole, run(out, flags + " --resume --workers 1")) and rows(out) == log
    assert not list(out.glob(".*"))

@pytest.fixture
def sigint():
    """As in a terminal, wherever the tests run: in the background of a shell Ctrl-C is ignored, and
    under nohup SIGHUP is."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

def test_ctrl_c(tmp_path, monkeypatch, capfd, sigint):
    """However often it comes in a step, that step is saved, and the first answer comes at once; so
    with a terminal that is closed. Under nohup, where it is ignored, nothing happens."""
    flags = "--steps 3 --save-every 3"
    for k, numbers in enumerate(([signal.SIGINT], [signal.SIGINT] * 3, [signal.SIGHUP])):
        stopped(monkeypatch, 1, *numbers)
        assert run(tmp_path / str(k), flags)["step"] == 2
        said = capfd.readouterr()
        assert "stopped after step 2, all saved" in said.out
        assert said.err.count("stopping: this step is finished and saved first") == len(numbers)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stopped(monkeypatch, 1, signal.SIGINT)
    assert run(tmp_path / "nohup", flags)["step"] == 3

def at_window(monkeypatch, n, act):
    """Let something happen before window n (from 0) is made, and before those after it."""
    windows = itertools.count()
    generate = vdm.generate

    def interrupted(*args, **options):
        if next(windows) >= n:
            act()
        return generate(*args, **options)

    monkeypatch.setattr(vdm, "generate", interrupted)

def test_a_signal_ends_samples_early(tmp_path, monkeypatch, capfd, sigint):
    """Those on the way: sampling stops at its next noise level, and the step before it is saved."""
    generate = vdm.generate
    asked = []

    def interrupted(denoise, *args, **options):
        def ask(x, sigma, **conditions):
            asked.append(sigma)
            signal.raise_signal(signal.SIGINT)
            return denoise(x, sigma, **conditions)
        return generate(ask, *args, **options)

    monkeypatch.setattr(vdm, "generate", interrupted)
    assert run(tmp_path / "run", "--steps 9 --sample-every 4 --sampling-steps 20")["step"] == 4
    assert len(asked) == 1 and not (tmp_path / "run/samples").exists()

def test_checkpoints_and_samples_by_the_clock(tmp_path, monkeypatch):
    """Of steps of 100 seconds the first that ends after ten minutes is saved. There are samples
    after a minute, and whenever the time has doubled. The weights are those of a quick run."""
    flags = "--steps 20 --save-every 99"
    common = TOY.replace("--sample-every 99", "")
    whole = run(tmp_path / "whole", flags, common)
    assert len(list((tmp_path / "whole/samples").glob("step_*.png"))) == 4           # each fifth
    draw = train.draw
    save = vdm.save
    drawn = []
    saved = []
    clock = lambda: 100.0 * len(drawn)
    monkeypatch.setattr(train, "draw", lambda *args: drawn.append(0) or draw(*args))
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=clock, monotonic=clock))
    monkeypatch.setattr(vdm, "save", lambda path, **state: saved.append(state["step"])
                        or save(path, **state))
    assert same(whole, run(tmp_path / "slow", flags, common))
    assert saved == [7, 14, 20]
    names = sorted(path.stem for path in (tmp_path / "slow/samples").glob("step_*.png"))
    assert names == [f"step_{n:06d}" for n in (1, 3, 4, 8, 12, 16)]

def test_samples_that_cannot_be_written_are_a_warning(tmp_path, capsys):
    out = tmp_path / "Ann's run"                                  # the shell needs quotes for it
    out.mkdir()
    (out / "samples").touch()
    train.main([*TOY.split(), "--steps", "3", "--sample-every", "2", "--out", str(out)])
    said = capsys.readouterr().out
    assert said.count("warning: could not write") == 3 and "2 clips of 4 frames" in said
    assert shlex.split(said.splitlines()[-1]) == ["next", "python", "sample.py", str(out)]

def test_two_runs_in_one_folder(tmp_path):
    """The second is refused. A kill of the first frees the folder, though its worker lives."""
    out = tmp_path / "a/run"
    receiver, sender = os.pipe()
    first = os.fork()
    if not first:
        with train.lock(SimpleNamespace(out=out, rank=0, resume=False)):
            worker = os.fork()
            if worker:
                os.write(sender, str(worker).encode())
            signal.pause()
    worker = int(os.read(receiver, 99))
    try:
        for _ in range(2):
            with pytest.raises(ValueError, match="another run is writing to .*a/run: wait"):
                run(out, "--steps 1")
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    try:
        with pytest.raises(ValueError, match="--ema"):
            run(out, "--steps 1 --ema 2")
    finally:
        os.kill(worker, signal.SIGKILL)
    assert os.listdir(out) == ["log.csv"]                       # with nothing in it
    with pytest.raises(ValueError, match="--ema"):
        run(tmp_path / "b/c", "--ema 2")
    assert os.listdir(tmp_path) == ["a"]

def test_sigterm_on_the_command_line(tmp_path):
    """To all processes, the one that reads ahead too, as a terminal or a queue sends it."""
    words = [*TOY.split(), "--out", tmp_path / "run", "--workers", "1", "--steps", "1000000"]
    process = subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               start_new_session=True)
    log = tmp_path / "run/log.csv"
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 0 and "Traceback" not in said, said
    done = int(re.search(r"stopped after step (\d+), all saved: --resume", said)[1])
    assert read(tmp_path / "run/last.pt")["step"] == done >= 10

def test_a_run_is_never_overwritten(trained, tmp_path):
    before = (trained / "last.pt").read_bytes()
    for flags, words in ((TOY, "already holds a run: --resume continues it"),
                         (TOY + "--steps 11 --resume", "has done 12 steps: raise --steps"),
                         ("--resume --width 64", "width is another .* These may change: steps,"),
                         ("--resume --data drive --seed 1", "but seed, data is another")):
        with pytest.raises(ValueError, match=words):
            train.main([*flags.split(), "--out", str(trained)])
    with pytest.raises(ValueError, match="there is no checkpoint"):
        run(tmp_path / "none", "--resume")
    assert (trained / "last.pt").read_bytes() == before and len(rows(trained)) == 12

def copied_run(source, out):
    """A copy of a run's last checkpoint, for another attempt to go on from it."""
    out.mkdir()
    shutil.copy(source / "last.pt", out)
    return out

@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of clips with 10 frames a second, and a run of 2 steps on it by a relative path."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "clips").mkdir()
    for name in "ab":
        save(folder / f"clips/{name}.mp4", flat(12), fps=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(Path("run"), "--data clips/ --seed 3 --data-fps 5 --steps 2")
    return folder

def test_resume_takes_the_data_from_the_checkpoint(own, tmp_path, monkeypatch, capsys):
    """By no flag, by the path written in other ways, or where the folder was moved to: without a
    warning, and bit for bit. Worlds are not files, and other settings are other settings."""
    monkeypatch.chdir(own)
    moved = tmp_path / "moved"
    shutil.copytree(own / "clips", moved)
    shutil.rmtree(moved / ".vdm_cache")
    states = []
    for n, flags in enumerate(("", f"--data {own}/./clips --seed 3 --data-fps 5",
                               f"--data {moved}")):
        out = copied_run(own / "run", tmp_path / str(n))
        states.append(run(out, "--steps 3 --resume " + flags, common=CPU))
        said = capsys.readouterr().out
        assert "warning" not in said and "own data" not in said
        assert states[n]["seed"] == 3 and states[n]["config"]["fps"] == 5
    assert all(same(states[0] | dict(data=0), state | dict(data=0)) for state in states)
    assert states[2]["data"] == str(moved)
    (moved / "b.mp4").unlink()
    run(out, f"--steps 4 --resume --data {moved}", common=CPU)
    assert f"warning: the files of {moved} are others than" in capsys.readouterr().out
    again = ["--resume", "--out", str(own / "run"), "--steps", "9"]
    for flags, words in (("--data shapes", "data is another"), ("--seed 4", "seed is another"),
                         ("--data-fps 4", "data_fps is another"), ("--data no", "no, the data")):
        with pytest.raises(ValueError, match=words):
            train.main([*again, *flags.split()])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="clips/, the data of this run, is no longer there: name "):
        train.main(again)

def test_resume_remembers_flags_that_are_no_field(tmp_path, capsys):
    """Those of the run, unless named again. An older checkpoint has only their defaults."""
    flags = "--marks 3 --save-every 2 --keep-every 2 --sample-every 3 --dtype fp32 --micro 2 "
    common = TOY.replace("--marks 2 ", "").replace("--sample-every 99 ", "")
    first = run(tmp_path / "run", flags + "--checkpoint-activations --steps 2", common)
    old = copied_run(tmp_path / "run", tmp_path / "old")
    again = run(tmp_path / "run", "--resume --steps 7 --marks 1 --no-checkpoint-activations", "")
    assert (tmp_path / "run/step_000006.pt").exists()
    assert (tmp_path / "run/samples/step_000006.png").exists()
    assert "1 clips of 4 frames" in capsys.readouterr().out
    for name, value in dict(save_every=2, keep_every=2, sample_every=3, dtype="fp32", micro=2,
                            workers=0, marks=1, checkpoint_activations=False).items():
        assert again[name] == value, name
        del first[name]
    vdm.save(old / "last.pt", **first)
    older = run(old, "--resume --steps 3 --marks 2", "")
    assert (older["marks"], older["micro"], older["dtype"]) == (2, None, "auto")

@cases("flags, name", [("--optimizer adamw", "lr"), ("--optimizer muon", "muon_lr")])
def test_a_lower_rate_after_a_gradient_that_is_not_finite(tmp_path, monkeypatch, flags, name):
    """As the message advises. The step after it is as long as the new rate says: half as long."""
    flags += " --warmup 0 --weight-decay 0 --save-every 2"
    first = run(tmp_path, flags + " --steps 2")
    loss_of = train.loss_of

    def broken(*arguments):
        loss, error = loss_of(*arguments)
        return loss * math.nan, error

    with monkeypatch.context() as patch:
        patch.setattr(train, "loss_of", broken)
        with pytest.raises(ValueError, match="gradient is nan at step 3.*lower --lr or --muon-lr"):
            run(tmp_path, flags + " --steps 4 --resume")
    moved = {}
    for share in (1, 0.5):
        out = copied_run(tmp_path, tmp_path / str(share))
        rate = f"--{name.replace('_', '-')} {share * first['config'][name]}"
        again = run(out, f"{flags} --steps 3 --resume {rate}")
        key = "net.down.0.space_attention.q.weight"
        moved[share] = again["model"][key] - first["model"][key]
    agree(moved[0.5], 0.5 * moved[1], rtol=1e-2, atol=1e-7)

def test_fewer_frames_alone(tmp_path, capsys):
    """What a preset gives of 8 frames shrinks to fit, and that is printed. What fits stays."""
    few = TOY.replace("--context 0.5 0 0.5 --overlap 2 ", "")
    config = run(tmp_path / "four", "--steps 1", few)["config"]
    assert (config["context"], config["overlap"]) == ((0.5, 0, 0.5, 0), 2)
    said = capsys.readouterr().out
    assert "context (0.5, 0.0, 0.5, 0.0) instead of (0.5, 0.0, 0.0, 0.0, 0.5), overlap 2 " in said
    for flags, context, overlap in (
            ("--frames 5", (0.5, 0, 0, 0, 0.5), 4), ("--frames 2", (0.5, 0.5), 1),
            ("--frames 1", (1,), 1),
            ("--preset mnist --frames 8", (0.5, 0, 0, 0, 0.5, 0, 0, 0), 4),
            ("--frames 3 --overlap 1", (0.5, 0, 0.5), 1), ("--frames 4 --context 1", (1,), 2),
            ("--preset vista --frames 3", (1 / 15, 14 / 15, 0), 1)):
        config = train.parse(flags.split())[1]
        assert config.context == pytest.approx(context) and config.overlap == overlap, flags
        vdm.check(None, config)

def test_what_own_data_changes_is_printed(own, tmp_path, capsys):
    """The rate of the files, and the run's own samples are no data, nor is the data its folder."""
    run(tmp_path / "a", f"--steps 1 --data {own / 'clips'}")
    assert "own data: fps 10.0 instead of 8.0\n" in capsys.readouterr().out
    run(tmp_path / "b", f"--steps 1 --data {own / 'clips'} --fps 9")
    assert "own data" not in capsys.readouterr().out
    shutil.copytree(own / "clips", tmp_path / "all/clips")
    flags = f"--data {tmp_path / 'all'} --save-every 1 --sample-every 1"
    run(tmp_path / "all/run", flags + " --steps 2")
    run(tmp_path / "all/run", flags + " --steps 3 --resume")
    said = capsys.readouterr().out
    assert said.count("data: 2 files in") == 2 and "warning" not in said
    with pytest.raises(ValueError, match="the folder of --data"):
        run(tmp_path / "all", f"--steps 1 --data {tmp_path}/./all/")

def test_digits_are_grey(tmp_path):
    """The preset digits reads Moving MNIST by its name."""
    np.save(tmp_path / "mnist_test_seq.npy", np.zeros((20, 3, 64, 64), np.uint8))
    config = run(tmp_path / "run", f"--data {tmp_path} --steps 1 --batch 1 --marks 1 "
                 "--sampling-steps 1", common="--preset digits --device cpu ")["config"]
    assert config["channels"] == 1 and tuple(config["size"]) == (32, 32)

def test_training_learns(tmp_path):
    """At sigma 1 to 3 the error falls to 3/4 of that of the best constant, the mean clip."""
    world = vdm.MovingShapes(4, (16, 16))
    clips = torch.stack([world[i]["video"] for i in range(64)])
    constant = (clips - clips.mean(0)).square().mean().item()
    run(tmp_path / "run", "--steps 120 --batch 8 --images 0 --skip-guidance 1")
    error = [float(row["error_sigma_1_3"]) for row in rows(tmp_path / "run")[-4:]]
    assert np.mean(error) < 0.75 * constant

def test_bfloat16(tmp_path):
    """A run in bfloat16 has weights in float32, near those of a run in float32."""
    runs = {name: run(tmp_path / name, f"--steps 3 --dtype {name}") for name in ("fp32", "bf16")}
    start, fp32, bf16 = (torch.cat([w.flatten() for w in weights.values()]) for weights in (
        read_fresh(runs["fp32"]), runs["fp32"]["model"], runs["bf16"]["model"]))
    assert bf16.dtype == torch.float32 and 0 < (bf16 - fp32).norm() < 0.5 * (fp32 - start).norm()

def read_fresh(state):
    """The weights that a run started from."""
    torch.manual_seed(0)
    return vdm.build(vdm.Config(**state["config"])).state_dict()

# ---- many processes, short memory ----------------------------------------------------------------

def nearly(one, other):
    """Weights and averages equal up to rounding, which Muon enlarges: 1 % of the way they came."""
    start = read_fresh(one)
    for part in ("model", "ema"):
        assert one[part].keys() == other[part].keys()
        for name, w in one[part].items():
            apart = (other[part][name] - w).norm()
            assert apart <= 1e-2 * (w - start[name]).norm() + 1e-6, (part, name)

def nearly_rows(one, other):
    for a, b in zip(rows(one), rows(other), strict=True):
        for name in a:
            assert a[name] == b[name] or float(b[name]) == pytest.approx(float(a[name]), rel=2e-3)

CREW = """
import json, os, signal, sys
import torch, torch.distributed as dist, train
torch.set_num_threads(1)
draw, start = train.draw, dist.init_process_group
dist.init_process_group = lambda *args, **more: dist.is_initialized() or start(*args, **more)
def interrupted(step, config, seed):
    if step == 2 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)
    return draw(step, config, seed)
for flags in json.loads(sys.argv[1]):
    train.draw = interrupted if "stopped" in flags[-1] else draw
    sys.stdout = sys.__stdout__
    train.main(flags)
dist.destroy_process_group()
"""
DDP = "--steps 4 --save-every 2 --data drive --drop 0.4 --task any --images 0.3"
SHARD = ("--steps 4 --save-every 2 --keep-every 2 --optimizer adamw --labels 18 --give per_frame "
         "--independent 0.5 --images 0.5")

def test_two_processes_learn_what_one_does(tmp_path):
    """DDP with muon, FSDP2 with adamw, under torchrun. A sharded run goes on in one process. When
    one process is told to stop, both stop after the same step, and only the first speaks."""
    runs = dict(ddp=DDP + " --micro 1", shard=SHARD + " --shard --micro 2 --checkpoint-activations",
                stopped=DDP)
    words = [[*TOY.split(), *text.split(), "--out", str(tmp_path / name)]
             for name, text in runs.items()]
    (tmp_path / "crew.py").write_text(CREW)
    said = python(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                   tmp_path / "crew.py", json.dumps(words)])
    assert said.count("model   ") == 3 and said.count("after step 3, all saved") == 1
    assert read(tmp_path / "stopped/last.pt")["step"] == 3
    for name, flags in dict(ddp=DDP, shard=SHARD).items():
        one = run(tmp_path / f"{name}-one", flags)
        two = read(tmp_path / name / "last.pt")
        nearly(one, two)
        nearly_rows(tmp_path / f"{name}-one", tmp_path / name)
    one = read(tmp_path / "shard-one/last.pt")
    (tmp_path / "mixed").mkdir()
    shutil.copy(tmp_path / "shard/step_000002.pt", tmp_path / "mixed/last.pt")
    nearly(one, run(tmp_path / "mixed", SHARD + " --resume"))

def test_what_saves_memory_changes_nothing(tmp_path):
    """--micro up to rounding; activations computed again, and workers, bit for bit."""
    flags = "--steps 3 --give hint --hint-noise 0.3 --labels 18 "
    whole = run(tmp_path / "whole", flags)
    assert same(whole, run(tmp_path / "a", flags + "--checkpoint-activations --workers 2"))
    nearly(whole, run(tmp_path / "b", flags + "--micro 1"))
    nearly_rows(tmp_path / "whole", tmp_path / "b")

# ---- a step --------------------------------------------------------------------------------------

def by_hand(model, batch, drawn, config):
    """The loss of a step, written out, and the squared errors that the log is made of."""
    T = config.frames
    stills = config.stills
    noise, sigma, mask = (drawn[name] for name in ("noise", "sigma", "mask"))
    videos = batch["video"]
    if config.crop:
        rows, columns = (drawn["corner"][:, k, None] + torch.arange(config.crop[k]) for k in (0, 1))
        videos = torch.stack([video[..., y[:, None], x] for video, y, x in
                              zip(videos, rows, columns)])
    clean = videos[:, -T:]
    B = len(clean)
    told = dict(temporal=drawn["temporal"])
    if config.labels:
        told["label"] = torch.stack([batch["label"][b] if drawn["told"][b] else torch.tensor(-1)
                                     for b in range(B)])
    if config.actions:
        told["action"] = batch["action"][:, -T:] + drawn["withheld"]
    given = dict(context=clean, mask=mask)
    if config.give == "hint":
        shown = clean
        unit = drawn["unit"]
        level = drawn["level"]
        if config.task == "image":                           # the first frame, in place of all
            shown = clean[:, [0] * T]
            unit = unit[:, [0] * T]
        if config.task == "upsample":
            k = config.enlarge
            low = clean.unflatten(4, (-1, k)).unflatten(3, (-1, k)).mean((4, 6))
            shown = F.interpolate(low.flatten(0, 1), scale_factor=k, mode="bilinear").view_as(clean)
        if config.factor:                                    # what the blurred clip was encoded to
            shown = videos[:, :T]
        ones = mask[:, :, None, None, None].expand_as(clean[:, :, :1])
        noisy = shown + level[:, None, None, None, None] * unit
        given = dict(concat=torch.cat([noisy * ones, ones], 2),
                     augmentation=torch.where(mask.sum(1) > 0, level, -1))
    def weight(s):
        return {"inverse": 1 / s, "eps": 1 / s ** 2, "v": 1 / s ** 2 + 1, "flow": (1 / s + 1) ** 2,
                "edm": 1 / s ** 2 + 1 / config.sigma_data ** 2}[config.weighting]
    def term(clip, noise, s, **told):
        if config.loss == "vista":                           # which has tests of its own
            return vdm.vista_loss(model, clip, s, noise, weight, **told)
        wide = s.reshape(*s.shape, *[1] * (5 - s.ndim))
        error = model(clip + wide * noise, s, **told) - clip
        change = error[:, 1:] - error[:, :-1]                # nothing, of a single frame
        change = (config.loss == "change") * change.square().sum() / max(change.numel(), 1)
        loss = (weight(wide) * error ** 2).mean() + change
        return loss, error.square().flatten(s.ndim).mean(-1)
    if config.give == "previous":
        share = config.context[1]
        free, error = term(clean, noise, sigma, **told)
        goes_on, _ = term(clean, noise, sigma, previous=batch["video"][:, :T], **told)
        return share * goes_on + (1 - share) * free, error
    loss, error = term(clean, noise[:, :T], sigma, **given, **told)
    alone = 0
    for k in range(stills):                                  # frame k of the clip k + 1 further
        for b in range(B):
            picture = clean[(b + 1 + k) % B, k % T][None, None]
            alone += term(picture, noise[b, T + k][None, None], sigma[b:b + 1])[0] / (B * stills)
    return (T * loss + stills * alone) / (T + stills), error

STEPS = dict(
    labels=dict(labels=18, drop=0.5, offset=0.3), vista=dict(loss="vista", weighting="v"),
    actions=dict(actions=(4, 2), drop=0.4, give="replace", kind="v", weighting="v"),
    per_frame=dict(give="per_frame", independent=0.6, kind="edm", weighting="edm", sigma_data=0.8),
    previous=dict(give="previous", context=(0.7, 0.3), loss="plain", kind="eps", weighting="eps"),
    stills=dict(stills=5, loss="plain", context=(1.0,), weighting="v"),
    hint=dict(give="hint", hint_noise=0.5), image=dict(give="hint", hint_noise=0.5, task="image"),
    upsample=dict(give="hint", hint_noise=0.5, task="upsample", context=(0.3, 0.7)),
    crop=dict(give="hint", hint_noise=0.5, task="upsample", enlarge=2, crop=(8, 12)),
    latents=dict(give="hint", hint_noise=0.5, task="upsample", factor=4, crop=(8, 8)))

@cases("way, micro", [*((way, 4) for way in STEPS), ("labels", 2), ("actions", 1), ("previous", 2)])
def test_the_gradient_of_a_step(way, micro):
    """By autograd of the loss written out: plain descent, at rate 1, steps down just that."""
    options, config = small(warmup=0, clip_norm=1e9, images=0.3, **STEPS[way])
    options.parts = [slice(i, i + micro) for i in range(0, 4, micro)]
    options.seed = 1
    world = vdm.Drive if config.actions else vdm.MovingShapes
    world = world(8 if config.give == "previous" or config.factor else 4, (16, 16))
    batch = default_collate([world[i] for i in range(4)])
    drawn = train.draw(7, config, 1)
    model = random_model(config)
    truth = copy.deepcopy(model)
    loss, error = by_hand(truth, batch, drawn, config)
    loss.backward()
    sgd = torch.optim.SGD([dict(params=list(model.parameters()), peak=1 / (1 - 7 / config.steps))])
    parts = iter([{name: x[part] for name, x in batch.items()} for part in options.parts])
    record = train.train_step(7, config, options, parts, model, vdm.EMA(model), [sgd])
    flat = nn.utils.parameters_to_vector
    moved = (flat(truth.parameters()) - flat(model.parameters())).detach()
    grads = flat([torch.zeros_like(p) if p.grad is None else p.grad for p in truth.parameters()])
    assert (moved - grads).norm() < 1e-3 * grads.norm()
    assert record["gradient_norm"] == pytest.approx(grads.norm().item(), rel=1e-3)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
    close(record["error"], error.detach(), rtol=1e-3, atol=1e-5)
    assert torch.equal(record["sigma"], drawn["sigma"])

def test_what_is_drawn_depends_on_seed_and_step_alone():
    _, config = small(labels=18, drop=0.5, actions=(4, 2), give="hint", hint_noise=0.5, images=0.5,
                      independent=0.5, batch=64)
    drawn = train.draw(3, config, 0)
    torch.rand(5)
    assert len(drawn) == 8
    for step, seed in ((3, 0), (4, 0), (3, 1)):
        for name, x in train.draw(step, config, seed).items():
            assert len(x) == 64
            equal = torch.equal(x.nan_to_num(9), drawn[name].nan_to_num(9))
            assert equal == ((step, seed) == (3, 0))

def test_stride_of_the_toy_world():
    """Key frames: every third frame of the clips that a world without a stride has."""
    options, config = small(stride=3)
    data, held_out, _ = train.open_data(options, config, None)
    for world, seed in ((data, 0), (held_out, 1)):
        whole = vdm.MovingShapes(10, (16, 16), seed=seed)
        assert torch.equal(world[5]["video"], whole[5]["video"][::3])

def test_crops_are_from_everywhere():
    _, config = small(size=(12, 16), crop=(8, 4), batch=2000)
    drawn = train.draw(0, config, 0)
    assert drawn["noise"].shape[2:] == (3, 8, 4)
    y, x = drawn["corner"].T
    counts = (13 * y + x).bincount(minlength=65)                         # 5 x 13 places
    assert len(counts) == 65 and (counts - 2000 / 65).abs().max() < 25

def test_odds_of_what_is_drawn():
    """Of 4,000 clips, which are off by 0.008 at one standard deviation."""
    n = 4000
    near = partial(pytest.approx, abs=0.03)
    _, config = small(size=(4, 4), labels=18, actions=(4, 2), drop=0.25, give="hint", images=0.2,
                      hint_noise=0.5, context=(0.2, 0.5, 0.0, 0.3), batch=n, offset=0.5)
    drawn = train.draw(0, config, 0)
    counts = drawn["mask"].sum(1).long().bincount(minlength=4) / n
    assert counts.tolist() == near([0.2, 0.5, 0.0, 0.3])
    assert drawn["temporal"].mean().item() == near(0.8)
    assert drawn["told"].float().mean().item() == near(0.75)
    untold = drawn["withheld"][:, 0].isnan()                             # (n, 6)
    assert torch.equal(untold[:, [0] * 4 + [4] * 2], untold)             # a mode as a whole
    assert untold.float().mean(0).tolist() == near([1 - 0.75 ** 2] * 6)
    assert untold.all(1).float().mean().item() == near(0.25 + 0.75 * 0.25 ** 2)
    assert (drawn["withheld"].nan_to_num(0) == 0).all()
    level = drawn["level"]
    assert (level.min(), level.max(), level.mean()) == (near(0), near(0.5), near(0.25))
    log = drawn["sigma"].log()                                           # one in each n-th
    assert (log.median().item(), log.std().item()) == (near(1.5), near(1.2))
    mean = drawn["noise"].mean((1, 3, 4))                                # (n, C)
    assert mean.var().item() == near(1 / 64 + 0.25)
    for task, want in dict(any=[0.5] * 4, ends=[1, 0, 0, 1], image=[1] * 4).items():
        mask = train.draw(1, dataclasses.replace(config, task=task), 0)["mask"]
        given = mask[mask.sum(1) > 0]
        assert len(given) / n == near(0.8) and given.mean(0).tolist() == near(want)
    own = train.draw(0, dataclasses.replace(config, independent=0.4), 0)["sigma"]
    assert (own[:, 0] != own[:, 1]).float().mean().item() == near(0.4) and own.shape == (n, 4)

WAYS = {                        # flags, and modules that have to learn from the first three steps
    "--give replace --kind v --weighting v": "given",
    "--give hint --task image --hint-noise 0.1": "concat augmentation",
    "--stills 2 --loss plain --schedule cosine": "concat",
    "--loss vista --labels 18 --weighting min_snr": "concat label",
    "--adapters sparse_causal --task ends --kind eps --weighting eps": "q"}

@cases("flags", WAYS)
def test_every_way_trains(tmp_path, flags):
    """Three steps: finite losses, and whatever is there to be trained has moved."""
    context = "" if "--context" in flags else " --context 0.1 0.9"
    out = tmp_path / "run"
    state = run(out, "--steps 3 --save-every 1 --images 0.3 " + flags + context)
    assert all(math.isfinite(float(row["loss"])) for row in rows(out))
    start = read_fresh(state)
    moved = " ".join(name for name, w in state["model"].items() if not torch.equal(w, start[name]))
    space = "time.attention" if "adapters" in flags else "space_attention"
    for word in ("gate", "embed.0", "input", "output", space, *WAYS[flags].split()):
        assert re.search(rf"\b{word}\b", moved), word
    assert all(w.isfinite().all() for w in state["ema"].values())
    assert (out / "samples/final.gif").stat().st_size > 0

# ---- optimisers and the log ----------------------------------------------------------------------

def test_muon_against_the_svd():
    """A step has the singular vectors of the averaged gradient, looked ahead as Nesterov's, and
    singular values that are all near 1 (0.7 to 1.2, Jordan et al. 2024) times the rate, and times
    sqrt(rows / columns) if that is more. Three steps, by numpy."""
    for shape in ((12, 30), (30, 12), (12, 20), (8, 4, 3, 3)):
        p = nn.Parameter(torch.zeros(shape))
        average = 0.0
        muon = train.Muon([p], lr=0.1)
        for step in range(3):
            before = p.detach().clone()
            p.grad = torch.randn(shape)
            muon.step()
            grad, moved = (x.reshape(shape[0], -1).double().numpy()
                           for x in (p.grad, before - p.detach()))
            average = 0.95 * average + 0.05 * grad
            u, s, v = np.linalg.svd(0.05 * grad + 0.95 * average, full_matrices=False)
            turned = u.T @ moved @ v.T / 0.1 / max(1, len(u) / v.shape[1]) ** 0.5
            values = np.diag(turned)
            assert np.abs(turned - np.diag(values)).max() < 3e-3 and s.max() / s.min() > 1.5
            assert 0.65 < values.min() and values.max() < 1.25

def test_adamw_by_hand():
    """Two steps of Loshchilov and Hutter's algorithm 2 in float64: the rate warms up, a gate has
    five times of it, and a spatial layer a tenth."""
    _, config = small(optimizer="adamw", warmup=4, lr=1e-2, spatial_lr=0.1, weight_decay=0.2,
                      clip_norm=1e9, labels=18)
    model = random_model(config)
    optimizers = train.make_optimizers(config, model)
    w = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    m, v = ({name: np.zeros_like(x) for name, x in w.items()} for _ in range(2))
    for step in (0, 1):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            grad = p.grad.double().numpy()
            rate = 1e-2 * (step + 1) / 4
            if name.endswith("gate"):
                rate *= 5
            elif not (".time" in name or "concat" in name or "conditions" in name):
                rate *= 0.1
            m[name] = 0.9 * m[name] + 0.1 * grad
            v[name] = 0.99 * v[name] + 0.01 * grad ** 2
            mean = m[name] / (1 - 0.9 ** (step + 1))
            root = np.sqrt(v[name] / (1 - 0.99 ** (step + 1)))
            w[name] -= rate * (mean / (root + 1e-8) + 0.2 * w[name])
        train.descend(step, config, model, optimizers)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), w[name], rtol=1e-4, atol=1e-6, err_msg=name)

@cases("warmup, shares", [(0, [1, 0.75, 0.5, 0.25]), (2, [0.5, 0.75, 0.5, 0.25]),
                           (8, [1 / 8, 2 / 8, 3 / 8, 1 / 4])])
def test_a_gradient_is_cut_and_the_rate_scheduled(warmup, shares):
    """A gradient of norm 10 moves weights as one of norm 0.5 would, and is reported as 10."""
    _, config = small(clip_norm=0.5, warmup=warmup, steps=4)
    layer = nn.Linear(4, 1, bias=False)
    sgd = torch.optim.SGD([dict(params=list(layer.parameters()), peak=2.0)])
    for step, share in enumerate(shares):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.full((1, 4), 5.0)
        norm, rate = train.descend(step, config, layer, [sgd])
        assert (norm, rate) == (pytest.approx(10), pytest.approx(share))
        close(before - layer.weight, torch.full((1, 4), 0.25 * 2 * share))
        assert layer.weight.grad is None

def test_a_row_of_the_log_by_hand(tmp_path):
    """Means over the steps since the last row; errors by noise level over all clips and frames."""
    options, _ = small()
    options.out = tmp_path
    first = dict(loss=1.0, gradient_norm=2.0, lr_share=0.5, sigma=torch.tensor([0.2, 5.0, 20.0]),
                 error=torch.tensor([0.3, 0.4, 0.9]))
    second = dict(loss=3.0, gradient_norm=4.0, lr_share=1.0, sigma=torch.tensor([[0.3, 1.5, 0.05]]),
                  error=torch.tensor([[0.5, 0.6, 0.7]]))
    train.log(options, 2, 1.239, [first, second])
    train.log(options, 3, 2.0, [first])
    text = (tmp_path / "log.csv").read_text().splitlines()
    names = [f"error_sigma_{x}" for x in "0_0.1 0.1_0.3 0.3_1 1_3 3_10 10_inf".split()]
    assert text[0].split(",") == ["step", "seconds", "loss", "gradient_norm", "lr_share", *names]
    found = np.array([float(x or "nan") for x in text[1].split(",")])
    np.testing.assert_allclose(
        found, [2, 1.24, 2, 3, 0.75, 0.7, 0.4, math.nan, 0.6, 0.4, 0.9], rtol=1e-6)
    assert text[2].split(",")[5] == "" == text[2].split(",")[7] and len(text) == 3

# ---- --init, flags, data -------------------------------------------------------------------------

def test_init_trains_lora_alone(trained, tmp_path, capsys):
    """Of another run's averaged weights all come out bit for bit that are not to be trained."""
    old = read(trained / "last.pt")["ema"]
    state = run(tmp_path / "lora", f"--steps 3 --init {trained}/last.pt --adapters lora --rank 2 "
                "--train lora --data drive")
    sizes = {name: w.numel() for name, w in state["model"].items()}
    new = sum(size for name, size in sizes.items() if "branch" in name)
    said = capsys.readouterr().out
    assert f"{sum(sizes.values()):,} parameters, of which {new:,} are trained" in said
    for weights in (state["model"], state["ema"]):
        for name, w in weights.items():
            if "branch" in name:
                assert w.abs().max() > 0
            elif "conditions" not in name:
                assert torch.equal(w, old[name.replace(".layer.", ".")]), name
    with pytest.raises(ValueError, match="is another model, of another .*adapters"):
        run(tmp_path / "less", f"--init {tmp_path}/lora/last.pt --steps 1")

def test_init_trains_simda_and_labels_alone(trained, tmp_path):
    """A run that goes on starts from its own weights."""
    flags = f"--init {trained}/last.pt --adapters simda --train adapters conditions --labels 18 "
    first = run(tmp_path / "simda", "--steps 3 " + flags)["model"]
    second = run(tmp_path / "simda", "--steps 4 --resume " + flags)["model"]
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    learnt = ("over_time", "behind", "beside", "conditions")
    assert moved and all(any(word in name for word in learnt) for name in moved)

@cases("flags, words", [
    ("--width 16", "of another width"), ("--kind v", "of another kind: give the flags"),
    ("--give per_frame", "of another give"), ("--head-dim 4", "of another head_dim"),
    ("--train lora", "train is 'lora', but the parts of this model are spatial"),
    ("--adapters dora", "adapters is 'dora', expected one of")])
def test_init_refuses_other_models(trained, tmp_path, flags, words):
    with pytest.raises(ValueError, match=words) as caught:
        run(tmp_path / "run", f"--init {trained}/last.pt --steps 1 " + flags)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()

def test_help_is_short_and_has_the_defaults_of_the_preset(capsys):
    """A line has the value that a run of this preset has; the table agrees with the networks."""
    for name in ("tiny", "latent", "mnist"):
        with pytest.raises(SystemExit):
            train.parse(["--preset", name, "--help"])
        said = capsys.readouterr().out
        assert 15 <= len(set(re.findall(r"^  (--\w[\w-]*)", said, re.M))) <= 21
        config = vdm.PRESETS[name]
        pixels = "{} x {}".format(*vdm.pixels(config)[0])
        said = " ".join(said.split())
        for field in ("frames", "steps", "width"):
            assert re.search(rf"--{field} [^()]*\({getattr(config, field)}\)", said), field
        assert f"({config.size[0]} {config.size[1]})" in said and "--clip-norm" not in said
        with torch.device("meta"):
            total = sum(p.numel() for p in vdm.build(config).parameters())
        assert re.search(rf"{name} [^|]*? {config.frames} x {pixels} {total / 1e6:.1f} M ", said)
    assert list(train.ABOUT) == ["preset", *vdm.PRESETS]

def test_a_preset_for_a_gpu_says_so_first(tmp_path, capsys):
    """mnist, here at toy size."""
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data/a.npy", np.zeros((9, 16, 16), np.uint8))
    train.main(f"--preset mnist --data {tmp_path}/data --out {tmp_path}/run --frames 2 --size 8 "
               "--width 8 --mults 1 --head-dim 8 --attention none --batch 1 --steps 1 --marks 1 "
               "--sampling-steps 1 --device cpu".split())
    assert capsys.readouterr().out.startswith("note    preset mnist is meant for a GPU (47")

@cases("name", ["vdm", "train", "sample", *(f"notebooks/{name}" for name in (
    "play", "paste", "autoencoder", "benchmark", "adapters", "ablation", "claims"))])
def test_every_program_has_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert not end.value.code and len(capsys.readouterr().out) > 60

def test_every_field_is_a_flag_with_its_comment(capsys):
    """Of each line of Config in vdm.py; what is given by a flag wins over the preset."""
    with pytest.raises(SystemExit):
        train.parse(["--help-all"])
    said = re.sub(r"\s+", "", capsys.readouterr().out)       # lines are broken, also at hyphens
    lines = re.findall(r"^    (\w+): \w+ = .*?# (.*)$", inspect.getsource(vdm.Config), re.M)
    fields = {field.name: field.default for field in dataclasses.fields(vdm.Config)}
    assert [name for name, _ in lines] == [*fields]
    values = {str: "z", int: 7, float: 0.25, tuple: (3, 2)}
    want = {name: values[type(default)] for name, default in fields.items()}
    want |= dict(planes=(3, 2, 4), attention=("3", "2"), train=("3", "2"))
    flags = []
    for name, comment in lines:
        flag = "--" + name.replace("_", "-")
        assert flag in said and re.sub(r"\s+", "", comment) in said, name
        value = want[name]
        flags += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    assert train.parse(["--preset", "ucf101", *flags])[1] == vdm.Config(**want)
    assert list(train.ABOUT) == ["preset", *vdm.PRESETS]
    config = train.parse("--batch 3 --preset ucf101 --size 24".split())[1]
    assert config == dataclasses.replace(vdm.PRESETS["ucf101"], batch=3, size=(24, 24))

REFUSED = [
    ("--prest tiny", "unrecognized arguments: --prest"),
    ("--preset huge", "choice: 'huge'"),
    ("--steps many", "invalid int value: 'many'"),
    ("--size 30", "that works is --size 32 32"),             # the other settings: see build
    ("--size 32 32 32", "expected one or two numbers"),
    ("--mults 1 0", "--mults is (1, 0)"),
    ("--steps 0", "--steps is 0, expected 1 or more"),
    ("--seed -1", "--seed is -1, expected 0"),
    ("--fps 0", "--fps is 0.0, expected 0.1"),
    ("--ema nan", "--ema is nan, expected 0 to 1"),
    ("--lr inf", "--lr is inf, expected 0 or more"),
    ("--clip-norm 0", "--clip-norm is 0.0"),
    ("--sigma-min 60", "less than --sigma-max"),
    ("--context 0 1", "and the first not 0"),
    ("--frames 4 --context 1 0 0 0 1", "no more numbers"),
    ("--images 0", "--skip-guidance asks"),
    ("--give previous", "two numbers as --context"),
    ("--task any --context 1", "odds of given"),
    ("--task ends --frames 2 --context 0.5 0.5", "needs 3 --frames"),
    ("--task image", "--task image needs --give hint"),
    ("--task upsample --give hint --size 30 --patch 2 --mults 1 --attention none", "--enlarge, 4"),
    ("--crop 12", "--crop is (12, 12), expected multiples of 8, up to --size"),
    ("--crop 40", "--crop is (40, 40)"),
    ("--crop 8 8 8", "--crop is (8, 8, 8)"),
    ("--stride 2 --data drive", "--stride is for files and shapes"),
    ("--stills 2 --give per_frame --independent 0.5", "neither --independent"),
    ("--labels 3", "--labels is 3 and --actions (), but the data has 18"),
    ("--actions 4 2", "but the data has 18 labels and actions ()"),
    ("--data drive --channels 1", "toy worlds are in colour"),
    ("--preset digits", "name grey videos by --data, such as mnist_test_seq.npy"),
    ("--data no/such", "no/such does not exist"),
    ("--device quantum", "is not to be had here"),
    ("--preset latent", "this run needs latents"),
    ("--latents no.pt", "no checkpoint no.pt"),
    ("--init no.pt", "no checkpoint no.pt"),
    ("--train temporal", "needs --init"),
    ("--micro 5", "--batch is 16, expected a multiple of 5"),
    ("--shard", "needs torchrun")]

@cases("flags, words", REFUSED)
def test_bad_values_are_refused_in_one_sentence(tmp_path, flags, words):
    with pytest.raises((ValueError, SystemExit)) as caught:
        train.main([*shlex.split(flags), "--out", str(tmp_path / "run")])
    said = str(caught.value)
    assert words in said and "\n" not in said and not (tmp_path / "run").exists(), said

@cases("command, words", [
    ("train.py --prest tiny", "--prest"),
    ("train.py --ema 2", "--ema is 2.0, expected 0 to 1"),
    ("sample.py notebooks/tiny.pt --length 9 --overlap 3", "--length is 9")])
def test_a_mistake_on_the_command_line_has_no_traceback(command, words):
    """The sentence, and status 1 or 2."""
    said = python(command.split(), (1, 2))
    assert re.search(f"^error: .*{words}", said, re.M) and "Traceback" not in said

def test_a_folder_of_ones_own(tmp_path, capsys):
    """Grey stays one channel, files play at their own speed, and numbers beside a clip are told."""
    data = tmp_path / "data"
    data.mkdir()
    for k in range(3):
        np.save(data / f"clip{k}.npy", np.full((9, 20, 30, 1), 40 * k, np.uint8))
        np.save(data / f"clip{k}.actions.npy", np.random.default_rng(k).normal(size=(9, 3)))
    (data / "notes.txt").write_text("no video")
    state = run(tmp_path / "run", f"--steps 3 --data {data} --channels 1 --stride 2")
    said = capsys.readouterr().out
    assert "4 files" in said and "3 clips used, 1 skipped" in said and "notes.txt" in said
    config = vdm.Config(**state["config"])
    assert (config.fps, config.actions, config.channels) == (4.0, (3,), 1)
    assert state["model"]["net.conditions.action.linear.weight"].abs().max() > 0
    with pytest.raises(ValueError, match=r"--actions \(2, 2\), but the data has .* actions \(3,\)"):
        run(tmp_path / "other", f"--data {data} --channels 1 --actions 2 2")

def test_data_that_is_of_no_use_is_refused_in_one_sentence(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(ValueError, match="data is an empty folder, expected .*.gif .*.mp4 .*.npz"):
        run(tmp_path / "run", f"--data {data}")
    vdm.write_video(data / "a.mp4", vdm.MovingShapes(4, (16, 16))[0]["video"])
    with pytest.raises(ValueError, match="has no latents .* for videos name an autoencoder"):
        run(tmp_path / "run", f"--preset latent --data {data}")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/such/program")
    with pytest.raises(ImportError, match="ffmpeg is missing, which reads .*a.mp4"):
        run(tmp_path / "run", f"--data {data}")
    assert os.listdir(tmp_path) == ["data"]

# ---- latents -------------------------------------------------------------------------------------

LATENT = ("--preset latent --frames 4 --size 4 --width 8 --head-dim 8 --mults 1 --patch 1 "
          "--batch 2 --attention joint --steps 3 --sampling-steps 2 --marks 2 --encode 5 "
          "--sample-every 99 --context 0.5 0 0.5 --overlap 2 --device cpu --dtype fp32 ")
AUTO = "--frames 4 --size 4 --batch 2 --steps 3 --marks 2 --device cpu --dtype fp32 "
train_autoencoder = runpy.run_path(str(ROOT / "notebooks/autoencoder.py"))["main"]

@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """Both stages of an autoencoder, and a model of its latents."""
    root = tmp_path_factory.mktemp("latent")
    train_autoencoder([*AUTO.split(), "--out", str(root / "ae")])
    train_autoencoder([*AUTO.split(), "--stage", "decoder", "--latents", str(root / "ae/last.pt"),
                 "--out", str(root / "decoder")])
    run(root / "run", f"--latents {root}/decoder/last.pt", LATENT)
    return root

def test_two_stages_and_a_model_of_latents(latent):
    """The second stage trains temporal layers alone; all else comes out bit for bit, what was
    measured too. The model has the autoencoder in its checkpoint, and its clips are in pixels."""
    first, second, model = (read(latent / name / "last.pt") for name in ("ae", "decoder", "run"))
    temporal = {name for name in first["ema"] if ".time." in name}
    moved = {name for name, w in first["ema"].items() if not torch.equal(w, second["ema"][name])}
    assert moved == temporal and temporal
    assert same(model["autoencoder"], second["ema"])
    assert Image.open(latent / "ae/recon.png").size == (4 * 17 + 1, 2 * 33 + 1)
    picture = Image.open(latent / "run/samples/final.png")
    assert picture.size == (2 * (4 * 17 + 1), 2 * (2 * 17 + 1))

def test_encoded_once(latent, tmp_path, monkeypatch):
    """As by hand, up to float16, with actions; once for a number of clips and an autoencoder."""
    shutil.copytree(latent / "decoder", tmp_path / "decoder")
    flags = f"--latents {tmp_path}/decoder/last.pt --data drive "
    run(tmp_path / "one", flags, LATENT)
    folder, = tmp_path.glob("latents-*")
    ae, _ = vdm.load_autoencoder(latent / "decoder/last.pt")
    clips, actions = drives(5, 4, (16, 16), seed=0)
    stored = np.load(folder / "video.npy")
    told = np.load(folder / "video.actions.npy")
    assert stored.dtype == np.float16
    by_hand = (ae.posterior(clips)[0] - ae.mean) / ae.std
    close(torch.from_numpy(stored).float(), by_hand, atol=2e-3, rtol=2e-3)
    assert np.array_equal(told, actions)
    data = train.open_data(*settings(tmp_path, flags), ae)[0]
    for item in map(data.__getitem__, range(5)):             # with the actions of its own clip
        k = next(k for k in range(5) if np.array_equal(stored[k].astype("f4"), item["video"]))
        assert np.array_equal(told[k], item["action"])
    with monkeypatch.context() as patch:
        patch.setattr(vdm.Autoencoder, "encode", lambda *args: 1 / 0)
        run(tmp_path / "two", flags, LATENT)
        run(tmp_path / "one", f"--resume --steps 4 {flags}", LATENT)
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "three", flags + "--encode 4", LATENT)
    run(tmp_path / "four", f"--latents {latent}/ae/last.pt --data drive --steps 1", LATENT)
    assert len(list(tmp_path.glob("latents-*"))) == 2 and not list(tmp_path.glob("*.part"))

@cases("size, most, kept", [((4, 4), 0.5, False), ((1, 16), 0.5, True), ((1, 16), 1.5, False)])
def test_latents_of_planes_need_no_scale(tmp_path, size, most, kept):
    """Only planes, a row of numbers in [-1, 1], may have a standard deviation below 0.4."""
    small = np.zeros((3, 6, 2, *size), np.float32)
    small[..., 0] = most
    small[0, 0, 0, 0, 1] = -most
    assert 0.01 < small.std() < 0.4
    np.save(tmp_path / "a.npy", small)
    if kept:
        assert len(train.Latents(tmp_path, 2, size, 1, 2)) == 3
    else:
        with pytest.raises(ValueError, match="multiply it by"):
            train.Latents(tmp_path, 2, size, 1, 2)

PLANES = ("--preset planes --width 8 --head-dim 4 --mults 1 --attention joint --batch 2 --steps 3 "
          "--sampling-steps 2 --marks 2 --encode 5 --sample-every 99 --device cpu --dtype fp32 ")

@pytest.fixture(scope="module")
def planes(tmp_path_factory):
    """An autoencoder of planes of 4 frames, and a model of them."""
    root = tmp_path_factory.mktemp("planes")
    train_autoencoder([*"--preset planes --planes 4 2 3 --channels 2 --batch 2 --steps 3".split(),
                       *f"--marks 2 {CPU} --out {root}/ae".split()])
    run(root / "run", f"--latents {root}/ae/last.pt", PLANES)
    return root

def test_clips_are_encoded_to_planes(planes):
    """Clips of 4 frames are encoded two in a row."""
    state = read(planes / "run/last.pt")
    assert state["config"]["planes"] == (4, 2, 3) and state["config"]["size"] == (1, 26)
    assert same(state["autoencoder"], read(planes / "ae/last.pt")["ema"])
    folder, = planes.glob("latents-*")
    stored = np.load(folder / "video.npy")
    ae, _ = vdm.load_autoencoder(planes / "ae/last.pt")
    clip = vdm.MovingShapes(8, (8, 12), seed=0)[0]["video"]
    by_hand = torch.cat([ae.encode(clip[None, i:i + 4])[0] for i in (0, 4)])     # (2, 2, 1, 26)
    close(torch.from_numpy(stored[0]).float(), by_hand, atol=2e-3, rtol=2e-3)
    picture = Image.open(planes / "run/samples/final.png")
    assert picture.size == (2 * (4 * 13 + 1), 2 * (2 * 9 + 1))

def test_videos_of_planes(planes, tmp_path, monkeypatch, capsys):
    """As long as asked for; the first clips of a longer one, and a given one, are those of their
    own; the rest is another at other steps."""
    monkeypatch.chdir(tmp_path)
    vdm.write_video("clip.gif", vdm.MovingShapes(8, (8, 12), seed=0)[0]["video"])
    def made(flags):
        sample.main([str(planes / "run"), *f"--n 1 --device cpu --out a.gif {flags}".split()])
        newest = max(Path().glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
        return np.asarray(Image.open(newest))[::2, ::2]     # frames of 12 columns and a line
    long = made("--length 11")
    fewer = made("--length 11 --later-steps 1")
    assert long.shape == (10, 11 * 13 + 1, 3)
    assert np.array_equal(long[:, :52], made("")[:, :52])
    assert np.array_equal(long[:, :52], fewer[:, :52])
    assert not np.array_equal(long[:, 53:], fewer[:, 53:])
    assert made("--context clip.gif").shape == (10, 8 * 13 + 1, 3)
    for flags, words in (("--context clip.gif --context-frames 3", "a multiple of 4 frames"),
                         ("--context clip.gif --length 4", "more than the 4 frames given")):
        with pytest.raises(ValueError, match=words):
            made(flags)
    benchmark.main(f"--run {planes}/run --n 2 --seeds 1 --lengths 4 6".split())
    assert "| 6 | seed 1 |" in capsys.readouterr().out

@cases("flags, words", [
    ("--planes 4 4", "expected frames, height and width"),
    ("--planes 4 3 4 --mults 1 1 --attention none none", "that works is --planes 4 4 4"),
    ("--planes 4 0 4", "--planes is (4, 0, 4)"),
    ("--frames 8", "leave out --frames"),
    ("--patch 2 --planes 2 2 2", "with --patch 1"),
    ("--images 0.1", "neither with labels"),
    ("--give hint --context 1", "with --give previous or concat"),
    ("--head-dim 16", "is 16"),
    ("--latents frames.pt", "makes latents of frames"),
    ("--latents planes.pt --data drive", "planes have no frames")])
def test_what_planes_cannot(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    for name, preset in dict(frames="latent", planes="planes").items():
        config = vdm.PRESETS[preset]
        weights = vdm.build_autoencoder(config).state_dict()
        vdm.save(f"{name}.pt", config=asdict(config), stage="autoencoder", ema=weights)
    with pytest.raises(ValueError) as caught:
        train.main([*PLANES.split(), *flags.split(), "--out", "run"])
    assert words in str(caught.value) and "\n" not in str(caught.value)

def test_an_up_sampler_of_latents(latent, tmp_path, asked):
    """It is trained on, and shown at sampling, what the small clip is encoded to once enlarged."""
    shutil.copytree(latent / "decoder", tmp_path / "decoder")
    up = "--give hint --task upsample --enlarge 2 --hint-noise 0.1 --context 0.1 0.9 "
    run(tmp_path / "up", f"--latents {tmp_path}/decoder/last.pt --data drive " + up, LATENT)
    folder, = tmp_path.glob("latents-*")
    stored = torch.from_numpy(np.load(folder / "video.npy")).float()
    told = np.load(folder / "video.actions.npy")
    ae, _ = vdm.load_autoencoder(latent / "decoder/last.pt")

    def enlarged(small):
        large = F.interpolate(small.flatten(0, 1), size=(16, 16), mode="bilinear")
        return ae.encode(large.unflatten(0, small.shape[:2]))

    for i in range(5):
        item = vdm.Drive(4, (16, 16), seed=0)[i]
        clip = item["video"][None]
        small = clip.unflatten(4, (8, 2)).unflatten(3, (8, 2)).mean((4, 6))
        want = torch.cat([enlarged(small), ae.encode(clip)], dim=1)
        close(stored[i], want[0], atol=2e-3, rtol=2e-3)
        assert np.array_equal(told[i, 4:], item["action"])
    asked.clear()
    small = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    np.save(tmp_path / "small.npy", small)
    sample.main(f"{tmp_path}/up --n 1 --steps 1 --context {tmp_path}/small.npy --hint-noise 0 "
                f"--device cpu --dtype fp32 --out {tmp_path}/a.mp4".split())
    shown = asked[0]["concat"][:, :, :4]
    close(shown, enlarged(vdm.from_uint8(small)[None]), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="--task upsample needs pixels, or --latents"):
        run(tmp_path / "no", f"--data {folder} " + up, LATENT)

def settings(out, flags):
    options, config = train.parse([*LATENT.split(), *flags.split(), "--out", str(out / "x")])
    options.device, options.local = torch.device("cpu"), 0
    return options, config

def test_latents_made_elsewhere(tmp_path):
    """.npy files of 5 channels: trained on as they are, with actions, and given back so."""
    many = np.random.default_rng(0).normal(size=(3, 6, 5, 4, 4)).astype(np.float32)
    file = tmp_path / "data/a.npy"
    file.parent.mkdir()
    np.save(file, many)
    np.save(tmp_path / "data/a.actions.npy", np.arange(54).reshape(3, 6, 3))
    flags = f"--data {tmp_path}/data --channels 5 "
    run(tmp_path / "run", flags, LATENT)
    made = np.load(tmp_path / "run/samples/final.npy")
    assert made.shape == (2, 4, 5, 4, 4) and not list(tmp_path.glob("run/samples/*.gif"))
    data, _, _ = train.open_data(*settings(tmp_path, flags), None)
    for item in map(data.__getitem__, range(9)):
        clip, start = divmod(int(item["action"][0, 0]) // 3, 6)
        assert np.array_equal(item["video"], many[clip, start:start + 4])
    wide = 5 * many / many.std()
    for wrong, words in ((wide, r"standard deviation 5, .* multiply it by 0\.2$"),
                         (wide.astype(np.uint8), r"holds uint8 \(3, 6, 5, 4, 4\), expected")):
        np.save(file, wrong)
        with pytest.raises(ValueError, match=words):
            run(tmp_path / "wrong", flags, LATENT)
    with pytest.raises(ValueError, match="is no checkpoint of this program"):
        run(tmp_path / "none", f"--latents {file}", LATENT)

# ---- --dry-run -----------------------------------------------------------------------------------

DRY = ("--preset tiny --frames 3 --size 16 24 --width 32 --mults 1 --attention factorised "
       "--patch 2 --batch 5 --context 0.5 0.5 ")

def dry(capsys, flags):
    """What --dry-run prints: {name: number}, in millions, billions or MiB."""
    train.main([*DRY.split(), *flags.split(), "--dry-run", "--out", "/nowhere"])
    found = re.findall(r"^\w+ +([\d,.]+) \w+ (.*)$", capsys.readouterr().out, re.M)
    return {name: float(number.replace(",", "")) for number, name in found}

def test_dry_run_of_parameters_and_their_memory(capsys):
    """Counted by name; Adam keeps two numbers of each, Muon one; what is frozen, none."""
    model = vdm.build(train.parse(DRY.split())[1])
    total = count_weights(model)
    temporal = count_weights(model, r"\.time|concat")
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1
                   and re.search("down|middle|up", name) and ".emb." not in name)
    near = partial(pytest.approx, abs=0.006)             # MiB; AdamW counts steps, too, per tensor
    for flags, moments in (("", 2 * total - matrices), ("--optimizer adamw", 2 * total)):
        found = dry(capsys, flags)
        assert found["temporal"] == round(temporal / 1e6, 2)
        assert found["spatial"] == round((total - temporal) / 1e6, 2)
        for name, n in dict(weights=total, gradients=total, optimiser=moments, EMA=total).items():
            assert found[name] == near(4 * n / 2 ** 20), name
    rank = 16
    lora = 3 * (8 * 2 * rank * 32 + 2 * 4 * rank * 32)       # 8 matrices and 2 convolutions a block
    found = dry(capsys, f"--adapters lora --rank {rank} --train lora")
    assert found["lora"] == round(lora / 1e6, 2)
    assert found["weights"] == near(4 * (total + lora) / 2 ** 20)
    assert found["gradients"] == found["optimiser"] == near(4 * lora / 2 ** 20)

def test_dry_run_of_operations(capsys):
    """Two per product and sum, of each layer and of attention; backward is twice forward."""
    C, E, T, places = 32, 256, 3, 8 * 12
    L = T * places
    total = T * (64 * E + E * E) + L * 9 * C * (12 + 16 + 12)
    for a in (C, C, 2 * C):                                  # the inputs of down, middle, up
        total += L * (9 * a * C + 9 * C * C + (a * C if a != C else 0) + 6 * C * C) + T * E * 2 * C
        total += 2 * L * 12 * C * C + T * 2 * places ** 2 * C + places * 2 * T ** 2 * C
    found = dry(capsys, "--batch 100")
    assert found["to estimate a clip once"] == pytest.approx(2 * total / 1e9, abs=0.0051)
    assert found["in a step of 100 clips"] == pytest.approx(600 * total / 1e9, rel=0.001)

def test_dry_run_of_activations(capsys):
    """Against what a real step on the CPU keeps of one clip, within 10 %; parameters, which are
    there anyway, do not count."""
    found = dry(capsys, "--dtype fp32")
    _, config = train.parse(DRY.split())
    model = vdm.build(config)
    kept = {}
    x = torch.randn(1, 3, 3, 16, 24)
    def keep(y):                                     # kept holds it, so no other gets its address
        kept.setdefault(y.untyped_storage().data_ptr(), y)
        return y
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        made = model(x, torch.ones(1), context=x, mask=torch.ones(1, 3))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    real = sum(y.untyped_storage().nbytes() for at, y in kept.items() if at not in weights)
    assert made.requires_grad and real > 2 ** 20
    assert found["activations of a clip"] == pytest.approx(real / 2 ** 20, rel=0.1)
    assert found["with --checkpoint-activations"] < 0.6 * found["activations of a clip"]

def test_the_gpu_script_at_toy_size():
    said = python([".ci/gpu.py", "--toy"])
    assert "failed" not in said and said.count("differ by") == 7
    assert "svd: one clip of 4 frames" in said

# ---- the README, the notebooks, the project ------------------------------------------------------

README = (ROOT / "README.md").read_text()

@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project, to work in; the demo's budget is cut, which has no flags."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    source = (tmp_path / "vdm.py").read_text()
    cut = source.replace("steps=600, batch=16", "steps=2, batch=2")
    cut = re.sub(r"karras_sigmas\(20\)(?=, overlap)", "karras_sigmas(2)", cut)
    assert cut.count("batch=2") > source.count("batch=2") and "karras_sigmas(2)" in cut
    (tmp_path / "vdm.py").write_text(cut)
    monkeypatch.chdir(tmp_path)
    return tmp_path

BUDGETS = {"train.py": "--steps 1 --batch 2 --marks 1 --sampling-steps 2 --encode 2",
           "sample.py": "--n 1 --steps 3", "vdm.py": "",
           "notebooks/autoencoder.py": "--steps 1 --batch 2 --marks 1"}

def test_every_command_of_the_readme_runs(project, monkeypatch):
    """In the order of the page; only budgets are cut. What needs many GPUs is read and checked."""
    vdm.write_video("clip.mp4", vdm.MovingShapes(8, (32, 32))[0]["video"])
    vdm.write_video("my_videos/a/b.gif", vdm.MovingShapes(16, (32, 32))[1]["video"])
    np.save("mnist_test_seq.npy", np.zeros((20, 3, 64, 64), np.uint8))
    small = small_published_files()
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [shlex.split(part, comments=True)
             for line in "".join(blocks).splitlines() for part in line.split("&&")]
    assert sum(words[:1] == ["python"] for words in lines) >= 15
    for words in filter(None, lines):
        if words[0] == "torchrun":
            assert words[1:4] == ["--nproc_per_node", "8", "train.py"]
            train.check(*train.parse(words[4:]))
            continue
        if words[0] in ("pip", "pytest"):
            continue
        assert words[0] == "python", words
        more = BUDGETS[words[1]].split()
        if "svd.safetensors" in words and words[1] == "train.py":
            more += small
        monkeypatch.setattr(sys, "argv", [*words[1:], *more])
        try:
            runpy.run_path(str(project / words[1]), run_name="__main__")
        except SystemExit as stop:
            pytest.fail(f"{' '.join(words)}: {stop.code}")
    assert (project / "demo.gif").exists() and (project / "samples.mp4").exists()
    assert len(list(project.glob("out/*/samples/final.gif"))) >= 10

LESSONS = [path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
           if f"(solutions/{path.name[:2]}.py)" in path.read_text()]

def printed(cell):
    """What a code cell of a notebook printed."""
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")

def answers_of(path):
    """The blocks of a file of solutions: (number, "mistake: which" or "solution", code)."""
    parts = re.split(r"^# Exercise (\d+), (.*)\n", path.read_text(), flags=re.M)[1:]
    return list(zip(map(int, parts[::3]), parts[1::3], parts[2::3]))

def with_solutions(book, path):
    """Put into a lesson, behind every exercise's check, each answer of the file and the check once
    more; then the empty answer, so that the rest runs as it is. Returns the cells that check."""
    answers = answers_of(path)
    cells = []
    expected = []
    for cell in book.cells:
        cells.append(cell)
        found = re.match(r"@exercise\((\d+)", cell.source)
        if not found:
            continue
        number = int(found[1])
        empty = cells[-2]
        assert empty.source.startswith(f"# Exercise {number}"), empty.source
        expected.append((cell, (number, "nothing")))
        for _, answer, code in [a for a in answers if a[0] == number]:
            filled = copy.deepcopy(empty)
            filled.source = code
            check = copy.deepcopy(cell)
            cells += [filled, check]
            expected.append((check, (number, answer)))
        assert expected[-1][1][1] == "solution", (number, path)
        cells.append(copy.deepcopy(empty))
    assert {number for _, (number, _) in expected} == {a[0] for a in answers}
    book.cells = cells
    for i, cell in enumerate(cells):
        cell.id = f"cell-{i}"
    return expected

def sections_of(book):
    """The cells of a lesson, apart for each heading."""
    sections = [[]]
    for cell in book.cells[1:]:
        if cell.source.startswith("## "):
            sections.append([])
        sections[-1].append(cell)
    return sections

def unproven(section):
    """Numbers of the prose that stand neither in the code of the section nor in what it printed."""
    code = " ".join(c.source + printed(c) for c in section if c.cell_type == "code")
    known = code.replace(" %", "%").replace("_", "")
    known = {*re.findall(r"(?<![\w.])\d+(?:\.\d+)?%?", known), *map(str, range(2000, 2040))}
    prose = "\n".join(re.sub(r"(?s)\$.*?\$|`.*?`|<[^>]*>|\]\([^)]*\)", " ", c.source)
                      for c in section if c.cell_type == "markdown")
    claims = re.findall(r"(?<![\w.])(\d+(?:\.\d+)? ?%|\d+\.\d+|\d{3,})", prose)
    return [claim for claim in claims if claim.replace(" ", "") not in known]

@cases("path", LESSONS, ids=lambda path: path.name)
def test_lesson_keeps_the_rules(path):
    """Of a lesson as it is stored: its size, its parts, and that each number of its prose with a
    decimal point, a per cent sign or three digits stands in the code of its section or was printed
    by it."""
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(path, as_version=4)
    assert path.stat().st_size <= 400 * 1024
    head = book.cells[0].source
    parts = ("# " + path.name[:2], "**You will be able to**", "**You need**", "**Reading:**",
             "**Computing:**", f"(solutions/{path.name[:2]}.py)")
    assert [part for part in parts if part not in head] == []
    prose = "\n".join(c.source for c in book.cells if c.cell_type == "markdown")
    assert prose.count("**Predict.**") == prose.count("**Answer.**") >= 2
    assert "in vdm.py" in prose
    quiz = prose[prose.index("## Quiz"):]
    assert re.findall(r"<summary>(\d)\. .*\?</summary>", quiz) == list("12345")
    assert prose.count("<details>") == prose.count("</details>")
    for name in re.findall(r"\]\((?!http|\d\d_)([^)#]+)\)", prose):               # or a lesson
        assert (path.parent / name).exists(), name
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")
    for section in sections_of(book):
        assert unproven(section) == [], section[0].source[:200]

def test_figures_are_drawn_by_the_script(tmp_path):
    """Each diagram has its function, and each is shown by a lesson."""
    pytest.importorskip("matplotlib")
    python(["notebooks/figures.py", tmp_path])
    drawn = set(os.listdir(tmp_path))
    assert drawn == set(os.listdir(ROOT / "notebooks/figures"))
    shown = " ".join(path.read_text() for path in LESSONS)
    assert [name for name in drawn if f"(figures/{name})" not in shown] == []

@cases("notebook", sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_notebook_runs(notebook, project, monkeypatch):
    """Every cell, top to bottom, with the tiny budget that VDM_FAST asks for."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    path = project / "notebooks" / notebook
    book = nbformat.read(path, as_version=4)
    assert not re.search('"output_type": "error"', path.read_text())     # as it is stored
    monkeypatch.setenv("VDM_FAST", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    where = dict(metadata=dict(path=str(project / "notebooks")))
    expected = []
    if ROOT / "notebooks" / notebook in LESSONS:
        expected = with_solutions(book, project / f"notebooks/solutions/{notebook[:2]}.py")
    nbclient.NotebookClient(book, timeout=600, startup_timeout=600, resources=where).execute()
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")
    sentences = {}
    for cell, (number, answer) in expected:
        said = printed(cell)
        if answer == "solution":
            assert f"Exercise {number}: right." in said, said
        elif answer == "nothing":
            assert f"Exercise {number}: not answered yet." in said, said
        else:
            assert f"Exercise {number}: not yet." in said, (answer, said)
            assert sentences.setdefault(said, answer) == answer, said  # a sentence for each mistake

def test_layout():
    """At the top there is what a reader needs, and no more."""
    ours = {"README.md", "requirements.txt", "LICENSE", "vdm.py", "train.py", "sample.py",
            "test_vdm.py", "notebooks", ".ci", ".gitignore"}
    made = {".git", "out", "samples", "__pycache__", ".pytest_cache", "demo.gif"}
    videos = ("samples.", "samples-")
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(videos)}
    assert there - made == ours

def test_what_is_to_be_read_is_short():
    assert len(README.split()) <= 1500 and "@@" not in README
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in ("train.py", "sample.py"):
        assert max(map(len, (ROOT / name).read_text().splitlines())) <= 100, name

# ==================================================================================================
# sample.py
# ==================================================================================================

SIDE = 16
SAMPLED = dict(frames=4, size=(SIDE, SIDE), width=8, mults=(1,), attention=("joint",), head_dim=8,
               patch=4, context=(0.5, 0.0, 0.5), overlap=2, sampling_steps=2, skip_guidance=1.0,
               images=0.1)
OF_LATENTS = dict(size=(4, 4), channels=4, factor=4, patch=1)

def write_model(path, autoencoder=None, **fields):
    """A run's last.pt, whose weights are random, those too that a fresh model has at 0."""
    torch.manual_seed(3)
    config = vdm.Config(**SAMPLED | fields)
    more = dict(autoencoder=autoencoder.state_dict()) if autoencoder else {}
    vdm.save(path, config=asdict(config), ema=random_model(config).state_dict(), step=1, **more)
    return path

@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with a clip of 6 frames, one of 4 small ones, and a picture."""
    monkeypatch.chdir(tmp_path)
    clip = np.random.default_rng(1).integers(0, 256, (7, SIDE, SIDE, 3)).astype(np.uint8)
    np.save("clip.npy", clip[:6])
    np.save("small.npy", clip[:4, :4, :4])
    Image.fromarray(clip[6]).save("picture.png")
    return tmp_path

def strips(path, side=SIDE):
    """What a film strip shows, which is written without loss: uint8 (n, T, side, side, 3)."""
    picture = np.asarray(Image.open(path))[::2, ::2]
    H, W, _ = picture.shape
    cells = [[picture[y + 1:y + 1 + side, x + 1:x + 1 + side] for x in range(0, W - 1, side + 1)]
             for y in range(0, H - 1, side + 1)]
    return np.array(cells)

def draw(flags, side=SIDE, out="a.mp4", **fields):
    """Make videos with a small model of these fields of Config, and read their film strip."""
    if not Path("last.pt").exists():
        write_model("last.pt", **fields)
    sample.main(["last.pt", "--device", "cpu", "--dtype", "fp32", "--out", out, *flags.split()])
    return strips(Path(out).with_suffix(".png"), side)

def near(a, b):
    """Equal but for rounding: batches of another size may add up in another order."""
    return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1

ANY = dict(task="any", give="replace")
DRIVE = dict(actions=(4, 2))
HINT = dict(give="hint", hint_noise=0.4)
PREVIOUS = dict(give="previous", context=(0.5, 0.5))
FREE = dict(give="per_frame", independent=1.0, context=(1.0,))
LAST_TWO = ("clip.npy", slice(4, 6), slice(2))
SAMPLING = [    # flags, fields of Config, length, which frames of the videos are those of a file
    ("", {}, 4, None),
    ("--length 9", {}, 9, None),
    ("--context clip.npy --length 7", {}, 7, LAST_TWO),
    ("--context clip.npy --length 8 --overlap 3 --context-frames 1", ANY, 8,
     ("clip.npy", slice(5, 6), slice(1))),
    ("--context clip.npy", dict(stride=3), 4, ("clip.npy", slice(2, 6, 3), slice(2))),
    ("--context clip.npy --length 7", FREE, 7, LAST_TWO),
    ("--context clip.npy --lag 2 --actions LLSRX --length 5", FREE | DRIVE, 5, LAST_TWO),
    ("--context clip.npy --length 7", HINT, 7, LAST_TWO),
    ("--context clip.npy", PREVIOUS, 8, ("clip.npy", slice(2, 6), slice(4))),
    ("--length 9", PREVIOUS, 9, None),
    ("--actions LLSRXXS", DRIVE, 7, None),
    ("--actions LLSRX --context clip.npy --guidance 2 --keep-frames", DRIVE, 5, LAST_TWO),
    ("--label 2 --guidance 1.5 3 --guidance-shape ramp", dict(labels=3), 4, None),
    ("--skip-guidance 2 --length 6 --guidance 2 --guidance-shape triangle", {}, 6, None),
    ("--context clip.npy --context-frames 3 --interpolate 2 3", ANY, 13,
     ("clip.npy", slice(3, 6), slice(None, None, 6))),
    ("--context clip.npy --interpolate 3", dict(task="ends"), 16,
     ("clip.npy", slice(6), slice(None, None, 3))),
    ("--context picture.png --length 3", HINT | dict(task="image"), 3, None),
    ("--context clip.npy --label 1", HINT | dict(task="upsample", frames=3, labels=2, enlarge=2), 6,
     None),
    ("--context clip.npy --reconstruction 2 --length 6 --context-frames 3", dict(context=(1.0,)), 6,
     ("clip.npy", slice(3, 6), slice(3))),
    ("--context clip.npy --reconstruction 2 --length 6 --overlap 1",
     HINT | dict(task="upsample"), 6, ("clip.npy", slice(5, 6), slice(1))),
    ("--context clip.npy --reconstruction 1 --interpolate 2", PREVIOUS, 11,
     ("clip.npy", slice(6), slice(None, None, 2)))]

@cases("flags, fields, length, given", SAMPLING)
def test_every_way_to_sample(here, flags, fields, length, given):
    """Videos have the length asked for; given frames are in them bit for bit; each differs from the
    others elsewhere; video 1 is the same whatever it is made with."""
    made = draw(f"--n 2 {flags}", **fields)
    assert made.shape == (2, length, SIDE, SIDE, 3)
    assert sorted(os.listdir("a")) == ["000.mp4", "001.mp4"]
    assert {"a.mp4", "a.gif", "a.png"} < set(os.listdir())
    assert iio.imread("a/001.mp4", plugin="FFMPEG").shape[0] == length
    new = np.ones(length, bool)
    if given:
        file, those, where = given
        assert all(np.array_equal(video[where], np.load(file)[those]) for video in made)
        new[where] = False
    assert all((a != b).any() for a, b in zip(made[0][new], made[1][new]))
    assert 20 < made[:, new].std()
    assert near(draw(f"--n 2 --batch 1 {flags}", out="b.mp4")[1], made[1])
    assert not near(draw(f"--n 1 --seed 1 {flags}", out="c.mp4")[0], made[0])

def test_roll_out_by_hand(here):
    """Window by window, each from the last two frames: the same as a loop over generate."""
    made = draw("--n 2 --seed 5 --length 9 --context clip.npy --sampler dpmpp_2m_sde --steps 3")
    model, config = vdm.load("last.pt")
    sigmas = vdm.karras_sigmas(3, config.sigma_min, config.sigma_max, config.rho)
    for i in range(2):
        state = np.random.SeedSequence([5, i]).generate_state(1, np.uint64)[0]
        g = torch.Generator().manual_seed(int(state >> 1))
        unit = lambda *shape: torch.randn(shape, generator=g)[None]
        video = vdm.read_video("clip.npy")[None, -2:]
        while video.shape[1] < 9:
            context = torch.cat([video[:, -2:], torch.zeros(1, 2, 3, SIDE, SIDE)], 1)
            window = vdm.generate(model, context.shape, sigmas, vdm.SAMPLERS["dpmpp_2m_sde"],
                                  noise=unit, context=context,
                                  mask=torch.tensor([[1.0, 1, 0, 0]]))
            video = torch.cat([video, window[:, 2:]], 1)
        assert near(made[i], vdm.to_uint8(video[0, :9]))

@cases("flags, fields, wanted", [
    ("--length 8 --actions LLSRXXSL", {}, ["LLSR", "SRXX", "XXSL"]),
    ("--actions LLSRXXS --context clip.npy", {}, ["LLSR", "SRXX", "XXS?"]),
    ("--actions LR", {}, ["LR??"]),
    ("--actions LRS --context picture.png", HINT | dict(task="image"), ["LRS?"])])
def test_actions_go_to_their_windows(here, asked, flags, fields, wanted):
    """The network is told action t with frame t, and NaN after the last."""
    draw(f"--n 1 --steps 1 {flags}", **DRIVE | fields)
    told = [conditions["action"][0] for conditions in asked if "action" in conditions]
    names = {tuple(a): k for a, k in zip(vdm.Drive.ACTIONS.tolist(), "LSRX")}
    assert ["".join(names.get(tuple(a), "?") for a in window.tolist()) for window in told] == wanted
    letters = re.search("--actions ([A-Z]*)", flags)[1]
    np.save("same.npy", vdm.Drive.ACTIONS[["LSRX".index(k) for k in letters]])
    asked.clear()
    draw(f"--n 1 --steps 1 {flags.replace(letters, 'same.npy')}")
    again = [conditions["action"][0] for conditions in asked if "action" in conditions]
    agree(again, told, rtol=0, atol=0, equal_nan=True)

@cases("flags, level", [("", 0.2), ("--hint-noise 0.05", 0.05), ("--hint-noise 0", 0.0)])
@cases("task, file", [("predict", "clip.npy --length 6"), ("image", "picture.png"),
                      ("upsample", "small.npy")])
def test_hints_are_as_noisy_as_is_said(here, asked, flags, level, task, file):
    """By default half of the most in training. Every video and window has noise of its own, a
    picture one for all frames."""
    draw(f"--n 9 --steps 1 --context {file} {flags}", **HINT | dict(task=task))
    shown, mask = asked[0]["concat"].split([3, 1], dim=2)
    if task == "predict":
        assert len(asked) == 2
        assert mask.mean((0, 2, 3, 4)).tolist() == [1, 1, 0, 0]
        noise = shown[:, :2] - vdm.read_video("clip.npy")[-2:]
    elif task == "image":
        noise = shown - vdm.from_uint8(np.asarray(Image.open("picture.png")))
        assert torch.equal(shown[:, 0], shown[:, 3])
    else:
        small = vdm.read_video("small.npy")
        noise = shown - F.interpolate(small, scale_factor=4, mode="bilinear")
    close(noise.std().item(), level, atol=1e-5, rtol=0.05)
    assert asked[0]["augmentation"].tolist() == pytest.approx([level] * 9)
    assert level == 0 or abs((noise[0] * noise[1]).mean()) < 0.2 * level ** 2

@cases("level", [0.1, 0.8])
def test_enlarging_against_bayes(level):
    """Pixels are independent and normal. So of a pixel g that is seen under noise of the level l, a
    draw has mean g / (1 + l^2), and variance l^2 / (1 + l^2) around the mean given what is seen,
    g + noise. 11 frames in windows of 4 are all drawn, whatever their windows."""
    def ask(x, sigma, concat, augmentation):
        s, l = (v.view(-1, 1, 1, 1, 1) ** 2 for v in (sigma, augmentation))
        assert (concat[:, :, 3] == 1).all()
        return (x / s + concat[:, :, :3] / l) / (1 + 1 / s + 1 / l)

    job = SimpleNamespace(config=vdm.Config(**SAMPLED), seed=1, device="cpu", denoise=ask, told={},
                          level=torch.tensor([level]), sampler=vdm.SAMPLERS["ddpm"], actions=None,
                          sigmas=vdm.karras_sigmas(60, 0.01, 80.0))
    given = torch.randn(2, 11, 3, SIDE, SIDE)
    pieces = list(sample.enlarge(job, range(2), (2, 4, 3, SIDE, SIDE), given))
    assert [piece.shape[1] for piece in pieces] == [4, 4, 3]
    noise = torch.cat(pieces, 1) - given / (1 + level ** 2)
    want = level ** 2 / (1 + level ** 2) ** 2 + level ** 2 / (1 + level ** 2)
    for frame in noise.unbind(1):                                        # 1536 numbers
        assert abs(frame.mean()) < 4 * math.sqrt(want / 1536)
        assert frame.var().item() == pytest.approx(want, rel=0.16)
    assert abs((noise[0] * noise[1]).mean()) < 4 * want / math.sqrt(noise[0].numel())

@pytest.fixture
def cascade(here, monkeypatch):
    """Three checkpoints: 3 key frames, all 5, twice as large. cascade(names, flags) makes videos
    with some of them. cascade.made lists what each stage made, cascade.seeds the seeds."""
    few = dict(size=(8, 8), frames=3, context=(1.0,))
    write_model("key.pt", **few)
    write_model("fill.pt", **few | dict(task="any", frames=5, context=(0.5, 0.5)))
    write_model("up.pt", **HINT | dict(task="upsample", enlarge=2, frames=3))
    make = sample.make
    noise = vdm.clip_noise

    def run(names, flags="--n 2"):
        run.made = []
        run.seeds = []
        flags += " --device cpu --dtype fp32 --out a.mp4 --interpolate 2"
        sample.main(f"{names} {flags}".split())
        return run.made[-1]

    monkeypatch.setattr(sample, "make", lambda job: run.made.append(make(job)) or run.made[-1])
    monkeypatch.setattr(vdm, "clip_noise", lambda seed, *args: run.seeds.append(seed)
                        or noise(seed, *args))
    return run

def test_a_cascade(cascade, asked):
    """Each stage is given just what the one before has made; key frames stay as they are; a video
    depends on the seed and its number."""
    every = "key.pt fill.pt up.pt"
    large = cascade(every, "--n 2 --hint-noise 0")
    key, fill, _ = cascade.made
    assert [x.shape[1:] for x in cascade.made] == [(3, 3, 8, 8), (5, 3, 8, 8), (5, 3, 16, 16)]
    assert len(set(cascade.seeds)) == len(cascade.seeds) == 4
    assert torch.equal(fill[:, ::2], key) and not torch.equal(fill[0], fill[1])
    hints = [c["concat"] for c in asked if "augmentation" in c][::2]     # of the first of two steps
    shown = torch.cat(hints, 1)[:, :, :3]
    close(shown, F.interpolate(fill.flatten(0, 1), (16, 16), mode="bilinear").view_as(large))
    assert len(os.listdir("a")) == 2 and strips("a.png").shape == (2, 5, SIDE, SIDE, 3)
    again = cascade(every, "--n 2 --hint-noise 0 --batch 1")
    close(again, large, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(cascade(every, "--n 2 --hint-noise 0.4"), large, atol=0.01)

def test_a_cascade_of_a_clip(cascade):
    """And what is no cascade."""
    clip = cascade("fill.pt up.pt", "--n 1 --context clip.npy --context-frames 2")
    assert clip.shape == (1, 3, 3, 16, 16)
    assert torch.equal(cascade.made[0][0, ::2], vdm.read_video("clip.npy", (8, 8))[-2:])
    for names, words in (("key.pt key.pt", "key.pt cannot go on from videos"),
                         ("up.pt fill.pt", r"fill.pt goes on from frames of \(3, 8, 8\)"),
                         ("key.pt up.pt last.pt", "no checkpoint last.pt")):
        with pytest.raises(ValueError, match=words):
            cascade(names)

def test_ctrl_c_ends_a_cascade(here, monkeypatch, sigint):
    """What is there is written, and no checkpoint goes on from it."""
    write_model("last.pt", size=(8, 8))
    write_model("up.pt", **HINT | dict(task="upsample", enlarge=2))
    at_window(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    sample.main("last.pt up.pt --n 3 --batch 1 --device cpu --out a.mp4".split())
    assert strips("a.png", 8).shape == (2, 4, 8, 8, 3)

def fake(**flags):
    usual = dict(config=vdm.Config(**SAMPLED), guidance=[], guidance_shape="constant",
                 keep_frames=False, reconstruction=None)
    return SimpleNamespace(**usual | flags)

@cases("numbers, shape, wanted", [
    ([2.5], "constant", [2.5] * 4), ([2.5], "ramp", [1, 1.5, 2, 2.5]),
    ([1.5, 3], "ramp", [1.5, 2, 2.5, 3]), ([2.5], "triangle", [1, 2, 2, 1])])
@cases("keep", [False, True])
def test_guidance_of_the_program(numbers, shape, wanted, keep):
    """free + scale (given - free), where a label is worth 1 and a picture 10: with --keep-frames
    both estimates see it."""
    def ask(x, sigma, label=None, concat=None):
        return 0 * x + (label is not None) + 10 * (concat is not None)

    denoise = sample.steered(fake(guidance=numbers, guidance_shape=shape, keep_frames=keep), ask)
    got = denoise(torch.randn(2, 4, 3, 2, 2), torch.ones(2), label=0, concat=0)[1, :, 2, 1, 0]
    close(got, torch.tensor(wanted) * 1.0 + 10 if keep else torch.tensor(wanted) * 11.0)

def test_reconstruction_by_its_formula():
    """VDM eq. 7 for a linear network: half its gradient, times the weight; nothing where no frame
    is given."""
    matrix = torch.randn(4, 4)
    x, context = torch.randn(2, 1, 4, 1, 1, 1)
    ask = lambda x, sigma: torch.einsum("st,btchw->bschw", matrix, x)
    denoise = sample.steered(fake(reconstruction=3.0), ask)
    mask = torch.tensor([[1.0, 0, 0, 0]])
    with torch.no_grad():
        close(denoise(x, torch.ones(1)), ask(x, 1))
        got = denoise(x, torch.ones(1), context=context, mask=mask)
    want = ask(x, 1) + 3 * (context - ask(x, 1))[:, :1] * matrix[0].view_as(x)
    close(got, torch.cat([context[:, :1], want[:, 1:]], 1))

def test_every_frame_in_its_place(here, monkeypatch):
    """Three videos of known brightness in two batches, in pieces of uneven length: no GIF of so
    many frames, and the strip shows every third one. The fourth place of the grid stays black."""
    light = torch.rand(3, 70) * 1.8 - 0.9

    def rollout(denoise, length, shape, sigmas, overlap, given, seed, clips, *_, **options):
        video = light[list(clips), :, None, None, None].expand(-1, -1, 3, SIDE, SIDE)
        yield from video.split([4, 30, 1, 35], 1)

    monkeypatch.setattr(vdm, "rollout", rollout)
    strip = draw("--n 3 --batch 2 --length 70")
    assert np.abs(strip.mean((2, 3, 4)) / 127.5 - 1 - light[:, ::3].numpy()).max() < 0.01
    assert not Path("a.gif").exists()
    grid = iio.imread("a.mp4", plugin="FFMPEG")                    # 2 x 2 cells of 17 x 17 pixels
    k = grid.shape[1] // 35
    want = [*light.numpy(), -np.ones(70)]
    for i in range(4):
        seen = grid[:, (17 * (i // 2) + 9) * k, (17 * (i % 2) + 9) * k].mean(-1) / 127.5 - 1
        assert np.abs(seen - want[i]).max() < 0.05
    for i in range(3):
        own = iio.imread(f"a/{i:03d}.mp4", plugin="FFMPEG").mean((1, 2, 3)) / 127.5 - 1
        assert np.abs(own - want[i]).max() < 0.05

def test_printed_reward(here, capsys):
    made = draw("--n 3 --actions LSRXL", **DRIVE)
    said = float(re.search(r"reward +(\S+):", capsys.readouterr().out)[1])
    assert said == pytest.approx(math.exp(-(made / 127.5).var(0, ddof=1).mean()), abs=0.002)
    assert said < 0.999
    draw("--n 1 --actions LSRXL")
    assert "reward" not in capsys.readouterr().out

@cases("batch, length, windows, number, kept", [
    (1, 4, 2, signal.SIGINT, (2, 4)), (3, 6, 1, signal.SIGTERM, (3, 4)),
    (2, 6, 3, signal.SIGHUP, (2, 6)), (3, 6, 0, signal.SIGTERM, None)])
def test_ctrl_c_keeps_what_is_there(here, monkeypatch, capfd, sigint, batch, length, windows,
                                    number, kept):
    """The videos that are complete or, if none is, the frames that there are of the first ones."""
    flags = f"--n 3 --length {length} --batch {batch}"
    whole = draw(flags, out="b.mp4")

    def twice():
        signal.raise_signal(number)
        signal.raise_signal(number)

    at_window(monkeypatch, windows, twice)
    if kept is None:
        with pytest.raises(ValueError, match="there was no frame yet"):
            draw(flags)
        assert not Path("a").exists()
        return
    made = draw(flags)
    assert np.array_equal(made, whole[:kept[0], :kept[1]]) and len(os.listdir("a")) == kept[0]
    said = capfd.readouterr()
    assert said.err.count("stopping: videos that are complete are kept") == 2
    assert f"{kept[0]} of 3 videos" in said.out or kept[0] == 3

def test_what_is_complete_is_written_at_once(here, monkeypatch):
    """A crash in the second batch leaves the videos of the first."""
    draw("--n 2 --batch 1", out="b.mp4")
    at_window(monkeypatch, 1, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw("--n 2 --batch 1")
    assert os.listdir("a") == ["000.mp4"]
    assert Path("a/000.mp4").read_bytes() == Path("b/000.mp4").read_bytes()

def test_older_videos_stay(here):
    """Videos, or files and folders of that name, whatever is in them. They may be given, too."""
    (here / "file").touch()
    (here / "folder").mkdir()
    made = draw("--n 1")
    before = {path: path.read_bytes() for path in here.glob("**/*") if path.is_file()}
    draw("--n 1 --seed 1 --context a/000.mp4")
    for name in ("a", "file", "folder"):
        sample.main(f"last.pt --device cpu --dtype fp32 --n 1 --out {name}.mp4".split())
    assert all(path.read_bytes() == content for path, content in before.items())
    assert {"a-2.mp4", "a-3.png", "file-2.mp4", "folder-2.gif"} < set(os.listdir())
    assert near(strips("a-3.png"), made) and not near(strips("a-2.png"), made)

def test_last_weights(here):
    """--raw: those that training left, not their average."""
    state = torch.load(write_model("last.pt"), weights_only=True)
    average = draw("--n 1")
    black = {name: 0 * w for name, w in state["ema"].items()}
    vdm.save("last.pt", **state | dict(model=state["ema"], ema=black))
    assert near(draw("--n 1 --raw", out="last.mp4"), average)
    assert not near(draw("--n 1", out="zero.mp4"), average)

def test_latents_with_their_autoencoder(here):
    """What is given is encoded, what comes is decoded; the same as decoding a roll-out at once."""
    autoencoder = vdm.Autoencoder(factor=4, latent=4)
    for name, gate in autoencoder.named_parameters():
        if name.endswith("gate"):
            nn.init.ones_(gate)
    write_model("last.pt", autoencoder, **OF_LATENTS)
    made = draw("--n 2 --length 9 --context clip.npy --sampler ddim")
    model, config = vdm.load("last.pt")
    sigmas = vdm.karras_sigmas(2, config.sigma_min, config.sigma_max, config.rho)
    with torch.no_grad():
        given = autoencoder.encode(vdm.read_video("clip.npy")[None])[:, -2:]
        given = given.expand(2, -1, -1, -1, -1)
        latents = torch.cat(list(vdm.rollout(model, 9, (2, 4, 4, 4, 4), sigmas, 2, given,
                                             sampler=vdm.sample_ddim)), 1)
        assert near(made, vdm.to_uint8(autoencoder.decode_all(latents)))

def test_latents_from_elsewhere(here):
    """.npy in, .npy out: what is given comes first, bit for bit."""
    write_model("last.pt", **OF_LATENTS)
    given = np.random.default_rng(0).normal(size=(5, 4, 4, 4)).astype(np.float32)
    np.save("given.npy", given)
    flags = "--device cpu --n 2 --context given.npy --length 7 --out x/made.mp4"
    sample.main(["last.pt", *flags.split()])
    assert os.listdir("x") == ["made"]
    assert sorted(os.listdir("x/made")) == ["000.npy", "001.npy"]
    a, b = (np.load(f"x/made/{name}.npy") for name in ("000", "001"))
    assert a.shape == (7, 4, 4, 4) and (a[2:] != b[2:]).all()
    assert np.array_equal(a[:2], given[-2:]) and np.array_equal(b[:2], given[-2:])
    for wrong in ("clip.npy", "nothing.npy", "picture.png"):
        with pytest.raises(ValueError, match=wrong):
            sample.main(f"last.pt --context {wrong}".split())

def test_which_checkpoint(here, monkeypatch, capsys):
    """Without a name the newest under out/, else the weights that come along; of a folder its
    last.pt."""
    (here / "notebooks").mkdir()
    monkeypatch.setattr(sample, "__file__", str(here / "sample.py"))
    quick = ["--n", "1", "--steps", "1", "--device", "cpu"]
    with pytest.raises(ValueError, match=r"tiny\.pt"):
        sample.main(quick)
    write_model("notebooks/tiny.pt")
    for name, flags in (("notebooks/tiny.pt", []), ("out/b/last.pt", []),
                        ("out/a/last.pt", ["out/a"]), ("out/b/last.pt", [])):
        for k, other in enumerate("ab"):
            if name.startswith("out"):
                write_model(f"out/{other}/last.pt")
                os.utime(f"out/{other}/last.pt", (1e9 + k, 1e9 + k))
        sample.main([*flags, *quick])
        said = capsys.readouterr().out
        assert re.search(f"{name}\n.*1 videos of 4 frames, dpmpp_2m_sde, 1 steps, on cpu in "
                         "(float32|bfloat16)", said)

WRONG = [        # flags, words that must be said, fields of Config
    ("--length 1 --context clip.npy", "--length is 1, expected more than the 2", {}),
    ("--context missing.mp4", "missing.mp4 does not exist", {}),
    ("--context clip.npy --context-frames 1", "given 2 frames: give as many", {}),
    ("--context clip.npy --context-frames 9", "--context-frames is 9, expected at most 6", {}),
    ("--context clip.npy", "given no frames: .* try --reconstruction", dict(context=(1.0,))),
    ("--length 5", "so a window .* given no frames: try --recon", dict(context=(1.0,))),
    ("--length 9 --overlap 3", "so .* from 3 frames .--overlap., but .* given 2", {}),
    ("--length 5", "given no frames", HINT | dict(task="image")),
    ("--interpolate 2 --context clip.npy", "--interpolate needs a model of --task any", {}),
    ("--interpolate 2 --context clip.npy", "--interpolate 3, ends", dict(task="ends")),
    ("--interpolate 2 --context clip.npy", "--interpolate needs", HINT | dict(task="any")),
    ("--interpolate 2", "--context gives 0", ANY),
    ("--interpolate 2 4 --context clip.npy", "--interpolate is .2, 4., expected 2 to 3", ANY),
    ("--interpolate 2 --length 5 --context clip.npy", "--length is 5, expected 11", ANY),
    ("--interpolate 2 --actions LL --context clip.npy", "goes neither with", DRIVE | ANY),
    ("--context clip.npy --context-frames 3", "gives 3 frames, but .* given 4 frames", PREVIOUS),
    ("--actions LLLLL", "nor with SVD or a model of --give previous", PREVIOUS | DRIVE),
    ("--context clip.npy --length 5", "--length is 5, expected 6", HINT | dict(task="upsample")),
    ("--hint-noise 0.5", "--hint-noise is 0.5, expected at most 0.4", HINT),
    ("--later-steps 2", "for models of --give previous", {}),
    ("--label 3", "--label is 3, expected one of 3 classes", dict(labels=3)),
    ("--actions LL", "this model was trained without actions", {}),
    ("--actions LQ", "--actions is 'LQ', expected letters of LSRX", DRIVE),
    ("--actions LL --length 3", "--length is 3, expected 2", DRIVE),
    ("--actions no.npy", "no.npy cannot be read", DRIVE),
    ("--actions clip.npy", r"clip.npy holds \(6, 16, 16, 3\), but the model knows", DRIVE),
    ("--context nothing.mp4", "nothing.mp4", {}),
    ("--skip-guidance 2", "--skip-guidance .* --images", dict(images=0.0)),
    ("--out x.wmv", "--out is x.wmv, expected .* .mp4 or .gif", {}),
    ("--raw", "these weights", {}),
    ("--device quantum", "--device quantum", {}),
    ("--n 0", "--n is 0, expected 1", {}),
    ("--fps nan", "--fps is nan, expected 0.1 to 1000", {}),
    ("--guidance inf --length 9", "--guidance is .inf", {}),
    ("--seed -1", "--seed is -1", {}),
    ("--lag 9", "--lag needs a model of --give per_frame", {}),
    ("--lag 3", "lag is 3, expected 1 to 2: 2 steps", FREE),
    ("--lag 2 --sampler heun", "nor with --sampler heun", FREE),
    ("--lag 2 --interpolate 2 --context clip.npy", "neither with --interpolate", FREE)]

@cases("flags, words, fields", WRONG)
def test_errors_are_one_sentence(here, flags, words, fields):
    """They name the flag, what was expected, and come before anything is written."""
    write_model("last.pt", **fields)
    before = sorted(os.listdir())
    with pytest.raises(ValueError, match=words) as error:
        sample.main(["last.pt", "--device", "cpu", "--out", "a.mp4", *flags.split(" ")])
    assert "\n" not in str(error.value) and sorted(os.listdir()) == before

# ==================================================================================================
# The experiments
# ==================================================================================================

BENCHED = dict(width=16, mults=(1, 2), attention=("none", "factorised"), size=(16, 16),
               sampling_steps=2)

def write_dark_model(path, **fields):
    """A model of random weights, whose clips are nearly black."""
    torch.manual_seed(0)
    config = dataclasses.replace(vdm.PRESETS["tiny"], **BENCHED | fields)
    denoiser = vdm.build(config)
    denoiser.net.output[2].bias.data.fill_(-0.9)
    vdm.save(path / "last.pt", config=dataclasses.asdict(config), step=1, ema=denoiser.state_dict())

@cases("fields, flags, words", [
    ({}, "--skip-guidance 1 --sampler ddim --steps 3 --sigma-min 0.1 --overlap 2", ""),
    (dict(give="hint"), "--given 2", ""),
    (dict(give="hint", task="image"), "--given 1", ""),
    (dict(give="previous", context=(0.5, 0.5)), "", ""),
    (dict(give="per_frame"), "--lengths 8 12", ""),
    (dict(give="per_frame", independent=1.0), "--lag 1 --lengths 8 9", ""),
    (dict(actions=(4, 2)), "", "told nothing: "),
    (dict(task="any"), "--interpolate 2 2", "interpolation 2 x 2: ")])
def test_benchmark(tmp_path, capsys, fields, flags, words):
    """Of the real clips in its table all pass."""
    write_dark_model(tmp_path, **fields)
    benchmark.main(["--run", str(tmp_path), "--n", "3", "--seeds", "5", *flags.split()])
    said = capsys.readouterr().out
    assert words in said
    if not words:
        names, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]]
                           for line in said.splitlines()[2:]]
        assert names[:4] == ["frames", "noise", "passed", "shape"]
        assert [row[1] for row in rows] == ["seed 5", "real"] * 2
        assert {len(row) for row in rows} == {len(names)}
        assert rows[1][2:9] == ["100%"] * 7

def test_benchmark_of_costs(tmp_path, capsys):
    """Numbers in a clip and parameters, counted here; 2 GiB is room for at least one clip."""
    write_dark_model(tmp_path / "a")
    benchmark.main(["--costs", str(tmp_path / "a"), "--n", "2"])
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")[1:-1]]
    weights = torch.load(tmp_path / "a/last.pt", weights_only=True)["ema"]
    millions = sum(w.numel() for w in weights.values()) / 1e6
    assert row[:4] == ["a", f"{8 * 3 * 16 * 16:,}", "", f"{millions:.2f} M"]
    assert int(row[5]) > 1 and all(float(x) >= 0 for cell in row[6:8] for x in cell.split(","))

def test_long_videos_depend_on_their_number_and_start_with_their_frames(tmp_path):
    write_dark_model(tmp_path)
    model = benchmark.Model(tmp_path / "last.pt")
    context = torch.rand(17, 4, 3, 16, 16)
    video = model.draw(17, 12, 0, context)
    assert video.shape == (17, 12, 3, 16, 16) and torch.equal(video[:, :4], context)
    assert torch.allclose(video[:2], model.draw(2, 12, 0, context[:2]), atol=1e-4)

def test_flags_of_the_ablation():
    assert [train.check(*train.parse(flags.split())) for flags in ablation.TRAIN]
    assert all(benchmark.parse_changes(train.Parser(), f.split())[1] for f in ablation.DRAW)

def test_table_of_adapters(tmp_path):
    """Rows of two ways. The number of SimDA's adapters is found by hand, for three places."""
    small = vdm.Config(frames=4, size=(8, 8), mults=(1,), attention=("factorised",), context=(1.0,),
                       steps=2, batch=2, sampling_steps=2)
    adapters.row("image", small, 0, 2, tmp_path)
    name, trained, share, large, seconds, *marks = adapters.row("SimDA", small, 0, 2, tmp_path)
    assert [name, trained, large] == ["SimDA", f"{3 * (2 * 16 ** 2 + 6 * 16):,}", "3.1%"]
    assert float(seconds) > 0 and len(marks) == 10 and (tmp_path / "SimDA-0.png").exists()
    assert 0.01 < float(share.rstrip("%")) / 100 < 0.05

def test_table_of_claims(tmp_path, monkeypatch):
    """Of two settings, which take part in all claims."""
    flags = ("--seeds 1 --steps 4 --clips 2 --size 16 --width 16 --mults 1 --attention joint "
             f"--sampling-steps 2 --warmup 1 --lr 0.3 --out {tmp_path} --csv {tmp_path}/t.csv")
    monkeypatch.setattr(claims, "SETTINGS", {"base": "", "plain loss": "--loss plain"})
    monkeypatch.setattr(sys, "argv", ["claims.py", *flags.split()])
    claims.main()
    rows = list(csv.DictReader(open(tmp_path / "t.csv")))
    assert list(rows[0]) == "claim setting measure mean std seeds verdict".split()
    assert {row["claim"][0] for row in rows} == set("abcdefg")
    assert all(math.isfinite(float(row["mean"])) for row in rows)

@cases("key, values, verdict", [
    ("error", (0.9, 1.9, 2.8), "better"), ("error", (1.1, 2.1, 2.9), "unclear"),
    ("error", (1.1, 2.9, 3.1), "unclear"), ("pass", (2, 3, 4), "better")])
def test_verdicts(key, values, verdict):
    assert claims.verdict(key, values, (1, 2, 3)) == verdict

def test_self_forcing(capsys):
    """A perfect model draws the true frames; noise is at most 0.2. Each way has a row."""
    clips = torch.rand(3, 12, 3, 4, 4)
    perfect = lambda x, sigma, context, mask: clips[:, :8]
    noisy = self_forcing.last_eight("noise", perfect, clips) - clips[:, 4:]
    assert 0 < noisy.flatten(1).std(1).max() < 0.25
    for way in ("plain", "own"):
        agree(self_forcing.last_eight(way, perfect, clips), clips[:, 4:])
    self_forcing.main(steps=1, seeds=1, n=2, length=12, levels=1)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(":")[0] for row in rows] == ["before 0", "plain 0", "noise 0", "own 0"]

# ---- the weights that come along -----------------------------------------------------------------

def test_the_weights_that_come_along():
    """notebooks/tiny.pt fits the network of today and the preset tiny, is at most 4 MB, and draws
    clips that obey the laws of their world, which random weights never do."""
    path = Path(__file__).parent / "notebooks/tiny.pt"
    assert path.stat().st_size <= 4e6
    denoiser, config = vdm.load(path)
    assert config == vdm.PRESETS["tiny"]
    clips = train.sample(config, denoiser, 8, torch.device("cpu"), torch.float32, seed=3)
    assert vdm.MovingShapes().check(clips)["passed"].mean() >= 0.6

DRIVE_PT = Path(__file__).parent / "notebooks/drive.pt"

def test_the_model_that_comes_along():
    """notebooks/drive.pt fits the network of today, is at most 4 MB, and its frames do what each
    key says, on a map of its own. With the keys exchanged, from the same start and noise, they do
    what these say."""
    assert DRIVE_PT.stat().st_size <= 4e6
    model, config = vdm.load(DRIVE_PT)
    assert config == dataclasses.replace(
        vdm.PRESETS["tiny"], frames=4, patch=4, width=32, mults=(1, 3), actions=(4, 2), drop=0.0,
        attention=("none", "joint"), context=(0.2, 0.1, 0.1, 0.6), overlap=3, images=0.0,
        skip_guidance=1.0, steps=700)
    keys = "SSSSRRRRSSLLLLXX"
    for keys in (keys, keys.translate(str.maketrans("LRSX", "RLXS"))):
        ride = play.Ride(model, config, steps=2, seed=5)
        frames = [ride.go(key)[0] for key in keys]
        seen = vdm.Drive(len(keys)).check(vdm.from_uint8(np.stack(frames))[None])["commands"][0]
        assert (seen == ["LSRX".index(key) for key in keys[1:]]).mean() >= 0.9

# ---- notebooks/play.py ---------------------------------------------------------------------------

def perfect_driver(x, sigma, action, context=None, mask=None):
    """A denoiser that knows the world. A frame that is not given is the one before, moved as its
    action says, on a map of few waves that fit into the frame. The first is made of noise x."""
    f = torch.fft.fftfreq(32) * 32                                             # cycles per frame
    frame = torch.fft.ifft2(torch.fft.fft2(x[:, 0]) * (f.abs()[:, None] + f.abs() < 3)).real
    frame = frame / frame.abs().max()                                              # (1, 3, 32, 32)
    frames = []
    for t in range(x.shape[1]):
        if mask is not None and mask[0, t]:
            frame = context[:, t]
        elif t > 0:
            down, right = 2 * action[0, t, 4:] * (2 * math.pi / 32)
            moved = torch.fft.fft2(frame) * torch.exp(1j * (down * f[:, None] + right * f))
            frame = torch.fft.ifft2(moved).real
        frames.append(frame)
    return torch.stack(frames, 1)

@pytest.fixture
def served():
    """A server of rides on a free port. server.made lists the keys of the frames it was asked."""
    config = vdm.Config(frames=4, actions=(4, 2), context=(0.5, 0, 0, 0.5))
    server = play.Server(lambda seed: play.Ride(perfect_driver, config, 2, seed), 0)
    server.made = []
    frame = server.frame
    server.frame = lambda key: server.made.append(key) or frame(key)
    thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.01))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()

def ask(server, method, path, **headers):
    """Send a request -> status, body, headers."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body, response.headers

def test_page_and_its_frames(served):
    """The page's own requests: frames move as their keys say, and N starts another ride. The
    commands are read from the pixels that were sent."""
    host = f"127.0.0.1:{served.server_port}"
    status, page, headers = ask(served, "GET", "/")
    assert status == 200 and b"<canvas>" in page and "text/html" in headers["Content-Type"]
    keys = "NSSSSRRRRLLLLXXX" "NSSSS"
    frames = []
    marks = ""
    for key in keys:
        status, body, headers = ask(served, "POST", f"/{key}", Origin=f"http://{host}")
        assert status == 200 and headers["Width"] == "32"
        frames.append(np.frombuffer(body, np.uint8).reshape(32, 32, 4))
        marks += headers["Seen"]
    pixels = np.stack(frames)
    assert (pixels[..., 3] == 255).all()
    told = np.array(["LSRX".find(key) for key in keys])                       # -1 of a new ride
    seen = vdm.Drive(len(keys)).check(vdm.from_uint8(pixels[..., :3])[None])["commands"][0]
    assert seen[seen >= 0].tolist() == told[told >= 0].tolist() and seen[15] == -1
    assert marks == keys.replace("N", "X")
    assert "".join(served.made) == keys

@cases("method, path, headers, status", [
    ("POST", "/L", dict(Host="evil.example"), 403),
    ("POST", "/L", dict(Host="evil.example:PORT"), 403),
    ("POST", "/L", dict(Host="127.0.0.1:1"), 403),
    ("POST", "/L", dict(Origin="http://evil.example"), 403),
    ("POST", "/L", dict(Origin="null"), 403),
    ("POST", "/L", dict(Origin="http://localhost:PORT"), 403),
    ("GET", "/", dict(Host="evil.example:PORT", Origin="http://evil.example:PORT"), 403),
    ("GET", "/L", {}, 404), ("POST", "/Q", {}, 404), ("POST", "/LL", {}, 404),
    ("POST", "/L?x", {}, 404), ("POST", "/", {}, 404), ("GET", "/../vdm.py", {}, 404)])
def test_nobody_else_steers(served, method, path, headers, status):
    """Another name of this machine (DNS rebinding), a page of another site, another path: no frame
    is made. The server listens to this machine alone."""
    headers = {name: value.replace("PORT", str(served.server_port))
               for name, value in headers.items()}
    assert ask(served, method, path, **headers)[0] == status
    assert served.made == [] and served.server_address[0] == "127.0.0.1"
    assert ask(served, "GET", "/", Host=f"localhost:{served.server_port}")[0] == 200

def test_page_that_closes(served, capfd):
    """A page that goes away while its frame is made costs this frame, stops nobody, and leaves no
    traceback. Two pages get their frames one after the other."""
    release = threading.Event()
    frame = served.frame
    served.frame = lambda key: release.wait(60) and frame(key)
    connection = http.client.HTTPConnection("127.0.0.1", served.server_port)
    connection.request("POST", "/S")
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()                                                            # by a reset
    release.set()
    assert ask(served, "POST", "/R")[0] == 200
    answers = []
    pages = [threading.Thread(target=lambda: answers.append(ask(served, "POST", "/R")[0]))
             for _ in range(2)]
    for page in pages:
        page.start()
    for page in pages:
        page.join()
    assert answers == [200, 200]
    assert sorted(served.made) == [*"RRRS"]
    assert capfd.readouterr().err == ""

def test_play_as_a_program(tmp_path, capsys, monkeypatch):
    """--gif writes the ride of PLAN, below each frame the key; without it a page is served. Models
    of another kind are refused."""
    monkeypatch.setattr(play, "PLAN", "LSXRLR")
    path = str(tmp_path / "last.pt")
    config = vdm.Config(actions=(4, 2), width=8, mults=(1,), attention=("none",))
    vdm.save(path, config=asdict(config), ema=vdm.build(config).state_dict())
    play.main([path, "--gif", str(tmp_path / "ride.gif"), "--steps", "1"])
    frames = iio.imread(tmp_path / "ride.gif").astype(int)
    assert frames.shape == (6, 160, 128, 3)
    gold = (np.abs(frames[:, 128:] - [255, 215, 0]).max(-1) < 9).sum(1).reshape(6, 4, 32).sum(-1)
    assert (gold > 0).nonzero()[1].tolist() == [0, 1, 2, 3, 0, 3]

    def interrupted(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(play.Server, "serve_forever", interrupted)
    play.main([path, "--port", "0"])
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ValueError, match="--port"):
        play.main([path, "--port", str(other.getsockname()[1])])
    assert re.search(r"open http://127.0.0.1:\d+ in", capsys.readouterr().out)
    with pytest.raises(ValueError, match="tiny.pt cannot be driven"):
        play.main([str(DRIVE_PT.with_name("tiny.pt"))])

class Chromium:
    """A headless Chromium, spoken to by its DevTools protocol through two pipes."""

    def __init__(self, program, folder):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                 "--window-size=700,800", f"--user-data-dir={folder}", "about:blank"]
        # the browser reads commands from file 3, and writes to file 4
        command = ["sh", "-c", 'exec "$@" 3<&0 4>&1 >&2', "", program, *flags]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL)
        self.number = 0
        self.session = {}
        page = next(t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.target = page["targetId"]
        self.session = dict(sessionId=self("Target.attachToTarget", targetId=self.target,
                                           flatten=True)["sessionId"])

    def __call__(self, method, **params):
        self.number += 1
        call = dict(id=self.number, method=method, params=params, **self.session)
        self.process.stdin.write(json.dumps(call).encode() + b"\0")
        self.process.stdin.flush()
        while True:                                             # there are events between answers
            text = b"".join(iter(partial(self.process.stdout.read, 1), b"\0"))
            answer = json.loads(text)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression):
        """What an expression of JavaScript is in the page."""
        return self("Runtime.evaluate", expression=expression, returnByValue=True,
                    awaitPromise=True)["result"].get("value")

    def key(self, kind, key):
        self("Input.dispatchKeyEvent", type=kind, key=key)

    def wait(self, expression):
        end = time.time() + 60
        while not self.value(expression):
            assert time.time() < end, expression
            time.sleep(0.02)

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_in_a_browser(served, tmp_path):
    """A real browser: the page shows a frame, a held key steers, a tap is not lost, and without a
    key, hidden or closed it asks for nothing."""
    browser = Chromium(BROWSER, tmp_path)
    try:
        browser("Page.navigate", url=f"http://localhost:{served.server_port}/")
        browser.wait("typeof times == 'object' && times.length == 1 && !asking")
        assert served.made == ["N"]
        pixels = "[...find('canvas').getContext('2d').getImageData(0, 0, 32, 32).data]"
        first = browser.value(pixels)
        browser.key("keyDown", "ArrowRight")
        browser.wait("times.length >= 6")
        assert browser.value("find('b.on').id") == "R"
        browser.key("keyDown", "ArrowUp")                           # the newest of two keys held
        browser.wait("times.length >= 9")
        browser.key("keyUp", "ArrowUp")
        browser.wait("times.length >= 12")
        browser.key("keyUp", "ArrowRight")
        browser.key("keyDown", "ArrowLeft")                                               # a tap
        browser.key("keyUp", "ArrowLeft")
        browser.wait("!asking")
        made = "".join(served.made)
        assert re.fullmatch("NR+S+R+LX+", made)
        frame = browser.value(pixels)
        assert np.abs(np.subtract(first, frame)).mean() > 5
        assert f"of {len(made)} frames obey" in browser.value("find('#text').textContent")
        picture = iio.imread(base64.b64decode(browser("Page.captureScreenshot")["data"]))
        left, top, width = browser.value("(b => [b.x, b.y, b.width])(find('canvas')"
                                         ".getBoundingClientRect())")
        assert width == 512                                            # each pixel is 16 x 16 large
        view = picture[int(top) + 8:, int(left) + 8:][:512:16, :512:16, :3]
        agree(view, np.reshape(frame, (32, 32, 4))[..., :3], atol=3, rtol=0, check_dtype=False)
        time.sleep(0.3)
        assert "".join(served.made) == made                                                # idle
        browser.value("Object.defineProperty(document, 'hidden', {value: 1, configurable: 1})")
        browser.key("keyDown", "ArrowRight")
        time.sleep(0.3)
        assert "".join(served.made) == made                                                # hidden
        browser.value("delete document.hidden")
        browser.key("keyUp", "ArrowRight")
        browser.key("keyDown", "ArrowRight")
        browser.wait("asking")
        browser.session = {}
        browser("Target.createTarget", url="about:blank")
        browser("Target.closeTarget", targetId=browser.target)
        while browser.target in str(browser("Target.getTargets")):
            time.sleep(0.02)
        time.sleep(0.3)                                         # a last frame may be under way
        made = len(served.made)
        time.sleep(0.5)
        assert len(served.made) == made                                                    # closed
    finally:
        browser.process.kill()
        browser.process.wait()
