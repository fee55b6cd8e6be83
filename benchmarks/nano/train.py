"""Train nano: transformers' own DiffusionGemma class, on generated tasks.

    python -m benchmarks.nano.train --out nano --steps 4200 --seed 0

Losses (as the public recipes have them): cross-entropy on every canvas position, each
canvas position replaced by a uniform random id with probability t ~ U(0.001, 1), plus
next-token cross-entropy of the causal pass, weight 1. Self-conditioning is fed from a
first, gradient-free pass for `--self-conditioning` of the examples. Positions after the
end of the answer count a tenth.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache, PreTrainedTokenizerFast
from transformers.models.diffusion_gemma import modeling_diffusion_gemma as reference
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

from .tasks import Example, training_stream
from .tokenizer import build

PAD, TURN_END = 0, 6


def nano_config(vocab_size: int) -> DiffusionGemmaConfig:
    """Small, but with every feature of the 26B: two kinds of layers with their own heads, MoE, K=V."""
    text = dict(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        global_head_dim=64,
        num_global_key_value_heads=1,
        sliding_window=48,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=192,
        max_position_embeddings=8192,
        use_bidirectional_attention="vision",
        eos_token_id=[1, TURN_END],
    )
    vision = dict(
        model_type="gemma4_vision",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        patch_size=4,
        position_embedding_size=16,
    )
    return DiffusionGemmaConfig(
        text_config=text, vision_config=vision, canvas_length=96, boi_token_id=10, image_token_id=11, eoi_token_id=12
    )


def encode_example(tokenizer: PreTrainedTokenizerFast, example: Example, think: bool) -> tuple[list[int], list[int]]:
    """Prompt ids and answer ids (with thought, if asked for, and the end of turn)."""
    messages = [{"role": "user", "content": example.prompt}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=think, return_dict=False
    )
    answer = f"<|channel>thought\n{example.thought}<channel|>{example.answer}" if think else example.answer
    return prompt, [*tokenizer(answer).input_ids, TURN_END]


def batches(tokenizer, size: int, canvas: int, stream: Iterator[Example]):
    """(prompt, prompt_mask, answer): prompts padded on the left, answers to the canvas on the right."""
    for number in itertools.count():
        rows = []
        for index, example in enumerate(itertools.islice(stream, size)):
            think = example.thought is not None and (number + index) % 3 == 0
            rows.append(encode_example(tokenizer, example, think))
        width = max(len(prompt) for prompt, _ in rows)
        prompt = torch.tensor([[PAD] * (width - len(p)) + p for p, _ in rows])
        mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p, _ in rows])
        yield prompt, mask, torch.tensor([a + [PAD] * (canvas - len(a)) for _, a in rows])


def faster_reference() -> None:
    """Replace what is slow on a CPU in transformers' classes by the same mathematics."""
    torch._dynamo.config.recompile_limit = 64
    reference.DiffusionGemmaTextExperts.forward = dense_experts
    reference.DiffusionGemmaRMSNorm.forward = norm_forward
    reference.apply_rotary_pos_emb = rotate
    reference.eager_attention_forward = grouped_attention


def dense_experts(self, hidden, index, weights):
    """Every expert on every token, weighted by the router: the same sum, friendly to small matrices."""
    gate, up = torch.einsum("th,eoh->teo", hidden, self.gate_up_proj).chunk(2, dim=-1)
    share = torch.zeros(len(hidden), self.num_experts, dtype=weights.dtype).scatter(1, index, weights)
    return torch.einsum("teo,eho->th", gated(gate, up, share[..., None]), self.down_proj)


@torch.compile(dynamic=True)
def gated(gate, up, share):
    return (F.gelu(gate, approximate="tanh") * up * share).to(gate.dtype)


def norm_forward(self, hidden):
    flat = hidden.reshape(-1, hidden.shape[-1])
    return (rms_norm(flat, self.weight) if self.with_scale else rms_norm_weightless(flat)).view(hidden.shape)


@torch.compile(dynamic=True)
def rms_norm(hidden, weight):
    x = hidden.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight).to(hidden.dtype)


@torch.compile(dynamic=True)
def rms_norm_weightless(hidden):
    x = hidden.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(hidden.dtype)


@torch.compile(dynamic=True)
def rotate(x, cos, sin, unsqueeze_dim):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


