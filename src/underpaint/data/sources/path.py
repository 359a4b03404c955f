"""What kind of data lies at a path."""

import zipfile
from pathlib import Path

from underpaint.data.sources.archive import is_tar, list_tar, list_zip
from underpaint.data.sources.base import Listing
from underpaint.data.sources.folder import list_folder
from underpaint.data.sources.parquet import has_images, list_parquet
from underpaint.data.sources.tables import TEXTS
from underpaint.data.sources.tree import MaskFiles
from underpaint.errors import InputError
from underpaint.files import KINDS


def list_path(path: Path, text: str, masks: MaskFiles = "aside") -> Listing:
    if path.is_dir():
        return list_folder(path, text, masks)
    if not path.is_file():
        raise InputError(f"{text} is neither a file nor a folder; expected {KINDS}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"cannot read {text}: {error.strerror}") from error
    if path.suffix.lower() in TEXTS or (start == b"PAR1" and not has_images(path)):
        return list_folder(path.parent, text, masks, path.name)
    if path.suffix.lower() == ".parquet" or start == b"PAR1":
        return list_parquet([path], path.parent)
    if zipfile.is_zipfile(path):
        return list_zip(path, masks)
    if path.suffix.lower() == ".zip":
        raise InputError(f"{text} is not a readable zip file: damaged or cut off")
    if is_tar(path):
        return list_tar(path, masks)
    if ".tar" in path.name.lower() or path.suffix.lower() == ".tgz":
        raise InputError(f"{text} is not a readable tar file: damaged or cut off")
    raise InputError(f"{text} is not a kind of data that is read; expected {KINDS}")
