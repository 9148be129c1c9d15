import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import autotunenet_jax as atn

pytestmark = pytest.mark.usefixtures("strict_promotion")

SPACE = atn.SearchSpace(
    {
        "learning_rate": atn.Float(1e-5, 1e-1, log=True),
        "dropout": (0.0, 0.1),
        "layers": atn.Int(1, 8),
        "width": atn.Int(16, 1024, log=True),
        "batch_size": [32, 64, 128],
        "activation": ["relu", "tanh"],
    }
)
HP = {"learning_rate": 1e-3, "dropout": 0.05, "layers": 3, "width": 128, "batch_size": 64, "activation": "tanh"}
POINTS = st.lists(
    st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=SPACE.dims, max_size=SPACE.dims
).map(lambda values: np.array(values, np.float32))

decode, encode, snap = jax.jit(SPACE.decode), jax.jit(SPACE.encode), jax.jit(SPACE.snap)


@given(POINTS)
def test_no_point_decodes_to_a_value_outside(u):
    hp = decode(u)
    assert SPACE.contains(hp)
    u_back = np.asarray(encode(hp))
    assert ((u_back >= 0) & (u_back <= 1)).all()


@given(POINTS)
def test_no_value_is_written_outside(values):
    assert SPACE.contains(SPACE.clip(dict(zip(SPACE.names, jnp.asarray(values), strict=True))))


@given(st.integers(0, 2**31 - 1))
def test_snapping_changes_no_value_and_once_is_enough(seed):
    u = jax.random.uniform(jax.random.key(seed), (SPACE.dims,))
    once = snap(u)
    np.testing.assert_array_equal(snap(once), once)
    for name, value in decode(u).items():
        np.testing.assert_array_equal(decode(once)[name], value)


def test_round_trip_of_a_whole_setting():
    back = SPACE.to_python(SPACE.decode(SPACE.encode(HP)))
    assert back == {
        **HP,
        "learning_rate": pytest.approx(1e-3, rel=1e-5),
        "dropout": pytest.approx(0.05, rel=1e-5),
    }


def test_jit_and_vmap_agree_with_one_by_one():
    u = SPACE.sample(jax.random.key(0), (5,))
    sequential_vmap = [SPACE.decode(point) for point in u]
    for name, values in jax.jit(jax.vmap(SPACE.decode))(u).items():
        expected = jnp.stack([hp[name] for hp in sequential_vmap])
        assert values.dtype == expected.dtype
        # Compiled arithmetic may fuse a multiplication with an addition.
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(SPACE.encode)(SPACE.decode(u)), SPACE.encode(SPACE.decode(u)), rtol=1e-6)


def test_leading_axes_are_batch_axes():
    u = SPACE.sample(jax.random.key(1), (2, 3))
    assert u.shape == (2, 3, SPACE.dims)
    hp = SPACE.decode(u)
    assert {value.shape for value in hp.values()} == {(2, 3)}
    assert SPACE.encode(hp).shape == u.shape


def test_samples_fill_the_cube_and_are_snapped():
    u = SPACE.sample(jax.random.key(2), (500,))
    np.testing.assert_array_equal(SPACE.snap(u), u)
    np.testing.assert_allclose(u.mean(0), 0.5, atol=0.06)
    np.testing.assert_array_equal(u, SPACE.sample(jax.random.key(2), (500,)))
    assert set(np.unique(SPACE.decode(u)["layers"])) == set(range(1, 9))


def test_gradients_of_continuous_coordinates_flow():
    space = atn.SearchSpace({"dropout": (0.0, 0.5)})
    grad = jax.grad(lambda u: space.decode(u)["dropout"])(jnp.array([0.4]))
    np.testing.assert_allclose(grad, [0.5], rtol=1e-6)


def test_plain_mappings_are_read_as_documented():
    space = atn.SearchSpace({"a": (1e-4, 1e-2), "b": (1e-3, 1e-2), "c": (0.0, 1.0), "d": [2, 1], "e": (1, 100)})
    assert space["a"] == atn.Float(1e-4, 1e-2, log=True)
    assert space["b"] == atn.Float(1e-3, 1e-2)
    assert space["c"] == atn.Float(0.0, 1.0)
    assert space["d"] == atn.Choice([2, 1])
    assert space["e"] == atn.Float(1, 100, log=True)
    assert atn.SearchSpace(space) == space


