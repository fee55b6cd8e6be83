"""Uploads: what is sent, and what is said when it cannot be. The Hub itself is not reached."""

import pytest
from huggingface_hub import HfApi

from mlx_dgemma.convert.conversion import convert
from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.loading import EMBEDDED


def test_the_whole_folder_is_sent_without_the_journal(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo, **options: calls.append(("create", repo, options)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda api, **options: calls.append(("upload", options)))
    out = convert(EMBEDDED, tmp_path / "out", quant_recipe="default", upload_repo="me/model", progress=False)
    assert calls[0] == ("create", "me/model", {"repo_type": "model", "exist_ok": True})
    assert calls[1][1]["repo_id"] == "me/model" and calls[1][1]["folder_path"] == out
    assert calls[1][1]["ignore_patterns"] == ["conversion.jsonl"]


def test_an_upload_that_fails_leaves_the_folder_and_one_line(tmp_path):
    with pytest.raises(InputError, match="me/model: the upload failed") as said:  # the tests are offline
        convert(EMBEDDED, tmp_path / "out", upload_repo="me/model", progress=False)
    assert "\n" not in str(said.value)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_name_that_is_no_repository_is_told_first(tmp_path):
    with pytest.raises(UsageError, match="owner/name"):
        convert(EMBEDDED, tmp_path / "out", upload_repo="model", progress=False)
    assert not list(tmp_path.iterdir())
