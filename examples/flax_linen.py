"""The tuner with Flax linen: the statistics of BatchNorm go back with a fork that loses.

`TrainState.apply_gradients` passes neither the loss nor the statistics on, so that the optimizer is called by hand.
Without BatchNorm ``atn.observe(state.apply_gradients(grads=grads), loss)`` will do.

python examples/flax_linen.py
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import autotunenet_jax as atn
from autotunenet_flax.linen import TracedDropout

TOTAL_STEPS = 600

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = jnp.asarray(x[order] / 16.0, jnp.float32), jnp.asarray(y[order], jnp.int32)
train_x, train_y, valid_x, valid_y = x[:1200], y[:1200], x[1200:], y[1200:]


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, rate=None):
        x = nn.relu(nn.BatchNorm(use_running_average=rate is None, momentum=0.9)(nn.Dense(64)(x)))
        if rate is not None:
            x = TracedDropout()(x, rate)
        return nn.Dense(10)(x)


class Training(TrainState):
    batch_stats: Any


def loss_fn(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.partial(jax.jit, donate_argnums=0)
def train_step(state, key):
    rows_key, dropout_key = jax.random.split(key)
    rows = jax.random.randint(rows_key, (64,), 0, len(train_x))
    hp = atn.hyperparams(state)

    def objective(params):
        logits, changed = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            train_x[rows],
            hp["dropout"],
            rngs={"dropout": dropout_key},
            mutable="batch_stats",
        )
        return loss_fn(logits, train_y[rows]), changed["batch_stats"]

    (loss, statistics), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, value=loss, aux=statistics)
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        batch_stats=atn.rewound(opt_state, statistics),
    )
    metric = jax.lax.cond(atn.wants_eval(state), lambda: validation_loss(state), lambda: jnp.float32(jnp.nan))
    return atn.observe_eval(state, metric), loss, hp


def validation_loss(state):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return loss_fn(state.apply_fn(variables, valid_x), valid_y)


def main():
    model = Classifier()
    variables = model.init(jax.random.key(0), train_x[:1])
    tuned = atn.autotune(
        optax.adam,
        {"learning_rate": (1e-5, 1.0), "dropout": (0.0, 0.6)},
        TOTAL_STEPS,
        learning_rate=1e-5,
        aux=variables["batch_stats"],
    )
    state = Training.create(apply_fn=model.apply, tx=tuned, **variables)
    for step in range(TOTAL_STEPS):
        state, loss, hp = train_step(state, jax.random.key(step))
        if step % 100 == 0 or step == TOTAL_STEPS - 1:
            shown = ", ".join(f"{name} {float(value):.2g}" for name, value in hp.items())
            print(f"step {step:4d}  loss {float(loss):.4f}  {shown}")
    valid = float(validation_loss(state))
    print(f"validation loss {valid:.4f}")
    return {"valid": valid, "hyperparams": {name: float(value) for name, value in hp.items()}}


if __name__ == "__main__":
    main()
