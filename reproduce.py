"""Reproduce the paper's tables, one command per row.

    python reproduce.py list                                                tables, rows, and what is done
    python reproduce.py show table6 --row mean --data_root DATA             print the commands of a row
    python reproduce.py run table6 --row mean --data_root DATA              run the commands that are not done yet
    python reproduce.py report --output results.md                          tables of the paper's numbers and ours
    python reproduce.py lists IMAGENET --output_dir LISTS                   lists of images for copy detection

`--settings released` takes the settings of the authors' released code, for the rows that have a counterpart there.
ImageNet-100 is --classes, by default the list that the authors link; results with another list do not count as done.
Options after `--` go to main_lgssl.py, for example `-- --precision bf16`. The report names each setting and number of
images that differs from the paper's, or from the released ones.
"""

import argparse
import itertools
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import eval_copy_detection
import eval_image_retrieval
import eval_knn
import eval_linear
import main_lgssl
from support.arguments import (
    CLASS_LISTS,
    DEFAULT_CLASSES,
    ROOT,
    ArgumentParser,
    class_file,
    class_list,
    number,
    with_class_list,
)
from support.checkpoints import hash_of_file
from support.files import make_folder, read_json, write_text
from support.options import may_change
from support.report import read_log
from utils import UserError, run_main

SETTINGS = {"paper": "the paper's settings", "released": "the settings of the authors' released code, 100 epochs"}

EVALUATIONS = {"linear": eval_linear, "knn": eval_knn, "copydays": eval_copy_detection}
EVALUATIONS |= dict.fromkeys(("roxford5k", "rparis6k"), eval_image_retrieval)
# Numbers of images behind the paper's numbers, per data set; and those of another list of ImageNet-100.
IMAGES = {
    "cifar10": {"train": 50000, "val": 10000},
    "imagenet100": {"train": 130000, "val": 5000},
    "imagenet100 cmc": {"train": 126689, "val": 5000},
    "folder": {"train": 1281167, "val": 50000},
    "copydays": {"original": 157, "strong": 229, "distractors": 10000, "whitening": 20000},
    "roxford5k": {"queries": 70, "database": 4993},
    "rparis6k": {"queries": 70, "database": 6322},
}
# Files and folders of the data sets below --data_root.
TREE = "cifar10/cifar-10-batches-py/data_batch_1 imagenet/train imagenet/val copydays/original copydays/strong".split()
TREE += "roxford5k/gnd_roxford5k.pkl roxford5k/jpg rparis6k/gnd_rparis6k.pkl rparis6k/jpg".split()
KAGGLES = {"imagenet/train": "imagenet/train.X1", "imagenet/val": "imagenet/val.X"}  # enough for ImageNet-100 alone
# Arguments that depend on the location of the data or on the number of processes. They are not settings of a run.
PLACES = "data_path whitening_path distractors_path pretrained_weights output_dir".split()
PLACES += "batch_size_per_gpu accum_steps num_workers use_cuda".split()


class Column(NamedTuple):
    """A column of the tables.

    Attributes:
        title: its title.
        evaluation: name of the evaluation behind its numbers.
        number: function from the evaluation's result to the number.
        form: format of its numbers.
    """

    title: str
    evaluation: str
    number: Callable[[dict[str, Any]], float]
    form: str = ".2f"


COLUMNS = {
    "linear": Column("linear", "linear", lambda r: r["top1"]),
    "knn10": Column("k-NN, K = 10", "knn", lambda r: r["knn"]["10"]["top1"]),
    "knn20": Column("k-NN, K = 20", "knn", lambda r: r["knn"]["20"]["top1"]),
    "copydays": Column("copy detection", "copydays", lambda r: r["map"]["strong"], ".3f"),
    "oxford_medium": Column("Oxford M", "roxford5k", lambda r: 100 * r["map"]["medium"]),
    "oxford_hard": Column("Oxford H", "roxford5k", lambda r: 100 * r["map"]["hard"]),
    "paris_medium": Column("Paris M", "rparis6k", lambda r: 100 * r["map"]["medium"]),
    "paris_hard": Column("Paris H", "rparis6k", lambda r: 100 * r["map"]["hard"]),
}


