"""The paper's tables, one command per row, and a miniature of Table 6 that runs on two CPU cores.

    python reproduce.py list                                                what there is, and what is done
    python reproduce.py show table6 --row mean --data_root DATA             the commands of a row
    python reproduce.py run table6 --row mean --data_root DATA              runs those that are not done yet
    python reproduce.py run digits                                          the miniature study
    python reproduce.py report --output results.md                          the tables: paper, ours, difference
    python reproduce.py lists IMAGENET --output_dir LISTS                   the images that copy detection needs

What follows `--` goes to main_lgssl.py, for instance `-- --precision bf16`. The report says which settings of a run,
and which numbers of images, are not the paper's.
"""

import argparse
import json
import os
import re
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
from utils import UserError

ROOT = Path(__file__).parent
# The batches of recipes/choices.args and of eval_linear.py on the released code's four GPUs. On fewer or more processes
# they stay the same.
TOTAL_BATCH, LINEAR_BATCH = 160, 512

# column: (title, evaluation, value of its result, format)
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
EVALUATIONS = {
    "linear": eval_linear,
    "knn": eval_knn,
    "copydays": eval_copy_detection,
    "roxford5k": eval_image_retrieval,
    "rparis6k": eval_image_retrieval,
}
SCRIPTS = {f"{module.__name__}.py": module for module in (main_lgssl, *EVALUATIONS.values())}
# What moves with the data, or with the number of processes: no change of a run's settings.
PLACES = "data_path whitening_path distractors_path classes pretrained_weights output_dir".split()
PLACES += "batch_size_per_gpu accum_steps num_workers".split()
# Numbers of images behind the paper's numbers, by data set.
IMAGES = {
    "cifar10": {"train": 50000, "val": 10000},
    "imagenet100": {"train": 126689, "val": 5000},
    "folder": {"train": 1281167, "val": 50000},
    "copydays": {"original": 157, "strong": 229, "distractors": 10000, "whitening": 20000},
    "roxford5k": {"queries": 70, "database": 4993},
    "rparis6k": {"queries": 70, "database": 6322},
    "digits": {"train": 1400, "val": 397},
}
LAYOUTS = {
    "cifar10": ["cifar-10-batches-py/data_batch_1"],
    "imagenet": ["train", "val"],
    "copydays": ["original", "strong"],
    "roxford5k": ["gnd_roxford5k.pkl", "jpg"],
    "rparis6k": ["gnd_rparis6k.pkl", "jpg"],
}
TREE = (
    "cifar10/cifar-10-batches-py, imagenet/{train,val}/CLASS, copydays/{original,strong}, "
    "roxford5k/{gnd_roxford5k.pkl,jpg}, rparis6k/{gnd_rparis6k.pkl,jpg}"
)

# The miniature study: rows shaped like Table 6. `run digits` takes the options after recipes/study.args.
STUDY = {
    "untrained": ("untrained", None),
    "pixels": ("raw pixels", None),
    "dino": ("DINO", "--loss cls --geometry batch"),
    "dino-image": ("DINO, crops drawn per image", "--loss cls --geometry image"),
    "mean": ("Ours, mean", "--loss mean --geometry batch"),
    "sum": ("Ours, sum", "--loss sum --geometry batch"),
    **{
        f"lambda{value}": (f"Ours, λ = {value}", f"--loss lambda --lambda_cls {value} --geometry batch")
        for value in (0.9, 0.5, 0.2)
    },
}
STUDY_COLUMNS = ("linear", "knn10", "knn20")
STUDY_LINEAR = ["--cache_features", "--lr", "0.5", "--epochs", "100"]  # DINO's 0.001 is for 100 epochs of ImageNet


@cache
def paper():
    """Return the paper's tables: {"tables": {name: {"title", "columns", "rows"}}, "contradictions"}."""
    return json.loads((ROOT / "recipes" / "paper.json").read_text(encoding="utf-8"))


