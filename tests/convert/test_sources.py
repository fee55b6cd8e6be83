"""Whatever a checkpoint is stored as, its floats: bit for bit those of who wrote the format."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.checkpoint import INDEX, Checkpoint, read_header, tensor_name
from mlx_dgemma.convert.names import expert_parts, is_vision, mlx_name, module_of
from mlx_dgemma.convert.recipes import RECIPES, Recipe, Rule, Scheme, modules, plan, uniform
from mlx_dgemma.convert.shards import Reader
from mlx_dgemma.convert.sources import Source, text_shapes
from mlx_dgemma.errors import InputError
from tests.convert.fixtures import (
    DATA,
    PRESETS,
    SMALL,
    VISION,
    WIDE,
    hf_tensors,
    named,
    per_expert,
    quantised,
    write,
    write_compressed,
)
from tests.helpers import random_model

NORM = "model.decoder.norm.weight"
Q_PROJ = "model.decoder.layers.0.self_attn.q_proj"
STACK = "model.decoder.layers.1.experts.gate_up_proj"


def values(source: Source, step: int = 3) -> dict[str, mx.array]:
    """All tensors, read `step` rows at a time."""
    out = {}
    for name, tensor in source.tensors().items():
        slices = [tensor.read(i, min(i + step, tensor.shape[0])) for i in range(0, tensor.shape[0], step)]
        out[name] = mx.concatenate(slices)
        assert out[name].shape == tensor.shape, name
    return out


def same(got: mx.array, expected: mx.array) -> bool:
    return got.dtype == expected.dtype and bool(mx.array_equal(got, expected))


# floats


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_floats_in_hfs_layout_are_read_as_they_are(tmp_path, dtype):
    tensors = hf_tensors(SMALL, dtype)
    source = Source.open(write(tmp_path, SMALL, tensors))
    got = values(source)
    assert source.form == "float"
    assert got.keys() == tensors.keys()
    assert all(same(got[name], array) for name, array in tensors.items())
    assert {t.dtype for t in source.tensors().values()} == {source.dtype}
    assert all(len(tensor.stored) == 1 for tensor in source.tensors().values())
    assert sum(info.nbytes for tensor in source.tensors().values() for info in tensor.stored) == sum(
        array.nbytes for array in tensors.values()
    )


@pytest.mark.parametrize("spelling", [per_expert, lambda tensors: {mlx_name(n): array for n, array in tensors.items()}])
def test_other_spellings_of_experts_are_the_same_tree(tmp_path, spelling):
    tensors = hf_tensors(SMALL)
    got = values(Source.open(write(tmp_path, SMALL, spelling(tensors))), step=1)
    assert all(same(got[name], array) for name, array in tensors.items())
    assert got.keys() == tensors.keys()


def test_tensors_come_in_the_models_order_then_vision(tmp_path):
    names = list(Source.open(write(tmp_path, SMALL, hf_tensors(SMALL))).tensors())
    text = [name for name in names if not is_vision(name)]
    assert text == list(text_shapes(Source.open(tmp_path).config))
    assert names[: len(text)] == text and set(names[len(text) :]) == VISION.keys()


def test_rows_are_read_through_what_is_given(tmp_path):
    folder = write(tmp_path, SMALL, hf_tensors(SMALL))
    reader, asked = Reader(Checkpoint(folder).tensors), []

    def read_raw(name, start=0, stop=None):
        asked.append((name, start, stop))
        return reader.array(name, start, stop)

    tensor = Source.open(folder, read_raw).tensors()[STACK]
    assert asked == []  # opening reads headers alone
    assert same(tensor.read(1, 2), hf_tensors(SMALL)[STACK][1:2])
    assert asked == [(STACK, 1, 2)]


def test_a_tensor_without_axes_is_read_whole(tmp_path):
    name = "model.encoder.vision_tower.encoder.layers.0.self_attn.q_proj.input_max"
    source = Source.open(write(tmp_path, SMALL, hf_tensors(SMALL) | {name: mx.array(3.5)}))
    assert source.tensors()[name].read(0, 1).item() == 3.5


def test_sharded_checkpoints(tmp_path):
    tensors = per_expert(hf_tensors(SMALL))
    write(tmp_path, SMALL, {})
    (tmp_path / "model.safetensors").unlink()
    listed = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(listed.values()):
        mx.save_safetensors(str(tmp_path / shard), {n: a for n, a in tensors.items() if listed[n] == shard})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    got = values(Source.open(tmp_path))
    assert all(same(got[name], array) for name, array in hf_tensors(SMALL).items())


# MLX


def mlx_checkpoint(folder, recipe, dtype=mx.bfloat16):
    """As we and mlx-community write it, vision included; the model it was made of, quantised."""
    model = random_model(WIDE)
    model.set_dtype(dtype)
    chosen = plan(recipe, modules({name: array.shape for name, array in named(model).items()}))
    tensors = quantised(model, chosen) | {n: a for n, a in hf_tensors(WIDE).items() if is_vision(n)}
    block = chosen.block()
    write(folder, WIDE | ({"quantization": block, "quantization_config": block} if block else {}), tensors)
    return model


def dequantised(model) -> dict[str, mx.array]:
    """By HF's names, what MLX makes of a quantised model."""
    out = named(model)
    for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        if "scales" in module:
            arrays = (module.weight, module.scales, module.get("biases"))
            settings = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            out[tensor_name(f"{path}.weight")] = mx.dequantize(*arrays, **settings)
    return {name: array for name, array in out.items() if not name.endswith((".scales", ".biases"))}


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
@pytest.mark.parametrize("name", [*RECIPES, "6bit", "3bit"])
def test_mlx_checkpoints_of_every_recipe_dequantise_as_mlx_does(tmp_path, name, dtype):
    recipe = RECIPES.get(name) or uniform(bits=int(name[0]), group_size=32)
    model = mlx_checkpoint(tmp_path, recipe, dtype)
    source, expected = Source.open(tmp_path), dequantised(model)
    got = values(source)
    assert source.form == ("float" if name == "bf16" else "mlx")
    assert got.keys() == expected.keys() | VISION.keys()
    assert all(same(got[n], array) for n, array in expected.items())
    assert {t.dtype for n, t in source.tensors().items() if not is_vision(n)} == {source.dtype}


