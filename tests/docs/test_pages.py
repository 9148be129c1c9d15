"""The programs on the pages run, one after the other as a reader would run them, and train."""

import pytest

from tests.docs.pages import PAGES, blocks, run

# With more asked of them in tests of their own.
ELSEWHERE = {"add_a_framework.md", "history.md", "README.md", "torch.md", "lightning.md", "transformers.md"}


@pytest.mark.timeout(300)  # as many programs to compile as a page has ways in, where they are not in the cache
@pytest.mark.filterwarnings("default")  # a reader is warned, and reads on
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page.name not in ELSEWHERE], ids=lambda page: page.name
)
def test_a_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names = run(page)
    assert names.get("accuracy", 1.0) > 0.9
    if "result" in names:
        assert names["result"].history.rounds and not names["result"].is_interrupted
    if "losses" in names:
        assert names["losses"][-20:].mean() < 0.3
