"""What a training loop of another framework needs in order to host a run."""

from .compiler.blas_threads import one_blas_thread as one_blas_thread
from .controller.state import FORK as FORK
from .controller.state import SWEEP as SWEEP
from .controller.state import TRAIN as TRAIN
from .session.recorder import Display as Display
from .session.recorder import Recorder as Recorder
