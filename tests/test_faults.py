"""The image scripts on a bad network, and among strangers."""

import collections
import json
from pathlib import Path

import pytest
from fault_server import TRANSIENT, FaultServer, Shares
from PIL import Image, ImageOps

import mirror_images
import upload_images


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_images, "FIRST_BACKOFF", 0.001)
    monkeypatch.setattr(upload_images, "LONGEST_BACKOFF", 0.01)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the server keeps its images."""
    path = tmp_path / "server"
    path.mkdir()
    return path


def draw_images(folder: Path, count: int) -> list[str]:
    """Write tiny images, no two alike; their names."""
    folder.mkdir(exist_ok=True)
    names = [f"{number:03}.png" for number in range(count)]
    for number, name in enumerate(names):
        image = Image.linear_gradient("L").resize((7, 5)).rotate(90, expand=True)
        image.putpixel((0, 0), number % 256)
        image.putpixel((1, 0), number // 256)
        image.save(folder / name)
    return names


def is_mirrored(folder: Path, name: str) -> bool:
    """Whether the mirror image of `name` is there, and that of `name` indeed."""
    with Image.open(folder / name) as image:
        wanted = ImageOps.mirror(image).tobytes()
    with Image.open(folder / f"mirrored_{name}") as image:
        return image.tobytes() == wanted


def report(path: Path) -> dict[str, dict[str, object]]:
    """The lines of a report by name; there must be one for each."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    counts = collections.Counter(line["name"] for line in lines)
    assert set(counts.values()) <= {1}
    return {line["name"]: line for line in lines}


# ---- faults ----------------------------------------------------------------

PATIENT = ["--retries", "40", "--timeout", "0.4"]


def test_every_image_is_mirrored_through_all_transient_faults(
    folder: Path, tmp_path: Path
) -> None:
    names = draw_images(folder, 500)
    server = FaultServer(folder, Shares(dict.fromkeys(TRANSIENT, 0.05), seed=1))
    options = [*PATIENT, "--chains", "64", "--report", str(tmp_path / "report")]
    with server.running() as url:
        assert mirror_images.main([url, *options]) == 0
    assert min(server.faults[fault] for fault in TRANSIENT) > 30
    assert all(is_mirrored(folder, name) for name in names)
    assert len(list(folder.iterdir())) == 1000
    lines = report(tmp_path / "report")
    assert sorted(lines) == names
    assert {line["status"] for line in lines.values()} == {"mirrored"}


def test_every_image_is_uploaded_through_all_transient_faults(
    folder: Path, tmp_path: Path
) -> None:
    names = draw_images(tmp_path / "photos", 500)
    server = FaultServer(folder, Shares(dict.fromkeys(TRANSIENT, 0.05), seed=2))
    options = [*PATIENT, "--connections", "64", "--report", str(tmp_path / "report")]
    with server.running() as url:
        arguments = [str(tmp_path / "photos"), "--url", url, *options]
        assert upload_images.main(arguments) == 0
    assert min(server.faults[fault] for fault in TRANSIENT) > 15
    for name in names:
        content = (tmp_path / "photos" / name).read_bytes()
        assert (folder / name).read_bytes() == content
    assert len(list(folder.iterdir())) == 500
    lines = report(tmp_path / "report")
    assert sorted(lines) == names
    assert {line["status"] for line in lines.values()} == {"uploaded"}
