"""E. State outside the optimizer goes back with the training, or its owner is told."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import autotunenet_jax as atn
import autotunenet_torch as att

from . import tasks, torch_tasks
from .registry import Outcome, case

TOTAL = 600


def _normed(p: Any, stats: Any, x: Any, *, trains: bool) -> tuple[Any, Any]:
    hidden = x @ p["a"]
    mean, var = (hidden.mean(0), hidden.var(0)) if trains else stats
    logits = jax.nn.relu((hidden - mean) * jax.lax.rsqrt(var + 1e-5)) @ p["c"] + p["d"]
    return logits, tuple(0.9 * old + 0.1 * new for old, new in zip(stats, (mean, var), strict=True))


@functools.cache
def _normed_run(bad: tuple[int, ...], validates: bool) -> tuple[float, bool]:
    """Batch statistics are handed to the rewind; at some steps a batch of 1e18 goes through them."""
    opt = atn.autotune(optax.adam, tasks.SPACE, TOTAL, learning_rate=tasks.START)

    def loss_of(p: Any, stats: Any, x: Any, y: Any) -> Any:
        logits, stats = _normed(p, stats, x, trains=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), stats

    def metric(p: Any, stats: Any, number: int) -> Any:
        x, y = tasks.data()[number]
        logits, _ = _normed(p, stats, x, trains=False)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(p: Any, stats: Any, state: Any, x: Any, y: Any) -> Any:
        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(p, stats, x, y)
        updates, state = opt.update(grads, state, p, value=loss, aux=stats)
        p, stats = optax.apply_updates(p, updates), atn.rewound(state, stats)  # type: ignore[attr-defined]
        if validates:
            state = jax.lax.cond(
                atn.wants_eval(state), lambda s: atn.observe_eval(s, metric(p, stats, 1)), lambda s: s, state
            )
        return p, stats, state

    p = {k: v for k, v in tasks.new_params().items() if k in "acd"}
    stats = (jnp.zeros(tasks.HIDDEN), jnp.ones(tasks.HIDDEN))
    state = opt.init(p)
    for k in range(TOTAL):
        x, y = tasks.rows(k)
        x = np.full_like(x, np.nan) if k in bad else x
        p, stats, state = step(p, stats, state, x, y)
    return float(metric(p, stats, 2)), tasks.is_finite((p, stats))


@case("E", "autotune", short=("autotune",))
def batch_statistics_handed_to_the_rewind(way: str) -> Outcome:
    loss, whole = _normed_run((), True)
    limit = 1.12 * tasks.plain(total=TOTAL)
    return f"<= {limit:.3f}, finite", f"{loss:.3f}, {whole}", whole and loss <= limit


@case("E", "autotune")
def batch_statistics_after_NaN_batches(way: str) -> Outcome:  # noqa: N802
    loss, whole = _normed_run((7, 44, 200, 433), False)
    limit = 1.12 * tasks.plain(total=TOTAL)
    return f"<= {limit:.3f}, finite", f"{loss:.3f}, {whole}", whole and loss <= limit


@case("E", "autotune")
def counters_and_averages_handed_to_the_rewind(way: str) -> Outcome:
    """An average of the weights of what survived is near the weights at the end, and is no average over lost forks."""
    opt = atn.autotune(optax.adam, tasks.SPACE, TOTAL, learning_rate=tasks.START)

    @jax.jit
    def step(p: Any, aux: Any, state: Any, x: Any, y: Any) -> Any:
        loss, grads = jax.value_and_grad(tasks.loss_of)(p, x, y)
        aux = {"ema": jax.tree.map(lambda e, q: 0.97 * e + 0.03 * q, aux["ema"], p), "n": aux["n"] + 1}
        updates, state = opt.update(grads, state, p, value=loss, aux=aux)
        return optax.apply_updates(p, updates), atn.rewound(state, aux), state  # type: ignore[attr-defined]

    p = tasks.new_params()
    aux = {"ema": p, "n": jnp.zeros((), jnp.int32)}
    state = opt.init(p)
    for k in range(TOTAL):
        p, aux, state = step(p, aux, state, *tasks.rows(k))
    loss, here, count = float(tasks.test_loss(aux["ema"])), float(tasks.test_loss(p)), int(aux["n"])
    is_ok = loss <= 1.02 * here and 0.55 * TOTAL <= count < TOTAL
    return f"count below {TOTAL}, average within 2 %", f"count {count}, {loss:.3f} against {here:.3f}", is_ok


@case("E", "autotune")
def the_examples_hand_it_over(way: str) -> Outcome:
    from . import frameworks

    texts = [(frameworks.ROOT / "examples" / f"flax_{name}.py").read_text() for name in ("nnx", "linen")]
    uses = ["BatchNorm" in text and "rewound" in text for text in texts]
    return "BatchNorm and rewound in both", f"nnx {uses[0]}, linen {uses[1]}", all(uses)


# PyTorch.


class _Sharp(torch.optim.Optimizer):
    """Sharpness-aware steps around another optimizer, whose state it shares, or keeps to itself."""

    def __init__(self, params: Any, lr: float, *, shares: bool):
        super().__init__(params, {"lr": lr, "rho": 0.05})
        self.base = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        if shares:
            self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.base.step()


def _forked_twice(make: Any, *, model: Any = None, total: int = 200, before: Any = None) -> str:
    """Copies a training out, trains, copies it back, and trains again: the two continuations must be the same."""
    model = torch_tasks.new_model() if model is None else model
    opt = make(model)

    def train(steps: range) -> list[torch.Tensor]:
        for k in steps:
            x, y = tasks.rows(k)
            loss = F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y).long())
            opt.zero_grad()
            loss.backward()
            opt.step()
            if before is not None:
                before()
        return [p.detach().clone() for p in model.parameters()]

    train(range(30))
    state = att.TrainingState(model, opt)
    saved = state.copy_out()
    one = train(range(30, 60))
    state.copy_back(saved)
    two = train(range(30, 60))
    apart = max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True))
    return "" if apart == 0.0 else f"{apart:.2g} apart"


def _refused_or_same(run: Any) -> Outcome:
    try:
        text = run()
    except (ValueError, TypeError, NotImplementedError) as error:
        return "the same, or refused by name", f"refused: {str(error)[:90]}", True
    return "the same, or refused by name", text or "the same", not text


@case("E", "loop", short=("loop",))
def an_optimizer_around_another(way: str) -> Outcome:
    return _refused_or_same(lambda: _forked_twice(lambda m: _Sharp(m.parameters(), 0.02, shares=True)))


@case("E", "loop")
def an_optimizer_with_a_private_one(way: str) -> Outcome:
    return _refused_or_same(lambda: _forked_twice(lambda m: _Sharp(m.parameters(), 0.02, shares=False)))


class _Counting(torch.optim.SGD):
    """Keeps something outside of `state`, as schedule-free and line-search optimizers do."""

    def __init__(self, params: Any):
        super().__init__(params, lr=0.05)
        self.taken = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.param_groups[0]["lr"] = 0.05 / (1 + self.taken) ** 0.5
        self.taken += 1
        super().step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.taken = state_dict["taken"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "taken"})


@case("E", "loop")
def an_optimizer_with_more_in_its_state_dict(way: str) -> Outcome:
    return _refused_or_same(lambda: _forked_twice(lambda m: _Counting(m.parameters())))


class _Buffered(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.linear = nn.Linear(tasks.INPUTS, tasks.CLASSES)
        make = {
            "expanded": lambda: torch.arange(5.0).view(5, 1).expand(5, 7),
            "sparse": lambda: torch.eye(6).to_sparse(),
            "csr": lambda: torch.eye(6).to_sparse_csr(),
            "float8": lambda: torch.ones(6).to(torch.float8_e4m3fn),
            "meta": lambda: torch.empty(6, device="meta"),
            "quantised": lambda: torch.quantize_per_tensor(torch.ones(6), 0.1, 0, torch.qint8),
            "transposed": lambda: torch.randn(3, 4).t(),
            "inference": lambda: torch.inference_mode()(torch.ones)(6),
            "empty": lambda: torch.empty(0),
            "complex": lambda: torch.ones(3, dtype=torch.complex64),
        }
        self.register_buffer("kept", make[kind]())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@case("E", "loop", "Trainer", short=("loop",))
def buffers_of_all_kinds(way: str) -> Outcome:
    wrong = []
    kinds = ("expanded", "sparse", "csr", "float8", "meta", "quantised", "transposed", "inference", "empty", "complex")
    for kind in kinds:
        model = _Buffered(kind)
        try:
            torch_tasks.run(way, total=160, validates=False, model=model)
        except ValueError as error:
            wrong += [] if "kept" in str(error) else [f"{kind}: ValueError"]
        except Exception as error:
            wrong.append(f"{kind}: {type(error).__name__}")
    return "trained, or refused by name", "; ".join(wrong) or "so it is", not wrong


@case("E", "loop")
def a_parameter_group_added_later(way: str) -> Outcome:
    model = torch_tasks.new_model()
    head = torch.optim.Adam(model[2].parameters(), tasks.START)
    tuner = att.AutoTuneNet(torch_tasks.SPACE)
    tuner.attach(model, head, total_steps=500)
    rates: list[float] = []
    for k in range(500):
        if k == 110:
            head.add_param_group({"params": list(model[0].parameters()), "lr": tasks.START})
        x, y = tasks.rows(k)
        loss = F.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y).long())
        head.zero_grad()
        loss.backward()
        head.step()
        tuner.step(loss)
        if k == 400:
            rates = [group["lr"] for group in head.param_groups]
    one, two = rates
    return "both rates tuned and decaying", f"{one:.2e} and {two:.2e} at step 400", abs(two / one - 1.0) < 0.05


@case("E", "Trainer")
def a_backbone_in_eval_mode(way: str) -> Outcome:
    torch.manual_seed(0)
    back = nn.Sequential(nn.Linear(tasks.INPUTS, 24), nn.BatchNorm1d(24))
    for p in back.parameters():
        p.requires_grad_(False)
    model = nn.Sequential(back, nn.ReLU(), nn.Linear(24, tasks.CLASSES))
    model.train()
    back.eval()
    before = torch_tasks.weights(back)
    ended = torch_tasks.run_trainer(total=120, model=model)
    ended.result.validate()
    moved = not torch_tasks.states_equal(before, torch_tasks.weights(back))
    is_kept = not moved and not back.training and model[2].training
    return "statistics and modes kept", f"moved {moved}, training {back.training}", is_kept


@case("E", "loop")
def statistics_of_losing_forks(way: str) -> Outcome:
    """Batch statistics are buffers: they go back with the weights, also when the forward pass replaces them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(tasks.INPUTS, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, tasks.CLASSES))
    ended = torch_tasks.run_loop(total=500, model=model)
    count = int(model.state_dict()["1.num_batches_tracked"])
    discarded = ended.tuner.history.summary["discarded_steps"]
    return f"{500 - discarded} batches tracked", f"{count}", abs(count - (500 - discarded)) <= 40
