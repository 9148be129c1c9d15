"""A population of Ray actors: what is decided, what a death costs, and what cannot be sent."""

import pytest

from tests import devices

pytest.importorskip("ray")
pytestmark = pytest.mark.soak

MEMBERS = """
import json, threading
import ray
import autotunenet_jax as atn
from autotunenet_ray import Population
from tests import problem
from tests.loop import test_parallel_forks as here

ray.init(num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)

class Struck(Population):
    '''The second member is killed while it trains its first fork, and comes back.'''

    killed = 0

    def _answer(self, member, answer, like):
        if not self.killed:
            self.killed += 1
            ray.kill(self._up[1], no_restart=False)
        return super()._answer(member, answer, like)

found = {}
with Struck(4) as members:
    result = here.fit(members)
    here.assert_alike(result, here.alone())
    found["same"] = problem.same(result.state, here.alone().state)
    found["killed"], found["lost"] = members.killed, members.lost_forks
    found["steps"], found["members"] = result.history.summary["steps"], len(members._actors)
found["left"] = len(members._actors)

lock = threading.Lock()
def train_step(state, batch, hp):
    lock
    return problem.train_step(state, batch, hp)
try:
    atn.fit(train_step, problem.new_state(), problem.batches, tuner=problem.tuner(), parallel_forks=Population(2))
except TypeError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.mark.timeout(600)
def test_a_member_that_dies_costs_nothing():
    found = devices.run(MEMBERS, count=1, timeout=600)
    assert "train_step cannot be sent to the members of a population" in found.pop("refused")
    assert found == {"same": True, "killed": 1, "lost": 0, "steps": 600, "members": 4, "left": 0}


PAGE = """
import json
import ray
from tests.docs import pages

ray.init(num_cpus=3, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
names = pages.run(pages.ROOT / "docs" / "ray.md")
print(json.dumps([names["members"].lost_forks, names["result"].history.records[-1]["loss"]]))
"""


@pytest.mark.timeout(600)
def test_the_page_runs():
    lost, loss = devices.run(PAGE, count=1, timeout=600)
    assert lost == 0 and loss < 0.01


@pytest.mark.parametrize("members", [1, 9, 2.0, True])
def test_a_number_of_members_that_is_none_is_refused(members):
    from autotunenet_ray import Population

    with pytest.raises(ValueError, match="members must be an integer from 2 to 8"):
        Population(members)
