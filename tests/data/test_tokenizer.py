import json

import numpy as np
import pytest

from moe_zoo.data import ByteTokenizer, DataError, Tokenizer, load_tokenizer


@pytest.mark.parametrize("text", ["", "plain", "Grüße, 世界 \U0001f600\n\0\t", "a" * 1000])
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16 and ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert np.array_equal(tokenizer.encode(text.encode()), ids)


def test_all_bytes_survive_and_specials_are_dropped():
    tokenizer = ByteTokenizer()
    raw = bytes(range(256))
    assert tokenizer.decode_bytes(tokenizer.encode(raw)) == raw
    assert tokenizer.decode([tokenizer.bos_id, 104, 105, tokenizer.eos_id, tokenizer.pad_id, 263]) == "hi"
    assert tokenizer.decode([0xFF, 65]) == "\N{REPLACEMENT CHARACTER}A"
    assert tokenizer.encode("\ud800").tolist() == [ord("?")]


def test_special_ids():
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (256, 257, 258)
    assert tokenizer.vocab_size == 264 and tokenizer.name == "bytes"


def test_unknown_name_suggests():
    with pytest.raises(DataError, match="did you mean 'bytes'"):
        load_tokenizer("byte")


def _word_level(path, vocab):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    return load_tokenizer(path)


def test_tokenizer_json(tmp_path):
    tokenizer = _word_level(tmp_path / "tokenizer.json", {"<unk>": 0, "one": 1, "two": 2, "three": 3, "</s>": 4})
    # Stored truncation and padding do not apply.
    assert tokenizer.encode("one two three two").tolist() == [1, 2, 3, 2]
    assert tokenizer.encode(b"one").tolist() == [1]
    assert tokenizer.decode([tokenizer.bos_id, 1, 3, tokenizer.eos_id]) == "one three"
    assert tokenizer.eos_id == 4 and len({tokenizer.pad_id, tokenizer.bos_id, 4}) == 3
    assert tokenizer.vocab_size % 8 == 0 and max(tokenizer.pad_id, tokenizer.bos_id) < tokenizer.vocab_size
    # The name follows the content, not the path; a folder that holds the file works as well.
    assert load_tokenizer(tmp_path).name == tokenizer.name


def test_special_tokens_in_a_text_are_text(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"<": 0, "/": 1, "s": 2, ">": 3}, []))
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("</s>").tolist() == [0, 1, 2, 3] and tokenizer.eos_id == 4


def test_bad_tokenizer_json(tmp_path):
    pytest.importorskip("tokenizers")
    for content in ("", "{}", "not json", json.dumps({"model": 3})):
        path = tmp_path / "tokenizer.json"
        path.write_text(content)
        with pytest.raises(DataError, match="not a valid tokenizer.json"):
            load_tokenizer(path)


def test_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(DataError, match="pip install tokenizers"):
        load_tokenizer(path)


def _byte_level(folder, specials=(), config=None):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["one two three four"] * 9, trainer)
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    "specials, config, known",
    [
        ((), None, {}),
        (("</s>", "<s>", "<pad>"), None, {"eos_id": 0, "bos_id": 1, "pad_id": 2}),
        (("<|endoftext|>",), None, {"eos_id": 0}),
        # One token for all three: documents end in it, the others are new.
        (("<|endoftext|>",), dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>"), {"eos_id": 0}),
        # What the config says comes before what a name looks like.
        (("<|endoftext|>", "<|im_end|>"), {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"},
         {"eos_id": 1, "pad_id": 0}),
        (("</s>",), {"eos_token": "<|not there|>"}, {}),
        (("</s>",), {"eos_token": None, "bos_token": 3}, {"eos_id": 0}),
        (("</s>",), "{damaged", {"eos_id": 0}),
        (("</s>",), "[1]", {"eos_id": 0}),
    ],
)  # fmt: skip
def test_special_tokens_are_found_or_new(tmp_path, specials, config, known):
    tokenizer = _byte_level(tmp_path, specials, config)
    ids = {name: getattr(tokenizer, name) for name in ("pad_id", "bos_id", "eos_id")}
    new = sorted(ids[name] for name in ids if name not in known)
    size = 256 + len(specials)
    assert ids | known == ids and len(set(ids.values())) == 3
    assert all(i >= size for i in new) and max(ids.values()) < tokenizer.vocab_size
    text = "one zwei 世界"
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]) == text
    assert tokenizer.decode(tokenizer.encode("\ud800")) == "?"


def test_special_tokens_are_logged(tmp_path, caplog):
    with caplog.at_level("INFO"):
        _byte_level(tmp_path, ("</s>",))
    assert "eos 0" in caplog.text and "bos" in caplog.text and "(new)" in caplog.text


def test_wrong_paths(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(DataError, match="has no tokenizer.json; tokenizer.model must be converted"):
        load_tokenizer(tmp_path)
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(DataError, match="did you mean 'mine.json'"):
        load_tokenizer(tmp_path / "mime.json")
    with pytest.raises(DataError, match="unknown tokenizer"):
        load_tokenizer("x" * 5000)
    with pytest.raises(DataError, match="unknown tokenizer"):
        load_tokenizer("a\0b")


def test_damaged_tokenizers_are_one_line(tmp_path):
    _byte_level(tmp_path, ("</s>",))
    raw = (tmp_path / "tokenizer.json").read_bytes()
    rng = np.random.RandomState(0)
    for content in (b"version https://git-lfs.github.com/spec/v1", b"\x1f\x8b\0", b"[" * 100_000, raw[:-50]):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(DataError) as error:
            load_tokenizer(tmp_path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    for _ in range(60):
        damaged = bytearray(raw)
        damaged[rng.randint(len(raw))] = rng.choice(list(b'0123456789"{}[],:abc'))
        (tmp_path / "tokenizer.json").write_bytes(damaged)
        try:
            load_tokenizer(tmp_path).encode("one two")
        except DataError as error:
            assert "\n" not in str(error)


def test_a_text_that_cannot_be_encoded(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="cannot encode a text: WordLevel error: Missing"):
        load_tokenizer(tmp_path).encode("two")
