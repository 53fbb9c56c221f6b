"""``serve``: transformers' own server, with the compressed cache in every model that it loads."""

from __future__ import annotations

import argparse

NAME = "serve"
HELP = "run `transformers serve` with a compressed KV cache; `transformers chat` and OpenAI clients talk to it"

# They replace the cache by one that is not compressed, so that the server would not do what this command says.
_OTHER_CACHES = {
    "--continuous-batching": "continuous batching keeps a paged cache of its own",
    "--compile": "it makes transformers use a static cache",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bits", type=float, default=2.0, help="rate of the codebooks")
    parser.add_argument("--codebook", metavar="REPO_OR_FOLDER", help="default: what kv_cache='commvq' would use")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of a model that is loaded from a folder")
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of the model, or 'demo'")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="all that follows goes to `transformers serve`"
    )


def run(args: argparse.Namespace) -> int:
    from .. import demo_model
    from ..config import CommVQConfig, ConfigError
    from ..loading import kv_cache_by_default

    for option in args.arguments:
        if reason := _OTHER_CACHES.get(option):
            raise ConfigError(f"{option}: {reason}, which is not compressed. Fix: leave it out.")
    from transformers.cli.transformers import app
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ConfigError('serving needs more packages. Fix: pip install "transformers-commvq[serve]"')
    model, base_model = args.model, args.base_model
    if model == "demo":
        model, base_model = str(demo_model.prepare()), base_model or demo_model.BASE_MODEL
    with kv_cache_by_default(CommVQConfig(bits=args.bits, codebook=args.codebook, base_model=base_model)):
        app(["serve", model, *args.arguments], prog_name="transformers", standalone_mode=False)
    return 0
