"""Adapters as the hub's own client leaves them in its cache: links from a snapshot to blobs, and no other link."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_hub_download

import tiny
from command_line import lorica
from lorica.adapters import peft_format, prefix
from lorica.adapters.adapter import Adapter
from lorica.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE
from lorica.adapters.prefix import Prefix
from lorica.errors import AdapterFormatError, LoricaError
from lorica.runs.evaluating.targets import resolve_target
from lorica.runs.sources import resolve

REVISION = "0123456789abcdef0123456789abcdef01234567"
FOLDER = f"snapshots/{REVISION}"


class Hub(BaseHTTPRequestHandler):
    """What hf_hub_download asks of a hub, answered from a folder; paths are /OWNER/NAME/resolve/REVISION/FILE."""

    def __init__(self, *args: object, folder: Path) -> None:
        self.folder = folder
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        repository, _, file = self.path.partition(f"/resolve/{REVISION}/")
        self.content = (self.folder / repository[1:] / file).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


Download = Callable[..., Path]


@pytest.fixture
def download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Download]:
    """(repository, folder of its files) -> the snapshot's folder in the cache, by the hub's own client."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder=tmp_path / "hub"))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    fetch = partial(hf_hub_download, revision=REVISION, cache_dir=tmp_path / "cache", token=False)

    def downloaded(repository: str) -> Path:
        place = tmp_path / "hub" / repository
        names = [str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()]
        with monkeypatch.context() as online:
            online.setattr(constants, "HF_HUB_OFFLINE", False)
            online.setenv("NO_PROXY", "127.0.0.1")
            for name in names:
                fetch(repository, name, endpoint=f"http://127.0.0.1:{server.server_port}")
        return tmp_path / "cache" / f"models--{repository.replace('/', '--')}" / FOLDER

    yield downloaded
    server.shutdown()
    server.server_close()


def write(folder: Path, seed: int = 0) -> Adapter:
    adapter = Adapter({"layers.0.q": tiny.update((12, 10), 2, 1.0, torch.Generator().manual_seed(seed))}, {}, "base")
    peft_format.write(adapter, folder)
    return adapter


def test_an_adapter_of_the_cache_is_read_wherever_one_is(download: Download, tmp_path: Path) -> None:
    write(tmp_path / "hub/some/lora")
    snapshot = download("some/lora")
    assert all(file.is_symlink() for file in snapshot.iterdir()), "the client has made no links: nothing is tested"
    plain, cached = tmp_path / "hub/some/lora", snapshot
    assert torch.equal(*(peft_format.read(each).updates["layers.0.q"].dense() for each in (plain, cached)))
    assert len({resolve([str(each)], tmp_path)[0].sha256 for each in (plain, cached)}) == 1
    assert len({resolve_target(str(each), None).sha256 for each in (plain, cached)}) == 1
    (tmp_path / "mine").symlink_to(snapshot)
    assert peft_format.read(tmp_path / "mine").updates


def test_a_prefix_of_the_cache_is_read(download: Download, tmp_path: Path) -> None:
    values = torch.randn(2, 2, 2, 5, 4)
    prefix.write(Prefix(values, "base"), tmp_path / "hub/some/prefix")
    assert torch.equal(prefix.read(download("some/prefix")).values, values)


def test_adapters_of_the_cache_are_merged_and_called_by_their_repositories(download: Download, tmp_path: Path) -> None:
    """Not by the revision, which is a hash; one of them lies in a folder of its repository."""
    for seed, name in enumerate(("a/lora", "b/lora", "b/other/last")):
        write(tmp_path / "hub" / name, seed)
    words = [download("a/lora"), download("b/lora"), download("b/other") / "last"]
    assert [each.name for each in resolve([str(word) for word in words], tmp_path)] == ["lora-a", "lora-b", "last"]
    lorica("merge", "--adapters", *words, "output_dir=out", "method=uniform_delta")
    assert peft_format.read(tmp_path / "out").updates["layers.0.q"].rank == 6
    assert "last" in lorica("inspect", *words)


Wound = Callable[[Path, Path], object]  # snapshot's file, blob

LINKS: dict[str, Wound] = {
    "a file outside": lambda file, _: relinked(file, "/etc/hostname"),
    "a file beside the blobs": lambda file, blob: relinked(file, blob.rename(blob.parents[1] / "elsewhere")),
    "a folder below the blobs": lambda file, blob: relinked(file, moved(blob, blob.parent / "deeper" / "blob")),
    "through a blob that is a link": lambda _, blob: relinked(blob, moved(blob, blob.parents[3] / "elsewhere")),
    "blobs that are a link": lambda _, blob: relinked(blob.parent, moved(blob.parent, blob.parents[3] / "blobs")),
    "another repository's blobs": lambda file, blob: relinked(
        file, moved(blob, blob.parents[2] / "models--other--lora" / "blobs" / blob.name)
    ),
    "out and in by ..": lambda file, blob: relinked(
        file, f"../../blobs/../../../{moved(blob, blob.parents[3] / 'x').name}"
    ),
    "itself": lambda file, _: relinked(file, file),
}


def relinked(link: Path, target: Path | str) -> None:
    if link.is_symlink() or link.is_file():
        link.unlink()
    link.symlink_to(target)


def moved(path: Path, place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    return path.rename(place)


@pytest.mark.parametrize("case", LINKS)
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_link_out_of_the_repositorys_blobs_is_refused(
    download: Download, tmp_path: Path, name: str, case: str
) -> None:
    write(tmp_path / "hub/some/lora")
    file = download("some/lora") / name
    LINKS[case](file, file.resolve())
    with pytest.raises(AdapterFormatError, match="symbolic link") as caught:
        peft_format.read(file.parent)
    assert "\n" not in str(caught.value) and str(file.parent) in str(caught.value)


def test_a_link_to_a_blob_from_outside_the_snapshots_is_refused(download: Download, tmp_path: Path) -> None:
    write(tmp_path / "hub/some/lora")
    snapshot = download("some/lora")
    outside = moved(snapshot, snapshot.parents[1] / "elsewhere" / REVISION)
    with pytest.raises(AdapterFormatError, match="symbolic link"):
        peft_format.read(outside)


@pytest.mark.parametrize("make", [None, os.mkfifo, os.mkdir])
def test_a_blob_that_is_no_file_is_refused(
    download: Download, tmp_path: Path, make: Callable[[Path], None] | None
) -> None:
    write(tmp_path / "hub/some/lora")
    snapshot = download("some/lora")
    blob = (snapshot / WEIGHTS_FILE).resolve()
    blob.unlink()
    if make is not None:
        make(blob)
    with pytest.raises(LoricaError, match=f"no file .*{blob.name}" if make is None else "regular file"):
        peft_format.read(snapshot)
