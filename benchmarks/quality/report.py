"""Tables of the stored results."""

import statistics

from benchmarks.quality import workloads
from benchmarks.quality.cells import ORACLE_RATES, Cell, start_values
from benchmarks.quality.plans import SEEDS


def _mean(name: str, method: str, start: str, key: str, seeds: tuple[int, ...] = SEEDS) -> float | None:
    stored = [Cell(name, method, start, seed).load() for seed in seeds]
    values = [result[key] for result in stored if result is not None]
    if not values:
        return None
    return float("inf") if None in values else statistics.fmean(values)


def sweep() -> str:
    """Validation loss at every rate of the oracle, averaged over seeds."""
    lines = []
    for name in workloads.NAMES:
        task = workloads.get(name)
        means = {start: _mean(name, "linear", start, "val") for start in ORACLE_RATES}
        if any(value is None for value in means.values()):
            continue
        best = min(means, key=means.get)
        rates = [f"{start_values(task, start)['learning_rate']:.3g}" for start in ORACLE_RATES]
        lines.append(
            f"{name} {task.title}, T={task.total_steps}, test at best {_mean(name, 'linear', best, 'test'):.4f}"
        )
        lines.append("  rate " + " ".join(f"{rate:>9}" for rate in rates))
        lines.append("  val  " + " ".join(f"{v:>8.4f}{'*' if s == best else ' '}" for s, v in means.items()))
    return "\n".join(lines)


def tables() -> str:
    """All tables."""
    return sweep()
