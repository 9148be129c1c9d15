"""The optimizer inside `autotune`: made by a factory where one is given, and the values that it starts with."""

import difflib
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array

from ..controller import AutoTuneNet, as_argument
from ..space import injection
from ..space.search_space import SearchSpace
from ..user_warning import warn

# Names that are arguments of optimizers, whatever else a training step may read.
_OF_OPTIMIZERS = frozenset(
    {"momentum", "weight_decay", "b1", "b2", "b3", "beta1", "beta2", "eps", "eps_root", "decay", "decay_rate"}
)


def build(factory: Any, tuner: AutoTuneNet, arguments: dict[str, Any]) -> optax.GradientTransformation:
    """The optimizer of a factory, with the tuned arguments injected and no others."""
    if not callable(factory):
        raise TypeError(
            f"autotune takes an optax transformation or a factory such as optax.adamw; got {type(factory).__name__}."
        )
    signature = inspect.signature(factory)
    tuned = [name for name in tuner.space.names if name in signature.parameters]
    if not tuned:
        raise ValueError(
            f"{getattr(factory, '__name__', 'the factory')} has no argument named "
            f"{' or '.join(map(repr, tuner.space.names))}; it has {', '.join(signature.parameters)}. "
            "Use one of those names in the search space."
        )
    arguments = dict(arguments)
    for name in tuned:
        default = signature.parameters[name].default
        has_default = isinstance(default, int | float) and not isinstance(default, bool)
        if name in tuner.initial or (name not in arguments and not has_default):
            arguments[name] = tuner.space.to_python({name: tuner.start()[name]})[name]
        elif name not in arguments:
            arguments[name] = default
        if isinstance(arguments[name], str | bool) or callable(arguments[name]):
            kind = type(arguments[name]).__name__
            why = "The tuner has a schedule of its own." if callable(arguments[name]) else f"A {kind} cannot be tuned."
            raise ValueError(f"{name!r} is tuned, so it must start as a number; got {arguments[name]!r}. {why}")
    bound = signature.bind(**arguments)
    bound.apply_defaults()
    static = [name for name in bound.arguments if name not in tuned]
    make: Any = factory
    return optax.inject_hyperparams(make, static_args=static, hyperparam_dtype=jnp.float32)(**arguments)


def starting_values(tuner: AutoTuneNet, inner: Any) -> dict[str, Array]:
    """Where the run starts: what the user said, else what the optimizer has, else the tuner's choice."""
    space = tuner.space
    if any(injection.is_tuned(node) for node in jax.tree.leaves(inner, is_leaf=injection.is_tuned)):
        raise ValueError(
            "there is an autotune inside this autotune: each would discard what the other compares. Use one of them, "
            "with every tuned hyperparameter in its search space."
        )
    where = injection.resolve(space.names, inner)
    available = sorted(injection.labels(injection.places(inner)))
    if not where:
        raise ValueError(
            f"the optimizer has no hyperparameter named {' or '.join(map(repr, space.names))}; "
            f"it has {', '.join(available)}. Use one of those names in the search space."
        )
    for name in space.names:
        close = difflib.get_close_matches(name, [other for other in available if other not in space], n=1, cutoff=0.85)
        if name not in where and close:
            raise ValueError(f"the optimizer has no hyperparameter {name!r}; did you mean {close[0]!r}?")
    missing = [name for name in space.names if name not in where and name.rsplit("/", 1)[-1] in _OF_OPTIMIZERS]
    if missing:
        warn(
            f"the optimizer has no hyperparameter {' or '.join(map(repr, missing))}; it has {', '.join(available)}. It "
            "is tuned to no effect unless the training step reads it from autotunenet_jax.hyperparams(opt_state). One "
            "that the optimizer could have is injected where it is given a number, as in "
            "optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)."
        )
    found = {name: value for name, value in injection.read(inner, where).items() if name not in tuner.initial}
    start = {name: as_argument(space[name], value) for name, value in tuner.start().items()}
    values, allowed = _in_dtype(space, {**start, **found})
    # Under jit a value is not known yet; it is moved into its range there.
    for name, value in found.items():
        if not isinstance(value, Tracer):
            _check_start(tuner, name, value, allowed[name])
    return {**allowed, **{name: values[name] for name in found}}


@functools.partial(jax.jit, static_argnums=0)
def _in_dtype(space: SearchSpace, values: dict[str, Any]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Values in the types that the space decodes to, and the nearest allowed ones."""
    allowed = space.clip(values)
    return {name: jnp.asarray(value).astype(allowed[name].dtype) for name, value in values.items()}, allowed


def _check_start(tuner: AutoTuneNet, name: str, value: Array, allowed: Array) -> None:
    nearest = np.asarray(allowed, np.float64)
    if not np.allclose(nearest, np.asarray(value, np.float64), rtol=1e-6, atol=0.0):
        raise ValueError(
            f"the optimizer starts with {name} = {float(value):g}, outside the declared {tuner.space[name]!r}. "
            f"Widen the range, or start inside it with initial={{{name!r}: ...}}."
        )
