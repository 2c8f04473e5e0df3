"""tuning.py: what of the trunk trains, and at what rate; against timm's own groups."""

import argparse
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from torch import nn

from model import tuning
from model.image_encoder import ImageEncoder
from model.momentum import momentum_encoder, update_momentum
from utils.training import loop

SIDE, WIDTH = 32, 6


def encoder_of(name="test_vit", **more):
    torch.manual_seed(0)
    return ImageEncoder(name, 64 if name.startswith("swin") else SIDE, WIDTH, **more)


def trained(encoder):
    return {name for name, p in encoder.trunk.named_parameters() if p.requires_grad}


def under(encoder, *starts):
    return {name for name, _ in encoder.trunk.named_parameters() if name.startswith(starts)}


def tiles(n=2):
    return torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


# ---- what trains


@pytest.mark.parametrize("text", ["all", "none", "norm", "last:1", "last:12"])
def test_choices(text):
    assert tuning.choice(text) == text


@pytest.mark.parametrize("text", ["", "last", "last:", "last:0", "last:-1", "last:1.5", "All", "last:2 ", "norms"])
def test_other_choices_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected all, none, norm or last:N .*found"):
        tuning.choice(text)


@pytest.mark.parametrize(
    ("name", "what", "expected"),
    [
        ("test_vit", "last:1", ["blocks.5.", "norm."]),
        ("test_vit", "last:3", ["blocks.3.", "blocks.4.", "blocks.5.", "norm."]),
        ("test_vit", "last:6", ["blocks.", "norm."]),
        ("test_vit2", "last:2", ["blocks.6.", "blocks.7.", "fc_norm."]),  # what stands behind the blocks trains, too
        ("test_vit3", "last:1", ["blocks.8.", "norm.", "attn_pool."]),
        ("resnet18", "last:1", ["layer4.1."]),
        ("resnet18", "last:3", ["layer4.", "layer3.1."]),
        ("swin_tiny_patch4_window7_224", "last:2", ["layers.3.", "norm."]),
        ("tf_efficientnet_lite0", "last:1", ["blocks.6.0.", "conv_head.", "bn2."]),
        ("mobilenetv3_small_050", "last:1", ["blocks.5.0.", "conv_head."]),
        ("test_convnext", "last:1", ["stages.3.blocks.1.", "head.norm."]),
    ],
)
def test_the_last_blocks_and_what_follows_train(name, what, expected):
    encoder = encoder_of(name)
    tuning.tune(encoder, what)
    assert trained(encoder) == under(encoder, *expected)
    assert all(p.requires_grad for part in (encoder.to_vector, encoder.to_token) for p in part.parameters())


def test_the_stem_of_a_vit_is_all_that_comes_before_its_blocks(monkeypatch):
    def as_in_timm_1_0_20(self, coarse=False):
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    monkeypatch.setattr(timm.models.VisionTransformer, "group_matcher", as_in_timm_1_0_20)
    for name, part in (("test_vit2", "reg_token"), ("vit_xsmall_patch16_clip_224", "norm_pre.weight")):
        encoder = encoder_of(name)
        tuning.tune(encoder, "last:2")
        assert (
            not encoder.trunk.get_parameter(part).requires_grad and encoder.trunk.blocks[-1].norm1.weight.requires_grad
        )
        fractions, n_blocks = tuning.rate_fractions(encoder, 0.5), len(encoder.trunk.blocks)
        assert fractions[encoder.trunk.get_parameter(part)] == 0.5 ** (n_blocks + 1)


@pytest.mark.parametrize(("name", "n"), [("test_vit", 6), ("resnet18", 8)])
def test_more_blocks_than_there_are_is_refused_with_their_number(name, n):
    with pytest.raises(ValueError, match=rf"--tune: expected at most last:{n}, .*found last:{n + 1}"):
        tuning.tune(encoder_of(name), f"last:{n + 1}")


def test_none_and_all():
    encoder = encoder_of()
    tuning.tune(encoder, "none")
    assert not trained(encoder)
    assert {p.requires_grad for part in (encoder.to_vector, encoder.to_token) for p in part.parameters()} == {True}
    tuning.tune(encoder, "all")
    assert trained(encoder) == under(encoder, "")


