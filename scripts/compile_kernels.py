"""Compile every Triton kernel ahead of time for every GPU target and count what the compilers made of it.

    python scripts/compile_kernels.py                       the table, as printed text
    python scripts/compile_kernels.py --docs docs/kernels.md   put the table into the page
    python scripts/compile_kernels.py --docs docs/kernels.md --beside old.json   with columns of another run's json
    python scripts/compile_kernels.py --json out.json --targets sm_90 gfx942 --kernels decode

No GPU is needed: the compilers and disassemblers come with triton. Counts are static; they are not times. Must not run
under TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from transformers_commvq.ops.triton_decode import attend_splits, merge_splits
from transformers_commvq.ops.triton_encode import improve_signs, pack_signs
from transformers_commvq.ops.triton_index import index_scores, weighted_bits

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED = 64 * 1024  # bytes a program may use: all of gfx942's, and less than the 99 KB of sm_89 and sm_120
KEY_SIGNS = 128  # of a head, in the count of instructions a token and head


@dataclass
class Kernel:
    """One kernel with one set of compile-time settings.

    types: argument -> Triton type; what is neither there nor in ``settings`` is int32. None in settings: left out.
    work: tokens of one head that one pass of the loop over tiles handles, 0 if that means nothing.
    spills: the most spill instructions (NVIDIA) or spilled registers (AMD) on any target.
    essential: one of those that the tests compile; the others differ from one of them in settings alone.
    """

    name: str
    function: object
    types: dict[str, str]
    settings: dict[str, object]
    warps: int = 4
    work: int = 0
    spills: int = 0
    essential: bool = True

    def source(self) -> ASTSource:
        names = self.function.arg_names
        signature, attributes = {}, {}
        loose = set(getattr(self.function, "do_not_specialize_on_alignment", None) or ())
        for i, name in enumerate(names):
            signature[name] = "constexpr" if name in self.settings else self.types.get(name, "i32")
            if signature[name].startswith("*") and name not in loose:
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(fn=self.function, signature=signature, constexprs=dict(self.settings), attrs=attributes)


ATTEND = {
    "query_ptr": "*bf16", "keys_ptr": "*u8", "values_ptr": "*u8", "book_ptr": "*fp16", "mean_ptr": "*fp32",
    "meta_ptr": "*i32", "element_ptr": "*i32", "table_cos_ptr": "*fp16", "table_sin_ptr": "*fp16",
    "start_cos_ptr": "*fp32", "start_sin_ptr": "*fp32", "index_ptr": "*i32", "hidden_ptr": "*i64",
    "mask_ptr": "*fp32", "sum_ptr": "*fp32", "top_ptr": "*fp32", "scale": "fp32", "softcap": "fp32",
}  # fmt: skip
MERGE = {
    "sum_ptr": "*fp32", "top_ptr": "*fp32", "book_ptr": "*fp16", "mean_ptr": "*fp32", "meta_ptr": "*i32",
    "out_ptr": "*fp32", "lse_ptr": "*fp32",
}  # fmt: skip


def attend(
    name, groups, rows, pairs, tokens, key_bits, value_bits, chunks, warps=4, spills=0, essential=False, **forms
):
    settings = dict(
        GROUPS=groups, ROWS=rows, PAIRS=pairs, TOKENS=tokens, BLOCK=128, KEY_BITS=key_bits, VALUE_BITS=value_bits,
        CHUNKS=chunks, INDEXED=False, STARTS=True, HIDDEN=True, MASK=0, SOFTCAP=False,
    ) | forms  # fmt: skip
    settings |= {} if settings["INDEXED"] else {"index_ptr": None}
    settings |= {} if settings["MASK"] else {"mask_ptr": None}
    return Kernel(name, attend_splits, ATTEND, settings, warps, tokens, spills, essential)


def encode():
    types = {
        "target_ptr": "*fp32", "signs_ptr": "*i8", "gram_high_ptr": "*fp16", "gram_low_ptr": "*fp16",
        "inner_ptr": "*fp32", "scale_ptr": "*fp32", "bits_ptr": "*i32", "first_ptr": "*i32", "codes_ptr": "*u8",
    }  # fmt: skip
    yield Kernel("encode: improve_signs", improve_signs, types, dict(TOKENS=64, DEPTH=64), 8)
    yield Kernel("encode: pack_signs", pack_signs, types, dict(TOKENS=64, BYTES=8))


def index(stages, bits):
    """The kernels over index codes, for Llama-3.1-8B's shapes."""
    pointers = {
        "query_ptr": "*bf16", "keys_ptr": "*u8", "entry_ptr": "*fp16", "element_ptr": "*i32", "table_cos_ptr": "*fp16",
        "table_sin_ptr": "*fp16", "start_cos_ptr": "*fp32", "start_sin_ptr": "*fp32", "score_ptr": "*fp32",
        "scale": "fp32",
    }  # fmt: skip
    settings = dict(
        GROUPS=4, STAGES=stages, PAIRS=64, ROWS=16, TOKENS=32, BLOCK=128, INDEXED=False, STARTS=True, index_ptr=None
    )
    yield Kernel("index codes: index_scores", index_scores, pointers, settings, spills=4)
    pointers = {"values_ptr": "*u8", "weight_ptr": "*fp32", "sum_ptr": "*fp32"}
    settings = dict(BITS=bits, WIDTH=128, ROWS=16, TOKENS=32)
    yield Kernel("index codes: weighted_bits", weighted_bits, pointers, settings, essential=False)


