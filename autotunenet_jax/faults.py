"""Faults to inject into a training run: bad batches and losses, failing disks, damaged files, kills.

For tests of what was built on this library as well as of the library itself: a run that is said to survive something
should have been seen to survive it.
"""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args
from unittest import mock

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

Corruption = Literal["truncate", "empty", "delete", "flip"]
CORRUPTIONS: tuple[Corruption, ...] = ("truncate", "empty", "delete", "flip")

StepFault = Literal["nan", "inf", "huge", "spike", "poison", "nan_batch", "flip_labels", "oom", "wreck"]
STEP_FAULTS: tuple[StepFault, ...] = get_args(StepFault)

# Finite, so that a test for finite values lets it pass, and large enough to overflow when squared.
_HUGE_LOSS = 1e30
_SPIKE_FACTOR = 1e3
_WRECK_FACTOR = 30.0


# Training.


def inject(
    train_step: Callable[[Any, Any, Any], tuple[Any, Any]],
    batches: Callable[[int, Any], Any] | Iterable[Any],
    plan: Mapping[int, StepFault],
    *,
    is_repeated: bool = False,
) -> tuple[Callable[[Any, Any, Any], tuple[Any, Any]], Callable[[int, Any], Any] | Iterator[Any]]:
    """Makes a training run go wrong at given steps.

    Example:
        >>> step, data = inject(lambda state, batch, hp: (state, batch.sum()), lambda i, hp: jnp.ones(2), {1: "inf"})
        >>> [float(step({}, data(i, None), None)[1]) for i in range(3)]
        [2.0, inf, 2.0]

    Args:
      train_step: ``(state, batch, hp) -> (state, loss)``, pure; the one returned stays jit-able and compiles once.
      batches: ``(step, hp) -> batch``, or an iterable of batches.
      plan: What happens at which step (for an iterable: at which batch, from 0). ``"nan"``, ``"inf"``, ``"huge"``
        (1e30) and ``"spike"`` (times 1000) replace the loss; ``"poison"`` makes the new state NaN, ``"wreck"``
        multiplies it by 30;
        ``"nan_batch"`` makes the batch's real numbers NaN; ``"flip_labels"`` reverses the batch's integers along
        their first axis; ``"oom"`` fails the step from within, as running out of memory does, after the
        inputs were donated.
      is_repeated: Whether a step that is asked for again (after a rollback, by a fork) fails again.

    Returns:
      ``train_step`` and ``batches`` to give to the training loop together: batches carry the fault along.

    Raises:
      ValueError: The plan names an unknown fault.
    """
    unknown = sorted(set(plan.values()) - set(STEP_FAULTS))
    if unknown:
        raise ValueError(f"Faults must be among {', '.join(STEP_FAULTS)}; got {', '.join(map(repr, unknown))}.")
    left = dict(plan)
    can_run_out = "oom" in plan.values()

    def faulty_batch(step: int, batch: Any) -> tuple[Any, Any]:
        fault = left.get(step) if is_repeated else left.pop(step, None)
        if fault in ("nan_batch", "flip_labels"):
            return jax.tree.map(lambda leaf: _spoil(leaf, fault), batch), np.int32(-1)
        return batch, np.int32(STEP_FAULTS.index(fault) if fault else -1)

    def faulty_step(state: Any, batch: tuple[Any, Any], hp: Any) -> tuple[Any, Any]:
        batch, code = batch
        state, loss = train_step(state, batch, hp)
        if can_run_out:
            is_oom = code == STEP_FAULTS.index("oom")
            loss = jax.lax.cond(is_oom, _run_out_of_memory, lambda x: x, loss)
        wrong = {"nan": jnp.nan, "inf": jnp.inf, "huge": _HUGE_LOSS, "spike": loss * _SPIKE_FACTOR}
        for fault, value in wrong.items():
            loss = jnp.where(code == STEP_FAULTS.index(fault), jnp.asarray(value, loss.dtype), loss)
        is_poisoned = code == STEP_FAULTS.index("poison")
        factor = jnp.where(code == STEP_FAULTS.index("wreck"), _WRECK_FACTOR, 1.0)

        def damaged(leaf: Any) -> Any:
            return jnp.where(is_poisoned, jnp.nan, leaf * factor).astype(leaf.dtype) if _is_real(leaf) else leaf

        return jax.tree.map(damaged, state), loss

    if callable(batches):
        return faulty_step, lambda step, hp: faulty_batch(int(step), batches(step, hp))
    return faulty_step, (faulty_batch(i, batch) for i, batch in enumerate(batches))


