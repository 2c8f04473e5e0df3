"""image_weights.py: sizes, prefixes and heads of published files, against timm's own models and resampling."""

from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_vits import ONES, PREFIX_OF_POSITIONS, SMALL, WIDTH, build, randomise, read, same_answer, tiles_of, written
from timm.layers import resample_abs_pos_embed

from model import image_weights
from model.image_encoder import ImageEncoder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, published in SMALL.items():
        monkeypatch.setitem(image_weights.PUBLISHED, f"test/{name}", published)


DEIT = "deit_tiny_patch16_224.fb_in1k"


# ---- position embeddings


@pytest.mark.parametrize("side", [160, 112, 384])
@pytest.mark.parametrize("kind", SMALL)
def test_positions_are_resampled_in_two_dimensions_and_the_tokens_before_them_kept(tmp_path, kind, side):
    state = build(kind).state_dict()
    encoder = ImageEncoder(f"hf-hub:test/{kind}", side, WIDTH, written(tmp_path / "w.pth", {"model": state}))
    n_prefix, grid = PREFIX_OF_POSITIONS[kind], side // 16
    expected = resample_abs_pos_embed(state["pos_embed"], [grid, grid], num_prefix_tokens=n_prefix)
    assert torch.equal(encoder.trunk.pos_embed, expected)
    assert torch.equal(expected[:, :n_prefix], state["pos_embed"][:, :n_prefix])
    reference = build(kind, side)
    reference.load_state_dict(state | {"pos_embed": expected})
    same_answer(encoder, reference, side)
    report = encoder.weights_report
    assert (report.loaded, report.skipped) == (len(state), ())
    assert len(report.resized) == (side != 160)
    if side != 160:
        old, new = ("x".join(map(str, tensor.shape)) for tensor in (state["pos_embed"], expected))
        assert report.resized == (f"pos_embed {old} -> {new}",)


