"""One picture -> its captions: a conversation with a model, as a generator.

    look      long caption in the first language, from the picture
    condense  medium, short and tags, from the long caption
    translate all of them into the other languages

as the paper's data was made (Lumina-Image 2.0, arXiv 2503.21758, section 4.3). The generator yields
what is to be asked and is sent what was answered, so it does not matter who runs it: many in
threads against a server, or many in step with a model that answers in batches; see `worker`.
"""

import dataclasses
from collections.abc import Generator

from PIL import Image

from lumina_jax.data.caption_table import Excluded, Row, Written
from lumina_jax.data.captions import KINDS
from lumina_jax.errors import InputError
from lumina_jax.unicap import languages
from lumina_jax.unicap.backends.base import Reply, Request
from lumina_jax.unicap.gates import Gates, check_reply, one_line, tidy
from lumina_jax.unicap.prompts import Prompts

# Of an answer. A long caption of 1,800 letters has about 450 in English, in some scripts more.
MAX_TOKENS = {"long": 1024, "medium": 384, "short": 128, "tags": 384}

_MAX_EXCLUDED = 4000  # letters that are kept of an answer that is no caption
_MAX_SEED = 2**31

Conversation = Generator[Request, Reply, Row]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which captions a picture gets, and how they are asked for.

    Args:
        kinds: levels of detail.
        languages: two-letter codes; the first is the one that pictures are looked at in.
        condense: the shorter kinds are made of the long caption, without the picture. Where no long
            one is wanted, or without this, the model looks at the picture for each.
        translate: other languages are made of the captions in the first. Without this the model
            looks at the picture in each language.
        attempts: how often an answer that does not pass is asked for, the first time included.
        temperature: of the first attempt; 0 takes the likeliest tokens.
        retry_temperature: of those after it, which would be in vain without chance.
        seed: of the first attempt; each next one has the next.
    """

    kinds: tuple[str, ...] = KINDS
    languages: tuple[str, ...] = ("en", "zh")
    condense: bool = True
    translate: bool = True
    attempts: int = 3
    temperature: float = 0.0
    retry_temperature: float = 0.7
    seed: int = 0

    def __post_init__(self):
        faults = []
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            faults.append(f"kinds {', '.join(unknown)} are none of {', '.join(KINDS)}")
        for name in ("kinds", "languages"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                faults.append(f"{name} {', '.join(given) or '()'} must be one or more, each once")
        if not 1 <= self.attempts <= 100:
            faults.append(f"attempts={self.attempts} must be 1 to 100")
        if not 0 <= self.seed < _MAX_SEED:
            faults.append(f"seed={self.seed} must be 0 to {_MAX_SEED - 1}")
        for name in ("temperature", "retry_temperature"):
            if not 0 <= getattr(self, name) <= 2:
                faults.append(f"{name}={getattr(self, name)} must be 0 to 2")
        if faults:
            raise InputError(f"Cannot caption: {'; '.join(faults)}.")
        languages.check(self.languages)


@dataclasses.dataclass(frozen=True)
class _Question:
    """What asks for a caption: the prompt, and the same without the caption that it is about."""

    prompt: str
    asked: str
    image: Image.Image | None = None


class Captioner:
    """Writes the captions of pictures.

    Args:
        wanted: which.
        prompts: what is asked.
        look_model: name of the model that sees pictures.
        text_model: name of the one that condenses and translates.
    """

    def __init__(self, wanted: Wanted, prompts: Prompts, look_model: str, text_model: str):
        self._wanted, self._prompts = wanted, prompts
        self._look_model, self._text_model = look_model, text_model
        # Long ones first: the others are made of them.
        self._kinds = [kind for kind in KINDS if kind in wanted.kinds]

    def converse(self, id: str, image: Image.Image, gates: Gates) -> Conversation:
        """Yields requests about a picture, takes the replies, and returns the row of the table.

        Args:
            id: of the picture.
            image: RGB, upright.
            gates: of the part that the picture is in.
        """
        written: dict[tuple[str, str], Written] = {}
        excluded: list[Excluded] = []
        rejected: list[tuple[str, str, str]] = []
        read = wrote = 0
        for language in self._wanted.languages:
            for kind in self._kinds:
                question = self._question(kind, language, image, written)
                if question is None:
                    excluded.append(Excluded(kind, language, "nothing to make it from", "", ""))
                    continue
                siblings = {pair: caption.text for pair, caption in written.items()}
                for attempt in range(self._wanted.attempts):
                    reply = yield self._request(question, kind, attempt)
                    read, wrote = read + reply.num_prompt_tokens, wrote + reply.num_tokens
                    text = tidy(reply.text, kind)
                    fault = check_reply(reply) or gates.check(
                        text,
                        kind=kind,
                        language=language,
                        id=id,
                        asked=question.asked,
                        siblings=siblings,
                    )
                    text = one_line(text)
                    if fault is None:
                        model = self._text_model if question.image is None else self._look_model
                        seed = self._wanted.seed + attempt
                        version = self._prompts.version
                        found = Written(text, kind, language, model, version, seed)
                        written[kind, language] = found
                        break
                    rejected.append((kind, language, fault.name))
                    if reply.fault is not None:
                        break  # it would be the same again
                if fault is not None:
                    shown = _printable(text)[:_MAX_EXCLUDED]
                    detail = _printable(fault.detail)
                    excluded.append(Excluded(kind, language, fault.name, detail, shown))
        return Row(
            id,
            tuple(written.values()),
            tuple(excluded),
            rejected=tuple(rejected),
            tokens=(read, wrote),
        )

    def _question(
        self,
        kind: str,
        language: str,
        image: Image.Image,
        written: dict[tuple[str, str], Written],
    ) -> _Question | None:
        """Returns what to ask, None where the caption to make it from is missing."""
        first, prompts = self._wanted.languages[0], self._prompts
        if language != first and self._wanted.translate:
            if (kind, first) not in written:
                return None
            caption = written[kind, first].text
            return _Question(
                prompts.translate(kind, language, caption, first),
                prompts.translate(kind, language, "", first),
            )
        if kind != "long" and "long" in self._kinds and self._wanted.condense:
            if ("long", language) not in written:
                return None
            caption = written["long", language].text
            return _Question(
                prompts.condense(kind, language, caption), prompts.condense(kind, language, "")
            )
        prompt = prompts.look(kind, language)
        return _Question(prompt, prompt, image)

    def _request(self, question: _Question, kind: str, attempt: int) -> Request:
        wanted = self._wanted
        return Request(
            question.prompt,
            question.image,
            max_tokens=MAX_TOKENS[kind],
            temperature=wanted.retry_temperature if attempt else wanted.temperature,
            seed=wanted.seed + attempt,
        )


def _printable(text: str) -> str:
    """Returns a text that can be written, whatever a model or a server has made of it."""
    return text.encode(errors="backslashreplace").decode()


def talks_of_text(wanted: Wanted) -> bool:
    """Whether some of what is asked is about text alone."""
    condenses = wanted.condense and "long" in wanted.kinds and len(wanted.kinds) > 1
    return condenses or (wanted.translate and len(wanted.languages) > 1)
