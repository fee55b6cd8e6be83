"""Against transformers itself, here and now. Needs torch: without it these fail, they never skip."""

import json
import weakref

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


ANGLES = {"float", "to", "mul", "__mul__", "cat", "__get__", "matmul"}  # what makes them
LOOKED_UP = {"embedding", "__getitem__", "tensor"}  # weights, and the factor of embeddings, before they are widened


@pytest.fixture(scope="module")
def record():
    from mlx_dgemma.parity import record

    return record


@pytest.mark.parametrize("name", SHAPES)
def test_recorded_now_and_repeated(record, name, tmp_path):
    facts = record.record_tiny(SHAPES[name], f"tiny:{name}", tmp_path / "out")
    assert all(same == total for same, total in facts["agreement"].values())
    report = check(tmp_path / "out")
    assert report.passed, report.table()


TWO_CANVASES = "<bos><|turn>user\ncount 12 to 90<turn|>\n<|turn>model\n12 13"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_embedded_checkpoint_recorded_now_and_repeated(record, tmp_path, dtype):
    """On every device that is here, which holds no more than the model and 1 GB."""
    import torch

    for device in ("cpu", "cuda") if torch.cuda.is_available() and dtype != "float64" else ("cpu",):
        out = tmp_path / device
        facts = record.record_checkpoint("nano", out, device=device, dtype=dtype, prompt=TWO_CANVASES)
        report = check(out)
        assert report.passed, report.table()
        assert facts["dtype"] == dtype and (facts["device_bytes_beside_model"] or {}).get("walks", 0) <= 1e9


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
    assert seen <= ANGLES | LOOKED_UP, seen
    with torch.no_grad(), Narrow():
        model(input_ids=ids, decoder_input_ids=ids[:, :7], self_conditioning_logits=z.float())
    assert {"softmax", "linear"} <= seen, "the spy sees float32 where there is some"


@pytest.fixture
def reference_model():
    from mlx_dgemma.parity import reference

    return reference.load_reference(BUNDLES / "window" / "model", "cpu")


def test_the_truth_needs_no_second_model(record, reference_model, monkeypatch):
    """One weight is widened at a time, and nothing is left of it."""
    import torch

    from mlx_dgemma.parity import reference

    model, widen = reference_model, reference._widened
    widened: list[weakref.ref] = []
    peak = 0

    def watched(value):
        nonlocal peak
        out = widen(value)
        if out is not value and isinstance(out, torch.Tensor):
            widened.append(weakref.ref(out))
            peak = max(peak, sum(tensor.nbytes for ref in widened if (tensor := ref()) is not None))
        return out

    monkeypatch.setattr(reference, "_widened", watched)
    before = {name: (id(weight), weight.dtype) for name, weight in model.named_parameters()}
    ids = torch.arange(3, 16)[None]
    with torch.no_grad(), reference.in_float64(model) as exact:
        assert exact is model
        exact(input_ids=ids, decoder_input_ids=ids[:, :7])
    assert len(widened) > len(model.model.decoder.layers) * 10
    assert 0 < peak <= 8 * max(weight.numel() for weight in model.parameters())
    assert before == {name: (id(weight), weight.dtype) for name, weight in model.named_parameters()}


def test_the_truth_does_not_depend_on_what_the_weights_are_in(record):
    """The checkpoint is bfloat16: loaded as it is or in float32, float64 is the same, its scale of embeddings too."""
    import torch

    from mlx_dgemma.parity import reference

    ids, outs = torch.arange(3, 16)[None], []
    for dtype in ("float32", "bfloat16"):
        model = reference.load_reference(BUNDLES / "spelled" / "model", "cpu", dtype)
        with torch.no_grad(), reference.in_float64(model):
            outs.append(model(input_ids=ids % 89, decoder_input_ids=ids[:, :6]).logits)
    assert torch.equal(*outs)


def test_neighbours_move_every_weight_and_move_it_back(record, reference_model):
    import torch

    from mlx_dgemma.parity import reference

    before = [weight.clone() for weight in reference_model.parameters()]
    count = 0
    for other in reference.neighbours(reference_model, 0):
        count += 1
        for weight, old in zip(other.parameters(), before, strict=True):
            assert (weight != old).all() and torch.allclose(weight, old, rtol=2e-7, atol=1e-38)
    assert count == reference.NEIGHBOURS
    assert all(torch.equal(*pair) for pair in zip(reference_model.parameters(), before, strict=True))


def test_noise_is_that_of_another_attention_kernel(record, reference_model, monkeypatch):
    import torch

    from mlx_dgemma.parity import reference

    calls = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *given, **named: calls.append(1) or kernel(*given, **named),
    )
    ids = torch.arange(3, 16)[None]
    with torch.no_grad():
        reference_model(input_ids=ids, decoder_input_ids=ids[:, :7])
        assert not calls
        with reference.with_sdpa(reference_model) as other:
            other(input_ids=ids, decoder_input_ids=ids[:, :7])
        assert len(calls) == 2 * len(reference_model.model.decoder.layers)
        reference_model(input_ids=ids, decoder_input_ids=ids[:, :7])
    assert len(calls) == 2 * len(reference_model.model.decoder.layers)


def test_too_little_memory_is_told_before_anything_is_loaded(record, tmp_path, monkeypatch):
    from mlx_dgemma.errors import InputError
    from mlx_dgemma.parity import room

    monkeypatch.setattr(record, "load_reference", None)  # never called
    monkeypatch.setattr(room, "host_memory", lambda: 500_000_000)
    with pytest.raises(InputError, match=r"float32 needs 1\.0 GB of host memory, this machine has 0\.5 GB"):
        record.record_tiny(SHAPES["full"], "tiny:full", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(room, "host_memory", lambda: 10**12)
    with pytest.raises(InputError, match=r"1\.0 GB of device memory, this machine has 0\.9 GB"):
        room.require_room(BUNDLES / "full" / "model", "bfloat16", 900_000_000)


def test_room_is_the_model_and_a_widened_weight_on_the_host_and_1_gb(record):
    from mlx_dgemma.checkpoint import Checkpoint
    from mlx_dgemma.parity.room import room_needed

    sizes = [info.size for info in Checkpoint(BUNDLES / "full" / "model").tensors.values()]
    for dtype, item in (("bfloat16", 2), ("float32", 4), ("float64", 4)):
        need = room_needed(BUNDLES / "full" / "model", dtype)
        assert need.device == item * sum(sizes) + 10**9
        assert need.host == need.device + 8 * max(sizes)


def test_without_cuda_that_is_said(record, tmp_path, monkeypatch):
    import torch

    from mlx_dgemma.errors import UsageError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device here; use --device cpu"):
        record.record_tiny(SHAPES["full"], "tiny:full", tmp_path / "out", device="cuda")
    assert not list(tmp_path.iterdir())


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
