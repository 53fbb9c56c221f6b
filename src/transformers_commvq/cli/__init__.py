"""The command ``transformers-commvq``.

Each module named in COMMANDS is one subcommand: ``NAME``, ``HELP``, ``add_arguments(parser)`` and ``run(args) -> int``.
They import what is heavy inside ``run``, so that help stays quick.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from ..config import CommVQError

COMMANDS = ("learn", "eval", "inspect", "estimate", "serve", "push", "demo", "import_paper", "cards")
PROGRAM = "transformers-commvq"


def build_parser(prog: str = PROGRAM) -> argparse.ArgumentParser:
    """The parser of all commands; ``args.run`` of a parsed command is its function."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Compress the KV cache of RoPE language models to 2 or 1 bits an element (CommVQ)."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        command = commands.add_parser(
            module.NAME,
            help=module.HELP,
            description=module.HELP,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Run one command and return the process's exit code.

    2: a mistake in the arguments or an error this package explains, as one line on stderr; 130: interrupted.
    """
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return args.run(args)
    except CommVQError as error:
        print(f"{prog} {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog} {args.command}: interrupted", file=sys.stderr)
        return 130
