"""Folders of block drafters: what is found, read and written, what is refused."""

from __future__ import annotations

import json
import math

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.drafter import weights
from mlx_dgemma.drafter.block import make
from mlx_dgemma.drafter.format import parse
from mlx_dgemma.drafter.network import BlockNetwork
from mlx_dgemma.drafter.weights import quantise, read
from tests.drafter.blocks import HIDDEN
from tests.drafter.files import MISSING, PUBLISHED, SMALL, changed, random_network, refused, write, write_drafter
from tests.helpers import random_model


def test_the_published_tensors_and_no_others():
    network = BlockNetwork(parse(PUBLISHED))  # lazy: 0.4 B weights that are never made
    expected = {"fc.weight": (2816, 6 * 2816), "hidden_norm.weight": (2816,), "norm.weight": (2816,)}
    for index in range(5):
        expected |= {
            f"layers.{index}.input_layernorm.weight": (2816,),
            f"layers.{index}.post_attention_layernorm.weight": (2816,),
            f"layers.{index}.self_attn.q_proj.weight": (4096, 2816),
            f"layers.{index}.self_attn.k_proj.weight": (1024, 2816),
            f"layers.{index}.self_attn.v_proj.weight": (1024, 2816),
            f"layers.{index}.self_attn.o_proj.weight": (2816, 4096),
            f"layers.{index}.self_attn.q_norm.weight": (128,),
            f"layers.{index}.self_attn.k_norm.weight": (128,),
            f"layers.{index}.mlp.gate_proj.weight": (5632, 2816),
            f"layers.{index}.mlp.up_proj.weight": (5632, 2816),
            f"layers.{index}.mlp.down_proj.weight": (2816, 5632),
        }
    shapes = {name: tuple(array.shape) for name, array in tree_flatten(network.parameters())}
    assert shapes == expected
    assert round(sum(math.prod(shape) for shape in shapes.values()) / 1e6) == 430


def test_files_come_back_as_they_were_written(tmp_path, tiny):
    for raw in (SMALL, changed(SMALL, "own.enable_confidence_head", MISSING)):
        network, folder = random_network(raw), tmp_path / str(len(raw["dflash_config"]))
        write(network, folder, mx.float32)
        back = dict(tree_flatten(read(folder, tiny).parameters()))
        assert all(mx.array_equal(array, back.pop(name)) for name, array in tree_flatten(network.parameters()))
        assert not back
    network = random_network({**SMALL, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16})
    quantise(network, 4, "here")
    with pytest.raises(ValueError, match="quantised"):
        write(network, tmp_path / "quantised")
    assert not list((tmp_path / "quantised").iterdir())


