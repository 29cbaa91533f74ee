"""Packing: any codes of 1 to 8 bits come back, no byte is wasted, and the layout of files stays what it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.quantization.numerics.packing import pack, packed_length, unpack
from tests.support.few_bits import unpack_slowly


@settings(max_examples=200)
@given(
    bits=st.integers(1, 8),
    leading=st.sampled_from([(), (1,), (3,), (2, 3), (0,)]),
    length=st.integers(1, 70),
    seed=st.integers(0, 2**16),
)
def test_codes_come_back_from_as_few_bytes_as_can_be(
    bits: int, leading: tuple[int, ...], length: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (*leading, length), generator=generator, dtype=torch.uint8)
    before = codes.clone()
    packed = pack(codes, bits)
    # Codes are filled up until the narrowest plane (of 1, 2, 4 or 8 bits) ends with a byte.
    together = {1: 8, 2: 4, 3: 8, 4: 2, 5: 8, 6: 4, 7: 8, 8: 1}[bits]
    assert packed.dtype == torch.uint8
    assert packed.shape == (*leading, -(-length // together) * together * bits // 8)
    assert packed.shape[-1] == packed_length(length, bits)
    assert torch.equal(codes, before)
    back = unpack(packed, bits, length)
    assert back.dtype == torch.uint8 and torch.equal(back, codes)
    if leading:
        slow = unpack_slowly(packed.reshape(-1, packed.shape[-1]).numpy(), bits, length)
        assert np.array_equal(slow, codes.reshape(-1, length).numpy())


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_bit_of_the_bytes_is_used(bits: int) -> None:
    # Setting one bit of one code sets one bit of the packed bytes, another one for each: nothing is left between.
    seen = []
    for code in range(16):
        for bit in range(bits):
            codes = torch.zeros(16, dtype=torch.uint8)
            codes[code] = 1 << bit
            ones = np.unpackbits(pack(codes, bits).numpy())
            assert ones.sum() == 1
            seen.append(int(ones.argmax()))
    assert sorted(seen) == list(range(16 * bits))


def test_the_layout_in_a_file_is_fixed() -> None:
    # 3 bits: first a plane of the codes' lower two bits, four to a byte, then one of their highest bits.
    codes = torch.tensor([0b101, 0b010, 0b111, 0b000, 0b001, 0b110, 0b011, 0b100], dtype=torch.uint8)
    assert pack(codes, 3).tolist() == [0b11_01_11_01, 0b00_10_00_10, 0b10100101]
    assert pack(torch.arange(8, dtype=torch.uint8), 4).tolist() == [0x40, 0x51, 0x62, 0x73]
    assert pack(torch.tensor([1, 200, 3], dtype=torch.uint8), 8).tolist() == [1, 200, 3]


@pytest.mark.parametrize(
    ("length", "bits", "expected"),
    [(4096, 4, 2048), (4096, 3, 1536), (1, 2, 1), (9, 8, 9), (9, 4, 5), (9, 3, 6), (0, 5, 0)],
)
def test_lengths(length: int, bits: int, expected: int) -> None:
    assert packed_length(length, bits) == expected


def test_a_part_of_the_rows_is_unpacked_by_itself() -> None:
    codes = torch.randint(8, (10, 21), dtype=torch.uint8)
    packed = pack(codes, 3)
    assert torch.equal(unpack(packed[4:7], 3, 21), codes[4:7])
    assert torch.equal(unpack(packed[[9, 0, 9]], 3, 21), codes[[9, 0, 9]])
