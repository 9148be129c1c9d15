"""Batches by position: a callable as it is, an iterable with just enough memory to replay a round of forks."""

import collections
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from ..arguments import check_takes


class EndOfDataError(Exception):
    """An iterable that cannot be started again has no more batches."""


class BatchWindow:
    """The batches of a stream from some position on: all that were read where they are held, else the last one.

    Args:
      fetch: Reads the next batch.
      copied: Makes of a batch one that only the window writes to; the stream may fill the same arrays again.
    """

    def __init__(self, fetch: Callable[[], Any], copied: Callable[[Any], Any]):
        self._fetch, self._copied, self._is_held = fetch, copied, False
        self.restart(0)

    def restart(self, position: int) -> None:
        """Forgets everything; the next batch fetched is that of ``position``."""
        self._batches: collections.deque[Any] = collections.deque()
        self._first = position

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def is_held(self) -> bool:
        """Whether batches are held."""
        return self._is_held

    def hold(self, position: int) -> None:
        """Keeps every batch from ``position`` on, until `release`."""
        self._is_held = True
        self._forget_before(position)
        self._batches = collections.deque(map(self._copied, self._batches))

    def release(self, position: int) -> None:
        """Forgets every batch before ``position``, now and from now on."""
        self._is_held = False
        self._forget_before(position)

    def _forget_before(self, position: int) -> None:
        while self._batches and self._first < position:
            self._batches.popleft()
            self._first += 1

    def get(self, position: int) -> Any:
        """The batch at a position, not before the first one kept."""
        while self._first + len(self._batches) <= position:
            batch = self._fetch()
            self._batches.append(self._copied(batch) if self._is_held else batch)
            if not self._is_held:
                self._forget_before(min(position, self._first + len(self._batches) - 1))
        return self._batches[position - self._first]


def _copied(batch: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, batch)


def _is_one_batch(batch: tuple[Any, ...]) -> bool:
    is_of_arrays = all(hasattr(part, "shape") and hasattr(part, "dtype") for part in batch)
    return is_of_arrays and len({_kind(part) for part in batch}) > 1


def _kind(array: Any) -> str:
    return f"{array.dtype}{list(array.shape[1:])}"


class BatchSource:
    """Hands out the batch at a position of the data stream.

    Positions only go back within a round of forks: `hold` marks its start, `release` its end. Between the two the
    batches of an iterable are kept; at other times only the current one is. An iterable that is not its own iterator,
    such as a list or a data loader, starts again when it ends.

    Args:
      batches: ``callable(step, hyperparams) -> batch``, or an iterable of batches.

    Raises:
      TypeError: Neither callable nor iterable, a generator function, a function of other arguments, or one batch.
      ValueError: An empty iterable.
    """

    def __init__(self, batches: Callable[[int, Any], Any] | Iterable[Any]):
        if inspect.isgeneratorfunction(batches):
            name = getattr(batches, "__name__", "it")
            raise TypeError(f"batches must not be a function that yields them; give what it returns, batches={name}().")
        self._function = batches if callable(batches) else None
        if self._function is not None:
            what = "batches, a function, is called with the position in the data and the hyperparameters"
            check_takes(self._function, what, "batches(step, hp)")
            return
        if isinstance(batches, tuple) and _is_one_batch(batches):
            raise TypeError(
                "batches must be callable(step, hyperparams) or an iterable of batches; this tuple of arrays of "
                f"different kinds ({', '.join(map(_kind, batches))}) looks like one batch. A batch that is always the "
                "same is [batch]."
            )
        if not isinstance(batches, Iterable) or isinstance(batches, Mapping):
            hint = " A batch that is always the same is [batch]." if isinstance(batches, Mapping) else ""
            raise TypeError(
                "batches must be callable(step, hyperparams) or an iterable of batches; "
                f"got {type(batches).__name__}.{hint}"
            )
        self._iterable = batches
        self._iterator: Iterator[Any] = iter(batches)
        self._can_restart = self._iterator is not batches
        self._window = BatchWindow(self._next, _copied)
        self._has_begun = False

    @property
    def is_callable(self) -> bool:
        """Whether a batch is asked for by its position."""
        return self._function is not None

    def hold(self, position: int) -> None:
        """Keeps every batch from ``position`` on, until `release`."""
        if not self.is_callable:
            self._window.hold(position)

    def release(self, position: int) -> None:
        """Forgets every batch before ``position``, now and from now on."""
        if not self.is_callable:
            self._window.release(position)

    def _next(self) -> Any:
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self._has_begun and not self._can_restart:
                raise EndOfDataError from None
            try:
                self._iterator = iter(self._iterable)
                batch = next(self._iterator)
            except StopIteration:
                raise ValueError(
                    "batches must hold at least one batch; got an empty or used-up "
                    f"{type(self._iterable).__name__}. Give a fresh one."
                ) from None
        self._has_begun = True
        return batch

    def get(self, position: int, hyperparams: Any) -> Any:
        """The batch at ``position``.

        Raises:
          EndOfDataError: The iterable is its own iterator and has ended, or the callable raised `StopIteration`.
        """
        if self._function is not None:
            try:
                return self._function(position, hyperparams)
            except StopIteration:
                # Of an iterator that it takes batches from.
                if position > 0:
                    raise EndOfDataError from None
                raise ValueError("batches raised StopIteration for the first batch. Give it data to read.") from None
        return self._window.get(position)