def test_settings_of_one_module_without_a_mode_are_affine(tmp_path):
    """As mlx-vlm writes them beside any mode for all, and as nn.quantize takes them."""
    recipe = Recipe("mxfp4", (Rule("*.self_attn.*", Scheme(8, 64)), Rule("*.experts.*", Scheme(4, 32, "mxfp4"))))
    model = mlx_checkpoint(tmp_path, recipe)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["quantization_config"]
    own = raw["quantization"]
    assert own["mode"] == "mxfp4" and own[Q_PROJ].pop("mode") == "affine"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    got = values(Source.open(tmp_path))
    assert all(same(got[n], array) for n, array in dequantised(model).items())
    raw["quantization_config"] = raw.pop("quantization")  # the only one that transformers keeps
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert Source.open(tmp_path).form == "mlx"


def test_the_dtype_before_quantisation_is_that_of_the_scales_or_else_of_the_norms(tmp_path):
    for mode, dtype in (("affine", "F16"), ("mxfp4", "F32")):
        mlx_checkpoint(tmp_path, uniform(mode=mode), mx.float16)
        path = str(tmp_path / "model.safetensors")
        tensors = mx.load(path)
        mx.save_safetensors(path, tensors | {NORM: tensors[NORM].astype(mx.float32)})
        assert Source.open(tmp_path).tensors()[STACK].dtype == dtype


# compressed-tensors


