import json
import subprocess
import sys

import pytest

# Processor time that the package may take to import, of what JAX and optax take: machines differ, hours do too.
ALLOWANCE = 0.45
UNWANTED = {
    *("torch", "flax", "gpjax", "orbax", "lightning", "ray", "transformers"),
    *("pandas", "matplotlib", "optuna", "sklearn", "scipy.stats", "rich", "tensorflow"),
}

# Without the collector: whose import a collection of everything falls into is chance.
PROBE = """
import gc, json, sys, time
gc.disable()
start = time.process_time()
import jax, optax
others = time.process_time() - start
before = set(sys.modules)
start = time.process_time()
import autotunenet_jax
share = (time.process_time() - start) / others
from jax._src import xla_bridge
print(json.dumps({
    "new": sorted(set(sys.modules) - before),
    "all": sorted(sys.modules),
    "share": share,
    "has_backend": xla_bridge.backends_are_initialized(),
}))
"""


def probe():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def imported():
    return probe()


def test_pulls_in_nothing_heavy(imported):
    loaded = {name for name in imported["all"] if name in UNWANTED or name.split(".")[0] in UNWANTED}
    assert loaded == set()


def test_initialises_no_backend(imported):
    assert imported["has_backend"] is False


def test_costs_little_beyond_jax_and_optax(imported):
    # Up to three times: a busy machine only ever adds.
    assert imported["share"] < ALLOWANCE or any(probe()["share"] < ALLOWANCE for _ in range(2))


def test_every_public_name_is_there_and_documented():
    import autotunenet_jax

    names = [name for name in vars(autotunenet_jax) if not name.startswith("_")]
    assert {"SearchSpace", "Float", "Int", "Choice"} <= set(names)
    assert [name for name in names if not (getattr(autotunenet_jax, name).__doc__ or "").strip()] == []


def test_version_matches_the_installed_package():
    from importlib.metadata import version

    import autotunenet_jax

    assert autotunenet_jax.__version__ == version("autotunenet-jax")


def test_the_adapters_are_installed_under_their_own_name():
    import importlib.util

    assert importlib.util.find_spec("autotunenet_torch") is not None
    assert importlib.util.find_spec("autotunenet_flax") is not None
    assert importlib.util.find_spec("autotunenet_ray") is not None