def test_roles_follow_names_unless_given():
    space = atn.SearchSpace(
        {
            **{"learning_rate": (1e-5, 1e-1), "encoder/lr": (1e-5, 1e-1), "peak_learning_rate": (1e-5, 1e-1)},
            **{"momentum": (0.0, 0.9), "weight_decay": (1e-6, 1e-1), "temperature": atn.Float(0.1, 2.0, role="fast")},
        }
    )
    assert space.roles == ("rate", "rate", "rate", "fast", "slow", "fast")


def test_reads_like_a_mapping():
    assert list(SPACE) == list(HP) == list(SPACE.names)
    assert len(SPACE) == SPACE.dims == 6
    assert "dropout" in SPACE
    assert "weight_decay" not in SPACE
    np.testing.assert_array_equal(SPACE.is_categorical, [False] * 5 + [True])


def test_equal_spaces_hash_print_and_fingerprint_alike():
    one = atn.SearchSpace({"dropout": (0, 1), "layers": atn.Int(np.int64(1), np.int64(8))})
    two = atn.SearchSpace({"dropout": (0.0, np.float64(1.0)), "layers": atn.Int(1, 8)})
    assert one == two
    assert hash(one) == hash(two)
    assert repr(one) == repr(two)
    assert one.fingerprint() == two.fingerprint()


@pytest.mark.parametrize(
    "other",
    [
        {"dropout": (0.0, 0.5), "layers": atn.Choice([1, 2.0])},
        {"dropout": (0.0, 0.6), "layers": atn.Choice([1, 2])},
        {"layers": atn.Choice([1, 2]), "dropout": (0.0, 0.5)},
        {"rate": (0.0, 0.5), "layers": atn.Choice([1, 2])},
        {"dropout": atn.Float(0.0, 0.5, role="fast"), "layers": atn.Choice([1, 2])},
    ],
)
def test_different_spaces_differ(other):
    space, other = atn.SearchSpace({"dropout": (0.0, 0.5), "layers": atn.Choice([1, 2])}), atn.SearchSpace(other)
    assert space != other
    assert space.fingerprint() != other.fingerprint()


def test_a_space_is_static_under_jit():
    traces = []

    @jax.jit
    def middle(space):
        traces.append(space)
        return space.decode(jnp.full((space.dims,), 0.5))

    middle(atn.SearchSpace({"dropout": (0.0, 0.5)}))
    middle(atn.SearchSpace({"dropout": (0.0, 0.5)}))
    assert len(traces) == 1
    middle(atn.SearchSpace({"dropout": (0.0, 0.6)}))
    assert len(traces) == 2
    assert jax.tree.leaves(SPACE) == []


def test_clip_leaves_other_names_alone():
    clipped = SPACE.clip({"dropout": 3.0, "warmup": 7})
    assert float(clipped["dropout"]) <= 0.1
    assert clipped["warmup"] == 7


def test_contains_knows_names_and_bounds():
    assert SPACE.contains(HP)
    assert not SPACE.contains({**HP, "dropout": 0.11})
    assert not SPACE.contains({**HP, "activation": "gelu"})
    assert not SPACE.contains({"warmup": 7})


BAD = [
    # call, error, the rule, what was given, the remedy
    (lambda: atn.SearchSpace({}), ValueError, "at least one", "empty dict", "learning_rate"),
    (lambda: atn.SearchSpace([("a", (0, 1))]), TypeError, "mapping from name", "list", "Write it as"),
    (lambda: atn.SearchSpace({1: (0.0, 1.0)}), TypeError, "non-empty strings", "1", "Name it"),
    (lambda: atn.SearchSpace({"": (0.0, 1.0)}), TypeError, "non-empty strings", "''", "Name it"),
    (lambda: atn.SearchSpace({"lr": (0.1, 0.0)}), ValueError, "'lr': Float bounds must", "(0.1, 0.0)", "Swap"),
    (lambda: atn.SearchSpace({"lr": (0.1, "x")}), TypeError, "'lr': Float bounds must", "'x'", "plain numbers"),
    (lambda: atn.SearchSpace({"lr": (0, 1, 2)}), TypeError, "'lr': a hyperparameter is", "(0, 1, 2)", "one of these"),
    (lambda: atn.SearchSpace({"lr": 0.1}), TypeError, "'lr': a hyperparameter is", "0.1", "one of these"),
    (lambda: atn.SearchSpace({"lr": [0.1]}), ValueError, "'lr': Choice needs", "[0.1]", "Add some"),
    (lambda: SPACE.encode({"dropout": 0.05}), ValueError, "a value for each", "none for ['learning_rate'", "Add them"),
    (lambda: SPACE.decode(jnp.zeros(2)), ValueError, "6 coordinates", "(2,)", "Order them"),
    (lambda: SPACE.snap(jnp.zeros(())), ValueError, "6 coordinates", "()", "Order them"),
]


