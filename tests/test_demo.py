"""The page to draw with: its orders without a browser, and all of it in a real one."""

import asyncio
import contextlib
import io
import os
import pathlib
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import CancelledError

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lumina_jax import demo_page
from lumina_jax.demo_page import Drawing, Stopped, Studio, command, progress, read
from lumina_jax.errors import InputError
from lumina_jax.sampling import pictures
from tests.sampling.small_pipeline import make_pipeline, save_run
from tools import demo

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


def form(pipeline, **changes):
    """A page on which nothing was touched but these fields."""
    return {
        "prompt": "", "negative_prompt": "", "system_prompt": pipeline.system_prompt,
        "num_pictures": 1, "width": pipeline.size[1], "height": pipeline.size[0], "seed": 7,
        "random": False, "preview": True, "start": None, "strength": 0.6, **changes,
    }  # fmt: skip


# Orders and their commands.


def test_a_command_names_only_what_differs_from_the_checkpoint(pipeline):
    order = read(form(pipeline, prompt="a cat", num_steps=5, guidance_scale=3), pipeline)
    words = shlex.split(command(order, pipeline, {"checkpoint": "runs/a b", "step": 3}))
    *words, output = words
    assert words == [
        "python", "-m", "lumina_jax.sample", "--checkpoint=runs/a b", "--step=3",
        "--prompt=a cat", "--seed=7",
    ]  # fmt: skip
    assert output.startswith("--output=out/")


def test_a_command_survives_the_shell_and_repeats_the_prompt_for_each_picture(pipeline):
    prompt = 'it\'s "red" $HOME `date`\n\\ 苹果 --seed=9'
    changes = dict(
        prompt=prompt, negative_prompt="-x", num_pictures=3, width=8, system_prompt="real",
        solver="heun", num_steps=9, guidance_scale=1.5, cache_interval=2,
    )  # fmt: skip
    text = command(read(form(pipeline, **changes), pipeline), pipeline, {"checkpoint": "x"})
    assert shlex.split(text)[4:-1] == [
        *[f"--prompt={prompt}"] * 3, "--seed=7", "--negative_prompt=-x", "--system_prompt=real",
        "--width=8", "--num_steps=9", "--guidance_scale=1.5", "--solver=heun",
        "--cache_interval=2",
    ]  # fmt: skip


def test_commands_of_different_orders_write_into_different_folders(pipeline):
    outputs = set()
    for changes in ({}, {"seed": 8}, {"num_steps": 6}, {"prompt": "x"}, {"num_pictures": 2}):
        order = read(form(pipeline, **changes), pipeline)
        outputs.add(command(order, pipeline, {"checkpoint": "x"}).split()[-1])
    assert len(outputs) == 5


