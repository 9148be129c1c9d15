"""The history of a run, found in its folder."""

import pathlib

from ..history.history import HISTORY_NAME, History


class NoHistoryError(Exception):
    """There is no history to be had; the message says why and what to do."""


def read_history(where: pathlib.Path) -> History:
    """The history of a run.

    Args:
      where: The run's folder, or the history's own file.

    Raises:
      NoHistoryError: It is not there, or is damaged.
    """
    path = where / HISTORY_NAME if where.is_dir() else where
    try:
        return History.from_json(path)
    except FileNotFoundError:
        raise NoHistoryError(_missing(where)) from None
    except ValueError as error:
        raise NoHistoryError(f"the history is damaged: {error}") from error
    except OSError as error:
        raise NoHistoryError(f"{path} cannot be read: {error.strerror}.") from error


def _missing(where: pathlib.Path) -> str:
    if not where.exists():
        return f"there is nothing at {where}. Give the folder of a run's snapshots."
    below = sorted(path.parent.as_posix() for path in where.glob(f"*/{HISTORY_NAME}"))
    if below:
        return f"{where} is not a run's folder itself; these are: {', '.join(below)}."
    return (
        f"{where} holds no {HISTORY_NAME}: it is written with the first snapshot of fit and of the Trainer, and with "
        "the first checkpoint of Lightning and of transformers. Elsewhere write it by history.to_json(path)."
    )
