"""Pictures are whole PNGs of the right size for odd shapes, and put the numbers where they belong."""

import struct
import subprocess
import sys

import numpy as np
import pytest

from moe_zoo.analysis import plot_domain_experts, plot_expert_load, plot_loss, plots

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


@pytest.mark.parametrize(
    "num_layers, num_domains, num_experts", [(1, 1, 4), (1, 5, 64), (5, 5, 8), (2, 5, 128), (18, 3, 16)]
)
def test_domain_experts(tmp_path, num_layers, num_domains, num_experts):
    matrix_LDE = np.random.default_rng(0).integers(0, 100, (num_layers, num_domains, num_experts))
    path = plot_domain_experts(matrix_LDE, _DOMAINS[:num_domains], tmp_path / "domains.png")
    *_, (width, height) = plots._domain_layout(num_layers, num_domains, num_experts)
    _check(path, width, height)
    assert width < 17 and height < 12


def test_domain_experts_with_empty_rows_long_names_and_sorting(tmp_path):
    matrix_LDE = np.zeros((1, 2, 4))
    matrix_LDE[0, 0, 1] = 5
    names = ["a_domain_with_a_name_that_would_not_fit_at_all", "never_seen"]
    _size(plot_domain_experts(matrix_LDE, names, tmp_path / "domains.png", sort_experts=True))
    assert plots._shortened(names[0]) == "a_domain_with_a…t_at_all"


def test_experts_are_sorted_by_the_domain_that_prefers_them():
    ratio_DE = np.array([[0.1, 2.0, 0.5, 3.0], [1.5, 1.0, 2.5, 0.2]])
    assert plots._by_domain(ratio_DE).tolist() == [3, 1, 2, 0]


def test_names_must_fit_the_matrix(tmp_path):
    with pytest.raises(ValueError, match="1 domain names"):
        plot_domain_experts(np.ones((1, 2, 4)), ["a"], tmp_path / "domains.png")


def test_importing_the_package_does_not_import_matplotlib():
    code = (
        "import sys, moe_zoo.analysis as analysis; assert 'matplotlib' not in sys.modules; "
        "assert analysis.load_entropy([1, 1]) == 1; assert analysis.specialization.specialization([[1], [1]]) == 0; "
        "assert 'matplotlib' not in sys.modules; "
        "analysis.plot_loss; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_are_said():
    import moe_zoo.analysis

    with pytest.raises(AttributeError, match="plot_loss"):
        moe_zoo.analysis.plot_losses  # noqa: B018
