"""Model cards of codebook repositories: every number comes from the artefact, none is written by hand."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .codebook import CONFIG_FILE, LIBRARY, TENSOR_FILE, Codebook
from .config import CommVQError
from .estimate import CacheShape, compressed_bytes, plain_bytes

README = "README.md"
PICTURES = {  # what ``learn`` draws, and how a card names it
    "bits.png": "Bits an element of every head, by layer: keys and values",
    "loss.png": "Error of every head, round by round of learning: keys and values",
}
TEMPLATE_FILE = Path(__file__).with_name("card_template.md")
TAG_PREFIX = "commvq-"  # of the tags that name an artefact by its hash
TAG_DIGITS = 32
CONTEXTS = (4096, 32768, 131072)  # tokens, rows of the memory table
CARD_BACKEND = "blockwise"  # runs everywhere, and keeps the largest tables; cards are the same on every machine

# Identifiers the Hub takes as ``license:``; checked here because its own check needs the network.
_LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma other
"""

# Fields of a measurement (evaluation.StreamingQuality.to_dict), as the card's columns.
_COLUMNS = (
    ("reference_perplexity", "perplexity, plain", "{:.3f}"),
    ("perplexity", "perplexity, compressed", "{:.3f}"),
    ("change", "change", "{:+.2%}"),
    ("change_standard_error", "± (standard error)", "{:.2%}"),
    ("kl", "KL, nats", "{:.4f}"),
    ("kl_standard_error", "± (standard error)", "{:.4f}"),
    ("windows", "windows", "{:,}"),
    ("tokens", "tokens", "{:,}"),
)
_NAMES = ("dataset", "data", "text", "name")

# By kind of code: what the method is called, and limits of its own.
_METHODS = {
    "sign": "The method is a sign-code form of CommVQ",
    "index": "The method is CommVQ, as its authors published it",
}
_LIMITS = {
    "sign": "",
    "index": """\
- These are index codes, converted from the files that the authors of CommVQ published. Decoding with them is slower
  than with the sign codes that `transformers-commvq learn` makes: keys are gathered from tables, the values of all
  heads are one code, and the compiled CPU loops take sign codes only.
- A token's code belongs to all key/value heads together, so they cannot be split over processes (tensor parallelism).
""",
}
_MEASURED = """\
Measured; lower is better. "Plain" is the same model on the same tokens with its uncompressed cache. KL is the mean
divergence of the next-token distribution from that of the plain cache, in nats."""
_NOT_MEASURED = "Not measured with this plugin. Measure it before you rely on it."


class CardError(CommVQError, ValueError):
    """A codebook cannot be published as it is: its card would lack, or misstate, something."""


@dataclass(frozen=True)
class License:
    """A license as the Hub's metadata has it; ``other`` needs a name.

    Raises CardError for an identifier the Hub does not know.
    """

    id: str
    name: str | None = None
    link: str | None = None

    def __post_init__(self):
        if self.id not in _LICENSES.split():
            raise CardError(
                f"license {self.id!r}: not an identifier of the Hub. Fix: e.g. apache-2.0, mit, llama3.1, gemma, or "
                "other with a name."
            )
        if self.id == "other" and not self.name:
            raise CardError("license 'other' needs a name. Fix: --license-name NAME [--license-link URL]")

    def metadata(self) -> dict[str, str]:
        fields = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {k: v for k, v in fields.items() if v}


def artefact_tag(config_json: bytes) -> str:
    """The tag that names an artefact by content: a hash of config.json, which itself holds the tensors' hash."""
    return TAG_PREFIX + hashlib.sha256(config_json).hexdigest()[:TAG_DIGITS]


def make_card(folder: str | os.PathLike, repo_id: str, license: License) -> str:
    """The README.md of a codebook's repository.

    folder: the artefact, which is verified. repo_id: where it will be.

    Raises:
        CardError: something a card needs is missing; see ``check_publishable``.
        CodebookError: as ``Codebook.load``.
    """
    folder = Path(folder)
    book = Codebook.load(folder)
    check_publishable(book)
    config_json, size = (folder / CONFIG_FILE).read_bytes(), (folder / TENSOR_FILE).stat().st_size
    return render(book, config_json, size, repo_id, license, [name for name in PICTURES if (folder / name).is_file()])


def renew_card(folder: str | os.PathLike) -> None:
    """Write the README.md in a codebook's folder anew, under the license it states; without one, do nothing."""
    path = Path(folder) / README
    if not path.is_file():
        return
    stated = ModelCard.load(path).data
    license = License(stated.license, stated.get("license_name"), stated.get("license_link"))
    path.write_text(make_card(folder, path.resolve().parent.name, license))


