"""Model and text -> codebooks at several rates: calibration and learning put together, resumable."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import nn

from .calibration import CalibrationPlan, calibrate
from .codebook import CONFIG_FILE, Codebook
from .config import CommVQConfig, ConfigError
from .geometry import read_model
from .learning import LearnedRate, LearningPlan, learn
from .samples import StoredSamples
from .text import longest_windows, self_generated

logger = logging.getLogger(__name__)

HELD_OUT = 0.1  # the last part of every text is kept for the evaluation


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides the model and the texts.

    tokens: budget of calibration tokens, in windows of ``window`` tokens, or shorter ones where the texts are short.
        What is read from afar costs differently in long text (docs/learning-experiments.md), hence the length.
    """

    tokens: int = 32768
    window: int = 4096
    seed: int = 0
    calibration: CalibrationPlan = field(default_factory=CalibrationPlan)
    learning: LearningPlan = field(default_factory=LearningPlan)

    def __post_init__(self):
        if min(self.window, self.tokens) < 64:
            raise ConfigError(f"tokens={self.tokens}, window={self.window}: expected 64 or more of each.")


def split(text: str) -> tuple[str, str]:
    """(to learn from, held out)."""
    cut = int(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def learn_codebooks(
    model: nn.Module,
    tokenizer: Any,
    rates: Sequence[float] = (2.0,),
    texts: dict[str, str] | None = None,
    self_written: bool = False,
    recipe: Recipe | None = None,
    base_model: str | None = None,
    work: str | Path | None = None,
    progress: bool = True,
) -> dict[float, tuple[Codebook, LearnedRate]]:
    """Learn the codebooks of a transformers model.

    tokenizer: may be None when the model writes all text itself.
    texts: name -> text; the last tenth of each is left for evaluation.
    self_written: let the model write text too; also when there are no texts.
    work: folder for intermediate results, made and removed here. A run that was stopped and is started again with the
        same arguments goes on, with the same result.
    Returns rate -> codebook, and what was learned of every head.

    Raises:
        ConfigError: no usable text, or a rate out of reach.  UnsupportedModelError: see geometry.read_model.
    """
    recipe, texts, started = recipe or Recipe(), dict(texts or {}), time.monotonic()
    geometry = read_model(model, base_model).geometry
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or recipe.window
    self_written = self_written or not texts
    share = recipe.tokens // (len(texts) + self_written)
    length = min(recipe.window, share, longest)  # so that every text has a window
    own = share if self_written else 0
    windows = []
    if own < recipe.tokens:
        windows = longest_windows(tokenizer, [split(t)[0] for t in texts.values()], recipe.tokens - own, length)
    if own:
        count = max(1, round(own / length))
        windows += self_generated(model, tokenizer, count, length, recipe.seed, progress=progress)

    key = _fingerprint(recipe, asdict(geometry), windows)
    folder = None if work is None else Path(work)
    if folder is None:
        _, samples = calibrate(model, windows, recipe.calibration, base_model, progress)
    else:
        samples = StoredSamples(folder, geometry.layers, key)
        if not samples.complete:
            calibrate(model, windows, recipe.calibration, base_model, progress, samples)
    recorded = time.monotonic() - started
    learned = learn(samples, rates, recipe.learning, None if folder is None else folder / key, progress)
    notes = {
        "texts": [*texts, *(["written by the model"] if self_written else [])],
        "tokens": sum(map(len, windows)),
        "window": max(map(len, windows)),
        "seed": recipe.seed,
        "samples_per_layer": recipe.calibration.samples,
        "metric_tokens": sum(map(len, recipe.calibration.for_metric(windows))),
        "learning": asdict(recipe.learning),
        "minutes": {"record": round(recorded / 60, 1), "all": round((time.monotonic() - started) / 60, 1)},
        "torch": torch.__version__,
    }
    if folder is not None:
        samples.remove()
        shutil.rmtree(folder / key)
        if not any(folder.iterdir()):
            folder.rmdir()
    return {rate: (Codebook(geometry, result.layers, dict(notes)), result) for rate, result in learned.items()}


def learn_missing(model: nn.Module, config: CommVQConfig, progress: bool = True) -> Codebook:
    """The codebook that ``CommVQConfig(learn=True)`` asks for, from text the model writes itself.

    It is kept under the Hugging Face cache folder, by the model's id and weights, and found there the next time; a run
    that was stopped goes on. ``transformers-commvq learn`` makes a better one from text like yours.
    """
    folder = _learned_folder(model, config)
    if not (folder / CONFIG_FILE).exists():
        logger.warning(
            "no codebooks for %s at %g bits: learning them now from text the model writes itself (minutes); they are "
            "kept in %s",
            config.base_model or getattr(model.config, "_name_or_path", "this model"), config.bits, folder,
        )  # fmt: skip
        learned = learn_codebooks(
            model, None, [config.bits], base_model=config.base_model, work=folder / "work", progress=progress
        )
        learned[config.bits][0].save(folder)
    return Codebook.load(folder)


def _learned_folder(model: nn.Module, config: CommVQConfig) -> Path:
    reading = read_model(model, config.base_model)
    weights = hashlib.sha256(json.dumps(asdict(reading.geometry), sort_keys=True).encode())
    for module in reading.attention.values():  # two fine-tunes of one model need codebooks of their own
        for _, parameter in sorted(module.named_parameters(recurse=True)):
            sample = parameter.detach().flatten()[:1024]
            if not sample.is_meta:
                weights.update(sample.to("cpu", torch.float32).numpy().tobytes())
    name = f"{Path(reading.geometry.id).name}-CommVQ-{config.bits:g}bit-{weights.hexdigest()[:12]}"
    return Path(constants.HF_HOME) / "commvq" / "learned" / name


def _fingerprint(recipe: Recipe, geometry: dict, windows: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([asdict(recipe.calibration), geometry], sort_keys=True).encode())
    for window in windows:
        digest.update(window.numpy().tobytes())
    return digest.hexdigest()[:16]
