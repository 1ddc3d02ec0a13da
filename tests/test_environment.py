"""Every place that names versions says the same as pyproject.toml."""

from __future__ import annotations

import ast
import copy
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from bsmamba2.kernels.triton import INSTALL_MAMBA

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
GPU_ENVIRONMENT = yaml.safe_load((ROOT / "environment-gpu.yml").read_text(encoding="utf-8"))
# What `make env` installs, and so what environment.yml must.
EXTRAS = {"book", "test"}
# The names on conda-forge of what pip calls otherwise.
CONDA_NAMES = {"pytorch-gpu": "torch"}
KERNELS = {"mamba-ssm", "causal-conv1d"}


def check_environment(environment: dict[str, Any], project: dict[str, Any]) -> list[str]:
    """environment.yml: the same Python, everything else by way of pyproject.toml."""
    said = []
    plain = [item for item in environment["dependencies"] if isinstance(item, str)]
    by_pip = [line for item in environment["dependencies"] if isinstance(item, dict) for line in item["pip"]]
    python = [item.partition("python")[2].strip() for item in plain if re.match(r"python\b", item)]
    if len(python) != 1 or SpecifierSet(python[0]) != SpecifierSet(project["requires-python"]):
        said.append(f"environment.yml wants Python {python}, pyproject.toml {project['requires-python']}")
    if others := [item for item in plain if not re.match(r"(python|pip)\b", item)]:
        said.append(f"environment.yml names {others} itself: dependencies stand in pyproject.toml")
    match = re.fullmatch(r"(?:-e|--editable) \.\[([\w,]+)\]", by_pip[0]) if len(by_pip) == 1 else None
    if match is None:
        said.append(f"environment.yml installs {by_pip} by pip: only `-e .[extras]` should stand there")
        return said
    named = set(match[1].split(","))
    if unknown := named - set(project["optional-dependencies"]):
        said.append(f"environment.yml names extras that do not exist: {sorted(unknown)}")
    if named != EXTRAS:
        said.append(f"environment.yml installs the extras {sorted(named)}, make env {sorted(EXTRAS)}")
    return said


def check_gpu_environment(environment: dict[str, Any], project: dict[str, Any]) -> list[str]:
    """environment-gpu.yml: both kernels and torch from conda-forge, in our ranges; pip replaces none of them."""
    said = []
    plain = [Requirement(item) for item in environment["dependencies"] if isinstance(item, str)]
    by_pip = [line for item in environment["dependencies"] if isinstance(item, dict) for line in item["pip"]]
    by_conda = {CONDA_NAMES.get(item.name, item.name): item.specifier for item in plain}
    ranges = {item.name: item.specifier for item in map(Requirement, project["dependencies"])}
    expected = {"python": SpecifierSet(project["requires-python"]), **ranges}
    for name in sorted((KERNELS | {"python", "torch", "torchaudio", "numpy"}) - by_conda.keys()):
        said.append(f"environment-gpu.yml has no {name} from conda")
    for name, specifier in by_conda.items():
        if name in expected and specifier != expected[name]:
            said.append(f"environment-gpu.yml wants {name} {specifier}, pyproject.toml {expected[name]}")
    if environment["channels"] != ["conda-forge"]:
        said.append(f"environment-gpu.yml mixes channels: {environment['channels']}")
    if "-e ." not in by_pip:
        said.append("environment-gpu.yml does not install this package by `-e .`, without extras")
    pins = {line for lines in project["optional-dependencies"].values() for line in lines}
    for line in by_pip:
        if line.startswith("-e "):
            continue
        if Requirement(line).name in by_conda:
            said.append(f"{line} by pip replaces what conda installed")
        elif line not in pins:
            said.append(f"{line} in environment-gpu.yml is no pin of pyproject.toml")
    return said


def check_dependencies(project: dict[str, Any]) -> list[str]:
    """Each package has one range among the dependencies and at most one pin among the extras, inside it."""
    said = []
    ranges: dict[str, Requirement] = {}
    for line in project["dependencies"]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in ranges:
            said.append(f"{name} stands twice among the dependencies")
        if not any(spec.operator in {"<", "==", "~="} for spec in requirement.specifier):
            said.append(f"{line} has no upper bound")
        ranges[name] = requirement
    pins: dict[str, str] = {}
    for extra, lines in project["optional-dependencies"].items():
        for line in lines:
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if name == project["name"]:  # an extra that includes another
                continue
            if name in pins:
                said.append(f"{name} is pinned in {extra} and in {pins[name]}")
            pins[name] = extra
            exact = [spec.version for spec in requirement.specifier if spec.operator == "=="]
            if len(exact) != 1 or len(requirement.specifier) != 1 or "*" in exact[0]:
                said.append(f"{line} in {extra} is not exact")
            elif name in ranges and exact[0] not in ranges[name].specifier:
                said.append(f"{line} in {extra} is outside {ranges[name]}")
    said += [f"{name} is not pinned in an extra: the book's environment may rot" for name in ranges if name not in pins]
    return said


def check_classifiers(project: dict[str, Any]) -> list[str]:
    """The minor versions of Python in the classifiers are those of requires-python."""
    allowed = SpecifierSet(project["requires-python"])
    expected = [f"3.{minor}" for minor in range(8, 30) if f"3.{minor}.0" in allowed]
    found = [match[1] for line in project["classifiers"] if (match := re.search(r"Python :: (3\.\d+)$", line))]
    return [] if found == expected else [f"classifiers name Python {found}, requires-python means {expected}"]


def test_a_plain_installation_has_every_package_that_the_commands_import() -> None:
    named = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    for path in (ROOT / "bsmamba2").rglob("*.py"):
        if "teaching" in path.parts:  # for notebooks: the extra `book`
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [str(node.module)]
            packages = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
            assert {package.replace("yaml", "pyyaml") for package in packages} <= named, path


