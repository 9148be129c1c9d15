"""What can be tuned, and that it is really set."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from autotunenet_jax import Choice  # noqa: E402
from autotunenet_torch import AutoTuneNet, targets  # noqa: E402


def find(name, model, optimizer, **kwargs):
    return targets.find(name, model, optimizer, [], setters=kwargs.pop("setters", {}), **kwargs)


def net():
    return torch.nn.Sequential(
        torch.nn.Linear(4, 4),
        torch.nn.Dropout(0.1),
        torch.nn.Sequential(torch.nn.Dropout2d(0.1), torch.nn.Linear(4, 2)),
    )


@pytest.mark.parametrize(
    ("name", "optimizer", "key", "expected"),
    [
        ("learning_rate", torch.optim.SGD, "lr", 0.3),
        ("lr", torch.optim.Adam, "lr", 0.3),
        ("weight_decay", torch.optim.AdamW, "weight_decay", 0.3),
        ("momentum", torch.optim.SGD, "momentum", 0.3),
        ("eps", torch.optim.Adam, "eps", 0.3),
        ("alpha", torch.optim.RMSprop, "alpha", 0.3),
        ("beta1", torch.optim.AdamW, "betas", (0.3, 0.999)),
        ("b2", torch.optim.AdamW, "betas", (0.9, 0.3)),
    ],
)
def test_optimizer_numbers(name, optimizer, key, expected):
    model = net()
    made = optimizer(model.parameters(), lr=0.1)
    find(name, model, made).write(0.3)
    assert [group[key] for group in made.param_groups] == [expected]
    made.load_state_dict(made.state_dict())  # makes new group dictionaries
    find(name, model, made).write(0.3)
    assert made.param_groups[0][key] == expected


def test_groups_keep_their_proportions():
    model = net()
    optimizer = torch.optim.AdamW(
        [
            {"params": model[0].parameters(), "lr": 1e-4, "weight_decay": 0.0, "name": "body"},
            {"params": model[2].parameters(), "lr": 1e-3, "weight_decay": 0.1, "name": "head"},
        ]
    )
    find("learning_rate", model, optimizer).write(1e-2)
    find("weight_decay", model, optimizer).write(0.5)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1e-3, 1e-2])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.5]
    find("head/learning_rate", model, optimizer).write(0.7)
    find("0/lr", model, optimizer).write(0.2)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.7]


def test_rate_in_a_tensor_is_written_in_place():
    model = net()
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, capturable=False, foreach=False)
    find("learning_rate", model, optimizer).write(0.25)
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == 0.25


def test_dropout_everywhere_or_by_path():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    find("dropout", model, optimizer).write(0.4)
    assert (model[1].p, model[2][0].p) == (0.4, 0.4)
    find("2/dropout", model, optimizer).write(0.3)
    assert (model[1].p, model[2][0].p) == (0.4, 0.3)


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_batch_size_is_in_force_at_the_next_batch(drop_last):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(torch.arange(20), batch_size=4, drop_last=drop_last)
    target = find("batch_size", model, optimizer, loader=loader)
    assert target.read() == 4 and [len(batch) for batch in loader] == [4] * 5
    sizes = []
    for batch in loader:
        sizes.append(len(batch))
        target.write(3 if len(sizes) % 2 else 5)
    assert sizes == [4, 3, 5, 3, 5]
    target.write(7)
    assert [len(batch) for batch in loader] == ([7, 7] if drop_last else [7, 7, 6])
    assert len(loader) == (2 if drop_last else 3)


def test_label_smoothing_and_batch_size():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = torch.nn.CrossEntropyLoss()
    find("label_smoothing", model, optimizer, loss_fn=loss).write(0.1)
    assert loss.label_smoothing == 0.1
    loader = torch.utils.data.DataLoader(torch.arange(20), batch_size=4)
    find("batch_size", model, optimizer, loader=loader).write(10)
    assert [len(batch) for batch in loader] == [10, 10]


def test_any_number_of_a_module():
    model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(4, 4, num_layers=2, dropout=0.1), "act": torch.nn.LeakyReLU(0.2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dropout = find("rnn/dropout", model, optimizer)
    assert dropout.read() == 0.1
    dropout.write(0.3)
    find("act/negative_slope", model, optimizer).write(0.05)
    assert (model["rnn"].dropout, model["act"].negative_slope) == (0.3, 0.05)
    for name in ("rnn/training", "rnn/width", "lost/dropout"):  # no number, no attribute, no module
        with pytest.raises(ValueError, match="nothing here goes by that name"):
            find(name, model, optimizer)


def test_unknown_name_lists_what_there_is():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"'beta1'.*learning_rate \(optimizer\).*momentum.*dropout.*2\.0/dropout"):
        find("beta1", model, optimizer)
    with pytest.raises(ValueError, match=r"label_smoothing.*loss_fn="):
        find("label_smoothing", model, optimizer)
    with pytest.raises(ValueError, match="batch_sampler"):
        find("batch_size", model, optimizer, loader=[1, 2])


def test_setter_of_the_users_own():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tuner = AutoTuneNet(
        {"learning_rate": (1e-4, 1.0), "temperature": (0.5, 2.0)},
        total_steps=100,
        initial={"temperature": 1.5},
        targets={"temperature": lambda model, value: setattr(model, "temperature", value)},
    )
    tuner.attach(model, optimizer)
    assert model.temperature == pytest.approx(1.5)
    with pytest.raises(ValueError, match="not in param_space"):
        AutoTuneNet({"learning_rate": (1e-4, 1.0)}, targets={"warmth": print})
    with pytest.raises(TypeError, match="function"):
        AutoTuneNet({"warmth": (1e-4, 1.0)}, targets={"warmth": 3})


def test_training_starts_where_the_optimizer_is():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0), "dropout": (0.0, 0.5)}, total_steps=100)
    tuner.attach(model, optimizer)
    assert tuner.best_hyperparams == pytest.approx({"learning_rate": 0.02, "dropout": 0.1})
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)  # outside: the tuner's own default
    with pytest.warns(UserWarning, match="learning_rate stands at 5, which lies outside its range"):
        tuner.attach(model, optimizer)
    assert 1e-4 <= optimizer.param_groups[0]["lr"] <= 1.0
    # Where a run before, or a warm-up, has left it: nothing to warn of.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tuner.attach(model, optimizer)
    assert 1e-4 <= optimizer.param_groups[0]["lr"] <= 1.0


def test_compiled_dropout_is_not_compiled_again(monkeypatch):
    model = net()
    compiled = torch.compile(model, backend="eager")
    target = find("dropout", compiled, torch.optim.SGD(model.parameters(), lr=0.1))
    import torch._dynamo as dynamo

    dynamo.reset()
    before = dynamo.utils.counters["stats"]["unique_graphs"]
    model[2][0] = torch.nn.Identity()  # channel dropout has its own test below
    compiled(torch.ones(2, 4))
    for value in (0.2, 0.3, 0.4):
        target.write(value)
        compiled(torch.ones(2, 4))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    target.write(0.5)
    x = torch.ones(4000, 4)
    share = (model[1](x) == 0).float().mean()
    assert share == pytest.approx(0.5, abs=0.02)
    assert model[1](x).mean() == pytest.approx(1.0, abs=0.04)
    assert torch.equal(model[1].eval()(x), x)
    assert "1.rate" not in model.state_dict()


def test_compiled_channel_dropout_drops_channels():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Dropout2d(0.5))
    compiled = torch.compile(model, backend="eager")
    find("dropout", compiled, torch.optim.SGD(model.parameters(), lr=0.1)).write(0.5)
    out = model[1](torch.ones(64, 8, 3, 3))
    dropped = (out == 0).flatten(2)
    assert (dropped.all(2) | ~dropped.any(2)).all()
    assert dropped.all(2).float().mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"dropout": (0.0, 1.5)}, "'dropout' go from 0 to 1.5, and it must be between 0 and 1"),
        ({"0/dropout": Choice([0.1, 2.0])}, "between 0 and 1"),
        ({"weight_decay": (-1.0, 1.0)}, "at least 0"),
        ({"momentum": (0.5, 1.2)}, "between 0 and 1"),
        ({"batch_size": (16, 128)}, r"whole numbers.*Int\(16, 128\)"),
        ({"batch_size": Choice([0, 16])}, "at least 1"),
    ],
)
def test_values_that_pytorch_refuses_are_refused_before_training(space, message):
    model = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(torch.arange(20), batch_size=4)
    with pytest.raises(ValueError, match=message):
        AutoTuneNet(space, total_steps=200).attach(model, optimizer, loader=loader)
    # A setter of the user's own may make of the value what it likes.
    setters = {name: lambda model, value: None for name in space}
    AutoTuneNet(space, total_steps=200, targets=setters).attach(model, optimizer)


def test_an_optimizer_of_another_model_is_refused():
    model, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1.0)}, total_steps=200)
    with pytest.raises(ValueError, match="2 of the 4 parameters of the optimizer are not parameters of the model"):
        tuner.attach(model, torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1))
    both = torch.nn.ModuleList([model, other])
    tuner.attach(both, torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1))


@pytest.mark.parametrize(
    "space",
    [
        {"learning_rate": (1e-4, 1e-1), "lr": (1e-4, 1e-1)},
        {"momentum": (0.1, 0.9), "0/momentum": (0.1, 0.9)},
        {"dropout": (0.0, 0.5), "2/dropout": (0.0, 0.5)},
        {"2.0/dropout": (0.0, 0.5), "2.0/p": (0.0, 0.5)},
    ],
)
def test_two_names_of_one_number_are_refused(space):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    with pytest.raises(ValueError, match=r"both set the same number|name the same rate"):
        AutoTuneNet(space, total_steps=100).attach(model, optimizer)


def test_groups_that_are_added_later_join():
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.02)
    target = find("learning_rate", model, optimizer)
    target.write(0.1)
    optimizer.add_param_group({"params": [*model[2].parameters()]})  # at the first rate: like the others
    target.join()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1])
    extra = torch.nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [extra], "lr": 0.05})  # half of what is in force
    target.join()
    target.write(0.4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4, 0.4, 0.2])
    optimizer.param_groups[2]["lr"] = 0.3  # its owner warms it up
    target.join()
    target.write(0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, 0.2, 0.15])
    assert target.read() == pytest.approx(0.2)


def test_a_value_that_something_else_sets_is_told_of():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1e-1)}, total_steps=100)
    tuner.attach(model, optimizer)
    tuner.step(1.0)
    optimizer.param_groups[0]["lr"] = 0.077
    with pytest.warns(UserWarning, match="Something else sets learning_rate"):
        tuner.step(1.0)
    optimizer.param_groups[0]["lr"] = 0.078
    tuner.step(1.0)  # told once


def test_validate_need_not_put_the_modes_back():
    model = net()
    model[1].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1e-1)}, total_steps=100)
    tuner.attach(model, optimizer, validate=lambda: float(model.eval().training))
    assert model.training and not model[1].training


def test_a_tuner_is_copied_without_the_training_it_is_attached_to():
    tuner = AutoTuneNet({"learning_rate": (1e-4, 1e-1)}, total_steps=100, seed=3)
    model = net()
    tuner.attach(model, torch.optim.SGD(model.parameters(), lr=0.01))
    for again in (copy.deepcopy(tuner), pickle.loads(pickle.dumps(tuner))):
        assert repr(again) == repr(tuner)
        with pytest.raises(RuntimeError, match="attach"):
            again.step(1.0)


def test_what_belongs_to_others_is_refused_with_what_to_do():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"A batch size is the loader's: give attach\(..., loader=\)"):
        find("batch_size", model, optimizer)
    with pytest.raises(TypeError, match=r"got list. Put the parameters into groups of one optimizer"):
        AutoTuneNet({"learning_rate": (1e-4, 1.0)}, total_steps=100).attach(model, [optimizer, optimizer])
