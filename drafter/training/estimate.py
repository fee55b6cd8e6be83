"""What a training will need, before anything is begun: bytes by what they are for, and arithmetic."""

from __future__ import annotations

import time
from dataclasses import dataclass

import mlx.core as mx

from ... import memory
from ...config import ModelConfig
from ...errors import InputError
from ...memory import GB, machine_memory
from ..geometry import BlockConfig
from .options import Options

FLOAT = 4  # the drafter is trained in float32
# Itself, its gradient, that of a micro-batch beside it, two moments, and what an update holds of both (5.2 copies
# measured on MLX's CPU).
OF_A_WEIGHT = 6 * FLOAT
# Arrays of one shape that are alive at once in a forward and backward pass: logits of both models and what
# softmax, TV and their gradients leave (11.0 measured on MLX's CPU, 11.8 with the Markov head, 12.9 while the
# machine was busy with something else, as freeing then lags behind); attention scores.
LOGITS, SCORES = 13, 5


@dataclass(frozen=True)
class TrainingEstimate:
    """Bytes of a training, and the work of a step.

    Attributes:
        model: weights, K/V and one step of the main model.
        drafter: weights, gradients, optimiser.
        text: features, hidden states and rows of context of one answer.
        blocks: activations and logits of the blocks that are run together.
        blocks_at_once: how many those are.
        positions: that the drafter runs in a step, over all blocks.
        flops: of a step on the longest answers, both models, without attention's scores.
    """

    model: int
    drafter: int
    text: int
    blocks: int
    blocks_at_once: int
    positions: int
    context: int
    parameters: int
    flops: float

    @property
    def total(self) -> int:
        return self.model + self.drafter + self.text + self.blocks

    def work(self, steps: int) -> str:
        """Of so many steps, and the time that this machine's arithmetic alone takes for them."""
        speed = matmul_speed()
        seconds = steps * self.flops / speed
        unit, size = ("hours", 3600) if seconds >= 3600 else ("minutes", 60)
        rate = f"{speed / 1e12:.2g} TFLOP/s that a matmul reaches here"
        return f"{steps} steps of about {self.flops / 1e12:.3g} TFLOP, {seconds / size:.1f} {unit} at the {rate}"

    def __str__(self) -> str:
        return (
            f"{self.total / GB:.2f} GB (main model {self.model / GB:.2f} + drafter of {self.parameters / 1e6:.1f} M "
            f"parameters with its optimiser {self.drafter / GB:.2f} + an answer behind {self.context} tokens "
            f"{self.text / GB:.2f} + {self.blocks_at_once} blocks at a time {self.blocks / GB:.2f})"
        )


def estimate(
    config: ModelConfig,
    drafter: BlockConfig,
    options: Options,
    *,
    weights: int,
    dtype: mx.Dtype,
    context: int,
) -> TrainingEstimate:
    """Of training a drafter for a model.

    Args:
        weights: bytes of the main model's.
        dtype: of its activations.
        context: tokens of the longest prompt with its answer.
    """
    main = memory.estimate(config, weights, dtype, context)
    # answers are written side by side, each with K/V of its own
    model = main.total + (options.at_once - 1) * main.kv
    count = parameters(drafter)
    rows = 2 * len(drafter.kinds) * drafter.num_key_value_heads * drafter.head_dim
    # features twice: as they come, chunk by chunk, and joined; rows and their gradients
    features = context * config.hidden_size * (2 * FLOAT * len(drafter.taps) + 2 * dtype.size)
    text = features + 3 * context * rows * FLOAT
    spread = min(options.max_tokens, context)
    anchors = min(options.anchors, spread)  # an answer has no more places than tokens
    positions = options.batch * anchors * drafter.positions
    at_once = min(anchors, blocks_at_once(drafter, context, spread, options.micro_batch_gb * GB))
    return TrainingEstimate(
        model=model,
        drafter=count * OF_A_WEIGHT,
        text=text,
        blocks=at_once * block_bytes(drafter, context, spread),
        blocks_at_once=at_once,
        positions=positions,
        context=context,
        parameters=count,
        flops=_forward(config, options.batch * context, options.batch * spread) + _trained(drafter, count, positions),
    )


def _forward(config: ModelConfig, tokens: int, predicted: int) -> float:
    """FLOP of the main model's pass over `tokens`, with logits of `predicted` ones."""
    hidden, experts = config.hidden_size, config.top_k_experts * config.moe_intermediate_size
    rest = 3 * hidden * (config.intermediate_size + experts) + hidden * config.num_experts
    heads = sum(2 * x.head_dim * (config.num_attention_heads + x.num_key_value_heads) for x in config.layers)
    layers = hidden * heads + len(config.layers) * rest
    return 2.0 * tokens * layers + 2.0 * predicted * hidden * config.vocab_size


def _trained(drafter: BlockConfig, parameters: int, positions: int) -> float:
    """FLOP of the drafter forwards and backwards; the head, which is not trained, has no gradient of its own."""
    return positions * (6.0 * parameters + 4.0 * drafter.hidden_size * drafter.vocab_size)


def parameters(drafter: BlockConfig) -> int:
    """How many a drafter has."""
    hidden, heads = drafter.hidden_size, drafter.head_dim
    attention = hidden * heads * 2 * (drafter.num_attention_heads + drafter.num_key_value_heads) + 2 * heads
    layer = attention + 3 * hidden * drafter.intermediate_size + 2 * hidden
    total = len(drafter.taps) * hidden**2 + 2 * hidden + len(drafter.kinds) * layer
    rank = drafter.markov_rank or 0
    reads = {None: -1, "hidden": hidden, "hidden and markov": hidden + rank}[drafter.confidence]
    return total + 2 * rank * drafter.vocab_size + reads + 1


def block_bytes(drafter: BlockConfig, context: int, spread: int) -> int:
    """Of one block, forwards and backwards, behind at most `context` tokens; anchors lie in a stretch of `spread`."""
    logits = LOGITS * drafter.drafts * drafter.vocab_size
    of_heads = drafter.head_dim * (6 * drafter.num_attention_heads + 4 * drafter.num_key_value_heads)
    layer = 10 * drafter.hidden_size + 6 * drafter.intermediate_size + of_heads
    activations = len(drafter.kinds) * drafter.positions * layer
    scores = 0
    for window in drafter.windows:
        seen = context if window is None else min(context, window + spread)  # rows that any block beside it sees
        scores += SCORES * drafter.num_attention_heads * drafter.positions * (seen + drafter.positions)
    return FLOAT * (logits + activations + scores)


def blocks_at_once(drafter: BlockConfig, context: int, spread: int, budget: float) -> int:
    """How many blocks a budget of bytes holds, one at least."""
    return max(1, int(budget // block_bytes(drafter, context, spread)))


def require_fit(need: TrainingEstimate) -> None:
    """Raise InputError if a training cannot fit in this machine's memory."""
    have = machine_memory()
    if need.total > have:
        raise InputError(
            f"training needs about {need}, this machine has {have / GB:.2f} GB; take a quantised model, "
            "a smaller drafter, shorter answers (--max-tokens), fewer of them side by side (--at-once) "
            "or fewer blocks together (--micro-batch-gb)"
        )


def matmul_speed(size: int = 1024, seconds: float = 0.2) -> float:
    """FLOP a second in float32."""
    matrix = mx.random.normal((size, size), key=mx.random.key(0))
    mx.eval(matrix @ matrix)
    began, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        mx.eval(matrix @ matrix)
        count += 1
    return 2.0 * size**3 * count / passed
