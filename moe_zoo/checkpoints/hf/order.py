"""The order of layers in config.json: which are dense, which routed, which see only a window."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moe_zoo.checkpoints.hf.family import compress, expand
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.models import ModelConfig

_SLIDING = ":sliding"
_ATTENTION = ":attention"
#: what transformers wrote before version 5
_EARLIER = {"mamba": "linear_attention", "attention": "full_attention"}
Given = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Layers:
    """`kinds(given, n)` says what the n layers are and `back(kinds)` writes it; `windows(given, n)` which see a window.

    Where some layers do, they are the variant "sliding"; where all do, it is a setting of the model. `far(given)`: what
    attention is without a window, where that is not all (a model may turn heads only within windows).
    """

    kinds: Callable[[Given, int], list[str]]
    back: Callable[[list[str]], dict[str, Any]]
    windows: Callable[[Given, int], list[bool]] | None = None
    far: Callable[[Given], dict[str, Any]] = lambda given: {}

    def read(self, given: Given) -> dict[str, Any]:
        n = given["num_hidden_layers"]
        if not isinstance(n, int) or n < 1:
            raise CheckpointError(f"num_hidden_layers: expected a number >= 1, got {n!r}")
        kinds = self.kinds(given, n)
        near = self.windows(given, n) if self.windows else [False] * n
        if all(near):
            return {"layers": compress(kinds), "attention.sliding_window": given["sliding_window"]}
        far = self.far(given)
        base = {f"attention.{name}": value for name, value in far.items()}
        if not any(near):
            return {"layers": compress(kinds), **base}
        kinds = [kind + _SLIDING * is_near for kind, is_near in zip(kinds, near, strict=True)]
        variant = {"attention": {"sliding_window": given["sliding_window"], **dict.fromkeys(far)}}
        return {"layers": compress(kinds), "variants": {"sliding": variant}, **base}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        kinds = expand(config)
        plain = [kind.removesuffix(_SLIDING) for kind in kinds]
        written = {"num_hidden_layers": len(kinds), **self.back(plain)}
        if self.windows is None:
            return written
        base = config.attention.sliding_window
        near = [base is not None or kind.endswith(_SLIDING) for kind in kinds]
        if not any(near):
            return written | {"use_sliding_window": False, "sliding_window": None}
        width = base or config.variants.get("sliding", {}).get("attention", {}).get("sliding_window")
        types = ["sliding_attention" if is_near else "full_attention" for is_near in near]
        return written | {"use_sliding_window": True, "sliding_window": width, "layer_types": types}


def every(kind: str, windows=None) -> Layers:
    """All of one kind."""
    return Layers(lambda given, n: [kind] * n, lambda kinds: {}, windows)


def dense_first(windows=None, default: int = 0, name: str = "first_k_dense_replace", **more) -> Layers:
    """`first_k_dense_replace` dense layers, then routed ones."""
    first = lambda given: given.get(name, default)
    return Layers(
        lambda given, n: ["dense" if i < first(given) else "moe" for i in range(n)],
        lambda kinds: {name: next((i for i, k in enumerate(kinds) if k == "moe"), len(kinds))},
        windows,
        **more,
    )


def sparse_step(windows=None) -> Layers:
    """Every `decoder_sparse_step`-th layer routed, but for `mlp_only_layers`."""

    def kinds(given: Given, n: int) -> list[str]:
        step, dense = given.get("decoder_sparse_step", 1), given.get("mlp_only_layers") or ()
        return ["moe" if i not in dense and (i + 1) % step == 0 else "dense" for i in range(n)]

    def back(kinds: list[str]) -> dict[str, Any]:
        return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, kind in enumerate(kinds) if kind == "dense"]}

    return Layers(kinds, back, windows)


def hybrid(
    order: Layers,
    default: Callable[[Given, int], bool],
    key: str = "layer_types",
    names: tuple[str, str] = ("linear_attention", "full_attention"),
) -> Layers:
    """`order` in which some layers have softmax attention, the others the model's mixer: the list `key` says which by
    its `names`, or `default(given, i)`, whether layer i has attention.
    """

    def kinds(given: Given, n: int) -> list[str]:
        types = given.get(key)
        if isinstance(types, list):
            types = [_EARLIER.get(kind, kind) for kind in types]
        if types is None:
            types = [names[bool(default(given, i))] for i in range(n)]
        if not isinstance(types, list) or len(types) != n or not set(types) <= set(names):
            raise CheckpointError(f"{key}: expected {' or '.join(names)} for each of {n} layers")
        return [k + _ATTENTION * (t == names[1]) for k, t in zip(order.kinds(given, n), types, strict=True)]

    def back(kinds: list[str]) -> dict[str, Any]:
        types = [names[kind.endswith(_ATTENTION)] for kind in kinds]
        return {**order.back([kind.removesuffix(_ATTENTION) for kind in kinds]), key: types}

    return Layers(kinds, back)


def windows(default: Callable[[Given, int], bool], switched: bool = True) -> Callable[[Given, int], list[bool]]:
    """`layer_types`, or `default(given, i)` where there are none. `switched`: only if `use_sliding_window` says so."""

    def near(given: Given, n: int) -> list[bool]:
        if not given.get("sliding_window") or not given.get("use_sliding_window", not switched):
            return [False] * n
        types = given.get("layer_types")
        if types is None:
            return [default(given, i) for i in range(n)]
        if not isinstance(types, list) or len(types) != n:
            raise CheckpointError(f"layer_types: expected one of each of {n} layers")
        return [kind == "sliding_attention" for kind in types]

    return near


def beyond_full(given: Given, i: int) -> bool:
    """Layers from `max_window_layers` on."""
    return i >= given.get("max_window_layers", 28)
