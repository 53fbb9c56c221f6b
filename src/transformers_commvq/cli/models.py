"""Loads a model and its tokenizer for the commands."""

from __future__ import annotations

from typing import Any


def load(
    name: str, dtype: str = "auto", device: str = "cpu", base_model: str | None = None
) -> tuple[Any, Any, str | None]:
    """(model in eval mode, tokenizer, base model id).

    name: Hub id, folder, or ``"demo"``: the model of demo_model.py, in float32 unless another dtype is asked for.

    Raises ConfigError for an unknown dtype or a model that cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .. import demo_model
    from ..config import ConfigError

    if name == "demo":
        name, base_model = str(demo_model.prepare()), base_model or demo_model.BASE_MODEL
        dtype = "float32" if dtype == "auto" else dtype
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"dtype {dtype!r}: expected auto, float32, bfloat16 or float16.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: the model cannot be loaded: {error}") from error
    return model.to(device).eval(), tokenizer, base_model
