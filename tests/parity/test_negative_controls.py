"""The check is worth what it catches: each of these plants a bug, and must be seen to fail where it was planted."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import pytest

from mlx_dgemma import cache, denoise, layers, model, sampling
from mlx_dgemma.decoding import causal
from mlx_dgemma.parity import replay as replaying
from mlx_dgemma.parity.check import MAX_RATIO, measures

BLOCK = 7  # positions of the block that is verified; no canvas of `wide` has so many


def failures(report):
    return [entry.name for entry in [*report.measures, *report.counts, *report.agreements] if not entry.passed]


# --- the traps of the model, in both passes


def router_on_the_normed_input(planted, patch):
    route = layers.Router.__call__
    norms = {id(layer.router): layer.pre_feedforward_layernorm_2 for layer in planted.model.layers}
    patch.setattr(layers.Router, "__call__", lambda self, x: route(self, norms[id(self)](x)))


def per_expert_scale_left_out(planted, patch):
    for layer in planted.model.layers:
        layer.router.per_expert_scale = mx.ones_like(layer.router.per_expert_scale)


def gate_and_up_swapped(planted, patch):
    for layer in planted.model.layers:
        gate, up = mx.split(layer.experts.gate_up_proj.weight, 2, axis=1)
        layer.experts.gate_up_proj.weight = mx.concatenate([up, gate], axis=1)


def scores_scaled(planted, patch):
    attend = layers.Attention._attend
    patch.setattr(
        layers.Attention, "_attend", lambda self, q, k, v, run: attend(self, q * self.head_dim**-0.5, k, v, run)
    )


def values_of_full_layers_normed_as_keys(planted, patch):
    call = layers.RMSNorm.__call__
    wrong = {id(layer.self_attn._v_norm): layer.self_attn for layer in planted.model.layers}

    def norm(self, x):
        attention = wrong.get(id(self))
        return call(self if attention is None or attention.is_sliding else attention.k_norm, x)

    patch.setattr(layers.RMSNorm, "__call__", norm)


def all_of_a_full_head_turned(planted, patch):
    for layer in planted.model.layers:
        attention = layer.self_attn
        if not attention.is_sliding:
            attention._rotary.periods = mx.array(layers.rotary_periods(attention.head_dim, 1e6, 1.0))


def encode_window_narrow(planted, patch):
    _change_pass(patch, lambda run: setattr(run, "window", run.window - run.causal))


def encode_window_wide(planted, patch):
    """The rows before it are those of the right window: within one pass alone it sees one too many."""
    _change_pass(patch, lambda run: setattr(run, "window", run.window + run.causal))


def canvas_window_narrow(planted, patch):
    visible = cache.LayerRows.visible
    patch.setattr(
        cache.LayerRows, "visible", lambda self: visible(self) - (self.window is not None and self.end >= self.window)
    )


def scalars_swapped(planted, patch):
    for own, shared in zip(planted.model.model.encoder.language_model.layers, planted.model.layers, strict=True):
        own.layer_scalar, shared.layer_scalar = shared.layer_scalar, own.layer_scalar


def encoder_scalars_in_denoise(planted, patch):
    for own, shared in zip(planted.model.model.encoder.language_model.layers, planted.model.layers, strict=True):
        shared.layer_scalar = own.layer_scalar


def softcap_left_out(planted, patch):
    patch.setattr(model.DiffusionGemma, "logits", _uncapped)


def self_conditioning_left_out(planted, patch):
    call = layers.SelfConditioning.__call__
    patch.setattr(layers.SelfConditioning, "__call__", lambda self, x, soft: call(self, x, mx.zeros_like(x)))


def no_norm_without_self_conditioning(planted, patch):
    call = layers.SelfConditioning.__call__
    patch.setattr(layers.SelfConditioning, "__call__", lambda self, x, soft: x if soft is None else call(self, x, soft))


def soft_embedding_unscaled(planted, patch):
    patch.setattr(model.DiffusionGemma, "scale_soft", lambda self, mixed: mixed)


def canvas_positions_off_by_one(planted, patch):
    _change_pass(patch, lambda run: setattr(run, "offset", run.offset + (not run.causal)))


def canvas_causal(planted, patch):
    def mask(self, keys):
        return mx.arange(keys - self.queries, keys)[:, None] >= mx.arange(keys)[None]

    patch.setattr(layers.Pass, "sliding_mask", mask)


# --- the sampler


def accepted_once_accepted_for_ever(planted, patch):
    before, accept = [], sampling.accept

    def kept(entropy, bound):
        mask = accept(entropy, bound)
        if before and before[-1].shape == mask.shape:
            mask = mask | before[-1]
        before.append(mask)
        return mask

    patch.setattr(sampling, "accept", kept)
    patch.setattr(denoise, "accept", kept)


def everything_accepted(planted, patch):
    for module in (sampling, denoise):
        patch.setattr(module, "accept", lambda entropy, bound: mx.ones_like(entropy) > 0)


def stopping_one_step_early(planted, patch):
    start = sampling.StopRule.__init__

    def hasty(self, config):
        start(self, config)
        self._stability -= 1

    patch.setattr(sampling.StopRule, "__init__", hasty)


# --- the rules of verification


def softcap_left_out_in_ar(planted, patch):
    _in_verification(patch, model.DiffusionGemma, "logits", _uncapped)


def block_verified_with_a_canvas_mask(planted, patch):
    attend = layers.Attention._attend

    def seeing_all(self, queries, keys, values, run):
        if _is_block(run):
            run = copy.copy(run)
            run.causal = False
        return attend(self, queries, keys, values, run)

    patch.setattr(layers.Attention, "_attend", seeing_all)


def block_positions_off_by_one(planted, patch):
    _change_pass(patch, lambda run: setattr(run, "offset", run.offset + _is_block(run)))


def block_window_narrow(planted, patch):
    _change_pass(patch, lambda run: setattr(run, "window", run.window - _is_block(run)))


def block_with_the_decoders_scalars(planted, patch):
    encode = model.DiffusionGemma._encode
    own = planted.model.model.encoder.language_model.layers

    def swapped(self, ids, rows, taps):
        if ids.shape[1] != BLOCK:
            return encode(self, ids, rows, taps)
        kept = [layer.layer_scalar for layer in own]
        for layer, shared in zip(own, self.layers, strict=True):
            layer.layer_scalar = shared.layer_scalar
        out = encode(self, ids, rows, taps)
        for layer, scalar in zip(own, kept, strict=True):
            layer.layer_scalar = scalar
        return out

    patch.setattr(model.DiffusionGemma, "_encode", swapped)


def last_token_encoded_twice(planted, patch):
    last, prefill = planted.bundle.arrays["verify/block"][:1].tolist(), causal.prefill
    patch.setattr(causal, "prefill", lambda model, ids, *given, **named: prefill(model, [*ids, *last], *given, **named))


def one_draft_too_many_accepted(planted, patch):
    agree = causal.agreement
    patch.setattr(causal, "agreement", lambda draft, own: min(len(draft), agree(draft, own) + bool(draft)))


def one_draft_too_few_accepted(planted, patch):
    agree = causal.agreement
    patch.setattr(causal, "agreement", lambda draft, own: max(0, agree(draft, own) - 1))


def rollback_leaving_a_rejected_row(planted, patch):
    back = cache.PrefixCache.rollback
    patch.setattr(cache.PrefixCache, "rollback", lambda self, count: back(self, max(0, count - 1)))


def rollback_one_row_too_far(planted, patch):
    back = cache.PrefixCache.rollback
    patch.setattr(cache.PrefixCache, "rollback", lambda self, count: back(self, count + bool(count)))


def rollback_forgetting_a_layer(planted, patch):
    def back(self, count):
        for layer in self.layers[1:]:
            layer.end -= count

    patch.setattr(cache.PrefixCache, "rollback", back)


def canvas_behind_the_longest_the_cache_has_been(planted, patch):
    longest = {}

    def stale(run):
        if not run.causal:
            run.offset = longest[id(run.cache)]
        longest[id(run.cache)] = max(longest.get(id(run.cache), 0), run.offset + run.causal * run.queries)

    _change_pass(patch, stale)


def _change_pass(patch, change):
    start = layers.Pass.__init__

    def changed(self, *given, **named):
        start(self, *given, **named)
        change(self)

    patch.setattr(layers.Pass, "__init__", changed)


def _is_block(run):
    return run.causal and run.queries == BLOCK


def _uncapped(self, hidden, ids=None):
    return self._project(hidden, ids).astype(mx.float32)


def _in_verification(patch, owner, name, wrong):
    """Plant it in passes of the AR loop alone."""
    launch = causal.Verifier.launch

    def launched(self, *given, **named):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(owner, name, wrong)
            return launch(self, *given, **named)

    patch.setattr(causal.Verifier, "launch", launched)


@dataclass(frozen=True)
class Bug:
    """What is planted, in which bundle it shows, and where the check has to say that it parts."""

    plant: Callable
    bundle: str
    first: str
    also: tuple[str, ...] = ()


BUGS = [
    Bug(router_on_the_normed_input, "window", "encode.0/layer.0", ("encode: experts",)),
    Bug(per_expert_scale_left_out, "window", "encode.0/layer.0"),
    Bug(gate_and_up_swapped, "window", "encode.0/layer.0"),
    Bug(scores_scaled, "window", "encode.0/layer.0"),
    Bug(values_of_full_layers_normed_as_keys, "window", "encode.0/layer.2"),
    Bug(all_of_a_full_head_turned, "window", "encode.0/layer.2"),
    Bug(encode_window_narrow, "window", "encode.0/layer.0"),
    Bug(encode_window_wide, "window", "encode.0/layer.0"),
    Bug(canvas_window_narrow, "window", "denoise.0.0/layer.0"),
    Bug(scalars_swapped, "window", "encode.0/layer.0", ("denoise.0.0/layer.0",)),
    Bug(encoder_scalars_in_denoise, "window", "denoise.0.0/layer.0"),
    Bug(softcap_left_out, "window", "encode.0/logits", ("ar/logits", "verify/logits")),
    # in bfloat16 a bug is seen where it has outgrown the reference's own error
    Bug(softcap_left_out, "nano_bfloat16", "encode.0/logits"),
    Bug(router_on_the_normed_input, "nano_bfloat16", "ar: experts"),
    Bug(encoder_scalars_in_denoise, "nano_bfloat16", "denoise.0.0/layer.0"),
    Bug(everything_accepted, "nano_bfloat16", "steps: accepted"),
    Bug(self_conditioning_left_out, "window", "denoise.0.1/layer.0"),
    Bug(no_norm_without_self_conditioning, "window", "denoise.0.0/layer.0"),
    Bug(soft_embedding_unscaled, "window", "denoise.0.1/soft"),
    Bug(canvas_positions_off_by_one, "window", "denoise.0.0/layer.0"),
    Bug(canvas_causal, "full", "denoise.0.0/layer.0"),
    Bug(accepted_once_accepted_for_ever, "window", "steps: accepted", ("steps: next canvas",)),
    Bug(stopping_one_step_early, "batch", "steps: stop", ("row 0 on its own", "rows together")),
    Bug(stopping_one_step_early, "short", "steps: stop", ("row 0 on its own",)),
    Bug(softcap_left_out_in_ar, "wide", "verify/logits"),
    Bug(block_verified_with_a_canvas_mask, "wide", "verify/layer.0"),
    Bug(block_positions_off_by_one, "wide", "verify/layer.0"),
    Bug(block_window_narrow, "wide", "verify/layer.0"),
    Bug(block_with_the_decoders_scalars, "wide", "verify/layer.0"),
    Bug(last_token_encoded_twice, "wide", "verify/layer.0"),
    Bug(one_draft_too_many_accepted, "wide", "verify: accepted", ("verify: emitted", "after/layer.0")),
    Bug(one_draft_too_few_accepted, "wide", "verify: accepted", ("verify: emitted", "after/layer.0")),
    Bug(rollback_leaving_a_rejected_row, "wide", "after/layer.0"),
    Bug(rollback_one_row_too_far, "wide", "after/layer.0"),
    Bug(rollback_forgetting_a_layer, "wide", "after/layer.0"),
    Bug(canvas_behind_the_longest_the_cache_has_been, "wide", "behind/layer.0"),
]


@pytest.mark.parametrize("name", sorted({bug.bundle for bug in BUGS}))
def test_without_a_bug_it_passes(report, name):
    assert failures(report(name)) == []


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.plant.__name__}-{bug.bundle}")
def test_a_planted_bug_is_caught_where_it_is(replay, monkeypatch, bug):
    planted = replay(bug.bundle)
    bug.plant(planted, monkeypatch)
    report = planted.judge()
    assert report.first_failure == bug.first
    assert set(bug.also) <= set(failures(report))


def test_a_swapped_draw_shows_in_the_trajectory(replay):
    planted = replay("window")
    planted.bundle.arrays["steps/token"][0] = planted.bundle.arrays["steps/token"][0][:, ::-1]
    assert "steps: next canvas" in failures(planted.judge())


@pytest.fixture
def rope_by_base(monkeypatch):
    """Sliding layers turn by MLX's own powers of theta instead of the reference's float32 frequencies."""
    start, turn = layers.Rotary.__init__, layers.Rotary.__call__

    def remember(self, layer):
        start(self, layer)
        self.base = layer.rope_theta if layer.is_sliding else None

    def by_base(self, x, offset):
        if self.base is None:
            return turn(self, x, offset)
        return mx.fast.rope(x, x.shape[-1], traditional=False, base=self.base, scale=1.0, offset=offset)

    monkeypatch.setattr(layers.Rotary, "__init__", remember)
    monkeypatch.setattr(layers.Rotary, "__call__", by_base)


@pytest.mark.slow
def test_rope_by_base_shows_in_a_long_prompt(replay, rope_by_base):
    planted = replay("long")
    got = replaying.walk(planted.model, planted.bundle)
    worst = max(measure.ratio for measure in measures(planted.bundle, got))
    assert worst > MAX_RATIO


def test_rope_by_base_does_not_show_in_a_short_one(replay, rope_by_base):
    assert failures(replay("window").judge()) == []
