"""
test_vdm.py: every part of vdm.py, train.py and sample.py against a truth that is not this project's:
a closed form, a brute-force loop, numpy, the schedulers of `diffusers` (skipped where that is not
installed), a number printed in a paper, or files whose pixels are known.

    pytest -q test_vdm.py
"""

import ast
import builtins
import collections
import copy
import csv
import dis
import importlib.util
import json
import math
import os
import pickle
import platform
import re
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
import weakref
from fractions import Fraction
from functools import partial
from itertools import groupby, islice, product
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close as close

import sample
import train
import vdm

ROOT = Path(__file__).parent
torch.set_num_threads(1)
M, S = 0.7, 0.5                         # the data of the sampler tests: Normal(M, S^2)
KINDS, SAMPLERS = ("eps", "v", "x0", "edm"), list(vdm.SAMPLERS)
GIVES = "concat", "replace", "per_frame"
cases = pytest.mark.parametrize


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def gaussian(x, sigma, m=M, s=S):
    """E[clean | x] where clean is Normal(m, s^2): both are Gaussian, so the mean is linear in x."""
    return m + (s ** 2 / (s ** 2 + sigma ** 2))[:, None] * (x - m)


def karras(n, low, high):
    """EDM eq. 5, in the default precision."""
    low, high = low ** (1 / 7), high ** (1 / 7)
    return torch.tensor([(high + i / (n - 1) * (low - high)) ** 7 for i in range(n)] + [0.0])


def randomize(model, gates=False):
    """Random weights, in the gates if asked to: where layers are 0 any test would pass."""
    for name, p in model.named_parameters():
        if gates or not name.endswith("gate"):
            nn.init.normal_(p, std=0.7 if p.ndim < 2 else p[0].numel() ** -0.5)
    return model.eval()


def tiny(previous=False, give="concat"):
    net = vdm.VideoUNet(1 + 2 * (give == "concat") + previous, 1, width=8, mults=(1, 2), head_dim=8,
                        second_embedding=give == "replace")
    return vdm.Denoiser(randomize(net, gates=True), previous=previous, give=give)


# ---- samplers ------------------------------------------------------------------------------------

@cases("name", SAMPLERS)
def test_sampler_reaches_mean_and_spread(name, double):
    """The mean and standard deviation of the data."""
    x = vdm.SAMPLERS[name](gaussian, 80 * torch.randn(20_000, 1), karras(300, 0.002, 80))
    assert abs(x.mean() - M) < 0.02 and abs(x.std() - S) < 0.02


@cases("name, ratio", [("ddim", 2), ("heun", 4), ("dpmpp_2m", 4)])
def test_sampler_order(name, ratio, double):
    """dx / dsigma = (x - M) sigma / (S^2 + sigma^2) is solved by x - M ~ sqrt(S^2 + sigma^2)."""
    x, sampler = torch.tensor([[80.0], [-30.0]]), vdm.SAMPLERS[name]
    end = M + (x - M) * S / math.sqrt(S ** 2 + 80 ** 2)
    error = [(sampler(gaussian, x, karras(n, 1e-4, 80)) - end).abs().max() for n in (201, 401)]
    assert abs(error[0] / error[1] / ratio - 1) < 0.1 and error[1] < 0.01


@cases("sampler, order", [
    (vdm.sample_ddpm, 1), (partial(vdm.sample_ddpm, gamma=1.0), 1),
    (partial(vdm.sample_ddim, eta=0.5), 1), (partial(vdm.sample_ddim, eta=1.0), 1),
    (vdm.SAMPLERS["dpmpp_2m_sde"], 2)])
def test_stochastic_samplers_reach_the_variance(sampler, order, double):
    """Steps are linear: with one axis per draw the variance is the squared length, to O(step) or,
    where the sampler extrapolates, O(step^2)."""
    errors = []
    for n in (100, 200):
        x, draws = 80 * torch.eye(n)[:1], iter(torch.eye(n)[1:, None])
        x = sampler(partial(gaussian, m=0), x, karras(n, 1e-3, 80), lambda x: next(draws))
        assert (x != 0).all() and next(draws, None) is None            # a draw a step, but the last
        errors.append(abs(x.norm() - S))
    assert errors[1] < 0.02 and abs(errors[0] / errors[1] / 2 ** order - 1) < 0.1


@cases("name", SAMPLERS)
def test_sampler_lands_on_a_finite_data_set(name, double):
    """From the exact posterior mean over two points, 3 : 1, these two come out, 3 : 1."""
    points, weights = torch.tensor([[0.8, -0.5], [-0.6, 0.4]]), torch.tensor([0.75, 0.25])

    def denoise(x, sigma):
        log_p = weights.log() - torch.cdist(x, points) ** 2 / (2 * sigma[:, None] ** 2)
        return log_p.softmax(1) @ points

    x = vdm.SAMPLERS[name](denoise, 80 * torch.randn(4000, 2), karras(100, 0.005, 80))
    distance, nearest = torch.cdist(x, points).min(1)
    assert (distance < 0.02).double().mean() > 0.998
    assert abs((nearest == 0).double().mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)


def test_ddim_is_euler_and_dpmpp_starts_with_it(double):
    """Euler's method in sigma, written out."""
    x, sigmas = 80 * torch.randn(5, 1), karras(6, 0.1, 80)
    path = [x]
    for s, t in zip(sigmas[:-1], sigmas[1:]):
        path.append(path[-1] + (t - s) * (path[-1] - gaussian(path[-1], s[None])) / s)
    close(vdm.sample_ddim(gaussian, x, sigmas), path[-1])
    close(vdm.sample_dpmpp_2m(gaussian, x, sigmas[:2]), path[1])


@cases("sampler, gamma", [
    (vdm.sample_ddpm, 0), (partial(vdm.sample_ddpm, gamma=0.3), 0.3),
    (partial(vdm.sample_ddpm, gamma=1.0), 1), (partial(vdm.sample_ddim, eta=1.0), 0)])
def test_ddpm_is_the_posterior_of_ho_et_al(sampler, gamma, double):
    """Ho et al. 2020, eqs. 6 and 7 in betas; VDM's variance low^(1 - gamma) high^gamma."""
    beta = torch.linspace(0.01, 0.3, 20)
    abar = torch.cat([torch.ones(1), (1 - beta).cumprod(0)])
    sigmas, noise = ((1 - abar) / abar).sqrt().flip(0), torch.randn(20, 4, 3)
    z = start = torch.randn(4, 3)
    for t in range(20, 0, -1):
        x0 = gaussian(z / abar[t].sqrt(), sigmas[20 - t, None])
        b, left = beta[t - 1], (1 - abar[t - 1]) / (1 - abar[t])
        z = abar[t - 1].sqrt() * b / (1 - abar[t]) * x0 + (1 - b).sqrt() * left * z
        low, high = left * b, b
        z = z + (t > 1) * (low ** (1 - gamma) * high ** gamma).sqrt() * noise[t - 1]
    draws = iter(noise.flip(0))
    close(sampler(gaussian, start / abar[20].sqrt(), sigmas, lambda x: next(draws)), z)


@pytest.mark.filterwarnings("ignore")
@cases("name, ours, options", [
    ("DDIM", vdm.sample_ddim, dict(clip_sample=False)),
    ("DDPM", vdm.sample_ddpm, dict(clip_sample=False)),
    ("DDPM", partial(vdm.sample_ddpm, gamma=1.0),
     dict(clip_sample=False, variance_type="fixed_large")),
    ("EulerDiscrete", vdm.sample_ddim, {}),
    ("HeunDiscrete", vdm.sample_heun, {}),
    ("HeunDiscrete", vdm.sample_heun, dict(use_karras_sigmas=True)),
    ("DPMSolverMultistep", vdm.sample_dpmpp_2m, dict(final_sigmas_type="zero")),
    ("DPMSolverMultistep", vdm.SAMPLERS["dpmpp_2m_sde"],
     dict(final_sigmas_type="zero", algorithm_type="sde-dpmsolver++"))])
def test_sampler_against_diffusers(name, ours, options, double):
    """The scheduler of that name in diffusers, on its own grid, around the same denoiser."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of this test")
    theirs = getattr(diffusers, name + "Scheduler")(30, beta_start=1e-3, beta_end=0.4, **options)
    discrete = name in ("DDIM", "DDPM")                                # all 30 steps, no .sigmas
    drawn = name == "DDPM" or "algorithm_type" in options
    theirs.set_timesteps(30 if discrete else 12)
    abar = theirs.alphas_cumprod[theirs.timesteps.long()].double()
    grid = ((1 - abar) / abar).sqrt() if discrete else theirs.sigmas.double()
    scale = (1 + grid ** 2).rsqrt() if name[0] == "D" else torch.ones_like(grid)    # z = scale * x
    x, noise = grid[0] * torch.randn(6, 1), lambda i: torch.Generator().manual_seed(i)
    z = scale[0] * x
    for i, t in enumerate(theirs.timesteps):
        theirs.scale_model_input(z, t)
        eps = (z / scale[i] - gaussian(z / scale[i], grid[i, None])) / grid[i]
        z = theirs.step(eps, t, z, **(dict(generator=noise(i)) if drawn else {}))[0]
    count = iter(range(100))
    randn = lambda x: torch.randn(x.shape, generator=noise(next(count)))
    sigmas = torch.tensor([*dict.fromkeys([*grid.tolist(), 0.0])])     # Heun's has each level twice
    close(ours(gaussian, x, sigmas, randn), z, rtol=2e-4, atol=2e-4)


@cases("eta", [0.25, 0.5, 1.0])
def test_noise_of_a_step(eta):
    """DDIM eq. 16, in z = sqrt(abar) x, says how much a step adds; and that of a clip that is all noise (clean 0) as much is left
    as the next level asks for, whatever eta, for DPM-Solver++ as well."""
    s, t = 3.0, 1.3
    abar, abar_next = 1 / (1 + s ** 2), 1 / (1 + t ** 2)
    added = eta * math.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)) / math.sqrt(abar_next)
    for sampler in (vdm.sample_ddim, vdm.sample_dpmpp_2m):
        x = []                                                         # what a step makes of x = 1 without noise, of 0 with noise 1
        for start, noise in ((1.0, 0.0), (0.0, 1.0)):
            seen = []
            sampler(lambda x, sigma: seen.append(x) or 0 * x, torch.full((1, 1), start), torch.tensor([s, t, 0.0]),
                    lambda x: torch.full_like(x, noise), eta=eta)
            x.append(seen[1].item())
        assert (x[0] * s) ** 2 + x[1] ** 2 == pytest.approx(t ** 2, rel=1e-5)
        assert sampler is not vdm.sample_ddim or x[1] == pytest.approx(added, rel=1e-5)


# ---- noise ---------------------------------------------------------------------------------------

@cases("f, ends", [
    (vdm.linear, (0.0100, 157.4)), (vdm.scaled_linear, (0.0388, 83.8)),
    (partial(vdm.scaled_linear, start=0.00085, end=0.012), (0.0292, 14.61)),
    (vdm.cosine, (math.exp(-10), math.exp(10)))])
def test_schedule_end_points(f, ends):
    """DDPM's, PVDM's and Stable Diffusion's; for VDM logSNR is 20 at first and -20 at last."""
    assert f(torch.tensor([0.0, 1.0])).tolist() == pytest.approx(ends, rel=4e-3)


def test_middle_of_cosine_and_sigmoid():
    """Both curves are symmetric: logSNR 0 at u = 1/2."""
    assert vdm.cosine(torch.tensor(0.5)).item() == pytest.approx(1, abs=1e-6)
    assert vdm.sigmoid(torch.tensor(0.5)).item() == pytest.approx(1, abs=1e-6)


def test_sigmoid_as_betas():
    """As 1000 betas cut at 0.999 (diffusion forcing): first logSNR 8.11, last sigma 1825."""
    abar = 1 / (1 + vdm.sigmoid(torch.arange(1001) / 1000).double() ** 2)
    abar = (1 - (1 - abar[1:] / abar[:-1]).clamp(max=0.999)).cumprod(0)
    assert math.log(abar[0] / (1 - abar[0])) == pytest.approx(8.11, abs=0.01)
    assert math.sqrt(1 / abar[-1] - 1) == pytest.approx(1825, rel=1e-3)


def test_lognormal_quantiles():
    """torch.distributions; the 95 % interval printed for SVD's (1.0, 1.6), EDM's median 0.30."""
    u = torch.linspace(0.01, 0.99, 50)
    close(vdm.lognormal(u, 0.7, 1.6), torch.distributions.LogNormal(0.7, 1.6).icdf(u),
          rtol=1e-4, atol=0)
    got = vdm.lognormal(torch.tensor([0.025, 0.5, 0.975]), 1.0, 1.6)
    assert got.tolist() == pytest.approx([0.118, 2.72, 62.6], rel=4e-3)
    assert vdm.lognormal(torch.tensor(0.5)).item() == pytest.approx(0.30, abs=0.005)


@cases("name", vdm.SCHEDULES)
def test_schedules_rise(name):
    """More u is more noise: a finite positive number near both ends, of u's shape, float32."""
    u = torch.tensor([1e-5, *np.linspace(0.001, 0.999, 1998), 1 - 1e-5])
    sigma = vdm.SCHEDULES[name](u.reshape(2, -1))
    assert sigma.shape == (2, 1000) and sigma.dtype == torch.float32
    assert torch.isfinite(sigma).all() and (sigma > 0).all() and (sigma.flatten().diff() > 0).all()


@cases("name, start, end", [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012)])
def test_betas_against_diffusers(name, start, end):
    """alphas_cumprod of diffusers."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of this test")
    abar = diffusers.DDPMScheduler(1000, start, end, name).alphas_cumprod.double()
    got = vdm.SCHEDULES[name](torch.arange(1000, dtype=torch.float64) / 999, start, end).double()
    close(got, ((1 - abar) / abar).sqrt(), rtol=1e-3, atol=0)


def test_resolution_shift():
    """logSNR + 2 log(64 / d) (Hoogeboom et al. 2023), d = sqrt(H W) if the frame is not square."""
    for size, d in (((256, 256), 256), ((64, 256), 128), ((32, 32), 32)):
        log_snr = -2 * math.log(vdm.resolution_shift(torch.tensor(0.3), size, 64))
        assert log_snr == pytest.approx(-2 * math.log(0.3) + 2 * math.log(64 / d), abs=1e-5)


def test_karras_sigmas():
    """SVD's 25 levels as printed; a single level."""
    got = vdm.karras_sigmas(25, 0.002, 700, 7).tolist()
    assert len(got) == 26 and got[:5] == pytest.approx([700, 545.7, 421.6, 322.5, 244.0], abs=0.06)
    assert got[-4:] == pytest.approx([0.0248, 0.00788, 0.002, 0], rel=2e-3)
    assert vdm.karras_sigmas(1, 0.002, 700, 7).tolist() == pytest.approx([700, 0])


def test_stratified():
    """Exactly one number in each of n equal bins."""
    draws = [vdm.stratified(16).double() for _ in range(20)]
    for u in draws:
        assert sorted((u * 16).long().tolist()) == list(range(16)) and 0 < u.min() and u.max() < 1
    assert torch.stack(draws)[:, 0].std() > 0.2                        # 0.29 if uniform


@cases("per_frame", [False, True])
def test_offset_noise_covariance(per_frame):
    """1 + l^2 of a pixel, l^2 within a frame, l^2 or 0 between frames, 0 between channels."""
    noise, l = torch.randn(40_000, 2, 2, 1, 2), 0.8
    got = vdm.offset_noise(noise, l, per_frame)
    want = torch.empty(2, 2, 2, 2, 2, 2)                               # between two (t, c, w)
    for t, c, w, t2, c2, w2 in np.ndindex(*want.shape):
        shared = c == c2 and (t == t2 or not per_frame)
        want[t, c, w, t2, c2, w2] = ((t, c, w) == (t2, c2, w2)) + l ** 2 * shared
    close(got.flatten(1).T.cov(), want.reshape(8, 8), atol=0.05, rtol=0)
    close(got[..., 0] - got[..., 1], noise[..., 0] - noise[..., 1], atol=1e-5, rtol=0)


def predictions(clean, noise, sigma, sd):
    """What each kind predicts, by its definition: v = alpha noise - sigma_vp clean, and edm is -v
    of the data divided by its standard deviation sd, whose noise level then is sigma / sd."""
    v = lambda clean, sigma: (noise - sigma * clean) / (1 + sigma ** 2).sqrt()
    return dict(eps=noise, v=v(clean, sigma), x0=clean, edm=-v(clean / sd, sigma / sd))


@cases("kind", KINDS)
def test_scalings_turn_the_exact_output_into_the_clip(kind, double):
    """The exact network output, from the definitions; an input of unit variance (EDM table 1)."""
    sigma, sd = torch.tensor([0.01, 0.3, 1, 20, 157])[:, None], 0.4
    clean, noise = torch.randn(2, 5, 20_000)
    clean = clean * (sd if kind == "edm" else 1)
    skip, out, c_in, c_noise = vdm.scalings(sigma, kind, sd)
    close(skip * (clean + sigma * noise) + out * predictions(clean, noise, sigma, sd)[kind], clean)
    close((c_in * (clean + sigma * noise)).std(1), torch.ones(5), rtol=0.03, atol=0)
    close(c_noise[:, 0].numpy(), np.log([0.01, 0.3, 1, 20, 157]) / 4)


@cases("kind", KINDS[:2] + KINDS[3:])
def test_no_noise_returns_the_clip(kind):
    """At sigma 0 the clip is known already, whatever the network says."""
    x = torch.randn(2, 3, 1, 4, 4)
    close(vdm.Denoiser(tiny().net, kind)(x, torch.zeros(2)), x)


def test_stratified_never_reaches_an_end(monkeypatch):
    """At u = 0 and 1 the levels of log-normal noise are 0 and infinite."""
    for u in (0.0, 1 - 2 ** -24):
        monkeypatch.setattr(torch, "rand", lambda *shape: torch.full(shape, u))
        sigma = vdm.lognormal(vdm.stratified(4), 1.5, 1.2)
        assert (sigma > 0).all() and sigma.isfinite().all()


@cases("options, sigma", [(dict(mean=0.7, std=1.6), lambda x: math.exp(0.7 + 1.6 * x)),
                          (dict(mean=0.0, std=1.0, base=16), lambda x: 2 * math.exp(x)),
                          (dict(schedule="cosine", base=64, mean=9.0), None)])
def test_the_schedule_of_a_config(options, sigma):
    """By statistics.NormalDist; a shift of 16 to 32 pixels doubles sigma; halves it where 64 to 32."""
    u = torch.tensor([0.1, 0.5, 0.9])
    want = [sigma(statistics.NormalDist().inv_cdf(p)) for p in u.tolist()] if sigma else vdm.cosine(u) / 2
    close(vdm.noise_schedule(vdm.Config(size=(32, 32), **options))(u), torch.as_tensor(want), rtol=1e-4, atol=0)


@cases("anchors, options", [
    (2, {}), (0, dict(overlap=3)), (2, dict(overlap=5)), (0, dict(context=(0.5, 0.1, 0.1, 0.3))), (0, dict(anchor=0.0)),
    (2, dict(context=(0.5, 0, 0, 0, 0.5))), (0, dict(previous=True)), (0, dict(give="replace")), (0, dict(task="any")),
    (0, dict(context_noise=0.1))])
def test_when_there_are_anchors(anchors, options):
    """Two, where a model goes on from four frames or more of which it was trained on four or more, noisy by --anchor."""
    assert vdm.Config(**options).anchors == anchors


# ---- losses --------------------------------------------------------------------------------------

@cases("kind", KINDS)
def test_loss_weight_is_a_unit_weight_on_that_prediction(kind, double):
    """The squared error of the prediction itself, by its definition, for a wrong estimate."""
    sigma, sd = torch.tensor([0.05, 0.3, 1, 20])[:, None], 0.4
    clean, noise, wrong = torch.randn(3, 4, 6)
    told = (clean + sigma * noise - wrong) / sigma                     # the noise that would imply
    right, guess = (predictions(c, n, sigma, sd)[kind] for c, n in ((clean, noise), (wrong, told)))
    close(vdm.loss_weight(sigma, kind, sd) * (wrong - clean) ** 2, (guess - right) ** 2)
    if kind != "edm":                                                  # and cut (Hang et al. 2023)
        snr = 1 / sigma ** 2
        weight = snr.clamp(max=4) / dict(x0=1, eps=snr, v=snr + 1)[kind]
        got = vdm.loss_weight(sigma, "min_snr", gamma=4.0) * (wrong - clean) ** 2
        close(got, weight * (guess - right) ** 2)


@pytest.mark.parametrize("per_frame", [False, True])
def test_balance_is_one_over_the_running_mean(per_frame):
    """By a loop over clips and frequencies (a textbook's DCT) or frames: each case goes to its batch mean at
    (1 - rate)^count."""
    T, balance, means = 5, vdm.Balance(5, rate=0.2), np.full((2, 16, 5), 0.3)
    for _ in range(20):
        sigma, given = torch.exp(2 * torch.randn((32, T) if per_frame else 32)), torch.rand(32) < 0.4
        error, cells = torch.rand(32, T, 2, 3, 3, requires_grad=True), {}
        if per_frame:                                                  # a clean frame, given, counts for nothing
            sigma[:5, 0] = 0
        squares, weight = balance(sigma, error, given)
        close(squares.sum(1) if not per_frame else squares, error.square().sum(1) if not per_frame else error.square())
        for i, k in np.ndindex(32, T):
            wave = [math.cos(math.pi * k * (t + 0.5) / T) * math.sqrt((1 if k == 0 else 2) / T) for t in range(T)]
            part = error[i, k] if per_frame else sum(w * error[i, t] for t, w in enumerate(wave))
            close(squares[i, k], part.square())
            level = sigma[i, k] if per_frame else sigma[i]
            if level == 0:
                continue
            cell = int(given[i]), int(min(max(round(math.log2(level.item())) + 4, 0), 15)), k
            close(weight[i, k].double(), torch.tensor(1 / means[cell]), rtol=1e-4, atol=0)
            cells.setdefault(cell, []).append(part.square().mean().item())
        for cell, errors in cells.items():
            keep = 0.8 ** len(errors)
            means[cell] = keep * means[cell] + (1 - keep) * np.mean(errors)
        assert not weight.requires_grad and squares.requires_grad
    close(balance.mean.double(), torch.tensor(means).flatten(0, 1), rtol=1e-4, atol=0)


@cases("per_frame", [False, True])
def test_other_terms_weigh_as_the_error_that_is_usual(per_frame):
    """Where the usual error is 0.01 in all frames that are not given, a term of Vista's that is as large as the error doubles
    the loss, whether a clip has one level or each frame its own; what is given, of no error, has no say in it."""
    balance, clean = vdm.Balance(4), torch.zeros(400, 4, 1, 4, 4)
    board = (-1.0) ** (torch.arange(4)[:, None] + torch.arange(4))     # a checkerboard: nothing but high frequencies
    noisy = torch.tensor([0.0, 0.0, 1.0, 1.0])                         # two frames are given
    error = 0.1 * board * (2.0 * torch.randint(2, (400, 4, 1, 1, 1)) - 1)
    sigma, mask = noisy.expand(400, 4) if per_frame else torch.ones(400), (noisy == 0).float().expand(400, 4)
    estimate = lambda x, sigma, **cond: error * (vdm.expand(1 - mask, clean) if per_frame else 1)
    loss = lambda **more: vdm.diffusion_loss(estimate, clean, sigma, clean, balance, context=clean, mask=mask, **more)[0]
    for _ in range(3):
        plain = loss()
    assert loss(structure=1.0) / plain == pytest.approx(2, rel=0.1)


def test_balance_waits_for_all_parts_of_a_batch():
    """On hold, parts of any size, in two processes, come to the same mean as the batch at once."""
    sigma, error, given = torch.rand(12) * 9, torch.rand(12, 4, 1, 2, 2), torch.rand(12) > 0.5
    whole, *two = (vdm.Balance(4) for _ in range(3))
    weight, weights = whole(sigma, error, given)[1], []
    for balance, parts in zip(two, [(slice(0, 5), slice(5, 6)), (slice(6, 12),)]):
        balance.hold = True
        weights += [balance(sigma[part], error[part], given[part])[1] for part in parts]
        assert torch.equal(balance.mean, torch.full((32, 4), 0.3))
    two[0].seen = two[0].seen + two[1].seen
    two[0].fold()
    assert torch.equal(torch.cat(weights), weight) and (whole.mean != 0.3).sum() > 12
    close(two[0].mean, whole.mean)


def test_balance_makes_all_cases_pull_equally():
    """Errors of 0.01 to 1, still and alternating, by noise level and by what is given: every weighted one goes to 1."""
    net, balance = Told(3, 2, 1, 4, 4), vdm.Balance(2)
    still = torch.tensor([0.1, 1.0, 0.2]).reshape(3, 1, 1, 1, 1)
    net.out.data = still + torch.tensor([[0.5], [0.01], [0.0]]).mul(torch.tensor([1.0, -1.0])).reshape(3, 2, 1, 1, 1).expand(3, 2, 1, 4, 4)
    clean, sigma = torch.zeros(3, 2, 1, 4, 4), torch.tensor([0.5, 8.0, 8.0])
    mask = torch.tensor([[0, 0], [0, 0], [1, 0]])                      # a given frame has no error
    for _ in range(200):
        loss, parts = vdm.diffusion_loss(vdm.Denoiser(net, "x0"), clean, sigma, clean, balance, context=clean, mask=mask)
    close(parts["error"], torch.tensor([0.01 + 0.25, 1.0 + 1e-4, 0.02]), rtol=1e-4, atol=0)
    loss.backward()
    parts = torch.stack([net.out.sum(1), net.out[:, 0] - net.out[:, 1]], 1) / 2 ** 0.5        # (3, 2, 1, 4, 4)
    slope = torch.stack([net.out.grad.sum(1), net.out.grad[:, 0] - net.out.grad[:, 1]], 1) / 2 ** 0.5
    pull = (slope * parts).sum((2, 3, 4))                              # d loss / d log size = 2 weight error / 6
    close(pull[:2], torch.full((2, 2), 1 / 3), rtol=1e-3, atol=0)
    close((net.out.grad * net.out).sum((1, 2, 3, 4))[2], torch.tensor(2 / 3), rtol=1e-3, atol=0)


def test_balance_weighs_what_vista_adds_by_the_whole_error():
    """An error known by hand: still parts of mean square 0.04, moving ones of 0.01; the structure term of a checkerboard."""
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    net, balance = Told(1, 2, 1, 8, 8), vdm.Balance(2)
    net.out.data = (board * torch.tensor([0.3, 0.1]).reshape(1, 2, 1, 1, 1)).clone()          # 0.2 still, 0.1 moving
    balance.mean[:] = torch.tensor([2.0, 0.5])
    loss, parts = vdm.diffusion_loss(vdm.Denoiser(net, "x0"), torch.zeros(1, 2, 1, 8, 8), torch.ones(1), torch.zeros(1, 2, 1, 8, 8),
                                     balance, structure=0.5)
    close(parts["structure"], torch.tensor([0.5 * 0.05]))              # a checkerboard is all high frequencies
    close(loss, torch.tensor((0.08 / 2 + 0.02 / 0.5) / 2 + 0.5 * 0.05 / 1.25))


def test_joint_loss_is_its_two_terms():
    """PVDM's objective (Yu et al. 2023), both terms by hand from the denoiser."""
    denoiser, sigma = tiny(previous=True), torch.tensor([0.5, 3.0])
    clean, previous, noise = torch.randn(3, 2, 3, 1, 4, 4)
    level = sigma.reshape(2, 1, 1, 1, 1)
    given = (denoiser(clean + level * noise, sigma, previous=previous) - clean) ** 2
    free = (denoiser(clean + level * noise, sigma) - clean) ** 2
    loss, parts = vdm.joint_loss(denoiser, clean, previous, sigma, noise, share=0.3, weighting="v")
    close(loss, ((1 / level ** 2 + 1) * (0.3 * given + 0.7 * free)).mean())
    close(parts["error"], free.mean((1, 2, 3, 4)))
    close(parts["error_given"], given.mean((1, 2, 3, 4)))


def test_pictures_beside_clips_are_what_vdm_appends():
    """VDM's joint training, as its paper has it: all T + N frames in one sequence, temporal attention masked so that clips see
    clips and a picture itself alone (here by a softmax with -inf), the plain mean of the error over all frames."""
    T, N, shape = 3, 2, (2, 5, 1, 8, 8)
    net = randomize(vdm.VideoUNet(1 + 1 + 1, 1, 16, (1, 2), 1, (1, 2), (), head_dim=8, convs=False, feed_forward="none"), gates=True)
    for name, p in net.named_parameters():                             # what frames tell each other must weigh something
        nn.init.constant_(p, 3.0) if name.endswith("gate") else None
    denoiser, sigma = vdm.Denoiser(net, "v"), torch.tensor([0.5, 3.0])
    frames, noise = torch.randn(2, *shape)
    loss, parts = vdm.joint_image_loss(denoiser, frames[:, :T], frames[:, T:], sigma, noise, weighting="v")
    apart = torch.block_diag(torch.ones(T, T), *[torch.ones(1, 1)] * N) == 0

    def masked(q, k, v):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return scores.masked_fill(apart if q.shape[-2] == T + N else torch.tensor(False), -math.inf).softmax(-1) @ v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vdm, "attend", masked)
        want, _ = vdm.diffusion_loss(denoiser, frames, sigma, noise, weighting="v")
    close(loss, want, rtol=1e-5, atol=1e-6)
    assert abs(loss - vdm.diffusion_loss(denoiser, frames, sigma, noise, weighting="v")[0]) > 1e-3
    assert parts["error"].shape == (2,)


