"""Which cells the benchmark consists of."""

from collections.abc import Iterator

from benchmarks.quality import workloads
from benchmarks.quality.cells import ORACLE_DECAYS, ORACLE_DROPOUTS, ORACLE_RATES, Cell

SEEDS = (0, 1, 2)


def oracle(name: str, seeds: tuple[int, ...] = SEEDS) -> Iterator[Cell]:
    """The learning-rate sweep under linear decay; where regularisation may be tuned, its nine-run grid as well."""
    for start in ORACLE_RATES:
        yield from (Cell(name, "linear", start, seed) for seed in seeds)


def grid(name: str, rate: str, seeds: tuple[int, ...] = SEEDS) -> Iterator[Cell]:
    """The nine runs of weight decay x dropout at one learning rate."""
    for decay in ORACLE_DECAYS:
        for dropout in ORACLE_DROPOUTS:
            yield from (Cell(name, "linear", f"{rate}{decay}{dropout}", seed) for seed in seeds)


def full() -> list[Cell]:
    """Every cell."""
    plan = [cell for name in workloads.NAMES for cell in oracle(name)]
    # The best rate of the sweep is the same for both.
    return plan + [cell for name in ("W3", "W4") for cell in grid(name, "lr1")]


def quick() -> list[Cell]:
    """A subset for ten minutes."""
    return [cell for name in ("W1", "W3") for cell in oracle(name, (0,))]
