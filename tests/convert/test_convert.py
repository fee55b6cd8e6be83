"""The converter as a user runs it: what it writes and what it says of mistakes."""

import json
import re
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import mlx_dgemma
from mlx_dgemma.checkpoint import INDEX, module_name
from mlx_dgemma.convert.card import Origin
from mlx_dgemma.convert.conversion import Conversion, Options
from mlx_dgemma.convert.names import is_vision
from mlx_dgemma.convert.recipes import RECIPES
from mlx_dgemma.loading import EMBEDDED, load_model
from tests.convert.fixtures import QUIET, SMALL, contents, hf_tensors, quick_disk, tensors_of, write
from tests.convert.ways import WAYS, command

PROMPT = "json name=Ann age=31 city=Oslo"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


_quick_disk = pytest.fixture(autouse=True)(quick_disk)


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
