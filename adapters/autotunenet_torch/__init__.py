"""AutoTuneNet for PyTorch: the same controller, driven by a PyTorch training loop.

The engine is a JAX program that runs on the CPU beside the training. Importing this package keeps JAX there, unless the
environment variable ``JAX_PLATFORMS`` says otherwise or JAX has been imported before.
"""

from . import _platform as _platform  # isort: skip  (it must act before anything imports JAX)
from ._snapshot import TrainingState as TrainingState
from ._trainer import Trainer as Trainer
from ._tuner import AutoTuneNet as AutoTuneNet
