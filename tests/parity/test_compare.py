"""Quantised checkpoints: how far they are from the reference is said, and nothing is judged."""

import json
import shutil

import numpy as np
import pytest

from mlx_dgemma import convert
from mlx_dgemma.errors import InputError
from mlx_dgemma.parity.bundle import SHIPPED as BUNDLES
from mlx_dgemma.parity.command import main
from mlx_dgemma.parity.compare import compare, is_quantised, kl

NANO = BUNDLES / "nano"


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """nano in 3 and in 8 bits."""
    folder = tmp_path_factory.mktemp("quantised")
    return {
        bits: convert("nano", folder / f"nano-{bits}bit", quantize=True, q_bits=bits, progress=False) for bits in (3, 8)
    }


@pytest.fixture(scope="module")
def compared(quantised):
    return {bits: compare(NANO, str(folder)) for bits, folder in quantised.items()}


@pytest.mark.slow
def test_fewer_bits_are_further_away(compared):
    for coarse, fine in zip(compared[3].divergences, compared[8].divergences, strict=True):
        assert coarse.mean > 10 * fine.mean > 0
        assert fine.mean <= fine.p99
    for coarse, fine in zip(compared[3].agreements, compared[8].agreements, strict=True):
        assert coarse.same <= fine.same <= fine.total
    assert compared[3].agreements[0].same < compared[3].agreements[0].total


@pytest.mark.slow
def test_steps_to_stop_are_those_of_a_free_run(compared):
    ((theirs, ours),) = compared[8].steps
    recorded = json.loads((NANO / "bundle.json").read_text())["canvases"]
    assert theirs == recorded and len(ours) >= 1 and all(count >= 1 for count in ours)


def test_the_command_prints_it_and_judges_nothing(quantised, capsys):
    main(["check", str(NANO), "--model", str(quantised[3])])  # exits 0
    out = capsys.readouterr().out
    for said in ("causal text", "noised canvases", "accepted", "steps to stop", "not judged"):
        assert said in out
    assert "FAILED" not in out and "passed" not in out


def test_another_size_is_refused(quantised):
    with pytest.raises(InputError, match="another config"):
        compare(BUNDLES / "full", str(quantised[8]))


def test_a_checkpoint_without_quantization_is_judged(quantised, tmp_path):
    assert is_quantised(str(quantised[8])) and not is_quantised("nano") and not is_quantised(None)
    plain = shutil.copytree(BUNDLES / "full" / "model", tmp_path / "plain")
    assert not is_quantised(str(plain))


def test_kl_is_that_of_the_whole_vocabulary_where_all_of_it_is_kept():
    random = np.random.default_rng(0)
    ours, theirs = random.normal(size=(2, 5, 40))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (theirs, ours))
    exact = (p * np.log(p / q)).sum(-1)
    totals = [np.log(np.exp(x).sum(-1)) for x in (theirs, ours)]
    np.testing.assert_allclose(kl(theirs, totals[0], ours, totals[1]), exact, atol=1e-9)
    kept = slice(0, 10)  # what is left in one piece: less, but not nothing
    less = kl(theirs[:, kept], totals[0], ours[:, kept], totals[1])
    assert (less > 0).all() and (less <= exact).all()
    np.testing.assert_allclose(kl(theirs, totals[0], theirs, totals[0]), 0, atol=1e-9)
