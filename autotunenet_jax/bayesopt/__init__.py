"""Bayesian optimisation of the scores of trials: surrogate, acquisition, and `BayesianOptimizer` around them."""
