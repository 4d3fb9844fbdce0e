from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from quant.kernels import use_kernels
from quant.kernels.int8_dynamic import saturates
from quant.layers.linear import QuantEmbedding, QuantLinear, quant_linears
from tests.fixtures.kernel_layers import (
    random_codes,
    random_input,
    relative_error,
    weight_in_float64,
)


class Tied(torch.nn.Module):
    """The head comes before the embedding, so that nothing rests on their order."""

    def __init__(self, bits=4):
        super().__init__()
        self.codes = random_codes(bits, 64)
        embedding = QuantEmbedding.from_codes(self.codes)
        self.head = QuantLinear.share(embedding)
        self.embedding = embedding


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_looks_rows_up(bits):
    codes = random_codes(bits, 32)
    embedding = QuantEmbedding.from_codes(codes, torch.float32)
    ids = torch.tensor([[0, 95, 3], [3, 7, 0]])
    found = embedding(ids)
    assert found.shape == (2, 3, 256) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), weight_in_float64(codes)[ids.numpy()], rtol=1e-6)
    assert QuantEmbedding.from_codes(codes)(ids).dtype == torch.bfloat16
    assert embedding(torch.zeros(0, dtype=torch.int64)).shape == (0, 256)


def test_casts_change_what_a_lookup_returns_and_moves_do_not():
    codes = random_codes(4, 64)
    model, ids = torch.nn.Sequential(QuantEmbedding.from_codes(codes)), torch.arange(96)
    for dtype in (torch.float16, torch.float64, torch.float32):
        assert torch.equal(model.to(dtype)(ids), codes.dequantize(dtype))
        assert model[0].scale.dtype == torch.float16
    model.half().to("meta")
    assert model[0].dtype == torch.float16


def test_int8_activations_of_a_tied_head():
    embedding = QuantEmbedding.from_codes(random_codes(8, 256, whole=True))
    head = QuantLinear.share(embedding, "int8")
    x = random_input(3, 256, torch.float32)  # which holds the sums of products exactly
    expected = QuantLinear.from_codes(embedding.unpacked(), activations="int8")(x)
    for prefer in ("plain", "speed"):
        use_kernels(head, prefer)
        assert torch.equal(head(x), expected)
    assert head.kernel == ("int8 x int8 in float32" if saturates() else "int8 x int8")
    with pytest.raises(ValueError, match="one scale per row, not with groups of 64"):
        QuantLinear.share(QuantEmbedding.from_codes(random_codes(8, 64)), "int8")


def test_an_embedding_is_never_laid_out_anew():
    embedding = QuantEmbedding.from_codes(random_codes(4, 64))
    held = embedding.codes
    assert use_kernels(embedding) == {}
    assert embedding.codes is held and embedding.stored()["codes"] is held


def test_a_tied_head_works_on_the_embeddings_codes():
    model = Tied()
    assert model.head.shared is model.embedding
    for name, tensor in model.embedding.stored().items():
        assert model.head.stored()[name] is tensor
    assert not list(model.head.buffers()) and not list(model.head.children())
    for prefer in ("plain", "speed"):
        use_kernels(model, prefer)
        assert (
            relative_error(model.head, random_input(3, 256), weight_in_float64(model.codes)) < 0.008
        )
        assert model.embedding.codes is model.head.stored()["codes"]
    assert model.head.kernel.startswith("int4")
    ids = torch.arange(96)
    assert torch.equal(model.embedding(ids), model.codes.dequantize(torch.bfloat16))


@pytest.mark.parametrize("prefer", ["plain", "speed"])
def test_the_tie_outlives_copies_pickles_and_moves(prefer):
    model = Tied()
    use_kernels(model, prefer)
    x = random_input(3, 256)
    expected = model.head(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.head.shared is other.embedding is not model.embedding
        assert other.head.stored()["codes"] is other.embedding.codes
        assert other.head.kernel == model.head.kernel
        assert torch.equal(other.head(x), expected)
        changed = random_codes(4, 64, seed=5)
        other.embedding.set_codes(changed)
        assert relative_error(other.head, x, weight_in_float64(changed)) < 0.008
    model.half()
    assert torch.equal(model.head(x), expected)
    model.to("meta")
    assert model.head.stored()["codes"] is model.embedding.codes
    assert model.embedding.codes.device.type == "meta"
    assert model.head.kernel == (
        "plain" if prefer == "plain" else "plain: no kernel for device meta"
    )
    for module in (Tied().head, Tied().embedding):  # by itself, with what it needs
        again = pickle.loads(pickle.dumps(module))
        assert torch.equal(again.stored()["codes"], module.stored()["codes"])


@pytest.mark.parametrize("assign", [False, True])
def test_what_the_embedding_loads_the_head_sees(assign):
    model, other = Tied(), Tied()
    changed = random_codes(4, 64, seed=9)
    other.embedding.set_codes(changed)
    use_kernels(model)
    state = other.state_dict()
    assert set(state) == {
        f"{a}.{b}" for a in ("head", "embedding") for b in ("codes", "scale", "zero")
    }
    model.load_state_dict(state, assign=assign)
    assert model.head.stored()["codes"] is model.embedding.codes
    assert relative_error(model.head, random_input(3, 256), weight_in_float64(changed)) < 0.008
    del state["head.codes"], state["head.scale"], state["head.zero"]
    model.load_state_dict(state)


def test_head_of_odd_vocabulary_with_bias():
    codes = random_codes(4, 64, rows=131)
    head = QuantLinear.share(QuantEmbedding.from_codes(codes))
    head.bias = torch.nn.Parameter(torch.ones(131).bfloat16(), requires_grad=False)
    x = random_input(2, 256)
    plain = head(x)
    use_kernels(head)
    assert list(quant_linears(head)) == [""] and head(x).shape == (2, 131)
    torch.testing.assert_close(head(x), plain, rtol=0.01, atol=0.1)
