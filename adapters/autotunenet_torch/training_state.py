"""Copies of everything a training step reads and writes, in memory; real copies both ways."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from . import engine, optimizer_state, random_state, sharding
from .copying import clone, takes, write_back


def _tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, torch.Tensor | None]]:
    """Every parameter and buffer, persistent or not, once however many names it has."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in seen:
                    continue
                if tensor is not None:
                    seen.add(id(tensor))
                yield f"{path}.{name}" if path else name, module, name, tensor


def _kind(tensor: torch.Tensor | None) -> str:
    return "empty" if tensor is None else f"{tensor.dtype}{list(sharding.part(tensor).shape)}"


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


class TrainingState:
    """The live objects of a training, and how to copy them out and back, bit for bit.

    Parameters, buffers (persistent or not), extra state of modules, the optimizer's state and parameter groups,
    schedulers, gradient scaler, and the random generators of PyTorch (CPU, CUDA), NumPy and Python. Copying back
    writes into the live tensors, so references to them stay good. Gradients are not part of it. A gradient scaler goes
    back to the scale that the first step from there was made at: steps that overflow until it is found do so once.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> saved = state.copy_out()
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> state.copy_back(saved)
        >>> bool((model.weight != 0).all())
        True

    Args:
      model: Whose parameters have been initialised; lazy ones by one forward pass.
      optimizer: Its optimizer.
      schedulers: With ``state_dict`` and ``load_state_dict``.
      scaler: The gradient scaler, if any.
      aux: Whatever else goes back with the training: objects with ``state_dict`` and ``load_state_dict``.
      device: Where copies live; None for the device of each tensor.

    Raises:
      ValueError: The model has no parameters, or some that are not initialised yet.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        schedulers: Sequence[Any] = (),
        scaler: Any = None,
        aux: Sequence[Any] = (),
        device: Any = None,
    ):
        self.model, self.optimizer, self.schedulers, self.scaler = model, optimizer, list(schedulers), scaler
        self._optimizers = optimizer_state.Whole(optimizer)
        self._aux, self._device = list(aux), device
        # Copies of where the training stands, from which no step has been made yet.
        self._standing: list[dict[str, Any]] = []
        if next(model.parameters(), None) is None:
            raise ValueError("the model has no parameters, so there is nothing to train. Is it the right module?")
        lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
        if lazy:
            raise ValueError(
                f"the model has lazy parameters that no forward pass has initialised yet: {', '.join(lazy[:5])}. Run "
                "the model on one batch first, then make the optimizer."
            )
        for name, parameter in model.named_parameters():
            if not (parameter.is_meta or takes(parameter, parameter)):
                raise ValueError(
                    f"parameter {name} ({parameter.layout}, {parameter.device}) cannot be written to in place, so a "
                    "fork or a rollback could not put it back. Make it a plain tensor with memory of its own."
                )

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Every parameter and buffer, live, once each, by its first name."""
        sharding.collect(self.model)
        return {path: tensor for path, _, _, tensor in _tensors(self.model)}

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizer, and those it is made of."""
        return self._optimizers.parts

    def optimizer_tensors(self) -> dict[str, Any]:
        """What the optimizer keeps, and those it is made of; live."""
        return self._optimizers.tensors()

    def copy_out(self) -> dict[str, Any]:
        """A copy of everything.

        Cost: one pass over parameters, buffers and optimizer state, and their memory.
        """
        with torch.no_grad():
            copy = {
                "model": {
                    path: None if tensor is None else clone(tensor, self._device)
                    for path, tensor in self.tensors().items()
                },
                "extra": {
                    path: clone(module.get_extra_state())
                    for path, module in self.model.named_modules()
                    if _has_extra_state(module)
                },
                "optimizer": self._optimizers.copy_out(self._device),
                "schedulers": [clone(scheduler.state_dict()) for scheduler in self.schedulers],
                "scaler": clone(self.scaler.state_dict()) if self.scaler is not None else {},
                "aux": [clone(dict(held.state_dict()), self._device) for held in self._aux],
                "rng": random_state.capture(),
                "is_standing": self.scaler is not None,
            }
        self.follow(copy)
        return copy

    def copy_back(self, saved: dict[str, Any]) -> None:
        """Puts a copy back; the copy stays as it is, but for the scale, and can be put back again."""
        if not any(copy is saved for copy in self._standing):
            self._leave()
            saved["is_standing"] = self.scaler is not None
            self.follow(saved)
        with torch.no_grad():
            self._tensors_back(saved["model"])
            for path, module in self.model.named_modules():
                if path in saved["extra"]:
                    module.set_extra_state(clone(saved["extra"][path]))
            self._optimizers.copy_back(saved["optimizer"], self._device)
            for scheduler, state in zip(self.schedulers, saved["schedulers"], strict=True):
                scheduler.load_state_dict(clone(state))
            # That of a training that had none is as it was made.
            if self.scaler is not None and saved["scaler"]:
                self.scaler.load_state_dict(clone(saved["scaler"]))
            for held, state in zip(self._aux, saved.get("aux", ()), strict=False):
                held.load_state_dict(clone(state))
            random_state.restore(saved["rng"])

    def follow(self, copy: dict[str, Any]) -> None:
        """Counts a copy, perhaps one of another process, among those of where the training stands, if it is one."""
        if copy.get("is_standing"):
            self._standing.append(copy)

    def begin_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes the scale of the first step from where the training stands, when the optimizer is asked for one."""
        # Fused optimizers are asked for steps that overflow, too.
        overflow = getattr(optimizer, "found_inf", None)
        if self._standing and (overflow is None or not float(overflow)):
            for copy in self._standing:
                copy["scaler"] = clone(self.scaler.state_dict())
            self._leave()

    def _leave(self) -> None:
        for copy in self._standing:
            copy["is_standing"] = False
        self._standing = []

    def _tensors_back(self, saved: dict[str, Any]) -> None:
        sharding.collect(self.model)
        for path, module, name, tensor in list(_tensors(self.model)):
            if path not in saved:
                continue
            value = saved[path]
            held = None if tensor is None else sharding.part(tensor.detach())
            if held is not None and value is not None and takes(held, value):
                held.copy_(value)
            elif tensor is not None and tensor.is_meta:
                continue
            elif name in module._buffers:
                # A buffer that was None, of another size or kind: the forward pass replaced it, or it has to be.
                device = None if tensor is None else tensor.device
                module._buffers[name] = None if value is None else write_back(tensor, value, device)
            elif value is not None:
                raise ValueError(
                    f"parameter {path} has changed since it was saved, from {tuple(value.shape)} {value.dtype}. "
                    "Parameters must keep their shape and dtype while a tuner is attached."
                )

    def buffers_back(self, saved: dict[str, Any], names: Collection[str]) -> None:
        """Puts those buffers of a copy back that belong to the modules of the ones named."""
        modules = {name.rpartition(".")[0] for name in names}
        found = {path for path, module, name, _ in _tensors(self.model) if name in module._buffers}
        with torch.no_grad():
            self._tensors_back(
                {p: v for p, v in saved["model"].items() if p in found and p.rpartition(".")[0] in modules}
            )

    def check(self, saved: dict[str, Any]) -> None:
        """Refuses a copy, perhaps of another process, of another model, optimizer or number of schedulers.

        Raises:
          SnapshotMismatchError: It is; the message names the differences.
        """
        here = {path: _kind(tensor) for path, tensor in self.tensors().items()}
        there = {path: _kind(tensor) for path, tensor in saved["model"].items()}
        wrong = [f"{path} is {there.get(path, 'missing')}, not {kind}" for path, kind in here.items()
                 if there.get(path) != kind]  # fmt: skip
        wrong += [f"{path} is not in this model" for path in there if path not in here]
        if wrong:
            more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise engine.atn.SnapshotMismatchError(f"The snapshot is of another model: {'; '.join(wrong[:5])}{more}.")
        there, here = optimizer_state.kinds(saved["optimizer"]), [type(part).__name__ for part in self.optimizers]
        if there is not None and there != here:
            raise engine.atn.SnapshotMismatchError(
                f"The snapshot is of a training with the optimizer {' of '.join(there)}, and here it is "
                f"{' of '.join(here)}. Go on with the optimizer that the run began with, or begin another elsewhere."
            )
        if len(saved["schedulers"]) != len(self.schedulers):
            raise engine.atn.SnapshotMismatchError(
                f"The snapshot is of a training with {len(saved['schedulers'])} learning-rate schedulers, and here "
                f"there are {len(self.schedulers)}. Go on with those that the run began with, or begin another run "
                "elsewhere."
            )
