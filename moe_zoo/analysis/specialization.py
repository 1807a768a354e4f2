"""Numbers for what routers did: how even the load is, and how much an expert's name tells about the domain.

All functions take counts (or shares; only proportions matter) as numpy arrays and reduce the last axes, so that leading
axes such as layers pass through. Where there is no count at all, the answer is NaN rather than a guess.

Dims: `D` domains, `E` experts, `...` any leading axes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def load_max_over_mean(counts_E: ArrayLike) -> NDArray[np.float64]:
    """The busiest expert's load as a multiple of an even share: `max_e c_e / (sum_e c_e / E)`.

    1 is perfect balance and `E` is everything on one expert. A capacity factor below this number drops tokens.

    Args:
        counts_E: tokens routed to each expert, `[..., E]`.

    Returns:
        `[...]`, between 1 and `E`.
    """
    counts_E = _counts(counts_E)
    with np.errstate(invalid="ignore"):
        return counts_E.max(axis=-1) / counts_E.mean(axis=-1)


def load_entropy(counts_E: ArrayLike) -> NDArray[np.float64]:
    """Entropy of the load, normalised to [0, 1]: `-sum_e p_e log p_e / log E` with `p_e = c_e / sum_e c_e`.

    1 is perfect balance, 0 is everything on one expert. A single expert is in balance by definition.

    Args:
        counts_E: tokens routed to each expert, `[..., E]`.

    Returns:
        `[...]`, between 0 and 1.
    """
    counts_E = _counts(counts_E)
    num_experts = counts_E.shape[-1]
    p_E = _normalised(counts_E, axis=-1)
    if num_experts == 1:
        return p_E[..., 0]
    return np.clip(-_p_log2_ratio(p_E, np.ones_like(p_E)).sum(axis=-1) / np.log2(num_experts), 0.0, 1.0)


def specialization(matrix_DE: ArrayLike) -> NDArray[np.float64]:
    """Mutual information between domain and expert, in bits.

    `I = sum_{d,e} p(d,e) log2(p(d,e) / (p(d) p(e)))` with `p(d,e)` the counts over their total. 0 means that every
    domain uses the experts alike; the most it can be is `min(H(domain), H(expert))`, where the expert gives the domain
    away (or the other way round). Domains weigh as much as they have counts: pass shares to weigh them alike.

    Estimated from N counts, it is too high by about `(D-1)(E-1) / (2 N ln 2)` bits (Miller, 1955): count enough tokens
    before calling a small number specialization.

    Args:
        matrix_DE: tokens of each domain routed to each expert, `[..., D, E]`.

    Returns:
        `[...]`, in bits.
    """
    p_DE = _normalised(_counts(matrix_DE), axis=(-2, -1))
    independent_DE = p_DE.sum(axis=-1, keepdims=True) * p_DE.sum(axis=-2, keepdims=True)
    return np.maximum(_p_log2_ratio(p_DE, independent_DE).sum(axis=(-2, -1)), 0.0)  # rounding may leave -1e-17


def _counts(counts: ArrayLike) -> NDArray[np.float64]:
    counts = np.asarray(counts, np.float64)
    if (counts < 0).any():
        raise ValueError(f"counts must not be negative, the lowest is {counts.min()}")
    return counts


def _normalised(counts: NDArray[np.float64], axis) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(axis=axis, keepdims=True)


def _p_log2_ratio(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """`p log2(p/q)`, with its limit 0 at p = 0; NaN stays NaN."""
    zero = p == 0
    return np.where(zero, 0.0, p * np.log2(np.where(zero, 1.0, p) / np.where(zero, 1.0, q)))
