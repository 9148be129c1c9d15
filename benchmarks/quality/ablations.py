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


def _policy(**changes: Any) -> dict[str, Any]:
    from autotunenet_jax._policy import Policy

    return {"policy": Policy(**changes)}


def _no_raise() -> dict[str, Any]:
    from autotunenet_jax._plan import Recipe

    return {"recipe": Recipe(raised=0.0)}


def _random_proposals() -> Any:
    """Forks anywhere in the box that the acquisition would search."""
    from autotunenet_jax import _acquisition

    def propose(config, posterior, key, *, lower, upper, snap, **_):
        return snap(jax.random.uniform(key, lower.shape, minval=lower, maxval=upper))

    return mock.patch.object(_acquisition, "propose", propose)


def _hot_scores() -> Any:
    """Forks are scored at their full rate."""
    from autotunenet_jax import _tick

    return mock.patch.object(_tick, "COOL_SHARE", 0.0)


def _one_intercept() -> Any:
    """Rounds share one level of the loss."""
    from autotunenet_jax import _controller

    original = _controller._surrogate_config
    return mock.patch.object(
        _controller, "_surrogate_config", lambda space: dataclasses.replace(original(space), has_groups=False)
    )


def _fresh_surrogate() -> Any:
    """Each round forgets what the ones before it observed."""
    from autotunenet_jax import _observations

    original = _observations.add

    def add(obs, x, y, *, group=0, **options):
        newest = obs.group[jnp.clip(obs.count - 1, 0, obs.y.shape[0] - 1)]
        # Groups are numbered two to a round.
        is_new = newest // 2 != jnp.asarray(group) // 2
        return original(obs._replace(count=jnp.where(is_new, 0, obs.count)), x, y, group=group, **options)

    return mock.patch.object(_observations, "add", add)


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
    "random": _ablated(patch=_random_proposals),
    "hot_scores": _ablated(patch=_hot_scores),
    "one_intercept": _ablated(patch=_one_intercept),
    "fresh_data": _ablated(change=_fresh_data),
    "no_gate": _ablated(lambda: _policy(price=0.0, slow_price=0.0)),
    "no_blur": _ablated(lambda: _policy(blur_decades=1e-3)),
    "keeps_winner": _ablated(lambda: _policy(starts_afresh=False)),
    "no_tilt": _ablated(lambda: _policy(tilt=0.0)),
    "no_decay": _ablated(lambda: {"decay": "none"}),
    "fresh_surrogate": _ablated(patch=_fresh_surrogate),
    "no_raise": _ablated(_no_raise),
    "no_wait": _ablated(lambda: _policy(held_share=0.0)),
}
"""By what is missing: the engine's proposals, the cool-down before scoring, rounds' own levels, the same batches for
all forks, the price of a fork, the blur around a fork's best rate, the fresh start after the first round, the charge on
high rates, the decay, what earlier rounds observed, the round that raises rates (with it the decay's wait, which it
decides on), that wait alone."""
