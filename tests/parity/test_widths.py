"""Wide passes beside narrow ones: rounding is told from a fault, by the code that runs on any device."""

import mlx.core as mx
import pytest

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.model import DiffusionGemma
from mlx_dgemma.parity.command import main
from mlx_dgemma.parity.widths import compare, plain_options

PROMPT = [2, 17, 40, 99, 3, 58, 121, 7, 64, 30, 88, 101]


def results(model, temperature=1.0, tokens=120, widths=(3, 7), seed=0):
    return compare(model, PROMPT, plain_options(GenerationConfig(), temperature, tokens), seed, widths)


def test_here_every_width_gives_the_same_tokens(tiny):
    for temperature in (0.0, 1.0):
        for result in results(tiny, temperature):
            assert (result.flips, result.passed, result.tokens) == ((), True, 120)
            assert result.passes < 120 / result.width, "drafts were verified many at a time"


def test_rounding_of_wide_passes_is_reported_as_a_tie(tiny, monkeypatch):
    """Logits of passes over several positions are moved by 1e-3, as another kernel might."""
    logits, key = DiffusionGemma.logits, mx.random.key(0)

    def noisy(model, hidden, ids=None):
        exact = logits(model, hidden, ids)
        return exact + (1e-3 * mx.random.normal(exact.shape, key=key) if hidden.shape[1] > 1 else 0.0)

    monkeypatch.setattr(DiffusionGemma, "logits", noisy)
    (result,) = results(tiny, tokens=100, widths=[7], seed=3)
    assert result.flips and result.passed
    assert "ties alone" in result.line() and f"{result.flips[0].margin:.1e}" in result.line()
    for flip in result.flips:
        assert flip.got != flip.expected and 0 <= flip.margin < 4e-3


def test_a_fault_is_not_a_tie(tiny, monkeypatch):
    """Wide passes that see the tokens one position off."""
    encode = DiffusionGemma.encode

    def shifted(model, ids, cache, taps=None):
        return encode(model, mx.roll(ids, 1, axis=1) if 1 < ids.shape[1] < 9 else ids, cache, taps)

    monkeypatch.setattr(DiffusionGemma, "encode", shifted)
    (result,) = results(tiny, tokens=60, widths=[4])
    assert not result.passed and "FAULT" in result.line()


def test_a_fault_of_narrow_passes_is_one_too(tiny, monkeypatch):
    """The margin is then negative: by a pass over one position, the other token is the better one."""
    logits, calls = DiffusionGemma.logits, []

    def faulty(model, hidden, ids=None):
        calls.append(hidden.shape[1])
        exact = logits(model, hidden, ids)
        return -exact if hidden.shape[1] == 1 and len(calls) % 2 else exact

    monkeypatch.setattr(DiffusionGemma, "logits", faulty)
    (result,) = results(tiny, tokens=40, widths=[4])
    assert not result.passed


def test_the_command(capsys):
    main(["widths", "--widths", "2", "5", "--max-tokens", "20"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("same")]
    assert [(row[0], row[1], row[3]) for row in rows] == [("2", "20", "0"), ("5", "20", "0")] * 2, "two temperatures"


@pytest.mark.parametrize(
    ("extra", "said"),
    [(["--widths", "65"], "0-64"), (["--max-tokens", "0"], "max_tokens"), (["--prompt", " "], "empty")],
)
def test_mistakes_are_one_line(capsys, extra, said):
    with pytest.raises(SystemExit) as end:
        main(["widths", *extra])
    assert end.value.code in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
