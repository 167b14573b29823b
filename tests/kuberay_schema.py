"""The part of KubeRay's custom resource definitions that the files in cluster/ may use.

Written by hand from the field reference of KubeRay 1.6 (its definitions are in no Python package);
stricter than they are, as it knows no field beyond those named here. Pods and volume claims are not
described here: `kubernetes-validate` has Kubernetes' own schemas for them.
"""

from typing import Any

Schema = dict[str, Any]


def _object(required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **(optional or {})},
        "additionalProperties": False,
    }


TEXT: Schema = {"type": "string", "minLength": 1}
FLAG: Schema = {"type": "boolean"}
POD: Schema = {"type": "object", "required": ["spec"]}
# Kubernetes reads these as a map of strings: a bare number is refused.
START_PARAMETERS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def _count(minimum: int = 0) -> Schema:
    return {"type": "integer", "minimum": minimum}


HEAD_GROUP = _object(
    {"template": POD},
    {
        "rayStartParams": START_PARAMETERS,
        "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        "enableIngress": FLAG,
        "headService": {"type": "object"},
    },
)
WORKER_GROUP = _object(
    {"groupName": TEXT, "minReplicas": _count(), "maxReplicas": _count(), "template": POD},
    {
        "replicas": _count(),
        "numOfHosts": _count(1),
        "idleTimeoutSeconds": _count(),
        "rayStartParams": START_PARAMETERS,
    },
)
CLUSTER_SPEC = _object(
    {"headGroupSpec": HEAD_GROUP, "rayVersion": TEXT},
    {
        "workerGroupSpecs": {"type": "array", "items": WORKER_GROUP},
        "authOptions": _object({"mode": {"enum": ["disabled", "token"]}}),
        "enableInTreeAutoscaling": FLAG,
        "autoscalerOptions": _object(
            {},
            {
                "idleTimeoutSeconds": _count(),
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "version": {"enum": ["v1", "v2"]},
            },
        ),
        "suspend": FLAG,
    },
)
JOB_SPEC = _object(
    {"entrypoint": TEXT, "rayClusterSpec": CLUSTER_SPEC},
    {
        "backoffLimit": _count(),
        "activeDeadlineSeconds": _count(1),
        "shutdownAfterJobFinishes": FLAG,
        "ttlSecondsAfterFinished": _count(),
        "submissionMode": {
            "enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"],
        },
        "runtimeEnvYAML": TEXT,
    },
)
SERVICE_SPEC = _object({"serveConfigV2": TEXT, "rayClusterConfig": CLUSTER_SPEC})


def _resource(kind: str, spec: Schema) -> Schema:
    return _object(
        {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": kind},
            "metadata": {"type": "object", "required": ["name"]},
            "spec": spec,
        }
    )


SCHEMAS = {
    "RayCluster": _resource("RayCluster", CLUSTER_SPEC),
    "RayJob": _resource("RayJob", JOB_SPEC),
    "RayService": _resource("RayService", SERVICE_SPEC),
}


def cluster_spec(resource: dict[str, Any]) -> dict[str, Any]:
    """The cluster inside any of the three."""
    key = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(resource["kind"])
    spec: dict[str, Any] = resource["spec"]
    return spec[key] if key else spec


def pod_templates(resource: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_spec(resource)
    groups = [spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]
    return [group["template"] for group in groups]
