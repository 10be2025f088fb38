"""launch/k8s/pytorchjob.yaml against the models of Kubeflow's and Kubernetes' own clients."""

import copy
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.cluster.launched import LAUNCH, environment

pytestmark = pytest.mark.cluster

# Apart from the virtual environment: the client brings packages along that nothing else here needs.
_SDK = LAUNCH.parent / "build" / "kubeflow"
_PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object}


@pytest.fixture(scope="module")
def models() -> ModuleType:
    assert _SDK.is_dir(), f"{_SDK} is missing: `make test-cluster` installs it"
    sys.path.append(str(_SDK))
    return importlib.import_module("kubeflow.training.models")


@pytest.fixture
def manifest() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "k8s" / "pytorchjob.yaml").read_text())


def mistakes(value: Any, type_name: str, models: ModuleType, *, at: str = "job") -> list[str]:
    """Unknown fields, missing ones and wrong types, one line each."""
    several = re.fullmatch(r"(?:list|List)\[(.*)\]", type_name)
    if several:
        if not isinstance(value, list):
            return [f"{at}: {value!r} is no list"]
        items = [mistakes(item, several[1], models, at=f"{at}[{i}]") for i, item in enumerate(value)]
        return sum(items, [])
    mapping = re.fullmatch(r"(?:dict|Dict)[\[(]str, ?(.*)[\])]", type_name)
    if mapping:
        return sum((mistakes(v, mapping[1], models, at=f"{at}.{k}") for k, v in value.items()), [])
    if type_name in _PLAIN:
        is_number_as_flag = isinstance(value, bool) and type_name in ("int", "float")
        fits = isinstance(value, _PLAIN[type_name]) and not is_number_as_flag
        return [] if fits else [f"{at}: {value!r} is no {type_name}"]
    return _mistakes_of_object(value, getattr(models, type_name), models, at=at)


def _mistakes_of_object(value: Any, model: Any, models: ModuleType, *, at: str) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"{at}: {value!r} is no {model.__name__}"]
    names = {key: attribute for attribute, key in model.attribute_map.items()}
    found = [f"{at}.{key}: unknown" for key in value if key not in names]
    known = {key: item for key, item in value.items() if key in names}
    try:
        model(**{names[key]: item for key, item in known.items()})  # its setters refuse what is missing
    except ValueError as error:
        found.append(f"{at}: {error}")
    for key, item in known.items():
        found += mistakes(item, model.openapi_types[names[key]], models, at=f"{at}.{key}")
    return found


def test_the_manifest_is_what_the_operator_reads(manifest: dict[str, Any], models: ModuleType) -> None:
    assert mistakes(manifest, "KubeflowOrgV1PyTorchJob", models) == []


def worker(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]


def container(job: dict[str, Any]) -> dict[str, Any]:
    return worker(job)["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda job: job["spec"].update(pytorchReplicaSpec={}), "job.spec.pytorchReplicaSpec: unknown"),
        (lambda job: job["spec"].pop("pytorchReplicaSpecs"), "pytorch_replica_specs"),
        (lambda job: container(job).pop("name"), "`name`, must not be `None`"),
        (lambda job: container(job).update(volumeMount=[]), "volumeMount: unknown"),
        (lambda job: worker(job).update(replicas="2"), "Worker.replicas: '2' is no int"),
        (lambda job: container(job)["volumeMounts"][0].pop("mountPath"), "`mount_path`, must not be `None`"),
        (lambda job: job["spec"].update(nprocPerNode=8), "nprocPerNode: 8 is no str"),
    ],
)
def test_a_spoilt_manifest_is_noticed(
    manifest: dict[str, Any], models: ModuleType, spoil: Callable[[dict[str, Any]], Any], found: str
) -> None:
    spoilt = copy.deepcopy(manifest)
    spoil(spoilt)
    assert found in "\n".join(mistakes(spoilt, "KubeflowOrgV1PyTorchJob", models))


def test_the_parts_of_the_manifest_agree(manifest: dict[str, Any], tmp_path: Path) -> None:
    """The schema knows nothing of these: counts, ports and volumes are named in several places."""
    elastic, pod = manifest["spec"]["elasticPolicy"], worker(manifest)["template"]["spec"]
    command = [*container(manifest)["command"], "--print", *container(manifest)["args"]]
    printed = subprocess.run(
        command, cwd=LAUNCH.parent, env=environment(), capture_output=True, text=True, check=True
    )
    torchrun = shlex.split(printed.stdout)
    after = dict(zip(torchrun, torchrun[1:], strict=False))
    assert int(after["--nnodes"]) == worker(manifest)["replicas"] == elastic["minReplicas"]
    assert int(after["--nnodes"]) == elastic["maxReplicas"]
    assert after["--nproc-per-node"] == manifest["spec"]["nprocPerNode"]
    assert after["--nproc-per-node"] == container(manifest)["resources"]["limits"]["nvidia.com/gpu"]
    assert int(after["--max-restarts"]) == elastic["maxRestarts"]
    assert after["--rdzv-endpoint"] == f"{manifest['metadata']['name']}-worker-0:{elastic['rdzvPort']}"
    assert container(manifest)["ports"][0]["containerPort"] == elastic["rdzvPort"]
    assert {m["name"] for m in container(manifest)["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert "output_dir=/runs" in torchrun
    assert (LAUNCH.parent / after["run"]).is_file()