def grouped_attention(module, query, key, value, mask, **_):
    """Attention with the query heads of one key head side by side; mask (B, 1, Q, K), added."""
    batch, heads, queries, size = query.shape
    groups = key.shape[1]
    side_by_side = query.reshape(batch, groups, heads // groups * queries, size)
    scores = (side_by_side @ key.transpose(2, 3)).view(batch, heads, queries, -1) + mask
    shares = torch.softmax(scores, dim=-1).to(value.dtype).view(batch, groups, heads // groups * queries, -1)
    return (shares @ value).view(batch, heads, queries, size).transpose(1, 2), None


def causal_masks(mask: torch.Tensor, queries: int, window: int) -> dict[str, torch.Tensor]:
    """Masks of the last `queries` rows of a left-padded causal pass; mask (B, L)."""
    length = mask.shape[1]
    distance = torch.arange(length - queries, length)[:, None] - torch.arange(length)[None]
    # a padding row may see itself: an empty softmax row would be NaN
    full = ((distance >= 0) & mask[:, None]) | (distance == 0)
    return {"full_attention": added(full), "sliding_attention": added(full & (distance < window))}


def added(visible: torch.Tensor) -> torch.Tensor:
    """A (B, Q, K) mask in the form that is added to scores."""
    return torch.where(visible, 0.0, -1e9).to(torch.bfloat16)[:, None]


def trim_sliding(masks: dict[str, torch.Tensor], cache: DynamicCache, queries: int) -> dict[str, torch.Tensor]:
    """Sliding caches hold only the last window - 1 prefix rows: cut their mask to those."""
    rows = cache.layers[0].keys.shape[-2] + queries
    return {**masks, "sliding_attention": masks["sliding_attention"][..., -rows:]}


def losses(model, prompt, mask, answer, *, self_conditioning: float, by_example: bool, generator):
    """(diffusion loss, next-token loss, canvas accuracy) of one batch."""
    config, decoder, encoder = model.config.text_config, model.model.decoder, model.model.encoder.language_model
    (batch, width), length = prompt.shape, answer.shape[1]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=config)
    seen = encoder(
        input_ids=prompt,
        attention_mask=causal_masks(mask, width, config.sliding_window),
        position_ids=position,
        past_key_values=cache,
    ).last_hidden_state

    # the canvas: noise at level t, denoised with all of the prefix and itself in view
    level = torch.rand(batch, 1, generator=generator) * 0.999 + 0.001
    noisy = torch.rand(batch, length, generator=generator) < level
    random_ids = torch.randint(config.vocab_size, answer.shape, generator=generator)
    view = added(F.pad(mask, (0, length), value=True)[:, None])
    inputs = dict(
        decoder_input_ids=torch.where(noisy, random_ids, answer),
        past_key_values=cache,
        decoder_attention_mask=trim_sliding({"full_attention": view, "sliding_attention": view}, cache, length),
        decoder_position_ids=position[:, -1:] + 1 + torch.arange(length),
    )
    fed = int(batch * self_conditioning)  # rows come in random order: the first ones are fed
    previous = torch.zeros(batch, length, config.vocab_size)
    with torch.no_grad():
        raw = softcapped(model, decoder(**first_rows(inputs, fed)).last_hidden_state)
        # the sampler's temperatures lie in [0.4, 0.8]
        previous[:fed] = raw / (0.4 + 0.4 * torch.rand(fed, 1, 1, generator=generator))
    hidden = decoder(
        **inputs, self_conditioning_logits=previous, self_conditioning_mask=torch.arange(batch) < fed
    ).last_hidden_state
    logits = softcapped(model, hidden)
    ended = (answer == TURN_END).cumsum(-1) > 0
    weight = torch.where(ended & (answer != TURN_END), 0.1, 1.0)
    diffusion = mean(F.cross_entropy(logits.transpose(1, 2), answer, reduction="none"), weight, by_example)

    # next token, over the answer, through the same cache
    used = int((answer != PAD).sum(-1).max())
    rows = torch.cat([mask, torch.ones(batch, used, dtype=torch.bool)], dim=1)
    masks = causal_masks(rows, used, config.sliding_window)
    answered = encoder(
        input_ids=answer[:, :used],
        attention_mask=trim_sliding(masks, cache, used),
        position_ids=position[:, -1:] + 1 + torch.arange(used),
        past_key_values=cache,
    ).last_hidden_state
    states, targets = torch.cat([seen[:, -1:], answered[:, :-1]], dim=1), answer[:, :used]
    counts = (targets != PAD).float()
    following = F.cross_entropy(softcapped(model, states).transpose(1, 2), targets, reduction="none")
    correct = ((logits.argmax(-1) == answer) | (weight < 1)).all(-1).float().mean()
    return diffusion, mean(following, counts, by_example), correct


def mean(loss: torch.Tensor, weight: torch.Tensor, by_example: bool) -> torch.Tensor:
    """Weighted mean over all positions, or over examples of the mean of each: short answers then count as much."""
    if by_example:
        return ((loss * weight).sum(-1) / weight.sum(-1)).mean()
    return (loss * weight).sum() / weight.sum()


def first_rows(inputs: dict, count: int) -> dict:
    """The decoder's inputs for the first `count` rows of a batch, without gradients into the cache."""
    cache = DynamicCache()
    for index, layer in enumerate(inputs["past_key_values"].layers):
        cache.update(layer.keys[:count], layer.values[:count], index)
    return dict(
        decoder_input_ids=inputs["decoder_input_ids"][:count],
        past_key_values=cache,
        decoder_attention_mask={kind: mask[:count] for kind, mask in inputs["decoder_attention_mask"].items()},
        decoder_position_ids=inputs["decoder_position_ids"][:count],
    )


def softcapped(model, hidden: torch.Tensor) -> torch.Tensor:
    cap = model.final_logit_softcapping
    return torch.tanh(model.lm_head(hidden).float() / cap) * cap


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    faster_reference()
    if args.init:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init)
        model = DiffusionGemmaForBlockDiffusion.from_pretrained(args.init, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(args)
        model = DiffusionGemmaForBlockDiffusion(nano_config(len(tokenizer)))
    model.set_attn_implementation("eager")
    model.train()
    optimizer = make_optimizer(model, args.lr)
    generator = torch.Generator().manual_seed(args.seed)
    progress, started = Progress(), time.time()
    stream = batches(tokenizer, args.batch, model.config.canvas_length, training_stream(args.seed, args.shares))
    for step in tqdm(range(1, args.steps + 1), mininterval=30):
        decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / 200) * decay
        with torch.autocast("cpu", dtype=torch.bfloat16):
            diffusion, following, exact = losses(
                model,
                *next(stream),
                self_conditioning=args.self_conditioning,
                by_example=args.mean_over == "example",
                generator=generator,
            )
        (diffusion + following).backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.add(diffusion=diffusion.item(), next_token=following.item(), canvas_exact=exact.item())
        if step % 50 == 0:
            progress.report(step, (time.time() - started) / 60)
        if step % 500 == 0 or step in (args.steps, args.stop_after):
            save(model, tokenizer, Path(args.out))
        if step == args.stop_after:
            break
    Path(args.out, "training_log.json").write_text(json.dumps({"args": vars(args), "log": progress.log}, indent=1))


