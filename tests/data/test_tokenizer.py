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
