"""A head's vectors -> its sign codebook, by expectation maximization.

Vectors x are to be ``mean + s @ C`` with s in {-1, +1}^n. For a given M (the metric, None for the plain squared error)
EM alternates

    E  s = argmin (x - mean - s C)^T M (x - mean - s C)      the cache's own encoder, ops/encode.py
    M  (C, mean) = least squares of x on (s, 1), with a small ridge; M drops out of this step

from uniform quantizers along the principal directions of the vectors. The rows keep the order they start in, since
the encoder goes through them in order: sorted anew at the end they would be encoded worse than they were learned. The
encoder's last passes are left out at first: with them from the beginning, EM settles in worse places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .codebook import SignBook
from .config import ConfigError
from .ops.encode import encode_signs
from .packing import CodeLayout, unpack

# Mean squared error of the best uniform quantizer with 2^b levels of a unit Gaussian, b = 0..5, and half its step
# (J. Max, "Quantizing for minimum distortion", 1960): what b rows u, 2u, 4u... along one direction can do.
_UNIFORM_ERROR = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495)
_HALF_STEP = (0.0, 0.798, 0.49785, 0.293, 0.1676, 0.094, 0.052)
_RANGES = (0.6, 0.8, 1.0, 1.25, 1.6, 2.0, 2.5, 3.2, 4.0)  # steps tried against that of a Gaussian
_MOST_BITS = 9  # of one direction at the start
_START_TOKENS = 4096  # that the starting steps are chosen on


@dataclass(frozen=True)
class LearningPlan:
    """How books are learned.

    rounds: EM rounds; the first half see ``warm_tokens`` only, the others all tokens.
    key_shrink: share of its mean diagonal added to the keys' metric. An unshrunk metric lets EM ruin directions it
        believes to be free: lower training loss, worse model.
    ridge: added to S^T S in the M-step, as a share of the tokens.
    cap: most bits of a head, per element.
    importance: power to which tokens' weights are raised; 0 lets all tokens count the same.
    """

    rounds: int = 8
    warm_tokens: int = 8192
    key_shrink: float = 0.1
    ridge: float = 1e-4
    cap: float = 6.0
    importance: float = 1.0
    seed: int = 0

    @property
    def full_from(self) -> int:
        """The first round that sees all tokens; what is kept comes of this one or a later one."""
        return self.rounds // 2

    def __post_init__(self):
        for name, low in (
            ("rounds", 1),
            ("warm_tokens", 1),
            ("key_shrink", 0),
            ("ridge", 0),
            ("cap", 0.25),
            ("importance", 0),
        ):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)}: expected {low} or more.")


def moments(x: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (d,) float32 and covariance (d, d) float64 of vectors (tokens, d), counted by weights (tokens,) or alike."""
    shares = torch.full((len(x), 1), 1 / len(x)) if weights is None else (weights / weights.sum())[:, None]
    mean = (shares * x).sum(0)
    return mean, ((shares * (x - mean)).T @ (x - mean)).double()


