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
    from ..config import CommVQConfig, ConfigError

    for name in ("context", "batch"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}: expected 1 or more.")
    settings = {bits: CommVQConfig(bits=bits) for bits in args.bits}
    cards = estimate.gpu_bytes(args.gpu or estimate.GPUS)
    size = estimate.describe_model(args.model, args.dtype)
    weights = round(size.parameters * args.weight_bits / 8) if args.weight_bits else size.weights

    def largest(bits: float, tokens: int) -> int:
        token_bytes = bits * size.shape.elements / 8
        cache = estimate.largest_bytes(size.shape, token_bytes, tokens, args.batch, settings[bits])
        return cache + size.codebook_bytes(bits)

    plain = estimate.plain_bytes(size.shape, args.context, args.batch)
    report = {
        "model": size.name,
        "parameters": size.parameters,
        "dtype": size.dtype,
        "max_context": size.max_context,
        "context": args.context,
        "batch": args.batch,
        "weights_bytes": weights,
        "plain_cache_bytes": plain,
        "compressed": {},
        "gpus": {},
    }
    for bits in args.bits:
        parts = estimate.compressed_bytes(
            size.shape, bits * size.shape.elements / 8, args.context, batch=args.batch, same_positions=False
        )
        report["compressed"][f"{bits:g}"] = {
            "cache_bytes": parts.total,
            **vars(parts),
            "codebook_bytes": size.codebook_bytes(bits),
            "times_smaller": plain / parts.total,
        }
    for card, memory in cards.items():
        budget = memory - weights - estimate.RESERVE_BYTES
        longest = {"plain": estimate.longest_context(lambda t: estimate.plain_bytes(size.shape, t, args.batch), budget)}
        for bits in args.bits:
            longest[f"{bits:g}"] = estimate.longest_context(lambda t, b=bits: largest(b, t), budget)
        report["gpus"][card] = {"memory_bytes": memory, "longest_context": longest}
    print(json.dumps(report, indent=2) if args.json else _table(report, size, args))
    return 0


def _table(report: dict, size, args: argparse.Namespace) -> str:
    from ..estimate import RESERVE_BYTES

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
    for bits, parts in report["compressed"].items():
        lines.append(
            f"{f'  compressed, {bits} bits':28} {_gib(parts['cache_bytes'])}   {parts['times_smaller']:.1f}x smaller; "
            f"codebooks {parts['codebook_bytes'] / 2**20:.0f} MiB"
        )
    lines += ["", f"Longest context, with {RESERVE_BYTES >> 30} GiB kept for activations and the driver (assumed):"]
    rates = list(report["compressed"])
    lines.append(f"{'GPU':12} {'GiB':>6} {'plain':>12} " + " ".join(f"{r + ' bits':>12}" for r in rates))
    for card, row in report["gpus"].items():
        cells = [_tokens(row["longest_context"][k]) for k in ("plain", *rates)]
        lines.append(f"{card:12} {row['memory_bytes'] / 2**30:6.1f} " + " ".join(f"{c:>12}" for c in cells))
    if size.max_context:
        lines.append(f"What exceeds {size.max_context:,} tokens is room in memory; the model was not made for it.")
    lines += ["", "Beyond a few thousand tokens, read the prompt in chunks: generate(..., prefill_chunk_size=4096)."]
    return "\n".join(lines)


def _gib(count: int) -> str:
    return f"{count / 2**30:8.2f} GiB"


def _tokens(count: int) -> str:
    return f"{count:,}" if count else "no room"
