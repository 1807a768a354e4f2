"""Which published models can be read: the table of docs/checkpoints.md, and the classes that are refused by name.

    python scripts/checkpoint_families.py                       # writes the table from docs/results/families.json
    python scripts/checkpoint_families.py measure [NAME ...]    # tiny models of transformers (extra `parity`)
    python scripts/checkpoint_families.py others                # the mixtures of experts of the installed transformers

A family's row is the first line of its file in moe_zoo/checkpoints/hf/families. What works is measured on the tiny
models of tests/checkpoints/hf: import (the same logits, padding on either side), export (the same tensors, bit by bit,
and the same config.json), cache (a text in pieces is the text in one), sharding (the same logits on 8 simulated
devices).
"""

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/checkpoints/hf")]
DOC, RESULTS = ROOT / "docs/checkpoints.md", ROOT / "docs/results/families.json"
OTHERS = ROOT / "moe_zoo/checkpoints/hf/families/others.py"
COMMAND = "scripts/checkpoint_families.py"
BEGIN, END = f"<!-- made by {COMMAND} -->", "<!-- end -->"
WORKS = ("import", "export", "cache", "sharding")
APART = 2e-4  # as in the tests


def table(results: dict[str, dict[str, Any]]) -> str:
    """The rows, one per file of families, in their order."""
    from moe_zoo.checkpoints.hf.families import MODULES, of_module

    lines = [
        f"| family | class | besides the Llama block | {' | '.join(WORKS)} | logits apart |",
        "|---|---|---|" + "---|" * 5,
    ]
    for module in MODULES:
        found, doc = of_module(module)
        name, _, differs = doc.splitlines()[0].rstrip(".").partition(": ")
        classes = ", ".join(f"`{cls}`" for family in found for cls in family.architectures)
        measured = [r for r in results.values() if r["class"] in {c for f in found for c in f.architectures}]
        works = ["yes" if measured and all(r[what] for r in measured) else "-" for what in WORKS]
        apart = f"{max(r['apart'] for r in measured):.1e}" if measured else "-"
        lines.append(
            " | ".join([f"| {re.sub(r' [(]arXiv [^)]*[)]', '', name)}", classes, differs, *works, f"{apart} |"])
        )
    return "\n".join(lines)


def write_table() -> None:
    """Between the two marks of the page."""
    text = DOC.read_text()
    before, rest = text.split(BEGIN)
    DOC.write_text(f"{before}{BEGIN}\n{table(json.loads(RESULTS.read_text()))}\n{END}{rest.split(END)[1]}")


def measure(name: str) -> dict[str, Any]:
    """What works with the tiny model `name`."""
    import jax
    import references

    import moe_zoo
    from moe_zoo.sharding import MeshConfig, make_mesh

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        expected, ids, mask, counts = (_reference if name in references.TINY else _transformers)(name, folder)
        loaded = moe_zoo.load(folder)
        whole = np.asarray(_logits(loaded, ids, mask))
        apart = np.abs(whole - expected)[counts].max()
        moe_zoo.save_hf(loaded, folder / "out")
        # the first text has no padding
        S = ids.shape[1]
        cache, rows = loaded.model.init_cache(1, S, *([ids[:1]] if loaded.pair else [])), []
        for part in (ids[:1, : S - 2], ids[:1, S - 2 : S - 1], ids[:1, S - 1 :]):
            logits, _, cache = loaded.model(part, cache=cache)
            rows.append(logits)
        mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2), jax.devices()[:8])
        four = lambda rows: np.resize(rows, (4, S))
        many = np.asarray(_logits(moe_zoo.load(folder, mesh=mesh), four(ids), four(mask)))[: len(ids)]
        valid = mask.astype(bool)
        return {
            "class": json.loads((folder / "config.json").read_text())["architectures"][0],
            "import": bool(apart < APART),
            "export": _same(folder, folder / "out", loaded),
            "cache": bool(np.abs(np.concatenate(rows, 1) - whole[:1]).max() < APART),
            "sharding": bool(np.abs(many - whole)[valid].max() < APART),
            "apart": float(apart),
        }


def _logits(loaded, ids, mask):
    """Of a model of two texts that gets one twice."""
    return loaded(ids, mask, *((ids, mask) if loaded.pair else ())).logits


def _transformers(name: str, folder: Path):
    """Saves their model; (its logits, ids, mask, which logits count)."""
    import test_parity
    from families import tiny

    theirs = tiny(name)
    theirs.save_pretrained(folder)
    ids, mask = test_parity.IDS, test_parity.MASK
    counts = mask.astype(bool)
    counts[1] &= name not in test_parity.COUNTS_PADDING
    return test_parity.forward(theirs, ids, mask)[0], ids, mask, counts