@dataclass
class Step:
    """One command: a script with its options.

    Attributes:
        name: "pretraining", "lists" or the name of an evaluation.
        words: the script and its options.
        result: file that the command writes.
        processes: number of processes of the command.
        trained_on: list of ImageNet-100 that the weights of an evaluation were trained on, None for other images.
    """

    name: str
    words: Sequence[str | Path | int]
    result: Path
    processes: int = 1
    trained_on: str | None = None

    def settings(self) -> dict[str, Any]:
        """Return the arguments that pretraining or evaluation parse from the words."""
        script = main_lgssl if self.name == "pretraining" else EVALUATIONS[self.name]
        return vars(script.parse_arguments([str(word) for word in self.words[1:]]))

    def done(self) -> bool:
        """Return whether the command has finished with these settings."""
        if self.name == "lists":
            return self.result.is_file()
        if self.name == "pretraining":
            run = self.result.parent
            return progress(run) == 1.0 and not differences(self.settings(), read_json(run / "args.json"))
        result = read_result(self)
        return bool(result) and self.fits(result)

    def fits(self, result: dict[str, Any]) -> bool:
        """Return whether the result of an evaluation has these settings, and weights that were trained on this list."""
        trained_on = differences({"classes": self.trained_on}, result["pretraining"])
        return not trained_on and not differences(self.settings(), result["args"])

    def line(self) -> str:
        """Return the command as a user types it, and whether it is done."""
        launcher = f"torchrun --standalone --nproc_per_node={self.processes}" if self.processes > 1 else "python"
        return f"{launcher} {shlex.join(map(str, self.words))}{'    # done' if self.done() else ''}"

    def run(self) -> int:
        """Run the command and return its exit code."""
        script, *words = map(str, self.words)
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={self.processes}".split()
        launcher = [sys.executable, *(torchrun if self.processes > 1 else [])]
        return subprocess.run([*launcher, str(ROOT / script), *words]).returncode


@cache
def paper() -> dict[str, Any]:
    """Return the paper's tables: {"tables": {name: {"title", "columns", "rows"}}, "contradictions"}."""
    return json.loads((ROOT / "recipes" / "paper.json").read_text(encoding="utf-8"))


class Plan(NamedTuple):
    """How a recipe is run. The batches are the same for any number of processes.

    Attributes:
        processes: number of processes by default.
        batch, linear_batch: images per step of the pretraining and of the linear evaluation, in all processes.
        linear_words: further options of the linear evaluation.
    """

    processes: int
    batch: int
    linear_batch: int
    linear_words: Sequence[str] = ()


def plan(recipe: str) -> Plan:
    """Return how a recipe is run."""
    gpus = {entry["recipe"]: entry["processes"] for entry in paper()["released"].values()}.get(recipe)
    if gpus is None:
        # The total batches of recipes/choices.args and of eval_linear.py on the four GPUs of the released code
        return Plan(processes=1, batch=160, linear_batch=512)
    linear_words = "--n_last_blocks 4 --avgpool_patchtokens false".split()
    return Plan(gpus, gpus * recipe_arguments(recipe).batch_size_per_gpu, gpus * 1500, linear_words)


def with_settings(recipe: str, settings: str) -> str | None:
    """Return the recipe of a row, given that with the paper's settings; None if the released code has no such run."""
    return recipe if settings == "paper" else paper()["released"].get(recipe, {}).get("recipe")


@dataclass
class Setup:
    """Where data and runs are, and what a user changes.

    Attributes:
        data_root, runs: folders.
        processes: number of processes of each pretraining and evaluation. Default: the recipe's.
        classes: list of ImageNet-100, see `arguments.class_file`.
        extra: further words for main_lgssl.py.
        settings: a key of SETTINGS.
    """

    data_root: Path
    runs: Path
    processes: int | None = None
    classes: str = DEFAULT_CLASSES
    extra: Sequence[str] = ()
    settings: str = "paper"

    def data_words(self, dataset: str) -> list[str | Path]:
        """Return the options that name the images of a data set."""
        path = self.data_root / ("cifar10" if dataset == "cifar10" else "imagenet")
        return ["--data_path", path, *(["--classes", self.classes] if dataset == "imagenet100" else [])]

    def name_of_list(self) -> str:
        """Return a name of the list of ImageNet-100 for folders, which differs between files of one name."""
        if self.classes in CLASS_LISTS:
            return self.classes
        return f"{Path(self.classes).stem}-{(hash_of_file(self.classes) or 'missing')[:8]}"

    def folder(self, recipe: str) -> Path:
        """Return the folder of a run and its results. Of ImageNet-100, each list has its own."""
        is_imagenet100 = recipe_arguments(recipe).dataset == "imagenet100"
        return self.runs / (f"{recipe}-{self.name_of_list()}" if is_imagenet100 else recipe)


