"""SAME's and MoGU's experiments: every setting is one that the models take, and the table is of all seeds."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import lora_experiments as experiments  # noqa: E402

from moe_zoo.compare.adapters import plans  # noqa: E402
from moe_zoo.models import Decoder  # noqa: E402
from moe_zoo.models.counting import count_parameters  # noqa: E402

BASE = SimpleNamespace(config=plans.base_config(experiments.SCALE, "").model, tokenizer_spec="bytes")


def trained(adapters, objective=None) -> int:
    return count_parameters(Decoder(experiments.configured(BASE, adapters, objective).model))["trainable"]


def test_methods_train_as_much_as_one_lora():
    counts = {name: trained(adapters) for name, adapters in experiments.METHODS.items()}
    assert len(counts) == 4 and max(counts.values()) < 1.05 * min(counts.values())


@pytest.mark.parametrize("stage", [name for name, _, _ in experiments.STAGES])
def test_each_stage_trains_its_own_part(stage):
    ((adapters, objective),) = [rest for name, *rest in experiments.STAGES if name == stage]
    config = experiments.configured(BASE, experiments.MOGU | adapters, objective)
    assert config.model.adapters.config.stage == stage
    assert config.train.objective.name == ("answer_ratio" if objective else "next_token")
    assert trained(experiments.MOGU | adapters, objective) > 0


def test_the_table_is_of_all_seeds():
    runs = {"0": {"a": {"exact": 0.25}}, "1": {"a": {"exact": 0.75}}}
    assert experiments.table(runs, ["exact"]).splitlines()[-1] == "| a | 0.500 +- 0.354 |"
