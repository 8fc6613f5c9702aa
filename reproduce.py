"""Reproduce the paper's tables, one command per row, and a miniature of Table 6 that runs on two CPU cores.

    python reproduce.py list                                                tables, rows, and what is done
    python reproduce.py show table6 --row mean --data_root DATA             print the commands of a row
    python reproduce.py run table6 --row mean --data_root DATA              run the commands that are not done yet
    python reproduce.py run digits                                          run the miniature study
    python reproduce.py report --output results.md                          tables of the paper's numbers and ours
    python reproduce.py lists IMAGENET --output_dir LISTS                   lists of images for copy detection

Options after `--` go to main_lgssl.py, for example `-- --precision bf16`. The report names each setting and number of
images that differs from the paper's.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

import eval_copy_detection
import eval_image_retrieval
import eval_knn
import eval_linear
import main_lgssl
import utils
from support.arguments import ArgumentParser, number
from support.checkpoints import MAY_CHANGE
from support.evaluation import write_result
from support.features import to_pixels
from support.images import IMAGENET100_CLASSES, build_dataset
from support.loader import BatchSampler
from support.report import read_log
from utils import UserError

ROOT = Path(__file__).parent
# Total batches of recipes/choices.args and of eval_linear.py on the four GPUs of the released code. They are the same
# for any number of processes.
TOTAL_BATCH, LINEAR_BATCH = 160, 512

# column: (title, evaluation, function from the evaluation's result to the number, format)
COLUMNS = {
    "linear": ("linear", "linear", lambda r: r["top1"], ".2f"),
    "knn10": ("k-NN, K = 10", "knn", lambda r: r["knn"]["10"]["top1"], ".2f"),
    "knn20": ("k-NN, K = 20", "knn", lambda r: r["knn"]["20"]["top1"], ".2f"),
    "copydays": ("copy detection", "copydays", lambda r: r["map"]["strong"], ".3f"),
    "oxford_medium": ("Oxford M", "roxford5k", lambda r: 100 * r["map"]["medium"], ".2f"),
    "oxford_hard": ("Oxford H", "roxford5k", lambda r: 100 * r["map"]["hard"], ".2f"),
    "paris_medium": ("Paris M", "rparis6k", lambda r: 100 * r["map"]["medium"], ".2f"),
    "paris_hard": ("Paris H", "rparis6k", lambda r: 100 * r["map"]["hard"], ".2f"),
}
EVALUATIONS = {"linear": eval_linear, "knn": eval_knn, "copydays": eval_copy_detection}
EVALUATIONS |= dict.fromkeys(("roxford5k", "rparis6k"), eval_image_retrieval)
MODULES = (main_lgssl, *EVALUATIONS.values())
SCRIPTS = {f"{module.__name__}.py": module for module in MODULES} | {"reproduce.py": sys.modules[__name__]}
# Arguments that depend on the location of the data or on the number of processes. They are not settings of a run.
PLACES = "data_path whitening_path distractors_path classes pretrained_weights output_dir".split()
PLACES += "batch_size_per_gpu accum_steps num_workers use_cuda".split()
# Numbers of images behind the paper's numbers, per data set.
IMAGES = {
    "cifar10": {"train": 50000, "val": 10000},
    "imagenet100": {"train": 126689, "val": 5000},
    "folder": {"train": 1281167, "val": 50000},
    "copydays": {"original": 157, "strong": 229, "distractors": 10000, "whitening": 20000},
    "roxford5k": {"queries": 70, "database": 4993},
    "rparis6k": {"queries": 70, "database": 6322},
    "digits": {"train": 1400, "val": 397},
}
# Files and folders of the data sets below --data_root.
TREE = "cifar10/cifar-10-batches-py/data_batch_1 imagenet/train imagenet/val copydays/original copydays/strong".split()
TREE += "roxford5k/gnd_roxford5k.pkl roxford5k/jpg rparis6k/gnd_rparis6k.pkl rparis6k/jpg".split()

# The miniature study: rows as in Table 6. Each row: (label, options of main_lgssl.py after recipes/study.args).
STUDY = {
    "untrained": ("untrained", None),
    "pixels": ("raw pixels", None),
    "dino": ("DINO", "--loss cls --geometry batch"),
    "dino-image": ("DINO, crops drawn per image", "--loss cls --geometry image"),
    "mean": ("Ours, mean", "--loss mean --geometry batch"),
    "sum": ("Ours, sum", "--loss sum --geometry batch"),
    "lambda0.9": ("Ours, λ = 0.9", "--loss lambda --lambda_cls 0.9 --geometry batch"),
    "lambda0.5": ("Ours, λ = 0.5", "--loss lambda --lambda_cls 0.5 --geometry batch"),
    "lambda0.2": ("Ours, λ = 0.2", "--loss lambda --lambda_cls 0.2 --geometry batch"),
}
STUDY_COLUMNS = ("linear", "knn10", "knn20")
STUDY_LINEAR = ["--cache_features", "--lr", "0.5", "--epochs", "100"]  # DINO's 0.001 is for 100 epochs of ImageNet


@cache
def paper() -> dict:
    """Return the paper's tables: {"tables": {name: {"title", "columns", "rows"}}, "contradictions"}."""
    return json.loads((ROOT / "recipes" / "paper.json").read_text(encoding="utf-8"))


