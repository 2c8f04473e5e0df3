"""benchmarks/plain.py, speed_data.py: the plain references compute the same as ours, so times are comparable."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from small_stage_one import batch_of, stage_one

import get_accuracy_image
from benchmarks import plain, speed_data
from model.gene_encoder import GeneEncoder
from model.stage_two import StageTwo, StageTwoSizes
from utils.features.cache import EncodedPairs
from utils.training import augment


def gradients(loss, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def test_the_gene_encoder_and_its_gradients():
    torch.manual_seed(0)
    ours = GeneEncoder(30, depth=2, gene_width=24, heads=2, n_tokens=4, width=32)
    bins = torch.randint(0, 6, (3, 30))
    weight = torch.randn(3, 32)
    found, expected = ours(bins), plain.plain_gene_encoder(ours)(bins)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
    for x, y in zip(
        gradients((found[0] * weight).sum(), ours), gradients((expected[0] * weight).sum(), ours), strict=True
    ):
        if y is not None:
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_step_without_distillation():
    """With alpha 0 and no queue, the loss of stage one is the plain one."""
    model, batch = stage_one(queue_size=0, n_components=0, momentum_encoders=False), batch_of()
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    found = model(batch["tiles"], batch["bins"], batch["spots"], 0.0, draws[0]).loss
    expected = plain.stage_one_loss(plain.plain_model(model), batch["tiles"], batch["bins"], draws[1])
    torch.testing.assert_close(found, expected)
    for x, y in zip(gradients(found, model), gradients(expected, model), strict=True):
        if x is not None and y is not None:  # the plain trunk is a copy, with parameters of its own
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)


def test_plain_attention_of_the_trunk_is_written_out():
    model = stage_one()
    fused = [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")]
    unfused = [m.fused_attn for m in plain.plain_model(model).image_encoder.modules() if hasattr(m, "fused_attn")]
    assert any(fused) and unfused and not any(unfused)
    assert [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")] == fused, "the model keeps its own"


def test_retrieval_with_each_candidate_encoded_anew():
    model, batch = stage_one().eval(), batch_of()
    candidates = np.array([[1, 0, 2], [1, 4, 5], [0, 3, 2], [3, 4, 1], [4, 0, 5], [2, 1, 5]])
    with torch.no_grad():
        image, image_tokens = model.encode_images(batch["tiles"])
        gene, gene_tokens = model.encode_genes(batch["bins"])
    encoded = EncodedPairs(image.numpy(), gene.numpy(), image_tokens, gene_tokens)
    here = SimpleNamespace(device=torch.device("cpu"), autocast=torch.no_grad)
    found = get_accuracy_image.gallery_scores(model, encoded, np.zeros(6), np.zeros(6), candidates, 1.0, here)
    expected = plain.retrieval_scores(
        plain.plain_model(model), batch["tiles"], batch["bins"], torch.from_numpy(candidates)
    )
    for row, scores in expected.items():
        np.testing.assert_allclose(found[row], scores.numpy(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def stage_two():
    torch.manual_seed(0)
    model = StageTwo(StageTwoSizes(7, "test_vit", 32, width=32, decoder_layers=1, decoder_width=16, context=4))
    around = {"context": torch.randn(5, 4, 32 * model.n_vectors), "offsets": torch.randn(5, 4, 2)}
    around |= {"present": torch.ones(5, 4, dtype=torch.bool), "smoothed": torch.randn(5, 3, 32 * model.n_vectors)}
    model.decoder.ridge.set_landmarks(torch.randn(2000, 4, 32 * model.n_vectors), 4)
    torch.nn.init.normal_(model.decoder.ridge.linear.weight)
    return model, torch.rand(5, 3, 32, 32), around


@torch.no_grad()
def test_prediction_of_one_image_at_a_time(stage_two):
    model, tiles, around = stage_two
    torch.nn.init.normal_(model.decoder.read_out.weight)
    model.eval()
    features = model.encode(tiles)
    found = model.predict(model.split(features) | around)
    torch.testing.assert_close(found, plain.predict(plain.plain_model(model), tiles, around), rtol=1e-4, atol=1e-5)


def test_a_step_of_stage_two_moves_the_decoder_alone(stage_two):
    model, tiles, around = stage_two
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1e-2)
    plain.stage_two_step(plain.plain_model(model), tiles, around, torch.randn(5, 7), optimizer)
    moved = {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"decoder"}


def test_augmentation_of_single_files(tmp_path, rng):
    paths, tiles = [], []
    for i in range(24):
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        paths.append(tmp_path / f"{i}.jpeg")
        coarse.resize((40, 40)).save(paths[-1])
        tiles.append(np.asarray(Image.open(paths[-1])))
    files = speed_data.TileFiles(paths, seed=5)
    expected = torch.stack([files[i] for i in range(len(files))])
    found = augment.augment(torch.from_numpy(np.stack(tiles)), np.arange(24), 5, 0, 40)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_published_tiles(tmp_path, rng):
    image = rng.integers(0, 255, (90, 80, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "hires.png")
    speed_data.plain_tiles(tmp_path / "hires.png", np.array([[30.0, 40.0], [41.0, 52.0]]), tmp_path / "tiles")
    for spot, (x, y) in enumerate(((30, 40), (41, 52))):
        Image.fromarray(image[y - 20 : y + 20, x - 20 : x + 20]).save(tmp_path / "expected.jpeg")
        assert (tmp_path / "tiles" / f"{spot}.jpeg").read_bytes() == (tmp_path / "expected.jpeg").read_bytes()
