"""The terminal view, on made-up responses."""

import pytest

from mlx_dgemma import display
from mlx_dgemma.display import show
from mlx_dgemma.response import GenerationResponse
from tests.helpers import screen

COUNTS = {
    "prompt_tokens": 1, "prompt_tps": 1.0, "generation_tokens": 1, "generation_tps": 1.0, "peak_memory": 0.1,
}  # fmt: skip


class Letters:
    """A tokenizer whose ids are code points."""

    eos_token, pad_token, pad_token_id = None, None, 0

    def decode(self, ids):
        return "".join(map(chr, ids))


def draft(text: str, accepted: int, canvas: int) -> GenerationResponse:
    sure = tuple(i < accepted for i in range(len(text)))
    tokens = tuple(map(ord, text))
    return GenerationResponse(
        is_draft=True, draft_text=text, draft_tokens=tokens, draft_accepted=sure, canvas_index=canvas, **COUNTS
    )


def final(text: str, reasoning: str = "") -> GenerationResponse:
    return GenerationResponse(text=text, reasoning=reasoning, **COUNTS)


@pytest.fixture
def terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "24")
    monkeypatch.setattr(display, "is_terminal", lambda: True)
    return capsys


def test_unsettled_text_is_dimmed(terminal):
    show([draft("abcdef", 2, 0)], Letters(), verbose=False, denoising=True)
    assert "ab\x1b[2mcdef\x1b[0m" in terminal.readouterr().out


@pytest.mark.parametrize("first", ["one two", "one\ntwo three", "a line that is longer than the terminal"])
def test_a_second_canvas_leaves_the_text_of_the_first(terminal, first):
    responses = [
        draft("xxxx\nyy", 3, 0),
        draft("one two", 7, 0),
        final(first),
        draft("zzz\n" * 3, 4, 1),
        final(" more"),
    ]
    assert show(responses, Letters(), verbose=False, denoising=True) == first + " more"
    width = 24
    shown = screen(terminal.readouterr().out)
    expected = first + " more"
    assert shown.replace("\n", "").endswith(expected.replace("\n", "")[-width // 2 :])
    assert "zzz" not in shown and "canvas" not in shown
    if len(first) < width:
        assert shown == expected


def test_drafts_nobody_asked_to_see_are_skipped(capsys):
    assert show([draft("abc", 1, 0), final("abc")], Letters(), verbose=False) == "abc"
    assert capsys.readouterr().out == "abc\n"


def test_thinking_is_set_off(capsys):
    show([final("", "2 + 2"), final("4")], Letters(), verbose=False)
    assert capsys.readouterr().out == "2 + 2\n---\n4\n"
