"""What tests have all ranks of a gang do together; a module, since functions go from rank to rank by name."""

import gc

import torch


def parameter_bytes(team):
    """Bytes of the parameters that each rank keeps, of all models."""
    return team.gather(sum(model.held_bytes() for model in team.held.values()))


def live_bytes(team):
    """Of each rank: bytes of all tensors that are alive in its process."""
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor):
            # What a parameter of DeepSpeed's holds is an attribute of it, and no object of its own to the collector.
            for tensor in (one, getattr(one, "ds_tensor", None)):
                if tensor is not None and tensor.device.type != "meta":
                    storages[tensor.untyped_storage().data_ptr()] = (
                        tensor.untyped_storage().nbytes()
                    )
    return team.gather(sum(storages.values()))


def known_models(team):
    return team.gather(len(team.held))
