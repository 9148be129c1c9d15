"""What happened, as data: tables, a plot, and schedules that replay a run without the tuner."""

import bisect
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    import matplotlib.figure
    import optuna
    import pandas

    from .pictures.figure import Style
    from .pictures.kinds import Kind

HISTORY_NAME = "history.json"
"""Name of the file beside a run's snapshots that holds its history."""

# Rows are thinned evenly beyond this many, so that a history never grows with the length of the run.
_MAX_RECORDS = 4096


def _jsonable(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _from_json(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**row, name: math.nan if row[name] is None else row[name]}


def _as_before(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "forks": [_from_json(fork, "p_better") for fork in row["forks"]]}


def price(summary: Mapping[str, Any]) -> str:
    """What a run paid, by its summary, in a phrase."""
    undone = summary.get("undone_steps", 0) / max(summary.get("steps", 0), 1)
    share = summary.get("share_discarded", 0.0)
    return f"{100 * share:.1f} % of the steps on forks not kept, {100 * undone:.1f} % undone"


def _described(param: Any, role: str) -> dict[str, Any]:
    if hasattr(param, "options"):
        return {"options": list(param.options), "role": role}
    return {"lo": param.lo, "hi": param.hi, "log": param.log, "role": role}


class History:
    """The record of one run.

    Attributes:
      records: One dict per recorded training step, at most a few thousand however long the run: ``step`` (budget
        spent), ``data_step``, ``loss``, ``phase`` (``"train"``, ``"sweep"`` for the range test, or ``"fork"``),
        ``round``, ``fork``, ``is_kept`` (whether the step is part of the final state's past), and the hyperparameters
        in force by name.
      rounds: One dict per round: ``start`` and ``end`` (budget steps), ``kind`` (``"fast"`` or ``"slow"``),
        ``sweep`` (the span of its range test, or None), ``outcome``, ``verdict`` (a sentence), ``chosen``, ``best``
        (the fork that won; -1 where all failed), ``scored_by``, ``reference`` (score of the state all forks started
        from, or None), and ``forks``, a list of dicts with ``hyperparams``, ``scores``, ``status`` (``"kept"``,
        ``"lost"`` or ``"failed"``), ``steps``, and what the surrogate said when it ended, compared with the fork kept
        till then: ``p_better`` (how likely it was better), ``lead`` (by how much) and ``deviation`` (that of the lead),
        in the unit of decisions: 0 is the best fork so far, 1 one that gained nothing; None for the first one.
      evals: One dict per validation: ``step`` and ``value``, in the user's own direction.
      events: Rollbacks and other things a user should know of: ``step`` and ``message``.
      discarded: Spans ``(start, end)`` of budget steps that are not part of the final state's past, ``start`` excluded
        and ``end`` included, in order and apart.
      names: Tuned hyperparameters.
      space: Their ranges by name: ``lo``, ``hi`` and ``log``, or ``options``, and the ``role``; ``is_scheduled`` where
        a scheduler of the user's own multiplies what is recorded. Empty if not known.
      mode: Whether the validation metric was minimised (``"min"``) or maximised (``"max"``). Scores of forks are
        always to be minimised: where they were maximised, they are negated.
      is_paired: Whether the forks of a round saw the same batches; else each saw fresh ones.
      summary: Totals of the run: ``steps``, of a budget of ``total_steps`` (None where there is none);
        ``discarded_steps``, which range tests and forks that were not kept took, and ``share_discarded``, which the cap
        is on; ``undone_steps``, the others that are no part of the final state's past, since training went back over
        them or skipped them; ``rollbacks``; and in ``dropped`` how many decisions before the first recorded one are
        not known. Steps discarded and undone together are those that are not kept.
    """

    def __init__(self, names: tuple[str, ...], *, space: Any = None, mode: str = "min", is_paired: bool = True):
        self.names, self.mode, self.is_paired = tuple(names), mode, is_paired
        self.space: dict[str, dict[str, Any]] = {}
        self.records: list[dict[str, Any]] = []
        self.rounds: list[dict[str, Any]] = []
        self.evals: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.discarded: list[tuple[int, int]] = []
        self._stride = 1
        if space is not None:
            self.describe(space)

    def __repr__(self) -> str:
        return (
            f"History({len(self.records)} records, {len(self.rounds)} rounds, {len(self.events)} events, "
            f"{price(self.summary)})"
        )

    def describe(self, space: Any) -> None:
        """Notes the ranges of a search space."""
        self.space = {name: _described(space[name], role) for name, role in zip(space.names, space.roles, strict=True)}

    def mark_scheduled(self, names: Iterable[str]) -> None:
        """Notes that a scheduler of the user's own multiplies these: what is recorded of them is what it multiplies."""
        for name in names:
            self.space[name]["is_scheduled"] = True

    @property
    def lost_steps(self) -> int:
        """Budget steps that are not part of the final state's past, for whatever reason."""
        return sum(end - start for start, end in self.discarded)

    @property
    def stride(self) -> int:
        """Training steps between two records."""
        return self._stride

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends one record, thinning the older ones when there are too many."""
        self.records.append({"is_kept": True, **row})
        if len(self.records) > _MAX_RECORDS:
            self._stride *= 2
            self.records = self.records[::2]

    def discard(self, start: int, end: int) -> None:
        """Marks budget steps ``start < step <= end`` as not part of the final state's past."""
        # Nearly always at the end, where those that overlap are found at once.
        first, last = start, end
        later: list[tuple[int, int]] = []
        while self.discarded and self.discarded[-1][1] >= first:
            span = self.discarded.pop()
            if span[0] > last:
                later.append(span)
            else:
                first, last = min(first, span[0]), max(last, span[1])
        self.discarded += [(first, last), *reversed(later)]
        for row in reversed(self.records):
            if row["step"] <= start:
                break
            if row["step"] <= end:
                row["is_kept"] = False

    def skip(self, step: int) -> None:
        """Marks a step that was not taken; of so many that the record would grow without end only the first ones."""
        if len(self.discarded) < _MAX_RECORDS:
            self.discard(step - 1, step)

    def kept(self) -> list[dict[str, Any]]:
        """The records of the steps that led to the final state, in order."""
        return [row for row in self.records if row["is_kept"]]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain Python data that JSON can hold; None stands for numbers that are not finite."""
        return {
            "names": list(self.names),
            "space": {name: dict(held) for name, held in self.space.items()},
            "mode": self.mode,
            "is_paired": self.is_paired,
            "stride": self._stride,
            "records": [_jsonable(row) for row in self.records],
            "rounds": [{**_jsonable(row), "forks": [_jsonable(fork) for fork in row["forks"]]} for row in self.rounds],
            "evals": [_jsonable(row) for row in self.evals],
            "events": [dict(row) for row in self.events],
            "discarded": [list(span) for span in self.discarded],
            "summary": dict(self.summary),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "History":
        """The history that `to_dict` described, also after a way through JSON.

        Example:
            >>> history = History(("learning_rate",))
            >>> history.add({"step": 1, "loss": 0.5, "learning_rate": 0.1})
            >>> History.from_dict(history.to_dict()).records == history.records
            True
        """
        history = cls(tuple(data["names"]))
        history.load(data)
        return history

    def load(self, data: Mapping[str, Any]) -> None:
        """Takes over what `to_dict` gave, replacing what is here."""
        self.records = [_from_json(row, "loss") for row in data["records"]]
        self.evals = [_from_json(row, "value") for row in data["evals"]]
        self.rounds, self.events = [_as_before(row) for row in data["rounds"]], list(data["events"])
        self.discarded = [(start, end) for start, end in data["discarded"]]
        self.summary, self._stride = dict(data["summary"]), data["stride"]
        self.space, self.mode, self.is_paired = dict(data["space"]), data["mode"], data["is_paired"]

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes what `to_dict` gives to a file, in one step: whoever reads it meanwhile finds the old or the new one.

        Raises:
          OSError: It cannot be written.
        """
        path = pathlib.Path(path)
        partial = path.with_name(f".{path.name}.partial")
        text = json.dumps(self.to_dict(), allow_nan=False)
        try:
            partial.write_text(text)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> "History":
        """The history that `to_json` wrote.

        Raises:
          OSError: The file cannot be read.
          ValueError: It holds something else.
        """
        path = pathlib.Path(path)
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not what History.to_json wrote ({type(error).__name__}: {error}).") from error

    def explain(self) -> str:
        """The run in plain words, under forty lines however long it was.

        It says what each round tried and for how many steps, what came of it, how sure the choice was and what was
        chosen; what the range test read; rollbacks and the like; and how many steps forks and range tests took, and how
        many were undone.
        """
        from .explain import explain

        return explain(self)

    def to_optuna(self, *, storage: str | None = None) -> "optuna.study.Study":
        """A study of Optuna, one trial for each fork, for its plots and its dashboard.

        Values are the forks' scores, failed forks are trials that failed, and ``user_attrs`` hold ``round``, ``fork``,
        ``steps``, ``kept`` and the like. Scores of different rounds are of different moments of the training: compare
        them within a round.

        Args:
          storage: Where to keep the study, such as ``"sqlite:///study.db"``; in memory by default.

        Raises:
          ImportError: optuna is not installed.
          ValueError: The history does not know its search space, or the storage holds a study of this name.
        """
        from .optuna_study import to_study

        return to_study(self, storage=storage)

    def to_pandas(self) -> "pandas.DataFrame":
        """`records` as a data frame, one row per record.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("History.to_pandas needs pandas; install autotunenet-jax[pandas].") from error
        return pandas.DataFrame.from_records(self.records)

    def schedule(self) -> dict[str, Callable[[Any], Any]]:
        """An optax schedule per hyperparameter that replays the run without the tuner.

        Steps count the kept training steps only, from 0 as optax counts, so the replay is shorter than the run by the
        discarded steps. Between two records a schedule is linear, or stays where values are whole; beyond the last it
        stays.

        Returns:
          ``{name: schedule}``; each maps a step count, traced or not, to a float32 scalar. A Python or NumPy integer
          is looked up without JAX.

        Raises:
          ValueError: Nothing was recorded, or the beginning of the run is not known any more.
        """
        rows = self.kept()
        if not rows:
            raise ValueError("nothing was recorded: run fit first, then ask its history for schedules.")
        if self.summary.get("dropped"):
            raise ValueError(
                f"the first {self.summary['dropped']} decisions of this run are not known any more, so it cannot be "
                "replayed. Read the history of a long run earlier, and keep it with to_dict."
            )
        steps = np.array([row["step"] for row in rows])
        # Before each record, the discarded steps are left out of the count.
        ends = np.array([end for _, end in self.discarded], int)
        lost = np.cumsum([0, *(end - start for start, end in self.discarded)])
        positions = (steps - 1 - lost[np.searchsorted(ends, steps)]).astype(np.float32)

        def replay(column: list[Any]) -> Callable[[Any], Any]:
            values, is_whole = np.array(column, np.float32), all(isinstance(value, int) for value in column)

            def schedule(count: Any) -> Any:
                if isinstance(count, int | np.integer):
                    if is_whole:
                        return values[max(np.searchsorted(positions, count, side="right") - 1, 0)]
                    return np.float32(np.interp(count, positions, values))
                count = jnp.asarray(count, jnp.float32)
                if is_whole:
                    index = jnp.searchsorted(jnp.asarray(positions), count, side="right") - 1
                    return jnp.asarray(values)[jnp.maximum(index, 0)]
                return jnp.interp(count, jnp.asarray(positions), jnp.asarray(values))

            return schedule

        return {name: replay([row[name] for row in rows]) for name in self.names}

    def value_at(self, name: str, step: int) -> Any:
        """The recorded value of a hyperparameter at a budget step, or just before it."""
        return self.records[max(self.index_at(step), 0)][name]

    def index_at(self, step: int) -> int:
        """Place in `records` of the last one up to a budget step; -1 where there is none."""
        return bisect.bisect_right(self.records, step, key=lambda row: row["step"]) - 1

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        kind: "Kind" = "overview",
        style: "Style" = None,
        round: int | None = None,
        names: Sequence[str] | None = None,
    ) -> "matplotlib.figure.Figure":
        """Draws the run, or a part of it.

        ``"overview"`` is the loss, the metric and each hyperparameter over the budget, rounds shaded. ``"posterior"``
        is what the surrogate said of each hyperparameter after each round that searched it, with the forks. ``"round"``
        is one round close up: the loss of every fork over its steps, and its score. ``"slice"`` is the surrogate over
        two hyperparameters, with the forks so far and the path. The last three are drawn of rounds that have ended.

        Args:
          path: Where to write the picture, if anywhere; the name tells the format.
          kind: Which picture.
          style: ``"light"``, ``"dark"``, or None to follow matplotlib's settings.
          round: Which round, from 1: the last by default, and for ``"posterior"`` up to four spread over the run.
          names: Hyperparameters shown: by default, for ``"posterior"`` all that were searched, and for ``"slice"`` the
            two that were searched together most often.

        Returns:
          The figure, of 8 inches in width.

        Raises:
          ImportError: matplotlib is not installed.
          ValueError: Nothing was recorded that such a picture shows, or an argument is none of those above.

        Cost: for ``"posterior"`` and ``"slice"``, compiling one fit of the surrogate, some 10 s the first time.
        """
        from .pictures.kinds import plot

        return plot(self, path, kind=kind, style=style, round=round, names=names)
