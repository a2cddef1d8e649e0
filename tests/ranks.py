"""Functions that tests run on all ranks of a gang; a module, as they travel by name."""

import gc

import torch


def parameter_bytes(team):
    """Return the bytes of the parameters of all models that each rank keeps."""
    return team.gather(sum(model.parameter_bytes() for model in team.models.values()))


def live_bytes(team):
    """Return the bytes of all live tensors in each rank's process."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            # The garbage collector does not list the share of a DeepSpeed parameter by itself.
            for tensor in (item, getattr(item, "ds_tensor", None)):
                if tensor is not None and tensor.device.type != "meta":
                    storages[tensor.untyped_storage().data_ptr()] = (
                        tensor.untyped_storage().nbytes()
                    )
    return team.gather(sum(storages.values()))


def known_models(team):
    return team.gather(len(team.models))
