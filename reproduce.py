"""The paper's tables, one command per row, and a miniature of Table 6 that runs on two CPU cores.

    python reproduce.py list                                                what there is, and what is done
    python reproduce.py show table6 --row mean --data_root DATA             the commands of a row
    python reproduce.py run table6 --row mean --data_root DATA              runs those that are not done yet
    python reproduce.py run digits                                          the miniature study
    python reproduce.py report --output results.md                          the tables: paper, ours, difference

What follows `--` goes to main_lgssl.py, for instance `-- --precision bf16`. The report says which settings a run
changed.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import eval_copy_detection
import eval_image_retrieval
import eval_knn
import eval_linear
import main_lgssl
import utils
from datasets import BatchOrder, build_dataset
from features import to_pixels
from utils import UserError, number

ROOT = Path(__file__).parent
PAPER = json.loads((ROOT / "recipes" / "paper.json").read_text(encoding="utf-8"))
# The batch of recipes/choices.args on the released code's four GPUs. On fewer or more processes it stays the same.
TOTAL_BATCH = 160

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


# --- commands


@dataclass
class Step:
    """One command: a script with its options, and the file that says that it is done."""

    name: str
    words: list
    result: Path

    def done(self):
        if self.name == "lists":
            return self.result.is_file()
        if self.name == "pretraining":
            return progress(self.result.parent) == 1.0
        return read_result(self.result) is not None

    def line(self, processes):
        launcher = f"torchrun --standalone --nproc_per_node={processes} " if processes > 1 else "python "
        return launcher + shlex.join(map(str, self.words))

    def command(self, processes):
        """Return the words to run from any folder."""
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        script, *words = map(str, self.words)
        return [*launcher, str(ROOT / script), *(word.replace("@recipes", f"@{ROOT / 'recipes'}") for word in words)]


def recipe_arguments(recipe):
    """Return the arguments that a recipe stands for."""
    return main_lgssl.parse_arguments([f"@{ROOT / 'recipes' / recipe}.args"])


def pretraining_step(recipe, data_root, runs, processes=1, extra=()):
    """Return the pretraining of a recipe with its batch shared out among any number of processes."""
    args = recipe_arguments(recipe)
    if TOTAL_BATCH % processes:
        raise UserError(f"--nproc_per_node {processes} does not divide the recipes' batch of {TOTAL_BATCH}")
    share = TOTAL_BATCH // processes
    batch_size = next(size for size in range(min(args.batch_size_per_gpu, share), 0, -1) if share % size == 0)
    words = ["main_lgssl.py", f"@recipes/{recipe}.args"]
    words += ["--data_path", data_folder(args.dataset, data_root)]
    words += ["--batch_size_per_gpu", batch_size, "--accum_steps", share // batch_size]
    words += ["--output_dir", runs / recipe, *extra]
    return Step("pretraining", words, runs / recipe / "checkpoint.pth")


def data_folder(dataset, data_root):
    return data_root / {"cifar10": "cifar10"}.get(dataset, "imagenet")


def evaluation_steps(recipe, names, data_root, runs):
    """Return the evaluations of a recipe, and before them the drawing of the lists that copy detection needs."""
    dataset = recipe_arguments(recipe).dataset
    weights = ["--pretrained_weights", runs / recipe / "checkpoint.pth"]
    steps = []
    for name in names:
        if name in ("linear", "knn"):
            words = ["--dataset", dataset, "--data_path", data_folder(dataset, data_root)]
            result = f"{name}_{dataset}.json"
        elif name == "copydays":
            lists = runs / "lists"
            words = ["datasets.py", data_root / "imagenet", "--output_dir", lists]
            steps.append(Step("lists", words, lists / "distractors.txt"))
            # Section 4.3.1: the whitening of networks trained on ImageNet-1K is learned on all of it.
            whole = recipe.startswith("imagenet1k")
            words = ["--data_path", data_root / "copydays", "--distractors_path", lists / "distractors.txt"]
            words += ["--whitening_path", data_root / "imagenet" / "train" if whole else lists / "whitening.txt"]
            result = "copydays.json"
        else:
            words = ["--data_path", data_root, "--dataset", name]
            result = f"{name}.json"
        script = f"{EVALUATIONS[name].__name__}.py"
        steps.append(Step(name, [script, *words, *weights], runs / recipe / result))
    return steps


def row_steps(table, row, data_root, runs, processes=1, extra=()):
    """Return all steps of one row of a table of the paper."""
    columns, recipe = PAPER["tables"][table]["columns"], PAPER["tables"][table]["rows"][row]["recipe"]
    names = dict.fromkeys(COLUMNS[column][1] for column in columns)
    evaluations = evaluation_steps(recipe, names, data_root, runs)
    return [pretraining_step(recipe, data_root, runs, processes, extra), *evaluations]


def study_steps(row, seed, runs, extra=()):
    """Return the steps of one row of the miniature study with one seed; the raw pixels need none."""
    options = STUDY[row][1]
    folder = runs / "digits" / f"{row}-{seed}"
    steps = []
    if row == "untrained":
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


def raw_pixels(seed, folder):
    """Evaluate the digits' own 8×8 pixels, normalised as for a network, in place of features."""
    features, labels = {}, {}
    pixels = to_pixels()
    for split in ("train", "val"):
        dataset = build_dataset("digits", split=split, transform=lambda image: pixels(image)[0].flatten())
        features[split] = torch.stack([image for image, _ in dataset])  # [n, 64]
        labels[split] = torch.tensor(dataset.labels)
    units = {split: F.normalize(values) for split, values in features.items()}
    args = eval_linear.parse_arguments(["--pretrained_weights", "none", *STUDY_LINEAR])
    order = BatchOrder(len(labels["train"]), args.batch_size_per_gpu, seed=seed, drop_last=False)
    classifier = eval_linear.new_classifier(64, 10, seed)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.0, momentum=0.9)
    lr, best = args.lr * args.batch_size_per_gpu / 256, 0.0

    def batches():
        return eval_linear.cached_batches(order, features["train"], labels["train"])

    for _ in eval_linear.train(classifier, optimizer, order, batches, args.epochs, lr):
        best = max(best, eval_linear.accuracy(classifier, features["val"], labels["val"])[0])
    neighbours = {
        k: {"top1": eval_knn.knn_accuracy(units["train"], labels["train"], units["val"], labels["val"], k)[0]}
        for k in (10, 20)
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "knn_digits.json").write_text(json.dumps({"knn": neighbours}) + "\n")
    (folder / "linear_digits.json").write_text(json.dumps({"top1": best}) + "\n")


