"""A history put into words, into a study of Optuna, and into JSON and back."""

import builtins
import json
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import autotunenet_jax as atn
from tests import problem

SPACE = atn.SearchSpace({"learning_rate": (1e-4, 1.0), "layers": atn.Int(1, 9), "act": ["relu", "gelu"]})


def fork(rate, score, status="lost", p_better=0.1, act="relu"):
    scores = [] if score is None else [score]
    values = {"learning_rate": rate, "layers": 3, "act": act}
    return {
        "hyperparams": values, "scores": scores, "status": status, "steps": 30, "start": 10, "end": 40,
        "p_better": p_better, "lead": None, "deviation": None,
    }  # fmt: skip


def row(*forks, best=1, start=0, end=120, scored_by="validation", sweep=(0, 10)):
    chosen = forks[best]["hyperparams"] if best >= 0 else forks[0]["hyperparams"]
    return {
        "start": start, "end": end, "kind": "fast", "scored_by": scored_by, "sweep": list(sweep) if sweep else None,
        "forks": list(forks), "best": best, "outcome": "A round ended.", "chosen": dict(chosen), "reference": 2.0,
    }  # fmt: skip


def history(rounds=1, *, mode="min", **options):
    """Two forks that finished and one that failed, in each round."""
    made = atn.History(SPACE.names, space=SPACE, mode=mode)
    for step in range(1, 201):
        made.add(
            {
                "step": step, "data_step": step, "loss": math.inf if step == 5 else 1.0 / step, "phase": "train",
                "round": 0, "fork": -1, "learning_rate": 0.1, "layers": 3, "act": 0,
            }
        )  # fmt: skip
    for _ in range(rounds):
        forks = fork(0.01, 1.25, p_better=1.0), fork(0.1, 0.75, "kept", 0.93), fork(1.0, None, "failed", math.nan)
        made.rounds.append(row(*forks, **options))
    made.discard(0, 40)
    made.summary = {"steps": 200, "discarded_steps": 40, "share_discarded": 0.2, "rollbacks": 3, "rounds": rounds}
    made.events += [{"step": step, "kind": "rollback", "message": "A spike."} for step in (50, 60, 70)]
    made.events.append({"step": 150, "kind": "retreat", "message": "It did not improve."})
    return made


@pytest.fixture(scope="module")
def result():
    return atn.fit(problem.train_step, problem.new_state(), problem.batches, tuner=problem.tuner(), progress=False)


def test_words_hold_every_figure_of_a_decision():
    text = history().explain()
    told = [
        "200 training steps", "40 steps (20.0 %) went into range tests and forks that were not kept",
        "0 more (0.0 %) were undone", "3 rollbacks", "1 round", "3 forks of 30 steps", "scored by validation",
        "stood at 2", "learning_rate 0.01: scored 1.25, 0.5 worse than the kept one",
        "scored 0.75, 93 % likely to beat the one kept till then; kept", "failed after 30 steps",
        "A range test of 10 steps read learning_rate 0.01.", "fork 2 was kept, since it was 0.5 ahead of the next",
        "Step 50, 60, 70 (rollback): A spike.", "Step 150 (retreat)",
    ]  # fmt: skip
    for part in told:
        assert part in text, part
    # Without a measurement before them, the score of the first stands in, which says nothing.
    unmeasured = history()
    unmeasured.rounds[0]["reference"] = unmeasured.rounds[0]["forks"][0]["scores"][0]
    assert "it stood at" not in unmeasured.explain()
    # What all forks share is not repeated, and the first fork had none to beat.
    assert "layers 3: scored" not in text and "100 %" not in text


def test_words_say_that_all_failed():
    made = history()
    made.rounds = [row(fork(0.1, None, "failed", math.nan), fork(0.2, None, "failed", math.nan), best=-1)]
    assert "every fork failed; training went back" in made.explain()
    made.rounds = [row(fork(0.1, 2.5), fork(0.2, 2.6), best=-1)]
    assert "ended well behind the state that they began from; training went back to it" in made.explain()
    made.rounds = [row(fork(0.1, None, "failed", math.nan), fork(0.2, None, "failed", math.nan), best=-1)]
    made.rounds[0] |= {"kind": "slow", "scored_by": "training loss"}
    text = made.explain()
    assert "not measured after" in text and "no validation metric came when it was asked for" in text


def test_words_are_in_the_direction_of_the_user():
    made = history(mode="max")
    made.rounds = [row(fork(0.01, -0.25), fork(0.1, -0.75, "kept"))]
    text = made.explain()
    assert "scored 0.75" in text and "scored 0.25, 0.5 worse" in text and "-0." not in text


@pytest.mark.parametrize("rounds", [0, 1, 4, 7, 16, 32])
def test_words_stay_short(rounds):
    made = history(rounds)
    made.events += [{"step": i, "kind": f"kind {i % 9}", "message": "."} for i in range(999)]
    lines = made.explain().splitlines()
    assert len(lines) < 40
    assert any("Round 1 " in line for line in lines) == (rounds > 0)
    assert any(f"Round {rounds} " in line for line in lines) == (rounds > 0)


def test_each_event_has_its_own_words():
    made = history()
    made.events += [{"step": step, "kind": "retreat", "message": "On, at a lower rate."} for step in (160, 170)]
    lines = made.explain().splitlines()
    assert "Step 150 (retreat): It did not improve." in lines
    assert "Step 160, 170 (retreat): On, at a lower rate." in lines
    made.events += [{"step": 171 + i, "kind": "rollback", "message": f"Cause {i}."} for i in range(9)]
    made.events.append({"step": 190, "kind": "stall", "message": "No progress."})
    lines = made.explain().splitlines()
    # A kind is never crowded out by the many messages of another; what is left out is counted.
    assert "Step 190 (stall): No progress." in lines and "Step 150 (retreat): It did not improve." in lines
    assert sum(line.startswith("Step ") for line in lines) == 7 and lines[-1] == "... 6 events more ..."


