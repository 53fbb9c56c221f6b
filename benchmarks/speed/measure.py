"""What is measured, on one context length: whole generate() calls in turns, then decode steps in turns."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Cache
from transformers.generation.streamers import BaseStreamer

from transformers_commvq.geometry import cache_name, generate_cache_name
from transformers_commvq.layer import CommVQLayer
from transformers_commvq.storage import cache_bytes

from .methods import Method


class PeakMemory:
    """Most memory held since ``start``, beyond what was held then: the allocator's on a GPU, else the process's.

    A process's is Linux's high-water mark of resident memory, set back at ``start``: it counts whole pages and what
    the C library keeps, so small differences mean nothing.
    """

    def __init__(self, device: torch.device):
        self.device, self.before = device, 0

    def start(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)  # or memory freed earlier would hide what is needed now
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            self.before = None
        else:
            self.before = self._high_water()

    @staticmethod
    def _high_water() -> int:
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    @property
    def nbytes(self) -> int | None:
        """None where the system cannot say."""
        if self.before is None:
            return None
        now = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self._high_water()
        return now - self.before


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Storing:
    """Time spent in CommVQLayer.append (encoding, and keeping window and sinks), without making the host wait."""

    def __init__(self, device: torch.device):
        self.device, self.spans, self.active = device, [], True

    @contextmanager
    def watch(self):
        real = CommVQLayer.append

        def timed(layer, *args):
            begin = self._now()
            result = real(layer, *args)
            if self.active:
                self.spans.append((begin, self._now()))
            return result

        CommVQLayer.append = timed
        try:
            yield self
        finally:
            CommVQLayer.append = real

    def _now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> float | None:
        """None if no layer of a CommVQCache was used."""
        wait(self.device)
        if self.device.type == "cuda":
            return sum(a.elapsed_time(b) for a, b in self.spans) / 1e3 if self.spans else None
        return sum(b - a for a, b in self.spans) if self.spans else None


class Clock(BaseStreamer):
    """Notes when each token reached the host, the prompt itself first; with the first new one ``storing`` ends."""

    def __init__(self, storing: Storing):
        self.times: list[float] = []
        self.storing = storing

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.storing.active = len(self.times) < 2

    def end(self) -> None:
        pass


@torch.inference_mode()
def generate_once(method: Method, ids: torch.Tensor, new: int, chunk: int | None) -> tuple[dict[str, Any], Cache]:
    """One generate() on a prompt: (seconds to the first token and of all, tokens a second, bytes; the cache)."""
    device, cache = ids.device, method.make()
    clock = Clock(Storing(device))
    settings = {generate_cache_name(): cache} | ({"prefill_chunk_size": chunk} if chunk else {})
    mask = torch.ones_like(ids)
    peak = PeakMemory(device)
    peak.start()
    with clock.storing.watch():
        wait(device)
        start = time.perf_counter()
        method.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, streamer=clock, **settings)
        wait(device)
    end = time.perf_counter()
    times = clock.times[1:]  # the first is the prompt handed in
    if len(times) != new:
        raise RuntimeError(f"{method.name} made {len(times)} tokens of {new}: the comparison would not be fair.")
    row = {
        "prefill_s": times[0] - start,
        "storing_s": clock.storing.seconds,  # of the prompt
        "whole_s": end - start,
        "tokens_per_s": new / (end - start),
        "decode_tokens_per_s": (new - 1) / (times[-1] - times[0]) if new > 1 else None,
        "cache_bytes": cache_bytes(cache),
        "peak_bytes": peak.nbytes,
    }
    return row, cache


@torch.inference_mode()
def one_step(method: Method, cache: Cache, token: torch.Tensor) -> tuple[float, torch.Tensor]:
    """(seconds, next token) of one greedy step on from a cache."""
    name = cache_name(type(method.model))
    wait(token.device)
    start = time.perf_counter()
    token = method.model(input_ids=token, use_cache=True, **{name: cache}).logits[:, -1:].argmax(-1)
    wait(token.device)
    return time.perf_counter() - start, token


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def one_context(
    methods: list[Method], ids: torch.Tensor, *, new: int, rounds: int, steps: int, chunk: int | None, say=print
) -> dict[str, dict[str, Any]]:
    """Every method on one prompt.

    The methods take turns: ``rounds`` times a whole generate() each, then ``steps`` times one decode step each, so
    that clocks, heat and other load are the same for all.

    Returns, for each method, the samples and their medians, or why it has none.
    """
    device = ids.device
    samples: dict[str, list[dict[str, Any]]] = {m.name: [] for m in methods}
    failed: dict[str, str] = {}
    caches: dict[str, Cache] = {}
    for turn in range(rounds):
        order = methods[turn % len(methods) :] + methods[: turn % len(methods)]
        for method in order:
            if method.name in failed:
                continue
            try:
                row, cache = generate_once(method, ids, new, chunk)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                failed[method.name] = "out of memory"
                cache = None
            else:
                samples[method.name].append(row)
                if turn == rounds - 1:
                    caches[method.name] = cache
                say(f"  {method.name:10s} prefill {row['prefill_s']:8.3f} s, {row['tokens_per_s']:8.2f} tokens/s whole")
            del cache
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in caches}
    tokens = {name: ids[:, -1:].clone() for name in caches}
    for _ in range(steps):
        for method in methods:
            if method.name not in caches:
                continue
            try:
                seconds, tokens[method.name] = one_step(method, caches[method.name], tokens[method.name])
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                failed[method.name] = "out of memory while other methods' caches were held"
                del caches[method.name]
            else:
                times[method.name].append(seconds)
    return {m.name: _summary(samples[m.name], times.get(m.name, []), failed.get(m.name)) for m in methods}


def _summary(samples: list[dict[str, Any]], steps: list[float], failed: str | None) -> dict[str, Any]:
    out: dict[str, Any] = {"failed": failed, "rounds": samples, "steps_s": steps}
    for name in samples[0] if samples else ():
        values = [s[name] for s in samples if s[name] is not None]
        out[name] = statistics.median(values) if values else None
    if steps:
        out["step_s"] = statistics.median(steps)
    if out.get("storing_s") is not None:
        out["storing_share_of_prefill"] = statistics.median(s["storing_s"] / s["prefill_s"] for s in samples)
    return out


def ratios(results: dict[str, dict[str, Any]], against: str) -> dict[str, dict[str, float]]:
    """Each method over another one: speeds (above 1 is faster), prefill time and bytes (below 1 is less).

    ``whole_speed`` is of a whole generate(), prefill included, ``decode_speed`` of its tokens after the first,
    ``step_speed`` of single decode steps. Prefill, whole and decode are medians of the ratios of a round, steps the
    ratio of the medians.
    """
    plain, out = results.get(against), {}
    if not plain or not plain["rounds"]:
        return out
    for name, mine in results.items():
        if name == against or not mine["rounds"]:
            continue
        pairs = list(zip(mine["rounds"], plain["rounds"], strict=False))
        row = {
            "prefill_time": statistics.median(a["prefill_s"] / b["prefill_s"] for a, b in pairs),
            "whole_speed": statistics.median(b["whole_s"] / a["whole_s"] for a, b in pairs),
            "cache_bytes": mine["cache_bytes"] / plain["cache_bytes"],
        }
        if mine.get("decode_tokens_per_s") and plain.get("decode_tokens_per_s"):
            row["decode_speed"] = statistics.median(
                a["decode_tokens_per_s"] / b["decode_tokens_per_s"] for a, b in pairs
            )
        if mine.get("step_s") and plain.get("step_s"):
            row["step_speed"] = plain["step_s"] / mine["step_s"]
        out[name] = row
    return out
