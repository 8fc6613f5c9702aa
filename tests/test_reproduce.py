import json
import re
from pathlib import Path

import pytest
from PIL import Image

import main_lgssl
import reproduce
from patch_matching import match_patches
from reproduce import ROOT, paper, recipe_arguments
from support.folders import listed_images
from utils import UserError

PAPER_TEXT = ROOT.parent / "shared" / "paper.md"
RECIPES = sorted({row["recipe"] for table in paper()["tables"].values() for row in table["rows"].values()})
# The branches' epochs, network, patch size, K, images per GPU, GPUs, loss, λ, geometry, and side of the resized images
BRANCHES = {
    "cifar10_vit_tiny32_mean": (100, "tiny", 32, 1000, 80, 2, "mean", None, "image", 0),
    "cifar10_vit_tiny16_lambda0.9": (100, "tiny", 16, 1000, 130, 3, "lambda", 0.9, "image", 0),
    "cifar10_vit_tiny16_mean_per_image": (100, "tiny", 16, 1000, 90, 3, "mean", None, "image", 0),
    "cifar10_vit_tiny16_mean": (100, "tiny", 16, 1000, 40, 2, "mean", None, "batch", 32),
    "imagenet100_vit_tiny16_mean": (100, "tiny", 16, 1000, 90, 1, "mean", None, "image", 0),
    "imagenet100_vit_base8_mean": (100, "base", 8, 10000, 6, 4, "mean", None, "batch", 256),
    "imagenet100_vit_base16_mean_patch_augmentation": (120, "base", 16, 10000, 30, 3, "mean", None, "image", 0),
    "imagenet1k_vit_base16_lambda_sum0.8": (100, "base", 16, 65536, 4, 4, "lambda_sum", 0.8, "batch", 256),
    "imagenet1k_vit_base16_mean": (100, "base", 16, 65536, 4, 3, "mean", None, "image", 0),
}
RELEASED = [f"released_{name}" for name in BRANCHES]
IMAGENET = "D/imagenet --classes kaggle"
TINY = "--global_crops_size 32 --local_crops_size 32 --local_crops_number 2 --out_dim 24 --num_workers 0 --epochs 1"


def papers_rows(number):
    """Return the rows of DINO and of the method in a table of the paper: (text, numbers)."""
    lines = PAPER_TEXT.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"Table {number} The "))
    rows = []
    for line in lines[start + 2 :]:
        if "\t" not in line:
            break
        text = re.sub(r"</?b>|\$|\\", "", line)
        without_lambda = re.sub(r"lambda ?= ?0\.\d", "", text)
        numbers = [float(word) for word in re.findall(r"\d+\.\d+", without_lambda)]
        if numbers and (re.search("Ours|DINO", text) or number in (7, 8)):  # Tables 7 and 8 do not repeat the method
            rows.append((text, numbers))
    return rows


