"""Reading and telling a tuned optimizer's state from outside, wherever other libraries have put it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ..arguments import scalar
from ..compiler import packing
from ..compiler.single_kernel import single_kernel
from ..controller.state import TRAIN, Directive
from ..controller.validation_monitor import wants_metric
from ..space import injection
from . import aux_state, budget, inner_state, notices, ring
from .loss import interpret, take_loss
from .state import (
    AutotuneState,
    Course,
    Order,
    Settings,
    in_force,
    take_metric,
    write_in_force,
)


def _tree_of(holder: Any) -> Any:
    """The optimizer state of an object that holds one, such as a train state or a module library's optimizer."""
    is_state = hasattr(holder, "_fields") or isinstance(holder, dict)
    return holder if is_state else getattr(holder, "opt_state", holder)


def _find(holder: Any) -> AutotuneState | None:
    nodes = jax.tree.leaves(_tree_of(holder), is_leaf=injection.is_tuned)
    found = [node for node in nodes if injection.is_tuned(node)]
    if len(found) > 1:
        raise ValueError("there are several tuned optimizers in here. Pass the state of one of them.")
    return found[0] if found else None


def _boxed(holder: Any) -> AutotuneState:
    state = _find(holder)
    if state is None:
        raise ValueError("there is no state of autotunenet_jax.autotune in here. Wrap the optimizer with it.")
    return state


def tuned_state(holder: Any) -> AutotuneState:
    """The state of `autotune` in a holder, out of the boxes of a module library.

    Raises:
      ValueError: There is none in it, or several.
    """
    return _unboxed(_boxed(holder))


def _unboxed(tree: Any) -> Any:
    return jax.tree.map(injection.unboxed, tree, is_leaf=injection.is_box)


def _holding(holder: Any, tree: Any) -> Any:
    """The holder with another optimizer state; an object that cannot be made anew is changed in place."""
    if _tree_of(holder) is holder:
        return tree
    if hasattr(holder, "replace"):
        return holder.replace(opt_state=tree)
    if dataclasses.is_dataclass(holder):
        return dataclasses.replace(holder, opt_state=tree)  # type: ignore[type-var]
    holder.opt_state = tree
    return holder


def _told(holder: Any, tell: Callable[[AutotuneState], AutotuneState]) -> Any:
    """The holder with its tuned state replaced."""
    new = tell(tuned_state(holder))

    def change(node: Any) -> Any:
        if not injection.is_tuned(node):
            return node
        return jax.tree.map(injection.reboxed, node, new, is_leaf=injection.is_box)

    return _holding(holder, jax.tree.map(change, _tree_of(holder), is_leaf=injection.is_tuned))


@jax.jit
def _in_force(state: AutotuneState) -> dict[str, Array]:
    values = in_force(state.settings, state.course)
    if not state.settings.is_on:
        return values
    inner = write_in_force(inner_state.found_next(state), values)
    return {**values, **injection.read(inner, injection.resolve(values, inner))}


def hyperparams(opt_state: Any) -> dict[str, Array]:
    """The hyperparameters in force at the next update.

    Of a tuned optimizer these are the tuned ones, whether the optimizer has a place for them or not; of any other the
    ones that ``optax.inject_hyperparams`` keeps. Jit-able.

    Example:
        >>> import optax
        >>> optimizer = optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.sgd)(learning_rate=0.5))
        >>> {name: float(value) for name, value in hyperparams(optimizer.init(jnp.zeros(3))).items()}
        {'learning_rate': 0.5}

    Args:
      opt_state: An optimizer state, through ``optax.chain``, ``optax.MultiSteps`` and the like, or an object whose
        ``opt_state`` it is: a Flax ``TrainState`` or ``nnx.Optimizer``.

    Returns:
      Scalar arrays by name; a name that occurs in several places by its path. Of a stack of states, as ``jax.pmap``
      and ``jax.vmap`` give them, arrays with the axes of the stack.

    Raises:
      ValueError: There are no hyperparameters in it, or several tuned optimizers.

    Cost: O(number of hyperparameters). Outside of compiled functions it waits for the update under way.
    """
    state = _find(opt_state)
    if state is None:
        return injection.injected_hyperparams(_tree_of(opt_state))
    state = _unboxed(state)
    budget.check(state)
    notices.tell(state, waits=True)
    # Only a number of accumulated batches depends on what the next update brings back.
    if not any(place.is_held for place in injection.places(state.inner)):
        state = state._replace(snapshots=None, record=None)
    read = _in_force
    for _ in range(packing.batch_ndim(state.packed, state.settings.layout)):
        read = jax.vmap(read)
    return read(state)


