"""The download program against a server in this process: whole, interrupted, damaged and impossible downloads."""

import fcntl
import functools
import http.server
import io
import shutil
import threading
import time
import zipfile

import commands
import h5py
import pytest
from paths import ROOT

from policy.dataset import download
from policy.dataset.download import DATA_SETS, DataSet, main

MEMBER = "pusht/demos.zarr"
FILES = {f"{MEMBER}/.zgroup": b'{"zarr_format": 2}', f"{MEMBER}/data/img/0.0": bytes(range(256)) * 400}
HDF5 = "robomimic/lift/ph/demo.hdf5"


def zipped(files):
    """A zip file as bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; ranges: whether it honours Range; breaks: ends the first answer after that many bytes."""

    content, ranges, breaks, status = b"", True, None, 200

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []  # the Range header of every request


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        if server.status != 200 or start >= len(server.content):
            self.send_error(server.status if server.status != 200 else 416)
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.end_headers()
        self.wfile.write(body[: server.breaks])
        server.breaks = None

    def log_message(self, *_args):
        pass


@pytest.fixture(autouse=True)
def server(monkeypatch, tmp_path_factory):
    """A running server of a good archive; the table calls it "demos", and an HDF5 on the same server "lift"."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts
    with Server() as server:
        server.content = zipped({"pusht/readme.txt": b"not wanted", **FILES})
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setitem(DATA_SETS, "demos", DataSet(f"{url}/demos.zip", MEMBER))
        monkeypatch.setitem(DATA_SETS, "lift", DataSet(f"{url}/demo.hdf5", HDF5))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def hdf5(server, tmp_path_factory):
    """The content of the server, an HDF5."""
    path = tmp_path_factory.mktemp("source") / "demo.hdf5"
    with h5py.File(path, "w") as file:
        file["data/demo_0/states"] = list(range(3000))
    server.content = path.read_bytes()
    return server.content


call = functools.partial(commands.call, main)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_published_files_have_their_places():
    """The URLs of Diffusion Policy and robomimic, and the place that the task reads; nobody mixed did tool_hang."""
    url, place = DATA_SETS["pusht"]
    assert url == "https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip"
    assert f"source: data/{place}" in (ROOT / "config" / "task" / "pusht.yaml").read_text()
    hub = "https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/main/v1.5"
    for name, task in (("lift_ph", "lift/ph"), ("can_mh", "can/mh"), ("tool_hang_ph", "tool_hang/ph")):
        assert DATA_SETS[name] == (f"{hub}/{task}/demo_v15.hdf5", f"robomimic/{task}/demo_v15.hdf5")
    assert "tool_hang_mh" not in DATA_SETS


def test_the_member_is_unpacked_and_nothing_else_remains(server, tmp_path, capsys):
    for _ in range(2):  # what is there is not fetched again
        code, out, errors = call(capsys, "demos", "--output", tmp_path / "data")
        assert (code, errors) == (0, []) and str(tmp_path / "data" / MEMBER) in out
        assert contents(tmp_path / "data") == FILES and len(server.asked) == 1


def test_a_single_file_can_be_the_member(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "demos", DATA_SETS["demos"]._replace(place="pusht/readme.txt"))
    assert call(capsys, "demos", "--output", tmp_path)[0] == 0
    assert contents(tmp_path) == {"pusht/readme.txt": b"not wanted"}


def test_an_hdf5_is_fetched_and_the_next_step_named(server, hdf5, tmp_path, capsys):
    for _ in range(2):
        code, out, errors = call(capsys, "lift", "--output", tmp_path)
        assert (code, errors) == (0, []) and contents(tmp_path) == {HDF5: hdf5} and len(server.asked) == 1
        path = tmp_path / HDF5
        assert f"python -m envs.robomimic_images {path} {path.with_name('image.hdf5')}\n" in out


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("left", [None, 1000, -1], ids=["broken", "killed", "complete"])
@pytest.mark.parametrize("name", ["demos", "lift"])
def test_an_interrupted_download_goes_on_or_starts_afresh(server, request, tmp_path, capsys, ranges, left, name):
    """By a connection that breaks, or by a kill after 1000 bytes or before unpacking."""
    whole = request.getfixturevalue("hdf5") if name == "lift" else server.content
    target = tmp_path / DATA_SETS[name].place
    server.ranges, server.breaks = ranges, None if left else 1000
    if left:
        target.parent.mkdir(parents=True)
        target.with_name(f"{target.name}.download").write_bytes(whole if left < 0 else whole[:left])
    assert call(capsys, name, "--output", tmp_path)[0] == 0
    assert contents(tmp_path) == ({HDF5: whole} if name == "lift" else FILES)
    if left:
        assert server.asked == [f"bytes={1000 if left > 0 else len(whole)}-"]


def damaged():
    content = bytearray(zipped(FILES))
    content[len(content) // 2] ^= 1  # the middle of the pixels: only their checksum tells
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>Not the archive</html>", "whole zip"),
        (damaged(), "CRC"),
        (zipped({"other/file": b"x", "more": b""}), "got more, other"),
        (zipped({f"{MEMBER}s/file": b"x"}), "got pusht"),
    ],
    ids=["no zip", "damaged", "other", "longer name"],
)
def test_bad_archives_are_named_and_removed(server, tmp_path, capsys, content, message):
    server.content, good = content, server.content
    output = tmp_path / "a" / "data"
    code, _, errors = call(capsys, "demos", "--output", output)
    assert code == 1 and len(errors) == 1 and message in errors[0] and contents(tmp_path) == {}
    server.content = good
    assert call(capsys, "demos", "--output", output)[0] == 0 and contents(output) == FILES


@pytest.mark.parametrize("name", ["../../../../escaped", "..\\escaped", "/escaped"])
def test_nothing_is_written_outside_of_the_output(server, tmp_path, capsys, name):
    server.content = zipped({**FILES, f"{MEMBER}/{name}": b"x", name: b"x"})
    output = tmp_path / "a" / "b" / "data"
    assert call(capsys, "demos", "--output", output)[0] == 0
    assert set(FILES) <= set(contents(output)) and len(contents(tmp_path)) == len(contents(output / MEMBER))


def test_a_changed_archive_is_not_mixed_with_the_old_one(server, tmp_path, capsys):
    """The rest of another file after our first bytes fails the checksum, is removed, and then comes whole."""
    (tmp_path / "pusht").mkdir()
    (tmp_path / f"{MEMBER}.download").write_bytes(b"\xff" * 5000)
    assert call(capsys, "demos", "--output", tmp_path)[0] == 1 and contents(tmp_path) == {}
    assert call(capsys, "demos", "--output", tmp_path)[0] == 0 and contents(tmp_path) == FILES


@pytest.mark.parametrize("cut", [None, -1])
def test_an_hdf5_that_is_not_whole_is_named_and_removed(server, hdf5, tmp_path, capsys, cut):
    server.content = hdf5[:cut] if cut else b"<html>Not the file</html>"
    code, _, (error,) = call(capsys, "lift", "--output", tmp_path)
    assert code == 1 and "HDF5" in error and contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["demos", "lift"])
@pytest.mark.parametrize("trouble", ["no network", "not found"])
def test_without_a_network_one_line_says_what_to_do_by_hand(server, tmp_path, capsys, monkeypatch, name, trouble):
    if trouble == "not found":
        server.status = 404
    else:
        monkeypatch.setitem(DATA_SETS, name, DATA_SETS[name]._replace(url="http://127.0.0.1:1/demos.zip"))
    code, _, (error,) = call(capsys, name, "--output", tmp_path)
    assert code == 1 and DATA_SETS[name].url in error and str(tmp_path / DATA_SETS[name].place) in error
    assert not any(contents(tmp_path).values())


def test_unknown_names_list_the_known_ones(capsys):
    code, _, (error,) = call(capsys, "push")
    assert code == 1 and "'pusht'" in error and "tool_hang_ph" in error


def test_two_at_once_do_not_mix_their_bytes(server, tmp_path, capsys):
    partial = tmp_path / f"{MEMBER}.download"
    partial.parent.mkdir()
    with open(partial, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, (error,) = call(capsys, "demos", "--output", tmp_path)
        assert code == 1 and "another process" in error and server.asked == []
    assert call(capsys, "demos", "--output", tmp_path)[0] == 0 and contents(tmp_path) == FILES


def test_an_archive_that_unpacks_to_more_than_there_is_room_for_is_kept_packed(server, tmp_path, capsys, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: free._replace(free=1000))
        code, _, (error,) = call(capsys, "demos", "--output", tmp_path)
    assert code == 1 and "to unpack" in error and contents(tmp_path) == {f"{MEMBER}.download": server.content}
    assert call(capsys, "demos", "--output", tmp_path)[0] == 0 and contents(tmp_path) == FILES


def test_ctrl_c_is_one_line_and_the_next_call_goes_on(server, tmp_path, capsys, monkeypatch):
    def interrupted(url, partial):
        partial.write_bytes(server.content[:1000])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download, "fetch", interrupted)
        code, _, errors = call(capsys, "demos", "--output", tmp_path)
    assert code == 130 and errors == []
    assert call(capsys, "demos", "--output", tmp_path)[0] == 0 and server.asked == ["bytes=1000-"]
    assert contents(tmp_path) == FILES
