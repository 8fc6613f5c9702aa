"""Rules of the house that a reader relies on."""

import ast
import subprocess
import sys

from conftest import ROOT

COMMANDS = {path.stem for path in ROOT.glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
METHOD = {"augment", "patch_matching", "losses", "vision_transformer"}
MODULES = [path.stem for path in ROOT.glob("*.py")] + [f"support.{path.stem}" for path in ROOT.glob("support/*.py")]

STATE = """
import importlib, os, random, signal, sys, threading, warnings
import cv2, matplotlib, numpy as np, torch

def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals() if number not in (signal.SIGKILL,)]
    threads = cv2.getNumThreads(), torch.get_num_threads()
    # PyTorch and scikit-learn set these.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TORCH", "KMP"))}
    return environment, handlers, threads, threading.excepthook, dict(matplotlib.rcParams)

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
for was, now in zip(before, state()):
    assert was == now, (was, now)
"""


def imports_of(path):
    """Return the names of the modules of this repository that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_support_and_the_method_import_no_command():
    assert {"main_lgssl", "eval_knn", "reproduce"} <= COMMANDS
    for path in [*ROOT.glob("support/*.py"), *(ROOT / f"{name}.py" for name in METHOD)]:
        assert not imports_of(path) & COMMANDS, path
    for name in METHOD:  # geometry, views and networks do not know each other
        assert not imports_of(ROOT / f"{name}.py") & METHOD, name
    for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]:
        assert not any(name.split(".")[0] == "studies" for name in imports_of(path)), path


def test_importing_a_file_changes_nothing_in_the_process():
    process = subprocess.run([sys.executable, "-c", STATE, *MODULES], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
