"""Committed bundles, replayed without torch: every shape, every level."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.folders import new_folder
from mlx_dgemma.parity import bundle as bundles
from mlx_dgemma.parity.bundle import SHIPPED as BUNDLES
from mlx_dgemma.parity.check import MAX_RATIO, Count, Measure, check, measures
from mlx_dgemma.parity.replay import walk
from mlx_dgemma.parity.shapes import SHAPES, shape

NAMES = sorted(path.name for path in BUNDLES.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_the_port_repeats_the_reference(name):
    report = check(BUNDLES / name)
    assert report.passed, report.table()


@pytest.mark.parametrize("name", SHAPES)
def test_by_root_mean_square_it_holds_against_the_one_recorded_run_too(replay, name):
    """The floor of a bundle is the largest of several float32 runs. The worst entry of a single run is a
    matter of luck (on `long` a lucky one makes it 4.8); its root mean square needs no such allowance."""
    recorded = replay(name)
    got = walk(recorded.model, recorded.bundle)
    for measure in measures(recorded.bundle, got):
        own = recorded.bundle.floor_of_one_run(measure.name)
        assert measure.got.rms <= MAX_RATIO * own.rms, measure.name


def test_every_shape_has_a_bundle():
    assert set(SHAPES) <= set(NAMES)


def test_bundles_stay_small():
    sizes = {name: sum(file.stat().st_size for file in (BUNDLES / name).rglob("*") if file.is_file()) for name in NAMES}
    assert max(sizes.values()) < 400_000
    assert sum(sizes.values()) < 1_700_000


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_shows_what_it_is_for(name):
    recorded = bundles.read(BUNDLES / name)
    ran = recorded.arrays["steps/ran"]
    accepted = recorded.arrays["steps/accepted"][ran]
    assert 0 < accepted.mean() < 1
    assert len(recorded.facts["canvases"]) >= 2
    assert recorded.facts["flips"] == 0, "float32 and float64 route alike, or all later rows differ"


def test_stopping_early_apart_and_at_an_end_are_recorded():
    batch, short = bundles.read(BUNDLES / "batch"), bundles.read(BUNDLES / "short")
    assert batch.arrays["steps/ran"].sum(axis=0).tolist()[0] != batch.arrays["steps/ran"].sum(axis=0).tolist()[1]
    assert max(short.facts["canvases"]) < short.sampling.max_denoising_steps
    assert np.isin(short.arrays["sequences"], short.sampling.eos_token_ids).any()


def test_both_spellings_of_config_are_recorded():
    texts = {name: bundles.read(BUNDLES / name).facts["config"]["text_config"] for name in ("window", "spelled")}
    assert "per_layer_config" in texts["window"] and "global_head_dim" not in texts["window"]
    assert "per_layer_config" not in texts["spelled"] and "layer_types" not in texts["spelled"]
    assert texts["spelled"]["global_head_dim"] and texts["spelled"]["num_global_key_value_heads"]


def test_the_table_names_what_failed_first(replay):
    damaged = replay("full")
    damaged.bundle.arrays["denoise.0.0/norm"] += 1e-3
    report = damaged.judge()
    assert not report.passed
    assert report.first_failure == "denoise.0.0/norm"
    assert "FAILED: first at denoise.0.0/norm" in report.table()


def test_nothing_passes_that_is_not_a_number():
    error = bundles.Error(float("nan"), 0.0)
    assert not Measure("x", error, error, float("nan")).passed
    assert Measure("x", error, error, MAX_RATIO).passed


def test_near_ties_are_capped():
    assert Count("x", wrong=0, ties=1, total=50).passed
    assert not Count("x", wrong=0, ties=2, total=50).passed
    assert not Count("x", wrong=1, ties=0, total=50).passed


# --- what a user can do wrong


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(BUNDLES / "full", tmp_path / "copy"))


def test_a_missing_bundle_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        check(tmp_path / "nowhere")


def test_a_changed_bundle_is_refused(copy):
    (copy / "bundle.safetensors").write_bytes(b"something else")
    with pytest.raises(InputError, match="sha256"):
        check(copy)


def test_another_schema_is_refused(copy):
    path = copy / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    with pytest.raises(InputError, match="schema 99"):
        check(copy)


def test_other_weights_are_refused():
    with pytest.raises(InputError, match="other weights"):
        check(BUNDLES / "full", str(BUNDLES / "short" / "model"))


def test_a_missing_checkpoint_is_named(copy):
    shutil.rmtree(copy / "model")
    with pytest.raises(InputError, match="tiny:full"):
        check(copy)


def test_an_existing_folder_is_not_overwritten(copy):
    with pytest.raises(UsageError, match="exists already"), new_folder(copy):
        pass


def test_a_failed_recording_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as work:
        (work / "half").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_an_unknown_shape_is_refused():
    with pytest.raises(UsageError, match="window"):
        shape("round")
