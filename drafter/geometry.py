"""The geometry of a block drafter: config.json of the DFlash and DSpark families, parsed, checked, written.

    DFlash (arXiv 2602.06036)   [last, MASK x (b - 1)]     position i predicts the token AT i
    DSpark (DeepSpec)           [last, MASK x (b - 1)]     position i predicts the token AFTER i
                                or as DFlash, if `sample_from_anchor` is false

In DFlash's files `block_size` counts the last token as well, in DSpark's the drafts alone, unless
`dspark_bonus_anchor` says otherwise. Everything here is in positions that are run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from ..config import FULL, SLIDING, LayerConfig, ModelConfig
from ..errors import InputError

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
LARGEST = 1 << 24  # of any size; what is beyond was not meant, and has no array in MLX
LIMITS = {"num_hidden_layers": 1024, "block_size": 4096}  # of what is smaller still
LARGEST_REAL = 1e30  # float32 holds it

# what says something about the drafter, at the top of config.json or in its dflash_config
_READ = {
    *_SIZES,
    "architectures",
    "attention_bias",
    "attention_sink_bias",
    "block_size",
    "causal",
    "confidence_head_with_markov",
    "dflash_config",
    "dflash_query_causal",
    "draft_window_size",
    "dspark_bonus_anchor",
    "enable_confidence_head",
    "final_logit_softcapping",
    "hidden_act",
    "is_causal",
    "layer_types",
    "markov_head_type",
    "markov_rank",
    "mask_token_id",
    "model_type",
    "num_hidden_layers",
    "num_target_layers",
    "projector_type",
    "quantization",
    "quantization_config",
    "rms_norm_eps",
    "rope_is_neox_style",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "runtime_block_size",
    "sample_from_anchor",
    "sliding_window",
    "swa_window_size",
    "target_layer_ids",
}
# how many drafts others ask for, which is the loop's to choose here
_WIDTHS = {"block_size_policy", "dflash_initial_block_size", "prefer_requested_block_size"}
# what transformers writes beside it: of training, of generation, of the embedding and head, which are the model's
_HARMLESS = {
    "_attn_implementation",
    "_name_or_path",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "max_window_layers",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_sliding_window",
}


def whole(name: str, value: Any, where: str, least: int = 1) -> int:
    """A whole number not above the limit of its name. Raises InputError naming it."""
    most = LIMITS.get(name, LARGEST)
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"{where}: {name} must be a whole number in {least}-{most}, not {value!r:.80}")
    return value


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Sizes and semantics of a block drafter.

    Attributes:
        positions: run for a block, the last token's among them.
        from_anchor: position i predicts the token after i, so that the first logits are the last token's.
        taps: the layers of the main model whose outputs it reads, 0-based.
        causal: whether a position of the block sees only those before it.
        draft_window: rows of context that every layer keeps at most, None: all that its kind may see.
        markov_rank: of the correction by the token before; None: there is none.
        confidence: "hidden", "hidden and markov" (what the confidence head reads), or None.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int = 262_144
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    kinds: tuple[str, ...]
    sliding_window: int | None = None
    taps: tuple[int, ...]
    num_target_layers: int
    mask_token_id: int
    positions: int
    from_anchor: bool = False
    causal: bool = False
    draft_window: int | None = None
    markov_rank: int | None = None
    confidence: str | None = None
    final_logit_softcapping: float | None = None

    @property
    def drafts(self) -> int:
        """Tokens of a whole draft."""
        return self.positions if self.from_anchor else self.positions - 1

    @property
    def layers(self) -> list[LayerConfig]:
        sizes = {"head_dim": self.head_dim, "num_key_value_heads": self.num_key_value_heads}
        return [LayerConfig(kind=k, **sizes, rope_theta=self.rope_theta, rotary_factor=1.0) for k in self.kinds]

    @property
    def windows(self) -> list[int | None]:
        """How many rows of context each layer keeps; None: all."""
        limits = [(self.draft_window, self.sliding_window - 1 if k == SLIDING else None) for k in self.kinds]
        return [min((limit for limit in pair if limit is not None), default=None) for pair in limits]

    @classmethod
    def for_model(cls, model: ModelConfig, **sizes: Any) -> BlockConfig:
        """A new drafter for a model; what is not given follows the published one for Gemma 4.

        Taps are evenly spaced from layer 1 to the third last, as DFlash's are; over all layers, if those are too few.
        """
        count = min(sizes.pop("num_taps", 6), model.num_hidden_layers)
        layers = whole("num_hidden_layers", sizes.pop("num_hidden_layers", 5), "the drafter's sizes")
        depth = model.num_hidden_layers
        first, last = (1, depth - 3) if depth - 3 >= count else (0, depth - 1)
        taps = [first + round(i * (last - first) / max(1, count - 1)) for i in range(count)]
        usual: dict[str, Any] = {
            "hidden_size": model.hidden_size,
            "intermediate_size": 2 * model.hidden_size,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": model.vocab_size,
            "max_position_embeddings": model.max_position_embeddings,
            "rms_norm_eps": model.rms_norm_eps,
            "kinds": (*[SLIDING] * (layers - 1), FULL),
            "sliding_window": 2048,
            "taps": tuple(taps),
            "num_target_layers": model.num_hidden_layers,
            "mask_token_id": 4,
            "positions": 16,
            "final_logit_softcapping": model.final_logit_softcapping,
        }
        return cls(**(usual | sizes)).checked("the drafter's sizes")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str = "config.json") -> BlockConfig:
        """Parse config.json of either family. Raises InputError naming the key that is missing or not supported."""
        return _Parser(raw, where).config().checked(where)

    def to_dict(self) -> dict[str, Any]:
        """config.json, as z-lab writes DFlash's, and with DSpark's keys where they are needed."""
        own: dict[str, Any] = {"mask_token_id": self.mask_token_id, "target_layer_ids": list(self.taps)}
        is_dspark = self.markov_rank is not None
        if is_dspark:
            own |= {
                "projector_type": "dspark",
                "markov_rank": self.markov_rank,
                "markov_head_type": "vanilla",
                "enable_confidence_head": self.confidence is not None,
                "confidence_head_with_markov": self.confidence == "hidden and markov",
                "sample_from_anchor": self.from_anchor,
                "block_size_policy": "fixed",
            }
        own |= {"causal": True} if self.causal else {}
        own |= {"draft_window_size": self.draft_window} if self.draft_window is not None else {}
        return {
            "architectures": ["Qwen3DSparkModel" if is_dspark else "DFlashDraftModel"],
            "model_type": "qwen3",
            "attention_bias": False,
            "block_size": self.drafts if is_dspark else self.positions,
            "dflash_config": own,
            "dtype": "bfloat16",
            "final_logit_softcapping": self.final_logit_softcapping,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "layer_types": list(self.kinds),
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": len(self.kinds),
            "num_key_value_heads": self.num_key_value_heads,
            "num_target_layers": self.num_target_layers,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": True,
            "vocab_size": self.vocab_size,
        } | ({"runtime_block_size": self.drafts + 1} if is_dspark else {})

    def checked(self, where: str) -> BlockConfig:
        """Itself. Raises InputError for sizes beyond their limits, or that contradict each other."""

        def refuse(what: str) -> NoReturn:
            raise InputError(f"{where}: {what}")

        for name, value, least in self._whole_numbers():
            whole(name, value, where, least)
        if self.num_attention_heads % self.num_key_value_heads:
            refuse(f"{self.num_key_value_heads} key/value heads do not divide {self.num_attention_heads} query heads")
        if self.head_dim % 2:
            refuse(f"head_dim {self.head_dim} is odd")
        if self.num_attention_heads * self.head_dim > LARGEST:
            refuse(f"num_attention_heads {self.num_attention_heads} of head_dim {self.head_dim} are too large")
        if not self.taps or list(self.taps) != sorted(set(self.taps)):
            refuse(f"target_layer_ids must be layers in order, each once, not {list(self.taps)}")
        if self.taps[0] < 0 or self.taps[-1] >= self.num_target_layers:
            refuse(f"target_layer_ids {list(self.taps)} are not layers 0-{self.num_target_layers - 1}")
        if not 0 <= self.mask_token_id < self.vocab_size:
            refuse(f"mask_token_id {self.mask_token_id} is not in the vocabulary of {self.vocab_size}")
        if SLIDING in self.kinds and self.sliding_window is None:
            refuse("sliding layers need a sliding_window")
        if self.drafts < 1:
            refuse(f"block_size: a block of {self.positions} positions holds no draft")
        if self.markov_rank is None and (self.from_anchor or self.confidence is not None):
            refuse("sample_from_anchor and a confidence head are DSpark's, which has a markov_rank")
        return self

    def _whole_numbers(self) -> list[tuple[str, int, int]]:
        """(name in config.json, value, least) of all that are there."""
        numbers = [(name, getattr(self, name), 1) for name in (*_SIZES, "num_target_layers")]
        numbers += [("num_hidden_layers", len(self.kinds), 1), ("mask_token_id", self.mask_token_id, 0)]
        numbers += [("block_size", self.positions, 0)]  # that none is left for a draft is said in other words
        optional = [("sliding_window", self.sliding_window, 1), ("draft_window_size", self.draft_window, 1)]
        optional += [("markov_rank", self.markov_rank, 1)]
        return numbers + [number for number in optional if number[1] is not None]

    def require_fit(self, model: ModelConfig, where: str) -> None:
        """Raise InputError unless the drafter reads this model's layers and writes its vocabulary."""
        cap = model.final_logit_softcapping  # the model's own is applied; a drafter that does not say is taken as it is
        for name, own, theirs in (
            ("vocab_size", self.vocab_size, model.vocab_size),
            ("hidden_size", self.hidden_size, model.hidden_size),
            ("num_target_layers", self.num_target_layers, model.num_hidden_layers),
            ("final_logit_softcapping", self.final_logit_softcapping or cap, cap),
        ):
            if own != theirs:
                raise InputError(f"{where}: {name} is {own}, the model's {theirs}; the drafter is for another model")


