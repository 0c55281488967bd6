import sys

import numpy as np
import pytest
from PIL import Image

from lumina_jax.errors import InputError
from lumina_jax.sampling import contact_sheet as module
from lumina_jax.sampling.contact_sheet import contact_sheet, save_contact_sheet

RED = np.full((8, 8, 3), (255, 0, 0), np.uint8)


def words_of(sheet: Image.Image) -> np.ndarray:
    """Where there is ink below the only picture of a sheet."""
    dark = np.asarray(sheet.convert("L")) < 200
    dark[: 8 + 64 + 1] = False  # gap, picture, frame
    return dark


def test_each_picture_fills_its_cell_in_its_own_shape():
    wide = np.full((8, 16, 3), (0, 0, 255), np.uint8)
    sheet = np.asarray(contact_sheet([RED, wide, RED], ["", "", ""], columns=2, cell_size=64))
    assert sheet.shape == (3 * 8 + 2 * 64 + 4, 3 * 8 + 2 * 64, 3)  # 4: two rows' space for text
    assert (sheet[8 : 8 + 64, 8 : 8 + 64] == (255, 0, 0)).all()
    blue = (sheet == (0, 0, 255)).all(-1)
    assert np.argwhere(blue).min(0).tolist() == [8 + 16, 8 + 64 + 8]  # centred, half as high
    assert blue.sum() == 64 * 32


def test_a_row_of_wide_pictures_is_as_high_as_they_are():
    wide = np.full((8, 16, 3), (0, 0, 255), np.uint8)
    sheet = np.asarray(contact_sheet([wide, wide, RED], ["", "", ""], columns=2, cell_size=64))
    assert sheet.shape[0] == 3 * 8 + 32 + 64 + 4
    assert (sheet[8 : 8 + 32, 8 : 8 + 64] == (0, 0, 255)).all()


def test_several_captions_stand_one_below_another():
    one = contact_sheet([RED], ["a dog"], columns=1, cell_size=64)
    two = contact_sheet([RED], [["a dog", "a hound"]], columns=1, cell_size=64)
    small = contact_sheet([RED], [["a dog", "a hound"]], columns=1, cell_size=64, text_size=0.05)
    assert one.height < small.height < two.height
    assert words_of(two)[one.height - 8 :].any()


def test_captions_notes_and_title_are_drawn():
    plain = contact_sheet([RED], [""], columns=1, cell_size=64)
    caption = contact_sheet([RED], ["a dog"], columns=1, cell_size=64)
    note = contact_sheet([RED], ["a dog"], columns=1, cell_size=64, notes=["held out"])
    title = contact_sheet([RED], ["a dog"], columns=1, cell_size=64, title="step 10")
    assert not words_of(plain).any()
    assert words_of(caption).any()
    assert plain.height < caption.height < min(note.height, title.height)


@pytest.mark.parametrize("caption", ["grinning face", "улыбка", "چهرهٔ خندان", "وجه ضاحك", "şığ"])
def test_scripts_of_the_core_fonts_need_no_other_font(caption, monkeypatch):
    monkeypatch.setitem(sys.modules, "cvttf_NotoSansCJK_Regular", None)
    assert len(module._find_fonts(caption)) == 1


@pytest.mark.parametrize("caption", ["狗", "犬の顔", "강아지 얼굴"])
def test_chinese_japanese_and_korean_are_drawn_with_their_font(caption):
    pytest.importorskip("cvttf_NotoSansCJK_Regular")
    fonts = module._find_fonts(caption)
    assert "CJK" in module._best_font(caption, fonts)
    assert words_of(contact_sheet([RED], [caption], columns=1, cell_size=64)).any()


def test_arabic_is_shaped_and_runs_from_right_to_left():
    def columns_with_ink(caption):
        sheet = contact_sheet([RED], [caption], columns=1, cell_size=192)
        return np.flatnonzero(np.asarray(sheet.convert("L"))[24 + 192 + 1 :].min(axis=0) < 160)

    # Joined letters are narrower than the same letters kept apart by a mark without width.
    apart = "\u200c".join("ضاحك")
    assert np.ptp(columns_with_ink("ضاحك")) < np.ptp(columns_with_ink(apart))
    # A wide word, then a thin one: the thin one ends up on the left.
    ink = columns_with_ink("صصص ا")
    left, right = np.split(ink, [np.diff(ink).argmax() + 1])
    assert len(left) < len(right)


