"""Streams of batches: shown again to forks, found again after a resume."""

import pytest

torch = pytest.importorskip("torch")

from autotunenet_torch.data import ReplayBuffer  # noqa: E402


@pytest.fixture
def rows():
    return torch.utils.data.TensorDataset(torch.arange(70.0)[:, None], torch.arange(70))


def test_stream_replays_and_finds_its_place(rows):
    loader = torch.utils.data.DataLoader(rows, batch_size=16, shuffle=True)
    stream = ReplayBuffer(loader, seed=5)
    first = [stream.get()[1] for _ in range(10)]
    assert len(stream._window) <= 1
    stream.hold()
    mark = stream.cursor
    held = [stream.get()[1] for _ in range(9)]  # over the end of a pass
    stream.cursor = mark
    assert all(torch.equal(a, b) for a, b in zip(held, [stream.get()[1] for _ in range(9)], strict=True))
    stream.release()
    state, expected = stream.state(), [stream.get()[1] for _ in range(20)]
    other = ReplayBuffer(loader)
    other.load(state)
    assert all(torch.equal(a, b) for a, b in zip(expected, [other.get()[1] for _ in range(20)], strict=True))
    again = ReplayBuffer(loader, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(first, [again.get()[1] for _ in range(10)], strict=True))


class OneBuffer:
    """Batches in one tensor that is filled again each time."""

    def __iter__(self):
        buffer = torch.zeros(4)
        for number in range(100):
            yield buffer.fill_(number), {"number": number}


@pytest.mark.parametrize("size", [None, 4])
def test_forks_see_the_same_data_though_loader_and_training_write_to_it(size):
    if size is None:
        stream = ReplayBuffer(OneBuffer())
    else:
        stream = ReplayBuffer([torch.full((8,), float(number)) for number in range(9)])

    def trained():
        batch = stream.get(size)
        x = batch if size else batch[0]
        value = float(x[0])
        x.mul_(-2.0)
        return value

    if size is None:
        assert [trained() for _ in range(3)] == [0, 1, 2]
    stream.hold()
    start = stream.cursor
    first = [trained() for _ in range(4)]
    stream.cursor = start
    assert [trained() for _ in range(4)] == first == ([0, 0, 1, 1] if size else [3, 4, 5, 6])


def test_stream_cuts_other_batch_sizes():
    stream = ReplayBuffer(
        [{"x": torch.arange(5), "y": [torch.arange(5)]}, {"x": torch.arange(5, 8), "y": [torch.ones(3)]}]
    )
    sizes = [4, 3, 9, 1]
    got = [stream.get(size) for size in sizes]
    assert [len(batch["x"]) for batch in got] == sizes and [len(batch["y"][0]) for batch in got] == sizes
    rows = torch.cat([batch["x"] for batch in got]).tolist()
    assert rows == (list(range(8)) * 3)[: sum(sizes)]


def test_stream_refuses_what_it_cannot_read_again():
    with pytest.raises(TypeError, match="read only once"):
        ReplayBuffer(iter([1]))
    with pytest.raises(TypeError, match="iterable"):
        ReplayBuffer(3)
    with pytest.raises(ValueError, match="empty"):
        ReplayBuffer([]).get()


@pytest.mark.parametrize("has_generator", [False, True])
def test_workers_that_stay_give_the_same_batches_after_a_resume(rows, has_generator):
    def make():
        generator = torch.Generator().manual_seed(3) if has_generator else None
        loader = torch.utils.data.DataLoader(
            rows,
            16,
            shuffle=True,
            num_workers=1,
            persistent_workers=True,
            generator=generator,
            multiprocessing_context="spawn",  # JAX has begun here
        )
        return ReplayBuffer(loader, seed=5)

    stream = make()
    for _ in range(7):  # into the second pass
        stream.get()
    state, expected = stream.state(), [stream.get()[1] for _ in range(9)]
    other = make()
    other.load(state)
    assert all(torch.equal(a, b) for a, b in zip(expected, [other.get()[1] for _ in range(9)], strict=True))