# --- results


def progress(run):
    """Return the share of its epochs that a pretraining has done."""
    try:
        epochs = json.loads((run / "args.json").read_text())["epochs"]
        lines = (run / "log.txt").read_text().splitlines()
        done = json.loads(lines[-1])["epoch"] + 1 if lines and (run / "checkpoint.pth").is_file() else 0
    except (OSError, ValueError, KeyError):
        return 0.0
    return done / epochs


def read_result(path):
    """Return an evaluation's result; None where there is none, or only of a pretraining that had not ended."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    pretraining = result.get("pretraining", {})
    return result if pretraining.get("epoch") == pretraining.get("epochs") else None


def changed_settings(recipe, step, result):
    """Return what of a result's pretraining and evaluation is not as the recipe and the protocol have it, as text."""
    wanted, found = vars(recipe_arguments(recipe)), dict(result["pretraining"])
    total = found.get("batch_size")
    differences = [] if total in (None, TOTAL_BATCH) else [f"a total batch of {total} instead of {TOTAL_BATCH}"]
    skip = [*main_lgssl.MAY_CHANGE, "batch_size_per_gpu", "accum_steps", "precision"]
    evaluation = vars(EVALUATIONS[step.name].parse_arguments(list(map(str, step.words[1:]))))
    evaluation = {name: value for name, value in evaluation.items() if value is not None}
    skip_there = [*eval_linear.MAY_CHANGE, "data_path", "whitening_path", "distractors_path", "classes"]
    for expected, actual, ignored in ((wanted, found, skip), (evaluation, result["args"], skip_there)):
        differences += [
            f"--{name} {actual.get(name)} instead of {value}"
            for name, value in expected.items()
            if name not in ignored and actual.get(name) != value
        ]
    return ", ".join(differences)


