"""Published checkpoints in and out.

convert.py inspect DIR                   architecture, experts, parameters, bytes, devices; from the headers alone
convert.py import DIR --out=RUN          a published directory as a run of ours
convert.py export RUN --out=DIR          a run of ours, or a published directory, as one that transformers opens
           --format=moe_zoo              any model, adapters too, as a directory that moe_zoo alone opens
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_zoo.cli import common


def convert(argv: Sequence[str]) -> dict[str, Any]:
    """Does one of the three and returns what it prints with --json."""
    parser = common.Parser(prog="convert", description=__doc__, formatter_class=common.argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["inspect", "import", "export"])
    parser.add_argument("path", help="a run, a published directory, or online a name on the hub")
    parser.add_argument("--out", default=None, help="where to write")
    parser.add_argument("--format", default="hf", choices=["hf", "moe_zoo"], help="of an export: hf, or our own")
    parser.add_argument("--dtype", default=None, choices=["float32", "bfloat16"], help="as it is stored, if not given")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments, overrides = parser.parse_known(argv)
    if overrides:
        raise common.ConfigError("convert.py takes no --config.KEY=VALUE")
    if (arguments.out is None) != (arguments.what == "inspect"):
        raise common.ConfigError("--out: import and export need it, inspect writes nothing")
    if arguments.format != "hf" and arguments.what != "export":
        raise common.ConfigError(f"--format: belongs to export, {arguments.what} reads either")
    if arguments.what == "inspect":
        result = _inspect(arguments.path)
    else:
        export = _export if arguments.format == "hf" else _export_ours
        work = _import if arguments.what == "import" else export
        result = work(arguments.path, Path(arguments.out), arguments.dtype)
    if arguments.json:
        common.print_json(result)
    return result


def _inspect(path: str) -> dict[str, Any]:
    from moe_zoo.checkpoints.hf.inspecting import inspect

    found = inspect(Path(path))
    print(f"{found['architecture']}: layers {found['layers']}, ", end="")
    print(
        f"{found['experts_per_token']} of {found['experts']} experts per token, router {found['router']}"
        if found["experts"] else "no experts"
    )  # fmt: skip
    print(f"parameters  {found['parameters']:,}, active per token {found['active_parameters']:,}")
    types = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in found["bytes_by_type"].items())
    print(f"on disk     {found['bytes'] / 1e9:.2f} GB in {found['files']} files, {found['tensors']} tensors: {types}")
    one = [name for name, count in found["fits"].items() if count == 1]
    print(f"fits on     {', '.join(one) or 'no single device'}")
    more = [f"{count} x {name}" for name, count in found["fits"].items() if count > 1]
    if more:
        print(f"or on       {', '.join(more)}")
    return found


def _import(path: str, out: Path, dtype: str | None) -> dict[str, Any]:
    from moe_zoo.checkpoints import CheckpointError, Checkpoints
    from moe_zoo.core import param as P
    from moe_zoo.core.schema import to_dict
    from moe_zoo.inference import load
    from moe_zoo.train.config import config_from_dict
    from moe_zoo.train.workdir import write_settings

    if out.exists() and any(out.iterdir()):
        raise common.ConfigError(f"--out: {out} is not empty")
    loaded = load(path, dtype=dtype)
    if loaded.tokenizer is None:
        raise CheckpointError(f"{path} has no tokenizer.json that can be read, which a run of ours needs")
    settings = {"model": to_dict(loaded.config), "data": {"tokenizer": loaded.tokenizer_spec}}
    out.mkdir(parents=True, exist_ok=True)
    checkpoints, groups = Checkpoints(out), {"trainable": {}, "frozen": {}, "buffers": {}}
    for name, var in P.flat(loaded.model).items():
        kind = "buffers" if isinstance(var, P.Buffer) else "frozen" if isinstance(var, P.Frozen) else "trainable"
        groups[kind][name] = var.get_value()
    checkpoints.save_params(0, groups)
    checkpoints.close()
    write_settings(out, config_from_dict(settings), fingerprint="")
    print(f"wrote {out}; go on: train.py --config=... --init-from={out} --workdir=...   sample.py --workdir={out}")
    return {"workdir": str(out)}


def _export(path: str, out: Path, dtype: str | None) -> dict[str, Any]:
    from moe_zoo.inference import load, save_hf

    family = save_hf(load(path, dtype=dtype), out)
    print(f"wrote {out}, a {family}; transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}) opens it")
    return {"folder": str(out), "architecture": family}


def _export_ours(path: str, out: Path, dtype: str | None) -> dict[str, Any]:
    from moe_zoo.inference import load, save

    save(load(path, dtype=dtype), out)
    print(f"wrote {out}; moe_zoo.load({str(out)!r}) opens it")
    return {"folder": str(out)}


def main() -> None:
    """The process: parses sys.argv, exits with its code."""
    sys.exit(common.run(convert))
