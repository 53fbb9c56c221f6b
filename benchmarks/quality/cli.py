"""Perplexity and KL divergence against memory, of every cache, on the same text.

    python -m benchmarks.quality --text "encyclopedic prose=prose.txt" "word problems=problems.jsonl"
    python -m benchmarks.quality --text ... --methods commvq-2 commvq-1 --again      ours alone, once more
    python -m benchmarks.quality --part plots

The last tenth of each text is measured on; codebooks that are not shipped are learned from the rest, as is the paper's
own code. Results go to one json file, which is written after every method: a run that was stopped goes on where it
was, and two runs may share the work. Bits are counted on tensors, in bfloat16; quality is measured in float32.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from transformers_commvq import demo_model
from transformers_commvq.config import CommVQError
from transformers_commvq.contenders import ContenderUnavailableError
from transformers_commvq.evaluation import Reference, kept_reference, streaming_quality
from transformers_commvq.recipe import Recipe
from transformers_commvq.storage import bits_per_element, elements_gained
from transformers_commvq.text import read_file

from . import report
from .methods import METHODS, Setting, held_out, method

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality-smollm2.json"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=[], metavar="LABEL=FILE", help="text files, or GSM8K's jsonl")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--again", action="store_true", help="measure methods that have results already")
    parser.add_argument("--windows", type=int, default=3, help="windows a text")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a step")
    parser.add_argument(
        "--tokens", type=int, default=Recipe.tokens, help="to learn codebooks from that are not shipped"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the json file; the plot goes beside it")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "quality", help="where learned codebooks are kept")
    parser.add_argument("--part", choices=("measure", "plots"), default="measure")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers|optimum|hqq|torch")
    try:
        if args.part == "measure":
            if not args.text or not all("=" in pair for pair in args.text):
                parser.error("--text LABEL=FILE: name at least one text, and what to call it.")
            model, tokenizer = demo_model.load(torch.float32)
            texts = {label: read_file(path) for label, _, path in (pair.partition("=") for pair in args.text)}
            setting = Setting(demo_model.BASE_MODEL, tokenizer, texts, args.work, Recipe(tokens=args.tokens))
            measure(model, setting, args)
    except CommVQError as error:
        parser.error(str(error))
    print(report.table(report.read(args.results)))
    report.draw(args.results)
    return 0


def measure(model: PreTrainedModel, setting: Setting, args: argparse.Namespace) -> None:
    """Measure the methods that have no results yet, or all that are named."""
    windows = held_out(setting, args.windows, args.length)
    settings = {
        "model": setting.base_model,
        "length": args.length,
        "chunk": args.chunk,
        "texts": {label: {"windows": len(w), "tokens": _digest(w)} for label, w in windows.items()},
    }
    with _results(args, settings) as results:
        todo = [name for name in args.methods if args.again or name not in results["methods"]]
    if not todo:
        return
    small = copy.deepcopy(model).to(torch.bfloat16)
    gained = elements_gained(small)
    references = {label: kept_reference(model, w, args.chunk) for label, w in windows.items()}
    for name in todo:
        started = time.monotonic()
        try:
            row = one(name, model, setting, windows, references, args.chunk)
            with method(name, small, setting) as make:
                row["bits"] = round(bits_per_element(small, make, gained=gained), 4)
        except ContenderUnavailableError as error:
            print(f"{name}: left out, {error}")
            row = {"left_out": str(error)}
        row["seconds"] = round(time.monotonic() - started, 1)
        with _results(args, settings) as results:
            results["methods"][name] = row
        if "texts" in row:
            print(report.table({"methods": {name: row}}).splitlines()[-1], flush=True)


def one(
    name: str,
    model: PreTrainedModel,
    setting: Setting,
    windows: Mapping[str, Sequence[torch.Tensor]],
    references: Mapping[str, Reference],
    chunk: int,
) -> dict[str, Any]:
    """One method's quality, and what it was measured with."""
    row: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__}
    with method(name, model, setting) as make:
        codebook = getattr(make(model), "codebook", None)
        if codebook is not None and codebook.sha256:
            row["codebook"] = {"sha256": codebook.sha256[:16], "tokens": codebook.calibration.get("tokens")}
        row["texts"] = {
            label: streaming_quality(model, make, w, chunk, reference=references[label]).to_dict()
            for label, w in windows.items()
        }
    return row


@contextmanager
def _results(args: argparse.Namespace, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The results so far, to read and change; a change is written at the end, while no other process has them.

    Raises CommVQError when the file is of other settings.
    """
    for folder in (args.results.parent, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(args.work / f"{args.results.stem}.lock"):
        before = (
            json.loads(args.results.read_text()) if args.results.exists() else {"settings": settings, "methods": {}}
        )
        if before["settings"] != settings:
            raise CommVQError(
                f"{args.results} was measured with other settings or texts, and results must be of one kind. "
                "Fix: --results with another file, or remove this one."
            )
        results = copy.deepcopy(before)
        yield results
        if results != before:
            results["methods"] = {name: results["methods"][name] for name in METHODS if name in results["methods"]}
            partial = args.results.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1) + "\n")
            partial.replace(args.results)


def _digest(windows: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.numpy().tobytes())
    return digest.hexdigest()[:16]
