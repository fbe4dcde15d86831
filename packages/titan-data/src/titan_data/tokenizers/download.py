"""Download a tokenizer from the Hugging Face Hub with `huggingface_hub` (extra `titan-data[huggingface]`)."""

import os
from pathlib import Path
from typing import Any

from titan_data.errors import DataError

# The first group whose first file the repository has is the tokenizer; the other files of the group belong to it. The
# order is that of `load_tokenizer`.
_CANDIDATES = (("tokenizer.json", "tokenizer_config.json"), ("tokenizer.model", "tokenizer_config.json"))
_HTTP_CLIENTS = ("http", "requests")  # modules of the errors of connections, httpx's and requests'


def download_tokenizer(
    repo_id: str,
    out: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Download a tokenizer's files; unchanged files are not downloaded again, and interrupted downloads resume.

    Args:
        repo_id: "owner/name" of a repository on the Hub.
        out: Folder for the files, which keep their paths within the repository.
        subfolder: Folder in the repository, such as "original" in Meta's.
        revision: Branch, tag or commit.
        token: Token of a Hugging Face account; None for the one in HF_TOKEN or of `hf auth login`, if any.

    Returns:
        Path of the tokenizer's file, for `load_tokenizer`.

    Raises:
        DataError: If `huggingface_hub` is not installed, the repository, revision or file does not exist, the account
            has no access, or the Hub cannot be reached.
    """
    request = {"subfolder": subfolder, "revision": revision, "token": token, "local_dir": str(out)}
    for names in _CANDIDATES:
        paths = [_fetch(repo_id, name, request) for name in names]
        if paths[0] is not None:
            return paths[0]
    where = f"folder {subfolder} of {repo_id}" if subfolder else repo_id
    raise DataError(
        f"{where} has no {' and no '.join(names[0] for names in reversed(_CANDIDATES))}: "
        "is it in a subfolder (such as --subfolder original)?"
    )


def _fetch(repo_id: str, name: str, request: dict[str, Any]) -> Path | None:
    """Download one file; None if the repository does not have it."""
    try:
        import huggingface_hub  # here: an optional extra
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise DataError("downloading needs an extra: pip install 'titan-data[huggingface]'") from None
    try:
        return Path(huggingface_hub.hf_hub_download(repo_id, name, **request))
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        if (message := _explain(error, repo_id, with_token=request["token"] is not None)) is None:
            raise
        raise DataError(message) from None


def _explain(error: Exception, repo_id: str, *, with_token: bool) -> str | None:
    """Turn an error of `huggingface_hub` into what to do about it; None for an unexpected error."""
    from huggingface_hub import errors  # here: an optional extra

    page, endpoint = f"https://huggingface.co/{repo_id}", os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    match error:
        case errors.GatedRepoError() if with_token:
            return f"the account of this token has no access to {repo_id}: request it, or accept the license, at {page}"
        case errors.GatedRepoError():
            return (
                f"{repo_id} is only for accounts that have access: accept its license at {page}, create a token at "
                "https://huggingface.co/settings/tokens and pass it as --hf-token (or HF_TOKEN)"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"repository {repo_id} does not exist on the Hub, or it is private: check the name; a private one "
                "needs --hf-token (or HF_TOKEN) of an account that may read it"
            )
        case errors.RevisionNotFoundError():
            return f"{repo_id} has no such revision: give an existing branch, tag or commit"
        case errors.HFValidationError():
            return f"{repo_id!r} is not a repository name (owner/name)"
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return "the Hub does not accept this token: check --hf-token (or HF_TOKEN)"
        case errors.HfHubHTTPError():
            status = error.response.status_code
            return f"the Hub answered with status {status} for {repo_id}: run the same command again later"
        case _ if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
            return "HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or copy the file here by hand"
        case _ if isinstance(error, errors.LocalEntryNotFoundError) or type(error).__module__.startswith(_HTTP_CLIENTS):
            return (
                f"cannot reach {endpoint}: check the network (and HTTPS_PROXY or HF_ENDPOINT), and run the same "
                "command again; or download the file on another machine and copy it here"
            )
        case OSError():
            return f"cannot write the downloaded file: {error}"
    return None
