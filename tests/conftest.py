"""What all tests share: scripts on the import path, asyncio, warnings as errors."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
