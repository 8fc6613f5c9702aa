import dataclasses
import io
import json
import shutil
import subprocess

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import open_dataset
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_main_lgssl import TINY, read, train
from torch.utils.data import DataLoader

import eval_dense
import eval_knn
import main_lgssl
from augment import MultiCrop, resize
from patch_matching import match_patches, match_views
from support import loader, observe
from support.dense import knn_segment, mean_iou, patch_shares, upsample
from support.figures import BRIGHT, HEAT, LABEL_HEIGHT
from support.images import ResizedArray
from support.loader import ViewBatches
from support.meters import Meters
from support.observe import OnlineKNN, OnlineSegmentation, environment, fit_all_workers, is_due, training_pictures
from support.sources import DataSpec
from utils import Process, UserError
from vision_transformer import vit_micro

WATCHED = ("--knn_every", 1, "--image_every", 1)
PROCESS = Process(0, 1, torch.device("cpu"))
SEGMENTATION = {"side": 32, "batch_size": 4, "num_workers": 0}
KNN = {"crop_size": 32, "batch_size": 4, "num_workers": 0}


def board(folder):
    accumulator = EventAccumulator(str(folder / "tb"), {"images": 0, "histograms": 0, "scalars": 0, "tensors": 0})
    return accumulator.Reload()


def pixels(image):
    return np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))


def test_due():
    assert [e for e in range(7) if is_due(e, 3, 7)] == [2, 5, 6]
    assert not any(is_due(e, 0, 7) for e in range(7))


def test_knn_is_that_of_the_evaluation(photo_folder, tmp_path, capsys):
    train(photo_folder, tmp_path, "--epochs", 2, *WATCHED)
    logged = [epoch["knn_top1"] for epoch in read(tmp_path / "log.txt")]
    capsys.readouterr()
    words = f"--data_path {photo_folder} --pretrained_weights {tmp_path / 'checkpoint.pth'} --nb_knn 10 --num_workers 0"
    eval_knn.main(words.split())
    measured = json.loads((tmp_path / "knn_folder.json").read_text())["knn"]["10"]["top1"]
    assert logged[1] == pytest.approx(measured)
    assert [e.value for e in board(tmp_path).Scalars("knn_top1")] == pytest.approx(logged)


def test_knn_holds_out_training_images_where_there_are_no_others(photo_folder):
    train_folder = photo_folder / "train"
    dataset = open_dataset("folder", train_folder, "train", ResizedArray(40))
    knn = OnlineKNN(dataset, DataSpec("folder", train_folder), **KNN)
    references, queries = (set(knn.splits[split].dataset.indices) for split in ("train", "val"))
    assert (len(references), len(queries)) == (10, 2)
    assert references | queries == set(range(12))
    assert [knn.labels["train"][i] for i in range(10)] == [
        dataset.labels[i] for i in knn.splits["train"].dataset.indices
    ]
    assert dataset[0][0].shape == (40, 40, 3)  # the training's own transform is left


@pytest.mark.parametrize("below", ["", "train"])
def test_knn_takes_the_images_held_out_for_tuning(photo_folder, below):
    """With and without validation images, which are not used."""
    named = {"dataset": "folder", "data_path": photo_folder / below, "train_images": 11, "tuning": True}
    dataset, held_out = (open_dataset(**named, split=split) for split in ("train", "val"))
    knn = OnlineKNN(dataset, DataSpec(**named), **KNN)
    paths = {}
    for split, images in knn.splits.items():
        subset = images.dataset
        paths[split] = [subset.dataset.paths[i] for i in subset.indices]
        assert knn.labels[split].tolist() == [int("flower" in path) for path in paths[split]]
    assert (len(paths["train"]), len(paths["val"])) == (9, 2)
    assert sorted(paths["train"]) == sorted(dataset.paths)
    assert sorted(paths["val"]) == sorted(held_out.paths)
    assert not set(paths["val"]) & set(paths["train"])
    assert all("/train/" in path for path in paths["val"])


