"""Networks that people run: they must stay in the plan, and agree with eager PyTorch."""

import pytest
import torch
from torch import nn

import mirrormask as mm

models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
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
