"""What a session asks of the framework whose training it tunes."""

import abc
import types
from collections.abc import Mapping
from typing import Any


class Host(abc.ABC):
    """A training in progress, as a `Session` sees it: something that can be copied, put back and written to.

    Subclasses say how; the methods that are not abstract are for what a framework or a loop may not have.

    Attributes:
      metrics: All that the latest `evaluate` has measured, by name, the metric it returned included; empty where that
        has no name.
    """

    metrics: Mapping[str, float] = types.MappingProxyType({})

    @abc.abstractmethod
    def copy(self) -> Any:
        """A copy of everything that a training step reads and writes, hyperparameters included.

        Training on must not change it; `restore` may be given it several times.
        """

    @abc.abstractmethod
    def restore(self, copy: Any, *, rewinds: bool) -> None:
        """Puts a copy back, bit for bit.

        Args:
          copy: What `copy` gave.
          rewinds: Whether the data go back with it, as for the next fork of a round; else they go on.
        """

    @abc.abstractmethod
    def write(self, hyperparams: Mapping[str, Any]) -> None:
        """Puts hyperparameters in force for the next step: all of the space, by name, as Python objects."""

    def evaluate(self) -> float | None:
        """The validation metric of the present state, in the tuner's direction; None where there is none to be had."""
        return None

    def count_non_finite(self, copy: Any = None) -> int:
        """How many numbers of a copy, or of the present state, are not finite. Counted, since some may have to be."""
        return 0

    def keep_best(self) -> Any:
        """What is to be remembered of the present state, the best so far by its metric."""
        return None

    def restore_best(self, best: Any) -> bool:
        """Puts back what `keep_best` gave, at the end of a run; False where that is not a whole state."""
        return False

    def begin_round(self, position: int) -> None:
        """A round begins: the data from this position on, in training steps, will be asked for again."""
        return

    def end_round(self, position: int) -> None:
        """A round is over: no data before this position will be asked for again."""
        return

    def finish(self) -> None:
        """The run is over: whatever was put around the training for the tuner's sake is taken off."""
        return
