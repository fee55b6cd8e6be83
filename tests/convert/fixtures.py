"""Small checkpoints in every form a source can have.

The compressed-tensors ones are written, and dequantised, by the package of that name, which needs torch.
`data/{fp8,nvfp4}` holds two of them, made (compressed-tensors 0.20.0, torch 2.13) by

    python -m tests.convert.fixtures

so that the ordinary suite can read them without torch: config.json, model.safetensors and expected.safetensors,
which is the package's values in float32 by HF's names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_dgemma.checkpoint import tensor_name
from mlx_dgemma.convert.names import expert_parts, is_vision
from mlx_dgemma.convert.recipes import Plan
from mlx_dgemma.model import DiffusionGemma
from tests.helpers import random_model, with_text

DATA = Path(__file__).parent / "data"
QUIET = {"progress": False}
PRESETS = {"fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4"}  # compressed-tensors' names, as llm-compressor uses them
# as little as groups of 16 allow
SMALL = with_text(
    vocab_size=16,
    hidden_size=32,
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_hidden_layers=2,
    layer_types=["sliding_attention", "full_attention"],
    num_experts=2,
    moe_intermediate_size=16,
)
# every width is a multiple of 64
WIDE = with_text(
    hidden_size=64, intermediate_size=128, moe_intermediate_size=64, head_dim=16, global_head_dim=32, vocab_size=64
)
VISION = {
    "model.encoder.embed_vision.embedding_projection.weight": (64, 16),
    "model.encoder.vision_tower.patch_embedder.input_proj.weight": (16, 12),
    "model.encoder.vision_tower.patch_embedder.position_embedding_table": (2, 8, 16),
    "model.encoder.vision_tower.std_bias": (16,),
    "model.encoder.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight": (16, 16),
    "model.encoder.vision_tower.encoder.layers.0.self_attn.q_norm.weight": (8,),
}


def named(model: nn.Module) -> dict[str, mx.array]:
    """A model's parameters by HF's names."""
    return {tensor_name(path): array for path, array in tree_flatten(model.parameters())}


def hf_tensors(raw: dict[str, Any], dtype: mx.Dtype = mx.bfloat16, seed: int = 0) -> dict[str, mx.array]:
    """A random model in HF's layout, vision included."""
    mx.random.seed(seed)
    vision = {name: mx.random.normal(shape) for name, shape in VISION.items()}
    return {name: array.astype(dtype) for name, array in (named(random_model(raw, seed)) | vision).items()}


