"""The locks of the image have what pyproject.toml asks for, in the versions that the tests run with."""

import re
import shutil

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from lit_vapo import __version__
from scripts import lock

ROOT = lock.ROOT


def locked():
    return {name: (ROOT / "locks" / name).read_text() for name in ("common.txt", "cuda.txt")}


def test_every_dependency_is_locked():
    found = {name: version for text in locked().values() for name, version in lock.pins(text).items()}
    asked = [Requirement(line) for line in lock.asked()]
    assert {"torch", "lightning", "statsmodels"} <= {requirement.name for requirement in asked}
    for requirement in asked:
        assert requirement.specifier.contains(Version(found[requirement.name.replace("_", "-")])), requirement
    for name, version in lock.pins((ROOT / lock.CONSTRAINTS).read_text()).items():
        assert found.get(name, version) == version, name


@pytest.mark.parametrize("name", ["common.txt", "cuda.txt"])
def test_a_lock_is_of_the_dependencies_as_they_are_now(name):
    assert f"# Of these: {lock.digest()}\n" in locked()[name], "pyproject.toml has changed since: make lock"


def test_another_dependency_makes_a_lock_old(tmp_path):
    for name in ("pyproject.toml", lock.CONSTRAINTS):
        shutil.copyfile(ROOT / name, tmp_path / name)
    assert lock.digest(tmp_path) == lock.digest()
    text = (tmp_path / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace('"rich>=14"', '"rich>=15"'))
    assert lock.digest(tmp_path) != lock.digest()
    (tmp_path / "pyproject.toml").write_text(text.replace('"pre-commit>=4"', '"pre-commit>=5"'))
    assert lock.digest(tmp_path) == lock.digest()
    constraints = (tmp_path / lock.CONSTRAINTS).read_text()
    (tmp_path / lock.CONSTRAINTS).write_text(constraints.replace("rich==15.0.0", "rich==14.9.0"))
    assert lock.digest(tmp_path) != lock.digest()


def test_every_file_has_a_digest_and_cuda_is_apart():
    for name, text in locked().items():
        parts = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
        assert len(parts) >= len(lock.pins(text))
        assert all("--hash=sha256:" in part for part in parts)
        assert not re.search(r"https?://|/(tmp|home|root)/|--index", text), name
    assert "torch" not in lock.pins(locked()["common.txt"])
    assert {"torch", "triton", "nvidia-nccl-cu13"} <= lock.pins(locked()["cuda.txt"]).keys()
    assert not [name for name in lock.pins(locked()["common.txt"]) if name.startswith(("nvidia", "cuda"))]


def test_the_output_of_uv_is_divided():
    text = "torch==2.0 \\\n    --hash=a\ntorchmetrics==1.0 \\\n    --hash=b\nnvidia-x==1 ; a \\\n    --hash=c"
    common, cuda = lock.divided(text)
    assert common == "torchmetrics==1.0 \\\n    --hash=b\n"
    assert lock.pins(cuda) == {"torch": "2.0", "nvidia-x": "1"}


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("Dockerfile", 'image.version="{}"'),
        ("deploy/kubernetes.yaml", "lit-vapo:{}\n"),
        ("docs/cloud.md", "lit-vapo:{} "),
        ("CITATION.cff", "\nversion: {}\n"),
        ("README.md", "version = {{{}}}"),
        ("CHANGELOG.md", "\n## {} ("),
    ],
)
def test_files_say_the_version_of_the_package(file, said):
    assert said.format(__version__) in (ROOT / file).read_text()
