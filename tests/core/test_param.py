"""Initial values: by seed and per-layer name, and by nothing else."""

import jax
import numpy as np
import pytest
from flax import nnx
from naive import tiny_config

from moe_zoo.core import param as P
from moe_zoo.models import Decoder


def drawn(seed=0, **changes):
    """Per-layer name -> host array."""
    model = Decoder(tiny_config(**changes))
    out = {}
    for path, var in P.flat(model).items():
        names, value = P.layer_names(model)[path], P.draw(var, path, seed)
        if names == (path,):
            out[path] = value
        else:
            assert len(names) == value.shape[0]
            out.update(zip(names, value))
    return out


@pytest.fixture(scope="module")
def whole():
    return drawn(layers="4*moe")


@pytest.mark.parametrize("layers", ["2*moe 2*moe", "2*(moe moe)", "moe 1*(moe moe) moe"])
def test_grouping_of_layers_does_not_change_initial_values(whole, layers):
    other = drawn(layers=layers)
    assert other.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(other[name], value, err_msg=name)


def test_layers_of_two_kinds_keep_their_own_numbers():
    names = drawn(layers="1*dense 2*(moe dense)").keys()
    routed = {n.split(".")[1] for n in names if n.endswith("router.kernel")}
    assert routed == {"1", "3"} and {n.split(".")[1] for n in names if n.startswith("layers.")} == set("01234")


def test_no_two_parameters_share_their_values(whole):
    kernels = [v for n, v in whole.items() if n.endswith(("w_gate", "w_up", "mixer.q", "mixer.k"))]
    for i, a in enumerate(kernels):
        assert not any(a.shape == b.shape and np.allclose(a, b) for b in kernels[i + 1 :])


def test_seed_changes_every_random_value_and_is_repeatable(whole):
    again, other = drawn(0, layers="4*moe"), drawn(1, layers="4*moe")
    for name, value in whole.items():
        np.testing.assert_array_equal(again[name], value)
        assert np.array_equal(other[name], value) == name.endswith("scale"), name


def test_spread_is_one_over_the_root_of_the_fan_in():
    values = drawn(
        hidden_size=64,
        layers="2*moe",
        moe_intermediate_size=128,
        shared_expert_size=96,
        attention={"num_attention_heads": 4},
    )
    residual = (2 * 2) ** -0.5
    expected = {
        "layers.0.mixer.q": 64**-0.5,
        "layers.0.mixer.k": 64**-0.5,
        "layers.1.mixer.v": 64**-0.5,
        "layers.1.mixer.o": 64**-0.5 * residual,
        "layers.0.ffn.experts.w_gate": 64**-0.5,
        "layers.0.ffn.experts.w_up": 64**-0.5,
        "layers.0.ffn.experts.w_down": 128**-0.5 * residual,
        "layers.0.ffn.shared.w_down": 96**-0.5 * residual,
        "layers.0.ffn.router.kernel": 1.0,
        "embed.table": 0.02,
    }
    for name, std in expected.items():
        size = values[name].size
        assert values[name].std() == pytest.approx(std, rel=4 / np.sqrt(2 * size)), name
        assert abs(values[name].mean()) < 5 * std / np.sqrt(size), name


def test_materialized_values_are_the_drawn_ones_and_abstract_models_hold_no_arrays():
    abstract = Decoder(tiny_config())
    assert all(isinstance(v, jax.ShapeDtypeStruct) for v in P.arrays(abstract).values())
    model = P.materialize(abstract, 3)
    for path, var in P.flat(abstract).items():
        np.testing.assert_array_equal(P.arrays(model)[path], P.draw(var, path, 3))


def test_replace_needs_every_path_and_leaves_the_original_alone():
    model = P.materialize(Decoder(tiny_config(layers="1*moe")), 0)
    values = {n: a * 0 for n, a in P.arrays(model).items()}
    zero = P.replace(model, values)
    assert all((np.asarray(a) == 0).all() for a in P.arrays(zero).values())
    assert np.asarray(P.arrays(model)["embed.table"]).any()
    values.pop("embed.table")
    with pytest.raises(KeyError, match=r"embed\.table"):
        P.replace(model, values)


def test_a_parameter_needs_one_axis_name_per_dimension():
    with pytest.raises(ValueError, match="differ in length"):
        P.param((2, 3), ("embed",), P.Constant(0.0))


def test_correction_bias_is_a_buffer_and_not_a_parameter():
    model = Decoder(tiny_config(router={"name": "top_k", "score_function": "sigmoid", "correction_bias": True}))
    kinds = {n: type(v) for n, v in P.flat(model).items()}
    assert {n for n, k in kinds.items() if issubclass(k, P.Buffer)} == {"segments.0.blocks.0.ffn.router.correction"}
    assert not issubclass(P.Buffer, nnx.Param)
