"""The notebooks: what they show is there to be read without running them."""

import pytest

from tests.docs.pages import ROOT, cells, run

BOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.timeout(600)  # a program to compile, where it is not in the cache
@pytest.mark.filterwarnings("default")  # what other libraries say of their own is theirs
def test_the_one_in_jax_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    result = run(ROOT / "examples" / "fit.ipynb")["result"]
    assert "Round 1" in capsys.readouterr().out
    assert result.history.rounds and result.history.evals[-1]["value"] < 0.3


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_what_it_shows_is_in_it(book):
    outputs = [output for cell in cells(book) for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "Round 1" in str(outputs) and book.stat().st_size < 200_000
