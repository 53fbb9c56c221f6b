"""``import-paper``: use the codebooks that the CommVQ authors published."""

from __future__ import annotations

import argparse

NAME = "import-paper"
HELP = "convert the CommVQ authors' published codebooks into a codebook folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("keys", metavar="KEY_REPO", help="Hub id or folder of the LLL_G.pt files")
    parser.add_argument("values", metavar="VALUE_REPO", help="Hub id or folder of the checkpoint with value_vq_model")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--base-model", help="Hub id of the model they are for, e.g. meta-llama/Llama-3.1-8B-Instruct")
    parser.add_argument("--license", help="license of that model, e.g. llama3.1; asked of its card by default")


def run(args: argparse.Namespace) -> int:
    from ..cards import License
    from ..paper_import import import_paper

    license = License(args.license) if args.license else None
    book = import_paper(args.keys, args.values, args.out, args.base_model, license)
    print(f"{args.out}: {book.bits:.4g} bits an element, {book.token_bytes:,} bytes a token, for {book.geometry.id}")
    print(f"Use: kv_cache={str(args.out)!r}")
    return 0
