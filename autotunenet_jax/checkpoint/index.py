"""The index of a snapshot folder: records, retention, checksummed JSON files that survive a power cut.

Nothing here knows how arrays are stored; see `Snapshots` for the folder as a whole.
"""

import contextlib
import dataclasses
import errno
import json
import math
import operator
import os
import pathlib
import stat
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from .entries import DamagedFileError, entry_of
from .errors import SnapshotVersionError

SCHEMA_VERSION = 1
INDEX_NAME = "index.json"
MANIFEST_NAME = "manifest.json"

# An index of a thousand records is some 300 kB; a manifest of a hundred thousand leaves some 20 MB.
_MAX_JSON_BYTES = 128 * 2**20
# Values take some 70 bytes of memory each, however short they are in the file; ours are far longer than this.
_BYTES_PER_VALUE = 4
_SMALL_BYTES = 2**16
_CHUNK_BYTES = 4 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapshotRecord:
    """One snapshot, as the index of its folder lists it.

    Args:
      id: Grows by one with every save to the folder and is never used again; not the training step.
      step: Training step the state belongs to; goes back after a rollback.
      branch: Name of the line of training it belongs to.
      parent: Id of the snapshot it continues, None for the first.
      metric: The user's metric at that state, in the user's unit; None when not given.
      status: ``"healthy"``, or whatever the caller saved it as.
      is_abandoned: Whether training went back behind it and continued otherwise.
      structure: Fingerprint of the names, dtypes and shapes of its leaves.
      space: Fingerprint of the search space, None when not given.
      size_bytes: Size of the state, before compression.
      saved_at: Wall-clock time of the save, seconds since 1970, UTC; for people, no decision uses it.
      manifest_crc32: Checksum of the snapshot's own manifest, which holds the checksums of its files and leaves.
    """

    id: int
    step: int
    branch: str
    parent: int | None
    metric: float | None
    status: str
    is_abandoned: bool = False
    structure: str
    space: str | None
    size_bytes: int
    saved_at: float
    manifest_crc32: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        # JSON has no NaN or infinity.
        metric = self.metric if self.metric is None or math.isfinite(self.metric) else str(self.metric)
        return {**dataclasses.asdict(self), "metric": metric}

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "SnapshotRecord":
        """What `to_json` gave; anything else is a `DamagedFileError`."""
        metric = entry_of(body, "metric", int | float | str | None)
        try:
            metric = None if metric is None else float(metric)
        except (ValueError, OverflowError) as error:
            raise DamagedFileError("its metric is no number") from error
        saved_at = float(entry_of(body, "saved_at", int | float))
        if not math.isfinite(saved_at):
            raise DamagedFileError("its saved_at is no time")
        return cls(
            **{name: entry_of(body, name, int, least=0) for name in ("id", "step", "size_bytes", "manifest_crc32")},
            **{name: entry_of(body, name, str) for name in ("branch", "status", "structure")},
            parent=entry_of(body, "parent", int | None, least=0),
            metric=metric,
            is_abandoned=entry_of(body, "is_abandoned", bool),
            space=entry_of(body, "space", str | None),
            saved_at=saved_at,
        )

    @property
    def folder_name(self) -> str:
        """Name of the snapshot's own folder."""
        return f"{self.id:08d}"


def best_records(records: Iterable[SnapshotRecord], mode: Literal["min", "max"]) -> list[SnapshotRecord]:
    """Records with a finite metric, best first; of equals the later first."""
    sign = 1.0 if mode == "min" else -1.0
    rated = [(sign * r.metric, -r.id, r) for r in records if r.metric is not None and math.isfinite(r.metric)]
    return [r for *_, r in sorted(rated, key=lambda item: item[:2])]


def live_records(records: Iterable[SnapshotRecord]) -> list[SnapshotRecord]:
    """Records of the line of training in force."""
    return [r for r in records if not r.is_abandoned]


def candidates_for(
    records: Sequence[SnapshotRecord], which: str | int, mode: Literal["min", "max"]
) -> list[SnapshotRecord]:
    """Records that answer to ``"latest"``, ``"healthy"``, ``"best"`` or an id, first choice first."""
    match which:
        case "latest":
            return live_records(records)[::-1]
        case "healthy":
            return [r for r in live_records(records) if r.status == "healthy"][::-1]
        case "best":
            return best_records(records, mode)
        case bool() | str():
            raise ValueError(f'which must be "latest", "healthy", "best" or the id of a snapshot; got {which!r}.')
        case _:
            return [r for r in records if r.id == operator.index(which)]


def retain(
    records: Sequence[SnapshotRecord], *, keep: int, keep_best: int, mode: Literal["min", "max"]
) -> list[SnapshotRecord]:
    """Records that stay: the latest of the line in force, the best by a finite metric, the last healthy one."""
    live = live_records(records)
    kept = {r.id for r in live[-keep:]}
    kept |= {r.id for r in best_records(records, mode)[:keep_best]}
    healthy = [r.id for r in live if r.status == "healthy"]
    kept |= set(healthy[-1:])
    return [r for r in records if r.id in kept]


