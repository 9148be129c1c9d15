import enum
import math
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import autotunenet_jax as atn

pytestmark = pytest.mark.usefixtures("strict_promotion")

UNIT = st.floats(0.0, 1.0, width=32)
# What a confused caller or a diverged computation may hand over.
ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True)


@st.composite
def floats(draw, log=None):
    log = draw(st.booleans()) if log is None else log
    if log:
        lo = draw(st.floats(1e-30, 1e30))
        return atn.Float(lo, lo * draw(st.floats(1.001, 1e7)), log=True)
    lo = draw(st.floats(-1e30, 1e30).filter(lambda x: x == 0 or abs(x) > 1e-30))
    return atn.Float(lo, lo + max(abs(lo), 1e-3) * draw(st.floats(1e-3, 1e6)))


@st.composite
def ints(draw):
    log = draw(st.booleans())
    lo = draw(st.integers(1 if log else -5000, 5000))
    return atn.Int(lo, lo + draw(st.integers(1, 3000)), log=log)


NUMBERS = st.one_of(st.integers(-(2**24) + 1, 2**24 - 1), st.floats(-1e6, 1e6, width=32))
CHOICES = st.one_of(
    st.lists(NUMBERS, min_size=2, max_size=4, unique=True),
    st.lists(st.text(max_size=3), min_size=2, max_size=4, unique=True),
).filter(lambda options: len({np.float32(o) if isinstance(o, (int, float)) else o for o in options}) == len(options))


# --- never outside the bounds -----------------------------------------------------------------------------------------


@given(floats(), ANY_FLOAT)
@example(atn.Float(0.0, 0.1), 1.0)
@example(atn.Float(0.1, 1.0), 0.0)
@example(atn.Float(0.1, 0.3, log=True), 0.0)
@example(atn.Float(0.1, 0.3, log=True), 1.0)
@example(atn.Float(-1e38, 1e38), 0.5)
@example(atn.Float(0.1, 0.3), math.nan)
def test_float_never_leaves_its_bounds(param, anything):
    for value in (param.decode(anything), param.clip(anything)):
        # Compared in double precision with the bounds as declared, not as rounded to float32.
        assert param.lo <= float(value) <= param.hi
        assert param.contains(value)
        assert value.dtype == jnp.float32
    assert 0.0 <= float(param.encode(anything)) <= 1.0


@pytest.mark.parametrize("bound", [0.1, 0.3, 1e-3, 1e-5, 0.7, 1 / 3, 0.999])
def test_bounds_are_rounded_inwards_not_to_nearest(bound):
    assert float(atn.Float(0.0, bound).decode(1.0)) <= bound
    assert float(atn.Float(bound, 2.0).decode(0.0)) >= bound
    assert float(atn.Float(bound, 2.0, log=True).decode(0.0)) >= bound
    # and by no more than one step of float32
    assert float(atn.Float(0.0, bound).decode(1.0)) == pytest.approx(bound, rel=2**-22)


@given(ints(), ANY_FLOAT)
@example(atn.Int(1, 8), math.nan)
@example(atn.Int(1, 8), math.inf)
@example(atn.Int(2**24 - 2**22, 2**24 - 1), 1.0)
def test_int_never_leaves_its_bounds(param, anything):
    for value in (param.decode(anything), param.clip(anything)):
        assert param.lo <= int(value) <= param.hi
        assert param.contains(value)
        assert value.dtype == jnp.int32
    assert 0.0 <= float(param.encode(anything)) <= 1.0


@given(CHOICES, ANY_FLOAT)
@example([32, 64, 128], math.nan)
@example(["a", "b"], 1.0)
def test_choice_is_always_an_option(options, anything):
    param = atn.Choice(options)
    for value in (param.decode(anything), param.clip(jnp.float32(anything))):
        assert param.contains(value)
        assert param.to_python(value) in options
    assert 0.0 < float(param.encode(jnp.float32(anything))) < 1.0


# --- there and back ---------------------------------------------------------------------------------------------------


@given(st.one_of(floats(log=False), floats(log=True)), UNIT)
def test_float_unit_value_survives_the_round_trip(param, u):
    lo, hi = param.decode(0.0), param.decode(1.0)
    back = param.decode(param.encode(param.decode(u)))
    # One step of float32 in u moves the value by 2**-23 of the range, and the value itself is rounded.
    step = 2.0**-20 * (math.log(param.hi / param.lo) + abs(math.log(param.lo)) if param.log else 1.0)
    scale = float(param.decode(u)) if param.log else max(abs(float(lo)), abs(float(hi)), float(hi) - float(lo))
    assert abs(float(back) - float(param.decode(u))) <= step * abs(scale)


@given(ints(), st.data())
def test_int_survives_the_round_trip(param, data):
    value = data.draw(st.integers(param.lo, param.hi))
    assert int(param.decode(param.encode(value))) == value


