"""Decode step, whole generate(), prefill and memory of every cache, on one device, in one run.

    python -m benchmarks.speed                     Llama 3.1 8B geometry on a GPU, 1K to 128K tokens
    python -m benchmarks.speed --device cpu --model smollm2 --contexts 4096 8192 --bits 1 2
    python -m benchmarks.speed --part kernels      attention over codes alone, against fp16 kernels (GPU)
    python -m benchmarks.speed --part plots        draw again from the recorded json

Everything is paired: the methods take turns within one process. Results go to benchmarks/results, a json file and two
plots for each model and device; the json is written after every context, so that a run that is cut short leaves what
it has.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from . import measure, plots
from .methods import OTHERS, OURS, PLAIN, NotHere, build
from .models import SUBJECTS

WARM_UP_TOKENS = 448  # enough that every cache holds quantized tokens: compilers and tuners run before the clock does
RESULTS = Path(__file__).resolve().parent.parent / "results"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("models", "kernels", "all", "plots"), default=None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--model", choices=SUBJECTS, default=None, help="llama-8b on a GPU, smollm2 on a CPU")
    parser.add_argument("--contexts", type=int, nargs="+", help="prompt lengths in tokens")
    parser.add_argument("--methods", nargs="+", choices=(*OTHERS, OURS), default=[*OTHERS, OURS])
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0, 1.0], help=f"rates of {OURS}, bits an element")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new", type=int, default=32, help="tokens that each generate() makes")
    parser.add_argument("--rounds", type=int, default=1, help="generate() calls of each method and context")
    parser.add_argument("--steps", type=int, default=32, help="decode steps of each method and context")
    parser.add_argument("--chunk", type=int, default=None, help="prefill_chunk_size; 4096 on a GPU, none (0) on a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    gpu = args.device.startswith("cuda")
    args.part = args.part or ("all" if gpu else "models")
    args.dtype = args.dtype or ("bfloat16" if gpu else "float32")
    args.model = args.model or ("llama-8b" if gpu else "smollm2")
    args.contexts = args.contexts or [1024 * 2**i for i in range(8 if gpu else 4)]
    args.chunk = (4096 if gpu else 0) if args.chunk is None else args.chunk
    ours = [f"{OURS}-{bits:g}" for bits in args.bits]
    args.methods = [name for m in args.methods for name in (ours if m == OURS else [m])]
    if args.part in ("kernels", "all") and not gpu:
        parser.error("--part kernels times GPU kernels: it needs --device cuda.")
    if min(args.rounds, args.new, args.steps) < 1:
        parser.error("--rounds, --new and --steps: 1 or more.")
    return args


def facts(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {}
    for package in ("triton", "numba", "optimum-quanto", "hqq", "flash_attn"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": name,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def run_models(args: argparse.Namespace) -> Path:
    """Time the methods on a model; returns the json file."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    subject = SUBJECTS[args.model]
    model = subject.load(device, dtype)
    model.generation_config.eos_token_id = None  # every method makes all the tokens asked for
    model.generation_config.pad_token_id = 0
    settings = {k: getattr(args, k) for k in ("batch", "new", "rounds", "steps", "chunk", "dtype")}
    report: dict[str, Any] = {
        "model": subject.name, **facts(device), **settings, "plain": PLAIN, "not_here": {}, "contexts": {},
    }  # fmt: skip
    slug = re.sub(r"\W+", "_", report["device"]).strip("_").lower()
    file = args.results / f"speed_{args.model}_{slug}.json"
    args.results.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        methods = []
        for name in args.methods:
            try:
                methods.append(build(name, model, subject, Path(folder)))
            except NotHere as reason:
                report["not_here"][name] = str(reason)
                print(f"{name}: left out, {reason}")
        vocabulary = model.config.vocab_size
        warm = torch.randint(vocabulary, (args.batch, WARM_UP_TOKENS), generator=generator).to(device)
        print("warming up")
        for method in list(methods):
            try:
                _, cache = measure.generate_once(method, warm, 4, args.chunk or None)
                measure.one_step(method, cache, warm[:, -1:])
            except Exception as error:  # another package's fault is no reason to lose the other numbers
                if method.name == PLAIN or method.name.startswith(OURS):
                    raise
                report["not_here"][method.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                print(f"{method.name}: left out, {report['not_here'][method.name]}")
                methods.remove(method)
        for context in args.contexts:
            print(f"{context} tokens")
            ids = torch.randint(vocabulary, (args.batch, context), generator=generator).to(device)
            results = measure.one_context(
                methods, ids, new=args.new, rounds=args.rounds, steps=args.steps, chunk=args.chunk or None
            )
            against = [m.name for m in methods if not m.name.startswith(OURS)]
            ratios = {name: measure.ratios(results, name) for name in against}
            report["contexts"][str(context)] = {"methods": results, "ratios_to": ratios}
            file.write_text(json.dumps(report, indent=1) + "\n")
            _show(results, ratios)
    print(f"wrote {file}")
    return file


def _show(results: dict[str, Any], ratios: dict[str, Any]) -> None:
    """One line a method, then how fast ours decodes in generate() beside each other method."""
    heads = ("step", "generate", "prefill", "storing", "cache", "peak")
    print("".join([f"  {'':10s}", *(f"{head:>13s}" for head in heads), f"  ratios to {PLAIN}"]))
    for name, row in results.items():
        if not row["rounds"]:
            print(f"  {name:10s} {row['failed']}")
            continue
        cells = (
            f"{1e3 * row['step_s']:.2f} ms" if row.get("step_s") else "",
            f"{row['tokens_per_s']:.2f} t/s",
            f"{row['prefill_s']:.3f} s",
            f"{100 * row['storing_share_of_prefill']:.1f}%" if "storing_share_of_prefill" in row else "",
            f"{row['cache_bytes'] / 1e6:.2f} MB",
            f"{row['peak_bytes'] / 1e6:.0f} MB" if row.get("peak_bytes") is not None else "",
        )
        beside = ", ".join(f"{k} {v:.2f}" for k, v in ratios.get(PLAIN, {}).get(name, {}).items())
        print("".join([f"  {name:10s}", *(f"{cell:>13s}" for cell in cells), f"  {beside}"]))
    for name in (n for n in results if n.startswith(OURS)):
        speeds = {other: row.get(name, {}).get("decode_speed") for other, row in ratios.items()}
        beside = [f"{other} {speed:.2f}" for other, speed in speeds.items() if speed]
        if beside:
            print(f"  {name} decodes in generate() at this many times the speed of: {', '.join(beside)}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers|optimum|hqq|torch")
    if args.part in ("kernels", "all"):
        from . import kernel_times

        kernel_times.run(args.results)
    if args.part in ("models", "all"):
        plots.draw(run_models(args))
    if args.part == "plots":
        for file in sorted(args.results.glob("speed_*.json")):
            plots.draw(file)
    return 0
