import json

import pytest

from lumina_jax.data.captions import Caption
from lumina_jax.data.sources import json_lines
from lumina_jax.data.sources.json_lines import JsonSource
from lumina_jax.errors import InputError


def lines(*rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


SPELLINGS = (
    {"image_path": "a.png", "prompt": "A dog."},  # the README of Lumina-Image 2.0
    {"path": "b.png", "prompt": ["A cat.", "A red cat."]},  # its code
    {"image_path": "c.png", "super_high_quality_caption": "A fox."},
    {"file_name": "d.png", "text": "Ein Hund."},  # Hugging Face
    {"image": "sub/e.png", "caption": "犬", "aesthetic": 6.5},
)


def pictures(png) -> dict[str, bytes]:
    return {row: png(i) for i, row in enumerate(("a.png", "b.png", "c.png", "d.png", "sub/e.png"))}


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_all_spellings_are_read(store, png, read_all, suffix):
    text = lines(*SPELLINGS) if suffix == "jsonl" else json.dumps(SPELLINGS, indent=1)
    path = store.put({**pictures(png), f"rows.{suffix}": text})
    items = read_all(JsonSource(f"{path}/rows.{suffix}"))
    assert not any(item.fault for item in items)
    assert {item.id: item.image for item in items} == pictures(png)
    assert [[caption.text for caption in item.captions] for item in items] == [
        ["A dog."],
        ["A cat.", "A red cat."],
        ["A fox."],
        ["Ein Hund."],
        ["犬"],
    ]
    assert items[-1].scores == {"aesthetic": 6.5}


def test_pictures_may_be_below_another_root(store, png, read_all):
    store.put({f"there/{name}": content for name, content in pictures(png).items()})
    rows = lines(*SPELLINGS, {"path": f"{store.path}/there/a.png", "prompt": "absolute"})
    path = store.put({"here/rows.jsonl": rows})
    items = read_all(JsonSource(f"{path}/here", root=f"{path}/there"))
    assert len(items) == 6
    assert not any(item.fault for item in items)
    assert items[-1].image == items[0].image


def test_every_row_that_cannot_be_taken_says_where_and_why(store, png, read_all):
    rows = [
        b'{"path": "a.png", "prompt": "good"}',
        b'{"path": "a.png", "prompt": ',
        b"",
        b'["a.png", "a dog"]',
        b'{"prompt": "no path"}',
        b'{"path": 7, "image": "", "prompt": "no path either"}',
        b'{"path": "nowhere.png", "prompt": "no file"}',
        b'{"path": "a.png", "title": "no caption"}',
        b'{"path": "a.png", "prompt": "\xff"}',
        b'{"path": "a.png", "prompt": "the last line has no end"}',
    ]
    path = store.put({"a.png": png(), "rows.jsonl": b"\r\n".join(rows)})
    items = read_all(JsonSource(f"{path}/rows.jsonl"))
    starts = [sum(len(row) + 2 for row in rows[:i]) for i in range(len(rows))]
    assert [(item.id, item.fault and item.fault.reason) for item in items] == [
        ("a.png", None),
        (f"rows.jsonl:byte {starts[1]}", "broken JSON"),
        (f"rows.jsonl:byte {starts[3]}", "broken JSON"),
        (f"rows.jsonl:byte {starts[4]}", "no picture path"),
        (f"rows.jsonl:byte {starts[5]}", "no picture path"),
        ("nowhere.png", "not found"),
        ("a.png", "no caption"),
        (f"rows.jsonl:byte {starts[8]}", "broken JSON"),
        ("a.png", None),
    ]
    assert "needed an object, got ['a.png', 'a dog']" in items[2].fault.detail
    assert "none of image_path, path" in items[3].fault.detail


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("size", [1, 7, 38, 39, 100, 10**6])
def test_wherever_the_file_is_cut_each_row_is_read_once(
    store, png, read_all, monkeypatch, suffix, size
):
    rows = [{"path": "a.png", "prompt": "é" * (i % 5) + str(i)} for i in range(40)]
    rows[::5] = [{"prompt": "no path"}] * 8  # their ids say where they begin
    text = lines(*rows) if suffix == "jsonl" else "\ufeff" + json.dumps(rows, ensure_ascii=False)
    path = store.put({"a.png": png(), f"rows.{suffix}": text})
    source = JsonSource(f"{path}/rows.{suffix}")
    whole = read_all(source)
    assert [item.captions[0].text for item in whole if not item.fault] == [
        row["prompt"] for row in rows if "path" in row
    ]
    assert sum(item.fault is not None for item in whole) == 8
    monkeypatch.setattr(json_lines, "BYTES_PER_PART", size)
    assert list(map(str, read_all(source))) == list(map(str, whole))
    assert (len(source.parts()) > 5) == (size < 10**6)


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_row_is_not_taken_into_memory_whatever_its_length(
    store, png, read_all, monkeypatch, suffix
):
    rows = [{"path": "a.png", "prompt": "x" * n} for n in (10, 1000, 20, 37, 60)]
    text = lines(*rows) if suffix == "jsonl" else json.dumps(rows)
    path = store.put({"a.png": png(), f"rows.{suffix}": text})
    monkeypatch.setattr(json_lines, "MAX_LINE", 70)
    for size in (10, 80, 10**6):
        monkeypatch.setattr(json_lines, "BYTES_PER_PART", size)
        items = read_all(JsonSource(f"{path}/rows.{suffix}"))
        assert [item.fault and item.fault.detail for item in items] == [
            None,
            "a row of 70 bytes or more",
            None,
            None,
            "a row of 70 bytes or more",
        ]


def test_the_element_of_a_list_that_cannot_be_taken_says_where(store, png, read_all):
    text = '\ufeff\n[ {"path": "a.png", "prompt": "é"},\n 5, {"prompt": "x"} ]\n'
    path = store.put({"a.png": png(), "rows.json": text})
    good, five, no_path = read_all(JsonSource(f"{path}/rows.json"))
    assert good.captions == (Caption("é", "long", "en"),)
    content = text.encode()
    assert five.id == f"rows.json:byte {content.index(b'5,')}"
    assert five.fault.detail == "needed an object, got 5"
    assert no_path.id == f"rows.json:byte {content.index(b'{', 20)}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"b": 2}', r"rows.json is not a JSON list: it does not begin with \["),
        ('[{"a": 1}, {"b": ]', "rows.json is not a JSON list: Expecting value"),
        ('[{"a": 1}, {"b": 2}', r"and end with \]\. A file with one object a line must be called"),
        ("", "is not a JSON list"),
        ("[]", "rows.json holds no row"),
    ],
)
def test_a_file_that_is_no_list_is_refused(store, text, message):
    path = store.put({"rows.json": text})
    with pytest.raises(InputError, match=message):
        JsonSource(f"{path}/rows.json").parts()


def test_captions_in_lists_in_lists_cost_their_picture_alone(tmp_path, png):
    """JSON may be nested nearly as deep as Python calls, and reading captions calls more."""
    (tmp_path / "a.png").write_bytes(png())
    deep = "[" * 950 + '"x"' + "]" * 950
    rows = [f'{{"image": "a.png", "prompt": {deep}}}', '{"image": "a.png", "prompt": "x"}']
    (tmp_path / "list.jsonl").write_text("\n".join(rows))
    source = JsonSource(str(tmp_path / "list.jsonl"))
    items = [item for part in source.parts() for item in source.read(part)]
    assert items[0].fault.reason in ("bad caption", "broken JSON")
    assert items[1].fault is None


def test_a_list_that_memory_may_not_hold_is_refused(tmp_path):
    with (tmp_path / "list.json").open("wb") as file:  # a hole: it takes no room on the disk
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"has more than 2,147,483,648 bytes.*\.jsonl"):
        JsonSource(str(tmp_path / "list.json")).parts()
