"""What a training loop of another framework, or who trains forks elsewhere, needs; see ``docs/add_a_framework.md``."""

from .arguments import whole_number as whole_number
from .checkpoint.parcel import Parcel as Parcel
from .checkpoint.parcel import pack as pack
from .checkpoint.parcel import unpack as unpack
from .controller.plan import MAX_FORKS as MAX_FORKS
from .controller.state import FORK as FORK
from .controller.state import SWEEP as SWEEP
from .controller.state import TRAIN as TRAIN
from .loop.fork_executor import ForkExecutor as ForkExecutor
from .loop.fork_executor import TrainedFork as TrainedFork
from .loop.fork_executor import train_fork as train_fork
from .session import metric_names as metric_names
from .session.batches import BatchWindow as BatchWindow
from .session.host import Host as Host
from .session.notices import Notice as Notice
from .session.notices import Notices as Notices
from .session.notices import announce_compilation as announce_compilation
from .session.notices import notices as notices
from .session.notices import of_slow as of_slow
from .session.packed_controller import PackedController as PackedController
from .session.recorder import Recorder as Recorder
from .session.session import Report as Report
from .session.session import Session as Session
from .session.signals import Stop as Stop
