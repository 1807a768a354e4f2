"""Our own checkpoints, behind orbax's manager: atomic, asynchronous, readable on another mesh.

workdir/config.json           every setting, defaults written out
workdir/checkpoints/<step>/   params: trainable, frozen, buffers by path
                              train:  optimizer, objective, guard, step, seed
                              meta:   data position of the last consumed batch, seconds trained, versions
"""

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Any

PARAMS = ("trainable", "frozen", "buffers")
_TRAIN = ("opt", "objective", "guard", "step", "seed")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line."""


class Checkpoints:
    """The checkpoints of one work directory."""

    def __init__(self, workdir: str | Path, keep: int = 2):
        # orbax is half a second to import and only runs need it; a relative path would fail silently in its thread
        import orbax.checkpoint as ocp

        # orbax warns of every item that it has not been asked for yet; and of a failed save the first error is raised,
        # the traces of all others would only bury it
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        self._ocp, self.path = ocp, Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.path,
            item_names=("params", "train", "meta"),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def latest(self) -> int | None:
        """The newest step that was completely written, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts writing; returns once the arrays are copied. One save runs at a time."""
        args = self._ocp.args
        # an empty tree leaves no files behind and would not restore
        params = {group: state[group] for group in PARAMS if state.get(group)}
        train = {name: state[name] for name in _TRAIN if name != "objective" or state[name]}
        meta = meta | {"groups": {group: list(state[group]) for group in PARAMS}}
        items = args.Composite(
            params=args.StandardSave(params), train=args.StandardSave(train), meta=args.JsonSave(meta)
        )
        with self._named_errors(f"{self.path / str(step)} cannot be saved"):
            self._manager.save(step, args=items)

    def save_params(self, step: int, groups: dict[str, Any]) -> None:
        """Writes parameters that were not trained here: `restore_params` reads them, there is nothing to resume."""
        params = {group: groups[group] for group in PARAMS if groups.get(group)}
        meta = {"groups": {group: list(groups.get(group, ())) for group in PARAMS}}
        items = self._ocp.args.Composite(params=self._ocp.args.StandardSave(params), meta=self._ocp.args.JsonSave(meta))
        with self._named_errors(f"{self.path / str(step)} cannot be saved"):
            self._manager.save(step, args=items)
        self.wait()

    def restore(self, step: int, abstract: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(state, meta) onto the shardings of `abstract`."""
        args = self._ocp.args
        params = {group: abstract[group] for group in PARAMS if abstract.get(group)}
        train = {name: abstract[name] for name in _TRAIN if name != "objective" or abstract[name]}
        items = args.Composite(
            params=args.StandardRestore(params), train=args.StandardRestore(train), meta=args.JsonRestore()
        )
        older = [s for s in self._manager.all_steps() if s < step]
        hint = f"; to go on from step {max(older)} remove that folder" if older else ""
        with self._named_errors(f"{self.path / str(step)} cannot be restored", hint):
            got = self._manager.restore(step, args=items)
        empty = {group: {} for group in (*PARAMS, "objective")}
        return empty | dict(got.params) | dict(got.train), self._checked(step, got.meta, "seconds", "data")

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as meta, and "groups": {group: [paths]}."""
        args = self._ocp.args
        with self._named_errors(f"{self.path / str(step)} cannot be read"):
            meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore())).meta
        return self._checked(step, meta)

    def _checked(self, step: int, meta: Any, *keys: str) -> dict[str, Any]:
        groups = meta.get("groups") if isinstance(meta, dict) else None
        named = isinstance(groups, dict) and all(
            isinstance(names, list) and all(isinstance(n, str) for n in names) for names in groups.values()
        )
        if not named or any(key not in meta for key in keys):
            raise CheckpointError(
                f"{self.path / str(step) / 'meta'} is damaged: it does not say what a run of ours says"
            )
        return meta

    def restore_params(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The parameters and buffers only, as one dict by path."""
        args = self._ocp.args
        wanted = {group: abstract[group] for group in PARAMS if abstract.get(group)}
        with self._named_errors(f"{self.path / str(step)} cannot be restored"):
            got = self._manager.restore(step, args=args.Composite(params=args.StandardRestore(wanted)))
        return {name: array for group in got.params.values() for name, array in group.items()}

    def wait(self) -> None:
        """Until the last save is on disk; raises what went wrong with it."""
        with self._named_errors(f"a checkpoint in {self.path} could not be saved"):
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _named_errors(self, what: str, hint: str = ""):
        """Whatever orbax and its storage raise, as one line."""
        try:
            yield
        except Exception as error:
            raise CheckpointError(f"{what}: {_first_line(error)}{hint}") from error

    def close(self) -> None:
        self._manager.close()


def _first_line(error: Exception) -> str:
    """The system's own words where it refused something (`No space left on device`), else the first line."""
    text = str(error).strip() or type(error).__name__
    # the storage appends what it knows in brackets, in any order
    code = re.search(r"\[os_error_code='(\d+)'", text)
    return os.strerror(int(code[1])) if code else text.splitlines()[0][:300]
