"""All families by name; tasks take them in this order, round robin."""

from collections.abc import Callable

import numpy as np

from benchmarks.bank import dense_families as d
from benchmarks.bank import loss_families as f
from benchmarks.bank import sequence_families as s
from benchmarks.bank.problems import Problem

_ALL: tuple[Callable[[np.random.Generator], Problem], ...] = (
    d.digits,
    d.teacher,
    d.spiral,
    d.autoencoder,
    d.tabular,
    s.context,
    d.shifted,
    d.residual,
    s.attention_prenorm,
    s.attention_nonorm,
    s.attention_postnorm,
    s.recurrent,
    s.convolution,
    f.factorisation,
    f.contrastive,
    f.denoising,
    f.policy,
    f.heavytail,
    f.plateau,
    f.nearzero,
    f.negative,
    d.moons,
    d.friedman,
    s.embedding,
    d.imbalanced,
    d.sparse,
    d.mislabelled,
)
FAMILIES = {family.__name__: family for family in _ALL}
HEAVY = {"attention_prenorm", "attention_nonorm", "attention_postnorm", "recurrent", "convolution"}  # dear steps
