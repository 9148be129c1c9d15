"""Snapshots across processes and devices: at the end of a program, on several devices, by one of several processes."""

import socket
import subprocess
import sys

import jax
import jax.numpy as jnp

import autotunenet_jax as atn
from tests import devices


def test_a_program_that_ends_at_once_has_saved_and_shapes_are_enough_to_restore(tmp_path):
    code = (
        "import sys, jax, jax.numpy as jnp, autotunenet_jax as atn\n"
        "store = atn.Snapshots(sys.argv[1])\n"
        "assert 'orbax' not in sys.modules\n"
        "store.save(3, {'w': jnp.arange(4.0), 'key': jax.random.key(3)})\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, tmp_path], check=True, timeout=60)
    tree = {"w": jnp.arange(4.0), "key": jax.random.key(3)}
    with atn.Snapshots(tmp_path) as store:
        step, restored = store.restore(jax.eval_shape(lambda: tree))
    assert step == 3
    assert restored["w"].tolist() == [0, 1, 2, 3]
    assert jax.random.key_data(restored["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()


def test_sharded_state_returns_to_its_devices(tmp_path):
    code = (
        "import sys, jax, jax.numpy as jnp, numpy as np, autotunenet_jax as atn\n"
        "from jax.sharding import NamedSharding, PartitionSpec as P\n"
        "mesh = jax.make_mesh((4,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))\n"
        "rows = NamedSharding(mesh, P('x')); all_ = NamedSharding(mesh, P())\n"
        "tree = {'w': jax.device_put(jnp.arange(8.), rows), 'k': jax.device_put(jax.random.key(1), all_)}\n"
        "def same(a, b):\n"
        "    assert a['w'].sharding == b['w'].sharding and a['k'].sharding == b['k'].sharding\n"
        "    assert np.asarray(a['w']).tobytes() == np.asarray(b['w']).tobytes()\n"
        "same(atn.copy_tree(tree), tree); same(atn.copy_tree_to_host(tree).to_device(), tree)\n"
        "with atn.Snapshots(sys.argv[1]) as store:\n"
        "    store.save(0, tree); same(store.restore(tree)[1], tree)\n"
        "    other = {'w': jax.device_put(jnp.zeros(8), all_), 'k': tree['k']}\n"
        "    assert store.restore(other)[1]['w'].sharding == all_\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60, env=devices.environment(4))


def test_one_of_several_processes_saves_and_all_restore(tmp_path):
    code = (
        "import sys, jax, numpy as np, autotunenet_jax as atn\n"
        "from jax.sharding import NamedSharding, PartitionSpec as P\n"
        "from jax.experimental.multihost_utils import sync_global_devices\n"
        "jax.config.update('jax_cpu_collectives_implementation', 'gloo')\n"
        "number = int(sys.argv[1]); jax.distributed.initialize(f'127.0.0.1:{sys.argv[2]}', 2, number)\n"
        "mesh = jax.make_mesh((2,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))\n"
        "place = lambda *names: jax.device_put(np.arange(4, dtype=np.float32), NamedSharding(mesh, P(*names)))\n"
        "tree, rows = {'everywhere': place(), 'here': np.ones(2)}, place('x')\n"
        "if number == 0:\n"
        "    with atn.Snapshots(sys.argv[3]) as store:\n"
        "        store.save(3, tree, wait=True); assert not store.is_degraded\n"
        "        try: store.save(4, {'rows': rows})\n"
        "        except ValueError as error: assert 'rows: it is spread over several processes' in str(error)\n"
        "        else: raise AssertionError('saved a part')\n"
        "sync_global_devices('saved')\n"
        "with atn.Snapshots(sys.argv[3], read_only=True) as store:\n"
        "    step, got = store.restore(tree)\n"
        "assert step == 3 and got['everywhere'].sharding == tree['everywhere'].sharding and got['here'].all()\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen([*command, str(n), port, tmp_path], stderr=subprocess.PIPE) for n in (0, 1)]
    try:
        for process in processes:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said.decode()
    finally:
        for process in processes:
            process.kill()