@pytest.mark.parametrize("form", PRESETS)
def test_compressed_tensors_are_the_packages_values_bit_for_bit(form):
    source = Source.open(DATA / form)
    expected = mx.load(str(DATA / form / "expected.safetensors"))
    got = values(source)
    assert source.form == "compressed-tensors"
    assert set(got) == set(hf_tensors(SMALL))
    assert STACK in expected and f"{Q_PROJ}.weight" in expected
    assert all(same(got[name], array) for name, array in expected.items())
    kept = {name: array for name, array in hf_tensors(SMALL).items() if name not in expected}
    assert all(same(got[name], array) for name, array in kept.items())
    assert {tensor.dtype for tensor in source.tensors().values()} == {"BF16"}


@pytest.mark.parametrize(("form", "bound"), [("fp8", 2**-4 + 2**-8), ("nvfp4", 0.25)])
def test_compressed_tensors_are_near_what_they_were_made_of(form, bound):
    """e4m3 keeps 4 digits; neighbours of e2m1 are at most a quarter of the group's largest number from the middle."""
    got, made_of = values(Source.open(DATA / form)), hf_tensors(SMALL)
    for name in mx.load(str(DATA / form / "expected.safetensors")):
        weight = made_of[name].astype(mx.float32)
        scale = mx.abs(weight) if form == "fp8" else mx.abs(weight).max(axis=-1, keepdims=True)
        floor = mx.abs(weight).max(axis=-1, keepdims=True) * 2**-9 / 448 * 2 if form == "fp8" else 0
        assert bool((mx.abs(got[name] - weight) <= scale * bound + floor).all()), name


def test_fp8_and_nvfp4_in_one_checkpoint(tmp_path):
    """As llm-compressor's `mixed-precision`: experts in NVFP4, all else in FP8."""
    fp8, nvfp4 = (Reader(header(DATA / form / "model.safetensors")) for form in ("fp8", "nvfp4"))
    raw, other = (json.loads((DATA / form / "config.json").read_text()) for form in ("fp8", "nvfp4"))
    raw["quantization_config"]["format"] = "mixed-precision"
    raw["quantization_config"]["config_groups"]["b"] = other["quantization_config"]["config_groups"]["group_0"]
    tensors = {name: (info, fp8.view(name).tobytes()) for name, info in fp8.tensors.items() if "experts" not in name}
    tensors |= {name: (info, nvfp4.view(name).tobytes()) for name, info in nvfp4.tensors.items() if "experts" in name}
    write_raw(tmp_path, raw, tensors)
    got = values(Source.open(tmp_path))
    for form in ("fp8", "nvfp4"):
        expected = mx.load(str(DATA / form / "expected.safetensors"))
        for name in [name for name in expected if ("experts" in name) == (form == "nvfp4")]:
            assert same(got[name], expected[name]), name


def write_raw(folder, raw, tensors):
    """A safetensors file of (header entry, bytes) by name, whatever the dtype."""
    header, data = {}, b""
    for name, (info, content) in tensors.items():
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.reference
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", [*PRESETS, "nvfp4a16"])
def test_against_the_compressed_tensors_package(tmp_path, form, seed):
    """In float32 bit for bit; its own bfloat16 is that rounded once, so at most half a unit of 8 digits away."""
    folder = write_compressed(tmp_path, form, seed, preset={"nvfp4a16": "NVFP4A16"}.get(form))
    got = values(Source.open(folder))
    exact, rounded = (mx.load(str(folder / f"{name}.safetensors")) for name in ("expected", "decompressed"))
    for name, array in exact.items():
        assert same(got[name], array), name
        assert rounded[name].dtype == mx.bfloat16
        assert same(got[name].astype(mx.bfloat16), rounded[name]), name
        assert bool((mx.abs(got[name] - rounded[name]) <= mx.abs(got[name]) * 2**-8).all())


@pytest.mark.reference
@pytest.mark.parametrize("form", PRESETS)
def test_the_data_of_the_ordinary_suite_is_what_the_package_writes(tmp_path, form):
    folder = write_compressed(tmp_path / form, form)
    for name in ("model", "expected"):
        ours, theirs = (Reader(header(parent / f"{name}.safetensors")) for parent in (DATA / form, folder))
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all(ours.view(n).tobytes() == theirs.view(n).tobytes() for n in ours.tensors)


