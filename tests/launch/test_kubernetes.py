"""The manifests in ``launch/k8s`` are what Kubernetes' own API allows, and fit together.

They are read by the models of its Python client, which are made from its OpenAPI schemas, with keys
that no schema has refused. No cluster is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from kubernetes.client import models

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "k8s"
ROLES = ("prefill", "decode", "cache")
MODELS = {
    ("v1", "ConfigMap"): models.V1ConfigMap,
    ("v1", "Service"): models.V1Service,
    ("apps/v1", "Deployment"): models.V1Deployment,
    ("apps/v1", "StatefulSet"): models.V1StatefulSet,
    ("policy/v1", "PodDisruptionBudget"): models.V1PodDisruptionBudget,
    ("networking.k8s.io/v1", "NetworkPolicy"): models.V1NetworkPolicy,
}

Object = dict[str, Any]


def listed() -> list[str]:
    made = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    assert made.keys() == {"apiVersion", "kind", "resources"}
    assert made["kind"] == "Kustomization"
    return list(made["resources"])


def objects() -> list[Object]:
    return [found for name in listed() for found in yaml.safe_load_all((FOLDER / name).read_text())]


def of_kind(*kinds: str) -> dict[str, Object]:
    return {o["metadata"]["name"]: o for o in objects() if o["kind"] in kinds}


def validate(found: Object) -> None:
    """ValidationError where Kubernetes would refuse it, or drop a key."""
    model = MODELS[found["apiVersion"], found["kind"]]
    read = model.model_validate(found, extra="forbid")
    # The models also take names_like_this, which Kubernetes does not.
    assert read.model_dump(by_alias=True, exclude_none=True) == found


def pods() -> dict[str, Object]:
    found = of_kind("Deployment", "StatefulSet")
    return {name: o["spec"]["template"] for name, o in found.items()}


def containers() -> Iterator[tuple[str, Object, Object]]:
    """Name, pod and its only container."""
    for name, pod in pods().items():
        (container,) = pod["spec"]["containers"]
        yield name, pod["spec"], container


def test_every_manifest_is_listed_and_valid() -> None:
    assert sorted(listed()) == sorted(
        f.name for f in FOLDER.iterdir() if f.name != "kustomization.yaml"
    )
    for found in objects():
        validate(found)
    names = [(o["kind"], o["metadata"]["name"]) for o in objects()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.replicas", "two"),
        ("spec.colour", 3),
        ("spec.template.spec.containers.0.readinessProbe.httpGet.port", None),
        ("spec.template.spec.containers.0.ports.0.container_port", 1),
        ("spec.selector", None),
    ],
)
def test_what_kubernetes_would_refuse_is_refused(path: str, value: object) -> None:
    found: Any = of_kind("Deployment")["moeserve-gateway"]
    *way, last = path.split(".")
    place = found
    for step in way:
        place = place[int(step)] if step.isdigit() else place[step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    with pytest.raises((pydantic.ValidationError, AssertionError)):
        validate(found)


def test_what_selects_selects_something() -> None:
    labels = [pod["metadata"]["labels"] for pod in pods().values()]

    def selected(selector: dict[str, str]) -> list[dict[str, str]]:
        return [found for found in labels if selector.items() <= found.items()]

    for service in of_kind("Service").values():
        assert len(selected(service["spec"]["selector"])) == 1
    for workload in of_kind("Deployment", "StatefulSet", "PodDisruptionBudget").values():
        assert len(selected(workload["spec"]["selector"]["matchLabels"])) == 1
    for policy in of_kind("NetworkPolicy").values():
        assert selected(policy["spec"]["podSelector"]["matchLabels"])


def test_every_role_has_pods_that_are_reached_by_name() -> None:
    for role in ROLES:
        name = f"moeserve-{role}"
        assert of_kind("Service")[name]["spec"]["clusterIP"] == "None"
        assert of_kind("StatefulSet")[name]["spec"]["serviceName"] == name
        (container,) = pods()[name]["spec"]["containers"]
        assert container["command"] == ["moeserve", "peer"]
        env = {e["name"]: e.get("value") for e in container["env"]}
        assert env["MOESERVE_ROLE"] == role
        assert env["MOESERVE_ADVERTISE"] == f"$(POD_NAME).{name}"
    (gateway,) = pods()["moeserve-gateway"]["spec"]["containers"]
    assert gateway["command"] == ["moeserve", "gateway"]


def test_disruptions_leave_someone_of_every_role() -> None:
    budgets = of_kind("PodDisruptionBudget")
    assert budgets.keys() == {f"moeserve-{role}" for role in (*ROLES, "gateway")}
    for budget in budgets.values():
        assert budget["spec"].get("maxUnavailable", budget["spec"].get("minAvailable")) == 1


def test_probes_ask_health_and_ready() -> None:
    for name, _, container in containers():
        if name == "moeserve-etcd":
            continue
        asked = {probe: str(container[probe]) for probe in container if probe.endswith("Probe")}
        assert "/ready" in asked["readinessProbe"]
        assert "/health" in asked["livenessProbe"]
        assert "startupProbe" in asked, "weights take a while to load"


def test_ports_and_volumes_that_are_named_are_there() -> None:
    ports = {name: {p["name"]: p for p in c["ports"]} for name, _, c in containers()}
    for _, pod, container in containers():
        mounted = [mount["name"] for mount in container["volumeMounts"]]
        assert sorted(mounted) == sorted(volume["name"] for volume in pod["volumes"])
        for probe in (value for key, value in container.items() if key.endswith("Probe")):
            if "httpGet" in probe:
                assert probe["httpGet"]["port"] in {p["name"] for p in container["ports"]}
    for name, service in of_kind("Service").items():
        pod_name = "moeserve-gateway" if name == "moeserve" else name
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            known = ports[pod_name]
            assert target in known or target in [p["containerPort"] for p in known.values()]


def test_variables_of_services_are_no_settings_and_draining_has_time() -> None:
    settings = of_kind("ConfigMap")["moeserve-cluster"]["data"]
    for name, pod, container in containers():
        assert pod["enableServiceLinks"] is False, "MOESERVE_GATEWAY_PORT would be a setting"
        if name != "moeserve-etcd":
            assert container["envFrom"] == [{"configMapRef": {"name": "moeserve-cluster"}}]
            grace = pod["terminationGracePeriodSeconds"]
            assert grace >= float(settings["MOESERVE_DRAIN_TIMEOUT_S"]) + 15


def test_secrets_are_those_that_the_document_tells_how_to_make() -> None:
    used = {
        volume["secret"]["secretName"]
        for _, pod, _ in containers()
        for volume in pod["volumes"]
        if "secret" in volume
    }
    document = (ROOT / "launch" / "README.md").read_text()
    assert used == set(re.findall(r"kubectl create secret \w+ (\S+)", document))


def test_pods_may_do_no_more_than_they_need() -> None:
    """As Kubernetes' own standard for restricted pods asks, and a root that cannot be written."""
    for _, pod, container in containers():
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] != 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"].keys() == {"memory"}
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert not container["image"].endswith(":latest")
