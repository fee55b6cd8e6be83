"""The losses see what generation sees."""

import random

import numpy as np
import pytest

from tests.benchmarks.nano.fixtures import rows_of

pytestmark = [pytest.mark.reference, pytest.mark.usefixtures("not_compiled")]

CANVAS, WINDOW = 96, 64


class Last(random.Random):
    """Chooses the last block of every answer."""

    def randrange(self, stop):
        return stop - 1


def batch_of(tokenizer, *lengths):
    from benchmarks.nano.rows import collate

    rows = rows_of(tokenizer, *lengths)
    return rows, collate(rows, max(map(len, rows)) + 7, CANVAS, 0, Last())


def alone(model, row, batch, index):
    """transformers' own forward of one row, without padding: its cache, masks and positions are its own."""
    import torch
    from transformers import DynamicCache

    before = int(batch.before[index])
    ids = torch.tensor([[*row.prompt, *row.answer][:before]])
    cache = DynamicCache(config=model.config.text_config)
    with torch.no_grad():
        return model(input_ids=ids, decoder_input_ids=batch.canvas[index][None], past_key_values=cache).logits[0]


LENGTHS = (10, 20), (150, 30), (30, 250), (70, 97)


def seen(model, batch):
    import torch

    from benchmarks.nano.objective import denoise, read

    with torch.no_grad():
        hidden, cache = read(model, batch.text)
        return hidden, denoise(model, batch.canvas, batch.before, cache)


def test_a_batch_sees_what_each_row_sees_alone(loaded):
    model, tokenizer = loaded
    rows, batch = batch_of(tokenizer, *LENGTHS)
    assert batch.before.tolist() == [10, 150, 30 + 2 * CANVAS, 70 + CANVAS]
    _, logits = seen(model, batch)
    for index, row in enumerate(rows):
        np.testing.assert_allclose(logits[index], alone(model, row, batch, index), rtol=1e-3, atol=1e-4)


def test_a_window_off_by_one_is_caught(loaded):
    model, tokenizer = loaded
    rows, batch = batch_of(tokenizer, *LENGTHS)
    expected = alone(model, rows[1], batch, 1)
    model.config.text_config.sliding_window = WINDOW + 1
    _, logits = seen(model, batch)
    assert (logits[1] - expected).abs().max() > 1e-3


def test_the_causal_pass_is_that_of_transformers(loaded):
    import torch

    model, tokenizer = loaded
    rows, batch = batch_of(tokenizer, *LENGTHS)
    hidden, _ = seen(model, batch)
    for index, row in enumerate(rows):
        with torch.no_grad():
            ids = torch.tensor([[*row.prompt, *row.answer]])
            alone = model.model.encoder.language_model(input_ids=ids).last_hidden_state[0]
        np.testing.assert_allclose(hidden[index, : len(row)], alone, rtol=1e-3, atol=1e-4)


def test_faster_layers_compute_the_same(loaded):
    from benchmarks.nano.faster import faster_layers

    model, tokenizer = loaded
    for module in model.modules():  # what they are is read, not known
        for name, other in (("eps", 0.1), ("scaling", 0.7)):
            if hasattr(module, name):
                setattr(module, name, other)
    _, batch = batch_of(tokenizer, *LENGTHS)
    hidden, logits = seen(model, batch)
    faster_layers(model)
    faster_hidden, faster_logits = seen(model, batch)
    assert model.config._attn_implementation == "grouped"
    for index, length in enumerate(map(sum, LENGTHS)):
        np.testing.assert_allclose(faster_hidden[index, :length], hidden[index, :length], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(faster_logits, logits, rtol=1e-3, atol=1e-4)


def test_losses_leave_out_prompts_and_padding(loaded):
    """Of random ids behind the end of an answer, and of the prompt, nothing depends but what they are read for."""
    import torch

    from benchmarks.nano.objective import canvas_weight, cross_entropy

    canvas = torch.tensor([[9, 8, 6, 0, 0], [9, 9, 9, 9, 9], [1, 6, 0, 0, 0]])
    weight = canvas_weight(canvas, torch.tensor([1, 6]))
    np.testing.assert_allclose(weight, [[1, 1, 1, 0.1, 0.1], [1] * 5, [1, 0.1, 0.1, 0.1, 0.1]])
    logits = torch.zeros(2, 3, 4)
    logits[1] = torch.tensor([50.0, 0, 0, 0])  # certain of 0
    ids = torch.tensor([[1, 2, 3], [0, 3, 3]])
    weight = torch.tensor([[1.0, 1, 1], [1, 0, 0]])
    assert cross_entropy(logits, ids, weight).item() == pytest.approx(np.log(4) / 2)


def test_a_canvas_is_taken_a_step_further_as_the_sampler_takes_it():
    import torch
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as reference

    from benchmarks.nano.objective import next_canvas

    generator, vocabulary = torch.Generator().manual_seed(0), 200
    sharpness = torch.linspace(0, 12, 24)[torch.randperm(24, generator=generator)]
    logits = torch.randn(3, 24, vocabulary, generator=generator) * sharpness[:, None]
    best = logits.argmax(-1)

    def kept_by_reference(bound):
        config = reference.EntropyBoundSamplerConfig(entropy_bound=bound)
        sampler = reference.EntropyBoundSampler(config, 24, vocabulary, 48)
        return sampler.accept_canvas(torch.full_like(best, -1), best, logits, 48) >= 0

    config = reference.EntropyBoundSamplerConfig(entropy_bound=0.1)
    drawn = torch.stack([next_canvas(logits, generator, config) for _ in range(200)])
    kept = (drawn == best).float().mean(0) > 0.05  # by chance 1 in 200 is the likeliest
    assert kept.equal(kept_by_reference(0.1)) and not kept.equal(kept_by_reference(2.0))
    assert 3 < kept.sum() < 3 * 24


@pytest.mark.parametrize(("stepped", "further"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_a_share_of_the_fed_rows_goes_on_from_the_next_canvas(loaded, monkeypatch, stepped, further):
    import torch

    from benchmarks.nano import objective

    model, tokenizer = loaded
    model.generation_config.sampler_config.entropy_bound = 0.7
    _, batch = batch_of(tokenizer, *LENGTHS)
    given, denoise = [], objective.denoise

    def step_on(logits, _, config):
        return torch.full(logits.shape[:-1], round(10 * config.entropy_bound))

    monkeypatch.setattr(objective, "next_canvas", step_on)
    monkeypatch.setattr(objective, "denoise", lambda *a: given.append(a[1].clone()) or denoise(*a))
    with torch.no_grad():
        objective.losses(model, batch, torch.tensor([6]), 1.0, torch.Generator().manual_seed(0), stepped)
    first, second = given
    assert (second[:further] == 7).all() and second[further:].equal(first[further:])


def test_rows_count_alike_however_long_their_answers():
    import torch

    from benchmarks.nano.objective import row_shares

    answered = torch.tensor([[False, True, True, True, True], [False, False, True, True, False]])
    np.testing.assert_allclose(row_shares(answered), [1 / 8] * 4 + [1 / 4] * 2)
