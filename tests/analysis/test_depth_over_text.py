"""Pictures of which tokens take which depth: what is drawn is what the model did, whatever the text."""

import re

import numpy as np
import pytest
from naive import normal, tiny_model

from moe_zoo.analysis import TokenDepth, plot_token_depth, token_depth, write_token_depth
from moe_zoo.core import param as P
from moe_zoo.data import load_tokenizer
from moe_zoo.inference import Loaded

TEXT = 'a < b & "é"\nsecond line, 好'


def test_it_says_what_each_layer_took_as_one_text_and_in_pieces(tmp_path):
    some = {"some": {"depth": {"name": "mod"}}}
    made = tiny_model(layers="2*(dense dense:some)", losses={}, variants=some, vocab_size=259)
    draw = {n: normal(3, *a.shape) for n, a in P.arrays(made).items() if ".selector." in n}
    loaded = Loaded(P.replace(made, P.arrays(made) | draw), made.config, load_tokenizer("bytes"))
    found = token_depth(loaded, TEXT)
    assert found.layers == [1, 3] and "".join(found.texts) == TEXT
    block, ids = loaded.model.segments[0].blocks[1], loaded.tokenizer.encode(TEXT)
    share = loaded(np.asarray(ids)[None]).aux.stats["segments.0.blocks.1"]["depth_share"].value()
    np.testing.assert_allclose(found.through_LS.mean(1), share, rtol=1e-6)
    assert block.selects and 0 < found.through_LS.sum() < found.through_LS.size
    pieces = token_depth(loaded, TEXT, length=8).through_LS
    np.testing.assert_array_equal(pieces[:, :8], found.through_LS[:, :8])  # nothing depends on what comes later
    assert pieces.shape == found.through_LS.shape and (pieces != found.through_LS).any()
    page = write_token_depth(found, tmp_path / "deep" / "depth.html").read_text()
    assert "a &lt; b" in re.sub(r"</?span[^>]*>", "", page) and "好" in page
    assert plot_token_depth(found, tmp_path / "depth.png").stat().st_size > 5000


def test_a_page_says_the_layers_and_repeats_of_each_token(tmp_path):
    through = np.asarray([[0, 1, 2, 0], [0, 1, 0, 1]])
    found = TokenDepth(["a", "b", "", "\u597d"], through, [2, 5])
    np.testing.assert_array_equal(found.depth_S, [0, 2, 2, 1])
    page = write_token_depth(found, tmp_path / "depth.html").read_text()
    said = re.findall(r'<span title="([^"]*)" data-n="([^"]*)">(.)</span>', page)
    # a character of two tokens has the mean of both
    assert said == [
        ("none of the layers", "0,0", "a"), ("layers 2, 5", "1,1", "b"), ("layers 2, 5 (x0.5)", "1,0.5", "\u597d"),
    ]  # fmt: skip


def test_long_texts_are_wrapped_and_cut(tmp_path):
    from moe_zoo.analysis.depth_over_text import _COLUMNS, _wrapped

    text = "words of a line " * 30 + "\n" + "x" * 200
    lines = ["".join(text[i] for i in line) for line in _wrapped(text)]
    assert "".join(lines) == text and max(map(len, lines)) <= _COLUMNS and lines[0].endswith(" ")


def test_what_has_no_depth_is_refused():
    made = tiny_model(layers="1*dense", losses={})
    with pytest.raises(ValueError, match="takes every token"):
        token_depth(Loaded(made, made.config, load_tokenizer("bytes")), "text")
