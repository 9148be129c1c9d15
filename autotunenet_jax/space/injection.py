"""Reading and writing hyperparameters in optax states, wherever ``optax.inject_hyperparams`` put them.

A hyperparameter is addressed by its name, or by a path ending in it: ``"encoder/learning_rate"`` is the learning rate
of the transformation labelled ``"encoder"`` in ``optax.partition``. A path may leave steps out; it must fit one place.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array


def _fields(node: Any) -> tuple[str, ...]:
    return getattr(node, "_fields", ())


def is_injected(node: Any) -> bool:
    """Whether a node of a tree is the state of ``optax.inject_hyperparams``, of either flavour."""
    return "hyperparams" in _fields(node) and "inner_state" in _fields(node)


def is_tuned(node: Any) -> bool:
    """Whether a node of a tree is the state of `autotune`."""
    return "packed" in _fields(node) and "settings" in _fields(node)


def is_accumulating(node: Any) -> bool:
    """Whether a node of a tree is the state of ``optax.MultiSteps``."""
    return "mini_step" in _fields(node) and "acc_grads" in _fields(node)


def is_box(leaf: Any) -> bool:
    """Whether a leaf is an array that a module library has put in a box, such as an NNX variable."""
    return hasattr(leaf, "get_value")


def unboxed(leaf: Any) -> Any:
    """The array of a leaf, out of its box."""
    return leaf.get_value() if is_box(leaf) else leaf


def reboxed(leaf: Any, value: Any) -> Any:
    """``value`` in a box like that of ``leaf``."""
    return leaf.replace(value) if is_box(leaf) else value


def _is_stop(node: Any) -> bool:
    return is_injected(node) or is_tuned(node)


class Place(NamedTuple):
    """Where a hyperparameter is kept: which injected state of the tree, and by what name there.

    An injected state inside another reads its own values alone. Where both have a hyperparameter of the same name, it
    is one hyperparameter, kept in both.

    Attributes:
      node: Number of the injected state, outer ones first.
      name: Its name there.
      path: Dictionary keys and positions that lead there.
      within: Numbers of the injected states around that one.
      is_scheduled: Whether an optax schedule overwrites it.
      is_held: Whether it may change only between accumulated batches: an integer beside ``optax.MultiSteps``.
      inner: Where else it is kept, in the states inside that one, outer ones first.
    """

    node: int
    name: str
    path: tuple[str, ...]
    within: tuple[int, ...]
    is_scheduled: bool
    is_held: bool
    inner: tuple["Place", ...] = ()

    @property
    def everywhere(self) -> tuple["Place", ...]:
        """This place and those inside it; the last one is in force."""
        return (self, *self.inner)


def map_injected(opt_state: Any, function: Callable[[int, Any], Any]) -> Any:
    """Applies ``function(number, state)`` to every injected state in a tree, outer ones first."""
    count = 0

    def inside(tree: Any) -> Any:
        return jax.tree.map(visit, tree, is_leaf=_is_stop)

    def visit(node: Any) -> Any:
        nonlocal count
        if is_tuned(node):  # its snapshots hold injected states too, which are not in force
            return node._replace(inner=inside(node.inner))
        if not is_injected(node):
            return node
        node = function(count, node)
        count += 1
        return node._replace(inner_state=inside(node.inner_state))

    return inside(opt_state)


def injected(opt_state: Any) -> list[Any]:
    """The injected states of a tree, outer ones first."""
    found: list[Any] = []

    def collect(number: int, node: Any) -> Any:
        found.append(node)
        return node

    map_injected(opt_state, collect)
    return found


def _segments(path: Iterable[Any]) -> tuple[str, ...]:
    """Dictionary keys and positions along a path; the field names of optax's own states say nothing to a user."""
    segments: list[str] = []
    for key in path:
        if isinstance(key, jax.tree_util.DictKey):
            segments.extend(str(key.key).split("/"))
        elif isinstance(key, jax.tree_util.SequenceKey):
            segments.append(str(key.idx))
    return tuple(segments)


def _accumulation(node: Any) -> Any:
    """The ``optax.MultiSteps`` state inside an injected one, or None."""
    for leaf in jax.tree.leaves(node.inner_state, is_leaf=is_accumulating):
        if is_accumulating(leaf):
            return leaf
    return None


def places(opt_state: Any) -> list[Place]:
    """Every hyperparameter of every injected state in a tree, outer states first."""
    found: list[Place] = []
    count = 0

    def visit(tree: Any, prefix: tuple[str, ...], within: tuple[int, ...]) -> None:
        nonlocal count
        for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_stop)[0]:
            here = prefix + _segments(path)
            if is_tuned(node):
                visit(node.inner, here, within)
            if not is_injected(node):
                continue
            number = count
            count += 1
            scheduled = getattr(node, "hyperparams_states", None) or {}
            accumulates = _accumulation(node) is not None
            for name, value in node.hyperparams.items():
                is_whole = jnp.issubdtype(jnp.asarray(unboxed(value)).dtype, jnp.integer)
                found.append(Place(number, name, here, within, name in scheduled, accumulates and is_whole))
            visit(node.inner_state, here, (*within, number))

    visit(opt_state, (), ())
    return found


