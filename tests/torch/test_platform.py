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


def test_a_space_is_checked_without_a_device_and_jax_stays_on_the_cpu():
    code = """
import os, sys, autotunenet_torch
try:
    autotunenet_torch.AutoTuneNet({"learning_rate": (1.0, 1e-3)})
except ValueError as error:
    print("reversed" in str(error))
autotunenet_torch.AutoTuneNet({"learning_rate": (1e-3, 1.0)}, total_steps=100)
print(*[name for name in ("lightning", "transformers", "orbax") if name in sys.modules])
import jax
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized(), os.environ["JAX_PLATFORMS"], jax.default_backend())
"""
    assert python(code) == ["True", "False", "cpu", "cpu"]


def test_another_choice_of_platform_is_left_alone():
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

    def is_light():
        run = python(code)
        assert len(run) == 2, "something heavy was imported"
        return float(run[0]) < 0.5 and float(run[1]) < 100

    assert is_light() or is_light()  # a busy machine only ever adds


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.parametrize("used, is_warned", [("", False), ("import jax; jax.numpy.ones(2).sum()", True)])
def test_loader_workers_warn_of_jax_only_where_the_user_works_with_it(used, is_warned):
    code = f"""
import os, warnings
import torch
import autotunenet_jax as atn
{used}
import autotunenet_torch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
autotunenet_torch.AutoTuneNet({{"learning_rate": (1e-3, 1.0)}}).attach(model, optimizer, total_steps=100)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    list(torch.utils.data.DataLoader(list(range(4)), num_workers=1))
print(any("multithreaded" in str(warning.message) for warning in caught))
"""
    assert python(code)[-1] == str(is_warned)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_process_that_is_forked_after_jax_began_is_refused_at_once():
    """It would wait for ever; one that is forked before trains."""
    code = """
import multiprocessing, warnings
import torch, autotunenet_torch
def child(queue):
    try:
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        autotunenet_torch.AutoTuneNet({"learning_rate": (1e-3, 1.0)}).attach(model, optimizer, total_steps=100)
        queue.put("attached")
    except RuntimeError as error:
        queue.put("spawn" if "get_context('spawn')" in str(error) else str(error))
def forked():
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    process.join(60)
    return queue.get() if process.exitcode == 0 else "hangs"
warnings.simplefilter("ignore", DeprecationWarning)
autotunenet_torch.AutoTuneNet({"learning_rate": (1e-3, 1.0)})
print(forked())
child(multiprocessing.get_context("fork").SimpleQueue())
print(forked())
"""
    assert python(code) == ["attached", "spawn"]
