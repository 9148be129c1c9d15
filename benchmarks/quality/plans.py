"""Which cells the benchmark consists of."""

import itertools
from collections.abc import Iterator

from benchmarks.quality import workloads
from benchmarks.quality.cells import ORACLE_DECAYS, ORACLE_DROPOUTS, ORACLE_RATES, Cell

SEEDS = (0, 1, 2)
MORE_SEEDS = (0, 1, 2, 3, 4)

# Starts: a hundredth of the default rate, the default, and thirty times it; with weight decay where it may be tuned.
STARTS = ("lr0.01", "lr1", "lr30")
DECAY_STARTS = ("wd0", "wd0.1", "wd3")

REGULARISED = ("W3", "W4")
"""Workloads on which everything is tuned as well."""

# With regularisation a higher rate than the oracle's pays, so the nine-run grid is drawn at each of three rates.
GRID_RATES = ("lr1", "lr3.16", "lr10")

LONGER = {"W1": (4800, 19200)}
"""Further budgets, to see whether the price of tuning falls."""

STRONGEST = ("prodigy_cosine", "schedule_free", "wide_fork")
FREE = ("range_test", "dog", "mechanic_cosine", "cocob", "momo")
"""Methods that take no start."""
STARTED = ("plateau", "hypergradient", "three_stream", "autotunenet_1_0_2")
ABLATIONS = (
    "hot_scores",
    "one_intercept",
    "fresh_data",
    "no_gate",
    "no_decay",
    "fresh_surrogate",
)
ABLATED = {
    "W1, learning rate": (("W1",), "ours", "lr0.01"),
    "W5, learning rate": (("W5",), "ours", "lr0.01"),
    "W3, everything": (("W3",), "ours_all", "lr0.01wd0.1"),
    "S7, S12 to S14, learning rate": (("S7", "S12", "S13", "S14"), "ours", "lr0.01"),
}
"""What ablations run on: workloads, the method they are taken from, and the start, a bad one."""
POPULATIONS = ("autolrs", "pbt4", "pb2_4", "optuna8", "optuna8_half")
AMPLE = ("pbt4_4x", "pb2_4_4x")
"""Populations of which each member has a whole run: four times the budget of every other method."""


def oracle_method(name: str, schedule: str = "linear") -> str:
    """The method swept by the oracle; on W8 it skips the faulty batch, or no fixed run would survive."""
    return f"{schedule}_skip" if name == "W8" else schedule


def oracle(name: str, seeds: tuple[int, ...], steps: int | None = None, schedule: str = "linear") -> Iterator[Cell]:
    """The sweep of the learning rate under one schedule."""
    for start in ORACLE_RATES:
        yield from (Cell(name, oracle_method(name, schedule), start, seed, steps) for seed in seeds)


def grid(name: str, rate: str, seeds: tuple[int, ...] = SEEDS) -> Iterator[Cell]:
    """The nine runs of weight decay x dropout at one learning rate."""
    for decay, dropout in itertools.product(ORACLE_DECAYS, ORACLE_DROPOUTS):
        yield from (Cell(name, "linear", f"{rate}{decay}{dropout}", seed) for seed in seeds)


def starts(name: str, method: str) -> tuple[str, ...]:
    """The starts a method is run from."""
    if method == "ours_all":
        return tuple(rate + decay for rate, decay in itertools.product(STARTS, DECAY_STARTS))
    return STARTS if method in ("ours", "ours_no_eval", *STARTED) else ("lr1",)


def method(name: str, which: str, seeds: tuple[int, ...], steps: int | None = None) -> Iterator[Cell]:
    """One method from all its starts."""
    for start in starts(name, which):
        yield from (Cell(name, which, start, seed, steps) for seed in seeds)


def ablated() -> Iterator[Cell]:
    """One part taken away at a time."""
    for name in ABLATIONS:
        for workloads_of, which, start in ABLATED.values():
            for workload in workloads_of:
                yield from (Cell(workload, f"{which}-{name}", start, seed) for seed in SEEDS)


def full() -> list[Cell]:
    """Every cell."""
    plan: list[Cell] = []
    for name in workloads.NAMES:
        plan.extend(oracle(name, MORE_SEEDS))
        for schedule in ("constant", "cosine", "wsd"):
            plan.extend(oracle(name, SEEDS, schedule=schedule))
        for which in STRONGEST:
            plan.extend(method(name, which, MORE_SEEDS))
        for which in (*FREE, *STARTED, *POPULATIONS, *AMPLE):
            plan.extend(method(name, which, SEEDS))
        plan.extend(method(name, "ours", MORE_SEEDS))
        plan.extend(method(name, "ours_no_eval", SEEDS))
    for name in (*workloads.VARIED, *workloads.HELD_OUT):
        plan.extend(oracle(name, SEEDS))
        plan.extend(oracle(name, SEEDS, schedule="wsd"))
        for which in (*STRONGEST, "range_test", "ours", "ours_no_eval"):
            plan.extend(method(name, which, SEEDS))
    for name in workloads.SMALL:
        plan.extend(oracle(name, SEEDS))
        for which in (*STRONGEST, "range_test", "ours", "ours_no_eval"):
            plan.extend(method(name, which, SEEDS))
    for name in REGULARISED:
        for rate in GRID_RATES:
            plan.extend(grid(name, rate))
        plan.extend(method(name, "ours_all", MORE_SEEDS))
    plan.extend(ablated())
    for name, budgets in LONGER.items():
        for steps in budgets:
            plan.extend(oracle(name, SEEDS, steps))
            plan.extend(method(name, "ours", SEEDS, steps))
    return plan


def quick() -> list[Cell]:
    """A subset for ten minutes: one seed, two workloads, the strongest methods."""
    plan: list[Cell] = []
    for name in ("W1", "W3"):
        plan.extend(oracle(name, (0,)))
        for which in (*STRONGEST, "ours"):
            plan.extend(method(name, which, (0,)))
    plan.extend(method("W3", "ours_all", (0,)))
    return plan
