"""The task that most cases share: ten noisy classes drawn by a fixed network, so that the floor of the loss is high.

Two good runs end within a few per cent of each other, and a ratio of losses means something after some hundred steps.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import autotunenet_jax as atn

INPUTS, HIDDEN, CLASSES, BATCH = 20, 40, 10, 48
TRAIN, HELD_OUT = 6000, 2000
GOOD_RATE = 1e-2
SPACE = {"learning_rate": (1e-5, 1.0)}
START = 3e-4

FAULTS = ("none", "nan_loss", "nan_grad", "nan_both", "inf_loss", "dead", "long", "idle", "grad", "scale", "tell")
"""What may happen in a step: the loss, the gradients or both are NaN; the loss is infinite; all hidden units die; the
parameters are multiplied by ``size``; a parameter that the loss does not touch becomes infinite; the gradients are
``size``; the loss that is told is multiplied by ``size``, or is ``size``."""

NON_FINITE = FAULTS[1:5]

Faults = Callable[[int, int], tuple[str, float]]
"""From the position in the data and the number of the step to a fault and its size."""


def no_faults(position: int, call: int) -> tuple[str, float]:
    return "none", 1.0


@functools.cache
def data() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Training, validation and test sets."""
    rng = np.random.default_rng(11)
    first, second = rng.normal(size=(INPUTS, 32)) / INPUTS**0.5, rng.normal(size=(32, CLASSES)) / 32**0.5
    sets = []
    for size in (TRAIN, HELD_OUT, HELD_OUT):
        x = rng.normal(size=(size, INPUTS))
        logits = 6.0 * np.tanh(1.5 * x @ first) @ second
        y = (logits + rng.gumbel(size=logits.shape)).argmax(1)
        sets.append((x.astype(np.float32), y.astype(np.int32)))
    return tuple(sets)


def rows(
    position: int, *, size: int = BATCH, noisy: float = 0.0, classes: int = CLASSES
) -> tuple[np.ndarray, np.ndarray]:
    """The batch at a position: of the first classes alone, a share of its labels replaced by random ones."""
    rng = np.random.default_rng((5, position))
    x, y = data()[0]
    at = rng.integers(0, TRAIN, size) if classes == CLASSES else rng.choice(np.flatnonzero(y < classes), size)
    x, y = x[at], y[at]
    return x, np.where(rng.random(size) < noisy, rng.integers(0, CLASSES, size), y).astype(np.int32)


def new_params(seed: int = 0) -> dict[str, jax.Array]:
    one, two = jax.random.split(jax.random.key(seed))
    return {
        "a": jax.random.normal(one, (INPUTS, HIDDEN)) * INPUTS**-0.5,
        "b": jnp.zeros(HIDDEN),
        "c": jax.random.normal(two, (HIDDEN, CLASSES)) * HIDDEN**-0.5,
        "d": jnp.zeros(CLASSES),
        "idle": jnp.ones(3),
    }


def loss_of(p: Any, x: Any, y: Any) -> jax.Array:
    logits = jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"] + p["d"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def test_loss(p: Any) -> jax.Array:
    return loss_of(p, *data()[2])


def eval_step(state: Any) -> jax.Array:
    return loss_of(state["p"], *data()[1])


def faulty_gradients(p: Any, x: Any, y: Any, code: Any, size: Any) -> tuple[jax.Array, Any]:
    """The loss that is told and the gradients."""
    loss, grads = jax.value_and_grad(loss_of)(p, x, y)
    is_nan, is_set = _is(code, "nan_grad", "nan_both"), _is(code, "grad")
    grads = jax.tree.map(lambda g: jnp.where(is_nan, jnp.nan, jnp.where(is_set, size, g)), grads)
    grads["idle"] = jnp.zeros_like(grads["idle"])
    loss = jnp.where(_is(code, "scale"), loss * size, jnp.where(_is(code, "tell"), size, loss))
    loss = jnp.where(_is(code, "nan_loss", "nan_both"), jnp.nan, jnp.where(_is(code, "inf_loss"), jnp.inf, loss))
    return loss, grads


def damaged(p: Any, code: Any, size: Any) -> Any:
    """The parameters after what a fault does to them."""
    p = jax.tree.map(lambda a: jnp.where(_is(code, "long"), a * size, a), p)
    is_dead = _is(code, "dead")
    return {
        **p,
        "b": jnp.where(is_dead, p["b"] - 1e3, p["b"]),
        "d": jnp.where(is_dead, 0.0, p["d"]),
        "idle": jnp.where(_is(code, "idle"), jnp.inf, p["idle"]),
    }


