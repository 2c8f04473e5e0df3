"""image_encoder.py against timm's own models with the same weights."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from model.image_encoder import ImageEncoder, pool_grid
from utils.files import tensors

SIDE, WIDTH = 64, 10
DEIT = "deit_tiny_patch16_224.fb_in1k"  # the file of the default encoder in small


def weights_of(name, **size):
    """A timm model's state dict, classifier included, no value left at its start."""
    torch.manual_seed(0)
    state = timm.create_model(name, pretrained=False, **size).state_dict()
    for key, tensor in state.items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point() and tensor.ndim == 1:
            tensor.add_(0.1 * torch.randn_like(tensor))
    return state


def timm_answer(name, state, tiles, **size):
    """Pooled feature and tokens (B, P, C) as timm alone gives them."""
    reference = timm.create_model(name, pretrained=False, **size).eval()
    reference.load_state_dict(state)
    config = timm.data.resolve_model_data_config(reference)
    mean, std = (torch.tensor(config[k])[None, :, None, None] for k in ("mean", "std"))
    with torch.no_grad():
        raw = reference.forward_features((tiles - mean) / std)
        return reference.forward_head(raw, pre_logits=True), raw


def tiles_of(n=2, side=SIDE):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("test_vit.r160_in1k", "tokens"),
        ("resnet18", "NCHW"),
        ("tf_efficientnet_lite0", "NCHW"),
        ("mobilenetv3_small_050", "NCHW"),  # its head widens the pooled feature
        ("test_mambaout", "NHWC"),
    ],
)
def test_vector_and_tokens_are_timms_own(name, layout):
    size = {"img_size": SIDE} if layout == "tokens" else {}
    state = weights_of(name, **size)
    encoder = ImageEncoder(name, SIDE, WIDTH, state).eval()
    pooled, raw = timm_answer(name, state, tiles_of(), **size)
    tokens = {"tokens": raw, "NCHW": raw.flatten(2).mT, "NHWC": raw.flatten(1, 2)}[layout]
    with torch.no_grad():
        found_pooled, found_tokens = encoder.features(tiles_of())
        vector, raw_tokens = encoder(tiles_of())
        torch.testing.assert_close(found_pooled, pooled)
        torch.testing.assert_close(found_tokens, tokens)
        torch.testing.assert_close(raw_tokens, tokens)
        torch.testing.assert_close(vector, encoder.to_vector(pooled))
        assert encoder.project_tokens(raw_tokens, 50).shape == (2, tokens.shape[1], WIDTH)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "test_vit.r160_in1k"])
def test_only_depthwise_convolutions_are_trained_in_fp32_on_a_cpu(name):
    """Their gradients are then those of timm's own model without autocast; without gradient all trunks are in bf16."""
    size = {"img_size": SIDE} if "vit" in name else {}
    state = weights_of(name, **size)
    encoder, seen = ImageEncoder(name, SIDE, WIDTH, state).train(), set()
    for module in encoder.trunk.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda module, given, out: seen.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            encoder.features(tiles_of())
        assert seen == {torch.bfloat16}
        seen.clear()
        pooled, _ = encoder.features(tiles_of())
    assert seen == {torch.float32 if name == "tf_efficientnet_lite0" else torch.bfloat16}
    if name == "tf_efficientnet_lite0":
        reference = timm.create_model(name, pretrained=False).eval()
        reference.load_state_dict(state)
        raw = reference.forward_features((tiles_of() - encoder.mean) / encoder.std)
        reference.forward_head(raw, pre_logits=True).sum().backward()
        pooled.sum().backward()
        theirs = dict(reference.named_parameters())
        for own, ours in encoder.trunk.named_parameters():
            torch.testing.assert_close(ours.grad, theirs[own].grad, rtol=1e-3, atol=1e-3)


def whole_and_middle(tiles):
    """At half the resolution, and the middle half as it is."""
    quarter = tiles.shape[-1] // 4
    small = F.interpolate(tiles, scale_factor=0.5, mode="bicubic", antialias=True)
    return small, tiles[..., quarter:-quarter, quarter:-quarter]


