"""The tuner inside an optax optimizer: it learns from the losses given and obeys itself, all in the compiled step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from ..compiler import packing
from ..compiler.single_kernel import single_kernel
from ..compiler.stored_program import named, stored_program
from ..controller import AutoTuneNet, Guard, when
from ..controller.schedule import Decay
from ..controller.state import Directive
from ..space import injection
from . import drifting, trees
from .accessors import warn_if_silent
from .copies import HeldSnapshots, Snapshot, snapshots_of
from .loss import interpret, take_loss
from .start import build, starting_values
from .state import MEMORIES, AutotuneState, Course, Memory, Order, Settings, in_force, no_order, write_in_force

# A transformation after this one may shorten updates, as clipping does: a way back then takes several of them. One
# that stops them for good must not stop training with them.
_MAX_ATTEMPTS = 64

# What an inner transformation that watches the loss hears of an update that is not made; no best value.
_HOPELESS = 1e30


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
    decay: Decay | Callable[[Array], Array] = "hold",
    schedule: Callable[[Any], Any] | None = None,
    warmup_steps: int = 0,
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
      schedule: Likewise.
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
      Outside rounds one pass over the gradients, and a copy of the state at about every fiftieth of the budget. In
      rounds a copy and a decision of a few milliseconds for each fork.
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
        schedule=schedule,
        warmup_steps=warmup_steps,
        capacity=capacity,
    )
    if memory == "drift":
        tuner.plan = drifting.plan(tuner.space, tuner.plan)
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
    options = {"core": tuner.core, "memory": memory, "is_max": mode == "max", "is_on": bool(enabled)}
    # The protocols of optax name their arguments; a partial hides them from the type checker.
    init: Any = functools.partial(_init, inner, tuner, options, key, trees.as_seen if is_given else _as_is)
    update: Any = functools.partial(_update, inner, trees.as_seen if is_given else _as_is)
    return optax.GradientTransformationExtraArgs(init, update)


def _as_is(params: Any) -> Any:
    return params


def _init(
    optimizer: Any,
    tuner: AutoTuneNet,
    options: dict[str, Any],
    key: PRNGKeyArray | None,
    seen: Callable[[Any], Any],
    params: Any,
) -> AutotuneState:
    inner = trees.copied(optimizer.init(seen(params)))
    start = starting_values(tuner, inner)
    ts = tuner.init(jax.random.key(0) if key is None else key, start=start)
    slots = {"keep-winner": 2, "rewind": 1, "drift": 0}[options["memory"]] if options["is_on"] else 0
    zero = jnp.zeros((), jnp.int32)
    course = Course(
        tuner=ts,
        start=tuple(start[name] for name in tuner.space.names),
        lag=zero,
        order=no_order(),
        is_spoiled=_off(),
        home=zero,
        attempts=zero,
        drift=drifting.init() if options["memory"] == "drift" else None,
    )
    state = AutotuneState(
        packed=packing.pack(course),
        inner=injection.write(inner, start, injection.resolve(start, inner)),
        snapshots=None,
        settings=Settings(**options, layout=packing.layout(course)),
    )
    state = trees.copied(state)
    if not slots:
        return state
    return state._replace(snapshots=snapshots_of([Snapshot(params, trees.without_values(inner))] * slots))


def _check_update(state: AutotuneState, params: Any, value: Any) -> None:
    if params is None and state.held is not None:
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
    step = functools.partial(_step, optimizer, seen, extra_args)
    if not settings.is_on:
        new, inner = step(params, updates, state.inner, value)
        return new, state._replace(inner=inner, packed=_passed(settings, state.packed))

    opened, closed = _read_loss(state, updates, params, value)
    order, is_back, is_taken = closed.order, closed.is_back, closed.is_taken

    def usual(params: Any, gradients: Any, inner: Any, is_taken: Array) -> tuple[Any, Any]:
        """The optimizer's own update, zero where it is not to be made or a parameter would overflow."""
        heard = None if value is None else jnp.where(is_taken, value, _HOPELESS)
        usable = optax.tree.where(is_taken, gradients, optax.tree.zeros_like(gradients))
        new, stepped = step(params, usable, inner, heard)
        after = new if params is None else trees.moved(params, new)
        return jax.tree.map(lambda u, a: jnp.where(is_taken & jnp.isfinite(a), u, 0), new, after), stepped

    # Whatever is seldom is done before the usual update and apart from it, which so stays one pass over the arrays,
    # the addition to the parameters included. The way back takes the place of the gradients.
    given, snapshots = updates, state.held
    inner = write_in_force(state.inner, opened.values)
    if snapshots is not None:

        def obey(given: Any, inner: Any, snapshots: HeldSnapshots) -> Any:
            inner, snapshots = trees.with_left(opened.left, opened.home, params, inner, snapshots)
            inner = write_in_force(inner, opened.values)

            def stepped(params: Any, given: Any, inner: Any) -> Snapshot:
                new, after = usual(params, given, inner, is_taken)
                return Snapshot(trees.moved(params, new), trees.without_values(after))

            snapshots = snapshots.written((order.save, order.keep), stepped, params, given, inner)
            target = snapshots.read_at(jnp.maximum(closed.home - 1, 0)).params
            return optax.tree.where(is_back, trees.way(params, target, given), given), inner, snapshots

        given, inner, snapshots = when(closed.is_asked, obey, given, inner, snapshots)

    new, inner = usual(params, given, inner, closed.is_usual)
    state = state._replace(snapshots=state.snapshots if snapshots is None else snapshots)
    return optax.tree.where(is_back, given, new), state._replace(packed=closed.packed, inner=inner)


