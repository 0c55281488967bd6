"""The manifests of launch/gke: rendered, validated and judged without a cluster.

`python -m tests.launch.test_manifests` renews the golden files.
"""

import contextlib
import copy
import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
from concurrent import futures

import pytest
import yaml

from lumina_jax import distributed
from lumina_jax.errors import InputError
from tools.render_manifests import TEMPLATES, load, render, topologies

ROOT = pathlib.Path(__file__).parents[2]
HERE = ROOT / "tests/launch"
PROJECT = HERE / "project.yaml"
KUBERNETES = "1.33"
MANIFESTS = [
    (topology, job)
    for topology in topologies()
    for job in yaml.safe_load((ROOT / f"launch/gke/topologies/{topology}.yaml").read_text())["jobs"]
]


@functools.cache
def text_of(topology, job, *changes):
    return render(job, load(topology, str(PROJECT), changes))


@functools.cache
def objects(topology, job, *changes):
    return tuple(yaml.safe_load_all(text_of(topology, job, *changes)))


def object_of(kind, topology, job, *changes):
    (found,) = (o for o in objects(topology, job, *changes) if o["kind"] == kind)
    return found


def unwrapped(found):
    """An object of JobSet as the Jobs that the controller makes of it; any other as it is."""
    if found["kind"] != "JobSet":
        return [found]
    return [
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": found["metadata"]["name"], **job["template"].get("metadata", {})},
            "spec": job["template"]["spec"],
        }
        for job in found["spec"]["replicatedJobs"]
    ]


def jobs_of(found):
    return [o for o in unwrapped(found) if o["kind"] == "Job"]


def pods_of(topology, job, *changes):
    """The templates of pods of a manifest."""
    return [
        o["spec"]["template"]
        for found in objects(topology, job, *changes)
        for o in unwrapped(found)
        if o["kind"] in ("Job", "Deployment")
    ]


def container_of(topology, job, *changes):
    (pod,) = pods_of(topology, job, *changes)
    (container,) = pod["spec"]["containers"]
    return container


def command_of(topology, job, *changes):
    container = container_of(topology, job, *changes)
    return container.get("args") or container["command"]


RUNNING = [(topology, job) for topology, job in MANIFESTS if job != "setup"]
every_manifest = pytest.mark.parametrize(("topology", "job"), MANIFESTS)
every_running = pytest.mark.parametrize(("topology", "job"), RUNNING)


# Are they what Kubernetes takes?


def jobset_validator():
    jsonschema = pytest.importorskip("jsonschema")
    schema = yaml.safe_load((HERE / "jobset_schema.yaml").read_text())
    return jsonschema.Draft202012Validator(schema)


def validate(found):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    if found["kind"] == "JobSet":
        jobset_validator().validate(found)
    for item in unwrapped(found):
        if not item["apiVersion"].startswith("kueue.x-k8s.io/"):
            kubernetes_validate.validate(item, KUBERNETES, strict=True)


@every_manifest
def test_every_object_passes_the_strict_schema_of_kubernetes_and_ours_of_jobset(topology, job):
    for found in objects(topology, job):
        validate(found)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((), {"suspended": True}),
        (("failurePolicy",), {"maxRestart": 3}),
        (("failurePolicy", "rules", 0), {"action": "StopJobSet"}),
        (("replicatedJobs", 0), {"replicas": "two"}),
        (("replicatedJobs", 0, "template", "spec"), {"paralelism": 4}),
        (("replicatedJobs", 0, "template", "spec", "template", "spec"), {"hostNetwrok": True}),
    ],
)
def test_a_slip_at_any_level_is_found(path, value):
    found = copy.deepcopy(object_of("JobSet", "v5e-256", "stage1"))
    validate(found)
    place = functools.reduce(lambda place, key: place[key], path, found["spec"])
    place.update(value)
    with pytest.raises(Exception, match=re.escape(str(next(iter(value.values()))))) as slip:
        validate(found)
    assert type(slip.value).__name__ == "ValidationError"


