"""Both training loops, evaluations and prediction on fake CUDA: no mixed devices, fp32 where it matters, few waits."""

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, accelerator, fake_cuda, with_autocast
from small_stage_one import BATCH, GENES, SIDE, TARGETS, stage_one
from tiny_runs import Work

import get_accuracy_image
import train_decoder
import train_mymodel
from model import losses
from model.stage_two import StageTwo, StageTwoSizes
from utils.evaluation.gallery import top_k
from utils.features import cache, dataset, neighbourhoods
from utils.files.arrays import ArrayStore
from utils.training import loop, targets
from utils.training.trainer import Trainer

EPOCH_STEPS = 4
pytestmark = pytest.mark.parametrize("precision", ["bf16", "fp32"])


def work_of(prepared, folder):
    return Work(prepared.data, prepared.tiles, prepared.panels, folder)


def trainer_of(model, trained_part, settings, kind, order, precision):
    optimizer = loop.make_optimizer(trained_part.parameters(), settings)
    schedule = loop.schedule(optimizer, len(order) * settings.Epoch, settings)
    device = accelerator(precision, [p for p in trained_part.parameters() if p.requires_grad])
    return Trainer(settings, kind, {}, device, model, optimizer, schedule, order.n_spots)


def run_stage_one(prepared, folder, monkeypatch, precision, validate=False):
    """An epoch of four batches, and its validation; the notes of each."""
    settings = train_mymodel.parse_args(work_of(prepared, folder).argv("train_mymodel", "--queue_size", 40))
    slices, _ = train_mymodel.load_data(settings)
    store = ArrayStore(settings.memory, settings.out)
    bins, train_bins = train_mymodel.tokens_of(slices, store)
    components = targets.components(slices, settings.components)
    extra = {"bins": train_bins, "expression": targets.train_scores(slices, components, store)}
    model = train_mymodel.build_model(slices, train_bins, len(components.weights), settings)
    spots = dataset.spots_of(slices, "train")
    order = loop.EpochOrder(len(spots), settings.batch_size, settings.seed)
    assert len(order) == EPOCH_STEPS
    with fake_cuda(monkeypatch) as notes:
        model.to(CUDA)
        trainer = trainer_of(model, model, settings, "stage_one", order, precision)
        replica = with_autocast(model, precision)
        with dataset.loader(dataset.TileBatches(slices, spots, extra), order, 0) as loader:
            notes.waits.clear()
            row = train_mymodel.train_one_epoch(trainer, model, replica, loader, order, settings)
        trained = list(notes.waits)
        assert {"contrast_loss", "matching_chance", "loss"} < row.keys()
        if validate:
            notes.waits.clear()
            train_mymodel.validate(model, slices, bins, trainer.accelerator, settings)
    return trained, notes


def run_stage_two(trained, folder, monkeypatch, precision):
    """An epoch of four steps on features of zeros, and its validation."""
    work = work_of(trained, folder)
    settings = train_decoder.parse_args([*work.argv("train_decoder"), "--encoder", str(trained.encoder)])
    encoder = torch.load(trained.encoder, weights_only=True)
    slices, _ = train_decoder.load_slices(encoder, settings)
    store = ArrayStore(settings.memory, settings.out)
    target, mean, _ = targets.standardised(slices, settings.target, store)
    places = dataset.spots_of(slices, "train")
    model = train_decoder.build_model(encoder, len(mean), len(places), settings)
    shape = model.n_vectors + 16, model.sizes.width
    features = [np.zeros((len(slice_.barcodes), *shape), np.float16) for slice_ in slices]
    moments = neighbourhoods.moments(features, model.n_vectors)
    order = loop.EpochOrder(len(places), settings.batch_size, settings.seed)
    assert len(order) == EPOCH_STEPS
    with fake_cuda(monkeypatch) as notes:
        model.to(CUDA)
        trainer = trainer_of(model, model.decoder, settings, "stage_two", order, precision)
        around = model.sizes.context, model.sizes.bandwidths
        bank = neighbourhoods.FeatureBank(slices, features, moments, *around, CUDA, store)
        train_spots = bank.first[places[:, 0]] + places[:, 1]
        data = train_decoder.Data(slices, bank, target, train_spots, targets.validation_residuals(slices))
        notes.waits.clear()
        train_decoder.train_one_epoch(trainer, model, data, order, settings)
        waits = list(notes.waits)
        notes.waits.clear()
        train_decoder.validate(model, data, trainer.accelerator, settings)
    return waits, notes


@pytest.mark.parametrize(("every", "waits"), [(1, 4), (2, 2), (20, 1)])
def test_stage_one_waits_for_the_device_once_per_interval(prepared, tmp_path, monkeypatch, precision, every, waits):
    monkeypatch.setitem(loop.READ_EVERY, "cuda", every)
    trained, notes = run_stage_one(prepared, tmp_path, monkeypatch, precision, validate=every == 20)
    assert trained == ["copy from cuda to cpu"] * waits
    assert not notes.wrong
    if every == 20:  # vectors of images and genes, a batch of 16 of the 70 spots at a time
        assert notes.waits == ["copy from cuda to cpu"] * 2 * 5


