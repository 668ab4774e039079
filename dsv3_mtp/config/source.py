"""A source of training data other than a path: `data.train: {type: package.module:Class, ...}`."""

from abc import abstractmethod
from typing import Any

from dsv3_mtp.config.registry import Registry
from dsv3_mtp.config.section import Section


class SourceSection(Section):
    """What is to be opened. Its keys are the fields of the class."""

    type: str

    @abstractmethod
    def open(self, split: str) -> Any:
<<<<<<< HEAD
        """The data.source.DataSource of "train" or "val". Raises ValueError: there is none."""
        raise NotImplementedError(f"{type(self).__name__} has no open(split)")
=======
        """The dsv3_mtp.data.source.DataSource of a split, "train" or "val".

        Raises:
            ValueError: there is nothing to open, or no such split.
        """
>>>>>>> main


SOURCES: Registry[SourceSection] = Registry("data source", SourceSection)