@pytest.mark.parametrize(("name", "size"), [("test_vit.r160_in1k", {"img_size": SIDE // 2}), ("resnet18", {})])
@pytest.mark.parametrize("scales", [(1.0, 0.5), (0.5, 1.0)])
def test_several_scales_are_seen_side_by_side_with_the_tokens_of_the_first(name, size, scales):
    state = weights_of(name, **size)
    encoder = ImageEncoder(name, SIDE, WIDTH, state, crop_scales=scales).eval()
    whole, middle = (timm_answer(name, state, seen, **size) for seen in whole_and_middle(tiles_of()))
    first, second = (whole, middle) if scales[0] == 1 else (middle, whole)
    tokens = first[1] if first[1].ndim == 3 else first[1].flatten(2).mT
    with torch.no_grad():
        pooled, raw = encoder.features(tiles_of())
        vector, _ = encoder(tiles_of())
    torch.testing.assert_close(pooled, torch.cat([first[0], second[0]], dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw, tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vector, encoder.to_vector(pooled))


@torch.no_grad()
def test_a_single_scale_is_the_middle_of_the_tile_alone():
    encoder, tiles = ImageEncoder("test_vit", SIDE, WIDTH, crop_scales=(0.5,)).eval(), tiles_of()
    other = tiles.clone()
    other[..., : SIDE // 4, :] = 0
    vector, tokens = encoder(tiles)
    assert tokens.shape[1] == 1 + 4, "a grid of 32 px in patches of 16"
    assert all(torch.equal(a, b) for a, b in zip(encoder(other), (vector, tokens), strict=True))
    other[..., SIDE // 2, :] = 0
    assert not torch.allclose(encoder(other)[0], vector)


@torch.no_grad()
def test_one_more_scale_leaves_the_first_as_it_was_and_tiles_do_not_mix():
    torch.manual_seed(0)
    encoder, tiles = ImageEncoder("resnet18", SIDE, WIDTH, crop_scales=(0.5,)).eval(), tiles_of(3)
    pooled, tokens = encoder.features(tiles)
    encoder.crop_scales = (0.5, 1.0, 0.75)
    more, same_tokens = encoder.features(tiles)
    assert more.shape == (3, 3 * pooled.shape[1])
    torch.testing.assert_close(more[:, : pooled.shape[1]], pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same_tokens, tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.features(tiles[1:2])[0], more[1:2], rtol=1e-4, atol=1e-5)


def test_normalisation_is_each_models_own():
    for name in ("test_vit.r160_in1k", "resnet18"):
        config, encoder = timm.get_pretrained_cfg(name), ImageEncoder(name, SIDE, WIDTH)
        assert encoder.mean.flatten().tolist() == pytest.approx(config.mean)
        assert encoder.std.flatten().tolist() == pytest.approx(config.std)
    assert timm.get_pretrained_cfg("test_vit.r160_in1k").mean != timm.get_pretrained_cfg("resnet18").mean


def published_file(folder):
    """A file as the authors of DeiT published theirs: tensors under "model", 1000 classes, 224 px."""
    state = weights_of(DEIT)
    torch.save({"model": state}, folder / "deit.pth")
    return tensors.read_weights(folder / "deit.pth", "--image_weights"), state


def test_a_published_deit_file_loads_whole_at_224(tmp_path):
    read, state = published_file(tmp_path)
    encoder = ImageEncoder(DEIT, 224, WIDTH, read).eval()
    loaded = encoder.trunk.state_dict()
    assert set(state) - set(loaded) == {"head.weight", "head.bias"}
    assert set(loaded) <= set(state)
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)
    pooled, raw = timm_answer(DEIT, state, tiles_of(1, 224))
    with torch.no_grad():
        found_pooled, found_raw = encoder.features(tiles_of(1, 224))
    torch.testing.assert_close(found_pooled, pooled)
    torch.testing.assert_close(found_raw, raw)
    torch.testing.assert_close(found_pooled, found_raw[:, 0])
    assert found_raw.shape == (1, 197, 192)


def test_position_embeddings_are_resampled_as_timm_does_at_112(tmp_path):
    read, state = published_file(tmp_path)
    encoder = ImageEncoder(DEIT, 112, WIDTH, read).eval()
    reference = timm.create_model(DEIT, pretrained=False)
    reference.load_state_dict(state)
    reference.set_input_size((112, 112))
    torch.testing.assert_close(encoder.trunk.pos_embed, reference.pos_embed, rtol=0, atol=1e-6)
    others = {name for name in encoder.trunk.state_dict() if name != "pos_embed"}
    assert all(torch.equal(encoder.trunk.state_dict()[name], state[name]) for name in others)
    assert encoder(tiles_of(1, 112))[1].shape == (1, 1 + 49, 192)


def test_a_file_without_a_classifier_loads(tmp_path):
    state = {k: v for k, v in weights_of("test_vit", img_size=SIDE).items() if not k.startswith("head.")}
    loaded = ImageEncoder("test_vit", SIDE, WIDTH, state).trunk.state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: weights_of("test_vit4", img_size=SIDE),
        lambda state: weights_of("resnet18"),
        lambda state: {k: v for k, v in state.items() if k != "norm.weight"},
        lambda state: {f"{k}.elsewhere": v for k, v in state.items()},
        lambda state: state | {"extra": torch.zeros(1)},
    ],
    ids=["another ViT", "a network", "one missing", "other names", "one too many"],
)
def test_other_weights_are_refused(spoil):
    with pytest.raises(ValueError, match="--image_weights: expected weights of test_vit, found"):
        ImageEncoder("test_vit", SIDE, WIDTH, spoil(weights_of("test_vit", img_size=SIDE)))


def test_an_unknown_name_is_refused_with_names_near_it():
    with pytest.raises(ValueError, match=r"--image_encoder: expected a model .*, found resnet_no; did you mean resnet"):
        ImageEncoder("resnet_no", SIDE, WIDTH)
    with pytest.raises(ValueError, match=r"found testvit; did you mean test_vit"):
        ImageEncoder("testvit", SIDE, WIDTH)
    with pytest.raises(ValueError, match=r"found test_vit.of_none; use one of test_vit.r160_in1k"):
        ImageEncoder("test_vit.of_none", SIDE, WIDTH)


def test_without_a_network_the_other_choices_are_named(monkeypatch):
    def unreachable(*args, **kwargs):
        raise FileNotFoundError("cannot find the requested files")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", unreachable)
    with pytest.raises(ValueError, match=r"no way to download .* or none"):
        ImageEncoder("test_vit.r160_in1k", SIDE, WIDTH, "timm")


def norms_of(encoder):
    return [m for m in encoder.trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
@pytest.mark.parametrize("pretrained", ["weights", "flag", "no"])
def test_batchnorm_of_a_pretrained_trunk_keeps_its_statistics_and_trains_its_scale(name, pretrained):
    weights = weights_of(name) if pretrained == "weights" else None
    encoder = ImageEncoder(name, SIDE, WIDTH, weights, pretrained=pretrained == "flag")
    encoder.eval().train()
    before = [norm.running_mean.clone() for norm in norms_of(encoder)]
    vector, tokens = encoder(tiles_of())
    (vector.square().sum() + encoder.project_tokens(tokens, 50).square().sum()).backward()
    moved = [not torch.equal(norm.running_mean, old) for norm, old in zip(norms_of(encoder), before, strict=True)]
    assert moved == [pretrained == "no"] * len(before)
    assert encoder.trunk.training
    for norm in norms_of(encoder):
        assert norm.training == (pretrained == "no")
        assert norm.weight.grad is not None and norm.bias.grad is not None


def test_evaluation_mode_holds_for_every_batchnorm():
    encoder = ImageEncoder("resnet18", SIDE, WIDTH).eval()
    assert not any(norm.training for norm in norms_of(encoder))


def test_pool_grid_by_hand():
    grid = torch.arange(16.0)[None, :, None]
    prefix = torch.tensor([[[100.0], [200.0]]])
    pooled = [2.5, 4.5, 10.5, 12.5]  # means of the quarters of 0..15 in rows of four
    assert pool_grid(torch.cat([prefix, grid], dim=1), 2, 2).flatten().tolist() == [100.0, 200.0, *pooled]
    assert pool_grid(grid, 0, 1).flatten().tolist() == [7.5]
    assert torch.equal(pool_grid(grid, 0, 4), grid)
    assert torch.equal(pool_grid(grid, 0, 9), grid)


def test_pool_grid_keeps_channels_apart_and_overlaps_where_sides_do_not_divide():
    grid = torch.stack([torch.arange(9.0), -torch.arange(9.0)], dim=1)[None]
    expected = torch.tensor([2.0, 3.0, 5.0, 6.0])  # adaptive: windows of 2 x 2 that share the middle row and column
    found = pool_grid(grid, 0, 2)
    torch.testing.assert_close(found[0, :, 0], expected)
    torch.testing.assert_close(found[0, :, 1], -expected)


@pytest.mark.parametrize(("at_most", "n"), [(17, 17), (100, 17), (16, 10), (10, 10), (5, 5), (2, 2)])
@torch.no_grad()
def test_projection_of_the_pooled_is_the_pooled_of_projections(at_most, n):
    encoder = ImageEncoder("test_vit", SIDE, WIDTH).eval()
    raw = encoder(tiles_of())[1]
    found = encoder.project_tokens(raw, at_most)
    side = int((at_most - 1) ** 0.5)
    assert found.shape == (2, n, WIDTH)
    torch.testing.assert_close(found, pool_grid(encoder.to_token(raw), 1, side))


@torch.no_grad()
def test_grid_tokens_leave_the_class_token_out():
    encoder = ImageEncoder("test_vit", SIDE, WIDTH).eval()
    raw = encoder(tiles_of())[1]
    torch.testing.assert_close(encoder.grid_tokens(raw, 4), encoder.to_token(raw[:, 1:]))
    mean = encoder.to_token(raw[:, 1:].mean(1, keepdim=True))
    torch.testing.assert_close(encoder.grid_tokens(raw, 1), mean)
