"""Decode attention over sign codes against fp16 attention on one GPU, at the shape of one layer of Llama 3.1 8B.

Each length is timed in one process, the sides taking turns, so that clocks and heat are the same for all; before that
the kernels are compared with the reference on the same codes, and the error is recorded. Codebooks and codes are
random: speed does not depend on them.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from pathlib import Path

import torch

from transformers_commvq.codebook import LayerBook, SignBook
from transformers_commvq.ops.attention_reference import attention_reference
from transformers_commvq.ops.encode import encode_signs
from transformers_commvq.ops.past import CodedPast
from transformers_commvq.packing import CodeLayout
from transformers_commvq.positions import PositionTrack
from transformers_commvq.rope import Rope, angles

from .models import UNEVEN

HEADS, KV_HEADS, DIM, THETA = 32, 8, 128, 500000.0  # Llama 3.1 8B, one layer
CHECKED = 4096  # most tokens the reference decodes: it needs them all in float32


def sign_book(bits: float, seed: int, device: str) -> SignBook:
    g = torch.Generator().manual_seed(seed)
    layout = CodeLayout(tuple(int(bits * DIM * u) // 8 * 8 for u in UNEVEN))
    vectors = [torch.randn(n, DIM, generator=g) / n**0.5 for n in layout.bits]
    book = SignBook(layout, torch.cat(vectors).half(), torch.randn(KV_HEADS, DIM, generator=g))
    return book.to(device)


def coded_past(bits: float, tokens: int, batch: int, device: str) -> CodedPast:
    book = LayerBook(sign_book(bits, 1, device), sign_book(bits, 2, device))
    inverse = THETA ** (-torch.arange(DIM // 2) / (DIM // 2))
    track = PositionTrack(inverse, 1.0)
    positions = torch.arange(tokens, device=device)[None]
    track.extend(0, positions, *angles(positions, inverse.to(device)))
    keys, values = (
        torch.randint(0, 256, (batch, tokens, b.token_bytes), dtype=torch.uint8, device=device)
        for b in (book.keys, book.values)
    )
    return CodedPast(keys, values, book, Rope("half", DIM), track, torch.tensor([[0, 4]] * batch, device=device))


def timed(run, repeats: int) -> float:
    """Seconds of one call: device time of ``repeats`` calls in a row."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def paired(sides: dict[str, object], rounds: int, seconds: float = 0.05) -> dict[str, dict[str, float]]:
    """Median and spread of each side's microseconds, the sides taking turns."""
    repeats = {}
    for name, run in sides.items():
        for _ in range(3):  # compiles, allocates, fills caches
            run()
        repeats[name] = max(3, int(seconds / max(timed(run, 3), 1e-6)))
    samples = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            samples[name].append(1e6 * timed(run, repeats[name]))
    return {n: {"median_us": statistics.median(s), "least_us": min(s), "most_us": max(s)} for n, s in samples.items()}


def graphed(run):
    """The call as a CUDA graph, which leaves out what Python and the launches cost; the call itself if that fails."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f"  no CUDA graph: {error}")
        return run
    return graph.replay


def fp16_sides(query, tokens: int, batch: int, device: str) -> dict[str, object]:
    """fp16 attention over an uncompressed cache, with every kernel that torch (and flash_attn, if installed) has."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    keys, values = (torch.randn(batch, KV_HEADS, tokens, DIM, dtype=torch.float16, device=device) for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention

    def sdpa(backend):
        def run():
            with sdpa_kernel(backend):
                return attend(query, keys, values, enable_gqa=True)

        return run

    sides = {}
    for name, backend in (
        ("sdpa flash", SDPBackend.FLASH_ATTENTION),
        ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
        ("sdpa efficient", SDPBackend.EFFICIENT_ATTENTION),
    ):
        try:
            sdpa(backend)()
            sides[name] = sdpa(backend)
        except RuntimeError as error:
            print(f"  {name} not available: {str(error).splitlines()[0]}")
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return sides
    q, k, v = (t.transpose(1, 2).contiguous() for t in (query, keys, values))
    sides["flash_attn split-KV"] = lambda: flash_attn_with_kvcache(q, k, v)
    return sides


def error_against_reference(past: CodedPast, query: torch.Tensor, attention) -> dict[str, float]:
    want, want_lse = attention_reference(query, past, None, DIM**-0.5)
    out, lse = attention(query, past, None, DIM**-0.5)
    relative = float((out - want).norm() / want.norm())
    return {"relative": relative, "lse": float((lse - want_lse).abs().max()), "tokens": past.length}


def encode_speed(bits: float, device: str, tokens: int = 8192) -> dict[str, float]:
    """Seconds to encode one layer's keys and values of a prompt, and agreement with the plain encoder."""
    from transformers_commvq.ops.encode_triton import encode_signs_triton

    book = sign_book(bits, 1, device)
    x = torch.randn(1, KV_HEADS, tokens, DIM, device=device, dtype=torch.float16)
    got, want = encode_signs_triton(x[:, :, :512], book), encode_signs(x[:, :, :512], book)
    same = float((got == want).float().mean())
    sides = {"triton": lambda: encode_signs_triton(x, book), "torch": lambda: encode_signs(x, book)}
    return {"bits": bits, "tokens": tokens, "same_bytes": same, **paired(sides, rounds=3)}


def run(results: Path, lengths=(1024, 4096, 16384, 32768, 65536, 131072), all_bits=(1.0, 2.0), rounds: int = 7) -> Path:
    """Check the kernels against the reference, then time them; returns the json file.

    Raises SystemExit when the kernels disagree with the reference: then nothing is timed.
    """
    from transformers_commvq.ops.attention_triton import attention_triton

    from .cli import facts

    torch.manual_seed(0)
    device, report = "cuda", {**facts(torch.device("cuda")), "rows": [], "encode": []}
    for bits in all_bits:
        for queries in (1, 8, 64):
            past = coded_past(bits, CHECKED, 1, device)
            query = torch.randn(1, HEADS, queries, DIM, dtype=torch.float16, device=device)
            began = time.perf_counter()
            error = error_against_reference(past, query, attention_triton)
            error |= {"bits": bits, "queries": queries, "first_call_s": time.perf_counter() - began}
            print("error", error)
            report.setdefault("errors", []).append(error)
            if not error["relative"] < 2e-3:
                raise SystemExit(f"the kernels disagree with the reference: {error}; nothing was timed.")
    for tokens in lengths:
        query = torch.randn(1, HEADS, 1, DIM, dtype=torch.float16, device=device)
        sides = fp16_sides(query, tokens, 1, device)
        for bits in all_bits:
            past = coded_past(bits, tokens, 1, device)

            def ours(past=past, query=query):
                return attention_triton(query, past, None, DIM**-0.5)

            ours()
            sides[f"commvq {bits:g} bit"] = ours
            sides[f"commvq {bits:g} bit, CUDA graph"] = graphed(ours)
        row = {"batch": 1, "tokens": tokens, "times": paired(sides, rounds)}
        report["rows"].append(row)
        print(f"{tokens} tokens")
        for name, numbers in row["times"].items():
            print(f"  {name:28s} {numbers['median_us']:9.1f} us ({numbers['least_us']:.1f}-{numbers['most_us']:.1f})")
        del sides, query
        torch.cuda.empty_cache()
    for bits in all_bits:
        report["encode"].append(encode_speed(bits, device))
        print("encode", report["encode"][-1])
    results.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", report["device"]).strip("_").lower()
    file = results / f"kernels_{name}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {file}")
    return file
