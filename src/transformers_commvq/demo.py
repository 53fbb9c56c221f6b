"""``make demo``: one long prompt, answered with the plain cache and with compressed ones, everything measured here."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

from . import demo_model
from .cache import CommVQCache
from .config import CommVQConfig, CommVQError, ConfigError
from .demo_text import Prompt, build_prompt, held_passage
from .evaluation import streaming_quality
from .geometry import cache_name, generate_cache_name
from .integration import disable, enable, make_cache
from .storage import uncompressed

ANSWER_TOKENS = 32
WARM_UP_TOKENS = 384  # enough for a compressed cache to hold codes, so that compiling kernels is not timed
TURNS, TURN_TOKENS = 4, 8  # decoding is timed in turns, so that another load on the machine meets every cache
CHUNK = 128  # tokens a step while the held passage streams through the cache
NEEDED = ("rich", "matplotlib")


@dataclass(frozen=True)
class DemoOptions:
    """What the command line sets; see ``transformers-commvq demo --help``."""

    model: str | None = None
    base_model: str | None = None
    bits: Iterable[float] = (2.0, 1.0)
    codebook: Iterable[str] = ()
    tokens: int = 4200
    held_tokens: int = 2048
    dtype: str = "auto"
    device: str = "auto"
    out: Path = Path("out")


@dataclass
class Measured:
    """One cache on the prompt and on the held passage.

    tokens, nbytes, fp16_bytes: of the cache after the answer; fp16_bytes is what 16 bits an element would take.
    codebook_bytes: shared by every cache of the model and not in nbytes.
    prefill, decode: tokens a second; decode from the median step.
    perplexity, kl: on the held passage; kl, nats a token, against the plain cache, None for itself.
    sizes: (tokens, bytes) of the cache while it grew.
    """

    name: str
    answer: str
    right: bool
    tokens: int
    nbytes: int
    fp16_bytes: int
    codebook_bytes: int
    prefill: float
    decode: float
    perplexity: float
    kl: float | None
    sizes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return self.nbytes / self.fp16_bytes

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


class _Clock(BaseStreamer):
    """Notes when the prompt has been read and when each token came."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def cache_bytes(cache: Cache) -> tuple[int, int]:
    """(bytes of every tensor the cache holds, bytes of 16 bits for each of its key and value elements)."""
    if isinstance(cache, CommVQCache):
        report = cache.memory_report()
        return report["total"], report["fp16"]
    held = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.untyped_storage().nbytes() for t in held), 2 * sum(t.numel() for t in held)


def choose_device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Resolve "auto": a GPU if there is one; bfloat16 where the hardware computes in it, else float32.

    Raises ConfigError: no such dtype.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        can = getattr(torch.cpu, "get_capabilities", dict)()
        native = device != "cpu" or any(can.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        dtype = "bfloat16" if native else "float32"
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"dtype={dtype!r}. Fix: float32, float16, bfloat16 or auto.")
    return torch.device(device), getattr(torch, dtype)


@contextmanager
def using(model: PreTrainedModel, config: CommVQConfig | None):
    """The model makes caches of a config meanwhile, or plain ones."""
    if config is None:
        disable(model)
        yield
        return
    enable(model, config)
    try:
        yield
    finally:
        disable(model)


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: Any, prompt: Prompt) -> tuple[dict[str, Any], Cache, torch.Tensor]:
    """generate() on the prompt with the cache the model makes by default.

    Returns the fields of Measured it decides, the cache, and the last token, (1, 1), which the cache does not hold yet.
    """
    ids = torch.tensor([prompt.ids], device=model.device)
    mask = torch.ones_like(ids)
    settings = GenerationConfig(do_sample=False, max_new_tokens=ANSWER_TOKENS, return_dict_in_generate=True)
    warm = slice(WARM_UP_TOKENS)
    model.generate(ids[:, warm], attention_mask=mask[:, warm], do_sample=False, max_new_tokens=3)
    clock, start = _Clock(), time.perf_counter()
    result = model.generate(ids, attention_mask=mask, generation_config=settings, streamer=clock)
    prefill = ids.shape[1] / (clock.times[1] - start)  # times[0] is the prompt handed in
    text = tokenizer.decode(result.sequences[0, ids.shape[1] :], skip_special_tokens=True).strip()
    cache = result[generate_cache_name()]
    nbytes, fp16_bytes = cache_bytes(cache)
    tokens = cache.get_seq_length()
    fields = {
        "answer": text,
        "right": prompt.expected in text,
        "tokens": tokens,
        "nbytes": nbytes,
        "fp16_bytes": fp16_bytes,
        "codebook_bytes": cache.codebook.nbytes if isinstance(cache, CommVQCache) else 0,
        "prefill": prefill,
        "sizes": [(tokens, nbytes)],
    }
    return fields, cache, result.sequences[:, -1:]


