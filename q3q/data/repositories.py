"""What a data set of questions is, and the study's: their repositories at fixed commits."""

from __future__ import annotations

from dataclasses import dataclass

MMLU, WIKITEXT = "cais/mmlu", "EleutherAI/wikitext_document_level"


@dataclass(frozen=True)
class Repository:
    """One of the study's repositories on the Hub, at a fixed commit.

    columns: those that each row must have
    text_columns: those that are text although they look like numbers
    """

    name: str
    commit: str
    columns: tuple[str, ...]
    text_columns: tuple[str, ...] = ()


# Of all other repositories, the commit of `main` when the sweep is planned counts.
REPOSITORIES = {
    repository.name: repository
    for repository in (
        Repository(
            "baber/piqa",
            commit="142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
            columns=("goal", "sol1", "sol2", "label"),
        ),
        Repository(
            "allenai/ai2_arc",
            commit="210d026faf9955653af8916fad021475a3f00453",
            columns=("question", "choices", "answerKey"),
        ),
        Repository(
            "Rowan/hellaswag",
            commit="218ec52e09a7e7462a5400043bb9a69a41d06b76",
            columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
            text_columns=("label",),
        ),
        Repository(
            "allenai/winogrande",
            commit="01e74176c63542e6b0bcb004dcdea22d94fb67b5",
            columns=("sentence", "option1", "option2", "answer"),
            text_columns=("option1", "option2", "answer"),
        ),
        Repository(
            "aps/super_glue",
            commit="3de24cf8022e94f4ee4b9d55a6f539891524d646",
            columns=("passage", "question", "label"),
        ),
        Repository(
            MMLU,
            commit="c30699e8356da336a370243923dbaf21066bb9fe",
            columns=("question", "choices", "answer"),
        ),
        Repository(
            WIKITEXT,
            commit="647234772b9554e208af6c826f23b99e3cac88c8",
            columns=("page",),
        ),
    )
}


@dataclass(frozen=True, order=True)
class DataSet:
    """One configuration of a repository of the Hub: `cais/mmlu`, `anatomy`."""

    repository: str
    name: str | None
    splits: tuple[str, ...] = ()  # the required ones

    @property
    def key(self) -> str:
        """The name in specs and messages."""
        return self.repository + (f":{self.name}" if self.name else "")

    @property
    def folders(self) -> tuple[str, ...]:
        """Possible folders in the user's folder; the last may hold other configurations too.

        Messages name the first.
        """
        base = self.repository.rpartition("/")[2]
        if not self.name:
            return (base,)
        short = {
            "ai2_arc": self.name.lower().replace("-", "_"),
            "super_glue": self.name,
            "wikitext_document_level": "wikitext",
        }.get(base)
        return tuple(filter(None, [short, f"{base}/{self.name}", base]))
