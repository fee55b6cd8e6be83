"""Memory of conversions: that of chunks, not of tensors. RssAnon is Linux's."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mlx_dgemma.config import ModelConfig
from mlx_dgemma.convert.names import expert_parts
from mlx_dgemma.convert.shards import Output, plan
from mlx_dgemma.convert.sources import text_shapes
from tests.convert.fixtures import DATA
from tests.helpers import with_text

LARGE = with_text(
    hidden_size=512,
    intermediate_size=512,
    moe_intermediate_size=1024,
    head_dim=64,
    global_head_dim=128,
    num_experts=128,
    vocab_size=65_536,
)
LARGEST = 128 * 2048 * 512 * 2  # bytes of its largest tensor, in bf16
MOST = 250e6  # bytes by which anonymous memory may grow
WAYS = {
    "default": ("float", {"quant_recipe": "default", "verify_output": True}),
    "mxfp4 to gemma4": ("float", {"quantize": True, "q_mode": "mxfp4", "export": "gemma4"}),
    "floats": ("float", {"dtype": "float16"}),
    "fp8, expert by expert": ("fp8", {"dequantize": True}),
}


def write_zeros(folder: Path, form: str) -> None:
    """A sparse checkpoint of zeros: 0.9 GB in bf16 that take no room on the disk."""
    raw, outputs = dict(LARGE), []
    for name, shape in text_shapes(ModelConfig.from_dict(LARGE)).items():
        if form == "fp8" and ".experts." in name:
            for part in expert_parts(name, shape[0]):
                rows = shape[1] if part.half is None else shape[1] // 2
                outputs.append(Output(f"{part.name}.weight", "F8_E4M3", (rows, shape[2])))
                outputs.append(Output(f"{part.name}.weight_scale", "BF16", (rows, 1)))
        else:
            outputs.append(Output(name, "BF16", shape))
    if form == "fp8":
        raw["quantization_config"] = json.loads((DATA / "fp8" / "config.json").read_text())["quantization_config"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    (shard,) = plan(outputs)
    shard.prepare(folder / shard.name)


def anonymous() -> int:
    """RssAnon of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def grown(folder: Path, way: str) -> int:
    """Bytes by which this process grows at most while it converts."""
    import mlx.core as mx

    from mlx_dgemma.convert.conversion import convert

    form, options = WAYS[way]
    write_zeros(folder / "source", form)
    mx.eval(mx.quantize(mx.zeros((64, 64)), 64, 4))
    before, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], anonymous() - before)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        convert(folder / "source", folder / "out", **options, progress=False)
    finally:
        done.set()
        watcher.join()
    return most[0]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
@pytest.mark.parametrize("way", WAYS)
def test_memory_is_that_of_chunks_not_of_tensors(way, tmp_path):
    code = "import sys; from pathlib import Path; from tests.convert.test_memory import grown; "
    code += "print(grown(Path(sys.argv[1]), sys.argv[2]))"
    argv = [sys.executable, "-c", code, str(tmp_path), way]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < MOST < LARGEST