def test_a_run_trains_on_limited_images_and_is_tuned_on_others(photo_folder, tmp_path):
    words = ["--train_images", 11, "--tuning"]
    checkpoint = train(photo_folder, tmp_path, "--epochs", 1, *WATCHED, *words)
    assert (checkpoint["images"][0], checkpoint["step"]) == (9, 2)  # batches of 4
    words += ["--data_path", photo_folder, "--pretrained_weights", tmp_path / "checkpoint.pth"]
    eval_knn.main([*map(str, words), "--nb_knn", "9", "--num_workers", "0"])
    result = json.loads((tmp_path / "knn_folder.json").read_text())
    assert result["images"] == {"train": 9, "val": 2}
    assert read(tmp_path / "log.txt")[0]["knn_top1"] == pytest.approx(result["knn"]["9"]["top1"])
    with pytest.raises(UserError, match="--train_images 11 there, 10 here"):
        train(photo_folder, tmp_path, "--epochs", 1, *WATCHED, "--train_images", 10, "--tuning")


def test_knn_is_bounded(monkeypatch):
    monkeypatch.setattr(observe, "MAX_REFERENCES", 50)
    monkeypatch.setattr(observe, "MAX_QUERIES", 20)
    knn = OnlineKNN(open_dataset("digits"), DataSpec("digits"), **KNN)
    assert [len(knn.splits[split]) for split in ("train", "val")] == [50, 20]
    assert len(set(knn.labels["train"].tolist())) > 5
    # Features that are the labels: all right, and none where the queries' labels are other ones.
    both = {split: iter(labels) for split, labels in knn.labels.items()}

    def label_as_feature(images):
        split = "train" if len(seen) < 50 else "val"
        seen.extend(images)
        chosen = torch.stack([next(both[split]) for _ in images])
        return torch.eye(10)[chosen][:, None]

    seen = []
    assert knn(label_as_feature, torch.device("cpu")) == 100
    both, seen = {"train": iter(knn.labels["train"]), "val": iter((knn.labels["val"] + 1) % 10)}, []
    assert knn(label_as_feature, torch.device("cpu")) == 0


def test_segmentation_is_that_of_the_evaluation(photo_folder, annotated_folders, tmp_path, capsys):
    for kind, folder in annotated_folders.items():
        train(photo_folder, tmp_path / kind, "--epochs", 2, "--dense_path", folder, "--dense_every", 1)
        logged = [epoch["dense_miou"] for epoch in read(tmp_path / kind / "log.txt")]
        assert f"epoch 2/2  online segmentation mIoU {logged[1]:.2f} %\n" in capsys.readouterr().out
        weights = tmp_path / kind / "checkpoint.pth"
        words = f"--data_path {folder} --pretrained_weights {weights} --num_workers 0"
        eval_dense.main(["knn-segmentation", *words.split()])
        (file,) = (tmp_path / kind).glob("knn_segmentation*.json")
        assert logged[1] == pytest.approx(json.loads(file.read_text())["miou"])
        assert 10 < logged[1] < 100
        assert [e.value for e in board(tmp_path / kind).Scalars("dense_miou")] == pytest.approx(logged)


def mean_pixels(images):
    """Return the mean colors of patches of 8 pixels as tokens, after a CLS token of zeros."""
    return F.pad(F.avg_pool2d(images, 8).flatten(2).transpose(1, 2), (0, 0, 1, 0))


def test_segmentation_is_bounded_and_holds_out_where_there_is_no_val(annotated_folders, tmp_path, monkeypatch):
    for kind in ("images", "masks"):
        shutil.copytree(annotated_folders["plain"] / kind / "train", tmp_path / kind / "train")
    everything = OnlineSegmentation(str(tmp_path), **SEGMENTATION).splits
    paths = {split: [*images.paths] for split, images in everything.items()}
    assert (len(paths["train"]), len(paths["val"])) == (4, 2)
    assert {*paths["train"], *paths["val"]} == {*map(str, (tmp_path / "images/train").rglob("*.png"))}

    monkeypatch.setattr(observe, "MAX_ANNOTATED", {"train": 3, "val": 2})
    monkeypatch.setattr(observe, "MAX_PATCHES", 20)
    segmentation = OnlineSegmentation(str(annotated_folders["plain"]), **SEGMENTATION)
    again = OnlineSegmentation(str(annotated_folders["plain"]), **SEGMENTATION)
    splits = segmentation.splits
    assert [len(splits[split]) for split in ("train", "val")] == [3, 2]
    assert [[*images.paths] for images in splits.values()] == [[*images.paths] for images in again.splits.values()]
    pixels, masks = (torch.stack(parts) for parts in zip(*splits["train"], strict=True))
    chosen = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:20].sort().values
    shares = patch_shares(masks, (4, 4), 5).flatten(0, 1)[chosen]
    memory = F.normalize(mean_pixels(pixels)[:, 1:], dim=2).flatten(0, 1)[chosen][shares.sum(1) > 0]
    pixels, masks = (torch.stack(parts) for parts in zip(*splits["val"], strict=True))
    queries = F.normalize(mean_pixels(pixels)[:, 1:], dim=2).flatten(0, 1)
    found = upsample(knn_segment(memory, shares[shares.sum(1) > 0], queries).unflatten(0, (2, 16)), (4, 4), 32)
    miou = segmentation(mean_pixels, torch.device("cpu"))
    assert miou == pytest.approx(100 * mean_iou(found, masks, 5))
    assert miou == again(mean_pixels, torch.device("cpu"))


