"""
What is each part of the recipe worth? Train the preset tiny with one part changed, and mark it:

    python notebooks/ablation.py --rows 0 3 --more --device cpu

Runs lie in out/ablation/; none is trained twice. Each row of the table has the shares of clips, and
of videos four times as long, that pass after the trainings with --seed 0 and 1, and how far the
clips are from the world (see benchmark.py; the mean of both).
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from benchmark import FOUND, Model, mark_model, parse_changes, train

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ("--preset tiny", "--loss plain", "--loss vista", "--weighting min_snr", "--weighting v",
         "--weighting edm --kind edm", "--kind v --weighting v", "--kind eps --weighting eps",
         "--schedule cosine", "--mean 0", "--optimizer adamw", "--images 0 --skip-guidance 1",
         "--attention none factorised factorised", "--attention none none none", "--patch 4",
         "--give replace", "--give per_frame --independent 0.2", "--ema 0")
DRAW = ("--skip-guidance 1", "--skip-guidance 1.3", "--skip-guidance 2", "--sampler dpmpp_2m",
        "--sampler ddim", "--sampler heun --steps 10", "--sampler ddpm", "--steps 10", "--steps 40",
        "--sigma-min 0.02", "--sigma-min 0.4", "--overlap 1", "--overlap 2")

def trained(flags, seed, more):
    """The checkpoint of a run with these flags, trained if it is not there yet."""
    name = flags.replace("--", "").replace(" ", "_")
    out = ROOT / f"out/ablation/{name}-{seed}"
    if not (out / "samples/final.png").exists():
        command = [sys.executable, ROOT / "train.py", *flags.split(), "--seed", str(seed), *more]
        resume = ["--resume"] if (out / "last.pt").exists() else []
        subprocess.run([*command, *resume, "--out", out], check=True, stdout=sys.stderr)
    return out / "last.pt"

def main():
    p = train.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", type=int, nargs="+", help="numbers of rows, from 0 (all)")
    p.add_argument("--n", type=int, default=192, help="videos of each kind (192)")
    p.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="flags of train.py")
    o = p.parse_args()
    rows = [(flags, "") for flags in TRAIN] + [(TRAIN[0], flags) for flags in DRAW]
    print("| flags | clips pass | long videos pass | colors off | kinds off | speeds off |\n"
          "|---|---|---|---|---|---|", flush=True)
    for number in o.rows or range(len(rows)):
        flags, drawn = rows[number]
        _, changes = parse_changes(train.Parser(), drawn.split())
        marks = []
        for seed in (0, 1):
            model = Model(trained(flags, seed, o.more), **changes)
            lengths = model.config.frames, 4 * model.config.frames
            rated = mark_model(model, o.n, lengths, [2])
            marks += [found for _, name, found in rated if name != "real"]
        cells = [f"`{drawn or flags}`"]
        cells += [f"{marks[i]['passed']:.0%}, {marks[i + 2]['passed']:.0%}" for i in (0, 1)]
        cells += [f"{np.mean([m[name][0] for m in marks[::2]]):.2f}" for name in FOUND]
        print(f"| {' | '.join(cells)} |", flush=True)

if __name__ == "__main__":
    main()
