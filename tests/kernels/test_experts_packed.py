"""pack_experts and PackedExperts: lossless from a tensor or a sequence, and memory of their own."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dflash_kernels as dk
from dflash_kernels.testing import same_bits
from tests.kernels.test_experts import quantized


def test_packing_is_lossless_from_a_tensor_and_from_a_sequence(dtype):
    w = torch.randn(3, 45, 70).to(dtype)
    q, scales = quantized(w.float())
    for packed, want in ((dk.pack_experts(w), w), (dk.pack_experts(list(w.transpose(1, 2).contiguous().transpose(
            1, 2))), w), (dk.pack_experts(q, scales), q * scales[:, :, None])):
        assert packed.shape == (3, 45, 70) and packed.num_experts == 3
        for e in range(3):
            assert same_bits(packed.expert(e).rows(torch.arange(45)), want[e])
    with FakeTensorMode():
        w = torch.empty(3, 45, 70, dtype=dtype, device="cuda")
        assert torch._C._is_alias_of(dk.pack_experts(w).data, w)


def test_a_sequence_is_read_one_expert_at_a_time():
    class Loaded(list):
        asked = []

        def __getitem__(self, e):
            self.asked.append(e)
            return torch.full((4, 8), float(e))

    packed = dk.pack_experts(Loaded([None] * 3))
    assert Loaded.asked == [0, 1, 2]
    assert [packed.expert(e).rows(torch.tensor([3])).unique().tolist() for e in range(3)] == [[0.0], [1.0], [2.0]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda packed: pickle.loads(pickle.dumps(packed))],
                         ids=["deepcopy", "pickle"])
def test_a_copy_has_its_own_bytes_alone(copied):
    for packed in (dk.pack_experts(torch.randn(3, 20, 40)), dk.pack_experts(*quantized(torch.randn(3, 20, 40)))):
        found = copied(packed)
        assert found.data.untyped_storage().nbytes() == packed.data.nbytes
        assert torch.equal(found.data, packed.data) and found.shape == packed.shape
        one = copied(packed.expert(1))
        assert one.scales is None or one.scales.untyped_storage().nbytes() == 20 * 4
        assert torch.equal(one.rows(torch.arange(20)), packed.expert(1).rows(torch.arange(20)))


def test_what_is_packed_does_not_keep_a_parameter_alive():
    parameter = torch.nn.Parameter(torch.randn(2, 20, 40))
    assert not dk.pack_experts(parameter).data.requires_grad and not dk.pack_experts([*parameter]).data.requires_grad


def test_bad_input_names_what_was_expected_and_got():
    gate_up = torch.randn(6, 48, 32)
    for error, text, given in (
            (ValueError, "pack_experts: weights must be of at least one expert; got none", ([],)),
            (TypeError, "pack_experts: weights must be a tensor or a sequence of tensors; got NoneType", (None,)),
            (ValueError, r"pack_experts: weights\[1\] must have shape \(N, K\) = \(48, 32\); got float32 \(47, 32\)",
             ([gate_up[0], gate_up[0, 1:]],)),
            (TypeError, r"pack_experts: weights must be int8 \(E, N, K\); got float32", (gate_up, torch.ones(6, 48))),
            (ValueError, r"pack_experts: scales must have shape \(E, N\) = \(6, 48\)",
             (gate_up.to(torch.int8), torch.ones(6, 47)))):
        with pytest.raises(error, match=text):
            dk.pack_experts(*given)
    with pytest.raises(ValueError, match="PackedExperts.expert: index must be an int below 6; got 6"):
        dk.pack_experts(gate_up).expert(6)
