"""Generation with a cache against running the whole model again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import jitted, normal, tiny_model

from moe_zoo.checkpoints import CheckpointError
from moe_zoo.core import param as P
from moe_zoo.data.tokenizer import ByteTokenizer
from moe_zoo.inference import Loaded, generate, load
from moe_zoo.inference.generate import _decode, _prefill, bucket
from moe_zoo.inference.sampling import Sampling, draw

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 32, n) for n in (3, 9, 1)]
N = 10


@pytest.fixture(scope="module")
def model():
    """Routed, with a sliding window; a sharp head, so that no two ids are nearly tied."""
    attention = {"num_attention_heads": 2, "sliding_window": 6}
    made = tiny_model(layers="1*moe", attention=attention, ngram={"orders": [2], "buckets": 32, "init_std": 0.5})
    return P.replace(made, {**P.arrays(made), "head.kernel": normal(0, 16, 32)})


@pytest.fixture(scope="module")
def greedy(model):
    return generate(model, PROMPTS, N, temperature=0.0)


def test_greedy_text_is_that_of_running_the_whole_model_for_every_token(model, greedy):
    forward = jitted(model, lambda m, t: m(t)[0])
    rows = np.zeros((3, 24), np.int32)
    lengths = [len(p) for p in PROMPTS]
    for row, prompt in enumerate(PROMPTS):
        rows[row, : len(prompt)] = prompt
    for _ in range(N):
        logits = np.asarray(forward(jnp.asarray(rows)))
        for b in range(3):
            rows[b, lengths[b]] = logits[b, lengths[b] - 1].argmax()
            lengths[b] += 1
    for b, new in enumerate(greedy):
        np.testing.assert_array_equal(new, rows[b, len(PROMPTS[b]) : lengths[b]])


def test_a_prompt_alone_gives_the_same_as_in_a_ragged_batch(model, greedy):
    for prompt, new in zip(PROMPTS, greedy):
        np.testing.assert_array_equal(generate(model, [prompt], N, temperature=0.0)[0], new)
    assert len({tuple(new) for new in greedy}) == 3


def test_sampled_text_of_a_row_does_not_depend_on_the_rows_beside_it(model):
    others = [PROMPTS[0], RNG.integers(0, 32, 20), RNG.integers(0, 32, 2)]
    a, b = generate(model, PROMPTS, N, seed=3), generate(model, others, N, seed=3)
    np.testing.assert_array_equal(a[0], b[0])
    assert not np.array_equal(a[1], b[1])


def test_a_stop_id_ends_its_own_sequence_and_is_not_returned(model, greedy):
    stop = next(int(t) for t in greedy[1][2:] if t not in greedy[0])
    stopped = generate(model, PROMPTS, N, temperature=0.0, stop_ids=[stop])
    for new, whole in zip(stopped, greedy):
        at = [i for i, token in enumerate(whole) if token == stop]
        np.testing.assert_array_equal(new, whole[: at[0]] if at else whole)
    assert len(stopped[1]) < N == len(stopped[0])


@pytest.mark.parametrize("n", [1, 7])
def test_at_most_the_asked_number_of_tokens_is_returned(model, greedy, n):
    for new, whole in zip(generate(model, PROMPTS, n, temperature=0.0), greedy):
        np.testing.assert_array_equal(new, whole[:n])


def test_the_smallest_nucleus_and_the_top_one_are_greedy(model, greedy):
    for settings in (dict(top_p=1e-6), dict(top_k=1)):
        for new, whole in zip(generate(model, PROMPTS, N, temperature=5.0, **settings), greedy):
            np.testing.assert_array_equal(new, whole)


def test_the_same_seed_gives_the_same_text_and_another_one_does_not(model):
    draw = lambda seed: [new.tolist() for new in generate(model, PROMPTS, N, seed=seed)]
    assert draw(1) == draw(1) != draw(2)


def test_rows_with_equal_prompts_draw_different_text(model):
    a, b, c = generate(model, [PROMPTS[1]] * 3, N, temperature=2.0)
    assert a.tolist() != b.tolist() != c.tolist()


_draw = jax.jit(draw)
LOGITS = np.log(np.array([0.05, 0.4, 0.3, 0.15, 0.1]))


@pytest.mark.parametrize(
    "settings, probabilities",
    [
        (dict(), [0.05, 0.4, 0.3, 0.15, 0.1]),
        (dict(top_k=2), [0, 4 / 7, 3 / 7, 0, 0]),
        (dict(top_p=0.6), [0, 4 / 7, 3 / 7, 0, 0]),
        (dict(top_p=0.8), [0, 0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0]),
        (dict(top_k=3, top_p=0.8), [0, 4 / 7, 3 / 7, 0, 0]),
        (dict(min_p=0.5), [0, 4 / 7, 3 / 7, 0, 0]),
        (dict(min_p=0.3, top_k=4), [0, 0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0]),
        (dict(top_p=0.8, min_p=0.5), [0, 4 / 7, 3 / 7, 0, 0]),
        (dict(top_k=9), [0.05, 0.4, 0.3, 0.15, 0.1]),
        (
            dict(temperature=0.5),
            np.array([0.05, 0.4, 0.3, 0.15, 0.1]) ** 2 / (np.array([0.05, 0.4, 0.3, 0.15, 0.1]) ** 2).sum(),
        ),
        (dict(temperature=0.0), [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_from_the_filtered_distribution(settings, probabilities):
    keys, logits = jax.random.split(jax.random.key(0), 4000), jnp.broadcast_to(jnp.float32(LOGITS), (4000, 5))
    drawn = np.bincount(_draw(keys, logits, Sampling(**settings).arrays(5)), minlength=5) / 4000
    np.testing.assert_allclose(drawn, probabilities, atol=0.03)
    assert not drawn[np.asarray(probabilities) == 0].any()


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(prompts=[PROMPTS[0], np.array([], int)]), ["empty prompt"]),
        (dict(max_new_tokens=0), ["max_new_tokens"]),
        (dict(temperature=-1.0), ["temperature", "-1.0"]),
        (dict(top_p=0.0), ["top_p"]),
        (dict(top_p=1.5), ["top_p", "1.5"]),
        (dict(top_k=0), ["top_k"]),
        (dict(min_p=1.5), ["min_p", "1.5"]),
        (dict(chunk=17), ["chunk", "17"]),
    ],
)
def test_settings_out_of_range_are_refused(model, settings, words):
    with pytest.raises(ValueError) as error:
        generate(model, **{"prompts": PROMPTS, "max_new_tokens": 3, **settings})
    assert all(w in str(error.value) for w in words)


def test_buckets_are_powers_of_two_and_the_halves_between_them():
    assert [bucket(n) for n in (1, 32, 33, 48, 49, 64, 65, 97, 129)] == [32, 32, 48, 48, 64, 64, 96, 128, 192]
    assert all(n <= bucket(n) <= max(32, 1.5 * n) for n in range(1, 500))


def test_another_length_of_the_same_bucket_and_other_settings_compile_nothing(model, greedy):
    count = lambda: (_prefill._cache_size(), _decode._cache_size())
    before = count()
    prompts = [RNG.integers(0, 32, n) for n in (17, 2, 30)]
    for settings in (
        dict(top_k=3),
        dict(temperature=0.5, top_p=0.7, min_p=0.1, seed=8),
        dict(stop_ids=[3, 4], chunk=2),
    ):
        generate(model, prompts, N + 3, **settings)
    assert count() == before
    generate(model, [RNG.integers(0, 32, 33)] * 3, N, temperature=0.0)  # what a new bucket costs: one of each
    assert count() == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_tokens_are_handed_out_as_they_come_and_a_row_ends_when_told(model, greedy, chunk):
    heard, most = {0: [], 1: [], 2: []}, []

    def listen(row, ids):
        heard[row] += ids.tolist()
        most.append(len(ids))
        return row == 1 and len(heard[1]) >= 4

    new = generate(model, PROMPTS, N, temperature=0.0, on_tokens=listen, chunk=chunk)
    assert [n.tolist() for n in new] == list(heard.values()) and max(most) == min(chunk, N - 1)
    assert heard[0] == greedy[0].tolist() and heard[2] == greedy[2].tolist()
    assert len(heard[1]) == {1: 4, 3: 4, 16: N}[chunk] and heard[1] == greedy[1][: len(heard[1])].tolist()


def test_it_ends_when_all_sequences_have(model, greedy):
    calls = []
    stops = sorted({int(new[2]) for new in greedy})
    generate(model, PROMPTS, 16, temperature=0.0, stop_ids=stops, on_tokens=lambda row, ids: calls.append(len(ids)))
    assert sum(calls) <= 6


def test_no_prompts_give_no_text(model):
    assert generate(model, [], 3) == []


@pytest.fixture(scope="module")
def loaded():
    made = tiny_model(layers="1*dense", vocab_size=ByteTokenizer.vocab_size)
    return Loaded(made, made.config, ByteTokenizer())


def test_logits_of_a_loaded_model_ignore_padding_on_either_side(loaded):
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    ids = np.where(mask, 0, 77)
    ids[mask == 1] = [5, 6, 7, 5, 6, 7]
    logits = np.asarray(loaded(ids, mask).logits)
    np.testing.assert_allclose(logits[0, 2:], logits[1, :3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "ids, mask, words",
    [
        ([[1.5]], None, ["integers"]),
        ([[264]], None, ["264"]),
        ([[-1]], None, ["-1"]),
        ([[1, 2]], [[1]], ["attention_mask", "[1, 2]", "[1, 1]"]),
    ],
)
def test_a_loaded_model_refuses_what_are_no_ids(loaded, ids, mask, words):
    with pytest.raises(ValueError) as error:
        loaded(ids, mask)
    assert all(w in str(error.value) for w in words)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a run"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {}}')
    with pytest.raises(CheckpointError, match="data"):
        load(tmp_path)
