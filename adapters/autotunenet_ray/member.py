"""One member of a population: trains forks for the run that it belongs to, in a process of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from autotunenet_jax.hosting import Parcel, pack, train_fork, unpack


class Member:
    """A Ray actor's class.

    Args:
      train_step: The user's.
      structure: A tree of the training state's structure, whatever its leaves.
      has_aux: Whether ``train_step`` returns metrics too.
    """

    def __init__(self, train_step: Callable[..., Any], structure: Any, *, has_aux: bool):
        self._train_step, self._structure, self._has_aux = train_step, structure, has_aux

    def train(self, state: Parcel, hyperparams: Mapping[str, np.ndarray], batches: Sequence[Any]) -> tuple[Any, Parcel]:
        """What is to be heard of a fork's steps, and the state after them."""
        begun = unpack(state, self._structure)
        fork = train_fork(self._train_step, begun, hyperparams, batches, has_aux=self._has_aux)
        return fork.heard, pack(fork.state)
