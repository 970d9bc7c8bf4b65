"""The engines that a model is measured in: each gives the model's answer, in 8 bits nearly; what lacks is named."""

import importlib.util

import pytest
import torch
from torch import nn

from mirrormask.runtime import bench
from mirrormask.runtime.benchmark import BenchResult
from mirrormask.runtime.engines import INT8_ENGINES, prepare_engines


def test_an_engine_that_is_not_installed_is_named(monkeypatch):
    find = importlib.util.find_spec
    absent = {"openvino", "nncf", "onnxscript"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    model, x = nn.Linear(4, 3).eval(), torch.randn(1, 4)
    calls, missing = prepare_engines(model, x, 1, ["eager", *INT8_ENGINES])
    assert list(calls) == ["eager"]
    assert missing["openvino-int8"] == "openvino and nncf is not installed"
    assert missing["onnxruntime-int8"] == "onnxscript is not installed"


@pytest.mark.parametrize("name", INT8_ENGINES)
@pytest.mark.cases(1)
def test_what_is_quantized_gives_nearly_the_models_answer(name):
    for module in INT8_ENGINES[name][1]:
        pytest.importorskip(module)
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval(),
        torch.rand(1, 3, 8, 8),
    )
    with torch.no_grad():
        calls, missing = prepare_engines(model, x, 1, [name])
        expected = model(x)
    assert not missing
    error = float((torch.as_tensor(calls[name]()[0]) - expected).abs().max() / expected.abs().max())
    assert 0 < error < 0.25, "it computes the same, and not in fp32"


def test_the_rivals_in_fp32_and_in_8_bits_are_two():
    seconds = {"mirrormask": 1.0, "eager": 9.0, "openvino": 4.0, "openvino-int8": 2.0, "onnxruntime-int8": 3.0}
    spread = dict.fromkeys(seconds, (1.0, 2.0))
    result = BenchResult("a processor", 1, (1, 3), 0.9, seconds, spread, {}, {})
    assert (result.best_other, result.ratio, result.best_int8, result.int8_ratio) == ("openvino", 4, "openvino-int8", 2)
    assert result.as_dict()["int8_ratio"] == 2
    alone = BenchResult("a processor", 1, (1, 3), 0.9, {"mirrormask": 1.0, "eager": 9.0}, spread, {}, {})
    assert alone.best_int8 == "" and alone.int8_ratio is None


def test_an_unknown_engine_is_refused():
    with pytest.raises(ValueError, match="openvino-int8"):
        bench(nn.Linear(4, 3).eval(), torch.randn(1, 4), engines=("tensorrt",))