@dataclass
class Step:
    """One command: a script with its options.

    Attributes:
        name: "pretraining", "lists" or a name of EVALUATIONS.
        words: the script and its options.
        result: file that the command writes.
        processes: number of processes of the command.
    """

    name: str
    words: list
    result: Path
    processes: int = 1

    def __post_init__(self):
        self.words = [str(word) for word in self.words]

    def settings(self) -> argparse.Namespace:
        """Return the arguments that the script parses from the words."""
        script, *words = self.words
        return SCRIPTS[script].parse_arguments(words)

    def done(self) -> bool:
        """Return whether the command has finished with these settings."""
        if self.name == "lists":
            return self.result.is_file()
        if self.name == "pretraining":
            run = self.result.parent
            return progress(run) == 1.0 and not differences(vars(self.settings()), read_json(run / "args.json"))
        result = read_result(self.result)
        return result is not None and not differences(vars(self.settings()), result["args"])

    def line(self) -> str:
        """Return the command as a user types it, and whether it is done."""
        launcher = f"torchrun --standalone --nproc_per_node={self.processes}" if self.processes > 1 else "python"
        return f"{launcher} {shlex.join(self.words)}{'    # done' if self.done() else ''}"

    def run(self, **options) -> int:
        """Run the command unless it is done, and return its exit code. `options` are those of subprocess.run."""
        if self.done():
            return 0
        script, *words = self.words
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        launcher = [sys.executable, *torchrun] if self.processes > 1 else [sys.executable]
        return subprocess.run([*launcher, str(ROOT / script), *words], **options).returncode


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


def study_steps(row, seed, runs, extra=()) -> list:
    """Return the steps of one row of the miniature study with one seed. `raw_pixels` takes those of the raw pixels."""
    folder, steps = runs / "digits" / f"{row}-{seed}", []
    if row == "pixels":
        model = ["--pretrained_weights", "none"]
    elif row == "untrained":
        model = "--pretrained_weights none --arch vit_micro --patch_size 8 --crop_size 32".split()
    else:
        words = ["main_lgssl.py", "@recipes/study.args", *STUDY[row][1].split(), "--seed", seed]
        steps.append(Step("pretraining", [*words, "--output_dir", folder, *extra], folder / "checkpoint.pth"))
        model = ["--pretrained_weights", folder / "checkpoint.pth"]
    for name, more in (("linear", STUDY_LINEAR), ("knn", [])):
        words = [f"eval_{name}.py", "--dataset", "digits", *model, *more]
        words += ["--seed", seed, "--num_workers", 0, "--output_dir", folder]
        steps.append(Step(name, words, folder / f"{name}_digits.json"))
    return steps


