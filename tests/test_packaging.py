"""What is installed is what the repository holds, under the names that the code uses."""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_every_package_is_listed(setup_cfg: configparser.ConfigParser) -> None:
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "fedsim").rglob("__init__.py")}
    assert set(lines(setup_cfg["options"]["packages"])) == found | {"fedsim.kernels", "fedsim.configs"}


@pytest.mark.parametrize("name", ["kernels", "configs"])
def test_a_renamed_folder_has_its_link_and_no_init(name: str) -> None:
    link = ROOT / "fedsim" / name
    assert link.is_symlink() and link.resolve() == ROOT / name
    assert not (ROOT / name / "__init__.py").exists()


def test_the_top_level_folder_never_hides_another_kernels_package(tmp_path: Path) -> None:
    """With the root first on the path, an installed ``kernels`` still wins, and fedsim's is found as its own."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("NAME = 'the other one'\n")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; import kernels, fedsim.kernels; "
    code += "print(kernels.NAME, *fedsim.kernels.__path__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split()[:3] == ["the", "other", "one"]
    assert Path(done.stdout.split()[3]).resolve() == ROOT / "kernels"


def test_configs_lie_beside_the_package() -> None:
    import fedsim

    configs = Path(fedsim.__file__).parent / "configs"
    assert (configs / "constitution").is_dir()


def test_constraints_pin_every_dependency_without_local_versions(setup_cfg: configparser.ConfigParser) -> None:
    pins = dict(line.split("==") for line in lines((ROOT / "constraints.txt").read_text()) if not line.startswith("#"))
    assert not [f"{name}=={version}" for name, version in pins.items() if "+" in version]
    extras = setup_cfg["options.extras_require"]
    wanted = [setup_cfg["options"]["install_requires"], *(extras[name] for name in ("test", "dev"))]
    named = {re.split(r"[<>=!~ ]", line)[0].lower() for text in wanted for line in lines(text)}
    assert named <= {name.lower() for name in pins}
    assert pins["torch"] == "2.13.0"


def test_pins_satisfy_the_lower_bounds(setup_cfg: configparser.ConfigParser) -> None:
    pins = {
        name.lower(): tuple(int(part) for part in re.findall(r"\d+", version)[:3])
        for name, _, version in (line.partition("==") for line in lines((ROOT / "constraints.txt").read_text()))
    }
    for line in lines(setup_cfg["options"]["install_requires"]):
        name, _, bound = line.partition(">=")
        assert pins[name.lower()] >= tuple(int(part) for part in bound.split(".")), line


def test_a_wheel_holds_code_kernels_configs_and_the_tiny_model(tmp_path: Path) -> None:
    """Builds with the builder at hand; the same names as in a clone, and nothing at the top level but fedsim."""
    build_system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert build_system["build-backend"] == "setuptools.build_meta"
    source = tmp_path / "source"
    source.mkdir()
    copied = ["setup.cfg", "pyproject.toml", "LICENSE", "fedsim", "kernels", "configs"]
    if (ROOT / "README.md").exists():
        copied.append("README.md")
    subprocess.run(["cp", "-a", *(str(ROOT / name) for name in copied), str(source)], check=True)
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"fedsim"}
    for folder in ("fedsim", "kernels"):
        prefix = "fedsim/kernels/" if folder == "kernels" else "fedsim/"
        for file in (ROOT / folder).rglob("*.py"):
            assert prefix + file.relative_to(ROOT / folder).as_posix() in names
    for file in (ROOT / "configs").rglob("*"):
        if file.is_file():
            assert f"fedsim/configs/{file.relative_to(ROOT / 'configs').as_posix()}" in names
    for file in (ROOT / "fedsim" / "world" / "tiny").iterdir():
        assert f"fedsim/world/tiny/{file.name}" in names


def test_the_oldest_versions_allowed_are_those_that_are_tested(setup_cfg: configparser.ConfigParser) -> None:
    text = (ROOT / "constraints-oldest.txt").read_text()
    oldest = dict(line.split("==") for line in lines(text) if not line.startswith("#"))
    bounds = dict(line.split(">=") for line in lines(setup_cfg["options"]["install_requires"]))
    assert {name: oldest[name] for name in ("torch", "transformers")} == {
        name: bounds[name] for name in ("torch", "transformers")
    }
    pins = {line.partition("==")[0] for line in lines((ROOT / "constraints.txt").read_text())}
    assert oldest.keys() <= pins, "each stands for a pin of constraints.txt"


def test_the_merged_pins_have_each_package_once(tmp_path: Path) -> None:
    """As the Makefile merges them: the oldest versions first, then every other pin."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    (program,) = re.findall(r"awk -F== '(.+?)' constraints-oldest\.txt constraints\.txt", recipe)
    command = ["awk", "-F==", program.replace("$$", "$"), "constraints-oldest.txt", "constraints.txt"]
    merged = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [line.partition("==")[0] for line in lines(merged) if not line.startswith("#")]
    pins = [line for line in lines((ROOT / "constraints.txt").read_text()) if not line.startswith("#")]
    assert len(names) == len(set(names)) == len(pins)
    assert "torch==2.11.0" in merged and "torch==2.13.0" not in merged
