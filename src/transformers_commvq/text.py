"""Text -> windows of token ids: from files, from a `datasets` dataset, or written by the model itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .config import ConfigError

logger = logging.getLogger(__name__)

SHORTEST = 1024  # tokens of a window, where the texts hold no more in a row


def read_file(path: str | Path, field: str | None = None) -> str:
    """The text of a file; of a .jsonl file the named field of every line, or all string fields joined by newlines.

    Raises ConfigError when the file is missing, empty, or a line lacks the field.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such text file.")
    raw = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".jsonl":
        try:
            rows = [json.loads(line) for line in raw.splitlines() if line.strip()]
            raw = "\n\n".join(
                row[field] if field else "\n".join(v for v in row.values() if isinstance(v, str)) for row in rows
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path}: expected one json object a line with text in {field or 'any field'!r}: {error!r}."
            ) from error
    if not raw.strip():
        raise ConfigError(f"{path}: holds no text.")
    return raw


def read_dataset(name: str, split: str = "train", field: str = "text", characters: int = 4_000_000) -> str:
    """The first rows of a `datasets` dataset, streamed. name: ``owner/dataset`` or ``owner/dataset:configuration``."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError("--dataset needs the datasets library. Fix: pip install datasets") from error
    name, _, configuration = name.partition(":")
    parts, size = [], 0
    for row in load_dataset(name, configuration or None, split=split, streaming=True):
        if field not in row:
            raise ConfigError(f"dataset {name}: rows have fields {sorted(row)}, not {field!r}. Fix: --field NAME")
        parts.append(row[field])
        size += len(row[field])
        if size >= characters:
            break
    return "\n\n".join(parts)


def windows_of(tokenizer, texts: Sequence[str], count: int, length: int) -> list[torch.Tensor]:
    """``count`` windows of ``length`` token ids, dealt in turn from the texts and spread evenly over each.

    A window starts with the tokenizer's BOS token if that is what it does to any text. Windows of a text do not
    overlap; fewer are returned when the texts are short.

    Raises ConfigError when not even one window fits.
    """
    return _dealt(_windows_by_text(tokenizer, texts, count, length), count, length)


def longest_windows(tokenizer, texts: Sequence[str], tokens: int, length: int) -> list[torch.Tensor]:
    """About ``tokens`` tokens in windows of ``length``, as ``windows_of`` makes them.

    Windows are shorter, but not below ``SHORTEST``, where a text holds none or much would be missing. A text that holds
    none even then is left out, with a warning.

    Raises ConfigError when not even one window fits.
    """
    lengths = [length]
    while lengths[-1] // 2 >= SHORTEST:
        lengths.append(lengths[-1] // 2)
    usable = []
    for i, text in enumerate(texts, 1):
        if _windows_by_text(tokenizer, [text], 1, lengths[-1])[0]:
            usable.append(text)
        else:
            logger.warning(
                "text %d of %d, which begins %r, holds no %d tokens in a row: nothing is learned from it. "
                "Fix: join short texts into one file.", i, len(texts), text[:40], lengths[-1],
            )  # fmt: skip
    for length in lengths:
        count = max(1, tokens // length)
        by_text = _windows_by_text(tokenizer, usable, count, length) if usable else [[]]
        if all(by_text) and sum(map(len, by_text)) * length >= 0.75 * tokens:
            break
    return _dealt(by_text, count, length)


def _windows_by_text(tokenizer, texts: Sequence[str], count: int, length: int) -> list[list[torch.Tensor]]:
    """Each text's windows: its share of ``count``, rounded up, or fewer if it is short."""
    start = tokenizer("a")["input_ids"][:1]
    bos = start if tokenizer.bos_token_id is not None and start == [tokenizer.bos_token_id] else []
    room = length - len(bos)
    share = -(-count // len(texts))
    per_text = []
    for text in texts:
        # three or four characters a token: these pieces are more than long enough
        piece = 8 * length
        if len(text) < share * piece:
            ids = _ids(tokenizer, text)
            here = min(share, len(ids) // room)
            parts = [ids[i * len(ids) // here :] for i in range(here)]
        else:
            starts = [i * (len(text) // share) for i in range(share)]
            parts = [_ids(tokenizer, text[start : start + piece]) for start in starts]
        per_text.append([torch.tensor(bos + ids[:room]) for ids in parts if len(ids) >= room])
    return per_text


def _dealt(by_text: Sequence[Sequence[torch.Tensor]], count: int, length: int) -> list[torch.Tensor]:
    """Windows of every text in turn, ``count`` at most."""
    longest = max(map(len, by_text))
    dealt = [windows[i] for i in range(longest) for windows in by_text if i < len(windows)][:count]
    if not dealt:
        raise ConfigError(f"the texts hold no {length} tokens in a row. Fix: give more text, or a smaller window.")
    return dealt


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


@torch.no_grad()
def self_generated(
    model, tokenizer, count: int, length: int, seed: int, batch: int = 8, progress: bool = True
) -> list[torch.Tensor]:
    """``count`` windows of text that the model writes itself, sampled from nothing but its first token.

    tokenizer: only asked for its first token; None asks the model's own configuration.
    The global random state is left as it was.
    """
    sources = [tokenizer, getattr(model, "generation_config", None), model.config]
    named = [getattr(x, f"{kind}_token_id", None) for x in sources for kind in ("bos", "eos", "pad")]
    begin = next((t[0] if isinstance(t, list) else t for t in named if t is not None), 0)
    out = []
    with torch.random.fork_rng(), tqdm(total=count, desc="self-generate", unit="window", disable=not progress) as bar:
        torch.manual_seed(seed)
        while len(out) < count:
            rows = min(batch, count - len(out))
            ids = torch.full((rows, 1), begin, device=model.device)
            text = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=begin,
            )  # fmt: skip
            out.extend(text.cpu())
            bar.update(rows)
    return out
