"""The runner: works through a plan of cells, two processes at a time, skipping what is already stored.

python -m benchmarks.quality run [--quick] [--workloads W1 ...] [--methods ours ...] [--seeds 0 1 ...]
python -m benchmarks.quality report [--into docs/results.md] [--plot docs/results.png]
"""

import argparse
import itertools
import multiprocessing
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Iterable

from benchmarks.quality.cells import Cell

_MARKER = "<!-- Tables: python -m benchmarks.quality report --into docs/results.md -->"


def _enter(counter) -> None:
    """Give each process one core and one thread: small models run no faster on more."""
    with counter.get_lock():
        index, counter.value = counter.value, counter.value + 1
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[index % len(cores)]})
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")


def _work(cells: list[Cell]) -> tuple[int, list[str]]:
    """Run cells of one kind; a cell that fails is reported and does not stop the others."""
    from benchmarks.quality.methods import run_cell

    done, failures = 0, []
    for cell in cells:
        began = time.perf_counter()
        try:
            result = run_cell(cell)
        except Exception:
            failures.append(f"{cell}\n{traceback.format_exc()}")
            continue
        cell.save(result)
        done += 1
        print(
            f"{cell.workload} {cell.method:<16} {cell.start:<10} s{cell.seed}  val {result['val']:.4f}  "
            f"test {result['test']:.4f}  useful {result['useful']}  {time.perf_counter() - began:.1f} s",
            flush=True,
        )
    return done, failures


def execute(plan: Iterable[Cell], *, processes: int, is_fresh: bool = False) -> tuple[int, list[str]]:
    """Run the cells of a plan that have no stored result, or all of them.

    Returns:
      How many ran, and a message for each that failed.
    """
    missing = [cell for cell in dict.fromkeys(plan) if is_fresh or not cell.path.exists()]
    # Cells of one method and workload share a compiled program, so they stay in one process.
    groups = [list(group) for _, group in itertools.groupby(missing, key=lambda c: (c.workload, c.method, c.steps))]
    if not groups:
        return 0, []
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    done, failures = 0, []
    with context.Pool(min(processes, len(groups)), _enter, (counter,)) as pool:
        for ran, failed in pool.imap_unordered(_work, groups):
            done += ran
            failures += failed
    return done, failures


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    from benchmarks.quality import figure, plans, report

    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run the missing cells")
    runner.add_argument("--quick", action="store_true", help="a subset that takes about ten minutes")
    runner.add_argument("--workloads", nargs="*", help="keep cells of these workloads")
    runner.add_argument("--methods", nargs="*", help="keep cells of these methods")
    runner.add_argument("--seeds", nargs="*", type=int, help="keep cells of these seeds")
    runner.add_argument("--fresh", action="store_true", help="run cells again that have a stored result")
    runner.add_argument("--processes", type=int, default=2)
    runner.add_argument("--list", action="store_true", help="print the missing cells instead of running them")
    writer = commands.add_parser("report", help="print the tables of the stored results")
    writer.add_argument("--sweep", action="store_true", help="validation loss at every rate of the oracle instead")
    writer.add_argument("--into", type=pathlib.Path, help="a Markdown file: all after its marker is replaced")
    writer.add_argument("--plot", type=pathlib.Path, help="where to draw the picture, such as docs/results.png")
    args = parser.parse_args(argv)
    if args.command == "report":
        text = report.sweep() if args.sweep else report.tables()
        if args.plot:
            figure.plot(args.plot)
        if args.into:
            args.into.write_text(args.into.read_text().partition(_MARKER)[0] + _MARKER + "\n\n" + text + "\n")
        else:
            print(text)
        return 0
    plan = plans.quick() if args.quick else plans.full()
    wanted = {"workload": args.workloads, "method": args.methods, "seed": args.seeds}
    plan = [c for c in plan if all(keep is None or getattr(c, field) in keep for field, keep in wanted.items())]
    if args.list:
        print("\n".join(str(cell.path.name) for cell in plan if not cell.path.exists()))
        return 0
    began = time.perf_counter()
    ran, failures = execute(plan, processes=args.processes, is_fresh=args.fresh)
    print(f"{ran} of {len(plan)} cells ran in {time.perf_counter() - began:.0f} s; {len(failures)} failed.")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
