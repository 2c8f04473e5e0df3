"""image_encoder.py, image_weights.py: models of the hub, without the hub."""

import json
import re

import httpx2
import pytest
import timm
import torch
from huggingface_hub import errors
from safetensors.torch import save_file
from small_vits import SMALL, WIDTH, build, same_answer, written
from timm.layers import resample_abs_pos_embed

from model import image_weights
from model.image_encoder import ImageEncoder, plan


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, published in SMALL.items():
        monkeypatch.setitem(image_weights.PUBLISHED, f"test/{name}", published)


# ---- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the place of the hub's one repository."""
    folder = tmp_path / "hub"
    folder.mkdir()

    def fetch(repo_id, filename, **_):
        if not (folder / filename).exists():
            raise errors.EntryNotFoundError(f"{filename} not found in {repo_id}")
        return str(folder / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", fetch)
    return folder


def config(**more):
    pretrained = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "interpolation": "bilinear"}
    pretrained |= {"input_size": [3, 160, 160], "num_classes": 0, "fixed_input_size": True}
    return {"architecture": "test_vit", "pretrained_cfg": pretrained, **more}


@pytest.mark.parametrize("prefix", ["hf-hub:", "hf_hub:"])
@pytest.mark.parametrize("side", [160, 112])
def test_a_model_of_the_hub_is_built_and_normalised_by_its_config(hub, prefix, side):
    arguments = {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5, "img_size": 160, "global_pool": ""}
    (hub / "config.json").write_text(json.dumps(config(model_args=arguments | {"num_classes": 0})))
    state = build("registers apart").state_dict()
    torch.save(state, hub / "pytorch_model.bin")
    encoder = ImageEncoder(f"{prefix}some/model", side, WIDTH, "timm")
    assert encoder.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert encoder.std.flatten().tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert encoder.interpolation == "bilinear"
    sized, grid = build("registers apart", side), [side // 16, side // 16]
    sized.load_state_dict(state | {"pos_embed": resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=0)})
    same_answer(encoder, sized, side)
    assert encoder.weights_report.source == "some/model"
    again = ImageEncoder(f"{prefix}some/model", side, WIDTH)  # as stage two builds it, before its checkpoint is read
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in encoder.state_dict().items()}


def test_a_published_encoder_needs_its_weights_alone(hub):
    state = build("class and registers").state_dict()
    save_file(state, hub / "model.safetensors")
    encoder = ImageEncoder("hf-hub:Test/Class and Registers@main", 160, WIDTH, "timm")
    same_answer(encoder, build("class and registers"), 160)
    assert encoder.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_a_config_of_another_library_is_refused_with_a_way_out(hub):
    for content in ({"model_type": "dinov2"}, config() | {"architecture": "gigapath_tile_enc"}):
        (hub / "config.json").write_text(json.dumps(content))
        with pytest.raises(
            ValueError, match=r"--image_encoder hf-hub:some/model: .*names a timm model, found .*--image_weights"
        ):
            ImageEncoder("hf-hub:some/model", 160, WIDTH)


def answer(status):
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/MahmoodLab/UNI"))


FAILURES = {
    "gated": (
        lambda: errors.GatedRepoError("403 Client Error.\nCannot access gated repo", response=answer(403)),
        r"is gated.*https://huggingface.co/(\S+), then `hf auth login` \(or set HF_TOKEN\).*--image_weights FILE",
    ),
    "no token": (
        lambda: errors.HfHubHTTPError("401", response=answer(401)),
        "one that is gated or does not exist; .*hf auth login",
    ),
    "no such model": (
        lambda: errors.RepositoryNotFoundError("404 Client Error.", response=answer(404)),
        r"expected a model at https://huggingface.co/\S+, found none",
    ),
    "no network": (
        lambda: errors.LocalEntryNotFoundError("cannot\nconnect"),
        r"no way to download them \(cannot connect",
    ),
}


@pytest.mark.parametrize("why", FAILURES)
@pytest.mark.parametrize("name", ["MahmoodLab/UNI", "some/model"])
def test_what_the_hub_refuses_is_one_line_with_what_to_do(monkeypatch, why, name):
    raised, expected = FAILURES[why]

    def refuse(*args, **kwargs):
        raise raised()

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", refuse)
    monkeypatch.setitem(image_weights.PUBLISHED, "mahmoodlab/uni", SMALL["class"])
    with pytest.raises(ValueError, match=expected) as error:
        ImageEncoder(f"hf-hub:{name}", 160, WIDTH, "timm")
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_gated_file_at_hand_needs_no_hub(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", unreachable)
    given = written(tmp_path / "w.pth", build("class").state_dict())
    same_answer(ImageEncoder("hf-hub:test/class", 160, WIDTH, given), build("class"), 160)


def test_a_model_for_which_timm_has_no_weights_says_so():
    name = next(name for name in timm.list_models("resnet*") if not timm.get_pretrained_cfg(name).has_weights)
    with pytest.raises(ValueError, match=rf"--image_weights timm: .*{name}.*; give a file, or none"):
        ImageEncoder(name, 64, WIDTH, "timm")


def test_a_name_of_the_hub_without_its_prefix_is_understood():
    with pytest.raises(ValueError, match="for a model of the hub give hf-hub:MahmoodLab/UNI"):
        ImageEncoder("MahmoodLab/UNI", 224, WIDTH)


# width, side of a patch, tokens before the grid, blocks, millions of parameters: as published
PATHOLOGY = {
    "mahmoodlab/uni": (1024, 16, 1, 24, 303),
    "mahmoodlab/uni2-h": (1536, 14, 9, 24, 681),
    "mahmoodlab/conch": (768, 16, 1, 12, 86),
    "paige-ai/virchow2": (1280, 14, 5, 32, 631),
    "bioptimus/h-optimus-0": (1536, 14, 5, 40, 1135),
    "bioptimus/h0-mini": (768, 14, 5, 12, 86),
    "prov-gigapath/prov-gigapath": (1536, 16, 1, 40, 1135),
    "owkin/phikon-v2": (1024, 16, 1, 24, 303),
}


@pytest.mark.parametrize("name", PATHOLOGY)
def test_pathology_encoders_are_built_as_published(name):
    width, patch, n_prefix, n_blocks, millions = PATHOLOGY[name]
    with torch.device("meta"):  # sizes alone: the largest would take 5 GB
        trunk = plan(f"hf-hub:{name}", 224).build()
    assert (trunk.head_hidden_size, trunk.patch_embed.patch_size) == (width, (patch, patch))
    assert (trunk.num_prefix_tokens, len(trunk.blocks)) == (n_prefix, n_blocks)
    assert sum(p.numel() for p in trunk.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_list_of_encoders_in_the_docs_is_the_one_in_the_code(request):
    text = (request.config.rootpath / "docs" / "encoders.md").read_text(encoding="utf-8")
    listed = {name.lower(): int(width) for name, width in re.findall(r"^\| .*`hf-hub:(\S+)` \| (\d+)", text, re.M)}
    published = {name for name in image_weights.PUBLISHED if not name.startswith("test/")}
    assert set(listed) == published == set(PATHOLOGY)
    assert all(width == PATHOLOGY[name][0] for name, width in listed.items())
