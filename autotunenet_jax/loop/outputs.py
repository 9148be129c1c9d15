"""What the user's functions return, taken apart."""

from collections.abc import Mapping
from typing import Any


def parts_of(output: Any, *, has_aux: bool) -> tuple[Any, Any, Mapping[str, Any]]:
    """State, loss and metrics of what a train step returned.

    Args:
      output: ``(state, loss)``; with ``has_aux`` either ``(state, loss, metrics)`` or ``(state, (loss, metrics))``.
      has_aux: Whether it holds metrics.
    """
    if not has_aux:
        state, loss = output
        return state, loss, {}
    if len(output) == 3:
        return output
    state, (loss, metrics) = output
    return state, loss, metrics


def monitored(names: list[str], monitor: str | None, *, mode: str) -> str:
    """Which entry of a dict of validation metrics the tuner goes by.

    Args:
      names: Those there are.
      monitor: What the user named, if anything.
      mode: Whether the metric is minimised (``"min"``) or maximised (``"max"``).

    Raises:
      ValueError: The one named is not among them, or none was and it does not go without saying.
    """
    if monitor is not None:
        if monitor not in names:
            raise ValueError(f"monitor={monitor!r} is none of the metrics of eval_step; there are {', '.join(names)}.")
        return monitor
    if len(names) == 1:
        return names[0]
    if mode == "min" and "loss" in names:
        return "loss"
    raise ValueError(
        f"eval_step returns several metrics, {', '.join(names)}; say by which one to tune, as in "
        f"monitor={(names or ['loss'])[0]!r}."
    )
