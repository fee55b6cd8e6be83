"""Memory and throughput of a conversion at the 26B's tensor shapes, beside mlx-vlm's.

    python -m benchmarks.convert [--layers 5] [--recipe mlx-community-4bit] [--no-mlx-vlm] [--work FOLDER] [--json FILE]

Writes a checkpoint of the 26B's shapes with random bf16 values and fewer layers (5: 9.7 GB, shards of 5 GB) and
converts it, each time in a process of its own: with this package; with `mlx_vlm.convert -q`, whose predicate is
the recipe `mlx-community-4bit`; and by bare `mx.quantize` over the same tensors in the same slices: mapped,
quantised, thrown away. For each: the peak of the process's anonymous memory (RssAnon, sampled every 5 ms, that of
MLX itself included) and the source bytes a second. The disk is part of the first two and not of the third; with
`--work /dev/shm` of none. Linux alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_dgemma.command import Parser, run_command
from mlx_dgemma.convert.recipes import get_recipe
from mlx_dgemma.errors import UsageError
from mlx_dgemma.files import require_place, write_whole
from mlx_dgemma.loading import EMBEDDED

from .measure import spare_compiler
from .vlm import installed_version

TEXT = {
    **{"vocab_size": 262_144, "hidden_size": 2816, "intermediate_size": 2112, "moe_intermediate_size": 704},
    **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512},
    **{"num_global_key_value_heads": 2, "num_experts": 128, "top_k_experts": 8, "sliding_window": 1024},
    "max_position_embeddings": 262_144,
}
BLOCK = 32 << 20  # bytes of random values, written over and over


def write_source(folder: Path, layers: int) -> int:
    """A checkpoint of random values; returns its bytes."""
    from mlx_dgemma.config import ModelConfig
    from mlx_dgemma.convert.shards import Output, plan
    from mlx_dgemma.convert.sources import text_shapes

    raw = {"model_type": "diffusion_gemma", "canvas_length": 256, "dtype": "bfloat16"}
    raw |= {"text_config": TEXT | {"num_hidden_layers": layers}, "vision_config": None}
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = text_shapes(ModelConfig.from_dict(raw))
    values = np.random.default_rng(0).standard_normal(BLOCK // 2, np.float32) * 0.02
    block = memoryview((values.view(np.uint32) >> 16).astype(np.uint16)).cast("B")
    shards = plan([Output(name, "BF16", shape) for name, shape in shapes.items()], metadata={"format": "pt"})
    total = sum(shard.size for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="source", leave=False) as bar:
        for shard in shards:
            with (folder / shard.name).open("wb") as file:
                left = shard.size - file.write(shard.header)
                while left:
                    left -= file.write(block[: min(left, BLOCK)])
                    bar.update(BLOCK)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):  # mlx-vlm wants a tokenizer
        shutil.copy(EMBEDDED / name, folder)
    weight_map = {info.name: shard.name for shard in shards for info in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def ours(source: Path, out: Path, recipe: str) -> None:
    from mlx_dgemma.convert import convert

    convert(source, out, quant_recipe=recipe)


def mlx_vlms(source: Path, out: Path) -> None:
    spare_compiler()
    from mlx_vlm.convert import convert

    convert(str(source), str(out), quantize=True)


def measured(convert: Callable[..., None], source: Path, out: Path, *arguments: str, results: Any) -> None:
    """In a process of its own: (seconds, peak of anonymous bytes)."""
    import mlx.core  # noqa: F401  (its threads and libraries are not part of what is timed)

    peak, done = [anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    start = time.perf_counter()
    convert(source, out, *arguments)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    results.put((seconds, peak[0]))


def bare_quantise(source: Path, recipe: str, *, results: Any) -> None:
    """In a process of its own: seconds of mx.quantize alone, over what the recipe quantises, and its bytes."""
    import mlx.core as mx

    from mlx_dgemma.convert.conversion import Conversion, Options
    from mlx_dgemma.convert.sources import spans

    conversion = Conversion(source, Options(quant_recipe=recipe))
    seconds, nbytes = 0.0, 0
    for name, tensor in tqdm(conversion.tensors.items(), desc="bare mx.quantize", leave=False):
        scheme = conversion.scheme_of(name)
        for first, last in spans(tensor) if scheme else ():
            start = time.perf_counter()
            values = tensor.read(first, last)
            mx.eval(values)
            mx.eval(mx.quantize(values, **scheme.settings()))
            seconds += time.perf_counter() - start
            nbytes += values.nbytes
    results.put((seconds, nbytes))


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _apart(function: Any, *arguments: Any) -> tuple[float, int]:
    """Run in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=function, args=arguments, kwargs={"results": results})
    process.start()
    process.join()
    if process.exitcode:
        raise UsageError(f"{function.__name__} failed; see above")
    return results.get()


def _command(args: argparse.Namespace) -> None:
    if args.json:
        require_place(args.json)
    if args.layers < 1:
        raise UsageError(f"--layers must be at least 1, not {args.layers}")
    if not args.no_mlx_vlm:
        installed_version()
    get_recipe(args.recipe)
    work = Path(tempfile.mkdtemp(prefix="convert-benchmark-", dir=args.work))
    source, out = work / "source", work / "out"
    try:
        source.mkdir()
        total = write_source(source, args.layers)
        seconds, quantised = _apart(bare_quantise, source, args.recipe)
        rows = {"bare mx.quantize": {"MB per second": quantised / seconds / 1e6}}
        ways = {"mlx_dgemma": (ours, args.recipe)} | ({} if args.no_mlx_vlm else {"mlx-vlm": (mlx_vlms,)})
        for name, (function, *arguments) in ways.items():
            seconds, peak = _apart(measured, function, source, out, *arguments)
            speed = {"seconds": seconds, "MB per second": total / seconds / 1e6}
            rows[name] = speed | {"peak anonymous GB": peak / 1e9, "output GB": folder_bytes(out) / 1e9}
            shutil.rmtree(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = {"layers": args.layers, "recipe": args.recipe, "source GB": total / 1e9, "quantised GB": quantised / 1e9}
    for name, row in {"conversion": result, **rows}.items():
        cells = (f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print(f"{name}: {', '.join(cells)}")
    if args.json:
        write_whole(args.json, json.dumps(result | {"rows": rows}, indent=1) + "\n")


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="benchmarks.convert", description="Measure a conversion at the 26B's tensor shapes.")
    add = parser.add_argument
    add("--layers", type=int, default=5, help="of the checkpoint that is made (default: 5, 9.7 GB)")
    add("--recipe", default="mlx-community-4bit", help="of this package (default: mlx-community-4bit, mlx-vlm's own)")
    add("--no-mlx-vlm", action="store_true", help="measure this package alone")
    add("--work", type=Path, help="a folder with room for source and output (default: the temporary folder)")
    add("--json", type=Path, metavar="FILE", help="write what is printed")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


if __name__ == "__main__":
    main()
