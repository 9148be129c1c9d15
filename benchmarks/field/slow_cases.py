"""A, the part of the slow hyperparameters: judged by held-out metrics, and batch sizes at equal samples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import autotunenet_jax as atn
import autotunenet_torch as att

from . import tasks
from .registry import Outcome, case
from .torch_tasks import new_model as torch_new_model


@case("A", "autotune", "loop")
def a_regulariser_with_metrics_at_regular_validations_only(way: str) -> Outcome:
    """The training loss asks for none of it, held-out data for 0.4; the run starts at 0.3."""
    value = _regularised_loop() if way == "loop" else _regularised_autotune()
    return "between 0.25 and 0.5", f"{value:.3f}", 0.25 <= value <= 0.5


REGULARISED = {"learning_rate": (1e-4, 1.0), "reg": (0.0, 0.6)}


def _regularised_autotune() -> float:
    opt = atn.autotune(optax.sgd, REGULARISED, 1000, initial={"learning_rate": 1e-2, "reg": 0.3})

    @jax.jit
    def step(p: Any, state: Any, noise: Any) -> Any:
        reg = atn.hyperparams(state)["reg"]
        loss, grad = jax.value_and_grad(lambda p: jnp.sum((p - 1.0 + noise) ** 2) + 2.0 * reg)(p)
        updates, state = opt.update(grad, state, p, value=loss)
        return optax.apply_updates(p, updates), state

    p = jnp.zeros(4)
    state = opt.init(p)
    rng = np.random.default_rng(3)
    for k in range(1000):
        p, state = step(p, state, rng.normal(size=4).astype(np.float32) * 0.1)
        if k % 40 == 39:
            reg = atn.hyperparams(state)["reg"]
            state = atn.observe_eval(state, jnp.sum((p - 1.0) ** 2) + 4.0 * (reg - 0.4) ** 2)
    return float(atn.hyperparams(state)["reg"])


def _regularised_loop() -> float:
    model = torch.nn.Linear(4, 1)
    now = {"reg": 0.3}
    tuner = att.AutoTuneNet(
        REGULARISED, initial={"reg": 0.3}, targets={"reg": lambda model, value: now.update(reg=value)}
    )
    opt = torch.optim.SGD(model.parameters(), 1e-2)
    tuner.attach(model, opt, total_steps=1000)
    torch.manual_seed(0)
    for k in range(1000):
        x = torch.randn(16, 4)
        fit = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss = fit + 2.0 * now["reg"]
        opt.zero_grad()
        loss.backward()
        opt.step()
        tuner.step(loss)
        if k % 40 == 39:
            tuner.validate(float(fit.detach()) + 4.0 * (now["reg"] - 0.4) ** 2)
    return float(tuner.best_hyperparams["reg"])


@case("A", "fit", "Trainer")
def batch_sizes_are_compared_at_equal_samples(way: str) -> Outcome:
    """Far from the minimum progress goes by steps: for the same samples the smallest batch gets much further."""
    sizes = [8, 32, 128]
    space = {"batch_size": atn.Choice(sizes)}
    if way == "Trainer":
        x = torch.from_numpy(tasks.data()[0][0])
        y = torch.from_numpy(tasks.data()[0][1]).long()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)
        trainer = att.Trainer(
            torch.nn.functional.cross_entropy, lambda p: torch.optim.SGD(p, 3e-3), steps=600, progress=False
        )
        tuner = att.AutoTuneNet(space)
        trainer.fit(torch_new_model(), loader, list(loader)[:20], tuner=tuner)
        chosen = tuner.best_hyperparams["batch_size"]
    else:
        tx = optax.sgd(3e-3)

        def step(state: Any, batch: Any, hp: Any) -> Any:
            loss, grads = jax.value_and_grad(tasks.loss_of)(state["p"], *batch)
            updates, opt = tx.update(grads, state["opt"], state["p"])
            return {"p": optax.apply_updates(state["p"], updates), "opt": opt}, loss

        p = tasks.new_params()
        result = atn.fit(
            step,
            {"p": p, "opt": tx.init(p)},
            lambda k, hp: tasks.rows(int(k), size=int(hp["batch_size"])),
            tuner=atn.AutoTuneNet(space, 600),
            eval_step=tasks.eval_step,
            progress=False,
        )
        chosen = result.hyperparams["batch_size"]
    return "8 of 8, 32, 128", str(chosen), chosen == 8
