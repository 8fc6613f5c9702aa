"""What --help says, of each file that can be run as a script."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.py", "benchmarks/*.py", "tests/*.py")
    for path in ROOT.glob(pattern)
    if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")
)


@pytest.fixture
def parser_of(monkeypatch):
    """Run a script up to the parsing of its arguments and return its parser."""

    class Parses(Exception):
        pass

    def stop(parser, *args, **kwargs):
        raise Parses(parser)

    def run(script):
        name = script.stem if script.parts[0] != "benchmarks" else f"benchmarks.{script.stem}"
        monkeypatch.setattr(sys, "argv", [str(script)])
        main = importlib.import_module(name).main
        # The base of all ways to parse
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(Parses) as parses:
            main()
        return parses.value.args[0]

    return run


def test_scripts_are_found():
    assert {"main_lgssl.py", "plot_runs.py", "benchmarks/bench_step.py"} <= {path.as_posix() for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_is_complete(parser_of, script):
    check_parser(parser_of(script))


def check_parser(parser):
    assert parser.description
    options = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    assert options
    for action in options:
        if isinstance(action, argparse._SubParsersAction):
            assert len(action._choices_actions) == len(action.choices)  # each with a help
            for sub in action.choices.values():
                check_parser(sub)
            continue
        assert action.help, f"{action.dest} has no help"
        text = parser._get_formatter()._expand_help(action)
        if action.option_strings and action.default is not None and not action.required:
            assert "default: " in text, f"{action.dest} does not say its default"
            default = " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
            assert default in text, f"{action.dest} says another default than {action.default}"


@pytest.mark.slow
def test_help_and_runs_on_windows(run_script, tmp_path):
    """All scripts in one process, without the parts of Python that Windows lacks, and then a run with a worker."""
    program = tmp_path / "program.py"
    program.write_text(WINDOWS)
    scripts = [str(path.with_suffix("")) for path in SCRIPTS if path.parent == Path()]
    process = run_script(program, tmp_path / "out", *scripts)
    assert process.stdout.count("usage: ") == len(scripts)
    assert "done: " in process.stdout
    assert "top-1" in process.stdout


WINDOWS = """
import importlib, multiprocessing, os, signal, sys

def main():
    from torch.utils.data._utils import signal_handling

    signal_handling._set_SIGCHLD_handler = lambda: None  # as on Windows
    for name in "SIGUSR1 SIGUSR2 SIGCHLD SIGALRM SIGHUP SIGPIPE alarm".split():
        delattr(signal, name)
    for name in "fork forkpty getuid sched_getaffinity mkfifo uname".split():
        delattr(os, name)
    sys.modules["fcntl"] = sys.modules["resource"] = sys.modules["pwd"] = None  # importing these fails
    multiprocessing.set_start_method("spawn")
    out, *scripts = sys.argv[1:]
    modules = {name: importlib.import_module(name) for name in scripts}
    for name, module in modules.items():
        sys.argv[:] = [f"{name}.py", "--help"]
        try:
            module.main()
        except SystemExit as error:
            assert error.code == 0
    run = "--dataset digits --arch vit_micro --patch_size 8 --image_size 40 --global_crops_size 32 --epochs 1 "
    run += "--local_crops_size 16 --local_crops_number 1 --out_dim 24 --head_hidden_dim 32 --batch_size_per_gpu 350 "
    modules["main_lgssl"].main([*run.split(), "--num_workers", "1", "--output_dir", out])
    weights = ["--pretrained_weights", f"{out}/checkpoint.pth", "--num_workers", "1", "--batch_size_per_gpu", "900"]
    modules["eval_knn"].main(["--dataset", "digits", *weights])

sys.path.insert(0, os.getcwd())
if __name__ == '__main__':
    main()
"""