def deit_in_all_sizes(folder, name, sides):
    """A file as the authors of DeiT published theirs, loaded at several sizes."""
    reference = randomise(timm.create_model(name))
    state = reference.state_dict()
    torch.save({"model": state}, folder / "deit.pth")
    for side in sides:
        encoder = ImageEncoder(name, side, WIDTH, read(folder / "deit.pth"))
        report = encoder.weights_report
        assert (report.loaded, report.skipped) == (len(state) - 2, ("head.weight", "head.bias"))
        assert len(report.resized) == (side != 224)
        positions = resample_abs_pos_embed(state["pos_embed"], [side // 16, side // 16])
        assert torch.equal(encoder.trunk.pos_embed, positions)
        sized = timm.create_model(name, img_size=side)
        sized.load_state_dict(state | {"pos_embed": positions})
        same_answer(encoder, sized, side)


def test_a_deit_file_at_its_own_and_other_sizes(tmp_path):
    deit_in_all_sizes(tmp_path, DEIT, [224, 112, 384])


@pytest.mark.slow
def test_a_deit_base_file_at_its_own_and_other_sizes(tmp_path):
    deit_in_all_sizes(tmp_path, "deit_base_patch16_224.fb_in1k", [224, 112, 384])


def test_a_file_saved_at_another_size_than_the_models_own(tmp_path):
    state = build("class", 384).state_dict()
    encoder = ImageEncoder("test_vit", 112, WIDTH, written(tmp_path / "w.pth", state))
    assert torch.equal(encoder.trunk.pos_embed, resample_abs_pos_embed(state["pos_embed"], [7, 7]))


def test_the_smallest_scale_sets_the_size_of_the_grid(tmp_path):
    state = build("class").state_dict()
    encoder = ImageEncoder("test_vit", 224, WIDTH, written(tmp_path / "w.pth", state), crop_scales=(1.0, 0.5))
    assert torch.equal(encoder.trunk.pos_embed, resample_abs_pos_embed(state["pos_embed"], [7, 7]))


def test_shifted_windows_at_another_size(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    reference = randomise(timm.create_model(name, num_classes=0))
    encoder = ImageEncoder(name, 112, WIDTH, written(tmp_path / "w.pth", reference.state_dict()))
    sized = timm.create_model(name, num_classes=0, img_size=112)
    sized.load_state_dict(timm.models.swin_transformer.checkpoint_filter_fn(reference.state_dict(), sized))
    with torch.no_grad():
        found = encoder.eval().features(tiles_of(112))[0]
        torch.testing.assert_close(found, sized.eval()(tiles_of_normalised(encoder, 112)))


def tiles_of_normalised(encoder, side):
    return (tiles_of(side) - encoder.mean) / encoder.std


def test_a_convolutional_network_loads_at_any_size(tmp_path):
    name = "tf_efficientnet_lite0"
    reference = randomise(timm.create_model(name))
    encoder = ImageEncoder(name, 96, WIDTH, written(tmp_path / "w.pth", {"state_dict": reference.state_dict()})).eval()
    assert encoder.weights_report.skipped == ("classifier.weight", "classifier.bias")
    assert not encoder.weights_report.resized
    with torch.no_grad():
        raw = reference.eval().forward_features(tiles_of_normalised(encoder, 96))
        torch.testing.assert_close(encoder.features(tiles_of(96))[1], raw.flatten(2).mT)


def test_a_timm_name_whose_own_file_is_of_jax_takes_one_of_torch(tmp_path):
    name = "vit_tiny_patch16_224.augreg_in21k"
    state = randomise(timm.create_model(name, num_classes=0)).state_dict()
    loaded = ImageEncoder(name, 224, WIDTH, written(tmp_path / "w.pth", state)).trunk.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


# ---- prefixes, heads, what stands beside the trunk


@pytest.mark.parametrize(
    "prefix",
    (
        " module. _orig_mod. model. backbone. encoder. teacher.backbone. trunk. visual. visual.trunk. "
        "module.visual.trunk. _orig_mod.module.model."
    ).split(" "),
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_prefixes_are_taken_away(tmp_path, prefix, suffix):
    state, path = build("class").state_dict(), tmp_path / f"w.{suffix}"
    prefixed = {prefix + name: tensor for name, tensor in state.items()}
    save_file(prefixed, path) if suffix == "safetensors" else torch.save({"teacher": prefixed}, path)
    encoder = ImageEncoder("test_vit", 160, WIDTH, read(path))
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.trunk.state_dict().items())
    where = ": ".join(filter(None, ("teacher" if suffix == "pth" else "", prefix and f"{prefix}*")))
    source = f"{path} ({where})" if where else str(path)
    report = f"image weights {source}: loaded {len(state)} tensors, missing 0, skipped 0, resized 0"
    assert str(encoder.weights_report) == report


def test_heads_are_skipped_and_listed(tmp_path):
    state = build("class").state_dict()
    heads = ["head.weight", "head.mlp.0.weight", "head.last_layer.weight_g", "mask_token", "decoder_embed.weight"]
    heads += ["decoder_blocks.0.attn.qkv.weight", "fc_norm.weight", "head_dist.bias", "last_layer.weight"]
    encoder = ImageEncoder("test_vit", 160, WIDTH, written(tmp_path / "w.pth", state | dict.fromkeys(heads, ONES)))
    assert encoder.weights_report.skipped == tuple(heads)
    assert "skipped 9 (head.weight, head.mlp.0.weight, head.last_layer.weight_g, mask_token, ...)" in str(
        encoder.weights_report
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.trunk.state_dict().items())


def test_a_head_that_belongs_to_the_trunk_is_required(tmp_path):
    """timm's average-pooling ViT has its last norm as fc_norm, and ConvNeXt as head.norm."""
    for name, norm in (("test_vit2", "fc_norm.weight"), ("test_convnext", "head.norm.weight")):
        state = randomise(timm.create_model(name)).state_dict()
        trunk = ImageEncoder(name, 160, WIDTH, written(tmp_path / "w.pth", state)).trunk
        assert torch.equal(trunk.state_dict()[norm], state[norm])
        del state[norm]
        with pytest.raises(ValueError, match=rf"\d missing \({norm}"):
            ImageEncoder(name, 160, WIDTH, written(tmp_path / "w.pth", state))


def test_the_image_trunk_of_a_larger_model_is_found(tmp_path):
    """As CONCH's file: text towers with more tensors than the image's, poolers beside the trunk."""
    state = build("class").state_dict()
    beside = {f"text.transformer.resblocks.{i}.attn.in_proj_weight": ONES for i in range(100)}
    beside |= {"visual.attn_pool_contrast.query": ONES, "visual.proj_contrast": ONES, "logit_scale": ONES}
    beside |= {f"text_decoder.resblocks.{i}.norm1.weight": ONES for i in range(12)}
    file = beside | {f"visual.trunk.{name}": tensor for name, tensor in state.items()}
    encoder = ImageEncoder("test_vit", 112, WIDTH, written(tmp_path / "w.bin", file))
    assert set(encoder.weights_report.skipped) == set(beside)
    assert encoder.weights_report.loaded == len(state)
    assert torch.equal(encoder.trunk.blocks[3].attn.qkv.weight, state["blocks.3.attn.qkv.weight"])


def where(content, names):
    return image_weights.choose_tensors(content, names).where


def test_the_prefix_under_which_most_names_are_found_by_hand():
    wanted = ["a.w", "b.w", "c.w"]

    def prefix(*names):
        return image_weights.choose_tensors(dict.fromkeys(names, ONES), wanted).prefix

    assert prefix("a.w", "b.w", "module.a.w") == ""
    assert prefix("a.w", "module.a.w", "module.b.w") == "module."
    assert prefix("model.encoder.a.w", "model.b.w", "model.c.w") == "model."
    assert prefix("any.thing.a.w", "any.thing.b.w", "thing.a.w") == "any.thing."
    assert prefix("module.x", "module.model.y") == "module.", "none is found: wrappers of all names alone"
    assert prefix("x", "module.model.y") == ""
    assert where({"encoder.a.w": ONES}, ["encoder.a.w"]) == "", "a name of the model's own"


def test_a_trunk_whose_own_names_begin_like_a_prefix():
    shapes = {"encoder.a": (3,), "model.b": (3,)}
    content = {"encoder.a": ONES, "model.b": ONES, "fc.weight": ONES}
    kept, skipped = image_weights.select(image_weights.choose_tensors(content, shapes), shapes)
    assert set(kept) == set(shapes) and skipped == ("fc.weight",)


# ---- several sets of weights in one file


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def with_heads(state):
    return state | {"head.mlp.0.weight": ONES, "head.last_layer.weight_g": ONES}


SETS = {  # what a file holds of weights w that are wanted and others x, and where w are
    "timm with --model-ema": (lambda w, x: {"state_dict": x, "state_dict_ema": w, "arch": "x"}, "state_dict_ema"),
    "timm, processes": (
        lambda w, x: {
            "state_dict": x,
            "state_dict_ema": prefixed("module.", w),
            "args": Namespace(lr=0.1, opt="adamw"),
        },
        "state_dict_ema: module.*",
    ),
    "an average in camel case": (lambda w, x: {"model": x, "modelEMA": w}, "modelEMA"),
    "an average alone": (lambda w, x: {"state_dict_ema": w, "arch": "test_vit"}, "state_dict_ema"),
    "an average of its own class": (lambda w, x: {"model": x, "ema": {"decay": 0.9, "module": w}}, "ema.module"),
    "DeiT": (lambda w, x: {"model": x, "optimizer": optimizer(x), "model_ema": w, "epoch": 3}, "model_ema"),
    "MAE": (lambda w, x: {"model": w | prefixed("decoder_blocks.0.", x), "optimizer": optimizer(x)}, "model"),
    "DINO": (
        lambda w, x: {
            "student": prefixed("module.backbone.", x) | {"module.head.mlp.0.weight": ONES},
            "teacher": prefixed("backbone.", with_heads(w)),
            "optimizer": optimizer(x),
            "dino_loss": {"center": ONES},
            "args": Namespace(arch="vit_small"),
        },
        "teacher: backbone.*",
    ),
    "a student alone": (
        lambda w, x: {"student": prefixed("module.backbone.", w), "epoch": 1},
        "student: module.backbone.*",
    ),
    "DINOv2": (
        lambda w, x: {"teacher": prefixed("backbone.", w) | {"dino_head.mlp.0.bias": ONES}},
        "teacher: backbone.*",
    ),
    "DINOv2, a flat one": (
        lambda w, x: {"model": prefixed("student.backbone.", x) | prefixed("teacher.backbone.", w)},
        "model: teacher.backbone.*",
    ),
    "an averaged teacher": (lambda w, x: {"teacher": x, "teacher_ema": w, "student": x}, "teacher_ema"),
    "MoCo v3": (
        lambda w, x: {
            "state_dict": prefixed("module.base_encoder.", x) | prefixed("module.momentum_encoder.", w),
            "arch": "vit",
        },
        "state_dict: module.momentum_encoder.*",
    ),
    "MoCo": (
        lambda w, x: {"state_dict": prefixed("module.encoder_q.", x) | prefixed("module.encoder_k.", w)},
        "state_dict: module.encoder_k.*",
    ),
    "BYOL": (
        lambda w, x: prefixed("online_network.encoder.", x) | prefixed("target_network.encoder.", w),
        "target_network.encoder.*",
    ),
    "I-JEPA": (
        lambda w, x: {"encoder": prefixed("module.", x), "target_encoder": prefixed("module.", w), "opt": optimizer(x)},
        "target_encoder: module.*",
    ),
    "lightly": (
        lambda w, x: {"state_dict": prefixed("backbone.", x) | prefixed("backbone_momentum.", w)},
        "state_dict: backbone_momentum.*",
    ),
    "lightly, DINO": (
        lambda w, x: {"state_dict": prefixed("student_backbone.", x) | prefixed("teacher_backbone.", w)},
        "state_dict: teacher_backbone.*",
    ),
    "Lightning, model": (
        lambda w, x: {"state_dict": prefixed("model.", w), "hyper_parameters": {"lr": 1}, "optimizer_states": [{}]},
        "state_dict: model.*",
    ),
    "Lightning, net": (lambda w, x: {"state_dict": prefixed("net.", w) | {"criterion.w": ONES}}, "state_dict: net.*"),
    "torch's average": (lambda w, x: {"n_averaged": torch.tensor(7)} | prefixed("module.", w), "module.*"),
    "FSDP and compiled": (
        lambda w, x: {"app": {"model": prefixed("_fsdp_wrapped_module._orig_mod.", w)}},
        "app.model: _fsdp_wrapped_module._orig_mod.*",
    ),
    "a text tower of the same names": (
        lambda w, x: prefixed("text_encoder.", x) | prefixed("vision_encoder.", w),
        "vision_encoder.*",
    ),
    "an average of fewer": (
        lambda w, x: {"model": w, "ema": {name: x[name] for name in list(x)[:-3]}},
        "model",
    ),
    "the best metric beside them": (
        lambda w, x: {"model": w, "ema": {"decay": torch.tensor(0.99)}, "teacher": {"temperature": ONES}},
        "model",
    ),
}


def optimizer(state):
    return {"state": {i: {"exp_avg": tensor} for i, tensor in enumerate(state.values())}, "param_groups": []}


@pytest.mark.parametrize("kind", SETS)
def test_of_several_sets_an_average_then_a_teacher_then_a_student_is_taken(tmp_path, kind):
    content, expected = SETS[kind]
    wanted = build("class").state_dict()
    others = {name: tensor + 1 for name, tensor in wanted.items()}
    encoder = ImageEncoder("test_vit", 160, WIDTH, written(tmp_path / "w.pth", content(wanted, others)))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in encoder.trunk.state_dict().items())
    assert encoder.weights_report.source == f"{tmp_path / 'w.pth'} ({expected})"
    assert str(encoder.weights_report).startswith(
        f"image weights {tmp_path / 'w.pth'} ({expected}): loaded {len(wanted)} "
    )


def test_a_few_names_of_blocks_are_no_trunk():
    """Of another layout, for timm to convert: all of it is taken, an average beside the model first."""
    wanted = [f"blocks.{i}.attn.qkv.weight" for i in range(40)] + ["norm.weight", "norm.bias"]
    theirs = {f"stages.{i}.norm.{kind}": ONES for i in range(40) for kind in ("weight", "bias")}
    content = {"model": theirs, "model_ema": prefixed("module.", theirs)}
    chosen = image_weights.choose_tensors(content, wanted)
    assert chosen.where == "model_ema: module.*" and chosen.tensors.keys() == theirs.keys()


def test_sets_in_the_layout_of_transformers(tmp_path):
    anchor = image_weights.ANCHOR
    content = {f"student.{anchor}": ONES, f"teacher.{anchor}": ONES + 1, "teacher.layernorm.bias": ONES}
    found = image_weights.choose_tensors(content, ["patch_embed.proj.weight", "norm.bias"])
    assert (found.where, set(found.tensors)) == ("teacher.*", {"patch_embed.proj.weight", "norm.bias"})
    assert torch.equal(found.tensors["patch_embed.proj.weight"], ONES + 1)


def test_what_the_caller_gave_is_left_alone_and_not_kept(tmp_path):
    given = written(tmp_path / "w.pth", build("class").state_dict() | {"head.weight": ONES})
    names, trunk = list(given), ImageEncoder("test_vit", 112, WIDTH, given).trunk
    assert list(given) == names
    assert "state_dict" not in trunk.pretrained_cfg, "every momentum encoder would copy it"
    assert all(p.data_ptr() != given[name].data_ptr() for name, p in trunk.named_parameters())
