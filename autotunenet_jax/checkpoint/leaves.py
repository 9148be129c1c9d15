"""Leaves of a pytree as plain host arrays with a description, and back, bit for bit.

Every leaf becomes a `LeafSpec` (what it is, JSON-able) and, unless the value fits into the description, one
C-contiguous NumPy array of a dtype that every array store knows. This module knows nothing of files.
"""

import base64
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from .entries import DamagedFileError, entry_of
from .errors import SnapshotMismatchError

Kind = Literal["array", "key", "python"]
Container = Literal["jax", "numpy", "scalar", "python"]

# Dtypes that array stores write as they are; all others (float8, int4, text, dates) travel as bytes.
_PLAIN_DTYPES = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
    | {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}
)
_LISTED_DIFFERENCES = 8
_NUMBER_CATEGORIES = {"bool": np.bool_, "int": np.integer, "float": np.floating, "complex": np.complexfloating}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafSpec:
    """What one leaf is.

    Args:
      name: Path in the tree, as in ``params/dense_3/kernel``.
      kind: ``"array"``, ``"key"`` (a typed random key, kept as its raw words) or ``"python"`` (a number or text).
      container: What held the value when it was saved.
      dtype: Name of the dtype; for a Python value the name of its type.
      shape: Shape of the leaf itself; for keys without the trailing words.
      is_weak: Whether JAX took the array's dtype as weak; kept because it decides later promotions and retraces.
      impl: Name of the generator of a typed key, else empty.
      value: A Python value in text form, else None.
      crc32: Checksum of the bytes stored, else None.
    """

    name: str
    kind: Kind
    container: Container
    dtype: str
    shape: tuple[int, ...] = ()
    is_weak: bool = False
    impl: str = ""
    value: str | None = None
    crc32: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, body: dict[str, Any]) -> "LeafSpec":
        """What `to_json` gave; anything else is a `DamagedFileError`."""
        kind, container = entry_of(body, "kind", str), entry_of(body, "container", str)
        shape = entry_of(body, "shape", list)
        if kind not in get_args(Kind) or container not in get_args(Container):
            raise DamagedFileError("a leaf is of no known kind")
        if any(type(length) is not int or not 0 <= length < 2**48 for length in shape):
            raise DamagedFileError("a leaf has no such shape")
        return cls(
            **{name: entry_of(body, name, str) for name in ("name", "dtype", "impl")},
            kind=kind,
            container=container,
            shape=tuple(shape),
            is_weak=entry_of(body, "is_weak", bool),
            value=entry_of(body, "value", str | None),
            crc32=entry_of(body, "crc32", int | None, least=0),
        )

    @property
    def is_stored(self) -> bool:
        """Whether an array is written for this leaf; Python values and zero-size arrays live in the description."""
        return self.kind != "python" and 0 not in self.shape

    def __str__(self) -> str:
        shape = ",".join(map(str, self.shape))
        if self.kind == "python":
            return f"Python {self.dtype}"
        return f"key<{self.impl}>[{shape}]" if self.kind == "key" else f"{self.dtype}[{shape}]"


