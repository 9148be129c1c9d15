"""One run: the device's pytrees, where the host believes them to be, and the steps between two decisions."""

import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from ..checkpoint.memory_copies import HostCopy, copy_tree, copy_tree_to_host
from ..compiler.blas_threads import one_blas_thread
from ..controller import AutoTuneNet, decide_jit, hyperparams_jit, observe_eval_jit
from ..controller.core import Core
from ..controller.state import SWEEP, TRAIN, Directive, TunerState
from ..session.batches import BatchSource
from ..session.recorder import Recorder
from ..session.signals import Stop
from . import device_copies
from .device_copies import Copies


@functools.partial(jax.jit, donate_argnums=1)
def _obey_jit(directive: Directive, copies: Copies) -> Copies:
    return device_copies.obey(directive, copies)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step_jit(
    core: Core,
    train_step: Callable[..., Any],
    copies: Copies,
    ts: TunerState,
    hyperparams: dict[str, Array],
    batch: Any,
) -> Any:
    """One training step with its bookkeeping and, after a rollback, its repair, as one donated program.

    Compiled once for each train step and core, however many runs use them.
    """
    state, loss = train_step(copies.state, batch, hyperparams)
    # A snapshot that the tuner distrusts is dated before the run.
    saved_step, kept_step = (jnp.maximum(step, 0) for step in (ts.slots.saved_step, ts.slots.kept_step))
    ts, directive, due = core.tick(ts, loss)
    copies = device_copies.obey(directive, Copies(state, copies.saved, copies.kept))
    copies = copies._replace(state=device_copies.refresh_keys(directive, copies.state, ts.rollbacks))
    log = {
        "step": ts.step,
        "data_step": ts.data_step,
        "loss": jnp.asarray(loss, jnp.float32),
        "verdict": directive.verdict,
        "outcome": directive.outcome,
        # Budget step of the snapshot a rollback went back to.
        "rewound": jnp.where(directive.restore, saved_step, jnp.where(directive.adopt, kept_step, -1)),
    }
    return copies, ts, core.hyperparams(ts), due, directive.evaluate, log


@functools.partial(jax.jit, static_argnums=0)
def _eval_jit(eval_step: Callable[..., Any], state: Any) -> Array:
    return eval_step(state)


@jax.jit
def _count_non_finite_jit(tree: Any) -> Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return sum((jnp.sum(~jnp.isfinite(leaf), dtype=jnp.int32) for leaf in leaves), jnp.zeros((), jnp.int32))


