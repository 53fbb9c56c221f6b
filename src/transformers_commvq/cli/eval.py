"""``eval``: what caches cost on text and on tasks, in the way a cache is used; by several processes if so launched."""

from __future__ import annotations

import argparse

NAME = "eval"
HELP = (
    "measure perplexity, KL divergence, passkey retrieval or GSM8K with a compressed cache, and with others beside it"
)
TASKS = ("perplexity", "passkey", "gsm8k")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of the model, or 'demo'")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["perplexity"], help="what to measure")
    parser.add_argument(
        "--cache",
        nargs="+",
        metavar="NAME",
        help="caches: dynamic (not compressed), quanto-4, quanto-2, hqq-4, hqq-2, hqq-1, fp8, commvq-RATE; "
        "default: commvq at --bits",
    )
    parser.add_argument("--bits", type=float, default=2.0, help="rate of the codebook, where --cache names none")
    parser.add_argument("--codebook", metavar="REPO_OR_FOLDER", help="default: what kv_cache='commvq' would use")
    parser.add_argument("--sink-tokens", type=int, default=4, help="first tokens kept exact by commvq")
    parser.add_argument("--residual-length", type=int, default=128, help="newest tokens kept exact by commvq")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a step")
    text = parser.add_argument_group("perplexity, and KL divergence from the uncompressed cache")
    text.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text files; of .jsonl, see --field")
    text.add_argument("--field", help="field of a .jsonl line (default: all)")
    text.add_argument("--windows", type=int, default=3, help="windows a text")
    text.add_argument("--length", type=int, default=2048, help="tokens of a window")
    passkey = parser.add_argument_group("passkey: a number hidden in other text")
    passkey.add_argument("--lengths", type=int, nargs="+", default=[1024], metavar="N", help="tokens of the prompts")
    passkey.add_argument(
        "--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9], metavar="D", help="where: 0 is the start, 1 the end"
    )
    passkey.add_argument("--trials", type=int, default=3, help="passkeys a length and depth")
    passkey.add_argument("--haystack", metavar="FILE", help="the other text (default: five sentences over and over)")
    gsm8k = parser.add_argument_group("gsm8k: grade-school problems after worked examples")
    gsm8k.add_argument("--file", metavar="JSONL", help="problems: question and answer of each, as GSM8K's files")
    gsm8k.add_argument("--problems", type=int, default=20, help="how many are asked, from the end of the file")
    gsm8k.add_argument("--shots", type=int, default=8, help="worked examples, from the beginning of the file")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of a model that is loaded from a folder")
    parser.add_argument("--dtype", default="auto", help="dtype of the model: auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="where the model runs")
    parser.add_argument("--record", action="store_true", help="put the results into the codebook folder and its card")
    parser.add_argument("--json", action="store_true", help="print json")


def run(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from ..config import CommVQConfig, ConfigError
    from ..contenders import contender
    from ..processes import shared
    from ..tasks import read_problems
    from ..text import read_file
    from .models import load

    texts = {Path(path).name: read_file(path, args.field) for path in args.text}
    problems = read_problems(args.file) if args.file else []
    haystack = read_file(args.haystack, args.field) if args.haystack else None
    for task, given, option in (("perplexity", texts, "--text FILE"), ("gsm8k", problems, "--file JSONL")):
        if task in args.task and not given:
            raise ConfigError(f"nothing to measure. Fix: give {option} for the task {task}, or name another --task.")
    names = args.cache or [f"commvq-{args.bits:g}"]
    if args.codebook and sum(name.startswith("commvq") for name in names) != 1:
        raise ConfigError(f"--codebook is for one commvq cache; --cache names {', '.join(names)}.")
    if args.record and not (args.codebook and Path(args.codebook).is_dir()):
        raise ConfigError(f"--record: --codebook {args.codebook} is no folder. Fix: name a codebook folder.")
    with shared() as share:
        model, tokenizer, base_model = load(args.model, args.dtype, share.device(args.device), args.base_model)
        config = CommVQConfig(
            codebook=args.codebook,
            base_model=base_model,
            sink_tokens=args.sink_tokens,
            residual_length=args.residual_length,
        )
        report = {"model": base_model or args.model, "dtype": str(model.dtype).removeprefix("torch."), "caches": {}}
        for name in names:
            with contender(model, name, config) as make:
                report["caches"][name] = _measure(args, share, model, tokenizer, make, texts, haystack, problems)
    if share.rank == 0:
        if args.record:
            _record(args.codebook, next(row for name, row in report["caches"].items() if name.startswith("commvq")))
        print(json.dumps(report, indent=2) if args.json else summary(report))
    return 0


def _measure(args, share, model, tokenizer, make, texts, haystack, problems) -> dict:
    """One cache's part of the report."""
    from .. import tasks
    from ..processes import quality
    from ..storage import bits_per_element
    from ..text import windows_of

    out: dict = {"bits": round(bits_per_element(model, make), 4)}
    if "perplexity" in args.task:
        out["texts"] = {}
        for name, text in texts.items():
            windows = windows_of(tokenizer, [text], args.windows, args.length)
            measured = quality(share, model, make, windows, args.chunk)
            out["texts"][name] = measured.to_dict() | {"cache_bytes": max(measured.cache_bytes)}
    if "passkey" in args.task:
        grid = {"lengths": args.lengths, "depths": args.depths, "trials": args.trials, "haystack": haystack}
        out["passkey"] = tasks.passkey_retrieval(model, tokenizer, make, **grid, chunk=args.chunk, run=share.map)
    if "gsm8k" in args.task:
        counts = {"count": args.problems, "shots": args.shots}
        answers = tasks.gsm8k(model, tokenizer, make, problems, **counts, chunk=args.chunk, run=share.map)
        out["gsm8k"] = {**counts, "accuracy": tasks.accuracy(answers, problems), "answers": answers}
    return out


def _record(folder: str, measured: dict) -> None:
    """Put a cache's part of the report into a codebook's config.json, and into its card if it has one."""
    from ..cards import renew_card
    from ..codebook import Codebook

    book = Codebook.load(folder)
    book.evaluation |= measured.get("texts", {})
    if "passkey" in measured:
        book.evaluation["passkey"] = measured["passkey"]
    if "gsm8k" in measured:
        book.evaluation["gsm8k"] = {k: v for k, v in measured["gsm8k"].items() if k != "answers"}
    book.save(folder)
    renew_card(folder)


def summary(report: dict) -> str:
    """A report as a table, one line a cache."""
    from ..table import markdown_table

    columns: dict[str, list[str]] = {"cache": [], "bits": []}
    for name, row in report["caches"].items():
        columns["cache"].append(name)
        columns["bits"].append(f"{row['bits']:.2f}")
        for text, measured in row.get("texts", {}).items():
            error = measured["kl_standard_error"]
            cells = {
                "perplexity": f"{measured['perplexity']:.3f}",
                "change": f"{measured['change']:+.2%}",
                "KL": f"{measured['kl']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
            }
            for what, cell in cells.items():
                columns.setdefault(f"{text}: {what}", []).append(cell)
        for length, depths in row.get("passkey", {}).items():
            for depth, hit in depths.items():
                columns.setdefault(f"passkey {length} at {float(depth):g}", []).append(f"{hit:.0%}")
        if "gsm8k" in row:
            columns.setdefault("gsm8k", []).append(f"{row['gsm8k']['accuracy']:.0%}")
    lines = [markdown_table(list(columns), list(zip(*columns.values(), strict=True)))]
    for text, row in next(iter(report["caches"].values())).get("texts", {}).items():
        lines.append(f"{text}: perplexity {row['reference_perplexity']:.3f} uncompressed; {row['windows']} windows")
    return "\n".join(lines)
