"""The runs behind the pictures of ``pictures.md``, and the pictures: ``python docs/pictures.py``."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autotunenet_jax as atn
from autotunenet_jax import faults

HERE = pathlib.Path(__file__).parent
HIDDEN, FEATURES, CLASSES, TRAINED_ON, STEPS = 64, 16, 4, 192, 1600

OPTIMIZER = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, weight_decay=1e-3)


def dataset(key, size):
    """Points of a few classes that a random network tells apart, a tenth of them under a wrong name."""
    inputs, names, wrong = jax.random.split(key, 3)
    x = jax.random.normal(inputs, (size, FEATURES))
    first, second = (jax.random.normal(k, (FEATURES, FEATURES)) for k in jax.random.split(jax.random.key(7)))
    y = jnp.argmax((jnp.tanh(x @ first) @ second)[:, :CLASSES], axis=-1)
    return x, jnp.where(jax.random.uniform(wrong, (size,)) < 0.1, jax.random.randint(names, (size,), 0, CLASSES), y)


X, Y = dataset(jax.random.key(0), TRAINED_ON)
HELD_OUT = dataset(jax.random.key(1), 1024)


def new_state():
    sizes = (FEATURES, HIDDEN, HIDDEN, CLASSES)
    keys = jax.random.split(jax.random.key(2), 3)
    params = [
        {"w": jax.random.normal(key, (fan_in, fan_out)) * (2.0 / fan_in) ** 0.5, "b": jnp.zeros(fan_out)}
        for key, fan_in, fan_out in zip(keys, sizes, sizes[1:], strict=False)
    ]
    return {"params": params, "opt": OPTIMIZER.init(params), "key": jax.random.key(3)}


def loss_of(params, x, y, *, key=None, dropout=0.0):
    for number, layer in enumerate(params):
        x = x @ layer["w"] + layer["b"]
        if number < len(params) - 1:
            x = jax.nn.relu(x)
            x = x if key is None else atn.traced_dropout(jax.random.fold_in(key, number), x, dropout)
    return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()


def train_step(state, batch, hp):
    key, noise = jax.random.split(state["key"])
    options = {"key": noise, "dropout": hp["dropout"]} if "dropout" in hp else {}
    loss, grads = jax.value_and_grad(loss_of)(state["params"], *batch, **options)
    opt = atn.set_hyperparams(state["opt"], hp)
    updates, opt = OPTIMIZER.update(grads, opt, state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "opt": opt, "key": key}, loss


def eval_step(state):
    return loss_of(state["params"], *HELD_OUT)


def batches(step, hp):
    size = int(hp["batch_size"]) if "batch_size" in hp else 32
    rows = np.random.default_rng(step).integers(0, TRAINED_ON, size)
    return X[rows], Y[rows]


def run(space, *, initial, plan=None):
    """The history of a run; ``plan`` says which losses are spoiled."""
    step, data = (train_step, batches) if plan is None else faults.inject(train_step, batches, plan)
    tuner = atn.AutoTuneNet(space, STEPS, initial=initial)
    return atn.fit(step, new_state(), data, tuner=tuner, eval_step=eval_step, progress=False).history


RATE = {"learning_rate": (1e-5, 1e-1)}


def rate():
    return run(RATE, initial={"learning_rate": 1e-5})


def several():
    space = {**RATE, "weight_decay": (1e-4, 1.0), "dropout": (0.0, 0.6)}
    return run(space, initial={"learning_rate": 1e-4, "weight_decay": 1e-3, "dropout": 0.1})


def rollback():
    return run(RATE, initial={"learning_rate": 1e-3}, plan=dict.fromkeys(range(900, 908), "poison"))


def batch_size():
    return run({**RATE, "batch_size": [8, 16, 32, 64]}, initial={"learning_rate": 1e-4, "batch_size": 32})


RUNS = {function.__name__: function for function in (rate, several, rollback, batch_size)}


# What is shown of which run, by the name of the file.
PICTURES = {
    "overview": ("several", {"kind": "overview"}),
    "overview_rollback": ("rollback", {"kind": "overview", "style": "dark"}),
    "posterior": ("several", {"kind": "posterior"}),
    "round": ("rate", {"kind": "round", "round": 1}),
    "slice": ("several", {"kind": "slice", "style": "dark"}),
    "slice_batch_size": ("batch_size", {"kind": "slice"}),
}


def main():
    """Makes the pictures; histories that a folder given as an argument holds are not made again."""
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else None
    histories = {}
    for name, (source, options) in PICTURES.items():
        if source not in histories:
            path = None if folder is None else folder / f"{source}.json"
            is_there = path is not None and path.exists()
            histories[source] = atn.History.from_json(path) if is_there else RUNS[source]()
            if path is not None and not is_there:
                histories[source].to_json(path)
        histories[source].plot(HERE / "pictures" / f"{name}.png", **{"style": "light", **options})


if __name__ == "__main__":
    main()
