"""What is packed for the way: lengths by hand, errors within their bound, nonsense refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsl_sage.config.parts import CodecConfig, CodecsConfig
from fsl_sage.core import generator, tensor_bytes
from fsl_sage.networks.codecs import CODECS, Coder, coded_bytes, coders, pack_bits, quantise, top_k, unpack_bits

SHAPE = (3, 5, 7, 3)  # nothing is even: 315 numbers, 105 a sample
LENGTHS = {  # settings → bytes, counted by hand
    (("bits", 8),): 8 + 315,
    (("bits", 4),): 8 + 158,
    (("bits", 3),): 8 + 119,  # 945 bits
    (("bits", 2),): 8 + 79,
    (("bits", 1),): 8 + 40,
    (("bits", 1), ("over", "sample")): 3 * 8 + 40,
    (("bits", 4), ("over", "channel")): 5 * 8 + 158,
    (("bits", 2), ("stochastic", True)): 8 + 79,
    (("name", "float16"),): 630,
    (("name", "bfloat16"),): 630,
    (("name", "top_k"), ("rate", 0.02)): 3 * 3 * 4 + 8,  # k = 3; 9 places of 7 bits
    (("name", "top_k"), ("rate", 0.5)): 3 * 53 * 4 + 40,  # k = 53; a mask of 315 bits
    (("name", "random_top_k"), ("rate", 0.001)): 3 * 4 + 3,  # k = 1; 21 bits
    (("name", "product"), ("pieces", 15), ("groups", 3), ("centres", 5)): 3 * 5 * 7 * 4 + 17,  # 45 codes of 3 bits
    (("name", "superpose"), ("together", 2)): 2 * 105 * 4,  # the second sum has one sample
}


def coder(**fields):
    return Coder(CodecConfig(**fields), 200, "smashed")


@pytest.mark.parametrize("fields", LENGTHS)
def test_what_is_packed_has_the_length_counted_by_hand(fields):
    of = coder(**dict(fields))
    packed = of.pack(torch.randn(SHAPE, generator=generator(1)), 0, 0)
    elsewhere = coder(**dict(fields)).pack(torch.empty(SHAPE, device="meta"), 0, 0)
    assert tensor_bytes(packed) == tensor_bytes(elsewhere) == coded_bytes(of, SHAPE) == LENGTHS[fields]
    assert of.unpack(packed, torch.empty(SHAPE, device="meta"), 0).shape == SHAPE


@settings(max_examples=200, deadline=None)
@given(
    bits=st.integers(1, 8),
    over=st.sampled_from(["batch", "sample", "channel"]),
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_a_number_arrives_within_half_a_step(bits, over, shape, scale, seed):
    x, of = scale * torch.randn(shape, generator=generator(seed)), coder(bits=bits, over=over)
    arrived = of.unpack(of.pack(x, 0, 0), x, 0)
    dims = {"batch": [*range(x.ndim)], "sample": [*range(1, x.ndim)]}
    channel = 1 if x.ndim == 4 else x.ndim - 1
    dims = dims.get(over, [dim for dim in range(x.ndim) if dim != channel])
    step = (x.amax(dims, keepdim=True) - x.amin(dims, keepdim=True)) / (2**bits - 1)
    assert ((arrived - x).abs() <= step / 2 + 1e-6 * x.abs().max()).all()


@settings(max_examples=200, deadline=None)
@given(bits=st.integers(1, 24), n=st.integers(0, 40), seed=st.integers(0, 99))
def test_bits_come_back(bits, n, seed):
    codes = torch.randint(0, 2**bits, (n,), generator=generator(seed))
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(bits * n / 8)
    assert torch.equal(unpack_bits(packed, bits, n), codes)


def test_stochastic_rounding_is_right_on_average_and_has_an_address():
    x, fields = torch.tensor([[0.0, 0.3, 1.0]]), {"bits": 1, "stochastic": True}
    arrived = torch.cat([(of := coder(**fields)).unpack(of.pack(x, rnd, 0), x, 0) for rnd in range(3000)])
    assert abs(float(arrived[:, 1].mean()) - 0.3) < 5 * (0.3 * 0.7 / 3000) ** 0.5
    x = torch.randn(4, 50, generator=generator(2))
    one, other = coder(**fields), coder(**fields)
    codes = [one.pack(x, 1, 0)["codes"], one.pack(x, 1, 0)["codes"], one.pack(x, 1, 1)["codes"]]
    again = [other.pack(x, 1, 1)["codes"], other.pack(x, 1, 0)["codes"]]  # clients in another order
    assert torch.equal(again[0], codes[2]) and torch.equal(again[1], codes[0])
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("name", ["top_k", "random_top_k"])
@pytest.mark.parametrize("rate", [0.02, 0.5])
def test_a_gradient_comes_back_at_the_places_that_went_up(name, rate):
    ways = coders(CodecsConfig(CodecConfig(name, rate=rate), CodecConfig("top_k", rate=0.9)), 200)
    z, gradient = torch.randn(SHAPE, generator=generator(3)), torch.randn(SHAPE, generator=generator(4))
    arrived = ways["smashed"].unpack(ways["smashed"].pack(z, 0, 0), z, 0)
    down = ways["cut_grad"].pack(gradient, 0, 0)
    k = math.ceil(rate * 105)
    assert tensor_bytes(down) == 3 * k * 4 == coded_bytes(ways["cut_grad"], SHAPE)
    assert torch.equal(ways["cut_grad"].unpack(down, z, 0), gradient * (arrived != 0))
    assert ((arrived != 0).flatten(1).sum(1) == k).all() and torch.equal(arrived[arrived != 0], z[arrived != 0])
    mean = ways["mean_cut_grad"].pack(gradient, 0, 0)  # one message to several clients: places of its own
    assert tensor_bytes(mean) > tensor_bytes(down)


def test_a_sparse_gradient_has_places_of_its_own_where_the_smashed_data_are_whole():
    ways = coders(CodecsConfig(cut_grad=CodecConfig("top_k", rate=0.02)), 200)
    assert "smashed" not in ways and coded_bytes(ways["cut_grad"], SHAPE) == 3 * 3 * 4 + 8


def test_the_correction_of_product_codes_adds_the_weighted_error():
    fields = {"name": "product", "pieces": 15, "centres": 2}
    z, gradient = torch.randn(SHAPE, generator=generator(5)), torch.randn(SHAPE, generator=generator(6))
    ways = coders(CodecsConfig(CodecConfig(**fields, correction=0.5)), 200)
    arrived = ways["smashed"].unpack(ways["smashed"].pack(z, 0, 0), z, 0)
    got = ways["cut_grad"].unpack(ways["cut_grad"].pack(gradient, 0, 0), z, 0)
    assert torch.allclose(got, gradient + 0.5 * (z - arrived)) and not torch.allclose(z, arrived)
    assert list(coders(CodecsConfig(CodecConfig(**fields)), 200)) == ["smashed"]


@pytest.mark.parametrize("fields", LENGTHS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_number_that_is_none_still_shows(fields, wrong):
    """A run that diverges must be seen to."""
    x, of = torch.randn(SHAPE, generator=generator(7)), coder(**dict(fields))
    x[1, 2, 3, 1] = wrong
    arrived = of.unpack(of.pack(x, 0, 0), x, 0)
    saturates = dict(fields).get("name") in ("float16", "bfloat16") and wrong == math.inf
    assert arrived.isfinite().all() == saturates


def test_nonsense_that_is_packed_is_refused():
    x = torch.randn(3, 21, generator=generator(8))
    few, many = coder(name="top_k", rate=0.05), coder(name="top_k", rate=0.5)
    for of, places in ((few, 255), (many, 0)):
        packed = of.pack(x, 0, 0)
        with pytest.raises(ValueError, match="places"):
            of.unpack(packed | {"places": torch.full_like(packed["places"], places)}, x, 0)
    of = coder(name="product", pieces=7, centres=5)
    packed = of.pack(x, 0, 0)
    with pytest.raises(ValueError, match="from 0 to 4"):
        of.unpack(packed | {"codes": torch.full_like(packed["codes"], 255)}, x, 0)
    with pytest.raises(ValueError, match=r"codec\.smashed\.pieces=8: .*21 numbers"):
        coder(name="product", pieces=8).pack(x, 0, 0)


def test_as_many_as_there_are_is_everything():
    x = torch.randn(SHAPE, generator=generator(9))
    whole = top_k(x, 1.0)
    assert whole["numbers"].shape == (3, 105) and torch.equal(whole["numbers"].flatten(), x.flatten())
    assert CodecConfig("top_k", rate=1.0) == CodecConfig("random_top_k", rate=1.0) == CodecConfig(bits=32)
    assert coders(CodecsConfig(CodecConfig("top_k", rate=1.0)), 0) == {}


def test_half_precision_saturates_and_other_types_come_back_as_they_were():
    x = torch.tensor([[1e6, -1e6, 1.0]])
    of = coder(name="float16")
    assert of.unpack(of.pack(x, 0, 0), x, 0).tolist() == [[65504, -65504, 1]]
    for name in CODECS:
        of = coder(name=name, bits=4, pieces=2)
        double = torch.randn(2, 6, dtype=torch.float64)
        assert of.unpack(of.pack(double, 0, 0), double, 0).dtype == torch.float64


def test_texts_share_a_range_by_feature_and_pictures_by_channel():
    for shape, groups in (((2, 9, 4), 4), ((2, 4, 3, 3), 4), ((2, 4), 4)):
        assert quantise(torch.randn(shape), 4, "channel")["range"].shape == (groups, 2)
