"""Paths as a report shows them: it is pasted in public, and folders tell of their owner."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

# a slash that begins a path: not one inside of "GB/s", "owner/name" or a web address
ABSOLUTE = re.compile(r"""(?:file://|(?<![\w./~-]))/(?!/)[^\s'"`<>|:;,()\[\]{}]+""")


def scrubbed(text: str) -> str:
    """The home folder as ~, of other absolute paths the last part."""
    home = os.path.expanduser("~").rstrip("/")
    if home:
        text = re.sub(rf"(?:file://)?(?<![\w.]){re.escape(home)}(?![\w.-])", "~", text)
    return ABSOLUTE.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], text)


def shown_name(name: str) -> str:
    """A Hub id as it is; of a folder or a file its own name alone."""
    path = Path(os.path.expanduser(name))
    is_path = path.is_absolute() or path.exists() or name.startswith("../")
    return Path(os.path.realpath(path)).name if is_path else name


def shown_drafter(drafter: str) -> str:
    """The same for the folder in "block:FOLDER"."""
    name, colon, argument = drafter.partition(":")
    return f"{name}{colon}{shown_name(argument)}" if argument else drafter


def shown_command(arguments: Sequence[str]) -> str:
    """A command line as typed, but for folders."""
    return " ".join(map(shlex.quote, map(_shown_argument, arguments)))


def _shown_argument(argument: str) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    shown = shown_drafter(value) if ":" in value else shown_name(value) if value else ""
    return f"{option}{equals}{shown}"
