"""What surrounds the package stays true: one place for versions, README's commands, imports, the package copied."""

import ast
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from cases import NEEDS_INTERPRETER, NO_GPU, run_python

REPOSITORY = pathlib.Path(__file__).parents[1]
PACKAGE = REPOSITORY / "omni_kernels"
README = (REPOSITORY / "README.md").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
COMMANDS = re.findall(r"^```bash\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)

# Routes one token, checks the result and the gradient, and says what it imported; {name} is what the package is called.
ROUTE_SOMETHING = """
import sys, torch, {name}
x = torch.zeros(1, 2, requires_grad=True)
scores, indices = {name}.omni_router(x, torch.tensor([[1.0, 3.0]]), 3)
scores.sum().backward()
assert scores.tolist() == [[3.0, 3.0, 1.0]] and indices.tolist() == [[1, 3, 0]] and x.grad.tolist() == [[2.0, 1.0]]
print("omni_kernels" in sys.modules)
"""


def test_environment_has_no_versions_of_its_own():
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())
    python, pip, through_pip = environment["dependencies"]
    assert environment["name"] == PROJECT["name"]
    assert python == "python" + PROJECT["requires-python"]
    assert pip == "pip"
    assert through_pip == {"pip": ["-e .[study,test]"]}


def test_readme_has_the_three_commands():
    study, tests, jupyter = COMMANDS
    assert study.endswith("python notebooks/study\n")
    assert jupyter.endswith("python notebooks/study --lab\n")
    assert tests.endswith("--nbval notebooks\n")
    for command in COMMANDS:
        assert command.startswith("python3 -m venv .venv &&\n")
        (extra,) = re.findall(r"'\.\[(\w+)\]'", command)
        assert extra in PROJECT["optional-dependencies"]


def test_ci_runs_the_test_command_of_readme():
    (found,) = re.findall(r"^command=\$\((.*)\)$", (REPOSITORY / ".ci/run").read_text(), flags=re.MULTILINE)
    run = subprocess.run(["bash", "-c", found], cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=True)
    assert run.stdout == COMMANDS[1]
    steps = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}


def test_ci_runs_tests_of_every_kernel_with_the_oldest_triton():
    run = (REPOSITORY / ".ci/run").read_text()
    (oldest,) = re.findall(r"triton>=([\d.]+)", " ".join(PROJECT["dependencies"]))
    pattern = re.search(r"sed -nE 's/(.*)/\\1/p' pyproject.toml", run)[1]
    assert re.findall(pattern, (REPOSITORY / "pyproject.toml").read_text(), flags=re.MULTILINE) == [oldest]
    tests = {path.name: path.read_text() for path in (REPOSITORY / "tests").glob("test_*.py")}
    for part in re.search(r"-k '(.*)' tests$", run, flags=re.MULTILINE)[1].split(" or "):
        assert any(re.search(rf"^def test_\w*{part}", text, flags=re.MULTILINE) for text in tests.values())


def test_the_study_runs_with_one_pytorch_and_one_triton():
    """Triton's version is the one that PyTorch's builds for GPUs ask for: where PyTorch names one, they agree."""
    pins = dict(line.split("==") for line in PROJECT["optional-dependencies"]["notebooks"] if "==" in line)
    assert set(pins) == {"torch", "triton"}
    asked = [line for line in importlib.metadata.requires("torch") if re.match(r"triton\b", line)]
    if importlib.metadata.version("torch").startswith(pins["torch"]) and asked:
        assert f"triton=={pins['triton']}" in asked[0].replace(" ", "")


def test_readme_links_exist_and_list_every_notebook():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert [link for link in links if not (REPOSITORY / link).exists()] == []
    notebooks = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "notebooks").glob("*.ipynb"))
    assert [link for link in links if link.endswith(".ipynb")] == notebooks


def test_readme_names_the_versions_that_are_needed():
    needed = dict(re.findall(r"(\w+)>=([\d.]+)", " ".join(PROJECT["dependencies"])))
    versions = {
        "Python": PROJECT["requires-python"].removeprefix(">="),
        "PyTorch": needed["torch"],
        "Triton": needed["triton"],
    }
    assert dict(re.findall(r"badge/(\w+)-≥([\d.]+)-", README)) == versions
    assert (
        f"- Python {versions['Python']}, PyTorch {versions['PyTorch']} and Triton {versions['Triton']}, or later"
        in README
    )


def test_package_imports_only_pytorch_triton_and_the_standard_library():
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    assert {"torch", "triton"} <= imported
    assert imported <= {"torch", "triton"} | sys.stdlib_module_names


# A module imports from the rows above its own alone. "" is the package itself.
LAYERS = [
    ["checks", "configs"],
    ["reference", "row_sums"],
    ["distributed"],
    ["operators", "factored.plan", "factored.ptx"],
    ["factored.keys", "factored.networks", "factored.softmax", "factored.prefix"],
    ["factored.pairs", "factored.rows", "factored.replay"],
    ["factored.frontier", "factored.lanes", "factored.tile"],
    ["factored.candidates", "factored.lists"],
    ["factored"],
    ["sharded"],
    ["backward", "forward", "original", "split_forward"],
    ["router"],
    ["adaptive"],
    [""],
]


def imported_modules(name, path):
    """The package's modules, by their names as in LAYERS, that a module of it imports from."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [part for part in package[: len(package) + 1 - node.level] if part]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                target = ".".join([*base, alias.name])
                yield target if any(target in layer for layer in LAYERS) else ".".join(base)


def test_imports_point_one_way():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    paths = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        paths[".".join(part for part in parts if part != "__init__")] = path
    assert set(paths) == set(rank)
    imports = [(name, target) for name, path in paths.items() for target in imported_modules(name, path)]
    assert ("factored", "factored.lanes") in imports
    assert ("factored.lanes", "configs") in imports
    assert [(name, target) for name, target in imports if rank[target] >= rank[name]] == []


def run_without_gpu(name, folder, interpret):
    environment = NO_GPU | {"PYTHONPATH": ""} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    return run_python("-c", ROUTE_SOMETHING.format(name=name), folder=folder, **environment).split()


def test_works_without_gpu_and_interpreter():
    assert run_without_gpu("omni_kernels", REPOSITORY, interpret=False) == ["True"]


@pytest.mark.parametrize(
    "interpret", [False, pytest.param(True, marks=NEEDS_INTERPRETER)], ids=["pytorch", "interpreter"]
)
def test_works_elsewhere_under_another_name(tmp_path, interpret):
    for name in ("their_router", "un_café"):
        shutil.copytree(PACKAGE, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        assert run_without_gpu(name, tmp_path, interpret) == ["False"]
