"""AutoTuneNet for PyTorch: the same controller, driven by a PyTorch training loop.

The controller is a JAX program that runs on the CPU beside the training, and is loaded with the first tuner. Importing
this package keeps JAX there, unless the environment variable ``JAX_PLATFORMS`` says otherwise or JAX has been imported
before.
"""

from . import engine as engine  # isort: skip  (it must act before anything imports JAX)
from .replay import replay as replay
from .trainer import Trainer as Trainer
from .training_state import TrainingState as TrainingState
from .tuner import AutoTuneNet as AutoTuneNet
