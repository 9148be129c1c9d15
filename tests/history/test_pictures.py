"""Pictures of a run: they show what the records hold, legibly, whoever draws them."""

import itertools
import json

import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.history import posterior
from autotunenet_jax.history.belief import believed
from autotunenet_jax.history.pictures import axes as layout
from autotunenet_jax.history.pictures import fork_round, overview
from tests.made_history import SPACE, add_steps, history

matplotlib = pytest.importorskip("matplotlib")


def texts(figure):
    """Every text that is drawn."""
    from matplotlib.text import Text

    ticks = set()
    for axis in (part for axes in figure.axes for part in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                ticks |= {id(tick.label1), id(tick.label2)}
    for text in figure.findobj(Text):
        is_there = text.get_visible() and text.get_text().strip() and id(text) not in ticks
        if is_there and (text.axes is None or text.axes.get_visible()):
            yield text


def assert_legible(figure):
    """No two texts overlap, and none is cut off."""
    figure.draw_without_rendering()
    renderer, page = figure.canvas.get_renderer(), figure.bbox
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(figure)]
    assert len(boxes) > 5
    for text, box in boxes:
        assert page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1, text
        assert page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1, text
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        is_apart = a.x1 <= b.x0 + 0.5 or b.x1 <= a.x0 + 0.5 or a.y1 <= b.y0 + 0.5 or b.y1 <= a.y0 + 0.5
        assert is_apart, (one, other)


def drawn(axis):
    return [np.array(line.get_xydata(), float) for line in axis.lines]


def holds(axis, x, y):
    """Whether a line of just this data is there."""
    wanted = np.column_stack([x, y]).astype(float)
    return any(line.shape == wanted.shape and np.allclose(line, wanted, equal_nan=True) for line in drawn(axis))


def everything(figure):
    """All numbers that are drawn."""
    lines = [line.tolist() for axis in figure.axes for line in drawn(axis)]
    surfaces = [
        part.get_array().tolist() for axis in figure.axes for part in axis.collections if part.get_array() is not None
    ]
    return json.dumps([lines, surfaces, [text.get_text() for text in texts(figure)]])


RATE_ONLY = atn.SearchSpace({"learning_rate": (1e-5, 1e-1)})
THREE = atn.SearchSpace({"learning_rate": (1e-5, 1e-1), "weight_decay": (1e-5, 1.0), "dropout": (0.0, 0.5)})
WORDS = atn.SearchSpace({"learning_rate": (1e-5, 1e-1), "activation": ["relu", "gelu", "tanh"]})


def three(**options):
    made = history(3, space=RATE_ONLY, **options)
    made.names = THREE.names
    made.describe(THREE)
    more = {"weight_decay": 1e-3, "dropout": 0.25}
    made.records = [{**row, **more} for row in made.records]
    for row in made.rounds:
        row["chosen"] = {**row["chosen"], **more}
        for place, held in enumerate(row["forks"]):
            held["hyperparams"] = {**held["hyperparams"], "weight_decay": 10.0 ** -(place + 1), "dropout": 0.1 * place}
    return made


CASES = {
    "rate": lambda: history(1, space=RATE_ONLY),
    "three": three,
    "words": lambda: history(1, space=WORDS, name="activation", options=("relu", "tanh")),
    "many, none recorded": lambda: history(40, has_records=False),
    "training loss": lambda: history(1, scored_by="training loss"),
}


@pytest.mark.parametrize("case", ["words", "many, none recorded"])
def test_nothing_overlaps_in_an_overview(case):
    assert_legible(CASES[case]().plot())


@pytest.mark.parametrize("case", ["rate", "three", "training loss"])
def test_nothing_overlaps_in_a_round(case):
    assert_legible(CASES[case]().plot(kind="round"))


@pytest.mark.parametrize("kind", ["posterior", "slice"])
def test_nothing_overlaps_in_what_is_fitted(kind):
    assert_legible(history().plot(kind=kind))


def test_an_overview_shows_the_records():
    made = history()
    figure = made.plot()
    for piece in overview.pieces_of(made.records):
        steps = [row["step"] for row in piece]
        assert holds(figure.axes[0], steps, [row["loss"] for row in piece])
        assert holds(figure.axes[1], steps, [row["learning_rate"] for row in piece])
    assert holds(figure.axes[0], [140, 280], [1.0, 0.5])
    shaded = {tuple(np.unique(patch.get_corners()[:, 0])) for patch in figure.axes[1].patches}
    assert shaded == {(0, 80), (140, 220)}
    dotted = {line[0, 0] for line in drawn(figure.axes[1]) if len(line) == 2 and line[0, 0] == line[1, 0]}
    assert {100.0, 130.0} <= dotted


