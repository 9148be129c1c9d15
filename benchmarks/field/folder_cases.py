"""C, the part of the folders: nothing sound is deleted, and a save that was waited for is there."""

import contextlib
import os
import pathlib
import shutil
import signal
import threading
import time
from typing import Any

import jax.numpy as jnp

import autotunenet_jax as atn
from autotunenet_jax import faults as injected

from .registry import Outcome, case
from .scratch import folder


def _tree(value: float) -> dict[str, Any]:
    return {"w": jnp.full(5, value), "n": jnp.int32(value)}


@case("C", "Snapshots", short=("Snapshots",))
def a_folder_copied_while_the_run_went_on(way: str) -> Outcome:
    """The copy has the snapshots of an early moment and the index of a later one."""
    with folder() as one, folder() as two:
        with atn.Snapshots(one, keep=2) as store:
            store.save(5, _tree(5.0), wait=True)
            store.save(6, _tree(6.0), wait=True)
            for name in ("00000001", "00000002"):
                shutil.copytree(pathlib.Path(one, name), pathlib.Path(two, name))
            for step in (7, 8, 9):
                store.save(step, _tree(float(step)), wait=True)
            shutil.copy(pathlib.Path(one, "index.json"), two)
        try:
            with atn.Snapshots(two) as store:
                step, tree = store.restore(_tree(0.0))
                restored = f"restored {step}, {float(tree['w'][0]):g}"
        except Exception as error:
            restored = type(error).__name__
        left = sorted(p.name for p in pathlib.Path(two).iterdir() if p.is_dir())
    is_kept = all(any(name in there for there in left) for name in ("00000001", "00000002"))
    return "step 6 restored, nothing deleted", f"{restored}, left {left}", is_kept and restored == "restored 6, 6"


@case("C", "Snapshots")
def opening_deletes_nothing_that_is_not_its_own(way: str) -> Outcome:
    """A folder named by a date is a user's own."""
    with folder() as path:
        with atn.Snapshots(path) as store:
            store.save(1, _tree(1.0), wait=True)
        own = pathlib.Path(path, "00000000")
        own.mkdir()
        (own / "notes.txt").write_text("mine")
        dated = pathlib.Path(path, "20240131")
        dated.mkdir()
        (dated / "notes.txt").write_text("mine")
        with atn.Snapshots(path) as store:
            step = store.latest()
            store.save(2, _tree(2.0), wait=True)
        there = sorted(str(p.relative_to(path)) for p in pathlib.Path(path).rglob("notes.txt"))
    return "2 notes left, latest 1", f"{there}, latest {step}", len(there) == 2 and step == 1


def _interrupt_a_write(path: str) -> None:
    """Sends SIGINT once something is being written."""
    for _ in range(4000):
        if any(p.name.startswith(".tmp") for p in pathlib.Path(path).iterdir()):
            break
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGINT)


@case("C", "Snapshots")
def a_signal_while_a_save_is_awaited(way: str) -> Outcome:
    with folder() as path, injected.slow_disk(delay_s=0.08):
        store = atn.Snapshots(path)
        timer = threading.Thread(target=_interrupt_a_write, args=(path,))
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            timer.start()
            with contextlib.suppress(KeyboardInterrupt):
                store.save(3, {"w": jnp.zeros(1_500_000)}, wait=True)
            store.close()
        finally:
            timer.join()
            signal.signal(signal.SIGINT, before)
        partial = [p.name for p in pathlib.Path(path).iterdir() if p.name.startswith(".tmp")]
        with atn.Snapshots(path) as again:
            latest = again.latest()
        time.sleep(0.5)
    return "close waits; step 3 is there", f"partial {partial}, latest {latest}", not partial and latest == 3
