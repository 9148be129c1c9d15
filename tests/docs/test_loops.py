"""The pages on loops of one's own run, and train."""

import pytest

from tests.docs.pages import ROOT, run


@pytest.mark.timeout(600)  # each holds a scan or a step with the whole controller in it to compile
@pytest.mark.filterwarnings("default")  # a reader is warned, and reads on
@pytest.mark.parametrize("page", ["optax.md", pytest.param("update.md", marks=pytest.mark.soak)])
def test_a_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / "docs" / page)
    if page == "update.md":
        assert names["losses"][-20:].mean() < 0.3
        assert int(names["ts"].step) == 400 and int(names["data_step"]) < 400