def raw_pixels(linear, knn) -> None:
    """Take the steps of both evaluations with the digits' 8×8 pixels as features, normalized as for a network."""
    pixels, data = to_pixels(), {}
    for split in ("train", "val"):
        dataset = build_dataset("digits", split=split, transform=lambda image: pixels(image)[0].flatten())
        data[split] = torch.stack([image for image, _ in dataset]), torch.tensor(dataset.labels)  # [n, 64], [n]
    images = {split: len(labels) for split, (_, labels) in data.items()}
    args = linear.settings()
    batch_size = args.batch_size_per_gpu
    sampler = BatchSampler(images["train"], batch_size, itertools.count(), seed=args.seed, drop_last=False)
    batches = eval_linear.cached_batches(sampler, *data["train"])
    classifier = eval_linear.new_classifier(64, 10, args.seed)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.0, momentum=0.9)
    lr = args.lr * batch_size / 256
    epochs = eval_linear.train(classifier, optimizer, batches, sampler.steps_per_epoch, args.epochs, lr)
    best = max(eval_linear.accuracy(classifier, *data["val"])[0] for _ in epochs)
    linear.result.parent.mkdir(parents=True, exist_ok=True)
    write_result(linear.result, {"top1": best, "batch_size": batch_size, "images": images}, {}, args)
    args = knn.settings()
    train, val = ((F.normalize(features), labels) for features, labels in data.values())
    neighbours = {}
    for k in args.nb_knn:
        neighbours[k] = dict(zip(("top1", "top5"), eval_knn.knn_accuracy(*train, *val, k), strict=True))
    write_result(knn.result, {"knn": neighbours, "images": images}, {}, args)


def read_json(path) -> dict:
    """Return the dictionary in a file, or an empty one if the file is missing or broken."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def progress(run) -> float:
    """Return the share of its epochs that a pretraining has finished."""
    log, epochs = run / "log.txt", read_json(run / "args.json").get("epochs")
    entries = read_log(log) if log.is_file() and (run / "checkpoint.pth").is_file() else []
    return (entries[-1].get("epoch", -1) + 1) / epochs if entries and epochs else 0.0


def read_result(path) -> dict | None:
    """Return an evaluation's result, or None if it is missing or its pretraining had not finished."""
    result = read_json(path)
    pretraining = result.get("pretraining", {})
    return result if "args" in result and pretraining.get("epoch") == pretraining.get("epochs") else None


def differences(expected, actual) -> list:
    """Return the settings of `actual` that differ from the expected ones, as texts. Paths are not settings."""
    ignored = {*MAY_CHANGE, *PLACES}
    return [
        f"--{name} {actual.get(name)} instead of {'its default' if value is None else value}"
        for name, value in expected.items()
        if name not in ignored and actual.get(name) != value
    ]


def mark(notes, step, pretraining, total_batch, images) -> str:
    """Note how the result of an evaluation differs from the recipe, the protocol and the data set.

    Args:
        notes: {text: number} of the notes below a table. A new text is added.
        step: an evaluation with a result.
        pretraining: dictionary of the recipe's settings.
        total_batch: of the recipe.
        images: {split or block of the data set: number of images}.

    Returns:
        the reference to the note, as in " [1]", or "" if nothing differs
    """
    result, wanted, changed = read_result(step.result), step.settings(), []
    if result["pretraining"]:  # empty for a random network
        batch_size = result["pretraining"].get("batch_size", total_batch)
        changed += [f"a total batch of {batch_size} instead of {total_batch}"] if batch_size != total_batch else []
        changed += differences(pretraining, result["pretraining"])
    if step.name == "linear" and result["batch_size"] != wanted.batch_size_per_gpu:
        changed.append(f"{result['batch_size']} images per step instead of {wanted.batch_size_per_gpu}")
    changed += differences(vars(wanted), result["args"])
    for split, count in images.items():
        found = result["images"].get(split, 0)
        changed += [f"{found} {split} images instead of {count}"] if found != count else []
    text = f"{step.name}: {', '.join(changed)}."
    return f" [{notes.setdefault(text, len(notes) + 1)}]" if changed else ""


