"""Scans at URLs: the bytes of a folder, whatever is killed; what storage refuses is one line."""

import fsspec
import pytest
import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file

from autodeco_fast.training import scan_store
from autodeco_fast.training.loop import train
from autodeco_fast.training.scan_store import TENSORS, Scan, read_shard, shard_path, token_bytes
from autodeco_fast.urls import Url, location, of_each
from tests.commands import assert_refuses, command
from tests.processes import assert_all_ended, killed_at
from tests.scans import files, make_scan, scan_together, write_examples
from tests.storage import Refuses, Renames, new_storage, stored
from tests.training_runs import LONG, equal, scan_config, source_of

HALF = {"all_tokens": False, "max_rank": 60, "easy_fraction": 0.5}
THINNED = {**HALF, "max_bytes": 9000}
URL = "own://bucket/deep/scan"


@pytest.fixture(params=[(), (Renames,), (Refuses,)], ids=["objects", "renames", "no-overwrite"])
def storage(request) -> type:
    """What own:// stands for."""
    return new_storage(*request.param)


@pytest.fixture
def objects() -> type:
    return new_storage()


def upload(folder, url: str = URL) -> str:
    for path in folder.iterdir():
        (Url(url) / path.name).upload(path)
    return url


def test_a_url_is_joined_and_named_as_a_path():
    url = location("s3://bucket/deep/")
    assert url == "s3://bucket/deep/"
    assert url / "scan.json" == "s3://bucket/deep/scan.json"
    assert location("memory://") / "scan" / "a" == "memory://scan/a"
    assert (url.name, (url / "scan.json").name) == ("deep", "scan.json")
    assert location("simplecache::s3://b/c") / "d" == "simplecache::s3://b/c/d"
    for path in ("folder", "folder/with:colon"):
        assert not isinstance(location(path), Url)
    assert location("sftp://me@host/a:b@c") == "sftp://me@host/a:b@c"
    assert location("zip://a:b@c::file:///d") == "zip://a:b@c::file:///d"
    for url in ("ftp://me:se@cret@host/scan", "simplecache::sftp://me:secret@host/scan"):
        with pytest.raises(ValueError, match=r"must hold no password, got .*ftp://…@host") as told:
            location(url)
        assert "cret" not in str(told.value)


@pytest.mark.parametrize("options", [HALF, THINNED])
def test_any_number_of_processes_makes_the_bytes_of_a_folder(tmp_path, storage, options):
    whole = files(make_scan(tmp_path, "one", **options))
    for world in (1, 3):
        url = f"{URL} by {world}"
        assert scan_together(tmp_path, "", world, output=url, **options) == [url] * world
        assert stored(url) == whole
    beside = {name.startswith(".") for name in storage.put}  # their place
    assert beside == {storage.mv is not AbstractFileSystem.mv}


KILLED = [  # what the n-th call of kills a process, processes, then so many
    (scan_store, "save_file", 3, 2, 3),
    (Url, "upload", 4, 3, 1),
    (LocalFileSystem, "put_file", 5, 1, 2),
    (LocalFileSystem, "mv", 6, 2, 1),
    (LocalFileSystem, "mv", 11, 1, 3),  # while shards are thinned
]


@pytest.mark.parametrize(("where", "name", "at", "world", "then"), KILLED)
def test_a_scan_killed_anywhere_goes_on_in_any_number(tmp_path, where, name, at, world, then):
    whole = files(make_scan(tmp_path, "one", **THINNED))
    url = (tmp_path / "killed").as_uri()
    with killed_at(at, where, name):
        assert_all_ended(scan_together(tmp_path, "", world, output=url, **THINNED))
    with pytest.raises(ValueError, match="is not finished: run the same"):
        Scan(url)
    assert set(stored(url)) < set(whole)  # no drafts
    assert scan_together(tmp_path, "", then, output=url, **THINNED) == [url] * then
    assert stored(url) == whole


