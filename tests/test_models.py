"""models.py: the MLP and the GPT against their formulas written out, and what they refuse."""
import copy
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import models
import param


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gpt(dtype=torch.float64, seed=0, **kwargs):
    """Two layers, context 16, heads of 16; norm gains away from one, lest a gain left out pass."""
    model, base = (models.GPT(23, n, 2, 16, head_dim=16, **kwargs).to(dtype) for n in (64, 32))
    param.init_(model, base, "sp", seeded(seed))
    for gains in (p for p in model.parameters() if p.ndim == 1):
        drawn = torch.randn(gains.shape, generator=seeded(seed + 1), dtype=torch.float64)
        gains.data += 0.3 * drawn.to(dtype)
    return model


def some_tokens(*shape, seed=2):
    return torch.randint(23, shape, generator=seeded(seed))


# ---- MLP ----

@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("hidden_layers", [1, 3])
def test_the_mlp_is_its_matrix_products_written_out(hidden_layers, bias):
    model = models.MLP(12, 8, hidden_layers, 3, bias).double()
    x = torch.randn(5, 3, 4, generator=seeded(0), dtype=torch.float64)
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim == 1]
    shapes = [(8, 12)] + [(8, 8)] * (hidden_layers - 1) + [(3, 8)]
    assert [tuple(w.shape) for w in weights] == shapes and len(biases) == bias * len(weights)
    h = x.reshape(5, 12)
    for i, w in enumerate(weights):
        h = torch.einsum("bi,oi->bo", h, w) + (biases[i] if bias else 0)
        if i < hidden_layers:
            h = h * (h > 0)
    torch.testing.assert_close(model(x), h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes, words", [
    ({"width": 0}, "at least one.*width 0"),
    ({"hidden_layers": 0}, "at least one.*hidden_layers 0"),
    ({"hidden_layers": -1}, "at least one.*hidden_layers -1"),
    ({"d_out": 0}, "at least one.*d_out 0")])
def test_impossible_mlps_are_refused_with_the_remedy(sizes, words):
    with pytest.raises(ValueError, match=words):
        models.MLP(**{"d_in": 12, "width": 8, "hidden_layers": 3, "d_out": 3} | sizes)


# ---- GPT ----

def plain_norm(weights, name, x):
    x = x - x.mean(-1, keepdim=True)
    scaled = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights.get(name + ".weight", 1.0)


def plain_rotation(x, theta):
    """x (B, T, H, K): pairs of the first quarter of K as complex numbers."""
    r, t = x.shape[-1] // 8, torch.arange(x.shape[1], dtype=torch.float64)
    angle = t[:, None] * theta ** (-torch.arange(r, dtype=torch.float64) / r)
    z = torch.complex(x[..., :r], x[..., r:2 * r])
    z = z * torch.exp(1j * angle)[:, None, :].to(x.dtype.to_complex())
    return torch.cat([z.real, z.imag, x[..., 2 * r:]], dim=-1)


def plain_attention(weights, name, x, head_dim, qk_norm, theta):
    batch, length, width = x.shape
    qkv = (x @ weights[name + ".qkv.weight"].T).split(width, dim=-1)
    q, k, v = (part.reshape(batch, length, -1, head_dim) for part in qkv)
    if qk_norm:
        q, k = plain_norm(weights, name + ".norm_q", q), plain_norm(weights, name + ".norm_k", k)
    q, k = plain_rotation(q, theta), plain_rotation(k, theta)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(head_dim)
    weight = scores.exp() * torch.ones(length, length, dtype=x.dtype).tril()
    weight = weight / weight.sum(-1, keepdim=True)
    attended = torch.einsum("bhqk,bkhd->bqhd", weight, v).reshape(batch, length, width)
    return attended @ weights[name + ".proj.weight"].T


def plain_gpt_cross_entropy(weights, tokens, head_dim=16, qk_norm=True, theta=10000.0):
    """Per-token cross-entropy (B, T) of next-token prediction on tokens (B, T + 1), all written out."""
    x = weights["embedding.weight"][tokens[:, :-1]]
    for block in ("blocks.0.", "blocks.1."):
        h = plain_norm(weights, block + "norm_attention", x)
        attended = plain_attention(weights, block + "attention", h, head_dim, qk_norm, theta)
        up = plain_norm(weights, block + "norm_mlp", x) @ weights[block + "up.weight"].T
        gelu = up * (1 + torch.erf(up / math.sqrt(2))) / 2
        x = x + attended + gelu @ weights[block + "down.weight"].T
    logits = plain_norm(weights, "norm", x) @ weights["readout.weight"].T
    return logits.exp().sum(-1).log() - logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)


