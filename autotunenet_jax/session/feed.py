"""From what is recorded to the hooks and loggers of a user: only what is kept, in order, and at a safe moment."""

import bisect
import collections
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..arguments import whole_number
from ..history.history import History
from ..history.loggers import as_writers
from .callbacks import Reading, Rewind, Step, StopTraining, as_callbacks, hears_steps

# Of a fork with more steps than this, every other one is remembered, and so on.
_MOST_STEPS = 4096


_KINDS: dict[str, Any] = {"on_step": Step, "on_validation": Reading, "on_rewind": Rewind}


class _Fork:
    """The steps of a fork, until it is known whether they are kept."""

    def __init__(self, steps: Sequence[Step] = (), stride: int = 1):
        self.steps, self.stride, self._seen = list(steps), stride, len(steps) * stride

    def add(self, step: Step) -> None:
        if self._seen % self.stride == 0:
            self.steps.append(step)
        self._seen += 1
        if len(self.steps) > _MOST_STEPS:
            self.steps, self.stride = self.steps[::2], 2 * self.stride


class _Block:
    """Means over the steps since the last row."""

    def __init__(self):
        self.sums: dict[str, list[float]] = {}
        self.step, self.held = -1, {}

    def add(self, step: Step) -> None:
        self.step, self.held = step.step, {f"hyperparams/{name}": value for name, value in step.hyperparams.items()}
        for name, value in (("loss", step.loss), *step.metrics.items()):
            held = self.sums.setdefault(f"train/{name}", [0.0, 0])
            # A metric may be of what a batch did not have.
            if math.isfinite(value):
                held[0] += value
                held[1] += 1

    def row(self) -> dict[str, Any]:
        return {name: total / count if count else math.nan for name, (total, count) in self.sums.items()} | self.held


