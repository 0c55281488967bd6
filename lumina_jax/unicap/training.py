"""Fine-tuning a Qwen-VL model on pictures with captions, so that it captions alike.

Each caption is the answer to the question that asks for its kind and language, with the picture
before it; the loss is on the answer. Of the captions of a picture one is drawn each time it is
seen. Order and draws are functions of the seed, the epoch and the picture's place.

The loop is transformers' Trainer, the few new weights of LoRA are peft's (Hu et al. 2021,
arXiv 2106.09685). TRL's SFTTrainer takes a vision-language model only with its AutoProcessor, which
cannot be built without torchvision.

The output holds

    settings.json         what the run is; the same command goes on, another is refused
    pictures              records of what is trained on
    report.json           how many pictures were read and why others were left out
    checkpoint-000100/    of the Trainer; the last two
    metrics.jsonl, loss.png
    captioner/            the trained checkpoint; there when the run is finished
"""

import collections
import dataclasses
import functools
import io
import json
import os
import pathlib
import random
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import logging
from matplotlib.figure import Figure
from PIL import Image

from lumina_jax import files
from lumina_jax.data import images, records
from lumina_jax.data.buckets import Bucket
from lumina_jax.data.captions import Caption, describe_pairs
from lumina_jax.data.images import Rejected
from lumina_jax.data.records import Record, Records, Shard, Split
from lumina_jax.data.sources.base import Item, Source
from lumina_jax.errors import InputError, differences
from lumina_jax.progress import progress_bar
from lumina_jax.unicap import qwen
from lumina_jax.unicap.qwen import torch, transformers  # it says what to install without them
from lumina_jax.untrusted import read_json

try:
    import peft
except ImportError as error:
    raise InputError(
        f"Training a captioner needs a package that is not installed ({error}). Install it: "
        "pip install 'lumina-jax[caption]'"
    ) from error

SETTINGS, PICTURES, REPORT = "settings.json", "pictures", "report.json"
METRICS, CURVE, CAPTIONER = "metrics.jsonl", "loss.png", "captioner"
_WHOLE = "whole"  # a file in a checkpoint, written when all others are
_NO_LOSS = -100  # the label of a token that is read, not learnt; PyTorch's
# Of the text part alone: Qwen2.5-VL's vision tower has layers of the same names.
_LORA_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
_NUM_EXAMPLES = 20  # of rejected pictures, in the report
_SECONDS = 24 * 3600  # that other processes wait for the first one to read the pictures

