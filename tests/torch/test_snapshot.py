"""Copies of a training: everything, bit for bit, and nothing shared."""

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import autotunenet_jax as atn  # noqa: E402
from autotunenet_torch import TrainingState, checkpoint, random_state, serialization  # noqa: E402

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def train(model, optimizer, scheduler, x, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()


def make_lazy():
    return torch.nn.Sequential(torch.nn.LazyLinear(5), torch.nn.LazyBatchNorm1d(), torch.nn.LazyLinear(3))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("kind", ["tied", "lazy"])
def test_restore_is_bitwise(name, before, kind, make_tied, training_bits):
    """Also where the optimizer had no state yet when the copy was made."""
    model = {"tied": make_tied, "lazy": make_lazy}[kind]()
    x = torch.randn(8, 6)
    model(x)
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    state = TrainingState(model, optimizer, schedulers=[scheduler])
    train(model, optimizer, scheduler, x, before)
    saved = state.copy_out()
    at_copy = training_bits(model, optimizer, scheduler)
    train(model, optimizer, scheduler, x, 4)
    first = training_bits(model, optimizer, scheduler)
    assert first != at_copy
    for _ in range(2):  # the copy itself is never written to
        state.copy_back(saved)
        assert training_bits(model, optimizer, scheduler) == at_copy
        train(model, optimizer, scheduler, x, 4)
        assert training_bits(model, optimizer, scheduler) == first


def test_restore_keeps_identities(make_tied):
    model = make_tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainingState(model, optimizer)
    saved = state.copy_out()
    pointers = [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        model.embed.weight.zero_()
    state.copy_back(saved)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert model.tied.weight is model.embed.weight
    assert not model.frozen.weight.requires_grad
    assert model.embed.weight.abs().sum() > 0


def test_all_generators_come_back():
    model = torch.nn.Linear(1, 1)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    saved = state.copy_out()
    first = torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)], random.gauss(0, 1)
    state.copy_back(saved)
    again = torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)], random.gauss(0, 1)
    assert first == again


def test_scaler_and_extra_state_come_back():
    class Counter(torch.nn.Linear):
        count = 0

        def get_extra_state(self):
            return {"count": self.count}

        def set_extra_state(self, state):
            self.count = state["count"]

    model = Counter(2, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    model.count = 3
    saved = state.copy_out()
    model.count = 9
    scaler.scale(torch.ones(()))
    scaler.update(new_scale=2.0)
    state.copy_back(saved)
    assert model.count == 3 and scaler.get_scale() == 8.0


def test_buffer_that_changes_its_size_comes_back():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("cache", None)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    empty = state.copy_out()
    model.cache = torch.ones(5)
    full = state.copy_out()
    model.cache = torch.zeros(7)
    state.copy_back(full)
    assert model.cache.tolist() == [1.0] * 5
    state.copy_back(empty)
    assert model.cache is None


def test_lazy_parameters_need_a_pass_first():
    model = torch.nn.LazyLinear(3)
    with pytest.raises(ValueError, match="one batch first"):
        TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="no parameters"):
        TrainingState(torch.nn.ReLU(), torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1))


def test_copies_of_another_device_or_dtype_stay_exact(make_tied, training_bits):
    model = make_tied().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    state = TrainingState(model, optimizer, schedulers=[scheduler], device="cpu")
    x = torch.randn(8, 6, dtype=torch.bfloat16)
    train(model, optimizer, scheduler, x, 2)
    saved, before = state.copy_out(), training_bits(model, optimizer, scheduler)
    train(model, optimizer, scheduler, x, 2)
    state.copy_back(saved)
    assert training_bits(model, optimizer, scheduler) == before


def test_durable_round_trip(tmp_path, make_tied, bits):
    model = make_tied().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedulers = [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])]
    train(model, optimizer, schedulers[0], torch.randn(8, 6, dtype=torch.bfloat16), 2)
    state = TrainingState(model, optimizer, schedulers=schedulers)
    saved = state.copy_out()
    plain = checkpoint.to_plain({"training": saved, "values": {"learning_rate": 0.1}, "loop": (3, 0)})
    with atn.Snapshots(tmp_path / "run") as store:
        serialization.save(store, 7, plain, wait=True)
        step, tree = serialization.restore(store)
    assert step == 7 and tree["loop"] == (3, 0)
    back = checkpoint.from_plain(tree)["training"]
    assert bits({k: v for k, v in back.items() if k != "rng"}) == bits({k: v for k, v in saved.items() if k != "rng"})
    state.check(back)
    state.copy_back(back)
    again = torch.rand(2)
    random_state.restore(saved["rng"])
    assert torch.equal(again, torch.rand(2))
    other = torch.nn.Linear(4, 2)
    with pytest.raises(atn.SnapshotMismatchError, match="another model"):
        TrainingState(other, torch.optim.SGD(other.parameters(), lr=0.1)).check(back)


def test_durable_refuses_what_needs_pickle(tmp_path):
    with atn.Snapshots(tmp_path / "run") as store:
        assert serialization.restore(store) is None
        with pytest.raises(TypeError, match="without pickle"):
            serialization.save(store, 1, {"model": object()})
