"""Pictures of a classifier: its accuracy over training, the depth of an image's tokens.

In the manner of `plots`: plain data and a path in, a PNG out.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import ArrayLike

from moe_zoo.analysis import plots

_DEPTH = LinearSegmentedColormap.from_list("depth", ["#f6f5f1", "#f3b183", "#d55e00", "#6e2600"])


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
    if not any(curve.size for curve in found.values()):
        return plots._save_note(path, "No accuracy was recorded")
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


def plot_patch_depth(
    images_NYX: ArrayLike, depth_NSS: ArrayLike, most: int, path: str | os.PathLike[str]
) -> pathlib.Path:
    """Images, and below each how many blocks its tokens go through, drawn over it: pale for none, dark for `most`.

    Args:
        images_NYX: pixels, `[images, height, width]`.
        depth_NSS: blocks of each token of a grid over the image, `[images, rows, columns]`.
        most: blocks that there are.
        path: where to write the PNG.
    """
    images, depth = np.asarray(images_NYX), np.asarray(depth_NSS)
    if images.ndim != 3 or depth.ndim != 3 or len(images) != len(depth):
        raise ValueError(
            f"expected [images, height, width] and [images, rows, columns], got {images.shape}, {depth.shape}"
        )
    N, (height, width) = len(images), images.shape[1:]
    figure, panels = plots._figure(1.3 * N + 0.7, 3.3, rows=2, columns=N)
    extent = (0, width, height, 0)
    for n in range(N):
        for axes in (panels[n], panels[N + n]):
            axes.imshow(images[n], cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="nearest")
            axes.set_axis_off()
        shown = panels[N + n].imshow(
            depth[n], cmap=_DEPTH, vmin=-0.5, vmax=most + 0.5, alpha=0.7, extent=extent, interpolation="nearest"
        )
    bar = figure.colorbar(shown, ax=panels[N:], ticks=range(most + 1), fraction=0.03, pad=0.01)
    bar.set_label("blocks", color=plots._INK, size=8)
    bar.ax.tick_params(labelsize=7, colors=plots._MUTED, labelcolor=plots._INK, length=0)
    bar.outline.set_visible(False)
    return plots._save(figure, path)