def test_a_random_seed_is_another_each_time(pipeline):
    seeds = {read(form(pipeline, random=True), pipeline).seed for _ in range(20)}
    assert len(seeds) > 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 18}, "width=18 is not a multiple of 4 pixels"),
        ({"height": None}, "The field height is empty: give a number"),
        ({"seed": -1}, r"The seed -1 of 1 picture\(s\) is not between 0 and 4294967295"),
        ({"seed": 2**32 - 1, "num_pictures": 2}, "is not between 0 and 4294967294"),
        ({"num_steps": 1}, "num_steps=1 leaves no interval"),
        ({"cache_threshold": 0.1, "cache_interval": 2}, "two ways to choose"),
        ({"merge_ratio": 0.9}, "merge_ratio=0.9 is not between 0 and 0.75"),
        # What the page's own fields cannot say.
        ({"prompt": "x" * 10_001}, "The prompt has more than 10,000 letters"),
        ({"negative_prompt": "x" * 10_001}, "The negative prompt has more than 10,000 letters"),
        ({"num_pictures": 9}, "The number of pictures is 9; the page draws 1 to 8"),
        ({"num_pictures": 0}, "The number of pictures is 0"),
        ({"height": 10**6}, "The height is 1000000; the page draws 1 to 8,192"),
        ({"num_steps": 10**6}, "The number of steps is 1000000"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(pipeline, changes, message):
    with pytest.raises(InputError, match=message):
        read(form(pipeline, **changes), pipeline)


# Pictures to begin from.


def editor(picture, *layers):
    return {"background": picture, "layers": list(layers), "composite": None}


def layer(size, box=None):
    """A transparent one, painted where the box is."""
    painted = Image.new("RGBA", size)
    if box:
        ImageDraw.Draw(painted).rectangle(box, fill="#ff3366b0")
    return painted


def test_the_centre_of_a_picture_is_cut_to_the_size_and_the_mask_with_it():
    picture = Image.new("RGB", (400, 200), "red")
    ImageDraw.Draw(picture).rectangle((100, 0, 299, 199), fill="lime")  # the middle square
    ImageDraw.Draw(picture).rectangle((200, 0, 299, 199), fill="blue")  # its right half
    painted = layer((400, 200), (200, 0, 399, 199))
    image, mask = demo_page.read_start(editor(picture, layer((400, 200)), painted), 20, 20)
    assert image.size == mask.size == (20, 20)
    found, changing = np.asarray(image), np.asarray(mask)
    assert found[:, 2].tolist() == [[0, 255, 0]] * 20
    assert found[:, -2].tolist() == [[0, 0, 255]] * 20
    assert not found[:, 1:-1, 0].any()  # the filter of the resizing sees a little beyond the cut
    assert (changing == np.where(np.arange(20) < 10, 0, 255)).all()


def test_nothing_painted_is_no_mask_and_nothing_loaded_no_picture():
    picture = Image.new("RGBA", (30, 40))
    image, mask = demo_page.read_start(editor(picture, layer((30, 40))), 16, 16)
    assert mask is None
    assert (np.asarray(image) == 255).all()  # what is transparent lies on white
    assert demo_page.read_start(None, 16, 16) == (None, None)
    assert demo_page.read_start(editor(None, layer((30, 40))), 16, 16) == (None, None)
    with pytest.raises(InputError, match="there is no picture under it"):
        demo_page.read_start(editor(None, layer((30, 40), (1, 1, 9, 9))), 16, 16)


def test_the_strength_counts_only_with_a_picture(pipeline):
    assert read(form(pipeline, strength=0.3), pipeline).strength is None
    start = editor(Image.new("RGB", (9, 9)), layer((9, 9), (0, 0, 4, 4)))
    order = read(form(pipeline, strength=0.3, start=start), pipeline)
    words = command(order, pipeline, {"checkpoint": "x"}).split()
    assert words[5:-1] == ["--seed=7", "--image=image.png", "--strength=0.3", "--mask=mask.png"]


# The line.


# Orders of this kind share two programs, with previews and without.
CATS = {"prompt": "cat", "num_pictures": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def studio(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return Studio(pipeline, {"name": "letters"}, {"checkpoint": "x"}, folder)


def test_files_hold_what_the_pipeline_draws_with_and_without_a_preview(studio, pipeline):
    expected = pipeline(["cat"] * 2, seed=7, guidance_scale=1.0, output="uint8")
    for preview in (True, False):
        asked = form(pipeline, preview=preview, **CATS)
        drawing = studio.begin(asked)
        drawn = drawing.future.result()
        assert drawing.is_first
        assert (drawing.frame is not None) == preview
        for row, file in enumerate(drawn.files):
            np.testing.assert_array_equal(pictures.read_pixels(file), expected[row])
            metadata = pictures.read_metadata(file)
            assert (metadata["seed"], metadata["batch"]) == (7 + row, [2, row])
            assert metadata["sampling"]["guidance_scale"] == 1.0
        assert [pathlib.Path(file).name for file in drawn.files] == ["0007_cat.png", "0008_cat.png"]
        assert drawn.captions == ["cat · 7", "cat · 8"]
        assert drawn.stage.count("<img ") == 2
        for is_timed in (False, True):  # the time of the first would be that of the compiler
            again = studio.begin(asked)
            again.future.result()
            assert not again.is_first
            assert (again.usual_seconds is not None) == is_timed


def test_one_draws_and_the_others_know_how_many_come_before(studio, pipeline, monkeypatch):
    begun, go_on, watch = threading.Event(), threading.Event(), Drawing.watch

    def slow(drawing, done, total, shown):
        begun.set()
        go_on.wait(60)
        watch(drawing, done, total, shown)

    monkeypatch.setattr(Drawing, "watch", slow)
    first, second, third = (studio.begin(form(pipeline, seed=s, **CATS)) for s in (10, 20, 30))
    assert [studio.num_before(drawing) for drawing in (first, second, third)] == [0, 1, 2]
    assert "2 drawings come before yours." in progress(third, 2)
    second.stop()  # it waits, so it never begins
    assert studio.num_before(third) == 1
    assert "One drawing comes before yours." in progress(third, 1)
    assert begun.wait(60)
    first.stop()  # it is being drawn, so it ends at its next evaluation
    go_on.set()
    with pytest.raises(Stopped):
        first.future.result(60)
    with pytest.raises(CancelledError):
        second.future.result(60)
    assert second.began is None
    names = [pathlib.Path(file).name for file in third.future.result(60).files]
    assert names == ["0030_cat.png", "0031_cat.png"]


def test_a_studio_that_closes_draws_no_more(pipeline, tmp_path):
    studio = Studio(pipeline, {"name": "letters"}, {"checkpoint": "x"}, tmp_path)
    drawings = [studio.begin(form(pipeline, **CATS)) for _ in range(3)]
    studio.close()
    assert all(drawing.future.done() for drawing in drawings)
    assert drawings[-1].future.cancelled()
    with pytest.raises(RuntimeError, match="after shutdown"):
        studio.begin(form(pipeline, **CATS))


def test_a_long_line_sends_visitors_away(studio, pipeline, monkeypatch):
    monkeypatch.setattr(demo_page, "MAX_WAITING", 1)
    drawings = [studio.begin(form(pipeline, **CATS)) for _ in range(2)]
    with pytest.raises(InputError, match="1 drawings are waiting already"):
        studio.begin(form(pipeline, **CATS))
    for drawing in drawings:
        drawing.future.result(60)


def test_the_page_says_how_far_a_drawing_is(pipeline):
    drawing = Drawing(read(form(pipeline), pipeline))
    assert "Yours is the next." in progress(drawing, 0)
    drawing.began = time.monotonic()
    assert "The first drawing of this kind: compiling" in progress(drawing, 0)
    drawing.is_first = False
    assert "Drawing, 1 s so far." in progress(drawing, 0)
    drawing.usual_seconds = 90.0
    assert "the last one took 1 min 30 s." in progress(drawing, 0)
    drawing.watch(1, 5, np.zeros((1, 4, 4, 3), np.uint8))
    assert "1 of 5 evaluations." in progress(drawing, 0)
    time.sleep(0.01)
    drawing.watch(2, 5, np.zeros((1, 4, 4, 3), np.uint8))
    assert "2 of 5 evaluations, about 1 s left." in progress(drawing, 0)
    assert '<div style="width: 40.0%">' in progress(drawing, 0)
    assert drawing.can_stop
    drawing.stop()
    assert not drawing.can_stop
    assert "Stopping" in progress(drawing, 0)


def test_words_of_visitors_are_words_and_no_page():
    picture = Image.new("RGB", (4, 4))
    for text in (
        demo_page.said("<b>"), demo_page.refused("<b>"), demo_page.stage([picture], '"><b>'),
    ):  # fmt: skip
        assert "<b>" not in text
        assert "&lt;b&gt;" in text


def test_the_sizes_offered_can_be_drawn(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "size", (48, 32))
    sizes = demo_page.sizes(pipeline)
    assert (sizes[0].height, sizes[0].width) == (48, 32)
    assert len(sizes) == len(set(sizes)) > 2
    for bucket in sizes:
        pipeline.check_size(bucket.height, bucket.width)


# The command that serves the page.


def test_a_taken_port_and_a_foreign_host_are_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port={port} cannot be had: Address already in"):
            demo.check_free("127.0.0.1", port)
    demo.check_free("127.0.0.1", port)
    with pytest.raises(InputError, match=r"--host=192\.0\.2\.1 --port=\d+ cannot be had"):
        demo.check_free("192.0.2.1", port)


def asked(names, kind="http", **headers):
    """What a server of these names answers to a request."""
    answers = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        answers.append(message)

    scope = {"type": kind, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    asyncio.run(demo.OwnPageOnly(app, names)(scope, None, send))
    return answers[0]["status"]


def test_a_page_of_another_name_is_refused():
    here = demo.known_names("127.0.0.1", [])
    assert asked(here, host="127.0.0.1:7860") == 200
    assert asked(here, host="localhost:7860", origin="http://localhost:7860") == 200
    assert asked(here, host="[::1]:7860") == 200
    # Its own name, at the address of this machine; and a page that sends a form of its own.
    assert asked(here, host="evil.example:7860") == 403
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example", "http://[::"):
        assert asked(here, host="127.0.0.1:7860", origin=origin) == 403
    assert asked(here) == 403


def test_a_proxy_gives_the_page_another_name():
    proxied = demo.known_names("127.0.0.1", ["lumina.example"])
    assert asked(proxied, host="lumina.example", origin="https://lumina.example") == 200
    assert asked(proxied, host="other.example") == 403
    everybody = demo.known_names("0.0.0.0", [])
    assert asked(everybody, host="any.example") == 200
    assert asked(everybody, host="any.example", origin="https://evil.example") == 403
    assert asked(demo.known_names("0.0.0.0", ["a"]), host="any.example") == 403


def test_uploads_are_pictures_of_few_formats_and_of_bounded_size():
    script = """
import io, struct, zlib
from PIL import Image
from tools import demo
kinds = {kind: io.BytesIO() for kind in ("PNG", "BMP", "EPS", "TIFF")}
for kind, file in kinds.items():
    Image.new("RGB", (4, 4)).save(file, kind)
demo.limit_uploads()
for kind, file in kinds.items():
    try:
        Image.open(io.BytesIO(file.getvalue()))
        print("opened", kind)
    except Image.UnidentifiedImageError:
        pass
file = io.BytesIO()
Image.new("1", (9000, 9000)).save(file, "PNG")
try:
    Image.open(io.BytesIO(file.getvalue()))
except Image.DecompressionBombError:
    print("too large")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:-1] == ["opened PNG", "too large"]


@pytest.fixture
def environment():
    """What a test puts into it is taken out again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        yield


def test_without_gradio_the_extra_is_named(environment, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[web\]'"):
        demo.import_gradio(str(tmp_path), "127.0.0.1")


# The page in a browser: Chromium, as Qt brings it from the package index.


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url, process):
    for _ in range(1800):
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read()
        assert process.poll() is None, f"{url} ended with status {process.returncode}"
        time.sleep(0.1)
    raise TimeoutError(url)


@contextlib.contextmanager
def running(command, url, **environment):
    """A server that answers at `url`."""
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment})
    try:
        wait_for(url, process)
        yield
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A page that draws with random weights."""
    pytest.importorskip("gradio")
    workdir = tmp_path_factory.mktemp("run")
    save_run(
        workdir, side=32, num_steps=30, max_tokens=32, dim=64, num_kv_heads=2, hidden_dim=128,
        axes_dims=(8, 4, 4),
    )  # fmt: skip
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "tools/demo.py", f"--checkpoint={workdir}", f"--port={port}"]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": os.environ["LUMINA_JAX_TEST_CACHE"],
        "GRADIO_IS_E2E_TEST": "1",  # forgets visitors who have gone after a second, not an hour
    }
    with running(command, url, **environment):
        yield url


def test_the_page_lets_in_this_machine_alone(url):
    port = int(url.rstrip("/").rpartition(":")[2])
    listening = []
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                listening.append(address)
    assert listening == ["0100007F"]  # 127.0.0.1


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("", {"Host": "evil.example"}),
        ("", {"Origin": "https://evil.example"}),
        ("gradio_api/file=/etc/passwd", {}),
        ("gradio_api/file=../../../../../../etc/passwd", {}),
        (f"gradio_api/file={ROOT}/pyproject.toml", {}),
    ],
)
def test_the_page_gives_strangers_and_strange_files_nothing(url, path, headers):
    asked = urllib.request.Request(url + path, headers=headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked, timeout=60)
    assert refused.value.code in (403, 404)


def test_a_probe_is_answered_by_whatever_name_it_asks_and_learns_nothing_else(url):
    for headers in ({}, {"Host": "10.4.0.7:7860"}, {"Host": ""}):
        asked = urllib.request.Request(f"{url}healthz", headers=headers)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert (answer.status, answer.read()) == (200, b"ok\n")
    stranger = {"Host": "10.4.0.7:7860"}
    for path in ("healthz/", "healthz/..", "gradio_api/info?/healthz"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url + path, headers=stranger), timeout=60)
        with refused.value:
            assert refused.value.code == 403


BROWSER = """
import sys
from PySide6.QtCore import QUrl
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication
app = QApplication([])
view = QWebEngineView()
view.load(QUrl("about:blank"))
view.show()
app.exec()
"""


@pytest.fixture(scope="module")
def browser_page():
    playwright = pytest.importorskip("playwright.sync_api")
    pytest.importorskip("PySide6")
    imported = subprocess.run(
        [sys.executable, "-c", "import PySide6.QtWebEngineWidgets"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if imported.returncode:
        pytest.skip(f"Qt lacks a library of the system: {imported.stderr.splitlines()[-1]}")
    port = free_port()
    environment = {
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_DISABLE_SANDBOX": "1",
        "QTWEBENGINE_REMOTE_DEBUGGING": f"127.0.0.1:{port}",
        # The editor of pictures paints with WebGL.
        "QTWEBENGINE_CHROMIUM_FLAGS": "--remote-allow-origins=* --use-gl=angle "
        "--use-angle=swiftshader --enable-unsafe-swiftshader --ignore-gpu-blocklist",
    }
    address = f"http://127.0.0.1:{port}"
    with (
        running([sys.executable, "-c", BROWSER], f"{address}/json/version", **environment),
        playwright.sync_playwright() as driver,
    ):
        browser = driver.chromium.connect_over_cdp(address, no_defaults=True)
        yield browser.contexts[0].pages[0]
        browser.close()


@pytest.fixture
def page(browser_page, url):
    """The page, freshly loaded; in the end nothing has gone wrong, and nobody else was asked."""
    page, faults = browser_page, []

    def on_request(request):
        if not request.url.startswith((url, "data:", "blob:", "about:")):
            faults.append(f"asked for {request.url}")

    def on_console(message):
        if message.type == "error":
            faults.append(message.text)

    listeners = {
        "request": on_request,
        "console": on_console,
        "pageerror": lambda error: faults.append(str(error)),
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    page.set_default_timeout(120_000)
    page.set_viewport_size({"width": 1200, "height": 900})
    page.goto(url)
    page.get_by_label("Prompt", exact=True).wait_for()
    yield page
    page.goto("about:blank")
    for event, listener in listeners.items():
        page.remove_listener(event, listener)
    assert faults == []


def give(page, **numbers):
    for label, value in numbers.items():
        field = page.get_by_label(f"number input for {label}")
        field.fill(str(value))
        field.press("Enter")


def take_your_time(page, num_pictures):
    """Asks for a drawing of some seconds."""
    give(page, Steps=100, Pictures=num_pictures, Width=64, Height=64)
    page.get_by_role("button", name="How it is drawn").click()
    page.get_by_label("Solver").click()
    page.get_by_role("option", name="rk4").click()


def draw(page, until="Drawn in"):
    """Presses the button and waits for these words of news."""
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator(".news", has_text=until).wait_for()


def fetch(url):
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def gallery(page):
    """Contents of the files that it shows."""
    sources = page.locator("#gallery img").evaluate_all("images => images.map(x => x.src)")
    return [fetch(source) for source in sources]


def run_command(text, folder):
    """The pictures of a command that the page tells."""
    python, *words = shlex.split(text)
    assert python == "python"
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": os.environ["LUMINA_JAX_TEST_CACHE"]},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return sorted(folder.glob("out/*/0*.png"))


# Every picture of the stage that a visitor sees.
RECORD = """
window.seen = [];
new MutationObserver(() => {
    for (const image of document.querySelectorAll(".stage img:first-child"))
        if (window.seen.at(-1) !== image.src) window.seen.push(image.src);
}).observe(document.body, {subtree: true, childList: true, attributes: true});
"""


def told(page, part="--output="):
    """The command that the page tells, as soon as this part is in it."""
    page.locator("#command .cm-content", has_text=part).wait_for()
    lines = page.locator("#command .cm-line").evaluate_all("x => x.map(y => y.textContent)")
    return "\n".join(lines)


@pytest.mark.slow
def test_a_visitor_sees_a_picture_grow_and_the_command_draws_the_same(page, tmp_path):
    page.evaluate(RECORD)
    prompt = """it's a "dog" & 苹果"""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Negative prompt").fill("<i>cat</i>")
    page.get_by_label("Random").uncheck()
    page.get_by_label("Seed", exact=True).fill("11")
    take_your_time(page, 2)
    draw(page)
    assert len(page.evaluate("window.seen")) >= 3  # two previews, and the end
    first = told(page)
    words = shlex.split(first)
    assert words.count(f"--prompt={prompt}") == 2
    assert {"--seed=11", "--num_steps=100", "--width=64", "--solver=rk4"} <= set(words)
    found = gallery(page)
    files = run_command(first, tmp_path)
    for number, (content, file) in enumerate(zip(found, files, strict=True)):
        (tmp_path / "page.png").write_bytes(content)
        np.testing.assert_array_equal(
            pictures.read_pixels(tmp_path / "page.png"), pictures.read_pixels(file)
        )
        there, now = (pictures.read_metadata(path) for path in (tmp_path / "page.png", file))
        assert pictures.differences(there, now) == ""
        assert there["seed"] == 11 + number

    # The next drawing comes first in the gallery, and the command of the first one is not lost.
    page.get_by_label("Live preview").uncheck()
    page.get_by_label("Seed", exact=True).fill("50")
    give(page, Steps=5, Pictures=1)
    draw(page, "The seed: 50.")
    assert gallery(page)[1:] == found
    assert told(page, "--seed=50") != first
    page.locator("#gallery img").last.click()
    assert told(page, "--seed=11") == first


@pytest.mark.slow
def test_markup_in_a_prompt_is_letters_everywhere_on_the_page(page):
    """In the picture's text, the news, the gallery's captions and the command."""
    prompt = '"><img src=x onerror="window.executed=1"><script>window.executed=1</script>'
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Negative prompt").fill("${window.executed=1} </textarea>" + prompt)
    page.get_by_role("button", name="Draw", exact=True).click()
    page.get_by_text("Drawn in").wait_for()
    assert page.locator("#result .stage img").last.get_attribute("alt") == prompt
    page.locator("#gallery img").first.click()
    assert page.get_by_text("<script>").count()
    assert page.evaluate("window.executed") is None
    assert page.locator("img[src=x]").count() == 0


def test_an_untouched_page_asks_for_the_settings_of_the_checkpoint(page, url):
    page.get_by_role("button", name="Begin from a picture").click()
    page.get_by_label("Prompt", exact=True).fill("cat")
    draw(page)
    seed = page.get_by_label("Seed", exact=True).input_value()
    _, _, _, run, step, *words, _ = shlex.split(told(page))
    assert run.startswith("--checkpoint=/")
    assert step == "--step=0"
    assert words == ["--prompt=cat", f"--seed={seed}"]
    # Nothing of the machine but the pictures can be fetched, and they not for ever.
    with pytest.raises(urllib.error.HTTPError, match="403"):
        fetch(f"{url}gradio_api/file={ROOT / 'README.md'}")
    source = page.locator("#gallery img").first.get_attribute("src")
    assert fetch(source).startswith(b"\x89PNG")
    page.goto("about:blank")
    for _ in range(600):
        try:
            fetch(source)
        except urllib.error.HTTPError:
            break
        time.sleep(0.1)
    with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
        fetch(source)


@pytest.mark.slow
def test_what_cannot_be_drawn_is_told_on_a_phone_too(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("button", name="Faster").click()
    page.get_by_label("Cache threshold").fill("0.1")
    page.get_by_label("Cache interval").fill("2")
    draw(page, "are two ways to choose what is reused; give one")
    assert page.get_by_role("alert").is_visible()
    page.get_by_label("Cache interval").fill("1")
    draw(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    prompt, stage, steps = (
        page.locator(place).first.bounding_box()["y"] for place in ("#ask", ".stage", "#settings")
    )
    assert prompt < stage < steps


@pytest.mark.slow
def test_a_second_visitor_waits_and_both_can_stop(page, url):
    page.set_content(f"<iframe src={url}></iframe><iframe id=second src={url}></iframe>")
    first, second = (page.frame_locator(f"iframe >> nth={number}") for number in range(2))
    for visitor in (first, second):
        visitor.get_by_label("Prompt", exact=True).fill("cat")
        take_your_time(visitor, 8)
    draw(first, "evaluations")
    draw(second, "One drawing comes before yours.")
    second.get_by_role("button", name="Stop", exact=True).click()
    second.locator(".news", has_text="Stopped.").wait_for()
    draw(second, "One drawing comes before yours.")
    first.get_by_role("button", name="Stop", exact=True).click()
    first.locator(".news", has_text="Stopped.").wait_for()
    second.locator(".news", has_text="evaluations").wait_for()
    # A visitor who leaves does not keep the others waiting.
    draw(first, "One drawing comes before yours.")
    page.evaluate("document.getElementById('second').remove()")
    first.locator(".news", has_text="evaluations").wait_for()
    draw_button = first.get_by_role("button", name="Draw", exact=True)
    assert draw_button.is_disabled()
    first.get_by_role("button", name="Stop", exact=True).click()
    first.locator(".news", has_text="Stopped.").wait_for()
    draw_button.click(trial=True)


@pytest.mark.slow
def test_what_is_painted_may_change_and_the_command_takes_the_same_mask(page, tmp_path):
    picture = Image.new("RGB", (300, 200), "#88aaff")
    picture.save(tmp_path / "wide.png")
    page.get_by_role("button", name="Begin from a picture").click()
    with page.expect_file_chooser() as chooser:
        page.get_by_text("Upload an image").click()
    chooser.value.set_files(tmp_path / "wide.png")
    page.get_by_label("Brush").first.click()
    canvas = page.locator("#start canvas").first
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)  # the picture glides to its place
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 10, y)
    page.mouse.down()
    page.mouse.move(x + 10, y, steps=5)
    page.mouse.up()
    draw(page)
    (content,) = gallery(page)
    links = page.locator("#start_files a").evaluate_all("links => links.map(x => x.href)")
    for link in set(links):
        (tmp_path / link.rpartition("/")[2]).write_bytes(fetch(link))
    (drawn,) = run_command(told(page), tmp_path)
    found = pictures.read_pixels(drawn)
    with Image.open(io.BytesIO(content)) as shown:
        np.testing.assert_array_equal(np.asarray(shown), found)
    mask = np.asarray(Image.open(tmp_path / "mask.png").convert("L"))
    assert mask[16, 16] == 255
    assert 0 < (mask > 0).mean() < 0.5
    assert (found[mask == 0] == (0x88, 0xAA, 0xFF)).all()
    assert (found[mask > 0] != (0x88, 0xAA, 0xFF)).any()
