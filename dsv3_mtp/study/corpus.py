"""Whether a study's numbers are of the corpus that its published ones are of: a corpus that is made
of what is installed differs between environments, and its manifest hash says so.
"""

from collections.abc import Iterable
from pathlib import Path

from dsv3_mtp.data.shards import read_folder_index
from dsv3_mtp.study.load import LoadedStudy
from dsv3_mtp.study.matrix import Study


def corpus_note(loaded: LoadedStudy) -> str | None:
    """What to say before a run: the prepared folders here are not `corpus`, or are still to be
    made. Raises ValueError: a folder is there and is no prepared data.
    """
    if loaded.study.corpus is None:
        return None
    places = {path for config in loaded.configs.values() for path in config.data.paths}
    missing = [place for place in sorted(places) if not Path(place).is_dir()]
    if missing:
        return (
            f"{', '.join(missing)}: not there, and will be made of what is installed here. With "
            f"other packages it is another corpus than {loaded.study.corpus}, which the study's "
            "own numbers are of"
        )
    hashes = {read_folder_index(Path(place))["manifest_hash"] for place in places}
    return other_corpus(loaded.study, hashes)


def other_corpus(study: Study, hashes: Iterable[str]) -> str | None:
    """One sentence, where some manifest hash does not begin with the study's `corpus`."""
    others = sorted(h[:12] for h in set(hashes) if not h.startswith(study.corpus or ""))
    if not others:
        return None
    return (
        f"The corpus is {', '.join(others)}, not {study.corpus} as the study file names it: other "
        "files were installed, and these numbers are not to be set beside published ones."
    )