@pytest.mark.parametrize("has_records", [True, False])
def test_an_axis_is_scaled_as_its_range_is(has_records):
    """Whatever the values: dropout spans decades here, and the weight decay none."""
    made = three(has_records=has_records)
    for step, row in enumerate(made.records):
        row["dropout"] = 0.01 if step < 100 else 0.5
    for step, row in enumerate(made.rounds):
        row["chosen"] = {**row["chosen"], "dropout": 0.01 if step < 1 else 0.5}
    made.mark_scheduled(["learning_rate"])
    figure = made.plot()
    assert [axis.get_yscale() for axis in figure.axes[1:]] == ["log", "log", "linear"]
    assert [axis.get_ylabel() for axis in figure.axes[1:]] == [
        "learning rate,\nbefore the\nscheduler", "weight decay", "dropout",
    ]  # fmt: skip
    assert_legible(figure)


def test_an_overview_without_losses_shows_scores_and_the_path():
    made = history(has_records=False)
    figure = made.plot()
    assert holds(figure.axes[0], [40, 60], [1.0, 1.0]) and holds(figure.axes[1], [0, 20], [1e-2, 1e-2])
    assert holds(figure.axes[1], [0, 80, 220, 280], [1e-2, 1e-3, 1e-3, 1e-3])


def test_a_round_shows_every_fork():
    made = history()
    figure = made.plot(kind="round", round=1)
    for place in range(4):
        rows = [row for row in made.records if (row["phase"], row["round"], row["fork"]) == ("fork", 0, place)]
        steps, losses = fork_round.curve_of(made, 1, place)
        assert steps.tolist() == list(range(1, 21)) and losses.tolist() == [row["loss"] for row in rows]
        assert holds(figure.axes[0], steps, losses)
    scores = [line[0, 1] for line in drawn(figure.axes[1]) if len(line) == 1]
    assert scores == [1.6, 1.1, 1.0, 0.95]  # the last has failed: a cross near the top
    assert holds(figure.axes[1], [0.0, 1.0], [1.5, 1.5])
    bars = [line[:, 1] for line in drawn(figure.axes[1]) if len(line) == 2 and line[0, 0] == line[1, 0]]
    np.testing.assert_array_equal(bars, [believed(made.rounds[0], place) for place in (1, 2)])
    assert "bars" in figure.axes[1].get_ylabel()


def test_the_part_that_counts_is_marked():
    figure = history(1, scored_by="training loss").plot(kind="round")
    thick = [line for line in figure.axes[0].lines if line.get_linewidth() == 5.0]
    # A quarter of the fork, its cool-down.
    assert [line.get_xdata().tolist() for line in thick] == [[16, 17, 18, 19, 20]] * 4


def test_a_posterior_shows_forks_and_path():
    made = history()
    found, figure = posterior.posterior_of(made, 1), made.plot(kind="posterior", names=["learning_rate"], round=1)
    (axis,) = figure.axes
    x = np.asarray(SPACE.encode({"learning_rate": np.array([1e-2, 3e-3, 1e-3]), "batch_size": np.full(3, 32)}))[:, 0]
    assert found.shortfall[2] == 0.0 and 0.0 < found.shortfall[1] < found.shortfall[0] and np.isnan(found.shortfall[3])
    assert holds(axis, x[:2], found.shortfall[:2]) and holds(axis, x[2:], [0.0])
    upright = [line[0, 0] for line in drawn(axis) if len(line) == 2 and line[0, 0] == line[1, 0]]
    np.testing.assert_allclose(upright, [x[0], x[2]], rtol=1e-6)
    curve = max(drawn(axis), key=len)
    points = np.column_stack([curve[:, 0], np.full(len(curve), found.x[2, 1])])
    mean, deviation = found.at(points)
    np.testing.assert_allclose(curve[:, 1], mean, atol=1e-6)
    band = axis.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(band.max(), (mean + 2 * deviation).max(), atol=1e-5)


