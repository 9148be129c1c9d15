"""The recipes work."""

import pytest

from tests.docs.pages import ROOT, run


@pytest.mark.soak
@pytest.mark.timeout(600)  # several kinds of runs to compile, where they are not in the cache
@pytest.mark.filterwarnings("default")  # a reader is warned, and reads on
def test_they_run(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / "docs" / "recipes.md")
    assert names["result"].history.rounds and not names["result"].is_interrupted
    assert names["loss_fn"](names["result"].state["ema"], names["valid"]) < 0.5
    assert (tmp_path / "runs" / "job").is_dir()
