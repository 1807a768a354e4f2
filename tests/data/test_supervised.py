"""Records with answers: which tokens are trained on, and that nothing else changes."""

import json
import math

import numpy as np
import pytest

from moe_zoo.data import (
    ByteTokenizer,
    Corpus,
    DataError,
    Document,
    PackedSource,
    build_corpus,
    compressed_bits_per_byte,
    count_targets,
    eval_batches,
    load_corpus,
    load_saved_corpus,
    load_tokenizer,
    save_corpus,
    split,
    train_iterator,
)
from moe_zoo.data.arithmetic import load_arithmetic
from moe_zoo.data.formats.records import to_document

TOKENIZER = ByteTokenizer()
PAD, BOS, EOS = TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id


def _pair(prompt, answer, domain="a"):
    return Document.supervised([(prompt, False), (answer, True)], domain)


def _mixed():
    return [_pair("p" * i, "answer "[: i % 6 + 1] * 2, "ab"[i % 2]) for i in range(12)] + [Document("plain", "b")]


def _corpus(documents=None):
    return build_corpus(_mixed() if documents is None else documents, TOKENIZER)


# -- records ----------------------------------------------------------------------------------------------------------


def _turns(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    "record, pieces",
    [
        ({"prompt": "2+2=", "answer": "4"}, [("2+2=", False), ("4", True)]),
        ({"prompt": "2+2=", "completion": "4", "id": 1}, [("2+2=", False), ("4", True)]),
        ({"question": "2+2=", "response": "4"}, [("2+2=", False), ("4", True)]),
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, [("Add.\n\n2 2\n\n", False), ("4", True)]),
        ({"instruction": "Add.", "input": "", "output": "4"}, [("Add.\n\n", False), ("4", True)]),
        ({"instruction": "Add.", "input": None, "answer": "4"}, [("Add.\n\n", False), ("4", True)]),
        ({"prompt": "", "answer": "4"}, None),
        ({"text": "plain", "prompt": "x", "answer": "y"}, None),
        ({"text": None, "prompt": "x", "answer": "y"}, [("x", False), ("y", True)]),
        (
            _turns(
                ("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"), ("assistant", "B"), ("user", "W")
            ),
            [
                ("<|system|>\nS<|end|>\n<|user|>\nU<|end|>\n<|assistant|>\n", False),
                ("A<|end|>\n", True),
                ("<|user|>\nV<|end|>\n<|assistant|>\n", False),
                ("B<|end|>\n", True),
            ],
        ),
    ],
)
def test_records(record, pieces):
    document = to_document(record | {"domain": "d"}, "other")
    assert document.domain == "d" and document.pieces == (pieces if pieces is None else tuple(pieces))
    assert document.text == ("".join(text for text, _ in pieces) if pieces else record.get("text") or "4")


@pytest.mark.parametrize(
    "record, why",
    [
        ({"prompt": "x"}, "no 'text' field (fields: prompt; expected 'text', or 'prompt' and 'answer', or 'messages')"),
        ({"prompt": "x", "answer": " "}, "an empty 'answer'"),
        ({"prompt": "x", "answer": 4}, "an 'answer' that is not a string"),
        ({"prompt": "x", "answer": None}, "an 'answer' that is not a string"),
        ({"prompt": None, "answer": "x"}, "a 'prompt' that is not a string"),
        ({"text": "x", "domain": 0}, "a 'domain' that is not a string"),
        ({"prompt": ["x"], "response": "y"}, "a 'prompt' that is not a string"),
        ({"instruction": "x", "input": 3, "answer": "y"}, "an 'input' that is not a string"),
        ({"prompt": "x", "answer": "y", "domain": 3}, "a 'domain' that is not a string"),
        ({"text": None}, "a 'text' that is not a string"),
        ({"messages": "x"}, "'messages' that are not a list"),
        ({"messages": []}, "'messages' without an answer of the assistant"),
        ({"messages": ["x"]}, "a message whose 'role' and 'content' are not strings"),
        (_turns(("user", "x")), "'messages' without an answer of the assistant"),
        (_turns(("assistant", " ")), "'messages' without an answer of the assistant"),
        (_turns(("user", [{"type": "text"}])), "a message whose 'role' and 'content' are not strings"),
    ],
)
def test_bad_records(record, why):
    assert to_document(record, "a") == why


def test_lines_and_tables_give_the_same_corpus(tmp_path, caplog):
    pa = pytest.importorskip("pyarrow")
    from data_files import parquet, stream

    rows = {
        "pairs": [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "id": i} for i in range(200)],
        "inputs": [{"instruction": "Add.", "input": f"{i} {i}", "output": str(2 * i)} for i in range(200)],
        "chats": [_turns(("user", f"{i}+{i}="), ("assistant", str(2 * i))) for i in range(200)],
    }
    for name, records in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        expected = load_corpus(tmp_path / f"{name}.jsonl", TOKENIZER)
        assert expected.trained is not None and 0 < expected.trained.sum() < len(expected.tokens)
        table = pa.Table.from_pylist(records)
        for suffix, raw in {".parquet": parquet(table), ".arrow": stream(table)}.items():
            (tmp_path / f"{name}{suffix}").write_bytes(raw)
            assert load_corpus(tmp_path / f"{name}{suffix}", TOKENIZER).fingerprint == expected.fingerprint
    both = [{"text": "plain text " * 9, "prompt": "x", "answer": "y"}] * 9
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(record) + "\n" for record in both))
    assert load_corpus(tmp_path / "both.jsonl", TOKENIZER).trained is None
    assert caplog.text.count("read as plain text; remove 'text' to train on 'answer'") == 1


