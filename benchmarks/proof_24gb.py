"""The 24 GB proof: a prompt of 128K tokens through the geometry of Llama 3.1 8B in 24 GB, where DynamicCache fails.

    python -m benchmarks.proof_24gb                                           on an NVIDIA GPU of 24 GB or more
    python -m benchmarks.proof_24gb --model tiny --device cpu --context 600   a dry run, which proves nothing

Weights, codebooks and prompt are random, weights in bfloat16: memory does not depend on what they hold. The prompt is
read in chunks, then tokens are generated, first with codes, then with DynamicCache. On a GPU torch's allocator refuses
every byte over the limit (torch.cuda.set_per_process_memory_fraction). What CUDA itself takes lies outside it, some
hundred MB; therefore the limit is 24 * 10^9 bytes, and not the 25.8 * 10^9 of a card that is sold as 24 GB.

Results go to benchmarks/results, a json file that names the device. Exit status 0: shown (or a dry run ended); 1: not.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from transformers_commvq import CommVQCache
from transformers_commvq.estimate import RESERVE_BYTES, compressed_bytes, describe_config, plain_bytes

from .speed import measure
from .speed.cli import RESULTS, facts
from .speed.methods import OURS, PLAIN, Method, build
from .speed.models import Subject, llama_8b_config, random_model, toy_config

LIMIT = 24 * 10**9
MODELS = {"llama-8b": llama_8b_config, "tiny": toy_config}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--bits", type=float, default=1.0, help="of a key or value element")
    parser.add_argument("--context", type=int, default=131072, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens generated after it")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of the prompt read at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends with a message where the device or a count will not do."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.context, args.new, args.chunk) < 1:
        parser.error("--context, --new and --chunk: 1 or more.")
    device = torch.device(args.device)
    if device.type == "cpu":
        if args.model != "tiny":
            parser.error("a CPU has no limit to prove anything under. Fix: add --model tiny for a dry run.")
    elif device.type != "cuda" or not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no such GPU. Fix: --model tiny --device cpu for a dry run.")
    elif (memory := torch.cuda.get_device_properties(device).total_memory) < LIMIT:
        parser.error(f"{torch.cuda.get_device_name(device)} has {memory / 1e9:.1f} GB; 24 GB are needed.")
    return args


def estimate(config: LlamaConfig, bits: float, tokens: int) -> dict[str, int]:
    """Bytes to expect at so many tokens, from the config alone."""
    size = describe_config(config, dtype="bfloat16")
    token_bytes = bits * size.shape.elements / 8
    return {
        "weights": size.weights,
        "codebooks": size.codebook_bytes(bits),
        "compressed_cache": compressed_bytes(size.shape, token_bytes, tokens, backend="blockwise").total,
        "plain_cache": plain_bytes(size.shape, tokens),
        "reserve": RESERVE_BYTES,
    }


def show(expected: dict[str, int], limit: int) -> None:
    print(f"expected, from the config alone; the limit is {limit / 1e9:.1f} GB:")
    for name, held in expected.items():
        assumed = " (activations and the like: assumed)" if name == "reserve" else ""
        print(f"  {name.replace('_', ' '):18s} {held / 1e9:7.3f} GB{assumed}")
    shared = expected["weights"] + expected["reserve"]
    for name, cache in (
        (PLAIN, expected["plain_cache"]),
        (OURS, expected["compressed_cache"] + expected["codebooks"]),
    ):
        total = shared + cache
        print(f"  {name:18s} {total / 1e9:7.3f} GB in all: {'fits' if total <= limit else 'does not fit'}")


def attempt(method: Method, ids: torch.Tensor, new: int, chunk: int) -> dict[str, Any]:
    """One generate(): what it took, or how many tokens its cache held when memory ran out."""
    made = []

    def make():
        made.append(method.make())
        return made[-1]

    device = ids.device
    try:
        row, cache = measure.generate_once(Method(method.name, method.model, make), ids, new, chunk)
    except RuntimeError as error:
        if not measure.out_of_memory(error):
            raise
        row = {"failed": str(error).splitlines()[0], "tokens_held": made[-1].get_seq_length()}
    else:
        row |= {"failed": None, "tokens_held": cache.get_seq_length()}
        if isinstance(cache, CommVQCache):
            row["memory_report"] = cache.memory_report()
    if device.type == "cuda":
        row["peak_allocated"] = torch.cuda.max_memory_allocated(device)
        row["peak_reserved"] = torch.cuda.max_memory_reserved(device)
    return row


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    device, config = torch.device(args.device), MODELS[args.model]()
    limited = device.type == "cuda"
    expected = estimate(config, args.bits, args.context + args.new)
    show(expected, LIMIT)
    if limited:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(LIMIT / total, device)
    else:
        print("a dry run: nothing limits memory here, and nothing is proved")
    report: dict[str, Any] = {
        "model": args.model, **facts(device), "limit": LIMIT if limited else None, "bits": args.bits,
        "context": args.context, "new": args.new, "chunk": args.chunk, "expected": expected, "runs": {},
    }  # fmt: skip
    args.results.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"\W+", "_", report["device"]).strip("_").lower()
    file = args.results / f"proof_24gb_{args.model}_{slug}.json"

    model = random_model(config, device, torch.bfloat16)
    model.generation_config.eos_token_id = None  # as many tokens as were asked for
    model.generation_config.pad_token_id = 0
    subject = Subject(args.model, lambda *_: model, None)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, args.context), generator=generator).to(device)
    with tempfile.TemporaryDirectory() as folder:
        for name in (f"{OURS}-{args.bits:g}", PLAIN):
            print(f"{name}: {args.context} tokens in chunks of {args.chunk}, then {args.new} new ones")
            method = build(name, model, subject, Path(folder))
            row = report["runs"][name] = attempt(method, ids, args.new, args.chunk)
            if row["failed"]:
                print(f"  failed with {row['tokens_held']} tokens in the cache: {row['failed']}")
            else:
                print(
                    f"  prompt {row['prefill_s']:.1f} s, {row['decode_tokens_per_s'] or 0:.2f} tokens/s after it, "
                    f"cache {row['cache_bytes'] / 1e9:.3f} GB"
                )
            del method
            free(device)
    ours, plain = (row["failed"] for row in report["runs"].values())
    report["shown"] = (ours is None and plain is not None) if limited else None
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {file}")
    if limited:
        print("shown" if report["shown"] else "not shown: codes must fit where DynamicCache does not")
    return 0 if report["shown"] in (True, None) else 1


if __name__ == "__main__":
    sys.exit(main())