def test_section_3_3_and_figure_2_keep_other_rows():
    """Views of one box with R and R' rows: which of the R rows are matched, by both rules, and by the text."""
    cases = [(rows, fewer) for rows in range(1, 15) for fewer in range(1, rows + 1)]
    differ = set()
    for rows, fewer in cases:
        by_text = [1 + i * (rows // fewer) for i in range(fewer)]
        box = (0, 0, rows * fewer, 1)
        kept = [match_patches(box, False, (rows, 1), box, False, (fewer, 1), rule)[0] for rule in ("paper", "released")]
        assert kept[0].tolist() == kept[1].tolist()
        if kept[0].tolist() != [0, *by_text]:
            differ.add((rows, fewer))
        if (rows, fewer) in ((4, 3), (6, 4)):  # rows and columns of Figure 2
            assert kept[0].tolist() == [0, *((1, 2, 4) if rows == 4 else (1, 2, 4, 6))]
    assert differ == {(rows, fewer) for rows, fewer in cases if 1 < fewer < rows}
    texts = " ".join(paper()["contradictions"])
    assert f"differ in {len(differ)} of the {len(cases)} cases R' ≤ R ≤ 14, all with 1 < R' < R" in texts


@pytest.mark.skipif(not PAPER_TEXT.exists(), reason="the paper's text is not here")
@pytest.mark.parametrize("number", range(1, 9))
def test_numbers_are_the_papers(number):
    table = paper()["tables"][f"table{number}"]
    rows = papers_rows(number)
    assert [numbers for _, numbers in rows] == [row["paper"] for row in table["rows"].values()]
    for (text, _), row in zip(rows, table["rows"].values(), strict=True):
        args = recipe_arguments(row["recipe"])
        loss = "cls" if "DINO" in text else next(
            (name for name in ("mean", "sum", "lambda") if name in text.lower()), "mean"
        )  # fmt: skip
        assert args.loss == loss
        if loss == "lambda":
            assert args.lambda_cls == float(re.search(r"lambda ?= ?(0\.\d)", text)[1])
        arch = re.search("ViT-(Tiny|Small|Base)", text)
        if arch:
            assert args.arch == f"vit_{arch[1].lower()}"
        patch = re.search(r"\t(8|16|32)\t|/(8|16|32)\b", text)
        if patch:
            assert args.patch_size == int(patch[1] or patch[2])


def test_recipes_are_what_their_names_say():
    files = {path.stem for path in (ROOT / "recipes").glob("*.args")}
    others = {"choices", "continue", "demo", "digits", "dino", "laptop", "photographs", "released"}
    assert files == {*RECIPES, *RELEASED, *others}
    assert len(RECIPES) == 22
    for recipe in RECIPES:
        data, arch, patch, loss = re.fullmatch(r"(\w+)_vit_([a-z]+)(\d+)_(\S+)", recipe).groups()
        args = recipe_arguments(recipe)
        assert args.dataset == {"imagenet1k": "folder"}.get(data, data)
        assert (args.arch, args.patch_size) == (f"vit_{arch}", int(patch))
        assert args.epochs == (50 if data == "imagenet1k" else 200)
        if loss == "dino":
            assert (args.loss, args.geometry, args.image_size) == ("cls", "image", 0)
        else:
            name, value = re.fullmatch(r"([a-z]+)([\d.]*)", loss).groups()
            assert (args.loss, args.geometry, args.image_size) == (name, "batch", 256)
            assert name != "lambda" or args.lambda_cls == float(value)
        # section 4.1.2
        assert (args.optimizer, args.warmup_epochs, args.weight_decay, args.weight_decay_end) == (
            "adamw",
            10,
            0.04,
            0.4,
        )
        temperatures = (args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs)
        assert temperatures == (0.04, 0.07, 30)
        assert 10 <= args.batch_size_per_gpu <= 40
        # settings that all recipes share
        assert (args.out_dim, args.lr, args.momentum_teacher, args.matching) == (10000, 5e-4, 0.996, "paper")


def test_released_recipes_are_the_branches():
    page = (ROOT / "docs/reproducing.md").read_text(encoding="utf-8").splitlines()
    for name, (epochs, arch, patch, out_dim, batch, gpus, loss, lambda_cls, geometry, side) in BRANCHES.items():
        args = recipe_arguments(f"released_{name}")
        assert args.dataset == {"imagenet1k": "folder"}.get(data := name.split("_")[0], data)
        assert (args.epochs, args.arch, args.patch_size, args.out_dim) == (epochs, f"vit_{arch}", patch, out_dim)
        assert (args.loss, args.geometry, args.image_size) == (loss, geometry, side)
        assert lambda_cls in (None, args.lambda_cls)
        assert (args.warmup_teacher_temp, args.teacher_temp, args.warmup_teacher_temp_epochs) == (0.04, 0.04, 0)
        assert (args.precision, args.matching, args.center, args.optimizer) == ("fp16", "released", "position", "adamw")
        assert (args.lr, args.min_lr, args.warmup_epochs, args.batch_size_per_gpu) == (5e-4, 1e-6, 10, batch)
        assert (args.weight_decay, args.weight_decay_end, args.clip_grad) == (0.04, 0.4, 3)
        assert (args.freeze_last_layer, args.drop_path_rate, args.momentum_teacher) == (1, 0.1, 0.996)
        assert args.norm_last_layer
        assert (args.global_crops_scale, args.local_crops_scale) == ([0.4, 1], [0.05, 0.4])
        assert (args.local_crops_number, args.global_crops_size, args.local_crops_size) == (8, 224, 96)
        assert args.patch_augmentation == name.endswith("_patch_augmentation")
        lines = (ROOT / f"recipes/released_{name}.args").read_text(encoding="utf-8").splitlines()
        assert re.match(r"# Branch \w.*, (since )?[A-Z][a-z]+ 2023: ", lines[0])
        comment = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
        assert (f"{batch} images on each of {gpus} GPUs" if gpus > 1 else f"batches of {batch}") in comment
        (line,) = (line for line in page if line.startswith(f"| `released_{name}` |"))
        assert (f"| {batch} × {gpus}" if gpus > 1 else f"| {batch}, GPUs unknown |") in line
        assert f"| {out_dim:,} |" in line
    counterparts = paper()["released"]
    assert set(counterparts) < set(RECIPES)
    for recipe, entry in counterparts.items():  # the same data, network and loss
        assert entry == {"recipe": f"released_{recipe}", "processes": BRANCHES[recipe][5]}
    assert len(BRANCHES) == len(counterparts) + 3  # crops per image, the later version's method, a loss in no table


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16, 160])
def test_the_batch_is_the_same_on_any_number_of_processes(processes):
    for recipe, largest in (("cifar10_vit_tiny16_mean", 40), ("imagenet100_vit_base8_mean", 10)):
        setup = reproduce.Setup(Path("DATA"), Path("runs"), processes)
        step = reproduce.pretraining_step(recipe, setup)
        args = main_lgssl.parse_arguments([str(word) for word in step.words[1:]])
        assert args.batch_size_per_gpu * args.accum_steps * processes == 160
        assert args.batch_size_per_gpu <= largest
        if processes < 160:
            (step,) = reproduce.evaluation_steps(recipe, ["linear"], setup)
            assert step.settings()["batch_size_per_gpu"] * processes == 512
    setup.processes = 3
    with pytest.raises(UserError, match="--nproc_per_node 3 does not divide the batch of cifar10_vit_tiny16_mean, 160"):
        reproduce.pretraining_step("cifar10_vit_tiny16_mean", setup)
    setup.processes = 5
    with pytest.raises(UserError, match="--nproc_per_node 5 does not divide the batch of the linear evaluation of "):
        reproduce.evaluation_steps(recipe, ["linear"], setup)