def render(
    book: Codebook,
    config_json: bytes,
    tensor_size: int,
    repo_id: str,
    license: License,
    pictures: Iterable[str] = (),
) -> str:
    """``make_card`` from parts that are known to be good.

    config_json: the file's bytes, as they will be uploaded. pictures: those of PICTURES that will lie beside the card.
    """
    base = book.geometry.id
    elements = book.elements_per_token
    rate = f"{book.bits:.4g}"
    metadata = {
        **license.metadata(),
        "base_model": base,
        "base_model_relation": "quantized",
        "library_name": LIBRARY,
        "pipeline_tag": "text-generation",
        "tags": ["commvq", "kv-cache", "kv-cache-quantization", f"{rate}-bit"],
    }
    hashes = {TENSOR_FILE: (tensor_size, book.sha256)}
    hashes[CONFIG_FILE] = (len(config_json), hashlib.sha256(config_json).hexdigest())
    fields = {
        "metadata": ModelCardData(**metadata).to_yaml() + "\n",
        "title": repo_id.split("/")[-1],
        "base": base,
        "repo": repo_id,
        "tag": artefact_tag(config_json),
        "bits": rate,
        "unit": "bit" if rate == "1" else "bits",
        "layers": len(book.layers),
        "token_bytes": f"{book.token_bytes:,}",
        "plain_token_bytes": f"{2 * elements:,}",
        "codebook_size": size(book.nbytes),
        "memory_rows": "\n".join(_memory_rows(book)),
        "pictures": "".join(f"![{PICTURES[name]}]({name})\n\n" for name in pictures),
        "quality": _quality(book.evaluation),
        "calibration": "\n".join(_described(book.calibration)) or "Not recorded.",
        "file_rows": "\n".join(f"| {n} | {s:,} | `{h}` |" for n, (s, h) in sorted(hashes.items())),
        "format_version": json.loads(config_json)["format_version"],
        "codec": codec_line(book),
        "kind_limits": _LIMITS[book.kind],
        "kind_method": _METHODS[book.kind],
        "license": license.name or license.id,
    }
    return Template(TEMPLATE_FILE.read_text()).substitute(fields)


def check_publishable(book: Codebook, base_model: str | None = None) -> None:
    """Raises CardError if the base model is a local path or no Hub id, or quality was never measured.

    base_model: the Hub id of the model, for a codebook that was learned from a local copy of it.
    """
    base = base_model or book.geometry.id
    try:
        validate_repo_id(base)
        is_id = base.count("/") == 1
    except HFValidationError:
        is_id = False
    if not is_id:
        raise CardError(
            f"the base model is recorded as {base!r}, which is no Hub id (org/name). Fix: --base-model org/name, the "
            "model whose weights the codebooks were learned from."
        )
    if base_model is None and Path(base).is_dir():
        raise CardError(
            f"the base model is recorded as {base!r}, which is a local folder. Fix: --base-model org/name, or run "
            f"from another folder if {base} is its Hub id."
        )
    if not list(measurements(book.evaluation)):
        raise CardError(
            "the codebook has no evaluation: its card would make no measured claim. Fix: learn it with evaluation on, "
            "which records perplexity with and without compression in config.json."
        )


def measurements(evaluation: dict[str, Any], name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, measurement) for every dict, at any depth, with finite ``perplexity`` and ``reference_perplexity``."""
    numbers = [evaluation.get("perplexity"), evaluation.get("reference_perplexity")]
    if all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        yield next((str(evaluation[k]) for k in _NAMES if evaluation.get(k)), name), evaluation
    for key, value in evaluation.items():
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, dict):
                yield from measurements(child, str(key))


def codec_line(book: Codebook) -> str:
    """The code in words: kind, and bits of keys and values."""
    sides = {}
    for side in ("keys", "values"):
        books = [getattr(layer, side) for layer in book.layers.values()]
        heads = [n / b.head_dim for b in books for n in b.bits_per_head]
        sides[side] = f"{side} {sum(heads) / len(heads):.2f} ({min(heads):.3g} to {max(heads):.3g})"
    return f"{book.kind} codes; bits an element, mean (range over heads): {sides['keys']}, {sides['values']}"


def size(count: int) -> str:
    """Bytes for people: KiB, MiB or GiB."""
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if count >= 1 << power:
            return f"{count / 2**power:.2f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def _memory_rows(book: Codebook) -> Iterator[str]:
    elements = book.elements_per_token
    shape = CacheShape(len(book.layers), elements, book.geometry.rope["rotary_dim"] // 2, 2)
    for tokens in CONTEXTS:
        plain, ours = (
            plain_bytes(shape, tokens),
            compressed_bytes(shape, book.token_bytes, tokens, backend=CARD_BACKEND).total,
        )
        all_in = 8 * ours / (elements * tokens)
        yield f"| {tokens:,} | {size(plain)} | {size(ours)} | {plain / ours:.2f} | {all_in:.3f} |"


def _quality(evaluation: dict[str, Any]) -> str:
    rows = list(measurements(evaluation))
    if not rows:
        return _NOT_MEASURED
    columns = [c for c in _COLUMNS if any(_is_number(row.get(c[0])) for _, row in rows)]
    lines = ["| text | " + " | ".join(label for _, label, _ in columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in rows:
        cells = [form.format(row[key]) if _is_number(row.get(key)) else "" for key, _, form in columns]
        lines.append(f"| {name or 'held-out text'} | " + " | ".join(cells) + " |")
    shown = {id(row): {key for key, _, _ in _COLUMNS} | set(_NAMES) for _, row in rows}
    rest = list(_described(evaluation, shown))
    return "\n".join([_MEASURED, "", *lines, *([""] if rest else []), *rest])


def _described(values: dict[str, Any], shown: dict[int, set[str]] | None = None, prefix: str = "") -> Iterator[str]:
    """Everything recorded that no table shows, as a list of ``name: value``; nested names are joined by dots."""
    hidden = (shown or {}).get(id(values), ())
    for key, value in values.items():
        label = f"{prefix}{key}"
        if key in hidden or value is None or value in ("", [], {}):
            continue
        if isinstance(value, dict):
            yield from _described(value, shown, f"{label}.")
        elif isinstance(value, list) and all(isinstance(v, dict) for v in value):
            for number, child in enumerate(value, 1):
                yield from _described(child, shown, f"{label}.{number}.")
        elif key == "command":
            yield f"- {label}: `{value}`"
        else:
            yield f"- {label.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
