"""The Serve application: `serve run deploy.ray.app:build`, or with deploy/ray/serve.yaml."""

from __future__ import annotations

import logging
import os
from typing import Any, Final

from pydantic import ValidationError

try:
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
    from ray.serve.schema import LoggingConfig
except ImportError as error:
    raise ImportError(
        "serving on many machines needs Ray, which the extra `ray` installs: "
        "pip install --constraint constraints.txt '.[ray]' in a clone of Ambidex"
    ) from error

from deploy.ray.ingress import Ingress
from deploy.ray.options import Options, warnings
from deploy.ray.replica import Replica, log
from deploy.ray.rollout import Rollout
from server.settings import Settings, explain

logger = logging.getLogger("ambidex.server")

SPARE_SECONDS: Final = 15.0  # the time that Serve gives a replica beyond its own drain
SPARE_REQUESTS: Final = 64  # for health and metrics, which do not count as requests
MAX_QUEUED: Final = 1024  # requests that wait at each of Ray's proxies when the ingress is full
LIGHT: Final = {"num_cpus": 0}  # for actors that wait most of the time: the replicas get the CPUs


def build(args: dict[str, Any]) -> serve.Application:
    """The application with the settings of the environment.

    Raises:
        ValueError: a setting or option that cannot be used, in a sentence.
    """
    try:
        settings = Settings()
    except ValidationError as error:
        raise ValueError(explain(error)) from None
    log(settings)
    for sentence in warnings(settings, os.environ):
        logger.warning("%s", sentence)
    return application(settings, Options.of(args))


def application(
    settings: Settings, options: Options, kind: type[Replica] = Replica
) -> serve.Application:
    """The three deployments, bound to each other.

    They get `settings` as they are here; the environments of their machines do not matter.
    """
    model = _model(settings, options, kind).bind(settings)
    rollout = _deploy(Rollout, num_replicas=1, ray_actor_options=LIGHT).bind(settings, model)
    max_active = settings.max_concurrent_requests * options.max_replicas
    ingress = _deploy(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=options.ingresses,
        max_ongoing_requests=max_active + SPARE_REQUESTS,
        max_queued_requests=MAX_QUEUED,
        graceful_shutdown_timeout_s=settings.drain_timeout + SPARE_SECONDS,
        ray_actor_options=LIGHT,
    )
    return ingress.bind(settings, model, rollout, options.prefix_characters, max_active)


def _model(settings: Settings, options: Options, kind: type[Replica]) -> serve.Deployment:
    router = RequestRouterConfig(
        request_router_class="deploy.ray.router:PrefixRouter",
        request_router_kwargs={"load_bound": options.load_bound},
    )
    return _deploy(
        kind,
        name="Model",
        **_how_many(options),
        # Requests must not wait in Serve: the server itself refuses with 429 when it has too many.
        max_ongoing_requests=settings.max_concurrent_requests + SPARE_REQUESTS,
        request_router_config=router,
        health_check_period_s=5,
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=settings.drain_timeout + SPARE_SECONDS,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
    )


def _how_many(options: Options) -> dict[str, Any]:
    if options.max_replicas == options.min_replicas:
        return {"num_replicas": options.min_replicas}
    policy = AutoscalingPolicy(
        policy_function="deploy.ray.scaling:ScalingPolicy",
        policy_kwargs={"target": options.target_demand},
    )
    scaling = AutoscalingConfig(
        min_replicas=options.min_replicas,
        max_replicas=options.max_replicas,
        upscale_delay_s=options.upscale_delay,
        downscale_delay_s=options.downscale_delay,
        policy=policy,
    )
    return {"autoscaling_config": scaling}


def _deploy(kind: type[Any], **values: Any) -> serve.Deployment:
    quiet = LoggingConfig(enable_access_log=False)  # because our own access log says more
    deployment: serve.Deployment = serve.deployment(kind, logging_config=quiet, **values)
    return deployment
