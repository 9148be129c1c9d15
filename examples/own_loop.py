"""A training loop of one's own around the pure tuner: all that a loop must do with a directive is in `train`.

python examples/own_loop.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import autotunenet_jax as atn

TOTAL_STEPS = 1000

x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = jnp.asarray(x[order] / 16.0, jnp.float32), jnp.asarray(y[order], jnp.int32)
train_x, train_y, valid_x, valid_y = x[:1200], y[:1200], x[1200:], y[1200:]

optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=1e-3, momentum=0.9)
tuner = atn.AutoTuneNet(
    {"learning_rate": (1e-4, 1.0), "momentum": (0.5, 0.99)},
    total_steps=TOTAL_STEPS,
    initial={"learning_rate": 1e-4, "momentum": 0.9},
)


def loss_fn(params, x, y):
    logits = jax.nn.relu(x @ params["w1"]) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def train_step(state, tuner_state, data_step):
    params, opt_state = state
    rows = jax.random.randint(jax.random.key(data_step), (64,), 0, len(train_x))
    opt_state = atn.set_hyperparams(opt_state, tuner.hyperparams(tuner_state))
    loss, grads = jax.value_and_grad(loss_fn)(params, train_x[rows], train_y[rows])
    updates, opt_state = optimizer.update(grads, opt_state, params)
    tuner_state, directive = tuner.update(tuner_state, loss)
    return (optax.apply_updates(params, updates), opt_state), tuner_state, directive


def train(params):
    # Nothing is donated here, so a name is as good as a copy.
    state = saved = kept = (params, optimizer.init(params))
    tuner_state, data_step, counts = tuner.init(jax.random.key(0)), 0, {"save": 0, "keep": 0, "restore": 0, "adopt": 0}
    for _ in range(TOTAL_STEPS):
        state, tuner_state, directive = train_step(state, tuner_state, data_step)
        if directive.save:
            saved = state
        if directive.keep:
            kept = state
        if directive.restore:
            state = saved
        if directive.adopt:
            state = kept
        data_step = int(directive.data_step)
        counts = {name: count + bool(getattr(directive, name)) for name, count in counts.items()}
    return state, tuner_state, counts


def main():
    first, second = jax.random.split(jax.random.key(0))
    glorot = jax.nn.initializers.glorot_normal()
    params = {"w1": glorot(first, (64, 64)), "w2": glorot(second, (64, 10))}
    (params, _), tuner_state, counts = train(params)
    hp = {name: float(value) for name, value in tuner.space.decode(tuner_state.incumbent).items()}
    valid = float(loss_fn(params, valid_x, valid_y))
    print(", ".join(f"{count} x {name}" for name, count in counts.items()))
    print("tuned to", ", ".join(f"{name} {value:.2g}" for name, value in hp.items()))
    print(f"validation loss {valid:.4f}")
    return {"valid": valid, "hyperparams": hp, "counts": counts}


if __name__ == "__main__":
    main()
