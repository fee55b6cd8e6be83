"""Checkpoints: every layout that transformers writes, and one line for everything that is wrong."""

import json
import struct

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma import memory
from mlx_dgemma.checkpoint import INDEX, Checkpoint, module_name, tensor_name
from mlx_dgemma.errors import InputError
from mlx_dgemma.loading import EMBEDDED, load, load_model, resolve
from tests.helpers import TINY, random_model, with_text, write_checkpoint

PROMPT = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])


def hidden(model) -> mx.array:
    return model.encode(PROMPT, model.make_cache())


def shard(folder, parts: int = 3) -> None:
    """Split model.safetensors as transformers does."""
    tensors = mx.load(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    names, listed = sorted(tensors), {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        chosen = names[part::parts]
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in chosen})
        listed |= dict.fromkeys(chosen, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def test_names_are_a_bijection():
    paths = [path for path, _ in tree_flatten(random_model().parameters())]
    names = [tensor_name(path) for path in paths]
    assert len(set(names)) == len(names)
    assert [module_name(name) for name in names] == paths
    assert "model.decoder.layers.0.experts.gate_up_proj" in names
    assert "model.encoder.language_model.layers.1.layer_scalar" in names


def test_sharded_or_not_gives_the_same_model(tmp_path, tiny):
    folder = write_checkpoint(tmp_path, model=tiny)
    assert mx.array_equal(hidden(load_model(folder)), hidden(tiny))
    shard(folder)
    assert mx.array_equal(hidden(load_model(folder)), hidden(tiny))


def test_bf16_weights_run_in_float32_on_a_cpu_and_as_stored_if_asked(tmp_path, tiny):
    folder = write_checkpoint(tmp_path, model=tiny)
    tensors = {name: array.astype(mx.bfloat16) for name, array in mx.load(str(folder / "model.safetensors")).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    assert load_model(folder).dtype == (mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16)
    assert load_model(folder, dtype=mx.bfloat16).dtype == mx.bfloat16


def test_quantised_modules_load_by_their_scales(tmp_path):
    """mlx-community's layout: the same tree, a `quantization` block with overrides per path."""
    raw = with_text(hidden_size=64, intermediate_size=64, moe_intermediate_size=64)
    model = random_model(raw)

    def chosen(path, module):
        if not hasattr(module, "to_quantized") or "router" in path:
            return False
        return {"group_size": 32, "bits": 8} if "self_attn" in path else True

    nn.quantize(model, group_size=64, bits=4, class_predicate=chosen)
    folder = write_checkpoint(tmp_path, raw, model)
    modules = [path for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)]
    own = {path: {"group_size": 32, "bits": 8} for path in modules if "self_attn" in path and path.endswith("_proj")}
    quantization = {"group_size": 64, "bits": 4, "mode": "affine", **own}
    (folder / "config.json").write_text(json.dumps({**raw, "quantization": quantization}))
    loaded = load_model(folder)
    assert mx.allclose(hidden(loaded), hidden(model), atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("affine", 32, 4), ("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]
)
def test_every_quantisation_computes_what_its_dequantised_weights_do(tmp_path, mode, group_size, bits):
    """Embedding included: both passes, soft embedding and slices of the vocabulary."""
    raw = with_text(hidden_size=64, intermediate_size=64, moe_intermediate_size=64)
    model, plain = random_model(raw), random_model(raw)
    nn.quantize(model, group_size, bits, mode=mode, class_predicate=lambda path, m: hasattr(m, "to_quantized"))
    for (path, module), (_, dense) in zip(
        tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module),
        tree_flatten(plain.leaf_modules(), is_leaf=nn.Module.is_module),
        strict=True,
    ):
        if "scales" in module:
            args = (module.weight, module.scales, module.get("biases"))
            whole = mx.dequantize(*args, group_size=group_size, bits=bits, mode=mode)
            assert whole.shape == dense.weight.shape, path
            dense.weight = whole.astype(mx.float32)
    folder = write_checkpoint(tmp_path, raw, model)
    block = {"group_size": group_size, "bits": bits, "mode": mode}
    (folder / "config.json").write_text(json.dumps({**raw, "quantization": block}))
    loaded = load_model(folder)
    assert loaded.dtype == mx.float32
    canvas, caches = mx.arange(12)[None], (loaded.make_cache(), plain.make_cache())
    results = []
    for one, cache in zip((loaded, plain), caches, strict=True):
        states = [one.encode(PROMPT, cache)]
        z = one.denoise(canvas, cache) / 0.5
        states += [z, one.soft_embedding(z), one.denoise(canvas, cache, z), one.logits(states[0], slice(7, 99))]
        results.append(states)
    for got, expected in zip(*results, strict=True):
        assert mx.allclose(got, expected, rtol=1e-3, atol=1e-3), mx.abs(got - expected).max()


def test_the_vision_tower_stays_on_disk(tmp_path, tiny):
    folder = write_checkpoint(tmp_path, model=tiny)
    tensors = mx.load(str(folder / "model.safetensors"))
    tower = {f"model.encoder.vision_tower.block.{i}.weight": mx.zeros((64, 64)) for i in range(4)}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors | tower)
    model = load_model(folder)
    assert model.memory.weights == sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def test_lazy_loading_reads_on_first_use(tmp_path, tiny):
    folder = write_checkpoint(tmp_path, model=tiny)
    before = mx.get_active_memory()
    model = load_model(folder, lazy=True)
    assert mx.get_active_memory() - before < 10_000
    assert mx.array_equal(hidden(model), hidden(tiny))


