"""The live objects of a run: values put in force, copies of the training made and put back."""

from collections.abc import Callable, Mapping
from typing import Any

from . import _schedulers, _targets
from ._snapshot import TrainingState, count_non_finite
from ._warm_up import WarmUp


class LiveTraining:
    """A training with what is tuned on it, and the two copies that forks and rollbacks need.

    Args:
      state: The training.
      targets: Where each hyperparameter is written.
      extra: What a loop of its own adds to each copy.
      steps: Steps of the run; None for an open-ended one.

    Attributes:
      values: Hyperparameters in force.
      behind: Steps that each scheduler has to make up once the round is over.
      warm_up: Of the schedulers.
      saved: The saved copy; None before there is one.
      kept: The kept copy, likewise.
    """

    def __init__(
        self,
        state: TrainingState,
        targets: Mapping[str, _targets.Target],
        extra: Callable[[], Any],
        *,
        steps: int | None,
    ):
        self.state, self.targets, self._extra = state, targets, extra
        self.values: dict[str, Any] = {}
        self.behind = [0 for _ in state.schedulers]
        tuned = {i for t in targets.values() if isinstance(t, _targets.RateTarget) for i in t.indices}
        self.warm_up = WarmUp(state.optimizer, state.schedulers, tuned, steps=steps)
        self.saved: Any = None
        self.kept: Any = None

    def starts(self, given: Mapping[str, Any], space: Any) -> dict[str, Any]:
        """Where the training stands, for every hyperparameter with a readable value in its range; given ones first."""
        starts = dict(given)
        for name, target in self.targets.items():
            value = target.read()
            if name not in starts and value is not None and space[name].contains(value):
                starts[name] = value
        return starts

    def apply(self, values: dict[str, Any]) -> None:
        """Puts hyperparameters in force, those that changed."""
        for name, value in values.items():
            if value != self.values.get(name):
                self.targets[name].write(value)
        self.values = values

    def shaped(self) -> dict[str, Any]:
        """What is in force, rates as the schedulers have made them."""
        raised = self.warm_up.raised()
        rates = {name: t.in_force(raised) for name, t in self.targets.items() if isinstance(t, _targets.RateTarget)}
        return {**self.values, **rates}

    def obey(self, directive: Any, *, rewinds: bool) -> Any:
        """Carries a directive out; returns the extra of the state put back where the data go back with it."""
        if directive.save:
            self.saved = self.copy_out()
        if directive.keep:
            self.kept = self.copy_out()
        if not (directive.restore or directive.adopt):
            return None
        slot = self.saved if directive.restore else self.kept
        self.copy_back(slot)
        return slot["loop"] if rewinds else None

    def copy_out(self) -> dict[str, Any]:
        """A copy of the training, with the values in force and the loop's own."""
        return {"training": self.state.copy_out(), "values": dict(self.values), "loop": self._extra()}

    def copy_back(self, slot: dict[str, Any]) -> None:
        """Puts a copy back; hyperparameters have to be applied afterwards."""
        stood = _schedulers.places(self.state.schedulers)
        self.state.copy_back(slot["training"])
        stands = _schedulers.places(self.state.schedulers)
        self.behind = [
            0 if before is None or now is None else behind + before - now
            for behind, before, now in zip(self.behind, stood, stands, strict=True)
        ]
        for name, target in self.targets.items():
            if isinstance(target, _targets.RateTarget):
                target.applied = slot["values"][name]
        # State first, hyperparameters after: all of them are written again.
        self.values = {}

    def count_non_finite(self, slot: Mapping[str, Any] | None = None) -> int:
        """Numbers of the model and its optimizer that are not finite, now or in a copy; some may have to be."""
        if slot is None:
            optimizer = {str(i): dict(state) for i, state in enumerate(self.state.optimizer.state.values())}
            return count_non_finite([self.state.tensors(), optimizer])
        return count_non_finite([slot["training"]["model"], slot["training"]["optimizer"]])

    def catch_up(self) -> None:
        """Steps schedulers on to the budget spent: one made for the whole run ends with it."""
        if any(self.behind):
            _schedulers.advance(self.state.schedulers, self.behind)
            self.behind = [0 for _ in self.behind]