def test_environment_file_says_what_pyproject_says() -> None:
    assert check_environment(ENVIRONMENT, PROJECT) == []


def test_gpu_environment_agrees_with_pyproject() -> None:
    assert check_gpu_environment(GPU_ENVIRONMENT, PROJECT) == []


def without_kernel(environment: dict[str, Any]) -> None:
    environment["dependencies"].remove("mamba-ssm >=2.3")


def other_torch(environment: dict[str, Any]) -> None:
    environment["dependencies"][1] = "pytorch-gpu >=2.6"


def second_channel(environment: dict[str, Any]) -> None:
    environment["channels"].append("nvidia")


def with_extras(environment: dict[str, Any]) -> None:
    environment["dependencies"][-1]["pip"][0] = "-e .[book]"


def torch_by_pip(environment: dict[str, Any]) -> None:
    environment["dependencies"][-1]["pip"].append("torch==2.14.1")


def old_pin(environment: dict[str, Any]) -> None:
    environment["dependencies"][-1]["pip"][1] = "jupyterlab==4.0.0"


@pytest.mark.parametrize("plant", [without_kernel, other_torch, second_channel, with_extras, torch_by_pip, old_pin])
def test_a_fault_of_the_gpu_environment_is_reported(plant: Callable[[dict[str, Any]], None]) -> None:
    environment = copy.deepcopy(GPU_ENVIRONMENT)
    plant(environment)
    assert check_gpu_environment(environment, PROJECT) != []


def test_dependencies_are_bounded_and_the_book_exact() -> None:
    assert check_dependencies(PROJECT) == []


def test_classifiers_name_the_supported_pythons() -> None:
    assert check_classifiers(PROJECT) == []


def test_makefile_installs_the_same_extras_on_the_same_pythons() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"--editable '\.\[([\w,]+)\]'", makefile)
    assert found is not None
    assert set(found[1].split(",")) == EXTRAS
    bounds = re.search(r"\((\d+), (\d+)\) <= sys\.version_info\[:2\] < \((\d+), (\d+)\)", makefile)
    assert bounds is not None
    low, low_minor, high, high_minor = bounds.groups()
    assert SpecifierSet(f">={low}.{low_minor},<{high}.{high_minor}") == SpecifierSet(PROJECT["requires-python"])


def test_mamba_ssm_is_installed_as_the_module_says() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pin = re.search(r"^MAMBA_SSM := (mamba-ssm==\S+)$", makefile, re.MULTILINE)
    assert pin is not None
    assert INSTALL_MAMBA.endswith(pin[1])
    said = INSTALL_MAMBA.partition("&& ")[2]
    flags = r"MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE .*--no-build-isolation --no-deps"
    assert re.search(flags, said)
    assert re.search(flags, makefile.replace("\\\n", ""))


def test_versions_of_the_release_agree() -> None:
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "bsmamba2" / "__init__.py").read_text(encoding="utf-8"))
    assert found is not None
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == found[1]
    assert "arXiv:2508.14556" in {item["value"] for item in citation["references"][0]["identifiers"]}
    assert f"[{found[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_no_address_of_a_package_registry_is_written_down() -> None:
    names = ["pyproject.toml", "environment.yml", "environment-gpu.yml", "Makefile", ".ci/run", "_config.yml"]
    paths = [ROOT / name for name in names] + sorted((ROOT / ".github").rglob("*.yml"))
    for path in paths:
        assert not re.search(r"index-url|find-links|https?://[^\s]*(simple|pypi)", path.read_text(encoding="utf-8")), (
            path
        )


def wrong_python(environment: dict[str, Any], project: dict[str, Any]) -> None:
    environment["dependencies"][0] = "python >=3.10,<3.14"


def own_dependency(environment: dict[str, Any], project: dict[str, Any]) -> None:
    environment["dependencies"].insert(1, "numpy=2.0")


def unknown_extra(environment: dict[str, Any], project: dict[str, Any]) -> None:
    environment["dependencies"][-1]["pip"] = ["-e .[book,test,gpu]"]


def fewer_extras(environment: dict[str, Any], project: dict[str, Any]) -> None:
    environment["dependencies"][-1]["pip"] = ["-e .[book]"]


def second_line(environment: dict[str, Any], project: dict[str, Any]) -> None:
    environment["dependencies"][-1]["pip"].append("torch==2.0")


def pinned_twice(environment: dict[str, Any], project: dict[str, Any]) -> None:
    project["optional-dependencies"]["test"].append(project["optional-dependencies"]["book"][0])


def pin_outside_the_range(environment: dict[str, Any], project: dict[str, Any]) -> None:
    project["dependencies"][0] = "torch>=2.6,<2.7"


def loose_tool(environment: dict[str, Any], project: dict[str, Any]) -> None:
    project["optional-dependencies"]["book"].append("notebook>=7")


def unbounded(environment: dict[str, Any], project: dict[str, Any]) -> None:
    project["dependencies"][0] = "torch>=2.6"


def missing_classifier(environment: dict[str, Any], project: dict[str, Any]) -> None:
    project["classifiers"].pop(3)


@pytest.mark.parametrize(
    "plant",
    [
        wrong_python,
        own_dependency,
        unknown_extra,
        fewer_extras,
        second_line,
        pinned_twice,
        pin_outside_the_range,
        loose_tool,
        unbounded,
        missing_classifier,
    ],
)
def test_a_planted_fault_is_reported(plant: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    environment, project = copy.deepcopy(ENVIRONMENT), copy.deepcopy(PROJECT)
    plant(environment, project)
    assert check_environment(environment, project) + check_dependencies(project) + check_classifiers(project)
