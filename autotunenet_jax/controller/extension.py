"""Another budget on purpose: the plan laid anew over what remains of a run that has begun."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from .plan import NEVER, Plan
from .state import TRAIN, TunerState


def relaid(held: Plan, planned: Plan, *, begun: int, step: int) -> Plan:
    """The rounds that have begun as they were, and of the new plan those that come after as many.

    Args:
      held: The plan so far; of NumPy arrays, as is the other.
      planned: The plan of a run that had the new budget from the start.
      begun: Rounds that were held or skipped, or are being held.
      step: Steps done.

    Returns:
      A plan with the new budget and its distances; a round that would have begun by now begins next.
    """
    rows = {name: (getattr(held, name), getattr(planned, name)) for name in ("start", "kind", "forks", "length")}
    rows["range_test"] = (held.range_test, planned.range_test)
    # An open-ended run counts its rounds otherwise: there those count that lie ahead.
    is_like = (int(held.total) > 0) == (int(planned.total) > 0)
    first = begun if is_like else int(np.searchsorted(planned.start, step, side="right"))
    columns = {}
    for name, (old, new) in rows.items():
        rest = np.concatenate([new[first:], np.repeat(new[-1:], len(new))])
        columns[name] = np.concatenate([old[:begun], rest])[: len(new)].astype(np.int32)
    # The last row stays empty: a run that has held every round waits there.
    columns["start"][-1] = NEVER
    return planned._replace(**columns)


def extended(ts: TunerState, planned: Plan, digests: UInt32[np.ndarray, "3"]) -> TunerState:
    """The state of a run that goes on to the budget of another plan. Host only.

    Raises:
      ValueError: The run has come further than the new budget.
    """
    step, total = int(ts.step), int(planned.total)
    if 0 < total <= step:
        raise ValueError(f"total_steps must exceed the {step} steps that are done; got {total}. Give a larger budget.")
    in_train = int(ts.phase) == TRAIN
    row = int(ts.round.index)
    held: Plan = jax.tree.map(np.asarray, ts.plan)
    plan = relaid(held, planned, begun=row + (not in_train), step=step)
    start = int(plan.start[row])
    left = jnp.int32(NEVER if start >= NEVER else max(start - step, 1))
    return ts._replace(
        fingerprint=jnp.asarray(digests),
        plan=Plan(*(jnp.asarray(column) for column in plan)),
        segment_left=left if in_train else ts.segment_left,
        segment_length=jnp.copy(left) if in_train else ts.segment_length,
    )
