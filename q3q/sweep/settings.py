"""What a study as a whole is asked for: where it is kept, and with what it runs."""

import math
from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from q3q.config.schema import tracking_uri
from q3q.errors import ConfigError
from q3q.masking import HIDDEN, masked
from q3q.record import Sweep
from q3q.storage.stores import folder_of
from q3q.sweep.machines import ResourceRequest, amount, request_of
from q3q.track.mlflow_sqlite import own_uri, read_uri


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """The settings of a study as a whole.

    storage: folder or URL
    name: None derives it from the methods
    question, expectation: of a saved study
    fresh: run finished trials again
    plan_only: print the plan and start nothing
    address: the running Ray cluster's, if any
    request: the memory, cores and GPUs that the user asked for
    tracking_uri, experiment, register: MLflow's
    config: the composed config, as YAML
    notes: lines to show before the trials run
    absent: lines about what is not here yet, to show with the plan
    """

    storage: str
    name: str | None = None
    question: str = ""
    expectation: str = ""
    fresh: bool = False
    plan_only: bool = False
    address: str | None = None
    request: ResourceRequest = field(default_factory=ResourceRequest)
    tracking_uri: str
    experiment: str | None = None
    register: str | None = None
    config: str = ""
    notes: tuple[str, ...] = ()
    absent: str = ""

    @classmethod
    def of(cls, config: DictConfig) -> "StudySettings":
        shown = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        for key in ("name", "track.experiment"):
            value = OmegaConf.select(config, key)
            if value is not None and not value.isprintable():
                raise ConfigError(f"{key}={value!r} has a character that cannot be printed")
        refuse_margin(config)
        read_uri(tracking_uri(config))  # refuses what is no tracker, before anything is planned
        return cls(
            storage=config.storage,
            name=config.name,
            question=config.question or "",
            expectation=config.expectation or "",
            fresh=config.fresh,
            plan_only=config.plan,
            address=config.cluster.address,
            request=request_of(config.cluster.get),
            tracking_uri=tracking_uri(config),
            experiment=config.track.experiment,
            register=config.track.register,
            config=masked(OmegaConf.to_yaml(shown)),
        )

    @classmethod
    def of_sweep(cls, sweep: Sweep, storage: str) -> "StudySettings":
        """Return the settings with which a stored sweep continues, in this folder or URL."""
        config = OmegaConf.create(sweep.config)
        cpus = OmegaConf.select(config, "cluster.cpus_per_trial", default="auto")
        uri = OmegaConf.select(config, "track.uri")
        if uri is not None and HIDDEN in uri:
            raise ConfigError(
                f"the sweep's tracker, {uri}, had a password, which is not kept: run the sweep's "
                f"own command instead: {sweep.command}"
            )
        return cls(
            storage=storage,
            name=sweep.name,
            question=sweep.question,
            expectation=sweep.expectation,
            tracking_uri=uri or own_uri(folder_of(storage)),
            experiment=sweep.experiment,
            request=ResourceRequest(cpus=amount("cluster.cpus_per_trial", cpus)),
            register=OmegaConf.select(config, "track.register"),
            config=sweep.config,
        )


def refuse_margin(config: DictConfig) -> None:
    """Raise ConfigError if no trial could be shown to stay within report.margin."""
    margin, evaluation = config.report.margin, config.evaluation
    if margin is None:
        return
    if not 0 < margin < math.inf:
        raise ConfigError(
            f"report.margin={margin:g} is not a margin: give a number above zero, in percent of a "
            "perplexity and in points of an accuracy"
        )
    if not (evaluation.texts or evaluation.tasks):
        raise ConfigError(
            f"report.margin={margin:g} needs samples paired with the unquantized model's, but "
            f"evaluation={evaluation.name} measures nothing: choose another evaluation"
        )
    if not evaluation.baseline:
        raise ConfigError(
            f"report.margin={margin:g} needs samples paired with the unquantized model's, but "
            "evaluation.baseline=false leaves it out: remove one of the two"
        )