@pytest.mark.parametrize("name", ["test_vit", "resnet18", "test_convnext", "test_vit4"])
def test_norm_layers_alone(name):
    encoder = encoder_of(name)
    tuning.tune(encoder, "norm")
    kinds = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, timm.layers.RmsNorm)
    norms = [key for key, module in encoder.trunk.named_modules() if isinstance(module, kinds)]
    assert trained(encoder) == under(encoder, *(f"{key}." for key in norms))
    assert all(encoder.trunk.get_parameter(key).ndim == 1 for key in trained(encoder)) and len(norms) > 5


def test_a_network_without_norms_is_refused():
    with pytest.raises(ValueError, match="--tune norm: expected an encoder with norm layers, found none"):
        tuning.tune(encoder_of("test_nfnet"), "norm")


def test_a_network_whose_layers_are_unknown_is_refused():
    encoder = encoder_of()
    encoder.trunk = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected a timm model with layers in order, found Sequential"):
        tuning.tune(encoder, "last:1")


# ---- how frozen parts behave


def test_frozen_blocks_drop_nothing_and_trained_ones_do():
    encoder = encoder_of()
    for block in encoder.trunk.blocks:
        block.drop_path1 = DropPath(0.5)
    tuning.tune(encoder.train(), "last:2")
    assert [block.drop_path1.training for block in encoder.trunk.blocks] == [False] * 4 + [True] * 2
    tuning.tune(encoder, "none")
    with torch.no_grad():
        assert all(torch.equal(encoder(tiles())[0], encoder(tiles())[0]) for _ in range(5))
    assert encoder.training and not encoder.eval().trunk.training
    tuning.tune(encoder.train(), "all")
    assert all(block.drop_path1.training for block in encoder.trunk.blocks)
    with torch.no_grad():
        assert not all(torch.equal(encoder(tiles())[0], encoder(tiles())[0]) for _ in range(5))


def test_frozen_batchnorm_keeps_its_statistics():
    encoder = encoder_of("resnet18")  # not pretrained: the others' statistics move
    tuning.tune(encoder.train(), "last:2")
    before = {k: v.clone() for k, v in encoder.trunk.state_dict().items() if "running_mean" in k}
    encoder(torch.rand(4, 3, SIDE, SIDE))
    after = encoder.trunk.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert moved == {key for key in before if key.startswith("layer4.")}


@pytest.mark.parametrize("what", ["all", "last:2", "norm", "none"])
def test_a_step_moves_what_trains_and_nothing_else_and_the_momentum_encoder_shares_the_rest(what):
    encoder = encoder_of()
    tuning.tune(encoder, what)
    encoder_m = momentum_encoder(encoder)
    shared = {name for (name, p), q in zip(encoder.named_parameters(), encoder_m.parameters(), strict=True) if p is q}
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    args = SimpleNamespace(Init_lr=1e-2, weight_decay=0.1, momentum=0.9)
    optimizer = loop.make_optimizer(encoder.parameters(), args, tuning.rate_fractions(encoder, 0.5))
    vector, tokens = encoder.train()(tiles())
    (vector.square().sum() + encoder.to_token(tokens).square().sum()).backward()
    optimizer.step()
    update_momentum(encoder_m, encoder, 0.5)
    moved = {name for name, p in encoder.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert shared == set(before) - moved
    assert all(p.grad is None for name, p in encoder.named_parameters() if name in shared)


@pytest.mark.parametrize(
    ("name", "what", "n_frozen"),
    [
        ("test_vit", "last:2", 4),
        ("test_vit2", "last:1", 7),  # a register token, and a norm behind the pooling
        ("test_vit3", "last:3", 6),  # pooled by attention
        ("vit_tiny_patch16_224", "none", 12),
        ("test_vit", "none", 6),
        ("test_vit", "last:6", 0),
        ("test_vit", "norm", 0),
        ("test_vit", "all", 0),
        ("resnet18", "last:2", 0),
        ("swin_tiny_patch4_window7_224", "none", 0),
    ],
)
def test_blocks_before_the_first_that_trains_run_once_for_both_encoders(name, what, n_frozen):
    encoder = encoder_of(name)
    seen = torch.rand(2, 3, encoder.side, encoder.side)
    expected = encoder.eval()(seen)
    tuning.tune(encoder, what)
    frozen = encoder.frozen_part(seen)
    assert encoder.n_frozen == n_frozen and (frozen is None) == (n_frozen == 0)
    for same in (encoder, momentum_encoder(encoder)):
        torch.testing.assert_close(same(seen, frozen), expected)
        if frozen is not None:
            assert not frozen.requires_grad
            assert (same(seen, frozen + torch.randn_like(frozen))[0] - expected[0]).abs().max() > 1e-3, "used"


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "vit_xsmall_patch16_clip_224"])  # registers, norm_pre
@pytest.mark.parametrize("what", ["last:2", "none"])
def test_gradients_are_those_without_sharing(name, what):
    encoder, gradients = encoder_of(name, crop_scales=(1.0, 0.5)), []
    tuning.tune(encoder.train(), what)
    for frozen in (None, encoder.frozen_part(tiles())):
        encoder.zero_grad()
        vector, tokens = encoder(tiles(), frozen)
        (vector.square().sum() + encoder.to_token(tokens).square().sum()).backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)
    assert set(gradients[1]) == {name for name, p in encoder.named_parameters() if p.requires_grad}