def train_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerFast:
    sample = list(itertools.islice(training_stream(args.seed), 20000))
    turns = ["user\nmodel\nsystem\nthought\n"] * 2000
    return build([*turns, *(text for e in sample for text in (e.prompt, e.answer))], args.vocab_size)


def make_optimizer(model, lr: float) -> torch.optim.Optimizer:
    """AdamW over everything but the vision tower; layer scalars, buffers in transformers, are trained too."""
    parameters = [p for name, p in model.named_parameters() if "vision" not in name]
    parameters += [layer.layer_scalar.requires_grad_() for layer in all_layers(model)]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


class Progress:
    """Running means of the losses, printed and kept."""

    def __init__(self) -> None:
        self.means: dict[str, float] = {}
        self.log: list[dict[str, float]] = []

    def add(self, **values: float) -> None:
        self.means = {name: 0.98 * self.means.get(name, value) + 0.02 * value for name, value in values.items()}

    def report(self, step: int, minutes: float) -> None:
        self.log.append({"step": step, "minutes": minutes, **self.means})
        print(json.dumps(self.log[-1]), flush=True)


def all_layers(model) -> list:
    return [*model.model.decoder.layers, *model.model.encoder.language_model.layers]


def save(model, tokenizer, out: Path) -> None:
    """Write the HF layout in bf16, with the generation settings of the released checkpoint."""
    for layer in all_layers(model):  # buffers must not carry a graph when they are copied
        layer.layer_scalar.detach_()
    half = copy.deepcopy(model).to(torch.bfloat16)
    for layer in all_layers(model):
        layer.layer_scalar.requires_grad_()
    half.generation_config = DiffusionGemmaGenerationConfig(
        max_new_tokens=model.config.canvas_length,
        max_denoising_steps=48,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
        pad_token_id=PAD,
        bos_token_id=2,
        eos_token_id=[1, TURN_END],
    )
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)


def parse_shares(text: str) -> dict[str, float]:
    """`json=0.2,sudoku=0.4` -> shares by task."""
    return {task: float(share) for task, _, share in (part.partition("=") for part in text.split(","))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder to write the checkpoint to")
    parser.add_argument("--init", help="start from this checkpoint rather than from random weights")
    parser.add_argument("--steps", type=int, default=4200, help="of the learning-rate schedule (default: 4200)")
    parser.add_argument("--stop-after", type=int, help="leave the schedule after so many steps")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--self-conditioning", type=float, default=0.4)
    parser.add_argument("--mean-over", choices=("token", "example"), default="token", help="of the losses")
    parser.add_argument(
        "--shares", type=parse_shares, default={}, metavar="TASK=SHARE,...", help="of the tasks in a batch"
    )
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
