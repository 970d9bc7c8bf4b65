"""A run's folder as bytes, to travel between machines that share no disk."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path, PurePosixPath

from mirrormask import files
from mirrormask.train import recipe_file
from mirrormask.train.recipe import Recipe
from mirrormask.train.run_folder import RunFolder

__all__ = ["pack", "unpack"]


def pack(folder: Path) -> bytes:
    """The files of a run, and nothing else that lies in its folder, as a zip archive; none if there is no folder."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name in RunFolder.NAMES:
            entry = folder / name
            for path in [entry] if entry.is_file() else sorted(entry.rglob("*")):
                if path.is_file():
                    zipped.write(path, path.relative_to(folder).as_posix())
    return archive.getvalue()


def unpack(archive: bytes, recipe: Recipe) -> None:
    """Write :func:`pack`'s files into the folder that ``recipe`` names, as if the run had been made there.

    Each file is written atomically and ``result.json`` last, so that whoever stops this finds an unfinished run.

    Args:
        archive: of a run of the same recipe, whatever its folder was.
        recipe: whose ``out`` is where the files go.

    Raises:
        ValueError: a file of the archive would land outside the folder.
        OSError: the disk is full, or the folder cannot be written.
    """
    folder = Path(recipe.out)
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:
        names = zipped.namelist()
        for name in names:
            parts = PurePosixPath(name).parts
            if name.startswith("/") or ".." in parts or parts[0] not in RunFolder.NAMES:
                raise ValueError(f"the archive of a run holds {name!r}, which is no file of a run")
        for name in (name for name in names if name not in ("result.json", "recipe.yaml")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(folder / name, zipped.read(name))
        if "recipe.yaml" in names:
            recipe_file.save(recipe, folder / "recipe.yaml")  # with this folder in it, not the far one
        if "result.json" in names:
            files.write_bytes(folder / "result.json", _moved(zipped.read("result.json"), recipe))


def _moved(text: bytes, recipe: Recipe) -> bytes:
    tree = json.loads(text)
    tree["folder"], tree["recipe"] = recipe.out, recipe_file.to_dict(recipe)
    return (json.dumps(tree, indent=1) + "\n").encode()