@pytest.mark.parametrize("options", [{}, {**LONG, "max_memory": 10_000}])
def test_learns_the_same_from_a_url(tmp_path, objects, options):
    folder = make_scan(tmp_path)
    heads = []
    for name, scan in (("from folder", folder), ("from url", upload(folder))):
        settings = scan_config(tmp_path, name, scan=scan, **options)
        source, measure_on = source_of(settings).split()
        heads.append(train(source, settings, measure_on=measure_on))
    assert equal(*heads)
    assert f'"scan": "{URL}"' in (tmp_path / "from url/training.json").read_text()


def test_storage_that_answers_many_is_asked_from_several_threads(tmp_path, objects):
    folder = make_scan(tmp_path)
    whole = Scan(folder).load()
    objects.async_impl = True
    scan = Scan(upload(folder))
    assert scan.sizes == Scan(folder).sizes
    for name in TENSORS:
        assert torch.equal(getattr(scan.load(), name), getattr(whole, name))
    assert len(objects.threads) > 1
    several = scan.paths * 40
    found = of_each(lambda path, n: (path.name, n), several, range(len(several)))
    assert list(found) == [(path.name, n) for n, path in enumerate(several)]


def test_only_what_is_asked_for_is_downloaded(tmp_path, objects):
    folder = make_scan(tmp_path, examples_per_shard=100, data=write_examples(tmp_path / "d", 100))
    url, size = upload(folder), shard_path(folder, 0).stat().st_size
    scan = Scan(url)
    manifest = (folder / "scan.json").stat().st_size
    assert len(scan.paths) == 1
    assert objects.downloaded <= manifest + 8192 < size / 8
    before = objects.downloaded
    some = read_shard(scan.paths[0], slice(300, 310))
    assert objects.downloaded - before <= 8192 + 10 * token_bytes(scan.hidden_size)
    whole = load_file(shard_path(folder, 0))
    for name in TENSORS:
        assert torch.equal(getattr(some, name), whole[name][300:310])
    assert len(read_shard(scan.paths[0], slice(5, 5))) == 0


def test_a_copy_of_each_shard_can_be_kept(tmp_path, objects):
    folder = make_scan(tmp_path)
    scan = Scan(f"simplecache::{upload(folder)}")
    for _ in range(3):
        assert torch.equal(scan.load().hidden, Scan(folder).load().hidden)
    assert objects.downloaded == sum(map(len, files(folder).values()))


def test_shards_that_are_broken_or_missing_are_named(tmp_path, objects):
    folder, number = make_scan(tmp_path), 2
    upload(folder)
    shard = Url(URL) / shard_path(folder, number).name
    data, draft = shard.read_bytes(), tmp_path / "draft"
    for broken in (
        data[:-100],
        data + b"more",
        b"",
        data[:5],
        b"\xff" * 400,
        data[:50] + b"\0" * 50,
    ):
        draft.write_bytes(broken)
        shard.upload(draft)
        with pytest.raises(ValueError, match=f"^{shard} is not a whole shard of a scan, delete it"):
            Scan(URL)
    shard.unlink()
    shard.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"^{shard} is not a whole shard .*: there is no {shard}"):
        Scan(URL)


def half(self, file, path, **options):
    with self.open(path, "wb") as there:
        there.write(b"half of")
        raise KeyboardInterrupt


