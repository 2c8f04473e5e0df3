"""image_weights.py: sizes, prefixes and heads of published files, against timm's own models and resampling."""

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
    encoder = ImageEncoder("test_vit", 224, WIDTH, written(tmp_path / "w.pth", state), scales=(1.0, 0.5))
    assert torch.equal(encoder.trunk.pos_embed, resample_abs_pos_embed(state["pos_embed"], [7, 7]))


def test_shifted_windows_at_another_size(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    reference = randomise(timm.create_model(name, num_classes=0))
    encoder = ImageEncoder(name, 112, WIDTH, written(tmp_path / "w.pth", reference.state_dict()))
    sized = timm.create_model(name, num_classes=0, img_size=112)
    sized.load_state_dict(timm.models.swin_transformer.checkpoint_filter_fn(reference.state_dict(), sized))
    with torch.no_grad():
        assert torch.equal(encoder.eval().features(tiles_of(112))[0], sized.eval()(tiles_of_normalised(encoder, 112)))


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
    assert str(encoder.weights_report) == (
        f"image weights {path}: loaded {len(state)} tensors, missing 0, skipped 0, resized 0"
    )


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


def test_the_picture_trunk_of_a_larger_model_is_found(tmp_path):
    """As CONCH's file: text towers with more tensors than the picture's, poolers beside the trunk."""
    state = build("class").state_dict()
    beside = {f"text.transformer.resblocks.{i}.attn.in_proj_weight": ONES for i in range(100)}
    beside |= {"visual.attn_pool_contrast.query": ONES, "visual.proj_contrast": ONES, "logit_scale": ONES}
    beside |= {f"text_decoder.resblocks.{i}.norm1.weight": ONES for i in range(12)}
    file = beside | {f"visual.trunk.{name}": tensor for name, tensor in state.items()}
    encoder = ImageEncoder("test_vit", 112, WIDTH, written(tmp_path / "w.bin", file))
    assert set(encoder.weights_report.skipped) == set(beside)
    assert encoder.weights_report.loaded == len(state)
    assert torch.equal(encoder.trunk.blocks[3].attn.qkv.weight, state["blocks.3.attn.qkv.weight"])


def test_find_prefix_by_hand():
    wanted = ["a.w", "b.w", "c.w"]
    assert image_weights.find_prefix(["a.w", "b.w", "module.a.w"], wanted) == ""
    assert image_weights.find_prefix(["a.w", "module.a.w", "module.b.w"], wanted) == "module."
    assert image_weights.find_prefix(["model.encoder.a.w", "model.b.w", "model.c.w"], wanted) == "model."
    assert image_weights.find_prefix(["student.a.w", "student.b.w"], wanted) == ""
    assert image_weights.find_prefix([], wanted) == ""
    assert image_weights.find_prefix(["encoder.a.w"], ["encoder.a.w"]) == "", "a name of the model's own"


def test_a_trunk_whose_own_names_begin_like_a_prefix():
    shapes = {"encoder.a": (3,), "model.b": (3,)}
    kept, skipped = image_weights.select({"encoder.a": ONES, "model.b": ONES, "fc.weight": ONES}, shapes)
    assert set(kept) == set(shapes) and skipped == ("fc.weight",)


def test_what_the_caller_gave_is_left_alone_and_not_kept(tmp_path):
    given = written(tmp_path / "w.pth", build("class").state_dict() | {"head.weight": ONES})
    names, trunk = list(given), ImageEncoder("test_vit", 112, WIDTH, given).trunk
    assert list(given) == names
    assert "state_dict" not in trunk.pretrained_cfg, "every twin would copy it"
    assert all(p.data_ptr() != given[name].data_ptr() for name, p in trunk.named_parameters())
