"""What may be tuned: named hyperparameters, and the map between the unit cube and their physical values."""

import dataclasses
import hashlib
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from jaxtyping import Float as FloatArray

from .parameters import Choice, Float, Int, Parameter

# A plain ``(lo, hi)`` spanning at least two decades is read as a log scale.
_LOG_RATIO = 100.0
# What a range written as a mapping says: the arguments of `Float`.
_RANGE_KEYS = frozenset({"lo", "hi", "log", "role"})

_RATE_NAMES = frozenset({"learning_rate", "lr", "step_size", "stepsize"})
_FAST_NAMES = frozenset(
    {"momentum", "b1", "b2", "beta1", "beta2", "eps", "decay", "nesterov", "batch_size", "every_k", "every_k_schedule"}
    | {"max_norm", "clip", "clip_norm", "max_delta", "accumulation"}
)


def _role_from_name(name: str) -> Literal["rate", "fast", "slow"]:
    leaf = name.rsplit("/", 1)[-1]
    if leaf in _RATE_NAMES or leaf.endswith(("learning_rate", "_lr")):
        return "rate"
    return "fast" if leaf in _FAST_NAMES else "slow"


def _role_of(name: str, param: Parameter) -> Literal["rate", "fast", "slow"]:
    return _role_from_name(name) if param.role == "auto" else param.role


def _check_aliases(names: list[str]) -> None:
    """Refuses two names of one rate."""
    found: dict[str, str] = {}
    for name in names:
        path, _, leaf = name.rpartition("/")
        if leaf not in _RATE_NAMES:
            continue
        if path in found:
            raise ValueError(f"search space: {found[path]!r} and {name!r} name the same rate. Keep one of them.")
        found[path] = name


def _as_parameter(spec: Any) -> Parameter:
    if isinstance(spec, Float | Int | Choice):
        return spec
    if isinstance(spec, tuple) and len(spec) == 2:
        return _as_range(*spec)
    if isinstance(spec, Mapping) and {"lo", "hi"} <= set(spec) <= _RANGE_KEYS:
        return _as_range(**spec)
    # Lists, and what other libraries have for them, such as those of a configuration; a longer tuple is neither.
    if isinstance(spec, Sequence | np.ndarray) and not isinstance(spec, str | bytes | tuple):
        options = list(spec)
        is_pair = len(options) == 2 and all(
            isinstance(x, numbers.Real) and not isinstance(x, bool | np.bool_) for x in options
        )
        if is_pair and options[0] < options[1]:
            raise ValueError(
                f"the list {options!r} may be meant as a range or as two options. Write the tuple {tuple(options)!r}, "
                f"Float or Int for a range, Choice({options!r}) for the options; where there are no tuples, as in YAML "
                f"and JSON, a range is {{lo: {options[0]}, hi: {options[1]}}}."
            )
        return Choice(options)
    raise TypeError(
        "a hyperparameter is a Float, Int or Choice, a (lo, hi) tuple, a mapping with lo and hi, or a list of options; "
        f"got {spec!r}, of type {type(spec).__name__}. Give one of these."
    )


def _as_range(lo: Any, hi: Any, log: bool | None = None, role: Any = "auto") -> Float:
    if log is None:
        log = all(isinstance(bound, numbers.Real) for bound in (lo, hi)) and lo > 0 and hi >= _LOG_RATIO * lo
    return Float(lo, hi, log=bool(log), role=role)


def _as_rate(param: Parameter) -> Parameter:
    """A learning rate as it can be searched: positive numbers, rising, since the way down from one is to the next."""
    if not isinstance(param, Choice):
        if param.lo < 0:
            raise ValueError(
                f"a learning rate is not negative; got ({param.lo!r}, {param.hi!r}). Begin the range above zero, some "
                "decades below its upper bound."
            )
        return param
    if not param.is_numeric:
        raise TypeError(
            f"a learning rate is a number; got the options {list(param.options)!r}. Where they come from YAML, write "
            "1.0e-3: it reads 1e-3 as text."
        )
    if min(param.options) < 0:
        raise ValueError(f"a learning rate is not negative; got the options {list(param.options)!r}. Drop that one.")
    return dataclasses.replace(param, options=sorted(param.options))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, init=False, repr=False)
