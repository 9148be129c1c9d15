"""Every scheduler of torch: the tuned rate is in force under the scheduler's shape, or there is a clear refusal."""

import inspect
import math
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch.optim import lr_scheduler as lrs  # noqa: E402

from autotunenet_torch import AutoTuneNet, TrainingState, lr_schedulers, schedule_end, targets  # noqa: E402
from autotunenet_torch.warm_up import WarmUp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Your scheduler does not fall")

MAKE = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: min(1.0, step / 4)),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 5, 5]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, factor=0.5, total_iters=4),
    "LinearLR": lambda o: lrs.LinearLR(o, start_factor=0.25, total_iters=5),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, total_iters=9, power=2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 5, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 4, eta_min=0.01),
    "CyclicLR": lambda o: lrs.CyclicLR(o, base_lr=0.02, max_lr=0.1, step_size_up=3),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=3), lrs.CosineAnnealingLR(o, 6)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ExponentialLR(o, 0.9), lrs.StepLR(o, 4)]),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1, factor=0.5, min_lr=0.01),
}
REFUSED = {"OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=0.1, total_steps=20)}
ABSTRACT = {"LRScheduler", "_LRScheduler"}
STEPS = 100
VALUES = [0.1, 0.1, 0.02, 0.02, 0.3, 0.3, 0.3, 0.05, 0.05, 0.05, 0.05, 0.05, 0.2, 0.2]


def make_optimizer():
    a, b = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    return torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.05}], lr=0.1, momentum=0.9)


