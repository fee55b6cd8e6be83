"""One transformer layer, run causally (encode) or over a canvas (denoise), and its parts.

The weights are the same in both passes but for `layer_scalar`; what differs is passed in: which
rows are seen (`Pass`) and whether they are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear

from .cache import PrefixCache
from .config import LayerConfig, ModelConfig

SCORES_BUDGET = 1 << 28  # elements of attention scores held at once (0.5 GB in bf16)
SORT_FROM = 64  # token-expert pairs from which sorting by expert pays, as in mlx_lm


def fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Compile an elementwise function on a GPU; leave it alone on a CPU, where MLX would need a C++ compiler."""
    compiled = mx.compile(function, shapeless=True)
    return lambda *arrays: (compiled if mx.default_device() == mx.gpu else function)(*arrays)


@fused
def gated_gelu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu_tanh(gate) * up, with 0.5 * (1 + tanh(u)) as sigmoid(2 u): fewer operations, fewer roundings."""
    double = math.sqrt(8 / math.pi)
    return gate * mx.sigmoid(gate * (double + double * 0.044715 * (gate * gate))) * up


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the norm taken in float32; without weight if dims is None."""

    def __init__(self, dims: int | None, eps: float):
        super().__init__()
        if dims is not None:
            self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.get("weight"), self.eps)


