"""The command line: what a run's folder tells, without the model that was trained."""
