"""The workloads of the benchmark, by name. Each run takes at most 20 s on one core."""

import dataclasses
import functools

import jax.numpy as jnp

from benchmarks.quality import data, held_out, models, small, task, varied
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


def _w5() -> Workload:
    return Workload(
        name="W5",
        title="Shakespeare characters, transformer, AdamW",
        total_steps=1500,
        batch_size=16,
        model=models.transformer(37, 32, 32, 2, 2),
        load=data.shakespeare,
        optimizer=task.adam,
        loss="tokens",
        defaults={"learning_rate": 1e-3, "weight_decay": 0.0},
        space=_RATE,
        context=32,
    )


def _w6() -> Workload:
    return Workload(
        name="W6",
        title="diamonds regression MLP, Adam",
        total_steps=1500,
        batch_size=64,
        model=models.mlp(23, 64, 64, 1),
        load=data.diamonds,
        optimizer=task.adam,
        loss="real",
        defaults={"learning_rate": 1e-3, "weight_decay": 0.0},
        space=_RATE,
    )


def _w7() -> Workload:
    return dataclasses.replace(
        _w1(), name="W7", title="Fashion-MNIST MLP, pixels permuted from T/2 on", total_steps=2400, drift_at=0.5
    )


def _w8() -> Workload:
    return dataclasses.replace(
        _w1(), name="W8", title="Fashion-MNIST MLP in bfloat16, one NaN batch", nan_at=0.4, compute_dtype=jnp.bfloat16
    )


_MAKERS = {"W0": _w0, "W1": _w1, "W2": _w2, "W3": _w3, "W4": _w4, "W5": _w5, "W6": _w6, "W7": _w7, "W8": _w8}
NAMES = tuple(_MAKERS)
VARIED = tuple(varied.MAKERS)
SMALL = tuple(small.MAKERS)
HELD_OUT = tuple(held_out.MAKERS)


@functools.cache
def get(name: str, total_steps: int | None = None) -> Workload:
    """The workload of that name; one object per process, so that compiled functions are shared.

    Args:
      name: A name in `NAMES`, `VARIED`, `SMALL` or `HELD_OUT`.
      total_steps: Another budget than the workload's own.

    Raises:
      ValueError: Unknown name.
    """
    makers = _MAKERS | varied.MAKERS | small.MAKERS | held_out.MAKERS
    if name not in makers:
        raise ValueError(f"unknown workload {name!r}; choose from {', '.join(makers)}.")
    task = makers[name]()
    return task if total_steps is None else task.with_steps(total_steps)
