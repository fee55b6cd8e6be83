"""What an interrupted run leaves: its settings and the records so far, JSON lines, from which it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_dgemma.drafter.training.prompts import contents
from mlx_dgemma.errors import InputError

from .records import SCHEMA, Record, as_records, require_schema


def part_of(out: Path) -> Path:
    """Where the records of `out` are until all of them are there."""
    return out.with_name(f"{out.name}.part")


class Part:
    """The records of an unfinished run, beside the file that they shall be; nothing is written before the first.

    Args:
        out: the file.
        settings: of the run.

    Raises:
        InputError: there is one of another run, or what is there is none.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]):
        self.path = part_of(out)
        self._head = json.loads(json.dumps({"schema": SCHEMA, "settings": settings}))  # as it is read back
        self.records: list[Record] = []
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        data = contents(self.path)
        whole = data[: data.rfind(b"\n") + 1]  # a kill may have cut the last line
        with as_records(self.path):
            head, *lines = [json.loads(line) for line in whole.splitlines()] or [self._head]
            require_schema(head, self.path)
            self._require_mine(head["settings"])
            self.records = [Record.of(line) for line in lines]
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def _require_mine(self, settings: Mapping[str, Any]) -> None:
        mine = self._head["settings"]
        other = next((name for name in [*mine, *settings] if mine.get(name) != settings.get(name)), None)
        if other is not None:
            raise InputError(
                f"{self.path}: was begun with {other} {settings.get(other)!r:.160}, not {mine.get(other)!r:.160}; "
                "give it the same command to go on, or delete it to start anew"
            )

    def add(self, record: Record) -> None:
        """Keep a record, whatever comes next."""
        is_new = not self.path.exists() or self.path.stat().st_size == 0
        lines = [self._head, asdict(record)] if is_new else [asdict(record)]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.records.append(record)
