"""The training between two steps, so that one that is interrupted can be saved as it stood there."""

from typing import Any

import torch
from torch import nn

from . import random_state
from .data import ReplayBuffer


class StepBoundary:
    """Remembers what a step changes before its update: random generators, place in the data, touched buffers.

    Cost: per step the states of the generators, and copies of the buffers that steps write to.
    """

    def __init__(self, model: nn.Module, source: ReplayBuffer):
        self._model, self._source = model, source
        self._touched: set[str] = set()
        self._buffers: dict[str, torch.Tensor] = {}
        self._versions: dict[str, int] = {}
        self._is_open = self._is_updating = False

    def begin(self) -> None:
        """A step begins."""
        live = dict(self._model.named_buffers())
        self._touched |= {name for name, buffer in live.items() if self._changed(name, buffer)}
        self._versions = {name: _version(buffer) for name, buffer in live.items()}
        self._buffers = {name: live[name].detach().clone() for name in self._touched if name in live}
        self._random, self._cursor = random_state.capture(), self._source.cursor
        self._is_open, self._is_updating = True, False

    def _changed(self, name: str, buffer: torch.Tensor) -> bool:
        return name in self._versions and _version(buffer) != self._versions[name]

    def update(self) -> None:
        """Parameters are about to change: from here on the step cannot be taken back."""
        self._is_updating = True

    def end(self) -> None:
        """The step is complete, and the tuner has said what follows."""
        self._is_open = False

    def go_back(self) -> bool:
        """Takes back a step that was interrupted; returns whether the training stands between two steps now."""
        if not self._is_open:
            return True
        live = dict(self._model.named_buffers())
        unknown = [n for n, buffer in live.items() if self._changed(n, buffer) and n not in self._buffers]
        if self._is_updating or unknown:
            return False
        with torch.no_grad():
            for name, value in self._buffers.items():
                live[name].copy_(value)
        self._source.cursor = self._cursor
        random_state.restore(self._random)
        self._is_open = False
        return True


def _version(buffer: Any) -> int:
    return 0 if buffer.is_inference() else buffer._version
