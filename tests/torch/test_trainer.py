"""The loop that the adapter owns."""

import functools
import signal

import pytest

torch = pytest.importorskip("torch")

import autotunenet_jax as atn  # noqa: E402
from autotunenet_torch import AutoTuneNet, Trainer  # noqa: E402

cross_entropy = torch.nn.functional.cross_entropy
# What these tests tune, in few ways: each search space is three programs to compile.
SPACE = {"learning_rate": (1e-4, 1.0)}
BOTH = {**SPACE, "dropout": (0.0, 0.5)}
SMOOTHED = {**SPACE, "label_smoothing": (0.0, 0.3)}


def net(dropout=0.1):
    return torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Dropout(dropout),
        torch.nn.Linear(16, 3),
    )  # fmt: skip


def trainer(**kwargs):
    return Trainer(cross_entropy, torch.optim.AdamW, **{"epochs": 10, "progress": False, **kwargs})


def test_the_example(rows, loader):
    tuner = AutoTuneNet(param_space=BOTH)
    run = trainer()
    model = net()
    history = run.fit(model, loader, loader, tuner=tuner)
    assert isinstance(history, atn.History) and history.summary["steps"] == 120
    values = run.validate()
    assert values["loss"] < 0.6 and values["accuracy"] > 0.8
    assert run.best_value <= history.evals[0]["value"] and set(run.best_state) == set(model.state_dict())
    assert any(entry["value"] == pytest.approx(values["loss"]) for entry in history.evals if entry["is_settled"])
    assert run.predict(loader).shape == (192, 3) and run.predict([]) == []
    assert model.training


class Marked(torch.utils.data.Dataset):
    """Rows with a mark of their own and a random augmentation."""

    def __len__(self):
        return 192

    def __getitem__(self, index):
        return torch.full((6,), float(index)) + 0.1 * torch.rand(6), index % 3


@pytest.mark.parametrize("epochs", [15, 30])
def test_forks_see_the_same_batches_and_the_same_noise(epochs):
    """Training goes on from the best fork, on what comes after."""
    seen = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.line = torch.nn.Linear(6, 3)

        def forward(self, x):
            if self.training:
                seen.append((x.sum().item(), torch.rand(()).item()))
            return self.line(x / 200.0)

    loader = torch.utils.data.DataLoader(Marked(), batch_size=16, shuffle=True)
    history = trainer(epochs=epochs).fit(Spy(), loader, tuner=AutoTuneNet(SPACE))
    round_ = history.rounds[0]
    stretches = [round_["sweep"], *([fork["start"], fork["end"]] for fork in round_["forks"])]
    assert len(stretches) >= 3
    longest = max((seen[a:b] for a, b in stretches), key=len)
    for a, b in stretches:
        assert seen[a:b] == longest[: b - a]
    # What training saw between and after the rounds; the forks of a later one share their batches again.
    edges = [round_["end"], *(row[side] for row in history.rounds[1:] for side in ("start", "end")), len(seen)]
    later = [x for a, b in zip(edges[::2], edges[1::2], strict=True) for x in seen[a:b]]
    assert len(set(later)) == len(later)  # afterwards nothing repeats
    best = round_["forks"][round_["best"]]
    assert best["status"] == "kept"
    assert not {x for x, _ in later} & {x for x, _ in longest[: best["steps"]]}


class CrashError(Exception):
    pass


@pytest.mark.parametrize("crash_at", [200, 270])
def test_a_resumed_run_ends_bit_for_bit_alike(tmp_path, rows, crash_at, bits):
    def run(folder, crash_at=None):
        torch.manual_seed(0)
        model, steps = net(), []

        def loss_fn(outputs, targets):
            steps.append(1)
            if len(steps) == crash_at:
                raise CrashError
            return cross_entropy(outputs, targets)

        loader = torch.utils.data.DataLoader(rows, batch_size=16, shuffle=True)
        tuner = AutoTuneNet(BOTH, seed=1)
        fitter = Trainer(
            loss_fn, epochs=10, progress=False, scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.99)
        )
        try:
            if folder is None:
                history = fitter.fit(model, loader, loader, tuner=tuner)
            else:
                with atn.Snapshots(folder, interval_s=0.0, overhead=0.99, space=tuner.space) as store:
                    history = fitter.fit(model, loader, loader, tuner=tuner, snapshots=store)
        except CrashError:
            return None
        return bits(model.state_dict()), history.rounds, history.summary["steps"], history

    expected = run(None)
    # The count is of calls of the loss, validation's included.
    assert run(tmp_path / "run", crash_at=crash_at) is None
    resumed = run(tmp_path / "run")
    assert resumed[:3] == expected[:3]
    assert any(event["kind"] == "resume" for event in resumed[3].events)