def fsync_folder(folder: pathlib.Path) -> None:
    """Makes the names in a folder durable; a no-op where folders cannot be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def probe(folder: pathlib.Path, size_bytes: int) -> None:
    """Checks that a file of a size can be had in a folder, quotas included; leaves nothing behind."""
    path = folder / ".probe"
    with open(path, "xb") as file:
        try:
            file.write(b"\0")
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size_bytes)
        finally:
            path.unlink()


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write_json(path: pathlib.Path, body: dict[str, Any]) -> int:
    """Replaces a JSON file so that at any moment, power cuts included, the old or the new one is there in full.

    Args:
      path: Where to.
      body: What to write; gets the schema version added. The envelope around it, ``{"body": ..., "crc32": ...}``
        with the checksum of the canonical body, is the same in every schema version.

    Returns:
      CRC-32 of the file's bytes.
    """
    body = {**body, "schema": SCHEMA_VERSION}
    data = json.dumps({"crc32": zlib.crc32(_canonical(body)), "body": body}, indent=1, allow_nan=False).encode()
    partial = path.with_name(f".{path.name}.partial")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    fsync_folder(path.parent)
    return zlib.crc32(data)


def read_json(path: pathlib.Path, *, expected_crc32: int | None = None) -> dict[str, Any]:
    """Reads what `write_json` wrote.

    Raises:
      FileNotFoundError: There is no such file.
      DamagedFileError: The file is a link, too large, or not what was written.
      SnapshotVersionError: It was written by a newer version of the library.
    """
    with open_plain(path) as file:
        data = file.read(_MAX_JSON_BYTES + 1)
    if len(data) > _MAX_JSON_BYTES:
        raise DamagedFileError(f"{path.name} is larger than any such file written")
    if expected_crc32 is not None and zlib.crc32(data) != expected_crc32:
        raise DamagedFileError(f"{path.name} differs from what was written (checksum)")
    # A file this small is read into little memory whatever it holds.
    is_small = len(data) < _SMALL_BYTES
    if not is_small and sum(map(data.count, (b"[", b"{", b","))) > len(data) // _BYTES_PER_VALUE:
        raise DamagedFileError(f"{path.name} holds more values than any such file written")
    try:
        envelope = json.loads(data)
        body = envelope["body"]
        is_sound = zlib.crc32(_canonical(body)) == envelope["crc32"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{path.name} cannot be read ({type(error).__name__})") from error
    if not is_sound:
        raise DamagedFileError(f"{path.name} differs from what was written (checksum)")
    schema = entry_of(body, "schema", int, least=1)
    if schema > SCHEMA_VERSION:
        raise SnapshotVersionError(
            f"{path} has schema version {schema}; this version of autotunenet_jax reads up to {SCHEMA_VERSION}. "
            "Install the version that wrote it, or a newer one."
        )
    return body


def open_plain(path: pathlib.Path) -> Any:
    """Opens a regular file for reading; refuses links and devices."""
    if path.is_symlink():
        raise DamagedFileError(f"{path.name} is a symbolic link; links are never followed")
    try:
        # Without waiting for whoever may write to a pipe.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENXIO, errno.ENOTDIR, errno.ELOOP, errno.ENODEV):
            raise DamagedFileError(f"{path.name} is not a regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedFileError(f"{path.name} is not a regular file")
    return os.fdopen(descriptor, "rb")


def _crc32_of(file: Any) -> int:
    crc = 0
    while chunk := file.read(_CHUNK_BYTES):
        crc = zlib.crc32(chunk, crc)
    return crc


def file_crc32(path: pathlib.Path) -> int:
    """CRC-32 of a regular file's bytes."""
    with open_plain(path) as file:
        return _crc32_of(file)


def seal_files(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Makes all files below a folder durable and returns their names, sizes and checksums.

    Cost: one read of every file, from the page cache, and one fsync each.
    """
    sealed = []
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            path = pathlib.Path(parent, name)
            with open_plain(path) as file:
                crc = _crc32_of(file)
                os.fsync(file.fileno())
            relative = path.relative_to(folder).as_posix()
            sealed.append({"path": relative, "size": path.stat().st_size, "crc32": crc})
        fsync_folder(pathlib.Path(parent))
    return sealed


def verify_files(folder: pathlib.Path, sealed: Sequence[dict[str, Any]]) -> None:
    """Checks files against what `seal_files` returned, before anything else opens them.

    Raises:
      DamagedFileError: A file is missing, was cut, changed or added, or anything in the folder is a symbolic link.
    """
    listed = {MANIFEST_NAME, *(entry_of(entry, "path", str) for entry in sealed)}
    if any(pathlib.PurePosixPath(path).is_absolute() or {"..", "\0"} & {*path.split("/"), *path} for path in listed):
        raise DamagedFileError("it lists files that are not its own")
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = pathlib.Path(parent, name)
            if path.is_symlink():
                raise DamagedFileError(f"{name} is a symbolic link; links are never followed")
            # Hidden files are left behind by file systems and file managers, and never read.
            is_ours = name in folders or name.startswith(".") or path.relative_to(folder).as_posix() in listed
            if not is_ours:
                raise DamagedFileError(f"{name} does not belong to it")
    for entry in sealed:
        name, listed_size = entry["path"], entry_of(entry, "size", int, least=0)
        try:
            with open_plain(folder / name) as file:
                size = os.fstat(file.fileno()).st_size
                if size != listed_size:
                    raise DamagedFileError(f"{name} holds {size} bytes instead of {listed_size}")
                if _crc32_of(file) != entry_of(entry, "crc32", int, least=0):
                    raise DamagedFileError(f"{name} differs from what was written (checksum)")
        except FileNotFoundError:
            raise DamagedFileError(f"{name} is missing") from None