@pytest.mark.parametrize(("every", "waits"), [(2, 2), (20, 1)])
def test_stage_two_waits_for_the_device_once_per_interval(trained, tmp_path, monkeypatch, precision, every, waits):
    monkeypatch.setitem(loop.READ_EVERY, "cuda", every)
    waited, notes = run_stage_two(trained, tmp_path, monkeypatch, precision)
    assert waited == ["copy from cuda to cpu"] * waits
    assert not notes.wrong
    assert notes.waits == ["copy from cuda to cpu"] * 5  # predictions of a batch


def test_a_wait_too_many_is_seen(prepared, tmp_path, monkeypatch, precision):
    after_step = train_mymodel.figures_of

    def reading(out):
        assert out.loss.item() >= 0
        return after_step(out)

    monkeypatch.setattr(train_mymodel, "figures_of", reading)
    waited, _ = run_stage_one(prepared, tmp_path, monkeypatch, precision)
    assert waited.count("_local_scalar_dense") == EPOCH_STEPS


@pytest.mark.parametrize("queue_size", [0, 10])
def test_a_tensor_on_the_wrong_device_is_seen(monkeypatch, precision, queue_size):
    model = stage_one(queue_size=queue_size)
    with fake_cuda(monkeypatch):
        replica = with_autocast(model.to(CUDA), precision)
        batch = batch_on_cuda()
        out = replica(**batch, alpha=0.4, generator=None)
        model.after_step(out.pair_m)
        model.fusion.norm_image.weight.data = torch.ones(model.sizes.width)
        with pytest.raises(RuntimeError, match="device"):
            replica(**batch, alpha=0.4, generator=None)


def batch_on_cuda():
    return {
        "tiles": torch.rand(BATCH, 3, SIDE, SIDE, device=CUDA),
        "bins": torch.randint(0, 6, (BATCH, GENES), dtype=torch.uint8, device=CUDA),
        "spots": torch.arange(BATCH, device=CUDA),
        "expression": torch.randn(BATCH, TARGETS, device=CUDA),
    }


def test_losses_are_fp32_and_the_queue_waits_for_nothing(monkeypatch, precision):
    model = stage_one()
    with fake_cuda(monkeypatch) as notes:
        replica = with_autocast(model.to(CUDA), precision)
        for _ in range(3):
            out = replica(**batch_on_cuda(), alpha=0.4, generator=None, expression_weight=1.0)
            model.after_step(out.pair_m)
    assert {figure.dtype for figure in train_mymodel.figures_of(out).values()} == {torch.float32}
    assert {x.dtype for x in out.pair_m[:2]} == {model.queue.image.dtype} == {torch.float32}
    assert model.queue.n_filled == 10 and int(model.n_steps) == 3
    assert not notes.waits and not notes.wrong
    assert {"_log_softmax", "_softmax", "native_layer_norm", "exp_"} & notes.names


def test_retrieval_is_scored_without_waits_within_a_batch(monkeypatch, precision):
    model = stage_one().eval()
    candidates = np.tile(np.arange(BATCH), (BATCH, 1))
    with fake_cuda(monkeypatch) as notes:
        model.to(CUDA)
        device, batch = accelerator(precision), batch_on_cuda()
        with torch.no_grad(), device.autocast():
            image, image_tokens = model.encode_images(cache.to_float(torch.zeros(BATCH, 40, 40, 3, device=CUDA), SIDE))
            gene, gene_tokens = model.encode_genes(batch["bins"])
        assert image.dtype == gene.dtype == torch.float32
        assert not notes.waits
        encoded = cache.EncodedPairs(np.zeros((BATCH, 32)), np.zeros((BATCH, 32)), image_tokens.cpu(), gene_tokens.cpu())
        notes.waits.clear()
        get_accuracy_image.match_scores(model, encoded, candidates, device)
        assert notes.waits == ["copy from cuda to cpu"]
        scores, rows = top_k(image, gene, 3)
        assert scores.device.type == rows.device.type == "cuda"
    assert not notes.wrong


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_features_and_predictions_of_a_slide(monkeypatch, precision, name):
    model = StageTwo(StageTwoSizes(5, name, 64, width=32, decoder_layers=1, decoder_width=16, landmarks=4, tta=2)).eval()
    with fake_cuda(monkeypatch) as notes:
        model.to(CUDA)
        device = accelerator(precision)
        with torch.no_grad(), device.autocast():
            features = model.encode(torch.rand(3, 3, 64, 64, device=CUDA)).float()
            width = model.n_vectors * 32
            around = {
                "context": torch.zeros(3, 18, width, device=CUDA),
                "offsets": torch.zeros(3, 18, 2, device=CUDA),
                "present": torch.ones(3, 18, dtype=torch.bool, device=CUDA),
                "smoothed": torch.zeros(3, 3, width, device=CUDA),
            }
            predicted = model.predict(model.split(features) | around)
            loss = losses.expression_loss(predicted, torch.zeros(3, 5, device=CUDA))
    assert predicted.dtype == loss.dtype == torch.float32 and predicted.shape == (3, 5)
    assert not notes.waits and not notes.wrong
