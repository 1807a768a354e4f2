"""What encoder-decoders have in common: the order of layers in both parts, and the losses of their routers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moe_zoo.checkpoints.hf.family import compress, expand
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.models import ModelConfig

Given = Mapping[str, Any]
PARTS = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True)
class PairOrder:
    """How many layers each part has, and in which step they are routed. `count`: the key with the number, by part;
    `is_routed(i, step)`: which layers are. `step(given, part, n)`: how config.json says it; `more(part, kinds)`: what
    is written besides the step.
    """

    count: Mapping[str, str]
    default: int
    is_routed: Callable[[int, int], bool]
    step: Callable[[Given, str, int], int]
    more: Callable[[str, list[str]], dict[str, Any]] = lambda part, kinds: {}

    def read(self, given: Given) -> dict[str, Any]:
        layers, n = {}, None
        for part in PARTS:
            n = given.get(self.count[part], self.default) or n  # null: as many as the encoder has
            if not isinstance(n, int) or n < 1:
                raise CheckpointError(f"{self.count[part]}: expected a number >= 1, got {n!r}")
            step = self.step(given, part, n)
            layers[part] = compress(self._kinds(n, step))
        return {"layers": layers["decoder"], "encoder.layers": layers["encoder"]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        written = {}
        for part, settings in zip(PARTS, (config.encoder_config(), config)):
            kinds = expand(settings)
            step = next((s for s in range(len(kinds) + 1) if self._kinds(len(kinds), s) == kinds), None)
            if step is None:
                raise CheckpointError(f"the {part}'s layers {settings.layers!r} are routed in no steps")
            written |= {self.count[part]: len(kinds), f"{part}_sparse_step": step, **self.more(part, kinds)}
        return written

    def _kinds(self, n: int, step: int) -> list[str]:
        return ["moe" if step > 0 and self.is_routed(i, step) else "dense" for i in range(n)]


class RouterLosses:
    """`router_aux_loss_coef` and `router_z_loss_coef`: only training looks at them."""

    _NAMES = {"load_balance": "router_aux_loss_coef", "z_loss": "router_z_loss_coef"}

    def read(self, given: Given) -> dict[str, Any]:
        coefs = {ours: given.get(theirs, 0.001) for ours, theirs in self._NAMES.items()}
        return {"losses": {name: {"coef": coef} for name, coef in coefs.items() if coef}}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        coefs = {chosen.name: chosen.config.coef for chosen in config.losses}
        return {theirs: coefs.get(ours, 0.0) for ours, theirs in self._NAMES.items()}
