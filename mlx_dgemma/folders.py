"""Folders that are written: new ones alone, whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UsageError


def require_new(out: Path) -> None:
    """Raise UsageError if `out` exists or its parent does not."""
    if os.path.lexists(out):
        raise UsageError(f"{out}: exists already; remove it or name another folder")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out}: {out.absolute().parent} is not a folder; create it first")


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
