"""B. Damage is seen, and the end is never worse than the best that was had."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import nn

import autotunenet_jax as atn
import autotunenet_torch as att

from . import tasks, torch_tasks
from .registry import Outcome, case
from .torch_tasks import plain_of, run

WAYS = ("fit", "autotune", "loop", "Trainer")
TOTAL = 800


def _worst_of(way: str, faults: list[tasks.Faults], factor: float = 1.1, **options: Any) -> Outcome:
    """The worst of some runs; one that is not finite is worst of all."""
    ends = [run(way, one, **options) for one in faults]
    worst = max(ends, key=lambda ended: ended.loss if ended.is_finite and np.isfinite(ended.loss) else np.inf)
    reference = plain_of(way, **{k: v for k, v in options.items() if k in ("total", "optimizer")})
    expected, got, is_ok = tasks.verdict(worst, reference, factor)
    bad = sum(not (e.is_finite and e.loss <= factor * reference) for e in ends)
    return expected, f"{got}; {bad} of {len(ends)} runs bad", is_ok


@case("B", *WAYS, short=("fit", "loop"))
def all_hidden_units_die(way: str) -> Outcome:
    return _worst_of(way, [tasks.at_call(at, "dead") for at in (250, 333, 451, 600, 700)])


@case("B", *WAYS)
def all_hidden_units_die_without_validation(way: str) -> Outcome:
    return _worst_of(way, [tasks.at_call(at, "dead") for at in (260, 500, 650)], validates=False)


@case("B", *WAYS)
def a_collapse_in_the_step_after_a_validation(way: str) -> Outcome:
    ats = [40 * k + shift for k in (9, 13, 17) for shift in (-1, 0, 1)]
    return _worst_of(way, [tasks.at_call(at, "dead") for at in ats])


@case("B", *WAYS)
def a_collapse_in_the_last_steps(way: str) -> Outcome:
    # What is done to the parameters after the last update no transformation can see.
    last = () if way == "autotune" else (TOTAL - 1,)
    return _worst_of(way, [tasks.at_call(at, "dead") for at in (TOTAL - 12, TOTAL - 3, TOTAL - 2, *last)])


@case("B", *WAYS, short=("fit",))
def the_last_step_is_far_too_long(way: str) -> Outcome:
    """The numbers stay finite; 20, 1e4 and 1e15 times too long; inside an optimizer by its gradient."""
    if way == "autotune":
        sizes = (30.0, 1e4, 1e15)
        return _worst_of(way, [tasks.at_call(TOTAL - 1, "grad", size) for size in sizes], optimizer="momentum")
    return _worst_of(way, [tasks.at_call(TOTAL - 1, "long", size) for size in (20.0, 1e4, 1e15)])


@case("B", *WAYS)
def one_gradient_of_1e6(way: str) -> Outcome:
    return _worst_of(way, [tasks.at_call(at, "grad", 1e6) for at in (200, 410, 640)])


@case("B", *WAYS, short=("loop",))
def one_gradient_of_1e6_with_momentum(way: str) -> Outcome:
    return _worst_of(way, [tasks.at_call(at, "grad", 1e6) for at in (200, 410, 640)], optimizer="momentum")


@case("B", *WAYS, short=("fit",))
def one_gradient_of_1e20(way: str) -> Outcome:
    """Its square is infinite: Adam's second moments are, for good, though no loss ever tells."""
    return _worst_of(way, [tasks.at_call(at, "grad", 1e20) for at in (210, 430)])


@case("B", *WAYS)
def one_gradient_of_1e17(way: str) -> Outcome:
    """Its square is finite, and stops the layer for thousands of steps all the same."""
    return _worst_of(way, [tasks.at_call(at, "grad", 1e17) for at in (210, 430)])


@case("B", "fit")
def infinite_parameters_that_the_loss_does_not_touch(way: str) -> Outcome:
    # Beside an optimizer: it cannot bring them back, for an update is added to them.
    return _worst_of(way, [tasks.at_call(at, "idle") for at in (30, 300, 555)])


