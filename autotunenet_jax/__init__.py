"""Training runs that tune themselves: online Bayesian optimisation of hyperparameters inside one run."""

from ._copies import HostCopy as HostCopy
from ._copies import copy_tree as copy_tree
from ._copies import copy_tree_to_host as copy_tree_to_host
from ._engine import BayesianOptimizer as BayesianOptimizer
from ._snapshot_errors import NoSnapshotError as NoSnapshotError
from ._snapshot_errors import SnapshotDamagedError as SnapshotDamagedError
from ._snapshot_errors import SnapshotFolderBusyError as SnapshotFolderBusyError
from ._snapshot_errors import SnapshotMismatchError as SnapshotMismatchError
from ._snapshot_errors import SnapshotVersionError as SnapshotVersionError
from ._snapshot_errors import SnapshotWarning as SnapshotWarning
from ._snapshot_index import SnapshotRecord as SnapshotRecord
from ._snapshots import Snapshots as Snapshots
from ._space import Choice as Choice
from ._space import Float as Float
from ._space import Int as Int
from ._space import SearchSpace as SearchSpace
from ._version import __version__ as __version__
from ._controller import AutoTuneNet as AutoTuneNet
from ._guard import Guard as Guard
from ._history import History as History
from ._hyperparams import set_hyperparams as set_hyperparams
from ._loop import FitResult as FitResult
from ._loop import fit as fit
from ._state import Directive as Directive
from ._state import TunerState as TunerState
