"""The key `trends` of a study file: effects that are followed over lengths or sizes."""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Field

from dsv3_mtp.config.reader import Problem, show
from dsv3_mtp.config.section import Section, Text


class Trend(Section):
    """How the effect on the primary metric changes from comparison to comparison."""

    by: Literal["tokens", "parameters"]
    """What grows, of the arms compared with: tokens of training, or parameters without heads."""
    comparisons: Annotated[tuple[Text, ...], Field(min_length=2)]
    """Each of another length or size."""
    arms: Text
    """A pattern that fits one arm of each comparison, such as `*_sequential`."""

    def members(self, comparisons: Mapping[str, Any]) -> list[tuple[str, str]]:
        """(arm, the arm it is compared with) of each comparison."""
        pairs = []
        for name in self.comparisons:
            item = comparisons[name]
            pairs += [(arm, item.against) for arm in item.arms if fnmatchcase(arm, self.arms)]
        return pairs


def trend_rules(trends: Mapping[str, Trend], comparisons: Mapping[str, Any]) -> Iterator[Problem]:
    for name, trend in trends.items():
        place, known = f"trends.{name}", True
        for other in trend.comparisons:
            if other not in comparisons:
                known = False
                text = f"there is no comparison {show(other)}; there are {', '.join(comparisons)}"
                yield f"{place}.comparisons", text
        for other in trend.comparisons if known else ():
            fitting = [a for a in comparisons[other].arms if fnmatchcase(a, trend.arms)]
            if len(fitting) != 1:
                found = ", ".join(fitting) or "none"
                text = f"must fit one arm of the comparison {show(other)} (got {found})"
                yield f"{place}.arms", text
        if len(set(trend.comparisons)) != len(trend.comparisons):
            yield f"{place}.comparisons", f"must differ (got {show(trend.comparisons)})"