def cross_entropy_of_tokens(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.mark.parametrize("norm_affine", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_gpt_is_the_decoder_written_out(norm_affine, qk_norm):
    tokens = some_tokens(4, 13)                                 # fewer than the context
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = gpt(dtype, norm_affine=norm_affine, qk_norm=qk_norm)
        weights = dict(model.named_parameters())
        ours = cross_entropy_of_tokens(model, tokens)
        written_out = plain_gpt_cross_entropy(weights, tokens, qk_norm=qk_norm)
        torch.testing.assert_close(ours, written_out, rtol=tolerance, atol=tolerance)
        other = plain_gpt_cross_entropy(weights, tokens, qk_norm=qk_norm, theta=100.0)
        assert (ours - other).abs().max() > 1e-3
    assert all(("norm" in name) == (p.ndim == 1) for name, p in weights.items())
    assert sum(p.ndim == 1 for p in weights.values()) == norm_affine * (5 + 4 * qk_norm)
    gradients = [torch.autograd.grad(loss.mean(), list(weights.values())) for loss in (ours, written_out)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gpt_is_causal():
    model, tokens = gpt(), some_tokens(3, 16)
    other = tokens.clone()
    other[:, 9] = (tokens[:, 9] + 1) % 23
    change = (model(tokens) - model(other)).abs().amax(dim=(0, 2))          # (T,)
    assert change[:9].max() < 1e-12 and change[9:].min() > 1e-3


@pytest.fixture
def called():
    """(GPT, tokens, logits) in float32, with no rotary table made yet; in the end there is one."""
    model, tokens = gpt(torch.float32), some_tokens(3, 12)
    expected = model(tokens)
    models._ROTARY_TABLES.clear()
    yield model, tokens, expected
    assert list(models._ROTARY_TABLES) == [(16, 4, tokens.device, torch.float32)]


def meta_gpt():
    with torch.device("meta"):
        return models.GPT(23, 64, 2, 16, head_dim=16)


def test_gpt_first_called_under_inference_mode_can_be_trained(called):
    model, tokens, expected = called
    with torch.inference_mode():            # makes the table
        assert torch.equal(model(tokens), expected)
    torch.autograd.grad(model(tokens).sum(), list(model.parameters()))


def test_gpt_built_on_the_meta_device_is_the_same_function_of_its_weights(called):
    model, tokens, expected = called
    meta = meta_gpt()
    assert torch.equal(torch.func.functional_call(meta, dict(model.named_parameters()), (tokens,)), expected)
    fresh = meta.to_empty(device="cpu")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(tokens), expected)


def test_gpt_under_vmap_is_each_of_its_replicas(called):
    model, tokens, expected = called
    stacked = {name: torch.stack([p, p + 0.01]).detach() for name, p in model.named_parameters()}
    meta = meta_gpt()

    def forward(weights):
        return torch.func.functional_call(meta, weights, (tokens,))

    math_kernel = torch.nn.attention.SDPBackend.MATH        # the CPU's fused one has no vmap
    with torch.nn.attention.sdpa_kernel(math_kernel):
        both = torch.func.vmap(forward)(stacked)
    shifted = forward({name: w[1] for name, w in stacked.items()})
    torch.testing.assert_close(both, torch.stack([expected, shifted]), rtol=1e-4, atol=1e-5)


def test_gpt_in_bfloat16_and_under_autocast_is_close_and_makes_no_other_rotary_table(called):
    model, tokens, expected = called
    model(tokens)
    table = models.rotary_table(16, 4, tokens.device, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model(tokens)
    for logits in (under_autocast, copy.deepcopy(model).bfloat16()(tokens)):
        assert 0 < (logits - expected).abs().max() < 0.05 * expected.abs().max()
    assert models.rotary_table(16, 4, tokens.device, torch.float32)[0] is table[0]


def test_gpt_compiles_whole_and_once(called):
    model, tokens, expected = called
    model(tokens)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens), expected)
    models._ROTARY_TABLES.clear()           # a table made while compiling is kept: one more compilation
    assert torch.equal(compiled(tokens), expected) and torch.equal(compiled(tokens), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(tokens), expected)


@pytest.mark.parametrize("sizes, words", [
    ({"width": 48}, "width 48 is no multiple of head_dim 32; choose"),
    ({"head_dim": 4}, "head_dim 4 is no multiple of 8.*choose 8"),
    ({"layers": 0}, "at least one: .*layers 0"), ({"vocab_size": 0}, "vocab_size 0"),
    ({"context": 0}, "context 0"), ({"width": -32}, "width -32"), ({"head_dim": 0}, "head_dim 0")])
def test_impossible_gpts_are_refused_with_the_remedy(sizes, words):
    with pytest.raises(ValueError, match=words):
        models.GPT(**{"vocab_size": 23, "width": 64, "layers": 2, "context": 16} | sizes)


def test_more_tokens_than_context_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="17 tokens exceed context 16; .* context=17"):
        gpt()(some_tokens(2, 17))


# ---- what custom models share ----

def test_set_parameters_replaces_every_parameter_in_every_place_and_copies_nothing():
    model = models.MLP(12, 8, 3, 3, bias=True)
    model.layers[2].weight = model.layers[1].weight         # tied
    weights = [torch.randn(p.shape, generator=seeded(i), dtype=torch.float64)
               for i, p in enumerate(model.parameters())]
    assert models.set_parameters(model, weights) is model and len(weights) == 7
    new = list(model.parameters())
    assert [p.data_ptr() for p in new] == [w.data_ptr() for w in weights]
    assert model.layers[2].weight is model.layers[1].weight and new[2] is model.layers[1].weight
    x = torch.randn(5, 12, generator=seeded(9), dtype=torch.float64)
    model(x).sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in new)


def test_classes_of_a_shape_are_its_outputs():
    shape = models.Shape(784, 10, text=False)
    assert shape.classes == shape.outputs == 10 and shape == (784, 10, False)


def test_models_imports_torch_and_the_standard_library_only():
    text = Path(models.__file__).read_text()
    imported = re.findall(r"^\s*(?:from|import) ([A-Za-z_]+)", text, re.MULTILINE)
    assert "torch" in imported and set(imported) <= {"torch", *sys.stdlib_module_names}
