"""The controller: a pure function from losses to directives that tunes a run while it goes on.

Glossary:
  incumbent: the hyperparameters in force outside forks.
  range test: steps at the very beginning in which the rates climb from bound to bound; they say where to begin.
  round: a stretch in which several settings are tried from one training state, on the same batches.
  fork, trial: one of them, and its hyperparameters. Its horizon is its length in steps.
  score: the validation metric in a fork's last step, or the mean training loss of its cool-down.
  candidate: a setting that the next fork of a round may try.
  cool-down: the end of a fork, over which its rates fall to almost zero, so that it is scored as a decayed run is.
  surrogate: the Gaussian process that judges forks; its acquisition says whether another one is worth its steps.
  plateau: readings of the validation metric that do not improve; training then goes back to its best state, slower.
  rollback: the way back to a healthy snapshot after a loss that is not.
  directive: what the training loop has to do before its next step.
"""

from .core import Core as Core
from .core import decide_jit as decide_jit
from .core import hyperparams_jit as hyperparams_jit
from .first_state import as_argument as as_argument
from .loss_monitor import Guard as Guard
from .tuner import AutoTuneNet as AutoTuneNet
