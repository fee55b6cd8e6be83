"""The geometry of a block drafter: its sizes and semantics, and what follows from them.

    DFlash (arXiv 2602.06036)   [last, MASK x (b - 1)]     position i predicts the token AT i
    DSpark (DeepSpec)           [last, MASK x (b - 1)]     position i predicts the token AFTER i
                                or as DFlash, if `sample_from_anchor` is false

Everything here is in positions that are run. The errors say the names of config.json (see `format`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from ..config import FULL, SLIDING, LayerConfig, ModelConfig
from ..errors import InputError

SIZES = (
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
        numbers = [(name, getattr(self, name), 1) for name in (*SIZES, "num_target_layers")]
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
