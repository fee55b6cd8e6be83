"""The intervals that benchmarks print, and what an answer's figures are made of."""

import math

import pytest

from benchmarks.measure import Question, Timed, alternating, is_right, paired_ratio, t_quantile


@pytest.mark.parametrize(("freedom", "quantile"), [(4, 2.7764), (9, 2.2622), (19, 2.0930), (99, 1.9842)])
def test_t_quantile_agrees_with_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, rel=1e-3)


def test_too_few_pairs_give_no_interval():
    with pytest.raises(ValueError, match="5 pairs"):
        paired_ratio([1.0] * 4, [2.0] * 4)


def test_a_constant_ratio_has_no_spread():
    ratio = paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 6.0, 8.0, 10.0])
    assert (ratio.mean, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_is_symmetric_in_the_logarithm_and_pairs_cancel():
    ours, theirs = [1.0, 10.0, 2.0, 20.0, 3.0], [2.0, 10.0, 4.0, 20.0, 3.0]
    ratio = paired_ratio(ours, theirs)
    assert ratio.mean == pytest.approx(2 ** (-2 / 5))
    assert math.log(ratio.high / ratio.mean) == pytest.approx(math.log(ratio.mean / ratio.low))
    # by hand: the log-ratios are -ln 2 twice and 0 three times
    half = 2.7764 * math.log(2) * math.sqrt(0.3) / math.sqrt(5)
    assert ratio.high == pytest.approx(ratio.mean * math.exp(half), rel=1e-3)


def test_figures_of_an_answer():
    answer = Timed(
        tokens=[5, 6, 7, 1],
        prompt_tokens=40,
        prefill_seconds=0.5,
        denoise_forwards=7,
        denoise_seconds=1.4,
        encode_forwards=1,
        peak_bytes=0,
    )
    assert answer.ms_per_step == pytest.approx(200)
    assert answer.prefill_rate == pytest.approx(80)
    assert answer.forwards_per_token == 2


def test_right_is_the_answer_without_its_eos(nano):
    tokenizer = nano[1]
    ids = tokenizer.encode("river stone", add_special_tokens=False)
    question = Question([5], "river stone")
    assert is_right(tokenizer, [*ids, 1], question, (1, 6)) and is_right(tokenizer, ids, question, (1, 6))
    assert not is_right(tokenizer, [*ids, 1, 1], question, (1, 6))
    assert not is_right(tokenizer, [*ids, 1], Question([5], "river stones"), (1, 6))


def test_pairs_alternate():
    assert [list(alternating("ab", number)) for number in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]
