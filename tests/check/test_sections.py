"""Each section on a tiny model: what its rows say, and what it leaves behind."""

import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import islice

import mlx.core as mx
import pytest

from mlx_dgemma.check import bundles, experts, flips, passes, peaks, plan, speed
from mlx_dgemma.check.budget import Budget
from mlx_dgemma.check.report import COMPLETE, FAILED
from mlx_dgemma.check.subject import quantisation
from mlx_dgemma.decoding import causal
from mlx_dgemma.decoding.costs import CostTable
from mlx_dgemma.decoding.width import Widths
from mlx_dgemma.drafter.protocol import Draft
from mlx_dgemma.layers import SORT_FROM
from mlx_dgemma.parity import bundle, check

SHIPPED = bundle.SHIPPED


def filled(subject, name, seconds=60.0):
    (section,) = plan.sections([name])
    plan.fill(subject, [section], Budget(seconds), lambda section: None)
    return section


@pytest.fixture
def one_bundle(tmp_path, monkeypatch):
    """A folder of bundles with one in it."""
    shutil.copytree(bundle.SHIPPED / "full", tmp_path / "full")
    monkeypatch.setattr(bundle, "SHIPPED", tmp_path)
    return tmp_path / "full"


def test_parity(subject, one_bundle):
    subject.devices = ("cpu", "cpu")
    section = filled(subject, "parity")
    assert [(row["bundle"], row["device"], row["passed"]) for row in section.rows] == 2 * [("full", "cpu", True)]
    assert all(0 < row["ratio"] < check.MAX_RATIO for row in section.rows)
    assert section.state == COMPLETE and not section.faults


def test_every_shipped_bundle_is_replayed_short_ones_first():
    names = [folder.name for folder in bundles.shipped()]
    assert set(names) == {path.parent.name for path in bundle.SHIPPED.glob("*/bundle.json")}
    assert names.index("short") < names.index("long")


def test_a_bundle_that_fails_is_a_fault(subject, one_bundle, monkeypatch):
    monkeypatch.setattr(check, "MAX_RATIO", 0.0)
    section = filled(subject, "parity")
    assert not section.rows[0]["passed"] and section.rows[0]["first"]
    assert "bundle full on cpu" in section.faults[0]


def test_a_damaged_bundle_is_a_fault_and_the_others_are_replayed(subject, one_bundle):
    shutil.copytree(one_bundle, one_bundle.parent / "other")
    data = one_bundle / "bundle.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")
    section = filled(subject, "parity")
    assert {row["bundle"]: row["passed"] for row in section.rows} == {"full": False, "other": True}
    assert "sha256" in section.faults[0] and len(section.faults) == 1


def test_a_dtype_that_this_device_has_not_is_told_of(subject, one_bundle):
    shutil.copytree(SHIPPED / "nano_bfloat16", one_bundle.parent / "nano_bfloat16")
    section = filled(subject, "parity")
    assert section.notes[1:] == ["nano_bfloat16: recorded in bfloat16, replayed in float32 on a CPU."]
    assert "in the same dtype" in section.notes[0]


def test_flips(subject):
    section = filled(subject, "flips")
    assert [(row["temperature"], row["drafts"]) for row in section.rows] == [
        (temperature, width) for temperature in flips.TEMPERATURES for width in flips.WIDTHS
    ]
    assert all(row["flips"] == 0 and row["verdict"] == "same" for row in section.rows)  # rows of a CPU's matmul
    assert section.state == COMPLETE


def test_flips_beyond_rounding_are_faults(subject, monkeypatch):
    monkeypatch.setattr(causal, "agreement", lambda draft, samples: len(draft))
    right, wrong = flips.widths.Oracle.propose, lambda self, context, width: Draft([7] * width)
    monkeypatch.setattr(flips.widths.Oracle, "propose", wrong)
    assert right is not wrong
    section = filled(subject, "flips")
    assert any(row["verdict"] == "FAULT" and row["rate"] > 0 for row in section.rows)
    assert section.faults


