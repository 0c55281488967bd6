"""A captioner for tests: it looks at the colours of a picture, and answers what it is asked.

It stands where a large model would: what it says follows from the pixels and from the question, so
that a caption of another picture, level or language would be noticed.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from lumina_jax.unicap.backends.base import Reply, Request
from lumina_jax.unicap.prompts import Prompts, load_prompts

_COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "yellow": (240, 210, 40),
    "white": (250, 250, 250), "black": (15, 15, 15), "purple": (130, 50, 160),
    "orange": (240, 140, 30), "grey": (128, 128, 128), "pink": (245, 150, 190),
}  # fmt: skip
_CHINESE = {
    "red": "红", "green": "绿", "blue": "蓝", "yellow": "黄", "white": "白", "black": "黑",
    "purple": "紫", "orange": "橙", "grey": "灰", "pink": "粉红",
}  # fmt: skip
_NUMBERS = re.compile(r"\d+")


def colour_of(image: Image.Image) -> str:
    """The name of the colour nearest to the mean of a picture."""
    mean = np.asarray(image, np.float64).mean(axis=(0, 1))
    return min(_COLOURS, key=lambda name: float(np.sum((mean - _COLOURS[name]) ** 2)))


def write(kind: str, language: str, colour: str, size: str) -> str:
    """A caption that the gates of the built-in prompts let through."""
    shade = _CHINESE[colour]
    width, height = size.split("x")
    return {
        ("long", "en"): (
            f"A flat digital drawing shows one plain {colour} surface that fills the canvas from "
            f"edge to edge, {width} steps wide and {height} steps high. The {colour} paint is even "
            f"and matte, without any texture, shadow or outline. In the middle a small sign reads "
            f'"{size.upper()}" in thin letters. Soft light comes from above, the viewpoint is '
            f"straight ahead, and nothing else stands in front of the {colour} ground."
        ),
        ("medium", "en"): (
            f"A flat drawing of a plain {colour} surface, {width} by {height} steps large, with a "
            f"small sign in the middle. The light is soft and the ground is empty."
        ),
        (
            "short",
            "en",
        ): f"A plain {colour} surface, {width} by {height} steps, with a small sign.",
        ("tags", "en"): f"drawing, {colour} surface, small sign, soft light, {width} wide, empty",
        ("long", "zh"): (
            f"这是一幅平面数字绘画，整个画面被一块{shade}色的平面铺满，宽{width}格，高{height}格。"
            f"{shade}色的颜料均匀而没有光泽，看不到纹理、阴影和轮廓线。画面中央有一块小小的牌子，"
            f"上面用细细的字写着“{size.upper()}”。柔和的光线从上方照下来，视角正对画面，背景空无一物。"
        ),
        ("medium", "zh"): (
            f"平面绘画，一块{shade}色的平面，宽{width}格，高{height}格，中央有一块小牌子，光线柔和，"
            f"背景空旷。"
        ),
        ("short", "zh"): f"一块宽{width}格高{height}格的{shade}色平面，中央有小牌子。",
        ("tags", "zh"): f"绘画, {shade}色平面, 小牌子, 柔和光线, 宽{width}格, 空旷",
    }[kind, language]


class SmallCaptioner:
    """Knows which question it is asked by the prompts, as they are without their caption."""

    def __init__(self, prompts: Prompts | None = None):
        self._questions: dict[str, tuple[str, str]] = {}
        prompts = prompts or load_prompts()
        for language, other in (("en", "zh"), ("zh", "en")):
            for kind in ("long", "medium", "short", "tags"):
                asked = [prompts.look(kind, language), prompts.translate(kind, language, "", other)]
                if kind != "long":
                    asked.append(prompts.condense(kind, language, ""))
                for question in asked:
                    self._questions[question] = kind, language

    def answer(self, prompt: str, image: Image.Image | None) -> str:
        if image is not None:
            return write(
                *self._questions[prompt], colour_of(image), f"{image.width}x{image.height}"
            )
        # Of the kinds that share a question (translations), the length of the caption says which.
        question = max((q for q in self._questions if self._fits(q, prompt)), key=len)
        kind, language = self._questions[question]
        caption = prompt.removeprefix(question.rstrip())
        if "Translate" in question or "翻译" in question:
            kind = self._kind_of(caption, "zh" if language == "en" else "en")
        shades = {**{name: name for name in _COLOURS}, **{c: n for n, c in _CHINESE.items()}}
        found = min(
            (caption.find(shade), name) for shade, name in shades.items() if shade in caption
        )
        numbers = _NUMBERS.findall(caption)
        size = f"{numbers[0]}x{numbers[1]}" if len(numbers) > 1 else f"{numbers[0]}x0"
        return write(kind, language, found[1], size)

    def _fits(self, question: str, prompt: str) -> bool:
        return prompt.startswith(question.rstrip())

    def _kind_of(self, caption: str, language: str) -> str:
        if ", " in caption and caption.strip().startswith(("drawing", "绘画")):
            return "tags"
        marks = {"en": ("digital", "ground"), "zh": ("数字", "平面绘画")}[language]
        if marks[0] in caption:
            return "long"
        return "medium" if marks[1] in caption else "short"


class SmallBackend:
    """The captioner as a backend; `change` may turn answers into faulty ones."""

    def __init__(
        self,
        *,
        change: Callable[[Request, str], str | Reply] | None = None,
        in_threads: bool = False,
        num_pictures: int = 8,
        model: str = "small",
    ):
        self._captioner, self._change = SmallCaptioner(), change
        self.in_threads, self.num_pictures, self.model = in_threads, num_pictures, model
        self.num_asked = 0

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        self.num_asked += len(requests)
        return [self._reply(request) for request in requests]

    def _reply(self, request: Request) -> Reply:
        text = self._captioner.answer(request.prompt, request.image)
        found = self._change(request, text) if self._change else text
        return found if isinstance(found, Reply) else Reply(found, True, 100, len(found) // 4)
