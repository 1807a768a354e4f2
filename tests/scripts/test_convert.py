"""convert.py: what a directory holds, and both ways between published directories and runs of ours."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import moe_zoo
from moe_zoo.checkpoints import hf
from moe_zoo.cli import common
from moe_zoo.cli.convert import convert
from moe_zoo.train import loop
from moe_zoo.train.config import load_config

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints" / "hf"))
from test_files import random, small  # noqa: E402

IDS = np.arange(20).reshape(2, 10)


@pytest.fixture
def folder(tmp_path):
    _, config = small("Mixtral-8x7B")
    hf.save(tmp_path / "published", random(config), config)
    return tmp_path / "published"


def run(*argv):
    return common.run(convert, [str(a) for a in argv])


def test_inspect_says_what_is_there_from_headers_alone(folder, capsys, monkeypatch):
    monkeypatch.setattr(np, "memmap", lambda *a, **k: pytest.fail("read"))
    assert run("inspect", folder, "--json") == 0
    text, last = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert "MixtralForCausalLM" in text and "2 of 4 experts" in text and "T4" in text
    found = json.loads(last)
    # attention 16x16 + 2 16x8 + 16x16, experts 4x3x16x12, router 16x4, norms, twice the table
    layer = 16 * 16 * 2 + 2 * 16 * 8 + 16 * 4 + 32
    assert found["parameters"] == 3 * (layer + 4 * 3 * 16 * 12) + 16 + 2 * 48 * 16
    assert found["active_parameters"] == 3 * (layer + 2 * 3 * 16 * 12) + 16 + 2 * 48 * 16
    assert found["bytes"] == 4 * found["parameters"] == found["bytes_by_type"]["float32"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps whose settings are a Mixtral's."""
    workdir = tmp_path_factory.mktemp("run")
    changes = [("train.steps", "2"), ("log.sample_tokens", "0"), ("model.num_experts", "8"), ("log.eval_rows", "8")]
    loop.train(load_config("quickstart:tiny", changes), workdir)
    return workdir


def test_a_trained_run_goes_out_and_comes_back(trained, tmp_path, capsys):
    assert run("export", trained, f"--out={tmp_path / 'out'}") == 0
    assert "MixtralForCausalLM" in capsys.readouterr().out
    ours, again = moe_zoo.load(trained), moe_zoo.load(tmp_path / "out")
    np.testing.assert_allclose(again(IDS).logits, ours(IDS).logits, rtol=0, atol=1e-6)
    given = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (given["bos_token_id"], given["eos_token_id"], given["num_local_experts"]) == (257, 258, 8)


def test_a_trained_run_opens_in_transformers(trained, tmp_path):
    torch = pytest.importorskip("torch", reason="parity with transformers: pip install 'moe-zoo[parity]'")
    transformers = pytest.importorskip("transformers", reason="parity: pip install 'moe-zoo[parity]'")
    moe_zoo.save_hf(moe_zoo.load(trained), tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        logits = model(torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(moe_zoo.load(trained)(IDS).logits, logits, rtol=0, atol=2e-4)


def test_a_run_that_no_family_has_says_what_does_not_fit(trained, tmp_path, capsys):
    settings = json.loads((trained / "config.json").read_text())
    loaded = moe_zoo.load(trained)
    settings["model"]["router"] = {"name": "top_k", "score_function": "sigmoid", "linear_bias": True}
    loaded.replace_router(settings["model"]["router"])
    with pytest.raises(moe_zoo.checkpoints.CheckpointError, match="model.router.linear_bias=True"):
        moe_zoo.save_hf(loaded, tmp_path / "out")


def test_import_makes_a_run_of_ours(folder, tmp_path, capsys):
    assert run("import", folder, f"--out={tmp_path / 'run'}") == 2
    assert "no tokenizer.json" in capsys.readouterr().err
    tokenizers = pytest.importorskip("tokenizers", reason="pip install 'moe-zoo[tokenizers]'")
    vocab = {"[UNK]": 0, "</s>": 1, "<s>": 2, "<pad>": 3, "a": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    made.save(str(folder / "tokenizer.json"))
    assert run("import", folder, f"--out={tmp_path / 'run'}") == 0
    published, ours = moe_zoo.load(folder), moe_zoo.load(tmp_path / "run")
    np.testing.assert_array_equal(ours(IDS).logits, published(IDS).logits)
    assert published.generate("a", 3, temperature=0.0) == ours.generate("a", 3, temperature=0.0)
    moe_zoo.save_hf(published, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["inspect"], ["path"]),
        (["inspekt", "x"], ["inspect"]),
        (["export", "x"], ["--out"]),
        (["inspect", "x", "--out=y"], ["--out"]),
        (["inspect", "nowhere"], ["nowhere", "config.json"]),
        (["export", "nowhere", "--out=y"], ["nowhere"]),
    ],
)
def test_mistakes_are_one_line(argv, words, capsys):
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words) and err.count("\n") == 1, err
