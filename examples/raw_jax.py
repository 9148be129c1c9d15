"""The tuner in a plain JAX training step: one line wraps the optimizer, the loss is passed on as ``value``.

A small network learns handwritten digits, from a learning rate of 1e-5. Learning rate, weight decay and dropout are
tuned while it trains, inside the one compiled step. Weight decay and dropout show their worth on validation data only:
the step evaluates when the tuner asks.

    python examples/raw_jax.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import autotunenet_jax as atn

TOTAL_STEPS = 800

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = jnp.asarray(x[order] / 16.0, jnp.float32), jnp.asarray(y[order], jnp.int32)
train_x, train_y, valid_x, valid_y = x[:1200], y[:1200], x[1200:], y[1200:]

optimizer = atn.autotune(
    optax.inject_hyperparams(optax.adamw)(learning_rate=1e-5, weight_decay=1e-3),
    {"learning_rate": (1e-5, 1.0), "weight_decay": (1e-4, 1.0), "dropout": (0.0, 0.6)},
    total_steps=TOTAL_STEPS,
)


def init_params(key):
    first, second = jax.random.split(key)
    glorot = jax.nn.initializers.glorot_normal()
    return {"w1": glorot(first, (64, 64)), "b1": jnp.zeros(64), "w2": glorot(second, (64, 10)), "b2": jnp.zeros(10)}


def loss_fn(params, x, y, *, dropout=0.0, key=None):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    if key is not None:
        hidden = atn.traced_dropout(key, hidden, dropout)
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, opt_state, key):
    rows_key, dropout_key = jax.random.split(key)
    rows = jax.random.randint(rows_key, (64,), 0, len(train_x))
    hp = atn.hyperparams(opt_state)
    loss, grads = jax.value_and_grad(loss_fn)(
        params, train_x[rows], train_y[rows], dropout=hp["dropout"], key=dropout_key
    )
    updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
    params = optax.apply_updates(params, updates)
    opt_state = jax.lax.cond(
        atn.wants_eval(opt_state),
        lambda state: atn.observe_eval(state, loss_fn(params, valid_x, valid_y)),
        lambda state: state,
        opt_state,
    )
    return params, opt_state, loss, hp


def main():
    params = init_params(jax.random.key(0))
    opt_state = optimizer.init(params)
    for step in range(TOTAL_STEPS):
        params, opt_state, loss, hp = train_step(params, opt_state, jax.random.key(step))
        if step % 100 == 0 or step == TOTAL_STEPS - 1:
            shown = ", ".join(f"{name} {float(value):.2g}" for name, value in hp.items())
            print(f"step {step:4d}  loss {float(loss):.4f}  {shown}")
    valid = float(loss_fn(params, valid_x, valid_y))
    print(f"validation loss {valid:.4f}")
    return {"valid": valid, "hyperparams": {name: float(value) for name, value in hp.items()}}


if __name__ == "__main__":
    main()
