"""transformers' own generate and this package, on the embedded checkpoint and the same draws."""

import numpy as np
import pytest

from mlx_dgemma.decoding.counts import Counts
from mlx_dgemma.decoding.diffusion import Block, decode
from mlx_dgemma.draws import RecordedDraws
from mlx_dgemma.loading import EMBEDDED
from mlx_dgemma.prompt import encode_prompt

PROMPTS = [
    "json name=Ann age=31 city=Oslo",
    "json item=lemon score=77",
    "json year=1987 active=true job=nurse color=teal",
    "set age=44 in {\"name\": \"Bob\", \"age\": 31}",
    "set city=Lima in {\"city\": \"Rome\", \"size\": 12, \"active\": false}",
    "set score=5 in {\"score\": 812, \"name\": \"Olga\", \"year\": 2001}",
    "python total(values): sum the values above 7",
    "python pick(items): collect twice the items",
    "python tally(numbers): count the numbers divisible by 3",
    "python solve(prices): maximum of the negated prices below 20",
    "python fold(scores): multiply the scores plus 2 that are odd",
    "sudoku 4... 31.2 2.31 1.24",
    "sudoku .2.1 142. .1.2 2314",
    "sudoku 1.3. 3.12 21.. 4.2.",
    "reverse needle eagle window",
    "reverse apple river stone cloud tiger",
    "reverse ladder apple silver forest table chair",
    "47 - 23",
    "58 + 67",
    "nothing that was ever trained on",
]  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    from mlx_dgemma.parity.reference import load_reference

    return load_reference(EMBEDDED, "cpu")


@pytest.mark.reference
@pytest.mark.parametrize("number", range(len(PROMPTS)))
def test_the_same_draws_give_the_same_canvases(nano, reference, number):
    from mlx_dgemma.parity.reference import Run, generate_reference

    model, tokenizer = nano
    config = model.generation_config
    if number % 2:  # no end that occurs: two whole canvases, the first of them encoded
        config = config.replace(max_new_tokens=192, eos_token_ids=(4,))
    ids = encode_prompt(tokenizer, PROMPTS[number])
    story = generate_reference(reference, Run("nano", np.array([ids]), config, seed=number))
    draws = RecordedDraws(
        [steps[0]["canvas"] for steps in story.steps],
        [[step["token"] for step in steps] for steps in story.steps],
        [[step["renoise"] for step in steps] for steps in story.steps],
    )
    counts = Counts()
    blocks = [e for e in decode(model, ids, config, draws, counts=counts) if isinstance(e, Block)]
    assert counts.denoise_forwards == sum(len(steps) for steps in story.steps)
    assert len(blocks) == len(story.steps) == 1 + number % 2
    for block, steps in zip(blocks, story.steps, strict=True):
        assert block.canvas.tolist() == steps[-1]["best"][0].tolist()
