"""The networks: their shapes, sizes and what they refuse."""

import pytest
import torch

import mirrormask as mm
from mirrormask.train import models

SHAPES = {"mlp": (1, 8, 8), "lenet-300-100": (1, 28, 28), "resnet20": (3, 32, 32), "resnet7": (3, 32, 32)}
SHAPES["resnet18-cifar"] = (3, 32, 32)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_each_model_gives_one_score_a_class(name):
    assert set(SHAPES) == set(models.MODELS)
    model = models.build(name, SHAPES[name], 7)
    assert model.training
    assert model(torch.rand(3, *SHAPES[name])).shape == (3, 7)


@pytest.mark.parametrize(
    ("name", "numel"),
    [
        ("mlp", 64 * 256 + 256 * 128 + 128 * 10),
        ("lenet-300-100", 784 * 300 + 300 * 100 + 100 * 10),  # 266,200, as in the pruning literature
        ("resnet20", 268_336),  # He et al., table 6: 0.27M parameters
        ("resnet7", 32 * 3 * 16 + 9 * (32 * 32 + 64 * 32 + 64 * 64 + 128 * 64 + 128 * 128) + 1280),
    ],
)
def test_the_known_numbers_of_weights(name, numel):
    assert mm.sparsity(models.build(name, SHAPES[name], 10)).numel == numel


def test_a_stride_in_the_stem_keeps_the_weights_and_shrinks_the_image():
    model = models.build("resnet20", (3, 32, 32), 10, stem_stride=2)
    assert mm.sparsity(model).numel == 268_336
    assert model.conv1(torch.rand(1, 3, 32, 32)).shape == (1, 16, 16, 16)


def test_pooling_before_the_norm_of_resnet7_is_pooling_after_it():
    """With a positive scale the norm and ReLU keep the order of values, so that the same one is the largest."""
    unit = models.build("resnet7", (3, 32, 32), 10).widen1.eval()
    x = torch.randn(2, 32, 8, 8)
    after = torch.nn.functional.max_pool2d(torch.relu(unit.bn(unit.conv(x))), 2)
    torch.testing.assert_close(unit(x), after)


def test_torchvision_models_get_the_classes_of_the_data():
    assert models.build("torchvision:squeezenet1_1", (3, 64, 64), 5)(torch.rand(2, 3, 64, 64)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "shape", "options", "error", "message"),
    [
        ("lenet", (1, 28, 28), {}, ValueError, "unknown model 'lenet'.*lenet-300-100.*torchvision:NAME"),
        ("torchvision:resnet19", (3, 32, 32), {}, ValueError, "unknown torchvision model 'resnet19'.*resnet18"),
        (
            "mlp",
            (1, 8, 8),
            {"width": 3},
            TypeError,
            "model 'mlp' does not take the option 'width'; its options: hidden",
        ),
        ("lenet-300-100", (1, 8, 8), {"hidden": [3]}, TypeError, "it has no options"),
        ("mlp", (1, 8, 8), {"hidden": [0]}, ValueError, "hidden=0 is below 1"),
        ("resnet7", (3, 7, 32), {}, ValueError, "8x8 pixels or more, not 3x7x32"),
        ("resnet7", (3, 32, 32), {"width": 0}, ValueError, "width=0 is below 1"),
        ("torchvision:resnet18", (1, 32, 32), {}, ValueError, "does not take images of 1x32x32.*data.channels"),
        ("torchvision:googlenet", (3, 32, 32), {}, ValueError, "of two it makes a GoogLeNetOutputs in training, not a"),
        ("torchvision:resnet18", (3, 32, 32), {"depth": 3}, TypeError, "resnet18 does not take these options"),
    ],
)
def test_what_does_not_fit_is_refused(name, shape, options, error, message):
    with pytest.raises(error, match=message):
        models.build(name, shape, 10, **options)
