"""What a training loop of another framework needs in order to host a run; see ``docs/add_a_framework.md``."""

from .controller.state import FORK as FORK
from .controller.state import SWEEP as SWEEP
from .controller.state import TRAIN as TRAIN
from .session.batches import BatchWindow as BatchWindow
from .session.feed import check_log_every as check_log_every
from .session.host import Host as Host
from .session.notices import Notice as Notice
from .session.notices import Notices as Notices
from .session.notices import announce_compilation as announce_compilation
from .session.notices import notices as notices
from .session.packed_controller import PackedController as PackedController
from .session.recorder import Display as Display
from .session.recorder import Recorder as Recorder
from .session.session import Report as Report
from .session.session import Session as Session
from .session.signals import Stop as Stop