class _WithStatistic(nn.Linear):
    """A layer with a buffer that nothing reads."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.register_buffer("running", torch.ones(2))


@case("B", "loop", "Trainer")
def an_infinite_buffer_that_the_loss_does_not_touch(way: str) -> Outcome:
    if way == "Trainer":
        return _infinite_batch_norm(way)
    ends = []
    for at in (60, 420, TOTAL - 1):
        torch.manual_seed(0)
        model = nn.Sequential(_WithStatistic(tasks.INPUTS, 40), nn.ReLU(), nn.Linear(40, tasks.CLASSES))
        ends.append(run(way, tasks.at_call(at, "idle"), model=model))
    worst = max(ends, key=lambda ended: (not ended.is_finite, ended.loss))
    return tasks.verdict(worst, plain_of(way), 1.1)


def _infinite_batch_norm(way: str) -> Outcome:
    """One pixel of 1e25 in one batch: the running variance is infinite, and only evaluation tells."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(tasks.INPUTS, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, tasks.CLASSES))
    x, y = torch_tasks.tensors()[0]
    x = x.clone()
    x[3000, 4] = 1e25
    data = torch.utils.data.TensorDataset(x, y)
    trainer = att.Trainer(nn.functional.cross_entropy, torch.optim.Adam, epochs=6, progress=False)
    tuner = att.AutoTuneNet(torch_tasks.SPACE)
    trainer.fit(model, torch.utils.data.DataLoader(data, 48), [torch_tasks.tensors()[1]], tuner=tuner)
    loss, whole = torch_tasks.loss_on(model, 2), torch_tasks.is_finite(model, trainer.optimizer)
    limit = 1.15 * torch_tasks.plain(total=750)
    return f"<= {limit:.3f}, finite", f"{loss:.3f}, {'finite' if whole else 'NOT FINITE'}", whole and loss <= limit


@case("B", "fit", "loop", "Trainer", short=("fit",))
def metrics_that_are_NaN_from_a_step_on(way: str) -> Outcome:  # noqa: N802
    """The metric breaks with the state, through a part that no training loss reads; then the state is worth nothing."""
    at = 500
    if way == "fit":
        ended = run(way, tasks.at_call(at, "idle"), eval_step=_eval_with_idle)
        return tasks.verdict(ended, plain_of(way), 1.1)
    torch.manual_seed(0)
    model = nn.Sequential(_Broken(), nn.Linear(tasks.INPUTS, 40), nn.ReLU(), nn.Linear(40, tasks.CLASSES))

    def damages(k: int) -> dict[str, Any]:
        if k == at:
            model.get_buffer("0.scale").fill_(float("nan"))
        return {}

    ended = run(way, batch=damages, model=model)
    return tasks.verdict(ended, plain_of(way), 1.1)


def _eval_with_idle(state: Any) -> Any:
    return tasks.eval_step(state) + 0.0 * jnp.sum(state["p"]["idle"])


class _Broken(nn.Module):
    """Multiplies by a statistic in evaluation only."""

    def __init__(self):
        super().__init__()
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.training else x * self.scale


@case("B", "fit", "autotune", "loop")
def two_collapses_soon_after_each_other(way: str) -> Outcome:
    """The second one comes before the copies have been renewed, the third in what was restored."""

    def twice(position: int, call: int) -> tuple[str, float]:
        return ("dead" if call in (500, 511, 530) else "none"), 1.0

    return _worst_of(way, [twice])


@case("B", "fit", "loop")
def a_slow_decay_of_the_state_that_both_copies_hold(way: str) -> Outcome:
    """The parameters shrink by 4 % a step for 60 steps: no single loss is unusual, the sum of them is."""

    def shrinking(position: int, call: int) -> tuple[str, float]:
        return ("long", 0.96) if 600 <= call < 660 else ("none", 1.0)

    return _worst_of(way, [shrinking], 1.12)


# What the tuner itself may do.


@case("B", *WAYS)
def short_runs_of_nesterov_momentum(way: str) -> Outcome:
    """240 steps, five seeds, a range that reaches far into what diverges."""
    ratios = []
    for seed in range(5):
        ended = run(way, total=240, optimizer="momentum", seed=seed)
        ratios.append(ended.loss / plain_of(way, total=240, optimizer="momentum", rate=0.05, seed=seed))
    # So short a run may pick half a decade too hot; a run that is wrecked ends at twice the loss and more.
    return tasks.of_seeds(ratios, typical=1.08, worst=1.25)


