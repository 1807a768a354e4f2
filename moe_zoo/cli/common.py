"""What all command lines share: config overrides, errors as one line, JSON as the last line."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from moe_zoo.core.registry import ConfigError, nearest


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with the nearest known flag."""

    def error(self, message: str):
        raise ConfigError(message)

    def parse_known(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
        """(arguments, [(key, text)] of the `--config.key=text` overrides)."""
        plain, overrides = [], []
        for argument in argv:
            if argument.startswith("--config."):
                key, equals, text = argument.removeprefix("--config.").partition("=")
                if not equals or not key:
                    raise ConfigError(f"{argument}: expected --config.section.key=value")
                overrides.append((key, text))
            else:
                plain.append(argument)
        arguments, unknown = self.parse_known_args(plain)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
            flag = unknown[0].partition("=")[0]
            raise ConfigError(
                f"unknown argument {unknown[0]!r}{nearest(flag, flags)}; known: {', '.join(flags)}, --config.KEY=VALUE"
            )
        return arguments, overrides


def run(main: Callable[[Sequence[str]], dict[str, Any] | None], argv: Sequence[str] | None = None) -> int:
    """Calls `main(argv)`. Known mistakes end as one line on stderr and exit code 2; an interrupt as 130."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where MODULE:CLASS of one's own is; last, so that it hides nothing
    try:
        main(argv)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _expected(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def say_as_trained(report: dict[str, Any]) -> None:
    """The score of tokens that compete for blocks as in training, if the report has one."""
    if "as_trained" in report:
        seen = report["as_trained"]["bits_per_byte"]["overall"]
        print(f"tokens that compete as in training, which sees the future: {seen:.3f} bits per byte")


def print_json(result: dict[str, Any]) -> None:
    """One line, the last that a command prints."""
    print(json.dumps(result), flush=True)


def _expected(error: Exception) -> bool:
    """ConfigError always; the others only if their modules were imported, since importing them here costs seconds."""
    names = [
        ("moe_zoo.data.errors", "DataError"),
        ("moe_zoo.checkpoints.native", "CheckpointError"),
        ("moe_zoo.train.loop", "TrainingError"),
        ("moe_zoo.train.distributed", "PeerError"),
    ]
    known = [getattr(sys.modules[module], name) for module, name in names if module in sys.modules]
    return isinstance(error, (ConfigError, *known))
