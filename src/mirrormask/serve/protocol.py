"""The Open Inference Protocol (KServe v2) over HTTP: bodies to arrays and back, as JSON or with binary tensors.

A binary body is the JSON, whose length a header says, then the bytes of each tensor in order, little-endian.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.bundle.loaded import LoadedModel, Port

__all__ = ["LENGTH_HEADER", "BadRequest", "Request", "answer", "described", "parsed"]

Array = npt.NDArray[np.float32]

#: The header that says how many bytes of a body are JSON.
LENGTH_HEADER = "Inference-Header-Content-Length"
MOST_DIMENSIONS = 16
#: Digits of that header: Python refuses to read numbers of some thousands.
MOST_DIGITS = 20


class BadRequest(ValueError):
    """What is wrong with a request, for the client; ``status`` is HTTP's."""

    def __init__(self, fault: str, status: int = 400) -> None:
        super().__init__(fault)
        self.status = status


@dataclass(frozen=True)
class Request:
    """What a client asks for.

    Attributes:
        id: its own name for it, ``""`` for none.
        arrays: the inputs by name.
        outputs: name -> whether as bytes; those asked for.
    """

    id: str
    arrays: dict[str, Array]
    outputs: dict[str, bool]


def parsed(body: bytes, length: str | None, outputs: tuple[Port, ...], most: int) -> Request:
    """The request that a body holds.

    Args:
        length: of the header :data:`LENGTH_HEADER`, if there is one.
        outputs: of the model.
        most: bytes of an input, or of one of its items where there are none: a model is made ready for its size.

    Raises:
        BadRequest: it holds none; the message says where.
    """
    size = len(body)
    if length is not None:
        if not length.isdecimal() or len(length) > MOST_DIGITS or int(length) > size:
            raise BadRequest(f"{LENGTH_HEADER} is {length[:20]!r}, and the body has {size} bytes")
        size = int(length)
    try:
        said = json.loads(body[:size], parse_constant=_refused)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {str(error)[:100]}") from None
    if not isinstance(said, dict) or not isinstance(said.get("inputs"), list) or not said["inputs"]:
        raise BadRequest("the body needs a list 'inputs'")
    rest, arrays = memoryview(body)[size:], dict[str, Array]()
    for tensor in said["inputs"]:
        name, array, used = _tensor(tensor, rest, most)
        if name in arrays:
            raise BadRequest(f"the input {name!r} is there twice")
        arrays[name], rest = array, rest[used:]
    if len(rest):
        raise BadRequest(f"{len(rest)} bytes are left over after the inputs")
    name = said.get("id", "")
    if not isinstance(name, str) or len(name) > 256:
        raise BadRequest("'id' is a text of at most 256 characters")
    return Request(name, arrays, _wanted(said, outputs))


def answer(model: str, request: Request, results: Mapping[str, Array]) -> tuple[bytes, int | None]:
    """The body of an answer, and how many bytes of it are JSON where others follow.

    Raises:
        BadRequest: an output that JSON cannot hold was asked for as JSON.
    """
    rows, parts = [], list[bytes]()
    for name, binary in request.outputs.items():
        array = results[name]
        row: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(array.shape)}
        if binary:
            parts.append(array.astype("<f4", copy=False).tobytes())
            row["parameters"] = {"binary_data_size": array.nbytes}
        elif not np.isfinite(array).all():
            raise BadRequest(f"the output {name!r} holds NaN or infinity, which JSON cannot; ask for binary_data", 422)
        else:
            row["data"] = array.reshape(-1).tolist()
        rows.append(row)
    said = {"model_name": model, "model_version": "1", **({"id": request.id} if request.id else {}), "outputs": rows}
    text = json.dumps(said, separators=(",", ":")).encode()
    return b"".join([text, *parts]), len(text) if parts else None


def described(name: str, model: LoadedModel) -> dict[str, Any]:
    """What a model takes and gives, ``-1`` standing for any size."""
    rows = {
        "inputs": [_port(port) for port in model.inputs],
        "outputs": [_port(port) for port in model.outputs],
    }
    return {"name": name, "versions": ["1"], "platform": "mirrormask", **rows}


