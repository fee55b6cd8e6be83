"""The prompts of a training: a file of JSON lines, and which of them are never trained on."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InputError
from ...prompt import encode_prompt

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

ROLES = ("system", "user", "assistant", "model")  # "model" is what Gemma's templates write for "assistant"
FORMS = '{"prompt": "..."} or {"messages": [...]}'


@dataclass(frozen=True)
class PromptLine:
    """A line of the file.

    Attributes:
        where: file name and line, for messages.
        prompt: text or chat messages.
        key: a number in [0, 1) that belongs to the content.
        value: all that the line holds, as parsed.
    """

    where: str
    prompt: str | list[Any]
    key: float
    value: Any


def read(path: Path) -> list[PromptLine]:
    """All prompts of a file. Raises InputError naming the line that is none; empty lines are skipped."""
    return parse(contents(path), path)


def contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def parse(data: bytes, path: Path) -> list[PromptLine]:
    """The prompts of what a file holds; see `read`."""
    data = data.removeprefix(codecs.BOM_UTF8)
    lines = [_line(raw, f"{path}, line {number}") for number, raw in enumerate(data.split(b"\n"), 1) if raw.strip()]
    if not lines:
        raise InputError(f"{path}: holds no prompt; give one a line, {FORMS}")
    return lines


def _line(raw: bytes, where: str) -> PromptLine:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); write {FORMS}") from None
    prompt = _prompt(value, where)
    digest = hashlib.sha256(json.dumps(_plain(prompt), sort_keys=True).encode("utf-8", "surrogatepass")).digest()
    return PromptLine(where, prompt, int.from_bytes(digest[:6], "big") / 2**48, value)


def _prompt(value: Any, where: str) -> str | list[Any]:
    """What is to be answered; a bare JSON string is, too. Further keys, a ready answer among them, are left alone."""
    if isinstance(value, dict):
        if ("prompt" in value) == ("messages" in value):
            raise InputError(f'{where}: must have either "prompt" or "messages"')
        value = value["prompt"] if "prompt" in value else value["messages"]
        if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
            _check_roles(value, where)
            return value
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: not a prompt; write {FORMS}")
    return value


def _plain(prompt: str | list[Any]) -> str | list[Any]:
    """A lone user's turn is the prompt that it holds."""
    alone = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else {}
    is_text = alone.keys() <= {"role", "content"} and alone.get("role", "user") == "user"
    return alone["content"] if is_text and isinstance(alone.get("content"), str) else prompt


def _check_roles(messages: list[dict[str, Any]], where: str) -> None:
    for number, message in enumerate(messages):
        role = message.get("role", "user")  # that there is one, `encode_prompt` requires
        if role not in ROLES:
            raise InputError(f"{where}: message {number}: role must be one of {', '.join(ROLES)}, not {role!r:.80}")


def encode(lines: Sequence[PromptLine], tokenizer: TokenizerWrapper) -> list[list[int]]:
    """Ids of every prompt. Raises InputError naming the line that has none."""
    encoded = []
    for line in lines:
        try:
            encoded.append(encode_prompt(tokenizer, line.prompt))
        except InputError as error:
            raise InputError(f"{line.where}: {error}") from None
    return encoded


def split(lines: Sequence[PromptLine], share: float) -> tuple[list[int], list[int]]:
    """Numbers of the prompts to train on, and of those held out: about `share` of them, at least one if any.

    By content, so that a prompt that stands there twice, or in another file, or is trained on again,
    is always on the same side. Raises InputError if nothing is left to train on.
    """
    bound = share
    if share > 0 and len({line.key for line in lines}) > 1:
        bound = max(share, min(line.key for line in lines))
    held = [number for number, line in enumerate(lines) if share > 0 and line.key <= bound]
    trained = sorted(set(range(len(lines))) - set(held))
    if not trained:
        raise InputError(f"all {len(lines)} prompts are held out; give more, or a smaller --held-out")
    return trained, held
