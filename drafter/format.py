"""config.json of a block drafter: the DFlash and DSpark families' keys, read strictly, and written as z-lab does.

In DFlash's files `block_size` counts the last token as well, in DSpark's the drafts alone, unless
`dspark_bonus_anchor` says otherwise. What says something that is not known here is refused, not passed over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from ..config import FULL, SLIDING
from ..errors import InputError
from .geometry import SIZES, BlockConfig, whole

LARGEST_REAL = 1e30  # float32 holds it
CLASSES = ("DFlashDraftModel", "Qwen3DSparkModel", "DSparkDraftModel")

# the values of keys of which the network does no other
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3", "dspark", "dflash"),
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "attention_sink_bias": (None, False),
    "rope_is_neox_style": (None, True),
    "markov_head_type": (None, "vanilla"),
    "rope_scaling": (None,),
    "quantization": (None,),
    "quantization_config": (None,),
}
# what says something about the drafter, at the top of config.json or in its dflash_config
_READ = {*SIZES, *_SUPPORTED} | set(
    "architectures block_size causal confidence_head_with_markov dflash_config dflash_query_causal draft_window_size "
    "dspark_bonus_anchor enable_confidence_head final_logit_softcapping is_causal layer_types markov_rank "
    "mask_token_id num_hidden_layers num_target_layers projector_type rms_norm_eps rope_parameters rope_theta "
    "runtime_block_size sample_from_anchor sliding_window swa_window_size target_layer_ids".split()
)
# how many drafts others ask for, which is the loop's to choose here
_WIDTHS = {"block_size_policy", "dflash_initial_block_size", "prefer_requested_block_size"}
# what transformers writes beside it: of training, of generation, of the embedding and head, which are the model's
_HARMLESS = set(
    "_attn_implementation _name_or_path attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype "
    "eos_token_id id2label initializer_range is_decoder is_encoder_decoder label2id max_window_layers "
    "output_attentions output_hidden_states pad_token_id problem_type return_dict tie_word_embeddings torch_dtype "
    "transformers_version use_cache use_sliding_window".split()
)


def parse(raw: Mapping[str, Any], where: str = "config.json") -> BlockConfig:
    """The drafter of a config.json. Raises InputError naming the key that is missing or not supported."""
    keys = _Keys(raw, where)
    _require_supported(keys)
    is_dspark = _is_dspark(keys)
    config = BlockConfig(
        **{name: keys.size(name) for name in SIZES},
        kinds=_kinds(keys),
        taps=_taps(keys),
        rms_norm_eps=keys.positive("rms_norm_eps", keys.given("rms_norm_eps")),
        rope_theta=_rope_theta(keys),
        sliding_window=keys.get("swa_window_size", keys.get("sliding_window")),
        num_target_layers=keys.size("num_target_layers"),
        mask_token_id=keys.size("mask_token_id", least=0),
        positions=keys.size("block_size"),
        causal=_causal(keys),
        draft_window=keys.get("draft_window_size"),
        final_logit_softcapping=_softcap(keys),
    )
    if is_dspark:
        config = _with_dspark(config, keys)
    if keys.get("runtime_block_size") is not None:  # mlx-vlm's word for the last token and the drafts together
        fewer = keys.size("runtime_block_size") - (1 if config.from_anchor else 0)
        config = replace(config, positions=min(config.positions, fewer))
    return config.checked(where)


def as_json(config: BlockConfig) -> dict[str, Any]:
    """config.json, as z-lab writes DFlash's, and with DSpark's keys where they are needed."""
    own: dict[str, Any] = {"mask_token_id": config.mask_token_id, "target_layer_ids": list(config.taps)}
    is_dspark = config.markov_rank is not None
    if is_dspark:
        own |= {
            "projector_type": "dspark",
            "markov_rank": config.markov_rank,
            "markov_head_type": "vanilla",
            "enable_confidence_head": config.confidence is not None,
            "confidence_head_with_markov": config.confidence == "hidden and markov",
            "sample_from_anchor": config.from_anchor,
            "block_size_policy": "fixed",
        }
    own |= {"causal": True} if config.causal else {}
    own |= {"draft_window_size": config.draft_window} if config.draft_window is not None else {}
    return {
        "architectures": ["Qwen3DSparkModel" if is_dspark else "DFlashDraftModel"],
        "model_type": "qwen3",
        "attention_bias": False,
        "block_size": config.drafts if is_dspark else config.positions,
        "dflash_config": own,
        "dtype": "bfloat16",
        "final_logit_softcapping": config.final_logit_softcapping,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_types": list(config.kinds),
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": len(config.kinds),
        "num_key_value_heads": config.num_key_value_heads,
        "num_target_layers": config.num_target_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": True,
        "vocab_size": config.vocab_size,
    } | ({"runtime_block_size": config.drafts + 1} if is_dspark else {})


class _Keys:
    """Reads keys from the top of config.json and from its `dflash_config`, which goes first."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.where, self.raw = where, raw
        self.own: Mapping[str, Any] = {}
        self.own = self.part("dflash_config")

    def get(self, name: str, default: Any = None) -> Any:
        """Null says nothing, there as here."""
        values = (part.get(name) for part in (self.own, self.raw))
        return next((value for value in values if value is not None), default)

    def given(self, name: str) -> Any:
        """What no default makes right: the families' classes differ in theirs."""
        value = self.get(name)
        if value is None:
            raise InputError(f"{self.where}: {name} is missing")
        return value

    def part(self, name: str) -> Mapping[str, Any]:
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            self.refuse(name, value, "an object")
        return value

    def size(self, name: str, least: int = 1) -> int:
        return whole(name, self.given(name), self.where, least)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            self.refuse(name, value, "true or false")
        return value

    def positive(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < LARGEST_REAL:
            self.refuse(name, value, "a positive number")
        return float(value)

    def refuse(self, name: str, value: Any, wanted: str) -> NoReturn:
        raise InputError(f"{self.where}: {name} must be {wanted}, not {value!r:.80}")

    def refuse_unknown(self, place: str, part: Mapping[str, Any], known: Collection[str]) -> None:
        unknown = next((key for key in part if key not in known), None)
        if unknown is not None:
            raise InputError(f"{self.where}: the key {unknown!r:.80}{place} is not known to the block drafter")


def _require_supported(keys: _Keys) -> None:
    """Raise InputError for values that the network does not do, and keys that may mean anything."""
    for key, values in _SUPPORTED.items():
        if keys.get(key) not in values:
            raise InputError(f"{keys.where}: {key} = {keys.get(key)!r:.80} is not supported by the block drafter")
    keys.refuse_unknown("", keys.raw, _READ | _WIDTHS | _HARMLESS)
    keys.refuse_unknown(" of dflash_config", keys.own, (_READ - {"dflash_config"}) | _WIDTHS)


def _is_dspark(keys: _Keys) -> bool:
    names = keys.get("architectures", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        keys.refuse("architectures", names, "a list of names")
    projector = keys.get("projector_type")
    if projector not in (None, "dspark", "dflash"):
        keys.refuse("projector_type", projector, '"dspark"')
    unknown = next((name for name in names if name not in CLASSES), None)
    if unknown is not None:
        hint = ": it has an embedding and a head of its own" if unknown == "Gemma4DSparkModel" else ""
        raise InputError(f"{keys.where}: {unknown} cannot draft for this model{hint}; {', '.join(CLASSES)} can")
    # older files name DFlash's class and have nothing but the rank to tell
    is_named = projector == "dspark" or any("DSpark" in name for name in names)
    return is_named or (keys.get("markov_rank") is not None and keys.size("markov_rank", least=0) > 0)


def _with_dspark(config: BlockConfig, keys: _Keys) -> BlockConfig:
    from_anchor = keys.flag("sample_from_anchor", True)
    drafts = config.positions - keys.flag("dspark_bonus_anchor", False)
    reads_markov, confidence = keys.flag("confidence_head_with_markov", True), None
    if keys.flag("enable_confidence_head", False):
        confidence = "hidden and markov" if reads_markov else "hidden"
    return replace(
        config,
        positions=drafts if from_anchor else drafts + 1,
        from_anchor=from_anchor,
        markov_rank=keys.get("markov_rank", 256),
        confidence=confidence,
    )


def _kinds(keys: _Keys) -> tuple[str, ...]:
    count = keys.size("num_hidden_layers")
    kinds = keys.get("layer_types") or [FULL] * count
    if not isinstance(kinds, list) or len(kinds) != count or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise InputError(f"{keys.where}: layer_types must name {count} layers, each {SLIDING!r} or {FULL!r}")
    return tuple(kinds)


def _taps(keys: _Keys) -> tuple[int, ...]:
    taps = keys.given("target_layer_ids")
    if not isinstance(taps, list) or any(type(tap) is not int for tap in taps):
        keys.refuse("target_layer_ids", taps, "a list of layers")
    return tuple(taps)


def _rope_theta(keys: _Keys) -> float:
    """Of `rope_parameters`, or where older files have it."""
    rope = keys.part("rope_parameters")
    for key, value in (("rope_type", "default"), ("partial_rotary_factor", 1.0)):
        if rope.get(key) not in (None, value):
            raise InputError(f"{keys.where}: {key} {rope[key]!r:.80} is not supported by the block drafter")
    keys.refuse_unknown(" of rope_parameters", rope, ("rope_theta", "rope_type", "partial_rotary_factor"))
    theta = rope.get("rope_theta")
    return keys.positive("rope_theta", keys.given("rope_theta") if theta is None else theta)


def _causal(keys: _Keys) -> bool:
    """Under any of the names that it has had; the first that is there counts."""
    spellings = ("causal", "dflash_query_causal", "is_causal")
    return keys.flag(next((name for name in spellings if keys.get(name) is not None), spellings[0]), False)


def _softcap(keys: _Keys) -> float | None:
    value = keys.get("final_logit_softcapping")
    return None if value is None else keys.positive("final_logit_softcapping", value)
