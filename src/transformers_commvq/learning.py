"""Calibration tensors -> sign codebooks: bit allocation over heads, then EM per head. Knows no model and no text.

Tokens count by how much attention reads them (traced_attention.weighing_attention): most tokens are hardly read, and a
codebook that serves those that are is a better one.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .codebook import LayerBook, SignBook
from .config import ConfigError
from .em import LearningPlan, fill, fit_head, gaussian_distortions, moments, principal
from .packing import CodeLayout

STEP = 8  # bits are dealt in whole bytes
HEAVIEST = 50.0  # most that one token may count for
SIDES = ("keys", "values")


@dataclass
class LearnedRate:
    """The books of one rate. report: json-ready; every head's bits, and its error relative to its spread by rounds."""

    layers: dict[int, LayerBook]
    report: dict[str, Any] = field(default_factory=dict)


def shrunk_metric(metric: torch.Tensor, amount: float) -> torch.Tensor:
    """A positive definite form near ``metric`` (heads, d, d): its diagonal raised by a share, mean diagonal 1."""
    d = metric.shape[-1]
    metric = (metric + metric.transpose(1, 2)) / 2
    level = metric.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None].clamp_min(torch.finfo(torch.float32).tiny)
    return (metric / level + amount * torch.eye(d)) / (1 + amount)


def predicted_curve(cov: torch.Tensor, metric: torch.Tensor | None, cost: torch.Tensor, bits: int) -> torch.Tensor:
    """Expected loss of one head for 0..bits bits, by scalar quantization of principal directions.

    cov: (d, d) float64, of the vectors.  metric: (d, d) in which codes are chosen, or None.
    cost: (d, d), what error costs.
    Returns (bits + 1,) float64, decreasing.
    """
    variance, back = principal(cov, metric)
    weight = ((back.T @ cost.double()) * back.T).sum(1)  # cost of one unit of error along each direction
    return fill(gaussian_distortions(variance, bits), bits)[1] @ weight