def write(folder: Path, raw: dict[str, Any], tensors: dict[str, mx.array]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    return folder


def per_expert(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """The same with a linear layer per expert and projection."""
    out = {}
    for name, array in tensors.items():
        if ".experts." not in name:
            out[name] = array
            continue
        for part in expert_parts(name, array.shape[0]):
            out[f"{part.name}.weight"] = array[part.slices(array.shape)][0]
    return out


def tensors_of(folder: Path) -> dict[str, mx.array]:
    return {name: array for path in sorted(folder.glob("*.safetensors")) for name, array in mx.load(str(path)).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def quick_disk(monkeypatch) -> None:
    """A fixture: in this process nobody pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


class Commands:
    """Runs mlx_dgemma.convert, each time in a process of its own, but imports what takes long only once."""

    SERVER = """
import json, os, resource, signal, sys, traceback
import mlx_dgemma.convert.conversion  # all that takes long to import
from mlx_dgemma.convert.command import main

folder = sys.argv[1]
for line in sys.stdin:
    argv, largest = json.loads(line)
    said = [open(os.path.join(folder, name), "w") for name in ("stdout", "stderr")]
    pid = os.fork()
    if not pid:
        signal.alarm(60)  # what hangs is killed
        for handle, file in enumerate(said, 1):
            os.dup2(file.fileno(), handle)
        if largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))  # Python ignores SIGXFSZ: it is an OSError
        status = 99
        try:
            main(argv)
            status = 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

    def __init__(self, folder: Path):
        """Stdout and stderr of the latest run lie in a folder."""
        self.folder = folder

    def __enter__(self) -> Commands:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen([sys.executable, "-c", self.SERVER, str(self.folder)], **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def start(self, *argv: object, largest: int | None = None) -> int:
        """Begin a conversion that may write files of at most so many bytes; its process id."""
        print(json.dumps([[str(word) for word in argv], largest]), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def wait(self) -> tuple[int, str, str]:
        """(status, stdout, stderr) of what was started; a status below 0 is the signal that killed it."""
        status = int(self._server.stdout.readline())
        return status, *((self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr"))

    def run(self, *argv: object, largest: int | None = None) -> tuple[int, str, str]:
        self.start(*argv, largest=largest)
        return self.wait()


def quantised(model: DiffusionGemma, plan: Plan) -> dict[str, mx.array]:
    """Quantise a model in place as a plan says; its tensors as MLX stores them."""
    nn.quantize(model, class_predicate=lambda path, _: (s := plan.schemes.get(path)) is not None and s.settings())
    return dict(tree_flatten(model.parameters()))


def write_compressed(folder: Path, form: str, seed: int = 0, preset: str | None = None) -> Path:
    """A checkpoint of SMALL by compressed-tensors, as RedHatAI publishes this model.

    Experts are one by one, and all projections of layers are compressed but the routers'. Beside it, by HF's names,
    what the package makes of it: expected.safetensors in float32, decompressed.safetensors as it returns it.
    """
    import torch
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
    from safetensors.torch import save_file

    scheme = preset_name_to_scheme(preset or PRESETS[form], ["Linear"])
    whole = hf_tensors(SMALL, seed=seed)
    stored, exact, rounded = {}, {}, {}
    for name, array in per_expert(whole).items():
        weight = torch.tensor(array.astype(mx.float32).tolist()).bfloat16()
        if name.endswith("_proj.weight") and ".layers." in name and "router" not in name and not is_vision(name):
            module = name.removesuffix(".weight")
            tensors, exact[name], rounded[name] = _compress(weight, scheme)
            stored |= {f"{module}.{part}": tensor for part, tensor in tensors.items()}
        else:
            stored[name] = weight
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=scheme.format.value, quantization_status=QuantizationStatus.COMPRESSED
    ).model_dump(mode="json")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, "quantization_config": config}, indent=1))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(_stacked(exact, whole), folder / "expected.safetensors")
    save_file(_stacked(rounded, whole), folder / "decompressed.safetensors")
    return folder


def _compress(weight: Any, scheme: Any) -> tuple[dict[str, Any], Any, Any]:
    """By the package: what it stores of a matrix, that dequantised in float32, and as its `decompress` does."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = scheme.weights
    scheme.format = infer_module_format(torch.nn.Linear, scheme)
    state = {"weight": weight}
    groups = weight if args.group_size is None else weight.unflatten(-1, (-1, args.group_size))
    low, high = (getattr(groups, f"a{kind}")(dim=-1, keepdim=args.group_size is None) for kind in ("min", "max"))
    if scheme.format.value == "nvfp4-pack-quantized":
        state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
        state["input_global_scale"] = torch.tensor([2.5])
    state["weight_scale"], zero = calculate_qparams(low, high, args, state.get("weight_global_scale"))
    if not args.symmetric:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
    stored = compressor.compress(state, scheme)
    codes = stored.get("weight")
    if codes is None:
        packed = stored["weight_packed"]
        codes = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2) if args.num_bits == 4 else packed
    exact = dequantize(
        codes.float(),
        stored["weight_scale"].float(),
        args=args,
        dtype=torch.float32,
        global_scale=stored.get("weight_global_scale"),
    )
    return stored, exact, compressor.decompress(stored, scheme)["weight"]


def _stacked(tensors: dict[str, Any], whole: dict[str, mx.array]) -> dict[str, Any]:
    """Per-expert torch tensors as HF's stacks."""
    import torch

    out = {name: tensor for name, tensor in tensors.items() if name in whole}
    for name, array in whole.items():
        if ".experts." in name:
            rows = [tensors[f"{part.name}.weight"] for part in expert_parts(name, array.shape[0])]
            out[name] = torch.cat(rows).reshape(array.shape)
    return out


if __name__ == "__main__":
    for form in PRESETS:
        (write_compressed(DATA / form, form) / "decompressed.safetensors").unlink()
