"""Hooks, loggers and an early stop in a PyTorch training."""

import logging

import pytest

torch = pytest.importorskip("torch")

import autotunenet_jax as atn  # noqa: E402
from autotunenet_torch import AutoTuneNet, Trainer  # noqa: E402
from tests.session.test_feed import Heard  # noqa: E402

SPACE = {"learning_rate": (1e-4, 1.0)}
pytestmark = pytest.mark.filterwarnings("ignore:The best learning_rate lies at")


def net():
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))


def trainer(**options):
    given = {"epochs": 10, "progress": False, **options}
    return Trainer(torch.nn.functional.cross_entropy, torch.optim.AdamW, **given)


def test_a_run_is_told_and_logged_as_fit_tells_it(tmp_path, loader):
    heard, log = Heard(), atn.CSVLogger(tmp_path / "log.csv")
    history = trainer(callbacks=[heard], loggers=[log], log_every=10).fit(
        net(), loader, loader, tuner=AutoTuneNet(SPACE)
    )
    records = {row["step"]: row for row in history.records}
    steps = [event for event in heard.events if isinstance(event, atn.Step)]
    kept = [step for step in steps if records[step.step]["is_kept"]]
    assert [step.step for step in kept] == [row["step"] for row in history.kept()]
    assert all(step.loss == records[step.step]["loss"] for step in steps)
    readings = [event for event in heard.events if isinstance(event, atn.Reading)]
    settled = {row["step"]: row["value"] for row in history.evals if row["is_settled"]}
    assert {reading.step: reading.value for reading in readings} == settled
    assert all(set(reading.metrics) == {"loss", "accuracy"} for reading in readings)
    assert [event for event in heard.events if isinstance(event, dict)] == history.rounds
    assert heard.events[0] == "begin" and heard.events[-1] == "end" and heard.events.count("end") == 1
    rows = log.read()
    numbers = [row["step"] for row in rows]
    assert numbers == sorted(set(numbers))
    assert any("train/loss" in row for row in rows)
    assert [row["eval/accuracy"] for row in rows if "eval/accuracy" in row] == pytest.approx(
        [reading.metrics["accuracy"] for reading in readings if reading.step in numbers]
    )


def test_an_early_stop_ends_in_the_best_model(loader):
    class Worse(Trainer):
        calls = 0

        def validate(self, loader=None):
            self.calls += 1
            values = super().validate(loader)
            return values if loader is not None else {**values, "loss": float(self.calls)}

    run = Worse(
        torch.nn.functional.cross_entropy,
        torch.optim.AdamW,
        epochs=20,
        progress=False,
        callbacks=[atn.EarlyStopping(patience=4)],
    )
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match='None of .* was better than the first, 1, .*give mode="max"'):
        history = run.fit(model, loader, loader, tuner=AutoTuneNet(SPACE))
    settled = [row["value"] for row in history.evals if row["is_settled"]]
    assert settled[0] == min(settled) and 5 <= len(settled) <= 6
    assert history.summary["steps"] < 240 and not run.is_interrupted
    assert "did not improve in 4 readings" in run.stop_reason
    assert [event["kind"] for event in history.events].count("stop") == 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer().stop_reason is None


def test_a_loop_of_ones_own_is_left_by_the_exception():
    class Ends(atn.Callback):
        def on_step(self, step):
            if step.step >= 70:
                raise atn.StopTraining("enough")

    model, heard = net(), Heard()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tuner = AutoTuneNet(SPACE, total_steps=200)
    tuner.attach(model, optimizer, callbacks=[Ends(), heard], log_every=5)
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    with pytest.raises(atn.StopTraining, match="enough"):
        for _ in range(200):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tuner.step(loss)
    tuner.finish()
    assert 70 <= tuner.history.summary["steps"] < 200
    assert heard.events[-1] == "end"
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


def test_an_error_in_a_hook_loses_nothing(tmp_path, loader):
    class Fails(atn.Callback):
        def on_validation(self, reading):
            if reading.step >= 60:
                raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match="its own"):
        trainer(callbacks=[Fails()]).fit(net(), loader, loader, tuner=AutoTuneNet(SPACE), snapshots=tmp_path)
    heard = Heard()
    history = trainer(callbacks=[heard]).fit(net(), loader, loader, tuner=AutoTuneNet(SPACE), snapshots=tmp_path)
    (resumed,) = [event for event in history.events if event["kind"] == "resume"]
    assert resumed["step"] >= 60 and history.summary["steps"] == 120
    assert min(step for step, _ in heard.steps()) > resumed["step"] - 10


def test_a_trainers_log_has_every_decision(caplog, loader):
    caplog.set_level(logging.INFO, logger="autotunenet")
    history = trainer().fit(net(), loader, loader, tuner=AutoTuneNet(SPACE))
    lines = [record.getMessage() for record in caplog.records if record.name == "autotunenet"]
    for number, row in enumerate(history.rounds, 1):
        assert any(line.startswith(f"step {row['end']}: round {number}, ") for line in lines)
