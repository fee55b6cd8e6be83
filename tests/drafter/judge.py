"""What our drafter and mlx-vlm's say of a case, and how far they are from the arbiter.

The measure is that of `mlx_dgemma.parity`: our error in float32 is at most 4 times what mlx-vlm makes
of float32, or 4 roundings of the largest value. Needs mlx-vlm: without it all that use this fail, they never skip.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import mlx.core as mx
import numpy as np

from mlx_dgemma.cache import CacheReader
from mlx_dgemma.drafter.block import Block
from mlx_dgemma.drafter.format import parse
from mlx_dgemma.drafter.head import Head
from mlx_dgemma.drafter.network import BlockNetwork
from mlx_dgemma.drafter.protocol import DraftContext
from mlx_dgemma.model import DiffusionGemma
from tests.drafter.arbiter import LAST, Guess
from tests.helpers import random_model, with_text

MAX_RATIO = 4.0
ROUNDING = 2.0**-23


@cache
def main_model(vocab_size: int) -> DiffusionGemma:
    return random_model(with_text(vocab_size=vocab_size))


def embedding(raw: dict) -> np.ndarray:
    return np.array(main_model(raw["vocab_size"]).model.decoder.embed_tokens.weight)


def random_features(raw: dict, length: int, seed: int = 1) -> np.ndarray:
    """(length, n * H), as large as hidden states are."""
    width = len(raw["dflash_config"]["target_layer_ids"]) * raw["hidden_size"]
    return (3 * np.random.default_rng(seed).standard_normal((length, width))).astype(np.float32)


def our_drafter(raw: dict, given: dict[str, np.ndarray]) -> Block:
    ours = BlockNetwork(parse(raw))
    ours.load_weights([(name, mx.array(array)) for name, array in given.items()])
    return Block(ours, Head(main_model(raw["vocab_size"])))


def ours(drafter: Block, features: np.ndarray, chunk: int, last: int = LAST) -> Guess:
    """What our drafter says, having heard `chunk` features at a time."""
    model, rows = main_model(drafter.network.config.vocab_size), []

    def sample(logits, first):
        assert first == len(features) + 1 + len(rows)
        rows.extend(np.array(logits))
        return mx.argmax(logits, axis=-1)

    drafter.reset()
    tokens = [*[3] * len(features), last]
    for first in range(0, len(features), chunk):
        part = features[first : first + chunk]
        drafter.extend(tokens[first : first + len(part)], mx.array(part)[None])
    context = DraftContext(tokens, CacheReader(model.make_cache()), model, sample)
    draft = drafter.propose(context, 64)
    return Guess(np.array(rows), list(draft.tokens), np.array(draft.confidences))


def target(vocab_size: int):
    """What mlx-vlm asks of a main model: ours has its embedding, and scales it so."""
    model = main_model(vocab_size)
    return SimpleNamespace(
        embed_tokens=model.model.decoder.embed_tokens,
        embed_scale=model.config.hidden_size**0.5,
        config=model.config,
        layers=model.layers,
        rollback_speculative_cache=None,
    )


def their_drafter(raw: dict, given: dict[str, np.ndarray]):
    from mlx_vlm.speculative.drafters import dspark, qwen3_dflash

    package = dspark if "markov_rank" in raw["dflash_config"] else qwen3_dflash
    theirs = package.Model(package.ModelConfig.from_dict(raw))
    named = theirs.sanitize({name: mx.array(array) for name, array in given.items()})
    theirs.load_weights(list(named.items()), strict=True)
    return theirs


def theirs(drafter, features: np.ndarray, last: int = LAST) -> Guess:
    """What mlx-vlm's drafter says.

    The context comes whole, because its sliding caches show more than a window to a chunk of several
    rows; with a draft window row by row, because only then do all layers cut down to it.
    """
    config, rows = drafter.config, []

    def sample(logits):
        rows.extend(np.array(logits).reshape(-1, logits.shape[-1]))
        return mx.argmax(logits, axis=-1)

    def heard():
        caches = drafter.reset(target(config.vocab_size))
        early = features[:-1] if config.draft_window_size else features[:0]
        for row in early:
            mx.eval(drafter._hidden(mx.array([[last]]), mx.array(row)[None, None], caches))
        return caches, mx.array(features[len(early) :])[None]

    total = min(config.block_size, config.runtime_block_size or config.block_size)
    caches, rest = heard()
    tokens = drafter.draft_block(last, rest, caches, total, sample)
    if getattr(drafter, "confidence_head", None) is None:
        return Guess(np.array(rows), tokens[0].tolist())
    ids = mx.array([[last, *[config.mask_token_id] * (total - 1 - config.sample_from_anchor)]])
    caches, rest = heard()
    hidden = drafter._hidden(ids, rest, caches)[:, 0 if config.sample_from_anchor else 1 :]
    confidences = drafter.confidence(hidden, mx.array([last]), tokens)
    return Guess(np.array(rows), tokens[0].tolist(), np.array(confidences[0]))


def ratio(got: Guess, truth: Guess, floor: Guess) -> float:
    """Our error in logits and confidences by what is allowed to float32: the worst of largest and mean square."""
    compared = slice(None) if truth.compared is None else truth.compared
    worst = _ratios(*(guess.logits[compared] for guess in (got, truth, floor)))
    if truth.confidences is not None:
        worst += _ratios(got.confidences, truth.confidences, floor.confidences)
    return max(worst)


def _ratios(got: np.ndarray, truth: np.ndarray, floor: np.ndarray) -> list[float]:
    measures = (lambda x: np.abs(x).max(), lambda x: np.sqrt((x * x).mean()))
    return [measure(got - truth) / max(measure(floor - truth), ROUNDING * measure(truth)) for measure in measures]
