"""Claims of all configs, and what makes runs equal: width, seed, data, schedule."""

from pathlib import Path

import pytest

from moe_zoo.compare import entries as E
from moe_zoo.compare.claims import STATISTICS, Claim, Reference
from moe_zoo.compare.store import Store
from moe_zoo.core.registry import ConfigError
from moe_zoo.models import Decoder
from moe_zoo.models.counting import count_parameters, train_flops_per_token
from moe_zoo.routing import ROUTERS
from moe_zoo.train.config import known_configs, load_config

STORE = Path(__file__).parents[2] / "docs/results/compare/cpu.jsonl"
KNOWN = E.load_entries()
CPU = E.SCALES["cpu"]


def model_of(config):
    return Decoder(config.model)


def test_every_router_has_an_entry():
    used = {load_config(str(entry.path)).model.router.name for entry in KNOWN.values()}
    from_the_start = {name for name in ROUTERS.names() if not ROUTERS.get(name).retrofits}
    assert used == from_the_start and E.REFERENCE in KNOWN


@pytest.mark.parametrize("name", KNOWN)
def test_the_claim_can_be_judged(name):
    claim = KNOWN[name].claim
    assert len(claim.says) > 20
    if isinstance(claim, Reference):
        return
    assert "arXiv" in claim.source and claim.baseline in KNOWN
    if STATISTICS[claim.statistic].needs_causal:
        assert all(model_of(load_config(f"{n}:cpu")).causal for n in (name, claim.baseline)), "it would see the future"


@pytest.mark.parametrize("change, word", [
    ({"statistic": "test_bits_per_bite"}, "'test_bits_per_byte'"), ({"direction": "less"}, "lower, higher"),
    ({"source": ""}, "source is empty"), ({"baseline": ""}, "baseline is empty"),
])  # fmt: skip
def test_a_bad_claim_is_refused_by_name(change, word):
    good = {"statistic": "load_violation", "direction": "lower", "baseline": "top_k", "says": "x", "source": "y"}
    with pytest.raises(ConfigError, match=word):
        Claim(**good | change)


def test_a_claim_against_what_is_no_entry_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    for text, word in (
        ("CLAIM = Claim('load_violation', 'lower', baseline='topk', says='x', source='y')", "'topk'.*'top_k'"),
        ("CLAIM = Claim('load_violation', 'lower', baseline='mine', says='x', source='y')", "no other entry"),
        ("CLAIM = 'better'", "must be a Claim"),
    ):
        path.write_text(f"from moe_zoo.compare import Claim\n{text}\ndef get_config(arg=''):\n    return {{}}\n")
        monkeypatch.setattr(E, "known_configs", lambda: {**known_configs(), "mine": path})
        with pytest.raises(ConfigError, match=word):
            E.load_entries()


@pytest.mark.parametrize("scale", [name for name in E.SCALES if name != "tiny"])
@pytest.mark.parametrize("name", KNOWN)
def test_costs_are_matched(name, scale):
    def active(config):
        passes = 2 if config.train.objective.name == "thor" else 1
        return passes * train_flops_per_token(model_of(config), config.data.seq_len)

    reference = E.plan(KNOWN[E.REFERENCE], E.SCALES[scale], 0).config
    for by, count in (("active", active), ("total", lambda config: count_parameters(model_of(config))["total"])):
        planned = E.plan(KNOWN[name], E.SCALES[scale], 0, by=by)
        assert count(planned.config) == pytest.approx(count(reference), rel=0.04), planned.match.says()
        assert planned.match.value == count(planned.config) and by in planned.fits
    unmatched = E.plan(KNOWN[name], E.SCALES[scale], 0, by="none")
    assert unmatched.match.width == unmatched.match.configured


def test_seeds_share_all_but_the_seed_and_entries_share_data_schedule_and_decoder():
    one, two = (E.plan(KNOWN["remoe"], CPU, seed, source="some/where") for seed in (1, 2))
    assert (one.config_hash, one.cost_hash) == (two.config_hash, two.cost_hash)
    assert one.key("data") != two.key("data") != two.key("other data")
    assert one.config.train.seed == one.config.data.seed == 1 and one.config.data.source == "some/where"
    assert {E.plan(entry, CPU, 0).cost_hash for entry in KNOWN.values()} == {one.cost_hash}
    assert len({E.plan(entry, CPU, 0).config_hash for entry in KNOWN.values()}) == len(KNOWN)
    # the reference is the same run however others are matched to it
    assert set(E.plan(KNOWN[E.REFERENCE], CPU, 0).fits) == set(E.MATCHES)


