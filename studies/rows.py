"""What the studies compare: rows with their options, evaluations, and the settings that the search draws."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

import main_lgssl


class Row(NamedTuple):
    """A row of a study.

    Attributes:
        label: name of the method.
        recipe: name of the pretraining's recipe in this folder, or None without pretraining.
        options: options of main_lgssl.py after the recipe; without a recipe, options of the evaluations.
        seeds: number of seeds.
        more: {name of an evaluation: further options}.
        without: names of the evaluations that are left out, whose cells are empty.
    """

    label: str
    recipe: str | None
    options: str
    seeds: int = 5
    more: Mapping[str, str] = {}
    without: tuple[str, ...] = ()


class Evaluation(NamedTuple):
    """An evaluation of the runs of a study.

    Attributes:
        script: command with its protocol, if it has several.
        result: its JSON result below the folder of the run, as a pattern. Where several match, the newest counts: an
            earlier result with other settings keeps its file.
        options: options for every row.
        folder: folder of the data set below --data_root; None: that of the study.
    """

    script: str
    result: str
    options: str = ""
    folder: str | None = None


class Metric(NamedTuple):
    """A number in the result of an evaluation, and a column of the CSV file of runs.

    Attributes:
        evaluation: name of the evaluation.
        keys: of the number in the JSON result, from the outside in. A number that is missing is an empty cell.
        title: its column in the tables; "" leaves it out.
    """

    evaluation: str
    keys: tuple[str, ...]
    title: str = ""


LINEAR_OPTIONS = "--cache_features --lr 0.5 --epochs 100"  # DINO's 0.001 is for 100 epochs of ImageNet
LINEAR_NOTE = f"Linear: cached features of un-augmented images, `{LINEAR_OPTIONS}`"
PIXELS_OPTIONS = "--lr 0.005"
LINEAR_AND_KNN = {
    "linear": Evaluation("eval_linear.py", "linear_*.json", LINEAR_OPTIONS),
    "knn": Evaluation("eval_knn.py", "knn_*.json"),
}
IMAGES = ["images_train", "images_val"]  # metrics that every study has


def numbers_of_images(evaluation: str) -> dict[str, Metric]:
    """Return the metrics IMAGES, as an evaluation has counted them."""
    return {name: Metric(evaluation, ("images", name.removeprefix("images_"))) for name in IMAGES}


ACCURACIES = {
    "linear": Metric("linear", ("top1",), "linear"),
    "knn10": Metric("knn", ("knn", "10", "top1"), "k-NN, K = 10"),
    "knn20": Metric("knn", ("knn", "20", "top1"), "k-NN, K = 20"),
    "balanced": Metric("knn", ("knn", "10", "balanced_accuracy"), "balanced accuracy"),
    "linear_auroc": Metric("linear", ("auroc",)),  # of data sets with two classes
    "knn10_auroc": Metric("knn", ("knn", "10", "auroc")),
    **numbers_of_images("knn"),
}


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: name of its files.
        title: title of its tables.
        data: options of the data set, of pretraining and evaluations.
        folder: folder of the data set below --data_root, or None if the data set needs no path.
        images: numbers of training and validation images.
        rows: {name: Row}.
        tables: {title of a table: names of its rows}. The row with the label "DINO" is the one that the others are
            compared with.
        note: line below the tables.
        evaluations: {name: Evaluation}, in the order in which they run. Their settings are called NAME.SETTING.
        metrics: {column of the CSV file: Metric}, in the order of the columns.
        measures: what the tables show, in %.
    """

    name: str
    title: str
    data: str
    folder: str | None
    images: tuple[int, int]
    rows: dict[str, Row]
    tables: dict[str, list[str]]
    note: str = f"{LINEAR_NOTE}."
    evaluations: dict[str, Evaluation] = field(default_factory=lambda: LINEAR_AND_KNN)
    metrics: dict[str, Metric] = field(default_factory=lambda: ACCURACIES)
    measures: str = "Accuracy"

    @property
    def columns(self) -> list[str]:
        """Columns of the CSV file of runs."""
        return ["row", "seed", *self.metrics, "settings"]

    @property
    def shown(self) -> dict[str, str]:
        """{metric: its title} of the tables."""
        return {name: metric.title for name, metric in self.metrics.items() if metric.title}


METHODS = {"sum": ("Ours, sum", "--loss sum")}
METHODS |= {f"lambda{x}": (f"Ours, λ = {x}", f"--loss lambda --lambda_cls {x}") for x in (0.9, 0.5, 0.2)}
DINO_SETTING, MEAN_SETTING, PATCHES = "mean-dino-setting", "dino-mean-setting", "mean-patches"
SEPARATE, TWO_HEADS = "lambda0.5-separate", "Ours, λ = 0.5, two heads"
TWO_HEADS_LOSS = "--loss lambda --lambda_cls 0.5 --patch_head separate"
PATCH_LABEL, PATCH_LOSS = "Ours, mean, patch augmentation", "--loss mean --patch_augmentation"


