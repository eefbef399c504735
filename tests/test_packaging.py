"""What is published: the sdist builds on every architecture, and its metadata is what a package index takes."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the checkout")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Path in the archive -> content."""
    folder = tmp_path_factory.mktemp("sdist")
    # An egg-info of its own: one that lies in the checkout would add whatever it lists.
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder), "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        files = {member.name.partition("/")[2]: tar.extractfile(member) for member in tar.getmembers()}
        return {name: file.read() for name, file in files.items() if file is not None}


def test_the_sdist_has_the_sources_of_every_architecture(sdist: dict[str, bytes]) -> None:
    folders = {"csrc": ("*.cpp", "*.h"), "narrowdeep": ("*.py", "py.typed"), "tests": ("*.py",), "docs": ("*.md",)}
    paths = [path for folder, kinds in folders.items() for kind in kinds for path in (ROOT / folder).rglob(kind)]
    wanted = {str(path.relative_to(ROOT)) for path in paths}
    wanted |= {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "Makefile", "pyproject.toml", "setup.py"}
    assert {"csrc/mlp/kernels.cpp", "csrc/cnn/kernels.cpp"} <= wanted
    assert wanted - set(sdist) == set()
    assert not [name for name in sdist if name.endswith((".so", ".pyc"))]


def test_the_core_needs_torch_and_numpy_and_no_more(sdist: dict[str, bytes]) -> None:
    metadata = message_from_bytes(sdist["PKG-INFO"])
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(needed) == ["numpy", "torch>=2.10"]
    assert metadata["License-Expression"] == "Apache-2.0"
