"""Pictures are whole PNGs of the right size for odd shapes, and put the numbers where they belong."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest

from moe_zoo.analysis import (
    Specialization,
    plot_domain_experts,
    plot_expert_load,
    plot_layer_load,
    plot_loss,
    plot_token_routing,
    plots,
)

_DOMAINS = ["python_code", "reference_prose", "docstrings", "c_headers", "character_names"]


def _history(num_points, shape=(2, 4), validations=True, **extra):
    rng = np.random.default_rng(0)
    history = []
    for step in range(10, 10 * num_points + 1, 10):
        load = rng.dirichlet(np.ones(shape[1]), size=shape[0]).tolist()
        bits = 2.0 + 6.0 / step + 0.05 * rng.normal()
        history.append({"step": step, "kind": "train", "bits_per_byte": bits, "expert_load": load, **extra})
        if validations and step % 50 == 0:
            history.append({"step": step, "kind": "validation", "bits_per_byte": 2.1})
    return history


def _with_tokens(history):
    return [
        line | {"tokens": 512 * line["step"], "seconds": 0.1} if line["kind"] == "train" else line for line in history
    ]


def _size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", data[16:24])


def _check(path, width, height):
    """The picture has this size in inches, is not blank, and nothing is left beside it."""
    from matplotlib.image import imread

    assert _size(path) == (round(150 * width), round(150 * height))
    assert imread(path)[..., :3].std() > 0.01
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    "history",
    [
        _history(60),
        _with_tokens(_history(60)),
        _history(1, validations=False),
        _with_tokens(_history(1, validations=False)),
        _history(7, validations=False),
        [{"step": 5, "kind": "validation", "bits_per_byte": 2.0}],
        [{"step": 5, "kind": "train", "bits_per_byte": float("nan")}, *_history(3)],
        [{"step": 5, "kind": "train"}, {"kind": "config"}, *_history(3)],
    ],
    ids=["steps", "tokens", "one", "one with tokens", "no validation", "validation only", "nan", "other lines"],
)
@pytest.mark.parametrize("baselines", [None, {"gzip -9": 2.3, "xz -9e": 2.0, "unknown": float("nan")}])
def test_loss(tmp_path, history, baselines):
    path = plot_loss(history, tmp_path / "pictures" / "loss.png", baselines)
    assert path == tmp_path / "pictures" / "loss.png"
    _check(path, 8.0, 4.6)


@pytest.mark.parametrize("draw", [plot_loss, plot_expert_load])
def test_nothing_to_draw_is_said(tmp_path, draw):
    _check(draw([], tmp_path / "empty.png"), 6.0, 2.0)


def test_pictures_are_replaced(tmp_path):
    (tmp_path / "loss.png").write_bytes(b"old")
    _check(plot_loss(_history(5), str(tmp_path / "loss.png")), 8.0, 4.6)


def test_validation_lines_get_their_tokens_from_training_lines():
    history = _with_tokens(_history(20))
    x, y = plots._curve(history, "validation")
    np.testing.assert_allclose(x, 512 * np.array([50, 100, 150, 200]))
    np.testing.assert_allclose(y, 2.1)


def test_smoothing_keeps_a_line_and_the_mean_level():
    line = np.linspace(4.0, 2.0, 200)
    np.testing.assert_allclose(plots._smoothed(line)[:190], line[:190])
    np.testing.assert_allclose(plots._smoothed(np.full(3, 2.0)), 2.0)


def test_labels_are_moved_apart_as_little_as_needed():
    np.testing.assert_allclose(plots.spread([0.1, 0.5, 0.9], 0.1), [0.1, 0.5, 0.9])
    np.testing.assert_allclose(plots.spread([0.5, 0.5, 0.9], 0.1), [0.45, 0.55, 0.9])
    np.testing.assert_allclose(plots.spread([0.5, 0.5, 0.5, 0.62], 0.1), np.array([-0.15, -0.05, 0.05, 0.15]) + 0.53)
    assert plots.spread([], 0.1) == []


@pytest.mark.parametrize("num_layers, num_experts, num_points", [(1, 64, 3), (3, 8, 400), (4, 4, 1), (12, 128, 20)])
def test_expert_load(tmp_path, num_layers, num_experts, num_points):
    path = plot_expert_load(_history(num_points, (num_layers, num_experts)), tmp_path / "load.png")
    _check(path, *{1: (8.5, 4.2), 3: (12.2, 4.2), 4: (10.3, 5.6), 12: (13.5, 7.1)}[num_layers])


def test_expert_load_of_layers_that_differ_and_of_an_older_model(tmp_path):
    history = _history(5, (2, 4)) + [{"step": 60, "kind": "train", "expert_load": [[0.5, 0.5], [0.2] * 5, [1.0]]}]
    steps, loads = plots._load_history(history)
    assert steps.tolist() == [60.0] and [load.shape for load in loads] == [(2, 1), (5, 1), (1, 1)]
    np.testing.assert_allclose(np.concatenate(loads), 1.0)
    _check(plot_expert_load(history, tmp_path / "load.png"), 12.2, 4.2)


def test_dead_experts_and_missing_numbers_are_drawn(tmp_path):
    history = [{"step": 1, "kind": "train", "expert_load": [[1.0, 0.0], [float("nan"), float("nan")]]}]
    _size(plot_expert_load(history, tmp_path / "load.png"))


def _used(domains, *tables):
    return Specialization.of(domains, np.ones(len(domains)), list(enumerate(tables)))


@pytest.mark.parametrize(
    "num_layers, num_domains, num_experts", [(1, 1, 4), (1, 5, 64), (5, 5, 8), (2, 5, 128), (18, 3, 16)]
)
def test_domain_experts(tmp_path, num_layers, num_domains, num_experts):
    matrix_LDE = np.random.default_rng(0).integers(0, 100, (num_layers, num_domains, num_experts))
    path = plot_domain_experts(_used(_DOMAINS[:num_domains], *matrix_LDE), tmp_path / "domains.png")
    *_, (width, height) = plots._domain_layout(num_layers, num_domains, num_experts)
    _check(path, width, height)
    assert width < 17 and height < 12


def test_domain_experts_with_empty_rows_long_names_and_sorting(tmp_path):
    matrix_DE = np.zeros((2, 4))
    matrix_DE[0, 1] = 5
    names = ["a_domain_with_a_name_that_would_not_fit_at_all", "never_seen"]
    _size(plot_domain_experts(_used(names, matrix_DE), tmp_path / "domains.png", sort_experts=True))
    assert plots._shortened(names[0]) == "a_domain_with_a…t_at_all"


def test_experts_are_sorted_by_the_domain_that_prefers_them():
    ratio_DE = np.array([[0.1, 2.0, 0.5, 3.0], [1.5, 1.0, 2.5, 0.2]])
    assert plots._by_domain(ratio_DE).tolist() == [3, 1, 2, 0]


def test_domain_experts_of_layers_that_differ_and_of_none(tmp_path):
    saved = _used(["a", "b"], np.eye(2), np.zeros((2, 3)), np.ones((2, 8))).to_dict()
    _size(plot_domain_experts(json.loads(json.dumps(saved)), tmp_path / "domains.png"))
    _check(plot_domain_experts(_used(["a"]), tmp_path / "none.png"), 6.0, 2.0)


def test_importing_the_package_does_not_import_matplotlib():
    code = (
        "import sys, moe_zoo.analysis as analysis; assert 'matplotlib' not in sys.modules; "
        "assert analysis.load_entropy([1, 1]) == 1; assert analysis.mutual_information([[1], [1]]) == 0; "
        "assert 'matplotlib' not in sys.modules; "
        "analysis.plot_loss; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_said():
    import moe_zoo.analysis

    with pytest.raises(AttributeError, match="plot_loss"):
        moe_zoo.analysis.plot_losses  # noqa: B018


@pytest.mark.parametrize("layers, experts", [(1, 2), (2, 8), (24, 128)])
def test_load_of_layers(tmp_path, layers, experts):
    counts = np.random.default_rng(0).integers(0, 50, (layers, experts))
    counts[0] = 0  # a layer that saw nothing
    path = plot_layer_load(counts, tmp_path / "load.png")
    width, height = _size(path)
    _check(path, width / 150, height / 150)
    assert 600 < width < 2200 and 300 < height < 1400


def test_a_brighter_cell_is_where_the_gate_is_larger(tmp_path):
    """Token 0 goes to expert 2 alone and token 1 nowhere: the one dark cell is at the top left of the panel."""
    from matplotlib.image import imread

    experts, gates = np.array([[[2, 3], [3, 3]]]), np.array([[[1.0, 0.5], [0.0, 0.0]]])
    path = plot_token_routing(["a", "$b"], experts, gates, 3, tmp_path / "tokens.png")
    pixels = imread(path)[..., :3]
    dark = np.argwhere(np.abs(pixels - np.array([8, 48, 107]) / 255).max(-1) < 0.02)
    cell = dark[(dark[:, 1] < pixels.shape[1] * 0.8)]  # without the colour bar
    top, left = cell.min(0)
    bottom, right = cell.max(0)
    assert (
        len(cell) > 0.9 * (bottom - top) * (right - left)
        and right < pixels.shape[1] * 0.5
        and bottom < pixels.shape[0] * 0.5
    )


def test_routing_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="do not fit"):
        plot_token_routing(["a"], np.zeros((1, 2, 1), int), np.zeros((1, 2, 1)), 3, tmp_path / "x.png")
    with pytest.raises(ValueError, match="layers, experts"):
        plot_layer_load(np.zeros(3), tmp_path / "x.png")
