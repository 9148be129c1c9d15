"""What few updates do: carry out what the tuner, or the user, asks for.

In this order: copies that `observe` left to it, the optimizer's step where that had to wait for them, the decision, the
copies that it asks for, and the way back to a snapshot.

All of it happens in one loop of at most one turn, apart from what every step does: a device tells the host how such a
question is answered, and waits for it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from ..compiler import packing
from ..compiler.one_turn import when
from . import inner_state, trees
from .bookkeeping import Opened, closed, sent_home
from .held_snapshots import HeldSnapshots, Snapshot
from .loss import Ticked, note, ticked_or_away
from .state import Order, Settings, write_in_force


class Given(NamedTuple):
    """What an update knows once every step's own part is done.

    Attributes:
      settings: Of the wrapper.
      step: The inner optimizer's update: of room for it and that optimizer's state.
      params: The parameters that it is of.
      aux: State of the training step's own, as it was given.
      loss: Scalar; None where none was given.
      before: The course of the run before.
      opened: What was read from that.
      square: The gradients' squared norm.
      is_finite: Whether gradients and loss are.
      is_fit: Whether the gradients are also in line.
      ticked: What the loss comes to, if the parameters are not away; None without a loss.
    """

    settings: Settings
    step: Callable[[Any, Any], tuple[Any, Any]]
    params: Any
    aux: tuple[Any, ...]
    loss: Array | None
    before: packing.Packed
    opened: Opened
    square: Array
    is_finite: Array
    is_fit: Array
    ticked: Ticked | None


class Carried(NamedTuple):
    """What goes through the loop, and stays in its place where there is nothing to do.

    Attributes:
      is_taken: Whether the update is the inner optimizer's, or a way back.
      new: The update; the gradients, or room, where the optimizer has made none.
      inner: State of the inner optimizer.
      aux: State of the training step's own that is held beside it.
      packed: The course of the run.
      record: The ring of what happened.
      snapshots: Those held, if any.
    """

    is_taken: Array
    new: Any
    inner: Any
    aux: tuple[Any, ...]
    packed: packing.Packed
    record: Array | None
    snapshots: HeldSnapshots | None


def carry_out(given: Given, on: Carried) -> tuple[Carried]:
    """The rest of an update in which there is something to do."""
    ticked, away = given.ticked, jnp.zeros((), bool)
    if on.snapshots is not None:
        away, on = when(given.opened.is_left, functools.partial(_resumed, given), away, on)
        ticked = (
            None if ticked is None else ticked_or_away(given.settings, given.before, ticked, given.opened.lag, away)
        )
    packed, directive, record = given.before, None, on.record
    if ticked is not None and given.loss is not None and on.record is not None:
        packed, directive, record = note(given.settings, given.before, ticked, on.record, given.loss, given.opened.lag)
    after = closed(given.settings, given.before, packed, directive, given.opened, given.square, on.is_taken, away)
    on = on._replace(packed=after.packed, record=record)
    if on.snapshots is None:
        return (on,)
    return when(after.is_asked, functools.partial(_obeyed, given, after.order), on)


def _resumed(given: Given, away: Array, on: Carried) -> tuple[Array, Carried]:
    """The copies left to this update, the inner state that follows the parameters, and then the optimizer's own update.

    Returns:
      Whether the parameters are still on their way to a snapshot, and what goes on.
    """
    opened, params, snapshots = given.opened, given.params, on.snapshots
    assert snapshots is not None
    inner, snapshots = inner_state.with_left(opened.left, opened.home, params, on.aux, on.inner, snapshots)
    # The parameters are the first leaves of a snapshot.
    target = snapshots.reader(jnp.maximum(opened.home - 1, 0))
    away |= opened.is_returning & ~trees.has_arrived(params, target)
    is_made = given.is_fit & ~away
    new, inner = when(is_made, given.step, on.new, write_in_force(inner, opened.values))
    is_taken = is_made & jnp.isfinite(trees.squared_norm(new))
    aux = optax.tree.where(is_taken, given.aux, on.aux)
    return away, on._replace(is_taken=is_taken, new=new, inner=inner, aux=aux, snapshots=snapshots)


def _obeyed(given: Given, order: Order, on: Carried) -> tuple[Carried]:
    """The copies that were asked for, and the update that leads to one of them."""
    params, snapshots = given.params, on.snapshots
    assert snapshots is not None
    # Only what is whole is copied; what is not goes back to what was. Parameters are: no update makes one infinite, and
    # none could bring an infinite one back.
    saved = snapshots.read_at(jnp.zeros((), jnp.int32))
    is_whole = trees.is_as_finite((inner_state.without_values(on.inner), on.aux), (saved.inner, saved.aux))

    def here(new: Any, inner: Any, aux: Any) -> Snapshot:
        after = trees.moved(params, trees.kept_finite(on.is_taken, params, new))
        return Snapshot(after, inner_state.without_values(inner), aux)

    flags = (order.save & is_whole, order.keep & is_whole)
    snapshots = snapshots.written(flags, here, on.new, on.inner, on.aux)
    packed, home = sent_home(given.settings, on.packed, is_whole, order)
    target = snapshots.read_at(jnp.maximum(home - 1, 0))
    is_back = home > 0
    on = on._replace(
        is_taken=on.is_taken | is_back,
        new=optax.tree.where(is_back, trees.way(params, target.params, on.new), on.new),
        aux=optax.tree.where(is_back, target.aux, on.aux),
        packed=packed,
        snapshots=snapshots,
    )
    return (on,)
