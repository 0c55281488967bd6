"""What an answer must be to become a caption.

Captioning models fail in ways that training would learn: they refuse, repeat what they were asked,
talk to whoever asked, go round in circles, write in another language, or give every picture the
same text. `tidy` takes off what is no fault of the content; `Gates.check` names what is.
"""

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lumina_jax.unicap import languages
from lumina_jax.unicap.backends.base import Reply
from lumina_jax.unicap.prompts import Prompts

FAULTS = {
    "no answer": "the model or its server gave none to this request",
    "cut off": "the answer was longer than it may be",
    "empty": "nothing is left of it",
    "refusal": "the model will not answer, or says that it sees no picture",
    "chatter": "it talks to whoever asked",
    "prompt echo": "it repeats what it was asked",
    "loop": "it says the same again and again",
    "markup": "headings, lists, bold type, code or HTML",
    "unbalanced": "a bracket or a quotation mark without its other half",
    "wrong language": "it, or a sentence of it, is in another language",
    "too short": "below the least length of its kind",
    "too long": "above the most",
    "duplicate": "another level of the same picture, or another picture, has this text",
    "nothing to make it from": "the caption that it is made of did not pass",
}

_QUOTES = (('"', '"'), ("“", "”"), ("「", "」"), ("『", "』"), ("‘", "’"), ("«", "»"))
# Languages differ in which mark begins and which one ends: “en”, „de“, ”sv”, «fr», »da«.
_QUOTED = re.compile(r'"[^"]*"|[“”„][^“”„]*[“”]|[«»][^«»]*[«»]|「[^」]*」|『[^』]*』')
_EVEN = ("“”„", "«»")
_PAIRS = ("()", "[]", "{}", "（）", "《》", "【】", "「」", "『』")
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_MARKUP = re.compile(
    r"""</?[a-zA-Z][^<>]{0,80}>       # HTML
      | ^\s{0,3}\#{1,6}\s             # a heading
      | ^\s{0,3}([-*+•]|\d{1,2}[.)])\s+\S   # an item of a list
      | \*\*[^*\s] | (?<!\w)__[^_\s]  # bold type
      | ``                            # code
      | !?\[[^\]]*\]\([^)]*\)         # a link
      | <\|.*?\|> | &(amp|lt|gt|quot|nbsp);""",
    re.VERBOSE | re.MULTILINE,
)
_BETWEEN_TAGS = re.compile(r"\s*[,，、;；\n]\s*")
_ITEM = re.compile(r"^([-*+•#]|\d{1,2}[.)])\s*")
# A letter of a script without blanks is a word of its own.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W_]+(?:['’-][^\W_]+)*")
_ECHO_WORDS = 9  # in a row, of what was asked; fewer may be chance. Twice as many ideographs
_LOOP_PERIOD, _LOOP_TIMES = 40, 4  # words; how often in a row
_NGRAM, _REPEATED = 4, 0.4  # a text of so many words, and how many of them it may have twice
_BEGINNING = 160  # letters in which a refusal begins, if it is one
_COMPARED = ("long", "medium")  # kinds that two pictures never share; "a red apple" they may


class Fault(NamedTuple):
    """Why an answer is no caption: one of FAULTS, and what was found."""

    name: str
    detail: str = ""


def tidy(text: str, kind: str) -> str:
    """Returns an answer without what is around it: blanks, quotation marks, a thought before it.

    Tags come out once each, with a comma and a blank between them.
    """
    text = _THOUGHT.sub("", text).replace("\u200b", "").strip()
    if kind == "tags":
        tags = (_ITEM.sub("", tag).strip(" .。\"'“”") for tag in _BETWEEN_TAGS.split(text))
        return ", ".join({tag.casefold(): tag for tag in tags if tag}.values())
    for first, last in _QUOTES:
        inner = text[1:-1]
        if text[:1] == first and text[-1:] == last and not {first, last} & set(inner):
            text = inner.strip()
    return text


