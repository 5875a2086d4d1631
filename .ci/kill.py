"""
Kill a training run at random moments, go on each time, and compare what comes out with a run that
nobody touched:

    python .ci/kill.py --kills 50

Weights, averages, optimisers and log.csv, but for its column of time, have to be equal bit for bit.
A run trains a tiny network on a folder of files, with a worker that reads ahead. The cache of
decoded files is deleted before each new run, so kills fall into decoding, training, writing and
drawing samples alike. CPU only.
"""

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import vdm

STEPS = 90
FLAGS = ("--width 16 --mults 1 1 --attention none factorised --patch 4 --frames 4 --size 16 "
         "--batch 4 --sampling-steps 2 --marks 2 --warmup 2 --context 0.5 0 0.5 --overlap 2 "
         f"--device cpu --dtype fp32 --save-every 3 --sample-every 30 --workers 1 --steps {STEPS}")

def run(folder, out, seconds=None):
    """Start a run or go on; kill it after so many seconds -> whether it was killed."""
    command = [sys.executable, ROOT / "train.py", *FLAGS.split(), "--data", folder, "--out", out]
    if (out / "last.pt").exists():
        command.append("--resume")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    if process.returncode:
        sys.exit(f"FAILED: exit code {process.returncode} in {out}")
    return False

def steps_done(out):
    if not (out / "last.pt").exists():
        return -1
    return vdm.read_checkpoint(out / "last.pt")[0]["step"]

def result(out):
    """All that a run leaves but times: the checkpoint, and the rows of log.csv."""
    state, _ = vdm.read_checkpoint(out / "last.pt")
    del state["seconds"]
    with open(out / "log.csv") as f:
        rows = list(csv.DictReader(f))
    return state, [{key: x for key, x in row.items() if key != "seconds"} for row in rows]

def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    o = p.parse_args()
    rng = np.random.default_rng(o.seed)
    folder = Path(tempfile.mkdtemp())
    data = folder / "data"
    data.mkdir()
    for i in range(12):
        np.save(data / f"{i}.npy", vdm.to_uint8(vdm.MovingShapes(8, (16, 16))[i]["video"]))
    began = time.perf_counter()
    run(data, folder / "whole")
    took = time.perf_counter() - began
    kills = 0
    wrong = 0
    runs = 0
    while kills < o.kills:
        out = folder / str(runs)
        shutil.rmtree(data / ".vdm_cache", ignore_errors=True)
        moments = []
        while not moments or moments[-1] < STEPS:
            seconds = rng.uniform(0, took) if kills < o.kills else None
            killed = run(data, out, seconds)
            kills += int(killed)
            moments.append(steps_done(out))
        runs += 1
        if not same(result(folder / "whole"), result(out)):
            wrong += 1
        print(f"{kills} kills, {runs} runs finished, {wrong} differ from the unbroken one; steps "
              f"saved when killed or done: {' '.join(map(str, moments))}", flush=True)
    shutil.rmtree(folder)
    sys.exit(1 if wrong else 0)

if __name__ == "__main__":
    main()
