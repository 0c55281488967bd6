r"""Writes captions for pictures: four levels of detail, in any languages, by a model or a server.

    python tools/caption.py folder --input=photos --output=captions --model=models/Qwen2.5-VL-7B

looks at every picture below `photos` with a model of the Qwen-VL families on this machine, and
makes a table of captions, which tools/prepare_data.py takes with --caption_table=captions. The
pictures may be in any source that it knows (--help of it), a prepared data set among them (tfds).
With servers that speak OpenAI's protocol, such as vLLM's, and a second model for text alone:

    ... --server=http://node0:8000/v1,http://node1:8000/v1 --text_server=http://node2:8000/v1

First a pilot of some pictures, which says how long all will take and what it will cost:

    ... --output=pilot --pilot=200 --dollars_per_hour=2.5

Many workers share the work, and each may be killed and started again at any time:

    ... --worker=$JOB_COMPLETION_INDEX --num_workers=64

Answers that are no captions (refusals, loops, another language, ...) are asked for again, then left
out; report.json in the output counts them, with samples. tools/show_captions.py shows the captions.
"""

import functools
import json
import pathlib
import sys
from collections.abc import Callable

import rich.box
import rich.table
from absl import flags, logging
from etils import epath
from ml_collections import config_flags
from rich.console import Console

from lumina_jax import cli, files, source_flags
from lumina_jax.data import engine
from lumina_jax.data.captions import KINDS
from lumina_jax.errors import InputError, RestartError, is_of_storage
from lumina_jax.progress import progress_bar
from lumina_jax.unicap import backends, pictures, report, worker
from lumina_jax.unicap.captioner import Wanted, talks_of_text
from lumina_jax.unicap.gates import FAULTS
from lumina_jax.unicap.prompts import load_prompts
from lumina_jax.unicap.report import Counts
from lumina_jax.unicap.tokens import TokenCounter
from lumina_jax.untrusted import is_finite

source_flags.define(captions=False)
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the table to write.")
# What is written.
_KINDS = flags.DEFINE_list("kinds", list(KINDS), "Levels: long, medium, short, tags.")
_LANGUAGES = flags.DEFINE_list(
    "languages", ["en", "zh"], "Two-letter codes; pictures are looked at in the first."
)
_CONDENSE = flags.DEFINE_bool(
    "condense", True, "Make the shorter levels of the long one; else look again for each."
)
_TRANSLATE = flags.DEFINE_bool(
    "translate", True, "Make other languages of the first; else look again in each."
)
_PROMPTS = flags.DEFINE_string("prompts", None, "Folder of prompts. Default: the built-in ones.")
_ATTEMPTS = flags.DEFINE_integer("attempts", 3, "At an answer that does not pass.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of the first attempt.")
_RETRY_TEMPERATURE = flags.DEFINE_float("retry_temperature", 0.7, "Of those after it.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the first attempt; each next one has the next.")
_MAX_PIXELS = flags.DEFINE_integer(
    "max_pixels", 1_003_520, "Of a picture as the model sees it; larger ones are scaled down."
)
config_flags.DEFINE_config_file(
    "config", None, "Of the runs to come: its text encoder counts the tokens of the captions."
)
# Models in this process.
_MODEL = flags.DEFINE_string("model", None, "Folder of a model of the Qwen-VL families.")
_TEXT_MODEL = flags.DEFINE_string("text_model", None, "Folder of another model, for text alone.")
_MODEL_NAME = flags.DEFINE_string(
    "model_name", "", "Stored with each caption. Default: the name of the folder."
)
_TEXT_MODEL_NAME = flags.DEFINE_string("text_model_name", "", "Likewise, of the model for text.")
_DEVICE = flags.DEFINE_string("device", "auto", "cuda, cuda:1, cpu. Default: a GPU if there is.")
_DTYPE = flags.DEFINE_string("dtype", "auto", "bfloat16, float32. Default: by the device.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Requests that are answered together.")
# Models behind servers.
_SERVER = flags.DEFINE_list("server", None, "URLs of servers, such as http://localhost:8000/v1.")
_SERVER_MODEL = flags.DEFINE_string("server_model", "", "As they call it. Default: their only one.")
_TEXT_SERVER = flags.DEFINE_list("text_server", None, "URLs of other servers, for text alone.")
_TEXT_SERVER_MODEL = flags.DEFINE_string("text_server_model", "", "As they call it.")
_KEY_VARIABLE = flags.DEFINE_string(
    "key_variable", "", "Variable of the environment that holds the servers' key."
)
_CONCURRENCY = flags.DEFINE_integer("concurrency", 64, "Requests under way, over all servers.")
_REQUESTS_PER_MINUTE = flags.DEFINE_float("requests_per_minute", 0.0, "At most; 0 is no limit.")
_TIMEOUT = flags.DEFINE_float("timeout", 300.0, "Seconds for the whole of an answer.")
_PATIENCE = flags.DEFINE_float(
    "patience", 600.0, "Seconds without any answer after which the command ends (status 75)."
)
_EXTRA = flags.DEFINE_string("extra", "{}", "JSON: more fields of each request.")
# How it is run.
_WORKER = flags.DEFINE_integer("worker", 0, "Which one of the workers this is, from 0.")
_NUM_WORKERS = flags.DEFINE_integer("num_workers", 1, "How many share the work.")
_ENGINE = flags.DEFINE_enum("engine", "local", ["local", "beam"], "Where the work is done.")
_BEAM_OPTIONS = flags.DEFINE_string("beam_options", "", "Of Beam's pipeline, such as its runner.")
_PILOT = flags.DEFINE_integer("pilot", 0, "Caption so many pictures and no more.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace the table that is there.")
# What all of it would cost.
_NUM_PICTURES = flags.DEFINE_float("num_pictures", 1e8, "For which time and cost are estimated.")
_DOLLARS_PER_HOUR = flags.DEFINE_float(
    "dollars_per_hour", 0.0, "Of a worker, with the devices or servers that it uses."
)
_DOLLARS_PER_MILLION = flags.DEFINE_list(
    "dollars_per_million_tokens", ["0", "0"], "Read and written, where tokens are paid for."
)


