"""Every method of the benchmark behind one call: a cell goes in, its scores come out."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.quality import ablations, baselines, peers, populations, predecessor, searches, workloads
from benchmarks.quality.cells import Cell, start_values
from benchmarks.quality.task import RunState, Workload

_CURVE_POINTS = 50


class Outcome(NamedTuple):
    """What a method hands back.

    ``losses`` are the training losses in the order the budget was spent; ``steps`` is the budget spent: gradient
    steps, probes included, plus evaluations at their price; ``useful`` counts the steps that led to ``state``.
    """

    state: RunState
    losses: np.ndarray
    steps: float
    useful: int
    extra: dict[str, Any]


Method = Callable[[Workload, int, dict[str, float]], Outcome]


def _scheduled(schedule: str, *, skip: bool = False) -> Method:
    def method(task, seed, hp):
        state, losses = baselines.scheduled(task, seed, schedule=schedule, hp=hp, skip=skip)
        return Outcome(state, losses, task.total_steps, task.total_steps, {})

    return method


METHODS: dict[str, Method] = {name: _scheduled(name) for name in baselines.SCHEDULES}
METHODS |= {f"{name}_skip": _scheduled(name, skip=True) for name in baselines.SCHEDULES}


def _peer(name: str) -> Method:
    def method(task, seed, hp):
        rate = hp.get("learning_rate", task.defaults["learning_rate"])
        state, losses = peers.run(task, seed, name=name, learning_rate=rate)
        return Outcome(state, losses, task.total_steps, task.total_steps, {})

    return method


def _search(search: Callable[..., Any], **options: Any) -> Method:
    def method(task, seed, hp):
        state, losses, extra = search(task, seed, hp, **options)
        return Outcome(state, losses, extra.pop("spent", task.total_steps), extra.pop("useful"), extra)

    return method


METHODS |= {name: _peer(name) for name in peers.PEERS}
METHODS |= {
    "range_test": _search(searches.range_test),
    "wide_fork": _search(searches.wide_fork),
    "autotunenet_1_0_2": _search(predecessor.predecessor),
    "ours": _search(searches.ours, all_tuned=False),
    "ours_no_eval": _search(searches.ours, all_tuned=False, has_eval=False),
    "ours_all": _search(searches.ours, all_tuned=True),
    "now": _search(searches.ours, all_tuned=False),
    "now_all": _search(searches.ours, all_tuned=True),
}
METHODS |= {f"ours-{name}": _search(search, all_tuned=False) for name, search in ablations.ABLATIONS.items()}
METHODS |= {f"ours_all-{name}": _search(search, all_tuned=True) for name, search in ablations.ABLATIONS.items()}
METHODS |= {name: _search(search, **options) for name, (search, options) in populations.POPULATIONS.items()}


def run_cell(cell: Cell) -> dict[str, Any]:
    """Run one cell and return its result, a plain dict of numbers."""
    task = workloads.get(cell.workload, total_steps=cell.steps)
    began = time.perf_counter()
    outcome = METHODS[cell.method](task, cell.seed, start_values(task, cell.start))
    jax.block_until_ready(outcome.state.params)
    wall = time.perf_counter() - began
    test = _score(task)[1](outcome.state)
    return {
        "val": float(_score(task)[0](outcome.state)),
        "test": float(test["loss"]),
        "accuracy": float(test["accuracy"]),
        "spent": float(outcome.steps),
        "useful": int(outcome.useful),
        "wall_s": wall,
        "curve": _curve(outcome.losses),
        **outcome.extra,
    }


_SCORES: dict[int, tuple[Callable[..., Any], Callable[..., Any]]] = {}


def _score(task: Workload) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if id(task) not in _SCORES:
        _SCORES[id(task)] = jax.jit(task.eval_step), jax.jit(task.test_step)
    return _SCORES[id(task)]


def _curve(losses: np.ndarray) -> list[float]:
    """Mean training loss over fifty equal stretches of the budget."""
    return [float(part.mean()) for part in np.array_split(np.asarray(losses, np.float64), _CURVE_POINTS)]
