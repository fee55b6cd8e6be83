"""Reports are pasted in public: folders of a user's do not show."""

import pytest

from mlx_dgemma.check import text
from mlx_dgemma.check.paths import scrubbed, shown_command, shown_drafter
from mlx_dgemma.check.report import Column, Report, Section


@pytest.fixture(autouse=True)
def ann(monkeypatch):
    monkeypatch.setenv("HOME", "/Users/Ann Lee")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("/Users/Ann Lee/models/x: damaged", "~/models/x: damaged"),
        ("/Users/Ann Lee", "~"),
        ("in '/opt/secret/bundles/full/bundle.json'", "in 'bundle.json'"),
        ("/opt/secret/a/: no folder", "a: no folder"),
        ("block:/tmp/secret/mine was turned off", "block:mine was turned off"),
        ("file:///opt/secret/a.json", "a.json"),
        ("--json=/opt/secret/a.json", "--json=a.json"),
        ("/Users/Ann Leeds/x", "/Users/Ann Leeds/x".replace("/Users/Ann", "Ann")),
    ],
)
def test_paths_lose_their_folders(said, shown):
    assert scrubbed(said) == shown


@pytest.mark.parametrize(
    "said", ["GB/s and GFLOP/s", "z-lab/x", "https://huggingface.co/z-lab/x", "denoise.0.1/layer.2", "1 / 2", "~/x"]
)
def test_what_is_no_path_stays(said):
    assert scrubbed(said) == said


def test_a_home_that_is_everything(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert scrubbed("a /b/c") == "a c"


def test_folders_of_drafters(tmp_path):
    (tmp_path / "mine").mkdir()
    assert shown_drafter(f"block:{tmp_path}/mine") == "block:mine"
    names = ["lookup", "block:z-lab/x", "canvas:64x2"]
    assert [shown_drafter(name) for name in names] == names


def test_a_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my models" / "x").mkdir(parents=True)
    typed = ["--model", f"{tmp_path}/my models/x", "--drafter", "block:my models/x", "--seconds", "20"]
    typed += ["--json=/opt/a b/r.json", "--markdown", "../r.md"]
    assert shown_command(typed) == ("--model x --drafter block:x --seconds 20 --json=r.json --markdown r.md")
    assert shown_command(["--model", "owner/name"]) == "--model owner/name"


def test_no_part_of_a_report_has_them():
    secret = "/opt/secret/place/x"
    columns = (Column("what", "what"),)
    section = Section("costs", "Costs", columns, [{"what": secret}], [secret], [secret], [secret])
    report = Report({"model": secret}, [section], 1.0)
    shown = [text.facts(report), text.table(section), text.markdown(report), str(report.as_dict()), report.verdict()]
    assert all("x" in part and "secret" not in part for part in shown)
