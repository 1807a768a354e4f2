"""Initial values that only recurrent mixers have."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """The logarithm of U(low, high)."""

    low: float
    high: float

    def __call__(self, rng, shape) -> np.ndarray:
        return np.log(rng.uniform(self.low, self.high, shape)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LogRange:
    """log(1), log(2), ... log(n) along the last axis."""

    def __call__(self, rng, shape) -> np.ndarray:
        return np.broadcast_to(np.log(np.arange(1, shape[-1] + 1)), shape).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class TimeStep:
    """b with softplus(b) log-uniform in [low, high]: the bias of a step size (arXiv 2312.00752, section 3.6)."""

    low: float = 0.001
    high: float = 0.1

    def __call__(self, rng, shape) -> np.ndarray:
        dt = np.exp(rng.uniform(np.log(self.low), np.log(self.high), shape))
        return (dt + np.log(-np.expm1(-dt))).astype(np.float32)
