"""Tiny random models made by transformers: the same logits, routes and text; out again the same files. float32, CPU."""

import json
import re

import numpy as np
import pytest
from families import TINY, tiny

torch = pytest.importorskip("torch", reason="parity with transformers: pip install 'moe-zoo[parity]'")
transformers = pytest.importorskip("transformers", reason="parity with transformers: pip install 'moe-zoo[parity]'")

import jax  # noqa: E402

import moe_zoo  # noqa: E402
from moe_zoo.checkpoints.hf.safetensors import Files, read_folder, write  # noqa: E402
from moe_zoo.core import param as P  # noqa: E402
from moe_zoo.core.context import RoutingContext  # noqa: E402
from moe_zoo.inference import generate  # noqa: E402
from moe_zoo.models.config import is_routed  # noqa: E402
from moe_zoo.routing.gshard import GShard, GShardConfig, NllbConfig  # noqa: E402
from moe_zoo.routing.router import Dims  # noqa: E402
from moe_zoo.sharding import MeshConfig, make_mesh  # noqa: E402

torch.set_num_threads(1)

#: transformers counts padding on the left: into the position that decides the temperature of a query (llama4), into a
#: convolution, by the bias behind the projection before it
COUNTS_PADDING = ("llama4", "granitemoehybrid", "lfm2_moe")

B, S, NEW = 3, 19, 32
#: none, left, right
MASK = np.array([[1] * S, [0] * 7 + [1] * (S - 7), [1] * (S - 4) + [0] * 4])
IDS = np.where(MASK, np.random.default_rng(0).integers(3, 96, (B, S)), 0)


@pytest.fixture(scope="module", params=TINY)
def pair(request, tmp_path_factory):
    """(name, their model, the directory that they saved, ours)."""
    theirs, folder = tiny(request.param), tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return request.param, theirs, folder, moe_zoo.load(folder)


SAME_CACHE = (
    "mixtral_window",
    "qwen2_moe",
    "llama",
    "qwen2_yarn",
    "granitemoe",
    "deepseek_v2_groups",
    "phimoe",
    "qwen3_5_moe",
    "granitemoehybrid_dense",
)


def dbrx(logits):
    """Its router hands out logits only: (logits, gates by expert)."""
    gates, experts = logits.softmax(-1).topk(3)
    return logits.numpy(), dense((gates / gates.sum(-1, keepdim=True)).numpy(), experts.numpy(), logits.shape[-1])


def jetmoe(out):
    """Its router returns rows sorted by expert, and the logits at the end."""
    top, experts = out[-1].topk(2)
    return out[-1].numpy(), dense(top.softmax(-1).numpy(), experts.numpy(), out[-1].shape[-1])


#: what routers return that do not return (logits, gates, experts)
RETURNS = {
    "DbrxRouter": dbrx,
    "JetMoeTopKGating": jetmoe,
    "Llama4Router": lambda out: (out[1].numpy(), out[0].numpy()),
    "SwitchTransformersTop1Router": lambda out: (out[2].flatten(0, 1).numpy(), (out[0] * out[1]).flatten(0, 1).numpy()),
    "NllbMoeTop2Router": lambda out: (out[2].numpy(), out[1].numpy() * 0.8),  # the experts do that
}


def forward(model, ids, mask):
    """(logits, [(router logits, gates by expert)]) of theirs."""
    routed = []
    read = lambda out: (out[0].numpy(), dense(out[1].numpy(), out[2].numpy(), out[0].shape[-1]))
    hooks = [
        module.register_forward_hook(lambda m, i, out: routed.append(RETURNS.get(type(m).__name__, read)(out)))
        for name, module in model.named_modules()
        if re.search(r"Top[kK]Router|TokenChoiceRouter|MoEV1Gate|" + "|".join(RETURNS), type(module).__name__)
        and "self_attention" not in name  # where heads are routed as well
    ]
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    if model.config.is_encoder_decoder:
        more = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    else:  # some models are no longer relative: their norms act on what has been rotated
        more = {"position_ids": (mask.cumsum(1) - 1).clamp(0)}
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, **more).logits.numpy()
    for hook in hooks:
        hook.remove()
    return logits, routed


def dense(gates, experts, E):
    out = np.zeros((len(gates), E))
    np.put_along_axis(out, experts, gates, axis=1)
    return out


def both(loaded, ids, mask=None, **how):
    """Ours as `forward` has it: a model of two texts gets one twice."""
    return loaded(ids, mask, *((ids, mask) if loaded.pair else ()), **how)


