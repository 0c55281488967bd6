"""The commands for xpk, and its own manifests beside ours.

Some tests ask xpk itself, in an environment of its own: `make test-xpk`.
"""

import os
import pathlib
import shlex
import subprocess

import pytest
import yaml

from lumina_jax.errors import InputError
from tests.launch import test_manifests as ours
from tools.render_manifests import load, xpk

ROOT = pathlib.Path(__file__).parents[2]
XPK = ROOT / ".venv-xpk/bin/xpk"
JOBS = [
    (topology, job)
    for topology, job in ours.MANIFESTS
    if load(topology, str(ours.PROJECT))["xpk_type"] and job != "setup"
]
SHAPES = ("stage1", "sample")  # other stages differ from the first in their flags alone
every_job = pytest.mark.parametrize(("topology", "job"), JOBS)
needs_xpk = pytest.mark.skipif(not XPK.exists(), reason="no xpk here: make test-xpk")


def words_of(topology, job, *arguments):
    text = xpk(job, load(topology, str(ours.PROJECT)), arguments)
    (command,) = text.split("set -euo pipefail\n")[1:]
    return shlex.split(command.replace("\\\n", " "))


@every_job
def test_the_command_is_that_of_the_manifest(topology, job):
    words = dict(word.split("=", 1) for word in words_of(topology, job)[3:])
    assert shlex.split(words["--command"]) == ["exec", *ours.command_of(topology, job)]
    assert words["--docker-image"] == ours.container_of(topology, job)["image"]


def test_an_added_flag_is_one_word_for_the_program_too():
    command = words_of("v5e-256", "sample", "--prompt=a red fox; it's $HOME")[-1]
    assert shlex.split(command.partition("=")[2])[-1] == "--prompt=a red fox; it's $HOME"


def test_the_script_is_sound_and_says_what_has_to_be_done_before(tmp_path):
    script = tmp_path / "stage1.sh"
    script.write_text(xpk("stage1", load("v5p-128", str(ours.PROJECT))))
    assert "#   xpk storage attach models \\\n#     --cluster=" in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = pathlib.Path(os.sys.executable).with_name("shellcheck")
    subprocess.run([shellcheck, script], check=True)


@pytest.mark.parametrize(("topology", "job"), [("h100", "stage1"), ("cpu", "caption")])
def test_what_xpk_is_not_for_is_refused(topology, job):
    with pytest.raises(InputError, match=f"not for --job={job} on --topology={topology}"):
        xpk(job, load(topology, str(ours.PROJECT)))


def test_a_cluster_that_is_not_filled_in_is_refused():
    with pytest.raises(InputError, match=r"xpk\.cluster = <xpk-cluster>"):
        xpk("stage1", load("v5e-256", "launch/gke/project.yaml"))


def dry_run(topology, job, tmp_path):
    """The JobSet that xpk makes of our command; it reaches nothing and creates nothing."""
    path = tmp_path / "jobset.yaml"
    xpk_, *words = words_of(topology, job)
    assert xpk_ == "xpk"
    done = subprocess.run(
        [XPK, *words, "--dry-run", "--skip-validation", f"--output-manifest-file={path}"],
        env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return yaml.safe_load(path.read_text())


def parts(jobset):
    """JobSet, job, pod and container, by the names of their sections."""
    (group,) = jobset["spec"]["replicatedJobs"]
    pod = group["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return group, group["template"]["spec"], pod, container


@needs_xpk
@pytest.mark.parametrize(("topology", "job"), [pair for pair in JOBS if pair[1] in SHAPES])
def test_our_jobset_and_that_of_xpk_differ_in_nothing_but_what_is_meant(topology, job, tmp_path):
    theirs, mine = dry_run(topology, job, tmp_path), ours.object_of("JobSet", topology, job)
    placement = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    for found in (theirs, mine):
        assert found["metadata"]["annotations"][placement] == "cloud.google.com/gke-nodepool"
    assert theirs["metadata"]["name"] == mine["metadata"]["name"]
    (group, job_spec, pod, container), (group_, job_spec_, pod_, container_) = map(
        parts, (theirs, mine)
    )
    assert group["replicas"] == group_["replicas"]
    for key in ("parallelism", "completions", "backoffLimit"):
        assert job_spec[key] == job_spec_[key], key
    for key in ("restartPolicy", "nodeSelector", "terminationGracePeriodSeconds"):
        assert pod[key] == pod_[key], key
    assert container["image"] == container_["image"]
    assert container["resources"]["limits"] == container_["resources"]["limits"]
    tolerated = [(t["key"], t["operator"]) for t in pod["tolerations"]]
    assert tolerated == [(t["key"], t["operator"]) for t in pod_["tolerations"]]
    for spec, one in ((pod, container), (pod_, container_)):
        where = {m["mountPath"]: m["name"] for m in one["volumeMounts"]}["/dev/shm"]
        (volume,) = (v for v in spec["volumes"] if v["name"] == where)
        assert volume["emptyDir"]["medium"] == "Memory"
    # What is meant: ours needs neither privileges nor the network of the host, and tells a
    # preemption from a fault; of xpk a status of the user's (2) ends the run too.
    assert container["securityContext"] == {"privileged": True}
    assert container_["securityContext"]["privileged"] is False
    assert pod["hostNetwork"] is True
    assert "hostNetwork" not in pod_
    (rule,) = job_spec["podFailurePolicy"]["rules"]
    ends = rule["onExitCodes"]
    assert (rule["action"], ends["operator"]) == ("FailJob", "NotIn")
    assert {1, 75, 134, 137, 139, 143} <= set(ends["values"])
    assert 2 not in ends["values"]


@needs_xpk
def test_xpk_makes_other_hosts_of_another_type(tmp_path):
    words = {t: parts(dry_run(t, "stage1", tmp_path))[1] for t in ("v5e-256", "v5p-128")}
    assert (words["v5e-256"]["parallelism"], words["v5p-128"]["parallelism"]) == (64, 16)
