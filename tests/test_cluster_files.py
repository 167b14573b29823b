"""The files in cluster/: each against its tool's own schema or linter, and against the package."""

import copy
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kuberay_schema import SCHEMAS, cluster_spec, pod_templates
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from qvpo_rllib.serving.app import AppArguments

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LAUNCHER = ["aws", "gcp", "local"]
KUBERAY = ["kuberay-cluster", "kuberay-job", "kuberay-service"]
SHELL = sorted(CLUSTER.glob("*.sh"))
PINS = {
    requirement.name: requirement
    for requirement in map(
        Requirement,
        re.findall(r"^[^#\s].*$", (CLUSTER / "constraints.txt").read_text(), re.MULTILINE),
    )
}


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def resources(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text()))


# --- Ray's cluster launcher ----------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_launcher_file_passes_rays_own_check(name: str) -> None:
    config = prepare_config(load(name))
    validate_config(config)
    workers = [t for n, t in config["available_node_types"].items() if n != "learner"]
    assert sum(t["max_workers"] for t in workers) >= 2


@pytest.mark.parametrize("name", LAUNCHER)
def test_rays_check_is_one(name: str) -> None:
    config = prepare_config(load(name))
    config["max_wokers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        validate_config(config)


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_launcher_file_copies_what_the_installation_needs_and_the_token(name: str) -> None:
    config = load(name)
    mounts = config["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    sources = [source for source in mounts.values() if not source.startswith("~")]
    assert all((ROOT / source).exists() for source in sources)
    assert {"pyproject.toml", PROJECT["readme"], "qvpo_rllib", "tune_configs"} < set(sources)
    assert "bash ~/qvpo_rllib/cluster/setup_node.sh" in config["setup_commands"]


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_is_started_with_the_token_and_its_dashboard_on_loopback(name: str) -> None:
    config = load(name)
    head = config["head_start_ray_commands"][-1]
    worker = config["worker_start_ray_commands"][-1]
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in head + worker


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_learner_has_a_gpu_and_only_rollout_nodes_are_spot(name: str) -> None:
    config = load(name)
    assert config["head_node_type"] == "learner"
    types = config["available_node_types"]
    assert types["learner"]["max_workers"] == 0
    assert types["rollout"]["min_workers"] == 0
    spot = {kind: "spot" in str(t["node_config"]).lower() for kind, t in types.items()}
    assert spot == {"learner": False, "rollout": True}


# --- KubeRay -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KUBERAY)
def test_a_kuberay_file_fits_the_definitions(name: str) -> None:
    for resource in resources(name):
        if resource["kind"] in SCHEMAS:
            jsonschema.validate(resource, SCHEMAS[resource["kind"]])
            for template in pod_templates(resource):
                check_pod(template)
        else:
            kubernetes_validate.validate(resource, "1.30", strict=True)


@pytest.mark.parametrize("name", KUBERAY)
def test_the_definitions_refuse_what_kubernetes_would(name: str) -> None:
    resource = resources(name)[-1]
    spec = cluster_spec(resource)
    spec["headGroupSpec"]["rayStartParams"]["num-cpus"] = 4
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(resource, SCHEMAS[resource["kind"]])
    template = copy.deepcopy(pod_templates(resource)[0])
    template["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        check_pod(template)


@pytest.mark.parametrize("name", KUBERAY)
def test_a_kuberay_cluster_asks_for_the_token_and_is_not_reachable_from_outside(name: str) -> None:
    spec = cluster_spec(resources(name)[-1])
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


@pytest.mark.parametrize("name", KUBERAY)
def test_a_policy_lets_nobody_into_the_pods_from_outside(name: str) -> None:
    [policy] = [r["spec"] for r in resources(name) if r["kind"] == "NetworkPolicy"]
    labels = policy["podSelector"]["matchLabels"]
    for template in pod_templates(resources(name)[-1]):
        assert template["metadata"]["labels"] == labels
    assert policy["policyTypes"] == ["Ingress"]
    peers = [peer for rule in policy["ingress"] for peer in rule["from"]]
    assert not [peer for peer in peers if "ipBlock" in peer]
    everywhere = [peer for peer in peers if "namespaceSelector" in peer]
    assert all(peer["podSelector"]["matchLabels"] for peer in everywhere)


def test_the_service_serves_this_packages_application() -> None:
    resource = resources("kuberay-service")[-1]
    config = ServeDeploySchema.model_validate(yaml.safe_load(resource["spec"]["serveConfigV2"]))
    [application] = config.applications
    assert application.import_path == "qvpo_rllib.serving.app:build"
    AppArguments.model_validate(application.args)


def check_pod(template: dict[str, Any]) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "PodTemplate",
        "metadata": {"name": "x"},
        "template": template,
    }
    kubernetes_validate.validate(pod, "1.30", strict=True)


# --- scripts and image ---------------------------------------------------------------------------


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_a_shell_script_passes_bash_and_shellcheck(script: Path) -> None:
    for command in (["bash", "-n"], [tool("shellcheck"), "--severity=info"]):
        result = run(*command, str(script))
        assert result.returncode == 0, result.stdout + result.stderr


def test_the_dockerfile_passes_hadolint() -> None:
    result = run(tool("hadolint"), str(CLUSTER / "Dockerfile"))
    assert result.returncode == 0, result.stdout


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


# --- versions ------------------------------------------------------------------------------------


def test_every_dependency_is_pinned_within_the_packages_range() -> None:
    optional = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *optional["cluster"], *optional["serve"]]
    needed += optional["optuna"]
    for requirement in map(Requirement, needed):
        pin = PINS[requirement.name.lower()]
        [specifier] = pin.specifier
        assert specifier.operator == "=="
        assert requirement.specifier.contains(specifier.version), f"{pin} is not in {requirement}"


def test_ray_has_one_version_everywhere() -> None:
    [pin] = PINS["ray"].specifier
    assert importlib.metadata.version("ray").split(".")[:2] == pin.version.split(".")[:2]
    for name in KUBERAY:
        assert cluster_spec(resources(name)[-1])["rayVersion"] == pin.version


def test_images_carry_the_packages_version() -> None:
    from qvpo_rllib.version import __version__

    for file in [CLUSTER / "Dockerfile", *(CLUSTER / f"{name}.yaml" for name in KUBERAY)]:
        tags = re.findall(r"qvpo_rllib:([\w.]+)", file.read_text())
        assert tags
        assert set(tags) == {__version__}
