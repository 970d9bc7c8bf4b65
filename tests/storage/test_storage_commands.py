"""What the command line prints and writes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mirrormask as mm
from mirrormask.cli import main
from mirrormask.storage.commands import build_model, export_file, info


@pytest.fixture
def saved(tmp_path):
    layer = nn.Linear(64, 32)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(16)).add_(0.0)
    path = tmp_path / "layer.safetensors"
    mm.save(layer, path, metadata={"method": "pilot", "run": {"seed": 3}})
    return layer, path


ARGUMENTS = {"in_features": 64, "out_features": 32}


def test_info_prints_metadata_sizes_and_alternatives(saved, capsys):
    info(saved[1])
    text = capsys.readouterr().out
    assert "2 tensors, compressed by mirrormask" in text
    assert "method: pilot" in text
    assert 'run: {"seed": 3}' in text
    assert "sparsity: 0.5" in text
    row = next(line for line in text.splitlines() if line.startswith("weight "))
    # one of every two: 1024 blocks of a bit and a value each; a mask of 256 bytes; 1024 gaps
    for cell in ("32x64", "F32", "50.00%", "coded", "4,224", "8,192", "4,352", "5,120"):
        assert cell in row
    assert mm.predict_size(saved[0], metadata={"method": "pilot", "run": {"seed": 3}}).summary() in text


def test_info_reads_plain_files_too(tmp_path, capsys):
    save_file({"w": torch.ones(4)}, tmp_path / "plain.safetensors")
    info(tmp_path / "plain.safetensors")
    assert "1 tensors, plain safetensors" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_what_a_file_says_stays_in_its_line(tmp_path, capsys):
    path = tmp_path / "x"
    names = {"a\x1b[2J\nweight": torch.ones(4), "b" * 10_000: torch.ones(4)}
    mm.save({**names, "tied\n": names["b" * 10_000]}, path, metadata={"k\x07": "one\ntwo\x1b]0;title\x07"})
    assert main(["info", str(path)]) == 0
    text = capsys.readouterr().out
    assert not set(text) - set("\n") & {chr(code) for code in range(32)}
    assert r"a\x1b[2J\nweight" in text and r"k\x07: one\ntwo\x1b]0;title\x07" in text and r"tied\n is tied to b" in text
    assert max(map(len, text.splitlines())) < 1000


def test_export_to_every_format(saved, tmp_path, capsys):
    layer, path = saved
    export_file(path, tmp_path / "dense.safetensors", to="safetensors")
    assert torch.equal(load_file(tmp_path / "dense.safetensors")["weight"], layer.weight)
    export_file(path, tmp_path / "csr.pt", to="torch_sparse", model="torch.nn.Linear", model_args=ARGUMENTS)
    assert torch.load(tmp_path / "csr.pt", weights_only=True)["weight"].layout == torch.sparse_csr
    export_file(path, tmp_path / "24.pt", to="two_four", model="torch.nn.Linear", model_args=ARGUMENTS)
    packed = torch.load(tmp_path / "24.pt", weights_only=False)["weight"]
    assert torch.equal(packed.to_dense(), layer.weight.half())
    assert capsys.readouterr().out.count("bytes") == 3


def test_export_to_onnx(saved, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    options = {"model": "torch.nn.Linear", "model_args": ARGUMENTS, "input_shape": [2, 64]}
    export_file(saved[1], tmp_path / "layer.onnx", to="onnx", **options)
    assert "opset 18, within" in capsys.readouterr().out
    assert (tmp_path / "layer.onnx").stat().st_size > saved[0].weight.nbytes


def test_export_says_what_is_missing(saved, tmp_path):
    out = tmp_path / "x"
    with pytest.raises(ValueError, match="unknown format 'zip'"):
        export_file(saved[1], out, to="zip")
    with pytest.raises(ValueError, match=r"--to onnx needs --model package\.module\.function"):
        export_file(saved[1], out)
    with pytest.raises(ValueError, match="--to onnx needs --input_shape"):
        export_file(saved[1], out, model="torch.nn.Linear", model_args=ARGUMENTS)
    with pytest.raises(ValueError, match=r"cannot import 'torch\.nn\.Linar'"):
        build_model("torch.nn.Linar", {})
    with pytest.raises(TypeError, match=r"builtins\.dict returned a dict, not a torch"):
        build_model("builtins.dict", {})
    assert not out.exists()


def test_info_prints_the_size_of_zstd_beside_ours(saved, capsys, monkeypatch):
    import sys

    zstandard = pytest.importorskip("zstandard")
    layer, path = saved
    save_file({name: tensor.detach() for name, tensor in layer.state_dict().items()}, path.with_name("dense"))
    rival = len(zstandard.ZstdCompressor(level=19).compress(path.with_name("dense").read_bytes()))
    info(path)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("zstd -19"))
    said = int(line.split(": ")[1].split()[0].replace(",", ""))
    assert abs(said - rival) < 0.05 * rival and f"{path.stat().st_size / said:.2f} of that" in line
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    info(path)
    assert "zstd" not in capsys.readouterr().out


def test_info_tells_a_compiled_model(tmp_path, capsys):
    model = nn.Linear(20, 10).eval()
    mm.compile(model, torch.randn(2, 20), tune=False, force=True).save(tmp_path / "m.mirror")
    info(tmp_path / "m.mirror")
    assert "a compiled model: mirrormask.runtime.load runs it" in capsys.readouterr().out
