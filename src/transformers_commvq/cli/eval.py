"""``eval``: what a codebook costs on text, in the way a cache is used; by several processes if so launched."""

from __future__ import annotations

import argparse

NAME = "eval"
HELP = "measure streaming perplexity, KL divergence and passkey retrieval with a compressed cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of the model, or 'demo'")
    parser.add_argument("--codebook", metavar="REPO_OR_FOLDER", help="default: what kv_cache='commvq' would use")
    parser.add_argument("--bits", type=float, default=2.0, help="rate of the codebook")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text files; of .jsonl, see --field")
    parser.add_argument("--field", help="field of a .jsonl line (default: all)")
    parser.add_argument("--windows", type=int, default=3, help="windows a text")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a step")
    parser.add_argument("--sink-tokens", type=int, default=4, help="first tokens kept exact")
    parser.add_argument("--residual-length", type=int, default=128, help="newest tokens kept exact")
    parser.add_argument("--passkey", type=int, nargs="+", default=[], metavar="LENGTH", help="prompt lengths to try")
    parser.add_argument("--trials", type=int, default=3, help="passkeys a length and depth")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of a model that is loaded from a folder")
    parser.add_argument("--dtype", default="auto", help="dtype of the model: auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="where the model runs")
    parser.add_argument("--json", action="store_true", help="print json")


def run(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from .. import enable, make_cache
    from ..config import CommVQConfig, ConfigError
    from ..processes import passkeys, quality, shared
    from ..text import read_file, windows_of
    from .models import load

    if not args.text and not args.passkey:
        raise ConfigError("nothing to measure. Fix: give --text FILE, or --passkey LENGTH, or both.")
    texts = {Path(path).name: read_file(path, args.field) for path in args.text}
    with shared() as share:
        device = share.device(args.device)
        model, tokenizer, base_model = load(args.model, args.dtype, device, args.base_model)
        config = CommVQConfig(
            bits=args.bits,
            codebook=args.codebook,
            base_model=base_model,
            sink_tokens=args.sink_tokens,
            residual_length=args.residual_length,
        )
        enable(model, config)
        report = {"bits": args.bits, "texts": {}}
        for name, text in texts.items():
            windows = windows_of(tokenizer, [text], args.windows, args.length)
            report["texts"][name] = quality(share, model, make_cache, windows, args.chunk).to_dict()
        if args.passkey:
            report["passkey"] = passkeys(share, model, tokenizer, make_cache, args.passkey, args.trials)
    if share.rank == 0:
        print(json.dumps(report, indent=2) if args.json else _text(report))
    return 0


def _text(report: dict) -> str:
    lines = []
    for name, row in report["texts"].items():
        error = row["kl_standard_error"]
        lines.append(
            f"{name}: perplexity {row['reference_perplexity']:.3f} -> {row['perplexity']:.3f} ({row['change']:+.2%}), "
            f"KL {row['kl']:.4f}{'' if error is None else f' ± {error:.4f}'} nats, {row['windows']} windows"
        )
    for length, depths in report.get("passkey", {}).items():
        cells = ", ".join(f"{share:.0%} at depth {depth:g}" for depth, share in depths.items())
        lines.append(f"passkey, {length} tokens: {cells}")
    return "\n".join(lines)
