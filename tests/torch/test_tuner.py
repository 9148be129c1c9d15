"""The tuner in a loop of the user's own."""

import copy
import io
import math
import warnings

import pytest

torch = pytest.importorskip("torch")

from autotunenet_torch import AutoTuneNet  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The best .* lies at")
SPACE = {"learning_rate": (1e-4, 1.0)}
BOTH = {**SPACE, "dropout": (0.0, 0.5)}
STEPS = 160


def make(space=SPACE, **kwargs):
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Dropout(0.0), torch.nn.Linear(8, 3)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    return model, optimizer, AutoTuneNet(space, **{"total_steps": STEPS, **kwargs})


def loss_of(model, x):
    return torch.nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))


def train_one(model, optimizer, tuner, *, spoil=False):
    loss = loss_of(model, torch.randn(16, 6))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if spoil:
        with torch.no_grad():
            model[0].weight.fill_(math.nan)
        loss = loss * math.nan
    tuner.step(loss)
    return float(loss.detach())


def test_repairs_a_terrible_rate():
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    for _ in range(STEPS):
        train_one(model, optimizer, tuner)
    torch.manual_seed(5)
    assert loss_of(model.eval(), torch.randn(512, 6)).item() < 0.6  # 1.1 at the start, and at 1e-4 throughout
    assert tuner.best_hyperparams["learning_rate"] > 1e-2
    history = tuner.history
    assert history.summary["steps"] == STEPS and history.summary["share_discarded"] <= 0.4
    assert history.rounds[0]["chosen"]["learning_rate"] >= 0.99 * tuner.best_hyperparams["learning_rate"]
    assert history.to_dict()["records"][0].keys() >= {"step", "loss", "phase", "fork", "is_kept", "learning_rate"}
    assert len(history.to_pandas()) == len(history.records)
    assert float(history.schedule()["learning_rate"](0)) > 0


def test_an_optimizer_that_never_steps_is_told_of():
    model, optimizer, tuner = make()
    tuner.attach(model, torch.optim.SGD(model.parameters(), lr=1e-4))
    with pytest.warns(UserWarning, match="has made no step in the first 60 calls") as told:
        for _ in range(STEPS):
            train_one(model, optimizer, tuner)
    assert len([warning for warning in told if "call" in str(warning.message)]) == 1


def test_steps_that_the_tuner_never_hears_of_are_told_of_and_stay(bits):
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    with pytest.warns(UserWarning, match="made 60 steps, and the tuner has heard of 0") as told:
        for _ in range(STEPS):
            loss_of(model, torch.randn(16, 6)).backward()
            optimizer.step()
    assert len(told) == 1
    trained = bits(model.state_dict())
    tuner.finish()
    assert bits(model.state_dict()) == trained


def test_a_tuner_takes_over_from_one_that_was_left():
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    for _ in range(10):
        train_one(model, optimizer, tuner)
    other = AutoTuneNet(SPACE, STEPS)
    other.attach(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The best .* lies at")
        for _ in range(STEPS):
            train_one(model, optimizer, other)
    assert other.history.summary["steps"] == STEPS and tuner.history.summary["steps"] == 10
    # The one that was left moves nothing any more.
    with pytest.raises(RuntimeError, match="another tuner was attached to this optimizer"):
        train_one(model, optimizer, tuner)
    tuner.attach(model, optimizer)
    train_one(model, optimizer, tuner)


def test_whose_metrics_are_of_the_training_is_told():
    """An early stopping of the user's own that looks at those alone."""
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    seen = []
    for _ in range(STEPS):
        seen.append(tuner.in_round)
        train_one(model, optimizer, tuner)
    phases = [row["phase"] for row in tuner.history.to_dict()["records"]]
    assert seen == [phase != "train" for phase in phases] and seen[0] and not seen[-1]


def test_a_run_that_ends_before_it_is_tuned_says_so():
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    for step in range(20):
        train_one(model, optimizer, tuner)
        if step % 5 == 4:
            tuner.validate(1.0)
    with pytest.warns(UserWarning, match=f"ends in its first round of forks, after 20 of {STEPS} steps.*in_round"):
        tuner.finish()
    with pytest.raises(RuntimeError, match=r"ended by finish after 20 steps.*attach"):
        train_one(model, optimizer, tuner)


def test_a_rate_in_a_tensor_may_stand_at_a_bound():
    for bound in (1e-4, 0.1):
        model, _, tuner = make({"learning_rate": (1e-4, 0.1)})
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(bound))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tuner.attach(model, optimizer)
        assert tuner._session.controller.tuner.initial["learning_rate"] == pytest.approx(bound)


