"""Which cells the benchmark consists of."""

from collections.abc import Iterator

from benchmarks.quality import workloads
from benchmarks.quality.cells import ORACLE_DECAYS, ORACLE_DROPOUTS, ORACLE_RATES, Cell

SEEDS = (0, 1, 2)

# With regularisation a higher rate than the oracle's pays, so the nine-run grid is drawn at each of three rates.
GRID_RATES = ("lr1", "lr3.16", "lr10")


def oracle_method(name: str) -> str:
    """The method swept by the oracle; on W8 it skips the faulty batch, or no fixed run would survive."""
    return "linear_skip" if name == "W8" else "linear"


def oracle(name: str, seeds: tuple[int, ...] = SEEDS, steps: int | None = None) -> Iterator[Cell]:
    """The learning-rate sweep under linear decay."""
    for start in ORACLE_RATES:
        yield from (Cell(name, oracle_method(name), start, seed, steps) for seed in seeds)


def grid(name: str, rate: str, seeds: tuple[int, ...] = SEEDS) -> Iterator[Cell]:
    """The nine runs of weight decay x dropout at one learning rate."""
    for decay in ORACLE_DECAYS:
        for dropout in ORACLE_DROPOUTS:
            yield from (Cell(name, "linear", f"{rate}{decay}{dropout}", seed) for seed in seeds)


def full() -> list[Cell]:
    """Every cell."""
    plan = [cell for name in workloads.NAMES for cell in oracle(name)]
    return plan + [cell for name in ("W3", "W4") for rate in GRID_RATES for cell in grid(name, rate)]


def quick() -> list[Cell]:
    """A subset for ten minutes."""
    return [cell for name in ("W1", "W3") for cell in oracle(name, (0,))]
