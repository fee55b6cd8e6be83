"""The converter as a user runs it: what it writes and what it says of mistakes."""

import json
import re
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_dgemma
from benchmarks.measure import spare_compiler
from mlx_dgemma.checkpoint import INDEX, module_name
from mlx_dgemma.convert.card import Origin
from mlx_dgemma.convert.command import main
from mlx_dgemma.convert.conversion import Conversion, Options
from mlx_dgemma.convert.names import is_vision, mlx_name
from mlx_dgemma.convert.recipes import RECIPES
from mlx_dgemma.errors import UsageError
from mlx_dgemma.loading import EMBEDDED, load_model
from tests.convert.fixtures import (
    DATA,
    QUIET,
    SMALL,
    VISION,
    WIDE,
    contents,
    hf_tensors,
    per_expert,
    quick_disk,
    tensors_of,
    write,
)
from tests.helpers import NANO_VOCAB

PROMPT = "json name=Ann age=31 city=Oslo"
MODES = {  # of -q
    "-q": [],
    "-q 6 bits": ["--q-bits", "6", "--q-group-size", "32"],
    "-q 3 bits": ["--q-bits", "3", "--q-group-size", "32"],
    **{f"-q {mode}": ["--q-mode", mode] for mode in ("mxfp4", "nvfp4", "mxfp8")},
}
WAYS = {name: ["--quant-recipe", name] for name in RECIPES} | {name: ["-q", *rest] for name, rest in MODES.items()}
VISION_CONFIG = {"hidden_size": 16, "model_type": "diffusion_gemma_vision"}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def command(capsys, *argv: object) -> tuple[int, str, str]:
    """(status, stdout, stderr) of mlx_dgemma.convert, in this process."""
    status = 0
    try:
        main([str(word) for word in argv])
    except SystemExit as end:
        status = end.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def same(got: mx.array, expected: mx.array) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    bits = {4: mx.uint32, 2: mx.uint16, 1: mx.uint8}[got.itemsize]
    return bool(mx.array_equal(got.view(bits), expected.view(bits))) if got.shape else got.item() == expected.item()


def with_vision(folder: Path, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """A checkpoint whose widths every group divides, with a vision tower."""
    return write(folder, WIDE | {"vision_config": VISION_CONFIG}, hf_tensors(WIDE, dtype))


_quick_disk = pytest.fixture(autouse=True)(quick_disk)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def wide(workplace) -> Path:
    return with_vision(workplace / "wide")


@pytest.fixture(scope="module")
def quantised(workplace, wide) -> Path:
    """A folder in 8 bits."""
    return mlx_dgemma.convert(wide, workplace / "quantised", quant_recipe="8bit", **QUIET)


# --- nano, every way


def settings_of(model: nn.Module) -> dict[str, dict | bool]:
    """What loading made of each module that can be quantised."""
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return {
        path: {"group_size": leaf.group_size, "bits": leaf.bits, "mode": leaf.mode} if "scales" in leaf else False
        for path, leaf in leaves
        if "scales" in leaf or hasattr(leaf, "to_quantized")
    }


@pytest.mark.parametrize("way", WAYS)
def test_nano_every_way_by_the_command(way, tmp_path, capsys):
    out = tmp_path / "out"
    status, stdout, stderr = command(capsys, "--hf-path", "nano", "--mlx-path", out, "--verify", *WAYS[way])
    assert (status, stdout) == (0, f"{out}\n"), stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    model, tokenizer = mlx_dgemma.load(str(out))
    for mode, steps in (("diffusion", {"max_denoising_steps": 2}), ("ar", {})):
        assert isinstance(mlx_dgemma.generate(model, tokenizer, PROMPT, mode=mode, max_tokens=4, **steps), str)

    text = (out / "config.json").read_text()
    config = json.loads(text)
    block = config.get("quantization")
    assert list(config) == sorted(config)
    assert config.get("quantization_config") == block == model.config.quantization
    assert config["vision_config"] == json.loads((EMBEDDED / "config.json").read_text())["vision_config"]
    usual = {key: (block or {}).get(key) for key in ("group_size", "bits", "mode")}
    loaded = settings_of(model)
    assert {path: (block or {}).get(path, usual if block else False) for path in loaded} == loaded
    assert any(loaded.values()) == (way != "bf16")
    assert {key for key in block or {} if key not in usual} <= loaded.keys()

    stored = tensors_of(out)
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in stored.values())
    assert index["metadata"]["total_parameters"] == sum(a.size for a in tensors_of(EMBEDDED).values())

    card = (out / "README.md").read_text()
    made = f"mlx_dgemma.convert --hf-path {EMBEDDED.name} --mlx-path out {' '.join(WAYS[way])}"
    assert [line.strip() for line in card.splitlines() if "mlx_dgemma.convert" in line] == [made]
    if way in RECIPES and way != "bf16":
        assert f"quantised by {way}:" in card
    bits = 8 * index["metadata"]["total_size"] / index["metadata"]["total_parameters"]
    assert float(re.search(r": ([\d.]+) bits per weight", card)[1]) == pytest.approx(bits, abs=6e-4)
    for name in TOKENIZER:
        assert (out / name).read_bytes() == (EMBEDDED / name).read_bytes()


