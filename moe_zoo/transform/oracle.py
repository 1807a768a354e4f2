"""Duo-LLM's oracle (arXiv 2410.10846): for every token the route along which the loss is smallest, found by trying all.

A route says which expert a token takes in each layer, i8[L]: of a bank `big_small` 0 is big, 1 small, 2 the skip. The
oracle knows the token that is to be predicted, so its loss is a bound that no router can be expected to reach, and the
minimum of many noisy losses is small even if routes carry nothing: print it apart, and beside it a control.

Two searches over the same patterns, which the paper leaves open:

    greedy    from left to right: all patterns are tried at a token, keys and values of earlier tokens being those of
              the routes chosen there; the best one's are kept. The model can be run along what is found.
    apart     a pattern is taken by a token and all before it; the best pattern of each token. One parallel pass for
              each. Nothing that can be run, but exact: no pattern for all tokens is better, more are never worse.

N rows, S length, L layers, P patterns.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.registry import ConfigError
from moe_zoo.inference.loaded import Loaded

_ROOM = 64  # patterns are filled up to a multiple, so that budgets share one program


def patterns(L: int, budget: int | None = None, *, at_most: bool = False, modules: int = 2) -> Int[np.ndarray, "P L"]:
    """All routes with exactly `budget` big layers (expert 0), or at most as many; None: all. Fewest big layers first,
    so that a tie goes to the cheaper one. `modules`: 3 with a skip.
    """
    if budget is not None and not 0 <= budget <= L:
        raise ValueError(f"budget: {budget} big layers of {L}; expected 0 to {L}")
    if modules not in (2, 3):
        raise ValueError(f"modules: {modules}; expected 2, or 3 with a skip")
    found = np.array(list(itertools.product(range(modules), repeat=L)), np.int8)
    big = (found == 0).sum(1)
    if budget is not None:
        keep = big <= budget if at_most else big == budget
        found, big = found[keep], big[keep]
    return found[np.argsort(big, kind="stable")]


def losses_along(
    loaded: Loaded,
    tokens_NS: Int[np.ndarray, "N S"],
    targets_NS: Int[np.ndarray, "N S"],
    routes: Int[np.ndarray, "..."],
) -> Float[np.ndarray, "P N S"]:
    """The loss of every target, in nats, along given routes: i8[P, L], a pattern for all tokens, or i8[P, N, S, L]."""
    _check(loaded, tokens_NS, targets_NS, routes)
    routes = np.asarray(routes, np.int8)
    wide = routes[:, None, None] if routes.ndim == 2 else routes
    wide = np.broadcast_to(wide, (len(routes), *tokens_NS.shape, routes.shape[-1]))
    return np.asarray(_along(*nnx.split(loaded.model), tokens_NS, targets_NS, wide))


@dataclasses.dataclass(frozen=True)
class Searched:
    """`chosen`: the number of each token's pattern, `losses`: of every pattern there, those before it being chosen."""

    patterns: Int[np.ndarray, "P L"]
    chosen: Int[np.ndarray, "N S"]
    losses: Float[np.ndarray, "P N S"]

    @property
    def loss(self) -> Float[np.ndarray, "N S"]:
        """Of the chosen patterns: an upper bound on what routing can do, not a model's score."""
        return np.take_along_axis(self.losses, self.chosen[None], 0)[0]

    @property
    def routes(self) -> Int[np.ndarray, "N S L"]:
        """The expert of each token in each layer."""
        return self.patterns[self.chosen]

    @property
    def difficulty(self) -> Float[np.ndarray, "N S"]:
        """How much a larger budget than the smallest can improve on it: CE(smallest) - min CE(larger). A token with a
        high loss that no route lowers is not difficult in this sense.
        """
        big_P = (self.patterns == 0).sum(1)
        least = big_P == big_P.min()
        if least.all():
            raise ValueError(f"difficulty: all {len(big_P)} patterns have {big_P[0]} big layers; it compares budgets")
        return self.losses[least].min(0) - self.losses[~least].min(0)


def search_greedily(
    loaded: Loaded,
    tokens_NS: Int[np.ndarray, "N S"],
    targets_NS: Int[np.ndarray, "N S"],
    patterns_PL: Int[np.ndarray, "P L"],
) -> Searched:
    """The best pattern of each token, from left to right. Ties go to the earlier pattern.

    Raises ConfigError for a model whose layers are not all attention and experts that a route can say of.
    """
    _check(loaded, tokens_NS, targets_NS, patterns_PL)
    P, fill = len(patterns_PL), -len(patterns_PL) % _ROOM
    filled = np.concatenate([patterns_PL, np.repeat(patterns_PL[:1], fill, 0)]).astype(np.int8)
    losses = _greedy(*nnx.split(loaded.model), tokens_NS, targets_NS, filled, np.int32(P))
    losses = np.asarray(losses)[:P]
    return Searched(np.asarray(patterns_PL, np.int8), losses.argmin(0), losses)


