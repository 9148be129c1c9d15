"""One snapshot in its folder: arrays, written and read by Orbax, and the manifest that vouches for them."""

import dataclasses
import errno
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .entries import DamagedFileError, entry_of
from .errors import SnapshotMismatchError
from .index import MANIFEST_NAME, SnapshotRecord, read_json, seal_files, verify_files, write_json
from .leaves import LeafSpec, check_same, checksum, restore_leaf, stored_layout
from .zstd import decoded_limit

_ARRAYS_NAME = "arrays"
_LARGEST_KEY_WORDS = 8
# A compressed block counts for the most that it may hold.
_SPARE_BYTES = 2**20
# Trouble of this process, not of the snapshot: it must not cost a sound snapshot its place.
_OWN_TROUBLE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR})


class UnreadableArraysError(DamagedFileError):
    """Orbax cannot read what is, byte for byte, what it wrote: perhaps another version of it can."""


def load_orbax() -> Any:
    """Imports Orbax at first use: it takes a second, which a program without snapshots need not spend."""
    import orbax.checkpoint

    return orbax.checkpoint


def _checkpointer(**options: Any) -> Any:
    """Orbax for this process alone: in a program of several processes it would otherwise wait for the others."""
    ocp = load_orbax()
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"snapshots-{this}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, **options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def structure_of(specs: Sequence[LeafSpec]) -> str:
    """Fingerprint of the names, dtypes and shapes of a tree's leaves."""
    return hashlib.sha256(json.dumps([(s.name, str(s)) for s in specs]).encode()).hexdigest()[:16]


def write_snapshot(
    folder: pathlib.Path, record: SnapshotRecord, specs: Sequence[LeafSpec], arrays: Sequence[np.ndarray | None]
) -> SnapshotRecord:
    """Writes a snapshot into an empty folder, durably; returns its record with the manifest's checksum."""
    checked = [
        s if a is None else dataclasses.replace(s, crc32=checksum(a)) for s, a in zip(specs, arrays, strict=True)
    ]
    _write_arrays(folder / _ARRAYS_NAME, {_key(n): a for n, a in enumerate(arrays) if a is not None})
    body = {
        "record": record.to_json(),
        "leaves": [s.to_json() for s in checked],
        "files": seal_files(folder),
    }
    return dataclasses.replace(record, manifest_crc32=write_json(folder / MANIFEST_NAME, body))


def _is_alike(space: str, recorded: str) -> bool:
    # Folders of earlier versions hold the digest with which a fingerprint begins.
    return space == recorded or (len(recorded) == 16 and space.startswith(f"{recorded} "))


def read_snapshot(
    root: pathlib.Path,
    record: SnapshotRecord,
    wanted: Sequence[LeafSpec],
    likes: Sequence[Any],
    *,
    space: str | None,
) -> list[Any]:
    """Reads and verifies a snapshot; returns the leaves in the order asked for.

    Raises:
      DamagedFileError: Something is not as it was written.
      SnapshotMismatchError: It is of another model or space.
      SnapshotVersionError: It was written by a newer version of the library.
      OSError, MemoryError: This process cannot read anything just now.
    """
    path = root / record.folder_name
    where = f"Snapshot {record.id} (step {record.step}) in {root}"
    body = verified_manifest(root, record)
    if space is not None and record.space is not None and not _is_alike(space, record.space):
        raise SnapshotMismatchError(
            f"{where} is of another search space: {record.space} in the snapshot, {space} given. Nothing was loaded. "
            "Give the space it was saved with, or use another folder."
        )
    specs = [LeafSpec.from_json(s) for s in entry_of(body, "leaves", list)]
    try:
        check_same(specs, wanted, where=where)
    except TypeError as error:
        raise DamagedFileError(f"a leaf is of no known dtype ({error})") from error
    stored = _read_arrays(path / _ARRAYS_NAME, {_key(n): s for n, s in enumerate(specs) if s.is_stored})
    by_name = {s.name: (s, stored.get(_key(n))) for n, s in enumerate(specs)}
    try:
        return [restore_leaf(*by_name[w.name], like) for w, like in zip(wanted, likes, strict=True)]
    except (ValueError, TypeError, OverflowError) as error:
        raise DamagedFileError(f"its leaves cannot be rebuilt ({type(error).__name__}: {error})") from error


