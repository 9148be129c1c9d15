"""Tasks that are locked away until a policy has been chosen: whole families, and two optimizers in every family."""

from typing import Protocol

from benchmarks.bank.oracle import load

LOCKED_FAMILIES = ("residual", "attention_nonorm", "recurrent", "denoising", "plateau", "negative", "mislabelled")
LOCKED_OPTIMIZERS = ("nesterov", "adafactor")


class _Named(Protocol):
    @property
    def family(self) -> str: ...

    @property
    def optimizer(self) -> str: ...


def _locked(family: str, optimizer: str) -> bool:
    return family in LOCKED_FAMILIES or optimizer in LOCKED_OPTIMIZERS


def is_locked(task: _Named) -> bool:
    return _locked(task.family, task.optimizer)


def _tasks(locked: bool, count: int | None) -> list[int]:
    records = sorted(load().items())
    usable = [i for i, r in records if r["usable"] and _locked(r["family"], r["optimizer"]) == locked]
    return usable[:count]


def open_tasks(count: int | None = None) -> list[int]:
    """The first ``count`` usable tasks, or all, that choices may be made on."""
    return _tasks(False, count)


def locked_tasks(count: int | None = None) -> list[int]:
    return _tasks(True, count)
