"""A folder of snapshots: one writer at a time, an index that can be lost, damaged snapshots put aside.

Layout: ``index.json`` lists the records; ``00000007/`` is snapshot 7, with ``manifest.json`` and the arrays;
``.tmp-00000008/`` is being written, ``.old-00000003/`` deleted; ``quarantine-00000006/`` failed verification; ``.lock``
belongs to the writer. Opening a folder deletes nothing: a copy of it, made while a run went on, may hold sound
snapshots that its index does not list.
"""

import contextlib
import errno
import itertools
import os
import pathlib
import re
import shutil
from collections.abc import Sequence

import filelock

from .entries import DamagedFileError, entry_of
from .errors import SnapshotDamagedError, SnapshotFolderBusyError, SnapshotVersionError
from .index import (
    INDEX_NAME,
    MANIFEST_NAME,
    SnapshotRecord,
    file_crc32,
    fsync_folder,
    read_json,
    write_json,
)

_LOCK_NAME = ".lock"
SNAPSHOT_NAME = re.compile(r"\d{8,}")
_LITTER_NAME = re.compile(r"\.(tmp|old)-\d{8,}")
QUARANTINE_NAME = re.compile(r"quarantine-(\d{8,}).*")


class SnapshotFolder:
    """The records of a folder and every change to them.

    Not thread-safe: the caller sees to it that one thread at a time uses it.
    """

    def __init__(self, root: pathlib.Path, *, is_read_only: bool):
        self.root = root
        self.is_read_only = is_read_only
        self.records: list[SnapshotRecord] = []
        self.next_id = 1
        self.messages: list[str] = []
        self._lock: filelock.BaseFileLock | None = None
        self._lock_identity: tuple[int, int] | None = None
        self._open()

    def _open(self) -> None:
        if self.is_read_only:
            if not self.root.is_dir():
                raise FileNotFoundError(f"There is no snapshot folder {self.root}.")
        else:
            self.root.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        try:
            self.load()
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        path = self.root / _LOCK_NAME
        if path.is_symlink():
            raise PermissionError(f"{path} is a symbolic link; links are never followed. Remove it.")
        lock = filelock.FileLock(path, timeout=0, thread_local=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise SnapshotFolderBusyError(
                f"The snapshot folder {self.root} is being written by another process, or by another Snapshots that "
                "is still open in this one. Close that one, choose another folder, or open with read_only=True."
            ) from None
        except OSError as error:
            if _is_no_file(path):
                raise SnapshotDamagedError(
                    errno.EISDIR,
                    f"{path} is not the file by which writers keep each other out. Remove it, "
                    "or open with read_only=True to restore from the folder as it is.",
                ) from error
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise OSError(
                error.errno,
                f"Cannot write to the snapshot folder {self.root}: {error.strerror}. "
                "Choose another folder, or open with read_only=True to restore from it.",
            ) from error
        self._lock = lock
        self._lock_identity = _identity(path)

    def close(self) -> None:
        """Gives the lock back."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._lock.release()
            self._lock = None

    def load(self) -> None:
        """Reads the index, or rebuilds it from the snapshots when it is lost; takes in what it does not list."""
        next_id = self.next_id
        try:
            body = read_json(self.root / INDEX_NAME)
            self.records = [SnapshotRecord.from_json(r) for r in entry_of(body, "records", list)]
            self.next_id = entry_of(body, "next_id", int, least=1)
        except SnapshotVersionError:
            raise
        except FileNotFoundError:
            reason = f"{INDEX_NAME} is missing"
        except DamagedFileError as error:
            reason = str(error)
        else:
            reason = None
        on_disk = self._snapshots_on_disk()
        if reason is None:
            self._reconcile(on_disk)
        elif on_disk or os.path.lexists(self.root / INDEX_NAME):
            self.next_id = next_id
            self._rebuild(on_disk, reason)
        self.next_id = max([self.next_id, *(n + 1 for n in (*on_disk, *self._quarantined_ids()))])

    def _snapshots_on_disk(self) -> list[int]:
        """Folders that are snapshots; one that only has such a name, as a date may, is somebody's own."""
        listed = {r.folder_name for r in self.records}
        names = [name for name in os.listdir(self.root) if SNAPSHOT_NAME.fullmatch(name)]
        ours = [n for n in names if n in listed or os.path.lexists(self.root / n / MANIFEST_NAME)]
        return sorted(int(name) for name in ours if name == f"{int(name):08d}")

    def _quarantined_ids(self) -> list[int]:
        return [int(m[1]) for name in os.listdir(self.root) if (m := QUARANTINE_NAME.fullmatch(name))]

    def take_id(self) -> int:
        """An id that no snapshot has had, and whose folder is free."""
        while os.path.lexists(self.root / f"{self.next_id:08d}"):
            self.next_id += 1
        self.next_id += 1
        return self.next_id - 1

    def clean_up(self) -> None:
        """Deletes what kills left of snapshots that were being written, or being deleted."""
        for path in self.root.iterdir():
            if _LITTER_NAME.fullmatch(path.name):
                _delete(path)

    def _record_of(self, number: int) -> SnapshotRecord:
        path = self.root / f"{number:08d}"
        if path.is_symlink():
            raise DamagedFileError(f"{path.name} is a symbolic link; links are never followed")
        manifest = path / MANIFEST_NAME
        record = SnapshotRecord.from_json(
            {**entry_of(read_json(manifest), "record", dict), "manifest_crc32": file_crc32(manifest)}
        )
        if record.id != number:
            raise DamagedFileError(f"{manifest.name} belongs to snapshot {record.id}")
        return record

    def _rebuild(self, on_disk: Sequence[int], reason: str) -> None:
        self.records = []
        self._adopt(on_disk)
        if not self.is_read_only:
            self.next_id = max([self.next_id, *(n + 1 for n in on_disk)])
            index = self.root / INDEX_NAME
            if index.is_dir() and not index.is_symlink():
                _set_aside(index)
            self.commit(self.records)
        self.messages.append(
            f"The index of the snapshot folder {self.root} was damaged ({reason}). It was rebuilt from the "
            f"{len(self.records)} snapshots found; marks set after saving (abandoned, status) may be lost."
        )

    def _reconcile(self, on_disk: Sequence[int]) -> None:
        """Takes in snapshots that are complete but not listed: a kill, or a copy of a folder in use, leaves such."""
        listed = {r.id for r in self.records}
        self._adopt([number for number in on_disk if number not in listed])

    def _adopt(self, numbers: Sequence[int]) -> None:
        """Lists snapshots by what their manifests say; damaged ones are put aside."""
        for number in numbers:
            try:
                self.records.append(self._record_of(number))
            except SnapshotVersionError:
                raise
            except (OSError, DamagedFileError) as error:
                if not self.is_read_only:
                    self._put_aside(number, str(error))
        self.records.sort(key=lambda r: r.id)

    def make_ready(self) -> None:
        """Sees that the folder is there and still ours before a write; makes it anew when it was removed."""
        if self._lock is not None and self._lock_identity == _identity(self.root / _LOCK_NAME) is not None:
            return
        was_there = self.root.is_dir()
        self.close()
        self.root.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        next_id, had = self.next_id, len(self.records)
        self.records = []
        self.load()
        self.next_id = max(self.next_id, next_id)
        if had > len(self.records) or not was_there:
            self.messages.append(
                f"The snapshot folder {self.root} was removed while in use; {had - len(self.records)} earlier "
                "snapshots are gone. It was made anew and saving goes on."
            )

    def commit(self, records: Sequence[SnapshotRecord]) -> None:
        """Makes the given records the index, durably."""
        records = list(records)
        body = {"next_id": self.next_id, "records": [r.to_json() for r in records]}
        write_json(self.root / INDEX_NAME, body)
        self.records = records

    def new_partial(self, number: int) -> pathlib.Path:
        """An empty folder to write a snapshot into."""
        path = self.root / f".tmp-{number:08d}"
        _delete(path)
        path.mkdir()
        return path

    def publish(self, partial: pathlib.Path, number: int) -> None:
        """Gives a finished snapshot its name, durably."""
        os.rename(partial, self.root / f"{number:08d}")
        fsync_folder(self.root)

    def remove(self, number: int) -> None:
        """Deletes a snapshot that is no longer listed; what cannot be deleted now is deleted before the next save."""
        old = self.root / f".old-{number:08d}"
        # First out of the way, in one step: a kill must not leave half a snapshot under its name.
        with contextlib.suppress(OSError):
            _delete(old)
            os.rename(self.root / f"{number:08d}", old)
        _delete(old)

    def quarantine(self, record: SnapshotRecord, reason: str, *, is_kept_in_place: bool = False) -> None:
        """Takes a bad snapshot out of the index and its folder out of the way, keeping it for inspection.

        Args:
          record: The snapshot.
          reason: What is wrong with it.
          is_kept_in_place: Whether to pass over it in memory only, for this once.
        """
        kept = [r for r in self.records if r.id != record.id]
        self._put_aside(record.id, reason, is_kept_in_place=is_kept_in_place)
        self.records = kept
        if not (self.is_read_only or is_kept_in_place):
            # On a disk that cannot be written to, it is passed over in memory, and again at the next opening.
            with contextlib.suppress(OSError):
                self.commit(kept)

    def _put_aside(self, number: int, reason: str, *, is_kept_in_place: bool = False) -> None:
        path = self.root / f"{number:08d}"
        what = "It is passed over."
        if not (self.is_read_only or is_kept_in_place) and os.path.lexists(path):
            with contextlib.suppress(OSError):
                kept = _set_aside(path)
                what = f"It is passed over and kept as {kept.name}; delete that folder when you have no use for it."
        self.messages.append(f"Snapshot {number} in {self.root} is damaged: {reason}. {what}")


def _delete(path: pathlib.Path) -> None:
    """Deletes a folder with all in it, or whatever else has its name; errors are left for another time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _set_aside(path: pathlib.Path) -> pathlib.Path:
    """Renames what is in the way, to a name that is free; returns that."""
    numbers = itertools.count(2)
    target = path.with_name(f"quarantine-{path.name}")
    while os.path.lexists(target):
        target = path.with_name(f"quarantine-{path.name}-{next(numbers)}")
    os.rename(path, target)
    return target


def _identity(path: pathlib.Path) -> tuple[int, int] | None:
    """Which file a path leads to; None where there is none. A lock on a deleted file keeps nobody out."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_no_file(path: pathlib.Path) -> bool:
    return os.path.lexists(path) and not path.is_file()