@dataclass
class Step:
    """One command: a script with its options, and the file that says that it is done."""

    name: str
    words: list
    result: Path

    def settings(self):
        """Return the arguments that the words stand for."""
        script, *words = self.rooted_words()
        parse = parse_arguments if self.name == "lists" else SCRIPTS[script].parse_arguments
        return parse(words)

    def done(self):
        """Return whether it has ended, with these settings."""
        if self.name == "lists":
            return self.result.is_file()
        if self.name == "pretraining":
            run = self.result.parent
            return progress(run) == 1.0 and not differences(vars(self.settings()), read_json(run / "args.json"))
        result = read_result(self.result)
        return result is not None and not differences(vars(self.settings()), result["args"])

    def line(self, processes):
        launcher = f"torchrun --standalone --nproc_per_node={processes} " if processes > 1 else "python "
        return launcher + shlex.join(map(str, self.words))

    def command(self, processes):
        """Return the words to run from any folder."""
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        script, *words = self.rooted_words()
        return [*launcher, str(ROOT / script), *words]

    def rooted_words(self):
        return [re.sub("^@recipes", f"@{ROOT / 'recipes'}", str(word)) for word in self.words]


@dataclass
class Setup:
    """Where the data and the runs are, and what a user changes.

    Attributes:
        data_root, runs: folders.
        processes: each evaluation and pretraining runs in so many.
        classes: file of the classes of ImageNet-100; None for the recipes' own.
        extra: further words for main_lgssl.py.
    """

    data_root: Path
    runs: Path
    processes: int = 1
    classes: str | None = None
    extra: tuple = ()

    def data_words(self, dataset):
        """Return the options that name a data set's images."""
        words = ["--data_path", self.data_root / ("cifar10" if dataset == "cifar10" else "imagenet")]
        return words + (["--classes", self.classes] if self.classes and dataset == "imagenet100" else [])

    def share(self, total, whose):
        """Return a process's share of a total batch."""
        if total % self.processes:
            raise UserError(f"--nproc_per_node {self.processes} does not divide {whose} batch of {total}")
        return total // self.processes


def recipe_arguments(recipe):
    """Return the arguments that a recipe stands for."""
    return main_lgssl.parse_arguments([f"@{ROOT / 'recipes' / recipe}.args"])


