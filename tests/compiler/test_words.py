"""Words: bits in, the same bits out, on the device and on the host."""

from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autotunenet_jax.compiler import words


class Row(NamedTuple):
    flag: Any
    loss: Any
    step: Any
    point: Any
    key: Any


def row(flag=True, loss=1.5, step=-3, point=(0.25, float("nan")), key=2**32 - 1):
    return Row(jnp.array(flag), jnp.float32(loss), jnp.int32(step), jnp.array(point, jnp.float32), jnp.uint32(key))


LIKE = jax.eval_shape(row)
pack, unpack = jax.jit(words.pack), jax.jit(words.unpack, static_argnums=1)


def same_bits(a, b):
    return np.asarray(a, b.dtype).tobytes() == np.asarray(b).tobytes()


@hypothesis.given(st.booleans(), st.floats(width=32), st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**32 - 1))
def test_bits_come_back(flag, loss, step, key):
    made = row(flag, loss, step, key=key)
    packed = pack(made)
    assert packed.dtype == jnp.int32 and packed.shape == (words.size(LIKE),)
    for back in (
        unpack(packed, LIKE),
        words.read(np.asarray(packed), LIKE),
        words.row_reader(LIKE)(np.asarray(packed)),
    ):
        assert all(same_bits(a, b) for a, b in zip(back, made, strict=True))


def test_positions_are_where_leaves_begin():
    packed, at = np.asarray(pack(row())), words.positions(LIKE)
    assert packed[at.step] == -3 and packed[at.point : at.point + 2].view(np.float32)[0] == 0.25
    assert at.key == words.size(LIKE) - 1


def test_rows_of_a_table_stay_rows():
    table = np.stack([pack(row(step=step)) for step in range(4)])
    back = words.read(table[1:], LIKE)
    assert back.step.tolist() == [1, 2, 3] and back.point.shape == (3, 2)


def test_one_row_comes_as_numbers():
    back = words.row_reader(LIKE)(np.asarray(pack(row())))
    assert (back.flag, back.loss, back.step, back.key) == (1, 1.5, -3, 2**32 - 1)
    assert type(back.step) is int and type(back.loss) is float


def test_many_at_once():
    several = jax.vmap(lambda step: row(step=0)._replace(step=step))(jnp.arange(3, dtype=jnp.int32))
    back = jax.vmap(lambda packed: words.unpack(packed, LIKE))(jax.vmap(words.pack)(several))
    assert back.step.tolist() == [0, 1, 2]


def test_other_widths_have_no_words():
    with pytest.raises(ValueError, match="convert"):
        words.pack([jnp.zeros(3, jnp.bfloat16)])
