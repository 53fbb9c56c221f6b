"""Tasks that a cache must not spoil: retrieval of a hidden passkey, and grade-school problems (GSM8K).

Prompts go through the cache in chunks, as text does in ``evaluation``: the question attends to what the cache kept, not
to a prompt that is still there in full.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from .config import ConfigError
from .geometry import cache_name
from .storage import MakeCache, uncompressed

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
DEPTHS = (0.1, 0.5, 0.9)
_ASK = "What is the pass key? The pass key is"
_SOLUTION_TOKENS = 256  # most tokens of an answer to a problem; those of the data set have 100 on average
Run = Callable[[Callable[[Any], Any], Sequence[Any], str], list[Any]]


def in_turn(function: Callable[[Any], Any], items: Sequence[Any], task: str) -> list[Any]:
    """One after another in this process; ``processes.Share.map`` shares them out instead, and shows its progress."""
    return [function(item) for item in items]


class Reader:
    """Reads prompts through a cache in chunks and answers them by plain greedy decoding.

    No generation config of the model can change the decoding. What a prompt shares with the one before it is read once:
    a copy of the cache is kept at the last whole chunk of it, so that every prompt's chunks are those it would have had
    alone.
    """

    def __init__(self, model: PreTrainedModel, make_cache: MakeCache, chunk: int = 128):
        self.model, self.make_cache, self.chunk = model, make_cache, chunk
        self._kept: tuple[list[int], Cache | None] = [], None

    @torch.inference_mode()
    def answer(
        self,
        ids: Sequence[int],
        count: int,
        stop: Callable[[list[int]], bool] = lambda answer: False,
        shared: int = 0,
    ) -> list[int]:
        """Greedy continuation of a prompt.

        ids: the prompt. count: most new tokens. stop(answer so far): True ends it.
        shared: how many of the first tokens the next prompt will probably have too; a guess costs time at most.
        """
        ids = list(ids)
        start, cache = self._begin(ids)
        keep = min(shared, len(ids) - 1) // self.chunk * self.chunk
        for at in range(start, len(ids), self.chunk):
            if at == keep > start:
                self._kept = ids[:at], copy.deepcopy(cache)
            logits = self._step(ids[at : at + self.chunk], cache)
        answer: list[int] = []
        while True:
            answer.append(int(logits[0, -1].argmax()))
            if len(answer) == count or stop(answer):
                return answer
            logits = self._step(answer[-1:], cache)

    def _begin(self, ids: list[int]) -> tuple[int, Cache]:
        """A cache of the prompt's first tokens, and how many they are."""
        known, cache = self._kept
        if cache is not None and ids[: len(known)] == known and len(known) < len(ids):
            return len(known), copy.deepcopy(cache)
        self._kept = [], None
        return 0, self.make_cache(self.model)

    def _step(self, ids: list[int], cache: Cache) -> torch.Tensor:
        given = {cache_name(type(self.model)): cache, "use_cache": True, "logits_to_keep": 1}
        return self.model(input_ids=torch.tensor([ids], device=self.model.device), **given).logits


@dataclass(frozen=True)
class PasskeyTrial:
    """One hidden number. length: tokens of the prompt, about. depth: 0 (start) to 1 (end). key: five digits.

    before: what the prompt begins with, up to where the number is hidden.
    """

    length: int
    depth: float
    key: str
    before: str
    prompt: str


def passkey_trials(
    tokenizer: Any,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    trials: int = 1,
    seed: int = 0,
    haystack: str | None = None,
) -> list[PasskeyTrial]:
    """The prompts of ``passkey_retrieval``.

    Raises ConfigError: a depth outside 0 to 1, no trials, a length too short to hide anything, or too little text.
    """
    if trials < 1 or min(lengths, default=0) < 128 or not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ConfigError(
            f"passkey: lengths {list(lengths)}, depths {list(depths)}, trials {trials}: expected lengths of 128 tokens "
            "or more, depths from 0 to 1, and at least one trial."
        )
    out = []
    for length in lengths:
        sentences = _sentences(tokenizer, haystack, length - 60)
        for depth in depths:
            place, draw = round(len(sentences) * depth), random.Random(f"{seed} {length} {depth:g}")
            before = " ".join(sentences[:place])
            for _ in range(trials):
                key = str(draw.randrange(10000, 100000))
                hidden = f"The pass key is {key}. Remember it. {key} is the pass key."
                prompt = " ".join([*sentences[:place], hidden, *sentences[place:], _ASK])
                out.append(PasskeyTrial(length, depth, key, before, prompt))
    return out


def _sentences(tokenizer: Any, haystack: str | None, tokens: int) -> list[str]:
    """Sentences of about so many tokens in all, from the beginning of the text; the filler is repeated without end."""
    found = re.split(r"(?<=[.!?])\s+", (FILLER if haystack is None else haystack).strip())
    out, total, size = [], 0, {}
    while total < tokens:
        for sentence in found:
            if sentence not in size:
                size[sentence] = len(tokenizer(" " + sentence, add_special_tokens=False)["input_ids"])
            total += size[sentence]
            if total > tokens and out:
                return out
            out.append(sentence)
        if haystack is not None and total < tokens:
            raise ConfigError(
                f"the haystack has {total} tokens; {tokens} are needed. Fix: more text, or shorter lengths."
            )
    return out