def fit_head(
    x: torch.Tensor,
    metric: torch.Tensor | None,
    bits: int,
    plan: LearningPlan,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """EM for one head.

    x: (tokens, d) float32.  metric: (d, d) or None.  weights: (tokens,), how much each token counts; None: alike.
    Returns rows (bits, d) float32 in the order in which the encoder goes through them, mean (d,), and the errors of the
    start and of every round, relative to the spread about the mean, in the metric. The encoder is no exact minimizer,
    so a round may do harm; what is returned did best of the second half, whose rounds see all tokens.
    """
    weights = torch.ones(len(x)) if weights is None else weights
    form = torch.eye(x.shape[1]) if metric is None else metric
    rows, mean, spread = _start(x, weights, metric, bits)
    history, least, best = [], math.inf, (rows, mean)
    for turn in range(plan.rounds + 1):
        stride = 1 if turn >= plan.full_from else max(1, len(x) // plan.warm_tokens)
        part, count = x[turn % stride :: stride], weights[turn % stride :: stride, None]
        signs = encode_rows(part, rows, mean, metric, rough=turn <= plan.full_from)
        error = part - mean - signs @ rows
        history.append((count * (error @ form) * error).sum().item() / count.sum().item() / spread)
        if turn >= plan.full_from and history[-1] < least:
            least, best = history[-1], (rows, mean)
        if turn < plan.rounds:
            rows, mean = _least_squares(signs, part, count, plan.ridge)
    return *best, history


def encode_rows(
    x: torch.Tensor, rows: torch.Tensor, mean: torch.Tensor, metric: torch.Tensor | None, rough: bool = False
) -> torch.Tensor:
    """Signs of one head's vectors. x: (tokens, d); rows: (n, d); mean: (d,). Returns (tokens, n) in {-1, +1}."""
    layout = CodeLayout((len(rows),))
    book = SignBook(layout, rows, mean[None], None if metric is None else metric[None])
    return unpack(encode_signs(x[None, None], book, rough), layout)[0, 0]


def principal(cov, metric):
    """Principal variances of x in the metric, (d,), and as columns their directions in the space of x, (d, d)."""
    d = cov.shape[0]
    if metric is None:
        root = back = torch.eye(d, dtype=torch.float64)
    else:
        values, vectors = torch.linalg.eigh(metric.double())
        values = values.clamp_min(values.max() * 1e-6).sqrt()
        root, back = (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
    variance, basis = torch.linalg.eigh(root @ cov @ root)
    return variance.clamp_min(1e-12), back @ basis


def gaussian_distortions(variance: torch.Tensor, most: int) -> torch.Tensor:
    """Squared errors of directions of these variances (d,), quantized with 0..most bits: (most + 1, d)."""
    errors = [_UNIFORM_ERROR[b] if b < 6 else _UNIFORM_ERROR[5] / 3.5 ** (b - 5) for b in range(most + 1)]
    return variance * torch.tensor(errors, dtype=variance.dtype)[:, None]


def fill(distortions: torch.Tensor, bits: int) -> tuple[list[int], torch.Tensor]:
    """Reverse water-filling, one bit at a time: bits of each direction, and distortions (bits + 1, d) on the way.

    distortions: (most + 1, d), what directions with 0..most bits leave; at most ``most`` bits are given to one.
    """
    most, d = distortions.shape[0] - 1, distortions.shape[1]
    given, path = [0] * d, [distortions[0].clone()]
    wanting = distortions[0].clone()
    for _ in range(bits):
        j = int(wanting.argmax())
        given[j] += 1
        path.append(path[-1].clone())
        path[-1][j] = distortions[given[j], j]
        wanting[j] = path[-1][j] if given[j] < most else -1
    return given, torch.stack(path)


def _start(
    x: torch.Tensor, weights: torch.Tensor, metric: torch.Tensor | None, bits: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """First rows: a principal direction with b bits gets b rows, each half as long as the one before.

    Together the rows of a direction are a uniform quantizer. Its step is the one that serves the vectors best: heads
    have outliers, which a Gaussian's step leaves out of range and EM brings in slowly (docs/learning-experiments.md).

    Returns rows (bits, d) by decreasing norm in the metric, mean (d,), and the spread about it in the metric.
    """
    mean, cov = moments(x, weights)
    form = torch.eye(len(cov)) if metric is None else metric
    variance, directions = principal(cov, metric)
    distortion, half_step = _uniform_quantizers(x, weights, mean, variance, directions)
    given, _ = fill(distortion * variance, bits)
    length = (half_step * variance.sqrt()).float()
    place = [(j, b, k) for j, b in enumerate(given) for k in range(b)]
    rows = torch.stack([directions[:, j].float() * length[b, j] * 2.0 ** (b - 1 - k) for j, b, k in place])
    order = ((rows @ form) * rows).sum(1).argsort(descending=True, stable=True)
    return rows[order], mean, (cov * form.double()).sum().item() or 1.0


def _uniform_quantizers(x, weights, mean, variance, directions):
    """Best uniform quantizers of vectors along directions, in units of their spread.

    Returns mean squared errors and half steps, both (_MOST_BITS + 1, d).
    """
    stride = max(1, len(x) // _START_TOKENS)
    part, count = x[::stride] - mean, weights[::stride, None]
    share = count / count.sum()
    unit = (part.double() @ torch.linalg.inv(directions).T / variance.sqrt()).float()
    errors, halves = [(share * unit.square()).sum(0)], [torch.zeros(unit.shape[1])]
    for b in range(1, _MOST_BITS + 1):
        gaussian = _HALF_STEP[min(b, 6)] / 2.0 ** max(b - 6, 0)
        tried = torch.tensor([gaussian * r for r in _RANGES])
        top = (2**b - 1) / 2
        error = torch.stack([(share * _quantization_error(unit, h, top).square()).sum(0) for h in tried])
        least = error.min(0)
        errors.append(least.values)
        halves.append(tried[least.indices])
    return torch.stack(errors), torch.stack(halves)


def _quantization_error(x, half_step, top):
    """x less the nearest of the levels -top, 1 - top .. top, in steps."""
    step = 2 * half_step
    return x - ((x / step + top).round().clamp(0, 2 * top) - top) * step


def _least_squares(
    signs: torch.Tensor, x: torch.Tensor, count: torch.Tensor, ridge: float
) -> tuple[torch.Tensor, torch.Tensor]:
    s = torch.cat([signs, torch.ones(len(signs), 1)], 1)
    counted = (s * count).T
    normal = (counted @ s).double()
    normal.diagonal()[:-1] += ridge * count.sum()
    solved = torch.linalg.solve(normal, (counted @ x).double()).float()
    return solved[:-1].contiguous(), solved[-1].contiguous()