def pretraining_step(recipe, setup):
    """Return the pretraining of a recipe with its batch shared out among any number of processes."""
    args = recipe_arguments(recipe)
    share = setup.share(TOTAL_BATCH, "the recipes'")
    batch_size = next(size for size in range(min(args.batch_size_per_gpu, share), 0, -1) if share % size == 0)
    words = ["main_lgssl.py", f"@recipes/{recipe}.args", *setup.data_words(args.dataset)]
    words += ["--batch_size_per_gpu", batch_size, "--accum_steps", share // batch_size]
    words += ["--output_dir", setup.runs / recipe, *setup.extra]
    return Step("pretraining", words, setup.runs / recipe / "checkpoint.pth")


def evaluation_steps(recipe, names, setup):
    """Return the evaluations of a recipe, and before them the drawing of the lists that copy detection needs."""
    dataset = recipe_arguments(recipe).dataset
    folder, lists, data_root = setup.runs / recipe, setup.runs / "lists", setup.data_root
    steps = []
    for name in names:
        if name in ("linear", "knn"):
            words = ["--dataset", dataset, *setup.data_words(dataset)]
            if name == "linear":
                words += ["--batch_size_per_gpu", setup.share(LINEAR_BATCH, "the linear evaluation's")]
            result = f"{name}_{dataset}.json"
        elif name == "copydays":
            words = ["reproduce.py", "lists", data_root / "imagenet", "--output_dir", lists]
            words += ["--classes", setup.classes] if setup.classes else []
            steps.append(Step("lists", words, lists / "distractors.txt"))
            words = ["--data_path", data_root / "copydays", "--distractors_path", lists / "distractors.txt"]
            whitening = data_root / "imagenet" / "train" if whitened_on_all(recipe) else lists / "whitening.txt"
            words += ["--whitening_path", whitening]
            result = "copydays.json"
        else:
            words = ["--data_path", data_root, "--dataset", name]
            result = f"{name}.json"
        script = f"{EVALUATIONS[name].__name__}.py"
        weights = ["--pretrained_weights", folder / "checkpoint.pth"]
        steps.append(Step(name, [script, *words, *weights], folder / result))
    return steps


def whitened_on_all(recipe):
    """Section 4.3.1: the whitening of networks trained on ImageNet-1K is learned on all of it."""
    return recipe.startswith("imagenet1k")


def row_steps(table, row, setup):
    """Return all steps of one row of a table of the paper."""
    columns, recipe = paper()["tables"][table]["columns"], paper()["tables"][table]["rows"][row]["recipe"]
    names = dict.fromkeys(COLUMNS[column][1] for column in columns)
    return [pretraining_step(recipe, setup), *evaluation_steps(recipe, names, setup)]


def study_steps(row, seed, runs, extra=()):
    """Return the steps of one row of the miniature study with one seed; those of the raw pixels are `raw_pixels`."""
    options = STUDY[row][1]
    folder = runs / "digits" / f"{row}-{seed}"
    steps = []
    if row == "pixels":
        model = ["--pretrained_weights", "none"]
    elif row == "untrained":
        model = ["--pretrained_weights", "none", "--arch", "vit_micro", "--patch_size", 8, "--crop_size", 32]
    else:
        words = ["main_lgssl.py", "@recipes/study.args", *options.split(), "--seed", seed, "--output_dir", folder]
        steps.append(Step("pretraining", [*words, *extra], folder / "checkpoint.pth"))
        model = ["--pretrained_weights", folder / "checkpoint.pth"]
    for name, more in (("linear", STUDY_LINEAR), ("knn", [])):
        words = [f"eval_{name}.py", "--dataset", "digits", *model, *more]
        words += ["--seed", seed, "--num_workers", 0, "--output_dir", folder]
        steps.append(Step(name, words, folder / f"{name}_digits.json"))
    return steps


def raw_pixels(linear, knn):
    """Take the two evaluations' steps with the digits' own 8×8 pixels, normalised as for a network, as features."""
    features, labels = {}, {}
    pixels = to_pixels()
    for split in ("train", "val"):
        dataset = build_dataset("digits", split=split, transform=lambda image: pixels(image)[0].flatten())
        features[split] = torch.stack([image for image, _ in dataset])  # [n, 64]
        labels[split] = torch.tensor(dataset.labels)
    images = {split: len(part) for split, part in labels.items()}
    units = {split: F.normalize(values) for split, values in features.items()}
    args = linear.settings()
    batch_size, epochs = args.batch_size_per_gpu, args.epochs
    steps_per_epoch = -(-images["train"] // batch_size)
    steps = range(epochs * steps_per_epoch)
    sampler = BatchSampler(images["train"], batch_size, steps, seed=args.seed, drop_last=False)
    batches = eval_linear.cached_batches(sampler, features["train"], labels["train"])
    classifier = eval_linear.new_classifier(64, 10, args.seed)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.0, momentum=0.9)
    lr = args.lr * batch_size / 256
    best = 0.0
    for _ in eval_linear.train(classifier, optimizer, batches, steps_per_epoch, epochs, lr):
        best = max(best, eval_linear.accuracy(classifier, features["val"], labels["val"])[0])
    linear.result.parent.mkdir(parents=True, exist_ok=True)
    result = {"top1": best, "batch_size": batch_size, "images": images}
    write_result(linear.result, result, {}, args)
    args = knn.settings()
    neighbours = {}
    for k in args.nb_knn:
        top1, top5 = eval_knn.knn_accuracy(units["train"], labels["train"], units["val"], labels["val"], k)
        neighbours[k] = {"top1": top1, "top5": top5}
    write_result(knn.result, {"knn": neighbours, "images": images}, {}, args)


def read_json(path):
    """Return the dictionary in a file; an empty one where there is none."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def progress(run):
    """Return the share of its epochs that a pretraining has done."""
    epochs = read_json(run / "args.json").get("epochs")
    try:
        lines = (run / "log.txt").read_text().splitlines()
        done = json.loads(lines[-1])["epoch"] + 1 if lines and (run / "checkpoint.pth").is_file() else 0
    except (OSError, ValueError, KeyError):
        return 0.0
    return done / epochs if epochs else 0.0


def read_result(path):
    """Return an evaluation's result; None where there is none, or only of a pretraining that had not ended."""
    result = read_json(path)
    pretraining = result.get("pretraining", {})
    return result if "args" in result and pretraining.get("epoch") == pretraining.get("epochs") else None


def differences(expected, actual):
    """Return the settings of `actual` that are not the expected ones, as texts; where the run is, is no setting."""
    ignored = {*MAY_CHANGE, *PLACES}
    return [
        f"--{name} {actual.get(name)} instead of {'its default' if value is None else value}"
        for name, value in expected.items()
        if name not in ignored and actual.get(name) != value
    ]


def changed_settings(pretraining, total_batch, step, images):
    """Return what in the result of a step is not as the recipe, the protocol and the data set have it, as texts.

    Args:
        pretraining: the recipe's settings.
        total_batch: of the pretraining.
        step: an evaluation with a result.
        images: {split or block of the data set: number of its images}.
    """
    result = read_result(step.result)
    changed = []
    if result["pretraining"]:  # not a random network
        batch_size = result["pretraining"].get("batch_size", total_batch)
        changed += [f"a total batch of {batch_size} instead of {total_batch}"] if batch_size != total_batch else []
        changed += differences(pretraining, result["pretraining"])
    wanted = step.settings()
    if step.name == "linear" and result["batch_size"] != wanted.batch_size_per_gpu:
        changed += [f"{result['batch_size']} images a step instead of {wanted.batch_size_per_gpu}"]
    changed += differences(vars(wanted), result["args"])
    return changed + [
        f"{result['images'].get(split, 0)} {split} images instead of {count}"
        for split, count in images.items()
        if result["images"].get(split, 0) != count
    ]


class Notes:
    """Numbered notes below a table, the same text once."""

    def __init__(self):
        self.texts = []

    def mark(self, evaluation, changes):
        """Return what to add to a cell: a reference to the note, or nothing where nothing was changed."""
        if not changes:
            return ""
        text = f"{evaluation}: {', '.join(changes)}."
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}]"

    def lines(self):
        return [f"[{i}] {text}" for i, text in enumerate(self.texts, 1)]


