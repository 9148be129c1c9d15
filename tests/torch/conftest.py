import copy

import pytest

torch = pytest.importorskip("torch")

torch.set_num_threads(1)


class Tied(torch.nn.Module):
    """Batch normalisation, tied weights, a frozen layer, dropout and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(6, 6, bias=False)
        self.norm = torch.nn.BatchNorm1d(6)
        self.drop = torch.nn.Dropout(0.2)
        self.frozen = torch.nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.tied = torch.nn.Linear(6, 6, bias=False)
        self.tied.weight = self.embed.weight
        self.head = torch.nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.head(self.tied(self.drop(torch.relu(self.frozen(self.norm(self.embed(x)))))))


def bits(value):
    """A nested structure of tensors as comparable bytes."""
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous()
        return str(raw.dtype), tuple(raw.shape), raw.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [bits(inner) for inner in value]
    return repr(value)


def training_bits(model, optimizer, scheduler=None):
    """Everything of a training that can be compared bit by bit, random generators included."""
    return {
        "model": bits(model.state_dict()),
        "buffers": bits(dict(model.named_buffers())),
        "optimizer": bits(optimizer.state_dict()["state"]),
        "scheduler": None if scheduler is None else bits(copy.deepcopy(scheduler.state_dict())),
        "rng": bits(torch.get_rng_state()),
    }


@pytest.fixture
def make_tied():
    return Tied


@pytest.fixture(name="training_bits")
def fixture_training_bits():
    return training_bits


@pytest.fixture(name="bits")
def fixture_bits():
    return bits


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def rows():
    """192 rows of 6 numbers in 3 classes that a line can tell apart."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(192, 6, generator=generator)
    return torch.utils.data.TensorDataset(x, (x[:, :3]).argmax(1))


@pytest.fixture
def loader(rows):
    return torch.utils.data.DataLoader(rows, batch_size=16, shuffle=True)
