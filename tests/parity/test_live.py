"""Against transformers itself, here and now. Needs torch: without it these fail, they never skip."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_dgemma.config import ModelConfig
from mlx_dgemma.loading import load_model
from mlx_dgemma.model import DiffusionGemma
from mlx_dgemma.parity import bundle as bundles
from mlx_dgemma.parity.bundle import SHIPPED as BUNDLES
from mlx_dgemma.parity.check import check
from mlx_dgemma.parity.shapes import SHAPES

pytestmark = pytest.mark.reference


ANGLES = {"float", "to", "mul", "__mul__", "cat", "__get__", "__getitem__"}  # what makes them
COPIES = {"clone", "__deepcopy__"}  # of the model, before it is widened


@pytest.fixture(scope="module")
def record():
    from mlx_dgemma.parity import record

    return record


@pytest.mark.parametrize("name", SHAPES)
def test_recorded_now_and_repeated(record, name, tmp_path):
    facts = record.record_tiny(SHAPES[name], f"tiny:{name}", tmp_path / "out")
    assert facts["flips"] == 0
    report = check(tmp_path / "out")
    assert report.passed, report.table()


def test_the_embedded_checkpoint_recorded_now_and_repeated(record, tmp_path):
    record.record_checkpoint("nano", tmp_path / "out")
    report = check(tmp_path / "out")
    assert report.passed, report.table()


def test_recording_is_deterministic(record, tmp_path):
    record.record_tiny(SHAPES["full"], "tiny:full", tmp_path / "out")
    new, committed = bundles.read(tmp_path / "out"), bundles.read(BUNDLES / "full")
    assert new.facts["config"]["text_config"] == committed.facts["config"]["text_config"]
    for name, array in committed.arrays.items():
        if array.dtype.kind in "bi":
            assert np.array_equal(new.arrays[name], array), name
        else:
            np.testing.assert_allclose(new.arrays[name], array, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_truth_is_float64_throughout(record):
    """Nothing but RoPE's angles, positions times inverse frequencies, is computed in float32."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Narrow(TorchFunctionMode):
        """Entered first, it sees calls as `_float64` has changed them."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                seen.add(function.__name__)
            return out

    from mlx_dgemma.parity import reference

    model = reference.load_reference(BUNDLES / "window" / "model", "cpu")
    ids, z = torch.arange(3, 16)[None], torch.ones(1, 7, 101, dtype=torch.float64)
    seen: set[str] = set()
    with torch.no_grad(), Narrow(), reference.in_float64(model) as exact:
        out = exact(input_ids=ids, decoder_input_ids=ids[:, :7], self_conditioning_logits=z)
    assert out.logits.dtype == torch.float64
    assert seen <= ANGLES | COPIES, seen
    with torch.no_grad(), Narrow():
        model(input_ids=ids, decoder_input_ids=ids[:, :7], self_conditioning_logits=z.float())
    assert {"softmax", "linear"} <= seen, "the spy sees float32 where there is some"


def test_a_run_that_shows_too_little_is_refused(record, tmp_path):
    from dataclasses import replace

    from mlx_dgemma.errors import InputError

    with pytest.raises(InputError, match="canvases"):
        record.record_tiny(replace(SHAPES["full"], canvases=1), "tiny:full", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [36, 2816])
def test_soft_embedding_rounds_where_the_reference_rounds_in_bfloat16(size):
    """z and the shares are rounded to bfloat16, softmax is float32, and so is the scale rounded: sqrt(2816) is 53."""
    import torch

    random = np.random.default_rng(size)
    vocab, positions = 301, 5
    z = (8 * random.standard_normal((1, positions, vocab))).astype(np.float32)
    weight = torch.tensor(random.standard_normal((vocab, size)), dtype=torch.bfloat16)
    rounded = torch.tensor(z).to(torch.bfloat16)
    shares = rounded.softmax(dim=-1, dtype=torch.float32).to(torch.bfloat16)
    expected = torch.matmul(shares.double(), weight.double()).to(torch.bfloat16) * torch.tensor(size**0.5).to(
        torch.bfloat16
    )
    got = np.array(_embedding_model(weight).soft_embedding(mx.array(z)).astype(mx.float32))
    # a product of bfloat16 may be summed in any order before it is rounded: one unit in the last place
    np.testing.assert_allclose(got, expected.float().numpy(), rtol=2**-7, atol=2**-7 * size**0.5 * 0.02)
    unrounded = torch.matmul(torch.tensor(z).softmax(dim=-1).double(), weight.double()) * size**0.5
    distance = np.abs(got - expected.float().numpy()).mean()
    assert distance < np.abs(unrounded.numpy() - expected.float().numpy()).mean() / 4


def _embedding_model(weight) -> DiffusionGemma:
    """A bfloat16 model of which only the embedding matters."""
    text = json.loads((BUNDLES / "full" / "model" / "config.json").read_text())
    text["text_config"] |= {"vocab_size": weight.shape[0], "hidden_size": weight.shape[1]}
    model = DiffusionGemma(ModelConfig.from_dict(text))
    model.set_dtype(mx.bfloat16)
    model.model.decoder.embed_tokens.weight = mx.array(weight.float().numpy()).astype(mx.bfloat16)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_every_weight_name_has_its_place(name):
    """Strict loading of what transformers saved: a missing or a surplus tensor raises."""
    load_model(BUNDLES / name / "model")
