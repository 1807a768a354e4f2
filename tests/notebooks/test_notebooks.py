"""Every notebook runs top to bottom, and what is stored with it is what it shows, and small."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from execute import execute  # noqa: E402

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_and_shows_what_it_did(path):
    stored, fresh = json.loads(path.read_text()), json.loads(path.read_text())
    execute(fresh)
    assert len(stored["cells"]) > 5 and path.stat().st_size < 300_000
    for old, new in zip(stored["cells"], fresh["cells"]):
        assert old["source"] == new["source"] and "id" in old
        kinds = lambda cell: [(o["output_type"], sorted(o.get("data", ()))) for o in cell.get("outputs", ())]
        assert kinds(old) == kinds(new)


def test_the_released_checkpoint_notebook_is_there_and_changes_what_it_says():
    path = next(p for p in NOTEBOOKS if p.stem == "inspect_released_checkpoint")
    code = "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"])
    assert all(word in code for word in ("moe_zoo.load(", "replace_router(", "save_hf(", "return_routing=True"))
