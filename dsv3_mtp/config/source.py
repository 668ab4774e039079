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
        """The data.source.DataSource of "train" or "val". Raises ValueError: there is none."""


SOURCES: Registry[SourceSection] = Registry("data source", SourceSection)