def merge(dim, width):
    settings = dict(
        GROUPS=4, ROWS=8, MERGED=16, DIM=dim, PADDED=triton.next_power_of_2(dim), WIDTH=width, BITS=32, SPLITS=16
    )
    return Kernel(f"merge, head_dim {dim}", merge_splits, MERGE, settings, 8)


KERNELS = [
    attend("decode, head_dim 128, values to 128 bits", 4, 8, 64, 64, 64, 128, 1, essential=True),
    attend("decode, head_dim 128, values to 512 bits", 4, 8, 64, 64, 64, 128, 4, spills=48),
    attend("decode, head_dim 64", 3, 8, 32, 64, 64, 128, 1),
    attend("decode, head_dim 256", 2, 8, 128, 32, 32, 128, 2, spills=40),
    attend(
        "decode, mask, softcap, indexed positions",
        3,
        8,
        32,
        64,
        64,
        128,
        1,
        essential=True,
        INDEXED=True,
        MASK=2,
        SOFTCAP=True,
    ),
    attend("many queries, head_dim 128", 4, 64, 64, 64, 64, 128, 1, warps=8, spills=136, essential=True),
    merge(128, 128),
    *encode(),
    *index(11, 1024),
]


def compile_one(kernel: Kernel, target: str) -> dict[str, object]:
    """Counts of one kernel for one target; raises what the compiler raises."""
    began = time.perf_counter()
    built = triton.compile(
        kernel.source(), target=TARGETS[target], options={"num_warps": kernel.warps, "num_stages": 2}
    )
    counts: dict[str, object] = {"kernel": kernel.name, "target": target, "shared": built.metadata.shared}
    counts["triton"] = triton.__version__
    if TARGETS[target].backend == "cuda":
        counts |= _nvidia(built.asm["cubin"], kernel)
    else:
        counts |= _amd(built.asm["amdgcn"])
    counts["seconds"] = round(time.perf_counter() - began, 1)
    return counts


