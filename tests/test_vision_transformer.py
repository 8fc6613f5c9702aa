import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import timms_drop_paths
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

from utils import UserError
from vision_transformer import (
    ARCHITECTURES,
    WIDTHS,
    BackboneWithHead,
    DINOHead,
    Teacher,
    VisionTransformer,
    architecture,
    vit_base,
    vit_micro,
    vit_small,
    vit_tiny,
)


@pytest.fixture(scope="module")
def made_up_tiny(golden):
    """Return ViT-Ti/16 with the weights of golden/README.md, and the golden data."""
    data = golden("vit_tiny16.npz")
    network = vit_tiny(16).eval()
    state = network.state_dict()
    assert sorted(state) == sorted(data["meta"]["state_dict_names"])
    for i, name in enumerate(sorted(state)):
        values = 0.05 * np.sin(0.7 * np.arange(state[name].numel()) + 1.3 * i)
        values += "norm" in name and name.endswith("weight")
        state[name] = torch.tensor(values, dtype=torch.float32).view_as(state[name])
    network.load_state_dict(state)
    return network, data


@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 96), (176, 240)])
def test_golden_tokens_and_attention(made_up_tiny, height, width):
    network, data = made_up_tiny
    y, x = np.mgrid[:height, :width]
    image = torch.tensor(np.stack([np.sin(0.05 * (3 * y + 5 * x) + c) for c in range(3)])[None], dtype=torch.float32)
    with torch.no_grad():
        tokens = network(image)[0]
        last4 = torch.stack([layer[0, 0] for layer in network.get_intermediate_layers(image, 4)])
        attention = network.get_last_selfattention(image)[0, :, 0, 1:]
    own = {"cls": tokens[0], "tokens": tokens[[1, 2, 7, -2, -1]], "cls_last4": last4, "attn": attention}
    for name, value in own.items():
        torch.testing.assert_close(value, torch.tensor(data[f"{name}_{height}x{width}"]), rtol=0, atol=1e-4)


def test_remainder_is_dropped():
    network = vit_micro(16).eval()
    image = torch.randn(1, 3, 224, 149)
    tokens = network(image)
    assert tokens.shape == (1, 1 + 14 * 9, 96)
    assert torch.equal(tokens, network(image[..., :144]))
    assert network.get_intermediate_layers(image)[0].shape == tokens.shape
    assert network.get_last_selfattention(image).shape == (1, 3, 127, 127)
    with pytest.raises(ValueError, match="8x149 is smaller than a patch of 16x16"):
        network(image[:, :, :8])


def dinos_position_embedding(pos_embed, patch_size, height, width):
    """Return DINO's position embedding for an image, computed by hand in float64, without PyTorch's interpolation."""
    side = int((pos_embed.shape[1] - 1) ** 0.5)
    rows, columns = height // patch_size, width // patch_size
    if rows * columns == side * side and height == width:
        return pos_embed[0].double().numpy()
    grid = pos_embed[0, 1:].double().numpy().reshape(side, side, -1)

    def weights(n):
        """Return the bicubic weights [n, side], a = -0.75, borders repeated, for the scale (n + 0.1) / side."""
        matrix = np.zeros((n, side))
        for i in range(n):
            x = (i + 0.5) * side / (n + 0.1) - 0.5
            for tap in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                d, a = abs(x - tap), -0.75
                w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
                matrix[i, min(max(tap, 0), side - 1)] += w
        return matrix

    resized = np.einsum("ri,cj,ijd->rcd", weights(rows), weights(columns), grid)
    return np.concatenate([pos_embed[0, :1].double().numpy(), resized.reshape(rows * columns, -1)])


SIZES = [(64, 64), (65, 65), (65, 70), (70, 64), (32, 128), (48, 80)]


@pytest.mark.parametrize(("height", "width", "patch"), [(*size, 16) for size in SIZES] + [(96, 96, 14), (66, 66, 14)])
def test_position_embedding_is_interpolated_where_dino_does(height, width, patch):
    """For an image that is not square DINO interpolates, even if its grid or number of patches is the trained one."""
    network = vit_micro(patch, img_size=64)
    torch.nn.init.normal_(network.pos_embed)
    network.blocks, network.norm = torch.nn.Sequential(), torch.nn.Identity()  # what is left is the embedding
    images = torch.randn(1, 3, height, width)
    with torch.no_grad():
        tokens = network(images)[0]
        patches = network.patch_embed.proj(images).flatten(2).mT[0]  # a convolution ignores the remainder too
    expected = dinos_position_embedding(network.pos_embed.detach(), patch, height, width)
    own = tokens - torch.cat([network.cls_token[0].detach(), patches])
    np.testing.assert_allclose(own.numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("build", "dim", "heads", "millions"),
    [(vit_tiny, 192, 3, 5.5), (vit_small, 384, 6, 21.7), (vit_base, 768, 12, 85.8)],
)
def test_sizes_are_the_papers(build, dim, heads, millions):
    with torch.device("meta"):
        network = build(16)
    assert (network.embed_dim, len(network.blocks), network.blocks[0].attn.num_heads) == (dim, 12, heads)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert ARCHITECTURES[WIDTHS[dim]] is build


