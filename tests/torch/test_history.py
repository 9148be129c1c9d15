"""A run's schedules, replayed by a scheduler of PyTorch."""

import pytest

import autotunenet_jax as atn

torch = pytest.importorskip("torch")


def test_a_lambda_replays_a_history():
    history = atn.History(("learning_rate",))
    for step in range(1, 21):
        history.add({"step": step, "data_step": step, "loss": 0.0, "learning_rate": 0.1 / step})
    history.discard(4, 10)
    kept = [row["learning_rate"] for row in history.kept()]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rate = history.schedule()["learning_rate"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(rate(step)))
    seen = []
    for _ in kept:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx(kept, rel=1e-6)