class _Orthogonal(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal: the length of a step is the rate's alone."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.mul_(0.9).add_(p.grad)
                if p.ndim == 2:
                    u, _, v = torch.linalg.svd(m, full_matrices=False)
                    p.sub_(group["lr"] * torch.matmul(u, v))
                else:
                    p.sub_(group["lr"] * 0.1 * m / (m.norm() + 1e-12))


@case("B", "loop", "Trainer")
def short_runs_of_an_optimizer_with_steps_of_fixed_length(way: str) -> Outcome:
    torch_tasks.MAKERS["orthogonal"] = lambda p: _Orthogonal(p, 1e-2)
    ratios = []
    for seed in range(3):
        ended = run(way, total=300, optimizer="orthogonal", seed=seed)
        ratios.append(ended.loss / torch_tasks.plain(total=300, optimizer="orthogonal", rate=0.05, seed=seed))
    return "<= 1.12 x plain, three seeds", f"worst {max(ratios):.3f}", max(ratios) <= 1.12


@functools.cache
def _normed_step() -> Any:
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=1e-2)

    def forward(p: Any, mean: Any, var: Any, x: Any) -> Any:
        return jax.nn.relu((x @ p["a"] - mean) * jax.lax.rsqrt(var + 1e-5)) @ p["c"] + p["d"]

    def step(state: Any, batch: Any, hp: Any) -> Any:
        x, y = batch

        def loss_of(p: Any) -> Any:
            hidden = x @ p["a"]
            mean, var = hidden.mean(0), hidden.var(0)
            logits = forward(p, mean, var, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), (mean, var)

        (loss, seen), grads = jax.value_and_grad(loss_of, has_aux=True)(state["p"])
        updates, opt = tx.update(grads, atn.set_hyperparams(state["opt"], hp), state["p"])
        stats = tuple(0.9 * old + 0.1 * new for old, new in zip(state["stats"], seen, strict=True))
        return {"p": optax.apply_updates(state["p"], updates), "opt": opt, "stats": stats}, loss

    def metric(state: Any, number: int = 1) -> Any:
        x, y = tasks.data()[number]
        mean, var = state["stats"]
        logits = forward(state["p"], mean, var, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    p = {k: v for k, v in tasks.new_params().items() if k in "acd"}
    state = {"p": p, "opt": tx.init(p), "stats": (jnp.zeros(tasks.HIDDEN), jnp.ones(tasks.HIDDEN))}
    return step, metric, state


@case("B", "fit")
def a_pixel_of_1e22_makes_a_running_variance_infinite(way: str) -> Outcome:
    step, metric, state = _normed_step()
    losses = []
    for at in (20, 210, 500, TOTAL - 1):
        calls = iter(range(-1, 10**9))

        def batches(position: int, hp: Any, at: int = at, calls: Any = calls) -> Any:
            x, y = tasks.rows(int(position))
            if next(calls) == at:
                x = x.copy()
                x[0, 3] = 1e22
            return x, y

        result = atn.fit(step, state, batches, tuner=tasks.tuner(TOTAL), eval_step=metric, progress=False)
        loss = float(metric(result.state, 2))
        losses.append(loss if tasks.is_finite(result.state) else float("nan"))
    limit = 1.15 * tasks.plain()
    got = ", ".join(f"{loss:.3f}" for loss in losses)
    return f"<= {limit:.3f}, four places", got, all(loss <= limit for loss in losses)


@case("B", *WAYS)
def random_faults(way: str) -> Outcome:
    """Runs with one to four faults of any sort at random steps."""
    count = 12
    names = {"nan_both": 1.0, "inf_loss": 1.0, "dead": 1.0, "long": 30.0, "grad": 1e8, "tell": 1e12, "scale": 50.0}
    faults = []
    for number in range(count):
        rng = np.random.default_rng((77, number))
        plan = {int(k): str(rng.choice(list(names))) for k in rng.integers(1, TOTAL, rng.integers(1, 5))}
        faults.append(functools.partial(_planned, plan, names))
    return _worst_of(way, faults)


def _planned(plan: dict[int, str], names: dict[str, float], position: int, call: int) -> tuple[str, float]:
    name = plan.get(call)
    return (name, names[name]) if name else ("none", 1.0)


@case("B", "fit", "loop", "Trainer")
def the_end_is_the_best_that_was_had(way: str) -> Outcome:
    """Without any fault, at rates held to the end: the metric of what is returned is the best reading of the run."""
    ended = run(way, options={"decay": "none"}, total=600)
    history = ended.tuner.history if ended.tuner is not None else ended.result.history
    readings = [entry["value"] for entry in history.evals if entry["is_settled"]]
    best = min(readings)
    if way == "fit":
        last = ended.result.eval
    else:
        last = ended.result.validate()["loss"] if way == "Trainer" else torch_tasks.loss_on(ended.result, 1)
    return f"metric <= {best:.4f}, the best reading", f"{last:.4f}", last <= best + 1e-4