class Feed:
    """Takes what happens in a run as it becomes known, and hands on what is kept of it when it is asked to.

    Args:
      history: Of the run.
      callbacks: As `Callback` has them, and functions of a decision.
      loggers: As `history.loggers.Writer` takes them.
      log_every: Steps between two rows of the loggers.

    Attributes:
      hears_steps: Whether anybody wants to know of each step.
      is_open: Whether there is anybody at all.
    """

    def __init__(self, history: History, callbacks: Any, loggers: Any, *, log_every: int):
        self._history, self._callbacks, self._writers = history, as_callbacks(callbacks), as_writers(loggers)
        self.log_every = whole_number("log_every", log_every)
        # Step of the last row, and that of the last one before a resumed run was cut off; None in a new run.
        self._written, self._after = -1, None
        self.hears_steps = bool(self._writers) or any(map(hears_steps, self._callbacks))
        self.is_open = bool(self._writers or self._callbacks)
        self._queue: collections.deque[tuple[str, Any]] = collections.deque()
        self._forks: dict[int, _Fork] = {}
        self._block = _Block()
        self._rewinds, self._discarded, self._has_begun = 0, 0, False
        self._states: list[Any] = []
        self._rows: dict[int, dict[str, Any]] = {}
        self._lost: tuple[Any, list[int], list[int]] = (None, [], [0])

    # What happens.

    def step(self, step: Step, *, fork: int) -> None:
        """A step was taken; ``fork`` is -1 outside of forks."""
        if fork < 0:
            self._keep(step)
        else:
            self._forks.setdefault(fork, _Fork()).add(step)

    def drop_fork(self, fork: int) -> None:
        """A fork begins again."""
        self._forks.pop(fork, None)

    def end_round(self, kept: int, decision: dict[str, Any] | None = None, *, discarded: int = 0) -> None:
        """A round is over, and one of its forks is kept; -1 for none.

        Args:
          kept: Its number.
          decision: Record of the round; None where the run ended inside it.
          discarded: Steps spent so far on forks that were not kept.
        """
        forks, self._forks = self._forks, {}
        for step in forks[kept].steps if kept in forks else ():
            self._keep(step)
        if decision is not None:
            self._discarded = discarded
            self._say("on_decision", decision)

    def read(self, step: int, value: float, metrics: Mapping[str, float]) -> None:
        """The training that lives on was measured."""
        self._say("on_validation", Reading(step, self._kept(step), value, dict(metrics)))

    def rewind(self, step: int, back_to: int, *, is_rollback: bool) -> None:
        """Training went back."""
        self._rewinds += 1
        self._say("on_rewind", Rewind(step, back_to, self._kept(back_to), is_rollback))

    def _keep(self, step: Step) -> None:
        if self.hears_steps:
            self._say("on_step", step._replace(kept_step=self._kept(step.step)))

    def _say(self, hook: str, told: Any) -> None:
        if self.is_open:
            self._queue.append((hook, told))

    def _kept(self, step: int) -> int:
        """How many of the first steps of the budget are part of the training that lives on."""
        spans = self._history.discarded
        mark = (len(spans), spans[-1] if spans else None)
        if self._lost[0] != mark:
            ends = [end for _, end in spans]
            self._lost = mark, ends, [0, *itertools.accumulate(end - start for start, end in spans)]
        _, ends, lost = self._lost
        return step - lost[bisect.bisect_right(ends, step)]

    # Handing it on.

    def deliver(self) -> None:
        """Hands on everything known by now, to where an exception breaks nothing.

        Raises:
          StopTraining: A callback asked for the end; all have heard of everything then.
        """
        if not self.is_open:
            return
        stop = self._begin()
        stop = self._hand_on() or stop
        if stop is not None:
            raise stop

    def finish(self, history: History) -> None:
        """The run is over: hands on what is left, and says so. It is too late to ask for the end."""
        self._begin()
        self._hand_on()
        self._end_block()
        self._write(is_over=True)
        self._call("on_end", history)

    def _hand_on(self) -> StopTraining | None:
        stop = None
        try:
            while self._queue:
                hook, told = self._queue.popleft()
                self._note(hook, told)
                stop = self._call(hook, told) or stop
        finally:
            self._write()
        return stop

    def _begin(self) -> StopTraining | None:
        if self._has_begun:
            return None
        self._has_begun = True
        for writer in self._writers:
            writer.begin(self._after)
        stop = self._call("on_begin", self._history)
        states, self._states = self._states, []
        for callback in self._callbacks:
            # Callbacks may have been added or left out since.
            found = next((entry for entry in states if entry[0] == type(callback).__name__), None)
            if found is not None:
                states.remove(found)
                stop = self._told(callback.load_state_dict, found[1]) or stop
        return stop

    def _call(self, hook: str, told: Any) -> StopTraining | None:
        stops = [self._told(getattr(callback, hook), told) for callback in self._callbacks]
        return next(filter(None, stops), None)

    def _told(self, hook: Callable[[Any], Any], told: Any) -> StopTraining | None:
        try:
            hook(told)
        except StopTraining as asked:
            return asked
        return None

    def _note(self, hook: str, told: Any) -> None:
        """Puts an event into the rows of the loggers."""
        if not self._writers:
            return
        if hook == "on_step":
            block, every = self._block, self.log_every
            if block.step >= 0 and (block.step - 1) // every != (told.step - 1) // every:
                self._end_block()
            self._block.add(told)
            if told.step % every == 0:
                self._end_block()
            return
        step = told["end"] if hook == "on_decision" else told.step
        if 0 <= self._block.step < step:
            # Steps are missing in between; a row for those before them must not come after this one.
            self._end_block()
        if hook == "on_validation":
            named = {f"eval/{name}": value for name, value in told.metrics.items()} or {"eval/metric": told.value}
            self._row(step, named)
        elif hook == "on_decision":
            chosen = {f"tuner/chosen/{name}": value for name, value in told["chosen"].items()}
            number = sum(row["end"] <= step for row in self._history.rounds)
            self._row(step, {"tuner/round": number, "tuner/share_discarded": self._discarded / step, **chosen})
        elif hook == "on_rewind":
            self._row(step, {"tuner/rewinds": self._rewinds})

    def _end_block(self) -> None:
        if self._block.step >= 0:
            self._row(self._block.step, self._block.row())
            self._block = _Block()

    def _row(self, step: int, row: Mapping[str, Any]) -> None:
        self._rows.setdefault(step, {}).update(row)

    def _write(self, *, is_over: bool = False) -> None:
        # A step has one row, and that of the newest one may still get the means of a block that ends with it.
        newest = math.inf if is_over or self._block.step < 0 else self._block.step
        rows = {step: row for step, row in self._rows.items() if step < newest}
        self._rows = {step: row for step, row in self._rows.items() if step >= newest}
        for step, row in sorted(rows.items()):
            self._written = step
            for writer in self._writers:
                writer.write(row, step)

    # Across processes.

    def to_dict(self) -> dict[str, Any]:
        """What is not handed on yet, as plain data."""
        forks = {str(fork): [[list(step) for step in held.steps], held.stride] for fork, held in self._forks.items()}
        block = self._block
        counts = {"block": [block.step, block.sums, block.held], "rewinds": self._rewinds, "written": self._written}
        counts["discarded"] = self._discarded
        rows = [[step, row] for step, row in self._rows.items()]
        states = [[type(callback).__name__, callback.state_dict()] for callback in self._callbacks]
        # Before it has begun, a resumed run has its callbacks' states still to give back.
        return {
            "queue": [[hook, list(told) if hook in _KINDS else told] for hook, told in self._queue],
            "forks": forks,
            "rows": rows,
            "states": states if self._has_begun else self._states,
            **counts,
        }

    def load(self, data: Mapping[str, Any] | None, *, step: int) -> None:
        """Takes back what `to_dict` gave; None where nobody listened then.

        Args:
          data: That.
          step: Budget step from which the run goes on.
        """
        if data is None:
            self._after = step
            self._queue.clear()
            self._forks, self._block, self._rows = {}, _Block(), {}
            return
        queue = ((hook, _KINDS[hook](*told) if hook in _KINDS else told) for hook, told in data["queue"])
        self._queue = collections.deque(queue)
        kept = {
            int(fork): _Fork([Step(*row) for row in rows], stride) for fork, (rows, stride) in data["forks"].items()
        }
        self._forks, self._rewinds, self._states = kept, data["rewinds"], list(data["states"])
        self._discarded = data["discarded"]
        # Where nothing had been written, whatever lies there is of another run.
        self._written, self._after = data["written"], data["written"] if data["written"] >= 0 else None
        self._block.step, self._block.sums, self._block.held = data["block"]
        self._rows = {step: dict(row) for step, row in data["rows"]}