def test_initialization_is_dinos():
    network = vit_small(16)
    for parameter in (network.cls_token, network.pos_embed, network.blocks[3].mlp.fc1.weight):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.15)
    assert network.norm.eps == 1e-6
    assert all(
        p.abs().max() == 0 for name, p in network.named_parameters() if name.endswith(".bias") and "patch" not in name
    )


def test_stochastic_depth_rises_to_the_last_block():
    """A branch is dropped with timm's rates, and else divided by the probability that it is kept."""
    network, images = vit_micro(16, drop_path_rate=0.3), 20000
    torch.manual_seed(0)
    factors = network.draw_drop_paths(images)
    rates = np.repeat(np.linspace(0, 0.3, 4)[:, None], 2, axis=1)  # block, attention and MLP
    np.testing.assert_allclose((factors == 0).double().mean(2), rates, atol=5 * (0.3 * 0.7 / images) ** 0.5)
    np.testing.assert_allclose(factors.amax(2), 1 / (1 - rates), rtol=1e-6)
    assert np.abs(np.corrcoef(factors[2:].flatten(0, 1) == 0) - np.eye(4)).max() < 5 / images**0.5  # independent
    assert network.eval().draw_drop_paths(images) is None


def test_stochastic_depth_is_timms():
    """Compare with timm's network, when both draw the same numbers."""
    own = VisionTransformer(32, 16, embed_dim=24, depth=3, num_heads=3, drop_path_rate=0.5)
    theirs = TimmVisionTransformer(32, 16, embed_dim=24, depth=3, num_heads=3, drop_path_rate=0.5, num_classes=0)
    theirs.global_pool = ""
    theirs.load_state_dict(own.state_dict())
    images = torch.randn(6, 3, 32, 32)
    torch.manual_seed(0)
    expected = theirs.train()(images)
    torch.manual_seed(0)
    found = own(images, timms_drop_paths(own, len(images)))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(own(images), expected)  # other draws


def test_head_is_dinos():
    head = DINOHead(24, 50, hidden_dim=32, bottleneck_dim=16)
    names = [f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    assert sorted(head.state_dict()) == sorted([*names, "last_layer.weight_g", "last_layer.weight_v"])
    assert not head.last_layer.weight_g.requires_grad
    assert DINOHead(24, 50, norm_last_layer=False).last_layer.weight_g.requires_grad
    tokens = torch.randn(7, 24)
    bottleneck = head(tokens)
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(7))
    # PyTorch's own weight norm as the oracle of the logits.
    linear = torch.nn.Linear(16, 50, bias=False)
    linear.weight.data.copy_(head.last_layer.weight_v)
    linear = torch.nn.utils.parametrizations.weight_norm(linear)
    linear.parametrizations.weight.original0.data.fill_(1)
    weights, scale = head.prototypes()
    torch.testing.assert_close(bottleneck @ (scale * weights.T), linear(bottleneck))
    normed = DINOHead(24, 50, use_bn=True)
    assert [type(layer).__name__ for layer in normed.mlp] == ["Linear", "BatchNorm", "GELU"] * 2 + ["Linear"]


def test_a_head_with_two_mlps_is_two_heads_with_the_same_prototypes():
    """Batch norm sees one kind of token at a time."""
    head = DINOHead(24, 50, use_bn=True, hidden_dim=32, bottleneck_dim=16, patch_mlp=True)
    tokens, cls, patch = torch.randn(9, 24), torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5, 6, 7, 8])
    states = [head.mlp.state_dict(), head.patch_mlp.state_dict()]
    assert not torch.equal(states[0]["0.weight"], states[1]["0.weight"])
    expected = torch.empty(9, 16)
    for kind, state in zip((cls, patch), copy.deepcopy(states), strict=True):
        alone = DINOHead(24, 50, use_bn=True, hidden_dim=32, bottleneck_dim=16)
        alone.mlp.load_state_dict(state)
        expected[kind] = alone(tokens[kind]).detach()
    torch.testing.assert_close(head(tokens, (cls, patch)), expected)
    with pytest.raises(ValueError, match="needs kinds: which tokens are CLS"):
        head(tokens)


