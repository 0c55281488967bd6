import http.server
import os
import sys
import threading

import pytest

from lumina_jax.data.images import Rejected
from lumina_jax.data.sources import make_source, reading
from lumina_jax.errors import InputError


def names(path: str) -> list[str]:
    files = reading.list_files(path, (".tar",))
    for file, name in files:
        assert reading.read_file(file) == name.encode()
    return [name for _, name in files]


@pytest.fixture
def shards(store) -> str:
    files = ("a/00.tar", "a/01.tar", "b/00.tar", "b/x/02.TAR", "b/.x/03.tar", "b/readme.txt")
    return store.put({name: name for name in files})


def test_a_folder_stands_for_the_files_below_it(shards):
    assert names(shards) == ["a/00.tar", "a/01.tar", "b/00.tar", "b/x/02.TAR"]
    assert names(f"{shards}/") == names(shards)


def test_a_pattern_stands_for_the_files_it_matches(shards):
    assert [name for _, name in reading.list_files(f"{shards}/a/0?.tar", ())] == [
        "00.tar",
        "01.tar",
    ]
    assert names(f"{shards}/*/00.tar") == ["a/00.tar", "b/00.tar"]
    assert names(f"{shards}/{{a,b}}/00.tar") == ["a/00.tar", "b/00.tar"]
    assert names(f"{shards}/{{a/0{{0..1}},b/0*}}.tar") == ["a/00.tar", "a/01.tar", "b/00.tar"]


def test_a_file_stands_for_itself(store):
    path = store.put({"odd[1]{a,b}.tar": "odd[1]{a,b}.tar"})
    assert names(f"{path}/odd[1]{{a,b}}.tar") == ["odd[1]{a,b}.tar"]


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("x", ["x"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("a{08..10}b", ["a08b", "a09b", "a10b"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("{a}{b,}", ["{a}b", "{a}"]),
        ("{a,{1..2}}", ["a", "1", "2"]),
    ],
)
def test_braces_are_those_of_a_shell(pattern, expanded):
    assert reading.expand_braces(pattern) == expanded


def test_files_that_are_missing_are_named(shards):
    with pytest.raises(
        InputError, match=r"Not found: \S+a/02\.tar, \S+a/03\.tar, \S+ and 2 more\. Give"
    ):
        reading.list_files(f"{shards}/a/{{00..06}}.tar", (".tar",))
    with pytest.raises(InputError, match=r"Not found: \S+nowhere\.tar\. Give"):
        reading.list_files(f"{shards}/nowhere.tar", (".tar",))
    with pytest.raises(InputError, match=r"z\*.tar holds no .tar file"):
        reading.list_files(f"{shards}/z*.tar", (".tar",))
    with pytest.raises(InputError, match=r"b holds no .json or .jsonl file"):
        reading.list_files(f"{shards}/b", (".json", ".jsonl"))


def test_a_store_that_is_not_known_or_not_installed_is_said(monkeypatch):
    with pytest.raises(InputError, match="Cannot read ftq://x: Protocol not known: ftq"):
        reading.open_filesystem("ftq://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for read in (reading.open_filesystem, reading.read_file):
        with pytest.raises(InputError, match="Cannot read s3://b/x: Install s3fs"):
            read("s3://b/x")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("{folder}/nothing", "not found"),
        ("{folder}", "not found"),
        ("{folder}/file/below", "not found"),
        ("{folder}/" + "a long caption in the place of a path " * 10, "not found"),
        ("ftq://x/y", "bad path"),
        ("{folder}/a\0b", "bad path"),
    ],
)
def test_a_path_that_names_no_file_costs_one_picture(tmp_path, path, reason):
    (tmp_path / "file").write_text("x")
    with pytest.raises(Rejected) as rejected:
        reading.read_file(path.format(folder=tmp_path))
    assert rejected.value.reason == reason


def test_a_dead_link_costs_one_picture():
    pytest.importorskip("aiohttp")
    with pytest.raises(Rejected, match=r"unreachable: http://127\.0\.0\.1:9/x\.jpg"):
        reading.read_file("http://127.0.0.1:9/x.jpg")

    class Empty(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(Rejected, match="not found: http://127"):
            reading.read_file(f"http://127.0.0.1:{server.server_port}/x.jpg")
        server.shutdown()


def test_a_fault_of_the_store_is_no_fault_of_the_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fsspec.implementations.local.LocalFileSystem._open", lambda *_, **__: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        reading.read_file(str(tmp_path / "x"))


def test_a_pipe_is_not_waited_for_and_a_device_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zeros.png"):
        with pytest.raises(Rejected, match="not a file"):
            reading.read_file(str(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/a.jpg", "https://***@host/a.jpg"),
        ("s3://KEY:SECRET@bucket/a", "s3://***@bucket/a"),
        (
            "https://h/a.jpg?X-Amz-Signature=abc&w=5&X-Amz-Credential=def",
            "https://h/a.jpg?X-Amz-Signature=***&w=5&X-Amz-Credential=***",
        ),
        ("not found: https://h/a?sig=abc, and more", "not found: https://h/a?sig=*** and more"),
        ("https://h/a?access_token=x&api_key=y", "https://h/a?access_token=***&api_key=***"),
        ("https://h/a.jpg?width=5&id=7", "https://h/a.jpg?width=5&id=7"),
        ("me@host, a = b", "me@host, a = b"),
    ],
)
def test_secrets_in_urls_are_not_shown(text, shown):
    assert reading.without_secrets(text) == shown


def test_secrets_of_a_source_stay_out_of_ids_faults_and_settings(tmp_path):
    url = "file:///nowhere.jpg?X-Goog-Signature=hush"
    (tmp_path / "list.jsonl").write_text(f'{{"image_path": "{url}", "prompt": "x"}}')
    source = make_source("json", str(tmp_path / "list.jsonl"), root="https://me:hush@host/x")
    (item,) = [item for part in source.parts() for item in source.read(part)]
    assert item.fault.reason == "not found"
    for shown in (item.id, str(item.fault), repr(source.settings())):
        assert "hush" not in shown
