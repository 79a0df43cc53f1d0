"""k-means and product quantisation against faiss, on real vectors where the evaluation sets are at hand."""

import lzma

import numpy as np
import pytest

import polyvec as pv


@pytest.fixture(scope="module")
def faiss(threads):
    module = pytest.importorskip("faiss")
    module.omp_set_num_threads(threads)
    return module


@pytest.fixture(scope="module")
def glosses(data):
    """117,659 x 384, normalised."""
    with lzma.open(data / "wordnet-glosses-minilm" / "vectors_i8.npy.xz") as file:
        x = np.load(file).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_kmeans(compare, faiss, glosses):
    x, k, iterations = glosses[:16384], 256, 5
    ours = pv.quantize.kmeans(x, k, init="random", max_iter=iterations, tolerance=0).inertia

    def in_faiss():
        rival = faiss.Kmeans(384, k, niter=iterations, max_points_per_centroid=len(x))
        rival.train(x)
        return rival.obj[-1]

    compare(
        lambda: pv.quantize.kmeans(x, k, init="random", max_iter=iterations, tolerance=0).inertia,
        {"faiss": in_faiss},
        check=lambda inertia: ours <= 1.01 * inertia or pytest.fail(f"inertia {ours}, faiss {inertia}"),
        flops=2 * iterations * x.size * k,
    )


def error(x, decoded):
    return np.square(x - decoded).sum(1, dtype=np.float64).mean()


@pytest.mark.parametrize(("m", "bits"), [(12, 8), (24, 4)], ids=["12x8", "24x4"])
def test_train_and_encode(compare, faiss, glosses, m, bits):
    """The error of the codes is that of faiss, within 1 %, or less. On fewer rows faiss takes several times longer."""
    x = glosses[:30_000, :96].copy()

    def in_polyvec():
        quantizer = pv.quantize.ProductQuantizer(96, m, bits=bits).fit(x)
        return quantizer, quantizer.encode(x)

    def in_faiss():
        quantizer = faiss.ProductQuantizer(96, m, bits)
        quantizer.train(x)
        return quantizer, quantizer.compute_codes(x)

    quantizer, codes = in_polyvec()
    ours = error(x, quantizer.decode(codes))
    compare(
        in_polyvec,
        {"faiss": in_faiss},
        check=lambda result: ours <= 1.01 * error(x, result[0].decode(result[1])) or pytest.fail(f"error {ours}"),
        flops=2 * 26 * x.size * 2**bits,
    )


@pytest.fixture(scope="module", params=[(48, 8), (96, 4)], ids=["48x8", "96x4"])
def codec(request, faiss, glosses):
    """The codes of all glosses in both libraries: the same codewords, the same codes."""
    m, bits = request.param
    quantizer = pv.quantize.ProductQuantizer(384, m, bits=bits).fit(glosses, train_size=8192, max_iter=10)
    kind, name = (faiss.IndexPQ, "faiss") if bits == 8 else (faiss.IndexPQFastScan, "faiss fast-scan")
    index = kind(384, m, bits, faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(quantizer.codebooks.ravel(), index.pq.centroids)
    index.is_trained = True
    index.add(glosses)
    return quantizer, quantizer.encode(glosses), index, name


@pytest.mark.parametrize("nq", [1, 200])
def test_search(compare, codec, glosses, nq):
    """Fast-scan rounds its tables to 8 bits: its scores are approximate."""
    quantizer, codes, index, name = codec
    queries = glosses[:: len(glosses) // nq][:nq].copy()
    expected = np.sort(queries[0] @ quantizer.decode(codes).T)[::-1][:100]
    compare(
        lambda: quantizer.search(queries, codes, 100),
        {name: lambda: index.search(queries, 100)},
        check=lambda result: np.testing.assert_allclose(result[0][0], expected, rtol=0, atol=2e-2),
        bytes=nq * codes.nbytes,
    )
