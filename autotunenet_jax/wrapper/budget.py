"""Whose state it is, and `extend`: the run of a tuned optimizer with another budget."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..compiler import packing
from ..controller import AutoTuneNet
from ..controller.extension import extended
from ..controller.first_state import PARTS
from . import memory_drift, ring
from .state import AutotuneState, Memory, Settings


def planned(tuner: AutoTuneNet, memory: Memory) -> AutoTuneNet:
    """The tuner with the plan of a memory mode."""
    if memory == "drift":
        tuner.plan = memory_drift.plan(tuner.space, tuner.plan)
    return tuner


def digests_of(tuner: AutoTuneNet) -> tuple[int, ...]:
    """Its fingerprint, as something static."""
    return tuple(int(digest) for digest in tuner._fingerprint())


def check(state: AutotuneState, digests: tuple[int, ...] | None = None) -> None:
    """Whether the arrays of a state are of the budget, space and policy that its optimizer was made with.

    Looks on the host alone, and only at what is there; never waits for the device.

    Args:
      state: That.
      digests: Of the optimizer that is to go on with it, where that is known.

    Raises:
      TypeError: It is no state of `autotune`.
      ValueError: They are of another one; the message says in what.
    """
    if not isinstance(state, AutotuneState):
        raise TypeError(
            f"the optimizer's state is that of autotune, which its init makes; got {type(state).__name__}. "
            "Arguments of update come in optax's order: update(grads, opt_state, params, value=loss)."
        )
    settings = state.settings
    if not settings.is_on:
        return
    if digests is not None and digests != settings.digests:
        # Where the budget was extended, whoever began the run may go on with it.
        _refuse(settings.made_by or settings.digests, digests)
    place, first = packing.positions(settings.layout).tuner.fingerprint
    found = [packing.read_number(state.packed, (place, first + k)) for k in range(len(PARTS))]
    if any(digest is None for digest in found):
        return
    _refuse(found, settings.digests)


def _refuse(found: Sequence[Any], wanted: tuple[int, ...]) -> None:
    parts = [part for part, a, b in zip(PARTS, found, wanted, strict=True) if int(a) != b]
    if parts:
        raise ValueError(
            f"the state of autotune was made with another {' and '.join(parts)}. Make the optimizer as it was when the "
            "state was saved; for another total_steps go on with autotunenet_jax.extend(opt_state, total_steps=...)."
        )


def with_budget(state: AutotuneState, total_steps: int) -> AutotuneState:
    """The state with its plan laid anew; see `autotunenet_jax.extend`."""
    check(state)
    settings, course = state.settings, state.course
    core = settings.core
    other = AutoTuneNet(
        core.space,
        total_steps,
        mode="max" if settings.is_max else "min",
        guard=core.guard,
        max_share=settings.max_share,
        decay="hold" if core.shape.steps else core.shape.form,
        schedule=core.shape.form if core.shape.steps else None,
        warmup_steps=core.warmup_steps,
        capacity=int(np.shape(course.tuner.knowledge.observations.y)[0]),
    )
    other = planned(other, settings.memory)
    ts = extended(course.tuner._replace(step=course.tuner.step + course.lag), other.plan, other._fingerprint())
    course = course._replace(tuner=ts._replace(step=course.tuner.step))
    changed: Settings = dataclasses.replace(settings, core=other.core, digests=digests_of(other))
    packed: Any = packing.pack(course)
    record, dims = state.record, core.space.dims
    if record is not None:
        words = ring.words_of(ring.entry(ts, cause=ring.EXTENDED, phase=ts.phase))
        record = ring.add_entry(record, words, dims, flag=jnp.ones((), bool))
    return state._replace(packed=packed, record=record, settings=changed)
