"""The network of a block drafter: Qwen3 layers that read the main model's features as extra rows.

    features (1, S, n * H) of encoded tokens --fc, hidden_norm--> fused (1, S, H)
        fused --each layer's k_proj, k_norm, rope and v_proj--> rows of context, kept in a cache
    embeddings (B, L, H) of [last, MASK ...] --layers, which see the context and the block--> hidden (B, L, H)

Embedding and head are the main model's. A block is run at positions that follow the context; its own
rows are never kept. The module tree has the names of the published files.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from ..cache import PrefixCache
from ..config import SLIDING
from ..layers import RMSNorm, Rotary
from .geometry import BlockConfig

Position = int | mx.array  # of the first of L, or (B,) of the first in each row of a batch


class View(Protocol):
    """What the positions of a block see."""

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Queries (B, heads, L, D) and their own keys and values (B, kv heads, L, D) -> (B, heads, L, D)."""


class Attention(nn.Module):
    """Grouped-query attention with q and k norms, and no norm of v."""

    def __init__(self, config: BlockConfig, index: int):
        super().__init__()
        self.index, self.heads, self.kv_heads = index, config.num_attention_heads, config.num_key_value_heads
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, self.heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, hidden, bias=False)
        self.q_norm = RMSNorm(size, config.rms_norm_eps)
        self.k_norm = RMSNorm(size, config.rms_norm_eps)
        self.scale = size**-0.5
        self._rotary = Rotary(config.layers[index])

    def rows(self, x: mx.array, first: Position) -> tuple[mx.array, mx.array]:
        """Keys and values (B, kv heads, L, D) of x (B, L, H)."""
        batch, length, _ = x.shape
        keys = self.k_norm(self.k_proj(x).reshape(batch, length, self.kv_heads, -1)).swapaxes(1, 2)
        return self._rotary(keys, first), self.v_proj(x).reshape(batch, length, self.kv_heads, -1).swapaxes(1, 2)

    def __call__(self, x: mx.array, first: Position, view: View) -> mx.array:
        batch, length, _ = x.shape
        queries = self.q_norm(self.q_proj(x).reshape(batch, length, self.heads, -1)).swapaxes(1, 2)
        out = view.attend(self.index, self._rotary(queries, first), *self.rows(x, first), self.scale)
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate = self.gate_proj(x)
        return self.down_proj(gate * mx.sigmoid(gate) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: BlockConfig, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, first: Position, view: View) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), first, view)
        return x + self.mlp(self.post_attention_layernorm(x))


class Markov(nn.Module):
    """DSpark's correction of logits by the token before: a product of two thin matrices."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.markov_w1 = nn.Embedding(config.vocab_size, config.markov_rank)
        self.markov_w2 = nn.Linear(config.markov_rank, config.vocab_size, bias=False)

    def before(self, ids: mx.array) -> mx.array:
        """What the tokens before say: ids (...) -> (..., rank)."""
        return self.markov_w1(ids)

    def rows(self, ids: mx.array) -> mx.array:
        """What `correction` needs for these ids alone: (...) -> (..., rank)."""
        return self.markov_w2.weight[ids]

    def correction(self, before: mx.array, rows: mx.array | None = None) -> mx.array:
        """Added to logits: (..., rank) -> (..., V), or of the ids of `rows` (..., n, rank): (..., n)."""
        return self.markov_w2(before) if rows is None else (rows @ before[..., None])[..., 0]


class Confidence(nn.Module):
    """How likely a draft is to be right, given that those before it are."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self._reads_markov = config.confidence == "hidden and markov"
        width = config.hidden_size + (config.markov_rank if self._reads_markov else 0)
        self.proj = nn.Linear(width, 1)

    def __call__(self, hidden: mx.array, before: mx.array) -> mx.array:
        """Logits (...) from hidden (..., H) and what the token before says (..., rank)."""
        read = mx.concatenate([hidden, before.astype(hidden.dtype)], axis=-1) if self._reads_markov else hidden
        return self.proj(read)[..., 0].astype(mx.float32)


class BlockNetwork(nn.Module):
    """The weights that drafters of all requests share."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.taps) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = [Layer(config, index) for index in range(len(config.kinds))]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.markov_rank is not None:
            self.markov_head = Markov(config)
        if config.confidence is not None:
            self.confidence_head = Confidence(config)

    def make_cache(self) -> PrefixCache:
        """For the context. Nothing is ever rolled back: what is not accepted does not get there."""
        return PrefixCache(self.config.windows, slack=0)

    def context(self, features: mx.array, first: int) -> list[tuple[mx.array, mx.array]]:
        """Rows of every layer from features (1, S, n * H) of tokens [first, first + S)."""
        fused = self.hidden_norm(self.fc(features))
        return [layer.self_attn.rows(fused, first) for layer in self.layers]

    def extend(self, features: mx.array, cache: PrefixCache) -> None:
        """Keep the rows of tokens that follow those in the cache."""
        for rows, (keys, values) in zip(cache.layers, self.context(features, cache.length), strict=True):
            rows.extend(keys, values)

    def hidden(self, embedded: mx.array, first: Position, view: View) -> mx.array:
        """Run blocks of embeddings (B, L, H): (B, L, H) after the final norm."""
        for layer in self.layers:
            embedded = layer(embedded, first, view)
        return self.norm(embedded)

    def predicting(self, hidden: mx.array) -> mx.array:
        """Those positions of whole blocks (B, L, H) that predict a draft: (B, drafts, H)."""
        return hidden if self.config.from_anchor else hidden[:, 1:]


class Behind:
    """The view of one block behind the context in a cache, which stays as it is."""

    def __init__(self, cache: PrefixCache, config: BlockConfig):
        self._cache, self._config = cache, config

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        keys, values = self._cache.layers[layer].beside(keys, values)
        mask = self._causal(layer, queries.shape[2], keys.shape[2]) if self._config.causal else None
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)

    def _causal(self, layer: int, queries: int, keys: int) -> mx.array:
        """(queries, keys). What a draft window left is seen by all; a sliding window is each position's own."""
        is_sliding = self._config.kinds[layer] == SLIDING
        distance = mx.arange(keys - queries, keys)[:, None] - mx.arange(keys)[None]
        return (distance >= 0) & (distance < (self._config.sliding_window if is_sliding else keys))
