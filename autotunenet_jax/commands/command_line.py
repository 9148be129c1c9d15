"""The arguments of ``python -m autotunenet_jax``, and which command takes them."""

import argparse
import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from .._version import __version__
from ..history.history import History
from . import export, replay
from .inspection import inspect
from .run_folder import NoHistoryError, read_history

_KINDS = ("overview", "posterior", "round", "slice")

_EPILOG = """\
RUN_DIR is the folder given as snapshots= to fit or to the Trainer, the log folder of Lightning, or the output_dir of
transformers; a file written by history.to_json(path) does as well. It may be of a run that is still going on.
Exit codes: 0 done; 1 something is damaged or missing; 2 the arguments are wrong."""


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def parser() -> argparse.ArgumentParser:
    """What may be asked for."""
    form = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="python -m autotunenet_jax", description="Looks at a run that tuned itself.", epilog=_EPILOG,
        formatter_class=form,
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"autotunenet-jax {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, epilog=_EPILOG, formatter_class=form)
        made.add_argument("run_dir", metavar="RUN_DIR", type=pathlib.Path, help="folder of a run")
        return made

    command("inspect", "Tells what happened, where the run stands, and which snapshots are whole; changes nothing.")
    made = command("plot", "Draws a picture of the run (needs autotunenet-jax[plot]).")
    made.add_argument("--kind", choices=_KINDS, default="overview", help="which picture (default: %(default)s)")
    made.add_argument("--out", metavar="FILE", help="where to (default: RUN_DIR's name and the kind, here, as PNG)")
    made.add_argument("--style", choices=("light", "dark"), default="light", help="ground (default: %(default)s)")
    made.add_argument("--round", type=_positive, metavar="N", help="which round, from 1 (default: the last)")
    made.add_argument("--names", metavar="A,B", help="hyperparameters of posterior and slice")
    made = command("replay", "Prints the values that repeat the run without the tuner, by kept step.")
    made.add_argument("--format", choices=replay.FORMATS, default="csv", help="as what (default: %(default)s)")
    made.add_argument("--every", type=_positive, default=1, metavar="N", help="one row in so many (default: 1)")
    made.add_argument("--out", metavar="FILE", help="where to (default: standard output)")
    made = command("export", "Gives the history to other programs.")
    made.add_argument("--format", choices=export.FORMATS, default="json", help="as what (default: %(default)s)")
    made.add_argument("--table", choices=export.TABLES, default="records", help="which rows of csv (default: records)")
    made.add_argument("--storage", metavar="URL", help="of optuna, such as sqlite:///study.db")
    made.add_argument("--out", metavar="FILE", help="where to (default: standard output)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: By default those of the process.

    Returns:
      The exit code.
    """
    top = parser()
    given = top.parse_args(arguments)
    if given.command == "export" and (given.format == "optuna") != (given.storage is not None):
        top.error("--format optuna and --storage URL go together")
    try:
        if given.command == "inspect":
            return inspect(given.run_dir)
        return _run(given, read_history(given.run_dir))
    except (NoHistoryError, ImportError, ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            # Whoever read has read enough; what is left must not be written at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(given: argparse.Namespace, history: History) -> int:
    if given.command == "plot":
        out = given.out or f"{given.run_dir.resolve().stem}-{given.kind}.png"
        names = None if given.names is None else given.names.split(",")
        history.plot(out, kind=given.kind, style=given.style, round=given.round, names=names)
        print(out)
        return 0
    with _opened(given.out) as out:
        if given.command == "replay":
            replay.replay(history, given.format, every=given.every, out=out)
        else:
            export.export(history, given.format, table=given.table, storage=given.storage, out=out)
    return 0


@contextlib.contextmanager
def _opened(path: str | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    with open(path, "w", newline="") as file:
        yield file
