"""Whether `train_step` and `eval_step` take and return what `fit` needs, told before training starts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..space.injection import places


def _describe(leaf: Any) -> str:
    return f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"


def _check_same_structure(before: Any, after: Any) -> None:
    old, new = jax.tree.structure(before), jax.tree.structure(after)
    if old != new:
        raise ValueError(
            f"train_step must return a state of the structure it was given; it was given {old} and returned {new}. "
            "Return every part of the state, in the same containers."
        )
    leaves = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, a), b in leaves:
        if jnp.shape(a) != jnp.shape(b) or jnp.result_type(a) != jnp.result_type(b):
            raise ValueError(
                "train_step must keep the shape and dtype of every array of the state; "
                f"state{jax.tree_util.keystr(path)} went in as {_describe(a)} and came out as {_describe(b)}. "
                "Cast it back at the end of the step."
            )


def check_train_step(
    train_step: Callable[..., Any], state: Any, batch: Any, hyperparams: dict[str, Any], used_elsewhere: set[str]
) -> None:
    """Traces the step once, abstractly, and checks what comes out.

    Raises:
      TypeError: It does not return ``(state, loss)``.
      ValueError: The loss is not a real scalar, the state changes structure, shape or dtype, or a tuned hyperparameter
        is never used.
    """
    output: list[Any] = []

    def traced(state: Any, batch: Any, hyperparams: Any) -> Any:
        out = train_step(state, batch, hyperparams)
        output.append(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), out))
        return out

    jaxpr = jax.make_jaxpr(traced)(state, batch, hyperparams).jaxpr
    out = output[-1]
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            f"train_step must return a pair (state, loss); it returned {type(out).__name__}"
            f"{f' of length {len(out)}' if isinstance(out, tuple | list) else ''}."
        )
    new_state, loss = out
    if not isinstance(loss, jax.ShapeDtypeStruct) or loss.shape != ():
        shown = _describe(loss) if isinstance(loss, jax.ShapeDtypeStruct) else type(loss).__name__
        raise ValueError(
            f"train_step must return a scalar loss; it returned {shown}. "
            "Average it over the batch, and return nothing else beside it."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"train_step must return a real loss; it returned dtype {loss.dtype}.")
    _check_same_structure(state, new_state)

    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    inputs = jaxpr.invars[len(jaxpr.invars) - len(hyperparams) :]
    unused = [
        name
        for name, var in zip(sorted(hyperparams), inputs, strict=True)
        if id(var) not in used and name not in used_elsewhere
    ]
    if unused:
        raise ValueError(
            f"train_step never uses {', '.join(map(repr, unused))} of the search space, so tuning it would change "
            f"nothing. {_known_names(state)}or read it from hp in train_step (or in batches)."
        )


def _known_names(state: Any) -> str:
    names = sorted({place.name for place in places(state)})
    return f"Use a name that the optimizer has ({', '.join(names)}), " if names else "Pass it to set_hyperparams, "


def check_eval_step(eval_step: Callable[..., Any], state: Any) -> None:
    """Traces the validation once, abstractly.

    Raises:
      ValueError: It does not return a real scalar.
    """
    metric = jax.eval_shape(eval_step, state)
    is_array = isinstance(metric, jax.ShapeDtypeStruct)
    if not is_array or metric.shape != () or not jnp.issubdtype(metric.dtype, jnp.floating):
        shown = f"{metric.dtype}{list(metric.shape)}" if is_array else type(metric).__name__
        raise ValueError(
            f"eval_step must return one real scalar, the validation metric; it returned {shown}. "
            "Average it over the validation data, and return nothing else beside it."
        )
