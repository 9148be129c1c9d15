"""Folders that somebody else has had a hand in: nothing of theirs is lost, and nothing of them gets in."""

import json
import os
import pathlib
import shutil
import signal
import threading
import time
import zlib

import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax import faults
from autotunenet_jax.checkpoint.entries import DamagedFileError, entry_of
from autotunenet_jax.checkpoint.index import SnapshotRecord, read_json
from autotunenet_jax.checkpoint.leaves import LeafSpec
from autotunenet_jax.checkpoint.zstd import decoded_limit
from tests.stored import restore, state_at


def folders(root):
    return sorted(p.name for p in pathlib.Path(root).iterdir() if p.is_dir())


@pytest.fixture
def folder(tmp_path):
    with atn.Snapshots(tmp_path / "run", keep=2) as store:
        for step in (10, 20):
            store.save(step, state_at(step))
    return tmp_path / "run"


# Nothing is deleted on opening.


def test_a_copy_made_while_the_run_went_on_keeps_its_snapshots(folder, tmp_path):
    """The snapshots of an early moment, the index of a later one; opened twice, then saved to."""
    for name in ("00000001", "00000002"):
        shutil.copytree(folder / name, tmp_path / "copy" / name)
    with atn.Snapshots(folder, keep=2) as store:
        for step in (30, 40, 50):
            store.save(step, state_at(step), wait=True)
    shutil.copy(folder / "index.json", tmp_path / "copy")
    step, messages = restore(tmp_path / "copy")
    assert step == 20 and all("is missing" in message for message in messages)
    assert folders(tmp_path / "copy") == ["00000001", "00000002"]
    assert restore(tmp_path / "copy") == (20, [])
    with atn.Snapshots(tmp_path / "copy", keep=2) as store:
        assert store.save(60, state_at(60), wait=True) == 6
        assert [record.step for record in store.records()] == [20, 60]


def test_a_reader_beside_the_copy_sees_them_too(folder):
    record = json.loads((folder / "index.json").read_bytes())["body"]
    seal(folder / "index.json", {**record, "records": []})
    with atn.Snapshots(folder, read_only=True) as store:
        assert store.latest() == 20


@pytest.mark.parametrize("name", ["20240131", "00000003", "quarantine-notes"])
def test_a_folder_of_the_users_own_stays_where_it_is(folder, name):
    (folder / name).mkdir()
    (folder / name / "notes.txt").write_text("mine")
    with atn.Snapshots(folder) as store:
        number = store.save(30, state_at(30), wait=True)
        assert not store.is_degraded and store.latest() == 30 and number < 10
    assert (folder / name / "notes.txt").read_text() == "mine"


# Entries that lie.


def seal(path, body):
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(json.dumps({"crc32": zlib.crc32(canonical), "body": body}).encode())


RECORD = {
    **{"id": 1, "step": 5, "branch": "main", "parent": None, "metric": 0.5, "status": "healthy", "size_bytes": 8},
    **{"is_abandoned": False, "structure": "s", "space": None, "saved_at": 1.0, "manifest_crc32": 7},
}
LEAF = {
    **{"name": "w", "kind": "array", "container": "jax", "dtype": "float32", "shape": [3], "is_weak": False},
    **{"impl": "", "value": None, "crc32": 5},
}
WRONG = (None, True, -1, 1.5, "x", [], {}, [None], 10**30)


@pytest.mark.parametrize(("kind", "sound"), [(SnapshotRecord, RECORD), (LeafSpec, LEAF)])
def test_every_entry_is_checked(kind, sound):
    kind.from_json(sound)
    for name, value in sound.items():
        with pytest.raises(DamagedFileError):
            kind.from_json({key: other for key, other in sound.items() if key != name} | {name: b"bytes"})
        for wrong in WRONG:
            if type(wrong) is not type(value):
                try:
                    kind.from_json({**sound, name: wrong})
                except DamagedFileError:
                    continue
                # What may be absent, a number or text.
                assert wrong is None or isinstance(wrong, str | int | float)


def test_a_bool_is_no_number_and_absence_is_told():
    for body in ({"n": True}, {}, None, [1]):
        with pytest.raises(DamagedFileError, match="its n is"):
            entry_of(body, "n", int)


def test_a_file_of_many_tiny_values_is_not_parsed(tmp_path):
    (tmp_path / "index.json").write_text('{"crc32": 0, "body": [' + "[]," * 500_000 + "[]]}")
    with pytest.raises(DamagedFileError, match="more values"):
        read_json(tmp_path / "index.json")


