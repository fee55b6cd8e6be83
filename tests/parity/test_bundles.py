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
from mlx_dgemma.parity.check import MAX_RATIO, Agreement, Count, Measure, check
from mlx_dgemma.parity.shapes import SHAPES, shape

NAMES = sorted(path.name for path in BUNDLES.iterdir())


def replayed(names):
    """The longest takes 25 s, whoever asks for its report first."""
    return [pytest.param(name, marks=pytest.mark.slow) if name == "long" else name for name in names]


@pytest.mark.parametrize("name", replayed(NAMES))
def test_the_port_repeats_the_reference(report, name):
    assert report(name).passed, report(name).table()


@pytest.mark.parametrize("name", replayed(SHAPES))
def test_by_root_mean_square_it_holds_against_the_one_recorded_run_too(report, name):
    """The floor of a bundle is the largest of several float32 runs. The worst entry of a single run is a
    matter of luck (on `long` a lucky one makes it 4.8); its root mean square needs no such allowance."""
    recorded = bundles.read(BUNDLES / name)
    for measure in report(name).measures:
        own = recorded.floor_of_one_run(measure.name)
        assert measure.got.rms <= MAX_RATIO * own.rms, measure.name


def test_every_shape_has_a_bundle():
    assert set(SHAPES) <= set(NAMES)


def test_bundles_stay_small():
    sizes = {name: sum(file.stat().st_size for file in (BUNDLES / name).rglob("*") if file.is_file()) for name in NAMES}
    assert max(sizes.values()) < 1_500_000
    assert sum(sizes.values()) < 8_000_000


def test_both_versions_of_transformers_are_recorded():
    versions = {name: bundles.read(BUNDLES / name).facts["versions"]["transformers"] for name in NAMES}
    assert versions["window_5.17"] == "5.17.0" and versions["window"] == "5.23.0"
    old, new = (bundles.read(BUNDLES / name) for name in ("window_5.17", "window"))
    for name, array in new.arrays.items():  # one model, one story
        np.testing.assert_allclose(old.arrays[name], array, rtol=1e-6, atol=1e-9, err_msg=name)


def test_at_a_large_vocabulary_columns_are_kept(replay):
    wide = bundles.read(BUNDLES / "wide")
    assert wide.arrays["ar/logits"].shape[-1] == bundles.COLUMNS < 5003
    assert len(set(wide.columns.tolist())) == bundles.COLUMNS and wide.columns.max() < 5003
    assert wide.arrays["ar/top"].shape == (1, bundles.SPREAD, bundles.TOP)
    assert bundles.column_count(4096) == 4096 and bundles.column_count(262_144) == bundles.COLUMNS


@pytest.mark.parametrize("name", NAMES)
def test_the_verified_block_has_right_and_wrong_drafts(name):
    recorded = bundles.read(BUNDLES / name)
    block, best = recorded.arrays["verify/block"], recorded.arrays["verify/best"][0]
    (accepted,) = recorded.arrays["verify/accepted"]
    assert 1 < accepted < len(block) - 1
    assert (block[1 : 1 + accepted] == best[:accepted]).all() and block[1 + accepted] != best[accepted]
    assert block[0] == recorded.arrays["sequences"][0, -1]


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_recorded_beside_the_floor(name):
    recorded = bundles.read(BUNDLES / name)
    noise = {quantity: recorded.noise(quantity) for quantity in recorded.facts["floors"]}
    assert all(error is not None for error in noise.values())
    assert max(error.max for error in noise.values()) > 0


def test_in_bfloat16_decisions_are_reported_beside_the_references_own(report):
    report = report("nano_bfloat16")
    assert report.passed and not report.counts and "replayed in float32" in report.table()
    assert {entry.own for entry in report.agreements} > {None}, "some are judged, some cannot be"
    best = next(entry for entry in report.agreements if entry.name == "steps: best")
    assert 0 < best.own <= 1 and best.same <= best.total


@pytest.mark.parametrize(("name", "epsilon"), [("nano", 2**-23), ("nano_bfloat16", 2**-8)])
def test_the_floor_is_the_references_own_error_but_a_rounding_at_least(name, epsilon):
    recorded = bundles.read(BUNDLES / name)
    for name, facts in recorded.facts["floors"].items():
        floor, own = recorded.floor(name), recorded.own(name)
        typical = np.sqrt(np.mean(recorded.arrays[name] ** 2)) if epsilon > 2**-20 else facts["scale"]
        assert floor.rms == max(own.rms, epsilon * typical)
        assert floor.max == max(own.max, epsilon * facts["scale"])


def test_the_references_own_error_is_that_of_another_kernel_too():
    recorded = bundles.read(BUNDLES / "wide")
    floors = recorded.facts["floors"].values()
    assert all(facts["max"] >= facts["one_run"]["max"] for facts in floors)
    assert any(facts["max"] > facts["one_run"]["max"] for facts in floors)


