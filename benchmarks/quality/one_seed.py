"""The tuner as it is now, once on every workload, against the stored sweeps: minutes in place of hours.

python -m benchmarks.quality.one_seed run [--seed 0]
python -m benchmarks.quality.one_seed report

Its cells are called ``now`` and ``now_all``. The start makes no difference to the rates, so there is one.
"""

import argparse
import json
import math

from benchmarks.quality import plans, workloads
from benchmarks.quality.cells import ORACLE_RATES, Cell
from benchmarks.quality.run import execute


def cells(seed: int) -> list[Cell]:
    names = workloads.NAMES + workloads.VARIED + workloads.SMALL + workloads.HELD_OUT
    alone = [Cell(name, "now", "lr1", seed) for name in names]
    return alone + [Cell(name, "now_all", "lr1wd0.1", seed) for name in plans.REGULARISED]


def ratios(cell: Cell) -> tuple[float, float] | None:
    """Validation and test loss over those of the sweep's best rate under linear decay, same seed."""
    found = cell.load()
    sweep = [Cell(cell.workload, plans.oracle_method(cell.workload), rate, cell.seed).load() for rate in ORACLE_RATES]
    finite = [row for row in sweep if row and row["val"] is not None]
    if found is None or not finite:
        return None
    best = min(finite, key=lambda row: row["val"])
    return found["val"] / best["val"], found["test"] / best["test"]


def report() -> None:
    groups: dict[str, list[tuple[float, float]]] = {}
    print("| workload | validation | test |")
    print("|---|---|---|")
    for seed in plans.SEEDS:
        for cell in cells(seed):
            pair = ratios(cell)
            if pair:
                print(
                    f"| {cell.workload}{', all' if cell.method == 'now_all' else ''} | {pair[0]:.3f} | {pair[1]:.3f} |"
                )
                groups.setdefault("all" if cell.method == "now_all" else cell.workload[0], []).append(pair)
    for name, pairs in groups.items():
        means = [math.exp(sum(math.log(max(pair[k], 1e-3)) for pair in pairs) / len(pairs)) for k in (0, 1)]
        print(f"| {name}: {len(pairs)} | {means[0]:.3f} | {means[1]:.3f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    if given.command == "report":
        report()
    else:
        print(json.dumps(execute(cells(given.seed), processes=given.processes)))
