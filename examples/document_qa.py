"""Questions about a long document, which is read once.

The document goes through the compressed cache in pieces. Every question then starts from a copy of that cache, so that
it is answered without reading the document again, and without knowing the other questions.

    python examples/document_qa.py README.md "Which command publishes codebooks?" "What is refused?"
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from common import add_cache_arguments, add_model_arguments, held, load_compressed, run
from conversation import Conversation


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="a text file")
    parser.add_argument("questions", nargs="+", metavar="question")
    parser.add_argument("--new-tokens", type=int, default=128, help="longest answer (default: 128)")
    add_model_arguments(parser)
    add_cache_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    text = args.document.read_text(encoding="utf-8", errors="replace")
    model, tokenizer = load_compressed(args)

    document = Conversation(model, tokenizer)
    start = time.perf_counter()
    left_out = document.read(text, reserve=args.new_tokens + 512)
    print(f"Read {args.document} in {time.perf_counter() - start:.1f} s: {held(document.cache)}")
    if left_out:
        print(f"The last {left_out:,} tokens had no place in the model's context of {document.context:,}.")

    for question in args.questions:
        start = time.perf_counter()
        answer = document.fork().ask(question, args.new_tokens)
        print(f"\n> {question}\n{answer}\n({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    run(main)
