"""A slow model gets a shorter report in the same time, which says what it left out."""

import json
import time

import pytest

from mlx_dgemma.check import bundles, flips, plan
from mlx_dgemma.check.budget import Budget
from mlx_dgemma.check.report import COMPLETE, CUT
from mlx_dgemma.decoding import causal
from mlx_dgemma.decoding.costs import KEPT
from mlx_dgemma.drafter.protocol import Draft

SLOW = ("flips", "costs", "speed", "experts", "memory")


@pytest.mark.parametrize("pace", [0.5, 3.0, 40.0])
def test_the_whole_stays_near_its_budget(subject, clock, every_pass, pace):
    def tick():
        clock.now += pace

    every_pass(tick)
    todo = plan.sections(SLOW)
    plan.fill(subject, todo, Budget(60.0, clock), lambda section: None)
    assert clock.now <= 60 + 4 * pace, "a few passes beyond it at most"
    assert not [fault for section in todo for fault in section.faults]
    by_name = {section.name: section for section in todo}
    assert by_name["memory"].state == COMPLETE
    assert by_name["speed"].state == CUT and by_name["speed"].missing
    if pace >= 3:
        assert by_name["costs"].state == by_name["flips"].state == CUT
        assert "temperature 0" in by_name["flips"].missing


def test_what_there_was_time_for_is_kept(subject, clock, every_pass):
    def tick():
        clock.now += 0.5

    every_pass(tick)
    (section,) = plan.sections(["speed"])
    plan.fill(subject, [section], Budget(60.0, clock), lambda section: None)
    assert not section.faults
    plain = section.rows[0]
    assert section.state == CUT and 0 < plain["tokens"] and plain["rate"] == pytest.approx(2.0, rel=0.3)
    assert all(row["same"] in (None, "yes") for row in section.rows), "what was cut is compared as far as it goes"


def test_a_fault_that_was_seen_before_the_cut_is_one(subject, clock, every_pass, monkeypatch):
    """Wrong drafts are all accepted; time is over in the middle of the first width."""
    monkeypatch.setattr(causal, "agreement", lambda draft, samples: len(draft))
    wrong = lambda self, context, width: Draft([7] * width)  # noqa: E731
    monkeypatch.setattr(flips.widths.Oracle, "propose", wrong)
    monkeypatch.setattr(flips, "_affordable", lambda subject, budget: flips.LONGEST)

    def tick():
        clock.now += 1.0

    every_pass(tick)
    (section,) = plan.sections(["flips"])
    plan.fill(subject, [section], Budget(60.0, clock), lambda section: None)
    assert section.state == CUT and section.faults
    assert section.rows[0]["verdict"] == "FAULT" and section.rows[0]["tokens"] < flips.LONGEST
    assert section.missing[0] == "1 drafts a pass at temperature 0"


def test_a_canvas_step_is_one_pass(subject, clock, every_pass, monkeypatch):
    """Also where canvases have two steps each, the first of which does not count."""

    def tick():
        clock.now += 1.0

    every_pass(tick)
    for most in (2, 4):
        config = subject.model.generation_config.replace(max_denoising_steps=most)
        monkeypatch.setattr(subject.model, "generation_config", config)
        (section,) = plan.sections(["costs"])
        plan.fill(subject, [section], Budget(1000.0, clock), lambda section: None)
        (row,) = (row for row in section.rows if row["pass"] == "canvas step")
        assert (row["ms"], row["samples"]) == (1000.0, KEPT)


def test_slow_bundles(subject, clock, monkeypatch):
    def slow(*args):
        clock.now += 8.0
        return real(*args)

    folders = dict.fromkeys(list(bundles.shipped())[:3], 1)
    real = bundles.check.check
    monkeypatch.setattr(bundles, "shipped", lambda: folders)
    monkeypatch.setattr(bundles.check, "check", slow)
    (section,) = plan.sections(["parity"])
    plan.fill(subject, [section], Budget(20.0, clock), lambda section: None)
    assert len(section.rows) == 2 and section.state == CUT and clock.now <= 28
    assert section.missing == [f"{list(folders)[2].name} on cpu"]


def test_a_bundle_that_would_take_too_long_is_not_begun(subject, clock, monkeypatch):
    """By what shorter ones took."""
    a, b = list(bundles.shipped())[:2]
    monkeypatch.setattr(bundles, "shipped", lambda: {a: 10, b: 1000})
    real = bundles.check.check

    def slow(*args):
        clock.now += 0.1
        return real(*args)

    monkeypatch.setattr(bundles.check, "check", slow)
    (section,) = plan.sections(["parity"])
    plan.fill(subject, [section], Budget(1.0, clock), lambda section: None)
    assert (len(section.rows), section.missing) == (1, [f"{b.name} on cpu"])


def test_by_the_clock_on_the_wall(run, every_pass, tmp_path):
    every_pass(lambda: time.sleep(0.15))
    started = time.monotonic()
    status, out, _ = run("--seconds", "3", "--only", *SLOW, "--json", tmp_path / "r.json")
    assert time.monotonic() - started < 9  # loading too
    assert status == 0 and "PARTIAL REPORT" in out and "cut short at its time budget" in out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["state"] == "partial"
    assert any(section["missing"] for section in report["sections"])
