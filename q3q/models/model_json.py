"""Read the JSON files of a model's folder, which anybody may have written."""

import json
import stat
from pathlib import Path
from typing import Any

from q3q.errors import CheckpointError, first_line

OWN_FOLDER = "For a folder of your own: model=local model.path=DIR"
# Bytes that a file is read up to. The largest index has 4 MB, its config.json 2 kB.
CONFIG_LIMIT, INDEX_LIMIT, TOKENIZER_LIMIT = 4_000_000, 64_000_000, 512_000_000


def refuse_irregular(path: Path, limit: int) -> None:
    """Refuse what would be read without end: a pipe, a device, a huge file. No file is fine.

    Raises:
        CheckpointError: the path is there, and is no regular file of at most `limit` bytes.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is not a regular file: give a folder of plain files")
    if status.st_size > limit:
        raise CheckpointError(
            f"{path} has {status.st_size} bytes, and no model's has more than {limit}"
        )


def read_json(path: Path, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """Read a JSON file of a model's folder.

    Raises:
        CheckpointError: it is missing, not a regular file, larger than `limit` bytes, not JSON, or
            not a table.
    """
    refuse_irregular(path, limit)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent}: no {path.name} there, so not a model folder. {OWN_FOLDER}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a table of settings")
    return content
