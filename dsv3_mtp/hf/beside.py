"""The files beside a checkpoint's weights: tokenizer, chat template, defaults of generation."""

import shutil
from pathlib import Path
from typing import Any

from dsv3_mtp.files.atomic import inside
from dsv3_mtp.files.checked import read_json

FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("chat_template.jinja", "generation_config.json"),
)


def check_beside(folder: Path) -> None:
    """Raises ValueError: one of them is damaged, or a link out of the folder. All are named."""
    problems = []
    for path in (folder / name for name in FILES if (folder / name).is_file()):
        if not inside(path, folder):
            problems.append(f"{path}: is a link out of the folder; put the file there")
        elif path.suffix == ".json":
            try:
                read_json(path, dict[str, Any], "take it from where the folder came from")
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def copy_beside(source: Path, folder: Path) -> None:
    """Raises ValueError as `check_beside`."""
    check_beside(source)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
