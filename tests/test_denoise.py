import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.decoding.counts import Counts
from mlx_dgemma.decoding.diffusion import Block, Preview, cut, decode
from mlx_dgemma.decoding.prefill import check_prompt, prefill
from mlx_dgemma.denoise import denoise
from mlx_dgemma.draws import TILE, Draws
from mlx_dgemma.errors import InputError

PROMPT = [2, 17, 40, 99, 3, 58, 121, 7, 64, 30, 88, 101, 12, 55, 76, 43, 9, 110, 6, 27]
# A random model is never stable, so rows stop when they are sure, each after its own number of steps.
LOOSE = GenerationConfig(
    max_denoising_steps=8,
    entropy_bound=1.0,
    stability_threshold=0,
    confidence_threshold=0.25,
    max_new_tokens=36,
    t_min=0.02,
    t_max=0.1,
)


def run(model, seed=0, config=LOOSE, **options):
    events = list(decode(model, PROMPT, config, Draws([seed], model.config.vocab_size), **options))
    return [e for e in events if isinstance(e, Block)], [e for e in events if isinstance(e, Preview)]


def test_the_same_seed_gives_the_same_ids_whatever_the_chunks(tiny):
    blocks, drafts = run(tiny)
    assert len(blocks) == 3
    assert any(d.frame.accepted.any() and not d.frame.accepted.all() for d in drafts)
    for options in [{"prefill_step": 1}, {"prefill_step": 7}, {"vocab_chunk": TILE}]:
        again, _ = run(tiny, **options)
        assert [b.tokens for b in again] == [b.tokens for b in blocks]
    other, _ = run(tiny, seed=1)
    assert [b.tokens for b in other] != [b.tokens for b in blocks]


def test_a_row_of_a_batch_is_what_it_is_alone(tiny):
    seeds = [0, 1, 2, 3]
    alone = []
    for seed in seeds:
        cache = tiny.make_cache()
        prefill(tiny, PROMPT, cache)
        alone.append(list(denoise(tiny, cache, LOOSE, Draws([seed], tiny.config.vocab_size)))[-1])
    cache = tiny.make_cache()
    tiny.encode(mx.array([PROMPT] * len(seeds)), cache)
    together = list(denoise(tiny, cache, LOOSE, Draws(seeds, tiny.config.vocab_size)))[-1]
    assert together.forwards.tolist() == [frame.forwards[0] for frame in alone]
    assert len(set(together.forwards.tolist())) > 1, "rows should stop at different steps for this to say anything"
    for row, frame in enumerate(alone):
        assert np.array_equal(together.best[row], frame.best[0])


def test_chunked_prefill_equals_unchunked(tiny):
    whole, parts = tiny.make_cache(), tiny.make_cache()
    hidden = tiny.encode(mx.array([PROMPT]), whole)
    pieces = [tiny.encode(mx.array([PROMPT[a : a + 3]]), parts) for a in range(0, len(PROMPT), 3)]
    assert mx.allclose(mx.concatenate(pieces, axis=1), hidden, rtol=1e-4, atol=1e-5)
    canvas = mx.arange(12)[None]
    a, b = (tiny.denoise_hidden(canvas, cache) for cache in (whole, parts))
    assert mx.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_progress_is_reported(tiny):
    seen = []
    counts = Counts()
    prefill(tiny, PROMPT, tiny.make_cache(), 8, lambda done, total: seen.append((done, total)), counts=counts)
    assert (counts.encode_forwards, counts.positions) == (3, 20)
    assert seen == [(0, 20), (8, 20), (16, 20), (20, 20)]


def test_counts_are_exact(tiny):
    counts = Counts()
    blocks, drafts = run(tiny, counts=counts, prefill_step=9)
    assert counts.denoise_forwards == len(drafts)
    assert counts.encode_forwards == 3 + len(blocks) - 1
    assert counts.positions == len(PROMPT) + 12 * (len(drafts) + len(blocks) - 1)


def test_canvases_are_cut_at_eos_and_at_the_last_token():
    assert cut([7, 8, 1, 9], (1, 5), 10) == ([7, 8, 1], "stop")
    assert cut([7, 8, 1, 9], (1, 5), 3) == ([7, 8, 1], "stop")
    assert cut([7, 8, 1, 9], (1, 5), 2) == ([7, 8], "length")
    assert cut([7, 8, 3, 9], (1, 5), 4) == ([7, 8, 3, 9], "length")
    assert cut([7, 8, 3, 9], (1, 5), 5) == ([7, 8, 3, 9], None)


def test_max_new_tokens_cuts_the_last_canvas(tiny):
    blocks, _ = run(tiny, config=LOOSE.replace(max_new_tokens=17))
    assert [len(b.tokens) for b in blocks] == [12, 5]
    assert [b.finish_reason for b in blocks] == [None, "length"]
    assert len(blocks[-1].canvas) == 12


def test_an_eos_inside_a_canvas_ends_it(tiny):
    blocks, _ = run(tiny)
    eos = blocks[1].tokens[4]
    earlier = eos in blocks[0].tokens or eos in blocks[1].tokens[:4]
    ended, _ = run(tiny, config=LOOSE.replace(eos_token_ids=(eos,)))
    assert ended[-1].finish_reason == "stop"
    assert ended[-1].tokens[-1] == eos
    assert earlier or [b.tokens for b in ended] == [blocks[0].tokens, blocks[1].tokens[:5]]


def test_the_end_of_the_context_ends_the_answer(tiny):
    prompt = [3] * (512 - 2 * 12 - 3)
    events = decode(tiny, prompt, LOOSE.replace(max_new_tokens=100), Draws([0], 131))
    blocks = [e for e in events if isinstance(e, Block)]
    assert [b.finish_reason for b in blocks] == [None, "length"]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [([], "empty"), ([1, 131], "131"), ([-1], "-1"), ([3] * 501, "501 tokens"), ([3, 258_880], "258880")],
)
def test_prompts_that_cannot_be_continued(tiny, prompt, said):
    with pytest.raises(InputError, match=said):
        check_prompt(tiny, prompt, room=12)
