"""Where JAX runs, and what importing costs."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch")


def python(code, **env):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | env
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_jax_stays_on_the_cpu_unless_told_otherwise():
    code = "import autotunenet_torch, os, jax; print(os.environ['JAX_PLATFORMS'], jax.default_backend())"
    assert python(code) == ["cpu", "cpu"]
    said = python("import autotunenet_torch, os; print(os.environ['JAX_PLATFORMS'])", JAX_PLATFORMS="cuda,cpu")
    assert said == ["cuda,cpu"]
    # Whoever imported JAX before has chosen.
    assert python("import jax, autotunenet_torch, os; print(os.environ.get('JAX_PLATFORMS'))") == ["None"]


def test_import_is_light():
    code = """
import sys, time
import torch, jax
start = time.process_time()
import autotunenet_torch
print(time.process_time() - start)
print(*[name for name in ("lightning", "transformers", "gpjax", "orbax") if name in sys.modules])
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    runs = [python(code) for _ in range(2)]
    assert all(run[1:] == ["False"] for run in runs)
    assert min(float(run[0]) for run in runs) < 0.3