def advance(optimizer, scheduler):
    optimizer.step()
    if isinstance(scheduler, lrs.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def shape_of(make):
    """Rates with nobody tuning, as shares of the rate tuned: 0.1 in all examples."""
    optimizer = make_optimizer()
    scheduler = make(optimizer)
    rates = []
    for _ in VALUES:
        rates.append([group["lr"] / 0.1 for group in optimizer.param_groups])
        advance(optimizer, scheduler)
    return rates


def test_the_table_is_complete():
    here = {
        name
        for name, value in inspect.getmembers(lrs, inspect.isclass)
        if issubclass(value, lrs.LRScheduler) and value.__module__ == lrs.__name__
    }
    assert here == set(MAKE) | set(REFUSED) | ABSTRACT


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("side", ["before", "after"])
def test_tuned_rate_is_in_force(name, side):
    """Rate at each step = tuned value x the scheduler's own shape, on either side of the scheduler's step."""
    optimizer = make_optimizer()
    scheduler = MAKE[name](optimizer)
    schedulers = lr_schedulers.as_list(scheduler)
    target = targets.RateTarget(optimizer, [0, 1], schedulers)
    seen, expected = [], []
    for step, (value, shape) in enumerate(zip(VALUES, shape_of(MAKE[name]), strict=True)):
        if step == 0 or side == "after":
            target.write(value)
        seen.append([group["lr"] for group in optimizer.param_groups])
        expected.append([share * value for share in shape])
        optimizer.step()
        if side == "before" and step + 1 < len(VALUES):
            target.write(VALUES[step + 1])
        if isinstance(scheduler, lrs.ReduceLROnPlateau):
            scheduler.step(1.0)
        else:
            scheduler.step()
    assert torch.tensor(seen).allclose(torch.tensor(expected), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
@pytest.mark.parametrize("name", MAKE)
def test_restore_then_apply(name):
    """A state put back brings the scheduler's place back, and the rate tuned since stays in force."""
    optimizer = make_optimizer()
    model = torch.nn.ParameterList(p for group in optimizer.param_groups for p in group["params"])
    scheduler = MAKE[name](optimizer)
    target = targets.RateTarget(optimizer, [0, 1], lr_schedulers.as_list(scheduler))
    state = TrainingState(model, optimizer, schedulers=[scheduler])
    target.write(0.1)
    for _ in range(3):
        advance(optimizer, scheduler)
    saved, applied = state.copy_out(), target.applied
    rates = [group["lr"] for group in optimizer.param_groups]
    advance(optimizer, scheduler)
    target.write(0.02)
    advance(optimizer, scheduler)
    state.copy_back(saved)
    target.applied = applied
    target.write(0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2 * rate for rate in rates])


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_rates_are_in_force_again_whether_loaded_before_attach_or_after(name, is_late):
    optimizer = make_optimizer()
    scheduler = MAKE[name](optimizer)
    target = targets.RateTarget(optimizer, [0, 1], [scheduler])
    for value in (0.1, 0.02, 0.02, 0.3, 0.3):
        target.write(value)
        advance(optimizer, scheduler)
    fresh = make_optimizer()
    again = MAKE[name](fresh)
    late = targets.RateTarget(fresh, [0, 1], [again])
    fresh.load_state_dict(optimizer.state_dict())
    again.load_state_dict(scheduler.state_dict())
    other = late if is_late else targets.RateTarget(fresh, [0, 1], [again])
    if not is_late:
        other.write(0.7)  # where a run that is attached begins
    other.loaded(target.standing())
    for value in (0.3, 0.05, 0.05):
        for each, made, made_scheduler in ((target, optimizer, scheduler), (other, fresh, again)):
            each.write(value)
            advance(made, made_scheduler)
        assert [group["lr"] for group in fresh.param_groups] == pytest.approx(
            [group["lr"] for group in optimizer.param_groups], rel=1e-12
        )


@pytest.mark.parametrize("name", [name for name in MAKE if name != "ReduceLROnPlateau"])
def test_what_is_loaded_after_attach_is_seen_at_the_next_value(name):
    """As where training goes on from a checkpoint that had no tuner."""
    optimizer = make_optimizer()
    scheduler = MAKE[name](optimizer)
    target = targets.RateTarget(optimizer, [0, 1], [scheduler])
    for value in (0.1, 0.02):
        target.write(value)
        advance(optimizer, scheduler)
    fresh = make_optimizer()
    again = MAKE[name](fresh)
    late = targets.RateTarget(fresh, [0, 1], [again])
    late.write(0.7)
    fresh.load_state_dict(optimizer.state_dict())
    again.load_state_dict(scheduler.state_dict())
    for each in (target, late):
        each.write(0.3)
    assert [group["lr"] for group in fresh.param_groups] == pytest.approx(
        [group["lr"] for group in optimizer.param_groups], rel=1e-12
    )


@pytest.mark.parametrize("is_optimizer", [False, True])
@pytest.mark.parametrize("name", [name for name in MAKE if name != "ReduceLROnPlateau"])
def test_loading_one_of_optimizer_and_scheduler_after_attach_is_refused(name, is_optimizer):
    optimizer = make_optimizer()
    scheduler = MAKE[name](optimizer)
    target = targets.RateTarget(optimizer, [0, 1], [scheduler])
    target.write(0.02)
    advance(optimizer, scheduler)
    fresh = make_optimizer()
    again = MAKE[name](fresh)
    first, then = (again, fresh) if is_optimizer else (fresh, again)
    saved = {id(fresh): optimizer.state_dict(), id(again): scheduler.state_dict()}
    first.load_state_dict(saved[id(first)])
    late = targets.RateTarget(fresh, [0, 1], [again])
    late.write(0.1)
    then.load_state_dict(saved[id(then)])
    with pytest.raises(ValueError, match="loaded after attach"):
        late.loaded(target.standing())


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
@pytest.mark.parametrize("name", [name for name in MAKE if name != "ReduceLROnPlateau"])
@pytest.mark.parametrize("side", ["before", "after"])
def test_ends_with_the_budget(name, side):
    """Steps that rounds discard count: in the end the scheduler stands where it would without a tuner."""
    optimizer = make_optimizer()
    plain = MAKE[name](optimizer)
    for _ in range(STEPS):
        advance(optimizer, plain)
    shape = [group["lr"] / 0.1 for group in optimizer.param_groups]

    optimizer = make_optimizer()
    model = torch.nn.ParameterList(p for group in optimizer.param_groups for p in group["params"])
    scheduler = MAKE[name](optimizer)
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)}, total_steps=STEPS)
    tuner.attach(model, optimizer, scheduler)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = sum((p - 3.0).square().sum() for p in model)
        loss.backward()
        optimizer.step()
        if side == "after":
            scheduler.step()
        tuner.step(loss)
        if side == "before":
            scheduler.step()
    assert tuner.history.summary["discarded_steps"] > 0 and tuner.history.space["learning_rate"]["is_scheduled"]
    height = tuner._host.targets["learning_rate"].applied
    expected = [share * height for share in shape]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_gives_the_reason(name):
    optimizer = make_optimizer()
    with pytest.raises(ValueError, match=f"{name} cannot be tuned.*absolute"):
        lr_schedulers.as_list(REFUSED[name](optimizer))


def test_other_refusals():
    optimizer = make_optimizer()
    with pytest.raises(ValueError, match="SWALR cannot be tuned"):
        lr_schedulers.as_list(torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05))
    with pytest.raises(TypeError, match=r"torch\.optim\.lr_scheduler"):
        lr_schedulers.as_list("cosine")
    model = torch.nn.ParameterList(p for group in optimizer.param_groups for p in group["params"])
    tuner = AutoTuneNet({"momentum": (0.5, 0.99)}, total_steps=100)
    with pytest.raises(ValueError, match="cycle_momentum=False"):
        tuner.attach(model, optimizer, MAKE["CyclicLR"](optimizer))


def test_two_decays_do_not_multiply():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)}, total_steps=100)
    tuner.attach(model, optimizer, lrs.ConstantLR(optimizer, factor=0.5, total_iters=1000))
    assert tuner._session.controller.tuner.core.shape.form == "none"
    assert tuner.hyperparams["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tuner.attach(model, optimizer)
    assert tuner._session.controller.tuner.core.shape.form == "hold"


def tuned_beside(warm_up, total=400):
    """Rates that a run on one fixed batch picks beside a linear warm-up of so many steps, and those it is fed with."""
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = x @ torch.arange(1.0, 7.0)[:, None] + 0.1 * torch.randn(64, 1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scheduler = lrs.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(warm_up, 1)))
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)}, total_steps=total)
    tuner.attach(model, optimizer, scheduler)
    fed, claimed, shaped = [], [], []
    optimizer.register_step_pre_hook(lambda *_: fed.append(optimizer.param_groups[0]["lr"]))
    for _ in range(total):
        claimed.append(tuner._host.values["learning_rate"] if tuner._session.controller.phase else None)
        shaped.append(tuner.hyperparams["learning_rate"])
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        tuner.step(loss)
    assert fed == pytest.approx(shaped)
    return tuner, fed, claimed, optimizer.param_groups[0]["lr"]


@pytest.mark.filterwarnings("ignore:The best learning_rate lies at the upper bound")
def test_forks_during_a_warm_up_are_compared_at_the_rates_they_claim():
    picked = []
    for warm_up in (0, 8, 40, 80):
        tuner, fed, claimed, last = tuned_beside(warm_up)
        for rate, claim in zip(fed, claimed, strict=True):
            assert claim is None or rate == pytest.approx(claim)
        # After the rounds the scheduler is where it would be without a tuner.
        assert last == pytest.approx(tuner.best_hyperparams["learning_rate"])
        picked.append(math.log10(tuner.best_hyperparams["learning_rate"]))
    assert max(picked) - min(picked) <= 0.25


def test_a_decay_of_the_users_own_is_no_warm_up():
    """Forks of a later round are held under it."""
    optimizer = make_optimizer()
    for name in ("CosineAnnealingLR", "ExponentialLR", "StepLR"):
        scheduler = MAKE[name](optimizer)
        assert WarmUp(optimizer, [scheduler], [0, 1], steps=100).end == 0


