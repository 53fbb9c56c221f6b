"""CommVQ for Hugging Face transformers: a KV cache of 2 bits or 1 bit an element, with one argument.

    model = AutoModelForCausalLM.from_pretrained(model_id, kv_cache="commvq")

Importing this package adds "commvq" to transformers' registries and lets ``from_pretrained`` take ``kv_cache=``.
"""

from .cache import CommVQCache, CommVQLayer
from .codebook import Codebook, LayerBook, ModelGeometry, SignBook
from .config import (
    CacheUseError,
    CodebookError,
    CodebookFormatError,
    CodebookIntegrityError,
    CodebookMismatchError,
    CodebookNotFoundError,
    CommVQConfig,
    CommVQError,
    ConfigError,
    UnsupportedModelError,
)
from .integration import disable, enable, make_cache
from .loading import register, unregister
from .publish import push_to_hub

__version__ = "0.1.0"

__all__ = [
    "CacheUseError",
    "Codebook",
    "CodebookError",
    "CodebookFormatError",
    "CodebookIntegrityError",
    "CodebookMismatchError",
    "CodebookNotFoundError",
    "CommVQCache",
    "CommVQConfig",
    "CommVQError",
    "CommVQLayer",
    "ConfigError",
    "LayerBook",
    "ModelGeometry",
    "SignBook",
    "UnsupportedModelError",
    "disable",
    "enable",
    "make_cache",
    "push_to_hub",
    "register",
    "unregister",
]

register()
