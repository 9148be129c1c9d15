"""The durable tier of a run: snapshots on disk, which one process writes and all restore."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax

from ..checkpoint.errors import SnapshotMismatchError
from ..checkpoint.spread import gathered, is_spread
from ..checkpoint.store import Snapshots
from ..controller import AutoTuneNet
from ..session.signals import Stop
from ..user_warning import warn
from .processes import Processes
from .run import Run


class Durable:
    """Snapshots of a run, or none.

    Args:
      store: Where; in all processes but the first it is only read. None for no snapshots.
      processes: Those that train together.
    """

    def __init__(self, store: Snapshots | None, processes: Processes):
        self._store, self._processes = store, processes

    def is_due(self) -> bool:
        """Whether the first process, by its clock, finds a save due."""
        return self._store is not None and self._processes.is_first and self._store.is_due()

    def save(self, run: Run) -> None:
        """Saves the run as it stands; all processes do so at the same step."""
        if self._store is not None:
            tree = run.snapshot()
            self._write(run, gathered(tree) if self._processes.is_several else tree)

    def _write(self, run: Run, tree: Any) -> None:
        if self._store is None or not self._processes.is_first:
            return
        session, step = run.session, run.controller.step
        # A metric, or a good name, of another state would be worse than none.
        metric = session.last_eval if session.settled_at == step else None
        health = run.controller.state.health
        is_calm = int(health.monitor.strikes) == 0 and int(health.bad_run) == 0
        self._store.save(step, tree, metric=metric, status="healthy" if is_calm else "unusual")
        self.write_history(run)

    def save_last(self, run: Run, stop: Stop, *, is_agreed: bool) -> None:
        """Saves a run that ends here, for whatever reason; a failure is told, and hides no other.

        Args:
          run: The run.
          stop: Of signals.
          is_agreed: Whether all processes end here. One that fails alone cannot bring spread arrays together.
        """
        if self._store is None or not run.is_alive():
            return
        try:
            if is_agreed or not self._processes.is_several:
                self.save(run)
            elif not any(map(is_spread, jax.tree.leaves(run.copies))):
                self._write(run, run.snapshot())
        except Exception as error:
            warn(f"The last state could not be saved in {self._store.folder}: {type(error).__name__}: {error}")
        with stop.exposed():
            self._store.wait()

    def write_history(self, run: Run) -> None:
        """Writes the history so far beside the snapshots."""
        if self._store is not None and self._processes.is_first:
            run.recorder.write(self._store.folder)

    def resume(self, run: Run, *, extend: bool) -> None:
        """Goes on from the latest good snapshot, if there is one.

        Args:
          run: The run.
          extend: Whether it may go on to another budget.

        Raises:
          SnapshotMismatchError: It is of another model, or of a run with another idea of validation.
          ValueError: Processes see different snapshots.
        """
        if self._store is None:
            return
        latest = self._seen(self._store.latest())
        if latest is None:
            return
        # The first one puts damaged snapshots aside before the others look.
        step, tree = -1, None
        if self._processes.is_first:
            step, tree = _restored(run, self._store)
        self._processes.gather(step)
        if tree is None:
            step, tree = _restored(run, self._store)
        self._seen(step)
        run.resume(tree, extend=extend)

    def _seen(self, step: int | None) -> int | None:
        """The step, where all processes see the same one."""
        steps = self._processes.gather(-1 if step is None else step).ravel().astype(int).tolist()
        if self._store is not None and len(set(steps)) > 1:
            raise ValueError(
                f"the processes see different snapshots in {self._store.folder}, of steps {steps} (-1 is none). "
                "Keep the folder on a file system that all of them share."
            )
        return step


@contextlib.contextmanager
def durable(
    snapshots: str | os.PathLike[str] | Snapshots | None, tuner: AutoTuneNet, processes: Processes
) -> Iterator[Durable]:
    """Opens a folder, of which the first process is the writer, and closes it again; the user's `Snapshots` stay open.

    Raises:
      RuntimeError: The first process could not open it, and says why.
      ValueError, OSError: As `Snapshots`.
    """
    if snapshots is None or isinstance(snapshots, Snapshots):
        yield Durable(snapshots, processes)
        return
    opened, failure = None, None
    if processes.is_first:
        try:
            opened = Snapshots(snapshots, mode=tuner.mode, space=tuner.space)
        except Exception as error:
            failure = error
    # The others open a folder that is there, or do not wait for one that will not be.
    has_failed = bool(processes.gather(failure is not None)[0, 0])
    if failure is not None:
        raise failure
    if has_failed:
        raise RuntimeError(f"the first process could not open the snapshots in {snapshots}; it says why.")
    if opened is None:
        opened = Snapshots(snapshots, mode=tuner.mode, space=tuner.space, read_only=True)
    with opened:
        yield Durable(opened, processes)


def _restored(run: Run, store: Snapshots) -> tuple[int, Any]:
    """The latest good snapshot: its step and its tree.

    Raises:
      SnapshotMismatchError: It is of another model, or of a run with another idea of validation.
    """
    like = run.snapshot()
    try:
        return store.restore(like)
    except SnapshotMismatchError as error:
        has_eval = run.host.eval_step is not None
        try:
            store.restore({**like, "best": None if has_eval else run.host.state})
        except (SnapshotMismatchError, OSError):
            raise error from None
        raise SnapshotMismatchError(
            f"the snapshots in {store.folder} are of a run {'without' if has_eval else 'with'} eval_step, and this "
            f"one has {'one' if has_eval else 'none'}. Call fit as it was called when they were saved."
        ) from None
