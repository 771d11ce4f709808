"""Shared by all tests: import path, warnings as errors, environment, fixtures."""

import asyncio
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import certifi
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture(scope="session")
def one_certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a single certificate: loading the usual hundred takes 20 ms."""
    first, end, _ = Path(certifi.where()).read_text("utf-8").partition("-----END")
    path = tmp_path_factory.mktemp("certificates") / "one.pem"
    path.write_text(f"{first}{end} CERTIFICATE-----\n", "utf-8")
    return path


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, one_certificate: Path) -> None:
    """Keep out settings of the machine that runs the tests."""
    for name in ("IMAGES_URL", "SSL_CERT_DIR", "PYTHONUNBUFFERED", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(one_certificate))
    for scheme in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme}_proxy".upper(), raising=False)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The delays passed to asyncio.sleep, which only yields to other tasks."""
    seconds: list[float] = []
    sleep = asyncio.sleep

    async def record(delay: float) -> None:
        seconds.append(delay)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", record)
    return seconds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder to upload from."""
    path = tmp_path / "folder"
    path.mkdir()
    return path


@pytest.fixture
def received(tmp_path: Path) -> Path:
    """The embedded server's folder."""
    path = tmp_path / "received"
    path.mkdir()
    return path


@pytest.fixture
def url(received: Path) -> Iterator[str]:
    """The URL of the embedded server, which saves to `received`."""
    from mirror_images import ImageServer

    with ImageServer(received).running() as url:
        yield url


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nothing listens, reserved so that nothing else will."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]