def test_logits_routes_and_gates_are_theirs_with_padding_on_either_side(pair):
    name, theirs, _, ours = pair
    logits, routed = forward(theirs, IDS, MASK)
    out = both(ours, IDS, MASK, return_routing=True)
    valid = MASK.astype(bool)
    if name in COUNTS_PADDING:
        valid[1] = False
    np.testing.assert_allclose(np.asarray(out.logits)[valid], logits[valid], rtol=0, atol=2e-4)
    stats, flat = out.aux.stats, valid.reshape(-1)
    assert len(routed) == len(stats.get("router_logits", ())) == sum(map(is_routed, kinds(ours)))
    for i, (their_logits, their_gates) in enumerate(routed):
        ours_at, gates, experts = (np.asarray(stats[f"router_{k}"][i]) for k in ("logits", "gates", "experts"))
        np.testing.assert_allclose(ours_at[flat], their_logits[flat], rtol=0, atol=2e-4)
        E = ours.config.num_experts  # their experts beyond return the token
        np.testing.assert_allclose(dense(gates[flat], experts[flat], E + 1)[:, :E], their_gates[flat, :E], atol=1e-4)
        assert len(np.unique(experts[flat], axis=0)) > 2


def kinds(loaded):
    from moe_zoo.checkpoints.hf.family import expand

    return [*(expand(loaded.config.encoder_config()) if loaded.pair else ()), *expand(loaded.config)]


def test_greedy_text_with_the_cache_is_theirs(pair):
    name, theirs, _, ours = pair
    if name in SAME_CACHE:
        pytest.skip("another variant of the family decodes in the same way; compiling takes seconds")
    left = np.stack([np.roll(IDS[b], (MASK[b] == 0).sum()) if b == 2 else IDS[b] for b in range(B)])
    mask = np.stack([np.roll(MASK[b], (MASK[b] == 0).sum()) if b == 2 else MASK[b] for b in range(B)])
    settings = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        out = theirs.generate(torch.tensor(left), attention_mask=torch.tensor(mask), **settings)
    prompts, more = [row[m.astype(bool)] for row, m in zip(left, mask)], {}
    if ours.pair:
        prompts, more = [[theirs.config.decoder_start_token_id]] * B, {"sources": prompts}
    ends = zip(generate(ours.model, prompts, NEW, temperature=0.0, **more), out.numpy()[:, -NEW:])
    for b, (new, expected) in enumerate(ends):
        if b == 0 or name not in COUNTS_PADDING:
            np.testing.assert_array_equal(new, expected)


def add_what_does_nothing(folder, like, ours) -> list[str]:
    """Tensors of `like` that its family calls unused, into `folder`; their names.

    transformers 5.24 gives LongCat-Flash's zero experts, which return the token, a gate and an up projection, and does
    not open files without. Released files have none.
    """
    written, theirs = Files(read_folder(folder)), Files(read_folder(like))
    unused = "|".join(ours.published.family.unused) or "$"
    names = [name for name in theirs.tensors if name not in written.tensors and re.fullmatch(unused, name)]
    if names:
        found = {n: np.array(files[n]) for files in (theirs, written) for n in files.tensors}
        listed = [(n, a.dtype, a.shape) for n, a in sorted(found.items())]
        write(folder / "model.safetensors", listed, found.get)
    return names


def test_out_again_it_is_the_same_directory_and_opens_in_transformers(pair, tmp_path):
    name, theirs, folder, ours = pair
    moe_zoo.save_hf(ours, tmp_path)
    family = ours.published.family
    describe = lambda path: {n: (t.shape, t.dtype) for n, t in family.unpack(read_folder(path)).items()}
    theirs_only = add_what_does_nothing(tmp_path, folder, ours)
    assert describe(tmp_path) == describe(folder) and bool(theirs_only) == (name == "longcat_flash")
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    again, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    exact = not family.derived(ours.config, {})  # else as close as two libraries' exponentials
    if ours.pair:  # what torch multiplies there is rounded by where it lies in memory
        weights, exact = again.state_dict(), False
        assert all(torch.equal(weights[n], w) for n, w in theirs.state_dict().items())
    found, expected = forward(again.eval(), IDS, MASK)[0], forward(theirs, IDS, MASK)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=0 if exact else 1e-5)
    first, second = P.arrays(ours.model), P.arrays(moe_zoo.load(tmp_path).model)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_settings_written_from_ours_alone_open_in_transformers_as_the_same_model(pair, tmp_path):
    """As for a run of ours, which has no config.json of theirs to keep."""
    name, theirs, folder, ours = pair
    moe_zoo.save_hf(moe_zoo.Loaded(ours.model, ours.config, None), tmp_path)
    add_what_does_nothing(tmp_path, folder, ours)
    again = type(theirs).from_pretrained(tmp_path).eval()
    ids, mask = IDS[:1], MASK[:1]
    np.testing.assert_allclose(forward(again, ids, mask)[0], forward(theirs, ids, mask)[0], rtol=0, atol=1e-6)


