"""What a training needs, for the 26B and for a small model; the curve."""

from xml.etree import ElementTree

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.config import ModelConfig
from mlx_dgemma.drafter.geometry import BlockConfig
from mlx_dgemma.drafter.network import BlockNetwork
from mlx_dgemma.drafter.training import estimate as estimating
from mlx_dgemma.drafter.training.curve import nice, svg
from mlx_dgemma.drafter.training.estimate import estimate, parameters, require_fit
from mlx_dgemma.drafter.training.heldout import Accepted
from mlx_dgemma.drafter.training.options import Options
from mlx_dgemma.drafter.training.result import curve
from mlx_dgemma.errors import InputError
from tests.drafter.training.small import FAMILIES, small_config

THE_26B = ModelConfig.from_dict(
    {
        "model_type": "diffusion_gemma",
        "text_config": {
            "hidden_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
            "global_head_dim": 512, "num_global_key_value_heads": 2, "sliding_window": 1024, "num_experts": 128,
            "top_k_experts": 8, "moe_intermediate_size": 704, "intermediate_size": 2112,
        },
    }
)  # fmt: skip
GB = 1e9


def of_the_26b(context=1024, **options):
    drafter = BlockConfig.for_model(THE_26B)
    facts = {"weights": int(16.1 * GB), "dtype": mx.bfloat16, "context": context}
    return estimate(THE_26B, drafter, Options(**options), **facts)


def test_the_26b():
    need = of_the_26b()
    assert need.parameters == pytest.approx(430e6, rel=0.02)  # as published
    assert need.drafter == pytest.approx(10.3 * GB, rel=0.03)
    assert 16.1 * GB < need.model < 25 * GB
    assert need.blocks <= 2 * GB and 4 < need.blocks_at_once < 16
    assert 28 * GB < need.total < 36 * GB
    assert need.positions == 4 * 512 * 16
    blocks, head = 6 * need.parameters, 4 * 2816 * 262_144
    active = 3.0e9  # parameters that a token passes, the head left out: "A4B" with embeddings
    main = 2 * 4 * 1024 * active + 2 * 4 * 512 * 2816 * 262_144
    assert need.flops == pytest.approx(need.positions * (blocks + head) + main, rel=0.02)
    assert "429.7 M" in str(need) and "\n" not in str(need)


def test_the_time_of_its_arithmetic(monkeypatch):
    need = of_the_26b()
    monkeypatch.setattr(estimating, "matmul_speed", lambda: 12e12)
    assert need.work(1000) == (
        f"1000 steps of about 210 TFLOP, {1000 * need.flops / 12e12 / 3600:.1f} hours "
        "at the 12 TFLOP/s that a matmul reaches here"
    )
    assert "minutes" in need.work(1)


def test_matmuls_are_timed():
    assert 1e8 < estimating.matmul_speed(256, 0.01) < 1e16


def test_what_costs_what():
    need = of_the_26b()
    assert of_the_26b(context=16384).text > 10 * need.text
    assert of_the_26b(micro_batch_gb=8).blocks_at_once > 3 * need.blocks_at_once
    assert of_the_26b(micro_batch_gb=1e-6).blocks_at_once == 1
    assert of_the_26b(anchors=3).blocks < need.blocks
    few = of_the_26b(max_tokens=3)  # an answer of three tokens has three places
    assert few.blocks_at_once == 3 and few.positions == 4 * 3 * 16
    assert of_the_26b(max_tokens=511).positions == 4 * 511 * 16
    assert of_the_26b(at_once=64).model > need.model


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted(family):
    config = small_config(**FAMILIES[family])
    assert parameters(config) == sum(array.size for _, array in tree_flatten(BlockNetwork(config).parameters()))


def test_too_little_memory(monkeypatch):
    need = of_the_26b()
    monkeypatch.setattr(estimating, "machine_memory", lambda: need.total)
    require_fit(need)
    monkeypatch.setattr(estimating, "machine_memory", lambda: need.total - 1)
    with pytest.raises(InputError, match=f"needs about {need.total / GB:.2f} GB .* this machine has"):
        require_fit(need)


def test_the_curve_is_an_svg():
    accepted = Accepted((0.5, 0.75), (1.0, 1.9), 7)
    history = [{"step": step, "accepted": [0.1 * step, 0.2], "places": 5} for step in range(5)]
    root = ElementTree.fromstring(curve(accepted, history))
    assert root.tag.endswith("svg") and "prefers-color-scheme: dark" in root.find("{*}style").text
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"drafts a round", "accepted a round", "this one", "0", "1", "2"} <= set(texts)
    assert {f"step {step}, on 71% of the places" for step in (1, 2, 4)} <= set(texts)
    points = [line.get("points").split() for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert all(len(line) == 2 for line in points) and len(points) == 5


def test_odd_curves():
    for values in ([0.0], [0.0, 0.0], [1e-4], [123.0] * 70):
        ElementTree.fromstring(svg("a < b & c", "x", "y", {'"name"': values}))
    assert [nice(value) for value in (0.9, 1, 1.1, 2.2, 3, 7, 11, 64)] == [1, 1, 1.5, 2.5, 4, 7.5, 15, 75]
