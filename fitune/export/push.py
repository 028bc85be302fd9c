"""Puts what a run left on the Hugging Face Hub, private unless it is told otherwise."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from fitune.config.schema import Run
from fitune.data.file_formats import first_line
from fitune.errors import FituneError, UsageError


def login() -> str:
    """The name that `hf auth login` left. UsageError without one, or if the Hub does not know it."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if not get_token():
        raise UsageError("push needs a login: hf auth login, with a token that may write")
    try:
        return HfApi().whoami()["name"]
    except OfflineModeIsEnabled:
        raise UsageError("push needs the network: unset HF_HUB_OFFLINE") from None
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) in (401, 403):
            raise UsageError(
                "push: the Hub refuses the login's token: hf auth login, with one that may write"
            ) from None
        raise FituneError(f"push: the Hub does not answer: {first_line(error)}") from None
    except Exception as error:  # the client's HTTP library has its own
        raise FituneError(f"push: the Hub cannot be reached: {first_line(error)}") from None


def repository(name: str | None, user: str, given: Path) -> str:
    """OWNER/NAME of what is pushed: by default the user's, named after the folder. UsageError for impossible names."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = name or given.absolute().name
    full = name if "/" in name else f"{user}/{name}"
    try:
        validate_repo_id(full)
    except HFValidationError as error:
        raise UsageError(f"--repo {full}: {first_line(error)}") from None
    return full


def what_to_push(given: Path, run: Run | None, *, merged: bool, gguf: str | None, **merging) -> Callable[[Path], Path]:
    """Makes the folder to upload, given a name for it. UsageError and FituneError for what is impossible.

    `merging` are the options of `whole_model`. Torch is imported only where there is something to merge.
    """
    if not (merged or gguf):
        if ignored := next((name for name in ("base", "onto") if merging.get(name)), None):
            raise UsageError(f"--{ignored} is for what is merged: add --merged or --gguf TYPE, or leave it out")
        return lambda folder: run.result_folder if run else given
    from fitune.export.gguf import export_gguf, refuse_impossible
    from fitune.export.whole_model import whole_model

    if gguf:
        refuse_impossible(gguf)
    model = whole_model(given, run, **merging)
    if gguf:
        return lambda folder: export_gguf(model, folder, gguf)[0].parent
    return model.make


def push(given: Path, make: Callable[[Path], Path], repo: str, *, public: bool) -> str:
    """Uploads the folder that `make` returns, to which it gives a name beside `given`; returns the page's address.

    A repository that exists keeps its visibility. FituneError where the Hub refuses.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix=".fitune-push-", dir=given.absolute().parent) as temporary:
        folder = make(Path(temporary) / repo.rpartition("/")[2])
        try:
            api = HfApi()
            page = api.create_repo(repo, private=not public, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload with fitune")
        except Exception as error:  # refused, or of the client's libraries for HTTP and for large files
            raise FituneError(f"push to {repo}: {first_line(error)}") from None
    return str(page)
