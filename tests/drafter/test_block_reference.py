"""The block drafter against mlx-vlm's modules, with a drafter in plain float64 NumPy as the arbiter.

The measure is that of `mlx_dgemma.parity`: our error in float32 is at most 4 times what mlx-vlm makes
of float32, or 4 roundings of the largest value. Needs mlx-vlm: without it these fail, they never skip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.cache import CacheReader
from mlx_dgemma.config import SLIDING
from mlx_dgemma.drafter import block, network, weights
from mlx_dgemma.drafter.block import Block
from mlx_dgemma.drafter.format import parse
from mlx_dgemma.drafter.geometry import BlockConfig
from mlx_dgemma.drafter.head import Head
from mlx_dgemma.drafter.network import BlockNetwork
from mlx_dgemma.drafter.protocol import DraftContext
from mlx_dgemma.model import DiffusionGemma
from tests.drafter.files import write
from tests.helpers import random_model, with_text

pytestmark = pytest.mark.reference

MAX_RATIO = 4.0
ROUNDING = 2.0**-23
LAST = 17  # the token that is not encoded yet
CAP = 30.0

DFLASH = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "block_size": 7,
    "dflash_config": {"mask_token_id": 4, "target_layer_ids": [0, 2]},
    "final_logit_softcapping": CAP,
    "head_dim": 8,
    "hidden_size": 24,
    "intermediate_size": 36,
    "max_position_embeddings": 4096,
    "num_attention_heads": 6,  # of 48 columns together, which is not the hidden size
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_target_layers": 3,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "vocab_size": 131,
}
DRAFT_WINDOW = 5
# tokens of context: less than most windows, and more than all. mlx-vlm cuts its rows down to a draft window
# when they are 64 more, so of all lengths this one shows what it means.
SHORT, MIDDLE = 5, DRAFT_WINDOW + 65
SLIDES = {"layer_types": [SLIDING, "full_attention", SLIDING], "sliding_window": 9}
SPARK = {"projector_type": "dspark", "markov_rank": 5}


def raw(own: dict | None = None, **top) -> dict:
    """DFLASH with other keys; `own` are those of its dflash_config."""
    return {**DFLASH, **top, "dflash_config": {**DFLASH["dflash_config"], **(own or {})}}


CONFIGS = {
    "full": raw(),
    "sliding": raw(**SLIDES),
    "one kv head": raw(num_attention_heads=3, num_key_value_heads=1, head_dim=16),
    "as many kv heads": raw(num_attention_heads=4, num_key_value_heads=4, head_dim=10),
    "wide": raw(num_attention_heads=8, num_key_value_heads=4, head_dim=12, intermediate_size=20),
    "causal": raw({"causal": True}),
    "causal, sliding": raw({"causal": True}, **SLIDES),
    "causal by its old name": raw(dflash_query_causal=True),
    "long block, short window": raw({"causal": True}, **SLIDES | {"sliding_window": 4}, block_size=16),
    "draft window": raw({"draft_window_size": DRAFT_WINDOW}),
    "draft window, causal": raw({"draft_window_size": DRAFT_WINDOW, "causal": True}),
    "narrow draft window, sliding": raw({"draft_window_size": DRAFT_WINDOW}, **SLIDES),
    "one tap": raw({"target_layer_ids": [1]}),
    "smaller block at run time": raw(runtime_block_size=4),
    "dspark": raw(SPARK),
    "dspark by its class": raw({"markov_rank": 5}, architectures=["Qwen3DSparkModel"], **SLIDES),
    "dspark, bonus anchor": raw(SPARK, dspark_bonus_anchor=True),
    "dspark, not from the anchor": raw(SPARK | {"sample_from_anchor": False}),
    "dspark, neither": raw(SPARK | {"sample_from_anchor": False}, dspark_bonus_anchor=True),
    "dspark, runtime": raw(SPARK | {"runtime_block_size": 5}, **SLIDES),
    "dspark, causal": raw(SPARK | {"causal": True}, **SLIDES),
    "dspark, no more ids than candidates": raw(SPARK | {"enable_confidence_head": True}, vocab_size=61, **SLIDES),
    "confidence": raw(SPARK | {"enable_confidence_head": True}),
    "confidence, sliding": raw(SPARK | {"enable_confidence_head": True, "sample_from_anchor": False}, **SLIDES),
    "confidence of hidden": raw(SPARK | {"enable_confidence_head": True, "confidence_head_with_markov": False}),
}


# --- weights by the names of the published files


def shapes(raw: dict) -> dict[str, tuple[int, ...]]:
    """Of every tensor, as drafter.md lists them."""
    hidden, wide, size = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    queries, keys = raw["num_attention_heads"] * size, raw["num_key_value_heads"] * size
    own = raw["dflash_config"]
    found = {"fc.weight": (hidden, len(own["target_layer_ids"]) * hidden)}
    found |= {"hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    for index in range(raw["num_hidden_layers"]):
        layer = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (size,),
            "self_attn.k_norm": (size,),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        found |= {f"layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    if "markov_rank" in own:
        rank = own["markov_rank"]
        found |= {f"markov_head.markov_{name}.weight": (raw["vocab_size"], rank) for name in ("w1", "w2")}
        if own.get("enable_confidence_head"):
            read = hidden + (rank if own.get("confidence_head_with_markov", True) else 0)
            found |= {"confidence_head.proj.weight": (1, read), "confidence_head.proj.bias": (1,)}
    return found


# layers that weigh more than the embedding, so that a draft is not one token over and over, and a
# correction that changes some of them without lifting one that is not among the best 64
GAINS = {"o_proj": 4.0, "down_proj": 4.0, "markov": 1.2}


def random_weights(raw: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """float32: norms near 1, matrices of unit gain but for GAINS."""
    chance = np.random.default_rng(seed)

    def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = chance.standard_normal(shape)
        noise = 1 + 0.2 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5
        gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
        return (noise * gain).astype(np.float32)

    return {name: fill(name, shape) for name, shape in shapes(raw).items()}


# --- the arbiter: one function a part, nothing of ours


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(eps)) * weight


def turned(x, first, theta):
    """RoPE, split-half, of x (heads, L, D) at positions from `first` on; frequencies as transformers has them."""
    import torch

    size = x.shape[-1]
    inverse = 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size))
    angles = np.arange(first, first + x.shape[1]).astype(x.dtype)[:, None] * inverse.numpy().astype(x.dtype)
    cos, sin = np.cos(np.concatenate([angles, angles], -1)), np.sin(np.concatenate([angles, angles], -1))
    half = size // 2
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin


def split(x, heads):
    return x.reshape(len(x), heads, x.shape[1] // heads).swapaxes(0, 1)  # (L, heads * D) -> (heads, L, D)


def softmax(x):
    shares = np.exp(x - x.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def seen_rows(raw, index, length):
    """How many of the last rows of context a layer keeps."""
    limits = [length, raw["dflash_config"].get("draft_window_size") or length]
    if "layer_types" in raw and raw["layer_types"][index] == SLIDING:
        limits.append(raw["sliding_window"] - 1)
    return min(limits)


def attention(raw, index, weights, x, fused):
    """x (L, H) of the block, behind the fused features (S, H) of the tokens before it."""
    eps, theta = raw["rms_norm_eps"], raw["rope_parameters"]["rope_theta"]
    heads, kv_heads = raw["num_attention_heads"], raw["num_key_value_heads"]
    start, length = len(fused), len(x)

    def rows(source, first):
        keys = rms_norm(split(source @ weights["k_proj"].T, kv_heads), weights["k_norm"], eps)
        return turned(keys, first, theta), split(source @ weights["v_proj"].T, kv_heads)

    queries = turned(rms_norm(split(x @ weights["q_proj"].T, heads), weights["q_norm"], eps), start, theta)
    kept = seen_rows(raw, index, start)
    pairs = zip(rows(fused, 0), rows(x, start), strict=True)
    keys, values = (np.concatenate([before[:, start - kept :], own], 1) for before, own in pairs)
    keys, values = (np.repeat(array, heads // kv_heads, 0) for array in (keys, values))
    scores = queries @ keys.swapaxes(1, 2) * x.dtype.type(raw["head_dim"] ** -0.5)
    if raw["dflash_config"].get("causal") or raw.get("dflash_query_causal"):
        distance = np.arange(kept, kept + length)[:, None] - np.arange(kept + length)
        is_sliding = "layer_types" in raw and raw["layer_types"][index] == SLIDING
        sees = (distance >= 0) & (distance < (raw["sliding_window"] if is_sliding else distance.size))
        scores = np.where(sees, scores, -np.inf)
    out = softmax(scores) @ values
    return out.swapaxes(0, 1).reshape(length, -1) @ weights["o_proj"].T


def mlp(weights, x):
    gate = x @ weights["gate_proj"].T
    return (gate / (1 + np.exp(-gate)) * (x @ weights["up_proj"].T)) @ weights["down_proj"].T


def arbiter_hidden(raw, weights, x, features):
    """The block (L, H) after the final norm, behind features (S, n * H)."""
    eps = raw["rms_norm_eps"]
    fused = rms_norm(features @ weights["fc.weight"].T, weights["hidden_norm.weight"], eps)
    for index in range(raw["num_hidden_layers"]):
        prefix = f"layers.{index}."
        own = {name.split(".")[-2]: array for name, array in weights.items() if name.startswith(prefix)}
        x = x + attention(raw, index, own, rms_norm(x, own["input_layernorm"], eps), fused)
        x = x + mlp(own, rms_norm(x, own["post_attention_layernorm"], eps))
    return rms_norm(x, weights["norm.weight"], eps)


def lengths(raw) -> tuple[int, bool]:
    """(tokens of a draft, whether the last token's position predicts the first of them)."""
    own = raw["dflash_config"]
    is_dspark = "markov_rank" in own
    drafts = raw["block_size"] - (raw.get("dspark_bonus_anchor", False) if is_dspark else 1)
    runtime = raw.get("runtime_block_size") or own.get("runtime_block_size")
    return min(drafts, runtime - 1 if runtime else drafts), is_dspark and own.get("sample_from_anchor", True)


@dataclass
class Guess:
    """What a drafter says: logits (drafts, V) it chose from, its choice, its confidences."""

    logits: np.ndarray
    tokens: list[int]
    confidences: np.ndarray | None = None
    compared: np.ndarray | None = None  # (drafts, V): which of the logits we correct as well, surely; None: all


def arbiter(raw, weights, embedding, features, last=LAST, dtype=np.float64) -> Guess:
    """The whole drafter, greedy."""
    weights = {name: array.astype(dtype) for name, array in weights.items()}
    embedding, features = embedding.astype(dtype), features.astype(dtype)
    drafts, from_anchor = lengths(raw)
    ids = [last, *[raw["dflash_config"]["mask_token_id"]] * (drafts - from_anchor)]
    x = embedding[ids] * dtype(raw["hidden_size"] ** 0.5)
    hidden = arbiter_hidden(raw, weights, x, features)[0 if from_anchor else 1 :]
    logits = np.tanh(hidden @ embedding.T / CAP) * CAP
    if "markov_head.markov_w1.weight" not in weights:
        return Guess(logits, logits.argmax(-1).tolist())
    # ours corrects the best 64; in float32 their order may differ where one leaves and another comes
    compared = logits >= np.sort(logits, -1)[:, [-min(60, raw["vocab_size"])]]
    before, tokens = [], [last]
    for row in logits:
        before.append(weights["markov_head.markov_w1.weight"][tokens[-1]])
        row += weights["markov_head.markov_w2.weight"] @ before[-1]
        tokens.append(int(row.argmax()))
    if "confidence_head.proj.weight" not in weights:
        return Guess(logits, tokens[1:], compared=compared)
    proj, bias = weights["confidence_head.proj.weight"][0], weights["confidence_head.proj.bias"][0]
    read = np.concatenate([hidden, before], -1)[:, : len(proj)]
    return Guess(logits, tokens[1:], 1 / (1 + np.exp(-(read @ proj + bias))), compared)


# --- ours and theirs


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


# --- judged


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


def judged(raw: dict, length: int, chunk: int, seed: int = 0) -> float:
    """The worst ratio of a case; the tokens are compared too, nan if they differ."""
    given, features = random_weights(raw, seed), random_features(raw, length)
    truth = arbiter(raw, given, embedding(raw), features)
    other = theirs(their_drafter(raw, given), features)
    own = ours(our_drafter(raw, given), features, chunk)
    assert other.tokens == truth.tokens
    worst = ratio(own, truth, other)
    return worst if own.tokens == truth.tokens else float("nan")


@pytest.mark.parametrize("length", [SHORT, MIDDLE])
@pytest.mark.parametrize("name", CONFIGS)
def test_as_near_to_the_truth_as_mlx_vlm(name, length):
    for chunk in (1000, 33, 1):
        assert judged(CONFIGS[name], length, chunk) <= MAX_RATIO


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("name", ["sliding", "dspark", "confidence, sliding"])
def test_with_other_weights(name, seed):
    assert judged(CONFIGS[name], 37, 8, seed=seed) <= MAX_RATIO


LONG = 2600


@pytest.mark.parametrize("chunk", [512, 4000])
@pytest.mark.parametrize(
    "name",
    ["full", "sliding", "dspark, not from the anchor"],
)
def test_far_from_the_start(name, chunk):
    """mlx-vlm's frequencies drift there, so float32 NumPy with the right ones is the floor."""
    raw = CONFIGS[name]
    given, features = random_weights(raw), random_features(raw, LONG)
    truth = arbiter(raw, given, embedding(raw), features)
    floor = arbiter(raw, given, embedding(raw), features, dtype=np.float32)
    own = ours(our_drafter(raw, given), features, chunk)
    assert ratio(own, truth, floor) <= MAX_RATIO
    assert own.tokens == truth.tokens


@pytest.mark.parametrize("name", ["full", "sliding", "dspark", "confidence", "causal, sliding"])
def test_without_context(name):
    """A prompt of one token."""
    raw = CONFIGS[name]
    given, features = random_weights(raw), random_features(raw, 0)
    truth, floor = (arbiter(raw, given, embedding(raw), features, dtype=dtype) for dtype in (np.float64, np.float32))
    own = ours(our_drafter(raw, given), features, 1)
    assert ratio(own, truth, floor) <= MAX_RATIO
    assert own.tokens == truth.tokens


def test_the_correction_decides():
    """Or the comparisons would say nothing about it."""
    for name in ("dspark", "dspark, not from the anchor"):
        raw = CONFIGS[name]
        given, features = random_weights(raw), random_features(raw, MIDDLE)
        plain = {key: 0 * array if "markov" in key else array for key, array in given.items()}
        corrected, uncorrected = (arbiter(raw, some, embedding(raw), features).tokens for some in (given, plain))
        assert sum(a != b for a, b in zip(corrected, uncorrected, strict=True)) >= 2
        assert len(set(corrected)) >= 4


# --- files


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_either_spelling_are_read_alike(tmp_path, name, prefix):
    raw, length = CONFIGS[name], 40
    given, features = random_weights(raw), random_features(raw, length)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    named = {prefix + key: mx.array(array) for key, array in given.items()}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), named)
    drafter = block.make(main_model(raw["vocab_size"]), str(tmp_path))
    expected = ours(our_drafter(raw, given), features, 9)
    got = ours(drafter, features, 9)
    assert (got.logits == expected.logits).all()
    assert got.tokens == expected.tokens
    assert sorted(given) == sorted(shapes(raw))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_we_write_is_read_by_mlx_vlm(tmp_path, name):
    from mlx_vlm.speculative.drafters import load_drafter

    raw, length = CONFIGS[name], MIDDLE
    given, features = random_weights(raw), random_features(raw, length)
    drafter = our_drafter(raw, given)
    write(drafter.network, tmp_path / "ours", mx.float32)
    loaded, kind = load_drafter(str(tmp_path / "ours"))
    assert kind == "dflash"
    assert type(loaded).__name__ == (
        "DSparkDraftModel" if "markov_rank" in raw["dflash_config"] else "DFlashDraftModel"
    )
    got = theirs(loaded, features)
    truth = arbiter(raw, given, embedding(raw), features)
    assert got.tokens == truth.tokens == ours(drafter, features, 1000).tokens
    direct = theirs(their_drafter(raw, given), features)
    assert (got.logits == direct.logits).all()


