"""launch/kubernetes/job.yaml: valid, and at one with itself and with the program."""

import os
import re
import shutil
import subprocess

import pytest

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.distributed import launch, launchers

import corpus

yaml = pytest.importorskip("yaml")
FILE = corpus.REPOSITORY / "launch" / "kubernetes" / "job.yaml"


@pytest.fixture(scope="module")
def documents():
    return {one["kind"]: one for one in yaml.safe_load_all(FILE.read_text())}


def containers(documents):
    pod = documents["Job"]["spec"]["template"]["spec"]
    return [*pod["initContainers"], *pod["containers"]]


def script_of(container):
    return next(word for word in container["command"] if word.startswith("/opt/gpt3jax/"))


def variables(container):
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in container["env"]}


@pytest.mark.parametrize("version", ["1.29", "1.31", "1.34"])
def test_the_manifest_is_valid(documents, version):
    validator = pytest.importorskip("kubernetes_validate")  # 100 MB of schemas: in no extra
    assert set(documents) == {"Service", "Job"}
    for document in documents.values():
        validator.validate(document, version, strict=True)


def test_one_number_of_nodes_and_one_name_in_all_places(documents):
    job, service = documents["Job"]["spec"], documents["Service"]
    name = documents["Job"]["metadata"]["name"]
    pod = job["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert service["metadata"]["name"] == pod["subdomain"] == name
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    for container in containers(documents):
        told = variables(container)
        assert told["NUM_NODES"] == str(job["completions"]) == str(job["parallelism"])
        assert told["MASTER_ADDR"] == f"{name}-0.{name}"
        assert "job-completion-index" in told["NODE_RANK"]["fieldRef"]["fieldPath"]
    volumes = {one["name"] for one in pod["volumes"]}
    mounts = {
        one["name"] for container in containers(documents) for one in container["volumeMounts"]
    }
    assert mounts == volumes


def test_preflight_and_training_differ_in_their_command_alone(documents):
    first, second = containers(documents)
    for part in ("command", "resources", "securityContext", "volumeMounts"):
        assert first[part] == second[part]
    assert variables(first) == variables(second) | {"COMMAND": "preflight"}


def test_the_containers_run_what_the_image_has(documents):
    for container in containers(documents):
        script = script_of(container)
        config_file = variables(container)["CONFIG"]
        for path in (script, config_file):
            assert (corpus.REPOSITORY / path.removeprefix("/opt/gpt3jax/")).is_file()
    dockerfile = (corpus.REPOSITORY / "launch" / "Dockerfile").read_text()
    assert "WORKDIR /opt/gpt3jax" in dockerfile and "USER 1000" in dockerfile
    for container in containers(documents):
        assert "--reuid=1000" in container["command"]
        assert variables(container)["HOME"] == "/home/gpt3jax"
    assert "useradd --uid 1000 --create-home gpt3jax" in dockerfile


def test_the_failure_policy_follows_the_exit_statuses(documents):
    policy = documents["Job"]["spec"]["podFailurePolicy"]["rules"]
    by_status = {v: r["action"] for r in policy for v in r.get("onExitCodes", {}).get("values", [])}
    assert by_status == {errors.REFUSED: "FailJob", errors.REQUEUE: "Ignore"}
    (other,) = [rule for rule in policy if "onPodConditions" in rule]
    assert other["action"] == "Ignore"
    assert other["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert documents["Job"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_each_pod_starts_a_process_for_each_of_its_gpus(documents):
    """As the script would, given the pod's variables: 16 pods with 8 processes each."""
    job = documents["Job"]["spec"]
    for container in containers(documents):
        n_gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        ids, addresses = [], set()
        for index in range(job["completions"]):
            pod = variables(container) | {
                "NODE_RANK": str(index),
                "JOB_COMPLETION_INDEX": str(index),
            }
            places = launch.processes(pod)
            assert len(places) == n_gpus
            for i, place in enumerate(places):
                found = launchers.arguments(schema.Distributed(), pod | place)
                assert found["num_processes"] == n_gpus * job["completions"]
                assert found["local_device_ids"] == [i]
                ids.append(found["process_id"])
                addresses.add(found["coordinator_address"])
        assert ids == list(range(n_gpus * job["completions"]))
        (port,) = documents["Service"]["spec"]["ports"]
        assert addresses == {f"gpt3-0.gpt3:{port['port']}"}


@pytest.mark.skipif(
    not shutil.which("setpriv") or os.geteuid() != 0, reason="needs root, and Linux's setpriv"
)
def test_the_training_is_user_1000_and_may_lock_memory(documents):
    """The command of the containers, with the capabilities that they have."""
    for container in containers(documents):
        security, command = container["securityContext"], container["command"]
        added = [f"+{name.lower()}" for name in security["capabilities"]["add"]]
        assert security["capabilities"]["drop"] == ["ALL"] and security["runAsUser"] == 0
        outer = [
            "setpriv",
            "--no-new-privs",
            "--inh-caps=-all",
            f"--bounding-set=-all,{','.join(added)}",
        ]
        prefix = command[: command.index(script_of(container))]
        status = subprocess.run(
            [*outer, *prefix, "cat", "/proc/self/status"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert re.search(r"^Uid:\s+1000\s+1000\s", status, re.MULTILINE)
        assert re.search(r"^Gid:\s+1000\s+1000\s", status, re.MULTILINE)
        (effective,) = re.findall(r"^CapEff:\s+(\w+)$", status, re.MULTILINE)
        assert int(effective, 16) == 1 << 14  # IPC_LOCK alone
