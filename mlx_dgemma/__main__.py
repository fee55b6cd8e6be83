"""`python -m mlx_dgemma COMMAND ...`: each command of the package, without its dotted name."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "generate": ("mlx_dgemma.generate", "answer a prompt"),
    "convert": ("mlx_dgemma.convert.command", "quantise, dequantise, export a checkpoint"),
    "check": ("mlx_dgemma.check.command", "is the port right on this machine, and how fast is each mode here?"),
    "parity": ("mlx_dgemma.parity.command", "record what the reference computes; check this machine against it"),
    "train_drafter": ("mlx_dgemma.drafter.training.command", "train a block drafter for a model"),
}


def main() -> None:
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print("usage: python -m mlx_dgemma COMMAND [options]\n\ncommands (each with --help):")
        for command, (_, does) in COMMANDS.items():
            print(f"  {command:14} {does}")
    elif name in COMMANDS:
        import_module(COMMANDS[name][0]).main(rest)
    else:
        print(f"mlx_dgemma: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
