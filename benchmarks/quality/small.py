"""Small workloads, such as somebody tries a library on first; many have losses that fall by orders of magnitude."""

from collections.abc import Callable

import optax

from benchmarks.quality.data import Data, digits
from benchmarks.quality.models import Model, cnn, mlp, tanh_mlp
from benchmarks.quality.small_data import (
    cancer,
    clusters,
    diabetes,
    friedman,
    linear,
    moons,
    sine,
    spirals,
    teacher,
    wine,
)
from benchmarks.quality.task import Workload, adagrad, adam, momentum_sgd, plain_sgd, rmsprop

_ADAPTIVE, _PLAIN = (1e-5, 1.0), (1e-4, 10.0)


def _small(
    name: str,
    title: str,
    total_steps: int,
    batch_size: int,
    load: Callable[[], Data],
    model: Model,
    optimizer: Callable[..., optax.GradientTransformation],
    rate: float,
    loss: str = "classes",
) -> Callable[[], Workload]:
    is_plain = optimizer in (plain_sgd, momentum_sgd)

    def make() -> Workload:
        return Workload(
            name=name,
            title=title,
            total_steps=total_steps,
            batch_size=batch_size,
            model=model,
            load=load,
            optimizer=optimizer,
            family="sgd" if is_plain else "adam",
            loss=loss,
            defaults={"learning_rate": rate, "weight_decay": 0.0},
            space={"learning_rate": _PLAIN if is_plain else _ADAPTIVE},
        )

    return make


_SMALL = (
    ("S1", "teacher network, tanh MLP, Adam", 1000, 64, teacher, tanh_mlp(10, 64, 64, 1), adam, 0.01, "real"),
    ("S2", "sine, tanh MLP, Adam", 600, 32, sine, tanh_mlp(1, 32, 32, 1), adam, 0.03, "real"),
    ("S3", "breast cancer, MLP, plain SGD", 500, 32, cancer, mlp(30, 32, 2), plain_sgd, 0.1),
    ("S4", "two spirals, MLP, Adam", 1500, 64, spirals, mlp(2, 64, 64, 2), adam, 0.03),
    ("S5", "half moons, MLP, SGD with momentum", 400, 32, moons, mlp(2, 32, 2), momentum_sgd, 0.1),
    ("S6", "digits, one linear layer, plain SGD", 500, 32, digits, mlp(64, 10), plain_sgd, 1.0),
    ("S7", "linear regression, SGD with momentum", 1000, 64, linear, mlp(50, 1), momentum_sgd, 0.1, "real"),
    ("S8", "diabetes, MLP, Adam", 800, 32, diabetes, mlp(10, 64, 64, 1), adam, 1e-3, "real"),
    ("S9", "digits, CNN, Adam", 600, 64, digits, cnn(8, (8, 16), 10), adam, 0.01),
    ("S10", "wine, MLP, Adam", 300, 16, wine, mlp(13, 32, 3), adam, 0.01),
    ("S11", "digits, tanh MLP, RMSProp", 800, 32, digits, tanh_mlp(64, 64, 10), rmsprop, 3e-3),
    ("S12", "Friedman's function, MLP, Adam", 2000, 64, friedman, mlp(10, 64, 64, 1), adam, 0.03, "real"),
    ("S13", "digits, tanh MLP, Adagrad", 600, 32, digits, tanh_mlp(64, 64, 10), adagrad, 0.1),
    ("S14", "teacher network, tanh MLP, plain SGD", 2000, 64, teacher, tanh_mlp(10, 64, 64, 1), plain_sgd, 0.1, "real"),
    ("S15", "made clusters, MLP, Adam", 1000, 64, clusters, mlp(40, 64, 5), adam, 3e-3),
    ("S16", "Friedman's, MLP, SGD with momentum", 1000, 64, friedman, mlp(10, 64, 64, 1), momentum_sgd, 3e-3, "real"),
)  # fmt: skip

MAKERS = {row[0]: _small(*row) for row in _SMALL}