def observe(opt_state: Any, loss: Any) -> Any:
    """Tells the tuner the loss of the update just made, where the training loop cannot pass ``value`` to it.

    Flax's ``TrainState.apply_gradients`` is such a loop. What the tuner decides is carried out by the next update.
    Report once per update; updates in between are counted, and learned nothing from. Jit-able, without side effects.

    Example:
        >>> import optax
        >>> from autotunenet_jax import autotune
        >>> optimizer = autotune(optax.sgd, {"learning_rate": (1e-3, 1.0)}, total_steps=1000)
        >>> params, state = jnp.ones(3), optimizer.init(jnp.ones(3))
        >>> updates, state = optimizer.update(2 * params, state, params)
        >>> state = observe(state, jnp.sum(params**2))

    Args:
      opt_state: As for `hyperparams`. A ``TrainState`` is returned anew, an ``nnx.Optimizer`` is changed in place.
      loss: Scalar; that of the parameters the update started from. A loss that is not finite sends the run back.

    Returns:
      What was given, with the loss taken in.

    Raises:
      ValueError: There is no tuned optimizer in it, or the loss is not a scalar.
    """
    loss = scalar("loss", loss)

    def tell(state: AutotuneState) -> AutotuneState:
        if not state.settings.is_on:
            return state
        packed, record = _observe(state.settings, state.packed, state.record, loss)
        return state._replace(packed=packed, record=record)

    return _told(opt_state, tell)


@functools.partial(jax.jit, static_argnums=0)
def _observe(settings: Settings, packed: packing.Packed, record: Array, loss: Array) -> tuple[packing.Packed, Array]:
    lag, is_usable, is_made = _unreported(settings, packed)
    after, directive, record = take_loss(settings, packed, record, loss, lag=lag, is_usable=is_usable, is_made=is_made)
    return _noted(settings, packed, after, lag, directive), record


@single_kernel(static_argnums=(0,))
def _unreported(settings: Settings, packed: packing.Packed) -> tuple[Array, Array, Array]:
    """Steps without a loss before the last one, whether that one's gradients could be used, and whether it was made."""
    course: Course = packing.unpack(packed, settings.layout)
    return jnp.maximum(course.lag - 1, 0), ~course.is_spoiled, ~course.is_reverted


@single_kernel(static_argnums=(0,))
def _noted(
    settings: Settings, before: packing.Packed, after: packing.Packed, lag: Array, directive: Directive
) -> packing.Packed:
    """The course with the copies that the next update has to make."""
    past, course = (packing.unpack(packed, settings.layout) for packed in (before, after))
    course, order = interpret(settings, past, course, lag, directive)
    merged = Order(*(new | old for new, old in zip(order, past.order, strict=True)))
    return packing.pack(course._replace(order=merged, lag=jnp.zeros_like(course.lag)))


def observe_eval(opt_state: Any, metric: Any) -> Any:
    """Tells the tuner a validation metric of the current parameters, in the direction of ``mode``.

    Forks are compared by it when it is reported each time that `wants_eval` asks; hyperparameters that act slowly, such
    as a weight decay, are only tuned then. Outside rounds it shows whether training still generalises. Jit-able.

    Args:
      opt_state: As for `observe`.
      metric: Scalar. One that is not finite says that training is broken; where none was asked for, and in the first
        fork of a round, it says nothing.

    Returns:
      What was given, with the metric taken in.

    Raises:
      ValueError: There is no tuned optimizer in it, or the metric is not a scalar.
    """
    metric = scalar("metric", metric).astype(jnp.float32)

    def tell(state: AutotuneState) -> AutotuneState:
        if not state.settings.is_on:
            return state
        packed, record = _observe_eval(state.settings, state.packed, state.record, metric)
        return state._replace(packed=packed, record=record)

    return _told(opt_state, tell)


@functools.partial(jax.jit, static_argnums=0)
def _observe_eval(
    settings: Settings, packed: packing.Packed, record: Array, metric: Array
) -> tuple[packing.Packed, Array]:
    packed, noted = _measured(settings, packed, metric)
    return packed, ring.add_metric(record, settings.core.space.dims, noted)


@single_kernel(static_argnums=(0,))
def _measured(settings: Settings, packed: packing.Packed, metric: Array) -> tuple[packing.Packed, ring.MetricEntry]:
    course, noted = take_metric(settings, packing.unpack(packed, settings.layout), metric)
    return packing.pack(course), noted


