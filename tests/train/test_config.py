"""Settings: every mistake is one line that names the key, what was given and the nearest valid thing."""

import pytest

from moe_zoo.core.registry import ConfigError
from moe_zoo.train.config import differences, load_config

TINY = "configs/quickstart.py:tiny"


@pytest.mark.parametrize(
    "key, text, parts",
    [
        ("train.stesp", "5", ["train.stesp", "'steps'"]),
        ("modle.num_experts", "5", ["modle", "'model'"]),
        ("model.num_experts", "many", ["model.num_experts", "integer", "many"]),
        ("model.router.num_experts_per_tok", "9", ["num_experts_per_tok", "9", "num_experts=4"]),
        ("model.router.name", "topk", ["model.router", "topk", "'top_k'"]),
        ("model.dispatch.name", "droples", ["'dropless'"]),
        ("model.router.score_function", "softmx", ["score_function", "'softmax'"]),
        ("model.attention.num_attention_heads", "3", ["hidden_size", "32", "3"]),
        ("model.layers", "2*mow", ["model.layers", "mow", "'moe'"]),
        ("model.layers", "2*(moe", ["model.layers", "2*(moe"]),
        ("optim.learning_rate", "-1", ["optim.learning_rate", "-1"]),
        ("optim.schedule", "cosin", ["optim.schedule", "'cosine'"]),
        ("train.minutes", "3", ["train", "steps", "minutes"]),
        ("train.accumulation", "3", ["batch_size", "8", "3"]),
        ("data.fractions", "[0.5,0.5]", ["data.fractions", "three"]),
        ("data.eval_stride", "65", ["eval_stride", "65", "64"]),
        ("model.losses", "{'load_balanse': {}}", ["load_balanse", "'load_balance'"]),
        ("model.losses.load_balance.coeff", "1", ["load_balance.coeff", "'coef'"]),
        ("mesh.expert", "0", ["mesh.expert", "0"]),
        ("model", "big", ["model", "section", "big"]),
    ],
)
def test_mistake_is_one_line_with_the_nearest_valid_name(key, text, parts):
    with pytest.raises(ConfigError) as info:
        load_config(TINY, [(key, text)])
    message = str(info.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_unknown_preset_and_file_name_the_nearest():
    with pytest.raises(ConfigError, match="'tiny'"):
        load_config("configs/quickstart.py:tinny")
    with pytest.raises(ConfigError, match="'quickstart'"):
        load_config("quickstrat")


def test_a_config_that_raises_is_an_error_line(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_config(arg):\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match="mine.py.*ZeroDivisionError"):
        load_config(str(path))


def test_overrides_take_the_type_of_their_field():
    config = load_config(
        TINY,
        [
            ("optim.learning_rate", "3e-4"),
            ("train.steps", "1e2"),
            ("optim.clip_norm", "none"),
            ("log.tensorboard", "false"),
            ("data.fractions", "[0.8, 0.1, 0.1]"),
            ("log.sample_prompt", "123"),
            ("model.losses.z_loss.coef", "0.5"),
        ],
    )
    assert config.optim.learning_rate == 3e-4
    assert config.train.steps == 100 and isinstance(config.train.steps, int)
    assert config.optim.clip_norm is None and config.log.tensorboard is False
    assert config.data.fractions == (0.8, 0.1, 0.1)
    assert config.log.sample_prompt == "123"
    assert {c.name: c.config.coef for c in config.model.losses}["z_loss"] == 0.5


def test_another_router_by_name_drops_the_old_ones_keys():
    config = load_config(TINY, [("model.router.name", "switch")])
    assert config.model.router.name == "switch" and config.model.router.config.jitter == 0.01


def test_settings_survive_json(tmp_path):
    import json

    from moe_zoo.train.config import config_from_dict

    config = load_config(TINY)
    again = config_from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and hash(again.model) == hash(config.model)


def test_differences_lists_changed_keys():
    a, b = load_config(TINY).to_dict(), load_config(TINY, [("train.seed", "7")]).to_dict()
    assert differences(a, b) == ["train.seed: 0 -> 7"]
