"""Pictures of classifiers: written whole, of what they are given."""

import numpy as np
import pytest
from matplotlib.image import imread

from moe_zoo.analysis import plot_accuracy, plot_patch_depth


def test_accuracy_is_drawn_from_lines_that_have_one(tmp_path):
    train = [{"kind": "train", "step": step, "accuracy": step / 10, "seconds": step} for step in range(10)]
    lines = [*train, {"kind": "validation", "step": 9, "accuracy": 0.8}, {"kind": "train", "step": 10, "loss": 1.0}]
    full, fewer = plot_accuracy(lines, tmp_path / "a.png"), plot_accuracy(lines[:-2], tmp_path / "b.png")
    assert (imread(full) != imread(fewer)).any() and plot_accuracy([], tmp_path / "none.png").is_file()


def test_deeper_tokens_are_darker(tmp_path):
    images, depth = np.full((2, 8, 8), 200, np.uint8), np.zeros((2, 2, 2), int)
    pale = imread(plot_patch_depth(images, depth, 4, tmp_path / "pale.png")).astype(float)
    dark = imread(plot_patch_depth(images, depth + 4, 4, tmp_path / "dark.png")).astype(float)
    changed = (pale != dark).any(-1)
    assert changed.mean() > 0.05 and dark[changed].mean() < pale[changed].mean()
    with pytest.raises(ValueError, match="expected two arrays|expected .images"):
        plot_patch_depth(images[0], depth, 4, tmp_path / "c.png")
