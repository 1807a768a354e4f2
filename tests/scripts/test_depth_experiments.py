"""What the experiments of depth reckon with: questions, labels from what was tried, F1, the table."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import depth_experiments as experiments  # noqa: E402
from naive import tiny_config, tiny_model  # noqa: E402

from moe_zoo.data import ByteTokenizer, Document, build_corpus, eval_batches  # noqa: E402
from moe_zoo.depth.paths import all_short  # noqa: E402
from moe_zoo.inference import Loaded  # noqa: E402
from moe_zoo.models import Decoder  # noqa: E402
from moe_zoo.train.evaluate import evaluate  # noqa: E402


def test_questions_are_right_and_none_is_there_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "COUNT", 300)
    experiments.write_questions(tmp_path / "questions.jsonl")
    records = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert len({record["prompt"] for record in records}) == len(records) == 100 + 300 + 300
    for record in records:
        a, b = map(int, record["prompt"].removesuffix("=").split("+"))
        assert int(record["answer"][::-1]) == a + b and max(a, b) < 10 ** int(record["domain"][0])


def test_labels_f1_and_static_paths_follow_from_what_was_tried():
    L, paths = 3, all_short(3)
    hits = np.zeros((len(paths), 4), bool)
    at = lambda *path: int(np.flatnonzero((paths == path).all(1))[0])
    hits[at(1, 1, 1), :3] = hits[at(0, 1, 1), :2] = hits[at(1, 0, 1), 0] = hits[at(0, 1, 0), 1] = True
    labels, found = experiments.labelled(hits, L)
    np.testing.assert_array_equal(labels, [[0, 1, 1], [0, 1, 0], [1, 1, 1], [1, 1, 1]])
    np.testing.assert_array_equal(found, [True, True, True, False])
    assert experiments.best_static(hits, 2, L) == at(0, 1, 1)
    said, true = np.array([[0, 1, 1], [1, 2, 0]]), np.array([[0, 1, 0], [1, 1, 0]])
    # skip: 2 of 2 and 3; execute: 2 of 3 and 3; nobody was to be repeated
    assert experiments.macro_f1(said, true) == pytest.approx((4 / 5 + 4 / 6) / 2)


def test_the_table_has_means_and_deviations():
    found = {"one": [{"exact": 0.5}, {"exact": 0.7}], "two": [{"exact": 0.1, "f": 1.0}, {"exact": 0.1, "f": 1.0}]}
    assert experiments.table(found).splitlines() == [
        "| | exact | f |", "|---|---|---|", "| one | 0.600 ± 0.141 |  |", "| two | 0.100 ± 0.000 | 1.000 ± 0.000 |"
    ]  # fmt: skip


def test_bits_are_those_of_the_evaluation_and_the_share_is_what_the_router_keeps():
    tokenizer = ByteTokenizer()
    corpus = build_corpus([Document("so many words " * n, "text") for n in (1, 3, 4)], tokenizer)
    made = tiny_model(
        layers="2*dense", vocab_size=tokenizer.vocab_size, losses={}, depth={"name": "fixed_depth", "path": [1, 0]}
    )
    rows = {"seq_len": 64, "batch_size": 2}
    said = experiments.text_line(Loaded(made, made.config, tokenizer), list(eval_batches(corpus, tokenizer, **rows)))
    expected = evaluate(made, corpus, tokenizer, **rows)["bits_per_byte"]["overall"]
    assert said["bits per byte"] == pytest.approx(expected, rel=1e-6) and said["share of tokens"] == 0.5


def test_a_number_is_settled_where_the_share_is_three_quarters():
    share = lambda x: {"share of tokens": 1 / (1 + np.exp(x - 2))}
    assert experiments.settled(share, -8.0, 8.0) == pytest.approx(2 - np.log(3), abs=0.02)


def test_flops_of_a_share_are_the_models():
    of = lambda **depth: Decoder(tiny_config(layers="2*dense", losses={}, depth=depth))
    flops = lambda model, share: experiments.text_flops(Loaded(model, model.config, None), share, 10.0)
    tokens, whole = of(name="ftp", sparsities=[0.5, 0.1], router="hidden"), of(name="none")
    assert flops(tokens, 0.7) == pytest.approx(tokens.flops_per_token(10.0))
    assert flops(whole, 1.0) == whole.flops_per_token(10.0)
    head = 2 * whole.config.hidden_size * whole.config.vocab_size
    assert flops(of(name="fixed_depth", path=[1, 0]), 0.5) == pytest.approx((whole.flops_per_token(10.0) + head) / 2)
