"""Both training loops, evaluations and prediction on fake CUDA: no mixed devices, fp32 where it matters, few waits."""

import numpy as np
import pytest
import torch
from fake_cuda import CUDA, accelerator, fake_cuda, with_autocast
from small_stage_one import BATCH, GENES, SIDE, TARGETS, stage_one
from tiny_runs import Work
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError

import get_accuracy_image
import train_decoder
import train_mymodel
from model import losses
from model.momentum import FeatureQueue
from model.stage_two import StageTwo, StageTwoSizes
from utils.evaluation.gallery import top_k
from utils.features import cache, dataset, neighbourhoods
from utils.files.arrays import ArrayStore
from utils.training import loop, targets
from utils.training.trainer import Trainer

EPOCH_STEPS = 2  # of 32 of the 70 train spots
BATCHES = ("--batch_size", 32)
EVERY = {"bf16": 20, "fp32": 1}  # steps between two readings: once at the end of the epoch, or after each step
precisions = pytest.mark.parametrize("precision", ["bf16", "fp32"])


def work_of(prepared, folder):
    return Work(prepared.data, prepared.tiles, prepared.panels, folder)


def trainer_of(model, trained_part, settings, kind, order, precision):
    optimizer = loop.make_optimizer(trained_part.parameters(), settings)
    schedule = loop.schedule(optimizer, len(order) * settings.Epoch, settings)
    device = accelerator(precision, [p for p in trained_part.parameters() if p.requires_grad])
    return Trainer(settings, kind, {}, device, model, optimizer, schedule, order.n_spots)


def run_stage_one(prepared, folder, monkeypatch, precision):
    """An epoch of two batches, and its validation; what was waited for in each."""
    settings = train_mymodel.parse_args(work_of(prepared, folder).argv("train_mymodel", *BATCHES))
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
        notes.waits.clear()
        train_mymodel.validate(model, slices, bins, trainer.accelerator, settings)
    assert not notes.wrong
    return trained, notes.waits


def run_stage_two(trained, folder, monkeypatch, precision):
    """An epoch of two steps on features of zeros, and its validation; what was waited for in each."""
    work = work_of(trained, folder)
    settings = train_decoder.parse_args([*work.argv("train_decoder", *BATCHES), "--encoder", str(trained.encoder)])
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
        train_decoder.validate(model, data, train_decoder.predictor(data, trainer.accelerator, settings))
    assert not notes.wrong
    return waits, notes.waits