@pytest.mark.parametrize(("call", "error", "rule", "given_text", "remedy"), BAD)
def test_bad_input_names_rule_value_and_remedy(call, error, rule, given_text, remedy):
    with pytest.raises(error) as caught:
        call()
    for part in (rule, given_text, remedy):
        assert part in str(caught.value)


@pytest.mark.parametrize("spec", [[1e-5, 1e-1], [0.0, 0.5], [1, 8], [np.float32(1e-4), np.float32(1.0)], [-3, 0]])
def test_two_rising_numbers_in_a_list_are_asked_about(spec):
    with pytest.raises(ValueError, match=r"'x': the list .* may be meant as a range or as two options.*tuple.*Choice"):
        atn.SearchSpace({"x": spec})
    assert atn.SearchSpace({"x": atn.Choice(spec)})["x"].options == tuple(spec)


def test_files_without_tuples_write_a_range_as_a_mapping():
    given = {"lr": (1e-5, 0.1), "dropout": (0.0, 0.5), "decay": atn.Float(1, 200, role="slow")}
    text = '{"lr": {"lo": 1e-5, "hi": 0.1}, "dropout": {"lo": 0, "hi": 0.5}, '
    text += '"decay": {"lo": 1, "hi": 200, "log": false, "role": "slow"}}'
    assert atn.SearchSpace(json.loads(text)) == atn.SearchSpace(given)
    for spec in ({"lo": 1.0}, {"lo": 0.0, "hi": 1.0, "step": 0.1}, {}):
        with pytest.raises(TypeError, match=r"'x': a hyperparameter is .*a mapping with lo and hi.*of type dict"):
            atn.SearchSpace({"x": spec})


def test_lists_of_other_libraries_are_lists():
    for spec in (np.array([1e-4, 1e-3, 1e-2]), collections.UserList([1e-4, 1e-3, 1e-2])):
        assert atn.SearchSpace({"lr": spec})["lr"].options == pytest.approx((1e-4, 1e-3, 1e-2))


def test_options_of_a_rate_are_rising_numbers():
    assert atn.SearchSpace({"lr": [1e-2, 1e-4, 1e-3]})["lr"].options == (1e-4, 1e-3, 1e-2)
    assert atn.SearchSpace({"x": [1e-2, 1e-4, 1e-3]})["x"].options == (1e-2, 1e-4, 1e-3)
    for options in (["1e-3", "1e-2"], [None, 1e-3]):
        with pytest.raises(TypeError, match=r"'head/lr': a learning rate is a number.*YAML"):
            atn.SearchSpace({"head/lr": options})
    with pytest.raises(ValueError, match="'lr': a learning rate is not negative"):
        atn.SearchSpace({"lr": [-1.0, 1e-3, 1e-2]})


def test_other_lists_are_choices():
    for spec in ([2, 1], [1, 2, 3], [True, False], [False, True], ["a", "b"], [0.5, "b"], [None, 1]):
        assert atn.SearchSpace({"x": spec})["x"].options == tuple(spec)


@pytest.mark.parametrize("name", ["learning_rate", "head/lr"])
def test_a_rate_is_not_negative(name):
    with pytest.raises(ValueError, match=f"'{name}': a learning rate is not negative"):
        atn.SearchSpace({name: (-1e-3, 1.0)})
    assert atn.SearchSpace({name: (0.0, 1.0), "shift": (-1.0, 1.0)}).dims == 2


@pytest.mark.parametrize("names", [("lr", "learning_rate"), ("step_size", "lr"), ("head/lr", "head/learning_rate")])
def test_one_rate_has_one_name(names):
    with pytest.raises(ValueError, match=f"'{names[0]}' and '{names[1]}' name the same rate. Keep one"):
        atn.SearchSpace(dict.fromkeys(names, (1e-4, 1.0)))
    apart = atn.SearchSpace({"head/lr": (1e-4, 1.0), "body/learning_rate": (1e-4, 1.0), "lr": (1e-3, 1.0)})
    assert apart.roles == ("rate", "rate", "rate")
