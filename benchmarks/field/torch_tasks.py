"""The shared task in PyTorch, in a loop of one's own and in `Trainer`."""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import autotunenet_torch as att

from . import tasks
from .tasks import Ended

torch.set_num_threads(1)

SPACE = {"learning_rate": (1e-5, 1.0)}


@functools.cache
def tensors() -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    return tuple((torch.from_numpy(x), torch.from_numpy(y).long()) for x, y in tasks.data())


def new_model(seed: int = 0, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    middle = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(
        nn.Linear(tasks.INPUTS, tasks.HIDDEN), nn.ReLU(), *middle, nn.Linear(tasks.HIDDEN, tasks.CLASSES)
    )


def loss_on(model: nn.Module, number: int) -> float:
    """Loss on the validation (1) or test (2) set."""
    mode = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(tensors()[number][0]), tensors()[number][1]))
    for module, was in mode.items():
        module.training = was
    return loss


def is_finite(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    states = [value for state in optimizer.state.values() for value in state.values()]
    found = [*model.parameters(), *model.buffers(), *(s for s in states if isinstance(s, torch.Tensor))]
    return all(_is_whole(t.detach()) for t in found if t.is_floating_point())


def _is_whole(tensor: torch.Tensor) -> bool:
    if tensor.is_meta:
        return True
    plain = tensor.dequantize() if tensor.is_quantized else tensor
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    return bool(torch.isfinite(plain.float()).all())


def spoil_gradients(model: nn.Module, name: str, size: float) -> None:
    for p in model.parameters():
        if p.grad is None:
            continue
        if name in ("nan_grad", "nan_both"):
            p.grad.fill_(float("nan"))
        elif name == "grad":
            p.grad.fill_(size)


@torch.no_grad()
def damage(model: Any, name: str, size: float) -> None:
    if name == "dead":
        model[0].bias.sub_(1e3)
        model[-1].bias.zero_()
    elif name == "long":
        for p in model.parameters():
            p.mul_(size)
    elif name == "idle":
        model[0].running.fill_(float("inf"))


def told(loss: torch.Tensor, name: str, size: float) -> torch.Tensor:
    loss = loss.detach()
    if name in ("nan_loss", "nan_both"):
        return loss * float("nan")
    if name == "inf_loss":
        return loss * float("inf")
    return torch.tensor(size) if name == "tell" else loss * size if name == "scale" else loss


MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, tasks.START),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
}


def run_loop(
    faults: tasks.Faults = tasks.no_faults,
    *,
    total: int = 800,
    optimizer: Any = "adam",
    validates: bool = True,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    batch: tasks.BatchOptions | None = None,
    model: Any = None,
    scheduler: Callable[[Any], Any] | None = None,
    space: Any = None,
    each: Callable[[int, Any, Any, Any], None] | None = None,
) -> Ended:
    """A loop of one's own: attach, then `step` after each optimizer step."""
    model = new_model(seed) if model is None else model
    maker = MAKERS[optimizer] if isinstance(optimizer, str) else optimizer
    opt = maker(model.parameters())
    plan = scheduler(opt) if scheduler else None
    tuner = att.AutoTuneNet(space or SPACE, **(options or {}))
    rates = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        validate = (lambda: loss_on(model, 1)) if validates else None
        tuner.attach(model, opt, plan, total_steps=total, validate=validate)
        model.train()
        for k in range(total):
            name, size = faults(k, k)
            x, y = tasks.rows(k, **(batch(k) if batch else {}))
            loss = F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y).long())
            opt.zero_grad()
            loss.backward()
            spoil_gradients(model, name, size)
            opt.step()
            damage(model, name, size)
            if plan is not None:
                plan.step()
            tuner.step(told(loss, name, size))
            rates.append(opt.param_groups[0]["lr"])
            if each is not None:
                each(k, model, opt, tuner)
    half = sorted(rates[int(0.5 * total) : int(0.58 * total)])
    return _ended(model, opt, tuner, caught, half[len(half) // 2], model)


def _ended(model: Any, opt: Any, tuner: Any, caught: Any, rate: float, result: Any) -> Ended:
    history = tuner.history
    said = [str(w.message) for w in caught] + [f"{e['kind']}: {e['message']}" for e in history.events]
    loss = loss_on(model, 2)
    return Ended(loss, float(rate), is_finite(model, opt), said, history.summary["rollbacks"], result, tuner)


class Stream:
    """The batches in their order with their positions, as a loader that can be read again."""

    def __init__(self, total: int, batch: tasks.BatchOptions | None = None):
        self.total, self.batch = total, batch

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Any]:
        for k in range(self.total):
            x, y = (torch.from_numpy(v) for v in tasks.rows(k, **(self.batch(k) if self.batch else {})))
            yield x, y.long(), k


class _Spoiled(torch.autograd.Function):
    """A loss whose gradient is spoiled on its way back."""

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, name: str, size: float) -> torch.Tensor:
        ctx.fault = name, size
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        name, size = ctx.fault
        (grad,) = grads
        if name in ("nan_grad", "nan_both"):
            grad = grad * float("nan")
        elif name == "grad":
            grad = torch.full_like(grad, size)
        return grad, None, None


