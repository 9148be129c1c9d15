"""Copies of a training: everything, bit for bit, and nothing shared."""

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import autotunenet_jax as atn  # noqa: E402
from autotunenet_torch import TrainingState, random_state, serialization  # noqa: E402
from autotunenet_torch.soundness import Soundness  # noqa: E402

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
    copy = {"training": saved, "values": {"learning_rate": 0.1}, "loop": (3, 0)}
    with atn.Snapshots(tmp_path / "run") as store:
        serialization.save(store, 7, copy, wait=True)
        step, tree = serialization.restore(store)
    assert step == 7 and tree["loop"] == (3, 0)
    back = tree["training"]
    assert bits({k: v for k, v in back.items() if k != "rng"}) == bits({k: v for k, v in saved.items() if k != "rng"})
    state.check(back)
    state.copy_back(back)
    again = torch.rand(2)
    random_state.restore(saved["rng"])
    assert torch.equal(again, torch.rand(2))
    other = torch.nn.Linear(4, 2)
    with pytest.raises(atn.SnapshotMismatchError, match="another model"):
        TrainingState(other, torch.optim.SGD(other.parameters(), lr=0.1)).check(back)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(atn.SnapshotMismatchError, match="the optimizer AdamW, and here it is SGD"):
        TrainingState(model, sgd, schedulers=schedulers).check(back)
    with pytest.raises(atn.SnapshotMismatchError, match=r"with 1 learning-rate schedulers, and here there are 0"):
        TrainingState(model, optimizer).check(back)


def test_a_scale_that_is_new_stays_as_it_was_made(make_tied):
    model = make_tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    saved = TrainingState(model, optimizer).copy_out()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with_scale = TrainingState(model, optimizer, scaler=scaler)
    with_scale.check(saved)
    with_scale.copy_back(saved)
    assert scaler.get_scale() == 8.0


def test_durable_refuses_what_needs_pickle(tmp_path):
    with atn.Snapshots(tmp_path / "run") as store:
        assert serialization.restore(store) is None
        with pytest.raises(TypeError, match="without pickle"):
            serialization.save(store, 1, {"model": object()})


class Around(torch.optim.Optimizer):
    """Around another optimizer, with a count of its own and slow weights."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.count, self.slow = 0, [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.count += 1
        if self.count % 3 == 0:
            for p, slow in zip(self.inner.param_groups[0]["params"], self.slow, strict=True):
                p.copy_(slow.lerp_(p, 0.5 / self.count))


class Remembering(torch.optim.SGD):
    """With more in its state_dict than a torch optimizer has, in an object that no copy can see into."""

    class Memory:
        taken = 0

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.memory = self.Memory()

    def step(self, closure=None):
        self.param_groups[0]["lr"] = 0.1 / (1 + self.memory.taken)
        self.memory.taken += 1
        super().step()

    def state_dict(self):
        return {**super().state_dict(), "taken": self.memory.taken}

    def load_state_dict(self, state_dict):
        self.memory.taken = state_dict["taken"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "taken"})


@pytest.mark.parametrize("make", [Around, Remembering])
def test_whatever_an_optimizer_keeps_comes_back(make, bits):
    model, x = torch.nn.Linear(6, 3), torch.randn(8, 6)
    optimizer = make(model.parameters())

    def train():
        for _ in range(4):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    train()
    state = TrainingState(model, optimizer)
    saved = state.copy_out()
    ends = []
    for _ in range(2):
        train()
        ends.append(bits(model.state_dict()))
        state.copy_back(saved)
    assert ends[0] == ends[1]


class Moded(torch.optim.SGD):
    """Doubles its parameters for validation, where a schedule-free optimizer puts averaged ones in their place."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.param_groups[0]["train_mode"] = True

    def _turn(self, mode, factor):
        group = self.param_groups[0]
        if group["train_mode"] != mode:
            for p in group["params"]:
                p.data.mul_(factor)
        group["train_mode"] = mode

    def train(self):
        self._turn(True, 0.5)

    def eval(self):
        self._turn(False, 2.0)


@pytest.mark.parametrize("copied", ["train", "eval"])
@pytest.mark.parametrize("now", ["train", "eval"])
def test_the_mode_of_an_optimizer_is_that_of_the_moment(copied, now):
    model = torch.nn.Linear(3, 2)
    optimizer, weight = Moded(model.parameters()), model.weight.detach().clone()
    state = TrainingState(model, optimizer)
    getattr(optimizer, copied)()
    saved = state.copy_out()
    optimizer.train()
    torch.nn.init.zeros_(model.weight)
    getattr(optimizer, now)()
    state.copy_back(saved)
    assert optimizer.param_groups[0]["train_mode"] == (now == "train")
    assert torch.equal(model.weight, weight if now == "train" else 2.0 * weight)


def test_an_average_beside_the_model_goes_back_with_it(bits):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    state = TrainingState(model, optimizer, aux=[average])

    def train():
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 3)).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)

    train()
    saved = state.copy_out()
    before = bits(average.state_dict())
    train()
    assert bits(average.state_dict()) != before
    state.copy_back(saved)
    assert bits(average.state_dict()) == before


BUFFERS = {
    "expanded": lambda: torch.arange(3.0).view(3, 1).expand(3, 4),
    "coo": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "meta": lambda: torch.empty(4, device="meta"),
    "inference": lambda: torch.inference_mode()(torch.ones)(4),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
}


def dense(tensor):
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_of_every_kind_come_back(kind, tmp_path, bits):
    model = torch.nn.Linear(6, 3)
    model.register_buffer("kept", BUFFERS[kind]())
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1))
    soundness = Soundness(state)
    saved = state.copy_out()
    before = model.kept
    if kind != "meta":
        model.kept = torch.zeros_like(dense(before)) if kind not in ("float8", "quantised") else before.clone()
    for _ in range(2):
        state.copy_back(saved)
        assert model.kept.layout == before.layout and model.kept.dtype == before.dtype
        assert kind in ("meta", "quantised") or bits(dense(model.kept)) == bits(dense(before))
        assert soundness.may_copy()
    if kind == "quantised":
        return
    with atn.Snapshots(tmp_path / "run") as store:
        serialization.save(store, 1, {"kept": saved["model"]["kept"]}, wait=True)
        _, tree = serialization.restore(store)
    assert tree["kept"].layout == before.layout and tree["kept"].shape == before.shape
    assert kind == "meta" or bits(dense(tree["kept"])) == bits(dense(before))


def test_a_group_that_is_added_later_stays(bits):
    model = torch.nn.ModuleList([torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)])
    optimizer = torch.optim.AdamW(model[1].parameters(), lr=0.1)
    state = TrainingState(model, optimizer)
    saved, before = state.copy_out(), bits(model.state_dict())
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.02})
    model[1](model[0](torch.ones(2, 6))).sum().backward()
    optimizer.step()
    state.copy_back(saved)
    assert bits(model.state_dict()) == before and not optimizer.state
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02]


def test_a_parameter_that_cannot_be_written_to_is_refused_by_name():
    model = torch.nn.Linear(2, 2)
    model.wide = torch.nn.Parameter(torch.zeros(1).expand(5))
    with pytest.raises(ValueError, match=r"parameter wide .* cannot be written to in place"):
        TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1))