@precisions
def test_stage_one_waits_for_the_device_once_per_interval(prepared, tmp_path, monkeypatch, precision):
    monkeypatch.setitem(loop.READ_EVERY, "cuda", EVERY[precision])
    trained, validated = run_stage_one(prepared, tmp_path, monkeypatch, precision)
    assert trained == ["copy from cuda to cpu"] * -(-EPOCH_STEPS // EVERY[precision])
    assert validated == ["copy from cuda to cpu"] * 2 * 3  # vectors of images and genes, 32 of the 70 spots at a time


@precisions
def test_stage_two_waits_for_the_device_once_per_interval(trained, tmp_path, monkeypatch, precision):
    monkeypatch.setitem(loop.READ_EVERY, "cuda", EVERY[precision])
    waited, validated = run_stage_two(trained, tmp_path, monkeypatch, precision)
    assert waited == ["copy from cuda to cpu"] * -(-EPOCH_STEPS // EVERY[precision])
    assert validated == ["copy from cuda to cpu"] * (3 + 2)  # predictions of a batch; mean and deviation of targets


def test_waits_and_wrong_types_are_noted(monkeypatch):
    with fake_cuda(monkeypatch) as notes:
        x, few = torch.ones(3, device=CUDA), torch.zeros(3, dtype=torch.bool, device=CUDA)
        for waiting in (
            x[0].item,
            x.cpu,
            lambda: torch.zeros(2).to(CUDA),
            lambda: x.to("cpu", non_blocking=True),
            lambda: x.index_put((few,), x[0]),
            lambda: x[torch.zeros(2, dtype=torch.long)],
            lambda: x.copy_(torch.ones(3)),
            lambda: bool(few.any()),
            lambda: torch.multinomial(x, 1),
        ):
            before = len(notes.waits)
            waiting()
            assert len(notes.waits) == before + 1
        torch.zeros(2).to(CUDA, non_blocking=True)
        torch.ones(2)[0].item()
        assert len(notes.waits) == 9 and not notes.wrong
        x.double()
        x.bfloat16().exp()
        assert notes.wrong == ["_to_copy in torch.float64", "exp in torch.bfloat16"]


def test_a_tensor_on_the_wrong_device_is_seen(monkeypatch):
    model = stage_one()
    with fake_cuda(monkeypatch):
        replica = with_autocast(model.to(CUDA), "bf16")
        replica(**batch_on_cuda(), alpha=0.4, generator=None)
        model.fusion.norm_image.weight = torch.nn.Parameter(torch.ones(model.sizes.width))
        with pytest.raises(FakeTensorDeviceMismatchError):
            replica(**batch_on_cuda(), alpha=0.4, generator=None)


def test_a_queue_that_must_be_asked_on_the_device_is_seen(monkeypatch):
    monkeypatch.setattr(FeatureQueue, "ON_HOST", ())
    model = stage_one()
    with fake_cuda(monkeypatch) as notes:
        replica = with_autocast(model.to(CUDA), "bf16")
        notes.waits.clear()
        replica(**batch_on_cuda(), alpha=0.4, generator=None)
    assert notes.waits


def batch_on_cuda():
    return {
        "tiles": torch.rand(BATCH, 3, SIDE, SIDE, device=CUDA),
        "bins": torch.randint(0, 6, (BATCH, GENES), dtype=torch.uint8, device=CUDA),
        "spots": torch.arange(BATCH, device=CUDA),
        "expression": torch.randn(BATCH, TARGETS, device=CUDA),
    }


@precisions
def test_losses_are_fp32_and_the_queue_waits_for_nothing(monkeypatch, precision):
    model = stage_one()
    with fake_cuda(monkeypatch) as notes:
        replica = with_autocast(model.to(CUDA), precision)
        notes.waits.clear()
        for _ in range(3):
            out = replica(**batch_on_cuda(), alpha=0.4, generator=None, expression_weight=1.0)
            model.after_step(out.pair_m)
    assert {figure.dtype for figure in train_mymodel.figures_of(out).values()} == {torch.float32}
    assert {x.dtype for x in out.pair_m[:2]} == {model.queue.image.dtype} == {torch.float32}
    assert not notes.waits and not notes.wrong
    assert {"_log_softmax", "_softmax", "native_layer_norm", "exp_"} & notes.names


@precisions
def test_retrieval_is_scored_without_waits_within_a_batch(monkeypatch, precision):
    model = stage_one().eval()
    candidates = np.tile(np.arange(BATCH), (BATCH, 1))
    with fake_cuda(monkeypatch) as notes:
        model.to(CUDA)
        notes.waits.clear()
        device, batch = accelerator(precision), batch_on_cuda()
        with torch.no_grad(), device.autocast():
            image, image_tokens = model.encode_images(cache.to_float(torch.zeros(BATCH, 40, 40, 3, device=CUDA), SIDE))
            gene, gene_tokens = model.encode_genes(batch["bins"])
        assert image.dtype == gene.dtype == torch.float32
        assert not notes.waits
        encoded = cache.EncodedPairs(
            np.zeros((BATCH, 32)), np.zeros((BATCH, 32)), image_tokens.cpu(), gene_tokens.cpu()
        )
        notes.waits.clear()
        get_accuracy_image.match_scores(model, encoded, candidates, device)
        assert notes.waits == ["copy from cuda to cpu"]
        scores, rows = top_k(image, gene, 3)
        assert scores.device.type == rows.device.type == "cuda"
    assert not notes.wrong


@precisions
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_features_and_predictions_of_a_slide(monkeypatch, precision, name):
    model = StageTwo(
        StageTwoSizes(5, name, 64, width=32, decoder_layers=1, decoder_width=16, landmarks=4, tta=2)
    ).eval()
    with fake_cuda(monkeypatch) as notes:
        model.to(CUDA)
        notes.waits.clear()
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