def passkey_retrieval(
    model: PreTrainedModel,
    tokenizer: Any,
    make_cache: MakeCache = uncompressed,
    lengths: Sequence[int] = (1024,),
    depths: Sequence[float] = DEPTHS,
    trials: int = 1,
    seed: int = 0,
    haystack: str | None = None,
    chunk: int = 128,
    run: Run = in_turn,
) -> dict[int, dict[float, float]]:
    """How often a five-digit number hidden in other text is repeated (arXiv 2305.16300, section 4.3).

    lengths: prompt tokens, about.  depths: where the number is hidden, 0 (start) to 1 (end).  trials: of each of them.
    haystack: the other text, used from its beginning; by default the paper's five sentences over and over.
    run: how the trials are gone through; see ``in_turn``.
    Returns length -> depth -> share of trials in which greedy decoding gives all digits at once.

    Raises ConfigError as ``passkey_trials`` does.
    """
    reader = Reader(model, make_cache, chunk)

    def found(trial: PasskeyTrial) -> bool:
        ids, key, before = (tokenizer(text)["input_ids"] for text in (trial.prompt, f" {trial.key}", trial.before))
        return trial.key in tokenizer.decode(reader.answer(ids, len(key) + 2, shared=len(before)))

    planned = passkey_trials(tokenizer, lengths, depths, trials, seed, haystack)
    out: dict[int, dict[float, float]] = {length: dict.fromkeys(depths, 0) for length in lengths}
    for trial, hit in zip(planned, run(found, planned, "passkey"), strict=True):
        out[trial.length][trial.depth] += hit / trials
    return out


@dataclass(frozen=True)
class Problem:
    """A word problem and its solution, whose last line is ``#### number``."""

    question: str
    answer: str

    @property
    def result(self) -> str:
        return self.answer.rpartition("####")[2].strip().replace(",", "")


def read_problems(path: str | Path) -> list[Problem]:
    """Problems from GSM8K's jsonl: one object a line with ``question`` and ``answer``.

    Raises ConfigError when the file is missing or has other contents.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file.")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        problems = [Problem(row["question"], row["answer"]) for row in rows]
        bad = next((i for i, p in enumerate(problems, 1) if not re.fullmatch(r"-?[\d.]+", p.result)), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: expected one json object a line with question and answer: {error!r}.") from error
    if bad or not problems:
        raise ConfigError(f"{path}, line {bad or 1}: expected an answer that ends with '#### number', as GSM8K's do.")
    return problems


def gsm8k(
    model: PreTrainedModel,
    tokenizer: Any,
    make_cache: MakeCache,
    problems: Sequence[Problem],
    count: int = 20,
    shots: int = 8,
    chunk: int = 128,
    run: Run = in_turn,
) -> list[str | None]:
    """Answers to word problems, decoded greedily after worked examples (arXiv 2110.14168; the format of 2201.11903).

    problems: the first ``shots`` are the examples, the last ``count`` are asked.
    Returns the number each answer gives, None if it gives none; ``accuracy`` compares them.

    Raises ConfigError when there are too few problems.
    """
    if count < 1 or shots < 0 or count + shots > len(problems):
        raise ConfigError(f"{len(problems)} problems: {shots} examples and {count} questions were asked for.")
    examples = "".join(f"Question: {p.question}\nAnswer: {_plain(p.answer)}\n\n" for p in problems[:shots])
    end, shared = tokenizer.eos_token_id, len(tokenizer(examples)["input_ids"])
    reader = Reader(model, make_cache, chunk)

    def finished(answer: list[int]) -> bool:
        return answer[-1] == end or "\n\n" in tokenizer.decode(answer[-4:])

    def solve(problem: Problem) -> str | None:
        ids = tokenizer(f"{examples}Question: {problem.question}\nAnswer:")["input_ids"]
        answer = reader.answer(ids, _SOLUTION_TOKENS, finished, shared)
        return answered(tokenizer.decode(answer))

    return run(solve, problems[-count:], "gsm8k")


def accuracy(answers: Sequence[str | None], problems: Sequence[Problem]) -> float:
    """Share of right answers; the problems are the last ones, as ``gsm8k`` asks them."""
    asked = problems[-len(answers) :]
    right = [a is not None and float(a) == float(p.result) for a, p in zip(answers, asked, strict=True)]
    return sum(right) / len(right)


def answered(text: str) -> str | None:
    """The number a solution ends with: what follows ``####``, else the last number before the first empty line."""
    steps, _, result = text.split("\n\n")[0].partition("####")
    marked, numbers = (re.findall(r"-?\d[\d,]*(?:\.\d+)?", part) for part in (result, steps))
    number = marked[0] if marked else numbers[-1] if numbers else None
    return number and number.replace(",", "")


def _plain(solution: str) -> str:
    """Without the calculator's annotations, <<48/2=24>>."""
    return re.sub(r"<<.*?>>", "", solution)
