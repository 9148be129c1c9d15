"""Steps whose gradients are not finite do not happen."""

import math

import pytest

torch = pytest.importorskip("torch")

from autotunenet_torch import AutoTuneNet  # noqa: E402
from autotunenet_torch.finite import gradients_are_finite  # noqa: E402
from autotunenet_torch.step_guard import StepGuard  # noqa: E402

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1),
}


def backward(model, scale=1.0):
    model.zero_grad()
    loss = model(torch.randn(8, 3)).square().mean()
    (loss * scale).backward()
    return loss


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("has_closure", [False, True])
def test_no_parameter_and_no_moment_is_touched(name, has_closure, bits):
    if name == "lbfgs" and not has_closure:
        pytest.skip("needs a closure")
    model = torch.nn.Linear(3, 2)
    optimizer = OPTIMIZERS[name](model.parameters())
    guard = StepGuard([optimizer], watch=lambda optimizer: None)

    def step(scale):
        if has_closure:
            optimizer.step(lambda: backward(model, scale))
        else:
            backward(model, scale)
            optimizer.step()

    step(1.0)
    assert not guard.was_skipped()
    state = {k: v for k, v in optimizer.state_dict()["state"].items() if name != "lbfgs"}
    before = bits([model.state_dict(), state])
    step(math.nan)
    assert guard.was_skipped() and not guard.was_skipped()
    assert bits([model.state_dict(), {k: v for k, v in state.items()}]) == before
    assert all(not p.grad.isfinite().all() for p in model.parameters())
    step(1.0)
    assert not guard.was_skipped() and all(p.isfinite().all() for p in model.parameters())
    guard.release()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_large_gradients_are_finite_and_a_known_loss_counts(bits):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1e-35)
    guard = StepGuard([optimizer], watch=lambda optimizer: None)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e30)  # the norm of these overflows
    before = bits(model.state_dict())
    optimizer.step()
    assert not guard.was_skipped() and bits(model.state_dict()) != before
    before = bits(model.state_dict())
    guard.loss = torch.tensor(math.nan)
    optimizer.step()
    assert guard.was_skipped() and bits(model.state_dict()) == before
    optimizer.step()
    assert not guard.was_skipped()


def test_a_step_that_raises_leaves_the_guard_at_work():
    class Raising(torch.optim.SGD):
        raises = True

        def step(self, closure=None):
            if self.raises:
                raise OSError
            return super().step(closure)

    model = torch.nn.Linear(3, 2)
    optimizer = Raising(model.parameters(), 0.1)
    guard = StepGuard([optimizer], watch=lambda optimizer: None)
    backward(model)
    with pytest.raises(OSError):
        optimizer.step()
    guard.was_skipped()
    optimizer.raises = False
    backward(model, math.nan)
    optimizer.step()
    assert guard.was_skipped() and all(p.isfinite().all() for p in model.parameters())


def test_a_scaler_looks_at_gradients_by_itself():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guard, scaler = StepGuard([optimizer], watch=lambda optimizer: None), torch.amp.GradScaler("cpu", init_scale=4.0)
    for scale in (1.0, math.nan):
        model.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).sum() * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        assert not guard.was_skipped() and all(p.isfinite().all() for p in model.parameters())
    assert scaler.get_scale() == 2.0


STEPS = 240


def run(is_bad, *, model=None, spoil="loss"):
    """A loop of one's own; every gradient, loss and statistic of a bad batch is NaN."""
    torch.manual_seed(3)
    model = model or torch.nn.Sequential(
        torch.nn.Linear(6, 12), torch.nn.BatchNorm1d(12), torch.nn.Tanh(), torch.nn.Linear(12, 3)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)})
    tuner.attach(model, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        x = torch.randn(24, 6)
        y = x[:, :3].argmax(1)
        x = x * math.nan if is_bad(step) and spoil == "input" else x
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        (loss * math.nan if is_bad(step) else loss).backward()
        optimizer.step()
        tuner.step(loss)
    x = torch.randn(600, 6)
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model.eval()(x), x[:, :3].argmax(1))), tuner, model


@pytest.mark.filterwarnings("ignore")
def test_bad_batches_cost_nothing_but_themselves():
    good, _, _ = run(lambda step: False)
    for is_bad, spoil in (
        (lambda step: step % 9 == 4, "input"),
        (lambda step: step % 67 < 6, "input"),
        (lambda step: step % 17 == 16, "loss"),
    ):
        end, tuner, model = run(is_bad, spoil=spoil)
        assert end <= 1.15 * good + 0.01, (end, good)
        assert tuner.history.summary["rollbacks"] == 0
        assert all(b.isfinite().all() for b in model.buffers())


@pytest.mark.filterwarnings("ignore")
def test_a_flood_of_bad_batches_ends_in_a_few_rollbacks():
    end, tuner, _ = run(lambda step: step >= 120, spoil="input")
    assert end < 0.9 and tuner.history.summary["rollbacks"] <= 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_are_looked_at_and_left_as_they_are(bad, dtype, bits):
    good = [torch.tensor([1e-40, -0.0, 3e38]).to(dtype), torch.randn(100, 7).to(dtype).t(), torch.ones(1).expand(5)]
    before = bits(good)
    assert gradients_are_finite([]) and gradients_are_finite(good) and gradients_are_finite(good[:1])
    assert bits(good) == before
    for size in (1, 3, 1001):
        broken = torch.randn(size).to(dtype)
        broken[size // 2] = bad
        assert not gradients_are_finite([*good, broken]) and not gradients_are_finite([good[0], broken])


def test_a_gradient_with_a_graph_of_its_own_stays_usable():
    weight = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad(weight.pow(3).sum(), weight, create_graph=True)
    assert gradients_are_finite([grad])
    assert torch.autograd.grad(grad.pow(2).sum(), weight)[0].isfinite().all()
