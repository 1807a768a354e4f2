"""Parameters and FLOPs: one formula, used everywhere."""

from moe_zoo.adapters.experts import ExpertLora
from moe_zoo.adapters.targets import linear_names
from moe_zoo.core import param as P
from moe_zoo.models.decoder import Decoder


def count_parameters(model: Decoder, trainable=None) -> dict[str, int]:
    """{"total", "active", "trainable"}: buffers are not parameters; active counts what one token uses: its experts, and
    one row of each n-gram table; of a block that some tokens go through, their share.

    `trainable`: paths that are trained; all but frozen ones if None. Ranks and experts that a layer's adapters do not
    have, stored beside those of other layers, never move and are no trained parameters.
    """
    variables = {n: v for n, v in P.flat(model).items() if not isinstance(v, P.Buffer)}
    size = {name: var.get_value().size for name, var in variables.items()}
    active = {
        name: var.get_value().shape[0] * var.get_value().shape[-1] if name == "ngram.tables" else size[name]
        for name, var in variables.items()
    }
    for at, block, _ in model.blocks():
        for name, share in (block.mixer.shares if block.mixes else {}).items():
            path = f"{at}.mixer.{name}"
            active[path] = round(size[path] * share)
    for path, block, _ in model.routed():
        share = min(1.0, block.ffn.active() / block.ffn.num_experts)
        for name in size:
            if name.startswith(f"{path}.ffn.experts."):
                active[name] = round(size[name] * share)
    for path, block, _ in model.blocks():
        for name in size:
            if block.selects and name.startswith(f"{path}.") and not name.startswith(f"{path}.selector."):
                active[name] = round(active[name] * block.share)
    if trainable is None:
        trainable = [n for n, v in variables.items() if not isinstance(v, P.Frozen)]
    moving = sum(size[n] for n in trainable) - _idle(model, set(trainable))
    return {"total": sum(size.values()), "active": sum(active.values()), "trainable": moving}


def _idle(model: Decoder, trainable: set[str]) -> int:
    """Numbers of adapters among the trained that never move."""
    return sum(
        adapter.idle_parameters()
        for path, block, _ in model.blocks()
        for name, adapter in block.each_adapter().items()
        if f"{path}.{block.adapter_path(name)}.b" in trainable
    )


def count_adapters(model: Decoder) -> dict[str, int]:
    """{"linear", "matched"}: linear layers of all layers, and those of them that have an adapter."""
    names = [name for _, block, layers in model.blocks() for name in linear_names(block, layers)]
    return {"linear": len(names), "matched": sum(map(model.config.adapters.config.targets, names))}


def router_parameters(model: Decoder) -> int:
    """Parameters that are the routers' and selectors', of all layers together: frozen ones, and what the routers share,
    included.
    """
    own = lambda name: ".router." in name or ".selector." in name or name.startswith("shared.")
    return sum(v.get_value().size for n, v in P.flat(model).items() if own(n) and not isinstance(v, P.Buffer))


def train_flops_per_token(
    model: Decoder, seq_len: int, rows_per_token: dict[str, float] | None = None, passes: int = 1
) -> float:
    """Active FLOPs to train on one token of rows of `seq_len`: forward and twice that for the backward pass; beside
    adapters, whose base has no gradient of its own, once that, and once more the adapters; below selectors that are
    put on a finished model once that, too.

    A token sees (seq_len + 1) / 2 keys on average; recomputation (remat) and the optimizer are not counted.
    `rows_per_token`: as measured, by the path of the stacked block; for other blocks what their routers say.
    `passes`: how often the objective runs the model on each token (`Objective.passes`).
    """
    rows = {path: block.ffn.router.rows_per_token(block.computed(seq_len)) for path, block, _ in model.routed()}
    rows |= rows_per_token or {}
    forward = model.flops_per_token((seq_len + 1) / 2, rows)
    if not model.config.adapted:
        return passes * (2 if model.config.retrofit else 3) * forward
    adapters = sum(len(layers) * block.adapters.flops_per_token() for _, block, layers in model.blocks())
    for path, block, layers in model.routed():
        beside = [a for a in block.each_adapter().values() if isinstance(a, ExpertLora)]
        adapters += len(layers) * rows[path] * sum(adapter.flops_per_row() for adapter in beside)
    return passes * (2 * forward + adapters)