def test_the_function_does_what_the_command_does(tmp_path, capsys):
    (tmp_path / "function").mkdir()
    assert command(capsys, "--hf-path", "nano", "--mlx-path", tmp_path / "out", "-q", "--q-mode", "mxfp8")[0] == 0
    out = mlx_dgemma.convert("nano", tmp_path / "function" / "out", quantize=True, q_mode="mxfp8", **QUIET)
    assert out == tmp_path / "function" / "out"
    assert contents(out) == contents(tmp_path / "out")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("export", ["mlx", "hf", "gemma4"])
def test_a_generation_config_that_nobody_could_load_is_not_passed_on(export, tmp_path, capsys):
    source = tmp_path / "in"
    shutil.copytree(EMBEDDED, source)
    (source / "generation_config.json").write_text('{"eos_token_id": "x"}')
    status, out, err = command(capsys, "--hf-path", source, "--mlx-path", tmp_path / "out", "--export", export)
    assert (status, out) == (1, "") and "generation_config.json" in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
def test_a_side_file_that_is_no_json_is_not_passed_on(name, tmp_path, capsys):
    source = shutil.copytree(EMBEDDED, tmp_path / "in")
    (source / name).write_text('{"a":')
    status, out, err = command(capsys, "--hf-path", source, "--mlx-path", tmp_path / "out")
    assert (status, out) == (1, "") and f"{name}: not JSON" in err and len(err.splitlines()) == 1


def test_a_source_without_a_tokenizer_is_converted_and_that_is_said(wide, tmp_path, capsys):
    assert command(capsys, "--hf-path", wide, "--mlx-path", tmp_path / "out")[0] == 0
    mlx_dgemma.convert(wide, tmp_path / "again")
    assert "without tokenizer.json" in capsys.readouterr().err


def test_a_recipe_of_ones_own_stands_on_the_card(tmp_path):
    (tmp_path / "mine.json").write_text('[{"pattern": "*.experts.*", "bits": 3}, {"pattern": "*", "bits": false}]')
    out = mlx_dgemma.convert(EMBEDDED, tmp_path / "my model", quant_recipe=tmp_path / "mine.json", **QUIET)
    card = (out / "README.md").read_text()
    assert "--mlx-path 'my model' --quant-recipe mine.json" in card and str(tmp_path) not in card
    rules = json.loads(card[card.index("    [{") : card.index("}]") + 2])
    assert rules[0] == {"pattern": "*.experts.*", "bits": 3, "group_size": 64, "mode": "affine"}
    assert rules[1] == {"pattern": "*", "bits": False}


def test_bf16_is_bf16_whatever_it_was(wide, quantised, tmp_path):
    floats = mlx_dgemma.convert(wide, tmp_path / "f32", dtype="float32", **QUIET)
    for number, source in enumerate((floats, quantised)):
        stored = tensors_of(mlx_dgemma.convert(source, tmp_path / str(number), quant_recipe="bf16", **QUIET))
        assert {array.dtype for array in stored.values()} == {mx.bfloat16}
        assert not any(name.endswith(".scales") for name in stored)


def test_a_failed_verification_leaves_nothing(tmp_path, monkeypatch, capsys):
    """What is not what the source says never gets the name of the output."""
    real = mx.quantize
    monkeypatch.setattr(
        mx, "quantize", lambda *a, **k: [part * 2 if part.dtype != mx.uint32 else part for part in real(*a, **k)]
    )
    status, out, err = command(capsys, "--hf-path", "nano", "--mlx-path", tmp_path / "out", "-q", "--verify")
    assert (status, out) == (1, "") and "is not what the source has" in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_card_names_what_was_converted_and_no_path(tmp_path):
    source = shutil.copytree(EMBEDDED, tmp_path / "secret" / "mine")
    out = mlx_dgemma.convert(source, tmp_path / "out", quantize=True, **QUIET)
    card = (out / "README.md").read_text()
    assert "`mine` (float)" in card and "secret" not in card and str(tmp_path) not in card
    assert "base_model: google/diffusiongemma-26B-A4B-it" in card and "--model out " in card
    conversion = Conversion(EMBEDDED, Options())
    card = conversion.files(Origin("someone/tuned", "v2"), "me/tuned-mlx")["README.md"].decode()
    assert "--hf-path someone/tuned --mlx-path tuned-mlx --revision v2" in card
    assert "base_model: someone/tuned" in card and "# tuned-mlx" in card and "--model me/tuned-mlx " in card


def test_8_bits_are_the_recipe_of_that_name(tmp_path, capsys):
    for out, how in (("q", ["-q", "--q-bits", "8"]), ("recipe", ["--quant-recipe", "8bit"])):
        assert command(capsys, "--hf-path", "nano", "--mlx-path", tmp_path / out, *how)[0] == 0
    for name in ("model.safetensors", "config.json", INDEX):
        assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "recipe" / name).read_bytes()


