"""Which operands of a function's Pallas calls are known from the known ones of its inputs.

Group sizes steer a kernel, but what reaches it may be a table that XLA derives from them. So the function's jaxpr is
evaluated on the CPU as far as the known inputs go.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from tpu_sim.machine import LARGEST_TABLE

_LARGEST_RESULT = 1 << 24
_CALLS = frozenset(
    "jit pjit closed_call core_call custom_jvp_call custom_vjp_call remat checkpoint remat2 custom_vjp_call_jaxpr "
    "custom_lin custom_vmap_call".split()
)


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand of a Pallas call; `value` is None unless it is a known table of integers."""

    dtype: str
    shape: tuple[int, ...]
    value: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class PallasCall:
    """One `pallas_call` in the order of the jaxpr."""

    name: str
    operands: list[Operand]


def pallas_calls(jaxpr: Any, args: tuple, known: Mapping[int, Any]) -> tuple[list[PallasCall], list[np.ndarray]]:
    """(the Pallas calls of a closed jaxpr, all small integer arrays met on the way).

    `known`: values by flat index into `args`; those of `args` that are arrays are known too.
    """
    # what no result needs (a forward pass, in a gradient) is not compiled either
    needed, _ = dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
    inputs = [
        np.asarray(known[i]) if i in known else None if isinstance(a, jax.ShapeDtypeStruct) else np.asarray(a)
        for i, a in enumerate(jax.tree.leaves(args))
    ]
    walk = _Walk()
    walk.run(needed, jaxpr.consts, inputs)
    return walk.calls, walk.tables


def _table(value: Any) -> np.ndarray | None:
    if value is None or np.size(value) > LARGEST_TABLE or not np.issubdtype(np.asarray(value).dtype, np.integer):
        return None
    return np.asarray(value)


class _Walk:
    def __init__(self):
        self.calls: list[PallasCall] = []
        self.tables: list[np.ndarray] = []

    def run(self, jaxpr: Any, consts: Any, inputs: list) -> list:
        values = {}

        def put(var: Any, value: Any) -> None:
            values[var] = value
            if (table := _table(value)) is not None:
                self.tables.append(table)

        get = lambda v: np.asarray(v.val) if hasattr(v, "val") else values.get(v)
        for var, value in [*zip(jaxpr.constvars, consts), *zip(jaxpr.invars, inputs)]:
            put(var, value)
        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [get(v) for v in eqn.invars])
            for var, value in zip(eqn.outvars, results or [None] * len(eqn.outvars)):
                put(var, value)
        return [get(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, inputs: list) -> list | None:
        name = eqn.primitive.name
        inner = next((eqn.params[p] for p in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call") if eqn.params.get(p)), None)
        if name == "pallas_call":
            self.calls.append(_pallas_call(eqn, inputs))
            return None
        if inner is not None and name in _CALLS:
            jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, [])
            return self.run(jaxpr, consts, inputs[len(inputs) - len(jaxpr.invars) :])
        size = sum(int(np.prod(getattr(v.aval, "shape", ()))) for v in eqn.outvars)
        if any(x is None for x in inputs) or size > _LARGEST_RESULT:
            return None
        try:
            bound = eqn.primitive.get_bind_params(eqn.params)
            functions, params = bound if isinstance(bound, tuple) else ([], bound)
            results = eqn.primitive.bind(*functions, *map(jnp.asarray, inputs), **params)
        except Exception:  # what cannot be evaluated here is simply not known
            return None
        return list(results) if eqn.primitive.multiple_results else [results]


def _pallas_call(eqn: Any, inputs: list) -> PallasCall:
    info = getattr(eqn.params.get("name_and_src_info"), "name", None)
    operands = [Operand(str(v.aval.dtype), tuple(v.aval.shape), _table(x)) for v, x in zip(eqn.invars, inputs)]
    return PallasCall(str(info or eqn.params.get("name") or "kernel"), operands)