@pytest.mark.parametrize("patches", [0, 1])
def test_batch_norm_takes_its_running_statistics_for_less_than_two_patches(patches):
    """Every parameter gets a gradient, as DDP demands."""
    head = DINOHead(24, 50, use_bn=True, hidden_dim=32, bottleneck_dim=16, patch_mlp=True)
    index = torch.arange(4 + patches)
    head(torch.randn(4, 24), (index[:2], index[2:4]))  # moves the statistics
    before = copy.deepcopy(head)
    tokens, kinds = torch.randn(4 + patches, 24), (index[:4], index[4:])
    z = head(tokens, kinds)
    torch.testing.assert_close(z[4:], F.normalize(before.patch_mlp.eval()(tokens[4:]), dim=-1))
    for gradient in torch.autograd.grad(
        z.square().sum() + z.sum(), [*head.mlp.parameters(), *head.patch_mlp.parameters()]
    ):
        assert gradient.isfinite().all()
    for name, value in before.patch_mlp.state_dict().items():
        assert torch.equal(head.patch_mlp.state_dict()[name], value), name


@pytest.mark.parametrize(("device", "use_bn", "calls"), [("cpu", False, 3), ("cpu", True, 1), ("meta", False, 1)])
def test_head_takes_pieces_only_on_a_cpu(device, use_bn, calls):
    """On a GPU pieces would only add kernel launches; batch norm needs all tokens at once."""
    head = DINOHead(8, 20, use_bn=use_bn, hidden_dim=8, bottleneck_dim=4).to(device)
    sizes = []
    head.mlp.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    assert head(torch.zeros(5000, 8, device=device)).shape == (5000, 4)
    assert (len(sizes), sum(sizes)) == (calls, 5000)


def test_rows_pick_tokens_of_all_views():
    network = BackboneWithHead(vit_micro(8, img_size=32), DINOHead(96, 20, hidden_dim=32)).eval()
    views = [torch.randn(4, 3, 32, 32), torch.randn(2, 3, 16, 16)]
    out = network(views)
    assert out.bottleneck.shape == (4 * 17 + 2 * 5, 256)
    assert (out.prototypes.shape, out.scale.shape) == ((20, 256), (20,))
    rows = torch.tensor([0, 20, 70, 77])
    torch.testing.assert_close(network(views, rows).bottleneck, out.bottleneck[rows])
    torch.testing.assert_close(out.bottleneck[70], network([views[1]]).bottleneck[2])
    torch.testing.assert_close(out.cls_features, network.backbone(views[0])[:, 0].detach())
    assert out.mean_bottleneck is None


def test_networks_with_two_mlps_tell_cls_from_patches():
    head = DINOHead(96, 20, hidden_dim=32, patch_mlp=True)
    network = BackboneWithHead(vit_micro(8, img_size=32), head).eval()
    views = [torch.randn(4, 3, 32, 32), torch.randn(2, 3, 16, 16)]
    expected = []
    for view in views:
        tokens = network.backbone(view)
        of_cls, of_patches = (F.normalize(mlp(tokens), dim=-1) for mlp in (head.mlp, head.patch_mlp))
        expected.append(torch.cat([of_cls[:, :1], of_patches[:, 1:]], 1).flatten(0, 1))
    expected = torch.cat(expected)
    torch.testing.assert_close(network(views).bottleneck, expected)
    rows, kinds = torch.tensor([17, 20, 68, 77]), (torch.tensor([0, 2]), torch.tensor([1, 3]))
    torch.testing.assert_close(network(views, rows, kinds).bottleneck, expected[rows])
    out = Teacher(network.backbone, head)(views[:1], rows[:2])
    torch.testing.assert_close(out.bottleneck, expected[rows[:2]])
    torch.testing.assert_close(out.mean_bottleneck, expected[:68].unflatten(0, (4, 17)).mean(0))


def test_teacher_averages_every_position_over_the_views_or_cls_alone():
    backbone, head = vit_micro(8, img_size=32), DINOHead(96, 20, hidden_dim=32)
    views = [torch.randn(4, 3, 32, 32)]
    rows = torch.tensor([0, 3, 18, 40])
    every = BackboneWithHead(backbone, head)(views).bottleneck.detach()
    teacher = Teacher(backbone, head)
    assert not any(p.requires_grad for p in teacher.parameters())
    out = teacher(views, rows)
    torch.testing.assert_close(out.bottleneck, every[rows])
    torch.testing.assert_close(out.mean_bottleneck, torch.stack([every[p::17].mean(0) for p in range(17)]))
    torch.testing.assert_close(teacher(views).bottleneck, every)  # without rows, all tokens
    of_cls = Teacher(backbone, head, average_patches=False)(views, torch.arange(0, 68, 17))
    torch.testing.assert_close(of_cls.mean_bottleneck, out.mean_bottleneck[:1])
    assert set(teacher.state_dict()) == set(BackboneWithHead(backbone, head).state_dict())


def test_names_of_architectures_are_those_of_dino():
    assert architecture("deit_small") == architecture("vit_small") == "vit_small"
    for name in ("resnet50", "xcit_small_12_p16"):
        with pytest.raises(UserError, match=f"no architecture {name} .convolutional and XCiT networks have no patch"):
            architecture(name)