def test_written_in_bfloat16_it_is_read_by_mlx_vlm(tmp_path):
    from mlx_vlm.speculative.drafters import load_drafter

    raw = CONFIGS["confidence, sliding"]
    write(our_drafter(raw, random_weights(raw)).network, tmp_path / "ours")
    loaded, _ = load_drafter(str(tmp_path / "ours"))
    assert loaded.fc.weight.dtype == mx.bfloat16
    read = weights.read(tmp_path / "ours", main_model(131))
    assert mx.array_equal(read.fc.weight, loaded.fc.weight.astype(mx.float32))


# --- the check is worth what it catches


def dealt_heads(patch):
    """Columns dealt to the heads in turn instead of cut into heads."""

    def rows(self, x, heads):
        batch, length, _ = x.shape
        return x.reshape(batch, length, -1, heads).swapaxes(2, 3)

    def call(self, x, first, view):
        batch, length, _ = x.shape
        queries = self.q_norm(rows(self, self.q_proj(x), self.heads)).swapaxes(1, 2)
        out = view.attend(self.index, self._rotary(queries, first), *self.rows(x, first), self.scale)
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, length, -1))

    patch.setattr(network.Attention, "__call__", call)


def tiled_kv_heads(patch):
    """Query head i reads key head i modulo their number instead of i by the size of a group."""
    attend = network.Behind.attend

    def tiled(self, layer, queries, keys, values, scale):
        order = mx.argsort(mx.arange(queries.shape[1]) % keys.shape[1])
        out = attend(self, layer, queries[:, order], keys, values, scale)
        return out[:, mx.argsort(order)]

    patch.setattr(network.Behind, "attend", tiled)


