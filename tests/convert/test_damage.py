"""Whatever is done to a checkpoint: one line and no output, or an output that is whole."""

import errno
import os
import pickle
import random
import re
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

import mlx_dgemma
from mlx_dgemma.errors import InputError
from mlx_dgemma.loading import load_model
from tests.convert.damage import DAMAGE, FORMS, Trap, in_two, options_of
from tests.convert.fixtures import DATA, QUIET, SMALL, Commands, contents, hf_tensors, quick_disk, tensors_of, write

_quick_disk = pytest.fixture(autouse=True)(quick_disk)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """Small checkpoints in each form, in two shards, and how they are converted."""
    base = tmp_path_factory.mktemp("pristine")
    (base / "converted").mkdir()
    options = {form: {"dequantize": True} for form in FORMS} | {"float": {"dtype": "float16"}}
    write(base / "float", SMALL, hf_tensors(SMALL))
    rules = base / "rules.json"
    rules.write_text('[{"pattern": "*.router.*", "bits": false}, {"pattern": "*", "mode": "nvfp4"}]')
    mlx_dgemma.convert(base / "float", base / "mlx", quant_recipe=str(rules), **QUIET)
    for form in ("fp8", "nvfp4"):
        shutil.copytree(DATA / form, base / form, ignore=shutil.ignore_patterns("expected*"))
    for form in FORMS:
        in_two(base / form)
        mlx_dgemma.convert(base / form, base / "converted" / form, **options[form], **QUIET)  # nothing is wrong yet
    return {form: (base / form, options[form]) for form in FORMS}


def test_there_are_enough_kinds_of_damage():
    """At least half of each kind are no harmless ones."""
    assert len(FORMS) * sum(count for _, count in DAMAGE.values()) / 2 >= 300


def damaged(kind: str, form: str, number: int, source: Path, tmp_path: Path) -> Path:
    """A folder with a damaged copy of a source in it."""
    place = tmp_path / f"{kind} {number}"
    shutil.copytree(source, place / "source")
    DAMAGE[kind][0](place / "source", random.Random(f"{kind} {form} {number}"))
    return place


