"""Uploads, to a Hub on this machine: what arrives, what is sent again, and what is said when it cannot be sent."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils import _http

from mlx_dgemma.convert import conversion
from mlx_dgemma.convert.conversion import convert
from mlx_dgemma.convert.upload import upload
from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.loading import EMBEDDED
from tests.convert.fixtures import QUIET
from tests.convert.hub import CUT, Hub, digest

REPO, JOURNAL = "me/model", "conversion.jsonl"
MODULE = "mlx_dgemma.convert.command"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub for this process, which has the right token, does not use hf_xet, and tries again without waiting."""
    with Hub() as hub:
        settings = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        settings["AGENT_HARNESSES_PATH"] = str(tmp_path / "harnesses.json")  # a file that the client keeps at home
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value, raising=False)
        for name, value in {"HF_TOKEN": hub.token, "NO_PROXY": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
        close_session()
        yield hub
        close_session()


@pytest.fixture
def folder(tmp_path):
    """A conversion in four shards, as far as an upload can tell."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    for shard in range(4):
        (folder / f"model-{shard}.safetensors").write_bytes(os.urandom(300_000))
    for name in ("config.json", JOURNAL):
        (folder / name).write_text("{}\n")
    (folder / "README.md").write_text("# A model\n")
    return folder


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    """For commands that are to use this Hub."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "PATH": path}
    return os.environ | own | {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"} | more


def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def converting(out: Path) -> list[str]:
    return [sys.executable, "-m", MODULE, "--model", "nano", "--mlx-path", str(out), "--upload-repo", REPO]


def differences(hub: Hub, folder: Path) -> set[str]:
    """Names of files that the Hub has not, has otherwise, or has besides; the journal stays here."""
    there = {name: data if isinstance(data, str) else digest(data) for name, data in hub.repos.get(REPO, {}).items()}
    here = {path.name: digest(path.read_bytes()) for path in folder.iterdir() if path.name != JOURNAL}
    return {name for name in there | here if there.get(name) != here.get(name)}


def only_from(part: str, fault: int):
    return lambda request: fault if part in request else None


def told_command(message: str) -> list[str]:
    return shlex.split(message.partition("send the rest with: ")[2])


def test_every_file_arrives_as_it_is_but_the_journal(tmp_path, hub):
    out = convert(EMBEDDED, tmp_path / "out", quant_recipe="default", upload_repo=REPO, **QUIET)
    assert not differences(hub, out)
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= hub.repos[REPO].keys()
    assert (out / JOURNAL).exists() and JOURNAL not in hub.repos[REPO]
    assert len(hub.puts()) == 2 and hub.commits == 1


def test_a_byte_that_changed_on_its_way_is_noticed(folder, hub):  # a control of `differences`
    hub.corrupt = True
    upload(folder, REPO)
    assert differences(hub, folder) == {f"model-{shard}.safetensors" for shard in range(4)}


def test_a_repository_that_exists_is_added_to(folder, hub):
    hub.repos[REPO] = {"notes.txt": b"old", "config.json": b"old"}
    upload(folder, REPO)
    assert differences(hub, folder) == {"notes.txt"}


def test_a_second_upload_sends_what_changed(folder, hub):
    upload(folder, REPO)
    (folder / "model-2.safetensors").write_bytes(b"other")
    upload(folder, REPO)
    assert not differences(hub, folder)
    assert len(hub.puts()) == 5 and hub.commits == 2
    upload(folder, REPO)
    assert len(hub.puts()) == 5 and hub.commits == 2


def test_after_an_interruption_only_the_missing_objects_are_sent(folder, hub):
    hub.fault = lambda request: CUT if "PUT" in request and hub.puts()[-1] != hub.puts()[0] else None
    with pytest.raises(InputError, match=r"me/model: the upload failed \("):
        upload(folder, REPO)
    arrived, begun = set(hub.objects), len(hub.puts())
    assert len(arrived) == 1 and not hub.repos[REPO]
    hub.fault = lambda request: None
    upload(folder, REPO)
    sent = hub.puts()[begun:]
    assert len(sent) == 3 and not arrived & set(sent)
    assert not differences(hub, folder)


@pytest.mark.parametrize("part", ["/preupload/", "/objects/batch", "PUT ", "/verify"])
@pytest.mark.parametrize("fault", [CUT, 503])
def test_one_failure_on_the_way_is_gone_over(folder, hub, part, fault):
    faults = [fault]
    hub.fault = lambda request: faults.pop() if part in request and faults else None
    upload(folder, REPO)
    assert not faults and not differences(hub, folder)


@pytest.mark.parametrize(
    ("part", "fault", "reason"),
    [
        ("/create", 403, "403 Forbidden: no: Forbidden"),
        ("/create", 500, "500 Internal Server Error: no: Internal Server Error"),
        ("/validate-yaml", 404, "404 Not Found: no: Not Found"),
        ("/preupload/", 404, "404 Not Found: no: Not Found"),
        ("/batch", 500, "500 Internal Server Error: no: Internal Server Error"),
        ("PUT ", 403, "403 Forbidden: no: Forbidden"),
        ("/commit/", 409, "409 Conflict: no: Conflict"),
        ("/commit/", 503, "503 Service Unavailable: no: Service Unavailable"),
    ],
)
def test_a_refusal_is_one_line_with_its_reason_and_the_folder_stays(folder, hub, part, fault, reason):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    hub.fault = only_from(part, fault)
    with pytest.raises(InputError) as said:
        upload(folder, REPO)
    message = str(said.value)
    assert message.startswith(f"{REPO}: the upload failed ({reason}); {folder} is whole") and "\n" not in message
    assert told_command(message) == ["hf", "upload", REPO, str(folder), "--exclude", JOURNAL]
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not hub.commits


def test_a_wrong_token_is_told_and_how_to_get_one(folder, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match=r"401 Unauthorized: Invalid username or password\.; hf auth login stores"):
        upload(folder, REPO)
    assert not hub.repos


def test_a_server_that_breaks_off(folder, hub):
    hub.fault = only_from("/commit/", CUT)
    with pytest.raises(InputError, match=r"me/model: the upload failed \(\w+Error: .+\);"):
        upload(folder, REPO)


def test_a_server_that_is_not_there(folder, hub):
    hub.__exit__()
    with pytest.raises(InputError, match=r"me/model: the upload failed \(ConnectError: .*refused\);"):
        upload(folder, REPO)


def test_nothing_is_sent_if_the_conversion_failed(tmp_path, hub, monkeypatch):
    def wrong(*args, **kwargs):
        raise InputError("not what was written")

    with pytest.raises(InputError):
        convert(tmp_path, tmp_path / "out", upload_repo=REPO, **QUIET)
    monkeypatch.setattr(conversion, "verify", wrong)
    with pytest.raises(InputError, match="not what was written"):
        convert(EMBEDDED, tmp_path / "out", upload_repo=REPO, verify_output=True, **QUIET)
    assert not hub.asked


def test_the_command_ends_in_one_line(tmp_path):
    with Hub() as hub:
        hub.fault = only_from("PUT ", 403)
        done = run(converting(tmp_path / "out"), environment(hub, tmp_path, HF_HUB_DISABLE_XET="1"))
    line = done.stderr.splitlines()[-1]  # the client's progress bars, which it leaves open, come before it
    assert line.startswith("mlx_dgemma.convert: me/model: the upload failed (403 Forbidden")
    assert done.returncode == 1 and not done.stdout and "Traceback" not in done.stderr


def test_the_command_by_hf_xet_and_the_one_it_tells_of(tmp_path):
    """What most have installed. Objects are then kept by hf_xet itself, here in a folder; no network in between."""
    (store := tmp_path / "store").mkdir()
    out = tmp_path / "an out"

    def stored() -> dict[str, int]:
        return {path.name: path.stat().st_size for path in store.rglob("default.*") if path.suffix != ".tagset"}

    with Hub(xet=store) as hub:
        hub.fault = only_from("/commit/", 403)
        failed = run(converting(out), environment(hub, tmp_path))
        line = failed.stderr.splitlines()[-1]
        assert failed.returncode == 1 and "me/model: the upload failed (403 Forbidden" in line
        assert not hub.repos[REPO] and sum(stored().values()) > 1_000_000
        before, hub.fault = stored(), lambda request: None
        done = run(told_command(line), environment(hub, tmp_path))
        assert done.returncode == 0, done.stderr
        assert not differences(hub, out)
        assert stored() == before  # the objects had arrived


def test_an_upload_without_a_network_leaves_the_folder_and_one_line(tmp_path):
    with pytest.raises(InputError, match="me/model: the upload failed") as said:  # the tests are offline
        convert(EMBEDDED, tmp_path / "out", upload_repo=REPO, **QUIET)
    assert "\n" not in str(said.value)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_name_that_is_no_repository_is_told_first(tmp_path):
    with pytest.raises(UsageError, match="owner/name"):
        convert(EMBEDDED, tmp_path / "out", upload_repo="model", **QUIET)
    assert not list(tmp_path.iterdir())