def test_unreadable_annotated_images_do_not_end_the_training(annotated_folders, photo_folder, tmp_path, capsys):
    shutil.copytree(annotated_folders["plain"], tmp_path / "data")
    train_images, val_images = (sorted((tmp_path / f"data/images/{s}").rglob("*.png")) for s in ("train", "val"))
    for path in (train_images[0], val_images[0]):
        path.write_bytes(path.read_bytes()[:999])  # its header is whole
    words = ("--epochs", 1, "--dense_path", tmp_path / "data")
    train(photo_folder, tmp_path / "a", *words)
    warned = capsys.readouterr().err
    assert all(f"{path}: " in warned for path in (train_images[0], val_images[0]))
    assert 0 < read(tmp_path / "a/log.txt")[0]["dense_miou"] < 100
    for split, message in ((val_images, ""), (train_images, "warning: no online segmentation: no patch of the memory")):
        for path in split:
            path.write_bytes(path.read_bytes()[:999])
        train(photo_folder, tmp_path / f"b{message[:1]}", *words)
        assert message in capsys.readouterr().err
        assert "dense_miou" not in read(tmp_path / f"b{message[:1]}/log.txt")[0]


def test_bad_annotations_are_refused_before_the_training(annotated_folders, photo_folder, tmp_path, capsys):
    with pytest.raises(UserError, match=rf"--dense_path {photo_folder}: .* lacks images/train or masks/train"):
        train(photo_folder, tmp_path / "out", "--dense_path", photo_folder)
    for kind in ("images", "masks"):
        (tmp_path / kind / "train").mkdir(parents=True)
        name = sorted((annotated_folders["plain"] / kind / "train").rglob("*.png"))[0]
        shutil.copy(name, tmp_path / kind / "train/a.png")
    with pytest.raises(UserError, match="has 1 annotated image, too few"):
        train(photo_folder, tmp_path / "out", "--dense_path", tmp_path)
    with pytest.raises(SystemExit, match="2"):
        train(photo_folder, tmp_path / "out", "--dense_every", 3)
    assert "--dense_every 3 needs --dense_path" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_workers_of_online_evaluations_fit_into_the_shared_memory(annotated_folders, monkeypatch):
    """Two workers with two batches each and one in use, of the training and of the largest evaluation."""
    knn = OnlineKNN(open_dataset("digits"), DataSpec("digits"), **{**KNN, "num_workers": 2})
    segmentation = OnlineSegmentation(str(annotated_folders["plain"]), **{**SEGMENTATION, "num_workers": 2})
    largest = max((x.batch_size, x.batch_bytes) for x in (knn, segmentation))[1]
    pixels, masks = next(iter(DataLoader(segmentation.splits["train"], 4)))
    assert largest == pixels.nbytes + masks.nbytes
    for free, kept in ((5 * (1000 + largest), 2), (5 * (1000 + largest) - 1, 0)):
        monkeypatch.setattr(loader, "free_shared_memory", lambda free=free: free)
        assert fit_all_workers(2, 1000, [knn, segmentation]) == (2, 2)
        assert (knn.num_workers, segmentation.num_workers) == (kept, kept)


