"""generate() and stream_generate() on the embedded checkpoint."""

import re

import pytest

from mlx_dgemma import GenerationResponse, InputError, UsageError, generate, load, stream_generate
from tests.helpers import write_checkpoint

ASK = "json name=Ann age=31 city=Oslo"
ANSWER = '{"name": "Ann", "age": 31, "city": "Oslo"}'


def test_an_answer(nano):
    assert generate(*nano, ASK) == ANSWER


def test_the_same_prompt_as_text_messages_and_ids(nano):
    model, tokenizer = nano
    messages = [{"role": "user", "content": [{"type": "text", "text": ASK}]}]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": ASK}], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert generate(model, tokenizer, messages) == generate(model, tokenizer, ids) == ANSWER
    plain = list(stream_generate(model, tokenizer, ASK, chat_template=False, max_tokens=3))
    assert plain[-1].prompt_tokens == len(tokenizer.encode(ASK))


def test_responses_account_for_every_id(nano):
    responses = list(stream_generate(*nano, ASK, drafts=True))
    drafts, finals = [r for r in responses if r.is_draft], [r for r in responses if not r.is_draft]
    assert isinstance(responses[0], GenerationResponse)
    assert len(drafts) == finals[-1].denoise_forwards
    assert all(r.draft_text and not r.text and not r.tokens for r in drafts)
    assert drafts[-1].draft_text.startswith(ANSWER)
    ids = [token for r in finals for token in r.tokens]
    assert len(ids) == finals[-1].generation_tokens
    assert ids[-1] == finals[-1].token == nano[1].eos_token_id
    assert finals[-1].finish_reason == "stop"
    assert finals[-1].encode_forwards == 1
    assert finals[-1].positions_computed == finals[-1].prompt_tokens + 96 * finals[-1].denoise_forwards


def test_several_canvases_stream_one_by_one(nano):
    model, tokenizer = nano
    kept = model.generation_config
    try:
        model.generation_config = kept.replace(eos_token_ids=(777,))
        responses = list(stream_generate(model, tokenizer, ASK, max_tokens=200, max_denoising_steps=4))
    finally:
        model.generation_config = kept
    assert [len(r.tokens) for r in responses] == [96, 96, 8]
    assert [r.finish_reason for r in responses] == [None, None, "length"]
    assert [r.canvas_index for r in responses] == [0, 1, 2]
    assert responses[-1].encode_forwards == 3
    assert responses[0].text.startswith(ANSWER)


def test_max_tokens_and_stop_strings_cut(nano):
    responses = list(stream_generate(*nano, ASK, max_tokens=5))
    assert (responses[-1].generation_tokens, responses[-1].finish_reason) == (5, "length")
    responses = list(stream_generate(*nano, ASK, stop="age"))
    assert (responses[-1].text, responses[-1].finish_reason) == ('{"name": "Ann", "', "stop")
    assert len(responses[-1].tokens) > 5, "a stop string cuts text, not ids"
    assert generate(*nano, ASK, stop=["city", "age"]) == '{"name": "Ann", "'


def test_thinking_comes_apart(nano):
    responses = list(stream_generate(*nano, "47 - 23", enable_thinking=True))
    assert "".join(r.text for r in responses).isdigit()
    assert re.fullmatch(r"\d - \d = -?\d, \d - \d = -?\d", "".join(r.reasoning for r in responses))
    assert not "".join(r.reasoning for r in stream_generate(*nano, "47 - 23"))


def test_the_seed_matters_and_the_prefill_chunk_does_not(tmp_path):
    """On a random model, which is unsure of everything."""
    model, tokenizer = load(write_checkpoint(tmp_path))
    prompt = [2, 17, 40, 99, 3, 58, 121, 7, 64, 30, 88, 101]
    runs = [(0, None), (0, 1), (0, 5), (1, None)]
    tokens = [
        next(stream_generate(model, tokenizer, prompt, seed=seed, prefill_step_size=step)).tokens for seed, step in runs
    ]
    assert tokens[0] == tokens[1] == tokens[2]
    assert tokens[0] != tokens[3]


def test_progress(nano):
    seen = []
    generate(*nano, ASK, prefill_step_size=8, prompt_progress_callback=lambda *counts: seen.append(counts))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] > 8


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"prompt": ""}, InputError, "empty"),
        ({"prompt": "  \n"}, InputError, "empty"),
        ({"prompt": []}, InputError, "empty"),
        ({"prompt": [5, 100_000]}, InputError, "100000"),
        ({"prompt": [5, 1.5]}, InputError, "token ids"),
        ({"prompt": None}, InputError, "must be a string"),
        ({"prompt": b"json"}, InputError, "must be a string"),
        ({"prompt": [{"role": "user", "content": ""}]}, InputError, "empty"),
        ({"prompt": [{"role": "user", "content": 5}]}, InputError, "content must be"),
        ({"prompt": [{"role": "user", "content": "x", "images": ["a.png"]}]}, InputError, "image"),
        ({"seed": "x"}, UsageError, "seed"),
        ({"stop": [1]}, UsageError, "stop"),
        ({"stop": 5}, UsageError, "stop"),
        ({"prompt": [{"role": "user"}]}, InputError, "content"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, InputError, "only text"),
        ({"prompt": [11]}, InputError, "image"),
        ({"prompt": [7] * 8100}, InputError, "8100 tokens"),
        ({"max_tokens": 0}, UsageError, "max_tokens"),
        ({"max_tokens": -3}, UsageError, "max_tokens"),
        ({"t_min": 0.9}, UsageError, "t_min"),
        ({"entropy_bound": 0}, UsageError, "entropy_bound"),
        ({"max_denoising_steps": 0}, UsageError, "max_denoising_steps"),
        ({"temperature": 0.5}, UsageError, "option of ar mode"),
        ({"warmth": 1}, UsageError, "warmth is not an option"),
        ({"mode": "magic"}, UsageError, "magic"),
        ({"prefill_step_size": 5000}, UsageError, "prefill_step_size"),
    ],
)
def test_bad_input_is_told_at_the_call(nano, options, error, said):
    with pytest.raises(error, match=said):
        stream_generate(*nano, **{"prompt": ASK, **options})