# ---- rates


@pytest.mark.parametrize(
    "name",
    ["test_vit", "test_vit2", "resnet18", "tf_efficientnet_lite0", "swin_tiny_patch4_window7_224", "test_convnext"],
)
def test_fractions_are_timms_layer_decay(name):
    encoder = encoder_of(name)
    with_head = timm.create_model(name, num_classes=3)
    groups = param_groups_layer_decay(with_head, weight_decay=0.1, layer_decay=0.7)
    expected = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    names = {key: expected[id(p)] for key, p in with_head.named_parameters()}
    for key in names:
        if key.startswith("reg_token"):  # which timm 1.0.20 takes for a last layer
            names[key] = names["pos_embed"]
    fractions = tuning.rate_fractions(encoder, 0.7)
    assert len(fractions) == len(under(encoder, ""))
    for key, p in encoder.trunk.named_parameters():
        assert fractions[p] == pytest.approx(names[key]), key


def test_fractions_by_hand():
    encoder = encoder_of()
    fractions, trunk = tuning.rate_fractions(encoder, 0.5), encoder.trunk
    assert fractions[trunk.blocks[5].attn.qkv.weight] == fractions[trunk.norm.bias] == 0.5
    assert fractions[trunk.blocks[0].attn.qkv.weight] == 0.5**6
    assert fractions[trunk.patch_embed.proj.weight] == fractions[trunk.pos_embed] == 0.5**7
    assert encoder.to_vector.weight not in fractions, "projections learn at the whole rate"
    assert tuning.rate_fractions(encoder, 1.0) == {}


ARGS = SimpleNamespace(Init_lr=0.2, Min_lr=0.05, lr_decay_type="cos", weight_decay=0.1, momentum=0.8)


def test_without_decay_the_optimizer_has_the_two_groups_it_had():
    encoder = encoder_of()
    one, two = (loop.make_optimizer(encoder.parameters(), ARGS, fractions) for fractions in (None, {}))
    for optimizer in (one, two):
        matrices, vectors = optimizer.param_groups
        assert [id(p) for p in matrices["params"]] == [id(p) for p in encoder.parameters() if p.ndim > 1]
        assert [id(p) for p in vectors["params"]] == [id(p) for p in encoder.parameters() if p.ndim <= 1]
        assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
        assert matrices["lr"] == vectors["lr"] == 0.2 and matrices["betas"] == (0.8, 0.999)


def test_every_group_follows_the_schedule_at_its_own_share():
    encoder = encoder_of()
    tuning.tune(encoder, "last:2")
    fractions = tuning.rate_fractions(encoder, 0.5)
    optimizer = loop.make_optimizer(encoder.parameters(), ARGS, fractions)
    schedule = loop.schedule(optimizer, 10, ARGS)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(
        p.requires_grad for p in encoder.parameters()
    )
    for step in range(5):
        whole = 0.2 * loop.rate_at(step, 10, "cos", 0.25)
        assert schedule.get_last_lr()[0] == pytest.approx(whole), "the first group is the one that is logged"
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert group["lr"] == pytest.approx(whole * fractions.get(p, 1.0))
                assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0.0)
        optimizer.step()
        schedule.step()
    assert len({group["lr"] for group in optimizer.param_groups}) == 3, "projections, the last block, the one before"


def test_an_optimizer_with_fractions_is_resumed():
    encoder = encoder_of()
    one, two = (loop.make_optimizer(encoder.parameters(), ARGS, tuning.rate_fractions(encoder, 0.5)) for _ in range(2))
    encoder(tiles())[0].sum().backward()
    one.step()
    two.load_state_dict(one.state_dict())
    assert [g["lr"] for g in one.param_groups] == [g["lr"] for g in two.param_groups]
    assert set(two.state) == set(one.state)