def unscaled_embedding(patch):
    patch.setattr(DiffusionGemma, "embed", lambda self, ids: self.model.decoder.embed_tokens(ids))


def read_one_too_late(patch):
    own = BlockNetwork.predicting
    patch.setattr(BlockNetwork, "predicting", lambda self, hidden: mx.roll(own(self, hidden), -1, axis=1))


def read_as_the_other_family(patch):
    """[MASK ...] read where [last, MASK ...] is meant, or the other way round."""

    def predicting(self, hidden):
        return mx.roll(hidden, -1, axis=1) if self.config.from_anchor else hidden[:, :-1]

    patch.setattr(BlockNetwork, "predicting", predicting)


def block_one_too_far(patch):
    hidden = BlockNetwork.hidden
    patch.setattr(BlockNetwork, "hidden", lambda self, x, first, view: hidden(self, x, first + 1, view))


def context_one_too_far(patch):
    context = BlockNetwork.context
    patch.setattr(BlockNetwork, "context", lambda self, features, first: context(self, features, first + 1))


def changed_rows(change):
    def plant(patch):
        patch.setattr(network.Attention, "rows", change)

    return plant


def without_k_norm(self, x, first):
    batch, length, _ = x.shape
    keys = self.k_proj(x).reshape(batch, length, self.kv_heads, -1).swapaxes(1, 2)
    return self._rotary(keys, first), self.v_proj(x).reshape(batch, length, self.kv_heads, -1).swapaxes(1, 2)


