"""A sparse model in other formats, its tensors unchanged: ONNX, Core ML, PyTorch's CSR and 2:4 tensors, plain
safetensors."""  # fmt: skip

from mirrormask.storage.export.coreml import CoreMLExport, coreml
from mirrormask.storage.export.dense import dense
from mirrormask.storage.export.onnx import OPSET, OnnxExport, onnx
from mirrormask.storage.export.torch_sparse import torch_sparse
from mirrormask.storage.export.two_four import two_four

__all__ = ["OPSET", "CoreMLExport", "OnnxExport", "coreml", "dense", "onnx", "torch_sparse", "two_four"]
