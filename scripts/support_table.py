#!/usr/bin/env python3
"""Runs every family of tests/model_zoo.py and writes docs/support.md: what is compressed, what is not, and why."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import transformers  # noqa: E402
from generation import from_config  # noqa: E402
from model_zoo import MULTIMODAL, REFUSED, SUPPORTED, build, build_multimodal, config_of, outcome  # noqa: E402

from transformers_commvq import UnsupportedModelError, enable  # noqa: E402

TARGET = ROOT / "docs" / "support.md"
HEAD = """# Supported models

Written by `python scripts/support_table.py`; `tests/test_models.py` checks the same. Each row is a tiny random model of
the family, built from its configuration class in transformers {version}. It generates greedily, a batch of two with
left padding, once with transformers' `DynamicCache` and once with a CommVQ cache whose codes lose nothing (they hold
the float32 itself). "Same tokens" says that both gave the same tokens: everything around the codes (positions, masks,
padding, sinks, window) is exact for this family. It says nothing about quality at 2 or 1 bits, which depends on a
model's codebooks: these must be learned for each model.

Compressed are layers of full attention. Layers with a sliding window, linear attention, Mamba or convolutions keep
their own cache, which does not grow with the text.

"""
TAIL = """
## Quantized weights

The cache and the weights are separate things. Tested with both at once (`tests/test_composition.py`): bitsandbytes at 8
and 4 bits, torchao, quanto, and GGUF files. Give `kv_cache=` to `from_pretrained`, beside `quantization_config=` or
`gguf_file=`; `quantization_config=CommVQConfig(...)` has no room for a second method.

Not supported: weights quantized by HQQ. transformers 5.24 itself does not load them: `from_pretrained` with an
`HqqConfig` raises `NotImplementedError`, with or without this package. (HQQ as a *cache*, transformers'
`QuantizedCache`, works, and is one of those that [benchmarks.md](benchmarks.md#quality) compares with.)

## Continuous batching

`generate_batch`, and whatever else calls `init_continuous_batching`, keeps a paged cache of its own in blocks of plain
keys and values. On an enabled model it raises `CacheUseError`, rather than run without compression unnoticed;
`transformers-commvq serve --continuous-batching` is refused for the same reason. Use `generate()`
with a batch, or `disable(model)` first.
"""


def rope_text(reading) -> str:
    rope, head_dim = reading.rope.rope, reading.geometry.head_dim
    if not rope.pairs:
        return "none in compressed layers"
    kind = reading.geometry.rope["parameters"].get("rope_type", "default")
    text = {"half": "halves", "interleaved": "interleaved"}[rope.layout]
    text += f", {rope.rotary_dim} of {head_dim}" if rope.rotary_dim < head_dim else ""
    text += f", {kind}" if kind != "default" else ""
    return text + (", none in some layers" if reading.bare else "")


def row(name: str, model, inputs=None) -> str:
    same, difference, _, cache = outcome(model, inputs)
    reading = vars(model)["_commvq"].reading
    left = sorted({type(x).__name__ for x in cache.layers if type(x).__name__ != "CommVQLayer"})
    names = {
        "DynamicSlidingWindowLayer": "sliding window",
        "LinearAttentionLayer": "linear attention, Mamba or convolution",
    }
    left = ", ".join(names.get(x, x) for x in left) or "nothing"
    share = f"{len(reading.geometry.layers)} of {reading.geometry.num_hidden_layers}"
    verdict = "yes" if same else "NO"
    kind = model.config.model_type
    return f"| {name} | `{kind}` | {rope_text(reading)} | {share} | {left} | {verdict} ({difference:.0e}) |"


def main() -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="only .* layers have full attention")
    lines = [HEAD.format(version=transformers.__version__)]
    lines += ["| family | model type | RoPE pairs | layers compressed | left as it is | same tokens (logit error) |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [row(name, build(name)) for name in SUPPORTED]
    lines += [
        "",
        "## With pictures",
        "",
        "The vision tower keeps its own attention; picture tokens are cached like words.",
    ]
    lines += ["", lines[1], lines[2]]
    lines += [row(name, *build_multimodal(name)) for name in MULTIMODAL]
    lines += ["", "## Not supported", "", "`enable` and `from_pretrained(kv_cache=...)` raise `UnsupportedModelError`:"]
    lines += ["", "| family | model type | what the error says |", "|---|---|---|"]
    for name in REFUSED:
        config = config_of(name)
        try:
            enable(from_config(config))
        except UnsupportedModelError as error:
            lines.append(f"| {name} | `{config.model_type}` | {error} |")
        else:
            raise SystemExit(f"{name} is listed as unsupported, but enable() took it")
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text("\n".join(lines) + "\n" + TAIL)
    wrong = [line for line in lines if "| NO " in line]
    print(f"{TARGET}: {len(SUPPORTED) + len(MULTIMODAL)} families, {len(wrong)} wrong, {len(REFUSED)} refused")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
