"""What may be tuned: bounds, scale and type, and the map between the unit cube and physical values."""

import dataclasses
import hashlib
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float as FloatArray, Int as IntArray, PRNGKeyArray

Role = Literal["auto", "rate", "fast", "slow"]
_ROLES = ("auto", "rate", "fast", "slow")

# A plain ``(lo, hi)`` spanning at least two decades is read as a log scale.
_LOG_RATIO = 100.0

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


def _check_role(role: str) -> None:
    if role not in _ROLES:
        raise ValueError(f"role must be one of {', '.join(_ROLES)}; got {role!r}.")


def _check_bounds(kind: str, lo: Any, hi: Any, *, log: bool) -> None:
    for bound in (lo, hi):
        if isinstance(bound, bool) or not isinstance(bound, numbers.Real):
            raise TypeError(f"{kind} bounds must be real numbers; got {bound!r} in ({lo!r}, {hi!r}).")
        if not math.isfinite(bound):
            raise ValueError(f"{kind} bounds must be finite; got ({lo!r}, {hi!r}). Give a finite range.")
    if not lo < hi:
        problem = "equal" if lo == hi else "reversed"
        raise ValueError(
            f"{kind} bounds must satisfy lo < hi; got {problem} bounds ({lo!r}, {hi!r}). "
            "Swap or widen them, or leave the hyperparameter out of the space to keep it fixed."
        )
    if log and lo <= 0:
        raise ValueError(
            f"{kind} on a log scale needs lo > 0; got ({lo!r}, {hi!r}). Raise lo above zero or use log=False."
        )


@dataclasses.dataclass(frozen=True)
class Float:
    """A real hyperparameter in ``[lo, hi]``.

    Example:
        >>> Float(1e-5, 1e-1, log=True)
        Float(lo=1e-05, hi=0.1, log=True, role='auto')

    Args:
      lo: Lower bound, in the hyperparameter's own unit.
      hi: Upper bound, above ``lo``.
      log: Whether the tuner moves on a log scale; needs ``lo > 0``.
      role: How the tuner treats it. ``"rate"`` is a learning rate: it follows the base schedule and its effect shows
        within a few steps. ``"fast"`` shows as soon but is not scheduled (momentum, batch size). ``"slow"`` shows only
        in long forks, on validation data (weight decay, dropout). ``"auto"`` decides by the name: ``learning_rate``,
        ``lr`` and names ending so are rates; the usual optimizer constants are fast; everything else is slow.

    Raises:
      TypeError: A bound is not a real number.
      ValueError: Bounds are not finite, reversed or equal, ``log`` with ``lo <= 0``, or an unknown role.
    """

    lo: float
    hi: float
    log: bool = dataclasses.field(default=False, kw_only=True)
    role: Role = dataclasses.field(default="auto", kw_only=True)

    def __post_init__(self):
        _check_bounds("Float", self.lo, self.hi, log=self.log)
        _check_role(self.role)
        if self._inner[0] >= self._inner[1]:
            raise ValueError(
                f"Float bounds ({self.lo!r}, {self.hi!r}) hold fewer than two float32 numbers. Widen them."
            )

    @property
    def _inner(self) -> tuple[float, float]:
        """The bounds rounded inwards to float32, so that a decoded value never leaves the declared range."""
        lo, hi = np.float32(self.lo), np.float32(self.hi)
        lo = np.nextafter(lo, np.float32(np.inf)) if float(lo) < self.lo else lo
        hi = np.nextafter(hi, np.float32(-np.inf)) if float(hi) > self.hi else hi
        return float(lo), float(hi)

    def decode(self, u: FloatArray[Array, "..."]) -> FloatArray[Array, "..."]:
        lo, hi = self._inner
        u = jnp.asarray(u, jnp.float32)
        if self.log:
            value = jnp.exp(math.log(self.lo) + u * (math.log(self.hi) - math.log(self.lo)))
        else:
            value = self.lo + u * (self.hi - self.lo)
        return jnp.clip(value, lo, hi)

    def encode(self, value: Any) -> FloatArray[Array, "..."]:
        value = jnp.clip(jnp.asarray(value, jnp.float32), *self._inner)
        if self.log:
            u = (jnp.log(value) - math.log(self.lo)) / (math.log(self.hi) - math.log(self.lo))
        else:
            u = (value - self.lo) / (self.hi - self.lo)
        return jnp.clip(u, 0.0, 1.0)

    def clip(self, value: Any) -> FloatArray[Array, "..."]:
        return jnp.clip(jnp.asarray(value, jnp.float32), *self._inner)

    def contains(self, value: Any) -> bool:
        # A float32 that came out of ``decode`` is inside; a Python float is compared with the declared bounds.
        return isinstance(value, numbers.Real | np.generic | jax.Array) and self.lo <= float(value) <= self.hi


