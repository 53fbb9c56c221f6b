"""The memory tab: what ``transformers-commvq estimate`` says, as a picture and as tables.

Nothing is computed here that ``transformers_commvq.estimate`` does not compute; a test holds both to the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from presets import config_from_dict, read_presets
from style import COLORS, labels_beside, new_figure

from transformers_commvq import ConfigError, estimate
from transformers_commvq.hub import is_hub_id

SHORTEST, LONGEST = 1 << 10, 1 << 20  # tokens; the slider's ends
LARGEST_BATCH = 256
RATES = ("1", "1.5", "2", "3")  # bits an element, to choose from
WEIGHTS = {"16 bits": None, "8 bits": 8.0, "4.5 bits": 4.5}  # choice -> --weight-bits
LARGEST_CONFIG = 100_000  # characters of a pasted config.json
MOST_LAYERS = 1000  # a config with more is refused: building it would keep the machine busy
OTHERS = {"plain": "fp16", "fp8": "FP8", "int4": "int4"}  # key in estimate's report -> name on the page
CAVEATS = (
    "fp16 and FP8 hold 16 and 8 bits an element; int4 holds 4.5, with a 16-bit scale and zero point for 64 elements. "
    "CommVQ is counted whole: codes, the first 4 and newest 128 to 191 tokens in 16 bits, positions, spare room. "
    f"Beside cache, weights and codebooks, {estimate.RESERVE_BYTES >> 30} GiB is kept for activations and the driver "
    "(assumed). A GiB is 2³⁰ bytes. Arithmetic, not measurement; tests hold it to real caches."
)


def find_size(model: str, config_json: str = "") -> estimate.ModelSize:
    """A model's sizes from the presets, from a config.json's text, or from the Hub; the cache in 16 bits.

    Raises:
        ConfigError: no such model, or not a config.
        UnsupportedModelError: its cache cannot be compressed.
    """
    if config_json and config_json.strip():
        return estimate.describe_config(_parse_config(config_json), "config.json", "bfloat16")
    model = (model or "").strip()
    if model in (presets := read_presets()):
        return presets[model]
    if not is_hub_id(model) or Path(model).exists():  # a public page reads no folders of its machine
        raise ConfigError(f"{model!r}: expected a model of the list, or a Hub id such as Qwen/Qwen3-4B.")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{model}: its config cannot be read: {reason} Fix: paste its config.json below.") from error
    _check_layers(config)
    return estimate.describe_config(config, model, "bfloat16")


def _parse_config(text: str):
    if len(text) > LARGEST_CONFIG:
        raise ConfigError(f"config.json: {len(text):,} characters. Fix: a text model's config has a few thousand.")
    try:
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("expected an object in braces")
        config = config_from_dict(fields)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:300]
        raise ConfigError(f"config.json cannot be read: {reason} Fix: paste the file as it is on the Hub.") from error
    _check_layers(config)
    return config


def _check_layers(config) -> None:
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0) or 0
    if layers > MOST_LAYERS:
        raise ConfigError(f"num_hidden_layers={layers}: this page takes up to {MOST_LAYERS} layers.")


def report(
    model: str,
    config_json: str = "",
    context: float = 131072,
    batch: float = 1,
    bits: list[str] | None = None,
    gpus: list[str] | None = None,
    weights: str = "16 bits",
) -> dict[str, Any]:
    """The report of ``transformers-commvq estimate --json`` for these choices.

    model: a preset, or a Hub id. config_json: text of a config.json, instead of a model. context: tokens a sequence.
    bits: some of RATES; empty: 2 and 1. gpus: names of cards, or GiB; empty: all known. weights: a key of WEIGHTS.

    Raises:
        ConfigError: a choice is out of its range.
        UnsupportedModelError: the model's cache cannot be compressed.
    """
    for name, value, most in (("tokens", context, LONGEST), ("sequences", batch, LARGEST_BATCH)):
        if not 1 <= (value or 0) <= most:
            raise ConfigError(f"{name}: {value or 'nothing'} given, expected 1 to {most:,}.")
    if weights not in WEIGHTS:
        raise ConfigError(f"weights {weights!r}: expected one of {', '.join(WEIGHTS)}.")
    if unknown := sorted(set(bits or ()) - set(RATES)):
        raise ConfigError(f"bits {', '.join(unknown)}: expected some of {', '.join(RATES)}.")
    rates = sorted(map(float, bits or ("2", "1")), reverse=True)
    cards = estimate.gpu_bytes(gpus or estimate.GPUS)
    size = find_size(model, config_json)
    return estimate.tabulate(size, int(context), rates, int(batch), cards, WEIGHTS[weights])


def cache_bytes(made: dict[str, Any]) -> dict[str, int]:
    """Bytes of each cache in an estimate's report, by its key there: plain, fp8, int4, then the rates."""
    compressed = {rate: parts["cache_bytes"] for rate, parts in made["compressed"].items()}
    return {"plain": made["plain_cache_bytes"], **made["other_cache_bytes"], **compressed}


