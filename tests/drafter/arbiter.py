"""A block drafter in plain NumPy, and cases of every kind: nothing of ours, nothing of mlx-vlm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlx_dgemma.config import SLIDING

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
