"""Canvases as lines of characters."""

import pytest

from mlx_dgemma.cells import cells, columns_of, runs, wrapped


class Bytes:
    """A tokenizer whose ids are bytes."""

    pad_token_id = 0

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def lines(text: str, columns: int = 10) -> list[str]:
    return ["".join(c for c, _ in line) for line in wrapped([(c, True) for c in text], columns)]


def test_neighbours_of_one_mark_make_one_character():
    tokens = [*"aé".encode(), 0, 0]
    assert cells(Bytes(), tokens, [False, True, True, True, False]) == [("a", False), ("é", True)]


def test_a_part_of_a_character_is_a_replacement():
    assert cells(Bytes(), list("é".encode()), [True, False]) == [("\ufffd", True), ("\ufffd", False)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0123456789ab", ["0123456789", "ab"]),
        ("a\n\nb", ["a", "", "b"]),
        ("0123456789\nb", ["0123456789", "b"]),
        ("a\x1b[2Jb\x00\r\x7f\ufffe\u202e", ["a[2Jb"]),
        ("a\tb\u00a0c", ["a b c"]),
        ("日本語日本語", ["日本語日本", "語"]),
        ("e\u0301" * 11, ["e\u0301" * 10, "e\u0301"]),
        ("", [""]),
    ],
)
def test_lines_fit_a_grid(text, expected):
    assert lines(text) == expected
    assert all(columns_of(line) <= 10 for line in expected)


def test_runs_are_pieces_of_one_mark():
    assert runs([("a", 1), ("b", 1), ("c", 2)]) == [("ab", 1), ("c", 2)]