def _is(code: Any, *names: str) -> Any:
    return jnp.isin(code, jnp.array([FAULTS.index(name) for name in names]))


def batch_of(faults: Faults, position: int, call: int, **options: Any) -> tuple[Any, ...]:
    name, size = faults(position, call)
    return (*rows(position, **options), np.int32(FAULTS.index(name)), np.float32(size))


OPTIMIZERS: dict[str, Any] = {
    "adam": optax.inject_hyperparams(optax.adam)(learning_rate=START),
    "momentum": optax.inject_hyperparams(functools.partial(optax.sgd, momentum=0.9, nesterov=True))(
        learning_rate=START
    ),
}


@functools.cache
def train_step(optimizer: str = "adam") -> Callable[..., Any]:
    """A step for `fit`; the same object for the same optimizer, so that it is compiled once."""
    tx = OPTIMIZERS[optimizer]

    def step(state: Any, batch: Any, hp: Any) -> tuple[Any, jax.Array]:
        x, y, code, size = batch
        loss, grads = faulty_gradients(state["p"], x, y, code, size)
        updates, opt = tx.update(grads, atn.set_hyperparams(state["opt"], hp), state["p"])
        p = damaged(optax.apply_updates(state["p"], updates), code, size)
        ema = jax.tree.map(lambda e, q: 0.95 * e + 0.05 * q, state["ema"], p)
        return {"p": p, "opt": opt, "ema": ema, "n": state["n"] + 1}, loss

    return step


def new_state(optimizer: str = "adam", seed: int = 0) -> dict[str, Any]:
    p = new_params(seed)
    return {"p": p, "opt": OPTIMIZERS[optimizer].init(p), "ema": p, "n": jnp.zeros((), jnp.int32)}


@dataclasses.dataclass
class Ended:
    """How a run ended.

    Attributes:
      loss: On test data.
      rate: The rate in force half way.
      is_finite: Whether everything in the state is finite.
      said: Warnings and events, as text.
      rollbacks: How often the run went back; None where the way in does not tell.
      result: What the way in returned.
      tuner: The tuner, where it is an object of its own.
    """

    loss: float
    rate: float
    is_finite: bool
    said: list[str]
    rollbacks: int | None
    result: Any
    tuner: Any = None

    def __str__(self) -> str:
        back = "" if self.rollbacks is None else f", {self.rollbacks} rollbacks"
        return f"{self.loss:.3f}, rate {self.rate:.1e}{back}{'' if self.is_finite else ', NOT FINITE'}"


