"""Tokenizers from the Hugging Face Hub (extra `titan-data[huggingface]`)."""

import os
from pathlib import Path

from titan_data.errors import DataError

# The first of these that the repository has is the tokenizer; the names after it belong to it, where they are there.
_CANDIDATES = (("tokenizer.model",), ("tokenizer.json", "tokenizer_config.json"))


def download_tokenizer(
    repo_id: str,
    out: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Fetch a tokenizer's files; what is there and unchanged is not fetched again, and a cut connection is resumed.

    Args:
        repo_id: "owner/name" of a repository on the Hub.
        out: folder for the files, which keep their paths within the repository.
        subfolder: folder in the repository, such as "original" in Meta's.
        revision: branch, tag or commit.
        token: of a Hugging Face account; None for the one in HF_TOKEN or of `hf auth login`, if any.

    Returns:
        Path of the tokenizer's file, for `load_tokenizer`.

    Raises:
        DataError: `huggingface_hub` is not installed, there is no such repository, revision or file, the account has
            no access, or the Hub cannot be reached.
    """
    for names in _CANDIDATES:
        paths = [_fetch(name, repo_id, out, subfolder, revision, token) for name in names]
        if paths[0] is not None:
            return paths[0]
    where = f"folder {subfolder} of {repo_id}" if subfolder else repo_id
    raise DataError(
        f"{where} has no {' and no '.join(names[0] for names in _CANDIDATES)}: "
        "is it in a subfolder (such as --subfolder original)?"
    )


def _fetch(
    name: str, repo_id: str, out: str | Path, subfolder: str | None, revision: str | None, token: str | None
) -> Path | None:
    """Fetch one file; None if the repository has none of this name."""
    try:
        import huggingface_hub  # late: an optional extra
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise DataError("downloading needs an extra: pip install 'titan-data[huggingface]'") from None
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repo_id, name, subfolder=subfolder, revision=revision, token=token, local_dir=str(out)
            )
        )
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        if (explanation := _explain(error, repo_id, with_token=token is not None)) is None:
            raise
        raise DataError(explanation) from None


def _explain(error: Exception, repo_id: str, *, with_token: bool) -> str | None:
    """Say what to do about what `huggingface_hub` raises; None if that is anybody's guess."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return _gated(repo_id, with_token=with_token)
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no repository {repo_id} on the Hub, or it is private: check the name; "
            "a private one needs --hf-token (or HF_TOKEN) of an account that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo_id} has no such revision: give a branch, tag or commit that it has"
    if isinstance(error, errors.HFValidationError):
        return f"{repo_id!r} is no repository name (owner/name)"
    if isinstance(error, errors.HfHubHTTPError):
        if error.response.status_code == 401:
            return "the Hub does not accept this token: check --hf-token (or HF_TOKEN)"
        return f"the Hub refused {repo_id} with status {error.response.status_code}: run the same command again later"
    if isinstance(error, errors.LocalEntryNotFoundError) or type(error).__module__.startswith(("http", "requests")):
        return _unreachable()
    if isinstance(error, OSError):
        return f"cannot write what was fetched: {error}"
    return None


def _gated(repo_id: str, *, with_token: bool) -> str:
    page = f"https://huggingface.co/{repo_id}"
    if with_token:
        return f"the account of this token has no access to {repo_id}: ask for it (or accept the licence) at {page}"
    return (
        f"{repo_id} is only for accounts that have access: accept its licence at {page}, make a token at "
        "https://huggingface.co/settings/tokens and pass it as --hf-token (or HF_TOKEN)"
    )


def _unreachable() -> str:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "HF_HUB_OFFLINE is set, so nothing is fetched: unset it, or copy the file here by hand"
    return (
        f"cannot reach {endpoint}: check the network (and HTTPS_PROXY or HF_ENDPOINT), and run the same command again; "
        "or fetch the file on another machine and copy it here"
    )
