"""What all commands share: how they end. A user's mistake is one line and a status, never a traceback."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .errors import InputError, UsageError

FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line as well."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_USAGE, f"{self.prog}: {message}; see --help\n")


def run_command(
    command: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse, run, and exit: 2 for bad usage, 1 for a failed run; `--debug` keeps the traceback."""
    args = parser.parse_args(argv)
    try:
        status = command(args)
    except BrokenPipeError:
        status = FAILED
    except (InputError, OSError, MemoryError) as error:
        if getattr(args, "debug", False):
            raise
        print(f"{parser.prog}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        status = BAD_USAGE if isinstance(error, UsageError) else FAILED
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would cut off the line
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    if not _is_read():
        status = status or FAILED
    if status:
        sys.exit(status)


def _is_read() -> bool:
    """Whether whoever reads what was printed took all of it; else, as behind `head`, the rest goes nowhere."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def use_device(name: str | None) -> None:
    """Run on this device, None: the default one, float32 meaning float32. Raises UsageError if it is not there."""
    os.environ["MLX_ENABLE_TF32"] = "0"  # read when MLX first multiplies
    import mlx.core as mx

    if name == "gpu" and not mx.is_available(mx.gpu):
        raise UsageError("--device gpu: MLX has no GPU here; use --device cpu")
    if name:
        mx.set_default_device(mx.gpu if name == "gpu" else mx.cpu)
