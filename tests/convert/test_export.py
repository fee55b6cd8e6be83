"""Exports: to the HF layout, and ar mode as a Gemma 4."""

import json
import struct

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_dgemma
from benchmarks.measure import spare_compiler
from mlx_dgemma.errors import UsageError
from mlx_dgemma.loading import load_model
from tests.convert.fixtures import QUIET, WIDE, contents, hf_tensors, per_expert, quick_disk, tensors_of, write
from tests.convert.ways import VISION_CONFIG, WAYS, command, same
from tests.helpers import NANO_VOCAB

_quick_disk = pytest.fixture(autouse=True)(quick_disk)


@pytest.mark.parametrize("spelling", [lambda t: t, per_expert])
def test_export_hf_is_the_original(spelling, tmp_path):
    original = hf_tensors(WIDE)
    source = write(tmp_path / "in", WIDE | {"vision_config": VISION_CONFIG}, spelling(original))
    mlx = mlx_dgemma.convert(source, tmp_path / "mlx", quant_recipe="bf16", **QUIET)
    out = mlx_dgemma.convert(mlx, tmp_path / "out", export="hf", **QUIET)
    stored = tensors_of(out)
    assert stored.keys() == original.keys()
    assert all(same(stored[name], array) for name, array in original.items())
    assert json.loads((out / "config.json").read_text())["vision_config"] == VISION_CONFIG
    with (out / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header["__metadata__"] == {"format": "pt"}


def test_export_hf_of_a_quantised_checkpoint_takes_dequantize(quantised, tmp_path):
    with pytest.raises(UsageError, match="is quantised"):
        mlx_dgemma.convert(quantised, tmp_path / "out", export="hf", **QUIET)
    out = mlx_dgemma.convert(quantised, tmp_path / "out", export="hf", dequantize=True, **QUIET)
    assert tensors_of(out).keys() == hf_tensors(WIDE).keys()


QUANTISED = [way for way in WAYS if way not in ("bf16", "8bit", "-q", "-q 6 bits")]


@pytest.mark.parametrize("way", QUANTISED)
def test_export_gemma4_quantised_gives_our_logits(way, tmp_path, capsys, monkeypatch):
    """But for MLX's embedding, which is bfloat16 in mx modes (logits are then off by 0.02)."""
    embedding = nn.QuantizedEmbedding.__call__
    monkeypatch.setattr(nn.QuantizedEmbedding, "__call__", lambda self, ids: embedding(self, ids).astype(mx.float32))
    spare_compiler()
    try:
        for out, export in (("ours", []), ("theirs", ["--export", "gemma4"])):
            argv = ["--hf-path", "nano", "--mlx-path", tmp_path / out, "--dtype", "float32", *WAYS[way], *export]
            assert command(capsys, *argv)[0] == 0
        ours = load_model(tmp_path / "ours", dtype=mx.float32)
        theirs, _ = mlx_lm.load(str(tmp_path / "theirs"))
        theirs.set_dtype(mx.float32)
        ids = mx.array([np.random.default_rng(0).integers(3, NANO_VOCAB, 120).tolist()])
        got = theirs(ids)
        difference = mx.abs(got - ours.logits(ours.encode(ids, ours.make_cache()))).max().item()
        assert difference <= 1e-3
        assert any("scales" in path for path, _ in tree_flatten(theirs.parameters()))
    finally:
        mx.enable_compile()


@pytest.mark.parametrize("way", QUANTISED)
def test_export_gemma4_of_a_quantised_checkpoint_goes_over_as_it_is(way, tmp_path, capsys):
    """No requantisation: what is written is what the floats give at once, and what the source holds."""
    for out, argv in (
        ("quantised", ["--hf-path", "nano", *WAYS[way]]),
        ("straight", ["--hf-path", "nano", *WAYS[way], "--export", "gemma4"]),
        ("through", ["--hf-path", tmp_path / "quantised", "--export", "gemma4", "--verify"]),
    ):
        assert command(capsys, *argv, "--mlx-path", tmp_path / out)[0] == 0
    straight, through = (contents(tmp_path / name) for name in ("straight", "through"))
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert through[name] == straight[name], name


def test_what_goes_over_as_it_is_keeps_its_dtype(quantised, tmp_path, capsys):
    argv = ["--hf-path", quantised, "--mlx-path", tmp_path / "out", "--export", "gemma4", "--dtype", "float16"]
    status, out, err = command(capsys, *argv)
    assert (status, out) == (2, "") and "leave dtype out" in err and len(err.splitlines()) == 1
