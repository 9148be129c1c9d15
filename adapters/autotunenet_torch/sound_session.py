"""A session none of whose copies holds numbers that are not finite, and which ends no worse than it was measured."""

import math
from typing import Any

from autotunenet_jax.hosting import FORK, TRAIN, Report, Session

from . import distributed
from .host import TorchHost

# A rate may be to blame for what breaks states: after so many of one stretch the guard is left to answer it.
_MAX_MENDS = 6


class SoundSession(Session):
    """Carries out directives on a training that is looked at before it is copied.

    A step whose loss is not finite has not happened: what it left behind is put back. A state is looked at before it
    may be copied; one that is not finite is not copied, the newest copy comes back in its place, and the controller is
    told that the step did not happen. The state of the best metric is copied when it is measured.
    """

    host: TorchHost

    def __init__(self, *args: Any, **kwargs: Any):
        self._mends = 0
        self._is_sound: bool | None = None
        self._is_reporting = False
        self._made = {"saved": 0, "kept": 0}
        super().__init__(*args, **kwargs)

    def report(self, loss: float, *, recorded: float | None = None) -> Report:
        """Takes in the loss of the step just done; one that is not finite says that the step did not happen."""
        self._is_sound, self._is_reporting = None, True
        try:
            if math.isfinite(loss) and self.controller.may_copy and not self._looked():
                loss = math.nan
            if not math.isfinite(loss):
                self._undo()
            report = super().report(loss, recorded=recorded)
        finally:
            self._is_reporting = False
        if self.controller.phase != TRAIN and self.controller.saved_data == self.controller.data_step:
            # A round begins with the first batch that is good: all of its forks do.
            self.saved = self.host.stands_here(self.saved)
        return report

    def _looked(self) -> bool:
        """Whether the state may be copied, the same on all processes; looked at once for each step."""
        if self._is_sound is None or not self._is_reporting:
            self._is_sound = distributed.everywhere(self.host.soundness.may_copy())
        return self._is_sound

    def decide(self) -> Any:
        """Lets the controller decide, and carries its directive out."""
        self._mends = 0
        return super().decide()

    def _undo(self) -> None:
        """Puts back what the last step broke, on whichever process."""
        state, buffers = self.host.soundness.damage()
        is_broken, is_refused = not distributed.everywhere(not state), self._is_sound is False
        if is_broken and is_refused and self.controller.phase == FORK:
            # The end of a fork that is not whole: what is put back is no state of its own.
            self.controller.spoil_fork()
        if is_broken and self._mends >= _MAX_MENDS:
            return
        if is_broken:
            self._mends += 1
            self._mend()
        elif buffers:
            name = self._newest()
            self.host.put_buffers_back(getattr(self, name), buffers)
            if is_refused:
                message = f"{', '.join(buffers)} not finite: put back as at step {self._made[name]}."
                self.recorder.note(self.controller.step, "rollback", message)
        self._is_sound = True if is_refused else None

    def _obey(self, directive: Any, *, rewinds: bool) -> None:
        names = [name for name, is_due in (("saved", directive.save), ("kept", directive.keep)) if is_due]
        is_sound = not names or self._looked()
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
        name = self._newest()
        self._put_back(self._made[name], getattr(self, name), why="The state was not finite")

    def observe(self, metric: float) -> None:
        """Takes in a validation metric of the present state.

        One of a state that is not whole is worse than any, and a fork that led to such a state begins again.
        """
        before, is_whole = self.kept, self._looked()
        if not is_whole and self.controller.phase == FORK:
            self.controller.spoil_fork()
        super().observe(metric if is_whole else math.nan)
        if self.kept is not before:
            self._made["kept"] = self.controller.step

    def settle(self) -> None:
        """Leaves the best state there is; the last one is measured where it can be."""
        super().settle()
        controller = self.controller
        is_over = controller.step == controller.tuner.total_steps
        is_sound = self.host.soundness.may_copy()
        if not (distributed.everywhere(is_sound) if is_over else is_sound):
            self._mend()
        elif controller.phase == TRAIN and is_over:
            # It may have been measured a moment ago.
            self.evaluate()
            self.end_at_best()

    def return_to_best(self) -> None:
        """Goes back to the best state that was measured, where a settled run has ended before its budget elsewhere.

        Inside a round a fork that is kept is as good, and one that is still running has not been judged.
        """
        controller = self.controller
        # Not all of several processes may have come here.
        if controller.phase == TRAIN and not distributed.is_distributed():
            self.evaluate()
        ts = controller.state
        seen, step = ts.validation, int(ts.slots.kept_step)
        is_running, has_kept = controller.phase == FORK, controller.phase == FORK and int(ts.round.kept) >= 0
        is_elsewhere = is_running or bool(seen.level > seen.best)
        if bool(seen.is_kept) and is_elsewhere and not has_kept and step < controller.step:
            self.host.restore(self.kept, rewinds=False)
            self.recorder.note(controller.step, "retreat", f"The run ends in its best state, that of step {step}.")
            self.recorder.go_back(controller.step, step, is_rollback=False)

    # Across processes.

    def books(self) -> dict[str, Any]:
        """What the host side knows besides the copies and the controller's state, as plain data."""
        return {**super().books(), "sound": [self.mended, self._made]}

    def load(self, books: dict[str, Any]) -> None:
        """Goes on from what `books` gave; the controller has its state back already."""
        super().load(books)
        self.mended, made = books["sound"]
        self._made = dict(made)
