"""image_weights.py: layouts of DINOv2 and of transformers, and files that are wrong."""

import os
import pickle
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from small_vits import ONES, SMALL, SWIGLU, WIDTH, build, read, same_answer, written
from timm.layers import resample_abs_pos_embed

from model import image_weights
from model.image_encoder import ImageEncoder
from model.image_weights import Published


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, published in SMALL.items():
        monkeypatch.setitem(image_weights.PUBLISHED, f"test/{name}", published)


# ---- DINOv2's own layout, and that of the library transformers


def in_dinov2(state):
    """As DINOv2's authors save a ViT: mask token, w12 and w3, a class token whose position is in the table."""
    file = {"mask_token": torch.zeros(1, 64)}
    for name, tensor in state.items():
        file[name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")] = tensor
    if "reg_token" in file:
        first = torch.randn(1, 1, 64)
        file["register_tokens"] = file.pop("reg_token")
        file["pos_embed"] = torch.cat([first, file["pos_embed"]], dim=1)
        file["cls_token"] = file["cls_token"] - first
    return file


def test_dinov2s_own_file_with_registers_and_gated_mlp(tmp_path, monkeypatch):
    monkeypatch.setitem(
        image_weights.PUBLISHED, "test/dinov2", Published("test_vit", SMALL["registers apart"].arguments, swiglu=True)
    )
    reference = build("registers apart", **SWIGLU)
    file = {f"backbone.{name}": tensor for name, tensor in in_dinov2(reference.state_dict()).items()}
    file |= {"dino_head.mlp.0.weight": ONES}
    encoder = ImageEncoder("hf-hub:test/dinov2", 160, WIDTH, written(tmp_path / "w.pth", {"teacher": file}))
    same_answer(encoder, reference, 160)
    assert set(encoder.weights_report.skipped) == {"backbone.mask_token", "dino_head.mlp.0.weight"}


def in_transformers(state, norms, mlp):
    """timm's tensors as transformers names them: the renaming of its own conversion scripts, turned round."""
    file = {}
    for name, tensor in state.items():
        block = re.match(r"blocks\.(\d+)\.(.*)\.(\w+)$", name)
        if not block:
            name = re.sub(r"^norm\.", "layernorm.", name)
            name = re.sub(r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection.", name)
            name = {"pos_embed": "embeddings.position_embeddings"}.get(name, name)
            name = f"embeddings.{name}" if name in ("cls_token", "mask_token", "register_tokens") else name
            file[name] = tensor
            continue
        number, inner, kind = block.groups()
        layer = f"encoder.layer.{number}."
        if inner == "attn.qkv":
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                file[f"{layer}attention.attention.{part}.{kind}"] = third.clone()
            continue
        theirs = {"attn.proj": "attention.output.dense", "norm1": norms[0], "norm2": norms[1]} | mlp
        inner, kind = (f"layer_scale{inner[-1]}", "lambda1") if inner.startswith("ls") else (theirs[inner], kind)
        file[f"{layer}{inner}.{kind}"] = tensor
    return file


VIT = (("layernorm_before", "layernorm_after"), {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"})
DINOV2 = (("norm1", "norm2"), {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"})
GATED = (("norm1", "norm2"), {"mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"})


@pytest.mark.parametrize("side", [160, 112])
@pytest.mark.parametrize(
    ("arguments", "layout", "prefix", "swiglu"),
    [
        ({}, VIT, "vit.", False),
        ({"init_values": 1.0}, DINOV2, "", False),
        ({"reg_tokens": 4, "no_embed_class": True, "init_values": 1.0}, GATED, "dinov2.", True),
    ],
    ids=["ViT (Phikon)", "DINOv2 (Phikon-v2)", "DINOv2 with registers, gated"],
)
def test_files_of_the_library_transformers(tmp_path, monkeypatch, arguments, layout, prefix, swiglu, side):
    published = Published("test_vit", arguments, swiglu=swiglu)
    monkeypatch.setitem(image_weights.PUBLISHED, "test/theirs", published)
    monkeypatch.setitem(SMALL, "theirs", published)
    reference = build("theirs")
    state = reference.state_dict()
    plain = in_dinov2(state) if swiglu else state | {"mask_token": torch.zeros(1, 64)}
    file = {prefix + name: tensor for name, tensor in in_transformers(plain, *layout).items()}
    assert not set(file) & set(state)
    save_file({**file, "classifier.weight": ONES}, tmp_path / "model.safetensors")
    encoder = ImageEncoder("hf-hub:test/theirs", side, WIDTH, read(tmp_path / "model.safetensors"))
    sized = build("theirs", side)
    n_prefix = 0 if swiglu else 1
    grid = [side // 16, side // 16]
    sized.load_state_dict(
        state | {"pos_embed": resample_abs_pos_embed(state["pos_embed"], grid, num_prefix_tokens=n_prefix)}
    )
    same_answer(encoder, sized, side)
    assert "classifier.weight" in encoder.weights_report.skipped


# ---- wrong files


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


WRONG = {
    "another ViT": ("w.pth", lambda s: timm.create_model("test_vit4").state_dict(), r"\d+ missing .*of another shape"),
    "a network": ("w.pth", lambda s: timm.create_model("test_resnet").state_dict(), r"\d+ missing \(.*\d+ unknown"),
    "other sizes": (
        "w.pth",
        lambda s: s | {"norm.weight": ONES},
        r"1 of another shape \(norm.weight \[3\], not \[64\]",
    ),
    "one missing": ("w.pth", lambda s: {k: s[k] for k in s if k != "norm.bias"}, r"1 missing \(norm.bias\)"),
    "one too many": ("w.pth", lambda s: s | {"extra": ONES}, r"1 unknown \(extra\)"),
    "other patches": (
        "w.pth",
        lambda s: s | {"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)},
        r"patch_embed.proj.weight \[64, 3, 8, 8\], not \[64, 3, 16, 16\]",
    ),
    "a grid that is no square": ("w.pth", lambda s: s | {"pos_embed": torch.zeros(1, 14, 64)}, "expected weights of"),
    "other names": ("w.pth", lambda s: {f"{k}.raw": v for k, v in s.items()}, r"\d+ missing .*unknown"),
    "an optimizer alone": (
        "w.pth",
        lambda s: {"optimizer": {"state": {0: {"exp_avg": ONES}}}},
        "expected named tensors",
    ),
    "two halves": (
        "w.pth",
        lambda s: {"a": dict(list(s.items())[::2]), "b": dict(list(s.items())[1::2])},
        r"in \S+w.pth \(a\): \d+ missing",
    ),
    "heads alone": ("w.pth", lambda s: {"head.weight": ONES}, "1 tensors, none of a trunk"),
    "no names": ("w.pth", lambda s: [ONES], "expected named tensors"),
    "no tensors": ("w.pth", lambda s: {"model": {}}, "expected named tensors"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_named_in_one_line_with_what_is_wrong(tmp_path, kind):
    name, spoil, expected = WRONG[kind]
    torch.save(spoil(build("class").state_dict()), tmp_path / name)
    one_line(tmp_path / name, expected)


def one_line(path, expected):
    with pytest.raises(ValueError, match=expected) as error:
        ImageEncoder("test_vit", 160, WIDTH, read(path))
    line = str(error.value)
    assert "\n" not in line and len(line) < 500 and line.startswith("--image_weights") and str(path) in line
    return line


def test_torn_empty_and_foreign_files_are_named_in_one_line(tmp_path):
    torch.save(build("class").state_dict(), tmp_path / "whole.pth")
    save_file(build("class").state_dict(), tmp_path / "whole.safetensors")
    for suffix in ("pth", "safetensors"):
        path, whole = tmp_path / f"w.{suffix}", (tmp_path / f"whole.{suffix}").read_bytes()
        for content, expected in (
            (b"", "found an empty file"),
            (whole[:1000], "is corrupt"),
            (whole[:-50], "is corrupt"),
        ):
            path.write_bytes(content)
            one_line(path, expected)
        path.write_text("<html>not found</html>")
        one_line(path, "found a corrupt or another file")


def test_code_in_a_file_is_named_and_never_run(tmp_path):
    state, path = build("class").state_dict(), tmp_path / "w.pth"
    torch.save({"model": state, "bomb": Bomb(tmp_path / "ran")}, path)
    line = one_line(path, r"expected tensors and plain values, found code \(posix.mkdir\)")
    assert "save the tensors alone" in line and "weights_only" not in line, "torch's own advice is to run it"
    torch.save(timm.create_model("test_vit"), path)
    one_line(path, r"expected tensors .* found code \(timm.models.vision_transformer.VisionTransformer\)")
    path.write_bytes(pickle.dumps({"model": Bomb(tmp_path / "ran")}))
    one_line(path, "a corrupt or another file|found code")
    assert not (tmp_path / "ran").exists()