@given(CHOICES, st.data())
def test_option_survives_the_round_trip(options, data):
    param = atn.Choice(options)
    option = data.draw(st.sampled_from(options))
    back = param.to_python(param.decode(param.encode(option)))
    assert back == option
    assert type(back) is type(option)


def test_log_scale_spreads_decades_evenly():
    param = atn.Float(1e-5, 1e-1, log=True)
    np.testing.assert_allclose(param.encode(jnp.array([1e-4, 1e-3, 1e-2])), [0.25, 0.5, 0.75], atol=1e-6)
    np.testing.assert_allclose(param.decode(jnp.array([0.25, 0.5, 0.75])), [1e-4, 1e-3, 1e-2], rtol=1e-5)


def test_every_integer_gets_an_equal_cell():
    u = (jnp.arange(8000, dtype=jnp.float32) + 0.5) / 8000
    np.testing.assert_array_equal(np.bincount(atn.Int(1, 8).decode(u))[1:], 1000)
    _, counts = np.unique(atn.Choice([3, 1, 2]).decode(u), return_counts=True)
    np.testing.assert_allclose(counts, 8000 / 3, atol=1)


def test_clip_goes_to_the_nearest():
    np.testing.assert_array_equal(atn.Int(1, 8).clip(jnp.array([-3.0, 1.6, 7.4, 99.0])), [1, 2, 7, 8])
    np.testing.assert_array_equal(atn.Choice([1, 2, 4]).clip(jnp.array([-3.0, 1.7, 3.2, 99.0])), [1, 2, 4, 4])
    np.testing.assert_allclose(atn.Float(0.0, 0.5).clip(jnp.array([-1.0, 0.25, 2.0])), [0.0, 0.25, 0.5])


# --- what a choice is -------------------------------------------------------------------------------------------------


def test_choices_equal_as_numbers_but_of_other_types_differ():
    whole, real, flags = atn.Choice([1, 0]), atn.Choice([1.0, 0.0]), atn.Choice([True, False])
    assert len({whole, real, flags}) == 3
    decode = jax.jit(lambda param, u: param.decode(u), static_argnums=0)
    assert decode(whole, 0.0).dtype == jnp.int32
    assert decode(real, 0.0).dtype == jnp.float32


def test_objects_are_positions_inside_jit():
    param = atn.Choice(["relu", None, ("gelu", 1)])
    assert [int(param.clip(option)) for option in param.options] == [0, 1, 2]
    assert param.to_python(jnp.int32(2)) == ("gelu", 1)
    assert param.contains("relu")
    assert not param.contains("tanh")


@pytest.mark.parametrize("value", ["0.1", None, np.str_("0.1"), math.nan, [0.6], jnp.array([0.1, 0.6])])
def test_float_contains_refuses(value):
    assert not atn.Float(0.0, 0.5).contains(value)


@pytest.mark.parametrize("value", [0.1, 0, np.float64(0.5), jnp.float32(0.25), jnp.array([0.1, 0.4]), np.array(0.2)])
def test_float_contains_accepts(value):
    assert atn.Float(0.0, 0.5).contains(value)


def test_int_contains_whole_numbers_only():
    assert atn.Int(1, 8).contains(3)
    assert atn.Int(1, 8).contains(jnp.array([1, 8]))
    assert not atn.Int(1, 8).contains(2.5)
    assert not atn.Int(1, 8).contains(jnp.array([1, 9]))


def test_choice_contains_compares_as_jit_sees_it():
    assert atn.Choice([0.1, 0.2]).contains(np.float64(0.1))
    assert atn.Choice([0.1, 0.2]).contains(jnp.float32(0.1))
    assert not atn.Choice([1, 2]).contains(jnp.float32(1.5))


# --- bad input --------------------------------------------------------------------------------------------------------

