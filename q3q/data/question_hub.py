"""Data sets of questions on the Hub and in the cache of `datasets`, each at one commit."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.data.repositories import MMLU, REPOSITORIES, DataSet
from q3q.errors import ConfigError, UnavailableError, first_line
from q3q.models.hub import COMMIT, commit_of_data_set

if TYPE_CHECKING:
    from datasets import DatasetDict


def revision_of(dataset: DataSet, folder: Path | None, options: dict[str, Any]) -> str:
    """Return the commit to take: the pinned one, else that of `main`.

    If the Hub does not answer, it is the commit in the cache.
    """
    if dataset.repository in REPOSITORIES:
        return REPOSITORIES[dataset.repository].commit
    try:
        sha = commit_of_data_set(dataset.repository)
    except Exception as error:  # the Hub client's or its HTTP library's
        commits = sorted({folder.name for folder in downloaded(dataset, options)})
        if len(commits) == 1:
            return commits[0]
        if commits:
            raise ConfigError(
                f"the Hub does not say which commit of {dataset.key} to take: {first_line(error)}. "
                f"The cache of `datasets` has {len(commits)}, remove all but one there: "
                f"{', '.join(commits)}"
            ) from error
        raise UnavailableError(unavailable(dataset, folder, error)) from error
    if not sha or not COMMIT.fullmatch(sha):
        raise ConfigError(f"the Hub does not say which commit {dataset.repository} has")
    return sha


def from_hub(
    dataset: DataSet, revision: str, folder: Path | None, options: dict[str, Any]
) -> DatasetDict:
    """Load from the cache of `datasets` if it has exactly this commit, else from the Hub."""
    import datasets

    if (cached := _from_cache(dataset, revision, options)) is not None:
        return cached
    try:
        commit_of_data_set(dataset.repository, revision)  # does the Hub answer?
        builder = datasets.load_dataset_builder(
            dataset.repository, dataset.name, revision=revision, **options
        )
        if builder.hash != revision and not options:
            raise ConfigError(
                f"{dataset.key}: the Hub gave {builder.hash} where {revision} was asked for"
            )
        builder.download_and_prepare()
        return builder.as_dataset()
    except ConfigError:
        raise
    except Exception as error:
        raise UnavailableError(unavailable(dataset, folder, error)) from error


def _from_cache(dataset: DataSet, revision: str, options: dict[str, Any]) -> DatasetDict | None:
    """Return what `datasets` downloaded of this commit with these options; no network."""
    import datasets

    for folder in downloaded(dataset, options):
        if folder.name != revision:
            continue
        try:
            info = datasets.DatasetInfo.from_directory(str(folder))
            splits = datasets.DatasetDict()
            for split, entry in (info.splits or {}).items():
                shards = sorted(folder.glob(f"*-{split}.arrow"))
                shards = shards or sorted(folder.glob(f"*-{split}-*-of-*.arrow"))
                parts = [datasets.Dataset.from_file(str(shard)) for shard in shards]
                splits[split] = datasets.concatenate_datasets(parts)
                if len(splits[split]) != entry.num_examples:
                    raise ValueError("incomplete")
        except (OSError, ValueError):
            continue
        if splits:
            return splits
    return None


def downloaded(dataset: DataSet, options: dict[str, Any]) -> list[Path]:
    """Return the data set's folders in the cache of `datasets`, one a version and commit."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    namespace, _, base = dataset.repository.rpartition("/")
    name = "___".join(filter(None, [namespace, camelcase_to_snakecase(base)]))
    configuration = datasets.BuilderConfig(dataset.name or "default").create_config_id(options)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / name
    folders = cache.glob(f"{glob.escape(configuration)}/*/*")
    return sorted(folder for folder in folders if COMMIT.fullmatch(folder.name))


def unavailable(dataset: DataSet, folder: Path | None, error: Exception) -> str:
    """Return the message for a data set that is nowhere, with a way to provide it."""
    path = folder or "DIR"
    base, files = dataset.folders[0], "SPLIT.parquet, SPLIT.jsonl or SPLIT.csv"
    if dataset.repository == MMLU:
        base, files = "mmlu", "test/SUBJECT_test.csv and dev/SUBJECT_dev.csv"
    return (
        f"the data set {dataset.key} is neither in the cache of `datasets` nor available from the "
        f"Hub: {first_line(error)}. To provide it: data.path={path} with {path}/{base}/ holding "
        f"{files}"
    )