def test_snapshots_of_another_model_are_refused(tmp_path, loader):
    trainer(epochs=6).fit(net(), loader, tuner=AutoTuneNet(SPACE), snapshots=tmp_path / "run")
    with pytest.raises(atn.SnapshotMismatchError, match="another model"):
        trainer(epochs=6).fit(torch.nn.Linear(6, 3), loader, tuner=AutoTuneNet(SPACE), snapshots=tmp_path / "run")
    with pytest.raises(ValueError, match="run of 72 steps"):
        trainer(epochs=7).fit(net(), loader, tuner=AutoTuneNet(SPACE), snapshots=tmp_path / "run")


@pytest.mark.parametrize("place", ["train_loader", "val_loader"])
def test_a_data_set_is_no_loader(place, rows, loader):
    loaders = {"train_loader": loader, "val_loader": loader, place: rows}
    with pytest.raises(TypeError, match=f"{place} must be a DataLoader or an iterable of batches; got .*Dataset"):
        trainer().fit(net(), **loaders, tuner=AutoTuneNet(SPACE))


def test_validation_data_that_can_be_read_only_once_are_refused_at_the_start(loader):
    with pytest.raises(TypeError, match=r"val_loader is an iterator.*Give the DataLoader or list itself"):
        trainer(epochs=6).fit(net(), loader, iter(loader), tuner=AutoTuneNet(SPACE))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_with_everything(precision, loader):
    run = trainer(precision=precision, clip_norm=1.0, accumulate=2, epochs=20, eval_every=40)
    history = run.fit(net(), loader, loader, tuner=AutoTuneNet(SPACE))
    assert history.summary["steps"] == 120 and run.validate()["accuracy"] > 0.8
    assert run.scaler.is_enabled() == (precision == "fp16")


@pytest.mark.filterwarnings("ignore:The best")
def test_tunes_batch_size_label_smoothing_and_clipping(loader):
    sizes = []

    class Spy(torch.nn.Linear):
        def forward(self, x):
            if self.training:
                sizes.append(len(x))
            return super().forward(x)

    # Without a rate, beside which the others would be left as they are in so short a run.
    space = {"batch_size": [8, 16, 24], "clip_norm": (0.1, 10.0), "label_smoothing": (0.0, 0.2)}
    tuner = AutoTuneNet(space, initial={"label_smoothing": 0.05})
    run = trainer(epochs=25)
    records = run.fit(Spy(6, 3), loader, loader, tuner=tuner).records
    assert sizes == [row["batch_size"] for row in records] and sizes[0] == 16
    assert {8, 16, 24} >= set(sizes) and len(set(sizes)) > 1
    assert run._loss_options["label_smoothing"] == tuner.hyperparams["label_smoothing"]
    assert run.clip_norm == tuner.hyperparams["clip_norm"] and 0.1 <= run.clip_norm <= 10.0
    assert all(len({row[name] for row in records}) > 1 for name in ("clip_norm", "label_smoothing"))


@pytest.mark.parametrize(
    ("loss_fn", "start"),
    [
        (cross_entropy, 0.0),
        (functools.partial(cross_entropy, label_smoothing=0.1), 0.1),
    ],
)
def test_tuned_label_smoothing_starts_where_the_loss_has_it(loss_fn, start, loader):
    run = Trainer(loss_fn, steps=120, progress=False)
    tuner = AutoTuneNet(SMOOTHED)
    run.fit(net(), loader, loader, tuner=tuner)
    assert tuner.history.records[0]["label_smoothing"] == pytest.approx(start)


