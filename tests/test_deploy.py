"""Guarantees of deploy/: known fields, no root, nothing open, secrets by reference, one Ray version."""

import copy
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from wml_ray.config.load import load_config

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
TRAINING = ["kuberay/rayjob.yaml", "kuberay/raycluster.yaml"]
KUBERAY = [*TRAINING, "kuberay/rayservice.yaml"]
KUBERNETES = [*KUBERAY, "mlflow.yaml"]
CLOUDS = ["aws.yaml", "gcp.yaml"]
SECRET = re.compile(r"TOKEN|PASSWORD|KEY|SECRET|CREDENTIAL", re.IGNORECASE)
HOST = re.compile(r"\b[a-z0-9-]+(?:\.[a-z0-9-]+)*\.(?:com|org|io|net|dev|ai|co|cloud|internal|local|sh)\b")
HOSTS = {  # allowed in the files; no registry and no package index is among them
    *("ray.io", "networking.k8s.io", "nvidia.com"),  # API groups and a resource
    *("mlflow.internal", "www.googleapis.com", "my-project.iam.gserviceaccount.com"),
}


def documents(name):
    return [document for document in yaml.safe_load_all((DEPLOY / name).read_text()) if document]


def document(name):
    (only,) = documents(name)
    return only


def ray_cluster(name):
    spec = document(name)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig", spec)


def walk(node):
    """Every mapping and list in a document, outermost first."""
    yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        if isinstance(inner, (dict, list)):
            yield from walk(inner)


def mappings(name):
    return [node for each in documents(name) for node in walk(each) if isinstance(node, dict)]


def pods(name):
    """Every pod spec of a file."""
    return [node for node in mappings(name) if "containers" in node]


def containers(name):
    return [
        container for pod in pods(name) for kind in ("initContainers", "containers") for container in pod.get(kind, [])
    ]


def locked(package, lock=ROOT / "requirements.lock"):
    (version,) = re.findall(rf"^{re.escape(package)}==([^ ;\\]+)", lock.read_text(), flags=re.MULTILINE)
    return version


# Field names. Those of KubeRay are from ray-operator/apis/ray/v1, version 1.6; of Kubernetes only what is in use here.


def fields(*leaves, **parts):
    return dict.fromkeys(leaves) | parts


