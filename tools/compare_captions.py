r"""What captions of several kinds do to training: small runs that differ in nothing else.

    python tools/prepare_data.py openmoji --describe --output=data/described --resolution=32 \
        --pixels_per_token=4 --buckets=32x32,40x24,24x40
    python tools/compare_captions.py --data=data/described --output=runs/captions

trains the model of configs/tiny.py three times, on short captions, on long ones and on all kinds
mixed: the same pictures in the same order, the same noise and times, the same weights to begin
with, as many text slots. Each is a run of lumina_jax.train in a folder of the output; one that was
stopped goes on, and one that is finished is not trained again. Then every model draws from short
and from long captions, of pictures that it was trained on and of others that were held out.

Writes comparison.png (losses, validation losses, shares of right pictures) and results.json.
"""

import copy
import io
import json
import math
import pathlib
import sys
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
import rich.box
import rich.table
from absl import flags
from etils import epath
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from lumina_jax import checkpoint, cli, evaluate, executables, files, plots, train
from lumina_jax.data.captions import KINDS
from lumina_jax.data.loader import read_pictures
from lumina_jax.data.records import Manifest
from lumina_jax.errors import InputError
from lumina_jax.evaluation.retrieval import nearest
from lumina_jax.frozen.text_encoder import make_text_encoder
from lumina_jax.sampling.pipeline import Pipeline
from lumina_jax.train_step import TrainState

ASKED = ("short", "long")  # kinds of captions that every model is asked with
PARTS = ("trained on", "held out")
_COLOURS = {"short": "#3a9a5b", "long": "#2563a8", "mixed": "#e08a1e"}
_FAINT, _GRID = "#757575", "#ececec"


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", "configs/tiny.py", "Of the model and its training.")
    flags.DEFINE_string("data", None, "A data set with short and long captions.")
    flags.DEFINE_string("output", None, "Directory of the three runs and of what is found.")
    flags.DEFINE_integer("num_steps", 1500, "Of each run.", lower_bound=1)
    flags.DEFINE_integer("num_held_out", 128, "Pictures no run is trained on.", lower_bound=1)
    flags.DEFINE_integer("num_prompts", 512, "Pictures drawn for each score.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Pictures drawn at a time.", lower_bound=1)


def main() -> None:
    args = flags.FLAGS
    config, output = args.config, epath.Path(args.output)
    executables.use_cache(config.compile.cache_directory, default=f"{output}/compiled")
    configs = make_configs(config, args.data, args.num_steps, args.num_held_out)
    for name, of_run in configs.items():
        check_same(str(output / name), of_run)
    results: dict[str, Any] = {
        "data": Manifest.load(args.data).fingerprint,
        "num_steps": args.num_steps,
        "num_held_out": args.num_held_out,
        "num_prompts": args.num_prompts,
        "languages": list(configs["short"].data.languages),
        "text_slots": configs["short"].text_encoder.max_tokens,
        "runs": {},
    }
    for name, of_run in configs.items():
        print(f"The run on {name} captions.", flush=True)
        workdir = str(output / name)
        state = train.train(of_run, workdir)
        results["runs"][name] = {
            "loss": final_loss(plots.read_metrics(f"{workdir}/metrics.jsonl")),
            "validation_loss": {
                kind: validation_loss(configs[kind], workdir, state) for kind in ASKED
            },
            "retrieval": retrieval(
                of_run, workdir, num_prompts=args.num_prompts, batch_size=args.batch_size
            ),
        }
    files.write(output / "results.json", json.dumps(results, indent=2) + "\n")
    curves = {name: plots.read_metrics(output / name / "metrics.jsonl") for name in configs}
    plot(output / "comparison.png", curves, results["runs"])
    print_results(results)