def _reference(name: str, folder: Path):
    import references

    references.save(name, folder)
    ids = references.IDS
    return references.logits(name, ids)[0][None], ids[None], np.ones((1, len(ids)), int), np.ones((1, len(ids)), bool)


def _same(one: Path, other: Path, loaded) -> bool:
    """Whether all that is in `one`, but for what nothing reads, is in `other`, and no more."""
    from moe_zoo.checkpoints.hf.safetensors import Files, read_folder

    family = loaded.published.family
    a, b = (Files(family.unpack(read_folder(folder))) for folder in (one, other))
    given, again = (json.loads((folder / "config.json").read_text()) for folder in (one, other))
    computed = family.derived(loaded.config, given)  # as close as two libraries' exponentials
    equal = lambda n: np.allclose(a[n], b[n], rtol=1e-5) if n in computed else np.array_equal(a[n], b[n])
    names = {n for n in a.tensors if n in b.tensors or not any(re.fullmatch(pattern, n) for pattern in family.unused)}
    return given == again and names == b.tensors.keys() and all(a[n].dtype == b[n].dtype and equal(n) for n in names)


def write_results(names: list[str]) -> None:
    """Measures `names` (all if there are none) and keeps what is known of the others."""
    import families
    import jax
    import references

    known = [*families.TINY, *references.TINY]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no tiny model named {unknown[0]!r}; known: {', '.join(known)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or known:
        results[name] = measure(name)
        jax.clear_caches()  # each compiled program takes mappings, of which a process has 65,530
        print(name, results[name], flush=True)
        ordered = {name: results[name] for name in known if name in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


def scan() -> dict[str, str | None]:
    """{class: the nearest that is read, or None} of all mixtures of experts in the installed transformers.

    Nearest: the family whose code its own is built from, by the number of names that it takes over, through other
    unread ones if need be.
    """
    from moe_zoo.checkpoints.hf.families import families

    models = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    read = {name: f.architectures[0] for f in families() for name in f.architectures if "ffn.router.kernel" in f.layer}
    classes, parents = {}, {}
    for path in sorted(models.glob("*/modeling_*.py")):
        text, folder = path.read_text(), path.parent.name
        if re.search("experts", text, re.IGNORECASE):
            found = re.findall(r"^class (\w+(?:ForCausalLM|ForConditionalGeneration))\b", text, re.MULTILINE)
            classes.setdefault(folder, []).extend(found)
    for folder in classes:
        taken = Counter()
        for path in (models / folder).glob("modular_*.py"):
            pattern = r"^from (?:\.\.|\.\.\.models\.)(\w+)\.\w+ import (\([^)]*\)|.*)$"
            for source, names in re.findall(pattern, path.read_text(), re.MULTILINE):
                taken[source] += len(re.findall(r"\w+", names))
        parents[folder] = [source for source, _ in taken.most_common() if source in classes]

    def nearest(folder: str, seen: tuple = ()) -> str | None:
        own = [read[name] for name in classes[folder] if name in read]
        if own:
            return own[0]
        further = [p for p in parents[folder] if p not in (*seen, folder)]
        direct = [p for p in further if any(name in read for name in classes[p])]
        found = (nearest(p, (*seen, folder)) for p in (*direct, *further))
        return next((name for name in found if name), None)

    return {name: nearest(folder) for folder, names in classes.items() for name in names if name not in read}


def write_others() -> None:
    """The file that `find` looks into."""
    import transformers

    rows = "".join(f"    {json.dumps(name)}: {json.dumps(near) if near else None},\n" for name, near in scan().items())
    OTHERS.write_text(
        f'"""What transformers has of mixtures of experts and no family reads; made by `{COMMAND} others`."""\n\n'
        f'TRANSFORMERS = "{transformers.__version__}"\n\n'
        "#: class -> the nearest class that is read; None: none comes near\n"
        f"OTHERS = {{\n{rows}}}\n"
    )


def main() -> None:
    """One of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("table", "measure", "others"), default="table")
    parser.add_argument("names", nargs="*", help="tiny models to measure; all")
    given = parser.parse_args()
    if given.what == "measure":
        flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
        os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
        write_results(given.names)
    if given.what == "others":
        write_others()
    else:
        write_table()


if __name__ == "__main__":
    main()
