"""A model and text -> what the learner needs of each layer: keys before RoPE, values, and how much their errors cost.

Everything is recorded at the attention seam: while calibration runs, and only then, the model attends through a
function of ours, which sees each layer's rotated queries and keys; pre-hooks hand it the layer's cos and sin. Errors
are counted only where the cache will use codes: between a query and keys that are neither sinks nor among the newest
``residual_length`` tokens (docs/learning-experiments.md).
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from .codebook import ModelGeometry
from .config import CommVQError, ConfigError
from .geometry import ModelReading, read_model
from .samples import LayerSample, Spool, StoredSamples
from .traced_attention import explicit_attention, watched_attention, weighing_attention

IMPLEMENTATION = "commvq_calibration"
PRIOR = 24  # readers


class CalibrationError(CommVQError, RuntimeError):
    """The model ran, but its attention could not be recorded."""


@dataclass
class CalibrationPlan:
    """How much is recorded.

    samples: tokens kept of each layer.
    metric_windows, metric_length: how many windows get a backward pass (0: no gradients at all), and how many of
        their tokens, since every layer's activations are held until then.
    sink_tokens, residual_length: as the cache will be used.

    Raises ConfigError for values outside their domain.
    """

    samples: int = 16384
    metric_windows: int = 8
    metric_length: int = 1024
    sink_tokens: int = 4
    residual_length: int = 128
    seed: int = 0

    def __post_init__(self):
        if self.samples < 256:
            raise ConfigError(
                f"samples={self.samples}: too few tokens to learn from. Fix: 256 or more (default 16384)."
            )
        for name in ("metric_windows", "sink_tokens", "residual_length"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 0 or more.")

    def for_metric(self, windows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What of the windows gets a backward pass; spread evenly over them."""
        count = min(self.metric_windows, len(windows))
        numbers = torch.linspace(0, len(windows) - 1, count).round().long().tolist()
        return [windows[i][: self.metric_length] for i in numbers]