@cases("data", ["shapes", "drive"])
def test_train_appends_pictures_of_other_items(tmp_path, monkeypatch, data):
    """Each is a frame of some item, no two of one; the same in any parts of the batch."""
    seen, loss = [], vdm.joint_image_loss
    keep = lambda net, clean, images, *args, **told: seen.append((clean, images)) or loss(net, clean, images, *args, **told)
    monkeypatch.setattr(vdm, "joint_image_loss", keep)
    for name, flags in dict(a=(), b=("--micro", 1)).items():
        run_train(tmp_path / name, "--data", data, "--steps", 1, "--stills", 3, "--weighting", "edm", *flags)
    (_, images), b = seen[2], seen[-2:]                            # two rehearsals come first
    assert images.shape == (2, 3, 3, 16, 16) and torch.equal(images, torch.cat([x for _, x in b]))
    world = train.WORLDS[data](4, (16, 16))
    frames = torch.stack([world[i]["video"] for i in range(1100)]).flatten(0, 1)                # (1100 * 4, C, H, W)
    found = [(frames == image).flatten(1).all(1).nonzero() // 4 for image in images.flatten(0, 1)]
    assert all(len(x) for x in found) and len({x[0].item() for x in found}) == 6


def test_dynamics_weight():
    """Loops over everything; a clip that is right everywhere, and one of a single frame, weigh 1."""
    estimate, clean = torch.randn(2, 2, 4, 3, 5, 2)
    moved = lambda x, b, t, c, h, w: (x[b, t, c, h, w] - x[b, t - 1, c, h, w]).item()
    for toy in (False, True):
        got = vdm.dynamics_weight(estimate, clean, toy)
        assert (got[:, 0] == 1).all() and got.shape == clean.shape
        for b, c in np.ndindex(2, 3):
            at = [(b, t + 1, c, h, w) for t, h, w in np.ndindex(3, 5, 2)]
            delta = [(moved(clean, *i) - moved(estimate, *i)) ** 2 for i in at]
            size = sum(delta) / 30 if toy else math.sqrt(sum(d ** 2 for d in delta))
            for i, d in zip(at, delta):
                assert got[i].item() == pytest.approx(1 + d / size, rel=1e-5)
        assert (vdm.dynamics_weight(clean.round() + 1, clean.round(), toy) == 1).all()
        assert (vdm.dynamics_weight(estimate[:, :1], clean[:, :1], toy) == 1).all()


@cases("shape, printed", [((16, 16, 16), 0.0093), ((16, 8, 8), 0.019), ((25, 40, 72), 0.0022)])
def test_dynamics_weight_of_gaussian_errors(shape, printed):
    """What is added is 1 / sqrt(3 n) on average for n = (T - 1) H W equal normal errors, whose mean
    square is 1 and whose mean fourth power is 3; toy: 1."""
    (T, H, W), B = shape, 3_000_000 // math.prod(shape)
    estimate, clean = torch.randn(2, B, T, 1, H, W)
    mean = (vdm.dynamics_weight(estimate, clean)[:, 1:] - 1).mean().item()
    assert mean == pytest.approx(printed, rel=0.03)
    assert mean == pytest.approx((3 * (T - 1) * H * W) ** -0.5, rel=0.03)
    assert vdm.dynamics_weight(estimate, clean, toy=True)[:, 1:].mean().item() == pytest.approx(2)


def kept(H, W):
    """Vista's mask in exact fractions, frequency 0 in the middle: 1 is kept, 0 removed."""
    mask = np.ones((H, W))
    for h, w in np.ndindex(H, W):
        f, g = Fraction(2 * (h - H // 2), H), Fraction(2 * (w - W // 2), W)
        mask[h, w] = f ** 2 + g ** 2 > Fraction(1, 2)
    return mask


@cases("H, W", [(4, 4), (8, 8), (16, 12), (20, 20), (52, 52), (7, 9), (9, 4)])
def test_high_pass(H, W):
    """numpy's FFT in double precision; bfloat16, under autocast or not, is filtered in float32.
    4 x 4 loses 56 % of its frequencies, larger frames 39 %."""
    x = torch.randn(2, 3, 2, H, W)
    spectrum = np.fft.fftshift(np.fft.fft2(x.double().numpy()), (-2, -1)) * kept(H, W)
    want = np.fft.ifft2(np.fft.ifftshift(spectrum, (-2, -1)))
    assert np.abs(want.imag).max() < 1e-12
    close(vdm.high_pass(x), torch.tensor(want.real, dtype=torch.float32), rtol=0, atol=1e-5)
    half, want = x.bfloat16(), vdm.high_pass(x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vdm.high_pass(half), want)
    assert torch.equal(vdm.high_pass(half), want)
    point = torch.zeros(H, W)
    point[0, 0] = 1                                                    # its spectrum is the mask
    removed = (np.abs(np.fft.fft2(vdm.high_pass(point).numpy())) < 0.5).mean()
    assert removed == (kept(H, W) == 0).mean()
    if H in (4, 52):
        assert removed == pytest.approx({4: 0.5625, 52: 0.39}[H], abs=0.01)


def test_vistas_losses():
    """With x0 weights the estimate is what the network says. Structure is a spectral weighting of
    the error, by Parseval; the weight of dynamics has no gradient; each part is (B,), in all they
    are the loss."""
    net, (clean, noise), sigma = Told(2, 3, 2, 8, 6), torch.randn(2, 2, 3, 2, 8, 6), torch.ones(2)
    loss = partial(vdm.diffusion_loss, vdm.Denoiser(net, "x0"), clean, sigma, noise, "x0")
    error = (net.out - clean).detach()
    total, parts = loss(structure=0.3)
    power = np.abs(np.fft.fftshift(np.fft.fft2(error.double().numpy()), (-2, -1))) ** 2 / 48
    assert total.item() == pytest.approx((power * (1 + 0.3 * kept(8, 6))).mean(), rel=1e-5)
    close(parts["structure"], torch.tensor(0.3 * power * kept(8, 6)).mean((1, 2, 3, 4)).float())
    total, parts = loss(dynamics=0.7)
    total.backward()
    weight = 1 + 0.7 * (vdm.dynamics_weight(net.out, clean) - 1)
    close(net.out.grad, 2 * weight * error / error.numel())
    close(total, (weight * error ** 2).mean())
    total, parts = loss(dynamics=2.0, dynamics_toy=True, structure=0.1)
    close(parts["error"], (error ** 2).mean((1, 2, 3, 4)))
    extra = 2 * (vdm.dynamics_weight(net.out, clean, toy=True) - 1) * error ** 2
    close(parts["dynamics"], extra.mean((1, 2, 3, 4)))
    close(total.detach(), sum(parts.values()).mean())
    assert [*parts] == ["error", "dynamics", "structure"] and parts["error"].shape == (2,)
    level = 2 * torch.ones(2, 3)                                       # weight v: 1 + 1 / sigma^2
    twice = vdm.diffusion_loss(vdm.Denoiser(net, "x0"), clean, level, noise, "v", dynamics=2.0,
                               dynamics_toy=True, structure=0.1)[0]
    close(twice, 1.25 * total)
    both = vdm.joint_loss(vdm.Denoiser(net, "x0", previous=True), clean, clean, sigma, noise,
                          structure=0.1)[1]
    assert [*both] == ["error", "structure", "error_given", "structure_given"]


def test_draw_mask():
    """Counts within five standard deviations of the binomial; given frames are the first ones."""
    p = 0.5, 0, 0.2, 0.3
    mask = vdm.draw_mask(5000, 6, p)
    assert mask.shape == (5000, 6) and (mask.diff(dim=1) <= 0).all()
    for n, share in enumerate(p):
        bound = 5 * math.sqrt(5000 * share * (1 - share))
        assert abs((mask.sum(1) == n).sum() - 5000 * share) <= bound


def test_tasks_of_the_mask():
    """Ends: exactly these two. Any: 1 to T - 1 frames, equally often, and each frame as often as
    another, to five standard deviations. In both, no frame as often as is said."""
    ends = vdm.draw_mask(5000, 5, (0.25, 0.75), "ends")
    assert {tuple(m) for m in ends.tolist()} == {(0, 0, 0, 0, 0), (1, 0, 0, 0, 1)}
    anything = vdm.draw_mask(5000, 5, (0.25, 0.5, 0.25), "any")
    for mask in (ends, anything):
        assert abs((mask.sum(1) == 0).sum() - 1250) < 5 * math.sqrt(5000 * 0.25 * 0.75)
    counts = torch.bincount(anything.sum(1).long(), minlength=6)
    assert counts[5] == 0
    for n in range(1, 5):
        assert abs(counts[n] - 937.5) < 5 * math.sqrt(5000 * 0.1875 * 0.8125)
    given = anything[anything.sum(1) > 0].mean(0)                      # each half of the time
    assert (given - 0.5).abs().max() < 5 * math.sqrt(0.25 / 3750)
    with pytest.raises(ValueError, match="task is 'all'"):
        vdm.draw_mask(1, 5, (1, 1), "all")


def test_contexts_of_the_tasks():
    """Literal masks of 8 frames; the level can be read back from a mask; enlarging by np.interp."""
    clean, noise, s = torch.randn(2, 8, 1, 8, 12), torch.randn(2, 8, 1, 8, 12), torch.tensor([0.25, 1])
    for task, p, mask in (("predict", (0, 0, 0, 1), [1, 1, 1, 0, 0, 0, 0, 0]),
                          ("ends", (0, 1), [1, 0, 0, 0, 0, 0, 0, 1]),
                          ("image", (0, 1), [1] * 8), ("upsample", (0, 1), [1] * 8)):
        mask, hints = torch.tensor([mask] * 2).float(), 0.0 + (torch.arange(8) >= (task == "image"))
        assert torch.equal(vdm.draw_mask(2, 8, p, task), mask) and not vdm.draw_mask(2, 8, (1, 0), task).any()
        shown, got = vdm.draw_context(clean, mask, task)
        assert torch.equal(got, mask)
        want = clean
        if task == "image":
            want = clean[:, [0] * 8]
            assert torch.equal(shown[:, 0], clean[:, 0])
        if task == "upsample":
            small = clean.numpy().reshape(2, 8, 1, 2, 4, 3, 4).mean((4, 6))
            for axis in (-2, -1):                                      # centres of pixels on the axis
                n = small.shape[axis]
                line = partial(np.interp, (np.arange(4 * n) + 0.5) / 4 - 0.5, np.arange(n))
                small = np.apply_along_axis(line, axis, small)
            want = torch.tensor(small).float()
        close(shown, want)
        noisy, got = vdm.draw_context(clean, mask, task, s, noise)
        level = s[:, None] * hints
        close(got, mask / (1 + level))
        close(noisy, want + level[..., None, None, None] * (noise[:, :1] if task == "image" else noise))     # one noisy picture
        if task == "image":
            assert torch.equal(noisy[:, 0], clean[:, 0])
            assert got[0].tolist() == pytest.approx([1] + [0.8] * 7)
    noisy, mask = vdm.augment(clean, torch.ones(2, 8), s, noise)
    close((1 / mask - 1)[..., None, None, None] * noise, noisy - clean, atol=1e-5, rtol=1e-4)


def test_independent_levels():
    """No clip, all or the binomial's share has unequal levels, which then are uniform."""
    u = vdm.stratified(4000)
    for chance in (0, 0.2, 1):
        got = vdm.independent_levels(u, 3, chance)
        own = (got != u[:, None]).all(1)
        assert torch.equal(got[~own], u[~own, None].expand(-1, 3)) and got.shape == (4000, 3)
        assert abs(own.sum() - 4000 * chance) <= 5 * math.sqrt(4000 * chance * (1 - chance)) + 1
    cov = got.T.cov()                                                  # all are independent here
    close(cov, torch.eye(3) / 12, atol=0.008, rtol=0)
    assert 0 < got.min() and got.max() < 1 and abs(got.mean() - 0.5) < 0.015


def test_what_a_balance_is_told():
    """Per clip: whether any frame, or a hint, or the clip before is given."""
    seen, x = [], torch.randn(3, 4, 1, 8, 8)

    def weighting(sigma, error, given):
        seen.append(given.tolist())
        return error ** 2, torch.ones(error.shape[:2])

    mask = torch.tensor([[0.0] * 4, [1, 0, 0, 0], [0, 0.5, 0, 0]])
    for previous in (False, True):
        for told in ({}, dict(previous=x) if previous else dict(context=x, mask=mask)):
            vdm.diffusion_loss(tiny(previous), x, torch.ones(3), x, weighting, **told)
    assert seen == [[False] * 3, [False, True, True], [False] * 3, [True] * 3]


@cases("weighting, weight", [("eps", 1e8), ("v", 1e8), ("edm", 1e8), ("min_snr", 5.0), ("x0", 1.0)])
def test_weights_of_frames_without_noise_are_finite(weighting, weight):
    """1 / 0 is cut at sigma 1e-4."""
    assert vdm.loss_weight(torch.zeros(1), weighting).item() == pytest.approx(weight, rel=1e-3)


# ---- denoiser and guidance -----------------------------------------------------------------------

class Told(nn.Module):
    """A network that says what it is told to, and remembers what it was shown."""

    def __init__(self, *shape):
        super().__init__()
        self.out = nn.Parameter(torch.randn(shape))

    def forward(self, x, c_noise, given=None):
        self.seen, self.c_noise, self.given = x, c_noise, given
        return self.out


@cases("give", GIVES)
def test_given_frames_are_untouched_and_have_no_gradient(give):
    """Bit for bit the context; there the error is 0, and so is its gradient."""
    net, mask = Told(2, 4, 3, 2, 2), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]])
    clean, noise, sigma = *torch.randn(2, 2, 4, 3, 2, 2), torch.tensor([0.3, 9.0])
    denoiser = vdm.Denoiser(net, give=give)
    vdm.diffusion_loss(denoiser, clean, sigma, noise, context=clean, mask=mask)[0].backward()
    assert (net.out.grad[mask == 1] == 0).all() and (net.out.grad[mask == 0] != 0).all()
    got = denoiser(noise, sigma, clean, mask)
    assert torch.equal(got[mask == 1], clean[mask == 1]) and (got != clean)[mask == 0].all()
    given = mask[:, :, None, None, None].float()
    c_in = (0.5 ** 2 + sigma ** 2).rsqrt()[:, None, None, None, None]
    level = sigma[:, None].expand(2, 4)
    if give == "concat":                                               # shown: c_in x, mask z, mask
        want = torch.cat([c_in * noise, given * clean, given.expand(2, 4, 1, 2, 2)], 2)
        level = level * (1 - mask)
    elif give == "replace":                                            # at the level of the others
        want = c_in * torch.where(given > 0, clean, noise)
        assert torch.equal(net.given, mask == 1)
    else:                                                              # at level 0: c_in is 1 / 0.5
        want, level = torch.where(given > 0, clean / 0.5, c_in * noise), level * (1 - mask)
    close(net.seen, want)
    close(net.c_noise, level.clamp(min=1e-4).log() / 4)
    shown, hidden = net.seen, torch.where(given > 0, clean, math.nan)  # elsewhere it is not read
    assert torch.equal(denoiser(noise, sigma, hidden, mask), got) and torch.equal(net.seen, shown)


@cases("give", ["concat", "per_frame"])
def test_hints_are_shown_and_estimated(give):
    """A frame with noise of level 3 on it has mask 1 / 4: it has a loss, like a frame not given."""
    net, mask = Told(1, 3, 1, 2, 2), torch.tensor([[1, 0.25, 0]])
    x, context, sigma = *torch.randn(2, 1, 3, 1, 2, 2), torch.tensor([2.0])
    denoiser = vdm.Denoiser(net, "eps", give=give)
    got = denoiser(x, sigma, context, mask)
    assert torch.equal(got[:, 0], context[:, 0])
    if give == "concat":
        close(got[:, 1:], (x - 2 * net.out)[:, 1:])
        assert torch.equal(net.seen[:, 1, 1:], torch.cat([context[:, 1], torch.full((1, 1, 2, 2), 0.25)], 1))
    else:                                                              # its own level, its own x
        close(got[:, 1:], torch.stack([context[:, 1] - 3 * net.out[:, 1], x[:, 2] - 2 * net.out[:, 2]], 1))
        close(net.seen[:, 1], context[:, 1] / math.sqrt(10))
    guided = vdm.guided(denoiser, 3.0)(x, sigma, context=context, mask=mask)
    free = denoiser(x, sigma)
    assert torch.equal(guided[:, 0], context[:, 0])
    close(guided[:, 1:], (free + 3 * (got - free))[:, 1:])
    got.sum().backward()
    assert (net.out.grad[:, 0] == 0).all() and (net.out.grad[:, 1:] != 0).all()


def test_denoiser_refuses_what_it_would_not_read():
    denoiser, x = tiny(), torch.randn(1, 2, 1, 4, 4)
    both = "context and mask or neither"
    for told, words in ((dict(context=x), both), (dict(mask=torch.ones(1, 2)), both), (dict(previous=x), "built with previous=False"),
                        (dict(context=x[:, :1], mask=torch.ones(1, 2)), r"of the shape of x, \(1, 2, 1, 4, 4\)")):
        with pytest.raises(ValueError, match=words):
            denoiser(x, torch.ones(1), **told)
    with pytest.raises(ValueError, match="give is 'all', expected concat"):
        vdm.Denoiser(Told(1), give="all")


def test_second_embedding_is_for_given_frames():
    """A copy at first, so it makes no difference; once it is other, to given frames alone (the
    gates are 0, so frames do not know of each other)."""
    net = randomize(vdm.VideoUNet(1, 1, 8, (1, 2), head_dim=8, second_embedding=True))
    net.embed_given.load_state_dict(net.embed.state_dict())
    fresh = vdm.VideoUNet(1, 1, 8, (1, 2), head_dim=8, second_embedding=True)
    assert same(fresh.embed.state_dict(), fresh.embed_given.state_dict())
    x, level, given = torch.randn(2, 3, 1, 4, 4), torch.randn(2), torch.tensor([[True, False, True]] * 2)
    before = net(x, level, given=given)
    assert torch.equal(before, net(x, level))
    nn.init.normal_(net.embed_given[2].bias)
    changed = (net(x, level, given=given) - before).abs().amax((2, 3, 4)) > 1e-3
    assert torch.equal(changed, given)


def test_per_frame_sigma():
    """Equal levels in all frames are one level per clip; frame t goes by its own level."""
    x, sigma = torch.randn(2, 3, 1, 4, 4), torch.tensor([0.5, 4.0])
    for give in GIVES:
        denoiser = tiny(give=give)
        close(denoiser(x, sigma[:, None].expand(2, 3)), denoiser(x, sigma))
        assert torch.equal(denoiser(x, sigma, x, torch.zeros(2, 3)), denoiser(x, sigma))
    net, levels = Told(1, 3, 1, 4, 4), torch.tensor([[0.0, 0.5, 4.0]])
    got = vdm.Denoiser(net, "eps")(x[:1], levels)
    for t in range(3):
        close(got[:, t], x[:1, t] - levels[0, t] * net.out[:, t])
    wrong = torch.arange(6.0).reshape(2, 3)                            # an error for each frame
    clean = torch.zeros(2, 3, 1, 2, 2)
    for level, want in ((torch.ones(2, 3), wrong ** 2), (torch.ones(2), (wrong ** 2).mean(1))):
        parts = vdm.diffusion_loss(lambda x, sigma: clean + wrong[..., None, None, None], clean, level, clean)[1]
        close(parts["error"], want)


def test_conditions_change_the_answer():
    """A network with random weights has to react to everything it is shown."""
    x, context, previous = torch.randn(3, 2, 3, 1, 4, 4)
    one, two = torch.tensor([[1, 0, 0]] * 2), torch.tensor([[1, 1, 0]] * 2)
    conds = {}, dict(context=context, mask=one), dict(context=context, mask=two), \
        dict(context=context + 1, mask=one), dict(previous=previous), dict(previous=previous + 1)
    denoiser = tiny(previous=True)
    last = [denoiser(x, torch.ones(2), **cond)[:, 2] for cond in conds]
    assert torch.equal(last[0], denoiser(x, torch.ones(2))[:, 2])
    for i, j in ((i, j) for i in range(6) for j in range(i)):
        assert (last[i] - last[j]).abs().max() > 1e-4, (i, j)


def told(labels=3, actions=2, motion=True):
    """A network with random weights, but for those that its label, action and motion go through."""
    net = vdm.VideoUNet(3, 1, 8, (1, 2), head_dim=8, labels=labels, actions=actions, motion=motion)
    fresh = {k: v.clone() for k, v in net.state_dict().items() if "embed_" in k}
    randomize(net).load_state_dict(fresh, strict=False)
    return vdm.Denoiser(net)


def test_what_is_told_starts_as_nothing_and_learns_at_once():
    """The same answer bit for bit; gradient in the first step, except for the row of no label."""
    denoiser, x, one = told(), torch.randn(3, 4, 1, 4, 4), torch.ones(3)
    cond = dict(label=torch.tensor([-1, 0, 2]), action=torch.randn(3, 4, 2), motion=torch.tensor([0.0, 0.5, -1]))
    got = denoiser(x, one, **cond)
    assert torch.equal(got, denoiser(x, one)) and got.std() > 0.1
    got.square().mean().backward()
    rows = denoiser.net.embed_label.weight.grad.abs().amax(1)          # of -1, 0, 1, 2
    assert (rows > 1e-6).tolist() == [False, True, False, True] and rows[0] == 0
    assert (denoiser.net.embed_action.weight.grad.abs().amax(0) > 1e-6).all()
    assert (denoiser.net.embed_motion.weight.grad.abs().amax(0) > 1e-6).all()


def test_what_is_told_changes_the_answer():
    """Each frame heeds its own action; -1 and NaN are none; a network built without says so."""
    denoiser, x, one = told(), torch.randn(2, 4, 1, 4, 4), torch.ones(2)
    nn.init.normal_(denoiser.net.embed_action.weight)
    nn.init.normal_(denoiser.net.embed_motion.weight)
    nn.init.normal_(denoiser.net.embed_label.weight[1:])
    free, action = denoiser(x, one), torch.randn(2, 4, 2)
    none = dict(label=torch.tensor([-1, -1]), action=action * torch.nan, motion=torch.tensor([-1.0, -1]))
    assert torch.equal(free, denoiser(x, one, **none))
    assert (free - denoiser(x, one, action=0 * action)).abs().amax() > 1e-3           # 0 is told
    moved = denoiser(x, one, action=action) - free
    assert (moved.abs().amax((2, 3, 4)) > 1e-3).all()
    action[:, 2] = torch.nan                              # gates are closed: frames are on their own
    less = denoiser(x, one, action=action) - free
    assert (less[:, 2] == 0).all() and torch.equal(less[:, [0, 1, 3]], moved[:, [0, 1, 3]])
    labels = torch.stack([denoiser(x[:1], one[:1], label=torch.tensor([k])) for k in (-1, 0, 1, 2)])
    assert (torch.pdist(labels.flatten(1)) > 1e-2).all()
    ranks = torch.stack([denoiser(x[:1], one[:1], motion=torch.tensor([k])) for k in (-1, 0, 0.05, 0.5, 1)])
    assert (torch.pdist(ranks.flatten(1)) > 1e-2).all()
    every = dict(label=torch.tensor([0, 1]), action=action, motion=torch.tensor([0.2, 0.9]))
    close(vdm.guided(denoiser, 3.0)(x, one, **every), 3 * denoiser(x, one, **every) - 2 * free,
          rtol=1e-4, atol=1e-4)
    for name, given in every.items():
        with pytest.raises(ValueError, match=f"{name} was given, but .* without"):
            told(labels=0, actions=0, motion=False)(x, one, **{name: given})


def test_a_rank_is_told_with_mean_0_and_deviation_1():
    """An even distribution has mean 1 / 2 and deviation 1 / sqrt(12); that a rank is told is told beside it."""
    net, seen = vdm.VideoUNet(3, 1, 8, (1,), attention=(), joint=(), motion=True), []
    net.embed_motion.register_forward_hook(lambda layer, inputs, out: seen.append(inputs[0]))
    n = 1000
    net(torch.zeros(n + 1, 1, 3, 1, 1), torch.zeros(n + 1), motion=torch.cat([(torch.arange(n) + 0.5) / n, -torch.ones(1)]))
    rank, told = seen[0].T
    assert rank[:n].mean().item() == pytest.approx(0, abs=1e-5) and rank[:n].std().item() == pytest.approx(1, rel=1e-2)
    assert (told[:n] == 1).all() and rank[n] == told[n] == 0 and (rank[:n].diff() > 0).all()


def blob(v, angle, size=64, width=6.0, T=6):
    """A soft bump that moves by v pixels a frame: a clip (1, T, 2, size, size)."""
    at = torch.arange(size) + 0.5
    y, x = (size / 2 + v * f(angle) * (torch.arange(T) - T / 2) for f in (math.sin, math.cos))
    far = (at[:, None] - y[:, None, None]) ** 2 + (at - x[:, None, None]) ** 2                  # (T, H, W)
    return (2 * torch.exp(-far / 2 / width ** 2) - 1)[None, :, None].expand(1, T, 2, size, size)


def test_motion_is_how_far_things_move():
    """Of a bump that moves by v pixels of 64 it is v / 64, in any direction, light and size; what stands still has none, one
    frame too; in MovingShapes it is the speed that was drawn."""
    for v, angle in product((0.5, 1.0, 3.0), (0.0, 0.4, 2.0)):
        clip = blob(v, angle)
        for changed in (clip, 0.1 * clip + 0.5, -clip, blob(2 * v, angle, 128, 12.0)):
            assert vdm.motion_score(changed).item() == pytest.approx(v / 64, rel=0.06)
    assert vdm.motion_score(blob(0.0, 0.0)).item() == 0 and vdm.motion_score(torch.zeros(3, 4, 1, 8, 8)).tolist() == [0, 0, 0]
    assert vdm.motion_score(blob(1.0, 0.0)[:, :1]).item() == 0
    two = torch.cat([blob(1.0, 0.3), blob(2.0, 1.0)])
    close(vdm.motion_score(two), torch.cat([vdm.motion_score(two[:1]), vdm.motion_score(two[1:])]))
    jolt = blob(1.0, 0.0, T=8)
    jolt = torch.cat([jolt[:, :4], jolt[:, 4:].roll(12, 4)], 1)         # a jump, at one step of seven, does not count
    assert vdm.motion_score(jolt).item() == pytest.approx(1 / 64, rel=0.06) and vdm.motion_score(jolt[:, 3:5]).item() > 5 / 64
    world = vdm.MovingShapes(seed=3)
    speeds = [world_draw(world, i)["speed"] for i in range(200)]
    scores = vdm.motion_score(torch.stack([world[i]["video"] for i in range(200)]))
    assert np.corrcoef(scores, speeds)[0, 1] > 0.97 and np.median(scores / torch.tensor(speeds)) == pytest.approx(1, abs=0.08)


def world_draw(world, i):
    """What MovingShapes draws for its clip i, in its order."""
    rng = np.random.default_rng([world.seed, i])
    rng.permutation(6), rng.integers(3), rng.uniform(*world.RADIUS)
    return dict(speed=rng.uniform(*world.SPEED))


def test_the_rank_of_a_motion_is_the_share_that_move_less():
    """numpy's interpolation; of scores as they come, each rank as often as any other."""
    scores = torch.distributions.LogNormal(-3.0, 1.0).sample((4000,))
    paces = scores[:2000].quantile(torch.linspace(0, 1, 17))
    asked = torch.cat([paces, torch.tensor([0.0, 99.0]), scores[2000:]])
    want = np.interp(asked, paces, np.linspace(0, 1, 17))
    close(vdm.motion_rank(asked, paces), torch.from_numpy(want).float(), rtol=0, atol=1e-5)
    even = vdm.motion_rank(scores[2000:], paces).sort()[0]
    assert (even - (torch.arange(2000) + 0.5) / 2000).abs().max() < 0.06                        # 1.36 (2 / 2000)^(1/2) = 0.043
    for never in (torch.zeros(17), -torch.ones(17)):                   # nothing ever moved; nothing was ever measured
        ranks = vdm.motion_rank(torch.tensor([0.0, 0.3]), never)
        assert ((ranks >= 0) & (ranks <= 1)).all()


class Paced(nn.Module):
    """A denoiser that says in all frames what motion it is told, and notes what it is given."""

    def __init__(self, takes_previous=False):
        super().__init__()
        self.p, self.takes_previous, self.seen = nn.Parameter(torch.ones(1)), takes_previous, []
        self.register_buffer("paces", torch.linspace(0, 0.08, 17))

    def forward(self, x, sigma, motion=None, **given):
        self.seen.append((motion, given))
        return 0 * x + (torch.full_like(sigma, -2) if motion is None else motion).view(-1, 1, 1, 1, 1)


def test_motion_is_drawn_evenly_unless_it_is_told_or_shown():
    """Each rank as often as any other, a clip's own whatever is drawn beside it; none where frames are given; guidance leaves
    it."""
    sigmas, shape = vdm.karras_sigmas(1), (400, 2, 1, 2, 2)
    ranks = vdm.generate(Paced(), shape, sigmas, seed=3)[:, 0, 0, 0, 0]
    assert (ranks.sort()[0] - (torch.arange(400) + 0.5) / 400).abs().max() < 0.09               # 1.36 / 400^(1/2) = 0.068
    close(vdm.generate(Paced(), (1, *shape[1:]), sigmas, noise=vdm.clip_noise(3, [7]))[0, 0, 0, 0, 0], ranks[7])
    assert (vdm.generate(Paced(), shape, sigmas, motion=torch.full((400,), 0.7)) == 0.7).all()
    context, mask = torch.zeros(2, 2, 1, 2, 2), torch.tensor([[1.0, 0.0]] * 2)
    assert (vdm.generate(Paced(), context.shape, sigmas, context=context, mask=mask)[:, 1] == -1).all()
    moves = torch.cat([blob(v, 0.0, width=4.0, size=32) for v in (0.64, 1.92)])      # 0.02 and 0.06 of the frame: 1/4, 3/4
    close(vdm.generate(Paced(), moves.shape, sigmas, previous=moves)[:, 0, 0, 0, 0], torch.tensor([0.25, 0.75]), rtol=0, atol=0.04)
    spy = Paced()                                                       # a model that sees no given frames is told
    vdm.generate(spy, context.shape, sigmas, context=context, mask=mask, reconstruction=1.0)
    close(spy.seen[0][0], vdm.generate(Paced(), context.shape, sigmas)[:, 0, 0, 0, 0])
    spy, motion = Paced(), torch.tensor([0.3, 0.6])
    vdm.generate(spy, context.shape, sigmas, guidance=2.0, motion=motion, context=context, mask=mask)
    assert [set(given) for _, given in spy.seen] == [set(), {"context", "mask"}] and all(m is motion for m, _ in spy.seen)
    made = vdm.interpolate(Paced(), torch.zeros(2, 3, 1, 2, 2), 2, 3, sigmas)
    assert (made[:, 1::2] == -1).all()


@cases("previous", [False, True])
def test_all_windows_of_a_video_are_told_one_motion(previous):
    """That of the frames given or, if that is one or none, one that is drawn, another for each video; or what is asked for."""
    sigmas, shape = vdm.karras_sigmas(1), (2, 6, 2, 64, 64)
    moves = torch.cat([blob(v, 0.0) for v in (1.28, 3.84)])            # 0.02 and 0.06 of the frame: ranks 1/4 and 3/4
    for start, want in ((moves, (0.25, 0.75)), (None, None)) + (((moves[:, :1], None),) if not previous else ()):
        spy = Paced(previous)
        video = torch.cat(list(vdm.rollout(spy, 20, shape, sigmas, 2, None if start is None else start[:, -6 if previous else -4:],
                                           seed=5)), 1)
        ranks = torch.stack([motion for motion, _ in spy.seen])
        assert len(ranks) > 2 and (ranks == ranks[0]).all() and video.shape[1] == 20
        if want:
            close(ranks[0], torch.tensor(want), rtol=0, atol=0.04)
        else:
            assert 0 < ranks[0].min() and ranks[0].max() < 1 and (ranks[0][0] - ranks[0][1]).abs() > 0.01
    spy = Paced(previous)
    list(vdm.rollout(spy, 20, shape, sigmas, 2, motion=torch.tensor([0.1, 0.2])))
    assert all(motion.tolist() == pytest.approx([0.1, 0.2]) for motion, _ in spy.seen)


def test_modes_are_dropped_at_their_rates_together_and_each_on_its_own():
    """By counting 20,000 clips of ones: whole modes, whole clips, pairs as often as chance has it."""
    sizes, (all_of_it, *rates) = (2, 1, 3), (0.2, 0.1, 0.5, 0.9)
    got = 1 - vdm.drop_modes(torch.ones(20_000, 3, 6), sizes, all_of_it, rates).isnan().float()
    assert (got == got[:, :1]).all() and (got[..., 0] == got[..., 1]).all()
    assert (got[..., 3:] == got[..., 3:4]).all() and set(got.unique().tolist()) == {0, 1}
    gone = (got[:, 0, [0, 2, 3]] == 0).double()                        # (clips, modes)
    both = gone.T @ gone / len(gone)
    for i, j in ((i, j) for i in range(3) for j in range(3)):
        chance = rates[i] * (rates[j] if i != j else 1)
        assert abs(both[i, j] - all_of_it - (1 - all_of_it) * chance) < 0.015
    one = vdm.drop_modes(torch.ones(20_000, 1, 6), sizes, 0.15, (0.15,)).isnan().double().mean((0, 1))
    assert (one - (1 - 0.85 ** 2)).abs().max() < 0.015
    clip = torch.randn(5, 3, 6)
    assert torch.equal(vdm.drop_modes(clip, sizes, 0.0, (0.0,)), clip)
    assert vdm.drop_modes(clip, sizes, 1.0, (0.0,)).isnan().all() and vdm.drop_modes(clip, sizes, 0.0, (1.0,)).isnan().all()


def test_guidance():
    """Video LDM eq. 4 by hand, for a network that says 5 with a condition and 2 without. (Its
    common transcription, f' = f(c) + s (f(c) - f'), would give f' = f(c) = 5 for every scale s.)"""
    denoise = lambda x, sigma, **cond: torch.full_like(x, 5.0 if cond else 2.0)
    x, one = torch.zeros(2, 3, 1, 2, 2), torch.ones(2)
    for scale, want in ((1, 5), (0, 2), (2.5, 9.5), (-1, -1)):         # 2 + scale * 3
        assert (vdm.guided(denoise, scale)(x, one, context=x) == want).all()
    for s in (0, 2.5):                                                 # the transcription, solved
        assert (vdm.guided(denoise, s)(x, one, context=x) != (5 + s * 5) / (1 + s)).all()
    per_frame = vdm.guided(denoise, torch.tensor([1, 2, 3]))(x, one, context=x)
    assert per_frame[1, :, 0, 0, 1].tolist() == [5, 8, 11]
    given = vdm.guided(denoise, 2)(x, one, context=x, mask=torch.tensor([[1, 0, 0]] * 2))
    assert given[1, :, 0, 1, 0].tolist() == [5, 8, 8]                  # what is given stays
    says = lambda x, sigma, frames=0, action=0: torch.full_like(x, 2.0 + 3 * frames + 7 * action)
    told = dict(frames=1, action=1)                                    # Vista: free is 5, what the frames alone say
    assert (vdm.guided(says, 2, keep=("frames",))(x, one, **told) == 5 + 2 * 7).all()
    assert (vdm.guided(says, 2)(x, one, **told) == 2 + 2 * 10).all()


def two_frames(r, sigma):
    """Frames a, b ~ Normal(M, 1) with covariance r: the matrix K of E[clean | x] = M + K (x - M)."""
    C = np.array([[1, r], [r, 1]])
    return C @ np.linalg.inv(C + sigma ** 2 * np.eye(2))


def exact(x, sigma, r=0.8):
    K = torch.tensor(two_frames(r, sigma[0].item()))
    return M + torch.einsum("st,bt...->bs...", K, x - M)


def test_temporal_guidance(double):
    """Two frames of correlation 0.8, or 0 where each is alone. By hand at sigma 1: of what differs 0.2 / 1.2 is kept together and
    1 / 2 alone, scale 1.5 goes half as far again; of what both share 1.8 / 2.8, at any scale. Along small steps then
    d log x / d sigma = (1 - kept) / sigma, by which variances V, W together and alone become V^scale / W^(scale - 1)."""
    denoise = lambda x, sigma, temporal=1.0, **cond: exact(x, sigma, 0.8 * temporal)
    same, other = torch.ones(1, 2, 1, 1, 1), torch.tensor([1.0, -1.0]).view(1, 2, 1, 1, 1)
    guess = vdm.temporally_guided(denoise, 1.5)
    close(guess(M + same, torch.ones(1)) - M, same * 1.8 / 2.8)
    close(guess(M + other, torch.ones(1)) - M, other * (1 / 2 + 1.5 * (0.2 / 1.2 - 1 / 2)))
    for mask in ([1.0, 0.0], [0.5, 0.0]):                              # given frames stay, hints are guided
        got = guess(M + other, torch.ones(1), mask=torch.tensor([mask]))
        close(got[:, 1] - M, (guess(M + other, torch.ones(1)) - M)[:, 1])
        close(got[:, 0], (denoise if mask[0] == 1 else guess)(M + other, torch.ones(1))[:, 0])
    x, sigmas = 60 * torch.randn(4000, 2, 1, 1, 1), vdm.karras_sigmas(60, 0.01, 60)
    for scale in (1.0, 1.5, 2.0):
        a, b = vdm.sample_heun(vdm.temporally_guided(denoise, scale), x, sigmas.double()).flatten(2).unbind(1)
        close(((a + b).var() / 2).item(), 1.8, rtol=0.07, atol=0)      # chance: 2.2 %
        close(((a - b).var() / 2).item(), 0.2 ** scale, rtol=0.07, atol=0)


@cases("scale, asked", [(1.4, [1, 0] * 4), (1.0, [1] * 4)])
def test_what_is_asked_under_temporal_guidance(scale, asked):
    """At each of 4 noise levels once with the temporal layers and, but for scale 1, once without. A roll-out that goes on by a
    jump does so unguided; one without a jump does not."""
    told = []

    class Model(Unsure):
        def forward(self, x, sigma, temporal=1.0, **cond):
            told.append(temporal)
            return super().forward(x, sigma, **cond)

    sigmas = torch.tensor([8.0, 4, 2, 1, 0])
    vdm.generate(Model(), (1, 8, 1, 4, 4), sigmas, "ddim", temporal_guidance=scale)
    assert told == asked
    for jump, after in ((2.0, [1] * 3), (0.0, asked)):                                       # it visits 8, 2 and 1
        told.clear()
        rolled(Model(), 12, (1, 8, 1, 4, 4), sigmas, 4, temporal_guidance=scale, jump=jump)
        assert told == asked + after


@cases("sigma", [0.1, 1.0, 7.0])
def test_reconstruction_guidance(sigma, double):
    """By hand: |a - guess_a|^2 has the gradient -2 K_ab (a - guess_a). Here q(a | z) is exactly
    Normal(guess_a, sigma^2 K_aa), so that weight 1 / K_aa gives E[b | a, x_b], from the textbook."""
    x, context, r = *torch.randn(2, 3, 2, 1, 2, 2), 0.8
    K, mask, level = two_frames(r, sigma), torch.tensor([[1, 0]] * 3), torch.full((3,), sigma)
    guess = exact(x, level)
    for weight in (0, 1.0, 2.5):
        with torch.no_grad():
            got = vdm.reconstruction_guided(exact, context, mask, weight)(x, level)
        close(got[:, 1], guess[:, 1] + weight * K[0, 1] * (context - guess)[:, 0])
        assert torch.equal(got[:, 0], context[:, 0])
    got = vdm.reconstruction_guided(exact, context, mask, 1 / K[0, 0])(x, level)
    mean, rest = M + r * (context[:, 0] - M), 1 - r ** 2               # b | a, then x_b is seen
    close(got[:, 1], mean + rest / (rest + sigma ** 2) * (x[:, 1] - mean))


@cases("name", SAMPLERS)
def test_reconstruction_guidance_samples_the_conditional(name, double):
    """With that weight b comes out as Normal(M + r (a - M), 1 - r^2). What is seen of a meanwhile
    has noise of the right level on it, as VDM's replacement has."""
    context, mask, seen = torch.full((4000, 2, 1, 1, 1), 2.0), torch.tensor([[1, 0]]).expand(4000, 2), []
    noise = torch.randn(2000, 2, 1, 1, 1)

    def denoise(x, sigma):
        seen.append((sigma[0].item(), ((x - context) / sigma[0])[:, 0].std().item()))
        K = two_frames(0.8, sigma[0].item())
        return vdm.reconstruction_guided(exact, context, mask, 1 / K[0, 0])(x, sigma)

    x = vdm.SAMPLERS[name](denoise, 80 * torch.cat([noise, -noise]), karras(150, 0.01, 80))
    assert (x[:, 0] == 2).all() and all(abs(std - 1) < 0.06 for _, std in seen)
    assert abs(x[:, 1].mean() - (M + 0.8 * (2 - M))) < 0.04 and abs(x[:, 1].std() - 0.6) < 0.04


def test_triangle():
    """As printed for Vista (25 frames, 1 to 2.5 and back); of 16 frames the peak is 14/15 of the way; the formula of
    Vista's code, 2 |v - floor(v + 1/2)|."""
    hill = vdm.triangle(1.0, 2.5, 25)
    assert hill[[0, 1, 12, 23, 24]].tolist() == pytest.approx([1, 1.125, 2.5, 1.125, 1])
    assert vdm.triangle(0, 1, 16).max().item() == pytest.approx(0.933, abs=5e-4)
    for T in range(2, 30):
        v = np.arange(T) / (T - 1)
        np.testing.assert_allclose(vdm.triangle(0.5, 3, T), 0.5 + 5 * np.abs(v - np.floor(v + 0.5)),
                                   atol=1e-5)
    assert vdm.triangle(1, 3, 1).tolist() == [1]
    hill = vdm.guided(lambda x, sigma, **cond: torch.full_like(x, 5.0 if cond else 2.0), hill)
    got = hill(torch.zeros(1, 25, 1, 1, 1), torch.ones(1), context=0).flatten()
    assert got[[0, 12]].tolist() == pytest.approx([5, 2 + 2.5 * 3])


def test_rescale():
    """Lin et al. 2023, eqs. 15 and 16, by numpy, clip by clip; given frames stay; a guided estimate
    that is the same everywhere has no standard deviation to divide by, and stays."""
    cond, free = torch.randn(2, 2, 3, 1, 4, 4) * torch.tensor([1.0, 3.0])[:, None, None, None, None]
    denoise, sigma = lambda x, sigma, **c: cond if c else free, torch.ones(2)
    out = (free + 4 * (cond - free)).numpy()
    for phi in (0.0, 0.7, 1.0):
        got = vdm.guided(denoise, 4.0, phi)(cond, sigma, context=cond)
        for b in range(2):
            want = phi * out[b] * cond[b].numpy().std() / out[b].std() + (1 - phi) * out[b]
            np.testing.assert_allclose(got[b], want, rtol=1e-4, atol=1e-5)
    mask = torch.tensor([[0, 1, 0]] * 2)
    held = vdm.guided(denoise, 4.0, 1.0)(cond, sigma, mask=mask)
    assert torch.equal(held[:, 1], cond[:, 1]) and torch.equal(held[:, ::2], got[:, ::2])
    cond = cond.round()                                                # no rounding below
    free = 2 * cond - 1                                                # 2 cond - free is 1
    assert (vdm.guided(denoise, 2.0, 0.7)(cond, sigma, context=cond) == 1).all()


def test_the_level_that_layers_are_told():
    """log(sigma) / 4 of each frame: of one that is given a level of 1e-4, of one that has a hint its own."""
    told = []
    net = lambda inputs, c_noise: told.append(c_noise) or inputs[:, :, :1]
    vdm.Denoiser(net)(torch.randn(1, 3, 1, 2, 2), torch.tensor([5.0]), torch.ones(1, 3, 1, 2, 2), torch.tensor([[1, 0.5, 0]]))
    assert told[0][0].tolist() == pytest.approx([math.log(1e-4) / 4, math.log(5) / 4, math.log(5) / 4])


