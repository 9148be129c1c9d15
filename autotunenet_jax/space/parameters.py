"""One hyperparameter: its bounds, scale and type, and the map between [0, 1] and its physical values."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float as FloatArray
from jaxtyping import Int as IntArray

Role: TypeAlias = Literal["auto", "rate", "fast", "slow"]
_ROLES = ("auto", "rate", "fast", "slow")

# Values live in float32: below this it has no normal numbers left (and XLA flushes the rest to zero), above it the
# width of a range may overflow.
_SMALLEST, _LARGEST = 1e-37, 1e38
# float32 counts without gaps up to here.
_LARGEST_INT = 2**24
# A point of the unit cube has 24 bits: with more values than this on a linear scale, or a larger one on a log scale,
# some would not come back from there.
_MOST_VALUES, _LARGEST_LOG_INT = 2**22, 2**17

_ARRAY_TYPES = (jax.Array, np.ndarray, np.generic)


def _check_role(role: str) -> None:
    if role not in _ROLES:
        raise ValueError(f"role must be one of {', '.join(_ROLES)}; got {role!r}. Leave it out to decide by the name.")


def _check_bounds(kind: str, lo: Any, hi: Any, *, log: bool) -> None:
    given = f"({lo!r}, {hi!r})"
    for bound in (lo, hi):
        if isinstance(bound, bool) or not isinstance(bound, numbers.Real):
            raise TypeError(f"{kind} bounds must be real numbers; got {bound!r} in {given}. Give plain numbers.")
        if bound != bound or bound in (math.inf, -math.inf):
            raise ValueError(f"{kind} bounds must be finite; got {given}. Give a finite range.")
    if not lo < hi:
        problem = "equal" if lo == hi else "reversed"
        raise ValueError(
            f"{kind} bounds must satisfy lo < hi; got {problem} bounds {given}. "
            "Swap or widen them, or leave the hyperparameter out of the space to keep it fixed."
        )
    if log and lo <= 0:
        raise ValueError(f"{kind} on a log scale needs lo > 0; got {given}. Raise lo above zero or use log=False.")


def _clip_nan_low(value: Any, lo: float, hi: float) -> FloatArray[Array, "..."]:
    """Clips to ``[lo, hi]``; NaN becomes ``lo``, since a bound that lets NaN through is none."""
    return jnp.fmin(jnp.fmax(jnp.asarray(value, jnp.float32), lo), hi)


def _as_numbers(value: Any) -> np.ndarray | None:
    """The value as float64 on the host, or None when it is no number."""
    if not isinstance(value, numbers.Real | jax.Array | np.ndarray | np.generic):
        return None
    array = np.asarray(value)
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.number) or array.dtype == bool else None


@dataclasses.dataclass(frozen=True)
class Float:
    """A real hyperparameter in ``[lo, hi]``.

    Example:
        >>> Float(1e-5, 1e-1, log=True)
        Float(lo=1e-05, hi=0.1, log=True, role='auto')

    Args:
      lo: Lower bound, in the hyperparameter's own unit; zero, or between 1e-37 and 1e38 in magnitude.
      hi: Upper bound, above ``lo``, of the same magnitudes.
      log: Whether the tuner moves on a log scale; needs ``lo > 0``.
      role: How the tuner treats it. ``"rate"`` is a learning rate: it follows the base schedule and its effect shows
        within a few steps. ``"fast"`` shows as soon but is not scheduled (momentum, batch size). ``"slow"`` shows only
        in long forks, on validation data (weight decay, dropout). ``"auto"`` decides by the name: ``learning_rate``,
        ``lr`` and names ending so are rates; the usual optimizer constants are fast; everything else is slow.

    Raises:
      TypeError: A bound is not a real number.
      ValueError: Bounds are not finite, reversed, equal or beyond float32, ``log`` with ``lo <= 0``, or an unknown
        role.
    """

    lo: float
    hi: float
    log: bool = dataclasses.field(default=False, kw_only=True)
    role: Role = dataclasses.field(default="auto", kw_only=True)

    def __post_init__(self):
        _check_bounds("Float", self.lo, self.hi, log=self.log)
        _check_role(self.role)
        for bound in (self.lo, self.hi):
            if bound != 0 and not _SMALLEST <= abs(bound) <= _LARGEST:
                raise ValueError(
                    f"Float bounds must be zero or between {_SMALLEST} and {_LARGEST} in magnitude, to fit in float32; "
                    f"got ({self.lo!r}, {self.hi!r}). Tune the value in another unit."
                )
        # Equal spaces must print alike, whatever number types their bounds were given in.
        object.__setattr__(self, "lo", float(self.lo))
        object.__setattr__(self, "hi", float(self.hi))
        if self._inner[0] >= self._inner[1]:
            raise ValueError(
                f"Float bounds must have two or more float32 numbers between them; got ({self.lo!r}, {self.hi!r}). "
                "Widen them."
            )

    @property
    def _inner(self) -> tuple[float, float]:
        """The bounds rounded inwards to float32, so that a decoded value never leaves the declared range."""
        lo, hi = np.float32(self.lo), np.float32(self.hi)
        lo = np.nextafter(lo, np.float32(np.inf)) if float(lo) < self.lo else lo
        hi = np.nextafter(hi, np.float32(-np.inf)) if float(hi) > self.hi else hi
        return float(lo), float(hi)

    def decode(self, u: FloatArray[Array, "..."]) -> FloatArray[Array, "..."]:
        """Maps [0, 1] to values inside the bounds, rounded inwards to float32. Jit-able."""
        u = _clip_nan_low(u, 0.0, 1.0)
        if self.log:
            value = jnp.exp(math.log(self.lo) + u * (math.log(self.hi) - math.log(self.lo)))
        else:
            value = self.lo + u * (self.hi - self.lo)
        return self.clip(value)

    def encode(self, value: Any) -> FloatArray[Array, "..."]:
        """Maps values, clipped to the bounds, to [0, 1]. Jit-able."""
        value = self.clip(value)
        if self.log:
            u = (jnp.log(value) - math.log(self.lo)) / (math.log(self.hi) - math.log(self.lo))
        else:
            u = (value - self.lo) / (self.hi - self.lo)
        return jnp.clip(u, 0.0, 1.0)

    def clip(self, value: Any) -> FloatArray[Array, "..."]:
        """Moves values to the nearest float32 inside the bounds, and NaN to the lower one. Jit-able."""
        return _clip_nan_low(value, *self._inner)

    def contains(self, value: Any) -> bool:
        """Whether all of the value, a number or an array of them, lies inside the bounds, to float32. Host only."""
        array = _as_numbers(value)
        if array is None:
            return False
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        return bool(np.all((np.float32(self.lo) <= array) & (array <= np.float32(self.hi))))


@dataclasses.dataclass(frozen=True)
class Int:
    """An integer hyperparameter in ``lo, lo + 1, ..., hi``, both ends included.

    Example:
        >>> Int(1, 8)
        Int(lo=1, hi=8, log=False, role='auto')

    Args:
      lo: Smallest value.
      hi: Largest value, above ``lo``, below 2**24 in magnitude (exact in float32). A range holds 2**22 values at most,
        so that each is a point of the unit cube; on a log scale it ends at 2**17.
      log: Whether the tuner moves on a log scale; needs ``lo > 0``.
      role: As for `Float`.

    Raises:
      TypeError: A bound is not an integer.
      ValueError: Bounds reversed, equal, too large or too far apart, ``log`` with ``lo <= 0``, or an unknown role.
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
        if max(abs(self.lo), abs(self.hi)) >= _LARGEST_INT:
            raise ValueError(
                f"Int bounds must stay below 2**24 in magnitude; got ({self.lo}, {self.hi}). Tune a coarser unit."
            )
        if self.log and self.hi > _LARGEST_LOG_INT:
            raise ValueError(
                f"Int on a log scale must end at {_LARGEST_LOG_INT} or below, or neighbours could not be told apart; "
                f"got ({self.lo}, {self.hi}). Use Float and round it, or tune a coarser unit."
            )
        if self.hi - self.lo >= _MOST_VALUES:
            raise ValueError(
                f"Int must have {_MOST_VALUES} values at most, or neighbours could not be told apart; "
                f"got ({self.lo}, {self.hi}). Use Float and round it, or tune a coarser unit."
            )
        _check_role(self.role)
        object.__setattr__(self, "lo", int(self.lo))
        object.__setattr__(self, "hi", int(self.hi))

    @property
    def _edges(self) -> tuple[float, float]:
        return math.log(self.lo - 0.5), math.log(self.hi + 0.5)

    def decode(self, u: FloatArray[Array, "..."]) -> IntArray[Array, "..."]:
        """Maps [0, 1], cut into one cell per integer (cells of equal width unless ``log``), to int32. Jit-able."""
        u = _clip_nan_low(u, 0.0, 1.0)
        if self.log:
            lo, hi = self._edges
            return self.clip(jnp.exp(lo + u * (hi - lo)))
        # Counted from the lower bound: what is large has few digits left.
        count = self.hi - self.lo + 1
        return self.lo + jnp.minimum(jnp.floor(u * count), count - 1).astype(jnp.int32)

    def encode(self, value: Any) -> FloatArray[Array, "..."]:
        """Maps values, rounded and clipped to the bounds, to [0, 1]. Jit-able."""
        whole = self.clip(value)
        if self.log:
            lo, hi = self._edges
            return jnp.clip((jnp.log(whole.astype(jnp.float32)) - lo) / (hi - lo), 0.0, 1.0)
        return ((whole - self.lo).astype(jnp.float32) + 0.5) / (self.hi - self.lo + 1)

    def clip(self, value: Any) -> IntArray[Array, "..."]:
        """Moves values to the nearest integer inside the bounds, and NaN to the lower one. Jit-able."""
        return jnp.round(_clip_nan_low(value, self.lo, self.hi)).astype(jnp.int32)

    def contains(self, value: Any) -> bool:
        """Whether all of the value, a number or an array of them, is whole and inside the bounds. Host only."""
        array = _as_numbers(value)
        return array is not None and bool(np.all((self.lo <= array) & (array <= self.hi) & (array == np.round(array))))


