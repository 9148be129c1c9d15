"""The processes that train one state together, and what they have to agree on.

Whatever is decided from the state itself is the same in all of them. What comes from elsewhere, a signal or a clock, is
agreed on: every process has to run the same programs in the same order, or all of them wait for ever.
"""

import time
from typing import Any, NamedTuple

import jax
import numpy as np

from ..checkpoint.spread import spans_processes

# They agree about once in so many seconds, and after so many steps at the latest.
_SECONDS_APART, _MOST_STEPS = 1.0, 32


class Agreement(NamedTuple):
    """What all processes do next.

    Attributes:
      saves: Whether the run is saved.
      stops: Whether it ends here.
    """

    saves: bool
    stops: bool


class Processes:
    """The processes of one run; those of other runs, and runs of one process, have nothing to agree on.

    Args:
      count: How many there are.
      index: Which of them this is.

    Attributes:
      is_several: Whether there are more than one.
      is_first: Whether this is the one that writes to disk and to the terminal.
      steps_apart: Training steps until they next agree.
      has_stopped: Whether they have agreed to end the run.
    """

    def __init__(self, count: int = 1, index: int = 0):
        self.is_several, self.is_first = count > 1, index == 0
        self.steps_apart = 1 if self.is_several else _MOST_STEPS
        self.has_stopped = False
        self._before: tuple[float, int] | None = None

    @classmethod
    def of(cls, *trees: Any) -> "Processes":
        """Those that hold a part of some trees' arrays.

        Raises:
          ValueError: They are some, but not all, of the processes there are.
        """
        spread = [leaf for leaf in jax.tree.leaves(trees) if spans_processes(leaf)]
        taking_part = {device.process_index for leaf in spread for device in leaf.sharding.device_set}
        if not taking_part:
            return cls()
        if len(taking_part) < jax.process_count():
            raise ValueError(
                f"arrays of state and batches span {len(taking_part)} of {jax.process_count()} processes. "
                "Spread them over devices of all processes, or keep them in each."
            )
        found = cls(jax.process_count(), jax.process_index())
        # They meet before any of them compiles: gloo gives up who comes to the first exchange half a minute late.
        found.gather(0.0)
        return found

    def gather(self, *values: float) -> np.ndarray:
        """What each process has to say, one row for each."""
        row = np.array(values, np.float64)
        if not self.is_several:
            return row[None]
        from jax.experimental.multihost_utils import process_allgather

        # As bytes, of which JAX keeps all.
        return np.asarray(process_allgather(row.view(np.uint8))).view(np.float64)

    def agree(self, step: int, *, is_due: bool, is_asked: bool) -> Agreement:
        """What is done at a step that all have come to. Waits for the steps under way where there are several.

        Args:
          step: Budget spent.
          is_due: Whether this process finds a save due; the first one is followed.
          is_asked: Whether it has been asked to stop; one is enough.
        """
        if not self.is_several:
            self.has_stopped = is_asked
            return Agreement(is_due, is_asked)
        before, self._before = self._before, (time.monotonic(), step)
        took = 0.0 if before is None else (self._before[0] - before[0]) / max(step - before[1], 1)
        said = self.gather(is_due, is_asked, took)
        self.has_stopped = bool(said[:, 1].any())
        slowest = max(float(said[:, 2].max()), _SECONDS_APART / _MOST_STEPS)
        self.steps_apart = max(int(_SECONDS_APART / slowest), 1)
        return Agreement(bool(said[0, 0]), self.has_stopped)
