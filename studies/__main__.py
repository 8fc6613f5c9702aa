"""Studies in small, which run on two CPU cores.

    python -m studies list                                       studies, rows, and what is done
    python -m studies run solar --row mean --seeds 1             run what is not done yet, and print the tables
    python -m studies search solar                               search for the settings of a study
    python -m studies report solar                               print the tables of the committed results
    python -m studies causes                                     draw why CLS outputs become uniform on digits
    python -m studies make-scenes --packages P --output SCENES   compose images of several objects, with masks

Options after `--` go to main_lgssl.py, for example `-- --use_bn_in_head false`.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from studies.causes import CAUSES, show_causes
from studies.rows import SEARCH_SEED, SEARCHES, STUDIES, search_of
from studies.runs import Place, commands, finished, run_study, settings
from studies.scenes import make_scenes
from support.arguments import ROOT, ArgumentParser, number
from utils import UserError, run_main


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    rest = "-- OPTIONS go to main_lgssl.py."
    parser = ArgumentParser(prog="studies", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, studies: Sequence[str], epilog: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=epilog)
        if studies:
            sub.add_argument("study", metavar="STUDY", choices=studies, help=", ".join(studies))
        return sub

    listing = command("list", "list studies, rows, and what is done", [])
    report = command("report", "print the tables of a study", list(STUDIES))
    report.add_argument("--runs", type=Path, default=ROOT / "studies", help="folder of STUDY.csv")
    run = command("run", "run the rows of a study that are not done", list(STUDIES), rest)
    add = run.add_argument_group("rows").add_argument
    add("--row", nargs="+", help="rows of the study as printed by `list`; default: all")
    add("--seeds", type=number(int, 1), help="number of seeds; default: that of each row, 1 to 5")
    add("--show", action="store_true", help="print the commands instead of running them")
    search = command("search", "search for the settings of DINO and of the mean loss", SEARCHES, rest)
    add = search.add_argument_group("trials").add_argument
    add("--trials", type=number(int, 1), default=12, help="number of trials per method")
    causes = command("causes", "draw why the teacher's CLS outputs become uniform on digits", [], rest)
    add = causes.add_argument_group("rows and figure").add_argument
    add("--row", nargs="+", default=list(CAUSES.rows), help="rows to train if they are not done, and to draw")
    add("--seeds", type=number(int, 1), default=1, help="number of seeds to train; all that are done are drawn")
    add("--output", default="causes.png", help="figure to write, PNG or PDF")
    scenes = command("make-scenes", "compose the images and masks of the study on scenes", [])
    add = scenes.add_argument_group("scenes").add_argument
    add("--packages", type=Path, required=True, help="folder of the unpacked Debian packages, see docs/study.md")
    add("--output", type=Path, required=True, help="new folder of the scenes; the study expects DATA/scenes")
    add("--train", type=number(int, 1), default=4000, help="number of training scenes")
    add("--val", type=number(int, 1), default=600, help="number of validation scenes, of seen and of new stamps each")
    add("--size", type=number(int, 16, 1024), default=96, help="side of a scene in pixels")
    add("--seed", type=number(int, 0), default=0, help="seed of all scenes")
    add("--jobs", type=number(int, 1), default=os.cpu_count() or 1, help="number of processes")
    for sub in (run, search):
        add = sub.add_argument_group("where and how").add_argument
        add("--data_root", type=Path, default="DATA", help="folder of the data sets: fashion-mnist, scenes")
        add("--jobs", type=number(int, 1), default=min(os.cpu_count() or 1, 8), help="number of simultaneous runs")
    for sub in (listing, run, search, causes):
        sub.add_argument("--runs", type=Path, default="runs", help="folder of all runs and results")
    args = parser.parse_with_extra(argv)
    if args.command == "run":
        parser.check_rows(args.row, STUDIES[args.study].rows, args.study)
    elif args.command == "causes":
        parser.check_rows(args.row, CAUSES.rows, "causes")
    return args


def list_studies(runs: Path) -> None:
    """Print each study and row, and how many seeds of it are done."""
    for study in STUDIES.values():
        done = finished(study, runs)
        print(f"{study.name}: {study.title}")
        for name, row in study.rows.items():
            own = settings(commands(study, name, 0, Place(runs)))
            count = sum(key[0] == name and key[2] == own for key in done)
            print(f"  {name:18} {row.recipe or 'no pretraining':14} {count} of {row.seeds} seeds done")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        from studies.report import report, search_report
    except ImportError as error:
        raise UserError("studies need pandas: pip install pandas") from error
    if args.command == "list":
        list_studies(args.runs)
        return
    if args.command == "make-scenes":
        make_scenes(args.packages, args.output, args.train, args.val, args.size, args.seed, args.jobs)
        return
    if args.command == "causes":
        os.environ["OMP_NUM_THREADS"] = "1"  # as in the runs of other studies
        torch.set_num_threads(1)
        show_causes(args.row, args.seeds, Place(args.runs, extra=args.extra), args.output)
        return
    study = STUDIES[args.study]
    results, trials = args.runs / f"{study.name}.csv", args.runs / f"{study.name}_search.csv"
    if args.command == "report":
        print("\n".join(report(study, results)))
        if trials.exists():
            print("\n".join(["", "### Search", "", *search_report(study, trials)]))
        return
    place = Place(args.runs, args.data_root, args.extra)
    if args.command == "search":
        search = search_of(study, args.trials)
        run_study(search, [(row, SEARCH_SEED) for row in search.rows], place, args.jobs)
        print("\n".join(search_report(study, trials)))
        return
    counts = {row: args.seeds or study.rows[row].seeds for row in args.row or study.rows}
    work = [(row, seed) for seed in range(max(counts.values())) for row in counts if seed < counts[row]]
    if args.show:
        for row, seed in work:
            print(f"# {study.name}, {row}, seed {seed}")
            for words in commands(study, row, seed, place).values():
                print(f"python {shlex.join(words)}")
    else:
        run_study(study, work, place, args.jobs)
        print("\n".join(report(study, results)))


if __name__ == "__main__":
    sys.argv[0] = "studies"  # the name in error messages
    run_main(main)