def test_show_prints_the_commands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    reproduce.main(f"show table6 --row mean-32 --data_root D --runs {tmp_path} --nproc_per_node 4 -- --seed 3".split())
    folder = f"{tmp_path}/cifar10_vit_tiny32_mean"
    launcher = "torchrun --standalone --nproc_per_node=4"
    data = "--dataset cifar10 --data_path D/cifar10"
    assert capsys.readouterr().out.splitlines() == [
        "# table6, Ours (ViT-Tiny/32, mean)",
        f"{launcher} main_lgssl.py @recipes/cifar10_vit_tiny32_mean.args --data_path D/cifar10 --batch_size_per_gpu 40 "
        f"--accum_steps 1 --output_dir {folder} --seed 3",
        f"{launcher} eval_linear.py {data} --batch_size_per_gpu 128 --pretrained_weights {folder}/checkpoint.pth",
        f"{launcher} eval_knn.py {data} --pretrained_weights {folder}/checkpoint.pth",
    ]
    reproduce.main(f"show table5 --row mean-cifar10 mean-imagenet1k --data_root D --runs {tmp_path}".split())
    output = capsys.readouterr().out
    lists = f"{tmp_path}/lists-kaggle"
    assert output.count(f"python reproduce.py lists D/imagenet --output_dir {lists} --classes kaggle") == 2
    assert output.count(f"--whitening_path {lists}/whitening.txt") == 1
    assert output.count("--whitening_path D/imagenet/train") == 1
    assert output.count("python eval_image_retrieval.py --data_path D --dataset rparis6k") == 2
    for line in output.splitlines():  # each script parses its command
        if line.startswith("python eval"):
            script, *words = line.split()[1:]
            next(m for m in reproduce.EVALUATIONS.values() if f"{m.__name__}.py" == script).parse_arguments(words)