def test_knn_without_labels_is_off_or_an_error(photo_folder, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((photo_folder / "train").rglob("*.jpg"))):
        (flat / f"{i}.jpg").write_bytes(path.read_bytes())
    options = ["--data_path", str(flat), "--output_dir", str(tmp_path / "a")]
    with pytest.raises(UserError, match=r"--knn_every 2: .*have no labels"):
        main_lgssl.main([*TINY, "--knn_every", "2", *options])
    assert not (tmp_path / "a").exists()
    at = TINY.index("--knn_every")
    main_lgssl.main([*TINY[:at], *TINY[at + 2 :], "--epochs", "1", *options])
    assert "no online k-NN: " in capsys.readouterr().out
    assert "knn_top1" not in read(tmp_path / "a/log.txt")[0]


def test_knn_takes_a_black_image_for_a_bad_one(photo_folder, tmp_path, capsys):
    for split in ("train", "val"):
        for path in sorted((photo_folder / split).rglob("*.jpg")):
            copy = tmp_path / path.relative_to(photo_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    (tmp_path / "val/china/0.jpg").write_bytes(b"no image")
    train(tmp_path, tmp_path / "out", "--epochs", 1, *WATCHED)
    assert "china/0.jpg: cannot identify image file" in capsys.readouterr().err
    assert "knn_top1" in read(tmp_path / "out/log.txt")[0]


def test_watching_changes_no_weight(photo_folder, annotated_folders, tmp_path):
    plain, dense = train(photo_folder, tmp_path / "plain", "--epochs", 2), ("--dense_path", annotated_folders["plain"])
    watched = train(photo_folder, tmp_path / "watched", "--epochs", 2, *WATCHED, "--dense_every", 1, *dense)
    for name in ("student", "teacher"):
        torch.testing.assert_close(watched[name], plain[name], rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["mean", "cls"])
def test_pictures_show_the_matched_patches(photo_folder, loss):
    rule = None if loss == "cls" else "paper"
    dataset = open_dataset("folder", photo_folder, "train", ResizedArray(64))
    batches = ViewBatches(
        dataset, MultiCrop(global_size=32, local_size=16, local_number=2, geometry="image"), 8, rule, 0
    )
    views, _ = batches.make_views((3, 7, [0]))
    for_device = dataclasses.replace(batches, distorts=False)  # the pictures are distorted nevertheless
    pictures = training_pictures(vit_micro(8, img_size=32).eval(), for_device, (3, 7, [0]))
    side, height = 164, 164 + LABEL_HEIGHT
    assert pictures["views"].shape == (2 * height, 3 * side, 3)
    assert pictures["attention"].shape == (height, 5 * side, 3)
    assert pictures["features"].shape == (height, 2 * side, 3)
    # An untrained network attends to all patches alike: no map is bright, or dark, anywhere.
    maps = pictures["attention"][LABEL_HEIGHT : LABEL_HEIGHT + 160, side:].reshape(160, 4, side, 3)[:, :, :160]
    assert np.abs(maps / 255 - HEAT(1 / BRIGHT)[:3]).max() < 0.2
    # Patches that are tinted are those of the table; the others are the view's own pixels.
    for j in (1, 2, 3):
        box_a, box_b = views[0].boxes[0], views[j].boxes[0]
        grids = [(v.pixels.shape[-1] // 8,) * 2 for v in (views[0], views[j])]
        idx_a, idx_b = match_patches(box_a, views[0].flips[0], grids[0], box_b, views[j].flips[0], grids[1])
        for row, (view, idx) in enumerate(((views[0], idx_a), (views[j], idx_b))):
            side = view.pixels.shape[-1]
            top = row * height + LABEL_HEIGHT
            shown = pictures["views"][top : top + 160, (j - 1) * 164 : (j - 1) * 164 + 160]
            shown = shown[:: 160 // side, :: 160 // side]
            changed = (shown != view.pixels[0].permute(1, 2, 0).numpy()).any(-1)
            cells = changed.reshape(side // 8, 8, side // 8, 8).any((1, 3)).ravel()
            expected = set() if rule is None else set(idx[1:].tolist())
            assert set((np.flatnonzero(cells) + 1).tolist()) == expected


def test_pictures_of_a_network_leave_out_pixels_beyond_its_patches(photo_folder):
    """The image beside the attention shows what the patches cover."""
    dataset = open_dataset("folder", photo_folder, "train", ResizedArray(64))
    multi_crop = MultiCrop(global_size=32, local_size=16, local_number=1, geometry="image")
    batches = ViewBatches(dataset, multi_crop, 14, None, 0)
    attention = training_pictures(vit_micro(14, img_size=32).eval(), batches, (0, 0, [0]))["attention"]
    covered = cv2.resize(resize(dataset[0][0], (28, 28), "bicubic"), (160, 160), interpolation=0)
    np.testing.assert_array_equal(attention[LABEL_HEIGHT : LABEL_HEIGHT + 160, :160], covered)


def test_tensorboard_has_pictures_histogram_and_hyperparameters(photo_folder, tmp_path):
    train(photo_folder, tmp_path, "--epochs", 2, *WATCHED, "--lr", 0.01)
    events = board(tmp_path)
    assert set(events.Tags()["images"]) == {"views", "attention", "features"}
    for name in ("views", "attention", "features"):
        assert [event.step for event in events.Images(name)] == [2, 5]
    assert pixels(events.Images("attention")[0]).shape == (164 + LABEL_HEIGHT, 5 * 164, 3)
    # All pairs of views: 12 images, 2 x 3 pairs each; their mean is the log's.
    histograms = events.Histograms("matched_patches_per_pair")
    assert [h.histogram_value.num for h in histograms] == [72, 72]
    for epoch, h in zip(read(tmp_path / "log.txt"), histograms, strict=True):
        assert h.histogram_value.sum / h.histogram_value.num == pytest.approx(epoch["train_matched_patches"], rel=1e-5)
    assert "final/knn_top1" in events.Tags()["scalars"]
    assert events.Scalars("final/train_loss")[0].value == pytest.approx(read(tmp_path / "log.txt")[-1]["train_loss"])
    raw = b"".join(path.read_bytes() for path in (tmp_path / "tb").iterdir())
    assert b"_hparams_/session_start_info" in raw
    assert b"arguments/text_summary" in raw


def test_histogram_counts_pairs_of_views():
    boxes = np.array([[[0, 0, 32, 32]], [[0, 0, 32, 32]], [[0, 0, 16, 16]], [[40, 40, 8, 8]]])
    flips, grids = np.zeros((4, 1), bool), [(4, 4), (4, 4), (2, 2), (2, 2)]
    meters = Meters(PROCESS, "fp32", 16)
    meters.add(torch.tensor(1.0), match_views(boxes, flips, grids, 3), {})
    state = meters.state_dict()
    resumed = Meters(PROCESS, "fp32", 16)
    resumed.load_state_dict(state)
    for m in (meters, resumed):
        _, counts = m.end_epoch()
        # Of each of 3 images: the two global views with each other, each with the quarter, and with nothing in common.
        assert {n: int(c) for n, c in enumerate(counts) if c} == {0: 6, 4: 6, 16: 6}
        assert not m.end_epoch()[1].any()


def test_environment_of_each_start_is_stored(photo_folder, tmp_path):
    train(photo_folder, tmp_path, "--epochs", 1)
    train(photo_folder, tmp_path, "--epochs", 1)
    first, second = read(tmp_path / "environment.jsonl")
    assert (first["step"], second["step"], first["processes"]) == (0, 3, 1)
    assert first["packages"]["torch"] == torch.__version__.split("+")[0]
    root = observe.Path(observe.__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    assert first["git_commit"] == (commit.stdout.strip() if commit.returncode == 0 else None)


def test_environment_without_git(monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", no_git)
    found = environment()
    assert (found["git_commit"], found["git_changed"]) == (None, None)


def test_local_views_may_be_larger_than_the_global_ones(photo_folder, tmp_path):
    sizes = ("--global_crops_size", 16, "--local_crops_size", 32, "--matching", "nearest")
    train(photo_folder, tmp_path, "--epochs", 1, *sizes, *WATCHED)
    assert read(tmp_path / "log.txt")[0]["train_matched_patches"] > 4


def test_a_run_that_ended_unseen_gets_its_hyperparameters(photo_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(main_lgssl.Report, "end", lambda *_: None)
        train(photo_folder, tmp_path, "--epochs", 1, *WATCHED)
    train(photo_folder, tmp_path, "--epochs", 1, *WATCHED)
    logged = read(tmp_path / "log.txt")[0]
    assert board(tmp_path).Scalars("final/knn_top1")[0].value == pytest.approx(logged["knn_top1"])
