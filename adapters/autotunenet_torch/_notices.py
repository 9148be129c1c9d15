"""What a user is told once a run."""

import warnings

import autotunenet_jax as atn

from . import _given


class Notices:
    """Warnings, each given once, pointing at the user's line that called ``step``.

    Args:
      space: What is tuned.
      total_steps: Budget; None for an open-ended run.
    """

    def __init__(self, space: atn.SearchSpace, total_steps: int | None):
        self._slow, self._total = _given.slow_names(space), total_steps
        self.has_told_slow = self._has_told_end = False

    def budget_spent(self, step: int) -> None:
        """Says when the loop is longer than the budget."""
        if self._total is None or step <= self._total or self._has_told_end:
            return
        self._has_told_end = True
        warnings.warn(
            f"step was called more than total_steps={self._total} times: the budget is spent, and a decayed rate is "
            "zero. Give attach the number of steps that the loop runs.",
            stacklevel=5,
        )

    def round_skipped(self, *, is_slow: bool, has_metric: bool) -> None:
        """Says why slow hyperparameters stay where they are."""
        if not is_slow or has_metric or not self._slow or self.has_told_slow:
            return
        self.has_told_slow = True
        warnings.warn(
            f"{', '.join(self._slow)} stay at their initial values: what they do shows only on validation data, and "
            "none was reported when the tuner asked. Give attach a validate function, or call tuner.validate(metric) "
            "whenever tuner.wants_validation.",
            stacklevel=5,
        )