def _as_option(option: Any) -> Any:
    """An option as plain Python."""
    if isinstance(option, np.bool_ | np.integer | np.floating | np.str_):
        option = option.item()
    if type(option) is tuple:
        return tuple(map(_as_option, option))
    if option is None or type(option) in (str, int, float, bool):
        return option
    raise TypeError(
        f"Choice options are strings, numbers, bools, None, or tuples of these; got {option!r}, a "
        f"{type(option).__name__}. Name the options by strings and look them up by name."
    )


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of a few options. Numbers are ordered by their position in the list; other options are unordered.

    Example:
        >>> Choice([32, 64, 128])
        Choice(options=(32, 64, 128), role='auto')

    Args:
      options: Two or more distinct strings, numbers, bools, None, or tuples of these; NumPy's become Python's. Inside
        jit a numeric choice is its value and any other choice its int32 position in ``options``;
        `SearchSpace.to_python` gives the option back. Other objects (functions, types, members of an enumeration) may
        differ from process to process, and a run that is resumed would not know them again: name them by strings and
        look them up by name.
      role: As for `Float`.

    Raises:
      TypeError: ``options`` is not a sequence, or holds something else.
      ValueError: Fewer than two options, repeated options, numbers that float32 cannot hold or tell apart, or an
        unknown role.
    """

    options: Sequence[Any]
    role: Role = dataclasses.field(default="auto", kw_only=True)
    # 1 == 1.0 == True, yet they decode to other dtypes: as static arguments such choices must not be equal.
    _types: tuple[type, ...] = dataclasses.field(default=(), init=False, repr=False)

    def __post_init__(self):
        if isinstance(self.options, str) or not isinstance(self.options, Sequence):
            raise TypeError(f"Choice takes a sequence of options; got {self.options!r}. Put them in a list.")
        object.__setattr__(self, "options", tuple(map(_as_option, self.options)))
        object.__setattr__(self, "_types", tuple(map(type, self.options)))
        shown = list(self.options)
        distinct = len(set(self.options))
        if distinct < 2 or distinct != len(self.options):
            raise ValueError(f"Choice needs two or more distinct options; got {shown!r}. Add some or drop repeats.")
        if self.is_numeric:
            self._check_numbers(shown)
        _check_role(self.role)

    def _check_numbers(self, shown: list[Any]) -> None:
        if not all(math.isfinite(option) for option in shown):
            raise ValueError(f"Choice options must be finite; got {shown!r}. Drop the others.")
        limit = _LARGEST_INT if self._is_whole else _LARGEST
        if not all(abs(option) < limit for option in shown):
            raise ValueError(
                f"Choice options must stay below {limit} in magnitude, to fit in float32; got {shown!r}. "
                "Name them by strings."
            )
        if len(set(self._table.tolist())) != len(shown):
            raise ValueError(f"Choice options must differ in float32; got {shown!r}. Spread them or drop repeats.")

    @property
    def is_numeric(self) -> bool:
        """Whether every option is a number, so that the options have an order."""
        return all(isinstance(option, numbers.Real) for option in self.options)

    @property
    def _is_whole(self) -> bool:
        return all(isinstance(option, numbers.Integral) for option in self.options)

    @property
    def _table(self) -> np.ndarray:
        """What each option is inside jit."""
        if not self.is_numeric:
            return np.arange(len(self.options), dtype=np.int32)
        return np.asarray(self.options, np.int32 if self._is_whole else np.float32)

    def position(self, option: Any) -> int:
        """Position of an option, given as in ``options``. Host only.

        Raises:
          ValueError: It is none of them.
        """
        if option not in self.options:
            raise ValueError(f"a choice must be one of {list(self.options)!r}; got {option!r}. Pick one of them.")
        return self.options.index(option)

    def _index(self, value: Any) -> IntArray[Array, "..."]:
        """Position of the nearest option; NaN goes to the first."""
        if not self.is_numeric and (isinstance(value, str) or not isinstance(value, _ARRAY_TYPES)):
            return jnp.asarray(self.position(value), jnp.int32)
        distance = jnp.abs(jnp.asarray(self._table, jnp.float32) - jnp.asarray(value, jnp.float32)[..., None])
        return jnp.argmin(distance, axis=-1).astype(jnp.int32)

    def decode(self, u: FloatArray[Array, "..."]) -> Array:
        """Maps [0, 1], cut into one cell of equal width per option, to options as seen inside jit. Jit-able."""
        size = len(self.options)
        index = jnp.fmin(jnp.floor(_clip_nan_low(u, 0.0, 1.0) * size), size - 1).astype(jnp.int32)
        return jnp.asarray(self._table)[index]

    def encode(self, value: Any) -> FloatArray[Array, "..."]:
        """Maps options (objects, or values as seen inside jit, moved to the nearest) to the centre of their cell."""
        return (self._index(value).astype(jnp.float32) + 0.5) / len(self.options)

    def clip(self, value: Any) -> Array:
        """Moves values to the nearest option, as seen inside jit. Jit-able for arrays."""
        return jnp.asarray(self._table)[self._index(value)]

    def contains(self, value: Any) -> bool:
        """Whether all of the value, an option or an array as seen inside jit, is among the options. Host only."""
        if isinstance(value, _ARRAY_TYPES) and not isinstance(value, str):
            array = _as_numbers(value)
            return array is not None and bool(np.all(np.isin(array.astype(np.float32), self._table)))
        return value in self.options

    def to_python(self, value: Any) -> Any:
        """The option object that a value as seen inside jit stands for. Host only."""
        return self.options[int(self._index(value))]


Parameter: TypeAlias = Float | Int | Choice
