"""
Seven things that papers say of video diffusion, tried on the toy world:

    python notebooks/claims.py --seeds 3 --steps 500

trains seven models for each seed, one in each core of the CPU. All see the same number of clips,
16 x steps, and those of one seed see the same ones. Clips are drawn without skip guidance: one
thing at a time. Models and what was measured stay in out/claims/, so after a stop the same command
goes on. It prints tables and writes notebooks/claims.csv. Other flags go to train.py.

Every setting is compared with the first of its claim, seed by seed. It is called better or worse
only if all seeds agree, and the mean of the differences is more than twice their standard
deviation. The rest is unclear.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
import train
import vdm
from benchmark import centre

SETTINGS = {"base": "", "offset 0.02": "--offset 0.02", "offset 0.1": "--offset 0.1",
            "plain loss": "--loss plain", "Vista's losses": "--loss vista",
            "batch 8": "--batch 8", "batch 32": "--batch 32"}
CLAIMS = dict(
    middle="a. averaged weights are essential (Vista): in the middle of training",
    end="a. averaged weights are essential (Vista): at its end, when the learning rate is 0",
    offset="b. offset noise improves temporal consistency (Vista)",
    guidance="c. context guidance helps temporal quality (Video LDM); 4 of 8 frames are given",
    losses="d. weights on motion and on edges help (Vista)",
    batch="e. more steps beat larger batches at equal numbers of clips (Vista)",
    overlap="f. windows that share 3 frames beat windows that share 1 (Vista); 32 frames",
    replacement="g. reconstruction guidance beats replacement (VDM); 4 of 8 frames are given")
LOWER = ("error", "flicker", "pixels", "seconds")      # measures that begin so are better if lower

def flags_of(setting, seed, o):
    """What to tell train.py. From 1 to 4 given frames are equally likely, which claim f needs."""
    batch = int(setting.split()[1]) if setting.startswith("batch") else 16
    steps = o.steps * 16 // batch
    name = setting.replace("'", "").replace(" ", "_")
    fixed = (f"--steps {steps} --keep-every {max(1, steps // 2)} --sample-every {steps} --marks 2 "
             f"--seed {seed} --device cpu --context 0.5 0.125 0.125 0.125 0.125")
    folder = str(o.out / f"{name}-{seed}")
    return [*fixed.split(), *SETTINGS[setting].split(), *o.more, "--out", folder]

def train_once(flags):
    """Train, or go on, unless it is done -> the checkpoints at half of the steps and at the end."""
    options, config = train.parse(flags)
    vdm.offset_noise = partial(vdm.offset_noise, per_frame=True)                    # as Vista's is
    last = options.out / "last.pt"
    if not last.exists():
        train.main(flags)
    elif vdm.read_checkpoint(last)[0]["step"] < config.steps:
        train.main([*flags, "--resume"])
    return options.out / f"step_{options.keep_every:06d}.pt", last

def read_weights(path, key):
    """The model of a checkpoint with its averaged weights ("ema"), or with the last ("model")."""
    state, config = vdm.read_checkpoint(path)
    return vdm.with_weights(vdm.build(config), state[key], path)

class Measures:
    """What is measured of clips and models: each method gives {name: number}."""

    def __init__(self, config, n, seed):
        self.world = vdm.MovingShapes(config.frames, config.size, seed=1_000_003)
        self.real = torch.stack([self.world[i]["video"] for i in range(n)])        # (n, T, 3, H, W)
        self.unit = torch.randn(self.real.shape, generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(config.frames) < 4).float().expand(n, -1)                      # (n, T)
        self.given = dict(context=self.real, mask=mask)
        sigmas, sampler = train.sampling(config)
        self.options = dict(shape=self.real.shape, sigmas=sigmas, sampler=sampler, seed=seed)

    def draw(self, denoise, **conditions):
        return vdm.generate(denoise, **self.options, **conditions).float()

    def passes(self, clips, name="pass"):
        return {name: self.world.check(clips)["passed"].mean()}

    def flicker(self, clips):
        """The change of a frame's mean colour, in steps of 0 ... 255."""
        return {"flicker": clips.mean((3, 4)).diff(dim=1).abs().mean() * 127.5}

    def goes_on(self, denoise, **conditions):
        """Of clips whose first 4 frames are given: how far from its place is the shape?"""
        clips = self.draw(denoise, **conditions)
        off = (centre(clips) - centre(self.real))[:, 4:].norm(dim=2).mean()
        return {"pixels off": off} | self.passes(clips, "pass going on")

    @torch.no_grad()
    def errors(self, denoise, levels=(0.3, 1, 3, 10)):
        found = {}
        for s in levels:
            estimate = denoise(self.real + s * self.unit, vdm.constant(s, self.real))
            found[f"error at sigma {s}"] = (estimate - self.real).square().mean()
        return found

    @torch.no_grad()
    def edges(self, denoise):
        wrong = denoise(self.real + self.unit, vdm.constant(1, self.real)) - self.real
        return {"error of edges at sigma 1": vdm.high_pass(wrong).square().mean()}

    def rolls(self, denoise, overlap):
        """Of videos of 32 frames: all runs of 8 frames, the last 8, and the colour."""
        video = torch.cat(list(vdm.rollout(denoise, 32, overlap=overlap, **self.options)), dim=1)
        runs = video.unfold(1, 8, 1).movedim(-1, 2).flatten(0, 1)             # (25 n, 8, 3, H, W)
        found = self.passes(runs, "pass (8 in a row)") | self.passes(video[:, -8:], "pass (last 8)")
        return found | {"one colour throughout": self.world.check(video)["color"].mean()}