def test_the_posterior_knows_most_where_forks_were():
    found = posterior.posterior_of(history(), 2)
    mean, deviation = found.at(found.x[:3])
    np.testing.assert_allclose(mean, found.shortfall[:3], atol=0.1)
    _, far = found.at(np.float32([[0.0, 0.5], [1.0, 0.5]]))
    assert deviation.max() < far.min()
    # However many points are asked for at once.
    many = np.repeat(found.x[:1], 400, axis=0)
    np.testing.assert_allclose(found.at(many)[0], mean[0], atol=1e-5)


def test_a_slice_shows_the_surface_and_the_path():
    made = history()
    figure = made.plot(kind="slice")
    found = posterior.posterior_of(made, 2)
    grid = np.meshgrid(layout.along(SPACE, "learning_rate", 41), layout.along(SPACE, "batch_size", 41))
    mean, deviation = found.at(np.stack([part.ravel() for part in grid], axis=1))
    for axis, values in zip(figure.axes[:2], (mean, deviation), strict=True):
        np.testing.assert_allclose(np.ravel(axis.collections[0].get_array()), values, atol=1e-6)
    path = np.stack([found.x[0], found.x[2], found.x[2]])
    assert holds(figure.axes[0], path[:, 0], path[:, 1])


@pytest.mark.parametrize("kind", ["overview", "posterior", "round"])
def test_read_from_disk_a_history_draws_the_same(kind, tmp_path):
    made = history()
    made.to_json(tmp_path / "history.json")
    again = atn.History.from_json(tmp_path / "history.json")
    number = None if kind == "overview" else 1
    assert everything(again.plot(kind=kind, round=number)) == everything(made.plot(kind=kind, round=number))


def test_dark_light_and_as_it_is(tmp_path):
    from matplotlib.colors import to_hex

    made, before = history(1, has_records=False), dict(matplotlib.rcParams)
    grounds = {style: to_hex(made.plot(style=style).get_facecolor()) for style in ("light", "dark", None)}
    assert grounds["light"] == grounds[None] == "#ffffff" and grounds["dark"] < "#333333"
    with matplotlib.rc_context({"figure.facecolor": "#101010", "text.color": "#fafafa"}):
        figure = made.plot(tmp_path / "dark.svg")
        assert to_hex(figure.get_facecolor()) == "#101010"
    assert (tmp_path / "dark.svg").read_text().startswith("<?xml") and dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "surface"}, "kind must be one of overview, posterior, round, slice"),
        ({"style": "sepia"}, "style must be"),
        ({"kind": "round", "round": 3}, "from 1 to 2; got round=3"),
        ({"round": 1}, "no round to choose"),
        ({"kind": "slice", "names": ["learning_rate"]}, "two of them"),
        ({"kind": "posterior", "names": ["depth"]}, "hyperparameters of this run, learning_rate, batch_size"),
        ({"kind": "posterior", "names": "learning_rate"}, "hyperparameters of this run"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        history().plot(**options)


def test_what_is_not_there_cannot_be_drawn():
    with pytest.raises(ValueError, match="over two hyperparameters, and this run tuned one"):
        history(space=RATE_ONLY).plot(kind="slice")
    no_rounds = atn.History(("learning_rate",))
    add_steps(no_rounds, 0, 10, values={"learning_rate": 0.1})
    with pytest.raises(ValueError, match="no round of forks has ended"):
        no_rounds.plot(kind="posterior")
    no_rounds.plot()


@pytest.mark.parametrize(
    ("parameter", "labels"),
    [
        (atn.Float(1e-5, 1e-1, log=True), ["1e-5", "0.0001", "0.001", "0.01", "0.1"]),
        (atn.Float(1e-3, 3e-2, log=True), ["0.001", "0.002", "0.005", "0.01", "0.02"]),
        (atn.Float(0.0, 0.5), ["0", "0.2", "0.4"]),
        (atn.Int(1, 9), ["2", "4", "6", "8"]),
        (atn.Choice(["relu", "a very long option"]), ["relu", "a very lo..."]),
    ],
)
def test_ticks_are_round_values_where_they_belong(parameter, labels):
    space = atn.SearchSpace({"x": parameter})
    places, written = layout.unit_ticks(space, "x")
    assert written == labels
    assert all(0.0 <= place <= 1.0 for place in places) and places == sorted(places)
