"""Optimizers from optax, a learning rate that follows progress, and what decays."""

import fnmatch
import functools
import inspect

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from moe_zoo.core.registry import ConfigError
from moe_zoo.train.config import SCHEDULES, OptimConfig, parse_options


def learning_rate(config: OptimConfig, step: Int[Array, ""], progress: Float[Array, ""]) -> Float[Array, ""]:
    """The rate at `step`, with `progress` in [0, 1] of the whole run (by steps or by the clock)."""
    warmup = jnp.minimum(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule not in SCHEDULES:
        return (_optax_schedule(config)(step) * warmup).astype(jnp.float32)
    final = config.final_fraction
    if config.schedule == "cosine":
        shape = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    elif config.schedule == "linear":
        shape = 1 - (1 - final) * progress
    elif config.schedule == "wsd":
        decay = jnp.clip((1 - progress) / max(config.decay_fraction, 1e-9), 0, 1)
        shape = final + (1 - final) * decay
    else:
        shape = jnp.ones(())
    return (config.learning_rate * shape * warmup).astype(jnp.float32)


def make_optimizer(config: OptimConfig, axes: dict[str, tuple]) -> optax.GradientTransformation:
    """An optimizer of optax at learning rate 1: every update is linear in the rate, so the step multiplies it in. The
    step clips too, by the norm that it has anyway.

    `axes`: logical axes of each trained parameter; they tell a matrix from a stacked vector.
    """
    decay = {name: is_matrix(name, a) for name, a in axes.items()}
    wd = config.weight_decay
    if config.name == "adamw":
        return optax.adamw(1.0, config.b1, config.b2, config.eps, weight_decay=wd, mask=decay)
    if config.name == "lion":
        return optax.lion(1.0, config.b1, config.b2, weight_decay=wd, mask=decay)
    if config.name == "sgd":
        return optax.chain(optax.add_decayed_weights(wd, mask=decay), optax.sgd(1.0, momentum=config.b1))
    if config.name == "muon":
        return _muon(config, axes, decay)
    return _optax_optimizer(config, decay)


def rate_scales(config: OptimConfig, names) -> dict[str, float]:
    """Each parameter's factor on the learning rate. Raises ConfigError for a pattern that matches nothing."""
    factors = config.rate_factors()
    for pattern, _ in factors:
        if not any(fnmatch.fnmatch(name, pattern) for name in names):
            raise ConfigError(f"optim.lr_scales: {pattern!r} matches no parameter; one is {next(iter(names))!r}")
    first = lambda name: (factor for pattern, factor in factors if fnmatch.fnmatch(name, pattern))
    return {name: next(first(name), 1.0) for name in names}


def is_matrix(name: str, axes: tuple) -> bool:
    """Whether weight decay applies: at least two axes besides the stacking ones, and no embedding table."""
    return len(_own_axes(axes)) >= 2 and not name.startswith(("embed.", "ngram."))


def _own_axes(axes: tuple) -> list[int]:
    return [i for i, axis in enumerate(axes) if axis not in ("layers", "expert", "adapter", "channels")]


def _optax_optimizer(config: OptimConfig, decay: dict[str, bool]) -> optax.GradientTransformation:
    """The optimizer of that name in optax. Settings that it has arguments for are passed on; weight decay that it has
    none for is decoupled, as in AdamW.
    """
    make = _called(config.name)
    takes = inspect.signature(make).parameters
    given = {name: getattr(config, name) for name in ("b1", "b2", "eps") if name in takes}
    mask = next((name for name in ("mask", "weight_decay_mask") if name in takes), None)
    inside = "weight_decay" in takes and mask is not None
    if "weight_decay" in takes:
        given |= {"weight_decay": config.weight_decay, mask: decay} if inside else {"weight_decay": 0.0}
    given |= parse_options(config.options, "optim.options")
    try:
        core = make(learning_rate=1.0, **given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim.options: {config.name} of optax: {error}; it takes {', '.join(takes)}") from error
    outside = 0.0 if inside else config.weight_decay
    return optax.chain(core, optax.add_decayed_weights(-outside, mask=decay)) if outside else core


def _optax_schedule(config: OptimConfig) -> optax.Schedule:
    make = _called(config.schedule)
    takes = inspect.signature(make).parameters
    peak = next((name for name in ("peak_value", "init_value") if name in takes), None)
    given = {} if peak is None else {peak: config.learning_rate}
    if peak == "peak_value" and "init_value" in takes:
        given["init_value"] = 0.0
    given |= parse_options(config.schedule_options, "optim.schedule_options")
    try:
        return make(**given)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"optim.schedule_options: {config.schedule} of optax: {error}; it takes {', '.join(takes)}"
        ) from error


def _called(name: str):
    return functools.reduce(getattr, name.split("."), optax)


def _muon(config: OptimConfig, axes, decay):
    """Muon (Jordan et al. 2024) on matrices inside blocks, Adam on the rest. Layers, experts and channels that do not
    mix are batch axes; heads and head sizes count as one. The update is scaled to Adam's typical size, so one learning
    rate serves both.
    """
    dims = {}
    for name, names in axes.items():
        own = _own_axes(names)
        # of a stack of layers; (layers, size, size, channels) is a convolution
        inside = "layers" in names and len(own) >= 2 and "expert_logits" not in names and names[1:3] != (None, None)
        if not inside:
            dims[name] = None
            continue
        # (embed, heads, head_dim) maps embed to the joined heads; (heads, head_dim, embed) the other way round
        first, rest = (own[:1], own[1:]) if names[own[0]] not in ("heads", "kv_heads") else (own[:-1], own[-1:])
        dims[name] = optax.contrib.MuonDimensionNumbers(reduction_axis=tuple(first), output_axis=tuple(rest))
    return optax.contrib.muon(
        1.0,
        weight_decay=config.weight_decay,
        weight_decay_mask=decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        adam_weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=dims,
        consistent_rms=0.2,
    )


def opt_shardings(tx, params: dict, shardings: dict, replicated):
    """Where each leaf of the optimizer's state lives: moments with their parameters, the rest everywhere."""
    abstract = jax.eval_shape(tx.init, params)

    def place(path, leaf):
        name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey) and k.key in params), None)
        return shardings[name] if name is not None and leaf.shape == params[name].shape else replicated

    return jax.tree_util.tree_map_with_path(place, abstract)