FEW = 10  # times as many pictures as are worked on at once; fewer say little of the time


def main(kind: str) -> None:
    prices = _prices()
    if _OVERWRITE.value and _NUM_WORKERS.value != 1:
        raise InputError(
            "--overwrite would remove what the other workers have done, each time that one starts. "
            "Remove the table once, by a command without --num_workers, or choose another output."
        )
    source = source_flags.make(kind, resolution=512, needs_captions=False)
    if _PILOT.value < 0:
        raise InputError(f"--pilot={_PILOT.value} must be 1 or more pictures.")
    if _PILOT.value:
        source = pictures.Pilot(source, _PILOT.value)
    wanted = Wanted(
        kinds=tuple(_KINDS.value),
        languages=tuple(_LANGUAGES.value),
        condense=_CONDENSE.value,
        translate=_TRANSLATE.value,
        attempts=_ATTEMPTS.value,
        temperature=_TEMPERATURE.value,
        retry_temperature=_RETRY_TEMPERATURE.value,
        seed=_SEED.value,
    )
    prompts = load_prompts(_PROMPTS.value)
    count_tokens = _token_counter()
    look, text = _backends(wanted)
    # Only now models are loaded and servers asked.
    backend = backends.opened(backends.Two(look, text) if text else look)
    job = worker.Job(
        source,
        _OUTPUT.value,
        wanted,
        prompts,
        backends.Two(look, text) if text else look,
        (backends.opened(look).model, backends.opened(text or look).model),
        max_pixels=_MAX_PIXELS.value,
        count_tokens=count_tokens,
        max_tokens=count_tokens.max_tokens if count_tokens else 256,
    )
    console = Console(
        highlight=False,
        soft_wrap=True,
        markup=False,
        emoji=False,
        width=None if sys.stdout.isatty() else 120,
    )
    try:
        job.begin(overwrite=_OVERWRITE.value)
        _run(job)
        counts = job.finish()
    except InputError:
        raise
    except Exception as error:  # clients of stores raise what they like
        if not is_of_storage(error):
            raise
        logging.info("What failed:", exc_info=True)
        raise RestartError(
            f"{_OUTPUT.value} or the pictures: {error}. What is done is kept; mend it and give the "
            "same command again."
        ) from error
    if counts is None:
        left = len(job.missing())
        console.print(
            f"This worker is done; {left:,} of {len(job.parts):,} parts are left to others. The "
            "one that ends last makes the table."
        )
        return
    path = epath.Path(_OUTPUT.value) / worker.REPORT
    files.write(path, json.dumps(counts.to_json(), indent=1, ensure_ascii=False) + "\n")
    print_report(console, counts)
    print_estimate(console, counts, prices, backend.num_pictures)
    console.print(
        f"The table is in {_OUTPUT.value}. Look at it: python tools/show_captions.py "
        f"--table={_OUTPUT.value} --output=runs/captions"
    )


