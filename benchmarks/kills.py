"""kill -9 at random moments of a run that resumes: does it end bit for bit as if it had never been killed?

    python -m benchmarks.kills [--kills 50]

A process trains digits, writing a durable snapshot whenever the one before is done, and is killed at a random moment
after its first step: in the range sweep, in forks, in training, while a snapshot is written. The next one resumes from
what it finds. When a run gets through, its final state, the tuner's state and the history are compared with those of a
run nobody killed, and a new run begins. A kill counts only if a step had been done, and the table says what it hit.
"""

import argparse
import collections
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np

import autotunenet_jax as atn
from autotunenet_jax.loop import run
from benchmarks.quality import workloads

STEPS = 400
# Of steps that take hardly any time by themselves, so that a run lasts for several kills.
_PAUSE_S = 0.005
# Counted in steps, since the time until a process has compiled its parts says nothing of where it stands.
_KILL_WITHIN_STEPS = 120
_AND_WITHIN_S = 0.05


def digest(result):
    tree = (result.state, result.tuner_state, result.best_state)
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        is_key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        hashed.update(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
    hashed.update(json.dumps([result.history.to_dict(), result.best_eval]).encode())
    return hashed.hexdigest()


def train(folder=None):
    """One attempt, resuming; says before every step but the first where it stands and whether a snapshot is written."""
    task = workloads.get("W0").with_steps(STEPS)
    tuner = atn.AutoTuneNet(task.rate_space, total_steps=STEPS, initial={"learning_rate": 1e-5})
    options = {"tuner": tuner, "eval_step": task.eval_step, "progress": False}
    if folder is None:
        return digest(atn.fit(task.train_step, task.init(0), task.stream(0), **options))
    import orbax.checkpoint  # noqa: F401  # the first save would wait for it, and no kill meet a snapshot

    with atn.Snapshots(folder, space=tuner.space, interval_s=0.05, overhead=0.9) as store:
        began_at = None
        train_one = run.Run.train_one

        def reporting(run):
            nonlocal began_at
            began_at = run.controller.step if began_at is None else began_at
            if run.controller.step > began_at:
                print(
                    "at",
                    run.controller.step,
                    atn.PHASES[run.controller.phase],
                    int(store.is_saving),
                    began_at,
                    flush=True,
                )
                time.sleep(_PAUSE_S)
            return train_one(run)

        run.Run.train_one = reporting
        result = atn.fit(task.train_step, task.init(0), task.stream(0), snapshots=store, resume=True, **options)
    return digest(result)


class Tally:
    """What the kills hit and what came of it."""

    def __init__(self):
        self.kills = self.through = self.wrong = self.lost = self.in_saves = 0
        self.phases = collections.Counter()
        self.resumed = []


def attempt(folder, steps, delay_s, tally, newest):
    """Starts a process on the folder and kills it ``delay_s`` after it has done so many steps.

    Returns:
      The digest if it got through before that, and the newest step known to be durable.
    """
    command = [sys.executable, "-m", "benchmarks.kills", "--victim", str(folder)]
    victim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert victim.stdout is not None and victim.stderr is not None
    lines = []
    for line in victim.stdout:
        lines.append(line)
        if len(lines) == steps:
            time.sleep(delay_s)
            victim.kill()
    said = [line.split() for line in lines]
    errors = victim.stderr.read()
    code = victim.wait()
    for pipe in (victim.stdout, victim.stderr):
        pipe.close()
    done = [words[1] for words in said if words[0] == "done" and len(words) == 2]
    at = [words for words in said if words[0] == "at" and len(words) == 5]
    if at:
        began = int(at[0][4])
        tally.resumed.append(began)
        tally.lost += began < newest
    if done:
        return done[0], newest
    if code != -9 or not at:
        raise RuntimeError(f"A process ended by itself, with {code}:\n{errors}")
    tally.kills += 1
    tally.phases[at[-1][2]] += 1
    tally.in_saves += int(at[-1][3])
    with atn.Snapshots(folder, read_only=True) as store:
        return None, store.latest() or 0


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
    tally = Tally()
    with tempfile.TemporaryDirectory() as parent:
        newest = 0
        while True:
            folder = pathlib.Path(parent) / str(tally.through)
            # When the kills are over, the run that was going on gets through as well.
            steps = int(rng.integers(1, _KILL_WITHIN_STEPS)) if tally.kills < args.kills else 10 * STEPS
            delay_s = float(rng.uniform(0.0, _AND_WITHIN_S))
            final, newest = attempt(folder, steps, delay_s, tally, newest)
            print(f"{tally.kills} kills, newest durable step {newest}", file=sys.stderr, flush=True)
            if final is not None:
                tally.through += 1
                tally.wrong += final != expected
                newest = 0
                if tally.kills >= args.kills:
                    break
    hit = "; ".join(str(tally.phases[phase]) for phase in ("sweep", "fork", "train"))
    print("| kill -9 at a random moment of a run that resumes | count |\n|---|---|")
    print(f"| kills after the first step | {tally.kills} |")
    print(f"| in the sweep; in forks; in training | {hit} |")
    print(f"| while a snapshot was being written | {tally.in_saves} |")
    print(f"| processes that resumed from a snapshot | {sum(step > 0 for step in tally.resumed)} |")
    print(f"| steps they resumed at | {min(tally.resumed)} to {max(tally.resumed)} of {STEPS} |")
    print(f"| durable snapshots lost | {tally.lost} |")
    print(f"| runs that got through | {tally.through} |")
    print(f"| of them not bit for bit as without a kill | {tally.wrong} |")
    sys.exit(1 if tally.wrong or tally.lost else 0)


if __name__ == "__main__":
    main()