def test_embedded_and_downloaded_folders(tmp_path, monkeypatch):
    assert weights.find("nano") == weights.EMBEDDED_DRAFTER
    asked = []
    monkeypatch.setattr(weights, "_downloaded", {})
    monkeypatch.setattr(weights, "resolve", lambda place: asked.append(place) or tmp_path)
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert weights.find("owner/name") == tmp_path
    assert asked == ["owner/name"]  # the Hub once
    (tmp_path / "owner" / "name").mkdir(parents=True)
    weights.find("owner/name")
    assert len(asked) == 2  # a folder goes first


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"embed_tokens.weight": mx.zeros((131, 24))}, "tensor 'embed_tokens.weight' has no place"),
        ({"layers.2.mlp.up_proj.weight": mx.zeros((36, 24))}, "tensor 'layers.2.mlp.up_proj.weight' has no place"),
        ({"layers.0.self_attn.v_norm.weight": mx.ones((8,))}, "'layers.0.self_attn.v_norm.weight' has no place"),
        ({"model.fc.weight": mx.zeros((24, 48))}, "fc.weight' has no place"),  # beside fc.weight
        ({"model.model.norm.weight": mx.ones((24,))}, "'model.model.norm.weight' has no place"),
        ({"fc.weight": None}, "tensor fc.weight is missing"),
        ({"layers.1.self_attn.k_norm.weight": None}, "tensor layers.1.self_attn.k_norm.weight is missing"),
        ({"markov_head.markov_w2.weight": None}, "tensor markov_head.markov_w2.weight is missing"),
        ({"confidence_head.proj.bias": None}, "tensor confidence_head.proj.bias is missing"),
        ({"fc.weight": mx.zeros((24, 72))}, "fc.weight has the shape (24, 72), config.json calls for (24, 48)"),
        ({"layers.0.self_attn.q_proj.weight": mx.zeros((24, 24))}, "q_proj.weight has the shape (24, 24)"),
        ({"confidence_head.proj.weight": mx.zeros((1, 24))}, "proj.weight has the shape (1, 24)"),
        ({"norm.weight": mx.ones((24,), dtype=mx.int32)}, "norm.weight is I32; weights must be F32, F16 or BF16"),
        ({"norm.weight": mx.ones((24,), dtype=mx.uint8)}, "norm.weight is U8"),
        ({"fc.weight": mx.full((24, 48), mx.nan)}, "tensor fc.weight holds numbers that are not finite in float32"),
        ({"norm.weight": mx.array([*[1.0] * 23, mx.inf])}, "norm.weight holds numbers that are not finite"),
        ({"confidence_head.proj.bias": mx.array([-mx.inf])}, "proj.bias holds numbers that are not finite"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_tensors_that_are_refused(tmp_path, tiny, tensors, said):
    refused(tiny, write_drafter(tmp_path, tensors=tensors), said)


def test_weights_that_the_models_dtype_does_not_hold_are_refused(tmp_path):
    model = random_model()
    model.set_dtype(mx.float16)
    tensors = {"norm.weight": mx.full((24,), 1e6)}
    refused(model, write_drafter(tmp_path, tensors=tensors), "norm.weight holds numbers that are not finite in float16")


# same sizes of q_proj and k_proj, cut into heads otherwise: caught by the norms of a head
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 1, 16), (12, 4, 4), (2, 6, 8), (6, 2, 4)])
def test_a_wrong_head_split_is_refused(tmp_path, tiny, heads, kv_heads, size):
    folder = write_drafter(tmp_path)
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": size}
    (folder / "config.json").write_text(json.dumps({**SMALL, **sizes}))
    refused(tiny, folder, "config.json")


def test_files_that_are_refused(tmp_path, tiny):
    folder = write_drafter(tmp_path / "drafter")
    file, config = folder / "model.safetensors", folder / "config.json"
    whole, text = file.read_bytes(), config.read_text()
    for cut in (0, 5, 8, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        refused(tiny, folder, "download it again")
    file.write_bytes(whole + b"\0")
    refused(tiny, folder, "its header says")
    file.unlink()
    refused(tiny, folder, "no model*.safetensors here")
    file.write_bytes(whole)
    for broken, said in (("{", "not JSON"), ("[]", "must hold a JSON object"), ("\xff", "not JSON")):
        config.write_bytes(broken.encode("latin-1"))
        refused(tiny, folder, said)
    config.unlink()
    refused(tiny, folder, "no such file")
    config.write_text(text)
    make(tiny, str(folder))


@pytest.mark.parametrize("place", ["no/such/folder/here", "no-folder"])
def test_places_that_are_refused(tiny, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(tiny, place, "no such f")
    refused(tiny, "", "the name of the model is empty")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_drafters_matrices_are_quantised(model, folders, bits):
    network = make(model, folders("dspark"), drafter_bits=bits).network
    kinds = {path: type(module) for path, module in network.named_modules() if "weight" in module}
    quantised = {path for path, kind in kinds.items() if kind is nn.QuantizedLinear}
    assert quantised == {path for path in kinds if path == "fc" or "_proj" in path}
    assert kinds["markov_head.markov_w2"] is kinds["confidence_head.proj"] is nn.Linear
    assert {network.fc.bits, network.layers[0].mlp.up_proj.bits} == {bits}
    arrays = dict(tree_flatten(network.parameters()))
    assert arrays["fc.weight"].dtype == mx.uint32
    assert arrays["fc.weight"].nbytes * 32 == bits * 2 * HIDDEN * HIDDEN * 4
