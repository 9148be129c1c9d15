"""Steps queued on several CPU devices, which XLA may leave waiting for each other for ever.

XLA launches a program on each device from the threads that programs run on, one for each device or core. A launch
keeps its thread while 32 programs of its device are under way. Programs that meet in a reduction need a thread each:
where a launch holds one of them, the others wait for a program that has no thread, and the launch waits for them. It
takes no more than a host that is faster than its devices. With two threads for each device there is always one left.

Measured on jax 0.10.2, CPU (``benchmarks/mesh.py``). Switched off by ``AUTOTUNENET_COMPILER_OFF=cpu_queue``.
"""

import collections
import os
from typing import Any

import jax

from .switches import is_on

# Half of what XLA takes before a launch waits: other programs, such as those that make batches, count too.
_AHEAD = 16
# Where XLA looks for the number of threads.
_VARIABLES = ("PJRT_NPROC", "NPROC")

_MAY_HANG = (
    "steps queued on {devices} CPU devices may wait for each other for ever, tuned or not: XLA has {threads} threads "
    f"to run and launch them on. Set the environment variable {_VARIABLES[0]}={{enough}} before JAX starts, or wait "
    "for a step every now and then, as by jax.block_until_ready(loss) at every tenth."
)


def hazard(tree: Any) -> str | None:
    """What to tell who trains arrays like these by queued steps, if anything; known while a program is traced, too."""
    if not _is_at_risk():
        return None
    devices, threads = max((_devices(leaf) for leaf in jax.tree.leaves(tree)), default=1), _threads()
    if devices == 1 or threads >= 2 * devices:
        return None
    return _MAY_HANG.format(devices=devices, threads=threads, enough=2 * devices)


def _is_at_risk() -> bool:
    return jax.default_backend() == "cpu" and jax.local_device_count() > 1 and is_on("cpu_queue")


def _devices(leaf: Any) -> int:
    return max(jax.typeof(leaf).sharding.mesh.size, 1)


def _threads() -> int:
    """How many threads XLA has for programs."""
    for name in _VARIABLES:
        told = os.environ.get(name, "")
        if told.strip().isdigit():
            return max(int(told), jax.local_device_count())
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(cores, jax.local_device_count())


class Pace:
    """Keeps a loop from queuing so many steps that they may hang; with one device, or none a CPU, it does nothing."""

    def __init__(self) -> None:
        self._queued: collections.deque[Any] = collections.deque()
        self._is_needed = _is_at_risk()

    def queued(self, result: Any) -> None:
        """Notes a step by an array that it makes, and waits for the one that was queued some steps before."""
        if not self._is_needed:
            return
        self._queued.append(result)
        if len(self._queued) > _AHEAD:
            jax.block_until_ready(self._queued.popleft())