def test_sigma_data_of_a_config_is_heeded():
    """A fresh network says 0, so that the estimate is the best linear one: s^2 / (sigma^2 + s^2) x (EDM)."""
    config = vdm.Config(kind="edm", sigma_data=0.8)
    x = torch.randn(2, 8, 3, 32, 32)
    close(vdm.build(config)(x, torch.tensor([0.5, 3.0])), x * (0.64 / (torch.tensor([0.5, 3.0]) ** 2 + 0.64)).view(2, 1, 1, 1, 1))


# ---- generation ----------------------------------------------------------------------------------

class Spy(nn.Module):
    """A denoiser that counts: frame n + 1 comes after frame n. It notes what it is given."""

    def __init__(self, takes_previous=False):
        super().__init__()
        self.p, self.takes_previous, self.given = nn.Parameter(torch.ones(1)), takes_previous, []

    def forward(self, x, sigma, context=None, mask=None, previous=None):
        last = previous if context is None else context[:, : int(mask[0].sum())]
        self.given.append([] if last is None else last[0, :, 0, 0, 0].tolist())
        first = 0 if last is None else last.max() - (0 if context is None else mask[0].sum())
        return count(x.shape[1], *x.shape[2:]) + first + torch.zeros_like(x)


def count(n, *shape):
    """A video (2, n, ...) whose frame t shows the number t = 1, 2 ..."""
    return torch.arange(1.0, n + 1)[:, None, None, None].expand(2, n, *(shape or (1, 2, 2)))


def rolled(spy, *args, **options):
    pieces = list(islice(vdm.rollout(spy, *args, sampler="ddim", **options), 100))
    assert max(p.shape[1] for p in pieces) <= args[1][1]               # memory: a window at a time
    return torch.cat(pieces, 1)


class Line(nn.Module):
    """A denoiser that draws straight lines between the frames it is given, by numpy."""

    takes_previous = False

    def forward(self, x, sigma, context=None, mask=None):
        line = torch.zeros_like(x)
        for b in range(len(x)):
            at = np.flatnonzero(mask[b].numpy())
            values = np.interp(np.arange(x.shape[1]), at, context[b, at, 0, 0, 0].numpy())
            line[b] = torch.tensor(values, dtype=x.dtype)[:, None, None, None]
        return torch.where(mask[..., None, None, None] > 0, context, line)


@cases("K, factor, frames", [(2, 4, 8), (4, 4, 9), (3, 2, 8), (9, 2, 8), (5, 7, 8), (6, 3, 4)])
def test_interpolation_fills_every_gap(K, factor, frames):
    """np.interp over all key frames at once; these come back bit for bit, whatever the windows."""
    keys = torch.randn(2, K, 1, 1, 1).expand(2, K, 1, 2, 3)
    got = vdm.interpolate(Line(), keys, factor, frames, torch.tensor([5.0, 1.0, 0.0]), sampler="ddim")
    assert got.shape == (2, factor * (K - 1) + 1, 1, 2, 3) and torch.equal(got[:, ::factor], keys)
    for b in range(2):
        want = np.interp(np.arange(got.shape[1]) / factor, np.arange(K), keys[b, :, 0, 0, 0].numpy())
        close(got[b, :, 0, 1, 2].numpy(), want.astype(np.float32))


def test_interpolation_of_one_frame_is_that_frame():
    key = torch.randn(2, 1, 1, 2, 3)
    assert torch.equal(vdm.interpolate(Line(), key, 4, 8, torch.tensor([5.0, 0.0])), key)
    for factor in (1, 8):
        with pytest.raises(ValueError, match=f"factor is {factor}, expected 2 to 7"):
            vdm.interpolate(Line(), key, factor, 8, torch.tensor([5.0, 0.0]))


@cases("sampler", SAMPLERS)
def test_clip_3_of_8_is_clip_3_alone(sampler):
    """The same clip, drawn with others or alone."""
    denoiser, sigmas = tiny(), vdm.karras_sigmas(4, 0.05, 20)
    clips = vdm.generate(denoiser, (8, 3, 1, 4, 4), sigmas, sampler, seed=5)
    noise = vdm.clip_noise(5, [3])
    alone = vdm.generate(denoiser, (1, 3, 1, 4, 4), sigmas, sampler, noise=noise)
    close(clips[3:4], alone, rtol=1e-3, atol=1e-3)
    assert (clips[2] - clips[3]).abs().max() > 0.1


def test_generate_starts_from_noise_at_sigma_max():
    """Standard deviation 80; one evaluation a step, or two where guidance asks for them."""
    for guidance, evaluations in ((1.0, 3), (2.0, 6)):
        spy, seen = Spy(), []
        spy.register_forward_pre_hook(lambda module, args: seen.append(args))
        shape, mask = (2, 8, 3, 16, 16), torch.tensor([[1] + [0] * 7] * 2)
        vdm.generate(spy, shape, vdm.karras_sigmas(3, 1, 80), "ddim", guidance,
                     context=torch.ones(shape), mask=mask)
        x, sigma = seen[0]
        assert len(seen) == evaluations and (sigma == 80).all()
        assert x.std().item() == pytest.approx(80, rel=0.04) and abs(x.mean()) < 4


def test_generate_passes_guidance_on():
    """A single step is the guided estimate of the noise."""
    denoiser, context, mask = tiny(), torch.randn(2, 3, 1, 4, 4), torch.tensor([[1, 0, 0]] * 2)
    scale, x = torch.tensor([1.0, 2.0, 3.0]), 9 * vdm.clip_noise(0, range(2))(3, 1, 4, 4)
    for phi in (0.0, 0.7):
        got = vdm.generate(denoiser, context.shape, torch.tensor([9.0, 0.0]), "heun", scale, phi,
                           context=context, mask=mask)
        want = vdm.guided(denoiser, scale, phi)(x, torch.tensor([9.0, 9.0]), context=context, mask=mask)
        close(got, want)


class Normal(nn.Module):
    """The exact denoiser of pixels ~ Normal(M, std^2) of their own, std (B,) being the condition."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(1))

    def forward(self, x, sigma, std=None, beside_the_point=None):
        std = torch.full_like(sigma, S) if std is None else std
        return M + (std ** 2 / (std ** 2 + sigma ** 2))[:, None, None, None, None] * (x - M)


def test_reward():
    """exp(-variance) where it is known; higher for the surer condition, untouched by one that
    changes nothing; each clip's its own."""
    shape, std, sigmas = (2, 8, 3, 16, 16), torch.tensor([0.2, 0.9]), vdm.karras_sigmas(60)
    ask = partial(vdm.reward, Normal(), shape, sigmas)
    assert ask().tolist() == pytest.approx([math.exp(-S ** 2)] * 2, rel=0.02)
    got = ask(std=std)
    assert got.tolist() == pytest.approx((-std ** 2).exp().tolist(), rel=0.03) and got[0] > got[1]
    assert torch.equal(got, ask(std=std, beside_the_point=torch.randn(shape)))
    assert torch.equal(ask(std=std.flip(0))[0], vdm.reward(Normal(), (1, *shape[1:]), sigmas, std=std[1:])[0])
    assert not torch.equal(got, ask(std=std, seed=9)) and not torch.equal(got, ask(std=std, ensemble=4))


@cases("sampler", SAMPLERS)
def test_generate_keeps_the_context_bit_for_bit(sampler):
    """Frames that are given come out as they went in, guided or not, by few steps or more."""
    context, mask = torch.randn(2, 3, 1, 16, 16), torch.tensor([[1, 0, 0]] * 2)
    for give in GIVES:
        for n, guidance, weight in ((1, 1.0, 0), (4, 1.0, 0), (4, 2.0, 0), (4, 1.0, 2.0)):
            x = vdm.generate(tiny(give=give), context.shape, vdm.karras_sigmas(n, 0.5, 20), sampler, guidance,
                             rescale=0.7, reconstruction=weight, context=context, mask=mask)
            assert torch.equal(x[:, 0], context[:, 0]) and x.isfinite().all()


class Labelled(nn.Module):
    """An estimate that is 0.2 everywhere if a label is told, else 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, sigma, label=None):
        return 0 * x + (0 if label is None else 0.2)


def test_reconstruction_leaves_guidance_by_the_label():
    """Frames are given by reconstruction, the label by guidance: 0 + 3 (0.2 - 0) where no frame is given."""
    context, mask = torch.randn(1, 4, 1, 2, 2), torch.tensor([[1.0, 1, 0, 0]])
    x = vdm.generate(Labelled(), context.shape, vdm.karras_sigmas(4), guidance=3.0, reconstruction=1.0, context=context, mask=mask,
                     label=torch.zeros(1))
    assert torch.equal(x[:, :2], context[:, :2])
    close(x[:, 2:], torch.full((1, 2, 1, 2, 2), 0.6))


@cases("give", GIVES)
def test_every_way_to_give_rolls_out_and_interpolates(give):
    """Frames that are given come back bit for bit, and other ones give another video."""
    denoiser, sigmas, frames = tiny(give=give), vdm.karras_sigmas(3, 0.5, 20), torch.randn(2, 2, 1, 8, 8)
    for weight in (0, 1.0):
        options = dict(sampler="ddim", reconstruction=weight)
        a, b = (torch.cat(list(vdm.rollout(denoiser, 9, (2, 4, 1, 8, 8), sigmas, 2, c, **options)), 1)
                for c in (frames, frames + 1))
        assert a.shape[1] == 9 and torch.equal(a[:, :2], frames)
        assert ((a - b)[:, 2:4].abs().amax((0, 2, 3, 4)) > 1e-3).all()         # in the first window
        a, b = (vdm.interpolate(denoiser, c, 3, 4, sigmas, **options) for c in (frames, frames + 1))
        assert torch.equal(a[:, ::3], frames) and ((a - b)[:, 1:3].abs().amax((0, 2, 3, 4)) > 1e-3).all()


class Wheel(nn.Module):
    """A denoiser that says in all frames how often it was asked, and notes what it was shown."""

    def __init__(self):
        super().__init__()
        self.p, self.takes_previous, self.shown = nn.Parameter(torch.ones(1)), False, []

    def forward(self, x, sigma, context=None, mask=None):
        self.shown.append((context, mask))
        return torch.full_like(x, len(self.shown))


@cases("overlap", [1, 3, 6])
def test_rollout_shows_hints_but_keeps_the_video(overlap):
    """Every window writes its number; the next is shown what was written, with noise of level 0.5."""
    wheel, noise = Wheel(), []
    video = rolled(wheel, 8 + 5 * (8 - overlap), (2, 8, 1, 16, 16), vdm.karras_sigmas(1), overlap, context_noise=0.5)
    want = [1] * 8 + [k for k in range(2, 7) for _ in range(8 - overlap)]
    assert video[0, :, 0, 0, 0].tolist() == want and wheel.shown[0] == (None, None)
    for k, (context, mask) in enumerate(wheel.shown[1:]):
        end = 8 + k * (8 - overlap)
        close(mask, torch.tensor([1 / 1.5] * overlap + [0.0] * (8 - overlap)).expand(2, 8))
        noise.append((context[:, :overlap] - video[:, end - overlap : end]) / 0.5)
    noise = torch.cat(noise, 1)
    assert abs(noise.std() - 1) < 0.05 and abs(noise.mean()) < 0.05



@cases("start", [0, 3])
def test_rollout_keeps_the_first_frames_of_all(start):
    """With anchors each window is shown them, clean, then the last 2 frames, noisy, and told what each of these was told."""
    wheel, action = Wheel(), torch.arange(30.0)[None, :, None].expand(2, 30, 1)
    told, forward = [], wheel.forward
    wheel.forward = lambda x, sigma, context=None, mask=None, action=None: told.append(action[0, :, 0]) or forward(
        x, sigma, context, mask)
    given = -torch.ones(2, start, 1, 16, 16) * torch.arange(1, start + 1)[:, None, None, None] if start else None
    video = rolled(wheel, 20, (2, 8, 1, 16, 16), vdm.karras_sigmas(1), 4, given, context_noise=0.5, anchors=2, action=action)
    assert torch.equal(video[:, :start], video[:, :0] if given is None else given) and video.shape[1] == 20
    done = start
    for (context, mask), at in zip(wheel.shown, told):
        n = min(done, start if done == start else 4)
        frames = [0, 1, *range(done - n + 2, done)][:n]                # of the video
        assert at.tolist() == [0, 1, *range(done - n + 2, done - n + 8)]
        if n:
            close(mask[0], torch.tensor(([1, 1] + [1 / 1.5] * (n - 2))[:n] + [0] * (8 - n)))
            assert torch.equal(context[:, :min(n, 2)], video[:, frames[:2]])
        if n > 2:
            noise = (context[:, 2:n] - video[:, frames[2:]]) / 0.5
            assert abs(noise.std() - 1) < 0.1 and abs(noise.mean()) < 0.1
        done += 8 - n


class Unsure(nn.Module):
    """To this denoiser, every number is Normal(m, s^2), whatever is given. It notes noise levels, and how much is given."""

    def __init__(self, m=0.3, s=1.0, takes_previous=False):
        super().__init__()
        self.p, self.takes_previous, self.m, self.s, self.seen = nn.Parameter(torch.ones(1)), takes_previous, m, s, []

    def forward(self, x, sigma, context=None, mask=None, previous=None):
        self.seen.append((sigma[0].item(), 8 if previous is not None else 0 if mask is None else int(mask[0].sum())))
        return self.m + self.s ** 2 / (self.s ** 2 + sigma.view(-1, 1, 1, 1, 1) ** 2) * (x - self.m)


@cases("previous, overlap, start", [(False, 4, 0), (False, 4, 1), (False, 3, 2), (False, 1, 3), (True, 4, 0)])
def test_rollout_jumps_where_two_frames_tell_what_comes(previous, overlap, start):
    """Where two or more frames are given, the noise levels between the first and 2.5 are left out, elsewhere none is."""
    unsure, sigmas = Unsure(takes_previous=previous), torch.tensor([60, 20, 5, 2.5, 1, 0.0])
    video = rolled(unsure, 20, (2, 8, 1, 4, 4), sigmas, overlap, torch.zeros(2, start, 1, 4, 4) if start else None, jump=2.5)
    assert video.shape[1] == 20
    windows = [list(window) for _, window in groupby(unsure.seen, lambda seen: seen[1])]
    assert sum(seen[0] == 60 for seen in unsure.seen) == 1 + math.ceil((20 - 8) / (8 if previous else 8 - overlap))
    for window in windows:
        given = window[0][1]
        levels = [60, 2.5, 1] if given > 1 else [60, 20, 5, 2.5, 1]
        assert [level for level, _ in window] == levels * (len(window) // len(levels))
    assert {given for _, given in unsure.seen} == {start, 8 if previous else overlap}


@cases("jump", [0.25, 1.0])
def test_a_jump_draws_less_of_what_the_model_is_unsure_of(double, jump):
    """All levels draw m + s n from Normal(m, s^2). Small steps keep (x - m) / (s^2 + sigma^2)^(1/2), so from m + jump n it
    comes to m + s jump n / (s^2 + jump^2)^(1/2): nearer to the mean."""
    sigmas = torch.cat([torch.logspace(4, -4, 1601), torch.zeros(1)])
    drawn = [rolled(Unsure(0.3, 0.5), 8, (2, 8, 1, 4, 4), sigmas, 4, torch.zeros(2, 2, 1, 4, 4), jump=j)[:, 2:] for j in (0, jump)]
    whole, less = ((x - 0.3) / 0.5 for x in drawn)
    close(less, whole * jump / math.hypot(0.5, jump), rtol=0.01, atol=1e-3)
    assert 0.7 < whole.std() < 1.3


@cases("overlap, given", [(1, 0), (4, 0), (7, 0), (2, 1), (4, 7), (6, 3)])
def test_rollout_windows(overlap, given):
    """Where a denoiser counts frames the video must count on without a gap, at any length."""
    sigmas, start = vdm.karras_sigmas(1), count(given) if given else None
    for length in {1, 3, 8, 9, 12, 31} - set(range(given)):
        spy, done = Spy(), given
        video = rolled(spy, length, (2, 8, 1, 2, 2), sigmas, overlap, start)
        assert torch.equal(video, count(length))
        for seen in spy.given:                                         # what each window was given
            n = given if done == given else overlap
            assert seen == list(range(done - n + 1, done + 1))
            done += 8 - n
    assert torch.equal(rolled(Spy(), 8, (2, 8, 1, 2, 2), sigmas, 8, start), count(8))        # one window takes nothing over
    spy = Spy()
    next(iter(vdm.rollout(spy, 10 ** 9, (2, 8, 1, 2, 2), sigmas, overlap)))
    assert len(spy.given) == 1                                         # and no more than was asked


class Obedient(Spy):
    """A denoiser whose frames show the number that each is told."""

    def forward(self, x, sigma, action, **given):
        self.told = action[0, :, 0].tolist()
        return action[..., None, None].expand_as(x)


@cases("previous, overlap, given", [(False, 2, 0), (False, 1, 3), (True, 0, 0), (True, 0, 5)])
def test_rollout_tells_each_window_its_own_actions(previous, overlap, given):
    """Frame n is told n, so the video must count; frames that nobody asked for are told nothing (NaN)."""
    spy, action = Obedient(previous), torch.arange(1.0, 13)[:, None].expand(2, 12, 1)
    video = rolled(spy, 12, (2, 5, 1, 2, 2), torch.tensor([1.0, 0.0]), overlap,
                   count(given) if given else None, action=action)
    assert torch.equal(video, count(12))
    first = int(spy.told[0])
    told, want = torch.tensor(spy.told), torch.tensor([n if n <= 12 else torch.nan for n in range(first, first + 5)])
    assert torch.equal(told.nan_to_num(99), want.nan_to_num(99)) and told.isnan().any()
    long = rolled(spy, 40, (2, 5, 1, 2, 2), torch.tensor([1.0, 0.0]), overlap, count(given) if given else None, action=action)
    assert torch.equal(long[:, :12], count(12)) and long[:, 12:].isnan().all()           # and much longer than the actions are


def test_rollout_in_whole_clips():
    """PVDM: every window is given all of the window before it."""
    spy, shape, sigmas = Spy(takes_previous=True), (2, 4, 1, 2, 2), vdm.karras_sigmas(1)
    assert torch.equal(rolled(spy, 14, shape, sigmas), count(14))
    assert spy.given == [[], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert torch.equal(rolled(spy, 9, shape, sigmas, context=count(4)), count(9))
    assert spy.given[4:] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    with pytest.raises(ValueError, match="context"):
        rolled(spy, 9, shape, sigmas, context=count(3))


@cases("what, length, overlap, given", [
    ("overlap is 0", 9, 0, 1), ("overlap is 8", 9, 8, 1), ("overlap is -1", 9, -1, 1),
    ("context has 8 frames", 9, 4, 8)])
def test_rollout_refuses(what, length, overlap, given):
    """What cannot work is refused by its name."""
    with pytest.raises(ValueError, match=what):
        rolled(Spy(), length, (2, 8, 1, 2, 2), vdm.karras_sigmas(1), overlap, count(given))


def test_inversion(double):
    """Exact for a constant eps; else first order in the steps, and exact once it has converged."""
    clip, eps, sigmas = torch.randn(6, 1), torch.randn(6, 1), karras(10, 0.05, 80)
    constant = lambda x, sigma: x - sigma[:, None] * eps
    close(vdm.invert_ddim(constant, clip, sigmas), clip + 80 * eps)
    close(vdm.sample_ddim(constant, clip + 80 * eps, sigmas), clip)

    def error(n, iterations):
        sigmas = karras(n, 0.01, 80)
        noise = vdm.invert_ddim(gaussian, clip, sigmas, iterations)
        return (vdm.sample_ddim(gaussian, noise, sigmas) - clip).abs().max()

    assert 1.7 < error(100, 1) / error(200, 1) < 2.3
    assert error(200, 10) < 1e-11 and error(200, 1) > 1e-3


@cases("preset", ["tiny", "latent", "mnist", "ucf101"])
def test_channels_stay_last_in_memory(preset):
    """At every convolution, forwards: one tensor laid out otherwise and all that follow it are copied each time."""
    c, seen = vdm.PRESETS[preset], []
    c = vdm.dataclasses.replace(c, width=16, head_dim=16, size=(c.patch * 2 ** (len(c.mults) - 1) * 2,) * 2, frames=3, context=(1.0,))
    model = vdm.build(c)
    for layer in model.net.modules():
        form = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}.get(type(layer))
        if form:
            layer.register_forward_hook(lambda layer, x, y, form=form: seen.append(x[0].is_contiguous(memory_format=form)))
    model(torch.randn(2, 3, c.channels, *c.size), torch.ones(2))
    assert len(seen) > 10 and all(seen)


def test_noise_of_neighbouring_seeds_and_clips():
    """(seed, clip) 0, 1 and 1, 0 are not the same."""
    a, b = vdm.clip_noise(0, [1])(100), vdm.clip_noise(1, [0])(100)
    assert (a * b).mean().abs() < 0.4 and not torch.equal(a, b)


def test_as_many_anchors_as_overlap_are_refused():
    """Then no frame would tell where things are now."""
    with pytest.raises(ValueError, match="overlap is 2, with 2 anchors"):
        next(vdm.rollout(Spy(), 8, (2, 4, 1, 2, 2), torch.tensor([1.0, 0.0]), overlap=2, anchors=2))


# ---- network -------------------------------------------------------------------------------------

@cases("patch, options", [(1, {}), (2, {}), (1, dict(ddpm_layout=True, feed_forward="both")),
                          (1, dict(ddpm_layout=True, convs=False, feed_forward="none"))])
def test_fresh_network_is_an_image_network(patch, options):
    """Each frame alone, T = 1; once the gates are open, one frame changes all the others."""
    net = randomize(vdm.VideoUNet(2, 3, 8, (1, 2), 1, (1, 2), (2,), head_dim=8, patch=patch, **options))
    x, level = torch.randn(2, 5, 2, 8 * patch, 4 * patch), torch.randn(2, 5)
    alone = torch.cat([net(x[:, t : t + 1], level[:, t : t + 1]) for t in range(5)], 1)
    close(net(x, level), alone, rtol=1e-4, atol=1e-4)
    assert alone.shape == (2, 5, 3, 8 * patch, 4 * patch) and alone.std() > 0.1
    before = randomize(net, gates=True)(x, level)
    x[:, 3] += torch.randn(x[:, 3].shape)
    assert ((net(x, level) - before).abs().amax((0, 2, 3, 4)) > 1e-3).all()


def test_temporal_layers_can_be_heeded_by_clip():
    """At 0 a clip is treated frame by frame, whatever the gates and the clip beside it; at 1 as ever."""
    net = randomize(vdm.VideoUNet(2, 3, 8, (1, 2), 1, (1, 2), (2,), head_dim=8), gates=True)
    x, level = torch.randn(2, 5, 2, 8, 4), torch.randn(2, 5)
    alone = torch.cat([net(x[:, t : t + 1], level[:, t : t + 1], temporal=0.0) for t in range(5)], 1)
    close(net(x, level, temporal=0.0), alone, rtol=1e-4, atol=1e-4)
    mixed = net(x, level, temporal=torch.tensor([0.0, 1.0]))
    close(mixed[0], alone[0], rtol=1e-4, atol=1e-4)
    close(mixed[1], net(x, level)[1], rtol=1e-4, atol=1e-4)
    assert (alone - net(x, level)).abs().max() > 0.1


def test_every_gate_learns_within_three_steps():
    """A gate of 0 before a layer of 0 would have a gradient of 0 for ever. That of a residual branch
    stands before one which leaves 0 at the first step, as does the network's last layer."""
    net = vdm.VideoUNet(1, 1, 8, (1, 2), 1, (1, 2), (2,), head_dim=8)
    optimizer, x, level = torch.optim.SGD(net.parameters(), 0.1), torch.randn(2, 4, 1, 4, 4), torch.randn(2)
    gates = [p for name, p in net.named_parameters() if name.endswith("gate")]
    assert len(gates) == 3 * 5 and all(p == 0 for p in gates)
    for step in range(3):
        optimizer.zero_grad()
        (net(x, level) - x).square().mean().backward()
        optimizer.step()
    assert all(p != 0 and p.grad != 0 for p in gates)


