"""The programs on the pages of PyTorch and in its notebook run, as a reader would run them, and train.

They tune the same search space where they can, so that what is compiled for the first one does for the others.
"""

import pytest

from tests.docs.pages import ROOT, run

NEEDS = {
    "README.md": ["torch"],
    "examples/torch.ipynb": ["torch", "matplotlib", "sklearn"],
    "docs/torch.md": ["torch", "accelerate", "sklearn"],
    "docs/lightning.md": ["lightning", "sklearn"],
    "docs/transformers.md": ["transformers", "accelerate"],
}


@pytest.mark.timeout(600)  # a program to compile for each page, where it is not in the cache
@pytest.mark.filterwarnings("default")  # what frameworks say of their own is theirs
@pytest.mark.parametrize("page", NEEDS)
def test_a_page_runs(page, tmp_path, monkeypatch, capsys):
    for library in NEEDS[page]:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / page)
    history = names["history"] if "history" in names else names["tuner"].history
    assert history.rounds
    assert not [row for row in history.rounds if row["scored_by"] != "validation"]
    if page.endswith("ipynb"):
        assert "Round 1" in capsys.readouterr().out and history.evals[-1]["value"] < 0.3
