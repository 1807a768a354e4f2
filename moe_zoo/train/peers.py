"""Getting the processes of a run together, and noticing when one is lost: one line and exit code 3 in all others.

Every process counts up in jax's coordination service, which process 0 holds; process 0 watches all counters, the others
watch process 0's. The service itself knows of a lost process too, but its way is to abort with a C++ trace, and when
process 0 is lost it does so before anything else can: that abort is caught and said in a line.
"""

import contextlib
import ctypes
import dataclasses
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from moe_zoo.core.registry import ConfigError

_BEAT = 1.0  # seconds between counts
LOST = 3  # exit code of a process whose peers are gone
_RESUME = "the same commands go on from the last checkpoint"
_FATAL = b"JAX distributed service detected fatal errors"
_joined: "Peers | None" = None


@dataclasses.dataclass(frozen=True)
class PeersConfig:
    """`auto`: as the cluster says (TPU pod, SLURM, GKE, Open MPI). Else this is process `process` of `processes`, and
    process 0 is at `coordinator` ("host:port"). Seconds: `connect_timeout` until all must be there, `peer_timeout`
    without a sign of life after which a process is lost.
    """

    auto: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    connect_timeout: int = 300
    peer_timeout: int = 30

    def __post_init__(self):
        by_hand = (self.coordinator, self.processes, self.process)
        if by_hand == (None, None, None):
            return
        if None in by_hand:
            raise ConfigError("--coordinator=HOST:PORT, --processes=N and --process=I go together: all or none")
        if not re.fullmatch(r".+:\d{1,5}", self.coordinator):
            raise ConfigError(f"--coordinator={self.coordinator}: expected HOST:PORT, the address of process 0")
        if self.processes < 1 or not 0 <= self.process < self.processes:
            raise ConfigError(f"--process={self.process} of --processes={self.processes}: expected 0 <= I < N")
        if min(self.connect_timeout, self.peer_timeout) < 1:
            raise ConfigError("--connect-timeout and --peer-timeout: expected at least 1 second")

    @property
    def alone(self) -> bool:
        """Whether this is a run of one process, which connects to nothing."""
        return not self.auto and self.coordinator is None


@contextlib.contextmanager
def joined(config: PeersConfig) -> Iterator[None]:
    """Together with the other processes, which end together or with this one's failure. Nothing in a run of one."""
    global _joined
    if config.alone:
        yield
        return
    _joined = Peers(config)
    _joined.connect()
    try:
        yield
    except BaseException as error:
        _joined.watch.tell(error)
        raise
    _joined.finish()


def end(code: int) -> NoReturn:
    """Exits. After a failure without waiting for a common end, which will not come."""
    if _joined is not None:
        _joined.end(code)
    sys.exit(code)


def exit_code(run: Callable[[], int]) -> int:
    """What `run` returns; 1, after the trace, if it raises what was not expected."""
    try:
        return run()
    except Exception:
        traceback.print_exc()
        return 1


class Peers:
    """The other processes of this run."""

    def __init__(self, config: PeersConfig):
        self._config, self.watch, self._client = config, None, None
        self._log = _RuntimeLog(self._explain)

    def finish(self) -> None:
        """Waits for all to come here."""
        self._client.wait_at_barrier("moe_zoo/end", 24 * 3600 * 1000)
        self.watch.stop()
        self.watch = None

    def end(self, code: int) -> None:
        """Exits if this process fails; else jax's own exit waits for the others."""
        if self.watch is not None:
            self.watch.leave(code)
        self._log.forward(everything=True)

    def connect(self) -> None:
        """Until all are there. Raises ConfigError, or ends the process with a line, if that fails."""
        import jax

        given = self._config
        # its own handler of SIGTERM would take the place of the training loop's, which saves
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                given.coordinator, given.processes, given.process, initialization_timeout=given.connect_timeout,
                heartbeat_timeout_seconds=4 * given.peer_timeout,
            )  # fmt: skip
        except Exception as error:
            if given.auto and "should be defined" in str(error):
                raise ConfigError(
                    "--distributed: no cluster that says who is who (TPU pod, SLURM, GKE, Open MPI) was found here; "
                    "give --coordinator=HOST:PORT --processes=N --process=I"
                ) from error
            where = given.coordinator or "the cluster's coordinator"
            used = "another program has that port: " * (b"Address already in use" in self._log.take())
            raise ConfigError(f"cannot connect to {where}: {used}{' '.join(str(error).split())[:300]}") from error
        from moe_zoo.train.distributed import client

        self._client = client()
        self.watch = _Watch(self._client, jax.process_index(), jax.process_count(), given.peer_timeout, self._log)
        if jax.process_index() > 0:  # process 0 speaks for all
            sys.stdout.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            logging.getLogger("moe_zoo").setLevel(logging.ERROR)

    def _explain(self, text: str) -> tuple[str, int]:
        """(one line, exit code) for what the coordination service said before it aborted."""
        given = self._config
        reason = re.search(r"absl::Status: (.*)", text)
        if self._client is None:
            who = (
                "the cluster" if given.auto else f"process {given.process} of {given.processes} at {given.coordinator}"
            )
            return (
                f"{who}: not all processes came together within {given.connect_timeout} s (--connect-timeout): is the "
                "address that of process 0, can it be reached, and does every process run"
            ), 2
        if "different incarnation" in text:
            return "two processes have the same --process number, or one was started again alone", LOST
        if "Failed to send RPC" in text:
            return _lost("process 0"), LOST
        return _lost(f"a process ({reason[1] if reason else 'unknown'})"), LOST


