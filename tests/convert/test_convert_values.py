"""What the converter writes, value by value: the nearest of the mode, or bit for bit what was there."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

import mlx_dgemma
from mlx_dgemma.convert.names import is_vision, mlx_name
from mlx_dgemma.convert.recipes import RECIPES
from mlx_dgemma.loading import EMBEDDED, load_model
from tests.convert.fixtures import DATA, QUIET, VISION, quick_disk, tensors_of
from tests.convert.ways import MODES, VISION_CONFIG, WAYS, command, same, with_vision

_quick_disk = pytest.fixture(autouse=True)(quick_disk)


def grid(mode: str, bits: int) -> np.ndarray:
    """What a code can stand for before scale and bias, in order."""
    if mode == "affine":
        return np.arange(2**bits, dtype=np.float64)
    if mode == "mxfp8":
        every = np.array(mx.from_fp8(mx.arange(256).astype(mx.uint8), mx.float32), np.float64)
        return np.unique(every[np.isfinite(every) & (abs(every) <= 448)])
    half = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return np.unique(np.concatenate([half, -half]))


def numbers_of(scales: mx.array, mode: str) -> np.ndarray:
    """Scales as numbers: e8m0 powers of two, nvfp4's e4m3."""
    if mode == "affine":
        return np.array(scales.astype(mx.float32), np.float64)
    if mode == "nvfp4":
        return np.array(mx.from_fp8(scales, mx.float32), np.float64)
    return np.exp2(np.array(scales, np.float64) - 127)


