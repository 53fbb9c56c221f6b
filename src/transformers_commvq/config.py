"""The user-facing configuration, the exact memory arithmetic, and every error class."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "commvq"


class CommVQError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(CommVQError, ValueError):
    """A setting is outside its domain."""


class CodebookError(CommVQError):
    """Base of the errors about codebook artefacts."""


class CodebookNotFoundError(CodebookError, FileNotFoundError):
    """No codebook exists where it was looked for."""


class CodebookFormatError(CodebookError, ValueError):
    """The files are no codebook, or of a format version this package does not read."""


class CodebookIntegrityError(CodebookError, ValueError):
    """The bytes are not those that were published: truncated, altered or corrupt."""


class CodebookMismatchError(CodebookError, ValueError):
    """The codebook was learned for another model (geometry, RoPE or id)."""


class UnsupportedModelError(CommVQError, ValueError):
    """The model has no cache this package can compress, or does not use RoPE in a known way."""


class CacheUseError(CommVQError, RuntimeError):
    """A CommVQ cache was used by a model that is not enabled for it, or in an unsupported order."""


@dataclass(repr=False)
class CommVQConfig(QuantizationConfigMixin):
    """How the KV cache of one model is compressed.

    Attributes:
        method: always ``"commvq"``.
        bits: mean bits per key/value element, all heads, keys and values together.
        codebook: a folder with ``config.json`` and ``codebooks.safetensors``, or a Hub repository id.
            None looks for one: beside a local checkpoint, then among those shipped with the package.
        revision: branch, tag or commit of the Hub repository.
        base_model: Hub id of the model, for a model loaded from a local folder.
        sink_tokens: how many of each row's first real tokens stay in the model's dtype.
        residual_length: how many of the newest tokens, at least, stay in the model's dtype.
        learn: learn codebooks on first use when none exist.

    Raises:
        ConfigError: a field is outside its domain.
    """

    quant_method: str = field(default=METHOD, init=False, repr=False)  # the mixin's field, which its registry reads
    method: str = METHOD
    bits: float = 2.0
    codebook: str | None = None
    revision: str | None = None
    base_model: str | None = None
    sink_tokens: int = 4
    residual_length: int = 128
    learn: bool = False

    def __post_init__(self):
        if self.method != METHOD:
            raise ConfigError(f"method={self.method!r}: this package provides {METHOD!r} only. Fix: leave method out.")
        if isinstance(self.bits, bool) or not isinstance(self.bits, (int, float)) or not 0.25 <= self.bits <= 8:
            raise ConfigError(
                f"bits={self.bits!r}: mean bits per element, a number from 0.25 to 8. Fix: use 1 or 2 (default 2)."
            )
        self.bits = float(self.bits)
        if isinstance(self.codebook, Path):
            self.codebook = str(self.codebook)
        for name in ("codebook", "revision", "base_model"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"{name}={value!r}: expected a non-empty string. Fix: leave it out or name one.")
        for name, default in (("sink_tokens", 4), ("residual_length", 128)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{name}={value!r}: a count of tokens, 0 or more. Fix: e.g. {default}, the default.")
        if not isinstance(self.learn, bool):
            raise ConfigError(f"learn={self.learn!r}: expected True or False.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain json, with ``quant_method`` for transformers' registry."""
        return asdict(self)

    @classmethod
    def from_spec(cls, spec: CommVQConfig | dict | str | Path | bool) -> CommVQConfig:
        """Read what a user may write after ``kv_cache=``.

        spec: ``"commvq"`` or True (the defaults), a codebook folder or Hub id, a dict of fields, or a config.

        Raises:
            ConfigError: an unknown field, a value outside its domain, or another type.
        """
        if isinstance(spec, cls):
            return spec
        if spec is True or spec == METHOD:
            return cls()
        if isinstance(spec, (str, Path)):
            return cls(codebook=str(spec))
        if isinstance(spec, dict):
            known = {f.name for f in fields(cls) if f.init}
            unknown = sorted(set(spec) - known - {"quant_method"})
            if unknown:
                raise ConfigError(f"kv_cache has unknown fields {unknown}; known fields: {sorted(known)}.")
            if spec.get("quant_method", METHOD) != METHOD:
                raise ConfigError(f"quant_method={spec['quant_method']!r}: expected {METHOD!r}.")
            return cls(**{k: v for k, v in spec.items() if k in known})
        raise ConfigError(
            f"kv_cache={spec!r} ({type(spec).__name__}): expected 'commvq', a codebook folder or Hub id, "
            "a dict of fields, or a CommVQConfig."
        )

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs):
        """transformers' entry point for a config read from json; unknown fields are an error, not ignored."""
        config = cls.from_spec(dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config
