"""Networks that people run: they must stay in the plan, and agree with eager PyTorch."""

from typing import Any

import pytest
import torch
from torch import nn

import mirrormask as mm

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}


@pytest.fixture(autouse=True)
def _own_cache(nothing_is_settled, tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))


def vit() -> nn.Module:
    return models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10)


@pytest.mark.parametrize(
    ("name", "make", "size", "whole"),
    [
        ("resnet18", models.resnet18, 64, True),
        ("resnet50", models.resnet50, 64, True),
        ("mobilenet_v2", models.mobilenet_v2, 64, True),
        ("vgg11_bn", lambda: models.vgg11_bn(num_classes=10), 32, True),
        ("vit", vit, 32, True),
    ],
)
@pytest.mark.cases(1)
def test_networks(name, make, size, whole):
    model = make().eval()
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.weight.data *= torch.rand_like(m.weight) > 0.9
            m.weight.data *= 10**0.5
    x = torch.randn(2, 3, size, size)
    fast = mm.compile(model, x, tune=False, force=True)
    assert fast.report.compiled, str(fast.report)
    assert (fast.report.regions == 1 and not fast.report.left) == whole, fast.report.left
    layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
    inside_attention = 2 * 2 if name == "vit" else 0  # projections that torch's attention keeps to itself
    assert sum(bool(row.shape) for row in fast.report.layers) >= layers - inside_attention
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def swin() -> nn.Module:
    return models.SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=10).eval()


@pytest.mark.parametrize("bias", ["other", "alike", "none"])
def test_windows_come_from_the_cache_and_their_biases_from_the_model(bias, monkeypatch):
    """A bias that is zero, or alike for all heads, makes another program: not one that the cache holds may be used."""
    x = torch.randn(2, 3, 32, 32)
    assert not mm.compile(swin(), x, tune=False, force=True).report.cached
    other = swin()
    with torch.no_grad():
        for name, table in other.named_parameters():
            if name.endswith("relative_position_bias_table"):
                table.copy_(torch.randn(49, 2) if bias == "other" else torch.randn(49, 1).expand(49, 2))
                table.mul_(0.0 if bias == "none" else 1.0)
    if bias == "other":
        monkeypatch.setattr("mirrormask.runtime.model.piece.capture", None)
    fast = mm.compile(other, x, tune=False, force=True)
    assert fast.report.regions == 1, fast.report.left
    with torch.no_grad():
        expected = other(x)
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def bert(transformers: Any) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL))


def gpt2(transformers: Any) -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "use_cache": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama(transformers: Any) -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=1, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def t5(transformers: Any) -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes))


# Of so short a sequence BERT's pooler, a layer on one token, is a region of its own.
@pytest.mark.parametrize(("make", "regions"), [(bert, 2), (gpt2, 1), (llama, 1), (t5, 1)])
def test_a_transformer_of_hugging_face_is_one_region_behind_its_embeddings(make, regions):
    model = make(pytest.importorskip("transformers", reason="transformers is not installed")).eval()
    tokens = torch.randint(50, (1, 24))
    fast = mm.compile(model, tokens, tune=False, force=True)
    assert fast.report.compiled and fast.report.regions == regions, str(fast.report)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mirrormask.runtime.model.piece.capture", lambda *_: pytest.fail("captured again"))
        again = mm.compile(model, tokens, tune=False, force=True)
    for length in (24, 17):
        with torch.no_grad():
            expected = model(tokens[:, :length])
        for found in (fast(tokens[:, :length]), again(tokens[:, :length])):
            assert type(found) is type(expected)
            torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5 * float(expected[0].abs().max()))