SECURITY = fields("allowPrivilegeEscalation", "readOnlyRootFilesystem", capabilities=fields("add", "drop"))
VALUE_FROM = fields(secretKeyRef=fields("name", "key", "optional"), configMapKeyRef=fields("name", "key", "optional"))
CONTAINER = fields(
    *("name", "image", "imagePullPolicy", "command", "args"),
    securityContext=SECURITY,
    env=fields("name", "value", valueFrom=VALUE_FROM),
    ports=fields("name", "containerPort", "protocol"),
    readinessProbe=fields("periodSeconds", exec=fields("command"), httpGet=fields("path", "port")),
    resources=fields("requests", "limits"),
    volumeMounts=fields("name", "mountPath", "readOnly", "subPath"),
)
VOLUME = fields(
    "name",
    emptyDir=fields("medium", "sizeLimit"),
    persistentVolumeClaim=fields("claimName", "readOnly"),
    configMap=fields("name", "items"),
)
POD = fields(
    *("automountServiceAccountToken", "enableServiceLinks", "nodeSelector", "serviceAccountName"),
    "terminationGracePeriodSeconds",
    securityContext=fields(
        *("runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup"), seccompProfile=fields("type", "localhostProfile")
    ),
    tolerations=fields("key", "operator", "value", "effect", "tolerationSeconds"),
    initContainers=CONTAINER,
    containers=CONTAINER,
    volumes=VOLUME,
)
METADATA = fields("name", "namespace", "labels", "annotations")
TEMPLATE = fields(metadata=METADATA, spec=POD)
GROUP = fields("rayStartParams", "resources", "labels", template=TEMPLATE)
RAY_CLUSTER = fields(
    *("rayVersion", "enableInTreeAutoscaling", "suspend", "managedBy", "headServiceAnnotations"),
    authOptions=fields("mode", "secretName", "enableK8sTokenAuth"),
    autoscalerOptions=fields(
        *("version", "idleTimeoutSeconds", "upscalingMode", "image", "imagePullPolicy", "resources", "env", "envFrom"),
        *("volumeMounts", "command", "args"),
        securityContext=SECURITY,
    ),
    headGroupSpec=GROUP | fields("serviceType", "headService", "enableIngress"),
    workerGroupSpecs=GROUP
    | fields("groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds"),
)
SELECTOR = fields("matchLabels")
KINDS = {
    "RayCluster": RAY_CLUSTER,
    "RayJob": fields(
        *("entrypoint", "runtimeEnvYAML", "jobId", "metadata", "submissionMode", "submitterPodTemplate", "suspend"),
        *("shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit", "managedBy"),
        *("entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "clusterSelector", "submitterConfig"),
        rayClusterSpec=RAY_CLUSTER,
    ),
    "RayService": fields(
        *("serveConfigV2", "serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold", "suspend"),
        *("serveService", "upgradeStrategy", "excludeHeadPodFromServeSvc", "rayClusterDeletionDelaySeconds"),
        rayClusterConfig=RAY_CLUSTER,
    ),
    "Service": fields("type", "clusterIP", "selector", ports=fields("name", "port", "targetPort")),
    "Deployment": fields("replicas", selector=SELECTOR, strategy=fields("type"), template=TEMPLATE),
    "StatefulSet": fields(
        *("serviceName", "replicas"),
        selector=SELECTOR,
        template=TEMPLATE,
        volumeClaimTemplates=fields(
            metadata=METADATA,
            spec=fields("accessModes", "storageClassName", resources=fields("requests")),
        ),
    ),
    "NetworkPolicy": fields(
        "policyTypes",
        podSelector=SELECTOR,
        ingress=fields(ports=fields("port", "protocol"), **{"from": fields(podSelector=SELECTOR)}),
    ),
}
VERSIONS = {
    **dict.fromkeys(("RayCluster", "RayJob", "RayService"), "ray.io/v1"),
    **dict.fromkeys(("Service", "ConfigMap"), "v1"),
    **dict.fromkeys(("Deployment", "StatefulSet"), "apps/v1"),
    "NetworkPolicy": "networking.k8s.io/v1",
}


def unknown_fields(node, known, path):
    """Paths of unknown fields. Lists are checked item by item; a field that is known as None may have any value."""
    if isinstance(node, list):
        return [found for item in node for found in unknown_fields(item, known, path)]
    if known is None or not isinstance(node, dict):
        return []
    found = [f"{path}.{name}" for name in node if name not in known]
    return found + [
        inner for name in node if name in known for inner in unknown_fields(node[name], known[name], f"{path}.{name}")
    ]


@pytest.mark.parametrize("name", KUBERNETES)
def test_manifests_have_known_fields_only(name):
    for each in documents(name):
        kind = each["kind"]
        assert each["apiVersion"] == VERSIONS[kind]
        known = fields("apiVersion", "kind", metadata=METADATA)
        known |= fields("data") if kind == "ConfigMap" else fields(spec=KINDS[kind])
        assert unknown_fields(each, known, kind) == []


@pytest.mark.parametrize("name", CLOUDS)
def test_cluster_files_pass_rays_own_schema(name):
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(document(name)))
    validate_config(prepared)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepared | {"idle_timeout": 5})


# no root


@pytest.mark.parametrize("name", KUBERNETES)
def test_no_container_runs_as_root_or_can_become_root(name):
    assert containers(name)
    for pod in pods(name):
        user = pod["securityContext"]
        assert user["runAsNonRoot"] is True
        assert user["runAsUser"] > 0
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    contexts = [container["securityContext"] for container in containers(name)]
    contexts += [node["autoscalerOptions"]["securityContext"] for node in mappings(name) if "autoscalerOptions" in node]
    for context in contexts:
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert not context.keys() & {"privileged", "runAsUser", "runAsNonRoot", "seccompProfile"}


@pytest.mark.parametrize("name", CLOUDS)
def test_containers_of_the_cluster_launcher_cannot_gain_privileges(name):
    docker = document(name)["docker"]
    options = [option for key in docker if key.endswith("run_options") for option in docker[key]]
    assert "--security-opt=no-new-privileges" in options
    assert not [option for option in options if re.match(r"(--user|-u|--privileged|--cap-add|-v|--volume)", option)]
    assert "sudo" not in "".join(line.partition("#")[0] for line in (DEPLOY / name).read_text().splitlines())