def _nvidia(cubin: bytes, kernel: Kernel) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", file], capture_output=True, check=True)
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", file], capture_output=True, check=True, text=True).stdout
    registers = int(re.search(r"REG:(\d+)", usage.stdout.decode())[1])
    operations, loops = [], []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)", line):
            operations.append(found[1])
            goal = re.search(r"\.L_x_\d+", found[2]) if found[1].startswith("BRA") else None
            if goal and labels.get(goal[0], len(operations)) < len(operations):
                loops.append((labels[goal[0]], len(operations)))
    products = [any(re.match("HMMA|HGMMA|UTC.?MMA", op) for op in operations[a:b]) for a, b in loops]
    sizes = sorted(b - a for (a, b), has in zip(loops, products, strict=True) if has)
    counts = {
        "registers": registers,
        "spills": sum(op.startswith(("LDL", "STL")) for op in operations),
        "instructions": len(operations),
    }
    if kernel.work and len(sizes) == 3:  # signs, tiles, blocks: one inside the other
        tile = sizes[0] * (KEY_SIGNS // kernel.settings["KEY_BITS"]) + sizes[1] - sizes[0]
        tile += (sizes[2] - sizes[1]) / (kernel.settings["BLOCK"] // kernel.work)
        counts["per_token_head"] = round(tile * kernel.warps / kernel.work)
    return counts


def _amd(listing: str) -> dict[str, object]:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:?\s*(\d+)", listing)[1])

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "instructions": len(re.findall(r"^\s+[vsdgb]\w*_\w+", listing, re.M)),
    }


def excess(counts: dict[str, object]) -> str:
    """What is over its bound, or nothing."""
    if "error" in counts:
        return f"does not compile: {counts['error']}"
    kernel = _named(counts["kernel"])
    bounds = {"spills": kernel.spills, "shared": SHARED}
    return ", ".join(f"{n} {counts[n]} > {bound}" for n, bound in bounds.items() if counts[n] > bound)


def table(rows: list[dict[str, object]], beside: list[dict[str, object]] = ()) -> str:
    """beside: rows of another version of triton, of which spills and the last column are shown too."""
    columns = {
        "kernel": "kernel", "target": "target", "registers": "registers", "spills": "spills",
        "shared": "shared memory, bytes", "instructions": "instructions", "per_token_head": "a token and head",
    }  # fmt: skip
    others = {(row["kernel"], row["target"]): row for row in beside}
    more = [f"{columns[name]}, {beside[0]['triton']}" for name in ("spills", "per_token_head")] if beside else []
    heads = [*columns.values(), *more]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row.get(name, "") for name in columns]
        if beside:
            other = others.get((row["kernel"], row["target"]), {})
            cells += [other.get("spills", ""), other.get("per_token_head", "")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def into_page(page: Path, text: str) -> None:
    """Replace what lies between the page's two markers."""
    old = page.read_text()
    begin, end = "<!-- table -->\n", "<!-- end of table -->"
    page.write_text(old[: old.index(begin) + len(begin)] + text + "\n" + old[old.index(end) :])


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for every target and count.")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--kernels", default="", help="only kernels whose name contains this")
    parser.add_argument("--essential", action="store_true", help="only the kernels that the tests compile")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--docs", type=Path, help="a page with the table's markers")
    parser.add_argument(
        "--beside", type=Path, help="json of a run with another triton, for further columns of the page"
    )
    args = parser.parse_args()
    work = [(k.name, t) for k in KERNELS for t in args.targets if args.kernels in k.name]
    work = [(n, t) for n, t in work if not args.essential or _named(n).essential]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(_by_name, *zip(*work, strict=True)))
    print(table(rows))
    print(f"triton {triton.__version__}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.docs:
        beside = json.loads(args.beside.read_text()) if args.beside else []
        into_page(args.docs, f"Compiled by triton {triton.__version__}.\n\n" + table(rows, beside))
    over = [f"{r['kernel']} on {r['target']}: {excess(r)}" for r in rows if excess(r)]
    print(*over, sep="\n", file=sys.stderr)
    return bool(over)


def _named(name: str) -> Kernel:
    return next(k for k in KERNELS if k.name == name)


def _by_name(name: str, target: str) -> dict[str, object]:
    try:
        return compile_one(_named(name), target)
    except Exception as error:  # of the compiler: the others are still worth knowing
        return {"kernel": name, "target": target, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}


if __name__ == "__main__":
    sys.exit(main())