def allocate(
    curves: Mapping[Any, torch.Tensor], budget: int, low: int = STEP, high: int | None = None
) -> dict[Any, int]:
    """Deal ``budget`` bits to heads, a byte at a time, each to where it lowers the summed loss most.

    curves: head -> loss for 0, 1, 2... bits.  low, high: fewest and most bits of a head.
    The sum is exactly ``budget`` rounded down to whole bytes.

    Raises ConfigError when the budget is out of reach.
    """
    high = high or min(len(c) for c in curves.values()) - 1
    high = high // STEP * STEP
    left = budget // STEP * STEP - low * len(curves)
    if left < 0 or left > (high - low) * len(curves):
        raise ConfigError(f"{budget} bits for {len(curves)} heads: a head takes {low} to {high}. Fix: another rate.")
    bits = dict.fromkeys(curves, low)

    def gain(head):  # the best mean gain over the next few bytes: EM curves need not be convex
        curve, now = curves[head], bits[head]
        return max(
            ((curve[now] - curve[to]) / (to - now)).item()
            for to in range(now + STEP, min(high, now + 4 * STEP) + 1, STEP)
        )

    order = list(curves)
    heap = [(-gain(head), i) for i, head in enumerate(order)] if low < high else []
    heapq.heapify(heap)
    for _ in range(left // STEP):
        _, i = heapq.heappop(heap)
        bits[order[i]] += STEP
        if bits[order[i]] < high:
            heapq.heappush(heap, (-gain(order[i]), i))
    return bits


def learn(
    samples: Mapping[int, Any],
    rates: Sequence[float],
    plan: LearningPlan | None = None,
    work: str | Path | None = None,
    progress: bool = True,
    workers: int | None = None,
) -> dict[float, LearnedRate]:
    """Books at several rates from one calibration.

    samples: layer index -> samples.LayerSample, or whatever has its fields; layers are read one at a time, twice.
    rates: mean bits per element.
    work: a folder that keeps finished layers; a run that was stopped goes on from there with the same result.
    """
    plan = plan or LearningPlan()
    torch_threads, workers = torch.get_num_threads(), workers or torch.get_num_threads()
    work = Path(work) if work is not None else None
    if work:
        work.mkdir(parents=True, exist_ok=True)
    try:
        torch.set_num_threads(1)  # heads run side by side; a head's own sums stay in one order
        with ThreadPoolExecutor(workers) as pool:
            predicted = _all_curves(samples, plan, pool, progress)
            dealt = {rate: _deal(predicted, samples, rate, plan) for rate in rates}
            reported = ("bits_per_head", "relative_error", "loss_curves")
            out = {rate: LearnedRate({}, {name: {} for name in reported}) for rate in rates}
            jobs = [(rate, layer) for layer in sorted(samples) for rate in rates]
            for rate, layer in tqdm(jobs, desc="learn", unit="layer", disable=not progress):
                bits = {
                    side: tuple(dealt[rate][layer, side, h] for h in range(len(samples[layer].keys))) for side in SIDES
                }
                book, curves = _layer_book(samples, layer, bits, plan, pool, work)
                out[rate].layers[layer] = book
                out[rate].report["bits_per_head"][str(layer)] = {side: list(b) for side, b in bits.items()}
                out[rate].report["loss_curves"][str(layer)] = curves
                out[rate].report["relative_error"][str(layer)] = {
                    side: [min(c[plan.full_from :]) for c in curves[side]] for side in SIDES
                }
    finally:
        torch.set_num_threads(torch_threads)
    return out


def _metrics(sample, plan: LearningPlan) -> dict[str, torch.Tensor | None]:
    """The metric codes are chosen in, as stored (float16)."""
    return {"keys": shrunk_metric(sample.key_metric, plan.key_shrink).half(), "values": None}


def _weights(sample, plan: LearningPlan) -> dict[str, torch.Tensor | None]:
    """What each token counts, (heads, tokens), mean about 1.

    Errors cost what they cost, so the power should be 1; but few tokens carry most of it, and a codebook fitted to few
    tokens serves no others (docs/learning-experiments.md).
    """
    out = {}
    for side, weights in (("keys", sample.key_weights), ("values", sample.value_weights)):
        raised = (weights**plan.importance).clamp_max(HEAVIEST)
        out[side] = raised / raised.mean(1, keepdim=True) if plan.importance else None
    return out


def _all_curves(samples, plan, pool, progress):
    curves = {}

    def one(sample, metrics, weights, side, h, bits):
        _, cov = moments(getattr(sample, side)[h], None if weights[side] is None else weights[side][h])
        metric = None if metrics[side] is None else metrics[side][h].float()
        return predicted_curve(cov, metric, getattr(sample, f"{side[:-1]}_metric")[h], bits)

    for layer in tqdm(sorted(samples), desc="allocate", unit="layer", disable=not progress):
        sample = samples[layer]
        given = sample, _metrics(sample, plan), _weights(sample, plan)
        bits = int(plan.cap * sample.keys.shape[-1])
        names = [(layer, side, h) for side in SIDES for h in range(len(sample.keys))]
        done = pool.map(lambda n: one(*given, n[1], n[2], bits), names)  # noqa: B023 (used at once)
        curves.update(zip(names, done, strict=True))
    return curves


def _deal(curves, samples, rate, plan):
    d = next(iter(samples.values())).keys.shape[-1]
    return allocate(curves, int(round(rate * d * len(curves), 6)), high=int(plan.cap * d))


def _layer_book(samples, layer, bits, plan, pool, work) -> tuple[LayerBook, dict[str, list[list[float]]]]:
    """One layer at one allocation, from the work folder if it is there, and every head's errors round by round."""
    settings = json.dumps(["like rows, one start", asdict(plan), layer, bits], sort_keys=True)
    path = work / f"layer-{layer}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.safetensors" if work else None
    if path and path.exists():
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            losses = json.loads(file.metadata()["losses"])
    else:
        sample = samples[layer]
        metrics, weights = _metrics(sample, plan), _weights(sample, plan)
        names = [(side, h) for side in SIDES for h in range(len(sample.keys))]

        def one(name):
            side, h = name
            metric = None if metrics[side] is None else metrics[side][h].float()
            count = None if weights[side] is None else weights[side][h]
            return fit_head(getattr(sample, side)[h], metric, bits[side][h], plan, count)

        done = dict(zip(names, pool.map(one, names), strict=True))
        tensors, losses = {}, {}
        for side in SIDES:
            mine = [done[side, h] for h in range(len(sample.keys))]
            tensors[f"{side}.vectors"] = torch.cat([m[0] for m in mine]).half()
            tensors[f"{side}.mean"] = torch.stack([m[1] for m in mine])
            if metrics[side] is not None:
                tensors[f"{side}.metric"] = metrics[side].contiguous()
            losses[side] = [[float(f"{error:.4g}") for error in m[2]] for m in mine]
        if path:
            partial = path.with_suffix(".partial")
            save_file(tensors, partial, metadata={"losses": json.dumps(losses)})
            partial.replace(path)
    books = {
        side: SignBook(
            CodeLayout(tuple(bits[side])), *(tensors.get(f"{side}.{n}") for n in ("vectors", "mean", "metric"))
        )
        for side in SIDES
    }
    return LayerBook(**books), losses
