"""PyTorch as the host of a run: values put in force on live objects, copies of the training made and put back."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from autotunenet_jax.hosting import Host

from . import distributed, lr_schedulers, modes, sharding
from .copying import clone
from .data import ReplayBuffer
from .finite import count_non_finite
from .soundness import Soundness
from .targets import GroupTarget, RateTarget, Target
from .training_state import TrainingState
from .warm_up import WarmUp

# They take in groups that are added later.
_GROWING = (GroupTarget, RateTarget)


class TorchHost(Host):
    """A training with what is tuned on it.

    Args:
      state: The training.
      targets: Where each hyperparameter is written.
      steps: Steps of the run; None for an open-ended one.
      validate: Gives the metric of the present state; None where it is reported by hand.
      stream: Of batches, where the loop has one that can go back.
      keeps_best: Whether the best state is kept, on the CPU.

    Attributes:
      values: Hyperparameters in force.
      behind: Steps that each scheduler has to make up once the round is over.
      warm_up: Of the schedulers.
      soundness: Whether the training may be copied.
      is_sharded: Whether each process holds a part of the model only.
      is_absent: Whether this process follows a step of the others, for which it has no data.
    """

    def __init__(
        self,
        state: TrainingState,
        targets: Mapping[str, Target],
        *,
        steps: int | None,
        validate: Callable[[], Any] | None = None,
        stream: ReplayBuffer | None = None,
        keeps_best: bool = False,
    ):
        self.state, self.targets, self.soundness = state, targets, Soundness(state)
        self._validate, self._stream, self._keeps_best = validate, stream, keeps_best
        self.is_sharded, self.is_absent = sharding.is_sharded(state.model), False
        self.values: dict[str, Any] = {}
        self.behind = [0 for _ in state.schedulers]
        tuned = {i for target in targets.values() if isinstance(target, RateTarget) for i in target.indices}
        self.warm_up = WarmUp(state.optimizer, state.schedulers, tuned, steps=steps)

    def starts(self, given: Mapping[str, Any], space: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Where the training stands, by name, given values first: what lies in its range, and what lies outside."""
        starts, outside = dict(given), {}
        roles = dict(zip(space.names, space.roles, strict=True))
        for name, target in self.targets.items():
            value = target.read()
            if name in starts or value is None:
                continue
            if space[name].contains(value):
                starts[name] = value
            elif roles[name] != "rate" or value != 0.0:
                # A rate of 0 has fallen to its end in a run before, or waits for a warm-up.
                outside[name] = value
        return starts, outside

    def overwritten(self) -> list[str]:
        """Hyperparameters that are not what was last written."""
        return [n for n, target in self.targets.items() if isinstance(target, GroupTarget) and target.is_overwritten()]

    def shaped(self) -> dict[str, Any]:
        """What is in force, rates as the schedulers have made them."""
        raised = self.warm_up.raised()
        rates = {name: t.in_force(raised) for name, t in self.targets.items() if isinstance(t, RateTarget)}
        return {**self.values, **rates}

    def write(self, hyperparams: Mapping[str, Any]) -> None:
        """Writes those that changed."""
        if not self.warm_up.in_round:
            self._catch_up()
        for target in self.targets.values():
            if isinstance(target, _GROWING):
                target.join()
        for name, value in hyperparams.items():
            if value != self.values.get(name):
                self.targets[name].write(value)
        self.values = dict(hyperparams)

    def copy(self) -> dict[str, Any]:
        """A copy of the training, with the values in force and the place in the stream."""
        place = None if self._stream is None else self._stream.cursor
        return {"training": self.state.copy_out(), "values": dict(self.values), "cursor": place}

    def restore(self, copy: dict[str, Any], *, rewinds: bool) -> None:
        """Puts a copy back into the live objects; its hyperparameters are written again after that."""
        stood = lr_schedulers.places(self.state.schedulers)
        self.put_back(copy)
        stands = lr_schedulers.places(self.state.schedulers)
        self.behind = [
            0 if before is None or now is None else behind + before - now
            for behind, before, now in zip(self.behind, stood, stands, strict=True)
        ]
        self.write(copy["values"])
        if rewinds and self._stream is not None:
            self._stream.cursor = tuple(copy["cursor"])

    def stands_here(self, copy: dict[str, Any]) -> dict[str, Any]:
        """A copy that leads back to where the stream stands now."""
        return copy if self._stream is None else {**copy, "cursor": self._stream.cursor}

    def put_buffers_back(self, copy: dict[str, Any], names: Collection[str]) -> None:
        """Puts the buffers of a copy back into the modules of the ones named."""
        self.state.buffers_back(copy["training"], names)

    def put_back(self, copy: dict[str, Any]) -> None:
        """Puts a copy back, perhaps one of another process; hyperparameters have to be written after that."""
        self.state.copy_back(copy["training"])
        for name, target in self.targets.items():
            if isinstance(target, RateTarget):
                target.stand_at(copy["values"][name])
        self.values = {}

    def standings(self) -> dict[str, tuple[float, float]]:
        """Of each rate under schedulers, for `loaded`."""
        return {name: target.standing() for name, target in self.targets.items() if isinstance(target, RateTarget)}

    def loaded(self, standings: Mapping[str, tuple[float, float]]) -> None:
        """Finds the height of rates again, in an optimizer and schedulers loaded before or after the tuner's attach.

        Raises:
          ValueError: Only some of them were loaded after it.
        """
        for name, target in self.targets.items():
            if isinstance(target, RateTarget):
                target.loaded(standings.get(name))

    def evaluate(self) -> float | None:
        """The metric of the function given, the same on all processes."""
        if self._validate is None:
            return None
        with modes.kept(self.state.model):
            value = self._validate()
        return distributed.mean(distributed.to_float(value, name="what validate returns"), counts=not self.is_absent)

    def count_non_finite(self, copy: Mapping[str, Any] | None = None) -> int:
        """Over the model and its optimizer, and all processes that share them out."""
        if copy is None:
            count = count_non_finite([self.state.tensors(), self.state.optimizer_tensors()])
        else:
            count = count_non_finite([copy["training"]["model"], copy["training"]["optimizer"]])
        return int(sum(number for (number,) in distributed.gather(count))) if self.is_sharded else count

    def keep_best(self) -> dict[str, Any] | None:
        """The model's ``state_dict`` on the CPU, where it is wanted and this process has all of it."""
        is_kept = self._keeps_best and not self.is_sharded
        return clone(self.state.model.state_dict(), "cpu") if is_kept else None

    def begin_round(self, position: int) -> None:
        """Schedulers that warm up are passed by, and batches remembered."""
        self.warm_up.in_round = True
        if self._stream is not None:
            self._stream.hold()

    def end_round(self, position: int) -> None:
        """And no longer."""
        self.warm_up.in_round = False
        if self._stream is not None:
            self._stream.release()

    def finish(self) -> None:
        """Leaves schedulers at the budget spent, and the optimizer alone."""
        self._catch_up()
        self.warm_up.release()

    def _catch_up(self) -> None:
        """Steps schedulers on to the budget spent: one made for the whole run ends with it."""
        if any(self.behind):
            lr_schedulers.advance(self.state.schedulers, self.behind)
            self.behind = [0 for _ in self.behind]
