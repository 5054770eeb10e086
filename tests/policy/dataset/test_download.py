"""The download program against a server in this process: whole, interrupted, damaged and impossible downloads."""

import http.server
import io
import re
import threading
import zipfile

import h5py
import pytest
from paths import ROOT

from policy.dataset.download import DATA_SETS, Archive, Hdf5, fetch, main

MEMBER = "pusht/demos.zarr"
FILES = {f"{MEMBER}/.zgroup": b'{"zarr_format": 2}', f"{MEMBER}/data/img/0.0": bytes(range(256)) * 400}


def zipped(files):
    """A zip file as bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; ranges: whether it honours Range; breaks: ends each answer after that many bytes."""

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
        self.end_headers()
        self.wfile.write(body[: server.breaks])

    def log_message(self, *_args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A running server whose content is a good archive, called "demos" in the table."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        server.content = zipped({"pusht/readme.txt": b"not wanted", **FILES})
        url = f"http://127.0.0.1:{server.server_port}/demos.zip"
        monkeypatch.setitem(DATA_SETS, "demos", Archive(url=url, member=MEMBER))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def call(capsys, *arguments):
    """(exit code, standard output, error lines) of the program."""
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code, captured.out, [line for line in captured.err.splitlines() if line.startswith("error:")]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_official_archive_is_in_the_table():
    """The URL of Diffusion Policy's README, and the place that config/task/pusht.yaml reads."""
    url, member = DATA_SETS["pusht"]
    assert url == "https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip"
    config = ROOT / "config" / "task" / "pusht.yaml"
    assert f"source: data/{member}" in config.read_text()


def test_the_member_is_unpacked_and_nothing_else_remains(server, tmp_path, capsys):
    code, out, errors = call(capsys, "demos", "--output", tmp_path / "data")
    assert (code, errors) == (0, []) and f"wrote {tmp_path / 'data' / MEMBER}" in out
    assert contents(tmp_path / "data") == FILES


def test_what_is_there_is_not_fetched_again(server, tmp_path, capsys):
    (tmp_path / MEMBER).mkdir(parents=True)
    code, out, errors = call(capsys, "demos", "--output", tmp_path)
    assert (code, errors, server.asked) == (0, [], []) and f"already there: {tmp_path / MEMBER}" in out


def test_a_single_file_can_be_the_member(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "demos", DATA_SETS["demos"]._replace(member="pusht/readme.txt"))
    assert call(capsys, "demos", "--output", tmp_path)[0] == 0
    assert contents(tmp_path) == {"pusht/readme.txt": b"not wanted"}


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on_or_starts_afresh(server, tmp_path, capsys, ranges):
    server.ranges, server.breaks = ranges, 1000
    code, _, (error,) = call(capsys, "demos", "--output", tmp_path)
    assert code == 1 and f"ended after 1000 of {len(server.content)} bytes" in error and "run this again" in error
    assert contents(tmp_path) == {"demos.zip.partial": server.content[:1000]}
    server.breaks = None
    assert call(capsys, "demos", "--output", tmp_path)[0] == 0
    assert server.asked == [None, "bytes=1000-"] and contents(tmp_path) == FILES


@pytest.mark.parametrize("ranges", [True, False])
def test_a_fetched_file_is_the_content_byte_for_byte(server, tmp_path, ranges):
    """A zip with rubbish in front would still unpack, so the file itself is compared."""
    server.ranges = ranges
    partial = tmp_path / "file"
    partial.write_bytes(server.content[:1000])
    fetch(DATA_SETS["demos"].url, partial)
    assert partial.read_bytes() == server.content


def test_a_download_that_was_complete_is_only_unpacked(server, tmp_path, capsys):
    (tmp_path / "demos.zip.partial").write_bytes(server.content)
    assert call(capsys, "demos", "--output", tmp_path)[0] == 0
    assert contents(tmp_path) == FILES


def damaged():
    content = bytearray(zipped(FILES))
    content[len(content) // 2] ^= 1  # the middle of the pixels: only their checksum tells
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>Not the archive</html>", "got a file that is not a whole zip"),
        (damaged(), "got a file that is not a whole zip .*Bad CRC-32"),
        (zipped({"other/file": b"x", "more": b""}), f"got more, other, allowed: a zip that holds {MEMBER}"),
        (zipped({f"{MEMBER}s/file": b"x"}), "got pusht, allowed: a zip that holds"),
        (zipped({**FILES, f"{MEMBER}/../../../escaped": b"x"}), "got the entry .*escaped', allowed: paths inside"),
        (zipped({**FILES, f"{MEMBER}/..\\escaped": b"x"}), "got the entry .*escaped', allowed: paths inside"),
    ],
)
def test_bad_archives_are_named_and_removed(server, tmp_path, capsys, content, message):
    server.content, good = content, server.content
    output = tmp_path / "a" / "data"
    code, _, errors = call(capsys, "demos", "--output", output)
    assert code == 1 and len(errors) == 1
    assert re.search(message, errors[0]) and "it was removed" in errors[0]
    assert contents(tmp_path) == {}
    server.content = good
    assert call(capsys, "demos", "--output", output)[0] == 0 and contents(output) == FILES


