"""docs/checkpoints.md says of every family of published models what was measured."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import checkpoint_families  # noqa: E402

from moe_zoo.checkpoints.hf import families  # noqa: E402
from moe_zoo.checkpoints.hf.families import MODULES, others  # noqa: E402


def test_the_table_is_made_from_the_families_and_the_measurements():
    rows = checkpoint_families.table(json.loads(checkpoint_families.RESULTS.read_text()))
    assert rows in checkpoint_families.DOC.read_text(), "python scripts/checkpoint_families.py"
    assert len(rows.splitlines()) == len(MODULES) + 2
    assert all(f"`{name}`" in rows for family in families() for name in family.architectures)


def test_what_is_not_measured_is_not_claimed():
    result = {"class": "MixtralForCausalLM", "import": True, "export": False, "cache": True, "sharding": True}
    lines = checkpoint_families.table({"mixtral": result | {"apart": 1.5e-6}}).splitlines()
    assert next(line for line in lines if line.startswith("| Mixtral")).endswith("| yes | - | yes | yes | 1.5e-06 |")
    assert next(line for line in lines if line.startswith("| OLMoE")).endswith("| - | - | - | - | - |")


def test_what_is_refused_by_name_is_all_that_transformers_has():
    if not importlib.util.find_spec("transformers"):
        pytest.skip("transformers is not installed: pip install 'moe-zoo[parity]'")
    from importlib.metadata import version

    if version("transformers") != others.TRANSFORMERS:
        pytest.skip(
            f"the list is that of transformers {others.TRANSFORMERS}: python scripts/checkpoint_families.py others"
        )
    assert checkpoint_families.scan() == others.OTHERS
