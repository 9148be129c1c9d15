"""The programs on the pages of PyTorch run, as a reader would run them, and train."""

import pytest

from tests.docs.pages import ROOT, run

LONG = pytest.mark.soak  # half a minute a page, most of it compilation
NEEDS = {
    "README.md": ["torch"],
    "docs/torch.md": ["torch", "accelerate", "sklearn"],
    "docs/lightning.md": ["lightning", "sklearn"],
    "docs/transformers.md": ["transformers", "accelerate"],
}


@pytest.mark.timeout(600)  # a program to compile for each page, where it is not in the cache
@pytest.mark.filterwarnings("default")  # what frameworks say of their own is theirs
@pytest.mark.parametrize("page", [page if page == "README.md" else pytest.param(page, marks=LONG) for page in NEEDS])
def test_a_page_runs(page, tmp_path, monkeypatch):
    for library in NEEDS[page]:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names = run(ROOT / page)
    history = names["tuner"].history if page != "docs/torch.md" else names["history"]
    assert history.rounds
    assert not [row for row in history.rounds if row["scored_by"] != "validation"]