def is_finite(tree: Any) -> bool:
    leaves = [np.asarray(x) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return all(np.isfinite(leaf.astype(np.float64)).all() for leaf in leaves)


BatchOptions = Callable[[int], dict[str, Any]]
"""From the position in the data to arguments of `rows`."""


def feed(faults: Faults, options: BatchOptions | None = None) -> Callable[[int, Any], Any]:
    """Batches for `fit`, which asks once for the first one before it begins."""
    calls = iter(range(-1, 10**9))
    return lambda at, hp: batch_of(faults, at, max(next(calls), 0), **(options(int(at)) if options else {}))


def tuner(total: int, **options: Any) -> atn.AutoTuneNet:
    return atn.AutoTuneNet(SPACE, total, **{"initial": {"learning_rate": START}, **options})


def run_fit(
    faults: Faults = no_faults,
    *,
    total: int = 800,
    optimizer: str = "adam",
    validates: bool = True,
    batch: BatchOptions | None = None,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    **more: Any,
) -> Ended:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = atn.fit(
            train_step(optimizer),
            new_state(optimizer, seed),
            feed(faults, batch),
            tuner=tuner(total, **(options or {})),
            progress=False,
            **{"eval_step": eval_step if validates else None, **more},
        )
    said = [str(w.message) for w in caught] + [f"{e['kind']}: {e['message']}" for e in result.history.events]
    return Ended(
        float(test_loss(result.state["p"])),
        rate_at(result.history.records, 0.5 * total),
        is_finite(result.state),
        said,
        result.history.summary["rollbacks"],
        result,
    )


def rate_at(records: list[dict[str, Any]], step: float) -> float:
    """The usual rate of ordinary training about a step, over more steps than a cool-down or a trial lasts."""
    rows = [row for row in records if row["phase"] == "train" and abs(row["step"] - step) <= 0.16 * step]
    return float(np.median([row["learning_rate"] for row in rows or records]))


@functools.cache
def wrapped(total: int, optimizer: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, Any, Any]:
    """A tuned optimizer, its compiled step and its compiled report of a metric."""
    tx = atn.autotune(OPTIMIZERS[optimizer], SPACE, total, **{"initial": {"learning_rate": START}, **dict(options)})

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(p: Any, state: Any, batch: Any) -> Any:
        x, y, code, size = batch
        loss, grads = faulty_gradients(p, x, y, code, size)
        updates, state = tx.update(grads, state, p, value=loss)
        p = damaged(optax.apply_updates(p, updates), code, size)
        return p, state, atn.wants_eval(state), atn.hyperparams(state)["learning_rate"]

    tell = jax.jit(lambda p, state: atn.observe_eval(state, loss_of(p, *data()[1])), donate_argnums=1)
    return tx, step, tell


def run_autotune(
    faults: Faults = no_faults,
    *,
    total: int = 800,
    optimizer: str = "adam",
    validates: bool = True,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    batch: BatchOptions | None = None,
) -> Ended:
    tx, step, tell = wrapped(total, optimizer, tuple(sorted((options or {}).items())))
    p = new_params(seed)
    rates = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state = tx.init(p)
        for k in range(total):
            p, state, wants, rate = step(p, state, batch_of(faults, k, k, **(batch(k) if batch else {})))
            rates.append(rate)
            if validates and bool(wants):
                state = tell(p, state)
    said = [str(w.message) for w in caught]
    half = float(np.median(np.asarray(rates[int(0.5 * total) : int(0.58 * total)])))
    back = int(state.tuner.rollbacks)
    return Ended(float(test_loss(p)), half, is_finite(p), said, back, (p, state))


@functools.cache
def _plain_step(optimizer: str, total: int, rate: float, warm: int) -> Any:
    shape = optax.linear_schedule(rate, 0.0, total)
    tx = {"adam": optax.adam, "momentum": functools.partial(optax.sgd, momentum=0.9, nesterov=True)}[optimizer](
        lambda k: shape(k) * jnp.minimum(1.0, (k + 1) / max(warm, 1))
    )

    @jax.jit
    def step(p: Any, state: Any, x: Any, y: Any) -> Any:
        updates, state = tx.update(jax.grad(loss_of)(p, x, y), state, p)
        return optax.apply_updates(p, updates), state

    return tx, step


@functools.cache
def plain(
    faults: Faults = no_faults,
    *,
    total: int = 800,
    stop: int | None = None,
    optimizer: str = "adam",
    rate: float = GOOD_RATE,
    warm: int = 0,
    seed: int = 0,
    batch: BatchOptions | None = None,
) -> float:
    """Test loss of plain training at a good rate under linear decay, without the steps that a fault would spoil."""
    tx, step = _plain_step(optimizer, total, rate, warm)
    p = new_params(seed)
    state = tx.init(p)
    for k in range(stop or total):
        if faults(k, k)[0] not in NON_FINITE:
            p, state = step(p, state, *rows(k, **(batch(k) if batch else {})))
    return float(test_loss(p))


def at_call(number: int, name: str, size: float = 1.0) -> Faults:
    """One fault, at one step."""
    return lambda position, call: (name, size) if call == number else ("none", 1.0)


def share(portion: float, name: str, seed: int = 0) -> Faults:
    """A share of all batches is bad, always the same ones."""
    bad = np.random.default_rng(seed).random(20_000) < portion
    return lambda position, call: (name, 1.0) if bad[position] else ("none", 1.0)


def verdict(ended: Ended, reference: float, factor: float, what: str = "plain") -> tuple[str, str, bool]:
    """Whether a run ended no worse than so many times a reference."""
    limit = factor * reference
    return f"<= {limit:.3f} ({factor:g} x {what}), finite", str(ended), ended.is_finite and ended.loss <= limit


def of_seeds(
    ratios: list[float], typical: float = 1.05, worst: float = 1.1, what: str = "plain"
) -> tuple[str, str, bool]:
    """Whether runs of several seeds, as multiples of a reference each, are typically and at worst near it."""
    middle, highest = float(np.median(ratios)), float(np.max(ratios))
    is_ok = middle <= typical and highest <= worst
    expected = f"<= {typical:g} x {what}, at worst {worst:g}, {len(ratios)} seeds"
    return expected, f"{middle:.3f}, at worst {highest:.3f}", is_ok
