"""Copies of everything a training step reads and writes, in memory; real copies both ways."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

import autotunenet_jax as atn

from . import random_state


def clone(value: Any, device: Any = None) -> Any:
    """A copy that shares no memory, of tensors in dictionaries, lists and tuples, and of plain data."""
    if isinstance(value, torch.Tensor):
        # Step counts and the like stay where they are: optimizers are particular about their place.
        target = device if device is not None and value.ndim else value.device
        return value.detach().to(device=target, copy=True)
    if type(value) is dict:
        return {key: clone(inner, device) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(clone(inner, device) for inner in value)
    return copy.deepcopy(value)


def _fits(live: Any, saved: torch.Tensor) -> bool:
    return isinstance(live, torch.Tensor) and live.shape == saved.shape and live.dtype == saved.dtype


def write_back(live: Any, saved: Any, device: Any = None) -> Any:
    """The saved value, written into the live tensors where there are any of the same kind."""
    if isinstance(saved, torch.Tensor):
        if _fits(live, saved):
            live.detach().copy_(saved)
            return live
        return saved.to(device=device if device is not None and saved.ndim else saved.device, copy=True)
    if type(saved) is dict:
        known = live if isinstance(live, dict) else {}
        return {key: write_back(known.get(key), inner, device) for key, inner in saved.items()}
    if type(saved) in (list, tuple):
        is_alike = type(live) is type(saved) and len(live) == len(saved)
        pairs = zip(live if is_alike else [None] * len(saved), saved, strict=True)
        return type(saved)(write_back(old, inner, device) for old, inner in pairs)
    return copy.deepcopy(saved)


def count_non_finite(value: Any) -> int:
    """Infinities and NaNs in the tensors of nested dictionaries and lists."""
    if isinstance(value, torch.Tensor):
        return int((~torch.isfinite(value.detach())).sum()) if value.is_floating_point() or value.is_complex() else 0
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(count_non_finite(item) for item in inner)


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
    return "empty" if tensor is None else f"{tensor.dtype}{list(tensor.shape)}"


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


class TrainingState:
    """The live objects of a training, and how to copy them out and back, bit for bit.

    Parameters, buffers (persistent or not), extra state of modules, the optimizer's state and parameter groups,
    schedulers, gradient scaler, and the random generators of PyTorch (CPU, CUDA), NumPy and Python. Copying back
    writes into the live tensors, so references to them stay good. Gradients are not part of it.

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
        device: Any = None,
    ):
        self.model, self.optimizer, self.schedulers, self.scaler = model, optimizer, list(schedulers), scaler
        self._device = device
        if next(model.parameters(), None) is None:
            raise ValueError("the model has no parameters, so there is nothing to train. Is it the right module?")
        lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
        if lazy:
            raise ValueError(
                f"the model has lazy parameters that no forward pass has initialised yet: {', '.join(lazy[:5])}. Run "
                "the model on one batch first, then make the optimizer."
            )

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Every parameter and buffer, live, once each, by its first name."""
        return {path: tensor for path, _, _, tensor in _tensors(self.model)}

    def copy_out(self) -> dict[str, Any]:
        """A copy of everything.

        Cost: one pass over parameters, buffers and optimizer state, and their memory.
        """
        parameters = self._optimized()
        with torch.no_grad():
            return {
                "model": {
                    path: None if tensor is None else clone(tensor, self._device)
                    for path, tensor in self.tensors().items()
                },
                "extra": {
                    path: clone(module.get_extra_state())
                    for path, module in self.model.named_modules()
                    if _has_extra_state(module)
                },
                # State that the optimizer has not made yet is not made by looking.
                "optimizer": {
                    str(index): clone(dict(self.optimizer.state[parameter]), self._device)
                    for index, parameter in enumerate(parameters)
                    if parameter in self.optimizer.state
                },
                "groups": [
                    clone({key: value for key, value in group.items() if key != "params"}, self._device)
                    for group in self.optimizer.param_groups
                ],
                "schedulers": [clone(scheduler.state_dict()) for scheduler in self.schedulers],
                "scaler": clone(self.scaler.state_dict()) if self.scaler is not None else {},
                "rng": random_state.capture(),
            }

    def copy_back(self, saved: dict[str, Any]) -> None:
        """Puts a copy back; the copy stays as it is and can be put back again."""
        with torch.no_grad():
            for path, module, name, tensor in list(_tensors(self.model)):
                if path not in saved["model"]:
                    continue
                value = saved["model"][path]
                if tensor is not None and value is not None and _fits(tensor, value):
                    tensor.detach().copy_(value)
                elif name in module._buffers:
                    # A buffer that was None, or of another size: the forward pass replaced it.
                    device = None if tensor is None else tensor.device
                    module._buffers[name] = None if value is None else write_back(tensor, value, device)
                elif value is not None:
                    raise ValueError(
                        f"parameter {path} has changed since it was saved, from {tuple(value.shape)} {value.dtype}. "
                        "Parameters must keep their shape and dtype while a tuner is attached."
                    )
            for path, module in self.model.named_modules():
                if path in saved["extra"]:
                    module.set_extra_state(clone(saved["extra"][path]))
            for index, parameter in enumerate(self._optimized()):
                value = saved["optimizer"].get(str(index))
                if value is None:
                    self.optimizer.state.pop(parameter, None)
                else:
                    known = self.optimizer.state.get(parameter)
                    device = None if self._device is None else parameter.device
                    self.optimizer.state[parameter] = write_back(known, value, device)
            for group, values in zip(self.optimizer.param_groups, saved["groups"], strict=True):
                group.update(write_back(group, values))
            for scheduler, state in zip(self.schedulers, saved["schedulers"], strict=True):
                scheduler.load_state_dict(clone(state))
            if self.scaler is not None:
                self.scaler.load_state_dict(clone(saved["scaler"]))
            random_state.restore(saved["rng"])

    def check(self, saved: dict[str, Any]) -> None:
        """Whether a copy, perhaps of another process, is of a model like this one.

        Raises:
          SnapshotMismatchError: It is not; the message names the differences.
        """
        here = {path: _kind(tensor) for path, tensor in self.tensors().items()}
        there = {path: _kind(tensor) for path, tensor in saved["model"].items()}
        wrong = [f"{path} is {there.get(path, 'missing')}, not {kind}" for path, kind in here.items()
                 if there.get(path) != kind]  # fmt: skip
        wrong += [f"{path} is not in this model" for path in there if path not in here]
        if wrong:
            more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise atn.SnapshotMismatchError(f"The snapshot is of another model: {'; '.join(wrong[:5])}{more}.")

    def _optimized(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
