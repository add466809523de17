"""launch/kubernetes/job.yaml: valid, and at one with itself and with the program."""

import re

import pytest

from gpt3jax import errors

import corpus

yaml = pytest.importorskip("yaml")
FILE = corpus.REPOSITORY / "launch" / "kubernetes" / "job.yaml"


@pytest.fixture(scope="module")
def documents():
    return {one["kind"]: one for one in yaml.safe_load_all(FILE.read_text())}


def containers(documents):
    pod = documents["Job"]["spec"]["template"]["spec"]
    return [*pod["initContainers"], *pod["containers"]]


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
    assert first["command"] == second["command"] and first["resources"] == second["resources"]
    assert variables(first) == variables(second) | {"COMMAND": "preflight"}


def test_the_containers_run_what_the_image_has(documents):
    for container in containers(documents):
        script, *_ = container["command"]
        config_file = variables(container)["CONFIG"]
        for path in (script, config_file):
            assert (corpus.REPOSITORY / path.removeprefix("/opt/gpt3jax/")).is_file()
    dockerfile = (corpus.REPOSITORY / "launch" / "Dockerfile").read_text()
    user = documents["Job"]["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert "WORKDIR /opt/gpt3jax" in dockerfile and f"USER {user}" in dockerfile


def test_the_failure_policy_follows_the_exit_statuses(documents):
    policy = documents["Job"]["spec"]["podFailurePolicy"]["rules"]
    by_status = {v: r["action"] for r in policy for v in r.get("onExitCodes", {}).get("values", [])}
    assert by_status == {errors.REFUSED: "FailJob", errors.REQUEUE: "Ignore"}
    (other,) = [rule for rule in policy if "onPodConditions" in rule]
    assert other["action"] == "Ignore"
    assert other["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert documents["Job"]["spec"]["template"]["spec"]["restartPolicy"] == "Never"


def test_the_script_makes_the_options_of_the_variables():
    """Without them each pod would train alone."""
    script = (corpus.REPOSITORY / "launch" / "train_gpt3_175b_distributed.sh").read_text()
    for name in ("NUM_NODES", "NODE_RANK", "MASTER_ADDR"):
        assert re.search(rf'"\$\{{?{name}\b', script)
