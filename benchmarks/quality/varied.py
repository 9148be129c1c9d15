"""More workloads, with other models, optimizers, losses and lengths than W0 to W8."""

from benchmarks.quality import data, models, task
from benchmarks.quality.task import Workload

_WIDE = {"learning_rate": (1e-5, 1e-1)}


def _h1() -> Workload:
    return Workload(
        name="H1",
        title="Fashion-MNIST autoencoder, Adam",
        total_steps=1000,
        batch_size=64,
        model=models.mlp(784, 64, 16, 64, 784),
        load=data.fashion_images,
        optimizer=task.adam,
        loss="real",
        defaults={"learning_rate": 1e-3, "weight_decay": 0.0},
        space=_WIDE,
    )


def _h2() -> Workload:
    return Workload(
        name="H2",
        title="Shakespeare characters, GRU, Adam with clipped gradients",
        total_steps=800,
        batch_size=16,
        model=models.gru(37, 64),
        load=data.shakespeare,
        optimizer=task.clipped_adam,
        loss="tokens",
        defaults={"learning_rate": 2e-3, "weight_decay": 0.0},
        space=_WIDE,
        context=32,
    )


def _h3() -> Workload:
    return Workload(
        name="H3",
        title="flights regression MLP, SGD-momentum",
        total_steps=600,
        batch_size=64,
        model=models.mlp(33, 64, 64, 1),
        load=data.flights,
        optimizer=task.momentum_sgd,
        family="sgd",
        loss="real",
        defaults={"learning_rate": 0.01, "weight_decay": 0.0},
        space={"learning_rate": (1e-5, 1.0)},
    )


def _h4() -> Workload:
    return Workload(
        name="H4",
        title="mnist1d convolutions, AdamW",
        total_steps=1500,
        batch_size=64,
        model=models.conv1d((16, 32), 40, 10),
        load=data.mnist1d,
        optimizer=task.adam,
        defaults={"learning_rate": 1e-3, "weight_decay": 0.01},
        space=_WIDE,
    )


def _h5() -> Workload:
    return Workload(
        name="H5",
        title="Fashion-MNIST residual network, Lion",
        total_steps=800,
        batch_size=64,
        model=models.residual(784, 64, 4, 10),
        load=data.fashion,
        optimizer=task.lion,
        defaults={"learning_rate": 1e-4, "weight_decay": 0.1},
        space={"learning_rate": (1e-6, 1e-2)},
    )


def _h6() -> Workload:
    return Workload(
        name="H6",
        title="digits CNN, plain SGD",
        total_steps=400,
        batch_size=32,
        model=models.cnn(8, (8, 16), 10),
        load=data.digits,
        optimizer=task.plain_sgd,
        family="sgd",
        defaults={"learning_rate": 0.1, "weight_decay": 0.0},
        space={"learning_rate": (1e-3, 10.0)},
    )


def _h7() -> Workload:
    return Workload(
        name="H7",
        title="Fashion-MNIST with mislabelled rows, Adam",
        total_steps=2000,
        batch_size=64,
        model=models.mlp(784, 128, 10),
        load=data.fashion_mislabelled,
        optimizer=task.adam,
        defaults={"learning_rate": 1e-3, "weight_decay": 0.0},
        space=_WIDE,
    )


def _h8() -> Workload:
    return Workload(
        name="H8",
        title="smooth function, MLP, Adam",
        total_steps=1000,
        batch_size=64,
        model=models.mlp(4, 64, 64, 1),
        load=data.waves,
        optimizer=task.adam,
        loss="real",
        defaults={"learning_rate": 0.01, "weight_decay": 0.0},
        space={"learning_rate": (1e-5, 1.0)},
    )


def _h9() -> Workload:
    return Workload(
        name="H9",
        title="smooth function, MLP, SGD-momentum",
        total_steps=1500,
        batch_size=64,
        model=models.mlp(4, 64, 64, 1),
        load=data.waves,
        optimizer=task.momentum_sgd,
        family="sgd",
        loss="real",
        defaults={"learning_rate": 0.01, "weight_decay": 0.0},
        space={"learning_rate": (1e-5, 10.0)},
    )


MAKERS = {"H1": _h1, "H2": _h2, "H3": _h3, "H4": _h4, "H5": _h5, "H6": _h6, "H7": _h7, "H8": _h8, "H9": _h9}
