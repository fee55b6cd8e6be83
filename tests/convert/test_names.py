"""Names between trees: a bijection over all 1,047 tensors of the released checkpoint, and who refuses what."""

import json
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.config import ModelConfig
from mlx_dgemma.convert.names import (
    Part,
    expert_of,
    expert_parts,
    gemma4_modules,
    gemma4_name,
    gemma4_parts,
    hf_name,
    mlx_name,
    module_of,
    weight_of,
)
from mlx_dgemma.convert.sources import text_shapes
from mlx_dgemma.errors import InputError
from mlx_dgemma.model import DiffusionGemma
from tests.convert.fixtures import WIDE, named
from tests.helpers import random_model

REAL = {
    "model_type": "diffusion_gemma",
    "text_config": {
        "hidden_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "global_head_dim": 512, "num_global_key_value_heads": 2, "sliding_window": 1024, "num_experts": 128,
        "top_k_experts": 8, "moe_intermediate_size": 704, "intermediate_size": 2112,
    },
}  # fmt: skip
CONFIG = ModelConfig.from_dict(REAL)
TEXT = text_shapes(CONFIG)
# of google/diffusiongemma-26B-A4B-it
VISION_LAYER = [
    *(f"self_attn.{p}_proj.linear.weight" for p in "qkvo"),
    *(f"mlp.{p}_proj.linear.weight" for p in ("gate", "up", "down")),
    *("self_attn.q_norm.weight", "self_attn.k_norm.weight", "input_layernorm.weight"),
    *(f"{p}_layernorm.weight" for p in ("post_attention", "pre_feedforward", "post_feedforward")),
]
VISION = [f"model.encoder.vision_tower.encoder.layers.{i}.{name}" for i in range(27) for name in VISION_LAYER] + [
    "model.encoder.vision_tower.patch_embedder.input_proj.weight",
    "model.encoder.vision_tower.patch_embedder.position_embedding_table",
    "model.encoder.vision_tower.std_bias",
    "model.encoder.vision_tower.std_scale",
    "model.encoder.embed_vision.embedding_projection.weight",
]
NAMES = [*TEXT, *VISION]
STACKS = [name for name in TEXT if ".experts." in name]


def test_the_tree_is_that_of_the_released_checkpoint():
    assert len(NAMES) == len(set(NAMES)) == 1047
    assert TEXT["model.decoder.layers.29.experts.gate_up_proj"] == (128, 1408, 2816)


def test_hf_and_mlx_are_a_bijection():
    paths = [mlx_name(name) for name in NAMES]
    assert len(set(paths)) == len(paths)
    assert [hf_name(path) for path in paths] == NAMES
    assert {path for path, _ in tree_flatten(DiffusionGemma(CONFIG).parameters())} == set(paths[: len(TEXT)])


def test_modules_and_weights_are_a_bijection():
    weights = [name for name in NAMES if mlx_name(name).endswith(".weight")]
    modules = [module_of(name) for name in weights]
    assert len(set(modules)) == len(modules)
    assert [weight_of(module) for module in modules] == weights


def test_stacks_and_experts_are_a_bijection():
    """RedHatAI's FP8 checkpoint has 11,520 experts' projections."""
    parts = {part.name: (stack, part) for stack in STACKS for part in expert_parts(stack, 128)}
    assert len(parts) == 30 * 128 * 3
    assert all(expert_of(module) == place for module, place in parts.items())
    assert not any(expert_of(module_of(name)) for name in NAMES)


@pytest.mark.parametrize("stack", STACKS[:2])
def test_parts_fill_a_stack_once_and_in_order(stack):
    shape = (128, 1408 if "gate_up" in stack else 2816, 4)
    count, order = np.zeros(shape, int), []
    for part in expert_parts(stack, 128):
        place = part.slices(shape)
        count[place] += 1
        order.append(tuple(side.start for side in place))
    assert (count == 1).all()
    assert order == sorted(order)


