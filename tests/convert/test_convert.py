"""The converter as a user runs it: what it writes, what it says of mistakes, what damage and kills do to it."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
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
from mlx_dgemma.convert.command import main
from mlx_dgemma.convert.journal import JOURNAL
from mlx_dgemma.convert.names import is_vision, mlx_name
from mlx_dgemma.convert.recipes import RECIPES
from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.loading import EMBEDDED, load_model
from tests.convert.fixtures import DATA, SMALL, VISION, WIDE, hf_tensors, per_expert, write
from tests.helpers import with_text
from tests.test_loading import shard

QUIET = {"progress": False}
PROMPT = "json name=Ann age=31 city=Oslo"
MODES = {  # of -q, other than what a recipe of the same name does
    "-q": [],
    "-q 6 bits": ["--q-bits", "6", "--q-group-size", "32"],
    "-q 3 bits": ["--q-bits", "3", "--q-group-size", "32"],
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


def tensors_of(folder: Path) -> dict[str, mx.array]:
    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in mx.load(str(path)).items()}


def same(got: mx.array, expected: mx.array) -> bool:
    """Bit for bit, NaN and the sign of zero included."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    bits = {4: mx.uint32, 2: mx.uint16, 1: mx.uint8}[got.itemsize]
    return bool(mx.array_equal(got.view(bits), expected.view(bits))) if got.shape else got.item() == expected.item()


def with_vision(folder: Path, dtype: mx.Dtype = mx.bfloat16) -> Path:
    """A checkpoint whose widths every group divides, with a vision tower."""
    return write(folder, WIDE | {"vision_config": VISION_CONFIG}, hf_tensors(WIDE, dtype))


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch):
    """In this process nobody pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


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
    made = f"mlx_dgemma.convert --hf-path {EMBEDDED.name} {' '.join(WAYS[way])}"
    assert [line.strip() for line in card.splitlines() if "mlx_dgemma.convert" in line] == [made]
    if way in RECIPES and way != "bf16":
        assert f"recipe {way}" in card
    bits = 8 * index["metadata"]["total_size"] / index["metadata"]["total_parameters"]
    assert float(re.search(r"^([\d.]+) bits per weight", card, re.MULTILINE)[1]) == pytest.approx(bits, abs=6e-4)
    for name in TOKENIZER:
        assert (out / name).read_bytes() == (EMBEDDED / name).read_bytes()


def test_the_function_does_what_the_command_does(tmp_path, capsys):
    assert command(capsys, "--hf-path", "nano", "--mlx-path", tmp_path / "a", "-q", "--q-mode", "mxfp8")[0] == 0
    out = mlx_dgemma.convert("nano", tmp_path / "b", quantize=True, q_mode="mxfp8", **QUIET)
    assert out == tmp_path / "b"
    assert contents(out) == contents(tmp_path / "a")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mode", [["--q-bits", "8"], *(["--q-mode", mode] for mode in ("mxfp4", "nvfp4", "mxfp8"))])
def test_a_mode_of_q_is_the_recipe_of_its_name(mode, tmp_path, capsys):
    for out, how in (("q", ["-q", *mode]), ("recipe", ["--quant-recipe", mode[1] if mode[1] != "8" else "8bit"])):
        assert command(capsys, "--hf-path", "nano", "--mlx-path", tmp_path / out, *how)[0] == 0
    for name in ("model.safetensors", "config.json", INDEX):
        assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "recipe" / name).read_bytes()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    assert config["vision_config"] == VISION_CONFIG and config["dtype"] == dtype
    block = config.get("quantization") or {}
    count = 0
    for name, array in source.items():
        new = mlx_name(name)
        stem = new.removesuffix(".weight")
        if f"{stem}.scales" not in stored:
            assert same(stored[new], array), name
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


@pytest.mark.parametrize("way", ["default", "mlx-community-4bit", "mxfp4", "nvfp4", "mxfp8", "-q 3 bits"])
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
        ids = mx.array([np.random.default_rng(0).integers(3, 779, 120).tolist()])
        got = theirs(ids)
        difference = mx.abs(got - ours.logits(ours.encode(ids, ours.make_cache()))).max().item()
        assert difference <= 1e-3
        assert any("scales" in path for path, _ in tree_flatten(theirs.parameters()))
    finally:
        mx.enable_compile()


# --- options

MISTAKES = {
    "-q and --dequantize": (["-q", "--dequantize"], 2, "contradict"),
    "recipe and --dequantize": (["--quant-recipe", "default", "-d"], 2, "contradict"),
    "bits without -q": (["--q-bits", "4"], 2, "q_bits"),
    "group without -q": (["--q-group-size", "64"], 2, "q_group_size"),
    "mode without -q": (["--q-mode", "mxfp4"], 2, "q_mode"),
    "recipe and bits": (["--quant-recipe", "default", "--q-bits", "4"], 2, "q_bits"),
    "recipe, -q and bits": (["-q", "--quant-recipe", "default", "--q-bits", "4"], 2, "q_bits"),
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


# --- damage: whatever is done to a checkpoint, one line and no output, or an output that is whole


class Trap:
    """Whoever unpickles this writes where nothing is to be written."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


