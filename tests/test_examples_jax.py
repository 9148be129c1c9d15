"""Each example of the tuned optimizer runs as a user would run it, and trains."""

import math
import pathlib
import runpy

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("flax")
FOLDER = pathlib.Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    "name",
    [
        "raw_jax",
        "own_loop",
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("flax_nnx", "flax_linen", "scan_epoch")),
    ],
)
def test_trains(name, capsys):
    result = runpy.run_path(str(FOLDER / f"{name}.py"))["main"]()
    assert "validation loss" in capsys.readouterr().out
    # Chance is log(10) = 2.3, and each starts from a rate a thousand times too small.
    assert result["valid"] < 0.3
    assert all(math.isfinite(value) for value in result["hyperparams"].values())
    if name == "own_loop":
        assert all(result["counts"][asked] > 0 for asked in ("save", "keep", "restore"))


@pytest.mark.soak
@pytest.mark.usefixtures("optimised")  # it trains for longer than it compiles
@pytest.mark.timeout(300)  # three programs to compile, where they are not in the cache
def test_quickstart_beats_a_sweep_of_nine_runs_on_test_data(capsys, monkeypatch, tmp_path):
    pytest.importorskip("mnist1d")
    picture = tmp_path / "picture.png"
    monkeypatch.setattr("sys.argv", ["quickstart.py", "--seeds", "1", "--out", str(picture)])
    shown = runpy.run_path(str(FOLDER / "quickstart.py"))["main"]()
    # By seed, at the end and stopped early, loss and accuracy.
    ours, sweep = (shown["scores"][name] for name in ("tuned inside the run", "sweep of 9 rates, cosine"))
    assert ours.shape == sweep.shape == (1, 2, 2) and np.isfinite(ours).all()
    assert (ours[..., 0] < 0.9 * sweep[..., 0]).all()
    assert shown["results"][0].history.summary["steps"] == 2000
    assert "random search" in capsys.readouterr().out
    assert picture.stat().st_size > 10_000
