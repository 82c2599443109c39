"""The house keeps its shape: dependencies point one way, and only `stepdistill` lands in someone's site-packages."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stepdistill.methods import METHODS

ROOT = Path(__file__).parents[1]
CODE = ("stepdistill", "pipelines", "eval", "configs", "scripts", "tests")
MAPPED = ("pipelines", "eval", "configs")                                  # shipped as stepdistill.<name>


def module_of(path: Path) -> str:
    """The dotted name a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("stepdistill", *parts) if parts[0] in MAPPED else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_in(source: str, module: str, package: bool) -> Iterator[str]:
    """Every dotted name that the source imports, wherever in the file, with relative imports resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    return set(imports_in(path.read_text(), module_of(path), path.name == "__init__.py"))


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def offences(paths: list[Path], forbidden) -> dict[str, list[str]]:
    """{file: imports that are forbidden}; `forbidden(path, name)`."""
    found = {str(path.relative_to(ROOT)): sorted(name for name in imports(path) if forbidden(path, name)) for path in paths}
    return {path: names for path, names in found.items() if names}


def only(*allowed: str):
    """Nothing but the standard library and these."""
    return lambda path, name: not inside(name, *allowed) and name.split(".")[0] not in (*sys.stdlib_module_names, "__future__")


def never(*packages: str):
    return lambda path, name: inside(name, *packages)


ABOVE = tuple(f"stepdistill.{name}" for name in ("export", "cli", "__main__", "eval", "pipelines", "configs"))


@pytest.mark.parametrize(("source", "names"), [
    ("import torch.nn as nn", {"torch.nn"}), ("from . import b", {"p.q", "p.q.b"}), ("from .b import c", {"p.q.b", "p.q.b.c"}),
    ("from ..r import c", {"p.r", "p.r.c"}), ("def f():\n    from eval import metrics", {"eval", "eval.metrics"}),
])
def test_imports_are_read(source, names):
    assert set(imports_in(source, "p.q.a", package=False)) == names
    assert set(imports_in(source, "p.q", package=True)) == names


@pytest.mark.parametrize(("folder", "forbidden"), [
    ("stepdistill/diffusion", only("torch", "stepdistill.diffusion")),
    ("stepdistill/losses", only("torch", "stepdistill.diffusion", "stepdistill.losses")),
    ("pipelines", only("torch", "diffusers", "PIL", "numpy")),
    ("stepdistill/methods", never("stepdistill.training", "accelerate", *ABOVE)),
    ("stepdistill/models", never("stepdistill.methods", "stepdistill.training", *ABOVE)),
    ("stepdistill/data", never("stepdistill.training", *ABOVE)),
    ("stepdistill/training", never(*ABOVE)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_dependencies_point_one_way(folder, forbidden):
    assert offences(files(folder), forbidden) == {}


def test_a_method_never_imports_another():
    """Parts without a row in METHODS may be shared."""
    assert offences([path for path in files("stepdistill/methods") if path.name != "__init__.py"],
                    lambda path, name: any(inside(name, f"stepdistill.methods.{other}") for other in METHODS)) == {}


def test_loop_and_data_know_no_method_by_name():
    known = {f"stepdistill.methods.{path.stem}" for path in files("stepdistill/methods") if path.stem not in ("__init__", "base")}
    assert offences(files("stepdistill/training", "stepdistill/data"), lambda path, name: inside(name, *known)) == {}


def test_mapped_folders_have_one_name():
    """`import eval` beside `import stepdistill.eval` would give two copies of one file's state."""
    assert offences(files(*CODE), never(*MAPPED)) == {}


def test_nothing_imports_the_tests_or_scripts():
    assert offences(files("stepdistill", "pipelines", "eval"), never("tests", "scripts")) == {}


# -------------------------------------------------------------------------------------------------------------------------------- packaging


def setuptools_table() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_packages_are_listed():
    """Every folder with an __init__.py, once; and every folder with Python in it has one."""
    folders = {path.parent for path in files("stepdistill", *MAPPED)}
    assert sorted(str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()) == []
    listed = setuptools_table()["packages"]
    assert sorted(listed) == sorted(module_of(folder / "__init__.py") for folder in folders)


@pytest.mark.parametrize("folder", ["scripts", "tests"])
def test_doors_and_tests_are_no_packages(folder):
    assert list((ROOT / folder).rglob("__init__.py")) == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built from a copy of the tree, without the network and without leaving anything behind."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name in CODE:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    (tree / "configs" / "probe" / "deep").mkdir(parents=True)
    (tree / "configs" / "probe" / "deep" / "probe.yaml").write_text("probe: true\n")
    subprocess.run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(out)],
                   cwd=tree, check=True, capture_output=True, text=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_has_one_top_level_name(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"stepdistill"}
    info = next(name for name in tops if name.endswith(".dist-info"))
    assert wheel.read(f"{info}/top_level.txt").decode().split() == ["stepdistill"]


def test_the_wheel_carries_everything(wheel):
    names = set(wheel.namelist())
    sources = {module_of(path).replace(".", "/") for path in files("stepdistill", *MAPPED)}
    assert sorted(source for source in sources if not {f"{source}.py", f"{source}/__init__.py"} & names) == []
    data = {f"stepdistill/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    kinds = {".safetensors", ".json", ".md"}
    data |= {str(path.relative_to(ROOT)) for path in (ROOT / "stepdistill" / "worlds").rglob("*") if path.suffix in kinds}
    assert sorted(data - names) == []
    assert {"stepdistill/py.typed", "stepdistill/eval/page.html", "stepdistill/configs/probe/deep/probe.yaml"} <= names