@pytest.mark.skipif("JOBSET_CRD" not in os.environ, reason="JOBSET_CRD names no file")
@pytest.mark.slow
def test_every_jobset_passes_the_upstream_schema_where_its_file_is_named():
    jsonschema = pytest.importorskip("jsonschema")
    crd = yaml.safe_load(pathlib.Path(os.environ["JOBSET_CRD"]).read_text())
    (schema,) = (
        v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1alpha2"
    )
    validator = jsonschema.Draft202012Validator(strict(schema["properties"]["spec"]))
    found = [o["spec"] for pair in MANIFESTS for o in objects(*pair) if o["kind"] == "JobSet"]
    assert found
    for spec in found:
        validator.validate(spec)
        with pytest.raises(jsonschema.ValidationError):
            validator.validate({**spec, "failurePolcy": {}})


def strict(schema):
    """The schema of a CRD, which then takes no field that it does not know."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    known = {key: strict(part) for key, part in schema.items() if key != "x-kubernetes-validations"}
    if isinstance(schema.get("properties"), dict):
        known.setdefault("additionalProperties", False)
    return known


@pytest.mark.parametrize("topology", topologies())
def test_a_queue_has_room_for_every_job_of_its_topology(topology):
    found = objects(topology, "setup")
    (queue,) = (o["spec"] for o in found if o["kind"] == "ClusterQueue")
    (group,) = queue["resourceGroups"]
    (flavor,) = group["flavors"]
    quota = {r["name"]: amount(r["nominalQuota"]) for r in flavor["resources"]}
    assert group["coveredResources"] == list(quota)
    names = {o["kind"]: o["metadata"]["name"] for o in found}
    assert flavor["name"] == names["ResourceFlavor"]
    (local,) = (o for o in found if o["kind"] == "LocalQueue")
    assert local["spec"]["clusterQueue"] == names["ClusterQueue"]
    for job in {job for where, job in RUNNING if where == topology} - {"demo", "tensorboard"}:
        (top,) = objects(topology, job)
        assert top["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
        (inner,) = jobs_of(top)
        num_pods = inner["spec"]["parallelism"]
        if top["kind"] == "JobSet":
            num_pods *= top["spec"]["replicatedJobs"][0]["replicas"]
        resources = container_of(topology, job)["resources"]
        asked = {**resources["requests"], **resources.get("limits", {})}
        for name, one in asked.items():
            assert num_pods * amount(one) <= quota[name], (job, name)


def amount(quantity):
    """A quantity of Kubernetes as a number."""
    number, unit = re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti|)", str(quantity)).groups()
    return int(number) * 1024 ** ["", "Ki", "Mi", "Gi", "Ti"].index(unit)


# Do the node pools, whose commands stand at the top of the topology files, fit them?


def node_pool(topology):
    """The flags of the command for the node pool, joined from the lines of the comment."""
    text = (ROOT / f"launch/gke/topologies/{topology}.yaml").read_text()
    comment = "".join(line[1:] for line in text.partition("\n\n")[0].splitlines(keepends=True))
    (command,) = re.findall(r"gcloud container node-pools create NAME((?: .*\\\n)* .*)", comment)
    words = command.replace("\\\n", " ").split()
    return dict(word.removeprefix("--").split("=", 1) for word in words)


def disk_for_pods(disk):
    """What pods may ask for of a boot disk, in bytes; never more than GKE gives.

    GKE keeps 6 GiB and 35% of the disk and 10% of its file system, which is 5.75 GiB smaller: so
    an example of its documentation, 47060071478 bytes of 100 GB. Of large disks it keeps less.
    https://cloud.google.com/kubernetes-engine/docs/concepts/plan-node-sizes
    """
    return int((0.9 * (disk - 5.75) - 6 - 0.35 * disk) * 2**30)


def test_the_room_on_a_disk_is_that_of_the_documentation():
    assert disk_for_pods(100) == pytest.approx(47060071478, rel=1e-3)


@pytest.mark.parametrize("topology", topologies())
def test_pods_fit_on_the_node_pool_of_their_topology(topology):
    pool, values = node_pool(topology), load(topology, str(PROJECT))
    assert pool["node-locations"] == "ZONE"  # else as many nodes in each zone
    assert int(pool["num-nodes"]) == values["hosts"]
    labels = values["node_selector"]
    of_tpus = labels.get("cloud.google.com/gke-tpu-topology")
    assert pool.get("tpu-topology") == (of_tpus if values["hosts"] > 1 else None)
    if values["accelerator"] == "gpu":
        gpus = dict(part.split("=") for part in pool["accelerator"].split(","))
        assert gpus["type"] == labels["cloud.google.com/gke-accelerator"]
        assert int(gpus["count"]) == values["chips"]
        assert gpus["gpu-driver-version"] == "latest"
    room = disk_for_pods(int(pool.get("disk-size", 100)))
    for job in [job for where, job in RUNNING if where == topology]:
        (pod,) = pods_of(topology, job)
        resources = pod["spec"]["containers"][0]["resources"]
        # GCS FUSE asks for what it is allowed.
        annotations = pod["metadata"].get("annotations", {})
        fuse = annotations.get("gke-gcsfuse/ephemeral-storage-limit", "0")
        one = amount(resources["requests"]["ephemeral-storage"]) + amount(fuse)
        chips = resources.get("limits", {}).get(values["resource"])
        assert one * (values["chips"] // chips if chips else 1) <= room, job


# Golden files.


def golden(topology):
    jobs = [job for where, job in MANIFESTS if where == topology]
    return "---\n".join(text_of(topology, job) for job in jobs)


@pytest.mark.parametrize("topology", topologies())
def test_manifests_are_those_of_the_golden_files(topology):
    path = HERE / "golden" / f"{topology}.yaml"
    there = path.read_text() if path.exists() else ""
    assert golden(topology) == there, (
        "If the change is meant, renew them with `python -m tests.launch.test_manifests`, and read "
        "what `git diff tests/launch/golden` says."
    )


def test_no_golden_file_is_of_a_topology_that_is_gone():
    assert sorted(path.stem for path in (HERE / "golden").glob("*")) == topologies()


# Do the commands run?


PROGRAMS = [(topology, job) for topology, job in RUNNING if job != "tensorboard"]


def module_of(command):
    _, *words = command
    return words[1] if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")


def flags_of(module):
    """The flags that a program defines, in a process of its own."""
    code = (
        "import importlib, json, sys; from absl import flags\n"
        f"module = importlib.import_module({module!r})\n"
        "getattr(module, 'define_flags', lambda: None)()\n"
        "print(json.dumps(list(flags.FLAGS)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def program_flags():
    """Of all programs at once: it is their imports that take the time."""
    modules = sorted({module_of(command_of(*pair)) for pair in PROGRAMS})
    with futures.ThreadPoolExecutor() as pool:
        return dict(zip(modules, pool.map(flags_of, modules), strict=True))


@pytest.mark.parametrize(("topology", "job"), PROGRAMS)
def test_every_flag_is_one_of_the_program_and_every_config_is_there(topology, job, program_flags):
    command = command_of(topology, job)
    known, config = program_flags[module_of(command)], None
    for word in command[2:]:
        if not word.startswith("--"):
            continue
        name, given, value = word[2:].partition("=")
        assert given, word
        if name == "config":
            assert (ROOT / value).is_file(), word
            module = value.removesuffix(".py").replace("/", ".")
            config = importlib.import_module(module).get_config()
        if name.startswith("config."):
            place = config
            for key in name.split(".")[1:]:
                assert key in place, word
                place = place[key]
            if isinstance(place, int):
                int(value)
        else:
            assert name in known, word


@pytest.mark.parametrize(
    ("topology", "job"), [pair for pair in RUNNING if pair[1].startswith("stage")]
)
def test_stages_have_the_mesh_of_their_plan_and_as_many_chips(topology, job):
    values = load(topology, str(PROJECT))
    given = dict(word[2:].split("=", 1) for word in command_of(topology, job) if "=" in word)
    config = importlib.import_module(f"configs.{job}").get_config()
    chips = values["slices"] * values["hosts"] * values["chips"]
    mesh = {axis: int(given.get(f"config.mesh.{axis}", config.mesh[axis])) for axis in config.mesh}
    if not values["plan"]:  # no GPU can be planned
        others = mesh["data"] * mesh["model"]
        assert mesh["replica"] == -1
        assert chips % others == 0
        assert config.train.batch_size % chips == 0
        return
    name = f"{job}-{values['plan']}".replace("*", "x").replace(":", "-")
    plan = json.loads((ROOT / f"docs/plans/{name}.json").read_text())
    assert mesh == plan["mesh"]
    assert given.get("config.model.remat", config.model.remat) == plan["remat"]
    assert plan["num_chips"] == chips
    assert plan["programs"]["train"]["fits"]


@pytest.mark.parametrize("topology", [t for t in topologies() if t[0] in "v2"])
def test_hosts_and_topology_multiply_to_the_same_chips(topology):
    values = load(topology, str(PROJECT))
    sides = values["node_selector"]["cloud.google.com/gke-tpu-topology"].split("x")
    product = functools.reduce(lambda a, b: a * int(b), sides, 1)
    assert product == values["hosts"] * values["chips"]


def test_each_stage_begins_from_the_one_before():
    workdirs = {}
    for number in (1, 2, 3):
        words = dict(w.split("=", 1) for w in command_of("h100", f"stage{number}") if "=" in w)
        workdirs[number] = words["--workdir"]
        assert words.get("--config.train.init_from") == workdirs.get(number - 1)
    assert len(set(workdirs.values())) == 3


@pytest.mark.parametrize("job", ["stage1", "sample"])
def test_processes_on_gpus_meet_at_the_name_of_the_first_pod(job, monkeypatch):
    jobset = object_of("JobSet", "h100", job)
    (group,) = jobset["spec"]["replicatedJobs"]
    subdomain = jobset["spec"]["network"]["subdomain"]
    first = f"{jobset['metadata']['name']}-{group['name']}-0-0.{subdomain}"
    container = container_of("h100", job)
    env = {entry["name"]: entry for entry in container["env"]}
    index = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES"):
        monkeypatch.setenv(name, env[name]["value"])
    monkeypatch.setenv("JAX_PROCESS_ID", "7")
    place = distributed._from_settings(None, None, None)
    assert (place.num_processes, place.process_id) == (group["template"]["spec"]["completions"], 7)
    host, port = place.address.split(":")
    assert host == first
    assert int(port) in [entry["containerPort"] for entry in container["ports"]]


@every_running
def test_tpus_are_told_nothing_that_gke_tells_them(topology, job):
    names = {entry["name"] for entry in container_of(topology, job)["env"]}
    joined = {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
    is_joined = topology == "h100" and (job == "sample" or job.startswith("stage"))
    assert names & joined == (joined if is_joined else set())
    assert not {name for name in names if name.startswith(("TPU_", "MEGASCALE_"))}


def test_workers_that_caption_are_as_many_as_the_command_says():
    for topology in ("h100", "cpu"):
        job = object_of("Job", topology, "caption")["spec"]
        assert job["completions"] == job["parallelism"]
        words = command_of(topology, "caption")
        assert f"--num_workers={job['completions']}" in words
        assert "--worker=$(JOB_COMPLETION_INDEX)" in words


# What becomes of an exit status?


@pytest.fixture(scope="module")
def verdicts():
    """What launch/verdict.sh says of every exit status."""
    done = subprocess.run(
        ["bash", "-c", ". launch/verdict.sh; for i in {0..255}; do verdict $i; done"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


def first_rule(policy, *, status=None, condition=None):
    """Number and action of the first rule of a podFailurePolicy that fits a failed pod."""
    for number, rule in enumerate(policy["rules"]):
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == "main"
            fits = status is not None and status != 0
            fits &= (status in codes["values"]) == (codes["operator"] == "In")
        else:
            conditions = rule["onPodConditions"]
            fits = {"type": condition, "status": "True"} in conditions
        if fits:
            return number, rule["action"]
    return None, "Count"


def judged_alone(job, **failure):
    """What a Job does about a failed pod: as Kubernetes documents podFailurePolicy."""
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    _, action = first_rule(job["spec"]["podFailurePolicy"], **failure)
    return {"FailJob": "stop", "Ignore": "again", "Count": "count"}[action]


def told_of(job, **failure):
    """Reason and message with which a Job of no retries fails."""
    number, action = first_rule(job["spec"]["podFailurePolicy"], **failure)
    if action == "Count":
        return "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    assert action == "FailJob", "the others would wait for this pod for ever"
    # The words of the Job controller, matchPodFailurePolicy in pod_failure_policy.go.
    if "status" in failure:
        message = (
            f"Container main for pod lumina/lumina-stage2-host-0-2-75 failed with exit code "
            f"{failure['status']} matching FailJob rule at index {number}"
        )
    else:
        message = (
            f"Pod lumina/lumina-stage2-host-0-2-75 has condition {failure['condition']} matching "
            f"FailJob rule at index {number}"
        )
    return "PodFailurePolicy", message


ACTIONS = {
    "FailJobSet": "stop",
    "RestartJobSetAndIgnoreMaxRestarts": "again",
    "RestartJobSet": "count",
}


def judged_together(jobset, **failure):
    """What a JobSet does about a failed pod: its rules, over what its Job says."""
    (job,) = unwrapped(jobset)
    assert job["spec"]["backoffLimit"] == 0
    reason, message = told_of(job, **failure)
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        reasons = rule.get("onJobFailureReasons", [])
        patterns = rule.get("onJobFailureMessagePatterns", [])
        if reasons and reason not in reasons:
            continue
        if patterns and not any(re.search(pattern, message) for pattern in patterns):
            continue
        return ACTIONS[rule["action"]]
    return "count"


@every_running
def test_every_exit_status_is_judged_as_by_verdict_sh(topology, job, verdicts):
    (found,) = (o for o in objects(topology, job) if o["kind"] != "Service")
    if found["kind"] == "Deployment":  # started again, whatever it was
        assert "restartPolicy" not in found["spec"]["template"]["spec"]
        return
    judge = judged_together if found["kind"] == "JobSet" else judged_alone
    assert len(verdicts) == 256
    for status, verdict in enumerate(verdicts):
        if status != 0:
            assert judge(found, status=status) == verdict, status
    assert judge(found, condition="DisruptionTarget") == "again"


def test_processes_of_a_run_start_together_and_workers_alone():
    jobset = object_of("JobSet", "2xv5e-256", "stage1")["spec"]
    assert jobset["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    assert jobset["failurePolicy"]["maxRestarts"] == 10
    assert [group["replicas"] for group in jobset["replicatedJobs"]] == [2]
    job = object_of("Job", "h100", "caption")["spec"]
    assert "backoffLimit" not in job
    assert job["backoffLimitPerIndex"] == 10


# May they do no more than they have to?


@every_running
def test_no_pod_is_root_or_privileged_or_can_write_its_root_or_holds_a_token(topology, job):
    for pod in pods_of(topology, job):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["serviceAccountName"] == "lumina"
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "privileged": False,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"])
        assert not [v for v in spec["volumes"] if v.keys() & {"hostPath", "secret"}]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert {volume["name"] for volume in spec["volumes"]} == mounted
        memory = {v["name"]: v["emptyDir"] for v in spec["volumes"] if "emptyDir" in v}
        assert memory["shared-memory"]["medium"] == "Memory"
        assert amount(memory["shared-memory"]["sizeLimit"]) < amount(
            container["resources"]["requests"]["memory"]
        )


@every_running
def test_programs_are_kept_where_the_cache_is_mounted(topology, job):
    container = container_of(topology, job)
    mounts = {m["mountPath"]: m for m in container["volumeMounts"]}
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert ("JAX_COMPILATION_CACHE_DIR" in env) == ("/cache" in mounts)
    assert env.get("JAX_COMPILATION_CACHE_DIR", "/cache") == "/cache"
    assert mounts.get("/models", {"readOnly": True})["readOnly"] is True
    for word in container.get("args", []):
        if "=/models/" in word:
            assert "/models" in mounts


def test_a_claim_can_hold_the_compiled_programs():
    changes = ("compilation_cache.kind=pvc", "compilation_cache.claim=programs")
    (pod,) = pods_of("v5e-256", "stage1", *changes)
    (volume,) = (v for v in pod["spec"]["volumes"] if v["name"] == "cache")
    assert volume == {"name": "cache", "persistentVolumeClaim": {"claimName": "programs"}}


def test_values_that_others_need_are_one_word_away():
    rights = "pod_security=privileged"
    pod = pods_of("v5e-256", "stage1", "user=0", "capabilities=[SYS_RESOURCE]", rights)[0]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is False
    security = pod["containers"][0]["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"], "add": ["SYS_RESOURCE"]}
    assert security["privileged"] is False
    pod = pods_of("2xv5e-256", "stage1", "host_network=true", "spot=true", rights)[0]["spec"]
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    mounted = [v["csi"]["volumeAttributes"] for v in pod["volumes"] if "csi" in v]
    assert [attributes["hostNetworkPodKSA"] for attributes in mounted] == ["true", "true"]
    assert "hostNetworkPodKSA" not in text_of("2xv5e-256", "stage1")
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    labels = object_of("JobSet", "v5e-256", "stage1", "queue=")["metadata"]["labels"]
    assert "kueue.x-k8s.io/queue-name" not in labels
    kinds = [o["kind"] for o in objects("v5e-256", "setup", "queue=")]
    assert kinds == ["Namespace", "ServiceAccount", "NetworkPolicy"]
    account = object_of("ServiceAccount", "cpu", "setup", "gcp_service_account=a@example")
    assert account["metadata"]["annotations"] == {"iam.gke.io/gcp-service-account": "a@example"}


def test_the_namespace_admits_what_the_project_says():
    for level in ("baseline", "privileged"):
        labels = object_of("Namespace", "v5e-256", "setup", f"pod_security={level}")["metadata"]
        assert labels["labels"]["pod-security.kubernetes.io/enforce"] == level
    # Of the level baseline, so no more is needed.
    assert pods_of("v5e-256", "stage1", "user=0", "capabilities=[CHOWN]")


def test_another_name_makes_another_run_of_the_same_data():
    first, second = (
        dict(w.split("=", 1) for w in command_of("v5e-256", "stage2", *changes) if "=" in w)
        for changes in ((), ("name=second",))
    )
    differ = {flag: second[flag] for flag in first if first[flag] != second[flag]}
    assert differ == {
        "--workdir": "gs://example-lumina/runs/second/stage2",
        "--config.train.init_from": "gs://example-lumina/runs/second/stage1",
    }
    assert "--output=gs://example-lumina/samples/second" in command_of(
        "v5e-256", "sample", "name=second"
    )


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [
        ("replica=-1 model=2", True),
        ("replica=4 data=64", True),
        ("replica=16", False),
        ("replica=0", False),
        ("replica=-1 data=-1", False),
        ("replica=-1 data=3", False),
        ("replica=-1 model=-2", False),
    ],
)
def test_a_mesh_by_hand_has_to_fit_the_chips(sizes, fits):
    arguments = [f"--config.mesh.{size}" for size in sizes.split()]
    with contextlib.nullcontext() if fits else pytest.raises(InputError, match="to the 256 chips"):
        assert arguments[-1] in render("stage1", load("v5e-256", str(PROJECT)), arguments)


def test_a_value_cannot_become_anything_else_than_a_value():
    hostile = 'x"\n  privileged: true # {{ 7 * 7 }} $(HOME) \u2028é'
    values = load("v5e-256", str(PROJECT))
    values["runs"] = values["sample"]["prompts"] = values["gcp_project"] = hostile
    text = render("sample", values, [f"--prompt={hostile}"])
    (pod,) = (o["spec"]["template"]["spec"] for o in unwrapped(yaml.safe_load(text)))
    words = pod["containers"][0]["args"]
    # Kubernetes makes $( of $$(, and takes $( alone for a variable.
    assert words[-1].replace("$$(", "$(") == f"--prompt={hostile}"
    assert "$$(HOME)" in words[-1]
    assert f"--prompts_file=gs://example-lumina/{hostile}" in words
    assert pod["containers"][0]["securityContext"]["privileged"] is False
    kinds = [o["kind"] for o in yaml.safe_load_all(render("setup", values))]
    assert kinds == [o["kind"] for o in objects("v5e-256", "setup")]


def test_the_probe_asks_what_the_page_answers():
    container = container_of("h100", "demo")
    port = {p["name"]: p["containerPort"] for p in container["ports"]}["http"]
    assert f"--port={port}" in container["args"]
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[kind]["httpGet"] == {"path": "/healthz", "port": "http"}
    (service,) = (o for o in objects("h100", "demo") if o["kind"] == "Service")
    deployment = object_of("Deployment", "h100", "demo")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


# The tool.


def run(*words):
    return subprocess.run(
        [sys.executable, "tools/render_manifests.py", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_writes_what_can_be_created_and_adds_flags(tmp_path):
    path = tmp_path / "stage2.yaml"
    done = run(
        "--topology=v5e-256", "--job=stage2", f"--project={PROJECT}", f"--output={path}",
        "--set=name=second", "--arg=--config.train.checkpoint_every=200",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    jobset = yaml.safe_load(path.read_text())
    validate(jobset)
    assert jobset["metadata"]["name"] == "second-stage2"
    (job,) = unwrapped(jobset)
    args = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[-1] == "--config.train.checkpoint_every=200"


def test_a_project_that_is_not_filled_in_is_refused_with_all_that_is_missing():
    done = run("--topology=v5e-256", "--job=stage1", "--project=launch/gke/project.yaml")
    assert done.returncode == 2
    assert "images.tpu = <region>-docker.pkg.dev" in done.stderr
    assert "bucket = <bucket>" in done.stderr
    assert "images.cuda" not in done.stderr  # of no use here
    assert done.stdout == ""


def test_the_example_project_has_the_keys_of_the_filled_one():
    assert load("cpu", str(ROOT / "launch/gke/project.yaml")).keys() == load("cpu", PROJECT).keys()
    shared = yaml.safe_load(PROJECT.read_text()).keys()
    for topology in topologies():
        own = yaml.safe_load((ROOT / f"launch/gke/topologies/{topology}.yaml").read_text())
        assert not shared & own.keys()
        assert set(own["jobs"]) <= TEMPLATES.keys()


@pytest.mark.parametrize(
    ("topology", "job", "changes", "message"),
    [
        ("v9-8", "stage1", (), "There is no --topology=v9-8. There are: 2xv5e-256, cpu, h100"),
        ("cpu", "stage1", (), "--topology=cpu has no --job=stage1. It has: caption, prepare_data"),
        ("cpu", "setup", ("spto=true",), "--set=spto=true changes nothing .* spot"),
        ("cpu", "setup", ("spot",), "--set=spot changes nothing"),
        ("cpu", "setup", ("data.stage9=x",), "--set=data.stage9=x changes nothing"),
        ("cpu", "setup", ("spot=maybe",), "--set=spot=maybe is no bool, such as spot=false"),
        ("cpu", "setup", ("max_restarts=[",), "is no int, such as max_restarts=10"),
        ("cpu", "setup", ("memory=lots",), "'lots' is no quantity, such as"),
        (
            "v5e-256",
            "stage1",
            ("images.tpu=lumina:latest",),
            "images.tpu='lumina:latest' must end in",
        ),
        ("v5e-256", "stage1", ("name=Lumina",), "name='Lumina' must be small letters"),
        ("v5e-256", "stage1", (f"name={'x' * 60}",), "may have 63 letters"),
        ("cpu", "prepare_data", ("compilation_cache.kind=nfs",), "must be of kind gcsfuse"),
        ("cpu", "prepare_data", ("compilation_cache.kind=pvc",), "kind pvc with a claim"),
        ("v5e-256", "stage1", ("capabilities=[SYS_RESOURCE]",), "do nothing for user 10001"),
        (
            "v5e-256",
            "stage1",
            ("capabilities=[SYS_RESOURCE]", "user=0"),
            "SYS_RESOURCE of .*=privileged",
        ),
        ("v5e-256", "setup", ("host_network=true",), "host_network of .* pod_security=privileged"),
        ("cpu", "setup", ("pod_security=none",), "'none' must be baseline or privileged"),
        ("cpu", "setup", ("bucket=gs://lumina",), "bucket='gs://lumina' must be the name alone"),
        ("cpu", "setup", ("bucket=ab",), "bucket='ab' must be"),
        ("cpu", "setup", ("namespace=My_Space",), "namespace='My_Space' must be small letters"),
        ("cpu", "setup", ("service_account=",), "service_account='' must be small letters"),
        (
            "cpu",
            "setup",
            ("data.stage1=gs://b/x",),
            r"data\.stage1='gs://b/x' must be a path below",
        ),
        ("cpu", "setup", ("runs=/runs",), "runs='/runs' must be a path below the bucket"),
        ("cpu", "setup", ("models=",), "models must not be empty"),
        ("cpu", "tensorboard", ("runs=a,b",), "runs='a,b' must have no comma"),
        ("v5e-256", "stage1", ("compilation_cache.path=a,b",), "path='a,b' must have no comma"),
        ("v5e-256", "stage1", ("max_restarts=-1",), "max_restarts=-1 must be at least 0"),
        ("cpu", "caption", ("caption.workers=0",), r"caption\.workers=0 must be at least 1"),
        ("h100", "caption", ("memory=4Gi",), "memory=4Gi leaves nothing to each of the 8 pods"),
        ("h100", "stage1", ("slices=2",), "slices=2 are of TPUs: of others set hosts"),
        ("v5e-256", "stage1", ("hosts=32",), "replica=8 data=32 must multiply to the 128 chips"),
        ("cpu", "caption", ("caption.servers=[]",), "caption.servers is empty"),
    ],
)
def test_bad_input_is_refused_in_words(topology, job, changes, message):
    with pytest.raises(InputError, match=message):
        render(job, load(topology, str(PROJECT), changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bucket: [", "cannot be read: while parsing"),
        ("- bucket", "has to be YAML of the form key: value"),
        ("buket: x", r"buket is not known \(did you mean bucket\?\)"),
        ("bucket: 3", "bucket=3 is no str, such as '<bucket>'"),
        ("data: {}", "data.stage1 is missing"),
    ],
)
def test_a_project_of_another_shape_is_refused_in_words(tmp_path, text, message):
    path = tmp_path / "project.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load("cpu", str(path))
    with pytest.raises(InputError, match=r"none\.yaml cannot be read"):
        load("cpu", str(tmp_path / "none.yaml"))


def test_all_faults_are_said_at_once():
    changes = ("bucket=gs://b", "max_restarts=-1", "models=a,b")
    with pytest.raises(InputError, match=r"(?s)bucket=.*models=.*max_restarts=-1"):
        render("setup", load("cpu", str(PROJECT), changes))


def test_setup_runs_no_command_to_add_flags_to():
    with pytest.raises(InputError, match="the job setup runs no command"):
        render("setup", load("cpu", str(PROJECT)), ["--x=1"])


def test_help_has_an_example():
    done = run("--help")
    assert "python tools/render_manifests.py --topology=v5e-256 --job=stage2" in done.stdout


if __name__ == "__main__":
    for name in topologies():
        (HERE / "golden" / f"{name}.yaml").write_text(golden(name))
        print(f"tests/launch/golden/{name}.yaml")
