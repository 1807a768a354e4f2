"""docs/results/train_gpu.md: what `bench.py train --gpu` measured and `--gpu-static` compiled, as tables.

The page is made from the rows beside it (.json), of which either command writes its own part.
"""

import dataclasses
import json
import re
import statistics
from pathlib import Path
from typing import Any

from gpu_train_case import SIZES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "train_gpu.md"
#: dense bfloat16 FLOPs per second by NVIDIA's data sheets, by what the device's name has in it; the first one counts
_PEAKS = {
    "GH200": 989.4e12, "H200 NVL": 835.5e12, "H200": 989.4e12, "H100 NVL": 835.5e12, "H100 PCIe": 756e12,
    "H100": 989.4e12, "A100": 312e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12,
}  # fmt: skip
_GIB = 2**30
OURS = "ours"


def peak_flops(device: str) -> float | None:
    """Dense bfloat16 FLOPs per second of a device by its name; None if it is not in the table."""
    return next((peak for name, peak in _PEAKS.items() if re.search(rf"\b{name}\b", device)), None)


# --- what was measured -----------------------------------------------------------------------------------------------


def summary(sittings: list[dict], tokens: int, flops_per_token: float, peak: float | None) -> dict[str, Any]:
    """Over all sittings of a contender: {"step_s", "spread", "tokens_per_s", "flops_per_s", "mfu", "peak_bytes",
    "first_loss"}, or {"raised"}. `spread`: the slowest round over the fastest.
    """
    done = [s for s in sittings if "seconds" in s]
    if not done:
        return {"raised": sittings[-1]["raised"] if sittings else "not run"}
    rounds = [seconds for s in done for seconds in s["seconds"]]
    step_s = statistics.median(rounds)
    rate = tokens * flops_per_token / step_s
    peaks = [s["peak_bytes"] for s in done if s["peak_bytes"]]
    return {
        "step_s": step_s, "spread": max(rounds) / min(rounds), "tokens_per_s": tokens / step_s, "flops_per_s": rate,
        "mfu": rate / peak if peak else None, "peak_bytes": min(peaks, default=None),
        "first_loss": done[0]["first_loss"], "first_step_s": done[0]["compile_s"] + done[0]["first_step_s"],
    }  # fmt: skip


def measured_section(row: dict[str, Any]) -> str:
    """Heading, conditions and table of one size."""
    of_ours = next((s for s in row["sittings"].get(OURS, []) if "seconds" in s), {})
    peak, dense, flops = peak_flops(row["device"]), of_ours.get("dense_flops_per_s"), of_ours.get("flops_per_token", 0)
    tokens = row["batch"] * row["seq"]
    found = {name: summary(sittings, tokens, flops, peak) for name, sittings in row["sittings"].items()}
    lines = ["contender", "ms a step", "slowest / fastest", "tokens/s", "ours is", "MFU", "of the dense product",
             "peak GiB", "first loss", "s to the end of the first step"]  # fmt: skip
    table = [lines, *(_measured_cells(name, f, found.get(OURS, {}), dense) for name, f in found.items())]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    size = "{total:.3g} parameters, {active:.3g} per token; ".format(**of_ours) if flops else ""
    ceiling = f"{peak / 1e12:.0f} TFLOP/s (data sheet)" if peak else "not in the table of data sheets"
    product = f"; a product of large matrices in our process: {dense / 1e12:.3g}" if dense else ""
    return "\n".join(
        [
            f"## {row['size']}, {row['device']}: measured",
            "",
            f"    {row['command']}",
            "",
            f"{row['date']}, Python {row['python']}, {versions}. {row['batch']} x {row['seq']} tokens a step, "
            f"{_decoder(row)}; {size}dense bfloat16 rate: {ceiling}{product}.",
            "",
            markdown(table),
        ]
    )


def _measured_cells(name: str, found: dict, ours: dict, dense: float | None) -> list[str]:
    if "raised" in found:
        return [name, found["raised"][:120].replace("|", "/"), *[""] * 8]
    shown = lambda value, form: "" if not value else form.format(value)
    faster = f"{found['step_s'] / ours['step_s']:.2f} x as fast" if "step_s" in ours and name != OURS else ""
    rate, gib = found["flops_per_s"], (found["peak_bytes"] or 0) / _GIB
    return [
        name, f"{found['step_s'] * 1e3:.1f}", f"{found['spread']:.2f}", f"{found['tokens_per_s']:,.0f}", faster,
        shown(rate and found["mfu"], "{:.1%}"), shown(rate and dense and rate / dense, "{:.1%}"), shown(gib, "{:.1f}"),
        f"{found['first_loss']:.3f}", f"{found['first_step_s']:.0f}",
    ]  # fmt: skip


def _decoder(row: dict[str, Any]) -> str:
    return (
        f"{row['layers']} layers, D {row['hidden']}, {row['heads']} heads, {row['experts']} experts top-"
        f"{row['per_token']} of width {row['width']}, vocabulary {row['vocab']} (shapes of {row['like']})"
    )


