"""A page in the browser to draw with: live preview, gallery, and all settings as a command.

    python tools/demo.py --checkpoint=runs/tiny
    python tools/demo.py --checkpoint=runs/tiny --step=1000 --weights=params --port=8080
    python tools/demo.py --checkpoint=models/Lumina-Image-2.0 --host=0.0.0.0

Needs the `web` extra. There is no password: docs/demo.md says how to serve others.
"""

import asyncio
import logging as python_logging
import os
import pathlib
import shutil
import signal
import socket
import sys
import tempfile
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from typing import Any

from absl import flags, logging
from PIL import Image

from lumina_jax import checkpoint, cli, demo_page, executables, sample, system_prompts
from lumina_jax.data.buckets import Bucket
from lumina_jax.demo_page import Drawing, Stopped, Studio, progress, refused, said, sizes, stage
from lumina_jax.errors import InputError
from lumina_jax.sampling.pipeline import Pipeline
from lumina_jax.sampling.sampler import SEMANTICS
from lumina_jax.sampling.solvers import SOLVERS

MAX_UPLOAD = "30mb"
MAX_UPLOAD_PIXELS = 50_000_000
# Gradio opens what is uploaded with Pillow, which knows dozens of formats, some of them programs.
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP")
# Offered where a checkpoint has no prompts of its own.
PROMPTS = (
    "A red fox in deep snow looks at the camera, late afternoon light, a birch forest behind it",
    "A lighthouse on a basalt cliff, heavy sea, oil painting",
    "水墨画：雨后的竹林",
)
# Flags that lumina_jax.sample has too, and needs to open the same model in the same way.
SHARED_FLAGS = (
    "weights", "dtype", "text_encoder_path", "autoencoder_path", "cache_calibration", "replica",
    "data", "model",
)  # fmt: skip


def define_flags() -> None:
    sample.define_model_flags()
    flags.DEFINE_string("host", "127.0.0.1", "Who is let in: this machine. 0.0.0.0: everybody.")
    flags.DEFINE_list("names", [], "Names that a proxy in front of the page goes by; any with *.")
    flags.DEFINE_integer("port", 7860, "Of the page.", lower_bound=1, upper_bound=65535)


def example_prompts(path: str, step: int | None) -> Sequence[str]:
    """Prompts that the model knows: those of its run's previews."""
    if not checkpoint.is_run(path):
        return PROMPTS
    config = checkpoint.load_meta(checkpoint.find(path, step))["config"]
    return tuple(config.get("preview", {}).get("prompts", ())) or PROMPTS


def subtitle(weights: Mapping[str, Any]) -> str:
    """Which weights draw, in words."""
    if "step" not in weights:
        return f"{weights['name']}, {weights['dtype']}"
    kind = "averaged" if weights["weights"] == "ema" else "raw"
    return f"{weights['name']}, step {weights['step']}, {kind} weights"


