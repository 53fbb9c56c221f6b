"""The demo's text: documentation strings of the standard library, with one fact of ours planted among them.

Nothing is downloaded or shipped. The choice is the same on every machine with the same Python version.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .config import CommVQError

PROMPT_MODULES = (
    "textwrap", "statistics", "heapq", "fractions", "shutil", "tempfile", "difflib", "bisect", "calendar", "datetime",
    "argparse", "configparser", "contextlib", "copy", "csv", "dataclasses", "enum", "fileinput", "fnmatch", "functools",
    "glob", "gzip", "inspect", "ipaddress", "itertools", "json", "linecache", "mailbox", "operator", "pathlib",
)  # fmt: skip
HELD_MODULES = (
    "logging", "random", "string", "socket", "subprocess", "threading", "tarfile", "timeit", "traceback", "typing",
    "unittest", "urllib.parse", "uuid", "warnings", "weakref", "zipfile", "asyncio", "ast", "collections", "decimal",
)  # fmt: skip

FACT = "The secret access code of the blue lighthouse is 4817."
QUESTION = "What is the secret access code of the blue lighthouse?"
ANSWER = "4817"
LONGEST = 1000  # characters of a paragraph; longer documentation is left out, so that no single text dominates
DEPTH = 0.4  # where the fact stands: after this share of the notes


@dataclass(frozen=True)
class Prompt:
    """A long prompt and what a right answer contains.

    ids: token ids of the whole chat, ready for generate().
    """

    ids: list[int]
    question: str
    expected: str


def docstrings(modules: tuple[str, ...]) -> Iterator[str]:
    """One paragraph per public documented function, class or method of each module, in a fixed order."""
    return (text for name in modules for text in _of_module(name) if len(text) <= LONGEST)


def _of_module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    if module.__doc__:
        yield inspect.cleandoc(module.__doc__)
    for member_name, member in sorted(vars(module).items()):
        if member_name.startswith("_") or getattr(member, "__module__", None) != name:
            continue
        if doc := getattr(member, "__doc__", None):
            yield f"{name}.{member_name}: {inspect.cleandoc(doc)}"
        for method_name, method in sorted(vars(member).items()) if inspect.isclass(member) else ():
            if not method_name.startswith("_") and inspect.isfunction(method) and method.__doc__:
                yield f"{name}.{member_name}.{method_name}: {inspect.cleandoc(method.__doc__)}"


def passage(modules: tuple[str, ...], tokens: int, encode: Callable[[str], list[int]]) -> list[str]:
    """Paragraphs from the start of ``modules``' documentation that hold ``tokens`` tokens, a few more at most.

    Raises:
        CommVQError: there is not enough documentation (Python was started with -OO, or ``tokens`` is very large).
    """
    paragraphs, total = [], 0
    for text in docstrings(modules):
        if total >= tokens:
            return paragraphs
        paragraphs.append(text)
        total += len(encode(text + "\n\n"))
    if total >= tokens:
        return paragraphs
    raise CommVQError(
        f"the standard library's documentation has {total} tokens, {tokens} were asked for. "
        "Fix: ask for fewer, and run Python without -OO."
    )


def build_content(tokenizer, tokens: int, depth: float = DEPTH) -> str:
    """At least ``tokens`` tokens of notes with FACT planted at ``depth`` of them, then QUESTION."""
    notes = passage(PROMPT_MODULES, tokens, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    notes.insert(round(depth * len(notes)), FACT)
    return "Read these notes.\n\n" + "\n\n".join(notes) + f"\n\nQuestion: {QUESTION}"


def chat_ids(tokenizer, content: str) -> list[int]:
    """Token ids of a chat in which the user says ``content``, ready for generate()."""
    if not tokenizer.chat_template:
        return tokenizer(f"{content}\nAnswer:")["input_ids"]
    chat = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def build_prompt(tokenizer, tokens: int, depth: float = DEPTH) -> Prompt:
    """A chat whose user gives notes of at least ``tokens`` tokens and asks for the FACT planted among them."""
    return Prompt(chat_ids(tokenizer, build_content(tokenizer, tokens, depth)), QUESTION, ANSWER)


def held_passage(tokenizer, tokens: int) -> list[int]:
    """Exactly ``tokens`` token ids of documentation that the prompt does not use."""
    text = "\n\n".join(
        passage(HELD_MODULES, tokens, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
