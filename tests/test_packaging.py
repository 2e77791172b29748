"""What is installed is what the repository holds, under the names that the code uses."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import Final

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


def test_the_command_is_the_main_module(setup_cfg: configparser.ConfigParser) -> None:
    assert lines(setup_cfg["options.entry_points"]["console_scripts"]) == ["fedsim = fedsim.__main__:main"]


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
    wanted = [setup_cfg["options"]["install_requires"], *(extras[name] for name in ("test", "dev", "docs", "judge"))]
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


# Import name → distribution, where they differ, and packages that come with a named one.
DISTRIBUTIONS: Final = {
    "yaml": "PyYAML",
    "flash_attn": "",  # optional on CUDA, installed by hand (docs/gpu.md)
    "triton": "torch",
    "huggingface_hub": "transformers",
    "PIL": "matplotlib",
    "httpx2": "openai",
    "pydantic": "openai",
}


def test_every_package_that_is_imported_is_declared(setup_cfg: configparser.ConfigParser) -> None:
    """Top names that the package imports, at its head or where they are used, against requirements and extras."""
    extras = setup_cfg["options.extras_require"]
    texts = [setup_cfg["options"]["install_requires"], *(extras[name] for name in ("judge", "deepspeed"))]
    declared = {re.split(r"[<>=!~ ]", line)[0].lower() for text in texts for line in lines(text)}
    missing = set()
    for path in [*(ROOT / "fedsim").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                wanted = DISTRIBUTIONS.get(top, top)
                if top != "fedsim" and top not in sys.stdlib_module_names and wanted:
                    missing |= {wanted} if wanted.lower() not in declared else set()
    assert missing == set()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the builder at hand."""
    build_system = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    assert build_system["build-backend"] == "setuptools.build_meta"
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    copied = ["setup.cfg", "pyproject.toml", "LICENSE", "fedsim", "kernels", "configs"]
    if (ROOT / "README.md").exists():
        copied.append("README.md")
    subprocess.run(["cp", "-a", *(str(ROOT / name) for name in copied), str(source)], check=True)
    code = f"import setuptools.build_meta as b; b.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=source)
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_holds_code_kernels_configs_and_the_tiny_model(wheel: Path) -> None:
    """The same names as in a clone, and nothing at the top level but fedsim."""
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"fedsim"}
    for folder in ("fedsim", "kernels"):
        prefix = "fedsim/kernels/" if folder == "kernels" else "fedsim/"
        for file in (ROOT / folder).rglob("*.py"):
            assert prefix + file.relative_to(ROOT / folder).as_posix() in names
    for file in (ROOT / "configs").rglob("*"):
        if file.is_file():
            assert f"fedsim/configs/{file.relative_to(ROOT / 'configs').as_posix()}" in names
    assert "fedsim/report/page.html.jinja" in names
    shipped = [*(ROOT / "fedsim" / "world" / "tiny").iterdir(), *(ROOT / "fedsim" / "study").glob("*.json")]
    assert len(shipped) > 5
    for file in shipped:
        assert file.relative_to(ROOT).as_posix() in names


SHORT = [
    "federation.num_rounds=1", "federation.num_clients=2", "federation.clients_per_round=1", "local.steps=1",
    "data.federated_rows=40", "data.guard_rows=20", "data.cai_rows=12", "guard.measure_untuned=false",
    "cai.iterations=1", "eval.limit=2", "eval.helpful=", "eval.guard_judge=none",
]  # fmt: skip
"""The embedded demo on a few rows, one round of one step."""


@pytest.mark.deep
def test_an_installed_wheel_runs_studies_and_reports_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    """In an empty environment that borrows the dependencies of this one, whose own fedsim it cannot see."""
    home, work = tmp_path / "env", tmp_path / "work"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "-q", str(wheel)], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    borrowed = dict.fromkeys(sysconfig.get_paths()[name] for name in ("purelib", "platlib"))
    (packages / "dependencies.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not re.match("PYTHON|RANK|WORLD_SIZE|LOCAL_", name)}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def fedsim(*words: str, status: int = 0) -> str:
        done = subprocess.run(
            ["fedsim", *words], cwd=work, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == status, done.stderr[-3000:]
        return done.stdout if status == 0 else done.stderr

    place = subprocess.run(
        ["python", "-c", "import fedsim; print(fedsim.__file__)"],
        cwd=work, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(place.stdout.strip()).is_relative_to(home)
    assert "federation.algorithm\n" in fedsim("list")
    assert "num_rounds: 50" in fedsim("config", "configs/paper/base.yaml")
    assert "\nInputs\n" in fedsim("check", *SHORT) and not (work / "runs" / "demo").exists()
    fedsim("run", *SHORT)
    manifest = json.loads((work / "runs" / "demo" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["git"], (work / "runs" / "demo" / "summary.md").is_file()) == (None, True)
    assert "FedAvg: (FL + CAI) − FL" in fedsim("table1", *SHORT, "--seeds", "0")
    assert (work / "runs" / "table1" / "table1.md").is_file()
    assert "guard, fine-tuned" in fedsim("table2", *SHORT, "--seeds", "0")
    fedsim("report", "runs/demo", *(str(path) for path in (work / "runs" / "table1").glob("f*/")), "--out", "page")
    assert (work / "page" / "report.html").stat().st_size > 10_000
    assert "needs docs/results of a clone" in fedsim("table1", "--publish", status=2)
    assert "--rows not given" in fedsim("costs", status=2)


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
