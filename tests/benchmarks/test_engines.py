"""The engines that the harness judges: same ids in, same counts out."""

from dataclasses import replace

import pytest
from mlx.utils import tree_flatten

from benchmarks import engines
from benchmarks.engine import Setup, is_greedy
from benchmarks.engines import ENGINES, fingerprint, require_possible, require_readable
from mlx_dgemma import convert, stream_generate
from mlx_dgemma.config import GenerationConfig, ModelConfig
from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.loading import EMBEDDED
from tests.helpers import NANO_VOCAB, random_model, with_text, write_checkpoint

WIDE = {**with_text(vocab_size=NANO_VOCAB), "canvas_length": 12}  # nano's tokenizer fits, an end is rare


def test_ours_says_what_the_package_says(nano):
    engine = ENGINES["mlx_dgemma"](Setup(options={"max_denoising_steps": 3}))
    ids = engine.ids("reverse apple river stone", False)
    answer = engine.answer(ids, 7)
    responses = list(stream_generate(*nano, "reverse apple river stone", seed=7, max_denoising_steps=3))
    last = responses[-1]
    assert (answer.text, answer.tokens) == ("".join(r.text for r in responses), last.generation_tokens)
    assert (answer.denoise_forwards, answer.encode_forwards) == (last.denoise_forwards, 1)
    assert answer.canvases == 1 and answer.finish_reason == "stop" and answer.verify_passes == 0
    assert engine.config.max_denoising_steps == 3


def test_ar_mode_with_a_drafter_is_counted_and_says_the_same():
    plain = Setup(mode="ar", options={"temperature": 0.0})
    drafting = replace(plain, options={"temperature": 0.0, "drafter": "lookup", "draft_width": 8})
    alone, drafted = (ENGINES["mlx_dgemma"](setup) for setup in (plain, drafting))
    request = "set age=7 in " + '{"name": "Ann", "age": 31, "city": "Oslo"}'
    ids = alone.ids(request, False)
    a, b = alone.answer(ids, 0), drafted.answer(ids, 0)
    assert (a.text, a.tokens, a.canvases) == (b.text, b.tokens, b.canvases) and a.canvases == 0
    assert b.encode_forwards < a.encode_forwards and 0 < b.accepted <= b.drafted and b.verify_passes > 0
    assert drafting.facts(drafted.config)["drafter"] == "lookup"


def test_several_canvases_are_counted(tmp_path):
    setup = Setup(model=str(write_checkpoint(tmp_path, WIDE)), max_tokens=30, options={"max_denoising_steps": 2})
    engine = ENGINES["mlx_dgemma"](setup)
    answer = engine.answer(engine.ids("apple", False), 0)
    assert (answer.canvases, answer.denoise_forwards, answer.encode_forwards) == (3, 6, 3)
    assert (answer.tokens, answer.finish_reason) == (30, "length")


def test_a_prompt_too_long_is_said_when_it_is_read(tmp_path):
    engine = ENGINES["mlx_dgemma"](Setup(model=str(write_checkpoint(tmp_path, WIDE))))
    with pytest.raises(InputError, match="the context of 512"):
        engine.ids("apple " * 600, False)


@pytest.mark.parametrize(
    ("mode", "options", "greedy"),
    [
        ("ar", {"temperature": 0.0}, True),
        ("ar", {"top_k": 1}, True),
        ("ar", {}, False),
        ("diffusion", {"temperature": 0.0}, False),
    ],
)
def test_what_makes_no_draw_needs_no_seeds(mode, options, greedy):
    assert is_greedy(mode, GenerationConfig().replace(**options)) is greedy


def test_what_other_engines_lack():
    for name in ("transformers", "mlx-vlm"):
        require_possible(name, Setup(options={"entropy_bound": 0.2, "drafter": None}))
        with pytest.raises(UsageError, match="--mode ar is judged in this package alone"):
            require_possible(name, Setup(mode="ar"))


