"""The programs on the pages run, one after the other as a reader would run them, and train."""

import pytest

from tests.docs.pages import PAGES, blocks, run

# With more asked of them in a test of their own.
ELSEWHERE = {"add_a_framework.md", "history.md"}
FRAMEWORKS = {"README.md": ["torch"], "torch.md": ["torch", "accelerate"], "lightning.md": ["lightning"]}
FRAMEWORKS["transformers.md"] = ["transformers", "accelerate"]
SHOWN = [page for page in PAGES if blocks(page) and page.name not in ELSEWHERE]


def trained(names):
    """What a run on a page has to have reached."""
    if "accuracy" in names:
        assert names["accuracy"] > 0.9
    if "losses" in names:
        assert names["losses"][-20:].mean() < 0.3
    tuner = names.get("tuner")
    if hasattr(tuner, "best_hyperparams"):
        assert tuner.history.rounds
    if "result" in names:
        assert names["result"].history.rounds


@pytest.mark.timeout(300)  # as many programs to compile as a page has ways in, where they are not in the cache
@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
@pytest.mark.filterwarnings("default")  # what other libraries say of their own is theirs
def test_a_page_runs(page, tmp_path, monkeypatch):
    for name in ["flax", "sklearn", *FRAMEWORKS.get(page.name, [])]:
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    trained(run(page))
