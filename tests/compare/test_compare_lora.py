"""Adapters compared on tasks: equal parameters, recipes, scores against single answers, the page and cards."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_zoo.checkpoints import Checkpoints
from moe_zoo.cli import compare_lora as command
from moe_zoo.compare import Recipe
from moe_zoo.compare.adapters import bench as B
from moe_zoo.compare.adapters import plans, report, running, score
from moe_zoo.compare.claims import OF_ADAPTERS, Claim
from moe_zoo.compare.entries import Entry
from moe_zoo.compare.runner import run_all
from moe_zoo.compare.store import Store
from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.data import ByteTokenizer, DataError, Document, build_corpus, tasks
from moe_zoo.inference import Loaded
from moe_zoo.models import Decoder
from moe_zoo.train.config import config_file_value

ROOT = Path(__file__).parents[2]
KNOWN = plans.entries()
TINY, CPU = plans.SCALES["tiny"], plans.SCALES["cpu"]
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module", autouse=True)
def few_questions():
    """A tenth of the questions are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "COUNT", 600)
        yield


def planned(name, **train):
    plan = plans.plan(KNOWN[name], TINY, 0)
    return dataclasses.replace(plan, config=dataclasses.replace(
        plan.config, train=dataclasses.replace(plan.config.train, **train)
    ))  # fmt: skip


# ------------------------------------------------------------------------------------------------------- what is equal


def test_every_entry_trains_as_much_as_the_reference_on_the_same_tasks():
    made = [plans.plan(entry, CPU, 1) for entry in KNOWN.values()]
    assert len(made) >= 16 and len({plan.config_hash for plan in made}) == len(made)
    assert len({plan.cost_hash for plan in made}) == 1
    for plan in made:
        assert abs(plan.match.value / plan.match.target - 1) < 0.05, plan.match.says()
        assert plan.match.value == plans.trained(plan.config, plan.recipe)
        assert len(plan.held_in) >= 6 and len(CPU.held_out) == 2 and not {*plan.held_in} & {*CPU.held_out}
        assert plan.config.train.seed == plan.config.data.seed == 1
    by_name = {plan.entry.name: plan.config.model.adapters.config for plan in made}
    number = len(made[0].held_in)
    assert by_name["lora_mixer"].num_experts == number == len(by_name["loramoe"].task_types)
    assert by_name["poly"].num_tasks >= number
    # a rank's scale is the config's, whatever the rank became
    assert by_name["mola"].scaling("layers.0.mixer.k") == by_name["mola"].scaling("layers.0.mixer.v") == 2
    assert by_name["smora"].scaling("layers.0.mixer.k") == 2 and by_name["smora"].r != 32


def test_ranks_that_an_adapter_cannot_have_are_left_out():
    """Eight ranks for each token are more than a tiny LoRA has: a trial keeps the configured rank and says so."""
    match = plans.plan(KNOWN["smora"], TINY, 0).match
    assert match.rank == 32 and match.more == 0 and "+1100.00%" in match.says()


def test_parameters_of_experts_that_tasks_train_alone_count():
    plan = plans.plan(KNOWN["phatgoose"], CPU, 0)
    config = plan.config.model.adapters.config
    ranks = sum(config.rank(f"layers.0.mixer.{name}") for name in "qkvo")
    assert plan.match.value == 8 * 4 * (ranks * (128 + 128) + 4 * 128)  # tasks, layers, A and B, gates


