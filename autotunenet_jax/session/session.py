"""One run on the host: what the controller asks for is carried out, and the books are kept."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..controller.state import FORK, SWEEP, TRAIN, Directive, Round
from .host import Host
from .recorder import Recorder


class Tick(NamedTuple):
    """What a controller says to one loss; Python numbers.

    Attributes:
      directive: What to do.
      is_due: Whether a decision is due.
      saved_step: Budget step of the saved copy, as it was before this loss.
      kept_step: The same for the kept copy.
      has_fallen: Whether the rates have fallen because the training loss did not improve.
    """

    directive: Directive
    is_due: bool
    saved_step: int
    kept_step: int
    has_fallen: bool = False


class Decision(NamedTuple):
    """What a controller decided; Python and NumPy numbers.

    Attributes:
      directive: What to do.
      round: The round as it was decided on.
      chosen: Hyperparameters in force from now on outside forks.
      kind: Kind of the round.
      discarded_steps: Steps spent so far on range tests and on forks that were not kept.
      keeps: Whether the state that the directive leads to is the best there is, and to be kept.
    """

    directive: Directive
    round: Round
    chosen: dict[str, Any]
    kind: int
    discarded_steps: int
    keeps: bool


class Report(NamedTuple):
    """What came of one step.

    Attributes:
      directive: What was asked for last.
      decision: What was decided, if anything.
      before: Phase before the step.
      after: Phase after it.
    """

    directive: Directive
    decision: Decision | None
    before: int
    after: int


def is_better(metric: float | None, other: float | None, mode: Any) -> bool:
    """Whether a metric is the better one in the direction of a mode; what is none, or not finite, never is."""
    if metric is None or not math.isfinite(metric):
        return False
    sign = -1.0 if mode == "max" else 1.0
    return other is None or not math.isfinite(other) or sign * metric < sign * other


class Session:
    """Carries out directives on a host, keeps the two copies that they speak of, and writes the record.

    A loop that knows each loss on the host calls `report` once per step. One whose steps run ahead on a device obeys
    `Tick` directives there, and calls `decide` and `evaluate` when its controller says so.

    Args:
      host: The training.
      controller: Decides; a `PackedController`, or a `DeviceController` where steps run ahead of the host.
      recorder: Writes the history.

    Attributes:
      saved: The copy that a round or a rollback goes back to.
      kept: The copy of the best fork, or of the best metric.
      wants_eval: Whether the metric of the present state is asked for.
      is_due: Whether a decision is due; with `wants_eval`, what `complete` has left to do.
      evaluated_at: Budget step of the latest metric; -1 before one.
      last_eval: Latest metric outside rounds; None before one.
      settled_at: Its budget step; -1 before one.
      best: What the host keeps of the state with the best metric outside rounds.
      best_eval: Its metric; None before a finite one.
      best_at: Its budget step; -1 before one.
      is_settled: Whether the run has been brought to its end.
      mended: Copies put back so far besides the guard's rollbacks.
    """

    def __init__(self, host: Host, controller: Any, recorder: Recorder):
        self.host, self.controller, self.recorder = host, controller, recorder
        recorder.history.mode = controller.tuner.mode
        self.wants_eval, self.is_due, self.is_settled = True, False, False
        self.evaluated_at = self.settled_at = self.best_at = -1
        self.last_eval: float | None = None
        self.best: Any = None
        self.best_eval: float | None = None
        self._retreats, self._climbed_at, self._has_decided = 0, -1, False
        self.mended = 0
        if controller.phase != TRAIN:
            recorder.begin_round(0, controller.phase)
            host.begin_round(controller.data_step)
        self.write()
        self.saved, self.kept = host.copy(), host.copy()

    # Training.

    def report(self, loss: float, *, recorded: float | None = None) -> Report:
        """Takes in the loss of the step just done, and puts in force what the next one needs.

        Args:
          loss: Non-finite is answered with a rollback, never an error.
          recorded: What goes into the history in its place, such as the loss of one process of several.
        """
        controller, before = self.controller, self.controller.phase
        tick = controller.tick(loss)
        self._log(loss if recorded is None else recorded, before, tick)
        directive = tick.directive
        self.wants_eval, self.is_due = bool(directive.evaluate), bool(tick.is_due)
        if directive.save or directive.keep or directive.restore or directive.adopt:
            self._obey(directive, rewinds=False)
        decision = self.complete()
        if decision is not None:
            directive = decision.directive._replace(verdict=directive.verdict)
        if controller.step == controller.tuner.total_steps and not self.is_settled:
            self.settle()
        else:
            self.write()
        return Report(directive, decision, before, controller.phase)

    def complete(self) -> Decision | None:
        """Does what the last loss asked for: measures, then decides; `write` is to follow.

        After an error in either, or in a run that is resumed from then, it does what is left of it.
        """
        if self.wants_eval:
            self.evaluate()
        return self.decide() if self.is_due else None

    def decide(self) -> Decision:
        """Lets the controller decide, and carries its directive out; `write` is to follow.

        State, books and controller change together, or, after an error, not at all.
        """
        controller, before, position = self.controller, self.controller.phase, self.controller.data_step
        self.recorder.flush()
        if not self._has_decided:
            self._has_decided = True
            self.recorder.wait("compiling (once)")
        decision = controller.decide()
        directive, after = decision.directive, controller.phase
        with self._or_undone():
            self._obey(directive, rewinds=int(directive.data_step) != position)
            if decision.keeps:
                self._obey(directive._replace(save=0, keep=1, restore=0, adopt=0), rewinds=False)
        # A metric that was not reported by now is of no use to the next stretch.
        self.wants_eval, self.is_due = bool(directive.evaluate), False
        if before == TRAIN and after != TRAIN:
            self.host.begin_round(controller.data_step)
        elif before != TRAIN and after == TRAIN:
            self.host.end_round(controller.data_step)
        self.recorder.discarded_steps = decision.discarded_steps
        self.recorder.decided(controller.step, before, after, directive, decision.round, decision.kind, decision.chosen)
        return decision

    @contextlib.contextmanager
    def _or_undone(self) -> Iterator[None]:
        """Takes back what the controller has just done where the host cannot follow it."""
        try:
            yield
        except BaseException:
            self.controller.undo()
            raise

    def write(self) -> None:
        """Puts in force what the controller has for the next step."""
        self._values = self.controller.hyperparams()
        self.host.write(self._values)

    def _obey(self, directive: Directive, *, rewinds: bool) -> None:
        # All that may fail comes before all that changes.
        saved = self.host.copy() if directive.save else self.saved
        kept = self.host.copy() if directive.keep else self.kept
        if directive.restore or directive.adopt:
            self.host.restore(kept if directive.adopt else saved, rewinds=rewinds)
        self.saved, self.kept = saved, kept

    def _log(self, loss: float, phase: int, tick: Tick) -> None:
        directive, rewound = tick.directive, -1
        if directive.restore or directive.adopt:
            # A state that the tuner distrusts is dated before the run.
            rewound = max(tick.saved_step if directive.restore else tick.kept_step, 0)
        entry = {
            "step": self.controller.step,
            "data_step": directive.data_step,
            "loss": loss,
            "verdict": directive.verdict,
            "outcome": directive.outcome,
            "has_fallen": tick.has_fallen,
            "rewound": rewound,
            "hyperparams": self._values,
        }
        self.recorder.log(entry, phase)

    # Validation.

    def evaluate(self) -> bool:
        """Measures the present state and tells the controller; False where that has been done, or cannot be."""
        if self.evaluated_at == self.controller.step:
            return False
        metric = self.host.evaluate()
        if metric is not None:
            self.observe(metric)
        return metric is not None

    def observe(self, metric: float) -> None:
        """Takes in a validation metric of the present state, in the tuner's direction.

        One state has one metric: while training goes on, another one of the same step is ignored.
        """
        controller, step = self.controller, self.controller.step
        if self.evaluated_at == step and not self.is_settled:
            return
        is_settled = controller.phase == TRAIN or step == 0 or self.is_settled
        is_best = is_settled and is_better(metric, self.best_eval, controller.tuner.mode)
        best = self.host.keep_best() if is_best else self.best
        if self.evaluated_at != step:
            keeps = controller.observe_eval(metric)
            with self._or_undone():
                self.kept = self.host.copy() if keeps else self.kept
            self.evaluated_at = step
            self._note_overruling()
            # It may have moved the rates.
            if not self.is_settled:
                self.write()
        self.wants_eval = False
        self.recorder.add_eval(step, metric, is_settled=is_settled, metrics=self.host.metrics)
        if is_settled:
            self.last_eval, self.settled_at, self.best = metric, step, best
        if is_best:
            self.best_eval, self.best_at = metric, step

    def _note_overruling(self) -> None:
        seen = self.controller.state.validation
        if int(seen.retreats) > self._retreats:
            total = self.controller.tuner.total_steps
            is_over = self.is_settled or (total is not None and self.controller.step >= total - 1)
            self.recorder.retreat(self.controller.step, is_over=is_over)
        if int(seen.climbed_at) > self._climbed_at:
            self.recorder.climb(self.controller.step)
        self._retreats, self._climbed_at = int(seen.retreats), int(seen.climbed_at)

    # The end.

    def settle(self) -> None:
        """Leaves the best state there is: in a round the fork kept so far, in a range test the state before it.

        If the very last step broke the state, which no later loss could tell, it is the newest copy that is whole.
        """
        self.is_settled = True
        controller, host, recorder = self.controller, self.host, self.recorder
        recorder.flush()
        ts = controller.state
        copy, fork = None, int(ts.round.fork)
        if controller.phase == SWEEP:
            copy, fork = self.saved, -1
        elif controller.phase == FORK and int(ts.round.kept) >= 0:
            copy, fork = self.kept, int(ts.round.kept)
        if copy is None:
            self.write()
        else:
            host.restore(copy, rewinds=False)
        if controller.phase != TRAIN:
            self.evaluated_at = -1  # what was measured at this step is a fork's
            recorder.abandon(controller.step, fork)
        broken = host.count_non_finite()
        whole = [(step, copy) for step, copy in self._copies() if broken and host.count_non_finite(copy) < broken]
        if whole:
            self._put_back(*max(whole, key=lambda entry: entry[0]), why="The last state was not finite")
        host.finish()

    def _copies(self) -> list[tuple[int, Any]]:
        """Both copies, each with its budget step."""
        slots = self.controller.state.slots
        return [(int(slots.saved_step), self.saved), (int(slots.kept_step), self.kept)]

    def _put_back(self, step: int, copy: Any, *, why: str) -> None:
        """Brings a copy of a budget step back, without the guard."""
        now, step, recorder = self.controller.step, max(step, 0), self.recorder
        self.host.restore(copy, rewinds=False)
        self.mended += 1
        recorder.flush()
        recorder.go_back(now, step, is_rollback=True)
        recorder.note(now, "rollback", f"{why}; that of step {step} was restored.")

    def leave_wreck(self, loss: float) -> None:
        """Goes back to a copy where no metric tells of the last state, and its loss is far above what was held.

        Args:
          loss: Of that state, which is one of ordinary training.
        """
        controller = self.controller
        older = [(step, copy) for step, copy in self._copies() if step < controller.step]
        if older and self.best_eval is None and bool(controller.tuner.core.is_wrecked(controller.state, loss)):
            why = "The loss of the last state was far above the best that was held"
            self._put_back(*max(older, key=lambda entry: entry[0]), why=why)

    def end_at_best(self) -> bool:
        """Goes back to the best state where the last metric of a run is not the best; returns whether it did."""
        controller, seen = self.controller, self.controller.state.validation
        mode, step, best, standing = controller.tuner.mode, -1, self.best_eval, self.last_eval
        returns = controller.phase == TRAIN and bool(seen.returns & seen.is_kept)
        if returns:
            # The best since the last round, whose winner may be worse than what was measured before; in 32 bits.
            standing = -float(seen.best) if mode == "max" else float(seen.best)
            best = None if best is None else float(np.float32(best))
        # The kept copy of a state that a round went back to is of a step or more after it was measured.
        is_later = returns and best == standing and self.best_at != int(controller.state.slots.kept_step)
        if (is_better(best, standing, mode) or is_later) and self.host.restore_best(self.best):
            step, self.last_eval = self.best_at, self.best_eval
            self.recorder.note(controller.step, "retreat", f"The run ends in its best state, that of step {step}.")
        elif returns:
            step = int(controller.state.slots.kept_step)
            self.host.restore(self.kept, rewinds=False)
        if 0 <= step < controller.step:
            self.recorder.go_back(controller.step, step, is_rollback=False)
        return step >= 0

    # Across processes.

    def books(self) -> dict[str, Any]:
        """What the host side knows besides the copies and the controller's state, as plain data."""
        self.recorder.flush()
        evals = [self.evaluated_at, self.last_eval, self.best_eval, self.wants_eval]
        more = {"is_due": self.is_due, "settled_at": self.settled_at, "best_at": self.best_at}
        more["total_steps"] = self.controller.tuner.total_steps
        return {"recorder": self.recorder.to_dict(), "evals": evals, **more}

    def load(self, books: dict[str, Any]) -> None:
        """Goes on from what `books` gave; the controller has its state back already."""
        controller = self.controller
        self.recorder.load(books["recorder"], step=controller.step)
        self.recorder.discarded_steps = int(controller.state.discarded)
        self.evaluated_at, self.last_eval, self.best_eval, self.wants_eval = books["evals"]
        self.is_due = books["is_due"]
        self.settled_at, self.best_at = books["settled_at"], books["best_at"]
        self.is_settled = controller.step == controller.tuner.total_steps
        seen = controller.state.validation
        self._retreats, self._climbed_at = int(seen.retreats), int(seen.climbed_at)
        total = controller.tuner.total_steps
        if books["total_steps"] != total:
            self.recorder.extended(controller.step, total)
