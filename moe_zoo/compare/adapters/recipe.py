"""How an adapter comes to be in the comparison, where it is not trained in one go on all tasks.

A config of `configs/lora` says so at its top level, beside its `CLAIM`:

    RECIPE = Recipe(alone=({"name": "lora"},), join={"name": "arrow"}, then=())
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_zoo.core.registry import ConfigError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings are of `model.adapters`; targets, ranks and alpha are those of the config.

    `alone`: what each task trains for itself, stage after stage, the first from the base and each from the one before.
    `join`: the mixture whose experts these are. `then`: stages on all tasks together, each as changes to the settings.
    All of it together sees as many questions as one LoRA that trains on all tasks at once.
    """

    alone: tuple[Mapping[str, Any], ...] = ()
    join: Mapping[str, Any] | None = None
    then: tuple[Mapping[str, Any], ...] = ({},)

    def __post_init__(self):
        if bool(self.alone) != bool(self.join):
            raise ConfigError("RECIPE: `alone` and `join` belong together: what is trained alone is joined")
        if not (self.alone or self.then):
            raise ConfigError("RECIPE: trains nothing; `then=({},)` is one stage on all tasks")

    def steps(self, total: int, num_tasks: int) -> tuple[list[int], list[int]]:
        """Of each stage in `alone`, for one task, and of each in `then`. The first stage of all gets three quarters of
        the questions, the later ones share the rest.
        """
        later = len(self.alone) + len(self.then) - 1
        shares = [1.0] if not later else [0.75] + [0.25 / later] * later
        alone, then = shares[: len(self.alone)], shares[len(self.alone) :]
        each = lambda share, parts: max(1, round(total * share / parts))
        return [each(share, num_tasks) for share in alone], [each(share, 1) for share in then]
