"""Programs kept beside JAX's cache: found again without tracing, equal to the function, and never in the way."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autotunenet_jax.compiler import stored_program as programs
from autotunenet_jax.compiler.single_kernel import single_kernel
from autotunenet_jax.compiler.stored_program import stored_program

TRACES = []


def like(power, x, rest):
    return {"root": x, "key": x, "count": x}


@stored_program(like=like, static_argnums=(0,))
def powered(power, x, rest):
    TRACES.append(power)
    key = jax.random.split(rest["key"])[0]
    matrix = jnp.eye(3) * (1.0 + x @ x)
    return {"root": jnp.linalg.cholesky(matrix)[0, 0] ** power, "key": key, "count": rest["count"] + 1}


def arguments(x=(1.0, 2.0, 3.0)):
    return jnp.array(x), {"key": jax.random.key(3), "count": jnp.int32(4)}


def run(power=2, x=(1.0, 2.0, 3.0)):
    return jax.jit(lambda *args: powered(power, *args))(*arguments(x))


def another_process():
    programs._stored.cache_clear()
    TRACES.clear()


@pytest.fixture
def folder(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    another_process()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "autotunenet_jax"
    jax.config.update("jax_compilation_cache_dir", before)
    another_process()


def files(folder):
    return sorted(folder.glob("*")) if folder.is_dir() else []


def assert_right(found, power=2.0, x=(1.0, 2.0, 3.0)):
    np.testing.assert_allclose(found["root"], (1.0 + np.square(x).sum()) ** (power / 2), rtol=1e-5)
    assert found["key"] == jax.random.split(jax.random.key(3))[0]
    assert found["count"] == 5 and found["count"].dtype == jnp.int32 and found["root"].dtype == jnp.float32


def test_the_next_process_traces_nothing(folder):
    assert_right(run())
    assert TRACES and len(files(folder)) == 1
    another_process()
    assert_right(run())
    assert not TRACES


def test_a_loop_around_it_is_compiled_once(folder):
    """JAX commits what comes out of an exported program to its device: a second call would be another one."""
    for _ in range(2):
        another_process()
        step = jax.jit(lambda x, rest: (x + powered(2, x, rest)["root"], {**rest, "count": rest["count"] + 1}))
        x, rest = arguments()
        for _ in range(3):
            x, rest = step(x, rest)
        assert step._cache_size() == 1 and not x.committed
    assert not TRACES and len(files(folder)) == 1
    # Outside of compiled code too.
    x, rest = arguments()
    assert_right(powered(2, x, rest))


def test_what_is_different_is_stored_apart(folder, monkeypatch):
    run(2), run(3)
    assert_right(run(3), 3.0)
    assert len(files(folder)) == 2
    with jax.numpy_dtype_promotion("strict"):
        run(2)
    assert len(files(folder)) == 3
    another_process()
    monkeypatch.setattr(programs, "_origin", lambda: b"code of another version")
    run(2)
    assert TRACES and len(files(folder)) == 4


def test_all_code_of_the_package_tells_programs_apart(monkeypatch):
    read, original = [], pathlib.Path.read_bytes
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: (read.append(path), original(path))[1])
    programs._origin.__wrapped__()
    package = pathlib.Path(programs.__file__).parents[1]
    assert package / "controller" / "decision.py" in read
    assert set(read) == set(package.rglob("*.py"))


def test_it_says_whether_any_program_is_stored(folder):
    assert not programs.has_programs()
    run()
    assert programs.has_programs()
    jax.config.update("jax_compilation_cache_dir", None)
    assert not programs.has_programs()


def test_without_a_cache_nothing_is_written(folder):
    jax.config.update("jax_compilation_cache_dir", None)
    assert_right(run())
    jax.config.update("jax_compilation_cache_dir", str(folder.parent))
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert_right(run(3), 3.0)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not files(folder)


@pytest.mark.parametrize("damage", [b"", b"x" * 100])
def test_a_damaged_file_is_replaced(folder, damage):
    run()
    whole = files(folder)[0].read_bytes()
    files(folder)[0].write_bytes(damage)
    another_process()
    assert_right(run())
    assert TRACES and len(files(folder)) == 1 and len(files(folder)[0].read_bytes()) == len(whole)
    another_process()
    run()
    assert not TRACES


def test_a_program_under_the_name_of_another_is_not_run(folder):
    run(2)
    (first,) = files(folder)
    run(3)
    (second,) = set(files(folder)) - {first}
    second.write_bytes(first.read_bytes())
    another_process()
    assert_right(run(3), 3.0)
    assert TRACES == [3]


def test_programs_made_with_and_without_a_trick_are_stored_apart(folder, monkeypatch):
    run()
    monkeypatch.setenv("AUTOTUNENET_COMPILER_OFF", "single_kernel")
    assert_right(run())
    assert len(files(folder)) == 2


def test_nothing_is_stored_under_a_mesh(folder):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert_right(run())
    assert not files(folder)
    assert_right(run())
    assert len(files(folder)) == 1


def test_what_cannot_be_exported_is_traced(folder, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("a custom call without guarantees")

    monkeypatch.setattr(programs.export, "export", refuse)
    assert_right(run())
    assert not files(folder)


def test_a_full_disk_leaves_no_remains(folder, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert_right(run())
    assert not files(folder)


def test_nothing_is_stored_at_a_url(folder):
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert programs._folder() is None


def test_a_folder_that_cannot_be_written(folder):
    folder.write_text("a file is in its place")
    assert_right(run())


def test_what_cannot_be_told_from_others_is_not_stored(folder):
    class Secret(float):
        def __reduce__(self):
            raise RuntimeError("not to be copied")

    assert_right(run(Secret(2.0)))
    assert not files(folder)


def test_batches_and_derivatives_are_those_of_the_function(folder):
    run()
    another_process()
    x, rest = arguments()
    many = jnp.stack([x, 2 * x])
    found = jax.vmap(lambda x: powered(2, x, rest))(many)
    np.testing.assert_allclose(found["root"], 1.0 + jnp.square(many).sum(1), rtol=1e-5)
    value, slope = jax.jvp(lambda x: powered(2, x, rest)["root"], (x,), (jnp.ones(3),))
    np.testing.assert_allclose((value, slope), (15.0, 12.0), rtol=1e-5)


def test_it_may_stand_in_loops_and_conditions(folder):
    x, rest = arguments()

    def body(carry, _):
        root = jax.lax.cond(carry > 2.0, lambda: powered(1, x / carry, rest)["root"], lambda: carry + 1.0)
        return root, root

    once_more = [jax.jit(lambda: jax.lax.scan(body, jnp.float32(1.0), None, length=6)[1])()]
    another_process()
    once_more.append(jax.jit(lambda: jax.lax.scan(body, jnp.float32(1.0), None, length=6)[1])())
    np.testing.assert_array_equal(*once_more)
    assert not TRACES


def test_a_kernel_is_stored_as_a_kernel(folder):
    @stored_program(like=lambda x: (x, x))
    @single_kernel()
    def several(x):
        hot = jnp.tanh(x) > 0.5
        return jnp.where(hot, x, 0.0), jnp.where(hot, 0.0, x)

    for _ in range(2):
        program = jax.jit(several).lower(jnp.ones(3)).compile().as_text()
        assert program.count('xla_cpu_small_call="true"') > 0
        another_process()
    assert len(files(folder)) == 1


WHOLE = """
import hashlib, sys
import jax, jax.numpy as jnp, optax
import autotunenet_jax as atn
from autotunenet_jax.controller import decision

if sys.argv[1] == "second":
    decision.decide = None
optimizer = atn.autotune(optax.adam, {"learning_rate": (1e-4, 1e0)}, 120, learning_rate=1e-3)
params = {"x": jnp.arange(4.0)}
state = optimizer.init(params)

@jax.jit
def step(params, state):
    loss, grads = jax.value_and_grad(lambda p: jnp.sum((p["x"] - 1.0) ** 2))(params)
    updates, state = optimizer.update(grads, state, params, value=loss)
    return optax.apply_updates(params, updates), state

print(hashlib.sha256(step.lower(params, state).as_text().encode()).hexdigest())
"""


def test_a_second_run_of_a_script_does_not_trace_its_decisions(tmp_path):
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    runs = [
        subprocess.run(
            [sys.executable, "-c", WHOLE, which], env=environment, check=True, capture_output=True, text=True
        ).stdout
        for which in ("first", "second")
    ]
    # The same program, so that JAX finds what it compiled.
    assert runs[0] == runs[1]