# --- values


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


# --- exports


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


# --- options

MISTAKES = {
    "-q and --dequantize": (["-q", "--dequantize"], 2, "contradict"),
    "recipe and --dequantize": (["--quant-recipe", "default", "-d"], 2, "contradict"),
    "bits without -q": (["--q-bits", "4"], 2, "q_bits"),
    "group without -q": (["--q-group-size", "64"], 2, "q_group_size"),
    "mode without -q": (["--q-mode", "mxfp4"], 2, "q_mode"),
    "recipe and bits": (["--quant-recipe", "default", "--q-bits", "4"], 2, "q_bits"),
    "recipe, -q and bits": (["-q", "--quant-recipe", "default", "--q-bits", "4"], 2, "q_bits"),
    "recipe and -q": (["-q", "--quant-recipe", "default"], 2, "choose one"),
    "an empty recipe": (["--quant-recipe", ""], 2, "no such recipe"),
    "an empty name": (["--hf-path", ""], 1, "the name of the model is empty"),
    "an empty output": (["--mlx-path", ""], 2, "must be a path"),
    "an output of too long a name": (["--mlx-path", "x" * 300], 1, "name another output"),
    "a revision of a folder": (["--revision", "v2"], 2, "is of a Hub repository"),
    "hf of what is quantised": (["--hf-path", "{quantised}", "--export", "hf"], 2, "say --dequantize"),
    "a Hub id that the Hub does not have": (["--upload-repo", "a/b--c..d"], 2, "upload_repo"),
    "bits of a mode": (["-q", "--q-mode", "mxfp4", "--q-bits", "8"], 2, "bits in mode mxfp4"),
    "group of a mode": (["-q", "--q-mode", "nvfp4", "--q-group-size", "64"], 2, "group_size in mode nvfp4"),
    "bits that do not exist": (["-q", "--q-bits", "7"], 2, "bits"),
    "bits 0": (["-q", "--q-bits", "0"], 2, "bits"),
    "group 0": (["-q", "--q-group-size", "0"], 2, "group_size"),
    "bits no number": (["-q", "--q-bits", "four"], 2, "four"),
    "unknown mode": (["-q", "--q-mode", "int4"], 2, "int4"),
    "unknown recipe": (["--quant-recipe", "magic"], 2, "magic: no such recipe"),
    "unknown dtype": (["--dtype", "int8"], 2, "int8"),
    "unknown export": (["--export", "gguf"], 2, "gguf"),
    "unknown flag": (["--magic"], 2, "--magic"),
    "hf and -q": (["--export", "hf", "-q"], 2, "export hf"),
    "hf and a recipe": (["--export", "hf", "--quant-recipe", "default"], 2, "export hf"),
    "quantised as it is": (["--hf-path", "{quantised}"], 2, "is quantised"),
    "quantised with another dtype": (["--hf-path", "{quantised}", "--dtype", "float16"], 2, "is quantised"),
    "existing output": (["--mlx-path", "{there}"], 2, "exists already"),
    "output is a file": (["--mlx-path", "{file}"], 2, "exists already"),
    "output in no folder": (["--mlx-path", "{there}/no/out"], 2, "not a folder"),
    "missing source": (["--hf-path", "/no/such/folder"], 1, "/no/such/folder"),
    "source is a file": (["--hf-path", "{file}"], 1, "is a file"),
    "empty source": (["--hf-path", "{there}"], 1, "config.json: no such file"),
    "hub without network": (["--hf-path", "nobody/nothing"], 1, "nobody/nothing"),
    "group that does not divide": (["--hf-path", "{odd}", "-q"], 1, "groups of 64 do not divide"),
    "recipe file in no JSON": (["--quant-recipe", "{file}"], 1, "not a recipe in JSON"),
    "recipe is a folder": (["--quant-recipe", "{there}"], 2, "no such recipe"),
    "recipe rule that matches nothing": (["--quant-recipe", "{rules}"], 1, "matches no module"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(name, quantised, tmp_path, capsys):
    argv, expected, words = MISTAKES[name]
    places = {"there": tmp_path / "there", "file": tmp_path / "file", "rules": tmp_path / "rules.json"}
    places |= {"odd": write(tmp_path / "odd", SMALL, hf_tensors(SMALL)), "quantised": quantised}
    places["there"].mkdir()
    places["file"].write_text("{")
    places["rules"].write_text('[{"pattern": "*.nothing", "bits": 4}]')
    before = sorted(tmp_path.rglob("*"))
    argv = ["--hf-path", EMBEDDED, "--mlx-path", tmp_path / "out", *(word.format(**places) for word in argv)]
    status, out, err = command(capsys, *argv)
    assert (status, out) == (expected, "")
    assert len(err.splitlines()) == 1 and words in err and "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_modules_and_tensors_of_a_conversion_are_loadings(quantised):
    names = {module_name(name) for name in tensors_of(quantised) if not is_vision(name)}
    assert names == dict(tree_flatten(load_model(quantised).parameters())).keys()
