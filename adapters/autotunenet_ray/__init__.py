"""AutoTuneNet on Ray: a run whose forks are trained by a population of actors."""

from .population import Population as Population
