"""``mirrormask serve`` as a process: the Open Inference Protocol by its public client and by hand, and the end."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mirrormask as mm

pytest.importorskip("uvicorn")
from mirrormask.runtime.bundle.read import load
from mirrormask.serve.command import listen

SOURCE = str(Path(mm.__path__[0]).parent)
MEGABYTE = 1 << 20


class Server:
    """A server of a small model of images."""

    def __init__(self, folder, *options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        self.fast = mm.compile(model.eval(), torch.randn(2, 3, 12, 12), tune=False, force=True)
        self.path = folder / "small.mirror"
        self.fast.save(self.path)
        stub = folder / "stub"
        stub.mkdir(exist_ok=True)
        (stub / "torch.py").write_text("raise ImportError('a server needs no torch')")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(stub), SOURCE]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "mirrormask.cli", "serve", str(folder / "small.mirror"), "--port", "0"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([*command, *options], env=environment, **pipes)
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("serving on http://"):
                self.port = int(line.rpartition(":")[2])
                return
        raise AssertionError(self.process.stderr.read())

    def ask(self, method, path, body=None, headers=None):
        """(status, the answer's JSON or bytes, headers)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        data = response.read()
        connection.close()
        plain = "json" in response.headers.get("content-type", "")
        return response.status, json.loads(data) if plain else data, response.headers

    def infer(self, said, tail=b"", headers=None):
        text = said if isinstance(said, bytes) else json.dumps(said).encode()
        headers = {"Inference-Header-Content-Length": str(len(text)), **(headers or {})} if tail else headers
        return self.ask("POST", "/v2/models/small/infer", text + tail, headers)

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        out, error = self.process.communicate(timeout=60)
        return self.process.returncode, out, error


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("serve"), "--max-body-mb", "1", "--delay-ms", "5")
    yield made
    made.end()


def tensor(x, **more):
    return {"name": "input", "shape": list(x.shape), "datatype": "FP32", "data": x.reshape(-1).tolist(), **more}


def images(count=2, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 12, 12)).astype(np.float32)


def same(server, got, x):
    np.testing.assert_allclose(got, server.fast(torch.from_numpy(x)).numpy(), rtol=1e-5, atol=1e-6)


