"""How many operations a program executes, as the compiler counts them."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun


def count_flops(program: Callable[..., Any], *args: Any) -> float:
    """Operations of one call; nothing is compiled.

    Args:
        program: to be traced.
        args: its arguments, or shapes in their place.
    """
    return _count(jax.make_jaxpr(program)(*args))


def _count(program: ClosedJaxpr) -> float:
    # The compiler counts what is in a loop once, however often it turns.
    total = _once(program)
    for loop in _loops(program.jaxpr):
        body = loop.params["jaxpr"]
        total += loop.params["length"] * _count(body) - _once(body)
    return total


def _once(program: ClosedJaxpr) -> float:
    shapes = [jax.ShapeDtypeStruct(shape.shape, shape.dtype) for shape in program.in_avals]
    cost = jax.jit(jaxpr_as_fun(program)).lower(*shapes).cost_analysis()
    return float((cost or {}).get("flops", 0.0))


def _loops(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    """The loops of a known number of turns that are in no other."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation
            continue
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(value):
                yield from _loops(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def _is_program(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)
