"""Functions of a few numbers, compiled as one piece.

Measured on jax 0.10.2, CPU (``benchmarks.overhead``): a wrapped step compiles in 7.7 s of processor time, without this
in 10 s. Switched off by ``AUTOTUNENET_COMPILER_OFF=single_kernel``; other versions of JAX compile as they do anyway.
"""

import functools
import importlib.metadata
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array

from . import words
from .precision import in_float32
from .switches import is_on

# What makes XLA on CPU leave a call as it is and compile its body as one kernel.
_ONE_KERNEL: dict[str, Any] = {"inlineable": "false", "xla_cpu_small_call": "true"}
_NOTHING: dict[str, Any] = dict.fromkeys(_ONE_KERNEL)
# Where it is known to. Other versions compile the functions as any other.
_VERSIONS = ("0.10.",)

# Larger reductions, and any product of two matrices, XLA may leave to a library.
_LARGE = 2048
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
_LIBRARY = ("sort", "top_k", "cholesky", "triangular_solve", "scatter", "fft", "eigh", "svd", "lu",
            "conv_general_dilated", "pure_callback", "io_callback", "debug_callback")  # fmt: skip

_tracing = threading.local()


def single_kernel(*, static_argnums: tuple[int, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function as one kernel instead of one for each array it returns.

    XLA on CPU makes a kernel of each array that a computation returns, with all that leads to it in each. A state
    machine is hundreds of such kernels, which take long to compile, and each of them is a call in every step.

    Args:
      static_argnums: As for ``jax.jit``.

    Returns:
      A decorator for pure functions of small arrays. One that needs a library, as factorisations, products of matrices
      and large reductions do, is compiled as usual, and so is every one under ``jax.vmap`` and on other devices.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @in_float32
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            if getattr(_tracing, "is_inside", False) or not _is_supported():
                return function(*args)
            static = tuple(arg if position in static_argnums else None for position, arg in enumerate(args))
            leaves, structure = jax.tree.flatten(
                [None if position in static_argnums else arg for position, arg in enumerate(args)]
            )
            leaves = [jnp.asarray(leaf) for leaf in leaves]
            shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
            impls = tuple(jax.random.key_impl(leaf) if _is_key(leaf) else None for leaf in leaves)
            signature = _Signature(static, structure, shapes, impls)
            return _kernel(function, signature)(*leaves)

        return call

    return decorate


def unknown(numbers: Sequence[int], zero: Array) -> list[Any]:
    """Numbers that XLA on CPU does not know while it compiles: kernels that differ by one only are compiled once.

    Args:
      numbers: 32-bit integers.
      zero: int32 scalar that is zero whenever the program runs, which XLA must not be able to tell.
    """
    if not _is_supported():
        return [np.int32(number) for number in numbers]
    with set_xla_metadata(inlineable="false"):
        return _added(tuple(numbers), zero)


@functools.partial(jax.jit, static_argnums=0)
def _added(numbers: tuple[int, ...], zero: Array) -> list[Array]:
    with set_xla_metadata(inlineable=None):
        return [zero + np.int32(number) for number in numbers]


class _Signature(NamedTuple):
    """How a function is called: its static arguments, the tree of the others, what those are, and keys' kinds."""

    static: tuple[Any, ...]
    structure: Any
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    impls: tuple[Any, ...]


@functools.cache
def _is_known_version() -> bool:
    return importlib.metadata.version("jaxlib").startswith(_VERSIONS)


def _is_supported() -> bool:
    return is_on("single_kernel") and jax.default_backend() == "cpu" and _is_known_version()


@functools.lru_cache(maxsize=256)
def _kernel(function: Callable[..., Any], signature: _Signature) -> Callable[..., Any]:
    """The function of its leaves, as one kernel where that can be."""
    from . import pieces  # its jax.extend loads Pallas, which no import of ours should

    def plain(*leaves: Any) -> Any:
        args = jax.tree.unflatten(signature.structure, leaves)
        return function(*(given if arg is None else arg for given, arg in zip(signature.static, args, strict=True)))

    _tracing.is_inside = True
    try:
        program, results = jax.make_jaxpr(plain, return_shape=True)(*signature.leaves)
    finally:
        _tracing.is_inside = False
    inputs, outputs = program.jaxpr.invars, program.jaxpr.outvars
    read = {id(variable) for equation in program.eqns for variable in equation.invars}
    live = [number for number, variable in enumerate(inputs) if id(variable) in read]
    # One dtype after the other: to convert each array by itself takes a kernel.
    live.sort(key=lambda number: _stored(signature.leaves[number]).dtype.name)
    places = {id(variable): number for number, variable in enumerate(inputs)}
    # What comes back as it went in stays outside.
    passed = [places.get(id(variable)) for variable in outputs]
    kinds = [_stored(signature.leaves[number]) for number in live]
    if not live or any(kind.dtype not in words.DTYPES for kind in kinds) or _needs_library(program.jaxpr):
        return plain

    def evaluated(*values: Any) -> list[Any]:
        args: list[Any] = [None] * len(inputs)
        for number, value in zip(live, values, strict=True):
            args[number] = value
        computed = pieces.evaluate(program, args)
        return [value for value, place in zip(computed, passed, strict=True) if place is None]

    @jax.jit
    def body(packed: Any) -> list[Any]:
        values = _with_keys(words.unpack(packed, kinds), [signature.impls[number] for number in live])
        with set_xla_metadata(**_NOTHING):
            return evaluated(*values)

    @custom_vmap
    def alone(*values: Any) -> list[Any]:
        # All in one: the kernel's emitter cannot stand an argument that turns out to be unused.
        packed = words.pack([_data(value) for value in values])
        with set_xla_metadata(**_ONE_KERNEL):
            return body(packed)

    @alone.def_vmap
    def _(axis_size: int, is_batched: Sequence[bool], *values: Any) -> Any:
        # Under vmap reductions grow, and one thread would do the work of all.
        computed = jax.vmap(evaluated, [0 if flag else None for flag in is_batched], axis_size=axis_size)(*values)
        return computed, [True] * len(computed)

    kernel = jax.custom_jvp(alone)
    # Words have no derivatives; what they stand for has.
    kernel.defjvp(lambda primals, tangents: jax.jvp(evaluated, primals, tangents))

    def one(*leaves: Any) -> Any:
        computed = iter(kernel(*(leaves[number] for number in live)))
        values = [next(computed) if place is None else leaves[place] for place in passed]
        return jax.tree.unflatten(jax.tree.structure(results), values)

    return one


def _with_keys(values: list[Any], impls: list[Any]) -> list[Any]:
    """Key data become keys of their implementation, where they have one."""
    pairs = zip(values, impls, strict=True)
    return [value if impl is None else jax.random.wrap_key_data(value, impl=impl) for value, impl in pairs]


def _is_key(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _data(array: Any) -> Any:
    return jax.random.key_data(array) if _is_key(array) else array


def _stored(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(_data, leaf) if _is_key(leaf) else leaf


def _needs_library(jaxpr: Any) -> bool:
    """Whether a part of a program is none that XLA puts into a kernel of its own making."""
    from jax.extend.core import jaxprs_in_params

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        shapes = [getattr(operand.aval, "shape", ()) for operand in equation.invars]
        if name in _LIBRARY or (name in _REDUCTIONS and _is_large(equation.invars[0].aval)):
            return True
        if name == "dot_general" and _is_matrix_product(equation.params["dimension_numbers"], shapes):
            return True
        if any(_needs_library(part) for part in jaxprs_in_params(equation.params)):
            return True
    return False


def _is_large(operand: Any) -> bool:
    return jnp.issubdtype(operand.dtype, jnp.floating) and operand.size >= _LARGE


def _is_matrix_product(dimensions: Any, shapes: list[tuple[int, ...]]) -> bool:
    """Whether both operands have rows of their own, or are too long."""
    (contracted, batch), rows = dimensions, []
    for shape, summed, shared in zip(shapes, contracted, batch, strict=True):
        rows.append(math.prod(size for axis, size in enumerate(shape) if axis not in (*summed, *shared)))
    inner = math.prod(shapes[0][axis] for axis in contracted[0])
    return min(rows) > 1 or (max(rows) == 1 and inner >= _LARGE)
