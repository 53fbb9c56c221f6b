"""Publish codebooks on the Hub: look at what would be sent, then send it with --push.

Without --push nothing is sent: the codebooks are verified, the card is built and written beside them as README.md, and
the files and their tag are listed. The license is the base model's; name it, or its card on the Hub is asked for it.

    python examples/publish.py books/Qwen3-0.6B-CommVQ-2bit your-name/Qwen3-0.6B-CommVQ-2bit --license apache-2.0
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import run

from transformers_commvq.cards import License
from transformers_commvq.publish import README, package, push


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="codebook folder, as learn writes it")
    parser.add_argument("repo_id", metavar="org/name", help="repository; made if it is missing")
    parser.add_argument("--license", metavar="ID", help="license of the base model, e.g. apache-2.0")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the model, if it was learned from a local copy")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--push", action="store_true", help="send it; needs `hf auth login`")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    named = {"license": License(args.license) if args.license else None, "base_model": args.base_model}

    ready = package(args.folder, args.repo_id, **named)
    card = args.folder / README
    card.write_bytes(ready.files[README])
    print(f"{ready.book.bits:g}-bit codebooks of {ready.book.geometry.id}; the card is in {card}")
    for name, content in ready.files.items():
        print(f"{len(content):>12,} bytes  {name}")
    if not args.push:
        print(f"Nothing was sent. With --push: {args.repo_id}, tag {ready.tag}")
        return

    done = push(args.folder, args.repo_id, private=args.private, **named)
    print(f'Sent. Use it: kv_cache={{"codebook": "{done.repo_id}", "revision": "{done.tag}"}}')


if __name__ == "__main__":
    run(main)
