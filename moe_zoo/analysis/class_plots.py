"""Pictures of a classifier: its accuracy over training.

In the manner of `plots`: plain data and a path in, a PNG out.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_zoo.analysis import plots


def plot_accuracy(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> pathlib.Path:
    """The share of right answers over the steps of training: of batches (faint, and smoothed), of validation.

    Args:
        history: lines of `read_metrics`; those with a step and an accuracy are drawn.
        path: where to write the PNG.
    """
    found = {}
    for kind in ("train", "validation"):
        lines = [line for line in history if line.get("kind") == kind and "accuracy" in line and "step" in line]
        found[kind] = np.array([[line["step"], line["accuracy"]] for line in lines], np.float64).reshape(-1, 2).T
    figure, (axes,) = plots._figure(8.0, 4.6)
    (steps, accuracy), (valid_steps, valid) = found["train"], found["validation"]
    if len(steps):
        axes.plot(steps, accuracy, color=plots._BLUE, alpha=0.22, linewidth=0.8)
        axes.plot(steps, plots._smoothed(accuracy), color=plots._BLUE, linewidth=1.8, label="training")
    if len(valid_steps):
        axes.plot(
            valid_steps, valid, color=plots._ORANGE, linewidth=1.2, marker="o", markersize=4.5, label="validation"
        )
    axes.set(xlabel="steps", ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right", fontsize=9, labelcolor=plots._INK)
    plots._title(axes, "Accuracy over training", plots._run_summary(history))
    return plots._save(figure, path)
