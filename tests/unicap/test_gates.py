"""Every fault is found, and captions as good models write them are let through."""

import pytest

from lumina_jax.data.images import Rejected
from lumina_jax.unicap.backends.base import Reply
from lumina_jax.unicap.gates import FAULTS, Gates, check_reply, tidy
from lumina_jax.unicap.prompts import load_prompts

LONG = (
    "A close-up photograph of a tabby cat with amber eyes and white whiskers, its head turned "
    "slightly to the left. The fur is striped in grey, brown and black, with a pale patch under "
    "the chin. Behind the cat a blurred beige wall catches warm light from the right, and a strip "
    "of dark wood runs along the bottom edge of the frame."
)
LONG_ZH = (
    "一张虎斑猫的特写照片，猫有琥珀色的眼睛和白色的胡须，头微微转向左侧。毛发带有灰色、棕色和黑色的条纹，"
    "下巴处有一块浅色的斑。猫的身后是一面模糊的米色墙壁，右侧有温暖的光线，画面底部有一条深色的木头。"
)
# What a strict gate would take for a fault: each has something that looks like one.
GOOD = [
    ("long", "en", LONG),
    ("long", "zh", LONG_ZH),
    ("medium", "en", 'A shop window with a paper sign that reads "Sorry, we are closed. I cannot '
     'help you today." A grey bicycle leans against the red brick wall below it.'),
    ("medium", "en", 'A street poster in Paris says "Liberté, égalité, fraternité pour tous les '
     'citoyens de la ville" above a row of blue chairs on a wet pavement.'),
    ("medium", "en", 'A 12" vinyl record lies on a wooden table beside a cup of black coffee; the '
     "label in its middle is orange."),
    ("medium", "en", "Three children in yellow raincoats jump, jump and jump again in a puddle, "
     "while a brown dog watches from the left (its leash lies on the ground)."),
    ("medium", "en", "A line chart titled “Sales (2019–2023)” with a blue and a red line; the axis "
     "goes from 0 to 100 and the red one ends above the blue one."),
    ("medium", "en", "Sorry-looking puppy with wet brown fur sits in a tin bath, its paws on the "
     "rim, in front of a tiled white wall with a round mirror."),
    ("short", "en", "Here be dragons: an old map of an island with a sea monster."),
    ("short", "en", "A golden retriever running on a beach at sunset."),
    ("short", "en", "Surely the tallest tower of a sand castle, with a paper flag."),
    ("short", "zh", "一只金毛犬在日落的海滩上奔跑。"),
    ("short", "ja", "夕焼けの砂浜を走るゴールデンレトリバー。"),
    ("short", "de", "Ein brauner Hund läuft am Abend über den nassen Strand."),
    ("medium", "de", "Ein Laden mit einem Schild, auf dem „Wir haben heute leider geschlossen“ "
     "steht. Darunter lehnt ein graues Fahrrad an der roten Wand."),
    ("medium", "fr", "Une boutique avec une pancarte où l'on lit « Fermé aujourd'hui ». Un vélo "
     "gris est appuyé contre le mur de briques rouges."),
    ("tags", "en", "photo, golden retriever, beach, sunset, running, wet sand, low angle"),
    ("tags", "zh", "照片, 金毛犬, 海滩, 日落, 奔跑, 湿沙, 低角度"),
    ("medium", "zh", "一张街景照片，红砖墙前停着一辆灰色自行车，墙上的牌子写着"
     "“抱歉，本店今日休息”，旁边有两盆绿色植物。"),
    ("medium", "en", "A flag with horizontal stripes that alternate red, white, red, white, red, "
     "white, red, white, flying above a stone tower under a pale sky."),
    ("medium", "en", "A chat on a phone shows grey and blue bubbles; the last one ends with a smiley "
     ":) and the keyboard is open below it."),
    ("medium", "en", "A diagram with three panels: a) a red circle, b) a blue square, c) a green "
     "triangle, each on a white ground with thin black borders."),
    ("medium", "en", "A 24” computer monitor on an oak desk shows a photograph of a mountain lake, "
     "beside it a white keyboard and a black mouse."),
    ("medium", "en", "No image is visible on the cinema screen, which glows plain white above rows "
     "of empty red seats in a dark hall."),
    ("short", "en", "I can't believe it's not butter tub on a kitchen counter."),
    ("medium", "zh", "一张iPhone 15 Pro的产品照片，钛金属边框，Apple标志居中，背景为纯黑色，光线从左侧打来。"),
    ("tags", "en", 'street, shop, sign reading "OPEN", neon light, night'),
    ("tags", "en", "vintage photo, 3.5 mm jack, 2.5D illustration, headphones, black cable"),
    ("tags", "en", "Trattoria, pasta alla carbonara, tiramisu, espresso, Roma, piazza, Vespa"),
    ("tags", "ja", "写真、風景、山、湖、朝霧、反射、静寂、自然光、広角、青空、森林"),
    ("tags", "ar", "صورة، سوق، توابل، ألوان زاهية، بائع، ضوء طبيعي"),
]  # fmt: skip
BAD = [
    ("refusal", "long", "en", "I'm sorry, but I can't help with describing this image. " * 6),
    ("refusal", "short", "en", "I cannot identify people in this photograph."),
    ("refusal", "short", "en", "As an AI language model, I don't see images."),
    ("refusal", "short", "en", "Unfortunately, I am unable to view the picture."),
    ("refusal", "short", "en", "There is no image provided, so nothing can be said."),
    ("refusal", "medium", "zh", "抱歉，我无法描述这张图片的内容，因为它违反了"
     "相关的使用规定，请换一张图片。"),
    ("refusal", "medium", "zh", "I'm sorry, I cannot translate this description into Chinese now."),
    ("chatter", "short", "en", "Sure! A golden retriever running on a beach."),
    ("chatter", "short", "en", "Here is a short caption: a dog running on a beach."),
    ("chatter", "short", "en", "Caption: a dog running on a beach at sunset."),
    ("chatter", "medium", "en", "A golden retriever runs on a beach at sunset, its fur wet and its "
     "tongue out. Let me know if you would like more detail!"),
    ("chatter", "short", "zh", "好的，一只狗在海滩上奔跑。"),
    ("chatter", "short", "zh", "以下是描述：一只狗在海滩上奔跑。"),
    ("loop", "medium", "en", "A dog on a beach, " + "and a cat, " * 12),
    ("loop", "long", "en", "The wall is red. The door is green and the roof is grey. " * 7),
    ("loop", "medium", "zh", "一只狗在海滩上，" + "很大很大的" * 10),
    ("markup", "medium", "en", "**Style**: photograph of a golden retriever that runs on the beach "
     "at sunset, its fur wet and its tongue out."),
    ("markup", "medium", "en", "- a golden retriever with wet fur\n- a beach at sunset with a pink "
     "sky\n- small waves in the background"),
    ("markup", "medium", "en", "<p>A golden retriever runs on the beach at sunset, its fur wet and "
     "its tongue out, small waves behind it.</p>"),
    ("markup", "medium", "en", "## Description\nA golden retriever runs on the beach at sunset, "
     "its fur wet and its tongue out."),
    ("unbalanced", "medium", "en", "A golden retriever (with wet fur runs on the beach at sunset, "
     "its tongue out, small waves behind it."),
    ("unbalanced", "medium", "en", 'A sign says "Open in blue letters above the door of a small '
     "shop with a green awning and a bench."),
    ("unbalanced", "medium", "zh", "一张街景照片，红砖墙前停着一辆灰色自行车，墙上的牌子写着"
     "“本店休息，旁边有两盆绿色植物。"),
    ("wrong language", "long", "en", LONG_ZH),
    ("wrong language", "long", "zh", LONG),
    ("wrong language", "medium", "en", "A golden retriever runs on the beach. 画面的背景是"
     "一片粉红色的天空和几朵小小的浪花，光线非常柔和温暖。"),
    ("wrong language", "short", "en", "Ein brauner Hund läuft am Abend über den nassen Strand."),
    ("wrong language", "short", "ja", "一只金毛犬在日落时分的海滩上快乐地奔跑着。"),
    ("wrong language", "tags", "zh", "photo, golden retriever, beach, sunset, running, wet sand"),
    ("too short", "long", "en", "A golden retriever runs on a beach."),
    ("too long", "short", "en", LONG),
    ("too long", "tags", "en", ", ".join(f"thing number {n}" for n in range(60))),
    ("refusal", "short", "en", "I’m unable to view or analyze images."),
    ("refusal", "short", "en", "I apologize, but I cannot describe this picture."),
    ("refusal", "short", "en", "It seems that no image was attached to your message."),
    ("refusal", "short", "en", "Image description unavailable."),
    ("refusal", "short", "de", "Es tut mir leid, ich kann dieses Bild nicht beschreiben."),
    ("refusal", "short", "ja", "申し訳ありませんが、この画像の説明をすることはできません。"),
    ("refusal", "short", "zh", "您好，您没有上传任何图片，请上传后再试。"),
    ("chatter", "short", "en", "Sure thing! A golden retriever on a beach."),
    ("chatter", "short", "de", "Natürlich! Hier ist die Übersetzung: Ein Hund am Strand."),
    ("chatter", "short", "zh", "当然可以！以下是描述：一只狗在海滩上奔跑。"),
    ("chatter", "short", "en", "A dog on a beach. (Word count: 45)"),
    ("chatter", "short", "en", "A dog on a beach. Note: this description is based on the image."),
    ("markup", "short", "en", '{"caption": "A golden retriever on a beach."}'),
    ("markup", "medium", "en", "| Subject | Colour |\n|---|---|\n| dog | brown, with wet fur and a "
     "long tail |"),
    ("chatter", "medium", "en", "User: describe it. Assistant: A golden retriever runs on the beach "
     "at sunset, its fur wet."),
    ("damaged text", "short", "en", "A golden \ufffd\ufffd retriever on a beach."),
    ("damaged text", "short", "en", "A golden \ud83d retriever on a beach."),
    ("wrong language", "short", "zh", "A cat on a sofa."),
    ("wrong language", "short", "ja", "Red cat on a sofa."),
    ("wrong language", "tags", "zh", "photo, cat, sofa"),
    ("wrong language", "tags", "de", "a brown dog, the sandy beach, evening sun, wet sand, running"),
    ("wrong language", "medium", "en", "A cat sits on a red 沙发 beside a window with white curtains, "
     "in 温暖的光线 from the left."),
    ("wrong language", "medium", "zh", "一只橘猫坐在窗边的红色沙发上，窗帘是白色的，光线温暖，and the wall is "
     "white behind it."),
    ("cut off", "medium", "en", "A golden retriever runs on the beach at sunset, its fur wet and its "
     "tongue out, and the"),
    ("too long", "short", "en", "A dog. " * 100_000),
    ("refusal", "short", "en", "Unfortunately, the image you provided appears to be blank."),
    ("refusal", "short", "ar", "عذرًا، لا أستطيع وصف هذه الصورة."),
    ("chatter", "short", "en", "Write a short caption of 8 to 20 words for this image."),
    ("chatter", "short", "zh", "请用中文详细描述这张图片的内容，包括主体和背景。"),
    ("chatter", "medium", "en", "The user wants a caption of the image. I need to mention the man on a horse in a field, and the style."),
    ("markup", "tags", "en", '```json\n["cat", "sofa", "window", "sunlight"]\n```'),
    ("damaged text", "short", "fr", "Une fenÃªtre ouverte donne sur un jardin."),
    ("loop", "short", "en", f'A neon sign in an alley reads "{"HA" * 40}" above a door.'),
    ("empty", "short", "en", " ... "),
]  # fmt: skip


