"""config.json and tensors of block drafters: what is read, what is written, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_dgemma.config import FULL, SLIDING, ModelConfig
from mlx_dgemma.drafter import weights
from mlx_dgemma.drafter.block import make
from mlx_dgemma.drafter.geometry import LARGEST, LIMITS, BlockConfig
from mlx_dgemma.drafter.head import read_vocabulary, spelled
from mlx_dgemma.drafter.network import BlockNetwork
from mlx_dgemma.drafter.weights import quantise, read, write_into
from mlx_dgemma.errors import InputError, UsageError
from tests.decoding.runs import GREEDY, assert_lossless
from tests.helpers import random_model, with_text

# z-lab/gemma-4-26B-A4B-it-DFlash as it is published
PUBLISHED = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": 16,
    "bos_token_id": 2,
    "dflash_config": {"mask_token_id": 4, "target_layer_ids": [1, 6, 11, 17, 22, 27]},
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2816,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "layer_types": [*[SLIDING] * 4, FULL],
    "max_position_embeddings": 262144,
    "max_window_layers": 5,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 30,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "sliding_window": 2048,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": True,
    "vocab_size": 262144,
}
REDUCED = {**PUBLISHED, "hidden_size": 24, "vocab_size": 131}  # heads, taps, window and layers as they are

# a DSpark drafter of the tests' main model, which has 3 layers
SMALL = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "block_size": 7,
    "dflash_config": {
        "projector_type": "dspark",
        "mask_token_id": 4,
        "target_layer_ids": [0, 2],
        "markov_rank": 5,
        "enable_confidence_head": True,
    },
    "head_dim": 8,
    "hidden_size": 24,
    "intermediate_size": 36,
    "layer_types": [SLIDING, FULL],
    "max_position_embeddings": 4096,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_target_layers": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "sliding_window": 9,
    "vocab_size": 131,
}
MISSING = object()


def changed(raw: dict, key: str, value) -> dict:
    """A copy with another value; "own.key" is one of its dflash_config."""
    own = key.removeprefix("own.")
    part = {**(raw["dflash_config"] if own != key else raw), own: value}
    part = {name: value for name, value in part.items() if value is not MISSING}
    return {**raw, "dflash_config": part} if own != key else part


def random_network(raw: dict, seed: int = 0) -> BlockNetwork:
    """Norms near 1, matrices of unit gain; layers weigh more than embeddings, so that drafts are not all alike."""
    network = BlockNetwork(BlockConfig.from_dict(raw))
    mx.random.seed(seed)

    def fill(path: str, array: mx.array) -> mx.array:
        noise = mx.random.normal(array.shape)
        gain = 4 if "o_proj" in path or "down_proj" in path else 1
        return 1 + 0.2 * noise if array.ndim == 1 else gain * noise * array.shape[-1] ** -0.5

    network.update(tree_unflatten([(path, fill(path, array)) for path, array in tree_flatten(network.parameters())]))
    mx.eval(network.parameters())
    return network


def write_drafter(folder: Path, raw: dict = SMALL, tensors: dict | None = None) -> Path:
    """A folder with this config.json and random weights, some of them replaced; None removes one."""
    folder.mkdir(exist_ok=True)
    try:
        arrays = dict(tree_flatten(random_network(raw).parameters()))
    except InputError:
        arrays = dict(tree_flatten(random_network(SMALL).parameters()))
    arrays = {name: array for name, array in (arrays | (tensors or {})).items() if array is not None}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def write(network: BlockNetwork, folder: Path, dtype: mx.Dtype = mx.bfloat16) -> None:
    """As a training leaves it, in a new folder."""
    folder.mkdir()
    write_into(network, folder, dtype)


# --- what is read


def test_the_published_config():
    config = BlockConfig.from_dict(PUBLISHED)
    assert config == BlockConfig(
        hidden_size=2816,
        intermediate_size=5632,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=262_144,
        max_position_embeddings=262_144,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        kinds=(SLIDING, SLIDING, SLIDING, SLIDING, FULL),
        sliding_window=2048,
        taps=(1, 6, 11, 17, 22, 27),
        num_target_layers=30,
        mask_token_id=4,
        positions=16,
        from_anchor=False,
        causal=False,
        draft_window=None,
        markov_rank=None,
        confidence=None,
        final_logit_softcapping=30.0,
    )
    assert config.drafts == 15
    assert config.windows == [2047, 2047, 2047, 2047, None]


def test_the_published_tensors_and_no_others():
    network = BlockNetwork(BlockConfig.from_dict(PUBLISHED))  # lazy: 0.4 B weights that are never made
    expected = {"fc.weight": (2816, 6 * 2816), "hidden_norm.weight": (2816,), "norm.weight": (2816,)}
    for index in range(5):
        expected |= {
            f"layers.{index}.input_layernorm.weight": (2816,),
            f"layers.{index}.post_attention_layernorm.weight": (2816,),
            f"layers.{index}.self_attn.q_proj.weight": (4096, 2816),
            f"layers.{index}.self_attn.k_proj.weight": (1024, 2816),
            f"layers.{index}.self_attn.v_proj.weight": (1024, 2816),
            f"layers.{index}.self_attn.o_proj.weight": (2816, 4096),
            f"layers.{index}.self_attn.q_norm.weight": (128,),
            f"layers.{index}.self_attn.k_norm.weight": (128,),
            f"layers.{index}.mlp.gate_proj.weight": (5632, 2816),
            f"layers.{index}.mlp.up_proj.weight": (5632, 2816),
            f"layers.{index}.mlp.down_proj.weight": (2816, 5632),
        }
    shapes = {name: tuple(array.shape) for name, array in tree_flatten(network.parameters())}
    assert shapes == expected
    assert round(sum(math.prod(shape) for shape in shapes.values()) / 1e6) == 430


def test_the_published_geometry_drafts_for_thirty_layers(tmp_path):
    kinds = [FULL if index % 6 == 5 else SLIDING for index in range(30)]
    model = random_model(with_text(num_hidden_layers=30, layer_types=kinds), seed=1)
    network = random_network(REDUCED)
    write(network, tmp_path / "drafter", mx.float32)
    drafter = make(model, str(tmp_path / "drafter"))
    assert drafter.taps == (1, 6, 11, 17, 22, 27)
    assert drafter.network.config == network.config == BlockConfig.from_dict(REDUCED)
    config = GREEDY.replace(max_new_tokens=16)
    done = assert_lossless(model, drafter, [2, 17, 40, 99, 3], config, width=15)
    assert done.counts.drafter_failure is None
    assert done.counts.drafted >= 15


def test_the_default_geometry_is_the_published_one():
    raw = with_text(num_hidden_layers=30, layer_types=None, hidden_size=2816, vocab_size=262_144)
    raw["text_config"]["max_position_embeddings"] = 262_144
    config = ModelConfig.from_dict(raw)
    assert BlockConfig.for_model(config) == BlockConfig.from_dict(PUBLISHED)


@pytest.mark.parametrize("layers", range(1, 12))
@pytest.mark.parametrize("taps", [1, 2, 6])
def test_default_taps_are_layers_in_order(layers, taps):
    model = ModelConfig.from_dict(with_text(num_hidden_layers=layers, layer_types=None))
    config = BlockConfig.for_model(model, num_taps=taps)  # or it would raise
    assert len(config.taps) == min(taps, layers)
    first, last = (1, layers - 3) if layers - 3 >= taps else (0, layers - 1)
    assert config.taps[0] == first
    assert config.taps[-1] == (last if len(config.taps) > 1 else first)


def test_a_dspark_config():
    config = BlockConfig.from_dict(SMALL)
    assert (config.positions, config.drafts, config.from_anchor) == (7, 7, True)
    assert (config.markov_rank, config.confidence) == (5, "hidden and markov")
    assert (config.rms_norm_eps, config.rope_theta, config.windows) == (1e-5, 5e5, [8, None])


@pytest.mark.parametrize(
    ("changes", "expected"),  # positions, drafts, whether the last token's position predicts
    [
        ({}, (7, 7, True)),
        ({"dspark_bonus_anchor": True}, (6, 6, True)),
        ({"own.sample_from_anchor": False}, (8, 7, False)),
        ({"own.sample_from_anchor": False, "dspark_bonus_anchor": True}, (7, 6, False)),
        ({"runtime_block_size": 5}, (4, 4, True)),
        ({"own.runtime_block_size": 5, "own.sample_from_anchor": False}, (5, 4, False)),
        ({"runtime_block_size": 99}, (7, 7, True)),
        ({"own.block_size": 3}, (3, 3, True)),
    ],
)
def test_what_a_block_of_dspark_holds(changes, expected):
    raw = SMALL
    for key, value in changes.items():
        raw = changed(raw, key, value)
    config = BlockConfig.from_dict(raw)
    assert (config.positions, config.drafts, config.from_anchor) == expected


@pytest.mark.parametrize(
    ("key", "value", "attribute", "expected"),
    [
        ("own.confidence_head_with_markov", False, "confidence", "hidden"),
        ("own.enable_confidence_head", MISSING, "confidence", None),
        ("own.markov_rank", MISSING, "markov_rank", 256),
        ("own.projector_type", MISSING, "markov_rank", 5),  # told by its class
        ("architectures", MISSING, "from_anchor", True),  # told by its projector
        ("own.draft_window_size", 4, "windows", [4, 4]),
        ("own.draft_window_size", 12, "windows", [8, 12]),
        ("own.swa_window_size", 5, "windows", [4, None]),
        ("layer_types", MISSING, "kinds", (FULL, FULL)),
        ("own.causal", True, "causal", True),
        ("dflash_query_causal", True, "causal", True),
        ("rope_parameters", {"rope_theta": 7e4, "rope_type": "default"}, "rope_theta", 7e4),
        ("rope_parameters", {"rope_type": "default"}, "rope_theta", 5e5),
        ("rope_parameters", {"rope_theta": None, "rope_type": None}, "rope_theta", 5e5),
        # null says nothing, and hides nothing
        ("own.block_size", None, "positions", 7),
        ("own.hidden_size", None, "hidden_size", 24),
        ("own.swa_window_size", None, "windows", [8, None]),
        ("own.rope_theta", None, "rope_theta", 5e5),
        ("own.layer_types", None, "kinds", (SLIDING, FULL)),
        ("own.architectures", None, "markov_rank", 5),
        ("own.markov_rank", None, "markov_rank", 256),
        ("own.projector_type", None, "markov_rank", 5),
        ("own.causal", None, "causal", False),
        # how many drafts others ask for
        ("own.block_size_policy", "adaptive", "positions", 7),
        ("own.dflash_initial_block_size", 4, "positions", 7),
        ("final_logit_softcapping", 30, "final_logit_softcapping", 30.0),
    ],
)
def test_one_key(key, value, attribute, expected):
    assert getattr(BlockConfig.from_dict(changed(SMALL, key, value)), attribute) == expected


def test_a_rank_alone_makes_it_dspark():
    raw = changed(changed(SMALL, "own.projector_type", MISSING), "architectures", ["DFlashDraftModel"])
    assert BlockConfig.from_dict(raw).from_anchor


@pytest.mark.parametrize(
    "raw",
    [
        PUBLISHED,
        SMALL,
        changed(PUBLISHED, "own.causal", True),
        changed(PUBLISHED, "own.draft_window_size", 77),
        changed(PUBLISHED, "runtime_block_size", 8),
        changed(SMALL, "dspark_bonus_anchor", True),
        changed(SMALL, "own.sample_from_anchor", False),
        changed(changed(SMALL, "own.sample_from_anchor", False), "dspark_bonus_anchor", True),
        changed(SMALL, "own.confidence_head_with_markov", False),
        changed(SMALL, "own.enable_confidence_head", False),
        changed(SMALL, "runtime_block_size", 3),
    ],
)
def test_what_is_written_is_read_as_the_same(raw):
    config = BlockConfig.from_dict(raw)
    assert BlockConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_what_is_written_has_the_published_keys():
    written = BlockConfig.from_dict(PUBLISHED).to_dict()
    assert written == {key: PUBLISHED[key] for key in written}


def test_files_come_back_as_they_were_written(tmp_path, tiny):
    for raw in (SMALL, changed(SMALL, "own.enable_confidence_head", MISSING)):
        network, folder = random_network(raw), tmp_path / str(len(raw["dflash_config"]))
        write(network, folder, mx.float32)
        back = dict(tree_flatten(read(folder, tiny).parameters()))
        assert all(mx.array_equal(array, back.pop(name)) for name, array in tree_flatten(network.parameters()))
        assert not back
    network = random_network({**SMALL, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16})
    quantise(network, 4, "here")
    with pytest.raises(ValueError, match="quantised"):
        write(network, tmp_path / "quantised")
    assert not list((tmp_path / "quantised").iterdir())


# --- what is refused


def refused(model, folder, said: str, kind=InputError, **options) -> None:
    """One line that names the file, and what is said."""
    with pytest.raises(kind) as error:
        make(model, str(folder), **options)
    assert said in str(error.value)
    assert str(folder) in str(error.value) or options
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(folder))


REFUSED = [
    # another model
    ("vocab_size", 132, "vocab_size is 132, the model's 131"),
    ("hidden_size", 48, "hidden_size is 48, the model's 24"),
    ("num_target_layers", 4, "num_target_layers is 4, the model's 3"),
    ("num_target_layers", 30, "num_target_layers is 30, the model's 3"),
    ("final_logit_softcapping", 50.0, "final_logit_softcapping is 50.0, the model's 30.0"),
    # taps
    ("own.target_layer_ids", [0, 3], "target_layer_ids [0, 3] are not layers 0-2"),
    ("own.target_layer_ids", [-1, 2], "target_layer_ids [-1, 2] are not layers 0-2"),
    ("own.target_layer_ids", [2, 0], "target_layer_ids must be layers in order"),
    ("own.target_layer_ids", [1, 1], "target_layer_ids must be layers in order, each once"),
    ("own.target_layer_ids", [], "target_layer_ids must be layers in order"),
    ("own.target_layer_ids", [0, 1.0], "target_layer_ids must be a list of layers"),
    ("own.target_layer_ids", [True], "target_layer_ids must be a list of layers"),
    ("own.target_layer_ids", "0", "target_layer_ids must be a list of layers"),
    ("own.target_layer_ids", MISSING, "target_layer_ids is missing"),
    # families that cannot draft for it
    ("architectures", ["Gemma4DSparkModel"], "Gemma4DSparkModel cannot draft for this model: it has an embedding"),
    ("architectures", ["LlamaForCausalLM"], "LlamaForCausalLM cannot draft for this model"),
    ("architectures", ["DFlash2DraftModel"], "DFlash2DraftModel cannot draft for this model"),
    ("architectures", "DFlashDraftModel", "architectures must be a list of names"),
    ("architectures", [7], "architectures must be a list of names"),
    ("model_type", "llama", "model_type = 'llama' is not supported"),
    ("model_type", MISSING, "model_type = None is not supported"),
    ("own.projector_type", "eagle", "projector_type must be"),
    # what the network does not do
    ("own.attention_sink_bias", True, "attention_sink_bias = True is not supported"),
    ("attention_sink_bias", True, "attention_sink_bias = True is not supported"),
    ("attention_bias", True, "attention_bias = True is not supported"),
    ("hidden_act", "gelu", "hidden_act = 'gelu' is not supported"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_scaling = {'rope_type': 'yarn'"),
    ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "rope_type 'linear'"),
    ("rope_parameters", {"partial_rotary_factor": 0.5, "rope_theta": 1e4}, "partial_rotary_factor 0.5"),
    ("rope_is_neox_style", False, "rope_is_neox_style = False is not supported"),
    ("own.markov_head_type", "gated", "markov_head_type = 'gated' is not supported"),
    ("quantization", {"group_size": 64, "bits": 4}, "quantization = {'group_size': 64"),
    # keys that may mean anything
    ("own.markov_ranks", 5, "the key 'markov_ranks' of dflash_config is not known"),
    ("own.use_cache", True, "the key 'use_cache' of dflash_config is not known"),
    ("own.dflash_config", {}, "the key 'dflash_config' of dflash_config is not known"),
    ("own.a\nb" + 200 * "c", 1, "the key 'a\\nbccc"),
    ("qk_norm", False, "the key 'qk_norm' is not known"),
    ("logit_scale", 2.0, "the key 'logit_scale' is not known"),
    ("rope_parameters", {"rope_theta": 1e4, "mrope_section": [1]}, "the key 'mrope_section' of rope_parameters"),
    # missing
    *[
        (key, MISSING, f"{key} is missing")
        for key in (
            "block_size",
            "head_dim",
            "hidden_size",
            "intermediate_size",
            "max_position_embeddings",
            "num_attention_heads",
            "num_hidden_layers",
            "num_key_value_heads",
            "num_target_layers",
            "rms_norm_eps",
            "rope_theta",
            "vocab_size",
        )
    ],
    ("own.mask_token_id", MISSING, "mask_token_id is missing"),
    ("dflash_config", MISSING, "target_layer_ids is missing"),
    ("sliding_window", MISSING, "sliding layers need a sliding_window"),
    # values
    ("dflash_config", [1], "dflash_config must be an object"),
    ("block_size", "7", "block_size must be a whole number in 1-4096, not '7'"),
    ("block_size", 7.0, "block_size must be a whole number"),
    ("block_size", True, "block_size must be a whole number"),
    ("block_size", 0, "block_size must be a whole number"),
    ("block_size", 10**30, "block_size must be a whole number"),
    ("runtime_block_size", 1, "holds no draft"),
    ("runtime_block_size", [], "runtime_block_size must be a whole number"),
    ("head_dim", 7, "head_dim 7 is odd"),
    ("head_dim", -8, "head_dim must be a whole number"),
    ("intermediate_size", 10**12, "intermediate_size must be a whole number"),
    ("num_attention_heads", 5, "2 key/value heads do not divide 5 query heads"),
    ("num_attention_heads", 1 << 23, "num_attention_heads 8388608 of head_dim 8 are too large"),
    ("num_hidden_layers", 10**9, "num_hidden_layers must be a whole number in 1-1024"),
    ("num_hidden_layers", 3, "layer_types must name 3 layers"),
    ("layer_types", ["chunked_attention", FULL], "layer_types must name 2 layers"),
    ("layer_types", FULL, "layer_types must name 2 layers"),
    ("sliding_window", 0, "sliding_window must be a whole number"),
    ("sliding_window", "9", "sliding_window must be a whole number"),
    ("own.draft_window_size", 0, "draft_window_size must be a whole number"),
    ("own.mask_token_id", 131, "mask_token_id 131 is not in the vocabulary of 131"),
    ("own.mask_token_id", -1, "mask_token_id must be a whole number in 0-"),
    ("own.markov_rank", 1 << 25, "markov_rank must be a whole number in 1-16777216"),
    ("own.draft_window_size", 1 << 25, "draft_window_size must be a whole number in 1-16777216"),
    ("sliding_window", 1 << 25, "sliding_window must be a whole number in 1-16777216"),
    ("own.markov_rank", 0, "markov_rank must be a whole number in 1-"),
    ("own.markov_rank", "5", "markov_rank must be a whole number"),
    ("own.sample_from_anchor", "false", "sample_from_anchor must be true or false, not 'false'"),
    ("own.causal", 1, "causal must be true or false"),
    ("own.enable_confidence_head", "yes", "enable_confidence_head must be true or false"),
    ("dspark_bonus_anchor", 0, "dspark_bonus_anchor must be true or false"),
    ("rms_norm_eps", "1e-6", "rms_norm_eps must be a positive number"),
    ("rms_norm_eps", 0, "rms_norm_eps must be a positive number"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps must be a positive number"),
    ("rope_theta", float("inf"), "rope_theta must be a positive number"),
    ("rope_theta", 10**400, "rope_theta must be a positive number"),
    ("rope_parameters", [1], "rope_parameters must be an object"),
    ("rope_parameters", {"rope_theta": "1e4"}, "rope_theta must be a positive number"),
    ("final_logit_softcapping", "30", "final_logit_softcapping must be a positive number"),
    ("final_logit_softcapping", True, "final_logit_softcapping must be a positive number"),
]


@pytest.mark.parametrize(("key", "value", "said"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_config_that_is_refused(tmp_path, tiny, key, value, said):
    refused(tiny, write_drafter(tmp_path, changed(SMALL, key, value)), said)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"embed_tokens.weight": mx.zeros((131, 24))}, "tensor 'embed_tokens.weight' has no place"),
        ({"layers.2.mlp.up_proj.weight": mx.zeros((36, 24))}, "tensor 'layers.2.mlp.up_proj.weight' has no place"),
        ({"layers.0.self_attn.v_norm.weight": mx.ones((8,))}, "'layers.0.self_attn.v_norm.weight' has no place"),
        ({"model.fc.weight": mx.zeros((24, 48))}, "fc.weight' has no place"),  # beside fc.weight
        ({"model.model.norm.weight": mx.ones((24,))}, "'model.model.norm.weight' has no place"),
        ({"fc.weight": None}, "tensor fc.weight is missing"),
        ({"layers.1.self_attn.k_norm.weight": None}, "tensor layers.1.self_attn.k_norm.weight is missing"),
        ({"markov_head.markov_w2.weight": None}, "tensor markov_head.markov_w2.weight is missing"),
        ({"confidence_head.proj.bias": None}, "tensor confidence_head.proj.bias is missing"),
        ({"fc.weight": mx.zeros((24, 72))}, "fc.weight has the shape (24, 72), config.json calls for (24, 48)"),
        ({"layers.0.self_attn.q_proj.weight": mx.zeros((24, 24))}, "q_proj.weight has the shape (24, 24)"),
        ({"confidence_head.proj.weight": mx.zeros((1, 24))}, "proj.weight has the shape (1, 24)"),
        ({"norm.weight": mx.ones((24,), dtype=mx.int32)}, "norm.weight is I32; weights must be F32, F16 or BF16"),
        ({"norm.weight": mx.ones((24,), dtype=mx.uint8)}, "norm.weight is U8"),
        ({"fc.weight": mx.full((24, 48), mx.nan)}, "tensor fc.weight holds numbers that are not finite in float32"),
        ({"norm.weight": mx.array([*[1.0] * 23, mx.inf])}, "norm.weight holds numbers that are not finite"),
        ({"confidence_head.proj.bias": mx.array([-mx.inf])}, "proj.bias holds numbers that are not finite"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_tensors_that_are_refused(tmp_path, tiny, tensors, said):
    refused(tiny, write_drafter(tmp_path, tensors=tensors), said)


def test_weights_that_the_models_dtype_does_not_hold_are_refused(tmp_path):
    model = random_model()
    model.set_dtype(mx.float16)
    tensors = {"norm.weight": mx.full((24,), 1e6)}
    refused(model, write_drafter(tmp_path, tensors=tensors), "norm.weight holds numbers that are not finite in float16")


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"positions": LIMITS["block_size"] + 1}, "block_size must be a whole number in 0-4096, not 4097"),
        ({"positions": 1}, "a block of 1 positions holds no draft"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number in 1-1024"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"intermediate_size": LARGEST + 1}, "intermediate_size must be"),
        ({"intermediate_size": 36.0}, "intermediate_size must be"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be"),
        ({"sliding_window": LARGEST + 1}, "sliding_window must be"),
        ({"draft_window": 0}, "draft_window_size must be"),
        ({"markov_rank": LARGEST + 1}, "markov_rank must be"),
    ],
)
def test_a_new_drafter_obeys_the_same_limits(tiny, sizes, said):
    with pytest.raises(InputError) as error:
        BlockConfig.for_model(tiny.config, **sizes)
    assert str(error.value).startswith("the drafter's sizes: ")
    assert said in str(error.value)


@pytest.mark.parametrize("raw", [PUBLISHED, SMALL])
def test_what_transformers_writes_beside_it_is_harmless(raw):
    more = {"_name_or_path": "x", "auto_map": {}, "pad_token_id": None, "torch_dtype": "bfloat16", "use_cache": False}
    more |= {"transformers_version": "5.0", "max_window_layers": 3, "use_sliding_window": False, "dtype": "float32"}
    assert BlockConfig.from_dict(raw | more) == BlockConfig.from_dict(raw)


def test_embedded_and_downloaded_folders(tmp_path, monkeypatch):
    assert weights.find("nano") == weights.EMBEDDED_DRAFTER
    asked = []
    monkeypatch.setattr(weights, "_downloaded", {})
    monkeypatch.setattr(weights, "resolve", lambda place: asked.append(place) or tmp_path)
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert weights.find("owner/name") == tmp_path
    assert asked == ["owner/name"]  # the Hub once
    (tmp_path / "owner" / "name").mkdir(parents=True)
    weights.find("owner/name")
    assert len(asked) == 2  # a folder goes first


# same sizes of q_proj and k_proj, cut into heads otherwise: caught by the norms of a head
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 1, 16), (12, 4, 4), (2, 6, 8), (6, 2, 4)])
def test_a_wrong_head_split_is_refused(tmp_path, tiny, heads, kv_heads, size):
    folder = write_drafter(tmp_path)
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size}
    (folder / "config.json").write_text(json.dumps({**SMALL, **sizes}))
    refused(tiny, folder, "config.json")


def test_files_that_are_refused(tmp_path, tiny):
    folder = write_drafter(tmp_path / "drafter")
    file, config = folder / "model.safetensors", folder / "config.json"
    whole, text = file.read_bytes(), config.read_text()
    for cut in (0, 5, 8, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        refused(tiny, folder, "download it again")
    file.write_bytes(whole + b"\0")
    refused(tiny, folder, "its header says")
    file.unlink()
    refused(tiny, folder, "no model*.safetensors here")
    file.write_bytes(whole)
    for broken, said in (("{", "not JSON"), ("[]", "must hold a JSON object"), ("\xff", "not JSON")):
        config.write_bytes(broken.encode("latin-1"))
        refused(tiny, folder, said)
    config.unlink()
    refused(tiny, folder, "no such file")
    config.write_text(text)
    make(tiny, str(folder))


@pytest.mark.parametrize("place", ["no/such/folder/here", "no-folder"])
def test_places_that_are_refused(tiny, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(tiny, place, "no such f")
    refused(tiny, "", "the name of the model is empty")


@pytest.mark.parametrize(
    ("options", "said", "kind"),
    [
        ({"drafter_bits": 3}, "drafter_bits must be 4 or 8, not 3", UsageError),
        ({"drafter_bits": True}, "drafter_bits must be 4 or 8", UsageError),
        ({"drafter_bits": "4"}, "drafter_bits must be 4 or 8", UsageError),
        ({"drafter_bits": 4}, "cannot be quantised in groups", InputError),
        ({"draft_head_bits": 16}, "draft_head_bits must be 4 or 8, not 16", UsageError),
        ({"draft_head_bits": 4}, "draft_head_bits: matrices 24 wide cannot be quantised", UsageError),
        ({"draft_vocab": 0}, "draft_vocab: must hold ids in 0-130", UsageError),
        ({"draft_vocab": 132}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": -1}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": 10**30}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": True}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": 1.5}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": "999999999999999999999999"}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": [131]}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": []}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": ["3"]}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": [-1]}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": [3, True]}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": [3, 4.0]}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": b"ab"}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": bytearray(b"ab")}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": memoryview(b"ab")}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": np.array([3.0])}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": np.array([[3]])}, "draft_vocab: must hold ids", UsageError),
        ({"draft_vocab": np.array([True])}, "draft_vocab: must hold ids", UsageError),
        (
            {"draft_vocab": "no/such/file.json"},
            "draft_vocab no/such/file.json: neither a number nor a file",
            UsageError,
        ),
    ],
)
def test_options_that_are_refused(tmp_path, tiny, options, said, kind):
    refused(tiny, write_drafter(tmp_path), said, kind, **options)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1, 131]", "must hold ids in 0-130"),
        (b"[]", "must hold ids in 0-130"),
        (b'{"ids": [1]}', "must hold a JSON list of ids"),
        (b"[1,", "not a list of ids in JSON"),
        (b"\xff\xfe", "not a list of ids in JSON"),
        (b"[" * 100_000, "not a list of ids in JSON"),
        (b"[" + b"1" * 5000 + b"]", "not a list of ids in JSON"),
        (b"[true]", "must hold ids in 0-130"),
    ],
    ids=range(8),
)
def test_a_vocabulary_file_that_is_refused(tmp_path, content, said):
    path = tmp_path / "ids.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_vocabulary(spelled(str(path)), 131)
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_vocabularies(tmp_path):
    path = tmp_path / "ids.json"
    path.write_text("[5, 3, 5]")

    def read(given):
        ids = read_vocabulary(spelled(given), 131)
        return None if ids is None else list(ids)

    assert read(None) is None
    for three in (3, "3", range(3), (0, 1, 2), np.int64(3), np.arange(3), np.arange(3, dtype=np.uint8), mx.arange(3)):
        assert read(three) == [0, 1, 2]
    assert read(list(np.arange(3))) == [0, 1, 2]
    assert read(path) == read(str(path)) == [5, 3, 5]
