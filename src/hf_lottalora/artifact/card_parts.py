"""What stands in a README.md: a user's words, our part, and in it what a Trainer reported."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

BEGIN, END = "<!-- hf_lottalora: begin -->", "<!-- hf_lottalora: end -->"
_TRAINER = "<!-- what the Trainer reported -->"
_BY_TRAINER = "generated automatically according to the information the Trainer had access to"
_BY_TRL = "It has been trained using [TRL](https://github.com/huggingface/trl)"


@dataclass
class Parts:
    """A README.md, taken apart.

    Attributes:
        data: its metadata.
        before: a user's words before our part.
        after: and after it.
        trainer: what a Trainer reported, without the headings that it leaves empty.
        versions: lines of the list of versions, of packages that we do not list.
    """

    data: Any = field(default_factory=lambda: ModelCard("---\n{}\n---\n").data)
    before: str = ""
    after: str = ""
    trainer: str = ""
    versions: tuple[str, ...] = ()

    @property
    def words(self) -> bool:
        """Whether a user wrote something beside our part."""
        return bool((self.before + self.after).strip())

    def add_trainers(self, new: Parts) -> None:
        """Take over what a newer card of a Trainer says, metadata included; what it leaves open stays."""
        self.trainer, self.versions = new.trainer or new.before, new.versions
        tags = [*(self.data.tags or ()), *(new.data.tags or ())]
        for key, value in vars(new.data).items():
            if key in ("library_name", "licence"):  # of which the second is TRL's, and says nothing
                continue
            if value and (key != "model_name" or new.data.eval_results):  # two of one entry
                setattr(self.data, key, value)
        self.data.tags = list(dict.fromkeys(tags))

    def text(self, data: Any, ours: str) -> str:
        """The whole file with this metadata and our part."""
        card = ModelCard("---\n{}\n---\n")
        card.data = data
        before = f"{self.before.strip()}\n\n" if self.before.strip() else ""
        trainer = f"\n{_TRAINER}\n{self.trainer.strip()}\n" if self.trainer.strip() else ""
        card.text = f"{before}{BEGIN}\n{ours.rstrip()}\n{trainer}{END}{self.after or chr(10)}"
        return str(card)


def split(text: str | None) -> Parts:
    """Take a README.md apart; None where there is no file.

    Raises:
        ValueError: its metadata is not valid.
    """
    if text is None:
        return Parts()
    card = ModelCard(text)
    before, begin, rest = card.text.partition(BEGIN)
    named = re.findall(r"^- (TRL|Datasets|Tokenizers):? (.*)$", card.text, flags=re.MULTILINE)
    versions = tuple(f"- {name} {number}" for name, number in named)
    if begin:
        inside, _, after = rest.partition(END)
        return Parts(card.data, before, after, inside.partition(_TRAINER)[2], versions)
    if _BY_TRAINER in card.text or _BY_TRL in card.text:
        return Parts(card.data, trainer=_trainers_part(card.text), versions=versions)
    return Parts(card.data, "" if _is_template(card.text) else card.text)


def _trainers_part(text: str) -> str:
    text = re.sub(rf"<!--[^>]*{_BY_TRAINER}.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^# [^\n]*$", "## Training", text.strip(), count=1, flags=re.MULTILINE)
    text = re.sub(r"^##+ [^\n]*\n+More information needed\n+", "", text, flags=re.MULTILINE)
    # TRL's snippet is of a pipeline that cannot load adapters
    return re.sub(r"^##+ (?:Framework versions|Quick start)\n.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)


@cache
def _template_lines() -> frozenset[str]:
    """Of the card that huggingface_hub makes for PEFT and transformers, nothing filled in."""
    template = Path(ModelCard.default_template_path).read_text(encoding="utf-8").partition("\n---\n")[2]
    default = re.sub(r"\{\{[^{}]*?default\(\"(.*?)\", true\)[^{}]*\}\}", r"\1", template)
    return frozenset(line.strip() for line in re.sub(r"\{\{.*?\}\}", "", default).splitlines())


def _is_template(text: str) -> bool:
    added = r"### Framework versions|- PEFT \S+|This is the model card of a .* has been automatically generated\."
    lines = (line.strip() for line in text.splitlines())
    return all(line in _template_lines() or re.fullmatch(added, line) for line in lines)
