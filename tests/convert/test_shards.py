"""Safetensors files: what other libraries write is read, and what is written they read."""

import json
import struct
from math import prod

import mlx.core as mx
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from mlx_dgemma.checkpoint import ITEM_BYTES, read_header
from mlx_dgemma.convert.shards import Output, Reader, TensorWriter, plan, to_bytes
from mlx_dgemma.errors import InputError

NUMPY = {
    "BOOL": "bool", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "U8": "uint8", "U16": "uint16",
    "U32": "uint32", "U64": "uint64", "F16": "float16", "F32": "float32",
}  # fmt: skip


def random_bytes(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def reader(*paths) -> Reader:
    return Reader({info.name: info for path in paths for info in read_header(path)})


def write(folder, contents: dict[Output, bytes], piece: int = 7, **options) -> list:
    """Through the planner and writers, in pieces; the paths of the shards."""
    shards = plan(contents, **options)
    data = {output.name: content for output, content in contents.items()}
    for shard in shards:
        shard.prepare(folder / shard.name)
        for info in shard.tensors:
            writer = TensorWriter(folder / shard.name, info)
            for start in range(0, info.nbytes, piece):
                writer.write(memoryview(data[info.name])[start : start + piece])
            writer.finish()
    return [folder / shard.name for shard in shards]


def test_every_dtype_is_read_back_by_us_and_by_the_library(tmp_path):
    shapes = [(), (0, 3), (5,), (3, 4), (2, 3, 5)]
    outputs = [Output(f"{dtype}{shape}", dtype, shape) for dtype in ITEM_BYTES for shape in shapes]
    contents = {output: random_bytes(output.nbytes, i) for i, output in enumerate(outputs)}
    contents |= {output: bytes(output.nbytes) for output in outputs if output.dtype == "BOOL"}
    (path,) = write(tmp_path, contents)
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    ours = reader(path)
    assert theirs.keys() == ours.tensors.keys() == {output.name for output in outputs}
    for output, content in contents.items():
        entry, info = theirs[output.name], ours.tensors[output.name]
        assert (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) == (output.dtype, output.shape, content)
        assert (info.dtype, info.shape, bytes(to_bytes(ours.view(output.name)))) == (
            output.dtype,
            output.shape,
            content,
        )
        assert info.offset % ITEM_BYTES[output.dtype] == 0
        assert ours.array(output.name).shape == output.shape


def test_the_header_is_as_the_format_wants_it(tmp_path):
    (path,) = write(tmp_path, {Output("a", "U8", (3,)): b"abc", Output("b", "F32", (1,)): b"1234"})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0 and data[8 : 8 + length].rstrip(b" ").endswith(b"}")
    header = json.loads(data[8 : 8 + length])
    assert header["__metadata__"] == {"format": "mlx"}
    assert [entry["data_offsets"] for entry in (header["b"], header["a"])] == [[0, 4], [4, 7]]
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "mlx"}


@pytest.mark.parametrize("dtype", NUMPY)
def test_what_the_library_wrote_is_read_whole_and_in_slices(tmp_path, dtype):
    array = np.frombuffer(random_bytes(1 << 12), np.uint8).view(np.uint8 if dtype == "BOOL" else NUMPY[dtype])
    array = (array > 9 if dtype == "BOOL" else array)[:420].reshape(5, 6, 14)
    save_file({"odd": np.arange(3, dtype=np.uint8), "x": array, "pad": np.arange(7, dtype=np.int8)}, tmp_path / "a")
    ours = reader(tmp_path / "a")
    assert ours.view("x").dtype == array.dtype
    assert ours.view("x").tobytes() == array.tobytes()
    assert ours.view("x", 1, 3).tobytes() == array[1:3].tobytes()
    assert np.array(ours.array("x", 4)).tobytes() == array[4:].tobytes()
    with pytest.raises(ValueError, match="read-only"):
        ours.view("x")[0] = 0


def test_bf16_comes_as_mlx_saved_it(tmp_path):
    array = mx.random.normal((6, 8)).astype(mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"x": array})
    ours = reader(tmp_path / "a.safetensors")
    assert ours.view("x").dtype == np.uint16
    assert ours.array("x", 2, 5).dtype == mx.bfloat16
    assert mx.array_equal(ours.array("x", 2, 5), array[2:5])


def test_a_tensor_that_is_not_aligned_is_read_all_the_same(tmp_path):
    """The format does not promise alignment, and the oldest files have none."""
    header = {"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
    header["x"] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [2, 18]}
    text = json.dumps(header).encode()
    values = np.arange(4, dtype=np.float32)
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + b"ab" + values.tobytes())
    ours = reader(tmp_path / "a")
    assert ours.tensors["x"].offset % 4
    assert ours.array("x").tolist() == [[0, 1], [2, 3]]
    assert b"".join(map(to_bytes, ours.chunks("x", 8))) == values.tobytes()


@pytest.mark.parametrize("limit", [1, 50, 1000, 1 << 20])
def test_chunks_are_the_tensor_in_order(tmp_path, limit):
    array = np.arange(5 * 6 * 14, dtype=np.float32).reshape(5, 6, 14)
    save_file({"x": array}, tmp_path / "a")
    chunks = [chunk.copy() for chunk in reader(tmp_path / "a").chunks("x", limit)]
    items = array.reshape(-1, 14)
    assert np.array_equal(np.concatenate(chunks), items)
    assert all(chunk.nbytes <= max(limit, items[0].nbytes) for chunk in chunks)
    assert len({chunk.shape for chunk in chunks[:-1]}) <= 1


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (3, 0), (1,), (7,)])
def test_chunks_of_small_shapes(tmp_path, shape):
    array = np.ones(shape, np.float32)
    save_file({"x": array}, tmp_path / "a")
    assert b"".join(map(to_bytes, reader(tmp_path / "a").chunks("x", 8))) == array.tobytes()


