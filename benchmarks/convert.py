"""Memory and throughput of a conversion at the 26B's tensor shapes.

    python -m benchmarks.convert [--layers 5] [--recipe default] [--work FOLDER] [--json FILE]

Writes a checkpoint of the 26B's shapes with random bf16 values and fewer layers (5: 9.1 GB, shards of
5 GB), converts it in a process of its own, and prints the peak of that process's anonymous memory
(RssAnon, sampled every 5 ms, that of MLX before the conversion included) and its throughput in source
bytes, beside bare `mx.quantize` over the same tensors in the same slices: mapped, quantised, thrown
away. The disk is part of the first figure and not of the second. Linux alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_dgemma.command import Parser, run_command
from mlx_dgemma.errors import UsageError

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
    raw["text_config"] = TEXT | {"num_hidden_layers": layers}
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
    weight_map = {info.name: shard.name for shard in shards for info in shard.tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def convert_measured(source: Path, out: Path, recipe: str, results: Any) -> None:
    """In a process of its own: (seconds, peak of anonymous bytes)."""
    from mlx_dgemma.convert import convert

    peak, done = [anonymous_bytes()], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=sample)
    watcher.start()
    start = time.perf_counter()
    convert(source, out, quant_recipe=recipe)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    results.put((seconds, peak[0]))


def bare_quantise(source: Path, recipe: str, results: Any) -> None:
    """In a process of its own: seconds of mx.quantize alone, over what the recipe quantises, and its bytes."""
    import mlx.core as mx

    from mlx_dgemma.convert.conversion import Conversion, Options
    from mlx_dgemma.convert.sources import slices

    conversion = Conversion(source, Options(quant_recipe=recipe))
    seconds, nbytes = 0.0, 0
    for name, tensor in tqdm(conversion.tensors.items(), desc="bare mx.quantize", leave=False):
        scheme = conversion.scheme_of(name)
        for _, values in slices(tensor) if scheme else ():
            start = time.perf_counter()
            mx.eval(values)
            mx.eval(mx.quantize(values, **scheme.settings()))
            seconds += time.perf_counter() - start
            nbytes += values.nbytes
    results.put((seconds, nbytes))


def anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def _apart(function: Any, *arguments: Any) -> tuple[float, int]:
    """Run in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=function, args=(*arguments, results))
    process.start()
    process.join()
    if process.exitcode:
        raise UsageError(f"{function.__name__} failed; see above")
    return results.get()


def _command(args: argparse.Namespace) -> None:
    if args.layers < 1:
        raise UsageError(f"--layers must be at least 1, not {args.layers}")
    work = Path(tempfile.mkdtemp(prefix="convert-benchmark-", dir=args.work))
    try:
        (work / "source").mkdir()
        total = write_source(work / "source", args.layers)
        bare_seconds, quantised = _apart(bare_quantise, work / "source", args.recipe)
        seconds, peak = _apart(convert_measured, work / "source", work / "out", args.recipe)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = {
        "layers": args.layers,
        "recipe": args.recipe,
        "source GB": total / 1e9,
        "quantised GB": quantised / 1e9,
        "seconds": seconds,
        "peak anonymous GB": peak / 1e9,
        "MB per second": total / seconds / 1e6,
        "bare mx.quantize, MB per second": quantised / bare_seconds / 1e6,
    }
    print(
        "\n".join(
            f"{key}: {value:.3f}" if isinstance(value, float) else f"{key}: {value}" for key, value in result.items()
        )
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def argument_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="benchmarks.convert", description="Measure a conversion at the 26B's tensor shapes.")
    add = parser.add_argument
    add("--layers", type=int, default=5, help="of the checkpoint that is made (default: 5, 9.1 GB)")
    add("--recipe", default="default", help="(default: default)")
    add("--work", type=Path, help="a folder with room for source and output (default: the temporary folder)")
    add("--json", type=Path, metavar="FILE", help="write what is printed")
    add("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


if __name__ == "__main__":
    main()