def test_generation_settings_come_from_the_checkpoint_then_the_config_then_the_tokenizer(tmp_path, tiny):
    folder = write_checkpoint(tmp_path, model=tiny)
    assert load_model(folder).generation_config.eos_token_ids == (1, 5)
    (folder / "config.json").write_text(json.dumps(with_text(eos_token_id=None)))
    model, tokenizer = load(folder)
    assert model.generation_config.eos_token_ids == (tokenizer.eos_token_id,)
    settings = {"eos_token_id": [3, 4], "t_min": None, "max_denoising_steps": 9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    config = load(folder)[0].generation_config
    assert (config.eos_token_ids, config.t_min, config.max_denoising_steps) == ((3, 4), 0.4, 9)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garble(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def lose_shard(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def lie_about_shards(folder):
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.decoder.norm.weight"] = "model-00001-of-00003.safetensors"
    index["weight_map"]["model.decoder.embed_tokens.weight"] = "model-00002-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def point_outside(folder):
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.decoder.norm.weight"] = "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def point_to_folder(folder):
    shard(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.decoder.norm.weight": ".."}}))


def relabel(folder):
    """The header says F16 of what is stored as F32."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"F32"', b'"F16"', 1))


def edit_tensors(change):
    def edit(folder):
        tensors = dict(mx.load(str(folder / "model.safetensors")))
        change(tensors)
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)

    return edit


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


NORM = "model.decoder.norm.weight"
BROKEN = {
    "no config.json": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config not JSON": (write("config.json", "{oops"), "config.json: not JSON"),
    "config not an object": (write("config.json", "[]"), "config.json: must hold a JSON object"),
    "another model": (write("config.json", '{"model_type": "llama"}'), "model_type is 'llama'"),
    "contradicts the tensors": (write("config.json", json.dumps(with_text(hidden_size=32))), "config.json calls for"),
    "more layers than tensors": (
        write("config.json", json.dumps(with_text(num_hidden_layers=4, layer_types=None))),
        "is missing, which config.json calls for",
    ),
    "no shards": (lambda f: (f / "model.safetensors").unlink(), "no model.*safetensors here"),
    "truncated": (truncate, "its header says"),
    "garbled header": (garble, "not a safetensors file"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a safetensors file"),
    "lost shard": (lose_shard, "model-00002-of-00003.safetensors: no such shard"),
    "wrong shard": (lie_about_shards, "which does not hold it"),
    "outside": (point_outside, "not a file name in this folder"),
    "index not JSON": (write(INDEX, "nope"), "index.json: not JSON"),
    "index empty": (write(INDEX, "{}"), "has no weight_map"),
    "missing tensor": (edit_tensors(lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "surplus tensor": (edit_tensors(lambda t: t.update(extra=mx.zeros((2,)))), "tensor extra has no place"),
    "misshapen tensor": (edit_tensors(lambda t: t.update({NORM: mx.zeros((7,))})), rf"{NORM} has the shape \(7,\)"),
    "integers for weights": (edit_tensors(lambda t: t.update({NORM: mx.zeros((24,), mx.int32)})), f"{NORM} is I32"),
    "stored otherwise": (relabel, "is not what is stored"),
    "index of folders": (point_to_folder, "not a file name in this folder"),
    "broken tokenizer": (write("tokenizer_config.json", "[]"), "the tokenizer cannot be loaded"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "bad generation config": (write("generation_config.json", '{"t_min": 3.0}'), "generation_config.json: t_min"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_one_line_that_names_what_is_wrong(tmp_path, tiny, case):
    folder = write_checkpoint(tmp_path, model=tiny)
    damage, said = BROKEN[case]
    damage(folder)
    with pytest.raises(InputError, match=said) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_at_all(tmp_path):
    with pytest.raises(InputError, match="is a file"):
        resolve(__file__)
    with pytest.raises(InputError, match="not a Hub id"):
        resolve(tmp_path / "absent" / "deeper")
    with pytest.raises(InputError, match="cannot be downloaded from the Hub"):
        resolve("nobody/nothing")
    assert resolve("nano") == EMBEDDED


def test_a_model_too_large_for_the_machine_is_refused_before_it_is_read(tmp_path, tiny, monkeypatch):
    folder = write_checkpoint(tmp_path, model=tiny)
    monkeypatch.setattr(memory, "machine_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"needs about .* this machine has 0.00 GB"):
        load_model(folder)


def test_the_estimate_of_the_26b_is_about_right():
    """52 GB of bf16 weights, 5 full layers of 2 heads of 512 and 25 sliding ones of 8 heads of 256."""
    text = {
        "hidden_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "global_head_dim": 512, "num_global_key_value_heads": 2, "sliding_window": 1024, "num_experts": 128,
        "top_k_experts": 8, "moe_intermediate_size": 704, "intermediate_size": 2112,
    }  # fmt: skip
    from mlx_dgemma.config import ModelConfig

    config = ModelConfig.from_dict({"model_type": "diffusion_gemma", "text_config": text})
    need = memory.estimate(config, 52_000_000_000, mx.bfloat16, 100_000)
    full, sliding = 5 * 2 * 2 * 512 * 2 * 100_000, 25 * 2 * 8 * 256 * 2 * (1023 + 64 + 512)
    assert need.kv == full + sliding
    assert 0.5e9 < need.step < 2e9


def test_what_a_drafter_needs_counts(tmp_path, tiny, monkeypatch):
    model = load_model(write_checkpoint(tmp_path, model=tiny))
    need = memory.estimate(model.config, model.memory.weights, model.dtype, 50).total
    monkeypatch.setattr(memory, "machine_memory", lambda: need + 10)
    memory.require_room(model, 50, drafter=10)
    with pytest.raises(InputError, match=r"a context of 50 tokens: needs about .* drafter 0.00 GB"):
        memory.require_room(model, 50, drafter=11)


def test_headers_tell_shapes_without_reading(tmp_path, tiny):
    checkpoint = Checkpoint(write_checkpoint(tmp_path, TINY, tiny))
    info = checkpoint.tensors["model.decoder.embed_tokens.weight"]
    assert (info.shape, info.dtype, info.nbytes) == ((131, 24), "F32", 131 * 24 * 4)
