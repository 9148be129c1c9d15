"""The figures of `benchmarks.engine` as Markdown tables and a picture."""

import statistics

from benchmarks._engine_problems import PROBLEMS

COLORS = {"ours": "#c1272d", "BoTorch": "#0000a7", "Optuna GP": "#008176", "Vizier": "#b35806", "Optuna TPE": "#eecc16",
          "random": "#999999"}  # fmt: skip
TIMED = ("ours", "BoTorch", "Optuna GP", "Optuna TPE")
STEPS = (25, 50, 100)


def columns(data):
    """The methods of which there are regrets, ours first."""
    found = {cell.split("|")[1] for cell in data.get("regret", {})}
    return tuple(method for method in COLORS if method in found)


def regrets(data, name, method, step):
    """Of all seeds that got so far, by seed."""
    index, found = STEPS.index(step), {}
    for cell, row in data.get("regret", {}).items():
        where, who, seed = cell.split("|")
        if (where, who) == (name, method) and len(row) > index:
            found[int(seed)] = row[index]
    return found


def mean(values):
    return statistics.fmean(values) if values else None


def standard_error(values):
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _number(value, digits=2):
    return "" if value is None else f"{value:.{digits}f}"


def _row(cells):
    return "| " + " | ".join(cells) + " |"


def _head(cells):
    return [_row(cells), _row(["---"] + ["---:"] * (len(cells) - 1))]


def regret_table(data, step, *, is_drifting):
    lines = _head(["problem", *columns(data)])
    for name, problem in PROBLEMS.items():
        if problem.is_drifting != is_drifting:
            continue
        cells = []
        for method in columns(data):
            values = list(regrets(data, name, method, step).values())
            error = f" ± {standard_error(values):.{1 if is_drifting else 2}f}" if len(values) > 1 else ""
            cells.append(_number(mean(values), 1 if is_drifting else 2) + error)
        lines.append(_row([name, *cells]))
    return lines


def _difference(data, names, other, step):
    """Ours less another's, problem by problem."""
    gaps = []
    for name in names:
        a, b = regrets(data, name, "ours", step), regrets(data, name, other, step)
        if a and b:
            gaps.append(mean(list(a.values())) - mean(list(b.values())))
    return gaps


def summary(data):
    quiet = [n for n, p in PROBLEMS.items() if not p.is_drifting and not p.noise]
    noisy = [n for n, p in PROBLEMS.items() if p.noise]
    moving = [n for n, p in PROBLEMS.items() if p.is_drifting]
    lines = _head(["ours less ...", *columns(data)[1:]])
    for label, names in (("noiseless", quiet), ("noisy", noisy)):
        for step in STEPS:
            gaps = {m: _difference(data, names, m, step) for m in columns(data)[1:]}
            if not any(gaps.values()):
                continue
            cells = [f"{mean(g):+.2f} ± {standard_error(g):.2f} ({len(g)})" if g else "" for g in gaps.values()]
            lines.append(_row([f"log10 regret, {label}, {step} evaluations", *cells]))
    for step in STEPS:
        cells = []
        for method in columns(data)[1:]:
            shares = []
            for name in moving:
                a, b = regrets(data, name, "ours", step), regrets(data, name, method, step)
                if a and b:
                    shares.append(mean(list(a.values())) / mean(list(b.values())) - 1.0)
            cells.append(f"{100 * mean(shares):+.0f} % ({len(shares)})" if shares else "")
        if any(cells):
            lines.append(_row([f"cumulative regret, drifting, {step} evaluations", *cells]))
    return lines


def seeds_table(data):
    lines = _head(["runs", *columns(data)])
    for step in STEPS:
        counts = []
        for method in columns(data):
            numbers = [len(regrets(data, name, method, step)) for name in PROBLEMS]
            low, high = min(numbers), max(numbers)
            counts.append(str(low) if low == high else f"{low} to {high}")
        lines.append(_row([f"to {step} evaluations", *counts]))
    return lines


