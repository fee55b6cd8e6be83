"""The engine: a folder is whole or not there, whatever happens to the process or the disk."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mlx_dgemma.checkpoint import INDEX, Checkpoint
from mlx_dgemma.convert import engine, shards
from mlx_dgemma.convert.engine import SLACK, Job, verify
from mlx_dgemma.convert.journal import JOURNAL, fingerprint
from mlx_dgemma.convert.shards import Output, Reader
from mlx_dgemma.errors import InputError, UsageError
from tests.convert.fixtures import contents
from tests.convert.jobs import (
    CHUNKS,
    FACTS,
    FILES,
    MODULES,
    Stopped,
    content,
    convert,
    is_loadable,
    module,
    partial,
    stopping,
)


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    return contents(convert(tmp_path / "whole"))


# --- what is written


def test_a_folder_is_written_whole(tmp_path):
    out = convert(tmp_path / "out", total_parameters=77)
    assert set(contents(out)) == {
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX, JOURNAL, "config.json", "tokenizer.json"
    }  # fmt: skip
    assert not partial(out).exists()
    reader = Reader(Checkpoint(out).tensors)
    for index in range(MODULES):
        for output in module(index).outputs:
            assert reader.view(output.name).tobytes() == content(output)
    written = json.loads((out / INDEX).read_text())
    total = sum(output.nbytes for index in range(MODULES) for output in module(index).outputs)
    assert written["metadata"] == {"total_size": total, "total_parameters": 77}
    assert list(written["weight_map"]) == sorted(reader.tensors)
    assert (out / "config.json").read_bytes() == FILES["config.json"]
    verify(out, progress=False)


def test_one_shard_has_no_number_and_an_index_all_the_same(tmp_path):
    out = convert(tmp_path / "out", shard_size=1 << 20, files={})
    assert set(contents(out)) == {"model.safetensors", INDEX, JOURNAL}


def test_side_files_are_copied_also_through_links(tmp_path):
    (tmp_path / "blob").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "blob")
    out = convert(tmp_path / "out", files={"README.md": tmp_path / "link"})
    assert (out / "README.md").read_text() == "text"
    assert not (out / "README.md").is_symlink()


@pytest.mark.parametrize("name", ["../config.json", "a/b", INDEX, JOURNAL, "model.safetensors", ".."])
def test_side_files_stay_in_the_folder_and_spare_what_is_ours(tmp_path, name):
    with pytest.raises(ValueError, match="not a name for a side file"):
        convert(tmp_path / "out", files={name: b""})


@pytest.mark.parametrize("size", [-1, 1])
def test_a_job_that_writes_too_little_or_too_much_is_a_bug_that_is_told(tmp_path, size):
    output = Output("x", "U8", (10,))
    job = Job((output,), lambda: iter([(0, bytes(10 + size))]))
    with pytest.raises(ValueError, match=r"x: 1 bytes (are missing|too many)"):
        convert(tmp_path / "out", jobs=[job])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("tasks", "ahead", "most"), [(4, 1 << 20, 4), (1000, 5000, 5)])
def test_no_memory_of_chunks_but_the_waiting_ones(tmp_path, monkeypatch, tasks, ahead, most):
    """A producer that is faster than the disk is held back, by the number of chunks and by their bytes."""
    monkeypatch.setattr(engine, "TASKS", tasks)
    monkeypatch.setattr(engine, "AHEAD", ahead)
    alive = Counter()

    class Chunk(bytearray):
        def __init__(self, size):
            super().__init__(size)
            alive["now"] += 1
            alive["most"] = max(alive["most"], alive["now"])

        def __del__(self):
            alive["now"] -= 1

    output = Output("x", "U8", (100, 1000))
    convert(tmp_path / "out", jobs=[Job((output,), lambda: ((0, Chunk(1000)) for _ in range(100)))])
    assert alive["most"] <= most + 2  # one being written, one being made


# --- what is refused


def test_an_existing_output_is_refused(tmp_path):
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")):
        out = tmp_path / make.__name__
        make(out)
        with pytest.raises(UsageError, match="exists already"):
            convert(out)
        assert not partial(out).exists()


def test_a_missing_parent_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a folder; create it first"):
        convert(tmp_path / "absent" / "out")
    assert not (tmp_path / "absent").exists()


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    partial(tmp_path / "out").mkdir()
    (partial(tmp_path / "out") / "thesis.tex").touch()
    with pytest.raises(UsageError, match="is not an unfinished conversion"):
        convert(tmp_path / "out")
    assert (partial(tmp_path / "out") / "thesis.tex").exists()


def test_two_processes_do_not_write_one_folder(tmp_path):
    partial(tmp_path / "out").mkdir()
    code = (
        "import sys; from pathlib import Path; from mlx_dgemma.convert.journal import Journal; "
        "held = Journal(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    arguments = [sys.executable, "-c", code, partial(tmp_path / "out") / JOURNAL]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="another process is writing it"):
            convert(tmp_path / "out")
        other.kill()
    convert(tmp_path / "out")  # a lock ends with its process


def test_a_process_that_comes_just_after_the_other_has_finished(tmp_path, monkeypatch):
    real = fcntl.flock

    def other_finishes_first(file, how):
        monkeypatch.setattr(fcntl, "flock", real)
        (tmp_path / "out").mkdir()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", other_finishes_first)
    with pytest.raises(UsageError, match="exists already"):
        convert(tmp_path / "out")


# --- disks


def free(monkeypatch, count: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=count))


def test_the_disk_is_looked_at_first(tmp_path, monkeypatch):
    free(monkeypatch, 500)
    with pytest.raises(InputError, match=r"needs 1,0\d\d,\d\d\d bytes, 500 are free; make room$"):
        convert(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_already_needs_no_room(tmp_path, monkeypatch, whole):
    with pytest.raises(Stopped):
        convert(tmp_path / "out", jobs=stopping(MODULES - 1, 0))
    last = sum(output.nbytes for output in module(0).outputs)
    headers = sum(len(data) for name, data in whole.items() if "model-" in name) - MODULES * last
    need = SLACK + last + headers + sum(len(data) for data in FILES.values())
    free(monkeypatch, need - 1)
    with pytest.raises(InputError, match=f"needs {need:,} bytes, {need - 1:,} are free; .* goes on from there"):
        convert(tmp_path / "out")
    free(monkeypatch, need)
    assert contents(convert(tmp_path / "out")) == whole


@pytest.mark.parametrize("call", [0, 1, 4, 20, 30, 55])
def test_a_full_disk_is_one_line_and_the_work_is_kept(tmp_path, monkeypatch, whole, call):
    calls, real = Counter(), shards.write_all

    def write_all(file, data):
        calls["all"] += 1
        if calls["all"] > call:
            file.write(memoryview(data)[: len(data) // 2])  # as a disk that gets full does
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, data)

    for module_ in ("shards", "journal"):
        monkeypatch.setattr(sys.modules[f"mlx_dgemma.convert.{module_}"], "write_all", write_all)
    with pytest.raises(InputError, match=r"out: No space left on device; what is done stays in .*partial") as caught:
        convert(tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not is_loadable(partial(tmp_path / "out"))
    monkeypatch.undo()
    assert contents(convert(tmp_path / "out")) == whole


def test_a_disk_that_fails_once_does_not_leave_a_gap(tmp_path, monkeypatch, whole):
    """The next chunk is on its way when a write fails; its job must not count as finished."""
    calls, real = Counter(), shards.write_all

    def write_all(file, data):
        calls["all"] += 1
        if calls["all"] == 10:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(file, data)

    monkeypatch.setattr(shards, "write_all", write_all)
    with pytest.raises(InputError, match="Input/output error"):
        convert(tmp_path / "out")
    assert contents(convert(tmp_path / "out")) == whole


def test_an_interrupt_says_that_the_work_is_kept(tmp_path, capsys, whole):
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", jobs=stopping(2, 3, KeyboardInterrupt()))
    assert capsys.readouterr().err.endswith("the same command goes on from there\n")
    assert contents(convert(tmp_path / "out")) == whole


# --- going on


def test_finished_jobs_are_skipped_and_a_half_written_one_is_done_again(tmp_path, whole):
    with pytest.raises(Stopped):
        convert(tmp_path / "out", jobs=stopping(2, 5))
    chunked = Counter()
    assert contents(convert(tmp_path / "out", chunked)) == whole
    assert chunked == {f"layers.{index}": 3 * CHUNKS for index in range(2, MODULES)}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"fingerprint": {**FACTS, "options": {"bits": 8}}}, "options"),
        ({"fingerprint": {**FACTS, "sources": []}}, "sources"),
        ({"fingerprint": {**FACTS, "more": 1}}, "more"),
        ({"shard_size": 200}, "plan"),
        ({"metadata": {"format": "pt"}}, "plan"),
        ({"jobs": [module(index) for index in range(2, 9)]}, "plan"),
    ],
)
def test_another_command_starts_anew_and_says_why(tmp_path, capsys, changed, named):
    with pytest.raises(Stopped):
        convert(tmp_path / "out", jobs=stopping(3, 1))
    out = convert(tmp_path / "out", **changed)
    assert f"begun with other {named}; starting anew" in capsys.readouterr().err
    assert contents(out) == contents(convert(tmp_path / "undisturbed", **changed))


def test_a_command_that_changed_when_all_was_done_but_the_rename(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise Stopped

    monkeypatch.setattr(engine, "sync", fail)
    with pytest.raises(Stopped):
        convert(tmp_path / "out", files={**FILES, "old.txt": b""})
    monkeypatch.undo()
    changed = {"fingerprint": {**FACTS, "options": {}}}
    out = convert(tmp_path / "out", **changed)
    assert "starting anew" in capsys.readouterr().err
    assert contents(out) == contents(convert(tmp_path / "undisturbed", **changed))


@pytest.mark.parametrize("cut", [1, 10, -1])
def test_a_torn_line_of_the_journal_counts_for_nothing(tmp_path, whole, cut):
    with pytest.raises(Stopped):
        convert(tmp_path / "out", jobs=stopping(3, 1))
    path = partial(tmp_path / "out") / JOURNAL
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + last[:cut])
    chunked = Counter()
    assert contents(convert(tmp_path / "out", chunked)) == whole
    assert set(chunked) == {f"layers.{index}" for index in range(2, MODULES)}


@pytest.mark.parametrize("damage", [b"", b"{", b'{"tensors": {}}\n', b"\0" * 50 + b"\n", b"null\n"])
def test_a_journal_without_a_beginning_starts_anew(tmp_path, whole, damage):
    with pytest.raises(Stopped):
        convert(tmp_path / "out", jobs=stopping(3, 1))
    (partial(tmp_path / "out") / JOURNAL).write_bytes(damage)
    assert contents(convert(tmp_path / "out")) == whole


def test_lost_shards_start_anew(tmp_path, capsys, whole):
    with pytest.raises(Stopped):
        convert(tmp_path / "out", jobs=stopping(3, 1))
    (partial(tmp_path / "out") / "model-00001-of-00003.safetensors.part").unlink()
    assert contents(convert(tmp_path / "out")) == whole
    assert "shards are missing; starting anew" in capsys.readouterr().err


def test_the_fingerprint_of_sources(tmp_path):
    out = convert(tmp_path / "out")
    paths = sorted(out.iterdir())
    before = fingerprint(paths, {"bits": 4})
    assert fingerprint(paths, {"bits": 4}) == before
    assert json.loads(json.dumps(before)) == before
    shard = next(path for path in paths if path.suffix == ".safetensors")
    data = bytearray(shard.read_bytes())
    data[12] ^= 1
    stamp = shard.stat()
    shard.write_bytes(data)
    os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert fingerprint(paths, {"bits": 4})["sources"] != before["sources"]
    assert fingerprint(paths, {"bits": 8})["options"] != before["options"]


# --- memory and progress


def test_progress_counts_bytes_from_where_it_was(tmp_path, monkeypatch, capsys):
    bars = []
    real = engine.tqdm

    def tqdm(**options):
        bars.append(real(**options))
        return bars[-1]

    monkeypatch.setattr(engine, "tqdm", tqdm)
    job = sum(output.nbytes for output in module(0).outputs)
    with pytest.raises(Stopped):
        convert(tmp_path / "out", jobs=stopping(3, 0), progress=True)
    convert(tmp_path / "out", progress=True)
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [
        (0, 3 * job, MODULES * job),
        (3 * job, MODULES * job, MODULES * job),
    ]
    assert "Writing: 100%" in capsys.readouterr().err
