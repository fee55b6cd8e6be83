"""The command `mlx_dgemma.convert`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..command import Parser, run_command

RECIPE_NAMES = "default, mlx-community-4bit, 8bit, bf16, mxfp4, nvfp4"


def main(argv: Sequence[str] | None = None) -> None:
    run_command(_command, argument_parser(), argv)


def argument_parser() -> argparse.ArgumentParser:
    """Flags are spelled as in mlx_lm where it has them."""
    parser = Parser(
        prog="mlx_dgemma.convert",
        description="Convert a DiffusionGemma checkpoint in little memory; interrupted, the same command goes on.",
    )
    add = parser.add_argument
    add("--hf-path", "--model", required=True, help='what to convert: a folder, a Hub id, or "nano"')
    add("--mlx-path", default="mlx_model", help="the folder to write; must not exist (default: mlx_model)")
    add("--revision", help="of the Hub repository (default: its main branch)")
    add("--dtype", help="of what is not quantised: float32, float16, bfloat16 (default: as it is)")
    add("--dequantize", "-d", action="store_true", help="a quantised source to floats")
    add("--export", default="mlx", help="mlx; gemma4: ar mode for mlx_lm; hf: back for transformers (default: mlx)")
    add("--upload-repo", metavar="ID", help="send the result to this Hub repository")
    add("--verify", action="store_true", help="read the result again and compare it with what was written")
    group = parser.add_argument_group("quantisation")
    add = group.add_argument
    add("--quantize", "-q", action="store_true", help="every module alike, as mlx_lm does")
    add("--q-bits", type=int, help="(the mode's: 4, mxfp8: 8)")
    add("--q-group-size", type=int, help="(the mode's: affine 64, mxfp4 and mxfp8 32, nvfp4 16)")
    add("--q-mode", help="affine, mxfp4, nvfp4, mxfp8 (affine)")
    add("--quant-recipe", metavar="NAME|FILE", help=f"instead of -q: {RECIPE_NAMES}, or a JSON file of rules")
    parser.add_argument("--debug", action="store_true", help="show a traceback if something fails")
    return parser


def _command(args: argparse.Namespace) -> None:
    from .conversion import convert

    out = convert(
        args.hf_path,
        args.mlx_path,
        quantize=args.quantize,
        q_bits=args.q_bits,
        q_group_size=args.q_group_size,
        q_mode=args.q_mode,
        quant_recipe=args.quant_recipe,
        dtype=args.dtype,
        dequantize=args.dequantize,
        revision=args.revision,
        export=args.export,
        verify_output=args.verify,
        upload_repo=args.upload_repo,
    )
    print(out)


if __name__ == "__main__":
    main()
