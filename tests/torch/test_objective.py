"""The metric that a Trainer has of its own."""

import pytest

torch = pytest.importorskip("torch")

from autotunenet_torch.objective import accuracy, metrics_for  # noqa: E402


@pytest.mark.parametrize("shape, axis", [((6, 4), 1), ((3, 4, 5, 6), 1), ((3, 5, 4), 2)])
def test_accuracy_is_of_the_axis_that_holds_the_classes(shape, axis):
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    targets = outputs.argmax(axis)
    wrong = targets.flatten()[:2].add(1).remainder(4)
    targets.view(-1)[:2] = wrong
    assert metrics_for(None, outputs, targets)["accuracy"] is accuracy
    assert float(accuracy(outputs, targets)) == pytest.approx(1.0 - 2.0 / targets.numel())


def test_targets_that_cross_entropy_ignores_do_not_count():
    outputs = torch.eye(4)
    assert float(accuracy(outputs, torch.tensor([0, 1, 3, -100]))) == pytest.approx(2 / 3)
    assert float(accuracy(outputs, torch.full((4,), -100))) == 0.0


@pytest.mark.parametrize(
    "outputs, targets",
    [
        (torch.zeros(2, 5, 5), torch.zeros(2, 5, dtype=torch.long)),  # either axis could be it
        (torch.zeros(2, 5, 4), torch.zeros(2, 3, dtype=torch.long)),  # neither is
        (torch.zeros(6, 1), torch.zeros(6, 1)),
        (torch.zeros(6), torch.zeros((), dtype=torch.long)),
        ({"logits": torch.zeros(6, 2)}, torch.zeros(6, dtype=torch.long)),
    ],
)
def test_there_is_none_where_it_is_not_certain(outputs, targets):
    assert metrics_for(None, outputs, targets) == {}
    assert metrics_for({"mine": accuracy}, outputs, targets) == {"mine": accuracy}