FORMS = ("float", "mlx", "fp8", "nvfp4")


@pytest.fixture(scope="module")
def pristine(workplace) -> dict[str, tuple[Path, dict]]:
    """Small checkpoints in each form, in two shards, and how they are converted."""
    base = workplace / "pristine"
    options = {form: {"dequantize": True} for form in FORMS} | {"float": {"dtype": "float16"}}
    write(base / "float", SMALL, hf_tensors(SMALL))
    rules = base / "rules.json"
    rules.write_text('[{"pattern": "*.router.*", "bits": false}, {"pattern": "*", "mode": "nvfp4"}]')
    mlx_dgemma.convert(base / "float", base / "mlx", quant_recipe=str(rules), **QUIET)
    for form in ("fp8", "nvfp4"):
        shutil.copytree(DATA / form, base / form, ignore=shutil.ignore_patterns("expected*"))
    for form in FORMS:
        shard(base / form, 2)
    return {form: (base / form, options[form]) for form in FORMS}


def a_shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("model*.safetensors")))


def truncated(folder: Path, rng: random.Random) -> None:
    path = a_shard(folder, rng)
    size = path.stat().st_size
    lengths = [0, rng.randrange(1, 8), 8, rng.randrange(9, 3000), rng.randrange(size), size - 1]
    os.truncate(path, rng.choice(lengths))


def longer(folder: Path, rng: random.Random) -> None:
    with a_shard(folder, rng).open("ab") as file:
        file.write(bytes(rng.randrange(1, 50)))


