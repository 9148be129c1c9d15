"""The rings in a tuned optimizer's state, by themselves, and a name that is a function and a package."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.wrapper import ring

DIMS = 2


@pytest.fixture(scope="module")
def state():
    space = {"learning_rate": (1e-4, 1.0), "momentum": (0.0, 0.99)}
    return atn.AutoTuneNet(space, total_steps=1000).init(jax.random.key(0))


@jax.jit
def put(record, words, flag):
    return ring.add_entry(record, words, DIMS, flag=flag)


def entry(state, step, **fields):
    ts = state._replace(step=jnp.int32(step), incumbent=jnp.array([0.25, 0.5], jnp.float32))
    return ring.words_of(ring.entry(ts, phase=0, **{"cause": ring.DECIDED, **fields}))


def test_entries_come_back_as_they_went_in(state):
    record = put(ring.empty(DIMS), entry(state, 7, loss=0.1, outcome=3, verdict=1), True)
    found = ring.read(np.asarray(record), DIMS)
    assert found.dropped == 0 and found.entries.step.tolist() == [7]
    assert found.entries.outcome.tolist() == [3] and found.entries.loss.tolist() == [np.float32(0.1)]
    assert found.entries.stretch.incumbent.tolist() == [[0.25, 0.5]]
    assert found.entries.stretch.total.tolist() == [1000]
    again = ring.with_stretch(state, jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), found.entries.stretch), 7)
    assert int(again.step) == 7 and again.incumbent.tolist() == [0.25, 0.5]


def test_a_ring_keeps_the_last_ones_and_counts_the_others(state):
    record = ring.empty(DIMS)
    for step in range(ring.CAPACITY + 5):
        record = put(record, entry(state, step), True)
        record = put(record, entry(state, 10**6), False)
    found = ring.read(np.asarray(record), DIMS)
    assert found.entries.step.tolist() == list(range(5, ring.CAPACITY + 5))
    assert found.dropped == 5 and record.shape == ring.empty(DIMS).shape


def test_going_back_to_one_snapshot_again_and_again_is_one_entry(state):
    record = put(ring.empty(DIMS), entry(state, 1), True)
    back = {"cause": ring.HEARD, "outcome": 8}
    for step, rewound in ((20, 10), (30, 10), (40, 10), (50, 12)):
        record = put(record, entry(state, step, rewound=rewound, **back), True)
    found = ring.read(np.asarray(record), DIMS).entries
    assert found.step.tolist() == [1, 40, 50] and found.times.tolist() == [1, 3, 1]


def test_spans_join_where_they_touch():
    add = jax.jit(lambda record, step, bits: ring.add_span(record, DIMS, step=step, bits=bits))
    record = ring.empty(DIMS)
    for step, bits in ((3, 1), (4, 1), (5, 0), (6, 1), (7, 3), (8, 3)):
        record = add(record, jnp.int32(step), jnp.int32(bits))
    assert ring.read(np.asarray(record), DIMS).spans == [(4, 2, 1), (6, 1, 1), (8, 2, 3)]


def test_metrics_keep_a_distance(state):
    words = entry(state, 0)
    no, record = jnp.zeros((), bool), ring.empty(DIMS)
    for step, always in ((10, False), (12, False), (13, True), (13, True), (25, True), (26, False)):
        made = ring.MetricEntry(
            step=jnp.int32(step), metric=jnp.float32(step), is_settled=no | True, always=no | always,
            spacing=jnp.int32(10), is_told=no | (step != 25), words=words, is_event=no,
        )  # fmt: skip
        record = ring.add_metric(record, DIMS, made)
    found = ring.read(np.asarray(record), DIMS)
    assert found.metrics == [(10, 10.0, True), (13, 13.0, True), (26, 26.0, True)]
    assert len(found.entries.step) == 0


IMPORTS = [
    "import autotunenet_jax as atn; from autotunenet_jax.history.history import History",
    "import importlib; History = importlib.import_module('autotunenet_jax.history.history').History; "
    "import autotunenet_jax.history.explain; import autotunenet_jax as atn",
]


def test_the_function_and_the_package_go_by_one_name():
    checks = "; import types; assert isinstance(atn.history, types.FunctionType); assert atn.History is History"
    after = "; from autotunenet_jax.history import optuna_study; from autotunenet_jax import history; "
    after += "assert history is atn.history and optuna_study.to_study"
    # A process for each order, all at once.
    running = [subprocess.Popen([sys.executable, "-c", order + checks + after]) for order in IMPORTS]
    assert [process.wait() for process in running] == [0] * len(IMPORTS)
