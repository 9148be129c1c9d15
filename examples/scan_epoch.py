"""A whole epoch in one `jax.lax.scan`, the tuner inside: nothing returns to Python between its steps.

Learning rate, effective batch size (by `optax.MultiSteps`, whose number of accumulated batches is injected) and weight
decay are tuned together, without compiling anything twice.

    python examples/scan_epoch.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import autotunenet_jax as atn

EPOCHS = 25
BATCH = 32

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = jnp.asarray(x[order] / 16.0, jnp.float32), jnp.asarray(y[order], jnp.int32)
train_x, train_y, valid_x, valid_y = x[:1280], y[:1280], x[1280:], y[1280:]
STEPS_PER_EPOCH = len(train_x) // BATCH


def accumulating_adamw(learning_rate, weight_decay, accumulation):
    """AdamW that steps once in ``accumulation`` batches; a batch half gathered is finished at its old length."""
    steps = optax.MultiSteps(optax.adamw(learning_rate, weight_decay=weight_decay), lambda _: accumulation)
    return steps.gradient_transformation()


optimizer = atn.autotune(
    accumulating_adamw,
    {"learning_rate": (1e-5, 1.0), "weight_decay": (1e-4, 1.0), "accumulation": atn.Choice([1, 2, 4])},
    total_steps=EPOCHS * STEPS_PER_EPOCH,
    learning_rate=1e-5,
    weight_decay=1e-3,
    accumulation=2,
)


def init_params(key):
    first, second = jax.random.split(key)
    glorot = jax.nn.initializers.glorot_normal()
    return {"w1": glorot(first, (64, 64)), "b1": jnp.zeros(64), "w2": glorot(second, (64, 10)), "b2": jnp.zeros(10)}


def loss_fn(params, x, y):
    logits = jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_epoch(params, opt_state, key):
    def step(carry, rows):
        params, opt_state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, train_x[rows], train_y[rows])
        updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
        params = optax.apply_updates(params, updates)
        metric = jax.lax.cond(
            atn.wants_eval(opt_state), lambda: loss_fn(params, valid_x, valid_y), lambda: jnp.float32(jnp.nan)
        )
        return (params, atn.observe_eval(opt_state, metric)), loss

    batches = jax.random.permutation(key, len(train_x)).reshape(STEPS_PER_EPOCH, BATCH)
    (params, opt_state), losses = jax.lax.scan(step, (params, opt_state), batches)
    return params, opt_state, losses.mean()


def main():
    params = init_params(jax.random.key(0))
    opt_state = optimizer.init(params)
    for epoch in range(EPOCHS):
        params, opt_state, loss = train_epoch(params, opt_state, jax.random.key(epoch))
        hp = atn.hyperparams(opt_state)
        shown = ", ".join(f"{name} {float(value):.2g}" for name, value in hp.items())
        print(f"epoch {epoch:2d}  loss {float(loss):.4f}  {shown}")
    valid = float(loss_fn(params, valid_x, valid_y))
    print(f"validation loss {valid:.4f}")
    return {"valid": valid, "hyperparams": {name: float(value) for name, value in hp.items()}}


if __name__ == "__main__":
    main()
