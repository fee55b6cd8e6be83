"""The folder in which a training grows: locked, resumed by the same command, gone when the drafter is there.

The answers are what takes longest, and how a drafter is trained on them does not change them: a command
that differs in that alone keeps them. A checkpoint that it would not have come to is left to the user.

.out.partial/
    lock                  held by the process that trains
    run.json              what the training depends on, hashed by part
    answers.jsonl         stage one
    state.safetensors     the latest checkpoint of stage two
    result/               what becomes `out`, from the moment it is whole
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...convert.journal import differing, hashes
from ...errors import InputError, UsageError
from ...folders import require_new, resumable, sync

LOCK, RUN, ANSWERS, STATE, RESULT = "lock", "run.json", "answers.jsonl", "state.safetensors", "result"


class Workspace:
    """An open working folder; see `workspace`."""

    def __init__(self, out: Path, folder: Path):
        self.out, self.folder = out, folder
        self.answers, self.state, self.result = (folder / name for name in (ANSWERS, STATE, RESULT))

    def publish(self, fill: Callable[[Path], None]) -> None:
        """Make the result folder, if it is not there yet, and put it in its place; then nothing else is left."""
        if not self.result.exists():
            growing = self.folder / f"{RESULT}.growing"
            shutil.rmtree(growing, ignore_errors=True)
            growing.mkdir()
            fill(growing)
            for path in growing.iterdir():
                sync(path)
            growing.rename(self.result)
            sync(self.folder)
        self.state.unlink(missing_ok=True)
        self.result.rename(self.out)
        sync(self.out.parent)
        self.answers.unlink(missing_ok=True)
        shutil.rmtree(self.folder)


@contextmanager
def workspace(out: Path, facts: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[Workspace]:
    """The working folder of a training that makes `out`.

    Args:
        facts: what the answers depend on, JSON by part; leftovers that were begun with others are refused.
        training: what the result depends on beside them; a checkpoint of others is refused.

    Raises UsageError: `out` exists, another process or another command is at work there. InputError: the disk.
    """
    out = out.absolute()
    require_new(out)
    folder = out.with_name(f".{out.name}.partial")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); name another --out") from None
    if RUN not in (found := set(os.listdir(folder))) and found - {LOCK, "new-" + RUN}:
        raise UsageError(f"{folder}: is not an unfinished training; remove it or name another --out")
    with (folder / LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: another process is training there; wait for it or stop it") from None
        require_new(out)  # the process that held the lock may just have finished
        work = Workspace(out, folder)
        with resumable(out, folder):
            _begin(work, hashes(facts), hashes(training))
            yield work


def _begin(work: Workspace, facts: dict[str, str], training: dict[str, str]) -> None:
    """Go on with what is there, or begin."""
    path = work.folder / RUN
    begun = _begun(path) if path.exists() else {"answers": facts, "training": training}
    changes = changes_in_words(facts, begun["answers"])
    if changes:
        raise UsageError(
            f"{work.folder}: was begun with other {changes}; give the same again to go on, "
            "or remove that folder, or name another --out"
        )
    changes = changes_in_words(training, begun["training"])
    reached = next((place for place in (work.result, work.state) if place.exists()), None)
    if changes and reached:
        raise UsageError(
            f"{reached}: was trained with other {changes}; give the same again to go on from it, "
            "or remove it to train anew (the answers are kept)"
        )
    if changes or not path.exists():
        said = json.dumps({"answers": facts, "training": training}, indent=1) + "\n"
        write_atomically(path, lambda new: new.write_text(said))


def _begun(path: Path) -> dict[str, dict[str, str]]:
    try:
        begun = json.loads(path.read_text())
        return {part: dict(begun[part]) for part in ("answers", "training")}
    except (ValueError, TypeError, KeyError):
        return {"answers": {}, "training": {}}


def changes_in_words(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """The parts that are not the same; empty if there are none."""
    changes = differing(ours, theirs)
    return " and ".join([", ".join(changes[:-1]), changes[-1]] if changes[1:] else changes)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file that replaces `path` when it is whole and on disk."""
    new = path.with_name("new-" + path.name)
    write(new)
    sync(new)
    os.replace(new, path)
    sync(path.parent)
