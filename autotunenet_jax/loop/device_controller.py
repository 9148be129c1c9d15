"""The controller's state on the device, beside the training state, where steps run ahead of the host."""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ..checkpoint.memory_copies import copy_tree
from ..compiler.blas_threads import one_blas_thread
from ..compiler.seldom_run import seldom_run
from ..controller import AutoTuneNet, decide_jit, hyperparams_jit
from ..controller.core import Core
from ..controller.state import TunerState
from ..controller.validation_monitor import kept_at_once
from ..session.session import Decision


@functools.partial(seldom_run, static_argnums=0)
def _observe_jit(core: Core, ts: TunerState, metric: Array) -> tuple[TunerState, Array]:
    return kept_at_once(core.observe_eval(ts, metric))


class DeviceController:
    """A tuner with its state, which compiled steps take and give back.

    Args:
      tuner: The tuner.
      key: Of its random choices.

    Attributes:
      state: The state. Whoever replaces it by that of the next step counts ``step`` and ``data_step`` on by one, and
        calls `synchronise` wherever more may have happened.
      phase: Phase of the next step.
      step: Budget spent.
      data_step: Position in the data of the next step.
      segment_left: Steps to the next decision.
    """

    def __init__(self, tuner: AutoTuneNet, *, key: PRNGKeyArray):
        self.tuner, self.state = tuner, tuner.init(key)
        self.synchronise()

    def synchronise(self) -> None:
        """Reads from the device where the run is. Waits for the steps under way."""
        ts = self.state
        position = jax.device_get((ts.step, ts.data_step, ts.phase, ts.segment_left))
        self.step, self.data_step, self.phase, self.segment_left = map(int, position)

    def replace(self, state: TunerState, *, extend: bool = False) -> None:
        """Goes on from another state, such as a snapshot's, on request one with another budget."""
        self.state = self.tuner.taken_over(state, extend=extend)
        self.synchronise()

    def hyperparams(self) -> dict[str, Array]:
        """Values in force for the next step, on the device."""
        return hyperparams_jit(self.tuner.core, self.state)

    def decide(self) -> Decision:
        """Takes the decision that is due."""
        core = self.tuner.core
        # Steps may still be under way, and use the threads that a decision has no use for.
        jax.block_until_ready(self.state)
        with one_blas_thread():
            # A copy: the decision may have to be undone.
            state, directive, report, keeps = decide_jit(core, copy_tree(self.state))
            read: Any = (directive, report, state.incumbent, state.plan.kind, state.discarded, keeps)
            directive, report, incumbent, kinds, discarded, keeps = jax.device_get(read)
        chosen = core.space.decode(incumbent)
        self._change(state)
        return Decision(directive, report, chosen, int(kinds[int(report.index)]), int(discarded), bool(keeps))

    def observe_eval(self, metric: float) -> bool:
        """Takes a validation metric in, in the direction of the tuner's mode; whether to keep the measured state."""
        sign = -1.0 if self.tuner.mode == "max" else 1.0
        state, keeps = _observe_jit(self.tuner.core, self.state, np.float32(sign * metric))
        keeps = bool(keeps)
        self._change(state)
        return keeps

    def undo(self) -> None:
        """Takes the last decision or metric back."""
        self.replace(self._before)

    def _change(self, state: TunerState) -> None:
        self._before, self.state = self.state, state
        self.synchronise()
