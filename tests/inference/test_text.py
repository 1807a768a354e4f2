"""Text as it comes: whole characters, stop strings, the sum of the pieces; chat templates; recommended settings."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from published import TEMPLATE, write_published, write_tokenizer  # noqa: E402

import moe_zoo  # noqa: E402
from moe_zoo.checkpoints import CheckpointError  # noqa: E402
from moe_zoo.cli import common  # noqa: E402
from moe_zoo.cli.sample import sample  # noqa: E402
from moe_zoo.data.tokenizer import ByteTokenizer, load_tokenizer  # noqa: E402
from moe_zoo.inference import chat, loaded  # noqa: E402
from moe_zoo.inference.published import generation_settings  # noqa: E402
from moe_zoo.inference.text import Pieces, Stops, Writer  # noqa: E402

CHAT = [{"role": "user", "content": " What is 2+2? é "}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def model(folder):
    return moe_zoo.load(folder)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_pieces_are_whole_characters_and_add_up(kind, size, folder):
    tok = ByteTokenizer() if kind == "bytes" else load_tokenizer(folder)
    text = " naïve – 你好 🙂 end"
    ids = tok.encode(text)
    pieces = Pieces(tok)
    heard = [pieces.feed(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert not any("\ufffd" in piece for piece in heard) and "".join([*heard, pieces.finish()]) == text
    assert len([piece for piece in heard if piece]) > len(text) / size / 2


def test_pieces_of_arbitrary_bytes_add_up_to_what_decode_says():
    rng, tok = np.random.default_rng(0), ByteTokenizer()
    for _ in range(200):
        ids = rng.choice([0x41, 0x20, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0xFF, 258], 30)
        pieces = Pieces(tok)
        assert "".join([*(pieces.feed([i]) for i in ids), pieces.finish()]) == tok.decode(ids)


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["tw", "one t"], ""),
        ("aab aaab", ["aaab"], "aab "),
        ("almost sto", ["stop"], "almost sto"),
        ("none here", [], "none here"),
        ("first END then STOP", ["STOP", "END"], "first "),
    ],
)
def test_text_ends_before_the_first_stop_string_however_it_comes(text, stops, expected, size):
    stop, heard = Stops(stops), ""
    for i in range(0, len(text), size):
        heard += stop.feed(text[i : i + size])
        assert expected.startswith(heard)
    assert heard + stop.finish() == expected and stop.found == (expected != text)


def test_rows_do_not_mix_and_the_callback_hears_what_is_returned():
    heard = {0: "", 1: ""}
    writer = Writer(ByteTokenizer(), 2, ["!"], lambda row, piece: heard.update({row: heard[row] + piece}))
    assert not writer.tokens(0, np.frombuffer(b"abc", np.uint8)) and writer.tokens(1, np.frombuffer(b"d!e", np.uint8))
    writer.tokens(0, np.frombuffer("é".encode()[:1], np.uint8))
    assert writer.finish() == ["abc\ufffd", "d"] == list(heard.values())


def test_a_loaded_model_streams_and_stops_at_strings(model):
    whole = model.generate(["ab", "c"], 24, temperature=0.0)
    heard = ["", ""]

    def listen(row, piece):
        heard[row] += piece

    assert model.generate(["ab", "c"], 24, temperature=0.0, on_text=listen) == whole == heard
    stop = whole[0][5:7]
    assert model.generate(["ab", "c"], 24, temperature=0.0, stop=stop)[0] == whole[0][: whole[0].index(stop)]
    with pytest.raises(ValueError, match="stop"):
        model.generate("ab", 3, stop=[""])


def test_what_ends_a_text_and_recommended_sampling_come_from_the_directory(model, folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(loaded, "generate", lambda *a, **how: asked.append(how) or [])
    model.generate("a", 3)
    model.generate("a", 3, published_sampling=True, top_k=7, stop_ids=[5])
    assert set(asked[0]["stop_ids"]) == {256, 258} and "temperature" not in asked[0]
    assert set(asked[1]["stop_ids"]) == {5, 256, 258}
    assert {k: asked[1][k] for k in ("temperature", "top_k", "top_p")} == dict(temperature=0.6, top_k=7, top_p=0.9)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert generation_settings(tmp_path) == {"stop_ids": [2], "sampling": {}}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3], "do_sample": false, "temperature": 0.5}')
    assert generation_settings(tmp_path) == {"stop_ids": [3], "sampling": {"temperature": 0.0}}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="generation_config.json"):
        generation_settings(tmp_path)


def test_a_conversation_becomes_ids_with_special_tokens_and_an_answer(model, folder):
    text = chat.render(folder, CHAT)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2+2? é<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.render(folder, CHAT, thinking=False).endswith("assistant\n<t>")
    assert "<|im_start|>assistant" not in chat.render(folder, CHAT, add_generation_prompt=False)
    ids = model.chat_ids(CHAT).tolist()
    assert ids[0] == 257 and ids.count(258) == 2 and max(ids) == 258
    assert 257 not in model.tokenizer.encode("<|im_start|>").tolist()  # in a plain text they are characters
    heard = []
    answer = model.chat(CHAT, 12, temperature=0.0, on_text=heard.append)
    assert answer and "".join(heard) == answer == model.chat(CHAT, 12, temperature=0.0)


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ raise_exception.__globals__['__builtins__'].exec('import os') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "loop turns"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails"),
        ("{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}", "calls"),
        ("{{ 'a' * 100000000000 }}", "characters"),
        ("{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "characters"),
        ("{{ 9 ** 99999999 }}", "power"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{{ messages[9].content.x }}", "fails"),
        ("{% if %}", "fails"),
        (None, "no chat template"),
    ],
)
def test_a_template_that_breaks_out_or_never_ends_is_refused(template, words, tmp_path):
    write_tokenizer(tmp_path, template)
    with pytest.raises(CheckpointError, match=words):
        chat.render(tmp_path, CHAT)


def test_a_template_may_be_one_of_several_in_the_config(tmp_path):
    config = '{"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d{{ eos_token }}"}]'
    (tmp_path / "tokenizer_config.json").write_text(config + ', "eos_token": {"content": "<e>"}}')
    assert chat.render(tmp_path, CHAT) == "d<e>"


@pytest.mark.parametrize(
    "messages, words", [("hello", "hello"), ([], "expected"), ([{"content": "x"}], "role"), ({"role": "user"}, "role")]
)
def test_what_is_no_conversation_is_refused(model, messages, words):
    with pytest.raises(ValueError, match=words):
        model.chat(messages)


def test_bytes_have_no_chat_template(model):
    with pytest.raises(CheckpointError, match="bytes"):
        moe_zoo.Loaded(model.model, model.config, ByteTokenizer()).chat(CHAT)


def test_templates_render_as_in_transformers(folder, model):
    transformers = pytest.importorskip("transformers", reason="parity: pip install 'moe-zoo[parity]'")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.chat_template == TEMPLATE
    several = [{"role": "system", "content": "S"}, *CHAT * 3, {"role": "assistant", "content": "<b>\n four"}]
    tools = [{"type": "function", "function": {"name": "é", "parameters": {"a": [1, 2]}}}]
    for messages in (CHAT, several):
        for how in (dict(), dict(add_generation_prompt=False), dict(tools=tools), dict(thinking=False)):
            asked = {"add_generation_prompt": True, **how}
            assert chat.render(folder, messages, **how) == theirs.apply_chat_template(messages, tokenize=False, **asked)
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert model.chat_ids(messages).tolist() == expected


def test_the_command_line_streams_and_chats(folder, model, capsys, monkeypatch):
    run = lambda *argv: common.run(sample, [f"--workdir={folder}", "--temperature=0", "--tokens=12", *argv])
    assert run("--prompt=ab", "--json") == 0
    text = model.generate("ab", 12, temperature=0.0)[0]
    out = capsys.readouterr().out
    assert out.startswith(f"ab{text}\n") and json.loads(out.splitlines()[-1])["samples"][0]["text"] == text
    assert run("--chat", "--prompt= What is 2+2? é ") == 0
    assert capsys.readouterr().out == model.chat(CHAT, 12, temperature=0.0) + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    assert run("--chat", "--json") == 0
    assert [s["prompt"] for s in json.loads(capsys.readouterr().out.splitlines()[-1])["samples"]] == ["one", "two"]
    assert run("--system=x") == 2 and "--chat" in capsys.readouterr().err
    assert run("--min-p=2") == 2 and "min_p" in capsys.readouterr().err
