"""Seconds a picture and what they buy: our accelerations, alone and together; and diffusers.

    python tools/benchmark_sampling.py accelerations --checkpoint=runs/tiny --output=speed
    python tools/benchmark_sampling.py accelerations --size=small --rows=ladder --check
    python tools/benchmark_sampling.py diffusers --size=small --side=256 --num_steps=20 --rounds=5
    python tools/benchmark_sampling.py diffusers --size=2b --side=1024 --num_steps=30  # on a GPU

Programs take turns, so that whatever else the machine does meets all alike; who begins changes from
round to round, and the first call of each, which compiles, is not counted. Without --checkpoint the
weights are random: a pipeline of the released architecture, fewer and narrower layers, whose text
encoder and decoder take about the part of a picture's time that they take in the released one. Its
pictures are textures, which shows speed well and quality badly.

`accelerations` draws the same prompts and noise with many settings. The baseline is the official
sampler, guided to the end: midpoint, 18 points of the grid. Then come the paper's ladder (its
figure 11), each rung on top of those above, and other settings; merging is kept to the second half
of the evaluations unless it is said to be in all. Columns:

    evaluations   of the velocity
    passes        through the layers, for a picture: two where an evaluation is guided; those that a
                  cache skipped are not counted, unless another picture of the batch needed them
    FLOPs         of the network, as a share of the baseline's
    seconds       for a picture, from words to pixels: the median, the lowest and the highest
    speed-up      over the baseline: the median over the rounds
    step          likewise, over the row that this one changes; in the ladder the one above
    PSNR (dB), SSIM, features
                  the median over the pictures; features is a distance, 0 between equal pictures
                  (lumina_jax/evaluation/similarity.py)
      to the baseline    the picture that it makes of the same noise
      to the limit       that of the baseline with four times as many intervals, where its solver
                         has converged: what the baseline itself only comes near
      to its own limit   that with the guidance of the row: what solver, cache and merging miss,
                         without what truncation and renormalisation change on purpose

A second table places these numbers: how far from the baseline's pictures are those of other seeds
and other prompts, and JPEGs of them. --output=FOLDER gets the tables, a plot of speed and quality,
a contact sheet, and every single number in JSON, where null is the PSNR of equal pictures.

--noquality compares no pictures, whose limits take longer than all the rest: for random weights.

`diffusers` compares `diffusers.Lumina2Pipeline` with ours: one folder, the same noise, equal
settings. Where JAX has a GPU both use it, in bfloat16, and torch needs CUDA too; --device=cpu
compares on the processor. While others use the processor too, torch's threads lose many times the
time by waiting for each other, and the ratio says nothing; OMP_WAIT_POLICY=passive mends the most.

--check ends with status 1 if the ladder gains less than the paper's 1.18 by truncation and
renormalisation, 1.5 more by DPM, 1.2 more by the cache; or if ours is slower than diffusers on a
processor, or less than 1.3 times as fast on a GPU. Needs the `dev` extra.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from absl import flags, logging

from lumina_jax import checkpoint, cli, executables, files
from lumina_jax.errors import InputError
from lumina_jax.evaluation import similarity, tradeoff
from lumina_jax.sampling import pipeline as pipeline_module
from lumina_jax.sampling.contact_sheet import save_contact_sheet
from lumina_jax.sampling.pipeline import Pipeline
from lumina_jax.system_prompts import SYSTEM_PROMPTS

# Of the transformer; the text encoder is shrunk alike. The released decoder takes 0.44 of the
# operations of a pass at 1024 px; at 256 px that of `small` 0.3, of `medium` 0.5, of `tiny` 1.1.
SIZES = {
    "tiny": dict(hidden_size=96, num_layers=4, heads=6, kv_heads=2, vae=(4, 8, 16, 16)),
    "small": dict(hidden_size=384, num_layers=8, heads=12, kv_heads=4, vae=(16, 16, 32, 32)),
    "medium": dict(hidden_size=768, num_layers=12, heads=24, kv_heads=8, vae=(32, 64, 128, 128)),
    # All of the released sizes but the vocabulary.
    "2b": dict(hidden_size=2304, num_layers=26, heads=24, kv_heads=8, vae=(128, 256, 512, 512)),
}
PROMPTS = (
    "A red fox in deep snow looks at the camera, late afternoon light, a birch forest behind it",
    "An old fisherman mends his nets on a stone pier, boats in the fog, oil on canvas",
    "A glass teapot with green tea and mint leaves on a wooden table beside a window",
    "A street of a small town at night after rain, neon signs mirrored in the puddles",
)

BASELINE = dict(
    semantics="official", solver="midpoint", num_steps=18, guidance_truncation=1.0,
    guidance_renorm=0.0, cache_threshold=0.0, cache_interval=1, merge_ratio=0.0,
)  # fmt: skip
NEEDED_OF_DIFFUSERS = {"cpu": 1.0, "gpu": 1.3}
# What pictures are compared with, and how tables call it.
COMPARISONS = {"baseline": "baseline", "limit": "limit", "own": "own limit"}


def define_flags() -> None:
    flags.DEFINE_enum("size", "small", list(SIZES), "Of the random model.")
    flags.DEFINE_integer("side", None, "Of the picture in pixels; the checkpoint's, or 256.")
    flags.DEFINE_integer("batch_size", 1, "Pictures at a time.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Turns that are counted.", lower_bound=1)
    flags.DEFINE_enum(
        "dtype", None, ["float32", "bfloat16"], "Not of a run; float32 on a CPU, else bfloat16."
    )
    flags.DEFINE_enum("device", "auto", ["auto", "cpu"], "cpu: leaves accelerators alone.")
    flags.DEFINE_string("output", None, "Folder for tables, plot, contact sheet and JSON.")
    flags.DEFINE_bool("check", False, "Status 1 where ratios are below those above.")
    flags.DEFINE_float("guidance_scale", None, "The checkpoint's by default; the released 4.")
    flags.DEFINE_string("checkpoint", None, "A diffusers pipeline, or with accelerations a run.")

    flags.DEFINE_enum("rows", "all", ["all", "ladder"], "accelerations: what is measured.")
    flags.DEFINE_integer("num_pictures", 4, "accelerations: compared in quality.", lower_bound=1)
    flags.DEFINE_multi_string("prompt", [], "accelerations: many, of different things.")
    flags.DEFINE_bool("quality", True, "accelerations: compare pictures, not only times.")
    flags.DEFINE_float("time_shift", None, "accelerations: the checkpoint's; the released 6.")
    flags.DEFINE_integer("dpm_steps", 20, "accelerations: of DPM in the ladder.", lower_bound=2)
    flags.DEFINE_float("cache_threshold", 0.1, "accelerations: of the adaptive cache.")
    flags.DEFINE_float("merge_ratio", 0.25, "accelerations: of merging in the ladder.")

    flags.DEFINE_integer("num_steps", 20, "diffusers: intervals of the Euler solver.")
    flags.DEFINE_float("guidance_truncation", 1.0, "diffusers: fraction of guided intervals.")


def main(command: str) -> int:
    args = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    if args.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    executables.use_cache("")
    with contextlib.ExitStack() as stack:
        path = args.checkpoint
        if path is None:
            path = stack.enter_context(tempfile.TemporaryDirectory())
            save_pipeline(pathlib.Path(path), args.size, args.dtype or default_dtype())
        return COMMANDS[command](args, path)


def accelerations(args: flags.FlagValues, path: str) -> int:
    """The first command; `path` has a run or a diffusers pipeline."""
    machine = describe_machine()
    if args.quality:
        similarity.feature_distance(*np.zeros((2, 1, 16, 16, 3), np.uint8))  # or what is missing
    pipeline, prompts = open_checkpoint(path, args.dtype, args.prompt)
    height, width = pipeline.size if args.checkpoint else (256, 256)
    if args.side:
        height = width = args.side
    bench = Bench(
        pipeline,
        {**BASELINE, "guidance_scale": args.guidance_scale, "time_shift": args.time_shift},
        prompts,
        height=height,
        width=width,
        batch_size=args.batch_size,
        num_batches=-(-args.num_pictures // args.batch_size),
    )
    config = pipeline.settings(**bench.baseline)
    if config.guidance_scale == 1:
        raise InputError(
            "guidance_scale=1 guides nothing, and there is nothing to truncate. Give another "
            "--guidance_scale, such as 4."
        )
    rows = make_rows(
        args.rows,
        dpm_steps=args.dpm_steps,
        cache_threshold=args.cache_threshold,
        merge_ratio=args.merge_ratio,
    )
    title = (
        f"{args.checkpoint or f'random weights, size {args.size}'}, {height} x {width} px, "
        f"batch {args.batch_size}, guidance {config.guidance_scale:g}, "
        f"time shift {config.time_shift:g}"
    )
    print(title, flush=True)
    results, pictures = draw_all(bench, rows)
    yardsticks, limit = {}, {}
    if args.quality:
        yardsticks, limit = measure_quality(bench, rows, results, pictures)
    measure_speed(bench, rows, results, args.rounds)
    about = [f"{title}. {args.rounds} rounds; {bench.num_pictures} pictures.", markdown(results)]
    if yardsticks:
        about += ["Distance from the baseline's pictures of:", yardstick_table(yardsticks)]
    text = "\n\n".join(
        [
            *about,
            f"{machine['processor']}, {machine['device']}, {machine['cores']} cores, load before "
            f"{machine['load_before']:.1f}; "
            + ", ".join(f"{k} {v}" for k, v in versions().items()),
        ]
    )
    print(f"\n{text}\n")
    shortfalls = check_ladder(results)
    if args.output:
        folder = pathlib.Path(args.output)
        files.write(folder / "accelerations.md", text + "\n")
        write_json(
            folder / "accelerations.json", machine=machine, title=title, prompts=bench.prompts,
            seeds=bench.seeds, batch_size=args.batch_size, height=height, width=width,
            baseline=dataclasses.asdict(config), rows=results, yardsticks=yardsticks,
        )  # fmt: skip
        if yardsticks:
            plot(results, yardsticks, title, folder / "accelerations.png")
        draw_sheet(results, limit | pictures, title, folder / "pictures.png")
    return int(args.check and bool(shortfalls))


@dataclasses.dataclass(frozen=True)
class Row:
    """Settings to be measured.

    Attributes:
      name: In tables.
      changes: Of the sampler's settings, over the baseline's.
      over: Name of the row that it goes one step beyond; None for the baseline itself.
      needed: What that step gains in the paper's figure 11, about; 0 where it says nothing.
      ladder: Whether it is a rung of it.
      all_slots: Captions are padded to as many slots as the text encoder has.
    """

    name: str
    changes: Mapping[str, Any]
    over: str | None
    needed: float = 0.0
    ladder: bool = False
    all_slots: bool = False


def make_rows(
    which: str, *, dpm_steps: int, cache_threshold: float, merge_ratio: float
) -> list[Row]:
    """The baseline, the ladder, and for "all" what else there is."""
    guidance = dict(guidance_truncation=0.25, guidance_renorm=1.0)
    dpm = dict(solver="dpm", num_steps=dpm_steps)
    cache = dict(cache_threshold=cache_threshold)
    rungs = [
        ("baseline: midpoint, 18 points", {}, 0),
        ("+ truncation 0.25, renorm 1", guidance, 1.18),
        (f"+ DPM, {dpm_steps} steps", dpm, 1.5),
        (f"+ cache, threshold {cache_threshold:g}", cache, 1.2),
        (f"+ merging {merge_ratio:g}", dict(merge_ratio=merge_ratio), 0),
    ]
    rows, changes, above = [], {}, None
    for name, added, needed in rungs:
        changes = changes | added
        rows.append(Row(name, changes, above, needed, ladder=True))
        above = name
    # Of random weights an adaptive cache reuses nearly all; this one is the same for all weights.
    by_interval = {**guidance, **dpm, "cache_interval": 2}
    rows.append(Row("+ cache, one in 2 instead", by_interval, over=rows[2].name, needed=1.2))
    if which == "ladder":
        return rows
    others = [
        ("truncation 0.25", dict(guidance_truncation=0.25)),
        *(
            (f"DPM, {steps} steps", dict(solver="dpm", num_steps=steps))
            for steps in sorted({dpm_steps, 16, 14}, reverse=True)
        ),
        *(  # of Euler and midpoint the official semantics count points
            (f"Euler, {steps} steps", dict(solver="euler", num_steps=steps + 1))
            for steps in (34, 20, 14)
        ),
        ("midpoint, 11 points", dict(num_steps=11)),
        *(
            (f"cache, threshold {x:g}", dict(cache_threshold=x))
            for x in (cache_threshold, 2 * cache_threshold)
        ),
        *((f"cache, one in {n}", dict(cache_interval=n)) for n in (2, 3)),
        *((f"merging {ratio:g}", dict(merge_ratio=ratio)) for ratio in (0.25, 0.5)),
        ("merging 0.25 in all", dict(merge_ratio=0.25, merge_steps=(0.0, 1.0))),
    ]
    return [
        *rows,
        *(Row(name, changes, over=rows[0].name) for name, changes in others),
        Row("captions in all slots", {}, over=rows[0].name, all_slots=True),
    ]


def open_checkpoint(
    path: str, dtype: str | None, prompts: Sequence[str]
) -> tuple[Pipeline, Sequence[str]]:
    """The pipeline, and the prompts to draw: those given, a run's previews, or our own."""
    if not checkpoint.is_run(path):
        return Pipeline.open(path, dtype=dtype or default_dtype()), prompts or PROMPTS
    pipeline = Pipeline.open(path, dtype=dtype)
    meta = checkpoint.load_meta(checkpoint.find(path, None))
    return pipeline, prompts or meta["config"]["preview"]["prompts"] or PROMPTS