# The picture stands beside prompt and settings; on a narrow screen between them.
CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#title h1 { font-weight: 600; letter-spacing: -0.01em; margin: 0.3em 0 0; }
#title p { color: var(--body-text-color-subdued); margin: 0.2em 0 0.4em; }
#desk {
  display: grid; gap: 20px 28px; align-items: start; grid-template-rows: auto 1fr;
  grid-template-columns: minmax(0, 5fr) minmax(0, 6fr);
  grid-template-areas: "ask result" "settings result";
}
#ask { grid-area: ask; } #result { grid-area: result; } #settings { grid-area: settings; }
@media (max-width: 820px) {
  #desk {
    grid-template: "ask" auto "result" auto "settings" auto / minmax(0, 1fr);
  }
}
#result { gap: 12px; }
#result .html-container, #result .prose { padding: 0 !important; max-width: none; }
#gallery .grid-wrap { min-height: 0; max-height: 420px; overflow-y: auto; }
#gallery .grid-container button > img { height: calc(100% - 20px); align-self: start; }
#gallery .caption-label {
  inset: auto 0 0 0; max-width: none; border: 0; border-radius: 0; padding: 2px 6px;
  font-size: 11px;
}
#gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(124px, 1fr)); }
#start_files .label-clear-button { display: none; }
.stage {
  display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 8px; padding: 8px;
  border: 1px solid var(--border-color-primary); border-radius: 12px;
  background: var(--background-fill-secondary);
}
.stage img {
  width: 100%; height: auto; max-height: 72vh; object-fit: contain; border-radius: 6px; margin: 0;
}
.stage.empty {
  --columns: 1; min-height: 320px; place-items: center; border-style: dashed;
  color: var(--body-text-color-subdued);
}
.news { min-height: 32px; line-height: 20px; color: var(--body-text-color); }
.news .bar {
  height: 4px; margin-top: 8px; border-radius: 2px; background: var(--border-color-primary);
}
.news .bar div { height: 4px; border-radius: 2px; background: var(--color-accent); }
.news.fault { color: #b42318; border-left: 3px solid currentColor; padding-left: 10px; }
.dark .news.fault { color: #f97066; }
"""


def make_fields(gr: Any, pipeline: Pipeline) -> dict[str, Any]:
    """The settings, by name; those that SamplerConfig has are called as there."""
    defaults, unit, choices = pipeline.defaults, pipeline.pixels_per_token, sizes(pipeline)
    largest = max(2 * max(pipeline.size), *(max(b.width, b.height) for b in choices))
    fields: dict[str, Any] = {}

    def number(name, label, info, **options):
        options = {"minimum": 0, "min_width": 110, **options}
        fields[name] = gr.Number(getattr(defaults, name), label=label, info=info, **options)

    def slider(name, label, largest, step, **options):
        value = getattr(defaults, name)
        fields[name] = gr.Slider(1, max(largest, value), value, step=step, label=label, **options)

    def choice(name, label, names, value, info=None):
        fields[name] = gr.Dropdown(list(names), value=value, label=label, info=info)

    with gr.Row():
        own = f"{choices[0]} is the model's own."
        choice("size", "Size", map(str, choices), str(choices[0]), own)
        fields["num_pictures"] = gr.Slider(1, demo_page.MAX_PICTURES, 1, step=1, label="Pictures")
    with gr.Row():
        for name, value in (("width", pipeline.size[1]), ("height", pipeline.size[0])):
            fields[name] = gr.Slider(unit, largest, value, step=unit, label=name.capitalize())
    with gr.Row():
        slider("num_steps", "Steps", 100, 1)
        slider("guidance_scale", "Guidance", 12, 0.1)
    with gr.Row():
        fields["seed"] = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=110)
        fields["random"] = gr.Checkbox(
            True, label="Random", info="Another seed each time.", min_width=110
        )
        fields["preview"] = gr.Checkbox(
            True, label="Live preview", info="Without it: no stopping.", min_width=110
        )
    with gr.Accordion("How it is drawn", open=False):
        with gr.Row():
            choice("solver", "Solver", SOLVERS, defaults.solver, "Of the path.")
            meaning = "Whose meaning steps, truncation and renormalisation have."
            choice("semantics", "Semantics", SEMANTICS, defaults.semantics, meaning)
        with gr.Row():
            number("guidance_truncation", "Truncation", "Guidance until then.", step=0.05)
            number("guidance_renorm", "Renormalisation", "0 is off.", step=0.1)
            number("time_shift", "Time shift", "0: by the size.", step=0.5)
        choice(
            "system_prompt", "System prompt", system_prompts.SYSTEM_PROMPTS,
            pipeline.system_prompt, "The sentence in front of the prompt.",
        )  # fmt: skip
    with gr.Accordion("Faster", open=False):
        gr.Markdown(
            "Work is used again while it changes little, and parts that are alike share it."
        )
        with gr.Row():
            number("cache_threshold", "Cache threshold", "0 is off.", step=0.01)
            number("cache_interval", "Cache interval", "1 is off.", minimum=1, precision=0)
            number("cache_order", "Cache order", "1: on a line.", maximum=1, precision=0)
            number("merge_ratio", "Merged tokens", "0 is off.", maximum=0.75, step=0.05)
    with gr.Accordion("Begin from a picture", open=False):
        gr.Markdown(
            "The centre of your picture is cut to the size above. Paint over what may change; if "
            "nothing is painted, all of it may."
        )
        fields["start"] = gr.ImageEditor(
            elem_id="start", type="pil", label="Picture and mask", height=380,
            sources=("upload", "clipboard"), layers=False, transforms=(), buttons=[],
            brush=gr.Brush(colors=[("#ff3366", 0.7)], color_mode="fixed"),
        )  # fmt: skip
        fields["strength"] = gr.Slider(
            0.05, 1, 0.6, step=0.05, label="Strength",
            info="1 leaves nothing of what may change, which is right for a mask.",
        )  # fmt: skip
    with gr.Accordion("Larger than trained", open=False), gr.Row():
        choice(
            "rope_scaling", "Positions", ("none", "time_aware"), defaults.rope_scaling,
            "time_aware stretches them.",
        )  # fmt: skip
        fields["proportional_attention"] = gr.Checkbox(
            defaults.proportional_attention, label="Sharper attention", info="Among more tokens."
        )
    return fields


def make_page(gr: Any, studio: Studio, title: str, prompts: Sequence[str]) -> Any:
    """The page, as Gradio's Blocks."""
    drawings: dict[str, Drawing] = {}  # the last one of each session
    enlarged: set[str] = set()  # sessions that look at one picture of the gallery

    with gr.Blocks(title="Lumina-Image 2.0", delete_cache=(3600, 24 * 3600)) as page:
        gr.Markdown(f"# Lumina-Image 2.0\n{title}", elem_id="title")
        with gr.Row(elem_id="desk"):
            with gr.Column(elem_id="ask"):
                prompt = gr.Textbox(label="Prompt", lines=3, placeholder="Shift + Enter draws it.")
                negative_prompt = gr.Textbox(label="Negative prompt", lines=1)
                with gr.Row():
                    draw_button = gr.Button("Draw", variant="primary", min_width=120)
                    stop_button = gr.Button("Stop", interactive=False, min_width=120)
                gr.Examples([[text] for text in prompts], [prompt], label="For example")
            with gr.Column(elem_id="result"):
                news = gr.HTML(said("Nothing is drawn yet."))
                shown = gr.HTML(demo_page.EMPTY_STAGE)
                told = gr.Code(
                    elem_id="command", label="The same as a command", language="shell", lines=2,
                    wrap_lines=True, show_line_numbers=False, interactive=False, visible=False,
                    buttons=["copy"],
                )  # fmt: skip
                start_files = gr.Files(
                    label="Files that the command begins from",
                    interactive=False,
                    visible=False,
                    elem_id="start_files",
                )
                gallery = gr.Gallery(
                    elem_id="gallery", label="Drawn so far", show_label=False, columns=4,
                    object_fit="contain", fit_columns=False, interactive=False, visible=False,
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
            with gr.Column(elem_id="settings"):
                fields = make_fields(gr, studio.pipeline)
        fields |= {"prompt": prompt, "negative_prompt": negative_prompt}
        # Of each picture of the session: file, caption, command, files that it begins from.
        album = gr.State([], delete_callback=remove_files)

        async def draw(values, request: gr.Request):
            form = {name: values[field] for name, field in fields.items()}
            try:
                drawing = await asyncio.to_thread(studio.begin, form)
            except InputError as error:
                yield {news: refused(str(error))}
                return
            drawings[request.session_hash] = drawing
            yield {draw_button: gr.update(interactive=False), fields["seed"]: drawing.order.seed}
            try:
                frame = None
                while not drawing.future.done():
                    changed = {
                        news: progress(drawing, studio.num_before(drawing)),
                        stop_button: gr.update(interactive=drawing.can_stop),
                    }
                    if drawing.frame is not frame:
                        frame = drawing.frame
                        changed[shown] = stage(frame.images, drawing.order.prompt)
                    yield changed
                    await asyncio.sleep(0.15)
                yield finish(drawing, values[album], request.session_hash in enlarged) | {
                    draw_button: gr.update(interactive=True),
                    stop_button: gr.update(interactive=False),
                }
            finally:  # also when the visitor has gone
                drawing.stop()

        def finish(drawing, entries, is_enlarged):
            try:
                drawn = drawing.future.result()
            except (Stopped, CancelledError):
                return {news: said("Stopped.")}
            except InputError as error:
                return {news: refused(str(error))}
            except Exception as error:
                logging.exception("A drawing failed.")
                words = str(error).partition("\n")[0] or type(error).__name__
                return {news: refused(f"This could not be drawn: {words}")}
            words = demo_page.command(drawing.order, studio.pipeline, studio.given)
            entries = [
                (file, caption, words, drawn.start)
                for file, caption in zip(drawn.files, drawn.captions, strict=True)
            ] + entries
            compiled = ", compiled first" if drawing.is_first else ""
            done = f"Drawn in {drawn.seconds:.1f} s{compiled}. The seed: {drawing.order.seed}."
            first = {"selected_index": 0} if is_enlarged else {}
            return {
                news: said(done),
                shown: drawn.stage,
                gallery: gr.update(value=[entry[:2] for entry in entries], visible=True, **first),
                album: entries,
                **tell(words, drawn.start),
            }

        def tell(words, start):
            return {
                told: gr.update(value=words, visible=True),
                start_files: gr.update(value=start, visible=bool(start)),
            }

        def stop(request: gr.Request):
            if drawing := drawings.get(request.session_hash):
                drawing.stop()

        def leave(request: gr.Request):
            enlarged.discard(request.session_hash)
            if drawing := drawings.pop(request.session_hash, None):
                drawing.stop()

        def enlarge(request: gr.Request):
            enlarged.add(request.session_hash)

        def reduce(request: gr.Request):
            enlarged.discard(request.session_hash)

        def select(entries, event: gr.SelectData):
            return tell(*entries[event.index][2:])

        def take_size(name):
            bucket = Bucket.parse(name)
            return bucket.width, bucket.height

        def name_size(width, height):
            name = f"{width}x{height}"
            return name if name in map(str, sizes(studio.pipeline)) else None

        size, sides = fields["size"], [fields["width"], fields["height"]]
        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        at_once = {"queue": False, **quiet}
        changing = [
            news, shown, gallery, told, start_files, album, fields["seed"], draw_button, stop_button
        ]  # fmt: skip
        gr.on(
            [draw_button.click, prompt.submit], draw, {*fields.values(), album}, changing,
            trigger_mode="once", concurrency_limit=None, **quiet,
        )  # fmt: skip
        stop_button.click(stop, **at_once)
        gallery.select(select, album, [told, start_files], **at_once)
        gallery.preview_open(enlarge, **at_once)
        gallery.preview_close(reduce, **at_once)
        size.input(take_size, size, sides, **at_once)
        gr.on([side.change for side in sides], name_size, sides, size, **at_once)
        page.unload(leave)
    return page


def remove_files(entries: Sequence[tuple]) -> None:
    """Called when a visitor has gone, and has drawn nothing for an hour."""
    for file, *_ in entries:
        shutil.rmtree(pathlib.Path(file).parent, ignore_errors=True)


def import_gradio(folder: str, host: str) -> Any:
    """Gradio, which is to call nobody, and to leave files in this folder alone."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = folder
    for name in ("no_proxy", "NO_PROXY"):  # it asks its own page whether it is there
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), host, "localhost")))
    try:
        import gradio
    except ImportError as error:
        raise InputError(
            f"The page is made with gradio, which cannot be imported ({error}). Install it with "
            f"pip install -e '.[web]'."
        ) from None
    return gradio


def limit_uploads() -> None:
    """Lets Pillow, in this process, open few formats and no giant pictures."""
    Image.init()
    Image.ID[:] = UPLOAD_FORMATS
    Image.MAX_IMAGE_PIXELS = MAX_UPLOAD_PIXELS // 2  # it refuses what has more than twice as many


def known_names(host: str, names: Sequence[str]) -> set[str]:
    """The names under which browsers may ask for the page; "*" is any.

    Without this, a page elsewhere on the web could give its own name the address of this machine,
    and would then be taken by the browser for a part of the page.
    """
    is_local = host == "localhost" or host.startswith("127.") or host == "::1"
    return {*names, host, "localhost", "127.0.0.1", "::1"} if is_local or names else {"*"}


class Health:
    """Answers /healthz, whatever name is asked for: a probe knows the address alone.

    An ASGI middleware. The page listens once the model is read, so an answer says that too, and
    nothing else.
    """

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != "/healthz":
            await self._app(scope, receive, send)
            return
        plain = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": plain})
        await send({"type": "http.response.body", "body": b"ok\n"})


class OwnPageOnly:
    """Refuses requests for another name, and those that a page of another name sends.

    An ASGI middleware. What no browser sends has no Origin, and is not asked for one.
    """

    def __init__(self, app: Any, names: set[str]):
        self._app, self._names = app, names

    async def __call__(self, scope, receive, send):
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope.get("headers", ())}
        if scope["type"] == "http" and not self._is_own(headers):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"This page has another name."})
            return
        await self._app(scope, receive, send)

    def _is_own(self, headers: Mapping[str, str]) -> bool:
        name = _name_of(f"//{headers.get('host', '')}")
        if "*" not in self._names and name not in self._names:
            return False
        return "origin" not in headers or _name_of(headers["origin"]) == name


def _name_of(url: str) -> str | None:
    """Of a host, without its port; None where there is none, as of the origin "null"."""
    try:
        return urllib.parse.urlsplit(url).hostname
    except ValueError:
        return None


def check_free(host: str, port: int) -> None:
    """Refuses an address that cannot be had, before a model is read."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise InputError(
            f"--host={host} --port={port} cannot be had: {error.strerror}. Name another --port, or "
            f"end the program that has it; --host must be an address of this machine."
        ) from None


def main() -> None:
    args = flags.FLAGS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Whatever visitors leave is in here.
    with tempfile.TemporaryDirectory(prefix="lumina_jax_demo_") as folder:
        gr = import_gradio(folder, args.host)
        from starlette.middleware import Middleware  # of gradio

        limit_uploads()
        check_free(args.host, args.port)
        executables.use_cache(args.cache_directory, default=sample.cache_directory())
        pipeline, weights = sample.open_pipeline(args)
        given = {"checkpoint": args.checkpoint}
        if "step" in weights:  # of a run that goes on, the newest will be another one
            given["step"] = weights["step"]
        for name in SHARED_FLAGS:
            if args[name].value != args[name].default:
                given[name] = args[name].value
        studio = Studio(pipeline, weights, given, pathlib.Path(folder))
        prompts = example_prompts(args.checkpoint, args.step)
        page = make_page(gr, studio, subtitle(weights), prompts)
        # A drawing that is stopped ends with an error on purpose.
        python_logging.getLogger("jax._src.debugging").addFilter(
            lambda record: not (record.exc_info and isinstance(record.exc_info[1], Stopped))
        )
        fonts = ["ui-sans-serif", "system-ui", "sans-serif"]
        theme = gr.themes.Base(
            primary_hue="teal", neutral_hue="slate", radius_size="lg", font=fonts,
            font_mono=["ui-monospace", "monospace"],
        )  # fmt: skip
        _, address, _ = page.launch(
            server_name=args.host, server_port=args.port, share=False, quiet=True,
            prevent_thread_lock=True, ssr_mode=False, enable_monitoring=False, run_history=False,
            footer_links=[], max_file_size=MAX_UPLOAD, theme=theme, css=CSS,
            app_kwargs={
                "middleware": [
                    Middleware(Health),
                    Middleware(OwnPageOnly, known_names(args.host, args.names)),
                ]
            },
        )  # fmt: skip
        print(f"The page is at {address}", flush=True)
        try:
            threading.Event().wait()
        finally:
            studio.close()
            page.close(verbose=False)


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=("checkpoint",))
