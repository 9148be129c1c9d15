"""One attached run: losses and metrics in, orders carried out, a record kept."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

import autotunenet_jax as atn

from . import _plain, _reduce
from ._engine import FORK, SWEEP, TRAIN, Engine, Tick
from ._live import LiveTraining
from ._notices import Notices

_FORMAT = 4


class Run:
    """What `AutoTuneNet.attach` begins.

    Args:
      engine: Decides.
      live: Is tuned.
      recorder: Writes the history.
      validate: Gives the metric of the present state; None where `validate` is called by hand.

    Attributes:
      wants_validation: Whether the metric of the present state is asked for.
      last_eval: Latest metric outside rounds; None before one.
      eval_step: Budget step of the latest metric; -1 before one.
      is_settled: Whether the run has been brought to its end.
    """

    def __init__(
        self, engine: Engine, live: LiveTraining, recorder: atn.Recorder, *, validate: Callable[[], Any] | None
    ):
        self.engine, self.live, self.recorder, self._validate = engine, live, recorder, validate
        space = engine.tuner.space
        self.total_steps, self._fingerprint = engine.tuner.total_steps, space.fingerprint()
        self.notices = Notices(space, self.total_steps)
        self.wants_validation, self.is_settled = True, False
        self.last_eval: float | None = None
        self.eval_step = -1
        live.warm_up.in_round = engine.phase != TRAIN
        if engine.phase != TRAIN:
            recorder.begin_round(0, engine.phase)
        live.apply(engine.hyperparams())
        live.saved, live.kept = live.copy_out(), live.copy_out()

    # Training.

    def advance(self, loss: float) -> tuple[Tick, Any | None]:
        """Takes in the loss of one step; returns what was said last, and the extra of the state put back."""
        engine = self.engine
        phase, data_step = engine.phase, engine.data_step + 1
        said = engine.tick(_reduce.mean(loss))
        self._log(loss, phase, said)
        self.wants_validation = bool(said.directive.evaluate)
        extra = self.live.obey(said.directive, rewinds=False)
        if self.wants_validation and self._validate is not None:
            self.validate(self._validate())
        if said.is_due:
            verdict = said.directive.verdict
            said = self._decide(phase)
            said = said._replace(directive=said.directive._replace(verdict=verdict))
            # A metric that was not reported by now is of no use to the next stretch.
            self.wants_validation = bool(said.directive.evaluate)
            extra = self.live.obey(said.directive, rewinds=said.directive.data_step != data_step)
        self.live.warm_up.in_round = engine.phase != TRAIN
        if said.step == self.total_steps and not self.is_settled:
            self.settle()
        else:
            if engine.phase == TRAIN:
                self.live.catch_up()
            self.live.apply(engine.hyperparams())
        return said, extra

    def _decide(self, before: int) -> Tick:
        engine, recorder = self.engine, self.recorder
        recorder.flush()
        step = engine.step
        said, (held, chosen, kind, discarded) = engine.decide()
        recorder.discarded = discarded
        if before == TRAIN and said.phase == TRAIN:
            has_metric = math.isfinite(engine.state.validation.level)
            self.notices.round_skipped(is_slow=kind != 0, has_metric=has_metric)
        recorder.decided(step, before, said.phase, said.directive, held, kind, chosen)
        return said

    def _log(self, loss: float, phase: int, said: Tick) -> None:
        if said.directive.restore or said.directive.adopt:
            # A state that the tuner distrusts is dated before the run.
            rewound = max(said.saved_step if said.directive.restore else said.kept_step, 0)
        else:
            rewound = -1
        entry = {
            "step": said.step,
            "data_step": said.directive.data_step,
            "loss": loss,
            "phase": phase,
            "rewound": rewound,
            "verdict": said.directive.verdict,
            "outcome": said.directive.outcome,
            "hyperparams": self.live.values,
        }
        self.recorder.log(entry, phase)
        self.notices.budget_spent(said.step)

    def settle(self) -> None:
        """Leaves the best state there is: in a round the fork kept so far, in a range test the state before it.

        If the very last step broke the state, which no later loss could tell, it is the newest copy that is whole.
        """
        self.is_settled = True
        engine, live, recorder = self.engine, self.live, self.recorder
        recorder.flush()
        ts = engine.state
        slot, fork = None, int(ts.round.fork)
        if engine.phase == SWEEP:
            slot, fork = live.saved, -1
        elif engine.phase == FORK and int(ts.round.kept) >= 0:
            slot, fork = live.kept, int(ts.round.kept)
        if engine.phase != TRAIN:
            recorder.abandon(engine.step, fork)
        values = engine.hyperparams()
        if slot is not None:
            live.copy_back(slot)
            values = slot["values"]
        copies = [(int(ts.slots.saved_step), live.saved), (int(ts.slots.kept_step), live.kept)]
        broken = live.count_non_finite()
        whole = [(step, copy) for step, copy in copies if live.count_non_finite(copy) < broken]
        if whole:
            step, slot = max(whole, key=lambda entry: entry[0])
            live.copy_back(slot)
            values = slot["values"]
            recorder.note(
                engine.step, "rollback", f"The last state was not finite; that of step {max(step, 0)} was restored."
            )
        live.catch_up()
        live.apply(dict(values))
        live.warm_up.release()

    def validate(self, value: Any) -> None:
        """Takes in a validation metric of the present state."""
        engine = self.engine
        metric = _reduce.mean(_reduce.to_float(value, name="value"))
        is_settled = engine.phase == TRAIN or engine.step == 0
        # One state has one metric.
        if self.eval_step != engine.step:
            engine.observe_eval(metric)
            self.eval_step = engine.step
            if not self.is_settled:
                # Rates are lowered at once when training has stopped generalising.
                self.live.apply(engine.hyperparams())
            else:
                self._end_at_best()
        self.wants_validation = False
        self.recorder.add_eval(engine.step, metric, is_settled=is_settled)
        if is_settled:
            self.last_eval = metric

    def _end_at_best(self) -> None:
        """Goes back to the best state where the last metric asks for it and no step is left to do so."""
        seen = self.engine.state.validation
        if self.engine.phase == TRAIN and bool(seen.returns & seen.is_kept):
            kept = self.live.kept
            self.live.copy_back(kept)
            self.live.catch_up()
            self.live.apply(dict(kept["values"]))
            message = "The validation metric did not improve: the run ends in the best state."
            self.recorder.note(self.engine.step, "retreat", message)

    def note_metric(self, value: Any) -> None:
        """Records another metric of the present state, which is not compared with the first."""
        metric = _reduce.mean(_reduce.to_float(value, name="value"))
        self.recorder.add_eval(self.engine.step, metric, is_settled=self.engine.phase == TRAIN)

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """The tuner's own state as tensors and plain data."""
        engine, live = self.engine, self.live
        in_round = engine.phase != TRAIN
        has_best = bool(engine.state.validation.is_kept)
        return {
            **self._common(),
            "engine": {name: torch.from_numpy(array) for name, array in engine.arrays().items()},
            "saved": _plain.to_plain(live.saved) if in_round else None,
            "kept": _plain.to_plain(live.kept) if in_round or has_best else None,
            "behind": list(live.behind),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        engine, live = self.engine, self.live
        _plain.check(state, _FORMAT, space=self._fingerprint, total_steps=self.total_steps)
        engine.load_arrays({name: tensor.numpy() for name, tensor in state["engine"].items()})
        engine.tuner.check(engine.state)
        self._load_common(state)
        live.behind, live.values = list(state["behind"]), {}
        live.apply(engine.hyperparams())
        for name in ("saved", "kept"):
            setattr(live, name, live.copy_out() if state[name] is None else _plain.from_plain(state[name]))

    def _common(self) -> dict[str, Any]:
        self.recorder.flush()
        return {
            "format": _FORMAT,
            "space": self._fingerprint,
            "total_steps": self.total_steps,
            "recorder": self.recorder.to_dict(),
            "evals": [self.eval_step, self.last_eval, self.wants_validation],
            "warm_up_end": self.live.warm_up.end,
        }

    def _load_common(self, state: Mapping[str, Any]) -> None:
        self.recorder.load(state["recorder"])
        self.recorder.discarded = int(self.engine.state.discarded)
        self.eval_step, self.last_eval, self.wants_validation = state["evals"]
        self.is_settled = self.engine.step == self.total_steps
        self.live.warm_up.load(state["warm_up_end"])
        self.live.warm_up.in_round = self.engine.phase != TRAIN

    def snapshot(self) -> dict[str, Any]:
        """The whole training with the tuner, outside rounds, for a loop that writes it to disk."""
        live = self.live
        return {
            **self._common(),
            "now": _plain.to_plain(live.copy_out()),
            "saved": _plain.to_plain(live.saved),
            "kept": _plain.to_plain(live.kept),
            "engine": self.engine.arrays(),
        }

    def resume(self, tree: Mapping[str, Any]) -> None:
        """Goes on from what `snapshot` gave."""
        engine, live = self.engine, self.live
        _plain.check(tree, _FORMAT, space=self._fingerprint, total_steps=self.total_steps)
        now = _plain.from_plain(tree["now"])
        live.state.check(now["training"])
        live.saved, live.kept = _plain.from_plain(tree["saved"]), _plain.from_plain(tree["kept"])
        engine.load_arrays(tree["engine"])
        engine.tuner.check(engine.state)
        self._load_common(tree)
        live.copy_back(now)
        live.behind = [0 for _ in live.behind]
        live.apply(engine.hyperparams())
