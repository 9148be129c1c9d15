"""The programs on the pages run, one after the other as a reader would run them."""

import pytest

from tests.docs.pages import PAGES, blocks, run

# In tests of their own, since more is asked of them or they take long.
ELSEWHERE = {"add_a_framework.md", "history.md", "optax.md", "recipes.md", "update.md"}
ELSEWHERE |= {"README.md", "ray.md", "torch.md", "lightning.md", "transformers.md"}
# Several programs to compile, all of which other tests run too.
LONG = {"callbacks.md", "engine.md", "pictures.md"}
HERE = [page for page in PAGES if blocks(page) and page.name not in ELSEWHERE]


@pytest.mark.timeout(600)  # as many programs to compile as a page has ways in, where they are not in the cache
@pytest.mark.filterwarnings("default")  # a reader is warned, and reads on
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.name, marks=[pytest.mark.soak] if page.name in LONG else []) for page in HERE],
)
def test_a_page_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names = run(page)
    if page.name == "fit.md":
        assert names["accuracy"] > 0.9
        assert {row["kind"] for row in names["result"].history.rounds} == {"fast", "slow"}
        assert (tmp_path / "runs" / "digits").is_dir()