class SearchSpace:
    """The hyperparameters that may move, and how far.

    Example:
        >>> space = SearchSpace({"learning_rate": (1e-5, 1e-1), "dropout": (0.0, 0.5)})
        >>> space
        SearchSpace(learning_rate=Float(1e-05, 0.1, log), dropout=Float(0.0, 0.5))
        >>> round(float(space.decode(space.encode({"learning_rate": 1e-3, "dropout": 0.25}))["dropout"]), 3)
        0.25

    Args:
      params: Mapping from name to `Float`, `Int` or `Choice`. A plain ``(lo, hi)`` tuple is a `Float`, on a log scale
        when ``lo > 0`` and ``hi / lo >= 100``, and so is ``{"lo": ..., "hi": ...}``, for files that have no tuples,
        with ``log`` and ``role`` as for `Float`. A list is a `Choice`, but one of two rising numbers is refused, since
        it may be meant as a range; options of a learning rate are put in rising order. Another `SearchSpace` is taken
        as it is.

    Raises:
      TypeError: Not a mapping, a name that is not a string, an entry of unknown type, or a learning rate that is no
        number; the entry is named.
      ValueError: An empty space, bad bounds, or two names of one rate, such as ``lr`` beside ``learning_rate``; the
        entry is named.
    """

    params: tuple[tuple[str, Parameter], ...]

    def __init__(self, params: Any):
        if isinstance(params, SearchSpace):
            object.__setattr__(self, "params", params.params)
            return
        if not isinstance(params, Mapping):
            raise TypeError(
                f"a search space is a mapping from name to range; got {type(params).__name__}. "
                'Write it as {"learning_rate": (1e-5, 1e-1)}.'
            )
        if not params:
            raise ValueError(
                f"a search space names at least one hyperparameter; got an empty {type(params).__name__}. "
                'Add one, as in {"learning_rate": (1e-5, 1e-1)}.'
            )
        entries = []
        for name, spec in params.items():
            if not isinstance(name, str) or not name:
                raise TypeError(f"hyperparameter names are non-empty strings; got {name!r}. Name it.")
            try:
                param = _as_parameter(spec)
                entries.append((name, _as_rate(param) if _role_of(name, param) == "rate" else param))
            except (TypeError, ValueError) as error:
                raise type(error)(f"search space, {name!r}: {error}") from error
        _check_aliases([name for name, _ in entries])
        object.__setattr__(self, "params", tuple(entries))

    def __repr__(self) -> str:
        def show(param: Parameter) -> str:
            if isinstance(param, Choice):
                return f"Choice({list(param.options)!r})"
            return f"{type(param).__name__}({param.lo}, {param.hi}{', log' if param.log else ''})"

        return f"SearchSpace({', '.join(f'{name}={show(param)}' for name, param in self.params)})"

    def __len__(self) -> int:
        return len(self.params)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Parameter:
        return dict(self.params)[name]

    @property
    def names(self) -> tuple[str, ...]:
        """Names, in the order of the unit cube's dimensions."""
        return tuple(name for name, _ in self.params)

    @property
    def dims(self) -> int:
        """Number of dimensions of the unit cube."""
        return len(self.params)

    @property
    def roles(self) -> tuple[Literal["rate", "fast", "slow"], ...]:
        """How each hyperparameter is treated, with ``"auto"`` resolved by its name."""
        return tuple(_role_of(name, p) for name, p in self.params)

    @property
    def is_categorical(self) -> np.ndarray:
        """bool[d]: dimensions whose options have no order."""
        return np.array([isinstance(p, Choice) and not p.is_numeric for _, p in self.params])

    def decode(self, u: FloatArray[Array, "*batch d"]) -> dict[str, Array]:
        """Maps unit-cube points to physical values, always inside the bounds.

        Args:
          u: float32 points, one coordinate per hyperparameter; coordinates outside [0, 1] are clipped, NaN reads as 0.

        Returns:
          Float32 or int32 arrays of the batch shape, by name; an unordered choice is its position.

        Raises:
          ValueError: The last axis of ``u`` is not as long as the space has hyperparameters.

        Cost: O(d), jit-able.
        """
        u = self._as_points(u)
        return {name: p.decode(u[..., i]) for i, (name, p) in enumerate(self.params)}

    def _as_points(self, u: Any) -> FloatArray[Array, "*batch d"]:
        u = jnp.asarray(u, jnp.float32)
        if u.ndim == 0 or u.shape[-1] != self.dims:  # XLA would clamp the index and repeat the last coordinate
            raise ValueError(
                f"points of this space have {self.dims} coordinates on their last axis; got shape {u.shape}. "
                f"Order them as {self.names}."
            )
        return u

    def encode(self, hyperparams: Mapping[str, Any]) -> FloatArray[Array, "*batch d"]:
        """Maps physical values to the unit cube, clipping them to the bounds.

        Args:
          hyperparams: A value, or an array of them, for every hyperparameter; other names are ignored.

        Returns:
          float32 points of the unit cube.

        Raises:
          ValueError: A hyperparameter has no value, or an unordered choice is none of its options.

        Cost: O(d), jit-able.
        """
        missing = [name for name in self.names if name not in hyperparams]
        if missing:
            raise ValueError(f"encode needs a value for each of {self.names}; got none for {missing}. Add them.")
        return jnp.stack([p.encode(hyperparams[name]) for name, p in self.params], axis=-1)

    def snap(self, u: FloatArray[Array, "*batch d"]) -> FloatArray[Array, "*batch d"]:
        """Moves each discrete coordinate to the centre of its cell; other coordinates are clipped to [0, 1]."""
        u = jnp.clip(self._as_points(u), 0.0, 1.0)
        columns = []
        for i, (_, param) in enumerate(self.params):
            column = u[..., i]
            columns.append(column if isinstance(param, Float) else param.encode(param.decode(column)))
        return jnp.stack(columns, axis=-1)

    def clip(self, hyperparams: Mapping[str, Any]) -> dict[str, Array]:
        """Physical values moved to the nearest allowed ones; names outside the space pass unchanged."""
        table = dict(self.params)
        return {name: table[name].clip(value) if name in table else value for name, value in hyperparams.items()}

    def contains(self, hyperparams: Mapping[str, Any]) -> bool:
        """Whether every given value belongs to the space and lies inside its bounds. Host only."""
        table = dict(self.params)
        return all(name in table and table[name].contains(value) for name, value in hyperparams.items())

    def to_python(self, hyperparams: Mapping[str, Any]) -> dict[str, Any]:
        """Scalar values as Python numbers, and choices as the objects given in the space. Host only."""
        table = dict(self.params)
        out = {}
        for name, value in hyperparams.items():
            param = table.get(name)
            out[name] = param.to_python(value) if isinstance(param, Choice) else np.asarray(value).item()
        return out

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> FloatArray[Array, "*shape d"]:
        """Uniform points of the unit cube, snapped."""
        return self.snap(jax.random.uniform(key, (*shape, self.dims)))

    def fingerprint(self) -> str:
        """A digest of names, bounds and types, and what they are in words, cut to 400 characters.

        Equal exactly when two spaces are interchangeable.
        """
        digest = hashlib.sha256(repr(self.params).encode()).hexdigest()[:16]
        return f"{digest} {self!r}"[:400]