def nothing(self, file, path, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("put_file", [half, nothing])
def test_an_upload_that_breaks_leaves_nothing(tmp_path, storage, put_file):
    storage.put_file = put_file
    (tmp_path / "whole").write_bytes(b"half of it")
    with pytest.raises(KeyboardInterrupt):
        (Url(URL) / "file").upload(tmp_path / "whole")
    assert stored(URL) == {}


def test_an_upload_that_breaks_leaves_what_was_there(tmp_path, storage):
    (tmp_path / "whole").write_bytes(b"all of it")
    (Url(URL) / "file").upload(tmp_path / "whole")
    storage.put_file = nothing
    with pytest.raises(KeyboardInterrupt):
        (Url(URL) / "file").upload(tmp_path / "whole")
    assert stored(URL) == {"file": b"all of it"}


def test_the_commands_take_urls(model, tmp_path, objects):
    data = write_examples(tmp_path / "rows.jsonl", 12)
    scanned = ("scan", "--model", model, "--data", data, "--all-tokens", "--output")
    for output in (URL, tmp_path / "scan"):
        done = command(*scanned, output)
        assert done.returncode == 0, done.stderr
    assert stored(URL) == files(tmp_path / "scan")
    done = command("train", "--scan", URL, "--output", tmp_path / "head", "--max-steps", 2)
    assert done.returncode == 0, done.stderr
    done = command("calibrate", "--head", tmp_path / "head", "--scan", URL, "--alpha", 0.8)
    assert done.returncode == 0, done.stderr
    assert f'"scan": "{URL}"' in (tmp_path / "head/calibration.json").read_text()
    done = command(
        "report",
        "--head",
        tmp_path / "head",
        "--scan",
        URL,
        "--scan",
        URL,
        "--output",
        tmp_path / "r",
    )
    assert_refuses(done, "scans are named by their folders, which must differ, got scan, scan")


@pytest.fixture
def reading(model, head, tmp_path):
    """Every command that takes a scan, with a URL."""

    def commands(url: str):
        data = write_examples(tmp_path / "rows.jsonl", 3)
        out = tmp_path / "out"
        yield "output", ("scan", "--model", model, "--data", data, "--output", url)
        yield "scan", ("train", "--scan", url, "--output", out)
        yield "scan", ("calibrate", "--head", head, "--scan", url)
        yield "scan", ("report", "--head", head, "--scan", url, "--output", out)

    yield commands
    assert not (tmp_path / "out").exists()


def test_storage_that_nothing_speaks_to_is_one_line(reading):
    lacking = {"errtxt": "Install lackingfs to use it", "clobber": True}
    fsspec.register_implementation("lacking", "no_such_module.Storage", **lacking)
    for url, words in (
        ("nowhere://bucket/scan", "Protocol not known: nowhere"),
        ("lacking://bucket/scan", "Install lackingfs to use it"),
    ):
        for name, words_of_command in reading(url):
            assert_refuses(command(*words_of_command), f"{name} '{url}' cannot be reached", words)


def test_refused_credentials_are_one_line(reading, objects):
    objects.refused = ("info",)
    for name, words in reading(URL):
        done = command(*words)
        assert_refuses(done, f"{name} '{URL}' cannot be reached", "Access Denied")
    assert objects.store == {}


def test_a_missing_scan_is_one_line(reading, objects):
    for name, words in reading(URL):
        if name == "scan":
            assert_refuses(command(*words), f"scan must be a folder with scan.json, got '{URL}'")


def test_credentials_that_may_not_write_are_named(tmp_path, objects):
    objects.refused = ("put_file",)
    with pytest.raises(ValueError, match=rf"^cannot write {URL}/scan\.json: Access Denied$"):
        make_scan(tmp_path, output=URL)
    assert objects.store == {}


def test_credentials_that_expire_do_not_make_a_shard_a_broken_one(tmp_path, objects):
    scan = Scan(upload(make_scan(tmp_path)))
    objects.refused = ("cat_file",)
    with pytest.raises(ValueError, match=rf"^cannot read {URL}/shard-000000.*: Access Denied$"):
        scan.load()


def test_heads_and_reports_stay_on_this_machine(model, scan, head, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (
        ("train", "--scan", scan, "--output", URL),
        ("report", "--head", head, "--scan", scan, "--output", URL),
        ("construct", "--base", model, "--output", URL),
    ):
        assert_refuses(command(*words), "output must be a folder of this machine, got 'own:/")
    assert list(tmp_path.iterdir()) == [head]