def report(runs):
    """Return the tables of the paper, and of the miniature study where it was run, in Markdown."""
    lines = ["Each cell: the paper's number / ours (difference).", ""]
    setup = Setup(Path("DATA"), runs)
    for name, table in paper()["tables"].items():
        columns = [COLUMNS[column] for column in table["columns"]]
        lines += [f"### {name.capitalize().replace('e', 'e ', 1)}. {table['title']}", ""]
        lines += ["| method | " + " | ".join(title for title, *_ in columns) + " |", "|---|" + "---|" * len(columns)]
        notes = Notes()
        for row in table["rows"].values():
            recipe = row["recipe"]
            names = dict.fromkeys(evaluation for _, evaluation, *_ in columns)
            steps = {step.name: step for step in evaluation_steps(recipe, names, setup)}
            pretraining = vars(recipe_arguments(recipe))
            cells = []
            for (_, evaluation, value, form), theirs in zip(columns, row["paper"], strict=True):
                step = steps[evaluation]
                try:
                    ours = value(read_result(step.result))
                except (KeyError, TypeError):  # nothing, or not this number
                    cells.append(f"{theirs:{form}} / not run")
                    continue
                images = IMAGES[pretraining["dataset"] if evaluation in ("linear", "knn") else evaluation]
                if evaluation == "copydays" and whitened_on_all(recipe):
                    images = {**images, "whitening": IMAGES["folder"]["train"]}
                mark = notes.mark(evaluation, changed_settings(pretraining, TOTAL_BATCH, step, images))
                cells.append(f"{theirs:{form}} / {ours:{form}} ({ours - theirs:+{form}}){mark}")
            lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
        lines += ["", *notes.lines(), ""] if notes.texts else [""]
    lines += ["### Where the paper contradicts itself", ""]
    lines += [f"- {text}" for text in recurring_differences() + paper()["contradictions"]]
    study = study_report(runs)
    return "\n".join(lines + (["", *study] if study else [])) + "\n"


