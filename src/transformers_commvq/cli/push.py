"""``push``: publish codebooks and their card on the Hub."""

from __future__ import annotations

import argparse

NAME = "push"
HELP = "publish a codebook folder and its card on the Hugging Face Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="codebook folder, as learn writes it")
    parser.add_argument("repo_id", metavar="org/name", help="repository, e.g. org/Model-CommVQ-2bit; made if missing")
    parser.add_argument("--license", help="license of the base model, e.g. apache-2.0; asked of its card by default")
    parser.add_argument("--license-name", help="name of a license that the Hub has no identifier for")
    parser.add_argument("--license-link", help="URL of that license")
    parser.add_argument(
        "--base-model", help="Hub id of the base model, if the codebooks were learned from a local copy"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="check, list what would be sent, send nothing")


def run(args: argparse.Namespace) -> int:
    from ..cards import License
    from ..publish import package, push

    license = License(args.license, args.license_name, args.license_link) if args.license else None
    if args.dry_run:
        ready = package(args.folder, args.repo_id, license=license, base_model=args.base_model)
        for name, content in ready.files.items():
            print(f"{len(content):>12,} bytes  {name}")
        print(f"tag {ready.tag}; nothing was sent.")
        return 0
    done = push(args.folder, args.repo_id, license=license, base_model=args.base_model, private=args.private)
    print(f"{done.repo_id} at commit {done.revision}")
    print(f'Use: kv_cache={{"codebook": "{done.repo_id}", "revision": "{done.tag}"}}')
    return 0