def test_calls_for_parts_of_a_step_are_told_of():
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    with pytest.warns(UserWarning, match="called 60 times, and the optimizer made 15 steps"):
        for call in range(60):
            loss = loss_of(model, torch.randn(16, 6))
            (loss / 4).backward()
            if call % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
            tuner.step(loss)


def test_a_metric_that_is_never_finite_is_told_of_and_tunes_as_none_does():
    found = []
    for validate in (None, lambda: math.nan):
        torch.manual_seed(3)
        model, optimizer, tuner = make()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            tuner.attach(model, optimizer, validate=validate)
            for _ in range(STEPS):
                train_one(model, optimizer, tuner)
        assert any("validation metrics were not finite" in str(w.message) for w in told) == (validate is not None)
        found.append([row["chosen"] for row in tuner.history.rounds])
        assert "a little lower, since no validation metric has judged" in tuner.history.rounds[0]["verdict"]
    assert found[0] == found[1]


def test_forks_start_bit_for_bit_alike(training_bits, bits):
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    restore, starts = tuner._host.restore, []

    def spy(slot, *, rewinds):
        restore(slot, rewinds=rewinds)
        now = training_bits(model, optimizer)
        assert now["model"] == bits({k: v for k, v in slot["training"]["model"].items() if k in now["model"]})
        assert now["rng"] == bits(slot["training"]["rng"]["torch"])
        momenta = {int(k): v for k, v in slot["training"]["optimizer"][0]["state"].items()}
        assert now["optimizer"] == bits(momenta)
        starts.append(rewinds)

    tuner._host.restore = spy
    for _ in range(STEPS):
        train_one(model, optimizer, tuner)
    assert len(starts) >= 2


def test_rolls_back_from_nan(bits):
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    for step in range(STEPS):
        train_one(model, optimizer, tuner, spoil=step == 90)
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert tuner.history.summary["rollbacks"] == 1
    assert any(event["kind"] == "rollback" for event in tuner.history.events)


def test_nan_from_the_very_first_step():
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(5):
        train_one(model, optimizer, tuner, spoil=True)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for _ in range(STEPS - 5):
        train_one(model, optimizer, tuner)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("stop_at", [9, 30, 120])
def test_a_checkpoint_goes_on_bit_for_bit(stop_at, training_bits):
    """Inside the sweep, a round of forks and outside; the checkpoint loads without unpickling code."""
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    for _ in range(stop_at):
        train_one(model, optimizer, tuner)
    file = io.BytesIO()
    checkpoint = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "tuner": tuner.state_dict(),
        "rng": torch.get_rng_state(),
    }  # fmt: skip
    torch.save(checkpoint, file)
    losses = [train_one(model, optimizer, tuner) for _ in range(stop_at, STEPS)]
    end = training_bits(model, optimizer)

    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    model, optimizer, tuner = make()
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    tuner.attach(model, optimizer)
    tuner.load_state_dict(checkpoint["tuner"])
    torch.set_rng_state(checkpoint["rng"])
    assert [train_one(model, optimizer, tuner) for _ in range(stop_at, STEPS)] == losses
    assert training_bits(model, optimizer) == end
    assert tuner.history.summary["steps"] == STEPS


def test_state_of_another_space_or_budget_is_refused():
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    state = tuner.state_dict()
    other = AutoTuneNet({"learning_rate": (1e-4, 0.5)}, total_steps=STEPS)
    other.attach(model, optimizer)
    with pytest.raises(ValueError, match=r"another search space: .*1\.0, log.* in the state, .*0\.5, log"):
        other.load_state_dict(state)
    other = AutoTuneNet(SPACE, total_steps=STEPS + 1)
    other.attach(model, optimizer)
    with pytest.raises(ValueError, match=r"run of 160 steps.*extend=True"):
        other.load_state_dict(state)


