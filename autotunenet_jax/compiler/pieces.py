"""A program of scalars as a few calls: XLA on CPU fuses within a call only.

Fusion copies what several results share into the kernel of each. In a state machine that is nearly everything: 1,200
operations of a tick become 12,000, all of which are compiled.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

_EQUATIONS = 300
"""Of a piece: so many that the calls between pieces do not show in a step."""


def evaluate(program: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """What the program returns. Pure; to be traced, each piece becomes a call that is not inlined."""
    jaxpr = program.jaxpr
    if len(jaxpr.eqns) <= _EQUATIONS:
        return jaxpr_as_fun(program)(*args)
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.consts, *args], strict=True))
    for begin in range(0, len(jaxpr.eqns), _EQUATIONS):
        piece, rest = jaxpr.eqns[begin : begin + _EQUATIONS], jaxpr.eqns[begin + _EQUATIONS :]
        made = [variable for equation in piece for variable in equation.outvars]
        needed = [variable for variable in _read(piece) if variable in known]
        later = {*_read(rest), *_variables(jaxpr.outvars)}
        kept = [variable for variable in made if variable in later]
        part = jaxpr.replace(constvars=[], invars=needed, outvars=kept, eqns=piece)
        values = _called(ClosedJaxpr(part, ()), [known[variable] for variable in needed])
        known.update(zip(kept, values, strict=True))
    return [result.val if isinstance(result, Literal) else known[result] for result in jaxpr.outvars]


def _called(part: ClosedJaxpr, args: list[Any]) -> list[Any]:
    @jax.jit
    def piece(*args: Any) -> list[Any]:
        with set_xla_metadata(inlineable=None):
            return jaxpr_as_fun(part)(*args)

    with set_xla_metadata(inlineable="false"):
        return piece(*args)


def _variables(operands: Sequence[Any]) -> list[Any]:
    return [operand for operand in operands if not isinstance(operand, Literal)]


def _read(equations: Sequence[Any]) -> list[Any]:
    """Variables that are read, each once, in order."""
    return list(dict.fromkeys(variable for equation in equations for variable in _variables(equation.invars)))
