"""Tables of the stored results, in Markdown."""

import functools
import math
import statistics
from collections.abc import Iterable, Sequence

import scipy.stats

from benchmarks.quality import plans, workloads
from benchmarks.quality.cells import ORACLE_DECAYS, ORACLE_DROPOUTS, ORACLE_RATES, Cell, start_values

# A run that diverged counts as this many times the oracle's loss, so that means stay finite; losses below the least one
# count as that, since all of them are as good as none.
_DIVERGED, _LEAST_LOSS = 10.0, 1e-4

BENCHMARK = ("W1", "W2", "W3", "W4", "W5", "W6", "W7", "W8")

_PEERS = (*plans.STRONGEST, *plans.FREE, *plans.STARTED, *plans.POPULATIONS, *plans.AMPLE)
_OURS = ("ours", "ours_no_eval")

# Peers of the table of pairs.
_COMPARED = (*plans.STRONGEST, "range_test", *plans.POPULATIONS, *plans.AMPLE)

# Methods that end with one rate, which can be held against the best of the sweep; and what counts as near, in decades.
_PICKERS = ("ours", "wide_fork", "range_test", "optuna8_half")
_NEAR = 0.25


@functools.cache
def _load(cell: Cell) -> dict | None:
    return cell.load()


def _values(name: str, method: str, start: str, key: str, steps: int | None = None) -> dict[int, float]:
    """By seed; a diverged run is infinite."""
    stored = {seed: _load(Cell(name, method, start, seed, steps)) for seed in plans.MORE_SEEDS}
    return {s: math.inf if r[key] is None else r[key] for s, r in stored.items() if r is not None}


def _mean(values: dict[int, float]) -> float:
    return statistics.fmean(values.values()) if values else math.nan


def best_start(name: str, method: str, starts: Iterable[str], steps: int | None = None) -> str | None:
    """The start with the lowest mean validation loss over the seeds all of them have; None when one is missing."""
    by_start = {start: _values(name, method, start, "val", steps) for start in starts}
    shared = set.intersection(*(set(values) for values in by_start.values()))
    if not shared:
        return None
    return min(by_start, key=lambda start: statistics.fmean(by_start[start][seed] for seed in sorted(shared)))


def oracle_test(name: str, steps: int | None = None) -> dict[int, float]:
    """Test loss by seed of the rate that is best on validation, under linear decay."""
    method = plans.oracle_method(name)
    start = best_start(name, method, ORACLE_RATES, steps)
    return {} if start is None else _values(name, method, start, "test", steps)


def log_ratios(name: str, method: str, start: str, steps: int | None = None) -> list[float]:
    """log of test loss over the oracle's, paired by seed."""
    reference = oracle_test(name, steps)
    tested = _values(name, method, start, "test", steps)
    return [_log_ratio(tested[s], reference[s]) for s in sorted(tested.keys() & reference.keys())]


def _log_ratio(tested: float, reference: float) -> float:
    return min(math.log(max(tested, _LEAST_LOSS) / max(reference, _LEAST_LOSS)), math.log(_DIVERGED))


