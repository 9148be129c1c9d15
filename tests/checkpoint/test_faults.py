"""Damage, rivals and traps: what snapshots do about each of them."""

import json
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import threading
import warnings
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax import faults
from tests.stored import restore, state_at

MANIFEST = "manifest.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder of three snapshots, with ids 1 to 3 at steps 10, 20 and 30; not to be changed."""
    folder = tmp_path_factory.mktemp("sound")
    with atn.Snapshots(folder) as store:
        for step in (10, 20, 30):
            store.save(step, state_at(step))
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "copy")


# Damaged files.


@pytest.mark.parametrize("how", faults.CORRUPTIONS)
def test_every_damaged_file_leads_to_the_snapshot_before(sound, tmp_path, how):
    files = [p.relative_to(sound) for p in faults.snapshot_files(sound / "00000003")]
    assert len(files) > 5
    for number, file in enumerate(files):
        damaged = shutil.copytree(sound, tmp_path / str(number))
        faults.corrupt(damaged / file, how, seed=number)
        step, messages = restore(damaged)
        assert step == 20, file
        assert len(messages) == 1, messages
        assert messages[0].startswith(f"Snapshot 3 in {damaged} is damaged: "), messages
        assert file.name in messages[0]
        assert (damaged / "quarantine-00000003").is_dir()
        assert restore(damaged) == (20, [])  # said once; and the bad one stays out of the way


@pytest.mark.parametrize("seed", range(8))
def test_any_flipped_bit_of_the_data_is_noticed(folder, seed):
    data = max(faults.snapshot_files(folder / "00000003"), key=lambda p: p.stat().st_size)
    faults.corrupt(data, "flip", seed=seed)
    assert restore(folder)[0] == 20


def test_ids_of_quarantined_snapshots_are_not_used_again(folder):
    faults.corrupt(folder / "00000003" / MANIFEST, "empty")
    restore(folder)
    (folder / "index.json").unlink()
    with pytest.warns(atn.SnapshotWarning, match=r"index.json is missing.*rebuilt from the 2 snapshots"):
        store = atn.Snapshots(folder)
    assert store.save(40, state_at(40)) == 4
    store.close()


def test_a_snapshot_whose_folder_is_gone(folder):
    shutil.rmtree(folder / "00000003")
    step, messages = restore(folder)
    assert step == 20
    assert "Snapshot 3" in messages[0]
    assert "00000003 is missing" in messages[0]


@pytest.mark.parametrize("how", faults.CORRUPTIONS)
def test_a_damaged_index_is_rebuilt_without_loss(folder, how):
    faults.corrupt(folder / "index.json", how, seed=100)
    step, messages = restore(folder)
    assert step == 30
    assert len(messages) == 1
    assert "index.json" in messages[0]
    assert restore(folder) == (30, [])


