"""Many workers, killed at any moment: the table is the same, and nothing is done twice."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures

import pytest
from etils import epath
from PIL import Image

from lumina_jax import files
from lumina_jax.data import caption_table
from lumina_jax.data.caption_table import PartName, Piece, Table
from lumina_jax.data.engine import Processes
from lumina_jax.data.images import Rejected
from lumina_jax.data.sources.base import Item
from lumina_jax.errors import InputError, RestartError
from lumina_jax.unicap import worker
from lumina_jax.unicap.backends import Servers
from lumina_jax.unicap.backends.base import Reply
from lumina_jax.unicap.captioner import Wanted
from lumina_jax.unicap.gates import Gates
from lumina_jax.unicap.pictures import Pilot
from lumina_jax.unicap.prompts import load_prompts
from tests.small_data import ListSource
from tests.unicap import captioning_server
from tests.unicap.small_captioner import SmallBackend

COLOURS = ((220, 40, 40), (40, 160, 60), (40, 70, 200), (240, 210, 40), (130, 50, 160))
WANTED = Wanted(kinds=("long", "short"), languages=("en",))


def pictures(count, first=0):
    """No two are alike: each has a size of its own."""
    return [
        Item(f"{n:03d}.png", Image.new("RGB", (40 + n, 300 - n), COLOURS[n % 5]))
        for n in range(first, first + count)
    ]


def make_job(directory, items, *, part_size=100, backend=None, **given):
    backend = backend or SmallBackend()
    given = {"wanted": WANTED, "prompts": load_prompts(), "models": ("small", "small")} | given
    return worker.Job(
        ListSource(tuple(items), part_size), os.fspath(directory), open_backend=lambda: backend,
        **given,
    )  # fmt: skip


def run(job, index=0, num_workers=1):
    job.begin()
    for number in job.missing(index, num_workers):
        job.caption_part(number)
    return job.finish()


def content(directory):
    """What a table says, without the times."""
    names = sorted(p.name for p in directory.iterdir() if not PartName.parse(p.name))
    found = {name: (directory / name).read_bytes() for name in names}
    table = json.loads(found.pop(caption_table.TABLE))
    for name in ("seconds", "num_timed"):
        table["summary"].pop(name)
    return found, table


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(worker, "PIECE_SIZE", 4)


def test_the_rows_are_those_of_the_source_in_its_order(tmp_path):
    counts = run(make_job(tmp_path, pictures(12), part_size=5))
    table = Table.load(tmp_path)
    assert [row.id for row in table.rows()] == [f"{n:03d}.png" for n in range(12)]
    assert counts.num_pictures == 12
    assert counts.passed == {("long", "en"): 12, ("short", "en"): 12}
    (captions,) = table.find(["007.png"])
    assert "47 steps wide" in captions[0].text


@pytest.mark.parametrize("in_threads", [True, False])
def test_threads_and_steps_write_the_same_table(tmp_path, small_pieces, in_threads):
    def change(request, text):
        if in_threads:
            time.sleep(random.random() / 100)
        return "I cannot." if request.seed == 0 and "41 steps" in text else text

    for name, backend in (
        ("a", SmallBackend(change=change, in_threads=in_threads, num_pictures=3)),
        ("b", SmallBackend(change=change, num_pictures=1)),
    ):
        run(make_job(tmp_path / name, pictures(11), backend=backend))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_pictures_that_are_none_have_a_row_with_their_fault(tmp_path):
    items = [
        *pictures(2),
        Item("broken.jpg", b"nothing"),
        Item("lost.jpg", None, fault=Rejected("not found", "lost.jpg")),
    ]
    counts = run(make_job(tmp_path, items))
    faults = {row.id: row.fault for row in Table.load(tmp_path).rows() if row.fault}
    assert faults["lost.jpg"] == ("not found", "lost.jpg")
    assert faults["broken.jpg"][0] == "not a picture"
    assert counts.broken == {"not found": 1, "not a picture": 1}
    assert Table.load(tmp_path).find(["broken.jpg", "000.png"])[0] == ()


def test_workers_share_the_parts_and_the_last_one_makes_the_table(tmp_path):
    job = make_job(tmp_path, pictures(10), part_size=2)
    assert [job.missing(i, 3) for i in range(3)] == [[0, 3], [1, 4], [2]]
    assert run(job, 0, 3) is None
    assert run(job, 2, 3) is None
    assert not (tmp_path / caption_table.TABLE).exists()
    assert run(job, 1, 3).num_pictures == 10
    assert len(list(Table.load(tmp_path).rows())) == 10
    with pytest.raises(InputError, match="worker=3 of num_workers=3: there must be 1 or more"):
        job.missing(3, 3)


def test_what_is_written_is_not_captioned_again(tmp_path, small_pieces):
    class Failing(SmallBackend):
        def ask(self, requests):
            if self.num_asked >= 20:
                raise RestartError("the server is gone")
            return super().ask(requests)

    failing = Failing(num_pictures=1)
    job = make_job(tmp_path / "a", pictures(15), backend=failing)
    with pytest.raises(RestartError, match="the server is gone"):
        run(job)
    assert caption_table.pieces(tmp_path / "a") == [Piece(0, 0), Piece(0, 1)]
    again = SmallBackend(num_pictures=1)
    counts = run(make_job(tmp_path / "a", pictures(15), backend=again))
    assert again.num_asked == 2 * (15 - 8)
    assert counts.num_pictures == 15
    run(make_job(tmp_path / "b", pictures(15)))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_a_hole_and_what_lies_behind_it_are_written_again(tmp_path, small_pieces):
    run(make_job(tmp_path, pictures(11)))
    whole = content(tmp_path)
    (tmp_path / Piece(0, 1).name).unlink()
    with pytest.raises(InputError, match=r"captions-000000-0001.* Delete it. Make the table again"):
        Table.load(tmp_path).find(["005.png"])
    run(make_job(tmp_path, pictures(11)))
    assert content(tmp_path) == whole


def test_a_killed_removal_leaves_nothing_that_looks_complete(tmp_path, small_pieces, monkeypatch):
    run(make_job(tmp_path, pictures(11)))
    remove_names, calls = files.remove_names, []

    def killed(folder, names):
        calls.append(names)
        if len(calls) == at:
            raise KeyboardInterrupt
        remove_names(folder, names)

    for at in (2, 3, 4, 5):  # noqa: B007, `killed` reads it
        with monkeypatch.context() as patch:
            patch.setattr(files, "remove_names", killed)
            calls.clear()
            with pytest.raises(KeyboardInterrupt):
                make_job(tmp_path, pictures(11)).begin(overwrite=True)
        assert run(make_job(tmp_path, pictures(11))).num_pictures == 11
        assert len(list(Table.load(tmp_path).rows())) == 11


def test_a_second_worker_of_the_same_number_does_not_change_what_is_there(tmp_path, small_pieces):
    """The first one is slow; the other one is done before it."""
    other = make_job(tmp_path, pictures(11))

    def change(request, text):
        if not (tmp_path / caption_table.TABLE).exists():
            run(other)
        return "I cannot."

    backend = SmallBackend(change=change, num_pictures=1)
    run(make_job(tmp_path, pictures(11), backend=backend))
    assert {len(row.captions) for row in Table.load(tmp_path).rows()} == {2}
    assert len(Table.load(tmp_path).find(["005.png"])[0]) == 2


def test_two_that_finish_at_the_same_time_do_not_disturb_each_other(tmp_path):
    job = make_job(tmp_path, pictures(10), part_size=2)
    job.begin()
    for number in job.missing():
        job.caption_part(number)
    with futures.ThreadPoolExecutor(4) as pool:
        assert {counts.num_pictures for counts in pool.map(lambda _: job.finish(), range(8))} == {
            10
        }
    assert len(list(Table.load(tmp_path).rows())) == 10


def test_an_interruption_waits_for_no_server(tmp_path):
    """Threads that are asking are left behind; each would have waited for an hour."""
    slow = threading.Event()

    class Slow(SmallBackend):
        def ask(self, requests):
            slow.set()
            time.sleep(3600)

    rows = make_job(tmp_path, pictures(10), backend=Slow(in_threads=True, num_pictures=4))._rows(
        iter(pictures(10)), Gates(load_prompts(), ("en",))
    )
    threading.Thread(target=lambda: next(rows), daemon=True).start()
    assert slow.wait(30)
    script = "import sys; from tests.unicap.test_worker import hang; hang(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", script, tmp_path / "other"])
    while not (tmp_path / "other" / "asked").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0


def hang(directory):
    class Hanging(SmallBackend):
        def ask(self, requests):
            (pathlib.Path(directory) / "asked").touch()
            time.sleep(3600)

    run(make_job(directory, pictures(10), backend=Hanging(in_threads=True, num_pictures=4)))


def test_a_picture_of_a_shape_that_no_model_takes_is_left_out(tmp_path):
    items = [*pictures(1), Item("thread.png", Image.new("RGB", (1, 70_000)))]
    assert run(make_job(tmp_path, items)).broken == {"too narrow": 1}
    with pytest.raises(InputError, match="max_pixels=0 must be 784 to"):
        make_job(tmp_path, items, max_pixels=0)


def test_an_answer_that_cannot_be_written_is_left_out(tmp_path):
    backend = SmallBackend(change=lambda request, text: text.replace("surface", "\ud83d"))
    counts = run(make_job(tmp_path, pictures(2), backend=backend))
    assert counts.excluded["long", "en", "damaged text"] == 2
    assert "\\ud83d" in next(iter(Table.load(tmp_path).rows())).excluded[0].text


def test_pictures_that_share_an_id_are_told(tmp_path, caplog):
    twice = [*pictures(2), dataclasses.replace(pictures(3)[2], id="000.png")]
    run(make_job(tmp_path, twice))
    assert "1 captioned pictures of" in caplog.text
    assert json.loads((tmp_path / caption_table.TABLE).read_text())["repeated_ids"] == 1


def test_a_finished_table_is_left_alone(tmp_path):
    run(make_job(tmp_path, pictures(3)))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    backend = SmallBackend()
    counts = run(make_job(tmp_path, pictures(3), backend=backend))
    assert backend.num_asked == 0
    assert counts.num_pictures == 3
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"wanted": Wanted(kinds=("long",), languages=("en",))}, "kinds is .* there and .* here"),
        ({"models": ("other", "small")}, "models is"),
        ({"max_pixels": 1000}, "max_pixels is"),
        ({"items": pictures(4), "part_size": 2}, "parts is"),
    ],
)
def test_another_table_is_refused_and_replaced_on_demand(tmp_path, change, told):
    run(make_job(tmp_path, pictures(3)))
    (tmp_path / "notes.txt").write_text("mine")
    given = {"items": pictures(3)} | change
    job = make_job(tmp_path, **given)
    with pytest.raises(InputError, match=told):
        job.begin()
    job.begin(overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "settings.json"]


def test_a_folder_of_others_is_not_written_to(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds photo.jpg and is no table of captions"):
        make_job(tmp_path, pictures(3)).begin()


def test_the_same_long_caption_for_two_pictures_is_left_out_also_after_a_restart(
    tmp_path, small_pieces
):
    same = [dataclasses.replace(item, image=pictures(1)[0].image) for item in pictures(6)]

    class Failing(SmallBackend):
        def ask(self, requests):
            if self.num_asked >= 14:
                raise RestartError("gone")
            return super().ask(requests)

    with pytest.raises(RestartError):
        run(make_job(tmp_path, same, backend=Failing(num_pictures=1)))
    counts = run(make_job(tmp_path, same, backend=SmallBackend(num_pictures=1)))
    assert counts.excluded[("long", "en", "duplicate")] == 5
    assert counts.passed[("long", "en")] == 1
    assert counts.samples["duplicate"][0][3] == "the text of 000.png"


def test_a_large_picture_is_scaled_and_keeps_its_shape(tmp_path):
    seen = []

    def change(request, text):
        seen.append(request.image and request.image.size)
        return text

    items = [Item("large.png", Image.new("RGB", (400, 100), COLOURS[0]))]
    run(make_job(tmp_path, items, backend=SmallBackend(change=change), max_pixels=10_000))
    assert seen[0] == (200, 50)


def test_a_pilot_takes_pictures_from_all_over_the_source(tmp_path):
    source = ListSource(tuple(pictures(100)), part_size=10)
    pilot = Pilot(source, num_pictures=11, num_parts=4)
    (part,) = pilot.parts()
    ids = [item.id for item in pilot.read(part)]
    assert ids == [f"{n:03d}.png" for n in (0, 1, 2, 20, 21, 22, 50, 51, 52, 70, 71)]
    job = dataclasses.replace(make_job(tmp_path, ()), source=pilot)
    assert run(job).num_pictures == 11
    assert Table.load(tmp_path).settings["source"]["options"]["pilot"] == 11


def test_counts_of_parts_add_up_to_those_of_all(tmp_path):
    def change(request, text):
        if "45 steps" in text:
            return Reply(text, finished=False, num_tokens=9)
        return "I cannot." if request.seed == 0 and "43 steps" in text else text

    backend = SmallBackend(change=change)
    for name, size in (("a", 3), ("b", 100)):
        counts = run(make_job(tmp_path / name, pictures(9), part_size=size, backend=backend))
        assert counts.rejected == {"refusal": 1, "cut off": 3}
        assert counts.excluded == {("long", "en", "cut off"): 1,
                                   ("short", "en", "nothing to make it from"): 1}  # fmt: skip
        assert (counts.passed["long", "en"], counts.at_once["long", "en"]) == (8, 7)
    one, other = (content(tmp_path / name)[1]["summary"] for name in "ab")
    assert one == other


def test_a_table_in_a_bucket_is_the_table_on_a_disk(bucket, tmp_path, small_pieces):
    for directory in (tmp_path / "table", f"{bucket}/table"):
        counts = run(make_job(directory, pictures(11), part_size=6))
        assert counts.num_pictures == 11
    here, there = Table.load(tmp_path / "table"), Table.load(f"{bucket}/table")
    assert here.fingerprint == there.fingerprint
    ids = [f"{n:03d}.png" for n in range(13)]
    assert here.find(ids) == there.find(ids)
    assert there.find(ids)[12] == ()
    make_job(f"{bucket}/table", pictures(3)).begin(overwrite=True)
    assert [path.name for path in epath.Path(f"{bucket}/table").iterdir()] == ["settings.json"]


WORKER = """
import sys
from lumina_jax.unicap import worker
from tests.unicap.test_worker import server_job
worker.PIECE_SIZE = 4
job = server_job(sys.argv[1], sys.argv[2])
job.begin()
for number in job.missing():
    job.caption_part(number)