def report(runs):
    """Return the tables of the paper, and of the miniature study where it was run, in Markdown."""
    lines = ["Each cell: the paper's number / ours (difference).", ""]
    for name, table in PAPER["tables"].items():
        columns = [COLUMNS[column] for column in table["columns"]]
        lines += [f"### {name.capitalize().replace('e', 'e ', 1)}. {table['title']}", ""]
        lines += ["| method | " + " | ".join(title for title, *_ in columns) + " |", "|---|" + "---|" * len(columns)]
        notes = []
        for row in table["rows"].values():
            names = dict.fromkeys(evaluation for _, evaluation, *_ in columns)
            steps = {step.name: step for step in evaluation_steps(row["recipe"], names, Path("DATA"), runs)}
            cells = []
            for (_, evaluation, value, form), paper in zip(columns, row["paper"], strict=True):
                result = read_result(steps[evaluation].result)
                try:
                    ours = value(result)
                except (KeyError, TypeError):  # nothing, or not this number
                    cells.append(f"{paper:{form}} / not run")
                    continue
                cells.append(f"{paper:{form}} / {ours:{form}} ({ours - paper:+{form}})")
                changed = changed_settings(row["recipe"], steps[evaluation], result)
                if changed:
                    note = f"{evaluation}: {changed}"
                    notes += [note] * (note not in notes)
                    cells[-1] += f" [{notes.index(note) + 1}]"
            lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
        lines += ["", *(f"[{i}] {note}." for i, note in enumerate(notes, 1)), ""] if notes else [""]
    lines += ["### Where the paper contradicts itself", ""]
    lines += [f"- {text}" for text in recurring_differences() + PAPER["contradictions"]]
    study = study_report(runs)
    return "\n".join(lines + (["", *study] if study else [])) + "\n"


def recurring_differences():
    """Return a sentence for each run that stands in two tables with different numbers in the same columns."""
    seen, sentences = {}, []
    for name, table in PAPER["tables"].items():
        for row in table["rows"].values():
            key = (row["recipe"], tuple(table["columns"]))
            first, numbers = seen.setdefault(key, (name, row["paper"]))
            if numbers != row["paper"]:
                titles = ", ".join(COLUMNS[column][0] for column in table["columns"])
                there, here = (" / ".join(f"{value:.2f}" for value in part) for part in (numbers, row["paper"]))
                run = f"{row['method']} pretrained on {row['recipe'].split('_')[0]}"
                sentences.append(f"{run} ({titles}) is {there} in {first} and {here} in {name}.")
    return sentences


def study_report(runs):
    """Return the lines of the miniature study's table: mean ± standard deviation over the seeds that were run."""
    rows = []
    for row, (label, _) in STUDY.items():
        values = {column: [] for column in STUDY_COLUMNS}
        for folder in sorted((runs / "digits").glob(f"{row}-[0-9]*")):
            for column, found in values.items():
                _, evaluation, value, _ = COLUMNS[column]
                result = read_result(folder / f"{evaluation}_digits.json")
                if result is not None:
                    found.append(value(result))
        counts = sorted({len(found) for found in values.values()})
        if counts[-1] > 0:
            cells = [spread(found) for found in values.values()]
            seeds = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
            rows.append(f"| {label} | {seeds} | " + " | ".join(cells) + " |")
    if not rows:
        return []
    titles = " | ".join(COLUMNS[column][0] for column in STUDY_COLUMNS)
    heading = ["### Miniature study on digits: top-1 accuracy in %, mean ± standard deviation over the seeds", ""]
    heading += [
        "The linear classifier is trained on cached features of un-augmented images, at a learning rate of 0.5.",
        "",
    ]
    return [*heading, f"| method | seeds | {titles} |", "|---|---|" + "---|" * len(STUDY_COLUMNS), *rows]


def spread(values):
    if not values:
        return "not run"
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


# --- the command line