def search_apart(
    loaded: Loaded,
    tokens_NS: Int[np.ndarray, "N S"],
    targets_NS: Int[np.ndarray, "N S"],
    patterns_PL: Int[np.ndarray, "P L"],
) -> Searched:
    """The best pattern of each token if it and all tokens before it take it. Ties go to the earlier pattern."""
    losses = losses_along(loaded, tokens_NS, targets_NS, patterns_PL)
    return Searched(np.asarray(patterns_PL, np.int8), losses.argmin(0), losses)


def _nats(logits_BSV: Float[Array, "B S V"], targets_BS: Int[Array, "B S"]) -> Float[Array, "B S"]:
    """-log softmax(logits)[target]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits_BSV), targets_BS[..., None], -1)[..., 0]


def _given(routes_TL: Int[Array, "T L"], num_experts: int) -> dict[str, TokenChoice]:
    """Routes as the decisions of all layers."""
    experts_LT1 = routes_TL.T[..., None].astype(jnp.int32)
    return {"given": TokenChoice(experts_LT1, jnp.ones(experts_LT1.shape, jnp.float32), num_experts)}


@functools.partial(jax.jit, static_argnums=0)
def _along(graphdef, state, tokens_NS, targets_NS, routes_PNSL):
    model = nnx.merge(graphdef, state)

    def one(routes_NSL):
        given = _given(routes_NSL.reshape(-1, routes_NSL.shape[-1]), model.config.num_experts)
        return _nats(model(tokens_NS, inputs=given)[0], targets_NS)

    return jax.lax.map(one, routes_PNSL)


@functools.partial(jax.jit, static_argnums=0)
def _greedy(graphdef, state, tokens_NS, targets_NS, patterns_PL, count):
    """The first `count` patterns' losses at each token [P, N, S]; infinite beyond."""
    model, (N, S), P = nnx.merge(graphdef, state), tokens_NS.shape, len(patterns_PL)

    def at_token(cache, now):
        token_N, target_N = now

        def attempt(p, tried):
            losses_PN, cache = tried
            best_NL = patterns_PL[losses_PN.argmin(0)]
            routes_NL = jnp.where(p < count, patterns_PL[jnp.minimum(p, P - 1)], best_NL)
            logits, _, new = model(token_N[:, None], cache=cache, inputs=_given(routes_NL, model.config.num_experts))
            loss_N = _nats(logits, target_N[:, None])[:, 0]
            losses_PN = losses_PN.at[jnp.where(p < count, p, P)].set(loss_N, mode="drop")
            # keys and values go to the same place in every attempt, so those of the last one, the best, remain
            advanced = jax.tree.map(lambda a, b: jnp.where(p < count, a, b), _steps(cache), _steps(new))
            return losses_PN, {**new, **advanced}

        losses_PN, cache = jax.lax.fori_loop(0, count + 1, attempt, (jnp.full((P, N), jnp.inf), cache))
        return cache, losses_PN

    _, losses_SPN = jax.lax.scan(at_token, model.init_cache(N, S), (tokens_NS.T, targets_NS.T))
    return losses_SPN.transpose(1, 2, 0)


def _steps(cache: dict) -> dict:
    """What of a cache counts tokens: all but the layers' keys and values."""
    return {name: value for name, value in cache.items() if name != "segments"}


def _check(loaded: Loaded, tokens_NS, targets_NS, routes) -> None:
    config = loaded.config
    kinds = [kind for segment in config.segments() for kind in segment.pattern]
    if wrong := [kind for kind in kinds if kind.partition(":")[0] != "moe"]:
        raise ConfigError(f"oracle: a route names an expert in every layer, and {wrong[0]!r} is not routed")
    for kind in dict.fromkeys(kinds):
        variant = config.variant(kind)
        if variant.mixer.name != "attention" or variant.depth.name != "none":
            raise ConfigError(f"oracle: needs attention and all tokens in every layer; {kind!r} is otherwise")
    routes = np.asarray(routes)
    if routes.ndim not in (2, 4) or not routes.size or routes.dtype.kind not in "iu" or routes.min() < 0:
        raise ConfigError(
            f"oracle: routes {list(routes.shape)} of {routes.dtype}; expected experts, i8[P, L] or i8[P, N, S, L]"
        )
    if np.shape(tokens_NS) != np.shape(targets_NS) or np.ndim(tokens_NS) != 2:
        raise ConfigError(
            f"oracle: tokens {list(np.shape(tokens_NS))} and targets {list(np.shape(targets_NS))}; expected [N, S] both"
        )
    L, highest = config.num_layers, int(np.max(routes))
    if np.shape(routes)[-1] != L or highest >= config.num_experts:
        raise ConfigError(
            f"oracle: routes of {np.shape(routes)[-1]} layers and experts up to {highest}; the model has {L} layers of "
            f"{config.num_experts} experts"
        )
