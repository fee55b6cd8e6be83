"""transformers' own generate and this package, on the embedded checkpoint and the same draws."""

import numpy as np
import pytest

from benchmarks.nano.tasks import TASKS, held_out
from mlx_dgemma.decoding.counts import Counts
from mlx_dgemma.decoding.diffusion import Block, decode
from mlx_dgemma.draws import RecordedDraws
from mlx_dgemma.loading import EMBEDDED
from mlx_dgemma.prompt import encode_prompt

CASES = [(task, number) for task in TASKS for number in range(2)] + [("untrained", 0), ("untrained", 1)]


def prompt_of(task, number):
    return "nothing that was ever trained on" if task == "untrained" else held_out(task, 2)[number].prompt


@pytest.fixture(scope="module")
def reference():
    from mlx_dgemma.parity.reference import load_reference

    return load_reference(EMBEDDED, "cpu")


@pytest.mark.reference
@pytest.mark.parametrize(("task", "number"), CASES)
def test_the_same_draws_give_the_same_canvases(nano, reference, task, number):
    from mlx_dgemma.parity.reference import Run, generate_reference

    model, tokenizer = nano
    config = model.generation_config.replace(max_new_tokens=model.config.canvas_length)
    if number:  # no end that occurs: two whole canvases, the first of them encoded
        config = config.replace(max_new_tokens=2 * model.config.canvas_length, eos_token_ids=(4,))
    ids = encode_prompt(tokenizer, prompt_of(task, number))
    story = generate_reference(reference, Run("nano", np.array([ids]), config, seed=number))
    draws = RecordedDraws(
        [steps[0]["canvas"] for steps in story.steps],
        [[step["token"] for step in steps] for steps in story.steps],
        [[step["renoise"] for step in steps] for steps in story.steps],
    )
    counts = Counts()
    blocks = [e for e in decode(model, ids, config, draws, counts=counts) if isinstance(e, Block)]
    assert counts.denoise_forwards == sum(len(steps) for steps in story.steps)
    assert len(blocks) == len(story.steps) == 1 + number
    for block, steps in zip(blocks, story.steps, strict=True):
        assert block.canvas.tolist() == steps[-1]["best"][0].tolist()
