"""How an adapter's product is computed changes nothing: sorted or dense, by the op or by hand; a frozen base has no
gradient of its own in the program.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapter_contract import BASE, IDS, TASKS, adapted, program, trained
from test_adapter_entries import CTX, make

from moe_zoo.adapters import adapter as module
from moe_zoo.adapters.adapter import Adapter
from moe_zoo.core import param as P
from moe_zoo.train.step import partition

ENTRIES = {
    "mola": {"num_experts": 5, "num_experts_per_tok": 2},
    "smora": {"r": 6, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("name", ENTRIES)
def test_sorted_choices_are_the_same_function(name, monkeypatch):
    made, x, y, w = make(name=name, **ENTRIES[name])
    graph = P.arrays(made)

    def both():
        run = lambda arrays, x, y: P.replace(made, arrays)(x, y, w, CTX)[0]
        out, pullback = jax.vjp(run, graph, x, y)
        return out, pullback(jnp.sin(out))

    def close(got, expected):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)

    dense = jax.jit(lambda: both())()
    monkeypatch.setattr(module, "grouped_pays", lambda *_: True)
    by_expert = jax.jit(lambda: both())
    assert "while" in by_expert.lower().as_text()
    close(by_expert(), dense)
    monkeypatch.setattr(Adapter, "_is_plain", lambda self: False)
    close(jax.jit(lambda: both())(), dense)


def test_the_program_has_no_gradient_of_the_base():
    values, model = trained("lora_mixer"), adapted("lora_mixer")
    names = partition(model).trainable
    split = {n: values[n] for n in names}, {n: v for n, v in values.items() if n not in names}
    lowered = program("lora_mixer").lower(*split, IDS, np.ones(IDS.shape, bool), TASKS)
    products = set(re.findall(r"= f32\[([\d,]+)\]\S* dot\(", lowered.compile().as_text()))
    D, F = BASE.hidden_size, BASE.intermediate_size
    assert f"{IDS.size},{F}" in products and not products & {f"{D},{F}", f"{F},{D}"}
