"""One import name over four folders: layout, the direction of imports, the `kernels` name, and the wheel."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import import_utils

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fla_compile", "kernels", "passes", "models")


def python(code: str, *, cwd: Path, executable: Path | str = sys.executable, path: Path | None = None) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": str(path)} if path else {})
    run = subprocess.run([executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_top_level_folders_are_those_of_the_contract():
    contract = {*FOLDERS, "examples", "tests", "benchmarks"}
    assert {path.parent.name for path in ROOT.glob("[!.]*/*.py")} == contract
    assert not (ROOT / "kernels" / "__init__.py").exists(), "a regular package `kernels` hides Hugging Face's"
    assert (ROOT / "fla_compile" / "py.typed").exists()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module named by an import in `path`, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno}: relative import; folders are mapped, so name the module whole"
            )
            yield node.module or "", node.lineno
            if node.module == "fla_compile":
                yield from ((f"fla_compile.{alias.name}", node.lineno) for alias in node.names)


@pytest.mark.parametrize(
    ("folder", "outside", "inside"),
    [
        ("kernels", {"torch", "triton"}, {"kernels"}),
        ("passes", {"torch"}, {"passes", "kernels"}),
        ("models", {"torch", "transformers"}, {"models"}),
    ],
)
def test_imports_flow_one_way(folder, outside, inside):
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for module, line in imports(path):
            top, _, rest = module.partition(".")
            ours = top == "fla_compile"
            allowed = (
                (rest.partition(".")[0] in inside or not rest) if ours else top in outside | sys.stdlib_module_names
            )
            if not allowed or (ours and not rest and not imports_only_folders(path, line, inside)):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {module}")
    assert not wrong, "\n".join(wrong)


def imports_only_folders(path: Path, line: int, inside: set[str]) -> bool:
    """Whether the import at `line` is `from fla_compile import <one of inside>`."""
    return any(
        isinstance(node, ast.ImportFrom) and node.lineno == line and all(alias.name in inside for alias in node.names)
        for node in ast.walk(ast.parse(path.read_text()))
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_our_folders_are_never_imported_as_top_level_modules(folder):
    for path in sorted(p for f in (*FOLDERS, "examples", "benchmarks") for p in (ROOT / f).rglob("*.py")):
        names = {module.partition(".")[0] for module, _ in imports(path)}
        assert folder == "fla_compile" or folder not in names, path


STUB = """
__version__ = "0.18.2"

def use_kernel_forward_from_hub(*args, **kwargs):
    return lambda layer: layer

replace_kernel_forward_from_hub = use_kernelized_func = use_kernel_func_from_hub = use_kernel_forward_from_hub

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *args, **kwargs: None})
"""


@pytest.fixture
def kernels_stub(tmp_path):
    """A regular package `kernels`, installed: Hugging Face's, as far as transformers can tell when imported."""
    version = import_utils.KERNELS_MIN_VERSION
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(STUB)
    info = tmp_path / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return tmp_path


@pytest.mark.parametrize("first", ["kernels", "fla_compile.kernels"])
def test_from_the_repository_root_both_kernels_can_be_imported(kernels_stub, first):
    code = f"""
import {first}
import kernels, fla_compile, fla_compile.kernels
from transformers import PreTrainedModel
from transformers.utils import is_kernels_available
assert is_kernels_available(), "the stub must be one that transformers uses"
print(kernels.__file__, *fla_compile.kernels.__path__, sep="\\n")
"""
    stub, *ours = python(code, cwd=ROOT, path=kernels_stub).splitlines()
    assert Path(stub) == kernels_stub / "kernels" / "__init__.py"
    assert str(ROOT / "kernels") in ours


def test_from_the_repository_root_without_the_other_kernels_transformers_works():
    python("import fla_compile.kernels; from transformers import PreTrainedModel", cwd=ROOT)


def test_a_checkout_uses_its_own_folders_where_another_is_installed(tmp_path):
    """An editable install of another checkout finds `fla_compile.passes` too, and stands first."""
    code = f"""
import sys
from importlib.machinery import PathFinder

class Installed:
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{str(tmp_path)!r}]) if name.startswith("fla_compile.") else None

sys.meta_path.append(Installed)
from importlib.util import find_spec
print(*(find_spec("fla_compile." + folder).origin for folder in ("passes", "models")), sep="\\n")
"""
    for folder in ("passes", "models"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    files = python(code, cwd=tmp_path, path=ROOT).splitlines()
    assert files == [str(ROOT / folder / "__init__.py") for folder in ("passes", "models")]


COMPILE = '''
"""What a user runs with the wheel installed: nothing here imports fla_compile."""
import sys

import torch


def naive(q, k, v, g):
    S = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    o = torch.zeros_like(v)
    for t in range(q.shape[1]):
        S = S * g[:, t].exp()[..., None] + k[:, t][..., None] * v[:, t][..., None, :]
        o[:, t] = (q[:, t, :, :, None] * S).sum(-2)
    return o


def run(f, inputs):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o = f(*leaves)
    return o, *torch.autograd.grad(o.square().sum(), leaves)


torch.manual_seed(0)
q, k, v = (torch.randn(2, 48, 2, 16) for _ in range(3))
inputs = q, k, v, torch.nn.functional.logsigmoid(torch.randn(2, 48, 2, 16))
assert "fla_compile" not in sys.modules
got = run(torch.compile(naive, backend="fla", fullgraph=True), inputs)
for a, b in zip(got, run(naive, inputs), strict=True):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()  # the first gradient of g is zero, of numbers that cancel
import fla_compile

report = fla_compile.explain(naive, *inputs)
print(fla_compile.__file__, *(rewrite.family for rewrite in report.rewrites), sep="\\n")
'''


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: building leaves files in the source tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(build, cwd=out, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def wheel_python(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel installed, and this environment's packages, but not its editable install."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    executable = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(executable)]
    install = [*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
    run = subprocess.run(install, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # A folder that a .pth names is searched last, and .pth files inside it (the editable install's) are not read.
    site = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv, executable=executable))
    parents = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (site / "packages_of_the_parent.pth").write_text("\n".join(parents) + "\n")
    return executable


def test_the_wheel_holds_every_folder_and_nothing_at_top_level(wheel_python, tmp_path):
    code = """
import importlib.util as u, fla_compile, fla_compile.kernels, fla_compile.passes, fla_compile.models
print(fla_compile.__file__)
assert not any(u.find_spec(name) for name in ("passes", "models", "tests", "examples", "benchmarks"))
"""
    assert python(code, cwd=tmp_path, executable=wheel_python).startswith(str(wheel_python.parent.parent))


def test_the_wheel_has_every_source_file_and_the_licence(wheel):
    listing = subprocess.run([sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True).stdout
    for path in (p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        relative = path.relative_to(ROOT).as_posix()
        assert f"{relative if relative.startswith('fla_compile/') else 'fla_compile/' + relative} " in listing
    assert "fla_compile/py.typed" in listing
    assert "licenses/LICENSE" in listing


def test_the_wheel_compiles_from_an_unrelated_folder_without_an_import(wheel_python, tmp_path):
    script = tmp_path / "user.py"
    script.write_text(COMPILE)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run([wheel_python, script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    origin, *families = run.stdout.strip().splitlines()
    assert origin.startswith(str(wheel_python.parent.parent)), "the wheel's own files must be the ones imported"
    assert families == ["gla"]
