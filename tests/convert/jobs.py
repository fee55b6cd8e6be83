"""Small jobs for the converter's engine, and a run of them."""

from collections import Counter
from pathlib import Path

import numpy as np

from mlx_dgemma.checkpoint import Checkpoint
from mlx_dgemma.config import read_json
from mlx_dgemma.convert.engine import Job, run
from mlx_dgemma.convert.shards import Output
from mlx_dgemma.errors import InputError

FACTS = {"sources": ["model.safetensors"], "options": {"bits": 4}}
FILES = {"config.json": b'{"model_type": "test"}', "tokenizer.json": b"{}"}
MODULES = 5
CHUNKS = 4


def content(output: Output) -> bytes:
    return np.random.default_rng(list(output.name.encode())).bytes(output.nbytes)


def module(index: int, chunked: Counter | None = None) -> Job:
    """Weight, scales and biases of a module, which grow in parallel."""
    name = f"layers.{index}"
    outputs = (
        Output(f"{name}.weight", "U32", (CHUNKS, 6)),
        Output(f"{name}.scales", "BF16", (CHUNKS, 3)),
        Output(f"{name}.biases", "F8_E4M3", (CHUNKS, 5)),
    )

    def produce():
        for chunk in range(CHUNKS):
            for number, output in enumerate(outputs):
                size = output.nbytes // CHUNKS
                if chunked is not None:
                    chunked[name] += 1
                yield number, content(output)[chunk * size : (chunk + 1) * size]

    return Job(outputs, produce)


def convert(out: Path, chunked: Counter | None = None, jobs: list[Job] | None = None, **options) -> Path:
    jobs = [module(index, chunked) for index in range(MODULES)] if jobs is None else jobs
    options = {"fingerprint": FACTS, "files": FILES, "progress": False, "shard_size": 300, **options}
    return run(jobs, out, **options)


def partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def is_loadable(folder: Path) -> bool:
    try:
        read_json(folder / "config.json")
        Checkpoint(folder)
    except InputError:
        return False
    return True


class Stopped(Exception):
    pass


def stopping(index: int, chunk: int, error: BaseException | None = None) -> list[Job]:
    """The jobs, of which one stops after some chunks."""
    jobs = [module(number) for number in range(MODULES)]
    good = jobs[index]

    def produce():
        for number, item in enumerate(good.produce()):
            if number == chunk:
                raise error or Stopped
            yield item

    jobs[index] = Job(good.outputs, produce)
    return jobs
