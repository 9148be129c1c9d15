"""Workloads kept apart: no constant of the library was chosen on them."""

from benchmarks.quality import data, models, task
from benchmarks.quality.task import Workload


def _x1() -> Workload:
    return Workload(
        name="X1",
        title="digits MLP, plain SGD",
        total_steps=600,
        batch_size=32,
        model=models.mlp(64, 128, 10),
        load=data.digits,
        optimizer=task.plain_sgd,
        family="sgd",
        defaults={"learning_rate": 0.1, "weight_decay": 0.0},
        space={"learning_rate": (1e-4, 10.0)},
    )


def _x2() -> Workload:
    return Workload(
        name="X2",
        title="Fashion-MNIST CNN, AdamW",
        total_steps=700,
        batch_size=64,
        model=models.cnn(28, (8, 16), 10),
        load=data.fashion,
        optimizer=task.adam,
        defaults={"learning_rate": 1e-3, "weight_decay": 0.01},
        space={"learning_rate": (1e-6, 1.0)},
    )


def _x3() -> Workload:
    return Workload(
        name="X3",
        title="flights regression MLP, Adam",
        total_steps=1000,
        batch_size=128,
        model=models.mlp(33, 128, 1),
        load=data.flights,
        optimizer=task.adam,
        loss="real",
        defaults={"learning_rate": 1e-3, "weight_decay": 0.0},
        space={"learning_rate": (1e-5, 1e-1)},
    )


def _x4() -> Workload:
    return Workload(
        name="X4",
        title="Shakespeare characters, transformer, SGD-momentum",
        total_steps=1200,
        batch_size=16,
        model=models.transformer(37, 32, 48, 1, 4),
        load=data.shakespeare,
        optimizer=task.momentum_sgd,
        family="sgd",
        loss="tokens",
        defaults={"learning_rate": 0.03, "weight_decay": 0.0},
        space={"learning_rate": (1e-4, 10.0)},
        context=32,
    )


def _x5() -> Workload:
    return Workload(
        name="X5",
        title="mnist1d residual network, Adam",
        total_steps=800,
        batch_size=32,
        model=models.residual(40, 64, 3, 10),
        load=data.mnist1d,
        optimizer=task.adam,
        defaults={"learning_rate": 1e-3, "weight_decay": 0.0},
        space={"learning_rate": (1e-5, 1e-1)},
    )


MAKERS = {"X1": _x1, "X2": _x2, "X3": _x3, "X4": _x4, "X5": _x5}