PromptFor = Callable[[str, str], str]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the result depends on, beside the model, the pictures and the prompts.

    Args:
        num_steps: updates of the weights.
        batch_size: conversations in a step of one device.
        accumulation: batches whose gradients are added up for an update.
        rank: of LoRA's matrices, whose product counts twice (alpha = 2 rank); 0 trains all weights.
        learning_rate: the highest; it falls to 0 at the last step.
        warmup: share of the steps in which it rises from 0. Then it falls as a cosine.
        weight_decay: of AdamW.
        held_out: share of the pictures that are not trained on but tell the validation loss.
        kinds: of captions to train on; empty for all.
        languages: of captions to train on; empty for all.
        max_tokens: of a caption; longer ones are left out.
        max_pixels: pictures with more are shrunk.
        seed: of the order, of the draws and of LoRA's start.
    """

    num_steps: int = 1000
    batch_size: int = 4
    accumulation: int = 4
    rank: int = 64
    learning_rate: float = 1e-4
    warmup: float = 0.03
    weight_decay: float = 0.0
    held_out: float = 0.02
    kinds: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    max_tokens: int = 1024
    max_pixels: int = qwen.MAX_PIXELS
    seed: int = 0

    def __post_init__(self):
        faults = [
            f"{name}={getattr(self, name)} must be {least} or more"
            for name, least in (
                ("num_steps", 1), ("batch_size", 1), ("accumulation", 1), ("rank", 0),
                ("weight_decay", 0), ("max_tokens", 1), ("seed", 0),
            )
            if not getattr(self, name) >= least
        ]  # fmt: skip
        if not 0 < self.learning_rate < 1:
            faults.append(f"learning_rate={self.learning_rate} must be between 0 and 1")
        for name in ("warmup", "held_out"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{name}={getattr(self, name)} must be 0 or more and below 1")
        if faults:
            raise InputError(f"Cannot train: {'; '.join(faults)}.")


def train(
    base: os.PathLike | str,
    source: Source,
    output: os.PathLike | str,
    prompt_for: PromptFor,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    num_workers: int = 0,
    log_every: int = 10,
    save_every: int = 100,
) -> pathlib.Path:
    """Trains and returns the folder of the new checkpoint, which `LocalBackend` reads.

    A run that was stopped goes on from its last checkpoint; a finished one is left as it is. Under
    `torchrun` each process has a device, and the first one writes.

    Args:
        base: Folder of the checkpoint to begin with.
        source: Of pictures with captions.
        output: A directory of this machine.
        prompt_for: The question that asks for a kind and a language of caption.
        settings: What the result depends on.
        device: "cpu", or "auto" for a GPU if there is one.
        num_workers: Processes that prepare batches; 0 prepares them in this one.
        log_every: Steps from a line of the metrics to the next.
        save_every: Steps from a checkpoint and a validation loss to the next.
    """
    settings = settings or Settings()
    family = qwen.find_family(base)
    if family not in qwen.FAMILIES:
        raise InputError(
            f"{os.fspath(base)} holds a model of type {family}, which sees no pictures. Give one "
            f"of type {', '.join(qwen.FAMILIES)}."
        )
    if files.is_remote(output):
        raise InputError(f"{output} is in a bucket. Train into a directory of this machine.")
    if log_every < 1 or save_every < 1 or num_workers < 0:
        raise InputError(
            f"log_every={log_every} and save_every={save_every} must be 1 or more, and "
            f"num_workers={num_workers} 0 or more."
        )
    base, output = pathlib.Path(base), pathlib.Path(output)
    chat = qwen.Chat.load(base, max_pixels=settings.max_pixels)
    arguments = _arguments(output, settings, device, num_workers, log_every, save_every)
    with arguments.main_process_first(local=False):
        if _begin(output, _identity(base, source, settings, arguments.world_size)):
            logging.info("%s is finished; it is left as it is.", output / CAPTIONER)
            return output / CAPTIONER
        _store_pictures(source, output, settings, chat)
    pictures = _open_pictures(output)
    prompts = _prompts(output, prompt_for)
    return _run(base, output, settings, chat, arguments, pictures, prompts)


def _identity(
    base: pathlib.Path, source: Source, settings: Settings, num_devices: int
) -> dict[str, Any]:
    weights = {path.name: path.stat().st_size for path in sorted(base.glob("*.safetensors"))}
    identity = {
        "base": read_json(base / "config.json", "Download the checkpoint again."),
        "weights": weights,
        "source": {"name": source.name, **source.settings()},
        "num_devices": num_devices,
        **dataclasses.asdict(settings),
    }
    return json.loads(json.dumps(identity))  # as it is read again


def _begin(output: pathlib.Path, wanted: Mapping[str, Any]) -> bool:
    """Whether the run is finished already; refuses a directory of something else."""
    path = output / SETTINGS
    if path.exists():
        there = read_json(path, "Choose another output.")
        if found := differences(there, wanted):
            raise InputError(
                f"{output} holds another run: {found}. Choose another output, or remove that one."
            )
    elif others := sorted(files.sizes(output)):
        raise InputError(
            f"{output} holds {', '.join(others[:3])} and is no run of this command. Choose another "
            "output."
        )
    else:
        files.write(path, json.dumps(wanted, indent=1, ensure_ascii=False) + "\n")
    return (output / CAPTIONER).exists()


def _store_pictures(
    source: Source, output: pathlib.Path, settings: Settings, chat: qwen.Chat
) -> None:
    """Reads the source once, so that training finds any picture at once."""
    if (output / REPORT).exists():
        return
    files.remove_asides(output)
    parts = source.parts()
    rejected: collections.Counter[str] = collections.Counter()
    examples, pairs, num_read, num_long = [], set(), 0, 0
    with (
        records.shard_writer(output / PICTURES) as write,
        progress_bar("Reading", len(parts), unit="parts") as advance,
    ):
        for done, part in enumerate(parts, start=1):
            for item in source.read(part):
                num_read += 1
                try:
                    content, size = _image(item)
                    captions, num_left_out = _captions(item, settings, chat)
                except Rejected as fault:
                    rejected[fault.reason] += 1
                    if len(examples) < _NUM_EXAMPLES:
                        examples.append({"id": item.id, "fault": str(fault)})
                    continue
                num_long += num_left_out
                pairs |= {(caption.kind, caption.language) for caption in captions}
                write(
                    records.serialize(
                        id=item.id, source=source.name, image=content, captions=captions, size=size
                    )
                )
            advance(done)
    num_written = num_read - rejected.total()
    if num_written < 2:
        raise InputError(
            f"Of {num_read} pictures {num_written} can be trained on, and at least 2 are needed. "
            f"Rejected: {dict(rejected)}; for example {examples[:3]}. Change the source, kinds or "
            "languages."
        )
    report = {
        "read": num_read,
        "written": num_written,
        "rejected": dict(rejected),
        "captions_too_long": num_long,
        "pairs": sorted(pairs),
        "examples": examples,
    }
    files.write(output / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    logging.info("Training on %d pictures with %s.", num_written, describe_pairs(pairs))


def _image(item: Item) -> tuple[bytes, tuple[int, int]]:
    """The encoded picture and its size; Rejected where it cannot be decoded."""
    if item.fault is not None:
        raise item.fault
    if isinstance(item.image, bytes):
        return item.image, images.decode(item.image).size
    png = io.BytesIO()
    item.image.save(png, "PNG")
    return png.getvalue(), item.image.size


def _captions(item: Item, settings: Settings, chat: qwen.Chat) -> tuple[list[Caption], int]:
    """The captions to train on, and how many were too long."""
    asked = [
        caption
        for caption in item.captions
        if (not settings.kinds or caption.kind in settings.kinds)
        and (not settings.languages or caption.language in settings.languages)
    ]
    short = [c for c in asked if len(chat.answer_tokens(c.text)) <= settings.max_tokens]
    if not short:
        raise Rejected(
            "no caption to train on",
            f"{describe_pairs((c.kind, c.language) for c in item.captions)}; "
            f"{len(asked)} of the kinds and languages that were asked for",
        )
    return short, len(asked) - len(short)


def _open_pictures(output: pathlib.Path) -> Records:
    report = read_json(output / REPORT, "Remove the directory and train again.")
    path = output / PICTURES
    shard = Shard(PICTURES, report["written"], path.stat().st_size)
    return Records(output, Split(Bucket(1, 1), (shard,), ()))  # no bucket: each has its own size


def _prompts(output: pathlib.Path, prompt_for: PromptFor) -> dict[tuple[str, str], str]:
    """The question of each kind and language, kept in the output: others would be another run."""
    pairs = read_json(output / REPORT, "Remove the directory and train again.")["pairs"]
    prompts = {(kind, language): prompt_for(kind, language) for kind, language in pairs}
    here = {"/".join(pair): prompt for pair, prompt in prompts.items()}
    path = output / "prompts.json"
    if path.exists() and read_json(path, "Remove the directory and train again.") != here:
        raise InputError(
            f"{output} is trained with other prompts ({path}). Train with those, or choose another "
            "output."
        )
    files.write(path, json.dumps(here, indent=1, ensure_ascii=False) + "\n")
    return prompts


def split_rows(num: int, settings: Settings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns which pictures are trained on and which are held out, one or more if any."""
    rows = _order(tuple(range(num)), settings.seed, -1)
    num_held_out = round(settings.held_out * num)
    if settings.held_out:
        num_held_out = min(max(num_held_out, 1), num - 1)
    return rows[num_held_out:], rows[:num_held_out]