def _lost(who: str) -> str:
    return f"{who} is gone; {_RESUME}"


class _Watch:
    """Counts for this process, looks at the others' counts."""

    def __init__(self, client, me: int, processes: int, patience: float, log: "_RuntimeLog"):
        self.me = me
        self._client, self._patience, self._log = client, patience, log
        self.watched = range(1, processes) if me == 0 else (0,)
        self._seen = {peer: ("", time.monotonic()) for peer in self.watched}
        self._done = threading.Event()
        for target in (self._count, self._look):
            threading.Thread(target=target, daemon=True).start()

    def stop(self) -> None:
        self._done.set()

    def tell(self, error: BaseException) -> None:
        """Lets the others know that this process fails, and how."""
        self._done.set()  # this process has its own line to print
        from moe_zoo.train.distributed import one_line

        self._say(f"process {self.me} stopped: {one_line(error)}")

    def leave(self, code: int) -> NoReturn:
        """Exits at once; process 0, without which the others could not be told, waits until they know."""
        self._done.set()
        self._briefly(lambda: self._client.key_value_set(f"moe_zoo/left/{self.me}", "1"))
        if self.me == 0:
            gone = {peer for peer, (_, since) in self._seen.items() if time.monotonic() - since > self._patience}
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and len(gone | self._all_left()) < len(self.watched):
                time.sleep(0.1)
        self._log.forward(everything=True)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

    def _all_left(self) -> set[int]:
        keys = self._quietly(lambda: self._client.key_value_dir_get("moe_zoo/left/")) or ()
        return {int(key.rsplit("/", 1)[1]) for key, _ in keys} - {0}

    def _say(self, words: str) -> None:
        # the first to say something is the cause: a key is set once
        self._briefly(lambda: self._client.key_value_set("moe_zoo/failed", words))

    def _briefly(self, call: Callable) -> None:
        """Without an answer from a service that may have stopped, this process ends all the same."""
        attempt = threading.Thread(target=self._quietly, args=(call,), daemon=True)
        attempt.start()
        attempt.join(3)

    def _quietly(self, call: Callable):
        try:
            return call()
        except Exception:  # the service has no type of its own for "not there", "there already" and "unreachable"
            return None

    def _count(self) -> None:
        """Talks to the service, which may take long to answer or never do so."""
        count = 0
        while not self._done.wait(_BEAT):
            count += 1
            counted = f"moe_zoo/alive/{self.me}"
            self._quietly(lambda: self._client.key_value_set(counted, str(count), allow_overwrite=True))  # noqa: B023
            counts = self._quietly(self._counts) or {}
            now = time.monotonic()
            for peer in self.watched:
                if counts.get(peer, self._seen[peer][0]) != self._seen[peer][0]:
                    self._seen[peer] = counts[peer], now
            words = self._quietly(lambda: self._client.key_value_try_get("moe_zoo/failed"))
            if words and not self._done.is_set():
                self._die(words)

    def _counts(self) -> dict[int, str]:
        if self.me:
            return {0: self._client.key_value_try_get("moe_zoo/alive/0")}
        listed = self._client.key_value_dir_get("moe_zoo/alive/")
        return {int(key.rsplit("/", 1)[1]): value for key, value in listed}

    def _look(self) -> None:
        while not self._done.wait(_BEAT):
            now = time.monotonic()
            lost = [str(peer) for peer, (_, since) in self._seen.items() if now - since > self._patience]
            if lost:
                who = f"process{'es' * (len(lost) > 1)} {', '.join(lost[:8])}{', ...' * (len(lost) > 8)}"
                words = f"no sign of life from {who} for {self._patience:g} s; {_RESUME}"
                self._say(words)
                self._die(words)

    def _die(self, words: str) -> NoReturn:
        print(f"error: {words}", file=sys.stderr, flush=True)
        self.leave(LOST)


class _RuntimeLog:
    """What the C++ runtime writes to stderr, a second or two late, so that an abort's trace can be said in a line.

    Python's own stderr is not affected. An abort for any other reason shows everything, and aborts.
    """

    def __init__(self, explain: Callable[[str], tuple[str, int]]):
        self._file = tempfile.TemporaryFile()
        self._real, self._explain = os.dup(2), explain
        self._begin = self._shown = self._waiting = 0
        self._lock = threading.Lock()
        os.dup2(self._file.fileno(), 2)
        sys.stderr = os.fdopen(os.dup(self._real), "w", buffering=1, errors="backslashreplace")
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._abort)
        # Python's own signal handlers run when the main thread comes by, and this one never returns to it
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)
        threading.Thread(target=self._run, daemon=True).start()

    def forward(self, everything: bool = False) -> None:
        """Shows what was there at the last call already."""
        with self._lock:
            end = os.fstat(self._file.fileno()).st_size
            upto = end if everything else self._waiting
            if upto > self._shown:
                os.write(self._real, os.pread(self._file.fileno(), upto - self._shown, self._shown))
                self._shown = upto
            self._waiting = end

    def take(self) -> bytes:
        """What was not shown, and now will not be."""
        text = os.pread(self._file.fileno(), 1 << 20, self._shown)
        self._shown = self._waiting = self._shown + len(text)
        return text

    def _run(self) -> None:
        while True:
            time.sleep(1)
            self.forward()

    def _abort(self, number: int) -> None:
        text = self.take()
        if _FATAL in text:
            line, code = self._explain(text.decode(errors="replace"))
            os.write(self._real, f"error: {line}\n".encode())
            os._exit(code)
        os.write(self._real, text)
        ctypes.CDLL(None).signal(signal.SIGABRT, ctypes.c_void_p(0))
        os.abort()