def test_the_committed_runs_are_of_the_settings_that_would_run_now():
    """A setting that joins later without being `silent` at its default makes every stored run one of earlier settings,
    and `--entries=all` would train all of them again.
    """
    stored = {(run["entry"], run["config_hash"]) for run in Store(STORE).read()}
    assert {(name, E.plan(entry, CPU, 0).config_hash) for name, entry in KNOWN.items()} <= stored


def test_an_entry_with_its_own_schedule_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from moe_zoo.train.config import extend\n"
        "def get_config(arg=''):\n    return extend(f'quickstart:{arg}', {'optim': {'learning_rate': 1e-4}})\n"
    )
    with pytest.raises(ConfigError, match="optim.learning_rate: 0.008 -> 0.0001"):
        E.plan(E.Entry("mine", path, Reference("x")), CPU, 0)


def test_what_cannot_be_matched_says_what_was_wanted(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from moe_zoo.train.config import extend\n"
        "def get_config(arg=''):\n    return extend(f'quickstart:{arg}', {'model': {'shared_expert_size': 4096}})\n"
    )
    entry = E.Entry("mine", path, Reference("x"))
    with pytest.raises(ConfigError, match="--match=active.*--match=none"):
        E.plan(entry, CPU, 0)
    # a trial says it instead: so small a model has no room for a second pass
    trial = E.plan(KNOWN["thor"], E.SCALES["tiny"], 0).match
    assert trial.width == 1 and trial.value > 1.05 * trial.target and "+25." in trial.says()


def test_names_are_picked_in_the_order_asked_for():
    assert [e.name for e in E.pick("rmoe, top_k,rmoe", KNOWN)] == ["rmoe", "top_k"]
    everything = [e.name for e in E.pick("all", KNOWN)]
    assert everything[0] == E.REFERENCE and sorted(everything) == sorted(KNOWN)
    for names, word in (("remo", "'remoe'"), (",", "expected names")):
        with pytest.raises(ConfigError, match=word):
            E.pick(names, KNOWN)


def test_a_config_file_is_an_entry_of_its_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from moe_zoo.compare import Claim\nfrom moe_zoo.train.config import extend\n"
        "CLAIM = Claim('load_violation', 'lower', baseline='top_k', says='x', source='y')\n"
        "def get_config(arg=''):\n    return extend(f'quickstart:{arg}', {})\n"
    )
    names = f"top_k, {path},{path}"
    known = E.load_entries(names)
    picked = E.pick(names, known)
    assert [e.name for e in picked] == ["top_k", "mine"] and picked[1].path == path
    assert known.keys() - KNOWN.keys() == {"mine"}
    assert E.plan(picked[1], CPU, 0).config_hash == E.plan(picked[0], CPU, 0).config_hash
    assert E.pick(str(KNOWN["remoe"].path), E.load_entries(str(KNOWN["remoe"].path))) == [KNOWN["remoe"]]
    (tmp_path / "top_k.py").write_text(path.read_text())
    (tmp_path / "plain.py").write_text("def get_config(arg=''):\n    return {}\n")
    for file, word in (("top_k", "already"), ("plain", "no config file with a CLAIM"), ("nowhere", "no config file")):
        with pytest.raises(ConfigError, match=f"{file}.py.*{word}"):
            E.load_entries(str(tmp_path / f"{file}.py"))


def test_flops_of_routers_by_hand():
    D, S, V, F, H, E_, K = 16, 8, 264, 8, 8, 4, 2

    def per_layer(router, **more):
        tree = {"hidden_size": D, "layers": "1*moe", "num_experts": E_, "moe_intermediate_size": F,
                "attention": {"num_attention_heads": 2}, "router": router, "losses": {}, **more}  # fmt: skip
        from moe_zoo.core.schema import build
        from moe_zoo.models.config import ModelConfig

        attention = 2 * D * 4 * 2 * H + 4 * 2 * H * (S + 1) / 2
        return train_flops_per_token(Decoder(build(ModelConfig, tree)), S) / 3 - 2 * D * V - attention

    row = 6 * D * F
    assert per_layer({"name": "top_k", "num_experts_per_tok": K}) == 2 * D * E_ + K * row
    assert per_layer({"name": "hash"}) == row
    p = 4  # projection, three gates of two matrices each, logits
    assert per_layer({"name": "recurrent", "recurrent_size": p}) == 2 * (D * p + 6 * p * p + p * E_) + 2 * row
    # logits, dispatch and combine over all slots; every sequence of S tokens fills E * 3 rows
    soft = per_layer({"name": "soft", "slots_per_expert": 3}, dispatch={"name": "slots"})
    assert soft == 3 * 2 * D * E_ * 3 + E_ * 3 / S * row
    assert per_layer({"name": "smoe_dropout", "k_min": 1, "k_max": 4}) == 2 * D * E_ + 2.5 * row
