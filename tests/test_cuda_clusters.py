"""Clusters of many sets on a GPU. Without one, with --device cuda-on-host."""

import numpy as np
import pytest

import polyvec as pv
from accuracy import assert_exact, assert_reduction, on_host
from reference import clusters as ref

SIZES = (1, 2, 3, 0, 15, 16, 33, 65, 130)


@pytest.fixture(autouse=True)
def kernels(request):
    if request.config.getoption("device") == "cpu":
        pytest.skip("needs --device cuda or --device cuda-on-host")


def sample(rng, d=9):
    return [rng.standard_normal((n, d), np.float32) for n in SIZES]


def placed(on_device, arrays):
    sets = pv.Ragged.from_list(arrays)
    return pv.Ragged(on_device(sets.values), sets.offsets)


def means_of(x, labels, k):
    return np.stack([np.float64(x[labels == c]).mean(0) for c in range(k)])


@pytest.mark.parametrize("k", [1, 3, 16, 40])
@pytest.mark.parametrize("iterations", [1, 4, 25])
def test_kmeans_is_lloyds_from_evenly_spaced_rows(rng, on_device, k, iterations):
    arrays = sample(rng)
    sets = placed(on_device, arrays)
    result = pv.quantize.kmeans_sets(sets, k, max_iter=iterations)
    assert_exact(result.centroids.offsets, np.cumsum([0, *np.minimum(SIZES, k)]))
    means, found, inertia = on_host(result.centroids.values), on_host(result.labels), on_host(result.inertia)
    assert (on_host(result.iterations) <= iterations).all()
    for s, x in enumerate(arrays):
        own = means[result.centroids.offsets[s] : result.centroids.offsets[s + 1]]
        labels = found[sets.offsets[s] : sets.offsets[s + 1]]
        if len(x) <= k:
            assert_exact(own, x)
            assert_exact(labels, np.arange(len(x)))
            continue
        expected, least = ref.kmeans(x, k, iterations)
        assert_exact(labels, expected)
        assert_reduction(own, means_of(x, labels, k), np.abs(own).max() + np.zeros(own.shape), length=1)
        np.testing.assert_allclose(inertia[s], least, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 7, 16])
@pytest.mark.parametrize("d", [1, 9, 70])
def test_ward_joins_what_raises_the_inertia_least(rng, on_device, d, k):
    arrays = [x for x in sample(rng, d) if len(x) <= 33]
    pooled = pv.maxsim.pool(placed(on_device, arrays), k, method="ward")
    means = np.split(on_host(pooled.values), pooled.offsets[1:-1])
    for x, own in zip(arrays, means, strict=True):
        expected = means_of(x, ref.ward(x, k), min(k, len(x))) if len(x) else own
        assert_reduction(own, expected, np.abs(x).max(initial=0) + np.zeros(own.shape), length=1)


def test_equal_rows_fill_all_clusters(on_device):
    x = np.full((1, 50, 3), 2, np.float32)
    x[0, 7] = 9
    for method in ("kmeans", "ward"):
        means = on_host(pv.maxsim.pool(on_device(x), 5, method=method).values)
        assert_exact(np.sort(means[:, 0]), np.float32([2, 2, 2, 2, 9]))


def test_empty_clusters_take_the_farthest_rows(rng, on_device):
    n, k = 48, 8
    for _ in range(10):
        x = rng.standard_normal((n, 2)).astype(np.float32)
        x[(np.arange(k) * n // k)[rng.integers(0, k, 4)]] = x[0]
        labels = pv.quantize.kmeans_sets(on_device(x[None]), k, max_iter=4).labels
        assert_exact(labels, ref.kmeans(x, k, 4)[0])


@pytest.mark.parametrize("method", ["kmeans", "ward"])
def test_sets_that_are_not_finite_have_means_of_nan(rng, on_device, method):
    x = rng.standard_normal((3, 20, 6)).astype(np.float32)
    x[1, 7, 2] = np.inf
    x[2] *= np.float32(1e30)
    means = on_host(pv.maxsim.pool(on_device(x), 4, method=method).values).reshape(3, 4, 6)
    assert np.isnan(means[1]).all()
    assert np.isfinite(means[[0, 2]]).all()


def test_pooling_has_gradients(rng, gpu):
    import polyvec.torch as pvt

    docs = gpu.from_numpy(rng.standard_normal((5, 12, 8)).astype(np.float32))
    results = []
    for x in (docs, docs.cuda()):
        x = x.clone().requires_grad_()
        values, offsets = pvt.pool(x, 3)
        (values.square().sum()).backward()
        assert offsets.device == x.device
        results.append((values.detach().cpu(), x.grad.cpu()))
    for actual, expected in zip(*results, strict=True):
        gpu.testing.assert_close(actual, expected)
    compiled = gpu.compile(lambda x: pvt.pool(x, 3)[0], fullgraph=True)
    gpu.testing.assert_close(compiled(docs.cuda()).cpu(), results[0][0])
