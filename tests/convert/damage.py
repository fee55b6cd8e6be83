"""Kinds of damage that a checkpoint can have, each drawn anew from a seed."""

import json
import math
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mlx_dgemma.checkpoint import INDEX


class Trap:
    """Whoever unpickles this writes where nothing is to be written."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


FORMS = ("float", "mlx", "fp8", "nvfp4")


def in_two(folder: Path) -> None:
    """Split model.safetensors into two shards; MLX itself cannot, it has no F8_E4M3."""
    path = folder / "model.safetensors"
    header, data = read_shard(path)
    header.pop("__metadata__", None)
    listed = {}
    for part in range(2):
        file, entries, body = f"model-{part + 1:05}-of-00002.safetensors", {}, b""
        for name in sorted(header)[part::2]:
            first, last = header[name]["data_offsets"]
            entries[name] = {**header[name], "data_offsets": [len(body), len(body) + last - first]}
            body += data[first:last]
        write_shard(folder / file, entries, body)
        listed |= dict.fromkeys(entries, file)
    path.unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def read_shard(path: Path) -> tuple[dict, bytes]:
    """Header and data."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_shard(path: Path, header: object, data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def a_shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("model*.safetensors")))


def truncated(folder: Path, rng: random.Random) -> None:
    path = a_shard(folder, rng)
    size = path.stat().st_size
    lengths = [0, rng.randrange(1, 8), 8, rng.randrange(9, 3000), rng.randrange(size), size - 1]
    os.truncate(path, rng.choice(lengths))


def longer(folder: Path, rng: random.Random) -> None:
    with a_shard(folder, rng).open("ab") as file:
        file.write(bytes(rng.randrange(1, 50)))