def assert_near(source: mx.array, stored: dict[str, mx.array], stem: str, settings: dict) -> None:
    """Each value is the nearest to the source that its group's scale allows, which reaches almost all of them."""
    mode, bits, size = settings["mode"], settings["bits"], settings["group_size"]
    parts = [stored[f"{stem}.{part}"] for part in ("weight", "scales", *(["biases"] if mode == "affine" else []))]
    got = mx.dequantize(*parts, **settings)
    x, got = (np.array(a.astype(mx.float32), np.float64).reshape(-1, size) for a in (source, got))
    scale = numbers_of(parts[1], mode).reshape(-1, 1)
    bias = numbers_of(parts[2], mode).reshape(-1, 1) if mode == "affine" else 0.0
    values, some = grid(mode, bits), np.where(scale == 0, 1.0, scale)
    code = (x - bias) / some
    place = np.clip(np.searchsorted(values, code), 1, len(values) - 1)
    nearest = np.minimum(abs(code - values[place - 1]), abs(code - values[place]))
    precision = {mx.float32: 2.0**-22, mx.bfloat16: 2.0**-7, mx.float16: 2.0**-9}[source.dtype]
    slack = precision * (abs(scale) * abs(values).max() + abs(bias))  # scales and results are stored rounded
    assert (abs(got - x) <= nearest * abs(some) + slack).all(), stem
    beyond = np.maximum(code - values[-1], values[0] - code) * abs(some) - slack
    reach = 1.0 if mode == "affine" else values[-1] / 2  # steps: scales are rounded to what is stored
    assert (beyond <= reach * abs(some)).all(), stem


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", [*RECIPES, *MODES])
def test_values_are_the_nearest_of_the_mode_and_the_rest_is_bit_equal(way, dtype, tmp_path, capsys):
    folder = with_vision(tmp_path / "in", getattr(mx, dtype))
    assert command(capsys, "--hf-path", folder, "--mlx-path", tmp_path / "out", *WAYS[way])[0] == 0
    source, stored = tensors_of(folder), tensors_of(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vision_config"] == VISION_CONFIG
    assert config["dtype"] == ("bfloat16" if way == "bf16" else dtype)
    block = config.get("quantization") or {}
    count = 0
    for name, array in source.items():
        new = mlx_name(name)
        stem = new.removesuffix(".weight")
        if f"{stem}.scales" not in stored:
            assert same(stored[new], array.astype(mx.bfloat16) if way == "bf16" else array), name
            assert array.ndim < 2 or is_vision(name) or way == "bf16" or block[stem] is False
            continue
        settings = block.get(stem, {key: block[key] for key in ("group_size", "bits", "mode")})
        assert_near(array, stored, stem, settings)
        count += 1
    assert VISION.keys() <= stored.keys()
    assert (count == 0) == (way == "bf16")


def test_a_value_that_is_not_the_nearest_is_seen(wide, tmp_path):
    out = mlx_dgemma.convert(wide, tmp_path / "out", quantize=True, q_bits=8, **QUIET)
    stored, name = tensors_of(out), "model.decoder.layers.0.self_attn.q_proj"
    settings = {"mode": "affine", "bits": 8, "group_size": 64}
    source = tensors_of(wide)[f"{name}.weight"]
    assert_near(source, stored, name, settings)
    with pytest.raises(AssertionError):
        assert_near(source, stored | {f"{name}.weight": stored[f"{name}.weight"] ^ (1 << 6)}, name, settings)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_floats_of_another_dtype(dtype, tmp_path):
    out = mlx_dgemma.convert("nano", tmp_path / "out", dtype=dtype, **QUIET)
    stored = tensors_of(out)
    for name, array in tensors_of(EMBEDDED).items():
        assert same(stored[mlx_name(name)], array.astype(getattr(mx, dtype))), name
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert load_model(out, dtype=mx.float32) is not None


def test_the_dtype_of_scales_and_of_what_stays(wide, tmp_path):
    out = mlx_dgemma.convert(wide, tmp_path / "out", quant_recipe="default", dtype="float16", **QUIET)
    assert {array.dtype for array in tensors_of(out).values()} == {mx.float16, mx.uint32}


def test_dequantised_again(wide, quantised, tmp_path):
    out = mlx_dgemma.convert(quantised, tmp_path / "out", dequantize=True, **QUIET)
    config = json.loads((out / "config.json").read_text())
    assert not {"quantization", "quantization_config"} & config.keys()
    stored, words = tensors_of(out), tensors_of(quantised)
    for name, array in tensors_of(wide).items():
        new = mlx_name(name)
        stem = new.removesuffix(".weight")
        if f"{stem}.scales" in words:
            parts = [words[f"{stem}.{part}"] for part in ("weight", "scales", "biases")]
            array = mx.dequantize(*parts, group_size=64, bits=8)
        assert same(stored[new], array), name


@pytest.mark.parametrize("options", [{"quantize": True, "q_mode": "nvfp4"}, {"quant_recipe": "default"}])
def test_quantised_anew_is_as_from_the_floats_it_stands_for(quantised, options, tmp_path):
    floats = mlx_dgemma.convert(quantised, tmp_path / "floats", dequantize=True, **QUIET)
    through = tensors_of(mlx_dgemma.convert(floats, tmp_path / "through", **options, **QUIET))
    straight = tensors_of(mlx_dgemma.convert(quantised, tmp_path / "straight", **options, **QUIET))
    assert through.keys() == straight.keys()
    assert all(same(straight[name], array) for name, array in through.items())


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
@pytest.mark.parametrize("options", [{"dequantize": True}, {"quantize": True, "q_mode": "nvfp4", "dtype": "float32"}])
def test_compressed_tensors(form, options, tmp_path):
    expected = mx.load(str(DATA / form / "expected.safetensors"))
    source = tmp_path / form
    shutil.copytree(DATA / form, source, ignore=shutil.ignore_patterns("expected*"))
    if "quantize" in options:  # nvfp4's routers are in groups of 64, which are wider than this model
        rules = [{"pattern": "*.router.proj", "bits": False}, {"pattern": "*", "mode": "nvfp4"}]
        (tmp_path / "rules.json").write_text(json.dumps(rules))
        options = {"quant_recipe": str(tmp_path / "rules.json"), "dtype": "float32"}
    out = mlx_dgemma.convert(source, tmp_path / "out", **options, **QUIET)
    stored = tensors_of(out)
    for name, array in expected.items():
        new = mlx_name(name)
        stem = new.removesuffix(".weight")
        if "dequantize" in options:
            assert same(stored[new], array.astype(stored[new].dtype)) and stored[new].dtype == mx.bfloat16, name
        else:
            assert_near(array, stored, stem, {"mode": "nvfp4", "bits": 4, "group_size": 16})
    model = load_model(out)
    assert bool(mx.isfinite(model.logits(model.encode(mx.array([[3, 1, 4]]), model.make_cache()))).all())
