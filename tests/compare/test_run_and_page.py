"""One tiny run end to end; then the page, and the cards, from what it left in the store."""

import copy
import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from moe_zoo.cli import compare as command
from moe_zoo.compare import cards, entries, page, record, runner
from moe_zoo.compare.claims import STATISTICS
from moe_zoo.compare.store import Store
from moe_zoo.compare.tables import groups
from moe_zoo.core.registry import ConfigError
from moe_zoo.data import load_corpus, load_tokenizer
from moe_zoo.models import Decoder
from moe_zoo.models.counting import train_flops_per_token
from moe_zoo.train import loop
from moe_zoo.train.log_writers import read_metrics

ROOT = Path(__file__).parents[2]
KNOWN = entries.load_entries()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Eighty short documents of two domains."""
    folder, words = tmp_path_factory.mktemp("text"), "a router decides where each token goes and who computes".split()
    rng = np.random.default_rng(0)
    for domain in ("even", "odd"):
        (folder / domain).mkdir()
        lines = [json.dumps({"text": " ".join(rng.choice(words, 60)) + domain}) for _ in range(40)]
        (folder / domain / "documents.jsonl").write_text("\n".join(lines))
    return folder


def planned(name, text, **train):
    plan = entries.plan(KNOWN[name], entries.SCALES["tiny"], 0, source=str(text))
    config = dataclasses.replace(plan.config, train=dataclasses.replace(plan.config.train, steps=2, **train))
    log = dataclasses.replace(config.log, every=1, eval_every=1, tensorboard=False)
    return dataclasses.replace(plan, config=dataclasses.replace(config, log=log))


@pytest.fixture(scope="module")
def real(text, tmp_path_factory):
    """(plan, store, workdir, corpus) after one run of ReMoE of two steps, stopped after the first by a signal."""
    folder = tmp_path_factory.mktemp("compare")
    plan, store = planned("remoe", text), Store(folder / "tiny.jsonl")
    corpus = load_corpus(plan.config.data.source, load_tokenizer("bytes"))
    run = lambda: runner.run_all([plan], store, corpus, folder / "work", say=lambda _: None, until=None)
    train = loop.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", lambda config, workdir: train(config, workdir, stop_at=1))
        assert not run() and store.read() == []
    (left,) = [path for path in (folder / "work").iterdir() if path.is_dir() and path.name.startswith("remoe")]
    assert len([line for line in read_metrics(left / "metrics.jsonl") if line["kind"] == "train"]) == 1
    assert run()  # goes on from the checkpoint
    return plan, store, folder / "work", corpus


def test_a_run_leaves_all_that_the_page_needs(real):
    plan, store, workdir, corpus = real
    (run,) = store.read()
    assert run["key"] == plan.key(corpus.fingerprint) and run["entry"] == "remoe" and run["failure"] is None
    assert run["results"].keys() == STATISTICS.keys()
    token, chunk, reuse = (run["results"][name] for name in ("token_sparsity", "chunk_sparsity", "reuse"))
    assert 0 <= chunk <= token < 1 and 0 < reuse <= 1
    assert 6 < run["results"]["test_bits_per_byte"] < 9 and run["results"]["dropped_fraction"] == 0
    assert run["curves"]["train"]["step"] == [1, 2] == run["curves"]["validation"]["step"]
    assert np.shape(run["curves"]["load"]["layers"]) == (2, 2, 4)
    np.testing.assert_allclose(np.sum(run["curves"]["load"]["layers"], -1), 4, atol=0.03)
    assert run["data"]["domains"] == ["even", "odd"] and run["router"]["decision"] == "Dense"
    # nothing of the run is left but the compiled programs
    assert not [path for path in workdir.iterdir() if path.name.startswith("remoe")]
    assert len(store.path.read_bytes()) < 60_000


def test_compute_is_counted_from_what_was_routed(real):
    plan, store, _, _ = real
    (run,) = store.read()
    model, S = Decoder(plan.config.model), plan.config.data.seq_len
    tokens = plan.config.data.batch_size * S
    rows = run["curves"]["train"]["experts_per_token"]
    assert max(rows) <= 4 and min(rows) > 0 and rows[0] != 2
    # each layer's rows are averaged: both have the same experts
    each = [train_flops_per_token(model, S, {"segments.0.blocks.0": r}) for r in rows]
    np.testing.assert_allclose(run["curves"]["train"]["flops"], np.cumsum(each) * tokens, rtol=1e-4)
    dropped = {"moe/layer_00/experts_per_token": 3.0, "moe/layer_01/experts_per_token": 1.0,
               "moe/layer_00/dropped_fraction": 0.5}  # fmt: skip
    assert record.active_flops(model, S, dropped) == train_flops_per_token(model, S, {"segments.0.blocks.0": 1.25})
    assert record.active_flops(model, S, dropped, passes=2) == 2 * record.active_flops(model, S, dropped)


def test_what_is_there_or_somebody_elses_is_not_run_again(real, monkeypatch):
    plan, store, workdir, corpus = real
    said = []
    monkeypatch.setattr(runner, "run_one", lambda *a: pytest.fail("it was run"))
    assert runner.run_all([plan], store, corpus, workdir, say=said.append, until=None)
    other = dataclasses.replace(plan, seed=5)
    with runner.locked(workdir / f"{other.key(corpus.fingerprint)}.lock") as mine:
        assert mine
        assert runner.run_all([other], store, corpus, workdir, say=said.append, until=None)
    assert runner.run_all([other], store, corpus, workdir, say=said.append, until=0.0)
    assert [word in line for word, line in zip(("in the store", "another process", "time is up"), said)] == [True] * 3


def test_a_diverged_run_is_a_result_and_a_full_disk_is_not(real, monkeypatch, tmp_path):
    plan, _, _, corpus = real

    def diverges(config, workdir):
        workdir.mkdir()
        line = {
            "step": 1,
            "kind": "train",
            "tokens": 512,
            "seconds": 0.0,
            "processor_seconds": 0.0,
            "bits_per_byte": 8.0,
        }
        (workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        raise loop.TrainingError("step 1: 10 steps in a row were skipped")

    monkeypatch.setattr(loop, "train", diverges)
    run = runner.run_one(plan, corpus, tmp_path / "one")
    assert "skipped" in run["failure"] and run["results"] == dict.fromkeys(STATISTICS) and run["steps"] == 1
    assert Store(tmp_path / "s.jsonl").append(run)

    def full(config, workdir):
        workdir.mkdir()
        raise loop.TrainingError("no space left") from OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "train", full)
    with pytest.raises(loop.TrainingError, match="no space"):
        runner.run_one(plan, corpus, tmp_path / "two")


@pytest.fixture(scope="module")
def full_store(real, tmp_path_factory):
    """A store of every entry with three seeds, one run of an older setting, one that failed, one of other data."""
    base = real[1].read()[0]
    path = tmp_path_factory.mktemp("full") / "cpu.jsonl"
    rng, store = np.random.default_rng(0), Store(path)

    plan_of = functools.cache(lambda name: entries.plan(KNOWN[name], entries.SCALES["cpu"], 0))

    def add(name, seed, loss, **changes):
        plan, run = plan_of(name), copy.deepcopy(base)
        run |= {"entry": name, "seed": seed, "scale": "cpu", "config_hash": plan.config_hash, "fits": list(plan.fits)}
        run |= {"cost_hash": plan.cost_hash, "causal": Decoder(plan.config.model).causal, "match": plan.match.says()}
        run["results"] |= {"test_bits_per_byte": loss, "load_violation": float(rng.uniform(0.1, 0.4))}
        run["curves"]["validation"]["bits_per_byte"] = [loss + 0.5, loss]
        run["specialization"] = {"domains": ["help_de", "help_fr", "go"], "layers": [0, 1], "bits": [0.2, None],
                                 "normalised": [], "share": {"0": [[0.25] * 4] * 3}}  # fmt: skip
        if name == "hash":  # made before these statistics were
            for later in ("token_sparsity", "chunk_sparsity", "reuse"):
                del run["results"][later]
        run |= changes
        run["key"] = f"{name}-{seed}-{run['config_hash']}-{run['data']['fingerprint']}"
        assert store.append(run)

    for name in KNOWN:
        for seed in range(3):
            add(name, seed, 2.0 + 0.1 * (name == "dense") + 0.01 * seed + 0.001 * float(rng.normal()))
    add("rmoe", 0, 1.7777, config_hash="0123456789ab")
    add("rmoe", 3, 2.0123)
    failed = dict.fromkeys(STATISTICS)
    add("switch", 3, 9.0, failure="step 9: diverged", results=failed)
    add("top_k", 0, 1.2345, data=base["data"] | {"fingerprint": "feedbeef"})
    return store


@pytest.fixture(scope="module")
def written(full_store):
    path = page.write_page(full_store, KNOWN, "cpu", "active")
    return path.read_text(), path.with_suffix(".md").read_text(), path.parent / "cpu"


def test_every_run_of_the_store_is_on_the_page(full_store, written):
    html, markdown, _ = written
    runs = full_store.read()
    assert html.count("<tr><td>") == len(runs)
    for run in runs:
        assert run["config_hash"] in html
    for shown in ("1.7777", "1.2345", "rmoe (settings 012345)", "1 failed"):
        assert shown in html and shown in markdown, shown
    assert "failed" in html and "feedbeef" in html
    shown = {id(run) for group in groups(runs, KNOWN, "active") for run in group.runs}
    assert shown == {id(run) for run in runs}


def test_verdicts_are_those_of_the_store(full_store, written):
    html, markdown, _ = written
    main = groups(full_store.read(), KNOWN, "active")[0]
    assert main.row("top_k").verdict.answer == "yes" and main.row("top_k").verdict.difference.n == 3
    assert main.row("switch").verdict.difference.n == 3  # the failed seed 3 has no partner
    assert "sees the future" in main.row("soft_moe").verdict.reason or main.row("soft_moe").verdict.decided
    line = next(line for line in markdown.splitlines() if line.startswith("| top_k |"))
    assert "| loss < dense |" in line and "| yes |" in line
    titles = next(line for line in markdown.splitlines() if "| chunk sparsity |" in line).split(" | ")
    for name, known in (("top_k", True), ("hash", False)):
        row = next(line for line in markdown.splitlines() if line.startswith(f"| {name} |")).split(" | ")
        for title in ("token sparsity", "chunk sparsity", "reuse"):
            assert row[titles.index(title)].endswith("%" if known else "–")


def test_the_page_opens_from_a_disk(written):
    html, markdown, folder = written
    assert html.startswith("<!doctype html>") and html.count("<svg") == html.count("</svg>") >= 5
    fetched = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"', html) + re.findall(r"url\((?!#|data:)([^)]*)\)", html)
    assert not fetched and "<script" not in html and "@import" not in html
    assert "prefers-color-scheme: dark" in html and "var(--ink)" in html
    pictures = re.findall(r"\]\(cpu/(\w+\.png)\)", markdown)
    assert {"verdicts.png", "curves.png", "gaps.png", "load.png", "specialization.png"} <= set(pictures)
    for name in pictures:
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_a_page_of_nothing_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="no run yet"):
        page.write_page(Store(tmp_path / "cpu.jsonl"), KNOWN, "cpu", "active")


def test_cards_and_the_committed_stores_agree():
    for path, text in cards.cards(ROOT / "docs/zoo", ROOT / "docs/results/compare").items():
        assert path.read_text() == text, f"{path.name} differs from the store: python scripts/compare.py --cards"


def test_cards_take_their_figures_from_the_store(full_store, tmp_path):
    folder = tmp_path / "zoo"
    folder.mkdir()
    for path in (ROOT / "docs/zoo").glob("*.md"):
        (folder / path.name).write_text(path.read_text())
    costs = {"ratios": {"switch": {"64": {"alone, both": 9.0}, "16": {"alone, both": 1.25}}}}
    (tmp_path / cards.ROUTER_COSTS).write_text(json.dumps(costs))
    assert cards.write_cards(folder, full_store.path.parent, tmp_path)
    assert not cards.write_cards(folder, full_store.path.parent, tmp_path), "a second time changes nothing"
    main = groups(full_store.read(), KNOWN, "active")[0]
    assert f"{main.row('remoe').mean('test_bits_per_byte'):.4f}" in (folder / "relu.md").read_text()
    line = next(x for x in (folder / "README.md").read_text().splitlines() if x.startswith("| switch |"))
    assert "| 1.25 |" in line and "[switch.md](switch.md)" in line and "loss < dense" in line
    (folder / "relu.md").write_text("no marks")
    with pytest.raises(ConfigError, match="relu.md: no place"):
        cards.write_cards(folder, full_store.path.parent, tmp_path)


@pytest.mark.parametrize("argv, word", [
    ([], "nothing to do"), (["--entries=remo"], "'remoe'"), (["--entries=all", "--scale=gpuu"], "'gpu'"),
    (["--entries=all", "--match=activ"], "'active'"), (["--entries=all", "--seeds=0"], "at least 1"),
    (["--entries=all", "--scale=pod"], "configuration only"), (["--config.train.steps=3", "--page"], "config file"),
    (["--entrys=all"], "'--entries'"),
])  # fmt: skip
def test_mistakes_of_the_command_line_are_one_line(argv, word, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(word)):
        command.compare([*argv, f"--store={tmp_path}/x.jsonl"])


def test_the_list_names_claims_and_seeds(full_store, capsys):
    command.compare(["--list", "--entries=remoe,rmoe", f"--store={full_store.path}"])
    said = capsys.readouterr().out
    assert (
        "loss < top_k (arXiv 2412.14711)" in said and "seeds [0, 1, 2]" in said and "1 runs of other settings" in said
    )
