"""Training runs that tune themselves: online Bayesian optimisation of hyperparameters inside one run."""

from ._engine import BayesianOptimizer as BayesianOptimizer
from ._space import Choice as Choice
from ._space import Float as Float
from ._space import Int as Int
from ._space import SearchSpace as SearchSpace
from ._version import __version__ as __version__
