"""What a run reads: one source, or several in proportion to weights."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from truestep.config import DataConfig, RunConfig
from truestep.data.bpe import BytePairTokenizer
from truestep.data.corpus import Say, is_pattern
from truestep.data.mixture import PERIOD, MixtureLoader, turns_of
from truestep.data.prepare import prepare_once
from truestep.data.tokenizer import DEFINITION, ByteTokenizer, Tokenizer, find_tokenizer
from truestep.data.tokens import PreparedData, TokenSplit, open_prepared
from truestep.settings import shown
from truestep.workflows.run import RunError


@dataclass(frozen=True)
class Sources:
    """The prepared sources of a run by their short names, with one tokenizer and their weights.

    `validation` is what is validated on: the text held out of each source, or one that was named.
    """

    prepared: dict[str, PreparedData]
    weights: tuple[float, ...]
    validation: dict[str, TokenSplit]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of every source."""
        return next(iter(self.prepared.values())).tokenizer

    @property
    def fingerprint(self) -> str:
        """The sha256 of all text and its order: of one source, its own."""
        fingerprints = [data.fingerprint for data in self.prepared.values()]
        if len(fingerprints) == 1:
            return fingerprints[0]
        return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()

    @property
    def train(self) -> dict[str, TokenSplit]:
        """The text of each source to train on."""
        return {name: data.train for name, data in self.prepared.items()}

    @property
    def train_tokens(self) -> int:
        """The tokens of all sources to train on."""
        return sum(len(split) for split in self.train.values())

    @property
    def validation_tokens(self) -> int:
        """The tokens that are validated on."""
        return sum(len(split) for split in self.validation.values())

    def shares(self) -> dict[str, tuple[float, int]]:
        """Return the share of the windows, and the tokens, of each of several sources."""
        if len(self.prepared) == 1:
            return {}
        turns = dict(zip(self.prepared, turns_of(self.weights), strict=True))
        return {name: (turns[name] / PERIOD, len(split)) for name, split in self.train.items()}

    def facts(self) -> dict[str, Any]:
        """Return what is known of each of several sources, nothing of one by itself."""
        if len(self.prepared) == 1:
            return {}
        facts = [
            {
                "name": name,
                "fingerprint": data.fingerprint,
                "train_tokens": len(data.train),
                "validation_tokens": len(data.validation),
                "turns": turns,
            }
            for (name, data), turns in zip(
                self.prepared.items(), turns_of(self.weights), strict=True
            )
        ]
        return {"sources": facts}


def epochs_text(loader: MixtureLoader, step: int) -> str:
    """Return the line that says how much of each source was read before a step."""
    length = loader.context_length
    parts = [
        f"{name} {turns * length:,} ({turns / loader.num_windows(name):.2f} epochs)"
        for name, turns in loader.turns_before(step).items()
    ]
    return f"tokens read by source: {', '.join(parts)}"


def short_names(sources: Iterable[str]) -> list[str]:
    """Return a name for each source that is the same from every directory: its file's name.

    Of two that are alike, the second has its number.
    """
    names: list[str] = []
    for source in sources:
        name = stem = Path(source).name or source
        number = 1
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return names


def open_data(config: RunConfig, runs: Path, say: Say, own: Tokenizer | None = None) -> Sources:
    """Return a run's data, prepared once below the directory of runs; `own` is its tokenizer.

    Without it, or if the settings name another, one is learnt from the text. Of several sources
    the first gives the tokenizer.
    Errors: CorpusError or StorageError for a source that does not serve; RunError for sources that
    do not go together.
    """
    _check_weights(config.data)
    name = config.data.tokenizer
    first, *others = config.data.sources
    directory = prepare_once(
        first,
        runs / ".data",
        tokenizer=ByteTokenizer() if name == "auto" else find_tokenizer(name),
        learnt=own if isinstance(own, BytePairTokenizer) and own.name == name else None,
        validation=config.data.validation,
        text_field=config.data.text_field,
        say=say,
    )
    data = open_prepared(directory)
    if name not in {"auto", data.tokenizer.name}:
        raise RunError(
            f"data.tokenizer={name}, but {first} was prepared with {data.tokenizer.name}; leave "
            "it at auto, or prepare the text again"
        )
    prepared = {first: data}
    for source in others:
        prepared[source] = _another_source(config, source, prepared, runs, say)
    named = dict(zip(short_names(prepared), prepared.values(), strict=True))
    validation = {source: part.validation for source, part in named.items()}
    if config.data.validation != "auto":  # each source was prepared with the same one
        validation = dict([next(iter(validation.items()))])
    weights = config.data.weights
    if weights == "auto":
        sizes = [float(len(part.train)) for part in named.values()]
        weights = tuple(sizes) if others else (1.0,)
    return Sources(named, weights, validation)