def labels(found: list[Place]) -> dict[str, Place]:
    """Places by the shortest name that is theirs alone."""
    out: dict[str, Place] = {}
    for place in found:
        words = tuple(step for step in place.path if not step.isdecimal())
        for steps in ((), words, place.path):
            label = "/".join((*steps, place.name))
            fitting = match(label, found)
            if len(fitting) == 1:
                out[label] = fitting[0]
                break
        else:
            out.setdefault("/".join((*place.path, place.name)), place)
    return out


def match(name: str, found: list[Place]) -> list[Place]:
    """The places that a name or path fits; those inside another are part of the outer one."""
    *steps, leaf = name.split("/")

    def fits(place: Place) -> bool:
        rest = iter(place.path)
        return place.name == leaf and all(step in rest for step in steps)

    fitting = [place for place in found if fits(place)]
    numbers = {place.node for place in fitting}
    return [
        place._replace(inner=tuple(other for other in fitting if place.node in other.within))
        for place in fitting
        if not numbers.intersection(place.within)
    ]


def resolve(names: Iterable[str], opt_state: Any) -> dict[str, Place]:
    """Finds the place of each name; names that fit nowhere are left out.

    Raises:
      ValueError: There is no injected state, a name fits several places, two names fit one place, a path fits none, or
        the value follows an optax schedule.
    """
    found = places(opt_state)
    if not found:
        raise ValueError(_NOT_INJECTED)
    out: dict[str, Place] = {}
    for name in names:
        fitting = match(name, found)
        if len(fitting) > 1:
            candidates = [label for label, place in labels(found).items() if place in fitting]
            if len(candidates) < len(fitting):
                raise ValueError(
                    f"{name!r} is ambiguous: the optimizer has it {len(fitting)} times, in parts that have no names to "
                    "tell them apart. Make all but one of them with plain numbers, without inject_hyperparams."
                )
            raise ValueError(
                f"{name!r} is ambiguous: the optimizer has {' and '.join(map(repr, candidates))}. Name one of them."
            )
        if not fitting:
            if "/" in name:
                raise ValueError(
                    f"the optimizer has no hyperparameter {name!r}; it has {', '.join(sorted(labels(found)))}. "
                    "Use one of those."
                )
            continue
        if any(place.is_scheduled for place in fitting[0].everywhere):
            raise ValueError(
                f"{name!r} follows an optax schedule, which would overwrite the tuned value at every update. "
                "Give inject_hyperparams a plain number for it; the tuner has a schedule of its own."
            )
        for other, place in out.items():
            if place == fitting[0]:
                raise ValueError(f"{other!r} and {name!r} name the same hyperparameter. Keep one of them.")
        out[name] = fitting[0]
    return out


def read(opt_state: Any, where: Mapping[str, Place]) -> dict[str, Array]:
    """The values in force at some places, by the names given."""
    nodes = injected(opt_state)
    in_force = {name: place.everywhere[-1] for name, place in where.items()}
    return {name: unboxed(nodes[place.node].hyperparams[place.name]) for name, place in in_force.items()}


def write(opt_state: Any, values: Mapping[str, Any], where: Mapping[str, Place]) -> Any:
    """Writes values to places, each with the dtype and shape it has there.

    Numbers of accumulated batches change only when none is half done: ``optax.MultiSteps`` would never finish one
    whose length fell below what it has already gathered.
    """
    targets = [(name, place) for name, outer in where.items() for place in outer.everywhere]

    def change(number: int, node: Any) -> Any:
        new = dict(node.hyperparams)
        for name, place in targets:
            if place.node != number:
                continue
            old = unboxed(new[place.name])
            value = jnp.broadcast_to(jnp.asarray(values[name]).astype(old.dtype), jnp.shape(old))
            if place.is_held:
                value = jnp.where(unboxed(_accumulation(node).mini_step) == 0, value, old)
            new[place.name] = reboxed(new[place.name], value)
        return node._replace(hyperparams=new)

    return map_injected(opt_state, change)


def injected_hyperparams(opt_state: Any) -> dict[str, Array]:
    """The hyperparameters that ``optax.inject_hyperparams`` keeps in an optimizer state.

    Args:
      opt_state: Any tree with injected states in it. Names that occur in several places are given with their paths.

    Raises:
      ValueError: There is no injected state.
    """
    found = places(opt_state)
    if not found:
        raise ValueError(_NOT_INJECTED)
    return read(opt_state, labels(found))


_NOT_INJECTED = (
    "this optimizer state has no injected hyperparameters. "
    "Build the optimizer with optax.inject_hyperparams, as in "
    "optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)."
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
      hyperparams: Values by name, or by path where a name occurs several times: ``"encoder/learning_rate"``.

    Returns:
      The tree with new values; the given one is not changed.

    Raises:
      ValueError: There is no injected state, it has none of the names, a name is ambiguous, or a value would be
        overwritten at the next update, by an optax schedule or by `autotune`.

    Cost: O(number of hyperparameters), under jit nothing.
    """
    where = resolve(hyperparams, opt_state)
    for node in jax.tree.leaves(opt_state, is_leaf=is_tuned):
        if is_tuned(node):
            for name in where:
                if name in node.settings.core.space:
                    raise ValueError(
                        f"{name!r} is being tuned: autotune would overwrite the value at the next update. "
                        "Leave it out of the search space to set it by hand."
                    )
    if not where:
        available = ", ".join(sorted(labels(places(opt_state))))
        raise ValueError(
            f"the optimizer has no hyperparameter named {' or '.join(map(repr, hyperparams))}; "
            f"it has {available}. Use one of those names in the search space."
        )
    return write(opt_state, hyperparams, where)