def is_key(leaf: Any) -> bool:
    """Whether a leaf (or its shape description) is a typed random key."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> str:
    if isinstance(leaf, jax.Array):
        return str(jax.random.key_impl(leaf))
    # A ShapeDtypeStruct has the key's dtype, "key<fry>", but no data: make one key of that dtype to learn the name.
    return str(jax.random.key_impl(jnp.zeros((), dtype=leaf.dtype)))


def _dtype_name(dtype: np.dtype) -> str:
    # dtype.name of text or of a foreign byte order does not lead back to the dtype; dtype.str does.
    return dtype.name if dtype.isnative and dtype.kind not in "USMm" else dtype.str


def _is_plain_data(dtype: np.dtype) -> bool:
    # NumPy gives JAX's own dtypes (bfloat16, float8, int4) the kind of raw bytes, so raw bytes go by their name.
    return not dtype.hasobject and dtype.names is None and not dtype.name.startswith("void")


def _python_text(value: Any) -> str:
    match value:
        case bool() | int():
            return repr(value)
        case float():
            return value.hex()
        case complex():
            return f"{value.real.hex()} {value.imag.hex()}"
        case bytes():
            return base64.b64encode(value).decode("ascii")
        case _:
            return value


_READ_PYTHON: dict[str, Callable[[str], Any]] = {
    "bool": lambda text: text == "True",
    "int": int,
    "float": float.fromhex,
    "complex": lambda text: complex(*map(float.fromhex, text.split(" "))),
    "bytes": base64.b64decode,
}


def _python_value(spec: LeafSpec) -> Any:
    return _READ_PYTHON.get(spec.dtype, str)(spec.value or "")


def _describe_leaf(name: str, leaf: Any) -> LeafSpec:
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError(f"Cannot snapshot {name}: it is a tracer. Save outside jit, with the arrays that jit returned.")
    if type(leaf) in (bool, int, float, complex, str, bytes):
        text = _python_text(leaf)
        return LeafSpec(name=name, kind="python", container="python", dtype=type(leaf).__name__, value=text)
    if is_key(leaf):
        return LeafSpec(
            name=name, kind="key", container="jax", dtype="key", shape=tuple(leaf.shape), impl=_key_impl(leaf)
        )
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        weak = bool(getattr(leaf, "weak_type", False))
        dtype = np.dtype(leaf.dtype)
        if dtype.names is None:
            return LeafSpec(
                name=name, kind="array", container="jax", dtype=dtype.name, shape=tuple(leaf.shape), is_weak=weak
            )
    if isinstance(leaf, np.ndarray | np.generic) and _is_plain_data(leaf.dtype):
        container = "numpy" if isinstance(leaf, np.ndarray) else "scalar"
        dtype = _dtype_name(leaf.dtype)
        return LeafSpec(name=name, kind="array", container=container, dtype=dtype, shape=leaf.shape)
    raise TypeError(
        f"Cannot snapshot {name}: a leaf of type {type(leaf).__name__}"
        f"{f' and dtype {leaf.dtype}' if hasattr(leaf, 'dtype') else ''}. "
        "Keep arrays, random keys, numbers and text in the state; keep other objects outside it."
    )


def describe(tree: Any) -> tuple[list[Any], list[LeafSpec], Any]:
    """The leaves of a tree, what each of them is, and the tree definition."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") or "(root)" for path, _ in paths]
    if len(set(names)) < len(names):  # {"a": {"b": x}, "a/b": y}: fall back to the unambiguous spelling
        names = [jax.tree_util.keystr(path) for path, _ in paths]
    leaves = [leaf for _, leaf in paths]
    return leaves, [_describe_leaf(n, leaf) for n, leaf in zip(names, leaves, strict=True)], treedef


def host_view(leaf: Any, spec: LeafSpec) -> np.ndarray:
    """The leaf's values as a NumPy array that may alias it."""
    if isinstance(leaf, jax.Array):
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise ValueError(
                f"Cannot snapshot {spec.name}: it is spread over several processes. "
                "Gather it first (jax.experimental.multihost_utils.process_allgather) and save in one process, "
                "as `fit` does."
            )
        leaf = jax.random.key_data(leaf) if spec.kind == "key" else leaf
    array = np.asarray(leaf)
    if spec.kind == "array" and spec.dtype not in _PLAIN_DTYPES:
        return np.frombuffer(array.tobytes(), np.uint8)
    return array


def copy_to_host(leaves: Sequence[Any], specs: Sequence[LeafSpec], buffers: dict[int, np.ndarray]) -> list[Any]:
    """Copies leaves to host memory.

    Args:
      leaves: As `describe` returned them.
      specs: Their descriptions.
      buffers: Host arrays of an earlier copy by leaf number, reused where dtype and shape agree and replaced where
        not. Reuse matters: faulting in fresh pages costs more than copying into resident ones.

    Returns:
      One C-contiguous array per leaf, none of which aliases the leaf; None where nothing is stored.

    Cost: one pass over the data; 10 to 40 ms per 100 MB into resident buffers on a CPU.
    """
    for leaf, spec in zip(leaves, specs, strict=True):
        if spec.is_stored and spec.kind == "array" and isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    copies: list[Any] = []
    for number, (leaf, spec) in enumerate(zip(leaves, specs, strict=True)):
        if not spec.is_stored:
            copies.append(None)
            continue
        view = host_view(leaf, spec)
        buffer = buffers.get(number)
        if buffer is None or buffer.shape != view.shape or buffer.dtype != view.dtype:
            buffer = buffers[number] = np.empty(view.shape, view.dtype)
        np.copyto(buffer, view)
        copies.append(buffer)
    return copies


def allocate(specs: Sequence[LeafSpec], buffers: dict[int, np.ndarray]) -> None:
    """Puts resident buffers for `copy_to_host` where there are none; those of keys are small and come by themselves."""
    for number, spec in enumerate(specs):
        layout = stored_layout(spec) if spec.is_stored else None
        if layout is not None and number not in buffers:
            buffer = np.empty(layout[1], layout[0])
            buffer.reshape(-1).view(np.uint8)[:] = 0  # pages are handed out when first written to
            buffers[number] = buffer


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def stored_layout(spec: LeafSpec) -> tuple[np.dtype, tuple[int, ...]] | None:
    """Dtype and shape of the stored array of an ordinary leaf; None for keys, whose words depend on the generator."""
    if spec.kind == "key":
        return None
    dtype = np.dtype(spec.dtype)
    if spec.dtype in _PLAIN_DTYPES:
        return dtype, spec.shape
    return np.dtype(np.uint8), (dtype.itemsize * int(np.prod(spec.shape, dtype=np.int64)),)


