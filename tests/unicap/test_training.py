"""A tiny captioner learns the names of drawings; what is stopped goes on as if it had not been."""

import contextlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch

from lumina_jax.data.captions import Caption
from lumina_jax.data.records import Record
from lumina_jax.data.sources.base import Item
from lumina_jax.data.sources.openmoji import OpenMojiSource, pictures, select
from lumina_jax.errors import InputError
from lumina_jax.unicap import qwen, training
from lumina_jax.unicap.backends.base import Request
from lumina_jax.unicap.backends.local import LocalBackend
from lumina_jax.unicap.training import Settings
from tests.small_data import ListSource, picture
from tests.unicap import tiny_qwen

# peft 0.21 asks for a name that transformers 5.24 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

ROOT = pathlib.Path(__file__).parents[2]
FEW = "🐶🐱🍎🍋🏠🌞😀🎈🚂🚐👀🦇"
LANGUAGES = ("en", "zh")


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums of several threads may be added up in another order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_qwen.save(tmp_path_factory.mktemp("base") / "qwen", scale=0.05)


def settings(**changes) -> Settings:
    values = dict(num_steps=12, batch_size=2, accumulation=2, rank=4, learning_rate=0.01)
    return Settings(**{**values, "held_out": 0.2, "languages": LANGUAGES, **changes})


def question(kind: str, language: str) -> str:
    return f"{kind} {language}"


def train(base, output, settings=settings(), *, source=OpenMojiSource(FEW, 48), **options):  # noqa: B008
    options = {"log_every": 1, "save_every": 4, **options}
    return training.train(base, source, output, question, settings, **options)


def metrics(output) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output) -> list[float]:
    return [line["loss"] for line in metrics(output) if "loss" in line]


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The output of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("run") / "run"
    train(base, output)
    return output


@pytest.mark.slow
def test_a_trained_captioner_names_the_drawings_that_it_saw(base, tmp_path):
    emojis = " ".join(emoji.character for emoji in select("all")[::38][:50])
    wanted = settings(num_steps=300, batch_size=5, rank=0, learning_rate=0.005, held_out=0.1)
    folder = train(
        base,
        tmp_path / "run",
        wanted,
        source=OpenMojiSource(emojis, 48),
        log_every=10,
        save_every=80,
    )
    found = losses(tmp_path / "run")
    assert found[0] > 4
    assert found[-1] < 0.2
    backend = LocalBackend(folder)
    drawings = list(pictures(emojis, resolution=48))
    trained, held_out = training.split_rows(len(drawings), wanted)
    assert (len(trained), len(held_out)) == (45, 5)
    for language in LANGUAGES:
        names = [next(c.text for c in d.captions if c.language == language) for d in drawings]
        replies = backend.ask([Request(question("short", language), d.image, 40) for d in drawings])
        right = [
            reply.finished and reply.text == name
            for reply, name in zip(replies, names, strict=True)
        ]
        assert sum(right[row] for row in trained) >= 40, language


def test_the_loss_falls_with_lora_and_is_told(run):
    found = metrics(run)
    assert [line["step"] for line in found if "loss" in line] == list(range(1, 13))
    assert sum(losses(run)[-3:]) < sum(losses(run)[:3])
    assert [line["step"] for line in found if "validation_loss" in line] == [4, 8, 12]
    rates = [line["learning_rate"] for line in found if "loss" in line]
    assert rates == sorted(rates, reverse=True)  # round(0.03 * 12) = 0 steps of warm-up
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((run / "report.json").read_text())
    assert report["read"] == report["written"] == 12
    assert report["pairs"] == [["short", "en"], ["short", "zh"]]


def test_a_run_that_is_stopped_goes_on_with_the_same_losses(base, run, tmp_path, monkeypatch):
    whole_bar = training.progress_bar

    @contextlib.contextmanager
    def stops(description, total, start=0, unit="it"):
        def advance(done, text=""):
            del text
            if description == "Training" and done == 7:
                raise KeyboardInterrupt

        yield advance

    output = tmp_path / "run"
    monkeypatch.setattr(training, "progress_bar", stops)
    with pytest.raises(KeyboardInterrupt):
        train(base, output)
    assert max(line["step"] for line in metrics(output)) < 8
    # What a process leaves that is killed while it writes.
    (output / "checkpoint-6").mkdir()
    (output / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"half")
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')

    monkeypatch.setattr(training, "progress_bar", whole_bar)
    folder = train(base, output)
    assert metrics(output) == metrics(run)
    assert weights(folder).keys() == weights(run / "captioner").keys()
    for name, tensor in weights(run / "captioner").items():
        assert torch.equal(weights(folder)[name], tensor), name
    assert not (output / "checkpoint-6").exists()