def test_costs(subject):
    section = filled(subject, "costs")
    timed = {(row["pass"], row["positions"]) for row in section.rows}
    assert {("verify", n) for n in (*passes.NARROW, *passes.WIDE)} <= timed
    assert {("AR step", 1), ("canvas step", 12), ("lookup draft", 16), ("canvas draft", 16)} <= timed
    assert all(row["ms"] > 0 and row["samples"] >= 1 for row in section.rows)
    assert next(row["steps"] for row in section.rows if row["pass"] == "AR step") == 1.0
    assert section.state == COMPLETE
    assert subject.peaks["passes behind a prefix"] > subject.model.memory.weights


def test_costs_teach_the_width_policy(subject):
    filled(subject, "costs")
    table = CostTable.of(subject.model)
    known = table.at(100, "Lookup")
    assert known.is_measured and known.plain is not None
    assert set(passes.NARROW + passes.WIDE) <= known.verified.keys() and 16 in known.drafted
    stored = CostTable(table._path)
    assert stored.at(100, "Lookup").verified == known.verified, "kept, and read back"
    assert not any("/canvas/" in key for key in stored._samples), "nothing reads them"
    widths = Widths(table)
    widths.drafter = "Lookup"
    assert widths._costs(100) is known


def test_speed(subject):
    section = filled(subject, "speed")
    assert [(row["mode"], row["drafter"], row["width"]) for row in section.rows] == [
        ("ar", "-", None),
        ("diffusion", "-", None),
        ("ar", "lookup", "by cost"),
        ("ar", "canvas", "by cost"),
        ("ar", "lookup", "8"),
        ("ar", "canvas", "8"),
    ]
    assert all(row["prompts"] == len(subject.prompts) and row["rate"] > 0 for row in section.rows)
    assert [row["same"] for row in section.rows[2:]] == 4 * ["yes"]
    assert section.rows[1]["steps"] >= 1 and section.rows[-1]["accepted"] is not None
    assert section.state == COMPLETE and not section.faults
    assert {"ar answers", "diffusion answers", "ar answers, canvas"} <= subject.peaks.keys()


class Liar:
    """Drafts that are wrong, every time."""

    taps = ()

    def reset(self):
        pass

    def propose(self, context, width):
        return Draft([(context.tokens[-1] + 1) % 700 + 10] * width)


def test_a_drafter_that_changes_tokens_is_a_fault(subject, monkeypatch):
    subject.drafters = {"liar": Liar()}
    assert not filled(subject, "speed").faults, "wrong drafts are not accepted"
    monkeypatch.setattr(causal, "agreement", lambda draft, samples: len(draft))
    section = filled(subject, "speed")
    assert section.faults and all("liar" in fault and "in logits" in fault for fault in section.faults)
    assert any(str(row["same"]).startswith("NO") for row in section.rows)


def test_a_near_tie_is_none(subject, monkeypatch):
    subject.drafters = {"liar": Liar()}
    monkeypatch.setattr(causal, "agreement", lambda draft, samples: len(draft))
    monkeypatch.setattr(speed, "NOISE", {mx.float32: math.inf})
    section = filled(subject, "speed")
    assert not section.faults and any("ties" in str(row["same"]) for row in section.rows)


@pytest.mark.parametrize("name", ["costs", "speed"])
def test_a_drafter_that_fails_is_a_fault(subject, name):
    class Broken(Liar):
        name = "block:/opt/secret/mine/None"

        def propose(self, context, width):
            raise RuntimeError("no memory left")

    subject.drafters = {"block:mine": Broken()}
    section = filled(subject, name)
    assert section.faults == ["block:mine was turned off: propose raised RuntimeError: no memory left"]
    assert section.state == COMPLETE and not section.missing
    blank = {"costs": ("ms", "steps", "samples"), "speed": ("rate", "gain", "per_pass", "accepted", "same")}[name]
    (row,) = (row for row in section.rows if "block:mine" in f"{row.get('pass')} {row.get('drafter')}")
    assert all(row[key] is None for key in blank)