def _weak(array: jax.Array) -> jax.Array:
    # Scattering into a weakly typed array is the public way to a weakly typed array of given values.
    zero = {"f": 0.0, "i": 0, "u": 0, "c": 0j}.get(array.dtype.kind)
    if zero is None:
        return array
    base = jnp.broadcast_to(jnp.asarray(zero), array.shape)
    return base.at[...].set(array) if base.dtype == array.dtype else array


def _place(array: Any, like: Any) -> jax.Array:
    # An array that JAX was free to place stays so: pinning it to a device would change what later calls compile.
    is_pinned = bool(getattr(like, "committed", True))
    sharding = getattr(like, "sharding", None)
    if sharding is not None and not sharding.is_fully_addressable:
        # Each process takes its own part; `jax.device_put` would first compare what all of them have.
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.device_put(array, sharding if is_pinned else None, may_alias=False)


def restore_leaf(spec: LeafSpec, stored: np.ndarray | None, like: Any) -> Any:
    """The leaf, with the very bits that were saved, in the container, placement and sharding of ``like``."""
    if spec.kind == "python":
        return _python_value(spec)
    if spec.kind == "key":
        if stored is None:
            words = jax.random.key_data(jax.random.key(0, impl=spec.impl)).shape
            stored = np.zeros((*spec.shape, *words), np.uint32)
        return _place(jax.random.wrap_key_data(jnp.array(stored), impl=spec.impl), like)
    dtype = np.dtype(spec.dtype)
    if stored is None:
        array = np.zeros(spec.shape, dtype)
    elif spec.dtype in _PLAIN_DTYPES:
        array = stored
    else:
        array = np.frombuffer(stored.tobytes(), dtype).reshape(spec.shape).copy()
    match spec.container if not hasattr(like, "dtype") else _container(like):
        case "scalar":
            return array[()]
        case "numpy":
            return array
        case _:
            placed = _place(array, like)
            return _weak(placed) if spec.is_weak else placed


def _container(like: Any) -> Container:
    if isinstance(like, np.generic):
        return "scalar"
    return "numpy" if isinstance(like, np.ndarray) else "jax"


def _is_same_number(saved: LeafSpec, wanted: LeafSpec) -> bool:
    """Whether one side is a Python number and the other a scalar array of the same category.

    A fresh state often starts with ``step=0`` and holds an array after the first step; what was saved is restored.
    """
    python, array = (saved, wanted) if saved.kind == "python" else (wanted, saved)
    if python.kind != "python" or array.kind != "array" or array.shape != ():
        return False
    category = _NUMBER_CATEGORIES.get(python.dtype)
    return category is not None and jnp.issubdtype(np.dtype(array.dtype), category)


def check_same(saved: Sequence[LeafSpec], wanted: Sequence[LeafSpec], *, where: str) -> None:
    """Checks that a saved tree fits the one asked for.

    Raises:
      SnapshotMismatchError: Leaves are missing, unexpected, or differ in shape or dtype; all are named.
    """
    have, want = {s.name: s for s in saved}, {s.name: s for s in wanted}
    problems = [f"missing {name} ({want[name]})" for name in want if name not in have]
    problems += [f"unexpected {name} ({have[name]})" for name in have if name not in want]
    for name, new in want.items():
        if (old := have.get(name)) is None:
            continue
        same = (old.kind, old.dtype, old.shape, old.impl) == (new.kind, new.dtype, new.shape, new.impl)
        if same or _is_same_number(old, new):
            continue
        what = "shape" if (old.kind, old.dtype, old.impl) == (new.kind, new.dtype, new.impl) else "type"
        what = "dtype" if what == "type" and old.kind == new.kind == "array" and old.shape == new.shape else what
        problems.append(f"{what} of {name}: {old} in the snapshot, {new} asked for")
    if problems:
        shown = "; ".join(problems[:_LISTED_DIFFERENCES])
        rest = len(problems) - _LISTED_DIFFERENCES
        raise SnapshotMismatchError(
            f"{where} is of another model: {shown}{f'; and {rest} more' if rest > 0 else ''}. Nothing was loaded. "
            "Build the state as it was when the snapshot was saved, or use another folder."
        )