def test_long_captions_take_two_lines_and_an_ellipsis():
    font = module._find_fonts("a")[0]
    assert module._wrap("one two", font, 10.0, 100.0, 2) == ["one two"]
    assert module._wrap("one two three four", font, 10.0, 60.0, 2) == ["one two", "three four"]
    lines = module._wrap("one two three four five six", font, 10.0, 60.0, 2)
    assert len(lines) == 2
    assert lines[1].endswith("…")
    assert all(module._width(line, font, 10.0) <= 60 for line in lines)
    lines = module._wrap("Donaudampfschifffahrt", font, 10.0, 60.0, 3)
    assert "".join(lines) == "Donaudampfschifffahrt"


def test_chinese_breaks_anywhere_but_not_before_a_full_stop():
    font = module._find_fonts("a")[0]
    width = module._width("狗" * 4, font, 10.0)
    assert module._wrap("狗狗狗狗狗", font, 10.0, width, 2) == ["狗狗狗狗", "狗"]
    assert module._wrap("狗狗狗狗。狗", font, 10.0, width, 2) == ["狗狗狗", "狗。狗"]


def test_captions_with_markup_and_control_characters_are_drawn_as_they_are():
    odd = contact_sheet([RED], ["<b> & \x00\ud800\n 'x'"], columns=1, cell_size=64)
    assert words_of(odd).any()


def test_letters_that_no_font_has_are_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvttf_NotoSansCJK_Regular", None)
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [])
    warnings = []
    monkeypatch.setattr(module.logging, "log_first_n", lambda *args: warnings.append(args))
    contact_sheet([RED], ["狗 dog"], columns=1, cell_size=64)
    (_, message, times, letters), *others = warnings
    assert "pip install 'lumina-jax[demo]'" in message
    assert (times, letters, others) == (1, "狗", [])


def test_a_font_of_the_system_helps_out(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "cvttf_NotoSansCJK_Regular", None)
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    mono = module._find_fonts("a")[0]
    monkeypatch.setattr(
        "matplotlib.font_manager.findSystemFonts", lambda: [str(tmp_path / "broken.ttf"), mono]
    )
    monkeypatch.setattr(module, "_has", lambda font, c, has=module._has: c == "a" or has(font, c))
    assert module._find_fonts("a") == [mono]


def test_a_sheet_is_saved_whole(tmp_path):
    path = tmp_path / "new" / "sheet.png"
    for _ in range(2):  # the second replaces the first
        save_contact_sheet(path, [RED], ["a dog"], columns=1, cell_size=64)
    with Image.open(path) as sheet:
        assert sheet.size == (80, sheet.height)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": [], "captions": []}, "at least one picture"),
        ({"captions": ["a", "b"]}, "got 1 pictures and 2 captions"),
        ({"notes": []}, "got 1 pictures and 0 notes"),
        ({"columns": 0}, "columns=0 and cell_size=192"),
        ({"cell_size": 8}, "columns=1 and cell_size=8"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        contact_sheet(**({"images": [RED], "captions": ["a"], "columns": 1} | change))


def test_a_caption_cannot_bring_a_picture_of_the_disk_onto_the_sheet(tmp_path):
    """The sheet is drawn as SVG, in which an element can name a file."""
    Image.new("RGB", (64, 64), (0, 255, 0)).save(tmp_path / "secret.png")
    element = f'<image href="{tmp_path}/secret.png" width="64" height="64"/>'
    for caption in (element, f"</text>{element}<text>", f"]]>{element}", f'"/>{element}'):
        sheet = np.asarray(contact_sheet([RED], [caption], columns=1, cell_size=64, title=caption))
        assert not (sheet[..., 1].astype(int) - sheet[..., 0] > 100).any()
