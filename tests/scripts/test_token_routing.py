"""The experiment of image models: random gates follow the learned ones, runs are kept, lines say what was found."""

import importlib
import json
import pathlib
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("token_routing")
    sys.path.remove(str(SCRIPTS))


def test_random_gates_get_the_shares_of_the_learned_ones_of_their_seed(script, monkeypatch, tmp_path, capsys):
    asked = []

    def outcome(config, folder, settings, seed):
        asked.append((folder.name, settings))
        # two rows of two stages: the second has a quarter of the tokens
        layers = [{"layer": i, "depth_share": d + seed / 10} for i, d in enumerate((0.4, 0.2, 0.0, 0.6))]
        layers[0]["scale_share"], layers[1]["scale_share"] = 0.4, 0.6
        depth = {"foreground": 2.0 + seed, "background": 1.0}
        return {"accuracy": 0.5 + seed / 10, "bits": 1.0, "flops": 2e6, "layers": layers, "depth": depth}

    monkeypatch.setattr(script, "outcome", outcome)
    script.run_all("tokens", tmp_path, 2)
    found = dict(asked)
    assert len(found) == 2 * len(script.TOKENS)
    assert found["tokens_random_as_mu_0.5_1"] == {
        "model.gate.kind": "random", "model.gate.depth_share": "0.4000", "model.gate.scale_share": "0.5000",
    }  # fmt: skip
    last = capsys.readouterr().out.splitlines()[-len(script.TOKENS)]
    assert last.startswith("all open: accuracy 55.0 (50.0 to 60.0), bits 1.000, MFLOPs 2.00")
    assert last.endswith("depth of ink 2.50, of clutter 1.00, 2 seeds")


def test_a_run_that_is_there_is_not_made_again(script, tmp_path):
    (tmp_path / "outcome.json").write_text(json.dumps({"accuracy": 0.9}))
    assert script.outcome("no/such/config", tmp_path, {}, 0) == {"accuracy": 0.9}


def test_settings_of_all_arms_are_settings(script):
    for config, arms in script.EXPERIMENTS.values():
        for settings in arms.values():
            script.load_config(config, list(settings.items()) if isinstance(settings, dict) else [])