def _backends(wanted: Wanted) -> tuple[backends.Opener, backends.Opener | None]:
    """Returns the model that looks, and the one for text where it is another."""
    if bool(_MODEL.value) == bool(_SERVER.value):
        raise InputError(
            "Give --model=<folder>, for a model in this process, or --server=<URL>; one of them."
        )
    if _TEXT_MODEL.value and _TEXT_SERVER.value:
        raise InputError("Give --text_model or --text_server, or neither; not both.")
    try:
        extra = json.loads(_EXTRA.value, parse_constant=_no_number)
        if not isinstance(extra, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise InputError(f"--extra={_EXTRA.value} is not a JSON object: {error}.") from None
    local = functools.partial(
        backends.Local,
        device=_DEVICE.value,
        dtype=_DTYPE.value,
        batch_size=_BATCH_SIZE.value,
        max_pixels=_MAX_PIXELS.value,
    )
    servers = functools.partial(
        backends.Servers,
        key_variable=_KEY_VARIABLE.value,
        concurrency=_CONCURRENCY.value,
        timeout=_TIMEOUT.value,
        patience=_PATIENCE.value,
        requests_per_minute=_REQUESTS_PER_MINUTE.value,
        extra=_EXTRA.value,
    )
    look, text = (
        local(path.value, name=name.value)
        if path.value
        else servers(tuple(urls.value), model.value)
        if urls.value
        else None
        for path, name, urls, model in (
            (_MODEL, _MODEL_NAME, _SERVER, _SERVER_MODEL),
            (_TEXT_MODEL, _TEXT_MODEL_NAME, _TEXT_SERVER, _TEXT_SERVER_MODEL),
        )
    )
    if text and not talks_of_text(wanted):
        raise InputError(
            "--text_model and --text_server condense and translate, and these captions need "
            "neither. Leave them out, or ask for more levels or languages."
        )
    return look, text


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _run(job: worker.Job) -> None:
    if _ENGINE.value == "beam":
        if _NUM_WORKERS.value != 1 or _WORKER.value:
            raise InputError("--engine=beam shares the work itself; leave --num_workers out.")
        engine.Beam(_BEAM_OPTIONS.value, progress_bar).run(
            "Captioning", job.caption_part, job.missing()
        )
        return
    if _BEAM_OPTIONS.value:
        raise InputError("--beam_options are of --engine=beam, which is not given.")
    numbers = job.missing(_WORKER.value, _NUM_WORKERS.value)
    sizes = [pictures.expected_pictures(job.source, job.parts[number]) for number in numbers]
    if None in sizes:
        sizes, unit = [1] * len(numbers), "parts"
    else:
        unit = "pictures"
    done = 0
    with progress_bar("Captioning", sum(sizes), unit=unit) as advance:
        for number, size in zip(numbers, sizes, strict=True):
            job.caption_part(number, _teller(advance, done, unit))
            done += size
            advance(done)


def _teller(advance: Callable, before: int, unit: str) -> Callable[[int], None]:
    if unit == "pictures":
        return lambda done: advance(before + done)
    return lambda done: advance(before, f"picture {done:,} of a part")


def _token_counter() -> TokenCounter | None:
    config = flags.FLAGS.config
    if config is not None:
        return TokenCounter.of(config.text_encoder.to_dict(), config.data.system_prompt)
    counter, lacking = TokenCounter.small()
    if lacking:
        logging.info("%s With --config its text encoder counts.", lacking)
    return counter


def _prices() -> tuple[float, float]:
    numbers = (_NUM_PICTURES.value, _DOLLARS_PER_HOUR.value)
    if not all(map(is_finite, numbers)) or not (numbers[0] > 0 and numbers[1] >= 0):
        raise InputError(
            f"--num_pictures={numbers[0]} must be above 0, and --dollars_per_hour={numbers[1]} not "
            "below."
        )
    try:
        read, written = map(float, _DOLLARS_PER_MILLION.value)
        if not (is_finite(read) and is_finite(written) and min(read, written) >= 0):
            raise ValueError
    except ValueError:
        raise InputError(
            f"--dollars_per_million_tokens={','.join(_DOLLARS_PER_MILLION.value)} is not two "
            "numbers, of tokens read and written, such as 0.15,0.6."
        ) from None
    return read, written


def print_report(console: Console, counts: Counts) -> None:
    """Prints how many captions there are of each level, and what was wrong with others."""
    table = _table("captions", "language", "passed", "at once", "left out")
    if counts.lengths:
        for name in ("5%", "50%", "95%", f"over {counts.max_tokens}"):
            table.add_column(name, justify="right")
    for kind, language in counts.pairs():
        passed = counts.passed[kind, language]
        cells = [kind, language, f"{passed:,}"]
        cells.append(f"{counts.at_once[kind, language] / passed:.1%}" if passed else "")
        cells.append(f"{counts.num_excluded(kind, language):,}")
        if lengths := counts.lengths.get((kind, language)):
            cells += [f"{n:,.0f}" for n in report.quantiles(lengths, (0.05, 0.5, 0.95))]
            over = sum(n for length, n in lengths.items() if length > counts.max_tokens)
            cells.append(f"{over / sum(lengths.values()):.1%}")
        table.add_row(*cells)
    console.print(table)
    if counts.lengths:
        console.print("lengths in tokens of the text encoder, with the system prompt\n")
    excluded = counts.excluded_by_fault()
    if counts.rejected or excluded:
        table = _table("fault of an answer", "asked again", "left out")
        table.add_column("")
        for fault, meaning in FAULTS.items():
            if counts.rejected[fault] or excluded[fault]:
                again = counts.rejected[fault] - excluded[fault]
                again = f"{again:,}" if counts.rejected[fault] else ""
                table.add_row(fault, again, f"{excluded[fault]:,}", meaning)
        console.print(table)
    broken = sum(counts.broken.values())
    console.print(f"{counts.num_pictures:,} pictures, {broken:,} of them without captions")
    for reason, count in counts.broken.most_common():
        console.print(f"  {reason}: {count:,}")
    console.print("")


def print_estimate(
    console: Console, counts: Counts, prices: tuple[float, float], at_once: int
) -> None:
    """Prints how fast it was, and what all pictures would take.

    Args:
        console: to print on.
        counts: of the run.
        prices: of a million tokens, read and written.
        at_once: pictures that the models work on at the same time.
    """
    found = report.estimate(
        counts,
        _NUM_PICTURES.value,
        dollars_per_hour=_DOLLARS_PER_HOUR.value,
        dollars_per_million=prices,
    )
    table = _table(f"for {_NUM_PICTURES.value:,.0f} pictures", "")
    if found.pictures_per_second:
        table.add_row("pictures a second, one worker", _round(found.pictures_per_second))
    for name, tokens in (("read", found.read), ("written", found.wrote)):
        if tokens.value:
            table.add_row(f"tokens {name}, a picture", f"{tokens.value:,.0f} ± {tokens.error:,.0f}")
    if found.worker_hours is not None:
        table.add_row("hours of one worker", _round(found.worker_hours))
        for count in (64, 1024):
            table.add_row(f"days of {count:,} workers", _round(found.worker_hours / 24 / count))
    if found.dollars is not None:
        error = f" ± {found.dollars.error:,.0f}" if found.dollars.error else ""
        table.add_row("dollars", f"{found.dollars.value:,.0f}{error}")
    console.print(table)
    if 0 < counts.num_timed < FEW * at_once:
        console.print(
            f"{counts.num_timed:,} pictures, {at_once:,} at a time: the models had less to do at "
            f"the beginning and at the end, so the time is too long. {FEW * at_once:,} pictures "
            "say it better.\n"
        )
    if found.dollars is None:
        console.print(
            "What it costs: --dollars_per_hour of a worker, or --dollars_per_million_tokens.\n"
        )


def _round(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _table(name: str, *numbers: str) -> rich.table.Table:
    table = rich.table.Table(name, box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for number in numbers:
        table.add_column(number, justify="left" if number == "language" else "right")
    return table


if __name__ == "__main__":
    # Run as a file, Python looks for modules beside it; a config imports its base from the root.
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    cli.run(main, required=("output",), commands=source_flags.SOURCES)
