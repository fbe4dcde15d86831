"""download-tokenizer against a local server that behaves like the Hub: what is fetched, resumed and refused."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import data_hub
from titan_data import cli
from titan_data.errors import DataError
from titan_data.tokenizers.download import download_tokenizer
from titan_data.tokenizers.load import load_tokenizer
from titan_data.tokenizers.tiktoken import TiktokenTokenizer

huggingface_hub = pytest.importorskip("huggingface_hub")

RANKS = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
REPOSITORY = "meta-llama/Meta-Llama-3-8B"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[data_hub.Hub]:
    with data_hub.serve() as hub:
        hub.files[REPOSITORY, "original/tokenizer.model"] = RANKS
        hub.gated.add(REPOSITORY)
        hub.tokens.update(good=True, poor=False)
        hub.files["someone/open", "tokenizer.json"] = b'{"not": "looked at"}'
        hub.files["someone/open", "tokenizer_config.json"] = b'{"eos_token": "</s>"}'
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        # The library reads its settings when it is imported.
        set_endpoint(monkeypatch, hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        yield hub


def set_endpoint(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def fetch(
    tmp_path: Path,
    token: str | None = "good",
    repository: str = REPOSITORY,
    subfolder: str | None = "original",
    **options: Any,
) -> Path:
    return download_tokenizer(repository, tmp_path / "out", subfolder=subfolder, token=token, **options)


def downloads(hub: data_hub.Hub) -> list[str | None]:
    return [wanted for method, path, wanted in hub.requests if method == "GET" and "/resolve/" in path]


def test_llama_3s_tokenizer(hub: data_hub.Hub, tmp_path: Path) -> None:
    path = fetch(tmp_path)
    assert path == tmp_path / "out" / "original" / "tokenizer.model"
    assert isinstance(load_tokenizer(tmp_path / "out" / "original"), TiktokenTokenizer)
    assert len(downloads(hub)) == 1
    assert fetch(tmp_path) == path
    assert len(downloads(hub)) == 1, "it was fetched again"


def test_tokenizer_json_comes_with_its_config(hub: data_hub.Hub, tmp_path: Path) -> None:
    path = fetch(tmp_path, repository="someone/open", subfolder=None, token=None)
    assert path == tmp_path / "out" / "tokenizer.json"
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}


def test_a_cut_connection_is_resumed_where_it_was_cut(
    hub: data_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The library keeps whole chunks of what came before the cut: 10 MB each, but for this test.
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)
    hub.cut_after, hub.cuts = 1000, 2
    assert fetch(tmp_path).read_bytes() == RANKS
    assert downloads(hub) == [None, "bytes=1000-", "bytes=2000-"]


def test_a_connection_that_is_always_cut_leaves_no_half_file(hub: data_hub.Hub, tmp_path: Path) -> None:
    hub.cut_after, hub.cuts = 100, 10**9
    with pytest.raises(DataError, match="run the same command again"):
        fetch(tmp_path)
    assert not (tmp_path / "out" / "original" / "tokenizer.model").exists()
    hub.cuts = 0
    assert fetch(tmp_path).read_bytes() == RANKS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": None}, r"is only for accounts that have access: accept its license at https://\S+Meta-Llama-3-8B"),
        ({"token": "poor"}, "the account of this token has no access to meta-llama/Meta-Llama-3-8B: request it"),
        ({"token": "wrong"}, r"the Hub does not accept this token: check --hf-token \(or HF_TOKEN\)"),
        (
            {"repository": "meta-llama/nothing"},
            "repository meta-llama/nothing does not exist on the Hub, or it is private",
        ),
        ({"subfolder": None}, r"has no tokenizer.model and no tokenizer.json: is it in a subfolder"),
        ({"subfolder": "elsewhere"}, "folder elsewhere of meta-llama/Meta-Llama-3-8B has no tokenizer.model"),
        ({"revision": "v9"}, "has no such revision"),
        ({"repository": "a/b/c"}, "'a/b/c' is not a repository name"),
    ],
)
def test_refusals_say_what_to_do(hub: data_hub.Hub, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        fetch(tmp_path, **options)
    assert len(str(error.value).splitlines()) == 1


def test_no_network(hub: data_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"cannot reach http\S+: check the network"):
        fetch(tmp_path)


def test_offline(hub: data_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set, so nothing is downloaded"):
        fetch(tmp_path)


def test_the_command_line(hub: data_hub.Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["download-tokenizer", "--repo-id", REPOSITORY, "--subfolder", "original", "--out", str(tmp_path / "t")]
    assert cli.main(words) == 1
    assert capsys.readouterr().err.count("titan-data: ") == 1
    assert cli.main([*words, "--hf-token", "good"]) == 0
    assert "tokenizer.model: 512 ids, fingerprint tiktoken/" in capsys.readouterr().out
    hub.files["someone/open", "tokenizer.json"] = b"no JSON"
    words = ["download-tokenizer", "--repo-id", "someone/open", "--out", str(tmp_path / "u")]
    assert cli.main(words) == 1
    assert "tokenizer.json is not a tokenizer" in capsys.readouterr().err
