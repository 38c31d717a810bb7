"""The Kubernetes objects: valid, safe, and named as the pipeline names them."""

import json
import re
import shutil
import subprocess
import sys
from copy import deepcopy
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
REGISTRY = "mlflow"

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


@cache
def parsed(overlay: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(rendered(overlay)))


def objects(overlay: str, kind: str | None = None) -> list[dict[str, Any]]:
    return deepcopy([one for one in parsed(overlay) if kind in (None, one["kind"])])


def the(overlay: str, kind: str) -> dict[str, Any]:
    (found,) = objects(overlay, kind)
    return found


@pytest.mark.parametrize("overlay", [*NAMESPACES, REGISTRY])
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
    for overlay in (*NAMESPACES, REGISTRY):
        (tmp_path / f"{overlay}.yaml").write_text(rendered(overlay))
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    (tmp_path / "server").mkdir()
    shutil.copy(ROOT / "mlflow/Dockerfile", tmp_path / "server")
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


def registry(kind: str) -> dict[str, dict[str, Any]]:
    """The objects of the registry of one kind, by their names."""
    return {one["metadata"]["name"]: one for one in objects(REGISTRY, kind)}


def pods() -> dict[str, dict[str, Any]]:
    """The pods of the registry, as their template gives them, by the name of what makes them."""
    jobs = {name: one["spec"]["jobTemplate"]["spec"] for name, one in registry("CronJob").items()}
    servers = {name: one["spec"] for kind in ("Deployment", "StatefulSet") for name, one in registry(kind).items()}
    return {name: spec["template"] for name, spec in (jobs | servers).items()}


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def secrets_of(pod: dict[str, Any]) -> dict[str, set[str] | None]:
    """The Secrets that are mounted at /run/secrets, and which of their keys: None for all."""
    (volume,) = [one for one in pod["spec"]["volumes"] if one["name"] == "secrets"]
    sources = [one["secret"] for one in volume["projected"]["sources"]] if "projected" in volume else [volume["secret"]]
    return {
        one.get("name") or one["secretName"]: {item["key"] for item in one["items"]} if "items" in one else None
        for one in sources
    }


PODS = ["mlflow", "mlflow-backup", "mlflow-gc", "mlflow-restore", "mlflow-upgrade", "postgres", "promoter"]
every_pod = pytest.mark.parametrize("name", PODS)


def test_every_pod_of_the_registry_is_looked_at() -> None:
    assert sorted(pods()) == PODS


