import io
import itertools
import pickle
import struct
import subprocess
import sys
import threading
import tracemalloc
import zlib

import broken
import numpy as np
import pytest
from PIL import Image, ImageCms

from lumina_jax.data import images
from lumina_jax.data.images import Rejected, decode, decode_stored, to_rgb
from tools.photographs import photographs

# What pytest adds before the filters of the module, which `python` keeps.
pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

ACCEPTED = {name: (content, expected) for name, content, expected in broken.accepted()}
REJECTED = {name: (content, expected) for name, content, expected in broken.rejected()}
JPEG = broken.save(broken.card((90, 90, 0)), "JPEG")


def jpeg_of(pixels, **options):
    return broken.save(Image.fromarray(pixels), "JPEG", **options)


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_whole_picture_is_taken_upright_in_rgb(name):
    content, expected = ACCEPTED[name]
    image = decode(content)
    assert (image.mode, image.size, image.info) == ("RGB", expected.size, {})
    quarters = [image.getpixel((x, y)) for y, x in itertools.product((12, 36), (16, 48))]
    np.testing.assert_allclose(quarters, expected.colors, atol=expected.tolerance)


@pytest.mark.parametrize("name", REJECTED)
def test_what_is_no_whole_picture_is_rejected_with_the_reason(name):
    content, expected = REJECTED[name]
    with pytest.raises(Rejected) as caught:
        decode(content)
    assert caught.value.reason == expected.reason
    assert expected.detail in caught.value.detail
    assert " at 0x" not in caught.value.detail


def test_all_reasons_are_explained_and_met():
    assert {expected.reason for _, expected in REJECTED.values()} == set(images.REASONS)


def test_a_rejection_says_why_and_survives_another_process():
    rejected = pickle.loads(pickle.dumps(Rejected("truncated", "JPEG")))
    assert (rejected.reason, rejected.detail) == ("truncated", "JPEG")
    assert str(rejected) == "truncated: JPEG"
    assert str(Rejected("empty file")) == "empty file"


def test_files_are_written_with_what_is_expected_of_them(tmp_path):
    expected = broken.make_broken(tmp_path / "raw")
    assert len(expected) >= 24
    assert set(expected) == {path.name for path in (tmp_path / "raw").iterdir()}
    readable = [decode(content).tobytes() for content, _ in ACCEPTED.values()]
    # All but the plain ones: black and white, and without any colour.
    assert len(set(readable)) >= len(readable) - 2


def test_nothing_is_printed_and_nothing_is_allocated_for_bombs(tmp_path):
    broken.make_broken(tmp_path)
    script = """
import pathlib, resource, sys
from lumina_jax.data import images

def run(names):
    for path in names:
        try:
            images.decode(path.read_bytes())
        except images.Rejected:
            pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

paths = sorted(pathlib.Path(sys.argv[1]).iterdir())
bombs = [path for path in paths if "bomb" in path.name]
print(len(bombs), -run(set(paths) - set(bombs)) + run(bombs))
"""
    command = [sys.executable, "-W", "default", "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    num_bombs, megabytes = map(int, done.stdout.split())
    assert num_bombs >= 4
    assert megabytes < 50


def test_the_limit_of_pixels_is_exact():
    assert decode(JPEG, max_pixels=64 * 48).size == (64, 48)
    with pytest.raises(Rejected, match="too many pixels: JPEG of 64 x 48"):
        decode(JPEG, max_pixels=64 * 48 - 1)


def test_a_jpeg_of_endless_scans_is_rejected():
    # Its second scan again and again, each time complete. Encoders write ten, all different.
    parts = broken.save(broken.card((9, 9, 9)), "JPEG", progressive=True).split(b"\xff\xda")
    scan = parts[2][:7] + b"\0" + parts[2][8:]  # all bits at once
    content = b"\xff\xda".join([*parts[:2], *[scan] * 300]) + b"\xff\xd9"
    assert decode(content, max_pixels=2 * 64 * 48).size == (64, 48)
    with pytest.raises(Rejected, match="too many pixels"):
        decode(content, max_pixels=64 * 48)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param(b"JFIF\0\1", b"JFIF\0\7", id="version"),
        pytest.param(b"\0\x3f\0", b"\0\x3e\0", id="scan"),
    ],
)
def test_a_jpeg_with_an_odd_header_is_taken(old, new):
    assert JPEG.count(old) == 1
    odd = JPEG.replace(old, new)
    with pytest.raises(ValueError, match=images._HARMLESS.pattern):
        decode_stored(odd, np.empty((48, 64, 3), np.uint8))
    assert decode(odd).tobytes() == decode(JPEG).tobytes()


def test_the_pixels_of_a_photograph_are_those_of_pillow():
    for name, content in photographs():
        with Image.open(io.BytesIO(content)) as opened:
            image = opened.convert("RGB")
        if name == "rocket.jpg":  # is in Adobe RGB
            profiles = (io.BytesIO(image.info["icc_profile"]), ImageCms.createProfile("sRGB"))
            image = ImageCms.profileToProfile(image, *profiles)
        assert decode(content).tobytes() == image.tobytes(), name


