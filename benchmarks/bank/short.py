"""Runs too short for forks: how far from what the range test says the rate should be.

python -m benchmarks.bank.short run 0/1    # tasks of the bank and small workloads, cut to 60, 100 and 130 steps
python -m benchmarks.bank.short report
"""

import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.bank import compare, policy
from benchmarks.bank.lab import Lab

STORED = Path(__file__).with_name("short.json")
LENGTHS, TEST = (60, 100, 130), 16
SHIFTS = np.array([-1.25, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25])


def load() -> dict[str, dict[str, list[float]]]:
    return json.loads(STORED.read_text()) if STORED.exists() else {}


def ends(lab: Lab, entry: compare.Entry, steps: int) -> list[float]:
    """Validation losses of runs of so many steps, range test included, at rates so far from what that says."""
    lab.task = entry.task._replace(steps=steps)
    run = policy.Run(lab, compare.BASE)
    rates = np.linspace(run.low, run.high, TEST)
    _, losses = lab.run(run.state, 0, 10.0 ** rates[None], warms_up=False)
    read = np.clip(policy.read_range_test(losses[0], rates), run.low, run.high)
    chosen = np.clip(read + SHIFTS, run.low, run.high)
    states, _ = lab.run(
        lab.repeat(lab.start, len(chosen)), 0, 10.0 ** chosen[:, None] * run.factor(np.arange(TEST, steps))
    )
    return lab.evaluate(states)[:, 0].tolist()


def tasks() -> list[compare.Entry]:
    """A third of the open tasks and of the small workloads, one seed each."""
    all_of_them = [e for e in compare.entries("open+small") if "." not in e.key or e.key.endswith(".0")]
    return [entry for number, entry in enumerate(all_of_them) if number % 6 < 2]


def run(part: str) -> None:
    number, count = map(int, part.split("/"))
    for entry in tasks()[number::count]:
        if entry.key not in load():
            lab = Lab(entry.task, entry.seed)
            found = {str(steps): ends(lab, entry, steps) for steps in LENGTHS}
            STORED.write_text(json.dumps({**load(), entry.key: found}))
            print(entry.key, found, flush=True)


def report() -> None:
    print("| steps | tasks |" + "".join(f" {shift:+.2f} |" for shift in SHIFTS))
    for steps in map(str, LENGTHS):
        found = [np.array(row[steps]) for row in load().values() if min(row[steps]) > 0]
        excess = np.array([np.clip(np.log(losses / losses.min()), 0.0, 1.0) for losses in found])
        print(f"| {steps} | {len(found)} |" + "".join(f" {value:.3f} |" for value in excess.mean(0)))


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(sys.argv[2])
    else:
        report()