@pytest.fixture(scope="module")
def prompts():
    return load_prompts()


def check(prompts, kind, language, text, **given):
    gates = Gates(prompts, ("en", "zh", "de", "ja", "ar", "fr"))
    return gates.check(tidy(text, kind), kind=kind, language=language, **given)


@pytest.mark.parametrize(("kind", "language", "text"), GOOD)
def test_good_captions_pass(prompts, kind, language, text):
    assert check(prompts, kind, language, text) is None


@pytest.mark.parametrize(("fault", "kind", "language", "text"), BAD)
def test_each_fault_is_found(prompts, fault, kind, language, text):
    found = check(prompts, kind, language, text)
    assert found is not None
    assert found.name == fault, found
    assert fault in FAULTS


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", ["long", "medium", "short", "tags"])
def test_a_prompt_that_is_repeated_is_an_echo(prompts, kind, language):
    asked = prompts.look(kind, language)
    last = asked.splitlines()[0]
    assert check(prompts, kind, language, f"{last}", asked=asked).name == "prompt echo"


def test_an_answer_that_quotes_few_words_of_the_prompt_is_none(prompts):
    asked = prompts.look("long", "en")
    text = f"In the foreground, background and middle: {LONG}"
    assert check(prompts, "long", "en", text, asked=asked) is None


