import PACKAGE as dk
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.kernels_ci
def test_verification_accepts_a_prefix():
    drafts, target = (torch.tensor([ids], device=DEVICE) for ids in ([5, 7, 8, 9], [7, 8, 3, 4]))
    found = dk.verify_greedy(drafts, target, torch.tensor([10], dtype=torch.int32, device=DEVICE))
    assert found.tokens.tolist() == [[7, 8, 3, -1]] and found.accept_lens.tolist() == [2]


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_that_of_torch_and_of_its_row_alone(dtype):
    x, weight = torch.randn(5, 96, device=DEVICE).to(dtype), torch.randn(96, device=DEVICE).to(dtype)
    found = dk.rms_norm(x, weight)
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(x, (96,), weight, 1e-6), rtol=2e-2, atol=1e-5)
    assert torch.equal(dk.rms_norm(x[2:3], weight), found[2:3])
