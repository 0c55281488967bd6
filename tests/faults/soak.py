"""A long run of several processes to which something happens every minute or two.

    python -m tests.faults.soak --minutes=30

One fault after another, drawn by --seed: a kill of all processes or of one, a termination, a frozen
process, a full disk, slow storage, a clock that jumps, a damaged checkpoint. When the time is over
the run is ended, and the same run is made once more with nothing happening. Both must end with the
same parameters, average, moments and losses, to the last bit; memory must not grow.
"""

import collections
import json
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import threading
import time

import numpy as np
from absl import app, flags

from lumina_jax.data.buckets import Bucket
from lumina_jax.errors import RESTART
from tests.faults.cluster import ABORTED, Cluster, build_shim, running
from tests.small_data import make_emojis

_MINUTES = flags.DEFINE_float("minutes", 30.0, "Of the run with faults.")
_PROCESSES = flags.DEFINE_integer("processes", 4, "Of the run.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the faults.")
_BETWEEN = flags.DEFINE_list("between", ["20", "50"], "Seconds of training before a fault.")
_OUTPUT = flags.DEFINE_string("output", None, "A file for the report, as JSON.")

_EMOJIS = "🐶🐱🍎🍋🏠🌞😀🎈 🇩🇪🇫🇷🇯🇵🚂🚐👀🦇🐖 🍷🍾🌵🕯️🧍👗🚪🖊️"
_BUCKETS = (Bucket(24, 40), Bucket(32, 32), Bucket(40, 24))
DAY = 24 * 3600


class Memory:
    """Samples the resident memory of a cluster's processes every second, once they are warm.

    They are so after the first save of a start: until then programs are read and caches fill.
    """

    def __init__(self, cluster: Cluster):
        self._cluster = cluster
        self._samples: dict[int, list[tuple[float, float]]] = collections.defaultdict(list)
        self._starts, self._steps_before = 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _is_warm(self) -> bool:
        newest = max(self._cluster.steps(), default=0)
        if self._starts != self._cluster.starts:
            self._starts, self._steps_before = self._cluster.starts, newest
        return newest > self._steps_before

    def _sample(self) -> None:
        while not self._stop.wait(1.0):
            if not self._is_warm():
                continue
            for process in list(self._cluster.processes):
                try:
                    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
                    kilobytes = int(status.split("VmRSS:")[1].split()[0])
                except (OSError, IndexError):  # it has ended
                    continue
                self._samples[process.pid].append((time.monotonic(), kilobytes / 1e3))

    def report(self) -> dict:
        """The slope in MB a minute over all lives, each with a level of its own, and how sure."""
        lives = [np.array(samples).T for samples in self._samples.values() if len(samples) > 5]
        if not lives:
            return {"lives": 0}
        t = np.concatenate([times - times.mean() for times, _ in lives])
        mb = np.concatenate([sizes - sizes.mean() for _, sizes in lives])
        return {
            "lives": len(lives),
            "longest_life_minutes": max(times[-1] - times[0] for times, _ in lives) / 60,
            "mb_per_minute": 60 * float(t @ mb / (t @ t)),
            "mb_most": max(float(sizes.max()) for _, sizes in lives),
        }


class Faults:
    """What can happen; each method returns when the run has ended or goes on by itself."""

    NAMES = ("kill_all", "kill_one", "kill_inside_a_save", "terminate", "freeze", "full_disk",
             "slow_storage", "clock", "damaged_checkpoint")  # fmt: skip

    def __init__(self, cluster: Cluster, steer: dict[str, pathlib.Path], choose: random.Random):
        self._cluster, self._steer, self._choose = cluster, steer, choose

    def _victim(self) -> int:
        return self._choose.randrange(self._cluster.num_processes)

    def kill_all(self) -> None:
        self._cluster.kill()

    def kill_one(self) -> None:
        victim = self._victim()
        self._cluster.signal(victim, signal.SIGKILL)
        statuses = self._cluster.wait(90)
        assert statuses[victim] == -signal.SIGKILL, statuses
        assert set(statuses) <= {-signal.SIGKILL, RESTART, ABORTED}, statuses

    def kill_inside_a_save(self) -> None:
        self._cluster.until(self._cluster.is_saving, 60, "save")
        self._cluster.kill()

    def terminate(self) -> None:
        self._cluster.signal(self._victim(), signal.SIGTERM)
        statuses = self._cluster.wait(90)
        assert statuses == [RESTART] * len(statuses), statuses

    def freeze(self) -> None:
        victim = self._victim()
        self._cluster.signal(victim, signal.SIGSTOP)
        others = [p for n, p in enumerate(self._cluster.processes) if n != victim]
        statuses = {process.wait(120) for process in others}
        assert statuses <= {RESTART, ABORTED}, statuses
        self._cluster.kill()

    def full_disk(self) -> None:
        self._cluster.until(self._cluster.is_saving, 60, "save")
        self._steer["full"].touch()
        try:
            statuses = self._cluster.wait(200)
        finally:
            self._steer["full"].unlink()
        assert set(statuses) == {RESTART}, statuses

    def slow_storage(self) -> None:
        self._steer["slow"].write_text("5000")
        time.sleep(15)
        self._steer["slow"].unlink()
        statuses = [process.poll() for process in self._cluster.processes]
        assert set(statuses) == {None}, statuses

    def clock(self) -> None:
        """JAX's coordinator measures silence by this clock, and may abort all."""
        self._steer["clock"].write_text(str(self._choose.choice([-DAY, -60, 60, DAY])))
        time.sleep(5)
        statuses = {process.poll() for process in self._cluster.processes}
        assert statuses <= {None, RESTART, ABORTED}, statuses
        if statuses != {None}:
            self._cluster.wait(60)

    def damaged_checkpoint(self) -> None:
        self._cluster.kill()
        step = self._cluster.steps()[-1]
        state = self._cluster.workdir / "checkpoints" / str(step) / "state"
        victim = self._choose.choice(sorted(state.glob("ocdbt.process_*/d/*")))
        content = bytearray(victim.read_bytes())
        content[self._choose.randrange(len(content))] ^= 0x10
        victim.write_bytes(content)


