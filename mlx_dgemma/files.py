"""Files that are written: whole, or left as they were."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UsageError


def require_place(path: Path) -> None:
    """Raise UsageError if a file cannot be written there, or where a link there leads to."""
    target = Path(os.path.realpath(path))
    parent = target.parent
    if not parent.is_dir():
        raise UsageError(f"{path}: {parent} is not a folder; create it first")
    if target.is_dir():
        raise UsageError(f"{path}: is a folder; name a file")
    if os.path.lexists(target) and not target.is_file():  # a device, a pipe, a link in a circle
        raise UsageError(f"{path}: is not a regular file; name another")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{path}: {parent} cannot be written to; name another place")


def write_whole(path: Path, content: str) -> None:
    """Write a text by way of a temporary sibling; a link stays one."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