def test_transformers_is_given_no_weights_of_mlx(tmp_path):
    folder = convert("nano", tmp_path / "q4", quantize=True, progress=False)
    with pytest.raises(InputError, match=r"quantised as MLX does, .* --dequantize --export hf"):
        ENGINES["transformers"](Setup(model=str(folder)))
    written = convert(folder, tmp_path / "floats", dequantize=True, export="hf", progress=False)
    require_readable(ModelConfig.read(written), "what that says to do")


def test_a_fingerprint_is_of_the_weights(tmp_path):
    model = random_model(WIDE)
    first = fingerprint(write_checkpoint(tmp_path / "a", WIDE, model))
    assert fingerprint(write_checkpoint(tmp_path / "b", WIDE, model)) == first, "whatever the folder is called"
    name, weight = tree_flatten(model.parameters())[-1]
    model.load_weights([(name, weight + 0.01)], strict=False)
    assert fingerprint(write_checkpoint(tmp_path / "a", WIDE, model)) != first
    assert ENGINES["mlx_dgemma"](Setup()).facts()["weights"] == fingerprint(EMBEDDED)


# --- all of them


@pytest.fixture(scope="module")
def all_engines():
    return {name: make(Setup(options={"max_denoising_steps": 12})) for name, make in ENGINES.items()}


@pytest.mark.reference
def test_all_engines_are_given_the_same_ids(all_engines):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(all_engines["transformers"].folder)
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "reverse apple river stone"}]
    for prompt in (said, said[1:], said[1]["content"]):
        for thinking in (False, True):
            messages = said[1:] if isinstance(prompt, str) else prompt
            expected = theirs.apply_chat_template(
                messages, add_generation_prompt=True, enable_thinking=thinking, return_dict=False
            )
            assert {name: engine.ids(prompt, thinking) for name, engine in all_engines.items()} == dict.fromkeys(
                ENGINES, expected
            )


@pytest.mark.reference
def test_all_engines_know_the_answer_and_count_alike(all_engines):
    for name, engine in all_engines.items():
        answer = engine.answer(engine.ids("reverse apple river stone", False), 3)
        assert (answer.text, answer.finish_reason) == ("stone river apple", "stop"), name
        assert (answer.canvases, answer.encode_forwards, answer.tokens) == (1, 1, 4), name
        assert 2 <= answer.denoise_forwards <= 12 and engine.config.max_denoising_steps == 12, name
        assert engine.facts()["model"] == "nano" and engine.facts()["dtype"] == "float32", name
        assert engine.facts()["weights"] == fingerprint(EMBEDDED), name


@pytest.mark.reference
@pytest.mark.parametrize("name", ENGINES)
def test_all_engines_count_several_canvases_alike(name, tmp_path):
    folder = write_checkpoint(tmp_path, WIDE)
    setup = Setup(model=str(folder), max_tokens=30, options={"max_denoising_steps": 2, "stability_threshold": 2})
    engine = ENGINES[name](setup)
    answer = engine.answer(engine.ids("apple", False), 0)
    assert (answer.canvases, answer.denoise_forwards, answer.encode_forwards) == (3, 6, 3)
    assert (answer.tokens, answer.finish_reason) == (30, "length")


@pytest.mark.reference
def test_steps_of_transformers_are_those_it_tells(all_engines, monkeypatch):
    engine, told = all_engines["transformers"], []
    generate = engine._model.generate

    def listening(prompt, **options):
        output = generate(prompt, **options)
        written = (output.sequences[0, prompt.shape[1] :] != engine.config.pad_token_id).sum()
        told.append(round(float(written / output.tokens_per_forward)))
        return output

    monkeypatch.setattr(engine._model, "generate", listening)
    answers = [
        engine.answer(engine.ids(text, False), 0) for text in ("reverse apple river stone", "json age=31", "12 + 30")
    ]
    assert [answer.denoise_forwards for answer in answers] == told


@pytest.mark.reference
def test_dtypes_and_devices_that_are_not_there(monkeypatch):
    assert ENGINES["transformers"](Setup(dtype="bfloat16")).facts()["dtype"] == "bfloat16"
    with pytest.raises(UsageError, match="torch sees no CUDA device here"):
        import torch

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        engines.Transformers(Setup(device="gpu"))
