"""Upload and download of a shared model through huggingface_hub."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download

from utils import settings
from utils.sharing.export import export
from utils.training import checkpoint
from utils.training.shared_folder import FILES


class SharedMagic(ModelHubMixin):
    """A trained model as huggingface_hub saves, uploads and downloads it.

    `path` is a checkpoint file or a folder of the three files; `state` is what it holds, as checkpoint.load gives it.
    `save_pretrained(folder)`, `push_to_hub("owner/name")` and `from_pretrained(folder or "owner/name")` come from the
    mixin.
    """

    def __init__(self, path: Path):
        self.path = path
        self.state = checkpoint.load(path, None, "SharedMagic")

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        settings.require_new_folder(Path(save_directory), "save_directory")  # the mixin removes a config.json there
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        if self.path.is_dir():
            for name in FILES:
                shutil.copyfile(self.path / name, save_directory / name)
        else:
            export(self.path, save_directory, "SharedMagic")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **download: Any) -> SharedMagic:
        folder = Path(model_id)
        return cls(
            folder if folder.is_dir() else Path(snapshot_download(model_id, allow_patterns=list(FILES), **download))
        )


@contextmanager
def hub_errors(flag: str, name: str) -> Iterator[None]:
    """Errors of the hub's client as a ValueError of one line."""
    try:
        yield
    except Exception as error:  # of whichever HTTP library the hub's client has come with
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{flag} {name}: {reason}; fix: check the name, and log in with `hf auth login`") from error