def make_configs(
    config: ConfigDict, data: str, num_steps: int, num_held_out: int
) -> dict[str, ConfigDict]:
    """The three runs: equal but for the kinds of captions, in the languages that all kinds have."""
    pairs = [
        pair
        for split in Manifest.load(data).splits
        for captions in split.caption_sets
        for pair in captions.pairs
    ]
    kinds = [kind for kind in KINDS if kind in {kind for kind, _ in pairs}]
    if missing := [kind for kind in ASKED if kind not in kinds]:
        raise InputError(
            f"{data} has no {' and no '.join(missing)} captions; it has {', '.join(kinds)}. "
            "Prepare one with both, such as with: tools/prepare_data.py openmoji --describe."
        )
    languages = sorted(
        set.intersection(*({of for of_kind, of in pairs if of_kind == kind} for kind in kinds))
    )
    if not languages:
        raise InputError(f"No language of {data} has captions of all kinds: {', '.join(kinds)}.")
    max_tokens = longest_caption(config, data, languages)
    configs = {}
    for name in (*ASKED, "mixed"):
        configs[name] = of_run = copy.deepcopy(config).unlock()
        of_run.data.directory, of_run.data.datasets = data, ConfigDict()
        chosen = kinds if name == "mixed" else [name]
        of_run.data.kinds = ConfigDict(dict.fromkeys(chosen, 1.0))
        of_run.data.languages = ConfigDict(dict.fromkeys(languages, 1.0))
        of_run.data.text_slots = ConfigDict()
        of_run.text_encoder.max_tokens = max_tokens
        of_run.train.num_steps = num_steps
        of_run.preview.every = 0
        of_run.validation.update(
            every=max(1, num_steps // 10), num_records=num_held_out, directory="", batch_size=32
        )
    return configs


def longest_caption(config: ConfigDict, data: str, languages: Collection[str]) -> int:
    """Text slots for the longest caption of the data, a multiple of 16, so that none is cut."""
    policy = train.caption_policy(config.data)
    texts = {
        policy.text([caption], 0, [0.0] * policy.NUM_DRAWS)
        for picture in read_pictures(data)
        for caption in picture["captions"]
        if caption.language in languages
    }
    most = 4096
    encoder = make_text_encoder(**{**config.text_encoder, "max_tokens": most})
    longest = max(int(encoder.tokenize([text])[1].sum()) for text in texts)
    if encoder.num_truncated:
        raise InputError(f"{data} has captions of more than {most} tokens; prepare it without.")
    return 16 * math.ceil(longest / 16)


def check_same(workdir: str, config: ConfigDict) -> None:
    """Refuses a folder with a run of other settings, which would be compared with the others."""
    if checkpoint.is_run(workdir) and checkpoint.find_steps(workdir):
        saved = checkpoint.load_meta(checkpoint.find(workdir))["config"]
        if changes := checkpoint.differences(saved, config.to_dict()):
            raise InputError(
                f"{workdir} holds a run of other settings: {'; '.join(changes)}. Give them again, "
                "or another --output."
            )


def final_loss(metrics: Mapping[int, Mapping[str, float]]) -> float:
    """The mean of the last tenth of the steps."""
    losses = [scalars["loss"] for scalars in metrics.values() if "loss" in scalars]
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def validation_loss(config: ConfigDict, workdir: str, state: TrainState) -> float:
    """The loss of averaged weights on the held-out pictures, with captions of a config's kinds."""
    trainer = train.Trainer(config, workdir)
    with jax.set_mesh(trainer.mesh):
        return trainer.validator(state.ema, state.params)["validation_loss"]


def retrieval(
    config: ConfigDict, workdir: str, *, num_prompts: int, batch_size: int
) -> dict[str, Any]:
    """How often a sample is nearest to the picture whose caption was its prompt.

    Of the pictures held out, and of as many that were trained on: their number, and the share of
    right samples for each kind of caption. The same pictures and noise for every kind and run.
    """
    trainer = train.Trainer(config, workdir)
    held_out = {
        record_id
        for batch in trainer.loader.held_out_batches(config.validation.batch_size)
        for record_id in batch["ids"]
    }
    parts: dict[str, list] = {part: [] for part in PARTS}
    for picture in read_pictures(config.data.directory):
        parts["held out" if picture["id"] in held_out else "trained on"].append(picture)
    # As many, so that chance is the same, at even distances: neighbours are alike.
    trained, num = parts["trained on"], min(map(len, parts.values()))
    parts["trained on"] = [trained[index * len(trained) // num] for index in range(num)]
    pipeline = Pipeline.from_checkpoint(workdir)
    found: dict[str, Any] = {}
    for part, of_part in parts.items():
        found[part] = {"num_pictures": len(of_part)}
        for kind in ASKED:
            asked = [
                {**p, "captions": [c for c in p["captions"] if c.kind == kind]} for p in of_part
            ]
            chosen = evaluate.choose_prompts(asked, list(config.data.languages), num_prompts, 0)
            samples = evaluate.draw(pipeline, asked, chosen, batch_size, 0)
            images = [picture["image"] for picture in asked]
            places = nearest(samples, images, config.data.resolution)
            right = [place == index for (index, _), place in zip(chosen, places, strict=True)]
            found[part][kind] = float(np.mean(right))
    return found


def plot(
    path: epath.Path,
    curves: Mapping[str, Mapping[int, Mapping[str, float]]],
    runs: Mapping[str, Mapping[str, Any]],
) -> None:
    """Draws what the runs logged and the shares of right pictures as a PNG.

    Args:
      path: Of the PNG.
      curves: Of each run, the scalars of its steps.
      runs: Of each run, its part of results.json.
    """
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    panels = figure.subplot_mosaic(
        [["loss", "held out loss", PARTS[0]], ["difference", "held out loss", PARTS[1]]],
        width_ratios=[1.5, 1, 1.1],
    )
    first = curves[ASKED[0]]
    losses, differences = [], []
    for name, metrics in curves.items():
        losses.append(_series(metrics, "loss"))
        _plot_curve(panels["loss"], *losses[-1], name)
        held_out = _series(metrics, "validation_loss")
        panels["held out loss"].plot(
            *held_out, "o-", color=_COLOURS[name], markersize=3, label=name
        )
        if name != ASKED[0]:
            # Step by step the pictures, noise and times are equal: what they add cancels. A run
            # that was stopped has a line more.
            steps, values = _series(metrics, "loss")
            both = [step in first and "loss" in first[step] for step in steps.astype(int)]
            there = np.array([first[step]["loss"] for step in steps[both].astype(int)])
            differences.append((steps[both], values[both] - there))
            _plot_curve(panels["difference"], *differences[-1], name)
    panels["difference"].axhline(0, color=_FAINT, linewidth=0.8)
    # The first steps, where every run falls from the same height, would press the rest flat.
    late = np.concatenate([values[len(values) // 20 :] for _, values in losses])
    margin = 0.05 * (late.max() - late.min())
    panels["loss"].set_ylim(late.min() - margin, late.max() + margin)
    apart = max(np.abs(values[len(values) // 20 :]).max() for _, values in differences) or 1.0
    panels["difference"].set_ylim(-1.1 * apart, 1.1 * apart)
    for part in PARTS:
        _plot_scores(panels[part], part, runs)
    top = max(panels[part].get_ylim()[1] for part in PARTS)
    for part in PARTS:
        panels[part].set_ylim(0, top)
    for name, title in (
        ("loss", "training loss, by captions trained on"),
        ("difference", "the same, less that of short captions"),
        ("held out loss", "loss of held-out pictures, averaged weights"),
    ):
        panels[name].set_title(title, loc="left", fontsize=10)
        panels[name].set_xlabel("step", fontsize=9)
        panels[name].legend(frameon=False, fontsize=8)
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.grid(color=_GRID, axis="y")
        panel.set_axisbelow(True)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    files.write(path, png.getvalue())


def _plot_curve(panel, steps: np.ndarray, values: np.ndarray, name: str) -> None:
    """What is logged, faint, and its running median."""
    panel.plot(steps, values, color=_COLOURS[name], linewidth=0.6, alpha=0.3)
    smoothed = plots.smooth(values, len(values) // 25)
    panel.plot(steps, smoothed, color=_COLOURS[name], linewidth=1.6, label=name)


def _plot_scores(panel, part: str, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Bars: a group for each kind of prompt, in it a bar for each run; dashed is chance."""
    width = 0.8 / len(runs)
    for number, (name, run) in enumerate(runs.items()):
        scores = [run["retrieval"][part][kind] for kind in ASKED]
        places = np.arange(len(ASKED)) + (number - (len(runs) - 1) / 2) * width
        bars = panel.bar(places, scores, width * 0.95, color=_COLOURS[name], label=name)
        panel.bar_label(bars, fmt="{:.3f}", fontsize=8, color=_FAINT)
    num_pictures = next(iter(runs.values()))["retrieval"][part]["num_pictures"]
    panel.axhline(1 / num_pictures, color=_FAINT, linewidth=0.8, linestyle="--")
    panel.set_xticks(range(len(ASKED)), [f"asked with {kind}" for kind in ASKED], fontsize=9)
    panel.margins(y=0.15)
    title = f"right of {num_pictures:,} pictures {part}"
    panel.set_title(title, loc="left", fontsize=10)


def _series(metrics: Mapping[int, Mapping[str, float]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The steps that have a scalar, and its values."""
    pairs = [(step, scalars[name]) for step, scalars in metrics.items() if name in scalars]
    return tuple(np.array(pairs, float).reshape(-1, 2).T)


def print_results(results: Mapping[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True, width=140)
    table = rich.table.Table("trained on", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("loss", justify="right")
    columns = [(field, kind) for field in ("validation_loss", *PARTS) for kind in ASKED]
    for field, kind in columns:
        title = "loss, held out" if field == "validation_loss" else f"right, {field}"
        table.add_column(f"{title},\nasked with {kind}", justify="right")
    for name, run in results["runs"].items():
        scores = [
            f"{run[field][kind]:.4f}"
            if field == "validation_loss"
            else f"{run['retrieval'][field][kind]:.3f}"
            for field, kind in columns
        ]
        table.add_row(name, f"{run['loss']:.4f}", *scores)
    console.print(table)
    console.print(
        f"{results['num_steps']:,} steps, {results['text_slots']} text slots, captions in "
        f"{', '.join(results['languages'])}."
    )


if __name__ == "__main__":
    # Run as a file, Python looks for modules beside it; a config imports its base from the root.
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    define_flags()
    cli.run(main, required=("data", "output"))
