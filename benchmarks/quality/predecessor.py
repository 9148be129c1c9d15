"""The PyTorch package `autotunenet` 1.0.2 as a baseline: the real one, turning the rate of a run of ours.

It needs the extra ``peers`` and ``pip install --no-deps autotunenet==1.0.2``, whose own requirements pull torchvision,
which it does not use.
"""

import contextlib
import functools
import io
import logging
import math
import tempfile
from typing import Any

import numpy as np

from benchmarks.quality.searches import Found, probe, train
from benchmarks.quality.task import Workload

# Epochs of the example in its documentation; the rate changes after each.
EPOCHS = 20


@functools.cache
def _package() -> tuple[Any, Any, Any]:
    """Its classes. On import it makes a folder for logs where it is."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        from autotunenet.adapters.pytorch.adapter import PyTorchHyperParameterAdapter
        from autotunenet.bayesian_optimizer import BayesianOptimizer
        from autotunenet.parameters import ParameterSpace

        logger = logging.getLogger("AutoTuneNet")
        logger.handlers = [logging.NullHandler()]
        logger.propagate = False
    return ParameterSpace, BayesianOptimizer, PyTorchHyperParameterAdapter


def predecessor(task: Workload, seed: int, hp: dict[str, float]) -> Found:
    """Its adapter on a PyTorch optimizer whose rate the training steps of the workload take.

    As its documentation has it: told a metric, which it maximises, after every epoch, here a twentieth of the budget;
    everything at its defaults, without a schedule. The metric is the negative loss on the 512 probe rows, charged.
    """
    import optuna
    import torch

    space, optimizer, adapter = _package()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    dial = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=hp["learning_rate"])
    tuner = adapter(dial, optimizer(space({"lr": task.space["learning_rate"]}), seed=seed))
    useful = task.total_steps - round(EPOCHS * task.probe_price)
    state, losses = task.init(seed), []
    for part in np.array_split(np.arange(useful), EPOCHS):
        rates = np.full(len(part), dial.param_groups[0]["lr"])
        state, loss, _ = train(task, state, seed, int(part[0]), rates, hp)
        losses.append(np.asarray(loss))
        metric = -float(probe(task)(state))
        # It cannot be told what is not finite before it was told anything else.
        if math.isfinite(metric):
            with contextlib.redirect_stdout(io.StringIO()):
                tuner.on_epoch_end(metric)
    return state, np.concatenate(losses), {"rate": float(dial.param_groups[0]["lr"]), "useful": useful}
