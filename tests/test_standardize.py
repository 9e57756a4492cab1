import math

import pytest
import torch

from msae.base.errors import ConfigError, StoreError
from msae.sae.standardize import Standardizer, fit_statistics

X = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)) * 0.1 + 3


def test_standardised_rows_have_mean_zero_and_mean_norm_sqrt_d():
    x = Standardizer({"image": fit_statistics(lambda: X.split(64))}).apply(X, "image").double()
    # float32 rows of norm about 3.5: their mean is exact to a few 1e-6.
    assert float(x.mean(0).abs().max()) < 1e-5
    assert float(x.norm(dim=1).mean()) == pytest.approx(math.sqrt(12), rel=1e-5)


def test_invert_undoes_apply():
    known = Standardizer({"text": fit_statistics(lambda: [X])})
    assert torch.allclose(known.invert(known.apply(X, "text"), "text"), X, rtol=1e-6, atol=1e-6)


def test_statistics_do_not_depend_on_the_batches():
    one, many = fit_statistics(lambda: [X]), fit_statistics(lambda: X.split(7))
    assert torch.allclose(one.mean, many.mean, rtol=1e-7) and one.scale == pytest.approx(many.scale, rel=1e-12)


def test_scale_follows_the_units():
    assert fit_statistics(lambda: [X * 10]).scale == pytest.approx(fit_statistics(lambda: [X]).scale / 10, rel=1e-6)


def test_unknown_modality_is_refused_with_what_is_known():
    with pytest.raises(ConfigError, match=r"no text statistics here \(known: image\).*--modality image"):
        Standardizer({"image": fit_statistics(lambda: [X])}).apply(X, "text")


def test_nothing_to_scale_is_refused():
    with pytest.raises(StoreError, match="no rows"):
        fit_statistics(list)
    with pytest.raises(StoreError, match="the same vector"):
        fit_statistics(lambda: [torch.ones(5, 3)])