@pytest.mark.parametrize("is_module", [False, True])
def test_tuned_label_smoothing_is_left_out_of_validation(is_module, loader):
    loss_fn = torch.nn.CrossEntropyLoss() if is_module else cross_entropy
    run = Trainer(loss_fn, epochs=6, progress=False)
    tuner = AutoTuneNet(SMOOTHED, initial={"label_smoothing": 0.25})
    run.fit(net(), loader, loader, tuner=tuner)
    with torch.no_grad():
        expected = [cross_entropy(run.model.eval()(x), y) for x, y in list(loader)]
    assert run.validate()["loss"] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    trained_with = loss_fn.label_smoothing if is_module else run._loss_options["label_smoothing"]
    assert trained_with == tuner.hyperparams["label_smoothing"] > 0.1


def test_metric_of_ones_own(loader):
    metrics = {"hits": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()}
    tuner = AutoTuneNet(SPACE, mode="max")
    run = trainer(metrics=metrics, restore_best=True)
    model = net()
    history = run.fit(model, loader, loader, tuner=tuner)
    assert run.best_value == pytest.approx(max(row["value"] for row in history.evals if row["is_settled"]), abs=0.01)
    assert run.validate()["hits"] == pytest.approx(run.best_value)
    with pytest.raises(ValueError, match=r"monitor='f1'.*loss, hits"):
        trainer(metrics=metrics, monitor="f1").fit(net(), loader, loader, tuner=AutoTuneNet(SPACE))


def test_compiled_model_is_not_compiled_again_for_new_values(loader):
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    graphs = []
    model = torch.compile(net(), backend="eager")
    tuner = AutoTuneNet(BOTH)
    forward = lambda model, batch: (  # noqa: E731
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"]) or (model(batch[0]), batch[1])
    )
    history = trainer(forward=forward).fit(model, loader, loader, tuner=tuner)
    assert len({row["dropout"] for row in history.records}) > 1
    assert graphs[-1] == 2  # one for training, one for validation


def test_lazy_model_without_a_pass_before(loader):
    model = torch.nn.Sequential(torch.nn.LazyLinear(8), torch.nn.ReLU(), torch.nn.LazyLinear(3))
    history = trainer(epochs=6).fit(model, loader, tuner=AutoTuneNet(SPACE))
    assert history.summary["steps"] == 72


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_after_the_step(loader, number):
    before, steps = signal.getsignal(number), []

    def loss_fn(outputs, targets):
        steps.append(1)
        if len(steps) == 30:
            signal.raise_signal(number)
        return cross_entropy(outputs, targets)

    run = Trainer(loss_fn, epochs=10, progress=False)
    history = run.fit(net(), loader, tuner=AutoTuneNet(SPACE))
    assert signal.getsignal(number) == before
    assert run.is_interrupted and history.summary["steps"] == 30
    assert history.events[-1]["kind"] == "stop" and "after step 30 of 120" in history.events[-1]["message"]


def test_slow_hyperparameters_need_validation_data(loader):
    with pytest.warns(UserWarning, match="dropout stays as it starts.*val_loader"):
        trainer(epochs=6).fit(net(0.3), loader, tuner=AutoTuneNet(BOTH))
    with pytest.raises(ValueError, match="validation data only"):
        trainer(epochs=6).fit(net(), loader, tuner=AutoTuneNet({"dropout": (0.0, 0.5)}))


def test_bad_input(rows, loader):
    fit = lambda run=None, model=None, data=loader, **kwargs: (run or trainer()).fit(  # noqa: E731
        model or net(), data, **{"tuner": AutoTuneNet(SPACE), **kwargs}
    )
    with pytest.raises(ValueError, match="no parameters"):
        fit(model=torch.nn.ReLU())
    with pytest.raises(ValueError, match="no gradient"):
        fit(Trainer(lambda outputs, targets: outputs.detach().mean(), epochs=10, progress=False))
    with pytest.raises(TypeError, match="scalar"):
        fit(Trainer(lambda outputs, targets: outputs, epochs=10, progress=False))
    with pytest.raises(ValueError, match=r"unknown.*steps=.*total_steps"):
        fit(data=Endless())
    with pytest.raises(TypeError, match="AutoTuneNet"):
        fit(tuner=atn.AutoTuneNet(SPACE))
    with pytest.raises(TypeError, match="forward="):
        fit(data=[torch.ones(2, 6)] * 64)
    with pytest.raises(ValueError, match="one of them"):
        Trainer(cross_entropy)
    for options, says in [
        ({"optimizer": "adam"}, r"optimizer must be .*torch\.optim\.AdamW; got 'adam'"),
        ({"scheduler": "cosine"}, "scheduler must be a function of the optimizer"),
        ({"metrics": [len]}, "metrics must map names"),
    ]:
        with pytest.raises(TypeError, match=says):
            Trainer(cross_entropy, epochs=1, **options)
    for value, says in [(None, "NoneType"), (torch.ones(2), r"Tensor of shape \(2,\)")]:
        run = Trainer(cross_entropy, epochs=10, progress=False, metrics={"odd": lambda outputs, targets, v=value: v})
        with pytest.raises(TypeError, match=f"metric 'odd' must be a number.*{says}"):
            fit(run, val_loader=loader)
    with pytest.raises(ValueError, match="precision"):
        Trainer(cross_entropy, epochs=1, precision="int8")
    with pytest.raises(ValueError, match="Found"):
        fit(tuner=AutoTuneNet({"momentum": (0.5, 0.9)}))