@pytest.mark.parametrize("body, word", [
    ("def get_config(arg=''):\n    return extend(f'lora/lora:{arg}', {'train': {'steps': 7}})", "train.steps: .* -> 7"),
    ("RECIPE = 3\ndef get_config(arg=''):\n    return extend(f'lora/lora:{arg}', {})", "must be a Recipe"),
    ("def get_config(arg=''):\n    return extend(f'lora/loramoe:{arg}', {'model': {'adapters': {'num_experts': 99}}})",
     "no rank trains as much"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused_by_name(body, word, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"from moe_zoo.train.config import extend\n{body}\n")
    with pytest.raises(ConfigError, match=word):
        plans.plan(Entry("mine", path, KNOWN["lora"].claim), CPU, 0)


def test_all_recipes_see_as_many_questions():
    recipes = [config_file_value(KNOWN[name].path, "RECIPE") for name in ("arrow", "lora_mixer", "xlora", "phatgoose")]
    for recipe in (Recipe(), *recipes):
        alone, then = recipe.steps(320, 8)
        assert 8 * sum(alone) + sum(then) == 320 and len(alone) == len(recipe.alone) and len(then) == len(recipe.then)
    for wrong in ({"alone": ({},)}, {"join": {}, "then": ()}, {"then": ()}):
        with pytest.raises(ConfigError, match="RECIPE"):
            Recipe(**wrong)


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def bench():
    """A base that nobody has trained, and the questions."""
    config = plans.base_config(TINY, "").model
    _, kept = B.questions(TINY, planned("lora").held_in, TOKENIZER)
    return B.Bench.of(Loaded(P.materialize(Decoder(config), 0), config, TOKENIZER, "bytes"), kept)


def test_answers_are_scored_as_one_by_one(bench):
    """Packed rows against a loop over questions; the exact ones are those that greedy decoding would write."""
    some = score.sample(bench.corpus, 5)
    # what the model itself would write is right for some questions
    S = 64
    logits = jax.jit(lambda model, ids: model(ids)[0])
    tokens, trained = some.tokens.copy(), some.trained
    expected = {name: ([], []) for name in some.domains}
    for i in range(len(some)):
        span = slice(*some.offsets[i : i + 2])
        answer = np.flatnonzero(trained[span])
        ids = np.full((1, S), TOKENIZER.pad_id, np.int32)
        row = [TOKENIZER.bos_id, *tokens[span]]
        ids[0, : len(row)] = row
        if i % 2:  # greedy: every token of the answer follows from those before it
            for at in answer:
                ids[0, at + 1] = tokens[span][at] = np.asarray(logits(bench.base.model, ids))[0, at].argmax()
        targets = [*tokens[span], TOKENIZER.eos_id]
        out = np.asarray(jax.nn.log_softmax(logits(bench.base.model, ids)[0]))
        places = [*answer, len(targets) - 1]
        nats = [-out[at, targets[at]] for at in places]
        losses, exact = expected[some.domains[some.domain_ids[i]]]
        losses += nats
        exact.append(all(out[at].argmax() == targets[at] for at in places))
    changed = dataclasses.replace(some, tokens=tokens, fingerprint="")
    found = score.score(bench.base.model, changed, TOKENIZER, seq_len=64, batch_size=8)
    for name, (losses, exact) in expected.items():
        np.testing.assert_allclose(found.loss[name], np.mean(losses), rtol=1e-4)
        assert found.exact[name] == pytest.approx(np.mean(exact)) and found.questions[name] == 5


def test_rows_hold_whole_documents(bench):
    some = score.sample(bench.corpus, 7)
    assert np.bincount(some.domain_ids).tolist() == [7] * 5
    seen = np.zeros(len(some), int)
    for batch, documents in score.whole_documents(some, TOKENIZER, 48, 4):
        for i in np.unique(documents[documents >= 0]):
            at = documents == i
            assert len(set(np.nonzero(at)[0])) == 1 and (batch["domain"][at] == some.domain_ids[i]).all()
            assert batch["tokens"][at].tolist() == [TOKENIZER.bos_id, *some.document(i)]
            assert batch["targets"][at].tolist() == [*some.document(i), TOKENIZER.eos_id]
            assert batch["loss_mask"][at].sum() == some.trained_bytes[i] + 1
            assert batch["positions"][at].tolist() == list(range(at.sum()))
            seen[i] += 1
        assert (batch["segment_ids"][documents < 0] == 0).all() and not batch["loss_mask"][documents < 0].any()
    assert (seen == 1).all()
    with pytest.raises(DataError, match="more than seq_len=16"):
        next(score.whole_documents(some, TOKENIZER, 16, 4))


def test_the_base_sees_no_names_no_held_out_task_and_none_of_the_questions():
    trained = ("reverse", "digit_sum")
    seen, kept = B.questions(TINY, trained, TOKENIZER)
    assert seen.domains == kept.domains == (*trained, "copy") and seen.bytes_per_domain()["copy"] == 0
    assert not set(seen.groups) & set(kept.groups) and 0.9 < len(seen) * 3 / (len(kept) * 2) < 1.1
    texts = build_corpus(
        [Document("long enough " * n, name) for name in ("c", "prose") for n in range(1, 900)], TOKENIZER
    )
    lines = list(B.records(seen.select(np.arange(0, len(seen), 50)), texts, TOKENIZER))
    asked = [line for line in lines if line["domain"] in trained]
    assert all(":" not in line["prompt"] and line["prompt"].endswith("=") for line in asked) and len(asked) > 8
    assert all(line["answer"] == line["prompt"][-2::-1] for line in asked if line["domain"] == "reverse")
    text = [line for line in lines if "text" in line]
    sizes = [sum(len(line["text"]) for line in text if line["domain"] == name) for name in ("c", "prose")]
    longest = max(len(line["text"]) for line in text)
    assert 0.9 * B._TEXT < min(sizes) <= max(sizes) <= B._TEXT and longest == B._DOCUMENT


def test_the_base_is_trained_once_and_kept(bench, tmp_path, monkeypatch):
    calls, text = [], build_corpus([Document("some text", "prose")], TOKENIZER)
    of = B.load_corpus
    monkeypatch.setattr(B, "load_corpus", lambda source, tok: text if source == "embedded" else of(source, tok))
    monkeypatch.setattr(B, "load", lambda folder: bench.base)

    def train(config, folder):
        calls.append(config)
        checkpoints = Checkpoints(folder)
        checkpoints.save_params(TINY.base_steps, {"frozen": {"x": jnp.zeros(1)}})
        checkpoints.wait()
        checkpoints.close()
        return {"finished": True}

    monkeypatch.setattr(B.loop, "train", train)
    for _ in range(2):
        made = B.prepare(TINY, planned("lora").held_in, tmp_path, lambda _: None)
        assert made.fingerprint == bench.fingerprint and len(made.corpus) == len(bench.corpus)
    (config,) = calls
    lines = [json.loads(line) for line in Path(config.data.source).read_text().splitlines()]
    assert lines[0] == {"text": "some text", "domain": "prose"} and len(lines) > 1000
    assert config.train.steps == TINY.base_steps and config.model == bench.base.config
    monkeypatch.setattr(B.loop, "train", lambda *_: {"finished": False})
    with pytest.raises(KeyboardInterrupt):
        B.prepare(TINY, planned("lora").held_in, tmp_path / "other", lambda _: None)


# ------------------------------------------------------------------------------------------------------------- one run


@pytest.fixture(scope="module")
def store(bench, tmp_path_factory):
    """After one run of PHATGOOSE: a LoRA and a gate for each task, joined."""
    folder = tmp_path_factory.mktemp("compare_lora")
    plan, found = planned("phatgoose", steps=16), Store(folder / "cpu.jsonl")
    again = dict(say=lambda _: None, until=None, make=running.run_one, outcome=running.outcome)
    assert run_all([plan], found, bench, folder / "work", **again)
    assert run_all([plan], found, bench, folder / "work", **again | {"make": lambda *_: pytest.fail("it is there")})
    return found


def test_a_run_leaves_what_the_page_needs(store, bench):
    (run,) = store.read()
    assert run["results"].keys() == OF_ADAPTERS.keys() and run["failure"] is None
    assert run["data"]["held_in"] == ["reverse", "swap_case", "initials", "digit_sum"]
    assert run["tasks"].keys() == {*run["data"]["held_in"], "copy"} and run["tasks"]["copy"]["questions"] == 8
    mean = np.mean([run["tasks"][task]["loss"] for task in run["data"]["held_in"]])
    assert run["results"]["held_in_loss"] == pytest.approx(mean, rel=1e-4)
    assert run["results"]["held_out_loss"] == pytest.approx(run["tasks"]["copy"]["loss"], rel=1e-4)
    assert 2 < mean < 6 and run["steps"] == 16 and run["router"]["name"] == "phatgoose"
    assert np.shape(run["specialization"]["load"]) == (2, 5, 4) and run["results"]["experts_per_token"] == 2
    # two experts of four, and the gates, which are looked at all
    config = run["final"]
    assert config["num_experts"] == 4 and config["stage"] == "route"
    trained, gates = run["parameters"]["trained"], 4 * 2 * 4 * 32
    assert run["results"]["active_parameters"] == pytest.approx((trained - gates) / 2 + gates)
    assert len(store.path.read_bytes()) < 30_000


# ------------------------------------------------------------------------------------------------------ page and cards


@pytest.fixture(scope="module")
def full_store(store, tmp_path_factory):
    """Every entry with two seeds, `mola` better than LoRA and `mole` of one seed only."""
    base, path = store.read()[0], tmp_path_factory.mktemp("full") / "cpu.jsonl"
    made = Store(path)
    for number, name in enumerate(KNOWN):
        for seed in range(1 if name == "mole" else 2):
            run = copy.deepcopy(base) | {"entry": name, "seed": seed, "key": f"{name}-{seed}", "config_hash": name}
            run["results"]["held_in_loss"] = 1.0 + 0.01 * seed - (0.5 + 0.001 * seed) * (name == "mola")
            run["results"]["held_out_loss"] = 2.0 + 0.01 * number * (-1) ** seed
            if name not in ("mola", "poly"):  # a picture takes its time
                run["specialization"] = None
            if name == "lora":
                run["base"] = run["tasks"]
            assert made.append(run)
    return made


def test_the_page_has_every_entry_and_its_verdict(full_store):
    text = report.write_page(full_store, KNOWN, "cpu").read_text()
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert {*KNOWN, "the base alone"} <= lines.keys()
    first = [line for line in text.splitlines() if line.startswith("| mola |")][0]
    assert "| loss < lora | -0.5005 ±" in first and "| yes |" in first
    assert "not distinguishable" in text and "one seed: no interval" in text and "mole 1" in text
    for name in re.findall(r"\]\((cpu/\w+\.png)\)", text):
        assert (full_store.path.parent / name).read_bytes()[:4] == b"\x89PNG"
    assert text.count("experts_") == 2 and "(cpu/tasks.png)" in text and "(cpu/verdicts.png)" in text


def test_cards_take_their_figures_from_the_store(full_store, tmp_path):
    folder = tmp_path / "zoo"
    folder.mkdir()
    for path in (ROOT / "docs/zoo").glob("*.md"):
        (folder / path.name).write_text(path.read_text())
    texts = report.cards(folder, full_store.path.parent)
    assert {path.stem for path in texts} >= {"lora", "poly", "arrow", "phatgoose", "mola"}
    mola = texts[folder / "mola.md"]
    for shown in ("| mola | 0.5045 ±", "| lora |", "experts_mola.png", "as judged: loss < lora"):
        assert shown in mola, shown
    assert "| mhr |" in texts[folder / "poly.md"] and "experts_lora" not in texts[folder / "lora.md"]


def test_cards_and_the_committed_store_agree():
    for path, text in report.cards(ROOT / "docs/zoo", ROOT / command.STORES).items():
        assert path.read_text() == text, f"{path.name} differs from the store: python scripts/compare_lora.py --cards"


def test_every_claim_can_be_judged():
    for entry in KNOWN.values():
        assert len(entry.claim.says) > 20
        if isinstance(entry.claim, Claim):
            assert entry.claim.statistic in OF_ADAPTERS and "arXiv" in entry.claim.source


@pytest.mark.parametrize("argv, word", [
    ([], "nothing to do"), (["--entries=mol"], "'mole'|'mola'"), (["--entries=all", "--scale=cp"], "'cpu'"),
    (["--entries=all", "--seeds=0"], "at least 1"), (["--config.train.steps=3", "--page"], "config file"),
    (["--page", "--store=x.json"], "ends in .jsonl"), (["--page"], "no run yet"),
])  # fmt: skip
def test_mistakes_of_the_command_line_are_one_line(argv, word, tmp_path):
    with pytest.raises(ConfigError, match=word):
        command.compare_lora([f"--store={tmp_path}/x.jsonl", *argv])


def test_a_line_of_the_store_is_json_without_nan(store):
    assert "NaN" not in store.path.read_text() and json.loads(store.path.read_text().splitlines()[0])
