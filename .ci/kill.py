"""
Kill a training run at random moments, go on each time, and compare what comes out with a run that nobody touched:

    python .ci/kill.py --kills 50

Weights, averages, optimisers and log.csv (but for its two columns of time) have to be equal bit for bit. A run trains a tiny
network on a folder of files, with a worker that reads ahead; the cache of decoded files is deleted before each new run, so
that kills fall into decoding, training, writing and drawing samples alike. CPU only; needs fork.
"""

import argparse
import csv
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np
import torch

import train
import vdm

FLAGS = ("--width 32 --mults 1 1 --patch 4 --detail 8 --attention 2 --joint 2 --frames 4 --size 16 --batch 4 "
         "--sampling-steps 2 --marks 2 --warmup 2 --context 0.5 0 0.5 --overlap 2 --device cpu --dtype fp32 "
         "--dropout 0.1 --steps 90 --save-every 3 --sample-every 30 --workers 1").split()


def start(flags, rank=0, processes=1, port=0):
    """train.py in a forked process, which need not import torch again -> its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if processes > 1:
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                               MASTER_ADDR="localhost", MASTER_PORT=str(port))
        sys.stdout = open(os.devnull, "w")
        train.main([str(flag) for flag in flags])
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def result(out):
    state, _ = vdm.read_checkpoint(out / "last.pt")
    log = [{k: v for k, v in row.items() if k not in ("seconds", "data_wait")} for row in csv.DictReader(open(out / "log.csv"))]
    return {k: v for k, v in state.items() if k != "seconds"}, log


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    o = p.parse_args()
    torch.set_num_threads(1)
    rng, folder = np.random.default_rng(o.seed), Path(tempfile.mkdtemp())
    (folder / "data").mkdir()
    for i in range(12):
        clip = vdm.to_uint8(vdm.MovingShapes(8, (16, 16))[i]["video"])
        np.save(folder / f"data/{i}.npy", clip)

    def run(out, seconds=None):
        """Start or go on; kill it after so many seconds -> whether it was killed."""
        pid = start([*FLAGS, "--data", folder / "data", "--out", out, *["--resume"] * (out / "last.pt").exists()])
        if seconds is not None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code not in (0, -signal.SIGKILL):
            sys.exit(f"FAILED: exit code {code} in {out}")
        return code != 0

    began = time.perf_counter()
    run(folder / "whole")
    took = time.perf_counter() - began
    kills, runs, wrong, moments = 0, 0, 0, []
    while kills < o.kills:
        out, done = folder / str(runs), 0
        shutil.rmtree(folder / "data/.vdm_cache", ignore_errors=True)
        while done < 90:
            kills += run(out, rng.uniform(0, took) if kills < o.kills else None)
            done = vdm.read_checkpoint(out / "last.pt")[0]["step"] if (out / "last.pt").exists() else -1
            moments.append(done)
        runs += 1
        wrong += not same(result(folder / "whole"), result(out))
        print(f"{kills} kills, {runs} runs finished, {wrong} differ from the unbroken one; steps saved when killed or done: "
              f"{' '.join(map(str, moments))}", flush=True)
        moments.clear()
    shutil.rmtree(folder)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
