"""kill -9 at random moments of a run that resumes: does it end bit for bit as if it had never been killed?

    python -m benchmarks.kills [--kills 50]

A process trains digits with durable snapshots as often as it can and is killed at a random moment, in the range sweep,
in forks, in training or while a snapshot is written; the next one resumes. When a run gets through, its final state is
compared with that of a run nobody killed, and a new run begins.
"""

import argparse
import hashlib
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

import autotunenet_jax as atn
from benchmarks.quality import workloads

STEPS = 400


def digest(state):
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.params, state.opt_state))]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def train(folder=None):
    """One attempt; prints where it begins and, if it gets there, the digest of its final state."""
    task = workloads.get("W0").with_steps(STEPS)
    stream = task.stream(0)
    store = None

    def batches(step, hp):
        if store is not None:
            if not began:
                began.append(step)
                print("began", flush=True)
            time.sleep(0.005)
        return stream(step, hp)

    began = []
    tuner = atn.AutoTuneNet(task.rate_space, total_steps=STEPS, initial={"learning_rate": 1e-5})
    if folder is not None:
        store = atn.Snapshots(folder, space=tuner.space, interval_s=0.05, overhead=0.9)
    result = atn.fit(task.train_step, task.init(0), batches, tuner=tuner, eval_step=task.eval_step, snapshots=store,
                     resume=store is not None, progress=False)  # fmt: skip
    if store is not None:
        store.close()
    return digest(result.state)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--victim", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.victim:
        print("done", train(args.victim), flush=True)
        return
    expected = train()
    rng = np.random.default_rng(0)
    kills = through = wrong = 0
    resumed_at = []
    with tempfile.TemporaryDirectory() as parent:
        run = 0
        while kills < args.kills:
            folder = pathlib.Path(parent) / str(run)
            command = [sys.executable, "-m", "benchmarks.kills", "--victim", str(folder)]
            victim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert victim.stdout is not None
            first = victim.stdout.readline()
            if first.startswith("began"):
                time.sleep(float(rng.uniform(0.0, 1.5)))
                victim.kill()
                kills += 1
            rest = first + victim.stdout.read()
            victim.wait()
            done = [line.split()[1] for line in rest.splitlines() if line.startswith("done")]
            if done:
                run, through = run + 1, through + 1
                wrong += done[0] != expected
            elif folder.exists():
                with atn.Snapshots(folder, read_only=True) as store:
                    resumed_at.append(store.latest() or 0)
        # The run that was going on when the kills were over gets through as well.
        final = train(str(pathlib.Path(parent) / str(run)))
        through, wrong = through + 1, wrong + (final != expected)
    print(f"{kills} kills; runs that got through: {through}, of these wrong: {wrong}")
    print(f"resumed from steps {min(resumed_at)} to {max(resumed_at)}, median {int(np.median(resumed_at))} of {STEPS}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
