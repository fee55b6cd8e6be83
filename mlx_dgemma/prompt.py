"""A prompt as the caller has it (text, ids, chat messages) into ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


def encode_prompt(
    tokenizer: TokenizerWrapper, prompt: Prompt, *, chat_template: bool = True, enable_thinking: bool = False
) -> list[int]:
    """Ids of a prompt.

    Args:
        prompt: text (one user turn), chat messages, or token ids, which are used as they are.
        chat_template: False encodes text plainly; so does a tokenizer without a template.
        enable_thinking: passed to the template.

    Raises:
        InputError: an empty prompt, messages of a wrong form, an image.
    """
    if isinstance(prompt, str):
        check_text(prompt)
        if not chat_template or not tokenizer.has_chat_template:
            return list(tokenizer.encode(prompt))
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Iterable) or isinstance(prompt, (bytes, Mapping)):
        raise InputError(f"the prompt must be a string, a list of token ids, or chat messages, not {prompt!r:.80}")
    items = list(prompt)
    if not items:
        raise InputError("the prompt is empty; give at least one token or message")
    if all(isinstance(item, Mapping) for item in items):
        return _encode_messages(tokenizer, items, enable_thinking)
    try:
        return [index(item) for item in items]
    except TypeError:
        raise InputError("the prompt must be a string, a list of token ids, or a list of chat messages") from None


def check_text(prompt: str) -> None:
    """Raise InputError for a prompt that says nothing, or is no text (bytes that a shell let through)."""
    if not prompt.strip():
        raise InputError("the prompt is empty; give it some text")
    try:
        prompt.encode()
    except UnicodeError as error:
        raise InputError(f"the prompt is not text ({error})") from None


def asked(tokenizer: TokenizerWrapper, prompt: Prompt) -> str:
    """What is answered, to be shown: a text, the last user message, or ids decoded."""
    if isinstance(prompt, str):
        return prompt
    items = list(prompt)
    if not all(isinstance(item, Mapping) for item in items):
        return tokenizer.decode(items)
    texts = [_text_of(number, item) for number, item in enumerate(items) if item.get("role") == "user"]
    return texts[-1] if texts else ""


def _encode_messages(
    tokenizer: TokenizerWrapper, messages: list[Mapping[str, Any]], enable_thinking: bool
) -> list[int]:
    if not tokenizer.has_chat_template:
        raise InputError("this tokenizer has no chat template; give the prompt as a string or as token ids")
    messages = [{**message, "content": _text_of(number, message)} for number, message in enumerate(messages)]
    check_text("".join(message["content"] for message in messages))
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=enable_thinking, return_dict=False
        )
    except Exception as error:  # whatever the checkpoint's own template raises
        raise InputError(f"the chat template refuses these messages: {error}") from None
    return list(ids)


def _text_of(number: int, message: Mapping[str, Any]) -> str:
    """The text of a message; content may be a list of text parts."""
    content = message.get("content")
    if "role" not in message or content is None:
        raise InputError(f"message {number} must have 'role' and 'content'")
    if any(message.get(kind) for kind in ("images", "image", "audio", "video")):
        raise InputError(f"message {number} holds an image or other media; only text is supported yet")
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"message {number}: content must be a string or a list of parts, not {content!r:.80}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise InputError(
                f"message {number} holds {kind or 'something other than text'}; only text is supported yet"
            )
        if not isinstance(part.get("text"), str):
            raise InputError(f"message {number} holds a text part without text")
        texts.append(part["text"])
    return "".join(texts)
