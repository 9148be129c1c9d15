import importlib.metadata
import os
import pathlib

# Set before JAX is imported, so that test processes and the processes they start share the compiled programs.
_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".jax_cache"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# With a maximum size JAX locks the cache, without one two processes may read each other's half-written files.
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**31))
# Compiling takes longer than running here; `make soak` and what asks for `optimised` run what a user runs.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# So is one fifth of it by XLA's older emitters; a version that does not know the flag would abort.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and importlib.metadata.version("jaxlib") == "0.10.2":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
# Models are small here: the threads of PyTorch would mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Pictures are drawn to files.
os.environ.setdefault("MPLBACKEND", "agg")

import gc
import signal

import hypothesis
import jax
import pytest

# A process that was started in the background ignores Ctrl-C, which tests send to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One compilation can take longer than hypothesis allows an example; derandomised, a failure in CI is one here.
hypothesis.settings.register_profile("default", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="module", autouse=True)
def _freeze():
    """What a module compiled stays, and is not searched for garbage again and again."""
    yield
    gc.freeze()


@pytest.fixture
def optimised():
    """Programs compiled as a user's are, for tests of their memory and for those that run longer than they compile."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()  # programs of tests before, which may be the same ones
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def strict_promotion():
    """Forbids implicit conversions between dtypes; optax's bias correction needs them, so tests ask for this."""
    with jax.numpy_dtype_promotion("strict"):
        yield