class _Recorder:
    """State of one calibration run; ``attend`` is the attention function."""

    def __init__(self, reading: ModelReading, plan: CalibrationPlan, keep: int, spool: Spool):
        self.reading, self.plan, self.keep = reading, plan, keep
        self.layer_of = {id(module): i for i, module in reading.attention.items()}
        self.tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.spool = spool
        self.readers: list[torch.Tensor] = []  # of each window: how many queries read a token's codes
        self.metrics: dict[tuple[int, str], torch.Tensor] = {}  # sums of g g^T
        self.weight = 0  # tokens that entered them
        self.moments: dict[tuple[int, str], torch.Tensor] = {}  # what stands in for them without gradients
        self.recorded = 0  # tokens that entered the moments
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.positions = torch.empty(0, dtype=torch.long)

    def begin(self, tokens: int) -> None:
        """A new window: draw which of its tokens are kept, the same ones in every layer."""
        sinks = self.plan.sink_tokens
        count = min(self.keep, tokens - sinks)
        self.recorded += tokens
        self.positions = (torch.randperm(tokens - sinks, generator=self.generator)[:count] + sinks).sort().values
        self.readers.append((tokens - max(self.plan.residual_length, 1) - self.positions).clamp_min(0))

    def attend(self, module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
        """transformers' signature: query (batch, heads, tokens, head_dim) -> (batch, tokens, heads, head_dim)."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer = self.layer_of.get(id(module))
        if layer is None:
            return explicit_attention(query, key, value, attention_mask, scaling, **kwargs), None
        tables = self.tables.pop(layer, None)
        if layer in self.reading.bare:
            cos, sin = torch.ones((), device=query.device), torch.zeros((), device=query.device)
        elif tables is None:
            raise CalibrationError(f"layer {layer}: no position_embeddings reached its attention module.")
        else:
            cos, sin = (table.to(query)[:, None] for table in tables)
        given = query, key, value, attention_mask, scaling
        if key.requires_grad:
            watch = self._gradients(layer, cos, sin)
            return watched_attention(*given, self.plan.residual_length, watch, **kwargs), None
        out, importance = weighing_attention(*given, self.plan.residual_length, **kwargs)
        self._record(layer, key, value, cos, sin, importance)
        self._query_moments(layer, query, value, scaling)
        return out, None

    def _record(self, layer, key, value, cos, sin, importance):
        key = self.reading.rope.rope.unrotate(key, cos, sin)
        kept = self.positions.to(key.device)
        tensors = {"keys": key, "values": value, "key_weights": importance[0], "value_weights": importance[1]}
        for name, x in tensors.items():
            self.spool.add(layer, name, x[:, :, kept].transpose(0, 1).flatten(1, 2).float().cpu())

    @staticmethod
    def _add(sums: dict, layer: int, side: str, block: torch.Tensor) -> None:
        sums[layer, side] = sums.get((layer, side), 0) + block.double().cpu()

    def _gradients(self, layer, cos, sin):
        def watch(of_key, of_value):
            for side, g in (("keys", self.reading.rope.rope.pull_back(of_key, cos, sin)), ("values", of_value)):
                g = g[:, :, self.plan.sink_tokens :].transpose(0, 1).flatten(1, 2).float()
                self._add(self.metrics, layer, side, g.transpose(1, 2) @ g)

        return watch

    def _query_moments(self, layer, query, value, scaling):
        """Without gradients: an error dk moves a logit by q . dk, and that moves the output along a value's spread."""
        heads, rope = self.reading.geometry.num_key_value_heads, self.reading.rope.rope
        re, im, rest = rope.split(query.float())
        pair = (re.square() + im.square()) / 2
        moment = rope.join(pair, pair, rest.square()).unflatten(1, (heads, -1)).sum((0, 2, 3))
        spread = value.float().var((0, 2)).sum(-1)  # (kv heads,)
        self._add(self.moments, layer, "keys", torch.diag_embed(moment * scaling**2 * spread[:, None]))
        tokens = query.shape[0] * query.shape[2] * (query.shape[1] // heads)
        self._add(self.moments, layer, "values", torch.eye(value.shape[-1]).expand(heads, -1, -1) * tokens)

    def sample(self, layer: int) -> LayerSample:
        """All that was recorded of a layer, which is then forgotten."""
        sums, count = (self.metrics, self.weight) if (layer, "keys") in self.metrics else (self.moments, self.recorded)
        metrics = {f"{side}_metric": (sums[layer, f"{side}s"] / count).float() for side in ("key", "value")}
        readers = torch.cat(self.readers)
        weights = {
            name: token_weights(self.spool.take(layer, name), readers) for name in ("key_weights", "value_weights")
        }
        return LayerSample(self.spool.take(layer, "keys"), self.spool.take(layer, "values"), **metrics, **weights)


@contextlib.contextmanager
def attention_replaced(model: PreTrainedModel, reading: ModelReading, function, on_tables) -> Iterator[None]:
    """Let the model attend through ``function`` inside the block; afterwards everything is as it was.

    function: an attention function of transformers' AttentionInterface.
    on_tables(layer, cos, sin): receives each compressed layer's rotary tables, one column a pair, before it attends.
    """
    configs = {id(c): c for c in [model.config.get_text_config(decoder=True)]}
    configs.update(
        (id(m.config), m.config) for m in model.modules() if hasattr(m, "config") and hasattr(m, "layer_idx")
    )
    before = {key: config._attn_implementation_internal for key, config in configs.items()}

    def hook_for(layer):
        def hook(_, args, kwargs):
            tables = kwargs.get("position_embeddings")
            if tables is None:
                tables = next((a for a in args if isinstance(a, tuple) and len(a) == 2), None)
            if tables is not None:
                on_tables(layer, *(reading.rope.compact(t.detach()) for t in tables))

        return hook

    hooks = [m.register_forward_pre_hook(hook_for(i), with_kwargs=True) for i, m in reading.attention.items()]
    training = model.training
    try:
        AttentionInterface.register(IMPLEMENTATION, function)
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        for config in configs.values():
            config._attn_implementation_internal = IMPLEMENTATION
        model.eval()
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for hook in hooks:
            hook.remove()
        AttentionInterface._global_mapping.pop(IMPLEMENTATION, None)
        AttentionMaskInterface._global_mapping.pop(IMPLEMENTATION, None)
        model.train(training)


def token_weights(importance: torch.Tensor, readers: torch.Tensor) -> torch.Tensor:
    """What each token's errors weigh per query that reads it, against other tokens of the head: mean 1.

    importance: (..., tokens), sums over readers. readers: (tokens,), how many there were. Few readers say little: each
    token gets ``PRIOR`` more that read it as the head's average token.
    """
    average = importance.sum(-1, keepdim=True) / readers.sum().clamp_min(1)
    weights = (importance + PRIOR * average) / (readers + PRIOR)
    level = weights.mean(-1, keepdim=True)
    return torch.where(level > 0, weights / level.clamp_min(torch.finfo(torch.float32).tiny), 1.0)


@contextlib.contextmanager
def _gradients_at_activations(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block a backward pass reaches every activation but computes no gradient of a weight."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, out: out.detach().requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        for p in wanted:
            p.requires_grad_(True)


def _backward(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Generator) -> None:
    """One backward pass of the loss whose labels the model draws itself. ids: (1, tokens)."""
    with _gradients_at_activations(model):
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=labels)[:, 0]
        nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum").backward()


def calibrate(
    model: PreTrainedModel,
    windows: Sequence[torch.Tensor],
    plan: CalibrationPlan | None = None,
    base_model: str | None = None,
    progress: bool = True,
    store: StoredSamples | None = None,
) -> tuple[ModelGeometry, Mapping[int, LayerSample]]:
    """Run windows of token ids through the model and record every compressed layer.

    windows: 1-d int64 tensors; see text.py.
    store: where the samples go, so that no more than one layer's are held; None keeps all in memory.
    Returns the model's geometry and layer index -> sample.

    The metric is the model's own Fisher information: labels are drawn from its predictions, so the text's surprises
    do not enter. A model that cannot be differentiated gets the query-moment estimate, with a warning.

    Raises:
        UnsupportedModelError: see geometry.read_model.  CalibrationError: the attention was not reached.
    """
    plan = plan or CalibrationPlan()
    reading = read_model(model, base_model)
    if not windows:
        raise ConfigError("no calibration windows: give text, or let the model write its own.")
    spool = Spool(None if store is None else store.folder / "recording")
    recorder = _Recorder(reading, plan, math.ceil(plan.samples / len(windows)), spool)
    labels = torch.Generator().manual_seed(plan.seed + 1)

    def tables(layer, cos, sin):
        recorder.tables[layer] = (cos, sin)

    with attention_replaced(model, reading, recorder.attend, tables), torch.no_grad():
        # before the recording: activations of a backward pass and the samples are never held together
        try:
            for window in tqdm(plan.for_metric(windows), desc="metric", unit="window", disable=not progress):
                ids = window.to(model.device)[None]
                _backward(model, ids, labels)
                recorder.weight += ids.shape[1]
        except (RuntimeError, NotImplementedError) as error:
            recorder.metrics.clear()
            warnings.warn(
                f"no gradients ({str(error).splitlines()[0]}): what errors cost is estimated from queries instead.",
                stacklevel=2,
            )
        for window in tqdm(windows, desc="record", unit="window", disable=not progress):
            recorder.begin(len(window))
            model(input_ids=window.to(model.device)[None], use_cache=False, logits_to_keep=1)
    layers = list(reading.attention)
    if empty := [i for i in layers if not spool.holds(i)]:
        raise CalibrationError(f"layers {empty} did not attend through AttentionInterface; they cannot be recorded.")
    if store is None:
        return reading.geometry, {i: recorder.sample(i) for i in layers}
    for i in layers:
        store.put(i, recorder.sample(i))
    spool.remove()
    return reading.geometry, store
