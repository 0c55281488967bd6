"""The page: what is on it, and what nobody can put on it."""

import base64
import dataclasses
import hashlib
import html.parser
import io
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from lumina_jax.data import caption_table
from lumina_jax.data.caption_table import Excluded, Piece, Row, Written
from lumina_jax.data.captions import KINDS
from lumina_jax.data.images import Rejected
from lumina_jax.data.sources.folder import FolderSource
from lumina_jax.unicap import page, statistics
from lumina_jax.unicap.page import Shown, escape
from lumina_jax.unicap.pictures import describe_source
from lumina_jax.unicap.report import Counts
from tests import small_data
from tests.small_data import ListSource
from tests.test_demo import browser_page  # noqa: F401
from tools.photographs import photographs

ROOT = pathlib.Path(__file__).parents[2]

# Of the photographs, written by hand: long, medium, short and tags, in English and in Chinese.
CAPTIONS = {
    "astronaut.png": {
        "en": (
            "Portrait of a smiling woman with short, light brown hair in an orange pressure suit, "
            "with a wide dark metal ring around her neck. On her chest are a round purple mission "
            "patch and a dark name tag with silver wings, and a white strap runs down the front. "
            "She rests her arm beside a white helmet whose black visor reflects a bright window. "
            "On the left hangs the flag of the United States, and on the right, before a mottled "
            "grey backdrop, stands a model of a space shuttle with its brown tank and two white "
            "boosters. The light is soft and even, as in an official studio portrait.",
            "A smiling astronaut in an orange suit poses with her helmet, between the flag of the "
            "United States and a model of a space shuttle.",
            "A portrait of an astronaut in an orange suit",
            "portrait, woman, astronaut, orange pressure suit, helmet, flag, space shuttle model",
        ),
        "zh": (
            "一位留着浅棕色短发的女宇航员面带微笑，身穿橙色压力服，颈部是一圈宽大的深色金属环。"
            "她胸前有一枚圆形的紫色任务徽章和一块带银色飞翼的深色名牌，一条白色带子垂在身前。"
            "她身旁放着一顶白色头盔，黑色面罩映出明亮的窗户。左侧悬挂着美国国旗，"
            "右侧在斑驳的灰色背景前立着一架航天飞机模型，带有棕色燃料箱和两枚白色助推器。"
            "光线柔和均匀，是一张正式的棚拍肖像。",
            "一位身穿橙色宇航服的女宇航员微笑着与头盔合影，身后是美国国旗和航天飞机模型。",
            "身穿橙色宇航服的女宇航员肖像",
            "肖像，女性，宇航员，橙色压力服，头盔，国旗，航天飞机模型",
        ),
    },
    "chelsea.png": {
        "en": (
            "A close-up of the face of a tabby cat that looks past the camera to the right. Its "
            "fur is sandy and grey-brown, with dark stripes on the forehead and cheeks and a pale "
            "chin. The eyes are large and yellow-green with round, dark pupils, the nose is "
            "brick-red with a dark rim, and long white whiskers spread to both sides. One pink ear "
            "is cut off by the edge of the frame. The background is a soft blur of white and "
            "brown.",
            "The face of a sandy tabby cat with yellow-green eyes and long white whiskers, seen "
            "from very near.",
            "A close-up of a tabby cat",
            "cat, tabby, close-up, green eyes, whiskers, fur, blurred background",
        ),
        "zh": (
            "一只虎斑猫的面部特写，它的目光越过镜头望向右侧。毛色是沙黄与灰褐相间，"
            "额头和脸颊上有深色条纹，下巴颜色较浅。一双大眼睛呈黄绿色，瞳孔又圆又黑，"
            "砖红色的鼻子镶着深色的边，长长的白色胡须向两侧伸展。一只粉色的耳朵被画面边缘截去。"
            "背景是白色与棕色的柔和虚化。",
            "一只沙黄色虎斑猫的近距离面部特写，黄绿色的眼睛，长长的白色胡须。",
            "虎斑猫的面部特写",
            "猫，虎斑，特写，绿色眼睛，胡须，毛发，虚化背景",
        ),
    },
    "china.jpg": {
        "en": (
            "An octagonal Chinese pavilion of several storeys rises above green trees beside a "
            "wide, hazy lake. Its roofs of orange tiles have turquoise edges and curl up at the "
            "corners, and a golden knob crowns the top. Dark red columns and lattice windows "
            "surround each storey, under eaves painted in blue and green. Small boats and an "
            "island lie on the pale water behind, and the far shore fades into mist under a light "
            "blue sky with thin clouds.",
            "A tall Chinese pavilion with orange and turquoise roofs stands among trees above a "
            "hazy lake.",
            "A Chinese pavilion above a lake",
            "pavilion, Chinese architecture, tiled roofs, lake, trees, haze, blue sky",
        ),
        "zh": (
            "一座多层的八角形中式楼阁耸立在绿树之上，旁边是开阔而朦胧的湖面。橙色瓦顶镶着青绿色的边，"
            "檐角上翘，顶端是金色的宝顶。每层都环绕着暗红色的柱子和花格窗，屋檐下绘有蓝绿色的彩画。"
            "远处浅色的水面上有小船和一座小岛，对岸隐没在薄雾之中，淡蓝色的天空飘着几缕薄云。",
            "一座橙瓦青边的中式楼阁矗立在树丛之中，俯瞰薄雾笼罩的湖面。",
            "湖边的中式楼阁",
            "楼阁，中式建筑，瓦顶，湖泊，树木，薄雾，蓝天",
        ),
    },
    "coffee.png": {
        "en": (
            "A small espresso in a thick cup, reddish brown outside and white inside, on a saucer "
            "of the same reddish brown. A short metal spoon leans on the saucer to the right of "
            "the cup and reflects the light. The golden coffee fills the lower half of the cup. "
            "The saucer stands on a worn wooden table whose warm orange grain runs diagonally, and "
            "the upper left corner falls into darkness.",
            "An espresso in a reddish-brown cup and saucer with a small spoon, on a worn wooden "
            "table.",
            "An espresso on a wooden table",
            "espresso, coffee, cup, saucer, spoon, wooden table, warm light",
        ),
        "zh": (
            "一小杯意式浓缩咖啡，杯壁厚实，外侧红褐色，内侧白色，放在同样红褐色的碟子上。"
            "杯子右侧的碟上斜靠着一把反光的短金属勺。金黄色的咖啡约占杯子的下半部分。"
            "碟子摆在一张磨旧的木桌上，温暖的橙色木纹沿对角线延伸，左上角没入黑暗之中。",
            "红褐色杯碟中的一杯浓缩咖啡，配一把小勺，放在磨旧的木桌上。",
            "木桌上的一杯浓缩咖啡",
            "浓缩咖啡，咖啡，杯子，碟子，勺子，木桌，暖光",
        ),
    },
    "rocket.jpg": {
        "en": (
            "A slender white rocket stands upright on its launch pad at dusk. Two thin lightning "
            "towers rise at some distance on either side, and the steel lattice of two nearer "
            "towers closes the frame on the left and the right. Bright lamps along the ground "
            "shine as orange and white stars. The sky is a clear deep blue, darker towards the "
            "top, with a low band of grey clouds above the horizon.",
            "A white rocket on its launch pad at dusk, between lattice towers and bright lamps.",
            "A rocket on its launch pad at dusk",
            "rocket, launch pad, dusk, lattice towers, lamps, deep blue sky",
        ),
        "zh": (
            "黄昏时分，一枚修长的白色火箭直立在发射台上。两侧稍远处各有一座细高的避雷塔，"
            "更近的两座钢格构塔架在画面左右形成边框。地面上的灯光明亮，呈橙色和白色的星芒。"
            "天空是清澈的深蓝色，越往上越暗，地平线上方有一条低矮的灰色云带。",
            "黄昏中的白色火箭立在发射台上，周围是格构塔架和明亮的灯光。",
            "黄昏时发射台上的火箭",
            "火箭，发射台，黄昏，格构塔架，灯光，深蓝天空",
        ),
    },
}
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)
MODEL, PROMPTS = "written by hand", "none"