def _step(
    optimizer: Any, seen: Callable[[Any], Any], extra_args: dict[str, Any], params: Any, gradients: Any, inner: Any,
    value: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """The inner optimizer's update and state, in the types that they had."""
    optimise = optax.with_extra_args_support(optimizer).update
    told = extra_args if value is None else {**extra_args, "value": value}
    new, stepped = optimise(gradients, inner, None if params is None else seen(params), **told)
    return jax.tree.map(lambda u, g: u.astype(g.dtype), new, gradients), trees.cast_like(stepped, inner)


def _read_loss(state: AutotuneState, gradients: Any, params: Any, value: Any) -> tuple["_Opened", "_Closed"]:
    """What the update begins with, and what the controller makes of its loss."""
    settings = state.settings
    opened = _open(settings, value is None, state.packed)
    away = _is_away(state, opened, params)
    usable = trees.is_usable(gradients)
    packed, directive = state.packed, None
    if value is not None:
        usable &= jnp.isfinite(value)
        packed, directive = take_loss(settings, packed, value, lag=opened.lag, is_usable=usable, is_away=away)
    return opened, _close(settings, state.packed, packed, directive, opened, usable, away)


class _Opened(NamedTuple):
    """What an update begins with: values in force, what the last one left, and where the parameters are going."""

    values: dict[str, Array]
    left: Order
    home: Array
    attempts: Array
    is_returning: Array
    lag: Array


class _Closed(NamedTuple):
    """What an update ends with, the arrays being trained apart.

    Attributes:
      packed: The course of the run.
      order: The copies to make.
      is_back: Whether the update is a way back instead of the optimizer's.
      is_taken: Whether the gradients can be used.
      is_usual: Whether they are.
      is_asked: Whether any array is copied.
      home: The snapshot on the way to which the parameters are: 1 saved, 2 kept, or 0.
    """

    packed: packing.Packed
    order: Order
    is_back: Array
    is_taken: Array
    is_usual: Array
    is_asked: Array
    home: Array


@single_kernel(static_argnums=(0,))
def _passed(settings: Settings, packed: packing.Packed) -> packing.Packed:
    """The course one step later, of an optimizer that is not tuned."""
    course = packing.unpack(packed, settings.layout)
    return packing.pack(course._replace(lag=course.lag + 1))


def _like_opened(settings: Settings, *_: Any) -> _Opened:
    return named(_Opened, values=dict.fromkeys(settings.core.space.names, "value"), left=named(Order))


@stored_program(like=_like_opened, static_argnums=(0, 1))
@single_kernel(static_argnums=(0, 1))
def _open(settings: Settings, is_silent: bool, packed: packing.Packed) -> _Opened:
    course = packing.unpack(packed, settings.layout)
    # What is left from the last update, or was asked for by `observe` since; its parameters are here now.
    left = course.order
    is_left = left.restore | left.adopt
    home = jnp.where(is_left, _home(left), course.home)
    attempts = jnp.where(is_left, _MAX_ATTEMPTS, course.attempts)
    values = in_force(settings, course._replace(order=no_order(), home=home, attempts=attempts), is_silent=is_silent)
    return _Opened(values, left, home, attempts, (home > 0) & (attempts > 0), course.lag)


def _like_closed(settings: Settings, packed: packing.Packed, *_: Any) -> _Closed:
    return named(_Closed, packed=packed, order=named(Order))


@stored_program(like=_like_closed, static_argnums=(0,))
@single_kernel(static_argnums=(0,))
def _close(
    settings: Settings,
    before: packing.Packed,
    after: packing.Packed,
    directive: Directive | None,
    opened: _Opened,
    usable: Array,
    away: Array,
) -> _Closed:
    past, course = (packing.unpack(packed, settings.layout) for packed in (before, after))
    order, left = no_order(), opened.left
    if directive is not None:
        course, order = interpret(settings, past, course, opened.lag, directive)
    returns = order.restore | order.adopt
    is_back, is_taken = returns | away, usable & ~away
    course = course._replace(
        order=no_order(),
        lag=past.lag + 1 if directive is None else jnp.zeros_like(past.lag),
        is_spoiled=~usable & ~away if directive is None else _off(),
        home=jnp.where(returns, _home(order), jnp.where(away, opened.home, 0)),
        attempts=jnp.where(returns, _MAX_ATTEMPTS, jnp.where(away, opened.attempts - 1, 0)),
    )
    return _Closed(
        packed=packing.pack(course),
        order=order,
        is_back=is_back,
        is_taken=is_taken,
        is_usual=is_taken & ~is_back,
        is_asked=left.save | left.keep | (opened.home > 0) | order.save | order.keep | is_back,
        home=jnp.where(returns, _home(order), opened.home),
    )


def _off() -> Array:
    return jnp.zeros((), bool)


def _home(order: Order) -> Array:
    return jnp.where(order.restore, 1, jnp.where(order.adopt, 2, 0)).astype(jnp.int32)


def _is_away(state: AutotuneState, opened: _Opened, params: Any) -> Array:
    """Whether the run is returning to a snapshot and not there yet."""
    snapshots, left = state.held, opened.left
    if snapshots is None:
        return _off()

    def is_far() -> Array:
        # What `observe` asked to be copied is here, and not in its slot yet.
        is_here = jnp.where(opened.home == 2, left.keep, left.save)
        target = optax.tree.where(is_here, params, snapshots.read_at(jnp.maximum(opened.home - 1, 0)).params)
        return ~trees.has_arrived(params, target)

    return jax.lax.cond(opened.is_returning, is_far, _off)
