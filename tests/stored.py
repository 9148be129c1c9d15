"""States whose content tells their step, for tests of snapshots."""

import warnings

import jax
import numpy as np

import autotunenet_jax as atn


def state_at(step):
    return {
        "params": {"w": np.random.default_rng(step).normal(size=(40, 30)).astype(np.float32), "b": np.full(3, step)},
        "key": jax.random.key(step),
    }


def assert_is_state(tree, step):
    expected = state_at(step)
    jax.tree.map(lambda a, e: np.testing.assert_array_equal(a, e), tree["params"], expected["params"])
    assert (jax.random.key_data(tree["key"]) == jax.random.key_data(expected["key"])).all()


def restore(folder, **options):
    """Opens a folder and restores; returns the step and the text of all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with atn.Snapshots(folder, **options) as store:
            step, tree = store.restore(state_at(0))
    assert all(w.category is atn.SnapshotWarning for w in caught)
    assert_is_state(tree, step)
    return step, [str(w.message) for w in caught]