def test_gate_comes_before_up():
    parts = expert_parts("model.decoder.layers.3.experts.gate_up_proj", 2)
    assert parts[3] == Part("model.decoder.layers.3.experts.1.up_proj", expert=1, half=1)
    assert parts[3].slices((2, 10, 7)) == (slice(1, 2), slice(5, 10), slice(0, 7))


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.decoder.layers.0.self_attn.q_proj.bias",
        "model.decoder.layers.0.self_attn.q_proj.scales",
        "model.decoder.layers.x.layer_scalar",
        "model.decoder.layers.0.experts.gate_up_proj.weight",
        "model.decoder.layers.0.experts.7.up_proj.weight",
        "model.encoder.language_model.layers.0.self_attn.q_proj.weight",
        "model.encoder.vision_tower.",
        "model.decoder.norm.weight\n",
        "",
    ],
)
@pytest.mark.parametrize("function", [mlx_name, gemma4_name, module_of])
def test_what_is_not_in_hfs_tree_is_refused_by_name(function, name):
    with pytest.raises(InputError, match=re.escape(repr(name))) as caught:
        function(name)
    assert "\n" not in str(caught.value)


def test_what_is_not_in_mlx_tree_is_refused_by_name():
    for path in ("model.decoder.layers.0.experts.gate_up_proj", "model.norm.weight"):
        with pytest.raises(InputError, match=path):
            hf_name(path)


def test_gemma4_has_the_encoders_scalars_and_the_decoders_rest():
    renamed = {name: gemma4_name(name) for name in NAMES}
    kept = [new for new in renamed.values() if new is not None]
    assert len(kept) == len(set(kept)) == len(TEXT) - 30 - 4  # the decoder's layer_scalars and self-conditioning
    assert renamed["model.encoder.language_model.layers.4.layer_scalar"] == "model.layers.4.layer_scalar"
    assert renamed["model.decoder.layers.4.layer_scalar"] is None
    assert renamed["model.decoder.embed_tokens.weight"] == "model.embed_tokens.weight"


def test_gemma4_parts_are_disjoint_and_quantised_stacks_are_halved():
    new = [part.name for name in NAMES for part in gemma4_parts(mlx_name(name))]
    assert len(new) == len(set(new)) == len(TEXT) - 34 + 30  # one more for every gate_up_proj
    stack = "model.decoder.layers.2.experts.gate_up_proj"
    assert gemma4_parts(f"{stack}.scales") == [
        Part("model.layers.2.experts.switch_glu.gate_proj.scales", half=0),
        Part("model.layers.2.experts.switch_glu.up_proj.scales", half=1),
    ]
    assert gemma4_modules("model.decoder.layers.2.self_attn.q_proj") == ["model.layers.2.self_attn.q_proj"]
    assert gemma4_modules("model.decoder.self_conditioning.up_proj") == []


def gemma4_config(config: ModelConfig) -> dict:
    from mlx_dgemma.convert.configs import gemma4_config

    return gemma4_config(config, (1,), "float32")


def test_mlx_lm_loads_both_spellings_and_computes_what_we_do(tmp_path):
    """Float stacks under HF's names; quantised modules under mlx_lm's own, with the block for them."""
    from mlx_lm.utils import load_model

    model = random_model(WIDE)
    config, ids = gemma4_config(model.config), mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])

    def logits(folder, weights, block):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | block))
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        return load_model(folder)[0](ids)

    floats = {new: array for name, array in named(model).items() if (new := gemma4_name(name))}
    ours = model.logits(model.encode(ids, model.make_cache()))
    assert mx.allclose(logits(tmp_path / "float", floats, {}), ours, atol=1e-3)

    chosen = {"experts": {"group_size": 32, "bits": 4}, "self_attn": {"group_size": 64, "bits": 8}}

    def settings(path: str):
        own = next((own for key, own in chosen.items() if f".{key}." in path), None)
        return own and {**own, "mode": "affine"}

    nn.quantize(model, class_predicate=lambda path, m: hasattr(m, "to_quantized") and (settings(path) or False))
    weights, block = {}, {"group_size": 64, "bits": 4, "mode": "affine"}
    for path, array in tree_flatten(model.parameters()):
        for part in gemma4_parts(path):
            weights[part.name] = array[part.slices(array.shape)] if part.half is not None else array
    for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        if "scales" in module:
            block |= dict.fromkeys(gemma4_modules(path), settings(path))
    ours = model.logits(model.encode(ids, model.make_cache()))
    assert mx.allclose(logits(tmp_path / "quantised", weights, {"quantization": block}), ours, atol=1e-3)
