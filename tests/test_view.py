"""Laws of `View`: what it gives is what the SAE gives of each row, however the rows are cut into blocks."""

import itertools

import numpy as np
import pytest
import torch

from msae.base.errors import ConfigError, StoreError
from msae.data.store import as_store
from msae.sae.model import SAE, SAEConfig
from msae.sae.standardize import Standardizer, fit_statistics
from msae.sae.view import View

X = np.random.default_rng(0).normal(1, 1, size=(300, 6)).astype(np.float32)
KINDS = {
    "matryoshka": {"levels": (4, 12)},
    "relu": {},
    "topk": {"k": 3},
    "batchtopk": {"k": 3},
    "jumprelu": {"k": 3},
    "capped": {"kind": "relu", "soft_cap": 0.5},
}


def make(kind, *, own_statistics=True):
    known = {"image": fit_statistics(lambda: [torch.from_numpy(X)])} if own_statistics else {}
    sae = SAE(SAEConfig(6, 12, **{"kind": kind, **KINDS[kind]}), Standardizer(known), seed=2)
    with torch.no_grad():
        sae.W_enc.mul_(5)
        sae.b_enc.copy_(torch.linspace(-0.5, 0.5, 12))
        if sae.threshold is not None:
            sae.threshold.fill_(0.4)
    return sae.eval()


@pytest.fixture
def store(tmp_path):
    np.save(tmp_path / "x.npy", X)
    return as_store(tmp_path / "x.npy")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inference", "k"), [("trained", None), ("relu", None), ("topk", 2)])
def test_activations_are_those_of_encode(store, kind, inference, k):
    sae = make(kind)
    wanted = sae.encode(torch.from_numpy(X), k=k, inference=inference)
    view = View(sae, store, inference=inference, k=k)
    assert torch.equal(torch.cat(list(view.activations())), wanted) and bool((wanted > 0).any())
    rows = np.array([7, 250, 3, 7])
    assert torch.allclose(torch.cat(list(view.activations(rows=rows))), wanted[rows], atol=1e-6)
    some = torch.cat(list(view.activations([9, 2])))
    # another shape of the product: its last bits may differ
    assert torch.allclose(some, wanted[:, [9, 2]], atol=1e-6)


def test_k_alone_means_the_k_strongest(store):
    sae = make("relu")
    given = torch.cat(list(View(sae, store, k=2).activations()))
    assert torch.equal(given, sae.encode(torch.from_numpy(X), k=2))


@pytest.mark.parametrize("block_rows", [1, 64, 299, 300, 1000])
def test_blocks_cover_the_rows_in_order(store, block_rows):
    view = View(make("relu"), store, block_rows=block_rows)
    blocks = list(view.raw())
    assert torch.equal(torch.cat(blocks), torch.from_numpy(X)) and len(view) == 300
    assert all(len(block) == block_rows for block in blocks[:-1])
    rows = np.arange(299, -1, -3)
    assert torch.equal(torch.cat(list(view.raw(rows))), torch.from_numpy(X[rows]))


def test_rows_are_standardised_by_the_sae(store):
    sae = make("relu")
    view = View(sae, store)
    wanted = sae.standardizer.apply(torch.from_numpy(X), "image")
    assert view.standardized_by == "run" and torch.equal(torch.cat(list(view.rows())), wanted)


def test_statistics_that_the_sae_lacks_are_those_of_the_store(store):
    sae = make("relu", own_statistics=False)
    view = View(sae, store)
    x = torch.cat(list(view.rows())).double().numpy()
    assert view.standardized_by == "store"
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1).mean(), np.sqrt(6), rtol=1e-6)
    assert "image" not in sae.standardizer  # the SAE that was given stays as it was


def test_memory_grows_neither_with_the_rows_nor_with_the_latents(store):
    sae = SAE(SAEConfig(6, 60_000, kind="relu"), make("relu").standardizer)
    assert {len(z) * sae.d_sae <= 2**22 for z in itertools.islice(View(sae, store).activations(), 3)} == {True}


def test_what_does_not_fit_is_one_line(store, tmp_path):
    np.save(tmp_path / "wide.npy", np.ones((3, 7), np.float32))
    with pytest.raises(StoreError, match="7-dim embeddings"):
        View(make("relu"), tmp_path / "wide.npy")
    with pytest.raises(StoreError, match="has no text"):
        View(make("relu"), store, "text")
    with pytest.raises(ConfigError, match="k 13 is not between 1 and the 12 latents"):
        View(make("relu"), store, k=13)
    with pytest.raises(ConfigError, match="blocks of -1 rows"):
        View(make("relu"), store, block_rows=-1)
