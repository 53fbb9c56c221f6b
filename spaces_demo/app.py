"""The Space: what CommVQ saves, side by side with the plain cache. User interface only; run it with ``make space``."""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import answers
import gradio as gr
import memory
import picture
import recorded
import style
from presets import read_presets

from transformers_commvq import CommVQError, ConfigError
from transformers_commvq.estimate import GPUS

CARDS = ["RTX 4060", "RTX 4090", "A100 40GB", "H100"]
MODEL = "meta-llama/Llama-3.1-8B-Instruct"


def told(function):
    """Errors of the package are shown to the reader as they are; others stay unnamed, with a trace in the log."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            try:
                yield from function(*args, **kwargs)
            except CommVQError as error:
                raise gr.Error(str(error), duration=20) from error

    else:

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except CommVQError as error:
                raise gr.Error(str(error), duration=20) from error

    return wrapper


@told
def show_memory(model, config_json, context, batch, bits, gpus, weights):
    made = memory.report(model, config_json, context, batch, bits, gpus or CARDS, weights)
    size = memory.find_size(model, config_json)
    return (
        style.drawing(memory.picture(made, size), f"Size of the cache of {size.name} against its length"),
        style.table(f"At {made['context']:,} tokens", memory.cache_table(made)),
        style.table("Longest context that fits, in tokens", memory.gpu_table(made)),
        memory.notes(made, size),
        memory.command(model, config_json, made, gpus or CARDS, weights),
    )


def memory_tab(demo: gr.Blocks) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            model = gr.Dropdown(
                list(read_presets()),
                value=MODEL,
                allow_custom_value=True,
                label="Model",
                info="From the list, or any Hub id.",
                elem_id="model",
            )
            power = gr.Slider(
                10, 20, 17, step=0.25, label="Context: a power of two, to 1M tokens", buttons=[], elem_id="power"
            )
            context = gr.Number(131072, precision=0, label="= tokens in the cache", elem_id="context")
            batch = gr.Slider(1, memory.LARGEST_BATCH, 1, step=1, label="Sequences at once", elem_id="batch")
            bits = gr.CheckboxGroup(list(memory.RATES), value=["1", "2"], label="CommVQ bits", elem_id="bits")
            weights = gr.Radio(list(memory.WEIGHTS), value="16 bits", label="Weights", elem_id="weights")
            gpus = gr.Dropdown(list(GPUS), value=CARDS, multiselect=True, label="GPUs", elem_id="gpus")
            with gr.Accordion("Or paste a config.json", open=False):
                config = gr.Textbox(lines=4, max_length=memory.LARGEST_CONFIG, show_label=False, elem_id="config")
        with gr.Column(scale=3, min_width=280):
            plot = gr.HTML(elem_id="memory-plot")
            sizes = gr.HTML(elem_id="cache-table")
    about = gr.Markdown(elem_id="about")
    longest = gr.HTML(elem_id="gpu-table")
    gr.Markdown(memory.CAVEATS)
    same = gr.Textbox(label="The same numbers in a terminal", interactive=False, lines=2, elem_id="command")
    # Within the browser: the slider is the logarithm of the number.
    power.input(None, power, context, js="(x) => Math.round(2 ** x)", api_visibility="private")
    context.input(None, context, power, js="(t) => Math.min(20, Math.max(10, Math.log2(t || 1)))")
    inputs = [model, config, context, batch, bits, gpus, weights]
    gr.on(
        [demo.load, *(component.change for component in inputs)],
        show_memory,
        inputs,
        [plot, sizes, longest, about, same],
        trigger_mode="always_last",
        show_progress="hidden",
        api_visibility="private",
    )


@told
def read_file(path: str) -> str:
    """The text of an uploaded file, cut to what the page reads."""
    try:
        text = Path(path).read_text()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{Path(path).name} is no text in UTF-8. Fix: take a plain text file.") from error
    if len(text) > answers.MOST_CHARACTERS:
        gr.Warning(f"{Path(path).name}: the first {answers.MOST_CHARACTERS:,} of {len(text):,} characters are taken.")
    return text[: answers.MOST_CHARACTERS]


@told
def show_answers(prompt, bits, new_tokens):
    for state in answers.answer(prompt, bits, new_tokens):
        sides = (answers.answer_html(state, name) for name in answers.SIDES)
        yield *sides, answers.status(state), answers.numbers_html(state)


def answers_tab() -> None:
    gr.Markdown(
        "SmolLM2-135M-Instruct, a small model, answers the same prompt twice: with the plain cache and with CommVQ. "
        "The likeliest token is taken each time, so the answers differ only by what compression lost."
    )
    prompt = gr.Textbox(
        lines=6,
        max_lines=12,
        max_length=answers.MOST_CHARACTERS,
        label="Prompt",
        placeholder="Write or paste a text and what to do with it, or take a sample.",
        elem_id="prompt",
    )
    with gr.Row():
        names = gr.Dropdown(list(answers.SAMPLES), value=None, label="Samples", min_width=240, elem_id="samples")
        upload = gr.UploadButton("Load a text file", file_types=["text"], min_width=160, elem_id="upload")
    with gr.Row():
        bits = gr.Radio(list(answers.RATES), value="2", label="CommVQ bits", min_width=160, elem_id="rate")
        count = gr.Slider(8, answers.MOST_NEW, 64, step=8, label="Tokens to write, at most", min_width=240)
    with gr.Row():
        go = gr.Button("Answer", variant="primary", min_width=120, elem_id="go")
        stop = gr.Button("Stop", min_width=120, elem_id="stop")
    state = gr.Markdown(elem_id="status")
    with gr.Row():
        with gr.Column(min_width=280):
            gr.Markdown("**Plain cache**")
            plain = gr.HTML(elem_id="plain-answer")
        with gr.Column(min_width=280):
            gr.Markdown("**CommVQ**")
            ours = gr.HTML(elem_id="commvq-answer")
    numbers = gr.HTML(elem_id="numbers")
    running = gr.on(
        [go.click],
        show_answers,
        [prompt, bits, count],
        [plain, ours, state, numbers],
        concurrency_limit=1,
        show_progress="hidden",
        api_visibility="private",
    )
    # Told after the cancelling is done, or a last update of the stream would overwrite it.
    stop.click(None, cancels=[running], api_visibility="private").then(
        lambda told: told if told.startswith("Stopped.") else f"Stopped. {told}",
        state,
        state,
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )
    names.input(told(answers.sample), names, prompt, api_name="sample")
    upload.upload(read_file, upload, prompt, api_name="read_file")


@told
def show_picture(
    layer: float = 8, head: float = 1, token: float = 24, position: float = 300, bits: str = "2"
) -> tuple[str, str]:
    """The picture, as html, and what it shows, as markdown."""
    made = picture.example(layer, head, token, position, bits)
    return style.drawing(picture.draw(made, position), "A key, its code, and both rotated"), picture.caption(
        made, token, position
    )


@told
def show_recorded(name: str) -> tuple[str, str]:
    """One recording: on what it was measured, as markdown; its tables and plots, as html."""
    return recorded.show(name)


def recorded_tab(demo: gr.Blocks) -> None:
    known = recorded.names()
    if not known:
        gr.Markdown("Nothing is recorded here: the folders benchmarks/ and hub_cards/ are not beside this page.")
        return
    name = gr.Dropdown(known, value=known[0], label="Recording", elem_id="recording")
    about = gr.Markdown(elem_id="recorded-about")
    shown = gr.HTML(elem_id="recorded")
    name.change(show_recorded, name, [about, shown], api_name="recorded", show_progress="hidden")
    demo.load(show_recorded, name, [about, shown], show_progress="hidden", api_visibility="private")


def picture_tab(tab: gr.Tab) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            layer = gr.Slider(0, 29, 8, step=1, label="Layer", elem_id="layer")
            head = gr.Slider(0, 2, 1, step=1, label="Key head", elem_id="head")
            token = gr.Slider(0, picture.TOKENS - 1, 24, step=1, label="Token of a text", elem_id="token")
            position = gr.Slider(0, 4095, 300, step=1, label="Position to rotate to", elem_id="position")
            bits = gr.Radio(list(answers.RATES), value="2", label="CommVQ bits", elem_id="picture-bits")
            about = gr.Markdown(elem_id="caption")
        with gr.Column(scale=3, min_width=280):
            plot = gr.HTML(elem_id="picture")
    inputs, outputs = [layer, head, token, position, bits], [plot, about]
    gr.on(
        [tab.select, *(component.change for component in inputs)],
        show_picture,
        inputs,
        outputs,
        trigger_mode="always_last",
        show_progress="hidden",
        api_name="picture",
    )


def build() -> gr.Blocks:
    with gr.Blocks(title="CommVQ: a smaller KV cache") as demo:
        gr.Markdown(style.HEADING)
        with gr.Tab("Memory"):
            memory_tab(demo)
        with gr.Tab("Try it"):
            answers_tab()
        with gr.Tab("Quality"):
            recorded_tab(demo)
        with gr.Tab("How it works") as tab:
            picture_tab(tab)
        gr.api(told(memory.report), api_name="estimate")
        gr.api(told(answers.answer), api_name="answer", concurrency_limit=1)
    return demo.queue(max_size=20, default_concurrency_limit=2)


def launch(demo: gr.Blocks, **settings):
    """Serve the page; settings go to gradio's ``launch``. Returns what it returns."""
    return demo.launch(theme=style.THEME, css=style.CSS, max_file_size="1mb", footer_links=["api"], **settings)


if __name__ == "__main__":
    print("Loading the model and compiling the kernels, once ...", flush=True)
    answers.warm_up()
    launch(build())
