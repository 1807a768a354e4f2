"""Runs the code cells of a notebook in this process, in order, in one namespace, and keeps what they show."""

import base64
import contextlib
import io
import sys
import types

import flax.nnx  # noqa: F401  it looks for IPython when first imported, and ours is only a stand-in


class Picture:
    """What `IPython.display.Image(bytes)` is to a notebook."""

    def __init__(self, data: bytes, **how):
        self.data = data


def execute(notebook: dict) -> dict:
    """Fills in the outputs and returns the namespace. Errors pass through, with the cell's number as file name."""
    namespace, shown = {"__name__": "__main__"}, []
    display = types.ModuleType("IPython.display")
    display.Image, display.display = Picture, shown.append
    ipython = types.ModuleType("IPython")
    ipython.version_info, ipython.get_ipython = (9, 0), lambda: None  # matplotlib asks
    modules = {"IPython": ipython, "IPython.display": display}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for number, cell in enumerate(codes, 1):
            shown.clear()
            said = io.StringIO()
            with contextlib.redirect_stdout(said):
                exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
            cell["execution_count"], cell["outputs"] = number, _outputs(said.getvalue(), shown)
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
    return namespace


def _outputs(text: str, shown: list[Picture]) -> list[dict]:
    lines = text.splitlines(keepends=True)
    outputs = [{"name": "stdout", "output_type": "stream", "text": lines}] if text else []
    for picture in shown:
        data = {"image/png": base64.b64encode(picture.data).decode(), "text/plain": ["<picture>"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return outputs
