"""What the documentation shows runs, and what it names exists."""

import pathlib
import re

import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.hosting import Host

ROOT = pathlib.Path(__file__).resolve().parents[1]


def code(page):
    """The Python blocks of a page, one after the other."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.S | re.M)


def test_a_framework_is_added_in_a_hundred_lines():
    source, names = "\n".join(code("add_a_framework.md")), {}
    exec(compile(source, "docs/add_a_framework.md", "exec"), names)
    history, model, held_out = names["history"], names["model"], names["held_out"]
    assert len(source.splitlines()) < 120
    assert model.loss(*held_out) < 0.5 * np.log(2.0)
    assert history.summary["steps"] == 400
    assert {row["kind"] for row in history.rounds} >= {"fast"}
    assert all(row["scored_by"] == "validation" for row in history.rounds)
    # Forks of a round see the same data.
    for held in history.rounds:
        by_step = {row["step"]: row for row in history.records}
        assert len({by_step[fork["start"] + 1]["data_step"] for fork in held["forks"]}) == 1


def test_the_page_on_histories(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile("\n".join(code("history.md")), "docs/history.md", "exec"), names)
    assert "range test" in capsys.readouterr().out
    assert 1e-4 < float(names["rate"]) <= 1.0


def test_the_page_names_every_method_of_a_host():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "add_a_framework.md").read_text(), re.M)
    named = set(re.findall(r"`(\w+)\(", " ".join(rows)))
    assert named == {name for name, part in vars(Host).items() if callable(part) and not name.startswith("_")}


@pytest.mark.filterwarnings("ignore:invalid value")
def test_the_host_survives_a_loss_that_is_not_finite():
    names = {}
    exec(compile("\n".join(code("add_a_framework.md")), "docs/add_a_framework.md", "exec"), names)
    model, steps = names["Model"](20), []

    def batches(position):
        steps.append(position)
        x, y = names["draw"](1 + position)
        return (np.full_like(x, np.nan), y) if len(steps) == 300 else (x, y)

    history = names["fit"](model, batches, names["held_out"], tuner=names["tuner"])
    assert history.summary["rollbacks"] == 1
    assert np.isfinite(model.weights).all() and np.isfinite(model.velocity).all()
    assert model.loss(*names["held_out"]) < 0.5 * np.log(2.0)


def test_the_architecture_names_what_exists():
    """Every file on the page is there, and what is named beside one is defined in it."""
    pages = [(ROOT / name).read_text() for name in ("docs/architecture.md", "CONTRIBUTING.md")]
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("**/*.py") if ".venv" not in path.parts}
    sources = {name.removeprefix("autotunenet_jax/"): (ROOT / name).read_text() for name in files}
    for page in pages:
        for name in re.findall(r"`([\w/]+\.py)`", page):
            assert any(file == name or file.endswith(f"/{name}") for file in files), name
        for name, file in re.findall(r"`([\w.]+)`\s+\(`([\w/]+\.py)`\)", page):
            source = sources[file.removeprefix("autotunenet_jax/")]
            for part in name.split("."):
                assert re.search(rf"(def|class) {part}\b|^{part} =", source, re.M), (name, file)
    everything = "\n".join(sources.values())
    for page in pages:
        for name in re.findall(r"`([A-Z]\w+\.\w+|\w+\.\w+)`", page):
            owner, _, member = name.partition(".")
            if member not in ("py", "md", "toml"):
                assert re.search(rf"(def|class) {member}\b", everything) and owner in everything, name


def test_every_package_says_what_it_is_for():
    packages = [path.parent for path in (ROOT / "autotunenet_jax").glob("*/__init__.py")]
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert len(packages) <= 10
    for package in packages:
        text = (package / "__init__.py").read_text()
        assert re.match(r'"""[^"]+\.', text), package
        assert f"| `{package.name}` |" in page


def test_a_session_goes_on_from_its_books():
    """Books, copies, the controller's bytes and the training state are all that the rest of a run depends on."""
    from autotunenet_jax.hosting import PackedController, Recorder, Session

    names = {}
    exec(compile("\n".join(code("add_a_framework.md")), "docs/add_a_framework.md", "exec"), names)
    tuner, draw, held_out = names["tuner"], names["draw"], names["held_out"]

    def begin():
        model = names["Model"](20)
        host = names["NumpyHost"](model, held_out)
        display = atn.Progress(1, is_on=False)
        recorder = Recorder(atn.History(tuner.space.names), tuner.space, display, ())
        return model, host, Session(host, PackedController(tuner), recorder)

    def train(model, session, steps):
        for _ in range(steps):
            session.report(model.train_step(draw(1 + model.position)))

    whole, _, expected = begin()
    train(whole, expected, 400)
    model, host, first = begin()
    for steps in (7, 60, 180):  # in the range test, in a fork, in training
        train(model, first, steps)
        kept = host.copy(), first.saved, first.kept, first.controller.to_bytes(), first.books()
        model, host, second = begin()
        state, second.saved, second.kept, data, books = kept
        host.restore(state, rewinds=True)
        second.controller.from_bytes(data)
        second.load(books)
        second.write()
        first = second
    train(model, first, 400 - first.controller.step)
    np.testing.assert_array_equal(model.weights, whole.weights)
    assert first.recorder.history.records == expected.recorder.history.records
    assert first.recorder.history.rounds == expected.recorder.history.rounds
