"""The two rules that choose panels, on sums per gene of each slice; scanpy is the reference of one of them."""

import functools
import importlib

import anndata
import numpy as np
import pytest
import scanpy
import scipy.sparse as sp

from utils.genes import panels as gene_panels


def profiles(*slices):
    """Of dense or sparse counts (S, G) and names (G,)."""
    return [gene_panels.profile(sp.csr_matrix(counts), np.array(names)) for counts, names in slices]


def test_highest_expressed_by_hand():
    """Mean over slices of the slice's total: e has the most counts and is not common; ties in the first one's order."""
    first = [[1, 9, 0, 4], [2, 3, 3, 1]], ["a", "b", "c", "d"]  # totals 3, 12, 3, 5
    second = [[3, 90, 0, 0, 9], [2, 9, 1, 5, 0]], ["a", "e", "b", "c", "d"]  # 5, 99, 1, 5, 9
    assert gene_panels.highest_expressed(profiles(first, second), 4) == ["d", "b", "a", "c"]  # means 7, 6.5, 4, 4
    assert gene_panels.highest_expressed(profiles(first, second), 1) == ["d"]
    assert gene_panels.highest_expressed(profiles(second), 2) == ["e", "d"]


def test_a_profile_by_hand():
    """Per 10,000 counts of the spot: 2,500 and 7,500, then 10,000 and 0; a spot without counts is zero."""
    (found,) = profiles(([[1, 3], [5, 0], [0, 0]], ["a", "b"]))
    assert (found.n_spots, found.totals.tolist()) == (3, [6, 3])
    np.testing.assert_allclose(found.mean, [12500 / 3, 2500])
    np.testing.assert_allclose(found.squares, [2500**2 + 1e8 - 12500**2 / 3, 7500**2 - 7500**2 / 3])


def test_each_slice_weighs_by_its_counts_not_by_its_spots():
    """One spot with a total of 10 beats a hundred spots with a total of 9."""
    few, many = ([[10, 0]], ["a", "b"]), (np.eye(100, 2, k=-50, dtype=int) * 9, ["a", "b"])
    assert gene_panels.highest_expressed(profiles(few, many), 1) == ["a"]


def noisy_slices(rng, n_genes=120, n_spots=(60, 80)):
    """Slices, genes in another order and one more in all but the first, a few much noisier than Poisson."""
    names = np.array([f"g{i}" for i in range(n_genes)])
    slices = []
    for i, n in enumerate(n_spots):
        rate = rng.gamma(np.linspace(0.05, 4, n_genes), 3.0, (n, n_genes)) * rng.gamma(4, 0.3, (n, 1))
        counts = rng.poisson(rate)
        order = np.arange(n_genes) if i == 0 else rng.permutation(n_genes)
        slices.append((counts[:, order], names[order]))
        if i:
            slices[i] = np.column_stack([slices[i][0], rng.poisson(50, n)]), np.append(slices[i][1], "only_here")
    return slices


def with_ties(slices):
    """Genes 40 to 59 of each slice once more, under names before and after their own."""
    kept = [f"g{i}" for i in range(40, 60)]
    extra = [[names.tolist().index(name) for name in kept] for _, names in slices]
    again = [[f"{'a' if i % 2 else 'z'}{name}" for i, name in enumerate(kept)]] * len(slices)
    parts = zip(slices, extra, again, strict=True)
    return [(np.column_stack([counts, counts[:, e]]), np.append(names, a)) for (counts, names), e, a in parts]


def unseen(slices, n=30):
    """The first genes of the last slice, and one of every slice, have no count."""
    for counts, names in slices:
        counts[:, names == "g77"] = 0
    slices[-1][0][:, :n] = 0
    return slices


@pytest.fixture
def rounded(monkeypatch):
    """scanpy with its dispersions rounded as ours: two genes in a bin are 1/sqrt(2) from their mean, in every such bin,
    and which of them it takes would be for rounding errors to say."""

    def subset(adata, *, mean, dispersion_norm, cutoff):
        dispersion_norm[:] = dispersion_norm.round(9)  # the column of its table
        return original(adata, mean=mean, dispersion_norm=dispersion_norm, cutoff=cutoff)

    module = importlib.import_module("scanpy.preprocessing._highly_variable_genes")
    original = module._subset_genes
    monkeypatch.setattr(module, "_subset_genes", subset)


def chosen_by_scanpy(slices, n):
    """The slow way: all slices stacked, normalised over all genes of each, then scanpy; in the first one's order."""
    blocks = []
    for counts, names in slices:
        adata = anndata.AnnData(sp.csr_matrix(counts, dtype=np.float64))
        adata.var_names = names
        scanpy.pp.normalize_total(adata, target_sum=1e4)
        scanpy.pp.log1p(adata)
        blocks.append(adata)
    both = anndata.concat(blocks, join="inner", label="slice", index_unique="-")
    scanpy.pp.highly_variable_genes(both, flavor="seurat", batch_key="slice", n_top_genes=n)
    chosen = set(both.var_names[both.var["highly_variable"]])
    return [name for name in slices[0][1] if name in chosen]


