r"""Gives damaged and hostile input to what reads the files and flags of others.

    python -m tests.fuzz                              100,000 inputs to each of three groups
    python -m tests.fuzz weights --inputs=1000        one group, fewer inputs
    python -m tests.fuzz --target=pth --seed=5        one reader, other inputs

An input is taken, or refused with an error of this project (or, of flags, with exit status 2). All
else is a finding: another error, a crash, more than SECONDS or more than MEMORY. It is printed, the
input is kept in --findings, and the command ends with status 1.

Each reader runs in processes of its own, since decoders in C and Rust can crash. Hypothesis makes
the inputs; with the same seed and version of it they are the same.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import importlib
import json
import logging
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

# Before jax is imported: with libtpu installed a bare import would look for a TPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from lumina_jax.data.images import Rejected
from lumina_jax.errors import InputError

GROUPS = ("records", "weights", "overrides")
INPUTS = 100_000  # of a group
SECONDS = 30  # for one input
MEMORY = 4 * 2**30  # bytes, above what the process has when it begins
IN_ONE_PROCESS = 20_000
ROOT = pathlib.Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("groups", nargs="*", default=GROUPS, help=" ".join(GROUPS))
    parser.add_argument("--inputs", type=int, default=INPUTS, help="of a group")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="one reader of a group")
    parser.add_argument("--findings", default="fuzz_findings", type=pathlib.Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_child(args.child, args.inputs, args.seed, args.findings)
    num_findings = sum(
        run_group(group, args.target, args.inputs, args.seed, args.findings)
        for group in args.groups
    )
    return int(num_findings > 0)


def targets(group: str) -> dict:
    return importlib.import_module(f"tests.fuzz.{group}").TARGETS


def run_group(
    group: str, target: str | None, inputs: int, seed: int, findings: pathlib.Path
) -> int:
    """Runs the readers of a group, each with its share of the inputs; returns the findings."""
    chosen = {n: share for n, (_, share) in targets(group).items() if target in (None, n)}
    total = Counts()
    for name, share in chosen.items():
        rest = -(-inputs * share // sum(chosen.values()))
        counts, began = Counts(), time.monotonic()
        while rest > 0:
            made = run_process(f"{group}.{name}", min(rest, IN_ONE_PROCESS), seed, findings)
            seed, rest, counts = seed + 1, rest - max(made.number, 1), counts + made
        counts.seconds = time.monotonic() - began
        print(f"{group:10}{name:17}{counts}", flush=True)
        total += counts
    print(f"{group:10}{'all':17}{total}", flush=True)
    return total.findings


@dataclasses.dataclass
class Counts:
    """What became of inputs; `slowest` is the time of one in seconds."""

    taken: int = 0
    refused: int = 0
    findings: int = 0
    seconds: float = 0.0
    slowest: float = 0.0

    @property
    def number(self) -> int:
        return self.taken + self.refused + self.findings

    def __add__(self, other: "Counts") -> "Counts":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        *sums, _ = (mine + theirs for mine, theirs in pairs)
        return Counts(*sums, max(self.slowest, other.slowest))

    def __str__(self) -> str:
        return (
            f"{self.number:>9,} inputs in {self.seconds:7.1f} s: {self.taken:>8,} taken, "
            f"{self.refused:>8,} refused, {self.findings:>3} findings; slowest {self.slowest:.2f} s"
        )


def run_process(target: str, inputs: int, seed: int, findings: pathlib.Path) -> Counts:
    """Runs a child; if it dies, the input that it died of is a finding."""
    findings = findings.absolute()
    command = [
        sys.executable, "-m", "tests.fuzz", f"--child={target}", f"--inputs={inputs}",
        f"--seed={seed}", f"--findings={findings}",
    ]  # fmt: skip
    # A config is compiled once, and not for each input.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    sys.stdout.writelines(line for line in done.stderr.splitlines(True) if line[:8] == "finding:")
    report, current = findings / f"{target}.report", findings / f"{target}.current"
    if done.returncode and not current.exists():
        sys.exit(f"{target} did not begin: {done.stderr[-4000:]}")
    counts = Counts(**json.loads(report.read_text()))
    report.unlink()
    if done.returncode:
        kept = current.rename(findings / f"{target}.crash-{seed}")
        print(f"finding: {target} ended with {done.returncode}: {kept}\n{done.stderr[-3000:]}")
        counts.findings += 1
    return counts


def run_child(target: str, inputs: int, seed: int, findings: pathlib.Path) -> int:
    """Gives inputs to one reader, and writes how many it took and refused."""
    import hypothesis

    warnings.simplefilter("ignore")
    logging.disable()
    group, name = target.split(".")
    make, _ = targets(group)[name]
    findings.mkdir(parents=True, exist_ok=True)
    current, report = findings / f"{target}.current", findings / f"{target}.report"
    counts, kept = Counts(), Kept(findings, target)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        strategy, check, sound = make(pathlib.Path(folder))
        check(sound)  # else all would be refused, and nothing tried
        report.write_text(json.dumps(dataclasses.asdict(counts)))

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=inputs,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategy)
        def run(given):
            current.write_text(repr(given), errors="backslashreplace")
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            began = time.monotonic()
            match outcome := try_one(check, given):
                case "taken":
                    counts.taken += 1
                case "refused":
                    counts.refused += 1
                case _:
                    counts.findings += 1
                    kept.add(outcome, given)
            faulthandler.cancel_dump_traceback_later()
            counts.slowest = max(counts.slowest, time.monotonic() - began)
            if counts.number % 100 == 0:
                report.write_text(json.dumps(dataclasses.asdict(counts)))

        limit = MEMORY + resource.getpagesize() * int(
            pathlib.Path("/proc/self/statm").read_text().split()[0]
        )
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        run()
    current.unlink(missing_ok=True)
    report.write_text(json.dumps(dataclasses.asdict(counts)))
    return 0


def try_one(check: Callable[[Any], None], given: Any) -> str | BaseException:
    """What becomes of an input: "taken", "refused", or the error that it should not raise."""
    try:
        check(given)
        return "taken"
    except (InputError, Rejected):
        return "refused"
    except SystemExit as error:  # of flags
        return "refused" if error.code == InputError.status else error
    except Exception as error:
        return error


class Kept:
    """Of each kind of finding, by the error and its place: a line that tells it, and an input."""

    def __init__(self, folder: pathlib.Path, target: str):
        self._folder, self._target = folder, target
        self._sizes: dict[str, int] = {}

    def add(self, error: BaseException, given: Any) -> None:
        """Keeps the shortest input of a kind."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__}-{pathlib.Path(place.filename).name}-{place.lineno}"
        text = repr(given)
        if kind not in self._sizes:
            words = " ".join(f"{error!s:.200}".split())
            print(f"finding: {self._target} {kind}: {words}", file=sys.stderr)
        if len(text) < self._sizes.get(kind, sys.maxsize):
            self._sizes[kind] = len(text)
            content = "\n".join([text, *traceback.format_exception(error)])
            path = self._folder / f"{self._target}.{kind}"
            path.write_text(content, errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
