"""Families by the name of the class in config.json's `architectures`. A family is one file here and one line below."""

import functools
import importlib

from moe_zoo.checkpoints.hf.families.others import OTHERS
from moe_zoo.checkpoints.hf.family import Family
from moe_zoo.checkpoints.hf.ours import OURS
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.core.registry import nearest

#: files of this folder; where one config fits several families the first is taken
MODULES = (
    "olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "granite_moe", "minimax_m2", "llama", "glm4_moe", "dots1",
    "ernie4_5_moe", "qwen3_next", "qwen3_5_moe", "nemotron_h", "lfm2_moe", "kimi_linear", "minimax", "jamba",
    "phimoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "flex_olmo", "dbrx", "hunyuan_moe", "llama4", "longcat_flash",
    "jetmoe", "mistral", "qwen2", "qwen3", "olmo2", "afmoe", "exaone_moe", "bailing_moe", "deepseek", "openmoe",
    "switch_transformers", "nllb_moe",
)  # fmt: skip


@functools.cache
def families() -> tuple[Family, ...]:
    """All of them, in order."""
    return tuple(family for name in MODULES for family in of_module(name)[0])


def of_module(name: str) -> tuple[list[Family], str]:
    """(families, docstring) of one file."""
    module = importlib.import_module(f"{__name__}.{name}")
    return [value for value in vars(module).values() if isinstance(value, Family)], module.__doc__


@functools.cache
def architectures() -> dict[str, Family]:
    """Class name -> family."""
    return {name: family for family in families() for name in family.architectures}


def find(name: str, where: str) -> Family:
    """The family of a class. Raises CheckpointError with the nearest known one."""
    known = architectures() | dict.fromkeys(OURS.architectures, OURS)
    if name not in known and name in OTHERS:
        near = OTHERS[name]
        raise CheckpointError(
            f"{where}: {name} is a mixture of experts that transformers has and moe_zoo does not read; "
            + (f"nearest is {near}" if near else "nothing that it reads comes near")
        )
    if name not in known:
        raise CheckpointError(
            f"{where}: unknown architecture {name!r}{nearest(name, known)}; known: {', '.join(sorted(known))}"
        )
    return known[name]