def header(path):
    return {info.name: info for info in read_header(path)}


@pytest.mark.reference
@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK", "MXFP4", "MXFP8"])
def test_other_formats_of_the_package_are_refused_by_name(tmp_path, preset):
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
    from torch.nn import Linear

    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.format = infer_module_format(Linear, scheme)
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=scheme.format.value).model_dump(mode="json")
    shutil.copytree(DATA / "fp8", tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "quantization_config": config}))
    with pytest.raises(InputError, match=f"compressed-tensors format '{scheme.format.value}'") as caught:
        Source.open(tmp_path)
    assert "\n" not in str(caught.value)


# what is wrong


def with_config(form, **changes):
    raw = json.loads((DATA / form / "config.json").read_text())
    raw["quantization_config"] |= changes
    return lambda folder: (folder / "config.json").write_text(json.dumps(raw))


def with_weights(form, **changes):
    raw = json.loads((DATA / form / "config.json").read_text())
    raw["quantization_config"]["config_groups"]["group_0"]["weights"] |= changes
    return lambda folder: (folder / "config.json").write_text(json.dumps(raw))


def edit(change):
    """Rewrite model.safetensors with other entries; `change` gets {name: [info, bytes]}."""

    def apply(folder):
        reader = Reader(Checkpoint(folder).tensors)
        tensors = {name: [info, reader.view(name).tobytes()] for name, info in reader.tensors.items()}
        change(tensors)
        write_raw(folder, json.loads((folder / "config.json").read_text()), tensors)

    return apply


def drop(name):
    return edit(lambda tensors: tensors.pop(name))


def relabel(name, **fields):
    def change(tensors):
        tensors[name][0] = replace(tensors[name][0], **fields)

    return edit(change)


def swap(tensors, one, other):
    for part in ("weight", "weight_scale"):
        tensors[f"{one}.{part}"], tensors[f"{other}.{part}"] = tensors[f"{other}.{part}"], tensors[f"{one}.{part}"]


def odd_width(tensors):
    """A quantised module of vision, 96 wide, in groups of 64."""
    old, new = "model.decoder.layers.0.mlp.down_proj", "model.encoder.embed_vision.embedding_projection"
    made = {}
    for part, columns, size in (("weight", 12, 4), ("scales", 1, 2), ("biases", 1, 2)):
        info, content = tensors[f"{old}.{part}"]
        made[f"{new}.{part}"] = [replace(info, shape=(64, columns)), content[: 64 * columns * size]]
    return made


def copy(old, new):
    return edit(lambda tensors: tensors.update({new: list(tensors[old])}))


def pickles_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def many_experts(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('experts": 2', 'experts": 99999999'))


def settings(**changes):
    """Of an MLX checkpoint, in the block for all."""

    def apply(folder):
        raw = json.loads((folder / "config.json").read_text())
        raw["quantization"] |= changes
        (folder / "config.json").write_text(json.dumps(raw))

    return apply


def method(name):
    return lambda folder: (folder / "config.json").write_text(
        json.dumps({**SMALL, "quantization_config": {"quant_method": name, "bits": 4, "group_size": 128}})
    )