_rows = network.Attention.rows


def with_v_norm(self, x, first):
    keys, values = _rows(self, x, first)
    return keys, mx.fast.rms_norm(values, None, 1e-6)


def other_mask(patch):
    start = network.Behind.__init__
    patch.setattr(
        network.Behind,
        "__init__",
        lambda self, cache, config: start(self, cache, replace(config, causal=not config.causal)),
    )


def other_window(by):
    def plant(patch):
        own = BlockConfig.windows.fget
        changed = property(lambda self: [None if window is None else window + by for window in own(self)])
        patch.setattr(BlockConfig, "windows", changed)

    return plant


def other_mask_window(patch):
    """The mask of a sliding layer sees one position less; what is kept is right."""
    causal = network.Behind._causal

    def narrow(self, layer, queries, keys):
        mask = causal(self, layer, queries, keys)
        return mask & (mx.arange(keys)[None] > mx.argmax(mask, axis=1)[:, None])

    patch.setattr(network.Behind, "_causal", narrow)


def from_right_to_left(patch):
    def corrected(self, hidden, logits, context):
        markov, first, last = self.network.markov_head, len(context.tokens), mx.array(context.tokens[-1])
        rows, chosen = {}, {}
        for position in reversed(range(len(logits))):
            rows[position] = logits[position] + markov.correction(markov.before(last))
            last = chosen[position] = mx.argmax(rows[position])
        stacked = mx.stack([rows[i] for i in range(len(logits))])
        context.sample(stacked, first)
        return mx.stack([chosen[i] for i in range(len(logits))]), mx.zeros(len(logits))

    patch.setattr(Block, "_corrected", corrected)