class Endless(torch.utils.data.IterableDataset):
    """Batches without an end or a length."""

    def __iter__(self):
        while True:
            yield torch.ones(4, 6), torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize("given", ["trainer", "tuner"])
def test_endless_data_with_steps(given):
    run = Trainer(cross_entropy, steps=64, progress=False) if given == "trainer" else trainer()
    tuner = AutoTuneNet(SPACE, total_steps=None if given == "trainer" else 64)
    history = run.fit(net(), torch.utils.data.DataLoader(Endless(), batch_size=None), tuner=tuner)
    assert history.summary["steps"] == 64


def test_two_budgets_are_told_apart(loader):
    with pytest.warns(UserWarning, match="total_steps=100, and this training takes 72"):
        history = trainer(epochs=6).fit(net(), loader, tuner=AutoTuneNet(SPACE, total_steps=100))
    assert history.summary["steps"] == 72


def test_a_loss_per_row_is_refused_in_validation_too(loader, rows):
    """The first thing that `fit` does is to validate."""
    trainer = Trainer(torch.nn.CrossEntropyLoss(reduction="none"), epochs=10, progress=False)
    with pytest.raises(TypeError, match=r"scalar tensor; got a tensor of shape \(16,\).*reduction='mean'"):
        trainer.fit(torch.nn.Linear(6, 3), loader, loader, tuner=AutoTuneNet(SPACE))


class FailingRows(torch.utils.data.Dataset):
    """Rows with an augmentation, on a disk that fails once."""

    def __init__(self, rows, at):
        self.rows, self.at, self.count = rows, at, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.count += 1
        if self.count == self.at:
            raise OSError("the disk failed")
        x, y = self.rows[index]
        return x + 0.05 * torch.rand(6), y


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
def test_a_loader_that_raises_loses_nothing(tmp_path, rows, share, bits):
    """Inside the range test, a round and outside; with an order of the loader's own."""

    def run(folder=None, at=None):
        torch.manual_seed(0)
        model = net()
        data = FailingRows(rows, at)
        order = torch.Generator().manual_seed(7)
        loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True, generator=order)
        try:
            trainer(epochs=12, accumulate=2).fit(model, loader, tuner=AutoTuneNet(SPACE), snapshots=folder)
        except OSError:
            return None
        return bits(model.state_dict())

    expected = run()
    assert run(tmp_path / "run", int(12 * 192 * share) - 5) is None
    assert run(tmp_path / "run") == expected


def test_after_an_error_nothing_of_the_tuner_stays_on_the_optimizer(rows):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(FailingRows(rows, 400), batch_size=16)
    with pytest.raises(OSError, match="disk"):
        Trainer(cross_entropy, optimizer, epochs=12, progress=False).fit(model, loader, tuner=AutoTuneNet(SPACE))
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_step_that_is_interrupted_in_the_forward_pass_is_taken_back(tmp_path, rows, bits):
    calls = []

    def run(folder=None, at=None):
        torch.manual_seed(0)
        calls.clear()
        model = net()
        loader = torch.utils.data.DataLoader(rows, batch_size=16, shuffle=True)

        def loss_fn(outputs, targets):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return cross_entropy(outputs, targets)

        try:
            fitter = Trainer(loss_fn, torch.optim.AdamW, epochs=8, progress=False)
            fitter.fit(model, loader, tuner=AutoTuneNet(SPACE), snapshots=folder)
        except KeyboardInterrupt:
            return None
        return bits(model.state_dict())

    expected = run()
    assert run(tmp_path / "run", 77) is None
    assert run(tmp_path / "run") == expected