def _is_real(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _spoil(leaf: Any, fault: str) -> Any:
    if fault == "nan_batch":
        return np.full_like(leaf, np.nan) if _is_real(leaf) else leaf
    is_label = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.integer) and np.ndim(leaf)
    return np.flip(np.asarray(leaf), 0) if is_label else leaf


def _run_out_of_memory(loss: jax.Array) -> jax.Array:
    def fail(_: Any) -> Any:
        raise MemoryError("RESOURCE_EXHAUSTED: out of memory (injected)")

    return jax.experimental.io_callback(fail, jax.ShapeDtypeStruct(loss.shape, loss.dtype), loss)


# Files.


def snapshot_files(snapshot: str | os.PathLike[str]) -> tuple[pathlib.Path, ...]:
    """All files below a folder, sorted: those of one snapshot, or of a whole snapshot folder."""
    return tuple(sorted(p for p in pathlib.Path(snapshot).rglob("*") if p.is_file()))


def corrupt(path: str | os.PathLike[str], how: Corruption, *, seed: int = 0) -> None:
    """Damages a file.

    Args:
      path: The file.
      how: ``"truncate"`` cuts it to half, ``"empty"`` to nothing, ``"delete"`` removes it, ``"flip"`` inverts one bit.
      seed: Decides which bit.

    Raises:
      ValueError: An unknown way, or no bit to flip.
    """
    path = pathlib.Path(path)
    data = bytearray(path.read_bytes())
    match how:
        case "truncate":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "delete":
            path.unlink()
        case "flip" if data:
            bit = random.Random(seed).randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
        case _:
            raise ValueError(
                f"A file of {len(data)} bytes cannot be damaged by {how!r}; ways: {', '.join(CORRUPTIONS)}."
            )


# Disks, clocks, processes.


@contextlib.contextmanager
def failing_writes(*, limit_bytes: int = 0) -> Iterator[None]:
    """Makes every write of this process beyond a file size fail, as on a disk that is full.

    The operating system does it (``RLIMIT_FSIZE``), so native code meets the failure as well. POSIX only.

    Args:
      limit_bytes: Largest size a file may grow to.
    """
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def read_only_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Makes a folder read only: by its mode, and for root, whom modes do not stop, by a read-only mount on it.

    Raises:
      OSError: Root in a container without the right to mount.
    """
    folder = pathlib.Path(folder)
    if os.geteuid() != 0:
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(mode)
        return
    _mount("--bind", str(folder), str(folder))
    try:
        _mount("-o", "remount,ro,bind", str(folder))
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def small_disk(folder: str | os.PathLike[str], *, size_bytes: int) -> Iterator[None]:
    """Mounts an empty file system of a given size on a folder; root only.

    Raises:
      OSError: Not root, or in a container without the right to mount.
    """
    _mount("-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder))
    try:
        yield
    finally:
        # What was open a moment ago may keep the file system busy: detach it now, it goes when the last user does.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"Cannot mount: {done.stderr.strip()}")


@contextlib.contextmanager
def slow_disk(*, delay_s: float) -> Iterator[None]:
    """Makes every ``os.fsync`` take longer, in seconds."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(delay_s)
        fsync(descriptor)

    with mock.patch("os.fsync", slow):
        yield


@contextlib.contextmanager
def clock_jump(*, seconds: float) -> Iterator[None]:
    """Sets the wall clock that Python sees forwards, or backwards, as time synchronisation does."""
    now = time.time
    with mock.patch("time.time", lambda: now() + seconds):
        yield


def kill_after(seconds: float) -> threading.Timer:
    """Starts the countdown to a ``SIGKILL`` of this process, from which no clean-up saves it.

    Args:
      seconds: From now.

    Returns:
      The timer; ``cancel()`` calls it off.
    """
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    return timer
