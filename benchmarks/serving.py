"""Requests a second of ``mirrormask serve`` under load, beside ONNX Runtime behind the same server.

    python benchmarks/serving.py                                        # under five minutes
    python benchmarks/serving.py --seconds 5 --rounds 1 --requests 0    # a short try

ResNet-20 for 32 x 32 images, sparse in the one and dense in the other; locust's clients ask for one image at a time,
each again as soon as it is answered. The servers take turns, each alone on the machine while it is asked. On two cores
or more the server has one and the clients the others. Then the sparse model is asked on until ``--requests`` in all,
for ``--longest`` seconds at most: none may be lost, which is checked by the clients' and by the server's own count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mirrormask as mm
from mirrormask.machine.cache import processor_name
from mirrormask.runtime.bundle.loaded import Port
from networks import NETWORKS, build

USER = Path(__file__).parent / "load_generator" / "infer.py"
OURS, THEIRS = "mirrormask", "onnxruntime"
SHAPE = NETWORKS["resnet20-b1"].shape[1:]


class Rival:
    """What the server wants of a model, of a session of ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.name = self.session.get_inputs()[0].name
        self.inputs = (Port("input", (None, *SHAPE), (1, *SHAPE)),)
        self.outputs = (Port("output", (None, 10), (1, 10)),)
        self.variants = (self,)

    def check(self, arrays: dict[str, np.ndarray]) -> None:
        if set(arrays) != {"input"} or arrays["input"].shape[1:] != SHAPE:
            raise ValueError(f"the input is 'input' of [any, {SHAPE}]")

    def run(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"output": self.session.run(None, {self.name: arrays["input"]})[0]}


def serve(kind: str, folder: Path, core: int | None) -> None:
    """A server of one model as ``m``, until SIGTERM; prints its address."""
    import socket

    import uvicorn

    from mirrormask.serve.app import application

    if core is not None:
        os.sched_setaffinity(0, {core})
    model: Any = mm.runtime.load(folder / "m.mirror", threads=1) if kind == OURS else Rival(folder / "m.onnx")
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(application({"m": model}), log_level="warning", access_log=False, lifespan="on")
    uvicorn.Server(config).run(sockets=[listener])


def prepare(folder: Path, sparsity: float) -> None:
    """The compiled sparse model, and the dense one for the rival, of any batch size."""
    model, x = build(NETWORKS["resnet20-b1"], sparsity)
    fast = mm.compile(model, x, force=True)
    fast(torch.zeros(16, *SHAPE))
    fast.save(folder / "m.mirror")
    dense, x = build(NETWORKS["resnet20-b1"], 0.0)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.onnx.export(dense, (torch.cat([x, x]),), dynamo=True, verbose=False, dynamic_shapes=({0: batch},))
    assert program is not None
    program.save(str(folder / "m.onnx"))


def ask(address: str, seconds: float, users: int, folder: Path, cores: set[int] | None) -> tuple[dict[str, Any], int]:
    """Milliseconds and failures of a run of locust, and how many requests the server says it answered meanwhile."""
    with urllib.request.urlopen(f"http://{address}/v2/models/m") as response:
        (port,) = json.load(response)["inputs"]
    x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)).numpy().astype("<f4")
    row = {
        "name": port["name"],
        "shape": list(x.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": x.nbytes},
    }
    head = json.dumps({"inputs": [row], "parameters": {"binary_data_output": True}}).encode()
    settings = {"body": (head + x.tobytes()).hex(), "json": len(head), "path": "/v2/models/m/infer", "least": 40}
    out = folder / "asked.json"
    before = answered(address)
    command = [sys.executable, "-m", "locust", "-f", str(USER), "--headless", "-u", str(users), "-r", str(users)]
    command += ["-t", f"{max(1, round(seconds))}s", "-s", "5", "--host", f"http://{address}", "--only-summary"]
    environment = {**os.environ, "MIRRORMASK_LOAD": json.dumps({**settings, "out": str(out)})}
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
    )
    if not out.exists():
        raise RuntimeError(f"locust failed:\n{done.stderr[-2000:]}")
    found = json.loads(out.read_text())
    out.unlink()
    return found, answered(address) - before


def answered(address: str) -> int:
    """How many requests the server says it has answered well."""
    with urllib.request.urlopen(f"http://{address}/metrics") as response:
        text = response.read().decode()
    return int(float(next(iter(re.findall(r'mirrormask_requests_total\{model="m",status="200"\} (\S+)', text)), 0)))


def row(kind: str, turns: list[dict[str, Any]], seconds: float) -> str:
    times = np.concatenate([turn["milliseconds"] for turn in turns])
    rate = statistics.median(len(turn["milliseconds"]) / seconds for turn in turns)
    failures = sum(len(turn["failures"]) for turn in turns)
    p50, p99 = np.percentile(times, [50, 99])
    return f"| {kind} | {len(times):,} | {failures} | {rate:,.0f} | {p50:.2f} ms | {p99:.2f} ms |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--requests", type=int, default=100_000, help="of the sparse model in all")
    parser.add_argument("--longest", type=float, default=90, help="seconds that are added for those, at most")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--serve", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    all_cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    core = all_cores[0] if len(all_cores) > 1 else None
    if asked.serve:
        serve(asked.serve[0], Path(asked.serve[1]), core)
        return
    with tempfile.TemporaryDirectory() as name:
        folder, servers = Path(name), {}
        prepare(folder, asked.sparsity)
        try:
            for kind in (OURS, THEIRS):
                command = [sys.executable, __file__, "--serve", kind, name]
                servers[kind] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            addresses = {kind: server.stdout.readline().strip() for kind, server in servers.items() if server.stdout}
            wait(addresses)
            cores = set(all_cores[1:]) if core is not None else None
            turns_of = f"{asked.rounds} turns of {asked.seconds:g} s"
            print(f"{processor_name()}; ResNet-20, {asked.sparsity:.0%} zeros and dense; {turns_of}")
            print("| server, clients | answered | failed | a second | p50 | p99 |\n|---|---|---|---|---|---|")
            sent = counted = failed = 0
            for users in asked.users:
                turns: dict[str, list[dict[str, Any]]] = {kind: [] for kind in addresses}
                for _ in range(asked.rounds):
                    for kind, address in addresses.items():
                        found, count = ask(address, asked.seconds, users, folder, cores)
                        turns[kind].append(found)
                        if kind == OURS:
                            sent, counted = sent + len(found["milliseconds"]), counted + count
                            failed += len(found["failures"])
                for kind, of_kind in turns.items():
                    print(row(f"{kind}, {users}", of_kind, asked.seconds), flush=True)
            end = time.monotonic() + asked.longest
            while sent < asked.requests and time.monotonic() < end:
                found, count = ask(addresses[OURS], 15, asked.users[-1], folder, cores)
                sent, counted = sent + len(found["milliseconds"]), counted + count
                failed += len(found["failures"])
                if not found["milliseconds"]:
                    break
            # At the end of a run locust drops its clients, whose last requests the server may have answered.
            lost = max(0, sent - counted)
            print(f"{OURS}: {sent:,} answers at the clients, {counted:,} at the server, {failed} failed, {lost} lost")
        finally:
            for server in servers.values():
                server.send_signal(signal.SIGTERM)
            for server in servers.values():
                server.wait(20)


def wait(addresses: dict[str, str]) -> None:
    """Until all servers are ready."""
    for address in addresses.values():
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://{address}/v2/health/ready") as response:
                    if response.status == 200:
                        break
            except OSError:
                time.sleep(0.1)


if __name__ == "__main__":
    main()
