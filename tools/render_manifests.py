r"""Writes the manifests with which GKE runs a job: Kubernetes objects as YAML.

    python tools/render_manifests.py --topology=v5e-256 --job=setup --project=my_project.yaml
    python tools/render_manifests.py --topology=v5e-256 --job=stage2 --project=my_project.yaml \
        --output=stage2.yaml --set=spot=true --arg=--config.train.checkpoint_every=200
    kubectl create -f stage2.yaml

A topology is a file in launch/gke/topologies, and says which jobs it has. The project file is a
copy of launch/gke/project.yaml with what is yours. --set changes a value of either, --arg adds a
flag to the command of the job. Needs the `launch` extra.
"""

import difflib
import json
import math
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from lumina_jax import cli
from lumina_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / "launch/gke"
TEMPLATES = {
    "stage1": "jobset.yaml.j2",
    "stage2": "jobset.yaml.j2",
    "stage3": "jobset.yaml.j2",
    "sample": "jobset.yaml.j2",
    "caption": "job.yaml.j2",
    "prepare_data": "job.yaml.j2",
    "demo": "deployment.yaml.j2",
    "tensorboard": "deployment.yaml.j2",
    "setup": "setup.yaml.j2",
}
PORT = 8476  # of process 0, where the others join it
# What a pod asks for that waits for others most of the time.
SMALL = {"cpu": "2", "memory": "8Gi", "shared_memory": "1Gi", "scratch": "10Gi"}
# Line ends and unprintable letters that YAML folds or refuses where JSON does not.
UNPRINTABLE = re.compile("[\x7f-\xa0\u2028\u2029\ufeff]")
PLACEHOLDER = re.compile(r"<[a-z][a-z-]*>")
QUANTITY = re.compile(r"([1-9]\d*)(Ki|Mi|Gi|Ti)?")
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
BUCKET = re.compile(r"[a-z0-9][-_.a-z0-9]{1,61}[a-z0-9]")
MESH = re.compile(r"--(?:config\.mesh\.)?(replica|data|model)=(-?\d+)")
# Where something of the bucket lies; those of `data` come to them.
PATHS = (
    "models", "runs", "sample.prompts", "sample.output", "caption.input", "caption.output",
    "prepare_data.input", "prepare_data.output", "prepare_data.caption_table",
)  # fmt: skip
# What may be added at the level `baseline` of Kubernetes' Pod Security Standards.
BASELINE = (
    "AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD",
    "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
)  # fmt: skip


def define_flags() -> None:
    flags.DEFINE_string("topology", None, "A file in launch/gke/topologies: v5e-256.")
    flags.DEFINE_string("job", None, f"One of {', '.join(TEMPLATES)}.")
    flags.DEFINE_string("project", None, "Your copy of launch/gke/project.yaml.")
    flags.DEFINE_enum("format", "manifest", ["manifest", "xpk"], "Or a command of xpk.")
    flags.DEFINE_string("output", "-", "The file to write; - is the standard output.")
    flags.DEFINE_multi_string(
        "set",
        [],
        "KEY=VALUE of the project or the topology, such as spot=true or data.stage1=data/x.",
    )
    flags.DEFINE_multi_string("arg", [], "Added to the job's command; may be repeated.")


def main() -> None:
    args = flags.FLAGS
    values = load(args.topology, args.project, args.set)
    text = {"manifest": render, "xpk": xpk}[args.format](args.job, values, args.arg)
    if args.output == "-":
        sys.stdout.write(text)
        return
    try:
        pathlib.Path(args.output).write_text(text)
    except OSError as error:
        raise InputError(f"--output={args.output} cannot be written: {error.strerror}.") from None


def topologies() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "topologies").glob("*.yaml"))


