"""What lies in a folder of snapshots, sound or not; nothing is changed."""

import os
import pathlib
from typing import Literal, NamedTuple

from .entries import DamagedFileError
from .errors import SnapshotVersionError
from .folder import QUARANTINE_NAME, SNAPSHOT_NAME, SnapshotFolder
from .index import MANIFEST_NAME, SnapshotRecord
from .orbax_io import verified_manifest

# Being written, or left by a kill; what was deleted goes by another name.
_UNFINISHED = ".tmp-"


class Finding(NamedTuple):
    """One snapshot, or what is left of one.

    Attributes:
      name: Of its folder.
      record: What is known of it; None for what the index does not list.
      state: ``"sound"``: every byte is what was written. ``"unfinished"``: being written, or left by a kill.
        ``"put aside"``: found damaged earlier.
      problem: In what way it is damaged; else empty.
    """

    name: str
    record: SnapshotRecord | None
    state: Literal["sound", "damaged", "unfinished", "put aside"]
    problem: str = ""


def survey(root: pathlib.Path) -> tuple[list[Finding], list[str]]:
    """Looks at everything that was saved to a folder.

    Args:
      root: The folder; a training may be writing to it.

    Returns:
      What was found, listed snapshots first, oldest first; and what is to be said of the index.

    Raises:
      FileNotFoundError: There is no such folder.
      SnapshotVersionError: It was written by a newer version of the library.

    Cost: one read of every file.
    """
    folder = SnapshotFolder(root, is_read_only=True)
    found = [_checked(root, record) for record in folder.records]
    # A training beside us may have deleted some in the meantime.
    folder.load()
    listed = {record.id for record in folder.records}
    found = [finding for finding in found if finding.record is not None and finding.record.id in listed]
    return [*found, *_others(root, listed)], list(dict.fromkeys(folder.messages))


def _checked(root: pathlib.Path, record: SnapshotRecord) -> Finding:
    try:
        verified_manifest(root, record)
    except (DamagedFileError, SnapshotVersionError) as error:
        return Finding(record.folder_name, record, "damaged", str(error))
    return Finding(record.folder_name, record, "sound")


def _others(root: pathlib.Path, listed: set[int]) -> list[Finding]:
    """What the index does not list."""
    found = []
    for name in sorted(os.listdir(root)):
        if name.startswith(_UNFINISHED):
            found.append(Finding(name, None, "unfinished"))
        elif QUARANTINE_NAME.fullmatch(name):
            found.append(Finding(name, None, "put aside"))
        elif SNAPSHOT_NAME.fullmatch(name) and int(name) not in listed and (root / name / MANIFEST_NAME).exists():
            found.append(Finding(name, None, "damaged", "its manifest is not what was written"))
    return found
