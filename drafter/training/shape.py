"""The geometry of the drafter that is trained: a new one of given sizes, or that of one to continue."""

from __future__ import annotations

from typing import Any

from ...config import ModelConfig
from ...errors import InputError, UsageError
from ..geometry import BlockConfig
from .options import Sizes

MARKOV_RANK = 256
NAMES = {  # flag -> attribute of BlockConfig
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "block": "positions",
    "window": "sliding_window",
    "mask_token": "mask_token_id",
    "taps": "taps",
    "markov_rank": "markov_rank",
}


def new(model: ModelConfig, sizes: Sizes) -> BlockConfig:
    """A drafter for a model. Raises UsageError for sizes that cannot be."""
    given = sizes.given()
    is_dspark = given.pop("family", "dflash") == "dspark"
    if "markov_rank" in given and not is_dspark:
        raise UsageError("--markov-rank is of --family dspark; dflash has no such correction")
    values: dict[str, Any] = {NAMES[name]: value for name, value in given.items() if name in NAMES}
    if type(values.get("taps")) is int:
        values["num_taps"] = values.pop("taps")
    if "layers" in given:
        values["num_hidden_layers"] = given["layers"]
    if is_dspark:
        values = {"markov_rank": MARKOV_RANK, "confidence": "hidden and markov", "from_anchor": True} | values
    try:
        config = BlockConfig.for_model(model, **values)
    except InputError as error:
        raise UsageError(str(error)) from None
    if len(config.taps) < values.get("num_taps", 1):
        raise UsageError(
            f"--taps {values['num_taps']}: spread from layer 1 to the third last, there are {len(config.taps)} "
            f"in a model of {model.num_hidden_layers} layers; name layers instead, as --taps 0,1"
        )
    return config


def require_same(config: BlockConfig, sizes: Sizes) -> None:
    """Raise UsageError for a size that contradicts the drafter that is continued."""
    has = {name: getattr(config, attribute) for name, attribute in NAMES.items()}
    has |= {"family": "dspark" if config.markov_rank is not None else "dflash", "layers": len(config.kinds)}
    for name, value in sizes.given().items():
        own = len(config.taps) if name == "taps" and type(value) is int else has[name]
        if value != own:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} {value} contradicts --init, whose drafter has {own}; leave the flag out")