EXPERT, DOWN = (f"model.decoder.layers.1.experts.1.{kind}_proj" for kind in ("up", "down"))
BROKEN = {
    "pickles": ("fp8", pickles_only, r"pickles \(pytorch_model.bin\), which can run code and are not loaded"),
    "gptq": ("fp8", method("gptq"), "quantised by gptq, which cannot be read"),
    "awq": ("fp8", method("awq"), "quantised by awq, which cannot be read"),
    "modelopt": ("nvfp4", method("modelopt"), "quantised by modelopt, which cannot be read"),
    "int4": (
        "fp8",
        with_weights("fp8", num_bits=4, type="int", strategy="group", group_size=128),
        r"compressed-tensors format 'float-quantized' \(int, 4, group\) is not supported",
    ),
    "blocks": ("fp8", with_weights("fp8", strategy="block"), r"'float-quantized' \(float, 8, block\)"),
    "zero points": ("fp8", with_weights("fp8", symmetric=False), "is not supported"),
    "groups of 32": ("nvfp4", with_weights("nvfp4", group_size=32), "'nvfp4-pack-quantized'"),
    "no groups": ("fp8", with_config("fp8", config_groups=None), "config_groups must be an object"),
    "groups of nothing": ("fp8", with_config("fp8", config_groups={"a": {"weights": 3}}), "is not supported"),
    "sparse": ("fp8", with_config("fp8", sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is not"),
    "rotated": ("fp8", with_config("fp8", transform_config={"config_groups": {"u": {}}}), "transform_config is not"),
    "no word of it": (
        "fp8",
        lambda f: (f / "config.json").write_text(json.dumps(SMALL)),
        "has no place|config.json says nothing of quantisation",
    ),
    "no FP8 scale": ("fp8", drop(f"{Q_PROJ}.weight_scale"), f"{Q_PROJ}.weight_scale is missing beside weight"),
    "no FP8 weight": ("fp8", drop(f"{Q_PROJ}.weight"), f"{Q_PROJ}.weight is missing beside weight_scale"),
    "no group scales": ("nvfp4", drop(f"{Q_PROJ}.weight_scale"), f"{Q_PROJ}.weight_scale is missing"),
    "no global scale": ("nvfp4", drop(f"{EXPERT}.weight_global_scale"), f"{EXPERT}.weight_global_scale is missing"),
    "no expert": (
        "nvfp4",
        edit(lambda t: [t.pop(n) for n in list(t) if n.startswith(EXPERT)]),
        f"{EXPERT}.weight is missing, which config.json calls for",
    ),
    "experts without number": ("fp8", many_experts, r"experts.2.down_proj.weight is missing"),
    "an endless number": ("fp8", copy(NORM, f"model.decoder.layers.0.experts.{'9' * 9999}.up_proj.weight"), "no place"),
    "one expert more": (
        "fp8",
        edit(lambda t: t.update({n.replace(".experts.1.", ".experts.2."): e for n, e in t.items()})),
        "is one expert too many: config.json has 2",
    ),
    "a layer more": (
        "fp8",
        edit(lambda t: t.update({n.replace(".layers.1.", ".layers.2."): e for n, e in t.items() if "experts" in n})),
        r"layers.2.experts.* has no place",
    ),
    "zero point": ("fp8", copy(f"{Q_PROJ}.weight", f"{Q_PROJ}.weight_zero_point"), "weight_zero_point is F8_E4M3"),
    "scales per block": ("fp8", relabel(f"{Q_PROJ}.weight_scale", shape=(4, 4)), r"\(4, 4\); one scale per row"),
    "no matrix": ("fp8", relabel(f"{Q_PROJ}.weight", shape=(4, 4, 32)), "one scale per row of"),
    "scales of another module": ("nvfp4", relabel(f"{Q_PROJ}.weight_scale", shape=(32,)), "do not belong together"),
    "FP8 that is e5m2": ("fp8", relabel(f"{Q_PROJ}.weight", dtype="F8_E5M2"), "is F8_E5M2, not F8_E4M3"),
    "FP8 that is bytes": ("fp8", relabel(f"{Q_PROJ}.weight", dtype="U8"), "weight is U8, not F8_E4M3"),
    "integers for scales": ("fp8", relabel(f"{Q_PROJ}.weight_scale", dtype="I16"), "weight_scale is I16, not F32"),
    "integers for a norm": ("fp8", relabel(NORM, dtype="U16"), f"tensor {NORM} is U16, not F32, F16 or BF16"),
    "no norm": ("fp8", drop(NORM), f"{NORM} is missing"),
    "another width": ("fp8", relabel(NORM, shape=(4, 8)), r"norm.weight has the shape \(4, 8\), config.json calls for"),
    "another width of experts": ("fp8", edit(lambda t: swap(t, EXPERT, DOWN)), r"down_proj has the shape \(16, 32\)"),
    "a name of two lines": ("fp8", copy(NORM, "a\nb"), r"'a\\nb' is no name of a tensor"),
    "surplus": ("fp8", copy(NORM, "lm_head.weight"), "lm_head.weight has no place"),
    "two layouts": ("float", copy(STACK, f"{STACK}.weight"), f"{STACK} and {STACK}.weight are there, which say the"),
    "stacked and not": (
        "float",
        edit(lambda t: t.update({f"{p.name}.weight": t[NORM] for p in expert_parts(STACK, 2)})),
        f"experts.0.gate_proj.weight and {STACK} are there, which say the same",
    ),
    "MLX without settings": (
        "mlx",
        lambda f: (f / "config.json").write_text(json.dumps(WIDE)),
        "has no place|is U32, not F32, F16 or BF16; config.json says nothing of quantisation",
    ),
    "MLX, other bits": ("mlx", settings(bits=8), "is not 8 bits in groups of 64, which config.json says it is"),
    "MLX, another group": ("mlx", settings(group_size=32), "is not 4 bits in groups of 32, which config.json says"),
    "MLX, another mode": ("mlx", settings(mode="mxfp4", group_size=32), "biases has no place|scales is BF16, not U8"),
    "MLX, no such mode": ("mlx", settings(mode="q4_k"), "quantization: mode must be one of"),
    "MLX, no such bits": ("mlx", settings(bits="4"), "quantization: bits in mode affine must be"),
    "MLX, false": ("mlx", settings(**{module_of(STACK): False}), "is False, but its tensors are quantised"),
    "MLX, no scales": ("mlx", drop(f"{STACK}.scales"), f"{STACK}.scales is missing beside biases and weight"),
    "MLX, no biases": ("mlx", drop(f"{STACK}.biases"), f"{STACK}.biases is missing beside scales and weight"),
    "MLX, floats for words": ("mlx", relabel(f"{STACK}.weight", dtype="F32"), "weight is F32, not U32"),
    "MLX, two dtypes": ("mlx", relabel(f"{STACK}.biases", dtype="F16"), "not 4 bits in groups of 64"),
    "MLX, vector": ("mlx", relabel(f"{STACK}.weight", shape=(4096,)), "which config.json says it is"),
    "MLX, a group that does not divide": ("mlx", edit(lambda t: t.update(odd_width(t))), "not 4 bits in groups of 64"),
    "MLX, a scale per expert": ("mlx", copy(NORM, f"{STACK}.global_scale"), "global_scale has no place"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_one_line_that_names_it(tmp_path, case):
    form, damage, said = BROKEN[case]
    if form in PRESETS:
        shutil.copytree(DATA / form, tmp_path, dirs_exist_ok=True)
    elif form == "mlx":
        mlx_checkpoint(tmp_path, uniform())
    else:
        write(tmp_path, SMALL, hf_tensors(SMALL))
    damage(tmp_path)
    with pytest.raises(InputError, match=said) as caught:
        Source.open(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("size", [1 << 31, 1 << 63, 1 << 70])
def test_sizes_that_no_array_has_are_one_line(tmp_path, size):
    raw = {**SMALL, "text_config": {**SMALL["text_config"], "hidden_size": size}}
    with pytest.raises(InputError):
        Source.open(write(tmp_path, raw, hf_tensors(SMALL)))


def test_a_pickle_is_never_opened(tmp_path):
    """Beside safetensors it is left alone."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(InputError, match="no such file"):
        Source.open(tmp_path)
    assert Source.open(write(tmp_path, SMALL, hf_tensors(SMALL))).form == "float"
