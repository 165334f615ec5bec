"""What was replaced in a model, what was left, and why."""

from __future__ import annotations

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
            more = "" if count == 1 else f" and {count - 1} like it"
            what = f"by {by}" if by is not None else "left"
            because = f": {reason}" if reason else ""
            lines.append(f"  {part:<9} {kind} {what}, {first[part, kind, by, reason]}{more}{because}")
        return "\n".join(lines)
