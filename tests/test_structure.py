"""Guards over the source: imports go one way, each library behind its module, sizes, docstrings, a light import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "gemsjax").rglob("*.py"), *(ROOT / "experiments").glob("*.py")])
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in FILES}

# Each row may import the rows above it (and its own).
LAYERS = [
    ("gemsjax.errors", "gemsjax.types", "gemsjax.clock", "gemsjax.devices", "gemsjax.disk"),
    (
        "gemsjax.envs",
        "gemsjax.maths",
        "gemsjax.nets",
        "gemsjax.replay",
        "gemsjax.shares",
        "gemsjax.checkpoint",
        "gemsjax.tracking",
    ),
    ("gemsjax.personalisation", "gemsjax.ranking", "gemsjax.on_policy"),
    ("gemsjax.belief", "gemsjax.rankers"),
    ("gemsjax.agents",),
    ("gemsjax.rollout",),
    ("gemsjax.evaluate", "gemsjax.pretrain", "gemsjax.train", "gemsjax.datasets", "gemsjax.methods"),
    ("gemsjax.transitions",),
    (
        "gemsjax.plots",
        "gemsjax.plots_personalisation",
        "gemsjax.plots_offline",
        "gemsjax.plots_ranking",
        "gemsjax.plots_recsim",
        "gemsjax.offline",
    ),
    ("gemsjax.settings",),
    ("gemsjax.prepare",),
    ("gemsjax.runs",),
    ("gemsjax.sweep",),
    ("experiments",),
]
NEVER = {
    "gemsjax.agents": ("gemsjax.envs", "gemsjax.rollout"),
    "gemsjax.envs": ("gemsjax.nets", "gemsjax.agents", "gemsjax.belief"),
    "gemsjax.maths": ("gemsjax.nets", "gemsjax.envs"),
}
BEHIND = {
    "distrax": {"gemsjax.maths.distributions"},
    "orbax": {"gemsjax.checkpoint"},
    "matplotlib": {
        "gemsjax.plots",
        "gemsjax.plots_personalisation",
        "gemsjax.plots_offline",
        "gemsjax.plots_ranking",
        "gemsjax.plots_recsim",
    },
    "pick" + "le": set(),
    "dill": set(),
    "cloudpick" + "le": set(),
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Modules that a file imports, with the names taken from packages of ours."""
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer(name: str) -> int:
    matches = [number for number, row in enumerate(LAYERS) for package in row if inside(name, package)]
    assert matches, f"{name} is in no layer: add it to LAYERS"
    return matches[0]


@pytest.mark.parametrize("path", FILES, ids=NAMES.values())
def test_imports_go_one_way(path):
    name = NAMES[path]
    if name == "gemsjax":  # the public face
        return
    ours = {module for module in imports(path) if any(inside(module, p) for row in LAYERS for p in row)}
    too_high = {module for module in ours if layer(module) > layer(name)}
    assert not too_high, f"{name} imports {too_high} from a higher layer"
    for package, forbidden in NEVER.items():
        if inside(name, package):
            assert not {module for module in ours for bad in forbidden if inside(module, bad)}


@pytest.mark.parametrize("path", FILES, ids=NAMES.values())
def test_libraries_stay_behind_their_modules(path):
    found = imports(path)
    for library, allowed in BEHIND.items():
        if NAMES[path] not in allowed:
            assert not {module for module in found if inside(module, library)}
    if not inside(NAMES[path], "gemsjax.nets"):
        assert not {module for module in found if inside(module, "flax.linen") or inside(module, "flax.nnx")}


@pytest.mark.parametrize("path", FILES, ids=NAMES.values())
def test_house_sizes(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", [p for p in FILES if NAMES[p].startswith("gemsjax")], ids=lambda p: NAMES[p])
def test_everything_public_has_a_docstring(path):
    module = parse(path)
    assert ast.get_docstring(module)
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_import_is_light():
    heavy = ("distrax", "orbax", "matplotlib", "tensorflow_probability")
    program = f"import sys, gemsjax; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_no_module_imports_itself_by_way_of_others():
    ours = set(NAMES.values())
    waiting = {NAMES[path]: imports(path) & ours - {NAMES[path]} for path in FILES}
    for name, found in waiting.items():  # `from package import module` needs the module, not what the package collects
        packages = {package for package in found for other in found if other.startswith(package + ".")}
        waiting[name] = found - packages
    while free := [name for name, found in waiting.items() if not found & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, f"these import each other in a circle: {sorted(waiting)}"


def test_arrays_are_read_without_running_what_is_in_a_file():
    wrong = [
        f"{NAMES[path]}, line {node.lineno}"
        for path in FILES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "np.load"
        if {word.arg: ast.unparse(word.value) for word in node.keywords}.get("allow_pick" + "le") != "False"
    ]
    assert not wrong
