"""Under autocast every op computes in float32, and gradients come back in the type of what was narrowed."""

import pytest

torch = pytest.importorskip("torch")
pvt = pytest.importorskip("polyvec.torch")

IDS = torch.tensor([0, 1, 1])
CALLS = {  # name -> a call of a (3, 4, 8) tensor
    "product": lambda x: pvt.product(x, x),
    "normalize": pvt.normalize,
    "relation_query": lambda x: pvt.relation_query(x, x, IDS, IDS),
    "logsumexp": lambda x: pvt.logsumexp(x[0], x.flatten(0, 1), metric="l2", bias=x[:, :, 0].flatten()),
    "maxsim": lambda x: pvt.maxsim(x, x),
    "maxsim_pairs": lambda x: pvt.maxsim_pairs(x, x),
    "soft_assign": lambda x: pvt.soft_assign(x.flatten(0, 1), x.view(1, 12, 8), hard=False).quantized,
    "vq_assign": lambda x: pvt.vq_assign(x, x.flatten(0, 1)).quantized,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_narrow_types_are_widened(rng, name, compiled):
    x = torch.from_numpy(rng.standard_normal((3, 4, 8))).bfloat16().requires_grad_()
    call = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager") if compiled else CALLS[name]
    with torch.autocast("cpu", torch.bfloat16):
        result = call(x)
        (gradient,) = torch.autograd.grad(result.square().sum(), x)
    wide = x.detach().float().requires_grad_()
    expected = CALLS[name](wide)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)
    (same,) = torch.autograd.grad(expected.square().sum(), wide)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.float(), same, rtol=2**-7, atol=2**-7 * same.abs().max().item())