def markdown(header, rows, notes) -> list:
    """Return the lines of a table with its notes in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    return [*lines, *[""] * bool(notes), *(f"[{i}] {text}" for text, i in notes.items())]


def report(runs) -> str:
    """Return the tables of the paper in Markdown, and that of the miniature study if it was run."""
    lines = ["Each cell: the paper's number / ours (difference).", ""]
    setup = Setup(Path("DATA"), runs)
    for name, table in paper()["tables"].items():
        rows, notes = [], {}
        for row in table["rows"].values():
            recipe, cells = row["recipe"], [row["method"]]
            steps = {step.name: step for step in evaluation_steps(recipe, evaluations_of(table), setup)}
            pretraining = vars(recipe_arguments(recipe))
            for column, theirs in zip(table["columns"], row["paper"], strict=True):
                _, evaluation, value, form = COLUMNS[column]
                try:
                    ours = value(read_result(steps[evaluation].result))
                except (KeyError, TypeError):  # no result, or a result without this number
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
    study = study_report(runs)
    return "\n".join(lines + (["", *study] if study else [])) + "\n"


def study_seeds(row, runs) -> list:
    """Return the seeds with which a row of the miniature study was run, as texts."""
    return [folder.name.removeprefix(f"{row}-") for folder in sorted((runs / "digits").glob(f"{row}-[0-9]*"))]


def study_report(runs) -> list:
    """Return the lines of the miniature study's table, mean ± standard deviation over the seeds that were run."""
    rows, notes = [], {}
    for row, (label, _) in STUDY.items():
        scores, marks = ({column: [] for column in STUDY_COLUMNS} for _ in range(2))
        for seed in study_seeds(row, runs):
            steps = {step.name: step for step in study_steps(row, seed, runs)}
            wanted = vars(steps["pretraining"].settings()) if "pretraining" in steps else {}
            for column in STUDY_COLUMNS:
                _, evaluation, value, _ = COLUMNS[column]
                result = read_result(steps[evaluation].result)
                if result is not None:
                    scores[column].append(value(result))
                    total_batch = wanted.get("batch_size_per_gpu")
                    marks[column].append(mark(notes, steps[evaluation], wanted, total_batch, IMAGES["digits"]))
        low, *_, high = sorted(map(len, scores.values()))
        if high > 0:
            cells = [spread(scores[column]) + "".join(dict.fromkeys(marks[column])) for column in STUDY_COLUMNS]
            rows.append([label, str(low) if low == high else f"{low} to {high}", *cells])
    if not rows:
        return []
    lines = ["### Miniature study on digits: top-1 accuracy in %, mean ± standard deviation over the seeds", ""]
    lines += ["The linear classifier is trained on cached features of un-augmented images, at a learning rate of 0.5."]
    header = ["method", "seeds", *(COLUMNS[column][0] for column in STUDY_COLUMNS)]
    return [*lines, "", *markdown(header, rows, notes)]


def spread(values) -> str:
    """Return mean ± standard deviation, or only the mean of a single value."""
    if not values:
        return "not run"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


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
        tables = (*paper()["tables"], "digits")
        add("table", nargs="?", metavar="TABLE", choices=tables, help="table1 to table8, or digits")
        add("--row", nargs="+", help="rows of the table as printed by `list`; default: all")
        add("--seeds", type=number(int, 1), default=5, help="number of seeds (digits)")
        add = sub.add_argument_group("where").add_argument
        add("--data_root", help=f"folder of the data sets that the rows need, any of {', '.join(TREE)}")
        add("--classes", help="file of 100 class folders; default: recipes/imagenet100_cmc.txt")
        add("--runs", default="runs", help="folder of all runs and results")
        add = sub.add_argument_group("computation").add_argument
        add("--nproc_per_node", type=number(int, 1), default=1, help="number of processes, which share the batch")
        add("--jobs", type=number(int, 1), help="number of simultaneous runs (digits); default: CPU cores, at most 8")
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
        parser.error(f"{args.command} needs a table: {', '.join(paper()['tables'])} or digits")
    if args.row and args.table is None:
        parser.error(f"--row {args.row[0]} needs a table")
    rows = STUDY if args.table == "digits" else paper()["tables"][args.table]["rows"] if args.table else {}
    unknown = [row for row in args.row or [] if row not in rows]
    if unknown:
        parser.error(f"{args.table} has no row {unknown[0]}, expected some of {', '.join(rows)}")
    if args.command == "run" and args.table != "digits" and args.data_root is None:
        parser.error(f"run {args.table} needs --data_root, the folder of the data sets: {', '.join(TREE)}")
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
    if args.command == "list":
        list_tables(runs)
    elif args.command == "report" and args.output is None:
        print(report(runs), end="")
    elif args.command == "report":
        utils.make_folder(Path(args.output).parent, "the folder of --output")
        utils.write_text(report(runs), Path(args.output))
    elif args.table == "digits":
        run_study(args.row, args.seeds, runs, args.jobs or min(os.cpu_count(), 8), args.extra, only_show)
    else:
        data_root = Path(args.data_root or "DATA")
        setup = Setup(data_root, runs, args.nproc_per_node, args.classes, tuple(args.extra))
        run_rows(args.table, args.row, setup, only_show)


