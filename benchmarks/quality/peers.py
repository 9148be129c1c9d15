"""Optimizers that claim to need no learning rate, or to adapt it, each in one compiled scan.

Settings are those that their papers or their optax documentation recommend; none is tuned to a workload.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.quality.baselines import WARMUP, cosine
from benchmarks.quality.task import RunState, Workload

# Polynomial averaging of the iterates, as the DoG paper recommends (gamma = 8).
_DOG_GAMMA = 8.0

# Hypergradient step of the additive rule, the paper's values for Adam and for SGD with momentum.
_HYPERGRADIENT = {"adam": 1e-7, "sgd": 1e-3}


class Peer(NamedTuple):
    """``make(task, learning_rate)`` gives the optimizer, ``read(opt_state, params)`` the weights to score."""

    make: Callable[[Workload, float], optax.GradientTransformation]
    read: Callable[[Any, Any], Any] = lambda opt_state, params: params


def _cosine(task: Workload) -> Callable[[Any], Any]:
    return lambda count: cosine((count + 1.0) / (task.total_steps + 1.0))


def _prodigy(task, learning_rate):
    return optax.contrib.prodigy(_cosine(task), safeguard_warmup=True)


def _schedule_free(task, learning_rate):
    return optax.contrib.schedule_free_adamw(warmup_steps=round(WARMUP * task.total_steps))


def _mechanic(task, learning_rate):
    base = optax.adam if task.family == "adam" else functools.partial(optax.sgd, momentum=0.9)
    return optax.contrib.mechanize(base(_cosine(task)))


class AveragedState(NamedTuple):
    """An optimizer's state beside the polynomial average of its iterates."""

    inner: Any
    average: Any
    count: jax.Array


def _dog(task, learning_rate):
    inner = optax.contrib.dog()

    def init(params):
        return AveragedState(inner.init(params), params, jnp.zeros((), jnp.float32))

    def update(grads, state, params=None, **_):
        updates, new = inner.update(grads, state.inner, params)
        share = (1.0 + _DOG_GAMMA) / (state.count + 1.0 + _DOG_GAMMA)
        average = jax.tree.map(lambda a, p, u: a + share * (p + u - a), state.average, params, updates)
        return updates, AveragedState(new, average, state.count + 1.0)

    return optax.GradientTransformation(init, update)


def _plateau(task, learning_rate):
    # A window of a hundredth of the run, halved after five windows without progress.
    window = max(task.total_steps // 100, 1)
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=5, rtol=1e-3, accumulation_size=window)
    return optax.chain(task.optimizer(learning_rate, task.defaults["weight_decay"]), plateau)


class HypergradientState(NamedTuple):
    """The inner state at unit rate, the rate, and the direction of the last step."""

    inner: Any
    rate: jax.Array
    direction: Any


def _hypergradient(task, learning_rate):
    # Additive rule: rate += beta * <gradient, last direction>; the direction is the step at unit rate, downhill.
    inner = task.optimizer(1.0, task.defaults["weight_decay"])
    beta = _HYPERGRADIENT[task.family]

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return HypergradientState(inner.init(params), jnp.float32(learning_rate), zeros)

    def update(grads, state, params=None, **_):
        rate = state.rate - beta * optax.tree.vdot(grads, state.direction)
        rate = jnp.maximum(rate, 0.0)
        direction, new = inner.update(grads, state.inner, params)
        return jax.tree.map(lambda u: rate * u, direction), HypergradientState(new, rate, direction)

    return optax.GradientTransformation(init, update)


def _momo(task, learning_rate):
    return optax.contrib.momo_adam() if task.family == "adam" else optax.contrib.momo()


PEERS: dict[str, Peer] = {
    "prodigy_cosine": Peer(_prodigy),
    "schedule_free": Peer(_schedule_free, optax.contrib.schedule_free_eval_params),
    "dog": Peer(_dog, lambda opt_state, params: opt_state.average),
    "mechanic_cosine": Peer(_mechanic),
    "cocob": Peer(lambda task, learning_rate: optax.contrib.cocob()),
    "momo": Peer(_momo),
    "plateau": Peer(_plateau),
    "hypergradient": Peer(_hypergradient),
}


@functools.cache
def _compiled(task: Workload, name: str) -> Callable[..., Any]:
    def run(state, table, arrays, learning_rate):
        transform = optax.with_extra_args_support(PEERS[name].make(task, learning_rate))
        # Masking keeps the faulty batch of W8 from ending the run, as for the scheduled baselines.
        is_faulty = task.nan_at is not None

        def step(carry, at):
            params, opt_state, key = carry
            t, rows = at
            key, sub = jax.random.split(key)
            batch = task.gather(arrays, rows, t)
            sub = sub if "dropout" in task.space else None
            rate = task.defaults.get("dropout", 0.0)
            loss, grads = jax.value_and_grad(task.loss_fn)(params, batch, sub, rate)
            updates, new_state = transform.update(grads, opt_state, params, value=loss)
            new = (optax.apply_updates(params, updates), new_state, key)
            if is_faulty:
                new = jax.tree.map(lambda a, b: jnp.where(jnp.isfinite(loss), a, b), new, carry)
            return new, (loss, jnp.asarray(batch.get("phase", 0)))

        carry = (state.params, transform.init(state.params), state.key)
        (params, opt_state, key), (losses, phases) = jax.lax.scan(step, carry, (jnp.arange(task.total_steps), table))
        return RunState(PEERS[name].read(opt_state, params), state.opt_state, key, phases[-1]), losses

    return jax.jit(run)


def run(task: Workload, seed: int, *, name: str, learning_rate: float) -> tuple[RunState, np.ndarray]:
    """Train with one of `PEERS`.

    Args:
      task: The workload.
      seed: Seeds parameters, dropout and batches.
      name: A key of `PEERS`.
      learning_rate: Where the methods that start from a rate start.

    Returns:
      The final state, holding the weights to score, and the float32 ``[T]`` training losses.
    """
    state, losses = _compiled(task, name)(
        task.init(seed), jnp.asarray(task.table(seed)), task.train_arrays, jnp.float32(learning_rate)
    )
    return state, np.asarray(losses)
