"""Every example runs, quickly, as a user would run it."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("torch")

LONG = pytest.mark.soak
EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "needs", "arguments", "says"),
    [
        ("torch_quickstart", "sklearn", ["--epochs", "10", "--quiet"], "accuracy 9"),
        pytest.param("torch_loop", "torch", ["--steps", "120"], "validation loss", marks=LONG),
        pytest.param("torch_accelerate", "accelerate", ["--epochs", "6"], "validation loss", marks=LONG),
        pytest.param("torch_lightning", "lightning", ["--epochs", "5"], "validation loss", marks=LONG),
        pytest.param("torch_transformers", "transformers", ["--steps", "100"], "evaluation loss", marks=LONG),
    ],
)
def test_example(name, needs, arguments, says, tmp_path):
    pytest.importorskip(needs)
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