def extend(opt_state: Any, *, total_steps: int) -> Any:
    """Lets a run go on to another budget, longer or shorter, from wherever it is: in its middle, or resumed. Host only.

    The rounds that were held stay held, the others are laid anew over what remains, and the decay follows the new
    budget. The state is then one of ``autotune(..., total_steps=total_steps)``; a compiled step is compiled once more.

    Example:
        >>> import optax
        >>> from autotunenet_jax import autotune
        >>> optimizer = autotune(optax.sgd, {"learning_rate": (1e-3, 1.0)}, total_steps=1000)
        >>> state = extend(optimizer.init(jnp.ones(3)), total_steps=3000)
        >>> int(state.tuner.plan.total)
        3000

    Args:
      opt_state: As for `observe`.
      total_steps: Updates of the whole run.

    Returns:
      What was given, with the new budget. An ``nnx.Optimizer`` is refused: the structure of its state is fixed.

    Raises:
      TypeError: ``total_steps`` is not an integer, or the structure of the state cannot change.
      ValueError: It does not exceed the updates done, or there is no tuned optimizer in it.
    """
    state = _boxed(opt_state)
    if any(injection.is_box(leaf) for leaf in jax.tree.leaves(state, is_leaf=injection.is_box)):
        raise TypeError(
            "the structure of this optimizer's state is fixed. Make a new one with autotune(..., total_steps=...), and "
            "extend the state of that library's optimizer outside of it."
        )
    new = budget.with_budget(state, total_steps)
    tree = jax.tree.map(
        lambda node: new if injection.is_tuned(node) else node, _tree_of(opt_state), is_leaf=injection.is_tuned
    )
    return _holding(opt_state, tree)


def rewound(opt_state: Any, aux: Any) -> Any:
    """State of the training step's own, gone back with the parameters: batch statistics, averages, counters.

    Give `update` what the step made of it, and take from here what to go on with: that itself where the update was the
    optimizer's own; what it was before where a step was skipped; what it was at the snapshot where the run went back to
    one, from a losing fork or from trouble. Jit-able.

    Example:
        >>> import optax
        >>> from autotunenet_jax import autotune
        >>> optimizer = autotune(optax.sgd, {"learning_rate": (1e-3, 1.0)}, total_steps=1000)
        >>> params, count = jnp.ones(3), jnp.int32(7)
        >>> updates, state = optimizer.update(
        ...     params, optimizer.init(params), params, value=jnp.float32(1.0), aux=count + 1
        ... )
        >>> int(rewound(state, count + 1))
        8

    Args:
      opt_state: As for `hyperparams`, after the update.
      aux: What that was given as ``aux``: a tree of arrays, or of boxes of them such as NNX variables.

    Returns:
      A tree like ``aux``; ``aux`` itself with ``enabled=False``.

    Raises:
      ValueError: There is no tuned optimizer in it, or it was given another ``aux``.
    """
    state = tuned_state(opt_state)
    return aux_state.reverted(state.course.is_reverted, state, aux) if state.settings.is_on else aux


def wants_eval(opt_state: Any) -> Bool[Array, ""]:
    """Whether the tuner would use a validation metric now; a bool scalar. Jit-able.

    Example:
        >>> import optax
        >>> from autotunenet_jax import autotune
        >>> optimizer = autotune(optax.sgd, {"learning_rate": (1e-3, 1.0)}, total_steps=1000)
        >>> bool(wants_eval(optimizer.init(jnp.ones(3))))
        False

    Args:
      opt_state: As for `hyperparams`.

    Raises:
      ValueError: There is no tuned optimizer in it.
    """
    state = tuned_state(opt_state)
    course = state.course
    wants = wants_metric(course.tuner) & (course.lag == 0)
    return wants if state.settings.is_on else jnp.zeros_like(wants)


def in_round(opt_state: Any) -> Bool[Array, ""]:
    """Whether the training is in a range test or a fork, whose steps may be undone; a bool scalar. Jit-able.

    A metric of then says nothing of the training: an early stopping of your own should look at the others alone, and so
    should whatever keeps the best model.

    Example:
        >>> import optax
        >>> from autotunenet_jax import autotune
        >>> optimizer = autotune(optax.sgd, {"learning_rate": (1e-3, 1.0)}, total_steps=1000)
        >>> bool(in_round(optimizer.init(jnp.ones(3))))  # the run begins with a range test
        True

    Args:
      opt_state: As for `hyperparams`.

    Raises:
      ValueError: There is no tuned optimizer in it.
    """
    state = tuned_state(opt_state)
    return state.course.tuner.phase != TRAIN if state.settings.is_on else jnp.zeros((), bool)
