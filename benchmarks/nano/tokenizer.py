"""nano's own tokenizer: byte-level BPE over the training text, digits one by one, Gemma-style turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .example import Example

# Gemma's ids for pad, eos, bos, unk and mask; the rest follow.
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"]
SPECIAL += ["<|image>", "<|image|>", "<image|>"]

TURN_END = "<turn|>"

CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{- content | trim -}}
{%- else -%}{%- for part in content if part.type == 'text' -%}{{- part.text | trim -}}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set turns = messages -%}
{%- if enable_thinking or (messages and messages[0].role == 'system') -%}
{{- '<|turn>system\\n' -}}
{%- if enable_thinking -%}{{- '<|think|>' -}}{%- endif -%}
{%- if messages and messages[0].role == 'system' -%}
{{- text(messages[0].content) -}}
{%- set turns = messages[1:] -%}
{%- endif -%}
{{- '<turn|>\\n' -}}
{%- endif -%}
{%- for message in turns -%}
{{- '<|turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}
{{- text(message.content) + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def build(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the BPE on `texts` and dress it as a transformers tokenizer with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(".", "isolated"),  # a blank Sudoku cell is a token, like a filled one
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=TURN_END,
        bos_token="<bos>",
        unk_token="<unk>",
        mask_token="<mask>",
        additional_special_tokens=SPECIAL[5:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def texts(examples: Iterable[Example]) -> Iterator[str]:
    """All that is said in examples: what a tokenizer is trained on."""
    for example in examples:
        yield from (message["content"] for message in example.messages)
        yield example.answer
        if example.thought is not None:
            yield example.thought
