"""What the example scripts share: arguments that name a model, loading it, and errors told in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from transformers_commvq import CommVQCache, CommVQConfig, CommVQError, enable

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # its codebooks ship with the package


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=MODEL, metavar="ID", help=f"Hub id or folder (default: {MODEL})")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of a model that is loaded from a folder")
    parser.add_argument("--device", default="cpu", help="where the model runs: cpu, cuda, ... (default: cpu)")


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=float, default=2.0, help="mean bits of a key or value element (default: 2)")
    parser.add_argument("--codebook", metavar="FOLDER_OR_REPO", help="for models without codebooks in the package")


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """(model in eval mode, tokenizer)."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    return model.to(args.device).eval(), tokenizer


def load_compressed(args: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    """The same, with a compressed cache wherever the model makes one."""
    model, tokenizer = load(args)
    return enable(model, CommVQConfig(bits=args.bits, codebook=args.codebook, base_model=args.base_model)), tokenizer


def held(cache: CommVQCache) -> str:
    """What a cache holds, in words."""
    report = cache.memory_report()
    return (
        f"{report['tokens']:,} tokens in {report['total'] / 2**20:.1f} MiB, {report['fp16'] / 2**20:.1f} MiB as fp16 "
        f"({report['ratio']:.0%})"
    )


def run(main: Callable[[], None]) -> None:
    """Call a script's main and leave the process: 1 after an error that is understood, which is told in one line."""
    try:
        main()
    except (CommVQError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
