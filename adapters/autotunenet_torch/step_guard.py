"""Optimizer steps whose gradients are not finite do not happen."""

import math
from collections.abc import Callable
from typing import Any

import torch

from . import distributed
from .finite import are_finite, gradients_are_finite
from .optimizer_state import parameters


class StepGuard:
    """Lets an optimizer pass by gradients that are not finite: neither a parameter nor a moment is touched.

    It looks at the gradients just before the optimizer does, in the closure where there is one, and hides them from
    that step. The gradients themselves are left as they are. Where a `GradScaler` looks at them anyway, it is left to
    that.

    Attributes:
      loss: Loss of the step to come, where the loop knows it before: a step with one that is not finite is skipped
        too. Taken off after the step.
      asked: Steps that the optimizers were asked for so far, skipped ones included.

    Args:
      optimizers: Watched; a step of the first that is asked for one includes those of the others.
      watch: Called with the optimizer before each of them.
      is_sharded: Whether processes hold parts of the gradients: then a step is skipped on all of them or on none.

    Cost: one fused pass over the gradients and one synchronisation with the device for each step.
    """

    def __init__(
        self,
        optimizers: list[torch.optim.Optimizer],
        *,
        watch: Callable[[torch.optim.Optimizer], None],
        is_sharded: bool = False,
    ):
        self._watch, self._is_sharded = watch, is_sharded
        self.loss: torch.Tensor | float | None = None
        self._hidden: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self.asked = self._taken = self._skipped = 0
        self._outer: torch.optim.Optimizer | None = None
        self._hooks: list[Any] = []
        for optimizer in optimizers:
            self._hooks += [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            ]

    def release(self) -> None:
        """Leaves the optimizer alone from here on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def was_skipped(self) -> bool:
        """Whether the optimizer was asked for steps since this was last called, and took none of them."""
        skipped = self._skipped > 0 and self._taken == 0
        self._taken = self._skipped = 0
        return skipped

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if self._outer not in (None, optimizer):
            return None
        self._show()  # after a step that failed
        self._outer = optimizer
        self.asked += 1
        self._watch(optimizer)
        if getattr(optimizer, "grad_scale", None) is not None:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._check(optimizer)
            return None
        checked = self._checking(optimizer, closure)
        return ((args[0], checked, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": checked})

    def _checking(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that hides the gradients it has made, if they are not finite."""

        def checked() -> Any:
            self._show()
            result = closure()
            self._check(optimizer)
            return result

        return checked

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        is_bad = self._is_bad([grad for p in parameters(optimizer) if (grad := p.grad) is not None])
        if not distributed.everywhere(not is_bad) if self._is_sharded else is_bad:
            self._skipped += 1
            self._hidden = [(p, p.grad) for p in parameters(optimizer) if p.grad is not None]
            for parameter, _ in self._hidden:
                parameter.grad = None
        else:
            self._taken += 1

    def _is_bad(self, grads: list[torch.Tensor]) -> bool:
        loss = self.loss
        if isinstance(loss, torch.Tensor) and not loss.is_cpu:
            return not are_finite([loss, *grads])
        if loss is not None and not math.isfinite(loss):
            return True
        return not gradients_are_finite(grads)

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._outer is optimizer:
            self._show()
            self.loss = self._outer = None

    def _show(self) -> None:
        for parameter, grad in self._hidden:
            parameter.grad = grad
        self._hidden = []
