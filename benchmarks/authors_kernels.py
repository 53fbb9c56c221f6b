"""The CommVQ authors' Triton kernels beside ours, on one GPU, in turns: decode attention of one layer of Llama 3.1 8B.

    git clone https://github.com/UMass-Embodied-AGI/CommVQ
    python -m benchmarks.authors_kernels CommVQ

From the checkout only ``commvq/triton_kernels.py`` is loaded; it needs torch and triton. What is timed of it is what
``commvq/modeling_llama_triton.py`` does with codes in a decode step: ``calculate_QC_T_triton``, then
``gatherC1C2_and_sum_over_residual_and_apply_rope_and_sum``, softmax, ``attn_weights_mul_value_triton``. They have 1 bit
only, 8 KV heads of 128 and bfloat16. Ours is attention over the codes of as many tokens at 1 bit, a whole softmax with
its log-sum-exp. Codes and codebooks are random: speed does not depend on them. fp16 attention over a plain cache
is timed with them.

Their kernels tune themselves anew for every length; that is in ``first_call_s``, not in the times. Some of the settings
they try write past the end of their output (64 heads where there are 32), so nothing is computed here for its result
once they have run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from .speed.cli import RESULTS, facts
from .speed.kernel_times import DIM, HEADS, KV_HEADS, THETA, coded_past, fp16_sides, paired

REPOSITORY = "https://github.com/UMass-Embodied-AGI/CommVQ"
KERNELS = Path("commvq", "triton_kernels.py")
SCORES = "gatherC1C2_and_sum_over_residual_and_apply_rope_and_sum"
ENTRY_POINTS = ("calculate_QC_T_triton", SCORES, "attn_weights_mul_value_triton")
STAGES, CENTRES = 11, 64  # of their published 1-bit codebooks: 11 stages of two 6-bit indices
VALUE_BITS = 1024  # of all heads of a token together
STEP = 128  # tokens their cache grows by; their kernels read whole multiples of 32


@dataclass
class AuthorsInputs:
    """Random tensors in the shapes their kernels take, bfloat16 but for the codes.

    query: (batch, heads, 1, head_dim / 2, 2), pairs last. centres: (heads, pairs, stages, 64, 2, 2).
    key_codes: int16 (batch, kv_heads, stages, tokens), 64 a + b. key_norms: (batch, 1, 1, tokens).
    sin, cos: (1, tokens, pairs).
    value_codes: uint8 (batch, tokens / 8, bits), a byte holds one bit of eight tokens. value_norms: (batch, tokens, 1).
    value_scale: (bits,). value_book: (heads, bits, head_dim).
    """

    query: torch.Tensor
    centres: torch.Tensor
    key_codes: torch.Tensor
    key_norms: torch.Tensor
    sin: torch.Tensor
    cos: torch.Tensor
    value_codes: torch.Tensor
    value_norms: torch.Tensor
    value_scale: torch.Tensor
    value_book: torch.Tensor


def authors_inputs(tokens: int, batch: int, device: torch.device, seed: int = 0) -> AuthorsInputs:
    g = torch.Generator(device).manual_seed(seed)
    pairs = DIM // 2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=torch.float32).to(torch.bfloat16)

    def codes(high: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=g, device=device, dtype=torch.int32).to(dtype)

    inverse = THETA ** (-torch.arange(pairs, device=device) / pairs)
    angle = torch.arange(tokens, device=device)[None, :, None] * inverse
    return AuthorsInputs(
        query=normal(batch, HEADS, 1, pairs, 2),
        centres=normal(HEADS, pairs, STAGES, CENTRES, 2, 2) / STAGES**0.5,
        key_codes=codes(CENTRES**2, torch.int16, batch, KV_HEADS, STAGES, tokens),
        key_norms=normal(batch, 1, 1, tokens).abs() / math.sqrt(DIM),
        sin=angle.sin().to(torch.bfloat16),
        cos=angle.cos().to(torch.bfloat16),
        value_codes=codes(256, torch.uint8, batch, tokens // 8, VALUE_BITS),
        value_norms=normal(batch, tokens, 1).abs(),
        value_scale=normal(VALUE_BITS).abs(),
        value_book=normal(HEADS, VALUE_BITS, DIM) / VALUE_BITS**0.5,
    )


def authors_attention(kernels: ModuleType, x: AuthorsInputs) -> Callable[[], torch.Tensor]:
    """Their decode step over codes; a call returns (batch, heads, 1, head_dim)."""
    scores_of = getattr(kernels, SCORES)

    def run() -> torch.Tensor:
        products = kernels.calculate_QC_T_triton(x.query, x.centres)
        scores = scores_of(x.key_codes, products, x.sin, x.cos, x.key_norms, math.sqrt(DIM))
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(x.query.dtype)
        return kernels.attn_weights_mul_value_triton(
            attn_weights=weights,
            value_code=x.value_codes,
            prescale=x.value_norms,
            learnable_scale=x.value_scale,
            eps=1e-6,
            codebook=x.value_book,
        )

    return run


def load(checkout: Path) -> ModuleType:
    """Their kernels.

    Raises SystemExit with what is missing and how to get it.
    """
    file = checkout / KERNELS
    if not file.is_file():
        raise SystemExit(f"{file} does not exist. Fix: git clone {REPOSITORY}, and give the folder it makes.")
    spec = importlib.util.spec_from_file_location("commvq_authors_triton_kernels", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Triton looks up the module of a kernel
    spec.loader.exec_module(module)
    missing = [name for name in ENTRY_POINTS if not callable(getattr(module, name, None))]
    if missing:
        raise SystemExit(f"{file} has no {', '.join(missing)}: it is not the version this was written for, d1f0377.")
    return module


def revision(checkout: Path) -> str | None:
    """The commit of a checkout, None where git does not know it."""
    done = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def first_call(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help=f"a clone of {REPOSITORY}")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 32768, 65536, 131072])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if any(n < STEP or n % STEP for n in args.lengths) or min(args.batch, args.rounds) < 1:
        parser.error(f"--lengths: multiples of {STEP}, by which their cache grows; --batch and --rounds: 1 or more.")
    if not torch.cuda.is_available():
        parser.error("this times GPU kernels, and torch sees no GPU. Fix: run it on a machine with an NVIDIA GPU.")
    kernels = load(args.checkout)
    from transformers_commvq.ops.attention_triton import attention_triton

    device = torch.device("cuda")
    report = {
        "model": "Llama 3.1 8B, one layer", **facts(device), "checkout": REPOSITORY,
        "revision": revision(args.checkout), "batch": args.batch, "rows": [],
    }  # fmt: skip
    for tokens in args.lengths:
        query = torch.randn(args.batch, HEADS, 1, DIM, dtype=torch.float16, device=device)
        past = coded_past(1.0, tokens, args.batch, "cuda")

        def ours(query=query, past=past):
            return attention_triton(query, past, None, DIM**-0.5)

        theirs = authors_attention(kernels, authors_inputs(tokens, args.batch, device))
        row = {
            "tokens": tokens,
            "first_call_s": {"commvq 1 bit": first_call(ours), "authors 1 bit": first_call(theirs)},
        }
        sides = {"commvq 1 bit": ours, "authors 1 bit": theirs, **fp16_sides(query, tokens, args.batch, "cuda")}
        row["times"] = paired(sides, args.rounds)
        report["rows"].append(row)
        print(f"{tokens} tokens")
        for name, numbers in row["times"].items():
            print(f"  {name:24s} {numbers['median_us']:10.1f} us ({numbers['least_us']:.1f}-{numbers['most_us']:.1f})")
        del sides, ours, theirs, past
        torch.cuda.empty_cache()
    args.results.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"\W+", "_", report["device"]).strip("_").lower()
    file = args.results / f"authors_kernels_{slug}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
