"""The little language for layers, what a variant may change, and settings that cannot be."""

import pytest
from naive import TINY, tiny_config

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.models import Decoder
from moe_zoo.models.config import Segment, parse_layers
from moe_zoo.models.counting import count_parameters, train_flops_per_token


@pytest.mark.parametrize(
    "text, segments",
    [
        ("4*moe", [(("moe",), 4)]),
        ("moe", [(("moe",), 1)]),
        ("1*dense 26*moe", [(("dense",), 1), (("moe",), 26)]),
        (" 6*(dense moe) ", [(("dense", "moe"), 6)]),
        ("2 * (moe:local moe) dense:wide", [(("moe:local", "moe"), 2), (("dense:wide",), 1)]),
        ("(moe dense)\tmoe", [(("moe", "dense"), 1), (("moe",), 1)]),
    ],
)
def test_layers_are_read(text, segments):
    assert parse_layers(text, "layers") == tuple(Segment(*s) for s in segments)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["no layers"]),
        ("0*moe", ["'0*moe'"]),
        ("2*()", ["'2*()'"]),
        ("3*mow", ["'mow'", "did you mean 'moe'"]),
        ("2*moe,dense", ["'2*moe,dense'"]),
        ("2*(moe dense", ["'2*(moe dense'"]),
        ("moe 2*(moe 2*(dense))", ["'2*(moe 2*(dense))'"]),
        ("-1*moe", ["'-1*moe'"]),
        ("moe*2", ["'moe*2'"]),
        (":local", ["':local'"]),
        ("moe:", ["moe:"]),
    ],
)
def test_layers_that_cannot_be_read_are_named(text, words):
    with pytest.raises(ConfigError) as error:
        tiny_config(layers=text)
    assert all(w in str(error.value) for w in ["model.layers", *words]), error.value


def test_a_variant_changes_what_it_names_and_nothing_else():
    local = {"attention": {"sliding_window": 5}, "moe_intermediate_size": 40}
    whole = tiny_config(layers="2*(moe:local moe)", variants={"local": local})
    changed, same = whole.variant("moe:local"), whole.variant("moe")
    assert (changed.attention.sliding_window, changed.moe_intermediate_size) == (5, 40)
    assert changed.attention.num_attention_heads == 2 and changed.router == whole.router and same is whole
    shapes = {n: a.shape for n, a in P.arrays(Decoder(whole)).items() if n.endswith("w_up")}
    assert shapes == {
        "segments.0.blocks.0.ffn.experts.w_up": (2, 4, 16, 40),
        "segments.0.blocks.1.ffn.experts.w_up": (2, 4, 16, 8),
    }


def test_a_variant_may_route_in_another_way():
    for router in ("switch", {"name": "switch"}, {"name": "switch", "jitter": 0.1}):
        whole = tiny_config(layers="moe:other moe", variants={"other": {"router": router}})
        assert whole.variant("moe:other").router.name == "switch" and whole.variant("moe").router.name == "top_k"


def test_a_variant_may_have_no_losses():
    whole = tiny_config(layers="moe:free moe", variants={"free": {"losses": {}}})
    assert whole.variant("moe:free").losses == () and len(whole.variant("moe").losses) == 2


@pytest.mark.parametrize(
    "variants, words",
    [
        ({}, ["'local'", "none declared"]),
        ({"locale": {}}, ["'local'", "did you mean 'locale'"]),
        ({"local": {"attention": {"sliding_windw": 3}}}, ["variants.local.attention.sliding_windw", "sliding_window"]),
        ({"local": {"num_experts": 1}}, ["variants.local", "num_experts_per_tok"]),
        ({"local": 3}, ["variants.local"]),
        ({"local": {"hidden_size": 32}}, ["variants.local", "hidden_size"]),
        ({"local": {"layers": "7*moe"}}, ["variants.local", "layers"]),
        ({"local": {"dtype": "bfloat16"}}, ["variants.local", "dtype"]),
    ],
)
def test_variants_that_cannot_be_are_refused_by_name(variants, words):
    with pytest.raises(ConfigError) as error:
        tiny_config(layers="moe moe:local", variants=variants)
    assert all(w in str(error.value) for w in words), error.value


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_experts=1), ["model.router.num_experts_per_tok", "2", "num_experts=1"]),
        (dict(hidden_size=18, attention={"num_attention_heads": 4}), ["hidden_size", "18", "4"]),
        (dict(attention={"num_attention_heads": 4, "num_key_value_heads": 3}), ["num_key_value_heads", "3", "4"]),
        (dict(hidden_size=0), ["model.hidden_size", "0"]),
        (dict(shared_expert_gate=True), ["shared_expert_gate", "shared_expert_size"]),
        (dict(router={"name": "topk"}), ["model.router.name", "'topk'", "'top_k'"]),
        (dict(router={"name": "switch", "num_experts_per_tok": 2}), ["model.router.num_experts_per_tok"]),
        (dict(dispatch={"name": "capacity", "capacity_factor": 0}), ["model.dispatch.capacity_factor"]),
        (dict(losses={"load_balanse": {}}), ["losses.load_balanse", "'load_balance'"]),
        (dict(remat="all"), ["model.remat", "'block'"]),
        (dict(ngram={"orders": [2, 2]}), ["model.ngram.orders"]),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, words):
    with pytest.raises(ConfigError) as error:
        tiny_config(**changes)
    assert all(w in str(error.value) for w in words), error.value


def test_a_model_without_routed_blocks_does_not_care_about_routing():
    assert tiny_config(layers="2*dense", num_experts=1).num_layers == 2


def test_flops_are_those_counted_by_hand():
    config = tiny_config(
        layers="1*dense 2*moe", shared_expert_size=12, attention={"num_attention_heads": 2, "num_key_value_heads": 1}
    )
    D, V, F, FE, FS, E, K, N, M, H, context = 16, 32, 24, 8, 12, 4, 2, 2, 1, 8, 10
    attention = 2 * D * H * (N + M + M + N) + 4 * N * H * context
    dense, routed = 6 * D * F, 2 * D * E + K * 6 * D * FE + 6 * D * FS
    total = 2 * D * V + (attention + dense) + 2 * (attention + routed)
    model = Decoder(config)
    assert model.flops_per_token(context) == total
    assert train_flops_per_token(model, 2 * context - 1) == 3 * total
    measured = model.flops_per_token(context, {"segments.1.blocks.0": 0.5})
    assert total - measured == 2 * 1.5 * 6 * D * FE


def test_parameters_are_counted_in_total_and_active():
    config = tiny_config(layers="2*moe", router={"name": "top_k", "num_experts_per_tok": 1, "correction_bias": True})
    D, V, FE, E = 16, 32, 8, 4
    experts, rest = 2 * E * 3 * D * FE, 2 * V * D + 2 * (4 * D * D + D * E + 2 * D) + D
    counted = count_parameters(Decoder(config))
    assert counted == {"total": experts + rest, "active": experts // E + rest, "trainable": experts + rest}
    assert count_parameters(Decoder(config), ["norm.scale"])["trainable"] == D


def test_tied_models_have_no_head_and_the_tiny_settings_are_what_they_say():
    assert "head.kernel" not in P.flat(Decoder(tiny_config(tie_word_embeddings=True)))
    assert "head.kernel" in P.flat(Decoder(tiny_config())) and tiny_config().num_layers == int(TINY["layers"][0])
