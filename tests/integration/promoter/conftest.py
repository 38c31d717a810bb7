"""A real MLflow server, a proxy before it, promoters as processes, and the deployment hook that they call."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from promoter_processes import (
    Hook,
    Promoters,
    Proxy,
    Registry,
    cleared_registry,
    mlflow_server,
    promoters_of,
    proxy_to,
    serving_hook,
)

from braintumor.params import Params


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], list[int]]) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server"), free_ports(1)[0]) as address:
        yield address


@pytest.fixture
def proxy(server: str) -> Iterator[Proxy]:
    with proxy_to(server) as proxy:
        yield proxy


@pytest.fixture
def hook() -> Iterator[Hook]:
    with serving_hook() as hook:
        yield hook


@pytest.fixture
def registry(
    server: str, no_store: Path, make_folders: Callable[..., Any], params: Params, monkeypatch: pytest.MonkeyPatch
) -> Registry:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    return cleared_registry(server, no_store.parent, make_folders, params)


@pytest.fixture
def promoters(registry: Registry, server: str, hook: Hook, tmp_path: Path) -> Iterator[Promoters]:
    with promoters_of(registry, server, hook, tmp_path / "promoters.log") as promoters:
        yield promoters
