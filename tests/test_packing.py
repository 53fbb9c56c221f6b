import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_commvq import CodebookFormatError
from transformers_commvq.packing import (
    CodeLayout,
    index_bytes,
    pack,
    pack_indices,
    split_scale,
    unpack,
    unpack_indices,
    with_scale,
)

layouts = st.lists(st.integers(1, 24).map(lambda n: 8 * n), min_size=1, max_size=5).map(tuple)


@settings(deadline=None, max_examples=50)
@given(layouts, st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**31))
def test_round_trip(bits, batch, tokens, seed):
    layout = CodeLayout(bits)
    signs = torch.randn(batch, len(bits), tokens, max(bits), generator=torch.Generator().manual_seed(seed)).sign()
    codes = pack(signs, layout)
    assert codes.shape == (batch, tokens, sum(bits) // 8)  # no padding in storage
    back = unpack(codes, layout)
    for h, n in enumerate(bits):
        assert torch.equal(back[:, h, :, :n], signs[:, h, :, :n])


def test_golden_bytes():
    """A changed layout would break every stored cache and every kernel, and no round trip could notice."""
    signs = torch.ones(1, 2, 2, 16)
    signs[0, 0, 0, [0, 3, 15]] = -1
    signs[0, 1, 0, 7] = -1
    signs[0, 1, 1, [8, 9]] = -1  # past head 1's own 8 bits
    codes = pack(signs, CodeLayout((16, 8)))
    assert codes.tolist() == [[[0b00001001, 0b10000000, 0b10000000], [0, 0, 0]]]


def test_filled_up_bits_are_marked():
    layout = CodeLayout((8, 24))
    assert layout.columns.tolist() == [[0, 0, 0], [1, 2, 3]]
    assert layout.rows[0].tolist() == list(range(8)) + [-1] * 16
    assert layout.rows[1].tolist() == list(range(8, 32))


@pytest.mark.parametrize("bits", [(), (4,), (12,), (8, 0), (16, -8)])
def test_bad_bits_are_refused(bits):
    with pytest.raises(CodebookFormatError, match="multiples of 8"):
        CodeLayout(bits)


@pytest.mark.parametrize("heads, stages", [(1, 1), (1, 2), (3, 5), (8, 11)])
def test_indices_round_trip(heads, stages):
    indices = torch.randint(0, 64, (2, 7, heads, stages, 2))
    codes = pack_indices(indices)
    assert codes.dtype == torch.uint8 and codes.shape == (2, 7, index_bytes(heads, stages))
    assert torch.equal(unpack_indices(codes, heads, stages), indices.int())


def test_golden_bytes_of_indices_and_scale():
    indices = torch.tensor([[1, 2], [63, 0], [0b101010, 0b010101]]).view(1, 1, 1, 3, 2)
    codes = with_scale(pack_indices(indices), torch.tensor([[-1.5]]))
    assert codes.tolist() == [[[0b10000001, 0b11110000, 0b00000011, 0b01101010, 0b00000101, 0x00, 0xBE]]]
    packed, scale = split_scale(codes)
    assert torch.equal(packed, codes[..., :5]) and scale.tolist() == [[-1.5]]
