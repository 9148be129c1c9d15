"""What JAX traces of a function, kept beside what it compiles.

JAX finds a compiled program again by the program that was traced, so each process traces before it can look anything
up. For a decision that takes longer than loading what was compiled. A program is stored under a digest of the whole
package's code, of versions, options and what it is called with (a plan is among its arguments), and sealed with that
name: a foreign or damaged file is passed over, never run.

Measured on jax 0.10.2, CPU (``benchmarks.overhead``): where everything is in the cache, a wrapped step is ready after
1.0 s of processor time, without this after 1.7 s. Switched off by ``AUTOTUNENET_COMPILER_OFF=stored_program``.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import pickle
import tempfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import export
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir

from .._version import __version__
from .switches import SWITCHES, is_on

_SEAL_BYTES = hashlib.sha256().digest_size
# Within the folder of JAX's cache.
_FOLDER = "autotunenet_jax"
# What a trace depends on besides the function and its arguments.
_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable", "jax_numpy_dtype_promotion",
            "jax_numpy_rank_promotion", "jax_default_prng_impl")  # fmt: skip


def stored_program(
    *, like: Callable[..., Any], static_argnums: tuple[int, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Keeps the traced program of a function in the folder of JAX's compilation cache, where one is set, on CPUs.

    Args:
      like: With the function's arguments, something of the structure of its result, made without tracing: what is
        stored is a function of leaves.
      static_argnums: Arguments that are no arrays; hashable. They are told apart by what ``pickle`` makes of them, and
        nothing is stored for those that it refuses.

    Returns:
      A decorator for pure functions. Under ``jax.vmap`` and ``jax.jvp`` the function itself is traced, and so it is
      where a stored program cannot be read or written.

    Cost: some milliseconds for a program that is found.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            folder = _folder()
            static = tuple(arg if n in static_argnums else None for n, arg in enumerate(args))
            leaves, structure = jax.tree.flatten([None if n in static_argnums else arg for n, arg in enumerate(args)])
            # Under a mesh a program would be one for so many devices.
            is_plain = jax.sharding.get_abstract_mesh().empty and all(isinstance(leaf, jax.Array) for leaf in leaves)
            if folder is None or not is_plain:
                return function(*args)
            shapes = tuple(_shape(jax.typeof(leaf)) for leaf in leaves)
            stored = _stored(function, _Signature(static, structure, shapes), folder, _options())
            if stored is None:
                return function(*args)
            return jax.tree.unflatten(jax.tree.structure(like(*args)), stored(*leaves))

        return call

    return decorate


def named(kind: Any, **parts: Any) -> Any:
    """A NamedTuple of that kind with its fields' names in the place of arrays, but for the parts given."""
    return kind(**{**dict(zip(kind._fields, kind._fields, strict=True)), **parts})


def has_programs() -> bool:
    """Whether any program is stored: then perhaps none will be traced."""
    folder = _folder()
    return folder is not None and (pathlib.Path(folder) / _FOLDER).is_dir()


class _Signature(NamedTuple):
    """How a function is called: its static arguments, the tree of the others, and what those are."""

    static: tuple[Any, ...]
    structure: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)


def _folder() -> str | None:
    """Where programs are kept, if anywhere."""
    config: Any = jax.config
    folder = config.jax_compilation_cache_dir
    has_cache = is_on("stored_program") and config.jax_enable_compilation_cache and folder and "://" not in folder
    # A program is made for one platform. Where there is none but the CPU it will not be asked for on another.
    return folder if has_cache and jax.default_backend() == "cpu" else None


def _options() -> tuple[Any, ...]:
    return (*(getattr(jax.config, name, None) for name in _OPTIONS), *map(is_on, SWITCHES))


@functools.lru_cache(maxsize=64)
def _stored(
    function: Callable[..., Any], signature: _Signature, folder: str, options: tuple[Any, ...]
) -> Callable[..., Any] | None:
    """The function of its leaves by way of its program; None where the arguments have no name to store it under."""
    name = _name(function, signature, options)
    if name is None:
        return None

    def plain(*leaves: Any) -> list[Any]:
        args = jax.tree.unflatten(signature.structure, leaves)
        given = [arg if fixed is None else fixed for fixed, arg in zip(signature.static, args, strict=True)]
        return jax.tree.leaves(function(*given))

    path = pathlib.Path(folder) / _FOLDER / name
    program = _read(path)
    if program is None:
        try:
            program = export.export(jax.jit(plain))(*signature.leaves)
        except ValueError:  # something in it that cannot be exported
            return None
        _write(path, program)

    alone = custom_vmap(functools.partial(_stored_p.bind, program=program))

    @alone.def_vmap
    def _(axis_size: int, is_batched: Any, *leaves: Any) -> Any:
        results = jax.vmap(plain, [0 if flag else None for flag in is_batched], axis_size=axis_size)(*leaves)
        return results, [True] * len(results)

    stored = jax.custom_jvp(alone)
    stored.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return stored


# JAX commits to a device whatever comes out of a program that calls an exported one, so that the second step of a run
# would be compiled again, for other arguments than the first. It does not look into this.
_stored_p = Primitive("stored_program")
_stored_p.multiple_results = True
_stored_p.def_abstract_eval(lambda *_, program: program.out_avals)
_stored_p.def_impl(lambda *leaves, program: jax.jit(program.call)(*leaves))
mlir.register_lowering(_stored_p, mlir.lower_fun(lambda *leaves, program: program.call(*leaves), multiple_results=True))


def _name(function: Callable[..., Any], signature: _Signature, options: tuple[Any, ...]) -> str | None:
    try:
        static = pickle.dumps(signature.static)
    except Exception:  # pickle lets through whatever an object's own methods raise
        return None
    shapes = [(leaf.shape, str(leaf.dtype), leaf.weak_type) for leaf in signature.leaves]
    called = f"{function.__module__}.{function.__qualname__} {signature.structure} {shapes} {options}"
    digest = hashlib.sha256(_origin() + called.encode() + static)
    return f"{function.__name__}-{digest.hexdigest()}"


@functools.cache
def _origin() -> bytes:
    """Digest of what makes programs: this package's code, and versions."""
    digest = hashlib.sha256(__version__.encode())
    for package in ("jax", "jaxlib", "gpjax"):
        digest.update(f"{package} {importlib.metadata.version(package)} ".encode())
    for file in sorted(pathlib.Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.digest()


def _seal(path: pathlib.Path, data: bytes) -> bytes:
    """Digest of a program with what it is a program of, which the name tells: a copy under another name is foreign."""
    return hashlib.sha256(path.name.encode() + data).digest()


def _read(path: pathlib.Path) -> export.Exported | None:
    try:
        content = path.read_bytes()
        seal, data = content[:_SEAL_BYTES], content[_SEAL_BYTES:]
        program = export.deserialize(bytearray(zlib.decompress(data))) if seal == _seal(path, data) else None
    except Exception:  # there is none, or it is of another version of JAX's own making
        return None
    return program if program is not None and program.nr_devices == 1 else None


def _write(path: pathlib.Path, program: export.Exported) -> None:
    """In one piece or not at all; a cache that cannot be written is none."""
    data = zlib.compress(program.serialize(), 1)
    data = _seal(path, data) + data
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file, contextlib.ExitStack() as failed:
            failed.callback(os.unlink, file.name)
            file.write(data)
            file.flush()
            os.replace(file.name, path)
            failed.pop_all()
