"""--verify: every tensor that was written is what the manifest says."""

import json

import pytest

from mlx_dgemma.checkpoint import Checkpoint
from mlx_dgemma.convert.engine import verify
from mlx_dgemma.convert.journal import JOURNAL
from mlx_dgemma.errors import InputError
from tests.convert.jobs import convert


def test_verify_finds_every_flipped_bit_of_a_tensor(tmp_path):
    out = convert(tmp_path / "out")
    for info in Checkpoint(out).tensors.values():
        data = bytearray(info.shard.read_bytes())
        data[info.offset + info.nbytes // 2] ^= 4
        good = info.shard.read_bytes()
        info.shard.write_bytes(data)
        with pytest.raises(InputError, match=f"tensor {info.name} is not what was written"):
            verify(out, progress=False)
        info.shard.write_bytes(good)
    verify(out, progress=False)


def test_verify_finds_headers_that_lie(tmp_path):
    out = convert(tmp_path / "out")
    for shard in sorted(out.glob("*.safetensors")):
        good = shard.read_bytes()
        for old, new in ((b'"BF16"', b'"I16" '), (b"[4,6]", b"[6,4]"), (b"weight", b"height")):
            shard.write_bytes(good.replace(old, new, 1))
            with pytest.raises(InputError, match=r"layers\.\d"):
                verify(out, progress=False)
        shard.write_bytes(good)


def test_verify_wants_a_manifest_and_all_tensors(tmp_path):
    out = convert(tmp_path / "out", shard_size=1 << 20)
    lines = (out / JOURNAL).read_text().splitlines(keepends=True)
    (out / JOURNAL).write_text("".join(lines[:-1]))
    with pytest.raises(InputError, match=r"tensor layers.4.biases is not in conversion.jsonl"):
        verify(out)
    (out / JOURNAL).write_text("".join(lines) + json.dumps({"tensors": {"z": ["U8", [1], "0"]}}) + "\n")
    with pytest.raises(InputError, match="tensor z is missing"):
        verify(out)
    (out / JOURNAL).unlink()
    with pytest.raises(InputError, match=r"has no conversion\.jsonl"):
        verify(out)


def test_verify_goes_on_to_the_sources(tmp_path):
    out = convert(tmp_path / "out")
    seen = []
    verify(out, lambda reader: seen.extend(reader.tensors), progress=False)
    assert sorted(seen) == sorted(Checkpoint(out).tensors)