# -- corpus -----------------------------------------------------------------------------------------------------------


def test_trained_tokens_and_bytes():
    corpus = _corpus([_pair("Frage ", "Ägypten"), Document("plain", "a")])
    assert corpus.trained.tolist() == [False] * 6 + [True] * 8 + [True] * 5
    assert corpus.num_bytes.tolist() == [14, 5] and corpus.trained_bytes.tolist() == [8, 5]
    assert corpus.bytes_per_domain() == {"a": 19} and corpus.trained_bytes_per_domain() == {"a": 13}
    assert corpus.targets_per_domain() == {"a": 9 + 6}
    assert [*corpus.document_bytes(TOKENIZER, trained_only=True)] == ["Ägypten".encode(), b"plain"]


def test_plain_text_has_no_mask_and_its_fingerprint_does_not_know_of_masks():
    documents = [Document(d.text, d.domain, d.group) for d in _mixed()]
    corpus = _corpus(documents)
    assert corpus.trained is None and corpus.trained_bytes is None
    assert corpus.trained_bytes_per_domain() == corpus.bytes_per_domain()
    assert _corpus([Document("text " * 9, "a")]).fingerprint == "3b943994a55e465f"
    assert _corpus().fingerprint != corpus.fingerprint
    assert _corpus([_pair("", "whole")]).trained is None


def test_documents_without_a_trained_token_are_counted(caplog):
    class Deaf(ByteTokenizer):
        def encode(self, text):
            return super().encode(text if text != "?" else "")

    corpus = build_corpus([_pair("a", "?"), _pair("a", "b")], Deaf())
    assert len(corpus) == 1 and "skipped 1 supervised documents without any token to train on" in caplog.text
    with pytest.raises(DataError, match="1 have no token to train on"):
        build_corpus([_pair("a", "?")], Deaf())


def test_save_load_and_select(tmp_path):
    corpus = _corpus()
    save_corpus(corpus, tmp_path / "c.npz")
    loaded = load_saved_corpus(tmp_path / "c.npz")
    assert loaded.fingerprint == corpus.fingerprint and np.array_equal(loaded.trained, corpus.trained)
    part = corpus.select(np.array([7, 2]))
    expected = _corpus([_mixed()[7], _mixed()[2]])
    for name in ("tokens", "offsets", "num_bytes", "trained", "trained_bytes"):
        assert np.array_equal(getattr(part, name), getattr(expected, name)), name
    flipped = corpus.trained.copy()
    flipped[0] = not flipped[0]
    fields = {name: getattr(corpus, name) for name in Corpus.__dataclass_fields__ if name != "fingerprint"}
    assert Corpus(**fields | {"trained": flipped}).fingerprint != corpus.fingerprint


# -- packing ----------------------------------------------------------------------------------------------------------


def _naive_targets(corpus):
    """(target, whether it counts, domain) of the whole stream, one position after the other."""
    stream = []
    for i in range(len(corpus)):
        mask = corpus.trained[corpus.offsets[i] : corpus.offsets[i + 1]].tolist()
        targets = [*corpus.document(i).tolist(), EOS]
        stream += zip(targets, [*mask, mask[-1]], [int(corpus.domain_ids[i])] * len(targets), strict=True)
    return stream


@pytest.mark.parametrize("seq_len, stride", [(16, None), (16, 5), (7, 1), (1, 1), (500, 250)])
def test_only_answers_and_their_ends_count(seq_len, stride):
    corpus = _corpus([*_mixed(), Document.supervised([("x", True), ("not learned", False)], "b"), _pair("last", "one")])
    batches = list(eval_batches(corpus, TOKENIZER, seq_len=seq_len, stride=stride, batch_size=3))
    counted = [
        (int(t), int(d)) for b in batches for t, d in zip(b["targets"][b["loss_mask"]], b["domain"][b["loss_mask"]])
    ]
    assert counted == [(target, domain) for target, counts, domain in _naive_targets(corpus) if counts]
    assert sum(count_targets(b, 2) for b in batches).tolist() == list(corpus.targets_per_domain().values())


def test_everything_but_the_mask_is_that_of_the_plain_text():
    supervised, plain = _corpus(), _corpus([Document(d.text, d.domain) for d in _mixed()])
    for seed in (None, 3):
        a, b = (PackedSource(c, TOKENIZER, 16, 8, seed).rows(np.arange(4)) for c in (supervised, plain))
        assert all(np.array_equal(a[name], b[name]) for name in a if name != "loss_mask")
        assert not (a["loss_mask"] & ~b["loss_mask"]).any() and a["loss_mask"].sum() < b["loss_mask"].sum()


