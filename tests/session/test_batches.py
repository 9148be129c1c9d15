"""Batches by position, from a callable or an iterable, with as much memory as a round needs."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from autotunenet_jax.session.batches import BatchSource, EndOfDataError


class Loader:
    """Like a data loader: starts again each time it is asked for an iterator, and counts what it hands out."""

    def __init__(self, count):
        self.count, self.epochs = count, 0

    def __iter__(self):
        self.epochs += 1
        return iter([(self.epochs, i) for i in range(self.count)])


def test_a_callable_is_asked_with_position_and_hyperparameters():
    source = BatchSource(lambda step, hp: (step, hp["x"]))
    source.hold(3)
    assert [source.get(i, {"x": 7}) for i in (3, 5, 3)] == [(3, 7), (5, 7), (3, 7)]
    source.release(4)
    assert source.get(2, {"x": 1}) == (2, 1)
    assert source.is_callable


def test_an_iterable_is_read_once_and_in_order():
    source = BatchSource(itertools.count())
    assert [source.get(i, None) for i in range(5)] == [0, 1, 2, 3, 4]
    assert source.get(4, None) == 4
    assert not source.is_callable


def test_a_round_replays_its_batches():
    source = BatchSource(itertools.count(100))
    for i in range(10):
        source.get(i, None)
    source.hold(10)
    first = [source.get(i, None) for i in range(10, 18)]
    again = [source.get(i, None) for i in range(10, 15)]
    assert first == list(range(110, 118))
    assert again == first[:5]
    source.release(15)
    assert [source.get(i, None) for i in range(15, 20)] == [115, 116, 117, 118, 119]


def test_a_stream_that_fills_one_array_again_and_again_is_replayed_as_it_was():
    buffer = {"x": np.zeros(2)}

    def stream():
        for number in itertools.count():
            buffer["x"][:] = number
            yield buffer

    source = BatchSource(stream())
    seen = [float(source.get(i, None)["x"][0]) for i in range(3)]
    source.hold(2)  # the batch read last is still to come
    for _ in range(3):
        seen += [float(source.get(i, None)["x"][0]) for i in range(2, 6)]
    assert seen == [0, 1, 2, *([2, 3, 4, 5] * 3)]


def test_a_list_starts_again_and_a_generator_ends():
    assert [BatchSource([1, 2, 3]).get(i, None) for i in (0, 3, 7)] == [1, 1, 2]
    loader = Loader(2)
    source = BatchSource(loader)
    assert [source.get(i, None) for i in range(5)] == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    source = BatchSource(i for i in range(3))
    assert [source.get(i, None) for i in range(3)] == [0, 1, 2]
    with pytest.raises(EndOfDataError):
        source.get(3, None)


def test_a_round_survives_the_end_of_a_generator():
    source = BatchSource(iter(range(5)))
    source.hold(0)
    with pytest.raises(EndOfDataError):
        source.get(7, None)
    assert [source.get(i, None) for i in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("empty", [[], (), iter(()), (i for i in ())])
def test_nothing_to_train_on_is_said_so(empty):
    with pytest.raises(ValueError, match=r"at least one batch; got an empty or used-up .*Give a fresh one"):
        BatchSource(empty).get(0, None)


@pytest.mark.parametrize(("batches", "named"), [(3, "int"), (None, "NoneType")])
def test_what_is_no_source_of_batches_is_named(batches, named):
    with pytest.raises(TypeError, match=rf"callable\(step, hyperparams\) or an iterable of batches; got {named}"):
        BatchSource(batches)


def test_a_generator_is_given_and_not_the_function_that_makes_one():
    def stream():
        yield 0

    with pytest.raises(TypeError, match=r"batches=stream\(\)"):
        BatchSource(stream)
    assert BatchSource(stream()).get(0, None) == 0


@hypothesis.given(st.data())
def test_any_path_a_run_can_take_sees_the_stream_by_position(data):
    """Training, rounds of replayed forks, winners that are shorter than the longest fork, rounds that fail."""
    source = BatchSource(itertools.count())
    position = 0
    for _ in range(data.draw(st.integers(1, 6))):
        for _ in range(data.draw(st.integers(0, 8))):
            assert source.get(position, None) == position
            position += 1
            assert len(source._window) <= 8  # outside rounds nothing piles up
        source.hold(position)
        ends = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
        for length in ends:
            assert [source.get(position + i, None) for i in range(length)] == list(range(position, position + length))
        position += data.draw(st.sampled_from(ends))
        source.release(position)


def test_memory_is_one_batch_outside_rounds():
    source = BatchSource(itertools.count())
    for i in range(1000):
        source.get(i, None)
    assert len(source._window) == 1
    source.hold(1000)
    for i in range(1000, 1050):
        source.get(i, None)
    assert len(source._window) == 50
    source.release(1050)
    assert len(source._window) == 0


def test_a_callable_whose_iterator_ends_is_out_of_data():
    batches = iter("ab")
    source = BatchSource(lambda step, hp: next(batches))
    assert [source.get(step, {}) for step in range(2)] == ["a", "b"]
    with pytest.raises(EndOfDataError):
        source.get(2, {})
    with pytest.raises(ValueError, match="first batch"):
        BatchSource(lambda step, hp: next(batches)).get(0, {})