# --- what was compiled -----------------------------------------------------------------------------------------------


def compiled_section(compiled: dict[str, Any]) -> str:
    """The same of `--gpu-static`: {"command", "date", "versions", "python", "rows"}."""
    columns = ["size, GPU", "parameters (per token)", "tokens", "state GiB", "scratch GiB", "peak GiB", "of the card",
               "our launches", "XLA's", "registers", "bytes spilled", "largest block of scores", "[.., S, S]",
               "compile s"]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in compiled["versions"].items())
    names = dict.fromkeys(row["size"] for row in compiled["rows"])
    return "\n".join(
        [
            "## Compiled, unmeasured",
            "",
            f"    {compiled['command']}",
            "",
            f"{compiled['date']}, Python {compiled['python']}, {versions}, no GPU.",
            "",
            *(f"- {name}: {_decoder(dataclasses.asdict(SIZES[name]))}" for name in names),
            "",
            markdown([columns, *map(_compiled_cells, compiled["rows"])]),
        ]
    )


def _compiled_cells(row: dict[str, Any]) -> list[str]:
    name = f"{row['size']}, {row['gpu']}"
    if "error" in row:
        return [name, row["error"][:120].replace("|", "/"), *[""] * 12]
    gib = lambda size: f"{size / _GIB:.1f}"
    return [
        name, f"{row['total'] / 1e9:.2f} ({row['active'] / 1e9:.2f}) billion", f"{row['batch']} x {row['seq']}",
        gib(row["state_bytes"]), gib(row["scratch_bytes"]), gib(row["peak_bytes"]),
        f"{row['peak_bytes'] / row['card_bytes']:.0%}", str(row["our_kernels"]), str(row["xla_kernels"]),
        str(row["registers"]), str(row["spilled_bytes"]),
        f"{row['block_bytes'] / 2**20:.0f} MiB" if row["block_bytes"] else "none",
        str(row["whole_scores"]), f"{row['compile_s']:.0f}",
    ]  # fmt: skip


# --- the page --------------------------------------------------------------------------------------------------------


def keep(part: dict[str, Any], page: Path) -> None:
    """Writes "measured" or "compiled" into the rows beside the page, and the page."""
    rows = page.with_suffix(".json")
    known = json.loads(rows.read_text()) if rows.exists() else {}
    known |= part
    rows.write_text(json.dumps(known, indent=1) + "\n")
    page.write_text(text(known))


def text(known: dict[str, Any]) -> str:
    """The page of these rows."""
    measured = known.get("measured", [])
    title = "# A training step on a GPU" + ("" if measured else ": compiled, unmeasured")
    sections = [title, _HOW, *map(measured_section, measured)]
    if not measured:
        sections.append("**No step has run on a GPU: there are no times here.** The first command above takes them.")
    if "compiled" in known:
        sections += [compiled_section(known["compiled"]), _COMPILED]
    return "\n\n".join(sections) + "\n"


def markdown(table: list[list[str]]) -> str:
    """A table of which the first line is the heading."""
    head, *rows = ("| " + " | ".join(cells) + " |" for cells in table)
    return "\n".join([head, "|" + "---|" * len(table[0]), *rows])


_HOW = """\
    python scripts/bench.py train --gpu                # on a machine with an NVIDIA GPU: this page, anew
    python scripts/bench.py train --gpu --tiny         # the same at a tiny size, on a CPU
    python scripts/bench.py train --gpu-static --sizes 1b,2b

A whole training step in bfloat16 with AdamW and clipped gradients: ours, as the training loop takes it, beside
`OlmoeForCausalLM` of transformers with `grouped_mm` experts, torch's fused AdamW and scaled-dot-product attention, as
it is and through `torch.compile`. One published configuration says what both build (`scripts/gpu_train_case.py`). Ours
keeps weights, gradients and moments in float32 and counts the routers' losses; transformers keeps all in bfloat16 and
counts none. Each contender is a process of its own that has the card to itself; they sit down in turn and once more
the other way round; medians over all rounds. MFU: FLOPs of the model, none recomputed, half of attention's square,
over the data sheet's dense bfloat16 rate; beside it over the rate of a large matrix product in the same run.

Measuring needs jax with CUDA, flax, optax and jaxtyping; torch with CUDA and transformers >= 5 for the peers. Neither
grain nor ml-collections nor tokamax is imported."""

_COMPILED = """\
Made by XLA for a device that is described in text (`scripts/gpu_static.py`), our "pallas_gpu" kernels in it. State:
weights, two moments, batch. Scratch: the step's own arrays, gradients among them. Peak: both at their highest together.
Launches are those in the program's text, a loop's body once (four layers); registers and spilled bytes the largest of
all our kernels, by ptxas. Attention: the largest array of scores of a block of queries to all keys of every head, and
how many arrays of all S x S scores there are."""
