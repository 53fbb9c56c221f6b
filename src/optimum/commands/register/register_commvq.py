"""``optimum-cli commvq ...``: the commands of ``transformers-commvq`` under optimum's roof.

optimum imports every module in ``optimum.commands.register`` whichever command was asked for, so this one imports
nothing heavy until ``commvq`` itself is run.
"""

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

PROGRAM = "optimum-cli commvq"


class CommVQCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(
        name="commvq", help="Compress the KV cache of RoPE language models to 2 or 1 bits an element."
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("arguments", nargs=argparse.REMAINDER)
        parser.format_help = _format_help  # the help of the real parser, built only when it is asked for

    def run(self) -> None:
        from transformers_commvq.cli import main

        raise SystemExit(main(self.args.arguments, prog=PROGRAM))


def _format_help() -> str:
    from transformers_commvq.cli import build_parser

    return build_parser(PROGRAM).format_help()


REGISTER_COMMANDS = [CommVQCommand]
