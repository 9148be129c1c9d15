"""The notebooks run from top to bottom, and what they show is there to be read without running them."""

import contextlib
import io
import json

import pytest

from tests.docs.pages import ROOT

pytestmark = pytest.mark.soak  # half a minute a page, most of it compilation

BOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def cells(book):
    return [cell for cell in json.loads(book.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.timeout(600)  # a program to compile, where it is not in the cache
@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
@pytest.mark.filterwarnings("default")  # what other libraries say of their own is theirs
def test_a_notebook_runs(book, tmp_path, monkeypatch):
    for name in ["matplotlib", "sklearn", *(["torch"] if "torch" in book.name else [])]:
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    names, shown = {"__name__": "__notebook__"}, io.StringIO()
    with contextlib.redirect_stdout(shown):
        for number, cell in enumerate(cells(book)):
            exec(compile("".join(cell["source"]), f"{book.name}, cell {number}", "exec"), names)
    assert "Round 1" in shown.getvalue()
    history = names["history"] if "history" in names else names["result"].history
    assert history.rounds and history.evals[-1]["value"] < 0.3


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)
def test_what_it_shows_is_in_it(book):
    outputs = [output for cell in cells(book) for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "Round 1" in str(outputs) and book.stat().st_size < 200_000
