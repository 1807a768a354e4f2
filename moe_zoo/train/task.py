"""What a run learns from and is scored by. The loop asks it, and never whether there is text or images."""

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Int

from moe_zoo.train.config import Config


class Task:
    """The data of one run in its three parts, the batches, the score. It is made before the model: a mistake in the
    data or in what model and data have in common is a ConfigError or DataError here.
    """

    #: what makes text of tokens; None where there is no text
    tokenizer: Any = None
    #: {"train", "validation", "test"}
    parts: dict[str, Any]
    #: hash of all data
    fingerprint: str
    #: tokens that a training step shows the model
    tokens_per_step: int

    def __init__(self, config: Config):
        self.config = config

    def iterator(self, rows: Int[np.ndarray, "R"] | None):
        """Endless training batches with `get_state` and `set_state`; `rows` of each are here, None: all."""
        raise NotImplementedError

    def initial(self) -> dict[str, Any]:
        """What of the data initial values may follow from: arguments of `Trainer.init_state`."""
        return {}

    def line(self, line: dict[str, float]) -> dict[str, float]:
        """What a line of training metrics has more, given its numbers."""
        return {}

    def score(self, model: nnx.Module, part: str, sharding=None, max_rows: int | None = None) -> dict[str, Any]:
        """How good the model is on one part; with `max_rows`, on evenly spaced rows of it."""
        raise NotImplementedError

    def headline(self, score: dict[str, Any]) -> dict[str, float]:
        """The few numbers of a score that are followed during training."""
        raise NotImplementedError

    def summary(self) -> str:
        """One line on the data."""
        raise NotImplementedError

    def final(self, run: dict[str, Any]) -> dict[str, Any]:
        """What the report of a finished run says of it on test data; every process asks."""
        raise NotImplementedError

    def facts(self, run: dict[str, Any]) -> dict[str, Any]:
        """What it says besides, of the first process alone."""
        return {}

    def pictures(self, folder: Path, history: list[dict[str, Any]], report: dict[str, Any]) -> dict[str, str]:
        """{name: path} of the pictures that it draws."""
        return {}
