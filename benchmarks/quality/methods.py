"""The caches that are compared, by name; those of the package are in ``transformers_commvq.contenders``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from transformers_commvq import CodebookNotFoundError, CommVQConfig
from transformers_commvq.contenders import contender
from transformers_commvq.geometry import read_model
from transformers_commvq.hub import resolve
from transformers_commvq.recipe import Recipe, learn_codebooks, split
from transformers_commvq.storage import MakeCache
from transformers_commvq.text import windows_of

from .kivi import KiviLayer
from .paper_codes import SAMPLES, paper_cache
from .turboquant import TurboQuantLayer
from .windowed import reference_cache

STOCK = ("quanto-4", "quanto-2", "hqq-4", "hqq-2", "hqq-1", "fp8")
REFERENCES = {"kivi": KiviLayer, "turboquant": TurboQuantLayer}
PAPER, OURS = "paper", "commvq"
RATES = {"kivi": ("4", "2"), "turboquant": ("4", "3", "2"), PAPER: ("2", "1"), OURS: ("4", "3", "2", "1.5", "1")}
METHODS = (*STOCK, *(f"{name}-{rate}" for name, rates in RATES.items() for rate in rates))
DESCRIPTIONS = {
    "quanto": "transformers' QuantizedCache, optimum-quanto",
    "hqq": "transformers' QuantizedCache, HQQ",
    "fp8": "transformers' QuantizedCache, FP8",
    "kivi": "KIVI, our reference",
    "turboquant": "TurboQuant, our reference",
    PAPER: "the CommVQ paper's codes, our EM",
    OURS: "this package",
}


@dataclass
class Setting:
    """What methods need besides the model.

    base_model: Hub id whose shipped codebooks are used. texts: label -> text; only the part that ``recipe.split`` gives
    to learning is learned from. work: where learned codebooks are kept. recipe: of those that are not shipped.
    """

    base_model: str | None
    tokenizer: Any
    texts: dict[str, str]
    work: Path
    recipe: Recipe


@contextmanager
def method(name: str, model: PreTrainedModel, setting: Setting) -> Iterator[MakeCache]:
    """A cache by name, ready on the model inside the block.

    Raises ContenderUnavailableError: its package is not installed.
    """
    kind, _, rate = name.partition("-")
    if kind in REFERENCES:
        yield partial(reference_cache, layer=REFERENCES[kind], bits=int(rate))
    elif kind == PAPER:
        texts, window = [split(text)[0] for text in setting.texts.values()], setting.recipe.window
        windows = windows_of(setting.tokenizer, texts, max(1, 2 * SAMPLES // window), window)
        rates = [float(r) for r in RATES[PAPER]]
        make = paper_cache(model, setting.base_model, float(rate), rates, windows, setting.work / PAPER)
        with contender(model, f"{OURS}-2", codebook_of(2.0, model, setting)):  # the model must be ready for any codes
            yield make
    elif kind == OURS:
        with contender(model, name, codebook_of(float(rate), model, setting)) as make:
            yield make
    else:
        with contender(model, name) as make:
            yield make


def codebook_of(rate: float, model: PreTrainedModel, setting: Setting) -> CommVQConfig:
    """Codebooks of ours at a rate: the shipped ones if there are, else learned, all such rates at once, and kept."""
    missing = [r for r in map(float, RATES[OURS]) if not _shipped(r, model, setting)]
    if rate not in missing:
        return CommVQConfig(bits=rate, base_model=setting.base_model)
    folders = {r: setting.work / OURS / f"{r:g}bit" for r in missing}
    if not (folders[rate] / "config.json").exists():
        learned = learn_codebooks(
            model, setting.tokenizer, missing, setting.texts,
            recipe=setting.recipe, base_model=setting.base_model, work=setting.work / OURS / "learning",
        )  # fmt: skip
        for r, (book, _) in learned.items():
            book.save(folders[r])
    return CommVQConfig(bits=rate, codebook=str(folders[rate]), base_model=setting.base_model)


def _shipped(rate: float, model: PreTrainedModel, setting: Setting) -> bool:
    try:
        resolve(CommVQConfig(bits=rate, base_model=setting.base_model), read_model(model, setting.base_model).geometry)
    except CodebookNotFoundError:
        return False
    return True


def held_out(setting: Setting, windows: int, length: int) -> dict[str, Sequence[torch.Tensor]]:
    """Windows of each text's last part, which nothing is learned from."""
    return {
        label: windows_of(setting.tokenizer, [split(text)[1]], windows, length) for label, text in setting.texts.items()
    }