BAD = [
    # call, error, the rule, what was given, the remedy
    (lambda: atn.Float(0.5, 0.1), ValueError, "lo < hi", "reversed bounds (0.5, 0.1)", "Swap"),
    (lambda: atn.Float(0.5, 0.5), ValueError, "lo < hi", "equal bounds (0.5, 0.5)", "leave the hyperparameter out"),
    (lambda: atn.Float(0.0, math.inf), ValueError, "finite", "(0.0, inf)", "Give a finite range"),
    (lambda: atn.Float(math.nan, 1.0), ValueError, "finite", "(nan, 1.0)", "Give a finite range"),
    (lambda: atn.Float(0.0, 1.0, log=True), ValueError, "lo > 0", "(0.0, 1.0)", "log=False"),
    (lambda: atn.Float(-1.0, 1.0, log=True), ValueError, "lo > 0", "(-1.0, 1.0)", "log=False"),
    (lambda: atn.Float("a", 1.0), TypeError, "real numbers", "'a'", "plain numbers"),
    (lambda: atn.Float(True, 2.0), TypeError, "real numbers", "True", "plain numbers"),
    (lambda: atn.Float(1.0, 1.0 + 1e-9), ValueError, "float32", "1.000000001", "Widen"),
    (lambda: atn.Float(0.0, 1e39), ValueError, "float32", "1e+39", "another unit"),
    (lambda: atn.Float(1e-40, 1.0, log=True), ValueError, "float32", "1e-40", "another unit"),
    (lambda: atn.Float(0, 10**400), ValueError, "float32", "(0, 1000", "another unit"),
    (lambda: atn.Float(0.0, 1.0, role="quick"), ValueError, "rate, fast, slow", "'quick'", "Leave it out"),
    (lambda: atn.Int(8, 1), ValueError, "lo < hi", "reversed bounds (8, 1)", "Swap"),
    (lambda: atn.Int(1, 8.0), TypeError, "integers", "8.0", "Use Float"),
    (lambda: atn.Int(0, 8, log=True), ValueError, "lo > 0", "(0, 8)", "log=False"),
    (lambda: atn.Int(0, 2**24), ValueError, "2**24", "16777216", "coarser unit"),
    (lambda: atn.Choice([1]), ValueError, "two or more distinct", "[1]", "Add some"),
    (lambda: atn.Choice([1, 1.0]), ValueError, "two or more distinct", "[1, 1.0]", "drop repeats"),
    (lambda: atn.Choice("ab"), TypeError, "sequence of options", "'ab'", "in a list"),
    (lambda: atn.Choice({1, 2}), TypeError, "sequence of options", "{1, 2}", "in a list"),
    (lambda: atn.Choice([[1], [2]]), TypeError, "strings, numbers", "[1], a list", "by strings"),
    (lambda: atn.Choice([1.0, math.inf]), ValueError, "finite", "inf", "Drop"),
    (lambda: atn.Choice([1, 2**40]), ValueError, "float32", "1099511627776", "by strings"),
    (lambda: atn.Choice([1.0, 1.0 + 1e-12]), ValueError, "float32", "1.000000000001", "Spread"),
    (lambda: atn.Choice(["a", "b"]).clip("c"), ValueError, "one of ['a', 'b']", "'c'", "Pick"),
]


@pytest.mark.parametrize(("call", "error", "rule", "given_text", "remedy"), BAD)
def test_bad_input_names_rule_value_and_remedy(call, error, rule, given_text, remedy):
    with pytest.raises(error) as caught:
        call()
    for part in (rule, given_text, remedy):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "param",
    [
        atn.Int(0, 2**22 - 1),
        atn.Int(2**24 - 2**22, 2**24 - 1),
        atn.Int(-1_500_000, 1_700_000),
        atn.Int(1, 2**17, log=True),
        atn.Int(90_001, 131_000, log=True),
    ],
)
def test_every_whole_number_comes_back(param):
    values = jnp.arange(param.lo, param.hi + 1)
    np.testing.assert_array_equal(jax.jit(lambda v: param.decode(param.encode(v)))(values), values)


@pytest.mark.parametrize(
    ("lo", "hi", "log"), [(0, 2**22, False), (-(2**23), 2**23 - 1, False), (1, 2**17 + 1, True), (7, 10**7, True)]
)
def test_a_range_of_whole_numbers_that_float32_cannot_part_is_refused(lo, hi, log):
    with pytest.raises(ValueError, match=r"neighbours could not be told apart; got .* Use Float and round it"):
        atn.Int(lo, hi, log=log)


def test_options_are_plain_python():
    given = [np.int64(3), np.float32(0.5), np.float16(0.25), 7]
    assert [type(option) for option in atn.Choice(given).options] == [int, float, float, int]
    mixed = atn.Choice([np.str_("a"), np.bool_(True), None, (np.int32(1), ("b", np.float64(2.0)))])
    assert mixed.options == ("a", True, None, (1, ("b", 2.0)))
    assert [type(option) for option in mixed.options[:3]] == [str, bool, type(None)]
    assert type(mixed.options[3][0]) is int and type(mixed.options[3][1][1]) is float
    assert pickle.loads(pickle.dumps(mixed)) == mixed
    for number, option in enumerate(mixed.options):
        assert mixed.to_python(mixed.decode(mixed.encode(option))) == option
        assert int(mixed.decode(mixed.encode(option))) == number


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@pytest.mark.parametrize(
    "options",
    [[len, max], [Colour.RED, Colour.BLUE], [jnp.float32, jnp.bfloat16], [np.dtype("f4"), "f2"], [("a", len), "b"],
     [{1}, {2}], [pathlib.PurePath("a"), "b"], [1j, 2j]],
)  # fmt: skip
def test_other_objects_are_to_be_named(options):
    with pytest.raises(TypeError, match=r"strings, numbers, bools, None, or tuples .*; got .*Name the options"):
        atn.Choice(options)
