"""The whole controller: step by step against a plain twin, under JAX's transformations, and what never changes it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.controller import state
from tests.controller.light import CHUNK, SPACES, Told, compiled, run, told, tuner, twin_of

pytestmark = pytest.mark.usefixtures("light_surrogate")

KINDS = ("healthy", "noisy", "not finite", "bursts", "spikes", "divergence", "huge", "constant", "everything")


def losses_like_training(kind, seed, count):
    """Losses of a run, and metrics that turn upwards in the middle of some."""
    rng = np.random.default_rng(seed)
    at = np.arange(count)
    losses = 2.0 * np.exp(-at / (0.3 * count)) + (0.3 if kind == "noisy" else 0.03) * rng.normal(size=count)
    turn = rng.integers(count // 3, 2 * count)
    metrics = losses + 0.05 * rng.normal(size=count) + 0.01 * np.maximum(at - turn, 0)
    if kind == "constant":
        losses = np.full(count, rng.choice([0.0, 2.5, -3.0, 1e-20]))
    for position in rng.integers(0, count, size=6):
        fault = rng.choice(["not finite", "bursts", "spikes", "divergence", "huge"]) if kind == "everything" else kind
        if fault == "not finite":
            losses[position] = rng.choice([np.nan, np.inf, -np.inf])
            metrics[rng.integers(count)] = np.nan
        elif fault == "bursts":
            losses[position : position + rng.integers(1, 8)] = np.nan
        elif fault == "spikes":
            losses[position : position + rng.integers(1, 12)] += 5.0
        elif fault == "divergence":
            losses[position:] += 0.3 * np.arange(count - position)
        elif fault == "huge":
            losses[position] = 1e30
    return losses.astype(np.float32), metrics.astype(np.float32)


def settings():
    """Forty runs that between them meet every kind of loss, space, length and way of reporting."""
    for seed in range(40):
        yield (
            KINDS[seed % len(KINDS)],
            list(SPACES)[seed % 3],
            (400, None, 100, 800)[seed // 3 % 4],
            (None, "asked", "asked", "every step")[seed // 2 % 4],
            seed,
        )


def random_run(kind, space, total_steps, reported, seed):
    tuned = tuner(space, total_steps)
    losses, metrics = losses_like_training(kind, seed, total_steps or 1200)
    metrics = None if reported is None else metrics
    bowl = 0.0 if kind == "constant" or seed % 4 == 0 else 0.1
    return tuned, run(tuned, told(losses, metrics, reports=reported == "every step", bowl=bowl), key=seed)


def rows_of_twin(tuned, rows, seed):
    """What the twin makes of the losses and metrics that a run heard."""
    twin, out = twin_of(tuned, key=seed), []
    for loss, metric, reports in zip(rows["loss"], rows["metric"], rows["reports"], strict=True):
        if reports:
            twin.observe_eval(metric)
        said = twin.update(loss)
        finished = [fork.x for fork in twin.forks if fork.status == state.FORK_FINISHED]
        counted = [twin.step, twin.phase, twin.left, twin.discarded, twin.rollbacks, twin.retries, twin.retreats]
        copies = [twin.saved.data, twin.saved.step, twin.kept.data, twin.kept.step]
        status = [twin.row, -1 if twin.winner is None else twin.winner, len(finished), twin.readings.worse]
        out.append(([int(v) for v in vars(said).values()], counted + copies + status, twin.incumbent, twin.hyperparams()))
    return out


def counted(rows):
    """The whole numbers of a run in the order of the twin's."""
    held = rows["round"]
    finished = np.sum(held.status == state.FORK_FINISHED, axis=1)
    columns = [rows[name] for name in ("step", "phase", "segment_left", "discarded", "rollbacks")]
    columns += [rows["health"].retries, rows["validation"].retreats, *rows["slots"]]
    return np.stack([*columns, held.index, held.kept, finished, rows["validation"].worse], axis=1)


@pytest.mark.parametrize(("kind", "space", "total_steps", "reported", "seed"), list(settings()))
def test_every_step_is_that_of_the_plain_twin(kind, space, total_steps, reported, seed):
    tuned, (rows, _) = random_run(kind, space, total_steps, reported, seed)
    with np.errstate(all="ignore"):
        said, numbers, incumbents, values = zip(*rows_of_twin(tuned, rows, seed), strict=True)
    directives = np.stack(rows["directive"], axis=1)
    for actual, expected in ((directives, said), (counted(rows), numbers)):
        differs = np.any(actual != np.array(expected), axis=1)
        first = int(np.argmax(differs))
        assert not differs.any(), f"step {first}: {actual[first]} is not {expected[first]}"
    np.testing.assert_allclose(rows["incumbent"], incumbents, atol=1e-5)
    for name in tuned.space.names:
        np.testing.assert_allclose(rows["hp"][name], [hp[name] for hp in values], rtol=1e-5, atol=3e-7, err_msg=name)
