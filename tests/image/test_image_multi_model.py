"""SageMaker's client and platform, asking a container that serves several models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.container.test_multi_model import (
    models,  # noqa: F401
    test_boto3_names_a_target_model_and_the_platform_makes_room,  # noqa: F401
)
from tests.image.running import Container
from tests.support.live import free_port


@pytest.fixture(scope="module")
def container(image: str, models: Path) -> Iterator[Container]:  # noqa: F811
    """Has memory for two models."""
    models.chmod(0o755)
    environ = {
        "SAGEMAKER_MULTI_MODEL": "true",
        "SAGEMAKER_BIND_TO_PORT": str(free_port()),
        "SERVING_ALLOWED_MODEL_PATH": str(models),
        "SERVING_MODELS_MEMORY_MB": "2500",
    }
    given = [part for item in environ.items() for part in ("--env", "=".join(item))]
    with Container(image, "serve", options=("--volume", f"{models}:{models}:ro", *given)) as one:
        one.ready()
        one.http.timeout = 150
        yield one


def test_a_model_that_the_user_may_not_read_is_the_callers_mistake(
    container: Container,
    models: Path,  # noqa: F811
) -> None:
    asked = {"model_name": "locked", "url": str(models / "hash1" / "model")}
    for secret in (models, models / "hash1" / "model"):
        secret.chmod(0o700)
        reply = container.http.post("/models", json=asked)
        secret.chmod(0o755)
        assert reply.status_code == 400, reply.text
        assert "Permission denied; let user 10001 read " in reply.json()["message"]
    assert container.http.get("/models").json()["models"] == []
