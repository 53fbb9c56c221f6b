"""``learn``: codebooks for a model from text, one folder a rate."""

from __future__ import annotations

import argparse

NAME = "learn"
HELP = "learn codebooks for a model from text files, a dataset, or text the model writes itself"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of the model, or 'demo'")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0], metavar="N", help="mean bits an element")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="text files; of .jsonl, see --field")
    parser.add_argument("--dataset", nargs="+", default=[], metavar="NAME", help="datasets, NAME or NAME:CONFIGURATION")
    parser.add_argument("--field", help="field of a .jsonl line (default: all) or dataset row (default: text)")
    parser.add_argument("--self-generated", action="store_true", help="let the model write text too (needs no data)")
    parser.add_argument("--out", default=".", metavar="DIR", help="where the codebook folders go")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of a model that is loaded from a folder")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--seed", type=int, default=0, help="decides every draw")
    parser.add_argument("--dtype", default="auto", help="dtype of the model: auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="cpu", help="where the model runs; a GPU is much faster")
    parser.add_argument("--no-gradients", action="store_true", help="estimate what errors cost without a backward pass")
    parser.add_argument("--eval-windows", type=int, default=2, metavar="N", help="held-out windows a text; 0: none")
    parser.add_argument(
        "--work", metavar="DIR", help="intermediate results, to resume a stopped run (default: in --out)"
    )


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from ..calibration import CalibrationPlan
    from ..config import ConfigError
    from ..learning import LearningPlan
    from ..recipe import Recipe, learn_codebooks, split
    from ..text import read_dataset, read_file
    from .models import load

    model, tokenizer, base_model = load(args.model, args.dtype, args.device, args.base_model)
    texts = {Path(path).name: read_file(path, args.field) for path in args.text}
    if len(texts) < len(args.text):
        raise ConfigError("--text: two files have the same name; the codebook could not say which is which.")
    texts |= {name: read_dataset(name, field=args.field or "text") for name in args.dataset}
    recipe = Recipe(
        tokens=args.tokens,
        seed=args.seed,
        calibration=CalibrationPlan(
            samples=args.tokens, seed=args.seed, **({"metric_windows": 0} if args.no_gradients else {})
        ),
        learning=LearningPlan(),
    )
    out = Path(args.out)
    learned = learn_codebooks(
        model, tokenizer, args.bits, texts, args.self_generated, recipe, base_model, args.work or out / ".learning"
    )
    held_out = {name: split(text)[1] for name, text in texts.items()} if args.eval_windows else {}
    for rate, (book, result) in learned.items():
        folder = out / f"{book.geometry.id.split('/')[-1]}-CommVQ-{rate:g}bit"
        book.save(folder)
        if held_out:
            book.evaluation = _measure(model, tokenizer, folder, rate, base_model, held_out, args.eval_windows)
            book.save(folder)
        _report(folder, book, result)
    return 0


def _measure(model, tokenizer, folder, rate, base_model, texts, count) -> dict:
    from .. import disable, enable, make_cache
    from ..config import ConfigError
    from ..evaluation import streaming_quality
    from ..text import windows_of

    out = {}
    length = min(2048, getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2048)
    enable(model, {"codebook": str(folder), "bits": rate, "base_model": base_model})
    try:
        for name, text in texts.items():
            try:
                windows = windows_of(tokenizer, [text], count, length)
            except ConfigError:
                continue  # too short to hold out a window
            out[name] = streaming_quality(model, make_cache, windows).to_dict()
    finally:
        disable(model)
    return out


def _report(folder, book, result) -> None:
    import json

    from .pictures import draw

    (folder / "report.json").write_text(json.dumps(result.report, indent=1) + "\n")
    print(f"{folder}: {book.bits:g} bits an element, {book.nbytes / 2**20:.2f} MiB")
    for name, row in book.evaluation.items():
        print(f"  {name}: perplexity {row['reference_perplexity']:.3f} -> {row['perplexity']:.3f} "
              f"({row['change']:+.2%}), KL {row['kl']:.4f} nats, {row['windows']} windows")  # fmt: skip
    for path, shown in draw(folder, book, result.report["loss_curves"]).items():
        print(f"  {shown}: {path}")