def soak(folder: pathlib.Path) -> dict:
    """Runs with faults and without; what came of it."""
    make_emojis(folder / "emojis", _EMOJIS, _BUCKETS)
    flags_of_all = [
        f"--config.compile.cache_directory={folder / 'compiled'}",
        "--config.optim.schedule=constant",
        "--config.train.num_steps=1000000",
        "--config.train.checkpoint_every=10",
        "--config.train.keep_checkpoints=4",
        "--config.train.if_damaged=previous",
        "--config.train.hang_timeout=120",
    ]
    steer = {name: folder / name for name in ("slow", "full", "clock")}
    cluster = Cluster(
        folder / "faults", folder / "emojis", _PROCESSES.value, flags=flags_of_all,
        environment={
            "LD_PRELOAD": str(build_shim(folder)), "FAULT_PATH": f"{folder / 'faults'}/",
            **{f"FAULT_{name.upper()}": str(path) for name, path in steer.items()},
        },
    )  # fmt: skip
    with running(cluster):
        counts, memory, seconds = _disturb(cluster, steer)
    step = cluster.steps()[-1]
    print(f"Now the same {step} steps, undisturbed.", flush=True)
    steer["clock"].unlink(missing_ok=True)

    calm = Cluster(folder / "calm", folder / "emojis", _PROCESSES.value, flags=flags_of_all)
    with running(calm):
        began = time.monotonic()
        calm_memory = Memory(calm)
        calm.start(f"--config.train.num_steps={step}").finish(timeout=3600)
        calm_memory.close()
        calm_seconds = time.monotonic() - began
    losses, expected = cluster.losses(), calm.losses()
    return {
        "minutes": seconds / 60,
        "processes": _PROCESSES.value,
        "starts": cluster.starts,
        "faults": dict(counts),
        "faults_survived": sum(counts.values()),
        "steps": step,
        "same_state": cluster.digest(step) == calm.digest(step),
        "same_losses": {s: losses.get(s) for s in expected} == expected,
        "last_loss": losses[step][0],
        "goodput": cluster.lines()[-1]["goodput"],
        "memory": memory.report(),
        "undisturbed_minutes": calm_seconds / 60,
        "undisturbed_memory": calm_memory.report(),
    }


def _disturb(cluster: Cluster, steer) -> tuple[collections.Counter, Memory, float]:
    choose, counts = random.Random(_SEED.value), collections.Counter()
    faults = Faults(cluster, steer, choose)
    low, high = map(float, _BETWEEN.value)
    memory, began = Memory(cluster), time.monotonic()
    waiting: list[str] = []
    while time.monotonic() - began < 60 * _MINUTES.value:
        if all(process.poll() is not None for process in cluster.processes):
            cluster.start().trains(600)
        time.sleep(choose.uniform(low, high))
        if not waiting:  # each of them once, in another order every time
            waiting = choose.sample(Faults.NAMES, len(Faults.NAMES))
        name = waiting.pop()
        if name == "damaged_checkpoint" and len(cluster.steps()) < 2:
            waiting.insert(0, name)
            continue
        getattr(faults, name)()
        counts[name] += 1
        minutes = (time.monotonic() - began) / 60
        print(f"{minutes:5.1f} min: {name}, newest step {cluster.steps()[-1:]}", flush=True)
    if any(process.poll() is None for process in cluster.processes):
        cluster.signal(0, signal.SIGTERM)
        cluster.wait(120)
    else:  # up to a checkpoint that is sound
        cluster.start().trains(600)
        cluster.signal(0, signal.SIGTERM)
        cluster.wait(120)
    memory.close()
    return counts, memory, time.monotonic() - began


def main(_) -> None:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="lumina_jax_soak_"))
    report = soak(folder)
    print(json.dumps(report, indent=1))
    if _OUTPUT.value:
        pathlib.Path(_OUTPUT.value).write_text(json.dumps(report, indent=1) + "\n")
    if not (report["same_state"] and report["same_losses"]):
        sys.exit(f"The two runs differ. See {folder}.")
    shutil.rmtree(folder)


if __name__ == "__main__":
    app.run(main)
