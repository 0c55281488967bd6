"""What is to be drawn: prompts of a command and of files, and batches that share a program."""

import difflib
import json
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from lumina_jax.errors import InputError
from lumina_jax.sampling.pipeline import Pipeline

# What a line of a JSONL file of prompts may say.
LINE = {"prompt": str, "negative_prompt": str, "seed": int, "height": int, "width": int}


class Request(NamedTuple):
    """A picture to be drawn; all of it is in its metadata."""

    index: int
    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int


# Rows of one call of the pipeline: which request is drawn there, None where a row only fills up.
Batch = list[int | None]


def read_prompts(prompts: Sequence[str], path: str | None) -> list[dict[str, Any]]:
    """The prompts of the flags, then the lines of the file, as objects with keys of LINE.

    Blank lines are left out. All faults of a file are told at once.
    """
    lines: list[dict[str, Any]] = [{"prompt": prompt} for prompt in prompts]
    if path is not None:
        file, faults = epath.Path(path), []
        if file.suffix not in (".txt", ".jsonl"):
            raise InputError(
                f"--prompts_file={path} must end in .txt, with one prompt a line, or in .jsonl, "
                f'with one JSON object a line, such as {{"prompt": "a red fox", "seed": 7}}.'
            )
        if not file.exists():
            raise InputError(f"--prompts_file={path} does not exist. Give a text file.")
        try:
            content = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"--prompts_file={path} is not UTF-8 ({error}). Convert it.") from None
        for number, text in enumerate(content.split("\n"), start=1):
            if text.strip():
                if file.suffix == ".txt":
                    line = {"prompt": text.strip()}
                else:
                    line, found = _parse(text)
                    faults += [f"line {number}: {fault}" for fault in found]
                lines.append(line)
        if faults:
            more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
            raise InputError(f"{path}:\n  " + "\n  ".join(faults[:10]) + more)
    if not lines:
        raise InputError("No prompt was given. Pass --prompt='...' or --prompts_file=FILE.")
    return lines


def _parse(text: str) -> tuple[dict, list[str]]:
    """A line of JSON, and what is wrong with it."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, [f"not JSON: {error}"]
    if not isinstance(line, dict):
        return {}, [f'{text.strip()[:40]} is not an object, such as {{"prompt": "a red fox"}}']
    faults = [] if "prompt" in line else ["no 'prompt'"]
    for key, value in line.items():
        if key not in LINE:
            near = difflib.get_close_matches(key, LINE, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(LINE)}"
            faults.append(f"unknown key {key!r}; {hint}")
        elif type(value) is not LINE[key]:
            needed = "a text" if LINE[key] is str else "a whole number"
            faults.append(f"{key} is {json.dumps(value)}; needed is {needed}")
        elif LINE[key] is str and any("\ud800" <= letter <= "\udfff" for letter in value):
            faults.append(f"{key} holds half a character, such as \\ud83d without its second half")
    return line, faults


def make_requests(
    pipeline: Pipeline,
    lines: Sequence[Mapping[str, Any]],
    *,
    first: int = 0,
    negative_prompt: str | None = None,
    seed: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> list[Request]:
    """A request for each line; what a line does not say comes from the arguments.

    Args:
      pipeline: Knows which sizes can be drawn, and which is the default.
      lines: As `read_prompts` gives them.
      first: Index of the first.
      negative_prompt: Of those that name none.
      seed: Of the first, one more for each after it.
      height: In pixels.
      width: In pixels.
    """
    requests, faults = [], []
    for number, line in enumerate(lines):
        request = Request(
            index=first + number,
            prompt=line["prompt"],
            negative_prompt=line.get("negative_prompt", negative_prompt or ""),
            seed=line.get("seed", (seed or 0) + number),
            height=line.get("height", height or pipeline.size[0]),
            width=line.get("width", width or pipeline.size[1]),
        )
        requests.append(request)
        try:
            pipeline.check_size(request.height, request.width)
            if not 0 <= request.seed < 2**32:
                raise InputError(f"seed {request.seed} is not between 0 and {2**32 - 1}.")
        except InputError as error:
            faults.append(f"Prompt {number + 1}, {request.prompt!r}: {error}")
    if faults:
        raise InputError("\n".join(faults[:10]))
    return requests


def plan(requests: Sequence[Request], slots: Sequence[Hashable], batch_size: int) -> list[Batch]:
    """Batches that each fit one program: of one size of pictures, and equal caption slots.

    All of a group are equally long. What is there already makes no difference: a picture is drawn
    in the same company after a restart, and so gets the same pixels to the last bit.
    """
    groups = defaultdict(list)
    for number, (request, key) in enumerate(zip(requests, slots, strict=True)):
        groups[request.height, request.width, key].append(number)
    batches: list[Batch] = []
    for members in groups.values():
        size = min(batch_size, len(members))
        for start in range(0, len(members), size):
            part = members[start : start + size]
            batches.append(part + [None] * (size - len(part)))
    return batches
