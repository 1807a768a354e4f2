"""The work directory of a run: made, recognised, locked, and never anyone else's data."""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from moe_zoo.core.registry import ConfigError
from moe_zoo.train.config import RESUMABLE, Config, differences

SETTINGS, _LOCK = "config.json", ".lock"
#: sections that the settings of a run have, and other people's config.json have not
_OURS = ("model", "data", "optim", "train", "corpus")


def prepare_workdir(workdir: Path, config: Config, fingerprint: str, overwrite: bool) -> IO:
    """Makes the directory, or checks that the run in it is the one that `config` describes.

    Returns the open lock, which a process holds as long as it lives. Raises ConfigError, and leaves everything as it
    was, when the directory holds another run (without `overwrite`), something that is not a run of ours, or a run that
    another process is training.
    """
    old = read_run_settings(workdir)
    if old is None and (workdir / "checkpoints").exists():
        raise ConfigError(f"{workdir} has a folder 'checkpoints' but no {SETTINGS}: not a run of ours; use another one")
    if old is not None and not overwrite:
        new = json.loads(json.dumps(config.to_dict() | {"corpus": fingerprint}))
        changed = [line for line in differences(old, new) if not line.startswith(RESUMABLE)]
        if changed:
            raise ConfigError(
                f"{workdir} holds a run with other settings ({'; '.join(changed[:4])}{'; ...' * (len(changed) > 4)}): "
                "use another --workdir, or --overwrite to start again there"
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / _LOCK, "a+")
    except OSError as error:
        raise ConfigError(f"--workdir {workdir}: cannot write there ({error.strerror})") from error
    _acquire(lock, workdir)
    if overwrite:
        for name in ("checkpoints", "tensorboard", "pictures"):
            shutil.rmtree(workdir / name, ignore_errors=True)
        for name in (SETTINGS, "metrics.jsonl", "report.json"):
            (workdir / name).unlink(missing_ok=True)
    return lock


def _acquire(lock: IO, workdir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ConfigError(
            f"{workdir}: another process is training there ({lock.read().strip() or 'unknown'}): stop it, or use "
            "another --workdir"
        ) from None
    except OSError:
        return  # a file system without locks
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
    lock.flush()


def read_run_settings(workdir: Path) -> dict[str, Any] | None:
    """The settings of the run in `workdir`, None if there is none. Raises ConfigError if the file is not ours."""
    path = workdir / SETTINGS
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error})") from error
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): put it back, or use another --workdir") from error
    missing = [section for section in _OURS if not isinstance(settings, dict) or section not in settings]
    if missing:
        raise ConfigError(
            f"{path} is not the settings of a run of ours (no {', '.join(missing)}): use another --workdir; "
            "--overwrite does not touch what is not ours"
        )
    return settings


def write_settings(workdir: Path, config: Config, fingerprint: str) -> None:
    """Every setting, defaults written out. In one piece: a kill leaves the old file or the new one."""
    temporary = workdir / f".{SETTINGS}.{os.getpid()}"
    temporary.write_text(json.dumps(config.to_dict() | {"corpus": fingerprint}, indent=2))
    os.replace(temporary, workdir / SETTINGS)
