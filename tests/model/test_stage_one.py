"""stage_one.py: losses, gradients and momentum encoders of whole steps, on a tiny model; the published size is slow."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from small_stage_one import BATCH, batch_of, stage_one, step_of

from model.contrastive import Pair
from model.momentum import momentum_at
from model.stage_one import StageOne, StageOneSizes
from model.tuning import tune


def test_losses_are_finite_scalars_that_add_up():
    found = step_of(stage_one(), batch_of(), expression_weight=0.5)
    for part in (found.loss, found.contrast, found.matching, found.expression, found.matching_auc):
        assert part.shape == () and torch.isfinite(part)
    torch.testing.assert_close(found.loss, found.contrast + found.matching + 0.5 * found.expression)
    assert found.expression > 0.1
    assert 0 <= found.matching_auc <= 1
    torch.testing.assert_close(step_of(stage_one(), batch_of()).loss, found.contrast + found.matching)


@pytest.mark.parametrize("weight", [0.3, 2.0])
def test_the_matching_counts_by_its_weight(weight):
    found = step_of(stage_one(), batch_of(), matching_weight=weight)
    torch.testing.assert_close(found.loss, found.contrast + weight * found.matching)
    torch.testing.assert_close(found.matching, step_of(stage_one(), batch_of()).matching)


def test_expression_is_left_out_without_targets():
    model, batch = stage_one(n_components=0), batch_of()
    assert model.to_expression is None
    assert step_of(model, batch, expression_weight=1.0).expression == 0
    assert step_of(stage_one(), batch | {"expression": None}, expression_weight=1.0).expression == 0


def test_expression_loss_leaves_out_what_was_not_measured():
    model, batch = stage_one(), batch_of()
    batch["expression"][:, 2] = torch.nan
    found = step_of(model, batch, expression_weight=1.0)
    known = [0, 1, 3, 4]
    with torch.no_grad():
        vectors = model.image_encoder(batch["tiles"])[0], model.gene_encoder(batch["bins"])[0]
        errors = [
            F.mse_loss(model.to_expression(vector)[:, known], batch["expression"][:, known]) for vector in vectors
        ]
    torch.testing.assert_close(found.expression, sum(errors) / 2)


def test_expression_is_read_off_images_and_profiles_alike():
    model, batch = stage_one(), batch_of()
    both = step_of(model, batch, expression_weight=1.0).expression
    for encoder in (model.image_encoder.to_vector, model.gene_encoder.linear_path[1]):
        with torch.no_grad():
            encoder.bias += 1
        changed = step_of(model, batch, expression_weight=1.0).expression
        assert (changed - both).abs() > 1e-3
        both = changed


@pytest.mark.parametrize("tuned_block", [None, 1])
def test_every_trained_parameter_learns_and_no_momentum_encoder_does(tuned_block):
    model = stage_one()
    if tuned_block is not None:
        model.gene_encoder.freeze_trunk(tuned_block)
        model.reset_momentum_encoders()
    step_of(model, batch_of(), expression_weight=1.0).loss.backward()
    frozen = {id(p) for p in model.gene_encoder.parameters() if not p.requires_grad}
    assert (len(frozen) > 2) == (tuned_block is not None), "weight and bias of the linear path, and the trunk"
    momentum = {id(p) for module_m, _ in model.momentum_pairs() for p in module_m.parameters()}
    for name, p in model.named_parameters():
        if id(p) in momentum or id(p) in frozen:
            assert p.grad is None and not p.requires_grad, name
        else:
            assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name


def test_the_head_that_projects_tokens_is_in_the_momentum_encoder_too_and_buffers_follow():
    model = stage_one(image_encoder="resnet18")
    step_of(model, batch_of())
    before = dict(model.image_encoder_m.named_buffers())
    moved = [name for name, b in model.image_encoder.named_buffers() if not torch.equal(b, before[name])]
    assert any("running_mean" in name for name in moved)
    model.after_step(step_of(model, batch_of()).pair_m)
    assert all(torch.equal(b, before[name]) for name, b in model.image_encoder.named_buffers())


def test_after_a_step_momentum_encoders_have_moved_by_their_momentum():
    model = stage_one()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    start = [p.detach().clone() for _, module in model.momentum_pairs() for p in module.parameters()]
    for module_m, module in model.momentum_pairs():
        assert all(torch.equal(t, p) for t, p in zip(module_m.parameters(), module.parameters(), strict=True))
    found = step_of(model, batch_of(), expression_weight=1.0)
    found.loss.backward()
    optimizer.step()
    model.after_step(found.pair_m)
    momentum = momentum_at(0)
    assert int(model.n_steps) == 1
    pairs = [
        pair
        for module_m, m in model.momentum_pairs()
        for pair in zip(module_m.parameters(), m.parameters(), strict=True)
    ]
    for (slow, fast), old in zip(pairs, start, strict=True):
        torch.testing.assert_close(slow, momentum * old + (1 - momentum) * fast)
        assert (slow is fast) if not fast.requires_grad else not torch.equal(slow, fast)


@torch.no_grad()
def shake_momentum_encoders(model):
    """Make the momentum encoders differ from the encoders."""
    for module_m, _ in model.momentum_pairs():
        for p in module_m.parameters():
            p.add_(0.05 * torch.randn_like(p))


def test_momentum_features_enter_the_queue_after_the_step():
    model, batch = stage_one(), batch_of()
    shake_momentum_encoders(model)
    found = step_of(model, batch)
    assert len(model.queue.filled()[2]) == 0
    with torch.no_grad():
        image = F.normalize(model.image_encoder_m(batch["tiles"])[0], dim=1)
        gene = F.normalize(model.gene_encoder_m(batch["bins"])[0], dim=1)
    model.after_step(found.pair_m)
    for kept, expected in zip(model.queue.filled(), (image, gene, batch["spots"]), strict=True):
        torch.testing.assert_close(kept, expected)
    model.after_step(step_of(model, batch_of(seed=1)).pair_m)
    assert sorted(model.queue.filled()[2].tolist()) == [2, 3, 4, 5, *range(100, 106)]


def test_queue_rows_are_negatives_of_the_next_batch():
    model = stage_one()
    alone, chance = step_of(model, batch_of(), alpha=0.0).contrast, model.contrast_chance(BATCH)
    model.after_step(step_of(model, batch_of(seed=1)).pair_m)
    assert step_of(model, batch_of(), alpha=0.0).contrast > alone + 0.1
    assert chance == pytest.approx(math.log(6))
    assert model.contrast_chance(BATCH) == pytest.approx((math.log(6) + math.log(12)) / 2)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_contrast_of_a_step_is_that_of_both_pairs_and_the_queue(alpha):
    model = stage_one()
    shake_momentum_encoders(model)
    model.after_step(step_of(model, batch_of(seed=1)).pair_m)
    expected = model.contrast(*pairs_of(model, batch_of()), model.queue.filled(), alpha)
    torch.testing.assert_close(step_of(model, batch_of(), alpha=alpha).contrast, expected)


@torch.no_grad()
def pairs_of(model, batch):
    """Both pairs as the contrast takes them, through the encoders alone."""
    tiles, bins, spots = (batch[name] for name in ("tiles", "bins", "spots"))
    pair = Pair(model.encode_images(tiles)[0], model.encode_genes(bins)[0], spots)
    return pair, model.encode_m(tiles, bins, spots, model.frozen_parts(tiles, bins))


@pytest.mark.parametrize(("alpha", "queue"), [(0.4, 0), (0.0, 10), (0.4, 10)])
def test_momentum_features_enter_target_and_queue(alpha, queue):
    model, batch = stage_one(queue_size=queue), batch_of()
    shake_momentum_encoders(model)
    found = step_of(model, batch, alpha=alpha)
    pair, pair_m = pairs_of(model, batch)
    torch.testing.assert_close(found.pair_m, pair_m)
    assert not found.pair_m.image.requires_grad and not found.pair_m.gene.requires_grad
    torch.testing.assert_close(found.contrast, model.contrast(pair, pair_m, model.queue.filled(), alpha))


def test_without_momentum_encoders_a_step_is_that_of_the_encoders_alone():
    """Neither built, saved nor updated; the loss is that within the batch."""
    plain, full = (stage_one(queue_size=0, momentum_encoders=given) for given in (False, True))
    encoders = {name for name in full.state_dict() if "_encoder_m." not in name}
    assert set(plain.state_dict()) == encoders and encoders != set(full.state_dict())
    found = step_of(plain, batch_of(), alpha=0.0)
    pair, _ = pairs_of(full, batch_of())
    torch.testing.assert_close(found.contrast, plain.contrast(pair, None, plain.queue.filled(), 0.0))
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    plain.reset_momentum_encoders()
    plain.eval().after_step(found.pair_m)
    after = plain.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"n_steps"}


def test_what_needs_momentum_encoders_is_refused_without_them():
    with pytest.raises(ValueError, match="queue_size 10: "):
        stage_one(momentum_encoders=False)
    with pytest.raises(ValueError, match=r"alpha 0\.4: distillation needs a model with momentum_encoders"):
        step_of(stage_one(queue_size=0, momentum_encoders=False), batch_of(), alpha=0.4)


def test_several_scales_teach_in_a_step():
    model, batch = stage_one(crop_scales=(1.0, 0.5)), batch_of()
    found = step_of(model, batch, expression_weight=1.0)
    found.loss.backward()
    assert torch.isfinite(found.loss)
    for scale in model.image_encoder.to_vector.weight.grad.chunk(2, dim=1):
        assert scale.abs().max() > 0


def test_the_temperature_is_kept_in_bounds_after_the_step():
    model = stage_one()
    with torch.no_grad():
        model.contrast.logit_scale.fill_(7.0)
    model.after_step(step_of(model, batch_of()).pair_m)
    assert model.contrast.logit_scale.item() == pytest.approx(math.log(100))


def test_training_mode_leaves_momentum_encoders_in_evaluation():
    model = stage_one(image_encoder="resnet18")
    for mode in (True, False):
        model.train(mode)
        assert model.image_encoder.training == model.fusion.training == mode
        assert not any(m.training for module_m, _ in model.momentum_pairs() for m in module_m.modules())


@torch.no_grad()
def test_features_have_unit_length_and_tokens_the_promised_number():
    model, batch = stage_one().eval(), batch_of()
    image, image_tokens = model.encode_images(batch["tiles"])
    gene, gene_tokens = model.encode_genes(batch["bins"])
    for vector in (image, gene):
        torch.testing.assert_close(vector.norm(dim=1), torch.ones(BATCH))
    assert image_tokens.shape == (BATCH, 1 + 4 + 1, 32)
    assert gene_tokens.shape == (BATCH, 4 + 1, 32)
    for vector, tokens in ((image, image_tokens), (gene, gene_tokens)):
        torch.testing.assert_close(tokens[:, -1], vector * 32**0.5)


def test_losses_fall_on_one_batch():
    model, batch, seen = stage_one(queue_size=0), batch_of(), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(80):
        found = step_of(model, batch, alpha=0.0, seed=step, expression_weight=1.0)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        model.after_step(found.pair_m)
        seen.append([found.contrast.item(), found.matching.item(), found.expression.item()])
    first, last = torch.tensor(seen[0]), torch.tensor(seen[-10:]).mean(0)
    assert first[0] > 1.5  # chance is ln 6 = 1.79
    assert (last < torch.tensor([0.05, 0.5, 0.1]) * first).all()


def test_the_frozen_trunk_is_shared_and_run_once():
    model, calls = stage_one(), Counter()
    model.gene_encoder.freeze_trunk(1)
    tune(model.image_encoder, "last:2")
    model.reset_momentum_encoders()
    blocks = {
        "gene": model.gene_encoder.blocks,
        "gene_m": model.gene_encoder_m.blocks,
        "image": model.image_encoder.trunk.blocks,
        "image_m": model.image_encoder_m.trunk.blocks,
    }
    for side, of_side in blocks.items():
        for i, block in enumerate(of_side):
            block.register_forward_hook(lambda *_, key=(side, i): calls.update([key]))
    step_of(model, batch_of())
    first_run = {"gene": 0, "gene_m": 1, "image": 0, "image_m": 4}
    assert calls == {(side, i): 1 for side, of_side in blocks.items() for i in range(first_run[side], len(of_side))}
    shared = [t is p for t, p in zip(model.gene_encoder_m.parameters(), model.gene_encoder.parameters(), strict=True)]
    assert shared == [not p.requires_grad for p in model.gene_encoder.parameters()]


def test_a_fresh_momentum_encoder_over_a_frozen_trunk_gives_the_same_features():
    model, batch = stage_one(), batch_of()
    model.gene_encoder.freeze_trunk(1)
    model.reset_momentum_encoders()
    pair, pair_m = pairs_of(model, batch)
    torch.testing.assert_close(step_of(model, batch).pair_m.gene, pair.gene)
    torch.testing.assert_close(pair_m, pair)


def test_a_frozen_trunk_does_not_move():
    model = stage_one()
    model.gene_encoder.freeze_trunk(1)
    model.reset_momentum_encoders()
    before = {name: p.detach().clone() for name, p in model.gene_encoder.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    found = step_of(model, batch_of())
    found.loss.backward()
    optimizer.step()
    model.after_step(found.pair_m)
    for name, p in model.gene_encoder.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_state_goes_on_in_another_model_of_the_same_sizes():
    model, batch = stage_one(), batch_of()
    model.after_step(step_of(model, batch_of(seed=1)).pair_m)
    torch.manual_seed(5)
    other = StageOne(model.sizes).train()
    assert not torch.equal(step_of(other, batch).loss, step_of(model, batch).loss)
    other.load_state_dict(model.state_dict())
    for a, b in zip(
        step_of(other, batch, expression_weight=1.0), step_of(model, batch, expression_weight=1.0), strict=True
    ):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else all(map(torch.equal, a, b))


def test_a_step_under_bf16_autocast_is_near_the_full_one():
    model, batch = stage_one(), batch_of()
    expected = step_of(model, batch, expression_weight=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step_of(model, batch, expression_weight=1.0)
    found.loss.backward()
    assert found.loss.dtype == found.contrast.dtype == found.pair_m.image.dtype == torch.float32
    assert found.contrast.item() == pytest.approx(expected.contrast.item(), rel=0.05)
    assert found.expression.item() == pytest.approx(expected.expression.item(), rel=0.05)


@pytest.mark.slow
def test_one_step_at_the_published_size():
    torch.manual_seed(0)
    model = StageOne(StageOneSizes(n_genes=2000)).train()
    sizes = model.sizes
    assert (sizes.image_encoder, sizes.image_size) == ("deit_base_patch16_224.fb_in1k", 224)
    assert (sizes.gene_depth, sizes.gene_width, sizes.gene_heads, sizes.gene_tokens) == (6, 200, 10, 64)
    assert (sizes.fusion_blocks, sizes.width, sizes.queue_size) == (3, 512, 4096)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    bins = torch.randint(0, 6, (4, 2000), dtype=torch.uint8)
    found = step_of(model, {"tiles": torch.rand(4, 3, 224, 224), "bins": bins, "spots": torch.arange(4)})
    found.loss.backward()
    optimizer.step()
    model.after_step(found.pair_m)
    assert torch.isfinite(found.loss)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert len(model.queue.filled()[2]) == 4