def test_bytes_of_anything():
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    assert bytes(to_bytes(array.T)) == array.T.tobytes()
    assert bytes(to_bytes(mx.array(array).T)) == array.T.tobytes()
    assert bytes(to_bytes(mx.array(1.0, mx.bfloat16))) == b"\x80\x3f"
    assert bytes(to_bytes(mx.array([True, False]))) == b"\x01\x00"
    assert bytes(to_bytes(mx.zeros((0, 3)))) == bytes(to_bytes(b"")) == b""


def names(shards) -> list[list[str]]:
    return [sorted(info.name for info in shard.tensors) for shard in shards]


def test_shards_are_filled_in_order_and_modules_stay_together():
    outputs = [Output(f"{module}.{part}", "U8", (10,)) for part in ("weight", "scales") for module in "abc"]
    assert names(plan(outputs, 1000)) == [sorted(output.name for output in outputs)]
    shards = plan(outputs, 45)
    assert names(shards) == [["a.scales", "a.weight", "b.scales", "b.weight"], ["c.scales", "c.weight"]]
    assert [shard.name for shard in shards] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert plan(outputs, 1000)[0].name == "model.safetensors"
    assert len(plan(outputs, 5)) == 3  # a module larger than a shard has one of its own
    stacked = [Output(f"layers.0.experts.down_proj{part}", "U8", (9,)) for part in ("", ".scales", ".biases")]
    assert len(plan(stacked, 5)) == 1


def test_shards_are_loaded_by_the_library_and_by_mlx(tmp_path):
    contents = {Output(name, "F32", (3, 2)): random_bytes(24, i) for i, name in enumerate("abc")}
    paths = write(tmp_path, contents, limit=50)
    assert len(paths) == 2
    loaded = {name: array for path in paths for name, array in load_file(path).items()}
    lazily = {name: array for path in paths for name, array in mx.load(str(path)).items()}
    for output, content in contents.items():
        assert loaded[output.name].tobytes() == content
        assert bytes(to_bytes(lazily[output.name])) == content


def test_a_tensor_takes_its_bytes_and_no_others(tmp_path):
    output = Output("x", "F32", (2,))
    (shard,) = plan([output])
    shard.prepare(tmp_path / "a")
    writer = TensorWriter(tmp_path / "a", shard.tensors[0])
    writer.write(memoryview(b"1234"))
    with pytest.raises(ValueError, match="x: 1 bytes too many"):
        writer.write(memoryview(b"56789"))
    with pytest.raises(ValueError, match="x: 4 bytes are missing"):
        writer.finish()
    writer.close()
    with pytest.raises(ValueError, match="x: is to be written twice"):
        plan([output, output])


def file_with(entries: dict[str, tuple], size: int) -> bytes:
    """entries: name -> (dtype, shape, first, last)"""
    header = {name: {"dtype": d, "shape": s, "data_offsets": [a, b]} for name, (d, s, a, b) in entries.items()}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


WRONG = {
    "hole": ({"a": ("U8", [4], 0, 4), "b": ("U8", [4], 5, 9)}, 9, "b: starts at byte"),
    "hole at the start": ({"a": ("U8", [4], 1, 5)}, 5, "a: starts at byte"),
    "overlap": ({"a": ("U8", [4], 0, 4), "b": ("U8", [4], 3, 7)}, 7, "b: starts at byte"),
    "the same bytes twice": ({"a": ("U8", [4], 0, 4), "b": ("I8", [4], 0, 4)}, 4, "b: starts at byte"),
    "bytes at the end": ({"a": ("U8", [4], 0, 4)}, 5, "its header says"),
    "bytes missing": ({"a": ("U8", [4], 0, 4)}, 3, "its header says"),
    "negative": ({"a": ("U8", [-2, -2], 0, 4)}, 4, "not whole numbers"),
    "fractions": ({"a": ("U8", [4.0], 0, 4)}, 4, "not whole numbers"),
    "before the data": ({"a": ("U8", [4], -4, 0)}, 0, "not whole numbers"),
    "text for offsets": ({"a": ("U8", [4], "0", "4")}, 4, "not a safetensors file"),
    "unknown dtype": ({"a": ("F5", [4], 0, 4)}, 4, "F5 of shape"),
    "dtype that lies": ({"a": ("F32", [4], 0, 4)}, 4, "is not what is stored"),
}


@pytest.mark.parametrize("case", WRONG)
def test_headers_that_contradict_themselves_are_refused(tmp_path, case):
    entries, size, said = WRONG[case]
    (tmp_path / "a").write_bytes(file_with(entries, size))
    with pytest.raises(InputError, match=said) as caught:
        read_header(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_headers_that_are_no_headers_are_refused(tmp_path):
    deep = b"[" * 100_000
    for data in (b"", b"1234", struct.pack("<Q", 1 << 62), struct.pack("<Q", len(deep)) + deep, bytes(16)):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(InputError, match="not a safetensors file"):
            read_header(tmp_path / "a")
    with (tmp_path / "a").open("wb") as file:  # a flipped bit of the length must not read gigabytes
        file.write(struct.pack("<Q", 1 << 31))
        file.truncate(1 << 32)
    with pytest.raises(InputError, match="not a safetensors file"):
        read_header(tmp_path / "a")


def test_a_header_tells_where_tensors_are(tmp_path):
    data = {"b": np.arange(6, dtype=np.int16).reshape(2, 3), "a": np.ones(3, np.uint8)}
    save_file(data, tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    for info in read_header(tmp_path / "a"):
        assert content[info.offset : info.offset + info.nbytes] == data[info.name].tobytes()
        assert info.size == prod(data[info.name].shape)