def write_lists(lists, folder) -> None:
    """Write the lists (whitening, distractors) of image paths to whitening.txt and distractors.txt, a path per line."""
    utils.make_folder(folder, "--output_dir")
    for name, paths in zip(("whitening", "distractors"), lists, strict=True):
        utils.write_text("".join(f"{path}\n" for path in paths), folder / f"{name}.txt")
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


def list_tables(runs) -> None:
    """Print each table and row, and what is done of it."""
    for name, table in paper()["tables"].items():
        print(f"{name}: {table['title']}")
        for row, entry in table["rows"].items():
            steps = evaluation_steps(entry["recipe"], evaluations_of(table), Setup(Path("DATA"), runs))
            state = [f"pretraining {int(100 * progress(runs / entry['recipe']))}%"]
            state += [f"{step.name} {'done' if step.done() else '-'}" for step in steps if step.name != "lists"]
            print(f"  {row:17} {entry['recipe']:29} {', '.join(state)}")
    print("digits: the miniature study, five seeds per row")
    for row in STUDY:
        done = sum(all(step.done() for step in study_steps(row, seed, runs)) for seed in study_seeds(row, runs))
        print(f"  {row:17} {'study':29} {done} seeds done")


def check_data(steps, data_root) -> None:
    """Raise UserError if a data set of the steps to run is not where it is expected."""
    for step in steps:
        # The retrieval benchmarks get `data_root` itself and are named like their folders.
        folders = {step.name, *(Path(word).name for word in step.words if Path(word).parent == data_root)}
        for path in TREE:
            if path.split("/")[0] in folders and not (data_root / path).exists() and not step.done():
                raise UserError(f"no {data_root / path}: expected below {data_root} {', '.join(TREE)}")


def run_study(rows, seeds, runs, jobs, extra, only_show) -> None:
    """Run some rows of the miniature study with seeds 0, 1, ..., one thread per run, or only print the steps."""

    def run_one(row, seed):
        steps, folder = study_steps(row, seed, runs, extra), runs / "digits" / f"{row}-{seed}"
        if row == "pixels" and not all(step.done() for step in steps):
            raw_pixels(*steps)
        for step in steps if row != "pixels" else []:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "output.txt").open("a") as output:
                code = step.run(env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output)
            if code:
                last = (folder / "output.txt").read_text().strip().splitlines()[-1]
                raise UserError(f"{step.name} of {row}, seed {seed}, failed: {last}")
        print(f"{row}, seed {seed}: done", flush=True)

    work = [(row, seed) for seed in range(seeds) for row in rows]
    if only_show:
        for row, seed in work:
            steps = study_steps(row, seed, runs, extra) if row != "pixels" else []
            print("\n".join([f"# digits, {STUDY[row][0]}, seed {seed}", *(step.line() for step in steps)]))
        return
    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(run_one, *zip(*work, strict=True)):  # an error cancels the runs that have not started
            pass
    print("\n".join(study_report(runs)))


if __name__ == "__main__":
    utils.run(main)
