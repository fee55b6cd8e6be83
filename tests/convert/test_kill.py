"""Killed at any moment and resumed, a conversion is bit for bit what it would have been.

Here it is the command, and SIGKILL when the folder looks so and so; the engine's tests kill at every line of code.
"""

import json
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from math import prod
from pathlib import Path

import pytest

from mlx_dgemma.checkpoint import INDEX, ITEM_BYTES
from mlx_dgemma.convert.journal import JOURNAL
from mlx_dgemma.errors import InputError
from mlx_dgemma.loading import EMBEDDED, load_model
from tests.convert.fixtures import Commands, contents, hf_tensors, write
from tests.helpers import with_text

MANY = with_text(  # tensors, and large enough that each takes a while
    vocab_size=2048,
    hidden_size=512,
    intermediate_size=512,
    moe_intermediate_size=512,
    head_dim=64,
    global_head_dim=128,
    num_experts=4,
    num_hidden_layers=3,
    layer_types=["sliding_attention"] * 2 + ["full_attention"],
)
SIDE_FILES = (  # many and large, so that the end takes a while, too
    *("added_tokens.json", "chat_template.json", "merges.txt", "preprocessor_config.json", "processor_config.json"),
    *("special_tokens_map.json", "tokenizer.model", "vocab.json"),
)
WAYS = {  # to each kind of output: from, by
    "default": ("floats", ["--quant-recipe", "default"]),
    "gemma4": ("floats", ["--quant-recipe", "default", "--export", "gemma4"]),
    "dequantize": ("8bit", ["--dequantize"]),
    "bf16": ("floats", ["--quant-recipe", "bf16"]),
}
KILLS, WITH_JOURNAL = 40, 32  # of all ways together


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with Commands(tmp_path_factory.mktemp("said")) as commands:
        yield commands


@pytest.fixture(scope="module")
def sources(tmp_path_factory, commands) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    floats = write(folder / "floats", MANY, hf_tensors(MANY))
    for path in EMBEDDED.glob("tokenizer*"):
        shutil.copy(path, floats)
    for number, name in enumerate(SIDE_FILES):
        (floats / name).write_text(json.dumps({"noise": random.Random(number).randbytes(100_000).hex()}))
    assert commands.run("--hf-path", floats, "--mlx-path", folder / "8bit", "--quant-recipe", "8bit")[0] == 0
    return {path.name: path for path in folder.iterdir()}


def whole_lines(journal: Path) -> list[bytes]:
    data = journal.read_bytes() if journal.exists() else b""
    return data[: data.rfind(b"\n") + 1].splitlines()


def finished(lines: list[bytes]) -> int:
    """Bytes of the tensors that lines of a journal tell of."""
    records = [record for line in lines[1:] for record in json.loads(line)["tensors"].values()]
    return sum(ITEM_BYTES[dtype] * prod(shape) for dtype, shape, _ in records)


def moments(rng: random.Random, lines: int) -> list:
    """Of one conversion, in order: lines of the journal, or the files that are there by then."""
    middle = sorted(rng.randrange(1, lines) for _ in range(3))
    ends = ["model.safetensors", INDEX, rng.choice(SIDE_FILES), "config.json", "out"]
    return [0, 1, *middle, *sorted(rng.sample(ends, 2), key=ends.index)]


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_random_moments_and_resumed_it_is_bit_identical(way, commands, sources, tmp_path):
    rng = random.Random(way)
    origin, options = WAYS[way]
    argv = ["--hf-path", sources[origin], *options, "--mlx-path"]
    whole, out, unfinished = (tmp_path / name for name in ("whole/out", "out", ".out.partial"))
    whole.parent.mkdir()
    journal = unfinished / JOURNAL
    assert commands.run(*argv, whole)[0] == 0
    expected, lines = contents(whole), whole_lines(whole / JOURNAL)
    total = finished(lines)
    assert len(lines) > 40 and expected.keys() > set(SIDE_FILES)
    kept: list[bytes] = []
    killed = with_journal = resumed = at_the_end = passes = 0

    def is_reached(moment: int | str) -> bool:
        if out.exists():
            return True
        if isinstance(moment, str):
            return (unfinished / moment).exists()
        return not moment or len(whole_lines(journal)) >= moment

    def assert_resumed(stderr: str) -> None:
        """The bar begins at what the journal told of."""
        nonlocal resumed
        assert "anew" not in stderr and "Traceback" not in stderr
        if begins := re.search(r"Writing: *(\d+)%", stderr):
            assert begins[1] == f"{100 * finished(kept) / total:.0f}"
            resumed += finished(kept) > 0

    def assert_done() -> None:
        assert contents(out) == expected
        assert not unfinished.exists()
        shutil.rmtree(out)
        kept.clear()

    while killed < KILLS // len(WAYS) or with_journal < WITH_JOURNAL // len(WAYS) or not at_the_end:
        passes += 1
        assert passes < 9, "kills come too late"
        for moment in moments(rng, len(lines)):
            pid, deadline = commands.start(*argv, out), time.monotonic() + 15
            while not is_reached(moment):
                assert time.monotonic() < deadline
            time.sleep(rng.random() * (0.003 if moment else 0.02))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status, _, stderr = commands.wait()
            assert status in (0, -signal.SIGKILL), stderr
            assert_resumed(stderr)
            killed += status != 0
            if out.exists():
                assert_done()
                continue
            with_journal += journal.exists()
            now = whole_lines(journal)
            assert now[: len(kept)] == kept == lines[: len(kept)]
            kept = now
            found = contents(unfinished) if unfinished.exists() else {}
            at_the_end += "model.safetensors" in found
            if "config.json" in found:  # is written last
                assert {name: data for name, data in found.items() if name != "config.json"}.items() <= expected.items()
                assert len(found) == len(expected)
            if found != expected:
                with pytest.raises(InputError):
                    load_model(unfinished)
        status, stdout, stderr = commands.run(*argv, out)
        assert (status, stdout) == (0, f"{out}\n"), stderr
        assert_resumed(stderr)
        assert_done()
    assert resumed >= 5
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    print(f"{killed} killed, {with_journal} with a journal, {at_the_end} at the end, {resumed} resumed")
