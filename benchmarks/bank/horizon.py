"""What a second round could find: from the state it begins at, rates half a decade apart, short forks and whole runs.

python -m benchmarks.bank.horizon run 0/2
python -m benchmarks.bank.horizon report
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bank import oracle, policy, split
from benchmarks.bank.compare import FORMER, calm
from benchmarks.bank.lab import Lab
from benchmarks.bank.tasks import make

RESULTS = Path(__file__).with_name("horizons")
OFFSETS = np.array([-1.0, -0.5, 0.0, 0.5, 1.0, 1.5])
HORIZONS = (0.03, 0.06, 0.12, 0.24)
TRIED = ([-0.5, 0.0, 0.5], [-0.5, 0.0, 0.5, 1.0], OFFSETS.tolist())
_READINGS = 0.05


def one(lab: Lab) -> dict[str, Any]:
    """Scores of cooled forks by horizon, and losses of the best reading of runs that hold each rate and then fall."""
    run = policy.Run(lab, FORMER)
    x = run.round(run.range_test(), FORMER.first_share, FORMER.first_forks) - FORMER.drift
    if (left := math.ceil(FORMER.second_start * run.steps) - run.spent) > 0:
        run.train(x, left)
    steps, spent, data = run.steps, run.spent, run.data
    states = lab.repeat(run.state, len(OFFSETS))
    lengths = {max(round(horizon * steps), 12): str(horizon) for horizon in HORIZONS}
    check = max(round(_READINGS * steps), 10)
    cools = {n - max(round(FORMER.cool * n), 3): n for n in lengths}
    readings = {*range(check, steps - spent, check), steps - spent}
    scores: dict[str, list[float]] = {}
    best = np.full((len(OFFSETS), 2), np.inf)
    at = 0
    for until in sorted({*cools, *readings}):
        rates = 10.0 ** (x + OFFSETS)[:, None] * run.factor(spent + np.arange(at, until))
        states, _ = lab.run(states, data + at, rates)
        at = until
        if at in cools:
            rest = cools[at] - at
            cool = np.clip((rest - np.arange(rest)) / rest, 0.02, 1.0)
            rates = 10.0 ** (x + OFFSETS)[:, None] * run.factor(spent + at + np.arange(rest)) * cool
            scores[lengths[cools[at]]] = lab.evaluate(lab.run(states, data + at, rates)[0])[:, 0].tolist()
        if at in readings:
            losses = lab.evaluate(states)
            better = losses[:, 0] < best[:, 0]
            best[better] = losses[better]
    return {"scores": scores, "best": best.tolist()}


def run(part: str) -> None:
    number, count = map(int, part.split("/"))
    RESULTS.mkdir(exist_ok=True)
    for i in split.open_tasks()[number::count]:
        file = RESULTS / f"{i}.json"
        if not file.exists():
            file.write_text(json.dumps(one(Lab(make(i)))))
            print(i, flush=True)


def report() -> None:
    ends, scores = [], []
    for i in split.open_tasks():
        file = RESULTS / f"{i}.json"
        if file.exists():
            found, record = json.loads(file.read_text()), oracle.load()[i]
            rows = [{"val": oracle.ratio(v, record, 0), "test": oracle.ratio(t, record)} for v, t in found["best"]]
            ends.append([calm(row) for row in rows])
            scores.append({horizon: np.array(values) for horizon, values in found["scores"].items()})
    y = np.array(ends)
    lost = np.sort(y.min(axis=1))[::-1]
    print(
        f"{len(y)} tasks; at the rate in force {np.exp(y[:, 2].mean()):.3f}, at the best {np.exp(y.min(1).mean()):.3f}"
    )
    print(f"of what is lost even there a tenth of the tasks has {lost[: len(y) // 10].sum() / lost.sum():.0%}")
    for offsets in TRIED:
        at = [int(np.argmin(np.abs(OFFSETS - offset))) for offset in offsets]
        for horizon in map(str, HORIZONS):
            chosen = [at[int(np.argmin(row[horizon][at]))] for row in scores]
            gain = y[np.arange(len(y)), chosen] - y[:, 2]
            print(f"{offsets} by forks of {horizon}: {gain.mean():+.3f} +- {gain.std() / len(y) ** 0.5:.3f}")


if __name__ == "__main__":
    run(sys.argv[2]) if sys.argv[1] == "run" else report()
