"""`mlx_dgemma.parity`: exit statuses, one-line errors, and what must not be imported."""

import subprocess
import sys

import pytest

from mlx_dgemma.parity.bundle import SHIPPED as BUNDLES
from mlx_dgemma.parity.command import main


def status(*args):
    try:
        main([str(arg) for arg in args])
    except SystemExit as end:
        return end.code or 0
    return 0


def test_check_prints_a_table_and_succeeds(capsys):
    assert status("check", BUNDLES / "full", "--device", "cpu") == 0
    assert "passed" in capsys.readouterr().out


def test_check_takes_several_bundles(capsys):
    assert status("check", BUNDLES / "full", BUNDLES / "short") == 0
    assert capsys.readouterr().out.count("passed") == 2


def test_check_fails_with_status_1(capsys, monkeypatch):
    monkeypatch.setattr("mlx_dgemma.parity.check.MAX_RATIO", 0.0)
    assert status("check", BUNDLES / "full") == 1
    assert "encode.0/layer.0" in capsys.readouterr().err


def test_check_with_a_ratio_of_its_own(capsys):
    assert status("check", BUNDLES / "full", "--max-ratio", "0.01") == 1
    assert status("check", BUNDLES / "full", "--max-ratio", "16") == 0
    assert "16 are allowed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["check", "nowhere"], "no such folder"),
        (["check", "nowhere", "--max-ratio", "nan"], "--max-ratio must be a number above 0"),
        (["record", "--model", "tiny:round", "--out", "x"], "no such shape"),
        (["record", "--model", "tiny:full", "--prompt", "hello", "--out", "x"], "--prompt"),
        (["record", "--model", "tiny:full", "--dtype", "float64", "--device", "cuda", "--out", "x"], "host's work"),
        (["record", "--model", "tiny:full", "--dtype", "float16", "--out", "x"], "float16"),
    ],
)
def test_mistakes_are_one_line(capsys, args, says):
    assert status(*args) in (1, 2)
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_check_needs_no_torch():
    code = f"""
import sys
sys.modules["torch"] = None  # importing it raises ImportError
from mlx_dgemma.parity.command import main
main(["check", {str(BUNDLES / "full")!r}])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_record_without_torch_says_what_to_install():
    code = f"""
import sys
sys.modules["torch"] = None
from mlx_dgemma.parity.command import main
main(["record", "--model", "tiny:full", "--out", {str(BUNDLES / "new")!r}])
"""
    done = python(code)
    assert done.returncode == 1
    assert "mlx-dgemma[reference]" in done.stderr and done.stderr.count("\n") == 1


def test_record_with_a_transformers_that_does_not_know_the_model_says_so():
    code = f"""
import sys
sys.modules["transformers.models.diffusion_gemma"] = None
from mlx_dgemma.parity.command import main
main(["record", "--model", "tiny:full", "--out", {str(BUNDLES / "new")!r}])
"""
    done = python(code)
    assert done.returncode == 1
    assert "transformers >= 5.17" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("args", [["--help"], ["record", "--help"], ["check", "--help"]])
def test_help_loads_neither_mlx_nor_torch(args):
    code = f"""
import sys
from mlx_dgemma.parity.command import main
try:
    main({args!r})
finally:
    assert not {{"mlx", "mlx.core", "torch", "transformers", "numpy"}} & sys.modules.keys()
"""
    done = python(code)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr
