"""The tuner with Flax NNX: `nnx.Optimizer` passes the loss on, and dropout takes its rate from the tuner.

The statistics of BatchNorm go back with a fork that loses.

python examples/flax_nnx.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import autotunenet_jax as atn
from autotunenet_flax.nnx import TracedDropout

TOTAL_STEPS = 600

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = jnp.asarray(x[order] / 16.0, jnp.float32), jnp.asarray(y[order], jnp.int32)
train_x, train_y, valid_x, valid_y = x[:1200], y[:1200], x[1200:], y[1200:]


class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)
        self.dropout = TracedDropout(rngs=rngs)

    def __call__(self, x, rate=None):
        x = nnx.relu(self.norm(self.hidden(x), use_running_average=rate is None))
        return self.out(x if rate is None else self.dropout(x, rate))


def loss_fn(model, x, y, rate=None):
    return optax.softmax_cross_entropy_with_integer_labels(model(x, rate), y).mean()


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def train_step(model, optimizer, key):
    rows = jax.random.randint(key, (64,), 0, len(train_x))
    hp = atn.hyperparams(optimizer)
    loss, grads = nnx.value_and_grad(loss_fn)(model, train_x[rows], train_y[rows], hp["dropout"])
    statistics = nnx.state(model, nnx.BatchStat)
    optimizer.update(model, grads, value=loss, aux=statistics)
    nnx.update(model, atn.rewound(optimizer, statistics))
    # A metric that nobody asked for is ignored, so it need not be computed.
    metric = jax.lax.cond(
        atn.wants_eval(optimizer), lambda: loss_fn(model, valid_x, valid_y), lambda: jnp.float32(jnp.nan)
    )
    atn.observe_eval(optimizer, metric)
    return loss, hp


def main():
    model = Classifier(nnx.Rngs(0, dropout=1))
    tuned = atn.autotune(
        optax.adam,
        {"learning_rate": (1e-5, 1.0), "dropout": (0.0, 0.6)},
        TOTAL_STEPS,
        learning_rate=1e-5,
        aux=nnx.state(model, nnx.BatchStat),
    )
    optimizer = nnx.Optimizer(model, tuned, wrt=nnx.Param)
    for step in range(TOTAL_STEPS):
        loss, hp = train_step(model, optimizer, jax.random.key(step))
        if step % 100 == 0 or step == TOTAL_STEPS - 1:
            shown = ", ".join(f"{name} {float(value):.2g}" for name, value in hp.items())
            print(f"step {step:4d}  loss {float(loss):.4f}  {shown}")
    valid = float(loss_fn(model, valid_x, valid_y))
    print(f"validation loss {valid:.4f}")
    return {"valid": valid, "hyperparams": {name: float(value) for name, value in hp.items()}}


if __name__ == "__main__":
    main()