def test_words_are_in_order_of_steps_and_say_that_rates_moved_since():
    made = history()
    stood = "learning_rate: began at 0.1 and stood at 0.1 after the last round, before the schedule"
    made.events = [{"step": 60, "kind": "retreat", "message": "Back."}]
    assert f"{stood}." in made.explain()
    made.events += [
        {"step": 170, "kind": "retreat", "message": "Back once more."},
        {"step": 150, "kind": "climb", "message": "Up."},
    ]
    lines = made.explain().splitlines()
    assert f"{stood} and what is told below." in lines
    assert lines[-3:] == [
        "Step 60 (retreat): Back.", "Step 150 (climb): Up.", "Step 170 (retreat): Back once more."
    ]  # fmt: skip


def test_words_of_a_run(result):
    text = result.history.explain()
    assert len(text.splitlines()) < 40
    for held in result.history.rounds[0]["forks"]:
        assert f"{held['hyperparams']['learning_rate']:.3g}" in text
    assert "range test of 16 steps read learning_rate" in text


def test_a_history_without_anything_has_words():
    assert "no rounds" in atn.History(("learning_rate",)).explain()


def test_json_and_back_is_exact(result):
    for made in (history(3, mode="max"), result.history):
        text = json.dumps(made.to_dict(), allow_nan=False)
        again = atn.History.from_dict(json.loads(text))
        assert json.dumps(again.to_dict(), allow_nan=False) == text
        assert (again.space, again.mode, again.stride) == (made.space, made.mode, made.stride)
        assert again.explain() == made.explain()
        rates = (held.schedule()["learning_rate"](jnp.arange(50)) for held in (made, again))
        np.testing.assert_array_equal(*rates)


def test_json_and_back_gives_equal_pictures(result, tmp_path):
    pytest.importorskip("matplotlib")
    again = atn.History.from_dict(json.loads(json.dumps(result.history.to_dict())))
    result.history.plot(tmp_path / "a.png")
    again.plot(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_study_of_optuna():
    optuna = pytest.importorskip("optuna")
    study = history(2).to_optuna()
    assert isinstance(study, optuna.study.Study) and len(study.trials) == 6
    complete, kept, failed = study.trials[:3]
    state = optuna.trial.TrialState
    assert [trial.state for trial in study.trials[:3]] == [state.COMPLETE, state.COMPLETE, state.FAIL]
    assert complete.value == 1.25 and study.best_value == 0.75 and failed.value is None
    assert kept.params == {"learning_rate": 0.1, "layers": 3, "act": "relu"}
    assert kept.distributions == {
        "learning_rate": optuna.distributions.FloatDistribution(1e-4, 1.0, log=True),
        "layers": optuna.distributions.IntDistribution(1, 9),
        "act": optuna.distributions.CategoricalDistribution(["relu", "gelu"]),
    }
    assert (kept.user_attrs["round"], kept.user_attrs["steps"], kept.user_attrs["kept"]) == (0, 30, True)
    assert study.trials[3].user_attrs["round"] == 1


def test_a_study_has_one_direction():
    optuna = pytest.importorskip("optuna")
    study = history(mode="max").to_optuna()
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE and study.best_value == -0.75
    mixed = history(mode="max")
    mixed.rounds.append({**mixed.rounds[0], "scored_by": "training loss"})
    assert mixed.to_optuna().direction == optuna.study.StudyDirection.MINIMIZE


def test_a_study_of_a_run(result):
    pytest.importorskip("optuna")
    study = result.history.to_optuna()
    scores = [score for held in result.history.rounds[0]["forks"] for score in held["scores"]]
    assert study.best_value == min(scores) and len(study.trials) == len(result.history.rounds[0]["forks"])


def test_no_study_without_a_space():
    pytest.importorskip("optuna")
    with pytest.raises(ValueError, match="does not know its search space"):
        atn.History(("learning_rate",)).to_optuna()


def test_a_missing_optuna_is_named(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "optuna":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"autotunenet-jax\[optuna\]"):
        history().to_optuna()


def test_the_trials_of_a_history_are_those_the_tuner_knows(result):
    """What a picture of the posterior is computed from is what decisions were."""
    from autotunenet_jax.history.posterior import trials_of

    known = result.tuner_state.knowledge.observations
    found = trials_of(result.history, len(result.history.rounds))
    count = int(known.count)
    assert int(found.count) == count > 0
    for name in ("x", "y", "time"):
        expected, got = np.asarray(getattr(known, name)), np.asarray(getattr(found, name))
        np.testing.assert_allclose(got[:count], expected[:count], rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(found.failed[:count], known.failed[:count])


def test_a_file_holds_a_history(tmp_path):
    made, path = history(2), tmp_path / "history.json"
    made.to_json(path)
    assert atn.History.from_json(path).to_dict() == made.to_dict()
    assert [file.name for file in tmp_path.iterdir()] == ["history.json"]
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"not what History\.to_json wrote"):
        atn.History.from_json(path)


def test_a_full_disk_leaves_the_file_that_was_there_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "history.json"
    history(1).to_json(path)
    before = path.read_bytes()

    def full(partial, text):
        partial.write_bytes(b"{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        history(2).to_json(path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["history.json"]
