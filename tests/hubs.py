"""A hub of one checkpoint, in a folder here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from huggingface_hub.errors import EntryNotFoundError

from retouch.models import checkpoint

SMALL = ["model_index.json", "transformer/config.json", "retouch.json"]
"""What of a checkpoint says how it is run."""


class Hub:
    """In the place of the one that is asked: `folder` is what it has, and comes to `cache`; `asked` is what was fetched.

    `lacking` is raised for a file that it has not.
    """

    def __init__(
        self, folder: Path, cache: Path, patch: pytest.MonkeyPatch, lacking: type[Exception] = EntryNotFoundError
    ) -> None:
        self.folder, self.cache, self.lacking = folder, cache, lacking
        self.asked: list[str] = []
        patch.setattr(checkpoint, "hf_hub_download", self._file)
        patch.setattr(DiffusionPipeline, "download", self._pipeline)

    def _file(self, name: str, path: str) -> str:
        self.asked.append(path)
        if not (self.folder / path).is_file():
            raise self.lacking(path)
        (self.cache / path).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(self.folder / path, self.cache / path))

    def _pipeline(self, name: str, **without: Any) -> str:
        """As diffusers does: what model_index.json names, and nothing beside it."""
        self.asked.append("pipeline")
        left = shutil.ignore_patterns("retouch.json", *without)
        return str(shutil.copytree(self.folder, self.cache, ignore=left, dirs_exist_ok=True))
