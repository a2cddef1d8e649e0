"""What kinds of GPUs can compute, by their compute capability; without torch."""

from q3q.errors import ConfigError

Capability = tuple[int, int]  # of an H100: 9, 0

BFLOAT16_SINCE: Capability = (8, 0)  # Ampere: older ones have no bfloat16 units


def refuse_card(dtype: str, name: str, capability: Capability | None) -> None:
    """Refuse a GPU that does not compute in the trial's type.

    torch emulates some bfloat16 operations there and lacks others, attention's among them, so the
    trial would fail late. No other type is taken instead: it would be another trial's.

    Args:
        name: the GPU's, for people.
        capability: None if unknown.

    Raises:
        ConfigError: it is too old for bfloat16.
    """
    if dtype != "bfloat16" or capability is None or capability >= BFLOAT16_SINCE:
        return
    version = ".".join(map(str, capability))
    raise ConfigError(
        f"{name or 'this GPU'} (compute capability {version}) does not compute in bfloat16, the "
        "model's type: give dtype=float32, or dtype=float16, whose range large activations may "
        "exceed; or cluster.gpus_per_trial=0 to compute on the processor"
    )