def test_attention():
    """PyTorch's own, for few tokens and for many."""
    for L in (5, 300):
        q, k, v = torch.randn(3, 2, 3, L, 8)
        close(vdm.attend(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


def test_cross_attention_to_one_token_is_no_attention():
    """PyTorch's own, with queries and keys of any kind."""
    theirs, token = nn.MultiheadAttention(8, 2, bias=False, kdim=5, vdim=5, batch_first=True), torch.randn(3, 1, 5)
    ours = randomize(vdm.one_token(5, 8))
    ours[0].weight, ours[1].weight = theirs.v_proj_weight, theirs.out_proj.weight
    close(theirs(torch.randn(3, 7, 8), token, token)[0], ours(token).expand(3, 7, 8))
    assert (vdm.one_token(5, 8)(token) == 0).all()


def test_transformers_are_told_the_action_and_where_each_frame_is():
    """Each action moves its own frame through every attention, at each in its own way; a number withheld is NaN, one that
    is 0 is told. With the rotary angles the same for all frames, order still matters."""
    net = randomize(vdm.VideoUNet(1, 1, 8, (1, 2), 1, (1, 2), (), head_dim=8, actions=2, feed_forward="both"))
    nn.init.zeros_(net.embed_action.weight)
    x, level, action = torch.randn(1, 3, 1, 4, 4), torch.ones(1), torch.full((1, 3, 2), torch.nan)
    free, layers = net(x, level), [m for m in net.modules() if getattr(m, "told", None) is not None]
    assert len(layers) == 2 * 5 and torch.equal(net(x, level, action=action), free)
    for value in (3.0, 0.0):
        action[0, 1, 0] = value
        moved = (net(x, level, action=action) - free).abs().amax((0, 2, 3, 4))
        assert (moved > 1e-3).tolist() == [False, True, False]         # gates are closed
    for layer in layers:
        nn.init.zeros_(layer.told[0].weight)
    assert torch.equal(net(x, level, action=action), free)
    time = randomize(vdm.TemporalAttention(8, 8, mode="both"), gates=True)
    same = torch.randn(1, 1, 8, 2, 2).expand(1, 3, 8, 2, 2)
    assert (time(same).diff(dim=1).abs().amax((0, 2, 3, 4)) > 1e-3).all()
    assert not randomize(vdm.TemporalAttention(8, 8), gates=True)(same).diff(dim=1).abs().max() > 1e-5


def test_residuals_in_float32():
    """Under bf16 autocast 64 layers that add 1 / 1024 to 1 come to 1 + 64 / 1024 if what they are given is float32; bf16, whose
    next number is 1 + 1 / 128, stays at 1. fp32_residuals makes what every block is given, and gives, float32."""
    layer = vdm.TemporalConv(4)
    nn.init.zeros_(layer.conv.weight), nn.init.ones_(layer.conv.bias), nn.init.constant_(layer.gate, 1 / 1024)
    for exact, want in ((False, 1), (True, 1 + 64 / 1024)):
        net, x = vdm.VideoUNet(1, 1, 16, (1, 2), head_dim=8, fp32_residuals=exact), torch.ones(1, 3, 4, 2, 2)
        seen, x = [], x if exact else x.bfloat16()
        for block in (module for module in net.modules() if isinstance(module, vdm.Block)):
            block.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(64):
                x = layer(x)
            net(torch.randn(1, 3, 1, 4, 4), torch.ones(1))
        assert (x == want).all() and set(seen) == {torch.float32 if exact else torch.bfloat16} and len(seen) == 5


def test_a_gated_feed_forward_layer():
    """norm, a * b * Phi(b), and back, in numpy-like steps; in space it is one more residual branch."""
    layer, x = randomize(vdm.feed_forward(6, gated=True)), torch.randn(4, 6)
    norm, wide, _, back = layer
    a, b = ((x - x.mean(1, True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
            ).matmul(wide.weight.T).add(wide.bias).split(24, 1)
    close(layer(x), (a * b * (1 + torch.erf(b / 2 ** 0.5)) / 2) @ back.weight.T + back.bias, rtol=1e-4, atol=1e-4)
    space, x = randomize(vdm.SpatialAttention(8, 8, both=True)), torch.randn(1, 2, 8, 3, 4)
    plain = randomize(vdm.SpatialAttention(8, 8))
    plain.load_state_dict(space.state_dict(), strict=False)
    h = plain(x)
    for (t, y, z) in ((0, 1, 2), (1, 2, 3)):
        close(space(x)[0, t, :, y, z], h[0, t, :, y, z] + space.feed_forward(h[0, t, :, y, z]), rtol=1e-4, atol=1e-4)


@cases("axes", [1, 3])
def test_rotary_products_depend_on_distance_only(axes):
    """q . k stays when both move by the same, and changes when one moves along any axis."""
    q, k, p, r = *torch.randn(2, 1, 1, 6, 16), *torch.randint(0, 9, (2, 6, axes))
    product = lambda p, r: (vdm.rotate(q, p) * vdm.rotate(k, r)).sum(-1)
    for axis in range(axes):
        shift = 7 * F.one_hot(torch.tensor(axis), axes)
        close(product(p + shift, r + shift), product(p, r), rtol=1e-4, atol=1e-4)
        assert (product(p + shift, r) - product(p, r)).abs().max() > 0.1
    close(vdm.rotate(q, p).norm(dim=-1), q.norm(dim=-1))


def test_temporal_conv():
    """Group norm, SiLU, three taps over t with zeros beyond the ends, the gate: written out."""
    layer = randomize(vdm.TemporalConv(48), gates=True).requires_grad_(False)
    x, weight = torch.randn(2, 4, 48, 2, 3), layer.conv.weight.flatten(2)        # (out, in, tap)
    h = torch.empty_like(x)
    for b, t, g in np.ndindex(2, 4, 3):                                # 48 channels: 3 groups of 16
        part = x[b, t, 16 * g : 16 * g + 16]
        h[b, t, 16 * g : 16 * g + 16] = (part - part.mean()) / (part.var(correction=0) + 1e-5).sqrt()
    h = h * layer.norm.weight[:, None, None] + layer.norm.bias[:, None, None]
    h, want = h / (1 + (-h).exp()), x + layer.gate * layer.conv.bias[:, None, None]
    for t, tap in np.ndindex(4, 3):
        if 0 <= t + tap - 1 < 4:
            value = torch.einsum("oi,bihw->bohw", weight[:, :, tap], h[:, t + tap - 1])
            want[:, t] += layer.gate * value
    close(layer(x), want, rtol=1e-4, atol=1e-4)


@cases("joint, mode", [(False, "time"), (True, "time"), (True, "none"), (False, "both")])
def test_temporal_attention(joint, mode):
    """Token by token, rotary angles as complex numbers: over one place, or over all of them; then the
    two residuals of a transformer block or, without a feed-forward layer, VDM's attention alone."""
    layer = randomize(vdm.TemporalAttention(16, 8, joint, mode), gates=True).requires_grad_(False)
    x, axes = torch.randn(1, 3, 16, 2, 4), 3 if joint else 1
    tokens = layer.norm(x[0]).movedim(1, -1)                           # [t, h, w]: (16,)
    if mode == "both":                                                 # SVD: the frame's number, and a layer more
        angles = torch.arange(3.0)[:, None] / 10_000 ** (torch.arange(8) / 8)
        tokens = tokens + layer.number(torch.cat([angles.cos(), angles.sin()], 1))[:, None, None]
        tokens = tokens + layer.before(tokens)
    q, k, v = F.linear(tokens, layer.qkv.weight).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (2, 8)) for y in (q, k, v))             # [t, h, w]: (heads, d)
    want, places = x.clone(), list(np.ndindex(3, 2, 4))

    def turned(y, place):
        angle = [place[j % axes] * 100 ** (-(j // axes) * axes / 4) for j in range(4)]
        return torch.complex(y[place][:, :4], y[place][:, 4:]) * torch.tensor(angle).mul(1j).exp()

    for a in places:
        seen = [b for b in places if joint or a[1:] == b[1:]]
        p = [(turned(q, a) * turned(k, b).conj()).real.sum(-1) / math.sqrt(8) for b in seen]
        p = torch.stack(p).softmax(0)                                  # (seen, heads)
        h = layer.out(sum(p[i][:, None] * v[b] for i, b in enumerate(seen)).flatten())
        if mode != "none":
            h = tokens[a] + h
            h = h + layer.feed_forward(h)
        want[0, a[0], :, a[1], a[2]] += layer.gate * h
    close(layer(x), want, rtol=1e-4, atol=1e-4)


def test_how_the_level_scales_and_shifts():
    """GroupNorm's own weights and biases do the same: (1 + scale) times them, plus shift; with neither, PyTorch's own layers."""
    block = randomize(vdm.ResBlock(16, 32, 8, convs=False))
    x, scale, shift = torch.randn(2, 3, 16, 4, 4), 0.3, -0.2
    plain = nn.Sequential(block.norm1, nn.SiLU(), block.conv1, norm := copy.deepcopy(block.norm2), nn.SiLU(), block.conv2)
    with torch.no_grad():
        block.emb.weight.zero_()
        for s, b in ((0.0, 0.0), (scale, shift)):
            block.emb.bias.copy_(torch.tensor([s] * 32 + [b] * 32))
            norm.weight.copy_((1 + s) * block.norm2.weight)
            norm.bias.copy_((1 + s) * block.norm2.bias + b)
            want = (plain(x.flatten(0, 1)) + block.skip(x.flatten(0, 1))).unflatten(0, (2, 3))
            close(block(x, torch.randn(2, 3, 8)), want, rtol=1e-4, atol=1e-4)


def test_spatial_attention_by_hand():
    """Place by place, head by head, on a frame that is higher than wide."""
    layer, x = randomize(vdm.SpatialAttention(8, head_dim=4)), torch.randn(1, 2, 8, 5, 3)
    got = layer(x) - x
    for t in range(2):
        h = layer.norm(x[:, t])[0]                                                             # (8, 5, 3)
        q, k, v = (h.permute(1, 2, 0) @ layer.qkv.weight.T).chunk(3, -1)                       # (5, 3, 8)
        for i, j in np.ndindex(5, 3):
            seen = []
            for c in (slice(0, 4), slice(4, 8)):
                p = torch.stack([q[i, j, c] @ k[a, b, c] / 2 for a, b in np.ndindex(5, 3)]).softmax(0)
                seen.append(sum(w * v[a, b, c] for w, (a, b) in zip(p, np.ndindex(5, 3))))
            close(got[0, t, :, i, j], layer.out(torch.cat(seen)), rtol=1e-4, atol=1e-4)


def test_the_level_is_embedded_as_steps_of_ddpm_are():
    """cos and sin of 1000 c_noise, at frequencies from 1 down to nearly 1e-4 (Vaswani et al. 2017)."""
    net, seen, c_noise = vdm.VideoUNet(1, 1, 8, (1,), attention=(), joint=()), [], torch.tensor([[-0.4, 0.9]])
    net.embed[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(torch.randn(1, 2, 1, 4, 4), c_noise)
    for t in range(2):
        angles = [1000 * c_noise[0, t].double() / 10_000 ** (i / 24) for i in range(24)]
        want = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        close(seen[0][0, t].double(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-3)


@cases("channels, groups", [(16, 1), (48, 3), (96, 6), (255, 15), (256, 32), (320, 32), (1280, 32)])
def test_groups(channels, groups):
    """32 in wide layers, as in the papers; in narrow ones of 16 channels, or as near as divides."""
    assert vdm.normalize(channels).num_groups == groups


# ---- adapters -------------------------------------------------------------------------------------

@cases("layer, shape", [(nn.Linear(6, 5), (4, 6)), (nn.Conv1d(6, 5, 3, padding=1), (2, 6, 7)),
                        (nn.Conv2d(6, 5, 3, 2, 1), (2, 6, 7, 8)), (nn.Conv3d(6, 5, (3, 1, 1), padding=(1, 0, 0)), (2, 6, 4, 3, 3))])
def test_lora(layer, shape):
    """Starts as nothing; then the answer by hand, with weight W + B A as a matrix; merging changes nothing."""
    x = torch.randn(shape)
    before, weight = layer(x), layer.weight.detach().clone()
    lora = vdm.LoRA(layer, rank=2)
    assert torch.equal(lora(x), before)
    assert abs(torch.cat([vdm.LoRA(nn.Linear(999, 9), 16).lora_down.weight for _ in range(9)]).std() * 16 - 1) < 0.01
    nn.init.normal_(lora.lora_up.weight)
    wide = lora.lora_down.weight.detach().reshape(2, -1), lora.lora_up.weight.detach().reshape(5, 2)
    whole = (weight.reshape(5, -1) + wide[1] @ wide[0]).reshape(weight.shape)
    layer.weight.data = whole
    expected = layer(x)
    layer.weight.data = weight
    close(lora(x), expected, rtol=1e-4, atol=1e-5)
    merged = lora.merge()
    assert merged is layer
    close(merged(x), expected, rtol=1e-4, atol=1e-5)
    close(merged.weight, whole)


class Doubles(nn.Module):
    def forward(self, x, emb, strength):
        return 2 * x


def test_simdas_adapters():
    """Each by einsum and a loop over frames, around a layer that doubles; strength 0 goes without the temporal one."""
    x = torch.randn(2, 5, 8, 3, 4)
    space, beside = (make(nn.Identity(), 8, 3) for make in (vdm.SpatialAdapter, vdm.FeedForwardAdapter))
    time = vdm.TemporalAdapter(Doubles(), 8, 3)
    tokens = x.movedim(2, -1)
    assert torch.equal(space(x), x) and torch.equal(beside(tokens), tokens) and torch.equal(time(x, None), 2 * x)
    for adapter in (space, beside, time):
        randomize(adapter)
    weights = lambda a: (a.adapter_down.weight.flatten(1), a.adapter_down.bias, a.adapter_up.weight.flatten(1), a.adapter_up.bias)
    for adapter, got in ((space, space(x).movedim(2, -1)), (beside, beside(tokens))):
        A, a, B, b = weights(adapter)
        h = F.gelu(torch.einsum("rc,bthwc->bthwr", A, tokens) + a)
        close(got, tokens + torch.einsum("cr,bthwr->bthwc", B, h) + b, rtol=1e-4, atol=1e-5)
    A, a, B, b = weights(time)
    down = torch.einsum("rc,bthwc->bthwr", A, 2 * tokens) + a
    taps, want = time.adapter_conv.weight.flatten(1), torch.zeros(2, 5, 3, 4, 3) + time.adapter_conv.bias
    for t in range(5):
        for k in range(3):
            if 0 <= t + k - 1 < 5:
                want[:, t] += taps[:, k] * down[:, t + k - 1]
    want = 2 * tokens + torch.einsum("cr,bthwr->bthwc", B, want) + b
    close(time(x, None).movedim(2, -1), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(time(x, None, 0.0), 2 * x)
    with torch.autocast("cpu", torch.bfloat16):                                       # what goes on stays as narrow
        assert time(x.bfloat16(), None, torch.ones(2, 1, 1, 1, 1)).dtype == torch.bfloat16


def test_alpha_mixing():
    """Video LDM's alpha image + (1 - alpha) video: what temporal layers do that are heeded at 1 - alpha."""
    layer, x = randomize(vdm.TemporalConv(16), gates=True), torch.randn(2, 4, 16, 3, 3)
    close(layer(x, strength=1 - 0.3), 0.3 * x + 0.7 * layer(x))
    assert torch.equal(layer(x, strength=0.0), x)
    conv = nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0))                     # Make-A-Video's start is an identity, too
    nn.init.dirac_(conv.weight), nn.init.zeros_(conv.bias)
    assert torch.equal(conv(x.transpose(1, 2)), x.transpose(1, 2))


@cases("code", [False, True])
def test_shift_attention(code):
    """Every query of every frame by loops, on a frame that is not square and no multiple of 4."""
    B, T, H, W, heads, d = 2, 6, 5, 6, 2, 3
    q, k, v = torch.randn(3, B, T, H, W, heads, d).double()
    rows = [4, 3, 2, 1], [3, 2, 1, 0], [2, 1, 0, 0], [1, 2, 3, 4]
    def moved(x, b, t, y, z):
        s = rows[y % 4][z % 4]
        return x[b, t - s if t >= s else t, y, z]
    got, places = vdm.shift_attention(q, k, v, code), [(y, z) for y in range(H) for z in range(W)]
    for b, t in ((0, 0), (0, 1), (1, 3), (1, 5)):
        both = []
        for x in (k, v):
            first = [moved(x, b, max(t - 1, 0), y, z) if code else x[b, t, y, z] for y, z in places]
            both.append(torch.stack(first + [moved(x, b, t, y, z) for y, z in places]))           # (2 H W, heads, d)
        for y, z in ((0, 0), (2, 3), (4, 5)):
            for h in range(heads):
                weight = (both[0][:, h] @ q[b, t, y, z, h] / d ** 0.5).softmax(0)
                close(got[b, t, y, z, h], weight @ both[1][:, h])


@cases("kind", ["lora", "simda"])
def test_adapt_changes_nothing_at_first(kind):
    """Bit for bit, with all kinds of attention; then each new part can change the answer. LoRA, merged, is a plain network."""
    net = vdm.VideoUNet(3, 1, 16, (1, 2), 1, (1, 2), (2,), head_dim=8)
    denoiser, (x, sigma) = randomize(vdm.Denoiser(net), gates=True), (torch.randn(2, 5, 1, 8, 8), torch.ones(2))
    before, names = denoiser(x, sigma), set(denoiser.state_dict())
    new = vdm.adapt(denoiser, kind, 2, ("e",))                         # in the names of all layers, but what embeds is let be
    assert torch.equal(denoiser(x, sigma), before)
    parts = [name for name, _ in denoiser.named_parameters() if vdm.part_of(name) == dict(lora="lora", simda="adapters")[kind]]
    assert len(new) == len(parts) > 0 and {n.replace(".layer.", ".") for n in denoiser.state_dict()} - set(parts) >= names
    assert not any(name.startswith("net.embed") for name in parts)
    for p in new:
        nn.init.normal_(p, std=0.3)
    after = denoiser(x, sigma)
    assert (after - before).abs().max() > 0.01
    alone = torch.cat([denoiser(x[:, t : t + 1], sigma, temporal=0.0) for t in range(5)], 1)
    close(denoiser(x, sigma, temporal=0.0), alone, rtol=1e-3, atol=1e-3)       # still an image model, if asked to be
    if kind == "lora":
        for name, layer in list(denoiser.named_modules()):
            if isinstance(layer, vdm.LoRA):
                denoiser.set_submodule(name, layer.merge())
        close(denoiser(x, sigma), after, rtol=1e-3, atol=1e-3)
        assert set(denoiser.state_dict()) == names


def test_adapters_share_of_tiny():
    """Counted by hand from the widths: LoRA (in + out) rank (times the kernel), SimDA's bottlenecks with their biases."""
    whole = sum(p.numel() for p in vdm.build(vdm.PRESETS["tiny"]).parameters())
    count = lambda kind, rank, **o: sum(p.numel() for p in vdm.adapt(vdm.build(vdm.PRESETS["tiny"]), kind, rank, **o))
    blocks, joint, apart = (16, 48, 96, 96, 96, 48, 16), 3 * (96,), 2 * (48,)      # apart: space, then time
    simda = sum(c * 32 + 32 + 4 * 32 + 32 * c + c for c in blocks) + 2 * sum(2 * c * 32 + 32 + c for c in joint + apart)
    qkv_out = sum(4 * (c + 3 * c) + 4 * 2 * c for c in joint + 2 * apart)
    assert count("simda", 32) == simda < 0.05 * (whole + simda) and count("lora", 4, layers=("qkv", ".out")) == qkv_out
    assert qkv_out < count("lora", 4) < 0.055 * (whole + count("lora", 4))


def test_trainable():
    """Each part alone: a step of all optimisers leaves the others bit for bit, without gradient or state."""
    config = vdm.dataclasses.replace(SMALL, channels=3, batch=2, width=16, adapters="lora", rank=2, actions=(2,), drop=0.0)
    data = [dict(video=vdm.MovingShapes(3, (8, 8))[i]["video"], action=torch.randn(3, 2)) for i in range(4)]
    denoiser = randomize(vdm.build(config), gates=True)
    assert {vdm.part_of(name) for name, _ in denoiser.named_parameters()} == {"spatial", "temporal", "lora", "actions"}
    for parts in (("lora",), ("temporal",), ("actions", "lora"), ("spatial",)):
        vdm.trainable(denoiser, parts)
        before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
        optimizers = train.make_optimizers(config, denoiser.net)
        ema = vdm.EMA(denoiser)
        for step in range(2):
            train.train_step(step, config, data * 2, denoiser, ema, optimizers, torch.device("cpu"), torch.float32, 0)
        states = {p for o in optimizers for p in o.state}
        for model in (denoiser, ema.model):
            moved = {vdm.part_of(name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
            assert moved == set(parts)
        for name, p in denoiser.named_parameters():
            assert (p in states) == p.requires_grad == (vdm.part_of(name) in parts) and p.grad is None
    for parts in (("adapters",), ()):
        with pytest.raises(ValueError, match="the parts of this model are actions, all, lora, spatial, temporal: lora and adapters come with --adapters"):
            vdm.trainable(denoiser, parts)
    for wrong in (dict(kind="dora"), dict(rank=0)):
        with pytest.raises(ValueError, match="expected lora or simda, 1 or more"):
            vdm.adapt(denoiser, **wrong)


# ---- EMA and checkpoints -------------------------------------------------------------------------

@cases("decay", [0.9999, 0.5])
def test_ema(decay):
    """From 1 towards 0 it is the product of its decays, min(decay, (1 + n) / (10 + n))."""
    model, product = nn.BatchNorm1d(1), 1.0
    ema = vdm.EMA(model, decay)                                        # its weight starts at 1
    nn.init.zeros_(model.weight)
    for n in range(1, 1001):
        product *= min(decay, (1 + n) / (10 + n))
        model.running_mean.fill_(n)
        ema.update(model)
        if n in (1, 9, 40, 1000):
            assert ema.model.weight.item() == pytest.approx(product, rel=1e-3, abs=1e-38)
            assert ema.model.running_mean.item() == n                  # buffers are copied
    if decay > 0.9:                                                    # that is 10! 1001! / 1010!
        log_product = math.lgamma(11) + math.lgamma(1002) - math.lgamma(1011)
        assert math.log(ema.model.weight.item()) == pytest.approx(log_product, abs=1e-3)


def test_ema_of_bfloat16_weights():
    """Moves of 2^-7 / 1000 from 1, which bfloat16 cannot hold, add up to 1 - 0.999^10 of 2^-7."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    ema = vdm.EMA(model, 0.999)
    ema.updates = 10 ** 6                                              # past the warm-up
    nn.init.constant_(model.weight, 1 + 2 ** -7)
    for _ in range(10):
        ema.update(model)
    assert ema.model.weight.dtype == torch.float32
    assert ema.model.weight.item() - 1 == pytest.approx((1 - 0.999 ** 10) * 2 ** -7, rel=0.01)


SMALL = vdm.Config(size=(8, 8), frames=3, width=8, head_dim=8, patch=2, channels=1, context=(1.0,), motion=False)


def checkpoint(path, **changes):
    denoiser, fields = randomize(vdm.build(SMALL), gates=True), vdm.dataclasses.asdict(SMALL)
    vdm.save(path, config=dict(fields, **changes), ema=denoiser.state_dict(), step=7)
    return denoiser


def test_save_and_load(tmp_path):
    """The same weights, the same answer."""
    path, x = tmp_path / "new" / "a.pt", torch.randn(1, 3, 1, 8, 8)
    denoiser = checkpoint(path)
    loaded, config = vdm.load(path)
    denoiser.requires_grad_(False)                                         # a gradient may change how sums are rounded
    assert torch.equal(loaded(x, torch.ones(1)), denoiser(x, torch.ones(1))) and config == SMALL
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert vdm.read_checkpoint(path)[0]["step"] == 7


def test_bad_checkpoints_are_refused(tmp_path):
    """Missing, truncated, of other sizes, with an unknown field: the message names the file."""
    path = tmp_path / "a.pt"
    checkpoint(path)
    whole = path.read_bytes()
    lengths = 0, 9, len(whole) // 2, len(whole) - 9
    damage = [path.unlink] + [partial(path.write_bytes, whole[:n]) for n in lengths]
    changes = dict(width=16), dict(blocks=2), dict(previous=True), dict(no_such_field=1)
    for do in damage + [partial(checkpoint, path, **change) for change in changes]:
        do()
        with pytest.raises(ValueError, match="a.pt"):
            vdm.load(path)
    checkpoint(path)
    state = torch.load(path, weights_only=True)
    del state["config"]["temporal_guidance"]                            # of a version without it: no default is filled in
    vdm.save(path, **state)
    with pytest.raises(ValueError, match="a.pt .* of another version.*has no temporal_guidance"):
        vdm.load(path)


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.filterwarnings("ignore")
@cases("zipped", [True, False])
def test_code_in_a_checkpoint_never_runs(tmp_path, zipped):
    """A pickle that makes a folder when it is read: refused, and there is no folder."""
    path, marker = tmp_path / "a.pt", tmp_path / "marker"
    state = dict(config=vdm.dataclasses.asdict(SMALL), ema={}, extra=Attack(str(marker)))
    torch.save(state, path) if zipped else path.write_bytes(pickle.dumps(state))
    with pytest.raises(ValueError, match="code"):
        vdm.load(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if zipped else pickle.loads(path.read_bytes())
    assert marker.exists()                                             # so it was a real one


@cases("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos")])
def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch, error):
    """The bytes of the old file, and nothing beside it."""
    path = tmp_path / "a.pt"
    checkpoint(path)
    before = path.read_bytes()

    def fail(state, f):
        f.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="a.pt"):
        vdm.save(path, step=8)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


@cases("flags, words", [
    ("--context 0", r"--context is \(0.0,\): expected odds"),
    ("--frames 3", "--context is .*: expected odds of 0, 1, 2 ... given frames, of which a window of 3 has room for 2"),
    ("--task any --previous", "3 --frames or more, odds in --context, .* that some are given, and no --previous"),
    ("--task ends --frames 2 --context 1 1 --overlap 1", "3 --frames or more"), ("--task any --context 1", "that some are given"),
    ("--task image", "--context-noise above 0"),
    ("--task upsample --context-noise 0.1 --give per_frame", "--task is upsample: it needs --give concat"),
    ("--task upsample --context-noise 0.1 --size 6 8", "needs multiples of 4"),
    ("--independent 0.2", "--independent does nothing here: it needs --give per_frame"),
    ("--give replace --context-noise 0.1", "--give replace needs --context-noise 0"),
    ("--context 1 --context-noise 0.1", "without single given frames"), ("--context 1 --give replace", "without single given frames"),
    ("--previous --give per_frame", "without single given frames"),
    ("--previous --give per_frame --independent 0.2", "without single given frames"),
    ("--dynamics-toy", "--dynamics-toy does nothing here: it needs --dynamics above 0"),
    ("--data drive --actions 2 2 1 --mode-drop 0.1 0.2", r"--mode-drop is \(0.1, 0.2\): expected one .* \(2, 2, 1\), or one")])
def test_settings_that_do_not_go_together_are_refused(flags, words):
    options, config = train.parse(flags.split())
    with pytest.raises(ValueError, match=words):
        train.check(options, config)
        train.open_data(options, config)                               # which tells what the modes of actions are


@cases("flags", ["--give per_frame --independent 1 --context 1", "--data drive --mode-drop 0.1 0.2",
                 "--preset latent --stage autoencoder --frames 2 --overlap 1"])
def test_settings_that_go_together(flags):
    """Diffusion forcing; each mode at its own rate; an autoencoder, which is given no frames."""
    options, config = train.parse(flags.split())
    train.check(options, config)
    train.open_data(options, config)


@cases("name", ["kind", "weighting", "schedule", "sampler", "task", "give", "feed_forward", "adapters"])
def test_build_refuses_unknown_names(name):
    with pytest.raises(ValueError, match=f"{name} is 'all'.* expected "):
        vdm.build(vdm.Config(**{name: "all"}))


def test_build_names_the_nearest_size():
    """Patches of 2 and two halvings: multiples of 8; the nearest by trying all up to 120."""
    def refusal(*size):
        try:
            vdm.build(vdm.Config(size=size, width=8, head_dim=8))
        except ValueError as error:
            return str(error)

    good = [n for n in range(1, 121) if not refusal(n, n)]
    assert good == list(range(8, 121, 8))
    for size in ((30, 32), (33, 50), (3, 100), (28, 28)):
        named = map(int, re.search(r"--size (\d+) (\d+)", refusal(*size)).groups())
        for n, got in zip(size, named):
            assert got in good and abs(got - n) == min(abs(g - n) for g in good)


# ---- autoencoder ---------------------------------------------------------------------------------

def autoencoder(gates=True, **options):
    return randomize(vdm.Autoencoder(**dict(channels=2, latent=3, width=16, factor=4) | options), gates)


def test_latents_are_normalised_and_back():
    """Per channel mean 0 and std 1 over what was measured, by numpy; and decode undoes exactly that."""
    model, clips = autoencoder(), torch.randn(5, 4, 2, 16, 8) + 0.3
    model.measure(clips[i:i + 1] for i in range(5))
    latents = model.encode(clips)
    flat = latents.detach().numpy().transpose(2, 0, 1, 3, 4).reshape(3, -1)
    close(flat.mean(1), np.zeros(3, np.float32), atol=1e-5, rtol=0)
    close(flat.std(1, ddof=1), np.ones(3, np.float32), atol=1e-5, rtol=0)
    raw = model.posterior(clips)[0]
    assert latents.shape == raw.shape == (5, 4, 3, 4, 2) and not torch.allclose(latents, raw, atol=0.1)
    close(model.decode(latents), model.render(raw), atol=1e-4, rtol=1e-4)


@cases("factor", [2, 4, 8, 16])
def test_factors_of_an_autoencoder(factor):
    """One place of the latents for factor x factor pixels; and their size does not depend on the width."""
    model, clip = autoencoder(factor=factor), torch.randn(1, 2, 2, 32, 16)
    assert model.encode(clip).shape == (1, 2, 3, 32 // factor, 16 // factor) and model.decode(model.encode(clip)).shape == clip.shape


def test_a_fresh_decoder_works_frame_by_frame():
    """Gates at 0: a clip decodes as its frames do alone, bit for bit. Gates open: it does not; temporal 0 shuts them."""
    latents = torch.randn(2, 5, 3, 4, 4)

    def alone(model, **options):
        return torch.cat([model.decode(latents[:, t:t + 1], **options) for t in range(5)], 1)

    model = autoencoder(gates=False)
    assert torch.equal(model.decode(latents), alone(model)) and model.decode(latents).std() > 0.1
    model = autoencoder(gates=True)
    assert not torch.allclose(model.decode(latents), alone(model), atol=1e-2)
    assert torch.equal(model.decode(latents, temporal=0.0), alone(model, temporal=0.0))


@cases("factor", [2, 4, 8])
def test_chunks_decode_as_the_whole_clip(factor, double):
    """Equal to all at once, edges of chunks included; with one frame less around each chunk it is not."""
    model, latents = autoencoder(factor=factor), torch.randn(1, 23, 3, 2, 2)
    whole = model.decode(latents, chunk=99)
    for chunk in (1, 4, 16, 22, 23):
        close(model.decode(latents, chunk), whole, atol=1e-10, rtol=1e-10)
    pieces = list(model.stream(iter(latents.split([1, 2, 9, 3, 8], 1))))       # of any lengths, as they come
    close(torch.cat(pieces, 1), whole, atol=1e-10, rtol=1e-10)
    assert len(pieces) > 2 and max(p.shape[1] for p in pieces) < 23
    model.reach -= 1
    assert (model.decode(latents, 4) - whole).abs().max() > 1e-6


def test_autoencoder_loss(double):
    """KL by torch.distributions; the reconstruction by hand: what is drawn from the posterior, decoded, less the clip."""
    model, clip = autoencoder(), torch.randn(2, 3, 2, 8, 8)
    mean, log_var = model.posterior(clip)
    noise, normal = torch.randn_like(mean), torch.distributions.Normal
    total, parts = vdm.ae_loss(model, clip, noise, kl=0.3, temporal=1.0)
    kl = torch.distributions.kl_divergence(normal(mean, (log_var / 2).exp()), normal(0.0, 1.0)).mean()
    error = model.render(normal(mean, (log_var / 2).exp()).loc + log_var.exp() ** 0.5 * noise) - clip
    close(parts["kl"], kl)
    close(parts["reconstruction"], (error.abs() + error ** 2).mean())
    close(total, (error.abs() + error ** 2).mean() + 0.3 * kl)
    total.backward()
    assert model.encoder[1].weight.grad.abs().max() > 0 and not any(x.requires_grad for x in parts.values())


def test_psnr_and_flicker():
    """An error of 0.02 everywhere: 40 dB of a range of 2, and no flicker; if it changes sign each frame, 0.04 of it."""
    real = torch.rand(2, 6, 3, 4, 4)
    sign = torch.tensor([1, -1, 1, -1, 1, -1]).view(6, 1, 1, 1)
    assert train.psnr(real + 0.02, real) == pytest.approx(40, abs=1e-3) == train.psnr(real + 0.02 * sign, real)
    assert train.flicker(real + 0.02, real) == pytest.approx(0, abs=1e-6)
    assert train.flicker(real + 0.02 * sign, real) == pytest.approx(0.04, rel=1e-3)


def test_variances_of_latents_stay_finite():
    """An encoder that runs away in its first steps still has a loss."""
    model, x = autoencoder(), torch.randn(1, 2, 2, 16, 16)
    model.encoder[-1].bias.data[len(model.encoder[-1].bias) // 2 :] = 1000
    assert model.posterior(x)[1].max() == 20
    z = torch.zeros_like(model.posterior(x)[0])
    assert all(part.isfinite() for part in (vdm.ae_loss(model, x, z)[0], *vdm.ae_loss(model, x, z)[1].values()))


# ---- MovingShapes --------------------------------------------------------------------------------

WORLDS = [(frames, objects) for frames in (8, 32) for objects in (1, 2)]


class Watched(vdm.MovingShapes):
    """The same world, which notes the speeds and kinds it draws."""

    def bounce(self, x, low, high):
        self.__dict__.setdefault("speeds", []).append(np.hypot(*(x[1] - x[0])) / min(self.size))
        return vdm.MovingShapes.bounce(x, low, high)

    def draw(self, kind, *args):
        self.__dict__.setdefault("kinds", []).append(int(kind))
        return vdm.MovingShapes.draw(kind, *args)


@pytest.fixture(scope="module")
def worlds():
    made = {key: Watched(key[0], objects=key[1], seed=3) for key in WORLDS}
    return {key: (w, torch.stack([w[i]["video"] for i in range(256)])) for key, w in made.items()}


def check(key, clips):
    return vdm.MovingShapes(key[0], objects=key[1]).check(clips)


@cases("key", WORLDS)
def test_real_clips_pass(worlds, key):
    """Clips of the world itself; the speeds and kinds that were drawn; the channels that shine."""
    world, clips = worlds[key]
    got = check(key, clips)
    assert got["passed"].mean() >= 0.99
    speeds, kinds = (np.sort(np.reshape(a, (256, -1)), 1) for a in (world.speeds, world.kinds))
    ratio = np.sort(got["speeds"], 1) / speeds
    assert (np.abs(ratio - 1) < 0.05).mean() > 0.9 and abs(np.median(ratio) - 1) < 0.01
    assert (np.sort(got["kinds"], 1) == kinds).mean() > 0.98
    lit = (clips.amax((1, 3, 4)) > 0).numpy()                          # (256, 3)
    palette = np.array([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1)])
    assert (palette[got["colors"]].any(1) == lit).all()


def broken(clips, how):
    """Clips that break a law by construction; of two shapes one is made to vanish."""
    T, bad = clips.shape[1], clips.clone()
    one = F.one_hot(clips.mean((1, 3, 4)).argmax(1), 3).bool()[:, None, :, None, None]
    late, blink = clips[:, T // 2 :], slice(T // 3, T // 3 + 1)
    bad[:, T // 2 :] = dict(recoloured=late.roll(1, 2), gone=torch.where(one, -1, late),
                            cut=clips.roll(1, 0)[:, T // 2 :]).get(how, late)
    if how == "blinks":
        bad[:, blink] = torch.where(one, -1, bad[:, blink])
    return dict(shuffled=torch.stack([c[torch.randperm(T)] for c in clips]),
                black=-torch.ones_like(bad), noise=torch.rand_like(bad) * 2 - 1).get(how, bad)


@cases("key", WORLDS)
@cases("how", ["shuffled", "recoloured", "gone", "blinks", "cut", "black", "noise"])
def test_broken_clips_fail(worlds, key, how):
    """Each is wrong by construction, and at most 5 % may pass for right."""
    assert check(key, broken(worlds[key][1][:40], how))["passed"].mean() <= 0.05


class Wrong(vdm.MovingShapes):
    """The same world with one law changed, from frame to frame t."""

    def bounce(self, x, low, high):
        t, step = np.arange(len(x))[:, None], x[1] - x[0]
        self.fast = np.hypot(*step) > 0.068 * min(self.size)
        x = dict(moving=x[0] + 0 * t, speed=x[0] + step * (t - 0.02 * t ** 2)).get(self.law, x)
        zigzag = (self.law == "path") * 4.0                            # that stays between the walls
        return vdm.MovingShapes.bounce(x, low, high - zigzag) + zigzag * (t % 2)

    def draw(self, kind, r, *args):
        r = r * (1 - 0.25 * (np.arange(self.frames) == 5)) if self.law == "size" else r
        hole = vdm.MovingShapes.draw(kind, 0.6 * r, *args) if self.law == "shape" else 0
        return vdm.MovingShapes.draw(kind, r, *args) - hole


@cases("law", ["shape", "color", "size", "path", "speed", "moving"])
def test_each_law_alone(law):
    """Hollow shapes; a change of colour; of size in one frame; a zigzag; slowing down; standing."""
    world = Wrong(24, seed=7)
    world.law, clips = law, []
    for i in range(200 if law == "speed" else 40):                     # only fast ones slow down by
        clip = world[i]["video"]                                       # more than check forgives
        clips += [clip] if world.fast or law != "speed" else []
    clips = torch.stack(clips)
    if law == "color":
        clips[:, 8:] = clips[:, 8:].roll(1, 2)
    got = check((24, 1), clips)
    laws = {name: ok.mean() for name, ok in got.items() if ok.dtype == bool}
    assert laws.pop("passed") <= 0.05 and laws.pop(law) <= 0.05
    entailed = dict(path=("speed", "moving"), speed=("moving",)).get(law, ())   # a zigzag has no speed
    assert all(share >= 0.95 for name, share in laws.items() if name not in entailed)


def test_a_third_shape_is_not_overlooked(worlds):
    """Two objects in two channels, and a copy of one of them in the third."""
    clips = worlds[8, 2][1][:40].clone()
    dark, bright = (clips.mean((1, 3, 4)).argsort(1)[:, i] for i in (0, 2))
    clips[range(40), :, dark] = clips[range(40), :, bright]
    assert not check((8, 2), clips)["shape"].any()


def test_draw_covers_the_pixels():
    """The share of 20 x 20 points in each pixel that lie in the shape, by its definition."""
    r, cy, cx = 9.3, 15.2, 17.9
    y, x = (np.indices((32 * 20, 36 * 20)) + 0.5) / 20 - np.array([cy, cx])[:, None, None]
    disc, square = np.hypot(x, y) < r, np.maximum(abs(x), abs(y)) < r
    triangle = (abs(y) < r) & (abs(x) < (y + r) / 2)
    for kind, points in enumerate((disc, square, triangle)):
        share = points.reshape(32, 20, 36, 20).mean((1, 3))
        error = np.abs(vdm.MovingShapes.draw(kind, r, cy, cx, (32, 36)) - share)
        edge = (share > 0) & (share < 1)
        assert error[~edge].max() < 0.05 and error[edge].mean() < 0.08


def test_bounce_is_a_ball_between_walls():
    """A ball moved in small steps, which turns round at either wall."""
    for low, high, start, velocity in ((2.0, 9.0, 3.0, 1.7), (5.0, 27.0, 20.0, -3.1)):
        path, y, v = [], start, velocity
        for i in range(8000):
            path += [y] if i % 500 == 0 else []
            y += v / 500
            v = abs(v) if y < low else -abs(v) if y > high else v
        got = vdm.MovingShapes.bounce(start + velocity * np.arange(16), low, high)
        np.testing.assert_allclose(got, path, atol=0.05)


def test_labels_name_kind_and_colour(worlds):
    """As check, which knows no labels, sees them: 6 times the kind, plus the colour."""
    got, world = check((8, 1), worlds[8, 1][1]), vdm.MovingShapes(8, seed=3)
    labels = np.array([world[i]["label"] for i in range(256)])
    assert (labels == 6 * got["kinds"][:, 0] + got["colors"][:, 0]).mean() > 0.98
    assert set(labels) == set(range(world.labels)) and "label" not in vdm.MovingShapes(objects=2)[0]


def drawn(T=8, r=7.0, y=16.0, x=16.0, color=(1, 0, 0), size=(32, 32), kind=0):
    """A clip of one shape; r, y and x may be one per frame."""
    r, y, x = (np.broadcast_to(a, T).astype(float) for a in (r, y, x))
    shape = vdm.MovingShapes.draw(kind, r, y, x, size)                                         # (T, H, W)
    return torch.tensor(shape[:, None] * np.reshape(color, (-1, 3, 1, 1)) * 2 - 1).float()


@cases("law, keeps, breaks", [
    ("size", dict(r=[7] * 7 + [7.6]), dict(r=[7] * 7 + [8.05])),       # by 9 and 15 % in one frame: 12
    ("color", dict(color=[(1, 0, 0)] * 7 + [(1, 0.2, 0)]), dict(color=[(1, 0, 0)] * 7 + [(1, 0.3, 0)])),      # 0.25
    ("path", dict(y=[16] * 4 + [18.6] + [16] * 3), dict(y=[16] * 4 + [19.4] + [16] * 3)),    # the line goes between: 1.3, 1.7 pixels
    ("speed", dict(T=24, r=4.5, x=5 + np.cumsum([0.5] * 16 + [0.98] * 8)),                   # 0.02 of 32 pixels a frame
     dict(T=24, r=4.5, x=5 + np.cumsum([0.5] * 16 + [1.3] * 8))),
    ("shape", dict(hole=5), dict(hole=7)), ("moving", dict(slow=0.6), dict(slow=0.4))])        # intersection / union 0.81, 0.68
def test_how_far_a_law_is_forgiving(law, keeps, breaks):
    """A little less than each threshold, and a little more."""
    for told, kept in ((keeps, True), (breaks, False)):
        told = dict(told)
        hole, slow = told.pop("hole", 0), told.pop("slow", 1.0)
        T = told.get("T", 8)
        told.setdefault("x", 11 + slow * 0.96 * np.arange(T))                                  # 0.03 of 32
        clip = drawn(**told)
        clip[3, 0, 13 : 13 + hole, 11 : 11 + hole + (hole == 5)] = -1
        got = vdm.MovingShapes(T).check(clip[None])
        assert bool(got[law][0]) == kept, got


def test_a_world_that_is_no_square():
    """Sizes and speeds are shares of the shorter side; real clips keep all laws."""
    for size in ((24, 64), (64, 24)):
        world = vdm.MovingShapes(16, size, seed=3)
        clips = torch.stack([world[i]["video"] for i in range(48)])
        got = world.check(clips)
        assert got["passed"].mean() >= 0.95
        covered = (clips.amax(2) > 0).sum((2, 3)).float().mean(1) ** 0.5                       # a square's side, at most
        assert 0.18 * 24 < covered.min() and covered.max() < 1.1 * 2 * 0.25 * 24


def test_distance_from_the_world():
    """Red discs alone: of six colours five are missing, of three kinds two: 5/6 and 2/3 of the mass would have to move."""
    clips = torch.stack([drawn(x=11 + v * np.arange(8)) for v in np.linspace(0.97, 1.2, 16)])
    told = dict(re.findall(r"mismatch of (\w+) +(\S+)", train.report(vdm.MovingShapes(), clips)))
    assert (told["colors"], told["kinds"]) == ("0.83", "0.67")


def test_what_stops_half_way_is_not_moving():
    clip = drawn(24, x=11 + 0.96 * np.minimum(np.arange(24), 9))
    assert not vdm.MovingShapes(24).check(clip[None])["moving"][0]


# ---- Drive ---------------------------------------------------------------------------------------

COMMANDS = dict(L=(-0.5 ** 0.5, -0.5 ** 0.5), S=(-1, 0), R=(-0.5 ** 0.5, 0.5 ** 0.5), X=(0, 0))


def drives(n, *args, **options):
    items = [vdm.Drive(*args, **options)[i] for i in range(n)]
    return (torch.stack([item[key] for item in items]) for key in ("video", "action"))


def test_drive_actions():
    """One-hot and motion by hand; each next command stays for 0.7 of times, or is any other."""
    for k, letter in enumerate(vdm.Drive.KEYS):
        want = [float(j == k) for j in range(4)] + list(COMMANDS[letter])
        np.testing.assert_allclose(vdm.Drive.ACTIONS[k], want, rtol=1e-6)
    action = vdm.Drive(20_000, (1, 1), seed=1)[0]["action"]
    command = action[:, :4].argmax(1).numpy()
    assert np.array_equal(action, vdm.Drive.ACTIONS[command])
    pairs = np.histogram2d(command[:-1], command[1:], 4)[0]
    odds = pairs / pairs.sum(1, keepdims=True)
    assert np.abs(odds - (0.7 * np.eye(4) + 0.1 * (1 - np.eye(4)))).max() < 0.02
    first = [vdm.Drive(1, (1, 1))[i]["action"][0, :4].argmax().item() for i in range(800)]
    assert np.abs(np.bincount(first) / 800 - 0.25).max() < 0.06


@cases("size", [(32, 32), (32, 48)])
def test_drive_moves_as_its_actions_say(size):
    """A frame is the one before, seen from action * 2 pixels further on: by torch's bicubic."""
    video, action = drives(16, 8, size, seed=2)
    assert video.shape == (16, 8, 3, *size) and video.abs().max() <= 1 and 0.5 < video.std() < 0.8
    def moved(sign):
        shift = 2 * sign * action[:, 1:, 4:].reshape(-1, 2)                                 # pixels
        theta = torch.eye(2, 3).repeat(len(shift), 1, 1)
        theta[:, :, 2] = shift.flip(1) * 2 / torch.tensor([size[1], size[0]])         # (x, y) in -1, 1
        old = video[:, :-1].flatten(0, 1)
        grid = F.affine_grid(theta, old.shape, align_corners=False)
        seen = F.grid_sample(old, grid, "bicubic", align_corners=False)
        return (seen - video[:, 1:].flatten(0, 1))[..., 4:-4, 4:-4].abs().mean((1, 2, 3))
    still = action[:, 1:, 3].flatten() == 1
    assert moved(1).max() < 0.01 and moved(-1)[still].max() < 1e-5 and moved(-1)[~still].min() > 0.1


def test_drive_depends_on_seed_and_index_only():
    world = vdm.Drive(4, (8, 8), seed=1)
    world[3]
    again, others = vdm.Drive(4, (8, 8), seed=1)[7], (world[8], vdm.Drive(4, (8, 8), seed=2)[7])
    assert all(torch.equal(world[7][k], again[k]) for k in again) and again.keys() == {"video", "action"}
    assert not any(torch.equal(world[7]["video"], other["video"]) for other in others)


@cases("size", [(32, 32), (16, 16), (24, 64)])
def test_drive_check_knows_right_from_wrong(size):
    """Clips as they are, and with a little noise; then such as are wrong by construction."""
    world = vdm.Drive(8, size)
    clips, action = drives(64, 8, size, seed=5)
    commands = action[:, 1:, :4].argmax(2).numpy()
    for good in (clips, clips + 0.1 * torch.randn(clips.shape)):
        got = world.check(good, action)
        assert got["obeys"].mean() >= 0.99 and (got["commands"] == commands)[got["obeys"]].all()
        assert np.array_equal(got["passed"], got["obeys"].all(1))
    other = torch.cat([action[..., :4].roll(1, 2), action[..., 4:]], 2)
    assert world.check(clips, other)["obeys"].mean() <= 0.01
    slow = vdm.Drive(8, size, seed=5)
    slow.speed /= 2
    slow = torch.stack([slow[i]["video"] for i in range(64)])
    scenes = torch.stack([clips.roll(t, 0)[:, t] for t in range(8)], 1)    # each frame of another clip
    noise, black, faint = torch.rand(clips.shape) * 2 - 1, -torch.ones(clips.shape), 0.02 * clips
    for bad in (noise, black, faint, scenes):
        assert world.check(bad)["obeys"].mean() <= 0.05
    for bad in (slow, clips.flip(3)):                                  # half as fast, or backwards
        assert world.check(bad)["obeys"][commands < 3].mean() <= 0.05
    frozen, mirrored = clips[:, :1].expand_as(clips), clips.flip(4)
    assert (world.check(frozen)["commands"] == 3).all()
    assert (world.check(mirrored)["commands"] == np.array([2, 1, 0, 3])[commands]).mean() >= 0.99


def test_drive_report():
    """Every third clip is noise: so two thirds obey, and the shares of commands are those of the rest."""
    clips, action = drives(60, 6, (16, 16), seed=9)
    clips[::3] = torch.randn(clips[::3].shape)
    told = train.report(vdm.Drive(6, (16, 16)), clips, action)
    rows = dict(re.findall(r"^ *(\S.*?)  +(\d+)% ", told, re.M))
    assert re.search("clips that obey +67% +100%", told) and rows["frames that obey"] == "67"
    left = action[:, 1:, 0][torch.arange(60) % 3 > 0].sum() / (60 * 5)
    assert abs(float(rows["left"]) - 100 * left) <= 1 and "made   real" in told


def test_how_far_drive_is_forgiving():
    """Motion may be off by 0.3 of the speed; two thirds of the picture must be explained by it: independent noise of variance n v
    changes neighbouring frames by 2 n v of (1 + n) v, a third of it where n is 0.2."""
    clips, action = drives(64, 8, (32, 32), seed=5)
    moves = action[:, 1:, :4].argmax(2).numpy() < 3
    for factor, share in ((0.8, 0.9), (0.62, 0.1)):
        world = vdm.Drive(8, (32, 32), seed=5)
        world.speed *= factor
        obeys = vdm.Drive(8).check(torch.stack([world[i]["video"] for i in range(64)]), action)["obeys"][moves].mean()
        assert (obeys > share) == (share > 0.5), obeys
    v = clips.var((3, 4), keepdim=True)                                                        # (64, 8, 3, 1, 1)
    for n, share in ((0.1, 0.9), (0.35, 0.1)):
        obeys = vdm.Drive(8).check(clips + (n * v).sqrt() * torch.randn(clips.shape), action)["obeys"].mean()
        assert (obeys > share) == (share > 0.5), obeys


# ---- the file ------------------------------------------------------------------------------------

SOURCE = Path(vdm.__file__).read_text()
TREE = ast.parse(SOURCE)
IMPORTS = [n for n in TREE.body if isinstance(n, (ast.Import, ast.ImportFrom))]
DEFINED = {n.name: n for n in TREE.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
CONSTANTS = {t.id: n for n in TREE.body if isinstance(n, ast.Assign) for t in n.targets}


def looked_up(code):
    """The global names that compiled code looks up, with all the code inside it."""
    yield from (i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    for inner in code.co_consts:
        yield from looked_up(inner) if isinstance(inner, types.CodeType) else ()


def pasted(name):
    """The definitions and constants that must be pasted along with one, itself included."""
    everything, need, todo = DEFINED | CONSTANTS, set(), {name}
    while todo:
        need |= todo
        named = set()
        for node in (everything[k] for k in todo):
            uses = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            own = {n.id for n in uses if isinstance(n.ctx, ast.Store)}
            own |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
            named |= {n.id for n in uses} - own
        todo = (named & everything.keys()) - need
    return need


def lines_of(name):
    node = (DEFINED | CONSTANTS)[name]
    return node.end_lineno - min(n.lineno for n in (node, *getattr(node, "decorator_list", []))) + 1


@cases("name", DEFINED)
def test_paste(name, monkeypatch):
    """A definition, with no more than what it names, executes in an empty namespace."""
    nodes = {(DEFINED | CONSTANTS)[k] for k in pasted(name)}
    body = IMPORTS + [n for n in TREE.body if n in nodes]
    code, space = compile(ast.Module(body, []), "pasted", "exec"), {"__name__": "pasted"}
    monkeypatch.setitem(sys.modules, "pasted", types.ModuleType("pasted"))   # for dataclasses
    exec(code, space)
    assert not {n for n in looked_up(code) if n not in space and not hasattr(builtins, n)}


def test_import_is_light():
    """Python's list of modules: torch, numpy and einops; nothing that reads or writes video."""
    code = "import sys, torch, numpy, einops; before = set(sys.modules); import vdm; " \
           "print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(vdm.__file__).parent,
                         capture_output=True, text=True, check=True)
    new = {m.split(".")[0] for m in run.stdout.split()} - set(sys.stdlib_module_names)
    assert "vdm" in new and new <= {"vdm", "torch", "numpy", "einops"}


def test_map_matches_the_banners():
    """Section by section: the map of the docstring, and the banners further down."""
    chart = re.findall(r"^(?:Map)? +(\d+) (\w.*?)  ", ast.get_docstring(TREE), re.M)
    banners = re.findall(r"^# =+\n# (\d+)\. (.*)\n# =+$", SOURCE, re.M)
    numbers = [f"{i + 1}" for i in range(len(chart))]
    assert [n for n, _ in chart] == [n for n, _ in banners] == numbers and chart
    for (_, word), (_, title) in zip(chart, banners):
        assert word.lower() in title.lower(), (word, title)


def test_the_file_stays_short():
    """At most 1,819 lines of at most 100 columns, read in an evening."""
    lines = SOURCE.splitlines()
    assert len(lines) <= 1819
    assert not [i + 1 for i, line in enumerate(lines) if len(line) > 100]


# ---- video files ----------------------------------------------------------------------------------

MERGED = [0, 1, 2, 3, 3, 3, 4, 4, 5, 6, 7, 8, 9, 10, 10, 10]  # GIF stores 11 frames of these 16
NOISE = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3)).astype(np.uint8)


def flat(T, H=32, W=32, C=3):
    return np.tile(np.arange(T, dtype=np.uint8)[:, None, None, None] * 8, (1, H, W, C))


def brightness(frames):  # uint8 (T, H, W, C) -> the t of each frame of flat(), read off its centre
    return np.round(frames[:, frames.shape[1] // 2, frames.shape[2] // 2, 0] / 8).tolist()


def save(path, frames, **options):
    if path.suffix in (".gif", ".webp"):
        frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True, **options)
    else:
        iio.imwrite(path, frames, plugin="FFMPEG", macro_block_size=2, **options)


@pytest.fixture
def folder(tmp_path):
    for name in ("a/b", "frames", "few", ".hidden", "empty"):
        (tmp_path / name).mkdir(parents=True)
    save(tmp_path / "UP.MP4", flat(20), fps=10)
    save(tmp_path / "a/b/odd.mkv", flat(16, 46, 62), fps=20)
    save(tmp_path / "mute.mp4", NOISE, fps=10)
    sound = [imageio_ffmpeg.get_ffmpeg_exe(), *"-v error -f lavfi -i sine=d=9 -i".split()]
    for name in ("a/long.mp4", "a/long.mkv"):  # 4 s of pictures, 9 s of sound; the header is first
        subprocess.run([*sound, tmp_path / "mute.mp4", "-movflags", "faststart", tmp_path / name])
        data = (tmp_path / name).read_bytes()
        (tmp_path / name.replace("long", "cut")).write_bytes(data[: len(data) // 3])
    rgb = [Image.fromarray(f) for f in flat(16, 31, 45)]
    save(tmp_path / "grey.gif", [p.convert("L") for p in rgb], duration=100)
    save(tmp_path / "nine.gif", rgb[:9], duration=100)
    save(tmp_path / "merged.gif", [rgb[t] for t in MERGED], duration=40)
    clear = np.concatenate([flat(16, 31, 45), np.full((16, 31, 45, 1), 255, np.uint8)], axis=3)
    clear[:, :8] = 255, 255, 255, 0  # white, but transparent: shows black
    save(tmp_path / "rgba.gif", [Image.fromarray(f) for f in clear], duration=100)
    save(tmp_path / "moves.webp", rgb, duration=50)
    for t, picture in enumerate(rgb):
        picture.save(tmp_path / f"frames/frame{t + 1}.{['png', 'tif', 'bmp'][t % 3]}")
    rgb[2].save(tmp_path / "few/2.JPG")
    np.save(tmp_path / "five.npy", np.stack([flat(16)] * 3))
    np.save(tmp_path / "grey.npy", flat(17)[..., 0])
    for name in ("notes.txt", ".hidden/x.mp4", "bad.mp4", "zero.avi"):
        (tmp_path / name).write_text("" if name == "zero.avi" else "x")
    return tmp_path


def test_folder_report_and_pixels(folder):
    data = vdm.VideoFolder(folder, frames=16, size=(24, 24))
    for line in (f"data: 19 files in {folder} -> 14 clips used, 7 skipped, 24x24 crop, 3 channels, 10 fps\n",
                 f"skipped {folder / 'few'}: 1 frames are too few, an item takes 16: lower --frames or --stride\n",
                 "nine.gif: 9 frames are too few, an item takes 16: lower --frames or --stride\n",
                 f"skipped {folder / 'notes.txt'}: cannot identify image file", "cut.mp4: ffmpeg ",
                 "cut.mkv: ffmpeg cannot read all: ", "bad.mp4: ffmpeg ", "zero.avi: ffmpeg "):
        assert line in data.report + "\n", data.report
    grey = [clip for clip in data.clips if (clip == clip[..., :1]).all()]          # not the noise
    assert sorted(map(brightness, grey)) == sorted(
        [list(range(n)) for n in (16,) * 8 + (17, 20)] + [MERGED])
    strides = pytest.raises(ValueError, vdm.VideoFolder, folder / "grey.npy", 8, (24, 24), stride=3)
    strides.match("grey.npy: 17 frames are too few, an item takes 22: lower --frames or --stride")


def test_read(folder):
    for name, shape, rate in (("a/b/odd.mkv", (16, 46, 62), 20), ("merged.gif", (16, 31, 45), 25),
                              ("moves.webp", (16, 31, 45), 20), ("few/2.JPG", (1, 31, 45), 8),
                              ("a/long.mp4", (40, 64, 64), 10), ("a/long.mkv", (40, 64, 64), 10)):
        (frames,), fps = vdm.decode(folder / name)
        assert (frames.shape, fps, frames.dtype) == ((*shape, 3), rate, np.uint8)
    assert (vdm.decode(folder / "rgba.gif")[0][0][:, :8] == 0).all()
    assert vdm.read_video(folder / "grey.npy").shape == (17, 3, 32, 32)
    assert vdm.read_video(folder / "five.npy").shape == (16, 3, 32, 32)               # the first
    assert vdm.read_video(folder / "frames", (8, 12), channels=1).shape == (16, 1, 8, 12)
    data = (folder / "grey.gif").read_bytes()
    for n in range(1, len(data), 7):  # wherever it is cut: an error, not a shorter clip
        (folder / "cut.gif").write_bytes(data[:n])
        pytest.raises(ValueError, vdm.read_video, folder / "cut.gif")
    whole = (folder / "mute.mp4").read_bytes()
    (folder / "12:30.mp4").write_bytes(whole)                 # ffmpeg could take it for a protocol
    assert len(vdm.read_video(Path(os.path.relpath(folder / "12:30.mp4")))) == 40
    for name, cause in {"none.mp4": "No such file", "zero.avi": "Invalid data",
                        "a/cut.mp4": "ffmpeg cannot read all: ", "a/cut.mkv": "ended prematurely",
                        "notes.txt": "cannot identify", "empty": "Is a directory"}.items():
        error = pytest.raises(ValueError, vdm.read_video, folder / name)
        error.match(f"{name}: .*{cause}")
        assert "\n" not in str(error.value)


def test_what_a_phone_stores(tmp_path):
    """A picture that EXIF says to turn, and one with a second picture in the same file."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :8] = 200                                                              # on the left
    exif = Image.Exif()
    exif[0x0112] = 6                                             # to be turned clockwise: on top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    read = vdm.to_uint8(vdm.read_video(tmp_path / "turned.png"))[0]
    assert read.shape == (24, 16, 3) and (read[:8] == 200).all() and (read[8:] == 0).all()
    second = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    Image.fromarray(pixels).save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[second])
    assert vdm.read_video(tmp_path / "two.jpg").shape == (1, 3, 16, 24)


def test_items_depend_on_seed_and_index_only(tmp_path):
    for n in range(5):
        np.save(tmp_path / f"{n}.npy", flat(12 + n, C=1) + np.uint8(n))  # brightness 8 * t + n
    data, again = (vdm.VideoFolder(tmp_path, 4, (32, 32), stride=3, seed=1) for _ in range(2))
    values = np.stack([vdm.to_uint8(data[i]["video"])[:, 0, 0, 0] for i in range(20)])
    assert (vdm.to_uint8(again[17]["video"])[:, 0, 0, 0] == values[17]).all()
    assert (np.diff(values) == 3 * 8).all()  # stride 3, in order
    clips = (values[:, 0] % 8).reshape(4, 5)  # of 4 epochs
    assert (np.sort(clips) == np.arange(5)).all() and len(np.unique(clips, axis=0)) > 1
    assert len(np.unique(values[:, 0])) > 5  # not always the same window
    assert len(data) == 5 and data.fps == 8 / 3 and data[7]["video"].shape == (4, 3, 32, 32)
    np.save(tmp_path / "colour.npy", flat(12) * np.array([1, 0, 1], np.uint8))
    grey = vdm.VideoFolder(tmp_path, 4, (8, 8), channels=1)
    assert grey[0]["video"].shape == (4, 1, 8, 8) and len(grey) == 6 and grey.channels == 1


def test_arrays_and_train_folder(tmp_path):
    mnist = np.arange(20)[:, None, None, None] + 10 * np.arange(21)[None, :, None, None]
    np.save(tmp_path / "mnist.npy", np.tile(mnist.astype(np.uint8), (1, 1, 64, 64)))  # (T, N, H, W)
    data = vdm.VideoFolder(tmp_path, 20, (64, 64))
    assert [clip[:, 0, 0, 0].tolist() for clip in data.clips] == mnist[:, :, 0, 0].T.tolist()
    assert "-> 21 clips used" in data.report
    for name, n in (("train", 1), ("test", 2)):
        (tmp_path / "own" / name / "class").mkdir(parents=True)
        np.save(tmp_path / "own" / name / "class/x.npy", np.zeros((n, 16, 8, 8, 3), np.uint8))
    assert "1 files in {} -> 1 clips".format(tmp_path / "own/train") in vdm.VideoFolder(
        tmp_path / "own", 16, (8, 8)).report
    np.save(tmp_path / "evil.npy", np.array([print], object), allow_pickle=True)
    np.save(tmp_path / "first.npy", np.zeros((16, 3, 32, 32), np.uint8))
    error = pytest.raises(ValueError, vdm.VideoFolder, tmp_path, 21, (32, 32))
    for line in ("0 clips", "x.npy: 16 frames", "evil.npy: ", "first.npy: no uint8 "):
        error.match(line)
    np.save(tmp_path / "float.npy", np.zeros((2, 16, 32, 32), np.float32))
    pytest.raises(ValueError, vdm.read_video, tmp_path / "float.npy").match("uint8 .* float32")
    np.savez(tmp_path / "two.npz", a=np.full((17, 8, 9), 7, np.uint8), labels=np.arange(3))
    assert (vdm.to_uint8(vdm.read_video(tmp_path / "two.npz")) == np.full((17, 8, 9, 3), 7)).all()
    np.save(tmp_path / "rgba.npy", np.zeros((16, 32, 31, 4), np.uint8))
    assert vdm.read_video(tmp_path / "rgba.npy").shape == (16, 3, 32, 31)
    for shape in ((1, 32, 31, 3), (3, 32, 31, 4), (2, 3, 32, 31, 3)):                 # a picture and three, not channels
        np.save(tmp_path / "few.npy", np.zeros(shape, np.uint8))
        assert vdm.read_video(tmp_path / "few.npy").shape == (shape[-4], 3, 32, 31)
    pytest.raises(ValueError, vdm.VideoFolder, tmp_path / "missing", 16, (8, 8)).match("not exist")


def test_frames_before_an_item(tmp_path):
    """Found by hand: 3 frames before each 4, every second frame, and a clip's first where it has none before it."""
    np.save(tmp_path / "x.npy", np.tile(np.arange(12, dtype=np.uint8)[:, None, None, None], (1, 8, 8, 3)))
    plain, more = (vdm.VideoFolder(tmp_path, 4, (8, 8), stride=2, before=n) for n in (0, 3))
    for i in range(40):
        start = int(vdm.to_uint8(plain[i]["video"])[0, 0, 0, 0])
        want = [max(start + 2 * t, 0) for t in range(-3, 4)]
        assert vdm.to_uint8(more[i]["video"])[:, 0, 0, 0].tolist() == want
    np.save(tmp_path / "latents.npy", np.arange(6.0)[:, None, None, None] + np.zeros((6, 1, 4, 4), np.float32))
    config = vdm.Config(frames=4, size=(4, 4), channels=1)
    assert config.anchors
    for i in range(20):
        shown = train.Latents(tmp_path / "latents.npy", config, 16)[i]["video"][:, 0, 0, 0]
        assert shown.tolist() == [max(shown[12].item() + t, 0) for t in range(-12, 4)]


def test_a_short_clip_does_not_cost_the_long_one_beside_it(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros((5, 8, 8), np.uint8), b=np.full((9, 8, 8), 3, np.uint8))
    data = vdm.VideoFolder(tmp_path, 8, (8, 8))
    assert len(data) == 1 and (vdm.to_uint8(data[0]["video"]) == 3).all()
    assert "two.npz: 5 frames are too few, an item takes 8: lower --frames or --stride" in data.report


def test_actions_beside_a_clip(tmp_path):
    """Frame t shows t and is told (t, k) of clip k; each way to be wrong is skipped with its reason."""
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
    wrong = dict(short=told(11, 0), flat=np.zeros(12), wide=np.zeros((12, 3)), endless=told(12, np.inf),
                 text=np.full((12, 2), "left"), code=np.array([print], object))
    for name, actions in wrong.items():
        np.save(tmp_path / f"{name}.npy", flat(12))
        np.save(tmp_path / f"{name}.actions.npy", actions)
    np.save(tmp_path / "zero.npy", flat(12))
    (tmp_path / "zero.actions.npy").touch()
    data = vdm.VideoFolder(tmp_path, 4, (32, 32), stride=2)
    assert "11 files" in data.report and "5 clips used, 7 skipped" in data.report
    assert ", 4 fps, 4 with actions\n" in data.report
    for name in (*wrong, "zero"):
        assert re.search(rf"skipped .*{name}.actions.npy: \S", data.report), name
    assert "short.actions.npy: (1, 11, 2) is not 1 clips x 12 frames x 2 finite numbers" in data.report
    items = [data[i] for i in range(25)]
    for item in items:
        shown, action = brightness(vdm.to_uint8(item["video"])), item["action"]
        bare = action.isnan().all()
        assert action.dtype == torch.float32 and (bare or action[:, 0].tolist() == shown)
    assert {item["action"].nan_to_num()[1, 1].item() for item in items} == {0, 1, 2, 3, 4} and data.actions == (2,)
    assert vdm.VideoFolder(tmp_path / "bare.npy", 4, (8, 8))[0].keys() == {"video"}


def test_pictures_of_16_bits(tmp_path):
    """A ramp of 16 bits is the ramp of its upper 8; of 32 bits and of floats, nobody knows what is white."""
    Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 257).save(tmp_path / "a.png")
    assert (vdm.to_uint8(vdm.read_video(tmp_path / "a.png"))[0, ..., 0] == np.arange(256).reshape(16, 16)).all()
    for dtype, mode in ((np.int32, "I"), (np.float32, "F")):
        Image.fromarray(np.ones((16, 16), dtype)).save(tmp_path / "b.tiff")
        with pytest.raises(ValueError, match=f"b.tiff: pixels of mode {mode}, expected 8 or 16 bits"):
            vdm.read_video(tmp_path / "b.tiff")


def test_no_more_than_nine_reasons(tmp_path):
    """Nor are the others lost: they are counted."""
    np.save(tmp_path / "clip.npy", flat(12))
    for i in range(12):
        (tmp_path / f"{i:02d}.txt").write_text("x")
    data = vdm.VideoFolder(tmp_path, 4, (32, 32))
    assert data.report.count("cannot identify") == 9 and data.report.endswith("skipped 3 more") and "fps\n" in data.report


def test_range_crop_and_pictures(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    clip = vdm.from_uint8(pixels)
    assert (clip.min(), clip.max(), clip.shape) == (-1, 1, (1, 1, 16, 16))
    assert (vdm.to_uint8(clip) == pixels).all() and vdm.to_uint8(clip * 9).max() == 255
    pytest.raises(ValueError, vdm.to_uint8, clip / 0)
    bars = np.zeros((20, 60, 3), np.uint8)
    bars[:, 20:40] = 200  # the centre square
    Image.fromarray(bars).save(tmp_path / "bars.png")
    assert (vdm.to_uint8(vdm.read_video(tmp_path / "bars.png", (20, 20))) == 200).all()
    clips = torch.arange(5.0).view(5, 1, 1, 1, 1).expand(5, 2, 3, 4, 6) / 4
    strip, tiled = vdm.film_strip(clips), vdm.grid(clips)
    assert strip[0, 6, 1] == 0.25 and strip[0, 5, 1] < -0.5  # clip 1; the line above it
    assert (strip.shape, tiled.shape) == ((3, 5 * 5 + 1, 2 * 7 + 1), (2, 3, 2 * 5 + 1, 3 * 7 + 1))
    assert tiled[0, 0, 6, 8] == 1 and (tiled[0, 0, 6:10, 15:21] == -1).all()  # clip 4; no clip
    pixels = np.asarray(Image.open(vdm.write_video(tmp_path / "new/strip.png", strip[None], scale=2)))
    assert pixels.shape == (52, 30, 3) and pixels[12, 2, 0] == 159


@pytest.mark.parametrize("H, W", [(28, 28), (63, 65), (72, 72), (255, 128)])
def test_writer(tmp_path, H, W):
    clip = vdm.from_uint8(flat(6, H, W, 1)).expand(-1, 3, -1, -1)
    for suffix in (".mp4", ".gif"):
        path = vdm.write_video(tmp_path / "new" / f"clip{suffix}", clip, fps=8)
        frames = np.stack(list(iio.imiter(path, plugin="FFMPEG" if suffix == ".mp4" else "pillow")))
        k = frames.shape[1] // H
        assert frames.shape[:3] == (6, k * H, k * W) and min(frames.shape[1:3]) >= 128
        assert brightness(frames) == list(range(6))
    meta = iio.immeta(tmp_path / "new/clip.mp4", plugin="FFMPEG")
    assert meta["pix_fmt"].startswith("yuv420p") and (meta["codec"], meta["fps"]) == ("h264", 8)
    assert Image.open(path).info["loop"] == 0 and Image.open(path).info["duration"] == 120
    assert len(list((tmp_path / "new").iterdir())) == 2  # no temporary file is left


def test_of_an_mp4_one_frame_at_a_time_is_in_memory(tmp_path):
    pixels, alive = flat(9, 32, 32, 3), weakref.WeakSet()

    class Frames:
        def __getitem__(self, t):
            alive.add(frame := vdm.from_uint8(pixels[t]))          # an IndexError after the last ends the sequence
            assert len(alive) <= 2                                 # the one before may not be forgotten yet
            return frame

    written = iio.imread(vdm.write_video(tmp_path / "a.mp4", Frames()), plugin="FFMPEG")
    assert brightness(written) == list(range(9))


def test_a_failed_write_and_wrong_input(tmp_path, monkeypatch):
    clip, path = vdm.from_uint8(flat(5, C=1)), tmp_path / "a.mp4"
    for name, wrong in (("a.avi", clip), ("a.mp4", clip[0]), ("a.gif", clip.expand(-1, 4, -1, -1))):
        pytest.raises(ValueError, vdm.write_video, tmp_path / name, wrong).match(name)
    before = vdm.write_video(path, clip).read_bytes()
    monkeypatch.setattr("imageio_ffmpeg.write_frames", lambda to, *a, **k: open(to, "w") and 1 / 0)
    assert vdm.write_video(path, clip) == tmp_path / "a.gif"         # ffmpeg fails: what PIL can write
    assert brightness(np.stack(list(iio.imiter(tmp_path / "a.gif")))) == list(range(5))
    assert path.read_bytes() == before                                     # the old one, whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "a.mp4"]


def test_another_seed_is_another_order(tmp_path):
    """Of clips, and of where they are cut."""
    np.save(tmp_path / "a.npy", np.stack([np.full((20, 32, 32, 3), 20 * k, np.uint8) for k in range(12)]))
    np.save(tmp_path / "one.npy", flat(20))
    for name in ("a", "one"):
        a, b, again = (vdm.VideoFolder(tmp_path / f"{name}.npy", 4, (32, 32), seed=seed) for seed in (0, 1, 0))
        same = [torch.equal(a[i]["video"], b[i]["video"]) for i in range(24)]
        assert sum(same) < 12 and all(torch.equal(a[i]["video"], again[i]["video"]) for i in range(24))


def test_a_gif_is_never_faster_than_viewers_play(tmp_path):
    """Below 20 ms a frame they take 100."""
    for fps, ms in ((8, 120), (50, 20), (100, 20)):
        path = vdm.write_video(tmp_path / f"{fps}.gif", vdm.from_uint8(flat(4)), fps)
        assert Image.open(path).info["duration"] == ms


# ---- the scripts -----------------------------------------------------------------------------------

FLAGS = ("--width 32 --mults 1 1 --patch 4 --detail 8 --attention 2 --joint 2 --frames 4 --size 16 --batch 2 "
         "--sampling-steps 2 --marks 2 --warmup 2 --context 0.5 0 0.5 --overlap 2 --device cpu --dtype fp32").split()


def run_train(out, *flags):
    train.main([*FLAGS, "--out", str(out), *map(str, flags)])
    return torch.load(out / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One small run that several tests read from."""
    out = tmp_path_factory.mktemp("run") / "tiny"
    run_train(out, "--steps", 12)
    return out


def test_train_leaves_what_it_promises(trained, capsys):
    """The files of a run, opened by other programs: csv, json, PIL."""
    assert json.loads((trained / "config.json").read_text())["frames"] == 4
    rows = list(csv.DictReader(open(trained / "log.csv")))
    assert [int(r["step"]) for r in rows] == list(range(1, 13))  # a row at least with each checkpoint
    assert all(float(r["loss"]) > 0 and float(r["gradient_norm"]) > 0 for r in rows)
    by_level = [float(v) for r in rows for k, v in r.items() if k.startswith("error_sigma_") and v]
    assert len(by_level) >= 12 and all(v > 0 for v in by_level)
    with Image.open(trained / "samples/final.gif") as gif:
        assert gif.n_frames <= 4 and gif.info["loop"] == 0       # equal frames may have been merged
    assert (trained / "samples/final.mp4").stat().st_size > 0
    assert Image.open(trained / "samples/final.png").size == (2 * (4 * 17 + 1), 2 * (2 * 17 + 1))
    assert len(list((trained / "samples").glob("step_*.png"))) == 5


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@cases("flags", [[], ["--optimizer", "adamw", "--dropout", "0.1", "--offset", "0.1"],
                                   ["--previous", "--context", "1", "--weighting", "min_snr"],
                                   ["--labels", "18", "--drop", "0.5"], ["--data", "drive", "--drop", "0.5"]])
def test_resume_equals_an_unbroken_run(tmp_path, monkeypatch, flags):
    """10 steps = 5, a crash at step 8, resume: weights, averages, optimisers and log, bit for bit."""
    whole = run_train(tmp_path / "whole", "--steps", 10, "--save-every", 5, *flags)
    draw, broken = train.draw, tmp_path / "broken"

    def stumble(step, config, seed):
        if step == 7:
            raise KeyboardInterrupt
        return draw(step, config, seed)

    monkeypatch.setattr(train, "draw", stumble)
    with pytest.raises(KeyboardInterrupt):
        run_train(broken, "--steps", 10, "--save-every", 5, *flags)
    assert torch.load(broken / "last.pt", weights_only=True)["step"] == 5
    monkeypatch.undo()
    resumed = run_train(broken, "--steps", 10, "--save-every", 5, "--resume", *flags)
    assert same(whole, resumed)
    logs = [[{k: v for k, v in r.items() if k not in ("seconds", "data_wait")}
             for r in csv.DictReader(open(tmp_path / run / "log.csv"))] for run in ("whole", "broken")]
    assert logs[0] == logs[1]


# ---- large runs

def test_a_batch_is_shared_without_overlap():
    for batch, micro, processes in ((12, None, 3), (12, 2, 3), (16, 1, 4), (16, 8, 1), (7, None, 1)):
        parts = [train.share(batch, micro, rank, processes) for rank in range(processes)]
        assert [i for part in parts for r in part for i in r] == list(range(batch))
        assert {len(r) for part in parts for r in part} == {micro or batch // processes}
    for batch, micro, processes in ((12, 5, 1), (12, None, 5), (4, None, 8), (8, 3, 2)):
        with pytest.raises(ValueError, match=f"--batch is {batch}: it must be a multiple of .* {processes} processes"):
            train.share(batch, micro, 0, processes)


CREW = """
import json, os, socket, sys
sys.path.append({ci!r})
import kill, torch
torch.set_num_threads(1)
for n, flags in json.loads(sys.argv[1]):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    crew = [kill.start(flags, rank, n, port) for rank in range(n)]
    assert not any([os.waitpid(pid, 0)[1] for pid in crew]), flags
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@cases("flags, shard", [
    (["--data", "drive", "--drop", "0.5", "--context", "0.3", "0.7", "--task", "any", "--context-noise", "0.3"], []),
    (["--labels", "18", "--give", "per_frame", "--independent", "0.5", "--images", "0.5", "--optimizer", "adamw"], ["--shard"])])
def test_processes_learn_what_one_does(tmp_path, flags, shard):
    """One process with the whole batch; the same in two parts; two processes, each in two parts; and runs that go on, in
    other numbers of processes, from where these were in the middle."""
    common = [*FLAGS, "--batch", 4, "--steps", 4, "--keep-every", 2, "--save-every", 2, "--sample-every", 3, *flags]
    big = ["--micro", 1, "--checkpoint-activations", *shard]
    for name, start in (("three", "one"), ("four", "two")):
        (tmp_path / name).mkdir()
    runs = [[(1, "one", []), (1, "parts", ["--micro", 2]), (2, "two", big)],
            [(2, "three", [*shard, "--resume"]), (1, "four", ["--resume"])]]
    for group in runs:
        words = [[n, [str(flag) for flag in [*common, *more, "--out", tmp_path / name]]] for n, name, more in group]
        run = subprocess.run([sys.executable, "-c", CREW.format(ci=str(ROOT / ".ci")), json.dumps(words)], cwd=ROOT,
                             capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
        assert run.returncode == 0, run.stderr[-3000:]
        for name, start in (("three", "one"), ("four", "two")):
            (tmp_path / name / "last.pt").exists() or (tmp_path / start / "step_000002.pt").rename(tmp_path / name / "last.pt")
    one, *others = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in "one parts two three four".split()]
    logs = [list(csv.DictReader(open(tmp_path / name / "log.csv")))[-1] for name in "one parts two three four".split()]
    torch.manual_seed(0)
    fresh = vdm.build(vdm.Config(**one["config"])).state_dict()
    for other, log in zip(others, logs[1:]):
        for part in ("model", "ema"):
            for name, w in one[part].items():
                assert (other[part][name] - w).norm() <= 1e-3 * (w - fresh[name]).norm() + 1e-7, (part, name)
        for key in logs[0].keys() - {"seconds", "data_wait"}:
            assert (log[key] == logs[0][key] == "") or float(log[key]) == pytest.approx(float(logs[0][key]), rel=1e-3), key
        moments = [o["optimizers"][0]["state"][0]["exp_avg"] for o in (one, other)]
        close(*moments, rtol=1e-2, atol=1e-2 * moments[0].abs().max().item())


def test_torchrun_speaks_once_and_stops_at_a_signal(tmp_path):
    """Under the real torchrun: only the first process prints; SIGTERM saves the same step of all, and --resume goes on."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py", *FLAGS, "--out",
             tmp_path / "run", "--steps", "3000"]
    run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(tmp_path / "run", run)
    run.terminate()
    said = run.communicate(timeout=120)[0]
    assert said.count("config  frames=4") == 1 and said.count("stopped by SIGTERM after step") == 1, said
    done = int(re.search(r"after step (\d+)", said)[1])
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == done >= 10


def wait_for_step(out, process):
    """Until the log of a run has a row."""
    for _ in range(1200):
        if (out / "log.csv").exists() and (out / "log.csv").read_text().count("\n") > 1:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    raise TimeoutError


def test_sigterm_saves_and_exits_0(tmp_path):
    """Even if its worker gets the signal too, as from a terminal or a queue. Then the run goes on to where one ends that
    was not stopped."""
    flags = "--steps", 60, "--save-every", 60, "--sample-every", 60, "--workers", 1
    words = [sys.executable, "train.py", *FLAGS, "--out", tmp_path / "run", *map(str, flags)]
    run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           start_new_session=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    wait_for_step(tmp_path / "run", run)
    os.killpg(run.pid, signal.SIGTERM)
    said = run.communicate(timeout=120)[0]
    assert run.returncode == 0 and "Traceback" not in said
    assert re.search(r"stopped by SIGTERM after step \d+, all saved: the same command with --resume goes on$", said.strip())
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert 10 <= state["step"] < 60
    assert same(run_train(tmp_path / "run", *flags, "--resume"), run_train(tmp_path / "whole", *flags))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_end_as_unbroken_ones():
    run = subprocess.run([sys.executable, ROOT / ".ci/kill.py", "--kills", "3"], capture_output=True, text=True,
                         env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert run.returncode == 0 and " 0 differ from the unbroken one" in run.stdout, run.stdout + run.stderr[-3000:]


def test_a_half_written_log_is_mended(tmp_path):
    """The last row of a killed run may be cut anywhere; a log may be missing."""
    flags = "--steps", 12, "--sample-every", 99, "--marks", 1
    run_train(tmp_path / "run", *flags, "--keep-every", 10)
    log, last = tmp_path / "run/log.csv", tmp_path / "run/last.pt"
    rows = log.read_text().splitlines(True)
    for text, left in (("".join(rows[:11]) + "1", 12), ("".join(rows[:11]) + rows[11][:9], 12), ("".join(rows), 12), (None, 2)):
        last.write_bytes((tmp_path / "run/step_000010.pt").read_bytes())
        log.write_text(text) if text else log.unlink()
        run_train(tmp_path / "run", *flags, "--resume")
        assert [int(row["step"]) for row in csv.DictReader(open(log))] == list(range(1, 13))[-left:]


def test_what_a_large_run_adds_changes_nothing(tmp_path, trained, monkeypatch):
    """Recomputed activations and workers, bit for bit; checkpoints that are kept."""
    once = torch.load(trained / "last.pt", weights_only=True)
    for name, flags in dict(checkpoint=["--checkpoint-activations"], workers=["--workers", 2]).items():
        assert same(once, run_train(tmp_path / name, "--steps", 12, "--keep-every", 5, "--sample-every", 99, *flags)), name
        kept = {path.name: torch.load(path, weights_only=True)["step"] for path in (tmp_path / name).glob("step_*.pt")}
        assert kept == {"step_000005.pt": 5, "step_000010.pt": 10}
    for flags, words in ((["--shard"], "torchrun --nproc_per_node"), (["--micro", 3], "must be a multiple of 3")):
        with pytest.raises(ValueError, match=words):
            run_train(tmp_path / "wrong", *flags)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--shard needs --optimizer adamw"):
        run_train(tmp_path / "wrong", "--shard")


def test_activations_are_computed_again_with_equal_gradients():
    """Of one loss, by the network as it is and with every block checkpointed; fewer activations are kept."""
    net = randomize(tiny())
    x, sigma, kept, found = torch.randn(2, 4, 1, 8, 8), torch.ones(2), [], []
    for again in (False, True):
        net.zero_grad()
        if again:
            train.checkpoint_activations(net)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            loss = net(x, sigma).square().mean()
        loss.backward()
        kept.append(sum(sizes))
        found.append([p.grad.clone() for p in net.parameters()])
    assert same(*found) and kept[1] < 0.6 * kept[0]


def test_compile_or_say_why_not(tmp_path, monkeypatch, capsys):
    def fail(forward):
        def broken(*args, **kwargs):
            raise RuntimeError("no compiler\nmore lines")
        return broken

    plain = run_train(tmp_path / "plain", "--steps", 2)
    with monkeypatch.context() as m:
        m.setattr(torch, "compile", fail)
        assert same(plain, run_train(tmp_path / "failed", "--steps", 2, "--compile"))
    assert "compile not possible here, so not done: no compiler\n" in capsys.readouterr().out
    if not shutil.which("g++"):
        pytest.skip("no compiler to try --compile with")
    fast = run_train(tmp_path / "fast", "--steps", 2, "--compile")
    assert "compile not" not in capsys.readouterr().out
    for name, w in plain["model"].items():
        close(fast["model"][name], w, rtol=1e-3, atol=1e-4)


def test_muon_against_torch():
    """torch.optim.Muon, which rounds to bfloat16 on the way, over six steps: where momentum counts."""
    ours, theirs = ([nn.Parameter(torch.zeros(shape)) for shape in ((12, 30), (30, 12), (16, 16))] for _ in range(2))
    a, b = train.Muon(ours, lr=0.1), torch.optim.Muon(theirs, lr=0.1, momentum=0.95, weight_decay=0.0)
    for step in range(6):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        assert (p - q).norm() < 0.03 * q.norm()


def test_a_row_of_the_log_is_a_mean():
    records = [dict(loss=float(k), norm=2.0 * k, rate=0.5, waited=0.1, took=1.0, sigma=torch.tensor([0.2]), error=torch.tensor([k / 4]))
               for k in (1, 3)]
    row = train.log_line(7, 12.345, records)
    assert (row["loss"], row["gradient_norm"], row["data_wait"]) == (2, 4, pytest.approx(0.1))
    assert row["error_sigma_0.1_0.3"] == 0.5 and row["error_sigma_1_3"] == ""


def test_another_seed_is_other_noise_and_held_out_clips_are_others():
    """All that chance draws in a step differs; no clip that is sampled beside was trained on."""
    options, config = train.parse("--labels 18 --drop 0.5".split())
    a, b, again = (train.draw(3, config, seed) for seed in (0, 1, 0))
    assert all(torch.equal(a[k], again[k]) for k in a) and not any(torch.equal(a[k], b[k]) for k in ("sigma", "noise", "time"))
    data, held_out, _ = train.open_data(options, config)
    train_set = torch.stack([data[i]["video"] for i in range(64)])
    assert all((held_out[i]["video"] - train_set).abs().amax((1, 2, 3, 4)).min() > 0.1 for i in range(64))


def test_every_clip_that_is_sampled_has_noise_of_its_own(trained):
    """Also beyond those that are drawn at a time, 16."""
    denoiser, config = vdm.load(trained / "last.pt")
    clips = train.sample(config, denoiser, 18, torch.device("cpu"), torch.float32, seed=4)
    shape = (2, config.frames, config.channels, *config.size)
    sigmas = vdm.karras_sigmas(config.sampling_steps, config.sigma_min, config.sigma_max, config.rho)
    alone = vdm.generate(denoiser, shape, sigmas, noise=vdm.clip_noise(4, [16, 17]), **train.sampling(config))
    close(clips[16:], alone, rtol=1e-3, atol=1e-3)
    assert (clips[:2] - clips[16:]).abs().max() > 0.01


def test_stills_are_any_frames():
    """Of clips whose frame t shows t every t is drawn."""
    stills = train.WithStills([dict(video=torch.arange(6.0).view(6, 1, 1, 1))] * 1100, 4, 0)
    assert {t for i in range(40) for t in stills[i]["stills"].flatten().tolist()} == {0, 1, 2, 3, 4, 5}


def test_latents_start_anywhere(tmp_path):
    np.save(tmp_path / "a.npy", np.broadcast_to(np.arange(9, dtype=np.float32)[:, None, None, None], (2, 9, 1, 2, 2)))
    data = train.Latents(tmp_path / "a.npy", vdm.Config(channels=1, size=(2, 2), factor=8, anchor=0.0, frames=4), 4)
    assert {int(data[i]["video"][0, 0, 0, 0]) for i in range(60)} == {0, 1, 2, 3, 4, 5}


def test_another_data_is_another_run(trained):
    with pytest.raises(ValueError, match="but data differs from"):
        train.main(["--resume", "--out", str(trained), "--data", "drive"])


def test_gradients_are_cut():
    """One of norm 10 moves weights as one of norm --clip-norm would, and is reported."""
    layer, config = nn.Linear(4, 1, bias=False), vdm.Config(clip_norm=0.5, warmup=0, steps=1)
    before, optimizer = layer.weight.detach().clone(), torch.optim.SGD(layer.parameters(), 1.0)
    optimizer.param_groups[0]["peak"] = 1.0
    layer.weight.grad = torch.full((1, 4), 5.0)
    norm, rate = train.descend(0, config, layer, [optimizer])
    assert (norm.item(), rate) == (10, 1) and not layer.weight.grad
    close(before - layer.weight, torch.full((1, 4), 0.25))


def test_every_clip_is_told_its_own_label():
    """Of 20, drawn 16 at a time, by a denoiser that paints what it is told."""
    class Paints(nn.Module):
        p = nn.Parameter(torch.zeros(1))

        def forward(self, x, sigma, label):
            return 0 * x + label[:, None, None, None, None] / 20

    config = vdm.Config(frames=2, size=(4, 4), temporal_guidance=1.0, sampling_steps=2)
    clips = train.sample(config, Paints(), 20, torch.device("cpu"), torch.float32, label=torch.arange(20.0))
    close(clips[:, 0, 0, 0, 0], torch.arange(20.0) / 20)


def test_the_newest_run_is_taken(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        (tmp_path / "out" / name).mkdir(parents=True)
        shutil.copy(trained / "last.pt", tmp_path / "out" / name)
    for k, name in enumerate("abca"):
        os.utime(tmp_path / "out" / name / "last.pt", (1e9 + k, 1e9 + k))
        if k > 1:                                                      # all are of the past then
            sample.main(["--n", "1", "--steps", "1"])
            assert f"out/{name}/last.pt: 1 videos" in capsys.readouterr().out


def test_bfloat16_where_it_is_fast(monkeypatch):
    """By itself only on a CPU that multiplies it; if asked for, everywhere."""
    cpu, fast = torch.device("cpu"), []
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(fast), raising=False)
    names = "auto", "fp32", "bf16"
    assert [train.pick_dtype(name, cpu) for name in names] == [torch.float32, torch.float32, torch.bfloat16]
    fast.append(1)
    assert [train.pick_dtype(name, cpu) for name in names] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_sample_goes_on_from_a_whole_clip(tmp_path):
    """A model that is given the clip before makes one after it: twice as many frames, the first of which are the clip's last."""
    run_train(tmp_path / "run", "--steps", 1, "--previous", "--context", 1)
    clip = vdm.to_uint8(vdm.MovingShapes(6, (16, 16))[0]["video"])
    np.save(tmp_path / "clip.npy", clip)
    video, = run_sample(tmp_path / "run", tmp_path / "a.mp4", "--n", 1, "--context", tmp_path / "clip.npy")
    assert len(video) == 8 and (video[:4] - vdm.from_uint8(clip[2:])).abs().mean() < 0.05
    with pytest.raises(ValueError, match="--context gives 3 frames, but .* goes on from a whole clip: expected 4"):
        run_sample(tmp_path / "run", tmp_path / "b.mp4", "--n", 1, "--context", tmp_path / "clip.npy", "--context-frames", 3)
    assert not (tmp_path / "b.mp4").exists()


@cases("T, n", [(3, 2), (9, 3)])
def test_reward_of_all_frames(driver, tmp_path, monkeypatch, capsys, T, n):
    """Of less than a window, and of more; for two videos already."""
    made, rollout = [], vdm.rollout
    monkeypatch.setattr(vdm, "rollout", lambda *a, **o: (made.append(x) or x for x in rollout(*a, **o)))
    run_sample(driver, tmp_path / "a.mp4", "--n", n, "--actions", ("LSRX" * 3)[:T])
    said = float(re.search(r"reward  (\S+) of these actions", capsys.readouterr().out)[1])
    video = torch.cat(made, 1).clamp(-1, 1)
    assert video.shape[:2] == (n, T) and said == pytest.approx(math.exp(-video.var(0).mean()), abs=0.003)


# ---- clips decoded once

@pytest.fixture
def videos(tmp_path):
    """A folder with an array of two clips, a film, pictures and a file that is none."""
    (tmp_path / "v/frames").mkdir(parents=True)
    for t, picture in enumerate(flat(12)):
        Image.fromarray(picture).save(tmp_path / f"v/frames/{t}.png")
    save(tmp_path / "v/film.mp4", flat(14), fps=10)
    np.save(tmp_path / "v/two.npy", np.stack([flat(9), flat(9) + np.uint8(1)]))
    (tmp_path / "v/notes.txt").write_text("x")
    return tmp_path / "v"


def cached(folder, size=(16, 16), channels=3):
    return vdm.VideoFolder(folder, 4, size, channels=channels, read=train.Cache(folder).decode)


def decoded(monkeypatch, *args, **options):
    """-> the folder, and the names of files that had to be decoded."""
    names, decode = [], vdm.decode
    with monkeypatch.context() as m:
        m.setattr(vdm, "decode", lambda path, *args: names.append(path.name) or decode(path, *args))
        return cached(*args, **options), sorted(names)


def test_files_are_decoded_once(videos, monkeypatch):
    """The same items as without a cache; what has changed, or is wanted otherwise, is decoded anew; nothing else is."""
    plain = vdm.VideoFolder(videos, 4, (16, 16))
    every = ["film.mp4", "frames", "notes.txt", "two.npy"]
    for expected in (every, ["notes.txt"]):
        data, names = decoded(monkeypatch, videos)
        assert names == expected and data.report == plain.report and data.fps == plain.fps
        assert all(torch.equal(data[i]["video"], plain[i]["video"]) for i in range(12))
        again = pickle.loads(pickle.dumps(data))                            # as it goes to a worker: without pixels
        assert len(pickle.dumps(data)) < 3000 and torch.equal(again[7]["video"], plain[7]["video"])
    for change in (dict(size=(8, 16)), dict(channels=1)):
        assert decoded(monkeypatch, videos, **change)[1] == every
        data, names = decoded(monkeypatch, videos, **change)
        assert names == ["notes.txt"] and data[0]["video"].shape[1:] == (change.get("channels", 3), *change.get("size", (16, 16)))
    assert decoded(monkeypatch, videos)[1] == ["notes.txt"]
    np.save(videos / "two.npy", np.stack([flat(9) + np.uint8(2)] * 2))
    Image.fromarray(flat(1)[0]).save(videos / "frames/7.png", compress_level=1)
    data, names = decoded(monkeypatch, videos)
    assert names == ["frames", "notes.txt", "two.npy"]
    assert sum((clip[0] == 2).all() for clip in data.clips) == 2
    (videos / "more.npy").write_bytes((videos / "two.npy").read_bytes())
    assert decoded(monkeypatch, videos)[1] == ["more.npy", "notes.txt"]


def test_what_a_kill_left_of_a_cache_is_not_used(videos, monkeypatch):
    """Cut after every so many bytes, the index and the pixels give the right clips, or none."""
    plain, _ = cached(videos), decoded(monkeypatch, videos)
    truth = [plain[i]["video"].clone() for i in range(8)]
    (index,), (pixels,) = (list((videos / ".vdm_cache").glob(f"*.{suffix}")) for suffix in ("jsonl", "bin"))
    lines, bits = index.read_bytes(), pixels.read_bytes()
    assert lines.count(b"\n") == 3
    for k in range(0, len(lines), len(lines) // 7):
        for path in (videos / ".vdm_cache").iterdir():
            path.unlink()
        index.write_bytes(lines[:k])
        pixels.write_bytes(bits)
        data, names = decoded(monkeypatch, videos)
        assert len(names) == 4 - lines[:k].count(b"\n")
        assert all(torch.equal(data[i]["video"], truth[i]) for i in range(8))
    for path in (videos / ".vdm_cache").iterdir():
        path.unlink()
    index.write_bytes(lines)
    pixels.write_bytes(bits[:-1])
    assert len(decoded(monkeypatch, videos)[1]) == 2                             # the last, and what is none


def test_without_room_for_a_cache_clips_stay_in_memory(videos, monkeypatch, capsys):
    truth = vdm.VideoFolder(videos, 4, (16, 16))[3]["video"]
    (videos / ".vdm_cache").write_text("in the way")
    assert torch.equal(cached(videos)[3]["video"], truth)
    assert capsys.readouterr().out.count("cannot be written") == 1
    (videos / ".vdm_cache").unlink()
    room, write = [20_000], train.Cache.keep

    class Full(np.ndarray):
        def tofile(self, file):
            room[0] -= self.nbytes
            if room[0] < 0:
                raise OSError(28, "No space left on device")
            np.asarray(self).tofile(file)

    monkeypatch.setattr(train.Cache, "keep", lambda self, clip: write(self, clip.view(Full)))
    data = cached(videos)
    assert torch.equal(data[3]["video"], truth) and "No space left" in capsys.readouterr().out
    monkeypatch.undo()
    assert torch.equal(cached(videos)[3]["video"], truth)


def test_same_seed_same_weights_other_seed_others(tmp_path, trained):
    again = run_train(tmp_path / "again", "--steps", 12)
    other = run_train(tmp_path / "other", "--steps", 12, "--seed", 1)
    first = torch.load(trained / "last.pt", weights_only=True)
    assert same(first, again) and not same(first["model"], other["model"])


def test_pictures_train_the_spatial_layers_alone(tmp_path):
    """With --images 1 gates stay at 0 and temporal layers as they were made; all others learn."""
    state = run_train(tmp_path / "run", "--steps", 2, "--images", 1, "--weight-decay", 0)
    torch.manual_seed(0)
    fresh = vdm.build(vdm.Config(**state["config"])).state_dict()
    for name, w in state["model"].items():
        if "time" in name:
            assert torch.equal(w, fresh[name]), name
    moved = [name for name, w in state["model"].items() if not torch.equal(w, fresh[name])]
    assert any("space" in name for name in moved) and "net.input.weight" in moved


def test_init_and_train(tmp_path, trained, capsys):
    """LoRA on another run's averaged weights: those come out bit for bit, the log says what was trained, sample.py reads it."""
    old = torch.load(trained / "last.pt", weights_only=True)["ema"]
    init = "--init", trained / "last.pt"
    state = run_train(tmp_path / "lora", "--steps", 2, *init, "--adapters", "lora", "--rank", 2, "--train", "lora")
    said = capsys.readouterr().out
    n, total = (sum(w.numel() for name, w in state["model"].items() if word in name and "balance" not in name) for word in ("lora_", ""))
    total -= 17                                                        # paces, which are measured
    assert f"{n:,} of {total:,} parameters are trained ({n / total:.1%})\n" in said and "down.*.space.conv1.lora_up.weight: 2 tensors" in said
    for weights in (state["model"], state["ema"]):
        plain = {name.replace(".layer.", "."): w for name, w in weights.items()}
        assert plain.keys() - old.keys() and all(torch.equal(plain[name], w) for name, w in old.items() if "balance" not in name)
        assert all(w.abs().max() > 0 for name, w in weights.items() if "lora_up" in name)
    sample.main([str(tmp_path / "lora/last.pt"), "--n", "1", "--out", str(tmp_path / "s.gif"), "--device", "cpu"])
    # labels and SimDA's adapters that the old model had not; a run that goes on knows what it trains
    both = "--adapters", "simda", "--train", "adapters", "actions", "--labels", 18
    whole = run_train(tmp_path / "whole", "--steps", 2, *init, *both)
    longer = run_train(tmp_path / "whole", "--steps", 3, "--resume", *init)          # which does not start again
    moved = {vdm.part_of(name) for name, w in longer["model"].items() if not torch.equal(w, whole["model"][name])}
    assert moved - {"spatial"} == {"adapters", "actions"} and torch.equal(longer["model"]["net.input.weight"], old["net.input.weight"])
    # from a model with adapters to the same
    state = run_train(tmp_path / "again", "--steps", 1, "--init", tmp_path / "lora/last.pt", "--adapters", "lora", "--rank", 2, "--train", "temporal", "--seed", 5)
    assert not torch.equal(state["model"]["paces"], old["paces"])      # how far things move in its own data
    assert not any(torch.equal(w, old[name.replace(".layer.", ".")]) for name, w in state["model"].items() if name.endswith("time.layer.conv.weight"))


@cases("flags, words", [
    (["--width", 16], r"it has width 32 \(here 16\); \d+ of its \d+ tensors would fit: give the flags"),
    (["--kind", "v"], r"kind x0 \(here v\); (\d+) of its \1 tensors"), (["--patch", 2], r"patch 4 \(here 2\)"),
    (["--train", "lora"], "train is lora, but the parts of this model are actions, all, spatial, temporal"),
    (["--train", "adapters", "--adapters", "lora"], "train is adapters, but"), (["--adapters", "dora"], "adapters is 'dora'")])
def test_init_says_what_is_wrong(tmp_path, trained, flags, words):
    with pytest.raises(ValueError, match=words):
        run_train(tmp_path / "run", "--steps", 1, "--init", trained / "last.pt", *flags)
    assert not (tmp_path / "run").exists()


def test_init_from_a_model_with_more(tmp_path, trained):
    lora = tmp_path / "lora"
    run_train(lora, "--steps", 1, "--init", trained / "last.pt", "--adapters", "lora")
    with pytest.raises(ValueError, match=r"adapters lora \(here \)"):
        run_train(tmp_path / "run", "--steps", 1, "--init", lora / "last.pt")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        run_train(tmp_path / "run", "--steps", 1, "--init", tmp_path / "none.pt")


def test_spatial_layers_can_learn_slower(tmp_path):
    """Vista's phase 1, with AdamW: the first step is the rate times the sign of the gradient, a tenth of it in space."""
    flags = "--steps", 1, "--optimizer", "adamw", "--weight-decay", 0, "--warmup", 1, "--lr", 1e-3, "--gate-lr", 1e-3
    fast, slow = (run_train(tmp_path / f"{f}", *flags, "--spatial-lr", f)["model"] for f in (1.0, 0.1))
    torch.manual_seed(0)
    config = torch.load(tmp_path / "0.1/last.pt", weights_only=True)["config"]
    fresh = vdm.build(vdm.Config(**config)).state_dict()
    close(slow["net.output_detail.2.weight"] - fresh["net.output_detail.2.weight"],
          0.1 * (fast["net.output_detail.2.weight"] - fresh["net.output_detail.2.weight"]), rtol=1e-3, atol=1e-8)
    groups = train.make_optimizers(vdm.Config(**config), vdm.build(vdm.Config(**config)).net)[0].param_groups
    assert sorted(round(g["peak"], 6) for g in groups) == [1e-4, 1e-3, 1e-3] and len(groups) == 3


def test_vistas_losses_reach_the_weights(tmp_path):
    """Each strength, with masks and with whole clips, trains something else than none."""
    dynamics, structure = ["--dynamics", 1], ["--structure", 0.1]
    for whole in ([], ["--previous", "--context", 1]):
        runs = [run_train(tmp_path / f"{len(whole)}-{i}", "--steps", 2, *whole, *flags)["model"] for i, flags in
                enumerate(([], dynamics, structure, dynamics + structure, dynamics + ["--dynamics-toy"]))]
        assert all(w.isfinite().all() for run in runs for w in run.values())
        assert not any(same(runs[i], runs[j]) for i in range(5) for j in range(i))


def test_given_frames_bring_more_noise():
    """Same step, same draws: only clips with given frames see the factor, frame by frame if need be."""
    def levels(**changes):
        c = vdm.dataclasses.replace(SMALL, channels=3, batch=64, **changes)
        torch.manual_seed(0)
        denoiser = vdm.build(c)
        optimizers = train.make_optimizers(c, denoiser.net)
        data = vdm.MovingShapes(3, (8, 8))
        return train.train_step(0, c, data, denoiser, vdm.EMA(denoiser), optimizers, torch.device("cpu"), torch.float32, 0)["sigma"]

    for odds in ((1.0,), (0.0, 1.0), (0.5, 0.5)):
        ratio = levels(context=odds, given_noise=3.0) / levels(context=odds, given_noise=1.0)
        share = (ratio - 1).abs() < 1e-4
        assert ((ratio - 3).abs() < 1e-4)[~share].all() and abs(share.float().mean() - odds[0]) < 0.2
        assert odds[0] == 0.5 or share.float().mean() == odds[0]


@cases("sampler", list(vdm.SAMPLERS))
@cases("flags", [{}, dict(temporal_guidance=1.0)])
def test_evaluations_are_those_that_happen(sampler, flags):
    """Counted, by a network that knows how often it was asked."""
    config, asked = vdm.dataclasses.replace(SMALL, sampler=sampler, sampling_steps=7, **flags), []
    denoiser = vdm.build(config)
    denoiser.net.register_forward_hook(lambda *_: asked.append(1))
    train.sample(config, denoiser, 1, torch.device("cpu"), torch.float32)
    assert len(asked) == train.evaluations(config)


def test_muon_steps_are_orthogonal():
    """By the SVD of the gradient: the step has its singular vectors, and singular values that are all
    near 1 (0.7 to 1.2, Jordan et al. 2024) times the rate; matrices of as many rows do not mix."""
    shapes = (12, 30), (12, 30), (30, 12), (12, 20), (8, 4, 3, 3)
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape)
    train.Muon(params, lr=0.1).step()
    for p in params:
        u, s, v = np.linalg.svd(p.grad.flatten(1).numpy(), full_matrices=False)
        told = u.T @ -p.detach().flatten(1).numpy() @ v.T / 0.1 / max(1, p.shape[0] / p[0].numel()) ** 0.5
        assert np.abs(told - np.diag(np.diag(told))).max() < 1e-3
        assert 0.65 < np.diag(told).min() and np.diag(told).max() < 1.25 and s.max() / s.min() > 1.5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives memory back")
def test_memory_that_is_kept_is_not_asked_for_again():
    """By the kernel's count of pages (4 KiB or, on some machines, 2 MiB) first touched: 16 blocks of 8 MiB filled, freed, filled.
    (Left alone, glibc may come to keep them by itself: the environment holds it to what it starts with.)"""
    code = """if 1:
        import resource, sys, torch, train
        train.keep_memory() if sys.argv[1] == "keep" else None
        for _ in range(8):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            blocks = [torch.ones(2 ** 21) for _ in range(16)]
            del blocks
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    env = os.environ | dict(MALLOC_MMAP_THRESHOLD_="131072")
    pages = {how: int(subprocess.run([sys.executable, "-c", code, how], cwd=ROOT, capture_output=True, text=True, env=env,
                                     check=True).stdout) for how in ("keep", "not")}
    assert pages["keep"] < 50 < pages["not"], pages


def test_training_learns(tmp_path):
    """After 300 steps the estimate beats the best constant, the mean of the data, at low noise."""
    run_train(tmp_path / "run", "--steps", 300, "--batch", 8, "--no-motion")                  # else 15 % of clips are untold
    denoiser, config = vdm.load(tmp_path / "run/last.pt")
    world = vdm.MovingShapes(4, (16, 16), seed=5)
    clean = torch.stack([world[i]["video"] for i in range(32)])
    noisy = clean + 0.3 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    error = (denoiser(noisy, torch.full((32,), 0.3)) - clean).square().mean()
    assert error < 0.5 * (clean - clean.mean(0)).square().mean()


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    get = vdm.MovingShapes.__getitem__
    monkeypatch.setattr(vdm.MovingShapes, "__getitem__",
                        lambda self, i: dict(video=get(self, i)["video"] * (float("nan") if i == 9 else 1)))
    with pytest.raises(ValueError, match="the gradient is nan at step 5"):
        run_train(tmp_path / "run", "--steps", 8, "--save-every", 2)
    denoiser, _ = vdm.load(tmp_path / "run/last.pt")
    assert all(p.isfinite().all() for p in denoiser.parameters())
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 4


def test_training_on_a_folder_then_sampling(tmp_path, capsys):
    """A person's own files, end to end; the network sees what is in them (grey stays one channel)."""
    for k in range(3):
        frames = np.full((6, 20, 30, 1), 40 * k, np.uint8)
        np.save(tmp_path / f"clip{k}.npy", frames)
    run_train(tmp_path / "run", "--steps", 2, "--data", tmp_path, "--channels", 1)
    assert "3 clips used" in capsys.readouterr().out
    sample.main([str(tmp_path / "run/last.pt"), "--n", "2", "--device", "cpu", "--out", str(tmp_path / "s.mp4")])
    assert iio.imread(tmp_path / "s.gif").shape[-1] == 3 and (tmp_path / "s/001.mp4").exists()


def test_train_tells_labels_and_actions(tmp_path, monkeypatch):
    """What the loss is told is what the data says, or withheld at the rate that was asked for (of an
    action all at once, and each mode); with --previous it is told of the second half."""
    seen, loss = [], vdm.diffusion_loss
    keep = lambda net, clean, *args, **told: seen.append((clean, told)) or loss(net, clean, *args, **told)
    monkeypatch.setattr(vdm, "diffusion_loss", keep)
    common = "--steps", 1, "--batch", 64, "--sampling-steps", 1
    for data, world, key, rest in (("shapes", vdm.MovingShapes, "label", ["--labels", 18]),
                                   ("drive", vdm.Drive, "action", []),
                                   ("drive", vdm.Drive, "action", ["--previous", "--context", 1])):
        seen.clear()
        run_train(tmp_path / data / key / str(len(rest)), "--data", data, "--drop", 0.25, *common, *rest,
                  *["--mode-drop", 0.5, 0.1] * (key == "action"))
        clean, options = seen[-1]
        items = [world(8 if "--previous" in rest else 4, (16, 16), seed=0)[i] for i in range(64)]
        assert torch.equal(clean, torch.stack([item["video"][-4:] for item in items]))
        truth = [torch.as_tensor(item[key]) for item in items]
        if key == "label":
            share = np.mean([told == true for told, true in zip(options[key], truth)])
            assert all(told in (-1, true) for told, true in zip(options[key], truth))
        else:
            ones = [torch.equal(told[:, :4], true[-4:, :4]) for told, true in zip(options[key], truth)]
            share = np.mean(ones)
            assert all(one or told[:, :4].isnan().all() for one, told in zip(ones, options[key]))
        assert abs(share - (0.75 if key == "label" else 0.75 * 0.5)) < 0.2           # of 64, 3.2 deviations


def run_loud(out, *flags):
    """A run whose weights are then random: a label or action cannot be overheard."""
    state = run_train(out, "--steps", 2, *flags)
    denoiser = randomize(vdm.build(vdm.Config(**state["config"])), gates=True)
    if denoiser.net.embed_label:
        nn.init.zeros_(denoiser.net.embed_label.weight[0])
    vdm.save(out / "last.pt", **dict(state, ema=denoiser.state_dict()))
    return out


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return run_loud(tmp_path_factory.mktemp("drive") / "run", "--data", "drive")


def test_sample_drives(driver, tmp_path, capsys):
    """Letters, or the same numbers in a file, make a video of their length; other letters, another,
    from the first frame that they change on."""
    assert json.loads((driver / "config.json").read_text())["actions"] == [4, 2]
    commands = ["LSR".index(c) if c in "LSR" else 3 for c in "LLSSRRX"]
    np.save(tmp_path / "a.npy", vdm.Drive.ACTIONS[commands])
    texts = "LLSSRRX", tmp_path / "a.npy", "LLSSRRL", "X" * 7
    a, same, end, other = (run_sample(driver, tmp_path / f"{i}.mp4", "--n", 1, "--actions", text)[0]
                           for i, text in enumerate(texts))
    assert len(a) == 7 and torch.equal(a, same)
    assert (a - end)[:4].abs().mean() < 0.002 < (a - end)[6].abs().mean()      # the first window
    assert (a - other)[0].abs().mean() > 0.002
    run_sample(driver, tmp_path / "long.mp4", "--n", 1, "--actions", "LSRX", "--length", 4, "--guidance", 2)
    capsys.readouterr()
    train.main([*FLAGS, "--out", str(tmp_path / "run"), "--data", "drive", "--steps", "1"])
    said = capsys.readouterr().out
    assert "Drive: made in code" in said and re.search(r"frames that obey +\d+% +100%", said)
    command = re.search(r"python sample.py (.*)", said[said.index("next"):])[1].split()
    sample.main([*command, "--device", "cpu", "--out", str(tmp_path / "next.mp4")])


@cases("data, jump, guidance", [("shapes", 2.5, 2), ("drive", 0, 1), ("a.mp4", 0, 2)])
def test_how_to_sample_depends_on_the_data(data, jump, guidance):
    """A shape's past tells its future; a car that is guided hardly stops. A flag wins over both, and a clip costs the same."""
    config, same = (train.parse(["--data", data, *flags])[1] for flags in ([], ["--jump", "3", "--temporal-guidance", "1.2"]))
    assert (config.jump, config.temporal_guidance, train.evaluations(config)) == (jump, guidance, 40)
    assert (same.jump, same.temporal_guidance) == (3, 1.2)


def test_sample_rewards_and_guides_actions(driver, tmp_path, monkeypatch, capsys):
    """The reward is exp(-variance) of what generate made; with --keep-frames the free estimate is told the frames, and no action."""
    made, generate, free = [], vdm.generate, []
    monkeypatch.setattr(vdm, "generate", lambda *args, **options: made.append(generate(*args, **options)) or made[-1])
    run_sample(driver, tmp_path / "a.mp4", "--n", 3, "--actions", "LSRX")
    said = float(re.search(r"reward  (\S+) of these actions", capsys.readouterr().out)[1])
    assert said == pytest.approx(np.exp(-made[0].clamp(-1, 1).numpy().var(0, ddof=1).mean()), abs=0.002) and 0.05 < said < 0.999
    heard = vdm.VideoUNet.forward
    listen = lambda self, x, c_noise, **told: free.append("action" in told) or heard(self, x, c_noise, **told)
    monkeypatch.setattr(vdm.VideoUNet, "forward", listen)
    shown, ask = [], vdm.Denoiser.forward
    monkeypatch.setattr(vdm.Denoiser, "forward", lambda self, x, sigma, **told: shown.append("mask" in told) or ask(self, x, sigma, **told))
    np.save(tmp_path / "clip.npy", vdm.to_uint8(vdm.Drive(2, (16, 16))[0]["video"]))
    for flags, frames in (([], {False, True}), (["--keep-frames"], {True})):
        free.clear(), shown.clear()
        run_sample(driver, tmp_path / "b.mp4", "--n", 1, "--actions", "LSRX", "--context", tmp_path / "clip.npy", "--guidance", 2, *flags)
        assert set(free) == {False, True} and set(shown) == frames


def test_sample_by_temporal_guidance(driver, tmp_path):
    """The checkpoint's own is 1, none, for Drive; any other makes another video."""
    a, same, more = (run_sample(driver, tmp_path / f"{i}.mp4", "--n", 1, *flags)[0] for i, flags in enumerate((
        [], ["--temporal-guidance", 1], ["--temporal-guidance", 1.6])))
    assert torch.equal(a, same) and (a - more).abs().mean() > 0.002


@cases("flags, words", [
    (["--actions", "LSRQ"], "--actions is 'LSRQ', expected letters of LSRX"), (["--actions", ""], "--actions is empty"),
    (["--actions", "LSR", "--length", "4"], "--actions has 3 frames, but --length is 4"),
    (["--actions", "bad.npy"], r"bad.npy is of shape \(3, 5\), but .* on 6 numbers per frame"),
    (["--actions", "empty.npy"], "--actions empty.npy cannot be read"), (["--actions", "no.npy"], "no.npy cannot be read"),
    (["--actions", "LSRX", "--interpolate", "2", "--context", "bad.npy"], "no --length or --actions"),
    (["--label", "0"], "--label is 0, but .* knows 0 labels"),
])
def test_sample_says_what_is_wrong_with_actions(driver, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    np.save("bad.npy", np.zeros((3, 5)))
    Path("empty.npy").touch()
    with pytest.raises(ValueError, match=words):
        sample.main([str(driver / "last.pt"), *flags])


def test_sample_a_picture_with_actions(tmp_path):
    """Fewer commands than a window has frames make a shorter video, another last command another last frame alone."""
    run = run_loud(tmp_path / "run", "--data", "drive", "--task", "image", "--context-noise", 0.1)
    vdm.write_video(tmp_path / "a.png", vdm.Drive(1, (16, 16))[0]["video"], scale=1)
    left, right = (run_sample(run, tmp_path / f"{word}.mp4", "--n", 1, "--context", tmp_path / "a.png", "--actions", word)[0]
                   for word in ("LL", "LR"))
    assert len(left) == len(right) == 2 and (left - right).abs().mean() > 0


def test_the_next_command_is_one_that_works(tmp_path, capsys):
    """A model that was given one frame at most cannot go on window by window with an overlap of 2."""
    for context, flag in (((0.5, 0.5), "--context FILE"), ((0.5, 0, 0.5), "--length 16")):
        run_train(tmp_path / flag, "--steps", 1, "--context", *context)
        assert capsys.readouterr().out.strip().endswith(f"--n 16 {flag}")
    run_train(tmp_path / "run", "--steps", 1)
    command = re.search(r"next    python sample.py (.*)", capsys.readouterr().out)[1].split()
    sample.main([*command, "--device", "cpu", "--out", str(tmp_path / "next.mp4")])
    assert len(list((tmp_path / "next").iterdir())) == 16


def test_sample_by_label(tmp_path):
    run = run_loud(tmp_path / "run", "--labels", 18)
    videos = [run_sample(run, tmp_path / f"{k}.mp4", "--n", 1, *flags)[0]
              for k, flags in enumerate((["--label", 0], ["--label", 17], ["--label", 17, "--guidance", 0], []))]
    assert (videos[0] - videos[1]).abs().mean() > 0.002
    assert (videos[2] - videos[3]).abs().mean() < 0.001                # guidance 0 is as if not told
    for wrong in (-1, 18):
        with pytest.raises(ValueError, match=f"--label is {wrong}, but .* knows 18 labels, counted from 0"):
            run_sample(run, tmp_path / "a.mp4", "--label", wrong)


def test_training_on_a_folder_with_actions(tmp_path):
    """Numbers of a person's own, from the file beside the clip to a video that is told others."""
    np.save(tmp_path / "clip.npy", flat(9, 16, 16))
    np.save(tmp_path / "clip.actions.npy", np.random.randn(9, 3))
    run_train(tmp_path / "run", "--steps", 2, "--data", tmp_path / "clip.npy")
    np.save(tmp_path / "told.npy", np.zeros((5, 3)))
    assert len(run_sample(tmp_path / "run", tmp_path / "a.mp4", "--n", 1, "--actions", tmp_path / "told.npy")[0]) == 5
    with pytest.raises(ValueError, match=r"--labels is 0 and --actions \(2, 2\), but the data has 0 labels and actions \(3,\)"):
        run_train(tmp_path / "other", "--steps", 2, "--data", tmp_path / "clip.npy", "--actions", 2, 2)


def run_sample(trained, out, *flags):
    sample.main([str(trained / "last.pt"), "--device", "cpu", "--dtype", "fp32", "--out", str(out), *map(str, flags)])
    return [vdm.read_video(p, (16, 16)) for p in sorted(out.with_suffix("").glob("*"))]


def test_sample_lengths_seeds_and_batches(trained, tmp_path):
    """Video 2 is the same whatever batch it is drawn in; lengths are what was asked for."""
    together = run_sample(trained, tmp_path / "a.mp4", "--n", 3, "--length", 11)
    one_by_one = run_sample(trained, tmp_path / "b.mp4", "--n", 3, "--length", 11, "--batch", 1)
    other = run_sample(trained, tmp_path / "c.mp4", "--n", 3, "--length", 11, "--seed", 1)
    assert [len(v) for v in together] == [11] * 3
    assert (together[2] - one_by_one[2]).abs().mean() < 0.002 < (together[2] - other[2]).abs().mean()


def test_sample_puts_every_frame_in_its_place(trained, tmp_path, monkeypatch):
    """Three videos of known brightness in two batches and in pieces of uneven length; a GIF of so many frames is not written,
    and the strip shows every third one."""
    light = torch.rand(3, 70) * 1.8 - 0.9

    def rollout(denoiser, length, *_, clips, **options):
        yield from light[list(clips), :, None, None, None].expand(-1, -1, 3, 16, 16).split([4, 30, 1, 35], 1)

    monkeypatch.setattr(vdm, "rollout", rollout)
    videos = run_sample(trained, tmp_path / "a.mp4", "--n", 3, "--batch", 2, "--length", 70)
    assert (torch.stack(videos).mean((2, 3, 4)) - light).abs().max() < 0.05
    grid = iio.imread(tmp_path / "a.mp4", plugin="FFMPEG")                                 # 2 x 2 cells of 17 x 17 pixels
    k = grid.shape[1] // 35
    for i in range(3):
        seen = grid[:, (17 * (i // 2) + 9) * k, (17 * (i % 2) + 9) * k].mean(-1) / 127.5 - 1
        assert np.abs(seen - light[i].numpy()).max() < 0.05
    strip = np.asarray(Image.open(tmp_path / "a.png"))
    assert strip.shape == (2 * (3 * 17 + 1), 2 * (24 * 17 + 1), 3) and not (tmp_path / "a.gif").exists()
    assert np.abs(strip[18, 2 * 9 :: 2 * 17].mean(-1) / 127.5 - 1 - light[0, ::3].numpy()).max() < 0.01


def test_sample_continues_a_clip_and_a_picture(trained, tmp_path):
    """The frames given come first in the result, and other frames give another video."""
    world = vdm.MovingShapes(4, (16, 16))
    for k, name in enumerate(("clip", "clip1")):
        np.save(tmp_path / f"{name}.npy", vdm.to_uint8(world[k]["video"]))
    videos = [run_sample(trained, tmp_path / f"{c}.mp4", "--n", 1, "--context", tmp_path / f"{c}.npy", "--length", 7,
                         "--guidance", 1.5)[0] for c in ("clip", "clip1")]
    given = vdm.read_video(tmp_path / "clip.npy")[-2:]           # the model was trained on two given frames
    assert (videos[0][:2] - given).abs().mean() < 0.05           # what H.264 loses
    assert (videos[0][2:] - videos[1][2:]).abs().mean() > 0.0001


def test_sample_takes_every_nth_frame_as_training_did(tmp_path):
    """A model of every third frame goes on from every third of a clip, up to its last."""
    clip = vdm.to_uint8(vdm.MovingShapes(12, (16, 16))[0]["video"])
    np.save(tmp_path / "clip.npy", clip)
    run_train(tmp_path / "run", "--steps", 1, "--stride", 3, "--data", tmp_path / "clip.npy")
    video, = run_sample(tmp_path / "run", tmp_path / "a.mp4", "--n", 1, "--context", tmp_path / "clip.npy")
    assert (video[:2] - vdm.from_uint8(clip[[8, 11]])).abs().mean() < 0.05 < (video[:2] - vdm.from_uint8(clip[10:])).abs().mean()


def test_sample_keeps_the_first_frames_in_sight(tmp_path, monkeypatch):
    """A model trained so goes on with anchors, a tenth of its noise, and a jump, but for what it was not trained to do."""
    data, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda i, config, items, *more: data.append(items) or step(i, config, items, *more))
    run_train(tmp_path / "run", "--steps", 1, "--frames", 6, "--context", 0.2, 0, 0, 0.4, 0.4, "--overlap", 4)
    np.save(tmp_path / "clip.npy", vdm.to_uint8(vdm.MovingShapes(6, (16, 16))[0]["video"]))      # 6 frames are enough
    run_train(tmp_path / "own", "--steps", 1, "--frames", 6, "--context", 0.2, 0, 0, 0.4, 0.4, "--overlap", 4,
              "--data", tmp_path / "clip.npy")
    assert data[0][0]["video"].shape[0] == data[-1][0]["video"].shape[0] == 24                   # 18 of them before
    told, rollout = [], vdm.rollout
    monkeypatch.setattr(vdm, "rollout", lambda *args, **options: told.append(options) or rollout(*args, **options))
    seen = lambda *flags: run_sample(tmp_path / "run", tmp_path / "a.mp4", "--n", 1, *flags) and (
        told[-1]["anchors"], told[-1]["context_noise"], told[-1]["jump"])
    assert seen("--length", 8, "--overlap", 4) == (2, 0.1, 2.5)
    assert seen("--length", 8, "--overlap", 4, "--context-noise", 0.5, "--jump", 1) == (2, 0.5, 1)
    assert seen("--length", 8, "--overlap", 4, "--reconstruction", 1) == (0, 0, 0)
    assert vdm.load(tmp_path / "own/last.pt")[1].jump == 0             # there, what comes need not follow from what was
    with pytest.raises(ValueError, match=r"trained on \[4\] given frames, not on overlap 3"):
        seen("--length", 8, "--overlap", 3)
    with pytest.raises(ValueError, match="context-noise is 0, expected more than 0 to the 1 that .* was trained with"):
        seen("--length", 8, "--overlap", 4, "--context-noise", 0)          # it has never been given the others clean


def test_sample_guidance(trained, tmp_path, monkeypatch):
    """What the flags say is what generate is told: in a window of 4 frames the thirds of 1 to 2.5."""
    np.save(tmp_path / "clip.npy", vdm.to_uint8(vdm.MovingShapes(4, (16, 16))[0]["video"]))
    told, generate = [], vdm.generate
    monkeypatch.setattr(vdm, "generate", lambda *args, **options: told.append(options) or generate(*args, **options))
    for shape, want in dict(constant=2.5, ramp=[1, 1.5, 2, 2.5], triangle=[1, 2, 2, 1]).items():
        run_sample(trained, tmp_path / f"{shape}.mp4", "--n", 1, "--context", tmp_path / "clip.npy",
                   "--guidance", 2.5, "--guidance-shape", shape, "--rescale", 0.6)
        assert torch.as_tensor(told[-1]["guidance"]).tolist() == pytest.approx(want) and told[-1]["rescale"] == 0.6
    run_sample(trained, tmp_path / "xt.mp4", "--n", 1, "--context", tmp_path / "clip.npy", "--guidance", 1.5, 3, "--guidance-shape", "ramp")
    assert told[-1]["guidance"].tolist() == pytest.approx([1.5, 2, 2.5, 3])          # SVD-XT's, at four frames


def test_sample_interpolates(tmp_path, monkeypatch):
    """Factor 3 makes 10 frames of 4; every third is a frame of the clip. 2 and then 3 make 7 and then 19."""
    run_train(tmp_path / "run", "--steps", 1, "--task", "any")
    clip = vdm.MovingShapes(4, (16, 16))[0]["video"]
    np.save(tmp_path / "clip.npy", vdm.to_uint8(clip))
    video, = run_sample(tmp_path / "run", tmp_path / "a.mp4", "--n", 1, "--context", tmp_path / "clip.npy",
                        "--interpolate", 3)
    assert len(video) == 10 and (video[::3] - clip).abs().mean() < 0.05
    monkeypatch.setattr(vdm, "interpolate", lambda _, keys, factor, *more, **options: keys.repeat_interleave(factor, 1)[:, factor - 1:])
    video, = run_sample(tmp_path / "run", tmp_path / "c.mp4", "--n", 1, "--context", tmp_path / "clip.npy", "--interpolate", 2, 3)
    twice = clip[[0, 1, 1, 2, 2, 3, 3]]                                # what the stand-in makes of 4 frames, then of these 7
    assert len(video) == 19 and (video - twice[[0, *(k for k in range(1, 7) for _ in range(3))]]).abs().mean() < 0.05
    seeds, stand_in = [], vdm.interpolate
    monkeypatch.setattr(vdm, "interpolate", lambda _, keys, factor, frames, sigmas, seed, *more, **o: seeds.append(seed) or stand_in(_, keys, factor))
    video, = run_sample(tmp_path / "run", tmp_path / "d.mp4", "--n", 1, "--context", tmp_path / "clip.npy", "--interpolate", 2, 3,
                        "--context-frames", 3, "--seed", 7)
    assert seeds == [7, 8] and len(video) == 13 and (video[[0, -1]] - clip[[1, 3]]).abs().mean() < 0.05        # the last three
    for factors in ((2, 4), (1,)):                                     # before anything is drawn
        with pytest.raises(ValueError, match=f"--interpolate is {' '.join(map(str, factors))}, expected factors of 2 to 3"):
            run_sample(tmp_path / "run", tmp_path / "b.mp4", "--context", tmp_path / "clip.npy", "--interpolate", *factors)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="fills in between frames, but --context gives 1"):
        run_sample(tmp_path / "run", tmp_path / "b.mp4", "--context", tmp_path / "clip.npy",
                   "--interpolate", 3, "--context-frames", 1)


def test_sample_tells_how_far_things_move(trained, tmp_path, monkeypatch, capsys):
    """One rank for all videos if it is asked for, even 0; else one each, or that of a clip that is given; a model that was never
    told refuses it, and none is told in an interpolation."""
    told, generate, paces = [], vdm.generate, vdm.load(trained / "last.pt")[0].paces
    monkeypatch.setattr(vdm, "generate", lambda *a, **o: told.append(o.get("motion")) or generate(*a, **o))
    for rank in (0, 0.25, 1):
        run_sample(trained, tmp_path / "a.mp4", "--n", 2, "--length", 6, "--motion", rank)
        assert f"motion  {rank:.0%} of the clips trained on move less: by {paces[int(16 * rank)]:.1%} of" in capsys.readouterr().out
        assert len(told) == 2 and all(motion.tolist() == [rank, rank] for motion in told)
        told.clear()
    run_sample(trained, tmp_path / "a.mp4", "--n", 2)
    assert len(told) == 1 and told[0][0] != told[0][1] and ((told[0] > 0) & (told[0] < 1)).all()
    np.save(tmp_path / "clip.npy", vdm.to_uint8(vdm.MovingShapes(4, (16, 16), seed=9)[0]["video"]))
    given = vdm.read_video(tmp_path / "clip.npy", (16, 16))[-2:]
    run_sample(trained, tmp_path / "a.mp4", "--n", 2, "--context", tmp_path / "clip.npy")
    want = np.interp(vdm.motion_score(given[None]).item(), paces, np.linspace(0, 1, 17))
    assert told[1].tolist() == pytest.approx([want, want], abs=1e-3)
    run_train(tmp_path / "image", "--steps", 2, *WAYS["image"].split())
    told.clear()                                                       # of the pictures train.py draws
    run_sample(tmp_path / "image", tmp_path / "a.mp4", "--n", 2, "--context", tmp_path / "clip.npy")
    assert told[0][0] != told[0][1] and ((told[0] > 0) & (told[0] < 1)).all()
    run_train(tmp_path / "still", "--steps", 2, "--no-motion")
    with pytest.raises(ValueError, match="--motion does nothing here: it needs a model trained with --motion"):
        run_sample(tmp_path / "still", tmp_path / "a.mp4", "--motion", 0)


WAYS = {                                # flags of train.py; whether a picture or a clip is given
    "noise": "--context-noise 0.5", "image": "--task image --context-noise 0.1",
    "upsample": "--task upsample --context-noise 0.1", "ends": "--task ends --give replace",
    "any": "--task any --give per_frame --context-noise 0.2", "free": "--context 1.0",
    "independent": "--context 1.0 --give per_frame --independent 0.5"}


@cases("way", WAYS)
def test_every_way_trains_and_samples(tmp_path, way, capsys):
    """A few steps; then sample.py, by every way that is open to the model; what is given stays. The
    same weights at random (gates and all) must react to what they are given."""
    run_train(tmp_path / "run", "--steps", 3, *WAYS[way].split())
    world = vdm.MovingShapes(4, (16, 16))
    clips = torch.stack([world[k]["video"] for k in range(2)])
    for k in range(2):
        np.save(tmp_path / f"{k}.npy", vdm.to_uint8(clips[k]))
    sampled = partial(run_sample, tmp_path / "run", tmp_path / "a.mp4", "--n", 1, "--context", tmp_path / "0.npy")
    if way == "image":
        video, = sampled("--guidance", 1.5)
        assert len(video) == 4 and (video[0] - clips[0, -1]).abs().mean() < 0.05
    elif way == "upsample":
        video, = sampled("--context-noise", 0.02)
        assert len(video) == 4 and "noise of 0.02" in capsys.readouterr().out
        shades = 30 * np.arange(7, dtype=np.uint8)[:, None, None, None]                        # 7 frames, of which the first 4 count
        np.save(tmp_path / "7.npy", np.broadcast_to(shades, (7, 4, 4, 3)))
        with pytest.MonkeyPatch.context() as patch:
            shown, draw = [], vdm.draw_context
            patch.setattr(vdm, "draw_context", lambda clean, *args: shown.append(clean) or draw(clean, *args))
            sampled("--context", tmp_path / "7.npy")
        assert "noise of 0.05" in capsys.readouterr().out              # half of what it was trained with
        close(shown[0][0, :, 0, 0, 0], torch.arange(4) * 30 / 127.5 - 1)
        for flags, words in ((("--context-noise", 0), "is 0, expected more than 0 to the 0.1"),
                             (("--context-noise", 0.2), "is 0.2, expected more than 0"),
                             (("--context-frames", 2), "--context-frames does nothing here"),
                             (("--length", 9), "trained on no given frames"), (("--interpolate", 2), "trained with --task any")):
            with pytest.raises(ValueError, match=words):
                sampled(*flags)
    elif way == "free":
        video, = sampled("--reconstruction", 2, "--length", 9)
        assert len(video) == 9 and (video[:3] - clips[0, 1:]).abs().mean() < 0.05
    elif way == "ends":
        assert "a.mp4" not in capsys.readouterr().out
        with pytest.raises(ValueError, match="trained on no given frames .--task ends.: .* try --interpolate"):
            sampled()
        with pytest.raises(ValueError, match="or, to be 3, with --task ends"):
            sampled("--interpolate", 2)
        video, = sampled("--interpolate", 3)
        assert len(video) == 10 and (video[::3] - clips[0]).abs().mean() < 0.05
    else:
        n = 2 if way == "noise" else 3
        video, = sampled("--context-noise", 0.2, "--length", 9, "--overlap", 2)
        assert len(video) == 9 and (video[:n] - clips[0, -n:]).abs().mean() < 0.05
    if way in ("any", "independent"):
        video, = sampled("--interpolate", 3)
        assert (video[::3] - clips[0]).abs().mean() < 0.05

    denoiser, config = vdm.load(tmp_path / "run/last.pt")
    randomize(denoiser.net, gates=True)
    level, noise = torch.full((2,), config.context_noise or 0.0), torch.randn(2, 4, 3, 16, 16)
    task = "predict" if way in ("free", "independent") else config.task
    made = []
    for given in (clips, clips.flip(0)):
        context, mask = vdm.draw_context(given, vdm.draw_mask(2, 4, (0, 1), task), task, level, noise)
        if task == "any":
            context, mask = given, torch.tensor([[1.0, 0, 0, 1]] * 2)
        made.append(vdm.generate(denoiser, noise.shape, vdm.karras_sigmas(3, 0.2, 60), "ddim", context=context,
                                 mask=mask, reconstruction=float(way == "free")))
        kept = mask == 1
        assert torch.equal(made[-1][kept], given[kept])
    open = mask < 1
    assert ((made[0] - made[1])[open].abs().amax((1, 2, 3)) > 1e-4).all()


def test_training_levels_per_frame(tmp_path, monkeypatch):
    """As the loss gets them: 0 where a frame is given, that of the noise on a hint, else the clip's."""
    calls, loss = [], vdm.diffusion_loss
    monkeypatch.setattr(vdm, "diffusion_loss", lambda denoiser, clean, **o: calls.append((clean, o)) or loss(
        denoiser, clean, **o))
    run_train(tmp_path / "a", "--steps", 2, "--give", "per_frame", "--context", 1e-9, 0, 1, "--context-noise", 2)
    run_train(tmp_path / "b", "--steps", 2, "--give", "per_frame", "--independent", 1)
    hinted, exact = calls[:4], calls[4:]                               # with the two of the rehearsal
    for clean, o in hinted:
        level, given = o["sigma"], (o["context"] - clean)[:, :2]
        assert level.shape == (2, 4) and ((0 < level[:, 0]) & (level[:, 0] < 2)).all()
        assert (level[:, 0] == level[:, 1]).all() and (level[:, 2] == level[:, 3]).all()
        close(given.std((1, 2, 3, 4)), level[:, 0], rtol=0.1, atol=0)
        close(1 / o["mask"][:, 0] - 1, level[:, 0])
    for clean, o in exact:
        given = o["mask"] == 1
        assert (o["sigma"][given] == 0).all() and torch.equal(o["context"], clean)
        assert len(o["sigma"][~given].unique()) == (~given).sum()      # every frame has its own


@cases("previous", [False, True])
def test_training_at_several_rates(monkeypatch, previous):
    """A clip is every frame or every third from the item's start, either as often, with what these frames were told."""
    frames, seen = 8 if previous else 4, []
    name = "joint_loss" if previous else "diffusion_loss"
    loss, ticks = getattr(vdm, name), torch.arange(3.0 * frames - 2) / 10
    monkeypatch.setattr(vdm, name, lambda denoiser, clean, **o: seen.append((clean, o)) or loss(denoiser, clean, **o))
    config = vdm.Config(size=(16, 16), frames=4, width=8, head_dim=8, mults=(1, 1), attention=(), joint=(), patch=4, batch=256,
                        context=(1.0,), rates=(1, 3), actions=(1,), drop=0.0, mode_drop=(0.0,), previous=previous)
    item = dict(video=ticks[:, None, None, None].expand(-1, 3, 16, 16), action=ticks[:, None])
    denoiser = vdm.build(config)
    train.train_step(0, config, collections.defaultdict(lambda: item), denoiser, vdm.EMA(denoiser),
                     train.make_optimizers(config, denoiser.net), torch.device("cpu"), torch.float32, 0)
    (clean, o), = seen
    whole = torch.cat([o["previous"], clean], 1) if previous else clean
    shown = (10 * whole[:, :, 0, 0, 0]).round().int()                  # which frames of the item
    assert torch.equal(shown[:, -4:], (10 * o["action"][..., 0]).round().int())
    slow = (shown == torch.arange(frames)).all(1)
    assert (shown[~slow] == 3 * torch.arange(frames)).all() and 0.4 < slow.float().mean() < 0.6


@cases("rates, anchor", [((1,), 1.0), ((1,), 0.0), ((2, 1), 1.0)])
def test_training_tells_how_far_things_move(monkeypatch, rates, anchor):
    """The rank, by numpy, of the score of the frames in a row that end an item, whatever is put in their place as anchors, among
    those of 256 items; it is withheld from half of the clips."""
    told, loss = [], vdm.diffusion_loss
    monkeypatch.setattr(vdm, "diffusion_loss", lambda denoiser, clean, **o: told.append(o["motion"]) or loss(denoiser, clean, **o))
    config = vdm.Config(width=8, head_dim=8, mults=(1, 1), attention=(), joint=(), patch=4, batch=128, rates=rates, anchor=anchor,
                        context=(0.4, 0, 0, 0, 0.6), drop=0.5)
    need = train.earlier(config) + 7 * max(rates) + 1
    data, denoiser = vdm.MovingShapes(need, seed=4), vdm.build(config)
    assert need == 8 * (1 + 3 * (anchor > 0)) + 7 * (max(rates) - 1)
    assert (denoiser.paces == -1).all()                                # the first step measures them
    chance = train.draw(0, vdm.dataclasses.replace(config, batch=256, size=(1, 1)), 0)
    rows = [{name: x[i : i + 1] for name, x in chance.items()} for i in range(256)]
    rate = lambda drawn: int(drawn["rate"][0]) if len(rates) > 1 else 1
    first = need - 7 * max(rates) - 1                                  # where the frames that are learnt start
    score = lambda i, rate: vdm.motion_score(data[i]["video"][None, first : first + 7 * rate + 1 : rate]).item()
    want = np.quantile([score(i, rate(row)) for i, row in enumerate(rows)], np.linspace(0, 1, 17))
    ema = vdm.EMA(denoiser)
    train.train_step(0, config, data, denoiser, ema, train.make_optimizers(config, denoiser.net), torch.device("cpu"),
                     torch.float32, 0)
    close(denoiser.paces, torch.from_numpy(want).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(denoiser.paces, ema.model.paces)
    chance, (motion,) = train.draw(0, config, 0), told
    held = motion == -1
    assert 0.35 < held.float().mean() < 0.65
    ranks = [np.interp(score(i, rate({k: x[i : i + 1] for k, x in chance.items()})), want, np.linspace(0, 1, 17)) for i in range(128)]
    close(motion[~held], torch.tensor(ranks).float()[~held], rtol=0, atol=1e-3)


@cases("frames, rate", [(16, 1), (7, 1), (6, 1), (24, 2)])
def test_training_with_the_first_frames_of_any_time_before(tmp_path, monkeypatch, frames, rate):
    """The loss gets frames in a row, but for the first two where 4 are given: each from the start of the clip on is as likely.
    The others that are given have noise."""
    class Clock:
        """Of its items frame t shows t / 10, and is told it."""
        def __init__(self, n, size, seed=0):
            self.labels, self.actions = 0, (1,)

        def __getitem__(self, i):
            t = torch.arange(float(frames)) / 10
            return dict(video=t[:, None, None, None].expand(frames, 3, 16, 16), action=t[:, None])

    calls, loss = [], vdm.diffusion_loss
    monkeypatch.setattr(vdm, "diffusion_loss", lambda denoiser, clean, **o: calls.append((clean, o)) or loss(
        denoiser, clean, **o))
    config = vdm.Config(size=(16, 16), frames=6, width=8, head_dim=8, mults=(1, 1), attention=(), joint=(), patch=4, batch=512,
                        context=(0.25, 0, 0, 0.25, 0.5), actions=(1,), drop=0.0, mode_drop=(0.0,), rates=(rate,))
    assert config.anchors == 2
    denoiser = vdm.build(config)
    train.train_step(0, config, Clock(6, 16), denoiser, vdm.EMA(denoiser), train.make_optimizers(config, denoiser.net),
                     torch.device("cpu"), torch.float32, 0)
    (clean, o), = calls
    shown, given = (10 * clean[:, :, 0, 0, 0]).round().int(), (o["mask"] > 0).sum(1)
    assert torch.equal(shown, (10 * o["action"][..., 0]).round().int())
    here = frames - 5 * rate - 1                                       # where the window of 6 starts
    assert (shown[:, 2:] == here + rate * torch.arange(2, 6)).all() and (shown[:, 1] == shown[:, 0] + rate).all()
    assert (shown[given < 4, 0] == here).all()
    share = shown[given == 4, 0].bincount(minlength=here + 1) / (given == 4).sum()
    assert len(share) == here + 1 and (share - 1 / len(share)).abs().max() < 0.08
    assert (o["mask"][given > 0, :2] == 1).all() and torch.equal(o["context"][given > 0, :2], clean[given > 0, :2])
    level = 1 / o["mask"][given == 4, 2] - 1
    close(o["mask"][given == 4, 2], o["mask"][given == 4, 3])
    close((o["context"] - clean)[given == 4, 2:4].std((1, 2, 3, 4)), level, rtol=0.15, atol=1e-3)
    assert 0 < level.min() < 0.05 < 0.95 < level.max() < 1             # tiny's anchor is 1


@cases("flags, words", [
    (["--length", "1", "--context", "CLIP"], "--length is 1, but --context gives 2 frames, which come first"),
    (["--context", "CLIP", "--context-frames", "1"], r"trained on \[2\] given frames"),
    (["--length", "9", "--overlap", "3"], r"trained on \[2\] given frames, not on overlap 3"),
    (["--interpolate", "4", "--context", "CLIP"], "trained with --task any .* not predict"),
    (["--context", "nothing.mp4"], "nothing.mp4"),
    (["--context", "CLIP", "--context-noise", "0.1"], "context-noise is 0.1, expected 0 to the 0 that .* was trained"),
    (["--context-noise", "0.1"], "--context-noise does nothing here: it needs --context or --length above 4"),
    (["--reconstruction", "1"], "--reconstruction does nothing here: it needs --context or --length above 4"),
    (["--reconstruction", "1", "--length", "9", "--guidance", "2"], "--guidance does nothing here: it needs --label, --actions or"),
    (["--guidance", "2"], "--guidance does nothing here: it needs .* --context or --length above 4"),
    (["--context", ""], "--context is empty"), (["--fps", "0"], "--fps is 0, expected 0.1 to 1000"), (["--fps", "nan"], "--fps is nan"),
    (["--context", "OUT", "--out", "OUT"], "clip.mp4 might be overwritten by what is written to .*clip.mp4: name another --out"),
    (["--guidance", "2", "--length", "9", "--keep-frames"], "--guidance does nothing here"),
    (["--guidance", "1", "2", "--length", "9"], r"\[1.0, 2.0\], expected one number or, with --guidance-shape ramp or triangle, two"),
    (["--keep-frames", "--length", "9"], "--keep-frames does nothing here: it needs a --guidance other than 1"),
    (["--rescale", "0.7"], "--rescale does nothing here"), (["--guidance-shape", "ramp"], "--guidance-shape does nothing here"),
    (["--length", "9", "--overlap", "0"], "--overlap is 0, expected 1 or more"),
    (["--overlap", "2"], "--overlap does nothing here: it needs --length above 4"),
    (["--jump", "1"], "--jump does nothing here: it needs --context or --length above 4, and neither"),
    (["--context", "CLIP", "--jump", "1", "--temporal-guidance", "2"], "temporal-guidance is 2, but here every .* add --jump 0"),
    (["--context-frames", "1"], "--context-frames does nothing here: it needs --context"),
    (["--interpolate", "2", "--context", "CLIP"], "trained with --task any"),
    (["--out", "FOLDER"], "for a file and a folder, .*clip, but .*clip.gif is a folder: name another"),
    (["--out", "TAKEN"], "for a file and a folder, .*taken, but .*taken is a file: name another"),
    (["--reconstruction", "-1", "--length", "9"], "--reconstruction is -1, expected 0 or more"),
    (["--length", "9", "--guidance", "nan"], "--guidance is nan, expected 0 or more"), (["--seed", "-1"], "--seed is -1, expected 0"),
    (["--length", "9", "--jump", "inf"], "--jump is inf, expected 0 or more"), (["--steps", "0"], "--steps is 0, expected 1 or more"),
    (["--context", "CLIP", "--context-frames", "5"], "--context-frames is 5, but .*clip.npy has 4 frames: expected at most"),
    (["--context", "CLIP", "--length", "2"], "--length is 2, but --context gives 2 frames, which come first"),
    (["--length", "9", "--overlap", "4"], r"trained on \[2\] given frames, not on overlap 4"),
    (["--jump", "-1", "--length", "9"], "--jump is -1, expected 0 or more"),
    (["--rescale", "1.5", "--guidance", "2"], "--rescale is 1.5, expected 0 to 1"),
    (["--motion", "1.5"], "--motion is 1.5, expected 0 to 1"),
    (["--length", "0"], "--length is 0"), (["--context", "CLIP", "--context-frames", "-2"], "--context-frames is -2"),
    (["--n", "0"], "--n is 0"), (["--out", "x.wmv"], "mp4 or .gif"), (["--device", "quantum"], "--device quantum"),
])
def test_sample_says_what_is_wrong(trained, tmp_path, flags, words):
    np.save(tmp_path / "clip.npy", vdm.to_uint8(vdm.MovingShapes(4, (16, 16))[0]["video"]))
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "taken").touch()
    (tmp_path / "clip.gif").mkdir()
    files = dict(CLIP="clip.npy", OUT="clip.mp4", FOLDER="clip.gif", TAKEN="taken.mp4")
    flags = [str(tmp_path / files[f]) if f in files else f for f in flags]
    with pytest.raises(ValueError, match=words):
        sample.main([str(trained / "last.pt"), "--out", str(tmp_path / "a.mp4"), *flags])


def test_temporal_guidance_of_a_model_never_alone_with_a_frame_is_refused(trained, tmp_path, monkeypatch):
    load = vdm.load
    monkeypatch.setattr(vdm, "load", lambda path: (load(path)[0], vdm.dataclasses.replace(load(path)[1], images=0.0)))
    for scale in "2", "0":
        with pytest.raises(ValueError, match="--temporal-guidance does nothing here: it needs a model trained with --images"):
            sample.main([str(trained / "last.pt"), "--out", str(tmp_path / "a.mp4"), "--temporal-guidance", scale])


# ---- latents through the scripts ------------------------------------------------------------------

LATENT = ("--preset latent --frames 4 --size 4 --ae-width 16 --width 16 --head-dim 8 --mults 1 1 --patch 1 --batch 2 --steps 3 "
          "--warmup 2 --sampling-steps 2 --marks 2 --encode 5 --context 0.5 0 0.5 --overlap 2 --device cpu --dtype fp32").split()


def run_latent(out, *flags):
    train.main([*LATENT, "--out", str(out), *map(str, flags)])
    return torch.load(out / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """The three stages, small: the folder of their runs."""
    root = tmp_path_factory.mktemp("latent")
    run_latent(root / "ae", "--stage", "autoencoder")
    run_latent(root / "decoder", "--stage", "decoder", "--latents", root / "ae/last.pt")
    run_latent(root / "run", "--latents", root / "decoder/last.pt")
    return root


def test_three_stages(latent, capsys):
    """Each has its checkpoint; the first two the reconstructions, twice as high as wide; the last clips in pixels."""
    states = {name: torch.load(latent / name / "last.pt", weights_only=True) for name in ("ae", "decoder", "run")}
    for name in ("ae", "decoder"):
        assert np.stack(list(iio.imiter(latent / name / "recon.mp4"))).shape[0] == 4
        assert Image.open(latent / name / "recon.png").size == (4 * 17 + 1, 2 * 33 + 1)
        rows = list(csv.DictReader(open(latent / name / "log.csv")))
        assert len(rows) == 3 and all(float(r["reconstruction"]) > 0 and float(r["kl"]) > 0 for r in rows)
    assert Image.open(latent / "run/samples/final.png").size == (2 * (4 * 17 + 1), 2 * (2 * 17 + 1))
    kept, whole = states["run"]["autoencoder"], states["decoder"]["ema"]
    assert same(kept, whole) and kept["std"].shape == (4, 1, 1) and not torch.equal(kept["std"], torch.ones(4, 1, 1))
    encoded = np.load(next(latent.glob("latents-*/video.npy")))
    model, _ = vdm.load_autoencoder(latent / "decoder/last.pt")
    clip = vdm.MovingShapes(4, (16, 16))[3]["video"]
    close(torch.from_numpy(encoded[3]).float(), model.encode(clip[None])[0], atol=2e-3, rtol=2e-3)
    assert encoded.shape == (5, 4, 4, 4, 4) and len(list(latent.glob("latents-*"))) == 1


def test_stages_on_files(tmp_path):
    """Clips from files lie channels-last in memory, which PyTorch 2.13 dies of where a GroupNorm learns behind frozen layers."""
    np.save(tmp_path / "clip.npy", vdm.to_uint8(vdm.MovingShapes(9, (16, 16))[0]["video"]))
    run_latent(tmp_path / "ae", "--stage", "autoencoder", "--data", tmp_path / "clip.npy")
    run = run_latent(tmp_path / "out", "--stage", "decoder", "--latents", tmp_path / "ae/last.pt", "--data", tmp_path / "clip.npy")
    assert all(gate.item() for name, gate in run["model"].items() if name.endswith("time.gate"))


@cases("flags, encoded", [(["--stage", "autoencoder"], False), (["--stage", "decoder"], False), ([], True)])
def test_clips_for_latents_are_cut_once(latent, tmp_path, monkeypatch, flags, encoded):
    """With an anchor a diffusion model gets an item's 6 frames and the 18 before, with their actions, as they were encoded;
    an autoencoder has no anchor, so it gets the 6 (or 1)."""
    items, which = [], "train_step" if encoded else "autoencoder_step"
    step = getattr(train, which)
    monkeypatch.setattr(train, which, lambda i, config, data, *more: items.append(data) or step(i, config, data, *more))
    path = [] if flags[-1:] == ["autoencoder"] else ["--latents", latent / "ae/last.pt"]
    preset = "--preset tiny --factor 4 --channels 4 --attention 2 --joint 2 --frames 6 --context 0.2 0 0 0.4 0.4 --overlap 4"
    run_latent(tmp_path / "run", *preset.split(), *flags, *path, "--data", "drive")
    frames = {len(items[-1][i]["video"]) for i in range(5)}
    if not encoded:
        assert frames == {1 if "autoencoder" in flags else 6}
        return
    world, pixels = [items[-1][i] for i in range(5)], [vdm.Drive(24, (16, 16))[i] for i in range(5)]
    stored = torch.from_numpy(np.load(next(tmp_path.glob("latents-*/video.npy"))))
    rows = [next(k for k in range(5) if torch.equal(stored[k].float(), item["video"])) for item in world]
    assert frames == {24} and sorted(rows) == list(range(5))
    assert all(torch.equal(item["action"], pixels[k]["action"]) for k, item in zip(rows, world))


def test_resume_keeps_the_number_of_encoded_clips(latent):
    before = (latent / "run/last.pt").read_bytes()
    with pytest.raises(ValueError, match="encode differs from"):
        run_latent(latent / "run", "--resume", "--steps", 4, "--encode", 4)
    assert (latent / "run/last.pt").read_bytes() == before


def test_the_second_stage_trains_temporal_layers_alone(latent):
    """All that encodes, all spatial layers, and the measured mean and std come out bit for bit as they went in."""
    before, after = (torch.load(latent / name / "last.pt", weights_only=True)["ema"] for name in ("ae", "decoder"))
    temporal = {name for name in before if ".time." in name}
    assert temporal and {name for name in before if not torch.equal(before[name], after[name])} == temporal
    assert all(before[name].item() == 0 != after[name].item() for name in temporal if name.endswith("gate"))


def test_resume_of_all_stages(latent, tmp_path):
    """In two parts as in one, bit for bit. Going on, a model of latents has its autoencoder in its own checkpoint."""
    more = {"ae": ["--stage", "autoencoder"], "decoder": ["--stage", "decoder", "--latents", latent / "ae/last.pt"],
            "run": ["--latents", latent / "decoder/last.pt"]}
    step = {name: getattr(train, name) for name in ("autoencoder_step", "train_step")}
    for name, flags in more.items():
        out, which = tmp_path / name, "train_step" if name == "run" else "autoencoder_step"

        def stumble(n, *args):
            if n == 2:
                raise KeyboardInterrupt
            return step[which](n, *args)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, which, stumble)
            run_latent(out, *flags)
        resumed = run_latent(out, "--resume", *flags[:2] * (name != "run"))
        assert resumed["step"] == 3 and same(resumed, torch.load(latent / name / "last.pt", weights_only=True))


@pytest.fixture
def sigint():
    """As in a terminal, wherever the tests run: in the background of a shell Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_the_step_at_work(tmp_path, monkeypatch, capsys, sigint):
    """Asked to stop in its second of three steps, a run saves that step, and goes on to the same weights; asked in the sampling at
    the end, --resume does what is left. Where Ctrl-C is ignored, as under nohup, it stays so."""
    whole, step = run_train(tmp_path / "whole", "--steps", 3), train.train_step

    def interrupted(n, *args):
        if n == 1:
            signal.raise_signal(signal.SIGINT)
        return step(n, *args)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run_train(tmp_path / "run", "--steps", 3)["step"] == 2
    assert "stopped by Ctrl-C after step 2, all saved: the same command with --resume goes on" in capsys.readouterr().out
    assert not (tmp_path / "run/samples/final.gif").exists()
    monkeypatch.undo()
    monkeypatch.setattr(train, "finish", lambda *args: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run_train(tmp_path / "run", "--steps", 3, "--resume")
    monkeypatch.undo()
    assert same(whole, run_train(tmp_path / "run", "--steps", 3, "--resume"))
    assert (tmp_path / "run/samples/final.gif").read_bytes() == (tmp_path / "whole/samples/final.gif").read_bytes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(train, "train_step", interrupted)
    assert run_train(tmp_path / "deaf", "--steps", 3)["step"] == 3


def test_ctrl_c_in_sampling_keeps_what_is_there(trained, tmp_path, monkeypatch, capsys):
    """The videos that are complete or, if none is, the frames that there are of the first ones."""
    generate = vdm.generate
    for windows, batch, length, videos in ((3, 1, 4, 2), (2, 3, 6, 3)):                     # asked to stop in this window
        left = iter(range(windows - 1))

        def interrupted(*args, **options):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return generate(*args, **options)

        for name, patched in (("whole", generate), ("part", interrupted)):
            monkeypatch.setattr(vdm, "generate", patched)
            flags = f"--n 3 --length {length} --batch {batch} --steps 2 --dtype fp32"
            sample.main([str(trained / "last.pt"), *flags.split(), "--out", str(tmp_path / f"{name}{batch}.gif")])
        assert f"stopped by Ctrl-C: {videos} videos of 4 frames are written" in capsys.readouterr().out
        part = sorted((tmp_path / f"part{batch}").iterdir())
        assert [p.name for p in part] == [f"{i:03d}.gif" for i in range(videos)]
        for path in part:
            a, b = (vdm.read_video(p) for p in (path, tmp_path / f"whole{batch}" / path.name))
            assert torch.equal(a, b[:4])


def test_encoded_once(latent, tmp_path, monkeypatch):
    """The same folder again without encoding; another autoencoder, other clips or another number: another folder."""
    model, _ = vdm.load_autoencoder(latent / "ae/last.pt")
    world, device = vdm.MovingShapes(4, (16, 16)), torch.device("cpu")
    folder = train.encode_once(world, 3, model, tmp_path, device)
    assert sorted(p.name for p in folder.iterdir()) == ["label.npy", "video.npy"]
    assert np.load(folder / "label.npy").tolist() == [world[i]["label"] for i in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(vdm.Autoencoder, "encode", lambda *args: 1 / 0)
        assert train.encode_once(world, 3, model, tmp_path, device) == folder
    other, _ = vdm.load_autoencoder(latent / "decoder/last.pt")
    folders = {train.encode_once(*which, tmp_path, device) for which in (
        (world, 3, other), (world, 4, model), (vdm.MovingShapes(4, (16, 16), seed=1), 3, model))}
    assert len(folders | {folder}) == 4 == len(list(tmp_path.iterdir()))


def test_sample_decodes(latent, tmp_path, monkeypatch):
    """Clips in pixels of any length; what is given is encoded, and its latents come out as they went in, to be decoded."""
    stream, decoded = vdm.Autoencoder.stream, []
    monkeypatch.setattr(vdm.Autoencoder, "stream", lambda self, zs: decoded.append([]) or stream(
        self, (decoded[-1].append(z) or z for z in zs)))
    for name, flags in dict(a=[], b=["--length", 9], c=["--context", tmp_path / "real.mp4", "--length", 6]).items():
        vdm.write_video(tmp_path / "real.mp4", vdm.MovingShapes(2, (16, 16))[5]["video"])
        sample.main([str(latent / "run/last.pt"), "--n", "2", "--device", "cpu", "--dtype", "fp32", *map(str, flags),
                     "--out", str(tmp_path / f"{name}.mp4")])
        made = vdm.read_video(tmp_path / f"{name}/001.mp4", (16, 16))
        assert len(made) == dict(a=4, b=9, c=6)[name]
    model, _ = vdm.load_autoencoder(latent / "run/last.pt")
    given = model.encode(vdm.read_video(tmp_path / "real.mp4", (16, 16))[None])
    assert [len(zs) for zs in decoded] == [1, 4, 3]                     # windows, and what is given: none waits for the last
    assert [torch.cat(zs, 1).shape for zs in decoded] == [(2, T, 4, 4, 4) for T in (4, 9, 6)]
    assert all(torch.equal(z[:2], given[0]) for z in torch.cat(decoded[2], 1))


def test_latents_from_elsewhere(tmp_path, capsys):
    """.npy of 5 channels, and a scale: trained on as they are times it, and given back divided by it."""
    rng, flags = np.random.default_rng(0), ["--channels", 5, "--latent-scale", 0.25]
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data/a.npy", rng.normal(0, 4, (3, 6, 5, 4, 4)).astype(np.float32))
    np.save(tmp_path / "data/b.npy", rng.normal(0, 4, (5, 5, 4, 4)).astype(np.float16))
    run_latent(tmp_path / "run", "--data", tmp_path / "data", *flags)
    assert re.search(r"standard deviation (0\.9\d|1\.0\d)\n", capsys.readouterr().out)
    made = np.load(tmp_path / "run/samples/final.npy")
    assert made.shape == (2, 4, 5, 4, 4) and not list((tmp_path / "run/samples").glob("*.gif"))
    data = train.Latents(tmp_path / "data", train.parse([*LATENT, *map(str, flags)])[1], 4, 0.25)
    stored = [*np.load(tmp_path / "data/a.npy"), np.load(tmp_path / "data/b.npy").astype(np.float32)]
    for i in range(12):
        item = data[i]["video"].numpy() * 4
        assert any(np.array_equal(item, clip[s:s + 4]) for clip in stored for s in range(len(clip) - 3))
    np.save(tmp_path / "given.npy", stored[3][:2])
    sample.main([str(tmp_path / "run/last.pt"), "--n", "2", "--device", "cpu", "--context", str(tmp_path / "given.npy"),
                 "--length", "7", "--out", str(tmp_path / "made.mp4")])
    made = np.load(tmp_path / "made/001.npy")
    assert made.shape == (7, 5, 4, 4) and np.allclose(made[:2], stored[3][:2], atol=1e-5)
    np.save(tmp_path / "six.npy", np.arange(6, dtype=np.float32)[:, None, None, None] * np.ones((5, 4, 4), np.float32))
    config = vdm.load(tmp_path / "run/last.pt")[1]
    assert (sample.read_context(tmp_path / "six.npy", config, None, None, 2)[:, 0, 0, 0] * 4).tolist() == [1, 3, 5]      # up to the last
    with pytest.raises(ValueError, match="is no .npy file of latents that fit"):
        sample.main([str(tmp_path / "run/last.pt"), "--context", str(tmp_path / "data/a.npy")])


def test_actions_beside_latents_are_cut_as_they_are(tmp_path):
    """Frame t of clip k holds 100 k + t in all numbers, and so does its action; a clip without actions is told nothing."""
    for k, shape in enumerate([(2, 9), (7,), (6,)]):
        clip = np.indices(shape)[-1] + 100.0 * k + (50 * np.indices(shape)[0] if len(shape) == 2 else 0)
        np.save(tmp_path / f"{k}.npy", np.broadcast_to(clip[..., None, None, None], (*shape, 4, 4, 4)).astype(np.float32))
        if k < 2:
            np.save(tmp_path / f"{k}.actions.npy", np.repeat(clip[..., None], 3, -1))
    data, seen = train.Latents(tmp_path, train.parse([*LATENT, "--stride", "2"])[1], 3), set()
    assert data.actions == (3,) and len(data) == 4
    for i in range(40):
        item = data[i]
        first = item["video"][:, 0, 0, 0]
        seen.add(int(first[0]) // 50)
        assert torch.equal(first.diff(), torch.full((2,), 2.0))
        told = first[:, None].expand(3, 3)
        assert torch.equal(item["action"], told) if first[0] < 200 else item["action"].isnan().all()
    assert seen == {0, 1, 2, 4}
    np.save(tmp_path / "1.actions.npy", np.zeros((6, 3)))
    said = train.Latents(tmp_path, train.parse(LATENT)[1], 3).report
    assert re.search("skipped .*1.actions.npy: .* is not 1 clips x 7 frames x 3 finite numbers", said)


def test_vista_through_the_command_line(tmp_path):
    """The README's command but for torchrun: narrow, small, short; the data are latents with 19 numbers of actions a frame."""
    rng = np.random.default_rng(0)
    (tmp_path / "latents").mkdir()
    for k in range(2):
        np.save(tmp_path / f"latents/{k}.npy", rng.normal(size=(6, 4, 8, 8)).astype(np.float32))
        np.save(tmp_path / f"latents/{k}.actions.npy", rng.normal(size=(6, 19)))
    small = ("--width 32 --head-dim 32 --mults 1 2 --attention 1 2 --blocks 1 --size 8 --frames 4 --steps 2 --batch 2 --marks 1 "
             "--sampling-steps 1 --device cpu")
    state = {}
    for name, flags in dict(a="--checkpoint-activations --micro 1", b="").items():
        train.main(["--preset", "vista", "--data", str(tmp_path / "latents"), "--out", str(tmp_path / name), *small.split(),
                    "--dtype", "fp32", *flags.split()])
        state[name] = torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
    close(state["a"]["net.input.weight"], state["b"]["net.input.weight"], rtol=1e-3, atol=1e-6)
    assert np.load(tmp_path / "a/samples/final.npy").shape == (1, 4, 4, 8, 8)
    with pytest.raises(ValueError, match="the data has 0 labels and actions"):
        (tmp_path / "latents/0.actions.npy").unlink(), (tmp_path / "latents/1.actions.npy").unlink()
        train.main(["--preset", "vista", "--data", str(tmp_path / "latents"), "--out", str(tmp_path / "c"), *small.split()])


@cases("flags, words", [
    ([], "this run needs latents of 4 channels: name an autoencoder"),
    (["--stage", "decoder"], "this run needs latents"),
    (["--latents", "no.pt"], "there is no checkpoint no.pt"),
    (["--latents", "ae", "--channels", 3], "--channels is 3, but the autoencoder in .* has 4: leave the flag out"),
    (["--latents", "ae", "--factor", 8], "--factor is 8, but the autoencoder in .* has 4: leave the flag out"),
    (["--stage", "autoencoder", "--factor", 3], "factor is 3: an autoencoder needs a power of two"),
    (["--latents", "ae", "--task", "upsample", "--context-noise", 0.1], "of pixels: --factor 0"),
    (["--data", "noise.npy"], "standard deviation 5, where about 1 is expected: --latent-scale 0.2 would"),
    (["--data", "noise.npy", "--channels", 6], r"is not float \(\[N,\] T, 6, 4, 4\)"),
    (["--data", "bytes.npy"], "holds no latents for this run"), (["--data", "none.npy"], "none.npy holds no latents for this run"), (["--data", "empty"], "0 files in empty")])
def test_latents_that_do_not_fit(latent, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(0, 1, (9, 4, 4, 4, 4))
    np.save("noise.npy", 5 * x / x.std())
    np.save("bytes.npy", np.zeros((4, 4, 4, 4), np.uint8))
    np.save("none.npy", np.zeros((0, 4, 4, 4, 4), np.float32))
    os.mkdir("empty")
    with pytest.raises(ValueError, match=words):
        run_latent(tmp_path / "run", *[latent / "ae/last.pt" if f == "ae" else f for f in flags])
    assert not (tmp_path / "run").exists()


def test_a_model_of_latents_takes_channels_and_factor_from_its_autoencoder(tmp_path):
    run_latent(tmp_path / "ae", "--stage", "autoencoder", "--channels", 6, "--factor", 2, "--steps", 1)
    config = run_latent(tmp_path / "run", "--latents", tmp_path / "ae/last.pt", "--steps", 1)["config"]
    assert (config["channels"], config["factor"]) == (6, 2)


def test_an_autoencoder_is_no_diffusion_model(latent, tmp_path, trained):
    """Each command says which of the two it got."""
    with pytest.raises(ValueError, match="is an autoencoder: train on its latents with --latents"):
        sample.main([str(latent / "ae/last.pt")])
    with pytest.raises(ValueError, match="is no autoencoder, and holds none"):
        run_latent(tmp_path / "run", "--latents", trained / "last.pt")
    with pytest.raises(ValueError, match="but stage differs from"):
        run_latent(latent / "ae", "--resume", "--stage", "decoder")


def test_poor_reconstructions_are_named(tmp_path, capsys):
    run_latent(tmp_path / "ae", "--stage", "autoencoder", "--steps", 1)
    said = capsys.readouterr().out
    assert "warning: below 25 dB" in said and "PSNR" in said and "recon.mp4" in said
    assert f"--stage decoder --latents {tmp_path / 'ae/last.pt'}" in said


def test_a_run_is_never_overwritten(trained):
    before = (trained / "last.pt").read_bytes()
    with pytest.raises(ValueError, match="already holds a run: --resume continues"):
        run_train(trained, "--steps", 12)
    with pytest.raises(ValueError, match="has done all its 12 steps"):
        run_train(trained, "--resume", "--steps", 12)
    with pytest.raises(ValueError, match="width differs .* These may change: fps, .*steps, temporal_guidance, and all"):
        train.main(["--resume", "--out", str(trained), "--width", "64"])
    with pytest.raises(ValueError, match="there is no checkpoint"):
        train.main(["--resume", "--out", str(trained / "elsewhere")])
    assert (trained / "last.pt").read_bytes() == before


@cases("flags, words", [
    (["--prest", "tiny"], "unrecognized arguments: --prest"), (["--preset", "huge"], "invalid choice: 'huge'"),
    (["--steps", "many"], "invalid int value: 'many'"), (["--size", "30"], "nearest that works is --size 32 32"),
    (["--kind", "z"], "expected one of eps, v, x0, edm"), (["--weighting", "z"], "expected one of x0, eps"),
    (["--schedule", "z"], "expected one of linear"), (["--sampler", "z"], "expected one of ddpm"),
    (["--head-dim", "20"], "head_dim is 20"), (["--data", "no/such/folder"], "no/such/folder does not exist"),
    (["--init", ""], "--init is empty: expected a path"), (["--save-every", "0"], "--save-every is 0, expected 1 or more"),
    (["--micro", "-1"], "--micro is -1, expected 1 or more"), (["--context", "0"], "context is"), (["--labels", "18", "--drop", "2"], "--drop is 2, expected 0 to 1"),
    (["--actions", "0"], "--actions is 0, expected 1 or more"),
    (["--preset", "latent"], "this run needs latents of 4 channels"), (["--preset", "latent", "--size", "20", "--stage", "decoder"],
                                                                       "name an autoencoder"),
    (["--labels", "3"], "labels is 3 .* the data has 18"), (["--data", "drive", "--channels", "1"], "toy world is in colour"),
    (["--steps", "0"], "--steps is 0, expected 1 or more"), (["--marks", "0"], "--marks is 0, expected 1 or more"),
    (["--jump", "-1"], "--jump is -1, expected 0 or more"), (["--jump", "nan"], "--jump is nan, expected 0 or more"),
    (["--fps", "0"], "--fps is 0, expected 0.1 to 1000"), (["--rho", "0"], "--rho is 0, expected more than 0"),
    (["--sigma-min", "60"], "--sigma-min is 60, expected less than --sigma-max, 60"), (["--ema", "2"], "--ema is 2, expected 0 to 1"),
    (["--clip-norm", "0"], "--clip-norm is 0, expected more than 0"), (["--lr", "inf"], "--lr is inf, expected 0 or more"),
    (["--mults", "1", "0"], "--mults is 1 0, expected 1 or more"), (["--blocks", "0"], "--blocks is 0, expected 1 or more"),
    (["--context", "nan"], "--context is nan, expected 0 or more"), (["--seed", "-1"], r"--seed is -1, expected 0 to 10\^12"), (["--seed", "9300000000000"], "--seed is 9.3e.12, expected 0 to"),
    (["--context", "0", "1"], "expected more than 0 as its first number"), (["--frames", "4"], "has room for 3, as --context 0.5 0.5 has"),
    (["--train", "temporal"], "all else of the model would stay random: it needs --init"),
    (["--train", "lora", "actions", "--adapters", "lora", "--labels", "18"], "--train is lora actions, but"),
    (["--device", "meta"], "--device meta is not to be had here"), (["--workers", "-1"], "--workers is -1, expected 0 or more"),
    (["--frames", "2", "--context", "1", "--dtype", "bf16"], "gradient of a temporal convolution over 2 frames wrong"),
    (["--overlap", "8"], "--overlap is 8, expected less than --frames, 8"),
    (["--gamma", "4"], "--gamma does nothing here: it needs --weighting min_snr"), (["--rank", "8"], "--rank does nothing"),
    *((["--preset", "latent", "--stage", "autoencoder", *flags], "it takes neither torchrun nor --dry-run, --micro")
      for flags in (["--dry-run"], ["--micro", "4"], ["--workers", "2"], ["--checkpoint-activations"], ["--rates", "1", "2"])),
    (["--channels", "5", "--dry-run"], "files of pixels have 1 or 3"),
    (["--optimizer", "sgd"], "--optimizer is sgd .* expected adamw or muon"), (["--size", "32", "32", "32"], "one or two numbers"),
    (["--attention", "8", "16"], r"--attention is \(8, 16\) and --joint \(4,\): expected .* \[1, 2, 4\]"),
    (["--attention", "4", "--joint", "2"], "and as --joint some of --attention"),
    (["--images", "0"], "--temporal-guidance is 2, but what it asks .* taught by --images above 0"),
    (["--task", "any", "--anchor", "2"], "--anchor is 2, but does nothing"),
])
def test_the_command_line_answers_in_one_sentence(tmp_path, monkeypatch, capsys, flags, words):
    """As a person would run it: exit code not 0, the flag or value named."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "run"), *flags])
    with pytest.raises(SystemExit) as stop:                            # a string is printed, and the code is then 1
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    said = capsys.readouterr().err if stop.value.code == 2 else stop.value.code
    assert said.startswith("error: ") and re.search(words, said), said
    assert not (tmp_path / "run/last.pt").exists()


# published or, for ucf101, reconstructed; rds: Video LDM's text-to-video network. PVDM's 528 M of sky run on other latents
COUNTS = dict(tiny=1.57e6, latent=1.48e6, mnist=10e6, ucf101=1_165_581_571, rds=1_509e6, svd=1_524_623_082, vista=1_648_079_082, sky=459e6)


def test_every_number_has_limits():
    """Of each field of Config, and each option, that is a number: NaN, infinity, and what lies far outside are refused."""
    options, config = train.parse([])
    shares = "dropout independent joint_weight images drop mode_drop ema".split()
    numbers = {f.name: f.type for f in vdm.dataclasses.fields(vdm.Config) if f.type in (int, float, tuple)} | dict(seed=int, workers=int)
    for name, kind in numbers.items():
        if name in ("train", "attention", "joint"):                    # which are names, and factors
            continue
        for bad in [-1, math.nan, math.inf][1 if name == "mean" else 0 : None if kind is float else 1] + [1.5] * (name in shares):
            bad = (bad, 1) if kind is tuple else bad
            o, c = (types.SimpleNamespace(**vars(x)) for x in (options, config))
            setattr(c if hasattr(c, name) else o, name, bad)
            with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} is .*, expected "):
                train.check(o, c)


@cases("flag, without, met", [
    ("gamma 4", "", "weighting min_snr"), ("sigma-data 1", "", "kind edm"), ("mean 1", "schedule cosine", ""),
    ("std 1", "schedule cosine", ""), ("offset-per-frame", "", "offset 0.1"), ("rank 2", "", "adapters lora"),
    ("joint-weight 0.2", "", "previous"), ("context 0.5 0.5", "previous", ""), ("drop 0.2", "no-motion", "labels 18"), ("motion", "frames 1 --context 1", ""),
    ("mode-drop 0.2", "labels 18", "data drive"), ("muon-lr 0.1", "optimizer adamw", ""), ("stride 2", "data drive", "data clips"),
    ("kl 0.1", "", "factor 2"), ("ae-width 8", "", "factor 2"), ("given-noise 2", "context 1", ""), ("latent-scale 2", "data clips latents x.pt", "data x.npy")])
def test_flags_that_would_do_nothing_are_refused(flag, without, met):
    """Each alone or with `without`; with `met` it passes."""
    flags = lambda *texts: " ".join(" --" + text for text in texts if text).replace(" latents", " --latents").split()
    with pytest.raises(ValueError, match=f"--{flag.split()[0]} does nothing here: it needs "):
        train.check(*train.parse(flags(flag, without)))
    train.check(*train.parse(flags(flag, met)))


@cases("preset", vdm.PRESETS)
def test_every_preset_has_the_parameters_of_its_paper(preset):
    """On the meta device, where nothing is allocated."""
    with torch.device("meta"):
        count = sum(p.numel() for p in vdm.build(vdm.PRESETS[preset]).parameters())
    assert count == pytest.approx(COUNTS[preset], rel=0.001 if preset == "ucf101" else 0.1)


def test_vista_as_published():
    """Given frames [], [0], [0, 1], [0, 1, 2] are drawn 1 : 2 : 4 : 8, and spatial layers learn at a tenth of the rate (phase 1)."""
    config = vdm.PRESETS["vista"]
    drawn = vdm.draw_mask(30_000, 25, config.context, config.task).sum(1).long().bincount(minlength=4) / 2000
    close(drawn, torch.tensor([1.0, 2, 4, 8]), rtol=0.1, atol=0)
    with torch.device("meta"):
        net = vdm.build(config).net
    rates = {id(p): group["peak"] for optimizer in train.make_optimizers(config, net) for group in optimizer.param_groups
             for p in group["params"]}
    for name, p in net.named_parameters():
        assert rates[id(p)] == pytest.approx(1e-6 if vdm.part_of(name) == "spatial" else 1e-5), name


def test_heads_must_fit_where_there_is_attention():
    """16, 32 and 64 channels, of which 16 go without attention unless the coarsest level has them."""
    vdm.build(vdm.Config(width=16, mults=(1, 2, 4), attention=(2, 4), joint=(4,), head_dim=32))
    for broken in (dict(attention=(1, 2), mults=(1, 2)), dict(attention=(2,), mults=(2, 2, 1), ddpm_layout=True)):
        with pytest.raises(ValueError, match="head_dim is 32"):
            vdm.build(vdm.Config(width=16, head_dim=32, **broken))


def test_parts_of_svd():
    """As counted in its published network: a gated feed-forward layer of all 16 places with attention has 148,797,120
    parameters (and, here, 24,960 of its norm), layers into and out of them 24.83 M."""
    with torch.device("meta"):
        net = vdm.build(vdm.PRESETS["svd"]).net
    count = lambda part: sum(p.numel() for name, p in net.named_parameters() if part in name)
    assert count("space_attention.feed_forward") == count("time_attention.before") == 148_797_120 + 24_960
    assert count("enter") + count("leave") == pytest.approx(24.83e6, rel=1e-3)
    assert count("time_attention.number") == pytest.approx(99.19e6, rel=1e-3)
    assert sum(isinstance(m, vdm.SpatialAttention) for m in net.modules()) == 16


@cases("preset", ["tiny", "mnist"])
def test_presets_of_pixels_train(tmp_path, preset):
    """One step at reduced width, all else as the preset says."""
    train.main(["--preset", preset, "--width", "32", "--steps", "1", "--batch", "1", "--marks", "1", "--sampling-steps", "1",
                "--out", str(tmp_path / preset), *(["--data", str(moving_mnist(tmp_path))] if preset == "mnist" else [])])


@cases("preset", ["ucf101", "sky", "rds", "svd", "vista"])
def test_presets_of_papers_train(preset):
    """One step of train.py at reduced width, batch and size, all else as named: a loss, and a gradient to all gates."""
    _, config = train.parse(f"--preset {preset} --width 32 --head-dim 32 --size 8 --batch 2".split())
    frames = config.frames * (1 + config.previous)
    clip = dict(video=torch.randn(frames, config.channels, 8, 8), action=torch.randn(frames, sum(config.actions)))
    clip |= dict(stills=torch.randn(config.stills, config.channels, 8, 8)) if config.stills else {}
    denoiser, grads = vdm.build(config), {}
    randomize(denoiser, gates=True).train()
    optimizers = train.make_optimizers(config, denoiser.net)
    gates = {name: p for name, p in denoiser.named_parameters() if name.endswith("gate")}
    optimizers[0].register_step_pre_hook(lambda *_: grads.update({name: p.grad.item() for name, p in gates.items()}))
    ema, device = vdm.EMA(denoiser, config.ema), torch.device("cpu")
    record = train.train_step(0, config, [clip] * 256, denoiser, ema, optimizers, device, torch.float32, 0)
    assert math.isfinite(record["loss"]) and len(optimizers) == 1
    assert grads.keys() == gates.keys() and len(gates) >= 16 and all(grads.values())
    config.sampling_steps = 1
    told = dict(action=clip["action"][None]) if config.actions else {}
    assert train.sample(config, denoiser, 1, device, torch.float32, **told).shape == (1, config.frames, config.channels, 8, 8)


def moving_mnist(folder):
    """A file laid out as Moving MNIST is: time first, (20, N, 64, 64)."""
    path = folder / "mnist_test_seq.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (20, 21, 64, 64), np.uint8))
    return path


def test_the_toy_world_is_in_colour(tmp_path):
    with pytest.raises(ValueError, match="--channels is 1, but the toy world is in colour"):
        train.main([*FLAGS, "--channels", "1", "--out", str(tmp_path / "run"), "--steps", "1"])


# ---- train.py --dry-run --------------------------------------------------------------------------

def test_operations_against_a_hand_count():
    """Two per product and sum, of every layer with weights and of attention, layer by layer."""
    config = vdm.Config(frames=3, size=(4, 8), channels=2, width=16, mults=(1,), attention=(1,), joint=(), patch=1, detail=0,
                        context=(1.0,))
    C, L, T, up = 16, 32, 3, 32
    conv = lambda a, b, kernel: L * T * a * b * kernel
    res = lambda a: conv(a, C, 9) + conv(C, C, 3) + T * 192 * 2 * C + conv(C, C, 9) + (a != C) * conv(a, C, 1)
    space = conv(C, 4 * C, 1) + T * 2 * L * L * C
    time = conv(C, 4 * C, 1) + L * 2 * T * T * C + conv(C, 8 * C, 1)
    total = conv(5, C, 9) + T * (48 * 192 + 192 * 192) + 2 * 192 + conv(C, 2, 9)                # 2 x 192 of motion, once a clip
    total += 3 * (conv(C, C, 3) + space + time) + 2 * res(C) + res(up)
    for gpu, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        assert train.rehearse(config, 1, dtype, gpu)["operations"] == 2 * total
    assert train.rehearse(config, 2, torch.bfloat16)["operations"] == 4 * total


def test_meter_counts_storages_once_and_until_they_die():
    with train.Meter() as meter:
        x = torch.zeros(1000)                                          # 4 kB
        y = x.view(10, 100).T                                          # a view
        z = (y * 2 + 1).relu_()                                        # in passing 8 kB, then 4
        assert (meter.now, meter.most) == (8000, 12000)
        del x, y
        assert meter.now == 4000
    assert z.shape == (100, 10)


@cases("flags", ["--batch 4", "--preset svd --width 32 --head-dim 32 --blocks 1 --size 16 --frames 4"])
def test_memory_against_the_allocator(flags):
    """The peak of a real step by the events of PyTorch's own allocator, which the profiler lists."""
    _, config = train.parse(flags.split())
    net, B = randomize(vdm.build(config).net).train(), min(config.batch, 4)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randn(B, config.frames, net.input.in_channels // config.patch ** 2, *config.size)
    with torch.profiler.profile(profile_memory=True) as profile:
        net(x, torch.ones(B, config.frames)).square().mean().backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    need = train.rehearse(config, B, torch.float32, gpu=False)
    assert need["activations"] == pytest.approx(sizes.max(), rel=0.1)
    assert need["weights"] == need["EMA"] == 4 * sum(p.numel() for p in net.parameters())
    light = train.rehearse(config, B, torch.float32, gpu=False, light=True)
    assert light["activations"] < 0.7 * need["activations"] and light["gradients"] == need["gradients"]


def test_optimizer_states_are_as_large_as_predicted():
    """Adam keeps two numbers a parameter, Muon one; what is frozen has none, and no gradient."""
    for name, some in (("muon", {}), ("adamw", {}), ("muon", dict(adapters="lora", train=("lora",)))):
        config = vdm.Config(width=16, optimizer=name, **some)
        vdm.trainable(denoiser := vdm.build(config), config.train)
        net, learns = denoiser.net, [p for p in denoiser.parameters() if p.requires_grad]
        optimizers = train.make_optimizers(config, net)
        for p in learns:
            p.grad = torch.ones_like(p)
        for optimizer in optimizers:
            optimizer.step()
        kept = sum(x.nbytes for o in optimizers for s in o.state.values() for x in s.values() if x.numel() > 1 or x.ndim)
        need = train.rehearse(config, 1, torch.float32, False)
        assert need["optimiser"] == pytest.approx(kept, rel=0.001)
        assert need["gradients"] == 4 * sum(p.numel() for p in learns) and (need["gradients"] < need["weights"] / 3) == bool(some)


def test_dry_run_of_vista(tmp_path, capsys):
    """Its authors report 11 GB a GPU for averaged weights. Those of its network in float32 are 6; their code holds a
    second copy, of the trained weights, while it samples with them: twice the row EMA. They accumulate, one clip at a
    time on 80 GB: without recomputing nothing fits, with it not the frozen encoders (0.85 B), too, and 2 clips."""
    train.main(["--preset", "vista", "--dry-run", "--gpu-memory", "80", "--speed", "150", "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    row = lambda name: [float(x) for x in re.search(rf"^ +{name} +([\d. ]+)$", out, re.M)[1].split()]
    weights, gradients, optimiser, ema, activations, total, light, sum_light = row("1 or more")
    assert 2 * ema == pytest.approx(11, rel=0.1) and ema == weights == gradients and optimiser == pytest.approx(2 * ema, rel=0.01)
    assert total == pytest.approx(weights + gradients + optimiser + ema + activations, rel=0.001) and total > 80
    card, encoders = 80e9 / 2 ** 30, 4 * 0.85e9 / 2 ** 30
    assert sum_light + ema + encoders < card < sum_light + light + ema + encoders
    assert sum_light - ema + light < card                                # without averages there is room for 2
    sharded = row("8 --shard")
    assert sharded[1:4] == pytest.approx([gradients / 8, optimiser / 8, ema / 8], rel=0.02) and weights / 8 < sharded[0] < weights / 2
    assert "1,508.84 M parameters" in out and "0, 2 (GPUs: 1 or more)" in out and "20000 steps at 150 TFLOPS" in out
    assert not (tmp_path / "run").exists()


@cases("flags, words", [("--gpu-memory 80", "they need --dry-run"), ("--dry-run --speed -1", "--speed is -1, expected more than 0"), ("--preset vista", "this run needs latents of 4 channels")])
def test_dry_run_and_latents_say_what_is_wrong(tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        train.main([*flags.split(), "--out", str(tmp_path / "run")])


def test_every_command_of_the_readme_runs(tmp_path, monkeypatch):
    """In an empty folder with no network, in the order of the page; only budgets are cut."""
    monkeypatch.chdir(tmp_path)
    vdm.write_video(tmp_path / "clip.mp4", vdm.MovingShapes(16)[0]["video"])
    vdm.write_video(tmp_path / "my_videos/a/b.gif", vdm.MovingShapes(16)[1]["video"])
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [part.split("#")[0].split() for line in "".join(blocks).splitlines() for part in line.split("&&")]
    commands = [words for words in lines if words[:1] == ["python"]]
    assert len(commands) >= 5
    for words in commands:
        small = dict(train="--steps 2 --batch 2 --marks 2 --sampling-steps 2", sample="--steps 2")
        flags = small.get(words[1].removesuffix(".py"), "").split() + (["--n", "2"] if "sample" in words[1] else [])
        flags += ["--blocks", "1"] if "--dry-run" in words else []
        monkeypatch.setattr(sys, "argv", [*words[1:], *flags])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    assert (tmp_path / "out/tiny/samples/final.mp4").exists() and (tmp_path / "samples.mp4").exists()


@cases("notebook", [p.name for p in (ROOT / "notebooks").glob("*.ipynb")])
def test_notebook_runs_and_is_light(notebook, tmp_path):
    """Every code cell, top to bottom, with the tiny budget that VDM_FAST asks for."""
    path = ROOT / "notebooks" / notebook
    cells = json.loads(path.read_text())["cells"]
    assert path.stat().st_size <= 400_000 and not any(
        output["output_type"] == "error" for c in cells for output in c.get("outputs", []))
    (tmp_path / "cells.py").write_text("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"))
    run = subprocess.run([sys.executable, tmp_path / "cells.py"], cwd=ROOT / "notebooks", capture_output=True, text=True,
                         env=os.environ | dict(VDM_FAST="1", PYTHONDONTWRITEBYTECODE="1"))
    assert run.returncode == 0, run.stderr


def test_table_of_claims(tmp_path):
    """.ci/claims.py with a tiny budget; and what it calls better, worse and unclear, on numbers made up for it."""
    path = ROOT / ".ci/claims.py"
    words = "--seeds 1 --steps 4 --clips 2 --size 16 --width 16 --sampling-steps 2 --out".split()
    run = subprocess.run([sys.executable, path, *words, tmp_path, "--csv", tmp_path / "t.csv"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = list(csv.DictReader(open(tmp_path / "t.csv")))
    names = "claim setting measure mean std seeds verdict".split()
    assert list(rows[0]) == names and {r["claim"][0] for r in rows} == set("abcdefg")
    assert all(math.isfinite(float(r["mean"])) for r in rows) and (tmp_path / "base-0/last.pt").exists()
    sys.path.append(str(path.parent))                                          # claims.py imports its neighbour
    claims = types.ModuleType("claims")
    claims.__file__ = str(path)
    exec(path.read_text(), claims.__dict__)
    made = {("a", "error"): (1, 2, 3), ("b", "error"): (0.9, 1.9, 2.8), ("c", "error"): (1.1, 2.1, 2.9),
            ("d", "error"): (1.1, 2.9, 3.1), ("a", "pass"): (0.3, 0.4, 0.5), ("b", "pass"): (0.2, 0.3, 0.4),
            ("c", "pass"): (0.6, 0.7, 0.8), ("d", "pass"): (0.3, 0.4, 0.5)}
    title = next(iter(claims.CLAIMS.values()))
    jobs = [[(title, setting, key, x[seed]) for (setting, key), x in made.items()] for seed in range(3)]
    claims.CLAIMS = {"only": title}
    found = list(claims.summary(jobs))
    assert {(r["setting"], r["measure"]): r["verdict"] for r in found} == {
        ("a", "error"): "", ("b", "error"): "better", ("c", "error"): "unclear", ("d", "error"): "unclear",
        ("a", "pass"): "", ("b", "pass"): "worse", ("c", "pass"): "better", ("d", "pass"): "unclear"}
    assert (found[0]["mean"], found[0]["std"], found[0]["seeds"]) == ("2", "1", 3)
    text = claims.text(found)
    assert "| a | 2 ± 1 | 0.4 ± 0.1 |" in text and "* b against a: better: error; worse: pass" in text
    assert "* c against a: better: pass (nothing found: error)" in text and "* d against a: no difference was found" in text


def test_bfloat16_by_way_of_float32(tmp_path):
    """.ci/bf16.py against sums in float64 of the same bfloat16 numbers, rounded once; float32 comes out as without; and it
    hands a script its words, its folder, and a CPU that is said to be fast at bfloat16."""
    spec = importlib.util.spec_from_file_location("bf16", ROOT / ".ci/bf16.py")
    bf16 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bf16)
    g = torch.Generator().manual_seed(0)

    def products(dtype):
        """What the layers of a UNet, and their gradients, come to: numbers of bfloat16 in, computed in dtype."""
        draw = lambda *shape: torch.randn(shape, generator=g.manual_seed(sum(shape))).bfloat16().to(dtype).requires_grad_()
        x, w, b, y, v, m, u = draw(2, 8, 6, 6), draw(4, 8, 3, 3), draw(4), draw(2, 4, 5, 3, 3), draw(4, 4, 3, 1, 1), draw(6, 20), draw(5, 20)
        made = [F.conv2d(x, w, b, padding=1), F.conv3d(y, v, padding=(1, 0, 0)), F.linear(m, u), F.linear(m, u, draw(5)), m.view(2, 3, 20) @ draw(2, 20, 7)]
        # each gradient is one product of bfloat16 numbers, too
        ones = [draw(*z.shape).detach() for z in made]
        return [*made, *(grad for z, one, of in zip(made, ones, ((x, w, b), (y, v), (m, u), (m, u), (m,)))
                         for grad in torch.autograd.grad(z, of, one, retain_graph=True))]

    plain = products(torch.float32)
    with bf16.Products():
        found, same = products(torch.bfloat16), products(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain, same))
    for z, exact in zip(found, products(torch.float64)):
        assert z.dtype == torch.bfloat16
        off = (z.double() - exact).abs() / exact.abs().clamp(min=1e-2)
        assert off.max() < 2 ** -8 and (z == exact.bfloat16()).float().mean() > 0.98           # but for ties, the nearest of 8 bits
    script = tmp_path / "script.py"
    script.write_text("import sys, torch\nprint(sys.argv[1:], sys.path[0], torch.cpu._is_avx512_bf16_supported(), __name__)")
    run = subprocess.run([sys.executable, ROOT / ".ci/bf16.py", script, "--n", "3"], capture_output=True, text=True)
    assert run.stdout.strip() == f"['--n', '3'] {script.resolve().parent} True __main__", run.stdout + run.stderr


def test_least_possible_error():
    """Of one frame, against a sum over all kinds, colours, sizes and places on a grid of half a pixel, each weighted by how
    probable it makes what is seen: what chance does to the chain, and half pixels to the grid, is small beside the error."""
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / ".ci/benchmark.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    world, n, sigma = vdm.MovingShapes(1, seed=77), 12, 4.0
    clips = np.stack([world[i]["video"].numpy() for i in range(n)])                            # (n, 1, 3, 32, 32)
    x = clips + sigma * np.random.default_rng(1).normal(size=clips.shape)
    shapes, prior = [], []
    for kind, r in product(range(3), 32 * np.linspace(0.18, 0.25, 17)[1::2]):
        y, z = (a.ravel() for a in np.meshgrid(*2 * [np.arange(r + 0.25, 32 - r, 0.5)]))
        shapes.append(2 * world.draw(kind, r, y, z, (32, 32)).reshape(-1, 1024).astype(np.float32))
        prior.append(np.full(len(y), -np.log(len(y))))
    shapes, prior = np.concatenate(shapes), np.concatenate(prior)                              # (M, 1024), (M,)
    seen = np.einsum("nct,mt->nmc", x[:, 0].reshape(n, 3, 1024) + 1, shapes, optimize=True)
    colors = world.palette
    score = (seen @ colors.T - (shapes ** 2).sum(1)[:, None] * colors.sum(1) / 2) / sigma ** 2 + prior[:, None]
    weight = np.exp(score - score.max((1, 2), keepdims=True))
    weight /= weight.sum((1, 2), keepdims=True)                                                # (n, M, 6)
    want = np.einsum("nmc,mt->nct", weight @ colors, shapes, optimize=True).reshape(clips.shape) - 1
    got = benchmark.posterior_mean(x, sigma, benchmark.drawn(world, n), world, 6000)
    least = ((want - clips) ** 2).mean()
    assert 0.01 < least < 0.04 and ((got - want) ** 2).mean() < 0.06 * least
    assert ((got - clips) ** 2).mean() == pytest.approx(least, rel=0.25)


@cases("kind, frames, batch", [("latents", 16, 0), ("latents", 16, 1)])
def test_an_entry_of_the_efficiency_table(kind, frames, batch):
    run = subprocess.run([sys.executable, ROOT / ".ci/benchmark.py", "--cost", kind, str(frames), str(batch)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["memory"] > 0 and found["seconds"] > 0


def test_paste_guide_of_the_readme():
    """The table names every other definition that a piece needs, as the paste test finds them."""
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (.*) \|$", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 12
    for name, count, needs in rows:
        closure = pasted(name)
        assert {name, *re.findall(r"`(\w+)`", needs)} == closure, name
        assert int(count) == sum(lines_of(n) for n in closure), name
