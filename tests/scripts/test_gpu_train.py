"""A training step on a GPU, without one: what is counted, compared and written, and what is said where it can't run."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_train  # noqa: E402
import gpu_static  # noqa: E402
import gpu_train  # noqa: E402
import gpu_train_case  # noqa: E402
import gpu_train_page  # noqa: E402
import gpu_train_static  # noqa: E402

OURS = {
    "seconds": [0.2, 0.1, 0.4], "peak_bytes": 40 * 2**30, "first_loss": 10.8, "last_loss": 10.7, "compile_s": 60.0,
    "first_step_s": 2.0, "dense_flops_per_s": 500e12, "total": 1.4e9, "active": 5e8, "flops_per_token": 3e9,
}  # fmt: skip
PEER = OURS | {"seconds": [0.3, 0.5], "peak_bytes": 20 * 2**30}


def row(**sittings) -> dict:
    about = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-01-01", "command": "c", "versions": {"jax": "1"}}
    size = {**vars(gpu_train_case.SIZES["1b"]), "size": "1b"}
    return {**about, "python": "3", **size, "sittings": sittings}


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40", None),
        ("cpu", None),
    ],
)
def test_rate_of_a_device_by_its_name(device, peak):
    assert gpu_train_page.peak_flops(device) == peak


def test_medians_over_all_sittings():
    second = OURS | {"seconds": [0.25, 0.25], "peak_bytes": 39 * 2**30}
    found = gpu_train_page.summary([OURS, {"raised": "no"}, second], 8192, 3e9, 1e15)
    assert found["step_s"] == 0.25 and found["spread"] == pytest.approx(4)
    assert found["tokens_per_s"] == 8192 / 0.25
    assert found["mfu"] == pytest.approx(8192 * 3e9 / 0.25 / 1e15)
    assert found["peak_bytes"] == 39 * 2**30
    assert gpu_train_page.summary([{"raised": "no"}], 8192, 3e9, None) == {"raised": "no"}


def test_table_of_what_was_measured():
    text = gpu_train_page.measured_section(
        row(ours=[OURS], transformers=[PEER], transformers_compiled=[{"raised": "OutOfMemoryError: a | b"}])
    )
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    mfu = f"{8192 * 3e9 / 0.2 / 989.4e12:.1%}"
    assert cells[1][:4] == ["ours", "200.0", "4.00", "40,960"]
    assert mfu in cells[1] and f"{8192 * 3e9 / 0.2 / 500e12:.1%}" in cells[1] and "40.0" in cells[1]
    assert cells[2][0] == "transformers" and "2.00 x as fast" in cells[2]
    assert cells[3][1].startswith("OutOfMemoryError: a / b")


def test_page_keeps_what_the_other_command_wrote(tmp_path):
    page = tmp_path / "train_gpu.md"
    compiled = {"command": "c", "date": "d", "versions": {}, "python": "3", "rows": []}
    compiled["rows"].append({"size": "1b", "gpu": "h100", "error": "ValueError: no"})
    gpu_train_page.keep({"compiled": compiled}, page)
    assert page.read_text().startswith("# A training step on a GPU: compiled, unmeasured")
    assert "there are no times here" in page.read_text() and "ValueError: no" in page.read_text()
    gpu_train_page.keep({"measured": [row(ours=[OURS])]}, page)
    assert page.read_text().startswith("# A training step on a GPU\n") and "no times here" not in page.read_text()
    assert "## Compiled, unmeasured" in page.read_text() and "| ours | 200.0" in page.read_text()
    assert json.loads(page.with_suffix(".json").read_text())["compiled"] == compiled


def test_rounds_are_waited_for_and_the_first_loss_is_kept(monkeypatch):
    events, losses = [], iter(range(100))

    def step():
        events.append("step")
        return next(losses)

    session = gpu_train.Session(step, lambda loss: events.append("wait"), lambda: events.append("warm"), lambda: 7)
    monkeypatch.setitem(gpu_train.CONTENDERS, "ours", lambda size, on_gpu: session)
    found = gpu_train.sit("ours", gpu_train_case.SIZES["tiny"], rounds=2, steps=3, on_gpu=False)
    warm = ["step"] * gpu_train._WARM_UP + ["wait", "warm"]
    assert events == ["step", "wait", *warm, *(["step"] * 3 + ["wait"]) * 2]
    assert (found["first_loss"], found["last_loss"], found["peak_bytes"]) == (0, gpu_train._WARM_UP + 6, 7)
    assert len(found["seconds"]) == 2


@pytest.mark.parametrize(
    ("command", "found", "message"),
    [
        (["--gpu"], '["cpu", "cpu"]', "bench.py train --gpu: needs an NVIDIA GPU, jax finds cpu: --gpu --tiny"),
        (["--gpu", "--tiny", "--peers", "torch"], "", "no contender 'torch'; known: ours, transformers"),
        (["--gpu-static"], "", "bench.py train --gpu-static: .* not found: needs jax >= 0.12"),
    ],
)
def test_says_what_a_step_needs(command, found, message, monkeypatch):
    answer = subprocess.CompletedProcess([], 0, stdout=f"{found}\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **named: answer)
    monkeypatch.setattr(gpu_static, "_found", lambda module: False)
    parser = argparse.ArgumentParser()
    bench_train.add_train(parser.add_subparsers())
    args = parser.parse_args(["train", *command])
    with pytest.raises(SystemExit, match=message) as raised:
        args.run(args)
    assert "\n" not in str(raised.value)


def test_ours_is_the_published_decoder():
    size = gpu_train_case.SIZES["tiny"]
    trainer = gpu_train_case.our_trainer(size)
    D, F, E, V = size.hidden, size.width, size.experts, size.vocab
    layer = 4 * D * D + 3 * E * D * F + D * E + 4 * D  # attention, experts, router, norms
    counts = gpu_train_case.counted(trainer, size.seq)
    assert counts["total"] == size.layers * layer + 2 * V * D + D
    assert counts["active"] == counts["total"] - size.layers * 3 * (E - size.per_token) * D * F
    model = trainer.config.model
    assert model.dtype == "bfloat16" and model.attention.qk_norm == "full" and not model.router.config.norm_topk_prob


def test_scores_in_a_programs_text():
    size = gpu_train_case.sized("1b", batch=2, seq=512)
    text = """
      %a = f32[2,16,128,512]{3,2,1,0} fusion(%b), bf16[24,1024,512]{2,1,0}
      %c = f32[2,32,512,512]{3,2,1,0} fusion(%b), f32[2,16,1024,512]{3,2,1,0}, bf16[2,16,512,512]{3,2,1,0}
    """
    assert gpu_train_static.attention_arrays(text, size) == {"whole_scores": 0, "block_bytes": 2 * 16 * 128 * 512 * 4}
    whole = gpu_train_static.attention_arrays(text + "f32[2,16,512,512]{3,2,1,0}", size)
    assert whole == {"whole_scores": 1, "block_bytes": 2 * 16 * 512 * 512 * 4}