@every_pod
def test_a_pod_of_the_registry_has_no_more_rights_than_it_needs(name: str) -> None:
    spec = pods()[name]["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["serviceAccountName"] == "mlflow"
    context = spec["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["runAsGroup"]) == (True, 10001, 10001)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(pods()[name]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        assert set(container["resources"]["limits"]) == set(container["resources"]["requests"]) == {"cpu", "memory"}
        assert ":" in container["image"]
    for volume in spec["volumes"]:
        assert not {"hostPath", "nfs"} & set(volume)
        assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"]


@every_pod
def test_secrets_are_files_that_a_person_has_made_and_whoever_names_one_finds_it(name: str) -> None:
    assert objects(REGISTRY, "Secret") == []
    comment = " ".join((ROOT / "k8s/mlflow/kustomization.yaml").read_text().split())
    pod = pods()[name]
    for secret, keys in secrets_of(pod).items():
        assert secret in comment
        assert all(key in comment for key in keys or ())
    for container in containers(pod):
        for variable in container.get("env", []):
            assert "secretKeyRef" not in variable.get("valueFrom", {})
        assert all("secretRef" not in source for source in container.get("envFrom", []))
        command = container.get("command", [])
        for needed in command[1 : command.index("--")] if "--" in command else ():
            assert needed.removesuffix("?") in comment
    if name in ("postgres", "mlflow-backup", "mlflow-restore", "mlflow-upgrade"):
        assert "mlflow-server" not in secrets_of(pod)
    if name != "postgres":
        assert "mlflow-postgres" not in secrets_of(pod)


def test_the_documented_commands_make_every_secret_that_something_mounts_with_all_its_keys() -> None:
    document = (ROOT / "docs/operating.md").read_text().replace("\\\n", " ")
    made = {
        name: rest.split("#")[0].split() for name, rest in re.findall(r"^ +make_secret ([\w-]+) (.*)$", document, re.M)
    }
    keys = {name: {file.partition("=")[0] for file in files} for name, files in made.items()}
    written = {
        name for line in re.findall(r"^ +(?:for name in .*|\w+ .*>\w+.*)$", document, re.M) for name in line.split()
    }
    assert {file.rpartition("=")[2] for files in made.values() for file in files} <= {
        name.lstrip(">").rstrip(";") for name in written
    }
    (of_the_image,) = re.findall(r"^CMD (\[.*?\])$", (ROOT / "mlflow/Dockerfile").read_text(), re.M | re.S)
    mounted: set[str] = set()
    for pod in pods().values():
        secrets = secrets_of(pod)
        mounted |= set(secrets)
        assert all(wanted <= keys[secret] for secret, wanted in secrets.items() if wanted)
        there = {key for secret, wanted in secrets.items() for key in wanted or keys[secret]}
        for container in containers(pod):
            command = container.get("command") or json.loads(of_the_image.replace("\\\n", ""))
            if container["image"].startswith("postgres:") and "command" not in container:
                command = []
            named = command[1 : command.index("--")] if "--" in command else []
            assert {one.removesuffix("?") for one in named} <= there
    assert mounted == set(made)
    comment = (ROOT / "k8s/mlflow/kustomization.yaml").read_text()
    for certificate in registry("Ingress")["mlflow"]["spec"]["tls"]:
        assert f" {certificate['secretName']} " in comment
        assert f"create secret tls {certificate['secretName']} " in document


def test_documented_commands_wait_for_the_pods_that_they_stop_and_clean_up_as_the_cluster_does() -> None:
    lines = (ROOT / "docs/operating.md").read_text().replace("\\\n", " ").splitlines()
    stops = [index for index, line in enumerate(lines) if line.strip().endswith("--replicas 0")]
    assert len(stops) == 2
    for index in stops:
        (named,) = re.findall(
            r"wait --for=delete pod --selector 'app.kubernetes.io/name in \((.*)\)'", lines[index + 1]
        )
        assert named.split(", ") == re.findall(r"scale deployment (.*) --replicas", lines[index])[0].split()
    (gc,) = [" ".join(line.split()) for line in lines if " mlflow gc --" in line]
    (job,) = containers(pods()["mlflow-gc"])
    assert gc.endswith(f" mlflow with-secrets PGPASSWORD -- {' '.join(job['args'])}")
    for variable in job["env"]:
        assert f" -e {variable['name']}={variable['value']} " in gc


def test_a_restore_has_a_disk_of_its_own_that_can_be_full_before_anything_is_changed() -> None:
    (scratch,) = [one for one in pods()["mlflow-restore"]["spec"]["volumes"] if one["name"] == "tmp"]
    assert "ephemeral" in scratch


def test_the_database_is_asked_by_name_since_its_user_has_none_in_the_image() -> None:
    (container,) = containers(pods()["postgres"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert "--username=postgres" in container[probe]["exec"]["command"]


def test_hosts_and_origin_of_the_server_are_those_by_which_it_is_called() -> None:
    (addresses,) = [one["data"] for name, one in registry("ConfigMap").items() if name.startswith("mlflow-addresses")]
    hosts = set(addresses["MLFLOW_SERVER_ALLOWED_HOSTS"].split(","))
    ingress = registry("Ingress")["mlflow"]["spec"]
    (host,) = {rule["host"] for rule in ingress["rules"]}
    assert ingress["tls"] == [{"hosts": [host], "secretName": "mlflow-tls"}]
    # A browser names its origin, and without it each of its POSTs is refused.
    assert addresses["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] == f"https://{host}"
    called = {the(overlay, "ConfigMap")["data"]["MLFLOW_TRACKING_URI"] for overlay in NAMESPACES}
    called |= {
        variable["value"]
        for pod in pods().values()
        for container in containers(pod)
        for variable in container.get("env", [])
        if variable["name"] == "MLFLOW_TRACKING_URI"
    }
    assert hosts == {host} | {address.removeprefix("http://") for address in called}
    assert not any("*" in one for one in hosts)
    assert not {"PGPASSWORD", "AWS_SECRET_ACCESS_KEY"} & set(addresses)


def test_the_registry_runs_the_scripts_that_were_tried() -> None:
    (scripts,) = [one["data"] for name, one in registry("ConfigMap").items() if name.startswith("mlflow-scripts")]
    assert scripts == {name: (ROOT / "mlflow" / name).read_text() for name in ("with-secrets", "backup", "restore")}
    (databases,) = [one["data"] for name, one in registry("ConfigMap").items() if name.startswith("mlflow-databases")]
    assert databases == {"databases.sql": (ROOT / "mlflow/databases.sql").read_text()}


def test_backups_are_made_by_the_programs_of_the_server_they_are_of() -> None:
    images = {container["image"] for pod in pods().values() for container in containers(pod)}
    (postgres,) = [image for image in images if image.startswith("postgres:")]
    assert f"/{postgres.partition(':')[2].partition('-')[0]}/" in next(
        variable["value"] for variable in containers(pods()["postgres"])[0]["env"] if variable["name"] == "PGDATA"
    )
    assert {image.partition(":")[0] for image in images} == {"postgres", "braintumor", "braintumor-mlflow"}


def test_one_node_may_go_and_never_do_two_releases_share_a_database() -> None:
    server, promoter = registry("Deployment")["mlflow"]["spec"], registry("Deployment")["promoter"]["spec"]
    budget = registry("PodDisruptionBudget")["mlflow"]["spec"]
    assert budget["minAvailable"] < server["replicas"]
    assert budget["selector"] == server["selector"]
    assert server["strategy"] == promoter["strategy"] == {"type": "Recreate"}
    assert promoter["replicas"] == registry("StatefulSet")["postgres"]["spec"]["replicas"] == 1
    assert registry("StatefulSet")["postgres"]["spec"]["persistentVolumeClaimRetentionPolicy"] == {
        "whenDeleted": "Retain", "whenScaled": "Retain"
    }  # fmt: skip


def test_the_backup_runs_by_itself_and_nothing_else_that_touches_the_databases_does() -> None:
    suspended = {name: one["spec"].get("suspend", False) for name, one in registry("CronJob").items()}
    assert suspended == {"mlflow-backup": False, "mlflow-gc": True, "mlflow-restore": True, "mlflow-upgrade": True}
    first, *others = containers(pods()["mlflow-upgrade"])
    assert first["command"][-1] == "/scripts/backup"
    assert [step["command"][step["command"].index("--") + 1] for step in others] == ["mlflow", "python3"]


def test_who_talks_to_whom_in_the_registry_is_named_on_both_sides() -> None:
    policies = {name: one["spec"] for name, one in registry("NetworkPolicy").items()}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}

    def names(selector: dict[str, Any]) -> set[str]:
        given = selector.get("matchLabels", {}).get("app.kubernetes.io/name")
        expressions = [one for one in selector.get("matchExpressions", []) if one["key"] == "app.kubernetes.io/name"]
        return {given} - {None} | {value for one in expressions for value in one["values"]}

    entering: set[tuple[str, str, int]] = set()
    leaving: set[tuple[str, str, int]] = set()
    outside, namespaces = set(), set()
    for policy in policies.values():
        for direction, peers, flows in (("ingress", "from", entering), ("egress", "to", leaving)):
            for rule in policy.get(direction, []):
                ports = {port["port"] for port in rule["ports"]}
                for peer in rule[peers]:
                    namespace = peer.get("namespaceSelector", {})
                    if "ipBlock" in peer:
                        assert "169.254.169.254/32" in peer["ipBlock"]["except"]
                        outside |= {(one, port) for one in names(policy["podSelector"]) for port in ports}
                    elif namespace:
                        namespaces |= {
                            value for one in namespace.get("matchExpressions", []) for value in one["values"]
                        }
                    else:
                        both = (names(policy["podSelector"]), names(peer["podSelector"]))
                        callers, called = both if direction == "egress" else both[::-1]
                        flows |= {(caller, one, port) for caller in callers for one in called for port in ports}
    assert entering == leaving
    database = {"mlflow", "mlflow-backup", "mlflow-gc", "mlflow-restore", "mlflow-upgrade"}
    assert entering == {(name, "postgres", 5432) for name in database} | {
        ("promoter", "mlflow", 5000), ("mlflow-gc", "mlflow", 5000), ("mlflow", "promoter", 8080)
    }  # fmt: skip
    assert outside == {("mlflow", 443), ("promoter", 443)}
    assert namespaces == {*NAMESPACES.values(), "ingress-nginx"}
    # Who may reach the database is who has its password.
    assert database == {name for name in pods() if "mlflow-database" in secrets_of(pods()[name])} - {"postgres"}
    for name, pod in pods().items():
        assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == name


def test_everything_of_the_registry_is_in_a_namespace_that_admits_restricted_pods_alone() -> None:
    for one in objects(REGISTRY):
        assert one["metadata"].get("namespace") == (None if one["kind"] == "Namespace" else "mlflow")
        assert one["metadata"]["labels"]["app.kubernetes.io/part-of"] == "braintumor-registry"
    labels = registry("Namespace")["mlflow"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert objects(REGISTRY, "Role") == objects(REGISTRY, "ClusterRole") == []