@cache
def rotary_periods(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """1 / inverse frequency of every pair, (head_dim / 2,) float32; inf where a pair does not turn.

    The inverse frequencies are computed in float32 step by step as the reference does: MLX's own
    `base` argument drifts from them, by 0.02 at 262k positions, which flips router near-ties.
    """
    turning = int(factor * head_dim // 2)
    exponents = np.arange(0, 2 * turning, 2, dtype=np.float32) / np.float32(head_dim)
    inverse = np.float32(1.0) / np.float32(theta) ** exponents
    with np.errstate(divide="ignore"):
        return np.float32(1.0) / np.concatenate([inverse, np.zeros(head_dim // 2 - turning, np.float32)])


class Rotary:
    """Split-half RoPE with the reference's frequencies; x (B, H, L, D)."""

    def __init__(self, layer: LayerConfig):
        self.periods = mx.array(rotary_periods(layer.head_dim, layer.rope_theta, layer.rotary_factor))

    def __call__(self, x: mx.array, offset: int) -> mx.array:
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=offset, freqs=self.periods)


class Pass:
    """What all layers share in one run: the cache, where the queries start, and the masks.

    Args:
        causal: encode (rows are kept, each query sees what is before it) or denoise (rows are not
            kept, each query sees the prefix and the whole canvas).
        queries: the number of positions run.
    """

    def __init__(self, cache: PrefixCache, window: int, queries: int, causal: bool):
        self.cache, self.window, self.queries, self.causal = cache, window, queries, causal
        self.offset = cache.length
        self._masks: dict[int, mx.array] = {}

    def rows(self, index: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The rows that these queries see in layer `index`, their own last."""
        layer = self.cache.layers[index]
        return layer.extend(keys, values) if self.causal else layer.beside(keys, values)

    def sliding_mask(self, keys: int) -> mx.array | None:
        """(L, keys), True for the last `window` positions, self included; None where all are seen."""
        if not self.causal or (self.queries == 1 and keys <= self.window):
            return None  # the cache hands a canvas exactly the rows it may see
        if keys not in self._masks:
            distance = mx.arange(keys - self.queries, keys)[:, None] - mx.arange(keys)[None]
            self._masks[keys] = (distance >= 0) & (distance < self.window)
        return self._masks[keys]


class Attention(nn.Module):
    """Grouped-query attention with q/k/v norms and no score scale; full layers take V from K."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        layer = config.layers[index]
        self.index, self.heads, self.head_dim = index, config.num_attention_heads, layer.head_dim
        self.kv_heads, self.is_sliding = layer.num_key_value_heads, layer.is_sliding
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        if layer.is_sliding:
            self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self._v_norm = RMSNorm(None, config.rms_norm_eps)
        self._rotary = Rotary(layer)

    def __call__(self, x: mx.array, run: Pass) -> mx.array:
        batch, length, _ = x.shape
        queries = self.q_norm(self.q_proj(x).reshape(batch, length, self.heads, -1))
        raw_keys = self.k_proj(x).reshape(batch, length, self.kv_heads, -1)
        raw_values = self.v_proj(x).reshape(batch, length, self.kv_heads, -1) if self.is_sliding else raw_keys
        both = mx.concatenate([queries, self.k_norm(raw_keys)], axis=2).swapaxes(1, 2)  # turned in one go
        queries, keys = mx.split(self._rotary(both, run.offset), [self.heads], axis=1)  # (B, H, L, D)
        keys, values = run.rows(self.index, keys, self._v_norm(raw_values).swapaxes(1, 2))
        out = self._attend(queries, keys, values, run)
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, length, -1))

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array, run: Pass) -> mx.array:
        """Attention in tiles of queries, so that scores behind a long prefix never pass the budget."""
        batch, heads, length, _ = queries.shape
        tile = max(1, SCORES_BUDGET // (batch * heads * keys.shape[2]))
        prefix = keys.shape[2] - length
        outs = []
        for first in range(0, length, tile):
            last = min(length, first + tile)
            end = keys.shape[2]
            if self.is_sliding or not run.causal:
                mask = run.sliding_mask(end)
                mask = None if mask is None else mask[first:last]
            else:  # MLX aligns "causal" to the last key, as it should be here
                end, mask = prefix + last, "causal" if last - first > 1 else None
            part = mx.fast.scaled_dot_product_attention(
                queries[:, :, first:last], keys[:, :, :end], values[:, :, :end], scale=1.0, mask=mask
            )
            outs.append(part)
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)


class MLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(gated_gelu(self.gate_proj(x), self.up_proj(x)))


class Router(nn.Module):
    """Top-k experts of each token, from the raw residual: (weights, ids), both (B, L, K), weights float32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))
        self.top_k = config.top_k_experts
        self._root, self._eps = config.hidden_size**-0.5, config.rms_norm_eps

    def __call__(self, residual: mx.array) -> tuple[mx.array, mx.array]:
        scores = self.proj(mx.fast.rms_norm(residual, self.scale, self._eps) * self._root)
        ids = mx.argpartition(scores, kth=-self.top_k, axis=-1)[..., -self.top_k :]
        # softmax over the chosen ones: that over all, renormalised
        weights = mx.softmax(mx.take_along_axis(scores, ids, axis=-1).astype(mx.float32), axis=-1)
        return weights * self.per_expert_scale[ids], ids


class Experts(nn.Module):
    """Stacked gated MLPs, gate and up in one matrix; each token runs through the experts in `ids`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, hidden, count = config.moe_intermediate_size, config.hidden_size, config.num_experts
        self.gate_up_proj = SwitchLinear(hidden, 2 * width, count, bias=False)
        self.down_proj = SwitchLinear(width, hidden, count, bias=False)

    def __call__(self, x: mx.array, weights: mx.array, ids: mx.array, is_sorted: bool | None = None) -> mx.array:
        batch, length, top_k = ids.shape
        is_sorted = ids.size >= SORT_FROM if is_sorted is None else is_sorted
        if is_sorted:  # equal experts side by side, so that each is read once
            order = mx.argsort(ids.reshape(-1))
            tokens, ids = x.reshape(batch * length, 1, -1)[order // top_k], ids.reshape(-1)[order]
        else:
            tokens = x.reshape(batch, length, 1, 1, -1)
        gate, up = mx.split(self.gate_up_proj(tokens, ids, sorted_indices=is_sorted), 2, axis=-1)
        out = self.down_proj(gated_gelu(gate, up), ids, sorted_indices=is_sorted)
        if is_sorted:
            out = out[mx.argsort(order)]
        out = out.reshape(batch, length, top_k, -1) * weights[..., None]  # float32 by its weights
        return out.sum(axis=2).astype(x.dtype)


class Layer(nn.Module):
    """Attention, then dense MLP and experts side by side; `scalar` is the layer_scalar of the pass."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, index)
        self.mlp = MLP(hidden, config.intermediate_size)
        self.router = Router(config)
        self.experts = Experts(config)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm_1 = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        self.layer_scalar = mx.ones((1,))

    def __call__(self, x: mx.array, run: Pass, scalar: mx.array) -> mx.array:
        h = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), run))
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(h)))
        weights, ids = self.router(h)  # the raw residual: routing on a normed one gives stray tokens
        sparse = self.experts(self.pre_feedforward_layernorm_2(h), weights, ids)
        sparse = self.post_feedforward_layernorm_2(sparse)
        return (h + self.post_feedforward_layernorm(dense + sparse)) * scalar


class SelfConditioning(nn.Module):
    """post_norm(x + mlp(pre_norm(soft))): the canvas embeddings, told what the last step believed."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.pre_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self._post_norm = RMSNorm(None, config.rms_norm_eps)

    def __call__(self, x: mx.array, soft: mx.array | None) -> mx.array:
        if soft is None:  # the reference runs the MLP on zeros, which gives exactly zeros
            return self._post_norm(x)
        normed = self.pre_norm(soft)
        signal = self.down_proj(gated_gelu(self.gate_proj(normed), self.up_proj(normed)))
        return self._post_norm(x + signal)
