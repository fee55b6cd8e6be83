"""Folders that are written: new ones alone, whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UsageError


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
