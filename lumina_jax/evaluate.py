"""Counts how often a model trained on a small data set draws the picture that a prompt names.

python -m lumina_jax.evaluate --checkpoint=runs/tiny

Prompts in the languages of the training and, apart, in those that were left out. Writes
<checkpoint>/evaluation/retrieval.json and a contact sheet of each group.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags, logging
from etils import epath

from lumina_jax import checkpoint, cli, executables, files
from lumina_jax.data.loader import read_pictures
from lumina_jax.errors import InputError
from lumina_jax.evaluation.retrieval import nearest
from lumina_jax.progress import progress_bar
from lumina_jax.sampling.contact_sheet import save_contact_sheet
from lumina_jax.sampling.pipeline import Pipeline


def define_flags() -> None:
    flags.DEFINE_string("cache_directory", "", "Of compiled programs; JAX_COMPILATION_CACHE_DIR.")
    flags.DEFINE_string("checkpoint", None, "Workdir of a run.")
    flags.DEFINE_string("data", None, "Its data set; that of its config by default.")
    flags.DEFINE_integer("num_prompts", 64, "Prompts in each group.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Pictures drawn at a time.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the choice of prompts and of the noise.")


def evaluate(path: str, data: str | None, *, num_prompts: int, batch_size: int, seed: int) -> dict:
    """The fraction of right pictures for each group of languages, with the chance beside it."""
    found = checkpoint.find(path)
    config = checkpoint.load_meta(found)["config"]
    if "data" not in config or "sampling" not in config:
        raise InputError(
            f"{path} was not trained here on pictures with captions: nothing to count."
        )
    directory = data or config["data"]["directory"]
    if not directory:
        raise InputError(f"{path} was trained on a mixture of data sets; name one with --data.")
    pictures = list(read_pictures(directory))
    pipeline = Pipeline.from_checkpoint(path)
    output = epath.Path(path) / "evaluation"

    there = {caption.language for picture in pictures for caption in picture["captions"]}
    weights = config["data"]["languages"]
    trained = {language for language, weight in weights.items() if weight > 0} or there
    if missing := sorted(trained - there):
        raise InputError(
            f"The run was trained on captions in {', '.join(missing)}, which the data set "
            f"lacks; it has {', '.join(sorted(there))}. Give the run's own with --data."
        )
    groups = {"trained languages": trained, "held-out languages": there - trained}
    chance = 1 / len(pictures)
    results = {
        "step": int(found.name),
        "num_pictures": len(pictures),
        "chance": chance,
    }
    for group, languages in groups.items():
        if not languages:
            continue
        chosen = choose_prompts(pictures, sorted(languages), num_prompts, seed)
        samples = draw(pipeline, pictures, chosen, batch_size, seed)
        found_index = nearest(samples, [p["image"] for p in pictures], config["data"]["resolution"])
        right = np.array(
            [int(i) == index for (index, _), i in zip(chosen, found_index, strict=True)]
        )
        by_language = defaultdict(list)
        for (_, caption), ok in zip(chosen, right, strict=True):
            by_language[caption.language].append(bool(ok))
        results[group] = {
            "fraction": float(right.mean()),
            "num_prompts": len(chosen),
            "by_language": {k: float(np.mean(v)) for k, v in sorted(by_language.items())},
        }
        save_contact_sheet(
            output / f"{group.replace(' ', '_')}.png",
            samples,
            [caption.text for _, caption in chosen],
            columns=8,
            cell_size=144,
            title=f"{group}: {right.mean():.3f} right (chance {chance:.3f}); "
            "✗: another training picture is nearer",
            notes=[
                caption.language if ok else f"✗ {caption.language} ✗"
                for (_, caption), ok in zip(chosen, right, strict=True)
            ],
        )
        logging.info(
            "%s: %.3f of %d samples are nearest to their own of %d pictures (chance %.3f).",
            group, right.mean(), len(chosen), len(pictures), chance,
        )  # fmt: skip
    files.write(output / "retrieval.json", json.dumps(results, indent=2, ensure_ascii=False))
    logging.info("Written to %s.", output)
    return results


def choose_prompts(pictures: Sequence[dict], languages: Sequence[str], num: int, seed: int):
    """`num` times (index of a picture, one of its captions): no picture twice before all once."""
    rng = np.random.default_rng(seed)
    order = np.concatenate(
        [rng.permutation(len(pictures)) for _ in range(-(-num // len(pictures)))]
    )
    chosen = []
    for count, index in enumerate(order[:num]):
        language = languages[count % len(languages)]
        captions = [c for c in pictures[index]["captions"] if c.language == language]
        if not captions:
            raise InputError(f"Picture {pictures[index]['id']} has no caption in {language}.")
        chosen.append((int(index), captions[0]))
    return chosen


def draw(pipeline: Callable, pictures, chosen, batch_size: int, seed: int) -> list[np.ndarray]:
    """A sample for each chosen prompt, in the shape of the picture that it should show."""
    by_shape = defaultdict(list)
    for number, (index, _) in enumerate(chosen):
        by_shape[pictures[index]["image"].shape[:2]].append(number)
    samples, done = [None] * len(chosen), 0
    with progress_bar("Sampling", len(chosen), unit="pictures") as advance:
        for (height, width), numbers in sorted(by_shape.items()):
            for start in range(0, len(numbers), batch_size):
                part = numbers[start : start + batch_size]
                # Filled up, so that each shape compiles once.
                fill = [part[i % len(part)] for i in range(batch_size)]
                images = pipeline(
                    [chosen[number][1].text for number in fill],
                    height=height,
                    width=width,
                    seed=[seed + number for number in fill],
                    output="uint8",
                )
                for number, image in zip(part, images, strict=False):
                    samples[number] = image
                advance(done := done + len(part))
    return samples


def main() -> None:
    args = flags.FLAGS
    executables.use_cache(args.cache_directory)
    evaluate(
        args.checkpoint,
        args.data,
        num_prompts=args.num_prompts,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    logging.info("%s", executables.summary())


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=("checkpoint",))