def _faulty_loss(outputs: torch.Tensor, targets: Any) -> torch.Tensor:
    y, name, size = targets if isinstance(targets, tuple) else (targets, "none", 1.0)
    loss = F.cross_entropy(_Spoiled.apply(outputs, name, size), y)  # type: ignore[arg-type]
    # The value alone is spoiled; what flows back is the plain gradient.
    return loss + (told(loss, name, size) - loss.detach()) if name != "none" else loss


def run_trainer(
    faults: tasks.Faults = tasks.no_faults,
    *,
    total: int = 800,
    optimizer: Any = "adam",
    validates: bool = True,
    options: dict[str, Any] | None = None,
    seed: int = 0,
    batch: tasks.BatchOptions | None = None,
    model: Any = None,
    space: Any = None,
    **more: Any,
) -> Ended:
    """`Trainer`; a fault of the state comes after the optimizer's step."""
    model = new_model(seed) if model is None else model
    maker = MAKERS[optimizer] if isinstance(optimizer, str) else optimizer
    now: list[tuple[str, float]] = [("none", 1.0)]
    calls = iter(range(10**9))

    def forward(model: Any, batch: Any) -> Any:
        if not model.training:
            return model(batch[0]), batch[1]
        x, y, position = batch
        now[0] = faults(int(position), next(calls))
        return model(x), (y, *now[0])

    def make(parameters: Any) -> torch.optim.Optimizer:
        made = maker(parameters)
        made.register_step_post_hook(lambda *_: damage(model, *now[0]))
        return made

    trainer = att.Trainer(_faulty_loss, make, steps=total, metrics={}, progress=False, forward=forward, **more)
    tuner = att.AutoTuneNet(space or SPACE, **(options or {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        held = [tensors()[1]] if validates else None
        trainer.fit(model, Stream(total, batch), held, tuner=tuner)
    rate = tasks.rate_at(tuner.history.records, 0.5 * total)
    return _ended(model, trainer.optimizer, tuner, caught, rate, trainer)


@functools.cache
def plain(
    faults: tasks.Faults = tasks.no_faults,
    *,
    total: int = 800,
    stop: int | None = None,
    optimizer: str = "adam",
    rate: float = tasks.GOOD_RATE,
    seed: int = 0,
    batch: tasks.BatchOptions | None = None,
    factor: Callable[[int], float] | None = None,
) -> float:
    """Test loss of plain training at a good rate under linear decay, without the steps that a fault would spoil."""
    model = new_model(seed)
    opt = MAKERS[optimizer](model.parameters())
    for k in range(stop or total):
        if faults(k, k)[0] in tasks.NON_FINITE:
            continue
        for group in opt.param_groups:
            group["lr"] = rate * (factor(k) if factor else 1.0 - k / total)
        x, y = tasks.rows(k, **(batch(k) if batch else {}))
        opt.zero_grad()
        F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y).long()).backward()
        opt.step()
    return loss_on(model, 2)


def run(way: str, faults: tasks.Faults = tasks.no_faults, **options: Any) -> Ended:
    """A run by any of the four ways in."""
    ways = {"fit": tasks.run_fit, "autotune": tasks.run_autotune, "loop": run_loop, "Trainer": run_trainer}
    return ways[way](faults, **options)


def plain_of(way: str, faults: tasks.Faults = tasks.no_faults, **options: Any) -> float:
    """What plain training gets beside it."""
    function = tasks.plain if way in ("fit", "autotune") else plain
    return function(faults, **options)


def states_equal(one: Any, two: Any) -> bool:
    """Whether two trees of tensors are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(states_equal(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(states_equal(a, b) for a, b in zip(one, two, strict=True))
    return one == two


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """The texts of all warnings given meanwhile."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
        texts.extend(str(w.message) for w in caught)