def test_show_prints_the_released_commands(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def shown(words):
        reproduce.main(f"show {words} --settings released --data_root D --runs R".split())
        return capsys.readouterr().out.splitlines()

    def commands(recipe, launcher, dataset, data, batches, linear_batch):
        folder = f"R/{recipe}-kaggle"
        weights = f"--pretrained_weights {folder}/checkpoint.pth"
        return [
            f"{launcher} main_lgssl.py @recipes/{recipe}.args --data_path {data} {batches} --output_dir {folder}",
            f"{launcher} eval_linear.py --dataset {dataset} --data_path {data} --batch_size_per_gpu {linear_batch} "
            f"--n_last_blocks 4 --avgpool_patchtokens false {weights}",
            f"{launcher} eval_knn.py --dataset {dataset} --data_path {data} {weights}",
        ]

    def on(processes):
        return f"torchrun --standalone --nproc_per_node={processes}"

    batches = "--batch_size_per_gpu 90 --accum_steps 1"
    tiny = ("released_imagenet100_vit_tiny16_mean", "python", "imagenet100", IMAGENET, batches, 1500)
    assert shown("table3") == [
        "# table3, DINO (ViT-Tiny/16): no counterpart in the released code",
        "# table3, Ours (ViT-Tiny/16, mean)",
        *commands(*tiny),
        "# table3, DINO (ViT-Small/16): no counterpart in the released code",
        "# table3, Ours (ViT-Small/16, mean): no counterpart in the released code",
        "# table3, DINO (ViT-Base/16): no counterpart in the released code",
        "# table3, Ours (ViT-Base/16, mean): no counterpart in the released code",
    ]
    for options, processes, batches, linear_batch in (  # 6 images and 1,500 images on each of 4 GPUs
        ("", 4, "--batch_size_per_gpu 6 --accum_steps 1", 1500),
        ("--nproc_per_node 3", 3, "--batch_size_per_gpu 4 --accum_steps 2", 2000),
    ):
        base = ("released_imagenet100_vit_base8_mean", on(processes), "imagenet100", IMAGENET, batches)
        assert shown(f"table8 --row base-8 {options}")[1:] == commands(*base, linear_batch)
    assert shown("table7 --row lambda0.9")[1].startswith(f"{on(3)} main_lgssl.py @recipes/released_cifar10_vit_tiny16_")
    with pytest.raises(UserError, match="does not divide the batch of released_imagenet100_vit_base8_mean, 24"):
        shown("table8 --row base-8 --nproc_per_node 5")


def write_result(runs, recipe, evaluation, contents, *changes, epoch=None, batch_size=160, **changed):
    """Write a result like the evaluation does, with the paper's settings except for the changes."""
    (step,) = (s for s in reproduce.evaluation_steps(recipe, [evaluation], setup_in(runs)) if s.name == evaluation)
    step.words = [*step.words, *changes]
    args = recipe_arguments(recipe)
    images = reproduce.IMAGES[args.dataset if evaluation in ("linear", "knn") else evaluation]
    pretraining = {**vars(args), "epoch": epoch or args.epochs, "batch_size": batch_size, **changed}
    contents = {"images": images, **contents, "pretraining": pretraining, "args": step.settings()}
    step.result.parent.mkdir(parents=True, exist_ok=True)
    step.result.write_text(json.dumps(contents, default=str))


def setup_in(runs):
    return reproduce.Setup(Path("DATA"), runs)


def test_report_has_every_row_and_the_differences(tmp_path):
    knn = {"knn": {"10": {"top1": 80.0}, "20": {"top1": 82.51}}}
    recipe = "cifar10_vit_tiny16_mean"
    write_result(tmp_path, recipe, "knn", knn, batch_size=40, seed=7)
    linear = {"top1": 79.1, "batch_size": 128}
    write_result(tmp_path, recipe, "linear", linear, "--cache_features", "--n_last_blocks", "1")
    write_result(tmp_path, "cifar10_vit_tiny16_sum", "knn", knn, epoch=9)
    write_result(tmp_path, recipe, "roxford5k", {"map": {"medium": 0.09, "hard": 0.01}})
    images = {"original": 157, "strong": 229, "whitening": 0, "distractors": 10000}
    write_result(tmp_path, recipe, "copydays", {"map": {"strong": 0.6}, "images": images})
    whitened = {"map": {"strong": 0.7}, "images": {**images, "whitening": 1281167}}
    write_result(tmp_path, "imagenet1k_vit_base16_mean", "copydays", whitened)
    text = reproduce.report(tmp_path)
    row = "| Ours (ViT-Tiny/16, mean) | 78.10 / 79.10 (+1.00) [1] | 82.51 / 80.00 (-2.51) [2] | "
    assert row + "82.41 / 82.51 (+0.10) [2] |" in text
    note = "[1] linear: 128 images per step instead of 512, --n_last_blocks 1 instead of its default, "
    assert note + "--cache_features True instead of False." in text
    assert "[2] knn: a total batch of 40 instead of 160, --seed 7 instead of 0." in text
    paper_only = "| Ours (ViT-Tiny/16, sum) | 78.58 / not run | 78.86 / not run | 78.52 / not run |"
    assert paper_only in text  # its pretraining has not finished
    row = "| CIFAR-10: Ours (ViT-Tiny/16, mean) | 0.591 / 0.600 (+0.009) [1] | 8.34 / 9.00 (+0.66) | "
    assert row + "1.63 / 1.00 (-0.63) | 21.18 / not run | 5.11 / not run |" in text
    assert "[1] copydays: 0 whitening images instead of 20000." in text
    assert re.search(r"^\| ImageNet-1K: Ours.* / 0.700 \([+-]0.\d+\) \| ", text, re.MULTILINE)
    rows = sum(len(table["rows"]) for table in paper()["tables"].values())
    assert len(re.findall(r"^\| .* / ", text, re.MULTILINE)) == rows == 41
    assert text.count("is 87.51 / 84.44 / 84.91 in Table 1 and 75.29 / 76.38 / 76.24 in Table 6") == 1


def test_report_and_list_of_the_released_settings(tmp_path, capsys):
    knn = {"knn": {"10": {"top1": 80.0}, "20": {"top1": 81.0}}}
    write_result(tmp_path, "cifar10_vit_tiny16_mean", "knn", knn)
    released = "released_cifar10_vit_tiny16_mean"
    write_result(tmp_path, released, "knn", {"knn": {"10": {"top1": 70.0}, "20": {"top1": 71.0}}}, batch_size=80)
    write_result(tmp_path, released, "linear", {"top1": 60.0, "batch_size": 512}, batch_size=40, precision="bf16")
    own, theirs = (reproduce.report(tmp_path, settings) for settings in reproduce.SETTINGS)
    assert "Each cell: the paper's number / ours with the paper's settings (difference).\n" in own
    assert "| Ours (ViT-Tiny/16, mean) | 78.10 / not run | 82.51 / 80.00 (-2.51) | 82.41 / 81.00 (-1.41) |" in own
    first, *lines = theirs.splitlines()
    settings = "the settings of the authors' released code, 100 epochs"
    assert first == f"Each cell: the paper's number / ours with {settings} (difference)."
    cells = "78.10 / 60.00 (-18.10) [1] | 82.51 / 70.00 (-12.51) | 82.41 / 71.00 (-11.41)"
    assert f"| Ours (ViT-Tiny/16, mean) | {cells} |" in lines
    note = "[1] linear: a total batch of 40 instead of 80, --precision bf16 instead of fp16, "
    assert note + "512 images per step instead of 3000." in lines
    cells = "78.58 / no counterpart | 78.86 / no counterpart | 78.52 / no counterpart"
    assert f"| Ours (ViT-Tiny/16, sum) | {cells} |" in lines
    reproduce.main(["list", "--runs", str(tmp_path), "--settings", "released"])
    listed = capsys.readouterr().out.splitlines()
    assert f"  mean              {released}       pretraining 0%, linear done, knn done" in listed
    assert "  sum               no counterpart" in listed
    assert sum(line.endswith("no counterpart") for line in listed) == 41 - sum("released_" in line for line in listed)


def test_list_says_what_is_done(tmp_path, capsys):
    recipe = "cifar10_vit_tiny16_dino"
    folder = tmp_path / recipe
    folder.mkdir()
    (folder / "args.json").write_text('{"epochs": 200}')
    (folder / "log.txt").write_text('{"epoch": 48}\n{"epoch": 49}\n')
    (folder / "checkpoint.pth").touch()
    write_result(tmp_path, recipe, "linear", {"top1": 1.0})
    write_result(tmp_path, recipe, "knn", {"knn": {}}, "--nb_knn", "5")  # another number of neighbours
    reproduce.main(["list", "--runs", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    line = "  dino              cifar10_vit_tiny16_dino                pretraining 25%, linear done, knn -"
    assert lines.count(line) == 2  # in tables 1 and 6
    assert sum("vit" in line for line in lines if line.startswith("  ")) == 41


def test_a_pretraining_is_done_only_with_its_settings(tmp_path):
    step = reproduce.pretraining_step("cifar10_vit_tiny16_dino", setup_in(tmp_path))
    folder = step.result.parent
    folder.mkdir()
    (folder / "log.txt").write_text('{"epoch": 199}\n')
    step.result.touch()
    for changed, done in (({}, True), ({"accum_steps": 9}, True), ({"lr": 0.1}, False), ({"epochs": 300}, False)):
        (folder / "args.json").write_text(json.dumps({**step.settings(), **changed}, default=str))
        assert step.done() == done


def test_other_classes_reach_all_steps(tmp_path, capsys):
    (tmp_path / "D").mkdir()
    for name in ("C.txt", "D/C.txt"):
        (tmp_path / name).write_text(name)
    file = tmp_path / "C.txt"
    reproduce.main(f"show table5 --row mean-imagenet100 --classes {file} --runs {tmp_path}".split())
    lines = capsys.readouterr().out.splitlines()
    assert sum(f"--classes {file}" in line for line in lines) == 2  # only pretraining and lists use these classes
    assert sum(f"{tmp_path}/lists-C-" in line for line in lines) == 2
    assert sum(f"{tmp_path}/imagenet100_vit_tiny16_mean-C-" in line for line in lines) == 4
    setups = [reproduce.Setup(Path(), Path("R"), 1, str(tmp_path / name)) for name in ("C.txt", "D/C.txt")]
    setups += [reproduce.Setup(Path(), Path("R"), 1, name) for name in ("kaggle", "cmc")]
    folders = {setup.folder("imagenet100_vit_tiny16_mean") for setup in setups}
    assert (len(folders), {folder.parent for folder in folders}) == (4, {Path("R")})
    assert {setup.folder("cifar10_vit_tiny16_mean") for setup in setups} == {Path("R/cifar10_vit_tiny16_mean")}
    file = ROOT / "recipes/imagenet100_cmc.txt"
    reproduce.main(f"show table3 --row mean-tiny --classes {file} --runs {tmp_path}".split())
    assert capsys.readouterr().out.count("--classes cmc") == 3


@pytest.mark.parametrize("recorded", [None, "cmc"])
def test_results_with_another_list_of_imagenet100_are_not_done(tmp_path, capsys, recorded):
    """None: by an older version, where distractors were in the folder `lists`."""
    recipe, folder = "imagenet100_vit_tiny16_mean", tmp_path / "imagenet100_vit_tiny16_mean-kaggle"
    images = {"train": 126689, "val": 5000}
    write_result(tmp_path, recipe, "linear", {"top1": 50.0, "batch_size": 512, "images": images}, classes=recorded)
    write_result(tmp_path, recipe, "roxford5k", {"map": {"medium": 0.1, "hard": 0.1}}, classes=recorded)
    write_result(tmp_path, "cifar10_vit_tiny16_mean", "copydays", {"map": {"strong": 0.6}})
    copies, linear = tmp_path / "cifar10_vit_tiny16_mean/copydays.json", folder / "linear_imagenet100.json"
    for file, name, value in ((linear, "classes", recorded),
                              (copies, "distractors_path", f"X/lists{'-cmc' if recorded else ''}/x.txt")):  # fmt: skip
        result = json.loads(file.read_text())
        file.write_text(json.dumps({**result, "args": {**result["args"], name: value}}))
    settings = {**vars(recipe_arguments(recipe)), "classes": recorded}
    (folder / "args.json").write_text(json.dumps(settings, default=str))
    (folder / "log.txt").write_text('{"epoch": 199}\n')
    (folder / "checkpoint.pth").touch()

    def states(classes):
        reproduce.main(["list", "--runs", str(tmp_path), "--classes", classes])
        lines = capsys.readouterr().out.splitlines()
        rows = [re.split(r"  +", line.strip())[2] for line in lines if recipe in line or "mean-cifar10" in line]
        setup = reproduce.Setup(Path("DATA"), tmp_path, classes=classes)
        assert reproduce.pretraining_step(recipe, setup).done() == (classes == "cmc")
        return rows

    first, none = "pretraining 100%, linear {0}, knn -", "copydays {0}, roxford5k -, rparis6k -"
    rows = [first, f"pretraining 0%, {none}", "pretraining 100%, copydays -, roxford5k {0}, rparis6k -", first]
    assert states("kaggle") == [row.format("-") for row in rows]
    text = reproduce.report(tmp_path)
    folder.rename(tmp_path / f"{recipe}-cmc")
    assert states("cmc") == [row.format("done") for row in rows]
    own = reproduce.report(tmp_path, classes="cmc")
    assert "ImageNet-100: the classes in imagenet100_kaggle.txt, unless a note names others." in text
    assert "[1] linear: --classes cmc instead of kaggle.\n" in text  # its number of images is that of cmc
    for name in ("roxford5k", "copydays"):
        assert f"] {name}: --classes cmc instead of kaggle.\n" in text
    assert "ImageNet-100: the classes in imagenet100_cmc.txt, unless" in own
    assert "--classes" not in own


def test_the_folder_of_kaggle_is_enough_for_imagenet100(tmp_path):
    for name in ("train.X1", "val.X"):
        (tmp_path / "imagenet" / name).mkdir(parents=True)
    setup = reproduce.Setup(tmp_path, tmp_path / "runs")

    def steps(recipe, *names):
        return [reproduce.pretraining_step(recipe, setup), *reproduce.evaluation_steps(recipe, names, setup)]

    reproduce.check_data(steps("imagenet100_vit_tiny16_mean", "linear", "knn"), tmp_path)
    for others in (steps("imagenet1k_vit_base16_mean"), steps("imagenet100_vit_tiny16_mean", "copydays")):
        with pytest.raises(UserError, match=f"no {tmp_path}/imagenet/train: expected below"):
            reproduce.check_data(others, tmp_path)


def test_lists_for_copy_detection_are_disjoint_and_without_the_classes(tmp_path, capsys, small_lists):
    for name in ("n1", "n2", "n3"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "train" / name / f"{i}.JPEG").touch()
    (tmp_path / "val").mkdir()
    (tmp_path / "classes.txt").write_text("n2\n")
    words = [str(tmp_path), "--classes", str(tmp_path / "classes.txt"), "--whitening", "25", "--distractors"]
    texts = []
    (small_lists / "cmc.txt").write_text("n2\n")
    for folder, more in (("a", []), ("b", ["--classes", "cmc"]), ("c", ["--seed", "1"])):
        reproduce.main(["lists", *words, "12", "--output_dir", str(tmp_path / folder), *more])
        texts.append([(tmp_path / folder / f"{name}.txt").read_text() for name in ("whitening", "distractors")])
    assert texts[0] == texts[1] != texts[2]
    assert f"25 images in {tmp_path}/a/whitening.txt" in capsys.readouterr().out
    whitening, distractors = (set(listed_images(tmp_path / f"a/{name}.txt")) for name in ("whitening", "distractors"))
    assert (len(whitening), len(distractors), len(whitening | distractors)) == (25, 12, 37)
    assert {path.parent.name for path in whitening | distractors} == {"n1", "n3"}
    with pytest.raises(UserError, match="has 40 images outside the classes of .*, expected at least 45"):
        reproduce.main(["lists", *words, "20"])


def test_bad_input_is_named(tmp_path, capsys):
    def message(words):
        with pytest.raises((UserError, SystemExit)) as error:
            reproduce.main([*words.split(), "--runs", str(tmp_path / "runs")])
        return str(error.value) + capsys.readouterr().err

    released = "show table3 --settings released --row"
    text = "table3, row dino-tiny: no counterpart in the released code; these rows of table3 have: mean-tiny"
    assert text in message(f"{released} dino-tiny")
    text = "table1, row sum: no counterpart in the released code; no row of table1 has one"
    assert text in message("run table1 --settings released --row sum --data_root D")
    assert "table3 has no row mean, expected some of dino-tiny, mean-tiny" in message("show table3 --row mean")
    assert "the following arguments are required: --data_root" in message("run table3")
    for split in ("train", "val"):
        (tmp_path / "imagenet" / split).mkdir(parents=True)
    root = f"--data_root {tmp_path}"
    assert f"no {tmp_path}/cifar10/cifar-10-batches-py/data_batch_1: expected below" in message(f"run table1 {root}")
    assert f"no {tmp_path}/copydays/original: expected" in message(f"run table5 --row dino-imagenet1k {root}")
    for block in ("original", "strong"):
        (tmp_path / "copydays" / block).mkdir(parents=True)
    assert f"no {tmp_path}/roxford5k/gnd_roxford5k.pkl" in message(f"run table5 --row dino-imagenet1k {root}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*RECIPES, *RELEASED])
def test_every_recipe_takes_a_step(photo_folder, tmp_path, monkeypatch, recipe):
    monkeypatch.setattr(main_lgssl.checkpoints, "save_run", lambda *_: None)  # twice 1.4 GB of ViT-Base
    options = f"{TINY} --dataset folder --data_path {photo_folder} --batch_size_per_gpu 12 --accum_steps 1"
    options += " --precision fp32" * ("vit_base" in recipe)  # those of smaller networks try fp16
    main_lgssl.main([f"@{ROOT}/recipes/{recipe}.args", *options.split(), "--output_dir", str(tmp_path)])
    (log,) = map(json.loads, (tmp_path / "log.txt").read_text().splitlines())
    assert 0 < log["train_loss"] < 100


@pytest.fixture
def data_root(tmp_path, copydays_folder, retrieval_folder):
    """Return a folder with all data sets except CIFAR-10 in their real layouts. ImageNet has 2 + 1 images per class."""
    for name in (ROOT / "recipes" / "imagenet100_kaggle.txt").read_text().split():
        for split, count in (("train", 2), ("val", 1)):
            folder = tmp_path / "data/imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                color = tuple(int(name[1:]) * (7 + i) // (1 + 50 * c) % 256 for c in range(3))
                Image.new("RGB", (40, 40), color).save(folder / f"{i}.JPEG")
    (tmp_path / "data/copydays").symlink_to(copydays_folder / "copydays")
    for name in ("roxford5k", "rparis6k"):
        (tmp_path / "data" / name).symlink_to(retrieval_folder / name)
    # Stands for the lists that reproduce.py draws from the full ImageNet
    (tmp_path / "runs/lists-kaggle").mkdir(parents=True)
    for name in ("whitening", "distractors"):
        paths = (copydays_folder / name).glob("*.jpg")
        (tmp_path / f"runs/lists-kaggle/{name}.txt").write_text("".join(f"{path}\n" for path in paths))
    return tmp_path / "data"


@pytest.mark.slow
def test_rows_run_from_data_to_report(data_root, tmp_path, run_main):
    options = ["--data_root", data_root, "--runs", tmp_path / "runs"]
    tiny = ["--", *TINY.split(), "--batch_size_per_gpu", 20, "--accum_steps", 2]
    run_main("reproduce.py", "run", "table5", "--row", "mean-imagenet100", *options, *tiny)
    output = run_main(
        "reproduce.py", "run", "table3", "--row", "mean-tiny", *options, "--nproc_per_node", 2, *tiny
    ).stdout
    assert "accum_steps 2 --output_dir" in output
    assert output.count("# done") == 1  # both tables share the pretraining
    output = run_main("reproduce.py", "show", "table3", "--row", "mean-tiny", *options, *tiny).stdout
    assert output.count("# done") == 3
    run_main("reproduce.py", "report", "--runs", tmp_path / "runs", "--output", tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert len(re.findall(r"\| \d+\.\d+ / \d+\.\d+ \([+-]\d+\.\d+\) \[\d\] (?=\|)", text)) == 5 + 3 + 3
    assert "a total batch of 40 instead of 160" in text
    assert "--epochs 1 instead of 200" in text
    assert text.count("knn: ") == 2  # in tables 3 and 8
    assert "--imsize" not in text
