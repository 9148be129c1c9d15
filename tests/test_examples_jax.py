"""Each example of the tuned optimizer runs as a user would run it, and trains."""

import math
import pathlib
import runpy

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("flax")
FOLDER = pathlib.Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["raw_jax", "flax_nnx", "flax_linen", "scan_epoch", "own_loop"])
def test_trains(name, capsys):
    result = runpy.run_path(str(FOLDER / f"{name}.py"))["main"]()
    assert "validation loss" in capsys.readouterr().out
    # Chance is log(10) = 2.3, and each starts from a rate a thousand times too small.
    assert result["valid"] < 0.3
    assert all(math.isfinite(value) for value in result["hyperparams"].values())
    if name == "own_loop":
        assert all(result["counts"][asked] > 0 for asked in ("save", "keep", "restore"))