def default_dtype() -> str:
    return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


class Drawn(NamedTuple):
    """All pictures of one row."""

    images: np.ndarray
    passes: float
    flops: float
    first_call_seconds: float


def all_caption_slots():
    """Within it captions are padded to as many slots as the text encoder has."""
    return mock.patch.object(pipeline_module, "caption_slots", return_value=sys.maxsize)


class Bench:
    """Draws the same prompts and noise, batch by batch, with any settings."""

    def __init__(
        self,
        pipeline: Pipeline,
        baseline: Mapping[str, Any],
        prompts: Sequence[str],
        *,
        height: int,
        width: int,
        batch_size: int,
        num_batches: int,
    ):
        self.pipeline, self.baseline = pipeline, baseline
        self.height, self.width = height, width
        self.batch_size, self.num_batches = batch_size, num_batches
        self.num_pictures = batch_size * num_batches
        self.prompts = [prompts[i % len(prompts)] for i in range(self.num_pictures)]
        self.seeds = list(range(self.num_pictures))

    def flops(self, index, changes, trace, *, all_slots=False, prompt_offset=0, seed_offset=0):
        """Of the network, for a picture of this batch."""
        del seed_offset
        config = self.config(changes)
        prompts = self.batch_prompts(index, prompt_offset)
        with all_caption_slots() if all_slots else contextlib.nullcontext():
            slots = self.pipeline.caption_slots(
                prompts, [""] * len(prompts), self.pipeline.system_prompt, config.semantics
            )
        most = tuple(max(each) for each in zip(*slots, strict=True))
        return self.pipeline.flops(self.height, self.width, config, slots=most, trace=trace)

    def batch_prompts(self, index: int, offset: int) -> list[str]:
        return [self.prompts[(i + offset) % self.num_pictures] for i in self.places(index)]

    def places(self, index: int) -> range:
        start = index % self.num_batches * self.batch_size
        return range(start, start + self.batch_size)

    def batch(
        self,
        index: int,
        changes: Mapping[str, Any],
        *,
        all_slots: bool = False,
        prompt_offset: int = 0,
        seed_offset: int = 0,
    ):
        """The pictures of a batch, and what a cache did.

        Args:
          index: Of the batch; they repeat.
          changes: Over the baseline's settings.
          all_slots: See Row.
          prompt_offset: Each picture gets the prompt of one so many places further on.
          seed_offset: Added to all seeds.
        """
        with all_caption_slots() if all_slots else contextlib.nullcontext():
            return self.pipeline(
                self.batch_prompts(index, prompt_offset),
                seed=[self.seeds[i] + seed_offset for i in self.places(index)],
                height=self.height,
                width=self.width,
                output="uint8",
                trace=True,
                **{**self.baseline, **changes},
            )

    def draw(self, changes: Mapping[str, Any], **options) -> Drawn:
        """All batches."""
        began = time.perf_counter()
        drawn = [self.batch(0, changes, **options)]
        first_call = time.perf_counter() - began
        drawn += [self.batch(i, changes, **options) for i in range(1, self.num_batches)]
        images = np.concatenate([images for images, _ in drawn])
        path = self.path(changes)
        flops = [
            self.flops(index, changes, trace, **options) for index, (_, trace) in enumerate(drawn)
        ]
        passes = [
            path.num_evaluations + path.program.num_guided
            if trace is None
            else sum(int(r.computed.any(axis=1).sum()) for r in trace if r is not None)
            for _, trace in drawn
        ]
        return Drawn(images, statistics.fmean(passes), statistics.fmean(flops), first_call)

    def path(self, changes: Mapping[str, Any]):
        return self.pipeline.path(self.height, self.width, self.config(changes))

    def config(self, changes: Mapping[str, Any]):
        return self.pipeline.settings(**{**self.baseline, **changes})


