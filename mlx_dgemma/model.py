"""DiffusionGemma: one stack of weights, run causally over a prefix or bidirectionally over a canvas.

    ids --embed--> encode ----> hidden --logits--> next-token distributions
                     | K/V
                 PrefixCache
                     | read only
    canvas, soft --> denoise -> hidden --logits--> a distribution per canvas position

The module tree has the names of the HF checkpoint, so that weights load by name; the only
difference is that stacked experts are modules with a `.weight`, as mlx-community has them.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .cache import SLACK, PrefixCache
from .config import ModelConfig
from .layers import Layer, Pass, RMSNorm, SelfConditioning


class Taps:
    """Collects the outputs of some layers of an encode pass.

    Args:
        layers: 0-based indices; a layer's output is taken after layer_scalar, before the final norm
            (`hidden_states[i + 1]` in transformers).
    """

    def __init__(self, layers: Sequence[int]):
        self.layers = tuple(layers)
        self._outputs: dict[int, mx.array] = {}

    def offer(self, index: int, hidden: mx.array) -> None:
        if index in self.layers:
            self._outputs[index] = hidden

    @property
    def features(self) -> mx.array:
        """The tapped outputs side by side, (B, L, n * H), in the order they were asked for."""
        return mx.concatenate([self._outputs[index] for index in self.layers], axis=-1)


class Decoder(nn.Module):
    """The stack that the checkpoint stores."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, index) for index in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)


class LayerScalar(nn.Module):
    """What the encoder's copy of a layer has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scalar = mx.ones((1,))


class EncoderText(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.layers = [LayerScalar() for _ in config.layers]


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.language_model = EncoderText(config)


class Stacks(nn.Module):
    """`model.` of the checkpoint."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.decoder = Decoder(config)
        self.encoder = Encoder(config)


class DiffusionGemma(nn.Module):
    """The model. B: batch, L: tokens, C: canvas, H: hidden, V: vocabulary."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Stacks(config)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of activations: that of the norms, which no quantisation touches."""
        return self.model.decoder.norm.weight.dtype

    @property
    def layers(self) -> list[Layer]:
        return self.model.decoder.layers

    def make_cache(self, slack: int = SLACK) -> PrefixCache:
        """An empty cache that can be rolled back by `slack` tokens at any time."""
        return PrefixCache(self.config.windows, slack)

    def embed(self, ids: mx.array) -> mx.array:
        """Embeddings times sqrt(H), the factor rounded to the weights' dtype: (B, L) -> (B, L, H)."""
        return self.model.decoder.embed_tokens(ids).astype(self.dtype) * self._embed_scale()

    def encode(self, ids: mx.array, cache: PrefixCache, taps: Taps | None = None) -> mx.array:
        """Run (B, L) tokens causally behind the cached prefix; the cache grows by L.

        Returns:
            (B, L, H) after the final norm; `logits` of it are next-token logits.

        An exception, Ctrl-C too, leaves the cache as it was.
        """
        length = cache.length
        try:
            return self._encode(ids, cache, taps)
        except BaseException:
            cache.rollback(cache.length - length)
            raise

    def _encode(self, ids: mx.array, cache: PrefixCache, taps: Taps | None) -> mx.array:
        run = Pass(cache, self.config.sliding_window, ids.shape[1], causal=True)
        hidden = self.embed(ids)
        scalars = self.model.encoder.language_model.layers
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, run, scalars[index].layer_scalar)
            if taps is not None:
                taps.offer(index, hidden)
        return self.model.decoder.norm(hidden)

    def denoise_hidden(self, canvas: mx.array, cache: PrefixCache, soft: mx.array | None = None) -> mx.array:
        """Run a canvas (B, C) that sees all of itself and the cached prefix, which stays as it is.

        Args:
            soft: (B, C, H), what `soft_embedding` made of the step before; None on the first step.

        Returns:
            (B, C, H) after the final norm.
        """
        run = Pass(cache, self.config.sliding_window, canvas.shape[1], causal=False)
        embedded = self.embed(canvas)
        hidden = self.model.decoder.self_conditioning(embedded, soft)
        for layer in self.layers:
            hidden = layer(hidden, run, layer.layer_scalar)
        return self.model.decoder.norm(hidden)

    def denoise(self, canvas: mx.array, cache: PrefixCache, self_conditioning: mx.array | None = None) -> mx.array:
        """`denoise_hidden` from and to whole logits: (B, C) and previous processed logits -> (B, C, V)."""
        soft = None if self_conditioning is None else self.soft_embedding(self_conditioning)
        return self.logits(self.denoise_hidden(canvas, cache, soft))

    def logits(self, hidden: mx.array, ids: slice | mx.array | None = None) -> mx.array:
        """Softcapped logits in float32, (B, L, H) -> (B, L, V), or of a slice of the vocabulary alone."""
        cap = self.config.final_logit_softcapping
        raw = self._project(hidden, ids).astype(mx.float32)
        return mx.tanh(raw / cap) * cap

    def soft_embedding(self, z: mx.array) -> mx.array:
        """The mean embedding under softmax(z), z (B, C, V) processed logits: (B, C, H).

        Rounded where the reference rounds: z and the probabilities to the embedding's dtype.
        """
        z = z.astype(self.dtype)
        shares = mx.softmax(z.astype(mx.float32), axis=-1)
        return self.scale_soft(self.mix(shares, slice(None)))

    def mix(self, shares: mx.array, ids: slice) -> mx.array:
        """Embeddings of a slice of the vocabulary, unscaled, weighted by `shares` (B, C, n): (B, C, H)."""
        embedding, shares = self.model.decoder.embed_tokens, shares.astype(self.dtype)
        if "scales" not in embedding:
            return shares @ embedding.weight[ids]
        return mx.quantized_matmul(shares, *_quantized(embedding, ids), transpose=False, **_mode(embedding))

    def scale_soft(self, mixed: mx.array) -> mx.array:
        """What is left to do once the whole vocabulary has been mixed."""
        return mixed.astype(self.dtype) * self._embed_scale()

    def _embed_scale(self) -> mx.array:
        return mx.array(self.config.hidden_size**0.5, dtype=self.dtype)

    def _project(self, hidden: mx.array, ids: slice | mx.array | None) -> mx.array:
        embedding = self.model.decoder.embed_tokens
        if ids is None:
            return embedding.as_linear(hidden)
        if "scales" not in embedding:
            return hidden @ embedding.weight[ids].T
        return mx.quantized_matmul(hidden, *_quantized(embedding, ids), transpose=True, **_mode(embedding))


def _quantized(embedding: nn.Module, ids: slice | mx.array) -> tuple[mx.array, mx.array, mx.array | None]:
    biases = embedding.get("biases")
    return embedding["weight"][ids], embedding["scales"][ids], None if biases is None else biases[ids]


def _mode(embedding: nn.Module) -> dict[str, int | str]:
    return {"group_size": embedding.group_size, "bits": embedding.bits, "mode": embedding.mode}
