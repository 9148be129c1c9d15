"""Whether `train_step` and `eval_step` take and return what `fit` needs, told before training starts."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from ..arguments import check_takes
from ..space.injection import places

# Names that a record has for something else.
_TAKEN = ("step", "data_step", "loss", "phase", "round", "fork", "is_kept")
# What code that needs numbers raises where it is compiled.
_HOST_CODE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_COMPILED = "{owner} is compiled: what it computes must come from jax.numpy, not from NumPy, float() or scikit-learn."


def parts_of(output: Any, *, has_aux: bool) -> tuple[Any, Any, Mapping[str, Any]]:
    """State, loss and metrics of what a train step returned.

    Args:
      output: ``(state, loss)``; with ``has_aux`` either ``(state, loss, metrics)`` or ``(state, (loss, metrics))``.
      has_aux: Whether it holds metrics.
    """
    if not has_aux:
        state, loss = output
        return state, loss, {}
    if len(output) == 3:
        return output
    state, (loss, metrics) = output
    return state, loss, metrics


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


def _describe_any(value: Any) -> str:
    return _describe(value) if isinstance(value, jax.ShapeDtypeStruct) else type(value).__name__


def _check_is_pair(out: Any, *, has_aux: bool) -> None:
    """Whether the step returned a state and a loss, and metrics where they are asked for."""
    lengths = (2, 3) if has_aux else (2,)
    if isinstance(out, tuple) and len(out) in lengths and (len(out) == 3 or not has_aux or _is_pair(out[1])):
        return
    what = (
        "(state, loss, metrics) or (state, (loss, metrics)), since has_aux=True" if has_aux else "a pair (state, loss)"
    )
    hint = " Metrics beside the loss need fit(..., has_aux=True)." if not has_aux and _has_metrics(out) else ""
    raise TypeError(
        f"train_step must return {what}; it returned {type(out).__name__}"
        f"{f' of length {len(out)}' if isinstance(out, tuple | list) else ''}.{hint}"
    )


def _is_pair(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, tuple | list) and len(value) == 2


def _has_metrics(out: Any) -> bool:
    return isinstance(out, tuple) and len(out) == 3 and isinstance(out[2], Mapping)


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, jax.ShapeDtypeStruct) or loss.shape != ():
        is_pair = _is_pair(loss) and isinstance(loss[1], Mapping)
        hint = "Give fit has_aux=True." if is_pair else "Average it over the batch, and return nothing else beside it."
        raise ValueError(f"train_step must return a scalar loss; it returned {_describe_any(loss)}. {hint}")
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"train_step must return a real loss; it returned dtype {loss.dtype}.")


def _check_metrics(metrics: Any, names: Collection[str], *, owner: str) -> None:
    """Whether metrics are real scalars by name, of names that nothing else has."""
    if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
        raise TypeError(f"{owner} must return its metrics as a dict by name; it returned {_describe_any(metrics)}.")
    for name, value in metrics.items():
        if name in names:
            raise ValueError(f"{owner} returns a metric {name!r}, a name that is taken. Give it another.")
        is_real = isinstance(value, jax.ShapeDtypeStruct) and value.shape == () and not _is_odd(value.dtype)
        if not is_real:
            raise ValueError(
                f"{owner} must return real scalars as metrics; {name!r} is {_describe_any(value)}. "
                "Average it, or leave it out."
            )


def _is_odd(dtype: Any) -> bool:
    return not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_))


def _check_holds_arrays(tree: Any, name: str, remedy: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.typing.ArrayLike) and not hasattr(leaf, "__jax_array__"):
            kind = f"{type(leaf).__module__.partition('.')[0]}.{type(leaf).__name__}"
            raise TypeError(
                f"a {name} must hold arrays of NumPy or JAX; {name}{jax.tree_util.keystr(path)} is a {kind}. {remedy}"
            )


def check_state(state: Any) -> None:
    """Whether a state can be trained, copied and put back.

    Raises:
      TypeError: It holds anything but arrays.
    """
    _check_holds_arrays(
        state,
        "state",
        "Keep functions and settings outside it: of an Equinox model it takes equinox.filter(model, equinox.is_array), "
        "and train_step puts the rest back with equinox.combine.",
    )


def check_train_step(
    train_step: Callable[..., Any],
    state: Any,
    batch: Any,
    hyperparams: dict[str, Any],
    *,
    used_elsewhere: set[str],
    has_aux: bool,
) -> None:
    """Traces the step once, abstractly, and checks what comes out.

    Raises:
      KeyError: It reads what is not there; the message says which hyperparameters are.
      TypeError: It does not take these three, or returns no ``(state, loss)``, in this order, or with ``has_aux`` no
        dict of metrics beside them, or the batch holds anything but arrays.
      ValueError: The loss or a metric is not a real scalar, the state changes structure, shape or dtype, or a tuned
        hyperparameter is never used.
    """
    check_takes(train_step, "train_step is called with the state, a batch and hp", "train_step(state, batch, hp)")
    _check_holds_arrays(batch, "batch", "Convert it where batches are made; a torch DataLoader does so in collate_fn.")
    output: list[Any] = []

    def traced(state: Any, batch: Any, hyperparams: Any) -> Any:
        out = train_step(state, batch, hyperparams)
        output.append(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), out))
        return out

    try:
        jaxpr = jax.make_jaxpr(traced)(state, batch, hyperparams).jaxpr
    except KeyError as error:
        named = ", ".join(map(repr, sorted(hyperparams)))
        error.add_note(f"train_step is called as train_step(state, batch, hp); hp holds what is tuned: {named}.")
        raise
    except _HOST_CODE as error:
        error.add_note(_COMPILED.format(owner="train_step"))
        raise
    out = output[-1]
    _check_is_pair(out, has_aux=has_aux)
    new_state, loss, metrics = parts_of(out, has_aux=has_aux)
    if jax.tree.structure(loss) == jax.tree.structure(state) != jax.tree.structure(new_state):
        raise TypeError("train_step must return (state, loss), in this order; it returned the state last.")
    _check_loss(loss)
    _check_metrics(metrics, {*_TAKEN, *hyperparams}, owner="train_step")
    _check_same_structure(state, new_state)

    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    inputs = jaxpr.invars[len(jaxpr.invars) - len(hyperparams) :]
    unused = [
        name
        for name, var in zip(sorted(hyperparams), inputs, strict=True)
        if id(var) not in used and name not in used_elsewhere
    ]
    if unused:
        is_whole = any(jnp.issubdtype(jnp.result_type(hyperparams[name]), jnp.integer) for name in unused)
        hint = " Of a choice, hp holds the position of the option and not the option itself." if is_whole else ""
        raise ValueError(
            f"train_step never uses {', '.join(map(repr, unused))} of the search space, so tuning it would change "
            f"nothing. {_known_names(state)}or read it from hp in train_step (or in batches).{hint}"
        )


def _known_names(state: Any) -> str:
    names = sorted({place.name for place in places(state)})
    return f"Use a name that the optimizer has ({', '.join(names)}), " if names else "Pass it to set_hyperparams, "


def _monitored(names: list[str], monitor: str | None, *, mode: str) -> str:
    """Which entry of a dict of validation metrics the tuner goes by.

    Raises:
      ValueError: The one named is not among them, or none was and it does not go without saying.
    """
    if monitor is not None:
        if monitor not in names:
            raise ValueError(f"monitor={monitor!r} is none of the metrics of eval_step; there are {', '.join(names)}.")
        return monitor
    if len(names) == 1:
        return names[0]
    if mode == "min" and "loss" in names:
        return "loss"
    raise ValueError(
        f"eval_step returns several metrics, {', '.join(names)}; say by which one to tune, as in "
        f"monitor={(names or ['loss'])[0]!r}."
    )


def check_eval_step(eval_step: Callable[..., Any], state: Any, *, monitor: str | None, mode: str) -> str | None:
    """Traces the validation once, abstractly.

    Returns:
      The entry of its dict that is the metric; None where it returns a scalar.

    Raises:
      TypeError: It does not take the state alone, or returns a dict with names that are no text.
      ValueError: It returns neither a real scalar nor a dict of them, or ``monitor`` is not in that.
    """
    check_takes(eval_step, "eval_step is called with the state alone", "eval_step(state)")
    try:
        metric = jax.eval_shape(eval_step, state)
    except _HOST_CODE as error:
        error.add_note(_COMPILED.format(owner="eval_step"))
        raise
    if isinstance(metric, Mapping):
        _check_metrics(metric, (), owner="eval_step")
        name = _monitored(sorted(metric), monitor, mode=mode)
        if not jnp.issubdtype(metric[name].dtype, jnp.floating):
            raise ValueError(f"the metric {name!r} of eval_step must be a real number; it is {metric[name].dtype}.")
        return name
    if monitor is not None:
        raise ValueError(f"monitor={monitor!r} names an entry of a dict, and eval_step returns no dict. Leave it out.")
    is_array = isinstance(metric, jax.ShapeDtypeStruct)
    if is_array and metric.shape == () and jnp.issubdtype(metric.dtype, jnp.integer):
        raise ValueError(f"eval_step must return a real number; it returned dtype {metric.dtype}. Cast it to float32.")
    if not is_array or metric.shape != () or not jnp.issubdtype(metric.dtype, jnp.floating):
        raise ValueError(
            "eval_step must return one real scalar, the validation metric, or a dict of them; it returned "
            f"{_describe_any(metric)}. Average it over the validation data."
        )
    return None


def reads_its_state(eval_step: Callable[..., Any], state: Any) -> bool:
    """Whether the validation goes by what it is given, as far as it shows from outside compiled functions in it."""
    jaxpr = jax.make_jaxpr(eval_step)(state).jaxpr
    read = {id(v) for equation in jaxpr.eqns for v in equation.invars} | {id(v) for v in jaxpr.outvars}
    return any(id(v) in read for v in jaxpr.invars)
