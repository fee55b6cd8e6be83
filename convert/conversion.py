"""One conversion: a source, what becomes of each of its tensors, and the files beside them.

Source --tensors, as floats--> jobs --engine--> shards     (a slice of a tensor at a time)
                                ^
            recipe --plan-------+-----------> config.json's `quantization`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoint import ITEM_BYTES
from ..config import read_json
from ..errors import InputError, UsageError
from ..folders import expanded, require_new
from ..loading import read_generation_config, resolve
from .card import Origin, card
from .configs import gemma4_config, mlx_config
from .engine import Job, run, verify
from .journal import fingerprint
from .names import gemma4_modules, gemma4_name, gemma4_parts, is_vision, mlx_name, module_of
from .recipes import FLOATS, Plan, Recipe, Scheme, get_recipe, modules, plan, uniform
from .shards import MLX, Output, to_bytes
from .sources import FloatTensor, Source, spans
from .upload import check_repo, upload
from .values import check_values

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
EXPORTS = ("mlx", "gemma4", "hf")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
SIDE_FILES = (
    *TOKENIZERS,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json"),
)


@dataclass(frozen=True)
class Options:
    """What is asked for; see `convert`."""

    quantize: bool = False
    q_bits: int | None = None
    q_group_size: int | None = None
    q_mode: str | None = None
    quant_recipe: str | None = None
    dtype: str | None = None
    dequantize: bool = False
    export: str = "mlx"

    def recipe(self) -> Recipe | None:
        """The recipe, None for floats. Raises UsageError for options that contradict each other."""
        by_recipe = self.quant_recipe is not None
        for name in ("quant_recipe", "dtype", "export"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | Path):
                raise UsageError(f"{name} must be a name, not {value!r:.80}")
        given = [name for name in ("q_bits", "q_group_size", "q_mode") if getattr(self, name) is not None]
        if given and (by_recipe or not self.quantize):
            other = "a recipe has its own" if by_recipe else "say -q as well"
            raise UsageError(f"{given[0]} is an option of plain quantisation; {other}")
        if self.quantize and by_recipe:
            raise UsageError("-q quantises every module alike, a recipe does not; choose one")
        if self.dequantize and (self.quantize or by_recipe):
            raise UsageError("dequantize and quantisation contradict each other; choose one")
        if self.export not in EXPORTS:
            raise UsageError(f"export must be one of {', '.join(EXPORTS)}, not {self.export!r}")
        if self.export == "hf" and (self.quantize or by_recipe):
            raise UsageError("export hf writes floats for transformers; leave quantisation out")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if by_recipe:
            return get_recipe(self.quant_recipe)
        if self.quantize:
            return uniform(bits=self.q_bits, group_size=self.q_group_size, mode=self.q_mode)
        return None


class Conversion:
    """A source, opened, and what is to become of it.

    Attributes:
        keeps: whether what is quantised goes over as it is: MLX's own into Gemma 4's tree.

    Raises InputError for a source that is not whole, UsageError for options that do not fit it.
    """

    def __init__(self, folder: Path, options: Options):
        self.options, self.recipe = options, options.recipe()
        self.source = Source.open(folder)
        is_untold = self.source.form != "float" and self.recipe is None and not options.dequantize
        self.keeps = is_untold and options.export == "gemma4" and self.source.form == "mlx"
        if is_untold and not self.keeps:
            ways = "--dequantize" if options.export == "hf" else "--dequantize, -q or --quant-recipe"
            raise UsageError(f"{folder}: is quantised ({self.source.form}); say {ways}")
        if self.keeps and options.dtype is not None:
            raise UsageError(f"{folder}: is quantised and goes over as it is; leave dtype out, or quantise it anew")
        is_wanted = gemma4_name if options.export == "gemma4" else str
        self.tensors = {name: tensor for name, tensor in self.source.tensors().items() if is_wanted(name)}
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        self.plan: Plan = self._plan()

    def _plan(self) -> Plan:
        if not self.keeps:
            return plan(self.recipe or FLOATS, modules(self.shapes))
        for name, tensor in self.tensors.items():
            if len(tensor.stored) > 1 and tensor.packed is None:
                raise InputError(f"{self.source.folder}: {name} is stored expert by expert; say -q or --quant-recipe")
        packed = {module_of(name): tensor.packed for name, tensor in self.tensors.items() if len(tensor.shape) > 1}
        return Plan(modules(self.shapes), {module: own and own.scheme for module, own in packed.items()})

    def jobs(self) -> list[Job]:
        """A job per tensor of HF's tree, in its order."""
        return [self._job(name, tensor) for name, tensor in self.tensors.items()]

    def _job(self, name: str, tensor: FloatTensor) -> Job:
        dtype, scheme = self.dtype_of(tensor), self.scheme_of(name)
        return self._quantised(name, tensor, dtype, scheme) if scheme else self._plain(name, tensor, dtype)

    def dtype_of(self, tensor: FloatTensor | Source) -> str:
        """Of its floats, or of its scales; of a source: of most."""
        wanted = self.options.dtype or (self.recipe.dtype if self.recipe else None)
        return DTYPES[wanted] if wanted else tensor.dtype

    def scheme_of(self, name: str) -> Scheme | None:
        is_matrix = len(self.shapes[name]) > 1 and not is_vision(name)
        return self.plan.schemes.get(module_of(name)) if is_matrix else None

    def _plain(self, name: str, tensor: FloatTensor, dtype: str) -> Job:
        names = {"mlx": mlx_name, "hf": str, "gemma4": gemma4_name}
        output = Output(names[self.options.export](name), dtype, tensor.shape)
        return Job((output,), partial(_floats, tensor, dtype))

    def _quantised(self, name: str, tensor: FloatTensor, dtype: str, scheme: Scheme) -> Job:
        """Weight, scales and biases; in Gemma 4's tree, those of gate and of up apart."""
        stem = mlx_name(name).removesuffix("weight")
        *rows, width = tensor.shape
        words, groups = width * scheme.bits // 32, width // scheme.group_size
        kinds = {"weight": ("U32", words), "scales": ("U8" if scheme.mode != "affine" else dtype, groups)}
        if scheme.mode == "affine":
            kinds["biases"] = (dtype, groups)
        outputs, halves = [], 1
        for kind, (stored, columns) in kinds.items():
            targets = [stem + kind]
            if self.options.export == "gemma4":
                targets = [part.name for part in gemma4_parts(stem + kind)]
            halves = len(targets)
            shape = rows if halves == 1 else [*rows[:-1], rows[-1] // halves]
            outputs += [Output(target, stored, (*shape, columns)) for target in targets]
        parts = partial(_packed, tensor) if self.keeps else partial(_quantised, tensor, dtype, scheme)
        return Job(tuple(outputs), partial(_in_halves, parts, halves))

    def files(self, origin: Origin, name: str) -> dict[str, bytes | Path]:
        """config.json, tokenizer, generation config, model card (of which `card` says what the arguments are)."""
        folder = self.source.folder
        files: dict[str, bytes | Path] = {file: folder / file for file in SIDE_FILES if (folder / file).is_file()}
        # what nobody could load is not passed on
        for file in [file for file in files if file.endswith(".json")]:
            read_json(folder / file)
        generation = read_generation_config(folder, self.source.config)
        if self.options.export == "gemma4":
            ids = {"eos_token_id": list(generation.eos_token_ids) or None, "pad_token_id": generation.pad_token_id}
            files["generation_config.json"] = _json(ids | {"bos_token_id": self.source.config.bos_token_id})
        files["config.json"] = _json(self.config())
        files["README.md"] = card(self, origin, name).encode()
        return files

    def config(self) -> dict[str, Any]:
        """config.json of the result."""
        stored = next(long for long, short in DTYPES.items() if short == self.dtype_of(self.source))
        if self.options.export == "gemma4":
            generation = read_generation_config(self.source.folder, self.source.config)
            config = gemma4_config(self.source.config, generation.eos_token_ids, stored)
            block = self.plan.block(gemma4_modules)
        else:
            config = {k: v for k, v in self.source.raw.items() if k not in ("quantization", "quantization_config")}
            if self.options.export == "mlx":
                config = mlx_config(config, self.source.config, has_vision=any(map(is_vision, self.tensors)))
            config, block = config | {"dtype": stored}, self.plan.block()
        if block is not None:
            config |= {"quantization": block, "quantization_config": block}
        return dict(sorted(config.items()))

    @property
    def bits_per_weight(self) -> float:
        return self.plan.bits_per_weight(self.shapes, ITEM_BYTES[self.dtype_of(self.source)])


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    *,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str | None = None,
    quant_recipe: str | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    export: str = "mlx",
    verify_output: bool = False,
    upload_repo: str | None = None,
    progress: bool = True,
) -> Path:
    """Convert a checkpoint, a slice of a tensor at a time; returns the folder it wrote.

    The output grows in a hidden folder beside `mlx_path` and is renamed when it is whole; the same
    call after an interruption goes on where it was.

    Args:
        hf_path: "nano", a folder or a Hub id: floats, MLX-quantised, or compressed-tensors FP8 and NVFP4.
        mlx_path: the folder to write; must not exist.
        quantize: every module alike, as mlx_lm: q_bits, q_group_size, q_mode (affine, mxfp4, nvfp4, mxfp8).
        quant_recipe: instead, a recipe by name or a file of rules; see `recipes`.
        dtype: of what is not quantised: float32, float16, bfloat16; by default as it is.
        dequantize: a quantised source to floats.
        export: "mlx"; "gemma4", ar mode as a plain Gemma 4 text model; "hf", back for transformers.
        verify_output: read all of it again, and compare, before the folder gets its name.
        upload_repo: a Hub id to send the result to; the Hub's client takes the token from where `hf auth login` put it.

    Raises:
        InputError, UsageError: one line that says what is wrong and where.
    """
    options = Options(quantize, q_bits, q_group_size, q_mode, quant_recipe, dtype, dequantize, export)
    options.recipe()  # contradictions, and an output that exists, are said before anything is downloaded
    target = expanded(mlx_path)
    require_new(target)
    if upload_repo is not None:
        check_repo(upload_repo)
    conversion = Conversion(resolve(hf_path, revision), options)
    source = conversion.source

    def check(folder: Path) -> None:
        verify(folder, partial(check_values, conversion, progress=progress), progress=progress)

    out = run(
        conversion.jobs(),
        target,
        fingerprint=fingerprint(
            [source.folder / "config.json", *sorted({info.shard for info in source.checkpoint.tensors.values()})],
            vars(options) | {"quant_recipe": str(options.quant_recipe), "plan": conversion.config()},
        ),
        files=conversion.files(Origin(str(hf_path), revision), upload_repo or target.name),
        metadata={"format": "pt" if export == "hf" else "mlx"},
        progress=progress,
        total_parameters=sum(map(prod, conversion.shapes.values())),
        check=check if verify_output else None,
    )
    if progress and not any((out / name).exists() for name in TOKENIZERS):
        print(f"{out}: without tokenizer.json, which the source does not have; add it to generate", file=sys.stderr)
    if progress:
        print(f"{out}: {conversion.bits_per_weight:.3f} bits per weight", file=sys.stderr)
    if upload_repo is not None:
        upload(out, upload_repo)
    return out


def _floats(tensor: FloatTensor, dtype: str) -> Iterator[tuple[int, memoryview]]:
    for first, last in spans(tensor):
        yield 0, to_bytes(tensor.read(first, last).astype(MLX[dtype]))


def _quantised(tensor: FloatTensor, dtype: str, scheme: Scheme) -> Iterator[Sequence[mx.array]]:
    """Words, scales and, in affine mode, biases, rows after rows."""
    for first, last in spans(tensor):
        yield mx.quantize(tensor.read(first, last).astype(MLX[dtype]), **scheme.settings())


def _packed(tensor: FloatTensor) -> Iterator[Sequence[mx.array]]:
    """The same as the source has them."""
    for first, last in spans(tensor):
        yield tensor.packed.read(first, last)


def _in_halves(parts: Callable[[], Iterator[Sequence[mx.array]]], halves: int) -> Iterator[tuple[int, memoryview]]:
    """What a job produces of parts: each by itself, or its upper rows and its lower rows apart."""
    for arrays in parts():
        pieces = [half for array in arrays for half in (mx.split(array, halves, axis=-2) if halves > 1 else [array])]
        for index, piece in enumerate(pieces):
            yield index, to_bytes(piece)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=4) + "\n").encode()
