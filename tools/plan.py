"""Says of a run, without any accelerator, whether it fits and how fast it can be.

    python tools/plan.py --config=configs/stage2.py --topology=v5e:16x16
    python tools/plan.py --config=configs/stage2.py --topology=v5e:2x2 --what=sample \
        --batch_size=4 --config.mesh.replica=4 --config.mesh.data=1
    python tools/plan.py --config=configs/stage1.py --topology=v6e:16x16 --config.mesh.data=-1 \
        --sweep=model.remat=names,dots,attention --sweep=mesh.replica=4,8

It lowers and compiles the real program for the TPUs named, here, on a processor, and reads what the
compiler made of it; docs/planning.md explains every number. Needs libtpu: the extra [plan].

Exit status: 0 it fits, 3 it does not, 4 an --assert failed, 2 the input was wrong.
"""

import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from absl import flags, logging
from ml_collections import config_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # its answer tells no time of compiling

from lumina_jax import cli, files, sharding
from lumina_jax.errors import InputError
from lumina_jax.planning import describe, programs, report
from lumina_jax.planning.chips import Topology

config_flags.DEFINE_config_file("config", None, "A file in configs/.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:16x16, or 2*v5e:16x16: two slices.")
_WHAT = flags.DEFINE_enum("what", "train", ["train", "sample", "encode"], "Which program.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Of --what=sample: pictures at once.")
_TEXT_SLOTS = flags.DEFINE_integer(
    "text_slots", None, "Of a caption; by default the most.", lower_bound=1
)
_SWEEP = flags.DEFINE_multi_string(
    "sweep", [], "key=value,value,...: plan every combination of these changes and rank them."
)
_ASSERT = flags.DEFINE_multi_string(
    "assert", [], "A condition on the numbers of --json, such as mfu>=0.58."
)
_JSON = flags.DEFINE_string("json", None, "Write all numbers to this file as well.")
_HLO = flags.DEFINE_string(
    "hlo", None, "Write the text of the compiled program to this file; -text, -images of two."
)
_HOTTEST = flags.DEFINE_integer("hottest", 0, "Show so many of the longest instructions.")
_PRICE = flags.DEFINE_float("price", None, "Of a chip-hour, to say what the run costs.")
_REUSE = flags.DEFINE_string(
    "reuse", None, "A folder of files of --json: what one of them knows is not compiled again."
)

DOES_NOT_FIT, ASSERTION_FAILED = 3, 4


def main() -> int:
    if _SWEEP.value:
        return sweep()
    topology = Topology.parse(_TOPOLOGY.value)
    conditions = [parse_condition(text) for text in _ASSERT.value]
    config = flags.FLAGS.config
    mesh = sharding.make_mesh(**config.mesh, devices=topology.devices())
    print(
        f"{config_name()} on {topology}: {topology.num_chips} chips, mesh "
        + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
        flush=True,
    )
    found = {}
    for lowered in lower(config, mesh):
        found[lowered.name] = result = plan(lowered, topology)
        if not result["fits"]:
            print(f"{lowered.name}: does not fit: {result['reason']}.")
            continue
        numbers = result["numbers"]
        print(describe.describe(lowered.name, numbers, result["timings"], topology))
        if lowered.name == "train":
            seconds, steps = numbers["step_seconds"], config.train.num_steps
            print(describe.stage(seconds, steps, topology.num_chips, _PRICE.value))
    if _JSON.value:
        everything = {
            "config": config_name(),
            "what": _WHAT.value,
            "topology": str(topology),
            "mesh": dict(mesh.shape),
            "num_chips": topology.num_chips,
            "num_steps": config.train.num_steps,
            "batch_size": _BATCH_SIZE.value if _WHAT.value == "sample" else config.train.batch_size,
            "remat": config.model.remat,
            "versions": report.versions(),
            "programs": found,
        }
        files.write(_JSON.value, json.dumps(everything, indent=1) + "\n")
    if not all(result["fits"] for result in found.values()):
        return DOES_NOT_FIT
    return check(conditions, found)


def lower(config, mesh) -> list[programs.Lowered]:
    if _WHAT.value == "train":
        return [programs.lower_train(config, mesh, _TEXT_SLOTS.value)]
    if _WHAT.value == "sample":
        return [programs.lower_sample(config, mesh, _BATCH_SIZE.value, _TEXT_SLOTS.value)]
    return programs.lower_encode(config, mesh)


