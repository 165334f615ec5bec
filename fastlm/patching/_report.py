"""What was replaced in a model, what was left, and why."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Entry:
    """One module, or one function of the model.

    Attributes:
        name: as in model.named_modules(); "" is the model itself.
        kind: what it was, the name of its class.
        part: attention, norm, mlp, rope or loss.
        by: what runs in its place; None where it was left.
        reason: why it was left; of a replacement, what is to be known about it, or "".
    """

    name: str
    kind: str
    part: str
    by: str | None
    reason: str = ""


@dataclass
class Report:
    """The replaced and the left parts of a model, in the order of its modules. print() shows those alike in a line."""

    model: str
    entries: list[Entry] = field(default_factory=list)

    @property
    def replaced(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.by is not None]

    @property
    def left(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.by is None]

    def replace(self, name: str, kind: str, part: str, by: str, remark: str = "") -> None:
        self.entries.append(Entry(name, kind, part, by, remark))

    def leave(self, name: str, kind: str, part: str, reason: str) -> None:
        self.entries.append(Entry(name, kind, part, None, reason))

    def __str__(self) -> str:
        counts: Counter[tuple[str, str, str | None, str]] = Counter()
        first: dict[tuple[str, str, str | None, str], str] = {}
        for entry in self.entries:
            key = (entry.part, entry.kind, entry.by, entry.reason)
            counts[key] += 1
            first.setdefault(key, entry.name or "the model")
        lines = [f"fastlm in {self.model}: {len(self.replaced)} replaced, {len(self.left)} left"]
        for (part, kind, by, reason), count in counts.items():
            where = first[part, kind, by, reason]
            if by is None:
                text = f"left at {where}: {reason}"
            else:
                text = f"by {by}, {reason}" if reason else f"by {by}"
            line = f"  {part:<9} {count:3} {kind} {text}"
            lines += textwrap.wrap(line, 80, subsequent_indent=" " * 16, break_long_words=False, break_on_hyphens=False)
        return "\n".join(lines)
