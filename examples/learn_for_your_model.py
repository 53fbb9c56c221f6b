"""Learn codebooks for a model from your own text, measure them on text that was held out, and use them.

The same as `transformers-commvq learn`, from Python, to be changed at will. The last tenth of each text is not learned
from. A run that was stopped goes on where it was.

    python examples/learn_for_your_model.py --model Qwen/Qwen3-0.6B --text notes.txt more.txt --bits 2 1 --out books
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import add_model_arguments, load, run
from transformers import PreTrainedModel

from transformers_commvq import CommVQConfig, enable, make_cache
from transformers_commvq.calibration import CalibrationPlan
from transformers_commvq.evaluation import streaming_quality
from transformers_commvq.recipe import Recipe, learn_codebooks, split
from transformers_commvq.text import read_file, windows_of


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="text like the text you will run")
    parser.add_argument("--bits", nargs="+", type=float, default=[2.0], help="rates to learn (default: 2)")
    parser.add_argument("--tokens", type=int, default=30720, help="tokens to learn from (default: 30720)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window to measure on (default: 1024)")
    parser.add_argument("--out", type=Path, default=Path("books"), help="folder for the codebooks (default: books)")
    add_model_arguments(parser)
    return parser


def continued(model: PreTrainedModel, tokenizer: Any, ids, **settings: Any) -> str:
    """What the model writes after the ids of one text, (tokens,)."""
    prompt = ids[None].to(model.device)
    out = model.generate(prompt, attention_mask=prompt * 0 + 1, max_new_tokens=24, do_sample=False, **settings)
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    texts = {Path(path).name: read_file(path) for path in args.text}
    model, tokenizer = load(args)

    recipe = Recipe(tokens=args.tokens, calibration=CalibrationPlan(samples=args.tokens))
    learned = learn_codebooks(
        model, tokenizer, args.bits, texts, recipe=recipe, base_model=args.base_model, work=args.out / ".learning"
    )

    held_out = windows_of(tokenizer, [split(text)[1] for text in texts.values()], 2 * len(texts), args.length)
    for rate, (book, _) in learned.items():
        folder = args.out / f"{Path(book.geometry.id).name}-CommVQ-{rate:g}bit"
        book.save(folder)
        enable(model, CommVQConfig(bits=rate, codebook=str(folder), base_model=args.base_model))
        quality = streaming_quality(model, make_cache, held_out, progress=False)
        book.evaluation = {"held out": quality.to_dict()}  # recorded, so that the codebooks may be published
        book.save(folder)
        print(
            f"\n{folder}: {book.bits:g} bits, perplexity {quality.reference_perplexity:.3f} -> {quality.perplexity:.3f}"
            f", KL {quality.mean_kl:.4f} nats"
        )
        print(f"  plain:      {continued(model, tokenizer, held_out[0], kv_cache=False)!r}")
        print(f"  compressed: {continued(model, tokenizer, held_out[0])!r}")


if __name__ == "__main__":
    run(main)
