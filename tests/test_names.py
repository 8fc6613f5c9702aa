"""The names that notebooks, other repositories and outside checks call, as design.md ("Names that others call")."""

import inspect
import json

import numpy as np
import pytest
import torch

import eval_dense
import eval_knn
import losses
import main_lgssl
import patch_matching
import vision_transformer
from support import dense

LOSS = 'out_dim grid_tokens loss="mean" lambda_cls=0.5 center="position" student_temp=0.1 center_momentum=0.9'
PROPAGATION = "features first_labels grid num_classes n_last_frames=7 radius=12 topk=5 temperature=0.1"
NAMES = [
    (patch_matching.match_patches, 'box_a flip_a grid_a box_b flip_b grid_b rule="paper"'),
    (vision_transformer.vit_tiny, "patch_size=16"),
    (vision_transformer.vit_small, "patch_size=16"),
    (vision_transformer.vit_base, "patch_size=16"),
    (losses.LocalGlobalLoss, LOSS),
    (losses.LocalGlobalLoss.forward, "self student_out teacher_out matches teacher_temp"),
    (losses.LocalGlobalLoss.update_center, "self"),
    (dense.mean_iou, "prediction target num_classes ignore_index=255"),
    (eval_knn.knn_accuracy, "train_features train_labels test_features test_labels k temperature=0.07"),
    (eval_dense.propagate_labels, PROPAGATION),
]


@pytest.mark.parametrize(("function", "promised"), NAMES, ids=lambda value: getattr(value, "__qualname__", ""))
def test_promised_names_keep_their_parameters(function, promised):
    """Further parameters may follow if they have defaults."""
    found = list(inspect.signature(function).parameters.values())
    words = promised.split()
    for parameter, word in zip(found, words, strict=False):
        name, _, default = word.partition("=")
        assert parameter.name == name
        assert parameter.default == (eval(default) if default else inspect.Parameter.empty)
    assert len(found) >= len(words)
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for parameter in found[len(words) :]:
        assert parameter.kind in variable or parameter.default is not inspect.Parameter.empty


def test_promised_names_return_what_is_promised():
    whole = (0, 0, 64, 64)
    idx_a, idx_b = patch_matching.match_patches(whole, False, (4, 4), whole, True, (2, 2))
    assert idx_a.dtype == idx_b.dtype == torch.int64
    assert (idx_a.shape, idx_a[0], idx_b.tolist()) == ((5,), 0, [0, 2, 1, 4, 3])
    network = vision_transformer.vit_tiny(32)
    assert network(torch.zeros(2, 3, 64, 96)).shape == (2, 1 + 6, 192)
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.11.mlp.fc2.bias"} <= set(network.state_dict())
    features, labels = torch.eye(3), torch.tensor([0, 1, 2])
    accuracies = eval_knn.knn_accuracy(features, labels, features, torch.tensor([0, 1, 1]), 3, temperature=0.1)
    assert accuracies == (pytest.approx(200 / 3), 100.0)


def test_promised_command_lines(photo_folder, tmp_path):
    options = "--arch vit_micro --patch_size 8 --image_size 40 --global_crops_size 32 --local_crops_size 16 --epochs 1"
    options += " --local_crops_number 1 --out_dim 24 --head_hidden_dim 32 --batch_size_per_gpu 6 --num_workers 0"
    main_lgssl.main([*options.split(), "--data_path", str(photo_folder), "--output_dir", str(tmp_path)])
    assert np.isfinite(json.loads((tmp_path / "log.txt").read_text())["train_loss"])
    weights = ["--pretrained_weights", str(tmp_path / "checkpoint.pth")]
    eval_knn.main(["--data_path", str(photo_folder), *weights, "--nb_knn", "1"])
    assert (tmp_path / "knn_folder.json").exists()