@contextmanager
def limit(seconds: int):
    """What takes longer is a failure."""

    def late(*_):
        raise AssertionError(f"takes more than {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def state(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (at.st_mode, at.st_ino, at.st_size, at.st_mtime_ns) for name, at in found.items()}


def is_clear(message: str, kind: str, folder: Path) -> bool:
    """One line, not too long, that says where."""
    where = "groups of" if kind == "group asked for" else str(folder)
    return len(message.splitlines()) == 1 and where in message and len(message) <= 1000 + len(str(folder))


def others(place: Path) -> dict[str, tuple[int, ...]]:
    """All but what a conversion may write."""
    return {name: at for name, at in state(place).items() if name.split("/")[0] not in ("out", ".out.partial")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_line_or_harmless(kind, form, pristine, tmp_path):
    source, options = pristine[form]
    failures, wrong = 0, []
    for number in range(DAMAGE[kind][1]):
        place = damaged(kind, form, number, source, tmp_path)
        folder, out = place / "source", place / "out"
        before = state(place)
        try:
            with limit(10):
                mlx_dgemma.convert(folder, out, **options_of(kind, number, options), **QUIET)
        except InputError as error:
            failures += 1
            if not is_clear(str(error), kind, folder):
                wrong.append(f"{number}: says {str(error)[:300]!r}")
            if out.exists():
                wrong.append(f"{number}: left an output")
        except (Exception, AssertionError) as error:
            wrong.append(f"{number}: {type(error).__name__}: {str(error)[:200]}")
        else:
            try:
                tensors_of(out)
                if "export" not in options_of(kind, number, options):
                    load_model(out)
            except Exception as error:
                # what only a model that runs needs, such as room for its canvas, is passed on
                if kind not in ("config", "side file") or not isinstance(error, InputError):
                    wrong.append(f"{number}: wrote what cannot be loaded: {error}")
        if others(place) != before:
            wrong.append(f"{number}: touched {sorted(before.items() ^ others(place).items())}")
        shutil.rmtree(place)
    assert not wrong, "\n".join(wrong)
    assert failures >= DAMAGE[kind][1] / 2


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with Commands(tmp_path_factory.mktemp("said")) as commands:
        yield commands


def words_of(options: dict) -> list[object]:
    """Options as the command spells them."""
    words = {name: f"--{name.replace('_', '-')}" for name in options}
    return [
        word for name, value in options.items() for word in ([words[name]] if value is True else [words[name], value])
    ]


def lines_of(stderr: str) -> list[str]:
    """Without progress bars."""
    return [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and not line.startswith("Writing:")]


@pytest.mark.parametrize("form", FORMS)
def test_the_command_ends_in_one_line(form, commands, pristine, tmp_path):
    """Of each kind the first input that fails: a status, nothing on stdout, no traceback, no output."""
    source, options = pristine[form]
    failed, wrong = set(), []
    for kind in DAMAGE:
        for number in range(min(DAMAGE[kind][1], 4)):
            place = damaged(kind, form, number, source, tmp_path)
            folder, out, unfinished = (place / name for name in ("source", "out", ".out.partial"))
            before = state(place)
            argv = ["--hf-path", folder, "--mlx-path", out, *words_of(options_of(kind, number, options))]
            status, stdout, stderr = commands.run(*argv)
            said = lines_of(stderr)
            if status == 0:
                good = stdout == f"{out}\n" and "Traceback" not in stderr and out.is_dir() and not unfinished.exists()
            else:
                good = status in (1, 2) and (stdout, len(said)) == ("", 1) and is_clear(said[0], kind, folder)
                good = good and said[0].startswith("mlx_dgemma.convert: ") and not out.exists()
                good = good and (not unfinished.exists() or str(unfinished) in said[0])
                failed.add(kind)
            if not good or others(place) != before:
                wrong.append(f"{kind} {number}: {status} {stdout!r} {stderr[-500:]!r} {sorted(os.listdir(place))}")
            shutil.rmtree(place)
            if kind in failed:
                break
    assert not wrong, "\n".join(wrong)
    assert len(failed) >= 12


@pytest.mark.parametrize("what", ["shards", "side files"])
def test_a_full_disk_is_one_line_and_the_work_is_kept(what, commands, pristine, tmp_path):
    """No file may be larger than the half of what would be the largest: of the shards or of what lies beside them."""
    source = shutil.copytree(pristine["float"][0], tmp_path / "source")
    if what == "side files":
        (source / "tokenizer.model").write_bytes(bytes(1 << 20))
    argv = ["--hf-path", source, "--dtype", "float32", "--mlx-path"]
    whole, out, unfinished = tmp_path / "whole/out", tmp_path / "out", tmp_path / ".out.partial"
    whole.parent.mkdir()
    assert commands.run(*argv, whole)[0] == 0
    before = others(tmp_path)
    largest = max(path.stat().st_size for path in whole.iterdir()) // 2
    status, stdout, stderr = commands.run(*argv, out, largest=largest)
    assert (status, stdout) == (1, "")
    (said,) = lines_of(stderr)
    assert f"{out}: " in said and os.strerror(errno.EFBIG) in said and f"stays in {unfinished}" in said
    assert not out.exists() and others(tmp_path) == before
    with pytest.raises(InputError):
        load_model(unfinished)
    assert (unfinished / "model.safetensors").exists() == (what == "side files")
    assert commands.run(*argv, out)[:2] == (0, f"{out}\n")
    assert contents(out) == contents(whole)


def test_weights_that_are_pickles_are_never_loaded(tmp_path):
    folder = write(tmp_path / "source", SMALL, {})
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(InputError, match="pickles"):
        mlx_dgemma.convert(folder, tmp_path / "out", **QUIET)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(InputError, match="not a safetensors file"):
        mlx_dgemma.convert(folder, tmp_path / "out", **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