@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
@pytest.mark.parametrize("name", MAKE)
def test_looking_ahead_leaves_a_scheduler_as_it_was(name):
    optimizer = make_optimizer()
    scheduler = MAKE[name](optimizer)
    before = repr(scheduler.state_dict()), repr(optimizer.state_dict())
    end = WarmUp(optimizer, [scheduler], [0, 1], steps=STEPS).end
    assert (repr(scheduler.state_dict()), repr(optimizer.state_dict())) == before
    assert end == {"LambdaLR": 4, "LinearLR": 5, "ConstantLR": 4, "CyclicLR": 3, "SequentialLR": 3}.get(name, 0)


@pytest.mark.parametrize("name", ["StepLR", "CosineAnnealingLR", "ReduceLROnPlateau"])
def test_a_scheduler_that_is_not_handed_over_is_refused(name):
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments = {"StepLR": (5,), "CosineAnnealingLR": (50,), "ReduceLROnPlateau": ()}[name]
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, *arguments)
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)}, total_steps=100)
    with pytest.raises(ValueError, match=f"was not given: {name}"):
        tuner.attach(model, optimizer)
    tuner.attach(model, optimizer, scheduler)
    del scheduler
    tuner._release()
    tuner.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


def chained(optimizer, after):
    warm = lrs.LinearLR(optimizer, 0.1, total_iters=20)
    return lrs.SequentialLR(optimizer, [warm, after], [20])


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda opt: lrs.LambdaLR(opt, lambda step: min(1.0, step / 20)), 1.0),
        (lambda opt: lrs.LambdaLR(opt, lambda step: 1.0 - 0.4 * step / 500), 0.6),
        (lambda opt: lrs.LinearLR(opt, 0.1, total_iters=20), 1.0),
        (lambda opt: lrs.StepLR(opt, 400, 0.7), 0.7),
        (lambda opt: chained(opt, lrs.ConstantLR(opt, 1.0, 1)), 1.0),
        (lambda opt: lrs.LambdaLR(opt, lambda step: 1.0 - step / 500), None),
        (lambda opt: lrs.LambdaLR(opt, lambda epoch: 0.5 + 0.5 * math.cos(math.pi * epoch / 10)), None),
        (lambda opt: lrs.LambdaLR(opt, lambda epoch: [0.1, 1.0, 1.0][epoch]), None),
        (lambda opt: lrs.CosineAnnealingLR(opt, 500), None),
        (lambda opt: chained(opt, lrs.ExponentialLR(opt, 0.99)), None),
        (lambda opt: lrs.ReduceLROnPlateau(opt), None),
    ],
)
def test_a_rate_that_stays_high_to_the_end_is_seen(make, left):
    """What falls, may fall, or is stepped once an epoch does not count; nothing of the scheduler is touched."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.3)
    scheduler = make(optimizer)
    before = str(scheduler.state_dict()), optimizer.param_groups[0]["lr"]
    share = schedule_end.share_left([scheduler], 500)
    assert share == (left if left is None else pytest.approx(left))
    assert (str(scheduler.state_dict()), optimizer.param_groups[0]["lr"]) == before


@pytest.mark.parametrize(("space", "decay", "is_told"), [("learning_rate", None, True), ("momentum", None, False),
                                                        ("learning_rate", "linear", False)])  # fmt: skip
def test_a_scheduler_that_only_warms_up_is_told_of_once(space, decay, is_told):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.5)
    scheduler = lrs.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    tuner = AutoTuneNet({space: (0.1, 0.9)}, decay=decay)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        tuner.attach(model, optimizer, scheduler, total_steps=500)
    told = [str(w.message) for w in seen if "does not fall" in str(w.message)]
    assert len(told) == is_told and all("warmup_steps=N" in message for message in told)
