"""H. Let no one in: what a folder holds is bounded by its files and the template, in every reader."""

import json
import os
import pathlib
import shutil
import socket
import threading
import zlib
from typing import Any

import jax.numpy as jnp

import autotunenet_jax as atn

from . import frameworks
from .registry import Outcome, case
from .scratch import folder

LIKE = {"w": jnp.arange(48.0), "n": jnp.int32(0), "t": "x"}
ERRORS = (atn.SnapshotDamagedError, atn.NoSnapshotError, atn.SnapshotMismatchError, atn.SnapshotVersionError)


def _made(path: str) -> None:
    with atn.Snapshots(path) as store:
        for step in (2, 3):
            store.save(step, {**LIKE, "n": jnp.int32(step)}, wait=True)


def _seal(body: Any) -> bytes:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return json.dumps({"crc32": zlib.crc32(canonical), "body": body}).encode()


def _change(path: pathlib.Path, change: Any) -> None:
    body = json.loads(path.read_bytes())["body"]
    path.write_bytes(_seal(change(body) or body))


def _manifest(path: str, change: Any) -> None:
    """Changes a manifest and makes every checksum right again."""
    manifest = pathlib.Path(path, "00000002", "manifest.json")
    _change(manifest, change)
    crc = zlib.crc32(manifest.read_bytes())

    def relist(body: Any) -> None:
        body["records"][-1]["manifest_crc32"] = crc

    _change(pathlib.Path(path, "index.json"), relist)


def _opened(path: str, limit_s: float = 15.0) -> str:
    """What opening and restoring gives: a step, or the name of an error, or a hang."""
    out: list[str] = []

    def look() -> None:
        try:
            with atn.Snapshots(path) as store:
                out.append(f"step {store.restore(LIKE)[0]}")
        except ERRORS as error:
            out.append(f"ours: {type(error).__name__}")
        except BaseException as error:
            out.append(type(error).__name__)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(limit_s)
    return out[0] if out else "HANGS"


def _all(attacks: dict[str, Any]) -> Outcome:
    wrong = []
    for name, attack in attacks.items():
        with folder() as path:
            _made(path)
            attack(path)
            got = _opened(path)
        if not got.startswith(("step", "ours")):
            wrong.append(f"{name}: {got}")
    return f"{len(attacks)} give a sound snapshot or an error of ours", "; ".join(wrong) or "so it is", not wrong


def _set(key: str, value: Any) -> Any:
    return lambda path: _manifest(path, lambda body: {**body, key: value})


def _drop(key: str) -> Any:
    return lambda path: _manifest(path, lambda body: {k: v for k, v in body.items() if k != key})


@case("H", "Snapshots", short=("Snapshots",))
def manifests_sealed_anew(way: str) -> Outcome:
    with folder() as path:
        _made(path)
        body = json.loads(pathlib.Path(path, "00000002", "manifest.json").read_bytes())["body"]
    attacks: dict[str, Any] = {}
    for key in body:
        attacks[f"{key} gone"] = _drop(key)
        for label, value in {"null": None, "number": 7, "text": "x", "list": [1], "object": {"a": 1}}.items():
            attacks[f"{key} {label}"] = _set(key, value)
    attacks["a list"] = lambda path: _manifest(path, lambda body: [body])
    return _all(attacks)


@case("H", "Snapshots")
def leaves_and_records_sealed_anew(way: str) -> Outcome:
    """Single entries of the lists in a manifest and an index are of a wrong type."""
    attacks: dict[str, Any] = {}
    with folder() as path:
        _made(path)
        body = json.loads(pathlib.Path(path, "00000002", "manifest.json").read_bytes())["body"]
        index = json.loads(pathlib.Path(path, "index.json").read_bytes())["body"]
    for name, value in body.items():
        if not (isinstance(value, list) and value and isinstance(value[0], dict)):
            continue
        for key in value[0]:
            for bad in (None, -1, "x", [], {}, 10**30):

                def attack(path: str, name: str = name, key: str = key, bad: Any = bad) -> None:
                    def change(body: Any) -> None:
                        body[name][0][key] = bad

                    _manifest(path, change)

                attacks[f"{name}.{key} = {str(bad)[:6]}"] = attack
    for key in index["records"][0]:
        for bad in (None, -1, "x", [], {}):

            def attack_index(path: str, key: str = key, bad: Any = bad) -> None:
                def change(body: Any) -> None:
                    body["records"][-1][key] = bad

                _change(pathlib.Path(path, "index.json"), change)

            attacks[f"record.{key} = {bad}"] = attack_index
    for bad in (None, "x", [], 1.5):
        attacks[f"next_id = {bad}"] = lambda path, bad=bad: _change(
            pathlib.Path(path, "index.json"), lambda body: {**body, "next_id": bad}
        )
    return _all(attacks)


def _fifo(path: str, name: str) -> None:
    there = pathlib.Path(path, name)
    if there.is_dir():
        shutil.rmtree(there)
    elif there.exists():
        there.unlink()
    os.mkfifo(there)


def _as_folder(path: str, name: str) -> None:
    there = pathlib.Path(path, name)
    there.unlink(missing_ok=True)
    there.mkdir()


def _link(path: str, name: str) -> None:
    there = pathlib.Path(path, name)
    there.rename(there.with_name("elsewhere"))
    there.symlink_to("elsewhere")


NAMES = ("index.json", "00000002/manifest.json", "00000002", ".lock", "00000002/extra", ".tmp-00000003")


