"""``cards``: for maintainers; rebuilds the registry and the cards of the codebooks shipped in the package."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

NAME = "cards"
HELP = "rebuild registry.json and hub_cards/ from the codebooks in the package (for maintainers)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("hub_cards"), help="folder of the cards")
    parser.add_argument("--org", default="transformers-commvq", help="namespace the repositories would be under")
    parser.add_argument("--license", help="base model's license, for a codebook that the registry does not have yet")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not up to date")


def run(args: argparse.Namespace) -> int:
    from .. import hub
    from ..cards import PICTURES

    registry = build_registry(args.license)
    stale = _put(hub.REGISTRY_FILE, (json.dumps(registry, indent=2) + "\n").encode(), args.check)
    for name, card in build_cards(registry, args.org).items():
        stale += _put(args.out / name / "README.md", card.encode(), args.check)
        for picture in PICTURES:
            path = hub.PACKAGED / name / picture
            if path.is_file():
                stale += _put(args.out / name / picture, path.read_bytes(), args.check)
    for path in stale:
        print(f"not up to date: {path}" if args.check else f"written: {path}")
    if args.check and stale:
        print("Fix: make cards")
        return 1
    return 0


def build_registry(license: str | None = None) -> dict:
    """The registry with an entry for each codebook in the package; entries that name a repository are kept.

    license: for codebooks that the present registry does not have; the others keep theirs.

    Raises:
        CardError: a codebook without a license, of no Hub model, or at a rate that is nobody's.
        CodebookError: a damaged codebook.
    """
    from .. import hub
    from ..cards import CardError, License
    from ..codebook import Codebook

    old = hub.read_registry()
    licenses = {e["packaged"]: e["license"] for rates in old.values() for e in rates.values() if "packaged" in e}
    new = {
        model: kept for model, rates in old.items() if (kept := {b: e for b, e in rates.items() if "packaged" not in e})
    }
    for folder in sorted(path for path in hub.PACKAGED.glob("*") if path.is_dir()):
        book = Codebook.load(folder)
        model, rate = book.geometry.id, f"{round(book.bits, 1):g}"
        chosen = licenses.get(folder.name, license)
        if chosen is None:
            raise CardError(f"{folder.name}: the license of {model} is not recorded. Fix: --license ID")
        License(chosen)
        if not hub.is_hub_id(model) or not hub.rates_agree(book.bits, float(rate)) or rate in new.get(model, {}):
            raise CardError(f"{folder}: {book.bits:.3g} bits of {model!r}: expected a Hub id, one codebook a rate.")
        new.setdefault(model, {})[rate] = {"packaged": folder.name, "sha256": book.sha256, "license": chosen}
    return {model: dict(sorted(rates.items())) for model, rates in sorted(new.items())}


def build_cards(registry: dict, org: str) -> dict[str, str]:
    """Repository name -> README.md of each codebook in the package, as push would upload it.

    Raises CardError for one that cannot be published, e.g. because it was never measured.
    """
    from .. import hub
    from ..cards import License, make_card

    return {
        entry["packaged"]: make_card(
            hub.PACKAGED / entry["packaged"], f"{org}/{entry['packaged']}", License(entry["license"])
        )
        for rates in registry.values()
        for entry in rates.values()
        if "packaged" in entry
    }


def _put(path: Path, data: bytes, check: bool) -> list[Path]:
    """Write a file if its contents are other; returns it then."""
    if path.is_file() and path.read_bytes() == data:
        return []
    if not check:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return [path]
