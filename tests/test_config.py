import pytest

from mlx_dgemma.config import FULL, SLIDING, GenerationConfig, ModelConfig
from mlx_dgemma.errors import InputError, UsageError
from tests.helpers import TINY, with_text


def test_both_spellings_give_the_same_layers():
    per_layer = {"2": {"head_dim": 16, "num_key_value_heads": 1}}
    newer = with_text(global_head_dim=None, num_global_key_value_heads=None, per_layer_config=per_layer)
    assert ModelConfig.from_dict(newer) == ModelConfig.from_dict(TINY)


def test_absent_keys_get_the_defaults_of_the_reference():
    text = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 4}
    config = ModelConfig.from_dict({"model_type": "diffusion_gemma", "text_config": text})
    assert config.final_logit_softcapping == 30.0
    assert config.canvas_length == 256
    assert config.num_hidden_layers == 30
    assert [i for i, layer in enumerate(config.layers) if layer.kind == FULL] == [5, 11, 17, 23, 29]
    assert (config.layers[0].head_dim, config.layers[5].head_dim) == (256, 512)
    assert (config.layers[0].rope_theta, config.layers[0].rotary_factor) == (1e4, 1.0)
    assert (config.layers[5].rope_theta, config.layers[5].rotary_factor) == (1e6, 0.25)
    assert config.layers[5].num_key_value_heads == config.layers[0].num_key_value_heads == 4


def test_the_last_layer_is_full_whatever_layer_types_says():
    config = ModelConfig.from_dict(with_text(layer_types=[SLIDING] * 3))
    assert config.layers[-1].kind == FULL
    assert config.layers[-1].head_dim == 16


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({**TINY, "model_type": "gemma4"}, "model_type"),
        (with_text(num_experts=None), "num_experts"),
        (with_text(use_bidirectional_attention="all"), "use_bidirectional_attention"),
        (with_text(hidden_activation="relu"), "hidden_activation"),
        (with_text(attention_bias=True), "attention_bias"),
        (with_text(hidden_size=0), "hidden_size"),
        (with_text(hidden_size="wide"), "hidden_size"),
        (with_text(hidden_size=24.5), "hidden_size"),
        (with_text(sliding_window=9.0), "sliding_window"),
        (with_text(num_hidden_layers=3.0), "num_hidden_layers"),
        (with_text(rms_norm_eps=float("inf")), "rms_norm_eps"),
        (with_text(layer_types=5), "layer_types"),
        (with_text(layer_types=[["a"], ["b"], ["c"]]), "layer_types"),
        (with_text(per_layer_config=[1]), "per_layer_config"),
        (with_text(per_layer_config={"2": 5}), "per_layer_config: 2"),
        (with_text(rope_parameters=[1]), "rope_parameters"),
        (with_text(rope_parameters={SLIDING: 5}), SLIDING),
        (with_text(rope_parameters={FULL: {"rope_theta": 1e6, "partial_rotary_factor": 2.0}}), "partial_rotary"),
        (with_text(eos_token_id="1"), "eos_token_id"),
        (with_text(pad_token_id="x"), "pad_token_id"),
        ({**TINY, "quantization": "4bit"}, "quantization"),
        (with_text(top_k_experts=9), "top_k_experts"),
        (with_text(num_attention_heads=3), "query heads"),
        (with_text(head_dim="8"), "head_dim"),
        (with_text(layer_types=[SLIDING, FULL]), "layer_types"),
        (with_text(rope_parameters={FULL: {"rope_type": "yarn"}}), "rope_type"),
        (with_text(rope_parameters={FULL: {"rope_type": "proportional"}}), "rope_theta"),
        ({**TINY, "tie_word_embeddings": False}, "tie_word_embeddings"),
        ({**TINY, "text_config": [1]}, "text_config"),
        ({**TINY, "canvas_length": -1}, "canvas_length"),
    ],
)
def test_what_cannot_run_is_refused_by_name(raw, named):
    with pytest.raises(InputError, match=named) as caught:
        ModelConfig.from_dict(raw, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert "\n" not in str(caught.value)


def test_generation_config_reads_the_nested_bound_and_takes_nulls_for_defaults():
    raw = {
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.3},
        "max_denoising_steps": None,
        "t_min": None,
        "eos_token_id": 7,
    }
    config = GenerationConfig.from_dict(raw)
    assert (config.entropy_bound, config.max_denoising_steps, config.t_min) == (0.3, 48, 0.4)
    assert config.eos_token_ids == (7,)


@pytest.mark.parametrize(
    "options",
    [
        {"max_denoising_steps": 0},
        {"max_denoising_steps": 1.5},
        {"max_new_tokens": -1},
        {"entropy_bound": 0},
        {"entropy_bound": float("nan")},
        {"t_min": 0.8},
        {"t_min": 0.9},
        {"t_min": -0.1},
        {"t_max": "hot"},
        {"t_max": float("inf")},
        {"t_min": 0.0, "t_max": 1e-60},
        {"stability_threshold": -1},
        {"confidence_threshold": 0.0},
    ],
)
def test_options_out_of_range_are_usage_errors(options):
    with pytest.raises(UsageError, match="|".join(options).replace("t_max", "t_max|t_min")):
        GenerationConfig().replace(**options)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"sampler_config": "x"}, "sampler_config"),
        ({"eos_token_id": 1.5}, "eos_token_id"),
        ({"pad_token_id": "a"}, "pad"),
    ],
)
def test_a_generation_config_of_wrong_types_is_refused(raw, named):
    with pytest.raises(InputError, match=named):
        GenerationConfig.from_dict(raw, "generation_config.json")


def test_a_generation_config_of_another_sampler_is_refused():
    with pytest.raises(InputError, match="OtherSampler"):
        GenerationConfig.from_dict({"sampler_config": {"_cls_name": "OtherSampler"}})
