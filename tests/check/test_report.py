"""Reports as text and as JSON, whatever is in them."""

import json

from mlx_dgemma.check import text
from mlx_dgemma.check.budget import Budget
from mlx_dgemma.check.report import COMPLETE, CUT, INTERRUPTED, Column, Report, Section

COLUMNS = (Column("what", "what"), Column("ms", "ms", ".2f"), Column("same", "same"))


def filled(state=COMPLETE, **given) -> Report:
    section = Section("costs", "Costs", COLUMNS, state=state, seconds=2.0, **given)
    section.add("a|b", 1.234, True)
    section.add("<c>", float("nan"), None)
    return Report({"chip": "M9"}, [section, Section("speed", "Speed", COLUMNS)], 10.0)


def test_json_has_no_nan_and_every_number_as_it_was():
    report = json.loads(json.dumps(filled().as_dict(), allow_nan=False))
    assert report["sections"][0]["rows"][0] == {"what": "a|b", "ms": 1.234, "same": True}
    assert report["sections"][0]["rows"][1]["ms"] is None
    assert (report["state"], report["passed"]) == ("partial", None)


def test_a_table_in_a_terminal():
    lines = text.table(filled().sections[0]).splitlines()
    assert lines == ["Costs", "-----", "what    ms  same", "a|b   1.23  yes", "<c>      -  -"]


def test_columns_that_stayed_empty_are_left_out():
    section = Section("costs", "Costs", COLUMNS, state=COMPLETE)
    section.add("a", None, True)
    assert text.table(section).splitlines()[2:] == ["what  same", "a     yes"]
    assert section.as_dict()["rows"] == [{"what": "a", "ms": None, "same": True}]


def test_markdown_escapes_what_would_break_a_table():
    written = text.markdown(filled(notes=["a < b"]))
    assert "| a\\|b | 1.23 | yes |" in written and "| &lt;c> | - | - |" in written
    assert "| :-- | --: | :-- |" in written and "- chip: M9" in written and "- a &lt; b" in written


def test_what_is_not_whole_says_so():
    cut = filled(CUT, missing=["16 positions", "32 positions"])
    assert cut.sections[0].heading() == "Costs (cut short at its time budget)"
    assert "No time for: 16 positions, 32 positions." in text.table(cut.sections[0])
    many = filled(CUT, missing=[f"{n} positions" for n in range(9)])
    assert "4 positions, 5 positions, and 3 more." in text.markdown(many)
    assert len(many.as_dict()["sections"][0]["missing"]) == 9
    assert cut.verdict() == "PARTIAL REPORT (costs cut short, speed not run); nothing wrong (2 s)"
    stopped = filled(INTERRUPTED)
    assert stopped.sections[0].heading() == "Costs (interrupted)" and stopped.sections[1].heading() == "Speed (not run)"
    stopped.was_interrupted = True
    assert stopped.as_dict()["state"] == "interrupted"
    assert "PARTIAL REPORT" in text.markdown(stopped)


def test_faults_stand_in_the_verdict_and_beside_their_section():
    report = filled(faults=["bundle x parts"])
    assert "FAILED: costs: bundle x parts" in report.verdict()
    assert "WRONG: bundle x parts" in text.table(report.sections[0])
    assert not report.as_dict()["passed"]


def test_passed_needs_a_comparison_with_the_reference():
    section = Section("parity", "Parity", COLUMNS, state=COMPLETE)
    report = Report({}, [section], 1.0)
    assert report.passed is None and "nothing measured" in report.verdict()
    section.add("full", 1.0, True)
    assert report.passed is True and "nothing wrong" in report.verdict()
    section.faults.append("x")
    assert report.passed is False and "FAILED" in report.verdict()


def test_a_budget_and_its_parts(clock):
    budget = Budget(10.0, clock)
    part = budget.part(0.5)
    clock.now = 4.0
    assert (budget.left, part.left) == (6.0, 1.0)
    assert part.has(0.5) and not part.has(1.0)
    clock.now = 20.0
    assert not budget.has() and budget.part(1.0).left == 0.0
