"""Numbers for what routers did: how even the load is, and how much an expert's name tells about the domain.

All functions take counts (or shares; only proportions matter) as numpy arrays and reduce the last axes, so that leading
axes such as layers pass through. Where there is no count at all, the answer is NaN rather than a guess.

Dims: `D` domains, `E` experts, `...` any leading axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

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


def mutual_information(matrix_DE: ArrayLike) -> NDArray[np.float64]:
    """Mutual information between domain and expert, in bits.

    `I = sum_{d,e} p(d,e) log2(p(d,e) / (p(d) p(e)))` with `p(d,e)` the counts over their total. 0 means that every
    domain uses the experts alike; the most it can be is `min(H(domain), H(expert))`, where the expert gives the domain
    away (or the other way round). Domains weigh as much as they have counts: pass shares to weigh them alike.

    Estimated from N counts, it is too high by about `(D-1)(E-1) / (2 N ln 2)` bits (Miller, 1955; more where tokens of
    a document resemble each other): count enough tokens before calling a small number specialization.

    Args:
        matrix_DE: tokens of each domain routed to each expert, `[..., D, E]`.

    Returns:
        `[...]`, in bits.
    """
    p_DE = _normalised(_counts(matrix_DE), axis=(-2, -1))
    independent_DE = p_DE.sum(axis=-1, keepdims=True) * p_DE.sum(axis=-2, keepdims=True)
    return np.maximum(_p_log2_ratio(p_DE, independent_DE).sum(axis=(-2, -1)), 0.0)  # rounding may leave -1e-17


@dataclasses.dataclass(frozen=True)
class Specialization:
    """Which domain used which expert on some text, and how much that says. Domains weigh alike, whatever their sizes.

    Attributes:
        domains: D names.
        layers: L ids of the layers that are routed.
        load: `[L][D][E]` visits of each domain's tokens to each expert, before drops; of Soft MoE, shares of tokens. E
            may differ between layers.
        tokens: D tokens of each domain.
        bits: L, mutual information between domain and expert; NaN where nothing was routed.
        normalised: L, `bits` over the most they could be, `log2 min(D, E)` with D the domains that have tokens: 0 says
            that all domains use the experts alike, 1 that the expert gives the domain away. 0 for a single domain.
        experts_per_token: `[L][D]`, where a domain has no tokens NaN. It differs where a router is dynamic.
    """

    domains: tuple[str, ...]
    layers: tuple[int, ...]
    load: tuple[NDArray[np.float64], ...]
    tokens: NDArray[np.float64]
    bits: NDArray[np.float64]
    normalised: NDArray[np.float64]
    experts_per_token: NDArray[np.float64]

    @classmethod
    def of(cls, domains: Sequence[str], tokens_D: ArrayLike, load: Sequence[tuple[int, ArrayLike]]) -> Specialization:
        """From counts: tokens of each domain, and per routed layer (id, visits `[D, E]`)."""
        tokens_D = _counts(tokens_D)
        tables = tuple(_counts(matrix_DE) for _, matrix_DE in load)
        for matrix_DE in tables:
            if matrix_DE.shape[:1] != (len(domains),) or tokens_D.shape != (len(domains),):
                raise ValueError(
                    f"{len(domains)} domains, but counts of shape {matrix_DE.shape} and tokens of {tokens_D.shape}"
                )
        bits, normalised = zip(*map(_alike, tables), strict=True) if tables else ((), ())
        with np.errstate(invalid="ignore", divide="ignore"):
            each = [matrix_DE.sum(axis=-1) / tokens_D for matrix_DE in tables]
        return cls(
            tuple(domains), tuple(layer for layer, _ in load), tables, tokens_D, np.asarray(bits),
            np.asarray(normalised), np.asarray(each).reshape(len(tables), len(domains)),
        )  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Specialization:
        """From what `to_dict` gave."""
        return cls.of(values["domains"], values["tokens"], list(zip(values["layers"], values["load"], strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON; NaN becomes None."""
        return {
            "domains": list(self.domains),
            "layers": list(self.layers),
            "load": [matrix_DE.tolist() for matrix_DE in self.load],
            **{name: _plain(getattr(self, name)) for name in ("tokens", "bits", "normalised", "experts_per_token")},
        }


def _alike(matrix_DE: NDArray[np.float64]) -> tuple[float, float]:
    """(bits, normalised) with every domain that has visits of the same weight."""
    seen_DE = matrix_DE[matrix_DE.sum(axis=-1) > 0]
    if not len(seen_DE):
        return math.nan, math.nan
    bits = float(mutual_information(_normalised(seen_DE, axis=-1)))
    most = math.log2(min(seen_DE.shape))
    return bits, min(bits / most, 1.0) if most else 0.0


def _plain(array: NDArray[np.float64]) -> list:
    return [_plain(row) if row.ndim else float(row) if np.isfinite(row) else None for row in array]


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
