"""Without the extras the library trains, saves and loads, and says what to install for the rest."""

import subprocess
import sys

SCRIPT = """
import importlib.util, sys
import torch, torch._dynamo

EXTRAS = (
    "llvmlite scipy rich jsonargparse sklearn torchvision accelerate tensorboard matplotlib plotly onnx "
    "transformers lightning pytorch_lightning timm datasets"
).split()


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ModuleNotFoundError(name)


for name in [name for name in sys.modules if name.split(".")[0] in EXTRAS]:
    del sys.modules[name]
sys.meta_path.insert(0, Missing())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in EXTRAS else find_spec(name, package)

import mirrormask as mm

model = torch.nn.Linear(20, 10)
base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
optimizer = mm.sparsify(model, base, mm.methods.mirror(0.9), steps=20)
for _ in range(20):
    optimizer.zero_grad()
    model(torch.randn(8, 20)).square().mean().backward()
    optimizer.step()
optimizer.finalize()
mm.save(model, sys.argv[1])
assert torch.equal(mm.load(sys.argv[1])["weight"], model.weight)
print(mm.sparsity(model).nonzeros)
print(mm.flow.scale(1.0).item())
assert not {"transformers", "lightning", "pytorch_lightning"} & set(sys.modules)
try:
    mm.compile(model.eval(), torch.randn(1, 20))
except ImportError as error:
    print(error)
"""


def test_the_core_needs_no_extra_and_names_the_missing_one(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "20",
        "0.5",
        "mm.compile needs llvmlite, which is not installed; run: pip install 'mirrormask[runtime]'",
    ]
