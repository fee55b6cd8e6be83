"""The check is worth what it catches: each of these plants a bug, and must be seen to fail."""

import mlx.core as mx
import pytest

from mlx_dgemma import cache, denoise, layers, model, sampling
from mlx_dgemma.parity import replay as replaying
from mlx_dgemma.parity.check import MAX_RATIO, measures


def failures(report):
    return [entry.name for entry in [*report.measures, *report.counts] if not entry.passed]


def test_without_a_bug_it_passes(replay):
    assert failures(replay("window").judge()) == []


def test_router_on_the_normed_input(replay, monkeypatch):
    planted, route = replay("window"), layers.Router.__call__
    norms = {id(layer.router): layer.pre_feedforward_layernorm_2 for layer in planted.model.layers}
    monkeypatch.setattr(layers.Router, "__call__", lambda self, x: route(self, norms[id(self)](x)))
    report = planted.judge()
    assert report.first_failure == "encode.0/layer.0"
    assert "encode: experts" in failures(report)


def test_encode_window_off_by_one(replay, monkeypatch):
    start = layers.Pass.__init__

    def narrow(self, cache, window, *rest, **named):
        start(self, cache, window - 1, *rest, **named)

    monkeypatch.setattr(layers.Pass, "__init__", narrow)
    assert replay("window").judge().first_failure == "encode.0/layer.0"


def test_canvas_window_off_by_one(replay, monkeypatch):
    visible = cache.LayerRows.visible
    monkeypatch.setattr(
        cache.LayerRows, "visible", lambda self: visible(self) - (self.window is not None and self.end >= self.window)
    )
    assert replay("window").judge().first_failure == "denoise.0.0/layer.0"


def test_encoder_scalars_swapped_for_the_decoders(replay):
    planted = replay("window")
    for own, shared in zip(planted.model.model.encoder.language_model.layers, planted.model.layers, strict=True):
        own.layer_scalar, shared.layer_scalar = shared.layer_scalar, own.layer_scalar
    report = planted.judge()
    assert report.first_failure == "encode.0/layer.0"
    assert "denoise.0.0/layer.0" in failures(report)


def test_softcap_left_out(replay, monkeypatch):
    def uncapped(self, hidden, ids=None):
        return self._project(hidden, ids).astype(mx.float32)

    monkeypatch.setattr(model.DiffusionGemma, "logits", uncapped)
    assert replay("window").judge().first_failure == "encode.0/logits"


def test_self_conditioning_left_out(replay, monkeypatch):
    call = layers.SelfConditioning.__call__
    monkeypatch.setattr(layers.SelfConditioning, "__call__", lambda self, x, soft: call(self, x, mx.zeros_like(x)))
    assert replay("window").judge().first_failure == "denoise.0.1/layer.0"


def test_soft_embedding_unscaled(replay, monkeypatch):
    monkeypatch.setattr(model.DiffusionGemma, "scale_soft", lambda self, mixed: mixed)
    assert replay("window").judge().first_failure == "denoise.0.1/soft"


def test_canvas_positions_off_by_one(replay, monkeypatch):
    start = layers.Pass.__init__

    def late(self, *given, **named):
        start(self, *given, **named)
        self.offset += not self.causal

    monkeypatch.setattr(layers.Pass, "__init__", late)
    assert replay("window").judge().first_failure == "denoise.0.0/layer.0"


def test_canvas_seeing_only_what_is_before_it(replay, monkeypatch):
    def causal(self, keys):
        return mx.arange(keys - self.queries, keys)[:, None] >= mx.arange(keys)[None]

    monkeypatch.setattr(layers.Pass, "sliding_mask", causal)
    assert "denoise.0.0/layer.0" in failures(replay("full").judge())


def test_accept_mask_kept_from_the_step_before(replay, monkeypatch):
    before, accept = [], sampling.accept

    def kept(entropy, bound):
        mask = accept(entropy, bound)
        if before and before[-1].shape == mask.shape:
            mask = mask | before[-1]
        before.append(mask)
        return mask

    monkeypatch.setattr(sampling, "accept", kept)
    monkeypatch.setattr(denoise, "accept", kept)
    report = replay("window").judge()
    assert failures(report)[:2] == ["steps: accepted", "steps: next canvas"]


@pytest.mark.parametrize("name", ["batch", "short"])
def test_stopping_one_step_early(replay, monkeypatch, name):
    start = sampling.StopRule.__init__

    def hasty(self, config):
        start(self, config)
        self._stability -= 1

    monkeypatch.setattr(sampling.StopRule, "__init__", hasty)
    report = replay(name).judge()
    assert report.first_failure == "steps: stop"
    assert any(failure.startswith("row") for failure in failures(report))


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


def test_rope_by_base_shows_in_a_long_prompt(replay, rope_by_base):
    planted = replay("long")
    got = replaying.walk(planted.model, planted.bundle)
    worst = max(measure.ratio for measure in measures(planted.bundle, got))
    assert worst > MAX_RATIO


def test_rope_by_base_does_not_show_in_a_short_one(replay, rope_by_base):
    assert failures(replay("window").judge()) == []