@dataclasses.dataclass(frozen=True)
class Int:
    """An integer hyperparameter in ``lo, lo + 1, ..., hi``, both ends included.

    Example:
        >>> Int(1, 8)
        Int(lo=1, hi=8, log=False, role='auto')

    Args:
      lo: Smallest value.
      hi: Largest value, above ``lo``, below 2**24 in magnitude (exact in float32).
      log: Whether the tuner moves on a log scale; needs ``lo > 0``.
      role: As for `Float`.

    Raises:
      TypeError: A bound is not an integer.
      ValueError: Bounds reversed, equal or too large, ``log`` with ``lo <= 0``, or an unknown role.
    """

    lo: int
    hi: int
    log: bool = dataclasses.field(default=False, kw_only=True)
    role: Role = dataclasses.field(default="auto", kw_only=True)

    def __post_init__(self):
        _check_bounds("Int", self.lo, self.hi, log=self.log)
        for bound in (self.lo, self.hi):
            if not isinstance(bound, numbers.Integral):
                raise TypeError(f"Int bounds must be integers; got {bound!r}. Use Float for a real range.")
        if max(abs(self.lo), abs(self.hi)) >= 2**24:
            raise ValueError(f"Int bounds must stay below 2**24 in magnitude; got ({self.lo}, {self.hi}).")
        _check_role(self.role)

    @property
    def _edges(self) -> tuple[float, float]:
        lo, hi = self.lo - 0.5, self.hi + 0.5
        return (math.log(lo), math.log(hi)) if self.log else (lo, hi)

    def decode(self, u: FloatArray[Array, "..."]) -> IntArray[Array, "..."]:
        lo, hi = self._edges
        value = lo + jnp.asarray(u, jnp.float32) * (hi - lo)
        value = jnp.exp(value) if self.log else value
        return jnp.clip(jnp.round(value), self.lo, self.hi).astype(jnp.int32)

    def encode(self, value: Any) -> FloatArray[Array, "..."]:
        lo, hi = self._edges
        value = self.clip(value).astype(jnp.float32)
        value = jnp.log(value) if self.log else value
        return jnp.clip((value - lo) / (hi - lo), 0.0, 1.0)

    def clip(self, value: Any) -> IntArray[Array, "..."]:
        return jnp.clip(jnp.round(jnp.asarray(value)), self.lo, self.hi).astype(jnp.int32)

    def contains(self, value: Any) -> bool:
        is_number = isinstance(value, numbers.Real | np.generic | jax.Array)
        return is_number and self.lo <= float(value) <= self.hi and float(value) == round(float(value))


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of a few options. Numbers are ordered by their position in the list; other objects are unordered.

    Example:
        >>> Choice([32, 64, 128])
        Choice(options=(32, 64, 128), role='auto')

    Args:
      options: Two or more distinct hashable options. Inside jit a numeric choice is its value and any other choice its
        int32 position in ``options``; `SearchSpace.to_python` gives the object back.
      role: As for `Float`.

    Raises:
      TypeError: ``options`` is not a sequence of hashable objects.
      ValueError: Fewer than two options, repeated options, or an unknown role.
    """

    options: Sequence[Any]
    role: Role = dataclasses.field(default="auto", kw_only=True)

    def __post_init__(self):
        if isinstance(self.options, str) or not isinstance(self.options, Sequence):
            raise TypeError(f"Choice takes a list of options; got {self.options!r}.")
        object.__setattr__(self, "options", tuple(self.options))
        try:
            distinct = len(set(self.options))
        except TypeError as error:
            raise TypeError(f"Choice options must be hashable; got {self.options!r}.") from error
        if distinct < 2 or distinct != len(self.options):
            raise ValueError(f"Choice needs two or more distinct options; got {list(self.options)!r}.")
        if self.is_numeric and not all(math.isfinite(option) for option in self.options):
            raise ValueError(f"Choice options must be finite; got {list(self.options)!r}.")
        _check_role(self.role)

    @property
    def is_numeric(self) -> bool:
        return all(isinstance(option, numbers.Real) for option in self.options)

    @property
    def _table(self) -> np.ndarray:
        if not self.is_numeric:
            return np.arange(len(self.options), dtype=np.int32)
        is_whole = all(isinstance(option, numbers.Integral) for option in self.options)
        return np.asarray(self.options, np.int32 if is_whole else np.float32)

    def decode(self, u: FloatArray[Array, "..."]) -> Array:
        size = len(self.options)
        index = jnp.clip(jnp.floor(jnp.asarray(u, jnp.float32) * size), 0, size - 1).astype(jnp.int32)
        return jnp.asarray(self._table)[index]

    def _index(self, value: Any) -> Array:
        if not self.is_numeric and not isinstance(value, jax.Array | np.ndarray | np.generic):
            return jnp.asarray(self.options.index(value))
        table = jnp.asarray(self._table)
        return jnp.argmin(jnp.abs(table - jnp.asarray(value, table.dtype)[..., None]), axis=-1)

    def encode(self, value: Any) -> FloatArray[Array, "..."]:
        return (self._index(value).astype(jnp.float32) + 0.5) / len(self.options)

    def clip(self, value: Any) -> Array:
        return jnp.asarray(self._table)[self._index(value)]

    def contains(self, value: Any) -> bool:
        if isinstance(value, jax.Array | np.ndarray | np.generic):
            return bool(np.any(self._table == np.asarray(value)))
        return value in self.options


Parameter = Float | Int | Choice
SpaceLike = "SearchSpace | Mapping[str, Parameter | tuple[float, float] | list[Any]]"


def _as_parameter(name: str, spec: Any) -> Parameter:
    if isinstance(spec, Float | Int | Choice):
        return spec
    if isinstance(spec, list):
        return Choice(spec)
    if isinstance(spec, tuple) and len(spec) == 2:
        lo, hi = spec
        is_log = isinstance(lo, numbers.Real) and isinstance(hi, numbers.Real) and lo > 0 and hi / lo >= _LOG_RATIO
        return Float(lo, hi, log=bool(is_log))
    raise TypeError(f"expected Float, Int, Choice, a (lo, hi) tuple or a list of options; got {spec!r}.")


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
        when ``lo > 0`` and ``hi / lo >= 100``; a list is a `Choice`. Another `SearchSpace` is taken as it is.

    Raises:
      TypeError: Not a mapping, a name that is not a string, or an entry of unknown type; the entry is named.
      ValueError: An empty space, or bad bounds; the entry is named.
    """

    params: tuple[tuple[str, Parameter], ...]

    def __init__(self, params: Any):
        if isinstance(params, SearchSpace):
            object.__setattr__(self, "params", params.params)
            return
        if not isinstance(params, Mapping):
            raise TypeError(f"a search space is a mapping from name to range; got {type(params).__name__}.")
        if not params:
            raise ValueError(
                'the search space is empty; name at least one hyperparameter, as in {"learning_rate": (1e-5, 1e-1)}.'
            )
        entries = []
        for name, spec in params.items():
            if not isinstance(name, str) or not name:
                raise TypeError(f"hyperparameter names are non-empty strings; got {name!r}.")
            try:
                entries.append((name, _as_parameter(name, spec)))
            except (TypeError, ValueError) as error:
                raise type(error)(f"search space, {name!r}: {error}") from error
        object.__setattr__(self, "params", tuple(entries))

    def __repr__(self) -> str:
        def show(param: Parameter) -> str:
            if isinstance(param, Choice):
                return f"Choice({list(param.options)!r})"
            return f"{type(param).__name__}({param.lo}, {param.hi}{', log' if param.log else ''})"

        return f"SearchSpace({', '.join(f'{name}={show(param)}' for name, param in self.params)})"

    def __len__(self) -> int:
        return len(self.params)

    def __iter__(self):
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
        return tuple(_role_from_name(name) if p.role == "auto" else p.role for name, p in self.params)

    @property
    def is_categorical(self) -> np.ndarray:
        """bool[d]: dimensions whose options have no order."""
        return np.array([isinstance(p, Choice) and not p.is_numeric for _, p in self.params])

    @property
    def is_discrete(self) -> np.ndarray:
        """bool[d]: dimensions with finitely many values."""
        return np.array([not isinstance(p, Float) for _, p in self.params])

    def decode(self, u: FloatArray[Array, "*batch d"]) -> dict[str, Array]:
        """Maps unit-cube points to physical values, always inside the bounds. Jit-able; O(d)."""
        return {name: p.decode(u[..., i]) for i, (name, p) in enumerate(self.params)}

    def encode(self, hyperparams: Mapping[str, Any]) -> FloatArray[Array, "*batch d"]:
        """Maps physical values to the unit cube, clipping them to the bounds. Jit-able; O(d)."""
        return jnp.stack([p.encode(hyperparams[name]) for name, p in self.params], axis=-1)

    def snap(self, u: FloatArray[Array, "*batch d"]) -> FloatArray[Array, "*batch d"]:
        """Moves each discrete coordinate to the centre of its cell; other coordinates are clipped to [0, 1]."""
        u = jnp.clip(u, 0.0, 1.0)
        columns = [u[..., i] if isinstance(p, Float) else p.encode(p.decode(u[..., i]))
                   for i, (_, p) in enumerate(self.params)]  # fmt: skip
        return jnp.stack(columns, axis=-1)

    def clip(self, hyperparams: Mapping[str, Any]) -> dict[str, Array]:
        """Physical values moved to the nearest allowed ones; names outside the space pass unchanged."""
        table = dict(self.params)
        return {name: table[name].clip(value) if name in table else value for name, value in hyperparams.items()}

    def contains(self, hyperparams: Mapping[str, Any]) -> bool:
        """Whether every given value lies inside its bounds. Host only."""
        return all(self[name].contains(value) for name, value in hyperparams.items())

    def to_python(self, hyperparams: Mapping[str, Any]) -> dict[str, Any]:
        """Physical values as Python numbers, and options of unordered choices as the objects given. Host only."""
        out = {}
        for name, value in hyperparams.items():
            param = dict(self.params).get(name)
            scalar = np.asarray(value).item()
            is_object = isinstance(param, Choice) and not param.is_numeric
            out[name] = param.options[int(scalar)] if is_object else scalar
        return out

    def sample(self, key: PRNGKeyArray, shape: tuple[int, ...] = ()) -> FloatArray[Array, "*shape d"]:
        """Uniform points of the unit cube, snapped."""
        return self.snap(jax.random.uniform(key, (*shape, self.dims)))

    def fingerprint(self) -> str:
        """A short digest of names, bounds and types: equal exactly when two spaces are interchangeable."""
        return hashlib.sha256(repr(self.params).encode()).hexdigest()[:16]