def test_a_state_goes_on_to_another_budget_on_request():
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    for _ in range(120):
        train_one(model, optimizer, tuner)
    longer = AutoTuneNet(SPACE, total_steps=2 * STEPS)
    longer.attach(model, optimizer)
    longer.load_state_dict(tuner.state_dict(), extend=True)
    for _ in range(2 * STEPS - 120):
        train_one(model, optimizer, longer)
    history = longer.history
    assert history.summary["steps"] == history.summary["total_steps"] == 2 * STEPS
    assert [event["step"] for event in history.events if event["kind"] == "extended"] == [120]


def test_validation_is_asked_for_and_used():
    model, optimizer, tuner = make(BOTH, mode="max", max_share=0.8, total_steps=300)
    asked, x = [], torch.randn(64, 6)

    def validate():
        asked.append(len(asked))
        return -float(loss_of(model, x).detach())

    tuner.attach(model, optimizer, validate=validate)
    for _ in range(300):
        train_one(model, optimizer, tuner)
    assert len(asked) == tuner.history.summary["evals"] > 4
    assert {row["scored_by"] for row in tuner.history.rounds} == {"validation"}
    kinds = [row["kind"] for row in tuner.history.rounds]
    assert kinds[0] == "fast" and kinds[-1] == "slow"