def header_bit(folder: Path, rng: random.Random, first: int = 8, last: int | None = None) -> None:
    path = a_shard(folder, rng)
    data = bytearray(path.read_bytes())
    if last is None:
        last = 8 + struct.unpack("<Q", data[:8])[0]
    data[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def header_edit(folder: Path, rng: random.Random) -> None:
    path = a_shard(folder, rng)
    header, data = read_shard(path)
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, others = header[name], ["F32", "F16", "BF16", "U32", "U8", "F8_E4M3", "I8", "I64", "F4", "object", 7, None]
    first, last = entry["data_offsets"]
    edits = {
        "shape": [[], [1], [*entry["shape"], 1], [*entry["shape"][:-1], entry["shape"][-1] + 1], entry["shape"][::-1]],
        "dtype": [dtype for dtype in others if dtype != entry["dtype"]],
        "data_offsets": [[last, first], [-first - 1, last], [first, last + 8], [first, 1 << 62], [float("nan"), last]],
    }
    edits["shape"] += [[-1, -1], [0], [1 << 62, 1 << 62], [float("nan")], [2.0], "2", None, {}, [[2]], [True]]
    edits["data_offsets"] += [[], [0], [first], [first, last, last], "0,8", None, {}, [0.0, float(last)], [False, last]]
    kind = rng.choice([*edits, "name", "whole", "gone"])
    if kind in edits:
        entry[kind] = rng.choice(edits[kind])
    elif kind == "name":
        names = [
            "",
            "x",
            "../../evil",
            "a\nb",
            "\x00",
            f"{name}.weight",
            name.upper(),
            name.replace("0", "00"),
            "é" * 9,
        ]
        header[rng.choice(names)] = header.pop(name)
    elif kind == "gone":
        header[name].pop(rng.choice(sorted(entry)))
    else:
        whole = [[], "x", None, 3, {name: []}, {name: None}, {name: {}}, {}, {"__metadata__": 3}, {**header, "y": 1}]
        header = rng.choice(whole)
    write_shard(path, header, data)


def lie(folder: Path, rng: random.Random, edits: Callable[[str, list[int]], list[tuple[str, list[int]]]]) -> None:
    """Another dtype or shape of a tensor, of as many bytes: of this the file itself tells nothing."""
    path = a_shard(folder, rng)
    header, data = read_shard(path)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    was = entry["dtype"], entry["shape"]
    others = [new for new in edits(*was) if new != was]
    if others:
        entry["dtype"], entry["shape"] = rng.choice(others)
    write_shard(path, header, data)


def shapes(dtype: str, shape: list[int]) -> list[tuple[str, list[int]]]:
    count = math.prod(shape)
    every = [shape[::-1], [count], [1, *shape], [*shape, 1], [count, 1], [2, count // 2], [count // 2, 2]]
    return [(dtype, new) for new in every if math.prod(new) == count]


def dtypes(dtype: str, shape: list[int]) -> list[tuple[str, list[int]]]:
    """Of the same width, or of another and as many bytes in a row."""
    widths = {"F32": 4, "U32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "U8": 1, "I8": 1, "BOOL": 1}
    widths |= {"F8_E4M3": 1, "F8_E5M2": 1, "F64": 8, "I64": 8}
    *rows, columns = shape or [1]
    nbytes = columns * widths[dtype]
    same = [(new, shape) for new, width in widths.items() if width == widths[dtype]]
    return same + [(new, [*rows, nbytes // width]) for new, width in widths.items() if nbytes % width == 0]


def missing(folder: Path, rng: random.Random) -> None:
    path = a_shard(folder, rng)
    kind = rng.randrange(5)
    path.unlink()
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.write_bytes(pickle.dumps(Trap(folder.parent / "trapped")))
    elif kind == 3:
        path.symlink_to(folder / "nothing")
    elif kind == 4:
        (folder / INDEX).unlink()


def index_edit(folder: Path, rng: random.Random) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    listed = index["weight_map"]
    (folder / "evil.bin").write_bytes(pickle.dumps(Trap(folder.parent / "trapped")))
    (folder / "evil.safetensors").write_bytes((folder / "evil.bin").read_bytes())
    shutil.copy(a_shard(folder, rng), folder.parent / "other.safetensors")
    names = ["../other.safetensors", str(folder.parent / "other.safetensors"), "..", "", ".", "evil.bin", "evil"]
    names += ["evil.safetensors", "none.safetensors", None, 3, ["x"], "a/../model.safetensors", "..\\x.safetensors"]
    names += ["\x00.safetensors", "x" * 5000 + ".safetensors", "\ud800.safetensors", "a\nb.safetensors"]
    kind = rng.randrange(8)
    if kind < 5:
        listed[rng.choice(sorted(listed))] = rng.choice(names)
    elif kind == 5:
        listed[rng.choice(["x", "../x", f"{next(iter(listed))}.weight"])] = a_shard(folder, rng).name
    elif kind == 6:
        index["weight_map"] = rng.choice([None, [], {}, "x", list(listed), {"x": {}}])
    text = json.dumps(index)
    damaged = ["", "{", "[]", "null", "[" * 100_000, text[: rng.randrange(len(text))], text.replace('"', "'")]
    path.write_text(rng.choice(damaged) if kind == 7 else text)


def outside(folder: Path, rng: random.Random) -> None:
    """The index leads out of the folder, to what would be a good shard."""
    path, shard = folder / INDEX, a_shard(folder, rng).name
    index = json.loads(path.read_text())
    (folder / "sub").mkdir()
    other = shutil.copytree(folder, folder.parent / "other") / shard
    names = [f"../other/{shard}", f"sub/../../other/{shard}", f"./../other/{shard}", f"../{folder.name}/{shard}"]
    name = rng.choice([*names, str(other), str(folder / shard), f"sub/../{shard}"])
    changed = [tensor for tensor, file in index["weight_map"].items() if file == shard]
    index["weight_map"] |= dict.fromkeys(changed[: rng.choice([1, None])], name)
    path.write_text(json.dumps(index))


def config_edit(folder: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    text = path.read_text()
    if rng.random() < 0.25:
        data = bytearray(text.encode())
        kind = rng.randrange(4)
        if kind == 0:
            data = data[: rng.randrange(len(data))]
        elif kind == 1:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data = rng.choice([b"", b"[]", b"null", b"3", b"\xff\xfe", b"{" * 9, b"[" * 100_000, b"NaN"])
        if kind == 3:
            path.unlink()
        else:
            path.write_bytes(data)
        return
    raw = json.loads(text)
    spots = [(raw, key) for key in raw]
    for holder, key in spots:  # grows: all places inside
        if isinstance(holder[key], dict | list):
            inside = holder[key]
            spots += [(inside, key) for key in (inside if isinstance(inside, dict) else range(len(inside)))]
    holder, key = rng.choice(spots)
    values = [None, 0, -1, 3, 17, 1 << 40, 1 << 70, 2.5, float("nan"), float("inf"), "", "x", [], {}, [None], True]
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(values)
    path.write_text(json.dumps(raw))


def quantization_edit(folder: Path, rng: random.Random) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for key in ("quantization", "quantization_config"):
        raw.pop(key, None)
    name = "model.decoder.layers.0.self_attn.q_proj"
    block = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}}
    blocks = [{**block, "group_size": 64}, {**block, "bits": 8}, {**block, "mode": "mxfp8"}, {"group_size": 0}, block]
    blocks += [{**block, name: False}, {**block, name: {"bits": 8}}, {**block, name: "x"}, {**block, name: None}]
    blocks += [{"group_size": 24, "bits": 4}, {"group_size": "64", "bits": 4}, {"group_size": 64, "bits": 1e99}]
    blocks += [{"group_size": 64, "bits": True}, {"group_size": -64, "bits": 4}, {"group_size": None}, {"bits": 4}]
    blocks += [{"quant_method": "gptq", "bits": 4}, {"quant_method": ["x"]}, {"quant_method": "compressed-tensors"}]
    blocks += [{"quant_method": "compressed-tensors", "config_groups": {"g": group}}, [], "x", 3, True, [1], {"a": 1}]
    blocks += [{"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": 3}}, "format": {}}]
    raw[rng.choice(["quantization", "quantization_config"])] = rng.choice(blocks)
    path.write_text(json.dumps(raw))


def group(folder: Path, rng: random.Random) -> None:
    """Groups that do not divide the widths of 16 and 32, or that are not those of the tensors."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw.pop("quantization_config", None)
    modes = [("affine", bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)]
    mode, bits, size = rng.choice([*modes, ("mxfp4", 4, 32), ("mxfp8", 8, 32)])
    raw["quantization"] = {"group_size": size, "bits": bits, "mode": mode}
    path.write_text(json.dumps(raw))


def nothing(folder: Path, rng: random.Random) -> None:
    """It is the options that do not fit; see `options_of`."""


def side_file(folder: Path, rng: random.Random) -> None:
    """Also `export gemma4` reads generation_config.json."""
    path = folder / "generation_config.json"
    path.write_text(rng.choice(["", "[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [1e99]}', "[" * 100_000]))


DAMAGE = {  # how, and how often in each form
    "truncated": (truncated, 12),
    "longer": (longer, 2),
    "length": (partial(header_bit, first=0, last=8), 6),
    "header bit": (header_bit, 30),
    "header entry": (header_edit, 40),
    "wrong shape": (partial(lie, edits=shapes), 12),
    "dtype lie": (partial(lie, edits=dtypes), 12),
    "missing": (missing, 8),
    "index": (index_edit, 24),
    "outside": (outside, 8),
    "config": (config_edit, 40),
    "quantization": (quantization_edit, 24),
    "group": (group, 8),
    "group asked for": (nothing, 4),
    "side file": (side_file, 4),
}


def options_of(kind: str, number: int, usual: dict) -> dict:
    if kind == "group asked for":
        mode = [{}, {"q_group_size": 128, "q_bits": 3}, {"q_mode": "mxfp4"}, {"q_group_size": 32, "q_bits": 8}][number]
        return {"quantize": True, **mode}
    return {**usual, "export": "gemma4"} if kind == "side file" and number % 2 else usual
