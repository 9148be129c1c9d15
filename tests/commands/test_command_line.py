"""What a run's folder tells on the command line, of runs of every kind, sound and damaged."""

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.commands.command_line import main
from autotunenet_jax.history.explain import verdict
from tests.made_history import history


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with several snapshots and a history, and that history."""
    folder, made = tmp_path_factory.mktemp("run"), history(1)
    for row in made.rounds:
        row["verdict"] = verdict(row)
    made.to_json(folder / "history.json")
    with atn.Snapshots(folder) as store:
        for step, metric, status in ((80, None, "healthy"), (140, 0.25, "healthy"), (170, 0.5, "unusual")):
            store.save(step, {"w": jnp.ones(3)}, metric=metric, status=status, wait=True)
    return folder, made


@pytest.fixture
def copy(run, tmp_path):
    """The folder, to be damaged."""
    return shutil.copytree(run[0], tmp_path / "copy")


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def listed(folder):
    with atn.Snapshots(folder, read_only=True) as store:
        return store.records()


def test_as_a_user_calls_it(copy):
    """A process of its own: what it prints is all there is, and its code says how it went."""
    (copy / "00000050").mkdir()
    (copy / "00000050" / "manifest.json").write_text("{}")
    command = [sys.executable, "-m", "autotunenet_jax", "inspect", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "140 training steps" in done.stdout and "Snapshots in" in done.stdout
    assert done.returncode == 1 and [line[:27] for line in done.stderr.splitlines()] == ["error: snapshot 00000050 is"]


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert main(["replay", str(tmp_path / "absent")]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: there is nothing at") and not out


def test_inspect_tells_all_and_changes_nothing(run, capsys):
    folder, made = run
    before = contents(folder)
    assert main(["inspect", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert contents(folder) == before and not err
    assert made.explain() in out
    assert "Health: step 140 (train)" in out and "the run stopped at step 140" in out and "Validation:" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()[:8].isdigit()}
    for record in listed(folder):
        line = rows[record.folder_name]
        assert "complete" in line and record.status in line and str(record.step) in line
        assert ("latest" in line) == (record.step == 170) and ("best" in line) == (record.metric == 0.25)


def test_inspect_beside_a_writer(run, capsys):
    folder, _ = run
    with atn.Snapshots(folder):
        assert main(["inspect", str(folder)]) == 0
        (folder / ".tmp-00000099").mkdir()
        assert main(["inspect", str(folder)]) == 0
        (folder / ".tmp-00000099").rmdir()
    assert "unfinished" in capsys.readouterr().out


def test_a_damaged_snapshot_is_told(copy, capsys):
    record = listed(copy)[-1]
    victim = next(path for path in (copy / record.folder_name / "arrays").rglob("*") if path.stat().st_size > 20)
    victim.write_bytes(victim.read_bytes()[:-3])
    before = contents(copy)
    assert main(["inspect", str(copy)]) == 1
    out, err = capsys.readouterr()
    assert f"snapshot {record.folder_name} is damaged" in err and "damaged" in out and "140 training steps" in out
    assert contents(copy) == before


@pytest.mark.parametrize("damage", ["index", "manifest", "history", "no history"])
def test_other_damage_is_told(copy, capsys, damage):
    unlisted = copy / "00000050"
    match damage:
        case "index":
            (copy / "index.json").write_text("{")
        case "manifest":
            unlisted.mkdir()
            (unlisted / "manifest.json").write_text("{}")
        case "history":
            (copy / "history.json").write_text('{"names": ["learning_rate"], "records": 3}')
        case "no history":
            (copy / "history.json").unlink()
    before = contents(copy)
    assert main(["inspect", str(copy)]) == 1
    out, err = capsys.readouterr()
    assert {"index": "index", "manifest": "00000050", "history": "history is damaged", "no history": "no history.json"}[
        damage
    ] in err
    assert "Snapshots in" in out and contents(copy) == before
    if "history" in damage:
        assert main(["plot", str(copy)]) == 1 == main(["replay", str(copy)])


def test_a_folder_of_runs_names_them(run, tmp_path, capsys):
    (tmp_path / "rank0").mkdir()
    run[1].to_json(tmp_path / "rank0" / "history.json")
    assert main(["replay", str(tmp_path)]) == 1
    assert f"these are: {tmp_path.as_posix()}/rank0" in capsys.readouterr().err


@pytest.mark.parametrize("framework", ["Lightning", "transformers"])
def test_inspect_names_the_checkpoints_of_a_framework(framework, tmp_path, capsys):
    made = history(1)
    made.summary |= {"steps": 140, "total_steps": 280}
    made.to_json(tmp_path / "history.json")
    (tmp_path / "checkpoints").mkdir()
    for step in range(10, 90, 10):
        path = tmp_path / "checkpoints" / f"step={step}.ckpt"
        if framework == "transformers":
            (tmp_path / f"checkpoint-{step}").mkdir()
            path = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        path.touch()
        os.utime(path, (step, step))
    before = contents(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "the run stopped at step 140 of 280" in out and contents(tmp_path) == before
    folder, names, how = {
        "Lightning": ("/checkpoints", "step=80.ckpt, step=70.ckpt, step=60.ckpt", "ckpt_path="),
        "transformers": ("", "checkpoint-80, checkpoint-70, checkpoint-60", "resume_from_checkpoint="),
    }[framework]
    assert (
        f"{framework} keeps its checkpoints in {tmp_path.as_posix()}{folder}: {names} and 5 older." in out
        and how in out
    )


@pytest.mark.parametrize(
    ("summary", "events", "state"),
    [
        ({}, [], "is under way, or ended by force."),
        ({"steps": 140, "total_steps": 140}, [], "ended."),
        ({"steps": 140, "total_steps": None}, [], "stopped at step 140, or is under way."),
        ({"steps": 140, "total_steps": 800}, [], "stopped at step 140 of 800, or is under way."),
        (
            {"steps": 140, "total_steps": 800},
            [{"step": 140, "kind": "stop", "message": "."}],
            "stopped at step 140 of 800.",
        ),
    ],
)
def test_inspect_says_where_a_run_stands(summary, events, state, tmp_path, capsys):
    made = history(1)
    made.summary, made.events = summary, events
    made.to_json(tmp_path / "history.json")
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"; the run {state}" in out and "none lie here either." in out


def test_inspect_names_the_best_reading_that_is_a_number(tmp_path, capsys):
    made = history(1)
    made.evals = [{"step": step, "value": value} for step, value in ((10, math.nan), (20, 0.5), (30, 0.4))]
    made.to_json(tmp_path / "history.json")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "the best of 3 readings was 0.4 at step 30" in capsys.readouterr().out


def test_replay_prints_what_was_in_force(run, capsys):
    folder, made = run
    kept = [row["learning_rate"] for row in made.kept()]
    assert main(["replay", str(folder)]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [int(row["step"]) for row in rows] == list(range(len(kept)))
    np.testing.assert_allclose([float(row["learning_rate"]) for row in rows], kept, rtol=1e-6)
    assert main(["replay", str(folder), "--format", "json", "--every", "10"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == [*range(0, len(kept) - 1, 10), len(kept) - 1]
    assert main(["replay", str(folder), "--format", "python"]) == 0
    names = {}
    exec(capsys.readouterr().out, names)
    rates = names["SCHEDULES"]["learning_rate"](jnp.arange(len(kept)))
    np.testing.assert_allclose(rates, kept, rtol=1e-5)


def test_replay_gives_options_by_name(tmp_path, capsys):
    space = atn.SearchSpace({"activation": ["relu", "gelu"], "layers": atn.Int(1, 4)})
    made = atn.History(space.names, space=space)
    for step in range(1, 7):
        made.add({"step": step, "data_step": step, "loss": 1.0, "activation": int(step > 3), "layers": 1 + step // 3})
    made.to_json(tmp_path / "history.json")
    assert main(["replay", str(tmp_path)]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["activation"] for row in rows] == ["relu"] * 3 + ["gelu"] * 3
    assert [row["layers"] for row in rows] == ["1", "1", "2", "2", "2", "3"]
    assert main(["replay", str(tmp_path), "--format", "python"]) == 0
    names = {}
    exec(capsys.readouterr().out, names)
    assert [int(names["SCHEDULES"]["layers"](count)) for count in (0, 1, 2, 5, 9)] == [1, 1, 2, 3, 3]
    assert names["OPTIONS"]["activation"] == ["relu", "gelu"]


def test_export_gives_tables_and_json(run, tmp_path, capsys):
    folder, made = run
    assert main(["export", str(folder)]) == 0
    assert atn.History.from_dict(json.loads(capsys.readouterr().out)).rounds == made.rounds
    path = tmp_path / "forks.csv"
    assert main(["export", str(folder), "--format", "csv", "--table", "forks", "--out", str(path)]) == 0
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    forks = [fork for row in made.rounds for fork in row["forks"]]
    assert [float(row["learning_rate"]) for row in rows] == [fork["hyperparams"]["learning_rate"] for fork in forks]
    assert [row["status"] for row in rows] == [fork["status"] for fork in forks]
    for table in ("records", "evals", "events"):
        assert main(["export", str(folder), "--format", "csv", "--table", table]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 1 + len(getattr(made, table))


@pytest.mark.filterwarnings("ignore")
def test_export_fills_a_storage_of_optuna(run, tmp_path, capsys):
    optuna = pytest.importorskip("optuna")
    url = f"sqlite:///{tmp_path}/study.db"
    command = ["export", str(run[0]), "--format", "optuna", "--storage", url]
    assert main(command) == 0
    study = optuna.load_study(study_name="autotunenet", storage=url)
    assert len(study.trials) == sum(len(row["forks"]) for row in run[1].rounds)
    assert main(command) == 1
    assert "holds a study 'autotunenet' already" in capsys.readouterr().err


def test_plot_writes_a_picture(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(run[0])]) == 0
    name = capsys.readouterr().out.strip()
    assert name == f"{run[0].name}-overview.png" and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(run[0]), "--kind", "round", "--round", "1", "--style", "dark", "--out", "r.svg"]) == 0
    assert (tmp_path / "r.svg").exists()
    assert main(["plot", str(run[0]), "--kind", "round", "--round", "9"]) == 1
    assert "takes a round from 1 to" in capsys.readouterr().err


WRONG = ("", "inspect", "plot . --kind x", "replay . --every 0", "export . --format optuna")


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments_end_with_two(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
