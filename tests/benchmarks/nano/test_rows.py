"""What a row of training holds, and the batches that they come in."""

import itertools

import pytest

from benchmarks.nano.example import Example
from tests.benchmarks.nano.fixtures import rows_of

pytestmark = [pytest.mark.reference, pytest.mark.usefixtures("not_compiled")]


def test_canvases_may_be_shorter_to_begin_with():
    from benchmarks.nano.rows import batches

    rows = [row for pair in ((10, 20), (30, 130)) for row in rows_of(range(500), pair) * 100]
    for batch in itertools.islice(batches(rows, 4, 48, 0, 0), 20):
        assert batch.canvas.shape[1] == 48
        for text, before, canvas in zip(batch.text, batch.before.tolist(), batch.canvas, strict=True):
            following = text[before : before + 48]
            assert canvas[: len(following)].equal(following) and not canvas[len(following) :].any()
            assert text[:before].all()


@pytest.mark.parametrize("thought", [None, "one more"])
def test_prompts_are_those_of_generation_and_thoughts_stand_in_their_channel(begun, loaded, thought):
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from benchmarks.nano.rows import encode
    from mlx_dgemma import load
    from mlx_dgemma.prompt import encode_prompt

    _, tokenizer = loaded
    example = Example(task="t", prompt="1 + 1", answer="2", keys=("k",), thought=thought)
    row = encode(TokenizerWrapper(tokenizer), 6, example.prompt, example.answer, example.thought)
    assert row.prompt == encode_prompt(load(str(begun))[1], "1 + 1", enable_thinking=thought is not None)
    assert ("<|think|>" in tokenizer.decode(row.prompt)) is (thought is not None)
    before = "" if thought is None else "<|channel>thought\none more<channel|>"
    assert tokenizer.decode(row.answer) == before + "2<turn|>"
