"""Real runs of several processes on this machine, and what may happen to them."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from etils import epath

from lumina_jax import checkpoint

ROOT = pathlib.Path(__file__).parents[2]
_SHIM = pathlib.Path(__file__).with_name("shim.c")
ABORTED = -signal.SIGABRT  # by JAX, where the coordinator is lost
# In the environment of every process; no log, checkpoint or other file may have the value.
SECRET = "do-not-tell-3c5a9f"
_SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")
_STARTING = 180.0  # seconds at most, on a busy machine


@dataclasses.dataclass
class Cluster:
    """The processes of one training run, started again and again in one workdir.

    Attributes:
      workdir: Of the run; logs lie beside it, or in `logs`.
      dataset: The data.
      num_processes: How many processes.
      num_devices: Over all of them.
      flags: Of every process.
      environment: Besides this one's.
      module: What is run, by python -m.
      config: The file of the config.
      logs: A local folder, where the workdir is in a bucket.
    """

    workdir: epath.Path
    dataset: pathlib.Path
    num_processes: int = 2
    num_devices: int = 8
    flags: Sequence[str] = ()
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    module: str = "lumina_jax.train"
    config: str = "tests/small_run.py"
    logs: pathlib.Path | None = None
    starts: int = 0
    processes: list[subprocess.Popen] = dataclasses.field(default_factory=list)

    def start(self, *flags: str, only: Sequence[int] | None = None) -> "Cluster":
        """Starts all processes, or only some of them."""
        self.starts += 1
        self.processes = []
        address = f"127.0.0.1:{free_port()}"
        for number in range(self.num_processes):
            if only is not None and number not in only:
                continue
            together = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(self.num_processes),
                "JAX_PROCESS_ID": str(number),
            }
            environment = {
                **os.environ,
                **dict.fromkeys(_SECRETS, SECRET),
                "JAX_NUM_CPU_DEVICES": str(self.num_devices // self.num_processes),
                **(together if self.num_processes > 1 else {}),
                **self.environment,
            }
            command = [
                sys.executable, "-m", self.module, f"--config={self.config}",
                f"--workdir={self.workdir}", f"--config.data.directory={self.dataset}",
                "--lost_timeout=20", *self.flags, *flags,
            ]  # fmt: skip
            with self.log_path(number).open("w") as log:
                self.processes.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
                )
        return self

    def log_path(self, number: int) -> pathlib.Path:
        logs = self.logs or self.workdir.parent
        return logs / f"{self.workdir.name}.{self.starts}.{number}.log"

    def log(self, number: int = 0) -> str:
        """What a process of the newest start has said."""
        return self.log_path(number).read_text(errors="replace")

    def wait(self, timeout: float = 300.0) -> list[int]:
        """The exit statuses, when all have ended; those that do not in time fail the test."""
        deadline = time.monotonic() + timeout
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in self.processes]
        except subprocess.TimeoutExpired:
            running = [n for n, p in enumerate(self.processes) if p.poll() is None]
            tails = "\n".join(f"--- {n}\n{self.log(n)[-3000:]}" for n in running)
            raise AssertionError(f"{running} still run after {timeout} s:\n{tails}") from None
        finally:
            self.kill()

    def finish(self, timeout: float = 300.0) -> "Cluster":
        """Waits for a run that must end well."""
        statuses = self.wait(timeout)
        logs = "\n".join(f"--- {n}\n{self.log(n)[-3000:]}" for n in range(len(self.processes)))
        assert statuses == [0] * len(self.processes), f"{statuses}\n{logs}"
        return self

    def signal(self, number: int, what: int) -> None:
        self.processes[number].send_signal(what)

    def kill(self) -> None:
        """What a power cut does to all of them."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()

    def trains(self, timeout: float = _STARTING) -> "Cluster":
        """Waits for the first step of this start."""
        self.until(lambda: "The first step is done" in self.log(), timeout, "a first step")
        return self

    def trains_for(self, num_steps: int, timeout: float = 120.0) -> "Cluster":
        """Waits for so many more steps."""
        enough = len(self.lines()) + num_steps
        self.until(lambda: len(self.lines()) >= enough, timeout, f"{num_steps} steps")
        return self

    def until(self, holds, timeout: float, what: str = "what was awaited") -> None:
        deadline = time.monotonic() + timeout
        while not holds():
            ended = [p.poll() for p in self.processes]
            if time.monotonic() > deadline or None not in ended:
                log = self.log()[-3000:]
                raise AssertionError(f"No {what} within {timeout} s; ended: {ended}; log:\n{log}")
            time.sleep(0.05)

    def lines(self) -> list[dict]:
        """The lines of the log of metrics so far."""
        path = self.workdir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def losses(self) -> dict[int, tuple[float, float]]:
        """Loss and learning rate by step; of a repeated step the last."""
        found = {line["step"]: line for line in self.lines() if "loss" in line}
        return {step: (line["loss"], line["learning_rate"]) for step, line in found.items()}

    def steps(self) -> list[int]:
        """Of the whole checkpoints."""
        directory = self.workdir / "checkpoints"
        return checkpoint.find_steps(self.workdir) if directory.is_dir() else []

    def digest(self, step: int | None = None) -> dict:
        """The checksums of everything in a checkpoint, the newest by default."""
        directory = checkpoint.find(self.workdir, step)
        return {
            "arrays": checkpoint.load_digest(directory)["arrays"],
            "data": checkpoint.load_data(directory),
        }

    def is_saving(self) -> bool:
        """Whether a checkpoint is there that is not whole yet."""
        directory = self.workdir / "checkpoints"
        names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
        return bool(names - {str(step) for step in self.steps()})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def build_shim(folder: pathlib.Path) -> pathlib.Path:
    """The library of faults."""
    library = folder / "shim.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-o", str(library), str(_SHIM), "-ldl"]
    subprocess.run(command, check=True)
    return library


@contextlib.contextmanager
def running(cluster: Cluster) -> Iterator[Cluster]:
    """Nothing of it stays, whatever a test does."""
    try:
        yield cluster
    finally:
        for process in cluster.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
        cluster.kill()
