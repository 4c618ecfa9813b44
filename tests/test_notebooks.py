"""Notebooks run from start to end, their two files agree, and what is stored in them names no place on a disk.

After editing one of a pair, `jupytext --sync notebooks/NAME.py` brings the other in step (outputs of changed cells go).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import jax
import jupytext
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

from experiments import quickstart
from gemsjax.agents.sac import SACHypers
from gemsjax.settings import GeMSSettings, TrainSettings
from gemsjax.train import Plan

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 700_000
"""Bytes that the stored pictures of one notebook may take."""
ABSOLUTE_PATH = re.compile(r"(?<![\w.,/])(?:/[\w.+-]+){2,}|\b[A-Za-z]:\\\w")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook):
    return [output.data["image/png"] for output in outputs(notebook) if "image/png" in output.get("data", {})]


def texts(notebook):
    """All text in the outputs."""
    for output in outputs(notebook):
        yield output.get("text", "")
        yield from (value for kind, value in output.get("data", {}).items() if kind.startswith("text/"))
        yield from output.get("traceback", [])


def test_absolute_paths_are_recognised():
    for text in ("see /home/ada/runs", "'/var/x'", "PosixPath('/a/b')", r"C:\runs"):
        assert ABSOLUTE_PATH.search(text), text
    for text in ("runs/notebook/logs", "5,624/5,624 batches  138/s", "users / turns", "a/b", "1/2/3"):
        assert not ABSOLUTE_PATH.search(text), text


def test_there_is_a_pair_of_files_for_every_notebook():
    assert {path.stem for path in NOTEBOOKS} == {path.stem for path in (ROOT / "notebooks").glob("*.py")} != set()


@every_notebook
def test_both_files_say_the_same(path):
    notebook, script = jupytext.read(path), jupytext.read(path.with_suffix(".py"))
    for one in (notebook, script):
        assert one.metadata["jupytext"]["formats"] == "ipynb,py:percent"
        assert one.metadata["kernelspec"]["name"] == "python3"
    kinds_and_sources = [
        [(cell.cell_type, cell.metadata.get("tags", []), cell.source) for cell in one.cells]
        for one in (notebook, script)
    ]
    assert kinds_and_sources[0] == kinds_and_sources[1], "run jupytext --sync"


@every_notebook
def test_stored_outputs_are_small_and_name_no_place(path):
    notebook = jupytext.read(path)
    assert not [text for text in texts(notebook) if ABSOLUTE_PATH.search(text)]
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert sum(map(len, pictures(notebook))) < LARGEST


@pytest.mark.parametrize("smoke", [False, True])
def test_the_settings_are_those_of_the_quickstart(smoke):
    cells = jupytext.read(ROOT / "notebooks" / "01_simulator_and_quickstart.py").cells
    (source,) = [cell.source for cell in cells if "settings" in cell.metadata.get("tags", [])]
    names = {"TrainSettings": TrainSettings, "GeMSSettings": GeMSSettings, "Plan": Plan, "SACHypers": SACHypers}
    names["SMOKE"] = smoke
    exec(source, names)
    assert names["settings"] == quickstart.preset(quickstart.Arguments(smoke=smoke))


@pytest.fixture
def kernel_of_these_tests(tmp_path, monkeypatch):
    """Notebooks run with this interpreter, this checkout and the tests' compilation cache, and leave nothing behind.

    A registered kernel could belong to another environment, and a fresh environment has none.
    """
    write_kernel_spec(tmp_path / "jupyter" / "kernels" / "python3")
    for variable, directory in {
        "JUPYTER_PATH": "jupyter",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "IPYTHONDIR": "ipython",
        "TMPDIR": "scratch",
    }.items():
        (tmp_path / directory).mkdir(exist_ok=True)
        monkeypatch.setenv(variable, str(tmp_path / directory))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(seconds))
    monkeypatch.delenv(
        "MPLBACKEND", raising=False
    )  # of a machine without a display; the kernel draws into the notebook
    monkeypatch.setenv("GEMSJAX_NOTEBOOK_SMOKE", "1")


@pytest.mark.optimised
@every_notebook
def test_it_runs_from_start_to_end(path, tmp_path, kernel_of_these_tests):
    working_directory = tmp_path / "here"
    working_directory.mkdir()
    notebook = jupytext.read(path.with_suffix(".py"))
    drawing = sum("plt.show()" in cell.source for cell in notebook.cells if cell.cell_type == "code")
    resources = {"metadata": {"path": str(working_directory)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()  # raises if a cell does
    assert len(pictures(notebook)) == drawing > 0
    assert not [text for text in texts(notebook) if ABSOLUTE_PATH.search(text)]
    assert not list(working_directory.iterdir()), "at smoke size everything goes to a temporary directory"
