"""Reproduce the paper's tables, one command per row, and studies in small that run on two CPU cores.

    python reproduce.py list                                                tables, rows, and what is done
    python reproduce.py show table6 --row mean --data_root DATA             print the commands of a row
    python reproduce.py run table6 --row mean --data_root DATA              run the commands that are not done yet
    python reproduce.py run solar                                           run a study: digits, solar or fashion
    python reproduce.py search solar                                        search for the settings of a study
    python reproduce.py report --output results.md                          tables of the paper's numbers and ours
    python reproduce.py lists IMAGENET --output_dir LISTS                   lists of images for copy detection

Options after `--` go to main_lgssl.py, for example `-- --precision bf16`. The report names each setting and number of
images that differs from the paper's.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import eval_copy_detection
import eval_image_retrieval
import eval_knn
import eval_linear
import main_lgssl
from support.arguments import ArgumentParser, number
from support.files import make_folder, write_text
from support.sources import IMAGENET100_CLASSES
from support.steps import COLUMNS, ROOT, Step, mark, markdown, progress, score
from support.study import STUDIES, is_done, run_study, search, seeds_of, study_steps
from support.study import report as study_report
from utils import UserError, run_main

# Total batches of recipes/choices.args and of eval_linear.py on the four GPUs of the released code. They are the same
# for any number of processes.
TOTAL_BATCH, LINEAR_BATCH = 160, 512

EVALUATIONS = {"linear": eval_linear, "knn": eval_knn, "copydays": eval_copy_detection}
EVALUATIONS |= dict.fromkeys(("roxford5k", "rparis6k"), eval_image_retrieval)
# Numbers of images behind the paper's numbers, per data set.
IMAGES = {
    "cifar10": {"train": 50000, "val": 10000},
    "imagenet100": {"train": 126689, "val": 5000},
    "folder": {"train": 1281167, "val": 50000},
    "copydays": {"original": 157, "strong": 229, "distractors": 10000, "whitening": 20000},
    "roxford5k": {"queries": 70, "database": 4993},
    "rparis6k": {"queries": 70, "database": 6322},
}
JOBS = min(os.cpu_count(), 8)
SEARCHES = ("solar", "fashion")  # studies with recipes that were searched
# Files and folders of the data sets below --data_root.
TREE = "cifar10/cifar-10-batches-py/data_batch_1 imagenet/train imagenet/val copydays/original copydays/strong".split()
TREE += "roxford5k/gnd_roxford5k.pkl roxford5k/jpg rparis6k/gnd_rparis6k.pkl rparis6k/jpg".split()


@cache
def paper() -> dict:
    """Return the paper's tables: {"tables": {name: {"title", "columns", "rows"}}, "contradictions"}."""
    return json.loads((ROOT / "recipes" / "paper.json").read_text(encoding="utf-8"))


@dataclass
class Setup:
    """Where data and runs are, and what a user changes.

    Attributes:
        data_root, runs: folders.
        processes: number of processes of each pretraining and evaluation.
        classes: file of the classes of ImageNet-100. None uses the recipes' file.
        extra: further words for main_lgssl.py.
    """

    data_root: Path
    runs: Path
    processes: int = 1
    classes: str | None = None
    extra: tuple = ()

    def class_words(self) -> list:
        """Return the option that names the classes of ImageNet-100."""
        return ["--classes", self.classes] if self.classes else []

    def data_words(self, dataset) -> list:
        """Return the options that name the images of a data set."""
        path = self.data_root / ("cifar10" if dataset == "cifar10" else "imagenet")
        return ["--data_path", path, *(self.class_words() if dataset == "imagenet100" else [])]

    def share(self, total, whose) -> int:
        """Return one process's share of a total batch."""
        if total % self.processes:
            raise UserError(f"--nproc_per_node {self.processes} does not divide {whose} batch of {total}")
        return total // self.processes


def recipe_arguments(recipe) -> argparse.Namespace:
    """Return the arguments of a recipe."""
    return main_lgssl.parse_arguments([f"@{ROOT / 'recipes' / recipe}.args"])