class Pictures:
    """Pictures that others are compared with; their features are found once."""

    def __init__(self, images: np.ndarray):
        self.images = images
        self.features = similarity.features(images)

    def likeness(self, other: "Pictures") -> dict[str, list[float | None]]:
        """Of each pair, by each measure."""
        found = {
            "psnr": similarity.psnr(other.images, self.images),
            "ssim": similarity.ssim(other.images, self.images),
            "features": similarity.distance(other.features, self.features),
        }
        return {
            name: [float(x) if math.isfinite(x) else None for x in values]
            for name, values in found.items()
        }


def draw_all(
    bench: Bench, rows: Sequence[Row]
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Draws with every setting, which compiles all programs that are timed later.

    Returns:
      For each row its entry in JSON, so far without times and quality; the pictures by row.
    """
    results, pictures = [], {}
    for row in rows:
        drawn = bench.draw(row.changes, all_slots=row.all_slots)
        results.append(
            {
                **dataclasses.asdict(row),
                "evaluations": bench.path(row.changes).num_evaluations,
                "passes": drawn.passes,
                "flops": drawn.flops,
                "first_call_seconds": drawn.first_call_seconds,
            }
        )
        pictures[row.name] = drawn.images
        print(f"{row.name}: drawn, first call {drawn.first_call_seconds:.1f} s", flush=True)
    return results, pictures


def measure_quality(
    bench: Bench,
    rows: Sequence[Row],
    results: Sequence[dict[str, Any]],
    images: Mapping[str, np.ndarray],
):
    """Adds to the results how far pictures are from the baseline's and from those of the limits.

    Returns:
      How far other pictures are from the baseline's, by what they are; and those of the limit.
    """
    finer = (BASELINE["num_steps"] - 1) * 4 + 1

    @functools.cache
    def limit(truncation: float, renorm: float) -> Pictures:
        changes = dict(guidance_truncation=truncation, guidance_renorm=renorm)
        return Pictures(bench.draw({**changes, "num_steps": finer}).images)

    baseline = Pictures(images[rows[0].name])
    for row, result in zip(rows, results, strict=True):
        settings = {**BASELINE, **row.changes}
        own = limit(settings["guidance_truncation"], settings["guidance_renorm"])
        pictures = Pictures(images[row.name])
        references = {"baseline": baseline, "limit": limit(1.0, 0.0), "own": own}
        result |= {name: pictures.likeness(other) for name, other in references.items()}
    others = {
        "the limit": limit(1.0, 0.0),
        "the limit with truncation 0.25, renorm 1": limit(0.25, 1.0),
    }
    distorted = similarity.distorted(baseline.images)
    others |= {name: Pictures(images) for name, images in distorted.items()}
    others["another seed"] = Pictures(bench.draw({}, seed_offset=bench.num_pictures).images)
    if len(set(bench.prompts)) > 1:
        others["another prompt, the same noise"] = Pictures(bench.draw({}, prompt_offset=1).images)
    yardsticks = {name: pictures.likeness(baseline) for name, pictures in others.items()}
    return yardsticks, {f"limit: midpoint, {finer} points": limit(1.0, 0.0).images}


def measure_speed(
    bench: Bench, rows: Sequence[Row], results: Sequence[dict[str, Any]], rounds: int
) -> None:
    """Adds times and ratios to the results."""
    programs = {
        row.name: functools.partial(bench.batch, changes=row.changes, all_slots=row.all_slots)
        for row in rows
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn, seconds in enumerate(take_turns(programs, rounds)):
        for name, value in seconds.items():
            times[name].append(value / bench.batch_size)
        print(f"round {turn + 1} of {rounds}: {sum(seconds.values()):.1f} s", flush=True)
    for row, result in zip(rows, results, strict=True):
        result["seconds"] = times[row.name]
        for name, over in (("speed_ups", rows[0].name), ("steps", row.over)):
            if over is not None:
                result[name] = [a / b for a, b in zip(times[over], times[row.name], strict=True)]


def take_turns(
    programs: Mapping[str, Callable[[int], Any]], rounds: int
) -> Iterator[dict[str, float]]:
    """Seconds of each program in each round; all get the round's number."""
    names = list(programs)
    stride = max(1, len(names) // rounds)
    for turn in range(rounds):
        first = turn * stride % len(names)
        seconds = {}
        for name in names[first:] + names[:first]:
            began = time.perf_counter()
            programs[name](turn)
            seconds[name] = time.perf_counter() - began
        yield seconds


def check_ladder(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Says what each rung gained; returns those that gained too little."""
    short = []
    for result in results:
        if result["needed"]:
            gained = statistics.median(result["steps"])
            enough = gained >= result["needed"]
            print(
                f"{result['name']}: {gained:.2f} times as fast as the rung above, "
                f"{'at least' if enough else 'LESS THAN'} {result['needed']}"
            )
            short += [] if enough else [result["name"]]
    return short


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """One row for each setting."""
    heads = ["setting", "evaluations", "passes", "FLOPs", "seconds", "speed-up", "step"]
    compared = [name for name in COMPARISONS if name in results[0]]
    for name in compared:
        heads += [f"{COMPARISONS[name]}: PSNR", "SSIM", "features"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for result in results:
        seconds = result["seconds"]
        cells = [
            result["name"],
            f"{result['evaluations']}",
            f"{result['passes']:.1f}".removesuffix(".0"),
            f"{result['flops'] / results[0]['flops']:.3f}",
            f"{statistics.median(seconds):.3g} ({min(seconds):.3g} to {max(seconds):.3g})",
            f"{statistics.median(result['speed_ups']):.2f}",
            f"{statistics.median(result['steps']):.2f}" if result["over"] else "",
        ]
        for name in compared:
            cells += likeness_cells(result[name])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def yardstick_table(yardsticks: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| pictures | PSNR | SSIM | features |", "|---|---:|---:|---:|"]
    for name, likeness in yardsticks.items():
        lines.append("| " + " | ".join([name, *likeness_cells(likeness)]) + " |")
    return "\n".join(lines)


def likeness_cells(likeness: Mapping[str, Sequence[float | None]]) -> list[str]:
    psnr, ssim, features = (middle(likeness, name) for name in ("psnr", "ssim", "features"))
    return ["equal" if math.isinf(psnr) else f"{psnr:.1f}", f"{ssim:.3f}", f"{features:.2g}"]


def middle(likeness: Mapping[str, Sequence[float | None]], measure: str) -> float:
    """The median over the pictures; infinite only if most of them are equal."""
    return statistics.median_low(math.inf if x is None else x for x in likeness[measure])


def plot(
    results: Sequence[Mapping[str, Any]],
    yardsticks: Mapping[str, Mapping[str, Any]],
    title: str,
    path: pathlib.Path,
) -> None:
    """Speed against distance of features, to the limit and to each row's own limit."""
    subjects = {
        "limit": "to the limit: all that is lost",
        "own": "to its own limit: what solver, cache and merging miss",
    }
    tradeoff.plot(
        path,
        {
            f"Distance of features {subject}": [
                tradeoff.Point(
                    statistics.median(result["speed_ups"]),
                    middle(result[name], "features"),
                    result["name"].partition(":")[0],
                    result["ladder"],
                )
                for result in results
            ]
            for name, subject in subjects.items()
        },
        levels={
            name: middle(yardsticks[name], "features")
            for name in ("JPEG of quality 50", "another seed")
        },
        title=title,
    )


def draw_sheet(
    results: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, np.ndarray],
    title: str,
    path: pathlib.Path,
) -> None:
    """The same pictures by each row, at most four; some rows side by side, the limit's first."""
    images, captions, notes = [], [], []
    found = {result["name"]: result for result in results}
    num = min(4, len(next(iter(pictures.values()))))
    for name, drawn in pictures.items():
        images += list(drawn[:num])
        captions += [name] + [""] * (num - 1)
        psnr = found.get(name, {}).get("baseline", {"psnr": [0] * num})["psnr"][:num]
        notes += ["equal" if x is None else f"{x:.1f} dB" if x else "" for x in psnr]
    save_contact_sheet(
        path, images, captions, notes=notes, columns=12 // num * num, cell_size=112,
        text_size=0.1, title=f"{title}; PSNR to the baseline",
    )  # fmt: skip


def write_json(path: pathlib.Path, **content) -> None:
    content = {"command": shlex.join(sys.argv), "versions": versions(), **content}
    files.write(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def describe_machine() -> dict[str, Any]:
    """The machine, and how busy others keep it, if this is called before the work."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    machine = {
        "processor": processor,
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "device": jax.devices()[0].device_kind,
        "platform": platform.platform(),
        "date": datetime.date.today().isoformat(),
    }
    if machine["load_before"] > 0.5 * machine["cores"]:
        print(
            f"Others use this machine: load {machine['load_before']:.1f} on {machine['cores']} "
            "cores. Measure again when it is quiet; torch suffers most, whose threads spin while "
            "they wait, unless OMP_WAIT_POLICY=passive is set.",
            flush=True,
        )
    return machine


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("lumina-jax", "jax", "jaxlib", "numpy", "torch", "diffusers", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def compare_with_diffusers(args: flags.FlagValues, path: str) -> int:
    """The second command; `path` has a pipeline of random weights."""
    import diffusers
    import torch

    if checkpoint.is_run(path):
        raise InputError(
            f"{path} is a run, which diffusers cannot read. Give a folder of diffusers."
        )
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other needs memory too
    machine = describe_machine()
    dtype, device = args.dtype or default_dtype(), torch_device(torch, args.device)
    if device == "cuda":  # as JAX does there with float32
        torch.set_float32_matmul_precision("high")
    theirs = diffusers.Lumina2Pipeline.from_pretrained(path, torch_dtype=getattr(torch, dtype))
    theirs.to(device)
    theirs.set_progress_bar_config(disable=True)
    ours = Pipeline.from_diffusers(path, dtype=dtype)
    num, side = args.batch_size, args.side or 256
    scale = args.guidance_scale or ours.defaults.guidance_scale
    prompts = [PROMPTS[0]] * num
    shape = (num, side // 8, side // 8, theirs.transformer.config.in_channels)
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    their_noise = torch.as_tensor(noise).permute(0, 3, 1, 2).to(device, theirs.transformer.dtype)

    def draw_theirs(turn):
        del turn
        return theirs(
            prompts, height=side, width=side, num_inference_steps=args.num_steps,
            guidance_scale=scale, cfg_trunc_ratio=args.guidance_truncation, latents=their_noise,
            output_type="np",
        ).images  # fmt: skip

    def draw_ours(turn):
        del turn
        return ours(
            prompts, height=side, width=side, num_steps=args.num_steps, guidance_scale=scale,
            guidance_truncation=args.guidance_truncation, latents=noise, output="float",
        )  # fmt: skip

    programs = {"diffusers": draw_theirs, "lumina_jax": draw_ours}
    first_calls, images = {}, {}
    for name, draw in programs.items():
        began = time.perf_counter()
        images[name] = draw(0)
        first_calls[name] = time.perf_counter() - began
        print(f"{name}: first call {first_calls[name]:.1f} s", flush=True)
        if not np.isfinite(images[name]).all():
            raise FloatingPointError(f"{name} drew numbers that are not finite")
    likeness = similarity.psnr(*(np.round(x * 255).astype(np.uint8) for x in images.values()))
    print(f"PSNR between the two: {', '.join(f'{x:.1f}' for x in likeness)} dB", flush=True)
    times: dict[str, list[float]] = {name: [] for name in programs}
    for seconds in take_turns(programs, args.rounds):
        for name, value in seconds.items():
            times[name].append(value / num)
        theirs_now, ours_now = (times[name][-1] for name in programs)
        print(
            f"{theirs_now:.2f} s a picture in diffusers, {ours_now:.2f} s here: "
            f"{theirs_now / ours_now:.2f} times as fast",
            flush=True,
        )
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    median = statistics.median(ratios)
    needed = NEEDED_OF_DIFFUSERS["gpu" if device == "cuda" else "cpu"]
    print(
        f"{args.checkpoint or args.size}, {side} px, batch {num}, {args.num_steps} steps, guidance "
        f"{scale:g} in {args.guidance_truncation:.0%} of them, {dtype} on "
        f"{jax.devices()[0].device_kind}: median ratio {median:.2f}, "
        f"{'at least' if median >= needed else 'LESS THAN'} {needed}"
    )
    if args.output:
        write_json(
            pathlib.Path(args.output) / "diffusers.json", machine=machine,
            model=args.checkpoint or args.size, side=side, batch_size=num,
            num_steps=args.num_steps, dtype=dtype, guidance_scale=scale,
            guidance_truncation=args.guidance_truncation, first_call_seconds=first_calls,
            seconds=times, ratios=ratios, median_ratio=median,
            psnr=[float(x) if math.isfinite(x) else None for x in likeness],
        )  # fmt: skip
    return int(args.check and median < needed)


def torch_device(torch, wanted: str) -> str:
    """Where diffusers draws: on the kind of device that JAX has; `wanted` is of --device."""
    if wanted == "cpu":
        return "cpu"
    platform = jax.devices()[0].platform
    if platform == "cpu" and torch.cuda.is_available():
        raise InputError(
            "torch has a GPU here and JAX has not. Install it for JAX, pip install "
            "'lumina-jax[cuda]', or compare on the processor: --device=cpu."
        )
    if platform != "cpu" and not torch.cuda.is_available():
        raise InputError(
            f"JAX draws on {jax.devices()[0].device_kind}, and torch {torch.__version__} has no "
            "CUDA device, so the two cannot be compared there. Install torch for CUDA, see "
            "https://pytorch.org/get-started, or compare on the processor: --device=cpu."
        )
    return "cpu" if platform == "cpu" else "cuda"


def save_pipeline(folder: pathlib.Path, size: str, dtype: str) -> None:
    """Writes a random pipeline of the released architecture, most with fewer, narrower layers."""
    import diffusers
    import torch
    import transformers

    sizes, width = SIZES[size], SIZES[size]["hidden_size"]
    third = width // sizes["heads"] // 3 // 2 * 2
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    # Two billion numbers are drawn in a minute on a processor, in a blink on a GPU.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        parts = dict(
            transformer=diffusers.Lumina2Transformer2DModel(
                sample_size=32,
                hidden_size=width,
                num_layers=sizes["num_layers"],
                num_attention_heads=sizes["heads"],
                num_kv_heads=sizes["kv_heads"],
                axes_dim_rope=(width // sizes["heads"] - 2 * third, third, third),
                cap_feat_dim=width,
            ),
            vae=diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=sizes["vae"],
                layers_per_block=2,
                latent_channels=16,
                norm_num_groups=min(32, sizes["vae"][0]),
                scaling_factor=0.3611,
                shift_factor=0.1159,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            text_encoder=transformers.Gemma2Model(
                transformers.Gemma2Config(
                    vocab_size=len(tokenizer),
                    hidden_size=width,
                    intermediate_size=4 * width,
                    num_hidden_layers=sizes["num_layers"],
                    num_attention_heads=8,
                    num_key_value_heads=4,
                    head_dim=min(width // 8, 256),
                )
            ),
        )
    diffusers.Lumina2Pipeline(
        **{name: part.to(getattr(torch, dtype)) for name, part in parts.items()},
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        tokenizer=tokenizer,
    ).save_pretrained(folder)


def make_tokenizer():
    """A Gemma tokenizer with about as many tokens for the prompts as the real one has."""
    import tokenizers
    import transformers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{b:02X}>" for b in range(256))]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, show_progress=False
    )
    bpe.train_from_iterator([*PROMPTS, *SYSTEM_PROMPTS.values()], trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.GemmaTokenizer(
        vocab=model["vocab"], merges=merges, add_bos_token=True, padding_side="right"
    )


COMMANDS = {"accelerations": accelerations, "diffusers": compare_with_diffusers}


if __name__ == "__main__":
    define_flags()
    cli.run(main, commands=tuple(COMMANDS))