def answer(tokens, is_whole):
    return speed.Answer(tokens, 1.0, 1, None, 0, is_whole)


@pytest.mark.parametrize(
    ("plain", "drafted", "same"),
    [
        (answer([5, 6, 7], True), answer([5, 6, 7], True), True),
        (answer([5, 6, 7], True), answer([5, 6], True), False),
        (answer([5, 6], True), answer([5, 6, 7], True), False),
        (answer([5, 6, 7], True), answer([5, 6], False), True),
        (answer([5, 6], True), answer([5, 6, 7], False), False),
        (answer([5, 6], False), answer([5, 6, 7], True), True),
        (answer([5, 6, 7], False), answer([5, 6], True), False),
        (answer([5, 6], False), answer([5, 6, 7], False), True),
    ],
)
def test_only_what_was_cut_may_be_shorter(subject, plain, drafted, same):
    said = speed._difference(subject, "edit", plain, drafted)
    assert said == (
        speed.SAME if same else f"the length of edit: {len(drafted.tokens)} tokens, not {len(plain.tokens)}"
    )


@pytest.mark.parametrize("length", [0, 5])
def test_a_drafter_that_truncates_answers_is_a_fault(subject, monkeypatch, length):
    """Also where the loop does not say why the answer has ended."""
    real = speed._events

    def truncated(subject, way, *args):
        yield from islice(real(subject, way, *args), length if way.name == "lookup" else None)

    monkeypatch.setattr(speed, "_events", truncated)
    section = filled(subject, "speed")
    assert section.faults and all("lookup" in fault and "the length of" in fault for fault in section.faults)


def test_experts(subject):
    section = filled(subject, "experts")
    assert [row["positions"] for row in section.rows] == list(experts.SIZES)
    assert all(min(row["unsorted"], row["sorted"], row["bandwidth"], row["flops"]) > 0 for row in section.rows)
    assert [row["used"] for row in section.rows] == [
        "sorted" if row["pairs"] >= SORT_FROM else "unsorted" for row in section.rows
    ]
    assert section.rows[0]["touched"] == subject.model.config.top_k_experts
    assert section.rows[-1]["touched"] == subject.model.config.num_experts


def test_experts_give_the_same_with_and_without_sorting(subject):
    stack, route = subject.model.layers[0].experts, experts.Route(subject, 5, 0)
    one, other = (stack(route.rows, route.shares, route.ids, way) for way in (False, True))
    assert mx.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_memory(subject):
    subject.peaks["ar answers"] = 3_000_000
    section = filled(subject, "memory")
    said = {row["what"]: row["gb"] for row in section.rows}
    assert said["weights"] == subject.model.memory.weights / 1e9 and said["peak: ar answers"] == 0.003
    assert said[f"{peaks.ESTIMATE}, at 1024 tokens"] == subject.model.memory.total / 1e9


def test_a_section_that_raises_has_failed_and_the_next_is_run(subject, monkeypatch):
    def broken(*args):
        raise RuntimeError("[metal] no such kernel")

    monkeypatch.setattr(experts, "measure", broken)
    todo = plan.sections(["experts", "memory"])
    plan.fill(subject, todo, Budget(10.0), lambda section: None)
    assert [section.state for section in todo] == [FAILED, COMPLETE]
    assert todo[0].faults == ["RuntimeError: [metal] no such kernel"]


def test_quantisation_in_words(subject):
    settings = {"bits": 4, "group_size": 64, "a.b": {"bits": 8}, "c": False}
    says = partial(replace, subject.model.config)
    assert quantisation(says(quantization=None)) == "not quantised"
    assert quantisation(says(quantization=settings)) == "4-bit, groups of 64, affine; 2 modules set apart"
