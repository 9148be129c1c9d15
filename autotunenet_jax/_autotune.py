"""The tuner inside an optax optimizer: it learns from the losses given and obeys itself, all in the compiled step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from . import _drift, _hyperparams
from . import _tuned_trees as _trees
from ._controller import AutoTuneNet, Decay
from ._guard import Guard
from ._tuned_access import warn_if_silent
from ._tuned_start import build, starting_values
from ._tuned_state import (
    MEMORIES,
    AutotuneState,
    Memory,
    Order,
    Settings,
    Snapshot,
    in_force,
    no_order,
    take_loss,
    write_in_force,
)

# A transformation after this one may shorten updates, as clipping does: a way back then takes several of them. One
# that stops them for good must not stop training with them.
_MAX_ATTEMPTS = 64


def autotune(
    optimizer: optax.GradientTransformation | Callable[..., optax.GradientTransformation],
    param_space: Any,
    total_steps: int | None = None,
    *,
    initial: Mapping[str, Any] | None = None,
    mode: Literal["min", "max"] = "min",
    memory: Memory = "keep-winner",
    guard: Guard | None = None,
    key: PRNGKeyArray | None = None,
    max_share: float | None = None,
    decay: Decay = "linear",
    warmup_steps: int = 5,
    capacity: int = 64,
    enabled: bool = True,
    **arguments: Any,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose hyperparameters tune themselves while it trains.

    Use it as any optax optimizer and pass the loss with the gradients: ``update(grads, state, params, value=loss)``.
    Everything happens inside the compiled step. ``autotunenet_jax.hyperparams(state)`` tells the values in force,
    those of hyperparameters outside the optimizer too: read a dropout rate there and use it in the loss.

    Example:
        >>> optimizer = autotune(
        ...     optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, weight_decay=1e-4),
        ...     {"learning_rate": (1e-5, 1e-1)},
        ...     total_steps=1000,
        ... )
        >>> params = jnp.ones(3)
        >>> state = optimizer.init(params)
        >>> updates, state = jax.jit(optimizer.update)(2 * params, state, params, value=jnp.sum(params**2))
        >>> params = optax.apply_updates(params, updates)

    Args:
      optimizer: A transformation with ``optax.inject_hyperparams`` in it, at any depth, or a factory such as
        ``optax.adamw``: of that only what is tuned is injected, in float32.
      param_space: A `SearchSpace`, or a mapping it takes. A name the optimizer has is set there; in an
        ``optax.partition`` give the path, as in ``"encoder/learning_rate"``. Other names are for the training step
        to read.
      total_steps: Updates of the whole run, those of forks included; None for an open-ended one. See `AutoTuneNet`.
      initial: Values to start from; the optimizer's own by default.
      mode: Whether the metric of `observe_eval` is minimised or maximised. The loss is always minimised.
      memory: What is copied, in multiples of parameters and optimizer state together. ``"keep-winner"``: two copies,
        the best fork's state lives on. ``"rewind"``: one; the best fork's hyperparameters are adopted, and unless it
        was the last to run, training goes on from where the round began. ``"drift"``: none; nothing is ever undone,
        hyperparameters move in small steps judged by how fast the loss falls.
      guard: Thresholds of the watch over the loss.
      key: PRNG key of the tuner; ``jax.random.key(0)`` by default.
      max_share: As for `AutoTuneNet`.
      decay: Likewise.
      warmup_steps: Likewise.
      capacity: Likewise.
      enabled: False trains with the starting values, without a schedule, exactly as the plain optimizer would.
      **arguments: Fixed arguments of a factory. Those whose names are taken above go in with ``functools.partial``.

    Returns:
      A transformation whose ``update`` takes the loss as ``value``, a scalar: that of ``params``, before the update.
      Without it the tuner learns nothing; report losses with `observe` then. An update whose loss or gradients are
      not finite is not made. The state is a tree of arrays; donate it, or its snapshots are copied at every step.

    Raises:
      TypeError: An argument of the wrong type.
      ValueError: A bad argument of `AutoTuneNet`. From ``init``: a name that fits several places or none, a value
        outside its range, or one that follows an optax schedule. From ``update``: no ``params``, or no scalar loss.

    Cost:
      Outside rounds one pass over the gradients. About ten times in a run a copy of the state, and a decision of a few
      milliseconds.
    """
    if memory not in MEMORIES:
        raise ValueError(f"memory must be one of {', '.join(MEMORIES)}; got {memory!r}.")
    tuner = AutoTuneNet(
        param_space,
        total_steps,
        initial=initial,
        mode=mode,
        guard=guard,
        max_share=max_share,
        decay=decay,
        warmup_steps=warmup_steps,
        capacity=capacity,
    )
    if memory == "drift":
        tuner.plan = _drift.plan(tuner.space, tuner.plan)
    is_given = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    if is_given:
        if arguments:
            raise TypeError(
                f"{', '.join(map(repr, arguments))} can only be passed on to a factory such as optax.adamw; "
                "the optimizer given is built already."
            )
        inner: Any = optimizer
    else:
        inner = build(optimizer, tuner, arguments)
    settings = Settings(core=tuner.core, memory=memory, is_max=mode == "max", is_on=bool(enabled))
    # The protocols of optax name their arguments; a partial hides them from the type checker.
    init: Any = functools.partial(_init, inner, tuner, settings, key, _trees.as_seen if is_given else _as_is)
    update: Any = functools.partial(_update, inner, _trees.as_seen if is_given else _as_is)
    return optax.GradientTransformationExtraArgs(init, update)


