"""The causal pass against transformers' own Gemma 4 in float64, on checkpoints written for it.

The measure is that of `mlx_dgemma.parity`: our error in float32 is at most 4 times what transformers
itself makes of float32. Needs torch: without it these fail, they never skip.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma import layers
from mlx_dgemma.loading import EMBEDDED, load_model
from mlx_dgemma.model import DiffusionGemma, Taps
from mlx_dgemma.parity.bundle import SHIPPED as BUNDLES
from mlx_dgemma.parity.bundle import Bundle
from mlx_dgemma.parity.check import MAX_RATIO, Measure, measures
from mlx_dgemma.prompt import encode_prompt
from tests.convert.test_gemma4 import assert_same_text, causal, random_ids, write_gemma4, written
from tests.helpers import PROMPTS
from tests.parity.test_negative_controls import rope_by_base  # noqa: F401

pytestmark = pytest.mark.reference


# tokens of a text: many windows, in `window` and `nano` enough for the cache to drop rows; `full` has
# no window, and `long` shows drifting RoPE
LENGTHS = {"nano": 700, "window": 700, "full": 40, "spelled": 60, "long": 2101, "batch": 60, "short": 50}
GREEDY = 40  # tokens continued


@dataclass
class Case:
    """A checkpoint, a text, what transformers makes of it, and transformers' model."""

    source: Path
    ids: list[int]
    bundle: Bundle  # truth and floors
    theirs: object

    def load(self) -> DiffusionGemma:
        """Our model, freshly loaded so that a test may damage it."""
        return load_model(self.source, dtype=mx.float32)

    def measure(self, model: DiffusionGemma, size: int = 10_000) -> list[Measure]:
        """Our error in every quantity, the text run `size` tokens at a time."""
        return measures(self.bundle, walk(model, self.ids, size))

    @property
    def tie(self) -> float:
        """The margin below which two float32 logits may change places."""
        return 2 * MAX_RATIO * self.bundle.floor("logits").max


def walk(model: DiffusionGemma, ids: list[int], size: int) -> dict[str, np.ndarray]:
    """Every layer's output but the last one's, the norm's and the logits, each (1, L, ...)."""
    cache, last = model.make_cache(), len(model.layers) - 1
    seen: dict[str, list[mx.array]] = {}
    for first in range(0, len(ids), size):
        taps = Taps(range(last + 1))
        hidden = model.encode(mx.array([ids[first : first + size]]), cache, taps)
        outputs = mx.split(taps.features, last + 1, axis=-1)[:last]
        for name, array in _named([*outputs, hidden, model.logits(hidden)]).items():
            seen.setdefault(name, []).append(array)
    return {name: np.array(mx.concatenate(arrays, axis=1)) for name, arrays in seen.items()}


def walk_transformers(model, ids: list[int]) -> dict[str, np.ndarray]:
    """The same as this model computes it, in one chunk without a cache."""
    import torch

    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    # embeddings first; the last is after the norm
    return {name: array.double().numpy() for name, array in _named([*out.hidden_states[1:], out.logits]).items()}


def _named(outputs: list) -> dict:
    *inner, norm, logits = outputs
    return {f"layer.{index}": output for index, output in enumerate(inner)} | {"norm": norm, "logits": logits}


def opened(folder: Path):
    """transformers' model of a written folder, float32 throughout."""
    import torch
    from transformers import AutoModelForCausalLM

    model, loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    assert type(model).__name__ == "Gemma4ForCausalLM"
    assert not any(loaded.values()), loaded
    return model.eval()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """The case of a name, made once."""
    from mlx_dgemma.parity.record import _floor
    from mlx_dgemma.parity.reference import in_float64, neighbours

    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        source = EMBEDDED if name == "nano" else BUNDLES / name / "model"
        folder = tmp_path_factory.mktemp(name) / "gemma4"
        write_gemma4(source, folder)
        theirs = opened(folder)
        ids = random_ids(LENGTHS[name], theirs.config.vocab_size)
        with in_float64(theirs) as exact:
            truth = walk_transformers(exact, ids)
        singles = [walk_transformers(model, ids) for model in chain([theirs], neighbours(theirs, 0))]
        floors = {quantity: _floor(quantity, singles, truth, None) for quantity in truth}
        return Case(source, ids, Bundle(folder, {"floors": floors}, truth), theirs)

    def of(name: str) -> Case:
        if name not in made:
            made[name] = make(name)
        return made[name]

    return of


def failures(judged: list[Measure]) -> list[str]:
    return [f"{measure.name}: {measure.ratio:.2f}" for measure in judged if not measure.passed]


@pytest.mark.parametrize("size", [10_000, 300, 41])
@pytest.mark.parametrize("name", LENGTHS)
def test_as_near_to_the_truth_as_transformers(case, name, size):
    given = case(name)
    assert failures(given.measure(given.load(), size)) == []


@pytest.mark.parametrize("name", [name for name in LENGTHS if name != "nano"])
def test_greedy_text_is_transformers(case, name):
    given = case(name)
    model = given.load()
    assert_greedy(given, model, given.ids[: min(2 * model.config.sliding_window - 1, len(given.ids))])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_nanos_greedy_text_is_transformers(case, nano, prompt):
    given = case("nano")
    assert_greedy(given, given.load(), encode_prompt(nano[1], prompt))


def assert_greedy(given: Case, model: DiffusionGemma, prompt: list[int]) -> None:
    import torch

    given.theirs.generation_config.eos_token_id = None  # a token like any other, on both sides
    out = given.theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=GREEDY, use_cache=True)
    expected = out[0, len(prompt) :].tolist()
    assert_same_text(written(model, prompt, GREEDY), expected, causal(model), prompt, given.tie)


# --- the check is worth what it catches


@pytest.mark.parametrize("name", ["nano", "window"])
def test_the_decoders_scalars_fail(case, name):
    given = case(name)
    model = given.load()
    for own, shared in zip(model.model.encoder.language_model.layers, model.layers, strict=True):
        own.layer_scalar = shared.layer_scalar
    assert min(measure.ratio for measure in given.measure(model)) > 1000 * MAX_RATIO


def test_a_window_off_by_one_fails(case, monkeypatch):
    start = layers.Pass.__init__

    def narrow(self, cache, window, *rest, **named):
        start(self, cache, window - 1, *rest, **named)

    monkeypatch.setattr(layers.Pass, "__init__", narrow)
    given = case("window")
    assert min(measure.ratio for measure in given.measure(given.load())) > 1000 * MAX_RATIO


def test_rope_by_base_fails_in_a_long_text(case, rope_by_base):  # noqa: F811
    given = case("long")
    assert failures(given.measure(given.load()))
