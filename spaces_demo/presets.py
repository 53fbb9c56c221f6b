"""Models whose numbers ship with the Space, so that its memory tab needs no network.

``presets.json`` holds for each model the fields of its config that decide the sizes, and the sizes that
``transformers_commvq.estimate`` computes from them. After editing a config: ``python spaces_demo/presets.py``.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers_commvq.estimate import CacheShape, ModelSize, describe_config

FILE = Path(__file__).with_name("presets.json")


def size_from_dict(fields: dict[str, Any]) -> ModelSize:
    """The inverse of ``dataclasses.asdict`` on a ModelSize."""
    return ModelSize(**{**fields, "shape": CacheShape(**fields["shape"])})


def config_from_dict(fields: dict[str, Any]):
    """A transformers config from the contents of a config.json.

    Raises:
        ValueError: no ``model_type``, or one that transformers does not know.
    """
    from transformers import AutoConfig

    fields = dict(fields)
    return AutoConfig.for_model(fields.pop("model_type", "none given"), **fields)


def read_presets() -> dict[str, ModelSize]:
    """Hub id -> sizes, in the order of the file."""
    return {name: size_from_dict(entry["size"]) for name, entry in json.loads(FILE.read_text()).items()}


def main() -> None:
    entries = json.loads(FILE.read_text())
    for name, entry in entries.items():
        entry["size"] = asdict(describe_config(config_from_dict(entry["config"]), name))
    FILE.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