@dataclasses.dataclass(frozen=True)
class Conversations(torch.utils.data.Dataset):
    """What is trained on, one after another: all epochs in one list, `num` long.

    The Trainer's own epochs would begin anew where a resumed run begins.
    """

    pictures: Records
    prompts: Mapping[tuple[str, str], str]
    chat: qwen.Chat
    rows: tuple[int, ...]
    seed: int
    num: int

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(index, len(self.rows))
        row = _order(self.rows, self.seed, epoch)[place]
        record = Record(self.pictures[row])
        caption = random.Random(f"caption {self.seed} {epoch} {row}").choice(record.captions)
        image = images.decode(record.image)
        question = self.prompts[caption.kind, caption.language]
        return {
            "question": self.chat.tokens(question, image),
            "answer": self.chat.answer_tokens(caption.text),
            "image": image,
        }


@functools.lru_cache(maxsize=2)
def _order(rows: tuple[int, ...], seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(random.Random(f"order {seed} {epoch}").sample(rows, len(rows)))


def collate(chat: qwen.Chat, conversations: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Returns a batch with `labels`, which are the tokens of the answers alone."""
    rows = [[*c["question"], *c["answer"]] for c in conversations]
    labels = [[_NO_LOSS] * len(c["question"]) + c["answer"] for c in conversations]
    pictures: list[Image.Image | None] = [c["image"] for c in conversations]
    return {**chat.batch(rows, pictures, "right"), "labels": qwen.pad(labels, _NO_LOSS, "right")}


def _arguments(
    output: pathlib.Path,
    settings: Settings,
    device: str,
    num_workers: int,
    log_every: int,
    save_every: int,
) -> transformers.TrainingArguments:
    if device not in ("auto", "cpu"):
        raise InputError(
            f"device {device!r} is not auto or cpu. Choose GPUs with CUDA_VISIBLE_DEVICES."
        )
    on_gpu = device == "auto" and torch.cuda.is_available()
    return transformers.TrainingArguments(
        output_dir=str(output),
        max_steps=settings.num_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * settings.num_steps),
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        use_cpu=not on_gpu,
        bf16=on_gpu,
        activation_checkpointing=on_gpu,
        activation_checkpointing_kwargs={"use_reentrant": False},
        ddp_find_unused_parameters=False,
        ddp_timeout=_SECONDS,
        train_sampling_strategy="sequential",  # the order is that of the data set
        dataloader_num_workers=num_workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=log_every,
        logging_nan_inf_filter=False,  # it would show the last good loss instead
        eval_strategy="steps" if settings.held_out else "no",
        eval_steps=save_every,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
    )


def _run(
    base: pathlib.Path,
    output: pathlib.Path,
    settings: Settings,
    chat: qwen.Chat,
    arguments: transformers.TrainingArguments,
    pictures: Records,
    prompts: Mapping[tuple[str, str], str],
) -> pathlib.Path:
    trained, held_out = split_rows(len(pictures), settings)
    per_step = settings.batch_size * settings.accumulation * arguments.world_size
    make = functools.partial(Conversations, pictures, prompts, chat)
    # LoRA's base is not changed: the precision of the steps is enough for it.
    dtype = "bfloat16" if settings.rank and arguments.bf16 else "float32"
    with arguments.main_process_first(local=False):
        begin = _last_checkpoint(output, remove_others=arguments.process_index == 0)
    start = int(begin.name.rpartition("-")[2]) if begin else 0
    with progress_bar("Training", settings.num_steps, start, "steps") as advance:
        transformers.set_seed(settings.seed)
        trainer = transformers.Trainer(
            model=_trainable(qwen.load_model(base, "cpu", dtype), settings.rank),
            args=arguments,
            data_collator=functools.partial(collate, chat),
            train_dataset=make(trained, settings.seed, settings.num_steps * per_step),
            eval_dataset=make(held_out, settings.seed, len(held_out)),
            callbacks=[_Log(output, advance)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        if arguments.process_index == 0:
            _cut_metrics(output / METRICS, start)
        try:
            trainer.train(resume_from_checkpoint=str(begin) if begin else None)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"The memory of the device does not suffice ({error!s:.200}). Give a smaller "
                "batch_size with more accumulation, or fewer max_pixels."
            ) from error
    if arguments.process_index == 0:
        _plot(output)
        _export(trainer.accelerator.unwrap_model(trainer.model), base, output / CAPTIONER)
    return output / CAPTIONER


def _trainable(model: transformers.PreTrainedModel, rank: int) -> torch.nn.Module:
    model.config.use_cache = False
    if rank == 0:
        return model
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=_LORA_LAYERS
        ),
    )


class _Log(transformers.TrainerCallback):
    """Writes the metrics, marks whole checkpoints and moves the progress bar."""

    def __init__(self, output: pathlib.Path, advance: Callable[..., None]):
        self._output, self._advance = output, advance
        self._text = ""

    def on_log(self, args, state, control, logs, **kwargs):
        """A line of metrics: the mean loss since the last line, or the validation loss."""
        del args, control, kwargs
        names = {
            "loss": "loss",
            "learning_rate": "learning_rate",
            "grad_norm": "grad_norm",
            "eval_loss": "validation_loss",
        }
        line = {"step": state.global_step} | {
            names[key]: value for key, value in logs.items() if key in names
        }
        if len(line) > 1 and state.is_world_process_zero:
            with (self._output / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if "loss" in logs:
            self._text = f"loss {logs['loss']:.4f}"

    def on_step_end(self, args, state, control, **kwargs):
        del args, control, kwargs
        if state.is_world_process_zero:
            self._advance(state.global_step, self._text)

    def on_save(self, args, state, control, **kwargs):
        """All files of the checkpoint are there now."""
        del args, control, kwargs
        if state.is_world_process_zero:
            files.write(self._output / f"checkpoint-{state.global_step}" / _WHOLE, "")
            _plot(self._output)


def _last_checkpoint(output: pathlib.Path, remove_others: bool) -> pathlib.Path | None:
    """The last one that was written in full; a killed process leaves others."""
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = [path for path in found if (path / _WHOLE).exists()]
    if remove_others:
        for path in found:
            if path not in whole:
                shutil.rmtree(path)
    return whole[-1] if whole else None


def _cut_metrics(path: pathlib.Path, step: int) -> None:
    """Removes the lines after a step, which come again, and what a killed process half wrote."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        files.write(
            path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step)
        )