def parse_arguments(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = utils.ArgumentParser(description=__doc__.splitlines()[0], epilog="-- OPTIONS go to main_lgssl.py.")
    parser.add_argument("command", choices=("list", "show", "run", "report"))
    parser.add_argument("table", nargs="?", choices=(*PAPER["tables"], "digits"), help="table1 to table8, or digits")
    parser.add_argument("--row", nargs="+", help="rows of the table, as `list` names them; default: all")
    parser.add_argument("--data_root", help=f"folder that holds {TREE}, as far as they are needed")
    parser.add_argument("--runs", default="runs", help="folder of all runs and results")
    parser.add_argument("--nproc_per_node", type=number(int, 1), default=1, help="processes; the batch is shared out")
    parser.add_argument("--seeds", type=number(int, 1), default=5, help="number of seeds (digits)")
    parser.add_argument(
        "--jobs", type=number(int, 1), help="runs at a time (digits); default: the CPU cores, at most 8"
    )
    parser.add_argument("--output", help="file of the report; default: it is printed")
    args = parser.parse_args(argv[:split])
    args.extra = argv[split + 1 :]
    if args.command in ("show", "run") and args.table is None:
        parser.error(f"{args.command} needs a table: {', '.join(PAPER['tables'])} or digits")
    rows = STUDY if args.table == "digits" else PAPER["tables"][args.table]["rows"] if args.table else {}
    unknown = [row for row in args.row or [] if row not in rows]
    if unknown:
        parser.error(f"{args.table} has no row {unknown[0]}, expected some of {', '.join(rows)}")
    if args.command == "run" and args.table != "digits" and args.data_root is None:
        parser.error(f"run {args.table} needs --data_root, a folder that holds {TREE}")
    args.row = args.row or list(rows)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    runs = Path(args.runs)
    if args.command == "list":
        list_tables(runs)
    elif args.command == "report":
        text = report(runs)
        if args.output is None:
            print(text, end="")
        else:
            try:
                Path(args.output).write_text(text, encoding="utf-8")
            except OSError as error:
                raise UserError(f"cannot write --output {args.output}: {error.strerror}") from error
    elif args.table == "digits":
        run_study(args.row, args.seeds, runs, args.jobs or min(os.cpu_count(), 8), args.extra, args.command == "show")
    else:
        data_root = Path(args.data_root or "DATA")
        steps = {row: row_steps(args.table, row, data_root, runs, args.nproc_per_node, args.extra) for row in args.row}
        if args.command == "run":
            check_data(sum(steps.values(), []), data_root)
        for row, its_steps in steps.items():
            print(f"# {args.table}, {PAPER['tables'][args.table]['rows'][row]['method']}", flush=True)
            for step in its_steps:
                processes = 1 if step.name == "lists" else args.nproc_per_node
                print(step.line(processes) + ("    # done" if step.done() else ""), flush=True)
                if args.command == "run" and not step.done():
                    run_step(step, processes)


def list_tables(runs):
    for name, table in PAPER["tables"].items():
        print(f"{name}: {table['title']}")
        evaluations = dict.fromkeys(COLUMNS[column][1] for column in table["columns"])
        for row, entry in table["rows"].items():
            steps = evaluation_steps(entry["recipe"], evaluations, Path("DATA"), runs)
            state = [f"pretraining {int(100 * progress(runs / entry['recipe']))}%"]
            state += [f"{step.name} {'done' if step.done() else '-'}" for step in steps if step.name != "lists"]
            print(f"  {row:17} {entry['recipe']:29} {', '.join(state)}")
    print("digits: the miniature study, five seeds of each row")
    for row in STUDY:
        done = len(list((runs / "digits").glob(f"{row}-[0-9]*/knn_digits.json")))
        print(f"  {row:17} {'study':29} {done} seeds done")


def check_data(steps, data_root):
    """Check that the data sets of the steps to run are where they are looked for."""
    for step in steps:
        if step.done():
            continue
        for word in map(str, step.words):
            folder = Path(word)
            needed = LAYOUTS.get(folder.name, []) if folder.parent == data_root else []
            if word == str(data_root):  # a retrieval benchmark
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

    def one(row, seed):
        folder = runs / "digits" / f"{row}-{seed}"
        if row == "pixels":
            raw_pixels(seed, folder)
        else:
            for step in study_steps(row, seed, runs, extra):
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
                print(step.line(1))
        return
    with ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(one, *key) for key in work]
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
