"""What a user is told once a run."""

from collections.abc import Callable, Mapping
from typing import Any

from autotunenet_jax.hosting import TRAIN, Notice, Report, Session, notices
from autotunenet_jax.hosting import Notices as Teller

from .host import TorchHost

_HOW = "Report one whenever the tuner asks for it: attach(..., validate=function), or tuner.validate(metric)"
_OVERWRITTEN = (
    "Something else sets {names} besides the tuner, such as a scheduler made after attach, a callback that "
    "averages weights, or the optimizer itself: what is tuned is not what is in force. Hand the scheduler to attach, "
    "or in Lightning return it from configure_optimizers, or leave the name out of param_space."
)
_IDLE = (
    "The optimizer that the tuner is attached to has made no step in the first {calls} calls of step: what is tuned "
    "changes nothing. Attach the optimizer that trains, anew where it is made anew."
)
_SELDOM = (
    "step was called {calls} times, and the optimizer made {asked} steps: call it once per optimizer step, after "
    "optimizer.step(), and with accumulated gradients after the last part alone."
)
_UNHEARD = (
    "The optimizer has made {asked} steps, and the tuner has heard of {calls}: call tuner.step(loss) once after each "
    "optimizer.step(). It sets the rates for the next one; until then those of the last call stay in force."
)
_FIRST_ROUND = (
    "The run ends in its first round of forks, after {step} of {total} steps: nothing is tuned yet. If an early "
    "stopping of your own ended it, metrics of forks stopped it: give it those alone for which tuner.in_round is false."
)
# Calls of step after which it is looked whether the optimizer steps too; a GradScaler skips up to 24 at first.
_FIRST_CALLS = 60


class Notices:
    """Warnings, each given once a run.

    Args:
      session: Of the run.
      outside: Values that lie outside the ranges at the start, by name.
      through: Where they go; by default warnings that point at the user's line.
      how: How a metric is reported; by default in a loop of the user's own.
    """

    def __init__(
        self,
        session: Session,
        *,
        outside: Mapping[str, Any],
        through: Callable[[str], None] | None = None,
        how: str | None = None,
    ):
        self._session, self._outside, self._how = session, outside, how or _HOW
        self._teller = Teller(session.recorder, **({} if through is None else {"through": through}))
        self._is_over, self._had_eval = False, -1
        self._has_told_overwritten = False
        self._look(is_over=False)

    def resumed(self) -> None:
        """The run goes on from a saved state: where the optimizer stood when it was attached says nothing."""
        self._outside = {}

    def tell(self, kind: str, message: str) -> None:
        """Tells something that whoever owns the loop has seen."""
        self._teller.tell(self._session.controller.step, [Notice(kind, message)])

    def before(self, host: TorchHost) -> None:
        """Says that a value is not what the tuner has written."""
        if self._has_told_overwritten:
            return
        names = host.overwritten()
        if names:
            self._has_told_overwritten = True
            self.tell("overwritten", _OVERWRITTEN.format(names=", ".join(names)))

    def of_steps(self, calls: int, asked: int) -> None:
        """Says that the optimizer steps less often than `AutoTuneNet.step` is called."""
        if calls == _FIRST_CALLS and 2 * asked <= calls:
            self.tell("no steps", (_SELDOM if asked else _IDLE).format(calls=calls, asked=asked))

    def of_calls(self, calls: int, asked: int) -> None:
        """Says that `AutoTuneNet.step` is called less often than the optimizer steps."""
        if asked == _FIRST_CALLS and 4 * calls <= asked:
            self.tell("unheard steps", _UNHEARD.format(calls=calls, asked=asked))

    def before_finish(self) -> None:
        """Says that a run is ended before it began, perhaps by metrics that were of no training."""
        controller, evals = self._session.controller, self._session.recorder.history.evals
        is_first = controller.phase != TRAIN and int(controller.state.round.index) == 0
        if is_first and sum(not row["is_settled"] for row in evals) > 1:
            total = controller.tuner.total_steps
            self.tell("ended in its first round", _FIRST_ROUND.format(step=controller.step, total=total or "its"))

    def after(self, report: Report) -> None:
        """Looks at the run after decisions, metrics and the last step."""
        session = self._session
        controller, total = session.controller, session.controller.tuner.total_steps
        if total is not None and controller.step > total:
            message = (
                f"step was called more than total_steps={total} times: the budget is spent, and a decayed rate is "
                "zero. Give attach the number of steps that the loop runs."
            )
            if controller.step == total + 1:
                self.tell("budget spent", message)
            return
        is_new = report.decision is not None or session.evaluated_at != self._had_eval
        self._had_eval = session.evaluated_at
        is_over = session.is_settled and not self._is_over
        if is_over or (is_new and report.after == TRAIN):
            self._is_over = is_over
            self._look(is_over=is_over)

    def _look(self, *, is_over: bool) -> None:
        session = self._session
        controller, history = session.controller, session.recorder.history
        found = notices(
            controller.tuner,
            controller.state,
            rounds=history.rounds,
            evals=history.evals,
            outside=self._outside,
            is_over=is_over,
            how=self._how,
        )
        self._teller.tell(controller.step, found)