def test_a_device_that_rounds_worse_has_a_ratio_of_its_own():
    measured = check(BUNDLES / "full").worst_ratio
    assert not check(BUNDLES / "full", max_ratio=0.9 * measured).passed
    looser = check(BUNDLES / "full", max_ratio=1.1 * measured)
    assert looser.passed and f"{1.1 * measured:g} are allowed" in looser.table()


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_shows_what_it_is_for(name):
    recorded = bundles.read(BUNDLES / name)
    ran = recorded.arrays["steps/ran"]
    accepted = recorded.arrays["steps/accepted"][ran]
    assert 0 < accepted.mean() < 1
    assert len(recorded.facts["canvases"]) >= 2
    if recorded.is_float32:
        for name, (same, total) in recorded.facts["agreement"].items():
            assert same == total, f"{name}: float32 and float64 decide alike, or all that follows differs"


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


def test_passes_after_verification_are_named_after_its_decisions(replay):
    damaged = replay("full")
    damaged.bundle.arrays["after/norm"] += 1e-3
    damaged.bundle.arrays["verify/accepted"] = np.array([2])
    report = damaged.judge()
    assert report.first_failure == "verify: accepted"
    damaged.bundle.arrays["verify/accepted"] = np.array([3])
    assert damaged.judge().first_failure == "after/norm"


def test_a_run_that_goes_on_behind_the_recorded_draws_fails_and_does_not_raise(replay):
    planted = replay("short")
    planted.bundle.facts["sampling"]["confidence_threshold"] = 1e-9  # never sure enough to stop
    report = planted.judge()
    assert not report.passed


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


def test_bfloat16_decisions_may_differ_as_the_references_own_do():
    assert Agreement("x", same=94, total=100, own=0.99).passed
    assert not Agreement("x", same=93, total=100, own=0.99).passed
    assert Agreement("x", same=0, total=100).passed, "nothing to judge by"


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


@pytest.mark.parametrize("name", ["canvases", "agreement", "floors"])
def test_missing_facts_are_named(copy, name):
    path = copy / "bundle.json"
    facts = json.loads(path.read_text())
    facts.pop(name)
    path.write_text(json.dumps(facts))
    with pytest.raises(InputError, match="record the bundle again"):
        check(copy)


@pytest.mark.parametrize(
    "name",
    ["ar/layer.0", "verify/block", "steps/token", "steps/gap", "steps/slack", "ar/top_ids", "denoise.0.0/router.0"],
)
def test_missing_tensors_are_named(copy, name):
    facts = json.loads((copy / "bundle.json").read_text())
    arrays = bundles.load_file(copy / "bundle.safetensors")
    arrays.pop(name)
    bundles.write(copy, facts, arrays)  # and its hash
    with pytest.raises(InputError, match=f"no tensor '{name}'"):
        check(copy)


def test_facts_that_were_changed_are_refused(copy):
    """Errors of the reference that are larger than they were would let anything pass."""
    path = copy / "bundle.json"
    facts = json.loads(path.read_text())
    for floor in facts["floors"].values():
        floor["max"] = floor["rms"] = 1e9
    path.write_text(json.dumps(facts))
    with pytest.raises(InputError, match=r"bundle.json: is not what was recorded"):
        check(copy)


def test_facts_that_do_not_fit_are_named(copy):
    facts = json.loads((copy / "bundle.json").read_text())
    arrays = bundles.load_file(copy / "bundle.safetensors")
    wrong = {"floors": {}}, {"sampling": facts["sampling"] | {"heat": 1}}
    for changed, said in zip(wrong, ("has no error of", "sampling: .*heat"), strict=True):
        bundles.write(copy, facts | changed, arrays)
        with pytest.raises(InputError, match=said):
            check(copy)
    bundles.write(copy, facts, arrays | {"ar/norm": arrays["ar/norm"][:, :-1]})
    with pytest.raises(InputError, match=r"ar/norm is .* here it is"):
        check(copy)


def test_other_weights_are_refused(tmp_path):
    other = shutil.copytree(BUNDLES / "full" / "model", tmp_path / "other")
    path = other / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\x01\x3c")  # the last weight, in bfloat16
    with pytest.raises(InputError, match="other weights"):
        check(BUNDLES / "full", str(other))


def test_another_config_is_refused_by_the_first_size_that_differs():
    with pytest.raises(InputError, match=r"another config.*vocab_size: 97, not 109"):
        check(BUNDLES / "full", str(BUNDLES / "short" / "model"))


def test_an_older_schema_is_refused(copy):
    path = copy / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    with pytest.raises(InputError, match="schema 1, this version reads 2; record it again"):
        check(copy)


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
