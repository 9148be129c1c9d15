"""Copies of a training state as tensors and plain data, for files."""

from collections.abc import Mapping
from typing import Any

from . import _rng


def to_plain(slot: Mapping[str, Any]) -> dict[str, Any]:
    """A copy made by a tuner, with the random generators' states as tensors and numbers."""
    training = slot["training"]
    return {**slot, "training": {**training, "rng": _rng.to_plain(training["rng"])}}


def from_plain(slot: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_plain` was given."""
    training = slot["training"]
    return {**slot, "training": {**training, "rng": _rng.from_plain(training["rng"])}}


def check(state: Mapping[str, Any], version: int, *, space: str, total_steps: int | None) -> None:
    """Whether a saved state belongs to a tuner.

    Raises:
      ValueError: Another format, search space or budget.
    """
    if state["format"] != version:
        raise ValueError(f"the state has format {state['format']}; this version of the library reads {version}.")
    if state["space"] != space:
        raise ValueError(
            "the state is of another search space. Make the AutoTuneNet with the param_space, bounds included, that it "
            "had when the state was saved."
        )
    if state["total_steps"] != total_steps:
        raise ValueError(
            f"the state is of a run of {state['total_steps']} steps, and this one has {total_steps}. Train with the "
            "same budget, or start afresh elsewhere."
        )
