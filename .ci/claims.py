"""
Seven things that papers say of video diffusion, tried on the toy world by one command:

    python .ci/claims.py --seeds 3 --steps 500       eight models per seed; a process per core, each on one thread

All models see the same number of clips, 16 x steps, and each sees the same ones as the others of its seed. What is done is
kept in out/claims/: after a stop the same command goes on. It prints a table and writes it to notebooks/claims.csv. Clips
are drawn without temporal guidance: one thing at a time. Flags not listed below go to train.py.

Every setting is compared with the first of its claim, seed by seed: "better" and "worse" are said only if all seeds agree
and the mean difference is more than twice the standard deviation of the differences; the rest is "unclear".
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".ci")]
import torch

import train
import vdm
from benchmark import centre

SETTINGS = {"base": "",
            "offset 0.02": "--offset 0.02 --offset-per-frame", "offset 0.1": "--offset 0.1 --offset-per-frame",
            "dynamics": "--dynamics 1", "dynamics, toy": "--dynamics 1 --dynamics-toy", "structure": "--structure 0.1",
            "batch 8": "--batch 8", "batch 32": "--batch 32"}
CLAIMS = dict(middle="a. averaged weights are essential (Vista): in the middle of training",
              end="a. averaged weights are essential (Vista): at its end, when the learning rate has fallen to 0",
              offset="b. offset noise improves temporal consistency (Vista)",
              guidance="c. context guidance helps temporal quality (Video LDM); 4 of 8 frames are given",
              losses="d. weights on motion and on edges help (Vista)",
              batch="e. more steps beat larger batches at equal numbers of clips (Vista)",
              overlap="f. long videos: windows that share 3 frames beat windows that share 1 (Vista); 32 frames",
              replacement="g. reconstruction guidance beats mere replacement (VDM); 4 of 8 frames are given")
LOWER = "error", "flicker", "pixels", "seconds"                          # measures that start so are better if lower


def flags_of(setting, seed, o):
    """What to tell train.py. From 1 to 4 given frames are equally likely, or claim f would not be compared fairly."""
    batch = int(setting.split()[1]) if setting.startswith("batch") else 16
    steps, folder = o.steps * 16 // batch, o.out / f"{setting.replace(',', '').replace(' ', '_')}-{seed}"
    fixed = f"--steps {steps} --sample-every {steps} --seed {seed} --marks 2 --device cpu --context 0.5 0.125 0.125 0.125 0.125"
    fixed += " --anchor 0 --no-motion --sigma-min 0.2"
    return [*fixed.split(), *SETTINGS[setting].split(), *o.more, "--out", str(folder)]


def train_once(flags):
    """Train, or go on, unless it is done -> Config, and the files with the state at half the steps and at the end."""
    options, config = train.parse(flags)
    half, last, save = options.out / "half.pt", options.out / "last.pt", vdm.save

    def save_and_keep_half(path, **state):
        if state["step"] == config.steps // 2:
            save(half, **state)
        save(path, **state)

    vdm.save = save_and_keep_half
    done = vdm.read_checkpoint(last)[0]["step"] if last.exists() else 0
    if done < config.steps:
        train.main(flags + ["--resume"] * last.exists())
    return config, half, last


def weights(path, key):
    state, config = vdm.read_checkpoint(path)
    denoiser = vdm.build(config)
    denoiser.load_state_dict(state[key])
    return denoiser.eval().requires_grad_(False)


@torch.no_grad()
def measure(setting, seed, n, config, half, last):
    """Of one model (setting, seed): rows (claim, setting, measure, value), from n clips and noise never trained on."""
    world = vdm.MovingShapes(config.frames, config.size, seed=1_000_003)
    real = torch.stack([world[i]["video"] for i in range(n)])                                # (n, T, 3, H, W)
    unit = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    sigmas = vdm.karras_sigmas(config.sampling_steps, config.sigma_min, config.sigma_max, config.rho)
    given = dict(context=real, mask=(torch.arange(config.frames) < 4).float().expand(n, -1))
    model, rows = weights(last, "ema"), []

    def add(claim, name, *measures):
        rows.extend((CLAIMS[claim], name, key, float(value)) for found in measures for key, value in found.items())

    def draw(denoiser, **options):
        return vdm.generate(denoiser, real.shape, sigmas, config.sampler, seed=seed, **options).float()

    def passes(clips, name="pass"):
        return {name: world.check(clips)["passed"].mean()}

    def errors(denoiser, levels=(0.3, 1, 3, 10)):
        estimates = {s: denoiser(real + s * unit, vdm.constant(s, real)) for s in levels}
        return {f"error at sigma {s}": (x - real).square().mean() for s, x in estimates.items()}

    def goes_on(**options):
        clips = draw(model, **given, **options)
        return {"pixels off": (centre(clips) - centre(real))[:, 4:].norm(dim=2).mean(),
                **passes(clips, "pass going on")}

    def flicker(clips):                                  # change of a frame's mean colour, in steps of 0 ... 255
        return {"flicker": clips.mean((3, 4)).diff(dim=1).abs().mean() * 127.5}

    made, going, base = draw(model), goes_on(), setting == "base"
    if base or setting.startswith("offset"):
        add("offset", "offset 0" if base else setting, flicker(made), passes(made), going)
    if base or setting.startswith(("dynamics", "structure")):
        wrong = vdm.high_pass(model(real + unit, vdm.constant(1, real)) - real)
        add("losses", "neither" if base else setting, passes(made), going, errors(model, [1]),
            {"error of edges at sigma 1": wrong.square().mean()})
    if base or setting.startswith("batch"):
        add("batch", "batch 16" if base else setting, passes(made), going, errors(model),
            {"seconds of training": vdm.read_checkpoint(last)[0]["seconds"]})
    if not base:
        return rows
    add("offset", "(real clips)", flicker(real))
    for claim, path in dict(middle=half, end=last).items():
        for name, key in dict(averaged="ema", raw="model").items():
            add(claim, name, passes(draw(weights(path, key))), errors(weights(path, key)))
    for scale in (1, 1.5, 2):
        add("guidance", f"guidance {scale}", goes_on(guidance=scale))
    for overlap in (1, 2, 3, 4):
        video = torch.cat(list(vdm.rollout(model, 32, real.shape, sigmas, overlap, seed=seed, sampler=config.sampler)), 1)
        runs = video.unfold(1, 8, 1).movedim(-1, 2).flatten(0, 1)                            # (25 n, 8, 3, H, W)
        add("overlap", f"overlap {overlap}", passes(runs, "pass (8 in a row)"),
            passes(video[:, -8:], "pass (last 8)"), {"one colour throughout": world.check(video)["color"].mean()})
    for name, weight in {"replacement": 1e-9, "weight 1": 1, "weight 3": 3}.items():
        add("replacement", name, goes_on(reconstruction=weight))
    add("replacement", "(shown the frames, as trained)", going)
    return rows


def job(setting, seed, o):
    """Train and measure in a process of its own, unless it is done -> its rows."""
    *flags, folder = flags_of(setting, seed, o)
    known, done = Path(folder) / "flags.json", Path(folder) / f"rows_{o.clips}.json"
    if known.exists() and json.loads(known.read_text()) != flags:
        raise ValueError(f"{folder} was made with other flags: choose another --out")
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(flags))
    if not done.exists():
        words = ["--job", setting, str(seed), "--steps", str(o.steps), "--clips", str(o.clips), "--out", str(o.out), *o.more]
        run = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True,
                             env=os.environ | dict(OMP_NUM_THREADS="1"))
        if run.returncode:
            cause = (run.stderr.strip() or "killed").splitlines()[-1].removeprefix("error: ")
            raise ValueError(f"{setting}, seed {seed}: {cause}")
        done.write_text(run.stdout.splitlines()[-1])
        print(f"done: {setting}, seed {seed}", flush=True)
    return json.loads(done.read_text())


def summary(jobs):
    """Rows of all jobs -> dicts (claim, setting, measure, mean, std, seeds, verdict), in the order of the claims."""
    found = {claim: {} for claim in CLAIMS.values()}
    for claim, setting, key, value in (row for rows in jobs for row in rows):
        found[claim].setdefault(setting, {}).setdefault(key, []).append(value)
    for claim, settings in found.items():
        first = next(iter(settings.values()))
        for setting, (key, x) in ((s, pair) for s, measures in settings.items() for pair in measures.items()):
            verdict = ""
            if x is not first[key] and len(x) > 1 and not setting.startswith("("):
                gains = [(new - old) * (-1 if key.startswith(LOWER) else 1) for new, old in zip(x, first[key])]
                sure = abs(mean(gains)) > 2 * stdev(gains) and (min(gains) > 0 or max(gains) < 0)
                verdict = ("better" if gains[0] > 0 else "worse") if sure else "unclear"
            yield dict(claim=claim, setting=setting, measure=key, mean=f"{mean(x):.4g}",
                       std=f"{stdev(x):.2g}" if len(x) > 1 else "", seeds=len(x), verdict=verdict)


def text(rows):
    """The rows of one claim as markdown: a table, mean ± std over the seeds, and in words what was found and what not."""
    settings, measures = (list(dict.fromkeys(row[key] for row in rows)) for key in ("setting", "measure"))
    cell = {(row["setting"], row["measure"]): f"{row['mean']} ± {row['std'] or '?'}" for row in rows}
    lines = [f"\n**{rows[0]['claim']}**\n", f"| {rows[0]['seeds']} seeds | " + " | ".join(measures) + " |",
             "|---" * (len(measures) + 1) + "|"]
    lines += [f"| {s} | " + " | ".join(cell.get((s, m), "") for m in measures) + " |" for s in settings] + [""]
    for s in settings[1:]:
        said = {v: [row["measure"] for row in rows if (row["setting"], row["verdict"]) == (s, v)]
                for v in ("better", "worse", "unclear")}
        found = "; ".join(f"{v}: {', '.join(said[v])}" for v in ("better", "worse") if said[v])
        if any(said.values()):
            lines.append(f"* {s} against {settings[0]}: {found or 'no difference was found'}"
                         + f" (nothing found: {', '.join(said['unclear'])})" * bool(found and said["unclear"]))
    return "\n".join(lines)


def main():
    p = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--seeds", type=int, default=3, help="seeds (3)")
    p.add_argument("--steps", type=int, default=500, help="steps of 16 clips (500)")
    p.add_argument("--clips", type=int, default=64, help="clips that each measure is made of (64)")
    p.add_argument("--out", type=Path, default=ROOT / "out/claims", help="folder of the models (out/claims)")
    p.add_argument("--csv", default=ROOT / "notebooks/claims.csv", help="the table (notebooks/claims.csv)")
    p.add_argument("--job", nargs=2, help="a setting and a seed: only these, rows as JSON (the command calls itself so)")
    o, o.more = p.parse_known_args()
    if o.job:
        setting, seed = o.job[0], int(o.job[1])
        model = train_once(flags_of(setting, seed, o))
        dtype = train.pick_dtype("auto", torch.device("cpu"))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return print(json.dumps(measure(setting, seed, o.clips, *model)))
    jobs = [(setting, seed, o) for setting in SETTINGS for seed in range(o.seeds)]           # base, the longest, first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(summary(pool.map(lambda arguments: job(*arguments), jobs)))
    with open(o.csv, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for claim in CLAIMS.values():
        print(text([row for row in rows if row["claim"] == claim]))


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"error: {e}")