class Gates:
    """Checks the answers about the pictures of a part; threads may share it.

    Args:
        prompts: what was asked.
        wanted: the languages of the run.
    """

    def __init__(self, prompts: Prompts, wanted: Sequence[str]):
        self._prompts, self._wanted = prompts, tuple(wanted)
        english = dict.fromkeys((*wanted, "en"))  # which models fall back to
        self._refusal, self._begins, self._ends = (
            _any_of(prompts.answers(name, tuple(english)))
            for name in ("refusals", "chatter_begins", "chatter_ends")
        )
        languages.load(wanted)
        self._seen: dict[str, str] = {}  # text -> id of its picture
        self._lock = threading.Lock()

    def check(
        self,
        text: str,
        *,
        kind: str,
        language: str,
        asked: str = "",
        siblings: Mapping[tuple[str, str], str] | None = None,
    ) -> Fault | None:
        """Returns what is wrong with a text, None where nothing is.

        Args:
            text: of `tidy`.
            kind: of the caption that it shall be.
            language: likewise.
            asked: the prompt, without the caption that it was about.
            siblings: the captions of the picture so far, by kind and language.
        """
        if not any(map(str.isalnum, text)):
            return Fault("empty", text[:40])
        prose = _QUOTED.sub('""', text)  # what is quoted may say and be anything
        for name, expression in (("refusal", self._refusal), ("chatter", self._begins)):
            if expression and (
                found := expression.match(prose[:_BEGINNING].lower().lstrip("*\"' "))
            ):
                return Fault(name, found[0])
        last = re.split(r"(?<=[.!?。！？])\s*", prose.strip().lower())
        final = next((piece for piece in reversed(last) if piece), "")
        if self._ends and len(last) > 1 and (found := self._ends.match(final)):
            return Fault("chatter", found[0])
        found = next(self._faults(text, prose, kind, language, asked), None)
        if found is None and (of := self._same(text, kind, language, siblings or {})):
            found = Fault("duplicate", f"the text of {of}")
        return found

    def _faults(
        self, text: str, prose: str, kind: str, language: str, asked: str
    ) -> Iterator[Fault]:
        if echo := _common_run(_words(prose), _words(asked)):
            yield Fault("prompt echo", echo)
        if loop := _loop(_words(prose)):
            yield Fault("loop", loop)
        if kind != "tags" and (found := _MARKUP.search(prose)):
            yield Fault("markup", found[0].strip())
        if found := _unbalanced(text, prose):
            yield Fault("unbalanced", found)
        if found := languages.other_language(prose.replace('""', ""), language, self._wanted):
            yield Fault("wrong language", found)
        least, most = self._prompts.of(language).length[kind]
        size = text.count(", ") + 1 if kind == "tags" else len(text)
        unit = "tags" if kind == "tags" else "characters"
        if size < least:
            yield Fault("too short", f"{size} {unit}, and {least} are the least")
        if size > most:
            yield Fault("too long", f"{size} {unit}, and {most} are the most")

    def _same(
        self, text: str, kind: str, language: str, siblings: Mapping[tuple[str, str], str]
    ) -> str | None:
        key = normalized(text)
        for (other_kind, other_language), other in siblings.items():
            # A word may be the same in two languages; a whole level of them is not.
            related = other_language == language or {kind, other_kind} <= set(_COMPARED)
            if related and normalized(other) == key:
                return f"its {other_kind} caption in {other_language}"
        if kind in _COMPARED:
            with self._lock:
                return self._seen.get(key)
        return None

    def remember(self, text: str, kind: str, id: str) -> None:
        """A text is the caption of a picture, and shall be that of no other."""
        if kind in _COMPARED:
            with self._lock:
                self._seen.setdefault(normalized(text), id)


def check_reply(reply: Reply) -> Fault | None:
    """Returns what is wrong with an answer whatever it says."""
    if reply.fault is not None:
        return Fault("no answer", f"{reply.fault.reason}: {reply.fault.detail}".strip(": "))
    return None if reply.finished else Fault("cut off", f"after {reply.num_tokens} tokens")


def normalized(text: str) -> str:
    """Returns a text without what makes no other text of it: case, blanks, punctuation."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def one_line(text: str) -> str:
    return " ".join(text.split())


def _any_of(expressions: Sequence[str]) -> re.Pattern | None:
    return re.compile("|".join(f"(?:{text})" for text in expressions)) if expressions else None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _common_run(words: Sequence[str], asked: Sequence[str]) -> str | None:
    """Returns a run of words that is in both, if one is long enough."""
    dense = sum(len(word) == 1 and word >= "\u0e00" for word in asked) * 2 > len(asked)
    size = 2 * _ECHO_WORDS if dense else _ECHO_WORDS
    runs = {tuple(asked[i : i + size]) for i in range(len(asked) - size + 1)}
    for i in range(len(words) - size + 1):
        if tuple(words[i : i + size]) in runs:
            return " ".join(words[i : i + size])
    return None


def _loop(words: Sequence[str]) -> str | None:
    """Returns what is said again and again: words in a row, or most of the text."""
    for period in range(1, min(_LOOP_PERIOD, len(words) // _LOOP_TIMES) + 1):
        run = 0
        for i in range(period, len(words)):
            run = run + 1 if words[i] == words[i - period] else 0
            if run >= period * (_LOOP_TIMES - 1) and run + period > _LOOP_TIMES:
                return " ".join(words[i - period + 1 : i + 1])
    runs = [tuple(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1)]
    if len(runs) >= 24 and len(set(runs)) < (1 - _REPEATED) * len(runs):
        return " ".join(max(runs, key=runs.count))
    return None


def _unbalanced(text: str, prose: str) -> str | None:
    for first, last in _PAIRS:
        depth = 0
        for letter in prose:
            depth += (letter == first) - (letter == last)
            if depth < 0:
                return last
        if depth:
            return first
    for marks in _EVEN:
        if sum(text.count(mark) for mark in marks) % 2:
            return next(mark for mark in text if mark in marks)
    inches = len(re.findall(r'\d"', text))  # an odd one may be of a number
    return '"' if text.count('"') % 2 and not inches else None
