"""Ours with one part taken away, to see what each is worth: the methods named ``ours-...``.

What is an argument of `AutoTuneNet` is passed to it. What is not is replaced inside the library for the length of one
run, with the compiled functions forgotten before and after.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.quality import searches
from benchmarks.quality.task import Workload


@contextlib.contextmanager
def _patched(patch: Callable[[], Any]) -> Iterator[None]:
    jax.clear_caches()
    with patch():
        yield
    jax.clear_caches()


def _free_forks() -> Any:
    """Forks are held as long as they fit, whatever they are expected to gain."""
    from autotunenet_jax.controller import decision

    return mock.patch.multiple(decision, PRICE=0.0, SLOW_PRICE=0.0)


def _hot_scores() -> Any:
    """Forks are scored at their full rate."""
    from autotunenet_jax.controller import schedule

    return mock.patch.object(schedule, "COOL_SHARE", 0.0)


def _one_intercept() -> Any:
    """Rounds share one level of the loss."""
    from autotunenet_jax.controller import fork_surrogate

    original = fork_surrogate.config_of
    return mock.patch.object(
        fork_surrogate, "config_of", lambda space: dataclasses.replace(original(space), has_groups=False)
    )


def _fresh_surrogate() -> Any:
    """Each round forgets what the ones before it observed."""
    from autotunenet_jax.bayesopt import trials

    original = trials.add

    def add(obs, x, y, *, group=0, **options):
        newest = obs.group[jnp.clip(obs.count - 1, 0, obs.y.shape[0] - 1)]
        is_new = newest != jnp.asarray(group)
        return original(obs._replace(count=jnp.where(is_new, 0, obs.count)), x, y, group=group, **options)

    return mock.patch.object(trials, "add", add)


def _fresh_data(task: Workload) -> Workload:
    """Batches come in the order they are asked for, whatever step they are asked for."""

    class Fresh(type(task)):
        def stream(self, seed):
            clean, count = task.stream(seed), iter(range(2**31))
            return lambda step, hp=None: clean(next(count), hp)

    return Fresh(**{field.name: getattr(task, field.name) for field in dataclasses.fields(task)})


def _ablated(
    options: Callable[[], dict[str, Any]] = dict,
    patch: Callable[[], Any] | None = None,
    change: Callable[[Workload], Workload] = lambda task: task,
) -> Callable[..., searches.Found]:
    def search(task: Workload, seed: int, hp: dict[str, float], *, all_tuned: bool) -> searches.Found:
        with contextlib.nullcontext() if patch is None else _patched(patch):
            return searches.ours(change(task), seed, hp, all_tuned=all_tuned, **options())

    return search


ABLATIONS: dict[str, Callable[..., searches.Found]] = {
    "hot_scores": _ablated(patch=_hot_scores),
    "one_intercept": _ablated(patch=_one_intercept),
    "fresh_data": _ablated(change=_fresh_data),
    "no_gate": _ablated(patch=_free_forks),
    "no_decay": _ablated(lambda: {"decay": "none"}),
    "fresh_surrogate": _ablated(patch=_fresh_surrogate),
}
"""By what is missing: the cool-down before scoring, rounds' own levels, the same batches for all forks, the price of a
fork, the decay, what earlier rounds observed."""