def pretraining_step(recipe, setup) -> Step:
    """Return the pretraining of a recipe, with the total batch split over processes and micro-batches."""
    args = recipe_arguments(recipe)
    share = setup.share(TOTAL_BATCH, "the recipes'")
    batch_size = next(size for size in range(min(args.batch_size_per_gpu, share), 0, -1) if share % size == 0)
    words = ["main_lgssl.py", f"@recipes/{recipe}.args", *setup.data_words(args.dataset)]
    words += ["--batch_size_per_gpu", batch_size, "--accum_steps", share // batch_size]
    words += ["--output_dir", setup.runs / recipe, *setup.extra]
    return Step("pretraining", words, setup.runs / recipe / "checkpoint.pth", setup.processes)


def evaluation_steps(recipe, names, setup) -> list:
    """Return the evaluations of a recipe. Copy detection is preceded by the step that draws its lists of images."""
    dataset = recipe_arguments(recipe).dataset
    folder, lists, imagenet = setup.runs / recipe, setup.runs / "lists", setup.data_root / "imagenet"
    steps = []
    for name in names:
        result = f"{name}.json"
        if name in ("linear", "knn"):
            words = ["--dataset", dataset, *setup.data_words(dataset)]
            if name == "linear":
                words += ["--batch_size_per_gpu", setup.share(LINEAR_BATCH, "the linear evaluation's")]
            result = f"{name}_{dataset}.json"
        elif name == "copydays":
            words = ["reproduce.py", "lists", imagenet, "--output_dir", lists, *setup.class_words()]
            steps.append(Step("lists", words, lists / "distractors.txt"))
            words = ["--data_path", setup.data_root / name, "--distractors_path", lists / "distractors.txt"]
            words += ["--whitening_path", imagenet / "train" if whitened_on_all(recipe) else lists / "whitening.txt"]
        else:
            words = ["--data_path", setup.data_root, "--dataset", name]
        words = [f"{EVALUATIONS[name].__name__}.py", *words, "--pretrained_weights", folder / "checkpoint.pth"]
        steps.append(Step(name, words, folder / result, setup.processes))
    return steps


def whitened_on_all(recipe) -> bool:
    """Return whether the whitening is learned on all of ImageNet-1K, as for networks trained on it (section 4.3.1)."""
    return recipe.startswith("imagenet1k")


def evaluations_of(table) -> list:
    """Return the evaluations behind the columns of a table of the paper."""
    return list(dict.fromkeys(COLUMNS[column][1] for column in table["columns"]))


def report(runs) -> str:
    """Return the tables of the paper in Markdown, and those of the studies that were run."""
    lines = ["Each cell: the paper's number / ours (difference).", ""]
    setup = Setup(Path("DATA"), runs)
    for name, table in paper()["tables"].items():
        rows, notes = [], {}
        for row in table["rows"].values():
            recipe, cells = row["recipe"], [row["method"]]
            steps = {step.name: step for step in evaluation_steps(recipe, evaluations_of(table), setup)}
            pretraining = vars(recipe_arguments(recipe))
            for column, theirs in zip(table["columns"], row["paper"], strict=True):
                _, evaluation, _, form = COLUMNS[column]
                if (ours := score(column, steps[evaluation])) is None:
                    cells.append(f"{theirs:{form}} / not run")
                    continue
                images = IMAGES[pretraining["dataset"] if evaluation in ("linear", "knn") else evaluation]
                if evaluation == "copydays" and whitened_on_all(recipe):
                    images = {**images, "whitening": IMAGES["folder"]["train"]}
                note = mark(notes, steps[evaluation], pretraining, TOTAL_BATCH, images)
                cells.append(f"{theirs:{form}} / {ours:{form}} ({ours - theirs:+{form}}){note}")
            rows.append(cells)
        header = ["method", *(COLUMNS[column][0] for column in table["columns"])]
        lines += [f"### Table {name.removeprefix('table')}. {table['title']}", "", *markdown(header, rows, notes), ""]
    lines += ["### Where the paper contradicts itself", ""]
    lines += [f"- {text}" for text in paper()["contradictions"]]
    for study in STUDIES:
        lines += ["", *found] if (found := study_report(study, runs)) else []
    return "\n".join(lines) + "\n"


def parse_arguments(argv=None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    rest = "-- OPTIONS go to main_lgssl.py."
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog=f"COMMAND --help lists its options. {rest}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, epilog=None):
        sub = commands.add_parser(name, help=text, description=f"{text.capitalize()}.", epilog=epilog)
        sub.set_defaults(table=None, row=None)
        return sub

    for name, text in (("list", "list the tables and what is done"), ("report", "compare results with the paper's")):
        sub = command(name, text)
        sub.add_argument("--row", nargs="+", help=argparse.SUPPRESS)  # for an error message that says why not
        sub.add_argument("--runs", default="runs", help="folder of all runs and results")
    sub.add_argument("--output", help="file of the report; default: print the report")
    for name, text in (("show", "print the commands of a table's rows"), ("run", "run the commands that are not done")):
        sub = command(name, text, rest)
        add = sub.add_argument_group("what").add_argument
        tables = (*paper()["tables"], *STUDIES)
        add("table", nargs="?", metavar="TABLE", choices=tables, help=f"table1 to table8, or {', '.join(STUDIES)}")
        add("--row", nargs="+", help="rows of the table as printed by `list`; default: all")
        add("--seeds", type=number(int, 1), help="number of seeds (studies); default: that of each row, 3 or 5")
        add = sub.add_argument_group("where").add_argument
        add("--data_root", help=f"folder of the data sets that the rows need, any of {', '.join(TREE)}")
        add("--classes", help="file of 100 class folders; default: recipes/imagenet100_cmc.txt")
        add("--runs", default="runs", help="folder of all runs and results")
        add = sub.add_argument_group("computation").add_argument
        add("--nproc_per_node", type=number(int, 1), default=1, help="number of processes, which share the batch")
        add("--jobs", type=number(int, 1), default=JOBS, help="number of simultaneous runs (studies)")
    sub = command("search", "search for the settings of a study, for DINO and for the mean loss apart")
    add = sub.add_argument_group("what").add_argument
    add("table", metavar="STUDY", choices=SEARCHES, help=", ".join(SEARCHES))
    add("--trials", type=number(int, 1), default=12, help="number of trials per method")
    add("--output", type=Path, help="file of JSON lines, one per trial; finished trials are skipped. Default: "
        "STUDY-search.jsonl in --runs")  # fmt: skip
    add = sub.add_argument_group("where and how").add_argument
    add("--data_root", help="folder of the data sets (fashion)")
    add("--runs", default="runs", help="folder of all runs and results")
    add("--jobs", type=number(int, 1), default=JOBS, help="number of simultaneous trials")
    sub = command("lists", "write the lists of images for copy detection (section 4.3.1)")
    add = sub.add_argument_group("images").add_argument
    add("imagenet", metavar="IMAGENET", help="ImageNet: class folders, or train and val with class folders")
    add("--classes", default=IMAGENET100_CLASSES, help="file of the class folders to exclude")
    add = sub.add_argument_group("lists").add_argument
    add("--output_dir", default=".", help="folder of whitening.txt and distractors.txt")
    add("--whitening", type=number(int, 1), default=20000, help="number of images in whitening.txt")
    add("--distractors", type=number(int, 1), default=10000, help="number of images in distractors.txt")
    add("--seed", type=number(int, 0), default=0, help="seed of the drawing")

    args = parser.parse_args(argv[:split])
    args.extra = argv[split + 1 :]
    if args.command in ("show", "run") and args.table is None:
        parser.error(f"{args.command} needs a table: {', '.join((*paper()['tables'], *STUDIES))}")
    if args.row and args.table is None:
        parser.error(f"--row {args.row[0]} needs a table")
    study = STUDIES.get(args.table)
    rows = study.rows if study else paper()["tables"][args.table]["rows"] if args.table else {}
    unknown = [row for row in args.row or [] if row not in rows]
    if unknown:
        parser.error(f"{args.table} has no row {unknown[0]}, expected some of {', '.join(rows)}")
    if args.command in ("run", "search") and not (study and study.folder is None) and args.data_root is None:
        needed = study.folder if study else ", ".join(TREE)
        parser.error(f"{args.command} {args.table} needs --data_root, the folder of the data sets: {needed}")
    args.row = args.row or list(rows)
    return args


def main(argv=None) -> None:
    args = parse_arguments(argv)
    if args.command == "lists":
        counts = {"num_whitening": args.whitening, "num_distractors": args.distractors}
        lists = eval_copy_detection.copydays_lists(args.imagenet, **counts, seed=args.seed, classes=args.classes)
        write_lists(lists, Path(args.output_dir))
        return
    runs, only_show = Path(args.runs), args.command == "show"
    if os.path.exists(runs) and not runs.is_dir():
        raise UserError(f"--runs {runs} is a file, expected the folder of all runs")
    if args.command == "list":
        list_tables(runs)
    elif args.command == "report" and args.output is None:
        print(report(runs), end="")
    elif args.command == "report":
        make_folder(Path(args.output).parent, "the folder of --output")
        write_text(report(runs), Path(args.output))
    elif args.command == "search":
        check_study_data(STUDIES[args.table], args.data_root)
        output = args.output or runs / f"{args.table}-search.jsonl"
        make_folder(output.parent, "the folder of --output")
        search(args.table, args.trials, output, runs, args.jobs, args.data_root)
    elif args.table in STUDIES:
        if not only_show:
            check_study_data(STUDIES[args.table], args.data_root)
        words = (args.row, args.seeds, runs, args.jobs, args.data_root or "DATA", args.extra, only_show)
        run_study(args.table, *words)
    else:
        data_root = Path(args.data_root or "DATA")
        setup = Setup(data_root, runs, args.nproc_per_node, args.classes, tuple(args.extra))
        run_rows(args.table, args.row, setup, only_show)


def write_lists(lists, folder) -> None:
    """Write the lists (whitening, distractors) of image paths to whitening.txt and distractors.txt, a path per line."""
    make_folder(folder, "--output_dir")
    for name, paths in zip(("whitening", "distractors"), lists, strict=True):
        write_text("".join(f"{path}\n" for path in paths), folder / f"{name}.txt")
        print(f"{len(paths)} images in {folder / name}.txt", flush=True)


def run_rows(table, rows, setup, only_show) -> None:
    """Run the steps of some rows of a table of the paper that are not done, or only print all steps."""
    contents, steps = paper()["tables"][table], {}
    for row in rows:
        recipe = contents["rows"][row]["recipe"]
        evaluations = evaluation_steps(recipe, evaluations_of(contents), setup)
        steps[row] = [pretraining_step(recipe, setup), *evaluations]
    if not only_show:
        check_data(sum(steps.values(), []), setup.data_root)
    for row, steps_of_row in steps.items():
        print(f"# {table}, {contents['rows'][row]['method']}", flush=True)
        for step in steps_of_row:
            print(step.line(), flush=True)
            if not only_show and (code := step.run()):
                raise UserError(f"{step.name} failed with exit code {code}: fix its error and run this command again")


def check_study_data(study, data_root) -> None:
    """Raise UserError if the data set of a study is not where it is expected."""
    if study.folder and not (Path(data_root) / study.folder).is_dir():
        raise UserError(f"no {Path(data_root) / study.folder}: expected the files of {study.title} there")


def list_tables(runs) -> None:
    """Print each table and row, and what is done of it."""
    for name, table in paper()["tables"].items():
        print(f"{name}: {table['title']}")
        for row, entry in table["rows"].items():
            steps = evaluation_steps(entry["recipe"], evaluations_of(table), Setup(Path("DATA"), runs))
            state = [f"pretraining {int(100 * progress(runs / entry['recipe']))}%"]
            state += [f"{step.name} {'done' if step.done() else '-'}" for step in steps if step.name != "lists"]
            print(f"  {row:17} {entry['recipe']:29} {', '.join(state)}")
    for name, study in STUDIES.items():
        print(f"{name}: study in small, {study.title}")
        for row, (_, recipe, _, seeds, _) in study.rows.items():
            done = [is_done(study_steps(name, row, seed, runs)) for seed in seeds_of(name, row, runs)]
            print(f"  {row:17} {recipe or 'no pretraining':29} {sum(done)} of {seeds} seeds done")


def check_data(steps, data_root) -> None:
    """Raise UserError if a data set of the steps to run is not where it is expected."""
    for step in steps:
        # The retrieval benchmarks get `data_root` itself and are named like their folders.
        folders = {step.name, *(Path(word).name for word in step.words if Path(word).parent == data_root)}
        for path in TREE:
            if path.split("/")[0] in folders and not (data_root / path).exists() and not step.done():
                raise UserError(f"no {data_root / path}: expected below {data_root} {', '.join(TREE)}")


if __name__ == "__main__":
    run_main(main)
