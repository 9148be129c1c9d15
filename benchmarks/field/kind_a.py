"""A. Evidence that says nothing about the rate must not move it: recurring bad batches, the user's own warm-up."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import autotunenet_jax as atn
import autotunenet_torch as att

from . import slow_cases as slow_cases
from . import tasks
from .registry import Outcome, case
from .torch_tasks import plain, plain_of, run

WAYS = ("fit", "autotune", "loop", "Trainer")


def _bad_share(way: str, portion: float, name: str, seed: int = 0) -> Outcome:
    ratios = []
    for number in range(3):
        faults = _shares(portion, name, seed + 10 * number)
        ended = run(way, faults, seed=number)
        ratios.append(ended.loss / plain_of(way, faults, seed=number) if ended.is_finite else math.inf)
    return tasks.of_seeds(ratios, what="plain with skips")


@functools.cache
def _shares(portion: float, name: str, seed: int) -> tasks.Faults:
    return tasks.share(portion, name, seed)


@case("A", *WAYS, short=("fit", "loop"))
def _3_percent_of_batches_all_NaN(way: str) -> Outcome:  # noqa: N802
    return _bad_share(way, 0.03, "nan_both")


@case("A", *WAYS, short=("autotune",))
def _12_percent_of_batches_all_NaN(way: str) -> Outcome:  # noqa: N802
    return _bad_share(way, 0.12, "nan_both", 1)


@case("A", *WAYS)
def _20_percent_of_losses_NaN(way: str) -> Outcome:  # noqa: N802
    return _bad_share(way, 0.2, "nan_loss", 2)


@case("A", *WAYS)
def _7_percent_of_gradients_NaN(way: str) -> Outcome:  # noqa: N802
    return _bad_share(way, 0.07, "nan_grad", 3)


@case("A", "fit", "loop")
def _5_percent_of_losses_infinite(way: str) -> Outcome:
    return _bad_share(way, 0.05, "inf_loss", 4)


def _period(position: int, call: int) -> tuple[str, float]:
    return ("nan_both" if position % 23 == 22 else "none"), 1.0


def _bursts(position: int, call: int) -> tuple[str, float]:
    return ("nan_both" if position % 160 < 8 else "none"), 1.0


def _first(position: int, call: int) -> tuple[str, float]:
    return ("nan_both" if position < 30 else "none"), 1.0


def _from(position: int, call: int) -> tuple[str, float]:
    return ("nan_both" if position >= 500 else "none"), 1.0


@case("A", *WAYS)
def every_23rd_batch_NaN(way: str) -> Outcome:  # noqa: N802
    return tasks.verdict(run(way, _period), plain_of(way, _period), 1.05, "plain with skips")


@case("A", *WAYS)
def bursts_of_8_NaN_from_the_first_step_on(way: str) -> Outcome:  # noqa: N802
    return tasks.verdict(run(way, _bursts), plain_of(way, _bursts), 1.05, "plain with skips")


@case("A", *WAYS)
def the_first_30_steps_NaN(way: str) -> Outcome:  # noqa: N802
    return tasks.verdict(run(way, _first), plain_of(way, _first), 1.06, "plain with skips")


@case("A", "fit", "autotune", "loop")
def bad_batches_without_validation(way: str) -> Outcome:
    faults = _shares(0.06, "nan_both", 5)
    return tasks.verdict(run(way, faults, validates=False), plain_of(way, faults), 1.07, "plain with skips")


def _without_validation(way: str, faults: list[tasks.Faults]) -> Outcome:
    """Against plain training, which meets none of the faults."""
    ratios = []
    for seed, each in enumerate(faults):
        ended = run(way, each, validates=False, seed=seed)
        ratios.append(ended.loss / plain_of(way, seed=seed) if ended.is_finite else math.inf)
    return tasks.of_seeds(ratios, typical=1.1, worst=1.15)


def _every(period: int, offset: int, name: str, size: float) -> tasks.Faults:
    return lambda position, call: (name, size) if position % period == offset else ("none", 1.0)


def _tenfold(steps: tuple[int, ...]) -> tasks.Faults:
    return lambda position, call: ("scale", 10.0) if call in steps else ("none", 1.0)


@case("A", *WAYS)
def one_loss_in_20_is_told_tenfold(way: str) -> Outcome:
    return _without_validation(way, [_every(20, offset, "scale", 10.0) for offset in (7, 13, 19)])


@case("A", *WAYS)
def two_losses_of_the_range_test_are_told_tenfold(way: str) -> Outcome:
    return _without_validation(way, [_tenfold(pair) for pair in ((9, 10), (9, 11), (13, 14))])


@case("A", "autotune")
def one_gradient_in_83_is_an_accident(way: str) -> Outcome:
    return _without_validation(way, [_every(83, offset, "grad", 1e8) for offset in (41, 60, 80)])


@case("A", *WAYS, short=("fit",))
def _1000_NaN_in_a_row(way: str) -> Outcome:  # noqa: N802
    total = 1500
    ended = run(way, _from, total=total)
    good = 1.15 * plain_of(way, total=500)
    few = ended.rollbacks is None or ended.rollbacks <= 20
    is_said = way == "autotune" or any("finite" in text.lower() or "nan" in text.lower() for text in ended.said)
    is_ok = ended.is_finite and ended.loss <= good and few and is_said
    return f"<= {good:.3f}, at most 20 rollbacks, said", f"{ended}, {'said' if is_said else 'silent'}", is_ok


@case("A", "fit")
def a_loss_scale_that_begins_too_large(way: str) -> Outcome:
    """Dynamic loss scaling in half precision: a step that overflows halves the scale, changes nothing else, and tells
    an infinite loss."""
    tx, total, worst = tasks.OPTIMIZERS["adam"], 800, 0.0

    def step(state: Any, batch: Any, hp: Any) -> Any:
        scale, half = state["scale"], jnp.float16

        def scaled(p: Any) -> Any:
            loss = tasks.loss_of(jax.tree.map(lambda a: a.astype(half), p), batch[0].astype(half), batch[1])
            return loss * scale.astype(half)

        loss, grads = jax.value_and_grad(scaled)(state["p"])
        updates, opt = tx.update(
            jax.tree.map(lambda g: g / scale, grads), atn.set_hyperparams(state["opt"], hp), state["p"]
        )
        new = {"p": optax.apply_updates(state["p"], updates), "opt": opt, "scale": scale}
        is_fit = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        new = jax.tree.map(lambda a, b: jnp.where(is_fit, a, b), new, state)
        return {**new, "scale": jnp.where(is_fit, scale, scale / 2)}, loss.astype(jnp.float32) / scale

    for power in (14, 15, 24):
        p = tasks.new_params()
        state = {"p": p, "opt": tx.init(p), "scale": jnp.float32(2.0**power)}
        result = atn.fit(
            step,
            state,
            lambda k, hp: tasks.rows(int(k)),
            tuner=tasks.tuner(total),
            eval_step=tasks.eval_step,
            progress=False,
        )
        worst = max(worst, float(tasks.test_loss(result.state["p"])))
    limit = 1.1 * tasks.plain(total=total)
    return f"<= {limit:.3f}, three scales", f"{worst:.3f}", worst <= limit


@case("A", "fit", "Trainer")
def a_rate_that_is_to_blame_still_falls(way: str) -> Outcome:
    """Non-finite losses that do depend on the rate must move it; the guard against too much forgiveness."""
    ended = run(way, optimizer="momentum", options={"initial": {"learning_rate": 1.0}})
    return tasks.verdict(ended, plain_of(way, optimizer="momentum", rate=0.03), 1.08)


# The user's own warm-up.


def _decades(rates: list[float]) -> float:
    return math.log10(max(rates) / min(rates))


WARM_UPS = (0, 12, 60, 120)
WARM_TOTAL = 600


def _spread(rates: list[float], losses: list[float], reference: list[float]) -> Outcome:
    worst = max(loss / best for loss, best in zip(losses, reference, strict=True))
    picks = ", ".join(f"{rate:.1e}" for rate in rates)
    got = f"picks {picks}: {_decades(rates):.2f} decades, worst {worst:.3f}"
    return "picks within 0.25 decades, <= 1.06 x plain", got, _decades(rates) <= 0.25 and worst <= 1.06


@case("A", "fit", "autotune")
def warm_up_of_0_2_10_20_percent(way: str) -> Outcome:
    rates, losses, best = [], [], []
    for warm in WARM_UPS:
        ended = run(way, total=WARM_TOTAL, options={"warmup_steps": warm})
        rates.append(ended.rate)
        losses.append(ended.loss)
        best.append(tasks.plain(total=WARM_TOTAL, warm=warm))
    return _spread(rates, losses, best)


@case("A", "fit")
def warm_up_inside_a_schedule(way: str) -> Outcome:
    rates, losses, best = [], [], []
    for warm in WARM_UPS:
        shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm, WARM_TOTAL)
        ended = run(way, total=WARM_TOTAL, options={"schedule": shape})
        rates.append(ended.result.hyperparams["learning_rate"])
        losses.append(ended.loss)
        best.append(tasks.plain(total=WARM_TOTAL, warm=warm))
    return _spread(rates, losses, best)


@case("A", "loop", short=("loop",))
def warm_up_of_a_scheduler(way: str) -> Outcome:
    rates, losses, best = [], [], []
    for warm in WARM_UPS:

        def factor(k: int, warm: int = warm) -> float:
            return (k + 1) / warm if k < warm else max(0.0, (WARM_TOTAL - k) / (WARM_TOTAL - warm))

        ended = run(way, total=WARM_TOTAL, scheduler=lambda o, f=factor: torch.optim.lr_scheduler.LambdaLR(o, f))
        rates.append(ended.tuner.best_hyperparams["learning_rate"])
        losses.append(ended.loss)
        best.append(plain(total=WARM_TOTAL, factor=factor))
    return _spread(rates, losses, best)


@case("A", "Trainer")
def warm_up_of_a_chain_of_schedulers(way: str) -> Outcome:
    lr = torch.optim.lr_scheduler
    rates, losses, best = [], [], []
    for warm in (2, 90):

        def make(o: Any, warm: int = warm) -> Any:
            rise, fall = lr.LinearLR(o, 0.01, 1.0, warm), lr.CosineAnnealingLR(o, WARM_TOTAL - warm)
            return lr.SequentialLR(o, [rise, fall], [warm])

        ended = run(way, total=WARM_TOTAL, scheduler=make)
        rates.append(ended.tuner.best_hyperparams["learning_rate"])
        losses.append(ended.loss)
        best.append(plain(total=WARM_TOTAL))
    return _spread(rates, losses, best)


# Any scale of the loss.


def _always(name: str, size: float) -> tasks.Faults:
    return lambda position, call: (name, size)


@case("A", "fit", "autotune", "loop")
def losses_times_a_constant(way: str) -> Outcome:
    reference = run(way, total=400, validates=False)
    worst, back = 0.0, 0
    for size in (1e-30, 1e-18, 1e-6, 1e9, 1e16, 1e22):
        ended = run(way, _always("scale", size), total=400, validates=False)
        worst = max(worst, abs(math.log10(ended.rate / reference.rate)), abs(math.log10(ended.loss / reference.loss)))
        back += ended.rollbacks or 0
    return "same rate and loss, 0 rollbacks", f"{worst:.3f} decades apart, {back} rollbacks", worst < 0.03 and back == 0


@case("A", "fit")
def metrics_times_a_constant(way: str) -> Outcome:
    reference = run(way, total=400)
    worst = 0.0
    for size in (1e-25, 1e-3, 1e5, 1e20):
        ended = run(way, total=400, eval_step=_scaled_eval(size))
        worst = max(worst, abs(math.log10(ended.rate / reference.rate)))
    return "same rate", f"{worst:.3f} decades apart", worst < 0.03


@functools.cache
def _scaled_eval(size: float) -> Any:
    return lambda state: tasks.eval_step(state) * size


@case("A", "BayesianOptimizer", short=("BayesianOptimizer",))
def objectives_of_any_scale(way: str) -> Outcome:
    opt = atn.BayesianOptimizer({"x": (0.0, 1.0)}, capacity=32)
    suggest, observe = jax.jit(opt.suggest), jax.jit(opt.observe)
    far = {}
    for size in (1e-30, 1e-18, 1e-9, 1.0, 1e9, 1e20, 1e30):
        state = opt.init(jax.random.key(4))
        for _ in range(14):
            point, state = suggest(state)
            state = observe(state, point, np.float32(size * ((float(point["x"]) - 0.63) ** 2 + 2.0)))
        far[size] = abs(float(opt.best(state)["x"]) - 0.63)
    worst = max(far, key=lambda size: far[size])
    return "within 0.05 of the optimum", f"{far[worst]:.3f} away at {worst:g}", far[worst] < 0.05


# Data of changing difficulty.


def _blocks(k: int) -> dict[str, Any]:
    return {"noisy": 0.75 * (k // 100 % 2)}


def _long_blocks(k: int) -> dict[str, Any]:
    return {"noisy": 0.6 * (k // 260 % 2)}


def _late_block(k: int) -> dict[str, Any]:
    return {"noisy": 0.8 * (480 <= k < 640)}


def _of_blocks(way: str, batch: Any, factor: float) -> Outcome:
    ended = run(way, batch=batch)
    expected, got, is_ok = tasks.verdict(ended, plain_of(way, batch=batch), factor)
    # One rollback tells whether the state or the data is to blame.
    return f"{expected}, one rollback at most", got, is_ok and ended.rollbacks <= 1


@case("A", "fit", "autotune", "loop", short=("fit",))
def easy_and_hard_data_in_blocks_of_100(way: str) -> Outcome:
    return _of_blocks(way, _blocks, 1.08)


@case("A", "fit", "autotune", "loop")
def easy_and_hard_data_in_blocks_of_260(way: str) -> Outcome:
    return _of_blocks(way, _long_blocks, 1.08)


@case("A", "fit", "Trainer")
def one_hard_block_of_160_in_the_middle(way: str) -> Outcome:
    return _of_blocks(way, _late_block, 1.08)


def _curriculum(k: int) -> dict[str, Any]:
    return {"classes": 2} if k < 480 else {}


@case("A", "fit", "autotune", "loop", "Trainer")
def classes_that_come_later_are_validated_from_the_beginning(way: str) -> Outcome:
    """As long as they are missing, whatever trains least has the best metric; afterwards rates come back up."""
    task: dict[str, Any] = {"batch": _curriculum, "total": 1200}
    ratios = [run(way, seed=seed, **task).loss / plain_of(way, seed=seed, **task) for seed in range(3)]
    return tasks.of_seeds(ratios, what="plain")


@case("A", "Trainer")
def a_loss_summed_over_batches_of_two_sizes(way: str) -> Outcome:
    """Every fourth batch is a remainder of a sixth: its sum is small, which is no sign of anything."""

    def size(k: int) -> dict[str, Any]:
        return {"size": 8 if k % 4 == 3 else 48}

    def summed(position: int, call: int) -> tuple[str, float]:
        return "scale", 8.0 if position % 4 == 3 else 48.0

    ended = run(way, summed, batch=size)
    return tasks.verdict(ended, plain(batch=size), 1.06)


# Directions and single values.


@case("A", "fit", "loop", "Trainer", short=("Trainer",))
def mode_max_without_a_metric(way: str) -> Outcome:
    """Nothing is there to be maximised: refused, or the training loss is minimised as ever and somebody says so."""
    if way == "Trainer":
        x = torch.randn(256, 3)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :1] - x[:, 1:2]), batch_size=16)
        model = torch.nn.Linear(3, 1)
        trainer = att.Trainer(torch.nn.functional.mse_loss, epochs=20, progress=False)
        try:
            trainer.fit(model, loader, loader, tuner=att.AutoTuneNet({"learning_rate": (1e-4, 1e-1)}, mode="max"))
        except ValueError as error:
            return "refused, or trained", f"refused: {str(error)[:60]}", True
        end = trainer.validate()["loss"]
        return "refused, or loss <= 0.05", f"loss {end:.3f}", end <= 0.05
    ended = run(way, validates=False, options={"mode": "max"}, total=400)
    return tasks.verdict(ended, plain_of(way, total=400), 1.1)


def _lowered(size: float) -> tasks.Faults:
    def faults(position: int, call: int) -> tuple[str, float]:
        return {380: ("tell", size), 560: ("dead", 1.0)}.get(call, ("none", 1.0))

    return faults


@case("A", "fit", "autotune", "loop")
def one_very_negative_loss_before_a_collapse(way: str) -> Outcome:
    worst = max((run(way, _lowered(size)) for size in (-30.0, -2e3, -1e7)), key=lambda ended: ended.loss)
    return tasks.verdict(worst, plain_of(way), 1.12)
