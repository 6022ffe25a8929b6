"""The wheel holds the three packages with their data, and nothing else; it needs jax and optax alone."""

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import normuon_core
import optax_normuon
import torch_ref

ROOT = Path(__file__).parents[2]
PACKAGES = ["normuon_core", "optax_normuon", "torch_ref"]
DATA = {*(f"{package}/py.typed" for package in PACKAGES), "normuon_core/kernels/tiles.json"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of these sources, built without isolation: nothing is downloaded."""
    source = tmp_path_factory.mktemp("source")
    for name in [*PACKAGES, "tests"]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (found,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(found) as archive:
        yield archive


def test_the_wheel_holds_the_packages_with_their_data_and_nothing_else(wheel):
    modules = {
        str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.py")
    }
    about = f"optax_normuon-{normuon_core.__version__}.dist-info/"
    named = {name for name in wheel.namelist() if not name.startswith(about)}
    assert named == modules | DATA
    assert f"{about}licenses/LICENSE" in wheel.namelist()


def test_a_user_of_the_wheel_needs_jax_and_optax_alone(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [re.split(r"\W", line)[0] for line in needed] == ["jax", "optax"]
    assert metadata["Version"] == normuon_core.__version__


def test_the_packages_and_the_citation_have_one_version():
    assert normuon_core.__version__ == optax_normuon.__version__ == torch_ref.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [normuon_core.__version__]
