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
    """Beyond PyTorch's own: at most half a second of processor time and 100 MB, on slow machines too."""
    code = """
import sys, time
import torch
def resident():
    with open("/proc/self/status") as file:
        return int(file.read().split("VmRSS:")[1].split()[0]) / 1024
has_proc = sys.platform == "linux"
held, start = has_proc and resident(), time.process_time()
from autotunenet_torch import AutoTuneNet, Trainer, TrainingState, replay
print(time.process_time() - start, has_proc and resident() - held)
print(*[name for name in ("jax", "jaxlib", "autotunenet_jax", "lightning", "transformers") if name in sys.modules])
"""
    runs = [python(code) for _ in range(2)]
    assert all(len(run) == 2 for run in runs), "something heavy was imported"
    assert min(float(run[0]) for run in runs) < 0.5
    assert min(float(run[1]) for run in runs) < 100


def test_a_space_is_checked_when_the_tuner_is_made():
    code = """
import sys, autotunenet_torch
try:
    autotunenet_torch.AutoTuneNet({"learning_rate": (1.0, 1e-3)})
except ValueError as error:
    print("reversed" in str(error))
autotunenet_torch.AutoTuneNet({"learning_rate": (1e-3, 1.0)}, total_steps=100)
print(*[name for name in ("lightning", "transformers", "orbax") if name in sys.modules])
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert python(code) == ["True", "False"]
