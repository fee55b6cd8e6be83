"""Training and fine-tuning with transformers' class: the losses see what generation sees, and a run of a few steps."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sys

import numpy as np
import pytest

from benchmarks.nano import train
from benchmarks.nano.example import Example

pytestmark = pytest.mark.reference

CANVAS, WINDOW = 96, 64


@pytest.fixture(scope="module", autouse=True)
def not_compiled():
    """Compiling takes longer than all the steps here."""
    import torch

    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """nano with random weights after one step."""
    out = tmp_path_factory.mktemp("begun") / "nano"
    train.main(["--rung", "1", "--steps", "1", "--batch", "2", "--out", str(out)])
    return out


@pytest.fixture
def loaded(begun):
    import torch
    from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

    model = DiffusionGemmaForBlockDiffusion.from_pretrained(begun, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(begun)


def rows_of(tokenizer, *lengths):
    """Rows of random ids: (prompt, answer) lengths."""
    from benchmarks.nano.rows import Row

    rng = random.Random(3)
    return [Row(*([rng.randrange(20, len(tokenizer)) for _ in range(n)] for n in pair)) for pair in lengths]


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

    drawn = torch.stack([next_canvas(logits, generator) for _ in range(200)])
    kept = (drawn == best).float().mean(0) > 0.05  # by chance 1 in 200 is the likeliest
    assert kept.equal(kept_by_reference(0.1)) and not kept.equal(kept_by_reference(2.0))
    assert 3 < kept.sum() < 3 * 24


@pytest.mark.parametrize(("stepped", "further"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_a_share_of_the_fed_rows_goes_on_from_the_next_canvas(loaded, monkeypatch, stepped, further):
    import torch

    from benchmarks.nano import objective

    model, tokenizer = loaded
    _, batch = batch_of(tokenizer, *LENGTHS)
    given, denoise = [], objective.denoise
    monkeypatch.setattr(objective, "next_canvas", lambda logits, _: torch.full(logits.shape[:-1], 7))
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


def moved(optimizer_of, *shapes):
    """How some matrices, or stacks of them, change in four steps of random gradients."""
    import torch

    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    before = [p.detach().clone() for p in parameters]
    optimizer = optimizer_of(parameters)
    for _ in range(4):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() - b for p, b in zip(parameters, before, strict=True)]


def test_muon_moves_matrices_as_that_of_torch_does():
    import torch

    from benchmarks.nano.optimizer import Muon

    shapes = (24, 40), (40, 24), (24, 40)
    options = {"weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    ours = moved(lambda p: Muon(p, lr=1e-2), *shapes)
    theirs = moved(lambda p: torch.optim.Muon(p, lr=1e-2, **options), *shapes)
    other = moved(lambda p: torch.optim.Muon(p, lr=1e-2, momentum=0.8, **options), *shapes)
    for a, b, c in zip(ours, theirs, other, strict=True):
        assert (a - b).norm() < 0.03 * b.norm() < (a - c).norm(), "theirs computes in bf16"


def test_muon_moves_each_matrix_of_a_stack_on_its_own(monkeypatch):
    from benchmarks.nano import optimizer

    stacked = moved(lambda p: optimizer.Muon(p, lr=1e-2), (3, 8, 12), (8, 12))
    monkeypatch.setattr(optimizer, "SMALL", 0)
    apart = moved(lambda p: optimizer.Muon(p, lr=1e-2), (3, 8, 12), (8, 12))
    for a, b in zip(stacked, apart, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    singular = np.linalg.svd(optimizer.orthogonal(stacked[0]), compute_uv=False)
    assert singular.shape == (3, 8) and 0.5 < singular.min() < singular.max() < 1.5


def test_canvases_may_be_shorter_to_begin_with():
    from benchmarks.nano.rows import batches

    rows = [row for pair in ((10, 20), (30, 130)) for row in rows_of(range(500), pair) * 100]
    for batch in itertools.islice(batches(rows, 4, 48, 0, 0), 20):
        assert batch.canvas.shape[1] == 48
        for text, before, canvas in zip(batch.text, batch.before.tolist(), batch.canvas, strict=True):
            following = text[before : before + 48]
            assert canvas[: len(following)].equal(following) and not canvas[len(following) :].any()
            assert text[:before].all()


OWN = [
    {"prompt": "say the word", "answer": "apple pie"},
    {"prompt": [{"role": "user", "content": "and the number"}], "answer": "4 7 1 1"},
    {"prompt": "think first", "answer": "done", "thought": "one two"},
]


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def tuned(begun, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    own = folder / "own.jsonl"
    own.write_text("".join(json.dumps(line) + "\n" for line in OWN))
    command = ["--init", str(begun), "--data", str(own), "--freeze", "router", "experts", "--batch", "4"]
    train.main([*command, "--steps", "25", "--decay", "5", "--out", str(folder / "tuned")])
    return folder / "tuned"


def test_fine_tuning_teaches_ones_own_data_and_keeps_what_is_frozen(begun, tuned):

    before, after = tensors(begun), tensors(tuned)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and not any("router" in name or "experts" in name or "vision" in name for name in changed)
    assert any("layer_scalar" in name for name in changed) and any("q_proj" in name for name in changed)


def test_what_was_fine_tuned_answers_here(tuned):
    """The checkpoint loads as it is, and greedy ar mode says what it was taught."""
    from mlx_dgemma import generate, load

    model, tokenizer = load(str(tuned))
    assert generate(model, tokenizer, OWN[0]["prompt"], mode="ar", temperature=0.0) == OWN[0]["answer"]


def test_a_training_goes_on_where_it_stopped(begun, tmp_path):
    out = tmp_path / "nano"
    shutil.copytree(begun, out)
    train.main(["--rung", "1", "--steps", "2", "--batch", "2", "--out", str(out)])
    import torch

    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] == 2
    moved = [value.abs().max() for value in state["optimizers"][0]["state"][0].values() if value.ndim > 1]
    assert moved and not tensors(begun)["model.decoder.embed_tokens.weight"].equal(
        tensors(out)["model.decoder.embed_tokens.weight"]
    )


@pytest.mark.parametrize(
    ("arguments", "said", "status"),
    [
        (["--steps", "1"], "say what to train on", 2),
        (["--steps", "1", "--rung", "1", "--data", "x"], "say what to train on", 2),
        (["--steps", "1", "--data", "x"], "say which one (--init)", 2),
        (["--steps", "0", "--rung", "1"], "--steps", 2),
        (["--steps", "1", "--rung", "1", "--canvas", "0"], "--canvas", 2),
        (["--steps", "1", "--rung", "1", "--stepped", "1.5"], "--stepped", 2),
        (["--steps", "1", "--rung", "1", "--shares", "poem=1"], "no task poem", 2),
        (["--steps", "1", "--init", "nano", "--data", "/missing.jsonl"], "cannot be read", 1),
        (["--steps", "1", "--init", "/missing", "--rung", "1"], "/missing", 1),
    ],
)
def test_bad_input_is_one_line(arguments, said, status, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main([*arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == status
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_without_torch_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as ended:
        train.main(["--rung", "1", "--steps", "1", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1 and "pip install" in said


def test_a_line_without_an_answer_is_named(begun, tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "c"}\n')
    with pytest.raises(SystemExit):
        train.main(["--init", str(begun), "--data", str(path), "--steps", "1", "--out", str(tmp_path / "out")])
    assert f"{path}, line 2" in capsys.readouterr().err


def test_thoughts_are_rendered_in_their_channel(loaded):
    from benchmarks.nano.rows import encode

    _, tokenizer = loaded
    example = Example(task="t", prompt="1 + 1", answer="2", keys=("k",), thought="one more")
    row = encode(tokenizer, 6, example.messages, example.answer, example.thought)
    assert "<|think|>" in tokenizer.decode(row.prompt)
    assert tokenizer.decode(row.answer) == "<|channel>thought\none more<channel|>2<turn|>"