def test_every_flipped_bit_of_the_index_is_noticed_or_harmless(sound, folder):
    # Harmless: a flip in the white space between entries.
    data = (sound / "index.json").read_bytes()
    bodies = set()
    for bit in range(0, 8 * len(data), 37):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / "index.json").write_bytes(changed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with atn.Snapshots(folder) as store:
                bodies.add(store.records())
    assert len(bodies) == 1


def test_index_and_newest_manifest_damaged_together(folder):
    (folder / "index.json").write_bytes(b"\x00" * 100)
    faults.corrupt(folder / "00000003" / MANIFEST, "truncate")
    step, messages = restore(folder)
    assert step == 20
    assert any("Snapshot 3" in m and MANIFEST in m for m in messages)


def test_when_all_are_damaged_nothing_is_loaded(folder):
    for number in (1, 2, 3):
        faults.corrupt(folder / f"0000000{number}" / MANIFEST, "flip")
    with atn.Snapshots(folder) as store:
        with pytest.warns(atn.SnapshotWarning) as caught, pytest.raises(OSError, match="3, 2, 1 damaged"):
            store.restore(state_at(0))
        assert [int(re.match(r"Snapshot (\d)", str(w.message))[1]) for w in caught] == [3, 2, 1]
        with pytest.raises(atn.NoSnapshotError):
            store.restore(state_at(0))
        store.save(50, state_at(50))  # and training can go on
        assert store.restore(state_at(0))[0] == 50


def test_one_asked_for_by_id_has_no_substitute(folder):
    faults.corrupt(folder / "00000002" / MANIFEST, "flip")
    with (
        atn.Snapshots(folder) as store,
        pytest.warns(atn.SnapshotWarning, match="Snapshot 2 "),
        pytest.raises(atn.SnapshotDamagedError, match="No sound snapshot 2 is left"),
    ):
        store.restore(state_at(0), which=2)


def test_a_reader_passes_over_but_touches_nothing(folder):
    faults.corrupt(folder / "00000003" / MANIFEST, "flip")
    before = {p: p.read_bytes() for p in faults.snapshot_files(folder)}
    step, messages = restore(folder, read_only=True)
    assert step == 20
    assert "Snapshot 3" in messages[0]
    assert {p: p.read_bytes() for p in faults.snapshot_files(folder)} == before


def test_arrays_written_wrong_are_noticed_though_the_files_are_whole(folder, monkeypatch):
    from autotunenet_jax.checkpoint import orbax_io

    write = orbax_io._write_arrays

    def write_wrong(path, arrays):
        write(path, {**arrays, "000001": arrays["000001"] + 1})

    monkeypatch.setattr(orbax_io, "_write_arrays", write_wrong)
    with atn.Snapshots(folder) as store:
        store.save(40, state_at(40))
    step, messages = restore(folder)
    assert step == 30
    assert "params/b differs from what was saved" in messages[0]


def test_sound_files_that_orbax_cannot_read_stay_where_they_are(folder, monkeypatch):
    import orbax.checkpoint as ocp

    restore_with_orbax = ocp.Checkpointer.restore

    def fail(self, path, *args, **kwargs):
        if "00000003" in str(path):
            raise KeyError("unknown codec")
        return restore_with_orbax(self, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "restore", fail)
        step, messages = restore(folder)
    assert step == 20
    assert "Snapshot 3" in messages[0]
    assert "unknown codec" in messages[0]
    assert restore(folder) == (30, [])


def test_running_out_of_memory_costs_no_snapshot(folder, monkeypatch):
    import orbax.checkpoint as ocp

    with atn.Snapshots(folder) as store:
        with monkeypatch.context() as patch:
            patch.setattr(ocp.Checkpointer, "restore", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
            with pytest.raises(MemoryError):
                store.restore(state_at(0))
        assert store.restore(state_at(0))[0] == 30


# Versions.


def rewrite(path, change):
    """Rewrites a JSON file of ours, checksum included."""
    body = json.loads(path.read_bytes())["body"]
    change(body)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({"crc32": zlib.crc32(canonical), "body": body}))
    return zlib.crc32(path.read_bytes())


def test_a_folder_of_a_newer_version_is_not_touched(folder):
    rewrite(folder / "index.json", lambda body: body.update(schema=2))
    before = {p: p.read_bytes() for p in faults.snapshot_files(folder)}
    with pytest.raises(atn.SnapshotVersionError, match=r"index.json has schema version 2; .* reads up to 1") as caught:
        atn.Snapshots(folder)
    assert isinstance(caught.value, ValueError)
    assert {p: p.read_bytes() for p in faults.snapshot_files(folder)} == before


def test_a_snapshot_of_a_newer_version_is_not_damaged(folder):
    crc = rewrite(folder / "00000003" / MANIFEST, lambda body: body.update(schema=2))
    rewrite(folder / "index.json", lambda body: body["records"][-1].update(manifest_crc32=crc))
    with atn.Snapshots(folder) as store, pytest.raises(atn.SnapshotVersionError, match="00000003"):
        store.restore(state_at(0))
    assert (folder / "00000003").is_dir()


# Traps.


class Bomb:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return pathlib.Path.touch, (self.sentinel,)


def test_a_pickle_bomb_is_never_opened(sound, tmp_path):
    sentinel = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(sentinel))
    names = [p.relative_to(sound) for p in faults.snapshot_files(sound)]
    for number, name in enumerate(names):
        trap = shutil.copytree(sound, tmp_path / str(number))
        (trap / name).write_bytes(bomb)
        restore(trap)
    trap = shutil.copytree(sound, tmp_path / "beside")
    for beside in ("x.pkl", "00000003/state.pickle", "00000003/arrays/checkpoint", "00000009"):
        (trap / beside).write_bytes(bomb)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", atn.SnapshotWarning)
        assert restore(trap)[0] == 20
    assert not sentinel.exists()
    pickle.loads(bomb)
    assert sentinel.exists()  # it would have gone off


@pytest.mark.parametrize("name", [MANIFEST, "arrays", "arrays/_METADATA", ""])
def test_symbolic_links_in_a_snapshot_are_refused(folder, tmp_path, name):
    path = folder / "00000003" / name
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    step, messages = restore(folder)
    assert step == 20
    assert "symbolic link" in messages[0]
    assert elsewhere.exists()


