"""An encoder that each example leaves when it has thought enough: PonderNet (arXiv 2107.05407), PALBERT (2204.03276).

    h_l = block(h_{l-1});   g_l = tanh(norm(h_l)[first token] W_p + b_p);   logits_l = g_l W_c + b_c
    lambda_l = sigmoid(MLP([g_l, g_{l-1}])), g_0 = 0;   p_l = lambda_l prod_{j<l} (1 - lambda_j)

In training all layers run, and the objective `ponder` weighs the loss of each by p_l. At inference an example is left
behind the first layer that the rule `exit` says, and layers run only until all of the batch are left. One head, one
pooler and one lambda layer serve all layers; so does one block, with `share_layers` (ALBERT).

B batch, S tokens of an example, the first one being that which is read, D model, L layers, C classes.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from moe_zoo.blocks.block import Block
from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.param import Constant, Normal, fan_in, param, stack
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.layers.attention import AttentionConfig
from moe_zoo.layers.cross_attention import PairView, SelfAttention
from moe_zoo.layers.embedding import Embedding
from moe_zoo.layers.exits import Tail, exit_pdf
from moe_zoo.layers.mlp import MLP, FeedForwardConfig
from moe_zoo.layers.norm import LayerNorm
from moe_zoo.models.classifier import Classifier, ClassifierConfig
from moe_zoo.models.decoder import ModelAux

Exit = Literal["quantile", "sample", "expectation", "released_expectation", "fixed", "patience"]


@dataclasses.dataclass(frozen=True)
class PonderConfig(ClassifierConfig):
    """`seq_len`: the longest example; token 0 is padding. `lambda_layers` n: n hidden layers before lambda's last one,
    but none for 1, as released. `lambda_input`: [g_l, g_{l-1}], g_l alone (PonderNet), or g_l - g_{l-1}.
    `detach_lambda`: no gradient from leaving reaches g. `tail`, `eps`: `layers.exits.exit_pdf`, in training.

    `exit`, at inference: the first layer with p_1 + ... + p_l > `quantile` (Q-exit); drawn with probability lambda_l;
    none, the answer being the mean of all by p ("expectation"; "released_expectation" weighs the last layer by
    1 - p_L); layer `depth`; or once `patience` layers in a row agreed with the one before (PABEE, arXiv 2006.04152).
    The last layer is left in any case.
    """

    name: str = "ponder"
    vocab_size: int = 32
    seq_len: int = 16
    hidden_size: int = 64
    num_attention_heads: int = 4
    intermediate_size: int = 256
    num_hidden_layers: int = 8
    share_layers: bool = True
    lambda_layers: int = 3
    lambda_input: Literal["cat", "last", "diff"] = "cat"
    detach_lambda: bool = False
    tail: Tail = "released"
    eps: float = 0.05
    exit: Exit = "quantile"
    quantile: float = 0.5
    depth: int | None = None
    patience: int = 2

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(
            self, path, "vocab_size", "seq_len", "hidden_size", "num_attention_heads", "intermediate_size",
            "num_hidden_layers", "lambda_layers", "patience", "depth",
        )  # fmt: skip
        positive(self, path, "quantile", "eps", zero=True)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"{join(path, 'hidden_size')}: {self.hidden_size} does not divide over num_attention_heads="
                f"{self.num_attention_heads}"
            )
        if (self.depth or 0) > self.num_hidden_layers or (self.exit == "fixed" and self.depth is None):
            raise ConfigError(
                f"{join(path, 'depth')}: {self.depth}; with exit 'fixed' expected a layer from 1 to num_hidden_layers="
                f"{self.num_hidden_layers}"
            )

    @property
    def num_layers(self) -> int:
        return self.num_hidden_layers

    @property
    def tokens_per_example(self) -> int:
        return self.seq_len

    @property
    def summary(self) -> str:
        shared = "one block for all" if self.share_layers else "a block each"
        return f"{self.num_hidden_layers} layers, {shared}, left by {self.exit}"

    def check_examples(self, data) -> None:
        tokens = data.fields.get("tokens")
        if tokens is None:
            raise ConfigError(f"model.name: 'ponder' reads tokens; the data has {', '.join(data.fields)}")
        if tokens.shape[1] > self.seq_len or tokens.max() >= self.vocab_size:
            raise ConfigError(
                f"model.seq_len, model.vocab_size: {self.seq_len}, {self.vocab_size}; the data has {tokens.shape[1]} "
                f"tokens, ids up to {tokens.max()}"
            )
        if len(data.classes) != self.num_classes:
            raise ConfigError(f"model.num_classes: {self.num_classes}; the data has {len(data.classes)}")


class Ponder(Classifier):
    """A classifier of token sequences that decides by itself how many layers an example goes through."""

    Config = PonderConfig

    def __init__(self, config: PonderConfig, mesh: Mesh | None = None):
        super().__init__(config, mesh)
        D, C = config.hidden_size, config.num_classes
        self.embed = Embedding(config.vocab_size, D, std=1.0)
        self.place = param((config.seq_len, D), ("seq", "embed"), Normal(1.0))
        copies = 1 if config.share_layers else config.num_hidden_layers
        self.block = stack(self._block(), tuple(range(copies)))
        self.norm = LayerNorm(D, config.norm_eps)
        self.pool = Linear(D, D, fan_in(D))
        self.head = Linear(D, C, Normal(0.02))
        d = 2 * D if config.lambda_input == "cat" else D
        hidden = config.lambda_layers if config.lambda_layers > 1 else 0
        self.hidden = nnx.List([Linear(d, d, fan_in(d)) for _ in range(hidden)])
        self.halt = Linear(d, 1, Normal(0.02))

    def leaving_by(self, **settings: Any) -> "Ponder":
        """The model with the same arrays and another rule: `exit`, `quantile`, `depth`, `patience`."""
        other = nnx.merge(*nnx.split(self))
        other.config = dataclasses.replace(self.config, **settings)
        other.config.validate("model")
        return other

    def __call__(
        self, batch: dict[str, Array], *, valid=None, train=False, step=None, key=None, record=False
    ) -> tuple[Float[Array, "B C"], ModelAux]:
        """Logits and Aux of `batch["tokens"]`, ids [B, S]; in training those of the last layer, and as terms of the Aux
        with a leading axis of layers: "pdf" p, "passed" (`exit_pdf`), "logits". Otherwise `record` gives "depth", the
        number of layers each example went through, once for every layer.
        """
        B, L = batch["tokens"].shape[0], self.config.num_hidden_layers
        valid_B = jnp.ones(B, bool) if valid is None else valid
        if train:
            halt_LB, logits_LBC = self.all_layers(batch["tokens"])
            pdf_BL, passed_BL = exit_pdf(halt_LB.T, self.config.tail, self.config.eps)
            logits_BC, left_LB = logits_LBC[-1], jax.lax.stop_gradient(pdf_BL.T)
            terms = {"pdf": pdf_BL.T, "passed": passed_BL.T, "logits": logits_LBC}
        else:
            logits_BC, depth_B, _ = self.answer(batch["tokens"], valid_B, key)
            left_LB = (depth_B == jnp.arange(1, L + 1)[:, None]).astype(jnp.float32)
            terms = {"depth": jnp.broadcast_to(depth_B, (L, B))} if record else {}
        left_L = jnp.where(valid_B, left_LB, 0).sum(1)
        stats = {"left": Stat.mean(left_L, jnp.full((L,), valid_B.sum(), left_L.dtype))}
        return logits_BC, ModelAux({}, {"block": (jnp.arange(L), Aux(terms=terms, stats=stats))})

    def all_layers(self, tokens_BS: Int[Array, "B S"]) -> tuple[Float[Array, "L B"], Float[Array, "L B C"]]:
        """(lambda, logits) behind every layer."""
        x, look = self._begin(tokens_BS)

        def body(carry, layer):
            x, before = carry
            x = self._layer(layer, x, *look)
            pooled = self._pooled(x)
            return (x, pooled), (jax.nn.sigmoid(self.halting(pooled, before)), self.head(pooled))

        first = jnp.zeros((x.shape[0], self.config.hidden_size), jnp.float32)
        _, found = jax.lax.scan(body, (x, first), jnp.arange(self.config.num_hidden_layers))
        return found

    def answer(
        self, tokens_BS: Int[Array, "B S"], valid_B, key: Array | None = None
    ) -> tuple[Float[Array, "B C"], Int[Array, "B"], Int[Array, ""]]:
        """(logits, how many layers each example went through, how many were run): none behind the deepest exit of all.
        `valid` False: an example that waits for nobody.

        Raises ValueError if exits are drawn and there is no key.
        """
        config, B = self.config, tokens_BS.shape[0]
        if config.exit == "sample" and key is None:
            raise ValueError("exit 'sample' draws: expected a key, got none")
        x, look = self._begin(tokens_BS)
        wide = jnp.float32
        zeros = jnp.zeros((B, config.num_classes), wide)
        state = {
            "layer": jnp.int32(0), "x": x, "before": jnp.zeros((B, config.hidden_size), wide),
            "alive": jnp.ones(B, wide), "sum": jnp.zeros(B, wide), "logits": zeros, "mixed": zeros, "left": ~valid_B,
            "depth": jnp.zeros(B, jnp.int32), "guess": jnp.full(B, -1), "agreed": jnp.zeros(B, jnp.int32),
        }  # fmt: skip
        unfinished = lambda s: (s["layer"] < config.num_hidden_layers) & ~s["left"].all()
        state = jax.lax.while_loop(unfinished, lambda s: self._further(s, look, key), state)
        mixed = config.exit.endswith("expectation")
        logits = jnp.log(jnp.maximum(state["mixed"], 1e-30)) if mixed else state["logits"]
        return logits, state["depth"], state["layer"]

    def _further(self, s: dict[str, Array], look, key) -> dict[str, Array]:
        """One more layer for all, whose results those who have not left take over."""
        config, layer = self.config, s["layer"]
        x = self._layer(layer, s["x"], *look)
        pooled = self._pooled(x)
        logits, halt = self.head(pooled), jax.nn.sigmoid(self.halting(pooled, s["before"]))
        p, last = halt * s["alive"], layer == config.num_hidden_layers - 1
        new = {"layer": layer + 1, "x": x, "before": pooled, "alive": s["alive"] * (1 - halt), "sum": s["sum"] + p}
        new["guess"] = logits.argmax(-1)
        new["agreed"] = jnp.where(new["guess"] == s["guess"], s["agreed"] + 1, 0)
        weight = jnp.where(last, 1 - p if config.exit == "released_expectation" else s["alive"], p)
        new["mixed"] = s["mixed"] + weight[:, None] * jax.nn.softmax(logits)
        leaves = last | self._leaves(new, halt, key)
        here = ~s["left"] & leaves
        new["logits"] = jnp.where(here[:, None], logits, s["logits"])
        new["depth"] = jnp.where(here, layer + 1, s["depth"])
        return new | {"left": s["left"] | leaves}

    def _leaves(self, new, halt, key):
        """Who leaves behind a layer that is not the last."""
        config = self.config
        if config.exit == "quantile":
            return new["sum"] > config.quantile
        if config.exit == "patience":
            return new["agreed"] >= config.patience
        if config.exit == "fixed":
            return jnp.broadcast_to(new["layer"] == config.depth, halt.shape)
        if config.exit == "sample":
            return jax.random.uniform(jax.random.fold_in(key, new["layer"]), halt.shape) < halt
        return jnp.zeros(halt.shape, bool)

    def halting(self, pooled_BD: Float[Array, "B D"], before_BD: Float[Array, "B D"]) -> Float[Array, "B"]:
        """Logits of lambda, given what is pooled behind this layer and behind the one before."""
        if self.config.detach_lambda:
            pooled_BD, before_BD = jax.lax.stop_gradient((pooled_BD, before_BD))
        kinds = {"cat": lambda a, b: jnp.concatenate([a, b], -1), "last": lambda a, b: a, "diff": lambda a, b: a - b}
        u = kinds[self.config.lambda_input](pooled_BD, before_BD)
        for hidden in self.hidden:
            u = jnp.tanh(hidden(u))
        return self.halt(u)[:, 0]

    def _begin(self, tokens_BS):
        """(embedded tokens, what a block is told besides)."""
        B, S = tokens_BS.shape
        dtype = jnp.dtype(self.config.dtype)
        x = self.embed(tokens_BS, dtype) + self.place[...][:S].astype(dtype)
        positions = jnp.broadcast_to(jnp.arange(S), (B, S))
        return x, (PairView(positions, None, tokens_BS > 0, ahead=True), RoutingContext(batch=B, seq=S, mesh=self.mesh))

    def _layer(self, layer, x, view: PairView, ctx: RoutingContext):
        at = 0 if self.config.share_layers else layer
        block = jax.tree.map(lambda a: a[at], self.block)
        return block(x, view, ctx)[0]

    def _pooled(self, x):
        return jnp.tanh(self.pool(self.norm(x[:, 0]).astype(jnp.float32)))

    def blocks(self):
        yield "block", self.block, tuple(range(self.config.num_hidden_layers))

    def flops_per_example(self) -> float:
        """With all layers."""
        config, d = self.config, self.halt.kernel.get_value().shape[0]
        D, S = config.hidden_size, config.seq_len
        block = self._block()
        heads = 2 * (D * (D + config.num_classes) + d * (len(self.hidden) * d + 1))
        return config.num_hidden_layers * (S * block.flops_per_token(S) + heads)

    def _block(self) -> Block:
        config, D = self.config, self.config.hidden_size
        # residual branches start at 1/sqrt(2L) of their size, as a decoder's
        out_scale = (2 * config.num_hidden_layers) ** -0.5
        attention = AttentionConfig(config.num_attention_heads, rotary_dim=0)
        mlp = FeedForwardConfig(activation="gelu", gated=False, bias=True)
        return Block(
            mixer=SelfAttention(attention, hidden_size=D, out_scale=out_scale),
            ffn=MLP(mlp, hidden_size=D, intermediate_size=config.intermediate_size, out_scale=out_scale),
            mixer_norm=LayerNorm(D, config.norm_eps),
            ffn_norm=LayerNorm(D, config.norm_eps),
        )


class Linear(nnx.Module):
    """x W + b, float32 or wider."""

    def __init__(self, inputs: int, outputs: int, init):
        self.kernel = param((inputs, outputs), ("embed", None), init)
        self.bias = param((outputs,), (None,), Constant(0.0))

    def __call__(self, x: Float[Array, "B I"]) -> Float[Array, "B O"]:
        return x @ self.kernel[...] + self.bias[...]
