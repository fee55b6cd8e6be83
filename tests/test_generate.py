"""generate() and stream_generate() on the embedded checkpoint."""

import re

import mlx.core as mx
import pytest

from mlx_dgemma import GenerationResponse, InputError, UsageError, generate, load, stream_generate
from mlx_dgemma.drafter import Draft
from mlx_dgemma.drafter.lookup import Lookup
from mlx_dgemma.loading import EMBEDDED
from mlx_dgemma.response import statistics
from tests.helpers import NANO_VOCAB, write_checkpoint

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
    assert re.fullmatch(r"\d - \d = \d\n\d - \d = \d", "".join(r.reasoning for r in responses))
    assert re.fullmatch(r"[\d =-]+ = \d+", "".join(r.text for r in responses)), "wrong in this mode, but all of it"
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


EDIT = 'set age=44 in {"name": "Bob", "age": 31, "city": "Oslo", "job": "baker", "active": true}'
EDITED = '{"name": "Bob", "age": 44, "city": "Oslo", "job": "baker", "active": true}'


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_changes_the_passes_and_not_the_answer(nano, temperature):
    plain, drafted = (
        list(stream_generate(*nano, EDIT, mode="ar", temperature=temperature, **options))
        for options in ({}, {"drafter": "lookup", "draft_width": 8})
    )
    assert "".join(r.text for r in plain) == EDITED
    assert [(r.token, r.text, r.finish_reason) for r in drafted] == [(r.token, r.text, r.finish_reason) for r in plain]
    assert drafted[-1].encode_forwards < 0.5 * plain[-1].encode_forwards
    assert drafted[-1].accepted_tokens == sum(r.from_draft for r in drafted) > 15
    assert drafted[-1].drafted_tokens == drafted[-1].positions_computed - drafted[-1].prompt_tokens - (
        drafted[-1].encode_forwards - 2
    )
    assert not any(r.from_draft or r.drafted_tokens for r in plain)