def measure(setting, seed, n, half, last):
    """Of one model: rows (claim, setting, measure, value), of n clips it was never trained on."""
    model = read_weights(last, "ema")
    state, config = vdm.read_checkpoint(last)
    m = Measures(config, n, seed)
    rows = []

    def add(claim, name, *found):
        for measures in found:
            rows.extend((CLAIMS[claim], name, key, float(x)) for key, x in measures.items())

    made = m.draw(model)
    going = m.goes_on(model, **m.given)
    if setting == "base" or setting.startswith("offset"):
        name = "offset 0" if setting == "base" else setting
        add("offset", name, m.flicker(made), m.passes(made), going)
    if setting in ("plain loss", "Vista's losses"):
        add("losses", setting, m.passes(made), going, m.errors(model, [1]), m.edges(model))
    if setting == "base" or setting.startswith("batch"):
        name = "batch 16" if setting == "base" else setting
        add("batch", name, m.passes(made), going, m.errors(model),
            {"seconds of training": state["seconds"]})
    if setting != "base":
        return rows
    add("offset", "(real clips)", m.flicker(m.real))
    for claim, path in dict(middle=half, end=last).items():
        for name, key in dict(averaged="ema", raw="model").items():
            some = read_weights(path, key)
            add(claim, name, m.passes(m.draw(some)), m.errors(some))
    for scale in (1.0, 1.5, 2.0):
        add("guidance", f"guidance {scale:g}", m.goes_on(vdm.guided(model, scale), **m.given))
    for overlap in (1, 2, 3, 4):
        add("overlap", f"overlap {overlap}", m.rolls(model, overlap))
    for name, weight in {"replacement": 0.0, "weight 1": 1.0, "weight 3": 3.0}.items():
        denoise = vdm.reconstruction_guided(model, **m.given, weight=weight)
        add("replacement", name, m.goes_on(denoise))
    add("replacement", "(shown the frames, as trained)", going)
    return rows

