"""``estimate``: what the cache of a model costs, before anything is downloaded."""

from __future__ import annotations

import argparse
import json

NAME = "estimate"
HELP = "memory of weights, plain and compressed cache of any model, and the longest context a GPU can hold"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id, folder or config.json; no weights are fetched")
    parser.add_argument("--context", type=int, default=131072, help="tokens in the cache")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 1.0], help="rates, bits an element")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once")
    parser.add_argument("--dtype", help="of weights and plain cache; by default the model's own")
    parser.add_argument("--weight-bits", type=float, help="bits a weight, for quantized weights, e.g. 4.5")
    parser.add_argument("--gpu", nargs="+", help="cards, or GiB of memory; by default a list of common cards")
    parser.add_argument("--json", action="store_true", help="print json")


def run(args: argparse.Namespace) -> int:
    from .. import estimate

    cards = estimate.gpu_bytes(args.gpu or estimate.GPUS)
    size = estimate.describe_model(args.model, args.dtype)
    report = estimate.tabulate(size, args.context, args.bits, args.batch, cards, args.weight_bits)
    print(json.dumps(report, indent=2) if args.json else _table(report, size, args))
    return 0


def _table(report: dict, size, args: argparse.Namespace) -> str:
    from ..estimate import OTHERS, RESERVE_BYTES

    weight = f"{args.weight_bits:g} bits" if args.weight_bits else size.dtype
    batch = f", batch {args.batch}" if args.batch > 1 else ""
    lines = [
        f"{size.name} ({size.model_type}, {size.parameters / 1e9:.2f} B parameters)",
        f"made for {size.max_context or 'unknown'} tokens; {size.layers} layers are compressed, {size.heads} key/value "
        f"heads of {size.head_dim}",
        "",
        f"{'weights, ' + weight:28} {_gib(report['weights_bytes'])}",
        f"{f'at {args.context} tokens{batch}:'}",
        f"{'  plain cache, ' + size.dtype:28} {_gib(report['plain_cache_bytes'])}",
    ]
    for name, count in report["other_cache_bytes"].items():
        lines.append(f"{f'  {name} cache, {OTHERS[name]:g} bits':28} {_gib(count)}")
    for bits, parts in report["compressed"].items():
        lines.append(
            f"{f'  compressed, {bits} bits':28} {_gib(parts['cache_bytes'])}   {parts['times_smaller']:.1f}x smaller; "
            f"codebooks {parts['codebook_bytes'] / 2**20:.0f} MiB"
        )
    lines += ["", f"Longest context, with {RESERVE_BYTES >> 30} GiB kept for activations and the driver (assumed):"]
    columns = {"plain": "plain", **{n: n for n in OTHERS}, **{r: f"{r} bits" for r in report["compressed"]}}
    lines.append(f"{'GPU':12} {'GiB':>6} " + " ".join(f"{heading:>12}" for heading in columns.values()))
    for card, row in report["gpus"].items():
        cells = [_tokens(row["longest_context"][k]) for k in columns]
        lines.append(f"{card:12} {row['memory_bytes'] / 2**30:6.1f} " + " ".join(f"{c:>12}" for c in cells))
    if size.max_context:
        lines.append(f"What exceeds {size.max_context:,} tokens is room in memory; the model was not made for it.")
    lines += ["", "Beyond a few thousand tokens, read the prompt in chunks: generate(..., prefill_chunk_size=4096)."]
    return "\n".join(lines)


def _gib(count: int) -> str:
    return f"{count / 2**30:8.2f} GiB"


def _tokens(count: int) -> str:
    return f"{count:,}" if count else "no room"