def always_by_the_last_token(patch):
    patch.setattr(network.Markov, "before", lambda self, ids: self.markov_w1(mx.full(ids.shape, LAST)))


def by_the_token_itself(patch):
    """The correction of a position by its own best guess."""
    own = Block._reordered

    def itself(self, logits, best, rows, before):
        return own(self, logits, best, rows, self.network.markov_head.before(mx.argmax(logits)))

    patch.setattr(Block, "_reordered", itself)


def confidence_without_what_is_before(patch):
    call = network.Confidence.__call__
    patch.setattr(network.Confidence, "__call__", lambda self, hidden, before: call(self, hidden, 0 * before))


def no_scale(patch):
    start = network.Attention.__init__

    def unscaled(self, config, index):
        start(self, config, index)
        self.scale = 1.0

    patch.setattr(network.Attention, "__init__", unscaled)


def no_softcap(patch):
    start = Head.__init__

    def uncapped(self, *given):
        start(self, *given)
        self._cap = 1e6

    patch.setattr(Head, "__init__", uncapped)


PLANTED = [
    (dealt_heads, "full"),
    (dealt_heads, "wide"),
    (tiled_kv_heads, "full"),
    (tiled_kv_heads, "wide"),
    (unscaled_embedding, "full"),
    (unscaled_embedding, "dspark"),
    (read_one_too_late, "full"),
    (read_one_too_late, "dspark"),
    (read_as_the_other_family, "full"),
    (read_as_the_other_family, "dspark"),
    (read_as_the_other_family, "dspark, not from the anchor"),
    (block_one_too_far, "full"),
    (block_one_too_far, "sliding"),
    (block_one_too_far, "dspark"),
    (context_one_too_far, "sliding"),
    (changed_rows(without_k_norm), "full"),
    (changed_rows(with_v_norm), "full"),
    (changed_rows(with_v_norm), "dspark"),
    (other_mask, "full"),
    (other_mask, "sliding"),
    (other_mask, "dspark"),
    (other_mask, "causal"),
    (other_window(1), "sliding"),
    (other_window(-1), "sliding"),
    (other_window(1), "draft window"),
    (other_mask_window, "causal, sliding"),
    (from_right_to_left, "dspark"),
    (always_by_the_last_token, "dspark"),
    (by_the_token_itself, "dspark"),
    (confidence_without_what_is_before, "confidence"),
    (no_scale, "full"),
    (no_softcap, "full"),
]


@pytest.mark.parametrize(("plant", "name"), PLANTED)
def test_a_planted_bug_fails(monkeypatch, plant, name):
    """Logits, or confidences, are far from the truth; a draft of other tokens is not needed to see it."""
    raw = CONFIGS[name]
    given, features = random_weights(raw), random_features(raw, MIDDLE)
    truth, other = arbiter(raw, given, embedding(raw), features), theirs(their_drafter(raw, given), features)
    plant(monkeypatch)
    own = ours(our_drafter(raw, given), features, 33)
    assert ratio(own, truth, other) > 100 * MAX_RATIO
