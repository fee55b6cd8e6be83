"""The engine of a conversion: jobs that produce tensors, chunk by chunk, into a folder that is whole or not there.

    .out.partial/            while it grows: locked, resumed by the same command
        conversion.jsonl     the journal: a line per finished job
        model-*.safetensors.part
    out/                     renamed when all is on disk; conversion.jsonl stays as the manifest

What is produced, from what, is not known here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from ..checkpoint import INDEX, Checkpoint
from ..errors import InputError, UsageError
from ..folders import require_new, resumable, sync, what_stays
from .journal import JOURNAL, Journal, manifest, record
from .shards import PART, SHARD, Output, Reader, Shard, TensorWriter, plan, to_bytes

CONFIG = "config.json"  # without it nothing is a checkpoint, so it is written last
SLACK = 1 << 20  # of the disk, for journal, index and blocks that are not full
TASKS, AHEAD = 16, 64 << 20  # chunks and bytes that may wait for the disk

Files = Mapping[str, bytes | Path]


@dataclass(frozen=True)
class Job:
    """Tensors that are made together. `produce` yields (index of an output, its next bytes), anew at every call.

    The bytes may be any buffer or an array; each output gets its own in order, the outputs may alternate. They
    must not change after they were yielded.
    """

    outputs: tuple[Output, ...]
    produce: Callable[[], Iterator[tuple[int, Any]]]


def run(
    jobs: Iterable[Job],
    out: str | Path,
    *,
    fingerprint: Mapping[str, Any],
    files: Files | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: bool = True,
    shard_size: int = SHARD,
    total_parameters: int | None = None,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint, going on from where the same call was interrupted.

    Args:
        jobs: whose outputs are written, in this order.
        out: the folder to create.
        fingerprint: what the outputs depend on, JSON by part ("sources", "options", ...); see `journal.fingerprint`.
        files: further files of the checkpoint by name, as bytes or to be copied; config.json among them.
        metadata: of each shard; {"format": "mlx"} by default.
        progress: show a bar on stderr.
        shard_size: bytes of tensors in a shard.
        total_parameters: for the index.
        check: called with the folder when all is written, before it gets its name; if it raises InputError, nothing
            is left.

    Raises:
        UsageError: `out` exists, its parent does not, or another process writes it.
        InputError: the disk has no room, or writing failed; what is done stays, and the same call goes on from there.
        ValueError: the jobs contradict themselves.
    """
    jobs, out, files = list(jobs), Path(out).absolute(), dict(files or {})
    _check_names(files)
    shards = plan([output for job in jobs for output in job.outputs], shard_size, metadata)
    facts = {**fingerprint, "plan": [shard.header.hex() for shard in shards]}
    with _partial_folder(out) as (work, journal), resumable(out, work):
        _resume(work, journal, facts, shards)
        _require_space(work, journal, shards, files)
        _write(jobs, work, journal, shards, progress)
        _complete(work, shards, files, total_parameters)
        if check is not None:
            _check(check, work)
        os.rename(work, out)
        sync(out.parent)
    return out


def _check_names(files: Files) -> None:
    for name in files:
        is_ours = name in ("..", INDEX, JOURNAL) or name.endswith((".safetensors", PART))
        if is_ours or Path(name).name != name:
            raise ValueError(f"{name!r}: not a name for a side file")


@contextmanager
def _partial_folder(out: Path) -> Iterator[tuple[Path, Journal]]:
    """The folder that becomes `out`, and its journal, which is locked while the block runs."""
    require_new(out)
    work = out.with_name(f".{out.name}.partial")
    try:
        if not work.is_symlink():
            work.mkdir(exist_ok=True)
        found = [work.name] if work.is_symlink() else os.listdir(work)
    except OSError as error:
        raise InputError(f"{out}: its folder cannot be made ({error.strerror}); name another output") from None
    if found and JOURNAL not in found:
        raise UsageError(f"{work}: is not an unfinished conversion; remove it or name another output")
    journal = Journal(work / JOURNAL)
    try:
        require_new(out)  # the process that held the lock may just have finished
        yield work, journal
    finally:
        journal.close()


def _resume(work: Path, journal: Journal, facts: Mapping[str, Any], shards: list[Shard]) -> None:
    """Leave what the same conversion has finished; else begin anew in an empty folder, and say why."""
    changes = journal.changes(facts)
    if not changes and all(_is_there(work, shard) for shard in shards if _finished(journal, shard)):
        return
    if journal.begun:
        reason = f"begun with other {', '.join(changes)}" if changes else "shards are missing"
        print(f"{work}: {reason}; starting anew", file=sys.stderr)
    journal.forget()
    for path in sorted(work.iterdir(), key=lambda path: path.name != CONFIG):
        if path.name != JOURNAL:
            path.unlink()
    journal.begin(facts)  # last: until then, what is there belongs to nothing


def _finished(journal: Journal, shard: Shard) -> int:
    """Bytes of finished tensors of a shard."""
    return sum(info.nbytes for info in shard.tensors if info.name in journal.tensors)


def _is_there(work: Path, shard: Shard) -> bool:
    paths = (work / shard.name, work / (shard.name + PART))
    return any(path.is_file() and path.stat().st_size == shard.size for path in paths)


