"""What can go wrong with snapshots, as exceptions that subclass the standard library's."""


class SnapshotWarning(UserWarning):
    """Something happened to a snapshot that training survives: a damaged one passed over, a save that failed."""


class NoSnapshotError(FileNotFoundError):
    """The folder holds no snapshot of the kind asked for."""


class SnapshotMismatchError(ValueError):
    """The snapshot is sound but of another model or another search space than the one given."""


class SnapshotVersionError(ValueError):
    """The snapshot was written by a newer version of the library than this one."""


class SnapshotDamagedError(OSError):
    """No sound snapshot is left, the one asked for by id is damaged, or the folder itself is no such folder."""


class SnapshotFolderBusyError(BlockingIOError):
    """Another process, or another open `Snapshots`, is writing to the folder."""
