"""Runs the code cells of a notebook in this process, in order, in one namespace, and keeps what they show.

`python tests/notebooks/execute.py notebooks/NAME.ipynb ...` runs them in an empty folder and stores what they show.
"""

import base64
import contextlib
import io
import json
import os
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.nnx  # noqa: F401  it looks for IPython when first imported, and ours is only a stand-in
import PIL.Image


class Picture:
    """What `IPython.display.Image(bytes)` is to a notebook."""

    def __init__(self, data: bytes, **how):
        self.data = data


def execute(notebook: dict, parameters: Mapping[str, Any] | None = None) -> dict:
    """Fills in the outputs and returns the namespace. Errors pass through, with the cell's number as file name.

    `parameters` take the place of what the cell with the tag "parameters" sets. As in a kernel, modules are found in
    the working directory, and `%%writefile NAME` puts a cell there.
    """
    namespace, shown = {"__name__": "__main__"}, []
    display = types.ModuleType("IPython.display")
    display.Image, display.display = Picture, shown.append
    ipython = types.ModuleType("IPython")
    ipython.version_info, ipython.get_ipython = (9, 0), lambda: None  # matplotlib asks
    modules = {"IPython": ipython, "IPython.display": display}
    with _as_it_was():
        sys.modules.update(modules)
        sys.path.insert(0, os.getcwd())
        codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for number, cell in enumerate(codes, 1):
            shown.clear()
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                _run("".join(cell["source"]), f"cell {number}", namespace)
            if "parameters" in cell["metadata"].get("tags", ()):
                unknown = set(parameters or ()) - set(namespace)
                assert not unknown, f"the notebook sets no {unknown}"
                namespace.update(parameters or {})
            cell["execution_count"], cell["outputs"] = number, _outputs(said.getvalue(), shown)
    return namespace


def _run(source: str, name: str, namespace: dict) -> None:
    magic, _, rest = source.partition("\n")
    if magic.startswith("%%writefile "):
        path = Path(magic.split(maxsplit=1)[1])
        print(f"Overwriting {path}" if path.exists() else f"Writing {path}")
        path.write_text(rest)
    else:
        exec(compile(source, name, "exec"), namespace)


@contextlib.contextmanager
def _as_it_was():
    """Puts back what a notebook changes: the path, the stand-ins, and modules that it wrote."""
    path, modules = list(sys.path), dict(sys.modules)
    try:
        yield
    finally:
        sys.path[:] = path
        here = os.getcwd() + os.sep
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "IPython" or (getattr(module, "__file__", None) or "").startswith(here):
                sys.modules.pop(name)
        sys.modules.update({name: module for name, module in modules.items() if name not in sys.modules})


def _outputs(text: str, shown: list[Picture]) -> list[dict]:
    lines = text.splitlines(keepends=True)
    outputs = [{"name": "stdout", "output_type": "stream", "text": lines}] if text else []
    for picture in shown:
        data = {"image/png": base64.b64encode(picture.data).decode(), "text/plain": ["<picture>"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return outputs


def _smaller(png: str) -> str:
    """The same picture in 128 colours: a third of the size, and hard to tell apart."""
    small = io.BytesIO()
    PIL.Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(128).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def store(path: Path) -> None:
    """Runs the notebook in an empty folder and writes its outputs into it."""
    path = path.absolute()
    notebook = json.loads(path.read_text())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        execute(notebook)
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            if png := output.get("data", {}).get("image/png"):
                output["data"]["image/png"] = _smaller(png)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        store(Path(name))