def test_a_frozen_backbone_stays_in_evaluation_mode(loader):
    model = net()
    model[1].eval()
    before = model[1].running_mean.clone()
    run = trainer(epochs=6)
    run.fit(model, loader, loader, tuner=AutoTuneNet(SPACE))
    run.validate()
    run.predict(loader)
    assert not model[1].training and model[0].training
    assert torch.equal(model[1].running_mean, before)


def test_a_scheduler_that_waits_for_the_metric_is_stepped_with_it(loader):
    made = []

    def plateau(optimizer):
        made.append(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0))
        return made[0]

    trainer(epochs=8, scheduler=plateau).fit(net(), loader, loader, tuner=AutoTuneNet(BOTH))
    assert made[0].last_epoch > 3 and made[0].best < 1.1


def test_nothing_to_maximise_is_refused(rows):
    regression = torch.utils.data.TensorDataset(rows.tensors[0], rows.tensors[0][:, :1])
    data = torch.utils.data.DataLoader(regression, batch_size=16)
    run = Trainer(torch.nn.functional.mse_loss, epochs=10, progress=False)
    with pytest.raises(ValueError, match=r"the only one here is the loss.*metrics="):
        run.fit(torch.nn.Linear(6, 1), data, data, tuner=AutoTuneNet(SPACE, mode="max"))
    with pytest.raises(ValueError, match="val_loader"):
        run.fit(torch.nn.Linear(6, 1), data, tuner=AutoTuneNet(SPACE, mode="max"))


@pytest.mark.filterwarnings("ignore:.*were skipped", "ignore:The best")
def test_a_round_that_begins_with_bad_batches_begins_after_them_for_all_its_forks():
    """Ten in a row, more than bad luck; a fork that went back to them would fail for what is not its doing."""
    torch.manual_seed(3)
    x = torch.randn(640, 6)
    y = x[:, :3].argmax(1)
    seen = x.clone()
    seen[:160] = float("nan")
    train = [(seen[k : k + 16], y[k : k + 16]) for k in range(0, 640, 16)]
    tuner = AutoTuneNet(SPACE)
    run = Trainer(torch.nn.functional.cross_entropy, epochs=6, progress=False)
    first = run.fit(net(), train, [(x, y)], tuner=tuner).rounds[0]
    assert {fork["status"] for fork in first["forks"]} == {"kept", "lost"}
    assert run.validate()["loss"] < 0.5


class Moded(torch.optim.SGD):
    """Trains in one mode and is evaluated in another, as schedule-free optimizers are; it begins in the latter."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.eval()

    def train(self):
        self.param_groups[0]["train_mode"] = True

    def eval(self):
        self.param_groups[0]["train_mode"] = False

    def step(self, closure=None):
        assert self.param_groups[0]["train_mode"]
        super().step()


def test_an_optimizer_with_modes_is_in_that_of_the_model(loader):
    run, seen = Trainer(cross_entropy, Moded, epochs=10, progress=False), set()
    model = net()
    model.register_forward_hook(
        lambda module, *_: seen.add((module.training, run.optimizer.param_groups[0]["train_mode"]))
    )
    run.fit(model, loader, loader, tuner=AutoTuneNet(SPACE))
    assert seen == {(True, True), (False, False)}
    assert not run.optimizer.param_groups[0]["train_mode"]


def test_what_cannot_be_trained_is_refused_before_anything_is(loader):
    tuner = AutoTuneNet(SPACE)
    with pytest.raises(ValueError, match=r"LBFGS.*closure.*loop of your own"):
        Trainer(cross_entropy, torch.optim.LBFGS, epochs=10, progress=False).fit(net(), loader, tuner=tuner)
    empty = torch.utils.data.DataLoader(loader.dataset, 10_000, drop_last=True)
    with pytest.raises(ValueError, match=r"gives 0 batches a pass.*drop_last"):
        trainer().fit(net(), empty, tuner=tuner)
    with pytest.raises(RuntimeError, match="call fit first"):
        trainer().validate()
