"""What a run's folder tells on the command line, of runs of every kind, sound and damaged."""

import csv
import io
import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from autotunenet_jax.commands.command_line import main
from tests import problem


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with several snapshots, and what `fit` returned."""
    folder = tmp_path_factory.mktemp("run")
    store = atn.Snapshots(folder, interval_s=0.0, overhead=0.99)
    with store:
        result = atn.fit(
            problem.train_step, problem.new_state(), problem.batches, tuner=problem.tuner(), progress=False,
            eval_step=problem.eval_step, snapshots=store,
        )  # fmt: skip
        store.save(160, {"w": jnp.ones(3)}, metric=0.25, wait=True)
        store.save(170, {"w": jnp.ones(3)}, metric=0.5, status="unusual", wait=True)
    return folder, result


@pytest.fixture
def copy(run, tmp_path):
    """The folder, to be damaged."""
    return shutil.copytree(run[0], tmp_path / "copy")


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def listed(folder):
    with atn.Snapshots(folder, read_only=True) as store:
        return store.records()


def test_as_a_user_calls_it(run):
    """A process of its own: what it prints is all there is, and its code says how it went."""
    command = [sys.executable, "-m", "autotunenet_jax"]
    done = subprocess.run([*command, "inspect", str(run[0])], capture_output=True, text=True, check=True)
    assert "160 training steps" in done.stdout and "Snapshots in" in done.stdout and not done.stderr
    done = subprocess.run([*command, "replay", str(run[0] / "absent")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: there is nothing at") and not done.stdout


def test_inspect_tells_all_and_changes_nothing(run, capsys):
    folder, result = run
    before = contents(folder)
    assert main(["inspect", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert contents(folder) == before and not err
    assert result.history.explain() in out
    assert "Health: step 160 (train)" in out and "the run ended" in out and "Validation:" in out
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
    assert f"snapshot {record.folder_name} is damaged" in err and "damaged" in out and "160 training steps" in out
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
    run[1].history.to_json(tmp_path / "rank0" / "history.json")
    assert main(["replay", str(tmp_path)]) == 1
    assert f"these are: {tmp_path.as_posix()}/rank0" in capsys.readouterr().err


def test_the_history_in_the_folder_is_that_of_the_result(run):
    folder, result = run
    assert atn.History.from_json(folder / "history.json").to_dict() == json.loads(json.dumps(result.history.to_dict()))
    assert atn.History.from_json(folder / "history.json").summary["steps"] == 160


def test_replay_prints_what_was_in_force(run, capsys):
    folder, result = run
    kept = [row["learning_rate"] for row in result.history.kept()]
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
    folder, result = run
    assert main(["export", str(folder)]) == 0
    assert atn.History.from_dict(json.loads(capsys.readouterr().out)).rounds == result.history.rounds
    path = tmp_path / "forks.csv"
    assert main(["export", str(folder), "--format", "csv", "--table", "forks", "--out", str(path)]) == 0
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    forks = [fork for row in result.history.rounds for fork in row["forks"]]
    assert [float(row["learning_rate"]) for row in rows] == [fork["hyperparams"]["learning_rate"] for fork in forks]
    assert [row["status"] for row in rows] == [fork["status"] for fork in forks]
    for table in ("records", "evals", "events"):
        assert main(["export", str(folder), "--format", "csv", "--table", table]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 1 + len(getattr(result.history, table))


@pytest.mark.filterwarnings("ignore")
def test_export_fills_a_storage_of_optuna(run, tmp_path, capsys):
    optuna = pytest.importorskip("optuna")
    url = f"sqlite:///{tmp_path}/study.db"
    command = ["export", str(run[0]), "--format", "optuna", "--storage", url]
    assert main(command) == 0
    study = optuna.load_study(study_name="autotunenet", storage=url)
    assert len(study.trials) == sum(len(row["forks"]) for row in run[1].history.rounds)
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