def dockerfile_stages():
    """Instructions of each stage, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    stages = {}
    for instruction, rest in lines:
        if instruction == "FROM":
            image, _, stage = rest.split()
            stages[stage] = [("FROM", image)]
        else:
            stages[stage].append((instruction, rest))
    return stages


def test_the_images_run_as_the_user_the_manifests_name():
    for stage in ("mlflow", "wml-ray"):
        users = [rest for instruction, rest in dockerfile_stages()[stage] if instruction == "USER"]
        assert users == ["1000:1000"]
    assert {pod["securityContext"]["runAsUser"] for name in KUBERAY for pod in pods(name)} == {1000}


def test_the_images_install_by_hash():
    installs = [
        command
        for instructions in dockerfile_stages().values()
        for instruction, rest in instructions
        for command in re.split(r"&&|;", rest)
        if instruction == "RUN" and "pip" in command
    ]
    assert len(installs) == 3
    for command in installs:
        words = shlex.split(command)
        assert words[:2] == ["pip", "install"]
        assert "--require-hashes" in words or words[2:] == ["--no-deps", "--no-build-isolation", "."]
    for lock in (ROOT / "requirements.lock", DEPLOY / "mlflow.lock", DEPLOY / "wml-ray.lock"):
        pins, hashes = (
            re.findall(pattern, lock.read_text(), re.M) for pattern in (r"^\S+==", r"\\\n    --hash=sha256:")
        )
        assert len(pins) <= len(hashes)


def packages(lock):
    """Names and versions in a lock file; a version may depend on that of Python."""
    pins = re.findall(r"^([\w.-]+)(?:\[\w+\])?==([^\s;]+)", lock.read_text(), re.M)
    return {name: {version for other, version in pins if other == name} for name, _ in pins}


def test_the_training_image_has_the_locked_versions_no_tool_of_the_developers_and_the_clients_of_the_manifests():
    image, everything = packages(DEPLOY / "wml-ray.lock"), packages(ROOT / "requirements.lock")
    assert not image.keys() & {"pytest", "hypothesis", "ruff", "mypy", "moto", "playwright", "uv"}
    assert [name for name, versions in image.items() if not versions <= everything.get(name, versions)] == []
    clients = {"s3": "s3fs", "gs": "gcsfs"}
    texts = "".join((DEPLOY / name).read_text() for name in [*KUBERNETES, *CLOUDS])
    used = set(re.findall(r"run.storage_path=(\w+)://", texts))
    assert used == set(clients)
    assert {clients[protocol] for protocol in used} <= image.keys()


def test_the_licence_of_every_package_of_the_training_image_is_listed():
    listed = re.findall(r"^\| ([\w.-]+) \| .*\w.* \|$", (ROOT / "docs" / "licences.md").read_text(), re.M)
    assert sorted(packages(DEPLOY / "wml-ray.lock")) == sorted(set(listed) - {"package"})


def test_the_images_contain_exactly_the_files_sent_to_the_builder():
    sent = [line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    copied = [
        source
        for instructions in dockerfile_stages().values()
        for instruction, rest in instructions
        if instruction in ("COPY", "ADD")
        for source in rest.split()[:-1]
    ]
    assert sorted(copied) == sorted(sent)
    assert all((ROOT / source).exists() for source in copied)


# nothing open


@pytest.mark.parametrize("name", KUBERNETES)
def test_no_service_is_reachable_from_outside_the_cluster(name):
    for node in mappings(name):
        assert node.get("type") not in ("LoadBalancer", "NodePort", "ExternalName")
        assert node.get("serviceType", "ClusterIP") == "ClusterIP"
        assert not node.keys() & {
            "hostNetwork",
            "hostPort",
            "hostPID",
            "hostIPC",
            "nodePort",
            "externalIPs",
            "hostPath",
        }
        assert not node.get("enableIngress")
        assert node.get("kind") != "Ingress"


@pytest.mark.parametrize("name", KUBERAY)
def test_the_head_has_a_service_inside_the_cluster_and_a_token(name):
    cluster = ray_cluster(name)
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["authOptions"]["secretName"]


@pytest.mark.parametrize("name", CLOUDS)
def test_the_launched_dashboard_listens_on_loopback_behind_a_token(name):
    config = document(name)
    (start,) = (command for command in config["head_start_ray_commands"] if "--head" in command)
    assert re.findall(r"--dashboard-host[= ](\S+)", start) == ["127.0.0.1"]
    assert "--node-ip-address" not in start
    options = config["docker"]["run_options"]
    assert "--env=RAY_AUTH_MODE=token" in options
    (path,) = (option.split("=")[-1] for option in options if option.startswith("--env=RAY_AUTH_TOKEN_PATH="))
    assert config["file_mounts"][path] == "~/.ray/auth_token"
    assert not [option for option in options if re.match(r"(-p|--publish)\b", option)]
    assert "security_group" not in config["provider"]
    assert not [node for node in walk(config) if isinstance(node, dict) and "SecurityGroupIds" in node]


def test_mlflow_requires_a_login_and_only_it_reaches_its_database():
    (server,) = (container for container in containers("mlflow.yaml") if container["name"] == "mlflow")
    assert "--app-name=basic-auth" in server["args"]
    policies = {
        each["metadata"]["name"]: each["spec"] for each in documents("mlflow.yaml") if each["kind"] == "NetworkPolicy"
    }
    services = {
        each["metadata"]["name"]: each["spec"] for each in documents("mlflow.yaml") if each["kind"] == "Service"
    }
    assert policies.keys() == services.keys() == {"mlflow", "mlflow-db"}
    for name, policy in policies.items():
        assert policy["podSelector"]["matchLabels"] == services[name]["selector"]
    (rule,) = policies["mlflow-db"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app": "mlflow"}}}]


# secrets


@pytest.mark.parametrize("name", KUBERNETES)
def test_secrets_are_given_by_reference(name):
    assert "Secret" not in {each["kind"] for each in documents(name)}
    variables = [variable for node in mappings(name) for variable in node.get("env", [])]
    assert len(variables) > 5
    for variable in variables:
        if SECRET.search(variable["name"]):
            assert variable.keys() == {"name", "valueFrom"}
            assert set(variable["valueFrom"]) == {"secretKeyRef"}
        else:
            assert "@" not in re.sub(r"//\w+@", "//", variable.get("value", "")), "a password in an address"


@pytest.mark.parametrize("path", [*KUBERNETES, *CLOUDS, "Dockerfile"])
def test_no_file_contains_a_secret(path):
    text = (DEPLOY / path).read_text()
    assert [word for word in re.findall(r"[A-Za-z0-9+=]{20,}", text) if re.search(r"\d", word)] == []
    assert not re.search(r"PRIVATE KEY|AKIA|--from-literal=(?!username=)", text)
    settings = re.findall(r"^(?:ENV|ARG)\s+(.*)", text, flags=re.MULTILINE)
    assert not SECRET.search(" ".join(settings))


@pytest.mark.parametrize("name", CLOUDS)
def test_the_launcher_passes_no_secret_on_a_command_line(name):
    for option in document(name)["docker"]["run_options"]:
        variable = re.match(r"--env=(\w+)", option)
        assert not variable or variable[1].endswith("_PATH") or not SECRET.search(variable[1])


# versions, names, files


def images(name):
    if name in CLOUDS:
        return [value for key, value in document(name)["docker"].items() if key.endswith("image")]
    return [container["image"] for container in containers(name)]


@pytest.mark.parametrize("name", [*KUBERNETES, *CLOUDS])
def test_images_are_pinned_and_have_the_locked_versions(name):
    assert images(name)
    versions = {
        "wml-ray": f"ray{locked('ray')}",
        "rayproject/ray": f"{locked('ray')}-py311-?pu",
        "wml-ray-mlflow": locked("mlflow"),
        "postgres": "[0-9]*.[0-9]*",
    }
    for image in images(name):
        repository, _, tag = image.partition(":")
        assert fnmatch(tag, versions[repository]), image


def test_one_ray_one_python_one_mlflow():
    assert {ray_cluster(name)["rayVersion"] for name in KUBERAY} == {locked("ray")}
    assert dockerfile_stages()["base"][0] == ("FROM", "python:3.11-slim")
    for package in ("mlflow", "psycopg"):
        assert locked(package, DEPLOY / "mlflow.lock") == locked(package)
    tags = re.findall(r"-t (\S+)", (DEPLOY / "Dockerfile").read_text())
    assert sorted(tags) == sorted({*images("kuberay/rayjob.yaml"), f"wml-ray-mlflow:{locked('mlflow')}"})


@pytest.mark.parametrize("name", TRAINING)
def test_gpu_workers_scale_from_zero_and_idle_ones_are_removed(name):
    cluster = ray_cluster(name)
    assert cluster["enableInTreeAutoscaling"] is True
    assert 0 < cluster["autoscalerOptions"]["idleTimeoutSeconds"] <= 600
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
    (worker,) = group["template"]["spec"]["containers"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize("name", CLOUDS)
def test_launched_gpu_workers_are_spot_and_scale_from_zero(name):
    config = document(name)
    node_types = config["available_node_types"]
    head = node_types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    (workers,) = node_types.values()
    assert workers["min_workers"] == 0 < workers["max_workers"] <= config["max_workers"]
    assert config["idle_timeout_minutes"] <= 10
    spot = {"aws": ("InstanceMarketOptions", {"MarketType": "spot"}), "gcp": ("preemptible", True)}
    key, value = spot[config["provider"]["type"]]
    assert [node[key] for node in walk(workers) if isinstance(node, dict) and key in node] == [value]
    assert not [node for node in walk(head) if isinstance(node, dict) and key in node]


def test_the_cluster_of_a_job_is_deleted_after_it_and_its_entrypoint_is_valid():
    spec = document("kuberay/rayjob.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    program, verb, config, *overrides = shlex.split(spec["entrypoint"])
    assert (program, verb) == ("wml-ray", "train")
    parsed = load_config(ROOT / config, overrides)
    (group,) = ray_cluster("kuberay/rayjob.yaml")["workerGroupSpecs"]
    assert parsed.scale.workers == [1, group["maxReplicas"]]
    assert parsed.scale.gpu is True
    assert "'" not in spec["entrypoint"], "an override with a space in it: other submission modes would split it"
    (head,) = ray_cluster("kuberay/rayjob.yaml")["headGroupSpec"]["template"]["spec"]["containers"]
    assert set(re.findall(r"\$(\w+)", spec["entrypoint"])) <= {variable["name"] for variable in head["env"]}
    assert parsed.data.root in {mount["mountPath"] for mount in head["volumeMounts"]}


@pytest.mark.parametrize("name", KUBERAY)
def test_every_mount_has_a_volume_and_workers_have_the_environment_of_the_head(name):
    for pod in pods(name):
        (container,) = pod["containers"]
        mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
        assert mounted == {volume["name"] for volume in pod.get("volumes", ())}
    head, worker = containers(name)
    assert head["env"] == worker["env"]
    needed = {"MLFLOW_TRACKING_URI", "AWS_ACCESS_KEY_ID"} if name in TRAINING else {"AWS_ACCESS_KEY_ID"}
    assert needed <= {variable["name"] for variable in head["env"]}
    assert head["image"] == worker["image"]


@pytest.mark.parametrize("path", [*KUBERNETES, *CLOUDS, "Dockerfile"])
def test_every_file_that_is_named_exists(path):
    text = (DEPLOY / path).read_text()
    named = re.findall(r"(?<![\w/])(?:jobs|deploy|tune_spaces)/[\w/.-]*\w", text)
    assert named
    assert [file for file in named if not (ROOT / file).exists()] == []


@pytest.mark.parametrize(
    "path", [*KUBERNETES, *CLOUDS, "Dockerfile", "Dockerfile.dockerignore", "mlflow.lock", "wml-ray.lock"]
)
def test_no_registry_and_no_package_index_is_named(path):
    text = (DEPLOY / path).read_text()
    assert set(HOST.findall(text)) <= HOSTS
    assert not re.search(r"index-url|--find-links", text)
    places = re.findall(r"^\s*(?:FROM\s|\w*image:)\s*(\S+)", text, flags=re.MULTILINE)
    assert not [image for image in places if re.search(r"[.:]", image.rpartition("/")[0])]
