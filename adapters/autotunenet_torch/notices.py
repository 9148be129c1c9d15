"""What a user is told once a run."""

import math
import warnings

from autotunenet_jax.hosting import TRAIN, Report, Session

from .arguments import slow_names


class Notices:
    """Warnings, each given once, pointing at the user's line that called ``step``.

    Args:
      session: Of the run.

    Attributes:
      has_told_slow: Whether the user knows why slow hyperparameters stay where they are.
    """

    def __init__(self, session: Session):
        self._controller = session.controller
        self._slow = slow_names(session.controller.tuner.space)
        self._has_told_end = self.has_told_slow = False

    def after(self, report: Report) -> None:
        """Says when the loop is longer than the budget, and why slow hyperparameters stay where they are."""
        total, controller = self._controller.tuner.total_steps, self._controller
        if total is not None and controller.step > total and not self._has_told_end:
            self._has_told_end = True
            warnings.warn(
                f"step was called more than total_steps={total} times: the budget is spent, and a decayed rate is "
                "zero. Give attach the number of steps that the loop runs.",
                stacklevel=3,
            )
        decision = report.decision
        if decision is None or not decision.kind or not report.before == report.after == TRAIN:
            return
        has_told = self.has_told_slow or not self._slow
        if not has_told and not math.isfinite(controller.state.validation.level):
            self.has_told_slow = True
            warnings.warn(
                f"{', '.join(self._slow)} stay at their initial values: what they do shows only on validation data, "
                "and none was reported when the tuner asked. Give attach a validate function, or call "
                "tuner.validate(metric) whenever tuner.wants_validation.",
                stacklevel=3,
            )
