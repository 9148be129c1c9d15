"""Judges policies on tasks of the bank: paired, by family, by the tail.

python -m benchmarks.bank.compare run open 0/1 base,argmin    # tasks, part of them, names
python -m benchmarks.bank.compare report open base argmin
python -m benchmarks.bank.compare groups open fit "known 15% lost"
python -m benchmarks.bank.compare constants open              # each one half and double, paired with base

Tasks are ``open``, ``locked``, ``again`` (the open ones from another start on other batches, held against the oracles
of the first; differences of two policies do not see that), ``small`` (`benchmarks.bank.small`) and ``curves``
(`benchmarks.bank.curves`); ``open+small`` is both.
"""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.bank import curves, oracle, policy, small, split
from benchmarks.bank.lab import Lab
from benchmarks.bank.tasks import Task, make

RESULTS = Path(__file__).with_name("results")
BASE = policy.Knobs()
# The algorithm when a round always went on from its best fork.
ALWAYS = dataclasses.replace(BASE, spoils=math.inf)
# The algorithm when its first round did not go on to lower rates while no fork had gained.
BEFORE = dataclasses.replace(ALWAYS, seeks=False)
# And when training went on a little below the winner of the first round and rates did not climb. What was tried, was
# tried beside these.
FORMER = dataclasses.replace(BEFORE, drift=0.25, climb=0.0, unseen=0.0, reach=math.inf, far=math.inf)


def _with(**changes: Any) -> policy.Knobs:
    return dataclasses.replace(FORMER, **changes)


# What the algorithm does, what was tried in its place, and what it would have done with one constant changed.
POLICIES: dict[str, policy.Knobs] = {
    "base": ALWAYS,
    "goes back": BASE,
    "always the best fork": ALWAYS,
    "metric noise .1": dataclasses.replace(BASE, metric_noise=0.1),
    "metric noise .3": dataclasses.replace(BASE, metric_noise=0.3),
    "metric noise .3 best fork": dataclasses.replace(ALWAYS, metric_noise=0.3),
    "forks from 12": dataclasses.replace(BASE, least_fork=12),
    "no validation": dataclasses.replace(ALWAYS, validates=False),
    "seeks not": BEFORE,
    "no validation, seeks not": dataclasses.replace(BEFORE, validates=False),
    "new batches": dataclasses.replace(BEFORE, validates=False, rewinds=False),
    "no validation unclipped": dataclasses.replace(BEFORE, validates=False, reach=math.inf),
    "new batches unclipped": dataclasses.replace(BEFORE, validates=False, rewinds=False, reach=math.inf),
    "no validation as high": dataclasses.replace(BEFORE, validates=False, reach=math.inf, unseen=0.0),
    "new batches as high": dataclasses.replace(BEFORE, validates=False, rewinds=False, reach=math.inf, unseen=0.0),
    "climbs alike": dataclasses.replace(BEFORE, far=math.inf),
    "no climb": dataclasses.replace(BEFORE, climb=0.0),
    "climb by half": dataclasses.replace(BEFORE, climb=0.5),
    "one round": dataclasses.replace(BEFORE, second_forks=0),
    "later round": dataclasses.replace(BEFORE, second_start=0.2, second_share=0.06, second_forks=3),
    "longer first forks": dataclasses.replace(BEFORE, first_share=0.045),
    "climb and drift": dataclasses.replace(BEFORE, drift=0.25),
    "climbing forks": dataclasses.replace(BEFORE, rise=0.25, climb=0.0),
    "drift": FORMER,  # where the others of its table ran
    "former": FORMER,
    "argmin": _with(judge="argmin"),
    "no second round": _with(second_forks=0),
    "never back": _with(patience=10**6),
    "back at once": _with(confirm_share=0.0),
    "linear": _with(hold=0.0),
    "former no validation": _with(validates=False),
    "no validation unlowered": _with(validates=False, falls=0),
    "former new batches": _with(validates=False, rewinds=False),
    "new batches unlowered": _with(validates=False, rewinds=False, falls=0),
    "former new batches lower": _with(validates=False, rewinds=False, drift=0.5),
    "third": _with(third_start=0.3),
    "third, no drift": _with(third_start=0.3, drift=0.0),
    "both sides again": _with(second_least=3),
    "shorter forks": _with(least_fork=8),
    "longer cool-down": _with(cool=0.5),
    "flat prior": dataclasses.replace(BASE, curvature=0.0),
    "forgets nothing": dataclasses.replace(BASE, time_scale=1e9),
}
# Numbers that tell where there is a validation metric.
CONSTANTS = (
    "test_share",
    "first_share",
    "second_start",
    "second_share",
    "cool",
    "line_step",
    "price",
    "signal",
    "lengthscale",
    "noise",
    "time_scale",
    "curvature",
    "resolution",
    "hold",
    "check_share",
    "back",
    "climb",
    "far",
    "ending",
    "confirm_share",
)
for _field in CONSTANTS:
    for _name, _factor in (("half", 0.5), ("double", 2.0)):
        _value = min(getattr(BASE, _field) * _factor, 0.9 if _field == "hold" else math.inf)
        POLICIES[f"{_field} {_name}"] = dataclasses.replace(BASE, **{_field: _value})
KNOWN = {f"known {waste:.0%} lost": waste for waste in (0.0, 0.1, 0.15, 0.2)}


