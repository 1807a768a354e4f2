"""Encoder-decoders: loops in numpy over both texts, the cache, what may see what, gradients, a mesh, and errors."""

import math

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from naive import jitted

from moe_zoo.checkpoints import CheckpointError
from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build, overlay
from moe_zoo.data.tokenizer import load_tokenizer
from moe_zoo.inference import Loaded, generate, load, save
from moe_zoo.layers.distance import ranges
from moe_zoo.models import EncoderDecoder, EncoderDecoderConfig
from moe_zoo.sharding import MeshConfig, make_mesh, sharding_of

V, D, E, B, L, S = 264, 16, 4, 2, 7, 6
COMMON = dict(vocab_size=V, hidden_size=D, layers="2*moe", intermediate_size=12, moe_intermediate_size=8, num_experts=E)
#: after Switch Transformers and NLLB: places are scarce
TINY = {
    "switch": dict(
        COMMON, encoder={"layers": "2*moe"}, tie_word_embeddings=True, logits_scaling=4.0, relative_buckets=8,
        relative_max_distance=12, mlp={"gated": False, "activation": "relu"},
        experts={"name": "feed_forward", "gated": False, "activation": "relu"},
        attention={"num_attention_heads": 2, "head_dim": 6, "rotary_dim": 0, "softmax_scale": 1.0},
        router={"name": "switch", "init_std": 1.0, "jitter": 0.0},
        dispatch={"name": "capacity", "group": "sequence", "expert_capacity": 2},
    ),
    "nllb": dict(
        COMMON, encoder={"layers": "dense moe", "attention": {"num_attention_heads": 4}, "moe_intermediate_size": 10},
        positions="sinusoidal", position_offset=2, norm="layer", norm_eps=1e-5, embedding_multiplier=4.0,
        mlp={"gated": False, "bias": True, "activation": "relu"},
        experts={"name": "feed_forward", "gated": False, "bias": True, "activation": "relu"},
        attention={"num_attention_heads": 2, "rotary_dim": 0, "qkv_bias": True, "output_bias": True},
        router={
            "name": "gshard", "init_std": 1.0, "second_threshold": 0.0,
            "nllb": {"expert_capacity": 4, "eval_capacity_fraction": 0.4, "output_masking": 0.2},
        },
    ),
}  # fmt: skip
PLENTY = {
    "switch": {"dispatch": {"expert_capacity": 64}},
    "nllb": {"router": {"nllb": {"eval_capacity_fraction": 1.0}}},
}
RNG = np.random.default_rng(0)
SOURCE, TOKENS = RNG.integers(1, V, (B, L)), RNG.integers(1, V, (B, S))
#: one row is padded
VALID = np.arange(L) < np.array([[L], [L - 3]])


def settings(name, **changes):
    return build(EncoderDecoderConfig, overlay(TINY[name], changes), "model")


def made(name, mesh=None, **changes):
    """Every part of it acts: biases and norms are no zeros and ones."""
    model = P.materialize(EncoderDecoder(settings(name, **changes), mesh), 0)
    rng = np.random.default_rng(1)
    move = lambda a: a + 0.2 * rng.standard_normal(a.shape).astype(np.float32)
    where = lambda var, path, a: a if mesh is None else jax.device_put(
        a, sharding_of(mesh, var.logical_axes, a.shape, path)
    )  # fmt: skip
    variables = P.flat(model)
    return P.replace(model, {path: where(variables[path], path, move(a)) for path, a in P.arrays(model).items()})