def test_training_resumes_exactly():
    make = lambda: train_iterator(_corpus(), TOKENIZER, seq_len=16, batch_size=2, seed=1)
    iterator, again = make(), make()
    for _ in range(5):
        next(iterator)
    again.set_state(iterator.get_state())
    for _ in range(5):
        a, b = next(iterator), next(again)
        assert all(np.array_equal(a[name], b[name]) for name in a) and a["loss_mask"].any()


# -- split, compressors, evaluation -----------------------------------------------------------------------------------


def _answer(record, i):
    return to_document({"prompt": record, "answer": f"answer {i}"}, "a")


def test_one_prompt_is_in_one_part():
    parts = split(_corpus([_answer(f"question {i % 200}?", i) for i in range(600)]), (0.6, 0.2, 0.2))
    prompts = [{TOKENIZER.decode(c.document(i)).split("?")[0] for i in range(len(c))} for c in parts.values()]
    assert all(prompts) and not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]


def test_a_prompt_of_all_documents_does_not_forbid_to_split():
    parts = split(_corpus([_answer("Continue: ", i) for i in range(600)]))
    assert all(len(part) > 20 for part in parts.values()) and sum(len(part) for part in parts.values()) == 600


def test_supervised_documents_are_never_cut():
    with pytest.raises(DataError, match=r"too few supervised documents to split in a \(2, which are never cut\)"):
        split(_corpus([_pair("p" * 400, "a" * 400), _pair("q" * 400, "b" * 400)]))
    # A book beside them is: it is trained on whole, in every part.
    book = Document("\n".join(f"line {i}" for i in range(3000)), "books")
    parts = split(_corpus([book, *(_pair(f"p {i} ", "answer" * 9) for i in range(100))]))
    for part in parts.values():
        assert part.bytes_per_domain()["books"] == part.trained_bytes_per_domain()["books"] > 0
        assert len(part.trained) == len(part.tokens) and len(part.trained_bytes) == len(part)


def test_compressors_get_the_answers_alone():
    documents = [_pair(f"prompt {i} " * 9, f"answer {i}") for i in range(50)]
    answers = build_corpus([Document(d.pieces[1][0], "a") for d in documents], TOKENIZER)
    assert compressed_bits_per_byte(_corpus(documents)) == compressed_bits_per_byte(answers)


@pytest.mark.parametrize("max_rows", [None, 7])
def test_bits_per_byte_are_those_of_the_answers(max_rows):
    from flax import nnx

    from moe_zoo.train.evaluate import evaluate

    class Even(nnx.Module):
        """Every token equally likely, but never a token of a prompt: counting one would cost infinitely much."""

        mesh = None

        def __call__(self, tokens, **_):
            import jax.numpy as jnp

            banned = jnp.arange(TOKENIZER.vocab_size) == ord("p")
            aux = type("NoLayers", (), {"layers": {}})()
            return jnp.broadcast_to(jnp.where(banned, -1e9, 0.0), (*tokens.shape, len(banned))), aux, None

    corpus = _corpus([_pair("p" * (i % 9 + 1), "abc" * (i % 4 + 1), "xy"[i % 2]) for i in range(40)])
    result = evaluate(Even(), corpus, TOKENIZER, seq_len=16, batch_size=4, max_rows=max_rows)
    bits = math.log2(TOKENIZER.vocab_size - 1)
    assert result["bytes"] == corpus.trained_bytes_per_domain()
    for name, value in result["bits_per_byte"]["domains"].items():
        per_byte = corpus.targets_per_domain()[name] / corpus.trained_bytes_per_domain()[name]
        assert value == pytest.approx(bits * per_byte, rel=1e-5)
    if max_rows is None:
        assert result["tokens"] == sum(corpus.targets_per_domain().values())


def test_arithmetic():
    corpus = load_arithmetic(TOKENIZER)
    assert corpus.domains == ("addition", "subtraction", "multiplication") and len(corpus) == 48_000
    assert len(set(corpus.document_bytes(TOKENIZER))) == len(corpus)
    signs = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    for i in range(0, len(corpus), 97):
        question, answer = TOKENIZER.decode(corpus.document(i)).split("=")
        sign = next(sign for sign in signs if sign in question)
        assert signs[sign](*map(int, question.split(sign))) == int(answer)
        assert corpus.trained_bytes[i] == len(answer)
    parts = split(corpus)
    assert all(min(part.trained_bytes_per_domain().values()) > 500 for part in parts.values())


def test_prompt_and_answer_are_tokenized_apart(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    # "ab" is one token, but not where the prompt ends between the two.
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(
        f"{tmp_path}/tokenizer.json"
    )
    tokenizer = load_tokenizer(tmp_path)
    corpus = build_corpus([_pair("aba", "bab")], tokenizer)
    assert corpus.tokens.tolist() == [2, 0, 1, 2] and corpus.trained.tolist() == [False, False, True, True]
    assert corpus.trained_bytes.tolist() == [3] and corpus.targets_per_domain() == {"a": 3}
