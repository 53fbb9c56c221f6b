"""The "commvq" attention function: exact attention over what is held in full, merged with attention over codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .cache import CommVQCache
from .config import METHOD, CacheUseError
from .geometry import parameter_names
from .layer import Call, CommVQLayer, current
from .ops import attention_exact, merge, merged_attention


@torch.compiler.disable
def commvq_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it.

    query: (batch, heads, new, head_dim); key, value: (batch, kv_heads, new or all tokens, head_dim), after RoPE.
    attention_mask: (batch, 1, new, all tokens), True or 0 where visible, or None for plain causal attention.
    softcap: bound of the logits (Gemma 2). s_aux: (heads,) logit of a sink that holds no token (GPT-OSS).
    Returns (output (batch, new, heads, head_dim), None).

    Raises:
        CacheUseError: the module changed its keys or values after giving them to the cache, or asks for dropout.
    """
    call = current.call
    call = call if call is not None and call.module is module and call.handed is not None else None
    if call and not (key is call.handed[0] and value is call.handed[1]):
        raise CacheUseError(
            f"{type(module).__name__} changes keys or values between its cache and its attention, so codes cannot "
            "stand for them. Fix: report this model as unsupported; disable(model) to go on without compression."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    past = call.past if call else key.shape[2] - query.shape[2]
    plain = softcap is None and s_aux is None
    if call and isinstance(attention_mask, torch.Tensor):
        attention_mask = attention_mask[..., : past + key.shape[2]]  # a static mask has columns of tokens to come
    if plain and (call is None or past == 0):
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    else:
        if dropout:
            raise CacheUseError(f"attention dropout {dropout} with a cache, softcap or sinks. Fix: call model.eval().")
        out = _merged(call.layer if call else None, query, key, value, attention_mask, past, scaling, softcap, s_aux)
    if call:
        call.layer.append(key, value, attention_mask)
        call.handed = None  # consumed
    return out, None


def _merged(layer: CommVQLayer | None, query, key, value, mask, past, scaling, softcap, s_aux) -> torch.Tensor:
    """Attention over codes, sinks, window and new tokens, each token counted once."""
    batch, heads, new, _ = query.shape
    coded = layer.coded if layer else 0
    bias = None if mask is None else _bias(mask[..., coded:])
    if mask is None and new > 1:  # causal: only tokens among the newest can be hidden, never codes
        token = torch.arange(coded, past + new, device=query.device)
        bias = _bias((token <= token[-new:, None])[None, None])
    if layer is None:
        out, lse = attention_exact(query, key, value, bias, scaling, softcap)
    else:
        exact = [layer.with_new(key, value)]
        if coded and layer.sink_tokens:
            exact.insert(0, (layer.sink_keys, layer.sink_values))
            if bias is not None or not layer.sinks_coded:
                token, held = layer.sink_slots()
                bias = torch.cat(
                    [_sink_bias(mask, token, held, new), _full(bias, batch, new, past + new - coded, query)], 3
                )
        out, lse = merged_attention(query, exact, bias, layer.coded_past() if coded else None, mask, scaling, softcap)
    if s_aux is not None:  # one more logit in the softmax, with nothing behind it
        aux = s_aux.float().view(1, heads, 1).expand_as(lse)
        out, lse = merge(out, lse, torch.zeros_like(out), aux)
    return out.to(query.dtype).transpose(1, 2).contiguous()


def _bias(mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


def _full(bias: torch.Tensor | None, batch: int, new: int, tokens: int, like: torch.Tensor) -> torch.Tensor:
    shape = (batch, 1, new, tokens)
    return torch.zeros(shape, device=like.device) if bias is None else bias.expand(shape)


def _sink_bias(mask: torch.Tensor | None, token: torch.Tensor, held: torch.Tensor, new: int) -> torch.Tensor:
    """Additive mask of the sink slots, (batch, 1, new, sinks): their tokens' own, and -inf for a slot not in use."""
    batch, sinks = token.shape
    unused = torch.zeros(batch, 1, 1, sinks, device=token.device).masked_fill_(~held[:, None, None], -torch.inf)
    if mask is None:
        return unused.expand(batch, 1, new, sinks)
    rows = mask.expand(batch, 1, new, -1)
    index = token.clamp(0, mask.shape[-1] - 1)[:, None, None].expand(batch, 1, new, sinks)
    return _bias(rows.gather(3, index)) + unused


@torch.compiler.disable
def before_attention(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of attention modules: tells the cache layer about to be updated where its tokens stand.

    Raises:
        CacheUseError: the module was given a CommVQCache but no rotary tables.
    """
    current.call = None
    given = dict(zip(parameter_names(type(module)), args, strict=False)) | kwargs
    cache = next((v for v in given.values() if isinstance(v, CommVQCache)), None)
    layer = cache.layers[module.layer_idx] if cache is not None else None
    if not isinstance(layer, CommVQLayer):
        return
    tables = given.get("position_embeddings")
    if tables is None:
        raise CacheUseError(
            f"{type(module).__name__} (layer {module.layer_idx}) was given no position_embeddings, so its tokens' "
            "positions are unknown. Fix: report this model as unsupported."
        )
    cos, sin = (cache.rope.compact(t if t.dim() == 3 else t[None]) for t in tables)
    positions, mask = given.get("position_ids"), given.get("attention_mask")
    positions = current.positions if positions is None else positions
    fused = module.config._attn_implementation == METHOD
    current.call = Call(module, layer, cos, sin, positions, mask, fused)


@torch.compiler.disable
def forget_call() -> None:
    """A new forward of the model begins in this thread: nothing of an earlier one holds."""
    current.call = current.positions = None


@torch.compiler.disable
def before_rotary(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook of rotary modules: keeps the positions, for attention modules that are not told."""
    current.positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)


@torch.compiler.disable
def after_attention(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Forward hook of attention modules, also called after an exception: new tokens handed out must have come back.

    Raises:
        CacheUseError: the model attended in another way, so the new tokens were never stored.
    """
    call, current.call = current.call, None
    if output is not None and call is not None and call.handed is not None:
        raise CacheUseError(
            f"{type(module).__name__} updated a CommVQCache but did not call the {METHOD!r} attention function. "
            "Fix: enable(model) again, or report this model as unsupported."
        )


def register() -> None:
    """Make "commvq" a known attention implementation; doing it again changes nothing."""
    AttentionInterface.register(METHOD, commvq_attention)
    AttentionMaskInterface.register(METHOD, sdpa_mask)  # without it masks would silently be None