def test_a_level_that_repeats_another_one_is_a_duplicate(prompts):
    given = {"siblings": {("long", "en"): LONG}}
    found = check(prompts, "medium", "en", f"{LONG.upper()}", **given)
    assert found.name == "duplicate"
    assert "its long caption in en" in found.detail


def test_tags_may_be_the_same_in_two_languages(prompts):
    siblings = {("tags", "en"): "pizza, basilico, mozzarella"}
    assert check(prompts, "tags", "it", "pizza, basilico, mozzarella", siblings=siblings) is None


def test_two_pictures_share_no_long_caption_but_may_share_a_short_one(prompts):
    gates = Gates(prompts, ("en",))
    assert gates.check(LONG, kind="long", language="en", id="a.jpg") is None
    found = gates.check(LONG.lower(), kind="long", language="en", id="b.jpg")
    assert found == ("duplicate", "the text of a.jpg")
    for id in ("a.jpg", "b.jpg"):
        short = "A red apple on a table."
        assert gates.check(short, kind="short", language="en", id=id) is None


def test_a_reply_without_end_or_answer_is_a_fault():
    assert check_reply(Reply("A dog", finished=False, num_tokens=128)).name == "cut off"
    assert check_reply(Reply("", fault=Rejected("refused", "400"))).name == "no answer"
    assert check_reply(Reply("A dog.")) is None


@pytest.mark.parametrize(
    ("kind", "given", "tidied"),
    [
        ("short", '  "A dog."\n', "A dog."),
        ("short", "“一只狗。”", "一只狗。"),
        ("short", '"A dog" beside "a cat"', '"A dog" beside "a cat"'),
        ("short", "<think>It is a dog.\n\nYes.</think>\n\nA dog.", "A dog."),
        ("tags", "dog, Beach,\n sunset , dog,, low angle.", "dog, Beach, sunset, low angle"),
        ("tags", "- dog\n- beach\n- sunset", "dog, beach, sunset"),
        ("tags", "1. dog\n2. beach", "dog, beach"),
        ("tags", '3.5 mm jack, sign "a, b", "OPEN", #cat', '3.5 mm jack, sign "a, b", OPEN, cat'),
        ("tags", "كلب، شاطئ؛ غروب", "كلب, شاطئ, غروب"),
        ("tags", "狗、海滩，日落；低角度", "狗, 海滩, 日落, 低角度"),
    ],
)
def test_what_is_around_an_answer_comes_off(kind, given, tidied):
    assert tidy(given, kind) == tidied
