"""The Kubernetes objects: valid, safe, and named as the pipeline names them."""

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import all_versions, major_minor
from packaging.version import Version

from braintumor.params import load_params
from pipelines import retraining

ROOT = Path(__file__).parents[2]
TOOLS = Path(sys.prefix) / "security" / "bin"
NAMESPACES = {"local": "kubeflow", "production": "braintumor"}
RELEASES = sorted({major_minor(version) for version in all_versions()}, key=Version)[-3:]
CLUSTER_WIDE = {"Namespace", "PriorityClass"}

overlays = pytest.mark.parametrize("overlay", NAMESPACES)


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A run of a tool that has an environment of its own."""
    path = TOOLS / name
    assert path.is_file(), f"{path} is missing; run 'make security'"
    return subprocess.run([path, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@cache
def rendered(overlay: str) -> str:
    """What `kubectl apply --kustomize` would send."""
    done = tool("kubectl", "kustomize", ROOT / "k8s/overlays" / overlay)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(overlay: str, kind: str | None = None) -> list[dict[str, Any]]:
    found = list(yaml.safe_load_all(rendered(overlay)))
    return [one for one in found if kind in (None, one["kind"])]


def the(overlay: str, kind: str) -> dict[str, Any]:
    (found,) = objects(overlay, kind)
    return found


@overlays
@pytest.mark.parametrize("release", RELEASES)
def test_every_object_is_valid_in_the_last_three_releases(overlay: str, release: str) -> None:
    assert len(objects(overlay)) > 5
    for one in objects(overlay):
        assert kubernetes_validate.validate(one, release, strict=True) == release


def test_a_misspelt_field_would_be_found() -> None:
    claim = the("local", "PersistentVolumeClaim")
    claim["spec"]["accessMode"] = claim["spec"].pop("accessModes")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(claim, RELEASES[-1], strict=True)


def test_security_lint_finds_nothing_but_the_job_that_was_broken_for_it(tmp_path: Path) -> None:
    for overlay in NAMESPACES:
        (tmp_path / f"{overlay}.yaml").write_text(rendered(overlay))
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    broken = the("production", "Job")
    broken["metadata"]["name"] = "broken"
    broken["spec"]["template"]["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(broken))
    done = tool("checkov", "--config-file", ROOT / ".checkov.yaml", "--directory", tmp_path, "--output", "json")
    reports = {report["check_type"]: report for report in json.loads(done.stdout)}
    found = {
        kind: [(check["check_id"], check["resource"]) for check in report["results"]["failed_checks"]]
        for kind, report in reports.items()
    }
    assert found == {"kubernetes": [("CKV_K8S_20", "Job.braintumor.broken")], "dockerfile": []}
    for report in reports.values():
        assert report["summary"]["parsing_errors"] == 0
        assert report["summary"]["passed"] > 100


@overlays
def test_everything_is_in_the_namespace_of_its_cluster(overlay: str) -> None:
    for one in objects(overlay):
        expected = None if one["kind"] in CLUSTER_WIDE else NAMESPACES[overlay]
        assert one["metadata"].get("namespace") == expected, one["kind"]
        assert one["metadata"]["labels"]["app.kubernetes.io/name"] == "braintumor"
    (subject,) = the(overlay, "RoleBinding")["subjects"]
    assert subject["namespace"] == NAMESPACES[overlay]


@overlays
@pytest.mark.parametrize("profile", sorted(path.stem for path in (ROOT / "params").glob("*.yaml")))
def test_names_are_those_of_the_pipeline(overlay: str, profile: str) -> None:
    cluster = load_params(ROOT / "params" / f"{profile}.yaml").cluster
    assert the(overlay, "ServiceAccount")["metadata"]["name"] == cluster.service_account
    assert the(overlay, "ConfigMap")["metadata"]["name"] == cluster.addresses
    assert the(overlay, "PersistentVolumeClaim")["metadata"]["name"] == cluster.cache_claim
    assert the(overlay, "Job")["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == cluster.run_as_user
    assert f"`{cluster.credentials}`" in (ROOT / "k8s/base/kustomization.yaml").read_text()


@overlays
def test_addresses_are_those_that_the_tasks_read_and_hold_no_keys(overlay: str) -> None:
    addresses = the(overlay, "ConfigMap")["data"]
    needed = {*retraining.MLFLOW_ADDRESSES, *retraining.DATA_ADDRESSES}
    assert needed <= set(addresses) <= needed | set(retraining.OPTIONAL_SETTINGS)
    assert addresses["BRAINTUMOR_CACHE"] == retraining.CACHE
    assert all(addresses.values())
    assert not any("@" in address for address in addresses.values())


@overlays
def test_no_secret_is_made_and_the_keys_that_a_person_must_give_are_named(overlay: str) -> None:
    assert objects(overlay, "Secret") == []
    comment = (ROOT / "k8s/base/kustomization.yaml").read_text()
    for key in (*retraining.MLFLOW_KEYS, *retraining.S3_KEYS, *retraining.WEBHOOK):
        assert key in comment


@overlays
def test_the_service_account_has_no_right_outside_its_namespace_and_none_that_makes_pods(overlay: str) -> None:
    assert objects(overlay, "ClusterRole") == objects(overlay, "ClusterRoleBinding") == []
    rights = {
        (group, resource, verb): rule.get("resourceNames")
        for rule in the(overlay, "Role")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert not any("*" in part for right in rights for part in right)
    assert {right: names for right, names in rights.items() if right[1] in ("secrets", "configmaps")} == {
        ("", "secrets", "get"): ["mlpipeline-minio-artifact"],
        ("", "configmaps", "get"): ["kfp-launcher"],
    }
    assert {verb for _, resource, verb in rights if resource == "pods"} == {"get", "list"}
    assert {resource for _, resource, verb in rights if verb not in ("get", "list", "watch")} == {
        "workflowtaskresults", "workflowtasksets/status"
    }  # fmt: skip


def test_nothing_leaves_or_enters_the_production_namespace_but_to_named_ports() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in objects("production", "NetworkPolicy")}
    assert policies.pop("deny-all") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in policies.values():
        assert policy["policyTypes"] == ["Egress"]
        for rule in policy["egress"]:
            assert rule["to"]
            assert rule["ports"]
            for peer in rule["to"]:
                assert "namespaceSelector" in peer or "169.254.169.254/32" in peer["ipBlock"]["except"]
    allowed = {port["port"] for policy in policies.values() for rule in policy["egress"] for port in rule["ports"]}
    mlflow = re.search(r":(\d+)$", the("production", "ConfigMap")["data"]["MLFLOW_TRACKING_URI"])
    assert mlflow
    assert int(mlflow[1]) in allowed


def test_production_namespace_admits_restricted_pods_alone_and_bounds_them() -> None:
    labels = the("production", "Namespace")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert the("production", "ResourceQuota")["spec"]["hard"]["requests.nvidia.com/gpu"] == "1"
    # Argo's own containers name no resources, and a quota refuses such pods.
    (limit,) = the("production", "LimitRange")["spec"]["limits"]
    assert set(limit["default"]) == set(limit["defaultRequest"]) == {"cpu", "memory"}


def test_the_production_quota_has_room_for_the_largest_step() -> None:
    hard = the("production", "ResourceQuota")["spec"]["hard"]
    cluster = load_params(ROOT / "params/production.yaml").cluster
    for step in (cluster.steps, cluster.train, cluster.evaluate):
        assert int(step.cpu) < int(hard["requests.cpu"])
        assert int(step.memory.removesuffix("Gi")) < int(hard["requests.memory"].removesuffix("Gi"))
    assert cluster.gpu
    assert cluster.gpu.count <= int(hard[f"requests.{cluster.gpu.resource}"])


def test_local_overlay_leaves_the_namespace_of_kubeflow_alone() -> None:
    kinds = {one["kind"] for one in objects("local")}
    assert kinds == {one["kind"] for one in objects("production")} - {
        "Namespace", "ResourceQuota", "LimitRange", "NetworkPolicy"
    }  # fmt: skip
    assert the("local", "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteOnce"]


@overlays
def test_training_evicts_nobody(overlay: str) -> None:
    priority = the(overlay, "PriorityClass")
    assert (priority["metadata"]["name"], priority["preemptionPolicy"]) == ("braintumor-training", "Never")
    assert not priority["globalDefault"]
