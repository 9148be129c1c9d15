"""Reading and writing hyperparameters in optax states, wherever ``optax.inject_hyperparams`` put them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def is_injected(node: Any) -> bool:
    """Whether a node of a tree is the state of ``optax.inject_hyperparams``, of either flavour."""
    fields = getattr(node, "_fields", ())
    return "hyperparams" in fields and "inner_state" in fields


def _unwrapped(leaf: Any) -> Any:
    """The array of a leaf that a module library has put in a box, such as an NNX variable."""
    return leaf.get_value() if hasattr(leaf, "get_value") else leaf


def _rewrapped(leaf: Any, value: Array) -> Any:
    return leaf.replace(value) if hasattr(leaf, "get_value") else value


def map_injected(opt_state: Any, function: Callable[[Any], Any]) -> Any:
    """Applies ``function`` to every injected state in a tree, outer ones first."""

    def visit(node: Any) -> Any:
        if not is_injected(node):
            return node
        node = function(node)
        return node._replace(inner_state=map_injected(node.inner_state, function))

    return jax.tree.map(visit, opt_state, is_leaf=is_injected)


def _available(opt_state: Any) -> list[str]:
    names: list[str] = []

    def collect(node: Any) -> Any:
        names.extend(name for name in node.hyperparams if name not in names)
        return node

    map_injected(opt_state, collect)
    return names


def injected_hyperparams(opt_state: Any) -> dict[str, Array]:
    """The hyperparameters that ``optax.inject_hyperparams`` keeps in an optimizer state.

    Args:
      opt_state: Any tree with injected states in it; of a name that occurs twice the outermost value is given.

    Raises:
      ValueError: There is no injected state.
    """
    found: dict[str, Array] = {}

    def collect(node: Any) -> Any:
        for name, value in node.hyperparams.items():
            found.setdefault(name, _unwrapped(value))
        return node

    map_injected(opt_state, collect)
    if not found:
        raise ValueError(_NOT_INJECTED)
    return found


_NOT_INJECTED = (
    "this optimizer state has no injected hyperparameters. "
    "Build the optimizer with optax.inject_hyperparams, as in optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)."
)


def set_hyperparams(opt_state: Any, hyperparams: Mapping[str, Any]) -> Any:
    """Writes hyperparameters into the states of ``optax.inject_hyperparams`` found in a tree.

    Each written leaf keeps its dtype, so a compiled step is not traced again. Names the optimizer does not have are
    left to others: a mapping may hold a dropout rate beside the learning rate.

    Example:
        >>> import optax
        >>> optimizer = optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adam)(learning_rate=1e-3))
        >>> opt_state = optimizer.init(jnp.zeros(3))
        >>> opt_state = set_hyperparams(opt_state, {"learning_rate": 0.25})
        >>> float(injected_hyperparams(opt_state)["learning_rate"])
        0.25

    Args:
      opt_state: Any tree with injected states in it, at any depth.
      hyperparams: Values by name.

    Returns:
      The tree with new values; the given one is not changed.

    Raises:
      ValueError: There is no injected state, it has none of the names, or a name follows an optax schedule, which would
        overwrite the value at the next update.

    Cost: O(number of hyperparameters), under jit nothing.
    """
    written: set[str] = set()

    def write(node: Any) -> Any:
        values = dict(node.hyperparams)
        for name in values:
            if name not in hyperparams:
                continue
            if name in (getattr(node, "hyperparams_states", None) or {}):
                raise ValueError(
                    f"{name!r} follows an optax schedule, which would overwrite the tuned value at every update. "
                    "Give inject_hyperparams a plain number for it; the tuner has a schedule of its own."
                )
            old = _unwrapped(values[name])
            new = jnp.broadcast_to(jnp.asarray(hyperparams[name]).astype(old.dtype), jnp.shape(old))
            values[name] = _rewrapped(values[name], new)
            written.add(name)
        return node._replace(hyperparams=values)

    out = map_injected(opt_state, write)
    if not written:
        available = _available(opt_state)
        if not available:
            raise ValueError(_NOT_INJECTED)
        raise ValueError(
            f"the optimizer has no hyperparameter named {' or '.join(map(repr, hyperparams))}; "
            f"it has {', '.join(sorted(available))}. Use one of those names in the search space."
        )
    return out