def test_where_an_expert_has_two_places_per_row_the_same_tokens_find_one(tmp_path):
    """Transformers' padding takes places as well: on the left it is first."""
    tiny("switch_transformers").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"expert_capacity": 2}))
    theirs = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path).eval()
    ours, rows = moe_zoo.load(tmp_path), [0, 2]
    logits, valid = forward(theirs, IDS[rows], MASK[rows])[0], MASK[rows] == 1
    out = both(ours, IDS[rows], MASK[rows])
    np.testing.assert_allclose(np.asarray(out.logits)[valid], logits[valid], rtol=0, atol=2e-4)
    assert min(float(s["dropped_fraction"].value().min()) for s in out.aux.stats.values() if "load" in s) > 0.1
    roomy = forward(tiny("switch_transformers"), IDS[rows], MASK[rows])[0]
    assert np.abs(roomy - logits)[valid].max() > 0.1


@pytest.mark.parametrize("fraction", [1.0, 0.2, -1.0])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("normalize_first", [False, True])
def test_the_router_of_nllb_gives_out_the_same_places(fraction, prioritized, normalize_first):
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

    config = transformers.NllbMoeConfig(
        d_model=16, num_experts=5, expert_capacity=9, moe_eval_capacity_token_fraction=fraction,
        batch_prioritized_routing=prioritized, normalize_router_prob_before_dropping=normalize_first,
    )  # fmt: skip
    torch.manual_seed(1)
    theirs, T = NllbMoeTop2Router(config).eval(), 40
    x, valid = torch.randn(T, 16) * 3 + 0.5, np.arange(T) % 7 > 0
    first, gates, logits = (out.detach().numpy() for out in theirs(x, ~torch.tensor(valid)))
    settings = GShardConfig(0.0, nllb=NllbConfig(9, fraction, prioritized, normalize_first))
    ours = P.replace(GShard(settings, Dims(5, 16)), {"kernel": theirs.classifier.weight.detach().numpy().T})
    routing = ours(x.numpy(), RoutingContext(batch=1, seq=T, valid=valid))
    decision = routing.decision.masked(valid)
    np.testing.assert_allclose(routing.logits, logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(dense(decision.gates, decision.experts, 6)[:, :5], gates, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(decision.experts[:, 0]) < 5, first.any(1))
    dropped = (np.asarray(decision.experts)[valid] == 5).sum()
    assert dropped == 0 if fraction == 1.0 else dropped > 3


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bfloat16")
    model = tiny("qwen2_moe").to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def test_bfloat16_in_shards_stays_as_it_is_and_is_computed_in(bfloat16, tmp_path):
    folder = bfloat16
    ours = moe_zoo.load(folder)
    assert {str(a.dtype) for a in P.arrays(ours.model).values()} == {"bfloat16"} and ours.config.dtype == "bfloat16"
    moe_zoo.save_hf(ours, tmp_path)
    describe = lambda path: {n: (t.shape, t.dtype) for n, t in read_folder(path).items()}
    assert describe(tmp_path) == describe(folder)
    wide = moe_zoo.load(folder, dtype="float32")
    assert {str(a.dtype) for a in P.arrays(wide.model).values()} == {"float32"}
    theirs = forward(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), IDS, MASK)[0]
    np.testing.assert_allclose(np.asarray(wide(IDS, MASK).logits)[MASK == 1], theirs[MASK == 1], rtol=0, atol=2e-4)


HYBRIDS = ("qwen3_next", "granitemoehybrid", "nemotron_h", "jamba", "lfm2_moe", "kimi_linear", "minimax")


@pytest.mark.parametrize("name", ["mixtral", "granitemoe", "switch_transformers", *HYBRIDS])
def test_on_a_mesh_every_device_holds_its_shard_and_logits_are_the_same(name, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2), jax.devices()[:8])
    one, many = moe_zoo.load(tmp_path), moe_zoo.load(tmp_path, mesh=mesh)
    for path, array in P.arrays(many.model).items():
        assert all(s.data.shape == array.sharding.shard_shape(array.shape) for s in array.addressable_shards), path
    experts = next(path for path in P.arrays(one.model) if path.endswith("ffn.experts.w_up"))
    assert P.arrays(many.model)[experts].addressable_shards[0].data.size * 8 == P.arrays(one.model)[experts].size
    ids = np.concatenate([IDS, IDS[:1]])[:, :16]
    np.testing.assert_allclose(both(many, ids).logits, both(one, ids).logits, rtol=0, atol=2e-4)