class Entry(NamedTuple):
    """A task under a seed: the name of its results, and the oracle that they are held against."""

    key: str
    seed: int
    record: oracle.Record

    @property
    def task(self) -> Task:
        if self.key in small.load():
            return small.make(self.key.split(".")[0])
        return curves.make(self.key) if self.key in curves.load() else make(int(self.key.split("-")[0]))

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.key}.json"

    def read(self) -> dict[str, dict[str, float]]:
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def add(self, name: str, result: dict[str, float]) -> None:
        RESULTS.mkdir(exist_ok=True)
        self.file.write_text(json.dumps({**self.read(), name: result}))


def entries(kinds: str) -> list[Entry]:
    found = []
    for kind in kinds.split("+"):
        if kind == "small":
            found += [Entry(key, int(key.split(".")[1]), small.load()[key]) for key in small.KEYS]
        elif kind == "curves":
            found += [Entry(key, 0, record) for key, record in curves.load().items() if record["usable"]]
        else:
            seed, suffix = (1, "-1") if kind == "again" else (0, "")
            tasks = split.locked_tasks() if kind == "locked" else split.open_tasks()
            found += [Entry(f"{i}{suffix}", seed, oracle.load()[i]) for i in tasks]
    return found


def run_one(entry: Entry, name: str, lab: Lab) -> dict[str, float]:
    began, record = time.perf_counter(), entry.record
    if name in KNOWN:
        known = record["best"][2] - 0.15
        result = policy.tune(lab, dataclasses.replace(BASE, climb=0.0), rate=known, waste=KNOWN[name])
    else:
        result = policy.tune(lab, POLICIES[name])
    return {
        "test": oracle.ratio(result.losses[1], record),
        "val": oracle.ratio(result.losses[0], record, 0),
        "off": result.rate - record["best"][2],
        "discarded": result.discarded,
        "back": result.went_back,
        "forks": result.forks,
        "seconds": time.perf_counter() - began,
    }


def run(kinds: str, part: str, names: list[str]) -> None:
    number, count = map(int, part.split("/"))
    for entry in entries(kinds)[number::count]:
        lab = None
        for name in names:
            if name not in entry.read():
                lab = lab or Lab(entry.task, entry.seed)
                entry.add(name, run_one(entry, name, lab))
        found = entry.read()
        print(entry.key, entry.record["name"], {name: round(found[name]["test"], 3) for name in names}, flush=True)


def summary(rows: list[dict[str, float]]) -> str:
    """Geometric mean of the test ratio, and of a calmer one: test and validation together, within half and double."""
    test = np.array([max(row["test"], 1e-3) for row in rows])
    each = np.array([calm(row) for row in rows])
    return (
        f"{np.exp(each.mean()):.3f} +- {each.std() / len(each) ** 0.5:.3f} | {np.exp(np.log(test).mean()):.3f}"
        f" | {np.median(test):.3f} | {np.quantile(test, 0.9):.2f} | {test.max():.2f} | {np.mean(test > 1.5):.0%}"
        f" | {np.mean([row['discarded'] for row in rows]):.1%} | {np.mean([row['off'] for row in rows]):+.2f}"
    )


def by_group(kind: str, name: str, other: str) -> None:
    """Where one policy gains on another: families, optimizers and lengths, the largest loss first."""
    groups: dict[str, list[float]] = {}
    for entry in entries(kind):
        found, record = entry.read(), entry.record
        if name in found and other in found:
            steps = record["name"].split("steps ")[1].split()[0]
            for group in (record["family"], record["optimizer"], f"{steps} steps"):
                groups.setdefault(group, []).append(calm(found[name]) - calm(found[other]))
    for group, gaps in sorted(groups.items(), key=lambda entry: -sum(entry[1])):
        print(f"{group:20s} {len(gaps):3d} tasks  {np.mean(gaps):+.3f}")


def calm(row: dict[str, float]) -> float:
    """Logarithm of the ratio, test and validation together, within half and double."""
    both = 0.5 * np.log(max(row["test"], 1e-3)) + 0.5 * np.log(max(row["val"], 1e-3))
    return float(np.clip(both, -0.7, 0.7))


def report(kind: str, names: list[str]) -> None:
    found = {entry.key: entry.read() for entry in entries(kind)}
    ids = [i for i, rows in found.items() if all(name in rows for name in names)]
    print(f"{len(ids)} tasks | calm | geo | median | p90 | worst | > 1.5 | discarded | decades off")
    for name in names:
        rows = [found[i][name] for i in ids]
        line = summary(rows)
        if name != names[0]:
            gap = np.array([calm(found[i][name]) - calm(found[i][names[0]]) for i in ids])
            line += f" | {gap.mean():+.3f} +- {gap.std() / len(gap) ** 0.5:.3f}"
        print(f"{name:22s} {line}")


def constants(kind: str) -> None:
    found = [entry.read() for entry in entries(kind)]
    for field in CONSTANTS:
        cells = []
        for factor in ("half", "double"):
            name = f"{field} {factor}"
            gaps = np.array([calm(rows[name]) - calm(rows["base"]) for rows in found if name in rows])
            if len(gaps):
                cells.append(f"{gaps.mean():+.3f} +- {gaps.std() / len(gaps) ** 0.5:.3f} ({len(gaps)})")
        if cells:
            print(f"| {field} | {getattr(BASE, field):g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if sys.argv[1] == "constants":
        constants(sys.argv[2])
        sys.exit()
    if sys.argv[1] == "groups":
        by_group(*sys.argv[2:5])
    elif sys.argv[1] == "run":
        run(sys.argv[2], sys.argv[3], sys.argv[4].split(","))
    else:
        report(sys.argv[2], sys.argv[3:])