@torch.inference_mode()
def decode_times(model: PreTrainedModel, cache: Cache, token: torch.Tensor) -> list[float]:
    """Seconds of each of TURN_TOKENS greedy steps on from a cache."""
    times = []
    for _ in range(TURN_TOKENS):
        start = time.perf_counter()
        token = model(input_ids=token, use_cache=True, **{cache_name(type(model)): cache}).logits[:, -1:].argmax(-1)
        token.cpu()  # wait for a GPU
        times.append(time.perf_counter() - start)
    return times


@contextmanager
def recorded_sizes(model: PreTrainedModel):
    """Yields {id of a cache: its (tokens, bytes) after every forward} of the caches the model uses meanwhile."""
    sizes: dict[int, list[tuple[int, int]]] = {}

    def note(module, args, kwargs, output):
        cache = kwargs[cache_name(type(model))]
        sizes.setdefault(id(cache), []).append((cache.get_seq_length(), cache_bytes(cache)[0]))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def stream(model: PreTrainedModel, held: torch.Tensor):
    """The held passage through the compressed and the plain cache: (StreamingQuality, sizes ours, sizes plain)."""
    ours, plain = [], []  # the caches made, so that their ids stay theirs

    def keep(make: Callable[[PreTrainedModel], Cache], made: list[Cache]):
        def call(model: PreTrainedModel) -> Cache:
            made.append(make(model))
            return made[-1]

        return call

    with recorded_sizes(model) as sizes:
        quality = streaming_quality(
            model,
            keep(make_cache, ours),
            [held],
            chunk=CHUNK,
            make_reference=keep(uncompressed, plain),
            progress=False,
        )
    return quality, sizes[id(ours[0])], sizes[id(plain[0])]


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    specs: dict[str, CommVQConfig],
    prompt: Prompt,
    held: torch.Tensor,
    stage: Callable[[str], None] = lambda text: None,
) -> list[Measured]:
    """Measure the plain cache and every config of ``specs`` (name -> config).

    stage: told what is about to be done; it is called ``stages(specs)`` times.
    """
    settings = {"plain": None, **specs}
    answers, times = {}, {name: [] for name in settings}
    for name, config in settings.items():
        stage(f"{name} cache: answering")
        with using(model, config):
            answers[name] = answer(model, tokenizer, prompt)
    stage("decoding on, in turns")
    for _ in range(TURNS):
        for name, config in settings.items():
            with using(model, config):
                times[name] += decode_times(model, *answers[name][1:])
    rows = [
        Measured(name, **fields, decode=1 / statistics.median(times[name]), perplexity=math.nan, kl=None)
        for name, (fields, _, _) in answers.items()
    ]
    for row in rows[1:]:
        stage(f"{row.name} cache: perplexity of {len(held):,} tokens, beside the plain cache")
        with using(model, specs[row.name]):
            quality, ours, plain = stream(model, held)
        row.perplexity, row.kl, row.sizes = quality.perplexity, quality.mean_kl, ours + row.sizes
        if row is rows[1]:  # the plain cache is the same for all: once is enough
            rows[0].perplexity, rows[0].sizes = quality.reference_perplexity, plain + rows[0].sizes
    return rows


def stages(specs: dict[str, CommVQConfig]) -> int:
    return 2 + 2 * len(specs)


def _rate(bits: float) -> str:
    return f"{bits:g}-bit"


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"


def run_demo(options: DemoOptions) -> int:
    """The whole demo; returns the exit code.

    Raises CommVQError: packages or the demo model are missing, or there are no codebooks for the model.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise CommVQError(f"the demo needs {' and '.join(missing)}. Fix: pip install 'transformers-commvq[demo]'")
    from . import demo_report as report

    transformers_logging.disable_progress_bar()
    device, dtype = choose_device_and_dtype(options.device, options.dtype)
    base_model = options.base_model
    if options.model is None:
        base_model = base_model or demo_model.BASE_MODEL
        model, tokenizer = demo_model.load(dtype)
    else:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    model.to(device)
    specs = {_rate(bits): CommVQConfig(bits=bits, base_model=base_model) for bits in options.bits}
    if options.codebook:
        specs = {Path(name).name: CommVQConfig(codebook=name, base_model=base_model) for name in options.codebook}
    for config in specs.values():  # a missing codebook is told before minutes of work
        enable(model, config)
    prompt = build_prompt(tokenizer, options.tokens)
    held = torch.tensor(held_passage(tokenizer, options.held_tokens))
    about = {
        "model": base_model or options.model,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "prompt_tokens": len(prompt.ids),
        "held_tokens": len(held),
        "chunk": CHUNK,
        "sink_tokens": CommVQConfig().sink_tokens,
        "residual_length": CommVQConfig().residual_length,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    report.introduce(about, prompt)
    start = time.perf_counter()
    with report.progress(stages(specs)) as stage:
        rows = measure(model, tokenizer, specs, prompt, held, stage)
    about["seconds"] = round(time.perf_counter() - start, 1)
    report.show(about, rows)
    report.save(about, rows, Path(options.out))
    return 0