def test_a_changed_archive_is_not_mixed_with_the_old_one(server, tmp_path, capsys):
    """The rest of another file after our first bytes fails the checksum, is removed, and then comes whole."""
    (tmp_path / "demos.zip.partial").write_bytes(b"\xff" * 5000)
    code, _, (error,) = call(capsys, "demos", "--output", tmp_path)
    assert code == 1 and "it was removed, run this again" in error
    assert call(capsys, "demos", "--output", tmp_path)[0] == 0 and contents(tmp_path) == FILES


HDF5 = "robomimic/lift/ph/demo.hdf5"


@pytest.fixture
def hdf5(server, monkeypatch, tmp_path_factory):
    """The server's content as an HDF5 file, called "lift" in the table."""
    path = tmp_path_factory.mktemp("source") / "demo.hdf5"
    with h5py.File(path, "w") as file:
        file["data/demo_0/states"] = list(range(3000))
    server.content = path.read_bytes()
    monkeypatch.setitem(DATA_SETS, "lift", Hdf5(f"http://127.0.0.1:{server.server_port}/demo.hdf5", HDF5))
    return server.content


def test_the_robomimic_files_have_their_places():
    """The paths of robomimic's own repository at Hugging Face; tool_hang has proficient humans only."""
    hub = "https://huggingface.co/datasets/robomimic/robomimic_datasets/resolve/main/v1.5"
    assert DATA_SETS["lift_ph"] == Hdf5(f"{hub}/lift/ph/demo_v15.hdf5", "robomimic/lift/ph/demo_v15.hdf5")
    assert DATA_SETS["can_mh"] == Hdf5(f"{hub}/can/mh/demo_v15.hdf5", "robomimic/can/mh/demo_v15.hdf5")
    assert DATA_SETS["tool_hang_ph"].url == f"{hub}/tool_hang/ph/demo_v15.hdf5" and "tool_hang_mh" not in DATA_SETS


def test_a_single_file_is_fetched_and_the_next_step_named(server, hdf5, tmp_path, capsys):
    for said in ("wrote", "already there:"):
        code, out, errors = call(capsys, "lift", "--output", tmp_path)
        assert (code, errors) == (0, []) and contents(tmp_path) == {HDF5: hdf5} and len(server.asked) == 1
        path = tmp_path / HDF5
        assert f"{said} {path}\n" in out
        assert f"python -m envs.robomimic_images {path} {path.with_name('image.hdf5')}\n" in out


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_single_file_goes_on_or_starts_afresh(server, hdf5, tmp_path, capsys, ranges):
    server.ranges, server.breaks = ranges, 1000
    code, _, (error,) = call(capsys, "lift", "--output", tmp_path)
    assert code == 1 and "run this again" in error and error.endswith(f"put it at {tmp_path / HDF5}")
    assert contents(tmp_path) == {f"{HDF5}.partial": hdf5[:1000]}
    server.breaks = None
    assert call(capsys, "lift", "--output", tmp_path)[0] == 0
    assert server.asked == [None, "bytes=1000-"] and contents(tmp_path) == {HDF5: hdf5}


@pytest.mark.parametrize("cut", [None, -1])
def test_what_is_no_whole_hdf5_is_named_and_removed(server, hdf5, tmp_path, capsys, cut):
    server.content = hdf5[:cut] if cut else b"<html>Not the file</html>"
    code, _, (error,) = call(capsys, "lift", "--output", tmp_path)
    assert code == 1 and "got a file that is not a whole HDF5" in error and "it was removed" in error
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("trouble", ["no network", "not found"])
def test_without_a_network_one_line_says_what_to_do_by_hand(server, tmp_path, capsys, monkeypatch, trouble):
    if trouble == "not found":
        server.status = 404
    else:
        monkeypatch.setitem(DATA_SETS, "demos", Archive("http://no-such-host.invalid/demos.zip", MEMBER))
    code, _, errors = call(capsys, "demos", "--output", tmp_path)
    assert code == 1 and len(errors) == 1
    assert DATA_SETS["demos"].url in errors[0] and f"so that {tmp_path / MEMBER} exists" in errors[0]
    assert contents(tmp_path) == {}


def test_unknown_names_list_the_known_ones(capsys):
    code, _, (error,) = call(capsys, "push")
    assert code == 1 and error.startswith(
        "error: data set: got 'push' (did you mean 'pusht'?), allowed: can_mh, can_ph,"
    )
    assert error.endswith(" lift_mh, lift_ph, pusht, square_mh, square_ph, tool_hang_ph, transport_mh, transport_ph")