class _Parser:
    """Reads keys from the top of config.json and from its `dflash_config`, which goes first."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.where, self.raw = where, raw
        own = raw.get("dflash_config")
        if not isinstance(own, Mapping | None):
            self.refuse("dflash_config", own, "an object")
        self.own: Mapping[str, Any] = own or {}

    def config(self) -> BlockConfig:
        self.refuse_unsupported()
        is_dspark = self.is_dspark()
        sizes = {name: self.size(name) for name in _SIZES}
        count = self.size("num_hidden_layers")
        kinds = self.get("layer_types") or [FULL] * count
        if not isinstance(kinds, list) or len(kinds) != count or any(kind not in (FULL, SLIDING) for kind in kinds):
            raise InputError(f"{self.where}: layer_types must name {count} layers, each {SLIDING!r} or {FULL!r}")
        taps = self.given("target_layer_ids")
        if not isinstance(taps, list) or any(type(tap) is not int for tap in taps):
            self.refuse("target_layer_ids", taps, "a list of layers")
        config = BlockConfig(
            **sizes,
            rms_norm_eps=self._positive("rms_norm_eps", self.given("rms_norm_eps")),
            rope_theta=self.theta(),
            kinds=tuple(kinds),
            sliding_window=self.get("swa_window_size", self.get("sliding_window")),
            taps=tuple(taps),
            num_target_layers=self.size("num_target_layers"),
            mask_token_id=self.size("mask_token_id", least=0),
            positions=self.size("block_size"),
            causal=self.causal(),
            draft_window=self.get("draft_window_size"),
            final_logit_softcapping=self.softcap(),
        )
        config = self.dspark(config) if is_dspark else config
        runtime = self.get("runtime_block_size")
        if runtime is None:
            return config
        # mlx-vlm's word for the last token and the drafts together
        fewer = whole("runtime_block_size", runtime, self.where) - (1 if config.from_anchor else 0)
        return replace(config, positions=min(config.positions, fewer))

    def dspark(self, config: BlockConfig) -> BlockConfig:
        from_anchor = self.flag("sample_from_anchor", True)
        drafts = config.positions - self.flag("dspark_bonus_anchor", False)
        reads_markov, confidence = self.flag("confidence_head_with_markov", True), None
        if self.flag("enable_confidence_head", False):
            confidence = "hidden and markov" if reads_markov else "hidden"
        return replace(
            config,
            positions=drafts if from_anchor else drafts + 1,
            from_anchor=from_anchor,
            markov_rank=self.get("markov_rank", 256),
            confidence=confidence,
        )

    def causal(self) -> bool:
        """Under any of the names that it has had; the first that is there counts."""
        spellings = ("causal", "dflash_query_causal", "is_causal")
        return self.flag(next((name for name in spellings if self.get(name) is not None), spellings[0]), False)

    def is_dspark(self) -> bool:
        names = self.get("architectures", [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            self.refuse("architectures", names, "a list of names")
        projector = self.get("projector_type")
        if projector not in (None, "dspark", "dflash"):
            self.refuse("projector_type", projector, '"dspark"')
        known = ("DFlashDraftModel", "Qwen3DSparkModel", "DSparkDraftModel")
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            hint = ": it has an embedding and a head of its own" if unknown == "Gemma4DSparkModel" else ""
            raise InputError(f"{self.where}: {unknown} cannot draft for this model{hint}; {', '.join(known)} can")
        # older files name DFlash's class and have nothing but the rank to tell
        is_named = projector == "dspark" or any("DSpark" in name for name in names)
        return is_named or (self.get("markov_rank") is not None and self.size("markov_rank", least=0) > 0)

    def refuse_unsupported(self) -> None:
        """Values that the network does not do, and keys that may mean anything."""
        supported: dict[str, tuple[Any, ...]] = {
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
        for key, values in supported.items():
            if self.get(key) not in values:
                raise InputError(f"{self.where}: {key} = {self.get(key)!r:.80} is not supported by the block drafter")
        self.refuse_unknown("", self.raw, _READ | _WIDTHS | _HARMLESS)
        self.refuse_unknown(" of dflash_config", self.own, (_READ - {"dflash_config"}) | _WIDTHS)

    def refuse_unknown(self, place: str, part: Mapping[str, Any], known: Collection[str]) -> None:
        unknown = next((key for key in part if key not in known), None)
        if unknown is not None:
            raise InputError(f"{self.where}: the key {unknown!r:.80}{place} is not known to the block drafter")

    def theta(self) -> float:
        rope = self.get("rope_parameters")
        if rope is None:
            return self._positive("rope_theta", self.given("rope_theta"))
        if not isinstance(rope, Mapping):
            self.refuse("rope_parameters", rope, "an object")
        for key, value in (("rope_type", "default"), ("partial_rotary_factor", 1.0)):
            if rope.get(key) not in (None, value):
                raise InputError(f"{self.where}: {key} {rope[key]!r:.80} is not supported by the block drafter")
        self.refuse_unknown(" of rope_parameters", rope, ("rope_theta", "rope_type", "partial_rotary_factor"))
        theta = rope.get("rope_theta")
        return self._positive("rope_theta", self.given("rope_theta") if theta is None else theta)

    def softcap(self) -> float | None:
        value = self.get("final_logit_softcapping")
        return None if value is None else self._positive("final_logit_softcapping", value)

    # one key

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

    def size(self, name: str, least: int = 1) -> int:
        return whole(name, self.given(name), self.where, least)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        if value is not None and type(value) is not bool:
            self.refuse(name, value, "true or false")
        return default if value is None else value

    def _positive(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < LARGEST_REAL:
            self.refuse(name, value, "a positive number")
        return float(value)

    def refuse(self, name: str, value: Any, wanted: str) -> NoReturn:
        raise InputError(f"{self.where}: {name} must be {wanted}, not {value!r:.80}")
