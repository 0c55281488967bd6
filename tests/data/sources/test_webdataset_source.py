import gzip
import io
import json
import tarfile

import pytest

from lumina_jax.data.captions import Caption
from lumina_jax.data.sources import webdataset
from lumina_jax.data.sources.webdataset import WebDatasetSource


def tar(members: dict[str, bytes | str], mode: str = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as archive:
        for name, member in members.items():
            data = member.encode() if isinstance(member, str) else member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return content.getvalue()


def samples(png, *keys: str) -> dict[str, bytes | str]:
    """A picture and a caption for each key."""
    members: dict[str, bytes | str] = {}
    for key in keys:
        members |= {f"{key}.png": png(len(key)), f"{key}.txt": f"caption of {key}"}
    return members


def outcome(items) -> dict[str, str | None]:
    found = {item.id: item.fault and item.fault.reason for item in items}
    assert len(found) == len(items)
    return found


def test_the_members_of_a_key_make_a_sample(store, png, read_all):
    metadata = {"caption": "from JSON", "width": 4, "similarity": 0.31}
    members = {
        "./000.jpg": png(1),
        "./000.txt": "first line\nsecond line",
        "./000.json": json.dumps(metadata),
        "sub.1/001.seg.png": png(9),
        "sub.1/001.PNG": png(2),
        "sub.1/001.tags.zh.txt": "狗",
        "sub.1/001.cls": "7",
    }
    path = store.put({"00000.tar": tar(members)})
    first, second = read_all(WebDatasetSource(f"{path}/00000.tar"))
    assert (first.id, first.image) == ("00000.tar/000", png(1))
    assert first.captions == (
        Caption("first line\nsecond line", "long", "en"),
        Caption("from JSON", "long", "en"),
    )
    assert first.scores == {"width": 4.0, "similarity": 0.31}
    assert (second.id, second.image) == ("00000.tar/sub.1/001", png(2))
    assert second.captions == (Caption("狗", "tags", "zh"),)


def test_the_same_caption_given_twice_is_one(store, png, read_all):
    """As img2dataset writes them."""
    members = {"0.jpg": png(), "0.txt": "a dog", "0.json": '{"caption": "a dog"}'}
    (item,) = read_all(WebDatasetSource(store.put({"0.tar": tar(members)})))
    assert item.captions == (Caption("a dog", "long", "en"),)


def test_an_archive_is_a_part(store, png, read_all):
    path = store.put(
        {
            "a/00000.tar": tar(samples(png, "x")),
            "b/00000.tar.gz": tar(samples(png, "x"), "w:gz"),
            "b/00001.tgz": tar(samples(png, "x", "y"), "w:gz"),
            "b/notes.txt": "not an archive",
        }
    )
    source = WebDatasetSource(path)
    assert [part.names for part in source.parts()] == [
        ("a/00000.tar",),
        ("b/00000.tar.gz",),
        ("b/00001.tgz",),
    ]
    assert outcome(read_all(source)) == {
        "a/00000.tar/x": None,
        "b/00000.tar.gz/x": None,
        "b/00001.tgz/x": None,
        "b/00001.tgz/y": None,
    }


def test_what_cannot_be_taken_is_said(store, png, read_all, monkeypatch):
    monkeypatch.setattr("lumina_jax.data.sources.webdataset.MAX_BYTES", 1000)
    members = {
        "alone.png": png(),
        "lost.txt": "no picture",
        "video.mp4": "...",
        "README": "hello",
        "two.png": png(),
        "two.webp": png(),
        "two.txt": "which?",
        "large.png": b"x" * 1001,
        "large.txt": "a large file",
        "._mac.png": "hidden",
        "json.png": png(),
        "json.json": "{",
        **samples(png, "good"),
    }
    items = read_all(WebDatasetSource(store.put({"0.tar": tar(members)})))
    assert outcome(items) == {
        "0.tar/alone": "no caption",
        "0.tar/lost": "no picture",
        "0.tar/video": "no picture",
        "0.tar/README": "no picture",
        "0.tar/two": "several pictures",
        "0.tar/large": "too large",
        "0.tar/json": "broken JSON",
        "0.tar/good": None,
    }
    assert items[4].fault.detail == "members: png, webp, txt"


def test_a_link_is_no_picture_and_a_folder_is_no_sample(store, png, read_all):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, kind in (("sub", tarfile.DIRTYPE), ("sub/x.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    (item,) = read_all(WebDatasetSource(store.put({"0.tar": content.getvalue()})))
    assert (item.id, item.fault.reason) == ("0.tar/sub/x", "not a file")


def test_a_key_that_comes_again_is_another_sample(store, png, read_all):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("a.png", "a.txt", "a.png", "b.png", "a.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"x"))
    items = read_all(WebDatasetSource(store.put({"0.tar": content.getvalue()})))
    assert [(item.id[-1], item.fault and item.fault.reason) for item in items] == [
        ("a", None),
        ("a", "no caption"),
        ("b", "no caption"),
        ("a", "no picture"),
    ]


def test_wherever_an_archive_is_cut_what_is_whole_is_read_and_the_rest_is_said(
    store, png, read_all
):
    whole = tar(samples(png, "a", "b", "c"))
    assert len(whole) == 10240  # six members of a header and a block each, the end, and padding
    for size in (0, 100, 512, 600, 1024, 2048, 2049, 2560, 3000, 5000, 6143, 6144):
        path = store.put({"0.tar": whole[:size]})
        items = read_all(WebDatasetSource(path))
        *good, last = items
        assert (last.id, last.fault.reason) == ("0.tar", "truncated archive"), size
        pictures = [item for item in good if not item.fault]
        assert [item.id[-1] for item in pictures] == list("abc"[: (size + 24) // 2048]), size
        # A picture whose caption is beyond the cut.
        assert [item.fault.reason for item in good if item.fault] in ([], ["no caption"]), size
    for size in (6144 + 512, 6144 + 1024, 10240):
        path = store.put({"0.tar": whole[:size]})
        assert outcome(read_all(WebDatasetSource(path))) == dict.fromkeys(
            ("0.tar/a", "0.tar/b", "0.tar/c")
        )


def test_wherever_a_compressed_archive_is_cut_it_is_said(store, png, read_all):
    whole = gzip.compress(tar(samples(png, *"abcdefgh")))
    for size in range(0, len(whole) - 8, 37):
        items = read_all(WebDatasetSource(store.put({"0.tar.gz": whole[:size]})))
        assert items[-1].id == "0.tar.gz"
        assert items[-1].fault.reason in ("truncated archive", "damaged archive")


def test_an_archive_that_is_damaged_inside_is_said(store, png, read_all):
    content = bytearray(tar(samples(png, "a", "b", "c")))
    content[2048:2560] = b"x" * 512  # the header of b's picture
    a, fault = read_all(WebDatasetSource(store.put({"0.tar": bytes(content)})))
    assert a.fault is None
    assert (fault.id, fault.fault.reason) == ("0.tar", "damaged archive")
    (fault,) = read_all(WebDatasetSource(store.put({"0.tar": b"<html>not found</html>" * 100})))
    assert fault.fault.reason == "damaged archive"


def test_archives_one_after_another_are_all_read(store, png, read_all):
    both = tar(samples(png, "a")) + tar(samples(png, "b"))
    path = store.put({"0.tar": both})
    assert outcome(read_all(WebDatasetSource(path))) == {"0.tar/a": None, "0.tar/b": None}


def test_what_webdataset_writes_is_read(tmp_path, png, read_all):
    webdataset = pytest.importorskip("webdataset")
    path = str(tmp_path / "000.tar")
    with webdataset.TarWriter(path) as writer:
        for i in range(3):
            row = {"caption": f"number {i}", "score": i}
            writer.write({"__key__": f"k{i}", "png": png(i), "txt": f"text {i}", "json": row})
    items = read_all(WebDatasetSource(path))
    assert [item.id for item in items] == ["000.tar/k0", "000.tar/k1", "000.tar/k2"]
    assert [item.image for item in items] == [png(i) for i in range(3)]
    assert [item.scores for item in items] == [{"score": float(i)} for i in range(3)]
    assert {c.text for c in items[1].captions} == {"text 1", "number 1"}


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_name_of_gigabytes_is_refused_before_it_is_read(tmp_path, read_all, kind):
    """Packed, it is a few megabytes, and tarfile takes it into memory at once."""
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(header("x", 2**31, kind))
        file.write(bytes(2**20))
    assert outcome(read_all(WebDatasetSource(str(tmp_path)))) == {"a.tar.gz": "damaged archive"}


def test_a_sample_of_many_large_members_is_refused(tmp_path, read_all, monkeypatch, png):
    monkeypatch.setattr(webdataset, "MAX_BYTES", 3000)
    members = {"a.png": png(), "a.txt": "x" * 2000, "a.caption": "y" * 2000, **samples(png, "b")}
    (tmp_path / "a.tar").write_bytes(tar(members))
    found = outcome(read_all(WebDatasetSource(str(tmp_path))))
    assert found == {"a.tar/a": "too large", "a.tar/b": None}


def test_names_that_lead_elsewhere_write_and_read_nothing(tmp_path, read_all, png):
    (tmp_path / "secret.txt").write_text("a secret")
    archive = tmp_path / "in" / "a.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as file:
        for name, content in (("../../evil.png", png()), ("../../evil.txt", b"a caption")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        file.addfile(tarfile.TarInfo("/x.png"))
        for name, kind in (("y.png", tarfile.SYMTYPE), ("y.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../secret.txt"
            file.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    items = read_all(WebDatasetSource(str(archive)))
    assert sorted(tmp_path.rglob("*")) == before
    assert not any("a secret" in repr(item) for item in items)
    assert {item.id: item.fault and item.fault.reason for item in items}["a.tar/y"] == "not a file"


def test_a_packed_archive_that_ends_early_is_a_fault(tmp_path, png):
    """Found by fuzzing: tarfile raises a TypeError where the header of gzip ends too soon."""
    whole = gzip.compress(tar(samples(png, "a")), mtime=0)
    whole = whole[:3] + b"\x08" + whole[4:10] + b"name.tar\0" + whole[10:]  # as gzip writes it
    for length in range(1, 60):  # the header has 19 bytes
        (tmp_path / "a.tar.gz").write_bytes(whole[:length])
        source = WebDatasetSource(str(tmp_path))
        items = [item for part in source.parts() for item in source.read(part)]
        assert items[-1].fault is not None
