"""Optimizers by name; the one rate that is set at every step is the injected hyperparameter ``learning_rate``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Rate = jax.Array


class Optimizer(NamedTuple):
    """``make`` takes the rate and the second moment's decay; a sweep covers ``decades`` of the rate."""

    make: Callable[[Rate, float], optax.GradientTransformation]
    decades: tuple[float, float]
    dtype: Any = jnp.float32


def _clipped(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), inner)


def _grouped(rate: Rate, b2: float, ratio: float = 0.2) -> optax.GradientTransformation:
    """Adam whose rate on the head is a fifth of the body's."""

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: "head" if "head" in str(path[0]) else "body", params)

    return optax.partition({"body": optax.adam(rate, b2=b2), "head": optax.adam(ratio * rate, b2=b2)}, labels)


OPTIMIZERS = {
    "adam": Optimizer(lambda rate, b2: optax.adam(rate, b2=b2), (-5, -0.5)),
    "adamw": Optimizer(lambda rate, b2: optax.adamw(rate, b2=b2, weight_decay=1e-2), (-5, -0.5)),
    "sgdm": Optimizer(lambda rate, b2: optax.sgd(rate, momentum=0.9), (-4, 0.5)),
    "nesterov": Optimizer(lambda rate, b2: optax.sgd(rate, momentum=0.95, nesterov=True), (-4.5, 0.25)),
    "sgd": Optimizer(lambda rate, b2: optax.sgd(rate), (-3, 1.25)),
    "rmsprop": Optimizer(lambda rate, b2: optax.rmsprop(rate), (-5, -0.5)),
    "lion": Optimizer(lambda rate, b2: optax.lion(rate, weight_decay=0.0), (-6, -1.5)),
    "muon": Optimizer(lambda rate, b2: optax.contrib.muon(rate), (-4, 0)),
    "adagrad": Optimizer(lambda rate, b2: optax.adagrad(rate), (-3.5, 1)),
    "adafactor": Optimizer(lambda rate, b2: optax.adafactor(rate, min_dim_size_to_factor=16), (-4, 0.5)),
    "adan": Optimizer(lambda rate, b2: optax.adan(rate), (-5, -0.5)),
    "lamb": Optimizer(lambda rate, b2: optax.lamb(rate, b2=b2), (-4.5, 0)),
    "nadam": Optimizer(lambda rate, b2: optax.nadam(rate, b2=b2), (-5, -0.5)),
    "adabelief": Optimizer(lambda rate, b2: optax.adabelief(rate, b2=b2), (-5, -0.5)),
    "amsgrad": Optimizer(lambda rate, b2: optax.amsgrad(rate, b2=b2), (-5, -0.5)),
    "yogi": Optimizer(lambda rate, b2: optax.yogi(rate, b2=b2), (-4.5, 0)),
    "adam_clipped": Optimizer(lambda rate, b2: _clipped(optax.adam(rate, b2=b2)), (-5, -0.5)),
    "sgdm_clipped": Optimizer(lambda rate, b2: _clipped(optax.sgd(rate, momentum=0.9)), (-4, 0.75)),
    "adam_grouped": Optimizer(_grouped, (-5, -0.25)),
    "adam_bf16": Optimizer(lambda rate, b2: optax.adam(rate, b2=b2), (-5, -0.5), jnp.bfloat16),
}


def build(name: str, b2: float) -> optax.GradientTransformation:
    make = OPTIMIZERS[name].make
    inject = optax.inject_hyperparams(lambda learning_rate: make(learning_rate, b2), hyperparam_dtype=jnp.float32)
    return inject(learning_rate=1e-3)