def _plot(output: pathlib.Path) -> None:
    """Draws the losses against the step."""
    if not (output / METRICS).exists():
        return
    lines = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    panel = figure.subplots()
    for name, style, label in (
        ("loss", {"color": "#2563a8"}, "trained on"),
        ("validation_loss", {"color": "#d1662a", "marker": "o", "markersize": 4}, "held out"),
    ):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            panel.plot(*zip(*points, strict=True), linewidth=1.6, label=label, **style)
    panel.set_xlabel("step")
    panel.set_ylabel("loss of a token, nats")
    panel.grid(color="#ececec")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_legend_handles_labels()[1]:
        panel.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=130)
    files.write(output / CURVE, png.getvalue())


def _export(model: torch.nn.Module, base: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the checkpoint aside, with the files of its base that did not change."""
    if isinstance(model, peft.PeftModel):
        model = model.merge_and_unload()
    dtype = transformers.AutoConfig.from_pretrained(base, local_files_only=True).dtype
    model = model.to(dtype or torch.float32)
    model.config.use_cache = True
    for left in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed
        shutil.rmtree(left)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    model.save_pretrained(aside)
    for path in _unchanged(base):
        shutil.copyfile(path, aside / path.name)
    aside.rename(folder)


def _unchanged(base: pathlib.Path) -> Iterator[pathlib.Path]:
    """The tokenizer, the settings for pictures, the chat template: small files, no weights."""
    for path in base.iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and path.name not in (
            "config.json",
            "model.safetensors.index.json",
        ):
            yield path
