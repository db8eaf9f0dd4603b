"""The house: stems of ops complete, files short, layers kept."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 550
MAX_FUNCTION = 80
FOLDERS = {"benchmarks", "csrc", "docs", "kernels", "launch", "tests", "vadit"}
DOCUMENTS = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}
FILES = {"Makefile", "constraints.txt", "pyproject.toml", "setup.py"}
SUFFIXES = (".py", ".cpp", ".cu", ".h", ".cuh", ".sh", ".sbatch")


def tracked(*patterns: str) -> list[str]:
    """Files that git knows."""
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def test_every_op_has_its_stem_everywhere() -> None:
    from vadit import kernels
    from vadit.kernels.dispatch import NOT_WRITTEN, OPS

    assert set(OPS) == {"adamw_ema", "gated_norm", "group_norm_silu", "rms_norm", "rope", "swiglu", "vf_loss"}
    for folder, pattern in {
        "kernels/ops": "{}.py",
        "kernels/ops/triton_kernels": "{}.py",
        "csrc/cpu": "{}.cpp",
        "csrc/cuda": "{}.cu",
        "tests": "test_op_{}.py",
        "benchmarks": "bench_{}.py",
    }.items():
        ops = [op for op in OPS if (op, Path(folder).name) not in NOT_WRITTEN]
        for op in ops:
            assert (ROOT / folder / pattern.format(op)).is_file(), (folder, op)
        found = {path.name for path in (ROOT / folder).glob(pattern.format("*"))}
        if folder.startswith("csrc") or folder == "tests":
            # float8's casts serve layers of a GPU alone, and are no op that is chosen among backends
            assert found - {"bindings.cpp", "test_op_float8.py"} == {pattern.format(op) for op in ops}, folder
    assert all(callable(getattr(kernels, op)) for op in OPS)


def test_what_lies_at_the_top() -> None:
    visible = {entry for entry in (path.split("/")[0] for path in tracked()) if not entry.startswith(".")}
    assert visible <= FOLDERS | FILES | DOCUMENTS
    assert all((ROOT / name).exists() for name in FOLDERS)
    assert {path.name for path in (ROOT / "vadit").glob("*.py")} <= {"__init__.py", "__main__.py", "cli.py"}
    # a top-level package named kernels would shadow another project's
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_are_short() -> None:
    folders = ("vadit", "kernels", "csrc", "tests", "benchmarks", "launch")
    sources = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    assert {str(path) for path in sources if len(path.read_text().splitlines()) > MAX_LINES} == set()


def test_functions_are_short() -> None:
    """Kernels excepted: one is as long as its formula."""
    long = {
        f"{path.relative_to(ROOT)}: {node.name}": length
        for folder in ("vadit", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION
    }
    assert long == {}


@pytest.mark.parametrize("folder", ["vadit", "benchmarks"])
def test_no_files_import_each_other_in_a_circle(folder: str) -> None:
    """Imports inside functions and for type checkers count, too."""
    files = {module_name(path): path for path in (ROOT / folder).rglob("*.py")}
    if folder == "benchmarks":  # they lie beside each other, and import so
        files = {name.removeprefix("benchmarks."): path for name, path in files.items()}
    graph = {name: imported_modules(path) & files.keys() - {name} for name, path in files.items()}
    assert sum(map(len, graph.values())) > len(graph) // 2  # imports are found at all
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path) -> set[str]:
    """Modules that a file imports at any depth; of `from a import b` both a.b, which may be one, and a if it is not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if (ROOT / (name.replace(".", "/") + ".py")).is_file()}
            modules |= {name for name in inner if (ROOT / name.replace(".", "/") / "__init__.py").is_file()}
            found |= modules if len(modules) == len(inner) else modules | {node.module}
    return found


def test_public_names_are_there_and_load_only_when_asked_for() -> None:
    code = """
import sys, vadit
assert not {"torch", "numpy", "tyro"} & set(sys.modules), "import vadit is to be quick"
assert set(vadit.__all__) <= set(dir(vadit))
print(*(f"{getattr(vadit, name).__module__}.{name}" for name in vadit.__all__))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [name.rpartition(".")[2] for name in done.stdout.split()] == [
        *("LightningDiT", "Autoencoder", "load_reference_dit", "load_reference_autoencoder", "sample_ode"),
        *("LatentDataset", "LatentLoader"),
    ]


def test_layers_are_kept() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    if not Path(command[0]).is_file():
        pytest.skip("import-linter is not installed")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_foreign_packages_have_one_door_and_kernels_know_nothing_of_vadit() -> None:
    doors = {"timm": "foundation.py", "torchdiffeq": "solvers.py", "torch_fidelity": "inception.py"}
    for path in (ROOT / "vadit").rglob("*.py"):
        assert path.name == "formats.py" or not re.search(r"Image\.open\(|imread\(", path.read_text()), path
        foreign = {name.split(".")[0] for name in imported_modules(path)} & doors.keys()
        assert all(doors[package] == path.name for package in foreign), path
    for path in (ROOT / "kernels" / "ops").rglob("*.py"):
        above = {name for name in imported_modules(path) if re.match(r"vadit(?!\.kernels)\b.", name)}
        assert not above, (path.name, above)


def test_one_module_prints() -> None:
    """Who prints elsewhere forgets to escape: `say`, `note` and `show` of vadit.runtime.console."""
    doors = {"runtime/console.py", "cli.py", "train/watchdog.py"}  # an error of the command, and a process's last words
    for path in (ROOT / "vadit").rglob("*.py"):
        named = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        printing = {
            name for name in named if re.search(r"^print$|std(out|err)\W*\.write|^traceback\.print|onsole\b", name)
        }
        assert not printing or str(path.relative_to(ROOT / "vadit")) in doors, (path, printing)


def test_scripts_of_the_front_door_are_executable() -> None:
    for name in (".ci/run", "launch/train.sh", "launch/torchrun.sh"):
        path = ROOT / name
        assert path.stat().st_mode & 0o100, name
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0, name