def searched_rows(name: str, untrained: str, pixels: str) -> dict[str, Row]:
    """Return the rows of a study whose settings were searched.

    Args:
        untrained, pixels: options of the rows without pretraining.
    """
    dino, mean = f"{name}_dino", f"{name}_mean"
    return {
        "untrained": Row("untrained", None, f"--pretrained_weights none {untrained}"),
        "pixels": Row("raw pixels", None, f"--pretrained_weights pixels {pixels}", more={"linear": PIXELS_OPTIONS}),
        "dino": Row("DINO", dino, "--loss cls"),
        "mean": Row("Ours, mean", mean, "--loss mean"),
        **{row: Row(label, mean, options, seeds=3) for row, (label, options) in METHODS.items()},
        DINO_SETTING: Row("Ours, mean", dino, "--loss mean"),
        MEAN_SETTING: Row("DINO", mean, "--loss cls"),
        SEPARATE: Row(TWO_HEADS, dino, TWO_HEADS_LOSS),
        PATCHES: Row(PATCH_LABEL, mean, PATCH_LOSS, seeds=3),
    }


BATCH = "--geometry batch"
DIGITS = {
    "untrained": Row("untrained", None, "--pretrained_weights none --arch vit_micro --patch_size 8 --crop_size 32"),
    "pixels": Row("raw pixels", None, "--pretrained_weights pixels --crop_size 8"),
    "dino": Row("DINO", "digits", f"--loss cls {BATCH}"),
    "dino-image": Row("DINO, crops drawn per image", "digits", "--loss cls --geometry image"),
    "mean": Row("Ours, mean", "digits", f"--loss mean {BATCH}"),
    **{row: Row(label, "digits", f"{options} {BATCH}") for row, (label, options) in METHODS.items()},
    PATCHES: Row(PATCH_LABEL, "digits", f"{PATCH_LOSS} {BATCH}", seeds=3),
    SEPARATE: Row(TWO_HEADS, "digits", f"{TWO_HEADS_LOSS} {BATCH}"),
}
TABLE6 = {
    "dino": Row("DINO", "table6", "--loss cls", seeds=1),
    "mean": Row("Ours, mean", "table6", "--loss mean", seeds=1),
    SEPARATE: Row(TWO_HEADS, "table6", TWO_HEADS_LOSS, seeds=1),
}
PIXELS_NOTE = f"{LINEAR_NOTE}; raw pixels `{PIXELS_OPTIONS}`."
SCENES_NOTE = (
    "Seen, new: whether the pretraining has seen the objects of the validation images. "
    "k-NN segmentation: mIoU of the 12 classes of objects; linear segmentation: of all 13 classes. Image k-NN: K = 10. "
    "Color + position: no network, but the colors of a patch and its place; for image k-NN, all pixels."
)
DENSE = "--train_images 400 --crop_size 96"
KNN_DENSE, LINEAR_DENSE = f"{DENSE} --memory_size 20000", f"{DENSE} --lr 1"  # with 0.01, 175 steps hardly train
MEAN_OF_PATCHES = "--crop_size 96 --features patches_mean"
TOP1 = ("knn", "10", "top1")
SCENES_MEASURED = {  # evaluation: (script, options, data set below --data_root, number in the result, title)
    "knn_segmentation": (
        "eval_dense.py knn-segmentation",
        KNN_DENSE,
        "scenes/{}",
        ("miou_objects",),
        "k-NN segmentation",
    ),
    "linear_segmentation": (
        "eval_dense.py linear-segmentation",
        LINEAR_DENSE,
        "scenes/{}",
        ("miou",),
        "linear segmentation",
    ),
    "knn": ("eval_knn.py", "--crop_size 96", "scenes/{}/images", TOP1, "image k-NN, CLS"),
    "patch_knn": ("eval_knn.py", MEAN_OF_PATCHES, "scenes/{}/images", TOP1, "image k-NN, mean of patches"),
}
SCENES_EVALUATIONS, SCENES_METRICS = dict[str, Evaluation](), dict[str, Metric]()
for name, (script, options, folder, keys, title) in SCENES_MEASURED.items():
    for stamps in ("seen", "new"):
        own = f"{name}_{stamps}"
        SCENES_EVALUATIONS[own] = Evaluation(script, f"{own}/*.json", options, folder.format(stamps))
        SCENES_METRICS[own] = Metric(own, keys, f"{title}, {stamps}")
