"""Whether a training may be copied: parameters, optimizer state and buffers are finite where they were at first."""

from collections.abc import Iterator

import torch

from .finite import are_finite, leaves
from .training_state import TrainingState

_MODEL, _OPTIMIZER = "model", "optimizer"


class Soundness:
    """Watches a training for numbers that are not finite.

    Infinities that are there from the beginning, as in a mask, belong there, and so do those of a buffer that has
    changed its size.
    """

    def __init__(self, state: TrainingState):
        self._state = state
        self._shapes = {name: tensor.shape for kind, name, tensor in self._tensors() if kind == _MODEL}
        self._exempt = set(self._broken())
        self._refused: set[tuple[str, str]] = set()

    def _tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for name, tensor in self._state.tensors().items():
            if tensor is not None:
                yield _MODEL, name, tensor
        for name, value in self._state.optimizer_tensors().items():
            yield from ((_OPTIMIZER, name, tensor) for tensor in leaves(value))

    def _broken(self) -> dict[tuple[str, str], torch.Tensor]:
        exempt = getattr(self, "_exempt", set())
        watched = {
            (kind, name, number): tensor
            for number, (kind, name, tensor) in enumerate(self._tensors())
            if (kind, name) not in exempt
            if kind == _OPTIMIZER or self._shapes.get(name) == tensor.shape
        }
        if are_finite(watched.values()):
            return {}
        return {(kind, name): tensor for (kind, name, _), tensor in watched.items() if not are_finite([tensor])}

    def damage(self) -> tuple[list[str], list[str]]:
        """What is not finite: names of parameters and optimizer states, and names of buffers.

        Cost: one pass over everything, and one synchronisation with the device.
        """
        broken = self._broken()
        is_buffer = {
            (kind, name): kind == _MODEL and not isinstance(tensor, torch.nn.Parameter)
            for (kind, name), tensor in broken.items()
        }
        return [n for (k, n) in broken if not is_buffer[k, n]], [n for (k, n) in broken if is_buffer[k, n]]

    def may_copy(self) -> bool:
        """Whether everything is finite.

        A buffer that is found broken again after it was put back is what the user's forward pass makes of it.
        """
        state, buffers = self.damage()
        again = {(_MODEL, name) for name in buffers} & self._refused
        self._exempt |= again
        self._refused = {(_MODEL, name) for name in buffers} - again
        return not state and not self._refused
