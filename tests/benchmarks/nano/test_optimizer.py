"""Muon, weights in bfloat16, and what is frozen."""

import numpy as np
import pytest

from mlx_dgemma.errors import UsageError

pytestmark = [pytest.mark.reference, pytest.mark.usefixtures("not_compiled")]


def moved(optimizer_of, *shapes):
    """How some matrices, or stacks of them, change in four steps of random gradients."""
    import torch

    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    before = [p.detach().clone() for p in parameters]
    optimizer = optimizer_of(parameters)
    for _ in range(4):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() - b for p, b in zip(parameters, before, strict=True)]


def test_muon_moves_matrices_as_that_of_torch_does():
    import torch

    from benchmarks.nano.optimizer import Muon

    shapes = (24, 40), (40, 24), (24, 40)
    options = {"weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    ours = moved(lambda p: Muon(p, lr=1e-2), *shapes)
    theirs = moved(lambda p: torch.optim.Muon(p, lr=1e-2, **options), *shapes)
    other = moved(lambda p: torch.optim.Muon(p, lr=1e-2, momentum=0.8, **options), *shapes)
    for a, b, c in zip(ours, theirs, other, strict=True):
        assert (a - b).norm() < 0.03 * b.norm() < (a - c).norm(), "theirs computes in bf16"


def test_muon_moves_each_matrix_of_a_stack_on_its_own(monkeypatch):
    from benchmarks.nano import optimizer

    stacked = moved(lambda p: optimizer.Muon(p, lr=1e-2), (3, 8, 12), (8, 12))
    monkeypatch.setattr(optimizer, "SMALL", 0)
    apart = moved(lambda p: optimizer.Muon(p, lr=1e-2), (3, 8, 12), (8, 12))
    for a, b in zip(stacked, apart, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    singular = np.linalg.svd(optimizer.orthogonal(stacked[0]), compute_uv=False)
    assert singular.shape == (3, 8) and 0.5 < singular.min() < singular.max() < 1.5


def small_model(**tensors):
    """Parameters in bfloat16, and a layer scalar."""
    import torch

    model = torch.nn.Module()
    for name, value in tensors.items():
        model.register_parameter(name, torch.nn.Parameter(value.bfloat16()))
    model.register_buffer("layer_scalar", torch.ones(1).bfloat16())
    return model


def optimized(model, steps, state=None, **options):
    """The optimizers after some steps of gradients of 1; each moves a weight by about a hundredth of what rounds up."""
    import torch

    from benchmarks.nano.optimizer import Optimizers

    optimizers = Optimizers(model, lr=4e-5, matrix_lr=4e-4, **options)
    if state is not None:
        optimizers.load_state_dict(state)
    for _ in range(steps):
        for p in (*model.parameters(), *model.buffers()):
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizers.step(1.0)
    return optimizers


def test_updates_that_bfloat16_would_round_away_add_up():
    import torch

    start = {"q_proj": torch.eye(4) + 1, "norm": torch.ones(4)}
    whole, part, rest = (small_model(**start) for _ in range(3))
    optimized(whole, 400)
    for name, before in (*start.items(), ("layer_scalar", torch.ones(1))):
        after = getattr(whole, name)
        assert after.dtype == torch.bfloat16 and (after < before).all(), name
    optimized(rest, 300, optimized(part, 100).state_dict())
    assert all(getattr(rest, name).equal(getattr(whole, name)) for name in (*start, "layer_scalar"))


def test_what_is_frozen_is_named_and_something_is_left():
    import torch

    model = small_model(q_proj=torch.eye(4), norm=torch.ones(4))
    model.tied = model.norm
    optimized(model, 400, freeze=("layer_scalar", "tied"))
    assert model.layer_scalar.item() == 1 and (model.norm == 1).all()
    assert not model.q_proj.equal(torch.eye(4).bfloat16())
    for freeze, said in ((("q_proj", "poem"), "--freeze poem"), (("q_", "norm", "layer_"), "nothing to train")):
        with pytest.raises(UsageError, match=said):
            optimized(model, 0, freeze=freeze)
