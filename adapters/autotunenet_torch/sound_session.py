"""A session none of whose copies holds numbers that are not finite, and which ends no worse than it was measured."""

import math
from typing import Any

from autotunenet_jax.hosting import TRAIN, Report, Session

from .host import TorchHost

# A rate may be to blame for what breaks states: after so many of one stretch the guard is left to answer it.
_MAX_MENDS = 6


class SoundSession(Session):
    """Carries out directives on a training that is looked at before it is copied.

    A step whose loss is not finite has not happened: what it left behind is put back. A state that is not finite is
    not copied; the newest copy comes back in its place. The state of the best metric is copied when it is measured.

    Attributes:
      mended: States put back so far besides the guard's rollbacks.
    """

    host: TorchHost

    def __init__(self, *args: Any, **kwargs: Any):
        self.mended = self._mends = 0
        self._made = {"saved": 0, "kept": 0}
        super().__init__(*args, **kwargs)

    def report(self, loss: float, *, recorded: float | None = None) -> Report:
        """Takes in the loss of the step just done; one that is not finite says that the step did not happen."""
        if not math.isfinite(loss):
            self._undo()
        return super().report(loss, recorded=recorded)

    def decide(self) -> Any:
        """Lets the controller decide, and carries its directive out."""
        self._mends = 0
        return super().decide()

    def _undo(self) -> None:
        state, buffers = self.host.soundness.damage()
        if state and self._mends < _MAX_MENDS:
            self._mends += 1
            self._mend()
        elif buffers and not state:
            self.host.put_buffers_back(getattr(self, self._newest()), buffers)

    def _obey(self, directive: Any, *, rewinds: bool) -> None:
        names = [name for name, is_due in (("saved", directive.save), ("kept", directive.keep)) if is_due]
        is_sound = not names or self.host.soundness.may_copy()
        if names and is_sound:
            self._made |= {name: self.controller.step for name in names}
            self._mends = 0
        if not is_sound:
            directive = directive._replace(save=False, keep=False)
            if not (directive.restore or directive.adopt):
                self._mend()
        super()._obey(directive, rewinds=rewinds)

    def _newest(self) -> str:
        """Which copy is the newest; in rounds, the one that they began with."""
        is_saved = self.controller.phase != TRAIN or self._made["saved"] >= self._made["kept"]
        return "saved" if is_saved else "kept"

    def _mend(self) -> None:
        name, controller, recorder = self._newest(), self.controller, self.recorder
        self.host.restore(getattr(self, name), rewinds=False)
        self.mended += 1
        recorder.flush()
        recorder.go_back(controller.step, self._made[name], is_rollback=True)
        message = f"The state was not finite; that of step {self._made[name]} was restored."
        recorder.note(controller.step, "rollback", message)

    def observe(self, metric: float) -> None:
        """Takes in a validation metric of the present state; one of a state that is not whole is worse than any."""
        before = self.kept
        super().observe(metric if self.host.soundness.may_copy() else math.nan)
        if self.kept is not before:
            self._made["kept"] = self.controller.step

    def settle(self) -> None:
        """Leaves the best state there is; the last one is measured where it can be."""
        super().settle()
        controller = self.controller
        if not self.host.soundness.may_copy():
            self._mend()
        elif controller.phase == TRAIN and controller.step == controller.tuner.total_steps:
            # It may have been measured a moment ago.
            self.evaluate()
            self.end_at_best()

    # Across processes.

    def books(self) -> dict[str, Any]:
        """What the host side knows besides the copies and the controller's state, as plain data."""
        return {**super().books(), "sound": [self.mended, self._made]}

    def load(self, books: dict[str, Any]) -> None:
        """Goes on from what `books` gave; the controller has its state back already."""
        super().load(books)
        self.mended, made = books["sound"]
        self._made = dict(made)
