"""The causal pass as a plain Gemma 4: mlx-lm's own model gives the same logits and the same greedy text.

mlx-lm turns sliding layers by MLX's powers of theta, which drift from ours with the position: texts
here are shorter than 512.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from benchmarks.measure import spare_compiler
from mlx_dgemma import generate
from mlx_dgemma.config import GenerationConfig, ModelConfig
from mlx_dgemma.convert import conversion
from mlx_dgemma.convert.command import main
from mlx_dgemma.convert.configs import gemma4_config
from mlx_dgemma.decoding.causal import decode
from mlx_dgemma.draws import Draws
from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.loading import EMBEDDED, load_model
from mlx_dgemma.model import DiffusionGemma
from mlx_dgemma.prompt import encode_prompt
from tests.helpers import PROMPTS, TINY, with_text, write_checkpoint
from tests.test_loading import shard

TOLERANCE = 1e-3  # of logits; measured: 3e-5 of 20
TIE = 2 * TOLERANCE  # ids whose logits are nearer than two errors may change places
SLIDING, FULL = "sliding_attention", "full_attention"
ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 3_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 70_000.0, "partial_rotary_factor": 0.5},
}
TINY_MODELS = {
    "tiny": TINY,
    "the last is made full": with_text(num_hidden_layers=4, layer_types=[SLIDING] * 4, sliding_window=4),
    "one full layer": with_text(num_hidden_layers=1, layer_types=[FULL], top_k_experts=1),
    "full layers between": with_text(num_hidden_layers=5, layer_types=[FULL, SLIDING, FULL, FULL, SLIDING]),
    "two full heads": with_text(num_global_key_value_heads=2, global_head_dim=8, sliding_window=33),
    "four heads, other angles": with_text(num_key_value_heads=4, rope_parameters=ROPE, top_k_experts=4),
}
Step = Callable[[Sequence[int]], np.ndarray]  # the next ids of a text -> their logits (L, V)


@pytest.fixture(autouse=True)
def _compiler():
    """mlx-lm compiles elementwise functions, which on a CPU takes a C++ compiler."""
    spare_compiler()
    yield
    mx.enable_compile()


def write_gemma4(source: Path, out: Path) -> None:
    conversion.convert(source, out, export="gemma4", progress=False)


def causal(model: DiffusionGemma) -> Step:
    """Our logits, text after text behind one cache."""
    cache = model.make_cache()
    return lambda ids: np.array(model.logits(model.encode(mx.array([ids]), cache)))[0]


def plain(model) -> Step:
    """mlx-lm's."""
    cache = model.make_cache()
    return lambda ids: np.array(model(mx.array([ids]), cache=cache))[0]


def in_chunks(step: Step, ids: list[int], size: int) -> np.ndarray:
    """The logits of a text run `size` tokens at a time, (len(ids), V)."""
    return np.concatenate([step(ids[first : first + size]) for first in range(0, len(ids), size)])


def greedy(step: Step, prompt: list[int], count: int) -> list[int]:
    """The most likely continuation, token by token; eos is a token like any other."""
    tokens = [int(step(prompt)[-1].argmax())]
    while len(tokens) < count:
        tokens.append(int(step(tokens[-1:])[-1].argmax()))
    return tokens


def written(model: DiffusionGemma, prompt: list[int], count: int) -> list[int]:
    """The same by ar mode itself."""
    config = GenerationConfig(temperature=0.0, max_new_tokens=count)
    draws = Draws([0], model.config.vocab_size)
    return [token.id for token in decode(model, prompt, config, draws)]


def assert_same_text(got: list[int], expected: list[int], ours: Step, prompt: list[int], tie: float) -> None:
    """Equal ids; or, where they first part, two ids whose logits differ by less than `tie`."""
    assert len(got) == len(expected)
    pairs = zip(got, expected, strict=True)
    parting = next((number for number, (a, b) in enumerate(pairs) if a != b), None)
    if parting is not None:
        last = ours([*prompt, *got[:parting]])[-1]
        margin = abs(last[got[parting]] - last[expected[parting]])
        assert margin < tie, f"token {parting}: {got[parting]}, not {expected[parting]}, by {margin:.2e}"


def opened(source: Path, out: Path):
    """(our model, mlx-lm's of the same weights), both float32."""
    write_gemma4(source, out)
    theirs, _ = mlx_lm.load(str(out), lazy=True)
    theirs.set_dtype(mx.float32)
    return load_model(source, dtype=mx.float32), theirs


def random_ids(count: int, vocab: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocab, count).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gemma4")


@pytest.fixture(scope="module", params=["nano", *TINY_MODELS])
def pair(request, folder):
    name = request.param
    source = EMBEDDED if name == "nano" else write_checkpoint(folder / name, TINY_MODELS[name])
    return opened(source, folder / f"{name} as Gemma 4")


@pytest.mark.parametrize("size", [150, 61, 1])
def test_logits_are_mlx_lms(pair, size):
    ours, theirs = pair
    ids = random_ids(min(10 * ours.config.sliding_window, 150), ours.config.vocab_size)
    got, expected = (in_chunks(step, ids, size) for step in (causal(ours), plain(theirs)))
    assert np.abs(got - expected).max() <= TOLERANCE


