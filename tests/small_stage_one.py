"""A tiny stage-one model, batches for it, and one step of losses."""

import torch

from model.stage_one import StageOne, StageOneSizes

SIDE, GENES, TARGETS, BATCH = 32, 20, 5, 6
SMALL = {
    "n_genes": GENES,
    "image_encoder": "test_vit",
    "image_size": SIDE,
    "gene_depth": 3,
    "gene_width": 24,
    "gene_heads": 2,
    "gene_tokens": 4,
    "fusion_blocks": 1,
    "image_tokens": 5,
    "width": 32,
    "queue_size": 10,
    "n_components": TARGETS,
}


def stage_one(**sizes):
    """Its fusion's last layer is not zero, as before the first step, so that all of it learns."""
    torch.manual_seed(0)
    model = StageOne(StageOneSizes(**SMALL | sizes)).train()
    torch.nn.init.normal_(model.fusion.to_logit.weight, std=0.1)
    return model


def batch_of(n=BATCH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "tiles": torch.rand(n, 3, SIDE, SIDE, generator=generator),
        "bins": torch.randint(0, 6, (n, GENES), generator=generator, dtype=torch.uint8),
        "spots": torch.arange(n) + 100 * seed,
        "expression": torch.randn(n, TARGETS, generator=generator),
    }


def step_of(model, batch, alpha=0.4, seed=0, **more):
    return model(**batch, alpha=alpha, generator=torch.Generator().manual_seed(seed), **more)