def plan(lowered: programs.Lowered, topology: Topology) -> dict:
    """What --json has of a program."""
    key = report.key(lowered, topology)
    if known := look_up(key, lowered.name):
        return known
    logging.info("Compiling %s ...", lowered.name)
    try:
        made = report.compile_and_report(lowered, topology)
    except report.DoesNotFitError as error:
        return {
            "fits": False,
            "key": key,
            "reason": str(error),
            "memory": error.memory,
            "needed_gib": error.needed / report.GIB,
            "available_gib": error.available / report.GIB,
        }
    if _HLO.value:
        path = pathlib.Path(_HLO.value)
        if _WHAT.value == "encode":  # two programs
            path = path.with_stem(f"{path.stem}-{lowered.name.split()[-1]}")
        files.write(path, made.text)
    if _HOTTEST.value:
        print("\n".join(report.hottest(made.text, _HOTTEST.value, topology.chip.clock)))
    return {"fits": True, "key": key, "numbers": made.numbers, "timings": made.timings}


def look_up(key: str, name: str) -> dict | None:
    """The same program in a file of --reuse."""
    for path in sorted(pathlib.Path(_REUSE.value).glob("*.json")) if _REUSE.value else ():
        known = json.loads(path.read_text())["programs"].get(name, {})
        if known.get("key") == key:
            logging.info("%s is the same program as in %s.", name, path)
            return {**known, "same_as": path.stem}
    return None


def config_name() -> str:
    """Of the file, without its folder."""
    for argument in sys.argv:
        if match := re.match(r"--?config=(.*)", argument):
            return pathlib.Path(match[1]).stem
    return "config"  # given as two words


def parse_condition(text: str) -> tuple[str, str, float]:
    match = re.fullmatch(r"(\w+)(<=|>=)([-+]?[\d.]+(?:e[-+]?\d+)?)", text.replace(" ", ""))
    if match is None:
        raise InputError(f"--assert={text!r} is not NAME<=NUMBER or NAME>=NUMBER.")
    return match[1], match[2], float(match[3])


def check(conditions: list[tuple[str, str, float]], found: dict[str, dict]) -> int:
    status = 0
    for name, result in found.items():
        numbers = result["numbers"] | result["timings"]
        for key, relation, bound in conditions:
            if key not in numbers:
                raise InputError(
                    f"--assert={key}{relation}{bound:g}: {name} has no number of this name, but: "
                    f"{', '.join(sorted(numbers))}."
                )
            value = numbers[key]
            if not (value <= bound if relation == "<=" else value >= bound):
                print(
                    f"{name}: {key}{relation}{bound:g} does not hold: it is {value:.6g}.",
                    file=sys.stderr,
                )
                status = ASSERTION_FAILED
    return status


def sweep() -> int:
    """Plans each combination in a process of its own, and ranks what fits by the estimate."""
    if _WHAT.value == "encode":
        raise InputError("--sweep ranks one program, and --what=encode has two: sweep another.")
    axes = []
    for text in _SWEEP.value:
        key, _, values = text.partition("=")
        if not values:
            raise InputError(
                f"--sweep={text!r} is not key=value,value,... with keys of the config."
            )
        axes.append([(key, value) for value in values.split(",")])
    given = [
        a for a in sys.argv[1:] if not re.match(r"--?(sweep|json|hlo|assert|hottest|reuse)=", a)
    ]
    rows, misfits = [], 0
    for combination in itertools.product(*axes):
        label = " ".join(f"{key}={value}" for key, value in combination)
        changes = [f"--config.{key}={value}" for key, value in combination]
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "plan.json"
            done = subprocess.run(
                [sys.executable, __file__, *given, *changes, f"--json={out}"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode not in (0, DOES_NOT_FIT):
                # The first may be wrong for all; a mesh may be wrong for one batch alone.
                print(f"{label}: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            (result,) = json.loads(out.read_text())["programs"].values()
        if result["fits"]:
            rows.append((label, result["numbers"]))
            print(f"{label}: {describe.number(rows[-1][1]['step_seconds'])} s", flush=True)
        else:
            misfits += 1
            print(f"{label}: does not fit: {result['reason']}", flush=True)
    if not rows:
        if misfits:
            return DOES_NOT_FIT
        raise InputError("--sweep: no combination could be planned; see above.")
    print("\n  seconds  images/s    MFU  peak GiB  ratio   ICI GB  change")
    for label, n in sorted(rows, key=lambda row: -row[1]["images_per_second"]):
        seconds, images = map(describe.number, (n["step_seconds"], n["images_per_second"]))
        print(
            f"{seconds:>9} {images:>9} {n['mfu']:6.1%} {n['peak_gib']:9.2f} "
            f"{n['flops_ratio']:6.3f} {n['ici_gb']:8.2f}  {label}"
        )
    return 0


if __name__ == "__main__":
    # Configs import each other from the root of the checkout.
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    cli.run(main, required=("config", "topology"))