@case("H", "Snapshots", short=("Snapshots",))
def pipes_folders_and_links_in_the_place_of_files(way: str) -> Outcome:
    attacks: dict[str, Any] = {f"pipe {name}": lambda path, name=name: _fifo(path, name) for name in NAMES}
    attacks |= {f"folder {n}": lambda path, n=n: _as_folder(path, n) for n in NAMES if n != "00000002"}
    attacks |= {f"link {n}": lambda path, n=n: _link(path, n) for n in NAMES[:3]}
    return _all(attacks)


def _socket(path: str, name: str) -> None:
    there = pathlib.Path(path, name)
    there.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(there))


def _loop(path: str, name: str) -> None:
    there = pathlib.Path(path, name)
    there.unlink(missing_ok=True)
    there.symlink_to(there)


def _vast(path: str, name: str) -> None:
    with open(pathlib.Path(path, name), "wb") as file:
        file.truncate(2**42)


@case("H", "Snapshots")
def sockets_loops_of_links_and_vast_files(way: str) -> Outcome:
    names = NAMES[:2]
    attacks: dict[str, Any] = {f"socket {n}": lambda path, n=n: _socket(path, n) for n in (*names, ".lock")}
    attacks |= {f"loop {n}": lambda path, n=n: _loop(path, n) for n in names}
    attacks |= {f"vast {n}": lambda path, n=n: _vast(path, n) for n in (*names, ".lock")}
    return _all(attacks)


@case("H", "Snapshots")
def a_folder_that_holds_itself(way: str) -> Outcome:
    """A link to a folder is what it leads to; nothing that lies inside goes round in circles."""
    with folder() as path:
        _made(path)
        pathlib.Path(path, "00000009").symlink_to(path)
        pathlib.Path(path, ".tmp-00000008").symlink_to(path)
        with folder() as other:
            link = pathlib.Path(other, "link")
            link.symlink_to(path)
            got = _opened(str(link))
            with atn.Snapshots(link) as store:
                store.save(4, LIKE, wait=True)
        again = _opened(path)
    return "step 3, then step 4", f"{got}, then {again}", (got, again) == ("step 3", "step 4")


_BOMB = """
import json, pathlib, resource, sys, warnings, zlib
warnings.simplefilter("ignore")
import jax.numpy as jnp, autotunenet_jax as atn
from benchmarks.field import kind_h
path, what = sys.argv[1:]
kind_h.arm(path, what)
with atn.Snapshots(path + "/x") as store: store.save(1, kind_h.LIKE, wait=True); store.restore(kind_h.LIKE)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[0], resource.RLIM_INFINITY))
print(kind_h._opened(path, 60), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def arm(path: str, what: str) -> None:
    """Makes a small folder that asks for a great deal of memory."""
    _made(path)
    snapshot = pathlib.Path(path, "00000002")
    if what in ("shape", "dtype"):
        changes = {"shape": [300_000_000], "dtype": "float64"}

        def change(body: Any) -> None:
            for leaves in body.values():
                for leaf in leaves if isinstance(leaves, list) else []:
                    if isinstance(leaf, dict) and "w" in str(leaf.get("name")):
                        leaf["shape"] = changes["shape"]

        _manifest(path, change)
        return
    if what == "array":
        _rechunk(snapshot, {"shape": [600_000_000], "chunks": [600_000_000]})
    elif what == "chunk":
        _rechunk(snapshot, {"chunks": [400 * 2**20]}, data=b"\0" * 2**20, repeats=1600)
    elif what == "json":
        zeros = "[" * 20_000 + "]" * 20_000
        pathlib.Path(path, "index.json").write_text(f'{{"crc32": 0, "body": {zeros}}}')
        return
    elif what == "sparse":
        with open(pathlib.Path(path, "index.json"), "wb") as file:
            file.truncate(60 * 2**30)
        return

    def files(body: Any) -> None:
        body["files"] = [
            {"path": p.relative_to(snapshot).as_posix(), "size": p.stat().st_size, "crc32": zlib.crc32(p.read_bytes())}
            for p in sorted(snapshot.rglob("*"))
            if p.is_file() and p.name != "manifest.json" and not p.name.startswith(".")
        ]

    _manifest(path, files)


def _rechunk(snapshot: pathlib.Path, meta: dict[str, Any], *, data: bytes = b"", repeats: int = 0) -> None:
    """Rewrites how the first plain array is laid out in the array store."""
    import tensorstore as ts

    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{snapshot}/arrays/"}).result()
    for key in [k.decode() for k in store.list().result() if k.decode().endswith(".zarray")]:
        found = json.loads(bytes(store.read(key).result().value))
        if not found["shape"] or found["shape"] == [1]:
            continue
        found.update(meta)
        if repeats:
            found["compressor"] = {"id": "zlib", "level": 1}
            packer = zlib.compressobj(9)
            packed = b"".join([*(packer.compress(data) for _ in range(repeats)), packer.flush()])
            store.write(key.replace(".zarray", "0"), packed).result()
        store.write(key, json.dumps(found).encode()).result()


@case("H", "Snapshots")
def small_folders_that_ask_for_much_memory(way: str) -> Outcome:
    got, is_ok = [], True
    for what in ("shape", "array", "chunk", "json", "sparse"):
        with folder() as path:
            done = frameworks.python(_BOMB, path, what)
        text = (done.stdout.strip().splitlines() or [f"died ({done.returncode}) {done.stderr.strip()[-60:]}"])[-1]
        fine = text.startswith(("step", "ours")) and int(text.split()[-1]) < 300
        is_ok &= fine
        got += [] if fine else [f"{what}: {text} MB more"]
    return "an error of ours, below 300 MB more", "; ".join(got) or "so it is", is_ok
