"""What is installed: a wheel holds every source file of the four folders, in the package, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"pifa_compiler": "pifa_compiler"} | {
    name: f"pifa_compiler/{name}" for name in ("passes", "kernels", "export")
}
SOURCES = (".py", ".cpp", ".c", ".typed")


def build_wheel(folder: Path) -> Path:
    """Builds in a copy of the tree: what earlier builds have left in build/ would get into the wheel."""
    left_out = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.egg-info", "results", "pifa-demo")
    shutil.copytree(ROOT, folder / "tree", ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", "."]
    subprocess.run([*command, "./tree"], cwd=folder, check=True, capture_output=True, text=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_a_wheel_holds_all_sources_and_nothing_else(tmp_path: Path) -> None:
    wanted = {
        f"{installed}/{file.relative_to(ROOT / folder)}"
        for folder, installed in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in SOURCES
    }
    wheel = build_wheel(tmp_path)
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {"pifa_compiler/py.typed", "pifa_compiler/kernels/linear_cpu.cpp"} <= wanted
    assert found == wanted
