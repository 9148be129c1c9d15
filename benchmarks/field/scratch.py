"""Folders that are gone afterwards."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def folder() -> Iterator[str]:
    path = tempfile.mkdtemp(prefix="field-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