def verified_manifest(root: pathlib.Path, record: SnapshotRecord) -> dict[str, Any]:
    """The manifest of a snapshot whose files are, byte for byte, what was written.

    Raises:
      DamagedFileError: Something is not as it was written.
      SnapshotVersionError: It was written by a newer version of the library.
      OSError: This process cannot read anything just now.
    """
    path = root / record.folder_name
    try:
        if path.is_symlink():
            raise DamagedFileError(f"{path.name} is a symbolic link; links are never followed")
        body = read_json(path / MANIFEST_NAME, expected_crc32=record.manifest_crc32)
        verify_files(path, entry_of(body, "files", list))
    except FileNotFoundError as error:
        raise DamagedFileError(f"{MANIFEST_NAME if path.is_dir() else path.name} is missing") from error
    except OSError as error:
        if error.errno in _OWN_TROUBLE:
            raise
        raise DamagedFileError(f"it cannot be read ({error})") from error
    return body


def _key(number: int) -> str:
    # Names of leaves may hold anything; numbers are safe in every store.
    return f"{number:06d}"


def _write_arrays(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    if not arrays:
        path.mkdir()
        return
    ocp = load_orbax()
    # Weights hardly compress, and the training loop needs the processor.
    with _checkpointer(use_compression=False) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(dict(arrays)))


def _check_layouts(path: pathlib.Path, specs: Mapping[str, LeafSpec]) -> None:
    """Checks how the arrays are laid out: in chunks that hold no more than the arrays they belong to.

    Raises:
      DamagedFileError: They are not as written here: reading them could take any amount of memory.
    """
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
    keys = [bytes(key).decode() for key in store.list().result()]
    for name, spec in specs.items():
        found = json.loads(bytes(store.read(f"{name}/.zarray").result().value))
        shape, chunks = entry_of(found, "shape", list), entry_of(found, "chunks", list)
        layout = stored_layout(spec)
        # The words of a key: their number is the generator's affair.
        limit = math.prod(spec.shape) * _LARGEST_KEY_WORDS if layout is None else math.prod(layout[1])
        is_ours = len(shape) == len(chunks) and all(type(n) is int and n >= 0 for n in (*shape, *chunks))
        is_ours = is_ours and all(chunk <= max(length, 1) for chunk, length in zip(chunks, shape, strict=True))
        compressor = found.get("compressor")
        # The first version compressed.
        is_ours &= not found.get("filters") and (compressor is None or entry_of(compressor, "id", str) == "zstd")
        if not is_ours or math.prod(shape) > limit:
            raise DamagedFileError(f"{spec.name} is not stored as it was written")
        if compressor is None:
            continue
        most = limit * (4 if layout is None else layout[0].itemsize) + _SPARE_BYTES
        values = [key for key in keys if key.startswith(f"{name}/") and not key.endswith("/.zarray")]
        if any(decoded_limit(bytes(store.read(key).result().value)) > most for key in values):
            raise DamagedFileError(f"{spec.name} holds more than its shape")


def _read_arrays(path: pathlib.Path, specs: Mapping[str, LeafSpec]) -> dict[str, np.ndarray]:
    if not specs:
        return {}
    ocp = load_orbax()
    arguments = ocp.args.PyTreeRestore(
        item=dict.fromkeys(specs, 0),
        restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in specs},
    )
    try:
        with _checkpointer() as checkpointer:
            # Before anything is allocated: a crafted snapshot may claim any size.
            _check_layouts(path, specs)
            arrays = checkpointer.restore(path, args=arguments)
    except (MemoryError, DamagedFileError):
        raise
    except Exception as error:
        raise UnreadableArraysError(f"its arrays cannot be read ({type(error).__name__}: {error})") from error
    for name, spec in specs.items():
        array, layout = arrays[name], stored_layout(spec)
        if not isinstance(array, np.ndarray) or (layout is not None and (array.dtype, array.shape) != layout):
            raise DamagedFileError(f"{spec.name} is not stored with its dtype and shape")
        if checksum(array) != spec.crc32:
            raise DamagedFileError(f"{spec.name} differs from what was saved (checksum)")
    return arrays