def load(topology: str, project: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a topology and a project in one table, after the changes.

    Args:
      topology: Its name.
      project: Path of the file.
      changes: KEY=VALUE, where a key leads into a section by dots and a value is YAML.
    """
    if topology not in topologies():
        raise InputError(
            f"There is no --topology={topology}. There are: {', '.join(topologies())}. Another "
            f"one is a file in launch/gke/topologies."
        )
    usual = _read(FOLDER / "project.yaml")
    theirs = _read(pathlib.Path(project))
    if faults := list(_differences(theirs, usual)):
        raise InputError(
            f"--project={project} does not fit to launch/gke/project.yaml: {'; '.join(faults)}."
        )
    values = {**theirs, **_read(FOLDER / "topologies" / f"{topology}.yaml"), "topology": topology}
    for change in changes:
        _change(values, change)
    return _replaced(values, {"{name}": values["name"], "{topology}": topology.lower()})


def _yaml():
    try:
        import yaml
    except ImportError as error:
        raise InputError(
            f"Manifests need PyYAML and Jinja ({error}): pip install -e '.[launch]'."
        ) from None
    return yaml


def _read(path: pathlib.Path) -> dict[str, Any]:
    yaml = _yaml()
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} has to be YAML of the form key: value.")
    return values


def _differences(theirs: Mapping, usual: Mapping, section: str = "") -> Iterator[str]:
    """What a project file has too much or too little, or of another kind."""
    for key in usual.keys() - theirs.keys():
        yield f"{section}{key} is missing"
    for key in theirs.keys() - usual.keys():
        close = difflib.get_close_matches(str(key), list(usual), n=1)
        yield f"{section}{key} is not known" + (f" (did you mean {close[0]}?)" if close else "")
    for key in usual.keys() & theirs.keys():
        if type(theirs[key]) is not type(usual[key]):
            kind = type(usual[key]).__name__
            yield f"{section}{key}={theirs[key]!r} is no {kind}, such as {usual[key]!r}"
        elif isinstance(usual[key], dict):
            yield from _differences(theirs[key], usual[key], f"{section}{key}.")


def _change(values: dict[str, Any], change: str) -> None:
    yaml = _yaml()
    path, given, text = change.partition("=")
    *sections, key = path.split(".")
    place = values
    for section in sections:
        place = place.get(section) if isinstance(place, dict) else None
    if not given or not isinstance(place, dict) or key not in place or path == "topology":
        raise InputError(
            f"--set={change} changes nothing that there is. It is KEY=VALUE, and a KEY is one of "
            f"{', '.join(_keys(values))}."
        )
    try:
        value = text if isinstance(place[key], str) else yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if value is None or type(value) is not type(place[key]):
        kind = type(place[key]).__name__
        raise InputError(f"--set={change} is no {kind}, such as {path}={json.dumps(place[key])}.")
    place[key] = value


def _replaced(values: Any, marks: Mapping[str, str]) -> Any:
    if isinstance(values, dict):
        return {key: _replaced(value, marks) for key, value in values.items()}
    if isinstance(values, list):
        return [_replaced(value, marks) for value in values]
    if isinstance(values, str):
        for mark, value in marks.items():
            values = values.replace(mark, value)
    return values


def _keys(values: Mapping[str, Any], section: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("node_selector",):
            yield from _keys(value, f"{section}{key}.")
        elif key != "topology":
            yield f"{section}{key}"


def render(job: str, values: Mapping[str, Any], arguments: Sequence[str] = ()) -> str:
    """The manifest of a job, which is checked to be filled in and to be YAML.

    Args:
      job: Its name.
      values: From `load`.
      arguments: Flags to add to its command.
    """
    import jinja2

    _check_job(job, values)
    if arguments and job == "setup":
        raise InputError(f"--arg={arguments[0]}: the job setup runs no command. Leave it out.")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "templates"),
        undefined=jinja2.StrictUndefined,
        # All that a template inserts is JSON, which is YAML too: no value can be anything else
        # than a value. In comments `plain` takes its quotes away, and keeps it in its line.
        finalize=_as_json,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = lambda value: _Plain(_as_json(value).strip('"'))
    own = _complete(job, values, arguments)
    # Kubernetes would take $(...) of an argument for a variable.
    own["command"] += [argument.replace("$(", "$$(") for argument in arguments]
    text = environment.get_template(TEMPLATES[job]).render(own)
    _check_filled_in(text, values)
    for document in _yaml().safe_load_all(text):
        if not {"apiVersion", "kind", "metadata"} <= document.keys():
            raise ValueError(f"A template makes what is no object of Kubernetes: {document}")
    return text


def xpk(job: str, values: Mapping[str, Any], arguments: Sequence[str] = ()) -> str:
    """The command by which xpk runs a job of TPUs; the arguments are those of `render`.

    What xpk cannot say is not in it: one count for all restarts, containers that are privileged,
    Workload Identity as the cluster has it, and a priority class by xpk's names.
    """
    _check_job(job, values)
    if not values["xpk_type"] or TEMPLATES[job] != "jobset.yaml.j2":
        raise InputError(
            f"--format=xpk is for stages and samples on TPUs, not for --job={job} on "
            f"--topology={values['topology']}. Leave it out."
        )
    own = _complete(job, values, arguments)
    cluster = [
        f"--cluster={own['xpk']['cluster']}", f"--project={own['gcp_project']}",
        f"--zone={own['xpk']['zone']}",
    ]  # fmt: skip
    # Both compiled programs and the text encoder: with xpk a volume is attached once, by name.
    cache = f"JAX_COMPILATION_CACHE_DIR={_url(own, own['compilation_cache']['path'])}"
    mount = ("--mount-point=/models", "--readonly=true", "--auto-mount=false")
    folder = f"--mount-options=implicit-dirs,only-dir={own['models']}"
    attach = [
        "xpk", "storage", "attach", "models", *cluster, "--type=gcsfuse",
        f"--bucket={own['bucket']}", "--size=100", *mount, folder,
    ]  # fmt: skip
    create = [
        "xpk", "workload", "create", *cluster, f"--workload={own['instance']}",
        f"--tpu-type={own['xpk_type']}", f"--num-slices={own['slices']}",
        f"--docker-image={own['image']}", f"--env={cache}", "--storage=models",
        # Preemptions are counted too. Of the statuses below 127 xpk starts again what is named.
        f"--max-restarts={own['xpk']['max_restarts']}", "--restart-on-exit-codes=1,75",
        f"--termination-grace-period-seconds={own['grace']}",
        f"--command=exec {shlex.join([*own['command'], *arguments])}",
    ]  # fmt: skip
    text = (
        f"#!/usr/bin/env bash\n# Job {job} on {own['topology']} by xpk 1.16. Once for a cluster:\n"
        f"#\n#   {_lines(attach, 4).replace(chr(10), chr(10) + '#   ')}\n"
        f"set -euo pipefail\n{_lines(create, 3)}\n"
    )
    _check_filled_in(text, values)
    return text


class _Plain(str):
    """Goes into a comment as it is."""


def _as_json(value: Any) -> str:
    if isinstance(value, _Plain):
        return value
    if hasattr(value, "_fail_with_undefined_error"):
        value._fail_with_undefined_error()
    text = json.dumps(value, ensure_ascii=False)
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _complete(job: str, values: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """The values, and what follows from them for this job."""
    if faults := list(_faults(job, values, arguments)):
        raise InputError("Kubernetes or the program would refuse this:\n  " + "\n  ".join(faults))
    instance, parts = _instance(job, values), _parts(job, values)
    hosts = values["slices"] * values["hosts"]
    own = dict(
        job=job,
        instance=instance,
        flavor=f"{values['name']}-{values['topology'].lower()}",
        image=values["images"]["tensorboard" if job == "tensorboard" else values["image"]],
        restart="Never" if TEMPLATES[job] in ("jobset.yaml.j2", "job.yaml.j2") else "Always",
        grace=values["grace_seconds"],
        cache=values["compilation_cache"]["kind"],
        models=values["models"],
        logs=None,
        coordinator=None,
        ports={},
        probe=None,
        command_only=False,
        tensorboard=None,
        output=None,
        workers=1,
        chips=values["chips"] // parts,
        cpu=_part(values["cpu"], parts),
        memory=_part(values["memory"], parts),
        shared_memory=_part(values["shared_memory"], parts),
        scratch=_part(values["scratch"], parts),
        quota={
            "cpu": _times(values["cpu"], hosts),
            "memory": _times(values["memory"], hosts),
            # Of all that pods ask for: what a queue does not cover, it never admits.
            "ephemeral-storage": _times(values["scratch"], hosts),
        },
    )
    if values["resource"]:
        own["quota"][values["resource"]] = values["chips"] * hosts
    if job in values["data"]:
        own.update(output=_url(values, "runs", job))
        own.update(tensorboard=f"{own['output']}/tensorboard")
    if TEMPLATES[job] == "jobset.yaml.j2":
        own.update(ports={"tpu": 8471, "slices": 8080})
        if values["accelerator"] == "gpu":
            own.update(coordinator=f"{instance}-host-0-0.{instance}:{PORT}")
            own.update(ports={"coordinator": PORT})
    if job == "sample":
        own.update(output=_url(values, values["sample"]["output"]))
    if job == "caption":
        own.update(cache=None, output=_url(values, values["caption"]["output"]))
        if values["accelerator"] == "gpu":
            own.update(image=values["images"]["caption"], workers=hosts * values["chips"])
        else:
            own.update(models=None, workers=values["caption"]["workers"], **SMALL)
    if job == "prepare_data":
        own.update(cache=None, models=None, output=_url(values, values["prepare_data"]["output"]))
    if job == "demo":
        own.update(ports={"http": 7860}, probe="/healthz", grace=60)
    if job == "tensorboard":
        own.update(ports={"http": 6006}, probe="/", cache=None, models=None, logs=values["runs"])
        own.update(grace=30, command_only=True, **SMALL)
    if job == "setup":
        own.update(member=_member(values))
    return {**values, **own, "command": _command(job, {**values, **own})}


def _command(job: str, values: Mapping[str, Any]) -> list[str]:
    flags_of_topology = values["flags"].get(job, [])
    weights = f"/models/{values['weights']}"
    if job in values["data"]:
        number = int(job.removeprefix("stage"))
        before = _url(values, "runs", f"stage{number - 1}")
        return [
            "python", "-m", "lumina_jax.train",
            f"--config=configs/{job}.py",
            f"--workdir={values['output']}",
            f"--config.data.directory={_url(values, values['data'][job])}",
            *([f"--config.train.init_from={before}"] if number > 1 else []),
            f"--config.text_encoder.path={weights}",
            f"--config.autoencoder.path={weights}",
            *flags_of_topology,
            f"--join_timeout={values['join_timeout']}",
        ]  # fmt: skip
    if job == "sample":
        return [
            "python", "-m", "lumina_jax.sample",
            f"--checkpoint={_url(values, 'runs', values['sample']['stage'])}",
            f"--prompts_file={_url(values, values['sample']['prompts'])}",
            f"--output={values['output']}",
            f"--text_encoder_path={weights}",
            f"--autoencoder_path={weights}",
            *flags_of_topology,
            f"--join_timeout={values['join_timeout']}",
        ]  # fmt: skip
    if job == "caption":
        asked = values["caption"]
        if values["accelerator"] == "gpu":
            backend = f"--model=/models/{asked['model']}"
        else:
            backend = f"--server={','.join(asked['servers'])}"
        return [
            "python", "tools/caption.py", asked["source"],
            f"--input={_url(values, asked['input'])}",
            f"--output={values['output']}",
            backend,
            *flags_of_topology,
            "--worker=$(JOB_COMPLETION_INDEX)",
            f"--num_workers={values['workers']}",
        ]  # fmt: skip
    if job == "prepare_data":
        asked = values["prepare_data"]
        table = asked["caption_table"]
        return [
            "python", "tools/prepare_data.py", asked["source"],
            f"--input={_url(values, asked['input'])}",
            f"--output={values['output']}",
            f"--resolution={','.join(map(str, asked['resolutions']))}",
            *([f"--caption_table={_url(values, table)}"] if table else []),
            *flags_of_topology,
        ]  # fmt: skip
    if job == "demo":
        return [
            "python", "tools/demo.py",
            f"--checkpoint={_url(values, 'runs', values['demo']['stage'])}",
            f"--text_encoder_path={weights}",
            f"--autoencoder_path={weights}",
            "--host=0.0.0.0",
            "--port=7860",
            f"--names={values['demo']['host']}",
            *flags_of_topology,
        ]  # fmt: skip
    if job == "tensorboard":
        return ["tensorboard", "--logdir=/runs", "--host=0.0.0.0", "--port=6006"]
    return []


def _member(values: Mapping[str, Any]) -> str:
    """What IAM calls the service account of the pods."""
    pool, number = f"{values['gcp_project']}.svc.id.goog", values["gcp_project_number"]
    namespace, account = values["namespace"], values["service_account"]
    if values["gcp_service_account"]:
        return f"{pool}[{namespace}/{account}]"
    return (
        f"principal://iam.googleapis.com/projects/{number}/locations/global/"
        f"workloadIdentityPools/{pool}/subject/ns/{namespace}/sa/{account}"
    )


def _url(values: Mapping[str, Any], *path: str) -> str:
    first, *rest = path
    folder = values["runs"] if first == "runs" else first
    return "/".join([f"gs://{values['bucket']}", folder, *rest])


def _instance(job: str, values: Mapping[str, Any]) -> str:
    return f"{values['name']}-{job.replace('_', '-')}"


def _parts(job: str, values: Mapping[str, Any]) -> int:
    """How many pods share a host: what captions or shows a page on GPUs takes one of them."""
    return values["chips"] if values["accelerator"] == "gpu" and job in ("caption", "demo") else 1


def _part(text: str, parts: int) -> str:
    number, unit = QUANTITY.fullmatch(text).groups("")
    return f"{int(number) // parts}{unit}"


def _times(text: str, times: int) -> str:
    number, unit = QUANTITY.fullmatch(text).groups("")
    return f"{int(number) * times}{unit}"


def _faults(job: str, values: Mapping[str, Any], arguments: Sequence[str] = ()) -> Iterator[str]:
    """What Kubernetes, the storage or the program would refuse later, or would not heed."""
    # Names.
    longest = f"{_instance(job, values)}-host-{values['slices'] - 1}-{values['hosts'] - 1}-xxxxx"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", values["name"]) or len(longest) > 63:
        yield (
            f"name={values['name']!r} must be small letters, digits and -, beginning with a "
            f"letter, and short: {longest} may have 63 letters."
        )
    for key in ("namespace", "service_account"):
        if not LABEL.fullmatch(values[key]):
            yield f"{key}={values[key]!r} must be small letters, digits and - between, 63 at most."
    bucket = values["bucket"]
    if not (BUCKET.fullmatch(bucket) or PLACEHOLDER.search(bucket)):
        yield (
            f"bucket={bucket!r} must be the name alone, without gs://: 3 to 63 small letters, "
            f"digits, -, _ and ."
        )
    for variant, image in values["images"].items():
        if not (re.search(r"@sha256:[0-9a-f]{64}$", image) or PLACEHOLDER.search(image)):
            yield f"images.{variant}={image!r} must end in its digest, @sha256: and 64 digits."
    # Paths.
    texts = dict(_texts(values))
    for key in (*PATHS, *(key for key in texts if key.startswith("data."))):
        if texts[key].startswith("/") or "://" in texts[key]:
            yield f"{key}={texts[key]!r} must be a path below the bucket, such as a/b."
    for key in ("models", "weights", "runs"):
        if not texts[key]:
            yield f"{key} must not be empty: name a folder."
    cache = values["compilation_cache"]
    needed = {"gcsfuse": "path", "pvc": "claim"}.get(cache["kind"])
    if needed is None or not cache[needed]:
        yield (
            f"compilation_cache={json.dumps(cache)} must be of kind gcsfuse with a path, or of "
            f"kind pvc with a claim."
        )
    for key in ("models", "runs", "compilation_cache.path"):
        if "," in texts[key]:
            yield f"{key}={texts[key]!r} must have no comma: it stands in a list of mount options."
    # Numbers.
    least = {"max_restarts": 0, "grace_seconds": 1, "join_timeout": 1}
    for key, number in (least | dict.fromkeys(("slices", "hosts", "chips"), 1)).items():
        if values[key] < number:
            yield f"{key}={values[key]} must be at least {number}."
    for section, key, number in (("caption", "workers", 1), ("xpk", "max_restarts", 0)):
        if values[section][key] < number:
            yield f"{section}.{key}={values[section][key]} must be at least {number}."
    for key in ("cpu", "memory", "shared_memory", "scratch"):
        if not (quantity := QUANTITY.fullmatch(values[key])):
            yield f"{key}={values[key]!r} is no quantity, such as '80' of cores or 128Gi."
        elif int(quantity[1]) < _parts(job, values):
            yield (
                f"{key}={values[key]} leaves nothing to each of the {values['chips']} pods of a "
                f"host: give more, or say it in a smaller unit."
            )
    if values["accelerator"] != "tpu" and values["slices"] != 1:
        yield f"slices={values['slices']} are of TPUs: of others set hosts."
    mesh = {
        found[1]: int(found[2])
        for word in (*values["flags"].get(job, ()), *arguments)
        if (found := MESH.fullmatch(word))
    }
    chips = values["slices"] * values["hosts"] * values["chips"]
    if {"replica", "data"} <= mesh.keys() and not _fits(list(mesh.values()), chips):
        yield (
            f"The mesh {' '.join(f'{axis}={size}' for axis, size in mesh.items())} must multiply "
            f"to the {chips} chips; -1 takes what is left. Change it in `flags` or by --arg."
        )
    # Rights.
    more = ["host_network"] * values["host_network"]
    more += [name for name in values["capabilities"] if name not in BASELINE]
    if values["pod_security"] not in ("baseline", "privileged"):
        yield f"pod_security={values['pod_security']!r} must be baseline or privileged."
    elif more and values["pod_security"] != "privileged":
        yield (
            f"{', '.join(more)} of --topology={values['topology']} must have "
            f"pod_security=privileged, in the project: the namespace admits no such pods otherwise."
        )
    if values["capabilities"] and values["user"] != 0:
        yield (
            f"capabilities={json.dumps(values['capabilities'])} do nothing for user "
            f"{values['user']}: set user=0 too, or leave them out."
        )
    if job == "caption" and values["accelerator"] != "gpu" and not values["caption"]["servers"]:
        yield (
            f"caption.servers is empty, and --topology={values['topology']} has no GPU for a model "
            f"of its own. Name servers: --set='caption.servers=[http://node0:8000/v1]'."
        )


def _fits(sizes: list[int], chips: int) -> bool:
    """Whether a mesh has as many chips as there are."""
    given = math.prod(size for size in sizes if size != -1)
    if given < 1 or sizes.count(-1) > 1:
        return False
    return chips % given == 0 if -1 in sizes else given == chips


def _lines(command: Sequence[str], words: int) -> str:
    """A command for a shell, each flag after the first words on a line of its own."""
    flags_of_it = (word.partition("=") for word in command[words:])
    quoted = (f"{name}={shlex.quote(value)}" for name, _, value in flags_of_it)
    return " \\\n  ".join([shlex.join(command[:words]), *quoted])


def _check_job(job: str, values: Mapping[str, Any]) -> None:
    if job not in values["jobs"]:
        raise InputError(
            f"--topology={values['topology']} has no --job={job}. It has: "
            f"{', '.join(values['jobs'])}."
        )


def _check_filled_in(text: str, values: Mapping[str, Any]) -> None:
    """Refuses what still has a placeholder in it."""
    left = [
        f"{key} = {value}"
        for key, value in _texts(values)
        if PLACEHOLDER.search(value) and value in text
    ]
    if left:
        raise InputError(
            "The project file still has placeholders that this manifest needs:\n  "
            + "\n  ".join(left)
            + "\nFill them in, in your copy of launch/gke/project.yaml."
        )


def _texts(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, path)
    elif isinstance(values, str):
        yield path, values


if __name__ == "__main__":
    define_flags()
    cli.run(main, required=("topology", "job", "project"))