def test_manifests_sealed_anew_never_get_in(folder):
    manifest = folder / "00000002" / "manifest.json"
    body = json.loads(manifest.read_bytes())["body"]
    index = json.loads((folder / "index.json").read_bytes())["body"]
    for number, change in enumerate(
        [
            {"leaves": 3},
            {"files": None},
            {"files": [{"path": "../../secret", "size": 1, "crc32": 1}]},
            {"files": [{"path": "a\0b", "size": 1, "crc32": 1}]},
            {"leaves": [{**body["leaves"][0], "shape": [10**12]}, *body["leaves"][1:]]},
            {"schema": None},
        ]
    ):
        copy = pathlib.Path(shutil.copytree(folder, folder.parent / str(number)))
        crafted = copy / "00000002" / "manifest.json"
        seal(crafted, {**body, **change})
        records = [*index["records"][:-1], {**index["records"][-1], "manifest_crc32": zlib.crc32(crafted.read_bytes())}]
        seal(copy / "index.json", {**index, "records": records})
        try:
            assert restore(copy)[0] == 10, change
        except atn.SnapshotMismatchError:
            assert "leaves" in change


def test_arrays_laid_out_to_take_memory_are_not_read(folder):
    """A chunk larger than its array, and a compressed one, which may hold any amount of zeros."""
    import tensorstore

    from autotunenet_jax.checkpoint import orbax_io

    spec = LeafSpec(name="w", kind="array", container="jax", dtype="float32", shape=(3,))
    sound = {"shape": [3], "chunks": [3], "compressor": None, "filters": None}
    for number, change in enumerate(
        [
            {},
            {"chunks": [10**9]},
            {"shape": [10**9]},
            {"compressor": {"id": "zlib"}},
            {"compressor": {"id": "zstd"}},
            {"chunks": []},
            {"shape": "x"},
        ]
    ):
        path = folder.parent / f"store{number}"
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
        store.write("000000/.zarray", json.dumps({**sound, **change}).encode()).result()
        if "compressor" in change:
            store.write("000000/0", BOMB).result()
        if change:
            with pytest.raises(DamagedFileError):
                orbax_io._check_layouts(path, {"000000": spec})
        else:
            orbax_io._check_layouts(path, {"000000": spec})


# A hundred blocks of 128 kB, each one zero repeated.
BLOCK = (2**17 << 3 | 2).to_bytes(3, "little") + b"\0"
BOMB = bytes([0x28, 0xB5, 0x2F, 0xFD, 0x00, 0x58]) + 99 * BLOCK + bytes([BLOCK[0] | 1]) + BLOCK[1:]


@pytest.mark.parametrize("size", [0, 1, 1000, 300_000, 2**20])
def test_what_compressed_chunks_may_hold_is_never_less_than_they_do(tmp_path, size):
    import tensorstore

    rng = np.random.default_rng(size)
    for number, array in enumerate((np.zeros(size, np.uint8), rng.integers(0, 9, size), rng.bytes(size))):
        array = np.frombuffer(array, np.uint8) if isinstance(array, bytes) else array.astype(np.uint8)
        spec = {"driver": "zarr", "kvstore": f"file://{tmp_path}/{number}/"}
        meta = {"shape": [size], "chunks": [max(size, 1)], "dtype": "|u1", "compressor": {"id": "zstd", "level": 1}}
        store = tensorstore.open({**spec, "metadata": meta}, create=True).result()
        store.write(array).result()
        file = tmp_path / str(number) / "0"
        limit = decoded_limit(file.read_bytes()) if file.exists() else 0
        assert (size if array.any() else 0) <= limit <= size + 2**18


def test_a_bomb_is_measured_without_being_lit():
    assert len(BOMB) < 500 and decoded_limit(BOMB) == 100 * 2**17
    for wrong in (BOMB[:-6], b"not compressed at all", BOMB[:5]):
        with pytest.raises(DamagedFileError):
            decoded_limit(wrong)


# Things that are no files.


@pytest.mark.parametrize(
    "name", ["index.json", "00000002/manifest.json", "00000002", "00000002/extra", ".tmp-00000003"]
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipes_and_folders_hang_nothing(folder, name, make):
    there = folder / name
    if there.is_dir():
        shutil.rmtree(there)
    there.unlink(missing_ok=True)
    make(there)
    step = []
    thread = threading.Thread(target=lambda: step.append(restore(folder)[0]), daemon=True)
    thread.start()
    thread.join(20)
    # A folder that is empty changes nothing inside a snapshot.
    is_harmless = name in ("index.json", ".tmp-00000003") or (name == "00000002/extra" and make is os.mkdir)
    assert step == [20 if is_harmless else 10]
    with atn.Snapshots(folder) as store:
        store.save(30, state_at(30), wait=True)
        assert not store.is_degraded


# Waiting.


def test_a_signal_while_a_save_is_awaited_lets_nobody_in_before_it_is_done(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    try:
        with faults.slow_disk(delay_s=0.1):
            store = atn.Snapshots(tmp_path)
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                store.save(7, {"w": np.zeros(1000)}, wait=True)
                time.sleep(5)
            assert store.is_saving
            store.close()
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    with atn.Snapshots(tmp_path) as store:
        assert store.latest() == 7
    assert folders(tmp_path) == ["00000001"]