def recurring_differences():
    """Return a sentence for each run that stands in two tables with different numbers in the same columns."""
    seen, sentences = {}, []
    for name, table in paper()["tables"].items():
        for row in table["rows"].values():
            key = (row["recipe"], tuple(table["columns"]))
            first, numbers = seen.setdefault(key, (name, row["paper"]))
            if numbers != row["paper"]:
                titles = ", ".join(COLUMNS[column][0] for column in table["columns"])
                there, here = (" / ".join(f"{value:.2f}" for value in values) for values in (numbers, row["paper"]))
                run = f"{row['method']} pretrained on {row['recipe'].split('_')[0]}"
                sentences.append(f"{run} ({titles}) is {there} in {first} and {here} in {name}.")
    return sentences


def study_report(runs):
    """Return the lines of the miniature study's table: mean ± standard deviation over the seeds that were run."""
    rows, notes = [], Notes()
    for row, (label, _) in STUDY.items():
        scores, marks = ({column: [] for column in STUDY_COLUMNS} for _ in range(2))
        for folder in sorted((runs / "digits").glob(f"{row}-[0-9]*")):
            *pretraining, linear, knn = study_steps(row, folder.name.removeprefix(f"{row}-"), runs)
            wanted = vars(pretraining[0].settings()) if pretraining else {}
            for column in STUDY_COLUMNS:
                _, evaluation, value, _ = COLUMNS[column]
                step = linear if evaluation == "linear" else knn
                result = read_result(step.result)
                if result is not None:
                    scores[column].append(value(result))
                    total = wanted.get("batch_size_per_gpu")
                    mark = notes.mark(evaluation, changed_settings(wanted, total, step, IMAGES["digits"]))
                    marks[column] += [mark] * (mark not in marks[column])
        counts = sorted({len(values) for values in scores.values()})
        if counts[-1] > 0:
            cells = [spread(values) + "".join(marks[column]) for column, values in scores.items()]
            seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            rows.append(f"| {label} | {seeds} | " + " | ".join(cells) + " |")
    if not rows:
        return []
    titles = " | ".join(COLUMNS[column][0] for column in STUDY_COLUMNS)
    lines = ["### Miniature study on digits: top-1 accuracy in %, mean ± standard deviation over the seeds", ""]
    lines += ["The linear classifier is trained on cached features of un-augmented images, at a learning rate of 0.5."]
    lines += ["", f"| method | seeds | {titles} |", "|---|---|" + "---|" * len(STUDY_COLUMNS), *rows]
    return lines + (["", *notes.lines()] if notes.texts else [])


