"""Runs under random faults by every way in, against plain training that skips what cannot be used.

    python -m benchmarks.field.adversary [--way fit] [--runs 67] [--json out.json]

Each run draws its seed, one of two optimizers, and its faults: a share of bad batches or a burst of them, and up to
three single accidents: a gradient or a told loss far out of line, parameters scaled up, all hidden units dead. Plain
training runs at a good rate under linear decay, skips every step that is not finite, and meets none of the accidents.
"""

import argparse
import functools
import json
import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import logging

import numpy as np

from . import tasks, torch_tasks

WAYS = ("fit", "autotune", "loop", "Trainer")
LIMIT = 1.1
STEPS = 800
RATES = {"adam": 1e-2, "momentum": 5e-2}
ACCIDENTS = {"dead": (1.0,), "long": (20.0, 1e4, 1e12), "grad": (1e4, 1e6, 1e17), "tell": (1e3, 1e12, -1e3)}


def draw(number: int) -> tuple[str, int, str, tasks.Faults, tasks.Faults]:
    """The kind of faults of a run, its seed, its optimizer, its faults, and those of them that plain training skips."""
    rng = np.random.default_rng((2024, number))
    name = str(rng.choice(tasks.NON_FINITE))
    kind = str(rng.choice(["share", "burst", "accidents", "share and accidents"]))
    bad = np.zeros(20_000, bool)
    if "share" in kind:
        bad = rng.random(bad.size) < rng.uniform(0.01, 0.2)
    elif kind == "burst":
        begin = int(rng.integers(0, STEPS - 60))
        bad[begin : begin + int(rng.integers(2, 60))] = True
    plan = {}
    if "accidents" in kind:
        for step in rng.integers(1, STEPS, rng.integers(1, 4)):
            what = str(rng.choice(list(ACCIDENTS)))
            plan[int(step)] = what, float(rng.choice(ACCIDENTS[what]))
    faults = functools.partial(_fault, bad, name, plan)
    return kind, number % 5, str(rng.choice(list(RATES))), faults, functools.partial(_fault, bad, name, {})


def _fault(bad: np.ndarray, name: str, plan: dict[int, tuple[str, float]], position: int, call: int) -> tuple:
    if call in plan:
        return plan[call]
    return (name if bad[position] else "none"), 1.0


def one(way: str, number: int) -> dict:
    kind, seed, optimizer, faults, skipped = draw(number)
    ended = torch_tasks.run(way, faults, total=STEPS, optimizer=optimizer, seed=seed)
    other = torch_tasks.plain_of(way, skipped, total=STEPS, optimizer=optimizer, rate=RATES[optimizer], seed=seed)
    return {"way": way, "number": number, "kind": kind, "optimizer": optimizer, "ratio": ended.loss / other,
            "rate": ended.rate, "is_finite": ended.is_finite, "rollbacks": ended.rollbacks}  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = [
        "| way in | faults | runs | non-finite | median | 90 % | worst | above 1.1 |\n|---|---|---|---|---|---|---|---|"
    ]
    for way in WAYS:
        for kind in (*sorted({row["kind"] for row in rows}), "all"):
            these = [row for row in rows if row["way"] == way and kind in (row["kind"], "all")]
            if these:
                ratios = np.array([row["ratio"] for row in these])
                lost = sum(not row["is_finite"] for row in these)
                figures = (np.median(ratios), np.quantile(ratios, 0.9), ratios.max())
                shown = " | ".join(f"{figure:.3f}" for figure in figures)
                above = int(np.sum(~(ratios <= LIMIT)))
                lines.append(f"| `{way}` | {kind} | {len(these)} | {lost} | {shown} | {above} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, action="append")
    parser.add_argument("--runs", type=int, default=67, help="of each way in")
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--json")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    rows = []
    for way in args.way or ("fit", "autotune", "Trainer"):
        for number in range(args.first, args.first + args.runs):
            rows.append(one(way, number))
            row = rows[-1]
            is_bad = not (row["is_finite"] and row["ratio"] <= LIMIT)
            said = f"{row['ratio']:.3f}, rate {row['rate']:.1e}, {row['rollbacks']} rollbacks"
            print(f"{way:>8} {number:3} {row['kind']:>20} {row['optimizer']:>8}: {said}{' BAD' * is_bad}", flush=True)
            if args.json:
                with open(args.json, "w") as file:
                    json.dump(rows, file, indent=1)
    print(table(rows))
    return 1 if any(not (row["is_finite"] and row["ratio"] <= LIMIT) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
