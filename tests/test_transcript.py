import random

import pytest
from tokenizers import Tokenizer, decoders, models

from mlx_dgemma.transcript import Transcript

THINK = "<|channel>thought\n2 + 2 = 4<channel|>four"


def feed(nano, text: str, sizes: int, stop=()):
    """Run ids of `text` through a transcript, `sizes` at a time."""
    tokenizer = nano[1]
    ids = tokenizer.encode(text, add_special_tokens=False)
    transcript, pieces = Transcript(tokenizer, stop), []
    for first in range(0, len(ids), sizes):
        pieces.append(transcript.add(ids[first : first + sizes]))
    pieces.append(transcript.finish())
    return "".join(p.text for p in pieces), "".join(p.reasoning for p in pieces), transcript


@pytest.mark.parametrize("sizes", [1, 2, 3, 100])
def test_thinking_is_apart_and_markers_never_appear(nano, sizes):
    assert feed(nano, THINK, sizes)[:2] == ("four", "2 + 2 = 4")
    assert feed(nano, "plain<turn|>", sizes)[:2] == ("plain", "")
    assert feed(nano, THINK + THINK, sizes)[:2] == ("fourfour", "2 + 2 = 42 + 2 = 4")


@pytest.mark.parametrize("sizes", [1, 2, 100])
def test_characters_of_several_tokens_come_whole(nano, sizes):
    tokenizer = nano[1]
    text = "määh 🎲🎲 ok"
    ids = tokenizer.encode(text, add_special_tokens=False)
    transcript, seen = Transcript(tokenizer), ""
    for first in range(0, len(ids), sizes):
        piece = transcript.add(ids[first : first + sizes]).text
        assert "\ufffd" not in piece
        seen += piece
    assert seen + transcript.finish().text == text


@pytest.mark.parametrize("sizes", [1, 3, 100])
def test_a_stop_string_cuts_wherever_it_falls(nano, sizes):
    text, _, transcript = feed(nano, "return result and more", sizes, ["result"])
    assert (text, transcript.stopped) == ("return ", True)
    text, _, transcript = feed(nano, "return resul", sizes, ["result"])
    assert (text, transcript.stopped) == ("return resul", False)
    assert feed(nano, "a = 1\nb = 2", sizes, ["zzz", "\nb", "= 2"])[0] == "a = 1"


def test_a_stop_string_in_the_thoughts_stops_nothing(nano):
    assert feed(nano, THINK, 1, ["2 +"])[:2] == ("four", "2 + 2 = 4")


@pytest.mark.parametrize("sizes", [1, 3, 7])
def test_pieces_add_up_to_the_text_decoded_whole(nano, sizes):
    """Also of ids that no text has: half characters, spaces anywhere."""
    tokenizer = nano[1]
    ordinary = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.all_special_ids]
    for seed in range(20):
        ids = random.Random(seed).choices(ordinary, k=100)
        transcript = Transcript(tokenizer)
        pieces = [transcript.add(ids[first : first + sizes]).text for first in range(0, len(ids), sizes)]
        assert "".join([*pieces, transcript.finish().text]) == tokenizer.decode(ids)


class Bytes:
    """A tokenizer as Gemma's: pieces with a mark for the space, and bytes for what has no piece."""

    all_special_ids: tuple = ()
    has_thinking = False

    def __init__(self) -> None:
        pieces = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581": 256, "\u2581the": 257, "ing": 258}
        self._tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[], byte_fallback=True))
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        self._tokenizer.decoder = decoders.Sequence(steps)

    def decode(self, ids) -> str:
        return self._tokenizer.decode(list(ids))


def test_characters_that_are_bytes_come_whole_wherever_they_stand():
    tokenizer, parts = Bytes(), ["é", "漢", "😀", ".", "\n", " the", "ing", "ß"]
    own = {" the": [257], "ing": [258]}
    for seed in range(300):
        chosen = random.Random(seed).choices(parts, k=30)
        ids = [token for part in chosen for token in own.get(part, part.encode())]
        assert tokenizer.decode(ids) == "".join(chosen)
        transcript = Transcript(tokenizer)
        pieces = [transcript.add([token]).text for token in ids]
        assert "\ufffd" not in "".join(pieces)
        assert "".join([*pieces, transcript.finish().text]) == "".join(chosen)


def test_a_token_costs_the_same_at_the_end_of_a_long_text(nano, monkeypatch):
    tokenizer, decoded = nano[1], []
    transcript = Transcript(tokenizer)
    decode = tokenizer._tokenizer.decode
    monkeypatch.setattr(
        tokenizer._tokenizer,
        "decode",
        lambda ids, *rest, **more: decoded.append(len(ids)) or decode(ids, *rest, **more),
    )
    for token in tokenizer.encode("a long text " * 60, add_special_tokens=False):
        transcript.add([token])
    assert len(decoded) > 300 and max(decoded) <= 20