def cache_name(key: str) -> str:
    """What the page calls a cache of the report."""
    return OTHERS.get(key) or f"CommVQ {key}-bit"


def cache_table(made: dict[str, Any]) -> list[dict[str, str]]:
    """One row a cache: its size, and how many times smaller than fp16 it is."""
    sizes = cache_bytes(made)
    return [
        {"cache": cache_name(key), "GiB": f"{size / 2**30:,.2f}", "smaller": f"{sizes['plain'] / size:.1f}×"}
        for key, size in sizes.items()
    ]


def gpu_table(made: dict[str, Any]) -> list[dict[str, str]]:
    """One row a card: its GiB, and the longest context of each cache that fits beside the weights."""
    rows = []
    for card, row in made["gpus"].items():
        cells = {cache_name(key): f"{count:,}" if count else "none" for key, count in row["longest_context"].items()}
        rows.append({"GPU": card, "GiB": f"{row['memory_bytes'] / 2**30:.1f}", **cells})
    return rows


def picture(made: dict[str, Any], size: estimate.ModelSize) -> Figure:
    """Size of each cache against its length, both axes logarithmic, and what each card leaves for a cache.

    made: the report whose choices are drawn. size: the model's numbers.
    """
    lengths = [SHORTEST * 2 ** (i / 2) for i in range(21)]
    rates = [float(rate) for rate in made["compressed"]]
    points = [cache_bytes(estimate.tabulate(size, int(t), rates, made["batch"], {})) for t in lengths]
    figure = new_figure(5.6, 4.3)
    axes = figure.subplots()
    axes.set(xscale="log", yscale="log", xlim=(SHORTEST, LONGEST), xlabel="tokens in the cache of each sequence")
    axes.set_xticks([1 << i for i in range(10, 21, 2)], ["1K", "4K", "16K", "64K", "256K", "1M"])
    axes.minorticks_off()
    room = {
        card: (row["memory_bytes"] - made["weights_bytes"] - estimate.RESERVE_BYTES) / 2**30
        for card, row in made["gpus"].items()
    }
    lowest = min(points[0].values()) / 2**30
    room = {card: gib for card, gib in room.items() if gib > lowest}
    highest = max([*room.values(), points[-1]["plain"] / 2**30])
    axes.set_ylim(lowest * 0.8, highest * 1.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ends = {}
    for key in points[0]:
        gib = [sizes[key] / 2**30 for sizes in points]
        color = COLORS[cache_name(key)]
        axes.plot(lengths, gib, color=color, linewidth=2)
        axes.plot([made["context"]], [cache_bytes(made)[key] / 2**30], "o", color=color, markersize=5)
        ends[cache_name(key)] = (gib[-1], color)
    for gib in room.values():
        axes.axhline(gib, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.axvline(made["context"], color="#bbbbbb", linewidth=1, zorder=0)
    labels_beside(axes, ends)
    labels_beside(axes, {card: (gib, "#666666") for card, gib in room.items()}, inside=True)
    axes.set_title("Size of the cache, GiB; dashed: what a GPU has left for it", loc="left", size=10)
    return figure


def notes(made: dict[str, Any], size: estimate.ModelSize) -> str:
    """What the numbers are, in markdown."""
    weight_bits = round(8 * made["weights_bytes"] / made["parameters"], 1)
    text = (
        f"**{size.name}** ({size.model_type}, {size.parameters / 1e9:.2f} B parameters, weights "
        f"{made['weights_bytes'] / 2**30:.2f} GiB at {weight_bits:g} bits). {size.layers} layers with {size.heads} "
        f"key/value heads of {size.head_dim} are compressed"
    )
    if size.shape.sliding_layers:
        text += f"; {size.shape.sliding_layers} layers with a sliding window of {size.shape.sliding_window:,} are not"
    text += "."
    if size.max_context:
        text += f" The model was made for {size.max_context:,} tokens; more is room in memory, not skill."
    return text


def command(model: str, config_json: str, made: dict[str, Any], gpus: Sequence[str], weights: str) -> str:
    """The command line that prints the same numbers."""
    parts = ["transformers-commvq estimate", "config.json" if (config_json or "").strip() else model.strip()]
    parts += [f"--context {made['context']}", "--bits " + " ".join(made["compressed"]), "--dtype bfloat16"]
    if made["batch"] > 1:
        parts.append(f"--batch {made['batch']}")
    if WEIGHTS[weights]:
        parts.append(f"--weight-bits {WEIGHTS[weights]:g}")
    if gpus:
        parts.append("--gpu " + " ".join(f'"{g}"' if " " in g else g for g in gpus))
    return " ".join(parts)
