"""Training and fine-tuning with transformers' class: the losses see what generation sees, and a run of a few steps."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import sys

import numpy as np
import pytest

from benchmarks.nano import train
from benchmarks.nano.example import Example
from mlx_dgemma.errors import InputError, UsageError

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


def small_model(**tensors):
    """Parameters in bfloat16, and a layer scalar."""
    import torch

    model = torch.nn.Module()
    for name, value in tensors.items():
        model.register_parameter(name, torch.nn.Parameter(value.bfloat16()))
    model.register_buffer("layer_scalar", torch.ones(1).bfloat16())
    return model


def optimized(model, steps, state=None, **options):
    """The optimizers after some steps of gradients of 1; each moves a weight by about a hundredth of what rounds up."""
    import torch

    from benchmarks.nano.optimizer import Optimizers

    optimizers = Optimizers(model, lr=4e-5, matrix_lr=4e-4, **options)
    if state is not None:
        optimizers.load_state_dict(state)
    for _ in range(steps):
        for p in (*model.parameters(), *model.buffers()):
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizers.step(1.0)
    return optimizers


def test_updates_that_bfloat16_would_round_away_add_up():
    import torch

    start = {"q_proj": torch.eye(4) + 1, "norm": torch.ones(4)}
    whole, part, rest = (small_model(**start) for _ in range(3))
    optimized(whole, 400)
    for name, before in (*start.items(), ("layer_scalar", torch.ones(1))):
        after = getattr(whole, name)
        assert after.dtype == torch.bfloat16 and (after < before).all(), name
    optimized(rest, 300, optimized(part, 100).state_dict())
    assert all(getattr(rest, name).equal(getattr(whole, name)) for name in (*start, "layer_scalar"))


def test_what_is_frozen_is_named_and_something_is_left():
    import torch

    model = small_model(q_proj=torch.eye(4), norm=torch.ones(4))
    model.tied = model.norm
    optimized(model, 400, freeze=("layer_scalar", "tied"))
    assert model.layer_scalar.item() == 1 and (model.norm == 1).all()
    assert not model.q_proj.equal(torch.eye(4).bfloat16())
    for freeze, said in ((("q_proj", "poem"), "--freeze poem"), (("q_", "norm", "layer_"), "nothing to train")):
        with pytest.raises(UsageError, match=said):
            optimized(model, 0, freeze=freeze)


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


@pytest.fixture
def ended(capsys):
    """(status, what is said) of the command, in this process."""
    handler = signal.getsignal(signal.SIGINT)

    def call(arguments):
        status = 0
        try:
            train.main(arguments)
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err

    yield call
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def stopped(begun, tmp_path, monkeypatch, ended):
    """The arguments of a training that Ctrl-C stopped in the midst of the first of three steps, and its folder."""
    from benchmarks.nano.trainer import Trainer

    out, update = tmp_path / "stopped", Trainer._update
    command = ["--init", str(begun), "--rung", "1", "--steps", "3", "--batch", "2", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", lambda *a: (signal.raise_signal(signal.SIGINT), update(*a)))
        status, said = ended(command)
    assert status == 130 and said.splitlines()[-2:] == [
        f"{out}: what is done stays in {out}, the same command goes on from there",
        "benchmarks.nano.train: interrupted",
    ]
    return command, out


def state_of(out):
    """The step of the state, and its weights."""
    import torch

    state = torch.load(out / "state.pt", weights_only=True)
    return state["step"], state["optimizers"]["weights"]


def test_ctrl_c_saves_a_whole_step_and_the_same_command_goes_on(begun, stopped, ended, monkeypatch):
    from benchmarks.nano import trainer

    command, out = stopped
    step, weights = state_of(out)
    first = tensors(out)
    both = [name for name in first if name in weights]  # ties have one name here and another there
    assert step == 1 and both and all(first[name].equal(weights[name].bfloat16()) for name in both)
    assert not first["model.decoder.embed_tokens.weight"].equal(tensors(begun)["model.decoder.embed_tokens.weight"])
    saved, save = [], trainer.save_checkpoint
    monkeypatch.setattr(trainer, "save_checkpoint", lambda *a: (saved.append(1), save(*a)))
    assert ended([*command, "--save-every", "1", "--minutes", "9"])[0] == 0
    assert state_of(out)[0] == 3 and len(saved) == 2, "the last step is saved once"


def test_a_second_ctrl_c_does_not_wait():
    from benchmarks.nano.trainer import deferred_interrupt

    usual, passed = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), deferred_interrupt() as is_interrupted:
        assert not is_interrupted()
        signal.raise_signal(signal.SIGINT)
        passed.append(is_interrupted())
        signal.raise_signal(signal.SIGINT)
        passed.append("not reached")
    assert passed == [True] and signal.getsignal(signal.SIGINT) is usual


@pytest.mark.parametrize("part", ["checkpoint", "state"])
def test_a_save_that_fails_leaves_what_goes_on(stopped, ended, monkeypatch, part):
    import torch
    from transformers import PreTrainedTokenizerBase

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    command, out = stopped
    before, step = tensors(out), state_of(out)[0]
    with monkeypatch.context() as patch:
        patch.setattr(
            *((PreTrainedTokenizerBase, "save_pretrained") if part == "checkpoint" else (torch, "save")), fail
        )
        status, said = ended(command)
    assert status == 1 and "No space left" in said.splitlines()[-1]
    after = tensors(out)
    assert state_of(out)[0] == step and after.keys() == before.keys()
    assert all(after[name].equal(before[name]) for name in before) is (part == "checkpoint")
    assert ended(command)[0] == 0 and state_of(out)[0] == 3
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--lr", "1e-3", "--batch", "3"], "--batch and --lr"),
        (["--steps", "4", "--decay", "0"], "--steps"),
        (["--rung", "2"], "--shares"),
        (["--init", "nano"], "--init"),
        (["--seed", "1", "--dtype", "bfloat16"], "--dtype and --seed"),
    ],
)
def test_another_training_does_not_go_on(stopped, ended, changed, said):
    command, out = stopped
    before = (out / "state.pt").read_bytes()
    status, err = ended([*command, *changed])
    assert status == 2 and f"state.pt: was begun with other {said}; give the same" in err.splitlines()[-1]
    assert (out / "state.pt").read_bytes() == before


def test_a_fine_tuning_does_not_go_on_with_other_data(begun, tuned, tmp_path, ended):
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "a", "answer": "b"}\n')
    command = ["--init", str(begun), "--data", str(own), "--freeze", "router", "experts", "--batch", "4"]
    status, err = ended([*command, "--steps", "25", "--decay", "5", "--out", str(tuned)])
    assert status == 2 and "was begun with other --data;" in err


def test_without_a_sampler_no_canvas_is_taken_further(begun, tmp_path, ended):
    other = tmp_path / "other"
    shutil.copytree(begun, other)
    path = other / "generation_config.json"
    config = json.loads(path.read_text())
    del config["sampler_config"]
    path.write_text(json.dumps(config))
    command = ["--init", str(other), "--rung", "1", "--steps", "1", "--stepped", "0.5", "--out", str(tmp_path / "out")]
    status, said = ended(command)
    assert status == 1
    assert said.splitlines()[-1] == f"benchmarks.nano.train: {path} has no sampler_config, which training needs"


@pytest.mark.parametrize(
    ("arguments", "said", "status"),
    [
        (["--steps", "1"], "say what to train on", 2),
        (["--steps", "1", "--rung", "1", "--data", "x"], "say what to train on", 2),
        (["--steps", "1", "--data", "x"], "say which one (--init)", 2),
        (["--steps", "0", "--rung", "1"], "--steps", 2),
        (["--steps", "1", "--rung", "1", "--canvas", "0"], "--canvas", 2),
        (["--steps", "1", "--rung", "1", "--stepped", "1.5"], "--stepped", 2),
        (["--steps", "1", "--rung", "1", "--stepped", "0.5", "--self-conditioning", "0"], "--stepped", 2),
        (["--steps", "1", "--rung", "1", "--save-every", "0"], "--save-every", 2),
        (["--steps", "5", "--rung", "1", "--decay", "-1"], "--decay", 2),
        (["--steps", "5", "--rung", "1", "--decay", "6"], "--decay", 2),
        (["--steps", "1", "--rung", "1", "--lr", "nan"], "--lr", 2),
        (["--steps", "1", "--rung", "1", "--dtype", "bfloat16"], "--dtype", 2),
        (["--steps", "1", "--init", "nano", "--data", "x", "--shares", "json=1"], "--shares", 2),
        (["--steps", "1", "--rung", "1", "--shares", "poem=1"], "no task poem", 2),
        (["--steps", "1", "--rung", "1", "--shares", "json=0"], "not all 0", 2),
        (["--steps", "1", "--rung", "1", "--shares", "json=2,edit=-1"], "from 0 on", 2),
        (["--steps", "1", "--rung", "1", "--shares", "json=nan"], "from 0 on", 2),
        (["--steps", "1", "--rung", "1", "--shares", "json"], "write json=0.2", 2),
        (["--steps", "1", "--rung", "1", "--device", "cuda"], "no CUDA", 2),
        (["--steps", "1", "--init", "nano", "--data", "/missing.jsonl"], "cannot be read", 1),
        (["--steps", "1", "--init", "/missing", "--rung", "1"], "/missing", 1),
    ],
)
def test_bad_input_is_one_line(arguments, said, status, tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        train.main([*arguments, "--out", str(tmp_path / "out")])
    assert ended.value.code == status
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_torch_one_line_says_what_to_install(missing, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "benchmarks.nano.faster", raising=False)
    with pytest.raises(SystemExit) as ended:
        train.main(["--rung", "1", "--steps", "1", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1 and "pip install" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "c"}', '"answer" must be'),
        ('{"prompt": "c", "answer": "\\ud800"}', "surrogates"),
        ('{"prompt": "\\ud800", "answer": "d"}', "not text"),
        ('{"messages": [{"role": "user"}], "answer": "d"}', "'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}], "answer": "d"}', "holds image"),
    ],
)
def test_a_line_that_cannot_be_learnt_is_named(loaded, tmp_path, line, said):
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from benchmarks.nano.own import read

    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match=f"{path}, line 2: .*{said}"):
        read(path, TokenizerWrapper(loaded[1]), 6)


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
