"""The two losses DiffusionGemma is trained with, of one batch.

Cross-entropy of every canvas position, each replaced by a uniform random id with probability t ~ U(0.001, 1) per
row, without a weight of 1/t; and next-token cross-entropy of the causal pass, weight 1 (the public fine-tuning
recipes). Self-conditioning is fed from a first pass without gradients to a part of the rows. Some of these may also
go on with the canvas that the sampler would make of that pass, mistakes included: on uniform noise alone, a canvas
that drops a token and is right behind it never occurs, and is not mended when it does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

from .rows import Batch

BEHIND_THE_END = 0.1  # weight of the padding of a canvas


@dataclass(frozen=True)
class Losses:
    diffusion: torch.Tensor
    next_token: torch.Tensor
    exact: torch.Tensor  # share of canvases whose every id up to the end is the most likely one

    @property
    def total(self) -> torch.Tensor:
        return self.diffusion + self.next_token


def losses(
    model: DiffusionGemmaForBlockDiffusion,
    batch: Batch,
    ends: torch.Tensor,
    fed: float,
    generator: torch.Generator,
    stepped: float = 0.0,
) -> Losses:
    """
    Args:
        ends: ids that end an answer.
        fed: share of the rows that are given self-conditioning.
        stepped: share of the fed rows whose canvas is taken a step further, as the sampler takes it.
    """
    hidden, cache = read(model, batch.text)
    canvas, noise = batch.canvas, Noise(batch, model.config.text_config.vocab_size, generator)
    # rows come in random order: the first ones are fed
    count = int(len(canvas) * fed + torch.rand(1, generator=generator).item())
    previous = torch.zeros(*canvas.shape, noise.vocab_size, device=canvas.device)
    if count:
        with torch.no_grad():
            raw = denoise(model, noise.canvas[:count], batch.before[:count], first_rows(cache, count))
        previous[:count] = raw / noise.temperature[:count]
        if further := round(count * stepped):
            sampler = model.generation_config.sampler_config
            noise.canvas[:further] = next_canvas(previous[:further], generator, sampler)
    is_fed = torch.arange(len(canvas), device=canvas.device) < count
    logits = denoise(model, noise.canvas, batch.before, cache, previous, is_fed)
    weight = canvas_weight(canvas, ends)
    answered = batch.answered[:, 1:]
    following = softcapped(model, hidden[:, :-1][answered])
    next_token = F.cross_entropy(following, batch.text[:, 1:][answered], reduction="none")
    return Losses(
        diffusion=cross_entropy(logits, canvas, weight),
        next_token=(next_token * row_shares(answered)).sum(),
        exact=((logits.argmax(-1) == canvas) | (weight < 1)).all(-1).float().mean(),
    )


class Noise:
    """What is drawn for a batch: the noised canvases, and temperatures as the sampler has them, in [0.4, 0.8]."""

    def __init__(self, batch: Batch, vocab_size: int, generator: torch.Generator):
        shape, device = batch.canvas.shape, batch.canvas.device
        level = 0.001 + 0.999 * torch.rand(shape[0], 1, generator=generator)
        replaced = torch.rand(shape, generator=generator) < level
        random_ids = torch.randint(vocab_size, shape, generator=generator)
        self.vocab_size = vocab_size
        self.canvas = torch.where(replaced.to(device), random_ids.to(device), batch.canvas)
        self.temperature = (0.4 + 0.4 * torch.rand(shape[0], 1, 1, generator=generator)).to(device)


def next_canvas(logits: torch.Tensor, generator: torch.Generator, config: EntropyBoundSamplerConfig) -> torch.Tensor:
    """The canvases (B, C) that the reference's sampler makes of tempered logits (B, C, V): draws where their entropies,
    summed from the lowest on, stay within the bound; random ids elsewhere."""
    *shape, size = logits.shape
    # on the CPU, where the generator is, so that a seed gives the same canvases on every device
    draw = torch.multinomial(logits.softmax(-1).flatten(0, 1).cpu(), 1, generator=generator).view(shape)
    random_ids = torch.randint(size, shape, generator=generator)
    sampler = EntropyBoundSampler(config, shape[-1], size, max_denoising_steps=1)
    return sampler.accept_canvas(random_ids.to(logits.device), draw.to(logits.device), logits, cur_step=1)


def canvas_weight(canvas: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    is_end = torch.isin(canvas, ends)
    behind = is_end.cumsum(-1) - is_end.long() > 0
    return torch.where(behind, BEHIND_THE_END, 1.0)


def cross_entropy(logits: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over rows of the weighted mean of each, so that short answers count as much as long ones."""
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    return ((loss * weight).sum(-1) / weight.sum(-1).clamp(min=1)).mean()


def row_shares(chosen: torch.Tensor) -> torch.Tensor:
    """Weights of the chosen places of (B, L), in their order: all rows count alike, and add up to 1."""
    counts = chosen.sum(-1, keepdim=True).clamp(min=1) * len(chosen)
    return (1 / counts).expand_as(chosen)[chosen]


def read(model: DiffusionGemmaForBlockDiffusion, text: torch.Tensor) -> tuple[torch.Tensor, DynamicCache]:
    """The causal pass over text (B, L): hidden states, and keys and values of all positions in every layer."""
    config, cache = model.config.text_config, DynamicCache()  # without a config no layer drops what left its window
    place = torch.arange(text.shape[1], device=text.device)
    distance = place[:, None] - place
    causal = (distance >= 0)[None].expand(len(text), -1, -1)
    masks = {"full_attention": causal, "sliding_attention": causal & (distance < config.sliding_window)}
    output = model.model.encoder.language_model(
        input_ids=text, attention_mask=added(masks), position_ids=place[None], past_key_values=cache
    )
    return output.last_hidden_state, cache


def denoise(
    model: DiffusionGemmaForBlockDiffusion,
    canvas: torch.Tensor,
    before: torch.Tensor,
    cache: DynamicCache,
    previous: torch.Tensor | None = None,
    is_fed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits (B, C, V) of canvases behind the first `before` ids of each row's text; the rest of it is not seen."""
    length, window = canvas.shape[1], model.config.text_config.sliding_window
    place = torch.arange(cache.get_seq_length(), device=canvas.device)
    full = place < before[:, None]
    sliding = full & (place > before[:, None] - window)
    masks = {"full_attention": full, "sliding_attention": sliding}
    masks = {kind: F.pad(seen, (0, length), value=True)[:, None].expand(-1, length, -1) for kind, seen in masks.items()}
    output = model.model.decoder(
        decoder_input_ids=canvas,
        past_key_values=cache,
        self_conditioning_logits=previous,
        self_conditioning_mask=is_fed,
        decoder_attention_mask=added(masks),
        decoder_position_ids=before[:, None] + torch.arange(length, device=canvas.device),
    )
    return softcapped(model, output.last_hidden_state)


def added(visible: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """(B, Q, K) masks in the form that is added to scores."""
    return {kind: torch.where(seen, 0.0, -1e9)[:, None] for kind, seen in visible.items()}


def first_rows(cache: DynamicCache, count: int) -> DynamicCache:
    part = DynamicCache()
    for index, layer in enumerate(cache.layers):
        part.update(layer.keys[:count].detach(), layer.values[:count].detach(), index)
    return part


def softcapped(model: DiffusionGemmaForBlockDiffusion, hidden: torch.Tensor) -> torch.Tensor:
    cap = model.final_logit_softcapping
    return torch.tanh(model.lm_head(hidden).float() / cap) * cap
