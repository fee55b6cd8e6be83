"""One generated request with its only right answer, and the split that its content belongs to."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

Message = dict[str, str]  # role, content
# of 32 hashes: test 0-3, validation 4-5, training the rest
TEST, VALIDATION, HASHES = 4, 6, 32


def messages_of(prompt: str | list[Message]) -> list[Message]:
    """A lone prompt is a user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


@dataclass(frozen=True, kw_only=True)
class Example:
    """`keys` are contents that may stand in one split only, the answer's first; `thought` asks for thinking."""

    task: str
    prompt: str | list[Message]
    answer: str
    keys: tuple[str, ...]
    checker: str = "exact"  # of benchmarks/checkers.py
    thought: str | None = None

    @property
    def messages(self) -> list[Message]:
        return messages_of(self.prompt)

    @property
    def split(self) -> str | None:
        """The split of all its contents: `train`, `validation` or `test`; None if they do not agree.

        An example whose answer is held out may show contents of any split in its prompt.
        """
        splits = [split_of(key) for key in self.keys]
        return splits[0] if splits[0] != "train" or set(splits) == {"train"} else None


def split_of(key: str) -> str:
    number = hashlib.sha256(key.encode()).digest()[0] % HASHES
    return "test" if number < TEST else "validation" if number < VALIDATION else "train"