def test_most_damage_inside_a_jpeg_is_found():
    # Zeros over a hundredth of the file, at a hundred places. Pillow takes every one.
    pixels = np.asarray(decode(dict(photographs())["china.jpg"]))[:128, :128]
    content = jpeg_of(pixels)
    width, found = len(content) // 100, 0
    for place in np.linspace(700, len(content) - width - 2, 100).astype(int):
        damaged = content[:place] + bytes(width) + content[place + width :]
        Image.open(io.BytesIO(damaged)).load()
        try:
            decode(damaged)
        except Rejected as rejected:
            found += rejected.reason == images.DAMAGED
    assert found >= 90


def test_sixteen_bits_are_scaled_and_rounded():
    values = np.array([[0, 128, 129, 256, 257, 32767, 32768, 65406, 65407, 65535]], np.uint16)
    image = decode(broken.save(Image.fromarray(values), "PNG"))
    expected = np.round(values / 65535 * 255)
    np.testing.assert_array_equal(np.asarray(image)[..., 0], expected)


def test_a_profile_is_applied_to_a_drawing_with_transparency_too():
    drawing = broken.see_through(broken.swap(broken.card((9, 9, 9))))
    image = decode(broken.save(drawing, "PNG", icc_profile=broken.swapped_profile()))
    assert image.getpixel((16, 12)) == (255, 255, 255)
    np.testing.assert_allclose(image.getpixel((48, 12)), broken.GREEN, atol=1)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_what_is_transparent_becomes_white(mode):
    image = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    pixels = np.asarray(to_rgb(image.convert(mode)))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [200, 200, 200]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBX", "I;16", "F"])
def test_every_mode_of_colors_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (2, 2))).mode == "RGB"


@pytest.mark.parametrize("mode", ["I", "LAB", "HSV"])
def test_numbers_that_are_no_colors_are_rejected(mode):
    with pytest.raises(Rejected, match=rf"unsupported format: pixels of Pillow's mode {mode}"):
        to_rgb(Image.new(mode, (2, 2)))


def test_threads_may_decode_at_the_same_time():
    done = []

    def work():
        for content, expected in ACCEPTED.values():
            done.append(decode(content).size == expected.size)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [True] * 4 * len(ACCEPTED)


@pytest.fixture(scope="module")
def crops():
    """Crops of 64 x 96 pixels of all real pictures."""
    return [np.asarray(decode(content))[90:154, 80:176] for _, content in photographs()]


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {"subsampling": -1}),  # what Pillow does by itself
        ("JPEG", {"subsampling": 0, "progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
    ],
)
def test_a_stored_picture_is_decoded_into_its_row_as_pillow_does(crops, format, options):
    batch = np.full((3, 64, 96, 3), 77, np.uint8)
    for crop in crops:
        content = broken.save(Image.fromarray(crop), format, **options)
        decode_stored(content, batch[1])
        np.testing.assert_array_equal(batch[1], np.asarray(Image.open(io.BytesIO(content))))
    assert (batch[[0, 2]] == 77).all()


def test_a_stored_jpeg_that_is_cut_anywhere_raises(crops):
    content, out = jpeg_of(crops[0]), np.empty((64, 96, 3), np.uint8)
    faults = r"[Pp]remature end|Corrupt|subsampling|cannot identify"
    for length in (*range(0, len(content), 37), len(content) - 2, len(content) - 1):
        for end in b"", b"\xff\xd9":  # with an end Pillow would take it
            if length + len(end) < len(content):
                with pytest.raises((ValueError, OSError), match=faults):
                    decode_stored(content[:length] + end, out)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_another_stored_picture_that_is_cut_raises(crops, format):
    content, out = broken.save(Image.fromarray(crops[0]), format), np.empty((64, 96, 3), np.uint8)
    with pytest.raises(OSError, match=r"truncated|could not create decoder"):
        decode_stored(content[: len(content) // 2], out)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"<html>", bytes(999)])
def test_garbage_is_no_stored_picture(content):
    with pytest.raises((ValueError, OSError), match=r"subsampling|cannot identify"):
        decode_stored(content, np.empty((64, 96, 3), np.uint8))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 95), (64, 97), (65, 96), (32, 192), (1, 1)])
def test_a_stored_picture_of_another_size_raises(crops, format, shape):
    content = broken.save(Image.fromarray(crops[0]), format)
    with pytest.raises(ValueError, match=r"the picture is 96x64, not|buffer is too small"):
        decode_stored(content, np.empty((*shape, 3), np.uint8))


def test_a_place_with_gaps_is_refused(crops):
    with pytest.raises(ValueError, match="contiguous"):
        decode_stored(jpeg_of(crops[0]), np.empty((64, 192, 3), np.uint8)[:, ::2])


@pytest.mark.parametrize("decoder", ["raw", "stored"])
def test_a_picture_of_50000_by_50000_is_refused_and_not_made_room_for(decoder):
    content = broken.png_of(50_000, 50_000, bytes(2**16))
    out = np.empty((48, 64, 3), np.uint8)
    tracemalloc.start()
    with pytest.raises((Rejected, Image.DecompressionBombError), match=r"too many|exceeds limit"):
        decode(content) if decoder == "raw" else decode_stored(content, out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_a_text_in_a_picture_that_unpacks_to_gigabytes_is_refused():
    bomb = zlib.compress(bytes(2**28), 9)
    chunk = b"zTXt" + b"Comment\0\0" + bomb
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png = broken.png_of(8, 8, bytes(8 * 25))
    with pytest.raises(Rejected, match="too large"):
        decode(png[:33] + chunk + png[33:])
