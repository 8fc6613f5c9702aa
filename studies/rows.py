"""What the studies compare: rows with their options, and the settings that the search draws."""

from dataclasses import dataclass, replace
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
        linear: further options of the linear evaluation.
    """

    label: str
    recipe: str | None
    options: str
    seeds: int = 5
    linear: str = ""


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: name of its files.
        title: title of its tables.
        data: options of the data set.
        folder: folder of the data set below --data_root, or None if the data set needs no path.
        images: numbers of training and validation images.
        rows: {name: Row}.
        tables: {title of a table: names of its rows}. The row with the label "DINO" is the one that the others are
            compared with.
        linear: options of the linear evaluation, for every row.
    """

    name: str
    title: str
    data: str
    folder: str | None
    images: tuple[int, int]
    rows: dict[str, Row]
    tables: dict[str, list[str]]
    linear: str = "--cache_features --lr 0.5 --epochs 100"  # DINO's 0.001 is for 100 epochs of ImageNet


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
        "pixels": Row("raw pixels", None, f"--pretrained_weights pixels {pixels}", linear="--lr 0.005"),
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
    ),
    "fashion": Study(
        name="fashion",
        title="Fashion-MNIST",
        data="--dataset torchvision:FashionMNIST --train_images 4000",
        folder="fashion-mnist",
        images=(4000, 10000),
        rows=searched_rows("fashion", "--arch vit_micro --patch_size 8 --crop_size 32", "--crop_size 28"),
        tables=SEARCHED_TABLES,
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
