"""Batches with just enough memory to show every fork of a round the same data."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from . import engine, random_state

Cursor = tuple[int, int]
"""A position in the stream of batches: the batch's number, and the first row not yet used of it."""


def map_tensors(function: Callable[[torch.Tensor], Any], batch: Any) -> Any:
    """A batch of the same containers with a function applied to its tensors."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def _copied(batch: Any) -> Any:
    return map_tensors(torch.clone, batch)


def rows(batch: Any) -> int:
    """Rows of a batch: the first axis of its first tensor; 1 where there is none."""
    found: list[int] = []
    map_tensors(lambda tensor: found.append(tensor.shape[0] if tensor.ndim else 1), batch)
    return found[0] if found else 1


def _concatenate(parts: list[Any]) -> Any:
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {key: _concatenate([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_concatenate(list(column)) for column in zip(*parts, strict=True)))
    if isinstance(first, list | tuple):
        return type(first)(_concatenate(list(column)) for column in zip(*parts, strict=True))
    raise TypeError(
        f"a batch with a {type(first).__name__} in it cannot be cut to another batch size. "
        "Leave batch_size out of param_space, or let the loader give tensors only."
    )


def check_loader(name: str, loader: Any) -> None:
    """Refuses what is no loader, or one that can be read only once.

    Raises:
      TypeError: It is not iterable, as a data set is not, or an iterator.
    """
    if not isinstance(loader, Iterable):
        raise TypeError(f"{name} must be a DataLoader or an iterable of batches; got {type(loader).__name__}.")
    if isinstance(loader, Iterator):
        raise TypeError(f"{name} is an iterator, which can be read only once. Give the DataLoader or list itself.")


class ReplayBuffer:
    """A data loader as an endless stream that can go back within a round of forks.

    Between `hold` and `release` every batch is kept; at other times only the current one is. Each pass over the loader
    draws its shuffling from a seed of its own, so that what a fork draws does not depend on who loads the data, and a
    resumed run finds its place again.

    Args:
      loader: A data loader, or any iterable that can be iterated over again.
      seed: Of the passes; drawn from PyTorch's generator by default.

    Raises:
      TypeError: Not iterable, or an iterator that can be read only once.
    """

    def __init__(self, loader: Iterable[Any], *, seed: int | None = None):
        check_loader("train_loader", loader)
        self._loader = loader
        self._seed = int(torch.randint(2**62, ()).item()) if seed is None else seed
        self._is_threaded = getattr(loader, "num_workers", 0) > 0
        self._iterator: Iterator[Any] | None = None
        self._epoch, self._read = -1, 0
        self._held_from: int | None = None
        # Of each pass: the number of its first batch, its own, and the states of the loader's own generators.
        self._starts: list[tuple[int, int, list[torch.Tensor]]] = []
        self._window = engine.hosting.BatchWindow(self._next, _copied)
        self.cursor: Cursor = (0, 0)

    # Going back.

    def hold(self) -> None:
        """Keeps every batch from the cursor on."""
        self._held_from = self.cursor[0]
        self._window.hold(self.cursor[0])

    def release(self) -> None:
        """Forgets every batch before the cursor, now and from now on."""
        self._held_from = None
        self._window.release(self.cursor[0])
        self._forget_passes()

    def _forget_passes(self) -> None:
        # The pass that the cursor is in is needed to find the place again.
        while len(self._starts) > 1 and self._starts[1][0] <= self.cursor[0]:
            self._starts.pop(0)

    # Reading.

    def get(self, size: int | None = None) -> Any:
        """The next batch; with ``size``, so many rows, cut and put together from the loader's batches."""
        index, offset = self.cursor
        if size is None:
            batch = self._lent(index)
            self.cursor = (index + 1, 0)
        else:
            parts, missing = [], size
            while missing:
                whole = self._lent(index)
                stop = min(offset + missing, rows(whole))
                parts.append(map_tensors(lambda tensor, a=offset, b=stop: tensor[a:b], whole))
                missing -= stop - offset
                index, offset = (index, stop) if stop < rows(whole) else (index + 1, 0)
            batch = _concatenate(parts)
            self.cursor = (index, offset)
        if not self._window.is_held:
            self._forget_passes()
        return batch

    def _lent(self, index: int) -> Any:
        """A batch to be trained on, which may change it in place: of one that is to be shown again, a copy."""
        batch = self._window.get(index)
        return _copied(batch) if self._window.is_held else batch

    def _next(self) -> Any:
        batch = self._fetch() if self._iterator is not None else None
        if batch is None:
            self._begin_pass()
            with random_state.untouched(seed=hash((self._seed, self._epoch)) % 2**62):
                _draw_for_workers(self._loader)
                self._iterator = iter(self._loader)
                batch = next(self._iterator, None)
            if batch is None:
                raise ValueError("the train_loader is empty: it gave no batch. Check the data set and drop_last.")
        self._read += 1
        return batch

    def _begin_pass(self) -> None:
        self._epoch += 1
        self._starts.append((self._read, self._epoch, [g.get_state() for g in _generators(self._loader)]))
        sampler = getattr(self._loader, "sampler", None)
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self._epoch)

    def _fetch(self) -> Any:
        assert self._iterator is not None
        if self._window.is_held and not self._is_threaded:
            # Random augmentation happens here: it must not move the generators that dropout draws from.
            with random_state.untouched(seed=hash((self._seed, self._epoch, self._read)) % 2**62):
                return next(self._iterator, None)
        return next(self._iterator, None)

    # Across processes.

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as plain data."""
        first = self.cursor[0] if self._held_from is None else self._held_from
        passes = (entry for entry in reversed(self._starts) if entry[0] <= first)
        start, epoch, generators = next(passes, (0, -1, []))
        return {
            "seed": self._seed,
            "epoch": epoch,
            "start": start,
            "generators": generators,
            "held_from": self._held_from,
            "cursor": list(self.cursor),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Finds the place again that `state` gave, reading over what came before it in the same pass."""
        self._seed, self._iterator = state["seed"], None
        self._epoch, self._read = state["epoch"] - 1, state["start"]
        self._starts, self._held_from = [], state["held_from"]
        index, offset = state["cursor"]
        self.cursor = (index, offset)
        first = index if self._held_from is None else self._held_from
        self._window.release(0)
        if state["epoch"] < 0:
            self._epoch = -1
        else:
            for generator, saved in zip(_generators(self._loader), state["generators"], strict=False):
                generator.set_state(saved)
            for _ in range(first - state["start"]):
                self._next()
        self._window.restart(first)
        if self._held_from is not None:
            self._window.hold(first)


def _draw_for_workers(loader: Any) -> None:
    """Draws what a loader would for new workers where it keeps its own: each pass finds its generator alike."""
    if getattr(loader, "persistent_workers", False) and getattr(loader, "_iterator", None) is not None:
        torch.empty((), dtype=torch.int64).random_(generator=loader.generator)


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers draw from besides the global ones."""
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