@pytest.mark.parametrize("options", [{}, {"drafter_bits": 8, "draft_head_bits": 8}, {"draft_vocab": 700}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_drafter_that_comes_with_nano(nano, temperature, options):
    """It saves passes, and nothing else changes; it is a small file."""
    passes = {}
    for prompt in ("sudoku .42. .1.. 43.. 1.3.", ASK):
        plain, drafted = (
            list(stream_generate(*nano, prompt, mode="ar", temperature=temperature, seed=3, **given))
            for given in ({}, {"drafter": "block:nano", "draft_width": 16, **options})
        )
        assert [r.token for r in drafted] == [r.token for r in plain]
        assert drafted[-1].drafter_failure is None
        passes[prompt] = drafted[-1].encode_forwards / plain[-1].encode_forwards
    assert max(passes.values()) < 0.2, passes
    assert sum(path.stat().st_size for path in (EMBEDDED / "drafter").iterdir()) < 3e6


def test_ar_responses_come_token_by_token(nano):
    responses = list(stream_generate(*nano, ASK, mode="ar", temperature=0.0))
    assert "".join(r.text for r in responses) == ANSWER
    assert all(r.mode == "ar" and r.exact and r.tokens == (r.token,) for r in responses)
    assert [r.generation_tokens for r in responses] == list(range(1, len(responses) + 1))
    assert [r.finish_reason for r in responses] == [None] * (len(responses) - 1) + ["stop"]
    assert responses[-1].token == nano[1].eos_token_id
    assert all(mx.argmax(r.logprobs).item() == r.token for r in responses)
    assert abs(mx.exp(responses[0].logprobs).sum().item() - 1) < 1e-4


@pytest.mark.parametrize("drafter", [None, "lookup"])
def test_ar_is_cut_where_it_should_be(nano, drafter):
    options = {"mode": "ar", "temperature": 0.0, "drafter": drafter}
    responses = list(stream_generate(*nano, EDIT, max_tokens=5, **options))
    assert (responses[-1].generation_tokens, responses[-1].finish_reason) == (5, "length")
    responses = list(stream_generate(*nano, EDIT, stop="city", **options))
    assert "".join(r.text for r in responses) == EDITED.partition("city")[0]
    assert responses[-1].finish_reason == "stop"
    assert generate(*nano, EDIT, stop=["zzz", "Oslo", "city"], **options) == EDITED.partition("city")[0]


def test_ar_thinks_apart(nano):
    responses = list(stream_generate(*nano, "47 - 23", mode="ar", temperature=0.0, enable_thinking=True))
    assert "".join(r.reasoning for r in responses) == "7 - 3 = 4\n4 - 2 = 2"
    assert "".join(r.text for r in responses) == "47 - 23 = 24"


def test_counts_end_with_the_answer(nano):
    """A stop string in the middle of a block: what came after it was verified, not accepted."""
    options = {"mode": "ar", "temperature": 0.0, "drafter": "lookup", "draft_width": 16, "stop": "Bob"}
    responses = list(stream_generate(*nano, EDIT, **options))
    assert responses[-1].accepted_tokens == sum(r.from_draft for r in responses)
    assert responses[-1].generation_tokens == len(responses)


def test_a_penalty_that_looks_back_far_beyond_the_text(nano):
    far = generate(*nano, ASK, mode="ar", temperature=0.0, repetition_penalty=1.01, repetition_context_size=10**10)
    assert far == generate(*nano, ASK, mode="ar", temperature=0.0, repetition_penalty=1.01, repetition_context_size=99)


def test_max_tokens_beyond_the_context_needs_no_memory_that_is_never_used(nano):
    assert generate(*nano, ASK, mode="ar", temperature=0.0, max_tokens=10**9) == ANSWER


def test_ar_seeds_and_sampling_options(tmp_path):
    """On a random model, which is unsure of everything."""
    model, tokenizer = load(write_checkpoint(tmp_path))
    prompt = [2, 17, 40, 99, 3, 58, 121, 7, 64, 30, 88, 101]

    def ids(**options):
        return [r.token for r in stream_generate(model, tokenizer, prompt, mode="ar", max_tokens=12, **options)]

    assert ids(seed=1) == ids(seed=1) == ids(seed=1, prefill_step_size=5)
    assert ids(seed=1) != ids(seed=2)
    assert ids(temperature=0.0) == ids(top_k=1, seed=5) == ids(min_p=1.0, seed=6) == ids(top_p=1e-6, seed=7)
    banned = ids(temperature=0.0)[0]
    assert banned not in ids(temperature=0.0, logit_bias={banned: -1e4})
    assert ids(seed=1, repetition_penalty=1.5) != ids(seed=1)


class Broken:
    """A drafter that fails in the middle."""

    taps = ()

    def reset(self):
        self.calls = 0

    def propose(self, context, width):
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("out of\nideas")
        return Draft([5] * (width + 3))


def test_a_drafter_of_ones_own_that_fails_is_reported(nano):
    responses = list(stream_generate(*nano, ASK, mode="ar", temperature=0.0, drafter=Broken(), draft_width=3))
    assert "".join(r.text for r in responses) == ANSWER
    last = responses[-1]
    assert last.drafter_failure == "Broken.propose raised RuntimeError: out of ideas"
    assert (last.surplus_tokens, last.draft_rounds, last.drafted_tokens) == (6, 2, 6)
    assert responses[0].drafter_failure is None
    said = statistics(last)
    assert "Drafter turned off (the answer is not affected): Broken.propose" in said
    assert "0 of 6 tokens accepted in 2 rounds, 0.00 a round" in said and "6 tokens beyond" in said


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
        ({"drafter": "lookup"}, UsageError, "drafter is an option of ar mode"),
        ({"draft_width": 4}, UsageError, "draft_width is an option of ar mode"),
        ({"temperature": 0.0, "top_k": 0}, UsageError, "temperature is an option of ar mode"),
        ({"mode": ["ar"]}, UsageError, "mode must be one of"),
        ({"mode": "ar", "t_min": 0.2}, UsageError, "t_min is an option of diffusion mode"),
        ({"mode": "ar", "t_min": 0}, UsageError, "t_min is an option of diffusion mode"),
        ({"mode": "ar", "drafts": True}, UsageError, "drafts is an option of diffusion mode"),
        ({"mode": "ar", "drafter": "magic"}, UsageError, "'magic' does not exist; there are lookup"),
        ({"mode": "ar", "drafter": "lookup", "draft_width": -1}, UsageError, "draft_width .* 0-64, not -1"),
        ({"mode": "ar", "drafter": "lookup", "draft_width": 65}, UsageError, "draft_width .* 0-64, not 65"),
        ({"mode": "ar", "draft_width": 4}, UsageError, "draft_width needs a drafter"),
        ({"mode": "ar", "drafter": object()}, UsageError, r"no method reset\(\)"),
        ({"mode": "ar", "drafter": Lookup}, UsageError, "is a class"),
        ({"mode": "ar", "drafter": ""}, UsageError, "there are lookup"),
        ({"mode": "ar", "drafter": 7}, UsageError, r"no method reset\(\)"),
        ({"mode": "ar", "temperature": -0.1}, UsageError, "temperature must not be negative"),
        ({"mode": "ar", "temperature": 1e-9}, UsageError, "temperature"),
        ({"mode": "ar", "top_p": 0}, UsageError, "top_p"),
        ({"mode": "ar", "top_p": 1.5}, UsageError, "top_p"),
        ({"mode": "ar", "top_k": -1}, UsageError, "top_k"),
        ({"mode": "ar", "top_k": 1.5}, UsageError, "top_k"),
        ({"mode": "ar", "min_p": 2}, UsageError, "min_p"),
        ({"mode": "ar", "repetition_penalty": 0}, UsageError, "repetition_penalty"),
        ({"mode": "ar", "logit_bias": {NANO_VOCAB: 1.0}}, UsageError, f"id {NANO_VOCAB}; .* 0-{NANO_VOCAB - 1}"),
        ({"mode": "ar", "logit_bias": {-1: 1.0}}, UsageError, "logit_bias"),
        ({"mode": "ar", "logit_bias": {5: "x"}}, UsageError, "logit_bias of id 5"),
        ({"mode": "ar", "logit_bias": [5]}, UsageError, "logit_bias"),
        ({"mode": "ar", "logit_bias": {5: 1e39}}, UsageError, "logit_bias of id 5"),
        ({"mode": "ar", "logit_bias": {5: float("nan")}}, UsageError, "logit_bias of id 5"),
        ({"prompt": "\udcff"}, InputError, "not text"),
        ({"mode": "ar", "prompt": [7] * 8192}, InputError, "8192 tokens"),
        ({"warmth": 1}, UsageError, "warmth is not an option"),
        ({"mode": "magic"}, UsageError, "magic"),
        ({"prefill_step_size": 5000}, UsageError, "prefill_step_size"),
    ],
)
def test_bad_input_is_told_at_the_call(nano, options, error, said):
    with pytest.raises(error, match=said):
        stream_generate(*nano, **{"prompt": ASK, **options})
