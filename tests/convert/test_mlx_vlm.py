"""mlx-vlm loads what the converter writes, as it is, and computes what we do.

Its rotary angles are MLX's powers of theta, which drift from ours with the position: texts here are shorter than 512.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_dgemma
from benchmarks.measure import spare_compiler
from mlx_dgemma.convert.recipes import DEFAULTS, RECIPES
from mlx_dgemma.loading import load_model
from tests.convert.fixtures import WIDE
from tests.helpers import random_model, write_checkpoint

pytestmark = pytest.mark.reference

TOLERANCE = 1e-3  # of logits, as the converter promises
MODES = [{"quantize": True, "q_mode": mode} for mode in DEFAULTS]
WAYS = {name: {"quant_recipe": name} for name in RECIPES} | {f"-q {way['q_mode']}": way for way in MODES}


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """MLX's quantised embedding is bfloat16 in mx modes, whatever the model is: rounding that is none of ours."""
    embedding = nn.QuantizedEmbedding.__call__
    monkeypatch.setattr(nn.QuantizedEmbedding, "__call__", lambda self, ids: embedding(self, ids).astype(mx.float32))
    spare_compiler()
    yield
    mx.enable_compile()


def differences(folder: Path, theirs: Path | None = None) -> dict[str, float]:
    """The largest between the logits of both, causal and of a canvas, without and with self-conditioning.

    Args:
        folder: what we load.
        theirs: what mlx-vlm loads; by default the same.
    """
    from mlx_vlm.utils import load_model as load

    ours, theirs = load_model(folder, dtype=mx.float32), load(theirs or folder)
    theirs.set_dtype(mx.float32)
    chance, vocab = np.random.default_rng(0), ours.config.vocab_size
    # from 13 on: nano's ids of images, before that, mlx-vlm embeds as pads
    text, canvas = (mx.array(chance.integers(13, vocab, (1, n))) for n in (300, ours.config.canvas_length))
    cache, their_cache = ours.make_cache(), theirs.make_cache()

    def head(hidden: mx.array) -> mx.array:
        return theirs._softcap(theirs.model.decoder.embed_tokens.as_linear(hidden))

    hidden, _ = theirs.model.encoder(text, cache=their_cache)
    found = {"causal": (ours.logits(ours.encode(text, cache)), head(hidden))}
    beliefs = None
    for name in ("canvas", "conditioned canvas"):
        hidden = theirs.model.decoder(canvas, cache=their_cache, self_conditioning_logits=beliefs)
        found[name] = (ours.denoise(canvas, cache, beliefs), head(hidden))
        beliefs = found[name][0]
    return {name: mx.abs(a - b).max().item() for name, (a, b) in found.items()}


@pytest.mark.parametrize("way", WAYS)
def test_nano_converted_every_way(way, tmp_path):
    out = mlx_dgemma.convert("nano", tmp_path / "out", progress=False, **WAYS[way])
    assert max(differences(out).values()) <= TOLERANCE


SPELLINGS = {
    "global keys": {},
    "per layer": {"global_head_dim": None, "num_global_key_value_heads": None}
    | {"per_layer_config": {"2": {"head_dim": 32, "num_key_value_heads": 1}}},
    "what may be left out": {"layer_types": None, "global_head_dim": None, "num_global_key_value_heads": None}
    | {"head_dim": None, "num_key_value_heads": None, "rope_parameters": None, "final_logit_softcapping": None},
    "the last is made full": {"layer_types": ["sliding_attention"] * 3},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_config_json(name, tmp_path):
    """The defaults of mlx-vlm's classes are others than transformers'."""
    changes = {key: value for key, value in (WIDE["text_config"] | SPELLINGS[name]).items() if value is not None}
    raw = {**WIDE, "text_config": changes}
    source = write_checkpoint(tmp_path / "in", raw, random_model(raw))
    assert max(differences(mlx_dgemma.convert(source, tmp_path / "out", progress=False)).values()) <= TOLERANCE


def test_a_config_that_speaks_of_a_tower_that_is_not_there(tmp_path):
    source = write_checkpoint(tmp_path / "in", WIDE | {"vision_config": {"model_type": "gemma4_vision"}})
    assert max(differences(mlx_dgemma.convert(source, tmp_path / "out", progress=False)).values()) <= TOLERANCE


def test_scalars_that_are_the_decoders_are_seen(tmp_path):
    """The tolerance is one that a mistake does not pass."""
    source = write_checkpoint(tmp_path / "in", WIDE)
    out = mlx_dgemma.convert(source, tmp_path / "out", progress=False)
    path = out / "model.safetensors"
    tensors = dict(mx.load(str(path)))
    for name in [name for name in tensors if name.startswith("model.encoder.language_model")]:
        tensors[name] = mx.array(tensors[name.replace("encoder.language_model", "decoder")])
    mx.eval(tensors)
    path.unlink()
    mx.save_safetensors(str(path), tensors, {"format": "mlx"})
    found = differences(source, out)
    assert found["causal"] > 10 * TOLERANCE
