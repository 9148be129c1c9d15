"""The tuner inside an optax optimizer: it learns from the losses given and obeys itself, all in the compiled step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from ..compiler import packing
from ..compiler.placement import beside
from ..controller import AutoTuneNet, Guard
from ..controller.schedule import Decay
from ..controller.state import TunerState
from ..space import injection
from . import aux_state, flax_serialization, inner_state, memory_drift, ring, trees
from .budget import digests_of, planned
from .held_snapshots import Snapshot, snapshots_of
from .inner_optimizer import build, starting_values
from .state import MEMORIES, AutotuneState, Course, Memory, Settings, no_order
from .update import made, update


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
    aux: Any = None,
    axis_name: Any = None,
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
      aux: Where state of the training step's own begins that is to go back with the parameters, such as batch
        statistics: a tree of arrays, of the structure that ``update(..., aux=...)`` is given and `rewound` returns.
        Without it the first ``update`` makes room for what it is given, and its state has more arrays than the one
        before: under ``jax.lax.scan`` and in an ``nnx.Optimizer``, where a state keeps its structure, say it here.
      axis_name: Name of the mapped axis, or a tuple of names, over which replicas train as one. ``update`` then takes
        the mean of their losses, so that all decide alike; gradients are to be reduced. Without it ``jax.pmap`` and
        ``jax.shard_map`` need a loss that is reduced, too, and so do `observe` and `observe_eval` always.
      **arguments: Fixed arguments of a factory. Those whose names are taken above go in with ``functools.partial``.

    Returns:
      A transformation whose ``update`` takes the loss as ``value``, a scalar: that of ``params``, before the update.
      Without it the tuner learns nothing; report losses with `observe` then. An update whose loss or gradients are
      not finite is not made, and neither is one whose gradients are a thousand times as large as any before: parameters
      and optimizer stay as they are. The state is a tree of arrays; donate it, or its snapshots are copied at every
      step.

    Raises:
      TypeError: An argument of the wrong type.
      ValueError: A bad argument of `AutoTuneNet`. From ``init``: a name that fits several places or none, a value
        outside its range, or one that follows an optax schedule. From ``update``: no ``params``, or no scalar loss.

    Cost:
      Outside rounds one pass over the gradients, and a copy of the state every fiftieth of the budget (at least 20
      steps, at most 500). In rounds a copy and a decision of a few milliseconds for each fork. An update outside of a
      compiled step is compiled by itself, with all copies made at each: compile the step, and donate its state.
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
    tuner = planned(tuner, memory)
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
    digests = digests_of(tuner)
    options |= {"max_share": max_share, "digests": digests, "made_by": digests}
    # The protocols of optax name their arguments; a partial hides them from the type checker.
    seen = trees.as_seen if is_given else _as_is
    init: Any = functools.partial(_init, inner, tuner, options, key, seen, trees.copied(aux_state.leaves_of(aux)))
    make = functools.partial(made, inner, seen, axis_name)
    bound: Any = functools.partial(update, make, jax.jit(make), axis_name, digests)
    return optax.GradientTransformationExtraArgs(init, bound)


def _as_is(params: Any) -> Any:
    return params


@jax.jit
def _begun(ts: TunerState) -> Array:
    """The record of a run that has not begun."""
    dims = ts.incumbent.shape[-1]
    words = ring.words_of(ring.entry(ts, cause=ring.START, phase=ts.phase))
    return ring.add_entry(ring.empty(dims), words, dims, flag=jnp.ones((), bool))


def _init(
    optimizer: Any,
    tuner: AutoTuneNet,
    options: dict[str, Any],
    key: PRNGKeyArray | None,
    seen: Callable[[Any], Any],
    aux: tuple[Any, ...],
    params: Any,
) -> AutotuneState:
    flax_serialization.register()
    inner = trees.copied(inner_state.with_real_values(optimizer.init(seen(params))))
    start = starting_values(tuner, inner)
    ts = tuner.init(jax.random.key(0) if key is None else key, start=start)
    zero = jnp.zeros((), jnp.int32)
    course = Course(
        tuner=ts,
        start=tuple(start[name] for name in tuner.space.names),
        lag=zero,
        order=no_order(),
        is_spoiled=jnp.zeros((), bool),
        home=zero,
        attempts=zero,
        is_reverted=jnp.zeros((), bool),
        largest=jnp.zeros((), jnp.float32),
        accidents=zero,
        drift=memory_drift.init() if options["memory"] == "drift" else None,
    )
    state = AutotuneState(
        packed=packing.pack(course),
        inner=injection.write(inner, start, injection.resolve(start, inner)),
        snapshots=None,
        aux=aux if options["is_on"] else (),
        record=_begun(ts) if options["is_on"] else None,
        settings=Settings(**options, layout=packing.layout(course)),
    )
    state = beside(trees.copied(state), params)
    if not state.settings.slots:
        return state
    one = Snapshot(params, inner_state.without_values(state.inner), aux)
    return state._replace(snapshots=beside(snapshots_of([one] * state.settings.slots), params))