class Run:
    """The mutable side of one call of `fit`: the device's pytrees, and where the host believes the run to be."""

    def __init__(
        self,
        train_step: Callable[..., Any],
        state: Any,
        source: BatchSource,
        tuner: AutoTuneNet,
        *,
        eval_step: Callable[..., Any] | None,
        key: PRNGKeyArray,
        recorder: Recorder,
    ):
        self.tuner, self.core, self.source, self.recorder = tuner, tuner.core, source, recorder
        self.copies = device_copies.start(state)
        self.ts = tuner.init(key)
        self.hyperparams = hyperparams_jit(self.core, self.ts)
        self.train_step, self.eval_step = train_step, eval_step
        self.evaluated_at = -1
        self.retreats = 0
        self.last_eval: float | None = None
        self.best: HostCopy | None = None
        self.best_eval: float | None = None
        self._read_position()
        if self.phase != TRAIN:
            source.hold(0)
            recorder.begin_round(0, self.phase)

    def _read_position(self) -> None:
        ts = self.ts
        position = jax.device_get((ts.step, ts.data_step, ts.phase, ts.segment_left, ts.discarded))
        self.step, self.data_step, self.phase, self.segment_left = map(int, position[:4])
        self.recorder.discarded = int(position[4])

    # What a durable snapshot holds, and the way back.

    def snapshot(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, as a tree that `Snapshots` can store."""
        self.recorder.flush()
        host = {
            "evaluated_at": self.evaluated_at,
            "last_eval": self.last_eval,
            "best_eval": self.best_eval,
            "recorder": self.recorder.to_dict(),
        }
        best = None
        if self.eval_step is not None:
            # The tree must not change its structure with the first finite metric.
            best = self.copies.state if self.best is None else self.best.to_device()
        return {"copies": self.copies, "tuner": self.ts, "best": best, "host": json.dumps(host)}

    def resume(self, tree: dict[str, Any]) -> None:
        """Goes on from what `snapshot` gave."""
        self.tuner.check(tree["tuner"])
        self.copies, self.ts = tree["copies"], tree["tuner"]
        host = json.loads(str(tree["host"]))
        self.evaluated_at, self.last_eval = host["evaluated_at"], host["last_eval"]
        self.best_eval = host["best_eval"]
        self.best = None if self.best_eval is None else copy_tree_to_host(tree["best"])
        self.recorder.load(host["recorder"])
        self.hyperparams = hyperparams_jit(self.core, self.ts)
        self.retreats = int(self.ts.validation.retreats)
        self._read_position()
        if self.phase == TRAIN:
            self.source.release(self.data_step)
        else:
            self.source.hold(int(self.ts.slots.saved_data))

    def train_one(self) -> tuple[Array, Array]:
        """Dispatches one step; waits for nothing. Returns whether a decision is due and an evaluation wanted."""
        batch = self.source.get(self.data_step, self.hyperparams)
        in_force = self.hyperparams
        self.copies, self.ts, self.hyperparams, due, wants_eval, log = _step_jit(
            self.core, self.train_step, self.copies, self.ts, in_force, batch
        )
        self.step += 1
        self.data_step += 1
        self.recorder.log({**log, "hyperparams": in_force}, self.phase)
        return due, wants_eval

    def train_stretch(self, steps: int, stop: Stop, *, on_step: Callable[[], None]) -> None:
        """Trains until ``steps`` steps are done or a decision has been taken; syncs only where the tuner may decide."""
        for _ in range(steps):
            due, wants_eval = self.train_one()
            self.segment_left -= 1
            at_end = self.segment_left <= 1 or self.phase != TRAIN
            if at_end:
                if bool(wants_eval):
                    self.evaluate(is_settled=self.phase == TRAIN)
                if bool(due):
                    self.decide()
                    on_step()
                    return
                # A rollback, or the end of all rounds, has moved the next decision.
                self.segment_left = int(self.ts.segment_left)
            on_step()
            if stop.is_requested:
                return

    def evaluate(self, *, is_settled: bool, is_last: bool = False) -> None:
        """Measures the validation metric and tells the tuner, once per step."""
        if self.eval_step is None or self.evaluated_at == self.step:
            return
        metric = _eval_jit(self.eval_step, self.copies.state)
        self.ts = observe_eval_jit(self.core, self.ts, -metric if self.tuner.mode == "max" else metric)
        value = float(metric)
        self.evaluated_at = self.step
        self.recorder.add_eval(self.step, value, is_settled=is_settled)
        self._note_retreat(is_last)
        if is_settled:
            self.last_eval = value
            self._keep_best(value)

    def _note_retreat(self, is_last: bool) -> None:
        retreats = int(self.ts.validation.retreats)
        if retreats > self.retreats:
            self.retreats = retreats
            self.hyperparams = hyperparams_jit(self.core, self.ts)
            what = "the run ends in" if is_last else "training goes on, at a lower rate, from"
            message = f"The validation metric did not improve: {what} the best state."
            self.recorder.note(self.step, "retreat", message)

    def _keep_best(self, value: float) -> None:
        sign = -1.0 if self.tuner.mode == "max" else 1.0
        is_better = self.best_eval is None or sign * value < sign * self.best_eval
        if math.isfinite(value) and is_better:
            self.best_eval = value
            self.best = copy_tree_to_host(self.copies.state)

    def decide(self) -> None:
        """Lets the tuner decide and carries its directive out."""
        before = self.phase
        self.recorder.flush()
        # Steps may still be under way, and use the threads that a decision has no use for.
        jax.block_until_ready(self.ts)
        with one_blas_thread():
            self.ts, directive, report = decide_jit(self.core, self.ts)
            directive, report, incumbent = jax.device_get((directive, report, self.ts.incumbent))
        self.copies = _obey_jit(directive, self.copies)
        self.hyperparams = hyperparams_jit(self.core, self.ts)
        self._read_position()
        kind = int(self.ts.plan.kind[int(report.index)])
        chosen = self.core.space.decode(incumbent)
        self.recorder.decided(self.step, before, self.phase, directive, report, kind, chosen)
        if before == TRAIN and self.phase != TRAIN:
            self.source.hold(self.data_step)
        elif before != TRAIN and self.phase == TRAIN:
            self.source.release(self.data_step)

    def is_alive(self) -> bool:
        """Whether the state is whole: a step that fails takes the buffers it was given with it."""
        leaves = jax.tree.leaves((self.copies, self.ts))
        return not any(leaf.is_deleted() for leaf in leaves)

    def settle(self) -> None:
        """Leaves a usable state behind, wherever the run ended.

        Inside a round that is the fork kept so far, inside a range test the state before it. If the very last step
        broke the state, which no later loss could tell, it is the newest snapshot.
        """
        self._settle_round()
        # Counted, since a state may hold infinities of its own, such as those of a mask.
        broken, in_saved, in_kept = (int(_count_non_finite_jit(tree)) for tree in self.copies)
        saved_step, kept_step = (int(value) for value in jax.device_get(self.ts.slots[1::2]))
        candidates = [(saved_step, in_saved, self.copies.saved), (kept_step, in_kept, self.copies.kept)]
        sound = [(step, tree) for step, count, tree in candidates if count < broken]
        if sound:
            step, tree = max(sound, key=lambda entry: entry[0])
            self.copies = self.copies._replace(state=copy_tree(tree))
            self.recorder.note(
                self.step, "rollback", f"The last state was not finite; that of step {step} was restored."
            )

    def end(self) -> None:
        """Measures the last state, and goes back to the best one where that metric asks for it."""
        self.evaluate(is_settled=True, is_last=True)
        seen = self.ts.validation
        if self.eval_step is not None and self.phase == TRAIN and bool(seen.returns & seen.is_kept):
            self.copies = self.copies._replace(state=copy_tree(self.copies.kept))
            self.last_eval = float(_eval_jit(self.eval_step, self.copies.state))

    def _settle_round(self) -> None:
        if self.phase == TRAIN:
            return
        self.recorder.flush()
        fork, kept = (int(value) for value in jax.device_get((self.ts.round.fork, self.ts.round.kept)))
        if self.phase == SWEEP:
            self.copies = self.copies._replace(state=copy_tree(self.copies.saved))
            fork = -1
        elif kept >= 0:
            self.copies = self.copies._replace(state=copy_tree(self.copies.kept))
            fork = kept
        self.recorder.abandon(self.step, fork)