def _check_weights(data: DataConfig) -> None:
    """Refuse weights that are not one for each source: a run that goes on brings the other half."""
    if data.weights != "auto" and len(data.weights) != len(data.sources):
        raise RunError(
            f"data.weights={shown(data.weights)} must be one number for each source, and there are "
            f"{len(data.sources)} in data.source={shown(data.source)}"
        )


def _another_source(
    config: RunConfig, source: str, before: Mapping[str, PreparedData], runs: Path, say: Say
) -> PreparedData:
    """Return a further source, prepared with the tokenizer of the first."""
    first, data = next(iter(before.items()))
    tokenizer = data.tokenizer
    found = open_prepared(
        prepare_once(
            source,
            runs / ".data",
            tokenizer=tokenizer,
            validation=config.data.validation,
            text_field=config.data.text_field,
            say=say,
        )
    )
    if found.tokenizer.fingerprint != tokenizer.fingerprint:
        raise RunError(
            f"data.source={source} was prepared with another tokenizer than {first}; prepare both "
            "with one, or give their texts"
        )
    for other, part in before.items():
        if part.fingerprint == found.fingerprint:
            raise RunError(
                f"data.source={source} is the same text as {other}; name it once, with the sum of "
                "both weights"
            )
    return found


def document_end(config: RunConfig, tokenizer: Tokenizer) -> int | None:
    """Return the id that documents are told apart by, if they are to be."""
    return tokenizer.end_of_document if config.data.document_mask else None


def data_facts(config: RunConfig, data: Sources) -> dict[str, Any]:
    """Return what must be the same wherever a run goes on, and the name for it."""
    return {
        "data_source": ", ".join(config.data.sources),
        "data_fingerprint": data.fingerprint,
        "tokenizer_fingerprint": data.tokenizer.fingerprint,
        **data.facts(),
    }


def require_same_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse other text, or other ids for it, than a run began with; both are `data_facts`.

    Errors: RunError naming the source and both fingerprints.
    """
    for name, what, remedy in (
        (
            "data_fingerprint",
            "is not the text this run began with, or a file has another name",
            "restore it",
        ),
        (
            "tokenizer_fingerprint",
            "is not read with the tokenizer this run began with",
            f"restore {DEFINITION} in the run, or in a prepared source",
        ),
    ):
        before, after = str(saved.get(name, now[name])), now[name]
        if before != after:
            source = _changed_source(saved, now) or now["data_source"]
            raise RunError(
                f"data.source={source} {what} (fingerprint {before[:12]}, now "
                f"{after[:12]}); {remedy}, or start a new run"
            )


def source_fingerprints(facts: Mapping[str, Any]) -> list[str]:
    """Return the fingerprint of each source, as `data_facts` of this or an earlier run say it."""
    several = facts.get("sources", [{"fingerprint": facts.get("data_fingerprint")}])
    known = several if isinstance(several, list) else []
    return [str(each.get("fingerprint")) for each in known if isinstance(each, dict)]


def _changed_source(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return the first of several sources whose text is another one."""
    before, after = source_fingerprints(saved), source_fingerprints(now)
    names = [str(source["name"]) for source in now.get("sources", [])]
    if len(before) == len(after) == len(names):
        return next((n for n, a, b in zip(names, before, after, strict=True) if a != b), None)
    return None


def absolute_paths(config: RunConfig) -> dict[str, Any]:
    """Return the paths of the data as a resumed run finds them from any directory."""

    def absolute(path: str) -> str:
        return str(Path(path).resolve()) if Path(path).exists() or is_pattern(path) else path

    sources = tuple(absolute(source) for source in config.data.sources)
    return {
        "source": sources if len(sources) > 1 else sources[0],
        "validation": absolute(config.data.validation),
    }