class Rounding(torch.optim.SGD):
    """Holds three times its parameters while it is evaluated, and a third of that is not always what it was."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.param_groups[0]["train_mode"] = True

    def _turn(self, mode, factor):
        if self.param_groups[0]["train_mode"] != mode:
            for p in self.param_groups[0]["params"]:
                p.data.mul_(factor)
        self.param_groups[0]["train_mode"] = mode

    def train(self):
        self._turn(True, 1 / 3)

    def eval(self):
        self._turn(False, 3.0)


def test_the_measurement_at_the_beginning_changes_nothing(bits):
    model = torch.nn.Linear(64, 3)
    optimizer = Rounding(model.parameters())

    def validate():
        optimizer.eval()
        value = model.weight.square().mean()
        optimizer.train()
        return value

    before = bits(model.state_dict())
    AutoTuneNet(SPACE, total_steps=STEPS).attach(model, optimizer, validate=validate)
    assert bits(model.state_dict()) == before
    validate()
    assert bits(model.state_dict()) != before


def test_validation_by_hand():
    model, optimizer, tuner = make(BOTH)
    tuner.attach(model, optimizer)
    tuner.validate(2.0)
    for _ in range(STEPS):
        train_one(model, optimizer, tuner)
        if tuner.wants_validation:
            tuner.validate(torch.tensor(1.5))
            assert not tuner.wants_validation
    assert {row["scored_by"] for row in tuner.history.rounds} == {"validation"}


def test_slow_hyperparameters_without_validation_are_explained():
    model, optimizer, tuner = make(BOTH)
    tuner.attach(model, optimizer)
    with pytest.warns(UserWarning, match=r"dropout stays as it starts.*validation metric"):
        for _ in range(STEPS):
            train_one(model, optimizer, tuner)
    assert {row["kind"] for row in tuner.history.rounds} == {"fast"}


def test_ends_with_the_best_state_when_stopped_inside_a_round():
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    while not (tuner._session.controller.phase == 2 and int(tuner._session.controller.state.round.kept) >= 0):
        train_one(model, optimizer, tuner)
    train_one(model, optimizer, tuner)
    kept = tuner._session.kept["training"]["model"]["0.weight"].clone()
    assert not torch.equal(kept, model[0].weight)
    tuner.finish()
    assert torch.equal(kept, model[0].weight)


def test_bad_input():
    model, optimizer, tuner = make()
    with pytest.raises(RuntimeError, match="attach"):
        tuner.step(1.0)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        tuner.attach(model.parameters(), optimizer)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        tuner.attach(model, "adam")
    with pytest.raises(ValueError, match="at least 40"):
        tuner.attach(model, optimizer, total_steps=10)
    with pytest.raises(ValueError, match="outside"):
        AutoTuneNet(SPACE, initial={"learning_rate": 7.0})
    for options, error, says in [
        ({"initial": 1e-3}, TypeError, "initial must be a mapping"),
        ({"targets": [len]}, TypeError, "targets must map names"),
        ({"seed": None}, ValueError, "seed must be an integer"),
        ({"seed": 1.5}, ValueError, "seed must be an integer"),
        ({"max_share": "x"}, ValueError, "max_share must lie"),
        ({"snapshot_device": "gpu"}, ValueError, "snapshot_device must name a device"),
        ({"snapshot_device": "meta"}, ValueError, "snapshot_device must name a device"),
    ]:
        with pytest.raises(error, match=says):
            AutoTuneNet(SPACE, **options)
    with pytest.raises(TypeError, match=r"'momentum' is a number; got the options \['0.8', '0.9'\].*YAML"):
        make({"momentum": ["0.8", "0.9"]})[2].attach(model, optimizer)
    tuner.attach(model, optimizer)
    with pytest.raises(TypeError, match="shape"):
        tuner.step(torch.ones(2))
    with pytest.raises(TypeError, match="number"):
        tuner.step("low")
    _, _, other = make()
    with pytest.raises(TypeError, match=r"what validate returns must be a number.*NoneType"):
        other.attach(model, torch.optim.SGD(model.parameters(), lr=0.01), total_steps=100, validate=lambda: None)
    with pytest.raises(RuntimeError, match="copied or pickled tuner is not"):
        _ = copy.deepcopy(tuner).history


def test_steps_beyond_the_budget_are_told_once():
    model, optimizer, tuner = make()
    tuner.attach(model, optimizer)
    for _ in range(STEPS):
        train_one(model, optimizer, tuner)
    with pytest.warns(UserWarning, match="budget is spent") as caught:
        for _ in range(3):
            train_one(model, optimizer, tuner)
    assert len(caught) == 1


def test_open_ended():
    model, optimizer, _ = make()
    tuner = AutoTuneNet(SPACE)
    tuner.attach(model, optimizer)
    for _ in range(330):
        train_one(model, optimizer, tuner)
    assert tuner.history.summary["rounds"] >= 1


def overflowing(stop_at=None):
    """A loop whose loss scale is too large by far at the start. Returns its state and how often the scale fell."""
    torch.manual_seed(0)
    model, optimizer, tuner = make()
    scaler, fallen = torch.amp.GradScaler("cpu", init_scale=2.0**126), 0
    tuner.attach(model, optimizer, scaler=scaler)
    for step in range(STEPS):
        if step == stop_at:
            mine = tuner.state_dict()
            state = copy.deepcopy([part.state_dict() for part in (model, optimizer, scaler)])
            model, optimizer, tuner = make()
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
            for part, saved in zip((model, optimizer, scaler), state, strict=False):
                part.load_state_dict(saved)
            tuner.attach(model, optimizer, scaler=scaler)
            tuner.load_state_dict(mine)
            held = copy.deepcopy(mine)
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = loss_of(model, torch.randn(16, 6))
        before = scaler.get_scale()
        scaler.scale(2.0**10 * loss).backward()  # steps are skipped until the scale has come down
        scaler.step(optimizer)
        scaler.update()
        fallen += scaler.get_scale() < before
        tuner.step(loss)
    # What was loaded stays as it was.
    assert stop_at is None or mine["saved"]["training"]["scaler"] == held["saved"]["training"]["scaler"]
    return model, tuner, fallen


def test_gradient_scaler_skips_are_no_failures_and_happen_once():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The best .* lies at|AutoTuneNet: the best")
        _, tuner, fallen = overflowing()
    assert tuner.history.summary["rollbacks"] == 0 and len(tuner.history.rounds[0]["forks"]) >= 2
    assert 5 <= fallen <= 15


@pytest.mark.parametrize("stop_at", [2, 30])
def test_a_run_with_a_gradient_scaler_goes_on_bit_for_bit(stop_at, bits):
    """Before the first step that does not overflow, and after."""
    (one, _, _), (other, _, _) = overflowing(), overflowing(stop_at)
    assert bits(one.state_dict()) == bits(other.state_dict())