def make_table(folder: pathlib.Path, is_complete: bool = True) -> pathlib.Path:
    """A table of photographs in a folder beside it, one of which is broken."""
    pictures, table = folder / "photographs", folder / "captions"
    pictures.mkdir()
    table.mkdir()
    for name, content in photographs():
        if name in (*CAPTIONS, "motorcycle_left.png"):
            (pictures / name).write_bytes(content)
    (pictures / "broken.jpg").write_bytes((pictures / "rocket.jpg").read_bytes()[:9000])
    rows = [
        Row(
            name,
            tuple(
                Written(text, kind, language, MODEL, PROMPTS, int(name == "china.jpg"))
                for language, texts in by_language.items()
                for kind, text in zip(KINDS, texts, strict=True)
            ),
        )
        for name, by_language in CAPTIONS.items()
    ]
    loop = "A red motorcycle in a garage, and " + "a shelf, and a box, and " * 12 + "a shelf."
    rows.append(Row(
        "motorcycle_left.png",
        (
            Written("A red motorcycle in a garage", "short", "en", MODEL, PROMPTS, 0),
            Written("摩托车，红色，车库，货架，长椅", "tags", "zh", MODEL, PROMPTS, 2),
        ),
        (
            Excluded("long", "en", "loop", "“a shelf, and a box, and” 12 times in a row", loop),
            Excluded("long", "zh", "refusal", "begins with “抱歉”", "抱歉，我无法查看这张图片。"),
        ),
    ))  # fmt: skip
    broken = Row("broken.jpg", fault=("truncated", "JPEG: Premature end of JPEG file"))
    rows = sorted([*rows, broken], key=lambda row: row.id)
    source = describe_source(FolderSource(str(pictures), needs_captions=False))
    (table / caption_table.SETTINGS).write_text(json.dumps({"source": source}))
    caption_table.write_rows(table, Piece(0, 0), rows[:4])
    if is_complete:
        caption_table.write_rows(table, Piece(0, 1), rows[4:])
        index = caption_table.PartIndex()
        index.add(rows[:4])
        index.add(rows[4:])
        index.save(table, 0, Counts())
        caption_table.finish(table, Counts())
    return table


