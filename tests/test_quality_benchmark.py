"""The quality benchmark: workloads keep their promises, so that its numbers mean something."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")

from benchmarks.quality import baselines, cells, data, methods, models, peers, plans, task, workloads


def _synthetic():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 12)).astype(np.float32)
    y = np.argmax(x[:, :4], axis=1).astype(np.int32)
    parts = [data.Split(x[lo:hi], y[lo:hi]) for lo, hi in ((0, 200), (200, 300), (300, 400))]
    return data.Data(*parts)


@pytest.fixture(scope="module")
def small():
    return task.Workload(
        name="S",
        title="synthetic",
        total_steps=60,
        batch_size=20,
        model=models.mlp(12, 8, 4),
        load=_synthetic,
        optimizer=task.adam,
        defaults={"learning_rate": 1e-2, "weight_decay": 0.0, "dropout": 0.0},
        space={"learning_rate": (1e-4, 1e-1), "weight_decay": (1e-3, 10.0), "dropout": (0.0, 0.6)},
    )


def test_scan_equals_loop(small):
    state, losses = baselines.scheduled(small, 1, schedule="linear", hp={"learning_rate": 3e-2})
    stream, by_hand, step = small.stream(1), small.init(1), jax.jit(small.train_step)
    for t in range(small.total_steps):
        share = jnp.float32((t + 1.0) / (small.total_steps + 1.0))
        by_hand, loss = step(by_hand, stream(t, {}), {"learning_rate": 3e-2 * baselines.linear(share)})
        np.testing.assert_allclose(loss, losses[t], rtol=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.params, by_hand.params)


def test_an_epoch_visits_each_row_once_and_seeds_differ(small):
    table = small.table(0)
    assert sorted(table[:10].ravel()) == list(range(200))
    assert not np.array_equal(table[:10], table[10:20])
    assert not np.array_equal(table, small.table(1))
    np.testing.assert_array_equal(table, small.table(0))


def test_absent_hyperparameters_take_defaults_and_present_ones_act(small):
    batch, state = small.stream(0)(0, {}), small.init(0)
    default, _ = small.train_step(state, batch, {})
    named, _ = small.train_step(state, batch, dict(small.defaults))
    jax.tree.map(np.testing.assert_array_equal, default.params, named.params)
    for name, value in {"learning_rate": 1e-3, "weight_decay": 5.0, "dropout": 0.5}.items():
        changed, _ = small.train_step(state, batch, {name: jnp.float32(value)})
        assert not np.allclose(changed.params[0]["w"], default.params[0]["w"], atol=1e-6), name


def test_scores_are_deterministic_and_ignore_dropout(small):
    state = small.init(0)
    again = state._replace(key=jax.random.key(99))
    assert float(small.eval_step(state)) == float(small.eval_step(again))
    assert set(small.test_step(state)) == {"loss", "accuracy"}


def test_drift_permutes_pixels_and_validation_follows(small):
    drifting = dataclasses.replace(small, drift_at=0.5)
    stream, plain = drifting.stream(0), small.stream(0)
    np.testing.assert_array_equal(stream(29, {})["x"], plain(29, {})["x"])
    after = np.asarray(stream(30, {})["x"])
    assert not np.array_equal(after, plain(30, {})["x"])
    np.testing.assert_array_equal(np.sort(after, 1), np.sort(plain(30, {})["x"], 1))
    drifting = dataclasses.replace(small, drift_at=0.1)
    state, _ = baselines.scheduled(drifting, 0, schedule="constant", hp={"learning_rate": 0.05})
    assert int(state.phase) == 1
    assert float(drifting.eval_step(state)) < float(drifting.eval_step(state._replace(phase=jnp.int32(0))))


def test_drift_hurts_fixed_settings(small):
    drifting = dataclasses.replace(small, drift_at=0.5)
    for schedule in ("constant", "linear"):
        shifted, _ = baselines.scheduled(drifting, 0, schedule=schedule, hp={})
        steady, _ = baselines.scheduled(small, 0, schedule=schedule, hp={})
        assert float(drifting.eval_step(shifted)) > 1.05 * float(small.eval_step(steady))


def test_a_nan_batch_ends_a_run_unless_skipped(small):
    faulty = dataclasses.replace(small, nan_at=0.4)
    lost, _ = baselines.scheduled(faulty, 0, schedule="linear", hp={})
    saved, losses = baselines.scheduled(faulty, 0, schedule="linear", hp={}, skip=True)
    assert np.isnan(float(faulty.eval_step(lost)))
    assert np.isfinite(float(faulty.eval_step(saved)))
    assert np.flatnonzero(np.isnan(losses)).tolist() == [24]


@pytest.mark.parametrize("name", ["prodigy_cosine", "schedule_free", "dog", "hypergradient"])
def test_peers_learn(small, name):
    state, losses = peers.run(small, 0, name=name, learning_rate=1e-2)
    assert np.isfinite(losses).all()
    assert float(small.eval_step(state)) < float(small.eval_step(small.init(0)))


def test_starts_name_values_and_reject_nonsense():
    fashion = workloads.get("W1")
    rates = [cells.start_values(fashion, start)["learning_rate"] for start in cells.ORACLE_RATES]
    np.testing.assert_allclose(np.diff(np.log10(rates)), 0.5, rtol=1e-6)
    assert cells.start_values(workloads.get("W3"), "lr30wd3do0.25") == pytest.approx(
        {"learning_rate": 0.03, "weight_decay": 3.0, "dropout": 0.25}
    )
    with pytest.raises(ValueError, match="a start is made of"):
        cells.start_values(fashion, "lr10x")


def test_every_planned_cell_names_a_method_and_a_workload():
    plan = plans.full()
    assert {cell.method for cell in plan} <= set(methods.METHODS)
    names = {*workloads.NAMES, *workloads.VARIED, *workloads.SMALL, *workloads.HELD_OUT}
    assert {cell.workload for cell in plan} == names
    assert set(plans.quick()) <= set(plan)
    assert len({cell.path for cell in plan}) == len(set(plan))
