"""A workload: everything about one training problem that a method may use, as pure functions.

Example:
    >>> from benchmarks.quality import workloads
    >>> task = workloads.get("W1")
    >>> state = task.init(0)
    >>> stream = task.stream(0)
    >>> state, loss = task.train_step(state, stream(0, {}), {"learning_rate": 1e-3})
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.quality import data as data_lib
from benchmarks.quality.models import Model

Batch = dict[str, Any]
Hp = Mapping[str, Any]

# A forward pass costs about a third of a gradient step on the same rows.
FORWARD_PRICE = 1 / 3


class RunState(NamedTuple):
    """All that training changes. ``phase`` is the part of a drifting task the last batch came from."""

    params: Any
    opt_state: Any
    key: jax.Array
    phase: jax.Array


def adam(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """Adam with decoupled weight decay on matrices; decay 0 is plain Adam."""
    return optax.adamw(learning_rate, weight_decay=weight_decay, mask=_matrices)


def momentum_sgd(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """SGD with momentum 0.9 and weight decay on matrices."""
    return optax.chain(optax.add_decayed_weights(weight_decay, mask=_matrices), optax.sgd(learning_rate, momentum=0.9))


def plain_sgd(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """SGD without momentum, with weight decay on matrices."""
    return optax.chain(optax.add_decayed_weights(weight_decay, mask=_matrices), optax.sgd(learning_rate))


def rmsprop(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """RMSProp with weight decay on matrices."""
    return optax.chain(optax.add_decayed_weights(weight_decay, mask=_matrices), optax.rmsprop(learning_rate))


def adagrad(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """Adagrad with weight decay on matrices."""
    return optax.chain(optax.add_decayed_weights(weight_decay, mask=_matrices), optax.adagrad(learning_rate))


def lion(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """Lion with decoupled weight decay on matrices."""
    return optax.lion(learning_rate, weight_decay=weight_decay, mask=_matrices)


def clipped_adam(learning_rate: Any, weight_decay: Any) -> optax.GradientTransformation:
    """`adam` after clipping the global norm of the gradient to 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), adam(learning_rate, weight_decay))


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Workload:
    """One training problem with its data, optimizer, defaults and space.

    Args:
      name: Short name, such as ``"W1"``.
      title: What it is, for tables.
      total_steps: Budget T in gradient steps.
      batch_size: Rows (or sequences) of a batch.
      model: Pure ``init`` and ``apply``.
      load: Returns the three splits.
      optimizer: ``(learning_rate, weight_decay) -> GradientTransformation``; both are injected.
      family: ``"adam"`` or ``"sgd"``: which parameter-free optimizers are comparable.
      loss: ``"classes"`` (cross-entropy), ``"real"`` (squared error of one output or of all of them) or ``"tokens"``
        (next-token cross-entropy).
      defaults: Value of every hyperparameter that a method leaves out.
      space: Hyperparameter name to ``(lo, hi)``: all that may be tuned.
      context: Tokens of a sequence; text only.
      drift_at: Share of T from which the pixels are permuted; None for a stationary task.
      nan_at: Share of T at which one batch is NaN; None for clean data.
      compute_dtype: Dtype of the forward and backward pass; parameters stay float32.
    """

    name: str
    title: str
    total_steps: int
    batch_size: int
    model: Model
    load: Callable[[], data_lib.Data]
    optimizer: Callable[[Any, Any], optax.GradientTransformation]
    family: Literal["adam", "sgd"] = "adam"
    loss: Literal["classes", "real", "tokens"] = "classes"
    defaults: Mapping[str, float]
    space: Mapping[str, tuple[float, float]]
    context: int = 0
    drift_at: float | None = None
    nan_at: float | None = None
    compute_dtype: Any = jnp.float32

    def with_steps(self, total_steps: int) -> "Workload":
        """The same problem with another budget."""
        return dataclasses.replace(self, total_steps=total_steps)

    @property
    def rate_space(self) -> dict[str, tuple[float, float]]:
        """The learning rate alone."""
        return {"learning_rate": self.space["learning_rate"]}

    @functools.cached_property
    def data(self) -> data_lib.Data:
        """The splits, loaded on first use."""
        return self.load()

    @property
    def eval_price(self) -> float:
        """Gradient steps that one `eval_step` is charged as."""
        rows = len(self.data.val.x) / (self.context or 1)
        return FORWARD_PRICE * rows / self.batch_size

    @property
    def probe_price(self) -> float:
        """Gradient steps that one `probe_step` is charged as."""
        return FORWARD_PRICE * len(self._probe["y"]) / self.batch_size

    def init(self, seed: Any) -> RunState:
        """Fresh parameters, optimizer state and dropout key from an integer seed; pure."""
        k_params, k_run = jax.random.split(jax.random.key(seed))
        params = self.model.init(k_params)
        return RunState(params, self.injected.init(params), k_run, jnp.zeros((), jnp.int32))

    @functools.cached_property
    def injected(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer with its learning rate and weight decay readable and writable in the state."""
        make = optax.inject_hyperparams(self.optimizer, hyperparam_dtype=jnp.float32)
        return make(learning_rate=self.defaults["learning_rate"], weight_decay=self.defaults["weight_decay"])

    def loss_fn(self, params: Any, batch: Batch, key: jax.Array | None, rate: Any) -> jax.Array:
        """Mean training loss of a batch; ``key=None`` switches dropout off."""
        cast = functools.partial(jax.tree.map, lambda a: a.astype(self.compute_dtype))
        x = batch["x"] if self.loss == "tokens" else batch["x"].astype(self.compute_dtype)
        out = self.model.apply(cast(params), x, key, rate).astype(jnp.float32)
        if self.loss == "real":
            return jnp.mean(jnp.square(out.reshape(batch["y"].shape) - batch["y"]))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, batch["y"]))

    def train_step(self, state: RunState, batch: Batch, hp: Hp) -> tuple[RunState, jax.Array]:
        """One optimizer step under ``hp``; names that are absent take their default."""
        values = {**self.defaults, **hp}
        key, sub = jax.random.split(state.key)
        sub = sub if "dropout" in self.space else None
        loss, grads = jax.value_and_grad(self.loss_fn)(state.params, batch, sub, values.get("dropout", 0.0))
        held = state.opt_state.hyperparams
        opt_state = state.opt_state._replace(
            hyperparams={name: jnp.asarray(values[name], old.dtype) for name, old in held.items()}
        )
        updates, opt_state = self.injected.update(grads, opt_state, state.params)
        phase = jnp.asarray(batch.get("phase", state.phase), jnp.int32)
        return RunState(optax.apply_updates(state.params, updates), opt_state, key, phase), loss

    def eval_params(self, params: Any, phase: Any = 0) -> jax.Array:
        """Mean loss over the whole validation split; deterministic, dropout off."""
        return self.loss_fn(params, self._fixed("val", phase), None, 0.0)

    def eval_step(self, state: RunState) -> jax.Array:
        """Validation loss of a training state; pure and deterministic."""
        return self.eval_params(state.params, state.phase)

    def probe_step(self, state: RunState) -> jax.Array:
        """Loss on the first 512 validation rows (64 sequences of text): a cheaper `eval_step`."""
        return self.loss_fn(state.params, self._constant(self._probe, state.phase), None, 0.0)

    def test_step(self, state: RunState) -> dict[str, jax.Array]:
        """Test loss and accuracy (for regression: the share of variance explained)."""
        batch = self._fixed("test", state.phase)
        loss = self.loss_fn(state.params, batch, None, 0.0)
        if self.loss == "real":
            return {"loss": loss, "accuracy": 1.0 - loss / jnp.var(batch["y"])}
        out = self.model.apply(state.params, batch["x"], None, 0.0)
        return {"loss": loss, "accuracy": jnp.mean(jnp.argmax(out, -1) == batch["y"])}

    def stream(self, seed: int) -> Callable[[int, Hp], Batch]:
        """``(step, hp) -> batch``, deterministic in the step and the seed; shuffled anew each epoch."""
        return lambda step, hp=None: self.gather(self.train_arrays, self.rows(step, seed), step)

    def batches(self, step: int, hp: Hp | None = None) -> Batch:
        """The stream of seed 0."""
        return self.stream(0)(step, hp)

    def rows(self, step: int, seed: int) -> np.ndarray:
        """int32 ``[batch]``: the training rows (or first tokens) of the batch at a step."""
        per_epoch = self._n_rows // self.batch_size
        order = _epoch_order(seed, step // per_epoch, self._n_rows)
        at = (step % per_epoch) * self.batch_size
        chosen = order[at : at + self.batch_size]
        if not self.context:
            return chosen
        # A random offset per epoch, so that sequences do not always begin at the same tokens.
        return chosen * self.context + int(_epoch_order(seed, step // per_epoch, self.context)[0])

    def table(self, seed: int) -> np.ndarray:
        """int32 ``[T, batch]``: the rows of every step of a run, for loops compiled as one scan."""
        return np.stack([self.rows(step, seed) for step in range(self.total_steps)])

    @functools.cached_property
    def train_arrays(self) -> tuple[jax.Array, jax.Array]:
        """The training split on the device."""
        return jnp.asarray(self.data.train.x), jnp.asarray(self.data.train.y)

    def gather(self, arrays: tuple[jax.Array, jax.Array], rows: Any, step: Any) -> Batch:
        """The batch of ``rows`` at ``step``; the step matters to drifting and faulty data alone. Pure."""
        return self._gather(arrays, rows, step)

    @functools.cached_property
    def _gather(self) -> Callable[..., Batch]:
        def gather(arrays, rows, step):
            x, y = arrays
            if self.context:
                tokens = x[rows[:, None] + jnp.arange(self.context + 1)]
                return {"x": tokens[:, :-1], "y": tokens[:, 1:]}
            batch = {"x": x[rows], "y": y[rows]}
            if self.drift_at is not None:
                phase = jnp.asarray(step >= round(self.drift_at * self.total_steps), jnp.int32)
                batch = {**self._drifted(batch, phase), "phase": phase}
            if self.nan_at is not None:
                is_bad = step == round(self.nan_at * self.total_steps)
                batch["x"] = jnp.where(is_bad, jnp.nan, batch["x"])
            return batch

        return jax.jit(gather)

    @functools.cached_property
    def _n_rows(self) -> int:
        n = len(self.data.train.x)
        return (n - 1) // self.context - 1 if self.context else n

    @functools.cached_property
    def _probe(self) -> Batch:
        batch = _whole(self.data.val, self.context)
        return {name: value[: 64 if self.context else 512] for name, value in batch.items()}

    def _fixed(self, split: str, phase: Any) -> Batch:
        return self._constant(_whole(getattr(self.data, split), self.context), phase)

    def _constant(self, batch: Batch, phase: Any) -> Batch:
        # The barrier keeps the compiler from folding the first layer over the whole split at compile time.
        batch = jax.lax.optimization_barrier({name: jnp.asarray(value) for name, value in batch.items()})
        return self._drifted(batch, phase)

    def _drifted(self, batch: Batch, phase: Any) -> Batch:
        if self.drift_at is None:
            return batch
        order = np.random.default_rng(7).permutation(batch["x"].shape[-1])
        return {**batch, "x": jnp.where(jnp.asarray(phase) > 0, batch["x"][..., order], batch["x"])}


@functools.lru_cache(maxsize=64)
def _epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n).astype(np.int32)


def _whole(split: data_lib.Split, context: int) -> Batch:
    if not context:
        return {"x": split.x, "y": split.y}
    n = (len(split.x) - 1) // context
    return {"x": split.x[: n * context].reshape(n, context), "y": split.x[1 : n * context + 1].reshape(n, context)}