def test_a_run_that_ended_before_its_export_exports(base, run, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(run, output)
    shutil.rmtree(output / "captioner")
    folder = train(base, output)
    for name, tensor in weights(run / "captioner").items():
        assert torch.equal(weights(folder)[name], tensor), name
    assert metrics(output) == metrics(run)


def weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_the_exported_model_is_the_base_with_its_adapter(base, run, tmp_path):
    inputs = training.collate(qwen.Chat.load(base), conversations(base, run, num=3))
    model = qwen.load_model(base, "cpu", "float32")
    with torch.inference_mode():
        before = model(**inputs).logits
        adapted = peft.PeftModel.from_pretrained(model, run / "checkpoint-12")(**inputs).logits
        exported = qwen.load_model(run / "captioner", "cpu", "float32")(**inputs).logits
    torch.testing.assert_close(exported, adapted, rtol=1e-4, atol=1e-4)
    assert (before - adapted).abs().max() > 0.05
    # The vision tower is that of the base, and what describes text and pictures its very files.
    old, new = weights(base), weights(run / "captioner")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert len(changed) == 2 * 7  # layers and their projections
    assert not any("visual" in name for name in changed)
    for name in ("tokenizer.json", "chat_template.json", "preprocessor_config.json"):
        assert (run / "captioner" / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_other_families_are_trained_and_asked_too(tmp_path, family):
    base = tiny_qwen.save(tmp_path / family, family, scale=0.05)
    folder = train(base, tmp_path / "run", settings(num_steps=2))
    old, new = weights(base), weights(folder)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert not any("visual" in name for name in changed)
    image = next(pictures("🐶", resolution=48)).image
    ours = LocalBackend(folder, name="ours")
    assert ours.ask([Request("short en", image, 4)])[0].num_tokens == 4


def conversations(base, run, seed=0, num=24) -> list[dict]:
    """What a run trains on, from its beginning."""
    found = training.Conversations(
        training._open_pictures(run),
        training._prompts(run, question),
        qwen.Chat.load(base),
        tuple(range(12)),
        seed,
        num,
    )
    return [found[index] for index in range(len(found))]


def test_the_loss_is_on_the_answer_and_its_end(base, run):
    chat = qwen.Chat.load(base)
    found = conversations(base, run, num=3)
    batch = training.collate(chat, found)
    for row in range(3):
        learnt = batch["labels"][row] != -100
        assert torch.equal(batch["input_ids"][row][learnt], batch["labels"][row][learnt])
        answer = chat.tokenizer.decode(batch["labels"][row][learnt])
        assert answer == f"{chat.text(found[row]['answer'])}<|im_end|>"
        length = len(found[row]["question"])
        # What comes before is exactly what the trained model will be asked with.
        asked = batch["input_ids"][row][:length].tolist()
        assert asked == chat.tokens("short en", found[row]["image"]) or asked == chat.tokens(
            "short zh", found[row]["image"]
        )
        assert not learnt[:length].any()
        assert batch["attention_mask"][row].sum() == length + learnt.sum()


def test_the_order_of_the_data_is_a_function_of_the_seed(base, run):
    def answers(seed):
        return [c["answer"] for c in conversations(base, run, seed)]

    assert answers(0) == answers(0)
    assert answers(0) != answers(1)
    rows = tuple(range(12))
    epochs = [training._order(rows, 0, epoch) for epoch in range(3)]
    assert len(set(epochs)) == 3
    assert all(sorted(epoch) == list(rows) for epoch in epochs)
    # Captions in both languages are drawn, of most pictures in two dozen epochs.
    found = [tuple(c["answer"]) for c in conversations(base, run, num=24 * 12)]
    assert len(set(found)) == 24


@pytest.mark.parametrize(("share", "num_held_out"), [(0.0, 0), (0.01, 1), (0.25, 5), (0.99, 19)])
def test_pictures_that_are_held_out_are_not_trained_on(share, num_held_out):
    trained, held_out = training.split_rows(20, settings(held_out=share))
    assert len(held_out) == num_held_out
    assert sorted(trained + held_out) == list(range(20))


def test_what_cannot_be_trained_on_is_counted(base, tmp_path):
    long = "a dog and " * 40
    items = (
        picture("good", captions=[Caption("a dog", "short", "en"), Caption(long, "long", "en")]),
        picture("fine"),
        Item("junk", b"not a picture", (Caption("a dog", "short", "en"),)),
        picture("other", captions=[Caption("ein Hund", "short", "de")]),
        picture("long", captions=[Caption(long, "long", "en")]),
    )
    train(base, tmp_path / "run", settings(num_steps=1, max_tokens=60), source=ListSource(items))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    examples = report.pop("examples")
    assert report == {
        "read": 5,
        "written": 2,
        "rejected": {"not a picture": 1, "no caption to train on": 2},
        "captions_too_long": 1,
        "pairs": [["short", "en"]],
    }
    assert [example["id"] for example in examples] == ["junk", "other", "long"]
    kept = [Record(content) for content in training._open_pictures(tmp_path / "run").read([0, 1])]
    assert [len(record.captions) for record in kept] == [1, 1]

    only_long = settings(kinds=("long",), max_tokens=900)
    with pytest.raises(InputError, match=r"Of 3 pictures 1 can be trained on.*for example"):
        train(base, tmp_path / "few", only_long, source=ListSource(items[:3]))


def test_a_finished_run_is_left_as_it_is_and_another_is_refused(base, run, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert train(base, run) == run / "captioner"
    with pytest.raises(InputError, match="holds another run: rank is 4 there and 8 here"):
        train(base, run, settings(rank=8))
    with pytest.raises(InputError, match=r"holds another run: .*emojis"):
        train(base, run, source=OpenMojiSource("🐶🐱", 48))
    other = tiny_qwen.save(tmp_path / "qwen3_vl", "qwen3_vl")
    with pytest.raises(InputError, match="holds another run: base"):
        train(other, run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_other_prompts_are_another_run(base, run, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(run, output)
    shutil.rmtree(output / "captioner")
    with pytest.raises(InputError, match=r"is trained with other prompts \(.*prompts\.json\)"):
        training.train(base, OpenMojiSource(FEW, 48), output, lambda *_: "What is it?", settings())


def test_the_door_refuses_what_cannot_be_trained(base, tmp_path):
    writer = tiny_qwen.save(tmp_path / "writer", "qwen2")
    with pytest.raises(InputError, match=r"type qwen2, which sees no pictures.*qwen3_vl"):
        train(writer, tmp_path / "run")
    with pytest.raises(InputError, match="is in a bucket"):
        train(base, "gs://bucket/run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt and is no run of this command"):
        train(base, tmp_path / "mine")
    with pytest.raises(InputError, match="log_every=0 and save_every=4 must be 1 or more"):
        train(base, tmp_path / "run", log_every=0)
    with pytest.raises(InputError, match="device 'cuda:1' is not auto or cpu"):
        train(base, tmp_path / "run", device="cuda:1")
    with pytest.raises(
        InputError, match=r"rank=-1 must be 0 or more; learning_rate=2.* held_out=1"
    ):
        Settings(rank=-1, learning_rate=2.0, held_out=1.0)


def test_without_peft_the_message_names_what_to_install():
    code = "import sys; sys.modules['peft'] = None; import lumina_jax.unicap.training"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "InputError" in done.stderr
    assert "pip install 'lumina-jax[caption]'" in done.stderr


# The command as a user runs it.

COMMAND = (
    "tools/train_captioner.py", "openmoji", f"--emojis={FEW}", "--resolution=48",
    "--batch_size=2", "--accumulation=2", "--rank=4", "--learning_rate=0.01", "--log_every=1",
    "--held_out=0.2", "--languages=en,zh", "--num_workers=0", "--device=cpu",
)  # fmt: skip


def command(base, output, *arguments: str, launcher=(sys.executable,)) -> list[str]:
    return [*launcher, *COMMAND, f"--base={base}", f"--output={output}", *arguments]


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_with_the_same_losses(base, tmp_path):
    arguments = ("--num_steps=60", "--save_every=5")
    subprocess.run(command(base, tmp_path / "whole", *arguments), cwd=ROOT, check=True)
    output = tmp_path / "killed"
    running = subprocess.Popen(command(base, output, *arguments), cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (output / "checkpoint-10" / "whole").exists():
        assert running.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (output / "captioner").exists()
    subprocess.run(command(base, output, *arguments), cwd=ROOT, check=True)
    assert metrics(output) == metrics(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "whole" / "captioner").items():
        assert torch.equal(weights(output / "captioner")[name], tensor), name


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batches(base, tmp_path):
    arguments = ("--num_steps=6", "--save_every=3")
    subprocess.run(command(base, tmp_path / "one", *arguments), cwd=ROOT, check=True)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
    two = command(base, tmp_path / "two", *arguments, "--accumulation=1", launcher=launcher)
    subprocess.run(two, cwd=ROOT, check=True)
    assert [line["step"] for line in metrics(tmp_path / "two")] == [
        line["step"] for line in metrics(tmp_path / "one")
    ]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (tmp_path / "two" / "captioner" / "model.safetensors").exists()


def test_the_command_says_what_is_wrong(base, tmp_path):
    done = subprocess.run(
        command(base, tmp_path / "run", "--rank=-1"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: Cannot train: rank=-1 must be 0 or more." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
