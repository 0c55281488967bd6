"""What an answer must be to become a caption.

Captioning models fail in ways that training would learn: they refuse, repeat what they were asked,
talk to whoever asked, go round in circles, write in another language, or give every picture the
same text. `tidy` takes off what is no fault of the content; `Gates.check` names what is.
"""

import collections
import hashlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lumina_jax.unicap import languages
from lumina_jax.unicap.backends.base import Reply
from lumina_jax.unicap.prompts import Prompts

FAULTS = {
    "no answer": "the model or its server gave none to this request",
    "cut off": "the answer was longer than it may be, or ends inside of a sentence",
    "empty": "nothing is left of it",
    "damaged text": "control characters, or the mark of bytes that are no text",
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
_QUOTED = re.compile(r'"[^"]*"|[“”„][^“”„]*[“”]|[«»][^«»]*[«»]|「[^」]*」|『[^』]*』|《[^》]*》')
_EVEN = ("“”„", "«»")
_PAIRS = ("()", "[]", "{}", "（）", "《》", "【】", "「」", "『』")
# Halves that stand alone: 12" and 24”, smileys, the a) of an enumeration.
_ALONE = re.compile(r"(?<=\d)[\"”]|[:;=]['-]?[)(\]\[}{]|(?<!\w)\w{1,2}\)")
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
# Controls, half characters, and UTF-8 that was read as Latin letters: Ã© for é, â€™ for ’.
_DAMAGED = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\ufffd\ufffe\uffff\ud800-\udfff]|Ã[\x80-\xbf]|â€|ðŸ|ï¿½"
)
_VOWELS = re.compile("[\u064b-\u0655]")  # of Arabic, which are written or not
_MARKUP = re.compile(
    r"""</?[a-zA-Z][^<>]{0,80}>       # HTML
      | ^\s{0,3}\#{1,6}\s             # a heading
      | ^\s{0,3}([-*+•]|\d{1,2}[.)])\s+\S   # an item of a list
      | ^\s*\|.*\|                    # a table
      | \*\*[^*\s] | (?<!\w)__[^_\s]  # bold type
      | (?<![\w*])\*[^\W\d_][^*]*\*(?![\w*])   # italics
      | ``                            # code
      | !?\[[^\]]*\]\([^)]*\)         # a link
      | <\|.*?\|> | &(amp|lt|gt|quot|nbsp);
      | ^\s*[{[]\s*""                 # JSON; what it quotes is taken out
      | ^\s*(user|assistant|system|human)\s*:""",
    re.VERBOSE | re.MULTILINE | re.IGNORECASE,
)
_MARKUP_OF_TAGS = re.compile(r"``|[\[\]{}]|<\|")
_STUTTER = re.compile(r"(\w{1,4}?)\1{14,}")  # inside of a word, as in HAHAHAHA...
_TAG = re.compile(r"""(?:"[^"\n]*"|“[^”\n]*”|[^,，、;；،؛\n])+""")
_ITEM = re.compile(r"^\s*([-*+•#]\s*|\d{1,2}[.)]\s+)")
# A letter of a script without blanks is a word of its own.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f]|[^\W_]+(?:['’-][^\W_]+)*")
_ECHO_WORDS = 9  # in a row, of what was asked; fewer may be chance. Twice as many ideographs
_LOOP_PERIOD = 40  # words
_NGRAM, _REPEATED = 4, 0.4  # a text of so many words, and how many of them it may have twice
_BEGINNING, _ENDING = 160, 240  # letters that are looked at for a refusal, and for chatter
_TOO_LONG = 4  # times the most: nothing else is looked for, which would take long
_OPEN_END = ",，、;；:："  # what no sentence ends with, nor with a letter, but in these languages:
_NO_FULL_STOP = ("th",)
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
        tags = (_without_quotes(_tidy_tag(tag)) for tag in _TAG.findall(text))
        return ", ".join({tag.casefold(): tag for tag in tags if tag}.values())
    return _without_quotes(text)


def _tidy_tag(tag: str) -> str:
    return _ITEM.sub("", tag).strip().rstrip(".。").rstrip()


