"""The command that draws many pictures: what it reads, and that nothing is drawn twice."""

import hashlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from lumina_jax.errors import InputError
from lumina_jax.sample import check_sizes, read_numbers, read_start, read_system_prompt
from lumina_jax.sampling import drawing, pictures
from lumina_jax.sampling.drawing import draw_into
from lumina_jax.sampling.requests import Request, make_requests, plan, read_prompts
from lumina_jax.system_prompts import SYSTEM_PROMPTS, dual_panel
from tests.sampling.small_pipeline import make_pipeline, save_run

ROOT = pathlib.Path(__file__).parents[1]
LINES = [
    {"prompt": "cat"},
    {"prompt": "dog", "height": 8, "width": 24},
    {"prompt": "cow", "seed": 40},
    {"prompt": "hen"},
    {"prompt": "owl"},
    {"prompt": "ape"},
]


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


def draw_lines(
    folder, pipeline, *, num=None, batch_size=2, called=None, num_steps=5, system_prompt="",
    overwrite=False, cut=False,
):  # fmt: skip
    """LINES, drawn by the real pipeline; `called` takes its place."""
    requests = make_requests(pipeline, LINES[:num], seed=5)
    slots = pipeline.caption_slots(
        [request.prompt for request in requests],
        [request.negative_prompt for request in requests],
        "empty",
        "official",
    )
    return draw_into(
        folder,
        called or pipeline,
        requests,
        plan(requests, slots, batch_size),
        metadata={"system_prompt": system_prompt, "sampling": {"num_steps": num_steps}},
        overwrite=overwrite,
        cut=cut,
        guidance_scale=1.0,  # half the network to compile
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory):
    """All pictures of LINES, by one uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    draw_lines(folder, pipeline)
    return folder


def never(*args, **kwargs):
    raise AssertionError("drawn again")


# What it reads.


def test_prompts_of_flags_come_before_those_of_the_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("苹果\n\n  two words  \n", encoding="utf-8")
    assert [line["prompt"] for line in read_prompts(["a"], str(path))] == ["a", "苹果", "two words"]


def test_a_line_of_json_says_more_than_a_prompt(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "seed": 7}\n\n{"prompt": "b", "height": 8, "width": 4}\n')
    assert read_prompts([], str(path)) == [
        {"prompt": "a", "seed": 7},
        {"prompt": "b", "height": 8, "width": 4},
    ]


def test_all_faults_of_a_file_of_json_are_told_with_their_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a", "hight": 8}\n{"prompt": "a"}\nnonsense\n["a"]\n'
        '{"seed": true}\n{"prompt": "\\ud83d"}\n'
    )
    with pytest.raises(InputError) as error:
        read_prompts([], str(path))
    for fault in (
        "line 1: unknown key 'hight'; did you mean 'height'?",
        "line 3: not JSON",
        'line 4: ["a"] is not an object, such as {"prompt": "a red fox"}',
        "line 5: no 'prompt'",
        "line 5: seed is true; needed is a whole number",
        "line 6: prompt holds half a character",
    ):
        assert fault in str(error.value)


def test_no_prompt_and_no_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="No prompt was given"):
        read_prompts([], None)
    with pytest.raises(InputError, match=r"prompts_file=.* does not exist"):
        read_prompts([], str(tmp_path / "none.txt"))
    with pytest.raises(InputError, match=r"must end in \.txt.* or in \.jsonl"):
        read_prompts([], str(tmp_path / "prompts.json"))
    (tmp_path / "latin.txt").write_bytes("Äpfel".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8"):
        read_prompts([], str(tmp_path / "latin.txt"))


def test_what_a_line_does_not_say_comes_from_the_flags(pipeline):
    first, second = make_requests(
        pipeline, [{"prompt": "a"}, {"prompt": "b", "seed": 3, "width": 8}],
        negative_prompt="no", seed=7, height=24,
    )  # fmt: skip
    assert first == Request(0, "a", "no", 7, 24, 16)
    assert second == Request(1, "b", "no", 3, 24, 8)
    assert make_requests(pipeline, [{"prompt": "a"}] * 2, seed=7)[1].seed == 8


def test_requests_that_cannot_be_drawn_are_all_told(pipeline):
    with pytest.raises(InputError) as error:
        make_requests(pipeline, [{"prompt": "a", "height": 18}, {"prompt": "b", "seed": -1}])
    assert "Prompt 1, 'a': height=18 is not a multiple of 4" in str(error.value)
    assert "Prompt 2, 'b': seed -1 is not between 0 and" in str(error.value)


def test_files_to_begin_from_are_told_by_their_bytes(tmp_path):
    path = tmp_path / "start.png"
    Image.new("RGB", (8, 4), "red").save(path)
    found, digests = read_start({"image": str(path), "mask": None}, {})
    assert found["image"].size == (8, 4)
    assert digests == {"image": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_files_to_begin_from_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"--mask=.*none\.png does not exist"):
        read_start({"mask": str(tmp_path / "none.png")}, {})
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match=r"--image=.*text\.png cannot be read: not a picture"):
        read_start({"image": str(tmp_path / "text.png")}, {})
    with pytest.raises(InputError, match="give the one with sha256 12ab as --image"):
        read_start({"image": None}, {"image": "12ab"})


def test_sizes_that_do_not_fit_are_refused_before_anything_is_drawn():
    requests = [Request(0, "a", "", 0, 4, 8), Request(1, "b", "", 1, 4, 6)]
    start = {"image": Image.new("RGB", (8, 4))}
    check_sizes(requests[:1], start, SYSTEM_PROMPTS["4grid"])
    with pytest.raises(InputError, match=r"4 x 8 pixels .* 'b' is to be drawn with 4 x 6"):
        check_sizes(requests, start, None)
    with pytest.raises(InputError, match="no two equal halves along its height"):
        check_sizes([Request(0, "a", "", 0, 5, 8)], {}, SYSTEM_PROMPTS["4grid"])


def test_flags_make_one_system_prompt():
    assert read_system_prompt(None, None, None) is None
    assert read_system_prompt("empty", None, None) == ""
    assert read_system_prompt(None, "depth map", None) == dual_panel("depth map", "lower half")
    with pytest.raises(InputError, match="--half='left half' is the place of --condition"):
        read_system_prompt(None, None, "left half")
    with pytest.raises(InputError, match="leave out --system_prompt"):
        read_system_prompt("real", "depth map", None)


def test_lists_of_numbers_have_commas():
    assert read_numbers("merge_steps", ["0", "0.5"]) == [0, 0.5]
    with pytest.raises(InputError, match="--merge_steps=0,half must be numbers with commas"):
        read_numbers("merge_steps", ["0", "half"])


# What is drawn together.


def test_a_batch_is_of_one_size_and_of_as_many_caption_slots():
    sizes = [(8, 8), (8, 4), (8, 8), (8, 8), (8, 4), (8, 8)]
    requests = [Request(i, "", "", i, *size) for i, size in enumerate(sizes)]
    slots = [(32, 1), (32, 1), (32, 1), (64, 1), (32, 1), (32, 1)]
    assert plan(requests, slots, 2) == [[0, 2], [5, None], [1, 4], [3]]


def test_a_pipeline_says_which_prompts_share_a_program(pipeline):
    slots = pipeline.caption_slots(["cat", ""], ["", "a"], "empty", "official")
    assert slots == [(6, 1), (1, 6)]  # all that this text encoder has, and the empty prompt's one


def test_only_what_is_missing_is_drawn_and_written():
    calls, written = [], []

    def pipeline(prompts, *, seed, **_):
        calls.append((prompts, seed))
        return [Image.new("RGB", (1, 1), (number, 0, 0)) for number in seed]

    requests = [Request(i, name, "", 10 + i, 1, 1) for i, name in enumerate("abcde")]

    def write(number, image, batch):
        written.append((number, image.getpixel((0, 0))[0], batch))

    batches = [[0, 1], [2, 3], [4, None]]
    drawing.draw(pipeline, requests, batches, [1, 1, 1, 0, 0], write=write)
    assert calls == [(["c", "d"], [12, 13]), (["e", "e"], [14, 14])]
    assert written == [(3, 13, (2, 1)), (4, 14, (2, 0))]


def test_a_picture_hardly_depends_on_what_is_drawn_with_it(pipeline, whole, tmp_path):
    draw_lines(tmp_path, pipeline, batch_size=3)
    for path in tmp_path.glob("0*.png"):
        found, expected = (pictures.read_pixels(file) for file in (path, whole / path.name))
        assert np.abs(found.astype(int) - expected).max() <= 1  # of 255, by rounding


# Stopped and gone on with.


class Stopped(BaseException):
    """As if the process were killed."""


@pytest.mark.parametrize("num_batches", [0, 1, 3])
def test_a_stopped_run_goes_on_to_the_same_bytes(pipeline, whole, tmp_path, num_batches):
    calls = []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) > num_batches:
            raise Stopped
        return pipeline(*args, **kwargs)

    with pytest.raises(Stopped):
        draw_lines(tmp_path, pipeline, called=stops)
    (tmp_path / f".0005_ape.png.{'a' * 32}").write_bytes(b"half")
    before = contents(tmp_path)
    draw_lines(tmp_path, pipeline)
    after = contents(tmp_path)
    assert after == contents(whole)
    assert before.items() - after.items() == {(f".0005_ape.png.{'a' * 32}", b"half")}


def test_a_finished_folder_is_not_drawn_again(pipeline, whole):
    before = contents(whole)
    assert draw_lines(whole, pipeline, called=never) is None
    assert contents(whole) == before


def test_more_prompts_can_be_added_to_a_folder(pipeline, whole, tmp_path):
    draw_lines(tmp_path, pipeline, num=4)
    draw_lines(tmp_path, pipeline)
    assert contents(tmp_path).keys() == contents(whole).keys()


def test_other_settings_are_refused_before_anything_is_drawn(pipeline, whole):
    before = contents(whole)
    with pytest.raises(InputError) as error:
        draw_lines(whole, pipeline, called=never, num_steps=6)
    assert "0000_cat.png: num_steps: 5 there, 6 now" in str(error.value)
    assert "and 1 more" in str(error.value)
    assert "--output, or draw these anew with --overwrite" in str(error.value)
    assert contents(whole) == before


def test_overwriting_replaces_what_differs(pipeline, whole, tmp_path):
    pictures.write_picture(
        tmp_path / "0000_old.png", Image.new("RGB", (4, 4)), {"index": 0, "prompt": "old"}
    )
    draw_lines(tmp_path, pipeline, overwrite=True)
    assert contents(tmp_path) == contents(whole)


def test_panels_are_cut_from_the_pictures_that_are_there(pipeline, tmp_path):
    grid = {"num": 5, "system_prompt": SYSTEM_PROMPTS["4grid"]}
    draw_lines(tmp_path, pipeline, **grid)
    draw_lines(tmp_path, pipeline, called=never, cut=True, **grid)
    panel = tmp_path / "0000_cat.lower_right.png"
    np.testing.assert_array_equal(
        pictures.read_pixels(panel), pictures.read_pixels(tmp_path / "0000_cat.png")[8:, 8:]
    )
    assert pictures.read_metadata(panel)["panel"] == "lower_right"
    assert len(list(tmp_path.glob("0*.*.png"))) == 4 * 5


# The command itself.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint with random weights, and the command that draws with it."""
    workdir = tmp_path_factory.mktemp("run")
    save_run(
        workdir, side=16, num_steps=400, max_tokens=8, dim=32, num_kv_heads=4, hidden_dim=64,
        axes_dims=(4, 2, 2),
    )  # fmt: skip

    def start(*arguments, **environment):
        return subprocess.Popen(
            [sys.executable, "-m", "lumina_jax.sample", f"--checkpoint={workdir}", *arguments],
            cwd=ROOT,
            env={
                **os.environ,
                "JAX_COMPILATION_CACHE_DIR": os.environ["LUMINA_JAX_TEST_CACHE"],
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def drawn(run, tmp_path_factory):
    """Twelve pictures in six batches of one uninterrupted command."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "prompts.txt").write_text("\n".join(f"prompt {n}" for n in range(12)))
    command = f"--prompts_file={folder / 'prompts.txt'}", "--batch_size=2"
    finish(run(*command, f"--output={folder / 'out'}"))
    return command, folder / "out"


@pytest.mark.slow
def test_a_command_killed_again_and_again_ends_with_the_same_bytes(run, drawn, tmp_path):
    command, whole = drawn
    seen = {}
    for num_pictures in (1, 4, 7, 9):
        process = run(*command, f"--output={tmp_path}")
        while len(list(tmp_path.glob("0*.png"))) < num_pictures:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        there = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")}
        assert len(there) < 12, "it was done before it was killed"
        assert there.items() >= seen.items()
        seen = there
    finish(run(*command, f"--output={tmp_path}"))
    assert contents(tmp_path) == contents(whole)
    there = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")}
    assert there.items() >= seen.items()


@pytest.mark.slow
def test_a_picture_is_drawn_again_from_what_it_says(run, drawn, tmp_path):
    _, whole = drawn
    picture = whole / "0007_prompt_7.png"
    finish(run(f"--again={picture}", f"--output={tmp_path}"))
    assert (tmp_path / picture.name).read_bytes() == picture.read_bytes()
    finish(run(f"--again={picture}", "--seed=1", "--num_steps=9", f"--output={tmp_path / 'other'}"))
    metadata = pictures.read_metadata(tmp_path / "other" / picture.name)
    assert (metadata["seed"], metadata["sampling"]["num_steps"]) == (1, 9)


@pytest.mark.slow
def test_a_picture_begun_from_a_file_keeps_what_the_mask_covers(run, tmp_path):
    for name, colour in (("start", "red"), ("mask", "black")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    files = f"--image={tmp_path / 'start.png'}", f"--mask={tmp_path / 'mask.png'}"
    finish(run("--prompt=a", "--num_steps=5", *files, f"--output={tmp_path / 'out'}"))
    picture = tmp_path / "out" / "0000_a.png"
    assert (pictures.read_pixels(picture) == (255, 0, 0)).all()
    output, _ = run(f"--again={picture}", f"--output={tmp_path}").communicate()
    assert "give the one with sha256" in output


@pytest.mark.slow
def test_the_second_start_compiles_nothing(run, drawn, tmp_path):
    command, _ = drawn
    nowhere_else = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    first = finish(run(*command, f"--output={tmp_path / 'a'}", **nowhere_else))
    second = finish(run(*command, f"--output={tmp_path / 'b'}", **nowhere_else))
    assert re.search(r"Programs: [1-9]\d* compiled", first)
    assert "Programs: 0 compiled" in second
    assert f"Cache: {tmp_path}/lumina_jax" in second
    assert "The first picture was there" in second


@pytest.mark.slow
def test_two_processes_draw_what_one_draws_and_refuse_together(run, tmp_path):
    command = "--prompt=cat", "--prompt=dog", "--num_steps=9"
    finish(run(*command, f"--output={tmp_path / 'one'}"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}

    def both(*more):
        command = ("--prompt=cat", "--prompt=dog", *more, f"--output={tmp_path / 'two'}")
        return [run(*command, JAX_PROCESS_ID=str(index), **together) for index in range(2)]

    for process in both("--num_steps=9"):
        finish(process)
    assert contents(tmp_path / "two").keys() == contents(tmp_path / "one").keys()
    for path in (tmp_path / "two").glob("0*.png"):
        found, expected = (pictures.read_pixels(tmp_path / n / path.name) for n in ("two", "one"))
        assert np.abs(found.astype(int) - expected).max() <= 1
    for process in both("--num_steps=8"):
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 2, output


def test_another_command_has_another_folder_by_itself_and_the_same_one_the_same():
    request = Request(0, "dog face!", "", 7, 32, 32)
    metadata = {"sampling": {"num_steps": 5, "merge_steps": (0.0, 1.0)}, "fingerprint": "f"}
    name = drawing.folder_name([request], metadata)
    assert re.fullmatch("dog_face_[0-9a-f]{8}", name)
    assert drawing.folder_name([request], dict(metadata)) == name
    others = [
        drawing.folder_name([request._replace(seed=8)], metadata),
        drawing.folder_name([request, request._replace(index=1)], metadata),
        drawing.folder_name([request], metadata | {"fingerprint": "g"}),
        drawing.folder_name([request], metadata | {"strength": 0.5}),
    ]
    assert len({name, *others}) == 5
    assert re.fullmatch("[0-9a-f]{8}", drawing.folder_name([request._replace(prompt="?")], {}))
