"""Entries of JSON files that somebody else may have written, each checked before it is used."""

from typing import Any

# Whole numbers in these files: ids, steps, sizes, checksums.
_LARGEST_INT = 2**62


class DamagedFileError(ValueError):
    """A file is not what was written; the message names the file and says in what way."""


def entry_of(body: Any, name: str, kind: Any, *, least: int | None = None) -> Any:
    """An entry of what JSON held, of the kind it was written with.

    Raises:
      DamagedFileError: It is not there, or is something else.
    """
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise DamagedFileError(f"its {name} is missing, or no {getattr(kind, '__name__', kind)}")
    if isinstance(value, int) and not (-_LARGEST_INT if least is None else least) <= value <= _LARGEST_INT:
        raise DamagedFileError(f"its {name} is out of range")
    return value