def _port(port: Port) -> dict[str, Any]:
    return {"name": port.name, "datatype": "FP32", "shape": [-1 if size is None else size for size in port.shape]}


def _wanted(said: dict[str, Any], outputs: tuple[Port, ...]) -> dict[str, bool]:
    known = [port.name for port in outputs]
    binary = _parameters(said, "the request").get("binary_data_output", False) is True
    asked = said.get("outputs")
    if asked is None or asked == []:
        return dict.fromkeys(known, binary)
    if not isinstance(asked, list):
        raise BadRequest("'outputs' is not a list")
    wanted: dict[str, bool] = {}
    for row in asked:
        name = row.get("name") if isinstance(row, dict) else None
        if name not in known:
            raise BadRequest(f"there is no output {str(name)[:80]!r}; the outputs are {', '.join(known)}")
        options = _parameters(row, f"the output {name!r}")
        if options.get("classification"):
            raise BadRequest(f"the output {name!r} is asked for as classes, which this server does not make")
        wanted[name] = options.get("binary_data", binary) is True
    return wanted


def _parameters(row: dict[str, Any], what: str) -> dict[str, Any]:
    found = row.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise BadRequest(f"'parameters' of {what} is not an object")
    if any(str(key).startswith("shared_memory") for key in found):
        raise BadRequest("this server has no shared memory; send the data")
    return found


def _refused(text: str) -> None:
    raise ValueError(f"{text} is none of its numbers; send the input as binary data")


def _tensor(tensor: Any, rest: memoryview, most: int) -> tuple[str, Array, int]:
    """The name and the array of an input, and how many of the binary bytes it took."""
    if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
        raise BadRequest("an input is an object with a text 'name'")
    name, shape, kind = tensor["name"][:200], tensor.get("shape"), tensor.get("datatype")
    if kind != "FP32":
        raise BadRequest(f"the input {name!r} has the datatype {str(kind)[:20]}; this model takes FP32")
    fitting = isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS
    if not fitting or any(type(size) is not int or not 0 <= size < 1 << 31 for size in shape):  # type: ignore[union-attr]
        raise BadRequest(f"the input {name!r} has the shape {str(shape)[:100]}; it is a list of sizes")
    assert isinstance(shape, list)
    count = math.prod(shape)
    if 4 * math.prod(size or 1 for size in shape) > most:
        raise BadRequest(f"the input {name!r} of shape {shape} is larger than {most} bytes", 413)
    size = _parameters(tensor, f"the input {name!r}").get("binary_data_size")
    if size is not None:
        if "data" in tensor:
            raise BadRequest(f"the input {name!r} has both 'data' and a binary_data_size; send one of them")
        if type(size) is not int or size != 4 * count or size > len(rest):
            raise BadRequest(f"the input {name!r} of shape {shape} takes {4 * count} bytes, not {str(size)[:20]}")
        return name, np.frombuffer(rest[:size], "<f4").astype(np.float32, copy=False).reshape(shape), size
    try:
        plain = np.asarray(tensor.get("data"))
    except (ValueError, RecursionError, OverflowError):
        plain = np.asarray(None)
    if plain.size != count or (count and plain.dtype.kind not in "if"):
        raise BadRequest(f"the input {name!r} of shape {shape} needs {count} numbers in 'data', flat or nested")
    if plain.ndim > 1 and count and list(plain.shape) != shape:  # of channels last, say: not the numbers' order
        raise BadRequest(f"the input {name!r} of shape {shape} has 'data' nested as {list(plain.shape)}; they differ")
    with np.errstate(over="ignore"):
        array = plain.astype(np.float32)
    if np.isinf(array).any():  # also of what Python reads as infinite, such as 1e400
        raise BadRequest(f"the input {name!r} has numbers beyond 3.4e38 in 'data', which FP32 cannot hold")
    return name, array.reshape(shape), 0