def _as_is(params: Any) -> Any:
    return params


def _init(
    optimizer: Any,
    tuner: AutoTuneNet,
    settings: Settings,
    key: PRNGKeyArray | None,
    seen: Callable[[Any], Any],
    params: Any,
) -> AutotuneState:
    inner = _trees.copied(optimizer.init(seen(params)))
    start = starting_values(tuner, inner)
    ts = tuner.init(jax.random.key(0) if key is None else key, start=start)
    slots = {"keep-winner": 2, "rewind": 1, "drift": 0}[settings.memory] if settings.is_on else 0
    zero = jnp.zeros((), jnp.int32)
    state = AutotuneState(
        tuner=ts,
        inner=_hyperparams.write(inner, start, _hyperparams.resolve(start, inner)),
        saved=Snapshot(params, _trees.without_values(inner)) if slots > 0 else None,
        kept=Snapshot(params, _trees.without_values(inner)) if slots > 1 else None,
        start=tuple(start[name] for name in tuner.space.names),
        lag=zero,
        order=no_order(),
        left=no_order(),
        home=zero,
        attempts=zero,
        drift=_drift.init() if settings.memory == "drift" else None,
        settings=settings,
    )
    return _trees.copied(state)


def _check_update(state: AutotuneState, params: Any, value: Any) -> None:
    if params is None and state.saved is not None:
        raise ValueError(
            "autotune needs the parameters to bring them back: call update(grads, state, params, value=loss). "
            'Only memory="drift" works without.'
        )
    if value is None:
        return
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            f"value must be the loss, a real scalar; got shape {value.shape} of {value.dtype}. "
            "Average it over the batch first."
        )


def _update(
    optimizer: Any,
    seen: Callable[[Any], Any],
    updates: Any,
    state: AutotuneState,
    params: Any = None,
    *,
    value: Any = None,
    **extra_args: Any,
) -> tuple[Any, AutotuneState]:
    _check_update(state, params, value)
    if value is None:
        warn_if_silent(state)
    settings = state.settings
    told = extra_args if value is None else {**extra_args, "value": value}

    def step(inner: Any) -> tuple[Any, Any]:
        optimise = optax.with_extra_args_support(optimizer).update
        new, inner = optimise(updates, inner, None if params is None else seen(params), **told)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), inner

    if not settings.is_on:
        new, inner = step(state.inner)
        return new, state._replace(inner=_trees.cast_like(inner, state.inner), lag=state.lag + 1)

    # What `observe` asked for since the last update; its parameters are here now.
    state = _carry_out_order(state, params)
    away = _is_away(state, params)

    usable = _trees.is_usable(updates)
    if value is not None:
        usable &= jnp.isfinite(value)
    values = in_force(state, is_silent=value is None)
    inner = write_in_force(state.inner, values)

    def take(inner: Any) -> tuple[Any, Any]:
        new, stepped = step(inner)
        return _kept_finite(new, params), _trees.cast_like(stepped, inner)

    def leave(inner: Any) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, updates), inner

    # A branch and not a selection: moments that pass through a selection are made twice, or copied at every step.
    new, inner = jax.lax.cond(usable & ~away, take, leave, inner)

    if value is None:
        ts, drift, order, lag = state.tuner, state.drift, no_order(), state.lag + 1
    else:
        loss = jnp.where(usable, jnp.asarray(value, jnp.float32), jnp.nan)

        def hear(ts: Any, drift: Any) -> Any:
            return take_loss(settings, ts, drift, loss, lag=state.lag)

        def pass_by(ts: Any, drift: Any) -> Any:
            # On the way back nothing is learned; the budget is spent all the same.
            return ts._replace(step=ts.step + 1, data_step=ts.data_step + 1), drift, no_order()

        if state.saved is None:
            ts, drift, order = hear(state.tuner, state.drift)
        else:
            ts, drift, order = jax.lax.cond(away, pass_by, hear, state.tuner, state.drift)
        lag = jnp.zeros_like(state.lag)
    state = state._replace(tuner=ts, drift=drift, inner=inner, lag=lag)
    return _finish(state, order, params, new, away=away)


