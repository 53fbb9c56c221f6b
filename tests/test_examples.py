"""The examples run: their help, and what they do, on the bundled demo model or a tiny random one."""

import importlib
import io
import re
import shutil
from pathlib import Path

import pytest
from markdown import ROOT
from test_cli_learn import checkpoint, texts  # noqa: F401 (fixtures)

import transformers_commvq
from transformers_commvq import CommVQError, demo_model, disable, enable
from transformers_commvq.cards import License, make_card
from transformers_commvq.demo_text import ANSWER, FACT, PROMPT_MODULES, QUESTION, passage

EXAMPLES = ROOT / "examples"
SHARED = ("common", "conversation")
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in SHARED)


@pytest.fixture(autouse=True)
def script(monkeypatch):
    """Imports an example as Python does that runs it: its folder comes first."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, script, capsys):
    with pytest.raises(SystemExit) as left:
        script(name).main(["--help"])
    assert left.value.code == 0
    assert f"python examples/{name}.py" in capsys.readouterr().out
    assert f"]({name}.py)" in (EXAMPLES / "README.md").read_text()


@pytest.fixture(scope="module")
def document(smollm2, tmp_path_factory):
    """Some 400 tokens of documentation with a fact near the beginning, which the cache holds as codes."""
    _, tokenizer = smollm2
    notes = passage(PROMPT_MODULES, 350, tokenizer.encode)
    notes.insert(1, FACT)
    path = tmp_path_factory.mktemp("document") / "notes.txt"
    path.write_text("\n\n".join(notes))
    return path


def model_words(folder):
    return ["--model", str(folder), "--base-model", demo_model.BASE_MODEL]


def test_document_qa(script, smollm2_folder, document, capsys):
    words = [str(document), QUESTION, QUESTION, "--new-tokens", "16", *model_words(smollm2_folder)]
    script("document_qa").main(words)
    first, second = re.findall(r"^> .*\n([^>]*)\(", capsys.readouterr().out, flags=re.MULTILINE)
    assert ANSWER in first and first == second  # the second question starts where the first did


def test_chat_with_book(script, smollm2_folder, document, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\nThank you.\n\nnever read\n"))
    script("chat_with_book").main([str(document), "--new-tokens", "16", *model_words(smollm2_folder)])
    out = capsys.readouterr().out
    read, first, second = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tokens in", out))
    assert ANSWER in out and read < first < second < first + 60  # a turn adds itself, not the book again
    assert "no place" not in out


def test_a_conversation_is_what_the_chat_template_says(script, smollm2):
    """And what is continued from the cache is what the plain cache gives from the beginning: all of it is exact yet."""
    model, tokenizer = smollm2
    enable(model, {"base_model": demo_model.BASE_MODEL})
    try:
        chat, turns = script("conversation").Conversation(model, tokenizer), []
        for question in ("What is the capital of France? One word.", "And of Italy?"):
            answer = chat.ask(question, new_tokens=12)
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        expected = tokenizer.apply_chat_template(turns[:3], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(expected, add_special_tokens=False, return_tensors="pt")
        plain = model.generate(**prompt, max_new_tokens=12, do_sample=False, kv_cache=False)
        assert "Paris" in turns[1]["content"]
        assert chat.ids.tolist() == plain.tolist()
        assert chat.cache.get_seq_length() == chat.ids.shape[1] - 1
    finally:
        disable(model)


def test_what_has_no_place_is_told(script, smollm2, document):
    model, tokenizer = smollm2
    enable(model, {"base_model": demo_model.BASE_MODEL})
    try:
        chat = script("conversation").Conversation(model, tokenizer)
        left_out = chat.read(document.read_text(), reserve=chat.context - 40)
        assert left_out > 200 and chat.cache.get_seq_length() == 40
        with pytest.raises(CommVQError, match="no place for 8192 more"):
            chat.ask("Why?", new_tokens=chat.context)
    finally:
        disable(model)


def test_learn_for_your_model(script, checkpoint, texts, tmp_path, capsys):  # noqa: F811 (fixtures)
    words = ["--model", str(checkpoint), "--base-model", "someone/tiny", "--text", *texts, "--out", str(tmp_path)]
    script("learn_for_your_model").main([*words, "--bits", "1", "--tokens", "1024", "--length", "200"])
    out = capsys.readouterr().out
    book = transformers_commvq.Codebook.load(tmp_path / "tiny-CommVQ-1bit")
    assert book.bits == 1 and book.geometry.id == "someone/tiny"
    assert f"{book.evaluation['held out']['perplexity']:.3f}" in out
    assert len(re.findall(r"^  (?:plain|compressed): ", out, flags=re.MULTILINE)) == 2


@pytest.fixture
def shipped(tmp_path):
    """A copy of codebooks that ship with the package."""
    source = next((Path(transformers_commvq.__file__).parent / "codebooks").glob("*2bit"))
    return shutil.copytree(source, tmp_path / source.name)


def test_publish_sends_nothing_by_default(script, shipped, capsys):
    repo_id = "your-name/SmolLM2-135M-Instruct-CommVQ-2bit"
    script("publish").main([str(shipped), repo_id, "--license", "apache-2.0"])  # the tests have no network
    out = capsys.readouterr().out
    assert "Nothing was sent" in out
    assert (shipped / "README.md").read_text() == make_card(shipped, repo_id, License("apache-2.0"))
    for file in shipped.iterdir():
        assert f"{file.stat().st_size:>12,} bytes  {file.name}" in out


def test_publish_when_told(script, shipped, server, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "token-alice")
    repo_id = "alice/SmolLM2-135M-Instruct-CommVQ-2bit"
    script("publish").main([str(shipped), repo_id, "--license", "apache-2.0", "--push"])
    sent = server.files(repo_id)
    assert sent["codebooks.safetensors"] == (shipped / "codebooks.safetensors").read_bytes()
    assert sent["README.md"].decode() == make_card(shipped, repo_id, License("apache-2.0"))
    assert f'"codebook": "{repo_id}"' in capsys.readouterr().out


def test_errors_are_one_line(script, shipped, tmp_path):
    run = script("common").run
    with pytest.raises(SystemExit, match="^error: the license of .* cannot be looked up"):
        run(lambda: script("publish").main([str(shipped), "your-name/books"]))
    with pytest.raises(SystemExit, match="^error: .*nowhere.txt"):
        run(lambda: script("document_qa").main([str(tmp_path / "nowhere.txt"), "Why?"]))
