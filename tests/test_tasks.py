"""Passkeys and word problems: what is asked, how answers are read, and that several processes share the work."""

import json
import re

import pytest
import torch
from tiny_models import tiny_model

from transformers_commvq import tasks
from transformers_commvq.config import ConfigError
from transformers_commvq.processes import Share
from transformers_commvq.storage import uncompressed
from transformers_commvq.tasks import Problem, Reader, accuracy, answered, gsm8k, passkey_retrieval, passkey_trials


class Letters:
    """A tokenizer of one token a character, whose tokens can be read back."""

    eos_token_id = 0

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.mark.parametrize("chunk", [5, 128])
def test_greedy_is_generate(chunk):
    model, ids = tiny_model("llama-gqa"), list(range(3, 40))
    expected = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 37:]
    reader = Reader(model, uncompressed, chunk)
    assert reader.answer(ids, 12) == expected.tolist()
    assert reader.answer(ids, 12, lambda a: len(a) == 3) == expected[:3].tolist()


def test_what_prompts_share_is_read_once_and_changes_nothing(monkeypatch):
    """Answers and the chunks they come from are those of prompts read alone, whatever the guess of what is shared."""
    model, text = tiny_model("llama-gqa"), list(range(3, 60))
    prompts = [([*text[:47], 80], 47), ([*text[:47], 81, 82], 47), ([*text, 83], 57), (text[:20], 20), (text, 99)]
    prompts += [([9, 9, *text], 30), (text[:30], 30), (text[:40], 0)]
    alone = [Reader(model, uncompressed, 10).answer(ids, 5) for ids, _ in prompts]
    read, step = [], Reader._step

    def counted(self, ids, cache):
        read.append(len(ids))
        return step(self, ids, cache)

    monkeypatch.setattr(Reader, "_step", counted)
    reader, chunks = Reader(model, uncompressed, 10), []
    for (ids, shared), want in zip(prompts, alone, strict=True):
        read.clear()
        assert reader.answer(ids, 5, shared=shared) == want
        chunks.append(read[:-4])
    assert chunks[:4] == [[10, 10, 10, 10, 8], [9], [10, 8], [10, 10]]
    assert chunks[4] == [10] * 4 + [7] and chunks[6] == [10, 10, 10] and chunks[7] == [10, 10]


def test_passkeys_are_hidden_where_they_should_be():
    for haystack in (None, "One. Two follows one! Is three the next? " * 100):
        planned = passkey_trials(Letters(), [400, 900], [0, 0.5, 1], trials=2, haystack=haystack)
        assert len(planned) == 12 and len({t.key for t in planned}) == 12
        for trial in planned:
            place = trial.prompt.index("The pass key is " + trial.key) / (len(trial.prompt) - 100)
            assert abs(place - trial.depth) < 0.15
            assert trial.length - 60 <= len(trial.prompt) <= trial.length + 80
            assert trial.prompt.endswith("The pass key is")
    for wrong in ({"lengths": [50]}, {"depths": [1.5]}, {"trials": 0}, {"haystack": "Too little."}):
        with pytest.raises(ConfigError):
            passkey_trials(Letters(), **{"lengths": [400], **wrong})


def test_shares_are_of_each_length_and_depth(monkeypatch):
    asked = []

    def knows_odd_numbers(self, ids, count, shared):
        assert 0 <= shared < len(ids)
        key = re.search(r"pass key is (\d+)", Letters().decode(ids)).group(1)
        asked.append(int(key))
        return [ord(c) for c in key] if int(key) % 2 else []

    monkeypatch.setattr(Reader, "answer", knows_odd_numbers)
    got = passkey_retrieval(tiny_model("llama-gqa"), Letters(), lengths=(300, 400), depths=(0.0, 0.5), trials=5)
    odd = [sum(key % 2 for key in asked[i : i + 5]) / 5 for i in range(0, 20, 5)]
    assert len(set(odd)) > 1
    assert got[300] == pytest.approx({0.0: odd[0], 0.5: odd[1]}) and got[400] == pytest.approx(
        {0.0: odd[2], 0.5: odd[3]}
    )


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_try_every_item_once_and_all_know_the_results(count):
    items = list(range(7))
    parts = [[x * x for x in Share(rank, count).of(items)] for rank in range(count)]

    class Together(Share):
        def gather(self, value):
            assert value == parts[self.rank]
            return parts

    for rank in range(count):
        assert Together(rank, count).map(lambda x: x * x, items, "squares") == [x * x for x in items]


PROBLEMS = [Problem(f"What is {i} and {i}?", f"<<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}") for i in range(1000, 1006)]


def test_problems_are_asked_after_examples(monkeypatch):
    prompts = []

    def adds(self, ids, count, stop, shared):
        prompts.append(Letters().decode(ids))
        assert prompts[-1][:shared].count("Question:") == 3 and prompts[-1][shared:].startswith("Question:")
        assert not stop([ord("4")]) and stop([ord("\n"), ord("\n")]) and stop([0])
        number = int(re.findall(r"What is (\d+)", prompts[-1])[-1])
        said = "no idea" if number == 1005 else f" Sum.\n#### {2 * number:,}\n\nQuestion: 7"
        return [ord(c) for c in said]

    monkeypatch.setattr(Reader, "answer", adds)
    answers = gsm8k(tiny_model("llama-gqa"), Letters(), uncompressed, PROBLEMS, count=2, shots=3)
    assert answers == ["2008", None] and accuracy(answers, PROBLEMS) == 0.5
    assert all(p.count("Question:") == 4 and "<<" not in p and "#### 2004" in p for p in prompts)
    with pytest.raises(ConfigError, match="6 problems"):
        gsm8k(tiny_model("llama-gqa"), Letters(), uncompressed, PROBLEMS, count=2, shots=5)


def test_answers_are_read():
    assert answered(" 3 and 4.\n#### 7\n\nQuestion: 9") == "7"
    assert answered(" So 3 and 1,234.5 in all.\n\n8") == "1234.5"
    assert answered(" #### none, of 5") == "5" and answered(" 6 ####") == "6" and answered(" nothing") is None


def test_problem_files(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"question": "?", "answer": "x\n#### 1,500"}) + "\n")
    assert [p.result for p in tasks.read_problems(file)] == ["1500"]
    for row, message in (({"question": "?"}, "question and answer"), ({"question": "?", "answer": "five"}, "line 1")):
        file.write_text(json.dumps(row))
        with pytest.raises(ConfigError, match=message):
            tasks.read_problems(file)
    with pytest.raises(ConfigError, match="no such file"):
        tasks.read_problems(tmp_path / "none.jsonl")