def spread(values):
    if not values:
        return "not run"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def parse_arguments(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    description, epilog = __doc__.splitlines()[0], "COMMAND --help lists its options. -- OPTIONS go to main_lgssl.py."
    parser = ArgumentParser(description=description, epilog=epilog)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_overview_command(commands, "list", "list what there is, and what is done")
    add_table_command(commands, "show", "show the commands of a table's rows")
    add_table_command(commands, "run", "run the commands of a table's rows that are not done")
    add = add_overview_command(commands, "report", "report the paper's numbers and ours")
    add("--output", help="file of the report; default: it is printed")
    add_lists_command(commands)
    args = parser.parse_args(argv[:split])
    args.extra = argv[split + 1 :]
    if args.command == "lists":
        return args
    if args.command in ("show", "run") and args.table is None:
        parser.error(f"{args.command} needs a table: {', '.join(paper()['tables'])} or digits")
    if args.row and args.table is None:
        parser.error(f"--row {args.row[0]} needs a table")
    rows = STUDY if args.table == "digits" else paper()["tables"][args.table]["rows"] if args.table else {}
    unknown = [row for row in args.row or [] if row not in rows]
    if unknown:
        parser.error(f"{args.table} has no row {unknown[0]}, expected some of {', '.join(rows)}")
    if args.command == "run" and args.table != "digits" and args.data_root is None:
        parser.error(f"run {args.table} needs --data_root, a folder that holds {TREE}")
    args.row = args.row or list(rows)
    return args


def add_overview_command(commands, name, text):
    """Add a command that looks at all tables, and return its group's add_argument."""
    sub = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
    sub.set_defaults(table=None)
    sub.add_argument("--row", nargs="+", help=argparse.SUPPRESS)  # refused, and why
    add = sub.add_argument_group("where").add_argument
    add("--runs", default="runs", help="folder of all runs and results")
    return add


def add_table_command(commands, name, text):
    """Add a command that takes the rows of one table."""
    epilog = "-- OPTIONS go to main_lgssl.py."
    sub = commands.add_parser(name, help=text, description=f"{text.capitalize()}.", epilog=epilog)
    # fmt: off
    add = sub.add_argument_group("what").add_argument
    add("table", nargs="?", metavar="TABLE", choices=(*paper()["tables"], "digits"), help="table1 to table8, or digits")
    add("--row", nargs="+", help="rows of the table, as `list` names them; default: all")
    add("--seeds", type=number(int, 1), default=5, help="number of seeds (digits)")
    add = sub.add_argument_group("where").add_argument
    add("--data_root", help=f"folder that holds {TREE}, as far as they are needed")
    add("--classes", help="file of 100 class folders; default: recipes/imagenet100_cmc.txt")
    add("--runs", default="runs", help="folder of all runs and results")
    add = sub.add_argument_group("computation").add_argument
    add("--nproc_per_node", type=number(int, 1), default=1, help="processes; the batch is shared out")
    add("--jobs", type=number(int, 1), help="runs at a time (digits); default: the CPU cores, at most 8")
    # fmt: on


def add_lists_command(commands):
    """Add the command that draws the images of copy detection."""
    text = "write the lists of images that copy detection needs (section 4.3.1)"
    sub = commands.add_parser("lists", help=text, description=f"{text.capitalize()}.")
    # fmt: off
    add = sub.add_argument_group("images").add_argument
    add("imagenet", metavar="IMAGENET", help="ImageNet: class folders, or train and val with class folders")
    add("--classes", default=IMAGENET100_CLASSES, help="file with the class folders to leave out")
    add = sub.add_argument_group("lists").add_argument
    add("--output_dir", default=".", help="folder of whitening.txt and distractors.txt")
    add("--whitening", type=number(int, 1), default=20000, help="number of images in whitening.txt")
    add("--distractors", type=number(int, 1), default=10000, help="number of images in distractors.txt")
    add("--seed", type=number(int, 0), default=0, help="of the drawing")
    # fmt: on


def main(argv=None):
    args = parse_arguments(argv)
    if args.command == "list":
        list_tables(Path(args.runs))
    elif args.command == "report":
        write_report(report(Path(args.runs)), args.output)
    elif args.command == "lists":
        whitening, distractors = eval_copy_detection.copydays_lists(
            args.imagenet,
            count_whitening=args.whitening,
            count_distractors=args.distractors,
            seed=args.seed,
            classes=args.classes,
        )
        write_lists({"whitening": whitening, "distractors": distractors}, Path(args.output_dir))
    elif args.table == "digits":
        jobs = args.jobs or min(os.cpu_count(), 8)
        run_study(args.row, args.seeds, Path(args.runs), jobs, args.extra, only_show=args.command == "show")
    else:
        data_root = Path(args.data_root or "DATA")
        setup = Setup(data_root, Path(args.runs), args.nproc_per_node, args.classes, tuple(args.extra))
        run_rows(args.table, args.row, setup, only_show=args.command == "show")


def write_report(text, path):
    """Write the report, or print it where `path` is None."""
    if path is None:
        print(text, end="")
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --output {path}: {error.strerror}") from error


def write_lists(lists, folder):
    """Write {name: paths} to the files NAME.txt of a folder, one path a line."""
    for name, paths in lists.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            utils.write_text("".join(f"{path}\n" for path in paths), folder / f"{name}.txt")
        except OSError as error:
            raise UserError(f"cannot write to --output_dir {folder}: {error.strerror}") from error
        print(f"{len(paths)} images in {folder / name}.txt", flush=True)


def run_rows(table, rows, setup, only_show):
    """Run, or show, the steps of some rows of a table of the paper, as far as they are not done."""
    steps = {row: row_steps(table, row, setup) for row in rows}
    if not only_show:
        check_data(sum(steps.values(), []), setup.data_root)
    for row, its_steps in steps.items():
        print(f"# {table}, {paper()['tables'][table]['rows'][row]['method']}", flush=True)
        for step in its_steps:
            processes = 1 if step.name == "lists" else setup.processes
            print(step.line(processes) + ("    # done" if step.done() else ""), flush=True)
            if not only_show and not step.done():
                run_step(step, processes)


def list_tables(runs):
    for name, table in paper()["tables"].items():
        print(f"{name}: {table['title']}")
        evaluations = dict.fromkeys(COLUMNS[column][1] for column in table["columns"])
        for row, entry in table["rows"].items():
            steps = evaluation_steps(entry["recipe"], evaluations, Setup(Path("DATA"), runs))
            state = [f"pretraining {int(100 * progress(runs / entry['recipe']))}%"]
            state += [f"{step.name} {'done' if step.done() else '-'}" for step in steps if step.name != "lists"]
            print(f"  {row:17} {entry['recipe']:29} {', '.join(state)}")
    print("digits: the miniature study, five seeds of each row")
    for row in STUDY:
        seeds = [folder.name.removeprefix(f"{row}-") for folder in (runs / "digits").glob(f"{row}-[0-9]*")]
        done = sum(all(step.done() for step in study_steps(row, seed, runs)) for seed in seeds)
        print(f"  {row:17} {'study':29} {done} seeds done")


def check_data(steps, data_root):
    """Check that the data sets of the steps to run are where they are looked for."""
    for step in steps:
        if step.done():
            continue
        for word in map(str, step.words):
            folder = Path(word)
            needed = LAYOUTS.get(folder.name, []) if folder.parent == data_root else []
            if word == str(data_root) and step.name in LAYOUTS:  # a retrieval benchmark
                folder, needed = data_root / step.name, LAYOUTS[step.name]
            missing = [name for name in needed if not (folder / name).exists()]
            if missing:
                raise UserError(f"no {folder / missing[0]}: expected below {data_root} {TREE}")


def run_step(step, processes):
    code = subprocess.run(step.command(processes)).returncode
    if code:
        raise UserError(f"{step.name} ended with exit code {code}; once that is mended the same command goes on")


def run_study(rows, seeds, runs, jobs, extra, only_show):
    """Run, or show, the rows of the miniature study, each with the seeds 0, 1, ..., one thread a run."""
    work = [(row, seed) for seed in range(seeds) for row in rows]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run_one(row, seed):
        folder = runs / "digits" / f"{row}-{seed}"
        steps = study_steps(row, seed, runs, extra)
        if row == "pixels":
            linear, knn = steps
            if not (linear.done() and knn.done()):
                raw_pixels(linear, knn)
        else:
            for step in steps:
                if step.done():
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / "output.txt").open("a") as output:
                    process = subprocess.run(step.command(1), env=environment, stdout=output, stderr=output)
                if process.returncode:
                    last = (folder / "output.txt").read_text().strip().splitlines()[-1]
                    raise UserError(f"{step.name} of {row}, seed {seed}, failed: {last}")
        print(f"{row}, seed {seed}: done", flush=True)

    if only_show:
        for row, seed in work:
            print(f"# digits, {STUDY[row][0]}, seed {seed}")
            for step in study_steps(row, seed, runs, extra) if row != "pixels" else []:
                print(step.line(1) + ("    # done" if step.done() else ""))
        return
    with ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(run_one, row, seed) for row, seed in work]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
    print("\n".join(study_report(runs)))


if __name__ == "__main__":
    with utils.one_line_errors():
        main()
