"""A conversation in which every token is read once: one compressed cache, kept from turn to turn."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from transformers_commvq import CommVQError, make_cache

CHUNK = 1024  # tokens read in one piece; what is in memory beside the cache while a long text is read grows with it


class Conversation:
    """Turns of a user and an enabled model. A text may be read before the first question.

    cache: holds every token of ``ids``, (1, tokens), but the last one that the model wrote.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.cache = make_cache(model)
        self.ids = torch.empty(1, 0, dtype=torch.long, device=model.device)
        self._before, self._after, self._between = frame(tokenizer)
        config = model.config.get_text_config(decoder=True)
        self.context = getattr(config, "max_position_embeddings", None) or 2**31

    def fork(self) -> Conversation:
        """A copy that goes on by itself. It shares the codebooks and has its own codes."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    def read(self, text: str, reserve: int = 1024) -> int:
        """Read a text that the next question is about, as the first part of its message.

        reserve: tokens of the model's context to keep free.
        Returns how many tokens of the text had no place.
        """
        new = self._encode(f"{self._before}{text}\n\n")
        room = max(0, self.context - reserve - self.ids.shape[1])
        self.ids = self._continued(new[:, :room])
        self._generate(1)  # reads; what it writes is not kept
        self._before = ""
        return max(0, new.shape[1] - room)

    def ask(self, question: str, new_tokens: int = 128, streamer: BaseStreamer | None = None) -> str:
        """The answer; the streamer gets it while it is written.

        Raises CommVQError when question and answer have no place in the model's context.
        """
        ids = self._continued(self._encode(f"{self._before}{question}{self._after}"))
        if ids.shape[1] + new_tokens > self.context:
            raise CommVQError(
                f"the conversation has {ids.shape[1]:,} tokens, the model's context {self.context:,}: no place for "
                f"{new_tokens} more. Fix: begin again, with a shorter text or fewer turns."
            )
        self.ids = ids
        self.ids = self._generate(new_tokens, streamer)
        self._before = self._between
        return self.tokenizer.decode(self.ids[0, ids.shape[1] :], skip_special_tokens=True).strip()

    def _encode(self, text: str) -> torch.Tensor:
        found = self.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)
        return found.input_ids.to(self.ids.device)

    def _continued(self, new: torch.Tensor) -> torch.Tensor:
        """``ids`` with new ones behind them; where the model closed its turn, the turn is not closed a second time."""
        ids = self.ids
        unread = ids.shape[1] > self.cache.get_seq_length()
        if unread and ids[0, -1] == new[0, 0]:
            ids = ids[:, :-1]
        return torch.cat([ids, new], 1)

    def _generate(self, new_tokens: int, streamer: BaseStreamer | None = None) -> torch.Tensor:
        """All ids and up to ``new_tokens`` more. Only tokens that the cache does not hold are read."""
        return self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            cache=self.cache,  # before transformers 5.24: past_key_values
            prefill_chunk_size=CHUNK,
            max_new_tokens=new_tokens,
            streamer=streamer,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )


def frame(tokenizer: Any) -> tuple[str, str, str]:
    """What the chat template puts before the first message, after a message, and between an answer and a message."""
    if not tokenizer.chat_template:
        return tokenizer.bos_token or "", "\nAnswer:", "\n\nQuestion: "
    roles = ("user", "assistant", "user")
    marks = ("<<first>>", "<<answer>>", "<<second>>")
    chat = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before, rest = text.split(marks[0])
    between, after = rest.split(marks[1])[1].split(marks[2])
    return before, after, between