job.finish()
"""


def server_job(directory, url):
    job = make_job(directory, pictures(30), part_size=12)
    return dataclasses.replace(job, open_backend=Servers((url,), concurrency=3))


@pytest.mark.slow
def test_a_worker_that_is_killed_again_and_again_ends_with_the_same_table(tmp_path, small_pieces):
    """By SIGKILL, in processes of their own, against a server that fails now and then."""

    def misbehave(number, body):
        time.sleep(0.02)
        return "500" if number % 7 == 3 else None

    choose = random.Random(0)
    kills = 0
    with captioning_server.running(misbehave) as server:
        for _ in range(30):
            process = subprocess.Popen(
                [sys.executable, "-c", WORKER, tmp_path / "killed", server.url]
            )
            started = len(list(tmp_path.glob("killed/*")))
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if len(list(tmp_path.glob("killed/*"))) > started:
                    time.sleep(choose.uniform(0, 0.2))
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.01)
            if process.wait() == 0:
                break
            kills += 1
        run(server_job(tmp_path / "calm", server.url))
    assert kills >= 3
    assert content(tmp_path / "killed") == content(tmp_path / "calm")


@pytest.mark.slow
def test_processes_write_the_same_table_as_one(tmp_path):
    with captioning_server.running() as server:
        for name, index in (("one", 1), ("many", 3)):
            job = server_job(tmp_path / name, server.url)
            job.begin()
            if index == 1:
                run(job)
            else:
                Processes(index).run("Captioning", job.caption_part, job.missing())
                job.finish()
    assert content(tmp_path / "one") == content(tmp_path / "many")
