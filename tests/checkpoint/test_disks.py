"""Disks that fail: training goes on, the user is told once, saving resumes when it can."""

import os
import re
import shutil
import warnings

import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax import faults
from tests.stored import assert_is_state, restore, state_at

# Orbax lets the exception of a thread that cannot write end that thread as well.
orbax_threads_fail = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def save_all(store, steps):
    """Saves at some steps; returns what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            store.save(step, state_at(step))
        store.wait()
    return [str(w.message) for w in caught]


def assert_survives(store, fault, *, reason):
    assert save_all(store, [1]) == []
    with fault:
        messages = save_all(store, [2, 3, 4])
        assert store.is_degraded
        assert re.search(reason, store.failure), store.failure
    assert len(messages) == 1, messages
    assert "Saving snapshot 2 (step 2)" in messages[0]
    assert "Training goes on" in messages[0]
    assert store.latest() == 1
    assert save_all(store, [5]) == []
    assert not store.is_degraded
    step, tree = store.restore(state_at(0))
    assert step == 5
    assert_is_state(tree, 5)
    assert not list(store.folder.glob(".tmp-*"))
    with faults.failing_writes():
        assert len(save_all(store, [6, 7])) == 1  # a new trouble is told anew
    assert save_all(store, [8]) == []


@orbax_threads_fail
@pytest.mark.parametrize("limit_bytes", [0, 300, 2000])
def test_writes_that_fail(tmp_path, limit_bytes):
    with atn.Snapshots(tmp_path) as store:
        assert_survives(store, faults.failing_writes(limit_bytes=limit_bytes), reason=".")


def can_mount(tmp_path):
    try:
        with faults.small_disk(tmp_path, size_bytes=2**20):
            return True
    except (OSError, FileNotFoundError):
        return False


@orbax_threads_fail
def test_a_disk_that_is_full(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("needs the right to mount a small file system")
    with faults.small_disk(tmp_path, size_bytes=4 * 2**20):
        filler = tmp_path / "filler"

        class Full:
            def __enter__(self):
                filler.write_bytes(b"x" * int(3.9 * 2**20))

            def __exit__(self, *_):
                filler.unlink()

        with atn.Snapshots(tmp_path / "store") as store:
            assert_survives(store, Full(), reason="the disk has .* bytes free")


@orbax_threads_fail
def test_a_disk_that_fills_up_while_a_snapshot_is_written(tmp_path, monkeypatch):
    if not can_mount(tmp_path):
        pytest.skip("needs the right to mount a small file system")
    from autotunenet_jax.checkpoint import store as module

    # The check for free space passes, as it does when somebody else fills the disk a moment later.
    monkeypatch.setattr(module, "_SPARE_BYTES", -(2**30))
    big = {"w": np.random.default_rng(0).normal(size=500_000)}
    with faults.small_disk(tmp_path, size_bytes=2 * 2**20), atn.Snapshots(tmp_path / "store") as store:
        assert save_all(store, [1]) == []
        with pytest.warns(atn.SnapshotWarning, match=r"(?i)no space|resource_exhausted"):
            store.save(2, big, wait=True)
        assert store.restore(state_at(0))[0] == 1
        monkeypatch.undo()
        assert save_all(store, [3]) == []
        assert store.latest() == 3


@orbax_threads_fail
def test_a_folder_that_turns_read_only(tmp_path):
    if os.geteuid() == 0 and not can_mount(tmp_path):
        pytest.skip("root needs the right to mount")
    with atn.Snapshots(tmp_path) as store:
        assert_survives(store, faults.read_only_folder(tmp_path), reason="Read-only file system|Permission denied")


def test_opening_a_read_only_folder(tmp_path):
    folder = tmp_path / "store"
    if os.geteuid() == 0 and not can_mount(tmp_path):
        pytest.skip("root needs the right to mount")
    with atn.Snapshots(folder) as store:
        assert save_all(store, [20, 30]) == []
    with faults.read_only_folder(folder):
        with pytest.raises(OSError, match="read_only=True"):
            atn.Snapshots(folder)
        assert restore(folder, read_only=True) == (30, [])


def test_a_folder_that_is_removed(tmp_path):
    with atn.Snapshots(tmp_path / "runs" / "a") as store:
        assert save_all(store, [1, 2]) == []
        shutil.rmtree(tmp_path / "runs")
        messages = save_all(store, [3])
        assert len(messages) == 1
        assert "was removed while in use" in messages[0]
        assert [(r.id, r.step) for r in store.records()] == [(3, 3)]
        with pytest.raises(atn.SnapshotFolderBusyError):  # and it is locked again
            atn.Snapshots(tmp_path / "runs" / "a")
        assert save_all(store, [4]) == []
    assert restore(tmp_path / "runs" / "a") == (4, [])


@orbax_threads_fail
def test_a_folder_that_cannot_be_made_anew(tmp_path):
    parent = tmp_path / "runs"

    class Replaced:
        def __enter__(self):
            parent.rename(tmp_path / "away")
            parent.write_text("a file")

        def __exit__(self, *_):
            parent.unlink()
            (tmp_path / "away").rename(parent)

    with atn.Snapshots(parent / "a") as store:
        assert_survives(store, Replaced(), reason="NotADirectoryError|FileExistsError")


def test_a_snapshot_removed_by_hand_is_passed_over_while_running(tmp_path):
    with atn.Snapshots(tmp_path) as store:
        save_all(store, [1, 2])
        shutil.rmtree(tmp_path / "00000002")
        with pytest.warns(atn.SnapshotWarning, match="Snapshot 2 "):
            assert store.restore(state_at(0))[0] == 1


def test_an_index_that_cannot_be_written_leaves_no_litter(tmp_path, monkeypatch):
    with atn.Snapshots(tmp_path) as store:
        assert save_all(store, [1]) == []
        with monkeypatch.context() as patch:
            patch.setattr(type(store._folder), "commit", lambda *_: (_ for _ in ()).throw(OSError("index")))
            assert len(save_all(store, [2])) == 1
        assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["00000001"]
        assert save_all(store, [3]) == []
    assert restore(tmp_path) == (3, [])


def test_warnings_point_at_the_line_that_saved(tmp_path):
    with atn.Snapshots(tmp_path) as store, faults.failing_writes(), pytest.warns(atn.SnapshotWarning) as caught:
        store.save(1, state_at(1), wait=True)
    assert caught[0].filename == __file__


def test_no_host_memory_for_the_copy(tmp_path, monkeypatch):
    from autotunenet_jax.checkpoint import store as module

    def fail(*_):
        raise MemoryError("no memory")

    with atn.Snapshots(tmp_path) as store:
        with monkeypatch.context() as patch, pytest.warns(atn.SnapshotWarning, match="no memory"):
            patch.setattr(module, "copy_to_host", fail)
            store.save(1, state_at(1))
        store.save(2, state_at(2))
        assert store.latest() == 2
