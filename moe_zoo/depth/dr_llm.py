"""Dr.LLM (arXiv 2510.12773): a classifier per layer of a frozen model skips, executes or repeats it for a sequence.

    W = min(W_max, n) windows of n // W tokens of the prompt;   m_w their means
    z = 1/W sum_w V_2 gelu(V_1 m_w + b_1) + b_2;   times = argmax z in {0, 1, 2}

Labels are paths that a search has found to answer right (`paths.py`, `transform.label_paths`). Training follows them,
so that each classifier reads what the right path has left, and minimises -alpha_y (1 - p_y)^gamma log p_y.

B batch, S sequence, W places of windows, D model, C the three classes.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.param import Constant, Uniform, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.depth.selector import Selection
from moe_zoo.depth.sequence import Documents, SequenceSelector, added
from moe_zoo.routing.router import at_least_f32

CLASSES = ("skip", "execute", "repeat")


@dataclasses.dataclass(frozen=True)
class DrLlmConfig:
    """`windows`: W_max. `gamma`, `beta`: of the focal loss, whose weights follow from `class_counts`, how often the
    labels say skip, execute and repeat; none: weights of 1.

    `budget` in [-1, 1] mixes the classes' probabilities with those of one class: at -1 all layers are skipped, at -0.5
    the classifier decides alone, which None is too, at 0.5 all are executed, at 1 all are repeated.
    """

    windows: int = 8
    router_hidden: int = 128
    gamma: float = 2.0
    beta: float = 0.999
    class_counts: tuple[int, ...] = ()
    budget: float | None = None

    def validate(self, path: str) -> None:
        positive(self, path, "windows", "router_hidden")
        positive(self, path, "gamma", zero=True)
        if not 0 <= self.beta < 1:
            raise ConfigError(f"{join(path, 'beta')}: expected a number in [0, 1), got {self.beta}")
        if self.class_counts and (len(self.class_counts) != len(CLASSES) or min(self.class_counts) < 0):
            raise ConfigError(
                f"{join(path, 'class_counts')}: expected how often labels say {', '.join(CLASSES)}, got "
                f"{list(self.class_counts)}"
            )
        if self.budget is not None and not -1 <= self.budget <= 1:
            raise ConfigError(f"{join(path, 'budget')}: expected a number in [-1, 1], got {self.budget}")


class DrLlm(SequenceSelector):
    """Dr.LLM: by windows of the prompt, a sequence skips the block, goes through it, or goes through it twice."""

    Config = DrLlmConfig
    repeats = True

    def __init__(self, config: DrLlmConfig, hidden_size: int):
        super().__init__(config, hidden_size)
        D, hidden, C = hidden_size, config.router_hidden, len(CLASSES)
        xavier = lambda n, m: Uniform((6 / (n + m)) ** 0.5)
        self.hidden_in = param((D, hidden), ("embed", None), xavier(D, hidden))
        self.hidden_bias = param((hidden,), (None,), Constant(0.0))
        self.classes_out = param((hidden, C), (None, None), xavier(hidden, C))
        self.classes_bias = param((C,), (None,), Constant(0.0))

    def decide(self, x_BSD: Float[Array, "B S D"], documents: Documents, ctx) -> Int[Array, "B S"]:
        windows_BWD, live_BW = windows(at_least_f32(x_BSD), documents, self.config.windows)
        logits_BWC = jnp.where(live_BW[..., None], self.logits(windows_BWD), 0)
        count_BS = documents.sums(live_BW.astype(logits_BWC.dtype))
        logits_BSC = documents.sums(logits_BWC) / jnp.maximum(count_BS, 1)[..., None]
        return jnp.where(count_BS > 0, decided(logits_BSC, self.config.budget), CLASSES.index("execute"))

    def logits(self, windows_BWD: Float[Array, "... D"]) -> Float[Array, "... C"]:
        """The classifier of one window."""
        hidden, bias = at_least_f32(self.hidden_in[...]), at_least_f32(self.hidden_bias[...])
        inside = jax.nn.gelu(windows_BWD @ hidden + bias, approximate=True)
        return inside @ at_least_f32(self.classes_out[...]) + at_least_f32(self.classes_bias[...])

    def loss(
        self, windows_BWD: Float[Array, "B W D"], live_BW: Bool[Array, "B W"], labels_B: Int[Array, "B"]
    ) -> tuple[Float[Array, ""], Float[Array, "B C"]]:
        """The focal loss of sequences whose windows are these, and the logits. Of one layer; the paper has the mean."""
        live_BW1 = live_BW[..., None].astype(windows_BWD.dtype)
        logits_BC = (self.logits(windows_BWD) * live_BW1).sum(1) / jnp.maximum(live_BW1.sum(1), 1)
        return focal(logits_BC, labels_B, class_weights(self.config), self.config.gamma), logits_BC

    def learning(self, x_BSD, given_B, ctx: RoutingContext) -> Selection:
        """Along the path that is given, which is what the loss wants it to say. `ctx.record`: the windows, as terms.

        Raises ValueError without one: there is nothing else that it could learn from.
        """
        if given_B is None:
            raise ValueError(
                "selector 'dr_llm' learns from paths that answer right, inputs['depth']; got none: "
                "transform.label_paths finds them, transform.teach_paths trains"
            )
        x_BSD = at_least_f32(jax.lax.stop_gradient(x_BSD))
        windows_BWD, live_BW = windows(x_BSD, Documents.of(ctx), self.config.windows)
        loss, logits_BC = self.loss(windows_BWD, live_BW, given_B)
        right_B = logits_BC.argmax(-1) == given_B
        terms = {"depth_windows": windows_BWD, "depth_live": live_BW} if ctx.record else {}
        stats = {"depth_accuracy": Stat.mean(right_B.sum().astype(jnp.float32), jnp.float32(right_B.size))}
        times_BS = jnp.broadcast_to(given_B[:, None], x_BSD.shape[:2])
        return self.selection(times_BS, aux=Aux(losses={"depth_labels": loss}, terms=terms, stats=stats))

    def flops_per_token(self) -> float:
        """None: a sequence has at most `windows` windows, once."""
        return 0


def windows(
    x_BSD: Float[Array, "B S D"], documents: Documents, most: int
) -> tuple[Float[Array, "B W D"], Bool[Array, "B W"]]:
    """Means of the windows of each prompt, and at which places there is one: those of a document lie at its beginning.

    What is left of n tokens behind W windows of n // W is not looked at.
    """
    B, S = documents.prompt.shape
    places, prompt_BS = min(S, most) if documents.single else S, documents.prompt
    before_BS = jnp.cumsum(prompt_BS, axis=1, dtype=jnp.int32) - prompt_BS
    rank_BS = before_BS - jnp.take_along_axis(before_BS, documents.start, axis=1)
    n_BS = documents.sums(prompt_BS.astype(jnp.int32))
    W_BS = jnp.minimum(n_BS, most)
    size_BS = n_BS // jnp.maximum(W_BS, 1)
    window_BS = rank_BS // jnp.maximum(size_BS, 1)
    to_BS = jnp.where(prompt_BS & (window_BS < W_BS), documents.start + window_BS, places)
    place_BS = jnp.arange(S) - documents.start
    sums_BWD = added(x_BSD, to_BS, places)
    return sums_BWD / jnp.maximum(size_BS, 1)[:, :places, None], (place_BS < W_BS)[:, :places]


def decided(logits_C: Float[Array, "... C"], budget: float | None) -> Int[Array, "..."]:
    """The most likely class, once probabilities are mixed with those of the class that the budget asks for."""
    if budget is None:
        return jnp.argmax(logits_C, axis=-1).astype(jnp.int32)
    one = lambda name: jnp.eye(len(CLASSES))[CLASSES.index(name)]
    probs = jax.nn.softmax(logits_C, axis=-1)
    first, second, t = (
        (one("skip"), probs, 2 * (budget + 1)) if budget <= -0.5
        else (probs, one("execute"), budget + 0.5) if budget <= 0.5
        else (one("execute"), one("repeat"), 2 * (budget - 0.5))
    )  # fmt: skip
    mixed = jnp.argmax((1 - t) * first + t * second, axis=-1).astype(jnp.int32)
    return jnp.broadcast_to(mixed, probs.shape[:-1])


def class_weights(config: DrLlmConfig) -> np.ndarray:
    """alpha: inverse to the effective number of labels (1 - beta^n) / (1 - beta), 3 in sum; a class without labels gets
    the weight of one label.
    """
    if not config.class_counts:
        return np.ones(len(CLASSES), np.float32)
    effective = (1 - config.beta ** np.maximum(config.class_counts, 1)) / (1 - config.beta)
    return (len(CLASSES) / effective / (1 / effective).sum()).astype(np.float32)


def focal(
    logits_BC: Float[Array, "B C"], labels_B: Int[Array, "B"], alpha: Sequence[float], gamma: float
) -> Float[Array, ""]:
    """The mean of -alpha_y (1 - p_y)^gamma log p_y."""
    log_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BC), labels_B[:, None], axis=1)[:, 0]
    # 1 - p^.. has no derivative at p = 1 for gamma < 1
    away_B = jnp.maximum(-jnp.expm1(log_B), 1e-12) ** gamma if gamma else 1.0
    return -(jnp.asarray(alpha)[labels_B] * away_B * log_B).mean()