def header_bit(folder: Path, rng: random.Random, first: int = 8, last: int | None = None) -> None:
    path = a_shard(folder, rng)
    data = bytearray(path.read_bytes())
    if last is None:
        last = 8 + struct.unpack("<Q", data[:8])[0]
    data[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def header_edit(folder: Path, rng: random.Random) -> None:
    path = a_shard(folder, rng)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, others = header[name], ["F32", "F16", "BF16", "U32", "U8", "F8_E4M3", "I8", "I64", "F4", "object", 7, None]
    first, last = entry["data_offsets"]
    edits = {
        "shape": [[], [1], [*entry["shape"], 1], [*entry["shape"][:-1], entry["shape"][-1] + 1], entry["shape"][::-1]],
        "dtype": [dtype for dtype in others if dtype != entry["dtype"]],
        "data_offsets": [[last, first], [-first - 1, last], [first, last + 8], [first, 1 << 62], [float("nan"), last]],
    }
    edits["shape"] += [[-1, -1], [0], [1 << 62, 1 << 62], [float("nan")], [2.0], "2", None, {}, [[2]], [True]]
    edits["data_offsets"] += [[], [0], [first], [first, last, last], "0,8", None, {}, [0.0, float(last)], [False, last]]
    kind = rng.choice([*edits, "name", "whole", "gone"])
    if kind in edits:
        entry[kind] = rng.choice(edits[kind])
    elif kind == "name":
        names = [
            "",
            "x",
            "../../evil",
            "a\nb",
            "\x00",
            f"{name}.weight",
            name.upper(),
            name.replace("0", "00"),
            "é" * 9,
        ]
        header[rng.choice(names)] = header.pop(name)
    elif kind == "gone":
        header[name].pop(rng.choice(sorted(entry)))
    else:
        whole = [[], "x", None, 3, {name: []}, {name: None}, {name: {}}, {}, {"__metadata__": 3}, {**header, "y": 1}]
        header = rng.choice(whole)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def missing(folder: Path, rng: random.Random) -> None:
    path = a_shard(folder, rng)
    kind = rng.randrange(5)
    path.unlink()
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.write_bytes(pickle.dumps(Trap(folder.parent / "trapped")))
    elif kind == 3:
        path.symlink_to(folder / "nothing")
    elif kind == 4:
        (folder / INDEX).unlink()


def index_edit(folder: Path, rng: random.Random) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    listed = index["weight_map"]
    (folder / "evil.bin").write_bytes(pickle.dumps(Trap(folder.parent / "trapped")))
    (folder / "evil.safetensors").write_bytes((folder / "evil.bin").read_bytes())
    shutil.copy(a_shard(folder, rng), folder.parent / "other.safetensors")
    names = ["../other.safetensors", str(folder.parent / "other.safetensors"), "..", "", ".", "evil.bin", "evil"]
    names += ["evil.safetensors", "none.safetensors", None, 3, ["x"], "a/../model.safetensors", "..\\x.safetensors"]
    names += ["\x00.safetensors", "x" * 5000 + ".safetensors", "\ud800.safetensors", "a\nb.safetensors"]
    kind = rng.randrange(8)
    if kind < 5:
        listed[rng.choice(sorted(listed))] = rng.choice(names)
    elif kind == 5:
        listed[rng.choice(["x", "../x", f"{next(iter(listed))}.weight"])] = a_shard(folder, rng).name
    elif kind == 6:
        index["weight_map"] = rng.choice([None, [], {}, "x", list(listed), {"x": {}}])
    text = json.dumps(index)
    damaged = ["", "{", "[]", "null", "[" * 100_000, text[: rng.randrange(len(text))], text.replace('"', "'")]
    path.write_text(rng.choice(damaged) if kind == 7 else text)


def config_edit(folder: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    text = path.read_text()
    if rng.random() < 0.25:
        data = bytearray(text.encode())
        kind = rng.randrange(4)
        if kind == 0:
            data = data[: rng.randrange(len(data))]
        elif kind == 1:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data = rng.choice([b"", b"[]", b"null", b"3", b"\xff\xfe", b"{" * 9, b"[" * 100_000, b"NaN"])
        if kind == 3:
            path.unlink()
        else:
            path.write_bytes(data)
        return
    raw = json.loads(text)
    spots = [(raw, key) for key in raw]
    for holder, key in spots:  # grows: all places inside
        if isinstance(holder[key], dict | list):
            inside = holder[key]
            spots += [(inside, key) for key in (inside if isinstance(inside, dict) else range(len(inside)))]
    holder, key = rng.choice(spots)
    values = [None, 0, -1, 3, 17, 1 << 40, 1 << 70, 2.5, float("nan"), float("inf"), "", "x", [], {}, [None], True]
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(values)
    path.write_text(json.dumps(raw))


def quantization_edit(folder: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for key in ("quantization", "quantization_config"):
        raw.pop(key, None)
    name = "model.decoder.layers.0.self_attn.q_proj"
    block = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}}
    blocks = [{**block, "group_size": 64}, {**block, "bits": 8}, {**block, "mode": "mxfp8"}, {"group_size": 0}, block]
    blocks += [{**block, name: False}, {**block, name: {"bits": 8}}, {**block, name: "x"}, {**block, name: None}]
    blocks += [{"group_size": 24, "bits": 4}, {"group_size": "64", "bits": 4}, {"group_size": 64, "bits": 1e99}]
    blocks += [{"group_size": 64, "bits": True}, {"group_size": -64, "bits": 4}, {"group_size": None}, {"bits": 4}]
    blocks += [{"quant_method": "gptq", "bits": 4}, {"quant_method": ["x"]}, {"quant_method": "compressed-tensors"}]
    blocks += [{"quant_method": "compressed-tensors", "config_groups": {"g": group}}, [], "x", 3, True, [1], {"a": 1}]
    blocks += [{"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": 3}}, "format": {}}]
    raw[rng.choice(["quantization", "quantization_config"])] = rng.choice(blocks)
    path.write_text(json.dumps(raw))