def test_greedy_text_is_mlx_lms(pair):
    ours, theirs = pair
    prompt = random_ids(3 * ours.config.sliding_window // 2, ours.config.vocab_size, seed=1)
    got, expected = written(ours, prompt, 40), greedy(plain(theirs), prompt, 40)
    assert_same_text(got, expected, causal(ours), prompt, TIE)


def test_nanos_answers_are_mlx_lms(nano, tmp_path):
    ours, theirs = opened(EMBEDDED, tmp_path / "out")
    for prompt in (encode_prompt(nano[1], text) for text in PROMPTS[:4]):
        got, expected = written(ours, prompt, 30), greedy(plain(theirs), prompt, 30)
        assert len(set(got)) > 4
        assert_same_text(got, expected, causal(ours), prompt, TIE)


MLX_LM = """
import json, sys
import mlx.core as mx
from mlx_lm.generate import main
mx.disable_compile()
for sys.argv[1:] in json.loads(sys.argv[1]):
    main()
"""


def test_the_command_of_mlx_lm_writes_our_greedy_answer(nano, tmp_path):
    """As the card says it: mlx_lm lets models think where their template can, ours does not."""
    quantised = conversion.convert(EMBEDDED, tmp_path / "q", quant_recipe="default", dtype="float32", progress=False)
    write_gemma4(quantised, tmp_path / "out")
    said = re.search(r"--chat-template-config '(.+?)'", (tmp_path / "out" / "README.md").read_text())[1]
    argv = ["--model", str(tmp_path / "out"), "--temp", "0", "--chat-template-config", said, "--prompt"]
    prompts = ["json name=Ann age=31 city=Oslo", "json name=Bob age=44 city=Rome"]
    runs = json.dumps([[*argv, prompt] for prompt in prompts])
    done = subprocess.run([sys.executable, "-c", MLX_LM, runs], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = load_model(quantised)
    answers = [generate(model, nano[1], prompt, mode="ar", temperature=0.0) for prompt in prompts]
    assert all(answers) and answers[0] != answers[1]
    assert re.findall(r"={10}\n(.*?)\n={10}\n", done.stdout, re.DOTALL) == answers


def test_a_parting_that_is_no_tie_is_seen(pair):
    ours, _ = pair
    prompt = random_ids(20, ours.config.vocab_size)
    text = written(ours, prompt, 5)
    with pytest.raises(AssertionError, match="token 3"):
        assert_same_text([*text[:3], text[3] ^ 1, text[4]], text, causal(ours), prompt, TIE)


# --- the comparison is worth what it catches


def distance(source: Path, out: Path, spoil: Callable[..., None] = lambda theirs: None) -> np.ndarray:
    """Position by position, the largest difference to mlx-lm's logits of a text, in one chunk."""
    ours, theirs = opened(source, out)
    spoil(theirs)
    ids = random_ids(60, ours.config.vocab_size)
    return np.abs(causal(ours)(ids) - plain(theirs)(ids)).max(axis=-1)


def test_the_decoders_scalars_fail(tmp_path, monkeypatch):
    mapped = conversion.gemma4_name

    def decoders(name):
        if not name.endswith("layer_scalar"):
            return mapped(name)
        return name.replace("decoder.", "") if "decoder" in name else None

    monkeypatch.setattr(conversion, "gemma4_name", decoders)
    assert distance(EMBEDDED, tmp_path / "nano").min() > TOLERANCE
    assert distance(write_checkpoint(tmp_path / "in"), tmp_path / "out").min() > TOLERANCE


def test_a_window_off_by_one_fails_past_the_window(tmp_path, monkeypatch):
    config = conversion.gemma4_config

    def narrow(*given):
        made = config(*given)
        return made | {"sliding_window": made["sliding_window"] - 1}

    monkeypatch.setattr(conversion, "gemma4_config", narrow)
    window = TINY["text_config"]["sliding_window"]
    per_position = distance(write_checkpoint(tmp_path / "in"), tmp_path / "out")
    assert per_position[: window - 1].max() <= TOLERANCE
    assert per_position[window - 1 :].min() > TOLERANCE


def test_a_router_without_its_scale_fails(tmp_path):
    def spoil(theirs):
        for layer in theirs.layers:
            layer.router.scale = mx.ones_like(layer.router.scale)

    assert distance(write_checkpoint(tmp_path / "in"), tmp_path / "out", spoil).max() > TOLERANCE


# --- the folder


def test_a_sharded_source_gives_the_same_weights(tmp_path):
    write_gemma4(write_checkpoint(tmp_path / "in"), tmp_path / "whole")
    shard(tmp_path / "in")
    write_gemma4(tmp_path / "in", tmp_path / "sharded")
    whole, sharded = (mlx_lm.load(str(tmp_path / name))[0] for name in ("whole", "sharded"))
    ids = mx.array([random_ids(30, 131)])
    assert mx.array_equal(whole(ids), sharded(ids))


def test_tokenizer_and_ends_are_the_checkpoints(tmp_path):
    write_gemma4(EMBEDDED, tmp_path / "out")
    _, tokenizer = mlx_lm.load(str(tmp_path / "out"), lazy=True)
    assert tokenizer.eos_token_ids == {1, 6}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 6]
    assert tokenizer.chat_template == (EMBEDDED / "chat_template.jinja").read_text()


def test_an_existing_folder_is_left_alone(tmp_path, capsys):
    with pytest.raises(UsageError, match="exists already"):
        write_gemma4(EMBEDDED, tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["--hf-path", "nano", "--mlx-path", str(tmp_path), "--export", "gemma4"])
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_gemma_4_cannot_say_is_refused():
    kinds = {"num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, FULL]}
    raw = with_text(**kinds, per_layer_config={"0": {"head_dim": 6}, "2": {"head_dim": 16, "num_key_value_heads": 1}})
    with pytest.raises(InputError, match="layers of one kind have different heads"):
        gemma4_config(ModelConfig.from_dict(raw), (1,), "float32")