def show_captions(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/show_captions.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


class Parsed(html.parser.HTMLParser):
    """The tags of a page with their attributes, and the text of each class."""

    def __init__(self, content: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text.append(text)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def render(*shown: Shown, **options) -> str:
    found = statistics.measure([one.row for one in shown], **options.pop("tokens", {}))
    return page.render("A table", [("table", "captions")], found, shown, (), **options)


def row(*captions: tuple[str, str, str], id: str = "a.jpg") -> Row:
    return Row(id, tuple(Written(*caption, "model", "1", 0) for caption in captions))


# Words of others.


def test_words_of_others_are_words_whatever_they_look_like():
    bad = "\"><script>alert(1)</script><img src=x onerror='a()'>&amp;</style>"
    one = Row(
        bad,
        (Written(bad, "long", bad, bad, bad, 0),),
        (Excluded("short", bad, bad, bad, bad), Excluded(bad, "en", bad, bad, bad)),
    )
    fault = Row(bad, fault=(bad, bad))
    found = statistics.measure([one, one, fault])
    shown = [Shown(one, None, bad), Shown(fault, None, bad)]
    content = page.render(bad, [(bad, bad)], found, shown, shown, notes=[bad], settings=bad)
    parsed = Parsed(content)
    assert not parsed.named("script")
    assert not parsed.named("img")
    known = {"class", "lang", "dir", "data-kind", "data-language", "type", "name", "id", "checked",
             "content", "http-equiv", "charset", "open", "aria-label"}  # fmt: skip
    assert {name for _, attributes in parsed.tags for name in attributes} <= known
    assert "".join(parsed.text).count(bad) > 20  # each of them reads as it was written


def test_the_page_forbids_itself_scripts_and_asks_nobody_for_anything():
    content = render(Shown(row(("A cat", "short", "en")), page.thumbnail(picture((9, 9)))))
    parsed = Parsed(content)
    (policy,) = [m["content"] for m in parsed.named("meta") if "http-equiv" in m]
    style = re.search("<style>(.*)</style>", content, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    assert "url(" not in style
    assert "@import" not in style
    for _, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("href", "style", "action", "srcdoc")
            if name in ("src", "srcset"):
                assert value.startswith("data:image/")


def test_what_cannot_be_seen_is_shown_by_its_number():
    for character in "\0\x07\x1b\x7f\x85\u200b\u202e\u2066\ufeff\ud800\U000e0041":
        assert escape(f"a{character}b") == (f'a<span class="unseen">U+{ord(character):04X}</span>b')
    # Line breaks, and what joins the letters of Persian and the persons of an emoji.
    for text in ("a\nb\tc", "می\u200cخواهم", "👩\u200d🚀", "e\u0301", "苹果"):
        assert escape(text) == text
    render(Shown(row(("a \ud800", "short", "en")), None)).encode()


def test_captions_say_their_language_and_its_direction():
    arabic, chinese = "قطة تنام على كرسي أحمر", "一只猫"
    content = render(
        Shown(row((arabic, "short", "ar"), (chinese, "short", "zh"), ("A", "short", "en")), None)
    )
    found = [(p["lang"], p["dir"]) for p in Parsed(content).named("p") if "lang" in p]
    assert sorted(found) == [("ar", "rtl"), ("en", "ltr"), ("zh", "ltr")]
    assert f'<p lang="ar" dir="rtl" class="caption">{arabic}</p>' in content


# What is on it.


def test_a_caption_is_shown_with_its_lengths_and_what_made_it():
    def count_tokens(texts):
        return np.array([len(text.split()) for text in texts])

    content = render(
        Shown(row(("A small cat sleeps", "short", "en"), ("一只小猫", "short", "zh")), None),
        tokens={"count_tokens": count_tokens, "max_tokens": 3}, count_tokens=count_tokens,
    )  # fmt: skip
    english, chinese = re.findall('<p class="small">(.*)</p>', content)
    assert english == (
        '<b class="language">en</b> · 18 characters · 4 words · '
        '<b class="over">4 tokens, over 3</b> · model, prompts 1, seed 0'
    )
    assert chinese == (
        '<b class="language">zh</b> · 4 characters · 4 words · 1 token · model, prompts 1, seed 0'
    )


def test_an_excluded_caption_is_struck_out_with_its_fault():
    excluded = Excluded("long", "en", "refusal", "begins with I'm sorry", "I'm sorry.")
    content = render(Shown(Row("a.jpg", (), (excluded,)), None))
    assert "<s>I&#x27;m sorry.</s>" in content
    assert '<b class="badge">refusal</b> begins with I&#x27;m sorry' in content


def test_each_level_and_language_has_a_button_and_the_style_that_hides_the_others():
    content = render(
        Shown(row(("A", "long", "en"), ("B", "tags", "de"), ("C", "tags", "en")), None)
    )
    parsed = Parsed(content)
    buttons = {(i["name"], i["id"]) for i in parsed.named("input")}
    assert buttons == {
        (name, f"{name}-{key}") for name in ("kind", "language") for key in ("all", 0, 1)
    }
    for name in ("kind", "language"):
        for key in (0, 1):
            rule = f"body:has(#{name}-{key}:checked) [data-{name}]:not([data-{name}='{key}'])"
            assert f"{rule}{{display:none}}" in content
            assert any(a.get(f"data-{name}") == str(key) for _, a in parsed.tags)


@pytest.mark.slow
def test_a_browser_shows_what_is_chosen_and_finds_nothing_wrong(browser_page, tmp_path):  # noqa: F811
    bad = "<script>document.title='bad'</script><img src=x onerror='document.title=1'>"
    one = row(("A cat", "long", "en"), ("一只猫", "long", "zh"), (bad, "tags", "en"))
    (tmp_path / "page.html").write_text(
        render(Shown(one, page.thumbnail(picture((400, 300)))), charts=(PNG, PNG))
    )
    faults = []
    browser_page.on("console", lambda message: faults.append(message.text))
    browser_page.on("requestfailed", lambda request: faults.append(request.url))
    browser_page.goto((tmp_path / "page.html").as_uri())

    def visible():
        return [text for text in ("A cat", "一只猫", bad) if browser_page.get_by_text(
            text, exact=True).is_visible()]  # fmt: skip

    def choose(name, key):
        browser_page.locator(f"label:has(#{name}-{key})").click()

    assert visible() == ["A cat", "一只猫", bad]
    choose("language", 1)
    assert visible() == ["一只猫"]
    choose("language", 0)
    assert visible() == ["A cat", bad]
    choose("kind", 0)
    assert visible() == ["A cat"]
    choose("language", "all")
    assert visible() == ["A cat", "一只猫"]
    assert browser_page.title() == "A table"
    assert browser_page.locator(".picture img").evaluate("image => image.naturalWidth") == 384
    assert browser_page.locator("article").evaluate("a => getComputedStyle(a).display") == "grid"
    assert faults == []


def picture(size: tuple[int, int], turned: bool = False) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    if turned:
        exif[0x0112] = 6  # the top of the picture is at the right of what is stored
    image = Image.new("RGB", size, "red")
    image.paste("blue", (0, 0, size[0] // 2, size[1]))
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def test_thumbnails_are_small_and_upright_and_never_enlarged():
    for content, size in (
        (picture((1000, 500)), (384, 192)),
        (picture((20, 10)), (20, 10)),
        (picture((1000, 500), turned=True), (192, 384)),
        (Image.new("RGBA", (1000, 500)), (384, 192)),
    ):
        with Image.open(io.BytesIO(page.thumbnail(content))) as small:
            assert small.size == size
            assert small.mode == "RGB"
    with pytest.raises(Rejected, match="truncated"):
        page.thumbnail(picture((100, 100))[:400])


# Where the pictures are.


class Watched(ListSource):
    """A source that knows what was read of it."""

    read_ids = ()

    def read(self, part):
        for item in super().read(part):
            Watched.read_ids += (item.id,)
            yield item


def test_pictures_are_found_by_part_and_id_and_a_part_is_read_no_further_than_needed():
    items = [small_data.picture(name, size=(40 + place, 40)) for place, name in enumerate("abcdef")]
    broken = dataclasses.replace(items[5], image=b"GIF89a")
    source = Watched((*items[:5], broken), part_size=3)
    first, second = page.find_pictures(source, {0: {"b"}, 1: {"d", "f", "x"}})
    for found, width in ((first["b"], 41), (second["d"], 43)):
        with Image.open(io.BytesIO(found)) as small:
            assert small.size == (width, 40)
    assert Watched.read_ids == ("a", "b", "d", "e", "f")
    assert second["f"].reason in ("truncated", "damaged")
    assert second["x"].reason == "not in the source any more"
    (beyond,) = page.find_pictures(source, {7: {"y"}})
    assert beyond["y"].reason == "not in the source any more"


# The command.


def test_a_complete_table_becomes_one_page_with_its_pictures(tmp_path):
    table, output = make_table(tmp_path), tmp_path / "shown"
    done = show_captions(f"--table={table}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in output.iterdir()) == ["captions.html", "statistics.png"]
    assert "7 pictures, 6 with captions" in done.stdout
    assert "Still being made" not in done.stdout
    content = (output / "captions.html").read_text()
    parsed = Parsed(content)
    thumbnails = [i for i in parsed.named("img") if i["src"].startswith("data:image/jpeg")]
    assert len(thumbnails) == 6
    for by_language in CAPTIONS.values():
        for texts in by_language.values():
            for text in texts:
                assert f">{escape(text)}</p>" in content
    assert content.count("truncated") == 2  # in the statistics, and at its picture
    assert "抱歉，我无法查看这张图片。</s>" in content
    assert content.count(f"{MODEL}, prompts {PROMPTS}, seed 1") == 8
    assert len(content) < 2_000_000


def test_a_table_under_way_is_shown_as_far_as_it_is_and_pictures_that_are_gone_are_said(tmp_path):
    table, output = make_table(tmp_path, is_complete=False), tmp_path / "shown"
    (tmp_path / "photographs").rename(tmp_path / "elsewhere")
    done = show_captions(f"--table={table}", f"--output={output}", "--num_pictures=1")
    assert done.returncode == 0, done.stderr
    assert "Still being made: so far it has 1 piece(s)." in done.stdout
    content = (output / "captions.html").read_text()
    gone = f"Pictures are missing. {tmp_path}/photographs is not a folder."
    assert gone in done.stdout
    assert gone in content
    assert "data:image/jpeg" not in content
    assert content.count("<article>") == 2  # one, and the broken one besides

    found = show_captions(f"--table={table}", f"--output={output}", f"--input={tmp_path}/elsewhere")
    assert found.returncode == 0, found.stderr
    assert (output / "captions.html").read_text().count("data:image/jpeg") == 3


def test_a_data_set_is_shown_as_a_table_is(dataset, tmp_path):
    done = show_captions(f"--data={dataset}", f"--output={tmp_path}", "--num_pictures=3")
    assert done.returncode == 0, done.stderr
    assert "24 of 24 records" in done.stdout
    content = (tmp_path / "captions.html").read_text()
    assert content.count("data:image/jpeg") == 3
    assert 'lang="ar" dir="rtl"' in content
    assert 'lang="ja" dir="ltr"' in content


@pytest.mark.slow
def test_what_is_missing_is_said(tmp_path, dataset):
    (tmp_path / "settings.json").write_text("{}")
    for arguments, message in [
        ([], "Give --table or --data, one of the two."),
        (["--table=x", "--data=y"], "Give --table or --data, one of the two."),
        ([f"--data={dataset}", "--input=x"], "a data set has its pictures in it"),
        ([f"--data={dataset}", "--num_pictures=1001"], "must be 0 to 1,000"),
        ([f"--data={dataset}", "--num_rows=0"], "reads nothing; give 1 or more"),
        ([f"--table={tmp_path}/none"], "is no table of captions: make one with tools/caption.py"),
        ([f"--table={tmp_path}"], "has no captions yet. Wait until"),
    ]:
        done = show_captions(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
