"""Chat with a book: many turns, streamed, one compressed cache from the first to the last.

Each line of standard input is a message; an empty line, or the end of the input, ends the chat. A turn reads its own
message only: the book and all earlier turns are in the cache.

    python examples/chat_with_book.py book.txt
    printf 'Who is the hero?\\nWhere does he live?\\n' | python examples/chat_with_book.py book.txt
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from common import add_cache_arguments, add_model_arguments, held, load_compressed, run
from conversation import Conversation
from transformers import TextStreamer


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("book", type=Path, help="a text file")
    parser.add_argument("--new-tokens", type=int, default=256, help="longest answer of a turn (default: 256)")
    parser.add_argument(
        "--reserve", type=int, default=2048, help="tokens of the model's context to keep for the chat (default: 2048)"
    )
    add_model_arguments(parser)
    add_cache_arguments(parser)
    return parser


def messages() -> Iterator[str]:
    """Lines of standard input, up to an empty one; a prompt is shown if somebody is typing."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    text = args.book.read_text(encoding="utf-8", errors="replace")
    model, tokenizer = load_compressed(args)

    chat = Conversation(model, tokenizer)
    print(f"Reading {args.book} ...", flush=True)
    start = time.perf_counter()
    left_out = chat.read(text, args.reserve)
    print(f"{held(chat.cache)}, read in {time.perf_counter() - start:.1f} s")
    if left_out:
        print(f"The last {left_out:,} tokens had no place in the model's context of {chat.context:,}.")

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for message in messages():
        start = time.perf_counter()
        chat.ask(message, args.new_tokens, streamer)
        print(f"({held(chat.cache)}; {time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    run(main)
