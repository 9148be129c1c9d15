"""The workloads of the benchmark, by name. Each run takes at most 20 s on one core."""

import functools

from benchmarks.quality import data, models, task
from benchmarks.quality.task import Workload

_RATE = {"learning_rate": (1e-5, 1e-1)}
_REGULARISED = {**_RATE, "weight_decay": (1e-3, 10.0), "dropout": (0.0, 0.6)}


def _w0() -> Workload:
    return Workload(
        name="W0",
        title="digits MLP, Adam",
        total_steps=1000,
        batch_size=64,
        model=models.mlp(64, 64, 10),
        load=data.digits,
        optimizer=task.adam,
        defaults={"learning_rate": 3e-3, "weight_decay": 0.0},
        space=_RATE,
    )


def _w1() -> Workload:
    return Workload(
        name="W1",
        title="Fashion-MNIST MLP, Adam",
        total_steps=1200,
        batch_size=64,
        model=models.mlp(784, 64, 10),
        load=data.fashion,
        optimizer=task.adam,
        defaults={"learning_rate": 1e-3, "weight_decay": 0.0},
        space=_RATE,
    )


def _w2() -> Workload:
    return Workload(
        name="W2",
        title="Fashion-MNIST CNN, SGD-momentum",
        total_steps=1000,
        batch_size=64,
        model=models.cnn(28, (8, 16), 10),
        load=data.fashion,
        optimizer=task.momentum_sgd,
        family="sgd",
        defaults={"learning_rate": 0.03, "weight_decay": 0.0},
        space={"learning_rate": (1e-4, 1.0)},
    )


def _w3() -> Workload:
    return Workload(
        name="W3",
        title="mnist1d MLP, AdamW, overfits",
        total_steps=2000,
        batch_size=64,
        model=models.mlp(40, 128, 128, 10),
        load=data.mnist1d,
        optimizer=task.adam,
        defaults={"learning_rate": 1e-3, "weight_decay": 0.0, "dropout": 0.0},
        space=_REGULARISED,
    )


def _w4() -> Workload:
    return Workload(
        name="W4",
        title="2,000 rows of Fashion-MNIST, AdamW, overfits",
        total_steps=1200,
        batch_size=64,
        model=models.mlp(784, 64, 10),
        load=functools.partial(data.fashion, n_train=2_000),
        optimizer=task.adam,
        defaults={"learning_rate": 1e-3, "weight_decay": 0.0, "dropout": 0.0},
        space=_REGULARISED,
    )


_MAKERS = {"W0": _w0, "W1": _w1, "W2": _w2, "W3": _w3, "W4": _w4}
NAMES = tuple(_MAKERS)


@functools.cache
def get(name: str, total_steps: int | None = None) -> Workload:
    """The workload of that name; one object per process, so that compiled functions are shared.

    Args:
      name: A name in `NAMES`.
      total_steps: Another budget than the workload's own.

    Raises:
      ValueError: Unknown name.
    """
    if name not in _MAKERS:
        raise ValueError(f"unknown workload {name!r}; choose from {', '.join(NAMES)}.")
    task = _MAKERS[name]()
    return task if total_steps is None else task.with_steps(total_steps)