class Loop:
    """One model, a text at a time, token by token in float64."""

    def __init__(self, model):
        self.c, self.first = model.config, model.config.num_encoder_layers
        self.w = {}
        for path, names in P.layer_names(model).items():
            array = np.asarray(P.arrays(model)[path], np.float64)
            self.w |= dict(zip(names, array)) if names != (path,) else {path: array}

    def logits(self, source, valid, tokens):
        """[B, S, V]; experts of "nllb" have places for all texts together, so these go through the layers as one."""
        memory = self.part(source, valid, None, None, self.c.encoder_config(), 0, "encoder.")
        x = self.part(tokens, np.ones(tokens.shape, bool), memory, valid, self.c, self.first, "")
        head = self.w["embed.table"].T if self.c.tie_word_embeddings else self.w["head.kernel"]
        return x @ head / self.c.logits_scaling

    def part(self, ids, valid, memory, memory_valid, c, first, prefix):
        x = self.w["embed.table"][ids] * self.c.embedding_multiplier
        if self.c.positions == "sinusoidal":
            x = x + [[self.sines(2 + p) for p in range(ids.shape[1])] for _ in ids]  # padding comes last
        kinds = [kind for s in c.segments() for _ in range(s.repeats) for kind in s.pattern]
        for i, kind in enumerate(kinds, first):
            at, ahead = f"layers.{i}", memory is None
            h = self.norm(x, f"{at}.mixer_norm")
            x = x + [
                self.attend(f"{at}.mixer", c, q, q, ok, self.bias(prefix, len(q), ahead), ahead)
                for q, ok in zip(h, valid)
            ]
            if not ahead:
                h = self.norm(x, f"{at}.cross_norm")
                x = x + [
                    self.attend(f"{at}.cross", c, q, m, ok, None, True) for q, m, ok in zip(h, memory, memory_valid)
                ]
            h = self.norm(x, f"{at}.ffn_norm")
            if kind == "dense":
                x = x + self.network(f"{at}.ffn", h)
            elif self.c.router.name == "switch":
                x = x + [self.switch(f"{at}.ffn", row, ok) for row, ok in zip(h, valid)]
            else:
                x = x + self.nllb(f"{at}.ffn", h.reshape(-1, D), valid.reshape(-1)).reshape(h.shape)
        return self.norm(x, f"{prefix}norm")

    def sines(self, p):
        angles = [p * 10000 ** (-i / (D // 2 - 1)) for i in range(D // 2)]
        return np.array([*map(math.sin, angles), *map(math.cos, angles)])

    def norm(self, x, at):
        if f"{at}.bias" in self.w:
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.c.norm_eps)
        return x * self.w[f"{at}.scale"] + self.w.get(f"{at}.bias", 0)

    def bias(self, prefix, n, ahead):
        """(query, key) -> a number per head: 8 buckets up to a distance of 12, shared by the layers."""
        table = self.w.get(f"{prefix}relative.table")
        if table is None:
            return None
        found = np.zeros((n, n, table.shape[1]))
        for s in range(n):
            for t in range(n):
                far, buckets = (abs(t - s), 4) if ahead else (max(s - t, 0), 8)
                exact = buckets // 2
                bucket = far
                if far >= exact:
                    bucket = exact + int(math.log(far / exact) / math.log(12 / exact) * (buckets - exact))
                found[s, t] = table[min(bucket, buckets - 1) + (4 if ahead and t > s else 0)]
        return found

    def attend(self, at, c, x, other, valid, bias, ahead):
        q, k, v = self.heads(f"{at}.q", x), self.heads(f"{at}.k", other), self.heads(f"{at}.v", other)
        scale = c.attention.softmax_scale or q.shape[-1] ** -0.5
        out = np.zeros((len(x), D))
        for s in range(len(x)):
            seen = [t for t in range(len(other)) if valid[t] and (ahead or t <= s)]
            for n in range(q.shape[1]):
                scores = np.array([q[s, n] @ k[t, n] * scale + (0 if bias is None else bias[s, t, n]) for t in seen])
                out[s] += naive.softmax(scores) @ v[seen, n] @ self.w[f"{at}.o"][n]
        return out + self.w.get(f"{at}.o_bias", 0)

    def heads(self, at, x):
        y = np.einsum("sd,dnh->snh", x, self.w[at])
        return y + self.w[f"{at}_bias"].reshape(y.shape[1:]) if f"{at}_bias" in self.w else y

    def network(self, at, x, e=...):
        up, down = self.w[f"{at}.w_up"][e], self.w[f"{at}.w_down"][e]
        first, second = (self.w[f"{at}.{b}"][e] if f"{at}.{b}" in self.w else 0 for b in ("b_up", "b_down"))
        return np.maximum(x @ up + first, 0) @ down + second

    def switch(self, at, x, valid):
        """Two places per expert and text, from left to right; behind them a token gets nothing."""
        out, used = np.zeros_like(x), [0] * E
        for t in np.flatnonzero(valid):
            p = naive.softmax(x[t] @ self.w[f"{at}.router.kernel"])
            e = int(p.argmax())
            if used[e] < self.c.dispatch.config.expert_capacity:
                out[t] = p[e] * self.network(f"{at}.experts", x[t], e)
            used[e] += 1
        return out

    def nllb(self, at, x, valid):
        """Places for a share of all tokens; all first choices before any second one; the gates of what is kept."""
        probs = np.array([naive.softmax(row @ self.w[f"{at}.router.kernel"]) for row in x])
        chosen, used, kept = [naive.best(p, 2) for p in probs], [0] * E, {}
        places = math.ceil(self.c.router.config.nllb.eval_capacity_fraction * len(x))
        for k in range(2):
            for t in np.flatnonzero(valid):
                e = chosen[t][k]
                if used[e] < places:
                    kept.setdefault(t, []).append(e)
                used[e] += 1
        out = np.zeros_like(x)
        for t, experts in kept.items():
            for e in experts:
                out[t] += 0.8 * probs[t, e] / probs[t, experts].sum() * self.network(f"{at}.experts", x[t], e)
        return out


@pytest.mark.parametrize("name", TINY)
def test_it_is_the_loop_over_tokens_where_places_are_scarce(name):
    model = made(name)
    run = jitted(model, lambda m, source, valid, ids: m(ids, source=source, source_valid=valid))
    logits, aux, _ = run(SOURCE, VALID, TOKENS)
    loop = Loop(model)
    np.testing.assert_allclose(logits, loop.logits(SOURCE, VALID, TOKENS), rtol=0, atol=2e-5)
    # and some did not find one
    enough = Loop(P.replace(EncoderDecoder(settings(name, **PLENTY[name])), P.arrays(model)))
    assert np.abs(enough.logits(SOURCE, VALID, TOKENS) - logits).max() > 1e-2
    routed = [path for path in aux.layers if "load" in aux.stats[path]]
    assert sum(path.startswith("encoder.") for path in routed) >= 1 and len(routed) > 1
    ids = [int(i) for numbers, _ in aux.layers.values() for i in numbers]
    assert len(set(ids)) == len(ids)  # layers of both parts are numbered through


@pytest.fixture(scope="module", params=TINY)
def with_cache(request):
    """(model, a function of source, its validity and tokens: logits with a cache, 4 tokens and then 2)."""
    model = made(request.param, **PLENTY[request.param])

    def in_pieces(m, source, valid, ids):
        cache, rows = m.init_cache(B, S + 2, source, valid), []
        for part in (ids[:, :4], ids[:, 4:]):
            logits, _, cache = m(part, cache=cache)
            rows.append(logits)
        return jnp.concatenate(rows, axis=1)

    return model, jitted(model, in_pieces)


def test_with_the_cache_it_is_the_loop_as_well(with_cache):
    model, run = with_cache
    expected = Loop(model).logits(SOURCE, VALID, TOKENS)
    np.testing.assert_allclose(run(SOURCE, VALID, TOKENS), expected, rtol=0, atol=2e-5)


def test_what_sees_what(with_cache):
    run = lambda source, tokens: with_cache[1](source, VALID, tokens)
    whole = run(SOURCE, TOKENS)
    later, padding, read = TOKENS.copy(), SOURCE.copy(), SOURCE.copy()
    later[:, 4] = later[:, 4] % (V - 1) + 1
    padding[~VALID] = 3
    read[:, 3] = read[:, 3] % (V - 1) + 1
    apart = np.abs(run(SOURCE, later) - whole).max((0, 2))
    assert apart[:4].max() < 1e-5 < 1e-3 < apart[4:].min()
    np.testing.assert_allclose(run(padding, TOKENS), whole, rtol=0, atol=1e-5)
    assert np.abs(run(read, TOKENS) - whole).max(2).min() > 1e-4  # all that is written depends on all that is read


@pytest.mark.parametrize("with_cache", ["switch"], indirect=True)
def test_text_is_that_of_the_most_likely_tokens(with_cache, tmp_path):
    model, run = with_cache
    sources = [row[ok] for row, ok in zip(SOURCE, VALID)]
    out = generate(model, [[1], [1]], S - 1, temperature=0.0, sources=sources)
    ids = np.ones((B, S), int)
    for s in range(1, S):
        ids[:, s] = run(SOURCE, VALID, ids)[:, s - 1].argmax(-1)
    np.testing.assert_array_equal(out, ids[:, 1:])
    for wrong in (None, sources[:1], [[], [1]]):
        with pytest.raises(ValueError, match="sources"):
            generate(model, [[1], [1]], 3, sources=wrong)
    # and as text: a source ends with the token that ends texts, the answer begins with what config.json says
    loaded, tok = Loaded(model, model.config, load_tokenizer("bytes"), str(tmp_path)), load_tokenizer("bytes")
    with pytest.raises(CheckpointError, match="decoder_start_token_id"):
        loaded.generate("a")
    (tmp_path / "config.json").write_text('{"decoder_start_token_id": 7}')
    texts = loaded.generate(["ab", "c"], S - 1, target="x", temperature=0.0)
    ids = generate(model, [[7, ord("x")]] * 2, S - 1, temperature=0.0, sources=[[97, 98, tok.eos_id], [99, tok.eos_id]],
                   stop_ids=[tok.eos_id], pad_id=tok.pad_id)  # fmt: skip
    assert texts == [tok.decode(row) for row in ids] and texts[0] != texts[1]
    with pytest.raises(ValueError, match="decoder_input_ids"):
        loaded(SOURCE)
    with pytest.raises(ValueError, match="decoder_attention_mask"):
        loaded(SOURCE, None, TOKENS, VALID)


def test_every_number_is_trained():
    """With all that has numbers: biases and norms with means of the one, distances of the other."""
    # every expert for every token compiles in half the time
    model = made("nllb", layers="moe", positions="relative", dispatch="everywhere", **PLENTY["nllb"])

    def loss(m, state, source, ids):
        m = P.replace(m, state)
        logits, aux, _ = m(ids, source=source, source_valid=VALID, train=True, key=jax.random.key(0))
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], -1)
        return nll.mean() + aux.total_loss()

    gradient = jitted(model, jax.grad(loss, argnums=1))
    for path, g in gradient(P.arrays(model), SOURCE, TOKENS).items():
        assert np.isfinite(g).all() and np.abs(g).max() > (0 if "k_bias" in path else 1e-7), path


