"""Where a run's numbers go while it goes on: files, and the experiment trackers that a user has."""

import abc
import csv
import io
import json
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]


class _FileLogger(abc.ABC):
    """Rows in a text file, one per step, that a resumed run goes on with."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        if self.path.is_dir():
            raise ValueError(f"path must be that of a file; {self.path} is a folder. Name a file in it.")

    def begin(self, after: int | None) -> None:
        """Makes ready for rows.

        Args:
          after: None in a new run: a file that is there stays under another name, ``log.1.csv``. For one that goes on,
            the step up to which rows stay; those after it will come again.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        if after is None:
            numbered = (self.path.with_suffix(f".{n}{self.path.suffix}") for n in range(1, 1 << 30))
            self.path.rename(next(path for path in numbered if not path.exists()))
            return
        try:
            rows = [row for row in self.read() if row["step"] <= after]
        except (ValueError, KeyError, TypeError) as error:
            message = f"{self.path} is there and is no log of a run, so a resumed one cannot go on in it. Name another."
            raise ValueError(message) from error
        self._replace(rows)

    def _replace(self, rows: Iterable[Row]) -> None:
        """Writes the file anew; a process that is killed meanwhile leaves the old one."""
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(self._text(list(rows)), encoding="utf-8", newline="")
        os.replace(new, self.path)

    def _append(self, text: str) -> None:
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)

    @abc.abstractmethod
    def _text(self, rows: list[Row]) -> str:
        """A file of these rows and no others."""

    @abc.abstractmethod
    def read(self) -> list[dict[str, Any]]:
        """The rows of the file; a last one that was cut off while it was written is left out."""


class JSONLLogger(_FileLogger):
    """Writes a JSON object per row, with ``step`` and what there is; null stands for numbers that are not finite.

    Example:
        >>> import tempfile
        >>> log = JSONLLogger(f"{tempfile.mkdtemp()}/log.jsonl")
        >>> log.log({"train/loss": 0.5}, 100)
        >>> log.read()
        [{'step': 100, 'train/loss': 0.5}]

    Args:
      path: The file. One of an earlier run is kept under another name; a resumed run goes on in it.

    Raises:
      ValueError: The path is a folder's.

    Cost: the file is opened, written and closed for each row, some 0.1 ms.
    """

    def log(self, row: Row, step: int) -> None:
        """Writes one row."""
        self._append(self._text([{"step": step, **row}]))

    def _text(self, rows: list[Row]) -> str:
        finite = ({name: _finite(value) for name, value in row.items()} for row in rows)
        return "".join(json.dumps(row, default=str) + "\n" for row in finite)

    def read(self) -> list[dict[str, Any]]:
        """The rows of the file; a last one that was cut off while it was written is left out."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


class CSVLogger(_FileLogger):
    """Writes a table with a column for each name, empty where a row has none.

    Example:
        >>> import tempfile
        >>> log = CSVLogger(f"{tempfile.mkdtemp()}/log.csv")
        >>> log.log({"train/loss": 0.5}, 100)
        >>> print(log.path.read_text())
        step,train/loss
        100,0.5
        <BLANKLINE>

    Args:
      path: The file. One of an earlier run is kept under another name; a resumed run goes on in it.

    Raises:
      ValueError: The path is a folder's.

    Cost: the file is opened, written and closed for each row, some 0.1 ms, and written anew for each new name, of which
      a run has a handful.
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self._columns: list[str] = []

    def begin(self, after: int | None) -> None:
        """Makes ready for rows, as a JSON file does."""
        super().begin(after)
        self._columns = []

    def log(self, row: Row, step: int) -> None:
        """Writes one row."""
        row = {"step": step, **row}
        known = self._columns or self._header()
        if set(row) <= set(known):
            self._columns = known
            self._append(self._table([row], is_headed=False))
        else:
            self._replace([*(self.read() if known else ()), row])

    def _header(self) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            return next(csv.reader(file), [])

    def _text(self, rows: list[Row]) -> str:
        known = self._columns or self._header() or ["step"]
        self._columns = list(dict.fromkeys([*known, *(name for row in rows for name in row)]))
        return self._table(rows, is_headed=True)

    def _table(self, rows: Iterable[Row], *, is_headed: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        if is_headed:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def read(self) -> list[dict[str, Any]]:
        """The rows of the file; a last one that was cut off while it was written is left out."""
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        rows = csv.DictReader(io.StringIO(whole, newline=""))
        return [{name: _number(value) for name, value in row.items() if value not in ("", None)} for row in rows]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class Writer:
    """One logger of whatever kind, as rows in the order of their steps.

    Args:
      logger: Something with ``add_scalar(name, value, step)``, as TensorBoard's ``SummaryWriter``; with
        ``log_metrics(row, step=)``, as the module ``mlflow`` or a logger of Lightning's; with ``log(row, step)``, as a
        run of W&B or the loggers here; or a function ``(row, step)``.

    Raises:
      TypeError: It is none of these.
    """

    def __init__(self, logger: Any):
        self._logger, self._log, self._last, self._has_failed = logger, _way_in(logger), -1, False

    def begin(self, after: int | None) -> None:
        """The run begins, or goes on after a step."""
        self._last = -1
        if isinstance(self._logger, _FileLogger):
            self._guarded(self._logger.begin, after)

    def write(self, row: Row, step: int) -> None:
        """Hands a row on; none of a step that was handed on already.

        A full disk or a lost network is told once and hides no training; any other error is the user's to see.
        """
        if step > self._last and row:
            self._last = step
            self._guarded(self._log, row, step)

    def _guarded(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments)
        except OSError as error:
            if not self._has_failed:
                name = type(self._logger).__name__
                message = (
                    f"{name} could not write, and rows are lost: {type(error).__name__}: {error}. Training goes on."
                )
                warnings.warn(message, stacklevel=2)
            self._has_failed = True


def _way_in(logger: Any) -> Callable[[Row, int], Any]:
    if isinstance(logger, type):
        raise TypeError(f"loggers must hold instances; got the class {logger.__name__}. Make one of it.")
    if callable(add := getattr(logger, "add_scalar", None)):

        def scalars(row: Row, step: int) -> None:
            for name, value in _numbers(row).items():
                add(name, value, step)

        return scalars
    if callable(log_metrics := getattr(logger, "log_metrics", None)):
        return lambda row, step: log_metrics(_numbers(row), step=step)
    if callable(log := getattr(logger, "log", None)):
        return lambda row, step: log(dict(row), step)
    if callable(logger):
        return lambda row, step: logger(dict(row), step)
    raise TypeError(
        f"a logger must have add_scalar, log_metrics or log(row, step), or be a function (row, step); got {logger!r}."
    )


def _numbers(row: Row) -> dict[str, float]:
    """What a tracker of scalars can take."""
    return {name: float(value) for name, value in row.items() if isinstance(value, bool | int | float)}


def as_writers(loggers: Any) -> tuple[Writer, ...]:
    """A writer for each logger.

    Raises:
      TypeError: One of an unknown kind, or no sequence.
    """
    if not isinstance(loggers, list | tuple):
        raise TypeError(f"loggers must be a list or tuple of loggers; got {loggers!r}. Put it into a list.")
    return tuple(map(Writer, loggers))