def job(setting, seed, o):
    """Train and measure in a process of its own, unless it is done -> its rows."""
    *flags, folder = flags_of(setting, seed, o)
    folder = Path(folder)
    known = folder / "flags.json"
    done = folder / f"rows_{o.clips}.json"
    if known.exists() and json.loads(known.read_text()) != flags:
        raise ValueError(f"{folder} was made with other flags: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(flags))
    if not done.exists():
        command = [sys.executable, __file__, "--job", setting, str(seed), "--steps", str(o.steps),
                   "--clips", str(o.clips), "--out", str(o.out), *o.more]
        run = subprocess.run(command, capture_output=True, text=True,
                             env=os.environ | dict(OMP_NUM_THREADS="1"))
        if run.returncode:
            cause = (run.stderr.strip() or "killed").splitlines()[-1].removeprefix("error: ")
            raise ValueError(f"{setting}, seed {seed}: {cause}")
        done.write_text(run.stdout.splitlines()[-1])
        print(f"done: {setting}, seed {seed}", flush=True)
    return json.loads(done.read_text())

def verdict(key, values, first):
    """What the values of a measure, one per seed, say against those of the first setting."""
    sign = -1 if key.startswith(LOWER) else 1
    gains = [sign * (new - old) for new, old in zip(values, first)]
    if min(gains) <= 0 <= max(gains) or abs(mean(gains)) <= 2 * stdev(gains):
        return "unclear"
    return "better" if gains[0] > 0 else "worse"

def summary(jobs):
    """Rows of all jobs -> dicts (claim, setting, measure, mean, std, seeds, verdict), by claims."""
    found = {claim: {} for claim in CLAIMS.values()}
    for rows in jobs:
        for claim, setting, key, value in rows:
            found[claim].setdefault(setting, {}).setdefault(key, []).append(value)
    for claim, settings in found.items():
        first = next(iter(settings))
        for setting, measures in settings.items():
            for key, x in measures.items():
                row = dict(claim=claim, setting=setting, measure=key, mean=f"{mean(x):.4g}", std="",
                           seeds=len(x), verdict="")
                if len(x) > 1:
                    row["std"] = f"{stdev(x):.2g}"
                    if setting != first and not setting.startswith("("):
                        row["verdict"] = verdict(key, x, settings[first][key])
                yield row

def text(rows):
    """The rows of one claim as markdown: mean ± std over seeds, and in words what was found."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    cell = {}
    for row in rows:
        cell[row["setting"], row["measure"]] = f"{row['mean']} ± {row['std'] or '?'}"
    lines = ["", f"**{rows[0]['claim']}**", "",
             f"| {rows[0]['seeds']} seeds | {' | '.join(measures)} |",
             "|---" * (len(measures) + 1) + "|"]
    for setting in settings:
        lines.append(f"| {setting} | {' | '.join(cell.get((setting, m), '') for m in measures)} |")
    lines.append("")
    for setting in settings[1:]:
        said = {v: ", ".join(row["measure"] for row in rows
                             if row["setting"] == setting and row["verdict"] == v)
                for v in ("better", "worse", "unclear")}
        found = "; ".join(f"{v}: {said[v]}" for v in ("better", "worse") if said[v])
        if found and said["unclear"]:
            found += f" (nothing found: {said['unclear']})"
        if any(said.values()):
            lines.append(f"* {setting} against {settings[0]}: {found or 'no difference was found'}")
    return "\n".join(lines)

def main():
    p = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                     allow_abbrev=False)
    p.add_argument("--seeds", type=int, default=3, help="seeds (3)")
    p.add_argument("--steps", type=int, default=500, help="steps of 16 clips (500)")
    p.add_argument("--clips", type=int, default=64, help="clips that each measure is made of (64)")
    p.add_argument("--out", type=Path, default=ROOT / "out/claims", help="folder of the models")
    p.add_argument("--csv", default=ROOT / "notebooks/claims.csv", help="the table")
    p.add_argument("--job", nargs=2, help="a setting and a seed: rows of these alone, as JSON")
    o, o.more = p.parse_known_args()
    if o.job:
        setting = o.job[0]
        seed = int(o.job[1])
        half, last = train_once(flags_of(setting, seed, o))
        device = torch.device("cpu")
        with train.autocast(device, train.pick_dtype("auto", device)):
            rows = measure(setting, seed, o.clips, half, last)
        print(json.dumps(rows))
        return
    jobs = [(setting, seed, o) for setting in SETTINGS for seed in range(o.seeds)]
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
    except ValueError as error:
        sys.exit(f"error: {error}")