def test_health_and_metadata(server):
    assert server.ask("GET", "/v2/health/live")[0] == server.ask("GET", "/v2/health/ready")[0] == 200
    assert server.ask("GET", "/v2/models/small/ready")[:2] == (200, {"name": "small", "ready": True})
    said = server.ask("GET", "/v2/models/small/versions/1")[1]
    assert said["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 3, -1, -1]}]
    assert said["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [-1, 5]}]
    assert server.ask("GET", "/v2")[1]["extensions"] == ["binary_tensor_data"]


def test_json_flat_and_nested_and_bytes(server):
    x = images()
    for data in (x.reshape(-1).tolist(), x.tolist()):
        status, said, _ = server.infer({"id": "mine", "inputs": [tensor(x, data=data)]})
        assert status == 200 and said["id"] == "mine" and said["outputs"][0]["shape"] == [2, 5]
        same(server, np.array(said["outputs"][0]["data"], np.float32).reshape(2, 5), x)
    row = {"name": "input", "shape": [2, 3, 12, 12], "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}}
    asked = {"inputs": [row], "outputs": [{"name": "output", "parameters": {"binary_data": True}}]}
    status, body, headers = server.infer(asked, x.tobytes())
    size = int(headers["Inference-Header-Content-Length"])
    assert status == 200 and json.loads(body[:size])["outputs"][0]["parameters"] == {"binary_data_size": 40}
    same(server, np.frombuffer(body[size:], np.float32).reshape(2, 5), x)


def test_the_public_client(server):
    client_library = pytest.importorskip("tritonclient.http")
    client = client_library.InferenceServerClient(f"127.0.0.1:{server.port}")
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("small")
    assert client.get_model_metadata("small")["name"] == "small"
    x = images(3)
    for binary in (True, False):
        given = client_library.InferInput("input", list(x.shape), "FP32")
        given.set_data_from_numpy(x, binary_data=binary)
        asked = client_library.InferRequestedOutput("output", binary_data=binary)
        for outputs in ([asked], None):
            same(server, client.infer("small", [given], outputs=outputs).as_numpy("output"), x)
    with pytest.raises(client_library.InferenceServerException, match="there is no model 'large'; there are: small"):
        client.infer("large", [given])
    client.close()


X = images()
BAD = {
    "no json": (b"{", 400, "the body is not JSON"),
    "deep": (b"[" * 200_000, 400, "the body is not JSON"),
    "a list": (b"[]", 400, "needs a list 'inputs'"),
    "no inputs": ({"inputs": []}, 400, "needs a list 'inputs'"),
    "another input": ({"inputs": [tensor(X, name="image")]}, 400, "there is no input 'image'; the inputs are input"),
    "twice": ({"inputs": [tensor(X), tensor(X)]}, 400, "the input 'input' is there twice"),
    "channels": ({"inputs": [tensor(X[:, :2])]}, 400, "it takes input [any, 3, any, any]"),
    "too small": ({"inputs": [tensor(X[:, :, :2, :2])]}, 400, "the file holds no model for input [2, 3, 2, 2]"),
    "type": ({"inputs": [tensor(X, datatype="INT64")]}, 400, "has the datatype INT64; this model takes FP32"),
    "few numbers": ({"inputs": [tensor(X, data=[1.0])]}, 400, "needs 864 numbers in 'data'"),
    "texts": ({"inputs": [tensor(X, data=["a"] * 864)]}, 400, "needs 864 numbers"),
    "bools": ({"inputs": [tensor(X, data=[True] * 864)]}, 400, "needs 864 numbers"),
    "ragged": ({"inputs": [tensor(X, data=[[1.0], [1.0, 2.0]])]}, 400, "needs 864 numbers"),
    "nested in another order": (
        {"inputs": [tensor(X, data=X.transpose(0, 2, 3, 1).tolist())]}, 400, "nested as [2, 12, 12, 3]; they differ",
    ),
    "beyond fp32": ({"inputs": [tensor(X, data=[1e39] + [0.0] * 863)]}, 400, "numbers beyond 3.4e38"),
    "no text": ({"inputs": [tensor(X, shape="\ud800")]}, 400, "it is a list of sizes"),
    "no text either": ({"inputs": [tensor(X, datatype="\udfff")]}, 400, "this model takes FP32"),
    "more than binary64": ({"inputs": [tensor(X, data=["1e400"])]}, 400, "numbers beyond 3.4e38"),
    "not a number": ({"inputs": [tensor(X, data=[float("nan")] * 864)]}, 400, "NaN is none of its numbers"),
    "both": ({"inputs": [tensor(X, parameters={"binary_data_size": 3456})]}, 400, "both 'data' and a binary_data_size"),
    "huge": ({"inputs": [tensor(X, shape=[1 << 30, 1 << 30, 4])]}, 413, "is larger than 1048576 bytes"),
    "none, and huge": ({"inputs": [tensor(X, shape=[0, 3, 30000, 30000], data=[])]}, 413, "is larger than 1048576"),
    "no shape at all": ({"inputs": [tensor(X, shape=[0, *[(1 << 31) - 1] * 3], data=[])]}, 413, "is larger than"),
    "negative": ({"inputs": [tensor(X, shape=[-2, 3, 12, 12])]}, 400, "it is a list of sizes"),
    "no such output": ({"inputs": [tensor(X)], "outputs": [{"name": "y"}]}, 400, "there is no output 'y'"),
    "shared memory": (
        {"inputs": [tensor(X, parameters={"shared_memory_region": "r"})]}, 400, "this server has no shared memory",
    ),
    "too long": (b"x" * (MEGABYTE + 1), 413, "longer than 1048576 bytes"),
    "infinite": ({"inputs": [tensor(np.full_like(X, 3e38))]}, 422, "NaN or infinity, which JSON cannot"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_is_one_clear_error(server, kind):
    said, status, words = BAD[kind]
    if kind == "more than binary64":
        said = json.dumps(said).replace('["1e400"]', str([1.0] * 863)[:-1] + ", 1e400]").encode()
    got = server.infer(said)
    assert got[0] == status and set(got[1]) == {"error"} and words in got[1]["error"], got[:2]
    assert len(got[1]["error"]) < 1000


def test_bad_bodies_of_bytes_and_bad_paths(server):
    row = {"name": "input", "shape": [1, 3, 12, 12], "datatype": "FP32", "parameters": {"binary_data_size": 1728}}
    for tail, words in ((b"1234", "takes 1728 bytes"), (b"0" * 1732, "4 bytes are left over")):
        status, said, _ = server.infer({"inputs": [row]}, tail)
        assert status == 400 and words in said["error"]
    for length in ("999999", "9" * 5000):
        lying = server.infer({"inputs": [row]}, b"1", {"Inference-Header-Content-Length": length})
        assert lying[0] == 400 and "the body has" in lying[1]["error"]
    assert server.ask("POST", "/v2/models/small/infer", b"x", {"Content-Encoding": "gzip"})[0] == 415
    assert server.ask("GET", "/v2/models/small/versions/7")[0] == server.ask("GET", "/nothing")[0] == 404
    assert server.ask("GET", "/v2/models/small/infer")[0] == 405
    with socket.create_connection(("127.0.0.1", server.port)) as rude:  # a client that goes in the middle
        rude.sendall(b"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert server.ask("GET", "/v2/health/ready")[0] == 200


def test_empty_batches_and_nulls_for_what_may_be_left_out(server):
    row = {**tensor(X[:0]), "parameters": None}
    for more in ({}, {"parameters": None, "outputs": None}):
        status, said, _ = server.infer({"inputs": [row], **more})
        assert status == 200 and said["outputs"][0]["shape"] == [0, 5] and said["outputs"][0]["data"] == []


def test_a_connection_that_sends_no_whole_head_is_closed(tmp_path):
    server = Server(tmp_path, "--body-timeout", "1")
    used = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connections = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(2)]
    with connections[0] as silent, connections[1] as slow, contextlib.closing(used):
        slow.sendall(b"GET /v2 HT")
        for _ in range(8):  # what is in use stays
            used.request("POST", "/v2/models/small/infer", json.dumps({"inputs": [tensor(X)]}))
            assert used.getresponse().read()
            kept = used.sock
            threading.Event().wait(0.2)
        assert used.sock is kept
        kept.sendall(b"GET /v2 HT")
        assert silent.recv(1) == slow.recv(1) == kept.recv(1) == b""
    assert server.end()[0] == 0


@pytest.mark.parametrize(
    ("limits", "status", "words"),
    [({"patience": 0.05}, 408, "after 0.05 s there are 3 bytes"), ({"bodies": 2}, 503, "of other requests fill")],
)
def test_slow_and_many_bodies_are_not_kept(server, limits, status, words):
    from mirrormask.serve.app import Limits, application

    said, parts = [], [{"type": "http.request", "body": b"{ }", "more_body": True}]
    app = application({"small": load(server.path)}, Limits(**limits))
    path = "/v2/models/small/infer"
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b"", "http_version": "1.1"}

    async def receive():
        return parts.pop() if parts else await asyncio.Event().wait()

    async def send(message):
        said.append(message)

    async def asked():
        async with app.router.lifespan_context(app):
            await app(scope, receive, send)

    asyncio.run(asyncio.wait_for(asked(), 30))
    assert said[0]["status"] == status and words in json.loads(said[1]["body"])["error"]


def test_many_at_once_each_get_their_own_rows(server):
    given = [images(1 + i % 3, seed=i) for i in range(60)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda x: server.infer({"inputs": [tensor(x)]}), given))
    for x, (status, said, _) in zip(given, answers, strict=True):
        assert status == 200
        same(server, np.array(said["outputs"][0]["data"], np.float32).reshape(len(x), 5), x)
    text = server.ask("GET", "/metrics")[1].decode()
    rows = {line.partition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    assert rows['mirrormask_requests_total{model="small",status="200"}'] >= 60
    assert rows['mirrormask_batch_rows_count{model="small"}'] < rows['mirrormask_batch_rows_sum{model="small"}']
    assert rows['mirrormask_waiting{model="small"}'] == 0 and 'status="400"' in text


def test_sigterm_answers_what_waits_and_ends(tmp_path):
    server, found = Server(tmp_path, "--delay-ms", "800"), []
    asking = threading.Thread(target=lambda: found.append(server.infer({"inputs": [tensor(X)]})))
    asking.start()
    threading.Event().wait(0.3)
    status, out, error = server.end()
    asking.join()
    assert status == 0 and "stopped" in out and not error, error
    assert found[0][0] == 200


def test_mistakes_on_the_command_line(tmp_path, capsys):
    from mirrormask.cli import main

    assert main(["serve", str(tmp_path / "nothing.mirror")]) == 2
    (tmp_path / "x.mirror").write_bytes(struct.pack("<Q", 9) + b"{}")
    assert main(["serve", str(tmp_path / "x.mirror")]) == 2
    assert main(["serve", str(tmp_path / "x.mirror"), "--max-batch", "0"]) == 2
    assert main(["serve", str(tmp_path / "x.mirror"), "--port", "70000"]) == 2
    assert main(["serve", "a.mirror", "b.mirror", "--name", "c"]) == 2
    error = capsys.readouterr().err
    assert "--port is above 65,535" in error and "--name='c' is for one file, and there are 2" in error
    assert "No such file" in error and "the header claims" in error and "--max-batch=0 is below 1" in error


def test_an_answer_does_not_wait_for_the_client_to_confirm_its_head():
    listener = listen("127.0.0.1", 0)
    with listener, socket.create_connection(listener.getsockname()), listener.accept()[0] as connection:
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_addresses_of_both_versions():
    try:
        listener = listen("::1", 0)
    except OSError:
        pytest.skip("no IPv6 here")
    with listener, socket.create_connection(listener.getsockname()[:2]):
        port = listener.getsockname()[1]
        with pytest.raises(OSError, match=rf"--host ::1 --port {port}"):
            listen("::1", port)
    with listen("::", 0) as everywhere:
        for host in ("::1", "127.0.0.1"):
            socket.create_connection((host, everywhere.getsockname()[1])).close()
    with pytest.raises(OSError, match="--host no host --port 0"):
        listen("no host", 0)
