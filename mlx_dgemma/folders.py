"""Folders that are written: new ones alone, whole or not there."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError, UsageError


def expanded(path: str | Path) -> Path:
    """A folder to write, `~` expanded. Raises UsageError for what is no path."""
    if not isinstance(path, str | Path) or not str(path):
        raise UsageError(f"the folder to write must be a path, not {path!r:.80}")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path}: {error}") from None


def require_new(out: Path) -> None:
    """Raise UsageError if `out` exists or its parent does not."""
    try:
        if os.path.lexists(out):
            raise UsageError(f"{out}: exists already; remove it or name another folder")
        if not out.absolute().parent.is_dir():
            raise UsageError(f"{out}: {out.absolute().parent} is not a folder; create it first")
    except OSError as error:
        raise UsageError(f"{str(out)[:200]}: {error.strerror}; name another folder") from None


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that becomes `out` if the block succeeds, and else is removed.

    Raises UsageError as `require_new` does.
    """
    require_new(out)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        work.chmod(0o755)
        yield work
        os.rename(work, out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@contextmanager
def resumable(out: Path, work: Path) -> Iterator[None]:
    """Whatever the disk or Ctrl-C ends, what is done stays in `work`, and that is said."""
    try:
        yield
    except OSError as error:
        reason = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
        raise InputError(f"{out}: {reason}; {what_stays(work)}") from None
    except KeyboardInterrupt:
        print(f"{out}: {what_stays(work)}", file=sys.stderr)
        raise


def what_stays(work: Path) -> str:
    return f"what is done stays in {work}, the same command goes on from there"


def sync(path: Path) -> None:
    """Have a file or a folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
