"""Where rows go."""

import json
import math
import types

import pytest

import autotunenet_jax as atn
from autotunenet_jax.history.loggers import Writer, as_writers

FILES = {"csv": atn.CSVLogger, "jsonl": atn.JSONLLogger}


def written(path, kind, rows, *, begin=None):
    writer = Writer(FILES[kind](path))
    writer.begin(begin)
    for step, row in rows:
        writer.write(row, step)
    return FILES[kind](path).read()


ROWS = [(10, {"train/loss": 0.5}), (20, {"train/loss": 0.25, "eval/metric": 1.5}), (30, {"eval/metric": 2})]


@pytest.mark.parametrize("kind", FILES)
def test_rows_come_back_as_they_were(tmp_path, kind):
    rows = written(tmp_path / "new" / f"log.{kind}", kind, ROWS)
    assert rows == [{"step": step, **row} for step, row in ROWS]
    assert isinstance(rows[0]["step"], int) and isinstance(rows[0]["train/loss"], float)


def test_a_table_is_a_table(tmp_path):
    pandas = pytest.importorskip("pandas")
    written(tmp_path / "log.csv", "csv", ROWS)
    table = pandas.read_csv(tmp_path / "log.csv")
    assert list(table.columns) == ["step", "train/loss", "eval/metric"]
    assert table["train/loss"].isna().tolist() == [False, False, True]


def test_lines_are_json_whatever_the_numbers(tmp_path):
    written(tmp_path / "log.jsonl", "jsonl", [(1, {"a": math.nan, "b": -math.inf, "c": 1.0, "d": "adam"})])
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "a": None, "b": None, "c": 1.0, "d": "adam"}


@pytest.mark.parametrize("kind", FILES)
def test_a_new_run_keeps_the_file_of_the_last_one(tmp_path, kind):
    path = tmp_path / f"log.{kind}"
    texts = []
    for number in range(3):
        written(path, kind, [(10, {"loss": float(number)})])
        texts.append(path.read_text())
    assert (tmp_path / f"log.1.{kind}").read_text() == texts[0]
    assert (tmp_path / f"log.2.{kind}").read_text() == texts[1]
    assert path.read_text() == texts[2]


@pytest.mark.parametrize("kind", FILES)
def test_a_resumed_run_goes_on_without_a_step_twice(tmp_path, kind):
    """Also where the process was killed while it wrote."""
    path = tmp_path / f"log.{kind}"
    written(path, kind, ROWS)
    with path.open("a") as file:
        file.write("40,0.1" if kind == "csv" else '{"step": 40, "train/lo')
    rows = written(path, kind, [(30, {"eval/metric": 3.0}), (40, {"other": 1.0})], begin=20)
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    assert rows[2]["eval/metric"] == 3.0 and rows[3]["other"] == 1.0
    assert rows[0] == {"step": 10, "train/loss": 0.5}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_log_is_left_alone(tmp_path, kind):
    path = tmp_path / "notes"
    path.write_text("shopping\nmilk\n")
    with pytest.raises(ValueError, match="is no log of a run"):
        written(path, kind, ROWS, begin=20)
    assert path.read_text() == "shopping\nmilk\n"
    with pytest.raises(ValueError, match="is a folder"):
        FILES[kind](tmp_path)


class Scalars:
    """As torch.utils.tensorboard.SummaryWriter."""

    def __init__(self):
        self.calls = []

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None, new_style=False, double_precision=False):
        self.calls.append((tag, scalar_value, global_step))

    def add_text(self, tag, text_string, global_step=None, walltime=None):
        raise AssertionError


class Run:
    """As a run of wandb."""

    def __init__(self):
        self.calls = []

    def log(self, data, step=None, commit=None):
        self.calls.append((data, step))

    def __call__(self):
        raise AssertionError


def mlflow():
    """As the module."""
    calls = []

    def log_metrics(metrics, step=None, synchronous=None, run_id=None, timestamp=None, model_id=None, dataset=None):
        calls.append((metrics, step))

    def log_metric(key, value, step=None):
        raise AssertionError

    return types.SimpleNamespace(log_metrics=log_metrics, log_metric=log_metric, calls=calls)


def test_every_kind_is_recognised_by_what_it_has():
    row = {"loss": 0.5, "optimizer": "adam", "is_on": True}
    board, run, module, heard = Scalars(), Run(), mlflow(), []
    for writer in as_writers([board, run, module, lambda row, step: heard.append((row, step))]):
        writer.begin(None)
        writer.write(row, 10)
    assert board.calls == [("loss", 0.5, 10), ("is_on", 1.0, 10)]
    assert run.calls == heard == [(row, 10)]
    assert module.calls == [({"loss": 0.5, "is_on": 1.0}, 10)]


def test_a_step_is_handed_on_once_and_steps_only_grow():
    heard = []
    writer = Writer(lambda row, step: heard.append(step))
    writer.begin(None)
    for step in (1, 2, 2, 1, 3):
        writer.write({"loss": 1.0}, step)
    writer.write({}, 4)
    assert heard == [1, 2, 3]


def test_a_full_disk_is_told_once_and_stops_nothing():
    calls = []

    def full(row, step):
        calls.append(step)
        if step < 3:
            raise OSError(28, "No space left on device")

    writer = Writer(full)
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        for step in (1, 2, 3):
            writer.write({"loss": 1.0}, step)
    assert len(caught) == 1 and calls == [1, 2, 3]


def test_any_other_error_is_the_users_to_see():
    def wrong(row, step):
        raise KeyError("loss")

    with pytest.raises(KeyError):
        Writer(wrong).write({"loss": 1.0}, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [([3], "must have add_scalar"), ([atn.CSVLogger], "the class CSVLogger"), (print, "Put it into a list")],
)
def test_what_is_no_logger(given, message):
    with pytest.raises(TypeError, match=message):
        as_writers(given)
