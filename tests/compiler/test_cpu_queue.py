"""Who may hang is told so, by numbers that XLA itself uses."""

import os
import types

import jax
import jax.numpy as jnp
import pytest

from autotunenet_jax.compiler import cpu_queue
from tests import devices

THREADS = """
import json, os, jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from autotunenet_jax.compiler import cpu_queue
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
spread = jax.device_put(jnp.ones(4), NamedSharding(mesh, P()))
names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
told = {"alone": cpu_queue.hazard(jnp.ones(4)), "spread": cpu_queue.hazard({"w": spread})}
jax.jit(lambda array: told.update(traced=cpu_queue.hazard(2 * array)))(spread)
jax.pmap(lambda array: told.update(mapped=cpu_queue.hazard(array)))(jnp.ones(4))
print(json.dumps({**told, "counted": cpu_queue._threads(), "threads": names.count("tf_XLAEigen")}))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads have names on Linux")
@pytest.mark.parametrize("enough", [True, False])
def test_threads_are_counted_as_xla_does(enough):
    out = devices.run(THREADS, count=4, threads=8 if enough else 2)
    assert out["counted"] == out["threads"] == (8 if enough else 4)
    assert out["alone"] is None
    for way in ("spread", "traced", "mapped"):
        assert out[way] is None if enough else "PJRT_NPROC=8" in out[way]


def test_a_loop_waits_for_the_step_that_was_queued_some_before(monkeypatch):
    waited = []
    monkeypatch.setattr(cpu_queue.jax, "local_device_count", lambda: 4)
    monkeypatch.setattr(cpu_queue.jax, "block_until_ready", waited.append)
    pace = cpu_queue.Pace()
    for number in range(40):
        pace.queued(number)
        # A launch waits from 32 on.
        assert number - len(waited) < 20
    assert waited == list(range(len(waited)))


def test_one_device_waits_for_nothing():
    pace = cpu_queue.Pace()
    for _ in range(40):
        pace.queued(types.SimpleNamespace())
    assert cpu_queue.hazard(jax.tree.map(jnp.asarray, {"w": 1.0})) is None
