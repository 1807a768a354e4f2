"""Load and specialization against cases computed by hand."""

import json

import numpy as np
import pytest

from moe_zoo.analysis.specialization import Specialization, load_entropy, load_max_over_mean, mutual_information


@pytest.mark.parametrize(
    "counts, max_over_mean, entropy",
    [
        ([5, 5, 5, 5], 1.0, 1.0),
        ([20, 0, 0, 0], 4.0, 0.0),
        ([2, 2, 0, 0], 2.0, 0.5),  # one bit of two
        ([4, 2, 1, 1], 2.0, 1.75 / 2),  # 1/2 * 1 + 1/4 * 2 + 2 * 1/8 * 3 bits of two
        ([7], 1.0, 1.0),
    ],
)
def test_load_of_known_cases(counts, max_over_mean, entropy):
    assert load_max_over_mean(counts) == pytest.approx(max_over_mean, abs=1e-12)
    assert load_entropy(counts) == pytest.approx(entropy, abs=1e-12)
    # Only proportions matter.
    assert load_entropy(np.asarray(counts) / sum(counts)) == pytest.approx(entropy, abs=1e-12)


def test_load_of_several_layers():
    counts_LE = [[5, 5, 5, 5], [20, 0, 0, 0]]
    np.testing.assert_allclose(load_max_over_mean(counts_LE), [1.0, 4.0])
    np.testing.assert_allclose(load_entropy(counts_LE), [1.0, 0.0])


def test_no_tokens_is_nan():
    assert np.isnan(load_max_over_mean([0, 0])) and np.isnan(load_entropy([0, 0])) and np.isnan(load_entropy([0]))
    assert np.isnan(mutual_information([[0, 0], [0, 0]]))


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="-1"):
        load_entropy([1, -1])


@pytest.mark.parametrize(
    "counts, bits",
    [
        ([[10, 10], [10, 10]], 0.0),
        ([[30, 10], [3, 1]], 0.0),  # unequal sizes and loads, but the same in both domains
        ([[8, 0], [0, 8]], 1.0),
        (np.eye(4), 2.0),
        ([[1, 1, 0, 0], [0, 0, 1, 1]], 1.0),  # the expert tells the domain; the domain does not tell the expert
        ([[3, 0], [0, 1]], 0.75 * np.log2(4 / 3) + 0.25 * 2),  # the entropy of the domains
        # p = 3/8, 1/8, 1/8, 3/8 and all the margins 1/2: 2 * 3/8 log2(3/2) + 2 * 1/8 log2(1/2)
        ([[3, 1], [1, 3]], 0.75 * np.log2(1.5) - 0.25),
        ([[5, 3, 2]], 0.0),
    ],
)
def test_mutual_information_of_known_cases(counts, bits):
    assert mutual_information(counts) == pytest.approx(bits, abs=1e-12)
    assert mutual_information(np.transpose(counts)) == pytest.approx(bits, abs=1e-12)


def test_mutual_information_of_several_layers_is_never_negative():
    counts_LDE = np.random.default_rng(0).integers(0, 50, size=(6, 5, 8))
    one_by_one = [mutual_information(counts_DE) for counts_DE in counts_LDE]
    np.testing.assert_allclose(mutual_information(counts_LDE), one_by_one)
    independent = np.outer([0.1, 0.2, 0.7], [0.3, 0.3, 0.4])
    assert mutual_information(independent) >= 0


def test_bias_from_few_tokens_is_as_stated():
    rng = np.random.default_rng(0)
    samples = rng.multinomial(1000, np.full(5 * 8, 1 / 40), size=400).reshape(400, 5, 8)
    assert mutual_information(samples).mean() == pytest.approx(4 * 7 / (2 * 1000 * np.log(2)), rel=0.05)


def test_domains_weigh_alike_and_the_most_possible_is_one():
    table = [[800, 0], [0, 8], [0, 0]]  # the third domain has no tokens and changes nothing
    found = Specialization.of(["big", "small", "none"], [400, 8, 0], [(3, table), (5, np.ones((3, 4)))])
    assert found.layers == (3, 5)
    np.testing.assert_allclose(found.bits, [1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(found.normalised, [1.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(found.experts_per_token[0, :2], [2.0, 1.0])
    # by hand, p = 3/8, 1/8, 1/8, 3/8 whatever the domains' sizes are; two experts and two domains: at most one bit
    uneven = Specialization.of(["a", "b"], [4, 400], [(0, [[3, 1], [100, 300]])])
    np.testing.assert_allclose(uneven.bits, 0.75 * np.log2(1.5) - 0.25)
    np.testing.assert_allclose(uneven.normalised, uneven.bits)
    # four domains, two experts: the expert can tell one bit of two
    halves = Specialization.of("abcd", np.ones(4), [(0, [[1, 0], [1, 0], [0, 1], [0, 1]])])
    np.testing.assert_allclose([halves.bits[0], halves.normalised[0]], 1.0)
    # all domains on one expert say nothing
    np.testing.assert_allclose(Specialization.of("ab", np.ones(2), [(0, [[1, 0], [1, 0]])]).normalised, 0.0)


def test_one_domain_nothing_routed_and_json():
    assert Specialization.of(["a"], [4], [(0, [[3, 1]])]).normalised.tolist() == [0.0]
    empty = Specialization.of(["a", "b"], [0, 0], [(1, np.zeros((2, 3)))])
    assert np.isnan(empty.bits).all() and np.isnan(empty.experts_per_token).all()
    saved = json.loads(json.dumps(empty.to_dict()))
    assert saved["bits"] == [None] and saved["load"] == [[[0.0] * 3] * 2]
    assert Specialization.from_dict(saved).to_dict() == saved
    assert Specialization.of(["a", "b"], [1, 2], []).to_dict()["experts_per_token"] == []
    with pytest.raises(ValueError, match="1 domains"):
        Specialization.of(["a"], [1], [(0, np.ones((2, 3)))])