def side_file(folder: Path, rng: random.Random) -> None:
    """Also `export gemma4` reads generation_config.json."""
    path = folder / "generation_config.json"
    path.write_text(rng.choice(["", "[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [1e99]}', "[" * 100_000]))


DAMAGE = {  # how, and how often in each form
    "truncated": (truncated, 12),
    "longer": (longer, 2),
    "length": (partial(header_bit, first=0, last=8), 6),
    "header bit": (header_bit, 30),
    "header entry": (header_edit, 40),
    "missing": (missing, 8),
    "index": (index_edit, 24),
    "config": (config_edit, 40),
    "quantization": (quantization_edit, 24),
    "side file": (side_file, 4),
}


def test_there_are_enough_kinds_of_damage():
    assert len(FORMS) * sum(count for _, count in DAMAGE.values()) >= 300


@contextmanager
def limit(seconds: int):
    """What takes longer is a failure."""

    def late(*_):
        raise AssertionError(f"takes more than {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def state(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (at.st_mode, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in found.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_or_harmless(kind, form, pristine, tmp_path):
    damage, count = DAMAGE[kind]
    source, options = pristine[form]
    failures, wrong = 0, []
    for number in range(count):
        place = tmp_path / str(number)
        folder, out = place / "source", place / "out"
        shutil.copytree(source, folder)
        damage(folder, random.Random(f"{kind} {form} {number}"))
        before = state(place)
        extra = {"export": "gemma4"} if kind == "side file" and number % 2 else {}
        try:
            with limit(10):
                mlx_dgemma.convert(folder, out, **options, **extra, **QUIET)
        except InputError as error:
            failures += 1
            message = str(error)
            if len(message.splitlines()) != 1 or str(folder) not in message or len(message) > 1000 + len(str(folder)):
                wrong.append(f"{number}: says {message[:300]!r}")
            if out.exists():
                wrong.append(f"{number}: left an output")
        except (Exception, AssertionError) as error:
            wrong.append(f"{number}: {type(error).__name__}: {str(error)[:200]}")
        else:
            try:
                tensors_of(out)
            except Exception as error:
                wrong.append(f"{number}: wrote what cannot be read: {error}")
        after = {n: s for n, s in state(place).items() if n.split("/")[0] not in ("out", ".out.partial")}
        if after != before:
            wrong.append(f"{number}: touched {sorted(before.items() ^ after.items())}")
        shutil.rmtree(place)
    assert not wrong, "\n".join(wrong)
    assert failures or kind == "side file"


def test_weights_that_are_pickles_are_never_loaded(tmp_path):
    folder = write(tmp_path / "source", SMALL, {})
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(InputError, match="pickles"):
        mlx_dgemma.convert(folder, tmp_path / "out", **QUIET)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(InputError, match="not a safetensors file"):
        mlx_dgemma.convert(folder, tmp_path / "out", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# --- killed

BIG = with_text(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=512,
    moe_intermediate_size=512,
    head_dim=64,
    global_head_dim=128,
    num_experts=4,
    num_hidden_layers=5,
    layer_types=["sliding_attention"] * 4 + ["full_attention"],
)


COMMANDS = """
import os, sys
import mlx_dgemma.convert.conversion  # all that takes long to import
from mlx_dgemma.convert.command import main

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        os.dup2(2, 1)
        try:
            main(line.rstrip().split("\t"))
            os._exit(0)
        finally:
            os._exit(1)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def test_killed_at_random_moments_and_resumed_it_is_bit_identical(tmp_path):
    rng = random.Random(4)
    source = write(tmp_path / "in", BIG, hf_tensors(BIG))
    assert (source / "model.safetensors").stat().st_size > 40e6
    options = ["--hf-path", str(source), "--quant-recipe", "default", "--mlx-path"]
    whole, out, unfinished = (tmp_path / name for name in ("whole", "out", ".out.partial"))
    journal, killed = unfinished / JOURNAL, 0
    argv = [sys.executable, "-c", COMMANDS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(argv, **pipes) as commands:

        def start(target: Path) -> int:
            print(*options, target, sep="\t", file=commands.stdin, flush=True)
            return int(commands.stdout.readline())

        start(whole)
        assert int(commands.stdout.readline()) == 0
        lines = (whole / JOURNAL).read_bytes().count(b"\n")
        for wanted in sorted(rng.randrange(lines - 4) for _ in range(6)):
            pid, deadline = start(out), time.monotonic() + 20
            while not (journal.exists() and journal.read_bytes().count(b"\n") > wanted):
                assert not out.exists() and time.monotonic() < deadline
                time.sleep(0.0005)
            time.sleep(rng.random() * 0.004)
            os.kill(pid, signal.SIGKILL)
            killed += int(commands.stdout.readline()) == signal.SIGKILL
            if out.exists():
                break
            with pytest.raises(InputError):
                load_model(unfinished)
        commands.stdin.close()
    assert killed >= 5
    last = subprocess.run([sys.executable, "-m", "mlx_dgemma.convert.command", *options, str(out)], capture_output=True)
    assert (last.returncode, last.stdout.decode()) == (0, f"{out}\n"), last.stderr
    assert contents(out) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_modules_and_tensors_of_a_conversion_are_loadings(quantised):
    names = {module_name(name) for name in tensors_of(quantised) if not is_vision(name)}
    assert names == dict(tree_flatten(load_model(quantised).parameters())).keys()