def test_links_in_place_of_our_own_files_are_refused(folder, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / "index.json").unlink()
    (folder / "index.json").symlink_to(victim)
    step, messages = restore(folder)
    assert step == 30
    assert "symbolic link" in messages[0]
    (folder / ".lock").unlink(missing_ok=True)
    (folder / ".lock").symlink_to(victim)
    with pytest.raises(PermissionError, match="symbolic link"):
        atn.Snapshots(folder)
    assert victim.read_text() == "precious"


def test_a_lock_that_is_a_folder_is_named_and_keeps_no_reader_out(folder):
    (folder / ".lock").unlink(missing_ok=True)
    (folder / ".lock").mkdir()
    with pytest.raises(atn.SnapshotDamagedError, match=r"\.lock .*Remove it"):
        atn.Snapshots(folder)
    with atn.Snapshots(folder, read_only=True) as store:
        assert store.latest() == 30
    assert (folder / ".lock").is_dir()


def test_a_link_is_not_followed_when_its_snapshot_is_retired(folder, tmp_path):
    precious = tmp_path / "precious"
    (folder / "00000001").rename(precious)
    (folder / "00000001").symlink_to(precious)
    with atn.Snapshots(folder, keep=1) as store:
        store.save(40, state_at(40))
        assert [r.id for r in store.records()] == [4]
    assert (precious / MANIFEST).exists()
    assert not (folder / "00000001").is_symlink()


def test_foreign_files_are_left_alone(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "plots").mkdir()
    with atn.Snapshots(folder, keep=1) as store:
        store.save(40, state_at(40))
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "plots").is_dir()


# Rivals, and what a kill leaves.


def test_a_second_writer_is_turned_away_at_open(tmp_path):
    with atn.Snapshots(tmp_path) as store:
        store.save(1, state_at(1), wait=True)
        with pytest.raises(atn.SnapshotFolderBusyError, match=str(tmp_path)) as caught:
            atn.Snapshots(tmp_path)
        assert isinstance(caught.value, OSError)
        code = "import sys, filelock; filelock.FileLock(sys.argv[1]).acquire(timeout=0)"
        rival = subprocess.run([sys.executable, "-c", code, tmp_path / ".lock"], capture_output=True, check=False)
        assert rival.returncode != 0
        assert b"Timeout" in rival.stderr
    assert restore(tmp_path) == (1, [])


def test_a_rival_in_another_process_is_named(tmp_path):
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as rival:
        assert rival.stdout.readline() == b"held\n"
        with pytest.raises(atn.SnapshotFolderBusyError, match=str(tmp_path)):
            atn.Snapshots(tmp_path)
        rival.stdin.close()
    atn.Snapshots(tmp_path).close()


def test_a_forgotten_store_lets_go_of_the_folder(tmp_path):
    store = atn.Snapshots(tmp_path)
    store.save(1, state_at(1), wait=True)
    del store
    assert restore(tmp_path) == (1, [])


def test_saves_from_several_threads_take_turns(tmp_path):
    with atn.Snapshots(tmp_path, keep=20) as store:
        threads = [threading.Thread(target=store.save, args=(0, state_at(s))) for s in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(r.id for r in store.records()) == list(range(1, 9))


def test_what_a_kill_leaves_between_two_steps_is_settled(folder):
    # Killed after the snapshot got its name, before the index listed it: it is complete, and kept.
    rewrite(folder / "index.json", lambda body: body.update(records=body["records"][:2], next_id=3))
    # Killed while one was being written, and while one was being deleted.
    for name in (".tmp-00000009", ".old-00000000"):
        (folder / name).mkdir()
        (folder / name / "arrays").write_text("half")
    assert restore(folder) == (30, [])
    sound = ["00000001", "00000002", "00000003"]
    # Opening deletes nothing; the next save does.
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == [".old-00000000", ".tmp-00000009", *sound]
    with atn.Snapshots(folder) as store:
        store.save(40, state_at(40))
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["00000002", "00000003", "00000004"]


def test_the_state_is_copied_before_save_returns(tmp_path):
    state = {"w": np.zeros(100_000), "d": jnp.zeros(100_000)}
    with atn.Snapshots(tmp_path) as store:
        store.save(0, state)
        state["w"][:] = 1.0
        state["d"].delete()
        _, saved = store.restore({"w": np.zeros(100_000), "d": jnp.zeros(100_000)})
    assert not saved["w"].any()
    assert not saved["d"].any()