def latency_cells(data, method):
    """(d, n) to first, median and 95th percentile, in milliseconds."""
    found = {}
    for cell, row in data.get("latency", {}).items():
        who, d, n = cell.split("|")
        if who == method:
            found[int(d), int(n)] = row
    return dict(sorted(found.items()))


def latency_table(data):
    mine, methods = latency_cells(data, "ours"), TIMED
    lines = _head(["d, n", *[f"{m}: median (p95)" for m in methods], "BoTorch / ours", "first call of ours, s"])
    for cell, row in mine.items():
        cells = []
        for method in methods:
            other = latency_cells(data, method).get(cell)
            cells.append(f"{other[1]:.1f} ({other[2]:.1f})" if other else "")
        peer = latency_cells(data, "BoTorch").get(cell)
        ratio = f"{peer[1] / row[1]:.0f}" if peer else ""
        lines.append(_row([f"{cell[0]}, {cell[1]}", *cells, ratio, f"{row[0] / 1e3:.1f}"]))
    peer = latency_cells(data, "BoTorch")
    ratios = sorted(peer[cell][1] / row[1] for cell, row in mine.items() if cell in peer)
    if ratios:
        lines += ["", f"BoTorch / ours: median {statistics.median(ratios):.0f}, lowest {ratios[0]:.1f}."]
    return lines


def other_table(data):
    lines = _head(["what else", "figure"])
    for name, (imports, call) in data.get("first", {}).items():
        lines.append(_row([f"first suggestion of a process, d = 6, {name}", f"{call} s, after {imports} s of imports"]))
    for name, times in data.get("vmap", {}).items():
        lines.append(_row([f"a suggestion alone; one of {name}, in one call", f"{times['1']} ms; {times['256']} ms"]))
    for counts in data.get("sweep", {}).values():
        wrong = sum(count for name, count in counts.items() if name != "histories")
        lines.append(_row([f"anything wrong in {counts['histories']} random histories", f"{wrong}"]))
    return lines


def tables(data):
    parts = [["### Summary", ""], summary(data), [""], seeds_table(data)]
    for step in STEPS:
        parts += [["", f"### Mean log10 regret after {step} evaluations, ± standard error", ""]]
        parts += [regret_table(data, step, is_drifting=False)]
    for step in STEPS[1:]:
        parts += [["", f"### Sum of all regrets of {step} evaluations, drifting, ± standard error", ""]]
        parts += [regret_table(data, step, is_drifting=True)]
    parts += [["", "### Milliseconds of processor time per suggestion and observation", ""], latency_table(data)]
    parts += [["", "### Other costs, and the sweep", ""], other_table(data)]
    return "\n".join(line for part in parts for line in part)


def plot(data, path):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    names = [n for n, p in PROBLEMS.items() if not p.is_drifting]
    for method in columns(data):
        points = [mean(list(regrets(data, name, method, 50).values())) for name in names]
        left.plot([p if p is not None else float("nan") for p in points], range(len(names)), "o",
                  color=COLORS[method], label=method, alpha=0.9)  # fmt: skip
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    left.set_xlabel("log10 regret after 50 evaluations (mean)")
    left.legend(fontsize=8)
    for method in TIMED:
        for d, style in ((2, "-"), (12, "--")):
            cells = {n: row[1] for (dims, n), row in latency_cells(data, method).items() if dims == d}
            if cells:
                right.loglog(list(cells), list(cells.values()), style, marker="o", color=COLORS[method],
                             label=f"{method}, d = {d}")  # fmt: skip
    right.grid(alpha=0.3)
    right.set_xlabel("observations (ours: capacity)")
    right.set_ylabel("ms of processor time per suggestion")
    right.set_ylim(top=4e4)
    right.legend(fontsize=8, ncols=2, loc="upper left")
    figure.savefig(path, dpi=110)