def _require_space(work: Path, journal: Journal, shards: list[Shard], files: Files) -> None:
    """Raises InputError if the disk cannot take what is still to be written."""
    need = SLACK + sum(shard.size - _finished(journal, shard) for shard in shards)
    need += sum(content.stat().st_size if isinstance(content, Path) else len(content) for content in files.values())
    free = shutil.disk_usage(work).free
    if need > free:
        kept = f"; {what_stays(work)}" if journal.tensors else ""
        if not journal.tensors:
            shutil.rmtree(work)
        raise InputError(f"{work.parent}: needs {need:,} bytes, {free:,} are free; make room{kept}")


class _Disk:
    """A thread that does tasks in order while the caller computes on; few may wait."""

    def __enter__(self) -> _Disk:
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Future, int]] = deque()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._thread.shutdown()  # what waits is done even after an error: the last job may be whole
        while kind is None and self._waiting:
            self._waiting.popleft()[0].result()

    def do(self, nbytes: int, task: Callable[..., None], *args: object) -> None:
        """Have a task done that holds so many bytes. Raises what an earlier one raised."""
        self._waiting.append((self._thread.submit(task, *args), nbytes))
        while self._waiting and (self._waiting[0][0].done() or self._is_full()):
            self._waiting.popleft()[0].result()

    def _is_full(self) -> bool:
        return len(self._waiting) > TASKS or sum(nbytes for _, nbytes in self._waiting) > AHEAD


def _write(jobs: list[Job], work: Path, journal: Journal, shards: list[Shard], progress: bool) -> None:
    for shard in shards:
        if not (work / shard.name).exists():
            shard.prepare(work / (shard.name + PART))
    sync(work)
    places = {info.name: info for shard in shards for info in shard.tensors}
    done = sum(_finished(journal, shard) for shard in shards)
    total = sum(info.nbytes for info in places.values())
    with (
        tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="Writing", disable=not progress) as bar,
        ExitStack() as opened,
        _Disk() as disk,
    ):
        for job in jobs:
            if all(output.name in journal.tensors for output in job.outputs):
                continue
            infos = [places[output.name] for output in job.outputs]
            writers = [TensorWriter(work / f"{info.shard}{PART}", info) for info in infos]
            for writer in writers:
                opened.callback(writer.close)
            for index, data in job.produce():
                data = to_bytes(data)
                disk.do(data.nbytes, writers[index].write, data)
                bar.update(data.nbytes)
            disk.do(0, _commit, writers, journal)
            mx.clear_cache()  # the next job's buffers have other sizes


def _commit(writers: list[TensorWriter], journal: Journal) -> None:
    """The data is on disk before the journal says so."""
    journal.add({writer.info.name: record(writer.info, writer.finish()) for writer in writers})


def _complete(work: Path, shards: list[Shard], files: Files, total_parameters: int | None) -> None:
    """From finished jobs to a checkpoint; interrupted anywhere, it can be done again."""
    for shard in shards:
        part = work / (shard.name + PART)
        if part.exists():
            part.rename(work / shard.name)
    files = {INDEX: _index(shards, total_parameters), **files}
    for name in sorted(files, key=lambda name: (name == CONFIG, name)):
        _put(work / name, files[name])
    sync(work)


def _check(check: Callable[[Path], None], work: Path) -> None:
    try:
        check(work)
    except InputError:
        shutil.rmtree(work)
        raise


def _index(shards: list[Shard], total_parameters: int | None) -> bytes:
    infos = [info for shard in shards for info in shard.tensors]
    sizes = {"total_size": sum(info.nbytes for info in infos)}
    if total_parameters is not None:
        sizes["total_parameters"] = total_parameters
    weight_map = {info.name: info.shard.name for info in sorted(infos, key=lambda info: info.name)}
    return json.dumps({"metadata": sizes, "weight_map": weight_map}, indent=4).encode()


def _put(path: Path, content: bytes | Path) -> None:
    with path.open("wb") as file:
        if isinstance(content, Path):
            with content.open("rb") as source:
                shutil.copyfileobj(source, file)
        else:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())


def verify(out: str | Path, sources_check: Callable[[Reader], None] | None = None, *, progress: bool = True) -> None:
    """Read a converted checkpoint again and compare every tensor with the manifest.

    Args:
        out: what `run` wrote.
        sources_check: called at the end with a reader of `out`, to compare values with the source.
        progress: show a bar on stderr.

    Raises InputError that names the first tensor that is missing, surplus or different.
    """
    out = Path(out)
    recorded, reader = manifest(out), Reader(Checkpoint(out).tensors)
    for name in sorted(recorded.keys() ^ reader.tensors.keys()):
        what = "is missing" if name in recorded else f"is not in {JOURNAL}"
        raise InputError(f"{out}: tensor {name} {what}; convert it again")
    total = sum(info.nbytes for info in reader.tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Verifying", disable=not progress) as bar:
        for name, info in reader.tensors.items():
            digest = hashlib.sha256()
            for chunk in reader.chunks(name):
                digest.update(to_bytes(chunk))
                bar.update(chunk.nbytes)
            if record(info, digest.hexdigest()) != recorded[name]:
                raise InputError(f"{info.shard}: tensor {name} is not what was written (sha256); convert it again")
    if sources_check is not None:
        sources_check(reader)