ODD = {
    "two": lambda rng: noisy_slices(rng),
    "one": lambda rng: noisy_slices(rng, n_spots=(50,)),
    "twelve": lambda rng: noisy_slices(rng, n_spots=rng.integers(8, 40, 12)),
    "few genes": lambda rng: noisy_slices(rng, n_genes=9),
    "unseen": lambda rng: unseen(noisy_slices(rng)),
    "ties": lambda rng: with_ties(noisy_slices(rng)),
    "unseen ties in three": lambda rng: with_ties(unseen(noisy_slices(rng, n_spots=(40, 30, 50)))),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:`n_top_genes` > number")
def test_highly_variable_genes_are_those_of_scanpy(kind, seed, rounded):
    slices = ODD[kind](np.random.default_rng(seed))
    n_common = len(gene_panels.common_genes([names for _, names in slices]))
    for n in {1, 5, 30, 50, 100, n_common - 1}:
        if n < n_common:
            chosen = gene_panels.highly_variable(profiles(*slices), n)
            assert len(chosen) == n and chosen == chosen_by_scanpy(slices, n), n
            assert "only_here" not in chosen or len(slices) == 1


def test_without_rounding_too_where_many_genes_are_to_choose_from(rng):
    slices = noisy_slices(rng, n_genes=1500, n_spots=(150, 100, 120))
    for n in (50, 300):
        assert gene_panels.highly_variable(profiles(*slices), n) == chosen_by_scanpy(slices, n)


def test_a_slice_of_like_spots_has_no_say(rng):
    """It has no dispersion at all, where scanpy gives up: the other slice alone chooses."""
    names = np.arange(30).astype(str)
    flat = np.tile(rng.integers(1, 4, 30), (8, 1)), names
    other = rng.poisson(2, (20, 30)) * rng.poisson(1, (20, 1)) + 1, names
    assert gene_panels.highly_variable(profiles(flat, other), 7) == gene_panels.highly_variable(profiles(other), 7)


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_does_not_depend_on_spans_even_of_spots_so_few_that_dispersions_are_equal(seed):
    slices = noisy_slices(np.random.default_rng(seed), n_spots=(2, 4))
    parts = [[profiles((counts[i : i + 1], names))[0] for i in range(len(counts))] for counts, names in slices]
    merged = [functools.reduce(gene_panels.merged, each[::-1]) for each in parts]
    for n in (1, 5, 30, 100):
        assert gene_panels.highly_variable(merged, n) == gene_panels.highly_variable(profiles(*slices), n)


def test_a_slice_without_a_train_spot_only_says_which_genes_it_has(rng):
    first, second = noisy_slices(rng)
    none = second[0][:0], second[1][5:]
    here = [i for i, name in enumerate(first[1]) if name in second[1][5:]]
    none = none[0][:, 5:], none[1]
    expected = gene_panels.highly_variable([columns(one, here) for one in profiles(first)], 20)
    assert gene_panels.highly_variable(profiles(first, none), 20) == expected


def columns(one, here):
    sums = {key: getattr(one, key)[here] for key in ("names", "totals", "mean", "squares")}
    return gene_panels.Profile(n_spots=one.n_spots, **sums)


def test_fewer_common_genes_than_asked_for_are_all_taken(rng):
    slices = noisy_slices(rng)
    assert gene_panels.highly_variable(profiles(*slices), 120) == gene_panels.common_genes(
        [names for _, names in slices]
    )


def test_an_empty_spot_does_no_harm(rng):
    counts, names = noisy_slices(rng)[0]
    counts[3] = 0
    assert len(gene_panels.highly_variable(profiles((counts, names)), 10)) == 10
    np.testing.assert_allclose(
        profiles((counts, names))[0].mean * 60 / 59, profiles((counts[counts.any(1)], names))[0].mean
    )


@pytest.mark.parametrize("edges", [[], [1], [30], [0, 7, 7, 20, 60]])
def test_a_profile_is_that_of_dense_counts_also_when_merged_from_spans(rng, edges):
    counts, names = noisy_slices(rng)[0]
    parts = np.split(counts, edges)
    found = functools.reduce(gene_panels.merged, profiles(*((part, names) for part in parts)))
    per_10k = counts * (1e4 / counts.sum(1, keepdims=True))
    assert found.n_spots == 60 and found.totals.tolist() == counts.sum(0).tolist()
    np.testing.assert_allclose(found.mean, per_10k.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.squares / 59, per_10k.var(0, ddof=1), rtol=1e-11)