def test_on_a_mesh_it_is_the_same():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2), jax.devices()[:8])
    how = lambda m, source, ids: m(ids, source=source)[0]
    four = lambda ids: np.concatenate([ids, ids[:, ::-1]])
    one = jitted(made("switch"), how)(four(SOURCE), four(TOKENS))
    many = jitted(made("switch", mesh), how)(four(SOURCE), four(TOKENS))
    np.testing.assert_allclose(many, one, rtol=0, atol=2e-5)


def test_ranges_of_distance_begin_where_t5_has_them():
    found = ranges(16, 128).tolist()
    starts = [found.index(bucket) for bucket in range(16)]
    assert starts == [*range(8), *(math.ceil(8 * 2 ** (j / 2)) for j in range(8))] and found[-1] == 15
    assert len(found) == 129


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(relative_buckets=6, relative_max_distance=5), ["relative_buckets", "6"]),
        (dict(attention={"rotary_dim": None}), ["rotary_dim", "0"]),
        (dict(attention={"sliding_window": 4}), ["attention.sliding_window", "plain"]),
        (dict(encoder={"layers": "2*mixer"}), ["layers", "mixer"]),
        (dict(encoder={"hidden_size": 32}), ["encoder.hidden_size", "whole model"]),
        (dict(encoder={"leyers": "2*moe"}), ["encoder.leyers", "layers"]),
        (dict(mixer="mamba"), ["mixer", "attention"]),
        (dict(norm_placement="post"), ["norm_placement", "pre"]),
        (dict(dispatch={"expert_capacity": 0}), ["expert_capacity", "0"]),
    ],
)
def test_settings_that_are_not_there_are_named(changes, words):
    with pytest.raises(ConfigError) as error:
        settings("switch", **changes)
    assert all(word in str(error.value) for word in words), error.value


def test_a_source_is_read_once():
    model = EncoderDecoder(settings("switch"))
    for given in ({}, {"source": SOURCE, "cache": {}}):
        with pytest.raises(ValueError, match="source"):
            model(TOKENS, **given)
    with pytest.raises(ValueError, match=r"source.*\[3, L\].*\[2, 7\]"):
        model.init_cache(3, 8, SOURCE)


@pytest.mark.parametrize("name", TINY)
def test_our_own_directory_opens_again(name, tmp_path):
    loaded = Loaded(made(name), settings(name), load_tokenizer("bytes"))
    save(loaded, tmp_path)
    again = load(tmp_path)
    assert again.config == loaded.config
    before, after = P.arrays(loaded.model), P.arrays(again.model)
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_array_equal(before[path], after[path], err_msg=path)
