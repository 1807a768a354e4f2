"""The GPU at hand, asked and used by processes other than the caller's: the caller itself never holds any of the card.

A kernel that nobody has run may end its process, leave the card's context unusable, or never return. So whoever asks
survives all three.
"""

import json
import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
_PROBE = "import jax, json; d = jax.devices()[0]; print(json.dumps([d.platform, d.device_kind]))"
#: errors after which nothing else runs in the process that met them
_FATAL = re.compile(r"CUDA_ERROR_(?!OUT_OF_MEMORY)|CUDA error: (?!out of memory)|cudaError(?!MemoryAllocation)")


def device_kind(command: str, otherwise: str) -> str:
    """The kind of jax's first device. Exits, naming the command and what else there is, where that is no GPU."""
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    platform, kind = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else ("no device", "")
    if platform != "gpu":
        raise SystemExit(f"{command}: needs an NVIDIA GPU, jax finds {platform}: {otherwise}")
    return kind


def environment(cache: str) -> dict[str, str]:
    """For a process that may have all of one card, the first if none is named, and takes no more of it than it needs.
    What jax compiles is kept under the name `cache`.
    """
    given = {
        "CUDA_VISIBLE_DEVICES": "0",
        **os.environ,
        "PYTHONPATH": f"{_ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_CLIENT_MEM_FRACTION": "0.95",
        "JAX_COMPILATION_CACHE_DIR": str(_ROOT / ".jax_cache" / cache),
    }
    given.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)
    return given


def is_fatal(error: str) -> bool:
    """Whether the process that met it can't go on using the card."""
    return bool(_FATAL.search(error))


class Worker:
    """A script that answers each JSON line with one. It is started when it is asked, anew if it is no longer there."""

    def __init__(self, script: str, given: dict[str, str]):
        self.command, self.given = [sys.executable, script, "--worker"], given
        self.process: subprocess.Popen | None = None

    def ask(self, request: Any, timeout_s: float) -> dict[str, Any]:
        """Its answer; or {"raised"} if it died or did not answer, in which case it is ended."""
        if self.process is not None and self.process.poll() is not None:
            self.close(kill=True)
        if self.process is None:
            self._start()
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        try:
            answer = self.answers.get(timeout=timeout_s)
        except queue.Empty:
            self.close(kill=True)
            return {"raised": f"no answer after {timeout_s:g} s"}
        if answer is None:
            code = self.process.wait()
            self.close(kill=True)
            return {"raised": f"ended its process with code {code}"}
        if is_fatal(answer.get("raised", "")):
            self.close(kill=True)
        return answer

    def close(self, kill: bool = False) -> None:
        """Ends the process, at once or when it has read all it was sent."""
        if self.process is None:
            return
        if kill:
            self.process.kill()
        else:
            self.process.stdin.close()
        self.process.wait()
        self.process = None

    def _start(self) -> None:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(self.command, env=self.given, **pipes)
        self.answers: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, args=(self.process.stdout, self.answers), daemon=True).start()

    @staticmethod
    def _read(lines: Any, answers: queue.Queue) -> None:
        for line in lines:
            if line.startswith("{"):
                answers.put(json.loads(line))
        answers.put(None)


def serve(answer: Any) -> None:
    """Answers the lines on stdin, in the worker's process; what `answer` raises becomes {"raised"}."""
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as raised:  # a contender that runs out of memory must not end the others' turn
            reply = {"raised": f"{type(raised).__name__}: {raised}".splitlines()[0][:300]}
        print(json.dumps(reply), flush=True)