def _without_quotes(text: str) -> str:
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
        self._refusal, self._begins, self._ends = (
            prompts.answers(name) for name in ("refusals", "chatter_begins", "chatter_ends")
        )
        languages.load(wanted)
        self._claimed: dict[bytes, str] = {}  # digest of a text -> id of its picture
        self._lock = threading.Lock()

    def check(
        self,
        text: str,
        *,
        kind: str,
        language: str,
        id: str = "",
        asked: str = "",
        siblings: Mapping[tuple[str, str], str] | None = None,
    ) -> Fault | None:
        """Returns what is wrong with a text; None where nothing is, and then the picture has it.

        Args:
            text: of `tidy`.
            kind: of the caption that it shall be.
            language: likewise.
            id: of the picture.
            asked: the prompt, without the caption that it was about.
            siblings: the captions of the picture so far, by kind and language.
        """
        if (found := next(self._faults(text, kind, language, asked), None)) is not None:
            return found
        key = normalized(text)
        for (other_kind, other_language), other in (siblings or {}).items():
            # A word may be the same in two languages; a whole level of them is not.
            related = other_language == language or {kind, other_kind} <= set(_COMPARED)
            if related and normalized(other) == key:
                return Fault("duplicate", f"its {other_kind} caption in {other_language}")
        owner = self.claim(text, kind, id)
        return None if owner == id else Fault("duplicate", f"the text of {owner}")

    def claim(self, text: str, kind: str, id: str) -> str:
        """Returns the picture that has a text: this one, unless another one came before it."""
        if kind not in _COMPARED:
            return id
        key = hashlib.blake2b(normalized(text).encode(), digest_size=16).digest()
        with self._lock:
            return self._claimed.setdefault(key, id)

    def _faults(self, text: str, kind: str, language: str, asked: str) -> Iterator[Fault]:
        if not any(map(str.isalnum, text)):
            yield Fault("empty", text[:40])
        if found := _DAMAGED.search(text):
            yield Fault("damaged text", " ".join(f"U+{ord(letter):04X}" for letter in found[0]))
        least, most = self._prompts.of(language).length[kind]
        size = len(_TAG.findall(text)) if kind == "tags" else len(text)
        unit = "tags" if kind == "tags" else "characters"
        too_long = Fault("too long", f"{size} {unit}, and {most} are the most")
        if size > _TOO_LONG * most or len(text) > _TOO_LONG * max(4096, most):
            yield too_long
        prose = _QUOTED.sub('""', text)  # what is quoted may say and be anything
        plain = _VOWELS.sub("", prose.lower().replace("’", "'").strip("*\"' \n"))
        words = _words(prose)
        if self._refusal and (found := self._refusal.match(plain[:_BEGINNING])):
            yield Fault("refusal", found[0])
        if echo := _common_run(words, _words(asked)):
            yield Fault("prompt echo", echo)
        if self._begins and (found := self._begins.match(plain[:_BEGINNING])):
            yield Fault("chatter", found[0])
        if self._ends and (found := self._ends.search(plain[-_ENDING:])):
            yield Fault("chatter", found[0].strip())
        if loop := _loop(words):
            yield Fault("loop", loop)
        if found := _STUTTER.search(text):
            yield Fault("loop", found[0][:80])
        markup = _MARKUP_OF_TAGS if kind == "tags" else _MARKUP
        if found := markup.search(prose):
            yield Fault("markup", found[0].strip()[:80])
        if found := _unbalanced(text, prose):
            yield Fault("unbalanced", found)
        bare = prose.replace('""', "")
        is_list = kind == "tags"
        if found := languages.other_language(bare, language, self._wanted, is_list=is_list):
            yield Fault("wrong language", found)
        if size < least:
            yield Fault("too short", f"{size} {unit}, and {least} are the least")
        if size > most:
            yield too_long
        open_end = text[-1].isalpha() or text[-1] in _OPEN_END
        if kind in ("long", "medium") and open_end and language not in _NO_FULL_STOP:
            yield Fault("cut off", f"it ends in {text[-20:]!r}")


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
    for period in range(1, min(_LOOP_PERIOD, len(words) // 4) + 1):
        times = {1: 8, 2: 6}.get(period, 4)  # stripes may be red, white, red, white, red, white
        run = 0
        for i in range(period, len(words)):
            run = run + 1 if words[i] == words[i - period] else 0
            if run >= period * (times - 1):
                return " ".join(words[i - period + 1 : i + 1])
    runs = [tuple(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1)]
    counts = collections.Counter(runs)
    if len(runs) >= 24 and len(counts) < (1 - _REPEATED) * len(runs):
        return " ".join(counts.most_common(1)[0][0])
    return None


def _unbalanced(text: str, prose: str) -> str | None:
    prose, text = _ALONE.sub("", prose), _ALONE.sub("", text) if text.count('"') % 2 else text
    for first, last in _PAIRS:
        depth = 0
        for letter in prose:
            depth += (letter == first) - (letter == last)
            if depth < 0:
                return last
        if depth:
            return first
    for marks in _EVEN:
        if sum(prose.count(mark) for mark in marks) % 2:
            return next(mark for mark in prose if mark in marks)
    return '"' if text.count('"') % 2 else None
