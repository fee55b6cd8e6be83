"""config.json of block drafters: what is read, what is written, what is refused."""

from __future__ import annotations

import json

import pytest

from mlx_dgemma.config import FULL, SLIDING
from mlx_dgemma.drafter.format import as_json, parse
from mlx_dgemma.drafter.geometry import BlockConfig
from tests.drafter.files import MISSING, PUBLISHED, SMALL, changed, refused, write_drafter


def test_the_published_config():
    config = parse(PUBLISHED)
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


def test_a_dspark_config():
    config = parse(SMALL)
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
    config = parse(raw)
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
    assert getattr(parse(changed(SMALL, key, value)), attribute) == expected


def test_a_rank_alone_makes_it_dspark():
    raw = changed(changed(SMALL, "own.projector_type", MISSING), "architectures", ["DFlashDraftModel"])
    assert parse(raw).from_anchor


@pytest.mark.parametrize("raw", [PUBLISHED, SMALL])
def test_what_transformers_writes_beside_it_is_harmless(raw):
    more = {"_name_or_path": "x", "auto_map": {}, "pad_token_id": None, "torch_dtype": "bfloat16", "use_cache": False}
    more |= {"transformers_version": "5.0", "max_window_layers": 3, "use_sliding_window": False, "dtype": "float32"}
    assert parse(raw | more) == parse(raw)


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
    config = parse(raw)
    assert parse(json.loads(json.dumps(as_json(config)))) == config


def test_what_is_written_has_the_published_keys():
    written = as_json(parse(PUBLISHED))
    assert written == {key: PUBLISHED[key] for key in written}


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