def bounds(logs: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of ratios and the ends of its 95 % t interval, which are NaN for fewer than three values."""
    mean = statistics.fmean(logs)
    if len(logs) < 3:
        return math.exp(mean), math.nan, math.nan
    half = scipy.stats.t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def interval(logs: Sequence[float]) -> str:
    """Geometric mean of ratios and, from three values on, its 95 % t interval."""
    mean, low, high = bounds(logs)
    return f"{mean:.3f}" if math.isnan(low) else f"{mean:.3f} ({low:.3f}-{high:.3f})"


def label(method: str) -> str:
    """The name of a method in tables, which tells when it had more than the budget."""
    return f"{method} (four times the budget)" if method in plans.AMPLE else method


def sweep() -> str:
    """Validation loss at every rate of the oracle, averaged over seeds."""
    lines = []
    for name in workloads.NAMES:
        task, method = workloads.get(name), plans.oracle_method(name)
        best = best_start(name, method, ORACLE_RATES)
        if best is None:
            continue
        means = {start: _mean(_values(name, method, start, "val")) for start in ORACLE_RATES}
        rates = [f"{start_values(task, start)['learning_rate']:.3g}" for start in ORACLE_RATES]
        lines.append(f"{name} {task.title}, T={task.total_steps}, test at best {_mean(oracle_test(name)):.4f}")
        lines.append("  rate " + " ".join(f"{rate:>9}" for rate in rates))
        lines.append("  val  " + " ".join(f"{v:>8.4f}{'*' if s == best else ' '}" for s, v in means.items()))
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_row(header), _row("---" for _ in header), *(_row(row) for row in rows)])


def methods_table() -> str:
    """Test loss over the oracle's: one row per method and start, one column per workload."""
    names = [name for name in workloads.NAMES if oracle_test(name)]
    kinds = [*_PEERS, *_OURS, "ours_all"]
    rows = []
    for schedule in ("linear", "constant", "cosine", "wsd"):
        rows.append([f"{schedule}, default rate", *(_ratio(n, plans.oracle_method(n, schedule), "lr1") for n in names)])
        if schedule != "linear":
            rows.append([f"{schedule}, best of 7", *(_oracle_ratio(n, schedule) for n in names)])
    for method in kinds:
        for start in plans.starts("", method):
            shown = label(method) if len(plans.starts("", method)) == 1 else f"{method} from {start}"
            cells = [_ratio(name, method, start) for name in names]
            if any(cells):
                rows.append([shown, *cells])
    return _table(["test / oracle", *names], rows)


def others_table(names: Sequence[str]) -> str:
    """The same for further workloads, with the geometric mean over all of them."""
    names = [name for name in names if oracle_test(name)]
    kinds: list[tuple[str, str, str | None]] = [("linear, default rate", "linear", "lr1")]
    kinds += [("wsd, best of 7", "wsd", None)]
    kinds += [(method, method, "lr1") for method in (*plans.STRONGEST, "range_test")]
    kinds += [(f"{method} from {start}", method, start) for method in _OURS for start in plans.STARTS]
    rows = []
    for shown, method, start in kinds:
        chosen = {name: start or best_start(name, method, ORACLE_RATES) for name in names}
        logs = {name: log_ratios(name, method, at) for name, at in chosen.items() if at is not None}
        if logs and all(logs.values()) and len(logs) == len(names):
            mean = math.exp(statistics.fmean(statistics.fmean(each) for each in logs.values()))
            rows.append([shown, *(interval(logs[name]) for name in names), f"{mean:.3f}"])
    return _table(["test / oracle", *names, "geometric mean"], rows)


def _ratio(name: str, method: str, start: str) -> str:
    logs = log_ratios(name, method, start)
    return interval(logs) if logs else ""


def _oracle_ratio(name: str, schedule: str) -> str:
    method = plans.oracle_method(name, schedule)
    start = best_start(name, method, ORACLE_RATES)
    return "" if start is None else _ratio(name, method, start)


def grids_table() -> str:
    """The nine-run grids of weight decay and dropout at each rate: test loss of the best over the oracle."""
    starts = [d + o for d in ORACLE_DECAYS for o in ORACLE_DROPOUTS]
    rows = []
    for name in plans.REGULARISED:
        for rate in plans.GRID_RATES:
            best = best_start(name, "linear", [rate + start for start in starts])
            if best is not None:
                rows.append([name, rate, best, _ratio(name, "linear", best)])
    return _table(["workload", "rate", "best of 9", "test / oracle"], rows)


def summary_table() -> str:
    """Geometric mean over the rate-only workloads (W1, W2, W5, W6), all starts together, and the worst start."""
    names = [name for name in ("W1", "W2", "W5", "W6") if oracle_test(name)]
    rows = []
    for method in (*_PEERS, *_OURS):
        starts = plans.starts("", method)
        cells = {(n, s): log_ratios(n, method, s) for n in names for s in starts}
        if not all(cells.values()):
            continue
        means = [statistics.fmean(logs) for logs in cells.values()]
        rows.append([label(method), f"{math.exp(statistics.fmean(means)):.3f}", f"{math.exp(max(means)):.3f}"])
    return _table([f"over {', '.join(names)}", "geometric mean", "worst"], rows)


def _overhead(name: str, method: str, start: str, steps: int | None = None) -> dict[int, float]:
    """Share of the budget that is not in the final state, by seed: discarded forks and evaluations."""
    spent, useful = (_values(name, method, start, key, steps) for key in ("spent", "useful"))
    return {seed: 1.0 - useful[seed] / spent[seed] for seed in spent}


def longer_table() -> str:
    """Ratio to the oracle, share of discarded steps and of all that is not training, as the budget grows."""
    rows = []
    for name, budgets in plans.LONGER.items():
        for steps in (None, *budgets):
            for start in plans.STARTS:
                logs = log_ratios(name, "ours", start, steps)
                if logs:
                    shares = (
                        _mean(_values(name, "ours", start, "share", steps)),
                        _mean(_overhead(name, "ours", start, steps)),
                    )
                    budget = steps or workloads.get(name).total_steps
                    rows.append(
                        [name, str(budget), start, interval(logs), *(f"{100 * share:.1f} %" for share in shares)]
                    )
    return _table(["workload", "T", "start", "test / oracle", "discarded", "discarded and evaluations"], rows)


def _picked(name: str, method: str) -> list[float]:
    """Decades of each run's last rate above the best rate of the sweep by validation."""
    best = best_start(name, plans.oracle_method(name), ORACLE_RATES)
    if best is None:
        return []
    reference = math.log10(start_values(workloads.get(name), best)["learning_rate"])
    stored = [
        _load(Cell(name, method, start, seed)) for start in plans.starts(name, method) for seed in plans.MORE_SEEDS
    ]
    rates = [r["chosen"]["learning_rate"] if "chosen" in r else r["rate"] for r in stored if r is not None]
    return [math.log10(rate) - reference for rate in rates]


def picks_table() -> str:
    """How far the rate that a run settles on is from the best of the sweep: ours by workload, then over all of them."""
    kinds = [(name, "ours", _picked(name, "ours")) for name in workloads.NAMES]
    for method in _PICKERS:
        kinds.append(("all", method, [offset for name in workloads.NAMES for offset in _picked(name, method)]))
    rows = []
    for name, method, offsets in kinds:
        if offsets:
            near = statistics.fmean(abs(offset) <= _NEAR for offset in offsets)
            moments = f"{statistics.fmean(offsets):+.2f}", f"{statistics.pstdev(offsets):.2f}"
            rows.append([name, method, str(len(offsets)), *moments, f"{100 * near:.0f} %"])
    header = ["workload", "method", "runs", "mean offset, decades", "standard deviation", f"within {_NEAR}"]
    return _table(header, rows)


def _since_shift(result: dict) -> list[float]:
    """The losses of a W7 run from the stretch on in which its data changed.

    Data changes at the T/2-th step of a run; of ours, discarded steps apart, since they see no new data.
    """
    curve = result["curve"]
    return curve[math.floor(len(curve) * (0.5 + result.get("share", 0.0))) :]


def drift_table() -> str:
    """W7: mean training loss after the shift, above the lowest level any stored run reached there.

    All are compared over as many steps as the shortest run has left. The loss counts every step of the budget.
    """
    kinds = [(schedule, start) for schedule in ("constant", "linear", "cosine") for start in ORACLE_RATES]
    kinds += [("ours", start) for start in plans.STARTS] + [(name, "lr1") for name in plans.STRONGEST]
    runs = {kind: [_load(Cell("W7", *kind, seed)) for seed in plans.SEEDS] for kind in kinds}
    curves = {
        kind: [_since_shift(r) for r in stored if r is not None and None not in r["curve"]]
        for kind, stored in runs.items()
    }
    curves = {kind: found for kind, found in curves.items() if found}
    if not curves:
        return ""
    points = min(len(curve) for found in curves.values() for curve in found)
    means = {kind: [statistics.fmean(at) for at in zip(*(curve[:points] for curve in found), strict=True)]
             for kind, found in curves.items()}  # fmt: skip
    floor = min(min(curve) for curve in means.values())
    regret = {kind: statistics.fmean(curve) - floor for kind, curve in means.items()}
    best = {
        schedule: min((kind for kind in regret if kind[0] == schedule), key=regret.__getitem__, default=None)
        for schedule in ("constant", "linear", "cosine")
    }
    shown = [kind for kind in regret if kind[1] in plans.STARTS or kind in best.values()]
    label = {kind: " (best of 7)" for kind in best.values()}
    rows = [[f"{kind[0]} from {kind[1]}{label.get(kind, '')}", f"{regret[kind]:.4f}"] for kind in shown]
    return _table(["W7", "area regret after the shift"], rows)


def of_each_run(name: str, method: str) -> dict[int, float]:
    """log of test loss over the oracle's by seed, averaged over the method's starts."""
    reference = oracle_test(name)
    by_seed: dict[int, list[float]] = {}
    for start in plans.starts("", method):
        for seed, value in _values(name, method, start, "test").items():
            if seed in reference:
                by_seed.setdefault(seed, []).append(_log_ratio(value, reference[seed]))
    return {seed: statistics.fmean(logs) for seed, logs in by_seed.items()}


def paired_table() -> str:
    """Ours over each of the strongest peers, paired by workload and seed; a start of ours is not chosen, all count."""
    rows = []
    for title, ours_of in (
        ("learning rate only", dict.fromkeys(BENCHMARK, "ours")),
        ("everything tuned on W3, W4", {n: "ours_all" if n in plans.REGULARISED else "ours" for n in BENCHMARK}),
    ):
        for peer in (*_COMPARED, "linear"):
            pairs = {name: _differences(name, method, peer) for name, method in ours_of.items()}
            logs = [difference for differences in pairs.values() for difference in differences]
            if logs:
                shown = "linear, default rate" if peer == "linear" else label(peer)
                rows.append([title, shown, f"{sum(map(bool, pairs.values()))}", f"{len(logs)}", interval(logs)])
    return _table(["ours, with", "over", "workloads", "pairs", "ratio of test losses"], rows)


def _differences(name: str, method: str, peer: str) -> list[float]:
    mine = of_each_run(name, method)
    theirs = of_each_run(name, plans.oracle_method(name) if peer == "linear" else peer)
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def cost_table() -> str:
    """What ours spends on forks that are thrown away, what it does from a good start, and how long it takes."""
    rows = []
    for name in workloads.NAMES:
        for method, start in (("ours", "lr1"), ("ours_all", "lr1wd0.1")):
            shares, walls = (_values(name, method, start, key) for key in ("share", "wall_s"))
            if not shares:
                continue
            plain_wall = _mean(_values(name, plans.oracle_method(name), "lr1", "wall_s"))
            mine = _values(name, method, start, "test")
            untuned = _values(name, plans.oracle_method(name), "lr1", "test")
            logs = [math.log(mine[seed] / untuned[seed]) for seed in sorted(mine.keys() & untuned.keys())]
            rows.append(
                [
                    name,
                    method,
                    f"{100 * _mean(shares):.1f} %",
                    interval(logs),
                    f"{_mean(walls):.0f} s",
                    f"{plain_wall:.0f} s",
                ]
            )
    header = [
        "workload",
        "method",
        "discarded",
        "from the default rate, over linear decay there",
        "wall time",
        "linear",
    ]
    return _table(header, rows)


def ablation_table() -> str:
    """Test loss with one part taken away over ours with all its parts, paired by seed."""
    rows = []
    for ablation in plans.ABLATIONS:
        cells = []
        for names, method, start in plans.ABLATED.values():
            logs = []
            for name in names:
                without, whole = (_values(name, m, start, "test") for m in (f"{method}-{ablation}", method))
                logs += [math.log(without[seed] / whole[seed]) for seed in sorted(without.keys() & whole.keys())]
            cells.append(interval(logs) if logs else "")
        if any(cells):
            rows.append([ablation.replace("_", " "), *cells])
    return _table(["without", *plans.ABLATED], rows)


def tables() -> str:
    """All tables."""
    parts = [
        ("Summary, learning rate only", summary_table()),
        ("Against the strongest peers (95 % interval over pairs)", paired_table()),
        ("What it costs", cost_table()),
        ("One part taken away", ablation_table()),
        ("Test loss over the learning-rate oracle (95 % interval over seeds)", methods_table()),
        ("More workloads: other models, optimizers, losses and lengths", others_table(workloads.VARIED)),
        ("Small workloads", others_table(workloads.SMALL)),
        ("Workloads kept apart: no constant was chosen on them", others_table(workloads.HELD_OUT)),
        ("Regularisation grids", grids_table()),
        ("Longer runs", longer_table()),
        ("The rate it settles on", picks_table()),
        ("Drift", drift_table()),
    ]
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in parts)
