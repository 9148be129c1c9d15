"""Snapshots of a training state on disk: asynchronous, checksummed, never partly loaded.

Orbax writes and reads the arrays; everything that decides (ids, index, checksums, retention, what is sound) is ours.
"""

import contextlib
import dataclasses
import errno
import logging
import operator
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ..arguments import whole_number
from ..user_warning import warn
from .entries import DamagedFileError
from .errors import NoSnapshotError, SnapshotDamagedError, SnapshotWarning
from .folder import SnapshotFolder
from .index import SnapshotRecord, candidates_for, live_records, probe, retain
from .leaves import LeafSpec, allocate, copy_to_host, describe
from .orbax_io import UnreadableArraysError, load_orbax, read_snapshot, structure_of, write_snapshot
from .threads import ThreadHolder, in_turn

_log = logging.getLogger(__name__)

# Index, manifest and what Orbax writes beside the arrays.
_SPARE_BYTES = 2**20
# Steps run slower while a snapshot is being written (benchmarks/faults.py): write a tenth of the time at most.
_WRITING_SHARE = 0.1


class Snapshots:
    """A folder of snapshots of one training run.

    Saving copies the state to host memory at once, so the caller may donate it to the next step, and writes in the
    background. No failure of the disk reaches the training loop: it is warned of once, and saving is tried again with
    the next snapshot. Restoring verifies every byte first; a snapshot that is not what was written is put aside with a
    warning that names it, and the one before it is taken.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> state = {"w": jnp.arange(3.0), "epoch": 2}
        >>> with Snapshots(tempfile.mkdtemp()) as store:
        ...     first = store.save(100, state, metric=0.5)
        ...     step, restored = store.restore(state)
        >>> step, restored["w"].tolist(), restored["epoch"]
        (100, [0.0, 1.0, 2.0], 2)

    Args:
      folder: Where; made when absent. One open `Snapshots` at a time may write to it.
      keep: How many of the latest snapshots to keep, at least 1. The last healthy one is always kept.
      keep_best: How many of those with the best finite metric to keep besides.
      mode: Whether a lower (``"min"``) or a higher (``"max"``) metric is better.
      space: The search space, or its fingerprint: snapshots of another space are refused.
      read_only: Takes no lock and changes nothing, to restore beside a running training.
      overhead: Share of the run that `is_due` lets saves block, in (0, 1).
      interval_s: Least time between saves that `is_due` asks for, in seconds.

    Raises:
      ValueError: An argument is out of range.
      SnapshotFolderBusyError: Somebody else writes to the folder.
      SnapshotVersionError: The folder was written by a newer version of this library.
      OSError: The folder cannot be made or written to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_best: int = 1,
        mode: Literal["min", "max"] = "min",
        space: Any = None,
        read_only: bool = False,
        overhead: float = 0.01,
        interval_s: float = 30.0,
    ):
        if mode not in ("min", "max"):
            raise ValueError(f'mode must be "min" or "max"; got {mode!r}.')
        if not 0.0 < overhead < 1.0 or not interval_s >= 0.0:
            raise ValueError(
                f"overhead must be in (0, 1) and interval_s not negative; got {overhead} and {interval_s}."
            )
        self._keep, self._keep_best = whole_number("keep", keep), whole_number("keep_best", keep_best, least=0)
        self._mode: Literal["min", "max"] = mode
        self._space: str | None = space.fingerprint() if hasattr(space, "fingerprint") else space
        self._overhead, self._interval_s = overhead, interval_s
        self._folder = SnapshotFolder(pathlib.Path(folder).absolute(), is_read_only=read_only)
        self._buffers: dict[int, np.ndarray] = {}
        self._background = ThreadHolder()
        self._turn = threading.RLock()
        self._messages: list[str] = []
        self._failure: str | None = None
        self._is_closed = False
        self._head = next(reversed(live_records(self._folder.records)), None)
        self._last_start = time.monotonic()
        self._blocked_s = 0.0
        self._write_s = 0.0
        self._tell()

    # Saving.

    @in_turn
    def save(
        self,
        step: int,
        tree: Any,
        *,
        metric: float | None = None,
        status: str = "healthy",
        branch: str | None = None,
        wait: bool = False,
    ) -> int:
        """Saves a state, in the background.

        A save at a smaller step than some snapshot's tells that training went back: such snapshots are marked
        abandoned (see also `abandon`).

        Args:
          step: Training step the state belongs to, not negative.
          tree: Any pytree of arrays, typed random keys, NumPy arrays and scalars, Python numbers and text.
          metric: The user's metric at this state; non-finite ones never count as best.
          status: ``"healthy"`` if a rollback may go to it; any other word if not.
          branch: Name of the line of training; by default that of the snapshot before.
          wait: Whether to return only when the snapshot is durable or has failed (see `is_degraded`).

        Returns:
          The snapshot's id; ids grow by one and are never used again.

        Raises:
          TypeError: A leaf cannot be stored; the message names it.
          ValueError: The step is negative, or this `Snapshots` is closed or read only.

        Cost: blocks for one copy to host memory, 10 to 40 ms per 100 MB on a CPU, and for what is left of the save
        before. Keeps that copy's memory for the next one.
        """
        start = time.monotonic()
        self._check_writable()
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step must not be negative; got {step}.")
        metric = None if metric is None else float(metric)
        leaves, specs, _ = describe(tree)
        self._background.join()
        record = SnapshotRecord(
            id=self._folder.take_id(),
            step=step,
            branch=branch or (self._head.branch if self._head else "main"),
            parent=self._head.id if self._head else None,
            metric=metric,
            status=status,
            structure=structure_of(specs),
            space=self._space,
            size_bytes=0,
            saved_at=time.time(),
        )
        self._start(record, leaves, specs)
        self._last_start = start
        self._blocked_s = time.monotonic() - start
        if wait:
            self._background.join()
        self._tell()
        return record.id

    def _start(self, record: SnapshotRecord, leaves: Sequence[Any], specs: Sequence[LeafSpec]) -> None:
        """Copies the leaves and starts writing them."""
        self._background.join()
        # Taken away while in use: a signal handler may save in the middle of this save.
        buffers, self._buffers = self._buffers, {}
        try:
            arrays = copy_to_host(leaves, specs, buffers)
        except MemoryError as error:
            self._fail(record, error)
            return
        self._background.join()
        self._buffers = buffers
        record = dataclasses.replace(record, size_bytes=sum(a.nbytes for a in arrays if a is not None))
        self._background.start(self._write, record, specs, arrays, name=f"snapshot-{record.id}")

    @in_turn
    def prepare(self, tree: Any) -> None:
        """Gets ready, in the background, for states like this one, so that the first save is as quick as the others.

        Args:
          tree: A state, or its shapes (``jax.eval_shape``).

        Cost: memory for one copy of the state, which the first save would take anyway.
        """
        self._check_writable()
        _, specs, _ = describe(tree)
        self._background.join()
        self._background.start(self._warm_up, specs, name="snapshot-prepare")

    def _warm_up(self, specs: Sequence[LeafSpec]) -> None:
        load_orbax()  # takes a second the first time
        with contextlib.suppress(MemoryError):
            allocate(specs, self._buffers)

    def is_due(self) -> bool:
        """Whether a save now keeps to the cadence: the interval, the share of blocking, a tenth of the time writing.

        The clock decides, so two runs save at different steps; what they compute does not depend on it.

        Cost: no lock, no disk; meant to be asked every step.
        """
        if self.is_saving:
            return False
        least = max(self._interval_s, self._blocked_s / self._overhead, self._write_s / _WRITING_SHARE)
        return time.monotonic() - self._last_start >= least

    def _write(self, record: SnapshotRecord, specs: Sequence[LeafSpec], arrays: Sequence[Any]) -> None:
        start = time.monotonic()
        partial: pathlib.Path | None = None
        folder = self._folder
        try:
            folder.make_ready()
            folder.clean_up()
            free = shutil.disk_usage(folder.root).free
            need = record.size_bytes + _SPARE_BYTES
            if free < need:
                raise OSError(errno.ENOSPC, f"the disk has {free:,} bytes free and the snapshot needs {need:,}")
            partial = folder.new_partial(record.id)
            if self._failure is not None:
                # Orbax prints a traceback for every write that fails: try the disk first while it is in trouble.
                probe(partial, need)
            record = write_snapshot(partial, record, specs, arrays)
            folder.publish(partial, record.id)
            self._list(record)
        except BaseException as error:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
                if all(r.id != record.id for r in folder.records):
                    folder.remove(record.id)
            self._fail(record, error)
        else:
            if self._failure is not None:
                _log.info("Saving snapshots to %s works again, from snapshot %d on.", folder.root, record.id)
            self._failure = None
            self._head = record
        finally:
            self._write_s = time.monotonic() - start

    def _list(self, record: SnapshotRecord) -> None:
        """Commits a record, then deletes what retention no longer keeps."""
        there = [
            dataclasses.replace(r, is_abandoned=r.is_abandoned or r.step > record.step) for r in self._folder.records
        ]
        there = sorted([*there, record], key=lambda r: r.id)
        kept = retain(there, keep=self._keep, keep_best=self._keep_best, mode=self._mode)
        self._folder.commit(kept)
        for number in {r.id for r in there} - {r.id for r in kept}:
            self._folder.remove(number)

    def _fail(self, record: SnapshotRecord, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {error}"
        if self._failure is None:
            self._messages.append(
                f"Saving snapshot {record.id} (step {record.step}) to {self._folder.root} failed: {reason}. Training "
                "goes on without it and later saves are tried; this is said once until one succeeds."
            )
        _log.warning("Saving snapshot %d to %s failed: %s", record.id, self._folder.root, reason)
        self._failure = reason

    def _tell(self) -> None:
        """Warns, on the caller's thread, of what happened since."""
        messages = [*self._messages, *self._folder.messages]
        self._messages.clear()
        self._folder.messages.clear()
        for message in messages:
            warn(message, SnapshotWarning)

    def _check_writable(self) -> None:
        if self._is_closed or self._folder.is_read_only:
            state = "closed" if self._is_closed else "open read only"
            raise ValueError(f"These snapshots ({self._folder.root}) are {state}; open the folder again to save.")

    # Looking and restoring.

    @in_turn
    def wait(self) -> None:
        """Returns when the save under way is durable or has failed."""
        self._background.join()
        self._tell()

    @property
    def folder(self) -> pathlib.Path:
        """The folder, as an absolute path."""
        return self._folder.root

    @property
    def is_saving(self) -> bool:
        """Whether a snapshot is being written now."""
        return self._background.is_running

    @property
    def is_degraded(self) -> bool:
        """Whether the last save that ended has failed."""
        return self._failure is not None

    @property
    def failure(self) -> str | None:
        """Why the last save that ended has failed; None when it has not."""
        return self._failure

    @in_turn
    def records(self) -> tuple[SnapshotRecord, ...]:
        """All snapshots that can be restored, oldest first, abandoned ones too."""
        self._settle()
        self._tell()
        return tuple(self._folder.records)

    @in_turn
    def latest(self) -> int | None:
        """The training step of the snapshot that `restore` takes first; None when there is none."""
        self._settle()
        self._tell()
        live = live_records(self._folder.records)
        return live[-1].step if live else None

    def _settle(self) -> None:
        self._background.join()
        if self._folder.is_read_only:
            self._folder.load()

    @in_turn
    def restore(self, like: Any, *, which: Literal["latest", "healthy", "best"] | int = "latest") -> tuple[int, Any]:
        """Restores a state, all of it or nothing.

        Args:
          like: A state of the same structure; gives containers, dtypes and shardings, not values. Shapes
            (``jax.eval_shape``) do as well. Where it holds a Python number and the snapshot a scalar array of the same
            category, or the other way round, what was saved is returned.
          which: ``"latest"``, ``"healthy"`` (the latest saved as such), ``"best"`` by a finite metric, or an id. The
            first three fall back to the next in line where a snapshot is damaged.

        Returns:
          The training step saved with the state, and the state: new arrays, bit for bit those that were saved.

        Raises:
          NoSnapshotError: There is no such snapshot. A FileNotFoundError.
          SnapshotMismatchError: It is of another model or search space. A ValueError that names the differences.
          SnapshotDamagedError: There were some, and all are damaged. An OSError.
          SnapshotVersionError: It was written by a newer version of this library. A ValueError.
        """
        _, specs, treedef = describe(like)
        likes = treedef.flatten_up_to(like)
        self._settle()
        candidates = candidates_for(self._folder.records, which, self._mode)
        if not candidates:
            self._tell()
            listed = ", ".join(f"{r.id} (step {r.step})" for r in self._folder.records) or "none"
            raise NoSnapshotError(f"There is no snapshot {which!r} in {self._folder.root}; there are: {listed}.")
        for record in candidates:
            try:
                leaves = read_snapshot(self._folder.root, record, specs, likes, space=self._space)
            except DamagedFileError as error:
                if self._is_retired(record):
                    return self.restore(like, which=which)
                self._folder.quarantine(record, str(error), is_kept_in_place=isinstance(error, UnreadableArraysError))
                continue
            self._head = record
            self._tell()
            return record.step, treedef.unflatten(leaves)
        self._tell()
        names = ", ".join(str(r.id) for r in candidates)
        raise SnapshotDamagedError(
            f"No sound snapshot {which!r} is left in {self._folder.root}: {names} damaged, see the warnings. "
            "Nothing was loaded."
        )

    def _is_retired(self, record: SnapshotRecord) -> bool:
        """Whether the writer beside a read-only reader has deleted the snapshot while it was being read."""
        if not self._folder.is_read_only:
            return False
        self._folder.load()
        return all(r.id != record.id for r in self._folder.records)

    # Marks.

    def abandon(self, *, after_step: int) -> None:
        """Marks the snapshots beyond a step as of an abandoned line: training went back to that step.

        They are no longer latest or healthy, and retention deletes them at the next save, but for the best.

        Args:
          after_step: Step that training went back to.
        """
        self._update(lambda r: dataclasses.replace(r, is_abandoned=r.is_abandoned or r.step > after_step))

    def mark(self, number: int, *, status: str) -> None:
        """Changes the status of a snapshot, as when a state saved as healthy turns out not to be.

        Args:
          number: Id of the snapshot; one that is no longer there is passed over.
          status: ``"healthy"`` if a rollback may go to it; any other word if not.
        """
        self._update(lambda r: dataclasses.replace(r, status=status) if r.id == number else r)

    @in_turn
    def _update(self, change: Any) -> None:
        self._check_writable()
        self._background.join()
        records = [change(r) for r in self._folder.records]
        if records != self._folder.records:
            self._folder.records = records
            # What cannot be written now is written with the next save.
            with contextlib.suppress(OSError):
                self._folder.commit(records)
        live = live_records(self._folder.records)
        self._head = live[-1] if live else None
        self._tell()

    @in_turn
    def close(self) -> None:
        """Waits for the save under way and lets others write to the folder."""
        self._background.join()
        self._folder.close()
        self._is_closed = True
        self._buffers.clear()
        self._tell()

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Snapshots({str(self._folder.root)!r}, keep={self._keep})"