@cache
def recipe_arguments(recipe: str) -> argparse.Namespace:
    """Return the arguments of a recipe, which are not to be changed."""
    return main_lgssl.parse_arguments([f"@{ROOT / 'recipes' / recipe}.args"])


def share_of(total: int, processes: int, what: str) -> int:
    """Return one process's share of the total batch of `what`."""
    if total % processes:
        raise UserError(f"--nproc_per_node {processes} does not divide the batch of {what}, {total}")
    return total // processes


def pretraining_step(recipe: str, setup: Setup) -> Step:
    """Return the pretraining of a recipe, with the total batch split over processes and micro-batches."""
    args, planned = recipe_arguments(recipe), plan(recipe)
    processes = setup.processes or planned.processes
    share, folder = share_of(planned.batch, processes, recipe), setup.folder(recipe)
    batch_size = next(size for size in range(min(args.batch_size_per_gpu, share), 0, -1) if share % size == 0)
    words: list[str | Path | int] = ["main_lgssl.py", f"@recipes/{recipe}.args", *setup.data_words(args.dataset)]
    words += ["--batch_size_per_gpu", batch_size, "--accum_steps", share // batch_size]
    words += ["--output_dir", folder, *setup.extra]
    return Step("pretraining", words, folder / "checkpoint.pth", processes)


def evaluation_steps(recipe: str, names: Iterable[str], setup: Setup) -> list[Step]:
    """Return the evaluations of a recipe. Copy detection is preceded by the step that draws its lists of images."""
    dataset, planned = recipe_arguments(recipe).dataset, plan(recipe)
    processes = setup.processes or planned.processes
    folder, imagenet = setup.folder(recipe), setup.data_root / "imagenet"
    lists = setup.runs / f"lists-{setup.name_of_list()}"
    trained_on = setup.classes if dataset == "imagenet100" else None
    steps = []
    for name in names:
        result = f"{name}.json"
        words: list[str | Path | int] = ["--data_path", setup.data_root, "--dataset", name]
        if name in ("linear", "knn"):
            words = ["--dataset", dataset, *setup.data_words(dataset)]
            if name == "linear":
                share = share_of(planned.linear_batch, processes, f"the linear evaluation of {recipe}")
                words += ["--batch_size_per_gpu", share, *planned.linear_words]
            result = f"{name}_{dataset}.json"
        elif name == "copydays":
            words = ["reproduce.py", "lists", imagenet, "--output_dir", lists, "--classes", setup.classes]
            steps.append(Step("lists", words, lists / "distractors.txt"))
            words = ["--data_path", setup.data_root / name, "--distractors_path", lists / "distractors.txt"]
            words += ["--whitening_path", imagenet / "train" if whitened_on_all(recipe) else lists / "whitening.txt"]
        words = [f"{EVALUATIONS[name].__name__}.py", *words, "--pretrained_weights", folder / "checkpoint.pth"]
        steps.append(Step(name, words, folder / result, processes, trained_on))
    return steps


def whitened_on_all(recipe: str) -> bool:
    """Return whether the whitening is learned on all of ImageNet-1K, as for networks trained on it (section 4.3.1)."""
    return "imagenet1k" in recipe


def evaluations_of(table: dict[str, Any]) -> list[str]:
    """Return the evaluations behind the columns of a table of the paper."""
    return list(dict.fromkeys(COLUMNS[column].evaluation for column in table["columns"]))


def progress(run: Path) -> float:
    """Return the share of its epochs that a pretraining has finished."""
    log = run / "log.txt"
    entries = read_log(log) if log.is_file() and (run / "checkpoint.pth").is_file() else []
    return (entries[-1]["epoch"] + 1) / read_json(run / "args.json")["epochs"] if entries else 0.0


def read_result(step: Step) -> dict[str, Any]:
    """Return the result of an evaluation, {} if there is none of a pretraining that has finished.

    Of several, which differ in their settings and have suffixes, it is one with the step's settings, if any.
    """
    files = [step.result, *sorted(step.result.parent.glob(f"{step.result.stem}_*.json"))]
    results = [read_json(file) for file in files if file.is_file()]
    results = [r for r in results if isinstance(r.get("pretraining"), dict) and isinstance(r.get("args"), dict)]
    finished = [r for r in results if r["pretraining"].get("epoch") == r["pretraining"].get("epochs")]
    expected = [r for r in finished if step.fits(r)]
    return next(iter(expected + finished), {})


def score(column: str, result: dict[str, Any]) -> float | None:
    """Return the number of a column in an evaluation's result, or None if the result has no such finite number."""
    try:
        value = COLUMNS[column].number(result)
        return value if math.isfinite(value) else None
    except (KeyError, TypeError):
        return None


def differences(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """Return the settings of `actual` that differ from the expected ones, as texts.

    Paths are not settings, nor is a precision that the machine decides. Settings that `actual` lacks are newer than its
    version, which worked as by default.
    """
    expected, actual = with_lists(expected), with_lists(actual)
    ignored = {*may_change(expected), *PLACES}
    return [
        f"--{name} {actual[name]} instead of {'its default' if value is None else value}"
        for name, value in expected.items()
        if name not in ignored and actual.get(name, value) != value
    ]


def with_lists(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with the list of ImageNet-100, for copy detection the one that its distractors exclude.

    It is in the name of their folder. A folder `lists`, by an earlier version, excludes cmc.
    """
    folder, hyphen, classes = Path(str(arguments.get("distractors_path"))).parent.name.partition("-")
    if folder == "lists":
        arguments = {**arguments, "classes": classes if hyphen else "cmc"}
    return with_class_list(arguments)


def remarks(step: Step, result: dict[str, Any], recipe: str, images: dict[str, int]) -> str:
    """Return how the result of an evaluation differs from the recipe, the protocol and the data set, or "".

    Args:
        images: {split or block of the data set: number of images}.
    """
    planned = plan(recipe)
    batch_size = result["pretraining"].get("batch_size", planned.batch)
    changed = [] if batch_size == planned.batch else [f"a total batch of {batch_size} instead of {planned.batch}"]
    pretraining = {**vars(recipe_arguments(recipe)), "classes": step.trained_on}
    changed += differences(pretraining, result["pretraining"])
    if step.name == "linear" and result["batch_size"] != planned.linear_batch:
        changed.append(f"{result['batch_size']} images per step instead of {planned.linear_batch}")
    changed += differences(step.settings(), result["args"])
    for split, count in images.items():
        if (number := result["images"].get(split, 0)) != count:
            changed.append(f"{number} {split} images instead of {count}")
    return f"{step.name}: {', '.join(dict.fromkeys(changed))}." if changed else ""


def markdown(rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown. The first row is the header."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * lines[0].count(" | ") + "---|", *lines[1:]]


def report(runs: Path, settings: str = "paper", classes: str = DEFAULT_CLASSES) -> str:
    """Return the tables of the paper with our numbers in Markdown. For the arguments, see `Setup`."""
    lines = [f"Each cell: the paper's number / ours with {SETTINGS[settings]} (difference).", ""]
    lines += [f"ImageNet-100: the classes in {class_file(classes).name}, unless a note names others.", ""]
    setup = Setup(Path("DATA"), runs, classes=classes, settings=settings)
    for name, table in paper()["tables"].items():
        rows: list[list[str]] = [["method", *(COLUMNS[column].title for column in table["columns"])]]
        notes: dict[str, int] = {}  # {text: number}
        for row in table["rows"].values():
            recipe, cells = with_settings(row["recipe"], setup.settings), [row["method"]]
            if recipe is None:
                forms = (COLUMNS[column].form for column in table["columns"])
                cells += [f"{theirs:{form}} / no counterpart" for theirs, form in zip(row["paper"], forms, strict=True)]
                rows.append(cells)
                continue
            steps = {step.name: step for step in evaluation_steps(recipe, evaluations_of(table), setup)}
            dataset = recipe_arguments(recipe).dataset
            for column, theirs in zip(table["columns"], row["paper"], strict=True):
                evaluation, form = COLUMNS[column].evaluation, COLUMNS[column].form
                result = read_result(steps[evaluation])
                ours = score(column, result)
                if ours is None:
                    cells.append(f"{theirs:{form}} / not run")
                    continue
                data = dataset if evaluation in ("linear", "knn") else evaluation
                images = IMAGES.get(f"{data} {with_class_list(result['args']).get('classes')}", IMAGES[data])
                if evaluation == "copydays" and whitened_on_all(recipe):
                    images = {**images, "whitening": IMAGES["folder"]["train"]}
                note = remarks(steps[evaluation], result, recipe, images)
                reference = f" [{notes.setdefault(note, len(notes) + 1)}]" if note else ""
                cells.append(f"{theirs:{form}} / {ours:{form}} ({ours - theirs:+{form}}){reference}")
            rows.append(cells)
        lines += [f"### Table {name.removeprefix('table')}. {table['title']}", "", *markdown(rows), ""]
        if notes:
            lines += [*(f"[{i}] {text}" for text, i in notes.items()), ""]
    lines += ["### Where the paper contradicts itself", ""]
    lines += [f"- {text}" for text in paper()["contradictions"]]
    return "\n".join(lines) + "\n"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    rest = "-- OPTIONS go to main_lgssl.py."
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog=f"COMMAND --help lists its options. {rest}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, epilog: str | None = None) -> Callable[..., argparse.Action]:
        sub = commands.add_parser(name, help=text, description=f"{text.capitalize()}.", epilog=epilog)
        if name != "lists":
            sub.add_argument("--runs", default="runs", type=Path, help="folder of all runs and results")
            choices = "; ".join(f"{key}: {meaning}" for key, meaning in SETTINGS.items())
            sub.add_argument("--settings", choices=SETTINGS, default="paper", help=choices)
        text = "the classes of ImageNet-100, which the lists for copy detection exclude: "
        text += f"{', '.join(CLASS_LISTS)} or a file of class folders"
        sub.add_argument("--classes", type=class_list, default=DEFAULT_CLASSES, help=text)
        return sub.add_argument

    command("list", "list the tables and what is done")
    add = command("report", "compare results with the paper's")
    add("--output", type=Path, help="file of the report; default: print the report")
    tables = paper()["tables"]
    for name, text in (("show", "print the commands of a table's rows"), ("run", "run the commands that are not done")):
        add = command(name, text, rest)
        add("table", metavar="TABLE", choices=tables, help="table1 to table8")
        add("--row", nargs="+", help="rows of the table as printed by `list`; default: all")
        default = {"default": "DATA"} if name == "show" else {"required": True}
        add("--data_root", type=Path, **default, help=f"folder of what the rows need of {', '.join(TREE)}")
        text = "number of processes, which share the batch; default: 1; with --settings released: the authors'"
        add("--nproc_per_node", type=number(int, 1), help=text)
    add = command("lists", "write the lists of images for copy detection (section 4.3.1)")
    add("imagenet", metavar="IMAGENET", help="ImageNet: class folders, or train and val with class folders")
    add("--output_dir", default=".", type=Path, help="folder of whitening.txt and distractors.txt")
    add("--whitening", type=number(int, 1), default=20000, help="number of images in whitening.txt")
    add("--distractors", type=number(int, 1), default=10000, help="number of images in distractors.txt")
    add("--seed", type=number(int, 0), default=0, help="seed of the drawing")

    args = parser.parse_with_extra(argv)
    if args.command in ("show", "run"):
        rows = tables[args.table]["rows"]
        parser.check_rows(args.row, rows, args.table)
        has = [row for row, entry in rows.items() if with_settings(entry["recipe"], args.settings)]
        if lacking := [row for row in args.row or [] if row not in has]:
            others = f"these rows of {args.table} have: {', '.join(has)}" if has else f"no row of {args.table} has one"
            parser.error(f"{args.table}, row {lacking[0]}: no counterpart in the released code; {others}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.command == "lists":
        write_lists(args)
    elif args.command == "list":
        list_tables(args.runs, args.settings, args.classes)
    elif args.command == "report" and args.output is None:
        print(report(args.runs, args.settings, args.classes), end="")
    elif args.command == "report":
        make_folder(args.output.parent, "the folder of --output")
        write_text(report(args.runs, args.settings, args.classes), args.output)
    else:
        setup = Setup(args.data_root, args.runs, args.nproc_per_node, args.classes, args.extra, args.settings)
        run_rows(args.table, args.row, setup, only_show=args.command == "show")


def write_lists(args: argparse.Namespace) -> None:
    """Draw the images for copy detection and write their paths to whitening.txt and distractors.txt, one per line."""
    counts = {"num_whitening": args.whitening, "num_distractors": args.distractors}
    lists = eval_copy_detection.copydays_lists(args.imagenet, **counts, seed=args.seed, classes=args.classes)
    make_folder(args.output_dir, "--output_dir")
    for name, paths in zip(("whitening", "distractors"), lists, strict=True):
        write_text("".join(f"{path}\n" for path in paths), args.output_dir / f"{name}.txt")
        print(f"{len(paths)} images in {args.output_dir / name}.txt", flush=True)


def run_rows(table: str, rows: Sequence[str] | None, setup: Setup, only_show: bool) -> None:
    """Run the steps of some or all rows of a table that are not done, or only print all steps."""
    contents = paper()["tables"][table]
    steps: dict[str, list[Step]] = {}  # {method: its steps}
    for row in rows or contents["rows"]:
        recipe, method = with_settings(contents["rows"][row]["recipe"], setup.settings), contents["rows"][row]["method"]
        if recipe is None:
            steps[f"{method}: no counterpart in the released code"] = []
            continue
        evaluations = evaluation_steps(recipe, evaluations_of(contents), setup)
        steps[method] = [pretraining_step(recipe, setup), *evaluations]
    if not only_show:
        check_data(itertools.chain(*steps.values()), setup.data_root)
    for method, steps_of_row in steps.items():
        print(f"# {table}, {method}", flush=True)
        for step in steps_of_row:
            print(step.line(), flush=True)
            if not only_show and not step.done() and (code := step.run()):
                raise UserError(f"{step.name} failed with exit code {code}: fix its error and run this command again")


def list_tables(runs: Path, settings: str, classes: str) -> None:
    """Print each table and row, and what is done of it. For the arguments, see `Setup`."""
    setup = Setup(Path("DATA"), runs, classes=classes, settings=settings)
    for name, table in paper()["tables"].items():
        print(f"{name}: {table['title']}")
        for row, entry in table["rows"].items():
            if (recipe := with_settings(entry["recipe"], setup.settings)) is None:
                print(f"  {row:17} no counterpart")
                continue
            steps = evaluation_steps(recipe, evaluations_of(table), setup)
            state = [f"pretraining {int(100 * progress(setup.folder(recipe)))}%"]
            state += [f"{step.name} {'done' if step.done() else '-'}" for step in steps if step.name != "lists"]
            print(f"  {row:17} {recipe:38} {', '.join(state)}")


def check_data(steps: Iterable[Step], data_root: Path) -> None:
    """Raise UserError if a data set of the steps to run is not where it is expected."""
    for step in steps:
        # The retrieval benchmarks get `data_root` itself and are named like their folders.
        paths = [Path(word) for word in step.words[1:] if isinstance(word, Path)]
        folders = {step.name, *(path.name for path in paths if path.parent == data_root)}
        others = KAGGLES if "--classes" in step.words and step.name != "lists" else {}
        for path in TREE:
            exists = any((data_root / place).exists() for place in (path, others.get(path, path)))
            if path.split("/")[0] in folders and not exists and not step.done():
                raise UserError(f"no {data_root / path}: expected below {data_root} {', '.join(TREE)}")


if __name__ == "__main__":
    run_main(main)
