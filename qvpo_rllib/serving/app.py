"""The Ray Serve application: `serve run`, or a RayService's `import_path`.

    serve run qvpo_rllib.serving.app:build bundles=/models/a:/models/b
    import_path: qvpo_rllib.serving.app:build    args: {bundles: [/models/a, /models/b]}

Other arguments make Serve replace its replicas one by one. To change the bundles of running
replicas in place, give the deployment PolicyServer another `user_config: {bundles: […]}`. Every
replica must find the bundles at the same paths.
"""

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve

from qvpo_rllib.serving.api import create_api
from qvpo_rllib.serving.bundle import load
from qvpo_rllib.serving.models import check_references


class AppArguments(BaseModel):
    """The arguments of the application."""

    model_config = ConfigDict(extra="forbid")

    bundles: list[str] = Field(min_length=1, description="directories of qvpo export")
    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1, gt=0, description="per replica")

    @field_validator("bundles", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Splits the one text of `serve run` at the system's path separator."""
        return value.split(os.pathsep) if isinstance(value, str) else value


@serve.deployment(
    # The replica's own queue is the limit that counts, whose 503 is JSON and never health's. Serve
    # also counts requests whose bodies are still coming.
    max_ongoing_requests=100_000,
    graceful_shutdown_timeout_s=10,
    health_check_period_s=1,  # a replica that died is replaced when that is noticed
)
@serve.ingress(create_api)
class PolicyServer:
    """One replica: all models and one computing thread."""

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Opens the bundles: Serve calls it before the first request and when they change."""
        await self.app.state.engine.open(user_config["bundles"])  # type: ignore[attr-defined]


def build(arguments: AppArguments) -> serve.Application:
    """Returns the application for `serve run` and RayService.

    Raises:
        ValueError: a bundle is missing or refused, or two different ones have the same name and
            version.
    """
    check_references([(bundle, load(bundle)) for bundle in arguments.bundles])
    deployment: Any = PolicyServer  # what the decorator made of the class
    return deployment.options(
        num_replicas=arguments.num_replicas,
        ray_actor_options={"num_cpus": arguments.num_cpus},
        user_config={
            "bundles": [os.path.abspath(os.path.expanduser(b)) for b in arguments.bundles]
        },
    ).bind()
