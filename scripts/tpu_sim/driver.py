"""Profiles one case for one generation in a subprocess, and makes that subprocess's main program.

python -m tpu_sim MODULE:FUNC --generation v6e [--set name=value ...] [--json OUT]     (from scripts/)
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from tpu_sim import profile
from tpu_sim.generations import GENERATIONS


def profile_case(
    target: str,
    generation: str,
    settings: dict[str, str] | None = None,
    *,
    timeout_s: float = 900,
    limit_s: float = 240,
    keep_dump: str | None = None,
) -> dict:
    """Figures of one case (see profile.py), or {"ok": False, "error": ...}. `limit_s` bounds one simulation."""
    with tempfile.TemporaryDirectory(prefix="tpu_sim_") as folder:
        dump, out = keep_dump or os.path.join(folder, "dump"), os.path.join(folder, "result.json")
        command = [sys.executable, "-m", "tpu_sim", target, "--generation", generation, "--in-process", dump]
        command += ["--json", out, "--limit", str(limit_s)]
        for name, value in (settings or {}).items():
            command += ["--set", f"{name}={value}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=_environment(dump))
        except subprocess.TimeoutExpired:
            return _failure(generation, f"timed out after {timeout_s:g} s")
        if not os.path.exists(out):
            return _failure(generation, f"the compiler's process died: {(done.stderr or done.stdout)[-800:]}")
        return json.loads(Path(out).read_text())


def _failure(generation: str, error: str) -> dict:
    return {"generation": generation, "ok": False, "error": error}


def _environment(dump: str) -> dict[str, str]:
    """The caller's, with its import path, without the flags that are for its CPU devices."""
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    path = os.pathsep.join([p or os.getcwd() for p in sys.path])
    return {**inherited, **profile.environment(dump), "PYTHONPATH": path}


def main() -> None:
    """Profiles the case named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="MODULE:FUNC, described in profile.py")
    parser.add_argument("--generation", required=True, choices=list(GENERATIONS))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an argument of FUNC")
    parser.add_argument("--json", help="write the figures there instead of printing them")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one simulation")
    parser.add_argument("--keep", help="leave the compiler's dump in this folder")
    parser.add_argument("--in-process", metavar="DUMP", help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = dict(s.split("=", 1) for s in args.set)
    if args.in_process:
        figures = _profile_here(args, settings)
    else:
        figures = profile_case(args.target, args.generation, settings, limit_s=args.limit, keep_dump=args.keep)
    text = json.dumps(figures, indent=1, default=str)
    if args.json:
        Path(args.json).write_text(text)
    else:
        print(text)


def _profile_here(args: argparse.Namespace, settings: dict[str, str]) -> dict:
    try:
        return profile.profile(args.target, settings, args.generation, args.in_process, args.limit)
    except Exception as error:  # the parent prints it; the other cases go on
        text = str(error)
        short = text if len(text) <= 900 else f"{text[:600]} ... {text[-300:]}"
        where = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-6:]]
        return {**_failure(args.generation, f"{type(error).__name__}: {short}"), "where": where}
