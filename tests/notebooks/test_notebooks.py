"""Every notebook runs top to bottom, and what is stored with it is what it shows, and small."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from execute import execute  # noqa: E402

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
# What is shown is of more steps of training than the tests have time for.
TRAINING = ("routers_side_by_side", "write_your_own_router", "mixture_of_lora", "mixture_of_depths")
PARAMETERS = dict.fromkeys(TRAINING, {"STEPS": 4})


# slow: those that train compile a step, an evaluation and some forward passes each
marks = lambda path: [pytest.mark.slow] if path.stem in PARAMETERS else []


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=marks(path)) for path in NOTEBOOKS])
def test_a_notebook_runs_and_shows_what_it_did(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored, fresh = json.loads(path.read_text()), json.loads(path.read_text())
    execute(fresh, PARAMETERS.get(path.stem))
    assert len(stored["cells"]) > 5 and path.stat().st_size < 300_000
    for old, new in zip(stored["cells"], fresh["cells"]):
        assert old["source"] == new["source"] and "id" in old
        kinds = lambda cell: [(o["output_type"], sorted(o.get("data", ()))) for o in cell.get("outputs", ())]
        assert kinds(old) == kinds(new)


def code_of(name: str) -> str:
    path = next(p for p in NOTEBOOKS if p.stem == name)
    return "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"])


@pytest.mark.parametrize("name, words", {
    "inspect_released_checkpoint": ("moe_zoo.load(", "replace_router(", "save_hf(", "return_routing=True"),
    "routers_side_by_side": ("moe_zoo.routers()", "router_decision", "train_flops_per_token", "scripts/compare.py"),
    "mixture_of_lora": ("add_adapters(", '"arrow"', '"mole"', "save_adapter(", "plot_domain_experts", "peft.PeftModel"),
    "mixture_of_depths": ("token_depth(", "as_trained()", "flops_per_token(", "scripts/isoflop.py"),
    "write_your_own_router": ("%%writefile my_router.py", "value_and_grad", "make_mesh", "CLAIM"),
}.items())  # fmt: skip
def test_it_is_there_and_shows_what_it_promises(name, words):
    assert all(word in code_of(name) for word in words)
