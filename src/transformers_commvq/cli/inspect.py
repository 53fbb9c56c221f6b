"""``inspect``: what a codebook is, where it came from and what was measured of it."""

from __future__ import annotations

import argparse
import json

NAME = "inspect"
HELP = "show a codebook's format, base model, rate, bits per head, memory, quality and hashes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("codebook", metavar="REPO_OR_FOLDER", help="codebook folder, or Hub repository id")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--heads", action="store_true", help="bits of every head, not only each layer's range")
    parser.add_argument("--json", action="store_true", help="print json")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from ..codebook import CONFIG_FILE, TENSOR_FILE, Codebook
    from ..config import ConfigError
    from ..hub import download, pull

    folder = Path(args.codebook).expanduser()
    if folder.is_dir():
        if args.revision:
            raise ConfigError("--revision: a folder has no revisions. Fix: leave it out.")
        book, commit = Codebook.load(folder), None
    else:
        book = pull(args.codebook, args.revision)
        folder = download(args.codebook, args.revision, local_files_only=True)
        commit = folder.name
    report = _report(book, (folder / CONFIG_FILE).read_bytes(), (folder / TENSOR_FILE).stat().st_size)
    report = {"codebook": args.codebook, "commit": commit, **report}
    print(json.dumps(report, indent=2) if args.json else _text(report, args.heads))
    return 0


def _report(book, config_json: bytes, tensor_size: int) -> dict:
    import hashlib

    from ..cards import artefact_tag, measurements
    from ..codebook import CONFIG_FILE, TENSOR_FILE

    config = json.loads(config_json)
    return {
        "format_version": config["format_version"],
        "base_model": config["base_model"],
        "kind": config["codec"]["kind"],
        "bits": book.bits,
        "bits_per_head": config["codec"].get("bits_per_head", {}),
        "bytes_per_token": book.token_bytes,
        "fp16_bytes_per_token": 2 * book.elements_per_token,
        "codebook_bytes": book.nbytes,
        "quality": [{"text": name or "held-out text", **row} for name, row in measurements(book.evaluation)],
        "calibration": book.calibration,
        "tag": artefact_tag(config_json),
        "files": {
            CONFIG_FILE: {"sha256": hashlib.sha256(config_json).hexdigest(), "size": len(config_json)},
            TENSOR_FILE: {"sha256": book.sha256, "size": tensor_size},
        },
    }


def _text(report: dict, every_head: bool) -> str:
    from ..cards import size

    base = report["base_model"]
    smaller = report["fp16_bytes_per_token"] / report["bytes_per_token"]
    rope = {k: v for k, v in base["rope"].items() if k != "parameters"} | base["rope"].get("parameters", {})
    at = f" at commit {report['commit']}" if report["commit"] else ""
    lines = [
        f"{report['codebook']}{at}",
        f"format          version {report['format_version']}, {report['kind']} codes",
        f"base model      {base['id']} ({base['model_type']}), revision {base['revision'] or 'not recorded'}",
        f"geometry        {len(base['layers'])} of {base['num_hidden_layers']} layers, {base['num_key_value_heads']} "
        f"key/value heads of {base['head_dim']}",
        f"RoPE            {', '.join(f'{k} {v}' for k, v in rope.items())}",
        f"rate            {report['bits']:.4g} bits an element",
        f"bytes a token   {report['bytes_per_token']:,} (fp16: {report['fp16_bytes_per_token']:,}, {smaller:.1f}x)",
        f"codebooks       {size(report['codebook_bytes'])} in memory",
    ]
    if report["bits_per_head"]:
        lines.append("bits per head   layer: keys | values")
    for layer, sides in report["bits_per_head"].items():
        shown = [_bits(sides[side], every_head) for side in ("keys", "values")]
        lines.append(f"{layer:>15}: {shown[0]} | {shown[1]}")
    for row in report["quality"]:
        kl = f", KL {row['kl']} nats" if "kl" in row else ""
        change = row["perplexity"] / row["reference_perplexity"] - 1
        lines.append(
            f"quality         {row['text']}: perplexity {row['reference_perplexity']} plain, {row['perplexity']} "
            f"compressed ({change:+.2%}){kl}"
        )
    if not report["quality"]:
        lines.append("quality         not measured")
    lines += [f"calibration     {key}: {value}" for key, value in report["calibration"].items()]
    lines += [f"sha256          {f['sha256']}  {name} ({f['size']:,} bytes)" for name, f in report["files"].items()]
    lines.append(f"tag             {report['tag']}")
    return "\n".join(lines)


def _bits(bits: list[int], every_head: bool) -> str:
    if every_head or len(bits) <= 4:
        return " ".join(f"{n:g}" for n in bits)
    return f"{min(bits):g} to {max(bits):g}, mean {sum(bits) / len(bits):.0f}"