def _kept_finite(updates: Any, params: Any) -> Any:
    """Updates that leave every parameter finite: zero where one would overflow."""

    def keep(u: Array, after: Array) -> Array:
        return jnp.where(jnp.isfinite(after), u, jnp.zeros_like(u))

    return jax.tree.map(keep, updates, updates if params is None else _trees.moved(params, updates))


def _carry_out_order(state: AutotuneState, params: Any) -> AutotuneState:
    """Makes the copies left to this update: of everything for `observe`, of the inner state for the last update."""
    if state.saved is None:
        return state
    order = state.order
    left = Order(*(a | b for a, b in zip(order, state.left, strict=True)))

    def obey(inner: Any, saved: Snapshot, kept: Snapshot | None) -> Any:
        both = (saved, kept)
        past = [slot and slot.inner for slot in both]
        current, *past = _trees.carry_out(left, _trees.without_values(inner), *past)
        seen = [slot and slot.params for slot in both]
        _, *seen = _trees.carry_out(order._replace(restore=_off(), adopt=_off()), params, *seen)
        slots = [slot and Snapshot(*new) for slot, *new in zip(both, seen, past, strict=True)]
        return _trees.with_values(current, inner), *slots

    is_asked = left.save | left.keep | left.restore | left.adopt
    inner, saved, kept = jax.lax.cond(is_asked, obey, lambda *same: same, state.inner, state.saved, state.kept)
    returns = order.restore | order.adopt
    return state._replace(
        inner=inner,
        saved=saved,
        kept=kept,
        order=no_order(),
        home=jnp.where(returns, _home(order), state.home),
        attempts=jnp.where(returns, _MAX_ATTEMPTS, state.attempts),
    )


def _off() -> Array:
    return jnp.zeros((), bool)


def _home(order: Order) -> Array:
    return jnp.where(order.restore, 1, jnp.where(order.adopt, 2, 0)).astype(jnp.int32)


def _target(state: AutotuneState) -> Any:
    """Parameters of the snapshot that the run is returning to."""
    if state.saved is None or state.kept is None:
        return None if state.saved is None else state.saved.params
    return jax.tree.map(lambda a, b: jnp.where(state.home == 2, b, a), state.saved.params, state.kept.params)


def _is_away(state: AutotuneState, params: Any) -> Array:
    """Whether the run is returning to a snapshot and not there yet."""
    if state.saved is None:
        return jnp.zeros((), bool)
    returning = (state.home > 0) & (state.attempts > 0)
    return jax.lax.cond(returning, lambda: ~_trees.has_arrived(params, _target(state)), lambda: jnp.zeros((), bool))


def _finish(state: AutotuneState, order: Order, params: Any, updates: Any, *, away: Array) -> tuple[Any, AutotuneState]:
    """Carries the tuner's order out on the parameters as the update leaves them."""
    if state.saved is None:
        return updates, state

    kept_params = state.kept and state.kept.params

    def obey(updates: Any, saved: Any, kept: Any) -> Any:
        # Having come back with a rounding error, a run steps on from where it should be.
        base = jax.tree.map(lambda p, t: jnp.where(state.home > 0, t, p), params, _target(state))
        current, saved, kept = _trees.carry_out(order, _trees.moved(base, updates), saved, kept)
        return _trees.way(params, current, updates), saved, kept

    # The inner state stays out of this: passing through, it could not be updated in place. The next update copies it.
    is_asked = order.save | order.keep | order.restore | order.adopt | (state.home > 0)
    updates, saved, kept = jax.lax.cond(is_asked, obey, lambda *same: same, updates, state.saved.params, kept_params)
    returns = order.restore | order.adopt
    return updates, state._replace(
        saved=state.saved._replace(params=saved),
        kept=state.kept and state.kept._replace(params=kept),
        left=order,
        home=jnp.where(returns, _home(order), jnp.where(away, state.home, 0)),
        attempts=jnp.where(returns, _MAX_ATTEMPTS, jnp.where(away, state.attempts - 1, 0)),
    )
