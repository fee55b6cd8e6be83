"""The same mathematics as transformers' classes, in forms that are fast for small matrices on a CPU."""

from __future__ import annotations

import os
import shutil
from types import MethodType

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import (
    DiffusionGemmaRMSNorm,
    DiffusionGemmaText4MLP,
    DiffusionGemmaTextExperts,
    DiffusionGemmaTextScaledWordEmbedding,
)

GROUPED = "grouped"
COMPILER = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
compiled = torch.compile(dynamic=True) if COMPILER else lambda function: function


def faster_layers(model: DiffusionGemmaForBlockDiffusion) -> None:
    """Replace what is slow in this model's layers: all experts are one product, and elementwise chains are compiled
    where there is a C++ compiler.

    Under autocast, what passes between layers is bf16 too.
    """
    torch._dynamo.config.recompile_limit = 64
    AttentionInterface.register(GROUPED, grouped_attention)
    model.set_attn_implementation(GROUPED)
    for module in model.modules():
        if type(module) in FASTER:
            module.forward = MethodType(FASTER[type(module)], module)


def embed(self, ids):
    hidden = DiffusionGemmaTextScaledWordEmbedding.forward(self, ids)
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


def mlp(self, hidden):
    return self.down_proj(gelu_times(self.gate_proj(hidden), self.up_proj(hidden)))


@compiled
def gelu_times(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def dense_experts(self, hidden, index, weights):
    """Every expert on every token, weighted by the router, which has zeros for those it did not choose."""
    share = torch.zeros(len(hidden), self.num_experts, dtype=weights.dtype, device=hidden.device)
    inner = F.linear(hidden, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (self.num_experts, 2, -1))
    mixed = gated(inner, share.scatter(1, index, weights))
    return F.linear(mixed.flatten(1), self.down_proj.transpose(1, 2).flatten(0, 1).T)


@compiled
def gated(inner, share):
    gate, up = inner[:, :, 0], inner[:, :, 1]
    return (F.gelu(gate, approximate="tanh") * up * share[..., None]).to(inner.dtype)


def norm(self, hidden):
    flat = hidden.reshape(-1, hidden.shape[-1])
    return rms_norm(flat, self.eps, self.weight if self.with_scale else None).view(hidden.shape)


@compiled
def rms_norm(hidden, eps, weight):
    x = hidden.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (x if weight is None else x * weight).to(hidden.dtype)


def grouped_attention(module, query, key, value, mask, *, scaling, **_):
    """Attention with the query heads of one key head side by side; mask (B, 1, Q, K), added."""
    batch, heads, queries, size = query.shape
    groups = key.shape[1]
    side_by_side = (query * scaling).reshape(batch, groups, heads // groups * queries, size)
    scores = (side_by_side @ key.transpose(2, 3)).view(batch, heads, queries, -1)
    shares = torch.softmax(scores + mask.to(scores.dtype), dim=-1).to(value.dtype)
    mixed = shares.view(batch, groups, heads // groups * queries, -1) @ value
    return mixed.view(batch, heads, queries, size).transpose(1, 2), None


FASTER = {
    DiffusionGemmaTextExperts: dense_experts,
    DiffusionGemmaText4MLP: mlp,
    DiffusionGemmaRMSNorm: norm,
    DiffusionGemmaTextScaledWordEmbedding: embed,
}