SCENES_METRICS |= numbers_of_images("knn_seen")
PATCH_KNN = ("patch_knn_seen", "patch_knn_new")  # raw pixels have no patch tokens
SCENES = {
    "untrained": Row("untrained", None, "--pretrained_weights none --arch vit_micro --patch_size 8", seeds=3),
    "pixels": Row("color + position", None, "--pretrained_weights pixels --patch_size 8", 1, without=PATCH_KNN),
    "dino": Row("DINO", "scenes", "--loss cls", seeds=3),
    "mean": Row("Ours, mean", "scenes", "--loss mean", seeds=3),
    "lambda0.5": Row("Ours, λ = 0.5", "scenes", "--loss lambda --lambda_cls 0.5", seeds=3),
    SEPARATE: Row(TWO_HEADS, "scenes", TWO_HEADS_LOSS, seeds=3),
    "sum": Row("Ours, sum", "scenes", "--loss sum", seeds=3),
}
SEARCHED_TABLES = {
    "each method with its own best setting": ["untrained", "pixels", "dino", "mean", *METHODS, PATCHES],
    "all with DINO's best setting": ["dino", DINO_SETTING, SEPARATE],
    "both with the best setting of the mean loss": [MEAN_SETTING, "mean"],
}
STUDIES = {
    "digits": Study(
        name="digits",
        title="scikit-learn's digits",
        data="--dataset digits",
        folder=None,
        images=(1400, 397),
        rows=DIGITS,
        tables={"all methods with one setting": list(DIGITS)},
    ),
    "solar": Study(
        name="solar",
        title="solar cells",
        data="--dataset elpv",
        folder=None,
        images=(1969, 655),
        rows=searched_rows("solar", "--arch vit_micro --patch_size 16 --crop_size 128", "--crop_size 64"),
        tables=SEARCHED_TABLES,
        note=PIXELS_NOTE,
    ),
    "fashion": Study(
        name="fashion",
        title="Fashion-MNIST",
        data="--dataset torchvision:FashionMNIST --train_images 4000",
        folder="fashion-mnist",
        images=(4000, 10000),
        rows=searched_rows("fashion", "--arch vit_micro --patch_size 8 --crop_size 32", "--crop_size 28"),
        tables=SEARCHED_TABLES,
        note=PIXELS_NOTE,
    ),
    "scenes": Study(
        name="scenes",
        title="scenes",
        data="",
        folder="scenes/seen/images",
        images=(4000, 600),
        rows=SCENES,
        tables={"all methods with one setting": list(SCENES)},
        note=SCENES_NOTE,
        evaluations=SCENES_EVALUATIONS,
        metrics=SCENES_METRICS,
        measures="mIoU and accuracy",
    ),
    "table6": Study(
        name="table6",
        title="Fashion-MNIST at the paper's size",
        data="--dataset torchvision:FashionMNIST --num_workers 5",
        folder="fashion-mnist",
        images=(60000, 10000),
        rows=TABLE6,
        tables={"all methods with one setting": list(TABLE6)},
    ),
}

# Settings that the search draws, each with its values. Weight decay grows tenfold, as in DINO.
SPACE = {
    "lr": [f"--lr {x}" for x in ("1e-3", "2e-3", "4e-3", "8e-3")],
    "temperature": [f"--teacher_temp {x} --warmup_teacher_temp {x}" for x in (0.02, 0.03, 0.04, 0.06)],
    "momentum": [f"--momentum_teacher {x}" for x in (0.97, 0.98, 0.99, 0.996)],
    "crops": [
        f"--global_crops_scale {x} --local_crops_scale {y}"
        for x, y in (("0.25 1", "0.05 0.25"), ("0.4 1", "0.05 0.4"), ("0.5 1", "0.25 0.5"), ("0.7 1", "0.5 0.8"))
    ],
    "prototypes": [f"--out_dim {x}" for x in (64, 256, 1024)],
    "head": [f"--use_bn_in_head {x}" for x in ("true", "false")],
    "weight decay": [f"--weight_decay {x} --weight_decay_end {10 * x:g}" for x in (0.01, 0.04, 0.1)],
    "distortion": [f"--distortion {x}" for x in (0, 0.3, 0.6, 1)],
}
SEARCHES = ("solar", "fashion")  # studies with recipes that were searched
SEARCHED = {"dino": "--loss cls", "mean": "--loss mean"}
SEARCH_SEED = 100  # differs from the seeds of the study


def draw(trial: int) -> str:
    """Return the options of a trial of the search, the same for all methods."""
    rng = np.random.default_rng((SEARCH_SEED, trial))
    return " ".join(values[rng.integers(len(values))] for values in SPACE.values())


def search_of(study: Study, trials: int) -> Study:
    """Return the search for the settings of a study as a study of its own, with the rows METHOD-TRIAL.

    A trial has half of the epochs of the study's recipe. It trains without the validation images, and without a fifth
    of the training images, on which it is judged.
    """
    epochs = main_lgssl.parse_arguments([f"@studies/{study.name}.args"]).epochs // 2
    rows = {
        f"{method}-{trial}": Row(f"{method}, trial {trial}", study.name, f"{loss} {draw(trial)} --epochs {epochs}")
        for trial in range(trials)
        for method, loss in SEARCHED.items()
    }
    held_out = study.images[0] // 5
    images = study.images[0] - held_out, held_out
    name, data = f"{study.name}_search", f"{study.data} --tuning"
    return replace(study, name=name, data=data, images=images, rows=rows, tables={})
